"""Weights in tensor formats (survey 6.3): tensor trains, block terms, and CP and Tucker across layers.

A width is written as a product of factors, 384 = 6 * 8 * 8, and a matrix becomes a tensor whose j-th side is the j-th factor of
its outputs times the j-th factor of its inputs. A `TensorLinear` knows several orders in which the pieces of its format can be
multiplied with an input, counts what each of them costs, and takes the cheapest for the tokens at hand.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from utils.parts.embeddings import CodedVectors, WordVectors
from utils.parts.shared import ComposedLinear

AUTO, REBUILD = "auto", "rebuild"
Sizes = Sequence[int]

# --- widths as products ---------------------------------------------------------------------------------------------


def factorisations(size: int, count: int, least: int = 2) -> Iterator[tuple[int, ...]]:
    """All ways to write a size as `count` whole factors of `least` or more, each in ascending order."""
    if count == 1 and size >= least:
        yield (size,)
    for first in range(least, size + 1) if count > 1 else ():
        if first**count > size:
            return
        if size % first == 0:
            yield from ((first, *rest) for rest in factorisations(size // first, count - 1, first))


def balanced_factors(size: int, count: int) -> tuple[int, ...]:
    """`count` factors whose product is the size, ascending, as equal as they can be: those with the smallest sum.

    Raises ValueError for a size that is no product of so many factors above 1.
    """
    found = list(factorisations(size, count)) if count > 0 else []
    if not found:
        raise ValueError(f"{size} is no product of {count} factors above 1: take fewer of them, or name the factors")
    return min(found, key=sum)


def padded_factors(size: int, count: int) -> tuple[int, ...]:
    """`count` factors, ascending, whose product is the size or more: those with the smallest sum, which differ by 1 at most.

    30522 is 2 * 3 * 5087, and factors that different make large cores; 31 * 31 * 32 = 30752 leaves 230 rows unused. Khrulkov et
    al. 2019 pad, too; their code rounds up to a multiple of 1, 10, 100, ... and takes the one with the most equal factors.
    Raises ValueError below 1.
    """
    if size < 1 or count < 1:
        raise ValueError(f"a size and a number of factors of 1 or more, got {size} and {count}")
    total = count
    while True:
        small, larger = divmod(total, count)  # `total` shared out as equally as possible has the largest product
        factors = (small,) * (count - larger) + (small + 1,) * larger
        if math.prod(factors) >= size:
            return factors
        total += 1


def checked_factors(factors: Sizes | None, size: int, count: int) -> list[int]:
    """Those factors, or balanced ones. Raises ValueError unless there are `count` of them, 2 or more, with that product."""
    if count < 2:
        raise ValueError(f"a tensor format needs 2 factors of a width or more, got {count}")
    found = list(balanced_factors(size, count) if factors is None else factors)
    if len(found) != count or min(found) < 1 or math.prod(found) != size:
        raise ValueError(f"{count} factors with the product {size} are needed, got {found}")
    return found


def tensor_sides(rows: Sizes, columns: Sizes) -> list[int]:
    """The sides of the tensor that a matrix becomes: the j-th factor of its rows times the j-th factor of its columns."""
    return [n * m for n, m in zip(rows, columns, strict=True)]


def full_ranks(sides: Sizes) -> list[int]:
    """The largest rank between each two neighbouring cores of a train: the smaller product of the sides left and right."""
    return [min(math.prod(sides[:cut]), math.prod(sides[cut:])) for cut in range(1, len(sides))]


def checked_ranks(ranks: Sizes, sides: Sizes) -> list[int]:
    """The ranks of a train. Raises ValueError for one that is 0, above the full one, or above what its neighbours let through:
    a neighbour's rank times the side between the two.
    """
    bonds = [1, *ranks, 1]
    most = [min(bonds[j - 1] * sides[j - 1], sides[j] * bonds[j + 1]) for j in range(1, len(sides))]
    if not all(1 <= rank <= limit for rank, limit in zip(ranks, most, strict=True)):
        raise ValueError(f"a tensor with sides {list(sides)} has ranks in 1..{full_ranks(sides)}, each at most a neighbour's "
                         f"times the side between them, got {list(ranks)}")  # fmt: skip
    return list(ranks)


# --- products in a good order ---------------------------------------------------------------------------------------


class TensorLinear(ComposedLinear):
    """Base: a matrix in a tensor format. Subclasses give `weight`, `orders` and `product`, and end their constructor by
    `settle`.

    `order` is one of `orders()`, or "auto": the one with the fewest multiply-adds for the tokens of a pass. "rebuild" composes
    the matrix once a pass and multiplies with it like a dense layer: the memory of one matrix, while the product lasts.
    """

    def orders(self) -> dict[str, tuple[int, int]]:
        """Order -> multiply-adds once a pass, and per token."""
        raise NotImplementedError

    def product(self, x: torch.Tensor, order: str) -> torch.Tensor:
        """(tokens, in) to (tokens, out) without the matrix, in an order other than "rebuild"."""
        raise NotImplementedError

    def settle(self, order: str) -> None:
        """Count the orders. Raises ValueError for one that there is not."""
        self.costs = self.orders()
        if order not in (AUTO, *self.costs):
            raise ValueError(f"the order must be one of {', '.join((AUTO, *self.costs))}, got {order!r}")
        self.order = order

    def order_for(self, tokens: int) -> str:
        """The order of a pass over so many tokens."""
        if self.order != AUTO:
            return self.order
        return min(self.costs, key=lambda order: self.costs[order][0] + tokens * self.costs[order][1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        order = self.order_for(x.shape[:-1].numel())
        if order == REBUILD:
            return super().forward(x)
        y = self.product(x.reshape(-1, self.in_features), order).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def options(self) -> dict:
        """Widths, order, and whether there is a bias; subclasses add what is theirs."""
        return super().options() | {"order": self.order}

    def macs(self, length: int) -> int:
        """Of the order that a pass over one sequence takes; for several at once there may be a cheaper one."""
        once, each = self.costs[self.order_for(length)]
        return once + length * each


# --- T-08 tensor-train matrices -------------------------------------------------------------------------------------


def random_cores(ranks: Sizes, rows: Sizes, columns: Sizes, deviation: float) -> nn.ParameterList:
    """Cores (r, rows_j, columns_j, s) of independent normal numbers, such that the matrix's entries have that deviation.

    An entry is a sum of prod(ranks) products of one number from each core, so its variance is prod(ranks) times theirs
    (Khrulkov et al. 2019).
    """
    bonds, cores = [1, *ranks, 1], len(rows)
    each = (deviation / math.prod(ranks) ** 0.5) ** (1 / cores)
    shapes = [(bonds[j], rows[j], columns[j], bonds[j + 1]) for j in range(cores)]
    return nn.ParameterList(nn.Parameter(each * torch.randn(shape)) for shape in shapes)


def core_matrix(made: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """Multiply the next core (r, n, m, s) into the matrix of the cores before it (rows, columns, r): (rows n, columns m, s)."""
    rows, columns, _ = made.shape
    r, n, m, s = core.shape
    product = (made.reshape(-1, r) @ core.reshape(r, -1)).view(rows, columns, n, m, s)
    return product.transpose(1, 2).reshape(rows * n, columns * m, s)


def train_matrix(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """The matrix (prod(rows), prod(columns)) of a tensor train, from its cores (r, rows_j, columns_j, s), first to last."""
    return functools.reduce(core_matrix, cores[1:], cores[0][0]).squeeze(-1)


def core_product(state: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """Multiply the next core (r, n, m, s) into a state (m * q, rows, r): (q, rows * n, s), by one large matrix product.

    q is what is left of the inputs, a row is a token and the outputs found so far. One copy brings the input's factor m beside
    the rank; then nothing but the state's shape has to change from core to core, and outputs come in their own order.
    """
    r, n, m, s = core.shape
    split = state.unflatten(0, (m, -1)).movedim(0, -1)  # (q, rows, r, m)
    made = split.reshape(-1, r * m) @ core.transpose(1, 2).reshape(r * m, n * s)
    return made.view(split.shape[0], split.shape[1] * n, s)


def product_from_left(x: torch.Tensor, cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """(tokens, in) times a tensor train, first core first: (tokens, out)."""
    state = x.t().unsqueeze(-1)
    for core in cores:
        state = core_product(state, core)
    return state.view(x.shape[0], -1)


def product_from_right(x: torch.Tensor, cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """(tokens, in) times a tensor train, last core first: (tokens, out). The mirror image: states are (s, rows, q * m)."""
    state = x.unsqueeze(0)
    for core in reversed(cores):
        r, n, m, s = core.shape
        split = state.unflatten(-1, (-1, m)).movedim(-1, 1)  # (s, m, rows, q)
        made = core.transpose(2, 3).reshape(r * n, s * m) @ split.reshape(s * m, -1)
        state = made.view(r, n * split.shape[2], split.shape[3])
    return state.view(-1, x.shape[0]).t()


def train_orders(ranks: Sizes, rows: Sizes, columns: Sizes) -> dict[str, tuple[int, int]]:
    """Multiply-adds of a tensor train, once a pass and per token.

    Core j costs r_(j-1) n_j m_j r_j for each output factor that is already there and each input factor that still is: from the
    left n_1..n_(j-1) and m_(j+1)..m_d, from the right m_1..m_(j-1) and n_(j+1)..n_d.
    """
    bonds, cores = [1, *ranks, 1], range(len(rows))
    sizes = [bonds[j] * rows[j] * columns[j] * bonds[j + 1] for j in cores]
    left = sum(math.prod(rows[:j]) * sizes[j] * math.prod(columns[j + 1 :]) for j in cores)
    right = sum(math.prod(columns[:j]) * sizes[j] * math.prod(rows[j + 1 :]) for j in cores)
    rebuild = sum(math.prod(rows[:j]) * math.prod(columns[:j]) * sizes[j] for j in cores[1:])
    return {"left": (0, left), "right": (0, right), REBUILD: (rebuild, math.prod(rows) * math.prod(columns))}


class TensorTrainLinear(TensorLinear):
    """W[(i_1..i_d), (j_1..j_d)] = G_1[i_1, j_1] G_2[i_2, j_2] .. G_d[i_d, j_d], a product of small matrices for every entry.

    Tjandra, Sakti and Nakamura 2017 (arXiv 1705.08052), survey 6.3; tensor trains are Oseledets 2011. Core j is (r_(j-1),
    out_factors[j], in_factors[j], r_j). Factors that are not given are balanced. Raises ValueError for factors that do not make
    the widths, for ranks that are 0 or above the full ones, and for an order that there is not.
    """

    kind = "tensor_train_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sizes,
        bias: bool = True,
        out_factors: Sizes | None = None,
        in_factors: Sizes | None = None,
        order: str = AUTO,
    ):
        super().__init__(in_features, out_features, bias)
        self.out_factors = checked_factors(out_factors, out_features, len(ranks) + 1)
        self.in_factors = checked_factors(in_factors, in_features, len(ranks) + 1)
        self.ranks = checked_ranks(ranks, tensor_sides(self.out_factors, self.in_factors))
        self.cores = random_cores(self.ranks, self.out_factors, self.in_factors, in_features**-0.5)
        self.settle(order)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out, in)."""
        return train_matrix(list(self.cores))

    def orders(self) -> dict[str, tuple[int, int]]:
        """From the left, from the right, or the matrix first."""
        return train_orders(self.ranks, self.out_factors, self.in_factors)

    def product(self, x: torch.Tensor, order: str) -> torch.Tensor:
        """(tokens, in) to (tokens, out)."""
        return (product_from_left if order == "left" else product_from_right)(x, list(self.cores))

    def options(self) -> dict:
        """Widths and their factors, ranks, order, and whether there is a bias."""
        return super().options() | {"ranks": self.ranks, "out_factors": self.out_factors, "in_factors": self.in_factors}


