"""The `companion` command: doctor, run, weave, catalogue, report, bench.

Torch and transformers are imported inside the commands, so that `--help` and a wrong argument answer at once.
"""

import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from utils import CompanionError

app = typer.Typer(help="BERT compression companion: run, build and check the notebooks.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False)  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 150)
errors = Console(stderr=True)
DEFAULT_PROFILE = os.environ.get("COMPANION_PROFILE") or "cpu"
DEFAULTS = {"MODEL": "embedded", "DATASET": "rotten_tomatoes", "SEED": 0, "DEVICE": "auto"}
README_MARKS = ("<!-- results:begin -->", "<!-- results:end -->")

Chapters = Annotated[list[str] | None, typer.Argument(help="Chapters, such as 01 or 01_pruning. All where none is named.")]
ProfileOption = Annotated[str, typer.Option(help="smoke, cpu or gpu.")]


def main() -> None:
    """Entry point: a CompanionError becomes one line on stderr and exit code 2."""
    try:
        app()
    except CompanionError as error:
        errors.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)


@app.command()
def run(
    chapters: Chapters = None,
    profile: ProfileOption = DEFAULT_PROFILE,
    model: Annotated[str, typer.Option(help="embedded, a local folder, or a hub name.")] = "embedded",
    dataset: Annotated[
        str, typer.Option(help="rotten_tomatoes, imdb, a local file or folder, or a hub name.")
    ] = "rotten_tomatoes",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Where notebooks and results go.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Skip chapters that are finished already.")] = False,
) -> None:
    """Execute chapters with papermill. A failed chapter does not stop the others, but it fails the command."""
    from utils import notebooks

    names = notebooks.check_chapters(chapters or [])
    model, dataset = (str(Path(name).resolve()) if Path(name).exists() else name for name in (model, dataset))
    preflight(profile, model, dataset, device)
    given = {"MODEL": model, "DATASET": dataset, "SEED": seed, "DEVICE": device}
    parameters = {name: value for name, value in given.items() if value != DEFAULTS[name]}
    if profile != "cpu":
        parameters = {"PROFILE": profile, **parameters}
    request = notebooks.Request(out, profile, parameters, resume)
    outcomes = run_all(names, request, jobs)
    for outcome in outcomes:
        style = "skip" if outcome.skipped else "[green]ok[/]" if outcome.ok else "[bold red]failed[/]"
        console.print(f"{style}  {outcome.notebook}  {outcome.message}", highlight=False, soft_wrap=True)
    if any(outcome.ok for outcome in outcomes):
        show_results(out, profile)
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


def preflight(profile: str, model: str, dataset: str, device: str) -> None:
    """Find a wrong argument before a notebook starts. Raises CompanionError."""
    from utils import bert, profiles, tasks

    sizes = profiles.get(profile)
    profiles.pick_device(device)
    task = tasks.load(dataset, bert.load_tokenizer(model), sizes)
    bert.load(model, task.num_labels)


def run_all(names: list[str], request, jobs: int) -> list:
    """Run chapters, `jobs` at a time, with a line of progress each."""
    from utils import notebooks

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        futures = {}
        for name in names:
            line = progress.add_task(name, total=1, now="waiting")

            def on_progress(what: str, line=line, name=name) -> None:
                progress.update(line, now=what)
                if not console.is_terminal:
                    console.print(f"{name}: {what}", highlight=False)

            futures[pool.submit(notebooks.run_chapter, name, request, on_progress)] = line
        outcomes = []
        for future in as_completed(futures):
            outcome = future.result()
            outcomes.append(outcome)
            progress.update(futures[future], completed=1, now="done" if outcome.ok else "failed")
    return sorted(outcomes, key=lambda outcome: outcome.chapter)


@app.command()
def weave(
    chapters: Chapters = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a notebook is out of step.")] = False,
) -> None:
    """Build notebooks (without outputs) from lessons and code, or check that the committed ones match."""
    from utils import notebooks

    problems = []
    for name in notebooks.check_chapters(chapters or []):
        if check:
            problems += [problem for problem in [notebooks.out_of_step(name)] if problem]
            continue
        path = notebooks.NOTEBOOKS / f"{name}.ipynb"
        if notebooks.out_of_step(name) is None:
            console.print(f"{path} is in step")
            continue
        nbformat.write(notebooks.weave(name), path)
        console.print(f"{path} written without outputs: `companion run {name} --out notebooks` executes it")
    if problems:
        raise CompanionError("; ".join(problems) + ": run `companion run --out notebooks`")


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
        missing = method.gaps()
        if missing and (chapter or method.chapter in written):
            gaps.append(f"{method.id} lacks {', '.join(missing)}")
        name = f"{method.name}: {method.variant}" if method.variant else method.name
        table.add_row(
            method.id, name, method.object, method.section, str(len(method.tests)), str(method.rows), ", ".join(missing)
        )
    if not check:
        console.print(table)
        console.print(f"{sum(not m.gaps() for m in found)} of {len(found)} methods complete")
    elif gaps:
        raise CompanionError(f"{len(gaps)} gaps in the catalogue: " + "; ".join(gaps))


