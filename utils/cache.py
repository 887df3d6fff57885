"""A folder of finished computations, keyed by what went into them, safe for several notebooks at once.

Each has a manifest with the checksum of every file. It is verified whenever the computation is read (90 MB take a tenth of a second),
so a damaged one is made anew instead of used.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from utils import CompanionError

MANIFEST = "manifest.json"
BUILDING = ".building-"
DAY = 24 * 3600


def root() -> Path:
    """The cache folder, absolute: $COMPANION_CACHE, else ~/.cache/bert-compression-companion.

    A relative one is resolved once, for this process and those that it starts: they work in folders of their own. Raises
    CompanionError where there is no home folder to keep it in.
    """
    given = os.environ.get("COMPANION_CACHE")
    try:
        folder = Path(given or "~/.cache/bert-compression-companion").expanduser()
    except RuntimeError:
        raise CompanionError("there is no home folder for the cache: set COMPANION_CACHE to a folder you can write") from None
    if given and given != str(folder.absolute()):
        os.environ["COMPANION_CACHE"] = str(folder.absolute())
    return folder.absolute()


def key(content: dict) -> str:
    """A short name for a computation, derived from everything that could change its result."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:20]


def source_hash(*modules) -> str:
    """Hash of modules' source code: a cached result is stale once the code that made it has changed."""
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()[:16]


def _say(note: str) -> None:
    print(note, file=sys.stderr)


def once(kind: str, name: str, build: Callable[[Path], None], say: Callable[[str], None] = _say) -> Path:
    """Folder of a finished computation; `build(folder)` fills it if nobody has yet, or if what lies there is damaged: `say` tells so.

    Two processes that ask at once compute once: the second waits on a file lock. A folder appears under its name only
    when it is whole, so an interrupted run leaves nothing half-written; what a killed one leaves is removed by the next. Raises
    CompanionError where the cache cannot be written.
    """
    final = root() / kind / name
    with contextlib.suppress(OSError):
        _sweep()
    damage = _damage(final)
    if not damage:
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{final}.lock"):
            damage = _damage(final)
            if not damage:
                return final
            if os.path.lexists(final):
                say(f"the cached {kind} {name} is damaged ({damage}): it is made anew")
            _build(build, final)
    except (OSError, SafetensorError) as error:  # a full disk is the latter where safetensors writes
        raise CompanionError(
            f"cannot write the cache {root()}: {getattr(error, 'strerror', None) or error}. "
            "Free some space, or set COMPANION_CACHE to a folder you can write"
        ) from error
    return final


def _build(build: Callable[[Path], None], final: Path) -> None:
    """Fill a folder beside the final one, seal it, and put it there. The caller holds the lock."""
    building = final.with_name(f"{BUILDING}{final.name}")
    _remove(building)  # a killed maker's: a living one would hold the lock
    building.mkdir()
    try:
        build(building)
        sums = {str(path.relative_to(building)): _sha256(path) for path in sorted(building.rglob("*")) if path.is_file()}
        (building / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        _remove(final)
        os.replace(building, final)
    except BaseException:
        _remove(building)
        raise


def _damage(folder: Path) -> str:
    """What is wrong with a finished computation; empty where nothing is."""
    if not folder.is_dir():
        return "it is no folder"
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        wrong = [name for name, sha256 in sums.items() if _sha256(folder / name) != sha256]
    except (OSError, ValueError, AttributeError) as error:
        return f"{Path(getattr(error, 'filename', None) or MANIFEST).name} cannot be read"
    if not sums:
        return f"{MANIFEST} names no files"
    return f"{wrong[0]} is not what was written" if wrong else ""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sweep() -> None:
    """Remove what killed processes left half-built: theirs is the lock that nobody holds."""
    for building in root().glob(f"*/{BUILDING}*"):
        lock = building.with_name(building.name.removeprefix(BUILDING) + ".lock")
        with contextlib.suppress(OSError):  # held: its maker lives; or gone already, or not ours
            if lock.is_file():
                with FileLock(lock, timeout=0):
                    _remove(building)
            elif time.time() - building.stat().st_mtime > DAY:  # an older version's, which locked otherwise
                _remove(building)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside this one to write into; on leaving it takes this one's place, so that readers see the old or the new, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:  # a full disk, above all
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new content, never a half."""
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


def remove_halves(path: Path) -> None:
    """Remove what killed writers of this file left beside it. Nobody may be writing it now."""
    for half in path.parent.glob(f".{glob.escape(path.name)}-*"):
        _remove(half)
