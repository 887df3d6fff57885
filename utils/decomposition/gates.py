"""Survey section 6.1, FLOP: fine-tuning learns the ranks of all factorised layers, under a constraint on their size.

Each component of W = P G Q has a gate (`utils.parts.factorised`). The task's loss says which components are needed, and an
augmented Lagrangian how many: its multipliers climb until the expected size is what was asked for.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from utils import bert, parts
from utils.decomposition.factors import Factors, Family, Plan, break_even_rank, factorise, leading_directions
from utils.parts.factorised import GatedLowRankLinear, one_probability, open_probability, settled_gates, shrunk
from utils.replacing import replace_linear
from utils.training import Loss, cross_entropy

# --- T-05 FLOP ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gate_layers(
    model: nn.Module, groups: tuple[str, ...] = bert.ENCODER, rank: int | None = None, closed: float = 0.05
) -> dict[str, float]:
    """T-05: factors with gates in the place of linear layers, started at the SVD of each matrix. In place.

    Wang, Wohlwend and Lei 2019 (arXiv 1910.04732), survey 6.1: they train language models in factors, then with gates; here the
    factors come from a trained matrix. Without a `rank` each matrix gets the one at which its factors are as large as it is, as
    in their code. All gates start at psi = log(1 / closed - 1), 0.05 in their Transformers, 0.5 in their recurrent networks.
    Returns what was `kept` of each matrix. Raises ValueError for `closed` outside (0, 1), a rank that is not there, weights
    that are not finite, and embedding groups.
    """
    if not 0 < closed < 1:
        raise ValueError(f"gates start between closed (1) and open (0), got {closed}")

    def make(linear: nn.Linear, number: int) -> GatedLowRankLinear:
        if not linear.weight.isfinite().all():
            raise ValueError(f"factors need finite weights, matrix {number} has others")
        size = int(break_even_rank(*linear.weight.shape)) if rank is None else rank
        part = GatedLowRankLinear.from_linear(linear, size)
        part.log_alpha.fill_(math.log(1 / closed - 1))
        return part

    return replace_linear(model, groups, make)


def gated(model: nn.Module) -> dict[str, GatedLowRankLinear]:
    """The gated layers by path. Raises ValueError where there are none."""
    found = {path: part for path, part in parts.find(model).items() if isinstance(part, GatedLowRankLinear)}
    if not found:
        raise ValueError("the model has no gated layers: call gate_layers first")
    return found


def sparsity(model: nn.Module) -> torch.Tensor:
    """1 - expected weights of the open components / weights of the matrices that they replaced; a scalar with a gradient.

    The authors divide by the factors' own weights, which at the break-even rank are as many.
    """
    layers = gated(model).values()
    expected = sum(open_probability(part.log_alpha).sum() * (part.in_features + part.out_features) for part in layers)
    return 1 - expected / sum(part.in_features * part.out_features for part in layers)


def goal_at(step: int, target: float, warmup: int) -> float:
    """The sparsity asked for: it rises linearly to `target` in `warmup` steps."""
    return target * min(1.0, step / warmup)


def augmented(gap: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """lambda_1 gap + lambda_2 gap^2 for the gap between sparsity and goal, a scalar, and the two multipliers (2,)."""
    first, second = multipliers
    return first * gap + second * gap**2


@dataclass
class Lagrangian:
    """lambda_1 (s - t) + lambda_2 (s - t)^2 for the sparsity s of a model and a goal t that rises linearly to `target`.

    Weights and gates descend, the multipliers climb (`optimizer_groups`): they grow for as long as the constraint is missed.
    `advance`, an `after_step` of `utils.training.train`, moves the goal on; `history` holds (t, s) of each step. Wang et al.
    2019 (arXiv 1910.04732), survey 6.1. Raises ValueError for a target outside [0, 1), and for a warm-up below 1 step.
    """

    target: float
    warmup: int
    step: int = 0
    multipliers: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.zeros(2)))
    history: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self):
        if not 0 <= self.target < 1 or self.warmup < 1:
            raise ValueError(f"a target in [0, 1) and a warm-up of 1 step or more, got {self.target} and {self.warmup}")

    @property
    def goal(self) -> float:
        """The sparsity that is asked for at this step."""
        return goal_at(self.step, self.target, self.warmup)

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """What is added to the loss."""
        gap = sparsity(model) - self.goal
        return augmented(gap, self.multipliers.to(gap.device))

    def advance(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Note goal and sparsity, and move the goal on."""
        self.history.append((self.goal, sparsity(model).item()))
        self.step = step


def optimizer_groups(model: nn.Module, lagrangian: Lagrangian, gate_rate: float, multiplier_rate: float) -> list[dict]:
    """For `utils.training.train`: weights and gates, whose loss is minimised, and multipliers, for which it is maximised.

    Without weight decay for the last two: it would pull psi to 0, where a gate is least decided, and multipliers off the point
    at which they hold the constraint.
    """
    gates = [part.log_alpha for part in gated(model).values()]
    weights = [parameter for name, parameter in model.named_parameters() if not name.endswith("log_alpha")]
    return [
        {"params": weights},
        {"params": gates, "lr": gate_rate, "weight_decay": 0.0},
        {"params": [lagrangian.multipliers], "lr": multiplier_rate, "weight_decay": 0.0, "maximize": True},
    ]


