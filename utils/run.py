"""Run chapters: one child process each, locks, signals, progress, and going on after an interruption.

A chapter's run lives in `<out>/.<name>/` while it is under way (woven notebook, partial notebook, rows); the notebook and the
results file appear under their names once it ran to its end. `resume` goes on with the section that was under way.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from filelock import FileLock, Timeout

from utils import CompanionError, cache, notebooks
from utils.catalogue import ROOT, lesson_path
from utils.execute import WITH_ERRORS

GRACE = 5.0  # seconds that a child has to end after it was told to

Progress = Callable[[str], None]


@dataclass
class Outcome:
    """How one chapter's run ended."""

    chapter: str
    name: str
    notebook: Path
    ok: bool
    skipped: bool = False
    message: str = ""


@dataclass
class Request:
    """What to run and where to put it; `parameters` are papermill's (PROFILE, MODEL, DATASET, SEED, DEVICE)."""

    out: Path
    profile: str = "cpu"
    parameters: dict = field(default_factory=dict)
    resume: bool = False
    sections: tuple[str, ...] = ()
    track: str = "all"

    def name(self, chapter: str) -> str:
        """The chapter, and which part of it where it is not the whole."""
        part = f".section-{'-'.join(self.sections)}" if self.sections else ""
        return f"{chapter}{part}{'.core' if self.track == 'core' else ''}"


@dataclass
class Stop:
    """Set by a signal: running chapters end, pending ones are not started."""

    event: threading.Event = field(default_factory=threading.Event)
    signal: int | None = None

    def set(self, signum: int, frame: object = None) -> None:
        """Signal handler."""
        self.signal = signum
        self.event.set()


def run_all(names: list[str], request: Request, jobs: int = 1, on_progress: Callable[[str, str], None] = lambda name, what: None,
            stop: Stop | None = None) -> list[Outcome]:  # fmt: skip
    """Run chapters, `jobs` at a time, until done or stopped. A failed chapter does not stop the others."""
    stop = stop or Stop()

    def one(name: str) -> Outcome:
        return run_chapter(name, request, lambda what: on_progress(name, what), stop)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, name) for name in names]
        while wait(futures, timeout=0.2).not_done:
            if stop.event.is_set():
                for future in futures:
                    future.cancel()
        return [future.result() for future in futures if not future.cancelled()]


@contextlib.contextmanager
def signals(stop: Stop):
    """While inside, SIGINT and SIGTERM stop the run in order; a closed terminal does not stop it at all."""
    handled = {signal.SIGINT: stop.set, signal.SIGTERM: stop.set}
    if hasattr(signal, "SIGHUP"):
        handled[signal.SIGHUP] = signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number, handler in handled.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_chapter(chapter: str, request: Request, on_progress: Progress = lambda what: None, stop: Stop | None = None) -> Outcome:
    """Weave and execute one chapter in a process of its own. Raises CompanionError where another run has this output."""
    name = request.name(chapter)
    request.out.mkdir(parents=True, exist_ok=True)
    with exclusive(request.out, name):
        stamp = make_stamp(chapter, request)
        final = request.out / f"{name}.ipynb"
        if request.resume and finished(final, results_file(request, name), stamp):
            return Outcome(chapter, name, final, ok=True, skipped=True)
        folder = request.out / f".{name}"
        done = finished_sections(folder, stamp) if request.resume else []
        order = prepare(chapter, request, folder, stamp, done)
        status = watch_child(order, child_environment(request, name, folder, done), folder, on_progress, stop or Stop())
        return conclude(chapter, name, request, folder, status, stop or Stop())


@contextlib.contextmanager
def exclusive(out: Path, name: str):
    """One run at a time per output. Raises CompanionError that names the other run."""
    lock, owner = FileLock(out / f".{name}.lock"), out / f".{name}.pid"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = owner.read_text().strip() if owner.is_file() else "unknown"
        raise CompanionError(
            f"{name} is being run into {out} already (process {other}): wait for it, or give another --out"
        ) from None
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)


# --- what a run is made from ----------------------------------------------------------------------------------------


def make_stamp(chapter: str, request: Request) -> dict:
    """Everything that decides a run's numbers: two runs with one stamp give the same rows."""
    files = [lesson_path(chapter), *sorted((ROOT / "utils").rglob("*.py")), *sorted((ROOT / "utils").rglob("*.csv"))]
    source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    content = {name: content_key(request.parameters.get(name)) for name in ("MODEL", "DATASET")}
    return {"profile": request.profile, "parameters": request.parameters, "sections": list(request.sections), "track": request.track,
            "source": source, "content": content}  # fmt: skip


def content_key(name: str | None) -> str:
    """A local file's or folder's content as a hash; any other name (embedded, hub) stands for itself."""
    place = Path(name) if name else None
    if place is None or not place.exists():
        return name or "default"
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(place)).encode())
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def results_file(request: Request, name: str) -> Path:
    """Where the board of this run writes."""
    return request.out / "results" / request.profile / f"{name}.json"


def companion_facts(path: Path) -> dict:
    """What a notebook says of its run; empty for one that is missing or cut short."""
    try:
        return dict(nbformat.read(path, as_version=4).metadata.get("companion", {}))
    except Exception:  # whatever a damaged file raises, it counts as not there
        return {}


def finished(final: Path, results: Path, stamp: dict) -> bool:
    """Whether a run with this stamp ended well, and its notebook and results are there to read."""
    facts = companion_facts(final)
    try:
        readable = bool(json.loads(results.read_text(encoding="utf-8"))["rows"] is not None)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return readable and facts.get("stamp") == stamp and not facts.get("errors")


