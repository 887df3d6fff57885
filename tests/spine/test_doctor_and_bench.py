"""The check-up tells what is wrong and never raises; the benchmark counts what was computed."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jupyter_client.kernelspec import KernelSpecManager

from utils import CompanionError, bench, cli, costs, doctor, profiles, results, training
from utils.doctor import Check


def states(checks: list[Check]) -> dict[str, str]:
    return {name: state for name, state, _, _ in checks}


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_a_healthy_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path))
    found = {name: (state, what) for name, state, what, _ in doctor.checks()}
    assert set(found) >= {"torch", "transformers", "Python", "package utils", "embedded model", "embedded data", "cores", "CUDA GPU",
                          "bfloat16", "memory", "Jupyter kernel", "cache folder", "results", "temporary folder"}  # fmt: skip
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


def test_a_message_for_users_says_itself_what_to_do():
    def probe() -> tuple:
        raise CompanionError("no cache: set COMPANION_CACHE")

    assert doctor._check("cache folder", probe) == ("cache folder", "missing", "no cache: set COMPANION_CACHE", "")


@pytest.mark.parametrize(
    ("name", "error", "advice"),
    [
        ("Jupyter kernel", RuntimeError("Could not determine home directory."), "set HOME"),
        ("cache folder", PermissionError("no"), "set COMPANION_CACHE"),
        ("temporary folder", FileNotFoundError("No usable temporary directory found"), "set TMPDIR"),
    ],
)
def test_nobody_is_told_to_set_up_again_where_that_is_no_help(name, error, advice):
    def probe() -> tuple:
        raise error

    assert doctor._check(name, probe) == (name, "missing", str(error), advice)


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 9), "missing"), ((3, 11, 0), "ok"), ((3, 12, 4), "ok"), ((3, 13, 0), "missing")]
)
def test_which_python_will_do(monkeypatch, version, state):
    monkeypatch.setattr(doctor.sys, "version_info", version)
    assert doctor._python()[:2] == (state, ".".join(map(str, version)))


@pytest.mark.parametrize("foreign", ["utils/__init__.py", "utils/data.csv", "utils.py"])
@pytest.mark.parametrize("beside", [True, False])
def test_another_package_of_our_name_is_told(monkeypatch, tmp_path, foreign, beside):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    assert doctor._package()[0] == "ok"
    folder = tmp_path if beside else tmp_path / "path"
    (folder / foreign).parent.mkdir(parents=True, exist_ok=True)
    (folder / foreign).write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}{os.pathsep}")
    state, said, advice = doctor._package()
    assert state == "optional" and str(folder / "utils") in said and "rename" in advice
    monkeypatch.chdir(results.ROOT)
    monkeypatch.delenv("PYTHONPATH")
    assert doctor._package() == ("ok", str(results.ROOT / "utils"), "")


@pytest.mark.parametrize(
    ("allowed", "shown", "said", "advice"),
    [
        (2, 2, "2", ""),
        (0.5, 2, "a quota allows 0.5 of 2 cores", "4-fold time; runs take 1 thread;"),
        (2.5, 4, "a quota allows 2.5 of 4 cores", "OMP_NUM_THREADS=2"),
    ],
)
def test_a_quota_is_told_with_what_it_means(monkeypatch, allowed, shown, said, advice):
    monkeypatch.setattr(results, "cores", lambda: allowed)
    monkeypatch.setattr(results, "shown_cores", lambda: shown)
    state, found, to_do = doctor._cores()
    assert (state, found) == ("ok" if allowed == shown else "optional", said) and advice in to_do


def test_little_memory_is_told(monkeypatch):
    monkeypatch.setattr(results, "memory_limits", lambda: [2_000_000_000])
    assert doctor._memory()[:2] == ("optional", "2.0 GB")
    monkeypatch.setattr(doctor.os, "sysconf_names", {})  # Windows
    monkeypatch.delattr(doctor.os, "sysconf")
    assert doctor._memory() == ("ok", "unknown", "")


@pytest.mark.parametrize(
    ("name", "state", "advice"),
    [
        ("cache folder", "missing", "free 2 GB, or set COMPANION_CACHE"),
        ("temporary folder", "missing", "free 1 GB, or set TMPDIR"),
        ("results", "optional", "free 0.1 GB, or name another folder with --out"),
    ],
)
def test_a_full_or_closed_disk_is_told(monkeypatch, tmp_path, name, state, advice):
    assert doctor._space(name, tmp_path)[0] == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e7))
        assert doctor._space(name, tmp_path) == (state, f"{tmp_path} (0.1 GB free)", advice)
    monkeypatch.setattr(doctor.os, "access", lambda *arguments: False)
    assert doctor._space(name, tmp_path) == (state, f"{tmp_path} cannot be written", doctor.MOVED_BY[name])


@pytest.mark.parametrize(
    ("native", "state", "said"), [(True, "ok", "minutes in the README hold"), (False, "optional", "two to three times")]
)
def test_bfloat16_is_told_with_what_it_means_for_the_minutes(monkeypatch, native, state, said):
    monkeypatch.setattr(profiles, "compute_dtype", lambda device: torch.bfloat16 if native else torch.float32)
    found = doctor._bfloat16()
    assert found[0] == state and said in " ".join(found)


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
