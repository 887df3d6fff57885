"""Small, deterministic fixtures: a tiny BERT, a tiny task, and a cache of the test run's own."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 2,
}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers: a file's tests stay together (they share what they set up) but for groups of their own, and slow ones begin."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _float32():
    """Oracles compute in float32; on a machine that multiplies bfloat16 a test would compare roundings with them."""
    from utils import training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "compute_dtype", lambda device: torch.float32)
        yield


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> BertForSequenceClassification:
    """A BERT of 2 layers, hidden 32, 4 heads, with random weights."""
    return BertForSequenceClassification(BertConfig(**TINY)).eval()


@pytest.fixture
def batch() -> dict:
    """Four sequences of up to 9 tokens, with padding."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 100, (4, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, length in enumerate((9, 7, 5, 9)):
        attention_mask[row, length:] = 0
        input_ids[row, length:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": torch.tensor([0, 1, 0, 1])}


@pytest.fixture(scope="session")
def run_cache(tmp_path_factory) -> str:
    """A cache folder that the tests of one session share, so that the smoke baseline is trained once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def board(run_cache, tmp_path_factory):
    """A board on the embedded model and data in the smoke profile."""
    from utils.board import Board

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_CACHE", run_cache)
        patch.setenv("COMPANION_OUT", str(tmp_path_factory.mktemp("out")))
        opened = Board.open("01_pruning", "smoke")
        yield opened
        content = json.loads(
            opened.close().read_text()
        )  # closing must write a readable file, whatever the tests put on the board
        assert content["chapter"] == "01_pruning"
