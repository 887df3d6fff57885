"""How one tensor is stored: every encoder beside its decoder, and the bits underneath.

An encoder turns a tensor (or codes, scales, codebooks) into an `Encoded`; `decode` gives the tensor back. The table `DECODERS` is
closed: a file can name an encoding, never code. Chapters choose encodings, they define none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from utils import CompanionError


class EncodingError(CompanionError):
    """Stored parts do not fit what they are said to encode."""


@dataclass
class Encoded:
    """One tensor as it is stored: named parts (tensors) and whatever else decoding needs (JSON values)."""

    encoding: str
    shape: tuple[int, ...]
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    meta: dict = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def decode(item: Encoded) -> torch.Tensor:
    """The tensor that an `Encoded` stands for. Raises EncodingError where its parts do not fit together.

    Sizes are compared before anything is expanded: what is allocated has the declared shape, or is as large as the parts.
    """
    check(item)
    if item.encoding == "tied":
        raise EncodingError("a tied tensor has no values of its own: decode the one that it is tied to")
    return DECODERS[item.encoding](item.parts, item.meta, item.shape).view(item.shape)


def check(item: Encoded) -> None:
    """Raise EncodingError for an unknown encoding, for other parts or numbers than it has, and for bits that are not packed."""
    _need(item.encoding in LAYOUT, f"unknown encoding {item.encoding!r}: this version knows {', '.join(LAYOUT)}")
    parts, meta = LAYOUT[item.encoding]
    _need(
        set(item.parts) == set(parts), f"{item.encoding} has the parts {', '.join(parts) or 'none'}, got {', '.join(item.parts)}"
    )
    _need(set(item.meta) == set(meta), f"{item.encoding} needs {', '.join(meta) or 'nothing else'}, got {', '.join(item.meta)}")
    for name, value in item.meta.items():
        _need(META[name](value), f"{item.encoding} with {name} = {str(value)[:40]!r}")
    for name, part in item.parts.items():
        packed = name in PACKED
        _need(not part.is_complex() and (not packed or (part.dtype == torch.uint8 and part.dim() == 1)),
              f"{name} of {item.encoding} is a tensor of type {part.dtype} and shape {tuple(part.shape)}")  # fmt: skip


def _need(condition: object, message: str) -> None:
    if not condition:
        raise EncodingError(message)


def _is_whole(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value <= most


LAYOUT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # encoding -> its parts, and what else decoding needs
    "dense": (("values",), ()),
    "tied": ((), ("to",)),
    "bitmap": (("bitmap", "values"), ()),
    "index_difference": (("gaps", "values"), ("bits", "count")),
    "uniform": (("codes", "scale", "zero"), ("bits",)),
    "codebook": (("codes", "centroids"), ("bits", "count")),
    "product": (("codes", "centroids"), ("bits", "axis")),
    "residual": (("codes", "centroids"), ("bits",)),
    "multi_bit": (("codes", "alpha"), ()),
    "outliers": (("codes", "centroids", "positions", "values"), ("bits",)),
    "factors": (("left", "right"), ()),
}
PACKED = ("bitmap", "gaps", "codes")
META: dict[str, Callable[[object], bool]] = {
    "bits": _is_whole(1, 8),
    "count": _is_whole(0, 2**40),
    "axis": lambda value: value in ("columns", "rows"),
    "to": lambda value: isinstance(value, str),
}
AT_ONCE = 2**26  # numbers that residual vectors may take while they are added up


# --- encoders -------------------------------------------------------------------------------------------------------


def dense(tensor: torch.Tensor) -> Encoded:
    """All values, in the tensor's own type."""
    return Encoded("dense", tuple(tensor.shape), {"values": tensor.contiguous()})


def tied(tensor: torch.Tensor, to: str) -> Encoded:
    """Nothing: the values are those of the tensor named `to`."""
    return Encoded("tied", tuple(tensor.shape), meta={"to": to})


def bitmap(tensor: torch.Tensor) -> Encoded:
    """One bit per position and the non-zero values: n / 8 + 4 * nnz bytes in float32. A zero comes back without its sign."""
    flat = tensor.flatten()
    nonzero = flat != 0
    return Encoded("bitmap", tuple(tensor.shape), {"bitmap": pack_bits(nonzero.to(torch.uint8), 1), "values": flat[nonzero]})


