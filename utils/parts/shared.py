"""Matrices composed of fewer numbers than they have entries (survey 5.2): shared values, structured matrices, quaternions.

A `ComposedLinear` says how its matrix is composed (`weight`), and so what is stored. It multiplies with the composed matrix,
at a dense layer's multiply-adds, unless it knows a faster product; `expanded` gives the plain layer with the same matrix.
"""

import math

import torch
from torch import nn

from utils.parts.embeddings import WordVectors
from utils.parts.part import Part


class ComposedLinear(Part):
    """Base: y = W x + b, where W (out, in) is composed anew in every pass. Subclasses give `weight` and `options`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out, in), composed with gradients."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return nn.functional.linear(x, self.weight, self.bias)

    def options(self) -> dict:
        """Widths and whether there is a bias; subclasses add what is theirs."""
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    def macs(self, length: int) -> int:
        """A dense layer's: to compose a matrix nothing is multiplied and added up."""
        return length * self.in_features * self.out_features

    @torch.no_grad()
    def expanded(self) -> nn.Linear:
        """A plain layer with the same matrix: the fastest product, at the memory of the matrix that was compressed."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None).to(next(self.parameters()))
        plain.weight.copy_(self.weight)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain


def check_buckets(buckets: int, weights: int) -> None:
    """Raise ValueError unless there are between one bucket and as many as weights."""
    if not 1 <= buckets <= weights:
        raise ValueError(f"{weights} weights share between 1 and {weights} values, got {buckets} buckets")


# --- S-05 random sharing with an index --------------------------------------------------------------------------------


class RandomlySharedLinear(ComposedLinear):
    """W_ij = values[index_ij]: m values, and an index that says for every weight which of them it has.

    The baseline of survey 5.2 that hashing improves on: a file needs the index, too (`utils.sharing.weights.packed_index` gives
    it as few bits as it takes). The values learn, the index stays. Raises ValueError for no bucket, and for more than weights.
    """

    kind = "randomly_shared_linear"

    def __init__(self, in_features: int, out_features: int, buckets: int, bias: bool = True):
        check_buckets(buckets, in_features * out_features)
        super().__init__(in_features, out_features, bias)
        self.values = nn.Parameter(torch.randn(buckets) / in_features**0.5)
        self.register_buffer("index", torch.zeros(out_features, in_features, dtype=torch.int32))

    @property
    def weight(self) -> torch.Tensor:
        """A look-up: (out, in)."""
        return self.values.index_select(0, self.index.flatten()).view_as(self.index)

    def options(self) -> dict:
        """Widths, buckets, and whether there is a bias; the index is a tensor of the file."""
        return super().options() | {"buckets": len(self.values)}


# --- S-06 HashedNets --------------------------------------------------------------------------------------------------

XX_PRIMES = (2654435761, 2246822519, 3266489917, 668265263, 374761393)  # of xxHash
MASK_32 = 2**32 - 1


def xxh32(rows: torch.Tensor, columns: torch.Tensor, seed: int) -> torch.Tensor:
    """xxHash32 of the pair (row, column), written as two unsigned 32-bit numbers; int64, in the shape to which both broadcast.

    All arithmetic is modulo 2^32. The hash of Chen et al. 2015 (ICML), whose code writes the pair as a text.
    """
    _, second, third, fourth, fifth = XX_PRIMES
    state = (seed + fifth + 8) & MASK_32  # 8 bytes are hashed
    for word in (rows.long(), columns.long()):
        state = (state + word * third) & MASK_32
        state = (((state << 17) | (state >> 15)) * fourth) & MASK_32
    for shift, prime in ((15, second), (13, third), (16, 1)):
        state = ((state ^ (state >> shift)) * prime) & MASK_32
    return state


def signed_buckets(rows: torch.Tensor, columns: torch.Tensor, buckets: int, seed: int) -> torch.Tensor:
    """Bucket chi(i, j) of every connection, in 0..m - 1, plus m where a second hash chi_+-(i, j) says that the sign is minus.

    So it is an index into the values followed by their negatives (`signed_values`).
    """
    minus = xxh32(rows, columns, ~seed) & 1  # another seed makes another hash function
    return xxh32(rows, columns, seed) % buckets + buckets * minus


def signed_values(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """The values (m,) at signed places in 0..2m - 1; any shape. A value's gradient is the signed sum over its connections."""
    return torch.cat([values, -values]).index_select(0, place.flatten()).view(place.shape)


