"""Notebooks are built, never edited: woven from a lesson and the package's source (`utils.run` executes them).

A lesson cell tagged `weave` is a plain import; in the notebook it becomes the source of the imported names, one definition per
cell, so that a learner can change a method in place and rerun it. The code still exists only once. Every `##` section stands
alone: it uses what the opening defines and what it defines itself. A line `<!-- extra -->` under a heading puts a section on the
track `extra`, which a short class leaves out.
"""

import ast
import builtins
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat

from utils import CompanionError, catalogue
from utils.catalogue import ROOT, lesson_path
from utils.needs import judges_over_seeds, names_of, needed, undefined_in

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
NOTEBOOKS = ROOT / "notebooks"


def check_chapters(names: list[str]) -> list[str]:
    """The named chapters (all, where none is named; a prefix such as `01` will do). Raises CompanionError for an unknown one."""
    known = catalogue.chapters()
    found = []
    for name in names:
        matching = [chapter for chapter in known if chapter.startswith(name)]
        if len(matching) != 1:
            raise CompanionError(f"unknown chapter {name!r}: choose from {', '.join(known)}")
        found += matching
    return list(dict.fromkeys(found)) or known


# --- weave ----------------------------------------------------------------------------------------------------------

HEADING = re.compile(r"^#{2,3} ")
TRACK = re.compile(r"^<!-- (core|extra) -->$")
FENCE = re.compile(r"`{3,}|~{3,}")
OPENING = "opening"
TRACKS = ("all", "core", "claims")


@dataclass(frozen=True)
class Section:
    """A `##` section of a notebook: its key (the heading's number, else its words), its title, and its cells `[first, last)`."""

    key: str
    title: str
    first: int
    last: int


def weave(chapter: str, sections: tuple[str, ...] = (), track: str = "all") -> nbformat.NotebookNode:
    """Build a chapter's notebook, without outputs, from its lesson and the code. The result depends on nothing else.

    With `sections` only those, between the opening and the closing one; with `track="core"` without the cells tagged `extra`, with
    `track="claims"` what the claims over seeds take, and no row beside.
    Raises CompanionError for a section or track that does not exist, and where a chapter has no claim over seeds.
    """
    lesson = jupytext.read(lesson_path(chapter), fmt="md:myst")
    known: dict[str, dict[str, str]] = {"core": {}, "extra": {}}  # per track: name -> where it was imported or woven from
    opening, cells, marks = None, [], {"## ": "core", "### ": "core"}
    for cell in split_at_headings(lesson.cells):
        if cell.cell_type == "markdown":
            if cell.source.startswith("## "):  # every section starts afresh from the opening
                opening = known["core"] if opening is None else opening
                known = {"core": dict(opening), "extra": dict(opening)}
            marks, cell.source = read_track(cell.source, marks)
        tags = list(cell.metadata.get("tags", [])) + ["extra"] * (marks["### "] == "extra")
        before = dict(known["core"])
        cells += woven_cells(cell, tags, known[marks["### "]])
        known["extra"] |= dict(known["core"].items() - before.items())  # not the other way: core must do without extra
    metadata = {
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
        "companion": {"lesson": f"lessons/{chapter}/{chapter}.md"},
    }
    if track == "claims" and not judging(lesson):
        raise CompanionError(f"{chapter} judges no claim over seeds: its track claims is empty")
    return choose(name_cells(nbformat.v4.new_notebook(cells=cells, metadata=metadata)), sections, track)


def has_claims_over_seeds(chapter: str) -> bool:
    """Whether a lesson judges a claim over seeds."""
    return judging(jupytext.read(lesson_path(chapter), fmt="md:myst"))


def judging(lesson: nbformat.NotebookNode) -> bool:
    """Whether a lesson that has been read does so."""
    return any(judges_over_seeds(cell.source) for cell in lesson.cells if cell.cell_type == "code")


