"""Tables as users have them: what is read, what is refused with its line, and what is said about it."""

import datetime
import gzip
import json

import datasets
import huggingface_hub
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from utils import CompanionError, bert, profiles, readers, tasks

SMOKE = profiles.get("smoke")
TEXTS = [f"{who} {what} {where}" for who in ("the cook", "a guest") for what in ("sang", "left", "wept")
         for where in ("at dawn", "in the hall", "by the sea")]  # fmt: skip
TWO = ["calm", "loud"] * 9


@pytest.fixture(scope="module")
def tokenizer():
    return bert.load_tokenizer()


@pytest.fixture
def load(tokenizer):
    return lambda path: tasks.load(str(path), tokenizer, SMOKE)


def refused(load, path, *messages):
    with pytest.raises(CompanionError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


def separated(texts, labels, mark=",", header="text,label"):
    return (
        "\n".join([header.replace(",", mark), *(f"{text}{mark}{label}" for text, label in zip(texts, labels, strict=True))])
        + "\n"
    )


def file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(path, texts, labels):
    """The same rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
        return path
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    if path.suffix == ".json":
        return file(path, json.dumps(rows))
    if path.suffix == ".jsonl":
        return file(path, "\n".join(map(json.dumps, rows)))
    return file(path, separated(texts, labels, "\t" if path.suffix == ".tsv" else ","))


def rows_of(task):
    """Every text with the name of its label."""
    found = [(text, task.label_names[label]) for part in (task.train, task.validation, task.selection)
             for text, label in zip(tasks.column(part.data, "text"), part.labels.tolist(), strict=True)]  # fmt: skip
    return sorted(set(found))


def note(task, *words):
    found = [said for said in task.notes if all(word in said for word in words)]
    assert len(found) == 1, task.notes
    return found[0]


# --- the embedded data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "documents", "key"), [("rotten_tomatoes", False, "ab3135b036905e5b"), ("imdb", True, "efc0abe7f10c2b4b")]
)
def test_the_embedded_data_are_what_every_published_number_is_about(tokenizer, name, documents, key):
    task = tasks.load(name, tokenizer, profiles.get("smoke", documents))
    assert task.key == key and task.notes == [] and task.label_names == ["0", "1"]


def test_a_built_in_name_is_never_a_folder_and_that_is_said(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "validation"):
        file(tmp_path / "rotten_tomatoes" / f"{part}.csv", separated(TEXTS, TWO))
    built_in, local = load("rotten_tomatoes"), load("./rotten_tomatoes")
    assert built_in.key == "ab3135b036905e5b" and local.label_names == ["calm", "loud"]
    assert built_in.notes == [note(built_in, "built-in", "not read", "./rotten_tomatoes")]
    assert tasks.local_path("rotten_tomatoes") is None and tasks.local_path("./rotten_tomatoes").is_dir()


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("word", ["None", "NA", "null", "nan", "N/A", "NaN", "-"])
def test_only_an_empty_cell_is_missing(load, tmp_path, suffix, word):
    labels = ["calm", "loud", word] * 6
    task = load(table(tmp_path / f"data.{suffix}", [*TEXTS[:-1], word], labels))
    assert task.label_names == sorted(["calm", "loud", word]) and task.notes == []
    assert rows_of(task) == sorted(zip([*TEXTS[:-1], word], labels, strict=True))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_dropped_rows_are_counted(load, tmp_path, suffix):
    texts, labels = ["", "  ", *TEXTS[2:]], [*TWO[:-1], ""]
    task = load(table(tmp_path / f"data.{suffix}", texts, labels))
    assert note(task, "dropped") == f"3 of 18 rows of data.{suffix} dropped: their text or label is empty"
    assert len(rows_of(task)) == 15


def test_missing_cells_of_formats_that_have_them(load, tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, TWO, strict=True)]
    rows[0]["text"], rows[1]["label"], rows[2]["label"] = None, None, float("nan")
    del rows[3]["label"]
    assert "4 of 18 rows" in note(load(file(tmp_path / "data.json", json.dumps(rows))), "dropped")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_texts_that_are_numbers_are_strings(load, tmp_path, suffix):
    numbers = list(range(1000, 1018))
    task = load(table(tmp_path / f"data.{suffix}", numbers, TWO))
    assert [text for text, _ in rows_of(task)] == [str(number) for number in numbers] and task.notes == []


def test_a_cell_of_a_csv_file_stays_as_it_is_written(load, tmp_path):
    texts = ["007", "1e5", "1.50", "True", "  padded", *TEXTS[5:]]
    task = load(file(tmp_path / "data.csv", separated(texts, TWO)))
    assert {text for text, _ in rows_of(task)} == set(texts)


def test_very_long_texts(load, tmp_path):
    texts = ["so " * 100_000, *(f"{text} " * 20 for text in TEXTS[1:])]
    task = load(file(tmp_path / "data.csv", separated(texts, TWO)))
    assert max(len(text) for text, _ in rows_of(task)) == 300_000
    assert note(task, "cut").startswith(f"{len(task.train)} of {len(task.train)} training texts fill the 16 tokens")


# --- quotes, fields and lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quoted", [(2, 8), (2, 8, 11), (17,)])
def test_a_lone_quote_of_a_tsv_file_is_a_letter(load, tmp_path, quoted):
    texts = [f'"{text}' if row in quoted else text for row, text in enumerate(TEXTS)]
    task = load(file(tmp_path / "data.tsv", separated(texts, TWO, "\t")))
    assert rows_of(task) == sorted(zip(texts, TWO, strict=True)) and task.notes == []


def test_a_tsv_cell_that_is_quoted_as_a_whole(load, tmp_path):
    texts = ['"he said ""no"" twice"', '"so" it "goes"', '"', '""quite""', *TEXTS[4:]]
    task = load(file(tmp_path / "data.tsv", separated(texts, TWO, "\t")))
    assert {text for text, _ in rows_of(task)} == {'he said "no" twice', '"so" it "goes"', '"', '""quite""', *TEXTS[4:]}


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ({2: '"the {},loud', 8: '"a {},calm'}, 4),  # opened twice
        ({16: '"the {},loud'}, 18),  # never closed
        ({5: '"a "fine" {},loud'}, 7),
        ({3: '"once {},loud', 9: 'twice {}",calm'}, 5),  # closed rows below: a csv file by the letter
    ],
)
def test_a_lone_quote_of_a_csv_file_is_refused_with_its_line(load, tmp_path, broken, line):
    lines = [broken[row].format(text) if row in broken else f"{text},{TWO[row]}" for row, text in enumerate(TEXTS)]
    refused(load, file(tmp_path / "data.csv", "\n".join(["text,label", *lines])), f"data.csv, line {line}: ", "quote")


def test_a_quote_that_swallows_rows_where_the_label_comes_first(load, tmp_path):
    lines = [f"{label},{text}" for text, label in zip(TEXTS, TWO, strict=True)]
    lines[4], lines[9] = f'calm,"{TEXTS[4]}', f'loud,{TEXTS[9]}"'
    refused(load, file(tmp_path / "data.csv", "\n".join(["label,text", *lines])), "line 6: ", "looks like a row")


def test_quoted_line_breaks_and_commas_are_kept_and_said(load, tmp_path):
    texts = [f'"first, {text}\nthen ""more"""' for text in TEXTS]
    task = load(file(tmp_path / "data.csv", separated(texts, TWO)))
    assert [text for text, _ in rows_of(task)] == sorted(f'first, {text}\nthen "more"' for text in TEXTS)
    assert note(task, "several lines") == "18 rows of data.csv run over several lines, the first from line 2"


@pytest.mark.parametrize(
    ("suffix", "row", "line", "count"),
    [("csv", "well, a calm sea,calm", 3, 3), ("csv", "no label", 3, 1), ("tsv", "a\tb\tcalm", 3, 3), ("tsv", "no label", 3, 1)],
)
@pytest.mark.parametrize("at", [0, 1, 9])
def test_a_row_of_another_length_is_refused_with_its_line(load, tmp_path, suffix, row, line, count, at):
    lines = separated(TEXTS, TWO, "\t" if suffix == "tsv" else ",").splitlines()
    lines.insert(at + 1, row)
    refused(load, file(tmp_path / f"data.{suffix}", "\n".join(lines)), f"line {at + 2}: {count} field", "header has 2")


def test_lines_are_counted_as_an_editor_does(load, tmp_path):
    lines = separated(TEXTS, TWO).splitlines()
    lines[3:3] = ["", '"two', 'lines",calm', "  "]
    lines[9:9] = ["one,too,many"]
    refused(load, file(tmp_path / "data.csv", "\n".join(lines)), "data.csv, line 10: 3 fields")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_line_ends_and_the_mark_of_byte_order(load, tmp_path, end, mark, suffix):
    text = separated(TEXTS, TWO, "\t" if suffix == "tsv" else ",").replace("\n", end)
    task = load(file(tmp_path / f"data.{suffix}", (mark + text).encode()))
    assert rows_of(task) == sorted(zip(TEXTS, TWO, strict=True)) and task.notes == []


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("a.csv", separated(TEXTS, TWO).encode("utf-16"), ("a.csv is not UTF-8 (line 1", "save it as UTF-8")),
        ("a.csv", separated(TEXTS, TWO).encode("utf-16-le"), ("line 1: a NUL byte",)),
        ("a.csv", b"text,label\nfine,1\nca\x00t,0\n", ("line 3: a NUL byte",)),
        ("a.jsonl", b'{"text": "fine", "label": 1}\n{"text": "caf\xe9", "label": 0}\n', ("not UTF-8 (line 2",)),
        ("a.csv", b"", ("a.csv is empty",)),
        ("a.tsv", b"\n \n", ("a.tsv is empty",)),
        ("a.csv", b'""\n""\n', ("a.csv is empty",)),
        ("a.json", b"", ("a.json is empty",)),
        ("a.parquet", b"", ("a.parquet is empty",)),
        ("a.csv", b"text,label\n", ("a.csv has no rows",)),
        ("a.csv", b"text;label\nwell, so;1\n", ("line 1: one column, 'text;label'", "comma between")),
        ("a.tsv", b"text,label\nwell,1\n", ("line 1: one column, 'text,label'", "tab between")),
        ("a.csv", b"great film,1\nbad film,0\n", ("needs a column text", "it has 'great film', '1'")),
        ("a.csv", gzip.compress(b"text,label\n", mtime=0), ("a.csv is compressed (gzip)",)),
        ("a.csv.gz", gzip.compress(b"text,label\n", mtime=0), ("cannot read a.csv.gz", "unpack it first")),
        ("a.csv", b"PK\x03\x04 and so on", ("zip archive or a spreadsheet",)),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", ("pointer to a large file", "git lfs pull")),
        ("a.parquet", b"text,label\n", ("a.parquet is no parquet file",)),
        ("a.csv", b"PAR1 and so on", ("a.csv is a parquet file",)),
        ("a.parquet", b"PAR1 and so on PAR1", ("cannot read a.parquet",)),
        ("a.txt", b"x", ("cannot read a.txt: use one of .csv",)),
        ("plain", b"x", ("cannot read plain: use one of .csv",)),
    ],
)  # fmt: skip
def test_files_that_are_no_tables(load, tmp_path, name, content, messages):
    refused(load, file(tmp_path / name, content), *messages)


