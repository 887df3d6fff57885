"""Execute one woven notebook, section by section, in one kernel: the child process of `utils.run`.

`python -m utils.execute ORDER`, where ORDER is a JSON file: the woven notebook, papermill's parameters, and where the partial
notebook goes after every section. A cell that raises costs itself; the next one is tried all the same, because a failed method
must not cost the others. The parent holds the other end of standard input: when it goes, for whatever reason, the kernel and
this process go with it.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from utils import cache, notebooks

WITH_ERRORS, FAILED = 3, 4  # exit statuses: some cells raised; the opening raised, or the kernel died
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class OwnKernel(AsyncKernelManager):
    """Kernels of the Python that runs this. What is called `python3` among the user's kernels may belong to another environment."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How the kernel is started."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name=notebooks.KERNEL["display_name"], language="python")


def execute(order: dict) -> int:
    """Run the ordered notebook and write it after every section; returns the exit status."""
    notebook = prepare(order)
    facts = notebook.metadata["companion"]
    client = NotebookClient(notebook, kernel_name="python3", kernel_manager_class=OwnKernel, timeout=None,
                            startup_timeout=300, allow_errors=True, record_timing=False, coalesce_streams=True,
                            shutdown_kernel="immediate",  # all is written by then, and a farewell takes two seconds and a half
                            resources={"metadata": {"path": order["cwd"]}})  # fmt: skip
    threading.Thread(target=die_with_parent, args=[client], daemon=True).start()
    with client.setup_kernel(**start_options()):
        for section in notebooks.sections(notebook):
            if section.key in order["finished"]:
                continue
            report(order, f"section {section.key}")
            started, before = time.perf_counter(), len(facts["errors"])
            died = run_section(client, section, facts["errors"])
            facts["section_seconds"][section.key] = round(time.perf_counter() - started, 1)
            if not died and not (section.key == notebooks.OPENING and len(facts["errors"]) > before):
                facts["finished"].append(section.key)
            cache.write_atomically(Path(order["partial"]), nbformat.writes(notebook) + "\n")
            if section.key not in facts["finished"]:
                return FAILED
    return WITH_ERRORS if facts["errors"] else 0


def prepare(order: dict) -> nbformat.NotebookNode:
    """The notebook with its parameters, and with what an interrupted run had finished."""
    notebook = parameterize_notebook(load_notebook_node(order["woven"]), order["parameters"])
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill draws a new one every time
    notebook.metadata["companion"].update({"finished": [], "section_seconds": {}, "errors": []})
    if order["finished"]:
        take_back(notebook, Path(order["partial"]), order["finished"])
    return notebook


def take_back(notebook: nbformat.NotebookNode, partial: Path, finished: list[str]) -> None:
    """Fill finished sections with the outputs that an earlier run left; their code is the same, their text may have changed since."""
    earlier = nbformat.read(partial, as_version=4)
    kept = {section.key: code_cells(earlier, section) for section in notebooks.sections(earlier)}
    for section in notebooks.sections(notebook):
        if section.key in finished:
            for cell, before in zip(code_cells(notebook, section), kept[section.key], strict=True):
                cell.outputs, cell.execution_count = before.outputs, before.execution_count
    told = earlier.metadata["companion"]
    notebook.metadata["companion"].update({
        "finished": list(finished),
        "section_seconds": {key: told["section_seconds"][key] for key in finished},
        "errors": [error for error in told["errors"] if error["section"] in finished],
    })  # fmt: skip


def code_cells(notebook: nbformat.NotebookNode, section: notebooks.Section) -> list[nbformat.NotebookNode]:
    """The code cells of a section."""
    return [cell for cell in notebook.cells[section.first : section.last] if cell.cell_type == "code"]


def run_section(client: NotebookClient, section: notebooks.Section, errors: list[dict]) -> bool:
    """Execute a section's cells, noting errors; returns whether the kernel died. The opening ends at its first error."""
    for index in range(section.first, section.last):
        cell = client.nb.cells[index]
        try:
            client.execute_cell(cell, index)
        except DeadKernelError:
            errors.append({"section": section.key, "error": "the kernel died (out of memory?)"})
            return True
        raised = [output for output in cell.get("outputs", []) if output.output_type == "error"]
        if raised and "raises-exception" not in cell.metadata.get("tags", []):
            said = f"{raised[0].ename}: {(raised[0].evalue.splitlines() or [''])[0]}"
            errors.append({"section": section.key, "error": said})
            if section.key == notebooks.OPENING:
                return False
    return False


def report(order: dict, what: str) -> None:
    """Tell the parent what is under way; the board adds the methods."""
    with contextlib.suppress(OSError), open(order["progress"], "a", encoding="utf-8") as file:
        file.write(what + "\n")


# --- no kernel is left behind ---------------------------------------------------------------------------------------


def die_with_parent(client: NotebookClient) -> None:
    """Wait until the parent's end of our standard input closes; then the kernel, what it started, and this process die."""
    while os.read(0, 1):  # the descriptor itself: a buffered reader would hold a lock when the process ends
        pass
    with contextlib.suppress(Exception):  # there may be no kernel yet, or none any more
        getattr(os, "killpg", os.kill)(client.km.provisioner.process.pid, KILL)
    os._exit(FAILED)


def start_options() -> dict:
    """On Linux, have the system kill the kernel when this process is killed. Elsewhere ipykernel looks for its parent every second."""
    if not sys.platform.startswith("linux"):
        return {}
    set_option, death_signal, parent = ctypes.CDLL(None).prctl, 1, os.getpid()

    def before_the_kernel_starts() -> None:
        set_option(death_signal, KILL)
        if os.getppid() != parent:
            os._exit(FAILED)

    return {"preexec_fn": before_the_kernel_starts}


if __name__ == "__main__":
    sys.exit(execute(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
