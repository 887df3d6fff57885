"""What can be counted about a lesson: readings after rows, lengths of cells and lines, symbols that are explained, alt texts.

`companion lint` prints what is wrong. Chapters written before this page stand on lists that only shrink.
"""

import ast
import re

import nbformat

from utils import notebooks
from utils.catalogue import ROOT

LINES, FIGURE_LINES, COLUMNS = 25, 40, 120
NOTATION = ROOT / "lessons" / "notation.md"
WITHOUT_READING = {"00_bert_baseline": 1, "01_pruning": 12, "02_quantization": 19}  # cells with rows that nobody reads yet
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
FUNCTIONS = re.compile(  # what LaTeX writes with a backslash and is no symbol of ours
    "t?frac|sum|min|max|log|text|underbrace|big|Big|odot|q?quad|lfloor|rfloor|sqrt|langle|rangle|leftarrow|in|approx|cdot|times|top|"
    "partial|math(rm|bf|cal|bb)|hat|bmod|pm|ne|le|ge|begin|end|cases|clip|sign|std|mean|infty|bar"
)
SYMBOL = re.compile(r"\\(?:mathcal|mathbf|mathbb|hat)\s*\{?\\?[A-Za-z0-9]\}?|\\hat v|\\[A-Za-z]+|[A-Za-z]")


def problems(chapter: str) -> list[str]:
    """Everything that this page counts, for one chapter's lesson and its committed notebook."""
    woven = notebooks.weave(chapter)
    found = [
        *long_cells(woven),
        *unread_rows(woven, WITHOUT_READING.get(chapter, 0)),
        *open_claims(woven),
        *unknown_symbols(woven),
    ]
    committed = notebooks.NOTEBOOKS / f"{chapter}.ipynb"
    if chapter not in notebooks.stale() and committed.is_file():
        found += bad_outputs(nbformat.read(committed, as_version=4))
    return found


def tags(cell: nbformat.NotebookNode) -> list[str]:
    """A cell's tags."""
    return cell.metadata.get("tags", [])


def long_cells(notebook: nbformat.NotebookNode) -> list[str]:
    """Code cells of more than 25 lines; figures and woven definitions may have 40."""
    found = []
    for cell in notebook.cells:
        limit = FIGURE_LINES if {"figure", "woven", "hide-input"} & set(tags(cell)) else LINES
        lines = cell.source.splitlines()
        if cell.cell_type == "code" and len(lines) > limit:
            found.append(f"a cell has {len(lines)} lines, at most {limit} are allowed: {lines[0][:60]}")
    return found


def unread_rows(notebook: nbformat.NotebookNode, allowed: int) -> list[str]:
    """Cells that put a row and are followed by no reading: a sentence of text, a cell tagged `reading`, or a comparison printed."""
    code = [cell for cell in notebook.cells if cell.source.strip()]
    unread = [cell for cell, following in zip(code, [*code[1:], None], strict=True)
              if cell.cell_type == "code" and puts_row(cell.source) and not is_reading(cell, following)]  # fmt: skip
    if len(unread) > allowed:
        return [
            f"{len(unread)} cells put rows without a reading, {allowed} are still excused; the last: {unread[-1].source.splitlines()[0][:60]}"
        ]
    if len(unread) < allowed:
        return [f"only {len(unread)} cells put rows without a reading: lower WITHOUT_READING from {allowed}"]
    return []


def puts_row(source: str) -> bool:
    """Whether a cell calls `board.put` or the lesson's `row` outside a function of its own."""
    calls = (node for statement in ast.parse(source).body if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
             for node in ast.walk(statement) if isinstance(node, ast.Call))  # fmt: skip
    return any(ast.unparse(call.func) in ("board.put", "row") for call in calls)


def is_reading(cell: nbformat.NotebookNode, following: nbformat.NotebookNode | None) -> bool:
    """Whether a reader is told what a cell's rows mean, by the cell itself or by the next one."""
    if "board.compare(" in cell.source or (following is not None and "reading" in tags(following)):
        return True
    return following is not None and following.cell_type == "markdown" and not following.source.startswith("#")


def open_claims(notebook: nbformat.NotebookNode) -> list[str]:
    """Claims whose plumbing is not hidden."""
    return [f"the claim in this cell needs the tag hide-input: {cell.source.splitlines()[0][:60]}" for cell in notebook.cells
            if cell.cell_type == "code" and "board.claim(" in cell.source and "hide-input" not in tags(cell)]  # fmt: skip


def unknown_symbols(notebook: nbformat.NotebookNode) -> list[str]:
    """Symbols in formulas that lessons/notation.md does not explain."""
    explained = symbols(NOTATION.read_text(encoding="utf-8"))
    used = set().union(*(symbols(cell.source) for cell in notebook.cells if cell.cell_type == "markdown"))
    return [f"the symbol {symbol} is not explained in lessons/notation.md" for symbol in sorted(used - explained)]


def symbols(text: str) -> set[str]:
    """The letters of a text's formulas, words in them left out."""
    found: set[str] = set()
    for display, inline in MATH.findall(text):
        formula = re.sub(r"\\(?:text|mathrm)\{[^}]*\}|\\(?:begin|end)\{\w+\}", " ", display or inline)
        for symbol in SYMBOL.findall(formula):
            name = symbol.lstrip("\\")
            if not FUNCTIONS.fullmatch(name):
                found.add(symbol.replace("{", " ").replace("}", "").replace("  ", " "))
    return found


def bad_outputs(notebook: nbformat.NotebookNode) -> list[str]:
    """Printed lines of more than 120 columns, and images without a description."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            wide = [line for line in output.get("text", "").splitlines() if len(line) > COLUMNS]
            found += [f"a printed line has {len(line)} columns, at most {COLUMNS} are allowed: {line[:60]}" for line in wide]
            if "image/png" in output.get("data", {}) and not output.metadata.get("image/png", {}).get("alt"):
                found.append(f"an image has no alt text: {cell.source.splitlines()[0][:60]}")
    return found
