"""How fast this machine trains and infers: the numbers behind `companion bench`."""

import time
from collections.abc import Callable
from typing import Any


def measure(device: str = "auto", steps: int = 30) -> dict:
    """Matrix products, `steps` of training and inference in GFLOP/s, and the seconds of each stage, as JSON values.

    bfloat16 is measured only where it is native: emulated, one product takes many seconds and says nothing.
    """
    started = time.perf_counter()
    import torch

    from utils import bert, costs, profiles, results, tasks, training

    seconds = {"import": time.perf_counter() - started}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        seconds[name] = time.perf_counter() - start
        return found

    where, profile = profiles.pick_device(device), profiles.get("cpu")
    task = timed("data", lambda: tasks.load("rotten_tomatoes", bert.load_tokenizer(), profile))
    model = timed("model", lambda: bert.load().to(where))
    native = profiles.compute_dtype(where)
    types = {"fp32": torch.float32, **({"bf16": native} if native == torch.bfloat16 else {})}
    rates = timed("matmul", lambda: {name: costs.matmul_rate(dtype, where) for name, dtype in types.items()})
    ceiling, trained = rates.get("bf16", rates["fp32"]), f"{steps} training steps"
    training.train(model, task, profile, steps=min(steps, 5))
    timed(trained, lambda: training.train(model, task, profile, steps=steps))
    timed("inference on validation", lambda: training.predict(model, task.validation, 0))
    inferred = 2 * sum(costs.macs(model, len(ids)) for ids in task.validation.input_ids)
    train_rate = training_flops(model, task, profile, steps) / seconds[trained]
    infer_rate = inferred / seconds["inference on validation"]
    return {
        "machine": results.machine_name(results.machine(where)),
        "device": str(where),
        "threads": torch.get_num_threads(),
        "matmul_gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "training_step": {"milliseconds": round(1e3 * seconds[trained] / steps, 1), "gflops": round(train_rate / 1e9, 1),
                          "share_of_matmul_rate": round(train_rate / ceiling, 3)},
        "inference": {"gflops": round(infer_rate / 1e9, 1), "share_of_matmul_rate": round(infer_rate / ceiling, 3)},
        "stage_seconds": {name: round(value, 2) for name, value in seconds.items()},
    }  # fmt: skip


def training_flops(model: Any, task: Any, profile: Any, steps: int) -> float:
    """FLOPs of a training run as executed, padding included: forward once, backward twice (embeddings are frozen)."""
    from utils import costs, training

    stream = training.endless_batches(task.train, profile.batch_size, task.tokenizer.pad_token_id, 0, steps)
    return 6 * sum(costs.macs(model, batch["input_ids"].shape[1], len(batch["rows"])) for batch in stream)
