"""What a user would ship: one safetensors file with a JSON header, really packed, and read back without executing code.

Every tensor is stored in an encoding of `utils.encodings`. The header says the rest of what a model is: the configuration, the
heads and neurons that are left in each layer, the parts that stand in for pieces of it (`utils.parts`, by kind and options), its
attention by name, and which parameters are one and the same. Everything is looked up in closed tables. Format 2; files of
format 1, which knew no parts, still load.

A file is not trusted. Its header is checked against a schema (`utils.header`), its model is built without memory, and shapes are
compared before any are filled; what it may grow to is bounded by what it stores. Whatever goes wrong is an ArtifactError.
"""

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertEmbeddings

from utils import CompanionError, bert, cache, checkpoints, encodings, parts, structure
from utils import header as headers
from utils.encodings import Encoded
from utils.parts.embeddings import WordVectors
from utils.parts.room import Room

FAMILY = "bert-compression-companion/"
FORMAT = FAMILY + "2"
FIRST_FORMAT = FAMILY + "1"
SLACK = 2**28  # bytes that any file may grow to
GROWTH = 64  # and how often its tensors' bytes on top: one bit a weight is 32 times smaller than float32
WIDTHS = ("in_features", "out_features", "num_embeddings", "embedding_dim")  # of a part and of what it replaces


class ArtifactError(CompanionError):
    """The file is damaged, foreign, or does not fit the model that it describes; or a model is none that a file can hold."""


# --- writing --------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: Path | str, encoded: dict[str, Encoded] | None = None) -> dict[str, int]:
    """Write the artifact; returns `stored_bytes` (the file) and `stored_bytes_without_embeddings`.

    `encoded` holds the tensors that get an encoding of their own. Missing folders are made, and a file appears whole or not at
    all. Raises ArtifactError for an encoding of a tensor that the model does not have, for weights that are not finite or not
    float32, for an attention or a part that a file cannot name, and where the file cannot be written.
    """
    path, described, items = Path(path), describe(model), encode_model(model, encoded)
    tensors = _apart({f"{name}/{part}": tensor.detach().cpu().contiguous()
                      for name, item in items.items() for part, tensor in item.parts.items()})  # fmt: skip
    described["tensors"] = {name: {"encoding": item.encoding, "shape": list(item.shape), "parts": list(item.parts), **item.meta}
                            for name, item in items.items()}  # fmt: skip
    header = {**described, "sha256": _digest(described, tensors)}
    with _refusing("the model cannot be stored"):
        headers.check(headers.parse(json.dumps(header)), first=False)
        _check_items(items)
    _write(tensors, path, json.dumps(header))
    stored = path.stat().st_size
    embeddings = set(map(id, bert.embeddings(model).state_dict(keep_vars=True).values()))
    inside = [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in embeddings]
    return {"stored_bytes": stored, "stored_bytes_without_embeddings": stored - sum(items[name].nbytes for name in inside)}


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, none in another's memory, which safetensors refuses: two matrices may have one codebook."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if tensor.numel() and place in seen else tensor
        seen.add(place)
    return tensors


def _write(tensors: dict[str, torch.Tensor], path: Path, header: str) -> None:
    """Write under another name and then rename: whoever is killed meanwhile leaves no half file under this one."""
    try:
        with cache.replaced(path) as beside:
            save_file(tensors, beside, metadata={"companion": header})
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be written: {_line(error)}") from error


def describe(model: nn.Module) -> dict:
    """Everything in the header but the tensors: JSON values from which `rebuild` makes the same structure.

    Raises ArtifactError for a model, a part or an attention that a file cannot name.
    """
    found = parts.find(model, every_place=True)
    if "" not in found and not isinstance(model, BertForSequenceClassification):
        raise ArtifactError(
            f"a file holds a BertForSequenceClassification or a student of utils.parts, no {type(model).__name__}"
        )
    for path, part in found.items():
        known = parts.PARTS.get(getattr(part, "kind", None))
        if known is None or known.__qualname__ != type(part).__qualname__:  # a woven class is another object of the same name
            raise ArtifactError(f"a file cannot name the {type(part).__name__} at {path!r}: put it into utils.parts.PARTS")
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in (None, *parts.STOCK, *parts.ATTENTIONS):
        raise ArtifactError(f"a file cannot name the attention {attention!r}: register it in utils.parts.ATTENTIONS")
    described = {
        "format": FORMAT,
        "attention": attention if attention in parts.ATTENTIONS else None,
        "parts": {path: {"kind": part.kind, "options": part.options()} for path, part in found.items()},
    }
    if "" not in found:
        config = {name: value for name, value in model.config.to_diff_dict().items() if headers.kept(name)}
        described |= {"config": json.loads(json.dumps(config, default=str)), "layers": structure.describe(model)}
    return described


