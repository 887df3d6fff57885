"""A process that has imported `utils.contract` and nothing of a chapter looks at artifacts.

Such a process is forked, for each call, from a server that has done these imports once: ten seconds each where every test pays them.
"""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

from utils import contract

ONLY = ["utils.contract"]


def broken(folder: Path) -> dict[str, list[str]]:
    """The artifacts of a folder that do not keep their contract, and in what (`contract.check`)."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(ONLY)
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_check, args=(sender, folder))
    child.start()
    sender.close()  # so that a child that dies is the end of the pipe, and not of our patience
    with receiver:
        found = receiver.recv()
    child.join()
    return found


def _check(sender: Connection, folder: Path) -> None:
    with sender:
        sender.send(contract.check(folder))
