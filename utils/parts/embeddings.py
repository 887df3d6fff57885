"""Tables of word vectors with fewer numbers than vocabulary times hidden size. Each stands at `bert.embeddings.word_embeddings`.

A `WordVectors` says how the vectors of some ids are composed (`compose`), and so what is stored, what a look-up costs
while the table stays composed, and what the table is once it is expanded for inference (`expanded`).
"""

import numpy as np
import torch
from torch import nn

from utils.parts.part import Part


class WordVectors(Part):
    """Base: composes vectors of width `embedding_dim` for `num_embeddings` ids.

    Subclasses give `compose`, `options` and `word_macs`. `heavy` ones compute much per word: in training each word of a batch
    is composed once, however often it occurs (in evaluation every occurrence is, so that multiply-adds do not depend on the
    text).
    """

    heavy = False

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors (n, embedding_dim) of word ids (n,)."""
        raise NotImplementedError

    def word_macs(self) -> int:
        """Multiply-adds to compose one vector."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Vectors (..., embedding_dim) of token ids (...)."""
        if self.training and self.heavy:
            words, place = input_ids.unique(return_inverse=True)
            return self.compose(words)[place]
        return self.compose(input_ids.flatten()).view(*input_ids.shape, self.embedding_dim)

    @property
    def weight(self) -> torch.Tensor:
        """The whole table (num_embeddings, embedding_dim), composed with gradients: what a tied output layer multiplies with."""
        return self.compose(torch.arange(self.num_embeddings, device=next(self.parameters()).device))

    @torch.no_grad()
    def expanded(self, chunk: int = 4096) -> nn.Embedding:
        """A plain table with the same vectors: the fastest look-up, at the memory of the table that was compressed."""
        ids = torch.arange(self.num_embeddings, device=next(self.parameters()).device)
        training, self.training = self.training, False
        table = torch.cat([self.compose(part).float() for part in ids.split(chunk)])
        self.training = training
        return nn.Embedding.from_pretrained(table, freeze=False)

    def macs(self, length: int) -> int:
        """Every token is composed."""
        return length * self.word_macs()


class CodedVectors(WordVectors):
    """Base of tables that look whole numbers up, stored in few bits each (`utils.sharing.tables.packed`)."""

    def choices(self) -> dict[str, int]:
        """Buffer name -> how many values its codes can have: they run from 0."""
        raise NotImplementedError

    def add_codes(self, **shapes: tuple[int, ...]) -> None:
        """Buffers for the codes of `choices`, 0 at first, in the smallest integer type. Raises ValueError for no choice."""
        for name, count in self.choices().items():
            if count < 1:
                raise ValueError(f"{name} must have 1 value or more, got {count}")
            kind = next(t for t in (torch.uint8, torch.int16, torch.int32) if count - 1 <= torch.iinfo(t).max)
            self.register_buffer(name, torch.zeros(shapes[name], dtype=kind))


def check_divides(count: int, width: int, what: str) -> None:
    """Raise ValueError where a vector of `width` cannot be cut into `count` equal pieces."""
    if count < 1 or width % count:
        raise ValueError(f"the {what} must divide the width {width}, got {count}")


# --- S-10 sparse word representations -------------------------------------------------------------------------------