def index_difference(tensor: torch.Tensor, bits: int) -> Encoded:
    """The non-zero values and the gaps between their positions in `bits` bits each.

    A gap too long for `bits` bits is bridged by stored zeros, as in Deep Compression (Han et al. 2015, survey 2.1.2). A zero comes
    back without its sign.
    """
    flat = tensor.flatten()
    positions = torch.nonzero(flat).flatten().numpy()
    gaps = np.diff(positions, prepend=-1) - 1
    fillers = gaps // 2**bits
    ends = np.cumsum(fillers + 1)  # where each true value lands among the stored ones
    codes = np.full(int(ends[-1]) if len(ends) else 0, 2**bits - 1, dtype=np.uint8)
    codes[ends - 1] = gaps - fillers * 2**bits
    values = torch.zeros(len(codes), dtype=tensor.dtype)
    values[torch.from_numpy(ends - 1)] = flat[torch.from_numpy(positions)]
    parts = {"gaps": pack_bits(torch.from_numpy(codes), bits), "values": values}
    return Encoded("index_difference", tuple(tensor.shape), parts, {"bits": bits, "count": len(codes)})


def sparse(tensor: torch.Tensor) -> Encoded:
    """The smallest of `dense`, `bitmap` and `index_difference` (with the best number of bits, at most 8).

    All but `dense` forget the sign of zeros. To keep it would undo pruning, which leaves -0.0 in half of the places (-3 times 0).
    """
    n, nnz = tensor.numel(), int(torch.count_nonzero(tensor))
    size = tensor.element_size()
    candidates = {"dense": n * size, "bitmap": math.ceil(n / 8) + nnz * size}
    likely = max(1, min(8, round(math.log2(max(2.0, n / max(1, nnz)))) + 1))  # gaps are geometric: their mean is n / nnz
    tries = [dense(tensor)] if candidates["dense"] <= candidates["bitmap"] else [bitmap(tensor)]
    if nnz and nnz < 0.2 * n:  # above a fifth, a bit per position beats a few bits per value
        tries += [index_difference(tensor, bits) for bits in {likely, min(8, likely + 1), min(8, likely + 2)}]
    return min(tries, key=lambda encoded: encoded.nbytes)


