"""Texts without labels, for teachers to label: other reviews cut to sentences, and copies of the training sentences, disturbed.

K-27, the distilled BiLSTM (survey 4.4), lives on the second kind: Tang et al. 2019 (arXiv 1903.12136) make twenty copies of
every sentence, and the teacher says what each of them means. The first kind is what the survey's section 4.5 calls the best
case of distillation: much unlabelled text of the same subject.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import torch

from utils import tasks
from utils.profiles import Profile
from utils.tasks import Split, Task

UNLABELLED = -100  # cross-entropy leaves such labels out, so a loss that should not look at them cannot
TAG = re.compile(r"<[^<>]*>")
END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
WORD = re.compile(r"\w+|[^\w\s]")


# --- other reviews --------------------------------------------------------------------------------------------------


def sentences(text: str, words: tuple[int, int] = (4, 40)) -> list[str]:
    """The sentences of a text, in order, that have so many words (at least, at most); mark-up counts as an end of sentence."""
    low, high = words
    pieces = [piece.strip() for block in TAG.split(text) for piece in END.split(block)]
    return [piece for piece in pieces if low <= len(piece.split()) <= high]


def other_sentences(count: int, seed: int = 0, words: tuple[int, int] = (4, 40)) -> list[str]:
    """`count` different sentences of the embedded `imdb` reviews, which come in random order of reviews and with no label.

    Reviews are labelled as a whole; a sentence of theirs is not. Raises ValueError where there are fewer.
    """
    reviews = tasks.column(tasks.embedded("imdb"), "text")
    found: dict[str, None] = {}
    for number in np.random.default_rng(seed).permutation(len(reviews)):
        found.update(dict.fromkeys(sentences(reviews[number], words)))
        if len(found) >= count:
            return list(found)[:count]
    raise ValueError(f"imdb has {len(found)} different sentences of {words[0]} to {words[1]} words, {count} were asked for")


def as_split(texts: list[str], task: Task, profile: Profile) -> Split:
    """Texts as an unlabelled split in the task's tokens. Raises ValueError for no texts."""
    if not texts:
        raise ValueError("no texts: at least one is needed")
    data = datasets.Dataset.from_dict({"text": texts, "label": [UNLABELLED] * len(texts)})
    return tasks.tokenise(data, task.tokenizer, profile.max_length, task.vocabulary)


def unlabelled(task: Task, profile: Profile, count: int, seed: int = 0) -> Split:
    """`count` unlabelled `imdb` sentences in the task's tokens, between the shortest and the longest tenth of the task's in
    length.
    """
    lengths = [len(text.split()) for text in tasks.column(task.train.data, "text")]
    low, high = np.quantile(lengths, (0.1, 0.9)).astype(int)
    return as_split(other_sentences(count, seed, (int(low), int(high))), task, profile)


# --- what the teacher says ------------------------------------------------------------------------------------------


def pseudo_labelled(split: Split, logits: torch.Tensor, at_least: float = 0.0) -> Split:
    """The split with the teacher's most likely class as label; examples whose probability is below `at_least` are left out.

    `logits` (examples, classes). Raises ValueError where they do not fit the split, and where nothing is left.
    """
    if len(logits) != len(split):
        raise ValueError(f"{len(logits)} rows of logits for {len(split)} examples")
    probability, labels = logits.float().softmax(-1).max(-1)
    kept = (probability >= at_least).nonzero().flatten().tolist()
    if not kept:
        raise ValueError(f"no example has a class with a probability of {at_least} or more")
    return Split(split.data.select(kept), [split.input_ids[row] for row in kept], labels[kept].cpu())


def joined(first: Split, *others: Split) -> Split:
    """Several splits as one, in order."""
    splits = (first, *others)
    columns = {name: [value for split in splits for value in tasks.column(split.data, name)] for name in ("text", "label")}
    input_ids = [ids for split in splits for ids in split.input_ids]
    return Split(datasets.Dataset.from_dict(columns), input_ids, torch.cat([split.labels for split in splits]))


def trained_on(task: Task, split: Split) -> Task:
    """The same task with other training sentences."""
    digest = hashlib.sha256(repr((task.key, split.input_ids, split.labels.tolist())).encode()).hexdigest()[:16]
    return dataclasses.replace(task, train=split, key=digest)


# --- K-27 disturbed copies ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disturbance:
    """How a copy of a sentence is disturbed. The paper's rates: 0.1, 0.1, 0.25, windows of 1 to 5 words, 20 copies."""

    mask: float = 0.1  # a word becomes [MASK] with this probability,
    replace: float = 0.1  # another word with this one;
    window: float = 0.25  # and of a copy with this probability only a window of so many words is left
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self):
        if min(self.mask, self.replace, self.window) < 0 or self.mask + self.replace > 1 or self.window > 1:
            raise ValueError(f"rates must lie in [0, 1], mask and replace together too, got {self}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"a window has one word or more, got lengths {self.lengths}")


def disturb(words: list[str], others: list[str], how: Disturbance, rng: np.random.Generator, mask: str = "[MASK]") -> list[str]:
    """One copy: word by word masked, replaced by one of `others`, or kept; then, perhaps, cut to a window. Tang et al. 2019.

    The paper draws a replacement among words of the same part of speech, which needs a tagger. Here `others` are all words of
    the corpus with their repetitions, so that a replacement is as frequent as the word is: the same disturbance with less
    grammar.
    """
    rolls = rng.random(len(words))
    drawn = rng.integers(len(others), size=len(words))
    copied = [mask if roll < how.mask else others[other] if roll < how.mask + how.replace else word
              for word, roll, other in zip(words, rolls, drawn, strict=True)]  # fmt: skip
    if rng.random() < how.window:
        length = min(int(rng.choice(how.lengths)), len(copied))
        start = int(rng.integers(len(copied) - length + 1))
        return copied[start : start + length]
    return copied


def augment(texts: list[str], copies: int = 20, how: Disturbance | None = None, seed: int = 0, mask: str = "[MASK]") -> list[str]:
    """Up to `copies` disturbed copies of every text, each new: none is a text or an earlier copy. K-27, Tang et al. 2019,
    survey 4.4.

    Raises ValueError for no texts, and for a negative number of copies.
    """
    if not texts or copies < 0:
        raise ValueError(f"texts must not be empty and copies not negative, got {len(texts)} texts and {copies} copies")
    rng, how = np.random.default_rng(seed), how or Disturbance()
    split = [WORD.findall(text) for text in texts]
    others = [word for words in split for word in words]
    known = {" ".join(words) for words in split}
    return [
        copy
        for words in split
        for copy in _new_copies(words, copies, known, lambda words: disturb(words, others, how, rng, mask))
    ]


def _new_copies(words: list[str], copies: int, known: set[str], disturbed) -> Iterator[str]:
    for _ in range(copies):
        copy = " ".join(disturbed(words))
        if copy and copy not in known and set(copy.split()) != {"[MASK]"}:
            known.add(copy)
            yield copy


def augmented(task: Task, profile: Profile, copies: int = 20, how: Disturbance | None = None, seed: int = 0) -> Split:
    """Disturbed copies of the task's training sentences, in its tokens, unlabelled."""
    texts = tasks.column(task.train.data, "text")
    return as_split(augment(texts, copies, how, seed, task.tokenizer.mask_token), task, profile)
