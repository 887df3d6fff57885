"""Survey section 3.3: uniform k-bit quantization of weights and activations, powers of two, balanced quantization.

A range [lo, hi] is cut into 2^bits - 1 equal steps; what differs is who shares a range (a tensor, a row, a group of columns),
where the range ends (at the largest value, or earlier), and whether zero must be one of the levels (`symmetric`). Powers of
two space the levels unevenly, balanced quantization fills them evenly.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from utils import bert, encodings
from utils.bert import ENCODER, linear_matrices
from utils.encodings import Encoded
from utils.parts import register_dense
from utils.quantization.quantizer import Quantizer, ascending, check_bits, check_weight, straight_through
from utils.training import to_device

Range = tuple[torch.Tensor, torch.Tensor]
RangeFunction = Callable[[torch.Tensor, int, bool], Range]
GRANULARITIES = ("tensor", "row", "group")
OPERANDS = ("query", "key", "value", "probabilities")
QUANTIZED_ATTENTION = "companion_quantized"


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


def to_codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """code = clamp(round(x / scale + zero)), a whole number in [0, 2^bits)."""
    top = 2**bits - 2 if symmetric and bits > 1 else 2**bits - 1
    return torch.round(x / scale + zero).clamp(0, top)


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


def mse_range(x: torch.Tensor, bits: int, symmetric: bool, steps: int = 50) -> Range:
    """The shrunken range r * [lo, hi], r = 1/steps, ..., 1, whose quantized values have the least mean squared error.

    At few bits it pays to clip the largest values: all others then get finer steps.
    """
    lo, hi = max_range(x, bits, symmetric)
    best, best_r = torch.full_like(lo, torch.inf), torch.ones_like(lo)
    for r in [(i + 1) / steps for i in range(steps)]:
        error = (fake_quantize(x, r * lo, r * hi, bits, symmetric) - x).square().mean(-1, keepdim=True)
        best_r = torch.where(error <= best, r, best_r)
        best = torch.minimum(error, best)
    return best_r * lo, best_r * hi


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


def range_function(clip: str | RangeFunction) -> RangeFunction:
    """A rule by its name, or any function of (x, bits, symmetric). Raises ValueError for an unknown name."""
    if callable(clip):
        return clip
    if clip not in RANGES:
        raise ValueError(f"clip must be one of {', '.join(RANGES)}, got {clip!r}")
    return RANGES[clip]


# --- weights --------------------------------------------------------------------------------------------------------


class UniformQuantizer(Quantizer):
    """Uniform k-bit quantization of a weight (rows, columns). Rastegari 2016, Hubara 2017, He et al. 2016, survey 3.3.

    `granularity` says who shares a range: the `tensor`, a `row`, or a `group` of `group_size` columns of a row. `clip` names the
    rule that ends the range (`RANGES`), or is such a rule. `zero_on_grid` see `affine`. Raises ValueError for bits outside 1 to 8 and unknown names.
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
        self.range, self.zero_on_grid = range_function(clip), zero_on_grid

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

    def levels(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes (rows, groups, values of a range), scale and zero (rows, groups, 1)."""
        check_weight(weight)
        x = weight.detach().float().reshape(*self.grid(weight), -1)
        scale, zero = affine(*self.range(x, self.bits, self.symmetric), self.bits, self.symmetric, self.zero_on_grid)
        return to_codes(x, scale, zero, self.bits, self.symmetric), scale, zero

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest level of every weight."""
        return from_codes(*self.levels(weight)).view_as(weight).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed codes, and a scale and a zero per range."""
        codes, scale, zero = self.levels(weight)
        return encodings.uniform(codes.view_as(weight), scale.squeeze(-1), zero.squeeze(-1), self.bits)


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


def percentile_codes(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The bin of every value of x (n,) when 2^bits bins hold equally many: the bounds are the exact i / 2^bits percentiles."""
    N, n = 2**bits, x.numel()
    ranks = torch.tensor([math.ceil(i * n / N) - 1 for i in range(1, N)], dtype=torch.long, device=x.device)
    return torch.bucketize(x, ascending(x)[ranks])


def recursive_codes(x: torch.Tensor, bits: int, centers: Callable) -> torch.Tensor:
    """Split all values in two at a center, then each half, `bits` times. `centers(x, codes, bins)` has one center per bin."""
    codes = torch.zeros_like(x, dtype=torch.long)
    for level in range(bits):
        center = centers(x, codes, 2**level)
        codes = 2 * codes + (x > center[codes])
    return codes


def bin_medians(x: torch.Tensor, codes: torch.Tensor, bins: int) -> torch.Tensor:
    """The (lower) median of each bin; 0 for an empty one."""
    members = [x[codes == i] for i in range(bins)]
    return torch.stack([m.median() if m.numel() else x.new_zeros(()) for m in members])


def bin_means(x: torch.Tensor, codes: torch.Tensor, bins: int) -> torch.Tensor:
    """The mean of each bin, without any sorting; 0 for an empty one."""
    total = x.new_zeros(bins).scatter_add_(0, codes, x)
    return total / torch.bincount(codes, minlength=bins).clamp(min=1)


BALANCED: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "percentile": percentile_codes,
    "median": lambda x, bits: recursive_codes(x, bits, bin_medians),
    "mean": lambda x, bits: recursive_codes(x, bits, bin_means),
}