# --- T-09 TT-embedding ----------------------------------------------------------------------------------------------


def sliced_product(state: torch.Tensor, core: torch.Tensor, digit: torch.Tensor) -> torch.Tensor:
    """Multiply state (n, p, r) with the slice of core (r, V_j, m, s) that each word's digit (n,) picks: (n, p * m, s).

    All words of one slice at once: a slice is read once, where a copy of it for every word would be most of the time.
    """
    by_slice = digit.argsort(stable=True)
    groups = state[by_slice].split(digit.bincount(minlength=core.shape[1]).tolist())
    made = [group.flatten(0, 1) @ one.flatten(1) for group, one in zip(groups, core.unbind(1), strict=True)]
    found = torch.cat(made).view(len(state), -1, core.shape[-1])
    return found[by_slice.argsort()]


class TensorTrainVectors(WordVectors):
    """Word vectors as rows of a tensor-train matrix: the vector of word (i_1..i_d) is G_1[i_1] G_2[i_2] .. G_d[i_d].

    TT-embedding, Khrulkov et al. 2019 (arXiv 1901.10787), survey 6.3. i_1..i_d are the digits of the word's id, the first one
    counts most; core j is (r_(j-1), word_factors[j], vector_factors[j], r_j). Factors that are not given are balanced, the
    vocabulary padded. A look-up multiplies slices, smallest factors first, and never makes the table. Raises ValueError for
    factors that hold fewer words or do not make the width, and for ranks that are 0 or above the full ones.
    """

    kind = "tensor_train_vectors"
    heavy = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ranks: Sizes,
        word_factors: Sizes | None = None,
        vector_factors: Sizes | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim)
        cores = len(ranks) + 1
        self.vector_factors = checked_factors(vector_factors, embedding_dim, cores)
        self.word_factors = list(word_factors or padded_factors(num_embeddings, cores))
        if len(self.word_factors) != cores or min(self.word_factors) < 1 or math.prod(self.word_factors) < num_embeddings:
            raise ValueError(f"{cores} factors with a product of {num_embeddings} or more, got {self.word_factors}")
        self.ranks = checked_ranks(ranks, tensor_sides(self.word_factors, self.vector_factors))
        self.cores = random_cores(self.ranks, self.word_factors, self.vector_factors, 0.02)

    @property
    def weight(self) -> torch.Tensor:
        """The whole table without its padding: words whose digits begin alike share these products, as in no look-up."""
        return train_matrix(list(self.cores))[: self.num_embeddings]

    def digits(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Digit j of ids (n,), in 0..word_factors[j] - 1: (n,) each."""
        units = [math.prod(self.word_factors[j + 1 :]) for j in range(len(self.word_factors))]
        return [ids // unit % factor for unit, factor in zip(units, self.word_factors, strict=True)]

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """A product of slices for each word."""
        first, *others = self.digits(ids)
        state = self.cores[0][0, first]  # (n, m_1, r_1)
        for core, digit in zip(list(self.cores)[1:], others, strict=True):
            state = sliced_product(state, core, digit)
        return state.squeeze(-1)

    def options(self) -> dict:
        """Vocabulary, width, their factors, and ranks."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "ranks": self.ranks,
                "word_factors": self.word_factors, "vector_factors": self.vector_factors}  # fmt: skip

    def word_macs(self) -> int:
        """Slice j times what the slices before it made: m_1..m_(j-1) r_(j-1) m_j r_j."""
        bonds, m = [1, *self.ranks, 1], self.vector_factors
        return sum(math.prod(m[: j + 1]) * bonds[j] * bonds[j + 1] for j in range(1, len(m)))


