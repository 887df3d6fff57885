"""What a user would ship: one safetensors file with a JSON header, really packed, and read back without executing code.

Every tensor of the model is stored in an encoding: `dense`, `tied`, `bitmap` and `index_difference` (sparse), `uniform`
(low-bit codes with scales), `codebook`, `factors`. A chapter adds an encoding by adding a decoder to `DECODERS`. The header
carries the model's configuration, and per tensor its encoding, shape and parts; shapes alone tell `load` which heads,
neurons or layers were cut out.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from utils import CompanionError

FORMAT = "bert-compression-companion/1"
EMBEDDINGS = "bert.embeddings."


class ArtifactError(CompanionError):
    """The file is damaged, foreign, or does not fit the model that it describes."""


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


DECODERS = {
    "dense": lambda parts, meta, shape: parts["values"],
    "bitmap": _decode_bitmap,
    "index_difference": _decode_index_difference,
    "uniform": _decode_uniform,
    "codebook": _decode_codebook,
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
        raise ArtifactError(
            f"{count} codes of {bits} bits need {math.ceil(count * bits / 8)} bytes, the file has {packed.numel()}"
        )
    if bits == 8:
        return packed
    if bits in (2, 4):
        shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
        return torch.from_numpy(((packed.numpy()[:, None] >> shifts) & (2**bits - 1)).flatten()[:count])
    table = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(np.packbits(table, axis=1).flatten() >> (8 - bits))


# --- files ----------------------------------------------------------------------------------------------------------


def encode_model(model: nn.Module, encoded: dict[str, Encoded] | None = None) -> dict[str, Encoded]:
    """Every tensor of the model in an encoding: those given, `tied` where storage is shared, else the best `sparse` one."""
    encoded = dict(encoded or {})
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    unknown = set(encoded) - set(state)
    if unknown:
        raise ArtifactError(f"encodings for tensors that the model does not have: {sorted(unknown)[:3]}")
    owners: dict[tuple, str] = {}
    for name, tensor in state.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and place in owners:
            encoded.setdefault(name, tied(tensor, owners[place]))
        owners.setdefault(place, name)
        if name not in encoded:
            encoded[name] = sparse(tensor)
    return encoded


def save(model: nn.Module, path: Path, encoded: dict[str, Encoded] | None = None) -> dict[str, int]:
    """Write the artifact; returns `stored_bytes` (the file) and `stored_bytes_without_embeddings`."""
    encoded = encode_model(model, encoded)
    tensors = {f"{name}/{part}": tensor.detach().cpu().contiguous()
               for name, item in encoded.items() for part, tensor in item.parts.items()}  # fmt: skip
    header = {
        "format": FORMAT,
        "config": model.config.to_diff_dict(),
        "sha256": _digest(tensors),
        "tensors": {name: {"encoding": item.encoding, "shape": item.shape, "parts": list(item.parts), **item.meta}
                    for name, item in encoded.items()},
    }  # fmt: skip
    save_file(tensors, path, metadata={"companion": json.dumps(header, default=str)})
    stored = path.stat().st_size
    embeddings = sum(item.nbytes for name, item in encoded.items() if name.startswith(EMBEDDINGS))
    return {"stored_bytes": stored, "stored_bytes_without_embeddings": stored - embeddings}


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and decoded state dict of an artifact. Raises ArtifactError for a damaged or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("companion", "null"))
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise ArtifactError(f"{path} is a safetensors file, but not an artifact of this suite ({FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise ArtifactError(f"there is no artifact {path}") from None
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or no safetensors file: {error}") from None
    if _digest(tensors) != header["sha256"]:
        raise ArtifactError(f"{path} is damaged: its content does not match its checksum")
    return header, _decode_all(header, tensors, path)


def _decode_all(header: dict, tensors: dict, path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    entries = sorted(header["tensors"].items(), key=lambda item: item[1]["encoding"] == "tied")  # owners first
    try:
        for name, entry in entries:
            if entry["encoding"] == "tied":
                state[name] = state[entry["to"]]
                continue
            parts = {part: tensors[f"{name}/{part}"] for part in entry["parts"]}
            state[name] = DECODERS[entry["encoding"]](parts, entry, tuple(entry["shape"]))
    except ArtifactError:
        raise
    except (KeyError, RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be decoded at {name!r}: {type(error).__name__}: {error}") from None
    return state


def load(path: Path) -> BertForSequenceClassification:
    """Rebuild the model of an artifact, with the heads, neurons and layers that it has left, in evaluation mode."""
    from utils.pruning.surgery import fit_structure

    header, state = read(path)
    model = _empty(BertConfig.from_dict(header["config"]))
    fit_structure(model, {name: tensor.shape for name, tensor in state.items()})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(f"{path} does not fit the model that it describes: {str(error).splitlines()[0]}") from None
    return model.eval()


def _empty(config: BertConfig) -> BertForSequenceClassification:
    """A BERT whose parameters are memory without meaning: drawing random ones to overwrite them would take most of the time."""
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    model.to_empty(device="cpu")
    embeddings = model.bert.embeddings  # the two buffers that no state dict holds
    embeddings.position_ids.copy_(torch.arange(config.max_position_embeddings).expand(1, -1))
    embeddings.token_type_ids.zero_()
    return model


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
