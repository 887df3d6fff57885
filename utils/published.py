"""Whether what was published belongs together: notebooks, results files and verdicts.

A number changed by hand in one place disagrees with another: the notebook knows the hash of the results that it wrote, prints every row
and every verdict of them, and a verdict follows from its evidence. (`report.outdated` holds README, page and picture against the results.)
"""

import html
import re
from pathlib import Path

import nbformat

from utils import results
from utils import run as runs
from utils.results import SPEED, Row

PRINTED = re.compile(r"^([A-Z]-\d{2}[a-z]?|control) (.+): accuracy \d+\.\d % \(drop ", re.MULTILINE)  # the head of `Row.summary`
SAME = 1e-5  # shares are stored with six digits


def contradictions(out: Path) -> list[str]:
    """What does not belong together in the notebooks and results of record under `out`, a line each."""
    contents = results.of_record(out)
    found = [problem for content in contents for problem in (*unfounded(content), *inconsistent(content))]
    for content in contents:
        path = out / f"{content['chapter']}.ipynb"
        found += disagreements(path) if path.is_file() else [f"{content['chapter']}: there is no executed notebook"]
    return found


def unfounded(content: dict) -> list[str]:
    """Verdicts that do not follow from the evidence beside them."""
    from utils.claims import Claim, judge

    found = []
    for stored in content["claims"]:
        evidence = [{name: value for name, value in item.items() if name != "verdict"} for item in stored["evidence"]]
        claim = Claim.from_dict({**stored, "evidence": evidence})
        conditions = {"departs": claim.departs, "depends_on": claim.depends_on}
        again = judge(claim.id, claim.statement, claim.source, claim.unit, claim.evidence, content["profile"], **conditions)
        told = [item["verdict"] for item in stored["evidence"]]
        if again.verdict != stored["verdict"] or [item.verdict() for item in claim.evidence] != told:
            found.append(f"{content['chapter']}: {claim.id} is {stored['verdict']!r}, its evidence says {again.verdict!r}")
    return found


def inconsistent(content: dict) -> list[str]:
    """Rows whose own numbers disagree: a drop that is not the baseline's accuracy minus the row's, a value outside its interval."""
    baseline, rows = results.rows_of(content)
    found = []
    for row in rows:
        within = [(row.accuracy, row.accuracy_ci95), (row.drop, row.drop_ci95)]
        intervals = row.latency_ratio_interval or {}
        within += [(value, intervals[name]) for name, value in (row.latency_ratio or {}).items() if name in intervals]
        wrong = [f"{value:g} lies outside {ends}" for value, ends in within if not ends[0] - 1e-3 <= value <= ends[1] + 1e-3]
        if abs(baseline.accuracy - row.accuracy - row.drop) > SAME:
            wrong.append("its drop is not the baseline's accuracy minus its own")
        found += [f"{content['chapter']}: {row.method} {row.label}: {what}" for what in wrong]
    return found


def disagreements(path: Path) -> list[str]:
    """What an executed notebook shows that its results file does not hold, and the other way round."""
    notebook = nbformat.read(path, as_version=4)
    facts = notebook.metadata.get("companion", {})
    file = path.parent / "results" / str((facts.get("stamp") or {}).get("profile")) / f"{path.stem}.json"
    if not file.is_file():
        return [f"{path.name}: the results that it wrote are not there"]
    found = [] if facts.get("results_sha256") == runs.file_hash(file) else ["its results are not those that it wrote"]
    content = results.read(file)
    found += unrun(notebook) + rows_that_differ(notebook, content) + verdicts_that_differ(notebook, content)
    return [f"{path.name}: {what}" for what in found]


def unrun(notebook: nbformat.NotebookNode) -> list[str]:
    """Code cells that were not executed in order, or that ended in an error."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [f"cell {cell.id} raised" for cell in code if any(output.output_type == "error" for output in cell.outputs)]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not every cell was executed, in order")
    return found


def rows_that_differ(notebook: nbformat.NotebookNode, content: dict) -> list[str]:
    """Rows that the results hold and the notebook does not print so, rows that it prints and they do not hold, and lines of its tables."""
    baseline, rows = results.rows_of(content)
    text, said = printed(notebook), " ".join(printed(notebook).split())
    found = [f"it does not print the row {row.method} {row.label} as its results have it" for row in rows
             if " ".join(row.summary().split()) not in said]  # fmt: skip
    known = {(row.method, row.label) for row in rows}
    found += [f"it prints a row that its results lack: {' '.join(key)}" for key in PRINTED.findall(text) if key not in known]
    return found + [f"its table shows another row {line['id']} {line['method']}" for line in table_lines(notebook)
                    if not any(shows(line, row) for row in (baseline, *rows))]  # fmt: skip


def verdicts_that_differ(notebook: nbformat.NotebookNode, content: dict) -> list[str]:
    """Claims whose verdict the notebook does not print as the results have it."""
    text = printed(notebook)
    return [f"it does not print {claim['id']} as {claim['verdict']!r}" for claim in content["claims"]
            if not re.search(rf"^{re.escape(claim['id'])} · {re.escape(claim['verdict'].upper())} · ", text, re.MULTILINE)]  # fmt: skip


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that the cells print."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def table_lines(notebook: nbformat.NotebookNode) -> list[dict[str, str]]:
    """The lines of all tables of rows (`Board.table`) that a notebook shows: column -> text."""
    shown = [output.data.get("text/html", "") for cell in notebook.cells if cell.cell_type == "code"
             for output in cell.outputs if "data" in output]  # fmt: skip
    found = []
    for markup in shown:
        head, _, body = markup.partition("<tbody>")
        names = ["id", *re.findall(r"<th>([^<]*)</th>", head.partition("</tr>")[0])[1:]]
        if {"method", "accuracy %"} <= set(names):
            lines = re.findall(r"<tr>\s*<th>([^<]*)</th>(.*?)</tr>", body, re.DOTALL)
            cells = [[id, *re.findall(r"<td>([^<]*)</td>", rest)] for id, rest in lines]
            found += [dict(zip(names, map(html.unescape, line), strict=False)) for line in cells]
    return found


def shows(line: dict[str, str], row: Row) -> bool:
    """Whether a table's line is that row, as far as the table has a row's columns: `speed ×1 / ×32` is one of them, `speed ×4` is not."""
    cells = row.cells()
    named = {SPEED if name.startswith(SPEED) and " / " in name else name: text for name, text in line.items()}
    return all(same_text(cells.get(name, text), text) for name, text in named.items())


def same_text(whole: str, shown: str) -> bool:
    """Whether a table shows a text; pandas cuts long ones."""
    return whole.startswith(shown.removesuffix("...")) if shown.endswith("...") else whole == shown
