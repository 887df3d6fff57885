"""Survey section 3.3 (table 9): loss-aware ternary and m-bit weights. Levels are chosen where the loss is steep, not where w is.

To second order the loss gains 0.5 * sum_i d_i (alpha b_i - w_i)^2 when w becomes alpha * b. The curvature D comes for free: it
is the square root of Adam's second moment.
"""

import torch
from torch import nn

from utils import encodings
from utils.encodings import Encoded
from utils.quantization.binary import TINY, latent_weights
from utils.quantization.quantizer import Quantizer, check_bits, check_weight

KINDS = ("linear", "logarithmic")


def level_values(bits: int, kind: str = "linear") -> torch.Tensor:
    """The 2n + 1 levels in [-1, 1], sorted, n = 2^(bits-1) - 1: multiples of 1/n, or 0 and +-2^-j, j < n. 2 bits: -1, 0, 1.

    Raises ValueError for an unknown kind and for bits outside 2 to 8: one bit has no level between -1 and 1.
    """
    check_bits(bits)
    if bits == 1 or kind not in KINDS:
        raise ValueError(f"bits must lie in 2 to 8 and kind be one of {', '.join(KINDS)}, got {bits} and {kind!r}")
    n = 2 ** (bits - 1) - 1
    positive = torch.arange(1, n + 1) / n if kind == "linear" else 2.0 ** -torch.arange(n).flip(0)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def nearest_level(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The index of the level nearest to each x."""
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)


def nearest_value(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The level nearest to each x, of its shape. Evenly spaced levels need no search, which is five times faster."""
    n = len(levels) // 2
    if torch.equal(levels[n:], torch.arange(n + 1, device=levels.device) / n):
        return (x.clamp(-1, 1) * n).round() / n
    return levels[nearest_level(x, levels)]


def first_alpha(w: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Where the alternation starts: for three levels the mean |w| above 0.7 * mean|w|, as in TWN; else the best max|w| / 2^j."""
    a = w.abs()
    if len(levels) == 3:
        return a[a >= 0.7 * a.mean()].mean()
    tries = [(a.max() / 2**j).clamp(min=TINY) for j in range(6)]
    return min(tries, key=lambda alpha: (alpha * levels[nearest_level(w / alpha, levels)] - w).square().sum().item())


def loss_aware_scale(
    w: torch.Tensor, D: torch.Tensor, levels: torch.Tensor, alpha: torch.Tensor, iterations: int = 10, tolerance: float = 1e-4
) -> torch.Tensor:
    """The alpha of a local minimum of sum D (w - alpha b)^2 over alpha and the levels b. Hou, Kwok 2018.

    Alternates b = the level nearest to w / alpha and alpha = sum(D b w) / sum(D b^2), at most `iterations` times from the given
    alpha, until it moves by less than `tolerance` of itself. (With |b| for b^2, as it is often written, this holds for ternary b
    only.)
    """
    weighted = D * w
    for _ in range(iterations):
        b = nearest_value(w / alpha.clamp(min=TINY), levels)
        before, alpha = alpha, (weighted * b).sum() / (D * b * b).sum().clamp(min=TINY)
        if (alpha - before).abs() <= tolerance * before:
            break
    return alpha


def loss_aware_levels(
    w: torch.Tensor, D: torch.Tensor, levels: torch.Tensor, alpha: torch.Tensor, iterations: int = 10, tolerance: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha by `loss_aware_scale`, and the index of the level that each weight then takes."""
    alpha = loss_aware_scale(w, D, levels, alpha, iterations, tolerance)
    return alpha, nearest_level(w / alpha.clamp(min=TINY), levels)


class LossAwareQuantizer(Quantizer):
    """LAT (2 bits, ternary) and LAQ (more, `linear` or `logarithmic` levels). Hou, Kwok 2018, survey 3.3.

    alpha is solved for, at first with D = 1, then after each step by `update_curvature`: give that to `train` as `after_step`. With
    `curvature` False D stays one, which makes it the network of plain least squares: the control. Raises ValueError for bits
    outside 2 to 8.
    """

    def __init__(self, weight: torch.Tensor, bits: int = 2, kind: str = "linear", curvature: bool = True):
        super().__init__()
        self.bits, self.kind, self.curvature = bits, kind, curvature
        self.register_buffer("levels", level_values(bits, kind))
        check_weight(weight)
        w = weight.detach().float()
        self.register_buffer("D", torch.ones_like(w), persistent=False)
        levels = self.levels.to(w.device)
        self.register_buffer("alpha", loss_aware_scale(w, self.D, levels, first_alpha(w, levels)))

    def solve(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best alpha for the D of now, alternating from the alpha of now, and the levels b that go with it."""
        w = weight.detach().float()
        alpha = loss_aware_scale(w, self.D, self.levels, self.alpha)
        return alpha, nearest_value(w / alpha.clamp(min=TINY), self.levels)

    def b(self, weight: torch.Tensor) -> torch.Tensor:
        """The level nearest to each w / alpha."""
        return nearest_value(weight.detach().float() / self.alpha.clamp(min=TINY), self.levels)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """alpha * b."""
        return (self.alpha * self.b(weight)).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed level indices and the levels, times alpha. Raises ValueError for a weight that is not finite."""
        check_weight(weight)
        levels = (self.alpha * self.levels).unsqueeze(1)
        return encodings.codebook(nearest_level(self.b(weight), self.levels), levels, weight.shape, self.bits)


@torch.no_grad()
def update_curvature(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """D = sqrt(v) + 1e-8 for every loss-aware quantizer, v being Adam's running mean of squared gradients; then alpha for this D.

    Each alternation starts from the alpha of the step before: weights move little in a step, so it soon stands still. Adam's
    bias correction would scale all of D alike, and cancels in alpha and b. A weight that does not train keeps its D.
    """
    for latent, quantizer in latent_weights(model, LossAwareQuantizer):
        state = optimizer.state.get(latent, {})
        if quantizer.curvature and "exp_avg_sq" in state:
            quantizer.D.copy_(state["exp_avg_sq"].sqrt() + 1e-8)
        quantizer.alpha.copy_(quantizer.solve(latent)[0])
