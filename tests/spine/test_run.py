"""Chapters are executed section by section, survive what ends them, and leave no process behind."""

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import nbformat
import psutil
import pytest

from utils import CompanionError, bert, notebooks, report, results, run, tasks

pytestmark = pytest.mark.slow  # minutes in all: begun late, one worker would run them while the others have nothing left

CELL = "```{{code-cell}} python\n:tags: [{tags}]\n{source}\n```\n\n"
OPENING = '''import json, os, random, time
from pathlib import Path

class Board:
    """Keeps rows as the real board does, and notes every section that is really executed."""

    def __init__(self):
        self.journal, finished = Path(os.environ["COMPANION_JOURNAL"]), json.loads(os.environ["COMPANION_FINISHED"])
        self.rows = [row for row in json.loads(self.journal.read_text())["rows"] if row["section"] in finished]

    def section(self, key):
        self.key = key
        random.seed(0)
        for file in (os.environ["COMPANION_PROGRESS"], os.environ["COMPANION_OUT"] + "/executed"):
            with open(file, "a") as opened:
                opened.write(f"section {key}\\n")

    def put(self, label):
        time.sleep(float(os.environ.get("FAKE_PAUSE", 0)))
        self.rows.append({"section": self.key, "label": label, "value": random.random(), "seed": SEED})
        new = self.journal.with_suffix(".new")
        new.write_text(json.dumps({"rows": self.rows}))
        os.replace(new, self.journal)

    def close(self):
        results = Path(os.environ["COMPANION_OUT"]) / "results" / PROFILE / (os.environ["COMPANION_NAME"] + ".json")
        results.parent.mkdir(parents=True, exist_ok=True)
        seconds = {"opening": 60.0, "1": 60.0, "2": 60.0, "3": 60.0}
        results.write_text(json.dumps({"rows": self.rows, "section_seconds": seconds}))

board = Board()'''
SECTIONS = ("1", "2", "3")
COMMAND = """
import json, sys
from pathlib import Path
from utils import CompanionError, cli, notebooks, run
lessons, out, names, resume = json.loads(sys.argv[1])
notebooks.lesson_path = lambda chapter: Path(lessons) / f"{chapter}.md"
cli.show_results = lambda *arguments: None
request, stop = run.Request(Path(out), "smoke", {"PROFILE": "smoke"}, resume), run.Stop()
sys.argv = ["companion"]
@cli.app.command("fake")
def fake():
    with run.signals(stop):
        outcomes = cli.show_progress(names, request, 1, stop)
    cli.finish(outcomes, request, stop)
sys.argv += ["fake"]
cli.main()
"""


def lesson(opening: str = OPENING, **changed: str) -> str:
    """Three sections with two rows each, the second subsection of the second one extra, and a closing section."""
    text = "---\njupytext: {text_representation: {extension: .md, format_name: myst}}\n---\n# A chapter\n\n"
    text += CELL.format(tags="parameters", source='PROFILE, SEED = "cpu", 0') + CELL.format(tags="", source=opening)
    for key in SECTIONS:
        first = changed.get(f"in_{key}", f'board.section("{key}")\nboard.put("{key}a")')
        text += f"## {key} Section\n\n" + CELL.format(tags="", source=first)
        text += "### More\n" + "<!-- extra -->\n" * (key == "2") + "\n" + CELL.format(tags="", source=f'board.put("{key}b")')
    return (
        text
        + "## What to remember\n\n"
        + CELL.format(tags="", source="len(board.rows)")
        + CELL.format(tags="", source="board.close()")
    )


def expected(keys: tuple[str, ...] = SECTIONS, letters: str = "ab", seed: int = 0) -> list[dict]:
    """The rows of an undisturbed run."""
    rows = []
    for key in keys:
        random.seed(0)
        rows += [{"section": key, "label": f"{key}{letter}", "value": random.random(), "seed": seed} for letter in letters]
    return rows


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """Writes the lesson of the chapter `one`; returns where."""
    path = tmp_path / "lessons" / "one.md"
    path.parent.mkdir()
    path.write_text(lesson())
    monkeypatch.setattr(notebooks, "lesson_path", lambda name: path.with_name(f"{name}.md"))
    return path