def test_a_parquet_file_cut_short(load, tmp_path):
    path = table(tmp_path / "data.parquet", TEXTS, TWO)
    for share in (0.3, 0.9):
        refused(
            load, file(tmp_path / "cut.parquet", path.read_bytes()[: int(share * path.stat().st_size)]), "cannot read cut.parquet"
        )


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Text,LABEL", " text , label ", "SENTENCE,Label"])
def test_names_of_columns_may_be_written_otherwise(load, tmp_path, header):
    assert rows_of(load(file(tmp_path / "data.csv", separated(TEXTS, TWO, header=header)))) == sorted(
        zip(TEXTS, TWO, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("a.csv", "text,label,label\na,0,1\n", ("a.csv has two columns called 'label'",)),
        ("a.csv", "text,id,label,id\na,0,1,0\n", ("two columns called 'id'",)),
        ("a.csv", "text,Label,label\na,0,1\n", ("two columns called label, but for the case",)),
        ("a.csv", "text,Text,label\na,0,1\n", ("two columns called text",)),
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": "b", "text": "c", "label": 1}\n',
            ("line 2 has two columns called 'text'",),
        ),
        (
            "a.csv",
            "review,sentiment\na,0\n",
            ("needs a column text (or sentence) and a column label; it has 'review', 'sentiment'",),
        ),
        ("a.csv", "question,label\na,0\n", ("needs a column text",)),
    ],
)
def test_columns_that_are_not_clear(load, tmp_path, name, content, messages):
    refused(load, file(tmp_path / name, content), *messages)


