"""The lint counts what it says it counts."""

import re

import nbformat
import pytest

from utils import catalogue, prose

CODE, TEXT = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell


def notebook(*cells) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=list(cells))


@pytest.mark.parametrize("chapter", catalogue.chapters())
def test_the_lessons_are_clean(chapter):
    assert prose.problems(chapter) == []


def test_every_rule_reports_to_the_command(monkeypatch):
    source = "x = 1\n" * 25 + 'board.put(trial, "P-03", "half")\nboard.claim("C1")'
    output = nbformat.v4.new_output("stream", text="y" * 121)
    bad = notebook(TEXT("## 1 First"), CODE(source, outputs=[output]), CODE("x = 1"), TEXT(r"$\Xi$"))
    monkeypatch.setattr(prose.notebooks, "weave", lambda chapter: bad)
    monkeypatch.setattr(prose.notebooks, "stale", dict)
    monkeypatch.setattr(prose.nbformat, "read", lambda path, as_version: bad)
    assert len(prose.problems("01_pruning")) == 6
    monkeypatch.setattr(prose.notebooks, "stale", lambda: {"01_pruning": "the rerun is due"})
    assert len(prose.problems("01_pruning")) == 5


@pytest.mark.parametrize(("tag", "limit"), [("", 25), ("hide-input", 25), ("figure", 40), ("woven", 40)])
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
    assert len(prose.unread_rows(notebook(*cells))) == unread


def test_claims_hide_their_plumbing():
    source = 'board.claim("C1", "x", "y", "seed", [])'
    assert prose.open_claims(notebook(CODE(source, metadata={"tags": ["hide-input"]}))) == []
    assert len(prose.open_claims(notebook(CODE(source)))) == 1


@pytest.mark.parametrize(
    ("code", "silent"),
    [
        (('board.section("1")\nboard.fresh()',), 0),
        (("w = 3", 'board.section("1")\nboard.fresh()'), 0),
        (("w = 3",), 0),
        (("board.close()",), 0),
        (("board.fresh()",), 1),
        (('board.section("2")\nboard.fresh()',), 1),
        (("board.fresh()", 'board.section("1")'), 1),
        (("torch.rand(3)", 'board.section("1")'), 1),
    ],
)
def test_sections_say_where_they_begin(code, silent):
    woven = CODE("def f(board):\n    board.put(1)", metadata={"tags": ["woven"]})
    cells = [TEXT("Opening."), CODE("board = open()"), TEXT("## 1 First"), woven, *map(CODE, code)]
    assert len(prose.silent_sections(notebook(*cells))) == silent


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (r"n_p + \tfrac12 N_+ / W_-", {"n_p", "N_+", "W_-"}),
        (r"w_{ij} h_{ii} r_{j-1} i_0 \mathcal{L}_j", {"w", "h", "r", r"\mathcal L"}),
        (r"\sum_{k=1}^N x \, \ell_{2,1}", {"k", "N", "x", r"\ell"}),
        (
            r"\hat{\theta} \hat v_i \mathbf{H}v \mathbb{1} \bar\xi",
            {r"\hat \theta", r"\hat v", r"\mathbf H", "v", r"\mathbb 1", r"\bar \xi"},
        ),
        (r"\mathrm{onorm}_i \text{words} \operatorname{rank} \begin{cases} \log_2 \end{cases}", set()),
        (r"\Pi_{\|\cdot\|_1 \le \eta\lambda}(x_{\text{in}})", {r"\Pi", r"\eta", r"\lambda", "x"}),
    ],
)
def test_the_tokenizer_reads_latex(formula, expected):
    assert prose.symbols(f"Here ${formula}$ and $$\n{formula}\n$$", {"i", "j"}) == expected


def test_dollars_that_begin_no_formula():
    assert prose.symbols("Set `$HOME` and `$PATH`, pay \\$5 or \\$y.\n```bash\necho $Z $Z\n```\n", set()) == set()


def test_symbols_must_be_explained(monkeypatch, tmp_path):
    page = "# Notation\nIn $Y$. Indices: $i$.\n\n## Model\n| Symbol | Meaning |\n|---|---|\n| $d$, $n_p$ | not $z$, but $d_z$ |\n"
    monkeypatch.setattr(prose, "NOTATION", tmp_path / "notation.md")
    prose.NOTATION.write_text(page)
    assert (
        prose.unknown_symbols(notebook(TEXT(r"With $d_i$, $n_p$ and $i$: $$\frac12 \sum_i \mathrm{onorm}_i$$"), CODE("'$y$'")))
        == []
    )
    found = prose.unknown_symbols(notebook(TEXT(r"Now $\Xi$, $d_z$, $n$, $Y$ and $$z$$ cost 5 $ and 6 dollars.")))
    assert [line.removeprefix("the symbol ").partition(" is not")[0] for line in found] == ["Y", "\\Xi", "d_z", "n", "z"]


def test_names_on_the_page_of_symbols_exist_in_the_code():
    paths = [*(catalogue.ROOT / "utils").rglob("*.py"), *map(catalogue.lesson_path, catalogue.chapters())]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    written = {chapter[:2] for chapter in catalogue.chapters()} | {"all"}
    rows = [line.split("|") for line in prose.NOTATION.read_text(encoding="utf-8").splitlines() if line.startswith("| $")]
    names = {name for row in rows if written & set(re.findall(r"\w+", row[4])) for name in re.findall(r"`(\w+)", row[3])}
    assert len(names) > 40 and [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


def test_outputs_fit_and_images_speak():
    output = nbformat.v4.new_output
    wide = CODE("x", outputs=[output("stream", text="y" * 121)])
    mute = CODE("x", outputs=[output("display_data", data={"image/png": "AA=="})])
    spoken = CODE("x", outputs=[output("display_data", data={"image/png": "AA=="}, metadata={"image/png": {"alt": "words"}})])
    assert len(prose.bad_outputs(notebook(wide))) == len(prose.bad_outputs(notebook(mute))) == 1
    assert prose.bad_outputs(notebook(spoken, CODE("x", outputs=[output("stream", text="y" * 120)]))) == []
