"""Survey section 3.1: binarized networks. One bit per weight, and, in a BNN, one per activation.

Most methods store codes of -1 and +1 and a scale alpha; they differ in where alpha comes from and in how the weights are trained.
The latent (full-precision) weight stays underneath during training, and its gradient is the one of the binary weight (STE).
"""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear, pad
from torch.nn.utils import parametrize

from utils.bert import ENCODER, linear_matrices
from utils.encodings import Encoded, codebook, dense, uniform
from utils.quantization.quantizer import Quantizer, ascending, check_weight

TINY = torch.finfo(torch.float32).tiny
AT_TEST = ("nearest", "draw", "float")


# --- what the methods share -----------------------------------------------------------------------------------------


def sign(x: torch.Tensor) -> torch.Tensor:
    """+1 where x >= 0, else -1. Unlike torch.sign it never answers 0, for which one bit has no room."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def pass_gradient(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, exactly (x - x is 0). Its gradient goes to x unchanged, and to whatever `value` was computed from."""
    return value + (x - x.detach())


def grouped(weight: torch.Tensor, per: str) -> torch.Tensor:
    """The weights that share a scale, one group a row: (1, out * in) per `matrix`, (out, in) per `row`."""
    if per not in ("matrix", "row"):
        raise ValueError(f"per must be 'matrix' or 'row', got {per!r}")
    return weight.reshape(1, -1) if per == "matrix" else weight


def encode_scaled(codes: torch.Tensor, alpha: torch.Tensor, bits: int) -> Encoded:
    """Store alpha * codes: `codes` (out, in) are -1, +1 (1 bit) or -K ... K with K = 2^(bits-1) - 1; `alpha` (groups, 1).

    n * bits / 8 bytes of codes, 4 bytes for each alpha and 4 for the code that means zero. Decoding is exact.
    """
    if bits == 1:  # stored 0, 1; the zero lies between the two, and doubling or halving alpha costs no rounding
        stored, scale, zero = (codes + 1) / 2, 2 * alpha, 0.5
    else:
        zero = 2 ** (bits - 1) - 1
        stored, scale = codes + zero, alpha
    scale = scale.detach().cpu()
    return uniform(stored.to(torch.uint8), scale, torch.full_like(scale[:1], zero), bits)


class ScaledQuantizer(Quantizer):
    """Base of the quantizers with value alpha * codes. A subclass gives `split`, and `bits` where it is not 1."""

    bits = 1

    def split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and alpha (groups, 1) of a weight (out, in); the codes may come as (groups, n)."""
        raise NotImplementedError

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """alpha * codes."""
        codes, alpha = self.split(weight)
        return (alpha * codes).reshape(weight.shape)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """The codes in `bits` bits each, and alpha. Raises ValueError for a weight with NaN or infinite entries."""
        check_weight(weight)
        codes, alpha = self.split(weight.detach())
        return encode_scaled(codes.reshape(weight.shape), alpha, self.bits)


def latent_weights(model: nn.Module, kind: type[Quantizer]) -> list[tuple[nn.Parameter, Quantizer]]:
    """The full-precision weights under the attached quantizers of one kind, each with its quantizer."""
    lists = [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]
    return [(p.original, p[0]) for p in lists if isinstance(p[0], kind)]


# --- Q-01 -----------------------------------------------------------------------------------------------------------


class SignQuantizer(ScaledQuantizer):
    """Static binarization: w_b = sign(w), +1 or -1 and no scale. Survey 3.1.

    A worst case on purpose: BERT's weights are near 0.04 in size, so +-1 makes every product some 25 times too large.
    """

    def split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sign(w) and alpha = 1."""
        return sign(weight), weight.new_ones(1, 1)


# --- Q-02 -----------------------------------------------------------------------------------------------------------


def glorot(weight: torch.Tensor) -> float:
    """Glorot and Bengio's size of a first weight, sqrt(1.5 / (fan_in + fan_out)), of a matrix (fan_out, fan_in)."""
    return math.sqrt(1.5 / sum(weight.shape))


