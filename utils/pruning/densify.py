"""Survey section 2.1.4: prune, then let weights grow again."""

from collections.abc import Callable

import torch
from torch import nn

from utils.bert import ENCODER, dense_weight, linear_matrices
from utils.pruning.hessian import output_gradients
from utils.pruning.iterative import percentile
from utils.pruning.magnitude import magnitude_masks
from utils.pruning.masks import Masks, Score, Scores, check_sparsity, held_masks, hold_masks, lowest, release_masks
from utils.training import AfterStep, check_batches

Train = Callable[[nn.Module], None]


def dense_sparse_dense(
    model: nn.Module, sparsity: float, retrain_sparse: Train, retrain_dense: Train, groups: tuple[str, ...] = ENCODER
) -> Masks:
    """From a trained dense model: prune and retrain under the masks (S), then drop the masks and retrain all (D).

    The removed weights restart from zero. The result is dense: the method regularises, it does not compress; for a small file
    take the model at the end of `retrain_sparse`. Han et al. 2017 (arXiv 1607.04381), survey 2.1.4. Returns the masks of the
    sparse phase. Raises ValueError for a sparsity outside [0, 1).
    """
    masks = magnitude_masks(model, sparsity, groups)
    hold_masks(model, masks)
    retrain_sparse(model)
    release_masks(model)
    retrain_dense(model)
    return masks


def dense_gradients(model: nn.Module, batches: list[dict], groups: tuple[str, ...] = ENCODER) -> Scores:
    """Gradient of the mean loss with respect to every weight, those behind a mask included, accumulated over the batches.

    A linear layer's dL/dW is dy^T x whatever the mask, while the gradient that reaches the weight under the mask is zero where
    it is masked. Raises ValueError for an empty list of batches and for groups that are not linear layers.
    """
    check_batches(batches)
    gradients = {m.name: torch.zeros(m.weight.shape, device=m.weight.device) for m in linear_matrices(model, groups)}
    for batch in batches:
        for name, (x, dy) in output_gradients(model, batch, groups).items():
            gradients[name] += dy.flatten(0, -2).T @ x.flatten(0, -2)
    examples = sum(len(batch["labels"]) for batch in batches)
    return {name: gradient / examples for name, gradient in gradients.items()}


def grown_mask(mask: torch.Tensor, gradient: torch.Tensor, alpha: float) -> torch.Tensor:
    """Growth: a dormant weight wakes iff |dL/dw| exceeds the (100 * alpha)-th percentile of |W.grad|.

    Dai, Yin, Jha 2018 (arXiv 1805.11797), survey 2.1.4.
    """
    return mask | (gradient.abs() > percentile(gradient.abs(), alpha))


def pruned_mask(mask: torch.Tensor, weight: torch.Tensor, beta: float, spared: torch.Tensor | None = None) -> torch.Tensor:
    """Pruning: an active weight goes iff |w| is below the (100 * beta)-th percentile of |W|, dormant weights counted as lowest.

    `spared` weights count as highest. Dai et al. 2018, survey 2.1.4. Afterwards a share of beta is gone (more only where more was
    dormant already). All have the shape of the matrix.
    """
    scores = weight.detach().abs().masked_fill(~mask, -1)
    return mask & lowest(scores if spared is None else scores.masked_fill(spared, torch.inf), beta)


def seed_masks(model: nn.Module, groups: tuple[str, ...]) -> Masks:
    """The masks that the model holds on these groups. Raises ValueError where one is missing."""
    held, names = held_masks(model), [m.name for m in linear_matrices(model, groups)]
    missing = [name for name in names if name not in held]
    if missing:
        raise ValueError(f"growth starts from a sparse seed: hold masks on {missing[0]} first (utils.pruning.masks.hold_masks)")
    return {name: held[name] for name in names}


@torch.no_grad()
def grow(model: nn.Module, scores: Scores, alpha: float, groups: tuple[str, ...] = ENCODER) -> Masks:
    """Wake dormant weights, at zero, where the score (the gradient, or another) is large. Returns the woken ones.

    Raises ValueError for a model that holds no masks on these groups.
    """
    masks, woken = seed_masks(model, groups), {}
    for m in linear_matrices(model, groups):
        mask = grown_mask(masks[m.name], scores[m.name], alpha)
        woken[m.name] = mask & ~masks[m.name]
        dense_weight(m)[woken[m.name]] = 0.0  # what lay under the mask is stale
        hold_masks(model, {m.name: mask})
    return woken


def prune_back(model: nn.Module, beta: float, spared: Masks, groups: tuple[str, ...] = ENCODER) -> None:
    """Prune the active weights of a model that holds masks; the `spared` ones stay (no entry: none of that matrix is)."""
    masks = seed_masks(model, groups)
    for m in linear_matrices(model, groups):
        hold_masks(model, {m.name: pruned_mask(masks[m.name], m.weight, beta, spared.get(m.name))})


def random_scores(model: nn.Module, generator: torch.Generator, groups: tuple[str, ...] = ENCODER) -> Scores:
    """The control of growth by gradient: weights wake by lot. Every call draws anew."""
    return {m.name: torch.rand(m.weight.shape, generator=generator).to(m.weight.device) for m in linear_matrices(model, groups)}


def exchanged(before: Masks, after: Masks) -> float:
    """Share of the connections in `before` that are not in `after`."""
    gone = sum(int((mask & ~after[name]).sum()) for name, mask in before.items())
    return gone / sum(int(mask.sum()) for mask in before.values())


def grow_and_prune(
    score: Score, sparsity: float, *, alpha: float, frequency: int, end: int, groups: tuple[str, ...] = ENCODER
) -> AfterStep:
    """Hook: starting from a sparse seed whose masks are held, grow and prune in turn, every `frequency` steps until `end`.

    `score(model)` decides what grows: the gradient of many batches (`dense_gradients`; the paper: of an epoch), or the lot. Each
    pruning, the last one at `end`, goes back to `sparsity` exactly (a seed still sparser than that is left as it is). A woken
    weight starts at zero, where any old one is larger after a few steps: it is spared at the first pruning after its birth, and
    competes from then on. The paper prunes LSTM gates, with epochs between; these are BERT's linear layers. Dai, Yin, Jha 2018
    (arXiv 1805.11797), survey 2.1.4. Raises ValueError for shares outside [0, 1), an `end` that is no multiple of
    2 * frequency, and (at the first growth) a model without masks.
    """
    check_sparsity(sparsity)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha}")
    if frequency < 1 or end < 1 or end % (2 * frequency):
        raise ValueError(f"need frequency >= 1 and `end` a multiple of 2 * frequency, got frequency={frequency}, end={end}")
    newborn: Masks = {}

    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step > end or step % frequency:
            return
        if (step // frequency) % 2:
            newborn.update(grow(model, score(model), alpha, groups))
        else:
            prune_back(model, sparsity, newborn, groups)

    return after_step