def test_a_parquet_file_with_a_column_twice(load, tmp_path):
    columns = pyarrow.table([pyarrow.array(TEXTS), pyarrow.array(TWO), pyarrow.array(TWO)], names=["text", "label", "label"])
    pyarrow.parquet.write_table(columns, tmp_path / "data.parquet")
    refused(load, tmp_path / "data.parquet", "two columns called 'label'")


@pytest.mark.parametrize(
    "pair",
    ["text,text_pair", "text,text2", "text_a,text_b", "sentence1,sentence2", "question,sentence", "premise,hypothesis", "question1,question2",
     "query,passage", "Premise,Hypothesis", "text,context", "sentence,text", "Text A,Text B"],
)  # fmt: skip
def test_pairs_of_texts_are_refused_not_halved(load, tmp_path, pair):
    first, second = pair.split(",")
    rows = [f"{text},again {text},{label}" for text, label in zip(TEXTS, TWO, strict=True)]
    path = file(tmp_path / "data.csv", "\n".join([f"{pair},label", *rows]))
    refused(load, path, "more than one text in a row", repr(first), repr(second), "join them")


def test_columns_that_are_not_used_are_named(load, tmp_path):
    rows = [f"{row},{text},{label},x" for row, (text, label) in enumerate(zip(TEXTS, TWO, strict=True))]
    task = load(file(tmp_path / "data.csv", "\n".join(["id,text,label,source", *rows])))
    assert task.notes == ["columns of data.csv that are not used: 'id', 'source'"]


