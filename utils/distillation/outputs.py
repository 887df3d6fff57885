"""What student and teacher give: logits and whatever of their inside a loss reads; the teacher's computed once and cached.

A loss names what it reads as pairs (kind, layer). Layer 0 is the embedding block, layers 1 to L are the encoder's. Kinds, with
their shapes: `hidden` (batch, length, hidden size), `cls` (batch, hidden size: the first position), `scores` (batch, heads,
length, length: attention before its softmax, divided by the root of the head size), `queries`, `keys`, `values` (batch, heads,
length, head size), and `inputs` (the word embeddings, as a point at which one may differentiate; layer 0 only).
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils import bert, cache, tasks, training
from utils.tasks import Split, Task

Need = tuple[str, int]
PROJECTIONS = {"queries": "query", "keys": "key", "values": "value"}
# What is watched to get a kind.
SOURCES = {"hidden": ("hidden",), "cls": ("hidden",), "scores": ("queries", "keys"), "inputs": ("inputs",)}
SOURCES |= {kind: (kind,) for kind in PROJECTIONS}
# The axes of one example that are tokens.
TOKENS = {"hidden": (0,), "cls": (), "scores": (1, 2), "queries": (1,), "keys": (1,), "values": (1,)}
STORED = tuple(TOKENS)


@dataclass(frozen=True)
class Size:
    """How large a model is, as far as distillation asks: parameters, encoder layers, heads a layer, hidden size."""

    parameters: int
    num_layers: int
    num_heads: int
    hidden_size: int


def size_of(model: nn.Module) -> Size:
    """The size of a model. Levels and scales of quantizers do not count: they stand for weights that are counted already."""
    counted = [p for name, p in model.named_parameters() if "parametrizations" not in name or name.endswith(".original")]
    config, layers = model.config, getattr(getattr(getattr(model, "bert", None), "encoder", None), "layer", ())
    heads, width = getattr(config, "num_attention_heads", 0), getattr(config, "hidden_size", 0)
    return Size(sum(p.numel() for p in counted), len(layers), heads, width)


@dataclass
class Outputs:
    """What a model gave for one batch. `outputs[kind, layer]` raises ValueError for what was not captured."""

    logits: torch.Tensor  # (batch, classes)
    attention_mask: torch.Tensor  # (batch, length)
    states: Mapping[Need, torch.Tensor] = field(default_factory=dict)
    members: tuple["Outputs", ...] = ()  # of a teacher that is several

    def __getitem__(self, need: Need) -> torch.Tensor:
        kind, layer = need
        if need in self.states:
            return self.states[need]
        if kind == "cls" and ("hidden", layer) in self.states:
            return self.states["hidden", layer][:, 0]
        raise ValueError(f"no {kind} of layer {layer} in these outputs: {_listed(self.states)}; name it in `wanted`")


def _listed(needs: Iterable[Need]) -> str:
    """The needs in words."""
    return "they hold the logits" + "".join(f", {kind} of layer {layer}" for kind, layer in sorted(needs))


def needs(kind: str, layers: Iterable[int]) -> tuple[Need, ...]:
    """One kind at several layers. Raises ValueError for an unknown kind."""
    if kind not in SOURCES:
        raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(SOURCES)}")
    return tuple((kind, layer) for layer in layers)


# --- capturing ------------------------------------------------------------------------------------------------------


def capture(model: nn.Module, batch: dict, wanted: Iterable[Need] = ()) -> Outputs:
    """Run the model on a batch and keep what `wanted` names, by hooks; gradients flow through all of it.

    Raises ValueError for a kind or layer that the model does not have.
    """
    wanted = tuple(dict.fromkeys(wanted))
    seen: dict[Need, torch.Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for source in dict.fromkeys((source, layer) for kind, layer in wanted for source in SOURCES[kind]):
            hooks.enter_context(_watched(model, source, seen))
        if any(kind == "inputs" for kind, _ in wanted):  # only the plain products can be differentiated twice
            hooks.enter_context(bert.fastest_attention(model, "eager"))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    states = {need: _read(seen, need) for need in wanted}
    return Outputs(logits, batch["attention_mask"], states)


def _watched(model: nn.Module, source: Need, seen: dict) -> contextlib.AbstractContextManager:
    """A hook, as a context, that notes what a module gives. `inputs` become a point at which one may differentiate."""
    kind, layer = source
    layers = getattr(getattr(getattr(model, "bert", None), "encoder", None), "layer", ())
    lowest, highest = (1 if kind in PROJECTIONS else 0), (0 if kind == "inputs" else len(layers))
    if not len(layers) or not lowest <= layer <= highest:
        place = f"layers {lowest}..{highest}" if len(layers) else "no encoder layers"
        raise ValueError(f"there are no {kind} of layer {layer}: the model has {place}")
    if kind == "inputs":
        module = model.bert.embeddings.word_embeddings
    elif kind == "hidden":
        module = layers[layer - 1] if layer else model.bert.embeddings
    else:
        module = getattr(layers[layer - 1].attention.self, PROJECTIONS[kind])

    def note(_: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | None:
        output = output[0] if isinstance(output, tuple) else output
        if kind == "inputs":
            seen[source] = output if output.requires_grad else output.detach().requires_grad_()
            return seen[source]
        heads = 1 if kind == "hidden" else layers[layer - 1].attention.self.num_attention_heads
        seen[source] = output if kind == "hidden" else output.unflatten(-1, (heads, -1)).transpose(1, 2)
        return None

    return module.register_forward_hook(note)  # a context that removes the hook


def _read(seen: dict[Need, torch.Tensor], need: Need) -> torch.Tensor:
    """One kind out of what the hooks noted."""
    kind, layer = need
    if kind == "scores":
        query, key = seen["queries", layer], seen["keys", layer]
        return query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return seen["hidden", layer][:, 0] if kind == "cls" else seen[need]


# --- teachers -------------------------------------------------------------------------------------------------------


class LiveTeacher:
    """A teacher that is asked anew for every batch: for what no cache can hold (gradients, teachers that learn)."""

    def __init__(self, model: nn.Module, wanted: Iterable[Need] = ()):
        self.model, self.wanted, self.size = model.eval(), tuple(wanted), size_of(model)
        self.differentiated = any(kind == "inputs" for kind, _ in self.wanted)

    def __call__(self, batch: dict) -> Outputs:
        """Its outputs; without a gradient, unless the inputs are wanted."""
        plain = batch["input_ids"].device.type == "cpu"
        fast = bert.fastest_attention(self.model, "eager" if plain else "sdpa")
        with torch.set_grad_enabled(self.differentiated), fast:
            return capture(self.model, batch, self.wanted)


class CachedTeacher:
    """A teacher whose outputs were computed once, for one split; a batch finds them by its `rows`.

    Files are mapped into memory and read where needed. `bytes` and `seconds` say what the cache cost, `seconds_saved` what its
    use has saved so far. Raises ValueError for a batch of another split.
    """

    def __init__(self, folder: Path):
        facts = json.loads((folder / "facts.json").read_text())
        self.size, self.seconds, self.shapes = Size(**facts["size"]), facts["seconds"], facts["shapes"]
        self.wanted = tuple((kind, layer) for kind, layer in facts["wanted"])
        self.folder = folder
        self.bytes = {path.stem: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
        common = load_file(folder / "logits.safetensors")
        self.logits, self.lengths = common["logits"], common["lengths"]
        self.loaded: dict[Need, tuple[torch.Tensor, np.ndarray]] = {}
        self.rows_read, self.read_seconds = 0, 0.0

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def seconds_saved(self) -> float:
        """Seconds that the teacher would have taken for what was read, less the reading."""
        return self.seconds * self.rows_read / len(self) - self.read_seconds

    def __call__(self, batch: dict) -> Outputs:
        """The stored outputs of a batch's rows, padded like the batch, on its device, in float32."""
        rows, mask = torch.as_tensor(batch["rows"]), batch["attention_mask"]
        if int(rows.max()) >= len(self) or not torch.equal(self.lengths[rows], mask.sum(1).cpu()):
            raise ValueError(f"the batch is not of the split of {len(self)} examples whose outputs are cached")
        self.rows_read += len(rows)
        return Outputs(self.logits[rows].to(mask.device), mask, _Stored(self, rows.tolist(), mask))

    def padded(self, need: Need, rows: list[int], mask: torch.Tensor) -> torch.Tensor:
        """A need of the given rows, (batch, ...), with zeros where the mask (batch, length) has no tokens."""
        start, kind = time.perf_counter(), need[0]
        values, starts = self._stored(need)
        padded = torch.zeros(len(rows), *_shape(kind, self.shapes[kind], mask.shape[1]))
        for place, row in zip(padded, rows, strict=True):
            inner = place[_inside(kind, int(self.lengths[row]))]
            inner.copy_(values[starts[row] : starts[row] + inner.numel()].view(inner.shape))
        self.read_seconds += time.perf_counter() - start
        return padded.to(mask.device)

    def _stored(self, need: Need) -> tuple[torch.Tensor, np.ndarray]:
        """All stored values of a need in a row, and where each example begins."""
        if need not in self.loaded:
            kind, layer = need
            sizes = [int(np.prod(_shape(kind, self.shapes[kind], n))) for n in self.lengths.tolist()]
            values = load_file(self.folder / f"{kind}-{layer}.safetensors")["values"]
            self.loaded[need] = (values, np.concatenate([[0], np.cumsum(sizes)]))
        return self.loaded[need]


