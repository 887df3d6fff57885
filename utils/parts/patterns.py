"""Attention in which every query sees a fixed set of places: blocks, columns, windows. No tensor of length x length is made.

All of them cut the queries into blocks and lay beside each block the keys that its queries may see; those that one of them may
not see are masked. Inside, tensors are (batch, length, heads, head size), as the projections leave them, and after `fold`
(batch, blocks, block, heads, head size): most blocks are then views and no copies.
"""

from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import nn

from utils.parts.self_attention import SelfAttention

TILE = 64  # queries of a window's smallest block: the time of smaller ones goes into what lies beside them


# --- blocks ---------------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """Keys and values (batch, blocks or 1, keys, heads, head size) for blocks of queries.

    `seen` says who may look: boolean, broadcastable to (batch, blocks, heads, queries, keys).
    """

    k: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor


def fold(x: torch.Tensor, block: int) -> torch.Tensor:
    """(batch, length, ...) to (batch, blocks, block, ...); zeros, or False, fill the last block."""
    missing = -x.shape[1] % block
    if missing:
        x = nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, block))


def attend(q: torch.Tensor, *keys: Keys) -> torch.Tensor:
    """Each block of queries (batch, blocks, queries, heads, head size) attends to its keys: one softmax over all of them.

    Returns the shape of `q`. A query that may see nothing gets the mean of its block's values: they must be 0 where it matters.
    """
    blocks, wide = q.shape[:2], torch.broadcast_shapes(*(some.seen.shape[:-1] for some in keys))
    k, v = keys[0].k, keys[0].v
    if len(keys) > 1:
        k, v = (torch.cat([some[which].expand(*blocks, -1, -1, -1) for some in keys], 2) for which in (0, 1))
    seen = torch.cat([some.seen.expand(*wide, -1) for some in keys], -1)
    bias = q.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(q.dtype).min)  # -inf would make NaN of an empty row
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1))
    return attended.transpose(1, 2).unflatten(0, blocks)


def head_runs(values: list) -> list[tuple]:
    """Neighbouring heads of equal value: (value, slice of heads), in order."""
    sizes = [(value, len(list(heads))) for value, heads in groupby(values)]
    ends = accumulate(size for _, size in sizes)
    return [(value, slice(end - size, end)) for (value, size), end in zip(sizes, ends, strict=True)]


class PatternAttention(SelfAttention):
    """Base of attentions whose queries see fixed places. `settings` names the options that a pattern adds."""

    settings: tuple[str, ...] = ()

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Values are 0 where there is no text: a query whose keys are all padding gets 0."""
        v = v.masked_fill(~text[:, None, :, None], 0)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.attended(q, k, v, text).transpose(1, 2)

    def attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The core, in the layout of this module: (batch, length, heads, head size)."""
        raise NotImplementedError

    def options(self) -> dict:
        """Those of every self-attention, and the pattern's."""
        return super().options() | {name: getattr(self, name) for name in self.settings}


def check_positive(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


# --- L-01 BlockBERT -------------------------------------------------------------------------------------------------


def partner_blocks(filled: torch.Tensor, shift: int) -> torch.Tensor:
    """The block that each block looks at, (batch, blocks): the one `shift` further on, and past a text's last block its first.

    `filled` (batch, blocks) says which blocks hold text. A text turns around at its own end, so that padding changes nothing.
    """
    number = torch.arange(filled.shape[1], device=filled.device)
    count = ((number + 1) * filled).amax(1, keepdim=True).clamp(min=1)  # blocks of the text
    return torch.where(number < count, (number + shift) % count, number)


def partner_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, block: int, shifts: list[int]
) -> torch.Tensor:
    """A softmax over the partner block, for the heads of one shift at a time; (batch, length, heads, head size)."""
    length, found = q.shape[1], []
    q, k, v, text = (fold(x, block) for x in (q, k, v, text))
    row = torch.arange(len(q), device=q.device)[:, None]
    for shift, heads in head_runs(shifts):
        partner = (row, partner_blocks(text.any(-1), shift)) if shift else ...  # its own: nothing is copied
        keys = Keys(k[..., heads, :][partner], v[..., heads, :][partner], text[partner][:, :, None, None])
        found.append(attend(q[..., heads, :], keys))
    return torch.cat(found, 3).flatten(1, 2)[:, :length]


