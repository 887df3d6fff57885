"""The command answers wrong arguments in one line, and right ones with what they promise."""

import json
import os
import subprocess
import sys

import pytest

from utils import cli, notebooks
from utils.catalogue import ROOT


def companion(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "99"), "unknown chapter '99'"),
        (("run", "00", "--profile", "fast"), "unknown profile 'fast'"),
        (("run", "00", "--device", "tpu"), "unknown device 'tpu'"),
        (("run", "00", "--dataset", "no/such-data"), "neither built in"),
        (("run", "00", "--model", "no/such-model"), "could not be loaded"),
        (("report", "--out", "nowhere"), "no results of profile"),
        (("catalogue", "--chapter", "99"), "unknown chapter"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, message):
    done = companion(*arguments, HF_HUB_OFFLINE="1")
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and message in said
    assert "Traceback" not in done.stderr


def test_cuda_asked_for_and_absent():
    done = companion("run", "00", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "sees no CUDA GPU" in " ".join(done.stderr.split())


def test_doctor_reports_and_never_raises(tmp_path):
    done = companion("doctor", COMPANION_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stdout
    for what in ("embedded model", "embedded data", "CUDA GPU", "Jupyter kernel", "cache folder", "transformers"):
        assert what in done.stdout
    (tmp_path / "file").write_text("")
    broken = companion("doctor", COMPANION_CACHE=str(tmp_path / "file"))
    assert broken.returncode == 1 and "missing" in broken.stdout and "Traceback" not in broken.stderr + broken.stdout


def test_results_table_of_the_readme_has_a_line_per_row():
    for content in notebooks.results(notebooks.NOTEBOOKS, "cpu"):
        assert len(cli.markdown_rows(content)) == len(content["rows"]) + 3


def test_help_names_every_command():
    done = companion("--help")
    assert all(name in done.stdout for name in ("doctor", "run", "weave", "catalogue", "report", "bench"))


def test_bench_prints_json():
    done = companion("bench")
    content = json.loads(done.stdout)
    assert content["matmul_gflops"]["fp32"] > 0
    assert 0 < content["training_step"]["share_of_matmul_rate"] < 1.5
    assert set(content["stage_seconds"]) >= {"import", "data", "model", "30 training steps", "inference on validation"}