class _Stored(Mapping):
    """The stored states of one batch. Each is read when it is asked for, so that a step pays for what its loss reads."""

    def __init__(self, teacher: CachedTeacher, rows: list[int], mask: torch.Tensor):
        self.teacher, self.rows, self.mask = teacher, rows, mask
        self.read: dict[Need, torch.Tensor] = {}

    def __getitem__(self, need: Need) -> torch.Tensor:
        if need not in self.teacher.wanted:
            raise KeyError(need)
        if need not in self.read:
            self.read[need] = self.teacher.padded(need, self.rows, self.mask)
        return self.read[need]

    def __iter__(self) -> Iterator[Need]:
        return iter(self.teacher.wanted)

    def __len__(self) -> int:
        return len(self.teacher.wanted)


Teacher = Callable[[dict], Outputs]


def cached_teacher(
    model: nn.Module, task: Task, wanted: Iterable[Need] = (), split: Split | None = None, dtype: torch.dtype = torch.float16
) -> CachedTeacher:
    """The teacher's outputs on a split (default: the training sentences), computed once and kept in the cache.

    `wanted` names what is stored beside the logits. Two bytes a number; padding is not stored. Raises ValueError for a kind
    that cannot be stored, and for values that `dtype` cannot hold.
    """
    wanted, split = tuple(sorted(set(wanted))), split or task.train
    unknown = sorted({kind for kind, _ in wanted} - set(STORED))
    if unknown:
        raise ValueError(f"cannot store {', '.join(unknown)}: choose from {', '.join(STORED)} (or ask a LiveTeacher)")
    device = next(model.parameters()).device
    ids = hashlib.sha256(json.dumps(split.input_ids).encode()).hexdigest()
    name = cache.key({
        "teacher": bert.fingerprint(model), "ids": ids, "wanted": wanted, "dtype": dtype, "device": device.type,
        "compute": training.compute_dtype(device), "torch": torch.__version__,
        "code": cache.source_hash(training, tasks, bert, sys.modules[__name__]),
    })  # fmt: skip
    build = _Builder(model, split, task.tokenizer.pad_token_id, wanted, dtype)
    return CachedTeacher(cache.once("teacher", name, build))


