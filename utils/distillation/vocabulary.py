"""Survey section 4.4: K-19, a student with a small vocabulary of its own, whose word pieces the teacher learns to read.

Zhao, Gupta, Song and Zhou 2019 (arXiv 1909.11687). Most of a small BERT is its table of word vectors, and a student with
fewer word pieces cannot copy the teacher's output. So the teacher reads sentences in which some words are spelled in the
student's pieces, whose short vectors are projected to its width, and guesses masked words in the vocabulary that spelled
them: that teaches the student's table. The student learns at the same time, from its own spelling alone, and shared
projections draw its matrices to the teacher's.

Scaled down: the student's vocabulary is built from the training sentences, and a word that the teacher splits is spelled
piece by piece, so that the finished student can read the teacher's token ids (`utils.parts.SpelledBert`).
"""

import dataclasses
import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear, mse_loss
from torch.nn.utils.rnn import pad_sequence
from transformers import BertModel

from utils.distillation.students import principal_directions, starting_layers
from utils.language import IGNORED, LanguageModel, Masking, masked_loss
from utils.parts import SpelledBert
from utils.training import Loss

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in this order: padding must be 0
INSIDE = "##"  # marks a piece that continues a word

# --- a WordPiece vocabulary -----------------------------------------------------------------------------------------


def count_words(rows: Iterable[list[int]], pieces: list[str]) -> Counter[str]:
    """How often each word occurs in token ids; `pieces` names every id. Special tokens are no words."""
    counts: Counter[str] = Counter()
    for row in rows:
        word = ""
        for piece in (*(pieces[token] for token in row), SPECIAL[0]):
            if not piece.startswith(INSIDE):
                counts[word] += 1
                word = ""
            word += "" if piece in SPECIAL else piece.removeprefix(INSIDE)
    del counts[""]
    return counts


class Neighbours:
    """Words in pieces, at first single characters; how often two pieces stand side by side, and in which words."""

    def __init__(self, counts: Counter[str]):
        self.counts = counts
        self.spelled = {word: [word[0], *(INSIDE + letter for letter in word[1:])] for word in counts}
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.where: dict[tuple[str, str], set[str]] = defaultdict(set)
        for word, pieces in self.spelled.items():
            for pair in pairwise(pieces):
                self.pairs[pair] += counts[word]
                self.where[pair].add(word)
        self.queue = [(-count, pair) for pair, count in self.pairs.items()]
        heapq.heapify(self.queue)

    def most_frequent(self) -> tuple[str, str] | None:
        """The pair that occurs most often, the first in the alphabet where several do; None where no pair is left."""
        while self.queue:
            count, pair = heapq.heappop(self.queue)
            if count and -count == self.pairs[pair]:  # else an old count: the pair was queued again when it changed
                return pair
        return None

    def merge(self, pair: tuple[str, str]) -> str:
        """Make one piece of a pair wherever it occurs; returns the piece."""
        joined, change = pair[0] + pair[1].removeprefix(INSIDE), Counter()
        for word in self.where.pop(pair):
            before, self.spelled[word] = self.spelled[word], joined_up(self.spelled[word], pair, joined)
            for old in pairwise(before):
                change[old] -= self.counts[word]
                self.where[old].discard(word)
            for new in pairwise(self.spelled[word]):
                change[new] += self.counts[word]
                self.where[new].add(word)
        for other, difference in change.items():
            if difference:
                self.pairs[other] += difference
                heapq.heappush(self.queue, (-self.pairs[other], other))
        return joined


def joined_up(pieces: list[str], pair: tuple[str, str], joined: str) -> list[str]:
    """A word's pieces with every occurrence of a pair, from the left, as one piece."""
    found: list[str] = []
    for piece in pieces:
        if found and (found[-1], piece) == pair:
            found[-1] = joined
        else:
            found.append(piece)
    return found


def build_vocabulary(counts: Counter[str], size: int) -> list[str]:
    """`size` word pieces for these words: special tokens, all characters, then the most frequent pair of neighbours again and
    again.

    What the `tokenizers` library calls WordPiece training, but with ties broken by the alphabet: theirs differ from run to
    run. Fewer pieces come back where no pair is left. Raises ValueError for a size that does not even hold the characters.
    """
    neighbours = Neighbours(counts)
    pieces = dict.fromkeys((*SPECIAL, *sorted({piece for parts in neighbours.spelled.values() for piece in parts})))
    if size < len(pieces):
        raise ValueError(f"the vocabulary needs {len(pieces)} pieces for special tokens and characters alone, got {size}")
    while len(pieces) < size and (pair := neighbours.most_frequent()):
        pieces[neighbours.merge(pair)] = None  # two pairs may make the same piece
    return list(pieces)


