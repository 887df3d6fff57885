"""One place for versions, three files in step; a README whose tables come from the results."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import typer
from packaging.specifiers import SpecifierSet

from utils import cli
from utils.catalogue import ROOT

PYTHON = """#!/bin/sh
# Stands for a Python of version {version}: notes what it is asked for, and makes environments as `python -m venv` does.
echo "{version} $*" >> "{log}"
case "$*" in
  *"sys.exit(sys.version_info"*) exit {status} ;;
  *"print(sys.version_info"*) echo "{version}" ;;
  "-m venv "*) mkdir -p "$3/bin" && echo home > "$3/pyvenv.cfg" && [ -e "$3/bin/python" ] || cp "$0" "$3/bin/python" ;;
esac
"""


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


@pytest.mark.parametrize("python", ["3.11.0", "3.11.2", "3.12.0", "3.12.12"])
def test_every_pinned_version_runs_on_every_python_that_is_promised(python):
    installed = {normal(found.name): found for found in metadata.distributions()}
    asked = {name: installed[name].metadata["Requires-Python"] for name, version in constraints().items()
             if name in installed and installed[name].version == version}  # fmt: skip
    assert len(asked) > 100
    assert [name for name, wanted in asked.items() if wanted and python not in SpecifierSet(wanted)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python in SpecifierSet(project["requires-python"])


# --- make setup -----------------------------------------------------------------------------------------------------


class Clone:
    """A clone without its contents, in a path with a blank, and Pythons that only note what they are asked for."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder / "a clone", folder / "log"
        self.folder.mkdir()
        shutil.copy(ROOT / "Makefile", self.folder)
        for name in ("constraints.txt", "pyproject.toml"):
            (self.folder / name).write_text("")

    def python(self, name: str, version: str) -> Path:
        """Write a Python into the clone; versions before 3.11 and after 3.12 will not do."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        status = 0 if version in ("(3, 11)", "(3, 12)") else 1
        path.write_text(PYTHON.format(version=version, log=self.log, status=status))
        path.chmod(0o755)
        return path

    def setup(self, *arguments: str) -> tuple[int, str, list[str]]:
        """`make setup`: status, what it said, and what the Pythons were asked for, checks of versions aside."""
        self.log.write_text("")
        outside = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "PYTHON", "VENV")  # of the make that runs these tests
        environment = {name: value for name, value in os.environ.items() if name not in outside}
        done = subprocess.run(["make", "setup", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True)
        asked = [line for line in self.log.read_text().splitlines() if "sys.version_info" not in line]
        return done.returncode, done.stdout + done.stderr, asked


@pytest.fixture
def clone(tmp_path):
    if not shutil.which("make"):
        pytest.skip("there is no make")
    return Clone(tmp_path)


def test_setup_makes_an_environment_once_also_in_a_path_with_a_blank(clone):
    clone.python("python", "(3, 11)")
    status, said, asked = clone.setup("PYTHON=./python")
    assert status == 0, said
    assert [line.split()[2:5] for line in asked] == [
        ["-m", "venv", ".venv"],
        ["-m", "pip", "install"],
        ["-m", "ipykernel", "install"],
    ]
    assert asked[1].endswith("-c constraints.txt -e .[test]") and asked[2].endswith(
        f"--sys-prefix --env PYTHONPATH {clone.folder}"
    )
    assert clone.setup("PYTHON=./python")[::2] == (0, []) == clone.setup()[::2]


@pytest.mark.parametrize("before", ["(3, 13)", "(3, 10)", "(3, 12)", None])
def test_an_environment_of_another_python_is_made_anew(clone, before):
    clone.python("python", "(3, 11)")
    (clone.folder / ".venv").mkdir()
    (clone.folder / ".venv" / "pyvenv.cfg").write_text("home")
    (clone.folder / ".venv" / ".installed").write_text("")
    if before:  # None: the system's Python has gone since
        clone.python(".venv/bin/python", before)
    status, said, asked = clone.setup("PYTHON=./python")
    assert status == 0 and "made anew" in said and len(asked) == 3
    assert "(3, 11)" in (clone.folder / ".venv" / "bin" / "python").read_text()


def test_an_environment_that_will_do_stays_where_no_python_is_named(clone):
    clone.python(".venv/bin/python", "(3, 12)")
    (clone.folder / ".venv" / "pyvenv.cfg").write_text("home")
    (clone.folder / ".venv" / ".installed").write_text("")
    assert clone.setup()[::2] == (0, [])


@pytest.mark.parametrize("named", ["./python", "", "./no-such-python"])
def test_a_python_that_will_not_do_is_one_clear_line_and_costs_nothing(clone, named):
    clone.python("python", "(3, 13)")
    clone.python(".venv/bin/python", "(3, 12)")
    (clone.folder / ".venv" / "pyvenv.cfg").write_text("home")
    status, said, asked = clone.setup(f"PYTHON={named}")
    assert status != 0 and "Python 3.11 or 3.12 is needed" in said and asked == []
    assert (clone.folder / ".venv" / "bin" / "python").exists()


# --- what the README tells ------------------------------------------------------------------------------------------


def commands_under(heading: str) -> list[str]:
    """The commands of the first block under a heading of the README, without what is said beside them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f" {heading}")[2]
    block = text.partition("\n" + "`" * 3 + "bash\n")[2].partition("\n" + "`" * 3)[0]
    return [re.sub(r"\s+# .*", "", line) for line in block.splitlines()]


def test_the_route_without_make_is_that_of_make(tmp_path):
    make, activate, install = commands_under("Without make")
    assert install in (ROOT / "Makefile").read_text().replace("$(BIN)/python -m pip install --quiet --disable-pip-version-check",
                                                              "python -m pip install")  # fmt: skip
    assert make == "python3.11 -m venv .venv"
    make = make.replace("python3.11", shlex.quote(sys.executable)) + " --without-pip"
    script = f"{make} && {activate} && python -c 'import sys; print(sys.prefix)'"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path.resolve() / ".venv"), done.stderr


def test_every_command_of_the_readme_is_one():
    known = typer.main.get_command(cli.app).commands
    lines = [line for line in commands_under("How to go on") if line.startswith("companion ")]
    assert len(lines) > 10
    for line in lines:
        name, *arguments = shlex.split(line)[1:]
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= options, line


def test_every_target_of_make_that_the_readme_names_is_one():
    text, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    named = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)`", text))
    assert len(named) > 5 and named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


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


def test_pytest_and_its_workers_fit(request):
    """Of groups that are not heeded no other test fails, but every worker trains and builds everything anew."""
    if getattr(request.config.option, "loadgroup", False):
        assert "@" in request.node.nodeid, "pytest-xdist does not heed xdist_group with this pytest"
