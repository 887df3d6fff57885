"""Word tables in factors with structure (survey 6.1 and 6.2): sparse codes, sums of codebook entries, frequency bands, digits.

All are E = B D with codes B that are cheap to store: a few numbers a row, ones in places that whole numbers name, blocks of
unequal width, the digits of a number. Each stands at `bert.embeddings.word_embeddings`.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import embedding, embedding_bag

from utils.parts.embeddings import CodedVectors, check_divides

# --- T-03 sparse coding ---------------------------------------------------------------------------------------------


class DictionaryVectors(CodedVectors):
    """A word's vector is a weighted sum of a few atoms of a dictionary, or with `binary` the sum of a few atoms.

    Faruqui et al. 2015 (arXiv 1506.02004), survey 6.1. Which atoms a word takes (`index`; in a binary code the number of atoms
    stands for none) and how much of each (`coefficients`, 16 bits) is fixed, and only the `dictionary` (atoms, width) learns.
    Raises ValueError unless 1 <= nonzeros <= atoms.
    """

    kind = "dictionary_vectors"
    heavy = True

    def __init__(self, num_embeddings: int, embedding_dim: int, atoms: int, nonzeros: int, binary: bool = False):
        super().__init__(num_embeddings, embedding_dim)
        if not 1 <= nonzeros <= atoms:
            raise ValueError(f"1 <= nonzeros <= atoms, got {nonzeros} nonzeros and {atoms} atoms")
        self.atoms, self.nonzeros, self.binary = atoms, nonzeros, binary
        self.dictionary = nn.Parameter(0.02 * torch.randn(atoms, embedding_dim))
        self.add_codes(index=(num_embeddings, nonzeros))
        start = None if binary else torch.full((num_embeddings, nonzeros), 1 / nonzeros, dtype=torch.float16)
        self.register_buffer("coefficients", start)

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """The atoms of each word times their coefficients, added up."""
        index = self.index[ids].long()
        shares = index < self.atoms if self.binary else self.coefficients[ids]
        chosen = self.dictionary[index.clamp(max=self.atoms - 1)]
        return torch.bmm(shares.to(chosen.dtype).unsqueeze(1), chosen).squeeze(1)

    def choices(self) -> dict[str, int]:
        """Atoms, and in a binary code none."""
        return {"index": self.atoms + self.binary}

    def options(self) -> dict:
        """Vocabulary, width, atoms, how many of them a word takes, and whether only ones stand before them."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "atoms": self.atoms,
                "nonzeros": self.nonzeros, "binary": self.binary}  # fmt: skip

    def word_macs(self) -> int:
        """A multiply-add per atom of a word and entry; a binary code could do with the additions."""
        return self.nonzeros * self.embedding_dim


# --- T-04 compositional codes ---------------------------------------------------------------------------------------


class CompositionalVectors(CodedVectors):
    """A word's vector is the sum of one vector from each codebook.

    Shu and Nakayama 2017 (arXiv 1711.01068), survey 6.1. `codes` (vocabulary, books) are fixed, and the `codebooks` (books,
    count, width) learn: E is the codebooks on top of each other, times a B with one 1 per book and row. Raises ValueError for
    no books and no entries.
    """

    kind = "compositional_vectors"

    def __init__(self, num_embeddings: int, embedding_dim: int, books: int, count: int):
        super().__init__(num_embeddings, embedding_dim)
        if min(books, count) < 1:
            raise ValueError(f"1 codebook or more with 1 vector or more, got {books} with {count}")
        self.books, self.count = books, count
        self.codebooks = nn.Parameter(0.02 * books**-0.5 * torch.randn(books, count, embedding_dim))
        self.add_codes(codes=(num_embeddings, books))

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """The sum over the books."""
        first = torch.arange(self.books, device=ids.device) * self.count
        return embedding_bag(self.codes[ids].long() + first, self.codebooks.flatten(0, 1), mode="sum")

    def choices(self) -> dict[str, int]:
        """Vectors of a codebook."""
        return {"codes": self.count}

    def options(self) -> dict:
        """Vocabulary, width, codebooks, and vectors in each."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "books": self.books,
                "count": self.count}  # fmt: skip

    def word_macs(self) -> int:
        """A sum of looked-up vectors multiplies nothing."""
        return 0


# --- T-06 frequency bands -------------------------------------------------------------------------------------------


class BandedVectors(CodedVectors):
    """Words fall into bands, and each band has a table of its own width and a map from there to the width of the model.

    Chen, Grangier and Auli 2015 (arXiv 1512.04906), survey 6.2, give frequent words more dimensions than rare ones in the
    output layer; the maps to one width, which an input needs, are those of Baevski and Auli 2018 (arXiv 1809.10853). With the
    tables as the blocks of a block-diagonal matrix and the maps on top of each other (`up`), E is the product of the two. A
    band of full width is looked up as it is. `row` (vocabulary,) says where in the stacked tables a word stands. Raises
    ValueError for sizes that do not add up to the vocabulary, and for widths that a band does not have.
    """

    kind = "banded_vectors"

    def __init__(self, num_embeddings: int, embedding_dim: int, sizes: Sequence[int], widths: Sequence[int]):
        super().__init__(num_embeddings, embedding_dim)
        check_bands(num_embeddings, embedding_dim, sizes, widths)
        self.sizes, self.widths = list(sizes), list(widths)
        pairs = zip(sizes, widths, strict=True)
        self.tables = nn.ParameterList([nn.Parameter(0.02 * torch.randn(size, width)) for size, width in pairs])
        narrow = sum(width for width in widths if width < embedding_dim)
        self.up = nn.Parameter(torch.randn(narrow, embedding_dim) / embedding_dim**0.5) if narrow else None
        self.add_codes(row=(num_embeddings,))
        self.row.copy_(torch.arange(num_embeddings))

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """The word's narrow vector in its band's place, zeros in the others', and one product with `up`.

        So every word takes the same work, whatever its band.
        """
        row, made, narrow = self.row[ids].long(), [], []
        for table in self.tables:
            inside = ((row >= 0) & (row < len(table))).unsqueeze(1)
            vector = embedding(row.clamp(0, len(table) - 1), table) * inside
            (narrow if table.shape[1] < self.embedding_dim else made).append(vector)
            row = row - len(table)
        return sum([*made, torch.cat(narrow, 1) @ self.up] if narrow else made)

    def choices(self) -> dict[str, int]:
        """Rows of the tables on top of each other."""
        return {"row": self.num_embeddings}

    def options(self) -> dict:
        """Vocabulary, width, and the sizes and widths of the bands."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "sizes": self.sizes,
                "widths": self.widths}  # fmt: skip

    def word_macs(self) -> int:
        """The map up from all narrow bands."""
        return 0 if self.up is None else self.up.numel()


