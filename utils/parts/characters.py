"""Word vectors composed from characters: a table that stores how words are spelled and one network that reads spellings.

A spelling is a row of symbols: `BEGIN` (or `CONTINUE`, for a piece that continues a word), characters, `END`, then `PAD`. The part
knows its alphabet, so that a word outside the vocabulary has a vector too; pieces that cannot be spelled ([CLS]) have a row of
their own. Words are read without padding, so that what a look-up costs depends on its words: `macs` is the most it can take.
"""

from typing import TypedDict

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from utils.parts.embeddings import WordVectors

PAD, BEGIN, CONTINUE, END, UNKNOWN = range(5)  # symbols that are no characters; the alphabet follows
FIRST = 5
SHORT = torch.iinfo(torch.uint8).max  # the highest symbol that a byte holds


class Spelling(TypedDict):
    """How words are spelled: which characters there are, the most symbols of a spelling, and the ids with rows of their own."""

    alphabet: str
    longest: int
    own: list[int]


class CharacterVectors(WordVectors):
    """Base: `read` turns spellings into features, of which a linear layer makes vectors; each word may have a small correction.

    `spelling` names the `alphabet` (a string), the `longest` spelling in symbols and the ids of pieces with rows of their `own`;
    the buffer `spelling` (vocabulary, longest) is to be filled in, one symbol a byte (two bytes for more than 251 characters).
    With a correction, a word's vector gains M c_w, where c_w has `correction_size` numbers. Raises ValueError for a repeated
    character, for a spelling of less than 3 symbols, for ids outside the vocabulary and for a negative correction.
    """

    heavy, adaptive = True, True

    def __init__(self, num_embeddings: int, embedding_dim: int, spelling: Spelling, features: int):
        super().__init__(num_embeddings, embedding_dim)
        check_spelling(num_embeddings, **spelling)
        self.given, self.correction_size = dict(spelling), 0
        self.symbols = FIRST + len(spelling["alphabet"])
        kind = torch.uint8 if self.symbols - 1 <= SHORT else torch.int16
        self.register_buffer("spelling", torch.zeros(num_embeddings, spelling["longest"], dtype=kind))
        self.register_buffer("own", torch.tensor(sorted(spelling["own"]), dtype=torch.long), persistent=False)
        self.rows = nn.Parameter(torch.zeros(len(spelling["own"]), embedding_dim))
        self.projection = nn.Linear(features, embedding_dim)

    def add_correction(self, size: int) -> None:
        """Give every word `size` numbers of its own, 0 at first. Called last, so that all else starts as it would without."""
        if size < 0:
            raise ValueError(f"a correction has 0 numbers (there is none) or more, got {size}")
        self.correction_size = size
        if size:
            self.correction = nn.Embedding(self.num_embeddings, size)
            self.up = nn.Linear(size, self.embedding_dim, bias=False)
            nn.init.zeros_(self.correction.weight)

    def read(self, symbols: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Features (words, features) of spellings (words, longest), shorter words first; `lengths` (words,), 1 or more."""
        raise NotImplementedError

    def reading_macs(self) -> tuple[int, int]:
        """Multiply-adds of `read`: per symbol, and per word."""
        raise NotImplementedError

    def features(self, symbols: torch.Tensor) -> torch.Tensor:
        """Features (words, features) of spellings (words, longest) in any order, none of them empty."""
        lengths = (symbols != PAD).sum(1)
        order = lengths.argsort(stable=True)  # words of one length side by side need no padding
        return self.read(symbols[order].long(), lengths[order])[order.argsort()]

    def of_spellings(self, symbols: torch.Tensor) -> torch.Tensor:
        """Vectors (words, embedding_dim) of spellings (words, longest), of words in the vocabulary or not."""
        return self.projection(self.features(symbols)) if len(symbols) else self.rows.new_empty(0, self.embedding_dim)

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors (n, embedding_dim) of word ids (n,)."""
        symbols = self.spelling[ids]
        spelled = symbols[:, 0] != PAD
        rows = self.rows[torch.searchsorted(self.own, ids[~spelled])]
        order = torch.cat([spelled.nonzero().flatten(), (~spelled).nonzero().flatten()])
        vectors = torch.cat([self.of_spellings(symbols[spelled]), rows])[order.argsort()]
        return vectors + self.corrections(ids) if self.correction_size else vectors

    def corrections(self, ids: torch.Tensor) -> torch.Tensor:
        """M c_w of word ids (n,), (n, embedding_dim). Only for a part with a `correction_size`."""
        return self.up(self.correction(ids))

    def macs_of(self, ids: torch.Tensor) -> int:
        """Multiply-adds to compose the vectors of these word ids (any shape)."""
        lengths = (self.spelling[ids.flatten()] != PAD).sum(1)
        per_symbol, per_word = self.reading_macs()
        words = int((lengths > 0).sum())
        correction = len(lengths) * self.correction_size * self.embedding_dim
        return int(lengths.sum()) * per_symbol + words * (per_word + self.projection.weight.numel()) + correction

    def word_macs(self) -> int:
        """Multiply-adds for one word of the longest spelling."""
        per_symbol, per_word = self.reading_macs()
        correction = self.correction_size * self.embedding_dim
        return self.spelling.shape[1] * per_symbol + per_word + self.projection.weight.numel() + correction

    def options(self) -> dict:
        """Sizes, and what the symbols of a spelling mean."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "spelling": dict(self.given),
                "correction_size": self.correction_size}  # fmt: skip


def check_spelling(num_embeddings: int, alphabet: str, longest: int, own: list[int]) -> None:
    """Raise ValueError where characters repeat, none fits into a spelling, or an id with a row of its own lies elsewhere."""
    if len(set(alphabet)) != len(alphabet):
        raise ValueError("the alphabet must name every character once")
    if longest < 3:
        raise ValueError(f"a spelling needs 3 symbols or more (its begin, a character, its end), got longest={longest}")
    if len(set(own)) != len(own) or not all(0 <= word < num_embeddings for word in own):
        raise ValueError(f"pieces with rows of their own must be different ids below {num_embeddings}, got {own}")


class CharacterBiLSTM(CharacterVectors):
    """C2W: the last states of an LSTM that reads a word forwards and of one that reads it backwards, and a linear layer.

    Ling et al. 2015 (arXiv 1508.02096), survey 5.1: D_f s_f + D_b s_b + b, with characters of 50 and states of 150 numbers.
    """

    kind = "character_bilstm"

    def __init__(self, num_embeddings: int, embedding_dim: int, spelling: Spelling, character_size: int = 50, hidden_size: int = 150,
                 correction_size: int = 0):  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, spelling, 2 * hidden_size)
        self.characters = nn.Embedding(self.symbols, character_size, padding_idx=PAD)
        self.lstm = nn.LSTM(character_size, hidden_size, batch_first=True, bidirectional=True)
        self.add_correction(correction_size)

    def read(self, symbols: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The last states of both directions, each at its own end of the word, (words, 2 * hidden)."""
        x = self.characters(symbols[:, : int(lengths[-1])])
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)  # (2, words, hidden)
        return last.transpose(0, 1).flatten(1)

    def reading_macs(self) -> tuple[int, int]:
        """Four gates, two directions, input and state, per symbol."""
        return 2 * 4 * self.lstm.hidden_size * (self.lstm.input_size + self.lstm.hidden_size), 0

    def options(self) -> dict:
        """Sizes, and what the symbols of a spelling mean."""
        return super().options() | {"character_size": self.lstm.input_size, "hidden_size": self.lstm.hidden_size}


