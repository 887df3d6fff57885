"""Thousands of damaged and crafted artifacts: each is refused in one line, or is the model that its header says.

`python tests/spine/test_artifact_fuzz.py 10000` (`make fuzz`) tries as many and prints a table; the tests try a few hundred. A damaged
file was cut, flipped or overwritten somewhere, and must never load as another model. A crafted one is well formed and has a
checksum of its own: somebody wants it to be loaded.
"""

import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from utils import artifacts, bert, contract, costs, encodings, parts, structure
from utils.artifacts import ArtifactError
from utils.parts.attention import OWN
from utils.parts.self_attention import SelfAttention

SECONDS, MEGABYTES = 2.0, 1000  # what the load of a small file may take
FORMAT_1 = Path(__file__).with_name("format1.safetensors")

# --- one small model for every kind of part -------------------------------------------------------------------------

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "max_position_embeddings": 12, "type_vocab_size": 2}  # fmt: skip
LAYER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
SPELLING = {"alphabet": "abc", "longest": 5, "own": [0, 1]}
DENSE, WORDS = "bert.encoder.layer.0.intermediate.dense", "bert.embeddings.word_embeddings"
ATTENTION = "bert.encoder.layer.0.attention.self"
WIDE, TABLE, HEADS = ({"in_features": 16, "out_features": 32}, {"num_embeddings": 40, "embedding_dim": 16},
                      {"hidden_size": 16, "num_attention_heads": 2})  # fmt: skip
EXAMPLES: dict[str, tuple[str, dict]] = {  # kind -> place, options
    "low_rank_linear": (DENSE, {**WIDE, "rank": 3}),
    "grouped_linear": (DENSE, {**WIDE, "groups": 4}),
    "gated_low_rank_linear": (DENSE, {**WIDE, "rank": 3}),
    "randomly_shared_linear": (DENSE, {**WIDE, "buckets": 10}),
    "hashed_linear": (DENSE, {**WIDE, "buckets": 10, "seed": 3}),
    "toeplitz_linear": (DENSE, {**WIDE, "rank": 2}),
    "quaternion_linear": (DENSE, WIDE),
    "tensor_train_linear": (DENSE, {**WIDE, "ranks": [4]}),
    "block_term_linear": (DENSE, {**WIDE, "terms": 2, "rank": 2}),
    "cp_linear": (DENSE, {**WIDE, "rank": 3}),
    "tucker_linear": (DENSE, {**WIDE, "ranks": [2, 3, 3]}),
    "sparse_vectors": (WORDS, {**TABLE, "bases": 6, "nonzeros": 2}),
    "two_component_vectors": (WORDS, {**TABLE, "rows": 7, "columns": 7}),
    "reference_vectors": (WORDS, {**TABLE, "blocks": 4, "count": 5}),
    "slim_vectors": (WORDS, {**TABLE, "pieces": 2, "pool": 20}),
    "factorized_vectors": (WORDS, {**TABLE, "size": 3}),
    "trimmed_vectors": (WORDS, {**TABLE, "kept": 10, "pieces": 2}),
    "dictionary_vectors": (WORDS, {**TABLE, "atoms": 6, "nonzeros": 2}),
    "compositional_vectors": (WORDS, {**TABLE, "books": 2, "count": 7}),
    "banded_vectors": (WORDS, {**TABLE, "sizes": [10, 30], "widths": [16, 4]}),
    "digit_vectors": (WORDS, {**TABLE, "digits": 2, "base": 7}),
    "hashed_vectors": (WORDS, {**TABLE, "buckets": 30}),
    "tensor_train_vectors": (WORDS, {**TABLE, "ranks": [3]}),
    "ordered_train_vectors": (WORDS, {**TABLE, "ranks": [3]}),
    "character_bilstm": (WORDS, {**TABLE, "spelling": SPELLING, "character_size": 3, "hidden_size": 4, "correction_size": 2}),
    "character_cnn": (WORDS, {**TABLE, "spelling": SPELLING, "character_size": 3, "widths": [1, 2], "filters": [4, 4]}),
    "trigram_embeddings": ("bert.embeddings", {"vocab_size": 40, "embedding_size": 6, "hidden_size": 16, "max_length": 12}),
    "mobilebert_layer": (
        "bert.encoder.layer.0",
        {"hidden_size": 16, "bottleneck_size": 8, "num_heads": 4, "neurons": 36, "num_ffns": 2},
    ),
    "adaptive_encoder": ("bert.encoder", {"sizes": LAYER, "heads": 1, "max_steps": 2}),
    "equilibrium_encoder": ("bert.encoder", {"sizes": LAYER, "heads": 2, "max_iterations": 3}),
    "trilinear_attention": ("bert.encoder.layer.0.attention", {"hidden_size": 16, "rank": 4, "length": 12}),
    "block_attention": (ATTENTION, {**HEADS, "block": 4, "shifts": [0, 1]}),
    "strided_attention": (ATTENTION, {**HEADS, "stride": 2, "local_heads": 1}),
    "fixed_attention": (ATTENTION, {**HEADS, "block": 4, "summaries": 1, "subblocks": 2}),
    "window_attention": (ATTENTION, {**HEADS, "window": 4, "dilations": [1, 2]}),
    "global_window_attention": (ATTENTION, {**HEADS, "window": 4, "dilations": [1, 2], "global_tokens": 1}),
    "lsh_attention": (ATTENTION, {**HEADS, "chunk": 4}),
    "star_attention": (ATTENTION, HEADS),
    "linformer": (ATTENTION, {**HEADS, "max_length": 12, "projected_length": 4}),
    "sinkhorn_attention": (ATTENTION, {**HEADS, "block": 4}),
    "sortcut_attention": (ATTENTION, {**HEADS, "block": 4, "kept": 1}),
    "sinkhorn_mixture": (ATTENTION, {**HEADS, "block": 4, "sorter": "means"}),
    "bilstm": ("", {"vocab_size": 40, "num_labels": 2, "embedding_size": 6, "hidden_size": 5, "head_size": 4}),
    "text_cnn": ("", {"vocab_size": 40, "num_labels": 2, "embedding_size": 6, "filters": 4, "widths": [2, 3]}),
    "spelled_bert": ("", {"vocab_size": 40, "pieces": 3, "growth": 2.0, "bert": {**SIZES, "vocab_size": 20}}),
}


