"""A task of the few sentences of a batch."""

from types import SimpleNamespace

from utils.tasks import Split, Task


def task_of(batch: dict, name: str = "made up") -> Task:
    """Trains, validates and selects on the sentences of the batch, without their padding."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    split = Split(None, rows, batch["labels"])
    return Task(name, split, split, split, ["no", "yes"], SimpleNamespace(pad_token_id=0), name)
