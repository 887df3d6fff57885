"""Survey section 2.3: pruning in blocks, so that what is left has a shape that hardware can use.

A weight matrix (R, C) is cut into blocks of r x c, and a block goes or stays as one; or each row is cut into banks of equal
length, and every bank keeps the same number of weights.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from utils.bert import ENCODER, matrices
from utils.pruning.iterative import narang_pruning, removed_first, spread
from utils.pruning.masks import Masks, hold_masks, masks_from_scores
from utils.training import AfterStep, Loss, cross_entropy

Block = tuple[int, int]


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
    model: nn.Module, sparsity: float, block: Block = (4, 4), groups: tuple[str, ...] = ENCODER, scope: str = "matrix"
) -> Masks:
    """Remove the `sparsity` share of blocks with the lowest score, in each matrix or over all (`scope="global"`).

    Narang, Undersander, Diamos 2017 (arXiv 1711.02782), survey 2.3. Raises ValueError for a sparsity outside [0, 1), and for a
    block that does not divide a matrix.
    """
    scores = {m.name: block_scores(m.weight, block) for m in matrices(model, groups)}
    keep = masks_from_scores(scores, sparsity, scope)
    return {m.name: spread(keep[m.name], m.weight.shape) for m in matrices(model, groups)}


def block_pruning(
    sparsity: float, block: Block = (4, 4), *, start: int, ramp: int, end: int, frequency: int, groups: tuple[str, ...] = ENCODER
) -> AfterStep:
    """Hook: the rising threshold of P-06 on block scores, its slope theta_b = theta * N_b^(1/4) for blocks of N_b weights.

    The largest of N_b weights is larger than one weight, so the threshold must rise faster. A zeroed block stays zero; at `end`
    exactly `sparsity` of the blocks is gone. Narang et al. 2017b, survey 2.3. Raises ValueError as `narang_pruning`, and (at the
    first pruning) for a block that does not divide a matrix.
    """
    N_b = block[0] * block[1]
    times = {"start": start, "ramp": ramp, "end": end, "frequency": frequency}
    return narang_pruning(sparsity, **times, groups=groups, score=partial(block_scores, block=block), slope=N_b**0.25)


def block_group_lasso(model: nn.Module, block: Block = (4, 4), groups: tuple[str, ...] = ENCODER) -> torch.Tensor:
    """sum_g ||w^(g)||_2 over all blocks (a scalar with gradient w_g / ||w_g||, and 0 for a block of zeros).

    Narang et al. 2017b, survey 2.3. Raises ValueError for a block that does not divide a matrix.
    """
    norms = [torch.linalg.vector_norm(cut(m.weight, block), dim=(-2, -1)).sum() for m in matrices(model, groups)]
    return torch.stack(norms).sum()


def group_lasso_pruning(
    sparsity: float,
    lam: float,
    block: Block = (4, 4),
    *,
    start: int,
    ramp: int,
    end: int,
    frequency: int,
    groups: tuple[str, ...] = ENCODER,
    loss: Loss = cross_entropy,
) -> tuple[Loss, AfterStep]:
    """Block pruning under min f(w) + lam * sum_g ||w^(g)||_2: the loss and the hook for one training run.

    The penalty draws whole blocks towards zero while the threshold rises, and is switched off at `end`. With lam = 0 it is block
    pruning. Narang et al. 2017b, survey 2.3. Raises ValueError for a negative lam, and as `block_pruning`.
    """
    if lam < 0:
        raise ValueError(f"lam must be 0 or more, got {lam}")
    prune = block_pruning(sparsity, block, start=start, ramp=ramp, end=end, frequency=frequency, groups=groups)
    pruning = True

    def penalised(model: nn.Module, batch: dict) -> torch.Tensor:
        penalty = lam * block_group_lasso(model, block, groups) if pruning and lam else 0.0
        return loss(model, batch) + penalty

    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nonlocal pruning
        pruning = step < end
        prune(step, model, optimizer)

    return penalised, after_step


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


def bank_balanced_masks(model: nn.Module, bank_size: int = 4, keep: int = 2, groups: tuple[str, ...] = ENCODER) -> Masks:
    """In every bank of every row the `keep` largest |w| stay, so the sparsity is 1 - keep / bank_size everywhere.

    Two of four is the pattern that NVIDIA's sparse tensor cores take; the paper uses few long banks. What a held mask has removed
    stays removed, so that prune, retrain, prune narrows a pattern. Cao et al. 2019 (FPGA'19), survey 2.3. Errors as `bank_mask`.
    """
    scores = removed_first(model, {m.name: m.weight.detach().abs() for m in matrices(model, groups)})
    return {name: bank_mask(score, bank_size, keep) for name, score in scores.items()}


def iterative_banks(
    model: nn.Module,
    bank_size: int,
    keeps: Sequence[int],
    retrain: Callable[[nn.Module, int], None],
    groups: tuple[str, ...] = ENCODER,
) -> Masks:
    """Per entry of `keeps` (falling): prune every bank to that many weights, then `retrain(model, round)`.

    Cao et al. 2019, survey 2.3. Leaves the masks held and returns the last ones. Raises ValueError for entries that are missing
    or rising, and as `bank_mask`.
    """
    if not keeps or list(keeps) != sorted(keeps, reverse=True):
        raise ValueError(f"keeps must be one or more falling counts in 1..{bank_size}, got {list(keeps)}")
    for number, keep in enumerate(keeps):
        masks = bank_balanced_masks(model, bank_size, keep, groups)
        hold_masks(model, masks)
        retrain(model, number)
    return masks