def small(layers: int = 1) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**{**SIZES, "num_hidden_layers": layers})).eval()


def with_part(kind: str) -> nn.Module:
    place, options = EXAMPLES[kind]
    part = parts.build(kind, options)
    if kind.startswith("character"):  # all but the first two ids are spelled
        part.spelling[2:] = torch.tensor([1, 5, 6, 3, 0], dtype=part.spelling.dtype)
    if place == "":
        return part.eval()
    model = small()
    model.set_submodule(place, part)
    if isinstance(part, SelfAttention):
        model.config._attn_implementation = OWN
    return model.eval()


def in_encodings() -> tuple[nn.Module, dict[str, encodings.Encoded]]:
    """A model cut and tied, with another attention, and one tensor in each encoding."""
    model, shape, generator = small(2), (16, 16), torch.Generator().manual_seed(0)
    codes, books = torch.randint(0, 4, (256,), generator=generator), torch.randn(4, 4, generator=generator)
    structure.remove_neurons(model, {0: torch.arange(20)})
    structure.tie(model, "bert.encoder.layer.1.attention.output", "bert.encoder.layer.0.attention.output")
    model.config._attn_implementation = "linear"
    weight = model.bert.encoder.layer[0].attention.self.query.weight.detach()
    made = [
        encodings.uniform(codes.view(shape), torch.rand(16, 2), torch.rand(16, 2), 2),
        encodings.codebook(codes[:64], books, shape, 2),
        encodings.factors(torch.randn(16, 2), torch.randn(2, 16)),
        encodings.product(codes[:64].view(4, 16), torch.randn(4, 4, 4), shape, 2),
        encodings.residual(codes[:128].view(2, 64), torch.randn(2, 4, 4), shape, 2),
        encodings.multi_bit(torch.randn(16, 2, 16).sign(), torch.rand(16, 2), shape),
        encodings.outliers(codes, books[0], torch.tensor([5, 90]), weight, 2),
    ]
    names = [
        f"bert.encoder.layer.{layer}.attention.self.{which}.weight" for layer in (0, 1) for which in ("query", "key", "value")
    ]
    given = dict(zip([*names, "bert.pooler.dense.weight"], made, strict=True))
    given["bert.encoder.layer.1.intermediate.dense.weight"] = encodings.bitmap(torch.randn(32, 16))
    given["bert.encoder.layer.1.output.dense.bias"] = encodings.index_difference(
        torch.zeros(16).index_fill(0, torch.tensor([3]), 1.0), 2
    )
    return model, given


