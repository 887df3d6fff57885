"""Survey section 4.1: students that are their teacher in fewer bits: Apprentice, quantized distillation, learned levels.

A weight is held by a parametrization while it trains; `burn_in` puts the quantized values in place and says how they are
stored.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.utils import parametrize

from utils import encodings
from utils.bert import ENCODER, matrices
from utils.distillation.losses import soft_targets, with_labels
from utils.distillation.objective import Objective, check_weight
from utils.distillation.outputs import Outputs
from utils.encodings import Encoded

# --- K-05 Apprentice, K-06a quantized distillation ------------------------------------------------------------------


def grid(weight: torch.Tensor, bits: int, bucket: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (rows, columns) and the scale and zero (rows, columns / bucket) of value = scale * (code - zero).

    Linear scaling: a bucket's least weight has code 0, its greatest 2^bits - 1. Polino et al. 2018, survey 4.1. Raises
    ValueError for a bucket that does not divide the columns.
    """
    if bucket < 1 or weight.shape[1] % bucket:
        raise ValueError(f"bucket must divide the {weight.shape[1]} columns, got {bucket}")
    grouped = weight.detach().float().unflatten(1, (-1, bucket))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = torch.where(high > low, (high - low) / (2**bits - 1), 1.0)  # a bucket of one value needs no scale
    codes = ((grouped - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return codes.flatten(1), scale, -low / scale


class FakeQuantizer(nn.Module):
    """A weight on a uniform grid; the gradient passes to the weight underneath as if there were no grid (straight through).

    So that a step is Polino's: gradient at the quantized weight, update of the full one, projection at the next forward pass.
    """

    def __init__(self, bits: int, bucket: int):
        super().__init__()
        self.bits, self.bucket = bits, bucket

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The quantized weight, (rows, columns)."""
        codes, scale, zero = grid(weight, self.bits, self.bucket)
        value = (codes.unflatten(1, (-1, self.bucket)) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
        return value.flatten(1).to(weight) + (weight - weight.detach())

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed codes, and scale and zero of each bucket."""
        return encodings.uniform(*grid(weight, self.bits, self.bucket), self.bits)


def lower_precision(model: nn.Module, bits: int, bucket: int = 128, groups: tuple[str, ...] = ENCODER) -> list[str]:
    """Quantize the weights of the groups from now on, in place; returns their names. ValueError for bits outside 1 to 8."""
    _check_bits(bits)
    found = matrices(model, groups)
    for m in found:
        grid(m.weight, bits, bucket)  # a bucket that does not fit shall be told before anything has changed
    for m in found:
        parametrize.register_parametrization(m.module, "weight", FakeQuantizer(bits, bucket))
    return [m.name for m in found]


def quantized_distillation(teacher_weight: float = 0.7, temperature: float = 2.0) -> Objective:
    """K-06a: the loss of a student that trains in low precision (`lower_precision`). Polino et al. 2018, survey 4.1."""
    return with_labels(soft_targets(temperature), teacher_weight)


def apprentice(hard_weight: float = 0.5, soft_weight: float = 0.5) -> Objective:
    """K-05, scheme C: b * cross-entropy with labels + c * cross-entropy with the teacher's probabilities (T = 1).

    The student starts from full-precision weights, goes to low precision (`lower_precision`), and is fine-tuned; its teacher is
    fixed, so that the teacher's own term of the loss has no gradient and is left out. Mishra and Marr 2017, survey 4.1.
    """
    check_weight(hard_weight, "hard_weight")
    check_weight(soft_weight, "soft_weight")

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        soft = -(teacher.logits.softmax(-1) * log_softmax(student.logits, -1)).sum(-1).mean()
        return hard_weight * cross_entropy(student.logits, batch["labels"]) + soft_weight * soft

    return Objective(loss)


# --- K-06b differentiable quantization ------------------------------------------------------------------------------


class LearnedLevels(nn.Module):
    """A frozen weight on levels that learn: each entry takes the nearest level, each level the gradient of its entries.

    `levels` (2^bits,) start at the quantiles of the weight, one set a matrix. Polino et al. 2018, survey 4.1.
    """

    def __init__(self, weight: torch.Tensor, bits: int):
        super().__init__()
        ordered = weight.detach().float().flatten().sort().values
        share = (torch.arange(2**bits, device=weight.device) + 0.5) / 2**bits
        self.levels = nn.Parameter(ordered[(share * len(ordered)).long()].clone())
        self.bits = bits

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The index of the nearest level for every entry."""
        ordered, order = self.levels.detach().sort()
        return order[torch.bucketize(weight.detach().float(), (ordered[1:] + ordered[:-1]) / 2)]

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The levels in the places of the weights. The weight itself gets no gradient."""
        return self.levels[self.nearest(weight)].to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed indices and the levels."""
        return encodings.codebook(self.nearest(weight), self.levels.detach().unsqueeze(1), tuple(weight.shape), self.bits)


def learn_levels(model: nn.Module, bits: int, groups: tuple[str, ...] = ENCODER) -> list[str]:
    """K-06b: put the weights of the groups on levels that learn, and stand still themselves; returns the matrices' names.

    The rest of the model trains as usual. Raises ValueError for bits outside 1 to 8.
    """
    _check_bits(bits)
    found = matrices(model, groups)
    for m in found:
        parametrize.register_parametrization(m.module, "weight", LearnedLevels(m.weight, bits))
    return [m.name for m in found]


@torch.no_grad()
def burn_in(model: nn.Module) -> dict[str, Encoded]:
    """Put the quantized values in place of the parametrizations, and return how each weight is stored (for `finish`)."""
    stored = {}
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module, "weight") and hasattr(module.parametrizations.weight[0], "encode"):
            held = module.parametrizations.weight
            stored[f"{name}.weight"] = held[0].encode(held.original.detach())
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return stored


def _check_bits(bits: int) -> None:
    if bits not in range(1, 9):
        raise ValueError(f"bits must be a whole number from 1 to 8, got {bits}")