def test_pandas_row_names_are_no_column(load, tmp_path):
    pandas.DataFrame({"text": TEXTS, "label": TWO}, index=[f"r{row}" for row in range(18)]).to_parquet(tmp_path / "data.parquet")
    assert load(tmp_path / "data.parquet").notes == []


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_whole_numbers_are_ordered_by_size(load, tmp_path, suffix):
    assert load(table(tmp_path / f"data.{suffix}", TEXTS, [10, 2, 1] * 6)).label_names == ["1", "2", "10"]


@pytest.mark.parametrize(
    ("suffix", "labels", "names"),
    [
        ("csv", ["1.0", "0"] * 9, ["0", "1"]),
        ("csv", ["1", "1.0", "0"] * 6, ["0", "1"]),
        ("jsonl", [1, "1", 1.0, 0, "0", 0.0] * 3, ["0", "1"]),
        ("parquet", [1.0, 0.0] * 9, ["0", "1"]),
        ("csv", [True, False] * 9, ["False", "True"]),
        ("json", [True, False] * 9, ["False", "True"]),
        ("parquet", [True, False] * 9, ["False", "True"]),
        ("csv", ["2024-01-02", "2023-12-31"] * 9, ["2023-12-31", "2024-01-02"]),
        ("parquet", [datetime.date(2024, 1, 2), datetime.date(2023, 12, 31)] * 9, ["2023-12-31", "2024-01-02"]),
        ("csv", ["1.5", "two"] * 9, ["1.5", "two"]),
        ("csv", ["9" * 30, "8" * 30] * 9, ["8" * 30, "9" * 30]),
        ("csv", ["schön", "日本"] * 9, ["schön", "日本"]),
    ],
)
def test_labels_of_every_kind(load, tmp_path, suffix, labels, names):
    task = load(table(tmp_path / f"data.{suffix}", TEXTS, labels))
    assert task.label_names == names and task.notes == []
    assert len(rows_of(task)) == 18


@pytest.mark.parametrize(
    ("suffix", "label", "message"),
    [
        ("jsonl", ["calm"], "row 3: the label is a list: one class a row"),
        ("json", {"name": "calm"}, "row 3: the label is an object"),
        ("json", [], "row 3: the label is a list"),
    ],
)
def test_a_label_that_is_no_single_value_is_refused_with_its_row(load, tmp_path, suffix, label, message):
    refused(load, table(tmp_path / f"data.{suffix}", TEXTS, [*TWO[:2], label, *TWO[3:]]), message)