# --- specimens ------------------------------------------------------------------------------------------------------


@dataclass
class Specimen:
    """A healthy file: its bytes, what its header says, its tensors, and the model."""

    name: str
    raw: bytes
    header: dict
    tensors: dict[str, torch.Tensor]
    model: nn.Module = field(repr=False)


def read_specimen(name: str, path: Path) -> Specimen:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["companion"])
    return Specimen(name, raw, header, safetensors.torch.load(raw), artifacts.load(path))


def make_specimens(folder: Path) -> list[Specimen]:
    torch.manual_seed(0)
    models = {"plain": (small(), None), "encodings": in_encodings(), **{kind: (with_part(kind), None) for kind in EXAMPLES}}
    for name, (model, given) in models.items():
        artifacts.save(model, folder / name, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*(read_specimen(name, folder / name) for name in models), read_specimen("format 1", FORMAT_1)]


# --- damage ---------------------------------------------------------------------------------------------------------


def cut(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def flip(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def hole(raw: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(raw))
    end = min(len(raw), start + rng.randrange(1, 600))
    raw[start:end] = bytes(end - start)


def swap(raw: bytearray, rng: random.Random) -> None:
    a, b = rng.randrange(len(raw)), rng.randrange(len(raw))
    raw[a], raw[b] = raw[b], raw[a]


def shift(raw: bytearray, rng: random.Random) -> None:
    place, size = rng.randrange(len(raw)), rng.randrange(1, 40)
    if rng.random() < 0.5:
        del raw[place : place + size]
    else:
        raw[place:place] = raw[:size]


def header_character(raw: bytearray, rng: random.Random) -> None:
    """A digit, a letter or a sign in the header becomes another of its kind: such a header still has a meaning."""
    size = struct.unpack("<Q", raw[:8])[0]
    place = rng.randrange(8, 8 + size)
    kinds = (b"0123456789", b"abcdefghijklmnopqrstuvwxyz", b'{}[]:,"\\ -+.')
    kind = next((kind for kind in kinds if raw[place] in kind), kinds[0])
    raw[place] = rng.choice(kind)


def header_digit(raw: bytearray, rng: random.Random) -> None:
    size = struct.unpack("<Q", raw[:8])[0]
    places = [place for place in range(8, 8 + size) if raw[place] in b"0123456789"]
    raw[rng.choice(places)] = rng.choice(b"0123456789")


DAMAGE = (cut, flip, hole, swap, shift, header_character, header_digit)

# --- craft ----------------------------------------------------------------------------------------------------------

DEEP = "a very deep nest"
NASTY = [None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**30, -(10**9), 0.5, 1e300, 1e-300, float("nan"), float("inf"), "", "x", "0", "/",
         "gelu", "../../x", "kernels-community/flash-attn", [], {}, [1], {"a": 1}, [[[[1]]]], DEEP, "long" * 5000, [2**31, 2**31]]  # fmt: skip
SPREAD = (1000, 10**5, 10**6, 2**20, 2**24, 2**31 - 1, 2**31, 2**40, 2**63)
Craft = Callable[[dict, dict, random.Random], None]


def leaves(value: object, found: list | None = None) -> list[tuple]:
    """Every place (container, key) in a JSON tree."""
    found = [] if found is None else found
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        found.append((value, key))
        leaves(inner, found)
    return found


def anything(header: dict, tensors: dict, rng: random.Random) -> None:
    where, key = rng.choice(leaves(header))
    where[key] = rng.choice(NASTY)


def near(header: dict, tensors: dict, rng: random.Random) -> None:
    where, key = rng.choice([(w, k) for w, k in leaves(header) if type(w[k]) in (int, float, bool)])
    value = where[key]
    where[key] = rng.choice((value + 1, value - 1, value * 2, value // 2, -value, value + 0.5, float(value), bool(value), str(value),
                             rng.choice(SPREAD)))  # fmt: skip


def drop(header: dict, tensors: dict, rng: random.Random) -> None:
    where, key = rng.choice(leaves(header))
    del where[key]


def add(header: dict, tensors: dict, rng: random.Random) -> None:
    where = rng.choice([header, *(w[k] for w, k in leaves(header) if isinstance(w[k], dict))])
    names = ("surprise", "auto_map", "_attn_implementation", "attn_implementation", "to_dict", "__class__", "per_layer_config", "num_labels",
             "quantization_config", "output_attentions", "is_decoder", "use_return_dict", "config", "kind", "bits", "sha256")  # fmt: skip
    where[rng.choice(names)] = rng.choice([*NASTY, {"AutoConfig": "evil.py"}])


def rename(header: dict, tensors: dict, rng: random.Random) -> None:
    where, key = rng.choice([(w, k) for w, k in leaves(header) if isinstance(w, dict)])
    where[rng.choice((f"{key}x", key[:-1], key.upper(), key.replace("0", "1"), key.replace(".", "..")))] = where.pop(key)


def exchange(header: dict, tensors: dict, rng: random.Random) -> None:
    places = leaves(header)
    (a, i), (b, j) = rng.choice(places), rng.choice(places)
    if isinstance(a[i], dict | list) or isinstance(b[j], dict | list):  # else a circle might come about
        return
    a[i], b[j] = b[j], a[i]


def configuration(header: dict, tensors: dict, rng: random.Random) -> None:
    config = header.get("config") or next(iter(header["parts"].values()))["options"]
    key = rng.choice(list(config))
    config[key] = rng.choice([*SPREAD, *NASTY])


def many_layers(header: dict, tensors: dict, rng: random.Random) -> None:
    count = rng.choice((0, 2, 3, 500, 10**4, 10**6))
    if "config" not in header:
        return configuration(header, tensors, rng)
    header["config"]["num_hidden_layers"] = count
    if rng.random() < 0.7 and "layers" in header and count <= 10**4:
        header["layers"] = header["layers"][:1] * count
    if rng.random() < 0.3:
        for number in range(min(count, 1000)):
            header["tensors"][f"bert.encoder.layer.{number * 7}.x"] = {
                "encoding": "tied",
                "shape": [1],
                "parts": [],
                "to": "classifier.bias",
            }


def bomb(header: dict, tensors: dict, rng: random.Random) -> None:
    """A few bytes that declare a huge tensor, in an encoding that can say so; sometimes the configuration agrees."""
    name, entry = rng.choice(list(header["tensors"].items()))
    for part in entry.get("parts", []):
        tensors.pop(f"{name}/{part}", None)
    size = rng.choice((2**20, 2**22, 2**26, 2**31, 2**40))
    shape = [size, *entry["shape"][1:]] if rng.random() < 0.7 else [*entry["shape"][:-1], size]
    if rng.random() < 0.5:
        new = {"encoding": "index_difference", "shape": shape, "parts": ["gaps", "values"], "bits": 8, "count": 0}
        made = {"gaps": torch.zeros(0, dtype=torch.uint8), "values": torch.zeros(0)}
    else:
        new = {"encoding": "factors", "shape": [size, 2**10], "parts": ["left", "right"]}
        made = {"left": torch.zeros(min(size, 2**10), 1), "right": torch.zeros(1, 2**10)}
    header["tensors"][name] = new
    tensors.update({f"{name}/{part}": tensor for part, tensor in made.items()})
    if name == f"{WORDS}.weight" and "config" in header:
        header["config"]["vocab_size"] = size


def encoding(header: dict, tensors: dict, rng: random.Random) -> None:
    entry = rng.choice(list(header["tensors"].values()))
    key = rng.choice(["encoding", "shape", "parts", *(key for key in entry if key in ("bits", "count", "axis", "to"))])
    entry[key] = {"encoding": rng.choice([*encodings.LAYOUT, "pickle"]), "bits": rng.choice((0, -1, 1, 2, 3, 4, 5, 8, 9, 64, 2**31)),
                  "parts": rng.choice(([], ["values"], ["codes", "codes"], ["../x"])), "axis": rng.choice(("rows", "columns", "x")),
                  "shape": rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [-1], [0], [], [1, *entry["shape"]], [2**31] * 3)),
                  "count": rng.choice((0, 1, -1, 2**31, 2**62)), "to": rng.choice(list(header["tensors"]))}[key]  # fmt: skip


