"""What is said about results: the README's overview, the page of all rows, several machines side by side, and what changed since
another commit."""

import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils import CompanionError, cache, results
from utils.results import ROOT, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

README = ROOT / "README.md"
MARKS = ("<!-- results:begin -->", "<!-- results:end -->")
PAGE, PICTURE = Path("results/README.md"), Path("results/overview.png")  # under `notebooks`; GitHub shows a folder's README
MADE_FROM = "Source"  # of the entries that a PNG file may have
FAMILIES = {"P": "pruning", "Q": "quantization", "K": "distillation", "S": "parameter sharing", "T": "tensor decomposition",
            "L": "sub-quadratic attention"}  # fmt: skip
SMALL = "Front of bytes (no other method's row is as accurate in a smaller file)"
FAST = "Front of speed (none is as accurate and faster; each speed holds for the machine of its chapter)"

# --- the README and the page of all rows ----------------------------------------------------------------------------


def publish(out: Path) -> None:
    """Write the README's results section, the page of all rows and the picture.

    Raises CompanionError where there are no results, or some that a later run did not replace.
    """
    from utils import plots

    contents = results.of_record(out)
    late = [why for content in contents if (why := overtaken(out, content["chapter"], content["profile"]))]
    if late:
        raise CompanionError("; ".join(late) + ": run it again before its numbers are published")
    cache.write_atomically(out / PAGE, page(contents))
    figure = picture(contents)
    figure.savefig(out / PICTURE, dpi=plots.DPI, metadata={MADE_FROM: fingerprint(contents)})
    cache.write_atomically(README, with_results(README.read_text(encoding="utf-8"), contents, words(figure)))


def outdated(out: Path) -> list[str]:
    """Which of the published files do not show what the committed results render to."""
    from PIL import Image

    contents, found = results.of_record(out), []
    text = README.read_text(encoding="utf-8")
    if with_results(text, contents, words(picture(contents))) != text:
        found.append(README.name)
    if not (out / PAGE).is_file() or (out / PAGE).read_text(encoding="utf-8") != page(contents):
        found.append(str(PAGE))
    if not (out / PICTURE).is_file() or Image.open(out / PICTURE).info.get(MADE_FROM) != fingerprint(contents):
        found.append(str(PICTURE))
    return found


def with_results(text: str, contents: list[dict], alt: str) -> str:
    """The README's text with its results section made anew; `alt` describes the picture."""
    begin, end = MARKS
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{overview(contents, alt)}\n{end}{rest.partition(end)[2]}"


def overview(contents: list[dict], alt: str) -> str:
    """The README's results: the picture, per chapter the rows of the core track, and all verdicts."""
    fronts = [f"*{what}:* {'; '.join(map(in_short, rows))}.\n" for what, rows in on_fronts(contents).items()]
    return "\n".join([f"![{alt}](notebooks/{PICTURE})\n", *fronts, *(chapter(content, ("core",)) for content in contents)])


def page(contents: list[dict]) -> str:
    """All rows of all chapters, with the verdicts."""
    head = ("# All rows\n\nMade by `companion report --readme` from the results files beside this page; what the columns mean, "
            "the README says under *Results*.")  # fmt: skip
    return "\n".join([head, *(chapter(content, ("core", "extra")) for content in contents)]) + "\n"


def chapter(content: dict, tracks: tuple[str, ...]) -> str:
    """A chapter's rows of these tracks under the machine that its speeds hold for, and its verdicts."""
    machine = f"{results.machine_of(content)}, profile {content['profile']}, {content['wall_seconds'] / 60:.0f} min"
    said = ", ".join(filter(None, [f"**{content['chapter']}**", results.unusual(content)]))
    baseline, rows = results.rows_of(content)
    table = results.as_markdown([row for row in rows if row.track in tracks], baseline)
    return "\n".join(
        [f"\n{said} (speeds hold for {machine})\n", *awaited(content["chapter"]), table, *verdicts(content, "extra" in tracks)]
    )


def awaited(chapter: str) -> list[str]:
    """A warning above the numbers of a lesson that has changed since they were measured; nothing for the others."""
    from utils import notebooks

    why = notebooks.stale().get(chapter)
    return [f"These numbers are older than the lesson: {why}\n"] if why else []


def verdicts(content: dict, measured: bool = False) -> list[str]:
    """A table of a chapter's claims, with what was `measured` for each and what it should have been; nothing where there are none."""
    if not content["claims"]:
        return []
    columns = {"claim": "id", "verdict": "verdict", "statement": "statement"}
    head = [*columns, "repeated over", *(["measured"] if measured else [])]
    lines = [[*(claim[name] for name in columns.values()), repeated(claim), *([evidence(claim)] if measured else [])]
             for claim in content["claims"]]  # fmt: skip
    return ["\n" + results.markdown_table(head, lines), *judged_apart(content)]


