"""How one tensor is stored: every encoder beside its decoder, and the bits underneath.

An encoder turns a tensor (or codes, scales, codebooks) into an `Encoded`; `decode` gives the tensor back. The table `DECODERS` is
closed: a file can name an encoding, never code. Chapters choose encodings, they define none.
"""

import math
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
    """The tensor that an `Encoded` stands for. Raises EncodingError where its parts do not fit together."""
    return DECODERS[item.encoding](item.parts, item.meta, item.shape)


# --- encoders -------------------------------------------------------------------------------------------------------


def dense(tensor: torch.Tensor) -> Encoded:
    """All values, in the tensor's own type."""
    return Encoded("dense", tuple(tensor.shape), {"values": tensor.contiguous()})


def tied(tensor: torch.Tensor, to: str) -> Encoded:
    """Nothing: the values are those of the tensor named `to`."""
    return Encoded("tied", tuple(tensor.shape), meta={"to": to})


def bitmap(tensor: torch.Tensor) -> Encoded:
    """One bit per position and the non-zero values: n / 8 + 4 * nnz bytes in float32."""
    flat = tensor.flatten()
    nonzero = flat != 0
    return Encoded("bitmap", tuple(tensor.shape), {"bitmap": pack_bits(nonzero.to(torch.uint8), 1), "values": flat[nonzero]})


def index_difference(tensor: torch.Tensor, bits: int) -> Encoded:
    """The non-zero values and the gaps between their positions in `bits` bits each.

    A gap too long for `bits` bits is bridged by stored zeros, as in Deep Compression (Han et al. 2015, survey 2.1.2).
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
    """The smallest of `dense`, `bitmap` and `index_difference` (with the best number of bits, at most 8)."""
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


def _decode_bitmap(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    out = torch.zeros(math.prod(shape), dtype=parts["values"].dtype)
    out[unpack_bits(parts["bitmap"], 1, math.prod(shape)).bool()] = parts["values"]
    return out.view(shape)


def _decode_index_difference(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    gaps = unpack_bits(parts["gaps"], meta["bits"], meta["count"]).long()
    out = torch.zeros(math.prod(shape), dtype=parts["values"].dtype)
    out[torch.cumsum(gaps + 1, 0) - 1] = parts["values"]
    return out.view(shape)


def _decode_uniform(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    codes = unpack_bits(parts["codes"], meta["bits"], math.prod(shape)).view(shape).to(parts["scale"].dtype)
    rows, groups = parts["scale"].shape
    grouped = codes.view(rows, groups, -1) - parts["zero"].unsqueeze(-1)
    return (grouped * parts["scale"].unsqueeze(-1)).view(shape)


def _decode_codebook(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    codes = unpack_bits(parts["codes"], meta["bits"], meta["count"]).long()
    return parts["centroids"][codes].reshape(shape)


def _decode_product(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    points, length = shape if meta["axis"] == "columns" else reversed(shape)
    s = length // parts["centroids"].shape[-1]
    index = unpack_bits(parts["codes"], meta["bits"], s * points).view(s, points).long()
    w = paste_columns(look_up(parts["centroids"].expand(s, -1, -1), index))  # a lone codebook serves all blocks
    return w if meta["axis"] == "columns" else w.T.contiguous()


def _decode_residual(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    t, _, length = parts["centroids"].shape
    points = math.prod(shape) // length
    index = unpack_bits(parts["codes"], meta["bits"], t * points).view(t, points).long()
    return look_up(parts["centroids"], index).sum(0).view(shape)


def _decode_multi_bit(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    alpha = parts["alpha"]
    B = unpack_bits(parts["codes"], 1, alpha.numel() * shape[-1]).view(*alpha.shape, shape[-1])
    return decode_bits(alpha, 2.0 * B - 1).view(shape)


def _decode_outliers(parts: dict, meta: dict, shape: tuple) -> torch.Tensor:
    codes = unpack_bits(parts["codes"], meta["bits"], torch.Size(shape).numel()).long()
    flat = parts["centroids"][codes]
    flat[parts["positions"].long()] = parts["values"]
    return flat.view(shape)


DECODERS = {
    "dense": lambda parts, meta, shape: parts["values"],
    "bitmap": _decode_bitmap,
    "index_difference": _decode_index_difference,
    "uniform": _decode_uniform,
    "codebook": _decode_codebook,
    "product": _decode_product,
    "residual": _decode_residual,
    "multi_bit": _decode_multi_bit,
    "outliers": _decode_outliers,
    "factors": lambda parts, meta, shape: parts["left"] @ parts["right"],
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
