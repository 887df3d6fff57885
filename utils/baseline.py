"""The model that every method starts from: BERT, fine-tuned once per (model, data, profile, seed, code), then cached."""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_model, save_file
from torch import nn

from utils import bert, cache, tasks, training
from utils.profiles import Profile, compute_dtype
from utils.tasks import Task


@dataclass
class Baseline:
    """The fine-tuned model (never change it: take `bert.fresh_copy`), its validation logits, and what training it cost."""

    model: nn.Module
    logits: torch.Tensor  # (validation examples, classes)
    train_seconds: float
    train_tokens: int
    losses: list[float]  # one per step
    from_cache: bool


def fine_tuned(model_name: str, task: Task, profile: Profile, seed: int, device: torch.device) -> Baseline:
    """Fine-tune, or read from the cache, the baseline. Parallel callers train it once."""
    pretrained = bert.load(model_name, task.num_labels, profile.num_layers)
    built_here = []

    def build(folder: Path) -> None:
        built_here.append(True)
        _fine_tune(pretrained.to(device), task, profile, seed, folder)

    folder = cache.once("baseline", _key(pretrained, task, profile, seed, device), build)
    facts = json.loads((folder / "facts.json").read_text())
    model = pretrained.cpu()
    load_model(model, folder / "model.safetensors")
    model.to(device).eval()
    # Predicted anew rather than cached, so that every logit on the board comes from this process on this machine.
    logits = training.predict(model, task.validation, task.tokenizer.pad_token_id)
    return Baseline(model, logits, facts["seconds"], facts["tokens"], facts["losses"], not built_here)


def _fine_tune(model: nn.Module, task: Task, profile: Profile, seed: int, folder: Path) -> None:
    log = training.train(model, task, profile, steps=profile.baseline_steps, learning_rate=profile.baseline_learning_rate,
                         seed=seed, train_embeddings=True)  # fmt: skip
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    facts = {"seconds": log.seconds, "tokens": log.tokens, "steps": log.steps, "losses": log.losses}
    (folder / "facts.json").write_text(json.dumps(facts))


def _key(pretrained: nn.Module, task: Task, profile: Profile, seed: int, device: torch.device) -> str:
    used = ("batch_size", "baseline_steps", "baseline_learning_rate")
    return cache.key({
        "weights": bert.fingerprint(pretrained),
        "data": task.key,
        "profile": {f.name: getattr(profile, f.name) for f in fields(profile) if f.name in used},
        "seed": seed,
        "device": device.type,
        "dtype": compute_dtype(device),
        "torch": torch.__version__,
        "code": cache.source_hash(training, tasks, sys.modules[__name__]),
    })  # fmt: skip