class OrderedTrainVectors(TensorTrainVectors, CodedVectors):
    """The same for words in an order of their own: the digits are those of a word's `place` (vocabulary,) in it.

    Which words share a slice is part of the format, and the order is stored with it, 16 bits a word in a vocabulary of up to
    65,536. At first it is that of the ids.
    """

    kind = "ordered_train_vectors"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ranks: Sizes,
        word_factors: Sizes | None = None,
        vector_factors: Sizes | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, ranks, word_factors, vector_factors)
        self.add_codes(place=(num_embeddings,))
        self.place.copy_(torch.arange(num_embeddings))

    @property
    def weight(self) -> torch.Tensor:
        """The whole table, in the order of the ids."""
        return super().weight[self.place.long()]

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows at the words' places."""
        return super().compose(self.place[ids].long())

    def choices(self) -> dict[str, int]:
        """Places."""
        return {"place": self.num_embeddings}


# --- T-10 block terms -----------------------------------------------------------------------------------------------


def block_product(state: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the next factor (N, n, m, R) of N terms into a state (m * q, rows, N * R * s): (q, rows * n, N * s).

    `core_product` with a matrix product for each term; s are the ranks whose factors are still to come.
    """
    N, n, m, R = factor.shape
    split = state.unflatten(0, (m, -1)).unflatten(-1, (N, R, -1))  # (m, q, rows, N, R, s)
    _, q, rows, _, _, s = split.shape
    inputs = split.permute(3, 1, 2, 5, 4, 0).reshape(N, q * rows * s, R * m)
    made = inputs @ factor.permute(0, 3, 2, 1).reshape(N, R * m, n)
    return made.view(N, q, rows, s, n).permute(1, 2, 4, 0, 3).reshape(q, rows * n, N * s)


def block_matrix(made: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the next factor (N, n, m, R) into N matrices (rows, columns, N * R * s): (rows * n, columns * m, N * s)."""
    N, n, m, R = factor.shape
    split = made.unflatten(-1, (N, R, -1))
    rows, columns, _, _, s = split.shape
    product = split.permute(2, 0, 1, 4, 3).reshape(N, -1, R) @ factor.permute(0, 3, 1, 2).reshape(N, R, n * m)
    product = product.view(N, rows, columns, s, n, m).permute(1, 4, 2, 5, 0, 3)
    return product.reshape(rows * n, columns * m, N * s)


def block_term_orders(terms: int, rank: int, rows: Sizes, columns: Sizes) -> dict[str, tuple[int, int]]:
    """Multiply-adds of a sum of Tucker terms, once a pass and per token.

    The cores go into the first factors, once. Then factor j costs terms * rank^(d-j+1) n_j m_j for each output factor that is
    already there and each input factor that still is; only the first one costs rank^(d-1). Cores that come last leave a rank
    open for every factor: 11 times as many multiply-adds for 1536 x 384 weights and rank 8.
    """
    sides, d = tensor_sides(rows, columns), len(rows)
    open_ranks = [terms * rank ** (d - max(j, 1)) for j in range(d)]  # on either side of factor j, that is counted from 0
    fold = terms * sides[0] * rank**d
    each = sum(math.prod(rows[:j]) * open_ranks[j] * sides[j] * math.prod(columns[j + 1 :]) for j in range(d))
    rebuild = sum(math.prod(sides[:j]) * open_ranks[j] * sides[j] for j in range(1, d))
    return {"left": (fold, each), REBUILD: (fold + rebuild, math.prod(rows) * math.prod(columns))}


class BlockTermLinear(TensorLinear):
    """A sum of Tucker terms: the tensor is sum_k G_k x_1 U_k1 x_2 .. x_d U_kd, every term with a core G_k of rank^d numbers.

    Ye et al. 2018 (arXiv 1712.05134), survey 6.3. `core` is (terms, rank, .., rank), `factors[j]` (terms, out_factors[j],
    in_factors[j], rank). One term is a Tucker decomposition; terms of rank 1 are a CP decomposition. Factors that are not given
    are balanced, three to a width. Raises ValueError for factors that do not make the widths, for no term, for a rank outside 1
    to the smallest side of the tensor, and for an order that there is not.
    """

    kind = "block_term_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        terms: int,
        rank: int,
        bias: bool = True,
        out_factors: Sizes | None = None,
        in_factors: Sizes | None = None,
        order: str = AUTO,
    ):
        super().__init__(in_features, out_features, bias)
        d = len(out_factors or in_factors or (1, 1, 1))
        self.out_factors = checked_factors(out_factors, out_features, d)
        self.in_factors = checked_factors(in_factors, in_features, d)
        most = min(tensor_sides(self.out_factors, self.in_factors))
        if terms < 1 or not 1 <= rank <= most:
            raise ValueError(f"1 term or more, with a rank in 1..{most}, got {terms} terms of rank {rank}")
        self.terms, self.rank = terms, rank
        each = (in_features * terms * rank**d) ** (-0.5 / (d + 1))  # see `random_cores`: a sum of terms * rank^d products
        shapes = [(terms, n, m, rank) for n, m in zip(self.out_factors, self.in_factors, strict=True)]
        self.core = nn.Parameter(each * torch.randn(terms, *[rank] * d))
        self.factors = nn.ParameterList(nn.Parameter(each * torch.randn(shape)) for shape in shapes)
        self.settle(order)

    def folded(self) -> torch.Tensor:
        """The cores multiplied into the first factors: a first core (1, n_1, m_1, terms * rank^(d-1)) as of a tensor train."""
        N, n, m, R = self.factors[0].shape
        made = self.factors[0].view(N, n * m, R) @ self.core.view(N, R, -1)
        return made.view(N, n, m, -1).permute(1, 2, 0, 3).reshape(1, n, m, -1)

    def last(self) -> torch.Tensor:
        """The last factors: a last core (terms * rank, n_d, m_d, 1) as of a tensor train, which also sums over the terms."""
        return self.factors[-1].permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(-1)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out, in)."""
        made = functools.reduce(block_matrix, list(self.factors)[1:-1], self.folded()[0])
        return core_matrix(made, self.last()).squeeze(-1)

    def orders(self) -> dict[str, tuple[int, int]]:
        """From the left, or the matrix first."""
        return block_term_orders(self.terms, self.rank, self.out_factors, self.in_factors)

    def product(self, x: torch.Tensor, order: str) -> torch.Tensor:
        """(tokens, in) to (tokens, out)."""
        state = core_product(x.t().unsqueeze(-1), self.folded())
        state = functools.reduce(block_product, list(self.factors)[1:-1], state)
        return core_product(state, self.last()).view(len(x), -1)

    def options(self) -> dict:
        """Widths and their factors, terms, rank, order, and whether there is a bias."""
        return super().options() | {"terms": self.terms, "rank": self.rank, "out_factors": self.out_factors,
                                    "in_factors": self.in_factors}  # fmt: skip


# --- T-12 CP and Tucker across layers -------------------------------------------------------------------------------


class CPLinear(TensorLinear):
    """One of several matrices of a shape: W_l = sum_k a_lk left_k right_k^T, where only a_l is its own.

    A CP decomposition of the tensor (matrices, out, in); Carroll and Chang 1970, survey 6. `left` is (out, rank), `right`
    (rank, in) and `scale`, a_l, (rank,). Raises ValueError for a rank below 1, and for an order that there is not.
    """

    kind = "cp_linear"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, order: str = AUTO):
        super().__init__(in_features, out_features, bias)
        if rank < 1:
            raise ValueError(f"a rank of 1 or more, got {rank}")
        self.rank = rank
        self.left = nn.Parameter(torch.randn(out_features, rank) / rank**0.5)
        self.right = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.scale = nn.Parameter(torch.ones(rank))
        self.settle(order)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out, in)."""
        return (self.left * self.scale) @ self.right

    def orders(self) -> dict[str, tuple[int, int]]:
        """Right factor first, or the matrix first. To scale is no matrix product and is not counted."""
        out, m = self.out_features, self.in_features
        return {"right": (0, self.rank * (out + m)), REBUILD: (out * self.rank * m, out * m)}

    def product(self, x: torch.Tensor, order: str) -> torch.Tensor:
        """(tokens, in) to (tokens, out)."""
        inner = x @ self.right.t()
        return (inner * self.scale.to(inner.dtype)) @ self.left.t()

    def options(self) -> dict:
        """Widths, rank, order, and whether there is a bias."""
        return super().options() | {"rank": self.rank}


