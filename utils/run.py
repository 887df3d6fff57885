"""Run chapters: one child process each, locks, signals, progress, and going on after an interruption.

A chapter's run lives in `<out>/.<name>/` while it is under way (woven notebook, partial notebook, rows); the notebook and the
results file appear under their names once it ran to its end. `resume` goes on with the section that was under way, or, where the run had
come to its end, runs those sections again whose code has changed since.
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from filelock import FileLock, Timeout

from utils import CompanionError, cache, notebooks, results
from utils.catalogue import ROOT
from utils.execute import WITH_ERRORS

COMMAND_LINE = ("bench", "cli", "doctor", "execute", "prose", "report", "run")  # modules that no number of a notebook depends on
LOOKS_AT_ALL_ROWS = re.compile(  # a section that picks rows by section, method or label names its own
    r"board\.(rows(?! if row\.(section == |method in |label == ))|claims|close\(|verdicts\(|table\(\))"
)
BUILT_IN = {"MODEL": ("embedded",), "DATASET": ("rotten_tomatoes", "imdb")}  # names that need no file and no hub
WOVEN, SCRATCH = "woven.ipynb", "tmp"
DIFFERENT = {"MODEL": "another model", "DATASET": "other data", "SEED": "another seed"}
GRACE = 5.0  # seconds that a child has to end after it was told to
NO_ROWS = {
    "rows": [],
    "claims": [],
    "failures": [],
    "section_seconds": {},
    "seed_accuracies": {},
}  # the board's journal before the first row

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
        return f"{chapter}{part}{f'.{self.track}' if self.track != 'all' else ''}"


@dataclass
class Stop:
    """Set by a signal: running chapters end, pending ones are not started."""

    event: threading.Event = field(default_factory=threading.Event)
    signal: int | None = None

    def set(self, signum: int, frame: object = None) -> None:
        """Signal handler."""
        self.signal = signum
        self.event.set()


@contextlib.contextmanager
def signals(stop: Stop) -> Iterator[None]:
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


def run_all(names: list[str], request: Request, jobs: int = 1, on_progress: Callable[[str, str], None] = lambda name, what: None,
            stop: Stop | None = None) -> list[Outcome]:  # fmt: skip
    """Run chapters, `jobs` at a time, until done or stopped. A failed chapter does not stop the others.

    Raises CompanionError, before any chapter starts, where another run has one of the outputs, or where one holds a run of another
    model, data or seed.
    """
    stop = stop or Stop()

    def one(name: str) -> Outcome | None:
        if stop.event.is_set():
            return None
        try:
            return run_chapter(name, request, lambda what: on_progress(name, what), stop)
        except (CompanionError, OSError) as error:
            run_name = request.name(name)
            return Outcome(name, run_name, request.out / f"{run_name}.ipynb", ok=False, message=in_words(error))

    with contextlib.ExitStack() as outputs:
        for name in names:
            outputs.enter_context(exclusive(request.out, request.name(name)))
            refuse_another(request, name)
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(one, name) for name in names]
            while wait(futures, timeout=0.2).not_done:  # short waits: the main thread must see signals
                pass
        return [future.result() for future in futures if future.result()]


def in_words(error: Exception) -> str:
    """One line on an error: of what the system refuses the reason, and the file where one is named."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


@contextlib.contextmanager
def exclusive(out: Path, name: str) -> Iterator[None]:
    """One run at a time per output. Raises CompanionError that names the other run, or where `out` cannot be written."""
    lock, owner = FileLock(out / f".{name}.lock"), out / f".{name}.pid"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        owner.write_text(str(os.getpid()))
    except Timeout:
        other = owner.read_text().strip() if owner.is_file() else "unknown"
        message = f"{name} is being run into {out} already (process {other}): wait for it, or give another --out"
        raise CompanionError(message) from None
    except OSError as error:
        raise CompanionError(f"cannot write to {out} ({error.strerror or error}): give another --out") from None
    try:
        yield
    finally:
        for file in (owner, Path(lock.lock_file)):  # while the lock is held: whoever opened the file before sees that it is gone
            with contextlib.suppress(OSError):
                file.unlink()
        lock.release()


