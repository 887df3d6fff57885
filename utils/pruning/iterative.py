"""Survey section 2.1.3: magnitude pruning in many small steps, with training in between.

Two ways to write it. A driver (`iterative_pruning`) alternates pruning with a `retrain` function of the caller's. A hook goes
into one training run as `utils.training.train(..., after_step=hook)` and prunes as the steps go by.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from utils.bert import ENCODER, dense_weight, matrices
from utils.pruning.masks import (
    Masks,
    Scores,
    apply_masks,
    check_sparsity,
    held_masks,
    hold_masks,
    lowest,
    masks_from_scores,
    sparsity_of,
)
from utils.training import AfterStep

Retrain = Callable[[nn.Module, int], None]
Score = Callable[[nn.Module], Scores]


def magnitudes(model: nn.Module, groups: tuple[str, ...] = ENCODER) -> Scores:
    """|w| of every weight, as the forward pass sees it."""
    return {m.name: m.weight.detach().abs() for m in matrices(model, groups)}


def removed_first(model: nn.Module, scores: Scores) -> Scores:
    """The scores, with -1 for each weight that a held mask has removed: no tie can bring such a weight back."""
    held = held_masks(model)
    return {name: score.masked_fill(~held[name], -1) if name in held else score for name, score in scores.items()}


def round_targets(x: float, y: float, rounds: int) -> list[float]:
    """Sparsity of each round: first x (left out where x = 0), then (y - x) / T more in each of T rounds, up to y.

    Raises ValueError unless 0 <= x < y < 1 and there is at least one round.
    """
    if not 0 <= x < y < 1 or rounds < 1:
        raise ValueError(f"need 0 <= x < y < 1 and rounds >= 1, got x={x}, y={y}, rounds={rounds}")
    return [x] * (x > 0) + [x + (y - x) * t / rounds for t in range(1, rounds)] + [y]


def iterative_pruning(
    model: nn.Module, targets: Sequence[float], retrain: Retrain, score: Score, scope: str = "matrix", frozen: bool = True
) -> Masks:
    """Per target: score the weights, prune the lowest up to the target, `retrain(model, round)`. Returns the final masks.

    `frozen` holds a removed weight at zero for good. Otherwise it is zeroed once and left to its gradient, so it may come back
    and be kept by a later round; the last round is frozen in any case, for its retraining would fill the zeros again. Raises
    ValueError for targets that are missing, falling, or outside [0, 1).
    """
    if not targets or list(targets) != sorted(targets):
        raise ValueError(f"targets must be one or more rising sparsities in [0, 1), got {list(targets)}")
    for target in targets:
        check_sparsity(target)
    for number, target in enumerate(targets):
        masks = masks_from_scores(removed_first(model, score(model)), target, scope)
        if frozen or number == len(targets) - 1:
            hold_masks(model, masks)
        else:
            apply_masks(model, masks)
        retrain(model, number)
    return masks


def iterative_magnitude(
    model: nn.Module,
    targets: Sequence[float],
    retrain: Retrain,
    groups: tuple[str, ...] = ENCODER,
    scope: str = "matrix",
    frozen: bool = True,
) -> Masks:
    """Prune the smallest |w|, retrain, prune further: Han, Pool, Tran, Dally 2015 (arXiv 1506.02626), survey 2.1.3.

    `scope` is `matrix` (every class loses the same share) or `global` (one sort). With one target it is one-shot pruning.
    Leaves the masks held and returns them. Errors as in `iterative_pruning`.
    """
    return iterative_pruning(model, targets, retrain, partial(magnitudes, groups=groups), scope, frozen)


def pruning_steps(start: int, end: int, frequency: int) -> list[int]:
    """start, start + f, start + 2f, ... and `end` itself. Raises ValueError unless 0 <= start <= end and frequency >= 1."""
    if not 0 <= start <= end or frequency < 1:
        raise ValueError(f"need 0 <= start <= end and frequency >= 1, got start={start}, end={end}, frequency={frequency}")
    return [*range(start, end, frequency), end]


def prune_on_schedule(
    sparsity_at: Callable[[int], float], steps: Sequence[int], groups: tuple[str, ...] = ENCODER, scope: str = "matrix"
) -> AfterStep:
    """Hook: at each of the given steps, prune by magnitude to `sparsity_at(step)` and hold the masks. What is gone stays gone."""

    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step in steps:
            hold_masks(model, masks_from_scores(removed_first(model, magnitudes(model, groups)), sparsity_at(step), scope))

    return after_step


def cubic_sparsity(step: int, *, start: int, end: int, initial: float = 0.0, final: float) -> float:
    """s_i = s_f + (s_0 - s_f) * (1 - (i - start) / (end - start))^3: fast while much is redundant, slow at the end.

    Zhu, Gupta 2017 (arXiv 1710.01878), survey 2.1.3; the survey counts i from `start`, and writes n * f for end - start.
    """
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3


def agp_pruning(
    sparsity: float, *, start: int, end: int, frequency: int, initial: float = 0.0, groups: tuple[str, ...] = ENCODER
) -> AfterStep:
    """Automated gradual pruning: every `frequency` steps from `start` to `end`, each matrix is pruned to the cubic schedule.

    Zhu, Gupta 2017, survey 2.1.3. Raises ValueError unless 0 <= start < end, frequency >= 1, 0 <= initial <= sparsity < 1.
    """
    check_sparsity(sparsity)
    if start >= end or not 0 <= initial <= sparsity:
        raise ValueError(f"need start < end and 0 <= initial <= sparsity, got {start}, {end} and {initial}, {sparsity}")
    schedule = partial(cubic_sparsity, start=start, end=end, initial=initial, final=sparsity)
    return prune_on_schedule(schedule, pruning_steps(start, end, frequency), groups)


def staircase_sparsity(step: int, *, interval: int, first: float, final: float, times: int = 9) -> float:
    """X, then (Y - X) / 9 more at each multiple of the interval, Y after nine of them."""
    return first + (final - first) * min(step // interval, times) / times


def transformers_zip_pruning(
    model: nn.Module, first: float, final: float, *, end: int, times: int = 9, groups: tuple[str, ...] = ENCODER
) -> AfterStep:
    """Prune X% of each layer of the pre-trained model at once, then (Y - X) / 9 % at nine equally spaced steps before `end`.

    The paper prunes every 1001 steps of 10,000, and so leaves the last tenth for recovery; embeddings are left alone. Cheong,
    Daniel 2019 (transformers.zip), survey 2.1.3. Holds the first masks and returns the hook for the rest. Raises ValueError
    unless 0 <= first <= final < 1 and `end` leaves room for `times` prunings.
    """
    check_sparsity(final)
    if not 0 <= first <= final or times < 1 or end <= times:
        raise ValueError(f"need 0 <= first <= final and 1 <= times < end, got {first}, {final} and times={times}, end={end}")
    interval = end // (times + 1) or 1
    schedule = partial(staircase_sparsity, interval=interval, first=first, final=final, times=times)
    hook = prune_on_schedule(schedule, range(0, times * interval + 1, interval), groups)
    hook(0, model, None)
    return hook


def narang_slopes(q: float, *, start: int, ramp: int, end: int, frequency: int) -> tuple[float, float]:
    """theta = 2 * q * f / (2 * (r - s) + 3 * (e - r)) and phi = 1.5 * theta: slopes that bring the threshold to about q at e.

    Raises ValueError unless 1 <= start <= ramp <= end, start < end and frequency >= 1.
    """
    if not 1 <= start <= ramp <= end or start == end or frequency < 1:
        raise ValueError(f"need 1 <= start <= ramp <= end, start < end, frequency >= 1; got {start}, {ramp}, {end}, {frequency}")
    theta = 2 * q * frequency / (2 * (ramp - start) + 3 * (end - ramp))
    return theta, 1.5 * theta


def narang_threshold(step: int, *, start: int, ramp: int, end: int, frequency: int, theta: float, phi: float) -> float:
    """eps_i = theta * (i - s + 1) / f up to the ramp r, then (theta * (r - s + 1) + phi * (i - r + 1)) / f up to the end e.

    Zero before s, constant after e. Narang et al. 2017 (arXiv 1704.05119), survey 2.1.3.
    """
    i, s, r = min(step, end), start, ramp
    if i < s:
        return 0.0
    if i <= r:
        return theta * (i - s + 1) / frequency
    return (theta * (r - s + 1) + phi * (i - r + 1)) / frequency


def percentile(values: torch.Tensor, share: float) -> torch.Tensor:
    """The value below which `share` of the entries lie (a scalar tensor). torch.quantile gives up above 16 million entries."""
    k = min(max(1, round(share * values.numel())), values.numel())
    return values.float().flatten().kthvalue(k).values


def narang_pruning(
    sparsity: float,
    *,
    start: int,
    ramp: int,
    end: int,
    frequency: int,
    groups: tuple[str, ...] = ENCODER,
    score: Callable[[torch.Tensor], torch.Tensor] = torch.abs,
    slope: float = 1.0,
) -> AfterStep:
    """Gradual pruning with a rising threshold: every `frequency` steps, what lies below eps is masked for good.

    Each matrix has its own q, the percentile of its |w| at step `start` that stands for `sparsity` (0.9 in the paper). There
    the threshold decides when a weight goes and where it ends up; here it decides only when: it is stopped at `sparsity`, and
    at `end` exactly that much is gone, so that methods compare. Narang, Elsen, Diamos, Sengupta 2017 (arXiv 1704.05119), survey
    2.1.3. `score` and `slope` are for blocks (`utils.pruning.blocks`). Raises ValueError as `narang_slopes`.
    """
    check_sparsity(sparsity)
    times = {"start": start, "ramp": ramp, "end": end, "frequency": frequency}
    narang_slopes(0.0, **times)  # a wrong schedule shall fail now, not at its first step
    steps = pruning_steps(start, end, frequency)
    slopes: dict[str, tuple[float, float]] = {}

    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for m in matrices(model, groups) if step in steps else ():
            if step == start:
                q = percentile(m.weight.detach().abs(), sparsity).item()
                slopes[m.name] = narang_slopes(slope * q, **times)
            eps = narang_threshold(step, **times, theta=slopes[m.name][0], phi=slopes[m.name][1])
            hold_masks(model, {m.name: below_mask(score(m.weight.detach()), eps, sparsity, step == end, m.weight.shape)})

    return after_step


def below_mask(scores: torch.Tensor, eps: float, sparsity: float, final: bool, shape: torch.Size) -> torch.Tensor:
    """Keep-mask of the given shape without the scores up to eps, but no more than `sparsity` of them (`final`: exactly)."""
    below = int((scores <= eps).sum()) / scores.numel()
    return spread(lowest(scores, sparsity if final else min(below, sparsity)), shape)


def spread(keep: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Give every weight of a block the block's entry: (R / r, C / c) becomes (R, C)."""
    rows, columns = shape[0] // keep.shape[0], shape[1] // keep.shape[1]
    return keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def soft_threshold(weight: torch.Tensor, amount: torch.Tensor | float) -> torch.Tensor:
    """prox(w) = sign(w) * max(|w| - amount, 0), the minimiser over z of 0.5 * (z - w)^2 + amount * |z|."""
    return weight.sign() * (weight.abs() - amount).clamp(min=0)