def name_cells(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Ids that change only where a section changes: its key and a running number. CompanionError where two sections share a key."""
    found = sections(notebook)
    for section in found:
        if sum(other.key == section.key for other in found) > 1:
            raise CompanionError(f"two sections have the key {section.key!r}: number their headings differently")
        for number, cell in enumerate(notebook.cells[section.first : section.last]):
            cell.id = f"{section.key[:56]}-{number:03d}"
    return notebook


def split_at_headings(cells: list[nbformat.NotebookNode]) -> Iterator[nbformat.NotebookNode]:
    """Markdown cells cut so that every `##` and `###` heading begins one; code cells as they are."""
    for cell in cells:
        if cell.cell_type != "markdown":
            yield cell
            continue
        pieces, fence = [[]], ""
        for line in cell.source.splitlines():
            mark = FENCE.match(line.strip())
            if mark and not fence:
                fence = mark[0]
            elif mark and line.strip() == mark[0] and mark[0].startswith(fence):  # closed by as many of the same sign, or more
                fence = ""
            if HEADING.match(line) and not fence and pieces[-1]:
                pieces.append([])
            pieces[-1].append(line)
        for lines in pieces:
            if any(line.strip() for line in lines):
                yield nbformat.v4.new_markdown_cell("\n".join(lines).strip("\n"), metadata=dict(cell.metadata))


def read_track(source: str, before: dict[str, str]) -> tuple[dict[str, str], str]:
    """The tracks of section and subsection after a Markdown cell, and the cell without its marker.

    Raises CompanionError for a marker that does not stand directly under a heading.
    """
    first, *rest = source.splitlines() or [""]
    marked = TRACK.match(rest[0]) if rest and HEADING.match(first) else None
    rest = rest[1:] if marked else rest
    if any(TRACK.match(line) for line in [first, *rest]):
        raise CompanionError(f"a track marker must stand directly under a heading, not in: {source[:80]!r}")
    tracks = before
    if first.startswith("## "):
        track = marked[1] if marked else "core"
        tracks = {"## ": track, "### ": track}
    elif first.startswith("### "):
        tracks = {**before, "### ": marked[1] if marked else before["## "]}
    return tracks, "\n".join([first, *rest])


def woven_cells(cell: nbformat.NotebookNode, tags: list[str], seen: dict[str, str]) -> list[nbformat.NotebookNode]:
    """The notebook cells of one lesson cell: itself, or one per woven definition. A hidden input stays in the notebook, folded."""
    hidden = {"jupyter": {"source_hidden": True}} if "hide-input" in tags and cell.cell_type == "code" else {}
    metadata = {**({"tags": tags} if tags else {}), **hidden}
    if cell.cell_type == "markdown":
        return [nbformat.v4.new_markdown_cell(cell.source, metadata=metadata)]
    if "weave" not in tags:
        _note_imports(ast.parse(cell.source), seen)
        return [nbformat.v4.new_code_cell(cell.source, metadata=metadata)]
    rest = [tag for tag in tags if tag != "weave"]
    imports, blocks = weave_cell(cell.source, seen)
    sources = [(imports, "woven-imports")] * bool(imports) + [(block, "woven") for block in blocks]
    return [nbformat.v4.new_code_cell(source, metadata={**metadata, "tags": [tag, *rest]}) for source, tag in sources]


def weave_cell(source: str, seen: dict[str, str]) -> tuple[str, list[str]]:
    """For `from module import a, b`: the imports that their sources need, and the source of each definition."""
    statements = ast.parse(source).body
    plain = [isinstance(node, ast.ImportFrom) and not any(alias.asname for alias in node.names) for node in statements]
    if not plain or not all(plain):
        raise CompanionError(f"a weave cell may hold `from module import names` only, without `as`, got: {source[:80]!r}")
    wanted = [(node.module, [alias.name for alias in node.names]) for node in statements]
    seen |= {name: f"{module}:{name}" for module, names in wanted for name in names}
    imports, blocks = [], []
    for module, names in wanted:
        path = source_file(module)
        if path is None:
            raise CompanionError(f"a lesson weaves from {module}, which is no module of the package")
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        segments = list(dict.fromkeys(_definition(tree, text, name, module) for name in names))
        imports += _needed_imports(tree, "\n".join(segments), module, seen)
        blocks += [f"# source: {path.relative_to(ROOT)}\n{segment}" for segment in together(segments)]
    return "\n".join(_sorted(imports)), blocks


def source_file(module: str) -> Path | None:
    """The file of a module of this project, found without an import: what it imports may take seconds. None for any other name."""
    place = ROOT.joinpath(*module.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def together(segments: list[str]) -> list[str]:
    """Constants of a line or two share a cell; everything else has its own."""
    cells: list[str] = []
    sharing = False
    for segment in segments:
        small = not segment.startswith(("def ", "class ", "@")) and segment.count("\n") < 2
        if small and sharing:
            cells[-1] += f"\n{segment}"
        else:
            cells.append(segment)
        sharing = small
    return cells


def _sorted(imports: list[str]) -> list[str]:
    """One line per module, in the usual order: `import x`, then third party, then our own."""
    merged: dict[str, list[str]] = {}
    for line in dict.fromkeys(imports):
        head, found, name = line.partition(" import ")
        merged.setdefault(f"{head} import " if found else line, []).append(name)
    lines = [head + ", ".join(sorted(filter(None, names))) for head, names in merged.items()]
    return sorted(lines, key=lambda line: (line.startswith("from utils"), line.startswith("from"), line))


def _definition(tree: ast.Module, text: str, name: str, module: str) -> str:
    """The source of a top-level function, class or constant, with its decorators, its docstrings folded."""
    for node in tree.body:
        if name in _bound_names(node) and not isinstance(node, ast.Import | ast.ImportFrom):
            return fold_docstrings(node, text.splitlines())
    raise CompanionError(f"{module} defines no {name}: a lesson weaves what is not there")


def fold_docstrings(node: ast.stmt, lines: list[str]) -> str:
    """A definition's source with each docstring cut to its first paragraph: the lesson around it says the rest.

    Where cutting would change more than the docstrings, the source stays whole.
    """
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    new: dict[int, str | None] = {}  # line number -> its text, None where it goes
    for inner in ast.walk(node):
        documented = isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner, clean=False)
        if documented and "\n\n" in documented:
            literal = inner.body[0].value
            gap = next((n for n in range(literal.lineno, literal.end_lineno) if not lines[n - 1].strip()), literal.end_lineno)
            new |= {gap - 1: lines[gap - 2] + '"""'} | dict.fromkeys(range(gap, literal.end_lineno + 1))
    numbers = range(first, node.end_lineno + 1)
    whole = "\n".join(lines[n - 1] for n in numbers)
    folded = "\n".join(text for text in (new.get(n, lines[n - 1]) for n in numbers) if text is not None)
    return folded if code_of(folded) == code_of(whole) else whole


def code_of(source: str) -> str | None:
    """The syntax tree of a source without its docstrings; None where it does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False):
            node.body[0].value.value = ""
    return ast.dump(tree)


def _bound_names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _needed_imports(tree: ast.Module, segment: str, module: str, seen: dict[str, str]) -> list[str]:
    used = {node.id for node in ast.walk(ast.parse(segment)) if isinstance(node, ast.Name)}
    needed = []
    for node in tree.body:
        for name in sorted(_bound_names(node) & used):
            if isinstance(node, ast.Import | ast.ImportFrom):
                alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
                line, origin = _import_line(node, alias)
            else:
                line, origin = f"from {module} import {name}", f"{module}:{name}"
            if seen.get(name) != origin:
                needed.append(line)
                seen[name] = origin
    return needed


def _import_line(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> tuple[str, str]:
    renamed = f" as {alias.asname}" if alias.asname else ""
    if isinstance(node, ast.Import):
        return f"import {alias.name}{renamed}", alias.name
    return f"from {node.module} import {alias.name}{renamed}", f"{node.module}:{alias.name}"


def _note_imports(tree: ast.Module, seen: dict[str, str]) -> None:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                seen[alias.asname or alias.name.split(".")[0]] = _import_line(node, alias)[1]


def same_cells(first: nbformat.NotebookNode, second: nbformat.NotebookNode) -> bool:
    """Whether two notebooks have the same cells, outputs and papermill's injected parameters aside."""

    def content(notebook: nbformat.NotebookNode) -> list[tuple]:
        cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        return [(cell.cell_type, cell.source, tuple(cell.metadata.get("tags", []))) for cell in cells]

    return content(first) == content(second)


def out_of_step(chapter: str) -> str | None:
    """Why the committed notebook does not match its lesson and the code, or None where it does."""
    path = NOTEBOOKS / f"{chapter}.ipynb"
    if not path.is_file():
        return f"{path.relative_to(ROOT)} does not exist"
    if not same_cells(nbformat.read(path, as_version=4), weave(chapter)):
        return f"{path.relative_to(ROOT)} is out of step with its lesson or the code"
    return None


def stale() -> dict[str, str]:
    """Chapters whose committed notebook awaits a rerun, with the reason (`notebooks/STALE.json`, absent where there is none)."""
    path = NOTEBOOKS / "STALE.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# --- sections -------------------------------------------------------------------------------------------------------


def section_key(title: str) -> str:
    """`3 Pruning while training` is `3`; `How to read the board` is `how-to-read-the-board`."""
    number = re.match(r"\d+", title)
    return number[0] if number else "-".join(re.findall(r"[a-z0-9]+", title.lower()))


def sections(notebook: nbformat.NotebookNode) -> list[Section]:
    """The opening and the `##` sections of a notebook, in order."""
    starts = [(0, OPENING)] + [(i, cell.source.splitlines()[0][3:].strip()) for i, cell in enumerate(notebook.cells)
                               if cell.cell_type == "markdown" and cell.source.startswith("## ")]  # fmt: skip
    ends = [first for first, _ in starts[1:]] + [len(notebook.cells)]
    return [Section(section_key(title), title, first, last) for (first, title), last in zip(starts, ends, strict=True)]


def closing(notebook: nbformat.NotebookNode, section: Section) -> bool:
    """Whether a section closes the board."""
    return any(
        cell.cell_type == "code" and "board.close()" in cell.source for cell in notebook.cells[section.first : section.last]
    )


def choose(notebook: nbformat.NotebookNode, wanted: tuple[str, ...], track: str) -> nbformat.NotebookNode:
    """A notebook cut to some of its sections and to a track. Raises CompanionError for what it does not have."""
    if track not in TRACKS:
        raise CompanionError(f"unknown track {track!r}: choose one of {', '.join(TRACKS)}")
    found = sections(notebook)
    unknown = set(wanted) - {section.key for section in found}
    if unknown:
        raise CompanionError(f"no section {', '.join(sorted(unknown))}: choose from {', '.join(s.key for s in found[1:])}")
    chosen = [s for s in found if not wanted or s.key in (OPENING, *wanted) or closing(notebook, s)]
    if track == "claims":
        notebook.cells = [cell for section in chosen for cell in for_claims(notebook, section)]
        return notebook
    cells = [cell for section in chosen for cell in notebook.cells[section.first : section.last]]
    notebook.cells = [cell for cell in cells if track == "all" or "extra" not in cell.metadata.get("tags", [])]
    return notebook


def for_claims(notebook: nbformat.NotebookNode, section: Section) -> list[nbformat.NotebookNode]:
    """What of a section the claims over seeds take: these, the cells that they need, the text right above each, and what closes the board.

    The opening stays whole; of a section without such claims that closes nothing, nothing is left.
    """
    cells = notebook.cells[section.first : section.last]
    if section.key == OPENING:
        return cells
    code = {place: cell.source for place, cell in enumerate(cells) if cell.cell_type == "code"}
    ends = [place for place, source in code.items() if judges_over_seeds(source) or "board.close()" in source]
    if not ends:
        return []
    chosen = needed(code, ends)
    texts = {place - 1 for place in chosen} - set(code) - {0, -1}
    begin = nbformat.v4.new_code_cell(f'board.section("{section.key}")', id=f"{section.key[:56]}-begin")
    return [cells[0], begin, *(cells[place] for place in sorted(chosen | texts))]


def undefined_names(notebook: nbformat.NotebookNode) -> list[str]:
    """Names that a section uses although neither the opening nor the section itself, up to there, defines them."""
    problems: list[str] = []
    opening: set[str] = set(dir(builtins)) | {"display", "get_ipython"}
    for section in sections(notebook):
        defined = set(opening)
        for cell in notebook.cells[section.first : section.last]:
            if cell.cell_type == "code":
                problems += [f"section {section.key}: {name}" for name in sorted(undefined_in(cell.source, defined))]
                defined |= names_of(cell.source)[0]
        if section.key == OPENING:
            opening = defined
    return problems


def core_copy(source: Path, target: Path) -> None:
    """A committed notebook cut to its core track, outputs included: what the regression test executes."""
    nbformat.write(choose(nbformat.read(source, as_version=4), (), "core"), target)
