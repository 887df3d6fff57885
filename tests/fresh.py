"""A process that has imported `utils.contract` and nothing of a chapter looks at artifacts.

Such a process is forked, for each call, from a server that has done these imports once: ten seconds each where every test pays them.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from utils import contract


def broken(folder: Path) -> dict[str, list[str]]:
    """The artifacts of a folder that do not keep their contract, and in what (`contract.check`, whose errors are raised here)."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["utils.contract"])
    with ProcessPoolExecutor(1, mp_context=processes) as one:
        return one.submit(contract.check, folder).result()