# --- spelling -------------------------------------------------------------------------------------------------------


def spell(piece: str, vocabulary: dict[str, int]) -> list[int]:
    """A word, or a piece that continues one, in the longest pieces of a vocabulary from the left; [UNK] where that fails."""
    if piece in SPECIAL:
        return [vocabulary[piece]]
    if re.fullmatch(r"\[\w+\]", piece):  # BERT's [unused17] and the like
        return [vocabulary["[UNK]"]]
    mark, text = (INSIDE, piece[len(INSIDE) :]) if piece.startswith(INSIDE) and piece != INSIDE else ("", piece)
    found: list[int] = []
    while text:
        end = next((end for end in range(len(text), 0, -1) if mark + text[:end] in vocabulary), 0)
        if not end:
            return [vocabulary["[UNK]"]]
        found.append(vocabulary[mark + text[:end]])
        text, mark = text[end:], INSIDE
    return found


def spelling_table(pieces: list[str], vocabulary: list[str]) -> torch.Tensor:
    """The own ids of every foreign piece, (foreign pieces, longest spelling), padded with 0."""
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    rows = [torch.tensor(spell(piece, ids)) for piece in pieces]
    return pad_sequence(rows, batch_first=True)


@dataclass(frozen=True)
class Mixer:
    """Writes token ids anew, words of them in the student's pieces; those ids come after the teacher's: own id + teacher's
    size.
    """

    spelling: torch.Tensor  # (teacher's pieces, longest spelling)
    inside: torch.Tensor  # (teacher's pieces,), whether a piece continues a word
    special: torch.Tensor  # (teacher's pieces,), whether it is a special token, which is never spelled anew

    @classmethod
    def of(cls, pieces: list[str], vocabulary: list[str]) -> "Mixer":
        """For a teacher's pieces by id, and a student's."""
        inside = torch.tensor([piece.startswith(INSIDE) for piece in pieces])
        return cls(spelling_table(pieces, vocabulary), inside, torch.tensor([piece in SPECIAL for piece in pieces]))

    def own(self, ids: torch.Tensor) -> torch.Tensor:
        """A sentence (tokens,) in the student's ids, special tokens too."""
        row = self.spelling[ids].flatten()
        return row[row != 0]

    def mix(self, ids: torch.Tensor, share: float) -> torch.Tensor:
        """A sentence (tokens,) of which every word is spelled by the student's vocabulary with probability `share`."""
        word = (~self.inside[ids]).long().cumsum(0)  # the same number for all pieces of a word
        chosen = (torch.rand(int(word[-1]) + 1) < share)[word] & ~self.special[ids]
        spelled = torch.where(self.spelling[ids] != 0, self.spelling[ids] + len(self.spelling), 0)
        kept = nn.functional.pad(ids[:, None], (0, spelled.shape[1] - 1))
        real = torch.where(chosen[:, None], spelled != 0, _first(spelled.shape))
        return torch.where(chosen[:, None], spelled, kept)[real]

    def growth(self, rows: list[list[int]], covered: float = 0.99) -> float:
        """How many own pieces a token takes, such that this share of the sentences fits; at least 1, in steps of 0.01."""
        ratios = [len(self.own(torch.tensor(row))) / len(row) for row in rows]
        return max(1.0, math.ceil(100 * float(np.quantile(ratios, covered))) / 100)


def _first(shape: tuple[int, int]) -> torch.Tensor:
    """True in the first column."""
    return torch.arange(shape[1]).expand(shape) == 0


def rewrite(batch: dict, write) -> dict:
    """A batch whose sentences are written anew, padded again. `write` maps ids (tokens,) to ids."""
    ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool()
    rows = [write(row[real]) for row, real in zip(ids, mask, strict=True)]
    device = batch["input_ids"].device
    lengths = torch.tensor([len(row) for row in rows])
    new_mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": pad_sequence(rows, batch_first=True).to(device), "attention_mask": new_mask.to(device)}


# --- the student ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def spelled_student(teacher: nn.Module, mixer: Mixer, vocabulary: list[str], sizes: dict, growth: float) -> SpelledBert:
    """A small BERT of its own vocabulary that reads the teacher's ids. `sizes` holds hidden size, layers, heads and neurons.

    Its word vectors begin as the teacher's, in their principal directions: those of the same piece, or the mean of the pieces
    that spell it there. Its layers are random. `sizes` has the names of a `BertConfig`. Draws from the global random numbers.
    Raises ValueError for a vocabulary that 16 bits cannot number.
    """
    if len(vocabulary) > torch.iinfo(torch.int16).max:
        raise ValueError(
            f"the spelling is stored in 16 bits: at most {torch.iinfo(torch.int16).max} pieces, got {len(vocabulary)}"
        )
    table = teacher.bert.embeddings.word_embeddings.weight
    plain = {"vocab_size": len(vocabulary), "num_labels": teacher.config.num_labels, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}  # fmt: skip
    student = SpelledBert(len(mixer.spelling), mixer.spelling.shape[1], growth, plain | sizes)
    student.spelling.copy_(mixer.spelling)
    directions = principal_directions(table, sizes["hidden_size"]).cpu()
    student.bert.embeddings.word_embeddings.weight.copy_(inherited(table.float().cpu() @ directions, mixer))
    return student.to(table.device).eval()


