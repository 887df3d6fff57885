"""Attention among tokens that hash alike: LSH attention with one projection for queries and keys (Reformer, survey 7.1).

Tokens are sorted by the bucket of their query, the sorted text is cut into chunks, and a chunk attends to itself and to the one
before it. All heads and texts of a batch are one long run of chunks, in which a chunk and its predecessor lie side by side: the
windows are views of memory, not copies.
"""

import torch
from torch import nn
from torch.nn.functional import normalize, pad

from utils.parts.self_attention import SelfAttention

STARTS = ("mean", "nearest", "query", "key")
ITSELF, NOTHING = -1e5, -1e9  # added to a token's score with itself, and with padding: the former wins over the latter
SINGLE, MOST = 6, 12  # bits of a bucket's number: up to SINGLE from one hash, beyond it from two, never more than MOST


# --- L-04 Reformer: one projection out of two -----------------------------------------------------------------------


def shared_projection(
    query: nn.Linear, key: nn.Linear, heads: int, start: str = "nearest", moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (hidden, hidden) and bias (hidden,) of one projection for queries and keys, from the two of a trained attention.

    `mean` is the mean of the two. But a head may turn its queries and turn its keys back without changing a single score:
    what the mean is depends on that choice, and the scores do not. `nearest` asks for scores only (`nearest_form`); `query`
    and `key` take one of the two. All are scaled so that scores q_i k_j / sqrt(d_h) and q_i q_j / |q_j|, Reformer's, are of
    one size: by the root mean square of |W x|. `moment` is the mean of x x' over the inputs, (hidden + 1, hidden + 1) with a
    1 appended to x for the bias; None stands for the identity. Raises ValueError for another start.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    q, k = (torch.cat([p.weight, p.bias[:, None]], 1).double().unflatten(0, (heads, -1)) for p in (query, key))
    q, k = (x / x.shape[1] ** 0.25 for x in (q, k))  # (heads, head size, hidden + 1); now q'k are the scores
    moment = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) if moment is None else moment.to(q)
    W = {"mean": (q + k) / 2, "query": q, "key": k}.get(start)
    W = nearest_form(q, k, moment) if W is None else W
    norm = ((W @ moment) * W).sum((-2, -1), keepdim=True).sqrt()
    W = (W * norm).flatten(0, 1).to(query.weight)
    return W[:, :-1], W[:, -1]


