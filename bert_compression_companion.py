"""Where the command `companion` begins: under a name of its own.

A package called `utils` is common, and one on PYTHONPATH or in the environment would be found before ours: so the folder that this file
lies in comes first. What a user's current folder holds are data, not modules: an empty entry of PYTHONPATH, which means it, is left out.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def main() -> None:
    """Entry point of the command."""
    unwanted = ["", str(ROOT)]
    if "" in os.environ.get("PYTHONPATH", str(ROOT)).split(os.pathsep):
        unwanted.append(os.getcwd())
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry not in unwanted)]
    from utils import cli

    cli.main()


if __name__ == "__main__":
    main()