class BlockAttention(PatternAttention):
    """BlockBERT: a block of queries looks at one block of keys, in every head at that of another permutation.

    Qiu et al. 2020 (arXiv 1911.02972), survey 7.1. The permutations are cyclic shifts, `shifts` has that of each head; 0 looks
    at its own block. The paper cuts texts of one length into 2 or 3 blocks; here the size of a `block` in tokens is fixed, so
    that a text is cut alike in every batch. Raises ValueError for a block below 1 and for shifts that are not one per head.
    """

    kind, settings = "block_attention", ("block", "shifts")

    def __init__(self, hidden_size: int, num_attention_heads: int, block: int, shifts: list[int]):
        super().__init__(hidden_size, num_attention_heads)
        check_positive(block=block)
        if len(shifts) != num_attention_heads or min(shifts) < 0:
            raise ValueError(f"shifts must be {num_attention_heads} numbers from 0 on, got {shifts}")
        self.block, self.shifts = block, list(shifts)

    def attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Every head over its partner blocks."""
        return partner_attention(q, k, v, text, min(self.block, q.shape[1]), self.shifts)

    def core_macs(self, length: int) -> int:
        """Every query meets the keys of one block, twice: for its scores, and for the sum that they weight."""
        block = min(self.block, length)
        return 2 * -(-length // block) * block * block * self.all_head_size


# --- windows, for L-02 and L-12 -------------------------------------------------------------------------------------


def window_blocks(length: int, reach: int) -> tuple[int, int]:
    """Tokens of a block of queries, and how many keys lie beside it on either side, for a window of `reach` to both sides.

    The block is a multiple of `TILE`, and at least the reach. A single block needs no neighbours.
    """
    block = max(1, -(-reach // TILE)) * TILE
    return (block, reach) if block < length else (length, 0)


def with_neighbours(x: torch.Tensor, side: int) -> torch.Tensor:
    """(batch, blocks, block, ...) to (batch, blocks, side + block + side, ...): `side` tokens before and after each block too.

    Zeros stand before the first block and after the last one; `side` is at most a block.
    """
    if not side:
        return x
    edge = x.new_zeros(len(x), 1, side, *x.shape[3:])
    before, after = torch.cat([edge, x[:, :-1, -side:]], 1), torch.cat([x[:, 1:, :side], edge], 1)
    return torch.cat([before, x, after], 2)


def sliding_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, reach: int, *others: Keys
) -> torch.Tensor:
    """Every query sees the keys up to `reach` places away, and those of `others`; (batch, length, heads, head size).

    `text` (batch, length) says which keys may be seen.
    """
    length = q.shape[1]
    block, side = window_blocks(length, reach)
    q, k, v, text = (fold(x, block) for x in (q, k, v, text))
    k, v, text = (with_neighbours(x, side) for x in (k, v, text))
    key, query = (torch.arange(size, device=q.device) for size in (k.shape[2], block))
    near = (key - side - query[:, None]).abs() <= reach
    return attend(q, Keys(k, v, text[:, :, None, None] & near), *others).flatten(1, 2)[:, :length]


def columns(x: torch.Tensor, stride: int) -> torch.Tensor:
    """(batch, length, ...) to (batch * stride, length / stride, ...): what lies `stride` apart becomes neighbours."""
    return fold(x, stride).transpose(1, 2).flatten(0, 1)


def dilated_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, reach: int, dilation: int, *others: Keys
) -> torch.Tensor:
    """A sliding window over every `dilation`-th token: it sees as many keys, and `dilation` times as far."""
    if dilation == 1:
        return sliding_window(q, k, v, text, reach, *others)
    others = [Keys(*(x.repeat_interleave(dilation, 0) for x in some)) for some in others]
    found = sliding_window(*(columns(x, dilation) for x in (q, k, v, text)), reach, *others)
    return found.unflatten(0, (-1, dilation)).transpose(1, 2).flatten(1, 2)[:, : q.shape[1]]


def head_windows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, windows: list[tuple[int, int]], *others: Keys
) -> torch.Tensor:
    """A window for each head, `windows` (reach, dilation): neighbouring heads with the same one are computed together."""
    found = []
    for window, heads in head_runs(windows):
        common = [Keys(some.k[..., heads, :], some.v[..., heads, :], some.seen) for some in others]
        found.append(dilated_window(*(x[:, :, heads] for x in (q, k, v)), text, *window, *common))
    return torch.cat(found, 2)


def window_products(length: int, reach: int, dilation: int = 1, others: int = 0) -> int:
    """Products of a query with a key that a head makes for a sequence: those that its blocks hold, masked or not."""
    each = -(-length // dilation)
    block, side = window_blocks(each, reach)
    return dilation * -(-each // block) * block * (block + 2 * side + others)


class WindowedAttention(PatternAttention):
    """Base of attentions with a window in every head."""

    def windows(self, length: int) -> list[tuple[int, int]]:
        """(reach, dilation) of each head for a sequence of that length."""
        raise NotImplementedError

    def attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Every head through its window."""
        return head_windows(q, k, v, text, self.windows(q.shape[1]))

    def core_macs(self, length: int) -> int:
        """The products of every head, twice: for the scores, and for the sums that they weight."""
        return 2 * self.attention_head_size * sum(window_products(length, *window) for window in self.windows(length))


