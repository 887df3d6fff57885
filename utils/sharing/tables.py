"""What all word tables of this chapter share: their place, fitting, comparing, equal bytes; and vocabulary trimming (C46).

Half of a small BERT is one table, a vector of `hidden_size` numbers per word piece. Survey section 5.2 replaces it by parts
that compose a word's vector from fewer numbers (`utils.parts.embeddings.WordVectors`). They are compared at equal stored bytes,
codes included. The plain competitor keeps fewer words: `trim` (claim C46).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import nn
from torch.nn.functional import cosine_similarity, mse_loss, normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from utils import bert, encodings
from utils.encodings import Encoded
from utils.parts import SpelledBert
from utils.parts.embeddings import (
    CodedVectors,
    FactorizedVectors,
    ReferenceVectors,
    SlimVectors,
    SparseVectors,
    TrimmedVectors,
    TwoComponentVectors,
    WordVectors,
)
from utils.tasks import Split, column

PLACE = "bert.embeddings.word_embeddings"
INSIDE = "##"  # marks a piece that continues a word
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NEEDED = SPECIAL[:4]  # without these no sentence can be written

# --- the table's place ----------------------------------------------------------------------------------------------


@torch.no_grad()
def word_table(model: nn.Module) -> torch.Tensor:
    """A copy of the vectors of all words, (vocabulary, hidden), float32."""
    return model.get_submodule(PLACE).weight.detach().float().clone()


def replace_table(model: nn.Module, vectors: WordVectors) -> None:
    """Put `vectors` in the place of the model's word table. Raises ValueError where vocabulary or width differ."""
    now = model.get_submodule(PLACE)
    needed, given = ((table.num_embeddings, table.embedding_dim) for table in (now, vectors))
    if needed != given:
        raise ValueError(
            f"the model needs vectors for {needed[0]} words of width {needed[1]}, got {given[0]} of width {given[1]}"
        )
    model.set_submodule(PLACE, vectors.to(next(model.parameters()).device).train(model.training))


# --- fitting and comparing ------------------------------------------------------------------------------------------


def word_counts(split: Split, vocab_size: int) -> torch.Tensor:
    """How often each id occurs in a split, (vocab_size,), whole numbers. Raises ValueError for an id beyond the vocabulary."""
    ids = torch.tensor([token for row in split.input_ids for token in row], dtype=torch.long)
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise ValueError(f"the texts hold id {int(ids.max())}, the vocabulary ends at {vocab_size - 1}")
    return torch.bincount(ids, minlength=vocab_size)


def regress(
    vectors: WordVectors,
    table: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 1024,
    counts: torch.Tensor | None = None,
    seed: int = 0,
) -> list[float]:
    """Fit composed vectors to a table (vocabulary, hidden) by Adam on the mean squared error; returns the losses.

    Words are drawn uniformly, or in proportion to `counts` (vocabulary,); the rate falls linearly to 0. Raises ValueError where
    the sizes differ or nothing can be drawn.
    """
    shape = (vectors.num_embeddings, vectors.embedding_dim)
    if table.shape != shape:
        raise ValueError(f"the table must have shape {shape}, got {tuple(table.shape)}")
    weights = torch.ones(len(table)) if counts is None else counts.double().cpu()
    if weights.shape != (len(table),) or not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(f"counts must be {len(table)} numbers of at least 0, one of them above 0")
    generator = torch.Generator().manual_seed(seed)
    optimizer, losses, training = torch.optim.Adam(vectors.parameters(), lr=learning_rate), [], vectors.training
    vectors.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        words = torch.multinomial(weights, batch_size, replacement=True, generator=generator).to(table.device)
        loss = mse_loss(vectors(words), table[words])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    vectors.train(training)
    return losses


def as_table(vectors: WordVectors | nn.Embedding | torch.Tensor) -> torch.Tensor:
    """The vectors of all words as a plain tensor without gradients."""
    if isinstance(vectors, WordVectors):
        return vectors.expanded().weight.detach()
    return (vectors.weight if isinstance(vectors, nn.Embedding) else vectors).detach().float()


def reconstruction(
    vectors: WordVectors | torch.Tensor, table: torch.Tensor, counts: torch.Tensor | None = None
) -> dict[str, float]:
    """How near the vectors come to a table (vocabulary, hidden).

    `cosine`: its mean over words; `cosine_by_count`: over the words of a text, given `counts` (vocabulary,); `relative_error`:
    squared error over the table's squared norm, 0 for the table itself and 1 for zeros.
    """
    made = as_table(vectors)
    cosine = cosine_similarity(made, table, dim=1)
    found = {"cosine": cosine.mean().item()}
    if counts is not None:
        found["cosine_by_count"] = ((cosine * counts).sum() / counts.sum()).item()
    return found | {"relative_error": ((made - table).square().sum() / table.square().sum()).item()}


