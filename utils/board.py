"""The board: opens a chapter, measures compressed models with one ruler, and writes the results file.

A chapter's notebook opens a board, takes fresh copies of the baseline from it, changes them, and hands each back to be
measured. Every result is one row. A row is refused when the method changed nothing, when a number is not finite, or when the
artifact on disk does not give back the measured model.
"""

import contextlib
import functools
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas
import torch
from torch import nn

from utils import CompanionError, artifacts, bert, cache, costs, metrics, profiles, tasks, training
from utils.artifacts import Encoded
from utils.baseline import Baseline, fine_tuned
from utils.claims import Claim, Evidence, judge

ROOT = Path(__file__).resolve().parent.parent
RELOAD_TOLERANCE = 1e-4  # largest logit difference between a measured model and its reloaded artifact, float32
PACKAGES = ("torch", "transformers", "datasets", "safetensors", "numpy", "scipy")
TABLE = {
    "method": "method", "label": "label", "accuracy": "accuracy", "drop": "drop", "label_loyalty": "label loyalty",
    "probability_loyalty": "prob. loyalty", "nonzero_parameters": "non-zero", "stored_bytes": "MB", "macs": "MMAC",
    "batch1": "speed ×1", "batch32": "speed ×32", "train_seconds": "train s",
}  # fmt: skip