def knot(header: dict, tensors: dict, rng: random.Random) -> None:
    """Tied to itself, in a circle, to nothing, or to another tensor."""
    names = list(header["tensors"])
    a, b = rng.choice(names), rng.choice(names)
    for name, to in ((a, rng.choice((a, b, "nothing"))), *([(b, a)] if rng.random() < 0.4 else [])):
        entry = header["tensors"][name]
        for part in entry.get("parts", []):
            tensors.pop(f"{name}/{part}", None)
        header["tensors"][name] = {"encoding": "tied", "shape": entry["shape"], "parts": [], "to": to}


def stored(header: dict, tensors: dict, rng: random.Random) -> None:
    """A tensor of the file gets another type, shape or size, or numbers that are none."""
    name = rng.choice(list(tensors))
    old = tensors[name]
    odd = old.clone()
    if odd.numel():
        numbers = (float("nan"), float("inf"), -1e38, 1e38) if odd.is_floating_point() else (127, 0)
        odd.view(-1)[rng.randrange(odd.numel())] = rng.choice(numbers)
    types = (torch.float32, torch.float16, torch.float64, torch.int64, torch.complex64, torch.uint8, torch.bool)
    shapes = [old.flatten(), old.unsqueeze(0), torch.cat([old.flatten(), old.flatten()]), torch.zeros(0), torch.zeros(())]
    if old.dim():
        shapes += [old[:-1], old.transpose(0, -1)]
    others = [torch.randint(0, 256, (7,), dtype=torch.uint8), torch.full_like(old, 3)]
    made = rng.choice(
        [odd, odd, odd, old.to(rng.choice(types)), old.to(rng.choice(types)), rng.choice(shapes), rng.choice(shapes), *others]
    )
    tensors[name] = made.contiguous().clone()


