"""What the header of an artifact may say: strict JSON and one schema, checked before anything is built or allocated.

A header is written by whoever made the file. Sizes are bounded here by what any BERT could have, and in `utils.artifacts` by what
the tensors of the file show.
"""

import json
import math
from collections import Counter

from transformers import BertConfig

from utils import CompanionError

LONGEST = 2**23  # characters: that of a BERT-large has 100,000
MOST_CLASSES = 2**16
SIZES = {  # name -> least and most
    "vocab_size": (1, 2**22),
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 2**9),
    "num_attention_heads": (1, 2**12),
    "intermediate_size": (0, 2**18),
    "max_position_embeddings": (1, 2**20),
    "type_vocab_size": (1, 2**16),
    "num_labels": (1, MOST_CLASSES),
}
SHARES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "layer_norm_eps", "initializer_range")
NEEDED = {*SIZES, "hidden_act", "layer_norm_eps"} - {"num_labels"}
TYPES = (None, "float32", "float16", "bfloat16", "float64")
LEAST_TENSORS = 10  # of a layer: six matrices and two norms
FOREIGN = ("auto_map", "quantization_config", "per_layer_config")  # of no meaning in a file that names no code
FIELDS = {"format", "attention", "parts", "config", "layers", "tensors", "sha256"}
FIRST_FIELDS = {"format", "config", "tensors", "sha256"}


class HeaderError(CompanionError):
    """A header says what no file of this suite says."""


def need(condition: object, message: str) -> None:
    """Raise HeaderError with that message unless the condition holds."""
    if not condition:
        raise HeaderError(message)


def is_whole(value: object, least: int = 0, most: int = 2**31) -> bool:
    """Whether a JSON value is a whole number in that range; true and false are none."""
    return type(value) is int and least <= value <= most


