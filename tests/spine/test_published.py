"""Whoever changes a published number, verdict or output by hand is found out: copies are falsified, one thing at a time."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from utils import CompanionError, notebooks, published, report

CHAPTER = "00_bert_baseline"


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """One chapter's notebook and results, with a README, a page and a picture made from them."""
    source = notebooks.NOTEBOOKS
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    for file in (f"{CHAPTER}.ipynb", f"results/cpu/{CHAPTER}.json"):
        shutil.copy(source / file, tmp_path / file)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text("before\n" + "\n".join(report.MARKS) + "\nafter\n")
    return tmp_path


def content(out: Path) -> dict:
    return json.loads((out / "results" / "cpu" / f"{CHAPTER}.json").read_text())


def forge(out: Path, change: Callable[[dict], object]) -> None:
    """Change the results file, and the notebook's hash of it as well."""
    found, file = content(out), out / "results" / "cpu" / f"{CHAPTER}.json"
    change(found)
    file.write_text(json.dumps(found))
    alter(
        out, lambda notebook: notebook.metadata["companion"].update(results_sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    )


def alter(out: Path, change: Callable[[nbformat.NotebookNode], object]) -> None:
    """Change the notebook."""
    notebook = nbformat.read(out / f"{CHAPTER}.ipynb", as_version=4)
    change(notebook)
    nbformat.write(notebook, out / f"{CHAPTER}.ipynb")


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def a_row(found: dict) -> dict:
    """A row with a speed of its own."""
    return next(row for row in found["rows"] if row["latency_ratio"] and not row["latency_of"])


# --- results --------------------------------------------------------------------------------------------------------


def two_points_better(found: dict) -> None:
    row = a_row(found)
    row["accuracy"] += 0.02


def two_points_better_in_all_its_numbers(found: dict) -> None:
    row = a_row(found)
    row |= {"accuracy": row["accuracy"] + 0.02, "accuracy_ci95": [end + 0.02 for end in row["accuracy_ci95"]],
            "drop": row["drop"] - 0.02, "drop_ci95": [end - 0.02 for end in row["drop_ci95"]]}  # fmt: skip


def a_better_baseline(found: dict) -> None:
    found["baseline"]["accuracy"] += 0.02


def a_speed_of_25(found: dict) -> None:
    a_row(found)["latency_ratio"]["batch1"] = 25.0


def a_speed_of_25_with_its_interval(found: dict) -> None:
    a_speed_of_25(found)
    a_row(found)["latency_ratio_interval"]["batch1"] = [24.9, 25.1]


def a_third_of_the_bytes(found: dict) -> None:
    a_row(found)["stored_bytes"] //= 3


def no_controls(found: dict) -> None:
    found["rows"] = [row for row in found["rows"] if row["method"] != "control"]


def another_name(found: dict) -> None:
    a_row(found)["label"] = "our method"


def supported(found: dict) -> None:
    claim = next(claim for claim in found["claims"] if claim["verdict"] != "supported")
    claim["verdict"] = "supported"


def supported_with_all_its_evidence(found: dict) -> None:
    supported(found)
    for claim in found["claims"]:
        for item in claim["evidence"]:
            item["verdict"] = "supported"


def supported_by_other_evidence(found: dict) -> None:
    supported_with_all_its_evidence(found)
    for claim in found["claims"]:
        for item in claim["evidence"]:
            item["threshold"] = -1e9 if item["expected"] == "above" else 1e9


RESULTS = (two_points_better, two_points_better_in_all_its_numbers, a_better_baseline, a_speed_of_25, a_speed_of_25_with_its_interval,
           a_third_of_the_bytes, no_controls, another_name, supported, supported_with_all_its_evidence, supported_by_other_evidence)  # fmt: skip


@pytest.mark.parametrize("falsify", RESULTS, ids=lambda falsify: falsify.__name__)
def test_falsified_results_contradict_their_notebook_or_themselves(copy, falsify):
    assert published.contradictions(copy) == []
    forge(copy, falsify)
    assert published.contradictions(copy)


def test_results_that_the_notebook_did_not_write_are_noticed_whatever_they_say(copy):
    file = copy / "results" / "cpu" / f"{CHAPTER}.json"
    file.write_text(json.dumps({**content(copy), "wall_seconds": 1.0}))
    assert published.contradictions(copy) == [f"{CHAPTER}.ipynb: its results are not those that it wrote"]
    with pytest.raises(CompanionError, match="not of the run whose notebook"):
        report.publish(copy)


# --- notebooks ------------------------------------------------------------------------------------------------------


def in_outputs(notebook: nbformat.NotebookNode, pattern: str, new: str) -> None:
    """Replace the first match in what the cells print or show."""
    for cell in code(notebook):
        for output in cell.outputs:
            holder, key = (output, "text") if output.output_type == "stream" else (output.get("data", {}), "text/html")
            if re.search(pattern, holder.get(key, "")):
                holder[key] = re.sub(pattern, new, holder[key], count=1)
                return
    raise AssertionError(f"no output has {pattern}")


def a_printed_accuracy(notebook: nbformat.NotebookNode) -> None:
    in_outputs(notebook, r"accuracy \d\d\.\d % \(drop", "accuracy 99.9 % (drop")


def a_printed_size(notebook: nbformat.NotebookNode) -> None:
    in_outputs(notebook, r"points\), \d+\.\d MB", "points), 1.0 MB")


def an_accuracy_in_a_table(notebook: nbformat.NotebookNode) -> None:
    in_outputs(notebook, r"(<th>control</th>\s*<td>[^<]*</td>\s*)<td>\d\d\.\d</td>", r"\1<td>99.9</td>")


def a_printed_row(notebook: nbformat.NotebookNode) -> None:
    in_outputs(notebook, r"(?m)^control (.+): accuracy", r"control of our own: accuracy 99.9 % (drop +0.0\ncontrol \1: accuracy")


def a_printed_verdict(notebook: nbformat.NotebookNode) -> None:
    in_outputs(notebook, "· INCONCLUSIVE ·", "· SUPPORTED ·")


def an_error(notebook: nbformat.NotebookNode) -> None:
    code(notebook)[-1].outputs.append(nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[]))


