"""Survey section 6.3: tensor trains, block terms, and CP and Tucker decompositions across layers.

Every format is fitted to trained matrices and then learns on; the papers train from scratch. Fits compute in float64, and
their errors are shares of a tensor's squared norm: they stand beside the least and the most that theory allows (`error_table`).
What a product costs in each order of contraction is counted (`contraction_table`): a small format need not be a fast one.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import pandas
import torch
from torch import nn

from utils import bert, costs, parts
from utils.decomposition.factors import leading_directions, least_error
from utils.parts.linear import in_place_of
from utils.parts.tensors import (
    BlockTermLinear,
    CPLinear,
    OrderedTrainVectors,
    Sizes,
    TensorLinear,
    TensorTrainLinear,
    TensorTrainVectors,
    TuckerLinear,
    balanced_factors,
    full_ranks,
    padded_factors,
    tensor_sides,
)
from utils.replacing import kept, replace_linear, take_place

FFN = ("ffn_in", "ffn_out")
ATTENTION = ("query", "key", "value", "attention_output")  # square matrices, all of one shape
TRAINS = (TensorTrainLinear, TensorTrainVectors)
Shape = Callable[[int, int], tuple[Sizes, Sizes]]  # out, in -> factors of the rows, factors of the columns


# --- matrices as tensors, and the sizes of formats ------------------------------------------------------------------


def balanced_shape(out_features: int, in_features: int, cores: int = 3) -> tuple[Sizes, Sizes]:
    """Both widths in factors that are as equal as they can be (`width_factors`). Raises ValueError for a prime width.

    Both ascend. Where a factor is 1, those of the columns descend, so that large ones do not meet in one side: 94 x 46 becomes
    (1, 2, 47) and (23, 2, 1), whose sides are 23, 4 and 47; with (1, 2, 23) they would be 1, 4 and 1081, and ranks end at 4.
    """
    rows, columns = width_factors(out_features, cores), width_factors(in_features, cores)
    return rows, columns[::-1] if 1 in rows + columns else columns


def width_factors(width: int, count: int) -> tuple[int, ...]:
    """`count` factors of a width, as equal as they can be; ones stand first where it has fewer (51 is 1 * 3 * 17).

    Raises ValueError for a prime width, of which no format makes anything smaller.
    """
    for number in range(count, 1, -1):
        with contextlib.suppress(ValueError):
            return (1,) * (count - number) + balanced_factors(width, number)
    return balanced_factors(width, count)  # says why not


def padded_shape(words: int, width: int, cores: int = 3) -> tuple[Sizes, Sizes]:
    """The same for a word table, whose vocabulary is filled up to a product of factors."""
    return padded_factors(words, cores), width_factors(width, cores)


def checked(weights: torch.Tensor) -> torch.Tensor:
    """Weights without gradient, in float64. Raises ValueError where they are not finite, or all 0."""
    if not weights.isfinite().all() or not weights.any():
        raise ValueError("a decomposition needs finite weights that are not all 0, got others")
    return weights.detach().double()


def tensorised(W: torch.Tensor, rows: Sizes, columns: Sizes) -> torch.Tensor:
    """A matrix (prod(rows), prod(columns)) as a tensor with the sides rows[j] * columns[j]; float64.

    Entry ((i_1, j_1), .., (i_d, j_d)) is W[(i_1..i_d), (j_1..j_d)]. Raises ValueError for weights that are not finite.
    """
    d = len(rows)
    pairs = [axis for j in range(d) for axis in (j, d + j)]
    return checked(W).reshape(*rows, *columns).permute(pairs).reshape(tensor_sides(rows, columns))


def train_weights(sides: Sizes, ranks: Sizes) -> int:
    """sum_j r_(j-1) sides[j] r_j."""
    bonds = [1, *ranks, 1]
    return sum(bonds[j] * side * bonds[j + 1] for j, side in enumerate(sides))


def tucker_weights(sides: Sizes, ranks: Sizes) -> int:
    """A factor for each side, and the core: of a Tucker decomposition, and of each block term."""
    return sum(side * rank for side, rank in zip(sides, ranks, strict=True)) + math.prod(ranks)


def largest(weights: Callable[[int], int], budget: float, most: int) -> int:
    """The largest rank in 1..most with `weights(rank)` of at most `budget`, by bisection.

    Raises ValueError where rank 1 has more.
    """
    if weights(1) > budget:
        raise ValueError(f"{budget:.0f} weights do not hold the smallest decomposition, which has {weights(1)}")
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if weights(middle) <= budget else (low, middle - 1)
    return low


def train_ranks(sides: Sizes, rank: int) -> list[int]:
    """The ranks of a train: `rank`, or the full one where that is smaller. Raises ValueError for a rank that no cut has."""
    full = full_ranks(sides)
    if not 1 <= rank <= max(full):
        raise ValueError(f"a tensor with sides {list(sides)} has ranks in 1..{max(full)}, got {rank}")
    return [min(rank, most) for most in full]


def train_ranks_for(sides: Sizes, budget: float) -> list[int]:
    """The largest of these ranks whose train has at most `budget` weights. Raises ValueError where rank 1 has more."""
    rank = largest(lambda r: train_weights(sides, train_ranks(sides, r)), budget, max(full_ranks(sides)))
    return train_ranks(sides, rank)


# --- T-08 tensor-train matrices -------------------------------------------------------------------------------------


def tt_svd(tensor: torch.Tensor, ranks: Sizes) -> list[torch.Tensor]:
    """Cores (r, side, s) of a tensor by one truncated SVD after the other: TT-SVD, Oseledets 2011, algorithm 1. Float64.

    Its squared error is at most the sum over all cuts of what an SVD at that cut leaves out (`train_bounds`), and so at most
    d - 1 times the least possible.
    """
    cores, rest = [], tensor.double()
    for side, rank in zip(tensor.shape[:-1], ranks, strict=True):
        r = cores[-1].shape[-1] if cores else 1
        rest = rest.reshape(r * side, -1)
        U = leading_directions(rest)[0][:, :rank]
        cores.append(U.reshape(r, side, -1))
        rest = U.T @ rest
    return [*cores, rest.unsqueeze(-1)]


def tt_round(cores: Sequence[torch.Tensor], ranks: Sizes) -> list[torch.Tensor]:
    """The same train with smaller ranks: TT-rounding, Oseledets 2011, algorithm 2. Cores (r, side, s); float64.

    QR from the right makes the rest of the train orthonormal, so that the SVD of one core is that of the whole cut. It finds
    what `tt_svd` finds, without ever making the tensor.
    """
    found = [core.detach().double() for core in cores]
    for j in range(len(found) - 1, 0, -1):
        Q, R = torch.linalg.qr(found[j].flatten(1).T)
        found[j] = Q.T.reshape(-1, *found[j].shape[1:])
        found[j - 1] = found[j - 1] @ R.T
    for j, rank in enumerate(ranks):
        matrix = found[j].flatten(0, 1)
        U = leading_directions(matrix)[0][:, :rank]
        found[j] = U.reshape(*found[j].shape[:2], -1)
        found[j + 1] = torch.tensordot(U.T @ matrix, found[j + 1], 1)
    return found


def balanced(cores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same train with singular values shared out: at every cut the slices on its left are as long as those on its right.

    So an optimiser moves all cores alike, as it does the factors of a low-rank layer.
    """
    found = list(cores)
    for j in range(len(found) - 1, 0, -1):
        left, right = found[j - 1].flatten(0, 1).norm(dim=0), found[j].flatten(1).norm(dim=1)
        scale = (right.clamp(min=1e-30) / left.clamp(min=1e-30)).sqrt()
        found[j - 1], found[j] = found[j - 1] * scale, found[j] / scale[:, None, None]
    return found