def encode_model(model: nn.Module, encoded: dict[str, Encoded] | None = None) -> dict[str, Encoded]:
    """Every tensor of the model in an encoding: those given, `tied` where storage is shared, else the best `sparse` one.

    Raises ArtifactError for an encoding of another tensor, and for weights that no file holds: not finite, not float32.
    """
    encoded = dict(encoded or {})
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    unknown = set(encoded) - set(state)
    if unknown:
        raise ArtifactError(f"encodings for tensors that the model does not have: {sorted(unknown)[:3]}")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ArtifactError(f"{name} is {parameter.dtype}, a file holds models in float32: call model.float() first")
    for name, tensor in state.items():
        if name in encoded and tuple(encoded[name].shape) != tuple(tensor.shape):
            raise ArtifactError(f"{name} has the shape {tuple(tensor.shape)}, its encoding {tuple(encoded[name].shape)}")
        if tensor.is_floating_point() and not checkpoints.is_finite(tensor):
            raise ArtifactError(f"{name} holds numbers that are not finite: training has diverged, nothing is stored")
    owners: dict[tuple, str] = {}
    for name, tensor in model.state_dict().items():  # where the model lies: a copy to the CPU would untie what is tied
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and place in owners:
            encoded[name] = encodings.tied(tensor, owners[place])
        owners.setdefault(place, name)
        if name not in encoded:
            encoded[name] = encodings.sparse(state[name])
    return encoded


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: Path | str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and decoded state dict of an artifact. Raises ArtifactError for a damaged or foreign file."""
    header, items = read_encoded(path)
    with _refusing(f"{path} cannot be decoded"):
        state = {name: encodings.decode(item) for name, item in items.items() if item.encoding != "tied"}
        return header, {name: state[item.meta["to"] if item.encoding == "tied" else name] for name, item in items.items()}


def read_encoded(path: Path | str) -> tuple[dict, dict[str, Encoded]]:
    """Header and the tensors as they are stored. Raises ArtifactError for a damaged or foreign file."""
    header, tensors = _read_verified(Path(path))
    with _refusing(f"{path} has a header without sense"):
        headers.check(header, header["format"] == FIRST_FORMAT)
        fields = ("encoding", "shape", "parts")
        items = {name: Encoded(entry["encoding"], tuple(entry["shape"]), {part: tensors.pop(f"{name}/{part}") for part in entry["parts"]},
                               {key: value for key, value in entry.items() if key not in fields})
                 for name, entry in header["tensors"].items()}  # fmt: skip
        headers.need(not tensors, f"it does not say what {', '.join(sorted(tensors)[:3])} is")
        _check_items(items)
    return header, items


def _read_verified(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and stored tensors, if both are what the checksum says. That of format 1 leaves out the header."""
    if not path.is_file():
        raise ArtifactError(f"{path} is no file" if path.exists() else f"there is no artifact {path}")
    with _refusing(f"{path} is damaged or no safetensors file"):
        with safe_open(path, framework="pt") as file:
            header = headers.parse((file.metadata() or {}).get("companion", "null"))
            if not isinstance(header, dict) or header.get("format") not in (FORMAT, FIRST_FORMAT):
                raise ArtifactError(f"{path} is a safetensors file, but not an artifact of this suite ({FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        described = {name: value for name, value in header.items() if name != "sha256"}
        digest = _digest(described, tensors) if header["format"] == FORMAT else _first_digest(tensors)
    if digest != header.get("sha256"):
        raise ArtifactError(f"{path} is damaged: its content does not match its checksum")
    if header["format"] == FIRST_FORMAT:
        warnings.warn(f"{path} is of format 1, whose checksum leaves out the header: save the model again", stacklevel=4)
    return header, tensors


def _check_items(items: dict[str, Encoded]) -> None:
    """Raise CompanionError for encodings that do not fit, ties that lead nowhere, and a file that would grow out of all proportion."""
    for name, item in items.items():
        encodings.check(item)
        if item.encoding == "tied":
            owner = items.get(item.meta["to"])
            headers.need(owner is not None and owner.encoding != "tied" and owner.shape == item.shape,
                         f"{name} is tied to {item.meta['to']!r}, which is no tensor of the same shape")  # fmt: skip
    stored, grown = _stored(items), 4 * _numbers(items)
    headers.need(grown <= SLACK + GROWTH * stored, f"{stored} bytes of tensors that grow to {grown} are none of a model")


def _numbers(items: dict[str, Encoded]) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(item.shape) for item in items.values())


