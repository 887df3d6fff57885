"""Survey section 2.1.3: magnitude pruning in many small steps, with training in between.

Every method here is a hook of one training run, `utils.training.train(..., after_step=hook)`: it prunes as the steps go by. One
run has one optimiser, one learning rate and one order of batches, so that schedules differ in nothing but when they prune.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from utils.bert import ENCODER, dense_weight, matrices
from utils.pruning.masks import (
    Score,
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


def prune_on_schedule(
    sparsity_at: Callable[[int], float],
    steps: Sequence[int],
    score: Score = magnitudes,
    scope: str = "matrix",
    frozen: bool = True,
) -> AfterStep:
    """Hook: at each of the given (rising) steps the lowest `score(model)` go, until `sparsity_at(step)` of the weights is gone.

    `frozen` holds a removed weight at zero for good. Otherwise it is zeroed once and left to its gradient, so that it may come
    back and be kept the next time; the last pruning is frozen in any case, or the training after it would fill the zeros.
    """
    last = steps[-1]

    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step in steps:
            masks = masks_from_scores(removed_first(model, score(model)), sparsity_at(step), scope)
            prune = hold_masks if frozen or step == last else apply_masks
            prune(model, masks)

    return after_step


def iterative_pruning(
    targets: Sequence[float], steps: Sequence[int], score: Score, scope: str = "matrix", frozen: bool = True
) -> AfterStep:
    """Hook: at `steps[t]`, prune the lowest scores up to `targets[t]`; training goes on between the rounds.

    Optimal Brain Damage goes in such rounds, with `utils.pruning.hessian.obd_scores`. `frozen` as in `prune_on_schedule`. Raises
    ValueError for targets that are missing, falling or outside [0, 1), and for steps that are not as many, rising and 0 or more.
    """
    if not targets or list(targets) != sorted(targets):
        raise ValueError(f"targets must be one or more rising sparsities in [0, 1), got {list(targets)}")
    for target in targets:
        check_sparsity(target)
    if len(steps) != len(targets) or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ValueError(f"every one of the {len(targets)} targets needs a later step than the last one, got {list(steps)}")
    by_step = dict(zip(steps, targets, strict=True))
    return prune_on_schedule(by_step.__getitem__, steps, score, scope, frozen)


def iterative_magnitude(
    targets: Sequence[float],
    steps: Sequence[int],
    groups: tuple[str, ...] = ENCODER,
    scope: str = "matrix",
    frozen: bool = True,
) -> AfterStep:
    """Hook: prune the smallest |w|, retrain, prune further: Han, Pool, Tran, Dally 2015 (arXiv 1506.02626), survey 2.1.3.

    `scope` is `matrix` (every class loses the same share) or `global` (one sort). With one target it is one-shot pruning at that
    step. Errors as in `iterative_pruning`.
    """
    return iterative_pruning(targets, steps, partial(magnitudes, groups=groups), scope, frozen)


def pruning_steps(start: int, end: int, frequency: int) -> list[int]:
    """start, start + f, start + 2f, ... and `end` itself. Raises ValueError unless 0 <= start <= end and frequency >= 1."""
    if not 0 <= start <= end or frequency < 1:
        raise ValueError(f"need 0 <= start <= end and frequency >= 1, got start={start}, end={end}, frequency={frequency}")
    return [*range(start, end, frequency), end]


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
    return prune_on_schedule(schedule, pruning_steps(start, end, frequency), partial(magnitudes, groups=groups))


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
    steps = range(0, times * interval + 1, interval)
    hook = prune_on_schedule(schedule, steps, partial(magnitudes, groups=groups))
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
) -> AfterStep:
    """Gradual pruning with a rising threshold: every `frequency` steps, what lies below eps is masked for good.

    Each matrix has its own q, the percentile of its |w| at step `start` that stands for `sparsity` (0.9 in the paper). There
    the threshold decides when a weight goes and where it ends up; here it decides only when: it is stopped at `sparsity`, and
    at `end` exactly that much is gone, so that methods compare. Narang, Elsen, Diamos, Sengupta 2017 (arXiv 1704.05119), survey
    2.1.3. Raises ValueError as `narang_slopes`.
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
                slopes[m.name] = narang_slopes(q, **times)
            eps = narang_threshold(step, **times, theta=slopes[m.name][0], phi=slopes[m.name][1])
            hold_masks(model, {m.name: below_mask(m.weight.detach().abs(), eps, sparsity, step == end, m.weight.shape)})

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


def proximal_strength(weight: torch.Tensor, rate: torch.Tensor, target: float, steps: int, epsilon: float = 1e-3) -> float:
    """The gamma with which `steps` proximal steps zero the `target` share of a matrix.

    In that many steps weight i travels steps * rate_i * gamma * alpha_i towards zero and is there iff that is |w_i| or more: so
    gamma is the `target` quantile of |w_i| / (rate_i * alpha_i), over the steps. `weight` and `rate` have the same shape.
    """
    return (percentile(weight.abs() / (rate * reweighted_alphas(weight, epsilon)), target) / steps).item()


