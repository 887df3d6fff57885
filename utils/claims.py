"""Statements of the surveys, tested: an effect with its interval, judged against what the statement predicts.

The unit decides what the interval means. A claim that compares trainings repeats them over seeds; a claim about one fixed
model repeats over examples; a timing repeats over rounds; arithmetic needs no repetition. Nothing is ever forced: an
interval that straddles the threshold leaves the claim `inconclusive`.
"""

import math
import textwrap
from dataclasses import asdict, dataclass

from utils.metrics import Estimate

UNITS = ("seed", "example", "round", "arithmetic", "model")
VERDICTS = ("supported", "contradicted", "depends", "inconclusive", "not tested as stated", "not tested")
MINIMUM_SEEDS = 3
FEW_SEEDS = f"(a comparison of trainings takes {MINIMUM_SEEDS} seeds or more: the profile `full` judges it)"


@dataclass(frozen=True)
class Evidence:
    """One measured effect and the prediction it tests: `effect` should lie `above` or `below` the `threshold`."""

    what: str
    effect: Estimate
    expected: str  # "above" or "below"
    threshold: float = 0.0

    def verdict(self) -> str:
        """`supported` if the whole interval lies on the predicted side, `contradicted` if on the other."""
        if self.expected not in ("above", "below"):
            raise ValueError(f"expected must be 'above' or 'below', got {self.expected!r}")
        low, high = self.effect.low - self.threshold, self.effect.high - self.threshold
        if self.expected == "below":
            low, high = -high, -low
        if math.isnan(low) or math.isnan(high):
            return "inconclusive"
        return "supported" if low > 0 else "contradicted" if high < 0 else "inconclusive"

    def measured(self) -> str:
        """The effect with its interval and the smallest difference that this can show; without one where it is exact or was seen once."""
        visible = (self.effect.high - self.effect.low) / 2
        if visible == 0:
            return f"{self.effect.value:.4g} (exact)"
        if not math.isfinite(visible):
            return f"{self.effect.value:.4g} (n = {self.effect.n}: no interval)"
        return f"{self.effect} (n = {self.effect.n}, shows differences from {visible:.2g})"

    def report(self) -> str:
        """Effect, interval, expectation and verdict in lines of at most 110 columns."""
        text = f"{self.what}: {self.measured()}; expected {self.expected} {self.threshold:g}: {self.verdict()}"
        return "\n      ".join(textwrap.wrap(text, 110))


@dataclass(frozen=True)
class Claim:
    """A statement, where it comes from, the unit of repetition, and the evidence for and against it.

    `machine` names the processor behind a claim about time, whose verdict holds for that machine alone. `departs` says how the
    test differs from what the source speaks of; `depends_on` says what the pieces of evidence vary.
    """

    id: str
    statement: str
    source: str
    unit: str
    evidence: list[Evidence]
    verdict: str
    section: str = ""
    machine: str | None = None
    departs: str | None = None
    depends_on: str | None = None

    def as_dict(self) -> dict:
        """JSON form; an infinite bound becomes null."""
        content = asdict(self)
        for item, evidence in zip(content["evidence"], self.evidence, strict=True):
            bounds = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in item["effect"].items()}
            item["effect"] = {k: round(v, 6) if isinstance(v, float) else v for k, v in bounds.items()}
            item["verdict"] = evidence.verdict()
        return content

    @classmethod
    def from_dict(cls, content: dict) -> "Claim":
        """The inverse of `as_dict`: evidence read back, so that its verdict can be judged again."""
        evidence = []
        for item in content["evidence"]:
            effect = dict(item["effect"])
            low, high = effect.pop("low"), effect.pop("high")
            estimate = Estimate(low=-math.inf if low is None else low, high=math.inf if high is None else high, **effect)
            evidence.append(Evidence(item["what"], estimate, item["expected"], item["threshold"]))
        return cls(**{**content, "evidence": evidence})

    def report(self) -> str:
        """The verdict with every effect, its interval and the smallest difference that it could have shown, a line each."""
        where = f" · on {self.machine}" if self.machine else ""
        as_tested = f"(as tested here, which departs from the source: {self.departs})"
        lines = [f"{self.id} · {self.verdict.upper()}{where} · unit: {self.unit}", *(textwrap.wrap(as_tested, 110) if self.departs else []),
                 *textwrap.wrap(f"“{self.statement}”", 110), f"({self.source})"]  # fmt: skip
        lines += textwrap.wrap(f"what the evidence varies: {self.depends_on}", 110) if self.depends_on else []
        lines += [FEW_SEEDS] if self.unit == "seed" and few_seeds(self.evidence) else []
        return "\n".join([*lines, *(f"  - {item.report()}" for item in self.evidence)])


def judge(
    id: str,
    statement: str,
    source: str,
    unit: str,
    evidence: list[Evidence],
    profile: str,
    section: str = "",
    machine: str | None = None,
    departs: str | None = None,
    depends_on: str | None = None,
) -> Claim:
    """Weigh the evidence: all supported makes `supported`, any contradicted makes `contradicted`, else `inconclusive`.

    Where the evidence varies a condition (`depends_on`), one supported and one contradicted piece make `depends`. Where the test
    departs from what the source speaks of (`departs`), whatever is not supported is `not tested as stated`, and what is supported is so
    as tested here: the report says it right under the verdict. In the `smoke` profile nothing is judged, and neither is a claim over
    fewer than three seeds. Raises ValueError for an unknown unit or a claim without evidence. The `machine` is kept where the unit is
    the round of a timing.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if not evidence:
        raise ValueError(f"claim {id} has no evidence")
    if profile == "smoke" or (unit == "seed" and few_seeds(evidence)):
        verdict = "not tested"
    else:
        verdict = weigh([item.verdict() for item in evidence], depends_on is not None)
        verdict = "not tested as stated" if departs and verdict != "supported" else verdict
    return Claim(
        id, statement, source, unit, evidence, verdict, section, machine if unit == "round" else None, departs, depends_on
    )


def weigh(verdicts: list[str], conditional: bool = False) -> str:
    """One verdict for several pieces of evidence; those that vary a condition may disagree."""
    if "contradicted" in verdicts:
        return "depends" if conditional and "supported" in verdicts else "contradicted"
    return "supported" if set(verdicts) == {"supported"} else "inconclusive"


def few_seeds(evidence: list[Evidence]) -> bool:
    """Whether some effect was measured with fewer seeds than a comparison of trainings takes."""
    return min(item.effect.n for item in evidence) < MINIMUM_SEEDS


def exact(value: float) -> Estimate:
    """An estimate without uncertainty, for arithmetic and file sizes."""
    return Estimate(float(value), float(value), float(value), 1)