@torch.no_grad()
def inherited(vectors: torch.Tensor, mixer: Mixer) -> torch.Tensor:
    """A vector per own piece: the mean of the vectors (teacher's pieces, size) of those that it helps to spell; zero for none.

    A piece that the teacher has too, and that spells itself, takes that vector alone.
    """
    size = int(mixer.spelling.max()) + 1
    total, count = torch.zeros(size, vectors.shape[1]), torch.zeros(size, 1)
    alone = (mixer.spelling != 0).sum(1) == 1
    for rows in (~alone, alone):  # what is spelled by itself comes last, and overwrites
        owners, places = (mixer.spelling * rows[:, None]).nonzero(as_tuple=True)
        pieces = mixer.spelling[owners, places]
        fresh = torch.zeros_like(total).index_add_(0, pieces, vectors[owners])
        number = torch.zeros_like(count).index_add_(0, pieces, torch.ones(len(pieces), 1))
        total, count = torch.where(number > 0, fresh, total), torch.where(number > 0, number, count)
    return total / count.clamp(min=1)


# --- the teacher that reads both ------------------------------------------------------------------------------------


class MixedTeacher(nn.Module):
    """A BERT that reads and guesses both vocabularies; the student's vectors, which it shares, come in through a projection.

    Ids below the teacher's vocabulary size are its own, the others the student's. A masked token is guessed by a softmax over
    the vocabulary that spelled it. Zhao et al. 2019, survey 4.4.
    """

    def __init__(self, language: LanguageModel, student_table: nn.Embedding):
        super().__init__()
        table = language.bert.embeddings.word_embeddings.weight
        self.bert, self.config, self.head = language.bert, language.config, language.head
        self.student_table = student_table
        self.up = nn.Linear(student_table.embedding_dim, table.shape[1], bias=False).to(table.device)
        self.student_bias = nn.Parameter(table.new_zeros(student_table.num_embeddings))
        with torch.no_grad():
            self.up.weight.copy_(principal_directions(table, student_table.embedding_dim))

    @property
    def own_size(self) -> int:
        """The size of the teacher's own vocabulary."""
        return self.bert.embeddings.word_embeddings.num_embeddings

    def vectors(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Word vectors (..., hidden) of ids of both vocabularies."""
        foreign = input_ids >= self.own_size
        own = self.bert.embeddings.word_embeddings(input_ids.masked_fill(foreign, 0))
        theirs = self.up(self.student_table((input_ids - self.own_size).clamp(min=0)))
        return torch.where(foreign[..., None], theirs.to(own.dtype), own)

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The last layer's states, (batch, length, hidden)."""
        return self.bert(inputs_embeds=self.vectors(input_ids), attention_mask=attention_mask).last_hidden_state

    def losses(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss over masked tokens (tokens, hidden), each by the softmax of its own vocabulary; `labels` are joint ids."""
        foreign = labels >= self.own_size
        ready = self.head.transform(states)
        own = linear(ready[~foreign], self.bert.embeddings.word_embeddings.weight, self.head.bias).float()
        theirs = linear(ready[foreign], self.up(self.student_table.weight), self.student_bias).float()
        found = (masked_loss(own, labels[~foreign]), masked_loss(theirs, labels[foreign] - self.own_size))
        return (found[0] * (~foreign).sum() + found[1] * foreign.sum()) / max(1, len(labels))


class SharedProjections(nn.Module):
    """Two maps per pair of widths, the same for all layers, that turn the student's weights into the teacher's, or back.

    `up`: theta_t ~ U theta_s V, `down`: U theta_t V ~ theta_s; biases have U alone. The teacher's weights are a target and
    get no gradient. Student layer i answers to one of the teacher's, evenly spread. Zhao et al. 2019, survey 4.4; word
    vectors are left out, since those of the student are in the teacher already. Raises ValueError for another direction.
    """

    MATRICES = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                "intermediate.dense", "output.dense")  # fmt: skip

    def __init__(self, teacher: BertModel, student: BertModel, direction: str = "up"):
        super().__init__()
        if direction not in ("up", "down"):
            raise ValueError(f"direction must be up or down, got {direction!r}")
        chosen = starting_layers(len(teacher.encoder.layer), len(student.encoder.layer), "alternate")
        self.direction = direction
        self.pairs = [(teacher.encoder.layer[j].get_submodule(name), student.encoder.layer[i].get_submodule(name))
                      for i, j in enumerate(chosen) for name in self.MATRICES]  # fmt: skip
        widths = {size for mine, given in self.pairs for size in zip(mine.weight.shape, given.weight.shape, strict=True)}
        device = self.pairs[0][0].weight.device
        start = {self.name(*size): torch.eye(*(size if direction == "up" else size[::-1])) for size in sorted(widths)}
        self.left, self.right = (
            nn.ParameterDict({name: eye.clone().to(device) for name, eye in start.items()}) for _ in range(2)
        )

    @staticmethod
    def name(teacher_size: int, student_size: int) -> str:
        """The name of a pair of widths."""
        return f"{teacher_size}-{student_size}"

    def forward(self) -> torch.Tensor:
        """The mean squared difference per weight, the mean over matrices and biases."""
        found = []
        for mine, given in self.pairs:
            rows, columns = (self.name(*sizes) for sizes in zip(mine.weight.shape, given.weight.shape, strict=True))
            U, V = self.left[rows], self.right[columns]
            teacher, student = (mine.weight.detach(), mine.bias.detach()), (given.weight, given.bias)
            source, target = (student, teacher) if self.direction == "up" else (teacher, student)
            found += [mse_loss(U @ source[0] @ V.T, target[0]), mse_loss(U @ source[1], target[1])]
        return torch.stack(found).mean()


# --- dual training --------------------------------------------------------------------------------------------------


class DualModel(nn.Module):
    """Teacher and student under one optimiser. Their table of the student's word pieces is one set of weights."""

    def __init__(self, teacher: LanguageModel, student: LanguageModel, direction: str = "up"):
        super().__init__()
        self.teacher, self.student = MixedTeacher(teacher, student.bert.embeddings.word_embeddings), student
        self.projections = SharedProjections(teacher.bert, student.bert, direction)
        self.config = teacher.config

    @property
    def bert(self) -> BertModel:
        """The teacher's encoder: what the spine asks for embeddings."""
        return self.teacher.bert


@dataclass(frozen=True)
class DualTraining:
    """How both read. `share` of the words are spelled by the student's vocabulary for the teacher; maskings for joint and own
    ids. `projection_weight` multiplies a mean per weight, which is small beside the words' losses (`balanced`).
    """

    mixer: Mixer
    joint: Masking
    own: Masking
    share: float = 0.5
    projection_weight: float = 1.0

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of the student's spelling must lie in [0, 1], got {self.share}")

    @classmethod
    def of(cls, mixer: Mixer, pieces: list[str], vocabulary: list[str], **options) -> "DualTraining":
        """With BERT's masking for both readings. `pieces` and `vocabulary` name the teacher's and the student's ids."""
        given = tuple(number for number, piece in enumerate(pieces) if piece in SPECIAL)
        joint = Masking(pieces.index("[MASK]"), len(pieces) + len(vocabulary), given)
        return cls(mixer, joint, Masking(vocabulary.index("[MASK]"), len(vocabulary), tuple(range(len(SPECIAL)))), **options)

    def balanced(self, model: DualModel, batch: dict) -> "DualTraining":
        """The same with the projections' weight at which, on this batch, their gradient on the student's matrices is as long as
        that of the student's words.
        """
        weights = [given.weight for _, given in model.projections.pairs]

        def length(loss: torch.Tensor) -> float:
            return torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights)]).norm().item()

        words = guess_loss(model.student, rewrite(batch, self.mixer.own), self.own)
        return dataclasses.replace(self, projection_weight=length(words) / length(model.projections()))

    def loss(self) -> Loss:
        """The teacher's masked words in mixed spelling + the student's in its own + the distance of their weights. K-19."""

        def dual(model: DualModel, batch: dict) -> torch.Tensor:
            mixed = rewrite(batch, lambda ids: self.mixer.mix(ids, self.share))
            total = guess_loss(model.teacher, mixed, self.joint) + guess_loss(
                model.student, rewrite(batch, self.mixer.own), self.own
            )
            return total + self.projection_weight * model.projections()

        return dual


def guess_loss(model: LanguageModel | MixedTeacher, batch: dict, masking: Masking) -> torch.Tensor:
    """The loss of masked words for whichever of the two reads the batch."""
    masked, labels = masking(batch["input_ids"])
    chosen = labels != IGNORED
    states = model.states(masked, batch["attention_mask"])[chosen]
    return (
        model.losses(states, labels[chosen])
        if isinstance(model, MixedTeacher)
        else masked_loss(model.guess(states), labels[chosen])
    )