class TuckerLinear(TensorLinear):
    """One of several matrices of a shape: W_l = left (sum_k mix_lk core_k) right, where only mix_l is its own.

    A Tucker decomposition of the tensor (matrices, out, in), its ranks in that order; Tucker 1966, survey 6. `left` (out,
    ranks[1]), `core` (ranks), `right` (ranks[2], in), `mix` (ranks[0],). Raises ValueError for a rank below 1 or above a width,
    and for an order that there is not.
    """

    kind = "tucker_linear"

    def __init__(self, in_features: int, out_features: int, ranks: Sizes, bias: bool = True, order: str = AUTO):
        super().__init__(in_features, out_features, bias)
        if len(ranks) != 3 or min(ranks) < 1 or ranks[1] > out_features or ranks[2] > in_features:
            raise ValueError(f"three ranks of 1 or more, the others up to {out_features} and {in_features}, got {list(ranks)}")
        self.ranks = list(ranks)
        self.left = nn.Parameter(torch.randn(out_features, ranks[1]) / ranks[1] ** 0.5)
        self.core = nn.Parameter(torch.randn(*ranks) / ranks[2] ** 0.5)
        self.right = nn.Parameter(torch.randn(ranks[2], in_features) / in_features**0.5)
        self.mix = nn.Parameter(torch.full((ranks[0],), ranks[0] ** -0.5))
        self.settle(order)

    def own_core(self) -> torch.Tensor:
        """The matrix's own core (ranks[1], ranks[2]), mixed from those of all."""
        return (self.mix.unsqueeze(0) @ self.core.flatten(1)).view(self.ranks[1:])

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out, in)."""
        return self.left @ self.own_core() @ self.right

    def orders(self) -> dict[str, tuple[int, int]]:
        """From the right, with the core by itself or multiplied into one of the factors once a pass; or the matrix first."""
        (count, a, b), out, m = self.ranks, self.out_features, self.in_features
        mixed, into_left, into_right = count * a * b, out * a * b, a * b * m
        return {
            "right": (mixed, b * m + a * b + out * a),
            "core into left": (mixed + into_left, b * (m + out)),
            "core into right": (mixed + into_right, a * (m + out)),
            REBUILD: (mixed + into_left + out * b * m, out * m),
        }

    def product(self, x: torch.Tensor, order: str) -> torch.Tensor:
        """(tokens, in) to (tokens, out)."""
        left, core, right = self.left, self.own_core(), self.right
        if order == "core into left":
            return x @ right.t() @ (left @ core).t()
        if order == "core into right":
            return x @ (core @ right).t() @ left.t()
        return x @ right.t() @ core.t() @ left.t()

    def options(self) -> dict:
        """Widths, ranks, order, and whether there is a bias."""
        return super().options() | {"ranks": self.ranks}
