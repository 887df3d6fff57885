"""Sizes that fit a model: what divides its widths, whatever they are."""

import math

from torch import nn

from utils.bert import ENCODER, matrices


def divisor(size: int, most: int) -> int:
    """The largest divisor of a size that is not above `most`."""
    return max(n for n in range(1, min(size, most) + 1) if size % n == 0)


def common_divisor(model: nn.Module, most: int, groups: tuple[str, ...] = ENCODER) -> int:
    """The largest number not above `most` (1 or more) that divides both sides of every matrix: a side of blocks, a length of banks."""
    return divisor(math.gcd(*(side for m in matrices(model, groups) for side in m.weight.shape)), most)
