"""Parts: modules that stand in for a piece of a BERT, and attentions that stand in for the dense one.

A part answers two questions that the rest of the suite would otherwise answer by looking at its class: from which `options`
it can be built again, and how many multiply-adds it takes (`macs`). Files name a part by its `kind` in the closed table
`PARTS`, and an attention by its name in `ATTENTIONS`, so that no file can name code. At the path "" a part is a whole student;
then it also has a `config` (with `vocab_size` and `num_labels`) and calls its embedding block `embeddings`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_outputs import SequenceClassifierOutput

from utils import CompanionError


class Part(nn.Module):
    """Base of all parts. `kind` is its name in `PARTS`."""

    kind: str

    def options(self) -> dict:
        """The JSON values from which the constructor builds the same structure again."""
        raise NotImplementedError

    def macs(self, length: int) -> int:
        """Multiply-adds for one sequence of `length` tokens (of the part at its place in the model)."""
        raise NotImplementedError


def build(kind: str, options: dict) -> Part:
    """A part of that kind with fresh weights; the global random numbers stay as they are. CompanionError for an unknown kind."""
    if kind not in PARTS:
        raise CompanionError(f"unknown part {kind!r}: this version knows {', '.join(PARTS)}")
    with torch.random.fork_rng(devices=[]):
        return PARTS[kind](**options)


def find(model: nn.Module) -> dict[str, Part]:
    """All parts of a model by path, outer ones first."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Part)}


# --- linear layers --------------------------------------------------------------------------------------------------


class LowRankLinear(Part):
    """y = L (R x) + b with L (out, rank) and R (rank, in): it stays factorised in memory, on disk and in the clock."""

    kind = "low_rank_linear"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.left = nn.Parameter(torch.randn(out_features, rank) / rank**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """The best approximation of that rank (Eckart and Young 1936): the singular values are shared out between the factors."""
        part = cls(linear.in_features, linear.out_features, rank, linear.bias is not None).to(linear.weight)
        U, S, Vh = torch.linalg.svd(linear.weight.float(), full_matrices=False)
        root = S[:rank].sqrt()
        part.left.copy_(U[:, :rank] * root)
        part.right.copy_(root[:, None] * Vh[:rank])
        if linear.bias is not None:
            part.bias.copy_(linear.bias)
        return part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)

    def options(self) -> dict:
        """Sizes and whether there is a bias."""
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
                "bias": self.bias is not None}  # fmt: skip

    def macs(self, length: int) -> int:
        """Each token passes both factors."""
        return length * self.rank * (self.in_features + self.out_features)


# --- whole students -------------------------------------------------------------------------------------------------


class BiLSTM(Part):
    """A student without any BERT inside: embeddings, one bidirectional LSTM, a hidden layer, a classifier.

    After Tang et al. 2019 (arXiv 1903.12136): the last states of both directions are joined. Padding must be on the right.
    """

    kind = "bilstm"

    def __init__(self, vocab_size: int, num_labels: int, embedding_size: int = 128, hidden_size: int = 128, head_size: int = 128):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, num_labels=num_labels)
        self.embeddings = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(2 * hidden_size, head_size)
        self.classifier = nn.Linear(head_size, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> SequenceClassifierOutput:
        """Logits (batch, classes) of token ids (batch, length)."""
        lengths = attention_mask.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(self.embeddings(input_ids), lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)  # (2, batch, hidden): each direction at its own end
        return SequenceClassifierOutput(logits=self.classifier(torch.relu(self.hidden(last.transpose(0, 1).flatten(1)))))

    def options(self) -> dict:
        """Vocabulary, classes and widths."""
        return {"vocab_size": self.config.vocab_size, "num_labels": self.config.num_labels,
                "embedding_size": self.embeddings.embedding_dim, "hidden_size": self.lstm.hidden_size,
                "head_size": self.hidden.out_features}  # fmt: skip

    def macs(self, length: int) -> int:
        """Four gates, two directions, input and state, per token; the head once."""
        gates = 2 * 4 * self.lstm.hidden_size * (self.lstm.input_size + self.lstm.hidden_size)
        return length * gates + self.hidden.weight.numel() + self.classifier.weight.numel()


PARTS: dict[str, type[Part]] = {part.kind: part for part in (LowRankLinear, BiLSTM)}


# --- attentions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """An attention without parameters of its own. `macs(length, num_heads, head_size)` counts its core for one sequence."""

    forward: Callable
    macs: Callable[[int, int, int], int]


def padding_mask(*args, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """transformers builds masks by attention name; without this one a registered attention would see no padding at all."""
    return attention_mask


def linear_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attention in linear time: phi(Q) (phi(K)^T V) over phi(Q) sum(phi(K)), with phi(x) = elu(x) + 1.

    `query`, `key`, `value` (batch, heads, length, head size), `attention_mask` (batch, length); returns (batch, length, heads,
    head size). No length x length tensor is formed. Katharopoulos et al. 2020 (arXiv 2006.16236).
    """
    q, k = nn.functional.elu(query) + 1, nn.functional.elu(key) + 1
    if attention_mask is not None:
        k = k * attention_mask[:, None, :, None].to(k.dtype)
    summary = k.transpose(-1, -2) @ value  # (batch, heads, head size, head size)
    weight = q @ k.sum(-2).unsqueeze(-1)  # (batch, heads, length, 1)
    return ((q @ summary) / weight.clamp(min=1e-6)).transpose(1, 2), None


ATTENTIONS: dict[str, Attention] = {
    "linear": Attention(
        linear_attention, lambda length, num_heads, head_size: num_heads * length * head_size * (2 * head_size + 1)
    ),
}
for _name, _attention in ATTENTIONS.items():
    AttentionInterface.register(_name, _attention.forward)
    AttentionMaskInterface.register(_name, padding_mask)
STOCK = ("eager", "sdpa")
DENSE = set(STOCK)  # attentions that form every product of length x length, and so cost what the dense one costs


def register_dense(name: str, forward: Callable) -> None:
    """Register an attention that computes the dense products in other numbers, for use in a context: no file can name it."""
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, eager_mask)
    DENSE.add(name)


def attention_macs(name: str | None, length: int, num_heads: int, head_size: int) -> int:
    """Multiply-adds of an attention core for one sequence. Raises ValueError for an attention that nobody counted."""
    if name in DENSE:
        return 2 * length * length * num_heads * head_size  # scores, and sums weighted by them
    if name not in ATTENTIONS:
        raise ValueError(f"no closed form for the attention {name!r}: give it one in utils.parts.ATTENTIONS")
    return ATTENTIONS[name].macs(length, num_heads, head_size)
