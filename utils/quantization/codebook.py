"""Survey section 3.3: quantization by codebooks. k-means, static and trained; product and residual; multi-bit binary codes.

The levels follow the weights instead of a grid. Scalars: k centroids (`StaticKMeans`, `TrainedKMeans`). Vectors: one index for
several weights (`ProductQuantizer`, `ResidualQuantizer`). Binary codes: all sums +-alpha_1 +-...+- alpha_k (`MultiBitQuantizer`).
Codebooks are fitted when a quantizer is made, so these take the weight: `attach(model, lambda m: StaticKMeans(m.weight, 4))`.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from utils import encodings
from utils.encodings import Encoded, decode_bits, look_up, paste_columns
from utils.quantization.quantizer import Quantizer, ascending, check_bits, check_weight, remembered

CHUNK = 2**24  # distances held at a time
CONVERGED = 1000  # more iterations than k-means of numbers needs until no centroid moves


def check_count(k: int, available: int, what: str) -> None:
    """Raise ValueError where there are fewer points than centroids."""
    if k > available:
        raise ValueError(f"{k} centroids need as many {what}, the weight has {available}: take fewer bits")


# --- k-means of scalars ---------------------------------------------------------------------------------------------


def linear_init(x: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
    """k centroids evenly spaced from the smallest to the largest value: the rare large weights get theirs. x is sorted."""
    return x[0] + (x[-1] - x[0]) * (torch.arange(k, device=x.device) / max(1, k - 1))


def density_init(x: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
    """The middle of each of k equally filled bins: centroids where the weights are. x is sorted."""
    middles = (torch.arange(k, device=x.device) + 0.5) / k * len(x)
    return x[middles.long()]


def plus_plus_init(x: torch.Tensor, k: int, seed: int = 0, sample: int = 2**16) -> torch.Tensor:
    """k-means++: each next centroid is a value drawn with a probability proportional to its squared distance to the chosen ones.

    Arthur, Vassilvitskii 2007. x is sorted; a long one is thinned out evenly to at least `sample` values first.
    """
    x = x[:: max(1, len(x) // sample)].cpu()
    generator = torch.Generator().manual_seed(seed)
    chosen = [x[torch.randint(len(x), (1,), generator=generator)]]
    distance = (x - chosen[0]).square()
    for _ in range(k - 1):
        share = distance if distance.sum() > 0 else torch.ones_like(distance)  # fewer different values than centroids
        drawn = torch.rand(1, generator=generator) * share.sum()
        chosen.append(x[torch.searchsorted(share.cumsum(0), drawn).clamp(max=len(x) - 1)])
        distance = torch.minimum(distance, (x - chosen[-1]).square())
    return torch.cat(chosen).sort().values


INITS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "linear": linear_init, "density": density_init, "++": plus_plus_init,
}  # fmt: skip


def prefix_sums(x: torch.Tensor) -> torch.Tensor:
    """S with S[j] - S[i] = x[i] + ... + x[j-1], float64, (n + 1,)."""
    return torch.nn.functional.pad(x.double().cumsum(0), (1, 0))


def borders(centroids: torch.Tensor) -> torch.Tensor:
    """Halfway between neighbours: where the nearest of the sorted centroids changes, (..., k - 1)."""
    return (centroids[..., 1:] + centroids[..., :-1]) / 2


def lloyd(x: torch.Tensor, centroids: torch.Tensor, iterations: int = CONVERGED) -> torch.Tensor:
    """Lloyd's algorithm on sorted values: move each centroid to the mean of the values nearest to it, until nothing moves.

    In one dimension a cluster is a stretch of the sorted values, and its mean a difference of two prefix sums: one iteration
    costs k binary searches, however many weights there are. An empty cluster stays where it is.
    """
    S, n = prefix_sums(x), torch.tensor([len(x)], device=x.device)
    for _ in range(iterations):
        ends = torch.searchsorted(x, borders(centroids), right=True)
        cuts = torch.cat([torch.zeros_like(n), ends, n])
        counts = cuts.diff()
        moved = torch.where(counts > 0, S[cuts].diff() / counts.clamp(min=1), centroids.double()).to(x.dtype)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


@remembered
def kmeans(weight: torch.Tensor, k: int, init: str = "++", iterations: int = CONVERGED, seed: int = 0) -> torch.Tensor:
    """The k centroids of a weight's entries, sorted, (k,). Raises ValueError for an unknown init and too few entries."""
    check_weight(weight)
    check_count(k, weight.numel(), "values")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    x = ascending(weight.float())
    return lloyd(x, INITS[init](x, k, seed).to(x.device).sort().values, iterations)