def other_tensors(header: dict, tensors: dict, rng: random.Random) -> None:
    a, b = rng.choice(list(tensors)), rng.choice(list(tensors))
    which = rng.randrange(4)
    if which == 0:
        tensors[f"{a}x"] = tensors[a].clone()
    elif which == 1:
        del tensors[a]
    elif which == 2:
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()
    else:
        tensors["__metadata__x" if rng.random() < 0.5 else a.replace("/", ".")] = tensors.pop(a)


def attention(header: dict, tensors: dict, rng: random.Random) -> None:
    names = (
        "kernels-community/flash-attn",
        "x/y:z",
        "flash_attention_2",
        "flex_attention",
        "paged|sdpa",
        "eager",
        "sdpa",
        *parts.ATTENTIONS,
    )
    header["attention"] = rng.choice([*names, *NASTY])


def part(header: dict, tensors: dict, rng: random.Random) -> None:
    listed = header.setdefault("parts", {})
    kind = rng.choice(list(EXAMPLES))
    place, options = EXAMPLES[kind]
    places = [
        place,
        *listed,
        DENSE,
        f"{DENSE}.left",
        "bert",
        "bert.encoder.layer.7",
        "",
        "nothing.at.all",
        "dropout",
        "config",
        "classifier",
    ]
    which = rng.randrange(3) if listed else 0
    if which == 0:
        listed[rng.choice(places)] = {"kind": kind, "options": json.loads(json.dumps(options))}
    elif which == 1:
        rng.choice(list(listed.values()))["kind"] = rng.choice([*parts.PARTS, "utils.parts", "os.system"])
    else:
        listed[rng.choice(places)] = listed.pop(rng.choice(list(listed)))


def option(header: dict, tensors: dict, rng: random.Random) -> None:
    """Somewhere in the options of a part."""
    places = leaves([entry["options"] for entry in header.get("parts", {}).values()])[1:]
    if not places:
        return configuration(header, tensors, rng)
    where, key = rng.choice(places)
    old = where[key]
    number = (old + 1, old - 1, old * 2, -old, float(old), bool(old), *SPREAD) if type(old) in (int, float, bool) else ()
    where[key] = rng.choice([*number, *NASTY])
    if rng.random() < 0.2:
        rng.choice([w for w, _ in places if isinstance(w, dict)] or [{}])["surprise"] = 1


