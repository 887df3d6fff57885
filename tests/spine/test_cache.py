"""What is cached is what was computed: damage is found and mended, keys tell computations apart, and a full disk is said to be one."""

import json
import os
import pwd
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_task import task_of

from utils import CompanionError, cache, profiles, training
from utils.baseline import Phase, fine_tuned, label_control

CPU = torch.device("cpu")
SMALL = replace(profiles.get("smoke"), baseline_steps=2, batch_size=2)
PHASES = (Phase(1, 1e-4, False, 0),)


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def opened(folder, batch):
    """`opened()` fine-tunes the small model, or reads it from the cache."""
    return lambda model=folder, task=None: fine_tuned(str(model), task or task_of(batch), SMALL, 0, CPU)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": lambda made: flip(made / "model.safetensors"),
    "a flipped bit in the facts": lambda made: flip(made / "facts.json"),
    "truncated weights": lambda made: (made / "model.safetensors").write_bytes((made / "model.safetensors").read_bytes()[:9000]),
    "empty weights": lambda made: (made / "model.safetensors").write_bytes(b""),
    "no weights": lambda made: (made / "model.safetensors").unlink(),
    "no facts": lambda made: (made / "facts.json").unlink(),
    "empty facts": lambda made: (made / "facts.json").write_text(""),
    "other facts": lambda made: (made / "facts.json").write_text('{"seconds": 0}'),
    "no manifest": lambda made: (made / "manifest.json").unlink(),
    "a manifest that is none": lambda made: (made / "manifest.json").write_text("[1]"),
    "a manifest of nothing": lambda made: (made / "manifest.json").write_text("{}"),
    "a manifest cut short": lambda made: (made / "manifest.json").write_text('{"model.safe'),
    "an empty folder": lambda made: [path.unlink() for path in made.iterdir()],
    "a file in place of the folder": lambda made: (shutil.rmtree(made), made.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_no_damage_escapes(own, damage):
    def build(folder):
        (folder / "model.safetensors").write_bytes(bytes(20_000))
        (folder / "facts.json").write_text(json.dumps({"seconds": 1.5, "losses": [0.7, 0.6]}))

    told = []
    cache.once("kind", "name", build, told.append)
    damage(own / "kind" / "name")
    made = cache.once("kind", "name", build, told.append)
    assert cache.once("kind", "name", build, told.append) == made
    assert (made / "model.safetensors").read_bytes() == bytes(20_000) and "losses" in (made / "facts.json").read_text()
    (note,) = told
    assert note.startswith("the cached kind name is damaged (") and note.endswith("made anew") and "\n" not in note


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated weights", "no facts"])
def test_a_damaged_baseline_is_made_anew_and_said_to_be(own, opened, damage):
    first = opened()
    assert not first.from_cache and not any("is damaged (" in note for note in first.notes)
    DAMAGES[damage](own / "baseline" / first.key)
    again = opened()
    assert not again.from_cache and torch.equal(again.logits, first.logits)
    assert sum(f"baseline {first.key} is damaged (" in note for note in again.notes) == 1
    third = opened()
    assert (
        third.from_cache and torch.equal(third.logits, first.logits) and not any("is damaged (" in note for note in third.notes)
    )


def test_notes_of_a_baseline_tell_what_became_of_the_checkpoint(opened):
    assert any("classifier of 2 classes" in note for note in opened().notes)


def test_a_baseline_that_training_broke_is_refused_and_not_kept(own, opened, monkeypatch):
    real = training.train

    def diverges(model, *arguments, **options):
        log = real(model, *arguments, **options)
        log.losses[-1] = float("nan")
        return log

    def overflows(model, *arguments, **options):
        log = real(model, *arguments, **options)
        with torch.no_grad():
            model.classifier.bias[0] = torch.inf
        return log

    for broken, message in ((diverges, "not finite from step 2 of 2, at rate"), (overflows, "not finite, at rate")):
        monkeypatch.setattr(training, "train", broken)
        with pytest.raises(CompanionError, match=message):
            opened()
    assert not [path for path in (own / "baseline").iterdir() if path.is_dir()]


def test_a_damaged_control_is_made_anew(own, tiny, batch, capsys):
    first = label_control(tiny, "key", PHASES, task_of(batch), SMALL)
    (path,) = (own / "control").glob("*/logits.safetensors")
    save_file({"logits": torch.full_like(first, torch.nan)}, path)
    assert torch.equal(label_control(tiny, "key", PHASES, task_of(batch), SMALL), first)
    assert "is damaged (logits.safetensors is not what was written)" in capsys.readouterr().err


def test_a_control_that_training_broke_is_refused(tiny, batch, monkeypatch):
    monkeypatch.setattr(training, "predict", lambda *arguments: torch.full((4, 2), torch.nan))
    with pytest.raises(CompanionError, match="training the control on made up gave numbers that are not finite"):
        label_control(tiny, "key", PHASES, task_of(batch), SMALL)


def test_keys_tell_models_of_the_same_weights_apart(folder, tmp_path, opened):
    first = opened()
    shutil.copytree(folder, tmp_path / "copied")
    assert opened(tmp_path / "copied").key == first.key and opened(tmp_path / "copied").from_cache
    settings = json.loads((folder / "config.json").read_text())
    for changes in ({"num_attention_heads": 2}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}, {"pad_token_id": 1}):
        (tmp_path / "copied" / "config.json").write_text(json.dumps(settings | changes))
        assert opened(tmp_path / "copied").key != first.key, changes


