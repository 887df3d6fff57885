"""A model folder, read with care: its configuration, its weights, and a tokenizer that fits them.

A checkpoint is a whole BERT, or it is refused in one line: only the pooler and the classifier may be absent and drawn anew, and only
heads may be left out. transformers gets values that were checked here and never looks for a model in the folder itself, where it
would follow adapters, quantizers and other people's kernels. Nothing of a folder runs.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import BertConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from utils import CompanionError, first_line, hub

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.txt")
HUB_FILES = ["config.json", WEIGHTS, INDEX, "model-*-of-*.safetensors", "adapter_config.json",
             *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]  # fmt: skip
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
OTHER_SIZES = ("max_position_embeddings", "type_vocab_size")
MOST_LAYERS = 1000  # whatever else is too large is found because the weights are smaller
NUMBERS = ("initializer_range", "layer_norm_eps")
SETTINGS = (*SIZES, *OTHER_SIZES, *NUMBERS, "hidden_act", "model_type", "pad_token_id", "position_embedding_type", "gradient_checkpointing",
            "architectures", "transformers_version")  # fmt: skip
NO_PLAIN_ENCODER = ("is_decoder", "is_encoder_decoder", "add_cross_attention", "pruned_heads", "per_layer_config",
                    "quantization_config", "compression_config")  # fmt: skip

HEADS = re.compile(
    r"(cls|classifier|qa_outputs|lm_head|mlm_head|nsp_head|head|score|predictions|seq_relationship)\.|(.*\.)?(position|token_type)_ids$"
)
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
POOLER, CLASSIFIER = "pooler.dense", "classifier"
FIRST = "embeddings.word_embeddings.weight"


class Unfit(CompanionError):
    """What is wrong with a model, worded to follow its name."""


@dataclass
class Stored:
    """One tensor in a file: under which name, in which type and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Checkpoint:
    """A folder that holds a whole BERT. `tensors` goes by the encoder's own names, without `bert.` before them."""

    config: BertConfig
    tensors: dict[str, Stored]
    notes: list[str] = field(default_factory=list)  # what a user should know about how it is read


# --- where a model lies ---------------------------------------------------------------------------------------------------


def locate(name: str) -> Path:
    """The folder that a name means: a local one, or the hub's, fetched once. Raises Unfit where there is none."""
    folder = Path(name)
    with contextlib.suppress(RuntimeError):  # no home
        folder = folder.expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise Unfit("is a file: name the folder that holds config.json and model.safetensors")
    if not HUB_NAME.fullmatch(name):
        raise Unfit("is no folder: use 'embedded', a local folder, or a hub name such as bert-base-uncased")
    return _fetch(name)


@functools.cache  # within a process, a model is the same whenever it is asked for
def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download  # half a second to import, for hub names only

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=not hub.answers()))
    except Exception as error:  # many kinds: no network, no such name, no permission
        raise Unfit(f"is no folder, and the hub did not give it: {first_line(error)} "
                    "(use 'embedded', a local folder, or a hub name with network)") from None  # fmt: skip


# --- configuration --------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> BertConfig:
    """The configuration of a plain BERT encoder, of known settings alone. Raises Unfit for any other."""
    if not (folder / "config.json").is_file():
        raise Unfit("has no config.json")
    found = _read_json(folder / "config.json")
    if found.get("model_type") != "bert":
        raise Unfit(f"is of type {found.get('model_type')}; the chapters take a BERT (model_type in its config.json)")
    absent = [key for key in SIZES if key not in found]
    if absent:
        raise Unfit(f"has a config.json without {', '.join(absent)}")
    kept = {key: value for key, value in found.items() if key in SETTINGS}
    _check_sizes(kept)
    _check_settings(found, kept)
    return BertConfig(**kept)


def _check_sizes(kept: dict) -> None:
    for key in (*SIZES, *OTHER_SIZES):
        value = kept.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise Unfit(f"has a config.json whose {key} is {_short(value)}: it must be a whole number above 0")
    if kept["num_hidden_layers"] > MOST_LAYERS:
        raise Unfit(f"has a config.json of {kept['num_hidden_layers']} layers: at most {MOST_LAYERS} are read")
    if kept["hidden_size"] % kept["num_attention_heads"]:
        raise Unfit(
            f"has a config.json whose {kept['num_attention_heads']} heads do not divide hidden_size {kept['hidden_size']}"
        )