@pytest.mark.parametrize(
    ("values", "kind"), [([["a"]] * 18, "a list"), ([{"a": 1}] * 18, "an object"), ([b"a"] * 18, "of type bytes")]
)
def test_nested_columns_of_a_parquet_file(load, tmp_path, values, kind):
    refused(load, table(tmp_path / "data.parquet", TEXTS, values), f"row 1: the label is {kind}")
    refused(load, table(tmp_path / "data.parquet", values, TWO), f"row 1: the text is {kind}")


def test_categorical_columns_of_a_parquet_file(load, tmp_path):
    pandas.DataFrame({"text": TEXTS, "label": pandas.Categorical(TWO)}).to_parquet(tmp_path / "data.parquet")
    assert rows_of(load(tmp_path / "data.parquet")) == sorted(zip(TEXTS, TWO, strict=True))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_numbers_to_be_predicted_as_such_are_refused(load, tmp_path, suffix):
    refused(load, table(tmp_path / f"data.{suffix}", TEXTS, [0.5, 1.0] * 9), "fractional labels such as 0.5")


def test_blanks_around_labels_are_removed_and_said(load, tmp_path):
    task = load(file(tmp_path / "data.csv", separated(TEXTS, [" calm", "loud ", "calm"] * 6)))
    assert task.label_names == ["calm", "loud"] and note(task, "blanks").startswith("12 labels of data.csv")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, "soft"] * 9, ("numbers and words", "'1', 'soft'")),
        (["Calm", "calm", "loud"] * 6, ("'Calm', 'calm'", "look alike", "2 classes")),
        (["01", "1", "2"] * 6, ("'01', '1'", "look alike")),
    ],
)
def test_odd_sets_of_labels_are_said(load, tmp_path, labels, words):
    task = load(table(tmp_path / "data.jsonl", TEXTS, labels))
    assert task.num_labels == len({str(label) for label in labels}) and note(task, *words)


@pytest.mark.parametrize("none", [-1, "-1", -1.0])
def test_minus_one_is_unlabelled(load, tmp_path, none):
    task = load(table(tmp_path / "data.jsonl", TEXTS, [0, 1, none] * 6))
    assert task.label_names == ["0", "1"] and len(rows_of(task)) == 12
    assert note(task, "unlabelled").startswith("6 of 18 rows of ")


def test_minus_one_of_two_classes_is_a_class(load, tmp_path):
    task = load(table(tmp_path / "data.csv", TEXTS, [1, -1] * 9))
    assert task.label_names == ["-1", "1"] and task.notes == []


def test_a_class_of_one_row_is_named(load, tmp_path):
    refused(load, table(tmp_path / "data.csv", TEXTS, [*TWO[:17], "rare"]), "18 usable rows in 3 class(es)", "'rare'")
    refused(
        load, table(tmp_path / "data.csv", TEXTS, [f"on day {day}" for day in range(18)]), "18 class(es)", "'on day 0'", "12 more"
    )
    refused(load, table(tmp_path / "data.csv", TEXTS, ["long " * 50, *TWO[1:]]), "…'")


def folder(path, train, validation):
    """A folder of a train.csv and a validation.csv of the given (texts, labels)."""
    file(path / "train.csv", separated(*train))
    file(path / "validation.csv", separated(*validation))
    return path


def test_labels_and_rows_that_a_part_lacks(load, tmp_path):
    refused(load, folder(tmp_path / "a", (TEXTS[:4], TWO[:4]), (TEXTS[4:6], ["new", "calm"])), "training never shows: 'new'")
    refused(
        load, folder(tmp_path / "b", (TEXTS[:4], TWO[:4]), (["", ""], ["calm", "loud"])), "no usable rows in its validation part"
    )
    refused(load, folder(tmp_path / "c", (TEXTS[:4], ["calm"] * 4), (TEXTS[4:6], TWO[:2])), "1 class(es) in its training part")
    refused(load, folder(tmp_path / "d", (["", ""], TWO[:2]), (TEXTS[4:6], TWO[:2])), "0 class(es) in its training part")
    refused(
        load, folder(tmp_path / "e", (TEXTS[:4], [0, 1, 0, 1]), (TEXTS[4:6], [-1, -1])), "no usable rows in its validation part"
    )
    task = load(folder(tmp_path / "f", (TEXTS[:4], TWO[:4]), (TEXTS[4:6], ["calm"] * 2)))
    assert note(task, "none of the 2 validation rows", "'loud'")