def reweighted_alphas(weight: torch.Tensor, epsilon: float = 1e-3) -> torch.Tensor:
    """alpha_i = 1 / (|w_i| + epsilon): plain L1 pulls all weights alike; this leaves large ones almost in peace."""
    return 1 / (weight.detach().abs() + epsilon)


def adam_learning_rate(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor:
    """The learning rate that Adam gives each coordinate: lr / (sqrt(v_hat) + eps), of the parameter's shape.

    Raises ValueError for a parameter that the optimiser has not stepped.
    """
    state = optimizer.state.get(parameter)
    if not state or "exp_avg_sq" not in state:
        raise ValueError(
            "no Adam statistics for a weight: the groups must train, under AdamW (embeddings: train_embeddings=True)"
        )
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
    return group["lr"] / (v_hat.sqrt() + group["eps"])


def reweighted_proximal(
    gamma: float, *, epsilon: float = 1e-3, reweight_every: int = 10, groups: tuple[str, ...] = ENCODER, adaptive: bool = True
) -> AfterStep:
    """Hook: after each AdamW step on the task's loss alone, w_i <- soft_threshold(w_i, lr_i * gamma * alpha_i).

    The step solves for the penalty gamma * sum_i alpha_i * |w_i| by itself, so the penalty never enters Adam's statistics of
    the task gradient. lr_i is Adam's own rate of the coordinate (`adaptive`), or the plain learning rate. The alphas are
    renewed from the weights at the first step and every `reweight_every` steps. Guo et al. 2019 (arXiv 1909.12486), survey
    2.1.3. Raises ValueError unless gamma >= 0, epsilon > 0 and reweight_every >= 1.
    """
    if gamma < 0 or epsilon <= 0 or reweight_every < 1:
        raise ValueError(f"need gamma >= 0, epsilon > 0, reweight_every >= 1, got {gamma}, {epsilon}, {reweight_every}")
    alphas: Scores = {}

    @torch.no_grad()
    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for m in matrices(model, groups):
            w = dense_weight(m)
            if m.name not in alphas or step % reweight_every == 0:
                alphas[m.name] = reweighted_alphas(w, epsilon)
            lr = adam_learning_rate(optimizer, w) if adaptive else optimizer.param_groups[0]["lr"]
            w.copy_(soft_threshold(w, lr * gamma * alphas[m.name]))

    return after_step


def freeze_pattern(
    model: nn.Module, sparsity: float, groups: tuple[str, ...] = ENCODER, scope: str = "global"
) -> tuple[Masks, float]:
    """Hold the pattern that the proximal steps found, at the chosen sparsity, for the fine-tuning that follows.

    The zeros go first, then the smallest |w| (where the prox zeroed more than `sparsity`, the surplus is free to grow again).
    Returns the masks and the share of weights that the prox itself had zeroed. Guo et al. 2019, survey 2.1.3.
    """
    scores = magnitudes(model, groups)
    zeroed = sparsity_of({name: score > 0 for name, score in scores.items()})
    masks = masks_from_scores(removed_first(model, scores), sparsity, scope)
    hold_masks(model, masks)
    return masks, zeroed