def nearest_form(q: torch.Tensor, k: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The W for which x'W'W y comes nearest to the scores x'q'k y, in mean square over inputs of that second moment.

    `q`, `k`, W (heads, head size, inputs), moment (inputs, inputs). W'W is symmetric and positive, so the best one is the
    symmetric part of q'k without its negative eigenvalues. With C = [q; k] that part is C'JC / 2, J swapping the halves; J
    has as many positive eigenvalues as a head has dimensions, so W needs no more rows than q (Sylvester's law of inertia).
    """
    size, both = q.shape[1], torch.cat([q, k], 1)
    values, vectors = torch.linalg.eigh(both @ moment @ both.mT)  # in coordinates in which inputs are white
    values = values.clamp(min=0).unsqueeze(-2)
    root = vectors * values.sqrt()
    inverse = vectors * torch.where(values > 1e-12 * values.amax(-1, keepdim=True), values.rsqrt(), 0)
    eigenvalues, basis = torch.linalg.eigh(root.mT @ root.roll(size, 1) / 2)
    positive = eigenvalues[..., -size:].clamp(min=0).sqrt().unsqueeze(-1)
    return positive * (basis[..., -size:].mT @ inverse.mT @ both)


# --- L-04 Reformer: buckets -----------------------------------------------------------------------------------------


def bucket_bits(length: torch.Tensor, chunk: int) -> torch.Tensor:
    """log2 of the number of buckets for texts of those lengths: the least with which two buckets fit a chunk, on average."""
    sizes = chunk * 2 ** torch.arange(MOST, device=length.device)
    return (sizes < 2 * length.unsqueeze(-1)).sum(-1).clamp(min=1)


def hash_columns(bits: int) -> tuple[int, int]:
    """Directions that the two hashes need for numbers of up to that many bits."""
    return 2 ** (min(bits, SINGLE) - 1), 0 if bits <= SINGLE else 2 ** (bits // 2 - 1)


def cross_polytope(x: torch.Tensor, rotation: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """argmax [xR; -xR]: the nearest of 2^bits directions, numbered 2j, or 2j + 1 for the opposite of direction j.

    `x` (batch, heads, length, head size), `rotation` (heads, head size, columns), bits (batch,): a text uses the first
    2^(bits - 1) columns, whatever the others use. Returns (batch, heads, length), int64. Andoni et al. 2015 (arXiv
    1509.02897).
    """
    rotated = x @ rotation.to(x.dtype)
    unused = torch.arange(rotation.shape[-1], device=x.device) >= (1 << bits.unsqueeze(-1)) // 2
    direction = rotated.abs().masked_fill(unused[:, None, None], -1).argmax(-1, keepdim=True)
    opposite = rotated.gather(-1, direction) < 0
    return (2 * direction + opposite).squeeze(-1) % (1 << bits)[:, None, None]


def lsh_buckets(x: torch.Tensor, rotations: list[torch.Tensor], bits: torch.Tensor) -> torch.Tensor:
    """Bucket of every token in one round, (batch, heads, length), below 2^bits; shapes as in `cross_polytope`.

    One hash up to SINGLE bits, two with half of the bits each beyond (the authors' code, too, factorises large numbers of
    buckets): so the directions stay few, and the hash costs no more than linear time.
    """
    first = torch.where(bits <= SINGLE, bits, (bits + 1) // 2)
    buckets = cross_polytope(x, rotations[0], first)
    if rotations[1].shape[-1]:
        buckets = buckets + (cross_polytope(x, rotations[1], bits - first) << first[:, None, None])
    return buckets


def sort_rows(buckets: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort tokens by bucket, those of one bucket by position; buckets (batch, heads, length).

    A token and head is a row of (batch * length * heads, size). Returns the `rows` in sorted order, head by head, each head
    filled up to whole chunks with row 0, (batch * heads * chunks * chunk,), and the `slots` at which the rows then stand,
    (batch * length * heads,).
    """
    batch, heads, length = buckets.shape
    order = buckets.sort(dim=-1, stable=True).indices
    number = torch.arange(max(buckets.shape), device=buckets.device)
    place = torch.empty_like(order).scatter_(-1, order, number[:length].expand_as(order))
    filled = -(-length // chunk) * chunk
    text, head = number[:batch, None, None], number[:heads, None]
    rows = pad((text * length + order) * heads + head, (0, filled - length))
    slots = (text * heads + head) * filled + place
    return rows.flatten(), slots.transpose(1, 2).flatten()


# --- L-04 Reformer: attention among chunks --------------------------------------------------------------------------


def windows(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """Every chunk with the one before it, zeros before the first: (chunks * chunk, size) to (chunks, size, 2 * chunk), a
    view.
    """
    return pad(x, (0, 0, chunk, 0)).unfold(0, 2 * chunk, chunk)


def window_bias(text: torch.Tensor, chunk: int) -> torch.Tensor:
    """What is added to the scores of a window, (batch, 1, chunks, chunk, 2 * chunk), float32; `text` (batch, length), boolean.

    Padding is sorted to the end, so the number of tokens says where it begins. The first chunk of a text has none before it.
    """
    chunks, device = -(-text.shape[1] // chunk), text.device
    slot = torch.arange(chunks, device=device).unsqueeze(-1) * chunk + torch.arange(-chunk, chunk, device=device)
    usable = (slot >= 0) & (slot < text.sum(-1)[:, None, None])  # (batch, chunks, 2 * chunk)
    itself = pad(ITSELF * torch.eye(chunk, device=device), (chunk, 0))
    return torch.where(usable, 0.0, NOTHING)[:, None, :, None] + itself


def times_seen(others: list[torch.Tensor], rows: torch.Tensor, chunk: int) -> torch.Tensor:
    """In how many rounds a query sees a key, for the windows of the round with these `rows`: (chunks in all, chunk, 2 * chunk).

    `others` holds, for each other round, the chunk in which each row lies. A query sees its own chunk and the one before.
    """
    count = torch.ones((), dtype=torch.int16, device=rows.device)
    for number in others:
        here = number.index_select(0, rows)
        ahead = here.view(-1, chunk, 1) - windows(here.unsqueeze(-1), chunk)
        count = count + (ahead.bitwise_and_(~1) == 0)  # 0 or 1
    return count


def chunk_attention(q: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in the windows of one round; q and v in sorted order, (chunks * chunk, size), bias as in `window_bias`.

    Keys are the queries at length 1: the length of a query is the inverse temperature of its softmax. Returns outputs in
    that order, and the log of each query's sum of exponentials, float32: a score less the log of its weight.
    """
    chunk = bias.shape[-2]
    keys, values = windows(normalize(q, dim=-1), chunk), windows(v, chunk)
    scores = torch.bmm(q.unflatten(0, (-1, chunk)), keys).float().unflatten(0, (len(bias), heads, -1))
    scores += bias
    weights = scores.softmax(-1)
    total = scores.amax(-1) - weights.amax(-1).log()
    return torch.bmm(weights.flatten(0, 2).to(v.dtype), values.mT).flatten(0, 1), total.flatten()


def lsh_attention(
    q: torch.Tensor, v: torch.Tensor, text: torch.Tensor, orders: list[tuple[torch.Tensor, torch.Tensor]], chunk: int,
    count_once: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Attention in the chunks of several rounds; q, v and the result (batch, heads, length, size), text (batch, length).

    `orders` are `sort_rows` of each round. A round's outputs are weighted by its share of all exponentials (paper, appendix
    A). `count_once` takes log(rounds in which the pair meets) off a score, so that the rounds add up to one softmax over the
    union of what they see; without it, as in transformers' Reformer, a pair counts once per meeting.
    """
    (batch, heads, length, _), dtype = q.shape, v.dtype
    q, v = (x.transpose(1, 2).reshape(-1, x.shape[-1]) for x in (q, v))  # a row for each token and head
    bias, found = window_bias(text, chunk), []
    numbers = [(slots // chunk).short() for _, slots in orders]  # 16 bits wrap around, differences below 2^15 chunks survive it
    for i, (rows, slots) in enumerate(orders):
        others = numbers[:i] + numbers[i + 1 :] if count_once else []
        less = times_seen(others, rows, chunk).float().log().unflatten(0, (batch, heads, -1)) if others else 0.0
        out, total = chunk_attention(q.index_select(0, rows), v.index_select(0, rows), bias - less, heads)
        found.append((out.index_select(0, slots), total.index_select(0, slots)))
    shares = torch.stack([total for _, total in found]).softmax(0).unsqueeze(-1)
    out = sum(share * out for share, (out, _) in zip(shares, found, strict=True))
    return out.to(dtype).unflatten(0, (batch, length, heads)).transpose(1, 2)


class LSHAttention(SelfAttention):
    """Attention among tokens whose queries hash alike: LSH attention with shared queries and keys.

    Kitaev, Kaiser and Levskaya 2020 (arXiv 2001.04451), survey 7.1. Time O(n log n) for the sort, and memory linear in the
    length. The number of buckets follows the tokens of each text (`bucket_bits`), unless `buckets` says it; in training every
    pass draws its rotations anew, in evaluation they are those of the `seed`. A token attends to itself only where its
    windows hold no other text. With `by_lot` the hash knows nothing: each place of a text draws its buckets, whatever stands
    there; the control of what the hash finds.

    From a pre-trained BERT: one projection stands for two (`shared_projection` makes it); a BERT attends in both directions,
    so that no causal mask is left, and a query still sees its chunk and the one before, not the one after. Unlike in the
    authors' code the first chunk does not look at the last one, so that padding behind a text changes nothing; keys of other
    buckets in the window are attended to, as there. Their reversible layers and axial positions are not part of this
    attention. Raises ValueError for a chunk or rounds below 1, and for buckets that are no power of two from 2 to 4096.
    """

    kind = "lsh_attention"

    def __init__(
        self, hidden_size: int, num_attention_heads: int, chunk: int = 64, rounds: int = 2, buckets: int | None = None,
        count_once: bool = True, seed: int = 0, by_lot: bool = False,
    ):  # fmt: skip
        super().__init__(hidden_size, num_attention_heads)
        if chunk < 1 or rounds < 1:
            raise ValueError(f"chunk and rounds must be at least 1, got {chunk} and {rounds}")
        if buckets is not None and buckets not in [2**bits for bits in range(1, MOST + 1)]:
            raise ValueError(f"buckets must be a power of two from 2 to {2**MOST}, or None for the text's own, got {buckets}")
        self.chunk, self.rounds, self.buckets = chunk, rounds, buckets
        self.count_once, self.seed, self.by_lot = count_once, seed, by_lot
        self.key = self.query
        shape = (rounds, 2, num_attention_heads, self.attention_head_size, 2 ** (SINGLE - 1))
        rotations = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("rotations", rotations, persistent=False)

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, attention: nn.Module, start: str = "nearest", moment: torch.Tensor | None = None, **options
    ) -> "LSHAttention":
        """With a trained attention's values, and one projection made of its queries and keys (`shared_projection`)."""
        part = super().from_attention(attention, **options)
        weight, bias = shared_projection(attention.query, attention.key, attention.num_attention_heads, start, moment)
        part.query.weight.copy_(weight)
        part.query.bias.copy_(bias)
        return part

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        """As in `SelfAttention`, with one projection for queries and keys."""
        q, v = self.heads(self.query(hidden_states)), self.heads(self.value(hidden_states))
        text = torch.ones_like(hidden_states[..., 0]) if attention_mask is None else attention_mask
        return self.core(q, q, v, text.bool()).transpose(1, 2).flatten(2), None

    def bits(self, length: torch.Tensor) -> torch.Tensor:
        """log2 of the number of buckets for texts of those lengths."""
        if self.buckets is None:
            return bucket_bits(length, self.chunk)
        return torch.full_like(length, self.buckets.bit_length() - 1)

    @torch.no_grad()
    def hash(self, q: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
        """Buckets of each round, (batch, heads, length); padding has a bucket of its own behind all others."""
        bits = self.bits(text.sum(-1))
        if self.by_lot:
            found = self.lots(text.shape[1], bits)
        else:
            columns, rotations = self.columns(text.shape[1]), self.rotations
            rotations = torch.randn_like(rotations) if self.training else rotations
            pairs = [[rotation[..., :count] for rotation, count in zip(pair, columns, strict=True)] for pair in rotations]
            found = [lsh_buckets(q, pair, bits) for pair in pairs]
        return [buckets.masked_fill(~text.unsqueeze(1), 2**MOST) for buckets in found]

    def lots(self, length: int, bits: torch.Tensor) -> list[torch.Tensor]:
        """For each round a bucket drawn for every place and head, (batch, heads, length), below 2^bits; bits (batch,)."""
        source = None if self.training else torch.Generator().manual_seed(self.seed)
        lots = torch.rand(length, self.rounds, self.num_attention_heads, generator=source).to(bits.device)
        return [(lot.mT * (1 << bits)[:, None, None]).long() for lot in lots.unbind(1)]

    def columns(self, length: int) -> tuple[int, int]:
        """Directions of the two hashes for texts of up to that length; lots need none."""
        return (0, 0) if self.by_lot else hash_columns(int(self.bits(torch.tensor(length))))

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """As in `SelfAttention`; the keys are the queries, `k` is not looked at."""
        orders = [sort_rows(buckets, self.chunk) for buckets in self.hash(q, text)]
        return lsh_attention(q, v, text, orders, self.chunk, self.count_once)

    def core_macs(self, length: int) -> int:
        """In each round the hash, and scores and weighted sums over two chunks a token."""
        filled = -(-length // self.chunk) * self.chunk
        return self.rounds * self.all_head_size * (length * sum(self.columns(length)) + 2 * filled * 2 * self.chunk)

    def macs(self, length: int) -> int:
        """Two projections and the core."""
        return 2 * length * self.all_head_size**2 + self.core_macs(length)

    def options(self) -> dict:
        """Hidden size, heads, chunk, rounds, buckets, how pairs are counted, the seed, and whether buckets are drawn by lot."""
        names = ("chunk", "rounds", "buckets", "count_once", "seed", "by_lot")
        return super().options() | {name: getattr(self, name) for name in names}
