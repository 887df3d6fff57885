"""Parts in the place of linear layers: all of some groups at once, what was kept of their matrices, and the way back."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from utils import bert, parts
from utils.parts.linear import LowRankLinear, in_place_of

Make = Callable[[nn.Linear, int], parts.Part]
READ_ONE_STATE = ("query", "key", "value")  # of one layer


@torch.no_grad()
def replace_linear(model: nn.Module, groups: tuple[str, ...], make: Make) -> dict[str, float]:
    """Put `make(linear, number)` in the place of every linear layer of the groups; returns what was `kept` of each matrix.

    `number` counts the matrices from 0, so that each can have a seed of its own. Raises ValueError for embedding groups; where
    `make` does, the model stays as it was.
    """
    matrices = bert.linear_matrices(model, groups)
    made = {matrix.name: make(matrix.module, number) for number, matrix in enumerate(matrices)}
    return {matrix.name: take_place(model, matrix, made[matrix.name], made[matrix.name].weight) for matrix in matrices}


def take_place(model: nn.Module, matrix: bert.Matrix, part: parts.Part, weight: torch.Tensor) -> float:
    """Put a part whose matrix is `weight` in the place of a linear layer; returns what is `kept` of the layer's matrix."""
    share = kept(matrix.weight, weight)
    model.set_submodule(matrix.name.removesuffix(".weight"), part.train(model.training))
    return share


@torch.no_grad()
def put_factors(
    model: nn.Module, matrices: Sequence[bert.Matrix], lefts: list[torch.Tensor], right: torch.Tensor
) -> dict[str, float]:
    """Put W_l ~ L_l R, with L_l (out, rank), in the place of linear layers that read one input; returns what was `kept` of each.

    R (rank, in) is one parameter: stored, trained and counted once.
    """
    common, found = nn.Parameter(right.to(matrices[0].weight.dtype)), {}
    for matrix, left in zip(matrices, lefts, strict=True):
        part = in_place_of(matrix.module, LowRankLinear, len(right))
        part.right = common
        part.left.copy_(left)
        found[matrix.name] = take_place(model, matrix, part, part.weight)
    return found


def kept(before: torch.Tensor, after: torch.Tensor) -> float:
    """1 - |before - after|^2 / |before|^2: 1 for equal matrices, 0 for zeros in place of one."""
    return 1 - ((before - after).abs().square().sum() / before.abs().square().sum()).item()


@torch.no_grad()
def expand(model: nn.Module) -> nn.Module:
    """A copy with a plain layer or table for every part that can be one: how a user with memory to spare would run the model.

    Its logits are the same; only its milliseconds and megabytes differ.
    """
    plain = bert.fresh_copy(model)
    for path, part in parts.find(plain).items():
        if hasattr(part, "expanded"):
            plain.set_submodule(path, part.expanded())
    return plain.eval()
