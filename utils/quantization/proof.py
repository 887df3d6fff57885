"""Numbers that prove what a row did, read off its own model, in the context in which it runs, or off what its file holds.

A number computed beside a row, by a fresh quantizer on one matrix, stays right when the row is another method.
"""

import statistics

import torch
from torch import nn

from utils.bert import ENCODER, matrices, watch
from utils.encodings import Encoded, unpack_bits
from utils.quantization.codebook import nearest, recode
from utils.trials import Trial

# --- of the weights -------------------------------------------------------------------------------------------------


def values_per_row(model: nn.Module, groups: tuple[str, ...] = ENCODER, rows: int = 16) -> float:
    """Different values in a row of a weight matrix, mean over the first `rows` rows of each matrix of the groups."""
    return statistics.fmean(row.unique().numel() for m in matrices(model, groups) for row in m.weight.detach()[:rows])


def few_valued(model: nn.Module, most: int, groups: tuple[str, ...] = ENCODER) -> int:
    """How many matrices of the groups hold at most `most` different values."""
    return sum(m.weight.detach().unique().numel() <= most for m in matrices(model, groups))


def share_of_zeros(model: nn.Module, groups: tuple[str, ...] = ENCODER) -> float:
    """Weights that are exactly zero, in per cent, mean over the matrices of the groups."""
    return 100 * statistics.fmean((m.weight == 0).float().mean().item() for m in matrices(model, groups))


def different_pieces(model: nn.Module, length: int, groups: tuple[str, ...] = ENCODER) -> int:
    """Different runs of `length` neighbours in a row, of the matrix of the groups that has most of them."""
    return max(len(m.weight.detach().reshape(-1, length).unique(dim=0)) for m in matrices(model, groups))


# --- of what training did -------------------------------------------------------------------------------------------


def codes_and_old(item: Encoded, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a stored tensor, and those that another `weight` of its shape gets on the same levels.

    For codes of the nearest level: uniform grids that use all their codes, codebooks of numbers, sums of binary codes. Raises
    ValueError for any other encoding.
    """
    w, parts = weight.detach().float().cpu(), {name: part.cpu() for name, part in item.parts.items()}
    if item.encoding == "uniform":
        bits, scale, zero = item.meta["bits"], parts["scale"], parts["zero"]
        steps = w.view(*scale.shape, -1) / scale.unsqueeze(-1) + zero.unsqueeze(-1)
        old = steps.round().clamp(0, 2**bits - 1)
    elif item.encoding == "codebook" and parts["centroids"].shape[1] == 1:
        bits, old = item.meta["bits"], nearest(w, parts["centroids"].flatten())
    elif item.encoding == "multi_bit":
        bits, old = 1, recode(w, parts["alpha"]) > 0
    else:
        raise ValueError(f"the codes of encoding {item.encoding!r} are not those of the nearest level")
    return unpack_bits(parts["codes"], bits, old.numel()).view(old.shape), old.to(torch.uint8)


def codes_crossed(trial: Trial, dense: nn.Module, groups: tuple[str, ...] = ENCODER) -> float:
    """Share (%) of a trial's codes that the weights of `dense` would not get on the trial's own levels.

    0 where the weights stood still, however far scales and levels went.
    """
    pairs = [codes_and_old(trial.encoded[m.name], m.weight) for m in matrices(dense, groups)]
    return 100 * sum(int((codes != old).sum()) for codes, old in pairs) / sum(codes.numel() for codes, _ in pairs)


def level_moves(trial: Trial, start: Trial, groups: tuple[str, ...] = ENCODER) -> float:
    """How far training moved the stored levels, mean in per cent of each level's size at the start. A level of zero does not count."""
    moves = []
    for m in matrices(trial.model, groups):
        before, after = (item.encoded[m.name].parts["centroids"].flatten().cpu() for item in (start, trial))
        moves.append(((after - before) / before)[before != 0].abs().mean().item())
    return 100 * statistics.fmean(moves)


# --- of what runs through the network -------------------------------------------------------------------------------


def forward(trial: Trial, batch: dict) -> None:
    """One forward pass of a trial's model over a batch."""
    trial.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


@torch.inference_mode()
def signed_inputs(trial: Trial, batch: dict, groups: tuple[str, ...] = ENCODER) -> int:
    """How many linear layers of the groups get nothing but -1 and +1, in the context in which the trial runs."""
    signed = {}
    with trial.within(trial.model), watch(trial.model, groups, lambda name, x, y: signed.update({name: (x.abs() == 1).all()})):
        forward(trial, batch)
    return sum(bool(only) for only in signed.values())


@torch.inference_mode()
def three_level_inputs(trial: Trial, batch: dict, groups: tuple[str, ...] = ENCODER) -> dict[str, float]:
    """The linear layers for whose input a token's entries are zero or of one size: name -> share of zeros."""
    zeros = {}

    def note(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        size = x.abs()
        if ((size == 0) | (size == size.amax(-1, keepdim=True))).all():
            zeros[name] = (x == 0).float().mean().item()

    with trial.within(trial.model), watch(trial.model, groups, note):
        forward(trial, batch)
    return zeros


@torch.inference_mode()
def binary_maps(trial: Trial, batch: dict) -> int:
    """How many layers have attention maps of zeros and ones alone, in the context in which the trial runs."""
    found = []

    def note(module: nn.Module, args: tuple, output: tuple) -> None:
        found.append(output[1] is not None and bool(((output[1] == 0) | (output[1] == 1)).all()))

    with trial.within(trial.model):
        handles = [layer.attention.self.register_forward_hook(note) for layer in trial.model.bert.encoder.layer]
        forward(trial, batch)
    for handle in handles:
        handle.remove()
    return sum(found)


@torch.inference_mode()
def operand_rounding(trial: Trial, batch: dict) -> tuple[int, float, int]:
    """Of the activation quantizers that the trial's context yields: how many acted, their mean relative error (%), and the most
    values that one of their ranges (a tensor, or one of the first 64 tokens) took."""
    errors, values = [], []

    def note(module: nn.Module, args: tuple, y: torch.Tensor) -> None:
        errors.append(((y - args[0]).norm() / args[0].norm()).item())
        ranges = y.reshape(1, -1) if module.granularity == "tensor" else y.flatten(0, -2)[:64]
        values.append(max(one.unique().numel() for one in ranges))

    with trial.within(trial.model) as quantizers:
        for quantizer in (quantizers or {}).values():
            quantizer.register_forward_hook(note)  # it ends with its quantizer, at the end of the context
        forward(trial, batch)
    return len(errors), 100 * statistics.fmean(errors or [0.0]), max(values, default=0)