def run_chapter(chapter: str, request: Request, on_progress: Progress = lambda what: None, stop: Stop | None = None) -> Outcome:
    """Weave and execute one chapter in a process of its own. The caller holds its output (`run_all` does)."""
    name, stop = request.name(chapter), stop or Stop()
    folder, final = request.out / f".{name}", request.out / f"{name}.ipynb"
    for whole in (final, results_file(request, name)):
        cache.remove_halves(whole)
    stamp = make_stamp(request)
    notebook = notebooks.weave(chapter, request.sections, request.track)
    if request.resume and finished(final, results_file(request, name), stamp, notebook):
        clear_up(folder, request.out / f"{name}.failed.ipynb")  # a run killed in its last moment leaves these beside its notebook
        return Outcome(chapter, name, final, ok=True, skipped=True)
    if request.resume and not folder.exists():
        begin_from_finished(final, results_file(request, name), folder)
    done = finished_sections(folder, stamp, notebook) if request.resume else []
    in_vain = request.resume and not done and (folder.exists() or final.exists())
    held = (companion_facts(final).get("stamp") or {}).get("profile", request.profile)
    notebook.metadata["companion"].update(stamp=stamp, section_keys=section_keys(notebook))
    order = prepare(notebook, request, folder, done)
    keys = [section.key for section in notebooks.sections(notebook)]
    tell = with_time_left(on_progress, request, chapter, keys)
    if done:
        tell(f"going on after {len(done)} finished sections")
    if in_vain:
        tell("no section of the earlier run can be kept: all run again")
    if held != request.profile:
        tell(f"the notebook of profile {held} will be replaced, its results stay")
    before = version_of(results_file(request, name))
    environment = child_environment(request, name, folder, done, keys) | {"COMPANION_CODE": code_key(notebook)}
    status = watch_child(order, environment, folder, tell, stop)
    return conclude(chapter, request, folder, status, stop, written=version_of(results_file(request, name)) not in (None, before))


# --- what a run is made from ----------------------------------------------------------------------------------------


def make_stamp(request: Request) -> dict:
    """Everything but code that decides a run's numbers: two runs with one stamp and equal section keys give the same rows."""
    content = {name: content_key(request.parameters.get(name), known) for name, known in BUILT_IN.items()}
    return {"profile": request.profile, "parameters": {**request.parameters, **content}, "sections": list(request.sections),
            "track": request.track, "machine": results.processor_and_instructions()}  # fmt: skip


def refuse_another(request: Request, chapter: str) -> None:
    """Raise CompanionError where an output holds a run of another model, data or seed: this run would put its own in that one's place."""
    name, asked = request.name(chapter), request.parameters
    final, written = request.out / f"{name}.ipynb", results_file(request, name)
    for place in (final, request.out / f".{name}" / WOVEN) if request.resume else (final,):
        stamp = companion_facts(place).get("stamp")
        if stamp:
            refuse_differing(place, stamp.get("parameters", {}), make_stamp(request)["parameters"], chapter)
    if not final.exists() and written.exists():
        with contextlib.suppress(CompanionError):  # a file that nobody can read is no loss
            asked = results.read(written)["provenance"].get("parameters") or asked
        refuse_differing(written, asked, request.parameters, chapter)


def refuse_differing(place: Path, before: dict, now: dict, chapter: str) -> None:
    """Raise CompanionError where two runs' parameters name another model, other data or another seed."""
    usual = results.usual(chapter)
    given = [{**usual, **{name: str(value) for name, value in one.items() if value != "default"}} for one in (before, now)]
    wrong = [text for name, text in DIFFERENT.items() if given[0].get(name) != given[1].get(name)]
    if wrong:
        raise CompanionError(f"{place} is of {' and '.join(wrong)}: give another --out, or remove it")


def section_keys(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Section -> a hash of its code cells, and of every file of the package that they or the opening import, directly or not."""
    code = code_by_section(notebook)
    opening = code[notebooks.OPENING]
    return {key: digest([*opening, *cells, *map(module_code, imported(opening + cells))]) for key, cells in code.items()}


def code_key(notebook: nbformat.NotebookNode) -> str:
    """A hash of a notebook's code cells: what its results say of the lesson that they are of."""
    return digest([source for cells in code_by_section(notebook).values() for source in cells])


def digest(texts: list[str]) -> str:
    """A short hash of several texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def imported(cells: list[str]) -> list[Path]:
    """The files of the package that code imports, directly or not, in order. Data files of the package belong to all."""
    known, waiting = set(), package_files("\n".join(cells))
    while waiting:
        known |= waiting
        waiting = set().union(*map(imports_of, waiting)) - known
    return sorted(known | set((ROOT / "utils").rglob("*.csv")))


@functools.cache
def imports_of(file: Path) -> set[Path]:
    """The files of the package that this one imports itself."""
    return package_files(file.read_text(encoding="utf-8"))


def package_files(source: str) -> set[Path]:
    """The files of the package that this source names in its imports, but for those of the command line, on which no number depends."""
    names = set()
    for node in ast.walk(ast.parse(without_magics(source))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {notebooks.source_file(name) for name in names if name.split(".")[0] == "utils"} - {None}
    return {file for file in files if file.stem not in COMMAND_LINE}


def without_magics(source: str) -> str:
    """Notebook code as Python: lines for the shell or for IPython import nothing."""
    return "\n".join(line for line in source.split("\n") if not line.lstrip().startswith(("%", "!")))


@functools.cache
def module_code(path: Path) -> str:
    """What a file says to the computer: Python without comments and docstrings, anything else as it is."""
    text = path.read_text(encoding="utf-8")
    return without_docstrings(text) if path.suffix == ".py" else text


def without_docstrings(source: str) -> str:
    """A module's code in one form, however it was written and explained."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.dump(tree)


def content_key(name: str | None, built_in: tuple[str, ...] = ()) -> str:
    """A local file's or folder's content as a hash. A hub name stands for itself, an embedded source for the hash pinned in the code."""
    place = Path(name) if name and name not in built_in else None
    if place is None or not place.exists():
        return name or "default"
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.relative_to(place)))
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def results_file(request: Request, name: str) -> Path:
    """Where the board of this run writes."""
    return request.out / "results" / request.profile / f"{name}.json"


def version_of(path: Path) -> tuple | None:
    """What changes whenever a file is written; None where it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file; None where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def companion_facts(path: Path) -> dict:
    """What a notebook says of its run; empty for one that is missing or cut short."""
    try:
        return dict(nbformat.read(path, as_version=4).metadata.get("companion", {}))
    except Exception:  # whatever a damaged file raises, it counts as not there
        return {}


def finished(final: Path, written: Path, stamp: dict, woven: nbformat.NotebookNode) -> bool:
    """Whether a run of this notebook with this stamp ended without an error, and the executed notebook and the results that it wrote are there."""
    facts = companion_facts(final)
    known = facts.get("results_sha256")
    same = facts.get("stamp") == stamp and not facts.get("errors") and known is not None and known == file_hash(written)
    same = same and facts.get("section_keys") == section_keys(woven)
    return same and notebooks.same_cells(nbformat.read(final, as_version=4), woven)


def begin_from_finished(final: Path, written: Path, folder: Path) -> None:
    """Turn a run that came to its end into one that can be gone on with; nothing where notebook and results do not belong together."""
    facts = companion_facts(final)
    known = facts.get("results_sha256")
    if known is None or known != file_hash(written):
        return
    notebook, content = nbformat.read(final, as_version=4), json.loads(written.read_text(encoding="utf-8"))
    failed = {error["section"] for error in facts.get("errors", [])} | {
        failure["section"] for failure in content.get("failures", [])
    }
    keys = [section.key for section in notebooks.sections(notebook)]
    notebook.metadata["companion"]["finished"] = [key for key in keys if key not in failed]
    folder.mkdir()
    nbformat.write(notebook, folder / "partial.ipynb")
    (folder / "rows.json").write_text(json.dumps({name: content.get(name, empty) for name, empty in NO_ROWS.items()}))


def finished_sections(folder: Path, stamp: dict, woven: nbformat.NotebookNode) -> list[str]:
    """The sections that an earlier run with this stamp finished with the code that they have now; none where its notebook or rows cannot be read.

    The opening always runs, and so do, where anything else does, the sections that look at all rows: the one that closes the board does.
    """
    facts = companion_facts(folder / "partial.ipynb")
    try:
        journal = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if facts.get("stamp") != stamp or not isinstance(journal, dict) or "rows" not in journal:
        return []
    before, now, code = facts.get("section_keys", {}), section_keys(woven), code_by_section(woven)
    keep = [key for key in facts.get("finished", []) if key in now and key != notebooks.OPENING and before.get(key) == now[key]]
    return [key for key in keep if not LOOKS_AT_ALL_ROWS.search("\n".join(code[key]))]


def code_by_section(notebook: nbformat.NotebookNode) -> dict[str, list[str]]:
    """Section -> the sources of its code cells, papermill's parameters aside."""
    return {
        section.key: [
            cell.source
            for cell in notebook.cells[section.first : section.last]
            if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
        ]
        for section in notebooks.sections(notebook)
    }