@torch.no_grad()
def fill_train(part: TensorTrainLinear | TensorTrainVectors, cores: Sequence[torch.Tensor]) -> None:
    """Copy cores (r, side, s) into those of a part, (r, rows_j, columns_j, s), balanced."""
    for mine, core in zip(part.cores, balanced(cores), strict=True):
        mine.copy_(core.reshape(mine.shape))


def tt_layers(
    model: nn.Module, groups: tuple[str, ...] = FFN, rank: int | None = None, size: float = 0.5, shape: Shape = balanced_shape
) -> dict[str, float]:
    """T-08: tensor trains in the place of linear layers, by TT-SVD of each matrix. In place.

    Tjandra, Sakti and Nakamura 2017 (arXiv 1705.08052), survey 6.3: there the matrices of a GRU learn as trains from scratch.
    Without a `rank` each matrix gets the largest at which its train has at most `size` of its weights. Returns what was `kept`
    of each matrix. Raises ValueError for a rank that is not there, a size that rank 1 exceeds, factors that do not make the
    widths, and weights that are not finite.
    """

    def make(linear: nn.Linear, number: int) -> TensorTrainLinear:
        rows, columns = shape(linear.out_features, linear.in_features)
        sides = tensor_sides(rows, columns)
        ranks = train_ranks_for(sides, size * linear.weight.numel()) if rank is None else train_ranks(sides, rank)
        part = in_place_of(linear, lambda *sizes: TensorTrainLinear(*sizes, rows, columns), ranks)
        fill_train(part, tt_svd(tensorised(linear.weight, rows, columns), part.ranks))
        return part

    return replace_linear(model, groups, make)