@pytest.mark.parametrize(
    ("source", "looks"),
    [
        ("len(board.rows)", True),
        ("board.table()", True),
        ("board.table('P-01')", False),
        ("[row for row in board.rows if row.section == '2']", False),
        ("[row for row in board.rows if row.method in ('P-01',)]", False),
        ("[row for row in board.rows if row.label == BLOCKS]", False),
        ("[row for row in board.rows if not row.simulated]", True),
        ("[row for row in board.rows if row.method == 'control']", True),
    ],
)
def test_a_section_that_picks_its_own_rows_looks_at_no_others(source, looks):
    assert bool(run.LOOKS_AT_ALL_ROWS.search(source)) == looks


def execute(out: Path, **options) -> run.Outcome:
    request = run.Request(out, "smoke", {"PROFILE": "smoke", **options.pop("parameters", {})}, **options)
    (outcome,) = run.run_all(["one"], request)
    return outcome


def rows(out: Path, name: str = "one") -> list[dict]:
    return json.loads((out / "results" / "smoke" / f"{name}.json").read_text())["rows"]


def executed(out: Path) -> list[str]:
    """Sections in the order in which they really ran, over all runs."""
    return (out / "executed").read_text().replace("section ", "").split()


def visible(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} - {"executed", "results"}


# --- one run --------------------------------------------------------------------------------------------------------


def test_a_chapter_runs_with_parameters_and_leaves_only_what_it_promises(chapter, tmp_path, monkeypatch):
    for name in ("random", "nbformat", "filelock"):  # of the standard library, of the child, and new to the kernel
        (tmp_path / f"{name}.py").write_text("raise ImportError('the current folder is on the path')")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    chapter.write_text(lesson(in_1='import filelock\nboard.section("1")\nboard.put("1a")'))
    lines, out = [], tmp_path / "out"
    request = run.Request(out, "smoke", {"PROFILE": "smoke", "SEED": 7})
    (outcome,) = run.run_all(["one"], request, on_progress=lambda name, what: lines.append((name, what)))
    assert outcome.ok and not outcome.message, outcome
    assert rows(out) == expected(seed=7)
    assert visible(out) == {"one.ipynb"}
    assert lines == [("one", f"section {key}") for key in ("opening", *SECTIONS, "what-to-remember")]
    notebook = nbformat.read(outcome.notebook, as_version=4)
    nbformat.validate(notebook)
    assert notebooks.same_cells(notebook, notebooks.weave("one"))
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert set(notebook.metadata["companion"]["section_seconds"]) == {"opening", *SECTIONS, "what-to-remember"}


def test_an_error_in_the_middle_costs_its_cell_and_fails_the_chapter(chapter, tmp_path):
    chapter.write_text(lesson(in_2='board.section("2")\n1 / 0'))
    outcome = execute(tmp_path)
    assert not outcome.ok and outcome.message == "section 2: ZeroDivisionError: division by zero"
    assert [row["label"] for row in rows(tmp_path)] == ["1a", "1b", "2b", "3a", "3b"]
    errors = [o.ename for cell in nbformat.read(tmp_path / "one.ipynb", as_version=4).cells for o in cell.get("outputs", [])
              if o.output_type == "error"]  # fmt: skip
    assert errors == ["ZeroDivisionError"] and "one.ipynb" in visible(tmp_path)
    assert not execute(tmp_path, resume=True).skipped  # a chapter with an error is not finished


def test_an_error_in_the_opening_ends_the_chapter(chapter, tmp_path):
    chapter.write_text(lesson(opening="import nothing_of_this_name\n```\n\n```{code-cell} python\nnever_reached"))
    outcome, out = execute(tmp_path / "out"), tmp_path / "out"
    assert not outcome.ok and outcome.message == "section opening: ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert visible(out) == {"one.failed.ipynb"} == {outcome.notebook.name} and not (out / "executed").exists()
    chapter.write_text(lesson())
    assert execute(out).ok and visible(out) == {"one.ipynb"}


def test_a_dead_kernel_is_named_and_resume_goes_on_with_its_section(chapter, tmp_path):
    (tmp_path / "bomb").write_text("")
    dies = f'board.section("2")\nif os.path.exists({str(tmp_path / "bomb")!r}):\n    os._exit(1)\nboard.put("2a")'
    chapter.write_text(lesson(in_2=dies))
    outcome = execute(tmp_path)
    assert not outcome.ok and outcome.message.startswith("section 2: the kernel died") and "kept: 1; --resume" in outcome.message
    (tmp_path / "bomb").unlink()
    assert execute(tmp_path, resume=True).ok
    assert executed(tmp_path) == ["1", "2", "2", "3"] and rows(tmp_path) == expected()
    assert sum("one" in name for name in visible(tmp_path)) == 1