class Highway(nn.Module):
    """y = t * relu(W_h x + b_h) + (1 - t) * x with the gate t = sigmoid(W_t x + b_t), which begins nearly closed (b_t = -2).

    Srivastava et al. 2015 (arXiv 1505.00387). Both matrices lie in one layer.
    """

    def __init__(self, size: int):
        super().__init__()
        self.both = nn.Linear(size, 2 * size)
        nn.init.constant_(self.both.bias[size:], -2.0)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """t, the share of each unit that is transformed; shape stays."""
        return self.both(x).chunk(2, -1)[1].sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape stays."""
        transformed, gate = self.both(x).chunk(2, -1)
        gate = gate.sigmoid()
        return gate * transformed.relu() + (1 - gate) * x


def windows(symbols: torch.Tensor, widest: int) -> torch.Tensor:
    """The `widest` symbols from every symbol of every word on, word after word, `PAD` beyond the end; (symbols, widest)."""
    words, starts = (symbols != PAD).nonzero(as_tuple=True)
    reach = starts[:, None] + torch.arange(widest, device=symbols.device)
    return nn.functional.pad(symbols, (0, widest - 1), value=PAD)[words[:, None], reach]


def highest(answers: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Maximum over each word of answers (symbols, filters), word after word, shorter words first; (words, filters)."""
    sizes, counts = (some.tolist() for some in lengths.unique_consecutive(return_counts=True))
    blocks = answers.split([size * count for size, count in zip(sizes, counts, strict=True)])
    return torch.cat([block.unflatten(0, (-1, size)).amax(1) for block, size in zip(blocks, sizes, strict=True)])


