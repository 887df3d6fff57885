"""MobileBERT's pieces: bottleneck layers and an embedding block that looks at neighbours."""

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from utils.parts.attention import attention_macs
from utils.parts.part import Part


class NoNorm(nn.Module):
    """x * weight + bias: what MobileBERT has in place of LayerNorm, because it needs no statistics of x (Sun et al. 2020)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape stays."""
        return x * self.weight + self.bias


def make_norm(norm: str, size: int) -> nn.Module:
    """`no_norm` or `layer_norm`. Raises ValueError for another name."""
    if norm not in ("no_norm", "layer_norm"):
        raise ValueError(f"norm must be no_norm or layer_norm, got {norm!r}")
    return NoNorm(size) if norm == "no_norm" else nn.LayerNorm(size, eps=1e-12)


def bert_start(module: nn.Module) -> None:
    """BERT's random start: weights of standard deviation 0.02, biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)


class DenseNorm(nn.Module):
    """norm(W x + b), or norm(W x + b + residual)."""

    def __init__(self, in_features: int, out_features: int, norm: str):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(in_features, out_features), make_norm(norm, out_features)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(..., in) to (..., out)."""
        y = self.dense(x)
        return self.LayerNorm(y if residual is None else y + residual)


class NarrowAttention(BertSelfAttention):
    """MobileBERT's attention: queries and keys from one narrow input, values from the wide one. Dense products, whatever the
    model's name for its attention; a subclass of BERT's, so that `output_attentions` finds its maps.
    """

    def __init__(self, hidden_size: int, bottleneck_size: int, num_heads: int):
        nn.Module.__init__(self)
        if bottleneck_size % num_heads:
            raise ValueError(f"num_heads must divide the bottleneck size {bottleneck_size}, got {num_heads}")
        self.num_attention_heads, self.attention_head_size = num_heads, bottleneck_size // num_heads
        self.all_head_size = bottleneck_size
        self.query = nn.Linear(bottleneck_size, bottleneck_size)
        self.key = nn.Linear(bottleneck_size, bottleneck_size)
        self.value = nn.Linear(hidden_size, bottleneck_size)

    def forward(
        self, narrow: torch.Tensor, wide: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (batch, length, bottleneck) and attention maps (batch, heads, length, length)."""
        q, k, v = (project(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
                   for project, x in ((self.query, narrow), (self.key, narrow), (self.value, wide)))  # fmt: skip
        scores = q @ k.transpose(-1, -2) * self.attention_head_size**-0.5
        if attention_mask is not None:  # boolean where the model's attention is `sdpa`, added scores where it is `eager`
            hidden = (
                torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
                if attention_mask.dtype == torch.bool
                else attention_mask
            )
            scores = scores + hidden
        maps = scores.softmax(-1).to(v.dtype)
        return (maps @ v).transpose(1, 2).flatten(2), maps


class FeedForward(nn.Module):
    """norm(x + W2 relu(W1 x))."""

    def __init__(self, size: int, neurons: int, norm: str):
        super().__init__()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(size, neurons)})
        self.output = DenseNorm(neurons, size, norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape stays."""
        return self.output(self.intermediate.dense(x).relu(), x)


class MobileBertLayer(Part, BertLayer):
    """A bottleneck layer: hidden size -> bottleneck, attention and several FFNs inside it, bottleneck -> hidden size.

    Sun et al. 2020 (arXiv 2004.02984), survey 4.4. It takes the place of a `BertLayer` (so that `output_hidden_states` finds
    it), and its inner names are those of `transformers`. The paper: hidden 512, bottleneck 128, 4 heads, 4 FFNs of 512,
    `no_norm`.
    """

    kind = "mobilebert_layer"

    def __init__(
        self, hidden_size: int, bottleneck_size: int, num_heads: int, neurons: int, num_ffns: int = 4, norm: str = "no_norm"
    ):
        nn.Module.__init__(self)
        if num_ffns < 1:
            raise ValueError(f"num_ffns must be at least 1, got {num_ffns}")
        self.sizes = {"hidden_size": hidden_size, "bottleneck_size": bottleneck_size, "num_heads": num_heads,
                      "neurons": neurons, "num_ffns": num_ffns, "norm": norm}  # fmt: skip
        self.bottleneck = nn.ModuleDict({name: DenseNorm(hidden_size, bottleneck_size, norm) for name in ("input", "attention")})
        self.attention = nn.ModuleDict({"self": NarrowAttention(hidden_size, bottleneck_size, num_heads),
                                        "output": DenseNorm(bottleneck_size, bottleneck_size, norm)})  # fmt: skip
        self.ffn = nn.ModuleList(FeedForward(bottleneck_size, neurons, norm) for _ in range(num_ffns - 1))
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(bottleneck_size, neurons)})
        self.output = DenseNorm(neurons, bottleneck_size, norm)
        self.output.bottleneck = DenseNorm(bottleneck_size, hidden_size, norm)
        bert_start(self)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args, **kwargs) -> torch.Tensor:
        """(batch, length, hidden) to the same shape."""
        narrow, residual = self.bottleneck["attention"](hidden_states), self.bottleneck["input"](hidden_states)
        attended, _ = self.attention["self"](narrow, hidden_states, attention_mask)
        x = self.attention["output"](attended, residual)
        for ffn in self.ffn:
            x = ffn(x)
        x = self.output(self.intermediate.dense(x).relu(), x)
        return self.output.bottleneck(x, hidden_states)

    def options(self) -> dict:
        """All sizes, and the kind of normalisation."""
        return dict(self.sizes)

    def macs(self, length: int) -> int:
        """Three ways in (two bottlenecks, values), one out, query, key and output inside, the FFNs, and the attention core."""
        hidden, narrow, neurons = (self.sizes[name] for name in ("hidden_size", "bottleneck_size", "neurons"))
        token = 4 * hidden * narrow + 3 * narrow**2 + self.sizes["num_ffns"] * 2 * narrow * neurons
        return length * token + attention_macs("eager", length, self.sizes["num_heads"], narrow // self.sizes["num_heads"])


class TrigramEmbeddings(Part):
    """MobileBERT's embedding block: short word vectors, each joined with its two neighbours' and projected to the hidden size.

    It takes the place of `bert.embeddings`. Sun et al. 2020 (arXiv 2004.02984), survey 4.4. The row of padding (id 0) stays
    zero, so that the last token of a padded sentence has the neighbour of an unpadded one.
    """

    kind = "trigram_embeddings"

    def __init__(self, vocab_size: int, embedding_size: int, hidden_size: int, max_length: int = 512, norm: str = "no_norm"):
        super().__init__()
        self.norm = norm
        self.word_embeddings = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_length, hidden_size)
        self.token_type_embeddings = nn.Embedding(2, hidden_size)
        self.embedding_transformation = nn.Linear(3 * embedding_size, hidden_size)
        self.LayerNorm = make_norm(norm, hidden_size)
        bert_start(self)
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.word_embeddings.weight[0])

    def forward(self, input_ids: torch.Tensor | None = None, token_type_ids: torch.Tensor | None = None,
                position_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None,
                **kwargs) -> torch.Tensor:  # fmt: skip
        """Token ids (batch, length), or word vectors (batch, length, embedding), to (batch, length, hidden)."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        place = torch.arange(words.shape[1], device=words.device)[None] if position_ids is None else position_ids
        kinds = torch.zeros_like(place) if token_type_ids is None else token_type_ids
        after, before = nn.functional.pad(words[:, 1:], (0, 0, 0, 1)), nn.functional.pad(words[:, :-1], (0, 0, 1, 0))
        x = self.embedding_transformation(torch.cat([after, words, before], -1))
        return self.LayerNorm(x + self.position_embeddings(place) + self.token_type_embeddings(kinds))

    def options(self) -> dict:
        """All sizes, and the kind of normalisation."""
        return {"vocab_size": self.word_embeddings.num_embeddings, "embedding_size": self.word_embeddings.embedding_dim,
                "hidden_size": self.embedding_transformation.out_features,
                "max_length": self.position_embeddings.num_embeddings, "norm": self.norm}  # fmt: skip

    def macs(self, length: int) -> int:
        """The projection of three joined vectors per token."""
        return length * self.embedding_transformation.weight.numel()