def test_texts_that_the_tokenizer_does_not_know(opened, batch):
    task = task_of(batch)
    task.tokenizer = SimpleNamespace(pad_token_id=0, unk_token_id=1)
    task.train.input_ids = [[2, 1, 1, 7, 7, 3]] * 4
    opened(task=task)  # `Task.notes` says it
    task.train.input_ids = [[2, 1, 1, 1, 7, 3]] * 4
    with pytest.raises(CompanionError, match=r"75 % of the word pieces of made up are unknown .* take a model for this language"):
        opened(task=task)


# --- the cache itself -----------------------------------------------------------------------------------------------------


def write(text):
    def build(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "result").write_text(text)

    return build


def test_every_file_of_a_computation_is_verified_whenever_it_is_read(own):
    told = []
    assert (cache.once("kind", "name", write("one"), told.append) / "inner" / "result").read_text() == "one"
    assert (cache.once("kind", "name", write("two"), told.append) / "inner" / "result").read_text() == "one" and not told
    (own / "kind" / "name" / "inner" / "result").write_text("One")
    assert (cache.once("kind", "name", write("two"), told.append) / "inner" / "result").read_text() == "two"
    assert told == ["the cached kind name is damaged (inner/result is not what was written): it is made anew"]


def test_a_damaged_one_stays_where_building_it_fails(own):
    cache.once("kind", "name", write("one"))
    (own / "kind" / "name" / "inner" / "result").unlink()
    with pytest.raises(ZeroDivisionError):
        cache.once("kind", "name", lambda folder: 1 / 0)
    assert (own / "kind" / "name").is_dir() and not list((own / "kind").glob(".building-*"))


KILLED = """
import sys, time
from utils import cache
def build(folder):
    (folder / "half").write_bytes(bytes(1000))
    print("building", flush=True)
    time.sleep(60)
cache.once("kind", sys.argv[1], build)
"""


def test_what_a_killed_run_left_is_removed_by_the_next(own):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, "left"], stdout=subprocess.PIPE, env={**os.environ, "COMPANION_CACHE": str(own)}
    )
    assert child.stdout.readline() == b"building\n"
    cache.once("other", "name", write("one"))
    assert (own / "kind" / ".building-left" / "half").is_file()  # its maker lives
    child.kill()
    child.wait()
    cache.once("other", "name", write("one"))
    assert not (own / "kind" / ".building-left").exists()


def test_what_an_older_version_left_is_removed_after_a_day(own):
    for name, age in (("a1b2", 2 * cache.DAY), ("c3d4", 60)):
        (own / "kind" / f".building-{name}").mkdir(parents=True)
        os.utime(own / "kind" / f".building-{name}", (time.time() - age,) * 2)
    cache.once("kind", "name", write("one"))
    assert [path.name for path in (own / "kind").glob(".building-*")] == [".building-c3d4"]


def test_the_same_name_is_built_where_a_killed_run_left_it(own):
    (own / "kind" / ".building-name").mkdir(parents=True)
    (own / "kind" / ".building-name" / "half").write_text("")
    made = cache.once("kind", "name", write("one"))
    assert sorted(path.name for path in made.iterdir()) == ["inner", "manifest.json"]
    with FileLock(own / "kind" / "name.lock", timeout=0):
        assert cache.once("kind", "name", write("two")) == made  # a hit waits for nobody


def test_the_cache_lies_in_one_place_wherever_a_process_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COMPANION_CACHE", "~/kept")
    assert cache.root() == tmp_path / "home" / "kept" and os.environ["COMPANION_CACHE"] == str(tmp_path / "home" / "kept")
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.setenv("COMPANION_CACHE", "kept")
    monkeypatch.chdir(tmp_path / "work")
    first = cache.root()
    monkeypatch.chdir(tmp_path / "work" / "inner")
    assert first == cache.root() == tmp_path / "work" / "kept"
    assert os.environ["COMPANION_CACHE"] == str(first)  # what is started from here looks in the same place
    monkeypatch.delenv("COMPANION_CACHE")
    assert cache.root() == tmp_path / "home" / ".cache" / "bert-compression-companion"


@pytest.mark.parametrize("given", [None, "~/kept", "~nobody-of-this-name/kept"])
def test_no_home_and_a_user_without_a_name(monkeypatch, given):
    def unnamed(*user):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("COMPANION_CACHE")
    if given:
        monkeypatch.setenv("COMPANION_CACHE", given)
    monkeypatch.setattr(pwd, "getpwuid", unnamed)
    with pytest.raises(CompanionError, match="no home folder for the cache: set COMPANION_CACHE"):
        cache.root()


def test_a_full_disk_where_safetensors_writes(own):
    def full(folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(CompanionError, match=r"cannot write the cache .*No space left .* set COMPANION_CACHE"):
        cache.once("kind", "name", full)
    assert not list((own / "kind").glob(".building-*"))


def test_a_limit_on_the_size_of_files(own):
    def build(folder):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            save_file({"x": torch.zeros(10_000)}, folder / "model.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(CompanionError, match=r"cannot write the cache .* set COMPANION_CACHE"):
        cache.once("kind", "name", build)


def test_a_text_that_cannot_be_written_leaves_no_scrap(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    cache.write_atomically(tmp_path / "texts" / "page", "old")
    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cache.write_atomically(tmp_path / "texts" / "page", "new")
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["page"] and (
        tmp_path / "texts" / "page"
    ).read_text() == "old"
