"""What a method of distillation is: a loss over (student outputs, teacher outputs, batch); and the one loop that trains.

Objectives add and multiply: `0.9 * soft_targets(2.0) + 0.1 * labels()`. An objective says what it reads of student and teacher
(`utils.distillation.outputs`), and carries the projection that trains beside the student, where it needs one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from utils.distillation.outputs import Need, Outputs, Teacher, capture, check_supply, size_of
from utils.training import Loss, TrainingLog
from utils.trials import Trial

Criterion = Callable[[Outputs, Outputs, dict], torch.Tensor]
LayerMap = dict[int, int]  # student layer -> teacher layer; 0 is the embedding block


@dataclass(frozen=True)
class Objective:
    """A loss over (student outputs, teacher outputs, batch), what it reads of each, and the modules that train with it."""

    loss: Criterion
    student: tuple[Need, ...] = ()
    teacher: tuple[Need, ...] = ()
    modules: tuple[nn.Module, ...] = ()

    def __add__(self, other: "Objective") -> "Objective":
        def both(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
            return self.loss(student, teacher, batch) + other.loss(student, teacher, batch)

        return Objective(both, self.student + other.student, self.teacher + other.teacher, self.modules + other.modules)

    def __rmul__(self, weight: float) -> "Objective":
        check_weight(weight)

        def scaled(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
            return weight * self.loss(student, teacher, batch)

        return Objective(scaled, self.student, self.teacher, self.modules)


def check_weight(weight: float, what: str = "the weight of a loss") -> None:
    """Raise ValueError unless a weight (or what else is named) is a finite number of at least 0."""
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{what} must be finite and at least 0, got {weight}")


def check_share(share: float, what: str) -> None:
    """Raise ValueError unless a share lies in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"{what} must lie in [0, 1], got {share}")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")


# --- which layer learns from which ----------------------------------------------------------------------------------


def layer_map(kind: str, student_layers: int, teacher_layers: int) -> LayerMap:
    """The teacher layer of each student layer 1..S, of T teacher layers.

    `first`: i; `last`: T - S + i; `skip`: i * floor(T / S), every k-th layer (PKD); `uniform`: i * T / S rounded, the ends of
    equal blocks (TinyBERT). The last two are one map where S divides T. Raises ValueError for another kind, or S outside 1..T.
    """
    S, T = student_layers, teacher_layers
    if not 1 <= S <= T:
        raise ValueError(f"a student of a teacher with {T} layers has 1..{T} of them, got {S}")
    maps = {"first": lambda i: i, "last": lambda i: T - S + i, "skip": lambda i: i * (T // S),
            "uniform": lambda i: math.floor(i * T / S + 0.5)}  # fmt: skip
    if kind not in maps:
        raise ValueError(f"unknown layer map {kind!r}: choose from {', '.join(maps)}")
    return {i: maps[kind](i) for i in range(1, S + 1)}


def projector(student_size: int, teacher_size: int) -> nn.Linear:
    """W_d, the learned map from the student's hidden size to the teacher's: at first the identity, or as near as it comes."""
    linear = nn.Linear(student_size, teacher_size, bias=False)
    if student_size == teacher_size:
        nn.init.eye_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight)
    return linear


def project(state: torch.Tensor, projection: nn.Module | None, teacher_state: torch.Tensor) -> torch.Tensor:
    """The student's state in the teacher's width, (..., teacher size), float32. Raises ValueError where the widths differ."""
    projected = (state if projection is None else projection(state)).float()
    if projected.shape[-1] != teacher_state.shape[-1]:
        raise ValueError(f"the student's states are {projected.shape[-1]} wide, the teacher's {teacher_state.shape[-1]}: "
                         f"give projection=projector({state.shape[-1]}, {teacher_state.shape[-1]})")  # fmt: skip
    return projected


# --- the loop -------------------------------------------------------------------------------------------------------


def as_loss(objective: Objective, teacher: Teacher) -> Loss:
    """The objective as a loss for `utils.training.train`. Raises ValueError where the teacher lacks what it reads."""
    check_supply(teacher, objective.teacher)

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return objective.loss(capture(model, batch, objective.student), teacher(batch), batch)

    return loss


def check_size(student: nn.Module, teacher: Teacher) -> None:
    """Raise ValueError for a student that is larger than its teacher: nothing would be compressed."""
    mine, given = size_of(student).parameters, teacher.size.parameters
    if mine > given:
        raise ValueError(f"the student has {mine:,} parameters, its teacher {given:,}: a student is no larger than its teacher")


def distill(
    trial: Trial, objective: Objective, teacher: Teacher, *, projection_learning_rate: float = 1e-3, **options
) -> TrainingLog:
    """Train a trial's model with an objective; options (steps, learning_rate, ...) go to `trial.recover`.

    The projections of the objective train with a rate of their own, for they start from nothing, and stay out of the model.
    Raises ValueError for a student larger than its teacher, and where the teacher lacks what the objective reads.
    """
    check_size(trial.model, teacher)
    device = next(trial.model.parameters()).device
    extra = [p for module in objective.modules for p in module.to(device).parameters() if p.requires_grad]
    groups = [{"params": [p for p in trial.model.parameters() if p.requires_grad]}]
    groups += [{"params": list(dict.fromkeys(extra)), "lr": projection_learning_rate}] if extra else []
    return trial.recover(loss=as_loss(objective, teacher), parameters=groups, **options)


def in_stages(trial: Trial, stages: list[tuple[Objective, int]], teacher: Teacher, **options) -> list[TrainingLog]:
    """Train with one objective after another, each for its number of steps, each with warm-up and decay of its own.

    FitNets (hints, then soft targets) and TinyBERT (layers, then predictions) do so.
    """
    return [distill(trial, objective, teacher, steps=steps, **options) for objective, steps in stages if steps]