def test_sections_and_tracks_run_under_names_of_their_own(chapter, tmp_path):
    outcome = execute(tmp_path, sections=("2",))
    assert outcome.ok and outcome.notebook.name == "one.section-2.ipynb"
    assert rows(tmp_path, "one.section-2") == expected(("2",))
    outcome = execute(tmp_path, track="core")
    assert outcome.ok and outcome.notebook.name == "one.core.ipynb"
    assert [row["label"] for row in rows(tmp_path, "one.core")] == ["1a", "1b", "2a", "3a", "3b"]
    assert "no section 9: choose from 1, 2, 3, what-to-remember" in execute(tmp_path, sections=("9",)).message


def test_resume_compares_what_a_run_was_made_from(chapter, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text,label\n")
    again = {"parameters": {"DATASET": str(data)}, "resume": True}
    chapter.write_text(lesson().replace("SEED = ", "DATASET = SEED = "))
    assert execute(tmp_path, **again).ok
    assert execute(tmp_path, **again).skipped
    data.rename(tmp_path / "renamed.csv")
    assert execute(tmp_path, parameters={"DATASET": str(tmp_path / "renamed.csv")}, resume=True).skipped
    request = run.Request(tmp_path, "smoke", {"PROFILE": "smoke", "DATASET": str(data)})
    data.write_text("text,label\n\n")
    final, results = tmp_path / "one.ipynb", run.results_file(request, "one")
    woven = notebooks.weave("one")
    assert not run.finished(final, results, run.make_stamp(request), woven)  # other data
    data.write_text("text,label\n")
    stamp = run.make_stamp(request)
    assert run.finished(final, results, stamp, woven)
    chapter.write_text(chapter.read_text().replace("## 2", "Told anew.\n\n## 2"))
    assert not run.finished(final, results, stamp, notebooks.weave("one"))  # another lesson
    for damaged in (results, final):
        whole = damaged.read_bytes()
        for part in (whole[: len(whole) // 2], b""):
            damaged.write_bytes(part)
            assert not run.finished(final, results, stamp, woven)
        damaged.unlink()
        assert not run.finished(final, results, stamp, woven)
        damaged.write_bytes(whole)


def test_resume_runs_the_sections_whose_code_changed_and_takes_their_text_as_it_is_now(chapter, tmp_path):
    assert execute(tmp_path).ok
    chapter.write_text(
        lesson(in_2='board.section("2")\nboard.put("2c")').replace("## 1 Section\n", "## 1 Section\n\nTold anew.\n")
    )
    assert execute(tmp_path, resume=True).ok
    assert executed(tmp_path) == ["1", "2", "3", "2"]
    labels = [row["label"] for row in rows(tmp_path)]
    assert sorted(labels) == ["1a", "1b", "2b", "2c", "3a", "3b"]
    again = nbformat.read(tmp_path / "one.ipynb", as_version=4)
    assert notebooks.same_cells(again, notebooks.weave("one")) and any("Told anew." in cell.source for cell in again.cells)
    assert all(cell.execution_count for cell in again.cells if cell.cell_type == "code")
    chapter.write_text(chapter.read_text().replace("board = Board()", "board = Board() "[:-1] + "\nx = 1"))
    assert execute(tmp_path, resume=True).ok
    assert executed(tmp_path)[4:] == ["1", "2", "3"]  # another opening: everything


def test_the_source_is_what_is_computed(tmp_path):
    first = '"""Told."""\ndef f(x):\n    """Told."""\n    return x  # why\n'
    assert run.without_docstrings(first) == run.without_docstrings('"""Anew."""\n\ndef f( x ):\n    """Anew."""\n    return x\n')
    assert run.without_docstrings(first) != run.without_docstrings(first.replace("return x", "return -x"))
    assert {path.stem for path in Path(run.__file__).parent.glob("*.py")} >= set(run.COMMAND_LINE)


def test_a_section_depends_on_the_files_that_it_or_the_opening_imports(chapter, monkeypatch):
    imports = "import utils.pruning.magnitude\nimport utils.cli"
    chapter.write_text(lesson(in_2=imports))
    woven = notebooks.weave("one")
    before = run.section_keys(woven)
    files = {path.name for path in run.imported([imports])}
    assert {"magnitude.py", "masks.py", "bert.py", "catalogue.csv"} <= files and not {"cli.py", "heads.py", "run.py"} & files

    def changed(name: str) -> set[str]:
        with monkeypatch.context() as patch:
            code = run.module_code
            patch.setattr(run, "module_code", lambda path: code(path) + "x" * (path.name == name))
            return {key for key, found in run.section_keys(woven).items() if found != before[key]}

    assert changed("masks.py") == {"2"}  # imported by what the section imports
    assert changed("heads.py") == set()
    assert changed("catalogue.csv") == set(before)


def test_content_of_folders_counts(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("1")
    first = run.content_key(str(tmp_path / "first"))
    assert first == run.content_key(str(tmp_path / "second"))
    (tmp_path / "second" / "weights").rename(tmp_path / "second" / "other")
    assert first != run.content_key(str(tmp_path / "second"))
    assert run.content_key("hub/name") == "hub/name" and run.content_key(None) == "default"


@pytest.mark.parametrize("damaged", ["partial.ipynb", "rows.json"])
def test_what_cannot_be_read_of_an_interrupted_run_counts_as_not_there(chapter, tmp_path, damaged):
    stamp, folder = run.make_stamp(run.Request(tmp_path)), tmp_path / ".one"
    notebook = notebooks.weave("one")
    notebook.metadata["companion"] |= {
        "stamp": stamp,
        "section_keys": run.section_keys(notebook),
        "finished": ["opening", "1", "2", "3", "what-to-remember"],
    }
    folder.mkdir()
    nbformat.write(notebook, folder / "partial.ipynb")
    (folder / "rows.json").write_text(json.dumps(run.NO_ROWS))
    woven = notebooks.weave("one")
    assert run.finished_sections(folder, stamp, woven) == ["1", "2", "3"]  # the opening and the closing section always run
    assert run.finished_sections(folder, {**stamp, "profile": "full"}, woven) == []
    whole = (folder / damaged).read_text()
    for text in (whole[: len(whole) // 2], "", "[]"):
        (folder / damaged).write_text(text)
        assert run.finished_sections(folder, stamp, woven) == []


def test_an_output_that_cannot_be_written_is_one_clear_line(chapter, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompanionError, match=r"cannot write to .*file"):
        execute(tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["a {b} [c]", "ä % é 'x' \"y\"", "-x"])
def test_an_output_may_have_any_name(chapter, tmp_path, name):
    assert execute(tmp_path / name).ok
    assert rows(tmp_path / name) == expected() and visible(tmp_path / name) == {"one.ipynb"}


def test_a_run_of_other_data_or_another_seed_is_not_replaced(chapter, tmp_path):
    data, other = tmp_path / "data.csv", tmp_path / "other.csv"
    data.write_text("text,label\n"), other.write_text("text,label\nfine,1\n")
    out = tmp_path / "out"
    assert execute(out, parameters={"DATASET": str(data), "SEED": 1}).ok
    for change, said in (({"DATASET": str(other)}, "other data"), ({"SEED": 2}, "another seed"), ({"MODEL": "x/y"}, "another model"),
                         ({"DATASET": str(other), "SEED": 2}, "other data and another seed")):  # fmt: skip
        with pytest.raises(CompanionError, match=rf"one.ipynb is of {said}: give another --out"):
            execute(out, parameters={"DATASET": str(data), "SEED": 1, **change})
    assert rows(out) == expected(seed=1) and visible(out) == {"one.ipynb"}
    other.write_text(data.read_text())
    assert execute(out, parameters={"DATASET": str(other), "SEED": 1}).ok  # the same data under another name


def test_a_notebook_of_another_profile_is_replaced_with_a_word(chapter, tmp_path):
    assert execute(tmp_path).ok
    lines, request = [], run.Request(tmp_path, "full", {"PROFILE": "full"})
    (outcome,) = run.run_all(["one"], request, on_progress=lambda name, what: lines.append(what))
    assert outcome.ok and lines[0].startswith("the notebook of profile smoke will be replaced, its results stay")
    assert rows(tmp_path) == expected() and report.overtaken(tmp_path, "one", "smoke") == ""


def test_an_interrupted_run_of_other_data_is_not_gone_on_with(chapter, tmp_path):
    woven = notebooks.weave("one")
    woven.metadata["companion"]["stamp"] = run.make_stamp(run.Request(tmp_path, "smoke", {"PROFILE": "smoke", "SEED": 1}))
    (tmp_path / ".one").mkdir()
    nbformat.write(woven, tmp_path / ".one" / run.WOVEN)
    with pytest.raises(CompanionError, match="is of another seed"):
        execute(tmp_path, resume=True)
    assert (tmp_path / ".one" / run.WOVEN).exists()
    assert execute(tmp_path).ok and rows(tmp_path) == expected()  # who does not go on begins anew


@pytest.mark.parametrize(
    ("chapter_name", "held", "asked", "fits"),
    [
        ("01_pruning", {}, {}, True),
        ("01_pruning", {}, {"DATASET": "rotten_tomatoes"}, True),
        ("01_pruning", {"DATASET": "imdb"}, {}, False),
        ("06_subquadratic_transformers", {"DATASET": "imdb"}, {}, True),
        ("06_subquadratic_transformers", {}, {}, False),
        ("01_pruning", {"MODEL": "org/bert"}, {"MODEL": "org/bert"}, True),
        ("01_pruning", {"SEED": 1}, {}, False),
    ],
)
def test_results_whose_notebook_is_gone_are_not_replaced_either(tmp_path, chapter_name, held, asked, fits):
    request = run.Request(tmp_path, "cpu", asked)
    parameters = {"MODEL": "embedded", "DATASET": "rotten_tomatoes", "SEED": 0, "DEVICE": "cpu", **held}
    kept = {"chapter": chapter_name, "profile": "cpu", "provenance": {"device": "x", "parameters": parameters}, "baseline": {},
            "rows": [], "claims": [], "wall_seconds": 1}  # fmt: skip
    results.write(run.results_file(request, chapter_name), kept)
    with contextlib.nullcontext() if fits else pytest.raises(CompanionError, match="give another --out"):
        run.refuse_another(request, chapter_name)
    run.results_file(request, chapter_name).write_text("{")
    run.refuse_another(request, chapter_name)  # what nobody can read is no loss


def test_results_that_a_run_did_not_write_are_not_taken_for_its_own(chapter, tmp_path):
    assert execute(tmp_path).ok and report.overtaken(tmp_path, "one", "smoke") == ""
    chapter.write_text(lesson().replace("board.close()", "1 / 0"))
    outcome = execute(tmp_path)
    assert not outcome.ok and outcome.message.endswith("ZeroDivisionError: division by zero; it wrote no results")
    assert run.companion_facts(tmp_path / "one.ipynb")["results_sha256"] is None and rows(tmp_path) == expected()
    assert "not of the run whose notebook" in report.overtaken(tmp_path, "one", "smoke")
    chapter.write_text(lesson())
    assert not execute(tmp_path, resume=True).skipped and report.overtaken(tmp_path, "one", "smoke") == ""


@pytest.mark.parametrize("ending", ["import nothing_of_this_name", "os._exit(1)"])
def test_the_results_of_the_run_before_a_failed_one_are_told_to_be_of_it(chapter, tmp_path, ending):
    assert execute(tmp_path).ok
    chapter.write_text(lesson(opening=OPENING + "\n" + ending))
    assert not execute(tmp_path).ok
    assert "of an earlier run, the last one has not come to its end" in report.overtaken(tmp_path, "one", "smoke")
    assert report.overtaken(tmp_path, "one", "cpu") == ""  # another profile's results are of no such run


def test_what_somebody_damaged_or_removed_is_run_again_and_said(chapter, tmp_path):
    assert execute(tmp_path).ok
    written, final = tmp_path / "results" / "smoke" / "one.json", tmp_path / "one.ipynb"
    damages = (written.unlink, lambda: written.write_text("[]"), lambda: final.write_text('{"cells": [], "metadata": []}'))
    for number, damage in enumerate(damages, 2):
        damage()
        lines = []
        request = run.Request(tmp_path, "smoke", {"PROFILE": "smoke"}, resume=True)
        (outcome,) = run.run_all(["one"], request, on_progress=lambda name, what, lines=lines: lines.append(what))
        assert outcome.ok and not outcome.skipped and rows(tmp_path) == expected()
        assert executed(tmp_path) == [*SECTIONS] * number and any("all run again" in line for line in lines)


def test_the_user_s_kernels_and_start_up_files_are_left_alone(chapter, tmp_path, monkeypatch):
    kernel, startup = tmp_path / "jupyter" / "kernels" / "python3", tmp_path / "ipython" / "profile_default" / "startup"
    kernel.mkdir(parents=True), startup.mkdir(parents=True)
    spec = {
        "argv": ["/nowhere/python", "-f", "{connection_file}"],
        "display_name": "of another environment",
        "language": "python",
    }
    (kernel / "kernel.json").write_text(json.dumps(spec))
    (startup / "own.py").write_text("import random\nrandom.random = lambda: 0.5")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    assert execute(tmp_path / "out").ok and rows(tmp_path / "out") == expected()


def test_as_many_threads_as_a_quota_allows(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(results, "shown_cores", lambda: 4)
    for allowed, threads in ((0.5, {"OMP_NUM_THREADS": "1"}), (2.5, {"OMP_NUM_THREADS": "2"}), (4, {})):
        monkeypatch.setattr(results, "cores", lambda allowed=allowed: allowed)
        assert run.threads() == threads
    monkeypatch.setattr(results, "cores", lambda: 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # who sets it knows why
    assert run.threads() == {}


def test_a_run_of_what_is_built_in_or_local_asks_no_hub(tmp_path):
    assert (*run.BUILT_IN["DATASET"],) == tasks.EMBEDDED_TASKS and run.BUILT_IN["MODEL"] == (bert.EMBEDDED,)
    for parameters in ({}, {"MODEL": "embedded", "DATASET": "imdb"}, {"MODEL": str(tmp_path)}):
        assert run.without_hub(run.Request(tmp_path, parameters=parameters)) == {"HF_HUB_OFFLINE": "1"}
    for parameters in ({"MODEL": "org/bert"}, {"DATASET": "glue/sst2"}):
        assert run.without_hub(run.Request(tmp_path, parameters=parameters)) == {}


def test_a_folder_named_like_what_is_built_in_is_not_hashed_in_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imdb").mkdir()
    assert run.content_key("imdb", run.BUILT_IN["DATASET"]) == "imdb" != run.content_key("./imdb", run.BUILT_IN["DATASET"])


# --- progress -------------------------------------------------------------------------------------------------------


def test_time_left_follows_an_earlier_run(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    clock = run.Clock({"opening": 60.0, "1": 120.0, "2": 240.0})
    assert clock.left("section opening") == " · about 7 min left"
    now[0] = 1.0  # the baseline comes from the cache this time: that says nothing of the machine's speed
    assert clock.left("section 1") == " · about 6 min left"
    now[0] = 241.0  # twice as slow as then
    assert clock.left("section 2") == " · about 8 min left"
    now[0] = 421.0
    assert clock.left("P-01 half") == " · about 5 min left"
    assert clock.left("section 9") == ""
    assert run.Clock({}).left("section 1") == ""


def test_time_left_after_resume_counts_only_what_is_still_to_run(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    clock = run.Clock({"opening": 60.0, "1": 6000.0, "2": 240.0})
    now[0] = 60.0
    assert clock.left("section 2") == " · about 4 min left"


def test_progress_tells_the_time_only_where_an_earlier_run_is_known(chapter, tmp_path):
    request, lines = run.Request(tmp_path, "smoke"), []
    tell = run.with_time_left(lines.append, request, "one", ["opening", *SECTIONS])
    tell("section 1")
    run.results_file(request, "one").parent.mkdir(parents=True)
    seconds = {"2": 60.0, "1": 60.0, "opening": 60.0, "3": 60.0}  # an interrupted run writes them in another order
    run.results_file(request, "one").write_text(json.dumps({"section_seconds": seconds}))
    run.with_time_left(lines.append, request, "one", ["opening", *SECTIONS])("section 1")
    core = run.Request(tmp_path, "smoke", track="core")  # the whole chapter says nothing of its core track
    run.with_time_left(lines.append, core, "one", ["opening", *SECTIONS])("section 1")
    assert lines == ["section 1", "section 1 · about 3 min left", "section 1"]


def test_a_vanished_terminal_does_not_stop_the_progress(tmp_path):
    def gone(line):
        raise BrokenPipeError

    (tmp_path / "progress").write_text("section 1\nsection 1\nP-01 half\nhalf a li")
    told, lines = [""], []
    run.pass_on(tmp_path / "progress", told, gone)
    assert told == ["", "section 1", "section 1", "P-01 half"]
    run.pass_on(tmp_path / "progress", [""], lines.append)
    assert lines == ["section 1", "P-01 half"]


# --- what ends a run ------------------------------------------------------------------------------------------------


class Command:
    """`companion run` on fake lessons, in a process of its own."""

    def __init__(
        self, lessons: Path, out: Path, names: tuple[str, ...] = ("one",), resume: bool = False, pause: float = 0.3, **options
    ):
        self.mark, self.out = uuid.uuid4().hex, out
        arguments = [sys.executable, "-c", COMMAND, json.dumps([str(lessons), str(out), names, resume])]
        environment = {**os.environ, "FAKE_PAUSE": str(pause), "FAKE_MARK": self.mark, "COLUMNS": "300"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
        self.process = subprocess.Popen(arguments, env=environment, start_new_session=True, **options)

    def alive(self) -> list[psutil.Process]:
        """All processes that descend from the command, whoever their parent is now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FAKE_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def child(self) -> psutil.Process:
        return next(process for process in self.alive() if "utils.execute" in process.cmdline())

    def wait_for_rows(self, count: int) -> None:
        journal = self.out / ".one" / "rows.json"
        wait_until(lambda: journal.is_file() and len(json.loads(journal.read_text() or '{"rows": []}')["rows"]) >= count)

    def leaves_nothing(self) -> None:
        wait_until(lambda: not self.alive())


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def check_resume(out: Path, kept: list[str]) -> None:
    """Going on executes none of the sections kept, and gives the rows of an undisturbed run."""
    before = len(executed(out)) if (out / "executed").exists() else 0
    outcome = execute(out, resume=True)
    assert outcome.ok, outcome
    assert rows(out) == expected()
    assert executed(out)[before:] == [key for key in SECTIONS if key not in kept]
    assert visible(out) == {"one.ipynb"}
    cells = [cell for cell in nbformat.read(outcome.notebook, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # those of the sections kept, too
    assert cells[-2].outputs[0].data["text/plain"] == "6"


def test_a_full_disk_costs_the_run_one_line_and_the_next_one_nothing(chapter, tmp_path):
    out, limit = tmp_path / "out", (3000, 3000)  # bytes of a file; no notebook is so small
    command = Command(chapter.parent, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    said, _ = command.process.communicate(timeout=60)
    assert command.process.returncode == 1 and "File too large" in said and "Traceback" not in said
    command.leaves_nothing()
    check_resume(out, [])


def test_a_disk_that_is_full_at_the_end_keeps_the_sections(chapter, tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(run.cache, "write_atomically", full)
        outcome = execute(tmp_path / "out")
    assert not outcome.ok and outcome.message == f"No space left on device: {tmp_path / 'out' / 'one.ipynb'}"
    check_resume(tmp_path / "out", ["1", "2", "3"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_stops_everything_in_order(chapter, tmp_path, number):
    chapter.with_name("two.md").write_text(lesson())
    command = Command(chapter.parent, tmp_path / "out", ("one", "two"))
    command.wait_for_rows(3)
    if number == signal.SIGINT:  # a terminal sends it to all of its group
        os.killpg(command.process.pid, number)
    else:
        command.process.send_signal(number)
    said, _ = command.process.communicate(timeout=60)
    assert command.process.returncode == 128 + number
    command.leaves_nothing()
    assert f"stopped by {number.name}; finished sections kept: 1; --resume goes on from there" in said and "Traceback" not in said
    assert "two" not in said and visible(tmp_path / "out") == {".one"}
    check_resume(tmp_path / "out", ["1"])


def test_a_killed_command_takes_its_kernel_along(chapter, tmp_path):
    command = Command(chapter.parent, tmp_path / "out")
    command.wait_for_rows(3)
    command.process.kill()
    command.process.wait()
    command.leaves_nothing()
    check_resume(tmp_path / "out", ["1"])


def test_a_killed_child_takes_its_kernel_along_and_is_named(chapter, tmp_path):
    command = Command(chapter.parent, tmp_path / "out")
    command.wait_for_rows(3)
    command.child().kill()
    said, _ = command.process.communicate(timeout=60)
    assert command.process.returncode == 1 and "the executing process was killed by SIGKILL" in said
    command.leaves_nothing()
    check_resume(tmp_path / "out", ["1"])


def test_a_kernel_busy_in_foreign_code_dies_too(chapter, tmp_path):
    """A thread that holds the interpreter keeps ipykernel's own look-out for its parent from running."""
    busy = 'board.section("1")\nimport ctypes\nboard.put("1a")\nctypes.PyDLL(None).sleep(60)'
    chapter.write_text(lesson(in_1=busy))
    command = Command(chapter.parent, tmp_path / "out")
    command.wait_for_rows(1)
    command.child().kill()
    command.process.communicate(timeout=60)
    command.leaves_nothing()


def test_two_runs_on_one_output(chapter, tmp_path):
    command = Command(chapter.parent, tmp_path / "out")
    command.wait_for_rows(1)
    with pytest.raises(CompanionError, match=rf"one is being run into .*out already \(process {command.process.pid}\)"):
        execute(tmp_path / "out")
    assert execute(tmp_path / "other").ok
    said, _ = command.process.communicate(timeout=60)
    assert command.process.returncode == 0, said
    assert rows(tmp_path / "out") == rows(tmp_path / "other") == expected()
    assert visible(tmp_path / "out") == {"one.ipynb"}


def test_a_closed_terminal_does_not_stop_the_run(chapter, tmp_path):
    master, terminal = os.openpty()
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "text": False}
    command = Command(chapter.parent, tmp_path / "out", **streams)
    os.close(terminal)
    reader = threading.Thread(target=lambda: os.read(master, 1 << 20), daemon=True)
    reader.start()
    command.wait_for_rows(2)
    os.close(master)
    command.process.send_signal(signal.SIGHUP)
    command.process.wait(60)
    assert rows(tmp_path / "out") == expected() and visible(tmp_path / "out") == {"one.ipynb"}
    command.leaves_nothing()


def test_a_run_killed_in_its_last_moment_is_finished_and_cleared_up(chapter, tmp_path):
    """Between the notebook under its name and the removal of the folder that it was written in."""
    out = tmp_path / "out"
    assert execute(out).ok
    (out / ".one").mkdir()
    (out / ".one" / "rows.json").write_text("{}")
    (out / "one.failed.ipynb").write_text("{}")
    assert execute(out, resume=True).skipped and visible(out) == {"one.ipynb"}


MOMENTS = int(os.environ.get("COMPANION_TEST_MOMENTS", "10"))


@pytest.mark.xdist_group("killed")
def test_killed_at_many_moments(chapter, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    started = time.monotonic()
    undisturbed = Command(chapter.parent, tmp_path / "whole")
    undisturbed.process.communicate(timeout=60)
    length = time.monotonic() - started
    for moment in range(MOMENTS):
        out = tmp_path / str(moment)
        command = Command(chapter.parent, out)
        time.sleep(length * (moment + 0.5) / MOMENTS)
        victims = (
            [command.process.pid]
            if moment % 2
            else [process.pid for process in command.alive() if "utils.execute" in process.cmdline()]
        )
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        command.process.communicate(timeout=30)
        command.leaves_nothing()
        assert execute(out, resume=True).ok
        assert rows(out) == rows(tmp_path / "whole") == expected() and visible(out) == {"one.ipynb"}, moment
        assert not list(scratch.iterdir()) and len(list((out / "results" / "smoke").iterdir())) == 1, moment


def test_temporary_files_of_a_run_and_halves_of_a_killed_one_are_cleared_up(chapter, tmp_path):
    told = "import tempfile; board.section('1'); print(tempfile.mkdtemp())"
    chapter.write_text(lesson(in_1=told + "\nboard.put('1a')"))
    out, results = tmp_path / "out", tmp_path / "out" / "results" / "smoke"
    results.mkdir(parents=True)
    halves = [out / ".one.ipynb-abc", results / ".one.json-abc"]
    for half in halves:
        half.write_text("{")
    (out / ".another.ipynb-abc").write_text("{")  # of a chapter that may be running
    assert execute(out).ok
    text = (out / "one.ipynb").read_text()
    assert str(out / ".one" / "tmp") in text and not (out / ".one").exists()
    assert not any(half.exists() for half in halves) and (out / ".another.ipynb-abc").exists()
