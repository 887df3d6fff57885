"""Every notebook runs in the smoke profile through the command's own code, and its results file is checked row by row."""

import json
import math
import os

import nbformat
import pytest
import torch

from utils import catalogue, notebooks
from utils.board import flatten

DEVICE = os.environ.get("COMPANION_TEST_DEVICE", "cpu")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(run_cache, tmp_path_factory):
    """All chapters, executed once."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("COMPANION_TEST_DEVICE=cuda, but there is no CUDA GPU")
    out = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_CACHE", run_cache)
        request = notebooks.Request(out, "smoke", {"PROFILE": "smoke", "DEVICE": DEVICE})
        yield request, {chapter: notebooks.run_chapter(chapter, request) for chapter in catalogue.chapters()}


@pytest.mark.parametrize("chapter", catalogue.chapters())
def test_notebook_runs_in_smoke_and_every_row_holds(outcomes, chapter):
    request, finished = outcomes
    outcome = finished[chapter]
    assert outcome.ok, outcome.message
    content = json.loads((request.out / "results" / "smoke" / f"{chapter}.json").read_text())
    assert content["profile"] == "smoke" and content["chapter"] == chapter and content["wall_seconds"] > 0
    assert set(content["provenance"]) >= {"commit", "versions", "device", "threads", "seeds", "parameters"}
    for row in content["rows"]:
        check_row(row, content["baseline"])
    assert {claim["verdict"] for claim in content["claims"]} == {"not tested"}
    methods = {row["method"] for row in content["rows"]}
    assert {m.id for m in catalogue.load(chapter)} <= methods


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
    assert row["macs"] <= baseline["macs"], where
    assert row["simulated"] == (row["latency_ratio"] is None), where
    assert not (row["effect"]["same_weights"] and row["effect"]["largest_logit_difference"] == 0), where
    assert all(math.isfinite(value) for value in flatten(row).values() if isinstance(value, float)), where
    if row["parameters"] < baseline["parameters"]:
        assert row["effect"]["tensors_reshaped"] + row["effect"]["tensors_removed"] > 0, where


def test_the_committed_results_hold_too():
    for content in notebooks.results(notebooks.NOTEBOOKS, "cpu"):
        for row in content["rows"]:
            check_row(row, content["baseline"])
        assert all(claim["verdict"] in ("supported", "contradicted", "inconclusive") for claim in content["claims"])


def test_resume_skips_what_is_finished_from_the_same_sources(outcomes):
    request, finished = outcomes
    chapter = catalogue.chapters()[0]
    assert finished[chapter].ok
    again = notebooks.run_chapter(chapter, notebooks.Request(request.out, "smoke", request.parameters, resume=True))
    assert again.ok and again.skipped
    assert not notebooks._finished(again.notebook, {"profile": "cpu", "parameters": {}, "source": ""})


def test_a_failing_notebook_is_kept_and_named(tmp_path, monkeypatch):
    cells = [nbformat.v4.new_code_cell("1 / 0")]
    broken = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": notebooks.KERNEL, "companion": {}})
    monkeypatch.setattr(notebooks, "weave", lambda chapter: broken)
    outcome = notebooks.run_chapter("00_bert_baseline", notebooks.Request(tmp_path, "smoke"))
    assert not outcome.ok and outcome.message == "ZeroDivisionError: division by zero"
    assert outcome.notebook.name == "00_bert_baseline.failed.ipynb" and outcome.notebook.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["00_bert_baseline.failed.ipynb"]
