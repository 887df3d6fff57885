"""What a model costs: parameters, multiply-adds, milliseconds, bytes of memory, energy.

Multiply-adds are counted in closed form, because counters cannot be trusted here: on the CPU `FlopCounterMode` sees no
attention at all (`measured_macs` mends that and serves as the check). A part (`utils.parts`) counts itself; everything else is
a linear layer, an attention core, or free. One multiply-add is two FLOPs.
"""

import contextlib
import hashlib
import logging
import math
import os
import re
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.models.bert.modeling_bert import BertSelfAttention

from utils import bert
from utils.metrics import Estimate, median_interval
from utils.parts import Part, attention_macs
from utils.parts.shared import fft_macs
from utils.profiles import LATENCY_BATCHES as LATENCY_BATCHES
from utils.training import steady_memory

REST = 0.06  # seconds; workers of ONNX Runtime wait busily for 40 ms after their work and hold a core against whoever is next
COMPONENTS = ("embeddings", "qkv", "attention_core", "attention_output", "ffn", "norms", "head", "other")
PLACES = (  # the first pattern found in a path gives its component; `head` is pooler + classifier, `norms` the encoder's
    (r"(^|\.)embeddings(\.|$)", "embeddings"),
    (r"^bert\.pooler|^classifier|^hidden\.", "head"),
    (r"LayerNorm", "norms"),
    (r"attention\.self\.(query|key|value)", "qkv"),
    (r"attention\.self$", "attention_core"),
    (r"attention\.output\.dense", "attention_output"),
    (r"\d+\.(intermediate|output\.dense)", "ffn"),
)


def component(path: str) -> str:
    """The component (`COMPONENTS`) that a module or parameter belongs to, by its path."""
    return next((name for pattern, name in PLACES if re.search(pattern, path)), "other")


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters in all, non-zero, and without the embedding block (tied parameters count once)."""
    parameters = list(model.parameters())
    embeddings = sum(p.numel() for p in bert.embeddings(model).parameters())
    total = sum(p.numel() for p in parameters)
    return {
        "parameters": total,
        "nonzero_parameters": sum(int(torch.count_nonzero(p)) for p in parameters),
        "parameters_without_embeddings": total - embeddings,
    }


def macs(model: nn.Module, length: int, batch: int = 1) -> int:
    """Multiply-adds of one forward pass over `batch` sequences of `length` tokens."""
    return batch * sum(macs_by_component(model, length).values())


def macs_by_component(model: nn.Module, length: int) -> dict[str, int]:
    """Multiply-adds of one sequence per component (`COMPONENTS`). Look-ups and normalisation multiply no matrices.

    A linear layer costs out * in per token, pooler and classifier see one token, attention has its own form
    (`parts.attention_macs`), and a part is asked. Layers that share weights cost as often as they are passed.
    """
    count = dict.fromkeys(COMPONENTS, 0)
    for path, module in counted_modules(model):
        where = component(path)
        tokens = 1 if where == "head" else length
        if isinstance(module, Part):
            count[where] += module.macs(tokens)
        elif isinstance(module, nn.Linear):
            count[where] += tokens * module.in_features * module.out_features
        else:
            name = module.config._attn_implementation
            count[where] += attention_macs(name, length, module.num_attention_heads, module.attention_head_size)
    return count


def counted_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts, linear layers and attention cores of a model, as often as a pass visits them; a part's inside is its own."""
    if isinstance(module, Part | nn.Linear | BertSelfAttention):
        yield path, module
    if not isinstance(module, Part | nn.Linear):
        for name, child in module._modules.items():  # named_children() would skip a shared layer's second visit
            if child is not None:
                yield from counted_modules(child, f"{path}.{name}" if path else name)


def parameters_by_component(model: nn.Module) -> dict[str, int]:
    """Parameters (biases included) per component; tied ones count where they stand first."""
    count = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        count[component(name)] += parameter.numel()
    return count


def structure(model: nn.Module) -> str:
    """A short name for what decides how fast a model is: classes, options of parts, shapes, types, attention, and which tensors are
    one (a cache may hold those), but no value of any weight."""
    digest = hashlib.sha256(str(getattr(model.config, "_attn_implementation", None)).encode())
    numbers, order = {}, []  # the number of a tensor, by its first place; numbers at all places
    for path, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        tensors = [(name, own[name]) for name in sorted(own) if own[name] is not None]
        order += [numbers.setdefault(id(t), len(numbers)) for _, t in tensors]
        shapes = [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors]
        options = module.options() if isinstance(module, Part) else {}  # a window's width is in no shape
        digest.update(f"{path} {type(module).__name__} {options} {shapes}".encode())
    if len(numbers) < len(order):
        digest.update(str(order).encode())
    return digest.hexdigest()[:12]


