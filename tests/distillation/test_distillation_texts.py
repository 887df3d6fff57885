"""Unlabelled texts: sentences cut by hand, and disturbed copies counted against their rates."""

from collections import Counter

import datasets
import numpy as np
import pytest
import torch

from utils import bert, profiles, tasks, training
from utils.distillation import texts
from utils.distillation.texts import Disturbance, augment, disturb


@pytest.fixture(scope="module")
def task():
    return tasks.load("rotten_tomatoes", bert.load_tokenizer(), profiles.get("smoke"))


WORDS = ["the", "plot", "is", "thin", "but", "the", "acting", "more", "than", "makes", "up", "for", "it"]


# --- other reviews --------------------------------------------------------------------------------------------------


@pytest.mark.method("K-27")
def test_a_review_falls_into_its_sentences():
    review = 'I liked this film a lot. "It was great!" she said to me<br /><br />Too short. What did you think of it? No'
    found = texts.sentences(review, (4, 40))
    assert found == ["I liked this film a lot.", "she said to me", "What did you think of it?"]
    assert texts.sentences(review, (7, 40)) == []
    assert texts.sentences(review, (1, 3)) == ['"It was great!', "Too short.", "No"]


@pytest.mark.method("K-27")
def test_other_sentences_are_different_sentences_of_imdb_and_the_seed_decides_which():
    first, again, other = (texts.other_sentences(300, seed, (5, 20)) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 300
    assert all(5 <= len(sentence.split()) <= 20 and "<br" not in sentence for sentence in first)
    reviews = "\n".join(tasks.column(tasks.embedded("imdb"), "text"))
    assert all(sentence in reviews for sentence in first[:20])


@pytest.mark.method("K-27")
def test_unlabelled_sentences_are_in_the_tasks_tokens_and_have_no_label(task):
    split = texts.unlabelled(task, profiles.get("smoke"), 50)
    assert len(split) == 50 and (split.labels == texts.UNLABELLED).all()
    assert max(map(len, split.input_ids)) <= 16 and max(max(ids) for ids in split.input_ids) < 2000
    expected = tasks.tokenise(split.data, task.tokenizer, 16, 2000).input_ids
    assert split.input_ids == expected
    lengths = [len(text.split()) for text in tasks.column(task.train.data, "text")]
    low, high = np.quantile(lengths, (0.1, 0.9))
    assert all(int(low) <= len(text.split()) <= int(high) for text in tasks.column(split.data, "text"))
    batch = tasks.collate(split, np.arange(4), 0)
    assert torch.isnan(
        training.cross_entropy(lambda **_: type("Out", (), {"logits": torch.randn(4, 2)}), batch)
    )  # no label to learn from
    with pytest.raises(ValueError, match="no texts"):
        texts.as_split([], task, profiles.get("smoke"))


@pytest.mark.method("K-11a", "K-27")
def test_pseudo_labels_are_the_teachers_and_unsure_ones_go(task):
    split = task.train.first(4)
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.1], [-3.0, 1.0], [0.4, 0.3]])
    assert texts.pseudo_labelled(split, logits).labels.tolist() == [0, 1, 1, 0]
    sure = texts.pseudo_labelled(split, logits, at_least=0.8)
    assert sure.labels.tolist() == [0, 1] and sure.input_ids == [split.input_ids[0], split.input_ids[2]]
    assert tasks.column(sure.data, "text") == [tasks.column(split.data, "text")[row] for row in (0, 2)]
    for wrong, match in ((lambda: texts.pseudo_labelled(split, logits[:2]), "2 rows of logits for 4"),
                         (lambda: texts.pseudo_labelled(split, logits, 0.999), "no example")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            wrong()


@pytest.mark.method("K-27")
def test_splits_join_and_make_a_task_of_their_own(task):
    first, second = task.train.first(3), texts.unlabelled(task, profiles.get("smoke"), 2)
    both = texts.joined(first, second)
    assert both.input_ids == [*first.input_ids, *second.input_ids] and both.labels.tolist() == [
        *first.labels.tolist(),
        -100,
        -100,
    ]
    assert tasks.column(both.data, "text") == tasks.column(first.data, "text") + tasks.column(second.data, "text")
    other = texts.trained_on(task, both)
    assert (
        other.train is both
        and other.validation is task.validation
        and other.key not in (task.key, texts.trained_on(task, first).key)
    )


# --- disturbed copies -----------------------------------------------------------------------------------------------


@pytest.mark.method("K-27")
def test_words_are_masked_and_replaced_at_their_rates():
    rng, how, seen = np.random.default_rng(0), Disturbance(0.1, 0.2, 0.0), Counter()
    others = ["red"] * 3 + ["blue"]
    for _ in range(4000):
        copy = disturb(WORDS, others, how, rng)
        assert len(copy) == len(WORDS)
        for new, old in zip(copy, WORDS, strict=True):
            seen["kept" if new == old else new] += 1
    total = sum(seen.values())
    expected = {"[MASK]": 0.1, "red": 0.15, "blue": 0.05, "kept": 0.7}
    assert {name: round(seen[name] / total, 2) for name in seen} == pytest.approx(expected, abs=0.011)


@pytest.mark.method("K-27")
def test_windows_are_neighbouring_words_of_every_length_and_place():
    rng, how, seen = np.random.default_rng(0), Disturbance(0.0, 0.0, 0.25), Counter()
    numbered = [f"w{number}" for number in range(8)]
    for _ in range(4000):
        copy = disturb(numbered, numbered, how, rng)
        start = int(copy[0][1:])
        assert copy == numbered[start : start + len(copy)]
        seen[len(copy), start] += 1
    cut = sum(count for (length, _), count in seen.items() if length < 8)
    assert cut / 4000 == pytest.approx(0.25, abs=0.03)
    assert {place for place in seen if place[0] < 8} == {
        (length, start) for length in range(1, 6) for start in range(8 - length + 1)
    }
    assert len(disturb(["one"], ["one"], Disturbance(0, 0, 1.0, (5,)), rng)) == 1


@pytest.mark.method("K-27")
def test_nothing_is_disturbed_at_rate_0_and_then_no_copy_is_new():
    rng = np.random.default_rng(0)
    assert disturb(WORDS, WORDS, Disturbance(0, 0, 0), rng) == WORDS
    assert augment([" ".join(WORDS)], 5, Disturbance(0, 0, 0)) == []


@pytest.mark.method("K-27")
def test_copies_are_new_and_different_and_the_seed_decides():
    sentences = [" ".join(WORDS), "a gorgeous, witty, seductive movie."]
    found, again, other = (augment(sentences, 20, seed=seed) for seed in (0, 0, 1))
    assert found == again != other
    assert len(found) == len(set(found)) <= 40 and len(found) > 25
    assert not set(found) & {" ".join(texts.WORD.findall(sentence)) for sentence in sentences}
    assert any("[MASK]" in copy for copy in found) and not any(set(copy.split()) == {"[MASK]"} for copy in found)
    words = {word for sentence in sentences for word in texts.WORD.findall(sentence)} | {"[MASK]"}
    assert {word for copy in found for word in copy.split()} <= words
    for wrong in (lambda: augment([], 3), lambda: augment(sentences, -1)):
        with pytest.raises(ValueError, match="must not be empty"):
            wrong()
    with pytest.raises(ValueError, match="rates must lie"):
        Disturbance(0.6, 0.6)
    with pytest.raises(ValueError, match="one word or more"):
        Disturbance(lengths=(0,))


@pytest.mark.method("K-27")
def test_masks_reach_the_teacher_as_its_own_token(task):
    split = texts.augmented(task, profiles.get("smoke"), 2)
    assert (split.labels == texts.UNLABELLED).all() and len(split) > len(task.train)
    assert any(task.tokenizer.mask_token_id in ids for ids in split.input_ids)
    assert isinstance(split.data, datasets.Dataset) and len(split.data) == len(split)
