"""Chapters import the spine, never each other; the spine imports no chapter."""

import ast
from pathlib import Path

import pytest

from utils.catalogue import ROOT

UTILS = ROOT / "utils"
CHAPTERS = {path.name for path in UTILS.iterdir() if (path / "__init__.py").is_file()} - {"parts"}


def imported(path: Path) -> set[str]:
    """All modules that a file names in imports, also those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def chapters_in(modules: set[str]) -> set[str]:
    return {name.split(".")[1] for name in modules if name.startswith("utils.")} & CHAPTERS


def test_there_are_chapters():
    assert {"pruning", "quantization"} <= CHAPTERS


@pytest.mark.parametrize("path", sorted(UTILS.rglob("*.py")), ids=lambda path: str(path.relative_to(UTILS)))
def test_import_direction(path):
    own = {path.relative_to(UTILS).parts[0]} & CHAPTERS
    assert chapters_in(imported(path)) <= own


def test_the_reader_of_imports_sees_every_form(tmp_path):
    (tmp_path / "x.py").write_text("import utils.pruning.masks\ndef f():\n    from utils import quantization\n")
    assert chapters_in(imported(tmp_path / "x.py")) == {"pruning", "quantization"}