@torch.no_grad()
def rounded(part: TensorTrainLinear | TensorTrainVectors, rank: int) -> TensorTrainLinear | TensorTrainVectors:
    """A part with the same train rounded to ranks of at most `rank`. Raises ValueError for one below 1 or above what it has."""
    if not 1 <= rank <= max(part.ranks):
        raise ValueError(f"ranks of at most {max(part.ranks)} can be rounded to 1..{max(part.ranks)}, got {rank}")
    options = part.options() | {"ranks": [min(rank, r) for r in part.ranks]}
    small = type(part)(**options).to(part.cores[0]).train(part.training)
    fill_train(small, tt_round([core.flatten(1, 2) for core in part.cores], small.ranks))
    if getattr(part, "bias", None) is not None:
        small.bias.copy_(part.bias)
    for name, codes in part.named_buffers():
        getattr(small, name).copy_(codes)
    return small


@torch.no_grad()
def round_trains(model: nn.Module, rank: int) -> dict[str, float]:
    """T-08, T-09: all trains of a model, also after training, rounded to ranks of at most `rank`. In place.

    Returns what was `kept` of the matrix of each. Raises ValueError for a rank below 1, and where there is no train.
    """
    trains = {path: part for path, part in parts.find(model).items() if isinstance(part, TRAINS)}
    if not trains:
        raise ValueError("the model has no tensor trains: call tt_layers or tt_vectors first")
    small = {path: rounded(part, min(rank, max(part.ranks))) for path, part in trains.items()}
    for path, part in small.items():
        model.set_submodule(path, part)
    return {path: kept(part.weight, small[path].weight) for path, part in trains.items()}


# --- T-09 TT-embedding ----------------------------------------------------------------------------------------------


@torch.no_grad()
def tt_vectors(
    table: torch.Tensor,
    rank: int | None = None,
    size: float = 0.1,
    shape: Shape = padded_shape,
    order: torch.Tensor | None = None,
) -> TensorTrainVectors:
    """T-09: a word table (vocabulary, hidden) as a tensor train that looks its rows up without it, by TT-SVD.

    Khrulkov et al. 2019 (arXiv 1901.10787), survey 6.3: they train from random cores, those that the part begins with. Rows
    that only fill the vocabulary up are 0 in the fit, and never looked up. Without a `rank`, the largest at which the train has
    at most `size` of the table's numbers. An `order` (vocabulary,) of ids says which words stand beside each other, and is stored
    with the cores. Raises ValueError for a rank that is not there, a size that rank 1 exceeds, factors that hold fewer words or
    do not make the width, an order that does not name each id once, and vectors that are not finite.
    """
    rows, columns = shape(*table.shape)
    sides = tensor_sides(rows, columns)
    ranks = train_ranks_for(sides, size * table.numel()) if rank is None else train_ranks(sides, rank)
    kind = TensorTrainVectors if order is None else OrderedTrainVectors
    vectors = kind(*table.shape, ranks, rows, columns).to(table)
    if order is not None:
        if not torch.equal(order.sort().values, torch.arange(len(table), device=order.device)):
            raise ValueError(f"an order names the ids 0 to {len(table) - 1}, each once")
        vectors.place[order] = torch.arange(len(table), device=order.device).to(vectors.place.dtype)
        table = table[order]
    fill_train(vectors, tt_svd(table_tensor(table, rows, columns), ranks))
    return vectors


def table_tensor(table: torch.Tensor, rows: Sizes, columns: Sizes) -> torch.Tensor:
    """A table (words, width) as a tensor with the sides rows[j] * columns[j], with zeros for words that it does not have."""
    return tensorised(nn.functional.pad(table, (0, 0, 0, math.prod(rows) - len(table))), rows, columns)


