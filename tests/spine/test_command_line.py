"""The command answers wrong arguments in one line, and right ones with what they promise."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors import SafetensorError

from utils import CompanionError, cli, hub, notebooks, prose, report, results
from utils import run as runs
from utils.catalogue import ROOT
from utils.claims import Claim, Evidence
from utils.metrics import Estimate
from utils.results import Row


@pytest.fixture
def companion(monkeypatch, capsys):
    """Runs the command in this process: exit status, and what it wrote to stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["companion", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call


@pytest.fixture
def no_work(monkeypatch):
    """What `run` would start, without starting it."""
    started = []
    monkeypatch.setattr(cli, "preflight", lambda *arguments: None)
    monkeypatch.setattr(cli, "show_progress", lambda names, request, jobs, stop: started.append((names, request, jobs)) or [])
    return started


# --- wrong arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "99"), "unknown chapter '99'"),
        (("run", "x[/bold]"), "unknown chapter 'x[/bold]'"),  # no markup
        (("run", "00", "--profile", "fast"), "unknown profile 'fast'"),
        (("run", "00", "--device", "tpu"), "unknown device 'tpu'"),
        (("run", "00", "--track", "short"), "unknown track 'short'"),
        (("run", "00", "--track", "claims"), "00_bert_baseline judges no claim over seeds"),
        (("run", "00", "--section", "77"), "no section 77"),
        (("run", "00", "--out", "README.md"), "README.md is a file"),
        (("run", "00", "--out", "README.md/x[/]"), "cannot write to README.md/x[/]"),
        (("run", "00", "--out", "x" * 300), "File name too long"),
        (("report", "--out", "nowhere"), "no results of profile 'cpu' under nowhere"),
        (("report", "--out", "notebooks", "--against", "no-such-revision"), "no revision 'no-such-revision'"),
        (("report", "--out", "nowhere", "--readme"), "no results of profile full or cpu"),
        (("weave", "99"), "unknown chapter '99'"),
        (("lint", "99"), "unknown chapter '99'"),
        (("catalogue", "--chapter", "99"), "unknown chapter"),
    ],
)
def test_wrong_arguments_are_one_clear_line(companion, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    status, _, said = companion(*arguments)
    assert status == 2 and message in said
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("seed", ["-1", str(2**32), "x[/]"])
def test_a_seed_that_numpy_would_refuse_is_refused_at_once(companion, no_work, seed):
    status, _, said = companion("run", "00", "--seed", seed)
    assert status == 2 and "--seed" in said and no_work == []


def test_data_and_models_that_are_not_there():
    """In a process of their own, because the libraries read once whether there is a hub; in one, because to import them takes long."""
    command = """if True:
        import sys
        from utils import cli
        for option, name in (("--dataset", "no/such-data"), ("--model", "no/such-model")):
            sys.argv = ["companion", "run", "00", option, name]
            try:
                cli.main()
            except SystemExit as end:
                print(end.code)
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    data, model = done.stderr.splitlines()
    assert done.stdout.split() == ["2", "2"] and "no/such-data" in data and "model 'no/such-model'" in model


@pytest.mark.parametrize("arguments", [("--device", "cuda"), ("--profile", "gpu")])
def test_cuda_asked_for_and_absent(companion, monkeypatch, arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, said = companion("run", "00", *arguments)
    assert status == 2 and "sees no CUDA GPU" in said


def test_a_hub_that_does_not_answer_is_not_waited_for(companion, no_work, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")  # and gone again afterwards
    monkeypatch.setattr(hub, "answers", lambda: False)
    companion("run", "00", "--dataset", "imdb")
    assert "HF_HUB_OFFLINE" not in os.environ  # nothing of it comes from a hub
    _, _, said = companion("run", "00", "--dataset", "glue/sst2")
    assert os.environ["HF_HUB_OFFLINE"] == "1" and said.startswith("note: the hub does not answer") and len(no_work) == 2


# --- other packages and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", ["utils/__init__.py", "utils/readme.txt", "utils.py"])
def test_the_command_finds_its_own_package_whatever_lies_on_the_path(tmp_path, foreign):
    path, here, script = tmp_path / "path", tmp_path / "here", tmp_path / "companion"
    (path / foreign).parent.mkdir(parents=True), here.mkdir()
    (path / foreign).write_text("raise ImportError('another package')\n")
    (here / "random.py").write_text("raise ImportError('a file of the current folder')\n")
    script.write_text("from bert_compression_companion import main\nmain()\n")  # as pip writes it
    environment = {**os.environ, "PYTHONPATH": f"{path}::{ROOT}"}  # an empty entry means the current folder
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=here, env=environment)
    assert done.returncode == 0 and "catalogue" in done.stdout, done.stderr


# --- what goes wrong later ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (CompanionError("two\nlines [/] long"), "error: two lines [/] long"),
        (SafetensorError("header too large"), "error: a safetensors file cannot be read or written (header too large)"),
        (OSError(errno.ENOSPC, "No space left on device", "a[b].json"), "error: No space left on device: a[b].json"),
        (PermissionError(errno.EACCES, "Permission denied"), "error: Permission denied"),
    ],
)
def test_what_the_user_or_the_machine_can_mend_is_one_line(companion, monkeypatch, raised, message):
    monkeypatch.setattr(cli, "app", raiser(raised))
    assert companion() == (2, "", message + "\n")


@pytest.mark.parametrize("raised", [ValueError("ours"), FileNotFoundError(errno.ENOENT, "ours"), OSError("ours")])
def test_our_own_faults_stay_tracebacks(monkeypatch, raised):
    monkeypatch.setattr(cli, "app", raiser(raised))
    with pytest.raises(type(raised), match="ours"):
        cli.main()


def raiser(error: Exception):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("signum", "oks", "status"), [(None, (True, True), 0), (None, (True, False), 1), (2, (False,), 130), (15, (), 143)]
)
def test_the_exit_status_says_how_the_run_ended(companion, monkeypatch, tmp_path, signum, oks, status):
    outcomes = [
        runs.Outcome("one", f"one{i}", tmp_path / "one.ipynb", ok, message="" if ok else "P-05 [/] failed")
        for i, ok in enumerate(oks)
    ]
    shown = []
    monkeypatch.setattr(cli, "show_results", lambda out, profile, names: shown.append(names))
    stop = runs.Stop(signal=signum)

    def app() -> None:
        try:
            cli.finish(outcomes, runs.Request(tmp_path, "smoke"), stop)
        except cli.typer.Exit as ended:
            sys.exit(ended.exit_code)
        sys.exit(0)

    monkeypatch.setattr(cli, "app", app)
    found, said, _ = companion()
    assert found == status and ("P-05 [/] failed" in said) == (not all(oks))
    assert bool(shown) == (signum is None)


# --- run ------------------------------------------------------------------------------------------------------------


def test_run_passes_on_what_it_was_asked_for(companion, no_work, tmp_path):
    companion("run", "00", "01", "--profile", "full", "--seed", "3", "--device", "cpu", "--jobs", "2", "--out", str(tmp_path / "new"),
              "--section", "2", "--section", "3", "--track", "core", "--resume")  # fmt: skip
    ((names, request, jobs),) = no_work
    assert (names, jobs) == (["00_bert_baseline", "01_pruning"], 2)
    parameters = {"PROFILE": "full", "SEED": 3, "DEVICE": "cpu"}
    assert request == runs.Request(tmp_path / "new", "full", parameters, True, ("2", "3"), "core")


def test_what_is_usual_is_no_parameter_and_local_data_have_a_full_path(companion, no_work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text("text,label\n")
    companion("run", "00", "--profile", "cpu", "--dataset", "my.csv")
    ((_, request, _),) = no_work
    assert request.parameters == {"DATASET": str(tmp_path.resolve() / "my.csv")} and request.sections == ()


def test_a_tilde_that_the_shell_left_is_the_home_folder(companion, no_work, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.csv").write_text("text,label\n")
    companion("run", "00", "--dataset=~/my.csv", "--out=~/runs")
    ((_, request, _),) = no_work
    assert request.out == tmp_path / "runs" and request.parameters == {"DATASET": str(tmp_path.resolve() / "my.csv")}
    assert cli.expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


@pytest.mark.parametrize(("option", "name"), [("--dataset", "imdb"), ("--dataset", "rotten_tomatoes"), ("--model", "embedded")])
def test_what_is_built_in_is_not_mistaken_for_a_folder_of_its_name(companion, no_work, tmp_path, monkeypatch, option, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    _, _, said = companion("run", "00", option, name)
    assert f"note: {name} is the built-in one; ./{name} names" in said
    companion("run", "00", option, f"./{name}")
    built_in, local = (request.parameters.get(option.removeprefix("--").upper(), name) for _, request, _ in no_work)
    assert (built_in, local) == (name, str(tmp_path.resolve() / name))


def test_a_data_set_that_is_asked_for_is_passed_on_whichever_it_is(companion, no_work):
    companion("run", "00", "--dataset", "rotten_tomatoes")  # in chapter 06 it is not the usual one
    assert no_work[0][1].parameters == {"DATASET": "rotten_tomatoes"}


def test_help_names_every_command(companion):
    _, said, _ = companion("--help")
    assert all(f" {name} " in said for name in ("doctor", "run", "weave", "catalogue", "report", "bench", "lint"))


# --- report ---------------------------------------------------------------------------------------------------------


def content(chapter: str, label: str = "heads by [/]", profile: str = "cpu") -> dict:
    row = Row(method="P-20a", label=label, accuracy=0.81, accuracy_ci95=[0.79, 0.83], drop=0.02, drop_ci95=[0.01, 0.035], parameters=10,
              nonzero_parameters=8, parameters_without_embeddings=5, stored_bytes=71_000_000, stored_bytes_without_embeddings=1,
              macs=345_000_000, latency_ratio={"batch1": 1.25, "batch32": 2.0})  # fmt: skip
    evidence = [Evidence("a over b", Estimate(2.0, 1.5, 2.5, 3), "above", 1.0)]
    claim = Claim("C2", "faster [sic]", "a paper", "round", evidence, "supported").as_dict()
    baseline = {**row.as_dict(), "method": "-", "label": "baseline"}
    return {"chapter": chapter, "profile": profile, "provenance": {"device": "AMD [EPYC], 2 cores"}, "baseline": baseline,
            "rows": [row.as_dict()], "claims": [claim], "wall_seconds": 60}  # fmt: skip


@pytest.fixture
def out(tmp_path) -> Path:
    """A run of two chapters, one of them also in full, and a section of one."""
    cpu, full = tmp_path / "results" / "cpu", tmp_path / "results" / "full"
    results.write(cpu / "00_bert_baseline.json", content("00_bert_baseline"))
    results.write(cpu / "01_pruning.json", content("01_pruning"))
    results.write(cpu / "01_pruning.section-7.json", content("01_pruning", "of a section"))
    results.write(full / "01_pruning.json", content("01_pruning", "in full", "full"))
    return tmp_path


def test_report_shows_rows_and_verdicts_as_they_are_written(companion, out):
    status, said, _ = companion("report", "--out", str(out))
    assert status == 0 and said.count("heads by [/]") == 2 and "of a section" not in said
    assert "01_pruning, profile cpu, AMD [EPYC], 2 cores" in said and "faster [sic]" in said and "drop [95 %]" in said


def test_a_terminal_that_lacks_a_sign_shows_a_question_mark(tmp_path, monkeypatch):
    results.write(tmp_path / "results" / "cpu" / "01_pruning.json", content("01_pruning", "2 × 4 → ü"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["companion", "report", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sys.stdout.flush()
    assert not ended.value.code and b"2 ? 4 ? ?" in written.getvalue()


def test_report_names_model_data_and_seed_where_they_are_not_the_usual_ones(companion, tmp_path):
    known = {"MODEL": "embedded", "DATASET": "rotten_tomatoes", "SEED": 0, "DEVICE": "cpu"}
    other = {"MODEL": "org/bert", "DATASET": "my[b].csv", "SEED": 2, "DEVICE": "cpu"}
    for name, parameters in (("00_bert_baseline", known), ("01_pruning", other), ("06_subquadratic_transformers", known)):
        found = content(name)
        found["provenance"] |= {"device": "x", "parameters": parameters}
        results.write(tmp_path / "results" / "cpu" / f"{name}.json", found)
    _, said, _ = companion("report", "--out", str(tmp_path))
    assert re.search(r"^ *00_bert_baseline, profile cpu, x *$", said, re.MULTILINE)
    assert "01_pruning, profile cpu, model org/bert, data my[b].csv, seed 2, x" in said
    assert "06_subquadratic_transformers, profile cpu, data rotten_tomatoes, x" in said


@pytest.mark.parametrize("left", [".01_pruning/woven.ipynb", "01_pruning.failed.ipynb"])
def test_report_says_where_the_last_run_did_not_come_to_its_end(companion, out, left):
    assert "earlier run" not in companion("report", "--out", str(out))[1]
    (out / left).parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(metadata={"companion": {"stamp": {"profile": "cpu"}}}), out / left)
    _, said, _ = companion("report", "--out", str(out))
    assert said.count("note:") == 1 and "note: 01_pruning: these results are of an earlier run" in said
    assert "earlier run" not in companion("report", "--out", str(out), "--profile", "full")[1]


def test_what_a_later_run_did_not_replace_is_not_published(companion, out, tmp_path, monkeypatch):
    (out / "01_pruning.failed.ipynb").write_text("")
    nbformat.write(
        nbformat.v4.new_notebook(metadata={"companion": {"stamp": {"profile": "full"}}}), out / "01_pruning.failed.ipynb"
    )
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    status, _, said = companion("report", "--out", str(out), "--readme")
    assert status == 2 and "01_pruning: these results are of an earlier run" in said and not (tmp_path / "README.md").exists()


def test_a_part_of_a_chapter_is_shown_after_its_run(out, capsys):
    cli.show_results(out, "cpu", ["01_pruning.section-7", "missing"])
    said = capsys.readouterr().out
    assert "01_pruning.section-7, profile cpu" in said and "of a section" in said and "heads by" not in said


def test_report_lays_machines_side_by_side(companion, out):
    results.write(
        out / "results" / "cpu" / "01_pruning@x.json", {**content("01_pruning"), "provenance": {"device": "Xeon [AMX]"}}
    )
    status, said, _ = companion("report", "--out", str(out), "--machines")
    assert status == 0 and "Xeon [AMX]" in said and "P-20a heads by [/]" in said


def test_the_readme_takes_the_full_profile_where_there_is_one(companion, out, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nstale table\n<!-- results:end -->\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    assert companion("report", "--out", str(out), "--readme") == (0, "", "")
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale table" not in text
    assert "in full" in text and "profile full" in text and text.count("| heads by [/] |") == 1 and "of a section" not in text


def test_the_picture_shows_one_task_and_leaves_others_to_their_tables():
    here, there = content("01_pruning"), content("06_subquadratic_transformers")
    for one, name in ((here, "rotten_tomatoes"), (there, "imdb")):
        one["provenance"] = {**one["provenance"], "parameters": {"DATASET": name}}
    there["rows"] = [{**there["rows"][0], "method": "L-01"}]
    assert "sub-quadratic" not in report.words(report.picture([here, there]))
    there["provenance"]["parameters"]["DATASET"] = "rotten_tomatoes"
    assert "sub-quadratic" in report.words(report.picture([here, there]))


# --- weave, lint ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_notebooks(tmp_path, monkeypatch) -> Path:
    """A chapter out of step that awaits its rerun (`00`), and one out of step that does not (`01`)."""
    old, new = (nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text, id="a")]) for text in ("old", "new"))
    for name in ("00", "01"):
        nbformat.write(old, tmp_path / f"{name}.ipynb")
    (tmp_path / "STALE.json").write_text('{"00": "the rerun is due"}')
    for name, value in {"NOTEBOOKS": tmp_path, "ROOT": tmp_path, "weave": lambda name, *parts: new,
                        "check_chapters": lambda names: names or ["00", "01"]}.items():  # fmt: skip
        monkeypatch.setattr(notebooks, name, value)
    return tmp_path


def cells(folder: Path) -> list[str]:
    return [nbformat.read(folder / f"{name}.ipynb", as_version=4).cells[0].source for name in ("00", "01")]


def test_weave_check_writes_nothing_and_fails_for_what_is_not_awaited(companion, two_notebooks):
    status, _, said = companion("weave", "--check")
    assert (
        status == 2 and "01.ipynb is out of step" in said and "00 is stale: the rerun is due" in said and "00.ipynb" not in said
    )
    assert companion("weave", "00", "--check")[0] == 0
    assert cells(two_notebooks) == ["old", "old"]


def test_weave_keeps_the_outputs_of_a_notebook_that_awaits_its_rerun_unless_it_is_named(companion, two_notebooks):
    status, said, _ = companion("weave")
    assert status == 0 and "01.ipynb written without outputs" in said and cells(two_notebooks) == ["old", "new"]
    assert "01.ipynb is in step" in companion("weave", "01")[1]
    assert companion("weave", "01", "--check") == (0, "", "")
    companion("weave", "00")
    assert cells(two_notebooks) == ["new", "new"]


def test_lint_names_every_problem_and_fails(companion, monkeypatch):
    monkeypatch.setattr(prose, "problems", lambda chapter: ["a cell of [/] 99 lines"] if chapter.startswith("01") else [])
    status, said, why = companion("lint")
    assert status == 2 and said == "01_pruning: a cell of [/] 99 lines\n" and "1 problems" in why
    assert companion("lint", "00")[0] == 0