def uniform(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> Encoded:
    """Low-bit codes: value = scale * (code - zero). `codes` (rows, columns), unsigned; `scale`, `zero` (rows, groups).

    Each row is cut into equal groups of columns; (1, 1) scales mean one range for the whole tensor.
    """
    parts = {"codes": pack_bits(codes, bits), "scale": scale.contiguous(), "zero": zero.contiguous()}
    return Encoded("uniform", tuple(codes.shape), parts, {"bits": bits})


def codebook(codes: torch.Tensor, centroids: torch.Tensor, shape: tuple[int, ...], bits: int) -> Encoded:
    """Indices into centroids. `codes` (any shape), `centroids` (k, d): the looked-up vectors in order fill `shape`."""
    parts = {"codes": pack_bits(codes.flatten(), bits), "centroids": centroids.contiguous()}
    return Encoded("codebook", tuple(shape), parts, {"bits": bits, "count": codes.numel()})


def factors(left: torch.Tensor, right: torch.Tensor) -> Encoded:
    """A product: left (out, rank) times right (rank, in)."""
    return Encoded("factors", (left.shape[0], right.shape[1]), {"left": left.contiguous(), "right": right.contiguous()})


def product(index: torch.Tensor, centroids: torch.Tensor, shape: tuple[int, ...], bits: int, axis: str = "columns") -> Encoded:
    """Product quantization: `index` (s, points) into the codebooks `centroids` (s or 1, k, d) of s blocks of columns (or rows)."""
    parts = {"codes": pack_bits(index, bits), "centroids": centroids}
    return Encoded("product", tuple(shape), parts, {"bits": bits, "axis": axis})


def residual(index: torch.Tensor, centroids: torch.Tensor, shape: tuple[int, ...], bits: int) -> Encoded:
    """Residual quantization: `index` (t, points) into t codebooks `centroids` (t, k, length), whose vectors are added."""
    return Encoded("residual", tuple(shape), {"codes": pack_bits(index, bits), "centroids": centroids}, {"bits": bits})


def multi_bit(B: torch.Tensor, alpha: torch.Tensor, shape: tuple[int, ...]) -> Encoded:
    """Sums of binary codes: signs `B` (rows, k, n) and scales `alpha` (rows, k)."""
    parts = {"codes": pack_bits((B > 0).to(torch.uint8), 1), "alpha": alpha.contiguous()}
    return Encoded("multi_bit", tuple(shape), parts)


def outliers(index: torch.Tensor, centroids: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor, bits: int) -> Encoded:
    """A codebook for all entries, but those at the flat `positions` keep the values that they have in `weight`."""
    parts = {"codes": pack_bits(index, bits), "centroids": centroids, "positions": positions.to(torch.int32),
             "values": weight.flatten()[positions]}  # fmt: skip
    return Encoded("outliers", tuple(weight.shape), parts, {"bits": bits})


def look_up(centroids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The vectors (sets, points, d) that the indices (sets, points) name."""
    return centroids.gather(1, index.unsqueeze(-1).expand(-1, -1, centroids.shape[-1]))


def paste_columns(points: torch.Tensor) -> torch.Tensor:
    """The inverse of `cut_columns`."""
    return points.transpose(0, 1).flatten(1)


def decode_bits(alpha: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """w = sum_i alpha_i b_i, row by row, (rows, n)."""
    return (alpha.unsqueeze(-1) * B).sum(1)


# --- decoders -------------------------------------------------------------------------------------------------------


def _decode_dense(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    _need(tuple(parts["values"].shape) == tuple(shape), f"values {tuple(parts['values'].shape)} of a tensor {tuple(shape)}")
    return parts["values"]


def _decode_bitmap(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    places = unpack_bits(parts["bitmap"], 1, math.prod(shape)).bool()
    _need_values(parts["values"], int(places.sum()))
    out = torch.zeros(math.prod(shape), dtype=parts["values"].dtype)
    out[places] = parts["values"]
    return out.view(shape)


def _decode_index_difference(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    gaps = unpack_bits(parts["gaps"], meta["bits"], meta["count"]).long()
    _need_values(parts["values"], meta["count"])
    places = torch.cumsum(gaps + 1, 0) - 1
    _need(not len(places) or places[-1] < math.prod(shape), f"gaps lead beyond the {math.prod(shape)} places of {tuple(shape)}")
    out = torch.zeros(math.prod(shape), dtype=parts["values"].dtype)
    out[places] = parts["values"]
    return out.view(shape)


def _decode_uniform(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    scale, zero = parts["scale"], parts["zero"]
    fits = scale.dim() == 2 and zero.shape in (scale.shape, (1, 1)) and scale.is_floating_point()  # one zero may serve all
    _need(fits, f"scales {tuple(scale.shape)} and zeros {tuple(zero.shape)} must be (rows, groups)")
    _need(
        scale.numel() and math.prod(shape) % scale.numel() == 0, f"{scale.numel()} ranges do not divide {math.prod(shape)} codes"
    )
    codes = unpack_bits(parts["codes"], meta["bits"], math.prod(shape)).view(shape).to(scale.dtype)
    rows, groups = scale.shape
    grouped = codes.view(rows, groups, -1) - zero.unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1)).view(shape)


def _decode_codebook(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    centroids = parts["centroids"]
    _need(centroids.dim() == 2 and meta["count"] * centroids.shape[1] == math.prod(shape),
          f"{meta['count']} codes and centroids {tuple(centroids.shape)} do not fill {tuple(shape)}")  # fmt: skip
    return centroids[_indices(parts, meta, meta["count"], len(centroids))].reshape(shape)


def _decode_product(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    centroids = parts["centroids"]
    _need(
        len(shape) == 2 and centroids.dim() == 3 and centroids.shape[-1], f"codebooks {tuple(centroids.shape)} of {tuple(shape)}"
    )
    points, length = shape if meta["axis"] == "columns" else reversed(shape)
    s, rest = divmod(length, centroids.shape[-1])
    _need(not rest and len(centroids) in (1, s), f"codebooks {tuple(centroids.shape)} do not make vectors of {length}")
    index = _indices(parts, meta, s * points, centroids.shape[1]).view(s, points)
    w = paste_columns(look_up(centroids.expand(s, -1, -1), index))  # a lone codebook serves all blocks
    return w if meta["axis"] == "columns" else w.T.contiguous()


def _decode_residual(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    centroids, n = parts["centroids"], math.prod(shape)
    _need(centroids.dim() == 3 and centroids.numel() and n % centroids.shape[-1] == 0,
          f"codebooks {tuple(centroids.shape)} do not make {tuple(shape)}")  # fmt: skip
    t, k, length = centroids.shape
    index = _indices(parts, meta, t * (n // length), k).view(t, n // length)
    chunk = index.shape[1] if t * n <= AT_ONCE else max(1, AT_ONCE // (t * length))
    return torch.cat([look_up(centroids, some).sum(0) for some in index.split(max(1, chunk), 1)]).view(shape)


def _decode_multi_bit(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    alpha = parts["alpha"]
    _need(len(shape) == 2 and alpha.dim() == 2 and len(alpha) == shape[0] and alpha.is_floating_point(),
          f"scales {tuple(alpha.shape)} of {tuple(shape)}")  # fmt: skip
    B = unpack_bits(parts["codes"], 1, alpha.numel() * shape[-1]).view(*alpha.shape, shape[-1])
    return decode_bits(alpha, 2.0 * B - 1).view(shape)


def _decode_outliers(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    positions, n = parts["positions"].long(), math.prod(shape)
    _need(parts["centroids"].dim() == 1, f"centroids {tuple(parts['centroids'].shape)} must be (k,)")
    _need_values(parts["values"], positions.numel())
    _need(
        positions.dim() == 1 and bool(((positions >= 0) & (positions < n)).all()),
        f"positions beyond the {n} places of {tuple(shape)}",
    )
    flat = parts["centroids"][_indices(parts, meta, n, len(parts["centroids"]))]
    flat[positions] = parts["values"]
    return flat.view(shape)


def _decode_factors(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    left, right = parts["left"], parts["right"]
    fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0] and (len(left), right.shape[1]) == tuple(shape)
    _need(fits, f"factors {tuple(left.shape)} and {tuple(right.shape)} of {tuple(shape)}")
    return left @ right


def _indices(parts: dict, meta: dict, count: int, size: int) -> torch.Tensor:
    """The codes (count,) as indices into a codebook of that size. Raises EncodingError for one beyond it."""
    codes = unpack_bits(parts["codes"], meta["bits"], count)
    _need(not count or int(codes.max()) < size, f"codes beyond a codebook of {size}")
    return codes.long()


def _need_values(values: torch.Tensor, count: int) -> None:
    _need(tuple(values.shape) == (count,), f"values {tuple(values.shape)} for {count} places")


DECODERS = {
    "dense": _decode_dense,
    "bitmap": _decode_bitmap,
    "index_difference": _decode_index_difference,
    "uniform": _decode_uniform,
    "codebook": _decode_codebook,
    "product": _decode_product,
    "residual": _decode_residual,
    "multi_bit": _decode_multi_bit,
    "outliers": _decode_outliers,
    "factors": _decode_factors,
}


# --- bits -----------------------------------------------------------------------------------------------------------


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes in [0, 2**bits) as a uint8 tensor of ceil(n * bits / 8) bytes. Raises ValueError for bits outside 1 to 8 or a code
    that does not fit."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must lie in 1 to 8, got {bits}")
    array = codes.detach().cpu().flatten().numpy()
    if array.size and not (array.min() >= 0 and array.max() < 2**bits):
        raise ValueError(f"codes must lie in [0, {2**bits}) to fit {bits} bits, got {array.min()} to {array.max()}")
    if bits == 8:
        return torch.from_numpy(array.astype(np.uint8))
    if bits in (2, 4):  # whole codes fill a byte: shifting them in is several times faster than going through single bits
        per_byte = 8 // bits
        padded = np.zeros(math.ceil(array.size / per_byte) * per_byte, dtype=np.uint8)
        padded[: array.size] = array
        shifted = padded.reshape(-1, per_byte) << np.arange(8 - bits, -1, -bits, dtype=np.uint8)
        return torch.from_numpy(np.bitwise_or.reduce(shifted, axis=1))
    table = np.unpackbits(array.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :] if bits > 1 else array.astype(np.uint8)
    return torch.from_numpy(np.packbits(table))


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of a packed tensor, as uint8."""
    if packed.numel() != math.ceil(count * bits / 8):
        raise EncodingError(
            f"{count} codes of {bits} bits need {math.ceil(count * bits / 8)} bytes, the file has {packed.numel()}"
        )
    if bits == 8:
        return packed
    if bits in (2, 4):
        shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
        return torch.from_numpy(((packed.numpy()[:, None] >> shifts) & (2**bits - 1)).flatten()[:count])
    table = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(np.packbits(table, axis=1).flatten() >> (8 - bits))
