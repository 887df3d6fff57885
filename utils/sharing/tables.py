"""Word tables of this chapter at equal stored bytes, codes included; and the plain competitor that keeps fewer words (C46).

Survey section 5.2 replaces the word table by parts that compose a word's vector from fewer numbers (`utils.parts.embeddings`);
what all of them share is in `utils.tables`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from utils import bert
from utils.parts import SpelledBert
from utils.parts.embeddings import (
    FactorizedVectors,
    ReferenceVectors,
    SlimVectors,
    SparseVectors,
    TrimmedVectors,
    TwoComponentVectors,
)
from utils.tables import PLACE, largest_size, stored_bytes
from utils.tasks import Split, column

INSIDE = "##"  # marks a piece that continues a word
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NEEDED = SPECIAL[:4]  # without these no sentence can be written

# --- equal bytes ----------------------------------------------------------------------------------------------------


def sizes_for(
    budget_bytes: int, vocab_size: int, hidden_size: int, choices: int = 256, pieces: int = 8, nonzeros: int = 8
) -> dict[str, dict]:
    """The options of the largest part of each method that is stored in `budget_bytes`, by its id in the catalogue.

    Free are the blocks of S-12 and S-13 (with `choices` reference vectors each), the pool of S-14 (`pieces` to a word), the
    dense words of S-10 (`nonzeros` to the others), the shape of S-11's table, and S-15's width. Where the width has no such number of
    pieces it is the nearest one, and where the budget does not hold so many nonzeros, as many as it holds. Raises ValueError where
    a method does not fit.
    """
    V, d = vocab_size, hidden_size
    vectors = max(1, budget_bytes // (4 * d))  # of full width, if the budget held nothing else
    blocks = [count for count in range(1, d + 1) if d % count == 0]
    pieces = min(blocks[1:] or blocks, key=lambda count: abs(math.log(count / pieces)))
    while nonzeros > 1 and stored_bytes(SparseVectors(V, d, nonzeros, nonzeros)) > budget_bytes:
        nonzeros -= 1
    makers = {
        "S-10": (lambda n: SparseVectors(V, d, n, nonzeros), nonzeros, V - 1),
        "S-11": (lambda n: TwoComponentVectors(V, d, math.ceil(V / n), n), math.ceil(math.sqrt(V)), V),
        "S-12": (lambda n: ReferenceVectors(V, d, blocks[n], choices), 0, len(blocks) - 1),
        "S-14": (lambda n: SlimVectors(V, d, pieces, n * pieces), 1 + math.ceil(V ** (1 / pieces)), V),
        "S-15": (lambda n: FactorizedVectors(V, d, n), 1, d),
    }
    found = {}
    for name, (make, least, most) in makers.items():
        size = largest_size(make, budget_bytes, max(least, min(most, vectors)), least)
        found[name] = make(size).options()
    return found | {"S-13": found["S-12"]}


# --- vocabulary trimming (C46) --------------------------------------------------------------------------------------


def most_frequent(counts: torch.Tensor, number: int, always: Iterable[int] = ()) -> torch.Tensor:
    """The `number` most frequent ids in ascending order, `always` among them; of equally frequent ones the first.

    Raises ValueError where that number cannot hold `always`, or is more than there are.
    """
    rank = counts.double().clone()
    rank[list(always)] = torch.inf
    least = int(rank.isinf().sum())
    if not max(1, least) <= number <= len(counts):
        raise ValueError(f"the number of words must lie in {max(1, least)}..{len(counts)}, got {number}")
    return rank.argsort(descending=True, stable=True)[:number].sort().values


def spell(piece: str, vocabulary: dict[str, int]) -> list[int]:
    """A word, or a piece that continues one, in the longest pieces of a vocabulary from the left; [UNK] where that fails."""
    if piece in vocabulary:
        return [vocabulary[piece]]
    if piece.startswith("[") and len(piece) > 1:  # [unused17] and the like
        return [vocabulary["[UNK]"]]
    mark, text = (INSIDE, piece.removeprefix(INSIDE)) if piece.startswith(INSIDE) and piece != INSIDE else ("", piece)
    found: list[int] = []
    while text:
        end = next((end for end in range(len(text), 0, -1) if mark + text[:end] in vocabulary), 0)
        if not end:
            return [vocabulary["[UNK]"]]
        found.append(vocabulary[mark + text[:end]])
        text, mark = text[end:], INSIDE
    return found


@dataclass(frozen=True)
class Trimming:
    """A vocabulary of which some ids stay. The others are spelled in those that stay, piece by piece."""

    kept: torch.Tensor  # (kept,) the old id of each new one; [PAD] is 0
    spelling: torch.Tensor  # (vocabulary, longest spelling) new ids of each old one, padded with 0
    pieces: tuple[str, ...]  # what each new id stands for

    def rewrite(self, ids: Sequence[int]) -> list[int]:
        """A sentence of old ids in new ones, which may be more."""
        return [new for row in self.spelling[torch.tensor(ids, dtype=torch.long)].tolist() for new in row if new]

    def untouched(self, ids: Sequence[int]) -> torch.Tensor:
        """Which tokens of a sentence of old ids stay as they are, boolean."""
        return torch.isin(torch.tensor(ids, dtype=torch.long), self.kept)

    def untouched_share(self, split: Split) -> float:
        """The share of a split's tokens that stay as they are (claim C46)."""
        return self.untouched([token for row in split.input_ids for token in row]).float().mean().item()

    def growth(self, split: Split, covered: float = 0.99) -> float:
        """New ids per old one, such that this share of the sentences fits; at least 1, in steps of 0.01."""
        ratios = [len(self.rewrite(row)) / len(row) for row in split.input_ids]
        return max(1.0, math.ceil(100 * float(np.quantile(ratios, covered))) / 100)


