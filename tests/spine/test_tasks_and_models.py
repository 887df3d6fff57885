"""Every source of data and weights, and what bad ones say."""

import shutil
import threading

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig

from utils import CompanionError, bert, cache, profiles, tasks, training

SMOKE = profiles.get("smoke")


@pytest.fixture(scope="module")
def tokenizer():
    return bert.load_tokenizer()


def write(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def test_embedded_split_is_fixed_stratified_and_disjoint(tokenizer):
    task = tasks.load("rotten_tomatoes", tokenizer, profiles.get("cpu"))
    assert (len(task.train), len(task.validation), len(task.selection)) == (5886, 2132, 512)
    assert task.validation.labels.float().mean().item() == pytest.approx(0.5, abs=0.001)
    assert (
        task.key == tasks.load("rotten_tomatoes", tokenizer, profiles.get("cpu")).key == "048c740caeecc7be"
    )  # of all published numbers
    rows = {t for t in task.train.data["text"]} & {t for t in task.validation.data["text"]}
    twice = {t for t in task.train.data["text"]} & {t for t in task.selection.data["text"]}
    assert len(rows) < 20 and len(twice) < 5  # the source itself repeats a few sentences; the split shares no row


def test_batches_visit_every_example_once_and_pad_right(tokenizer):
    task = tasks.load("rotten_tomatoes", tokenizer, SMOKE)
    for seed in (None, 3):
        found = list(tasks.batches(task.train, 16, 0, seed))
        rows = np.concatenate([batch["rows"] for batch in found])
        assert sorted(rows) == list(range(len(task.train)))
        for batch in found:
            for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], batch["rows"], strict=True):
                assert ids[mask.bool()].tolist() == task.train.input_ids[row] and ids[~mask.bool()].eq(0).all()
    orders = [np.concatenate([b["rows"] for b in tasks.batches(task.train, 16, 0, seed)]).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_endless_batches_give_exactly_the_steps_asked_for(tokenizer):
    task = tasks.load("rotten_tomatoes", tokenizer, SMOKE)
    assert len(list(training.endless_batches(task.train, 16, 0, 0, 19))) == 19


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_local_files_of_every_kind(tokenizer, tmp_path, suffix):
    import pandas

    frame = pandas.DataFrame({"text": [f"sentence {i}" for i in range(20)], "label": ["bad", "good"] * 10})
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    task = tasks.load(str(path), tokenizer, SMOKE)
    assert task.label_names == ["bad", "good"]
    assert len(task.train) + len(task.validation) + len(task.selection) == 20 and len(task.selection) == 3


def test_a_folder_with_train_and_validation(tokenizer, tmp_path):
    write(tmp_path / "train.csv", ["a,0", "b,1", "c,0"])
    write(tmp_path / "validation.csv", ["d,1"])
    task = tasks.load(str(tmp_path), tokenizer, SMOKE)
    assert (len(task.train), len(task.validation), len(task.selection)) == (3, 1, 3)  # too few to set any aside


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a,0", "b,1"], "review,label", "needs a column text"),
        (["a,0", "b,1"], "text,target", "a column label"),
        (["a,1", "b,1", "c,1", "d,1"], "text,label", "1 class"),
        (["a,0", "b,1", "c,1"], "text,label", "3 usable rows"),
        ([",0", ",1", " ,0", ",1"], "text,label", "0 usable rows"),
        (["a,0.5", "b,0.25", "c,0.5", "d,0.25"], "text,label", "fractional labels"),
    ],
)
def test_bad_files_say_what_is_wrong(tokenizer, tmp_path, rows, header, message):
    with pytest.raises(CompanionError, match=message):
        tasks.load(write(tmp_path / "bad.csv", rows, header), tokenizer, SMOKE)


def test_empty_texts_are_dropped(tokenizer, tmp_path):
    path = write(tmp_path / "holes.csv", ["a,0", ",0", "b,1", "  ,1", "c,0", "d,1"])
    task = tasks.load(path, tokenizer, SMOKE)
    assert len(task.train) + len(task.validation) == 4


