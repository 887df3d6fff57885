"""Two factors whose inner width is learned (survey 6.1): every component of their product has a gate."""

import math

import torch
from torch import nn

from utils.parts.linear import LowRankLinear, check_rank

# --- T-05 FLOP ------------------------------------------------------------------------------------------------------

TEMPERATURE, GAMMA, ZETA = 1.0, -0.1, 1.1  # of the hard concrete distribution, and the interval to which it is stretched
MEAN_SLOPE = 0.8  # of the authors: sigmoid(0.8 psi / T) comes within 0.01 of the mean of a gate


def hard_concrete(log_alpha: torch.Tensor) -> torch.Tensor:
    """A sample of gates in [0, 1], 0 or 1 with positive probability, yet with a gradient in `log_alpha`; its shape.

    u ~ U(0, 1); s = sigmoid((log u - log(1 - u) + log_alpha) / T); clip(s (zeta - gamma) + gamma, 0, 1). Louizos et al. 2018
    (arXiv 1712.01312).
    """
    u = torch.rand(log_alpha.shape).clamp(1e-6, 1 - 1e-6).to(log_alpha)
    s = ((u.logit() + log_alpha) / TEMPERATURE).sigmoid()
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """Pr(gate > 0) = sigmoid(log_alpha - T log(-gamma / zeta)); the shape of `log_alpha`."""
    return (log_alpha - TEMPERATURE * math.log(-GAMMA / ZETA)).sigmoid()


def one_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """Pr(gate = 1) = sigmoid(log_alpha - T log((1 - gamma) / (zeta - 1))); what is left between the two is undecided."""
    return (log_alpha - TEMPERATURE * math.log((1 - GAMMA) / (ZETA - 1))).sigmoid()


def mean_gates(log_alpha: torch.Tensor) -> torch.Tensor:
    """The mean of a gate, nearly; the shape of `log_alpha`."""
    return (MEAN_SLOPE / TEMPERATURE * log_alpha).sigmoid()


def settled_gates(log_alpha: torch.Tensor) -> torch.Tensor:
    """Gates without noise, (rank,): as many are 0 as samples have on average, the lowest ones; the others have their mean.

    At least one stays open: a factorised layer of rank 0 would be none.
    """
    closed = min(round((1 - open_probability(log_alpha)).sum().item()), len(log_alpha) - 1)
    kept = log_alpha.argsort(descending=True, stable=True)[: len(log_alpha) - closed]
    return torch.zeros_like(log_alpha).index_copy(0, kept, mean_gates(log_alpha)[kept])


class GatedLowRankLinear(LowRankLinear):
    """y = L (xi * (R x)) + b with a gate xi_k for each component l_k r_k^T: training chooses the components, and so the rank.

    FLOP, Wang, Wohlwend and Lei 2019 (arXiv 1910.04732), survey 6.1. Gates are drawn once a pass in training, and settled in
    evaluation; closed components are left out only by `shrunk`, so until then a pass takes what the full rank takes. Raises
    ValueError for a rank outside 1 to the smaller width.
    """

    kind = "gated_low_rank_linear"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True):
        check_rank(rank, out_features, in_features)  # nobody shares these factors
        super().__init__(in_features, out_features, rank, bias)
        self.log_alpha = nn.Parameter(torch.zeros(rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        gates = hard_concrete(self.log_alpha) if self.training else settled_gates(self.log_alpha)
        inner = nn.functional.linear(x, self.right)
        return nn.functional.linear(inner * gates.to(inner.dtype), self.left, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out, in) with settled gates."""
        return (self.left * settled_gates(self.log_alpha)) @ self.right


@torch.no_grad()
def shrunk(part: GatedLowRankLinear, kept: torch.Tensor) -> LowRankLinear:
    """Plain factors with the components `kept`, (rank,) boolean; the means of their gates are multiplied into L.

    Raises ValueError where no component is kept.
    """
    if not kept.any():
        raise ValueError("a factorised layer keeps one component or more, got none")
    small = LowRankLinear(part.in_features, part.out_features, int(kept.sum()), part.bias is not None).to(part.left)
    small.left.copy_((part.left * mean_gates(part.log_alpha))[:, kept])
    small.right.copy_(part.right[kept])
    if part.bias is not None:
        small.bias.copy_(part.bias)
    return small.train(part.training)