def trim(pieces: Sequence[str], counts: torch.Tensor, number: int | None = None) -> Trimming:
    """Keep the `number` most frequent pieces (None: all that occur), special tokens, letters and digits among them.

    `pieces` names every id of the vocabulary, `counts` (vocabulary,) says how often it occurs. With letters any word of the
    Latin alphabet can be spelled. Raises ValueError for a vocabulary without [PAD], [UNK], [CLS] and [SEP], and for a number
    that does not hold what always stays.
    """
    check_special(pieces)
    if len(pieces) != len(counts):
        raise ValueError(f"{len(pieces)} pieces need as many counts, got {len(counts)}")
    always = [place for place, piece in enumerate(pieces) if piece in SPECIAL or _is_letter(piece)]
    occurring = len(set(always) | set(counts.nonzero().flatten().tolist()))
    kept = most_frequent(counts, occurring if number is None else number, always).tolist()
    padding = pieces.index("[PAD]")
    kept = [padding, *(place for place in kept if place != padding)]  # 0 also pads the spelling
    vocabulary = {pieces[old]: new for new, old in enumerate(kept)}
    spelling = pad_sequence([torch.tensor(spell(piece, vocabulary)) for piece in pieces], batch_first=True)
    return Trimming(torch.tensor(kept), spelling, tuple(vocabulary))


def check_special(pieces: Sequence[str]) -> None:
    """Raise ValueError where a token is missing without which no sentence can be written."""
    missing = [token for token in NEEDED if token not in pieces]
    if missing:
        raise ValueError(f"a vocabulary needs {', '.join(NEEDED)}; this one lacks {', '.join(missing)}")


def _is_letter(piece: str) -> bool:
    text = piece.removeprefix(INSIDE)
    return len(text) == 1 and text.isascii() and text.isalnum()


@torch.no_grad()
def trimmed_vectors(table: torch.Tensor, trimming: Trimming) -> TrimmedVectors:
    """The trimmed table in the place of the whole one: the vector of a word that went is the mean of the pieces that spell it.

    A stand-in that leaves sentences as long as they were, so that it can be held against other tables; in `trimmed_bert` the
    pieces have places of their own.
    """
    vectors = TrimmedVectors(*table.shape, *(len(trimming.kept), trimming.spelling.shape[1]))
    vectors.spelling.copy_(trimming.spelling)
    vectors.vectors.copy_(table[trimming.kept.to(table.device)])
    return vectors.to(table.device)


@torch.no_grad()
def trimmed_bert(model: nn.Module, trimming: Trimming) -> nn.Module:
    """The model with the trimmed table, which reads new ids: what a user ships, together with the small tokenizer."""
    trimmed = bert.fresh_copy(model)
    table = model.get_submodule(PLACE).weight.detach()
    trimmed.set_submodule(PLACE, nn.Embedding.from_pretrained(table[trimming.kept.to(table.device)], freeze=False))
    trimmed.config.vocab_size = len(trimming.kept)
    return trimmed


@torch.no_grad()
def respelling_bert(model: nn.Module, trimming: Trimming, growth: float) -> SpelledBert:
    """The trimmed model, but taking the old token ids, which it spells anew: it can be measured where all others are.

    `growth` is the room for that (`Trimming.growth`). Its file holds the spelling, which a user does not need.
    """
    config = model.config.to_diff_dict()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings", "hidden_act",
             "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "layer_norm_eps")  # fmt: skip
    own = {name: config[name] for name in names if name in config}
    own |= {"vocab_size": len(trimming.kept), "num_labels": model.config.num_labels}
    trimmed = SpelledBert(len(trimming.spelling), trimming.spelling.shape[1], growth, own)
    plain = trimmed_bert(model, trimming)
    trimmed.bert.load_state_dict(plain.bert.state_dict())
    trimmed.classifier.load_state_dict(plain.classifier.state_dict())
    trimmed.spelling.copy_(trimming.spelling)
    return trimmed.to(next(model.parameters()).device).eval()


def retokenise(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, trimming: Trimming, max_length: int) -> list[list[int]]:
    """New ids of texts as a tokenizer with the trimmed vocabulary writes them, with [CLS] and [SEP], cut to `max_length`."""
    given, vocabulary = tokenizer.backend_tokenizer, {piece: new for new, piece in enumerate(trimming.pieces)}
    small = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    small.normalizer, small.pre_tokenizer = given.normalizer, given.pre_tokenizer
    rows = (small.encode(text).ids[: max_length - 2] for text in texts)
    return [[vocabulary["[CLS]"], *row, vocabulary["[SEP]"]] for row in rows]


def retokenised(split: Split, tokenizer: PreTrainedTokenizerBase, trimming: Trimming, max_length: int) -> Split:
    """A split whose texts are tokenised with the trimmed vocabulary, for `trimmed_bert`."""
    rows = retokenise(column(split.data, "text"), tokenizer, trimming, max_length)
    return Split(split.data, rows, split.labels)


def respelling_agrees(old: Sequence[Sequence[int]], new: Sequence[Sequence[int]], trimming: Trimming) -> dict[str, float]:
    """Shares of sentences whose old ids, spelled anew piece by piece, are the `new` ids of the re-tokenised text.

    `untouched`: of those that lost no piece, where it must be 1; `all`: of all, where a word in several pieces may be cut
    elsewhere. Sentences cut to a length do not compare: give whole ones. nan where there is no sentence.
    """
    same = torch.tensor(
        [trimming.rewrite(mine) == list(theirs) for mine, theirs in zip(old, new, strict=True)], dtype=torch.float
    )
    whole = torch.tensor([bool(trimming.untouched(mine).all()) for mine in old])
    return {"untouched": same[whole].mean().item(), "all": same.mean().item()}