CRAFT: tuple[Craft, ...] = (anything, near, drop, add, rename, exchange, configuration, many_layers, bomb, encoding, knot, stored, other_tensors,
                            attention, part, option, option)  # fmt: skip


def seal(header: dict, tensors: dict[str, torch.Tensor], rng: random.Random) -> bytes:
    """A file with a checksum that is right, as far as such a header has one."""
    described = {name: value for name, value in header.items() if name != "sha256"}
    first = header.get("format") == artifacts.FIRST_FORMAT
    header["sha256"] = artifacts._first_digest(tensors) if first else artifacts._digest(described, tensors)
    text = json.dumps(header).replace(json.dumps(DEEP), "[" * 4000 + "]" * 4000)
    if rng.random() < 0.02:  # every reader of JSON takes the last of two
        text = text.replace('"format"', '"format": "x", "format"', 1)
    return safetensors.torch.save(tensors, {"companion": text})


def craft(specimen: Specimen, rng: random.Random) -> tuple[str, bytes]:
    header, tensors = json.loads(json.dumps(specimen.header)), dict(specimen.tensors)
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(CRAFT)
        try:
            change(header, tensors, rng)
        except (
            LookupError,
            AttributeError,
            TypeError,
            ValueError,
            OverflowError,
        ):  # an earlier change has left it nothing to change
            continue
        names.append(change.__name__)
    return (names or ["nothing"])[0], seal(header, tensors, rng)


# --- judging --------------------------------------------------------------------------------------------------------


def say_of(model: nn.Module) -> dict:
    """What the model says of itself, without help of `describe`."""
    config = model.config
    found = {
        path: (type(module), module.options())
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, parts.Part)
    }
    layers = None
    if "" not in found:
        layers = [
            (layer.attention.self.num_attention_heads, layer.intermediate.dense.out_features)
            for layer in model.bert.encoder.layer
        ]
    return {"parts": found, "layers": layers, "attention": getattr(config, "_attn_implementation", None)}


def disagreement(header: dict, model: nn.Module, path: Path) -> str | None:
    """In what a loaded model is another than its header says; None where in nothing."""
    said = say_of(model)
    listed = header.get("parts", {})
    if set(listed) != set(said["parts"]):
        return "parts"
    for place, entry in listed.items():
        kind, options = said["parts"][place]
        given = json.dumps(entry["options"], sort_keys=True)
        if kind is not parts.PARTS[entry["kind"]] or given != json.dumps(
            {name: options.get(name) for name in entry["options"]}, sort_keys=True
        ):
            return f"options of {place}"
    if said["layers"] is not None:
        if "layers" in header and [(layer["heads"], layer["neurons"]) for layer in header["layers"]] != said["layers"]:
            return "layers"
        for name in (*SIZES, "hidden_act", "layer_norm_eps"):
            if json.dumps(getattr(model.config, name)) != json.dumps(header["config"].get(name)):
                return name
        if said["attention"] != (header.get("attention") or "sdpa"):
            return "attention"
    state = model.state_dict()
    _, decoded = artifacts.read(path)
    if set(state) != set(header["tensors"]):
        return "tensors"
    for name, tensor in state.items():
        entry = header["tensors"][name]
        if (
            list(tensor.shape) != entry["shape"]
            or not torch.equal(tensor.to(decoded[name].dtype), decoded[name])
            or not tensor.isfinite().all()
        ):
            return name
        parameter = name in dict(model.named_parameters(remove_duplicate=False))
        if entry["encoding"] == "tied" and parameter and model.get_parameter(name) is not model.get_parameter(entry["to"]):
            return f"tie of {name}"
    return None


@dataclass
class Tally:
    """What became of the mutants."""

    counts: Counter = field(default_factory=Counter)  # (family, change, outcome)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    megabytes: float = 0.0


