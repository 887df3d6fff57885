"""Survey section 6.1, matrices: two factors in the place of a matrix, from its SVD, from data, from gradients, or at random.

W (out, in) becomes W_a W_b with W_a (out, rank) and W_b (rank, in). Matrices that read one input make a *family* and can share
W_b. A *plan* names families and their ranks; every method takes one, so that methods are compared at equal ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas
import torch
from torch import nn

from utils import bert
from utils.parts.linear import check_rank
from utils.replacing import READ_ONE_STATE, put_factors
from utils.training import check_batches, cross_entropy

LINEAR = (*bert.ENCODER, *bert.HEAD_GROUPS)
Names = tuple[str, ...]  # of the weights of a family
Plan = dict[Names, int]  # family -> rank
Energies = dict[Names, torch.Tensor]  # family -> squared singular values, descending
Moments = dict[str, torch.Tensor]  # weight -> (in, in), or (in,) for a diagonal one
Factors = tuple[list[torch.Tensor], torch.Tensor]  # W_a (out, rank) of each matrix, and their W_b (rank, in)


# --- families, and what factors cost --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Matrices (out, in) that read one input."""

    matrices: tuple[bert.Matrix, ...]

    @property
    def names(self) -> Names:
        """The parameter names, which stay what they are in a copy of the model."""
        return tuple(matrix.name for matrix in self.matrices)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The matrices, float32. Raises ValueError for one with numbers that are not finite."""
        for matrix in self.matrices:
            if not matrix.weight.isfinite().all():
                raise ValueError(f"{matrix.name} must have finite weights only")
        return [matrix.weight.detach().float() for matrix in self.matrices]

    @property
    def layer(self) -> int | None:
        """The layer's number, none outside the encoder."""
        return self.matrices[0].layer

    @property
    def label(self) -> str:
        """The groups of the matrices."""
        return "+".join(matrix.group for matrix in self.matrices)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrices on top of each other."""
        return sum(len(matrix.weight) for matrix in self.matrices), self.matrices[0].weight.shape[1]

    def parameters(self, rank: int | None = None) -> int:
        """Weights of the factors at a rank, the shared one counted once; without a rank, of the matrices."""
        rows, columns = self.shape
        return rows * columns if rank is None else rank * (rows + columns)


def families(model: nn.Module, groups: tuple[str, ...] = bert.ENCODER, shared: bool = True) -> list[Family]:
    """The families of the groups: query, key and value of a layer together, every other matrix for itself.

    Without `shared` each matrix is a family. Raises ValueError for embedding groups.
    """
    found: dict[tuple, list[bert.Matrix]] = {}
    for matrix in bert.linear_matrices(model, groups):
        reads = "hidden state" if shared and matrix.group in READ_ONE_STATE else matrix.group
        found.setdefault((matrix.layer, reads), []).append(matrix)
    return [Family(tuple(matrices)) for matrices in found.values()]


def family_of(model: nn.Module, names: Names) -> Family:
    """The family of those weights. Raises ValueError for a name that is no linear layer's (any more), and for other widths."""
    known = {matrix.name: matrix for matrix in bert.matrices(model, LINEAR)}
    wrong = [name for name in names if name not in known or not isinstance(known[name].module, nn.Linear)]
    if wrong:
        raise ValueError(f"a plan names weights of linear layers, got {', '.join(wrong)}")
    if len({known[name].weight.shape[1] for name in names}) != 1:
        raise ValueError(f"the matrices of a family read one input, those of {', '.join(names)} have other widths")
    return Family(tuple(known[name] for name in names))


def break_even_rank(out_features: int, in_features: int) -> float:
    """The rank at which two factors hold as many weights as the matrix: out * in / (out + in). Below it they are smaller."""
    return out_features * in_features / (out_features + in_features)