def nearest(weight: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The index of the nearest of the sorted centroids, for every entry."""
    return torch.bucketize(weight.detach().float(), borders(centroids))


class StaticKMeans(Quantizer):
    """Static k-means: 2^bits centroids per matrix, fitted once to the trained weights. Muller, Indiveri 2015, survey 3.3.

    `init` is `++`, `linear` or `density`. Raises ValueError for bits outside 1 to 8 and more centroids than weights.
    """

    def __init__(self, weight: torch.Tensor, bits: int, init: str = "++", iterations: int = CONVERGED, seed: int = 0):
        super().__init__()
        check_bits(bits)
        self.bits = bits
        self.register_buffer("centroids", kmeans(weight, 2**bits, init, iterations, seed))

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest centroid of every weight."""
        return self.centroids[nearest(weight, self.centroids)].to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed indices and the codebook."""
        return encodings.codebook(nearest(weight, self.centroids), self.centroids.unsqueeze(1), weight.shape, self.bits)


class SharedWeights(torch.autograd.Function):
    """w_ij = c[I_ij]; backwards dL/dc_k = sum over all ij with I_ij = k of dL/dw_ij."""

    @staticmethod
    def forward(ctx, centroids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Look the centroids up: (k,) and indices of any shape give a weight of that shape."""
        ctx.save_for_backward(index)
        ctx.k = len(centroids)
        return centroids[index.long()]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gather the gradients of all weights that share a centroid."""
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.k).scatter_add_(0, index.flatten().long(), gradient.flatten()), None


class TrainedKMeans(Quantizer):
    """Trained k-means, the weight sharing of Deep Compression (Han et al. 2015, survey 3.3): only the 2^bits centroids learn.

    Indices are fixed when the quantizer is made; the weight underneath gets no gradient. Linear initialisation is the paper's
    choice. Raises ValueError for bits outside 1 to 8 and more centroids than weights.
    """

    def __init__(self, weight: torch.Tensor, bits: int, init: str = "linear", iterations: int = CONVERGED, seed: int = 0):
        super().__init__()
        check_bits(bits)
        self.bits = bits
        self.centroids = nn.Parameter(kmeans(weight, 2**bits, init, iterations, seed).clone())
        self.register_buffer("index", nearest(weight, self.centroids.detach()).to(torch.uint8))

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The centroid of every weight's index, whatever the weight is by now."""
        return SharedWeights.apply(self.centroids, self.index).to(weight.dtype)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """As `quantize`: the gradient goes to the centroids."""
        return self.quantize(weight)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed indices and the codebook."""
        return encodings.codebook(self.index, self.centroids.detach().unsqueeze(1), weight.shape, self.bits)

    def counts(self) -> list[int]:
        """How often each index occurs: what Huffman coding needs."""
        return torch.bincount(self.index.flatten().long(), minlength=2**self.bits).tolist()


# --- Huffman coding of the indices ----------------------------------------------------------------------------------


def huffman_lengths(counts: Sequence[int]) -> list[int]:
    """Bits of each symbol's Huffman code word, 0 for a symbol that never occurs. Han et al. 2015, survey 3.3.

    The two rarest groups of symbols merge until one is left; every merge makes the words of its symbols one bit longer.
    """
    lengths = [0] * len(counts)
    heap = [(count, [symbol]) for symbol, count in enumerate(counts) if count]
    heapq.heapify(heap)
    if len(heap) == 1:
        lengths[heap[0][1][0]] = 1  # even a lone symbol must be written
    while len(heap) > 1:
        (a, left), (b, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, left + right))
    return lengths


def huffman_bits(counts: Sequence[int]) -> int:
    """Size of the coded indices in bits, without the table of code lengths."""
    return sum(count * length for count, length in zip(counts, huffman_lengths(counts), strict=True))


def entropy_bits(counts: Sequence[int]) -> float:
    """The lower bound of any symbol code: n * H with H = -sum p log2 p."""
    n = sum(counts)
    return -sum(count * math.log2(count / n) for count in counts if count)


def sharing_rate(n: int, k: int, b: int = 32) -> float:
    """r = n b / (n log2 k + k b): what n weights of b bits save when they share k values. Han et al. 2015, survey 3.3."""
    return n * b / (n * math.log2(k) + k * b)


# --- k-means of vectors: points (sets, points, d), centroids (sets, k, d) -------------------------------------------


def nearest_vector(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The index of the nearest centroid of each point, (sets, points), as the least |c|^2 - 2 p.c."""
    half_norm = centroids.square().sum(-1).unsqueeze(1) / 2
    step = max(1, CHUNK // (centroids.shape[0] * centroids.shape[1]))
    with torch.autocast(points.device.type, enabled=False):  # bfloat16 would find other neighbours
        pieces = [(half_norm - p @ centroids.mT).argmin(-1) for p in points.split(step, dim=1)]
    return torch.cat(pieces, dim=1)


def mean_vectors(points: torch.Tensor, index: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The mean of the points of each index; an index without points keeps its centroid."""
    sums = torch.zeros_like(centroids, dtype=torch.float64).scatter_add_(
        1, index.unsqueeze(-1).expand_as(points), points.double()
    )
    counts = (
        sums.new_zeros(sums.shape[:2]).scatter_add_(1, index, torch.ones_like(sums[:, :1, 0]).expand(index.shape)).unsqueeze(-1)
    )
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).to(centroids), centroids)


@dataclass(frozen=True)
class Fit:
    """How a codebook of vectors is fitted: at most so many iterations, on so many of each set's points (None: all)."""

    iterations: int = 25
    sample: int | None = None
    seed: int = 0


def kmeans_vectors(points: torch.Tensor, k: int, fit: Fit | None = None) -> torch.Tensor:
    """Lloyd's algorithm on several sets of points at once, until no point changes its centroid or the iterations are used up.

    It starts from k different points of each set, and looks at a random sample of them where `fit` says so.
    """
    fit = fit or Fit()
    order = torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(fit.seed)).to(points.device)
    if fit.sample is not None:
        points, order = points[:, order[: max(k, fit.sample)]], torch.arange(len(order), device=points.device)
    centroids, index = points[:, order[:k]], None
    for _ in range(fit.iterations):
        before, index = index, nearest_vector(points, centroids)
        if before is not None and torch.equal(before, index):
            break
        centroids = mean_vectors(points, index, centroids)
    return centroids


def cut_columns(weight: torch.Tensor, s: int) -> torch.Tensor:
    """W (m, n) as s sets of m sub-rows, (s, m, n / s)."""
    return weight.unflatten(1, (s, -1)).transpose(0, 1).contiguous()


class ProductQuantizer(Quantizer):
    """Product quantization: W is cut into s blocks of columns, each with a codebook of 2^bits sub-rows.

    Gong et al. 2014, survey 3.3. A sub-row costs one index: the rate is 32 m n / (32 k n + log2(k) m s) for W (m, n).
    `axis="rows"` cuts the rows instead, and sub-columns share. `shared`: one codebook for all blocks, because those of a small
    matrix can outweigh its codes; the codebooks' share of the bits is then s times smaller. Raises ValueError for bits outside 1 to
    8, an `s` that does not divide the axis, and more centroids than sub-vectors of a codebook.
    """

    def __init__(
        self, weight: torch.Tensor, s: int, bits: int = 8, axis: str = "columns", shared: bool = False, fit: Fit | None = None
    ):
        super().__init__()
        check_bits(bits)
        check_weight(weight)
        if axis not in ("columns", "rows"):
            raise ValueError(f"axis must be 'columns' or 'rows', got {axis!r}")
        length = weight.shape[1 if axis == "columns" else 0]
        if s < 1 or length % s:
            raise ValueError(f"s must divide the {length} {axis}, got {s}")
        self.bits, self.s, self.axis, self.shared = bits, s, axis, shared
        points = self.points(weight)
        check_count(2**bits, points.shape[1], "sub-vectors per codebook")
        self.register_buffer("centroids", kmeans_vectors(points, 2**bits, fit))

    def points(self, weight: torch.Tensor) -> torch.Tensor:
        """The sub-vectors of a weight, a set per codebook: (s, points, d), shared (1, s * points, d)."""
        w = weight.detach().float()
        cut = cut_columns(w if self.axis == "columns" else w.T, self.s)
        return cut.flatten(0, 1).unsqueeze(0) if self.shared else cut

    def indices(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest sub-vector of each block's codebook, (s, points)."""
        return nearest_vector(self.points(weight), self.centroids).view(self.s, -1)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Every sub-row as its codebook has it."""
        w = paste_columns(look_up(self.centroids.expand(self.s, -1, -1), self.indices(weight)))
        return (w if self.axis == "columns" else w.T).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed indices (s, points) and s codebooks, or one."""
        return encodings.product(self.indices(weight), self.centroids, weight.shape, self.bits, self.axis)


def product_rate(m: int, n: int, s: int, k: int) -> float:
    """r = 32 m n / (32 k n + log2(k) m s), survey 3.3."""
    return 32 * m * n / (32 * k * n + math.log2(k) * m * s)


def residual_rate(m: int, n: int, t: int, k: int) -> float:
    """r = 32 m n / (32 t k n + t m log2 k) for t rounds on whole rows; the survey prints m / (t k + log2(k) t n), a slip."""
    return 32 * m * n / (32 * t * k * n + t * m * math.log2(k))


class ResidualQuantizer(Quantizer):
    """Residual quantization: k-means on the rows, then on what is left of them, t times; w = c_1 + ... + c_t. Gong et al. 2014.

    Survey 3.3. `length` cuts rows into pieces, and all pieces share the t codebooks (None: whole rows, as in the paper, where the
    codebooks can outweigh the matrix). Raises ValueError for bits outside 1 to 8, t below 1, a length that does not divide the row, and
    more centroids than vectors.
    """

    def __init__(self, weight: torch.Tensor, t: int, bits: int = 8, length: int | None = None, fit: Fit | None = None):
        super().__init__()
        check_bits(bits)
        check_weight(weight)
        self.bits, self.length = bits, length or weight.shape[1]
        if t < 1 or self.length < 1 or weight.shape[1] % self.length:
            raise ValueError(f"t must be 1 or more and length divide the {weight.shape[1]} columns, got {t} and {length}")
        check_count(2**bits, weight.numel() // self.length, "vectors")
        residual, codebooks = self.points(weight), []
        for _ in range(t):
            codebooks.append(kmeans_vectors(residual, 2**bits, fit))
            residual = residual - look_up(codebooks[-1], nearest_vector(residual, codebooks[-1]))
        self.register_buffer("centroids", torch.cat(codebooks))  # (t, k, length)

    def points(self, weight: torch.Tensor) -> torch.Tensor:
        """The pieces of all rows, (1, points, length)."""
        return weight.detach().float().reshape(1, -1, self.length)

    def indices(self, weight: torch.Tensor) -> torch.Tensor:
        """One index per round and piece, (t, points), chosen round by round."""
        residual, indices = self.points(weight), []
        for C in self.centroids.split(1):
            indices.append(nearest_vector(residual, C))
            residual = residual - look_up(C, indices[-1])
        return torch.cat(indices)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum of the chosen vectors of all rounds."""
        return look_up(self.centroids, self.indices(weight)).sum(0).view_as(weight).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed indices (t, points) and t codebooks."""
        return encodings.residual(self.indices(weight), self.centroids, weight.shape, self.bits)


# --- multi-bit binary codes: w (rows, n), alpha (rows, k), B (rows, k, n) of -1 and 1 -------------------------------


def signs(w: torch.Tensor) -> torch.Tensor:
    """-1 for a negative value, else 1."""
    return torch.where(w < 0, -1.0, 1.0).to(w)


def least_squares(w: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """alpha = (B^T B)^-1 B^T w of each row; pseudo-inverse where two codes of a row are equal."""
    with torch.autocast(w.device.type, enabled=False):  # bfloat16 cannot count the entries of a row
        gram, target = ((B @ other).double() / w.shape[-1] for other in (B.mT, w.unsqueeze(-1)))
    return (torch.linalg.pinv(gram, hermitian=True, rtol=1e-6) @ target).squeeze(-1).to(w.dtype)


def greedy_bits(w: torch.Tensor, k: int, refine: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy codes: b_i = sign(r), alpha_i = |r|_1 / n, r the residual so far. Guo et al. 2017 (network sketching), survey 3.3.

    Refined: after each new b all alphas so far are solved for again by least squares, and the residual is that of the new ones.
    """
    r, alpha, B = w, w[:, :0], w.unsqueeze(1)[:, :0]
    for _ in range(k):
        B = torch.cat([B, signs(r).unsqueeze(1)], dim=1)
        alpha = least_squares(w, B) if refine else torch.cat([alpha, r.abs().mean(-1, keepdim=True)], dim=1)
        r = w - decode_bits(alpha, B)
    return alpha, B


def recode(w: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The best B for given alphas: per entry the nearest of the 2^k sorted values +-alpha_1 +-...+- alpha_k, by binary search."""
    k = alpha.shape[-1]
    numbers = torch.arange(2**k, device=w.device).unsqueeze(-1) >> torch.arange(k, device=w.device)
    S = (2 * (numbers & 1) - 1).to(w)  # (2^k, k): all sign patterns
    values, order = (alpha.unsqueeze(1) * S).sum(-1).sort(-1)
    index = torch.searchsorted(borders(values).contiguous(), w.contiguous())
    return torch.stack([S[:, i][order].gather(-1, index) for i in range(k)], dim=1)


def alternating_bits(
    w: torch.Tensor, k: int, cycles: int = 2, alpha: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alternate the best alphas for the codes and the best codes for the alphas, from the greedy start or from given alphas.

    Xu et al. 2018, survey 3.3. Neither step can make the error larger; two cycles suffice, says the paper.
    """
    if alpha is None:
        alpha, B = greedy_bits(w, k)
    else:
        B = recode(w, alpha)
    for _ in range(cycles):
        alpha = least_squares(w, B)
        B = recode(w, alpha)
    return alpha, B


MULTI_BIT: dict[str, Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]] = {
    "greedy": greedy_bits,
    "refined": lambda w, k: greedy_bits(w, k, refine=True),
    "alternating": alternating_bits,
}


class MultiBitQuantizer(Quantizer):
    """k binary codes with a scale each, per row: w = sum_i alpha_i b_i. Guo et al. 2017, Xu et al. 2018, survey 3.3.

    `method` is `greedy`, `refined` or `alternating`. Trained with it, the model solves Xu's bi-level problem: the codes are the
    inner minimum for the present weights, found anew in every step, and the gradient at the quantized weights moves the weights
    underneath. `alternating` goes on from the alphas of the step before, one cycle a step. Takes any shape (..., n), so
    `quantized_inputs` may use it for activations (which must not be trained: their rows are other tokens each time). Raises
    ValueError for bits outside 1 to 8.
    """

    def __init__(self, bits: int, method: str = "alternating"):
        super().__init__()
        check_bits(bits)
        if method not in MULTI_BIT:
            raise ValueError(f"method must be one of {', '.join(MULTI_BIT)}, got {method!r}")
        self.bits, self.method = bits, method
        self.held: torch.Tensor | None = None  # alphas of the last training step
        self.eval()  # until a training loop says otherwise

    def codes(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha (rows, k) and B (rows, k, n)."""
        check_weight(weight)
        w = weight.detach().float().flatten(0, -2)
        if self.method != "alternating" or self.held is None:
            alpha, B = MULTI_BIT[self.method](w, self.bits)
        else:
            alpha, B = alternating_bits(w, self.bits, 1, self.held)
        if self.training:
            self.held = alpha
        return alpha, B

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum of the scaled codes."""
        return decode_bits(*self.codes(weight)).view_as(weight).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """One packed bit per entry and code, and k scales per row."""
        alpha, B = self.codes(weight)
        return encodings.multi_bit(B, alpha, weight.shape)