class HashedLinear(ComposedLinear):
    """W_ij = chi_+-(i, j) values[chi(i, j)]: m values, and no index anywhere, since a hash of (i, j) finds it again.

    Chen et al. 2015 (ICML), survey 5.2. The file holds the values alone. In memory the hashes of all connections are kept, four
    bytes each, so that they need not be computed in every pass. Raises ValueError for no bucket, and for more than weights.
    """

    kind = "hashed_linear"

    def __init__(self, in_features: int, out_features: int, buckets: int, bias: bool = True, seed: int = 0):
        check_buckets(buckets, in_features * out_features)
        super().__init__(in_features, out_features, bias)
        self.buckets, self.seed = buckets, seed
        self.values = nn.Parameter(torch.randn(buckets) / in_features**0.5)
        rows, columns = torch.arange(out_features).unsqueeze(1), torch.arange(in_features)
        self.register_buffer("place", signed_buckets(rows, columns, buckets, seed).int(), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """A look-up: (out, in)."""
        return signed_values(self.values, self.place)

    def options(self) -> dict:
        """Widths, buckets, seed of the hash, and whether there is a bias."""
        return super().options() | {"buckets": self.buckets, "seed": self.seed}


class HashedVectors(WordVectors):
    """Word vectors from m values: a hash of (word, dimension) finds each number, a second one its sign.

    Chen et al. 2015 (ICML), survey 5.2. Nothing but the values is kept, in the file and in memory: the hashes of the words of a
    batch are computed when they are looked up. Raises ValueError for no bucket, and for more than numbers in the table.
    """

    kind = "hashed_vectors"
    heavy = True

    def __init__(self, num_embeddings: int, embedding_dim: int, buckets: int, seed: int = 0):
        check_buckets(buckets, num_embeddings * embedding_dim)
        super().__init__(num_embeddings, embedding_dim)
        self.buckets, self.seed = buckets, seed
        self.values = nn.Parameter(torch.randn(buckets) / embedding_dim**0.5)

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Signed buckets (n, embedding_dim) of word ids (n,)."""
        return signed_buckets(ids.unsqueeze(1), torch.arange(self.embedding_dim, device=ids.device), self.buckets, self.seed)

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors (n, embedding_dim) of word ids (n,)."""
        return signed_values(self.values, self.places(ids))

    def word_macs(self) -> int:
        """None: hashes and look-ups multiply no matrices."""
        return 0

    def options(self) -> dict:
        """Sizes of the table, buckets, and seed of the hash."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim,
                "buckets": self.buckets, "seed": self.seed}  # fmt: skip


# --- S-07 Toeplitz-like matrices --------------------------------------------------------------------------------------
# Z_f shifts a vector down by one; what falls out comes in again on top, times f. The powers of Z_f times v are the columns of
# Z_f(v): a circulant matrix for f = 1, a skew-circulant one for f = -1. A discrete Fourier transform diagonalises the first,
# and the second too, once entry t is turned by exp(-i pi t / n).


def unit_roots(n: int, odd: bool, like: torch.Tensor) -> torch.Tensor:
    """exp(-2 pi i t / n) for t = 0..n - 1, the eigenvalues of Z_1; where `odd`, t + 1/2 for t: those of Z_-1. Complex, (n,)."""
    angles = torch.arange(n, device=like.device, dtype=like.dtype) + (0.5 if odd else 0.0)
    return torch.polar(torch.ones_like(angles), -2 * math.pi / n * angles)


def half_turns(n: int, count: int, like: torch.Tensor) -> torch.Tensor:
    """exp(-i pi t / n) for t = 0..count - 1: the turn that makes a skew-circulant matrix circulant. Complex, (count,)."""
    return unit_roots(2 * n, False, like)[:count]


def skew_transform(x: torch.Tensor) -> torch.Tensor:
    """Spectrum in which Z_-1(u) x is a product entry by entry, of real x (..., n) with even n: complex (..., n / 2).

    The other half of the spectrum is its conjugate; x_t - i x_(t + n / 2) is all that a transform of half the length needs.
    """
    n = x.shape[-1]
    first, second = x.chunk(2, -1)
    return torch.fft.fft(torch.complex(first, -second) * half_turns(n, n // 2, x))


def skew_inverse(spectrum: torch.Tensor) -> torch.Tensor:
    """The inverse of `skew_transform`: complex (..., n / 2) to real (..., n)."""
    half = spectrum.shape[-1]
    pairs = torch.fft.ifft(spectrum) * half_turns(2 * half, half, spectrum.real).conj()
    return torch.cat([pairs.real, -pairs.imag], -1)


TOKENS_AT_ONCE = 64  # so that what their transforms need stays in a processor's cache


def toeplitz_product(g: torch.Tensor, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """1/2 sum_k Z_1(g_k) Z_-1(J h_k) x in O(rank n log n), J reversing a vector; for blocks, the sum over the blocks of a row.

    `g`, `h` (rows, columns, rank, n) with even n, `x` (tokens, columns, n), all real; returns (tokens, rows, n).
    """
    left, right = torch.fft.rfft(g), skew_transform(h.flip(-1))
    found = []
    for some in x.split(TOKENS_AT_ONCE):
        inner = skew_inverse(right * skew_transform(some)[:, None, :, None])  # (tokens, rows, columns, rank, n)
        spectrum = (left * torch.fft.rfft(inner)).sum((2, 3))
        found.append(torch.fft.irfft(spectrum, n=x.shape[-1]))
    return torch.cat(found) / 2


def toeplitz_matrix(g: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """1/2 sum_k Z_1(g_k) Z_-1(J h_k), dense: (..., n, n) from `g`, `h` (..., rank, n).

    Between the eigenvectors of Z_1 and Z_-1 the matrix with Z_1 W - W Z_-1 = sum_k g_k h_k^T is that sum, divided by the
    differences of their eigenvalues: O(n^2 (rank + log n)).
    """
    n = g.shape[-1]
    left, right = torch.fft.rfft(g), torch.fft.fft(h * half_turns(n, n, h)).conj()
    differences = unit_roots(n, False, g)[: n // 2 + 1, None] - unit_roots(n, True, h)
    rows = torch.fft.fft(left.transpose(-1, -2) @ right / differences) * half_turns(n, n, h)
    return torch.fft.irfft(rows, n=n, dim=-2) / n


def fft_macs(n: int, real: bool = False) -> int:
    """Multiply-adds of a fast Fourier transform of n numbers: half of the customary 5 n log2(n) FLOPs; half of that if real."""
    return round((1.25 if real else 2.5) * n * math.log2(n))


class ToeplitzLinear(ComposedLinear):
    """Square blocks of displacement rank r: 2 r n numbers each instead of n^2. n is the largest size that divides both widths.

    Lu, Sindhwani and Sainath 2016 (arXiv 1604.02594), survey 5.2; theory in Sindhwani et al. 2015 (arXiv 1510.01722). In
    evaluation each token passes Fourier transforms, in float32 (under autocast, too: bfloat16 has none), or, without `by_fft`,
    the matrix composed once a pass. In training it is always the latter: to compose a block costs what transforms cost for a
    hundred tokens. From rank n / 2 on nothing is saved. Raises ValueError for a rank outside 1..n and for an odd n.
    """

    kind = "toeplitz_linear"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, by_fft: bool = True):
        super().__init__(in_features, out_features, bias)
        n = math.gcd(in_features, out_features)
        if n % 2 or not 1 <= rank <= n:
            raise ValueError(f"square blocks of {out_features} x {in_features} weights have size {n}: it must be even, "
                             f"and the rank in 1..{n}, got {rank}")  # fmt: skip
        self.rank, self.by_fft = rank, by_fft
        start = torch.randn(2, out_features // n, in_features // n, rank, n) * (4 / (rank * n * in_features)) ** 0.25
        self.g, self.h = nn.Parameter(start[0]), nn.Parameter(start[1])

    @property
    def weight(self) -> torch.Tensor:
        """All blocks side by side: (out, in)."""
        blocks = toeplitz_matrix(self.g.float(), self.h.float())
        return blocks.transpose(1, 2).reshape(self.out_features, self.in_features).to(self.g.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        if self.training or not self.by_fft:
            return super().forward(x)
        _, columns, _, n = self.g.shape
        y = toeplitz_product(self.g.float(), self.h.float(), x.float().reshape(-1, columns, n))
        y = y.reshape(*x.shape[:-1], self.out_features)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def options(self) -> dict:
        """Widths, rank, way of multiplying, and whether there is a bias."""
        return super().options() | {"rank": self.rank, "by_fft": self.by_fft}

    def macs(self, length: int) -> int:
        """In evaluation, of transforms and matrix products: those of the weights once a pass, the others for each token."""
        rows, columns, rank, n = self.g.shape
        skew, real, pairs = fft_macs(n // 2), fft_macs(n, real=True), rows * columns * rank
        if self.by_fft:
            return pairs * (skew + real) + length * (columns * skew + pairs * (skew + real) + rows * real)
        half = n // 2 + 1
        block = rank * (real + fft_macs(n) + half * n) + half * fft_macs(n) + n * real
        return rows * columns * block + super().macs(length)


# --- S-08 quaternions -------------------------------------------------------------------------------------------------

HAMILTON_SIGNS = ((1, -1, -1, -1), (1, 1, -1, 1), (1, 1, 1, -1), (1, -1, 1, 1))  # of the component a ^ b in block (a, b)


def hamilton_matrix(components: torch.Tensor) -> torch.Tensor:
    """The real matrix (out, in) of the product with quaternions from the left, given their `components` (4, out / 4, in / 4).

    [[r, -i, -j, -k], [i, r, -k, j], [j, k, r, -i], [k, -j, i, r]]: vectors hold their real components first, then those of i,
    j and k.
    """
    a = torch.arange(4, device=components.device)
    signs = torch.tensor(HAMILTON_SIGNS, device=components.device, dtype=components.dtype)
    blocks = components[a[:, None] ^ a] * signs[:, :, None, None]  # (4, 4, out / 4, in / 4)
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


class QuaternionLinear(ComposedLinear):
    """Quaternions multiply quaternions: a quarter of a dense layer's weights, each in four places; its multiply-adds stay.

    Tay et al. 2019 (arXiv 1906.04393), survey 5.2. Raises ValueError where 4 does not divide both widths.
    """

    kind = "quaternion_linear"

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        if in_features % 4 or out_features % 4:
            raise ValueError(f"a quaternion has four components: 4 must divide {in_features} inputs and {out_features} outputs")
        super().__init__(in_features, out_features, bias)
        self.components = nn.Parameter(torch.randn(4, out_features // 4, in_features // 4) / in_features**0.5)

    @property
    def weight(self) -> torch.Tensor:
        """Sixteen blocks of four matrices: (out, in)."""
        return hamilton_matrix(self.components)