def weight_bound(weight: torch.Tensor, rule: str = "mean") -> float:
    """H, the size of the quantized weights and the bound of the latent ones, of a matrix (fan_out, fan_in).

    `one` is BinaryConnect's choice in the paper and `glorot` in the authors' first code; both forget a trained weight's size.
    `mean` = mean|w|, `rms` = 2 * sqrt(mean w^2) and `max` = max|w| keep it. Raises ValueError for another rule.
    """
    check_weight(weight)
    w = weight.detach().float()
    rules = {"one": 1.0, "glorot": glorot(w), "mean": w.abs().mean(), "rms": 2 * w.square().mean().sqrt(), "max": w.abs().max()}
    if rule not in rules:
        raise ValueError(f"unknown rule {rule!r} for the bound H: choose from {', '.join(rules)}")
    return max(float(rules[rule]), TINY)  # an all-zero matrix must not divide by zero


def stochastic_sign(v: torch.Tensor) -> torch.Tensor:
    """+1 with probability p = clip((v + 1) / 2, 0, 1), else -1; the mean is v for v in [-1, 1]."""
    return sign((v + 1) / 2 - torch.rand_like(v))  # at half the price of torch.bernoulli on a CPU


class ConnectQuantizer(ScaledQuantizer):
    """Base of BinaryConnect and TernaryConnect: value H * nearest(w / H), or in stochastic training H * draw(w / H).

    H > 0 is the bound of the latent weights; put `clip_latent` into training as `after_step` to keep them in [-H, H]. What
    evaluation uses is `at_test`: `nearest` (the deterministic rule), `draw` (a new sample in each forward pass: average the
    predictions of several for the paper's ensemble; it has no single file), or `float` (the clipped latent weights, which saves
    no bytes). A stochastic quantizer draws only in training mode. Raises ValueError for another H or `at_test`.
    """

    nearest = draw = staticmethod(sign)  # a subclass says which

    def __init__(self, H: float, stochastic: bool = False, at_test: str = "nearest"):
        super().__init__()
        if not (math.isfinite(H) and H > 0):
            raise ValueError(f"the bound H must be a positive number, got {H}")
        if at_test not in AT_TEST:
            raise ValueError(f"at_test must be one of {', '.join(AT_TEST)}, got {at_test!r}")
        self.H, self.stochastic, self.at_test = H, stochastic, at_test
        self.eval()  # until a training loop says otherwise: what is measured and what is stored must be one network

    def split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes of the deterministic rule, and alpha = H."""
        return self.nearest(weight / self.H), weight.new_full((1, 1), self.H)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """H times the codes, drawn or nearest, or the clipped weight itself."""
        mode = ("draw" if self.stochastic else "nearest") if self.training else self.at_test
        if mode == "float":
            return weight.clamp(-self.H, self.H)
        return self.H * self.draw(weight / self.H) if mode == "draw" else super().quantize(weight)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """What `at_test` uses, also in training mode. Raises ValueError for `draw`, which is many networks and not one."""
        if self.at_test == "draw":
            raise ValueError("a file holds one network, not samples: set at_test to 'nearest' or 'float' to store it")
        return dense(weight.detach().clamp(-self.H, self.H).cpu()) if self.at_test == "float" else super().encode(weight)


class BinaryConnect(ConnectQuantizer):
    """w_b = H * sign(w), or stochastically +H with p = clip((w / H + 1) / 2, 0, 1), else -H; the update goes to the float w.

    Courbariaux, Bengio, David 2015 (arXiv 1511.00363), survey 3.1. The stochastic one has mean clip(w, -H, H).
    """

    nearest = staticmethod(sign)
    draw = staticmethod(stochastic_sign)


def real_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The latent weights, clipped to [-H, H], by parameter name: what the authors test stochastic training with."""
    return {f"{name}.weight": module.parametrizations.weight.original.detach().clamp(-quantizer.H, quantizer.H)
            for name, module in model.named_modules() if parametrize.is_parametrized(module, "weight")
            for quantizer in module.parametrizations.weight if isinstance(quantizer, ConnectQuantizer)}  # fmt: skip


