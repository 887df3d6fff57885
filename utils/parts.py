"""Parts: modules that stand in for a piece of a BERT, and attentions that stand in for the dense one.

A part answers two questions that the rest of the suite would otherwise answer by looking at its class: from which `options`
it can be built again, and how many multiply-adds it takes (`macs`). Files name a part by its `kind` in the closed table
`PARTS`, and an attention by its name in `ATTENTIONS`, so that no file can name code. At the path "" a part is a whole student;
then it also has a `config` (with `vocab_size` and `num_labels`) and calls its embedding block `embeddings`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import AttentionInterface, BertConfig, BertModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

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


def in_place_of(linear: nn.Linear, kind: type[Part], size: int) -> Part:
    """A part with a linear layer's widths, number type and bias, and one size of its own; its weights are still to be set."""
    part = kind(linear.in_features, linear.out_features, size, linear.bias is not None).to(linear.weight)
    if linear.bias is not None:
        part.bias.copy_(linear.bias)
    return part


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
        """The best approximation of that rank (Eckart and Young 1936): the singular values are shared out between the
        factors.
        """
        part = in_place_of(linear, cls, rank)
        U, S, Vh = torch.linalg.svd(linear.weight.float(), full_matrices=False)
        root = S[:rank].sqrt()
        part.left.copy_(U[:, :rank] * root)
        part.right.copy_(root[:, None] * Vh[:rank])
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