class SparseVectors(CodedVectors):
    """Frequent words have vectors, the `bases`; every other word is a weighted sum of `nonzeros` of them.

    Chen et al. 2016 (arXiv 1610.03950), survey 5.2. `words` (bases,) lists the frequent ids in ascending order; which bases a
    rare word takes (`index`) and how much of each (`coefficients`, 16 bits) is fixed, and only the bases learn. Raises
    ValueError for bases outside 1 to the vocabulary, and more nonzeros than bases.
    """

    kind = "sparse_vectors"

    def __init__(self, num_embeddings: int, embedding_dim: int, bases: int, nonzeros: int):
        super().__init__(num_embeddings, embedding_dim)
        if not 1 <= nonzeros <= bases < num_embeddings:
            raise ValueError(f"1 <= nonzeros <= bases < {num_embeddings} words, got {nonzeros} nonzeros and {bases} bases")
        self.bases = nn.Parameter(0.02 * torch.randn(bases, embedding_dim))
        rare = num_embeddings - bases
        self.add_codes(words=(bases,), index=(rare, nonzeros))
        self.words.copy_(torch.arange(bases))
        self.register_buffer("coefficients", torch.full((rare, nonzeros), 1 / nonzeros, dtype=torch.float16))

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """The word's own base, or its sum. Both are made of every word, so that the work does not depend on the text."""
        words = self.words.long()
        before = torch.searchsorted(words, ids)  # bases below the id
        base = before.clamp(max=len(words) - 1)
        rare = (ids - before).clamp(max=len(self.index) - 1)
        weights = self.coefficients[rare].to(self.bases.dtype).unsqueeze(1)
        mixed = torch.bmm(weights, self.bases[self.index[rare].long()]).squeeze(1)
        return torch.where((words[base] == ids).unsqueeze(1), self.bases[base], mixed.to(self.bases.dtype))

    def choices(self) -> dict[str, int]:
        """Ids of the frequent words, and bases of the others."""
        return {"words": self.num_embeddings, "index": len(self.bases)}

    def options(self) -> dict:
        """Vocabulary, width, bases, and how many of them a rare word takes."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "bases": len(self.bases),
                "nonzeros": self.index.shape[1]}  # fmt: skip

    def word_macs(self) -> int:
        """A multiply-add per nonzero and entry."""
        return self.index.shape[1] * self.embedding_dim


# --- S-11 LightRNN --------------------------------------------------------------------------------------------------


class TwoComponentVectors(CodedVectors):
    """Words stand in the cells of a table, at most one in each; a word's vector is that of its row plus that of its column.

    LightRNN, Li et al. 2016 (arXiv 1610.09893), survey 5.2: a square table of V words needs 2 sqrt(V) vectors. There a
    recurrent network reads the two vectors one after the other; a BERT reads their sum. Raises ValueError for fewer cells than
    words.
    """

    kind = "two_component_vectors"

    def __init__(self, num_embeddings: int, embedding_dim: int, rows: int, columns: int):
        super().__init__(num_embeddings, embedding_dim)
        if min(rows, columns) < 1 or rows * columns < num_embeddings:
            raise ValueError(f"{num_embeddings} words need as many cells, got {rows} rows and {columns} columns")
        self.row_vectors = nn.Parameter(0.02 * torch.randn(rows, embedding_dim))
        self.column_vectors = nn.Parameter(0.02 * torch.randn(columns, embedding_dim))
        self.add_codes(row=(num_embeddings,), column=(num_embeddings,))
        place = torch.arange(num_embeddings)
        self.row.copy_(place // columns)
        self.column.copy_(place % columns)

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """Row vector plus column vector."""
        row = nn.functional.embedding(self.row[ids].long(), self.row_vectors)
        return row + nn.functional.embedding(self.column[ids].long(), self.column_vectors)

    def choices(self) -> dict[str, int]:
        """Rows and columns."""
        return {"row": len(self.row_vectors), "column": len(self.column_vectors)}

    def options(self) -> dict:
        """Vocabulary, width and the shape of the table."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "rows": len(self.row_vectors),
                "columns": len(self.column_vectors)}  # fmt: skip

    def word_macs(self) -> int:
        """A sum multiplies nothing."""
        return 0


# --- S-12 shared reference vectors, S-13 block-wise k-means ---------------------------------------------------------