@torch.no_grad()
def clip_latent(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Hook for `train(after_step=...)`: w <- clip(w, -H, H). Beyond H a larger weight changes nothing, and would take long to come back."""
    for w, quantizer in latent_weights(model, ConnectQuantizer):
        w.clamp_(-quantizer.H, quantizer.H)


def scaled_learning_rates(model: nn.Module, learning_rate: float) -> list[dict]:
    """Optimiser groups with lr * H / `glorot` for each connected matrix, lr for all other parameters.

    A sign flips after a way of H. The authors keep H = 1 and make Adam's steps 1 / `glorot` times as long, or keep H = `glorot`
    and the steps as they are: either way a step is lr / `glorot` of the way. That is what lr * H / `glorot` is for any H.
    """
    connected = latent_weights(model, ConnectQuantizer)
    taken = {id(w) for w, _ in connected}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    scaled = [{"params": [w], "lr": learning_rate * q.H / glorot(w)} for w, q in connected if w.requires_grad]
    return [*scaled, {"params": others, "lr": learning_rate}]


# --- Q-03, Q-04 -----------------------------------------------------------------------------------------------------


def tuned_levels(weight: torch.Tensor) -> tuple[float, float]:
    """c1, c2 with the least squared error when the boundary is 0: the mean of the w >= 0, and that of the w < 0."""
    check_weight(weight)
    w = weight.detach()
    c1 = w.clamp(min=0).sum() / (w >= 0).sum().clamp(min=1)
    c2 = w.clamp(max=0).sum() / (w < 0).sum().clamp(min=1)
    return c1.item(), c2.item()


class BSFixed(Quantizer):
    """w_b = c1 if w >= 0 else c2, with two constants chosen before training.

    Lam 2018 (Word2Bits, arXiv 1803.05651: +-1/3, the default; name from Cheong, Daniel 2019), survey 3.1. For one matrix,
    `BSFixed(*tuned_levels(weight))`. Raises ValueError unless c1 >= c2, both finite.
    """

    def __init__(self, c1: float = 1 / 3, c2: float = -1 / 3):
        super().__init__()
        if not (math.isfinite(c1) and math.isfinite(c2) and c1 >= c2):
            raise ValueError(f"need finite levels c1 >= c2, got c1={c1}, c2={c2}")
        self.c1, self.c2 = c1, c2

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """c1 or c2."""
        return torch.where(weight >= 0, self.c1, self.c2).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """One bit per weight and the two levels."""
        check_weight(weight)
        levels = torch.tensor([[self.c2], [self.c1]], dtype=weight.dtype)
        return codebook((weight >= 0).to(torch.uint8), levels, weight.shape, bits=1)


def two_means(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c1 >= c2, the centres of the best split of the weights in two (2-means, exactly).

    In one dimension the two clusters are the k smallest values and the rest. With w centred, a split's squared error is
    sum w^2 - k * c2^2 - (n - k) * c1^2; one sort and one cumulative sum give it for all n - 1 splits.
    """
    check_weight(weight)
    w = ascending(weight.double())
    if w[0] == w[-1]:
        return w[0].to(weight.dtype), w[0].to(weight.dtype)
    k = torch.arange(1, len(w), device=w.device)
    below = (w - w.mean()).cumsum(0)[:-1]
    best = (below.square() / k + below.square() / (len(w) - k)).argmax()  # the upper sum is minus the lower one
    c1, c2 = w[best + 1 :].mean(), w[: best + 1].mean()
    return c1.to(weight.dtype), c2.to(weight.dtype)


class BSFlexible(Quantizer):
    """w_b = c1 if w >= (c1 + c2) / 2 else c2; c1, c2 start at the 2-means of the matrix and are learned.

    Cheong, Daniel 2019, survey 3.1. dL/dc_k = sum of dL/dw_b over the weights in bin k; dL/dw = dL/dw_b (STE).
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.c1, self.c2 = (nn.Parameter(c) for c in two_means(weight))

    def upper(self, weight: torch.Tensor) -> torch.Tensor:
        """True where the weight takes c1."""
        return weight >= (self.c1 + self.c2) / 2

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """c1 or c2; automatic differentiation sums the gradients of each bin."""
        return torch.where(self.upper(weight), self.c1, self.c2)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """`quantize`, with gradients for c1, c2 and, straight through, for the weight."""
        return pass_gradient(weight, self.quantize(weight))

    def encode(self, weight: torch.Tensor) -> Encoded:
        """One bit per weight and the two levels."""
        check_weight(weight)
        levels = torch.stack([self.c2, self.c1]).detach().cpu().unsqueeze(1)  # (2, 1)
        return codebook(self.upper(weight).to(torch.uint8), levels, weight.shape, bits=1)


# --- Q-05 -----------------------------------------------------------------------------------------------------------


def power_of_two(x: torch.Tensor) -> torch.Tensor:
    """sign(x) * 2^e, with e = floor(log2|x|) or, with probability |x| / 2^e - 1, one more; 0 for 0. Its mean is x.

    A product with it is a shift of the other factor's binary point. Rounding log2|x| to the nearest whole number would need no
    random numbers, but its mean is not x. In float32 the probability of going up is the mantissa, 23 bits wide: a random number of
    23 bits is added, and what overflows raises the exponent.
    """
    bits = x.float().contiguous().view(torch.int32)
    raised = bits + torch.empty_like(bits).random_(0, 2**23)
    return (raised & -(2**23)).view(torch.float32).to(x.dtype)  # the mask keeps sign and exponent


class PowerOfTwoLinear(torch.autograd.Function):
    """y = x W^T + b, whose weight gradient is dW = dy^T p(x), p = `power_of_two`, so that dW needs no multiplication.

    Lin, Courbariaux, Memisevic, Bengio 2015 (arXiv 1510.03009), survey 3.1: quantized back-propagation. The forward pass, dx and
    db stay exact, and the mean of dW is the exact gradient.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (..., in), weight (out, in), bias (out,) or None; returns (..., out)."""
        ctx.save_for_backward(power_of_two(x), weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of x, weight and bias."""
        p, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)  # (tokens, out)
        dx = dy @ weight.to(dy.dtype)
        dW = rows.T @ p.to(dy.dtype).flatten(0, -2)  # under bfloat16 autocast too: it holds powers of two exactly
        return dx.to(p.dtype), dW.to(weight.dtype), rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None