class GroupedLinear(Part):
    """y_g = W_g x_g + b_g: inputs and outputs fall into equal groups, and each group of outputs sees its own group of inputs
    only.

    A convolution of width 1 in groups, with 1 / groups of a dense layer's weights and multiply-adds. SqueezeBERT, Iandola et
    al. 2020 (arXiv 2006.11316), survey 4.4. Raises ValueError where the groups do not divide both widths.
    """

    kind = "grouped_linear"

    def __init__(self, in_features: int, out_features: int, groups: int, bias: bool = True):
        super().__init__()
        if groups < 1 or in_features % groups or out_features % groups:
            raise ValueError(f"groups must divide {in_features} inputs and {out_features} outputs, got {groups}")
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        start = torch.randn(groups, out_features // groups, in_features // groups)
        self.weight = nn.Parameter(start / (in_features // groups) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, groups: int) -> "GroupedLinear":
        """The diagonal blocks of a dense matrix: of all layers with these groups the nearest one, since it has no other
        entries.
        """
        part = in_place_of(linear, cls, groups)
        rows, columns = part.weight.shape[1:]
        part.weight.copy_(
            torch.stack([linear.weight[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)])
        )
        return part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        grouped = x.reshape(-1, self.groups, self.in_features // self.groups).transpose(0, 1)  # (groups, tokens, in / groups)
        y = torch.bmm(grouped, self.weight.transpose(1, 2).to(x.dtype)).transpose(0, 1)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def options(self) -> dict:
        """Widths, groups and whether there is a bias."""
        return {"in_features": self.in_features, "out_features": self.out_features, "groups": self.groups,
                "bias": self.bias is not None}  # fmt: skip

    def macs(self, length: int) -> int:
        """A dense layer's divided by the groups."""
        return length * self.in_features * self.out_features // self.groups


# --- MobileBERT -----------------------------------------------------------------------------------------------------


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

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The sentence as the LSTM leaves it, both directions joined, each at its own end; (batch, 2 * hidden)."""
        lengths = attention_mask.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(self.embeddings(input_ids), lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)  # (2, batch, hidden)
        return last.transpose(0, 1).flatten(1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> SequenceClassifierOutput:
        """Logits (batch, classes) of token ids (batch, length)."""
        return SequenceClassifierOutput(logits=self.classifier(torch.relu(self.hidden(self.encode(input_ids, attention_mask)))))

    def options(self) -> dict:
        """Vocabulary, classes and widths."""
        return {"vocab_size": self.config.vocab_size, "num_labels": self.config.num_labels,
                "embedding_size": self.embeddings.embedding_dim, "hidden_size": self.lstm.hidden_size,
                "head_size": self.hidden.out_features}  # fmt: skip

    def macs(self, length: int) -> int:
        """Four gates, two directions, input and state, per token; the head once."""
        gates = 2 * 4 * self.lstm.hidden_size * (self.lstm.input_size + self.lstm.hidden_size)
        return length * gates + self.hidden.weight.numel() + self.classifier.weight.numel()


class TextCNN(Part):
    """A student of one convolution: filters over windows of several widths, their maximum over the sentence, a classifier.

    Kim 2014 (arXiv 1408.5882). Padding is taken out before the maximum, and windows that reach over an end see zeros.
    """

    kind = "text_cnn"

    def __init__(
        self, vocab_size: int, num_labels: int, embedding_size: int = 128, filters: int = 100, widths: tuple[int, ...] = (3, 4, 5)
    ):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, num_labels=num_labels)
        self.embeddings = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(embedding_size, filters, width) for width in widths)
        self.classifier = nn.Linear(filters * len(widths), num_labels)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The highest answer of every filter; (batch, filters * widths)."""
        real = attention_mask[:, None].bool()
        x = self.embeddings(input_ids).transpose(1, 2) * real  # (batch, embedding, length)
        highest = []
        for conv in self.convolutions:
            before, after = (conv.kernel_size[0] - 1) // 2, conv.kernel_size[0] // 2  # as many windows as tokens
            answers = conv(nn.functional.pad(x, (before, after))).relu()
            highest.append(answers.masked_fill(~real, 0.0).amax(-1))
        return torch.cat(highest, 1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> SequenceClassifierOutput:
        """Logits (batch, classes) of token ids (batch, length)."""
        return SequenceClassifierOutput(logits=self.classifier(self.encode(input_ids, attention_mask)))

    def options(self) -> dict:
        """Vocabulary, classes, filters and the widths of their windows."""
        return {"vocab_size": self.config.vocab_size, "num_labels": self.config.num_labels,
                "embedding_size": self.embeddings.embedding_dim, "filters": self.convolutions[0].out_channels,
                "widths": [conv.kernel_size[0] for conv in self.convolutions]}  # fmt: skip

    def macs(self, length: int) -> int:
        """Every filter at every token; the classifier once."""
        return length * sum(conv.weight.numel() for conv in self.convolutions) + self.classifier.weight.numel()


class SpelledBert(Part):
    """A BERT with a small vocabulary of its own that reads the ids of a larger one: each id is spelled in its own word pieces.

    `spelling` (vocabulary, pieces) lists the own ids of every foreign one, padded with 0 ([PAD]). Sentences grow by spelling,
    so a batch of `length` ids takes ceil(growth * length) places; what is beyond them is cut off. `bert` holds the options of
    a `BertConfig`. Made for mixed-vocabulary training, Zhao et al. 2019 (arXiv 1909.11687), survey 4.4: a user would ship the
    small tokenizer, and not the table; it lets such a student be measured on the same token ids as everybody else, and its
    bytes count.
    """

    kind = "spelled_bert"

    def __init__(self, vocab_size: int, pieces: int, growth: float, bert: dict):
        super().__init__()
        if not 1 <= growth <= pieces:
            raise ValueError(f"growth must lie between 1 and the {pieces} pieces of the longest spelling, got {growth}")
        own = BertConfig(
            **bert, attn_implementation="eager"
        )  # plain products are faster than fused ones at sentence length on a CPU
        self.given, self.growth = dict(bert), growth
        self.config = SimpleNamespace(vocab_size=vocab_size, num_labels=own.num_labels)
        self.register_buffer("spelling", torch.zeros(vocab_size, pieces, dtype=torch.int16))
        self.bert = BertModel(own)
        self.classifier = nn.Linear(own.hidden_size, own.num_labels)

    def places(self, length: int) -> int:
        """Places for the own pieces of a batch of `length` foreign ids."""
        most = min(length * self.spelling.shape[1], self.bert.config.max_position_embeddings)
        return min(math.ceil(self.growth * length), most)

    def spell(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Own ids and their attention mask, (batch, places), of foreign ids (batch, length)."""
        pieces = self.spelling[input_ids].long() * attention_mask[..., None]
        flat = pieces.flatten(1)
        order = (flat == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.places(input_ids.shape[1])]  # pieces first
        own = flat.gather(1, order)
        return own, (own != 0).long()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> SequenceClassifierOutput:
        """Logits (batch, classes) of foreign token ids (batch, length); options such as `output_hidden_states` go to the BERT
        inside.
        """
        own, mask = self.spell(input_ids, attention_mask)
        out = self.bert(input_ids=own, attention_mask=mask, **kwargs)
        return SequenceClassifierOutput(
            logits=self.classifier(out.pooler_output), hidden_states=out.hidden_states, attentions=out.attentions
        )

    def options(self) -> dict:
        """The foreign vocabulary, the longest spelling, the room for it, and the BERT inside."""
        return {
            "vocab_size": self.config.vocab_size,
            "pieces": self.spelling.shape[1],
            "growth": self.growth,
            "bert": dict(self.given),
        }

    def macs(self, length: int) -> int:
        """A BERT's closed form at the places of `length` ids; pooler and classifier once."""
        own, places = self.bert.config, self.places(length)
        token = 4 * own.hidden_size**2 + 2 * own.hidden_size * own.intermediate_size
        core = attention_macs("eager", places, own.num_attention_heads, own.hidden_size // own.num_attention_heads)
        return own.num_hidden_layers * (places * token + core) + own.hidden_size**2 + self.classifier.weight.numel()


PARTS: dict[str, type[Part]] = {
    part.kind: part for part in (LowRankLinear, GroupedLinear, MobileBertLayer, TrigramEmbeddings, BiLSTM, TextCNN, SpelledBert)
}


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