def test_uneven_and_many_classes_are_said(load, tmp_path):
    texts = [f"{text} {row}" for row in range(5) for text in TEXTS]
    task = load(file(tmp_path / "data.csv", separated(texts, ["calm"] * 85 + ["loud"] * 5)))
    assert note(task, "uneven", "'calm'", "'loud'", "95% of validation")
    task = load(file(tmp_path / "data.csv", separated(texts, [f"day {row // 2}" for row in range(90)])))
    assert note(task, "45 classes for", "dates")


def test_repeated_texts_are_counted(load, tmp_path):
    train, judged = [*TEXTS[:8], TEXTS[0], TEXTS[1].upper()], [TEXTS[2], f" {TEXTS[3]} ", *TEXTS[8:10]]
    labels = [*TWO[:8], "calm", "calm"]  # the second text is loud once
    task = load(folder(tmp_path, (train, labels), (judged, ["calm", "loud", "calm", "loud"])))
    assert note(task, "memory").startswith("2 of 4 validation texts")
    assert note(task, "repeat another").split(" of ")[0] in ("1", "2")  # a repetition may be among the selection
    assert note(task, "more than one label").startswith("1 texts")


def test_a_language_that_the_tokenizer_cannot_read_is_said(load, tmp_path):
    task = load(file(tmp_path / "data.csv", separated(["\U0001f9ff\U0001fabf " * 3 + str(row) for row in range(18)], TWO)))
    assert note(task, "unknown to the tokenizer")


# --- json -------------------------------------------------------------------------------------------------------------


ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, TWO, strict=True)]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(ROWS), 0),
        (json.dumps(ROWS, indent=2), 0),
        (LINES, 0),
        ("\ufeff\n" + LINES.replace("\n", "\r\n\r\n"), 0),
        (json.dumps({"version": "1", "data": ROWS}), 1),
        (json.dumps({"text": TEXTS, "label": TWO}), 0),
        (pandas.DataFrame(ROWS).to_json(), 0),
    ],
)
def test_the_forms_of_json(load, tmp_path, suffix, content, said):
    task = load(file(tmp_path / f"data.{suffix}", content))
    assert rows_of(task) == sorted(zip(TEXTS, TWO, strict=True)) and len(task.notes) == said
    assert all("'data' of data.json" in words for words in task.notes)


def test_a_line_separator_inside_a_string_ends_no_line(load, tmp_path):
    content = "\n".join(json.dumps({"text": f"{text}\u2028\u0085on", "label": label}, ensure_ascii=False)
                        for text, label in zip(TEXTS, TWO, strict=True))  # fmt: skip
    assert len(rows_of(load(file(tmp_path / "data.jsonl", content)))) == 18


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("a.jsonl", LINES.replace("left by the sea", 'left "by the sea', 1), ("a.jsonl, line 6: ",)),
        ("a.json", LINES.replace("left by the sea", 'left "by the sea', 1), ("a.json, line 6: ",)),
        ("a.jsonl", LINES[1:], ("a.jsonl, line 1: ",)),
        ("a.jsonl", LINES[:-1], ("a.jsonl, line 18: ",)),
        ("a.json", json.dumps(ROWS, indent=1).replace('"label": "loud"', '"label": loud', 1), ("a.json, line 8: ",)),
        ("a.json", "[" * 100_000 + "]" * 100_000, ("nested too deep",)),
        ("a.jsonl", LINES + "\n" + "[" * 100_000, ("line 19: nested too deep",)),
        ("a.json", "[]", ("a.json has no rows",)),
        ("a.json", "5", ("a.json has no rows",)),
        ("a.json", '[["a", 1], ["b", 0]]', ("row 1 is no object",)),
        ("a.jsonl", LINES + '\n"text"', ("row 19 is no object",)),
        ("a.json", json.dumps({"train": ROWS, "validation": ROWS}), ("several tables (train, validation)",)),
        ("a.json", json.dumps({"text": TEXTS, "label": TWO[1:]}), ("columns of different lengths",)),
        ("a.json", '{"text": {"0": "a", "1": "b"}, "label": {"1": 0, "2": 1}}', ("columns whose rows differ",)),
        ("a.jsonl", LINES.replace("at dawn", "\\ud83d", 1), ("row 1: the text holds half of a character",)),
        ("a.jsonl", LINES.replace('"calm"', "1" * 5000, 1), ("a.jsonl: ", "digits")),
        ("a.json", json.dumps([{"text": ["two", "words"], "label": 1}]), ("row 1: the text is a list",)),
    ],
)  # fmt: skip
def test_json_that_is_no_table(load, tmp_path, name, content, messages):
    refused(load, file(tmp_path / name, content), *messages)


