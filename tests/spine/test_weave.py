"""Notebooks follow from lessons and code, their sections stand alone, and the core track does without the rest."""

import ast
import builtins
import inspect
import statistics
import subprocess
import sys

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
    from utils.pruning.masks import lowest

    assert [block.splitlines()[0] for block in blocks] == ["# source: utils/pruning/masks.py"] * 2
    assert inspect.getsource(lowest).strip() in blocks[1] and "def lowest" not in blocks[0]


def test_long_docstrings_are_folded_and_nothing_else_changes():
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


@pytest.mark.parametrize(
    ("docstring", "folded"),
    [
        ('"""One.\n\n    Two.\n    """', '"""One."""'),
        ('r"""One.\n\n    Two."""', 'r"""One."""'),
        ('"""One,\n    one.\n\n    Two.\n\n    Three."""', '"""One,\n    one."""'),
        ('"""One."""', None),
        ("'''One.\n\n    Two.'''", None),  # what cannot be cut safely stays whole
        ('"""Says "one"\n\n    Two."""', None),
        ('"""One.\n\n    Two."""; x = 1', None),
    ],
)
def test_a_docstring_is_cut_only_where_nothing_else_changes(docstring, folded):
    source = f"@decorated\ndef f(x):\n    {docstring}\n    return x\n"
    node = ast.parse(source).body[0]
    assert notebooks.fold_docstrings(node, source.splitlines()) == source.replace(docstring, folded or docstring).rstrip()


def test_docstrings_of_methods_are_cut_too():
    source = 'class A:\n    """One.\n\n    Two.\n    """\n\n    def f(self):\n        """Three.\n\n        Four.\n        """\n'
    found = notebooks.fold_docstrings(ast.parse(source).body[0], source.splitlines())
    assert found == 'class A:\n    """One."""\n\n    def f(self):\n        """Three."""'


def test_only_small_constants_share_a_cell():
    table, function = "T = [\n    1,\n    2,\n]", "def f():\n    pass"
    assert notebooks.together(["A = 1", "B = 2", function, "C = 3", table, "D = 4"]) == [
        "A = 1\nB = 2",
        function,
        "C = 3",
        table,
        "D = 4",
    ]


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
        ("from utils.nowhere import lowest", "utils.nowhere, which is no module of the package"),
    ],
)
def test_bad_weave_cells_are_refused(source, message):
    with pytest.raises(CompanionError, match=message):
        notebooks.weave_cell(source, {})


def test_weaving_does_not_wait_for_torch():
    program = (
        "import sys; from utils import notebooks; notebooks.weave('05_tensor_decomposition'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=catalogue.ROOT).returncode == 0


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
    return path


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


def test_cells_have_ids_that_change_only_with_their_section(lesson):
    before = {cell.id: cell.source for cell in notebooks.weave("09_made_up").cells}
    assert {"opening-000", "1-000", "2-000", "what-to-remember-001"} <= set(before)
    lesson.write_text(LESSON.replace("Words.", "Words.\n\n+++\n\nMore words."))
    after = {cell.id: cell.source for cell in notebooks.weave("09_made_up").cells}
    changed = {id for id in before | after if before.get(id) != after.get(id)}
    assert changed and all(id.startswith("opening-") for id in changed)
    assert [cell.id for cell in notebooks.weave("09_made_up", ("2",)).cells if cell.id.startswith("2-")] == [
        id for id in after if id.startswith("2-")
    ]


def test_core_does_not_count_on_what_an_extra_cell_imported(lesson):
    weave = "```{code-cell} python\n:tags: [weave]\nfrom utils.pruning.masks import lowest\n```\n"
    text = f"# 09\n\n## 1 First\n\n### A\n<!-- extra -->\n\n{weave}\n### B\n\n{weave}\n### C\n<!-- extra -->\n\n{weave}"
    lesson.write_text(text)
    imports = [cell.metadata["tags"] for cell in notebooks.weave("09").cells if "woven-imports" in cell.metadata.get("tags", [])]
    assert imports == [["woven-imports", "extra"], ["woven-imports"]]  # A for itself, B for core, C needs none any more
    assert notebooks.undefined_names(notebooks.weave("09", track="core")) == []


def test_woven_cells_can_be_folded_away(lesson):
    lesson.write_text(LESSON.replace(":tags: [weave]", ":tags: [weave, hide-input]", 1))
    cells = [cell for cell in notebooks.weave("09_made_up").cells if "hide-input" in cell.metadata.get("tags", [])]
    assert len(cells) == 3 and all(cell.metadata["jupyter"] == {"source_hidden": True} for cell in cells)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# 09\n\n<!-- extra -->\n\n## 1 First\n", "directly under a heading"),
        ("# 09\n\n## 1 First\n\n<!-- extra -->\n\nWords.\n", "directly under a heading"),
        ("# 09\n\n## 1 First\n\nWords.\n\n## 1 Again\n", "two sections have the key '1'"),
    ],
)
def test_lessons_that_would_mean_something_else_are_refused(lesson, text, message):
    lesson.write_text(text)
    with pytest.raises(CompanionError, match=message):
        notebooks.weave("09")


