"""The lint counts what it says it counts."""

import nbformat
import pytest

from utils import catalogue, prose

CODE, TEXT = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell


def notebook(*cells) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=list(cells))


@pytest.mark.parametrize("chapter", catalogue.chapters())
def test_the_lessons_are_clean(chapter):
    assert prose.problems(chapter) == []


@pytest.mark.parametrize(("tag", "limit"), [("", 25), ("figure", 40), ("woven", 40)])
def test_long_cells(tag, limit):
    metadata = {"tags": [tag]} if tag else {}
    assert prose.long_cells(notebook(CODE("x = 1\n" * limit, metadata=metadata))) == []
    assert len(prose.long_cells(notebook(CODE("x = 1\n" * limit + "y = 2", metadata=metadata)))) == 1


ROW = 'board.put(trial, "P-03", "half")'


@pytest.mark.parametrize(
    ("cells", "unread"),
    [
        ((CODE(ROW), TEXT("It lost two points.")), 0),
        ((CODE(ROW), CODE("print(1)", metadata={"tags": ["reading"]})), 0),
        ((CODE(ROW + '\nprint(board.compare("half", "other"))'),), 0),
        ((CODE(ROW), TEXT("## Next")), 1),
        ((CODE(ROW),), 1),
        ((CODE('row("Q-01", "sign")'), CODE("x = 1")), 1),
        ((CODE(f"def later():\n    {ROW}"),), 0),
        ((CODE(f"for x in y:\n    {ROW}"), CODE("x = 1")), 1),
    ],
)
def test_rows_want_a_reading(cells, unread):
    assert len(prose.unread_rows(notebook(*cells), 0)) == unread
    if unread:
        assert prose.unread_rows(notebook(*cells), 1) == []
    else:
        assert "lower WITHOUT_READING from 2" in prose.unread_rows(notebook(*cells), 2)[0]


def test_claims_hide_their_plumbing():
    source = 'board.claim("C1", "x", "y", "seed", [])'
    assert prose.open_claims(notebook(CODE(source, metadata={"tags": ["hide-input"]}))) == []
    assert len(prose.open_claims(notebook(CODE(source)))) == 1


def test_symbols_must_be_explained():
    assert prose.unknown_symbols(notebook(TEXT(r"With $d$ and $\mathbf{H}$: $$\frac12 \mathrm{onorm}_i$$"))) == []
    found = prose.unknown_symbols(notebook(TEXT(r"Now $\Xi$ and $$\mathcal{Z} + y$$ cost 5 $ and 6 dollars.")))
    assert [line.removeprefix("the symbol ").partition(" is not")[0] for line in found] == ["\\Xi", "\\mathcal Z", "y"]


def test_outputs_fit_and_images_speak():
    output = nbformat.v4.new_output
    wide = CODE("x", outputs=[output("stream", text="y" * 121)])
    mute = CODE("x", outputs=[output("display_data", data={"image/png": "AA=="})])
    spoken = CODE("x", outputs=[output("display_data", data={"image/png": "AA=="}, metadata={"image/png": {"alt": "words"}})])
    assert len(prose.bad_outputs(notebook(wide))) == len(prose.bad_outputs(notebook(mute))) == 1
    assert prose.bad_outputs(notebook(spoken, CODE("x", outputs=[output("stream", text="y" * 120)]))) == []