def load(path: Path | str) -> nn.Module:
    """Rebuild the model of an artifact, with its cuts, parts, ties and attention, in evaluation mode.

    Raises ArtifactError for a file that is damaged, or that holds something else than its header says. Its checksum shows
    whether it is as it was written; the cause of the error, whether the fault might be one of this suite.
    """
    header, items = read_encoded(path)
    with _refusing(f"{path} does not fit the model that it describes"):
        model = rebuild(header, items)
        _check_model(model, header, items)
        _materialise(model)
        _fill(model, items)
        _tie_again(model, items)
        return model.eval()


def rebuild(header: dict, items: dict[str, Encoded]) -> nn.Module:
    """The model that a header describes. What is no part lies on the meta device and has shapes, but no memory yet."""
    listed = header.get("parts", {})
    room = Room.of(_numbers(items), len(items))
    if "" in listed:
        with room:
            model = parts.build(**listed[""])
    else:
        model = _empty(header, {name: item.shape for name, item in items.items()})
    hidden = sum(_hidden_bytes(part) for part in parts.find(model, every_place=True).values())
    for place, entry in listed.items():  # outer parts first, then what was replaced inside them
        if place:
            _check_place(model, place, **entry)
            with room:
                part = parts.build(**entry)
            hidden += _hidden_bytes(part)
            headers.need(
                hidden <= SLACK + GROWTH * _stored(items), f"the part at {place!r} takes more memory than the file can ask for"
            )
            model.set_submodule(place, part, strict=True)
    return model


def _empty(header: dict, shapes: dict[str, tuple[int, ...]]) -> BertForSequenceClassification:
    """A BERT cut to its structure, without memory: drawing random numbers to overwrite them would take most of the time."""
    said = header["config"]
    heads, neurons = said["num_attention_heads"], said["intermediate_size"]
    first = header["format"] == FIRST_FORMAT
    layers = structure.describe_shapes(shapes, said["hidden_size"] // heads, heads, neurons) if first else header["layers"]
    count = said["num_hidden_layers"]
    headers.need(len(layers) == count, f"{count} layers are described, {len(layers)} have tensors")
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig.from_dict(said))
    # A part may stand in for a layer and have more; whatever is no part was made from the configuration, and has no more.
    structure.cut_to(
        model, [{"heads": min(layer["heads"], heads), "neurons": min(layer["neurons"], neurons)} for layer in layers]
    )
    attention = header.get("attention")
    headers.need(
        attention is None or attention in parts.ATTENTIONS,
        f"unknown attention {attention!r}: one of {', '.join(parts.ATTENTIONS)}",
    )
    model.config._attn_implementation = attention or "sdpa"
    return model


def _stored(items: dict[str, Encoded]) -> int:
    """Bytes of all tensors in the file."""
    return sum(item.nbytes for item in items.values())


def _hidden_bytes(part: nn.Module) -> int:
    """Bytes of what a part computes from its options, and no file holds."""
    kept = {id(tensor) for tensor in part.state_dict(keep_vars=True).values()}
    return sum(buffer.nbytes for buffer in part.buffers() if id(buffer) not in kept)