@torch.no_grad()
def adam_saliency(model: nn.Module, optimizer: torch.optim.Optimizer, groups: tuple[str, ...] = ENCODER) -> Scores:
    """w_i^2 * (sqrt(v_hat_i) + eps), up to the learning rate: the order in which a reweighted penalty takes weights to zero.

    In a proximal step weight i travels lr_i * gamma * alpha_i, so it is there after |w_i| / (lr_i * alpha_i), which with
    alpha_i = 1 / |w_i| is w_i^2 / lr_i. Raises ValueError as `adam_learning_rate`.
    """
    weights = {m.name: dense_weight(m) for m in matrices(model, groups)}
    return {name: weight.square() / adam_learning_rate(optimizer, weight) for name, weight in weights.items()}


def cut_by_adam(sparsity: float, last: int, groups: tuple[str, ...] = ENCODER) -> AfterStep:
    """Hook: after step `last` the lowest `adam_saliency` of each matrix goes, at once. RPP's order without its penalty: its control.

    Raises ValueError for a sparsity outside [0, 1).
    """
    check_sparsity(sparsity)

    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step == last:
            hold_masks(model, masks_from_scores(adam_saliency(model, optimizer, groups), sparsity, "matrix"))

    return after_step


@dataclass(frozen=True)
class Penalty:
    """The reweighted penalty: its target rises in equal parts up to `sparsity` at step `ramp` and then rests.

    alphas and gamma are renewed every `every` steps. While the target rises it is reached in that many steps; at rest in every
    single step, or the zeros would drift away with the task's own steps. Raises ValueError for a sparsity outside [0, 1) and
    numbers not above 0.
    """

    sparsity: float
    ramp: int
    every: int = 5
    epsilon: float = 1e-3

    def __post_init__(self):
        check_sparsity(self.sparsity)
        if self.ramp < 1 or self.every < 1 or self.epsilon <= 0:
            raise ValueError(f"need ramp >= 1, every >= 1, epsilon > 0, got {self.ramp}, {self.every}, {self.epsilon}")

    def strength(self, step: int, weight: torch.Tensor, rate: torch.Tensor) -> float:
        """The gamma of a matrix that is reweighted after `step`; its weights and their rates have the same shape."""
        target = self.sparsity * min(1.0, (step - 1 + self.every) / self.ramp)
        return proximal_strength(weight, rate, target, self.every if step <= self.ramp else 1, self.epsilon)


def reweighted_proximal(penalty: Penalty, pulled: Scores, groups: tuple[str, ...] = ENCODER) -> AfterStep:
    """Hook: after each AdamW step on the task's loss alone, w_i <- soft_threshold(w_i, lr_i * gamma * alpha_i).

    The step solves for the penalty gamma * sum_i alpha_i * |w_i| by itself, so the penalty never enters Adam's statistics of the
    task gradient; lr_i is Adam's own rate of the coordinate. The paper sweeps gamma and takes the sparsity that comes; here each
    matrix gets the gamma that reaches the penalty's target (`proximal_strength`), so that methods compare at one sparsity. What
    the penalty took from each weight adds up in `pulled`. Guo et al. 2019 (arXiv 1909.12486), survey 2.1.3.
    """
    alphas: Scores = {}
    gammas: dict[str, float] = {}

    @torch.no_grad()
    def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for m in matrices(model, groups):
            w = dense_weight(m)
            rate = adam_learning_rate(optimizer, w)
            if m.name not in alphas or (step - 1) % penalty.every == 0:
                alphas[m.name] = reweighted_alphas(w, penalty.epsilon)
                gammas[m.name] = penalty.strength(step, w, rate)
            shrunk = soft_threshold(w, rate * gammas[m.name] * alphas[m.name])
            pulled[m.name] = pulled.get(m.name, 0.0) + (shrunk - w)
            w.copy_(shrunk)

    return after_step


@torch.no_grad()
def freeze_pattern(model: nn.Module, sparsity: float, pulled: Scores, groups: tuple[str, ...] = ENCODER) -> float:
    """Hold the pattern that the proximal steps found, for the fine-tuning without a penalty that follows.

    In each matrix the zeros go first, then the smallest |w| up to `sparsity`; the weights that stay get back what the penalty
    `pulled` out of them (the relaxed lasso: a penalty may choose, but need not shrink what it has chosen; the paper's long
    fine-tuning undoes the shrinking, a short one cannot). Returns the share that the proximal steps had zeroed by themselves.
    Guo et al. 2019, survey 2.1.3.
    """
    scores = magnitudes(model, groups)
    zeroed = sparsity_of({name: score > 0 for name, score in scores.items()})
    masks = masks_from_scores(removed_first(model, scores), sparsity, "matrix")
    for m in matrices(model, groups):
        dense_weight(m).sub_(pulled[m.name] * masks[m.name])
    hold_masks(model, masks)
    return zeroed
