"""Survey section 2.3: pruning in blocks, so that what is left has a shape that hardware can use.

A weight matrix (R, C) is cut into blocks of r x c, and a block goes or stays as one; or each row is cut into banks of equal
length, and every bank keeps the same number of weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from utils.bert import ENCODER, matrices
from utils.pruning.iterative import (
    below_mask,
    magnitudes,
    narang_slopes,
    narang_threshold,
    percentile,
    pruning_steps,
    removed_first,
    spread,
)
from utils.pruning.masks import Masks, Score, check_sparsity, hold_masks, masks_from_scores
from utils.training import AfterStep, Loss, cross_entropy

Block = tuple[int, int]


@dataclass(frozen=True)
class Ramp:
    """When a rising threshold prunes: from step `start`, faster from `ramp`, every `frequency` steps, for the last time at
    `end`.

    Raises ValueError as `utils.pruning.iterative.narang_slopes`.
    """

    start: int
    ramp: int
    end: int
    frequency: int

    def __post_init__(self) -> None:
        narang_slopes(0.0, **asdict(self))


def cut(weight: torch.Tensor, block: Block) -> torch.Tensor:
    """View a matrix as blocks: (R, C) becomes (R / r, C / c, r, c). Raises ValueError where the block does not divide it."""
    (R, C), (r, c) = weight.shape, block
    if r < 1 or c < 1 or R % r or C % c:
        raise ValueError(f"block {r}x{c} does not divide a {R}x{C} matrix: its sides must be divisors of {R} and {C}")
    return weight.view(R // r, r, C // c, c).transpose(1, 2)


def block_scores(weight: torch.Tensor, block: Block = (4, 4)) -> torch.Tensor:
    """The score of a block is its largest |w|. Shape (R / r, C / c). Narang et al. 2017b, survey 2.3."""
    return cut(weight.detach().abs(), block).amax((-2, -1))


def block_masks(
    model: nn.Module,
    sparsity: float,
    block: Block = (4, 4),
    groups: tuple[str, ...] = ENCODER,
    score: Callable[[torch.Tensor, Block], torch.Tensor] = block_scores,
) -> Masks:
    """Remove the `sparsity` share of blocks with the lowest score in each matrix, at once.

    Narang, Undersander, Diamos 2017 (arXiv 1711.02782), survey 2.3. Raises ValueError for a sparsity outside [0, 1), and for a
    block that does not divide a matrix.
    """
    scores = {m.name: score(m.weight, block) for m in matrices(model, groups)}
    keep = masks_from_scores(scores, sparsity, scope="matrix")
    return {m.name: spread(keep[m.name], m.weight.shape) for m in matrices(model, groups)}


def block_pruning(sparsity: float, ramp: Ramp, block: Block = (4, 4), groups: tuple[str, ...] = ENCODER) -> AfterStep:
    """Hook: the rising threshold of P-06 on block scores. A zeroed block stays zero; at `ramp.end` exactly `sparsity` is gone.

    The paper takes P-06's slope theta, made for single weights and a sparsity of 90 %, times N_b^(1/4), since the largest of
    N_b weights is larger than one. That guesses what can be read off: here q, where the threshold is to end, is the
    `sparsity` percentile of each matrix's block scores at `ramp.start`, so that the threshold arrives when the schedule does
    at any sparsity. Narang et al. 2017b, survey 2.3. Raises ValueError for a sparsity outside [0, 1) and (at the first
    pruning) for a block that does not divide a matrix.
    """
    check_sparsity(sparsity)
    times, slopes = asdict(ramp), {}

    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for m in matrices(model, groups) if step in pruning_steps(ramp.start, ramp.end, ramp.frequency) else ():
            scores = block_scores(m.weight, block)
            if m.name not in slopes:
                slopes[m.name] = narang_slopes(percentile(scores, sparsity).item(), **times)
            theta, phi = slopes[m.name]
            eps = narang_threshold(step, **times, theta=theta, phi=phi)
            hold_masks(model, {m.name: below_mask(scores, eps, sparsity, step == ramp.end, m.weight.shape)})

    return after_step


def block_group_lasso(model: nn.Module, block: Block = (4, 4), groups: tuple[str, ...] = ENCODER) -> torch.Tensor:
    """sum_g ||w^(g)||_2 over all blocks (a scalar with gradient w_g / ||w_g||, and 0 for a block of zeros).

    Narang et al. 2017b, survey 2.3. Raises ValueError for a block that does not divide a matrix.
    """
    norms = [torch.linalg.vector_norm(cut(m.weight, block), dim=(-2, -1)).sum() for m in matrices(model, groups)]
    return torch.stack(norms).sum()


def group_lasso_pruning(
    sparsity: float, lam: float, ramp: Ramp, block: Block = (4, 4), groups: tuple[str, ...] = ENCODER
) -> tuple[Loss, AfterStep]:
    """Block pruning under min f(w) + lam * sum_g ||w^(g)||_2: the loss and the hook for one training run.

    The penalty draws whole blocks towards zero while the threshold rises, and is switched off at `ramp.end`. With lam = 0 it is
    block pruning. Narang et al. 2017b, survey 2.3. Raises ValueError for a negative lam, and as `block_pruning`.
    """
    if lam < 0:
        raise ValueError(f"lam must be 0 or more, got {lam}")
    prune = block_pruning(sparsity, ramp, block, groups)
    pruning = True

    def penalised(model: nn.Module, batch: dict) -> torch.Tensor:
        penalty = lam * block_group_lasso(model, block, groups) if pruning and lam else 0.0
        return cross_entropy(model, batch) + penalty

    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nonlocal pruning
        pruning = step < ramp.end
        prune(step, model, optimizer)

    return penalised, after_step


def lasso_strength(model: nn.Module, block: Block = (4, 4), groups: tuple[str, ...] = ENCODER, pull: float = 1.0) -> float:
    """The lam at which the penalty's whole gradient has the length `pull`, the length to which training clips gradients.

    Every block contributes a gradient of length lam, so of N blocks the whole has lam * sqrt(N).
    """
    count = sum(cut(m.weight, block).shape[:2].numel() for m in matrices(model, groups))
    return pull / count**0.5


def block_lengths(model: nn.Module, block: Block = (4, 4), groups: tuple[str, ...] = ENCODER) -> torch.Tensor:
    """||w^(g)||_2 of all blocks of the matrices, one after the other (blocks,)."""
    lengths = [torch.linalg.vector_norm(cut(m.weight.detach(), block), dim=(-2, -1)) for m in matrices(model, groups)]
    return torch.cat([length.flatten() for length in lengths])


def bank_mask(scores: torch.Tensor, bank_size: int, keep: int) -> torch.Tensor:
    """Keep the `keep` highest scores of every bank; a bank is `bank_size` neighbours in a row. Shape (R, C).

    Cao et al. 2019, survey 2.3. Raises ValueError where a bank does not divide a row, or cannot keep that many.
    """
    R, C = scores.shape
    if bank_size < 1 or C % bank_size:
        raise ValueError(f"banks of {bank_size} do not divide rows of {C}: bank_size must be a divisor of {C}")
    if not 1 <= keep <= bank_size:
        raise ValueError(f"keep must lie in 1..{bank_size} (the bank size), got {keep}")
    banks = scores.detach().view(R, C // bank_size, bank_size)
    mask = torch.zeros_like(banks, dtype=torch.bool)
    return mask.scatter_(-1, banks.topk(keep, -1).indices, True).view(R, C)


def bank_balanced_masks(
    model: nn.Module, bank_size: int = 4, keep: int = 2, groups: tuple[str, ...] = ENCODER, score: Score | None = None
) -> Masks:
    """In every bank of every row the `keep` largest |w| (or scores) stay, so the sparsity is 1 - keep / bank_size everywhere.

    Two of four is the pattern that NVIDIA's sparse tensor cores take; the paper uses few long banks. What a held mask has
    removed stays removed, so that prune, retrain, prune narrows a pattern. Cao et al. 2019 (FPGA'19), survey 2.3. Errors as
    `bank_mask`.
    """
    scores = removed_first(model, magnitudes(model, groups) if score is None else score(model))
    return {name: bank_mask(score, bank_size, keep) for name, score in scores.items()}


def iterative_banks(
    bank_size: int, keeps: Sequence[int], steps: Sequence[int], groups: tuple[str, ...] = ENCODER, score: Score | None = None
) -> AfterStep:
    """Hook: at `steps[t]`, prune every bank to `keeps[t]` weights (falling) and hold the masks; between the rounds it trains
    on.

    Cao et al. 2019, survey 2.3. Raises ValueError for entries that are missing or rising, for steps that are not as many and
    rising, and as `bank_mask`.
    """
    if not keeps or list(keeps) != sorted(keeps, reverse=True):
        raise ValueError(f"keeps must be one or more falling counts in 1..{bank_size}, got {list(keeps)}")
    if len(steps) != len(keeps) or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ValueError(f"each of the {len(keeps)} rounds needs a later step than the one before it, got {list(steps)}")
    by_step = dict(zip(steps, keeps, strict=True))

    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step in by_step:
            hold_masks(model, bank_balanced_masks(model, bank_size, by_step[step], groups, score))

    return after_step