def test_other_encodings_and_unknown_formats(tokenizer, tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,0\nthé,1\n".encode("latin-1"))
    with pytest.raises(CompanionError, match="not UTF-8"):
        tasks.load(str(tmp_path / "latin.csv"), tokenizer, SMOKE)
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    with pytest.raises(CompanionError, match=r"use one of \.csv"):
        tasks.load(str(tmp_path / "data.xlsx"), tokenizer, SMOKE)
    with pytest.raises(CompanionError, match="needs a train"):
        tasks.load(str(tmp_path), tokenizer, SMOKE)


def test_damaged_embedded_files_are_found(tmp_path):
    (tmp_path / "x").write_text("altered")
    with pytest.raises(CompanionError, match="damaged or not the pinned version"):
        tasks.check_sha256(tmp_path / "x", "0" * 64)
    with pytest.raises(CompanionError, match="not installed: run `make setup`"):
        tasks.package_file("no-such-package", "x", "")


def test_model_folders(tiny, tmp_path, monkeypatch):
    tiny.save_pretrained(tmp_path / "good")
    assert isinstance(bert.load(str(tmp_path / "good")), BertForSequenceClassification)
    shutil.copytree(tmp_path / "good", tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    with pytest.raises(CompanionError, match=r"no \*.safetensors weights"):
        bert.load(str(tmp_path / "weightless"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CompanionError, match=r"no config\.json"):
        bert.load(str(tmp_path / "empty"))
    (tmp_path / "roberta").mkdir()
    RobertaConfig().save_pretrained(tmp_path / "roberta")
    (tmp_path / "roberta" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CompanionError, match="of type roberta"):
        bert.load(str(tmp_path / "roberta"))
    monkeypatch.setattr(bert, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(CompanionError, match="damaged"):
        bert.load()


def test_unknown_profile_and_device(monkeypatch):
    with pytest.raises(CompanionError, match="choose one of smoke, cpu, full, gpu"):
        profiles.get("fast")
    with pytest.raises(CompanionError, match="choose auto, cpu or cuda"):
        profiles.pick_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CompanionError, match="sees no CUDA GPU"):
        profiles.pick_device("cuda")
    assert profiles.pick_device("auto").type == "cpu"


def test_matrices_name_every_weight_matrix(tiny):
    found = bert.matrices(tiny, bert.ALL_GROUPS)
    two_dimensional = {name for name, p in tiny.named_parameters() if p.ndim == 2}
    assert {m.name for m in found} == two_dimensional
    assert all(tiny.get_parameter(m.name) is m.weight for m in found)
    with pytest.raises(ValueError, match="unknown groups"):
        bert.matrices(tiny, ("wings",))


def test_fingerprint_tells_equal_weights_from_different(tiny):
    other = bert.fresh_copy(tiny)
    assert bert.fingerprint(tiny) == bert.fingerprint(other)
    with torch.no_grad():
        other.classifier.bias[0] += 1e-6
    assert bert.fingerprint(tiny) != bert.fingerprint(other)


def test_cached_work_is_done_once_by_parallel_callers(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path))
    done, barrier = [], threading.Barrier(4)

    def build(folder):
        done.append(1)
        (folder / "result").write_text("whole")

    def ask():
        barrier.wait()
        assert (cache.once("kind", "name", build) / "result").read_text() == "whole"

    threads = [threading.Thread(target=ask) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert done == [1]


def test_an_interrupted_build_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path))

    def interrupted(folder):
        (folder / "half").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.once("kind", "name", interrupted)
    assert [path.name for path in (tmp_path / "kind").iterdir()] in ([], ["name.lock"])


def test_a_cache_that_cannot_be_written_or_is_full(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "file"))
    with pytest.raises(CompanionError, match="set COMPANION_CACHE"):
        cache.once("kind", "name", lambda folder: None)
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "good"))

    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(CompanionError, match="No space left"):
        cache.once("kind", "name", full)


def test_any_bert_config_can_be_loaded_from_a_folder(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = bert.load(str(tmp_path), num_labels=5)
    assert model.config.num_labels == 5 and len(bert.matrices(model)) == 18


def rates(tiny, steps: int, hold: int = 0) -> list[float]:
    optimizer, schedule = training.make_optimizer(tiny, steps, 1.0, hold=hold)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_falls_after_the_last_change_as_far_as_without_one(tiny):
    once, gradual = rates(tiny, 20), rates(tiny, 50, hold=30)
    assert once[:2] == [0.5, 1.0] and once[-1] == pytest.approx(1 / 18)
    assert gradual[2:30] == [1.0] * 28 and gradual[30] == 1.0
    assert sum(gradual[30:]) == pytest.approx(sum(once), rel=0.05)  # equal training after the last change
    for hold in (-1, 20):
        with pytest.raises(ValueError, match=r"hold must be at least 0 and below steps \(20\)"):
            training.make_optimizer(tiny, 20, 1.0, hold=hold)