def check_bands(num_embeddings: int, embedding_dim: int, sizes: Sequence[int], widths: Sequence[int]) -> None:
    """Raise ValueError for bands that do not make a table of this vocabulary and width."""
    if len(sizes) != len(widths) or not sizes or min(sizes) < 1 or sum(sizes) != num_embeddings:
        raise ValueError(f"bands need a width each, and sizes that add up to {num_embeddings}, got {sizes} with {widths}")
    for size, width in zip(sizes, widths, strict=True):
        if width != embedding_dim and not 1 <= width <= min(size, embedding_dim):
            raise ValueError(
                f"a band of {size} words has widths in 1..{min(size, embedding_dim)}, or {embedding_dim}, got {width}"
            )


# --- T-07 WEST ------------------------------------------------------------------------------------------------------


class DigitVectors(CodedVectors):
    """A word is the digits of its number in some base, and each digit looks up its own part of the vector.

    WEST, Variani, Suresh and Weintraub 2018 (arXiv 1811.08417), survey 6.2: E = B D, where a row of B has a 1 for each sub-unit
    of the word, and D is block-diagonal, a block (base, width / digits) per position. The digits, lowest first, are the
    sub-units. Which `number` (vocabulary,) of that many digits a word has is free, as long as no two have the same; at first it
    is the id. Raises ValueError for digits that do not divide the width, and where there are fewer numbers than words, or more
    than 31 bits can name.
    """

    kind = "digit_vectors"

    def __init__(self, num_embeddings: int, embedding_dim: int, digits: int, base: int):
        super().__init__(num_embeddings, embedding_dim)
        check_divides(digits, embedding_dim, "digits")
        if base < 1 or base**digits < num_embeddings:
            raise ValueError(f"{digits} digits of base {base} cannot tell {num_embeddings} words apart: take a larger base")
        if base**digits > 2**31:
            raise ValueError(f"numbers have 31 bits at most, {digits} digits of base {base} have more")
        self.digits, self.base = digits, base
        self.blocks = nn.Parameter(0.02 * torch.randn(digits, base, embedding_dim // digits))
        self.add_codes(number=(num_embeddings,))
        self.number.copy_(torch.arange(num_embeddings))

    def codes(self, ids: torch.Tensor) -> torch.Tensor:
        """The digits (n, digits) of the numbers of word ids (n,)."""
        powers = self.base ** torch.arange(self.digits, device=ids.device)
        return self.number[ids].long().unsqueeze(1) // powers % self.base

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """What each digit looks up, side by side."""
        first = torch.arange(self.digits, device=ids.device) * self.base
        return embedding(self.codes(ids) + first, self.blocks.flatten(0, 1)).flatten(1)

    def choices(self) -> dict[str, int]:
        """Numbers of the words, of so many digits."""
        return {"number": self.base**self.digits}

    def options(self) -> dict:
        """Vocabulary, width, digits and their base."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "digits": self.digits,
                "base": self.base}  # fmt: skip

    def word_macs(self) -> int:
        """A look-up multiplies nothing."""
        return 0