def evidence(claim: dict) -> str:
    """Each piece of evidence with its interval and what the statement predicts of it, a line each inside a table's cell."""
    from utils.claims import Claim

    pieces = Claim.from_dict(claim).evidence
    return "<br>".join(f"{piece.what}: {piece.measured()}, expected {piece.expected} {piece.threshold:g}" for piece in pieces)


def judged_apart(content: dict) -> list[str]:
    """Where claims over seeds come from a run of their own: on which machine, and whether the lesson has changed since."""
    made = content.get("over_seeds")
    if made is None:
        return []
    late = "" if made.get("code") == code_of_claims(content["chapter"]) else ", with an earlier version of the lesson"
    return [f"\nClaims over seeds were judged in the profile full, on {made['device']}{late}."]


@functools.cache  # the README and the page of all rows ask; to weave a chapter takes a second
def code_of_claims(chapter: str) -> str:
    """What tells the cells of a chapter's track of claims, as its lesson has them now, from any others."""
    from utils import notebooks
    from utils import run as runs

    return runs.code_key(notebooks.weave(chapter, track="claims"))


def repeated(claim: dict) -> str:
    """What a claim was repeated over; of seeds how many, where there was more than one."""
    count = min(piece["effect"]["n"] for piece in claim["evidence"])
    return f"{count} seeds" if claim["unit"] == "seed" and count > 1 else claim["unit"]


def title(name: str, content: dict) -> str:
    """What stands above a table on the terminal: chapter or part, profile, what is unusual of model, data and seed, and the machine."""
    parts = [name, f"profile {content['profile']}", results.unusual(content), results.machine_of(content)]
    return ", ".join(filter(None, parts))


def overtaken(out: Path, name: str, profile: str) -> str:
    """That a results file is older than the last run of its name, which has not replaced it; empty where it is of that run."""
    from utils import run as runs

    def of_profile(notebook: Path) -> dict:
        facts = runs.companion_facts(notebook)
        return facts if (facts.get("stamp") or {}).get("profile") == profile else {}

    finished, file = of_profile(out / f"{name}.ipynb"), out / "results" / profile / f"{name}.json"
    if of_profile(out / f".{name}" / runs.WOVEN) or of_profile(out / f"{name}.failed.ipynb"):
        return f"{name}: these results are of an earlier run, the last one has not come to its end"
    if finished and finished.get("results_sha256") != runs.file_hash(file):
        return f"{name}: these results are not of the run whose notebook lies in {out}"
    return ""


def fingerprint(contents: list[dict]) -> str:
    """What the picture is made from, as a hash."""
    return cache.key({content["chapter"]: [content["baseline"], content["rows"]] for content in contents})


def words(figure: "Figure") -> str:
    """The picture's alt text; the picture is closed."""
    from utils import plots

    plots.plt.close(figure)
    return plots.describe(figure).replace("[", "(").replace("]", ")")


def on_one_task(contents: list[dict]) -> list[Row]:
    """All rows on the data of the first chapter: one task, one baseline."""
    same = [content for content in contents if dataset_of(content) == dataset_of(contents[0])]
    return [row for content in same for row in results.rows_of(content)[1]]


def on_fronts(contents: list[dict]) -> dict[str, list[Row]]:
    """In words how a row is judged -> the methods' rows than which none is as accurate and cheaper, from the cheapest on."""
    methods = [row for row in on_one_task(contents) if row.method != "control"]
    timed = [row for row in methods if own_speed(row)]
    return {SMALL: front(methods, lambda row: row.stored_bytes), FAST: front(timed, lambda row: -row.speed(32))}


def own_speed(row: Row) -> bool:
    """Whether a speed of the row's own was measured."""
    return bool(row.latency_ratio) and row.latency_of is None  # an emulated row has no speed at all


