"""Files of a user's data as columns, read strictly: what a reader would have to guess at is refused, with its line.

Cells of csv and tsv files are strings and stay what they are ("NA" and "None" too: only an empty cell is missing); those of
parquet and json files keep their types. A csv file quotes as RFC 4180 has it. A tsv file does not quote: a lone `"` is a letter.
"""

import csv
import io
import json
import re
from pathlib import Path

import pyarrow.parquet

from utils import CompanionError, first_line

Columns = dict[str, list]

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar")
BEGINNINGS = {  # what a file is, whatever it is called
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"BZh": "is compressed (bzip2): unpack it first",
    b"\xfd7zXZ": "is compressed (xz): unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstandard): unpack it first",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or save it as csv",
    b"version https://git-lfs": "is a pointer to a large file, not the file: fetch it with `git lfs pull`",
}
PARQUET = b"PAR1"
CELL_LIMIT = 2**31 - 1  # characters; csv's own limit of 131,072 is shorter than some documents


def read(path: Path, notes: list[str]) -> Columns:
    """Columns of a file by name, equally long. What a user would want to know of the reading is added to `notes`.

    The suffix of the given name tells the format: what a link points to may have none. Raises CompanionError for a file that
    cannot be read as it is.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        advice = "it is compressed, unpack it first" if suffix in PACKED else f"use one of {', '.join(READERS)}"
        raise CompanionError(f"cannot read {path.name}: {advice}")
    try:
        _check_beginning(path)
        return READERS[suffix](path, notes)
    except OSError as error:
        raise CompanionError(f"cannot read {path.name}: {error.strerror or first_line(error)}") from None


def _check_beginning(path: Path) -> None:
    with open(path, "rb") as file:
        beginning = file.read(max(map(len, BEGINNINGS)))
    if not beginning:
        raise CompanionError(f"{path.name} is empty")
    for magic, what in BEGINNINGS.items():
        if beginning.startswith(magic):
            raise CompanionError(f"{path.name} {what}")
    if beginning.startswith(PARQUET) != (path.suffix.lower() == ".parquet"):
        raise CompanionError(f"{path.name} is {'no' if path.suffix.lower() == '.parquet' else 'a'} parquet file: check its name")


def _text(path: Path) -> str:
    """The characters of a UTF-8 file, without the mark of byte order that some editors put first."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CompanionError(
            f"{path.name} is not UTF-8 (line {line}, byte {error.start}): save it as UTF-8 and try again"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise CompanionError(
            f"{path.name}, line {line}: a NUL byte; the file is damaged or not UTF-8: save it as UTF-8 and try again"
        )
    if not text.strip():
        raise CompanionError(f"{path.name} is empty")
    return text


def _check_distinct(names: list[str], where: str) -> None:
    seen = set()
    for name in names:
        if name and name in seen:  # columns without a name are of no use, however many there are
            raise CompanionError(f"{where} has two columns called {name!r}: rename one")
        seen.add(name)


# --- csv and tsv ------------------------------------------------------------------------------------------------------


def _separated(path: Path, notes: list[str]) -> Columns:
    tabs = path.suffix.lower() == ".tsv"
    csv.field_size_limit(CELL_LIMIT)
    text = io.StringIO(_text(path), newline="")
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(text, strict=True)
    rows, folded, start = [], {}, 1  # folded: row -> its first line, where a row takes several
    try:
        for row in reader:
            if len(row) > 1 or (row and row[0].strip()):  # else a blank line
                row = [_unquoted(cell) for cell in row] if tabs else row
                _check_fields(row, rows or [row], f"{path.name}, line {start}", tabs)
                if reader.line_num > start:
                    folded[len(rows)] = start
                rows.append(row)
            start = reader.line_num + 1
    except csv.Error as error:
        raise CompanionError(
            f"{path.name}, line {start}: a double quote there is not matched ({error}): double it inside a quoted text, "
            "or save the data as jsonl"
        ) from None
    if not rows:
        raise CompanionError(f"{path.name} is empty")
    names = [name.strip() for name in rows.pop(0)]
    _check_distinct(names, path.name)
    folded = {row - 1: line for row, line in folded.items() if row}
    if folded:
        _check_folded(path, names, rows, folded)
        notes.append(f"{len(folded)} rows of {path.name} run over several lines, the first from line {min(folded.values())}")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) if rows else {name: [] for name in names}


def _unquoted(cell: str) -> str:
    """A cell that is quoted as a whole, as some programs write every text: without its quotes. Other quotes are letters."""
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _check_fields(row: list[str], rows: list[list[str]], where: str, tabs: bool) -> None:
    header = rows[0]
    between = "tab" if tabs else "comma"
    if len(header) < 2:
        raise CompanionError(
            f"{where}: one column, {header[0][:60]!r}, where text and label are two: put a {between} between columns"
        )
    if len(row) != len(header):
        advice = "a text may hold neither tabs nor line breaks" if tabs else "a text with a comma needs double quotes around it"
        raise CompanionError(f"{where}: {len(row)} fields where the header has {len(header)}: {advice}")


