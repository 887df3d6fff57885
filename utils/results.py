"""Rows and results files: one typed row, one definition of its columns, three renderings, and the JSON on disk.

`results/<profile>/<chapter>.json` is the file of record. Times hold for one machine, so the file names it; what other machines
measured lies beside it as `<chapter>@<machine>.json` (`companion report --machines` lays them side by side). Runs of a part
lie there too, as `<chapter>.section-7.json` or `<chapter>.core.json`; they are nobody's record, but for one: claims over seeds, which
`full` alone judges, are judged by `full/<chapter>.claims.json` (`companion run --track claims --profile full`) until the whole chapter ran.
"""

import json
import os
import platform
import re
import subprocess
import textwrap
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

import pandas

from utils import CompanionError, cache, catalogue

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 118  # of a printed line
SPEED = "speed"
RECORD = ("full", "cpu")  # profiles whose results count, the better first
ENTRIES = {
    "chapter": str,
    "profile": str,
    "provenance": dict,
    "baseline": dict,
    "rows": list,
    "claims": list,
    "wall_seconds": int | float,
}
PACKAGES = ("torch", "transformers", "datasets", "safetensors", "numpy", "scipy")
CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux: what containers and batch systems allow
PARAMETER = re.compile(r'^(MODEL|DATASET|SEED) = "?([^"\s]+)', re.MULTILINE)  # in a lesson's cell of parameters
INSTRUCTIONS = {
    "avx512_vnni": "VNNI",
    "avx512_bf16": "AVX-512 bf16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "avx2": "AVX2",
}


@dataclass
class Row:
    """One result. Shares (accuracy, drop) lie in [0, 1]; sizes are bytes; ratios are the baseline's time over the model's."""

    method: str
    label: str
    accuracy: float
    accuracy_ci95: list[float]
    drop: float
    drop_ci95: list[float]
    parameters: int
    nonzero_parameters: int
    parameters_without_embeddings: int
    stored_bytes: int
    stored_bytes_without_embeddings: int
    macs: int
    hyperparameters: dict = field(default_factory=dict)
    seed: int = 0
    control_of: str | None = None
    label_loyalty: float | None = None
    probability_loyalty: float | None = None
    against_control: dict | None = (
        None  # {"control", "difference", "ci95"}: accuracy minus the dense model's after the same training
    )
    macs_length: int = 32
    peak_memory_bytes: int | None = None
    part_kinds: list[str] = field(default_factory=list)
    structure: str | None = None
    latency_of: str | None = None  # the row whose timing this is: weights of other values take no other time
    latency_ratio: dict | None = None
    latency_ratio_interval: dict | None = None
    latency_ms: dict | None = None
    train_seconds: float = 0.0
    train_energy_kwh_estimate: float | None = None
    simulated: bool = False
    effect: dict = field(default_factory=dict)
    section: str = ""
    track: str = "core"

    @classmethod
    def from_dict(cls, content: dict) -> "Row":
        """A row read from JSON. Raises CompanionError for keys that no row has, or that every row has and this one lacks."""
        if not isinstance(content, dict):
            raise CompanionError(f"a row is no dictionary, but {content!r:.40}")
        known = {f.name for f in fields(cls)}
        if set(content) - known:
            raise CompanionError(f"a row has unknown entries: {', '.join(sorted(set(content) - known))}")
        try:
            return cls(**content)
        except TypeError as error:
            raise CompanionError(f"a row is incomplete: {error}") from None

    def as_dict(self) -> dict:
        """JSON form."""
        return asdict(self)

    def speed(self, batch: int) -> float | None:
        """Speed against the baseline at a batch size, where it was measured."""
        return (self.latency_ratio or {}).get(f"batch{batch}")

    def cells(self) -> dict[str, str]:
        """The columns of every table, as text: accuracy in percent, differences in points with their 95 % intervals."""
        is_baseline = self.method == "-"
        against = self.against_control
        return {
            "id": self.method, "method": self.label, "accuracy %": f"{100 * self.accuracy:.1f}",
            "drop [95 %]": "" if is_baseline else interval(self.drop, self.drop_ci95),
            "vs dense control": interval(against["difference"], against["ci95"]) if against else "",
            "loyalty": "" if is_baseline or self.label_loyalty is None else f"{100 * self.label_loyalty:.0f} %",
            "MB": f"{self.stored_bytes / 1e6:.1f}", "MMAC": f"{self.macs / 1e6:.0f}",
            SPEED: self.speeds(), "train s": f"{self.train_seconds:.0f}",
        }  # fmt: skip

    def speeds(self) -> str:
        """Speed at batch 1 and 32, or why there is none."""
        if self.simulated:
            return "emulated"
        if self.latency_of == "baseline":
            return "as dense"
        return " / ".join(f"{self.speed(batch):.2f}" for batch in self.batches())

    def batches(self) -> list[int]:
        """The batch sizes at which speed was measured (a row may hold other races, too)."""
        return [int(name.removeprefix("batch")) for name in self.latency_ratio or {} if name.startswith("batch")]

    def summary(self) -> str:
        """What a reader sees right after a method ran: one line, folded where it is longer than a page is wide."""
        facts = [f"accuracy {100 * self.accuracy:.1f} % (drop {interval(self.drop, self.drop_ci95, '+')} points)",
                 f"{self.stored_bytes / 1e6:.1f} MB", *self._speed_in_words()]  # fmt: skip
        if self.label_loyalty is not None:
            facts.append(f"loyalty {100 * self.label_loyalty:.0f} %")
        if self.against_control:
            against = self.against_control
            facts.append(f"{interval(against['difference'], against['ci95'], '+')} points against {against['control']}")
        unbroken = (fact.replace(" ", "\xa0") for fact in facts)  # a line is folded between facts, not inside
        line = f"{self.method} {self.label}: {', '.join(unbroken)}"
        return textwrap.fill(line, COLUMNS, subsequent_indent="    ", break_on_hyphens=False).replace("\xa0", " ")

    def _speed_in_words(self) -> list[str]:
        said = self.speeds()
        if not said:
            return []
        if said == "as dense":
            return ["speed as the dense one"]
        linked = f" (timed as {self.latency_of})" if self.latency_of and not self.simulated else ""
        return [f"speed {said if self.simulated else '×' + said.replace('/ ', '/ ×')}{linked}"]