# --- names and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["DATA.CSV", "data.Csv", "two words.csv", "[final] (1).csv", "données {0}.csv", "100%.csv", "it's #1.csv"]
)
def test_names_of_files(load, tmp_path, name):
    assert len(rows_of(load(file(tmp_path / name, separated(TEXTS, TWO))))) == 18


def test_a_link_is_what_its_own_name_says(load, tmp_path):
    blob = file(tmp_path / "blobs" / "3f9a", separated(TEXTS, TWO, "\t"))
    (tmp_path / "data.tsv").symlink_to(blob)
    assert len(rows_of(load(tmp_path / "data.tsv"))) == 18
    for part in ("train", "validation"):
        (tmp_path / "linked").mkdir(exist_ok=True)
        (tmp_path / "linked" / f"{part}.tsv").symlink_to(blob)
    assert len(rows_of(load(tmp_path / "linked"))) == 18
    blob.unlink()
    refused(load, tmp_path / "data.tsv", "is a link to a file or folder that is not there")
    refused(load, tmp_path / "linked", "cannot read train.tsv: No such file")


@pytest.mark.parametrize(
    "name", ["reviews.csv", "./reviews", "a/b/c", "~/no-such-folder/x", "~nobody-at-all/x", "", " ", "x" * 300 + "/y", "a\0b"]
)
def test_a_path_to_nothing_is_told_without_asking_the_hub(load, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "_download", None)
    refused(load, name, "data set ")


def shards(path, names):
    """Write rows to files in turn, each with its number, and one validation file."""
    for number, name in enumerate(names):
        file(path / name, separated([f"{number} {text}" for text in TEXTS[:4]], TWO[:4], "\t" if name.endswith("tsv") else ","))
    file(path / "validation.csv", separated(TEXTS[6:8], TWO[6:8]))
    return path


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.csv", "train-00001-of-00002.csv"],
        ["train-00000.csv", "train-00001.csv", "train-00002.csv"],
        ["train-1.csv", "train-2.csv"],
        [f"train_{number}.csv" for number in range(11)],
        ["train-00000-of-00001.csv"],
        ["Train-0-of-2.CSV", "train-1-of-2.csv"],
    ],
)
def test_all_shards_are_read_in_order(load, tmp_path, names):
    path = shards(tmp_path / "data", names)
    assert len({text for text, _ in rows_of(load(path))}) == 4 * len(names) + 2
    files = tasks._files_of("train", sorted(path.iterdir()), "data")
    assert [file.name for file in files] == names
    texts = tasks._joined(files, [])["text"]
    assert [text.split()[0] for text in texts] == [str(number) for number in range(len(names)) for _ in range(4)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.csv", "train-small.csv"], "several files that could be its train part"),
        (["train.csv", "train.tsv"], "several files"),
        (["train.csv", "training.csv"], "several files"),
        (["train.csv", "train-00000-of-00001.csv"], "several files"),
        (["train-00000-of-00002.csv", "train-00001-of-00002.tsv"], "several files"),
        (["train-00000-of-00001.csv", "train-00000-of-00002.csv", "train-00001-of-00002.csv"], "several files"),
        (["train-00000-of-00002.csv"], "some of the shards"),
        (["train-00000-of-00003.csv", "train-00002-of-00003.csv"], "some of the shards"),
        (["train-0.csv", "train-2.csv"], "some of the shards"),
        (["train-1.csv", "train-01.csv"], "some of the shards"),
        (["test.csv"], "needs a train.* and a validation.* file"),
    ],
)
def test_folders_that_are_not_clear(load, tmp_path, names, message):
    path = shards(tmp_path / "data", names)
    refused(load, path, message, *(repr(name) for name in names))