def power_of_two_forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer computes while its back-propagation is quantized."""
    return PowerOfTwoLinear.apply(x, module.weight, module.bias)


@contextmanager
def power_of_two_backprop(model: nn.Module, groups: tuple[str, ...] = ENCODER) -> Iterator[None]:
    """Inside the block, the groups' linear layers take power-of-two activations for their weight gradients.

    An emulation: it shows what the gradients lose, and stock kernels gain nothing. Raises ValueError for embedding groups.
    """
    found = linear_matrices(model, groups)
    for m in found:
        m.module.forward = partial(power_of_two_forward, m.module)
    try:
        yield
    finally:
        for m in found:
            del m.module.forward  # the class's own is in force again


# --- Q-06 -----------------------------------------------------------------------------------------------------------


def binary_activation(x: torch.Tensor) -> torch.Tensor:
    """sign(x); the gradient is 1 where |x| <= 1 and 0 where |x| > 1, which is that of clip(x, -1, 1)."""
    return pass_gradient(x.clamp(-1, 1), sign(x))


@contextmanager
def binary_activations(model: nn.Module, groups: tuple[str, ...] = ENCODER) -> Iterator[None]:
    """Inside the block, the groups' linear layers see the sign of their input.

    Hubara et al. 2016 (BNN, arXiv 1602.02830), survey 3.1. With weights of `BinaryConnect(1.0)` or `SignQuantizer` it is a BNN;
    with `BWN` weights, its scaled cousin. The residual stream, softmax and LayerNorm stay in floating point. Raises ValueError
    for embedding groups.
    """
    handles = [
        m.module.register_forward_pre_hook(lambda module, inputs: (binary_activation(inputs[0]), *inputs[1:]))
        for m in linear_matrices(model, groups)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pack_signs(x: torch.Tensor) -> torch.Tensor:
    """The signs of (rows, n) as (rows, ceil(n / 8)) uint8 words: bit 1 where x >= 0. The last word is filled up with 0."""
    bits = pad((x >= 0).to(torch.uint8), (0, -x.shape[1] % 8))
    place = 2 ** torch.arange(7, -1, -1, device=x.device)  # 128, 64, ..., 1
    return (bits.view(len(x), -1, 8) * place).sum(2).to(torch.uint8)


def popcount(words: torch.Tensor) -> torch.Tensor:
    """How many bits of each uint8 word are 1, looked up in a table of 256."""
    table = torch.tensor([word.bit_count() for word in range(256)], device=words.device)
    return table[words.long()]


def xnor_matmul(a: torch.Tensor, b: torch.Tensor, n: int) -> torch.Tensor:
    """sign(A) sign(B)^T (rows of A, rows of B) from packed signs of n columns, in integers and without multiplying.

    Of n products of +-1, those of unlike signs are -1: the sum is n - 2 * popcount(a xor b). Raises ValueError where a or b
    does not have ceil(n / 8) words a row.
    """
    if a.shape[1] != math.ceil(n / 8) or b.shape[1] != math.ceil(n / 8):
        raise ValueError(f"{n} signs take {math.ceil(n / 8)} words a row, got {a.shape[1]} and {b.shape[1]}")
    return torch.stack([n - 2 * popcount(a ^ row).sum(1) for row in b], dim=1)


# --- Q-07, Q-08 -----------------------------------------------------------------------------------------------------


class BWN(ScaledQuantizer):
    """alpha * B closest to W: B = sign(W) and alpha = mean|W|, per `matrix` or per `row`.

    Rastegari et al. 2016 (XNOR-Net's Binary Weight Network, arXiv 1603.05279), survey 3.1: min ||W - alpha B||^2.
    """

    def __init__(self, per: str = "matrix"):
        super().__init__()
        self.per = per

    def alpha(self, weight: torch.Tensor) -> torch.Tensor:
        """mean|W| of each group, (groups, 1)."""
        return grouped(weight.abs(), self.per).mean(1, keepdim=True)

    def split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B and alpha."""
        return grouped(sign(weight), self.per), self.alpha(weight)


class LAB(BWN):
    """alpha * b with the least loss and not the least distance: b = sign(w), alpha = sum|D w| / sum D.

    Hou, Yao, Kwok 2016 (arXiv 1611.01600), survey 3.1. One proximal Newton step is Adam's step on w, with the gradient at
    alpha * b, followed by the projection min sum_i D_i (alpha b_i - w_i)^2. D is the diagonal of the Hessian as Adam estimates
    it; put `track_curvature` into training as `after_step` to refresh it. Before, D = 1, which makes LAB a BWN.
    """

    def __init__(self, weight: torch.Tensor, per: str = "matrix"):
        super().__init__(per)
        self.register_buffer("D", torch.ones_like(weight, requires_grad=False), persistent=False)

    def alpha(self, weight: torch.Tensor) -> torch.Tensor:
        """The mean of |w| weighted with D, (groups, 1)."""
        D = grouped(self.D, self.per)
        return (D * grouped(weight.abs(), self.per)).sum(1, keepdim=True) / D.sum(1, keepdim=True)


@torch.no_grad()
def track_curvature(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Hook for `train(after_step=...)`: D = sqrt(v) + 1e-8 for each LAB weight, v being Adam's second moment of its gradient.

    Raises ValueError for a weight that the optimiser has not stepped.
    """
    for w, quantizer in latent_weights(model, LAB):
        state = optimizer.state.get(w)
        if not state or "exp_avg_sq" not in state:
            raise ValueError("no Adam statistics for a LAB weight: it must train, under Adam or AdamW")
        quantizer.D.copy_(state["exp_avg_sq"].sqrt() + 1e-8)


def curvature_spread(quantizers: list[Quantizer]) -> float:
    """The 90th percentile of D over its 10th, in the median matrix: how unequally weights count. 1 means that D does nothing."""
    found = []
    for quantizer in quantizers:
        D = ascending(quantizer.D)
        found.append((D[int(0.9 * (len(D) - 1))] / D[int(0.1 * (len(D) - 1))]).item())
    return statistics.median(found)