def interval(value: float, ends: list[float], sign: str = "") -> str:
    """A share as points with its interval: 2.3 [1.0, 3.6]; with the sign `+`: +2.3 [1.0, 3.6]."""
    return f"{100 * value:{sign}.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


# --- renderings -----------------------------------------------------------------------------------------------------


def table(rows: list[Row], baseline: Row | None = None) -> tuple[list[str], list[list[str]]]:
    """Column names and the cells of every line, the baseline first; columns that are empty throughout are left out."""
    lines = [row.cells() for row in ([baseline] if baseline else []) + rows]
    names = [name for name in (lines[0] if lines else {}) if any(line[name] for line in lines)]
    measured = next((row.batches() for row in rows if row.batches()), [])
    speed = " ".join([SPEED, " / ".join(f"×{batch}" for batch in measured)]).strip()
    headings = [speed if name == SPEED else name for name in names]
    return headings, [[line[name] for name in names] for line in lines]


def as_frame(rows: list[Row], baseline: Row | None = None) -> pandas.DataFrame:
    """A table for notebooks."""
    names, lines = table(rows, baseline)
    return pandas.DataFrame(lines, columns=names).set_index("id") if names else pandas.DataFrame()


def as_markdown(rows: list[Row], baseline: Row | None = None) -> str:
    """Rows as a table for Markdown pages."""
    return markdown_table(*table(rows, baseline))


def markdown_table(names: list[str], lines: list[list[str]]) -> str:
    """A table for Markdown pages; a bar inside a cell is escaped."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *escaped])


# --- files ----------------------------------------------------------------------------------------------------------


def path(name: str, profile: str) -> Path:
    """Where a chapter's results file goes: under $COMPANION_OUT, else runs/."""
    return Path(os.environ.get("COMPANION_OUT") or ROOT / "runs") / "results" / profile / f"{name}.json"