def short(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- JSON -----------------------------------------------------------------------------------------------------------


def parse(text: str) -> object:
    """Strict JSON: no key twice, no NaN, no number beyond a double. Raises HeaderError, and ValueError for what is no JSON."""
    need(len(text) <= LONGEST, f"the header has {len(text)} characters, more than any model needs")
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    need(len(found) == len(pairs), f"the header says something twice: {short([key for key, _ in pairs])}")
    return found


def _no_number(text: str) -> float:
    raise HeaderError(f"the header holds {text}, which is no number")


def _finite(text: str) -> float:
    value = float(text)
    need(math.isfinite(value), f"the header holds the number {short(text)}, which is too large")
    return value


# --- schema ---------------------------------------------------------------------------------------------------------


def check(header: dict, first: bool) -> None:
    """Raise HeaderError unless a parsed header has the fields of its format (`first`: format 1), of the right types and in bounds."""
    student = not first and isinstance(header.get("parts"), dict) and "" in header["parts"]
    fields = FIRST_FIELDS if first else FIELDS - ({"config", "layers"} if student else set())
    need(set(header) == fields, f"the header has other fields than {', '.join(sorted(fields))}: {short(sorted(header))}")
    need(isinstance(header["tensors"], dict), "'tensors' is no table")
    for name, entry in header["tensors"].items():
        _check_entry(name, entry)
    if not student:
        check_bert(header["config"], NEEDED)
    if first:
        return
    need(header["attention"] is None or isinstance(header["attention"], str), "'attention' is no name")
    need(isinstance(header["parts"], dict), "'parts' is no table")
    for place, entry in header["parts"].items():
        need(
            isinstance(entry, dict) and set(entry) == {"kind", "options"},
            f"the part at {place!r} has other fields than kind, options",
        )
        need(isinstance(entry["kind"], str) and isinstance(entry["options"], dict), f"kind or options of the part at {place!r}")
    if not student:
        _check_layers(header["layers"], header["config"]["num_hidden_layers"], header["tensors"])


def _check_entry(name: str, entry: object) -> None:
    need(isinstance(entry, dict) and {"encoding", "shape", "parts"} <= set(entry), f"{name!r} is no description of a tensor")
    need(isinstance(entry["encoding"], str), f"the encoding of {name!r} is no name")
    shape, parts = entry["shape"], entry["parts"]
    need(isinstance(shape, list) and len(shape) <= 8 and all(map(is_whole, shape)), f"{name!r} has no shape: {short(shape)}")
    need(isinstance(parts, list) and all(isinstance(part, str) for part in parts), f"the parts of {name!r} are no names")
    need(len(set(parts)) == len(parts), f"a part of {name!r} is named twice")


def _check_layers(layers: object, count: int, tensors: dict) -> None:
    """As many layers as the configuration says and as the tensors show: a million of them would take an hour to build."""
    need(isinstance(layers, list) and len(layers) == count, f"'layers' does not describe the {count} layers of the configuration")
    for number, layer in enumerate(layers):
        need(
            isinstance(layer, dict) and set(layer) == {"heads", "neurons"}, f"layer {number} has other fields than heads, neurons"
        )
        need(all(is_whole(size, 0, 2**18) for size in layer.values()), f"layer {number} has no sizes: {short(layer)}")
    shown = Counter(name.split(".")[3] for name in tensors if name.startswith("bert.encoder.layer.") and name.count(".") > 3)
    there = {number for number, many in shown.items() if many >= LEAST_TENSORS}
    need(there == {str(number) for number in range(count)}, f"{count} layers are described, {len(there)} have tensors")


def check_bert(config: object, needed: set[str] = frozenset()) -> None:
    """Raise HeaderError for a `BertConfig` that lacks something, has a size out of bounds, or reaches beyond sizes and numbers.

    An attention belongs to the header, where it is looked up in a closed table: in a configuration transformers would fetch it.
    """
    need(isinstance(config, dict), f"the configuration is no table: {short(config)}")
    need(needed <= set(config), f"the configuration lacks {', '.join(sorted(needed - set(config)))}")
    for name, value in config.items():
        if name in SIZES:
            least, most = SIZES[name]
            need(is_whole(value, least, most), f"{name} must be a whole number in {least}..{most}, got {short(value)}")
        elif name in SHARES:
            fits = (value is None and name == "classifier_dropout") or (type(value) in (int, float) and 0 <= value <= 1)
            need(fits, f"{name} must be a number in 0..1, got {short(value)}")
        else:
            need(_harmless(name), f"a configuration in a file must not hold {name!r}")
    need(config.get("dtype") in TYPES, f"dtype must be one of {', '.join(map(str, TYPES))}, got {short(config.get('dtype'))}")
    need(isinstance(config.get("hidden_act", ""), str), f"hidden_act must be a name, got {short(config.get('hidden_act'))}")
    need(config.get("return_dict", True) is True, "return_dict must be true: the suite reads outputs by name")
    need(config.get("model_type", "bert") == "bert", f"model_type must be bert, got {short(config.get('model_type'))}")
    _check_classes(config)


def _harmless(name: str) -> bool:
    """Whether a configuration may hold this: nothing private, no implementation to be fetched, nothing that hides a method."""
    private = name.startswith("_") or "implementation" in name or name in FOREIGN
    return name.isidentifier() and not private and not callable(getattr(BertConfig, name, None))


def _check_classes(config: dict) -> None:
    names = config.get("id2label")
    need(names is None or isinstance(names, dict), f"id2label is no table: {short(names)}")
    numbers = list(names or ())
    need(
        len(numbers) <= MOST_CLASSES and all(key.isdecimal() and str(int(key[:9])) == key for key in numbers),
        "id2label names no classes",
    )
    need(names is None or numbers, "id2label names no classes")
    need(names is None or config.get("num_labels") in (None, len(numbers)), "num_labels is not the number of classes in id2label")
    need(isinstance(config.get("label2id"), dict | None), "label2id is no table")


def kept(name: str) -> bool:
    """Whether a field of a model's configuration goes into a file."""
    return _harmless(name)