# --- L-02 Sparse Transformer, strided -------------------------------------------------------------------------------


class StridedAttention(WindowedAttention):
    """Sparse Transformer, strided: some heads see the nearest places, the others every `stride`-th one.

    Child et al. 2019 (arXiv 1904.10509), survey 7.1. The first `local_heads` see |i - j| < stride, the others the j for which
    (i - j) mod stride = 0: two steps lead from anywhere to anywhere, and a stride near sqrt(length) makes the work
    length * sqrt(length). The paper's models are causal: they see only what lies behind. Raises ValueError for a stride below 1
    and for heads that are not there.
    """

    kind, settings = "strided_attention", ("stride", "local_heads")

    def __init__(self, hidden_size: int, num_attention_heads: int, stride: int, local_heads: int):
        super().__init__(hidden_size, num_attention_heads)
        check_positive(stride=stride)
        if not 0 <= local_heads <= num_attention_heads:
            raise ValueError(f"local_heads must lie in 0..{num_attention_heads}, got {local_heads}")
        self.stride, self.local_heads = stride, local_heads

    def windows(self, length: int) -> list[tuple[int, int]]:
        """A column is a dilated window that reaches everywhere."""
        column_heads = self.num_attention_heads - self.local_heads
        return [(self.stride - 1, 1)] * self.local_heads + [(length, self.stride)] * column_heads


# --- L-03 Sparse Transformer, fixed ---------------------------------------------------------------------------------


def summary_columns(num_heads: int, block: int, summaries: int, subblocks: int) -> torch.Tensor:
    """Which places of a block each head takes for its summary, (heads, summaries): the last ones, or those before them.

    Head h takes sub-block h mod `subblocks`, counted from the end of the block.
    """
    first = block - summaries * (1 + torch.arange(num_heads) % subblocks)
    return first[:, None] + torch.arange(summaries)


def summary_keys(k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, places: torch.Tensor) -> Keys:
    """The summaries of all blocks, for every block but their own: there they are among the block's keys.

    `k`, `v` (batch, blocks, block, heads, head size), `text` (batch, blocks, block), `places` (heads, summaries).
    """
    blocks, heads = text.shape[1], torch.arange(len(places), device=k.device)
    k, v = (x[:, :, places.T, heads].flatten(1, 2)[:, None] for x in (k, v))  # (batch, 1, blocks * summaries, heads, head size)
    other = ~torch.eye(blocks, dtype=torch.bool, device=k.device)
    seen = text[:, :, places].transpose(1, 2)[:, None] & other[:, None, :, None]  # (batch, blocks, heads, blocks, summaries)
    return Keys(k, v, seen.flatten(3)[..., None, :])


