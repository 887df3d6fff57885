"""One training loop for every method, and one way to predict.

The loop is AdamW with linear warm-up and decay. A method hooks in with a loss of its own, with a penalty, or with a
function that runs after each optimiser step (to move a mask, take a proximal step, clip a weight).
"""

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable
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
EAGER_LENGTH = 64  # tokens up to which plain attention products predict a tenth faster on a CPU than the fused kernel


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
    loss: Loss = cross_entropy,
    after_step: AfterStep | None = None,
    train_embeddings: bool = False,
    parameters: list[dict] | None = None,
) -> TrainingLog:
    """Train in place for a number of optimiser steps (default: the profile's recovery budget).

    `seed` orders the batches. `loss(model, batch)` returns a scalar; `after_step(step, model, optimizer)` runs after
    step 1, 2, ... Embeddings stay frozen unless asked for: on a task this small nothing is lost and a quarter of the step is
    saved. `parameters` replaces the optimiser's parameter groups (it may hold extra ones with their own `lr`).
    """
    steps = profile.recovery_steps if steps is None else steps
    learning_rate = learning_rate or profile.recovery_learning_rate
    device = next(model.parameters()).device
    frozen = [] if train_embeddings else [p for p in model.bert.embeddings.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    groups = parameters or [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    warmup = max(1, round(WARMUP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, (steps - i) / max(1, steps - warmup)))
    log = TrainingLog(0.0, steps, 0, [])
    torch.manual_seed(seed)
    start = time.perf_counter()
    model.train()
    # The CPU kernel behind scaled_dot_product_attention is slow backwards in bfloat16; the eager product is not.
    with bert.attention(model, "eager" if device.type == "cpu" else "sdpa"), steady_memory():
        for step, batch in enumerate(
            endless_batches(task.train, profile.batch_size, task.tokenizer.pad_token_id, seed, steps), 1
        ):
            batch = to_device(batch, device)
            with autocast(device):
                value = loss(model, batch)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if after_step is not None:
                after_step(step, model, optimizer)  # before the schedule moves on: a proximal step needs this step's rate
            schedule.step()
            log.tokens += batch["input_ids"].numel()
            log.losses.append(value.item())
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    log.seconds = time.perf_counter() - start
    return log


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
    implementation = model.config._attn_implementation
    if device.type == "cpu" and implementation == "sdpa" and max(map(len, split.input_ids)) <= EAGER_LENGTH:
        implementation = "eager"
    logits = torch.empty(len(split), model.config.num_labels)
    model.eval()
    with torch.inference_mode(), steady_memory(), autocast(device, dtype), bert.attention(model, implementation):
        for batch in batches(split, batch_size, pad_token_id):
            inputs = to_device(batch, device)
            out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            logits[torch.as_tensor(batch["rows"])] = out.float().cpu()
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