def _check_place(model: nn.Module, place: str, kind: str, options: dict) -> None:
    """Raise CompanionError unless a part asks for the widths of what it replaces; before it is built."""
    old = model.get_submodule(place)
    wanted = {name: getattr(old, name) for name in WIDTHS if hasattr(old, name)}
    words = issubclass(parts.PARTS.get(kind, nn.Module), WordVectors)  # whose hidden sizes are of networks of their own
    if isinstance(model, BertForSequenceClassification) and not words:
        wanted["hidden_size"] = model.config.hidden_size
    sizes = options.get("sizes")
    asked = options | (sizes if isinstance(sizes, dict) else {})
    for name, size in wanted.items():
        headers.need(asked.get(name, size) == size, f"the part at {place!r} has {name} {asked.get(name)}, in place of {size}")


def _check_model(model: nn.Module, header: dict, items: dict[str, Encoded]) -> None:
    """Raise CompanionError unless a rebuilt model is what its header says, and has the shapes of its tensors."""
    kinds = {place: part.kind for place, part in parts.find(model, every_place=True).items()}
    listed = {place: entry["kind"] for place, entry in header.get("parts", {}).items()}
    headers.need(kinds == listed, f"the header lists the parts {headers.short(listed)}, the model has {headers.short(kinds)}")
    if "layers" in header:
        headers.need(structure.describe(model) == header["layers"], "the layers have other heads or neurons than the header says")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other = sorted(shapes.keys() ^ items.keys())
    headers.need(not other, f"{len(other)} tensors are in the file or in the model alone: {', '.join(other[:3])}")
    for name, shape in shapes.items():
        headers.need(items[name].shape == shape, f"{name} has the shape {shape}, in the file {items[name].shape}")


def _materialise(model: nn.Module) -> None:
    """Give memory to what has none. The two buffers of a BERT that no state dict holds get their values."""
    for module in model.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device="cpu", recurse=False)
            if isinstance(module, BertEmbeddings):
                module.position_ids.copy_(torch.arange(module.position_ids.shape[1]).expand(1, -1))
                module.token_type_ids.zero_()


@torch.no_grad()
def _fill(model: nn.Module, items: dict[str, Encoded]) -> None:
    """Write the tensors of a file into a model of the same shapes, one after another, owners before what is tied to them.

    Raises CompanionError where numbers do not fit, and where one tensor of the model would be two in the file.
    """
    state, owners = model.state_dict(), {}
    for name, item in sorted(items.items(), key=lambda entry: entry[1].encoding == "tied"):
        target, tied = state[name], item.encoding == "tied"
        source = item.meta["to"] if tied else name
        owner = owners.setdefault(target.data_ptr() if target.numel() else name, source)
        headers.need(owner == source, f"{name} and {owner} are one tensor of the model, and two in the file")
        if tied:
            headers.need(target.dtype == state[source].dtype, f"{name} and {source} have different types")
            target.copy_(state[source])
        else:
            _put(name, target, encodings.decode(item))


def _put(name: str, target: torch.Tensor, values: torch.Tensor) -> None:
    target.copy_(values)
    if target.is_floating_point():
        headers.need(checkpoints.is_finite(target), f"{name} holds numbers that are not finite")
    else:
        headers.need(torch.equal(target.to(values.dtype), values), f"{name} holds numbers that a {target.dtype} does not")


def _tie_again(model: nn.Module, items: dict[str, Encoded]) -> None:
    """Make one parameter of what was one parameter, so that a tied model also weighs, trains and counts as one."""
    for name, item in items.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if item.encoding == "tied" and leaf in module._parameters:
            setattr(module, leaf, model.get_parameter(item.meta["to"]))


# --- errors and checksums -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever a damaged or crafted file provokes becomes an ArtifactError of one line.

    The cause stays attached: where a healthy file is refused, the fault is one of ours, and the traceback shows it.
    """
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """An error in one line; its type, too, where it is none that was written for a reader."""
    text = " ".join(str(error).split())[:300]
    return text if text and isinstance(error, CompanionError | OSError | SafetensorError) else f"{type(error).__name__}: {text}"


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
