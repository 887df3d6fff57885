"""Execute one woven notebook, section by section, in one kernel: the child process of `utils.run`.

`python -m utils.execute ORDER`, where ORDER is a JSON file: the woven notebook, papermill's parameters, and where the partial
notebook goes after every section. A cell that raises costs itself; the next one is tried all the same, because a failed method
must not cost the others. The parent holds the other end of standard input: when it goes, for whatever reason, the kernel and
this process go with it.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from utils import cache, notebooks

WITH_ERRORS, FAILED = 3, 4  # exit statuses: some cells raised; the opening raised, or the kernel died


def execute(order: dict) -> int:
    """Run the ordered notebook and write it after every section; returns the exit status."""
    notebook = parameterize_notebook(load_notebook_node(order["woven"]), order["parameters"])
    facts = notebook.metadata["companion"]
    facts.update({"finished": [], "section_seconds": {}, "errors": []})
    take_back(notebook, Path(order["partial"]), order["finished"])
    client = NotebookClient(notebook, kernel_name="python3", timeout=None, resources={"metadata": {"path": order["cwd"]}})
    with client.setup_kernel():
        own_kernel(client.km.provisioner.process.pid)
        for section in notebooks.sections(notebook):
            if section.key in order["finished"]:
                continue
            started, before = time.perf_counter(), len(facts["errors"])
            died = run_section(client, section, facts["errors"])
            facts["section_seconds"][section.key] = round(time.perf_counter() - started, 1)
            if not died and not (section.key == notebooks.OPENING and len(facts["errors"]) > before):
                facts["finished"].append(section.key)
            cache.write_atomically(Path(order["partial"]), nbformat.writes(notebook) + "\n")
            if section.key not in facts["finished"]:
                return FAILED
    return WITH_ERRORS if facts["errors"] else 0


def run_section(client: NotebookClient, section: notebooks.Section, errors: list[dict]) -> bool:
    """Execute a section's cells, noting errors; returns whether the kernel died."""
    for index in range(section.first, section.last):
        try:
            client.execute_cell(client.nb.cells[index], index)
        except CellExecutionError as error:
            errors.append({"section": section.key, "error": f"{error.ename}: {(error.evalue.splitlines() or [''])[0]}"})
            if section.key == notebooks.OPENING:
                return False
        except DeadKernelError:
            errors.append({"section": section.key, "error": "the kernel died (out of memory?)"})
            return True
    return False


def take_back(notebook: nbformat.NotebookNode, partial: Path, finished: list[str]) -> None:
    """Fill finished sections with the cells, outputs included, that an interrupted run left."""
    if not finished:
        return
    earlier = nbformat.read(partial, as_version=4)
    kept = {section.key: earlier.cells[section.first : section.last] for section in notebooks.sections(earlier)}
    for section in notebooks.sections(notebook):
        if section.key in finished:
            notebook.cells[section.first : section.last] = kept[section.key]
            notebook.metadata["companion"]["finished"].append(section.key)
    told = earlier.metadata["companion"]
    notebook.metadata["companion"]["section_seconds"] = {key: told["section_seconds"][key] for key in finished}
    notebook.metadata["companion"]["errors"] = [error for error in told["errors"] if error["section"] in finished]


def own_kernel(pid: int) -> None:
    """From now on the kernel (and what it started) dies as soon as the parent closes its end of our standard input."""

    def watch() -> None:
        while os.read(0, 1):  # the descriptor itself: a buffered reader would hold a lock when the process ends
            pass
        end = getattr(os, "killpg", os.kill)
        try:
            end(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        finally:
            os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(execute(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