def finished_sections(folder: Path, stamp: dict) -> list[str]:
    """The sections that an interrupted run with this stamp finished; none where its rows cannot be read. The opening always runs."""
    facts = companion_facts(folder / "partial.ipynb")
    try:
        json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [key for key in facts.get("finished", []) if key != notebooks.OPENING] if facts.get("stamp") == stamp else []


# --- the child ------------------------------------------------------------------------------------------------------


def prepare(chapter: str, request: Request, folder: Path, stamp: dict, done: list[str]) -> Path:
    """Write what the child needs into the run's folder; returns the order. A folder that is not gone on with starts empty."""
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    notebook = notebooks.weave(chapter, request.sections, request.track)
    notebook.metadata["companion"] |= {"stamp": stamp}
    nbformat.write(notebook, folder / "woven.ipynb")
    (folder / "progress").write_text("")
    order = {"woven": str(folder / "woven.ipynb"), "partial": str(folder / "partial.ipynb"), "parameters": request.parameters,
             "finished": done, "cwd": str(notebooks.NOTEBOOKS)}  # fmt: skip
    (folder / "order.json").write_text(json.dumps(order))
    return folder / "order.json"


def child_environment(request: Request, name: str, folder: Path, done: list[str]) -> dict[str, str]:
    """What the kernel must know: where results, rows and progress go. Only our own package is on the path, not the current folder."""
    return {**os.environ, "COMPANION_OUT": str(request.out.resolve()), "COMPANION_PROFILE": request.profile, "COMPANION_NAME": name,
            "COMPANION_PROGRESS": str((folder / "progress").resolve()), "COMPANION_JOURNAL": str((folder / "rows.json").resolve()),
            "COMPANION_FINISHED": json.dumps(done), "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}  # fmt: skip


def watch_child(order: Path, environment: dict, folder: Path, on_progress: Progress, stop: Stop) -> int:
    """Start the child, pass its progress on, and end it when told to stop; returns its exit status."""
    with open(folder / "log", "w", encoding="utf-8") as log:
        child = subprocess.Popen([sys.executable, "-P", "-m", "utils.execute", str(order.resolve())], env=environment, stdin=subprocess.PIPE,
                                 stdout=log, stderr=log, cwd=notebooks.NOTEBOOKS, start_new_session=True)  # fmt: skip
        shown = 0
        try:
            while child.poll() is None and not stop.event.wait(0.2):
                lines = (folder / "progress").read_text(encoding="utf-8").splitlines()
                for line in lines[shown:]:
                    on_progress(line)
                shown = len(lines)
        finally:
            child.stdin.close()  # the child sees the end of its input, kills the kernel and goes
            try:
                child.wait(GRACE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    return child.returncode


def conclude(chapter: str, name: str, request: Request, folder: Path, status: int, stop: Stop) -> Outcome:
    """Put the executed notebook under its name, or say why there is none."""
    partial, final = folder / "partial.ipynb", request.out / f"{name}.ipynb"
    facts = companion_facts(partial)
    if stop.event.is_set():
        kept = [key for key in facts.get("finished", []) if key != notebooks.OPENING]
        return Outcome(
            chapter, name, partial, ok=False, message=f"stopped after {len(kept)} sections; --resume goes on from there"
        )
    errors = [f"section {error['section']}: {error['error']}" for error in facts.get("errors", [])]
    if status in (0, WITH_ERRORS):
        tidy(partial, final)
        shutil.rmtree(folder, ignore_errors=True)
        return Outcome(chapter, name, final, ok=status == 0, message="; ".join(errors))
    if errors and facts.get("finished") == []:  # the opening raised: there is nothing to go on from
        failed = request.out / f"{name}.failed.ipynb"
        os.replace(partial, failed)
        shutil.rmtree(folder, ignore_errors=True)
        return Outcome(chapter, name, failed, ok=False, message="; ".join(errors))
    said = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = "; ".join(errors) or (said or [f"the executing process ended with status {status}"])[-1]
    return Outcome(chapter, name, partial, ok=False, message=f"{reason}; --resume goes on from the last finished section")


def tidy(source: Path, target: Path) -> None:
    """Drop timestamps and local paths, which would make every rerun a diff, and put the notebook under its name."""
    notebook = nbformat.read(source, as_version=4)
    notebook.metadata.pop("papermill", None)
    for name in ("section_seconds", "finished"):
        notebook.metadata["companion"].pop(name, None)
    for cell in notebook.cells:
        for name in ("papermill", "execution", *(["tags"] if not cell.metadata.get("tags") else [])):
            cell.metadata.pop(name, None)
    cache.write_atomically(target, nbformat.writes(notebook) + "\n")


# --- time left ------------------------------------------------------------------------------------------------------


def earlier_seconds(out: Path, profile: str, chapter: str) -> dict[str, float]:
    """Seconds per section that an earlier run took, here or in the committed results; empty where nobody knows."""
    for folder in (out, notebooks.NOTEBOOKS):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((folder / "results" / profile / f"{chapter}.json").read_text(encoding="utf-8"))["section_seconds"]
    return {}


class Clock:
    """Time left in a chapter, from what each section took before and how this run compares so far."""

    def __init__(self, before: dict[str, float]):
        self.before, self.started, self.section = before, time.perf_counter(), notebooks.OPENING

    def left(self, what: str) -> str:
        """` · about 5 min left`, or nothing where no earlier run is known. `what` is a line of progress."""
        if what.startswith("section "):
            self.section = what.removeprefix("section ")
        keys = list(self.before)
        if self.section not in keys:
            return ""
        done = sum(self.before[key] for key in keys[: keys.index(self.section)])
        rest = sum(self.before[key] for key in keys[keys.index(self.section) :])
        ratio = (time.perf_counter() - self.started) / done if done > 20 else 1.0
        return f" · about {max(1, round(ratio * rest / 60))} min left"