def similar_order(table: torch.Tensor, factors: Sizes) -> torch.Tensor:
    """Word ids, (words,), ordered so that words whose first digits are equal have vectors (words, width) that are alike.

    Sorted along the direction in which they differ most, the words are cut into a group for each value of the first digit; each
    group is sorted along its own direction for the second, and so on. The last digit follows from the sorting before it.
    """

    def grouped(ids: torch.Tensor, factors: Sizes) -> torch.Tensor:
        if len(factors) == 1:
            return ids
        centred = table[ids] - table[ids].mean(0)
        direction = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
        groups = ids[(centred @ direction).argsort(stable=True)].split(math.prod(factors[1:]))
        return torch.cat([grouped(group, factors[1:]) for group in groups])

    return grouped(torch.arange(len(table), device=table.device), factors)


# --- Tucker decompositions ------------------------------------------------------------------------------------------


def unfolded(tensor: torch.Tensor, side: int) -> torch.Tensor:
    """The matrix whose rows are a tensor's slices along that side: (shape[side], all others)."""
    return tensor.movedim(side, 0).flatten(1)


def side_directions(tensor: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors (side, side) of an unfolding and its squared singular values (side,), largest first.

    From the small matrix of inner products of slices: an unfolding is wide.
    """
    slices = unfolded(tensor, side)
    energies, V = torch.linalg.eigh(slices @ slices.T)
    return V.flip(-1), energies.flip(-1).clamp(min=0)


def along(tensor: torch.Tensor, matrix: torch.Tensor, side: int) -> torch.Tensor:
    """Multiply a matrix (new, shape[side]) into that side of a tensor."""
    return torch.tensordot(matrix, tensor, ([1], [side])).movedim(0, side)


def projected(tensor: torch.Tensor, factors: Sequence[torch.Tensor], but: int | None = None) -> torch.Tensor:
    """The tensor between the columns of the factors (side, rank), on every side `but` one."""
    for side, factor in enumerate(factors):
        tensor = tensor if side == but else along(tensor, factor.T, side)
    return tensor


def tucker_tensor(core: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor of a core (ranks) and factors (side, rank): core x_1 U_1 x_2 U_2 ..."""
    return projected(core, [factor.T for factor in factors])


def fit_tucker(
    tensor: torch.Tensor, ranks: Sizes, sweeps: int = 5, factors: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, list[torch.Tensor], list[float]]:
    """Core (ranks) and orthonormal factors (side, rank) near a tensor, and the errors of the start and of each sweep.

    It starts at the leading singular vectors of every unfolding (HOSVD), or at given factors. A sweep replaces each factor by
    the best one for the others (HOOI, De Lathauwer, De Moor and Vandewalle 2000), so that the error never grows.
    """
    if factors is None:
        factors = [side_directions(tensor, side)[0][:, :rank] for side, rank in enumerate(ranks)]
    factors, core, errors = list(factors), projected(tensor, factors), []
    for sweep in range(sweeps + 1):
        for side, rank in enumerate(ranks if sweep else ()):
            factors[side] = side_directions(projected(tensor, factors, side), side)[0][:, :rank]
        core = projected(tensor, factors)
        errors.append(1 - float(core.square().sum() / tensor.square().sum()))
    return core, factors, errors


# --- T-10 block terms -----------------------------------------------------------------------------------------------


def fit_block_terms(
    tensor: torch.Tensor, terms: int, rank: int, sweeps: int = 5
) -> tuple[torch.Tensor, list[torch.Tensor], list[float]]:
    """Cores (terms, rank, ..), factors (terms, side, rank) for each side, and the errors of the start and of each sweep.

    The start is greedy: every term is the HOSVD of what the terms before it leave. Then each in turn takes a step of HOOI on
    what all others leave. This is alternating least squares, one factor of one term at a time, so that the error never grows;
    one term is `fit_tucker`. De Lathauwer and Nion 2008 find a side's factors of all terms at once.
    """
    rest, found, errors = tensor.clone(), [], []
    for sweep in range(sweeps + 1):
        for k in range(terms):
            if sweep:
                rest += tucker_tensor(*found[k])
            start = found[k][1] if sweep else None
            term = fit_tucker(rest, [rank] * tensor.dim(), min(sweep, 1), start)[:2]
            found[k : k + 1] = [term]
            rest -= tucker_tensor(*term)
        errors.append(float(rest.square().sum() / tensor.square().sum()))
    cores, factors = zip(*found, strict=True)
    return torch.stack(cores), [torch.stack(of_side) for of_side in zip(*factors, strict=True)], errors


def block_term_layers(
    model: nn.Module,
    groups: tuple[str, ...] = FFN,
    terms: int | None = None,
    rank: int = 8,
    size: float = 0.1,
    sweeps: int = 5,
) -> dict[str, float]:
    """T-10: sums of Tucker terms in the place of linear layers, each fitted to its matrix, whose widths are products of three.

    Ye et al. 2018 (arXiv 1712.05134), survey 6.3: there the matrix behind the inputs of an LSTM learns as block terms from
    scratch. Without a number of `terms` each matrix gets as many as hold at most `size` of its weights. Returns what was `kept`
    of each matrix. Raises ValueError for no term, a rank outside 1 to the smallest side, a size that one term exceeds, prime
    widths, and weights that are not finite.
    """

    def make(linear: nn.Linear, number: int) -> BlockTermLinear:
        shape = balanced_shape(linear.out_features, linear.in_features)
        sides, budget = tensor_sides(*shape), size * linear.weight.numel()
        each = tucker_weights(sides, [rank] * len(sides))
        if terms is None and each > budget:
            raise ValueError(f"{budget:.0f} weights do not hold one term of rank {rank}, which has {each}")
        count = int(budget // each) if terms is None else terms
        part = in_place_of(linear, lambda *sizes: BlockTermLinear(*sizes[:2], count, *sizes[2:], *shape), rank)
        core, factors, _ = fit_block_terms(tensorised(linear.weight, *shape), count, rank, sweeps)
        part.core.copy_(core)
        for mine, found in zip(part.factors, factors, strict=True):
            mine.copy_(found.view_as(mine))
        return part

    return replace_linear(model, groups, make)


# --- T-12 CP and Tucker across layers -------------------------------------------------------------------------------


def stacks(model: nn.Module, groups: tuple[str, ...], joint: bool = False) -> list[list[bert.Matrix]]:
    """The matrices that make one tensor (matrices, out, in): those of a group, or, if `joint`, all of a shape.

    Raises ValueError for embedding groups, and for layers that were replaced already.
    """
    found: dict[object, list[bert.Matrix]] = {}
    for matrix in bert.linear_matrices(model, groups):
        found.setdefault(matrix.weight.shape if joint else matrix.group, []).append(matrix)
    return list(found.values())


def stacked(matrices: list[bert.Matrix]) -> torch.Tensor:
    """The tensor (matrices, out, in), float64. Raises ValueError for weights that are not finite."""
    return checked(torch.stack([matrix.weight for matrix in matrices]))


@torch.no_grad()
def place_stacks(
    model: nn.Module, kind: type[parts.Part], made: list[tuple[list[bert.Matrix], int | Sizes, dict[str, torch.Tensor]]]
) -> dict[str, float]:
    """Put parts in the place of stacks of matrices, each given with its rank and values. In place.

    The last value has a row for each matrix. The others are parameters that the whole stack shares: stored, trained and counted
    once. Returns what was `kept` of each matrix.
    """
    found = {}
    for matrices, rank, values in made:
        *names, own = values
        common = {name: nn.Parameter(values[name].to(matrices[0].weight.dtype).contiguous()) for name in names}
        for matrix, row in zip(matrices, values[own], strict=True):
            part = in_place_of(matrix.module, kind, rank)
            for name, parameter in common.items():
                setattr(part, name, parameter)
            getattr(part, own).copy_(row)
            found[matrix.name] = take_place(model, matrix, part, part.weight)
    return found


def largest_components(tensor: torch.Tensor, rank: int) -> list[torch.Tensor]:
    """The `rank` largest singular components of all matrices of a tensor (matrices, out, in): a (matrices, rank), and unit
    columns B (out, rank), C (in, rank).

    Every component belongs to one matrix: factors of its own for each, with the ranks shared out as well as they can be.
    """
    U, S, Vh = torch.linalg.svd(tensor, full_matrices=False)
    values, order = S.flatten().sort(descending=True)
    matrix, component = order[:rank] // S.shape[1], order[:rank] % S.shape[1]
    a = values.new_zeros(len(tensor), rank)
    a[matrix, torch.arange(rank, device=a.device)] = values[:rank]
    return [a, U[matrix, :, component].T, Vh[matrix, component].T]


def least_squares(products: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The factor of a CP decomposition that is best for the two others: products ((F^T F) * (S^T S))^-1, `*` entry by entry.

    `products` (side, rank) are the tensor's with the components of the two others (length, rank).
    """
    gram = (first.T @ first) * (second.T @ second)
    gram.diagonal().add_(1e-12 * gram.diagonal().mean())  # components that are equal share their weight
    return torch.linalg.solve(gram, products.T).T


def fit_cp(tensor: torch.Tensor, rank: int, sweeps: int = 10) -> tuple[list[torch.Tensor], list[float]]:
    """a (matrices, rank), B (out, rank) and C (in, rank) with W_l near sum_k a_lk b_k c_k^T; errors of start and sweeps.

    Alternating least squares (Carroll and Chang 1970; Harshman 1970) from `largest_components`: a sweep replaces each factor by
    the best one for the others, so that the error never grows. The columns of B and C have length 1. W C serves two of them.
    """
    a, B, C = largest_components(tensor, rank)
    energy = float(tensor.square().sum())
    errors = [1 - float(a.square().sum()) / energy]
    for _ in range(sweeps):
        WC = tensor @ C
        a = least_squares((WC * B).sum(1), B, C)
        B = nn.functional.normalize(least_squares((WC * a[:, None]).sum(0), a, C), dim=0)
        products = ((tensor.mT @ B) * a[:, None]).sum(0)
        C = least_squares(products, a, B)
        norm = ((a.T @ a) * (B.T @ B) * (C.T @ C)).sum()
        errors.append(1 - float(2 * (products * C).sum() - norm) / energy)
        a, C = a * C.norm(dim=0), nn.functional.normalize(C, dim=0)
    return [a, B, C], errors


def shared_out(a: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same components for `CPLinear`: their lengths half in B, half in C, and weights whose mean square is 1 in a."""
    lengths = a.square().mean(0).sqrt().clamp(min=1e-30)
    return {"left": B * lengths.sqrt(), "right": (C * lengths.sqrt()).T, "scale": a / lengths}


def cp_layers(
    model: nn.Module,
    groups: tuple[str, ...] = ATTENTION,
    rank: int | None = None,
    size: float = 0.5,
    sweeps: int = 10,
    joint: bool = False,
) -> dict[str, float]:
    """T-12: the matrices of all layers as one tensor in CP form: factors of inputs and outputs for all, weights for each.

    In place. Survey 6 names the decomposition without a method: here the layers are its third side. `joint` puts all groups
    whose matrices have one shape into one tensor. Without a `rank` each tensor gets the largest at which it has at most `size`
    of the weights. Returns what was `kept` of each matrix. Raises ValueError for a rank outside 1 to the largest that a tensor
    of the shape can need, a size that rank 1 exceeds, and weights that are not finite.
    """
    made = []
    for matrices in stacks(model, groups, joint):
        tensor = stacked(matrices)
        most = tensor.numel() // max(tensor.shape)
        chosen = min(most, int(size * tensor.numel() / sum(tensor.shape))) if rank is None else rank
        if not 1 <= chosen <= most:
            raise ValueError(f"{len(matrices)} matrices of {tuple(tensor.shape[1:])} have ranks in 1..{most}, got {chosen}")
        made.append((matrices, chosen, shared_out(*fit_cp(tensor, chosen, sweeps)[0])))
    return place_stacks(model, CPLinear, made)


@torch.no_grad()
def matrices_of_a_component(model: nn.Module) -> float:
    """How many matrices a CP component serves, the mean over all of a model: (sum a^2)^2 / sum a^4 of its weights a.

    1 where one matrix has all the weight, as at the start of `fit_cp`; the matrices of the stack where all have as much. Raises
    ValueError where there is no CP decomposition.
    """
    weights = [torch.stack([part.scale for part in found]).double() for _, found in decompositions(model)
               if isinstance(found[0], CPLinear)]  # fmt: skip
    if not weights:
        raise ValueError("the model has no matrices in CP form: call cp_layers first")
    served = [a.square().sum(0).square() / a.pow(4).sum(0).clamp(min=1e-30) for a in weights]
    return torch.cat(served).mean().item()


def tucker_ranks(tensor: torch.Tensor, budget: float) -> list[int]:
    """Ranks of a tensor (matrices, out, in) that `budget` weights hold, none above the product of the others.

    Outputs and inputs get ranks in proportion to their sides, as large as the budget allows beside the first rank. That one is
    the one for which HOSVD's bound, the sum of what the three unfoldings leave out, is smallest: to mix few cores saves the
    most, but it leaves whole layers out where layers have nothing in common. Raises ValueError where ranks of 1 are too much.
    """
    count, *sides = tensor.shape
    energies = [side_directions(tensor, side)[1] for side in range(3)]

    def ranks(longest: int, first: int) -> list[int]:
        found = [first, *(math.ceil(side * longest / max(sides)) for side in sides)]
        return [min(rank, math.prod(found) // rank) for rank in found]

    def best(first: int) -> list[int]:
        return ranks(largest(lambda r: tucker_weights(tensor.shape, ranks(r, first)), budget, max(sides)), first)

    def left_out(found: list[int]) -> float:
        return sum(float(values[rank:].sum()) for values, rank in zip(energies, found, strict=True))

    return min((best(first) for first in range(1, count + 1)), key=left_out)


def tucker_layers(
    model: nn.Module,
    groups: tuple[str, ...] = ATTENTION,
    ranks: Sizes | None = None,
    size: float = 0.5,
    sweeps: int = 5,
    joint: bool = False,
    unit: bool = False,
) -> dict[str, float]:
    """T-12: the matrices of all layers as one tensor in Tucker form: bases of inputs and outputs and cores for all, each matrix
    with its own mixture of the cores. In place.

    `ranks` are those of matrices, outputs and inputs; without them they are chosen for `size` of the weights (`tucker_ranks`).
    With `unit` every matrix is fitted at norm 1, so that none counts for more than another; its norm goes into its mixture. The
    rest is as in `cp_layers`. Raises ValueError for a rank below 1, above its side or above the product of the others, a size
    that ranks of 1 exceed, and weights that are not finite.
    """
    made = []
    for matrices in stacks(model, groups, joint):
        tensor = stacked(matrices)
        norms = tensor.flatten(1).norm(dim=1).clamp(min=1e-30) if unit else tensor.new_ones(len(tensor))
        tensor, sides = tensor / norms[:, None, None], tuple(tensor.shape)
        chosen = tucker_ranks(tensor, size * tensor.numel()) if ranks is None else list(ranks)
        most = [min(side, math.prod(chosen) // max(rank, 1)) for side, rank in zip(sides, chosen, strict=False)]
        if len(chosen) != 3 or not all(1 <= rank <= limit for rank, limit in zip(chosen, most, strict=True)):
            raise ValueError(f"three ranks of 1 to {sides}, none above the product of the others, got {chosen}")
        core, (mix, left, right), _ = fit_tucker(tensor, chosen, sweeps)
        made.append((matrices, chosen, {"left": left, "core": core, "right": right.T, "mix": mix * norms[:, None]}))
    return place_stacks(model, TuckerLinear, made)


# --- errors between what theory allows, and the cost of products ----------------------------------------------------

Bounds = tuple[float, float]  # the least relative squared error that such a format can have, and the most that the fit has


def train_bounds(tensor: torch.Tensor, ranks: Sizes) -> Bounds:
    """Of TT-SVD: no train beats an SVD at any of its cuts, and TT-SVD loses at most what those SVDs lose together."""
    tails = [least_error(tensor.flatten(0, cut).flatten(1), rank) for cut, rank in enumerate(ranks)]
    return max(tails), min(1.0, sum(tails))


def table_bounds(vectors: TensorTrainVectors, table: torch.Tensor) -> Bounds:
    """Of `tt_vectors`. Rows beyond the vocabulary can be anything, so the least is that of the words whose first digit has all
    its words: a part of a train is a train of the same ranks.
    """
    (_, *others), columns = vectors.word_factors, vectors.vector_factors
    digits = len(table) // math.prod(others)
    part = table[: digits * math.prod(others)]
    share = float(part.square().sum() / table.square().sum())
    least = train_bounds(tensorised(part, (digits, *others), columns), vectors.ranks)[0] * share if share else 0.0
    return least, train_bounds(table_tensor(table, vectors.word_factors, columns), vectors.ranks)[1]


def tucker_bounds(tensor: torch.Tensor, ranks: Sizes, terms: int = 1) -> Bounds:
    """Of HOSVD and what follows it, for a sum of terms, whose first one alone keeps to the upper bound.

    An unfolding has at most terms * rank singular values that are not 0; one with a shorter side says nothing.
    """
    unfoldings = [unfolded(tensor, side) for side in range(tensor.dim())]
    least = max(least_error(matrix, terms * rank) for matrix, rank in zip(unfoldings, ranks, strict=True))
    return least, min(1.0, sum(least_error(matrix, rank) for matrix, rank in zip(unfoldings, ranks, strict=True)))


def cp_bounds(tensor: torch.Tensor, rank: int) -> Bounds:
    """Of `fit_cp`: as many terms of rank 1 at best; the singular components that it starts from at worst."""
    start = torch.linalg.svdvals(tensor).square().flatten().sort(descending=True).values
    return tucker_bounds(tensor, [1, 1, 1], rank)[0], float(start[rank:].sum() / start.sum())


def bounds(part: parts.Part, W: torch.Tensor) -> Bounds:
    """Of a part whose decomposition stands for matrices W (matrices, out, in): one, or those of a stack."""
    match part:
        case TensorTrainLinear():
            return train_bounds(tensorised(W[0], part.out_factors, part.in_factors), part.ranks)
        case BlockTermLinear():
            tensor = tensorised(W[0], part.out_factors, part.in_factors)
            return tucker_bounds(tensor, [part.rank] * tensor.dim(), part.terms)
        case TuckerLinear():
            return tucker_bounds(checked(W), part.ranks)
        case CPLinear():
            return cp_bounds(checked(W), part.rank)
    raise ValueError(f"{type(part).__name__} is no tensor format")


def decompositions(model: nn.Module) -> Iterator[tuple[list[str], list[TensorLinear]]]:
    """Paths and parts of every decomposition: alone, or all that share a left factor."""
    found: dict[int, list[str]] = {}
    for path, part in parts.find(model).items():
        if isinstance(part, TensorLinear):
            found.setdefault(id(getattr(part, "left", part)), []).append(path)
    for paths in found.values():
        yield paths, [model.get_submodule(path) for path in paths]


@torch.no_grad()
def error_table(dense: nn.Module, model: nn.Module) -> pandas.DataFrame:
    """A row per decomposition in `model`, of matrices that `dense` still has: its relative squared `error`, between the `least`
    and the `most` that it can be.

    `size` is its share of the matrices' weights. `least` holds whatever the weights are; `most` holds for the fit to the
    matrices as they are, not for weights that have been trained. Raises ValueError where there is no decomposition.
    """
    rows = {}
    for paths, found in decompositions(model):
        W = torch.stack([dense.get_submodule(path).weight.double() for path in paths])
        made = torch.stack([part.weight.double() for part in found])
        numbers = {id(p): p.numel() for part in found for name, p in part.named_parameters() if name != "bias"}
        least, most = bounds(found[0], W)
        rows[paths[0]] = {"format": found[0].kind, "matrices": len(paths), "size": sum(numbers.values()) / W.numel(),
                          "least": least, "error": 1 - kept(W, made), "most": most}  # fmt: skip
    if not rows:
        raise ValueError("the model has no matrices in a tensor format")
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("first matrix")


@torch.no_grad()
def table_errors(vectors: TensorTrainVectors, table: torch.Tensor) -> dict[str, float]:
    """The relative squared `error` of a table's train, between the `least` and the `most` that it can be: see `error_table`."""
    least, most = table_bounds(vectors, table)
    return {"least": least, "error": 1 - kept(table, vectors.weight), "most": most}


def contraction_table(part: TensorLinear, tokens: Sizes = (32, 1024)) -> pandas.DataFrame:
    """A row per order of contraction: multiply-adds `once` a pass and `per token`; and, for passes of so many tokens, all of
    them over those of the dense layer.
    """
    dense = part.in_features * part.out_features
    rows = {order: {"once": once, "per token": each} | {f"{n} tokens": (once + n * each) / (n * dense) for n in tokens}
            for order, (once, each) in part.costs.items()}  # fmt: skip
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("order")


def macs_in_batch(model: nn.Module, length: int, batch: int = 32) -> float:
    """Multiply-adds of one sequence of `length` tokens in a pass over `batch` of them.

    `costs.macs` is of a pass over one: what a tensor format does once a pass, such as multiplying its cores out, many share.
    """
    saved = [part.macs(length) - part.macs(batch * length) / batch
             for _, found in decompositions(model) for part in found]  # fmt: skip
    return costs.macs(model, length) - sum(saved)


def set_order(model: nn.Module, order: str) -> None:
    """Let all tensor formats of a model multiply in one order ("auto", "left", ..). In place.

    Raises ValueError for one that a format does not have, and where there is none; then the model stays as it was.
    """
    found = [part for _, of_one in decompositions(model) for part in of_one]
    if not found or any(order not in ("auto", *part.costs) for part in found):
        known = set.intersection(*({"auto", *part.costs} for part in found)) if found else set()
        raise ValueError(f"the model's tensor formats all have the orders {', '.join(sorted(known)) or 'none'}, got {order!r}")
    for part in found:
        part.settle(order)
