"""Sparse Sinkhorn attention, SortCut and the Sinkhorn mixture (survey 7.2) in the layers of a pre-trained BERT.

The attentions are parts, in `utils.parts.sorting`. What here returns length x length is for pictures and small texts.
"""

import math

import torch
from torch import nn

from utils.parts.self_attention import replace_attention
from utils.parts.sorting import NOTHING, SinkhornAttention, SinkhornMixture, SortCutAttention, in_blocks

# --- L-07, L-08, L-09 in a model ------------------------------------------------------------------------------------


def sinkhorn_transformer(model: nn.Module, kind: type = SinkhornAttention, block: int = 64, **options) -> None:
    """Sinkhorn attention, or one of its relatives, in every layer of a BERT, in place. Projections keep their weights.

    A sorting network gets a place for each block of the longest text that the model's position embeddings allow: extend these
    first. `options` are those of the `kind`. Tay et al. 2020 (arXiv 2002.11296), survey 7.2. ValueError as in the parts.
    """
    places = -(-model.config.max_position_embeddings // max(1, block))
    how = {"block": block, "max_blocks": places, **options}
    replace_attention(model, lambda attention, number: kind.from_attention(attention, **how))


def sortcut(model: nn.Module, kept: int = 2, block: int = 64, **options) -> None:
    """All queries of every layer attend to the first `kept` of the sorted blocks, in place; as in `sinkhorn_transformer`."""
    sinkhorn_transformer(model, SortCutAttention, block, kept=kept, **options)


def sinkhorn_mixture(model: nn.Module, block: int = 64, **options) -> None:
    """The mean of Sinkhorn and standard attention in every layer, in place: quadratic. As in `sinkhorn_transformer`."""
    sinkhorn_transformer(model, SinkhornMixture, block, **options)


# --- L-09 causal Sinkhorn balancing ---------------------------------------------------------------------------------


def causal_sinkhorn(scores: torch.Tensor, iterations: int) -> torch.Tensor:
    """Balance exp(scores) of a decoder, (..., places, blocks), so that no place hears of a later block.

    Place p may hold blocks up to p. Rows are divided by their sums. A whole column's sum would not do: after one round of
    rows it holds what later blocks said (the authors' code for the Long Range Arena sums whole columns under the mask). So an
    entry is divided by the sum of its column down to its own row. Few iterations are meant: carried on, either way ends at
    the identity, the only triangular matrix whose rows and columns all sum to 1, where every block is its own partner. Tay et
    al. 2020 (arXiv 2002.11296), survey 7.2. BERT reads in both directions and has no use for it.
    """
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(future, NOTHING)
    for _ in range(iterations):
        scores = (scores - scores.logcumsumexp(-2)).masked_fill(future, NOTHING)
        scores = (scores - scores.logsumexp(-1, keepdim=True)).masked_fill(future, NOTHING)
    return scores.exp()


# --- L-07, L-08: what the permutation does --------------------------------------------------------------------------


@torch.no_grad()
def soft_permutation(part: SinkhornAttention, hidden_states: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
    """Permutation (batch, heads, places, blocks) of hidden states (batch, length, hidden); `text` (batch, length)."""
    text = torch.ones_like(hidden_states[..., 0], dtype=torch.bool) if text is None else text.bool()
    q, k = (in_blocks(part.heads(project(hidden_states)), part.block) for project in (part.query, part.key))
    return part.permutation(q, k, in_blocks(text, part.block, dim=1))


def permutation_entropy(permutation: torch.Tensor) -> float:
    """Mean entropy of what stands at a place, over the log of the number of blocks: 1 is uniform, 0 one block at each place."""
    blocks = permutation.shape[-1]
    entropy = torch.special.entr(permutation).sum(-1).mean()
    return float(entropy / math.log(blocks)) if blocks > 1 else 0.0


def balance_error(permutation: torch.Tensor) -> float:
    """How far the sum of a row or a column is from 1, at most."""
    return float(max((permutation.sum(dim) - 1).abs().max() for dim in (-1, -2)))


def sorted_pattern(part: SinkhornAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    """Which keys each query attends to, boolean (heads, length, length), of hidden states (length, hidden), where a place
    holds but the block of the highest weight: the own block and that one; with SortCut those of the first places; with the
    mixture all.
    """
    length, block = len(hidden_states), part.block
    best = soft_permutation(part, hidden_states.unsqueeze(0))[0].argmax(-1)  # (heads, places)
    number = torch.arange(length, device=hidden_states.device) // block
    if isinstance(part, SinkhornMixture):
        return torch.ones(len(best), length, length, dtype=torch.bool, device=best.device)
    if isinstance(part, SortCutAttention):
        first = best[:, : part.kept]  # the same for all queries
        return (first.unsqueeze(-1) == number).any(1).unsqueeze(1).expand(-1, length, -1)
    own = number.unsqueeze(-1) == number
    return own | (best[:, number].unsqueeze(-1) == number)
