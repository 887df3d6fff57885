"""The check-up tells what is wrong and never raises; the benchmark counts what was computed."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jupyter_client.kernelspec import KernelSpecManager

from utils import bench, cli, costs, doctor, profiles, results, training
from utils.doctor import Check


def states(checks: list[Check]) -> dict[str, str]:
    return {name: state for name, state, _, _ in checks}


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_a_healthy_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path))
    found = {name: (state, what) for name, state, what, _ in doctor.checks()}
    assert {"torch", "transformers", "embedded model", "embedded data", "CUDA GPU", "Jupyter kernel", "cache folder"} <= set(
        found
    )
    assert [name for name, (state, _) in found.items() if state == "missing"] == []
    assert found["processor"] == ("ok", results.machine_name(results.machine()))
    assert str(tmp_path) in found["cache folder"][1]


def test_a_cache_that_cannot_be_a_folder_is_a_row(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "file"))
    assert doctor._check("cache folder", doctor._cache)[1] == "missing"


@pytest.mark.parametrize(("error", "said"), [(ValueError("first\nsecond"), "first"), (KeyError(), "KeyError")])
def test_whatever_a_probe_raises_becomes_a_row(error, said):
    def probe() -> tuple:
        raise error

    assert doctor._check("x", probe) == ("x", "missing", said, "make setup")


def test_a_package_that_is_not_there_is_named(monkeypatch):
    wanted = ["torch", "no-such-package>=2; python_version > '3'", 'pytest; extra == "test"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    assert states(doctor._check_packages()) == {"torch": "ok", "no-such-package": "missing"}


def kernel_of(monkeypatch, program: str) -> Check:
    monkeypatch.setattr(
        KernelSpecManager, "get_kernel_spec", lambda self, name: SimpleNamespace(argv=[program, "-m", "ipykernel_launcher"])
    )
    return doctor._check("Jupyter kernel", doctor._kernel)


@pytest.mark.parametrize("program", ["python", "python3", f"python3.{sys.version_info[1]}", sys.executable])
def test_a_kernel_of_this_environment(monkeypatch, program):
    """jupyter_client runs plain names with the interpreter that asks, whatever the path says."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert kernel_of(monkeypatch, program)[1:3] == ("ok", sys.executable)


@pytest.mark.parametrize("folder", ["other", "same-prefix"])
def test_a_kernel_of_another_environment_is_found_although_both_pythons_are_one_program(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "same"))
    program = tmp_path / folder / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.symlink_to(os.path.realpath(sys.executable))
    _, state, said, advice = kernel_of(monkeypatch, str(program))
    assert state == "missing" and str(program) in said and advice.endswith("-m ipykernel install --sys-prefix")


def test_a_kernel_whose_program_is_gone(monkeypatch):
    program = str(Path(sys.prefix) / "bin" / "no-such-python")
    assert "no program" in kernel_of(monkeypatch, program)[2] and kernel_of(monkeypatch, program)[1] == "missing"


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("optional", 0), ("missing", 1)])
def test_only_what_is_missing_fails_the_command(monkeypatch, capsys, state, status):
    monkeypatch.setattr(doctor, "checks", lambda: [("a [/] thing", state, "found [b]", "do [c]")])
    monkeypatch.setattr(sys, "argv", ["companion", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert (ended.value.code or 0) == status and all(text in said for text in ("a [/] thing", state, "found [b]", "do [c]"))


# --- bench ----------------------------------------------------------------------------------------------------------


def test_the_flops_of_a_training_run_are_six_per_multiply_add(monkeypatch):
    batches = [{"input_ids": torch.zeros(2, 5), "rows": [0, 1]}, {"input_ids": torch.zeros(3, 7), "rows": [0, 1, 2]}]
    monkeypatch.setattr(training, "endless_batches", lambda split, size, pad, seed, steps: iter(batches[:steps]))
    monkeypatch.setattr(costs, "macs", lambda model, length, batch=1: 100 * length * batch)
    task = SimpleNamespace(train=None, tokenizer=SimpleNamespace(pad_token_id=0))
    assert bench.training_flops(None, task, SimpleNamespace(batch_size=3), 2) == 6 * 100 * (2 * 5 + 3 * 7)


def test_the_benchmark_measures_what_the_machine_has(monkeypatch):
    """With the smoke sizes: those of `cpu` take minutes where nothing is native."""
    smoke = profiles.get("smoke")
    monkeypatch.setattr(profiles, "get", lambda name: smoke)
    found = bench.measure("cpu", steps=2)
    assert found["device"] == "cpu" and found["machine"] == results.machine_name(results.machine())
    native = profiles.compute_dtype(torch.device("cpu")) == torch.bfloat16
    assert set(found["matmul_gflops"]) == {"fp32"} | ({"bf16"} if native else set())
    assert found["matmul_gflops"]["fp32"] > 0 and found["threads"] == torch.get_num_threads()
    assert 0 < found["training_step"]["share_of_matmul_rate"] < 1.5 and 0 < found["inference"]["share_of_matmul_rate"] < 1.5
    assert set(found["stage_seconds"]) == {"import", "data", "model", "matmul", "2 training steps", "inference on validation"}
    assert found["training_step"]["milliseconds"] == pytest.approx(500 * found["stage_seconds"]["2 training steps"], abs=6)


def test_bench_prints_json(monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda device: {"device": device})
    monkeypatch.setattr(sys, "argv", ["companion", "bench", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and json.loads(capsys.readouterr().out) == {"device": "cpu"}