class ReferenceVectors(CodedVectors):
    """A vector is cut into `blocks`; each block is one of the `count` reference vectors that all words share there.

    Suzuki and Nagata 2016, survey 5.2. `references` is (blocks, count, width / blocks), `codes` (vocabulary, blocks). Raises
    ValueError for blocks that do not divide the width.
    """

    kind = "reference_vectors"

    def __init__(self, num_embeddings: int, embedding_dim: int, blocks: int, count: int):
        super().__init__(num_embeddings, embedding_dim)
        check_divides(blocks, embedding_dim, "blocks")
        self.blocks, self.count = blocks, count
        self.references = nn.Parameter(0.02 * torch.randn(blocks, count, embedding_dim // blocks))
        self.add_codes(codes=(num_embeddings, blocks))

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """Each block's reference vector, side by side."""
        first = torch.arange(self.blocks, device=ids.device) * self.count
        return nn.functional.embedding(self.codes[ids].long() + first, self.references.flatten(0, 1)).flatten(1)

    def choices(self) -> dict[str, int]:
        """Reference vectors of a block."""
        return {"codes": self.count}

    def options(self) -> dict:
        """Vocabulary, width, blocks, and reference vectors of each."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "blocks": self.blocks,
                "count": self.count}  # fmt: skip

    def word_macs(self) -> int:
        """A look-up multiplies nothing."""
        return 0


# --- S-14 Slim embeddings -------------------------------------------------------------------------------------------


class SlimVectors(WordVectors):
    """A vector is `pieces` sub-vectors side by side, taken from a pool. Which ones is drawn at random once and never learned.

    Li et al. 2018 (arXiv 1711.09873), survey 5.2. Every sub-vector is used equally often, give or take one, and no two words
    are made of the same. Each place has its own part of the pool, which makes the output layer fast
    (`utils.sharing.words.slim_logits`), or with `common` all places draw from all of it. The draw can be repeated from its
    seed, so a file holds none of the codes. Raises ValueError for pieces that do not divide width and pool, and for a pool too
    small to tell the words apart.
    """

    kind = "slim_vectors"

    def __init__(self, num_embeddings: int, embedding_dim: int, pieces: int, pool: int, seed: int = 0, common: bool = False):
        super().__init__(num_embeddings, embedding_dim)
        check_divides(pieces, embedding_dim, "pieces")
        if pool < pieces or (pool % pieces and not common):
            raise ValueError(f"the pool must be a multiple of the {pieces} pieces, got {pool}")
        self.pieces, self.seed, self.common = pieces, seed, common
        self.pool = nn.Parameter(0.02 * torch.randn(pool, embedding_dim // pieces))
        self.register_buffer("codes", slim_codes(num_embeddings, pieces, pool, seed, common), persistent=False)

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """The word's sub-vectors, side by side."""
        return nn.functional.embedding(self.codes[ids].long(), self.pool).flatten(1)

    def options(self) -> dict:
        """Vocabulary, width, pieces, pool, and how the assignment is drawn."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "pieces": self.pieces,
                "pool": len(self.pool), "seed": self.seed, "common": self.common}  # fmt: skip

    def word_macs(self) -> int:
        """A look-up multiplies nothing."""
        return 0


MOST_CODES = 2**24  # they are drawn anew whenever a file is loaded


def slim_codes(words: int, pieces: int, pool: int, seed: int = 0, common: bool = False) -> torch.Tensor:
    """Sub-vectors of each word, (words, pieces), int32: a list in which all occur equally often, shuffled; rows differ.

    NumPy keeps the numbers of this generator the same in all versions (NEP 19), and a file relies on that. Where two words
    are alike, one swaps a code with a random word. Raises ValueError where there are fewer combinations than words, and for
    more codes than `MOST_CODES`.
    """
    share = pool if common else pool // pieces
    if words * pieces > MOST_CODES:
        raise ValueError(f"{words} words of {pieces} pieces are more than {MOST_CODES} codes")
    if share**pieces < words:
        raise ValueError(f"{share} sub-vectors in {pieces} places cannot tell {words} words apart: take a larger pool")
    draw = np.random.RandomState(seed)
    if common:
        codes = draw.permutation(np.arange(words * pieces) % pool).reshape(words, pieces)
    else:
        codes = np.stack([draw.permutation(np.arange(words) % share) + place * share for place in range(pieces)], axis=1)
    # Equal rows have equal keys, and different rows hardly ever: powers of an odd number may wrap.
    units = np.cumprod(np.full(pieces, 2 * pool + 1, dtype=np.uint64))
    for _ in range(min(1000, 1 + 2**25 // words)):
        _, first = np.unique(codes.astype(np.uint64) @ units, return_index=True)
        if len(first) == words:
            return torch.from_numpy(codes.astype(np.int32))
        for word in np.setdiff1d(np.arange(words), first):
            place, other = draw.randint(pieces, dtype=np.int64), draw.randint(words, dtype=np.int64)
            codes[[word, other], place] = codes[[other, word], place]
    raise ValueError(f"no assignment was found that tells {words} words apart: take a larger pool than {pool}")


# --- S-15 ALBERT's factorised table ---------------------------------------------------------------------------------


class FactorizedVectors(WordVectors):
    """A narrow table, and one linear map to the width that the model wants: V x size and size x width.

    ALBERT, Lan et al. 2019 (arXiv 1909.11942), survey 5.3. There position and segment vectors are narrow too, and the map comes
    after the LayerNorm; here it serves the word table alone, so that a trained BERT keeps the rest. Raises ValueError for a
    size outside 1 to the width.
    """

    kind = "factorized_vectors"

    def __init__(self, num_embeddings: int, embedding_dim: int, size: int):
        super().__init__(num_embeddings, embedding_dim)
        if not 1 <= size <= embedding_dim:
            raise ValueError(f"the size must lie in 1..{embedding_dim}, got {size}")
        self.table = nn.Parameter(0.02 * torch.randn(num_embeddings, size))
        self.up = nn.Linear(size, embedding_dim)

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """The narrow vector, mapped up."""
        return self.up(nn.functional.embedding(ids, self.table))

    def options(self) -> dict:
        """Vocabulary, width, and the narrow table's width."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "size": self.table.shape[1]}

    def word_macs(self) -> int:
        """The linear map."""
        return self.up.weight.numel()


# --- a trimmed vocabulary -------------------------------------------------------------------------------------------


class TrimmedVectors(WordVectors):
    """Vectors of the words that were kept; any other word has the mean of the kept pieces that spell it.

    `spelling` (vocabulary, pieces) lists them, padded with 0, the new id of [PAD]. Raises ValueError for more kept words than
    there are.
    """

    kind = "trimmed_vectors"

    def __init__(self, num_embeddings: int, embedding_dim: int, kept: int, pieces: int):
        super().__init__(num_embeddings, embedding_dim)
        if not 1 <= kept <= num_embeddings or pieces < 1:
            raise ValueError(f"1 to {num_embeddings} words can be kept, with 1 piece or more, got {kept} and {pieces}")
        self.vectors = nn.Parameter(0.02 * torch.randn(kept, embedding_dim))
        self.register_buffer("spelling", torch.zeros(num_embeddings, pieces, dtype=torch.int16))

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """The mean over the pieces of each word."""
        pieces = self.spelling[ids].long()
        real = pieces != 0
        real[:, 0] = True  # the spelling of [PAD] itself is 0
        weights = (real / real.sum(1, keepdim=True)).to(self.vectors.dtype)
        return nn.functional.embedding_bag(pieces, self.vectors, mode="sum", per_sample_weights=weights)

    def options(self) -> dict:
        """Vocabulary, width, kept words, and pieces of the longest spelling."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "kept": len(self.vectors),
                "pieces": self.spelling.shape[1]}  # fmt: skip

    def word_macs(self) -> int:
        """A mean of looked-up vectors multiplies no matrix."""
        return 0
