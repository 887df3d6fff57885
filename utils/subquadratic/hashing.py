"""Reformer (survey 7.1): LSH attention in the layers of a pre-trained BERT, and what its hash finds.

The attention is a part, in `utils.parts.hashing`. What here returns length x length is for pictures and small texts.
"""

import contextlib

import torch
from torch import nn
from torch.nn.functional import normalize, pad

from utils.parts.hashing import LSHAttention, sort_rows
from utils.parts.self_attention import replace_attention
from utils.training import check_batches

# --- L-04 Reformer --------------------------------------------------------------------------------------------------


def reformer(
    model: nn.Module, chunk: int = 64, rounds: int = 2, start: str = "nearest", batches: list[dict] | None = None, **options
) -> None:
    """LSH attention in every layer of a BERT, in place; each layer hashes with a seed of its own.

    `start` says how a layer's projections of queries and keys become one (`utils.parts.hashing.shared_projection`); with
    calibration batches it sees the inputs that the layer had in the dense model. `options` are those of `LSHAttention`.
    Kitaev et al. 2020 (arXiv 2001.04451), survey 7.1. Raises ValueError for another start, for no batches in the list, and as
    the part does.
    """
    moments = dict(enumerate(input_moments(model, batches))) if batches is not None else {}

    def make(attention: nn.Module, number: int) -> LSHAttention:
        how = {"chunk": chunk, "rounds": rounds, "seed": number, **options}
        return LSHAttention.from_attention(attention, start, moments.get(number), **how)

    replace_attention(model, make)


@torch.no_grad()
def input_moments(model: nn.Module, batches: list[dict]) -> list[torch.Tensor]:
    """Mean of x x' over the real tokens at each layer's attention, x with a 1 appended: (hidden + 1, hidden + 1), float64.

    Raises ValueError for no batches.
    """
    check_batches(batches)
    layers = model.base_model.encoder.layer
    sums, tokens, real = [0.0] * len(layers), 0, torch.empty(0)

    def add(number: int, x: torch.Tensor) -> None:
        x = pad(x[real], (0, 1), value=1.0)
        sums[number] = sums[number] + (x.mT @ x).double()

    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hook = lambda module, args, number=number: add(number, args[0])  # noqa: E731
            hooks.enter_context(layer.attention.self.register_forward_pre_hook(hook))
        for batch in batches:
            real = batch["attention_mask"].bool()
            tokens += int(real.sum())
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return [total / tokens for total in sums]


# --- L-04 Reformer: what is seen and found --------------------------------------------------------------------------


def shared_scores(q: torch.Tensor) -> torch.Tensor:
    """All scores q_i q_j / |q_j| of shared queries and keys, (..., length, length) from (..., length, head size); none of a
    token with itself, -inf, unless it is alone.
    """
    scores = q @ normalize(q, dim=-1).mT
    alone = q.shape[-2] == 1
    return scores if alone else scores.masked_fill(torch.eye(q.shape[-2], dtype=torch.bool, device=q.device), -torch.inf)


def queries_of(attention: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Queries (1, heads, length, head size) of hidden states (length, hidden)."""
    return attention.query(hidden_states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(0, 1).unsqueeze(0)


@torch.no_grad()
def meetings(part: LSHAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    """In how many rounds each query sees each key, itself included, (heads, length, length); hidden states (length, hidden)."""
    q = queries_of(part, hidden_states)
    text = torch.ones(1, len(hidden_states), dtype=torch.bool, device=q.device)
    slots = torch.stack([sort_rows(buckets, part.chunk)[1] for buckets in part.hash(q, text)])  # (rounds, length * heads)
    chunk = (slots // part.chunk).short().unflatten(1, (len(hidden_states), -1)).mT  # (rounds, heads, length)
    ahead = chunk.unsqueeze(-1) - chunk.unsqueeze(-2)
    return ((ahead == 0) | (ahead == 1)).sum(0)


def hashed_pattern(part: LSHAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    """Which keys each query attends to, boolean (heads, length, length); hidden states (length, hidden).

    Of the pairs that meet in some round, all but a token with itself, which only stays where it meets no other.
    """
    itself = torch.eye(len(hidden_states), dtype=torch.bool, device=hidden_states.device)
    others = (meetings(part, hidden_states) > 0) & ~itself
    return others | (itself & ~others.any(-1, keepdim=True))


@torch.no_grad()
def hash_recall(part: LSHAttention, hidden_states: torch.Tensor, top: int = 8) -> tuple[float, float]:
    """What the hash finds: the share of the `top` keys with each query's highest scores that it attends to, and the share of
    all keys that it attends to, which is what windows at random would find. Hidden states (length, hidden), more than `top`
    of them.
    """
    seen = hashed_pattern(part, hidden_states)
    best = shared_scores(queries_of(part, hidden_states)[0]).topk(top, dim=-1).indices
    return float(seen.gather(-1, best).float().mean()), float(seen.sum() / (seen.numel() - seen.shape[0] * seen.shape[1]))


@torch.no_grad()
def map_overlap(attention: nn.Module, part: LSHAttention, hidden_states: torch.Tensor) -> float:
    """How much of a trained attention's maps shared queries and keys keep, before anything is hashed: the mean over heads and
    queries of sum_j min(p_j, p'_j), 1 for equal maps. Hidden states (length, hidden).
    """
    q, k = (project(hidden_states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(0, 1)
            for project in (attention.query, attention.key))  # fmt: skip
    dense = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    shared = shared_scores(queries_of(part, hidden_states)[0]).softmax(-1)
    return float(torch.minimum(dense, shared).sum(-1).mean())


def window_share(length: int, chunk: int) -> float:
    """The share of all keys but itself that a query sees in one round, on average over the text: 1 where one chunk holds it."""
    sizes = [min(chunk, length - first) for first in range(0, length, chunk)]
    pairs = sum(size * (size - 1) for size in sizes) + sum(chunk * size for size in sizes[1:])
    return pairs / max(1, length * (length - 1))
