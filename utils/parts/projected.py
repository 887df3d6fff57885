"""Self-attention to a few summaries of a text in place of all its tokens: projections along the length, or a relay node."""

from functools import cached_property

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

from utils.parts.self_attention import SelfAttention

# --- L-06 Linformer -------------------------------------------------------------------------------------------------

SHARING = ("none", "headwise", "key_value")  # inside a layer; `utils.subquadratic.linear` shares one with all layers


def segment_means(projected_length: int, max_length: int) -> torch.Tensor:
    """The projection (projected length, max length) whose row j takes the mean of the j-th of so many equal segments."""
    segment = torch.arange(max_length) * projected_length // max_length
    member = (segment == torch.arange(projected_length).unsqueeze(-1)).float()
    return member / member.sum(-1, keepdim=True)


def project_length(projection: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Project along the length: (heads or 1, projected length, length) and (batch, heads, length, size) to (batch, heads,
    projected length, size). Batch and what shares a projection are folded into columns, so that no copy of it is made.
    """
    batch, heads, _, size = x.shape
    groups = len(projection)
    columns = x.unflatten(1, (groups, -1)).permute(1, 3, 0, 2, 4).flatten(2)  # (groups, length, batch * the rest * size)
    projected = (projection @ columns).unflatten(2, (batch, heads // groups, size))
    return projected.permute(2, 0, 3, 1, 4).flatten(1, 2)


@torch.no_grad()
def text_share(projection: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Which share of each row's absolute weights lies on text: (heads or 1, projected length, max length) and (batch, length)
    to (batch, heads or 1, projected length), from 0 to 1.
    """
    seen = projection[..., : text.shape[-1]].abs() @ text.to(projection.dtype).T  # (heads or 1, projected length, batch)
    whole = torch.linalg.vector_norm(projection, ord=1, dim=-1, keepdim=True)
    return (seen / whole.clamp(min=torch.finfo(whole.dtype).tiny)).permute(2, 0, 1)


def linformer_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, projections: tuple[nn.Parameter, nn.Parameter]
) -> torch.Tensor:
    """softmax(Q (W_n K)^T / sqrt(d_h) + log share) W_n' V, with padding zeroed; shapes as in `SelfAttention.core`.

    The projections of keys and of values are (heads or 1, projected length, max length): a shorter text meets their first
    columns. `text_share` has no gradient: a kernel that takes a mask gives it none.
    """
    real = text[:, None, :, None].to(q.dtype)
    of_k, of_v = (p[..., : q.shape[2]].to(q.dtype) for p in projections)
    keys, values = project_length(of_k, k * real), project_length(of_v, v * real)
    share = text_share(projections[0], text).clamp(min=torch.finfo(torch.float32).tiny)
    return scaled_dot_product_attention(q, keys, values, attn_mask=share.log().unsqueeze(-2).to(q.dtype))


class LinformerAttention(SelfAttention):
    """Keys and values projected along the length, `max_length` tokens or less to `projected_length` rows.

    Wang et al. 2020 (arXiv 2006.04768), survey 7.2. `sharing`: a pair of projections per head (`none`), one pair for all heads
    (`headwise`), or the same matrix for keys and values too (`key_value`). They begin as means of equal segments, another
    projection that the paper names; its zeros have gradients too. The paper's texts have no padding; here a row counts by the
    share of its weights that lie on text, else rows that see padding alone would draw attention to zeros. Raises ValueError for
    sizes and a sharing that cannot be.
    """

    kind = "linformer"

    def __init__(
        self, hidden_size: int, num_attention_heads: int, max_length: int, projected_length: int, sharing: str = "headwise"
    ):
        super().__init__(hidden_size, num_attention_heads)
        if sharing not in SHARING:
            raise ValueError(f"sharing must be one of {', '.join(SHARING)}, got {sharing!r}")
        if not 1 <= projected_length <= max_length:
            raise ValueError(f"projected_length must lie in 1..{max_length} (max_length), got {projected_length}")
        self.max_length, self.projected_length, self.sharing = max_length, projected_length, sharing
        start = segment_means(projected_length, max_length).repeat(num_attention_heads if sharing == "none" else 1, 1, 1)
        self.projection_k = nn.Parameter(start)
        self.projection_v = None if sharing == "key_value" else nn.Parameter(start.clone())

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """As in the base. Raises ValueError for a text longer than `max_length`."""
        if q.shape[2] > self.max_length:
            raise ValueError(f"this Linformer projects at most {self.max_length} tokens, got {q.shape[2]}")
        of_v = self.projection_k if self.projection_v is None else self.projection_v
        return linformer_attention(q, k, v, text, (self.projection_k, of_v))

    def core_macs(self, length: int) -> int:
        """Keys and values projected, the share of text, scores, and sums weighted by them."""
        return self.projected_length * length * (4 * self.all_head_size + len(self.projection_k))

    def options(self) -> dict:
        """Those of the base, both lengths, and what is shared inside the layer."""
        return super().options() | {name: getattr(self, name) for name in ("max_length", "projected_length", "sharing")}


# --- L-05 Star-Transformer ------------------------------------------------------------------------------------------

BLOCK = 16  # satellites whose neighbours are looked up in one product


