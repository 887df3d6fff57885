"""The model that every method starts from: BERT, fine-tuned once per (model, data, profile, seed, code), then cached."""

import json
import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from utils import CompanionError, bert, cache, checkpoints, metrics, tasks, training
from utils.profiles import Profile
from utils.tasks import Task

TOO_MANY_UNKNOWN = 0.5  # share of the texts' word pieces that the tokenizer does not know


@dataclass
class Baseline:
    """The fine-tuned model (never change it: take `bert.fresh_copy`), its validation logits, and what training it cost."""

    model: nn.Module
    logits: torch.Tensor  # (validation examples, classes)
    train_seconds: float
    train_tokens: int
    losses: list[float]  # one per step
    from_cache: bool
    key: str  # names everything that it was made from
    notes: list[str] = field(default_factory=list)  # what a user should know about it, a line each


class Phase(NamedTuple):
    """One piece of training: `seed` orders its batches, so a control that repeats the phase sees the same ones."""

    steps: int
    learning_rate: float
    train_embeddings: bool
    seed: int
    hold: int = 0


def fine_tuned(model_name: str, task: Task, profile: Profile, seed: int, device: torch.device) -> Baseline:
    """Fine-tune, or read from the cache, the baseline. Parallel callers train it once.

    Raises CompanionError for a model that cannot be read, one that does not know the words of the task, and one that training broke
    or taught nothing.
    """
    notes = bert.notes(model_name, task.num_labels)
    _refuse_unknown_words(model_name, task)
    pretrained = bert.load(model_name, task.num_labels, profile.num_layers, task.vocabulary, profile.neurons)
    built_here = []

    def build(folder: Path) -> None:
        built_here.append(True)
        _fine_tune(pretrained.to(device), task, profile, seed, folder)

    key = _key(pretrained, task, profile, seed, device)
    folder = cache.once("baseline", key, build, notes.append)
    facts = json.loads((folder / "facts.json").read_text())
    model = pretrained.cpu()
    load_model(model, folder / "model.safetensors")
    model.to(device).eval()
    # Predicted anew rather than cached, so that every logit on the board comes from this process on this machine.
    logits = training.predict(model, task.validation, task.tokenizer.pad_token_id)
    _refuse_unless_finite(logits, f"the baseline predicts numbers that are not finite on {task.name}")
    return Baseline(model, logits, facts["seconds"], facts["tokens"], facts["losses"], not built_here, key, notes)


def _refuse_unknown_words(model_name: str, task: Task) -> None:
    """Raise CompanionError where the tokenizer does not know most pieces of the texts (of fewer, `Task.notes` tells)."""
    unknown = getattr(task.tokenizer, "unk_token_id", None)
    rows = task.train.input_ids
    share = sum(ids.count(unknown) for ids in rows) / max(1, sum(len(ids) - 2 for ids in rows))  # but for [CLS] and [SEP]
    if share > TOO_MANY_UNKNOWN:
        raise CompanionError(
            f"{100 * share:.0f} % of the word pieces of {task.name} are unknown to the tokenizer of model {model_name!r}: "
            "take a model for this language and script, with the tokenizer that belongs to it"
        )


def dense_control(baseline: Baseline, phases: tuple[Phase, ...], task: Task, profile: Profile) -> torch.Tensor:
    """Validation logits of the uncompressed model after the training that a method had, phase by phase; cached."""
    return label_control(baseline.model, baseline.key, phases, task, profile)


def label_control(start: nn.Module, key: str, phases: tuple[Phase, ...], task: Task, profile: Profile) -> torch.Tensor:
    """Validation logits of `start` after the same phases of training on labels alone; cached under `key`, which names the start
    (`bert.fingerprint`).

    Without it nobody could tell what a method did from what its training did. Raises CompanionError where that training diverged.
    """

    def build(folder: Path) -> None:
        model = bert.fresh_copy(start)
        for phase in phases:
            training.train(model, task, profile, **phase._asdict())
        logits = training.predict(model, task.validation, task.tokenizer.pad_token_id)
        _refuse_unless_finite(logits, f"training the control on {task.name} gave numbers that are not finite")
        save_file({"logits": logits}, folder / "logits.safetensors")

    device = next(start.parameters()).device
    sizes = {"start": key, "task": task.key, "phases": phases, "batch_size": profile.batch_size, "device": device.type,
             "dtype": training.compute_dtype(device), "torch": torch.__version__,
             "code": cache.source_hash(training, tasks, bert, sys.modules[__name__])}  # fmt: skip
    folder = cache.once("control", cache.key(sizes), build)
    return load_file(folder / "logits.safetensors")["logits"]


def _fine_tune(model: nn.Module, task: Task, profile: Profile, seed: int, folder: Path) -> None:
    log = training.train(model, task, profile, steps=profile.baseline_steps, learning_rate=profile.baseline_learning_rate,
                         seed=seed, train_embeddings=True)  # fmt: skip
    broken = [step for step, loss in enumerate(log.losses, 1) if not math.isfinite(loss)]
    if broken or not all(map(checkpoints.is_finite, model.parameters())):
        raise CompanionError(
            f"training the baseline on {task.name} gave numbers that are not finite"
            f"{f' from step {broken[0]} of {log.steps}' if broken else ''}, at rate {profile.baseline_learning_rate:g}: "
            "another model or a lower rate (utils/profiles.py) may help"
        )
    if profile.name != "smoke":
        _refuse_if_nothing_learned(model, task, profile)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    facts = {"seconds": log.seconds, "tokens": log.tokens, "steps": log.steps, "losses": log.losses}
    (folder / "facts.json").write_text(json.dumps(facts))


def _refuse_unless_finite(logits: torch.Tensor, told: str) -> None:
    if not checkpoints.is_finite(logits):
        raise CompanionError(f"{told}: another model or a lower rate (utils/profiles.py) may help")


def _refuse_if_nothing_learned(model: nn.Module, task: Task, profile: Profile) -> None:
    """Raise CompanionError where accuracy cannot be told from always answering the most frequent label."""
    found = metrics.accuracy(training.predict(model, task.validation, task.tokenizer.pad_token_id), task.validation.labels)
    if found.low <= task.majority_accuracy():
        raise CompanionError(
            f"the baseline learned nothing: after {profile.baseline_steps} steps of {profile.batch_size} sentences at rate "
            f"{profile.baseline_learning_rate:g} on {len(task.train)} sentences of {task.name} its accuracy is "
            f"{100 * found.value:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}], and the most frequent label alone gives "
            f"{100 * task.majority_accuracy():.1f} %. More data, more steps or another rate (utils/profiles.py) may help"
        )


def _key(pretrained: nn.Module, task: Task, profile: Profile, seed: int, device: torch.device) -> str:
    used = ("batch_size", "baseline_steps", "baseline_learning_rate")
    return cache.key({
        "weights": bert.fingerprint(pretrained),
        "data": task.key,
        "profile": {f.name: getattr(profile, f.name) for f in fields(profile) if f.name in used},
        "seed": seed,
        "device": device.type,
        "dtype": training.compute_dtype(device),
        "torch": torch.__version__,
        "code": cache.source_hash(training, tasks, bert, checkpoints, sys.modules[__name__]),
    })  # fmt: skip
