"""Survey section 3.3: uniform k-bit quantization of weights and activations, powers of two, balanced quantization.

A range [lo, hi] is cut into 2^bits - 1 equal steps; what differs is who shares a range (a tensor, a row, a group of columns),
where the range ends (at the largest value, or earlier), and whether zero must be one of the levels (`symmetric`). Powers of
two space the levels unevenly, balanced quantization fills them evenly.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from utils import bert, encodings
from utils.bert import ENCODER, linear_matrices
from utils.encodings import Encoded
from utils.parts import register_dense
from utils.quantization.quantizer import Quantizer, ascending, check_bits, check_weight, remembered, straight_through
from utils.training import to_device

Range = tuple[torch.Tensor, torch.Tensor]
RangeFunction = Callable[[torch.Tensor, int, bool], Range]
GRANULARITIES = ("tensor", "row", "group")
OPERANDS = ("query", "key", "value", "probabilities")
QUANTIZED_ATTENTION = "companion_quantized"
CHUNK = 2**22  # borders that a search holds at a time
POLISH = 4  # least-squares steps after the scales that a search tries
REFRESH = 10  # training steps that balanced borders live


# --- the printed formulas -------------------------------------------------------------------------------------------


def q_k(x: torch.Tensor, bits: int) -> torch.Tensor:
    """q_k(x) = floor((2^k - 1) x + 0.5) / (2^k - 1) for x in [0, 1]; k is `bits`. Survey 3.3."""
    n = 2**bits - 1
    return torch.floor(n * x + 0.5) / n


def q_k_signed(x: torch.Tensor, bits: int) -> torch.Tensor:
    """q_k(x) = 2 (round((2^k - 1) (x + 1) / 2) / (2^k - 1) - 0.5) for x in [-1, 1]: at k = 1 the levels are -1 and 1."""
    n = 2**bits - 1
    return 2 * (torch.round(n * (x + 1) / 2) / n - 0.5)


def q_k_general(X: torch.Tensor, bits: int) -> torch.Tensor:
    """Q(X) = alpha * q_k((X - beta) / alpha) + beta with alpha = max X - min X and beta = min X, for any X. Survey 3.3."""
    beta = X.min()
    alpha = (X.max() - beta).clamp(min=torch.finfo(X.dtype).tiny)  # a constant X has no width
    return alpha * q_k((X - beta) / alpha, bits) + beta


# --- levels and codes -----------------------------------------------------------------------------------------------


def affine(
    lo: torch.Tensor, hi: torch.Tensor, bits: int, symmetric: bool, zero_on_grid: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of value = scale * (code - zero) over the range [lo, hi].

    Symmetric: code n = 2^(bits-1) - 1 means 0.0, n codes lie on each side, one code stays unused. Asymmetric: the 2^bits codes
    reach from lo to hi, moved by less than a step so that one of them means 0.0 (Jacob et al. 2018), or, without
    `zero_on_grid`, exactly from lo to hi (`q_k_general`). One bit has no room for a zero between two signs: it takes lo and hi.
    """
    if bits > 1 and zero_on_grid:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    n = 2 ** (bits - 1) - 1 if symmetric and bits > 1 else (2**bits - 1) / 2
    scale = (hi - lo) / (2 * n)
    scale = torch.where(scale > 0, scale, lo.abs())  # all values equal: code 0 must be that value
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if symmetric and bits > 1:
        return scale, torch.full_like(scale, n)
    return scale, torch.round(-lo / scale) if bits > 1 and zero_on_grid else -lo / scale


def top_code(bits: int, symmetric: bool) -> int:
    """The largest code: with a zero in the middle of a symmetric grid one of the 2^bits codes stays unused."""
    return 2**bits - 2 if symmetric and bits > 1 else 2**bits - 1


def to_codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """code = clamp(round(x / scale + zero)), a whole number in [0, 2^bits)."""
    return torch.round(x / scale + zero).clamp(0, top_code(bits, symmetric))


