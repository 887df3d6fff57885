"""One place for versions, three files in step; a README whose tables come from the results."""

import re
import tomllib
from pathlib import Path

import pytest

from utils.catalogue import ROOT


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normal(name): version for name, version in (line.split("==") for line in lines if "==" in line and line[0] != "#")}


def direct() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + project["optional-dependencies"]["test"]


def test_every_direct_dependency_is_pinned_once_and_declared_without_a_version():
    assert all(re.fullmatch(r"[\w-]+", name) for name in direct())
    assert {normal(name) for name in direct()} <= set(constraints())


def test_every_direct_dependency_says_why():
    text = (ROOT / "pyproject.toml").read_text()
    for name in direct():
        assert re.search(rf'"{name}",\s+# \S', text), f"{name} lacks its reason"


def test_conda_environment_has_the_same_versions():
    pins = dict(re.findall(r"- ([\w-]+)==(\S+)", (ROOT / "environment.yml").read_text()))
    assert {normal(name): version for name, version in pins.items()} == {normal(n): constraints()[normal(n)] for n in direct()}


def test_readme_names_every_folder():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "runs"]
    assert [name for name in folders if f"`{name}/`" not in text and not name.endswith("egg-info")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_committed_notebooks_are_executed_small_and_without_local_paths(path: Path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    shown = [output for output in outputs if output.output_type == "execute_result"]
    assert [output.data["text/plain"] for output in shown if "text/html" not in output.data] == []  # bare values of a last line
    assert path.stat().st_size < 3_000_000
    assert str(Path.home()) + "/" not in path.read_text() or str(Path.home()) == "/"
