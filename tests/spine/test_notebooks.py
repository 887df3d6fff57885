"""Every notebook runs in smoke: the whole of it, its core track once more, two sections alone; and all its files keep their contract."""

import json
import math
import os
import subprocess
import sys

import fresh
import pytest
import torch

from utils import catalogue, notebooks, results
from utils import run as runs
from utils.board import flatten
from utils.claims import VERDICTS

DEVICE = os.environ.get("COMPANION_TEST_DEVICE", "cpu")
ALONE = {"00_bert_baseline": ("5", "6"), "01_pruning": ("4", "5"), "02_quantization": ("6", "8"),
         "03_knowledge_distillation": ("2", "4"), "04_parameter_sharing": ("2", "8"),
         "05_tensor_decomposition": ("4", "7"), "06_subquadratic_transformers": ("3", "6")}  # fmt: skip
LINEAR_TIME = ("L-10", "L-11")  # attentions that multiply more than the dense one where a text is shorter than a head is wide
CHAPTERS = [pytest.param(chapter, marks=pytest.mark.xdist_group(chapter)) for chapter in catalogue.chapters()]  # a core each
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _one_cache(run_cache):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("COMPANION_TEST_DEVICE=cuda, but there is no CUDA GPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_CACHE", run_cache)
        yield


def request(out, **options) -> runs.Request:
    return runs.Request(out, "smoke", {"PROFILE": "smoke", "DEVICE": DEVICE}, **options)


def run_one(chapter: str, wanted: runs.Request) -> runs.Outcome:
    (outcome,) = runs.run_all([chapter], wanted)
    return outcome


class Outcomes(dict):
    """How each chapter's run ended; a chapter runs, once, when it is first asked for. Artifacts are kept."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def __missing__(self, chapter: str) -> runs.Outcome:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COMPANION_ARTIFACTS", str(self.out / "artifacts"))
            self[chapter] = run_one(chapter, request(self.out))
        return self[chapter]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    (out / "artifacts").mkdir()
    return Outcomes(out)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_notebook_runs_in_smoke_and_every_row_holds(outcomes, chapter):
    assert outcomes[chapter].ok, outcomes[chapter].message
    methods = check_results(outcomes.out / "results" / "smoke" / f"{chapter}.json", chapter)
    assert {m.id for m in catalogue.load(chapter)} <= methods


def check_results(path, chapter: str) -> set[str]:
    """A smoke run's results file: complete, every row honest, nothing judged. Returns its method ids."""
    content = results.read(path)
    assert content["profile"] == "smoke" and content["chapter"] == chapter and content["wall_seconds"] > 0
    assert set(content["provenance"]) >= {"commit", "versions", "device", "machine", "threads", "seeds", "parameters"}
    assert content["failures"] == [] and set(content["section_seconds"]) > {"opening"}
    for row in content["rows"]:
        check_row(row, content["baseline"])
        assert row["section"] and row["track"] in ("core", "extra")
        assert row["simulated"] or row["latency_of"] or row["latency_ms"] is not None
    assert {claim["verdict"] for claim in content["claims"]} <= {"not tested"}
    return {row["method"] for row in content["rows"]}


