"""The board: opens a chapter, puts compressed models on it with one ruler, judges claims, and writes the results file.

A chapter's notebook opens a board, takes trials from it (fresh copies of the baseline that a method changes), and puts each
back to be measured. Every result is one row. A row is refused when the method changed nothing, when a number is not finite, or
when the artifact on disk does not give back the measured model. Rows are on disk as they come.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import random
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas
import torch
from torch import nn

from utils import (
    CompanionError,
    artifacts,
    bert,
    cache,
    catalogue,
    checkpoints,
    contract,
    costs,
    metrics,
    parts,
    profiles,
    results,
    tasks,
    training,
    trials,
)
from utils.baseline import Baseline, dense_control, fine_tuned, label_control
from utils.claims import Claim, Evidence, judge
from utils.encodings import Encoded
from utils.results import Row
from utils.trials import Seeds, Trial, Within

RELOAD_TOLERANCE = 1e-4  # largest logit difference between a measured model and its reloaded artifact, float32
BASELINE = "baseline"
OPENING = "opening"
Acted = tuple[float, float | None, float | None]  # a mechanism number, at least, at most
NEAR = 5  # points above the share of the most frequent label; a training that ends below has hardly begun to learn the task
TIMING = ("latency_ratio", "latency_ratio_interval", "latency_ms")


class RowRefused(CompanionError):
    """The result is not fit for the board: nothing changed, a number is not finite, or the artifact disagrees."""


@dataclass
class Board:
    """One chapter's measurements. Open it with `Board.open`."""

    chapter: str
    profile: profiles.Profile
    task: tasks.Task
    baseline: Baseline
    seed: int
    device: torch.device
    model_name: str
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    baseline_row: Row | None = None
    section_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(
        cls, chapter: str, profile: str = "cpu", model: str = "embedded", dataset: str = "rotten_tomatoes",
        seed: int = 0, device: str = "auto", documents: bool = False,
    ) -> "Board":  # fmt: skip
        """Load model and data, fetch or train the baseline, and start the clock and the energy estimate.

        `documents` takes the profile's sizes for texts of hundreds of tokens.

        Lengths end where the model's positions do. Raises CompanionError for an unknown profile, model, data set or device, and for
        a baseline that learned nothing.
        """
        wanted, where = profiles.get(profile, documents), profiles.pick_device(device, profile)
        torch.set_float32_matmul_precision("highest")
        tokenizer = bert.load_tokenizer(model)
        positions = checkpoints.read_config(Path(bert.resolve(model))).max_position_embeddings
        sizes = within_positions(wanted, positions)
        task = tasks.load(dataset, tokenizer, sizes)
        board = cls(chapter, sizes, task, fine_tuned(model, task, sizes, seed, where), seed, where, model)
        board._energy = costs.EnergyMeter()
        ones = {f"batch{batch}": 1.0 for batch in sizes.latency_batches}
        as_dense = {"latency_ratio": ones, "latency_ratio_interval": None, "latency_ms": None}
        board._logits, board._timed = {}, {costs.structure(board.dense): (BASELINE, as_dense)}
        board._since = time.perf_counter()
        board._section = OPENING
        board._read_journal()
        board._seed()
        board.baseline_row = board._measure_baseline()
        print(board.greeting())
        ends = [f"the model has {positions} positions: no text of this run has more tokens"] if sizes != wanted else []
        for note in (*ends, *task.notes, *board.baseline.notes):
            print(f"note: {note}")
        return board

    def greeting(self) -> str:
        """What this board measures, in two lines."""
        row, origin = self.baseline_row, "from the cache" if self.baseline.from_cache else "fine-tuned now"
        return (f"{self.chapter} · profile {self.profile.name} · {self.device} · {len(self.task.train)} training and "
                f"{len(self.task.validation)} validation texts\nbaseline ({origin}): accuracy {row.accuracy:.4f}, "
                f"{row.parameters / 1e6:.1f} M parameters, {row.stored_bytes / 1e6:.1f} MB")  # fmt: skip

    # --- sections ---------------------------------------------------------------------------------------------------

    def section(self, name: str) -> None:
        """Begin a section: everything random starts anew, so that it gives the same numbers alone and inside the chapter."""
        self._end_section()
        self._section = name
        self._seed()
        self._write_journal()  # the seconds of the section that ended must survive an interruption, too
        report_progress(f"section {name}")

    def _end_section(self) -> None:
        now = time.perf_counter()
        self.section_seconds[self._section] = round(self.section_seconds.get(self._section, 0.0) + now - self._since, 1)
        self._since = now

    def _seed(self) -> None:
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    @contextlib.contextmanager
    def attempt(self, method: str) -> Iterator[None]:
        """An error inside costs this method alone: it is named at the end, and fails the run then."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self.failures.append({"method": method, "section": self._section, "error": reason})
            self._write_journal()
            print(f"{method} FAILED: {reason}", file=sys.stderr)

    # --- models -----------------------------------------------------------------------------------------------------

    @property
    def dense(self) -> nn.Module:
        """The baseline itself: look, never change."""
        return self.baseline.model

    def fresh(self) -> nn.Module:
        """An independent copy of the baseline."""
        return bert.fresh_copy(self.dense)

    def trial(
        self, change: trials.Change | None = None, *, steps: int = 0, finish: trials.Finish | None = None,
        within: Within | None = None, seed: int | None = None, start: nn.Module | None = None,
        student: nn.Module | None = None, **options,
    ) -> Trial:  # fmt: skip
        """Copy -> change -> recover -> finish (`utils.trials`); options go to `train`.

        `start` is copied in place of the baseline. A `student` is, too, and its rows are held against the same student after the
        same training on labels alone.
        """
        copied = next(model for model in (student, start, self.dense) if model is not None)
        trial = Trial(
            bert.fresh_copy(copied), self.task, self.profile, self.seed if seed is None else seed, within or trials.as_it_is
        )
        trial.from_baseline, trial.student = copied is self.dense, student
        return trials.run(trial, change, steps, finish, **options)

    def over_seeds(self, runs: dict[str, Callable[[int], object]], rows: dict[str, str] | None = None) -> Seeds:
        """Run every way with every seed of the profile; each run returns a trial, a model or logits.

        `rows` names the row that a way's run with the board's own seed would only repeat: where it stands on the board, it is read, and
        nothing is trained twice.
        """
        rows = rows or {}

        def found(name: str, one: Callable[[int], object], seed: int) -> object:
            known = self._logits.get(rows.get(name)) if seed == self.seed else None
            return one(seed) if known is None else known

        return trials.over_seeds(
            {name: functools.partial(found, name, one) for name, one in runs.items()}, self.seeds, self.percent
        )

    def calibration(self, seed: int = 0) -> list[dict]:
        """Batches of training sentences for scoring weights; the same for every method."""
        return training.calibration_batches(self.task, self.profile, self.device, seed)

    @property
    def steps(self) -> int:
        """The recovery budget."""
        return self.profile.recovery_steps

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of claims that compare trainings."""
        return self.profile.seeds

    def sized(self, usual: object, *, smoke: object) -> object:
        """`smoke` in the smoke profile, else the usual value: for grids and counts that would only take time there."""
        return smoke if self.profile.name == "smoke" else usual

    # --- looking ----------------------------------------------------------------------------------------------------

    def predict(self, result: Trial | nn.Module, split: tasks.Split | None = None) -> torch.Tensor:
        """Validation logits (or those of another split), shape (examples, classes), in the context in which the model runs."""
        model, within = trials.model_of(result)
        with within(model):
            return training.predict(model, split or self.task.validation, self.task.tokenizer.pad_token_id)

    def logits(self, result: Trial | nn.Module | torch.Tensor) -> torch.Tensor:
        """Validation logits of whatever comes: logits stay as they are."""
        return result if isinstance(result, torch.Tensor) else self.predict(result)

    def percent(self, result: Trial | nn.Module | torch.Tensor) -> float:
        """Validation accuracy in percent."""
        return percent_right(self.logits(result), self.task.validation.labels)

    def points(
        self,
        first: Trial | nn.Module | torch.Tensor,
        second: Trial | nn.Module | torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> metrics.Estimate:
        """Accuracy of the first minus that of the second, in percentage points, paired over the validation examples.

        Logits of other sentences come with the `labels` of those (examples,).
        """
        labels = self.task.validation.labels if labels is None else labels
        found = metrics.paired_difference(self.logits(first), self.logits(second), labels)
        return metrics.Estimate(100 * found.value, 100 * found.low, 100 * found.high, found.n)

    @property
    def selection(self) -> tasks.Split:
        """Training sentences that nobody trains on: every choice is made on them, and curves with many evaluations use them."""
        return self.task.selection

    def selection_loss(self, result: Trial | nn.Module) -> float:
        """Mean cross-entropy in nats on the selection sentences: what choices are made by, because it is finer than accuracy."""
        return nn.functional.cross_entropy(self.predict(result, self.selection), self.selection.labels).item()

    def selection_accuracy(self, result: Trial | nn.Module) -> float:
        """Accuracy in percent on the selection sentences."""
        return percent_right(self.predict(result, self.selection), self.selection.labels)

    @property
    def selection_error(self) -> float:
        """One standard error of a selection accuracy near one half, in points: the most that it can be."""
        return 100 * (0.25 / len(self.selection)) ** 0.5

    def find(self, label: str) -> Row:
        """The row of that label. Raises CompanionError where there is none."""
        found = [row for row in self.rows if row.label == label]
        if not found:
            raise CompanionError(f"no row is called {label!r} yet")
        return found[-1]

    @property
    def texts(self) -> str:
        """What the texts of this task are called: sentences, or where they are long just texts."""
        return "sentences" if self.profile.max_length <= profiles.PROFILES["gpu"].max_length else "texts"

    @property
    def measured(self) -> set[str]:
        """The labels of the rows that this run measured itself: of an earlier run's there are no answers to compare."""
        return set(self._logits)

    def difference(self, first: str, second: str) -> metrics.Estimate:
        """Accuracy of one row minus that of another in points, paired. Raises CompanionError for a row that this run did not measure."""
        for label in (first, second):
            if label not in self._logits:
                raise CompanionError(f"nothing to compare: no row {label!r} was measured in this run")
        return self.points(self._logits[first], self._logits[second])

    def compare(self, first: str, second: str) -> str:
        """A sentence: which of two rows is better, and by how much: the gain of the better one with its paired interval.

        Where no difference can be shown it is the gain of `first`.
        """
        gain = self.difference(first, second)
        if gain.low <= 0 <= gain.high:
            found = f"{gain.value:+.1f} points [{gain.low:+.1f}, {gain.high:+.1f}]"
            text = f"{first} and {second}: no difference that {gain.n} {self.texts} can show ({found})."
        else:
            better, worse = (first, second) if gain.value > 0 else (second, first)
            gain = self.difference(better, worse)  # the interval turns with the order
            text = f"{better} is {gain.value:.1f} points better than {worse} [{gain.low:+.1f}, {gain.high:+.1f}]."
        return textwrap.fill(text, results.COLUMNS)

    # --- timing -----------------------------------------------------------------------------------------------------

    def latency(self, result: Trial | nn.Module, batch: int, rounds: int | None = None) -> dict:
        """`ratio`, the speed against the baseline measured in turns with it, and the model's median `ms`."""
        model, within = trials.model_of(result)
        with within(model):
            found = self.race({"model": model}, batch, rounds or self.profile.latency_rounds, rest=0.0)
        return {"ratio": found["model"], "ms": found.ms["model"]}

    def race(self, models: dict[str, nn.Module], batch: int, rounds: int | None = None, rest: float = costs.REST) -> costs.Race:
        """Speed of several models or engines, all of them and the baseline in one interleaved run."""
        sizes = self.profile
        rounds = rounds or 3 * sizes.latency_rounds
        return costs.race(self.dense, models, batch, sizes.latency_seconds, rounds, sizes.latency_length, rest)

    # --- rows -------------------------------------------------------------------------------------------------------

    def put(
        self, result: Trial | nn.Module, method: str, label: str, *, control_of: str | None = None, simulated: bool = False,
        effect: dict | None = None, acted: dict[str, Acted] | None = None, latency: dict[str, costs.Race] | None = None,
        reads: int | None = None, **hyperparameters,
    ) -> Row:  # fmt: skip
        """Put a trial, a model or an engine on the board; returns its row.

        `method` is the catalogue id (`control` for a control run, whose `control_of` names the id). `simulated` says that speed is
        emulated: then none is claimed. `acted` proves that the method did what its name says: mechanism number -> (value, at
        least, at most), an open bound is None. `latency` holds races in which the model ran under this label (engines are timed
        so). `reads` is how many tokens of a text the model reads, where it cuts longer ones: its multiply-adds are those. Raises
        RowRefused.
        """
        report_progress(f"{method} {label}")
        fields = self._measure(result, label, simulated, latency, reads)
        hyperparameters |= {} if reads is None else {"reads": reads}
        trained = result.phases if isinstance(result, Trial) else []
        row = Row(
            method=method, label=label, control_of=control_of, seed=getattr(result, "seed", self.seed), section=self._section,
            hyperparameters={**hyperparameters, **describe_training(trained)}, simulated=simulated,
            train_seconds=round(getattr(result, "seconds", 0.0), 2), track=self._track(control_of or method),
            **{**fields, "effect": {**fields["effect"], **(effect or {}), **mechanism(acted or {})}},
        )  # fmt: skip
        self._refuse(row)
        self.rows = self._in_order([*self.rows, row])
        self._write_journal()
        print(row.summary())
        return row

    def _measure(
        self, result: Trial | nn.Module, label: str, simulated: bool, latency: dict[str, costs.Race] | None, reads: int | None
    ) -> dict:
        """All that is measured of a model, inside the context in which it runs."""
        model, within = trials.model_of(result)
        engine = hasattr(model, "stored")  # finished arithmetic around the baseline's weights: files of its own, no artifact
        with within(model):
            logits = training.predict(model, self.task.validation, self.task.tokenizer.pad_token_id)
            own = {**self._forward_costs(model, engine, reads), **self._latency(model, label, simulated, latency)}
        self._logits[label] = logits
        stored = model.stored() if engine else self._store(model, getattr(result, "encoded", {}), within)
        effect = (
            {"same_weights": False, "largest_logit_difference": self._moved(logits)} if engine else self._effect(model, logits)
        )
        return {**self._quality(logits), **costs.parameter_counts(self.dense if engine else model), **stored, **own,
                "against_control": self._against_control(result, logits), "effect": effect,
                "part_kinds": sorted({part.kind for part in parts.find(model).values()})}  # fmt: skip

    def claim(
        self, id: str, statement: str, source: str, unit: str, evidence: list[Evidence], *, departs: str | None = None,
        depends_on: str | None = None, arms: Seeds | None = None,
    ) -> Claim:  # fmt: skip
        """Judge a statement of a survey and keep the verdict (`utils.claims.judge`).

        `arms` are what the evidence compares over seeds: their accuracies are printed, and where some have hardly begun to learn, the
        verdict says so (`departs`).
        """
        if arms is not None:
            print(self.arms(arms))
            departs = "; ".join(filter(None, [departs, self._near_guessing(arms)])) or None
        conditions = {"departs": departs, "depends_on": depends_on}
        claim = judge(id, statement, source, unit, evidence, self.profile.name, self._section, self.machine, **conditions)
        self.claims = self._in_order([*self.claims, claim])
        self._write_journal()
        report_progress(f"claim {id}")
        print(claim.report())
        if claim.verdict == "not tested" and self.profile.name != "smoke":
            print(results.verdict_of_record(self.chapter, id))
        return claim

    def arms(self, found: Seeds) -> str:
        """What was compared over seeds: every way's accuracy, seed by seed, and which have hardly left guessing."""
        lines = [f"{name}: {found.mean(name):.1f} %" + (f" ({', '.join(f'{one:.1f}' for one in each)})" if len(each) > 1 else "")
                 for name, each in found.accuracies.items()]  # fmt: skip
        low = self._near_guessing(found)
        lines.append(f"always naming the most frequent label: {100 * self.task.majority_accuracy():.1f} %")
        lines += [f"{low}: a difference from these tells who leaves guessing first, not who learns more"] if low else []
        return "\n".join(textwrap.fill(line, results.COLUMNS, subsequent_indent="    ") for line in lines)

    def _near_guessing(self, found: Seeds) -> str:
        """Which ways end less than `NEAR` points above guessing, and with how many of the seeds; empty where none does."""
        floor = 100 * self.task.majority_accuracy() + NEAR
        low = {name: int((each < floor).sum()) for name, each in found.accuracies.items()}
        told = [f"{name} ({count} of {len(found[name])})" for name, count in low.items() if count]
        return f"less than {NEAR} points above the most frequent label: {', '.join(told)}" if told else ""

    @functools.cached_property
    def machine(self) -> str:
        """The processor (or GPU) that the times of this run hold for."""
        return results.machine_name(self._facts_of_machine)

    @functools.cached_property
    def _facts_of_machine(self) -> dict:
        return results.machine(self.device)

    def table(self, *methods: str) -> pandas.DataFrame:
        """The rows (of some methods and their controls), rounded for reading."""
        chosen = [row for row in self.rows if not methods or {row.method, row.control_of} & set(methods)]
        return results.as_frame(chosen, self.baseline_row)

    def verdicts(self) -> None:
        """Print all claims so far, each with its verdict and unit, folded: no statement is cut."""
        if not self.claims:
            print("No claim has been judged so far: on the track core a chapter judges few or none.")
        for claim in self.claims:
            line = f"{claim.id}, {claim.verdict}: {claim.statement} (unit: {claim.unit})"
            print(textwrap.fill(line, results.COLUMNS, subsequent_indent="    "))

    def close(self) -> Path:
        """Write `results/<profile>/<chapter>.json` under $COMPANION_OUT (default: runs/) and return its path.

        Raises CompanionError, after writing, where a method failed.
        """
        self._end_section()
        energy = self._energy.stop()
        watts, wall = energy["mean_watts_estimate"], round(sum(self.section_seconds.values()), 1)
        if watts is not None:
            energy["energy_kwh_estimate"] = watts * wall / 3.6e6  # of all sections: some may be an earlier run's
        for row in self.rows:
            row.train_energy_kwh_estimate = None if watts is None else round(row.train_seconds * watts / 3.6e6, 8)
        content = {
            "chapter": self.chapter, "profile": self.profile.name,
            "provenance": {**results.provenance(), "device": self.machine, "machine": self._facts_of_machine,
                           "precision": str(profiles.compute_dtype(self.device)), "seeds": list(self.seeds),
                           "code": os.environ.get("COMPANION_CODE"),
                           "parameters": {"MODEL": self.model_name, "DATASET": self.task.name, "SEED": self.seed,
                                          "DEVICE": self.device.type}, **energy},
            "baseline": self.baseline_row.as_dict(), **self._content(),
            "wall_seconds": wall,
        }  # fmt: skip
        path = results.path(os.environ.get("COMPANION_NAME") or self.chapter, self.profile.name)
        results.write(path, content)
        drew = (
            "energy not known"
            if watts is None
            else f"about {1e3 * energy['energy_kwh_estimate']:.1f} Wh (codecarbon's offline estimate)"
        )
        print(f"{len(self.rows)} rows and {len(self.claims)} claims in {content['wall_seconds']:.0f} s, {drew}")
        if self.failures:
            raise CompanionError("methods that failed: " + "; ".join(f"{f['method']} ({f['error']})" for f in self.failures))
        return path

    # --- the journal: rows on disk as they come ---------------------------------------------------------------------

    def _content(self) -> dict:
        return {"rows": [row.as_dict() for row in self.rows], "claims": [claim.as_dict() for claim in self.claims],
                "failures": self.failures, "section_seconds": self.section_seconds}  # fmt: skip

    def _in_order(self, found: list[Row] | list[Claim]) -> list:
        """Rows or claims in the order of the sections, whichever of these ran again."""
        order = json.loads(os.environ.get("COMPANION_SECTIONS") or "[]")
        return sorted(found, key=lambda one: order.index(one.section) if one.section in order else len(order))

    def _write_journal(self) -> None:
        journal = os.environ.get("COMPANION_JOURNAL")
        if journal:
            cache.write_atomically(Path(journal), json.dumps(self._content(), allow_nan=False) + "\n")

    def _read_journal(self) -> None:
        """After an interruption: take back what the finished sections had put on the board."""
        journal, finished = os.environ.get("COMPANION_JOURNAL"), json.loads(os.environ.get("COMPANION_FINISHED") or "[]")
        if not journal or not finished:
            return
        content = json.loads(Path(journal).read_text(encoding="utf-8"))
        self.rows = [Row.from_dict(row) for row in content["rows"] if row["section"] in finished]
        self.claims = [Claim.from_dict(claim) for claim in content["claims"] if claim["section"] in finished]
        self.failures = [failure for failure in content["failures"] if failure["section"] in finished]
        self.section_seconds = {name: s for name, s in content["section_seconds"].items() if name in finished}
        for row in self.rows:
            if row.latency_ratio and row.structure:
                self._timed[row.structure] = (row.latency_of or row.label, {name: getattr(row, name) for name in TIMING})

    # --- measuring --------------------------------------------------------------------------------------------------

    def _measure_baseline(self) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            stored = artifacts.save(self.dense, Path(folder) / "baseline.safetensors")
        return Row(method="-", label=BASELINE, seed=self.seed, **self._quality(self.baseline.logits),
                   **costs.parameter_counts(self.dense), **stored, **self._forward_costs(self.dense),
                   train_seconds=round(self.baseline.train_seconds, 2), structure=costs.structure(self.dense),
                   effect={"majority_accuracy": round(self.task.majority_accuracy(), 4)})  # fmt: skip

    def _quality(self, logits: torch.Tensor) -> dict:
        labels, teacher = self.task.validation.labels, self.baseline.logits
        right, drop = metrics.accuracy(logits, labels), metrics.paired_difference(teacher, logits, labels)
        loyalty = metrics.probability_loyalty(teacher, logits)
        return {"accuracy": round(right.value, 6), "accuracy_ci95": costs.as_row(right),
                "drop": round(drop.value, 6), "drop_ci95": costs.as_row(drop),
                "label_loyalty": round(metrics.label_loyalty(teacher, logits), 4),
                "probability_loyalty": round(loyalty, 4)}  # fmt: skip

    def _against_control(self, result: Trial | nn.Module, logits: torch.Tensor) -> dict | None:
        """Accuracy minus that of the control with the same training, paired: the dense model, or for a student the same student on
        labels alone; None where nothing was trained."""
        phases = trials.same_training(result)
        if not phases:
            return None
        if result.student is None:
            who, control = "dense", dense_control(self.baseline, phases, self.task, self.profile)
        else:
            key = bert.fingerprint(result.student)
            who, control = "student on labels", label_control(result.student, key, phases, self.task, self.profile)
        if torch.equal(control, logits):  # this is that control
            return None
        found = metrics.paired_difference(logits, control, self.task.validation.labels)
        return {"control": f"{who}, {', then '.join(in_turn(phases))}", "difference": round(found.value, 6),
                "ci95": costs.as_row(found)}  # fmt: skip

    def _forward_costs(self, model: nn.Module, engine: bool = False, reads: int | None = None) -> dict:
        length = self.profile.latency_length
        if engine:
            return {"macs": self.baseline_row.macs, "macs_length": length, "peak_memory_bytes": None}
        return {"macs": costs.macs(model, min(length, reads or length)), "macs_length": length,
                "peak_memory_bytes": costs.peak_memory(model, max(self.profile.latency_batches), length)}  # fmt: skip

    def _latency(self, model: nn.Module, label: str, simulated: bool, races: dict[str, costs.Race] | None) -> dict:
        """Speed at both batch sizes, measured once per structure: weights of other values take no other time."""
        if simulated:
            return {}
        structure = costs.structure(model)
        if races is None and structure in self._timed:
            of, timing = self._timed[structure]
            return {"structure": structure, "latency_of": of, **timing}
        found = races or {f"batch{batch}": self.race({label: model}, batch, self.profile.latency_rounds, 0.0)
                          for batch in self.profile.latency_batches}  # fmt: skip
        fields = {"latency_ratio": {name: round(race[label].value, 3) for name, race in found.items()},
                  "latency_ratio_interval": {name: costs.as_row(race[label], 3) for name, race in found.items()},
                  "latency_ms": {name: round(race.ms[label], 3) for name, race in found.items()}}  # fmt: skip
        if races is None:
            self._timed[structure] = (label, fields)
        return {"structure": structure, **fields}

    def _store(self, model: nn.Module, encoded: dict[str, Encoded], within: Within) -> dict:
        """Save, reload into a fresh model, and compare: the size that counts is that of a file that works."""
        with tempfile.TemporaryDirectory() as scratch:
            kept = os.environ.get("COMPANION_ARTIFACTS")  # the contract tests keep the files of a run, and load them elsewhere
            path = Path(kept or scratch) / f"{self.chapter}-{len(self.rows):03d}.safetensors"
            stored = artifacts.save(model, path, encoded)
            reloaded = artifacts.load(path).to(self.device)
            if kept:
                contract.write(path, model, self.profile.latency_length)
        rows = np.arange(min(16, len(self.task.validation)))
        inputs = training.to_device(tasks.collate(self.task.validation, rows, self.task.tokenizer.pad_token_id), self.device)
        found = []
        for candidate in (model.eval(), reloaded):
            with within(candidate), torch.inference_mode():
                found.append(candidate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits)
        difference = (found[0] - found[1]).abs().max().item()
        if not difference <= RELOAD_TOLERANCE:
            raise RowRefused(f"the reloaded artifact disagrees with the measured model: logits differ by {difference:.3g} "
                             f"(at most {RELOAD_TOLERANCE:g} is allowed)")  # fmt: skip
        return stored

    def _effect(self, model: nn.Module, logits: torch.Tensor) -> dict:
        before, after = self.dense.state_dict(), model.state_dict()
        same_shape = [name for name in after if name in before and after[name].shape == before[name].shape]
        touched = sum(int((after[name] != before[name]).sum()) for name in same_shape)
        return {"weights_touched": touched, "tensors_reshaped": len(after) - len(same_shape),
                "tensors_removed": len(before.keys() - after.keys()),
                "same_weights": touched == 0 and before.keys() == after.keys() and len(same_shape) == len(after),
                "largest_logit_difference": self._moved(logits)}  # fmt: skip

    def _moved(self, logits: torch.Tensor) -> float:
        return round(float((logits - self.baseline.logits).abs().max()), 6)

    def _track(self, method: str) -> str:
        return catalogue.tracks(self.chapter).get(method, "core")

    def _refuse(self, row: Row) -> None:
        if row.effect["same_weights"] and row.effect["largest_logit_difference"] == 0:
            raise RowRefused(f"{row.method} {row.label} changed nothing: all {row.parameters:,} weights equal the baseline's, "
                             f"and so do its logits on {len(self.task.validation)} validation texts")  # fmt: skip
        # The bounds are for the embedded model's sizes and texts; another model's are told, and the row stays.
        embedded = self.model_name == bert.EMBEDDED and self.task.name in tasks.EMBEDDED_TASKS
        for name, (low, high) in row.effect.get("bounds", {}).items():
            value = row.effect[name]
            if self.profile.name != "smoke" and not ((low is None or value >= low) and (high is None or value <= high)):
                acted = f"did not act as its name says: {name} is {value:g}, expected {in_words(low, high)}"
                if embedded:
                    raise RowRefused(f"{row.method} {row.label} {acted}")
                print(f"note: {row.method} {row.label} {acted}, as it is with the embedded model and data")
        bad = [name for name, value in flatten(row.as_dict()).items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise RowRefused(f"{row.method} {row.label} has numbers that are not finite: {', '.join(bad)}")


def mechanism(acted: dict[str, Acted]) -> dict:
    """Mechanism numbers for a row's effect, with the bounds that they must keep under `bounds`."""
    if not acted:
        return {}
    numbers = {name: round(float(value), 6) for name, (value, _, _) in acted.items()}
    return {**numbers, "bounds": {name: [low, high] for name, (_, low, high) in acted.items()}}


def in_words(low: float | None, high: float | None) -> str:
    """Bounds for a message: at least 0.1; at most 3; between 0.1 and 3."""
    if low is not None and high is not None:
        return f"between {low:g} and {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}"


def describe_training(phases: list[trials.Phase]) -> dict:
    """Steps and learning rates of a trial's training, and how long the rate was held, for a row's hyperparameters."""
    rates = list(dict.fromkeys(phase.learning_rate for phase in phases if phase.steps))
    learned = {"learning_rate": rates[0] if len(rates) == 1 else rates} if rates else {}
    held = {"hold": sum(phase.hold for phase in phases)} if any(phase.hold for phase in phases) else {}
    return {"steps": sum(phase.steps for phase in phases), **learned, **held}


def in_turn(phases: tuple[trials.Phase, ...]) -> list[str]:
    """Phases of training in words; equal ones in a row are said once."""
    texts = []
    for (steps, rate), run in itertools.groupby((phase.steps, phase.learning_rate) for phase in phases):
        count = len(list(run))
        texts.append(f"{count} times {steps} steps at {rate:g}" if count > 1 else f"{steps} steps at {rate:g}")
    return texts


def within_positions(profile: profiles.Profile, positions: int) -> profiles.Profile:
    """The profile with no length beyond the positions that a model has."""
    lengths = tuple(sorted({min(length, positions) for length in profile.lengths}))
    return replace(profile, lengths=lengths, max_length=min(profile.max_length, positions),
                   latency_length=min(profile.latency_length, positions))  # fmt: skip


def percent_right(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy in percent, without an interval: for curves. `logits` (examples, classes), `labels` (examples,)."""
    return 100 * (logits.argmax(-1) == labels).float().mean().item()


def flatten(content: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, with dotted names."""
    flat = {}
    for name, value in content.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def report_progress(what: str) -> None:
    """Tell `companion run` which method is under way, if it listens."""
    target = os.environ.get("COMPANION_PROGRESS")
    if target:
        try:
            with open(target, "a", encoding="utf-8") as file:
                file.write(what + "\n")
        except OSError as error:
            print(f"no progress report: {error}", file=sys.stderr)