def write(target: Path, content: dict) -> None:
    """Write a results file, whole or not at all."""
    cache.write_atomically(target, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read(source: Path) -> dict:
    """A results file. Raises CompanionError for one that is missing, cut short, or something else."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompanionError(
            f"{source} is no readable results file ({str(error).splitlines()[0]}): run the chapter again"
        ) from None
    whole = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in ENTRIES.items())
    if not whole or "device" not in content["provenance"]:
        raise CompanionError(f"{source} is no results file of this suite")
    return content


def read_all(out: Path, profile: str) -> list[dict]:
    """The files of record of a run, chapter by chapter; files of other machines and of parts aside. CompanionError where there are none."""
    found = files(out, profile)
    if not found:
        raise CompanionError(f"no results of profile {profile!r} under {out}: run `companion run --profile {profile}` first")
    return [read(file) for file in found.values()]


def files(out: Path, profile: str, machines: bool = False) -> dict[str, Path]:
    """The files of record of a run, chapter -> path; with `machines` also what others measured, chapter@machine -> path."""
    aside = {"."} if machines else {".", "@"}  # a dot marks a run of a part
    return {file.stem: file for file in sorted((out / "results" / profile).glob("*.json")) if not aside & set(file.stem)}


def of_record(out: Path) -> list[dict]:
    """What the README shows: for every chapter the file of profile `full` where there is one, else that of `cpu`. CompanionError for none.

    Claims over seeds, which `cpu` leaves open, are those of `full` where these alone were run; `over_seeds` then is their provenance.
    """
    found: dict[str, Path] = {}
    for profile in RECORD:
        found = files(out, profile) | found
    if not found:
        raise CompanionError(f"no results of profile {' or '.join(RECORD)} under {out}: run `companion run` first")
    return [with_seeds(read(found[chapter]), out) for chapter in sorted(found)]


def with_seeds(content: dict, out: Path) -> dict:
    """Results whose claims over seeds are those that were judged with enough of them, where the same were."""
    judged = judged_over_seeds(content["chapter"], out)
    if judged is None or judged["profile"] == content["profile"]:
        return content
    known = {(claim["id"], claim["statement"]): claim for claim in judged["claims"] if claim["unit"] == "seed"}
    claims = [known.get((claim["id"], claim["statement"]), claim) for claim in content["claims"]]
    return {**content, "claims": claims, "over_seeds": judged["provenance"]}


def judged_over_seeds(chapter: str, out: Path) -> dict | None:
    """The results of profile `full` that judge a chapter's claims over seeds: the whole chapter's, else those of its track `claims`."""
    places = (out / "results" / "full" / f"{chapter}{part}.json" for part in ("", ".claims"))
    return next((read(place) for place in places if place.is_file()), None)


def verdict_of_record(chapter: str, claim: str, out: Path = ROOT / "notebooks") -> str:
    """A sentence: what the committed results of profile `full` say of a claim that smaller profiles cannot judge."""
    content = judged_over_seeds(chapter, out)
    for one in content["claims"] if content else []:
        if one["id"] == claim:
            return f"verdict of record, profile full on {machine_of(content)}: {one['verdict'].upper()}"
    return "no verdict of record when this ran (`--profile full --track claims`); later ones: notebooks/results/README.md"


def rows_of(content: dict) -> tuple[Row, list[Row]]:
    """Baseline and rows of a results file. The first edition's baselines had no name, and a share more."""
    base = {"method": "-", "label": "baseline", **content["baseline"]}
    if "majority_accuracy" in base:
        base["effect"] = {"majority_accuracy": base.pop("majority_accuracy")}
    return Row.from_dict(base), [Row.from_dict(row) for row in content["rows"]]


# --- where numbers come from ----------------------------------------------------------------------------------------


def provenance() -> dict:
    """What a reader needs to trust or repeat a number: commit, versions, platform, threads. Where there is no git, the commit is unknown."""
    import torch

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted_code": bool(git("status", "--porcelain", "--", "utils", "lessons")),
        "versions": {"python": platform.python_version(), **{package: metadata.version(package) for package in PACKAGES}},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def machine(device: object = "cpu") -> dict:
    """The processor, its matrix instructions, the cores that this process may use, and the GPU where it is the device."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    gpu = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else None
    return {"processor": processor(), "instructions": [name for name in INSTRUCTIONS if capabilities.get(name)],
            "cores": cores(), "gpu": gpu}  # fmt: skip


def processor() -> str:
    """The processor's name as the system gives it."""
    found = re.search(r"model name\s*:\s*(.+)", processor_facts())
    if found:
        return found[1].strip()
    if platform.system() == "Darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return done.stdout.strip() or platform.processor()
    return platform.processor() or platform.machine()


def processor_and_instructions() -> str:
    """The processor with its matrix instructions, as far as the system tells without torch: one name may stand for machines that
    multiply in different precisions."""
    flags = set(processor_facts().split())
    return " ".join([processor(), *(name for name in INSTRUCTIONS if name in flags)])


def processor_facts() -> str:
    """What Linux says of its processors; empty elsewhere."""
    facts = Path("/proc/cpuinfo")
    return facts.read_text(encoding="utf-8") if facts.is_file() else ""


def machine_name(found: dict) -> str:
    """A machine in words: `AMD EPYC (VNNI, AVX-512 bf16), 2 cores`."""
    if found["gpu"]:
        return found["gpu"]
    fast = [INSTRUCTIONS[name] for name in found["instructions"]]
    fast = fast[:-1] if len(fast) > 1 and fast[-1] == "AVX2" else fast  # said only where there is nothing faster
    cores = f"{found['cores']:g} core{'s' * (found['cores'] != 1)}"
    return f"{found['processor']}{' (' + ', '.join(fast) + ')' if fast else ''}, {cores}"


def machine_of(content: dict) -> str:
    """The machine of a results file, in words; the first edition's files name a device and threads."""
    return content["provenance"]["device"]


def unusual(content: dict) -> str:
    """Model, data and seed of a results file, as far as they are not the usual ones of its chapter: `data my.csv, seed 2`."""
    given, known = content["provenance"].get("parameters") or {}, usual(content["chapter"])
    words = {"MODEL": "model", "DATASET": "data", "SEED": "seed"}
    found = {word: str(given[name]) for name, word in words.items() if name in given and str(given[name]) != known.get(name)}
    return ", ".join(f"{word} {value}" for word, value in found.items())


def usual(chapter: str) -> dict[str, str]:
    """MODEL, DATASET and SEED that a chapter's lesson begins with, as text; empty for a chapter that has no lesson."""
    lesson = catalogue.lesson_path(chapter)
    found = PARAMETER.findall(lesson.read_text(encoding="utf-8")) if lesson.is_file() else []
    return dict(reversed(found))  # the first of a name


# --- what the system allows -----------------------------------------------------------------------------------------


def cores() -> float:
    """Cores that this process may use: those that it may run on, or the share of time that its control groups allow, if that is less."""
    return min([shown_cores(), *quotas()])


def shown_cores() -> int:
    """Cores that this process may run on, whatever share of their time it gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quotas() -> list[float]:
    """Cores' worth of time that each control group around this process allows; empty where nothing is limited."""
    pairs = [group_values(folder, "cpu.max") or group_values(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us")
             for folder in control_groups("cpu")]  # fmt: skip
    return [float(pair[0]) / float(pair[1]) for pair in pairs if len(pair) == 2 and all(map(str.isdigit, pair)) and int(pair[1])]


def memory_limits() -> list[int]:
    """Bytes that each control group around this process allows it; empty where nothing is limited."""
    found = [group_values(folder, "memory.max") or group_values(folder, "memory.limit_in_bytes")
             for folder in control_groups("memory")]  # fmt: skip
    return [int(values[0]) for values in found if values and values[0].isdigit()]


def control_groups(controller: str) -> list[Path]:
    """Folders of the control groups around this process, the innermost first, in version 2 (no controller is named) and 1."""
    found = []
    for line in read_words(OWN_GROUPS):
        _, controllers, place = (*line.split(":", 2), "", "")[:3]
        if not controllers or controller in controllers.split(","):
            top = CONTROL_GROUPS / controller if controllers else CONTROL_GROUPS
            inner = top / place.strip("/")
            found += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
    return found


def group_values(folder: Path, *names: str) -> list[str]:
    """The words in a control group's files; `max` and -1 mean no limit."""
    return [word for name in names for word in read_words(folder / name)]


def read_words(path: Path) -> list[str]:
    """The words of a small file; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []
