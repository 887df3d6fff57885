"""The `companion` command: doctor, run, weave, catalogue, report, bench, lint.

Torch and transformers are imported inside the commands, so that `--help` and a wrong argument answer at once.
"""

import contextlib
import errno
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError

from utils import CompanionError, hub

app = typer.Typer(help="BERT compression companion: run, build and check the notebooks.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False)  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 150)
errors = Console(stderr=True)
OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
           errno.ENAMETOOLONG)  # a full or closed disk is no fault of the program  # fmt: skip
DEFAULT_PROFILE = os.environ.get("COMPANION_PROFILE") or "cpu"
DEFAULTS = {"MODEL": "embedded", "DATASET": None, "SEED": 0, "DEVICE": "auto"}  # None: the chapter's own

Chapters = Annotated[list[str] | None, typer.Argument(help="Chapters, such as 01 or 01_pruning. All where none is named.")]
ProfileOption = Annotated[str, typer.Option(help="smoke, cpu, full or gpu (full on CUDA, with longer trainings and texts).")]


def main() -> None:
    """Entry point: what the user or the machine can mend becomes one line on stderr and exit code 2; our own faults stay tracebacks."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that is none, or of another kind
            stream.reconfigure(errors="replace")  # a terminal that has no sign for × gets a question mark
    try:
        app()
    except CompanionError as error:
        fail(str(error))
    except SafetensorError as error:
        fail(f"a safetensors file cannot be read or written ({error})")
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        from utils.run import in_words

        fail(in_words(error))


def note(message: str) -> None:
    """Say on stderr what goes on but should be known."""
    errors.print(f"[yellow]note:[/] {escape(message)}", highlight=False, soft_wrap=True)


def fail(message: str) -> None:
    """Say what is wrong in one line, and exit."""
    errors.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    sys.exit(2)


@app.command()
def run(
    chapters: Chapters = None,
    profile: ProfileOption = DEFAULT_PROFILE,
    model: Annotated[str, typer.Option(help="embedded, a local folder, or a hub name.")] = "embedded",
    dataset: Annotated[
        str | None,
        typer.Option(
            help="rotten_tomatoes, imdb, a local file or folder, or a hub name.", show_default="rotten_tomatoes, in 06 imdb"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Where notebooks and results go.")] = Path("runs"),
    section: Annotated[
        list[str] | None, typer.Option(help="Only this section (and the opening), such as 7. May be repeated.")
    ] = None,
    track: Annotated[
        str, typer.Option(help="all; core: what a class of ninety minutes takes; claims: those over seeds, no rows.")
    ] = "all",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after an interruption or a change: sections of the same code are kept.")
    ] = False,
) -> None:
    """Execute chapters. A failed method costs its row, a failed chapter does not stop the others; both fail the command."""
    from utils import notebooks
    from utils import run as runs

    names, out = notebooks.check_chapters(chapters or []), expanded(out)
    if track == "claims" and not chapters:
        names = [name for name in names if notebooks.has_claims_over_seeds(name)]
    if out.exists() and not out.is_dir():
        raise CompanionError(f"--out {out} is a file: name a folder")
    for name in names:
        notebooks.weave(name, tuple(section or ()), track)  # an unknown section or track is told before anything starts
    sources = {kind: located(name, runs.BUILT_IN[kind]) for kind, name in (("MODEL", model), ("DATASET", dataset))}
    if not all(runs.at_hand(name, runs.BUILT_IN[kind]) for kind, name in sources.items()):
        look_for_the_hub()
    preflight(profile, sources["MODEL"], sources["DATASET"], device)
    given = {**sources, "SEED": seed, "DEVICE": device}
    parameters = {name: value for name, value in given.items() if value != DEFAULTS[name]}
    if profile != "cpu":
        parameters = {"PROFILE": profile, **parameters}
    request = runs.Request(out, profile, parameters, resume, tuple(section or ()), track)
    stop = runs.Stop()
    with runs.signals(stop):
        outcomes = show_progress(names, request, jobs, stop)
    finish(outcomes, request, stop)


def expanded(place: str | Path) -> Path:
    """A path whose tilde is the home folder, which a shell leaves as it is in `--out=~/x`."""
    try:
        return Path(place).expanduser()
    except RuntimeError:  # no such user, or nobody's home is known
        return Path(place)


def located(name: str | None, built_in: tuple[str, ...]) -> str | None:
    """A local file or folder by its full path, because chapters run in a folder of their own; other names as they are."""
    if name is None or name in built_in:
        if name and Path(name).exists():
            note(f"{name} is the built-in one; ./{name} names what lies here under that name")
        return name
    place = expanded(name)
    return os.path.abspath(place) if place.exists() else name  # links are not followed: their own names tell what they are


def look_for_the_hub() -> None:
    """Without network the hub's client looks into its cache at once, instead of trying again for a minute."""
    if "HF_HUB_OFFLINE" not in os.environ and not hub.answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the client is first imported, here and in the notebooks
        note("the hub does not answer: only what an earlier download left can be used of it")


def preflight(profile: str, model: str, dataset: str | None, device: str) -> None:
    """Find a wrong argument before a notebook starts. Raises CompanionError."""
    from utils import profiles

    sizes = profiles.get(profile)
    if device in ("auto", "cpu") and profile != "gpu" and model == DEFAULTS["MODEL"] and dataset == DEFAULTS["DATASET"]:
        return  # nothing that could be wrong, and torch and transformers take seconds to load
    from utils import bert, tasks

    profiles.pick_device(device, profile)
    task = tasks.load(dataset or "rotten_tomatoes", bert.load_tokenizer(model), sizes)
    bert.load(model, task.num_labels)
    about_data = [] if task.name in tasks.EMBEDDED_TASKS else task.notes  # of built-in ones `located` has told
    about_model = [] if model == bert.EMBEDDED else bert.notes(model, task.num_labels)
    for told in (*about_data, *about_model):
        note(told)


def show_progress(names: list[str], request, jobs: int, stop) -> list:
    """Run chapters with a line of progress each; a terminal that has gone does not matter."""
    from utils import run as runs

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        lines = {name: progress.add_task(name, total=1, now="waiting") for name in names}

        def on_progress(name: str, what: str) -> None:
            with contextlib.suppress(OSError):
                progress.update(lines[name], now=escape(what))
                if not console.is_terminal:
                    console.print(escape(f"{name}: {what}"), highlight=False)

        return runs.run_all(names, request, jobs, on_progress, stop)


def finish(outcomes: list, request, stop) -> None:
    """Say how every chapter ended, show the results, and exit with what a script can read."""
    for outcome in outcomes:
        style = "skip" if outcome.skipped else "[green]ok[/]" if outcome.ok else "[bold red]failed[/]"
        with contextlib.suppress(OSError):
            console.print(f"{style}  {escape(str(outcome.notebook))}  {escape(outcome.message)}", highlight=False, soft_wrap=True)
    if stop.signal:
        raise typer.Exit(128 + stop.signal)
    if any(outcome.ok for outcome in outcomes):
        with contextlib.suppress(OSError):
            show_results(request.out, request.profile, [outcome.name for outcome in outcomes])
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def weave(
    chapters: Chapters = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a notebook is out of step.")] = False,
) -> None:
    """Build notebooks (without outputs) from lessons and code, or check that the committed ones match.

    One that awaits its rerun keeps its outputs unless it is named.
    """
    from utils import notebooks

    found = {name: notebooks.out_of_step(name) for name in notebooks.check_chapters(chapters or [])}
    awaited = {name: why for name, why in notebooks.stale().items() if found.get(name) and (check or not chapters)}
    for name, why in awaited.items():
        errors.print(escape(f"warning: {name} is stale: {why}"), highlight=False, soft_wrap=True)
    wrong = {name: problem for name, problem in found.items() if problem and name not in awaited}
    if check and wrong:
        raise CompanionError("; ".join(wrong.values()) + ": run `companion run --out notebooks`")
    if check:
        return
    for name in [name for name in found if name not in awaited]:
        path, text = notebooks.NOTEBOOKS / f"{name}.ipynb", "is in step"
        if name in wrong:
            nbformat.write(notebooks.weave(name), path)
            text = f"written without outputs: `companion run {name} --out notebooks` executes it"
        console.print(escape(f"{path} {text}"), highlight=False, soft_wrap=True)