def peak() -> float:
    """Most megabytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def judge(path: Path, specimen: Specimen, damaged: bool) -> str:
    """`refused`, `loaded`, or what is wrong with the answer."""
    try:
        model = artifacts.load(path)
    except ArtifactError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    if damaged:
        same = bert.fingerprint(model) == bert.fingerprint(specimen.model) and str(say_of(model)) == str(say_of(specimen.model))
        return "loaded" if same and artifacts.describe(model) == artifacts.describe(specimen.model) else "another model"
    raw = path.read_bytes()
    text = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]["companion"]
    try:
        other = disagreement(json.loads(text), model, path)
    except Exception as error:  # what was loaded is none of the models that can be asked
        other = f"{type(error).__name__}: {error}"
    return f"another model: {other}" if other or '"format": "x"' in text else "loaded"


def fuzz(count: int, seed: int, folder: Path, report: Callable[[int], None] = lambda number: None) -> Tally:
    """Try so many mutants, half damaged and half crafted."""
    specimens, rng, tally = make_specimens(folder), random.Random(seed), Tally()
    sound = [one for one in specimens if one.header["format"] == artifacts.FORMAT]  # format 1 cannot notice a changed header
    path, before = folder / "mutant", peak()
    for number in range(count):
        damaged = number % 2 == 0
        specimen = rng.choice(sound if damaged else specimens)
        if damaged:
            change = rng.choice(DAMAGE)
            raw = bytearray(specimen.raw)
            change(raw, rng)
            name = change.__name__
        else:
            name, raw = craft(specimen, rng)
        path.write_bytes(raw)
        start = time.process_time()
        outcome = judge(path, specimen, damaged)
        seconds, megabytes = time.process_time() - start, peak() - before
        if seconds > SECONDS or megabytes > max(MEGABYTES, tally.megabytes):
            outcome = f"took {seconds:.1f} s and {megabytes:.0f} MB, {outcome}"
        tally.seconds, tally.megabytes = max(tally.seconds, seconds), max(tally.megabytes, megabytes)
        tally.counts["damaged" if damaged else "crafted", name, outcome if outcome in ("refused", "loaded") else "failed"] += 1
        if outcome not in ("refused", "loaded"):
            tally.failures.append(f"mutant {number} of seed {seed}, {name} of {specimen.name}: {outcome}")
            if "--keep" in sys.argv:
                Path(f"/tmp/mutant-{seed}-{number}").write_bytes(raw)
        report(number)
    return tally


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _quiet():
    warnings.simplefilter("ignore")
    with bert.quiet():
        yield


def test_every_kind_of_part_has_an_example():
    assert set(EXAMPLES) == set(parts.PARTS)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_kind_of_part_comes_back(kind, tmp_path):
    model, path = with_part(kind), tmp_path / "m.safetensors"
    artifacts.save(model, path)
    again = artifacts.load(path)
    inputs = costs.example_inputs(model, 2, 8, torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert contract.same_bytes(path, again)


def test_mutants_are_refused_or_are_what_they_say(tmp_path):
    tally = fuzz(300, 1, tmp_path)
    assert not tally.failures, "\n".join(tally.failures)
    assert sum(tally.counts.values()) == 300 and sum(n for (*_, outcome), n in tally.counts.items() if outcome == "loaded") > 5


def main(count: int, seed: int = 0) -> None:
    """Print a table; exit status 1 where a mutant was neither refused nor what it says."""
    warnings.simplefilter("ignore")
    size = Path("/proc/self/statm")
    if size.exists():  # a net under the whole: what a mutant takes is measured, and must not take the machine
        now = int(size.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 6 * 2**30, resource.RLIM_INFINITY))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, bert.quiet():
        tally = fuzz(
            count,
            seed,
            Path(folder),
            lambda number: print(f"\r{number + 1}", end="", file=sys.stderr) if number % 50 == 49 else None,
        )
    print(f"\n{'mutants':<30}{'tried':>8}{'refused':>9}{'loaded':>8}{'failed':>8}")
    for family, name in sorted({key[:2] for key in tally.counts}):
        refused, loaded, failed = (tally.counts[family, name, outcome] for outcome in ("refused", "loaded", "failed"))
        print(f"{family + ', ' + name.replace('_', ' '):<30}{refused + loaded + failed:>8}{refused:>9}{loaded:>8}{failed:>8}")
    print(f"{count} in {time.monotonic() - start:.0f} s; one took {tally.seconds:.2f} s and {tally.megabytes:.0f} MB at most")
    print("\n".join(tally.failures))
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:] if word.isdecimal()))
