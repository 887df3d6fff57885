"""One training loop for every method, and one way to predict.

The loop is AdamW with linear warm-up and decay. A method hooks in with a loss of its own, with a penalty, or with a
function that runs after each optimiser step (to move a mask, take a proximal step, clip a weight).
"""

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from utils import bert
from utils.profiles import Profile, compute_dtype
from utils.tasks import Split, Task, batches

Loss = Callable[[nn.Module, dict], torch.Tensor]
AfterStep = Callable[[int, nn.Module, torch.optim.Optimizer], None]
WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
EAGER_LENGTH = 64  # tokens up to which plain attention products are faster on a CPU than the fused kernel, forwards and backwards


@dataclass
class TrainingLog:
    """What a training run cost and how its loss went. `seconds` is wall time, `tokens` counts padding too."""

    seconds: float
    steps: int
    tokens: int
    losses: list[float]


def cross_entropy(model: nn.Module, batch: dict) -> torch.Tensor:
    """The task loss: mean cross-entropy of the logits against the labels."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits.float(), batch["labels"])


def train(
    model: nn.Module,
    task: Task,
    profile: Profile,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    hold: int = 0,
    loss: Loss = cross_entropy,
    after_step: AfterStep | None = None,
    train_embeddings: bool = False,
    parameters: list[dict] | None = None,
) -> TrainingLog:
    """Train in place for a number of optimiser steps (default: the profile's recovery budget).

    `seed` orders the batches. The rate stays at its height until step `hold`, a method's last change, and decays after it: so
    a gradual method trains after its last change as much as a one-shot method does. `loss(model, batch)` returns a scalar;
    `after_step(step, model, optimizer)` runs after step 1, 2, ... Embeddings stay frozen unless asked for: on a task this small
    nothing is lost and a quarter of the step is saved. `parameters` replaces the optimiser's parameter groups (it may hold
    extra ones with their own `lr`).
    """
    steps = profile.recovery_steps if steps is None else steps
    learning_rate = learning_rate or profile.recovery_learning_rate
    device = next(model.parameters()).device
    log = TrainingLog(0.0, steps, 0, [])
    start = time.perf_counter()
    torch.manual_seed(seed)
    with (
        frozen_embeddings(model, not train_embeddings),
        _fastest_attention(model, task.train),
        steady_memory(),
        training_mode(model),
    ):
        optimizer, schedule = make_optimizer(model, steps, learning_rate, parameters, hold)
        for step, batch in enumerate(
            endless_batches(task.train, profile.batch_size, task.tokenizer.pad_token_id, seed, steps), 1
        ):
            log.losses.append(optimizer_step(model, to_device(batch, device), loss, optimizer))
            log.tokens += batch["input_ids"].numel()
            if after_step is not None:
                after_step(step, model, optimizer)  # before the schedule moves on: a proximal step needs this step's rate
            schedule.step()
    log.seconds = time.perf_counter() - start
    return log


def _fastest_attention(model: nn.Module, split: Split) -> contextlib.AbstractContextManager:
    """Of two kernels of the stock attention the faster one for these texts on this device; an attention of its own stays."""
    short = next(model.parameters()).device.type == "cpu" and max(map(len, split.input_ids)) <= EAGER_LENGTH
    return bert.fastest_attention(model, "eager" if short else "sdpa")


def make_optimizer(
    model: nn.Module, steps: int, learning_rate: float, parameters: list[dict] | None = None, hold: int = 0
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over whatever may change (or the given groups): linear warm-up, the full rate until step `hold`, linear decay.

    Raises ValueError where nothing would be left for the decay.
    """
    if not 0 <= hold < max(1, steps):
        raise ValueError(f"hold must be at least 0 and below steps ({steps}), got {hold}: the rate needs steps to decay in")
    groups = parameters or [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    warmup = max(1, round(WARMUP_SHARE * (steps - hold)))
    falls = max(hold, warmup)  # the step after which the rate decays
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 1.0, (steps - i) / max(1, steps - falls))
    )
    return optimizer, schedule


def optimizer_step(model: nn.Module, batch: dict, loss: Loss, optimizer: torch.optim.Optimizer) -> float:
    """One step on one batch; returns its loss. The model's gradient is clipped, as BERT's authors do: without it long texts
    at 2e-4 never leave the first loss. A parameter that the optimiser does not hold has no part in the norm: nothing clears its
    gradient, which would grow from step to step and shrink everybody else's."""
    with autocast(batch["input_ids"].device):
        value = loss(model, batch)
    value.backward()
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    nn.utils.clip_grad_norm_([parameter for parameter in model.parameters() if parameter in held], CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.item()


@contextlib.contextmanager
def frozen_embeddings(model: nn.Module, frozen: bool = True) -> Iterator[None]:
    """Embeddings take no gradient inside the block: on a task this small nothing is lost and a quarter of the step is saved."""
    held = [p for p in bert.embeddings(model).parameters() if frozen and p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode inside the block, evaluation mode after it."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def endless_batches(split: Split, batch_size: int, pad_token_id: int, seed: int, steps: int):
    """Yield exactly `steps` shuffled batches, starting a new epoch with a new order when the data runs out."""
    done = 0
    epoch = 0
    while done < steps:
        for batch in batches(split, batch_size, pad_token_id, seed=1000 * seed + epoch):
            if done == steps:
                return
            done += 1
            yield batch
        epoch += 1


def predict(
    model: nn.Module, split: Split, pad_token_id: int, batch_size: int = 64, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Logits of shape (examples, classes), float32, on the CPU, in the order of the split.

    `dtype` is the precision of the matrix products: by default bfloat16 where the hardware has it.
    """
    device = next(model.parameters()).device
    rows, found = [], []
    model.eval()
    with torch.inference_mode(), steady_memory(), autocast(device, dtype), _fastest_attention(model, split):
        for batch in batches(split, batch_size, pad_token_id):
            inputs = to_device(batch, device)
            found.append(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float().cpu())
            rows.append(torch.as_tensor(batch["rows"]))
    logits = torch.cat(found)
    logits[torch.cat(rows)] = logits.clone()
    return logits


def calibration_batches(task: Task, profile: Profile, device: torch.device, seed: int = 0) -> list[dict]:
    """A fixed random sample of training sentences, for methods that score weights on data."""
    batch_size = min(profile.batch_size, profile.calibration_size)
    count = profile.calibration_size // batch_size
    stream = endless_batches(task.train, batch_size, task.tokenizer.pad_token_id, 10_000 + seed, count)
    return [to_device(batch, device) for batch in stream]


def check_batches(batches: list[dict]) -> None:
    """Raise ValueError where there is nothing to calibrate on."""
    if not batches:
        raise ValueError("no calibration batches: at least one is needed (see utils.training.calibration_batches)")


def to_device(batch: dict, device: torch.device) -> dict:
    """Move the tensors of a batch."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def autocast(device: torch.device, dtype: torch.dtype | None = None) -> contextlib.AbstractContextManager:
    """Mixed precision in the given (default: the hardware's) type; float32 means none."""
    dtype = dtype or compute_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def steady_memory():
    """Keep freed blocks inside the process: on Linux a quarter of a CPU step goes into page faults otherwise."""
    if sys.platform == "linux" and not steady_memory.done:
        steady_memory.done = True
        mmap_threshold, trim_threshold = -3, -1  # glibc's mallopt(3)
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(mmap_threshold, 1 << 30)
            libc.mallopt(trim_threshold, (1 << 31) - 1)
    yield


steady_memory.done = False