def break_even(model: nn.Module, groups: tuple[str, ...] = bert.ENCODER, shared: bool = True) -> pandas.DataFrame:
    """A row per kind of family: its shape, full rank, and the ranks at which factors cost as much as its matrices.

    `parameters` counts a shared factor once, `macs` as often as it is passed: each matrix projects the input for itself.
    """
    rows = {}
    for family in families(model, groups, shared):
        out, columns = family.shape
        each = out * columns / (out + columns * len(family.matrices))
        costs = {"parameters": break_even_rank(out, columns), "macs": each}
        rows[family.label, out, columns] = {"full": min(out, columns), **costs}
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis(["family", "out", "in"])


def crossing(ranks: list[int], ratios: list[float]) -> float:
    """The rank at which a measured cost ratio, factors over matrix, first reaches 1, by straight lines between measured ranks.

    0 where the lowest rank costs as much already, infinite where none does. Raises ValueError for lists of other lengths.
    """
    if len(ranks) != len(ratios):
        raise ValueError(f"a ratio for every rank is needed, got {len(ranks)} ranks and {len(ratios)} ratios")
    first = next((place for place, ratio in enumerate(ratios) if ratio >= 1), None)
    if not first:
        return math.inf if first is None else 0.0
    (low, below), (high, above) = zip(ranks[first - 1 : first + 1], ratios[first - 1 : first + 1], strict=True)
    return low + (high - low) * (1 - below) / (above - below)


# --- spectra, and the ranks that they suggest -----------------------------------------------------------------------


