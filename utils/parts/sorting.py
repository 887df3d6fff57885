"""Attention to blocks that have been sorted: Sparse Sinkhorn attention and its relatives (survey 7.2).

Keys and values are cut into blocks; a soft permutation, doubly stochastic, brings to each place a mixture of blocks. In
`sinkhorn` and all that follows, row p of a matrix (places, blocks) says what stands at place p.
"""

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

from utils.parts.self_attention import SelfAttention

SORTERS = ("network", "means", "none")
NOTHING, TINY = -1e9, 1e-30

# --- L-07 Sparse Sinkhorn attention: the soft permutation -----------------------------------------------------------


def sinkhorn(scores: torch.Tensor, iterations: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """Balance exp(scores): columns and rows are divided by their sums in turn, until both sum to 1; (..., places, blocks).

    In logarithms, rows last: each place holds a weighted mean of blocks. `real` (..., blocks) marks the blocks that hold
    text; they are balanced among themselves, and any other one stays at its place. Sinkhorn 1964; Mena et al. 2018 (arXiv
    1802.08665).
    """
    if real is not None:
        itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~((real.unsqueeze(-1) & real.unsqueeze(-2)) | itself), -torch.inf)
    for _ in range(iterations):
        scores = scores - scores.logsumexp(-2, keepdim=True)
        scores = scores - scores.logsumexp(-1, keepdim=True)
    return scores.exp()


