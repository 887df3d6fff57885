"""Notebooks are built, never edited: woven from a lesson and the package's source, then executed by papermill.

A lesson cell tagged `weave` is a plain import; in the notebook it becomes the source of the imported names, with the imports
that the source needs, so that a learner can change a method in place and rerun it. The code still exists only once.
"""

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import nbformat

from utils import CompanionError, catalogue
from utils.catalogue import ROOT, lesson_path

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
    return found or known


# --- weave ----------------------------------------------------------------------------------------------------------


def weave(chapter: str) -> nbformat.NotebookNode:
    """Build a chapter's notebook, without outputs, from its lesson and the code. The result depends on nothing else."""
    lesson = jupytext.read(lesson_path(chapter), fmt="md:myst")
    seen: dict[str, str] = {}  # name -> where it came from, for everything the notebook has imported or defined so far
    cells = []
    for number, cell in enumerate(lesson.cells):
        source, tags = cell.source, cell.metadata.get("tags", [])
        if "weave" in tags:
            source = weave_cell(source, seen)
        elif cell.cell_type == "code":
            _note_imports(ast.parse(source), seen)
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        cells.append(make(source, id=f"cell-{number:03d}", metadata={"tags": tags} if tags else {}))
    metadata = {
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
        "companion": {"lesson": f"lessons/{chapter}/{chapter}.md"},
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def weave_cell(source: str, seen: dict[str, str]) -> str:
    """Replace `from module import a, b` by the source of a and b and the imports they need."""
    statements = ast.parse(source).body
    plain = [isinstance(node, ast.ImportFrom) and not any(alias.asname for alias in node.names) for node in statements]
    if not plain or not all(plain):
        raise CompanionError(f"a weave cell may hold `from module import names` only, without `as`, got: {source[:80]!r}")
    wanted = [(node.module, [alias.name for alias in node.names]) for node in statements]
    seen |= {name: f"{module}:{name}" for module, names in wanted for name in names}
    imports, blocks = [], []
    for module, names in wanted:
        path = Path(importlib.util.find_spec(module).origin)
        tree, text = ast.parse(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")
        segments = list(dict.fromkeys(_definition(tree, text, name, module) for name in names))
        imports += _needed_imports(tree, "\n".join(segments), module, seen)
        blocks.append(f"# source: {path.relative_to(ROOT)}\n" + "\n\n\n".join(segments))
    return "\n\n\n".join((["\n".join(_sorted(imports))] if imports else []) + blocks)


def _sorted(imports: list[str]) -> list[str]:
    """One line per module, in the usual order: `import x`, then third party, then our own."""
    merged: dict[str, list[str]] = {}
    for line in dict.fromkeys(imports):
        head, found, name = line.partition(" import ")
        merged.setdefault(f"{head} import " if found else line, []).append(name)
    lines = [head + ", ".join(sorted(filter(None, names))) for head, names in merged.items()]
    return sorted(lines, key=lambda line: (line.startswith("from utils"), line.startswith("from"), line))


def _definition(tree: ast.Module, text: str, name: str, module: str) -> str:
    """The source of a top-level function, class or constant, with its decorators."""
    lines = text.splitlines()
    for node in tree.body:
        if name in _bound_names(node) and not isinstance(node, ast.Import | ast.ImportFrom):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            return "\n".join(lines[first - 1 : node.end_lineno])
    raise CompanionError(f"{module} defines no {name}: a lesson weaves what is not there")


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


# --- run ------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How one chapter's run ended."""

    chapter: str
    notebook: Path
    ok: bool
    skipped: bool = False
    message: str = ""


@dataclass
class Request:
    """What to run and where to put it; `parameters` are papermill's (PROFILE, MODEL, DATASET, SEED, DEVICE)."""

    out: Path
    profile: str = "cpu"
    parameters: dict = field(default_factory=dict)
    resume: bool = False


def source_key(chapter: str) -> str:
    """Hash of everything a chapter's run is made from: its lesson and the whole package."""
    files = [lesson_path(chapter), *sorted((ROOT / "utils").rglob("*.py")), *sorted((ROOT / "utils").rglob("*.csv"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def run_chapter(chapter: str, request: Request, on_progress: Callable[[str], None] = lambda what: None) -> Outcome:
    """Weave and execute one chapter in a process of its own.

    The notebook appears as `<out>/<chapter>.ipynb` once it ran to its end; a failed one is kept as
    `<chapter>.failed.ipynb`. With `resume`, a chapter already finished from the same sources and parameters is skipped.
    """
    final = request.out / f"{chapter}.ipynb"
    stamp = {"profile": request.profile, "parameters": request.parameters, "source": source_key(chapter)}
    if request.resume and _finished(final, stamp):
        return Outcome(chapter, final, ok=True, skipped=True)
    request.out.mkdir(parents=True, exist_ok=True)
    woven, running = request.out / f".{chapter}.woven.ipynb", request.out / f".{chapter}.running.ipynb"
    progress = request.out / f".{chapter}.progress"
    progress.write_text("")
    notebook = weave(chapter)
    notebook.metadata["companion"] |= stamp
    nbformat.write(notebook, woven)
    environment = {**os.environ, "COMPANION_OUT": str(request.out.resolve()), "COMPANION_PROFILE": request.profile,
                   "COMPANION_PROGRESS": str(progress.resolve()), "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}  # fmt: skip
    arguments = [a for name, value in request.parameters.items() for a in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(woven), str(running), "-k", "python3", "--no-progress-bar",
               "--no-log-output", "--cwd", str(NOTEBOOKS), *arguments]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        stderr = _wait(process, progress, on_progress)
    finally:
        if process.poll() is None:
            process.terminate()
        for leftover in (woven, progress):
            leftover.unlink(missing_ok=True)
    if process.returncode == 0:
        _tidy(running)
        os.replace(running, final)
        return Outcome(chapter, final, ok=True)
    failed = request.out / f"{chapter}.failed.ipynb"
    with contextlib.suppress(FileNotFoundError):
        os.replace(running, failed)
    return Outcome(chapter, failed, ok=False, message=_error_message(failed, stderr))


def _wait(process: subprocess.Popen, progress: Path, on_progress: Callable[[str], None]) -> str:
    shown = 0
    while True:
        try:
            return process.communicate(timeout=0.5)[1]
        except subprocess.TimeoutExpired:
            lines = progress.read_text(encoding="utf-8").splitlines()
            for line in lines[shown:]:
                on_progress(line)
            shown = len(lines)


def _finished(path: Path, stamp: dict) -> bool:
    if not path.is_file():
        return False
    found = nbformat.read(path, as_version=4).metadata.get("companion", {})
    return {name: found.get(name) for name in stamp} == stamp


def _tidy(path: Path) -> None:
    """Drop papermill's timestamps and local paths, which would make every rerun a diff."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
    nbformat.write(notebook, path)


def _error_message(failed: Path, stderr: str) -> str:
    """The exception that stopped the notebook, in one line."""
    if failed.is_file():
        for cell in nbformat.read(failed, as_version=4).cells:
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    return f"{output.ename}: {output.evalue}"
    return (stderr.strip().splitlines() or ["papermill ended without a message"])[-1]


def results(out: Path, profile: str) -> list[dict]:
    """The results files of a run, chapter by chapter. Raises CompanionError where there are none."""
    paths = sorted((out / "results" / profile).glob("*.json"))
    if not paths:
        raise CompanionError(f"no results of profile {profile!r} under {out}: run `companion run --profile {profile}` first")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
