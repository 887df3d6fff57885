"""What a user would ship: one safetensors file with a JSON header, really packed, and read back without executing code.

Every tensor is stored in an encoding of `utils.encodings`. The header says the rest of what a model is: the configuration, the
heads and neurons that are left in each layer, the parts that stand in for pieces of it (`utils.parts`, by kind and options), its
attention by name, and which parameters are one and the same. Everything is looked up in closed tables. Format 2; files of
format 1, which knew no parts, still load.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from utils import CompanionError, bert, encodings, parts, structure
from utils.encodings import Encoded

FAMILY = "bert-compression-companion/"
FORMAT = FAMILY + "2"
FIRST_FORMAT = FAMILY + "1"


class ArtifactError(CompanionError):
    """The file is damaged, foreign, or does not fit the model that it describes."""


def save(model: nn.Module, path: Path, encoded: dict[str, Encoded] | None = None) -> dict[str, int]:
    """Write the artifact; returns `stored_bytes` (the file) and `stored_bytes_without_embeddings`.

    `encoded` holds the tensors that get an encoding of their own. Raises ArtifactError for one that the model does not have, and
    for an attention that a file cannot name.
    """
    described = describe(model)
    items = encode_model(model, encoded)
    tensors = {f"{name}/{part}": tensor.detach().cpu().contiguous()
               for name, item in items.items() for part, tensor in item.parts.items()}  # fmt: skip
    described["tensors"] = {name: {"encoding": item.encoding, "shape": list(item.shape), "parts": list(item.parts), **item.meta}
                            for name, item in items.items()}  # fmt: skip
    header = {**described, "sha256": _digest(described, tensors)}
    save_file(tensors, path, metadata={"companion": json.dumps(header)})
    stored = path.stat().st_size
    embeddings = set(map(id, bert.embeddings(model).state_dict(keep_vars=True).values()))
    inside = [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in embeddings]
    return {"stored_bytes": stored, "stored_bytes_without_embeddings": stored - sum(items[name].nbytes for name in inside)}


def describe(model: nn.Module) -> dict:
    """Everything in the header but the tensors: JSON values from which `rebuild` makes the same structure."""
    found = parts.find(model)
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in (None, *parts.STOCK, *parts.ATTENTIONS):
        raise ArtifactError(f"a file cannot name the attention {attention!r}: register it in utils.parts.ATTENTIONS")
    described = {
        "format": FORMAT,
        "attention": attention if attention in parts.ATTENTIONS else None,
        "parts": {path: {"kind": part.kind, "options": part.options()} for path, part in found.items()},
    }
    if "" not in found:
        config = {k: v for k, v in model.config.to_diff_dict().items() if "attn_implementation" not in k}
        described |= {"config": json.loads(json.dumps(config, default=str)), "layers": structure.describe(model)}
    return described


def encode_model(model: nn.Module, encoded: dict[str, Encoded] | None = None) -> dict[str, Encoded]:
    """Every tensor of the model in an encoding: those given, `tied` where storage is shared, else the best `sparse` one."""
    encoded = dict(encoded or {})
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    unknown = set(encoded) - set(state)
    if unknown:
        raise ArtifactError(f"encodings for tensors that the model does not have: {sorted(unknown)[:3]}")
    owners: dict[tuple, str] = {}
    for name, tensor in model.state_dict().items():  # where the model lies: a copy to the CPU would untie what is tied
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and place in owners:
            encoded[name] = encodings.tied(tensor, owners[place])
        owners.setdefault(place, name)
        if name not in encoded:
            encoded[name] = encodings.sparse(state[name])
    return encoded


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and decoded state dict of an artifact. Raises ArtifactError for a damaged or foreign file."""
    header, items = read_encoded(path)
    state: dict[str, torch.Tensor] = {}
    for name, item in sorted(items.items(), key=lambda entry: entry[1].encoding == "tied"):  # owners first
        try:
            state[name] = state[item.meta["to"]] if item.encoding == "tied" else encodings.decode(item)
        except (CompanionError, KeyError, RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} cannot be decoded at {name!r}: {type(error).__name__}: {error}") from None
    return header, state


def read_encoded(path: Path) -> tuple[dict, dict[str, Encoded]]:
    """Header and the tensors as they are stored. Raises ArtifactError for a damaged or foreign file."""
    header, tensors = _read_verified(path)
    try:
        items = {name: Encoded(entry["encoding"], tuple(entry["shape"]), {part: tensors[f"{name}/{part}"] for part in entry["parts"]},
                               {key: value for key, value in entry.items() if key not in ("encoding", "shape", "parts")})
                 for name, entry in header["tensors"].items()}  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} has a header without sense: {type(error).__name__}: {error}") from None
    return header, items


def _read_verified(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("companion", "null"))
            if not isinstance(header, dict) or header.get("format") not in (FORMAT, FIRST_FORMAT):
                raise ArtifactError(f"{path} is a safetensors file, but not an artifact of this suite ({FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise ArtifactError(f"there is no artifact {path}") from None
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or no safetensors file: {error}") from None
    described = {name: value for name, value in header.items() if name != "sha256"}
    digest = _digest(described, tensors) if header["format"] == FORMAT else _first_digest(tensors)
    if digest != header.get("sha256"):
        raise ArtifactError(f"{path} is damaged: its content does not match its checksum")
    return header, tensors


def load(path: Path) -> nn.Module:
    """Rebuild the model of an artifact, with its cuts, parts, ties and attention, in evaluation mode."""
    header, state = read(path)
    try:
        model = rebuild(header, state)
        model.load_state_dict(state)
        _tie_again(model, header["tensors"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{path} does not fit the model that it describes: {reason}") from None
    return model.eval()


def rebuild(header: dict, state: dict[str, torch.Tensor]) -> nn.Module:
    """The model that a header describes, with weights that mean nothing yet."""
    listed = header.get("parts", {})
    if "" in listed:
        model = parts.build(**listed[""])
    else:
        config = BertConfig.from_dict(header["config"])
        model = _empty(config)
        head_size = config.hidden_size // config.num_attention_heads
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        first = header["format"] == FIRST_FORMAT
        structure.cut_to(model, structure.describe_shapes(shapes, head_size, config.num_attention_heads, config.intermediate_size)
                         if first else header["layers"])  # fmt: skip
        model.config._attn_implementation = header.get("attention") or "sdpa"
    for place, entry in listed.items():  # outer parts first, then what was replaced inside them
        if place:
            model.set_submodule(place, parts.build(**entry))
    return model


def _tie_again(model: nn.Module, entries: dict[str, dict]) -> None:
    """Make one parameter of what was one parameter, so that a tied model also weighs, trains and counts as one."""
    for name, entry in entries.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if entry["encoding"] == "tied" and leaf in module._parameters:
            setattr(module, leaf, model.get_parameter(entry["to"]))


def _empty(config: BertConfig) -> BertForSequenceClassification:
    """A BERT whose parameters are memory without meaning: drawing random ones to overwrite them would take most of the time."""
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    model.to_empty(device="cpu")
    embeddings = model.bert.embeddings  # the two buffers that no state dict holds
    embeddings.position_ids.copy_(torch.arange(config.max_position_embeddings).expand(1, -1))
    embeddings.token_type_ids.zero_()
    return model


def _digest(described: dict, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the header in canonical form and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
