"""A small teacher, a smaller student, and a task of two dozen sentences, so that trainings take a moment."""

from dataclasses import replace
from types import SimpleNamespace

import datasets
import torch
from transformers import BertConfig, BertForSequenceClassification

from utils import profiles
from utils.tasks import Split, Task, collate
from utils.trials import Trial

SIZES = {"vocab_size": 100, "num_attention_heads": 4, "intermediate_size": 48, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}  # fmt: skip


def make_bert(
    num_layers: int, hidden_size: int = 32, num_labels: int = 3, seed: int = 0, **changes
) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        **(SIZES | {"num_hidden_layers": num_layers, "hidden_size": hidden_size, "num_labels": num_labels} | changes)
    )
    return BertForSequenceClassification(config).eval()


def make_split(count: int, classes: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(1, 100, (int(torch.randint(3, 12, (), generator=generator)),), generator=generator).tolist()
        for _ in range(count)
    ]
    labels = torch.arange(count) % classes
    data = datasets.Dataset.from_dict({"text": [str(one) for one in ids], "label": labels.tolist()})
    return Split(data, ids, labels)


def make_task(classes: int = 3, count: int = 24) -> Task:
    splits = [make_split(size, classes, seed) for seed, size in enumerate((count, 9, 9))]
    return Task(
        "random", *splits, [f"class {k}" for k in range(classes)], SimpleNamespace(pad_token_id=0), f"random-{classes}-{count}"
    )


def make_trial(model: torch.nn.Module, task: Task, seed: int = 0) -> Trial:
    profile = replace(profiles.get("smoke"), batch_size=8)
    return Trial(model, task, profile, seed, from_baseline=False)


def first_batch(task: Task, count: int = 8) -> dict:
    return collate(task.train, torch.arange(count).numpy(), 0)