class Star:
    """Who is who in a batch of texts: `relay` (batch,) is the first token of each, `satellites` (batch, length) the others.

    `first` and `last` (batch,) are the satellites where the ring closes.
    """

    def __init__(self, text: torch.Tensor):
        number = torch.arange(text.shape[1], device=text.device)
        self.rows, self.relay = torch.arange(len(text), device=text.device), text.int().argmax(1)
        self.is_relay = number == self.relay.unsqueeze(1)
        self.satellites = text & ~self.is_relay
        self.first = self.satellites.int().argmax(1)
        self.last = text.shape[1] - 1 - self.satellites.flip(1).int().argmax(1)

    def ring(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, length, size) with a place before and behind, whole blocks and two in length: the last satellite stands
        before the first one, and the first behind the last.
        """
        ring = pad(x, (0, 0, 1, 1 + -x.shape[2] % BLOCK))
        ring[self.rows, :, self.first] = x[self.rows, :, self.last]  # where the relay stood, or nothing: no satellite's neighbour
        ring[self.rows, :, self.last + 2] = x[self.rows, :, self.first]
        return ring

    @cached_property
    def seen(self) -> torch.Tensor:
        """Which of its context (`context`) a token sees: (batch, 1, blocks, BLOCK, 2 BLOCK + 3), boolean. Itself at least."""
        present = self.ring(self.satellites[:, None, :, None].float())[:, 0, :, 0].bool()
        windows = present.unfold(1, BLOCK + 2, BLOCK).unsqueeze(2)  # (batch, blocks, 1, BLOCK + 2)
        token, place = torch.arange(BLOCK, device=present.device).unsqueeze(1), torch.arange(BLOCK + 2, device=present.device)
        near = ((place - token) >= 0) & ((place - token) <= 2)
        always = torch.cat([torch.eye(BLOCK, device=near.device), torch.ones(BLOCK, 1, device=near.device)], 1).bool()
        return torch.cat([windows & near, always.expand(*windows.shape[:2], -1, -1)], -1).unsqueeze(1)


def blocks_of(x: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, size) to (batch, heads, blocks, BLOCK, size), with zeros behind the end."""
    return pad(x, (0, 0, 0, -x.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK))


def context(star: Star, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """What the satellites of a block look at: the block with a neighbour on both sides, what the block began as, and the relay.

    `x` and `start` (batch, heads, length, size); returns (batch, heads, blocks, 2 BLOCK + 3, size).
    """
    near = star.ring(x).unfold(2, BLOCK + 2, BLOCK).transpose(-1, -2)
    own = blocks_of(start)
    relay = x[star.rows, :, star.relay][:, :, None, None].expand(-1, -1, own.shape[2], -1, -1)
    return torch.cat([near, own, relay], -2)


def star_cycle(
    star: Star, state: dict[str, torch.Tensor], start: dict[str, torch.Tensor], wanted: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """One cycle: satellites look at their context, the relay at itself and all satellites. States are named `q`, `k` and `v`,
    (batch, heads, length, head size); those `wanted` are returned.
    """
    q = state["q"] * state["q"].shape[-1] ** -0.5
    least = torch.finfo(q.dtype).min
    scores = blocks_of(q) @ context(star, state["k"], start["k"]).transpose(-1, -2)
    around = scores.masked_fill(~star.seen, least).softmax(-1)
    to_all = q[star.rows, :, star.relay].unsqueeze(2) @ state["k"].transpose(-1, -2)  # (batch, heads, 1, length)
    text = (star.satellites | star.is_relay)[:, None, None]
    hub = to_all.masked_fill(~text, least).softmax(-1)
    new = {}
    for name in wanted:
        satellites = (around @ context(star, state[name], start[name])).flatten(2, 3)[:, :, : q.shape[2]]
        new[name] = torch.where(star.is_relay[:, None, :, None], hub @ state[name], satellites)
    return new


class StarAttention(SelfAttention):
    """A ring of satellites around a relay: a token sees its two neighbours, itself, what it began as, and the relay; the relay
    sees all. So any two tokens are two steps apart, in linear time.

    Guo et al. 2019 (arXiv 1902.09113), survey 7.2. Adapted to a BERT: the relay is the first token, [CLS], which the classifier
    reads (the paper's is a node of its own that begins as the mean of the text), and it reads the states from before the cycle
    (the paper's reads the satellites' new ones). A layer is one cycle; its output matrix, residual and LayerNorm stand for the
    authors' LeakyReLU and LayerNorm. With more `cycles` in a layer, a token stays a weighted mean of the layer's inputs, whose
    query, key and value are the same means: nothing is projected anew. The ring is closed, as its name says; the authors' code
    (fastNLP) leaves it open, with zeros beyond both ends. Raises ValueError for less than one cycle.
    """

    kind = "star_attention"

    def __init__(self, hidden_size: int, num_attention_heads: int, cycles: int = 1):
        super().__init__(hidden_size, num_attention_heads)
        if cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {cycles}")
        self.cycles = cycles

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """As in the base; of the last cycle only the values are needed."""
        star, start = Star(text), {"q": q, "k": k, "v": v}
        state = start
        for number in range(1, self.cycles + 1):
            state = star_cycle(star, state, start, ("v",) if number == self.cycles else ("q", "k", "v"))
        return state["v"]

    def core_macs(self, length: int) -> int:
        """Scores in every cycle, weighted sums of values in the last one, and of queries, keys and values in those before."""
        whole_blocks = length + -length % BLOCK
        return (4 * self.cycles - 2) * self.all_head_size * (whole_blocks * (2 * BLOCK + 3) + length)

    def options(self) -> dict:
        """Those of the base and the cycles."""
        return super().options() | {"cycles": self.cycles}