class CharacterCNN(CharacterVectors):
    """Filters over windows of characters, their maximum over the word, tanh, highway layers, and a linear layer.

    Kim et al. 2016 (arXiv 1508.06615), survey 5.1. The default is their small model; the large one has widths 1 to 7 with
    min(200, 50 * width) filters and two highway layers. The linear layer is that of Jozefowicz et al. 2016 (arXiv 1602.02410).
    Windows begin at every symbol of a word and see zeros beyond its end; in the authors' code, which pads words to one length,
    they begin in the padding too. Raises ValueError unless each width has its number of filters.
    """

    kind = "character_cnn"

    def __init__(self, num_embeddings: int, embedding_dim: int, spelling: Spelling, character_size: int = 15,
                 widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6), filters: tuple[int, ...] = (25, 50, 75, 100, 125, 150),
                 highways: int = 1, correction_size: int = 0):  # fmt: skip
        if len(widths) != len(filters) or min((*widths, *filters), default=0) < 1:
            raise ValueError(f"each width needs its number of filters, 1 or more, got widths {widths} and filters {filters}")
        super().__init__(num_embeddings, embedding_dim, spelling, sum(filters))
        self.widths = tuple(widths)
        self.characters = nn.Embedding(self.symbols, character_size, padding_idx=PAD)
        self.filters = nn.ModuleList(nn.Linear(w * character_size, f) for w, f in zip(widths, filters, strict=True))
        self.highways = nn.ModuleList(Highway(sum(filters)) for _ in range(highways))
        self.add_correction(correction_size)

    def read(self, symbols: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The highest answer of each filter in a word, through tanh and the highway layers; (words, filters)."""
        x = self.characters(windows(symbols, max(self.widths))).flatten(1)
        answers = torch.cat([bank(x[:, : bank.in_features]) for bank in self.filters], 1)  # narrow: the beginning
        x = highest(answers, lengths).tanh()  # tanh rises: the maximum may be taken before it
        for highway in self.highways:
            x = highway(x)
        return x

    def reading_macs(self) -> tuple[int, int]:
        """Every filter at every symbol; the highway layers once."""
        return sum(bank.weight.numel() for bank in self.filters), sum(highway.both.weight.numel() for highway in self.highways)

    def options(self) -> dict:
        """Sizes, and what the symbols of a spelling mean."""
        return super().options() | {"character_size": self.characters.embedding_dim, "widths": list(self.widths),
                                    "filters": [bank.out_features for bank in self.filters], "highways": len(self.highways)}  # fmt: skip