def test_shards_of_other_columns(load, tmp_path):
    file(tmp_path / "train-0.csv", separated(TEXTS[:4], TWO[:4]))
    file(tmp_path / "train-1.csv", separated(TEXTS[4:8], TWO[4:8], header="sentence,label"))
    file(tmp_path / "validation.csv", separated(TEXTS[8:10], TWO[8:10]))
    refused(load, tmp_path, "train-1.csv has the columns 'sentence', 'label' and train-0.csv has 'text', 'label'")


def test_folders_without_data(load, tmp_path):
    refused(load, tmp_path, "needs a train.*", "it holds nothing")
    (tmp_path / "train.csv").mkdir()
    refused(load, tmp_path, "needs a train.*", "it holds 'train.csv'")


def test_the_files_of_a_folder_are_named(load, tmp_path):
    path = shards(tmp_path / "data", ["train-0.csv", "train-1.csv"])
    file(path / "test.csv", "whatever")
    assert note(load(path), "read from the folder").endswith("'train-0.csv', 'train-1.csv', 'validation.csv'")


def test_a_training_file_sorted_by_label_shows_every_class_to_a_small_profile(load, tmp_path):
    texts = [f"{text} {row}" for row in range(20) for text in TEXTS]
    task = load(folder(tmp_path, (texts, ["calm"] * 180 + ["loud"] * 180), (texts[:200], ["calm"] * 100 + ["loud"] * 100)))
    assert task.train.labels.float().mean() == pytest.approx(0.5, abs=0.2)
    assert task.validation.labels.float().mean() == pytest.approx(0.5, abs=0.35)


def test_a_file_that_cannot_be_opened(load, tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(readers, "_check_beginning", closed)
    refused(load, file(tmp_path / "data.csv", "text,label\n"), "cannot read data.csv: Permission denied")


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of three data sets: what was asked of it, and how."""
    asked = []
    whole = datasets.Dataset.from_dict({"text": TEXTS, "label": TWO, "idx": list(range(18))})
    held = {("glue", "sst2"): {"train": whole, "validation": whole}, ("moods", None): {"train": whole}, ("moods", "en"): {"train": whole},
            ("lab/moods", None): {"train": whole}, ("lab/moods", "en"): {"train": whole}, ("lab/judged", None): {"test": whole}}  # fmt: skip

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        if (path, name) not in held:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        return datasets.DatasetDict(held[path, name])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(tasks.hub, "answers", lambda: True)
    return asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("glue/sst2", [("glue", "sst2")]),
        ("glue:sst2", [("glue", "sst2")]),
        ("moods", [("moods", None)]),
        ("moods:en", [("moods", "en")]),
        ("lab/moods", [("lab/moods", None)]),
        ("lab/moods:en", [("lab/moods", "en")]),
        ("moods/en", [("moods/en", None), ("moods", "en")]),
    ],
)
def test_names_of_the_hub(load, hub, name, asked):
    task = load(name)
    assert [(path, configuration) for path, configuration, _ in hub] == asked
    assert not any(options.get("trust_remote_code") for _, _, options in hub)
    assert task.name == name and task.label_names == ["calm", "loud"]
    assert ("quarter" in " ".join(task.notes)) is (name not in ("glue/sst2", "glue:sst2"))
    assert any("not used: 'idx'" in said for said in task.notes)


def test_what_the_hub_does_not_have(load, hub, tmp_path):
    refused(load, "lab/none", "'lab/none' is neither built in", "the hub did not give it: Dataset 'lab/none' doesn't exist")
    refused(load, "lab/judged", "no part called train: it has 'test'")
    (tmp_path / "glue").mkdir()
    hub.clear()
    refused(load, "glue/sst2", "as glue lies here the hub is not asked")  # datasets would read the folder
    assert hub == []


def test_without_network_only_what_was_downloaded_before_is_found(load, monkeypatch, tmp_path):
    states = []

    def load_dataset(*arguments):
        states.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        raise ConnectionError("Couldn't reach it")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tasks.hub, "answers", lambda: False)
    refused(load, "lab/moods", "'lab/moods' is neither built in", "does not answer (no network?): Couldn't reach it")
    assert states == [(True, True)] * 2
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE
