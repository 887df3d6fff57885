"""Masks: which weights stay. A mask dictionary maps a weight's name to a boolean tensor of its shape, True for kept.

A mask can be burnt in once (`apply_masks`), or held while the model trains (`hold_masks`), as a parametrization of the
weight: the forward pass sees weight * mask, so a pruned weight gets no gradient, and the dense weight stays underneath.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

Masks = dict[str, torch.Tensor]
Scores = dict[str, torch.Tensor]
Score = Callable[[nn.Module], Scores]  # what decides which weights go


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless the sparsity is a share in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")


def lowest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Keep-mask of the shape of `scores` that removes exactly round(sparsity * n) entries, the lowest ones."""
    check_sparsity(sparsity)
    flat = scores.detach().float().cpu().flatten().numpy()
    count = round(sparsity * flat.size)
    keep = np.ones(flat.size, dtype=bool)
    if count:
        keep[np.argpartition(flat, count - 1)[:count]] = False
    return torch.from_numpy(keep).view(scores.shape).to(scores.device)


def masks_from_scores(scores: Scores, sparsity: float, scope: str = "global") -> Masks:
    """Remove the lowest-scoring weights, ranked over all matrices (`global`) or inside each (`matrix`)."""
    if scope == "matrix":
        return {name: lowest(score, sparsity) for name, score in scores.items()}
    if scope != "global":
        raise ValueError(f"scope must be 'global' or 'matrix', got {scope!r}")
    keep = lowest(torch.cat([score.detach().flatten() for score in scores.values()]), sparsity)
    pieces = keep.split([score.numel() for score in scores.values()])
    return {name: piece.view(score.shape) for (name, score), piece in zip(scores.items(), pieces, strict=True)}


def sparsity_of(masks: Masks) -> float:
    """Share of removed weights over all masks."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    return 1 - kept / sum(mask.numel() for mask in masks.values())


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set the removed weights to zero, in place."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


class Mask(nn.Module):
    """Parametrization: the weight that the layer uses is weight * mask."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask.float())  # multiplying by a boolean takes six times as long

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that the layer uses."""
        return weight * self.mask


def hold_masks(model: nn.Module, masks: Masks) -> None:
    """Hold the masks from now on, through training; called again, it moves the masks that are there."""
    for name, mask in masks.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        if parametrize.is_parametrized(module, "weight"):
            module.parametrizations.weight[0].mask.copy_(mask)
        else:
            parametrize.register_parametrization(module, "weight", Mask(mask))


def release_masks(model: nn.Module, keep_zeros: bool = True) -> None:
    """Stop holding: burn the zeros in, or (`keep_zeros=False`) bring back the dense weights that lay underneath."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=keep_zeros)


def held_masks(model: nn.Module) -> Masks:
    """The masks that the model holds now."""
    return {f"{name}.weight": module.parametrizations.weight[0].mask.bool() for name, module in model.named_modules()
            if parametrize.is_parametrized(module, "weight")}  # fmt: skip