@app.command()
def catalogue(
    chapter: Annotated[str | None, typer.Option(help="One chapter, such as 01_pruning.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Fail if a method of a written chapter lacks something.")] = False,
) -> None:
    """List every method of the survey with its code, lesson section, tests and measured rows."""
    from utils import catalogue as methods

    written = methods.chapters()
    found = methods.load(chapter)
    table = Table("id", "method", "implemented in", "lesson", "tests", "rows", "missing", title="Methods of the survey")
    gaps = []
    for method in found:
        missing = methods.missing(method)
        if missing and (chapter or method.chapter in written):
            gaps.append(f"{method.id} lacks {', '.join(missing)}")
        name = f"{method.name}: {method.variant}" if method.variant else method.name
        cells = (method.id, name, method.object, method.section, str(len(method.tests)), str(method.rows), ", ".join(missing))
        table.add_row(*map(escape, cells))
    if not check:
        console.print(table)
        console.print(f"{sum(not m.gaps() for m in found)} of {len(found)} methods complete")
    elif gaps:
        raise CompanionError(f"{len(gaps)} gaps in the catalogue: " + "; ".join(gaps))


@app.command()
def report(
    profile: ProfileOption = "cpu",
    out: Annotated[Path, typer.Option(help="The run to report.")] = Path("runs"),
    readme: Annotated[
        bool,
        typer.Option("--readme", help="Write README.md's overview and the page of all rows: profile full where there is one."),
    ] = False,
    machines: Annotated[bool, typer.Option("--machines", help="Speeds and verdicts about time, machine by machine.")] = False,
    against: Annotated[str | None, typer.Option(help="What changed since this git revision.")] = None,
) -> None:
    """Print the results tables and the verdicts on the claims; `--readme` puts them into README.md."""
    from utils import report as reports

    out = expanded(out)
    if readme:
        reports.publish(out)
    elif against:
        for line in reports.changes(out, profile, against) or [f"nothing left its interval since {against}"]:
            console.print(escape(line), highlight=False, soft_wrap=True)
    elif machines:
        show_machines(reports.side_by_side(out, profile))
    else:
        show_results(out, profile)


def show_results(out: Path, profile: str, names: list[str] | None = None) -> None:
    """Print a table per chapter and the verdicts."""
    from utils import report as reports
    from utils import results

    if names is None:
        contents = {content["chapter"]: content for content in results.read_all(out, profile)}
    else:
        files = {name: out / "results" / profile / f"{name}.json" for name in names}
        contents = {name: results.read(file) for name, file in files.items() if file.is_file()}
    for name, content in contents.items():
        baseline, rows = results.rows_of(content)
        columns, lines = results.table(rows, baseline)
        table = Table(*map(escape, columns), title=escape(reports.title(name, content)))
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
        late = reports.overtaken(out, name, profile)
        if late:
            console.print(f"[yellow]note:[/] {escape(late)}", highlight=False, soft_wrap=True)
        for claim in content["claims"]:
            console.print(escape(f"  {claim['id']:>5}  {claim['verdict']:<12}  {claim['statement']}"), highlight=False)
    console.print(f"notebooks and results: {escape(str(out.resolve()))}", soft_wrap=True)


def show_machines(found: dict[str, dict[str, dict[str, str]]]) -> None:
    """A table per chapter: a column per machine."""
    for chapter, lines in found.items():
        names = sorted({machine for values in lines.values() for machine in values})
        table = Table("", *map(escape, names), title=escape(chapter))
        for line, values in lines.items():
            table.add_row(escape(line), *(escape(values.get(name, "")) for name in names))
        console.print(table)


@app.command()
def lint(chapters: Chapters = None) -> None:
    """Check what can be counted about the lessons and notebooks: readings, cell lengths, symbols, alt texts."""
    from utils import notebooks, prose

    problems = [f"{name}: {problem}" for name in notebooks.check_chapters(chapters or []) for problem in prose.problems(name)]
    for problem in problems:
        console.print(escape(problem), highlight=False, soft_wrap=True)
    if problems:
        raise CompanionError(f"{len(problems)} problems in the lessons")


@app.command()
def doctor() -> None:
    """Show what is installed, what is missing, and how to get it."""
    from utils import doctor as checkup

    checks = checkup.checks()
    table = Table(
        "what", "state", "found", "what to do", title=escape(f"Python {platform.python_version()} on {platform.platform()}")
    )
    styles = {"ok": "[green]ok[/]", "optional": "[yellow]optional[/]", "missing": "[bold red]missing[/]"}
    for name, state, found, advice in checks:
        table.add_row(escape(name), styles[state], escape(found), escape(advice))
    console.print(table)
    if any(state == "missing" for _, state, _, _ in checks):
        raise typer.Exit(1)


@app.command()
def bench(device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto") -> None:
    """Measure the machine, a training step and inference, and print JSON."""
    from utils import bench as benchmark

    print(json.dumps(benchmark.measure(device), indent=1))


if __name__ == "__main__":
    main()
