"""A folder of finished computations, keyed by what went into them, safe for several notebooks at once."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from utils import CompanionError


def root() -> Path:
    """The cache folder: $COMPANION_CACHE, else ~/.cache/bert-compression-companion."""
    return Path(os.environ.get("COMPANION_CACHE") or Path.home() / ".cache" / "bert-compression-companion")


def key(content: dict) -> str:
    """A short name for a computation, derived from everything that could change its result."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:20]


def source_hash(*modules) -> str:
    """Hash of modules' source code: a cached result is stale once the code that made it has changed."""
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()[:16]


def once(kind: str, name: str, build: Callable[[Path], None]) -> Path:
    """Folder of a finished computation; `build(folder)` fills it if nobody has yet.

    Two processes that ask at once compute once: the second waits on a file lock. A folder appears under its name only
    when it is whole, so an interrupted run leaves nothing half-written. Raises CompanionError where the cache cannot be
    written.
    """
    final = root() / kind / name
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{final}.lock"):
            if final.is_dir():
                return final
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
            try:
                build(building)
                os.replace(building, final)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
    except OSError as error:
        raise CompanionError(
            f"cannot write the cache {root()}: {error.strerror or error}. "
            "Free some space, or set COMPANION_CACHE to a folder you can write"
        ) from error
    return final


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new content, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
