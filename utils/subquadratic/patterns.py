"""Survey sections 7.1 and 7.2, attention in fixed patterns: BlockBERT, the Sparse Transformer, Longformer.

Each function puts its attention into a model, in place; queries, keys and values keep their weights. The attentions are parts,
in `utils.parts.patterns`. A pattern here is a boolean tensor (heads, length, length), queries in rows, for pictures and for
what can be counted on short texts; the attentions never make one.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

from utils import bert, costs
from utils.parts.patterns import (
    BlockAttention,
    FixedAttention,
    GlobalWindowAttention,
    PatternAttention,
    StridedAttention,
    WindowAttention,
    WindowedAttention,
    summary_columns,
)
from utils.parts.self_attention import SelfAttention, replace_attention

# --- L-01 BlockBERT -------------------------------------------------------------------------------------------------


def head_shifts(num_heads: int, blocks: int, local_heads: int | None = None) -> list[int]:
    """How many blocks further on each head looks: 0 for `local_heads`, the others 1 to `blocks` - 1 in turn; ascending.

    Two heads per shift were best in the paper, 10 and 2 of 12 for 2 blocks, 8, 2 and 2 for 3; so it is by default, but at least
    half of the heads stay local. Raises ValueError for less than 1 block, and for heads that are not there.
    """
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    if local_heads is None:
        local_heads = max(num_heads - 2 * (blocks - 1), -(-num_heads // 2))
    if not 0 <= local_heads <= num_heads:
        raise ValueError(f"local_heads must lie in 0..{num_heads}, got {local_heads}")
    if blocks == 1:
        return [0] * num_heads
    return [0] * local_heads + sorted(1 + head % (blocks - 1) for head in range(num_heads - local_heads))


def block_attention(model: nn.Module, blocks: int, length: int = 512, local_heads: int | None = None) -> None:
    """BlockBERT: cut texts of `length` tokens into `blocks`; a block looks at one block, its own or, in some heads, another.

    Qiu et al. 2020 (arXiv 1911.02972), survey 7.1. The work on scores falls to 1 / blocks. Shorter and longer texts are cut
    into blocks of the same size. Raises ValueError for blocks outside 1 to the length, and for heads that are not there.
    """
    if not 1 <= blocks <= length:
        raise ValueError(f"blocks must lie in 1..{length}, got {blocks}")
    block = -(-length // blocks)

    def make(attention: nn.Module, layer: int) -> SelfAttention:
        shifts = head_shifts(attention.num_attention_heads, blocks, local_heads)
        return BlockAttention.from_attention(attention, block=block, shifts=shifts)

    replace_attention(model, make)


# --- L-02 Sparse Transformer, strided -------------------------------------------------------------------------------


def square_root_block(length: int, summaries: int = 1) -> int:
    """The stride or block for which texts of `length` take the least work.

    A query sees about b keys nearby and `summaries` * length / b far away: the sum is least at b = sqrt(summaries * length).
    """
    return max(1, round(math.sqrt(summaries * length)))


def strided_attention(model: nn.Module, stride: int, local_heads: int | None = None) -> None:
    """Sparse Transformer, strided: `local_heads` (half of them by default) see a window, the others every `stride`-th place.

    Child et al. 2019 (arXiv 1904.10509), survey 7.1; for the stride see `square_root_block`. Raises ValueError for a stride
    below 1 and for heads that are not there.
    """

    def make(attention: nn.Module, layer: int) -> SelfAttention:
        local = attention.num_attention_heads // 2 if local_heads is None else local_heads
        return StridedAttention.from_attention(attention, stride=stride, local_heads=local)

    replace_attention(model, make)


# --- L-03 Sparse Transformer, fixed ---------------------------------------------------------------------------------


def fixed_attention(model: nn.Module, block: int, summaries: int = 2, subblocks: int = 4) -> None:
    """Sparse Transformer, fixed: every query sees its block, and `summaries` places of every other block.

    Child et al. 2019 (arXiv 1904.10509), survey 7.1: blocks of 128 or 256 with 8 to 32 summaries, for some ten thousand tokens.
    Heads take their summaries from different sub-blocks, of which there are `subblocks` (4 in the authors' code). Raises
    ValueError for sizes below 1, and where a block has fewer places than summaries * subblocks.
    """

    def make(attention: nn.Module, layer: int) -> SelfAttention:
        return FixedAttention.from_attention(attention, block=block, summaries=summaries, subblocks=subblocks)

    replace_attention(model, make)


# --- L-12 Longformer ------------------------------------------------------------------------------------------------


def window_attention(
    model: nn.Module,
    window: int,
    dilation: int | Sequence[int] = 1,
    dilated_heads: int | None = None,
    global_tokens: int = 0,
) -> None:
    """Longformer: a window of `window` / 2 tokens to either side, and with `global_tokens` the first tokens for all.

    Beltagy et al. 2020 (arXiv 2004.05150), survey 7.2. The last `dilated_heads` (by default all) look at every `dilation`-th
    token; a list gives the dilation of each layer. Global tokens get projections of their own, which begin as the common ones.
    Raises ValueError for a window that is not even and at least 2, a dilation below 1, a list that does not have one for each
    layer, heads that are not there, and a negative number of global tokens.
    """
    depth = len(model.base_model.encoder.layer)
    dilation = [dilation] * depth if isinstance(dilation, int) else list(dilation)
    if len(dilation) != depth:
        raise ValueError(f"dilation must be one number, or one for each of the {depth} layers, got {dilation}")

    def make(attention: nn.Module, layer: int) -> SelfAttention:
        heads = attention.num_attention_heads
        dilated = heads if dilated_heads is None else dilated_heads
        if not 0 <= dilated <= heads:
            raise ValueError(f"dilated_heads must lie in 0..{heads}, got {dilated}")
        options = {"window": window, "dilations": [1] * (heads - dilated) + [dilation[layer]] * dilated}
        if not global_tokens:
            return WindowAttention.from_attention(attention, **options)
        return GlobalWindowAttention.from_attention(attention, **options, global_tokens=global_tokens)

    replace_attention(model, make)


# --- what a query sees ----------------------------------------------------------------------------------------------


def block_pattern(length: int, block: int, shifts: list[int]) -> torch.Tensor:
    """L-01: query i sees key j where (b(i) + shift) mod blocks = b(j), b(i) = floor(i / block); (heads, length, length)."""
    of, blocks = torch.arange(length) // block, -(-length // block)
    return torch.stack([(of[:, None] + shift) % blocks == of for shift in shifts])


def windows_pattern(length: int, windows: list[tuple[int, int]], global_tokens: int = 0) -> torch.Tensor:
    """L-02, L-12: |i - j| is a multiple of a head's dilation, and at most reach times that; (heads, length, length).

    `windows` has the (reach, dilation) of each head. Rows and columns of global tokens are full.
    """
    place = torch.arange(length)
    distance, first = (place[:, None] - place).abs(), place < global_tokens
    seen = [(distance % dilation == 0) & (distance <= reach * dilation) for reach, dilation in windows]
    return torch.stack(seen) | first[:, None] | first


def fixed_pattern(length: int, block: int, columns: torch.Tensor) -> torch.Tensor:
    """L-03: i and j are in one block, or j's place in its block is among the head's `columns` (heads, summaries)."""
    place = torch.arange(length)
    same = (place // block)[:, None] == place // block
    summary = ((place % block)[:, None] == columns[:, None]).any(-1)  # (heads, length)
    return same | summary[:, None]


def pattern(part: PatternAttention, length: int) -> torch.Tensor:
    """What a part's queries should see of a text by its definition, boolean (heads, length, length).

    Raises ValueError for a part that is none of these.
    """
    if isinstance(part, BlockAttention):
        return block_pattern(length, part.block, part.shifts)
    if isinstance(part, FixedAttention):
        columns = summary_columns(part.num_attention_heads, part.block, part.summaries, part.subblocks)
        return fixed_pattern(length, part.block, columns)
    if isinstance(part, WindowedAttention):
        return windows_pattern(length, part.windows(length), getattr(part, "global_tokens", 0))
    raise ValueError(f"{type(part).__name__} has no fixed pattern")


@torch.no_grad()
def seen(part: SelfAttention, length: int) -> torch.Tensor:
    """What the queries of a part do see, by trial: boolean (heads, length, length), for a softmax over any set of keys.

    Queries and keys are made 0, so that all weights of a query are equal, and values tell places apart: as many at a time as a
    head has dimensions. A place is seen where its value arrives.
    """
    part = copy.deepcopy(part).float()
    heads, size = part.num_attention_heads, part.attention_head_size
    for name, module in part.named_children():
        nn.init.zeros_(module.bias)
        (nn.init.eye_ if name.startswith("value") else nn.init.zeros_)(module.weight)
    runs = -(-length // size)
    places = torch.eye(length, runs * size, device=part.query.weight.device)
    values = places.unflatten(1, (runs, size)).transpose(0, 1)  # (runs, length, size)
    outputs, _ = part(values.repeat(1, 1, heads))
    return outputs.unflatten(2, (heads, size)).permute(2, 1, 0, 3).flatten(2)[..., :length] > 0


def seen_share(model: nn.Module, length: int) -> float:
    """Which share of all pairs of a text's tokens meet, by trial (`seen`): the mean over layers and heads. Dense is 1."""
    layers = model.base_model.encoder.layer
    return torch.stack([seen(layer.attention.self, length).float().mean() for layer in layers]).mean().item()


def expected_share(model: nn.Module, length: int) -> float:
    """The same by definition (`pattern`)."""
    layers = model.base_model.encoder.layer
    return torch.stack([pattern(layer.attention.self, length).float().mean() for layer in layers]).mean().item()


def heard(patterns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of whom every token has heard after 1, 2, ... layers, boolean (layers, length, length), by the pattern of each layer.

    A path goes through any head, or past the attention, where a token's own state is added.
    """
    joined, after = torch.eye(patterns[0].shape[-1]), []
    for sees in patterns:
        joined = (sees.any(0).float() @ joined + joined > 0).float()
        after.append(joined.bool())
    return torch.stack(after)


def model_patterns(model: nn.Module, length: int) -> list[torch.Tensor]:
    """`pattern` of every layer."""
    return [pattern(layer.attention.self, length) for layer in model.base_model.encoder.layer]


def reached(model: nn.Module, length: int) -> torch.Tensor:
    """Which share of all pairs is joined by a path through the first 1, 2, ... layers (`heard`), (layers,)."""
    return heard(model_patterns(model, length)).float().mean((1, 2))


@torch.inference_mode()
def mean_attention(dense: nn.Module, batch: dict) -> torch.Tensor:
    """A dense model's attention, mean over the texts of a batch: (layers, heads, length, length), on the CPU.

    The texts must be of one length: ValueError for padding.
    """
    if not batch["attention_mask"].all():
        raise ValueError("mean_attention takes texts of one length: cut the batch where its shortest text ends")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with bert.attention(dense, "eager"):
        maps = dense(**inputs, output_attentions=True).attentions  # (batch, heads, length, length) each
    return torch.stack([found.float().mean(0).cpu() for found in maps])


def attention_kept(model: nn.Module, attention: torch.Tensor) -> torch.Tensor:
    """Which share of a dense model's attention (`mean_attention`) falls on what the model's patterns see, (layers,).

    A pattern drawn by lot keeps the share of pairs that it sees.
    """
    seen = model_patterns(model, attention.shape[-1])
    return torch.stack([(found * sees).sum(-1).mean() for found, sees in zip(attention, seen, strict=True)])


def summary(model: nn.Module, dense: nn.Module, attention: torch.Tensor, length: int) -> dict[str, float]:
    """What a model's patterns make of texts of `length`, nothing trained.

    The share of pairs that meet; the share of the dense model's attention on them; multiply-adds of the attention cores, and of
    the whole model, over the dense model's; of how many tokens the first one has heard in the end; after how many layers every
    token has heard of every other (NaN: never).
    """
    work = [costs.macs_by_component(one, length) for one in (model, dense)]
    parts = [layer.attention.self for layer in model.base_model.encoder.layer]
    everyone = heard(model_patterns(model, length))
    complete = everyone.flatten(1).all(1).nonzero()
    return {
        "pairs": expected_share(model, length),
        "kept": attention_kept(model, attention).mean().item(),
        "core": sum(part.core_macs(length) for part in parts) / work[1]["attention_core"],
        "model": sum(work[0].values()) / sum(work[1].values()),
        "heard by [CLS]": int(everyone[-1, 0].sum()),
        "all heard in layer": complete[0].item() + 1 if len(complete) else math.nan,
    }