def no_outputs(notebook: nbformat.NotebookNode) -> None:
    for cell in code(notebook):
        cell.outputs = []


def not_executed(notebook: nbformat.NotebookNode) -> None:
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None


def one_cell_not_executed(notebook: nbformat.NotebookNode) -> None:
    code(notebook)[5].execution_count = None


def no_hash(notebook: nbformat.NotebookNode) -> None:
    del notebook.metadata["companion"]["results_sha256"]


def no_facts(notebook: nbformat.NotebookNode) -> None:
    del notebook.metadata["companion"]


NOTEBOOKS = (a_printed_accuracy, a_printed_size, an_accuracy_in_a_table, a_printed_row, a_printed_verdict, an_error, no_outputs,
             not_executed, one_cell_not_executed, no_hash, no_facts)  # fmt: skip


@pytest.mark.parametrize("falsify", NOTEBOOKS, ids=lambda falsify: falsify.__name__)
def test_a_falsified_notebook_contradicts_its_results(copy, falsify):
    alter(copy, falsify)
    assert published.contradictions(copy)


def test_a_notebook_or_a_results_file_that_is_missing_is_named(copy):
    notebook = copy / f"{CHAPTER}.ipynb"
    whole = notebook.read_bytes()
    notebook.unlink()
    assert published.contradictions(copy) == [f"{CHAPTER}: there is no executed notebook"]
    notebook.write_bytes(whole)
    (copy / "results" / "cpu" / f"{CHAPTER}.json").unlink()
    with pytest.raises(CompanionError, match="no results"):
        published.contradictions(copy)


# --- README, page and picture ---------------------------------------------------------------------------------------


def test_a_falsified_readme_page_or_picture_is_out_of_date(copy):
    report.publish(copy)
    assert report.outdated(copy) == []
    row = a_row(content(copy))
    accuracy, verdict = f"| {100 * row['accuracy']:.1f} |", f"| {content(copy)['claims'][0]['verdict']} |"
    for file in (report.README, copy / report.PAGE):
        whole = file.read_text()
        lines = whole.splitlines(keepends=True)
        without_control = "".join(line for line in lines if not line.startswith("| control"))
        for forged in (whole.replace(accuracy, "| 99.9 |", 1), whole.replace(verdict, "| contradicted |", 1), without_control):
            assert forged != whole
            file.write_text(forged)
            assert report.outdated(copy) == [file.name if file == report.README else str(report.PAGE)]
        file.write_text(whole)
    (copy / report.PICTURE).unlink()
    assert report.outdated(copy) == [str(report.PICTURE)]


# --- what is committed ----------------------------------------------------------------------------------------------


def test_what_is_committed_belongs_together():
    assert published.contradictions(notebooks.NOTEBOOKS) == []
