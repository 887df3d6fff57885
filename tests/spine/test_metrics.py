"""Intervals and loyalties against independent computations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from utils import metrics
from utils.claims import Evidence, exact, judge
from utils.metrics import Estimate


def logits_of(right: list[bool], labels: torch.Tensor) -> torch.Tensor:
    predicted = torch.where(torch.tensor(right), labels, 1 - labels)
    return torch.nn.functional.one_hot(predicted, 2).float()


def test_accuracy_interval_is_wilsons_closed_form():
    labels = torch.zeros(50, dtype=torch.long)
    found = metrics.accuracy(logits_of([True] * 40 + [False] * 10, labels), labels)
    p, n, z = 0.8, 50, 1.959963984540054
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (found.value, found.low, found.high) == pytest.approx((p, centre - half, centre + half))


def test_paired_interval_agrees_with_the_bootstrap():
    rng = np.random.default_rng(0)
    labels = torch.zeros(1000, dtype=torch.long)
    first, second = rng.random(1000) < 0.85, rng.random(1000) < 0.8
    found = metrics.paired_difference(logits_of(first.tolist(), labels), logits_of(second.tolist(), labels), labels)
    differences = first.astype(float) - second.astype(float)
    boot = stats.bootstrap((differences,), np.mean, n_resamples=2000, random_state=0, method="basic").confidence_interval
    assert found.value == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((boot.low, boot.high), abs=0.004)


def test_paired_interval_of_equal_models_contains_zero():
    labels = torch.randint(0, 2, (100,))
    same = logits_of([True] * 60 + [False] * 40, labels)
    found = metrics.paired_difference(same, same, labels)
    assert found.value == 0 and found.low < 0 < found.high


def test_mean_difference_is_students_interval_and_one_seed_has_none():
    values = [0.01, 0.03, 0.02, 0.05]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = metrics.mean_difference(values)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert metrics.mean_difference([0.1]).low == -math.inf


def test_median_interval_covers_at_its_nominal_rate():
    rng = np.random.default_rng(0)
    hits = [f.low <= 0 <= f.high for f in (metrics.median_interval(rng.standard_normal(15).tolist()) for _ in range(1000))]
    assert np.mean(hits) >= 0.94


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(2, 5), st.integers(0, 10_000))
def test_loyalty_is_one_with_itself_and_bounded(n, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (5 * torch.randn(n, classes, generator=generator) for _ in range(2))
    assert metrics.label_loyalty(teacher, teacher) == 1
    assert metrics.probability_loyalty(teacher, teacher) == pytest.approx(1, abs=1e-6)
    assert 0 <= metrics.probability_loyalty(teacher, student) <= 1


def test_probability_loyalty_by_hand_and_its_range():
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    a, b = np.array([0.5, 0.5]), np.array([0.75, 0.25])
    middle = (a + b) / 2
    divergence = 0.5 * (a * np.log2(a / middle)).sum() + 0.5 * (b * np.log2(b / middle)).sum()
    assert metrics.probability_loyalty(p, q) == pytest.approx(1 - math.sqrt(divergence))
    apart = metrics.probability_loyalty(torch.tensor([[100.0, -100.0]]), torch.tensor([[-100.0, 100.0]]))
    assert apart == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [(0.1, 0.2, "above", "supported"), (-0.2, -0.1, "above", "contradicted"), (-0.1, 0.1, "above", "inconclusive"),
     (-0.2, -0.1, "below", "supported"), (0.1, 0.2, "below", "contradicted"), (math.nan, 0.1, "above", "inconclusive")],
)  # fmt: skip
def test_evidence_is_judged_by_its_whole_interval(low, high, expected, verdict):
    assert Evidence("x", Estimate(0, low, high, 5), expected).verdict() == verdict


def test_claims_need_three_seeds_and_are_not_tested_in_smoke():
    clear = Evidence("x", Estimate(1, 0.5, 1.5, 2), "above")
    assert judge("C", "s", "here", "seed", [clear], "cpu").verdict == "not tested"
    assert judge("C", "s", "here", "example", [clear], "cpu").verdict == "supported"
    assert judge("C", "s", "here", "example", [clear], "smoke").verdict == "not tested"
    mixed = [clear, Evidence("y", exact(-1), "above")]
    assert judge("C", "s", "here", "example", mixed, "cpu").verdict == "contradicted"


def test_claims_reject_unknown_units_and_missing_evidence():
    with pytest.raises(ValueError, match="unit must be one of"):
        judge("C", "s", "here", "feeling", [Evidence("x", exact(1), "above")], "cpu")
    with pytest.raises(ValueError, match="no evidence"):
        judge("C", "s", "here", "seed", [], "cpu")
    with pytest.raises(ValueError, match="'above' or 'below'"):
        Evidence("x", exact(1), "sideways").verdict()


def test_evidence_that_varies_a_condition_may_disagree_and_a_departure_contradicts_nobody():
    one, other = Evidence("2 bits", Estimate(1, 0.5, 1.5, 5), "above"), Evidence("8 bits", Estimate(-1, -1.5, -0.5, 5), "above")
    assert judge("C", "s", "here", "seed", [one, other], "full", depends_on="bits").verdict == "depends"
    assert judge("C", "s", "here", "seed", [other, other], "full", depends_on="bits").verdict == "contradicted"
    assert judge("C", "s", "here", "seed", [other], "full", departs="no GPU").verdict == "not tested as stated"
    supported = judge("C", "s", "here", "seed", [one], "full", departs="no GPU")
    assert supported.verdict == "supported"
    assert supported.report().splitlines()[1] == "(as tested here, which departs from the source: no GPU)"


def test_a_claim_over_few_seeds_says_who_judges_it():
    few = judge("C", "s", "here", "seed", [Evidence("x", Estimate(1, -math.inf, math.inf, 1), "above")], "cpu")
    assert few.verdict == "not tested" and "profile `full`" in few.report()