@dataclass
class _Builder:
    """One pass over a split; called with the folder that it fills."""

    model: nn.Module
    split: Split
    pad_token_id: int
    wanted: tuple[Need, ...]
    dtype: torch.dtype

    def __call__(self, folder: Path) -> None:
        lengths = torch.tensor([len(ids) for ids in self.split.input_ids])
        start = time.perf_counter()
        logits, pieces, shapes = self._pass(lengths)
        seconds = time.perf_counter() - start
        for (kind, layer), found in pieces.items():
            values = torch.cat([found[row] for row in range(len(lengths))])
            if not torch.isfinite(values).all():
                raise ValueError(f"{kind} of layer {layer} holds values beyond {self.dtype}: use dtype=torch.bfloat16")
            save_file({"values": values}, folder / f"{kind}-{layer}.safetensors")
        save_file({"logits": logits, "lengths": lengths}, folder / "logits.safetensors")
        facts = {"size": asdict(size_of(self.model)), "seconds": seconds, "wanted": self.wanted, "shapes": shapes}
        (folder / "facts.json").write_text(json.dumps(facts))

    def _pass(self, lengths: torch.Tensor) -> tuple[torch.Tensor, dict[Need, dict[int, torch.Tensor]], dict[str, list[int]]]:
        """Logits (examples, classes), every need's flat values by example, and the shapes (of one example) they had."""
        teacher, device = LiveTeacher(self.model, self.wanted), next(self.model.parameters()).device
        rows, logits, pieces, shapes = [], [], {need: {} for need in self.wanted}, {}
        for batch in tasks.batches(self.split, 64, self.pad_token_id):
            with training.autocast(device):
                found = teacher(training.to_device(batch, device))
            rows += batch["rows"].tolist()
            logits.append(found.logits.cpu())
            for need, values in found.states.items():
                shapes[need[0]] = list(values.shape[1:])
                values = values.to(self.dtype).cpu()
                for row, one in zip(batch["rows"].tolist(), values, strict=True):
                    pieces[need][row] = one[_inside(need[0], int(lengths[row]))].flatten()
        return torch.cat(logits)[torch.argsort(torch.tensor(rows))], pieces, shapes


def _shape(kind: str, shape: list[int], length: int) -> tuple[int, ...]:
    """The shape of one example with that many tokens."""
    return tuple(length if axis in TOKENS[kind] else size for axis, size in enumerate(shape))


def _inside(kind: str, length: int) -> tuple[slice, ...]:
    """The index of an example's tokens, without its padding."""
    axes = TOKENS[kind]
    return tuple(slice(length) if axis in axes else slice(None) for axis in range(max(axes) + 1)) if axes else (slice(None),)


def check_supply(teacher: Teacher, wanted: Iterable[Need]) -> None:
    """Raise ValueError where a teacher does not give what a loss reads."""
    given = set(teacher.wanted)
    lacking = [need for need in wanted if need not in given and not (need[0] == "cls" and ("hidden", need[1]) in given)]
    if lacking:
        told = ", ".join(f"{kind} of layer {layer}" for kind, layer in lacking)
        raise ValueError(f"the loss reads {told}, which the teacher's outputs lack: {_listed(given)}; name it in `wanted`")
