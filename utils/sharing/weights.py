"""Survey section 5.2, weight matrices: random and hashed sharing, Toeplitz-like matrices, quaternions, factors of all layers.

Each method puts parts (`utils.parts.shared`, `utils.parts.linear`) in place of linear layers of a BERT, started as near to the
pre-trained matrices as the method's family of matrices comes. The papers train from scratch; how much of a pre-trained matrix a
family can keep is what `kept` says: 1 - |W - W'|^2 / |W|^2, the share of its squared weights.
"""

import functools

import torch
from torch import nn

from utils import bert, parts
from utils.encodings import Encoded
from utils.parts.linear import in_place_of
from utils.parts.shared import (
    HAMILTON_SIGNS,
    HashedLinear,
    HashedVectors,
    QuaternionLinear,
    RandomlySharedLinear,
    ToeplitzLinear,
    half_turns,
    toeplitz_matrix,
    unit_roots,
)
from utils.replacing import READ_ONE_STATE, kept, put_factors, replace_linear
from utils.sharing.words import check_weights
from utils.tables import whole_numbers

FFN = ("ffn_in", "ffn_out")


# --- S-05 random sharing with an index ------------------------------------------------------------------------------


def buckets_for(weights: int, ratio: float) -> int:
    """How many values `weights` weights share, `ratio` times fewer, at least 1. Raises ValueError for a ratio below 1."""
    if ratio < 1:
        raise ValueError(f"the ratio of weights to values must be 1 or more, got {ratio}")
    return max(1, round(weights / ratio))


