"""Notebooks follow from lessons and code; sections stand alone; the catalogue says only what is there."""

import ast
import csv
import statistics

import jupytext
import nbformat
import pytest

from utils import CompanionError, catalogue, notebooks

CHAPTERS = catalogue.chapters()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_committed_notebook_is_in_step(chapter):
    """Or it stands on the list of those that await a rerun; one that is in step again leaves the list."""
    assert (notebooks.out_of_step(chapter) is None) == (chapter not in notebooks.stale())


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_woven_notebook_is_valid_deterministic_and_parameterised(chapter):
    first, second = notebooks.weave(chapter), notebooks.weave(chapter)
    nbformat.validate(first)
    assert first == second
    parameters = [cell.source for cell in first.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    assigned = {t.id for node in ast.parse(parameters[0]).body if isinstance(node, ast.Assign) for t in node.targets}
    assert assigned == {"PROFILE", "MODEL", "DATASET", "SEED", "DEVICE"}


@pytest.mark.parametrize("track", ["all", "core"])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_section_uses_only_the_opening_and_itself(chapter, track):
    assert notebooks.undefined_names(notebooks.weave(chapter, track=track)) == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_section_with_code_begins_by_saying_so(chapter):
    """Otherwise its random numbers depend on what ran before, and its rows on no section at all."""
    notebook = notebooks.weave(chapter)
    for section in notebooks.sections(notebook)[1:]:
        cells = notebook.cells[section.first : section.last]
        plain = [c.source for c in cells if c.cell_type == "code" and not c.metadata.get("tags", [""])[0].startswith("woven")]
        code = "\n".join(plain).replace("board.close()", "")
        if "board." in code:
            before, found, _ = code.partition(f'board.section("{section.key}")')
            assert found, f"section {section.key} never says that it begins"
            assert "board." not in before and "torch.rand" not in before, f"section {section.key} acts before it begins"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_cells_are_short(chapter):
    cells = [cell for cell in notebooks.weave(chapter).cells if cell.cell_type == "code"]
    lengths = [len(cell.source.splitlines()) for cell in cells]
    woven = [length for length, cell in zip(lengths, cells, strict=True) if "woven" in cell.metadata.get("tags", [])]
    assert statistics.median(lengths) <= 9 and statistics.median(woven) <= 10 and max(lengths) <= 40


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_woven_name_is_overwritten_by_another(chapter):
    """Two sources of one name would silently change code that a learner ran before."""
    owners = {}
    for cell in jupytext.read(catalogue.lesson_path(chapter), fmt="md:myst").cells:
        if "weave" in cell.metadata.get("tags", []):
            for node in ast.parse(cell.source).body:
                for alias in node.names:
                    assert owners.setdefault(alias.name, node.module) == node.module


def test_woven_cells_run_alone_and_are_the_packages_source():
    imports, blocks = notebooks.weave_cell("from utils.pruning.masks import check_sparsity, lowest", {})
    space = {}
    for source in (imports, *blocks):
        exec(source, space)
    import inspect

    from utils.pruning.masks import lowest

    assert [block.splitlines()[0] for block in blocks] == ["# source: utils/pruning/masks.py"] * 2
    assert inspect.getsource(lowest).strip() in blocks[1] and "def lowest" not in blocks[0]


def test_long_docstrings_are_folded_and_nothing_else_changes():
    import inspect

    from utils.pruning import densify

    _, (block,) = notebooks.weave_cell("from utils.pruning.densify import grow_and_prune", {})
    whole = inspect.getsource(densify.grow_and_prune)
    assert len(block.splitlines()) < len(whole.splitlines())

    def bare(source: str) -> str:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                node.body = node.body[1:]
        return ast.unparse(tree)

    assert bare(block) == bare(whole)
    folded = ast.get_docstring(ast.parse(block).body[0])
    assert folded == ast.get_docstring(ast.parse(whole).body[0]).split("\n\n")[0]


def test_woven_imports_are_not_repeated_and_constants_share_a_cell():
    seen = {}
    _, blocks = notebooks.weave_cell("from utils.pruning.heads import BETA, GAMMA, ZETA, open_probability", seen)
    assert len(blocks) == 2 and blocks[0].count("BETA, GAMMA, ZETA = ") == 1
    imports, _ = notebooks.weave_cell("from utils.pruning.heads import hard_concrete", seen)
    assert "import torch" not in imports and "BETA" not in imports


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


LESSON = """# 09 · Made up

Words.

```{code-cell} python
:tags: [parameters]
PROFILE = "smoke"
```

## 1 First

```{code-cell} python
:tags: [weave]
from utils.pruning.masks import lowest
```

### Inside (X-01)
<!-- extra -->

```{code-cell} python
:tags: [hide-input]
first = lowest
```

## 2 Second
<!-- extra -->

```{code-cell} python
:tags: [weave]
from utils.pruning.masks import lowest
```

### Back (X-02)
<!-- core -->

```{code-cell} python
second = PROFILE
```

### Still extra

```{code-cell} python
third = first
```

## What to remember

```{code-cell} python
board = None; board.close()
```
"""


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """A small lesson in place of a chapter's."""
    path = tmp_path / "lesson.md"
    path.write_text(LESSON)
    monkeypatch.setattr(notebooks, "lesson_path", lambda chapter: path)


def test_sections_and_tracks(lesson):
    notebook = notebooks.weave("09_made_up")
    assert [s.key for s in notebooks.sections(notebook)] == ["opening", "1", "2", "what-to-remember"]
    assert not any("<!--" in cell.source for cell in notebook.cells)
    extra = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "extra" in cell.metadata.get("tags", [])]
    assert "first = lowest" in extra and "third = first" in extra and "second = PROFILE" not in extra
    core = [cell.source for cell in notebooks.weave("09_made_up", track="core").cells]
    assert "second = PROFILE" in core and "first = lowest" not in core and not any(source.startswith("## 2") for source in core)
    hidden = next(cell for cell in notebook.cells if cell.source == "first = lowest")
    assert hidden.metadata["jupyter"]["source_hidden"]


def test_a_section_starts_afresh(lesson):
    notebook = notebooks.weave("09_made_up")
    woven = [cell.source for cell in notebook.cells if "woven-imports" in cell.metadata.get("tags", [])]
    assert len(woven) == 2 and woven[0] == woven[1]  # the second section imports again what the first one had
    assert notebooks.undefined_names(notebook) == ["section 2: first"]


def test_some_sections_come_with_the_opening_and_the_closing(lesson):
    notebook = notebooks.weave("09_made_up", ("2",))
    assert [s.key for s in notebooks.sections(notebook)] == ["opening", "2", "what-to-remember"]
    with pytest.raises(CompanionError, match="no section 7: choose from 1, 2, what-to-remember"):
        notebooks.weave("09_made_up", ("7",))
    with pytest.raises(CompanionError, match="unknown track 'easy'"):
        notebooks.weave("09_made_up", track="easy")


def test_names_in_functions_count_too():
    bound, used = notebooks.names_of("def f(x):\n    return [y + z for y in x]\nw = f(v)")
    assert bound == {"f", "w"} and used - bound == {"z", "v"}


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