def front(rows: list[Row], cost: Callable[[Row], float]) -> list[Row]:
    """Each row that is more accurate than all that cost less."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (cost(row), -row.accuracy)):
        if not found or row.accuracy > found[-1].accuracy:
            found.append(row)
    return found


def in_short(row: Row) -> str:
    """A row of the front: id, name, accuracy, megabytes, and its own speed where it has one."""
    speed = f", ×{row.speed(32):.1f}" if own_speed(row) else ""
    return f"{row.method} {row.label} ({100 * row.accuracy:.1f} %, {row.stored_bytes / 1e6:.1f} MB{speed})"


def picture(contents: list[dict]) -> "Figure":
    """Accuracy against bytes and, where a speed of its own was measured, against speed: every row, one colour a family, ids on the fronts.

    One baseline, one task: chapters of another data set than the first one's are left to their tables.
    """
    from utils import plots

    baseline, _ = results.rows_of(contents[0])
    rows, fronts = on_one_task(contents), on_fronts(contents)
    ids = sorted({row.method for row in rows if row.method != "control"})
    families = {name: tuple(id for id in ids if id.startswith(letter)) for letter, name in FAMILIES.items()}
    families = {name: members for name, members in families.items() if members} | {"controls": ("control",)}
    views = ((rows, "stored_bytes", "artifact (MB)", "Accuracy against bytes", fronts[SMALL]),
             (list(filter(own_speed, rows)), "batch32", "speed at batch 32 (baseline = 1)", "Accuracy against speed", fronts[FAST]))  # fmt: skip
    figure, panels = plots.figure(1, 2, width=4.5, height=5, sharey=True)
    for panel, (shown, x, xlabel, title, named) in zip(panels, views, strict=True):
        panel.set_xscale("log")
        plots.plane(panel, shown, baseline, x, xlabel, title, families, named)
    plots.legend_below(figure, panels[0])
    return figure


def dataset_of(content: dict) -> str | None:
    """The data set that a chapter was measured on."""
    return content["provenance"].get("parameters", {}).get("DATASET")


# --- several machines, several commits ------------------------------------------------------------------------------


def side_by_side(out: Path, profile: str) -> dict[str, dict[str, dict[str, str]]]:
    """Chapter -> line (row or claim about time) -> machine -> speed or verdict, from the file of record and those beside it."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for file in results.files(out, profile, machines=True).values():
        content = results.read(file)
        machine, lines = results.machine_of(content), found.setdefault(content["chapter"], {})
        for row in results.rows_of(content)[1]:
            if own_speed(row):
                lines.setdefault(f"{row.method} {row.label}", {})[machine] = row.speeds()
        for claim in content["claims"]:
            if claim["unit"] == "round":
                lines.setdefault(f"claim {claim['id']}", {})[machine] = claim["verdict"]
    return found


def changes(out: Path, profile: str, revision: str) -> list[str]:
    """Rows that left their 95 % interval since a git revision, rows gone and new, verdicts that turned. CompanionError for no such revision."""
    found: list[str] = []
    for content in results.read_all(out, profile):
        earlier = at_revision(revision, out / "results" / profile / f"{content['chapter']}.json")
        if earlier is None:
            found.append(f"{content['chapter']}: not there at {revision}")
            continue
        before, now = ({(row.method, row.label): row for row in results.rows_of(c)[1]} for c in (earlier, content))
        chapter = content["chapter"]
        found += [f"{chapter}: {key[0]} {key[1]} is gone" for key in before if key not in now]
        found += [f"{chapter}: {key[0]} {key[1]} is new" for key in now if key not in before]
        found += [f"{chapter}: {moved(before[key], now[key])}" for key in now if key in before and outside(before[key], now[key])]
        old, new = ({claim["id"]: claim["verdict"] for claim in c["claims"]} for c in (earlier, content))
        found += [f"{chapter}: claim {id} was {old.get(id, 'not there')}, is {new.get(id, 'gone')}" for id in old | new
                  if old.get(id) != new.get(id)]  # fmt: skip
    return found


def outside(before: Row, now: Row) -> bool:
    """Whether an accuracy lies outside the interval that it had."""
    low, high = before.accuracy_ci95
    return not low <= now.accuracy <= high


def moved(before: Row, now: Row) -> str:
    """A row's old and new accuracy."""
    low, high = (100 * end for end in before.accuracy_ci95)
    return f"{now.method} {now.label}: {100 * before.accuracy:.1f} % [{low:.1f}, {high:.1f}] is now {100 * now.accuracy:.1f} %"


def at_revision(revision: str, file: Path) -> dict | None:
    """A committed results file as it was, or None where it did not exist. CompanionError for an unknown revision."""
    known = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{revision}^{{commit}}"], capture_output=True, text=True
    )
    if known.returncode:
        raise CompanionError(f"git knows no revision {revision!r}")
    try:
        path = file.resolve().relative_to(ROOT)
    except ValueError:
        raise CompanionError(f"{file} is not in the repository: --against compares committed results (--out notebooks)") from None
    shown = subprocess.run(["git", "-C", str(ROOT), "show", f"{revision}:{path.as_posix()}"], capture_output=True, text=True)
    if shown.returncode:
        return None
    try:
        return json.loads(shown.stdout)
    except ValueError:
        raise CompanionError(f"{path.as_posix()} at {revision} is no readable results file") from None
