"""Every method of the survey, and where in the suite it stands: code, lesson, tests, measured rows.

`catalogue.csv` names the paper, survey section, chapter and implementing object of each method id; the rest is looked up, so
the table cannot claim what is not there.
"""

import ast
import csv
import functools
import importlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from utils import CompanionError

ROOT = Path(__file__).resolve().parent.parent
CSV = Path(__file__).with_name("catalogue.csv")
ID = re.compile(r"[A-Z]-\d{2}[a-z]?")


@dataclass
class Method:
    """One method id, with what the suite has for it."""

    id: str
    chapter: str
    survey_section: str
    name: str
    variant: str
    paper: str
    object: str  # "module:attribute", empty while not implemented
    section: str = ""
    tests: list[str] = field(default_factory=list)
    rows: int = 0

    def gaps(self) -> list[str]:
        """What is missing before the method counts as complete."""
        found = {"implementation": self.has_object(), "lesson section": bool(self.section),
                 "test": bool(self.tests), "measured row": self.rows > 0}  # fmt: skip
        return [what for what, there in found.items() if not there]

    def has_object(self) -> bool:
        """Whether the implementing object can be imported."""
        module, _, attribute = self.object.partition(":")
        try:
            return bool(attribute) and hasattr(importlib.import_module(module), attribute)
        except ImportError:
            return False


def missing(method: Method) -> list[str]:
    """A method's gaps; a row that waits for its chapter's run is none (`notebooks/STALE.json` names the chapter)."""
    from utils import notebooks

    return [gap for gap in method.gaps() if gap != "measured row" or method.chapter not in notebooks.stale()]


def chapters() -> list[str]:
    """Chapters that have a lesson, in order."""
    return sorted(folder.name for folder in (ROOT / "lessons").iterdir() if lesson_path(folder.name).is_file())


def lesson_path(chapter: str) -> Path:
    """The lesson's MyST source."""
    return ROOT / "lessons" / chapter / f"{chapter}.md"


def load(chapter: str | None = None, profile: str = "cpu") -> list[Method]:
    """All methods (of one chapter) with their lesson sections, tests and committed rows. CompanionError for an unknown chapter."""
    with open(CSV, newline="", encoding="utf-8") as file:
        entries = list(csv.DictReader(file))
    known = sorted({entry["chapter"] for entry in entries} | set(chapters()))
    if chapter is not None and chapter not in known:
        raise CompanionError(f"unknown chapter {chapter!r}: choose one of {', '.join(known)}")
    tests, sections, rows = find_tests(), find_sections(), count_rows(profile)
    names = ("id", "chapter", "survey_section", "name", "variant", "paper", "object")
    return [
        Method(**{name: entry[name] for name in names}, section=sections.get(entry["id"], ""),
               tests=tests.get(entry["id"], []), rows=rows.get(entry["id"], 0))
        for entry in entries if chapter in (None, entry["chapter"])
    ]  # fmt: skip


def find_sections() -> dict[str, str]:
    """Lesson headings that name method ids, such as `### Iterative magnitude pruning (P-05)`."""
    found = {}
    for chapter in chapters():
        for line in lesson_path(chapter).read_text(encoding="utf-8").splitlines():
            if line.startswith("##") and ID.search(line):
                found |= {id: f"{chapter}: {line.lstrip('# ')}" for id in ID.findall(line)}
    return found


@functools.cache
def tracks(chapter: str) -> dict[str, str]:
    """The track (`core` or `extra`) of every method id that a heading of the lesson names; see the marker in `utils.notebooks`."""
    found, section, current = {}, "core", "core"
    for line, following in itertools.pairwise([*lesson_path(chapter).read_text(encoding="utf-8").splitlines(), ""]):
        if line.startswith(("## ", "### ")):
            marked = re.fullmatch(r"<!-- (core|extra) -->", following.strip())
            inherited = "core" if line.startswith("## ") else section
            current = marked[1] if marked else inherited
            section = current if line.startswith("## ") else section
            found |= dict.fromkeys(ID.findall(line), current)
    return found


def find_tests() -> dict[str, list[str]]:
    """Test functions per method id, read from their `@pytest.mark.method("...")` markers."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for id in _marked(node):
                    found.setdefault(id, []).append(f"{path.name}::{node.name}")
    return found


def _marked(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "pytest.mark.method"]
    return [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]


def count_rows(profile: str = "cpu") -> dict[str, int]:
    """Committed rows per method id. Raises CompanionError for a results file that cannot be read."""
    found: dict[str, int] = {}
    for path in (ROOT / "notebooks" / "results" / profile).glob("*.json"):
        try:
            methods = [row["method"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise CompanionError(f"{path} is no readable results file: run the chapter again") from None
        for method in methods:
            found[method] = found.get(method, 0) + 1
    return found