def from_codes(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """value = scale * (code - zero)."""
    return scale * (codes - zero)


def fake_quantize(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """Round to the levels of a range and come back: floating-point numbers with at most 2^bits different values."""
    scale, zero = affine(lo, hi, bits, symmetric)
    return from_codes(to_codes(x, scale, zero, bits, symmetric), scale, zero)


# --- ranges: x has shape (..., n), and lo and hi have shape (..., 1) -----------------------------------------------


def max_range(x: torch.Tensor, bits: int, symmetric: bool) -> Range:
    """From the smallest to the largest value; symmetric: from -max|x| to max|x|. Nothing is clipped."""
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if symmetric:
        hi = torch.maximum(hi, -lo)
        lo = -hi
    return lo, hi


def clip_at(x: torch.Tensor, c: torch.Tensor, symmetric: bool) -> Range:
    """The range [-c, c]; asymmetric: what of it the values of x reach."""
    lo, hi = max_range(x, 0, False)
    return (-c, c) if symmetric else (torch.maximum(lo, -c), torch.maximum(torch.minimum(hi, c), torch.maximum(lo, -c)))


def percentile_range(x: torch.Tensor, bits: int, symmetric: bool, share: float = 0.999) -> Range:
    """Cut the tails off: `share` of the values lie below hi, and as many above lo (symmetric: `share` of |x| below hi)."""
    if not 0.5 <= share <= 1:
        raise ValueError(f"share must lie in 0.5 to 1, got {share}")
    n = x.shape[-1]
    k = math.ceil(share * n)
    if symmetric:
        hi = x.abs().kthvalue(k, -1, keepdim=True).values
        return -hi, hi
    return x.kthvalue(n + 1 - k, -1, keepdim=True).values, x.kthvalue(k, -1, keepdim=True).values


def mean_range(x: torch.Tensor, bits: int, symmetric: bool) -> Range:
    """A range 2.5 * mean|x| wide, as in the quantized recurrent networks of He et al. 2016: cheap, and blind to outliers."""
    return clip_at(x, 1.25 * x.abs().mean(-1, keepdim=True), symmetric)


@dataclass
class SortedValues:
    """Sorted values of every range, (ranges, n), and their sums from the left, (ranges, n + 1), float64: no search looks at the rest."""

    values: torch.Tensor
    sums: torch.Tensor
    square: torch.Tensor  # sum of squares, (ranges, 1)

    @classmethod
    def of(cls, x: torch.Tensor) -> "SortedValues":
        """From x (ranges, n)."""
        values = np.sort(x.numpy(force=True), -1)
        sums = np.zeros((len(values), values.shape[-1] + 1))
        np.cumsum(values, -1, dtype=np.float64, out=sums[:, 1:])
        square = np.einsum("ij,ij->i", values, values, dtype=np.float64)[:, None]
        return cls(*(torch.from_numpy(part).to(x.device) for part in (values, sums, square)))

    def split(self, step: int) -> list["SortedValues"]:
        """Pieces of at most `step` ranges."""
        parts = (part.split(step) for part in (self.values, self.sums, self.square))
        return [SortedValues(*part) for part in zip(*parts, strict=True)]

    def stretches(self, borders: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many values lie between neighbouring borders, and their sum, (ranges, scales, levels); `borders` (ranges, scales, levels - 1)."""
        ends = torch.searchsorted(self.values, borders.flatten(1).to(self.values.dtype)).view(borders.shape)
        ends = nn.functional.pad(nn.functional.pad(ends, (1, 0)), (0, 1), value=self.values.shape[-1])
        return ends.diff(), self.sums.gather(1, ends.flatten(1)).view(ends.shape).diff()


def least_error_scale(
    x: SortedValues, widest: torch.Tensor, zero: torch.Tensor, top: int, tries: int = 25
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale at which the levels scale * (code - zero), code = 0, ..., top, have the least squared error to x; and that error.

    `widest` and `zero` (ranges, 1). Tries widest * 2^(-i/4), i = 0, ..., tries - 1, then nine scales around the best, and from there
    alternates the nearest codes and the least-squares scale. Every error is exact and costs `top` binary searches, however many
    values there are.
    """
    step = max(1, CHUNK // (tries * top))
    if len(zero) > step:
        parts = zip(x.split(step), widest.split(step), zero.split(step), strict=True)
        found = [least_error_scale(*part, top, tries) for part in parts]
        return torch.cat([scale for scale, _ in found]), torch.cat([error for _, error in found])
    b = (torch.arange(top + 1, device=zero.device) - zero.double()).unsqueeze(1)  # (ranges, 1, levels)

    def error(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts, sums = x.stretches(scale.unsqueeze(-1) * (b[..., :-1] + 0.5))
        square, product = (b.square() * counts).sum(-1), (b * sums).sum(-1)
        return scale * (scale * square - 2 * product), torch.where(product > 0, product / square, scale)

    scale = widest.double()
    for steps in (-torch.arange(tries) / 4, torch.arange(-4, 5) / 16):
        scale = scale * 2 ** steps.to(zero.device)
        scale = scale.gather(1, error(scale)[0].argmin(-1, keepdim=True))
    for _ in range(POLISH):
        scale = error(scale)[1]
    return scale.to(x.values.dtype), error(scale)[0] + x.square


def mse_range(x: torch.Tensor, bits: int, symmetric: bool, tries: int = 25) -> Range:
    """The shrunken range r * [lo, hi] whose quantized values have the least mean squared error.

    At few bits it pays to clip the largest values: all others then get finer steps. `tries` see `least_error_scale`.
    """
    widest, zero = affine(*max_range(x, bits, symmetric), bits, symmetric)
    top = top_code(bits, symmetric)
    ranges = SortedValues.of(x.reshape(-1, x.shape[-1]))
    scale = least_error_scale(ranges, widest.view(-1, 1), zero.view(-1, 1), top, tries)[0].view(widest.shape)
    return -scale * zero, scale * (top - zero)


def kl_range(x: torch.Tensor, bits: int, symmetric: bool, candidates: int = 32) -> Range:
    """Clip at the c of smallest KL divergence between the histogram of |x|, clipped at c, and its 2^(bits-1)-level version.

    The calibration of integer inference engines, made for 8 bits and for many values per range.
    """
    a, levels = x.abs(), 2 ** (bits - 1)
    top, bins = a.amax(-1, keepdim=True), candidates * levels
    index = (a / top.clamp(min=torch.finfo(a.dtype).tiny) * bins).long().clamp(max=bins - 1)
    counts = a.new_zeros(*a.shape[:-1], bins).scatter_add_(-1, index, torch.ones_like(a))
    # Below a quarter of the range hardly a bin is left to a level, and any distribution looks faithfully kept.
    tries = range(max(1, candidates // 4), candidates + 1)
    divergence = torch.stack([clip_divergence(counts, levels * j, levels) for j in tries])
    return clip_at(x, top * (divergence.argmin(0) + tries[0]).unsqueeze(-1) / candidates, symmetric)


def clip_divergence(counts: torch.Tensor, kept: int, levels: int) -> torch.Tensor:
    """KL(P || Q): P, the first `kept` bins plus all clipped values in the last; Q, those bins averaged inside each level."""
    inside = counts[..., :kept].unflatten(-1, (levels, -1))
    filled = inside > 0
    Q = filled * inside.sum(-1, keepdim=True) / filled.sum(-1, keepdim=True).clamp(min=1)
    P = inside.flatten(-2).clone()
    P[..., -1] += counts[..., kept:].sum(-1)
    P, Q = (h / h.sum(-1, keepdim=True).clamp(min=1) for h in (P, Q.flatten(-2)))
    return torch.where(P > 0, P * torch.log(P / Q.clamp(min=1e-12)), 0).sum(-1)


RANGES: dict[str, RangeFunction] = {
    "max": max_range, "percentile": percentile_range, "mean": mean_range, "mse": mse_range, "kl": kl_range,
}  # fmt: skip


# For weights, of which every trial has a copy. Activations never come twice: remembering them would only take time.
SEARCHED: dict[str, RangeFunction] = {**RANGES, "mse": remembered(mse_range), "kl": remembered(kl_range)}


def range_function(clip: str | RangeFunction, rules: dict[str, RangeFunction] = RANGES) -> RangeFunction:
    """A rule by its name, or any function of (x, bits, symmetric). Raises ValueError for an unknown name."""
    if callable(clip):
        return clip
    if clip not in rules:
        raise ValueError(f"clip must be one of {', '.join(rules)}, got {clip!r}")
    return rules[clip]


# --- weights --------------------------------------------------------------------------------------------------------


def refit_scale(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """The least-squares scale <x, b> / <b, b> for the present codes b = code - zero of each range of x (..., n): one step towards `mse`."""
    b = to_codes(x, scale, zero, bits, symmetric) - zero
    product = (x * b).sum(-1, keepdim=True)
    return torch.where(product > 0, product / b.square().sum(-1, keepdim=True).clamp(min=1e-12), scale)


class UniformQuantizer(Quantizer):
    """Uniform k-bit quantization of a weight (rows, columns). Rastegari 2016, Hubara 2017, He et al. 2016, survey 3.3.

    `granularity` says who shares a range: the `tensor`, a `row`, or a `group` of `group_size` columns of a row. `clip` names the
    rule that ends the range (`RANGES`), or is such a rule. `zero_on_grid` see `affine`. In training the range of `clip="mse"` is
    searched once; then every step refits its scale (`refit_scale`). Raises ValueError for bits outside 1 to 8 and unknown names.
    """

    def __init__(
        self,
        bits: int,
        symmetric: bool = True,
        granularity: str = "tensor",
        group_size: int = 64,
        clip: str | RangeFunction = "max",
        zero_on_grid: bool = True,
    ):
        super().__init__()
        check_bits(bits)
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        self.bits, self.symmetric, self.granularity, self.group_size = bits, symmetric, granularity, group_size
        self.range, self.zero_on_grid = range_function(clip, SEARCHED), zero_on_grid
        self.follows = clip == "mse"
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None  # scale and zero of the last training step
        self.eval()  # until a training loop says otherwise: see `place`

    def grid(self, weight: torch.Tensor) -> tuple[int, int]:
        """How many ranges there are along the rows and along the columns."""
        rows, columns = weight.shape
        if self.granularity == "tensor":
            return 1, 1
        if self.granularity == "row":
            return rows, 1
        if self.group_size < 1 or columns % self.group_size:
            raise ValueError(f"group_size must divide the {columns} columns, got {self.group_size}")
        return rows, columns // self.group_size

    def search(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of every range, (rows, groups, 1), from the values x (rows, groups, values) alone."""
        return affine(*self.range(x, self.bits, self.symmetric), self.bits, self.symmetric, self.zero_on_grid)

    def place(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero: searched, or, once training has begun, refitted from those of its last step."""
        if self.held is None:
            scale, zero = self.search(x)
        else:
            scale, zero = refit_scale(x, *self.held, self.bits, self.symmetric), self.held[1]
        if self.follows and self.training:
            self.held = scale, zero
        return scale, zero

    def levels(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes (rows, groups, values of a range), scale and zero (rows, groups, 1)."""
        check_weight(weight)
        x = weight.detach().float().reshape(*self.grid(weight), -1)
        scale, zero = self.place(x)
        return to_codes(x, scale, zero, self.bits, self.symmetric), scale, zero

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest level of every weight."""
        return from_codes(*self.levels(weight)).view_as(weight).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed codes, and a scale and a zero per range."""
        codes, scale, zero = self.levels(weight)
        return encodings.uniform(codes.view_as(weight), scale.squeeze(-1), zero.squeeze(-1), self.bits)


@remembered
def even_grid(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero, (..., 1), of the grid of 2^bits levels that has the least squared error to each range of x (..., n).

    An even number of levels cannot lie around zero and contain it. Three grids compete in every range: symmetric, with zero halfway
    between two levels; zero a level and one level more below it; the same above it.
    """
    flat, top, found = x.flatten(0, -2), 2**bits - 1, []
    ranges, peak = SortedValues.of(flat), flat.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for zero in (top / 2, *((top // 2, top // 2 + 1) if bits > 1 else ())):
        places = torch.full_like(peak, zero)
        found.append((*least_error_scale(ranges, peak / min(zero, top - zero), places, top), places))
    scale, error, zero = (torch.stack(column) for column in zip(*found, strict=True))
    best = error.argmin(0, keepdim=True)
    return scale.gather(0, best)[0].view(*x.shape[:-1], 1), zero.gather(0, best)[0].view(*x.shape[:-1], 1)


class EvenQuantizer(UniformQuantizer):
    """Uniform k-bit quantization at its best: all 2^bits levels, evenly spaced, on the grid of least squared error (`even_grid`).

    `UniformQuantizer` keeps zero in the middle, which at two bits leaves three levels. Raises ValueError as that does.
    """

    def __init__(self, bits: int, granularity: str = "tensor", group_size: int = 64):
        super().__init__(bits, False, granularity, group_size, "mse")

    def search(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class."""
        return even_grid(x, self.bits)


def power_of_two_exponent(w: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """The e of the power 2^e that |w| is rounded to; w must not be 0.

    With p = |w| / 2^floor(log2|w|) - 1 the exponent floor(log2|w|) is rounded up where p > 0.5, or, given uniform noise in
    [0, 1), with probability p: then the mean of 2^e is |w|. Ott et al. 2016, survey 3.3.
    """
    mantissa, exponent = torch.frexp(w.abs())  # |w| = mantissa * 2^exponent with a mantissa in [0.5, 1)
    p = 2 * mantissa - 1
    up = p > 0.5 if noise is None else noise < p
    return exponent - 1 + up.int()


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2^e in float32."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def nameable_exponents(w: torch.Tensor, count: int, round_up: bool) -> torch.Tensor:
    """`count` exponents down from that of the largest weight, rising. `round_up`: the largest weight may be rounded up."""
    largest = w.abs().max().clamp(min=2.0**-100)
    top = int(power_of_two_exponent(largest, torch.zeros_like(largest) if round_up else None))
    return torch.arange(max(top - count + 1, -126), top + 1, device=w.device)


def round_to_powers(w: torch.Tensor, exponents: torch.Tensor, noise: torch.Tensor | None, to_zero: bool) -> torch.Tensor:
    """Each weight as +-2^e with an e among the rising `exponents`; what is smaller than all goes to zero or to the smallest.

    `noise`: uniform numbers in [0, 1) for stochastic rounding, of the shape of w; None rounds to the nearest.
    """
    smallest = powers_of_two(exponents[0])
    e = power_of_two_exponent(torch.where(w == 0, smallest, w), noise).clamp(max=exponents[-1])
    p = w.abs() / smallest  # below the smallest power: between 0 and 1
    below = smallest * (p > (0.5 if noise is None else noise)) if to_zero else smallest
    return torch.where(w < 0, -1.0, 1.0) * torch.where(p < 1, below, powers_of_two(e))


class PowerOfTwoQuantizer(Quantizer):
    """Weights become +-2^e, so that a multiplication is a shift. Deterministic or stochastic. Ott et al. 2016, survey 3.3.

    One bit is the sign, the others count exponents down from that of the largest weight. What falls below the smallest power
    2^m goes to 0 or 2^m, by the same rounding rule (`underflow="zero"`, which costs one code), or always to 2^m (`"smallest"`).
    Stochastic rounding draws anew in every training step, and always the same (`seed`) in evaluation. Raises ValueError for bits
    outside 1 to 8 (2 to 8 with a zero).
    """

    def __init__(self, bits: int, stochastic: bool = False, underflow: str = "zero", seed: int = 0):
        super().__init__()
        check_bits(bits)
        if underflow not in ("zero", "smallest"):
            raise ValueError(f"underflow must be 'zero' or 'smallest', got {underflow!r}")
        if underflow == "zero" and bits == 1:
            raise ValueError("with underflow 'zero', bits must be a whole number from 2 to 8, got 1")
        self.bits, self.stochastic, self.underflow, self.seed = bits, stochastic, underflow, seed
        self.eval()  # until a training loop says otherwise: what is measured and what is stored must be one draw

    def noise(self, w: torch.Tensor) -> torch.Tensor | None:
        """Uniform numbers in [0, 1), None for deterministic rounding."""
        if not self.stochastic:
            return None
        generator = None if self.training else torch.Generator(w.device).manual_seed(self.seed)
        return torch.rand(w.shape, generator=generator, device=w.device)

    def exponents(self, w: torch.Tensor) -> torch.Tensor:
        """The exponents that the codes can name, rising, (count,)."""
        return nameable_exponents(w, 2 ** (self.bits - 1) - (self.underflow == "zero"), self.stochastic)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Every weight rounded to 0 or +-2^e."""
        check_weight(weight)
        w = weight.detach().float()
        return round_to_powers(w, self.exponents(w), self.noise(w), self.underflow == "zero").to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed codes into the at most 2^bits levels."""
        w = weight.detach().float()
        powers = powers_of_two(self.exponents(w))
        zero = powers.new_zeros(int(self.underflow == "zero"))
        levels = torch.cat([-powers.flip(0), zero, powers])
        codes = torch.bucketize(self.quantize(weight).float(), levels)  # exact: every value is a level
        return encodings.codebook(codes, levels.unsqueeze(1), weight.shape, self.bits)


# --- balanced: all levels equally often -----------------------------------------------------------------------------


def percentile_borders(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The 2^bits - 1 borders between equally filled bins of x (n,): the exact i / 2^bits percentiles. A border lies in the lower bin."""
    N, n = 2**bits, x.numel()
    ranks = torch.tensor([math.ceil(i * n / N) - 1 for i in range(1, N)], dtype=torch.long, device=x.device)
    return ascending(x)[ranks]


def recursive_borders(x: torch.Tensor, bits: int, centers: Callable) -> torch.Tensor:
    """Split all values in two at a center, then each half, `bits` times; rising. `centers(x, codes, bins)` gives a center per bin.

    The center of an empty bin is NaN: the split above it takes its place.
    """
    codes, borders, above = torch.zeros_like(x, dtype=torch.long), x.new_zeros(2**bits - 1), x.new_zeros(1)
    for level in range(bits):
        center = centers(x, codes, 2**level)
        above = torch.where(center.isnan(), above, center)
        step = 2 ** (bits - level)
        borders[step // 2 - 1 :: step] = above
        codes, above = 2 * codes + (x > above[codes]), above.repeat_interleave(2)
    return borders


def bin_medians(x: torch.Tensor, codes: torch.Tensor, bins: int) -> torch.Tensor:
    """The (lower) median of each bin; NaN for an empty one."""
    members = [x[codes == i] for i in range(bins)]
    return torch.stack([m.median() if m.numel() else x.new_full((), torch.nan) for m in members])


def bin_means(x: torch.Tensor, codes: torch.Tensor, bins: int) -> torch.Tensor:
    """The mean of each bin, without any sorting; NaN for an empty one."""
    return x.new_zeros(bins).scatter_add_(0, codes, x) / torch.bincount(codes, minlength=bins)


BALANCED: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "percentile": percentile_borders,
    "median": lambda x, bits: recursive_borders(x, bits, bin_medians),
    "mean": lambda x, bits: recursive_borders(x, bits, bin_means),
}


def fitted_grid(x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of the least-squares line value = scale * (code - zero) through the values x (n,) and their codes, (1,) each."""
    mean = codes.mean(0, keepdim=True)
    spread = (codes - mean).square().sum(0, keepdim=True)
    scale = (x * (codes - mean)).sum(0, keepdim=True) / spread.clamp(min=1)
    level = x.mean(0, keepdim=True)
    scale = torch.where(scale > 0, scale, torch.where(level != 0, level.abs(), 1))  # one code for all: its level is their mean
    return scale, mean - level / scale


class BalancedQuantizer(Quantizer):
    """Balanced quantization: equally filled bins, evenly spaced levels. Zhou et al. 2017, survey 3.3.

    Bin i of N = 2^bits becomes the level i / (N - 1) of the range. (Rounding the equalised value to the nearest level, as the survey
    prints it, would give the outer levels half of their share.) `bins`: exact `percentile`, recursive `median`, or `mean`, which never
    sorts. `clip`: `lsq`, the levels are the least-squares line through the weights; `mean`, a range 2.5 * mean|w| wide; `max`, from
    the smallest weight to the largest, where one outlier inflates all levels. In training the borders are found anew every REFRESH
    steps. Raises ValueError for bits outside 1 to 8, unknown names, and a weight of fewer than 2^bits entries.
    """

    def __init__(self, bits: int, bins: str = "percentile", clip: str = "lsq"):
        super().__init__()
        check_bits(bits)
        if bins not in BALANCED or clip not in ("lsq", "max", "mean"):
            raise ValueError(f"bins must be one of {', '.join(BALANCED)}, clip lsq, max or mean, got {bins!r} and {clip!r}")
        self.bits, self.bins, self.clip = bits, BALANCED[bins], clip
        self.borders, self.age = None, 0
        self.eval()  # until a training loop says otherwise: outside training the borders are always those of the weight itself

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The bin of every value, (n,); in training by borders that are at most REFRESH steps old."""
        if not self.training or self.age % REFRESH == 0:
            self.borders = self.bins(x, self.bits)
        self.age += self.training
        return torch.bucketize(x, self.borders)

    def levels(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes (n,), scale (1,), zero (1,)."""
        check_weight(weight)
        if weight.numel() < 2**self.bits:
            raise ValueError(f"{2**self.bits} bins need as many values, the weight has {weight.numel()}")
        x = weight.detach().float().flatten()
        codes = self.codes(x).float()
        if self.clip == "lsq":
            return codes, *fitted_grid(x, codes)
        lo, hi = RANGES[self.clip](x, self.bits, self.clip == "mean")
        return codes * (hi > lo), *affine(lo, hi, self.bits, False, zero_on_grid=False)  # all values equal: one level is enough

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The level of every weight's bin."""
        return from_codes(*self.levels(weight)).view_as(weight).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed codes, one scale and one zero."""
        codes, scale, zero = self.levels(weight)
        return encodings.uniform(codes.view_as(weight), scale.view(1, 1), zero.view(1, 1), self.bits)


# --- activations ----------------------------------------------------------------------------------------------------


class ActivationQuantizer(nn.Module):
    """Fake quantization of an activation tensor (..., n), with one range for the `tensor` or one per `token` (its last dimension).

    The range is dynamic, found anew for every tensor (and so, unless it is a token's own, depending on what else is in the batch),
    until `calibrate` has fixed it. The gradient goes straight through. Raises ValueError for bits outside 1 to 8, an unknown `clip`
    or `granularity`, and where the range of a token is to be calibrated.
    """

    def __init__(self, bits: int = 8, symmetric: bool = False, clip: str | RangeFunction = "max", granularity: str = "tensor"):
        super().__init__()
        check_bits(bits)
        if granularity not in ("tensor", "token"):
            raise ValueError(f"granularity must be 'tensor' or 'token', got {granularity!r}")
        self.bits, self.symmetric, self.granularity, self.observing = bits, symmetric, granularity, False
        self.range = range_function(clip)
        self.lo: torch.Tensor | None = None
        self.hi: torch.Tensor | None = None

    def observe(self, lo: torch.Tensor, hi: torch.Tensor) -> None:
        """Widen the calibrated range."""
        if self.granularity == "token":
            raise ValueError("the range of a token is its own: only a range for the whole tensor can be calibrated")
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The quantized activation; while calibrating, the activation as it is."""
        values = x.detach().float()  # in bfloat16 the codes of 8 bits would collide
        values = values.flatten() if self.granularity == "tensor" else values.flatten(0, -2)
        fixed = self.lo is not None and not self.observing
        lo, hi = (self.lo, self.hi) if fixed else self.range(values, self.bits, self.symmetric)
        if self.observing:
            self.observe(lo, hi)
            return x
        return straight_through(x, fake_quantize(values, lo, hi, self.bits, self.symmetric).view_as(x).to(x.dtype))


@torch.no_grad()
def calibrate(model: nn.Module, quantizers: dict[str, nn.Module], batches: list[dict] | None) -> None:
    """Fix each quantizer's range to what it sees in the batches; without batches ranges stay dynamic."""
    if not batches:
        return
    training, device = model.training, next(model.parameters()).device
    model.eval()
    for quantizer in quantizers.values():
        quantizer.observing = True
    for batch in batches:
        inputs = to_device(batch, device)
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for quantizer in quantizers.values():
        quantizer.observing = False
    model.train(training)


@contextlib.contextmanager
def quantized_inputs(
    model: nn.Module,
    make: Callable[[], nn.Module] = ActivationQuantizer,
    groups: tuple[str, ...] = ENCODER,
    batches: list[dict] | None = None,
) -> Iterator[dict[str, nn.Module]]:
    """Quantize what enters the linear layers of the groups inside the block; `make()` gives each layer its own quantizer.

    Yields the quantizers by matrix name. `batches` calibrates the ranges. Raises ValueError for groups that are not linear.
    """
    quantizers, handles = {}, []
    for m in linear_matrices(model, groups):
        quantizers[m.name] = quantizer = make().to(m.weight.device)
        handles.append(m.module.register_forward_pre_hook(lambda module, args, q=quantizer: (q(args[0]), *args[1:])))
    try:
        calibrate(model, quantizers, batches)
        yield quantizers
    finally:
        for handle in handles:
            handle.remove()


def quantized_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q(Q) q(K)^T / sqrt(d)) = P, output q(P) q(V); each q a quantizer of its own. Q, K, V (batch, heads, tokens, d)."""
    q = module.operand_quantizers
    scores = q["query"](query) @ q["key"](key).transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.dropout(scores.softmax(-1), p=dropout, training=module.training)
    output = q["probabilities"](probabilities) @ q["value"](value)
    return output.transpose(1, 2).contiguous(), probabilities


register_dense(QUANTIZED_ATTENTION, quantized_attention_forward)


@contextlib.contextmanager
def quantized_attention(
    model: nn.Module, make: Callable[[], nn.Module] = ActivationQuantizer, batches: list[dict] | None = None
) -> Iterator[dict[str, nn.Module]]:
    """Quantize queries, keys, values and attention probabilities of all layers inside the block. Yields the quantizers."""
    device = next(model.parameters()).device
    modules = [layer.attention.self for layer in model.bert.encoder.layer]
    quantizers = {}
    for i, module in enumerate(modules):
        module.operand_quantizers = nn.ModuleDict({operand: make() for operand in OPERANDS}).to(device)
        quantizers |= {f"{i}.{operand}": quantizer for operand, quantizer in module.operand_quantizers.items()}
    try:
        with bert.attention(model, QUANTIZED_ATTENTION):
            calibrate(model, quantizers, batches)
            yield quantizers
    finally:
        for module in modules:
            del module.operand_quantizers


@contextlib.contextmanager
def quantized_matmuls(
    model: nn.Module, make: Callable[[], nn.Module] = ActivationQuantizer, batches: list[dict] | None = None
) -> Iterator[dict[str, nn.Module]]:
    """Quantize every operand that the encoder multiplies: hidden states, GELU outputs, Q, K, V and attention probabilities.

    The analogue of the quantized recurrent cell of He et al. 2016 and Ott et al. 2016 (survey 3.3): there as here each product
    widens the numbers, and a quantizer before the next product brings them back to k bits.
    """
    with quantized_inputs(model, make, ENCODER, batches) as inputs, quantized_attention(model, make, batches) as operands:
        yield {**inputs, **operands}
