"""Survey section 3.2: ternarized networks. Codes -1, 0, +1 in two bits per weight, so 16 times smaller than float32.

Zero is worth its place: weights crowd around it, and a zero is a connection that no longer counts. As in section 3.1, most
methods store codes and one scale, and differ in the threshold below which a weight is zero.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize

from utils import bert
from utils.bert import ENCODER, matrices
from utils.encodings import Encoded, codebook
from utils.parts import register_dense
from utils.quantization.binary import TINY, ConnectQuantizer, ScaledQuantizer, grouped, pass_gradient
from utils.quantization.quantizer import Quantizer, check_weight

LEAST_NOISE = 1.02  # deviations of a Gaussian at which Bernoulli ternary quantization adds the least noise

# --- Q-09, Q-10 -----------------------------------------------------------------------------------------------------


def nearest_ternary(v: torch.Tensor) -> torch.Tensor:
    """+1 if v > 0.5, 0 if -0.5 < v <= 0.5, else -1."""
    return (v > 0.5).to(v.dtype) - (v <= -0.5).to(v.dtype)


def bernoulli_ternary(v: torch.Tensor) -> torch.Tensor:
    """sign(v) with probability |v|, else 0 (Bernoulli ternary quantization, survey 3.2); the mean is v for v in [-1, 1]."""
    return v.sign() * (torch.rand_like(v) < v.abs())  # at half the price of torch.bernoulli on a CPU


class TernaryConnect(ConnectQuantizer):
    """H * nearest_ternary(w / H), or in stochastic training H * bernoulli_ternary(w / H); the update goes to the float w.

    Lin, Courbariaux, Memisevic, Bengio 2015 (arXiv 1510.03009), survey 3.2. The paper's weights live in [-1, 1]; H maps a trained
    matrix there and back. `weight_bound(weight, "rms")` = 2 sigma is a good H: with max|w|, a few outliers send all else to zero.
    """

    bits = 2
    nearest = staticmethod(nearest_ternary)
    draw = staticmethod(bernoulli_ternary)


# --- Q-11 -----------------------------------------------------------------------------------------------------------


def gaussian_ternary(weight: torch.Tensor) -> torch.Tensor:
    """T = +1 if w > mu + sigma / 2, -1 if w < mu - sigma / 2, else 0, with the mean and deviation of the matrix.

    Of Gaussian weights 38 % become 0. The survey prints (eq. 29) overlapping cases with slipped signs; this is what they mean.
    """
    mu, sigma = weight.mean(), weight.std(correction=0)
    return (weight > mu + sigma / 2).to(weight.dtype) - (weight < mu - sigma / 2).to(weight.dtype)


class GaussianTernary(ScaledQuantizer):
    """alpha * T, T from thresholds at mu +- sigma / 2. Alom et al. 2018 (arXiv 1802.02615), survey 3.2.

    The paper's levels are -1, 0, +1 (`scaled=False`), too large for a trained BERT; alpha = sum(w T) / sum|T| minimises
    ||W - alpha T||^2.
    """

    bits = 2

    def __init__(self, scaled: bool = True):
        super().__init__()
        self.scaled = scaled

    def split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """T and alpha."""
        T = gaussian_ternary(weight)
        alpha = (weight * T).sum() / T.abs().sum().clamp(min=1) if self.scaled else weight.new_ones(())
        return T, alpha.view(1, 1)


# --- Q-12 -----------------------------------------------------------------------------------------------------------


def twn_threshold(magnitudes: torch.Tensor, exact: bool = False) -> torch.Tensor:
    """Delta of each group of |W| (groups, n), as (groups, 1): 0.7 * mean|W|, or the best one of all.

    The best Delta has the largest (sum of |W_i| over I)^2 / |I|, where I are the weights above Delta. I holds the k largest for
    some k, so one sort and one cumulative sum try every I there is.
    """
    if not exact:
        return 0.7 * magnitudes.mean(1, keepdim=True)
    a = magnitudes.double().sort(1, descending=True).values
    k = torch.arange(1, a.shape[1] + 1, device=a.device)
    best = (a.cumsum(1).square() / k).argmax(1, keepdim=True)  # k - 1 of the best k
    return pad(a, (0, 1)).gather(1, best + 1).to(magnitudes.dtype)  # the largest |W| that is left out


def twn_alpha(magnitudes: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """alpha = mean of |W_i| over I = {|W_i| > Delta}, (groups, 1), and 0 where I is empty."""
    I = magnitudes > delta  # noqa: E741 - the paper's name
    return (magnitudes * I).sum(1, keepdim=True) / I.sum(1, keepdim=True).clamp(min=1)


class TWN(ScaledQuantizer):
    """alpha * T closest to W, T = sign(W) where |W| > Delta, else 0, per `matrix` or per `row` (for embeddings).

    Li, Zhang, Liu 2016 (Ternary Weight Networks, arXiv 1605.04711), survey 3.2. Delta is 0.7 * mean|W|, or with `exact` the
    minimiser of ||W - alpha T||^2. The survey's eq. 33 leaves alpha out, and its E(W) means E|W|.
    """

    bits = 2

    def __init__(self, per: str = "matrix", exact: bool = False):
        super().__init__()
        self.per, self.exact = per, exact

    def split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """T and alpha."""
        W = grouped(weight, self.per)
        delta = twn_threshold(W.abs(), self.exact)
        return W.sign() * (W.abs() > delta), twn_alpha(W.abs(), delta)


# --- Q-13 -----------------------------------------------------------------------------------------------------------


def step_codes(weight: torch.Tensor, step: float, bits: int) -> torch.Tensor:
    """z = sign(w) * min(floor(|w| / step + 1/2), K), K = 2^(bits-1) - 1: for 2 bits -1, 0, +1."""
    K = 2 ** (bits - 1) - 1
    return weight.sign() * (weight.abs() / step + 0.5).floor().clamp(max=K)


def lloyd_max_step(weight: torch.Tensor, bits: int = 2, iterations: int = 100) -> float:
    """The step with the least squared error, by Lloyd and Max's alternation: codes for the step, then the step for the codes.

    For fixed codes z the best step is sum(w z) / sum z^2. It is 1-D k-means with centres tied to multiples of the step.
    """
    check_weight(weight)
    w = weight.detach().double()
    step = (w.abs().mean() / 2 ** (bits - 2)).item()
    for _ in range(iterations):
        z = step_codes(w, max(step, TINY), bits)
        new = ((w * z).sum() / z.square().sum().clamp(min=1)).item()
        if new == step:
            break
        step = new
    return max(step, TINY)  # an all-zero matrix has no step; any will do


class StepQuantizer(ScaledQuantizer):
    """step * z with z = -K ... K, K = 2^(bits-1) - 1: Hwang, Sung 2014, survey 3.2. bits = 2 is ternary.

    Raises ValueError unless step > 0 and bits is 2 to 8.
    """

    def __init__(self, step: float, bits: int = 2):
        super().__init__()
        if not (math.isfinite(step) and step > 0) or bits not in range(2, 9):
            raise ValueError(f"need a step > 0 and bits from 2 to 8, got step={step}, bits={bits}")
        self.step, self.bits = step, bits

    def split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z and alpha = step."""
        return step_codes(weight, self.step, self.bits), weight.new_full((1, 1), self.step)