def _check_settings(found: dict, kept: dict) -> None:
    """Refuse what computes something else than BERT, or nothing; drop what only says where a model came from, and wrongly."""
    other = [key for key in NO_PLAIN_ENCODER if found.get(key)]
    if other:
        raise Unfit(f"is no plain encoder in floats: its config.json sets {', '.join(other)}")
    position = kept.get("position_embedding_type", "absolute")
    if position != "absolute":
        raise Unfit(f"has position embeddings of type {_short(position)}: the chapters take absolute ones")
    act = kept.get("hidden_act", "gelu")
    if not isinstance(act, str) or act not in ACT2FN:
        raise Unfit(f"has a config.json whose hidden_act is {_short(act)}: transformers knows no such activation")
    for key in NUMBERS:
        value = kept.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
            raise Unfit(f"has a config.json whose {key} is {_short(value)}: it must be a number from 0 to 1")
        if key in kept:
            kept[key] = float(value)
    pad = kept.get("pad_token_id", 0)
    if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < kept["vocab_size"]):
        raise Unfit(f"has a config.json whose pad_token_id is {_short(pad)}: its vocabulary has {kept['vocab_size']} pieces")
    if kept.get("gradient_checkpointing"):
        kept["gradient_checkpointing"] = False
    for key, kind in (("architectures", list), ("transformers_version", str)):
        if not isinstance(kept.get(key), kind):
            kept.pop(key, None)
    if not all(isinstance(name, str) for name in kept.get("architectures", [])):
        del kept["architectures"]


