"""Self-attention whose core has options or parameters of its own: it stands in the place of a layer's `attention.self`."""

import torch
from torch import nn

from utils.parts.attention import OWN
from utils.parts.part import Part


class SelfAttention(Part):
    """Queries, keys and values of a BERT layer, and another way from them to the outputs: `core`.

    The three projections keep their names and weights. A model with such parts carries the attention `own`, so that the mask
    comes as (batch, length), 1 for text: transformers would build length x length for a stock one. Raises ValueError where the
    heads do not divide the hidden size.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(f"the heads must divide the hidden size {hidden_size}, got {num_attention_heads}")
        self.num_attention_heads, self.attention_head_size = num_attention_heads, hidden_size // num_attention_heads
        self.all_head_size = hidden_size
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))

    @classmethod
    @torch.no_grad()
    def from_attention(cls, attention: nn.Module, **options) -> "SelfAttention":
        """With the three projections of a trained self-attention; whatever a core adds is at its start."""
        part = cls(attention.all_head_size, attention.num_attention_heads, **options).to(attention.query.weight)
        for name in ("query", "key", "value"):
            getattr(part, name).load_state_dict(getattr(attention, name).state_dict())
        return part.train(attention.training)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        """Hidden states (batch, length, hidden), mask (batch, length) or none; returns outputs of the same shape, and no maps."""
        q, k, v = (self.heads(project(hidden_states)) for project in (self.query, self.key, self.value))
        text = torch.ones_like(hidden_states[..., 0]) if attention_mask is None else attention_mask
        return self.core(q, k, v, text.bool()).transpose(1, 2).flatten(2), None

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) to (batch, heads, length, head size)."""
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Outputs (batch, heads, length, head size) of queries, keys and values of that shape; `text` (batch, length), boolean.

        What stands where there is no text is never read, but must be finite.
        """
        raise NotImplementedError

    def core_macs(self, length: int) -> int:
        """Multiply-adds of the core for one sequence of `length` tokens."""
        raise NotImplementedError

    def macs(self, length: int) -> int:
        """Three projections and the core."""
        return 3 * length * self.all_head_size**2 + self.core_macs(length)

    def options(self) -> dict:
        """Hidden size and heads; a core adds its own."""
        return {"hidden_size": self.all_head_size, "num_attention_heads": self.num_attention_heads}


def replace_attention(model: nn.Module, make) -> None:
    """Put `make(attention, layer)` in the place of every layer's self-attention. In place.

    `make` gets the module and the layer's number and returns a `SelfAttention`; one and the same for several layers shares it.
    """
    for number, layer in enumerate(model.base_model.encoder.layer):
        layer.attention.self = make(layer.attention.self, number)
    model.config._attn_implementation = OWN