def greedy_step_search(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    groups: tuple[str, ...] = ENCODER,
    bits: int = 2,
    factors: tuple[float, ...] = (1.0, 0.9, 1.1, 0.8, 1.2, 0.7, 1.3),
) -> dict[str, float]:
    """Matrix after matrix, from input to output: try steps near Lloyd and Max's, keep the one with the least network error.

    `evaluate(model)` is that error (lower is better), measured with all earlier matrices quantized and all later ones not.
    Leaves the quantizers attached, ready for the retraining that ends the method, and returns the steps. Hwang, Sung 2014,
    survey 3.2. On a tie the factor named first wins. Raises ValueError without factors or for an error that is not finite.
    """
    if not factors:
        raise ValueError("greedy_step_search needs one factor or more")
    steps = {}
    for m in matrices(model, groups):
        start = lloyd_max_step(m.weight, bits)
        quantizer = StepQuantizer(start, bits)
        parametrize.register_parametrization(m.module, "weight", quantizer)
        quantizer.step = min((start * factor for factor in factors), key=partial(_error_at, model, evaluate, quantizer))
        steps[m.name] = quantizer.step
    return steps


def _error_at(model: nn.Module, evaluate: Callable[[nn.Module], float], quantizer: StepQuantizer, step: float) -> float:
    quantizer.step = step
    with torch.no_grad():
        error = float(evaluate(model))
    if not math.isfinite(error):
        raise ValueError(f"evaluate must return a finite error, got {error} at step {step:.3g}")
    return error


# --- Q-14 -----------------------------------------------------------------------------------------------------------


