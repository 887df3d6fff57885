"""Survey section 3.3 (table 9): loss-aware ternary and m-bit weights. Levels are chosen where the loss is steep, not where w is.

To second order the loss gains 0.5 * sum_i d_i (alpha b_i - w_i)^2 when w becomes alpha * b. The curvature D comes for free: it
is the square root of Adam's second moment.
"""

import torch
from torch import nn

from utils import encodings
from utils.encodings import Encoded
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


def first_alpha(w: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Where the alternation starts: for three levels the mean |w| above 0.7 * mean|w|, as in TWN; else the best max|w| / 2^j."""
    a = w.abs()
    if len(levels) == 3:
        return a[a >= 0.7 * a.mean()].mean()
    tries = [(a.max() / 2**j).clamp(min=1e-30) for j in range(6)]
    return min(tries, key=lambda alpha: (alpha * levels[nearest_level(w / alpha, levels)] - w).square().sum().item())


def loss_aware_levels(
    w: torch.Tensor, D: torch.Tensor, levels: torch.Tensor, alpha: torch.Tensor, iterations: int = 10, tolerance: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and the level indices of b, alternating towards the minimum of sum D (w - alpha b)^2. Hou, Kwok 2018.

    b = the level nearest to w / alpha;  alpha = sum(D b w) / sum(D b^2), at most `iterations` times from the given
    alpha, until it stands still. (With |b| for b^2, as it is often written, this holds for ternary b only.)
    """
    for _ in range(iterations):
        b = levels[nearest_level(w / alpha.clamp(min=1e-30), levels)]
        before, alpha = alpha, (D * b * w).sum() / (D * b * b).sum().clamp(min=1e-30)
        if (alpha - before).abs() <= tolerance * before:
            break
    return alpha, nearest_level(w / alpha.clamp(min=1e-30), levels)


class LossAwareQuantizer(Quantizer):
    """LAT (2 bits, ternary) and LAQ (more, `linear` or `logarithmic` levels). Hou, Kwok 2018, survey 3.3.

    D is one everywhere, which makes it the ternary network of plain least squares, until `update_curvature` fills it from the
    optimiser; give that to `train` as `after_step`. Raises ValueError for bits outside 2 to 8.
    """

    def __init__(self, weight: torch.Tensor, bits: int = 2, kind: str = "linear"):
        super().__init__()
        self.bits, self.kind = bits, kind
        self.register_buffer("levels", level_values(bits, kind))
        check_weight(weight)
        w = weight.detach().float()
        self.register_buffer("D", torch.ones_like(w))
        self.register_buffer("alpha", first_alpha(w, self.levels.to(w.device)))

    def solve(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and the indices of b. Raises ValueError for a weight that is not finite."""
        check_weight(weight)
        return loss_aware_levels(weight.detach().float(), self.D, self.levels, self.alpha)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """alpha * b."""
        alpha, index = self.solve(weight)
        return (alpha * self.levels)[index].to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed level indices and the levels, times alpha."""
        alpha, index = self.solve(weight)
        return encodings.codebook(index, (alpha * self.levels).unsqueeze(1), weight.shape, self.bits)


def update_curvature(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """D = sqrt(v) + 1e-8 for every loss-aware quantizer, v being Adam's running mean of squared gradients of its weight.

    Each alternation starts from the alpha of the step before: weights move little in a step, so it soon stands still. Adam's
    bias correction would scale all of D alike, and cancels in alpha and b. A weight that does not train keeps its D.
    """
    for module in model.modules():
        weights = getattr(module, "parametrizations", {})
        if "weight" in weights and isinstance(weights["weight"][0], LossAwareQuantizer):
            quantizer, latent = weights["weight"][0], weights["weight"].original
            if "exp_avg_sq" in optimizer.state.get(latent, {}):
                quantizer.D.copy_(optimizer.state[latent]["exp_avg_sq"].sqrt() + 1e-8)
                quantizer.alpha.copy_(quantizer.solve(latent)[0])