class FixedAttention(PatternAttention):
    """Sparse Transformer, fixed: every query sees its own block, and some places of every other block, which stand for it.

    Child et al. 2019 (arXiv 1904.10509), survey 7.1. As in the authors' code a head sees both in one softmax, and takes its
    `summaries` from one of `subblocks` sub-blocks, the last of a block first (`summary_columns`). There a summary is read by
    what comes after it; here by all. Raises ValueError for sizes below 1, and for more summaries than a block has places.
    """

    kind, settings = "fixed_attention", ("block", "summaries", "subblocks")

    def __init__(self, hidden_size: int, num_attention_heads: int, block: int, summaries: int, subblocks: int):
        super().__init__(hidden_size, num_attention_heads)
        check_positive(block=block, summaries=summaries, subblocks=subblocks)
        if summaries * subblocks > block:
            raise ValueError(f"summaries * subblocks must be at most the block of {block}, got {summaries} * {subblocks}")
        self.block, self.summaries, self.subblocks = block, summaries, subblocks

    def attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """One softmax over the block's keys and the summaries of the others."""
        length = q.shape[1]
        q, k, v, text = (fold(x, self.block) for x in (q, k, v, text))
        places = summary_columns(self.num_attention_heads, self.block, self.summaries, self.subblocks).to(q.device)
        summaries = summary_keys(k, v, text, places)
        return attend(q, Keys(k, v, text[:, :, None, None]), summaries).flatten(1, 2)[:, :length]

    def core_macs(self, length: int) -> int:
        """A query meets its block and all summaries, twice."""
        blocks = -(-length // self.block)
        return 2 * blocks * self.block * (self.block + blocks * self.summaries) * self.all_head_size


# --- L-12 Longformer ------------------------------------------------------------------------------------------------


class WindowAttention(WindowedAttention):
    """Longformer's sliding window: `window` / 2 tokens to either side, in a head with a dilation d every d-th token.

    Beltagy et al. 2020 (arXiv 2004.05150), survey 7.2. `dilations` has one per head; the paper dilates 2 heads of the higher
    layers. Raises ValueError for a window that is not even and at least 2, and for dilations that are not one per head and at
    least 1.
    """

    kind, settings = "window_attention", ("window", "dilations")

    def __init__(self, hidden_size: int, num_attention_heads: int, window: int, dilations: list[int]):
        super().__init__(hidden_size, num_attention_heads)
        if window < 2 or window % 2:
            raise ValueError(f"window must be even and at least 2, half of it on either side, got {window}")
        if len(dilations) != num_attention_heads or min(dilations) < 1:
            raise ValueError(f"dilations must be {num_attention_heads} numbers from 1 on, got {dilations}")
        self.window, self.dilations = window, list(dilations)

    def windows(self, length: int) -> list[tuple[int, int]]:
        """The same reach, counted in steps of the head's dilation."""
        return [(self.window // 2, dilation) for dilation in self.dilations]


def window_and_globals(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, windows: list[tuple[int, int]], first: int
) -> torch.Tensor:
    """Windows without the `first` tokens, and these beside them in one softmax: nobody counts them twice. See `head_windows`."""
    everywhere = Keys(k[:, None, :first], v[:, None, :first], text[:, None, None, None, :first])
    local = text & (torch.arange(text.shape[1], device=text.device) >= first)
    return head_windows(q, k, v, local, windows, everywhere)


class GlobalWindowAttention(WindowAttention):
    """Longformer's window, and the first `global_tokens` tokens, which everyone sees and which see everything.

    Everyone sees them by the common keys and values, in one softmax with the window; they see by projections of their own.
    In the authors' code any token can be global; here [CLS] is, and what follows it. Raises ValueError for less than 1 of them.
    """

    kind, settings = "global_window_attention", (*WindowAttention.settings, "global_tokens")
    own = ("query", "key", "value")

    def __init__(self, hidden_size: int, num_attention_heads: int, window: int, dilations: list[int], global_tokens: int):
        super().__init__(hidden_size, num_attention_heads, window, dilations)
        check_positive(global_tokens=global_tokens)
        self.global_tokens = global_tokens
        for name in self.own:
            setattr(self, f"{name}_global", nn.Linear(hidden_size, hidden_size))

    @classmethod
    def from_attention(cls, attention: nn.Module, **options) -> "GlobalWindowAttention":
        """The projections of global tokens begin as those of all tokens."""
        part = super().from_attention(attention, **options)
        for name in cls.own:
            getattr(part, f"{name}_global").load_state_dict(getattr(part, name).state_dict())
        return part

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        """As in every self-attention; then the outputs of the global tokens are replaced by what they see of everything."""
        outputs, _ = super().forward(hidden_states, attention_mask)
        text = torch.ones_like(hidden_states[..., 0]) if attention_mask is None else attention_mask
        inputs = hidden_states[:, : self.global_tokens], hidden_states, hidden_states
        q, k, v = (getattr(self, f"{name}_global")(x) for name, x in zip(self.own, inputs, strict=True))
        q, k, v = (x.unflatten(-1, (self.num_attention_heads, -1))[:, None] for x in (q, k, v))  # one block
        found = attend(q, Keys(k, v, text.bool()[:, None, None, None]))
        return torch.cat([found[:, 0].flatten(2), outputs[:, self.global_tokens :]], 1), None

    def attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """What all tokens but the global ones see."""
        return window_and_globals(q, k, v, text, self.windows(q.shape[1]), self.global_tokens)

    def core_macs(self, length: int) -> int:
        """With the global tokens beside every window, and all tokens before each of them."""
        first = min(self.global_tokens, length)
        made = [window_products(length, *window, first) + first * length for window in self.windows(length)]
        return 2 * self.attention_head_size * sum(made)

    def macs(self, length: int) -> int:
        """Two more projections of all tokens, and one of the global tokens."""
        return super().macs(length) + (2 * length + min(self.global_tokens, length)) * self.all_head_size**2
