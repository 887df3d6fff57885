"""Fixtures of the tests of distillation: a small teacher, a smaller student, a task, and a cache of each test's own."""

import pytest
from small_distillation import make_bert, make_task


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def teacher_model():
    return make_bert(4)


@pytest.fixture
def student_model():
    return make_bert(2, seed=1)


@pytest.fixture
def task():
    return make_task()