def _read_json(path: Path) -> dict:
    refuse_pointer(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unfit(f"has a {path.name} that cannot be read ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise Unfit(f"has a {path.name} that holds a {type(found).__name__} instead of an object")
    return found


def _short(value: object) -> str:
    return repr(value)[:60]


def refuse_pointer(path: Path) -> None:
    """Raise Unfit for a large file's stand-in in a git clone, and for a file that cannot be opened."""
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise Unfit(f"has a {path.name} that cannot be read ({error.strerror})") from None
    if start.startswith(b"version https://git-lfs"):
        raise Unfit(f"has only a pointer in place of {path.name}: fetch the file with `git lfs pull`")
    if path.suffix == ".safetensors" and start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise Unfit(f"has a pickle named {path.name}: save it with safetensors (pickled weights are not loaded)")


# --- weights --------------------------------------------------------------------------------------------------------------


def examine(folder: Path) -> Checkpoint:
    """Look through a model folder without reading its numbers. Raises Unfit where it does not hold a whole BERT."""
    config = read_config(folder)
    stored = _headers(_weight_files(folder))
    expected = encoder_shapes(config)
    _refuse_wrapped(stored, expected)
    _refuse_other_depth(stored, config)
    absent = [name for name in expected if name not in stored]
    if absent:
        raise Unfit(f"holds {len(expected) - len(absent)} of the {len(expected)} tensors that its config.json asks for: "
                    f"{_some(absent)} {'is' if len(absent) == 1 else 'are'} absent")  # fmt: skip
    sizes = {**expected, **_pooler_shapes(stored, config)}
    others = [name for name in sizes if stored[name].shape != sizes[name]]
    if others:
        raise Unfit(f"holds {len(others)} tensors of other sizes than its config.json asks for: {others[0]} is "
                    f"{stored[others[0]].shape} instead of {sizes[others[0]]}")  # fmt: skip
    return Checkpoint(config, stored, _notes(stored, sizes))


def encoder_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the embeddings and the layers."""
    width, wide = config.hidden_size, config.intermediate_size
    tables = {"word": config.vocab_size, "position": config.max_position_embeddings, "token_type": config.type_vocab_size}
    found = {f"embeddings.{table}_embeddings.weight": (rows, width) for table, rows in tables.items()}
    norm = {"LayerNorm.weight": (width,), "LayerNorm.bias": (width,)}
    found |= {f"embeddings.{name}": shape for name, shape in norm.items()}
    layer = {}
    for name, (out, into) in {"attention.self.query": (width, width), "attention.self.key": (width, width),
                              "attention.self.value": (width, width), "attention.output.dense": (width, width),
                              "intermediate.dense": (wide, width), "output.dense": (width, wide)}.items():  # fmt: skip
        layer |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    layer |= {f"{block}.{name}": shape for block in ("attention.output", "output") for name, shape in norm.items()}
    return found | {f"encoder.layer.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()}


def read_weights(checkpoint: Checkpoint, num_layers: int, num_labels: int) -> dict[str, torch.Tensor]:
    """The numbers of the first layers, of the pooler, and of a classifier of as many labels: float32 tensors by the model's names."""
    config = checkpoint.config
    wanted = [name for name in encoder_shapes(config) if _layer_of(name) < num_layers]
    wanted += _pooler_shapes(checkpoint.tensors, config)
    if classifies(checkpoint, num_labels):
        wanted += [f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"]
    found = {}
    for file in dict.fromkeys(checkpoint.tensors[name].file for name in wanted):
        with _opened(file) as weights:
            for name in wanted:
                if checkpoint.tensors[name].file == file:
                    own = name if name.startswith(CLASSIFIER) else f"bert.{name}"
                    found[own] = weights.get_tensor(checkpoint.tensors[name].name).to(torch.float32)
    return found


def refuse_not_finite(state: dict[str, torch.Tensor]) -> None:
    """Raise Unfit for numbers that are infinite or none, such as float64 ones beyond float32."""
    wrong = [name for name, tensor in state.items() if not is_finite(tensor)]
    if wrong:
        raise Unfit(f"holds numbers that are not finite, in {_some(wrong)}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are. A sum that is finite proves it, in a tenth of the time that looking at each takes."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def classifies(checkpoint: Checkpoint, num_labels: int) -> bool:
    """Whether the checkpoint brings a classifier of as many labels; any other is replaced."""
    width = checkpoint.config.hidden_size
    shapes = {f"{CLASSIFIER}.weight": (num_labels, width), f"{CLASSIFIER}.bias": (num_labels,)}
    held = {name: checkpoint.tensors[name] for name in shapes if name in checkpoint.tensors}
    return len(held) == 2 and all(held[name].shape == shape and held[name].dtype in FLOATS for name, shape in shapes.items())


def about_classifier(checkpoint: Checkpoint, num_labels: int) -> list[str]:
    """A line on what becomes of the checkpoint's classifier, where it has one."""
    stored = checkpoint.tensors.get(f"{CLASSIFIER}.weight")
    if stored is None:
        return []
    if classifies(checkpoint, num_labels):
        return [f"training starts from the checkpoint's own classifier of {num_labels} classes"]
    classes = stored.shape[0] if stored.shape else 1
    return [f"the checkpoint's classifier of {classes} classes is replaced by a new one of {num_labels}"]


def check_loaded(loaded: dict) -> None:
    """Raise Unfit where transformers drew more than pooler and classifier anew, by its own account."""
    drawn = [name for name in sorted(loaded["missing_keys"]) if not name.startswith((f"bert.{POOLER}.", f"{CLASSIFIER}."))]
    wrong = [*drawn, *sorted(loaded["unexpected_keys"]), *map(str, loaded["mismatched_keys"]), *loaded["error_msgs"]]
    if wrong:
        raise Unfit(f"was not loaded as a whole: {_some(wrong)}")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "adapter_config.json").is_file():
        raise Unfit("holds an adapter (adapter_config.json): merge it into its model, and save that")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        raise Unfit(f"has {others}, but no {WEIGHTS}" if others
                    else "has no *.safetensors weights (pickled weights are not loaded)")  # fmt: skip
    shards = _read_json(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    outside = [name for name in names if Path(name).name != name or Path(name).suffix != ".safetensors"]
    if not names or outside:
        what = f"names {_short(outside[0])}: only *.safetensors beside it are read" if outside else "names no files"
        raise Unfit(f"has a {INDEX} that {what}")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise Unfit(f"lacks {len(absent)} of its {len(names)} files of weights: {absent[0]} is absent")
    return [folder / name for name in names]


def _headers(files: list[Path]) -> dict[str, Stored]:
    """All tensors by the encoder's own names: without `bert.`, and with the names of today for those of 2018."""
    found = {}
    for path in files:
        with _opened(path) as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                part = weights.get_slice(name)
                own = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name.removeprefix("bert."))
                own = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", own)
                if own in found:
                    raise Unfit(f"holds {own} twice: as {found[own].name} in {found[own].file.name}, as {name} in {path.name}")
                found[own] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise Unfit(f"has a {path.name} that is damaged or cut short ({first_line(error)}): fetch it again") from None


def _refuse_wrapped(stored: dict[str, Stored], expected: dict) -> None:
    """A model saved inside another one has all its names, behind a prefix."""
    if FIRST in stored:
        return
    prefix = next(
        (tensor.name.removesuffix(FIRST).removesuffix("bert.") for own, tensor in stored.items() if own.endswith(FIRST)), ""
    )
    hint = (
        f"their names begin with {prefix!r}, so save the inner model" if prefix else f"it holds {_some(list(stored)) or 'none'}"
    )
    raise Unfit(
        f"holds {sum(name in stored for name in expected)} of the {len(expected)} tensors of a BERT under their names: {hint}"
    )


def _refuse_other_depth(stored: dict[str, Stored], config: BertConfig) -> None:
    depth = 1 + max(map(_layer_of, stored))
    if depth != config.num_hidden_layers:
        raise Unfit(f"holds {depth} layers, and its config.json says {config.num_hidden_layers}")


def _layer_of(name: str) -> int:
    """The layer that a tensor belongs to; -1 outside them."""
    found = re.match(r"encoder\.layer\.(\d{1,6})\.", name)
    return int(found[1]) if found else -1


def _pooler_shapes(stored: dict[str, Stored], config: BertConfig) -> dict[str, tuple[int, ...]]:
    """The pooler's two tensors, where the checkpoint has a pooler."""
    shapes = {f"{POOLER}.weight": (config.hidden_size, config.hidden_size), f"{POOLER}.bias": (config.hidden_size,)}
    held = [name for name in shapes if name in stored]
    if len(held) == 1:
        raise Unfit(f"holds half a pooler: {held[0]} alone")
    return shapes if held else {}


def _notes(stored: dict[str, Stored], used: dict[str, tuple[int, ...]]) -> list[str]:
    """What is left out, drawn anew or converted. Raises Unfit for a tensor that has no place, and for numbers that are no floats."""
    strange = [tensor.name for name, tensor in stored.items() if name not in used and not HEADS.match(name)]
    if strange:
        raise Unfit(f"holds {len(strange)} tensors that a BERT has no place for: {_some(strange)}")
    codes = [name for name in used if stored[name].dtype not in FLOATS]
    if codes:
        raise Unfit(f"stores {codes[0]} as {stored[codes[0]].dtype}: quantized weights are not read, save it in floats")
    notes = []
    heads = sorted({stored[name].name.partition(".")[0] for name in stored if name not in used and not name.endswith("_ids")}
                   - {CLASSIFIER})  # fmt: skip
    if heads:
        notes.append(f"heads of the checkpoint that classification does not use are left out: {', '.join(heads)}")
    if f"{POOLER}.weight" not in used:
        notes.append("the checkpoint has no pooler: it starts from random numbers, as the classifier does")
    types = sorted({FLOATS[stored[name].dtype] for name in used} - {"float32"})
    if types:
        notes.append(f"weights stored in {', '.join(types)} are converted to float32: sizes are those of float32")
    return notes


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


# --- tokenizer ------------------------------------------------------------------------------------------------------------


def check_tokenizer_files(folder: Path) -> None:
    """Raise Unfit where a folder brings no vocabulary: transformers would make one of five pieces up."""
    found = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not found:
        raise Unfit(f"has no tokenizer: copy its {' or '.join(TOKENIZERS)} into the folder")
    for path in found:
        refuse_pointer(path)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: BertConfig, folder: Path) -> None:
    """Raise Unfit for a tokenizer that does not belong to the weights, or that does not know its own words."""
    vocabulary = tokenizer.get_vocab()
    special = {role: getattr(tokenizer, f"{role}_token_id") for role in ("pad", "unk", "cls", "sep", "mask")}
    known = set(vocabulary)
    if not (folder / "tokenizer.json").is_file():  # a special token that is not in the list would be put behind it
        known = set((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    absent = [role for role, number in special.items() if number is None or str(getattr(tokenizer, f"{role}_token")) not in known]
    if absent:
        raise Unfit(f"has a tokenizer without a token for {', '.join(absent)}")
    largest = max(vocabulary.values())
    if largest >= config.vocab_size:
        raise Unfit(
            f"has a tokenizer of {len(vocabulary)} pieces (largest id {largest}), but a table of {config.vocab_size} rows"
        )
    if config.pad_token_id not in (None, special["pad"]):
        raise Unfit(f"pads with id {special['pad']} by its tokenizer, and with {config.pad_token_id} by its config.json")
    ids = tokenizer("a")["input_ids"]
    if len(ids) < 2 or (ids[0], ids[-1]) != (special["cls"], special["sep"]):
        raise Unfit(f"has a tokenizer that does not put {tokenizer.cls_token} before and {tokenizer.sep_token} behind a text")
    words = sorted(word for word in vocabulary if word.isalpha())
    words = words[:: max(1, len(words) // 100)]
    lost = [word for word in words if special["unk"] in tokenizer(word, add_special_tokens=False)["input_ids"]]
    if 2 * len(lost) > len(words):
        raise Unfit(f"has a tokenizer that does not know its own words: {len(lost)} of {len(words)} become {tokenizer.unk_token}, "
                    f"such as {lost[0]!r}")  # fmt: skip
