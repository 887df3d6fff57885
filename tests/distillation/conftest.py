"""Fixtures of the tests of distillation: a small teacher, a smaller student, a task, and a cache of each test's own."""

import pytest
import torch
from small_distillation import make_bert, make_task

from utils import training


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """Loops written out by hand compute in float32; a machine that multiplies bfloat16 would compare roundings with them."""
    monkeypatch.setattr(training, "compute_dtype", lambda device: torch.float32)


@pytest.fixture
def teacher_model():
    return make_bert(4)


@pytest.fixture
def student_model():
    return make_bert(2, seed=1)


@pytest.fixture
def task():
    return make_task()