class BalancedQuantizer(Quantizer):
    """Balanced quantization: equally filled bins, evenly spaced levels. Zhou et al. 2017, survey 3.3.

    Histogram equalisation moves bin i of N = 2^bits onto the slice [i/N, (i+1)/N) of [0, 1], and the slice becomes the level
    i / (N - 1), stretched over the range of the weights. `bins`: exact `percentile`, recursive `median`, or `mean`, which is
    an approximation that never sorts. The range is `clip="mean"`, 2.5 * mean|w| wide, or `max`, from the smallest weight to the
    largest: then one outlier inflates them all, since half of the weights must take the upper half of the levels. Rounding the
    equalised value to the nearest level, as the survey prints it, would give the outer levels half of their share; it is
    rounded down to its slice. Raises ValueError for bits outside 1 to 8, unknown names, and a weight of fewer than 2^bits
    entries.
    """

    def __init__(self, bits: int, bins: str = "percentile", clip: str = "mean"):
        super().__init__()
        check_bits(bits)
        if bins not in BALANCED or clip not in ("max", "mean"):
            raise ValueError(f"bins must be one of {', '.join(BALANCED)} and clip 'max' or 'mean', got {bins!r} and {clip!r}")
        self.bits, self.bins, self.range = bits, BALANCED[bins], RANGES[clip]

    def levels(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes (n,), scale (1,), zero (1,)."""
        check_weight(weight)
        if weight.numel() < 2**self.bits:
            raise ValueError(f"{2**self.bits} bins need as many values, the weight has {weight.numel()}")
        x = weight.detach().float().flatten()
        lo, hi = self.range(x, self.bits, self.range is mean_range)
        codes = self.bins(x, self.bits) * (hi > lo)  # all values equal: one level is enough
        return codes, *affine(lo, hi, self.bits, False, zero_on_grid=False)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The level of every weight's bin."""
        return from_codes(*self.levels(weight)).view_as(weight).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed codes, one scale and one zero."""
        codes, scale, zero = self.levels(weight)
        return encodings.uniform(codes.view_as(weight), scale.view(1, 1), zero.view(1, 1), self.bits)


# --- activations ----------------------------------------------------------------------------------------------------


class ActivationQuantizer(nn.Module):
    """Fake quantization of an activation tensor of any shape, one range for all of it.

    The range is dynamic, found anew for every tensor (and so depending on what else is in the batch), until `calibrate` has
    fixed it. The gradient goes straight through. Raises ValueError for bits outside 1 to 8 and an unknown `clip`.
    """

    def __init__(self, bits: int = 8, symmetric: bool = False, clip: str | RangeFunction = "max"):
        super().__init__()
        check_bits(bits)
        self.bits, self.symmetric, self.observing = bits, symmetric, False
        self.range = range_function(clip)
        self.lo: torch.Tensor | None = None
        self.hi: torch.Tensor | None = None

    def observe(self, lo: torch.Tensor, hi: torch.Tensor) -> None:
        """Widen the calibrated range."""
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The quantized activation; while calibrating, the activation as it is."""
        flat = x.detach().float().flatten()  # in bfloat16 the codes of 8 bits would collide
        lo, hi = (self.lo, self.hi) if self.lo is not None and not self.observing else self.range(flat, self.bits, self.symmetric)
        if self.observing:
            self.observe(lo, hi)
            return x
        return straight_through(x, fake_quantize(flat, lo, hi, self.bits, self.symmetric).view_as(x).to(x.dtype))


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
