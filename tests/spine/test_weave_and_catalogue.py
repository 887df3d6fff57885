"""Notebooks follow from lessons and code; the catalogue says only what is there."""

import ast
import csv

import jupytext
import nbformat
import pytest

from utils import CompanionError, catalogue, notebooks

CHAPTERS = catalogue.chapters()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_committed_notebook_is_in_step(chapter):
    assert notebooks.out_of_step(chapter) is None


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_woven_notebook_is_valid_deterministic_and_parameterised(chapter):
    first, second = notebooks.weave(chapter), notebooks.weave(chapter)
    nbformat.validate(first)
    assert first == second
    parameters = [cell.source for cell in first.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    assigned = {t.id for node in ast.parse(parameters[0]).body if isinstance(node, ast.Assign) for t in node.targets}
    assert assigned == {"PROFILE", "MODEL", "DATASET", "SEED", "DEVICE"}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_woven_name_is_overwritten_by_another(chapter):
    """Two sources of one name would silently change code that a learner ran before."""
    owners = {}
    for cell in jupytext.read(catalogue.lesson_path(chapter), fmt="md:myst").cells:
        if "weave" in cell.metadata.get("tags", []):
            for node in ast.parse(cell.source).body:
                for alias in node.names:
                    assert owners.setdefault(alias.name, node.module) == node.module


def test_a_woven_cell_runs_alone_and_is_the_packages_source():
    source = notebooks.weave_cell("from utils.pruning.magnitude import magnitude_masks", {})
    space = {}
    exec(source, space)
    import inspect

    from utils.pruning.magnitude import magnitude_masks

    assert inspect.getsource(magnitude_masks).strip() in source
    assert space["magnitude_masks"].__doc__ == magnitude_masks.__doc__


def test_woven_imports_are_not_repeated_and_constants_come_along():
    seen = {}
    first = notebooks.weave_cell("from utils.pruning.heads import BETA, GAMMA, ZETA, open_probability", seen)
    assert first.count("BETA, GAMMA, ZETA = ") == 1
    second = notebooks.weave_cell("from utils.pruning.heads import hard_concrete", seen)
    assert "import torch" not in second and "import BETA" not in second


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os", "from module import names"),
        ("from utils.pruning.magnitude import random_masks as other", "without `as`"),
        ("from utils.pruning.magnitude import nothing_here", "defines no nothing_here"),
    ],
)
def test_bad_weave_cells_are_refused(source, message):
    with pytest.raises(CompanionError, match=message):
        notebooks.weave_cell(source, {})


def test_a_changed_cell_is_noticed():
    chapter = CHAPTERS[0]
    woven, other = notebooks.weave(chapter), notebooks.weave(chapter)
    assert notebooks.same_cells(woven, other)
    other.cells[3].source += " "
    assert not notebooks.same_cells(woven, other)
    injected = nbformat.v4.new_code_cell("PROFILE = 'smoke'", metadata={"tags": ["injected-parameters"]})
    assert notebooks.same_cells(woven, nbformat.v4.new_notebook(cells=[*woven.cells[:2], injected, *woven.cells[2:]]))


def test_unknown_chapters():
    with pytest.raises(CompanionError, match="unknown chapter '99'"):
        notebooks.check_chapters(["99"])
    assert notebooks.check_chapters(["01"]) == ["01_pruning"]
    with pytest.raises(CompanionError, match="unknown chapter"):
        catalogue.load("99_nothing")


def test_catalogue_ids_are_unique_and_every_survey_method_is_there():
    with open(catalogue.CSV, newline="", encoding="utf-8") as file:
        entries = list(csv.DictReader(file))
    assert len({entry["id"] for entry in entries}) == len(entries) == 156
    assert sum(entry["chapter"] == "01_pruning" for entry in entries) == 33


@pytest.mark.parametrize("method", [m for m in catalogue.load() if m.chapter in CHAPTERS], ids=lambda m: m.id)
def test_methods_of_written_chapters_are_complete(method):
    assert method.gaps() == []