Within = Callable[[nn.Module], contextlib.AbstractContextManager]


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
    rows: list[dict] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    baseline_row: dict = field(default_factory=dict)

    @classmethod
    def open(
        cls, chapter: str, profile: str = "cpu", model: str = "embedded", dataset: str = "rotten_tomatoes",
        seed: int = 0, device: str = "auto",
    ) -> "Board":  # fmt: skip
        """Load model and data, fetch or train the baseline, and start the clock and the energy estimate.

        Raises CompanionError for an unknown profile, model, data set or device.
        """
        started = time.perf_counter()
        sizes, where = profiles.get(profile), profiles.pick_device(device)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("highest")
        task = tasks.load(dataset, bert.load_tokenizer(model), sizes)
        board = cls(chapter, sizes, task, fine_tuned(model, task, sizes, seed, where), seed, where, model)
        board.started = started
        board._energy = costs.EnergyMeter()
        with tempfile.TemporaryDirectory() as folder:
            sizes_on_disk = artifacts.save(board.baseline.model, Path(folder) / "baseline.safetensors")
        board.baseline_row = {**board._accuracy(board.baseline.logits), **costs.parameter_counts(board.baseline.model),
                              **sizes_on_disk, **board._forward_costs(board.baseline.model),
                              "train_seconds": round(board.baseline.train_seconds, 2),
                              "majority_accuracy": round(task.majority_accuracy(), 4)}  # fmt: skip
        origin = "from the cache" if board.baseline.from_cache else "fine-tuned now"
        print(f"{chapter} · profile {profile} · {where} · {len(task.train)} training and {len(task.validation)} validation texts")
        print(f"baseline ({origin}): accuracy {board.baseline_row['accuracy']:.4f}, "
              f"{board.baseline_row['parameters'] / 1e6:.1f} M parameters, {board.baseline_row['stored_bytes'] / 1e6:.1f} MB")  # fmt: skip
        return board

    def fresh(self) -> nn.Module:
        """An independent copy of the baseline."""
        return bert.fresh_copy(self.baseline.model)

    def calibration(self, seed: int = 0) -> list[dict]:
        """Batches of training sentences for scoring weights; the same for every method."""
        return training.calibration_batches(self.task, self.profile, self.device, seed)

    def recover(self, model: nn.Module, **options) -> training.TrainingLog:
        """Recovery training with the one budget that all methods share (options go to `training.train`)."""
        return training.train(model, self.task, self.profile, **{"seed": self.seed, **options})

    def predict(self, model: nn.Module) -> torch.Tensor:
        """Validation logits, shape (examples, classes)."""
        return training.predict(model, self.task.validation, self.task.tokenizer.pad_token_id)

    def percent(self, logits: torch.Tensor) -> float:
        """Validation accuracy of logits, in percent."""
        return percent_right(logits, self.task.validation.labels)

    def points(self, first: torch.Tensor, second: torch.Tensor) -> metrics.Estimate:
        """Accuracy of the first logits minus that of the second, in percentage points, paired over the validation examples."""
        found = metrics.paired_difference(first, second, self.task.validation.labels)
        return metrics.Estimate(100 * found.value, 100 * found.low, 100 * found.high, found.n)

    @functools.cached_property
    def probe(self) -> tasks.Split:
        """A fixed part of the validation sentences, for curves and maps that take many evaluations."""
        return self.task.validation.first(self.profile.probe_size)

    def probe_accuracy(self, model: nn.Module) -> float:
        """Accuracy in percent on the probe."""
        logits = training.predict(model, self.probe, self.task.tokenizer.pad_token_id)
        return percent_right(logits, self.probe.labels)

    def measure(
        self,
        model: nn.Module,
        *,
        method: str,
        label: str,
        hyperparameters: dict | None = None,
        train_seconds: float = 0.0,
        control_of: str | None = None,
        encoded: dict[str, Encoded] | None = None,
        simulated: bool = False,
        within: Within = lambda model: contextlib.nullcontext(),
        effect: dict | None = None,
        seed: int | None = None,
    ) -> dict:
        """Put one model on the board; returns the row.

        `method` is the catalogue id (`control` for a control run, whose `control_of` names the id). `encoded` holds the tensors
        that need an encoding of their own in the artifact. `simulated` says that speed is emulated: then none is claimed.
        `within(model)` is a context in which the model runs, such as quantized activations.
        Raises RowRefused.
        """
        report_progress(f"{method} {label}")
        with within(model):
            logits = self.predict(model)
        return self._keep({
            **self._identity(method, label, hyperparameters, control_of, seed),
            **self._quality(logits),
            **costs.parameter_counts(model),
            **self._store(model, encoded, within),
            **self._forward_costs(model),
            **self._latency(model, simulated),
            "train_seconds": round(train_seconds, 2),
            "simulated": simulated,
            "effect": {**self._effect(model, logits), **(effect or {})},
        })  # fmt: skip

    def measure_engine(
        self, engine: nn.Module, *, method: str, label: str, embedding_bytes: int, hyperparameters: dict | None = None,
        control_of: str | None = None,
    ) -> dict:  # fmt: skip
        """Put a finished inference engine (`utils.quantization.integer.Engine`) on the board: real arithmetic, real speed.

        It has no artifact of this suite: its bytes are those of its own files, `embedding_bytes` of them for the embeddings.
        """
        report_progress(f"{method} {label}")
        logits = self.predict(engine)
        return self._keep({
            **self._identity(method, label, hyperparameters, control_of),
            **self._quality(logits),
            **costs.parameter_counts(self.baseline.model),
            "stored_bytes": engine.nbytes, "stored_bytes_without_embeddings": engine.nbytes - embedding_bytes,
            "macs": self.baseline_row["macs"], "macs_length": self.profile.latency_length, "peak_memory_bytes": None,
            **self._latency(engine, simulated=False, rest=costs.REST),
            "train_seconds": 0.0, "simulated": False,
            "effect": {"engine": label, "same_weights": False,
                       "largest_logit_difference": round(float((logits - self.baseline.logits).abs().max()), 6)},
        })  # fmt: skip

    def latency(self, model: nn.Module, batch: int, rounds: int | None = None, rest: float = 0.0) -> dict:
        """Speed relative to the baseline, in turns with it (see `costs.latency_ratio`)."""
        return costs.latency_ratio(self.baseline.model, model, batch, self.profile.latency_seconds,
                                   rounds or self.profile.latency_rounds, self.profile.latency_length, rest)  # fmt: skip

    def race(self, models: dict[str, nn.Module], batch: int, rounds: int | None = None) -> dict[str, metrics.Estimate]:
        """Speed of several models relative to the baseline, all of them and the baseline in one interleaved run."""
        baseline, *others = costs.interleaved_seconds([self.baseline.model, *models.values()], batch, self.profile.latency_seconds,
                                                      rounds or 3 * self.profile.latency_rounds, self.profile.latency_length,
                                                      costs.REST)  # fmt: skip
        return {name: costs.speed_ratio(baseline, times) for name, times in zip(models, others, strict=True)}

    def claim(self, id: str, statement: str, source: str, unit: str, evidence: list[Evidence]) -> Claim:
        """Judge a statement of a survey and keep the verdict."""
        claim = judge(id, statement, source, unit, evidence, self.profile.name)
        self.claims.append(claim)
        report_progress(f"claim {id}")
        print(f"{id} · {claim.verdict.upper()} · {statement} ({source}; unit: {unit})")
        for item in evidence:
            print(f"    {item.what}: {item.effect} (n = {item.effect.n}), expected {item.expected} {item.threshold:g}")
        return claim

    def summary(self, row: dict) -> str:
        """One line for the reader, right after a method ran."""
        drop = 100 * row["drop"]
        speed = (
            "simulated" if row["simulated"] else f"×{row['latency_ratio']['batch1']:.2f} / ×{row['latency_ratio']['batch32']:.2f}"
        )
        return (f"{row['method']} {row['label']}: accuracy {100 * row['accuracy']:.1f} % ({-drop:+.1f} points), "
                f"{row['stored_bytes'] / 1e6:.1f} MB, speed {speed}, agrees with the baseline on {100 * row['label_loyalty']:.1f} %")  # fmt: skip

    def table(self, methods: tuple[str, ...] | None = None) -> pandas.DataFrame:
        """The rows (of some methods and their controls) as a table; bytes in MB, multiply-adds in millions per sentence."""
        chosen = [r for r in self.rows if methods is None or {r["method"], r["control_of"]} & set(methods)]
        return as_table([{"method": "-", "label": "baseline", **self.baseline_row}, *chosen])

    def close(self) -> Path:
        """Write `results/<profile>/<chapter>.json` under $COMPANION_OUT (default: runs/) and return its path."""
        energy = self._energy.stop()
        for row in self.rows:
            row["train_energy_kwh_estimate"] = round(row["train_seconds"] * energy["mean_watts_estimate"] / 3.6e6, 8)
        content = {
            "chapter": self.chapter,
            "profile": self.profile.name,
            "provenance": {**provenance(), "device": self._device_name(), "precision": str(profiles.compute_dtype(self.device)),
                           "seeds": list(self.profile.seeds),
                           "parameters": {"MODEL": self.model_name, "DATASET": self.task.name, "SEED": self.seed,
                                          "DEVICE": self.device.type}, **energy},
            "baseline": self.baseline_row,
            "rows": self.rows,
            "claims": [claim.as_dict() for claim in self.claims],
            "wall_seconds": round(time.perf_counter() - self.started, 1),
        }  # fmt: skip
        path = results_path(self.chapter, self.profile.name)
        cache.write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        print(f"{len(self.rows)} rows and {len(self.claims)} claims in {content['wall_seconds']:.0f} s, "
              f"about {1e3 * energy['energy_kwh_estimate']:.1f} Wh (codecarbon's offline estimate)")  # fmt: skip
        return path

    def _accuracy(self, logits: torch.Tensor) -> dict:
        labels = self.task.validation.labels
        right, drop = metrics.accuracy(logits, labels), metrics.paired_difference(self.baseline.logits, logits, labels)
        return {"accuracy": round(right.value, 6), "accuracy_ci95": costs.as_row(right),
                "drop": round(drop.value, 6), "drop_ci95": costs.as_row(drop)}  # fmt: skip

    def _identity(
        self, method: str, label: str, hyperparameters: dict | None, control_of: str | None, seed: int | None = None
    ) -> dict:
        return {"method": method, "label": label, "hyperparameters": hyperparameters or {},
                "seed": self.seed if seed is None else seed, "control_of": control_of}  # fmt: skip

    def _keep(self, row: dict) -> dict:
        self._refuse(row)
        self.rows.append(row)
        print(self.summary(row))
        return row

    def _quality(self, logits: torch.Tensor) -> dict:
        teacher = self.baseline.logits
        return {**self._accuracy(logits),
                "label_loyalty": round(metrics.label_loyalty(teacher, logits), 4),
                "probability_loyalty": round(metrics.probability_loyalty(teacher, logits), 4)}  # fmt: skip

    def _forward_costs(self, model: nn.Module) -> dict:
        return {"macs": costs.macs(model, self.profile.latency_length), "macs_length": self.profile.latency_length,
                "peak_memory_bytes": costs.peak_memory(model, max(costs.LATENCY_BATCHES), self.profile.latency_length)}  # fmt: skip

    def _latency(self, model: nn.Module, simulated: bool, rest: float = 0.0) -> dict:
        if simulated:
            return {"latency_ratio": None, "latency_ms": None}
        found = {f"batch{batch}": self.latency(model, batch, rest=rest) for batch in costs.LATENCY_BATCHES}
        return {"latency_ratio": {name: round(value["ratio"].value, 3) for name, value in found.items()},
                "latency_ratio_interval": {name: costs.as_row(value["ratio"], 3) for name, value in found.items()},
                "latency_ms": {name: round(value["model_ms"], 3) for name, value in found.items()}}  # fmt: skip

    def _store(self, model: nn.Module, encoded: dict[str, Encoded] | None, within: Within) -> dict:
        """Save, reload into a fresh model, and compare: the size that counts is that of a file that works."""
        probe = tasks.collate(
            self.task.validation, np.arange(min(16, len(self.task.validation))), self.task.tokenizer.pad_token_id
        )
        inputs = {name: probe[name].to(self.device) for name in ("input_ids", "attention_mask")}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            stored = artifacts.save(model, path, encoded)
            reloaded = artifacts.load(path).to(self.device)
        found = []
        for candidate in (model.eval(), reloaded):
            with within(candidate), torch.inference_mode():
                found.append(candidate(**inputs).logits)
        difference = (found[0] - found[1]).abs().max().item()
        if not difference <= RELOAD_TOLERANCE:
            raise RowRefused(f"the reloaded artifact disagrees with the measured model: logits differ by {difference:.3g} "
                             f"(at most {RELOAD_TOLERANCE:g} is allowed)")  # fmt: skip
        return stored

    def _effect(self, model: nn.Module, logits: torch.Tensor) -> dict:
        before, after = self.baseline.model.state_dict(), model.state_dict()
        same_shape = [name for name in after if name in before and after[name].shape == before[name].shape]
        touched = sum(int((after[name] != before[name]).sum()) for name in same_shape)
        return {"weights_touched": touched, "tensors_reshaped": len(after) - len(same_shape),
                "tensors_removed": len(before.keys() - after.keys()),
                "same_weights": touched == 0 and before.keys() == after.keys() and len(same_shape) == len(after),
                "largest_logit_difference": round(float((logits - self.baseline.logits).abs().max()), 6)}  # fmt: skip

    def _refuse(self, row: dict) -> None:
        effect = row["effect"]
        if effect["same_weights"] and effect["largest_logit_difference"] == 0:
            raise RowRefused(f"{row['method']} {row['label']} changed nothing: all {row['parameters']:,} weights equal the baseline's, "
                             f"and so do its logits on {len(self.task.validation)} validation texts")  # fmt: skip
        bad = [name for name, value in flatten(row).items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise RowRefused(f"{row['method']} {row['label']} has numbers that are not finite: {', '.join(bad)}")

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads"


def percent_right(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy in percent, without an interval: for curves. `logits` (examples, classes), `labels` (examples,)."""
    return 100 * (logits.argmax(-1) == labels).float().mean().item()


def flatten(content: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, with dotted names."""
    flat = {}
    for name, value in content.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def as_table(rows: list[dict]) -> pandas.DataFrame:
    """Rows of a board or of a results file as a table with the columns of `TABLE`."""
    frame = pandas.DataFrame([{**row, **(row.get("latency_ratio") or {})} for row in rows]).reindex(columns=list(TABLE))
    frame["stored_bytes"] = (frame["stored_bytes"] / 1e6).round(2)
    frame["macs"] = (frame["macs"] / 1e6).round(1)
    frame[["accuracy", "drop"]] = frame[["accuracy", "drop"]].round(4)
    frame["drop"] = frame["drop"].fillna(0)
    return frame.rename(columns=TABLE).set_index("method").astype(object).where(lambda f: f.notna(), "")


def results_path(chapter: str, profile: str) -> Path:
    """Where a chapter's results file goes."""
    return Path(os.environ.get("COMPANION_OUT") or ROOT / "runs") / "results" / profile / f"{chapter}.json"


def provenance() -> dict:
    """What a reader needs to trust or repeat a number: commit, versions, machine, threads."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted_code": bool(git("status", "--porcelain", "--", "utils", "lessons")),
        "versions": {"python": platform.python_version(), **{package: metadata.version(package) for package in PACKAGES}},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def report_progress(what: str) -> None:
    """Tell `companion run` which method is under way, if it listens."""
    target = os.environ.get("COMPANION_PROGRESS")
    if target:
        try:
            with open(target, "a", encoding="utf-8") as file:
                file.write(what + "\n")
        except OSError as error:
            print(f"no progress report: {error}", file=sys.stderr)
