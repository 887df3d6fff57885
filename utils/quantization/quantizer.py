"""One interface for all quantizers: a parametrization of a weight, with a straight-through gradient, that also packs it.

A quantizer is a small module that turns a weight into its quantized value, in floating point (`forward`), and into what a file
would hold (`encode`). Attached to a trained model it is post-training quantization; attached before training, the forward pass
sees quantized weights while the optimiser updates the full-precision ones underneath.
"""

import functools
import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from utils.bert import ENCODER, Matrix, matrices
from utils.checkpoints import is_finite
from utils.encodings import Encoded

REMEMBERED = 4096  # results of a search that are kept


def straight_through(weight: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """The quantized value in the forward pass; in the backward pass its gradient goes to the weight unchanged."""
    return quantized.detach() + (weight - weight.detach())  # the bracket is exactly zero: no rounding enters the value


class Quantizer(nn.Module):
    """Base of all quantizers. A subclass gives `quantize` (value) and `encode` (what is stored of it)."""

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The quantized value of a weight, of its shape and type."""
        raise NotImplementedError

    def encode(self, weight: torch.Tensor) -> Encoded:
        """What a file stores of `quantize(weight)`: codes, scales, codebooks."""
        raise NotImplementedError

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """`quantize` with the straight-through gradient. Override where levels are learned."""
        return straight_through(weight, self.quantize(weight))


def check_weight(weight: torch.Tensor) -> None:
    """Raise ValueError for an empty weight or one with NaN or infinite entries."""
    if not weight.numel() or not is_finite(weight):
        raise ValueError("a weight to quantize must have finite entries and at least one of them")


def ascending(values: torch.Tensor) -> torch.Tensor:
    """The values of a tensor sorted, (n,). On a CPU by NumPy, whose sort takes a thirtieth of the time of torch's."""
    flat = values.detach().flatten()
    return flat.sort().values if flat.is_cuda else torch.from_numpy(np.sort(flat.numpy()))


def remembered(search: Callable) -> Callable:
    """A search over a weight `search(weight, *options)` that is done once per content: every trial starts from a copy of one baseline.

    Its results are shared: whoever changes one clones it first.
    """
    memory: dict[tuple, object] = {}

    @functools.wraps(search)
    def look(weight: torch.Tensor, *options, **named) -> object:
        content = hashlib.blake2b(weight.detach().contiguous().cpu().view(torch.uint8).numpy(), digest_size=16).digest()
        key = (content, weight.shape, weight.dtype, weight.device, options, *sorted(named.items()))
        if key not in memory:
            if len(memory) >= REMEMBERED:
                del memory[next(iter(memory))]  # the oldest
            memory[key] = search(weight, *options, **named)
        return memory[key]

    return look


def check_bits(bits: int) -> None:
    """Raise ValueError unless bits is a whole number from 1 to 8."""
    if bits not in range(1, 9):
        raise ValueError(f"bits must be a whole number from 1 to 8, got {bits}")


def attach(model: nn.Module, make: Callable[[Matrix], Quantizer], groups: tuple[str, ...] = ENCODER) -> list[str]:
    """Quantize the weights of the groups from now on; `make(matrix)` gives each matrix its quantizer. Returns their names."""
    names = []
    for matrix in matrices(model, groups):
        check_weight(matrix.weight)
        parametrize.register_parametrization(matrix.module, "weight", make(matrix).to(matrix.weight.device))
        names.append(matrix.name)
    return names


def detach(model: nn.Module) -> dict[str, Encoded]:
    """Burn the quantized values in, remove all quantizers, and return how each weight is stored."""
    encoded = {}
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], Quantizer):
            quantizer, latent = module.parametrizations.weight[0], module.parametrizations.weight.original.detach()
            encoded[f"{name}.weight"] = quantizer.encode(latent)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return encoded
