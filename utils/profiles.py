"""Every size, step count and seed of the suite, in one table.

A profile fixes how much work a chapter does, never on which device. `smoke` proves that everything runs (its numbers mean
nothing), `cpu` is the classroom: one seed, and a recovery of a third of an epoch. `full` gives the verdicts of record: longer
trainings, and five seeds of every comparison, in what two cores with bfloat16 do in an hour and a half a chapter. `gpu` goes on from
there on CUDA, where time is no limit: recoveries of an epoch and more, and longer texts.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from utils import CompanionError

if TYPE_CHECKING:  # the command looks a name up here, and need not wait for torch
    import torch


LATENCY_BATCHES = (1, 32)


@dataclass(frozen=True)
class Profile:
    """Sizes and budgets of one profile. Steps are optimiser steps, sizes are sentences, lengths are tokens."""

    name: str
    num_layers: int | None  # the model's first layers, where all would only take time; None: all
    vocabulary: int | None  # word pieces that are left of the model's, where all would only make every file large; None: all
    neurons: int | None  # feed-forward neurons that are left of each layer; None: all
    train_size: int | None  # None: all
    validation_size: int | None
    max_length: int
    batch_size: int
    baseline_steps: int
    baseline_learning_rate: float
    recovery_steps: int  # the one budget that every method gets after (or while) it compresses
    recovery_learning_rate: float  # leaves the dense model unharmed (chapter 00 shows the experiment)
    few_bits_learning_rate: float  # of one- and two-bit weights, whose signs stand still at the rate above
    student_steps: int  # training of a student (chapter 03): an epoch or more
    student_learning_rate: float
    language_steps: int  # masked language modelling of a small head or student (chapter 03)
    unlabelled_size: int  # sentences without labels (chapter 03)
    claim_steps: int  # recovery budget inside a claim that repeats trainings over seeds
    student_claim_steps: int  # the same of a student, which begins at the floor and must leave it before two arms can differ
    seeds: tuple[int, ...]  # the unit of every claim that compares trainings
    calibration_size: int  # sentences that a method may look at to score weights
    selection_size: int  # training sentences that nobody trains on, for every choice and for maps with an evaluation per cell
    sparsities: tuple[float, ...]  # grid of the accuracy-over-sparsity curves
    lengths: tuple[int, ...]  # token lengths of the cost breakdown
    latency_seconds: float  # measuring time per model, batch size and round
    latency_length: int  # tokens per sentence in every timing
    latency_rounds: int  # interleaved rounds: baseline, model, baseline, model, ...
    latency_batches: tuple[int, int] = LATENCY_BATCHES  # sentences a pass, the fewer first


PROFILES = {
    "smoke": Profile(
        name="smoke", num_layers=2, vocabulary=2000, neurons=576, train_size=96, validation_size=32, max_length=16, batch_size=8,
        baseline_steps=6, baseline_learning_rate=2e-4, recovery_steps=2, recovery_learning_rate=1e-4, few_bits_learning_rate=3e-4,
        student_steps=2, student_learning_rate=2e-4, language_steps=2, unlabelled_size=16,
        claim_steps=2, student_claim_steps=2, seeds=(0,), calibration_size=8, selection_size=8, sparsities=(0.0, 0.5),
        lengths=(32, 64), latency_seconds=0.005, latency_length=4, latency_rounds=1,
    ),
    "cpu": Profile(
        name="cpu", num_layers=None, vocabulary=None, neurons=None, train_size=None, validation_size=None, max_length=64, batch_size=32,
        baseline_steps=400, baseline_learning_rate=1e-4, recovery_steps=60, recovery_learning_rate=5e-5, few_bits_learning_rate=3e-4,
        student_steps=200, student_learning_rate=2e-4, language_steps=300, unlabelled_size=4000,
        claim_steps=30, student_claim_steps=30, seeds=(0,), calibration_size=256, selection_size=512,
        sparsities=(0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        lengths=(32, 128, 256, 512), latency_seconds=0.06, latency_length=32, latency_rounds=3,
    ),
    "full": Profile(
        name="full", num_layers=None, vocabulary=None, neurons=None, train_size=None, validation_size=None, max_length=64, batch_size=32,
        baseline_steps=400, baseline_learning_rate=1e-4, recovery_steps=80, recovery_learning_rate=5e-5, few_bits_learning_rate=3e-4,
        student_steps=250, student_learning_rate=2e-4, language_steps=400, unlabelled_size=6000,
        claim_steps=60, student_claim_steps=120, seeds=(0, 1, 2, 3, 4), calibration_size=512, selection_size=512,
        sparsities=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        lengths=(32, 128, 256, 512), latency_seconds=0.2, latency_length=32, latency_rounds=5,
    ),
}  # fmt: skip


PROFILES["gpu"] = replace(
    PROFILES["full"], name="gpu", max_length=128, recovery_steps=300, recovery_learning_rate=1e-4, claim_steps=300,
    student_claim_steps=300, student_steps=600, language_steps=1500, unlabelled_size=12000,
)  # fmt: skip


DOCUMENTS = {  # what differs for documents (chapter 06): a step of 8 texts of 512 tokens costs five of 32 sentences
    "smoke": {"max_length": 48, "latency_length": 16, "latency_batches": (1, 2)},
    "cpu": {
        "max_length": 512, "batch_size": 8, "train_size": 6000, "validation_size": 400, "baseline_steps": 200,
        "recovery_steps": 50, "claim_steps": 50, "calibration_size": 160, "selection_size": 128,
        "latency_length": 512, "latency_batches": (1, 4), "latency_rounds": 2,
    },
    "full": {
        "max_length": 512, "batch_size": 8, "validation_size": 800, "baseline_steps": 300,
        "recovery_steps": 80, "claim_steps": 60, "calibration_size": 320, "selection_size": 256,
        "latency_length": 512, "latency_batches": (1, 4), "latency_rounds": 3,
    },
    "gpu": {
        "max_length": 512, "batch_size": 16, "validation_size": 2000, "baseline_steps": 600,
        "recovery_steps": 150, "claim_steps": 100, "calibration_size": 320, "selection_size": 256,
        "latency_length": 512, "latency_batches": (1, 4), "latency_rounds": 3,
    },
}  # fmt: skip


def get(name: str, documents: bool = False) -> Profile:
    """Look a profile up, or its like for texts of hundreds of tokens. Raises CompanionError for an unknown name."""
    if name not in PROFILES:
        raise CompanionError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    return replace(PROFILES[name], **DOCUMENTS[name]) if documents else PROFILES[name]


def pick_device(name: str = "auto", profile: str = "cpu") -> "torch.device":
    """Turn `auto`, `cpu` or `cuda` into a device. Raises CompanionError where CUDA is asked for (the `gpu` profile does) and absent."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise CompanionError(f"unknown device {name!r}: choose auto, cpu or cuda")
    name = "cuda" if profile == "gpu" and name == "auto" else name
    if name == "cuda" and not torch.cuda.is_available():
        raise CompanionError("device cuda asked for, but PyTorch sees no CUDA GPU: use --device cpu, or install a CUDA build")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def compute_dtype(device: "torch.device") -> "torch.dtype":
    """bfloat16 where the hardware multiplies it natively, else float32. The results file records which it was."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return torch.bfloat16 if native else torch.float32