def gumbel(like: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise: the highest of scores with it is a draw from their softmax."""
    return -torch.empty_like(like).exponential_().log()


class SortingNetwork(nn.Module):
    """At which place should a block stand? For each head two layers, from a block's mean to scores for `max_blocks` places.

    The paper sums a block up; the mean does not depend on how much of it is padding. The scores have no bias: it would scale
    a row as a whole, which balancing undoes. Raises ValueError for no blocks.
    """

    def __init__(self, heads: int, size: int, max_blocks: int):
        super().__init__()
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, got {max_blocks}")
        self.inner, self.outer = (nn.Parameter(torch.randn(heads, size, out) / size**0.5) for out in (size, max_blocks))
        self.inner_bias = nn.Parameter(torch.zeros(heads, 1, size))

    def forward(self, means: torch.Tensor) -> torch.Tensor:
        """Means (batch, heads, blocks, size) to scores (batch, heads, places, blocks); ValueError for too many blocks."""
        blocks, most = means.shape[2], self.outer.shape[-1]
        if blocks > most:
            raise ValueError(f"the sorting network knows {most} places, a text has {blocks} blocks: give it more max_blocks")
        hidden = (means @ self.inner + self.inner_bias).relu()
        return (hidden @ self.outer[..., :blocks]).mT


# --- L-07 Sparse Sinkhorn attention: sorted blocks ------------------------------------------------------------------


def in_blocks(x: torch.Tensor, block: int, dim: int = 2) -> torch.Tensor:
    """Cut a dimension into blocks, (..., length, ...) to (..., blocks, block, ...); zeros, or False, fill up the last one."""
    missing = -x.shape[dim] % block
    if missing:
        x = pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])
    return x.unflatten(dim, (-1, block))


def block_means(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Mean over the text of each block, zero where there is none, (batch, heads, blocks, size).

    `x` (batch, heads, blocks, block, size), `text` (batch, blocks, block).
    """
    weights = text.to(x.dtype) / text.sum(-1, keepdim=True).clamp(min=1)
    return (x * weights[:, None, ..., None]).sum(3)


def sort_blocks(
    permutation: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values at each place, and what to add to their scores: two of (batch, heads, places, block, size), one without
    size.

    `k` and `v` (batch, heads, blocks, block, size), `text` (batch, blocks, block). At place p, slot t stand means over the
    t-th tokens of all blocks, weighted by row p of the permutation. Padding has no part in them: a slot in which the weights
    of text sum to s < 1 holds the mean over that text, and counts as s of a key, log s being added.
    """
    share = permutation @ text.unsqueeze(1).to(permutation.dtype)  # (batch, heads, places, block)
    bias = torch.where(share > 0, share.clamp(min=TINY).log(), NOTHING)
    mixed = [permutation.to(x.dtype) @ x.masked_fill(~text[:, None, ..., None], 0).flatten(3) for x in (k, v)]
    keys, values = (x.unflatten(3, (share.shape[-1], -1)) / share.clamp(min=TINY).to(x.dtype).unsqueeze(-1) for x in mixed)
    return keys, values, bias


def sinkhorn_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, permutation: torch.Tensor
) -> torch.Tensor:
    """Each block of queries attends to its own block of keys and to what was sorted to its place, in one softmax.

    q, k, v and the result (batch, heads, blocks, block, size), text (batch, blocks, block), permutation (batch, heads,
    blocks, blocks).
    """
    keys, values, bias = sort_blocks(permutation, k, v, text)
    own = torch.where(text, 0.0, NOTHING).unsqueeze(1).expand_as(bias)
    parts = q, torch.cat([k, keys], 3), torch.cat([v, values], 3), torch.cat([own, bias], 3).unsqueeze(3).to(q.dtype)
    q, k, v, bias = (x.transpose(1, 2).flatten(0, 1) for x in parts)  # a block is a text of its own
    return scaled_dot_product_attention(q, k, v, attn_mask=bias).unflatten(0, text.shape[:2]).transpose(1, 2)


class SinkhornAttention(SelfAttention):
    """Sparse Sinkhorn attention: local attention, and to one more block that was sorted to the place of the own one.

    Tay et al. 2020 (arXiv 2002.11296), survey 7.2. Scores of blocks for places, with Gumbel noise in training, are divided by
    the `temperature` and balanced in some `iterations`. The `sorter` that gives them is the paper's, a `network` (here over
    each head's keys, as in the authors' code for the Long Range Arena), or `means`: the mean query of the place's own block
    times the mean key of the block, which knows something in a pre-trained model before any training, and takes texts of any
    length (as a public PyTorch version does). With `none` every block stays where it is: the control, local attention alone. A
    network knows `max_blocks` places. A permutation has (n / n_b)^2 numbers a
    head, and to mix blocks by it takes less time than to attend until a text has 2 n_b blocks. Both blocks stand in one
    softmax (that code adds up two), since a trained model expects outputs of one attention's size. Raises ValueError for a
    block, iterations or max_blocks below 1, for another sorter, for a temperature that is not positive, and in use for a text
    of more blocks than the network knows places.
    """

    kind = "sinkhorn_attention"

    def __init__(
        self, hidden_size: int, num_attention_heads: int, block: int = 64, iterations: int = 7, temperature: float = 0.75,
        sorter: str = "network", max_blocks: int = 8,
    ):  # fmt: skip
        super().__init__(hidden_size, num_attention_heads)
        if block < 1 or iterations < 1:
            raise ValueError(f"block and iterations must be at least 1, got {block} and {iterations}")
        if sorter not in SORTERS or not temperature > 0:
            raise ValueError(f"sorter must be one of {', '.join(SORTERS)}, temperature positive, got {sorter!r}, {temperature}")
        self.block, self.iterations, self.temperature = block, iterations, temperature
        self.sorter, self.max_blocks = sorter, max_blocks
        if sorter == "network":
            self.network = SortingNetwork(num_attention_heads, self.attention_head_size, max_blocks)

    def sort_scores(self, q: torch.Tensor, k: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Scores (batch, heads, places, blocks) of queries and keys in blocks."""
        keys = block_means(k, text)
        if self.sorter == "network":
            return self.network(keys)
        return block_means(q, text) @ keys.mT / q.shape[-1] ** 0.5

    def permutation(self, q: torch.Tensor, k: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Doubly stochastic, (batch, heads, places, blocks), float32; q and k in blocks, text (batch, blocks, block)."""
        if self.sorter == "none":
            return torch.eye(q.shape[2], device=q.device).expand(*q.shape[:2], -1, -1)
        scores = self.sort_scores(q, k, text).float()
        if self.training:
            scores = scores + gumbel(scores)
        return sinkhorn(scores / self.temperature, self.iterations, text.any(-1).unsqueeze(1))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, permutation: torch.Tensor
    ) -> torch.Tensor:
        """The outputs, in blocks, of what is in blocks."""
        return sinkhorn_attention(q, k, v, text, permutation)

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """As in `SelfAttention`."""
        length = q.shape[2]
        q, k, v = (in_blocks(x, self.block) for x in (q, k, v))
        text = in_blocks(text, self.block, dim=1)
        return self.attend(q, k, v, text, self.permutation(q, k, text)).flatten(2, 3)[:, :, :length]

    def sort_macs(self, blocks: int) -> int:
        """The scores of blocks for places."""
        if self.sorter == "none":
            return 0
        network = self.attention_head_size if self.sorter == "network" else 0
        return self.all_head_size * blocks * (network + blocks)

    def mix_macs(self, places: int, blocks: int) -> int:
        """Mixtures of keys, of values, and of what is text."""
        return places * blocks * self.block * (2 * self.all_head_size + self.num_attention_heads)

    def core_macs(self, length: int) -> int:
        """Scores of blocks, mixtures of blocks, and attention to two blocks."""
        blocks = -(-length // self.block)
        attention = 2 * blocks * self.block * 2 * self.block * self.all_head_size
        return self.sort_macs(blocks) + self.mix_macs(blocks, blocks) + attention

    def options(self) -> dict:
        """Hidden size, heads, block, iterations, temperature, sorter, and the places that its network knows."""
        names = ("block", "iterations", "temperature", "sorter", "max_blocks")
        return super().options() | {name: getattr(self, name) for name in names}


# --- L-08 SortCut ---------------------------------------------------------------------------------------------------


def sortcut_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, permutation: torch.Tensor
) -> torch.Tensor:
    """All queries attend to the blocks at a few places, whose rows of the permutation are given, and to nothing else.

    Shapes as in `sinkhorn_attention`, permutation (batch, heads, places, blocks).
    """
    keys, values, bias = sort_blocks(permutation, k, v, text)
    mask = bias.flatten(2).unsqueeze(2).to(q.dtype)
    out = scaled_dot_product_attention(q.flatten(2, 3), keys.flatten(2, 3), values.flatten(2, 3), attn_mask=mask)
    return out.unflatten(2, q.shape[2:4])


class SortCutAttention(SinkhornAttention):
    """SortCut: the text is sorted, and cut after `kept` blocks, to which all queries attend, O(n kept n_b).

    Tay et al. 2020 (arXiv 2002.11296), survey 7.2; for encoders only. A query does not see its own block, unless that is
    sorted to the front. A text of no more blocks than are kept keeps them all. Raises ValueError for less than one block, and
    as Sinkhorn attention does.
    """

    kind = "sortcut_attention"

    def __init__(self, hidden_size: int, num_attention_heads: int, kept: int = 2, **options):
        super().__init__(hidden_size, num_attention_heads, **options)
        if kept < 1:
            raise ValueError(f"kept must be at least 1 block, got {kept}")
        self.kept = kept

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, permutation: torch.Tensor
    ) -> torch.Tensor:
        """The outputs, in blocks, of what is in blocks: only the first places are mixed."""
        return sortcut_attention(q, k, v, text, permutation[:, :, : self.kept])

    def core_macs(self, length: int) -> int:
        """Scores of all blocks, mixtures at the places that are kept, and attention to these."""
        blocks = -(-length // self.block)
        places = min(self.kept, blocks)
        attention = 2 * blocks * self.block * places * self.block * self.all_head_size
        return self.sort_macs(blocks) + self.mix_macs(places, blocks) + attention

    def options(self) -> dict:
        """Those of Sinkhorn attention, and the blocks that are kept."""
        return super().options() | {"kept": self.kept}


# --- L-09 Sinkhorn mixture ------------------------------------------------------------------------------------------


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Standard attention of what is in blocks; shapes as in `sinkhorn_attention`."""
    mask = torch.where(text.flatten(1), 0.0, NOTHING)[:, None, None].to(q.dtype)
    out = scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)), attn_mask=mask)
    return out.unflatten(2, q.shape[2:4])


class SinkhornMixture(SinkhornAttention):
    """Sinkhorn mixture: the mean of Sinkhorn attention and of standard attention. Quadratic by definition: it spares nothing.

    Tay et al. 2020 (arXiv 2002.11296), survey 7.2, where the two are added up; half of the sum is what the output matrix of a
    trained model was trained for.
    """

    kind = "sinkhorn_mixture"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, permutation: torch.Tensor
    ) -> torch.Tensor:
        """The outputs, in blocks, of what is in blocks."""
        return (sinkhorn_attention(q, k, v, text, permutation) + dense_attention(q, k, v, text)) / 2

    def core_macs(self, length: int) -> int:
        """Those of Sinkhorn attention, and two products of length x length, filled up to whole blocks."""
        filled = -(-length // self.block) * self.block
        return super().core_macs(length) + 2 * filled**2 * self.all_head_size