def leading_directions(W: torch.Tensor, moment: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors (out, k) and eigenvalues (k,) of W C W^T, largest first, k the smaller side of W (out, in); float64.

    C is the identity, a diagonal (in,) or a matrix (in, in). They are the left singular vectors and the squared singular values
    of W C^(1/2): of W itself, and, with C = X X^T, of W X.
    """
    Q, R = torch.linalg.qr(W.double())  # where W is tall, the eigenvectors lie in its columns: a small problem is left
    weighted = R if moment is None else R * moment.double() if moment.dim() == 1 else R @ moment.double()
    energies, V = torch.linalg.eigh(weighted @ R.T)
    return Q @ V.flip(-1), energies.flip(-1).clamp(min=0)


def moment_of(family: Family, moments: Moments | None) -> torch.Tensor | None:
    """The mean of the moments of a family's matrices: they read one input, but have gradients of their own.

    Raises ValueError where one is missing.
    """
    if moments is None:
        return None
    missing = [name for name in family.names if name not in moments]
    if missing:
        raise ValueError(f"no moments of {', '.join(missing)}: gather them for its group, too")
    return torch.stack([moments[name] for name in family.names]).mean(0)


def spectra(
    model: nn.Module, moments: Moments | None = None, groups: tuple[str, ...] = bert.ENCODER, shared: bool = True
) -> Energies:
    """Squared singular values of each family's W, or of its outputs W X on the tokens of `input_moments`; descending."""
    return {family.names: leading_directions(torch.cat(family.weights), moment_of(family, moments))[1]
            for family in families(model, groups, shared)}  # fmt: skip


def input_spectra(moments: Moments) -> Energies:
    """Squared singular values of each layer's inputs X, divided by the tokens; descending. `moments` as of `input_moments`."""
    return {(name,): torch.linalg.eigvalsh(moment).flip(-1).clamp(min=0) for name, moment in moments.items()}


def retained(energies: torch.Tensor) -> torch.Tensor:
    """Share of the sum of squares that the first 1, 2, ... singular values hold; the shape of `energies`, ends at 1."""
    sums = energies.double().cumsum(-1)
    return sums / sums[..., -1:]


def rank_for(energies: torch.Tensor, variance: float = 0.6) -> int:
    """The smallest rank that retains the share `variance` of the sum of squares. Raises ValueError for one outside (0, 1]."""
    if not 0 < variance <= 1:
        raise ValueError(f"the retained variance must lie in (0, 1], got {variance}")
    return int((retained(energies) < variance).sum()) + 1


def noise_spectra(model: nn.Module, groups: tuple[str, ...] = bert.ENCODER) -> Energies:
    """What no structure at all looks like: squared singular values of independent normal numbers of each matrix's shape.

    Matrices of one shape get the same numbers.
    """
    drawn: dict[torch.Size, torch.Tensor] = {}
    for matrix in bert.linear_matrices(model, groups):
        if matrix.weight.shape not in drawn:
            numbers = torch.randn(matrix.weight.shape, generator=torch.Generator().manual_seed(0))
            drawn[matrix.weight.shape] = leading_directions(numbers)[1]
    return {(matrix.name,): drawn[matrix.weight.shape] for matrix in bert.linear_matrices(model, groups)}


def ranks_needed(found: dict[str, Energies], variance: float = 0.9) -> pandas.DataFrame:
    """A row per matrix, a column per kind of spectrum: how many *directions* retain the variance. Claim C32.

    Directions can be held against each other, shares of a full rank cannot: W (out, in) has min(out, in) of them, its inputs X
    have `in`, which for the second feed-forward matrix is four times as many. Raises ValueError for a share outside (0, 1].
    """
    return pandas.DataFrame({what: {name: rank_for(values, variance) for (name,), values in energies.items()}
                             for what, energies in found.items()})  # fmt: skip


def plan_by_variance(energies: Energies, variance: float = 0.6) -> Plan:
    """Every family at the rank that retains that share of its variance; above `break_even_rank` nothing is saved.

    Prabhavalkar et al. 2016 (arXiv 1603.08042), survey 6.1: 0.6 there. Raises ValueError for a share outside (0, 1].
    """
    return {names: rank_for(values, variance) for names, values in energies.items()}


def plan_by_size(model: nn.Module, energies: Energies, size: float = 0.5) -> Plan:
    """The largest retained variance, one for all families, at which they hold at most `size` of the weights that they have.

    A family that its rank would not make smaller is left out: it stays dense, and counts so. Raises ValueError for a size of 1
    or more, and for one that rank 1 exceeds.
    """
    dense = {names: family_of(model, names) for names in energies}
    total = sum(family.parameters() for family in dense.values())

    def share(plan: Plan) -> float:
        return sum(min(family.parameters(plan[names]), family.parameters()) for names, family in dense.items()) / total

    least = share(dict.fromkeys(energies, 1))
    if not least <= size < 1:
        raise ValueError(f"the share of weights must lie in [{least:.4f}, 1), got {size}")
    low, high = 1e-9, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(plan_by_variance(energies, middle)) <= size else (low, middle)
    plan = plan_by_variance(energies, low)
    return {names: rank for names, rank in plan.items() if dense[names].parameters(rank) < dense[names].parameters()}


def even_plan(model: nn.Module, size: float = 0.5, groups: tuple[str, ...] = bert.ENCODER, shared: bool = True) -> Plan:
    """Every family at the largest rank whose factors hold at most `size` of its own weights, whatever its spectrum.

    Raises ValueError where that is no rank at all, and for a size of 1 or more.
    """
    found = {f.names: int(size * f.parameters() // f.parameters(1)) for f in families(model, groups, shared)}
    if not size < 1 or min(found.values()) < 1:
        raise ValueError(f"the share of weights must be below 1 and leave every family a rank, got {size}")
    return found


def plan_size(model: nn.Module, plan: Plan) -> float:
    """Weights of a plan's factors over those of its matrices, which `model` still has."""
    dense = {names: family_of(model, names) for names in plan}
    return sum(dense[names].parameters(rank) for names, rank in plan.items()) / sum(f.parameters() for f in dense.values())


# --- factors in the place of matrices -------------------------------------------------------------------------------


def balanced(lefts: list[torch.Tensor], right: torch.Tensor) -> Factors:
    """The same products, with columns of the lefts (on top of each other) as long as rows of the right.

    So an optimiser moves both alike.
    """
    lengths = torch.cat(lefts).norm(dim=0).clamp(min=1e-30), right.norm(dim=1).clamp(min=1e-30)
    scale = (lengths[1] / lengths[0]).sqrt()
    return [left * scale for left in lefts], right / scale[:, None]


@torch.no_grad()
def factorise(model: nn.Module, plan: Plan, method: Callable[[Family, int], Factors]) -> dict[str, float]:
    """Put `method(family, rank)` in the place of the matrices of a plan; W_b is one parameter: stored, trained, counted once.

    Returns what was `kept` of each matrix. Raises ValueError for a rank that is not there, for weights that are no matrix of a
    linear layer or not finite; then the model stays as it was.
    """
    made, found = [], {}
    for names, rank in plan.items():
        family = family_of(model, names)
        check_rank(rank, *family.shape)
        made.append((family, *balanced(*method(family, rank))))
    for family, lefts, right in made:
        found |= put_factors(model, family.matrices, lefts, right)
    return found


# --- T-01 joint SVD -------------------------------------------------------------------------------------------------


def shared_projection(weights: list[torch.Tensor], rank: int, anchor: int | None = None) -> torch.Tensor:
    """P (rank, in): the leading right singular vectors of matrices on top of each other, or of the matrix `anchor` alone.

    Raises ValueError for a rank that these do not have.
    """
    W = torch.cat(weights) if anchor is None else weights[anchor]
    check_rank(rank, *W.shape)
    return torch.linalg.svd(W, full_matrices=False).Vh[:rank]


def joint_factors(weights: list[torch.Tensor], rank: int, anchor: int | None = None) -> Factors:
    """The shared projection P of matrices W_l, and with it the Z_l of the least |Z_l P - W_l|^2.

    The rows of P are orthonormal, so Z_l = W_l P^T.
    """
    P = shared_projection(weights, rank, anchor)
    return [W @ P.T for W in weights], P


def joint_svd(model: nn.Module, plan: Plan, anchor: str | None = None) -> dict[str, float]:
    """T-01: the matrices of a family share the projection P of their input, W_l ~ Z_l P. In place.

    Prabhavalkar et al. 2016 (arXiv 1603.08042), survey 6.1: P comes from the SVD of a recurrent matrix, and Z is the argmin of
    |Z P - W|^2 for the next layer's matrix, which reads the same state; the rows of P are orthonormal, so that Z = W P^T. In a
    BERT query, key and value of a layer read one state. `anchor` is the group whose SVD gives their P; without one it is the
    SVD of all three on top of each other, the least error that one P allows. P is stored once, every matrix multiplies by it.
    Returns what was `kept` of each matrix. Raises ValueError for an anchor that reads no shared state, and for a rank that is
    not there.
    """
    if anchor not in (None, *READ_ONE_STATE):
        raise ValueError(f"the anchor must be one of {', '.join(READ_ONE_STATE)}, got {anchor!r}")

    def method(family: Family, rank: int) -> Factors:
        groups = [matrix.group for matrix in family.matrices]
        return joint_factors(family.weights, rank, groups.index(anchor) if anchor in groups else None)

    return factorise(model, plan, method)


# --- T-02 the same form from a random start -------------------------------------------------------------------------


def random_factors(weights: list[torch.Tensor], rank: int, generator: torch.Generator) -> Factors:
    """Independent normal numbers, each product scaled to the norm of its matrix."""
    right = torch.randn(rank, weights[0].shape[1], generator=generator).to(weights[0])
    lefts = [torch.randn(len(W), rank, generator=generator).to(W) for W in weights]
    return [left * (W.norm() / (left @ right).norm()) for left, W in zip(lefts, weights, strict=True)], right


def random_start(model: nn.Module, plan: Plan, seed: int = 0) -> dict[str, float]:
    """T-02: the layers of T-01 with factors that know nothing of the matrices: the control of every other start. In place.

    Sak, Senior and Beaufays 2014 (arXiv 1402.1128), survey 6.1, train a projection layer from scratch. Here the rest of the
    network is trained already, so each product gets the norm of its matrix; biases stay. Returns what was `kept` of each
    matrix: about -1. Raises ValueError for a rank that is not there.
    """
    generator = torch.Generator().manual_seed(seed)
    return factorise(model, plan, lambda family, rank: random_factors(family.weights, rank, generator))


# --- data-aware and Fisher-weighted factors -------------------------------------------------------------------------


@torch.no_grad()
def input_moments(
    model: nn.Module, batches: list[dict], groups: tuple[str, ...] = bert.ENCODER, centred: bool = False
) -> Moments:
    """C = X X^T / tokens for every matrix, (in, in) float64, X being the layer's inputs (in, tokens) without padding.

    `centred` takes the inputs' mean out: their covariance. Raises ValueError for no batches, and for embedding groups.
    """
    check_batches(batches)
    squares = {m.name: torch.zeros(2 * m.weight.shape[1:]).to(m.weight).double() for m in bert.linear_matrices(model, groups)}
    sums, count = {name: square[0].clone() for name, square in squares.items()}, dict.fromkeys(squares, 0)
    for batch in batches:
        tokens = batch["attention_mask"].bool()

        def visit(name: str, x: torch.Tensor, _, tokens: torch.Tensor = tokens) -> None:
            x = (x[tokens] if x.dim() == 3 else x).float()  # pooler and classifier see one vector per sentence
            squares[name] += x.T @ x
            sums[name] += x.sum(0)
            count[name] += len(x)

        with bert.watch(model, groups, visit):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    means = {name: total / count[name] * centred for name, total in sums.items()}
    return {name: square / count[name] - torch.outer(means[name], means[name]) for name, square in squares.items()}


def input_gradients(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """For each input of a linear layer, the sum of the squared gradients of its weights, per sentence: (sentences, in).

    `x` (sentences, tokens, in) are inputs and `dy` (sentences, tokens, out) gradients of the outputs; a sentence's gradient is
    G = dy^T x, and the diagonal of G^T G = x^T (dy dy^T) x needs no G.
    """
    return ((dy @ dy.transpose(1, 2) @ x) * x).sum(1)


def fisher_moments(model: nn.Module, batches: list[dict], groups: tuple[str, ...] = bert.ENCODER) -> Moments:
    """Fisher information of every matrix's inputs, (in,): the mean over sentences of their weights' squared gradients, summed.

    Hsu et al. 2022 (arXiv 2207.00112): the information of a weight is the mean squared gradient of a sentence's loss; all
    weights that read one input get its sum (their matrices have a row per input, ours a column). Raises ValueError for no
    batches, and for embedding groups.
    """
    check_batches(batches)
    total = {m.name: torch.zeros(m.weight.shape[1]).to(m.weight).double() for m in bert.linear_matrices(model, groups)}
    for batch in batches:
        for name, (x, dy) in output_gradients(model, batch, groups).items():
            tokens = x.dim() == 3  # pooler and classifier see one vector per sentence
            total[name] += input_gradients(x if tokens else x[:, None], dy if tokens else dy[:, None]).sum(0)
    sentences = sum(len(batch["labels"]) for batch in batches)
    return {name: value / sentences for name, value in total.items()}


def output_gradients(model: nn.Module, batch: dict, groups: tuple[str, ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per matrix the layer's input and the gradient of the sum of losses by its output; sentences do not mix in a BERT."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with bert.watch(model, groups, lambda name, x, y: seen.update({name: (x, y)})):
        loss = cross_entropy(model, batch) * len(batch["labels"])
        gradients = torch.autograd.grad(loss, [y for _, y in seen.values()])
    return {name: (x.float(), dy.float()) for (name, (x, _)), dy in zip(seen.items(), gradients, strict=True)}


def weighted_factors(weights: list[torch.Tensor], rank: int, moment: torch.Tensor | None) -> Factors:
    """W_a = U and W_b = U^T W with the leading eigenvectors U (out, rank) of W C W^T, W being the matrices on top of each other."""
    W = torch.cat(weights)
    U = leading_directions(W, moment)[0][:, :rank].to(W)
    return list(U.split([len(one) for one in weights])), U.T @ W


def weighted_svd(model: nn.Module, plan: Plan, moments: Moments) -> dict[str, float]:
    """W' = U U^T W with the leading eigenvectors U of W C W^T: of all matrices of its rank the least trace of
    (W - W') C (W - W')^T. In place.

    With C = X X^T (`input_moments`) that is |(W - W') X|^2, the error of the outputs: DRONE, Chen et al. 2021 (NeurIPS), whose
    closed form gives the same outputs. With the Fisher information of the inputs as a diagonal C (`fisher_moments`) it is
    FWSVD, Hsu et al. 2022 (arXiv 2207.00112). With C = 1 it is the SVD. DRONE also searches ranks layer by layer and factorises
    the product of queries and keys; here ranks come from the plan and every matrix is factorised for itself, with its inputs in
    the dense model. Returns what was `kept` of each matrix. Raises ValueError for a rank that is not there.
    """
    return factorise(model, plan, lambda family, rank: weighted_factors(family.weights, rank, moment_of(family, moments)))


# --- errors, and the least that they can be -------------------------------------------------------------------------


def energy(W: torch.Tensor, moment: torch.Tensor | None = None) -> float:
    """trace(W C W^T) for the identity, a diagonal (in,) or a matrix C (in, in): |W|^2, or with C = X X^T |W X|^2."""
    W = W.double()
    weighted = W if moment is None else W * moment.double() if moment.dim() == 1 else W @ moment.double()
    return float((weighted * W).sum())


def least_error(W: torch.Tensor, rank: int, moment: torch.Tensor | None = None) -> float:
    """What a matrix of that rank misses of `energy(W, moment)` at least, as a share of it.

    The singular values that are left out, squared: Eckart and Young 1936.
    """
    energies = leading_directions(W, moment)[1]
    return float(energies[rank:].sum() / energies.sum())


@torch.no_grad()
def relative_errors(dense: nn.Module, model: nn.Module, plan: Plan, moments: Moments | None = None) -> dict[Names, float]:
    """Of each family of a plan the relative squared error of its factors in `model`; `dense` still has the matrices.

    Of the weights, or with moments of the outputs (or as the Fisher information weighs them).
    """
    found = {}
    for names in plan:
        family = family_of(dense, names)
        W, moment = torch.cat(family.weights), moment_of(family, moments)
        made = torch.cat([model.get_submodule(name.removesuffix(".weight")).weight.float() for name in names])
        found[names] = energy(W - made, moment) / energy(W, moment)
    return found


@torch.no_grad()
def error_table(dense: nn.Module, model: nn.Module, plan: Plan, moments: Moments | None = None) -> pandas.DataFrame:
    """A row per family of the plan: its rank, its error as of `relative_errors`, and the `bound` on it.

    The bound holds for factors that have been trained, too.
    """
    rows = {}
    for names, error in relative_errors(dense, model, plan, moments).items():
        family = family_of(dense, names)
        bound = least_error(torch.cat(family.weights), plan[names], moment_of(family, moments))
        rows[family.layer, family.label] = {"rank": plan[names], "error": error, "bound": bound}
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis(["layer", "family"])


def excess(table: pandas.DataFrame) -> float:
    """The sum of the errors over the sum of their bounds: 1 for factors as near as their ranks allow, never less."""
    return float(table["error"].sum() / table["bound"].sum()) if table["bound"].sum() else math.inf