# --- the child ------------------------------------------------------------------------------------------------------


def prepare(notebook: nbformat.NotebookNode, request: Request, folder: Path, done: list[str]) -> Path:
    """Write what the child needs into the run's folder; returns the order. A folder that is not gone on with starts empty."""
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "rows.json").write_text(json.dumps(NO_ROWS))
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    (folder / SCRATCH).mkdir()
    nbformat.write(notebook, folder / WOVEN)
    (folder / "progress").write_text("")
    files = {"woven": WOVEN, "partial": "partial.ipynb", "progress": "progress"}
    order = {**{what: str((folder / file).resolve()) for what, file in files.items()}, "parameters": request.parameters,
             "finished": done, "cwd": str(notebooks.NOTEBOOKS)}  # fmt: skip
    (folder / "order.json").write_text(json.dumps(order))
    return folder / "order.json"


def child_environment(request: Request, name: str, folder: Path, done: list[str], sections: list[str]) -> dict[str, str]:
    """What the kernel must know: where results, rows and progress go. Only our own package is on the path, not the current folder, and
    the user's own IPython start-up files stay outside. Temporary files lie in the run's folder, and go with it even after a kill."""
    return {**os.environ, **threads(), **without_hub(request), "IPYTHONDIR": str((folder / "ipython").resolve()),
            "TMPDIR": str((folder / SCRATCH).resolve()),
            "COMPANION_OUT": str(request.out.resolve()), "COMPANION_PROFILE": request.profile, "COMPANION_NAME": name,
            "COMPANION_PROGRESS": str((folder / "progress").resolve()), "COMPANION_JOURNAL": str((folder / "rows.json").resolve()),
            "COMPANION_FINISHED": json.dumps(done),
            "COMPANION_SECTIONS": json.dumps(sections), "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}  # fmt: skip


def threads() -> dict[str, str]:
    """Where a quota allows fewer cores than there are, as many threads as it allows: two that share half a core are slower than one."""
    allowed = results.cores()
    if "OMP_NUM_THREADS" in os.environ or allowed >= results.shown_cores():
        return {}
    return {"OMP_NUM_THREADS": str(max(1, int(allowed)))}


def without_hub(request: Request) -> dict[str, str]:
    """A run of what is built in or local asks no hub for anything."""
    local = all(at_hand(request.parameters.get(name), known) for name, known in BUILT_IN.items())
    return {"HF_HUB_OFFLINE": "1"} if local else {}


def at_hand(name: str | None, built_in: tuple[str, ...]) -> bool:
    """Whether a model or data set needs no hub: it is the usual one, built in, or a local file or folder."""
    return name is None or name in built_in or Path(name).exists()


def watch_child(order: Path, environment: dict, folder: Path, tell: Progress, stop: Stop) -> int:
    """Start the child, pass its progress on, and end it when told to stop; returns its exit status."""
    told = [""]
    with open(folder / "log", "w", encoding="utf-8") as log:
        child = subprocess.Popen([sys.executable, "-P", "-m", "utils.execute", str(order.resolve())], env=environment,
                                 stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=notebooks.NOTEBOOKS, start_new_session=True)  # fmt: skip
        try:
            while child.poll() is None and not stop.event.wait(0.2):
                pass_on(folder / "progress", told, tell)
        finally:
            child.stdin.close()  # the child sees the end of its input, kills the kernel and goes
            try:
                child.wait(GRACE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    pass_on(folder / "progress", told, tell)
    return child.returncode


def pass_on(progress: Path, told: list[str], tell: Progress) -> None:
    """Tell the whole lines that are new; the child and the board both name a section, it is told once."""
    for line in progress.read_text(encoding="utf-8", errors="replace").split("\n")[len(told) - 1 : -1]:
        if line != told[-1]:
            with contextlib.suppress(OSError):  # a terminal that has gone
                tell(line)
        told.append(line)


def conclude(chapter: str, request: Request, folder: Path, status: int, stop: Stop, written: bool) -> Outcome:
    """Put the executed notebook under its name, or say why there is none and what was kept. `written`: whether the run left results."""
    name = request.name(chapter)
    partial, final, failed = folder / "partial.ipynb", request.out / f"{name}.ipynb", request.out / f"{name}.failed.ipynb"
    facts = companion_facts(partial)
    errors = "; ".join(f"section {error['section']}: {error['error']}" for error in facts.get("errors", []))
    if status in (0, WITH_ERRORS):
        tidy(partial, final, file_hash(results_file(request, name)) if written else None)
        clear_up(folder, failed)
        lacking = [] if written else ["it wrote no results"]
        return Outcome(chapter, name, final, ok=status == 0 and written, message="; ".join([*filter(None, [errors]), *lacking]))
    if errors and facts["finished"] == []:  # the opening raised: there is nothing to go on from
        os.replace(partial, failed)
        shutil.rmtree(folder, ignore_errors=True)
        return Outcome(chapter, name, failed, ok=False, message=errors)
    kept = [key for key in facts.get("finished", []) if key != notebooks.OPENING]
    what = f"finished sections kept: {', '.join(kept)}; --resume goes on from there" if kept else "no section was finished"
    return Outcome(chapter, name, partial, ok=False, message=f"{why_it_ended(status, stop, errors, folder / 'log')}; {what}")


def clear_up(folder: Path, failed: Path) -> None:
    """Remove what a run that is not finished keeps: its folder, and the notebook of a failed opening."""
    failed.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def why_it_ended(status: int, stop: Stop, errors: str, log: Path) -> str:
    """One line on a child that did not come to its end."""
    if stop.signal:
        return f"stopped by {signal.Signals(stop.signal).name}"
    if status < 0:
        return f"the executing process was killed by {signal.Signals(-status).name}"
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return errors or (said or [f"the executing process ended with status {status}"])[-1]


def tidy(source: Path, target: Path, results: str | None) -> None:
    """Put the notebook under its name, with the hash of the results that belong to it, and without what makes every rerun a diff."""
    notebook = nbformat.read(source, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata["companion"].pop("finished", None)
    notebook.metadata["companion"]["results_sha256"] = results
    count = 0
    for cell in notebook.cells:
        for name in ("papermill", "execution", *(["tags"] if not cell.metadata.get("tags") else [])):
            cell.metadata.pop(name, None)
        if cell.get("execution_count"):  # counted anew: a run that was gone on with had several kernels
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    cache.write_atomically(target, nbformat.writes(notebook) + "\n")


# --- time left ------------------------------------------------------------------------------------------------------


def with_time_left(on_progress: Progress, request: Request, chapter: str, keys: list[str]) -> Progress:
    """Progress with an estimate of the time left, where an earlier run of this part or (for whole sections) of the chapter is known."""
    before = earlier_seconds(request.out, request.profile, request.name(chapter))
    if not before and request.track == "all":
        before = earlier_seconds(request.out, request.profile, chapter)
    clock = Clock({key: before[key] for key in keys if key in before})
    return lambda what: on_progress(what + clock.left(what))


def earlier_seconds(out: Path, profile: str, name: str) -> dict[str, float]:
    """Seconds per section that an earlier run took, here or in the committed results; empty where nobody knows."""
    for folder in (out, notebooks.NOTEBOOKS):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((folder / "results" / profile / f"{name}.json").read_text(encoding="utf-8"))["section_seconds"]
            return {key: float(seconds) for key, seconds in found.items()}
    return {}


class Clock:
    """Time left in a chapter, from what each section took before and how this run compares so far."""

    def __init__(self, before: dict[str, float]):
        self.before, self.section = before, notebooks.OPENING
        self.started = self.began = time.perf_counter()  # the run, and the present section
        self.done = 0.0  # what the sections of this run that are over took before

    def left(self, what: str) -> str:
        """` · about 5 min left`, or nothing where no earlier run is known. `what` is a line of progress."""
        now, key = time.perf_counter(), what.removeprefix("section ")
        if key not in (what, self.section):
            if self.section == notebooks.OPENING:  # fine-tunes the baseline or takes it from the cache: no measure of speed
                self.started = now
            else:
                self.done += self.before.get(self.section, 0.0)
            self.section, self.began = key, now
        keys = list(self.before)
        if self.section not in keys:
            return ""
        ratio = (self.began - self.started) / self.done if self.done > 20 else 1.0
        rest = ratio * sum(self.before[key] for key in keys[keys.index(self.section) :]) - (now - self.began)
        return f" · about {max(1, round(rest / 60))} min left"