@app.command()
def report(
    profile: ProfileOption = "cpu",
    out: Annotated[Path, typer.Option(help="The run to report.")] = Path("runs"),
    readme: Annotated[bool, typer.Option("--readme", help="Write the tables into README.md instead.")] = False,
) -> None:
    """Print the results tables and the verdicts on the claims; `--readme` puts them into README.md."""
    if not readme:
        show_results(out, profile)
        return
    path = Path(__file__).resolve().parent.parent / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8"), out, profile), encoding="utf-8")


def with_results(text: str, out: Path, profile: str) -> str:
    """The README text with its results section made anew from the results files."""
    from utils import notebooks

    begin, end = README_MARKS
    before, _, rest = text.partition(begin)
    lines = []
    for content in notebooks.results(out, profile):
        machine = f"{content['provenance']['device']}, {content['wall_seconds'] / 60:.0f} min"
        lines += [f"\n**{content['chapter']}** ({machine})\n", *markdown_rows(content)]
        tally = [claim["verdict"] for claim in content["claims"]]
        counts = ", ".join(f"{tally.count(verdict)} {verdict}" for verdict in sorted(set(tally)))
        lines += [f"\nClaims: {counts}." if tally else ""]
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}"


def markdown_rows(content: dict) -> list[str]:
    """A results file as a Markdown table."""
    header = ["id", "method", "accuracy", "drop [95 %]", "loyalty", "MB", "speed ×1", "speed ×32", "MMAC"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in [{"method": "", "label": "**baseline**", **content["baseline"]}, *content["rows"]]:
        ratio = row.get("latency_ratio") or {}
        low, high = row["drop_ci95"]
        loyalty = f"{row['label_loyalty']:.3f}" if "label_loyalty" in row else ""
        cells = [row["method"], row["label"], f"{row['accuracy']:.3f}",
                 f"{100 * row['drop']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" if row["method"] else "", loyalty,
                 f"{row['stored_bytes'] / 1e6:.1f}", *(f"{ratio[b]:.2f}" if ratio else "" for b in ("batch1", "batch32")),
                 f"{row['macs'] / 1e6:.0f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def show_results(out: Path, profile: str) -> None:
    """Print a table per chapter and the verdicts."""
    from utils import notebooks

    for content in notebooks.results(out, profile):
        table = Table("id", "method", "accuracy", "drop (points)", "loyalty", "MB", "speed ×1", "speed ×32", "train s",
                      title=f"{content['chapter']}, profile {profile}")  # fmt: skip
        for row in [{"method": "-", "label": "baseline", **content["baseline"]}, *content["rows"]]:
            ratio = row.get("latency_ratio") or {}
            table.add_row(
                row["method"], row["label"], f"{row['accuracy']:.4f}", f"{100 * row['drop']:+.1f}", str(row.get("label_loyalty", "")),
                f"{row['stored_bytes'] / 1e6:.1f}", str(ratio.get("batch1", "")), str(ratio.get("batch32", "")), str(row["train_seconds"]),
            )  # fmt: skip
        console.print(table)
        for claim in content["claims"]:
            console.print(f"  {claim['id']:>4}  {claim['verdict']:<12}  {claim['statement']}", highlight=False)
    console.print(f"notebooks and results: {out.resolve()}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Show what is installed, what is missing, and how to get it."""
    probes = {
        "embedded model": _embedded_model, "embedded data": _embedded_data, "CUDA GPU": _cuda, "bfloat16": _bfloat16,
        "Jupyter kernel": _kernel, "cache folder": _cache,
    }  # fmt: skip
    checks = [*_check_packages(), *(_check(name, probe) for name, probe in probes.items())]
    table = Table("what", "state", "found", "what to do", title=f"Python {platform.python_version()} on {platform.platform()}")
    for name, state, found, advice in checks:
        style = {"ok": "[green]ok[/]", "optional": "[yellow]optional[/]", "missing": "[bold red]missing[/]"}[state]
        table.add_row(name, style, found, advice)
    console.print(table)
    if any(state == "missing" for _, state, _, _ in checks):
        raise typer.Exit(1)


def _check_packages() -> list[tuple]:
    found = []
    try:
        requirements = metadata.requires("bert-compression-companion") or []
    except metadata.PackageNotFoundError:
        return [("bert-compression-companion", "missing", "not installed", "make setup")]
    for requirement in requirements:
        name = requirement.partition(";")[0].partition("[")[0].partition("=")[0].strip(" ~<>!")
        if "extra ==" in requirement:
            continue
        try:
            found.append((name, "ok", metadata.version(name), ""))
        except metadata.PackageNotFoundError:
            found.append((name, "missing", "not installed", f"pip install -c constraints.txt {name}"))
    return found


def _check(name: str, probe) -> tuple:
    """Run one probe; whatever it raises becomes a row, never a traceback."""
    try:
        return (name, *probe())
    except Exception as error:
        return (name, "missing", str(error).splitlines()[0] if str(error) else type(error).__name__, "make setup")


def _embedded_model() -> tuple:
    from utils import bert

    return "ok", bert.resolve(bert.EMBEDDED), ""


def _embedded_data() -> tuple:
    from utils import tasks

    return "ok", str(tasks.package_file(*tasks.EMBEDDED_FILE, tasks.EMBEDDED_SHA256)), ""


def _cuda() -> tuple:
    import torch

    if torch.cuda.is_available():
        return "ok", torch.cuda.get_device_name(0), ""
    return "optional", "none", "the cpu profile needs none; for a GPU install a CUDA build of torch"


def _bfloat16() -> tuple:
    import torch

    from utils import profiles

    native = profiles.compute_dtype(profiles.pick_device()) == torch.bfloat16
    return ("ok", "native", "") if native else ("optional", "not native", "float32 is used: expect three to four times the time")


def _kernel() -> tuple:
    from jupyter_client.kernelspec import KernelSpecManager

    return "ok", KernelSpecManager().get_kernel_spec("python3").resource_dir, ""


def _cache() -> tuple:
    from utils import cache

    folder = cache.root()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return "missing", f"{folder} cannot be written", "set COMPANION_CACHE to a folder you can write"
    state, advice = ("ok", "") if free > 2e9 else ("missing", "free 2 GB, or set COMPANION_CACHE")
    return state, f"{folder} ({free / 1e9:.0f} GB free)", advice


@app.command()
def bench(device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto") -> None:
    """Measure the machine, a training step and inference, and print JSON."""
    started = time.perf_counter()
    import torch

    from utils import bert, costs, profiles, tasks, training

    stages = {"import": time.perf_counter() - started}

    def stage(name: str, since: float) -> None:
        stages[name] = time.perf_counter() - since

    where, profile = profiles.pick_device(device), profiles.get("cpu")
    start = time.perf_counter()
    task = tasks.load("rotten_tomatoes", bert.load_tokenizer(), profile)
    stage("data", start)
    start = time.perf_counter()
    model = bert.load().to(where)
    stage("model", start)
    start = time.perf_counter()
    rates = {name: costs.matmul_rate(dtype, where) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    stage("matmul", start)
    ceiling = rates["bf16"] if profiles.compute_dtype(where) == torch.bfloat16 else rates["fp32"]
    training.train(model, task, profile, steps=5)
    log = training.train(model, task, profile, steps=30)
    stages["30 training steps"] = log.seconds
    train_rate = training_flops(model, task, profile, 30) / log.seconds
    training.predict(model, task.validation, 0)
    start = time.perf_counter()
    training.predict(model, task.validation, 0)
    stage("inference on validation", start)
    infer_flops = 2 * sum(costs.macs(model, len(ids)) for ids in task.validation.input_ids)
    infer_rate = infer_flops / stages["inference on validation"]
    content = {
        "device": str(where),
        "threads": torch.get_num_threads(),
        "matmul_gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "training_step": {"milliseconds": round(1e3 * log.seconds / 30, 1), "gflops": round(train_rate / 1e9, 1),
                          "share_of_matmul_rate": round(train_rate / ceiling, 3)},
        "inference": {"gflops": round(infer_rate / 1e9, 1), "share_of_matmul_rate": round(infer_rate / ceiling, 3)},
        "stage_seconds": {name: round(seconds, 2) for name, seconds in stages.items()},
    }  # fmt: skip
    print(json.dumps(content, indent=1))


def training_flops(model, task, profile, steps: int) -> float:
    """FLOPs of a training run as executed, padding included: forward once, backward twice (embeddings are frozen)."""
    from utils import costs, training

    stream = training.endless_batches(task.train, profile.batch_size, task.tokenizer.pad_token_id, 0, steps)
    return 6 * sum(costs.macs(model, batch["input_ids"].shape[1], len(batch["rows"])) for batch in stream)


if __name__ == "__main__":
    main()