def test_headings_inside_fences_are_no_headings():
    text = "Before.\n```text\n## no\n```\n~~~~\n```\n## no\n~~~\n## no\n~~~~\n## 1 Yes\nWords.\n### Yes\n#### no\n"
    cells = list(notebooks.split_at_headings([nbformat.v4.new_markdown_cell(text)]))
    assert [cell.source.splitlines()[0] for cell in cells] == ["Before.", "## 1 Yes", "### Yes"]
    assert "\n".join(cell.source for cell in cells) == text.strip()


def test_keys_of_sections():
    keys = [notebooks.section_key(title) for title in ("3 Pruning while training", "How to read the board", "12", "What, then?")]
    assert keys == ["3", "how-to-read-the-board", "12", "what-then"]


def test_the_core_copy_keeps_outputs(lesson, tmp_path):
    notebook = notebooks.weave("09_made_up")
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [nbformat.v4.new_output("stream", text=str(number))]
    nbformat.write(notebook, tmp_path / "whole.ipynb")
    notebooks.core_copy(tmp_path / "whole.ipynb", tmp_path / "core.ipynb")
    copy = nbformat.read(tmp_path / "core.ipynb", as_version=4)
    assert notebooks.same_cells(copy, notebooks.weave("09_made_up", track="core"))
    assert all(cell.outputs for cell in copy.cells if cell.cell_type == "code")


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


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("def f(x):\n    return [y + z for y in x]\nw = f(v)", {"z", "v"}),
        ("def f():\n    return g()\ndef g():\n    return h", {"h"}),  # functions may call what the cell defines later
        ("a = b\nb = 1", {"b"}),  # a statement may not
        ("count = count + 1", {"count"}),
        ("total += 1", {"total"}),
        ("class A(B):\n    x = y\n    def m(self):\n        return self.x + z", {"B", "y", "z"}),
        ("for i in range(3):\n    last = i\nprint(last, i)", set()),
        ("if (n := 3) > 2:\n    print(n)\nm = (k := 1) + k", set()),
        ("x = {k: f'{v}' if (v := k) else w for k in range(3)}\ndef g():\n    return (u := 1) + v\nu", {"w", "u"}),
        ("import os.path as p, sys\nfrom json import loads as l\np, sys, l, os", {"os"}),
        ("f = lambda x, y=d: x + y + u", {"d", "u"}),
        ("from m import a\ntry:\n    a()\nexcept a.E as e:\n    print(e)", set()),
    ],
)  # fmt: skip
def test_names_that_a_cell_takes_from_elsewhere(source, missing):
    assert notebooks.undefined_in(source, set(dir(builtins))) == missing


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
    assert notebooks.check_chapters(["01"]) == notebooks.check_chapters(["01", "01_pruning"]) == ["01_pruning"]
    assert notebooks.check_chapters([]) == CHAPTERS