def constrained(lagrangian: Lagrangian, loss: Loss = cross_entropy) -> Loss:
    """A loss and the penalty, one sample of the gates per batch."""
    return lambda model, batch: loss(model, batch) + lagrangian.penalty(model)


def kept_components(model: nn.Module, size: float | None = None) -> dict[str, torch.Tensor]:
    """Which components stay, by path: (rank,) boolean each.

    Without a `size` as many of each layer as are expected to be open, as the authors do. With one, the likeliest of all layers
    that fit into that share of the matrices' weights, so that the size is exact however far training came; each layer keeps at
    least one. Raises ValueError for a size that does not hold these.
    """
    layers = gated(model)
    if size is None:
        return {path: settled_gates(part.log_alpha.detach()) > 0 for path, part in layers.items()}
    budget = size * sum(part.in_features * part.out_features for part in layers.values())
    score = {path: part.log_alpha.detach().clone() for path, part in layers.items()}
    for values in score.values():
        values[values.argmax()] = torch.inf  # each layer's best one comes first
    cost = torch.cat([torch.full((part.rank,), part.in_features + part.out_features) for part in layers.values()])
    order = torch.cat([values.cpu() for values in score.values()]).argsort(descending=True, stable=True)
    fits = cost[order].cumsum(0) <= budget
    if not fits[: len(layers)].all():
        raise ValueError(f"a share of {size} of the weights does not hold one component of each layer")
    kept = torch.zeros(len(cost), dtype=torch.bool).index_copy(0, order, fits).split([part.rank for part in layers.values()])
    return {path: mask.to(layers[path].left.device) for path, mask in zip(layers, kept, strict=True)}


def burn_in(model: nn.Module, size: float | None = None) -> None:
    """Smaller plain factors in the place of gated ones, with the gates multiplied in: what `Trial.finish` takes. In place.

    See `kept_components` for `size`, and for the ValueError.
    """
    for path, kept in kept_components(model, size).items():
        model.set_submodule(path, shrunk(model.get_submodule(path), kept))


@torch.no_grad()
def gate_report(model: nn.Module, size: float | None = None) -> dict[str, float]:
    """What the gates did.

    The expected `sparsity`; the share of gates that are `undecided` in a sample, neither 0 nor 1; `reordered`, the share of the
    kept components that a truncated SVD of the same rank would not keep, beside what it is for components `by_lot`;
    `smallest` and `largest`, the weights that a layer keeps over those of its matrix.
    """
    layers, kept = gated(model), kept_components(model, size)
    undecided = torch.cat([open_probability(part.log_alpha) - one_probability(part.log_alpha) for part in layers.values()])
    beyond = sum(int(mask[int(mask.sum()) :].sum()) for mask in kept.values())
    shares = [int(kept[path].sum()) * (part.in_features + part.out_features) / (part.in_features * part.out_features)
              for path, part in layers.items()]  # fmt: skip
    return {"sparsity": sparsity(model).item(), "undecided": undecided.mean().item(),
            "reordered": beyond / sum(int(mask.sum()) for mask in kept.values()), "by_lot": reordered_by_lot(kept),
            "smallest": min(shares), "largest": max(shares)}  # fmt: skip


def reordered_by_lot(kept: dict[str, torch.Tensor]) -> float:
    """`reordered` of components that are drawn by lot at these ranks, in the mean: where k of R stay, each of the k lies beyond
    the first k with probability 1 - k / R.
    """
    ranks = [(int(mask.sum()), len(mask)) for mask in kept.values()]
    return sum(k * (1 - k / R) for k, R in ranks) / sum(k for k, _ in ranks)


def lot_factors(family: Family, rank: int, generator: torch.Generator) -> Factors:
    """Of the components that `gate_layers` begins with, those of the SVD up to the break-even rank, `rank` drawn by lot."""
    W = torch.cat(family.weights)
    drawn = torch.randperm(int(break_even_rank(*W.shape)), generator=generator)[:rank].to(W.device)
    U = leading_directions(W)[0].to(W)[:, drawn]
    return list(U.split([len(one) for one in family.weights])), U.T @ W


def lot_start(model: nn.Module, plan: Plan, seed: int = 0) -> dict[str, float]:
    """Control of T-05's choice: as many components of each matrix as the gates left, which ones is drawn by lot. In place.

    Returns what was `kept` of each matrix. Raises ValueError for a rank that is not there.
    """
    generator = torch.Generator().manual_seed(seed)
    return factorise(model, plan, lambda family, rank: lot_factors(family, rank, generator))


def learned_plan(model: nn.Module, size: float | None = None) -> Plan:
    """The ranks that the gates leave, as a plan for other methods: what learned ranks are worth without their training."""
    return {(f"{path}.weight",): int(kept.sum()) for path, kept in kept_components(model, size).items()}
