"""A trial: copy -> change -> recover -> finish, in one place for all chapters; and the same trial over several seeds.

A method changes a fresh copy of the baseline, the copy recovers by training, and what the training needed (masks, quantizers) is
burnt in. The trial remembers what that cost, how the tensors are to be stored, and in which context the model runs.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from utils.baseline import Phase
from utils.encodings import Encoded
from utils.metrics import Estimate, mean_difference
from utils.profiles import Profile
from utils.tasks import Task
from utils.training import TrainingLog, train

Change = Callable[[nn.Module], object]
Finish = Callable[[nn.Module], dict[str, Encoded] | None]
Within = Callable[[nn.Module], contextlib.AbstractContextManager]


def as_it_is(model: nn.Module) -> contextlib.AbstractContextManager:
    """The context of a model that needs none."""
    return contextlib.nullcontext()


@dataclass
class Trial:
    """One model on its way through a method. `within(model)` is the context in which it runs, in training and in measuring."""

    model: nn.Module
    task: Task
    profile: Profile
    seed: int = 0
    within: Within = as_it_is
    encoded: dict[str, Encoded] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    from_baseline: bool = True
    student: nn.Module | None = None  # the model as it was before its training: what a student's control starts from

    @property
    def steps(self) -> int:
        """Optimiser steps so far."""
        return sum(phase.steps for phase in self.phases)

    def recover(self, steps: int | None = None, seed: int | None = None, **options) -> TrainingLog:
        """Train on (by default the profile's recovery budget); options go to `training.train`. May be called several times."""
        steps = self.profile.recovery_steps if steps is None else steps
        rate = options.setdefault("learning_rate", self.profile.recovery_learning_rate)
        seed = self.seed if seed is None else seed
        with self.within(self.model):
            log = train(self.model, self.task, self.profile, steps=steps, seed=seed, **options)
        self.phases.append(Phase(steps, rate, options.get("train_embeddings", False), seed, options.get("hold", 0)))
        self.losses += log.losses
        self.seconds += log.seconds
        return log

    def finish(self, finish: Finish) -> "Trial":
        """Burn in what only the training needed; encodings that `finish(model)` returns are kept for the file."""
        self.encoded |= finish(self.model) or {}
        return self


def run(trial: Trial, change: Change | None = None, steps: int = 0, finish: Finish | None = None, **options) -> Trial:
    """Take a trial through its stations: `change(model)`, `steps` of recovery (none by default), `finish(model)`."""
    if change is not None:
        change(trial.model)
    if steps:
        trial.recover(steps, **options)
    return trial if finish is None else trial.finish(finish)


@dataclass(frozen=True)
class Seeds:
    """Validation accuracies in percent of several ways, each with the same seeds, so that differences are paired."""

    accuracies: dict[str, np.ndarray]  # (seeds,) each

    def __getitem__(self, name: str) -> np.ndarray:
        return self.accuracies[name]

    def only(self, *names: str) -> "Seeds":
        """Those of the named ways that were run: the arms of one claim."""
        return Seeds({name: self.accuracies[name] for name in names if name in self.accuracies})

    def mean(self, name: str) -> float:
        """Mean accuracy over the seeds."""
        return float(self.accuracies[name].mean())

    def difference(self, first: str, second: str) -> Estimate:
        """Accuracy of the first minus that of the second in points, over seeds (Student's interval)."""
        return mean_difference(self.accuracies[first] - self.accuracies[second])


def over_seeds(runs: dict[str, Callable[[int], object]], seeds: Iterable[int], percent: Callable[[object], float]) -> Seeds:
    """Run every way with every seed; `percent` turns what a run returns (a trial, a model, logits) into an accuracy."""
    found = {name: [] for name in runs}
    for seed in seeds:
        for name, one in runs.items():
            found[name].append(percent(one(seed)))
    return Seeds({name: np.array(values) for name, values in found.items()})


def model_of(result: "Trial | nn.Module") -> tuple[nn.Module, Within]:
    """A model and the context in which it runs."""
    return (result.model, result.within) if isinstance(result, Trial) else (result, as_it_is)


def same_training(trial: "Trial | nn.Module") -> tuple[Phase, ...]:
    """The phases of training that a control must have had; none where there is no control: a model that came without a trial, or
    a trial that started neither from the baseline nor as a student."""
    if not isinstance(trial, Trial) or not (trial.from_baseline or trial.student is not None):
        return ()
    return tuple(phase for phase in trial.phases if phase.steps)
