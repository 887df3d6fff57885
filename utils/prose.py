"""What can be counted about a lesson: readings after rows, lengths of cells and lines, sections that say where they begin, symbols
that are explained, alt texts.

`companion lint` prints what is wrong.
"""

import ast
import re

import nbformat

from utils import notebooks
from utils.catalogue import ROOT

LINES, FIGURE_LINES, COLUMNS = 25, 40, 120
NOTATION = ROOT / "lessons" / "notation.md"
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]*`|\\\$", re.DOTALL)  # a dollar in it begins no formula
WORDS = re.compile(r"\\(?:text|mathrm|operatorname)\{[^}]*\}|\\(?:begin|end)\{\w+\}")
LETTER = r"\\[A-Za-z]+|[A-Za-z]"
SYMBOL = re.compile(
    rf"(?P<base>\\(?:mathcal|mathbf|mathbb|hat|bar|tilde)\s*(?:\{{(?:{LETTER}|\d)\}}|{LETTER}|\d)|{LETTER})"
    rf"(?:_(?:\{{(?P<group>(?:[^{{}}]|\{{[^{{}}]*\}})*)\}}|(?P<one>{LETTER}|[^\s{{}}\\])))?"
)
# What LaTeX writes with a backslash and is no symbol of ours: operators, functions, relations, brackets, spaces.
OPERATORS = frozenset(re.findall(r"\\\w+", r"""
    \frac \tfrac \dfrac \sqrt \sum \prod \min \max \arg \log \exp \Pr \in \notin \approx \sim \cdot \times \top \partial \bmod
    \pm \ne \neq \le \leq \ge \geq \infty \leftarrow \rightarrow \to \mapsto \propto \mid \ldots \cdots \dots \lfloor \rfloor \lceil
    \rceil \langle \rangle \lvert \rvert \lVert \rVert \left \right \big \Big \bigg \Bigg \quad \qquad \text \underbrace \overbrace
    \mathbf \mathcal \mathbb \hat \bar \tilde"""))  # fmt: skip


def problems(chapter: str) -> list[str]:
    """Everything that this page counts, for one chapter's lesson and its committed notebook."""
    woven = notebooks.weave(chapter)
    found = [
        *long_cells(woven),
        *unread_rows(woven),
        *open_claims(woven),
        *silent_sections(woven),
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
        limit = FIGURE_LINES if {"figure", "woven"} & set(tags(cell)) else LINES
        lines = cell.source.splitlines()
        if cell.cell_type == "code" and len(lines) > limit:
            found.append(f"a cell has {len(lines)} lines, at most {limit} are allowed: {lines[0][:60]}")
    return found


def unread_rows(notebook: nbformat.NotebookNode) -> list[str]:
    """Cells that put a row and are followed by no reading: a sentence of text, a cell tagged `reading`, or a comparison printed."""
    code = [cell for cell in notebook.cells if cell.source.strip()]
    return [f"the row of this cell is not read: {cell.source.splitlines()[0][:60]}"
            for cell, following in zip(code, [*code[1:], None], strict=True)
            if cell.cell_type == "code" and puts_row(cell.source) and not is_reading(cell, following)]  # fmt: skip


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


def silent_sections(notebook: nbformat.NotebookNode) -> list[str]:
    """Sections whose code acts on the board, or draws random numbers, before `board.section` names the section and seeds it."""
    found = []
    for section in notebooks.sections(notebook)[1:]:
        plain = [cell.source for cell in notebook.cells[section.first : section.last]
                 if cell.cell_type == "code" and not any(tag.startswith("woven") for tag in tags(cell))]  # fmt: skip
        code = "\n".join(plain).replace("board.close()", "")
        before = code.partition(f'board.section("{section.key}")')[0]  # all of it, where the section is never named
        if "board." in code and ("board." in before or "torch.rand" in before):
            found.append(f'section {section.key} does not begin with board.section("{section.key}")')
    return found


def unknown_symbols(notebook: nbformat.NotebookNode) -> list[str]:
    """Symbols in formulas that lessons/notation.md does not explain."""
    explained, indices = notation()
    used = set().union(*(symbols(cell.source, indices) for cell in notebook.cells if cell.cell_type == "markdown"))
    return [f"the symbol {symbol} is not explained in lessons/notation.md" for symbol in sorted(used - explained)]


def notation() -> tuple[set[str], set[str]]:
    """The symbols in the first column of the page's tables, and the letters that its opening paragraph calls indices."""
    opening, _, tables = NOTATION.read_text(encoding="utf-8").partition("\n## ")
    indices = symbols(opening.partition("Indices:")[2], set())
    first_cells = (line.split("|")[1] for line in tables.splitlines() if line.startswith("|"))
    return symbols("\n".join(first_cells), indices), indices


def symbols(text: str, indices: set[str]) -> set[str]:
    """The symbols of a text's formulas, without words, operators, indices and numbers.

    A letter with a name below it, such as `n_p`, is a symbol of its own. A letter with nothing but indices and numbers below it is that
    letter. Of anything longer, such as the range of a sum, the parts count.
    """
    formulas = (display or inline for display, inline in MATH.findall(CODE.sub(" ", text)))
    return set().union(*(symbols_of(WORDS.sub(" ", formula), indices) for formula in formulas)) - indices


def symbols_of(formula: str, indices: set[str]) -> set[str]:
    """The symbols of one formula in LaTeX; see `symbols`."""
    found: set[str] = set()
    for match in SYMBOL.finditer(formula):
        below = match["group"] or match["one"] or ""
        parts = symbols_of(below, indices)
        base = " ".join(re.findall(r"\\[A-Za-z]+|\w", match["base"]))
        if base in OPERATORS:
            found |= parts
        elif below.strip() in parts - indices or below in ("+", "-"):
            found.add(f"{base}_{below.strip()}")
        else:
            found |= {base} | (parts - indices)
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