def nearest_words(table: torch.Tensor, ids: torch.Tensor, k: int, hidden: Iterable[int] = ()) -> torch.Tensor:
    """The k ids whose vectors have the largest cosine with that of each id, itself and `hidden` ones left out; (ids, k)."""
    directions = normalize(table, dim=1)
    closeness = directions[ids] @ directions.T
    closeness[:, list(hidden)] = -torch.inf
    closeness[torch.arange(len(ids)), ids] = -torch.inf
    return closeness.topk(k, dim=1).indices


def neighbours(
    vectors: WordVectors | torch.Tensor, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], k: int = 4
) -> pandas.DataFrame:
    """A row per word: its k nearest neighbours by cosine, nearest first. Special and unused tokens are no neighbours.

    Raises ValueError for a word that is no piece of the vocabulary.
    """
    table = as_table(vectors)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(table))))
    number = {piece: place for place, piece in enumerate(pieces)}
    unknown = [word for word in words if word not in number]
    if unknown:
        raise ValueError(f"no pieces of the vocabulary: {', '.join(unknown)}")
    hidden = [place for place, piece in enumerate(pieces) if piece.startswith("[") and len(piece) > 1]
    found = nearest_words(table, torch.tensor([number[word] for word in words]), k, hidden)
    return pandas.DataFrame([[pieces[i] for i in row] for row in found.tolist()], index=list(words), columns=range(1, k + 1))


def neighbours_kept(vectors: WordVectors | torch.Tensor, table: torch.Tensor, ids: torch.Tensor, k: int = 10) -> float:
    """Share of the k nearest neighbours of each id in the table that still are among the k nearest."""
    before, after = (nearest_words(t, ids, k) for t in (table, as_table(vectors)))
    return (before[:, :, None] == after[:, None, :]).any(-1).float().mean().item()


# --- bytes ----------------------------------------------------------------------------------------------------------


def whole_numbers(codes: torch.Tensor, choices: int) -> Encoded:
    """Whole numbers below `choices` in as few bits each as that takes; above 8 bits as two digits or more of equal size.

    The digits are codebooks whose entries add up (`encodings.residual`), so 9 bits take 10.
    """
    bits = max(1, (choices - 1).bit_length())
    digits = math.ceil(bits / 8)
    size = math.ceil(bits / digits)  # bits of a digit
    units = 2 ** (size * torch.arange(digits))  # what a digit's 1 is worth
    number = codes.flatten().long() // units.unsqueeze(1) % 2**size
    books = torch.arange(2**size) * units.unsqueeze(1)
    return encodings.residual(number, books.unsqueeze(-1).int(), codes.shape, size)


def pack(vectors: nn.Module) -> dict[str, Encoded]:
    """How the codes of a part are stored, by the name of their buffer; nothing for a part without codes."""
    choices = vectors.choices() if isinstance(vectors, CodedVectors) else {}
    return {name: whole_numbers(getattr(vectors, name).cpu(), count) for name, count in choices.items()}


def packed(model: nn.Module) -> dict[str, Encoded]:
    """The same for the table of a model: what `Trial.finish` hands to the file."""
    return {f"{PLACE}.{name}": item for name, item in pack(model.get_submodule(PLACE)).items()}


def stored_bytes(vectors: nn.Module) -> int:
    """Bytes that a table takes in a file, codes packed, without the header."""
    given = pack(vectors)
    state = {name: tensor.detach().cpu() for name, tensor in vectors.state_dict().items()}
    return sum((given[name] if name in given else encodings.sparse(tensor)).nbytes for name, tensor in state.items())


def largest_size(make: Callable[[int], nn.Module], budget_bytes: int, most: int, least: int = 1) -> int:
    """The largest size from `least` to `most` for which `make(size)` is stored in `budget_bytes`, by bisection.

    Raises ValueError where not even `least` fits.
    """
    if stored_bytes(make(least)) > budget_bytes:
        raise ValueError(f"{budget_bytes} bytes do not hold the smallest table, which takes {stored_bytes(make(least))}")
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stored_bytes(make(middle)) <= budget_bytes else (low, middle - 1)
    return low


def sizes_for(
    budget_bytes: int, vocab_size: int, hidden_size: int, choices: int = 256, pieces: int = 8, nonzeros: int = 8
) -> dict[str, dict]:
    """The options of the largest part of each method that is stored in `budget_bytes`, by its id in the catalogue.

    Free are the blocks of S-12 and S-13 (with `choices` reference vectors each), the pool of S-14 (`pieces` to a word), the
    dense words of S-10 (`nonzeros` to the others), the shape of S-11's table, and S-15's width. Raises ValueError where a
    method does not fit.
    """
    V, d = vocab_size, hidden_size
    vectors = max(1, budget_bytes // (4 * d))  # of full width, if the budget held nothing else
    blocks = [count for count in range(1, d + 1) if d % count == 0]
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
    return vectors


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