def check_row(row: dict, baseline: dict) -> None:
    """What holds for any honest row, whatever the profile."""
    where = f"{row['method']} {row['label']}"
    low, high = row["accuracy_ci95"]
    assert 0 <= low <= row["accuracy"] <= high <= 1, where
    assert abs(row["drop"] - (baseline["accuracy"] - row["accuracy"])) < 1e-5, where
    assert 0 <= row["label_loyalty"] <= 1 and 0 <= row["probability_loyalty"] <= 1, where
    assert 0 < row["nonzero_parameters"] <= row["parameters"], where
    assert row["parameters_without_embeddings"] < row["parameters"], where
    assert 0 < row["stored_bytes_without_embeddings"] < row["stored_bytes"], where
    computes = bool(row["part_kinds"]) or row["method"] in LINEAR_TIME  # a part may compute what it does not store
    assert computes or row["macs"] <= baseline["macs"], where
    assert row["simulated"] == (row["latency_ratio"] is None), where
    assert not (row["effect"]["same_weights"] and row["effect"]["largest_logit_difference"] == 0), where
    assert all(math.isfinite(value) for value in flatten(row).values() if isinstance(value, float)), where
    if row["parameters"] < baseline["parameters"]:
        changed = row["effect"]["tensors_reshaped"] + row["effect"]["tensors_removed"]
        assert changed > 0 or row["stored_bytes"] < baseline["stored_bytes"], (
            where
        )  # tied tensors keep their shapes, and are stored once


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_artifact_keeps_its_contract_in_a_fresh_process(outcomes, chapter, tmp_path):
    """Same logits, classes, ties and bytes; multiply-adds that closed form and counter agree on: for every row that has a file."""
    assert outcomes[chapter]
    out = outcomes.out
    rows = results.read(out / "results" / "smoke" / f"{chapter}.json")["rows"]
    with_file = [number for number, row in enumerate(rows) if "weights_touched" in row["effect"]]
    for number in with_file:
        for suffix in (".safetensors", ".json"):
            source = out / "artifacts" / f"{chapter}-{number:03d}{suffix}"
            os.link(source, tmp_path / source.name)  # a row that was refused leaves a file that the next one replaces
    assert len(with_file) >= {"00_bert_baseline": 2, "05_tensor_decomposition": 25, "06_subquadratic_transformers": 25}.get(
        chapter, 33
    )
    assert fresh.broken(tmp_path) == {}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_core_track_of_the_committed_notebook_reproduces(chapter, tmp_path):
    """Through nbval where the notebook is in step; one that awaits its rerun is woven anew."""
    name = chapter
    if chapter in notebooks.stale():
        outcome = run_one(chapter, request(tmp_path, track="core"))
        assert outcome.ok, outcome.message
        name = outcome.name
    else:
        notebooks.core_copy(notebooks.NOTEBOOKS / f"{chapter}.ipynb", tmp_path / f"{chapter}.ipynb")
        command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "-p",
                   "no:cacheprovider", str(tmp_path / f"{chapter}.ipynb")]  # fmt: skip
        environment = {**os.environ, "COMPANION_PROFILE": "smoke", "COMPANION_OUT": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:]
    methods = check_results(tmp_path / "results" / "smoke" / f"{name}.json", chapter)
    core = {id for id, track in catalogue.tracks(chapter).items() if track == "core"}
    assert core <= methods <= core | {"control"}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_sections_run_alone_and_give_the_rows_that_they_give_in_the_chapter(outcomes, chapter, tmp_path):
    assert outcomes[chapter]
    out = outcomes.out
    whole = {(row["method"], row["label"]): row for row in results.read(out / "results" / "smoke" / f"{chapter}.json")["rows"]}
    for key in ALONE[chapter]:
        outcome = run_one(chapter, request(tmp_path, sections=(key,)))
        assert outcome.ok, outcome.message
        rows = [
            row for row in results.read(tmp_path / "results" / "smoke" / f"{outcome.name}.json")["rows"] if row["section"] == key
        ]
        assert len(rows) == sum(row["section"] == key for row in whole.values())
        for row in rows:
            same = whole[row["method"], row["label"]]
            assert (row["accuracy"], row["stored_bytes"], row["effect"]) == (
                same["accuracy"],
                same["stored_bytes"],
                same["effect"],
            )


def test_the_committed_results_hold_too():
    for content in results.read_all(notebooks.NOTEBOOKS, "cpu"):
        for row in content["rows"]:
            check_row(row, content["baseline"])
        assert all(claim["verdict"] in VERDICTS for claim in content["claims"])
        assert json.loads(json.dumps(content, allow_nan=False)) == content