def _check_folded(path: Path, names: list[str], rows: list[list[str]], folded: dict[int, int]) -> None:
    """Refuse a quoted cell that swallowed rows: a lone quote opened it, and another one closed it some rows further down.

    One of its lines ends (or begins) with a comma and a label then, as rows do.
    """
    lower = [name.lower() for name in names]
    at = lower.index("label") if "label" in lower else None
    if at not in (0, len(names) - 1):
        return
    labels = {row[at] for row in rows} - {""}
    for row, line in folded.items():
        for piece in re.split(r"[\r\n]+", "\n".join(cell for cell in rows[row] if "\n" in cell or "\r" in cell)):
            before, comma, after = piece.partition(",") if at == 0 else piece.rpartition(",")
            if comma and (before if at == 0 else after) in labels:
                raise CompanionError(
                    f"{path.name}, line {line}: the quoted text that begins there holds what looks like a row, {piece[:60]!r}: "
                    "double a quote that is part of a text, or save the data as jsonl"
                )


# --- json -------------------------------------------------------------------------------------------------------------


def _json(path: Path, notes: list[str]) -> Columns:
    """A list of objects, one object a line, columns by name, or any of the first in an object of other things."""
    text = _text(path)
    try:
        document = _parsed(text, path.name)
    except json.JSONDecodeError as error:
        document = _json_lines(text, path, error)
    if isinstance(document, dict):
        document = _unwrapped(document, path, notes)
    if isinstance(document, dict):
        return document
    if not isinstance(document, list) or not document:
        raise CompanionError(f"{path.name} has no rows: it is to be a list of objects, or one object a line")
    for number, row in enumerate(document, 1):
        if not isinstance(row, dict):
            raise CompanionError(
                f"{path.name}, row {number} is no object: rows are to be of the form {{'text': ..., 'label': ...}}"
            )
    names = list(dict.fromkeys(name for row in document for name in row))
    return {name: [row.get(name) for row in document] for name in names}


def _json_lines(text: str, path: Path, whole: json.JSONDecodeError) -> list:
    """Every line parsed. `whole` is why the file is not one document: what is told where it is not lines either."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at separators inside a string
        try:
            rows += [_parsed(line, f"{path.name}, line {number}")] if line.strip() else []
        except json.JSONDecodeError as error:
            lines = bool(rows) or path.suffix.lower() == ".jsonl"
            number, reason = (number, error.msg) if lines else (whole.lineno, whole.msg)
            raise CompanionError(f"{path.name}, line {number}: {reason}") from None
    return rows


def _parsed(text: str, where: str) -> object:
    def distinct(pairs: list[tuple[str, object]]) -> dict:
        _check_distinct([name for name, _ in pairs], where)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except RecursionError:
        raise CompanionError(f"{where}: nested too deep to be a table") from None
    except (json.JSONDecodeError, CompanionError):
        raise
    except ValueError as error:  # a number of thousands of digits
        raise CompanionError(f"{where}: {first_line(error)}") from None


def _unwrapped(document: dict, path: Path, notes: list[str]) -> Columns | list:
    """Rows or columns of a file that is one object."""
    lists = {name: value for name, value in document.items() if isinstance(value, list) and value}
    wrapped = [] if "label" in document else [name for name, value in lists.items() if isinstance(value[0], dict)]
    if len(wrapped) == 1:
        notes.append(f"rows are taken from {wrapped[0]!r} of {path.name}")
        return document[wrapped[0]]
    if wrapped:
        raise CompanionError(f"{path.name} holds several tables ({', '.join(wrapped[:6])}): save each as a file of its own")
    values = list(document.values())
    if values and all(isinstance(value, dict) for value in values):  # what pandas writes: {column: {row: cell}}
        if len({tuple(value) for value in values}) > 1:
            raise CompanionError(f"{path.name} has columns whose rows differ: save it as a list of objects")
        return {name: list(value.values()) for name, value in document.items()}
    if values and all(isinstance(value, list) for value in values):
        if len(set(map(len, values))) > 1:
            raise CompanionError(f"{path.name} has columns of different lengths: save it as a list of objects")
        return document
    return [document]


# --- parquet ----------------------------------------------------------------------------------------------------------


def _parquet(path: Path, notes: list[str]) -> Columns:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # read_table would take columns out of the names of folders, too
            table = file.read()
        columns = [column.to_pylist() for column in table.columns]
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in many ways; the reader's own message is the best hint there is
        raise CompanionError(f"cannot read {path.name}: {first_line(error)}") from None
    _check_distinct(table.column_names, path.name)
    named = zip(table.column_names, columns, strict=True)
    return {name: column for name, column in named if not name.startswith("__index_level_")}  # pandas' row names


READERS = {".csv": _separated, ".tsv": _separated, ".parquet": _parquet, ".json": _json, ".jsonl": _json}
