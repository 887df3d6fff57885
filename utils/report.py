"""What is said about results: the README's tables, several machines side by side, and what changed since another commit."""

import json
import subprocess
from pathlib import Path

from utils import CompanionError, results
from utils.results import ROOT, Row

README = ROOT / "README.md"
MARKS = ("<!-- results:begin -->", "<!-- results:end -->")


def tables(contents: list[dict]) -> str:
    """The results section of the README: a table and the verdicts per chapter, each with the machine that its speeds hold for."""
    lines: list[str] = []
    for content in contents:
        baseline, rows = results.rows_of(content)
        machine = f"{results.machine_of(content)}, profile {content['profile']}, {content['wall_seconds'] / 60:.0f} min"
        lines += [f"\n**{content['chapter']}** (speeds hold for {machine})\n", results.as_markdown(rows, baseline)]
        verdicts = [claim["verdict"] for claim in content["claims"]]
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in sorted(set(verdicts)))
        lines += [f"\nClaims: {counts}."] if verdicts else []
    return "\n".join(lines)


def with_tables(text: str, contents: list[dict]) -> str:
    """The README's text with its results section made anew."""
    begin, end = MARKS
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{tables(contents)}\n{end}{rest.partition(end)[2]}"


def readme_is_current() -> bool:
    """Whether the README shows what the committed results render to."""
    text = README.read_text(encoding="utf-8")
    return with_tables(text, results.of_record(ROOT / "notebooks")) == text


def side_by_side(out: Path, profile: str) -> dict[str, dict[str, dict[str, str]]]:
    """Chapter -> line (row or claim about time) -> machine -> speed or verdict, from the file of record and those beside it."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for file in sorted((out / "results" / profile).glob("*.json")):
        if "." in file.stem:  # a run of a part
            continue
        content = results.read(file)
        machine, lines = results.machine_of(content), found.setdefault(content["chapter"], {})
        for row in results.rows_of(content)[1]:
            if row.latency_ratio and row.latency_of is None:
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