class TTQ(Quantizer):
    """Levels -W_n, 0, +W_p of one matrix, both learned; zero where |w| <= t * max|w|.

    Zhu, Han, Mao, Dally 2016 (Trained Ternary Quantization, arXiv 1612.01064), survey 3.2. dL/dW_p (dL/dW_n) is the sum of
    dL/dw_t (of -dL/dw_t) over its bin; dL/dw = W_p, 1 or W_n times dL/dw_t, by bin. The paper starts at W_p = W_n = 1, which
    BatchNorm forgives; here they start at the mean |w| above the threshold unless `initial` is given. (HitNet uses the name TTQ
    for *threshold* ternary quantization.) Raises ValueError unless 0 <= t < 1.
    """

    def __init__(self, weight: torch.Tensor, t: float = 0.05, initial: float | None = None):
        super().__init__()
        check_weight(weight)
        if not 0 <= t < 1:
            raise ValueError(f"the threshold t must lie in [0, 1), got {t}")
        self.t = t
        W = weight.detach().abs().reshape(1, -1)
        level = twn_alpha(W, t * W.max()).view(()) if initial is None else W.new_tensor(initial)
        self.W_p, self.W_n = nn.Parameter(level.clone()), nn.Parameter(level.clone())

    def bins(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """True where the weight takes +W_p, and where it takes -W_n."""
        delta = self.t * weight.detach().abs().max()
        return weight > delta, weight < -delta

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """-W_n, 0 or W_p; automatic differentiation sums the gradients of each bin."""
        positive, negative = self.bins(weight)
        return self.W_p * positive - self.W_n * negative

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """`quantize`, with gradients for W_p, W_n and, scaled by bin, for the weight."""
        positive, negative = self.bins(weight)
        factor = torch.where(positive, self.W_p, torch.where(negative, self.W_n, 1.0)).detach()
        return pass_gradient(factor * weight, self.quantize(weight))

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Two bits per weight and the three levels."""
        check_weight(weight)
        positive, negative = self.bins(weight)
        levels = torch.stack([-self.W_n, torch.zeros_like(self.W_n), self.W_p]).detach().cpu().unsqueeze(1)  # (3, 1)
        return codebook((1 + positive.int() - negative.int()).to(torch.uint8), levels, weight.shape, bits=2)


# --- Q-15 -----------------------------------------------------------------------------------------------------------


def ternary_activation(x: torch.Tensor, stochastic: bool = True) -> torch.Tensor:
    """x in [-1, 1] as -1, 0 or +1, by lot (Bernoulli) or by the threshold 1/2; gradient straight through."""
    return pass_gradient(x, (bernoulli_ternary if stochastic else nearest_ternary)(x.detach()))


def scaled_ternary_activation(x: torch.Tensor, stochastic: bool = True) -> torch.Tensor:
    """s * ternary_activation(x / s), s = 1.02 * sqrt(mean x^2) of each token, (..., 1): one scale per token, two bits per neuron.

    The expected squared error, s|x| - x^2 below s and (|x| - s)^2 above, is least at 1.02 deviations where x is Gaussian. With
    s = max|x|, which clips nothing, one outlier sends nearly all other neurons to zero.
    """
    s = (LEAST_NOISE * x.detach().float().square().mean(-1, keepdim=True).sqrt()).to(x.dtype)
    return s * ternary_activation((x / s.clamp(min=torch.finfo(x.dtype).tiny)).clamp(-1, 1), stochastic)


@dataclass
class Slope:
    """HitNet's sloping factor: it rises in equal steps from 1 to `end` until training step `ramp`, and stays there.

    `anneal` is the hook for `train(after_step=...)`; `ternary_activations` reads `value` in each forward pass.
    """

    end: float
    ramp: int
    value: float = 1.0

    def anneal(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Set the value for the next step."""
        self.value = 1.0 + (self.end - 1.0) * min(1.0, step / self.ramp)


def ternary_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    slope: Slope,
    stochastic: bool,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with probabilities of 0 or 1: P = softmax(slope.value * Q K^T / sqrt(d)), then Bernoulli(P), then P V.

    query, key, value (batch, heads, tokens, d); returns (batch, tokens, heads, d) and P (batch, heads, tokens, tokens).
    """
    scores = query @ key.transpose(-2, -1) * (slope.value * scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    P = ternary_activation(torch.softmax(scores, dim=-1), stochastic)
    P = nn.functional.dropout(P, dropout, training=module.training)
    return (P.to(value.dtype) @ value).transpose(1, 2).contiguous(), P


@contextmanager
def ternary_activations(model: nn.Module, slope: Slope, stochastic: bool = True) -> Iterator[None]:
    """Inside the block, attention probabilities and FFN activations are ternary: an analogue of HitNet for BERT.

    Wang et al. 2018 (HitNet, NIPS), survey 3.2: threshold ternary weights (attach `TWN`), Bernoulli ternary activations, for
    weights are bell-shaped while gates in [0, 1] crowd at the ends. HitNet's gates are an LSTM's; the numbers in [0, 1] of a BERT
    are its attention probabilities, and a `slope` above 1 drives them to the ends as HitNet's sloping factor does. FFN activations
    have any size, hence a scale per token. Sampled in evaluation too, unless `stochastic` is False: seed it. Raises ValueError
    unless the slope is positive.
    """
    if not slope.value > 0:
        raise ValueError(f"slope must be positive, got {slope.value}")
    name = f"ternary_{'bernoulli' if stochastic else 'threshold'}"
    register_dense(name, partial(ternary_attention, slope=slope, stochastic=stochastic))
    handles = [layer.intermediate.register_forward_hook(lambda module, inputs, x: scaled_ternary_activation(x, stochastic))
               for layer in model.bert.encoder.layer]  # fmt: skip
    try:
        with bert.attention(model, name):
            yield
    finally:
        for handle in handles:
            handle.remove()