def bucket_means(weight: torch.Tensor, bucket: torch.Tensor, buckets: int, shares: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the weights of each bucket, (buckets,), 0 for an empty one: of all shared values the nearest in least squares.

    `weight` and `bucket`, whole numbers below `buckets`, have one shape. Weights count alike, or by `shares`, which broadcast to it.
    """
    shares = (weight.new_ones(1) if shares is None else shares).double().expand_as(weight)
    sums = torch.bincount(bucket.flatten(), (shares * weight).flatten(), minlength=buckets)
    total = torch.bincount(bucket.flatten(), shares.flatten(), minlength=buckets)
    return (sums / total.clamp(min=torch.finfo(total.dtype).tiny)).to(weight.dtype)


def share_randomly(model: nn.Module, groups: tuple[str, ...] = FFN, ratio: float = 8, seed: int = 0) -> dict[str, float]:
    """S-05: every weight gets one of `ratio` times fewer values at random, which start as the means of their weights. In place.

    Survey 5.2. Returns what was `kept` of each matrix: about 1 / ratio where weights have mean 0. The file needs the index:
    `packed_index`. Raises ValueError for a ratio below 1.
    """

    def make(linear: nn.Linear, number: int) -> RandomlySharedLinear:
        buckets = buckets_for(linear.weight.numel(), ratio)
        part = in_place_of(linear, RandomlySharedLinear, buckets)
        generator = torch.Generator().manual_seed(seed + number)
        part.index.copy_(torch.randint(buckets, part.index.shape, generator=generator))
        part.values.copy_(bucket_means(linear.weight, part.index, buckets))
        return part

    return replace_linear(model, groups, make)


def packed_index(model: nn.Module) -> dict[str, Encoded]:
    """The indices of all randomly shared matrices in as few bits as name a value: what `Trial.finish` hands to the file."""
    return {f"{path}.index": whole_numbers(part.index.cpu(), len(part.values))
            for path, part in parts.find(model).items() if isinstance(part, RandomlySharedLinear)}  # fmt: skip


# --- S-06 HashedNets ------------------------------------------------------------------------------------------------


def hashed_means(weight: torch.Tensor, place: torch.Tensor, buckets: int, shares: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over each bucket of its weights times their signs, (buckets,): of all hashed matrices the nearest in least squares.

    `place` has the shape of `weight` and holds signed buckets (`utils.parts.shared.signed_buckets`); `shares` as in `bucket_means`.
    """
    sign = 1 - 2 * torch.div(place, buckets, rounding_mode="floor")
    return bucket_means(weight * sign, place % buckets, buckets, shares)


def hash_weights(model: nn.Module, groups: tuple[str, ...] = FFN, ratio: float = 8, seed: int = 0) -> dict[str, float]:
    """S-06: a hash of (i, j) picks the weight's value among `ratio` times fewer, a second hash its sign. In place.

    Each matrix has values and a seed of its own. Chen et al. 2015 (ICML), survey 5.2: they train from scratch; here every value
    starts as the sign-corrected mean of its weights. Returns what was `kept` of each matrix: (1 - exp(-ratio)) / ratio on
    average over hashes. Raises ValueError for a ratio below 1.
    """

    def make(linear: nn.Linear, number: int) -> HashedLinear:
        buckets = buckets_for(linear.weight.numel(), ratio)
        part = in_place_of(linear, functools.partial(HashedLinear, seed=seed + number), buckets)
        part.values.copy_(hashed_means(linear.weight, part.place, buckets))
        return part

    return replace_linear(model, groups, make)


@torch.no_grad()
def hashed_vectors(table: torch.Tensor, buckets: int, seed: int = 0, weights: torch.Tensor | None = None) -> HashedVectors:
    """S-06 for a word table (vocabulary, hidden): its numbers share `buckets` values, started as sign-corrected means.

    `weights` (vocabulary,) let frequent words count more in a mean. Raises ValueError for no bucket, for more than numbers, and for
    a weight of 0 or less.
    """
    shares = None if weights is None else check_weights(weights.to(table.device)).unsqueeze(1)
    vectors = HashedVectors(*table.shape, buckets, seed).to(table)
    ids = torch.arange(len(table), device=table.device)
    place = torch.cat([vectors.places(chunk).int() for chunk in ids.split(4096)])  # a hash takes several times the memory
    vectors.values.copy_(hashed_means(table, place, buckets, shares))
    return vectors


# --- S-07 Toeplitz-like matrices ------------------------------------------------------------------------------------


def displacement(W: torch.Tensor) -> torch.Tensor:
    """Z_1 W - W Z_-1 of square W (..., n, n): what a matrix changes by on its way one step down its diagonals."""
    right = torch.roll(W, -1, -1)
    right[..., -1] *= -1
    return torch.roll(W, 1, -2) - right


def displacement_rank(W: torch.Tensor, tolerance: float = 1e-5) -> int:
    """Rank of the displacement of W (n, n), singular values below `tolerance` times the largest one left out.

    At most 2 for a Toeplitz matrix and its inverse, at most 2 k for a matrix of rank k, n for most others.
    """
    singular = torch.linalg.svdvals(displacement(W.double()))
    return int((singular > tolerance * singular[0]).sum())


def leading_pairs(W: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k leading singular vectors of W (..., n, n), left and right, each times the root of its value: (..., k, n) both.

    By the eigenvectors of W^T W: all singular vectors would take several times as long.
    """
    v = torch.linalg.eigh(W.transpose(-1, -2) @ W).eigenvectors[..., -k:].flip(-1)
    product = W @ v
    root = product.norm(dim=-2, keepdim=True).sqrt().clamp(min=1e-30)
    return (product / root).transpose(-1, -2), (v * root).transpose(-1, -2)


def displacement_start(W: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`g`, `h` (..., rank, n) from the displacement of W (..., n, n), cut off at `rank`: W itself where it has that rank.

    Where it does not, a matrix several times as large: between the eigenvectors of Z_1 and Z_-1 an entry of W is one of the
    displacement divided by a difference of eigenvalues, and some of these are small.
    """
    return leading_pairs(displacement(W), rank)


def low_rank_start(W: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`g`, `h` (..., rank, n) of the nearest matrix of rank `rank` / 2 to W (..., n, n): its displacement in factors.

    sigma u v^T has the displacement (Z_1 u) sigma v^T - u sigma (Z_-1^T v)^T; for an odd rank the last of these is left out.
    """
    u, v = leading_pairs(W, (rank + 1) // 2)
    turned = torch.roll(v, -1, -1)
    turned[..., -1] *= -1
    g, h = torch.stack([torch.roll(u, 1, -1), -u], -2), torch.stack([v, turned], -2)  # (..., k, 2, n)
    return g.flatten(-3, -2)[..., :rank, :], h.flatten(-3, -2)[..., :rank, :]


def solve_rows(target: torch.Tensor, weights: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """X (..., n, rank) with the least |target - weights * (X factor^T)|^2, `*` entry by entry: a least-squares problem per row.

    `target` (..., n, n), `weights` (n, n) and `factor` (..., n, rank) are complex.
    """
    rank = factor.shape[-1]
    pairs = (factor.conj().unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)  # (..., n, rank * rank)
    squared = weights.abs().square()
    gram = torch.complex(squared @ pairs.real, squared @ pairs.imag).unflatten(-1, (rank, rank))
    right = (target * weights.conj()) @ factor.conj()
    ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]  # for a matrix of lower rank than asked for
    return torch.linalg.solve(gram + ridge * torch.eye(rank, device=gram.device), right.unsqueeze(-1)).squeeze(-1)


def eigen_factors(g: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`g` in the eigenvectors of Z_1 and `h` in those of Z_-1, (..., rank, n) real in, (..., n, rank) complex out."""
    turns = half_turns(h.shape[-1], h.shape[-1], h)
    left, right = torch.fft.fft(g, norm="ortho"), torch.fft.fft(h * turns, norm="ortho").conj()
    return left.transpose(-1, -2), right.transpose(-1, -2)


def real_factors(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `eigen_factors`; g_k and h_k, whose product alone counts, get equal lengths."""
    g = torch.fft.ifft(left.transpose(-1, -2), norm="ortho").real
    turned = torch.fft.ifft(right.transpose(-1, -2).conj(), norm="ortho")
    h = (turned * half_turns(g.shape[-1], g.shape[-1], g).conj()).real
    lengths = [factor.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny) for factor in (g, h)]
    return g * (lengths[1] / lengths[0]).sqrt(), h * (lengths[0] / lengths[1]).sqrt()


@torch.no_grad()
def fit_toeplitz(W: torch.Tensor, rank: int, sweeps: int = 5) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """`g`, `h` (..., rank, n) of a Toeplitz-like matrix near W (..., n, n), and the relative squared errors, start and sweeps.

    Between the eigenvectors of Z_1 and Z_-1 an entry of the matrix is (g_i . h_j) / (lambda_i - mu_j). With one factor fixed,
    each row of the other is a small least-squares problem. The two take turns, so that the error never grows; they begin with
    the better of two starts. All blocks are fitted at once, in float64.
    """
    W, n = W.double(), W.shape[-1]
    starts = [start(W, rank) for start in (low_rank_start, displacement_start)]
    shares = [kept(W, toeplitz_matrix(*start)) for start in starts]
    left, right = eigen_factors(*starts[shares[1] > shares[0]])
    target = torch.fft.fft(W, dim=-2, norm="ortho") * half_turns(n, n, W).conj()
    target = torch.fft.ifft(target, norm="ortho")  # W between the eigenvectors
    weights = 1 / (unit_roots(n, False, W)[:, None] - unit_roots(n, True, W))
    errors = [1 - max(shares)]
    for _ in range(sweeps):
        left = solve_rows(target, weights, right)
        right = solve_rows(target.transpose(-1, -2), weights.T, left)
        errors.append(1 - kept(target, weights * (left @ right.transpose(-1, -2))))
    return *real_factors(left, right), errors


def toeplitz_like(
    model: nn.Module, groups: tuple[str, ...] = FFN, rank: int = 4, sweeps: int = 5, by_fft: bool = True
) -> dict[str, float]:
    """S-07: square blocks of displacement rank `rank`, fitted to the pre-trained matrices. In place.

    Lu, Sindhwani, Sainath 2016 (arXiv 1604.02594), survey 5.2: they train from scratch. `by_fft` says how the model multiplies
    in evaluation. Returns what was `kept` of each matrix. Raises ValueError for a rank outside 1..n and for an odd n.
    """

    def make(linear: nn.Linear, number: int) -> ToeplitzLinear:
        part = in_place_of(linear, functools.partial(ToeplitzLinear, by_fft=by_fft), rank)
        rows, columns, _, n = part.g.shape
        g, h, _ = fit_toeplitz(linear.weight.reshape(rows, n, columns, n).transpose(1, 2), rank, sweeps)
        part.g.copy_(g)
        part.h.copy_(h)
        return part

    return replace_linear(model, groups, make)


# --- S-08 quaternions -----------------------------------------------------------------------------------------------


def fold_quaternion(W: torch.Tensor) -> torch.Tensor:
    """Components (4, out / 4, in / 4) of the nearest quaternion matrix to W (out, in): means of four blocks with their signs.

    Raises ValueError where 4 does not divide both widths.
    """
    if W.shape[0] % 4 or W.shape[1] % 4:
        raise ValueError(f"4 must divide both widths of a quaternion matrix, got {tuple(W.shape)}")
    blocks = W.reshape(4, W.shape[0] // 4, 4, W.shape[1] // 4).transpose(1, 2)
    signed = blocks * torch.tensor(HAMILTON_SIGNS, device=W.device, dtype=W.dtype)[:, :, None, None]
    return torch.stack([sum(signed[a, a ^ component] for a in range(4)) / 4 for component in range(4)])


def quaternion_layers(model: nn.Module, groups: tuple[str, ...] = bert.ENCODER) -> dict[str, float]:
    """S-08: linear layers multiply by the Hamilton product, with a quarter of the weights. In place.

    Tay et al. 2019 (arXiv 1906.04393), survey 5.2: they train from scratch; here each component starts as the mean of the four
    blocks that it stands for. Returns what was `kept` of each matrix, about 1 / 4. Raises ValueError where 4 does not divide a
    width.
    """

    def make(linear: nn.Linear, number: int) -> QuaternionLinear:
        part = QuaternionLinear(linear.in_features, linear.out_features, linear.bias is not None).to(linear.weight)
        part.components.copy_(fold_quaternion(linear.weight))
        if linear.bias is not None:
            part.bias.copy_(linear.bias)
        return part

    return replace_linear(model, groups, make)


@torch.no_grad()
def quaternion_attention(model: nn.Module) -> None:
    """S-08: attend by the four components of the Hamilton product of queries and keys (`utils.parts.attention`). In place.

    The keys are conjugated first, by the signs of their weights: then the real map is the one that the model was trained with,
    and the other three are new. Do this before `quaternion_layers`. Raises ValueError for a head size that 4 does not divide,
    for keys that are no plain linear layers, and for a model that does not attend by dense products.
    """
    if model.config._attn_implementation not in parts.STOCK:
        raise ValueError(f"quaternion attention takes the place of {' or '.join(parts.STOCK)}, not of "
                         f"{model.config._attn_implementation!r}")  # fmt: skip
    size = model.config.hidden_size // model.config.num_attention_heads  # that of a head, also where heads were removed
    if size % 4:
        raise ValueError(f"quaternion attention needs a head size that 4 divides, got {size}")
    for matrix in bert.linear_matrices(model, ("key",)):
        imaginary = torch.arange(matrix.module.out_features, device=matrix.weight.device) % size >= size // 4
        matrix.module.weight[imaginary] *= -1
        matrix.module.bias[imaginary] *= -1
    model.config._attn_implementation = "quaternion"


# --- S-09 factors shared by layers ----------------------------------------------------------------------------------


def shared_factors(weights: list[torch.Tensor], rank: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A_l (out_l, rank) and one B (rank, in) with the least sum_l |W_l - A_l B|^2, for matrices W_l (out_l, in).

    The SVD of the matrices on top of each other, cut off at `rank` (Eckart and Young 1936); the singular values are shared out
    between the factors. Raises ValueError for a rank that they do not have, and for different widths.
    """
    widths, rows = {W.shape[1] for W in weights}, [len(W) for W in weights]
    most = min(sum(rows), *widths)
    if len(widths) > 1 or not 1 <= rank <= most:
        raise ValueError(f"matrices with a common factor need one input width, got {sorted(widths)}, and a rank in 1..{most}, "
                         f"got {rank}")  # fmt: skip
    U, S, Vh = torch.linalg.svd(torch.cat([W.float() for W in weights]), full_matrices=False)
    root = S[:rank].sqrt()
    return list((U[:, :rank] * root).split(rows)), root[:, None] * Vh[:rank]


def families(model: nn.Module, groups: tuple[str, ...], across: str) -> list[list[bert.Matrix]]:
    """The matrices that are to share a factor: those of one kind (`layers`), or those that read one state (`states`).

    Raises ValueError for another `across`, and for embedding groups.
    """
    if across not in ("layers", "states"):
        raise ValueError(f"factors are shared across 'layers' or 'states', got {across!r}")
    found: dict[tuple, list[bert.Matrix]] = {}
    for matrix in bert.linear_matrices(model, groups):
        reads = "hidden state" if matrix.group in READ_ONE_STATE else matrix.group
        found.setdefault((matrix.group,) if across == "layers" else (matrix.layer, reads), []).append(matrix)
    return list(found.values())


@torch.no_grad()
def share_factors(
    model: nn.Module, groups: tuple[str, ...] = bert.ENCODER, rank: int = 96, across: str = "layers"
) -> dict[str, float]:
    """S-09: W_l = A_l B, where matrices share the factor B that reads their input: stored, trained and counted once. In place.

    `across="layers"`: one B for all matrices of a kind. `across="states"`: one for query, key and value of a layer, as in Lu et
    al. 2016 (arXiv 1604.02594), survey 5.2, the recurrence and the next layer read one projection of a state; they train from
    scratch. Returns what was `kept` of each matrix. Raises ValueError for another `across`, and for a rank that is not there.
    """
    shared = [(family, *shared_factors([m.weight for m in family], rank)) for family in families(model, groups, across)]
    found = {}
    for family, lefts, right in shared:
        found |= put_factors(model, family, lefts, right)
    return found
