"""What a model costs: parameters, multiply-adds, milliseconds, bytes of memory, energy.

Multiply-adds are counted in closed form, because counters cannot be trusted here: on the CPU `FlopCounterMode` sees no
attention at all (`measured_macs` mends that and serves as the check). One multiply-add is two FLOPs.
"""

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from utils.metrics import Estimate, median_interval
from utils.training import steady_memory

LATENCY_BATCHES = (1, 32)
REST = 0.06  # seconds; workers of ONNX Runtime wait busily for 40 ms after their work and hold a core against whoever is next
COMPONENTS = ("embeddings", "qkv", "attention_core", "attention_output", "ffn", "norms", "head")


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters in all, non-zero, and without the embedding block (tied parameters count once)."""
    parameters = list(model.parameters())
    embeddings = sum(p.numel() for p in model.bert.embeddings.parameters())
    total = sum(p.numel() for p in parameters)
    return {
        "parameters": total,
        "nonzero_parameters": sum(int(torch.count_nonzero(p)) for p in parameters),
        "parameters_without_embeddings": total - embeddings,
    }


def macs(model: nn.Module, length: int, batch: int = 1) -> int:
    """Multiply-adds of one forward pass over `batch` sequences of `length` tokens, from the shapes of the modules."""
    return batch * sum(macs_by_component(model, length).values())


def macs_by_component(model: nn.Module, length: int) -> dict[str, int]:
    """Multiply-adds of one sequence per component (`COMPONENTS`). Look-ups and normalisation multiply no matrices.

    A linear layer costs out * in per token; attention costs two products of length * length * (heads * head size).
    """
    count = dict.fromkeys(COMPONENTS, 0)
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        for projection in (attention.query, attention.key, attention.value):
            count["qkv"] += length * _linear_macs(projection)
        count["attention_core"] += 2 * length * length * attention.all_head_size
        count["attention_output"] += length * _linear_macs(layer.attention.output.dense)
        count["ffn"] += length * (_linear_macs(layer.intermediate.dense) + _linear_macs(layer.output.dense))
    count["head"] = _linear_macs(model.bert.pooler) + _linear_macs(model.classifier)
    return count


def parameters_by_component(model: nn.Module) -> dict[str, int]:
    """Parameters (biases included) per component; `norms` are the encoder's LayerNorms, `head` is pooler + classifier."""
    count = dict.fromkeys(COMPONENTS, 0)

    def size(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    count["embeddings"] = size(model.bert.embeddings)
    count["head"] = size(model.bert.pooler, model.classifier)
    for layer in model.bert.encoder.layer:
        attention = layer.attention
        count["qkv"] += size(attention.self.query, attention.self.key, attention.self.value)
        count["attention_output"] += size(attention.output.dense)
        count["ffn"] += size(layer.intermediate.dense, layer.output.dense)
        count["norms"] += size(attention.output.LayerNorm, layer.output.LayerNorm)
    return count


def _linear_macs(module: nn.Module) -> int:
    """Weights of all linear layers inside: each is used once per token. Factorised layers count their factors."""
    return sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))


def measured_macs(model: nn.Module, length: int, batch: int = 1) -> int:
    """Multiply-adds as PyTorch's counter sees them, with the CPU attention kernel it forgets put back in."""
    device = next(model.parameters()).device
    flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    counter = FlopCounterMode(display=False, custom_mapping={flash_cpu: attention_flops})
    with torch.inference_mode(), counter:
        model(**example_inputs(model, batch, length, device))
    return counter.get_total_flops() // 2


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


def latency_ratio(
    baseline: nn.Module, model: nn.Module, batch: int, seconds: float, rounds: int, length: int = 32, rest: float = 0.0
) -> dict:
    """Baseline time over model time (above 1: faster), both measured in turns (see `interleaved_seconds`).

    Returns `ratio` (an Estimate over rounds) and the median milliseconds of each.
    """
    times = interleaved_seconds([baseline, model], batch, seconds, rounds, length, rest)
    return {
        "ratio": speed_ratio(*times),
        "baseline_ms": 1e3 * float(np.median(times[0])),
        "model_ms": 1e3 * float(np.median(times[1])),
    }


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
    """Seconds per component of one forward pass, one value per repeat, from hooks around the modules.

    The attention core has no module: it is what the self-attention module takes beyond its three projections.
    """
    spans: dict[str, list[float]] = defaultdict(list)
    handles = []
    cuda = next(model.parameters()).is_cuda

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(module: nn.Module, component: str) -> None:
        started: list[float] = []
        handles.append(module.register_forward_pre_hook(lambda *_: started.append(now())))
        handles.append(
            module.register_forward_hook(lambda *_: current.__setitem__(component, current[component] + now() - started.pop()))
        )

    watch(model.bert.embeddings, "embeddings")
    watch(model.bert.pooler, "head")
    watch(model.classifier, "head")
    for layer in model.bert.encoder.layer:
        attention = layer.attention
        watch(attention.self, "attention_core")
        for projection in (attention.self.query, attention.self.key, attention.self.value):
            watch(projection, "qkv")
        watch(attention.output.dense, "attention_output")
        watch(attention.output.LayerNorm, "norms")
        watch(layer.intermediate, "ffn")
        watch(layer.output.dense, "ffn")
        watch(layer.output.LayerNorm, "norms")
    try:
        with torch.inference_mode(), steady_memory():
            for repeat in range(repeats + 2):
                current: dict[str, float] = defaultdict(float)
                model(**inputs)
                current["attention_core"] -= current["qkv"]
                if repeat >= 2:  # two passes warm up
                    for component in COMPONENTS:
                        spans[component].append(current[component])
    finally:
        for handle in handles:
            handle.remove()
    return dict(spans)


def peak_memory(model: nn.Module, batch: int = 32, length: int = 32) -> int:
    """Bytes needed for one forward pass: the model's own plus the highest sum of what the pass allocates.

    On the CPU the allocations are read from the profiler (scratch space inside matrix kernels is not PyTorch's to see); on
    CUDA from the allocator.
    """
    device = next(model.parameters()).device
    inputs = example_inputs(model, batch, length, device)
    own = sum(t.untyped_storage().nbytes() for t in _unique_storages(model))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            model(**inputs)
        return own + torch.cuda.max_memory_allocated() - before
    with _quiet_profiler(), torch.profiler.profile(profile_memory=True) as profile, torch.inference_mode():
        model(**inputs)
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = np.cumsum([nbytes for _, nbytes in sorted(events, key=lambda event: event[0])])
    return own + int(level.max(initial=0))


def _unique_storages(model: nn.Module) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    return list({t.untyped_storage().data_ptr(): t for t in tensors}.values())


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler logs two lines to stderr on each use; learners should not see them."""
    import os

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
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").disabled = True
        tracker = OfflineEmissionsTracker(
            country_iso_code="USA", save_to_file=False, log_level="critical", measure_power_secs=30, allow_multiple_runs=True
        )
        tracker.start()
        self.tracker, self.started = tracker, time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Estimated kilowatt-hours and mean watts since the start."""
        self._starting.join()
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
