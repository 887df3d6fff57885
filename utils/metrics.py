"""Accuracy, drop and loyalty, each with what its uncertainty allows one to say."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon

CONFIDENCE = 0.95
Z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval and the number of units (examples, seeds, rounds) behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> Estimate:
    """Share of right predictions with Wilson's interval. `logits` (examples, classes), `labels` (examples,)."""
    right = int((logits.argmax(-1) == labels).sum())
    interval = stats.binomtest(right, len(labels)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(right / len(labels), interval.low, interval.high, len(labels))


def paired_difference(first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor) -> Estimate:
    """Accuracy of `first` minus accuracy of `second` on the same examples, with Bonett and Price's paired interval.

    Only the examples on which exactly one of them is right carry information, so the interval is far narrower than that
    of two separate accuracies. The interval is centred on the add-one estimate and so need not be symmetric.
    """
    first_right, second_right = first.argmax(-1) == labels, second.argmax(-1) == labels
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    n = len(labels)
    won, lost = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = Z * np.sqrt((won + lost - (won - lost) ** 2) / (n + 2))
    return Estimate((only_first - only_second) / n, max(-1.0, won - lost - half), min(1.0, won - lost + half), n)


def mean_difference(differences: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of paired differences over seeds with Student's interval; one seed has no interval (it is infinite)."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return Estimate(float(values.mean()), -np.inf, np.inf, len(values))
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half), len(values))


def median_interval(values: list[float]) -> Estimate:
    """Median of repeated timings with the 95 % interval that order statistics give; below six values, their range."""
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    rank = max(1, int(stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)))
    return Estimate(float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[n - rank]), n)


def label_loyalty(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Share of examples on which the compressed model predicts what the original predicts, right or wrong."""
    return float((teacher.argmax(-1) == student.argmax(-1)).float().mean())


def probability_loyalty(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """1 - mean Jensen-Shannon distance (base 2) of the predicted distributions: 1 same, 0 disjoint.

    SciPy's `jensenshannon` already is the square root of the divergence; taking another root is a common slip.
    """
    p, q = (logits.double().softmax(-1).numpy() for logits in (teacher, student))
    with np.errstate(invalid="ignore"):  # rounding can make a zero divergence negative, whose root scipy warns of
        distance = np.nan_to_num(jensenshannon(p, q, base=2, axis=1))
    return float(1 - distance.mean())