def measured_macs(model: nn.Module, length: int, batch: int = 1) -> int:
    """Multiply-adds as PyTorch's counter sees them, with the kernels put back in that it forgets: attention and LSTM on a CPU,
    and Fourier transforms."""
    device = next(model.parameters()).device

    def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    transforms = dict.fromkeys((torch.ops.aten._fft_r2c, torch.ops.aten._fft_c2c, torch.ops.aten._fft_c2r), transform_flops)
    forgotten = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops, **transforms}
    counter = FlopCounterMode(display=False, custom_mapping=forgotten)
    # oneDNN's LSTM is one opaque kernel; without it the same layer is a loop of matrix products that can be counted.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # switching oneDNN off also touches a setting for Intel GPUs, which warns
        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False), counter:
            model(**example_inputs(model, batch, length, device))
    return counter.get_total_flops() // 2


def transform_flops(shape: tuple, dims: list[int], *args, out_shape: tuple, **kwargs) -> int:
    """FLOPs of Fourier transforms along `dims`, as `fft_macs` counts them; half of them where one side is real."""
    full = max(shape, out_shape, key=math.prod)  # the spectrum of real numbers is stored by half
    points = math.prod(full[dim] for dim in dims)
    return 2 * (math.prod(full) // points) * fft_macs(points, real=tuple(shape) != tuple(out_shape))


def example_inputs(model: nn.Module, batch: int, length: int, device: torch.device | str = "cpu") -> dict:
    """Random token ids without padding, for measurements that depend on shapes alone."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, model.config.vocab_size, (batch, length), generator=generator).to(device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def timer(model: Callable, inputs: dict) -> benchmark.Timer:
    """A `torch.utils.benchmark` timer of one forward pass (it warms up, and synchronises the GPU)."""

    def forward() -> None:
        with torch.inference_mode():
            model(**inputs)

    return benchmark.Timer("forward()", globals={"forward": forward}, num_threads=torch.get_num_threads())


class Race(Mapping):
    """Several models timed in one interleaved run, the baseline among them: name -> speed against the baseline (above 1: faster).

    `rounds` holds the seconds of a pass, a list over rounds per name; `ms` the median milliseconds.
    """

    BASELINE = "baseline"

    def __init__(self, rounds: dict[str, list[float]], batch: int):
        self.rounds, self.batch = rounds, batch
        self.ms = {name: 1e3 * float(np.median(seconds)) for name, seconds in rounds.items()}

    def ratio(self, name: str, over: str = BASELINE) -> Estimate:
        """Time of `over` over the time of `name`, round by round: the median and its interval."""
        return speed_ratio(self.rounds[over], self.rounds[name])

    def __getitem__(self, name: str) -> Estimate:
        return self.ratio(name)

    def __iter__(self) -> Iterator[str]:
        return iter(name for name in self.rounds if name != self.BASELINE)

    def __len__(self) -> int:
        return len(self.rounds) - 1


def race(
    baseline: nn.Module,
    models: dict[str, nn.Module],
    batch: int,
    seconds: float,
    rounds: int,
    length: int = 32,
    rest: float = 0.0,
) -> Race:
    """Time all models and the baseline in turns (see `interleaved_seconds`)."""
    times = interleaved_seconds([baseline, *models.values()], batch, seconds, rounds, length, rest)
    return Race(dict(zip((Race.BASELINE, *models), times, strict=True)), batch)


def speed_ratio(baseline_seconds: list[float], model_seconds: list[float]) -> Estimate:
    """Baseline time over model time, round by round: the median and its interval."""
    return median_interval([b / m for b, m in zip(baseline_seconds, model_seconds, strict=True)])


def interleaved_seconds(
    models: list[nn.Module], batch: int, seconds: float, rounds: int, length: int = 32, rest: float = 0.0
) -> list[list[float]]:
    """Seconds of a forward pass, one list over rounds per model.

    Every round measures all models, each round beginning with the next one, so that a busy machine hurts all of them alike.
    `rest` seconds pass before every turn: take `REST` where an engine with worker threads of its own is among the models.
    """
    inputs = example_inputs(models[0], batch, length, next(models[0].parameters()).device)
    timers = [timer(model, inputs) for model in models]
    times: list[list[float]] = [[] for _ in models]
    with steady_memory():
        for round_number in range(rounds):
            for turn in range(len(models)):
                which = (turn + round_number) % len(models)
                time.sleep(rest)
                times[which].append(timers[which].blocked_autorange(min_run_time=seconds).median)
    return times


def component_seconds(model: nn.Module, inputs: dict, repeats: int = 12) -> dict[str, list[float]]:
    """Seconds per component of one forward pass of a BERT, one value per repeat, from hooks around the modules.

    The attention core has no module: it is what the self-attention module takes beyond its three projections. Two passes warm up.
    """
    spent: dict[str, float] = defaultdict(float)
    handles = [handle for path, module in model.named_modules() if component(path) != "other" and is_timed(path)
               for handle in stopwatch(module, component(path), spent)]  # fmt: skip
    spans: dict[str, list[float]] = defaultdict(list)
    try:
        with torch.inference_mode(), steady_memory():
            for repeat in range(repeats + 2):
                spent.clear()
                model(**inputs)
                spent["attention_core"] -= spent["qkv"]
                for name in COMPONENTS if repeat >= 2 else ():
                    spans[name].append(spent[name])
    finally:
        for handle in handles:
            handle.remove()
    return dict(spans)


def is_timed(path: str) -> bool:
    """Whether a module's time is its component's: the outermost module of each component, not what lies inside it."""
    parent = path.rpartition(".")[0]
    return component(parent) != component(path) or component(path) == "norms"


def stopwatch(module: nn.Module, name: str, spent: dict[str, float]) -> tuple:
    """Hooks that add the seconds of each pass through a module to `spent[name]`; returns their handles."""
    started: list[float] = []
    cuda = next(module.parameters()).is_cuda

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def stop(*_) -> None:
        spent[name] += now() - started.pop()

    return module.register_forward_pre_hook(lambda *_: started.append(now())), module.register_forward_hook(stop)


def peak_memory(model: nn.Module, batch: int = 32, length: int = 32) -> int:
    """Bytes needed for one forward pass: the model's own plus the highest sum of what the pass allocates."""
    device = next(model.parameters()).device
    inputs = example_inputs(model, batch, length, device)

    def forward() -> None:
        with torch.inference_mode():
            model(**inputs)

    return sum(t.untyped_storage().nbytes() for t in _unique_storages(model)) + highest_allocation(forward, device)


def highest_allocation(run: Callable[[], None], device: torch.device) -> int:
    """Bytes: the highest sum of what `run()` has allocated and not freed yet.

    On the CPU the allocations are read from the profiler (scratch space inside matrix kernels is not PyTorch's to see); on
    CUDA from the allocator.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_profiler(), torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = np.cumsum([nbytes for _, nbytes in sorted(events, key=lambda event: event[0])])
    return int(level.max(initial=0))


def _unique_storages(model: nn.Module) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    return list({t.untyped_storage().data_ptr(): t for t in tensors}.values())


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler logs two lines to stderr on each use; learners should not see them."""
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


class EnergyMeter:
    """codecarbon's offline estimate of what a stretch of work draws. Without power counters it models the CPU's rating,
    so it is an estimate by construction and is labelled so wherever it is printed."""

    def __init__(self) -> None:
        self.tracker, self.started = None, time.perf_counter()
        self._starting = threading.Thread(target=self._start, daemon=True)  # it looks for power counters for a second or more
        self._starting.start()

    def _start(self) -> None:
        from codecarbon import OfflineEmissionsTracker, emissions_tracker

        logging.getLogger("codecarbon").disabled = True
        emissions_tracker.get_hierarchical_config = dict  # a user's own settings are for the user's own meters
        with contextlib.suppress(Exception):  # an estimate beside the results must not cost them
            tracker = OfflineEmissionsTracker(
                country_iso_code="USA", save_to_file=False, log_level="critical", measure_power_secs=30, allow_multiple_runs=True
            )
            tracker.start()
            self.tracker, self.started = tracker, time.perf_counter()

    def stop(self) -> dict[str, float | None]:
        """Estimated kilowatt-hours and mean watts since the start; None where the meter did not start."""
        self._starting.join()
        if self.tracker is None:
            return {"energy_kwh_estimate": None, "mean_watts_estimate": None}
        self.tracker.stop()
        kilowatt_hours = float(self.tracker.final_emissions_data.energy_consumed)
        seconds = time.perf_counter() - self.started
        return {"energy_kwh_estimate": kilowatt_hours, "mean_watts_estimate": kilowatt_hours * 3.6e6 / seconds}


def as_row(estimate: Estimate, digits: int = 4) -> list[float]:
    """An estimate's interval, rounded for the board."""
    return [round(estimate.low, digits), round(estimate.high, digits)]


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 1536, seconds: float = 0.5) -> float:
    """Measured FLOP/s of a large square-ish matrix product: the machine's practical ceiling."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    measured = benchmark.Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / measured.blocked_autorange(min_run_time=seconds).median
