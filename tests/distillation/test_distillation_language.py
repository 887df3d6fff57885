"""Masked words: rates by counting, loss and head against transformers' BertForMaskedLM, the triple loss against torch's own terms."""

import math

import pytest
import torch
from small_task import task_of
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from utils import language, training
from utils.distillation import students
from utils.distillation.language import TripleLoss, cosine_loss, pretrain, speaking, triple_loss, unigram_perplexity
from utils.language import IGNORED, LanguageHead, LanguageModel, Masking, masked_loss
from utils.profiles import get
from utils.tasks import Split
from utils.trials import Trial

MASKING = Masking(4, 100, (0, 1, 2, 3, 4))


@pytest.fixture
def teacher():
    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=2,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3)  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def texts(batch):
    """The batch of four, with [CLS] 2 and [SEP] 3."""
    batch["input_ids"][:, 0] = 2
    batch["input_ids"][batch["input_ids"] == 4] = 5
    return batch


# --- masking --------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-21", "K-25")
def test_of_the_chosen_tokens_80_percent_are_masked_10_random_and_10_kept():
    ids = torch.randint(5, 100, (400, 100), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -10:] = 2, 0
    masked, labels = MASKING(ids, torch.Generator().manual_seed(1))
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    assert not chosen[:, 0].any() and not chosen[:, -10:].any()
    assert chosen[:, 1:-10].float().mean().item() == pytest.approx(0.15, abs=0.01)
    hidden, same = (masked == 4) & chosen, (masked == ids) & chosen
    other = chosen & ~hidden & ~same
    shares = [part.sum().item() / chosen.sum().item() for part in (hidden, same, other)]
    assert shares == pytest.approx([0.8 + 0.1 / 100, 0.1 + 0.1 / 100, 0.1 * 98 / 100], abs=0.02)
    assert masked[other].unique().numel() > 90  # all of the vocabulary, not one token


@pytest.mark.method("K-21", "K-25")
def test_masking_refuses_what_makes_no_sense():
    for wrong, match in ((lambda: Masking(4, 100, (), 0.0), "share"), (lambda: Masking(103, 100, ()), "one of the 100 tokens")):
        with pytest.raises(ValueError, match=match):
            wrong()


# --- head, loss, perplexity -----------------------------------------------------------------------------------------


def as_masked_lm(teacher, head) -> BertForMaskedLM:
    """transformers' model with the same encoder and head."""
    theirs = BertForMaskedLM(teacher.config).eval()
    theirs.bert.load_state_dict(teacher.bert.state_dict(), strict=False)
    theirs.cls.predictions.transform.dense.load_state_dict(head.dense.state_dict())
    theirs.cls.predictions.transform.LayerNorm.load_state_dict(head.LayerNorm.state_dict())
    theirs.tie_weights()
    with torch.no_grad():
        theirs.cls.predictions.bias.copy_(head.bias)
        theirs.cls.predictions.decoder.bias.copy_(head.bias)
    return theirs


@pytest.mark.method("K-21", "K-25")
def test_head_and_loss_are_those_of_transformers_masked_language_model(teacher, texts):
    head = LanguageHead(32, 100)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours, theirs = LanguageModel(teacher.bert, head), as_masked_lm(teacher, head)
    masked, labels = MASKING(texts["input_ids"], torch.Generator().manual_seed(3))
    expected = theirs(input_ids=masked, attention_mask=texts["attention_mask"], labels=labels)
    found = ours(masked, texts["attention_mask"])
    torch.testing.assert_close(found, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(masked_loss(found, labels), expected.loss, atol=1e-5, rtol=1e-5)
    torch.manual_seed(5)
    drawn, asked = MASKING(texts["input_ids"])
    torch.manual_seed(5)
    loss = language.language_loss(MASKING)(ours, texts)
    torch.testing.assert_close(
        loss, theirs(input_ids=drawn, attention_mask=texts["attention_mask"], labels=asked).loss, atol=1e-4, rtol=1e-4
    )


@pytest.mark.method("K-21", "K-25")
def test_embeddings_and_output_matrix_are_one_set_of_weights(teacher, texts):
    model = LanguageModel(teacher.bert)
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.shape == (100, 32)]
    assert names == ["bert.embeddings.word_embeddings.weight"]
    labels = torch.full_like(texts["input_ids"], IGNORED)
    labels[0, 2] = 77  # a word that the batch must not contain: only the output side can move its vector
    assert not (texts["input_ids"] == 77).any()
    masked_loss(model(texts["input_ids"], texts["attention_mask"]), labels).backward()
    assert teacher.bert.embeddings.word_embeddings.weight.grad[77].abs().max() > 0
    assert masked_loss(torch.randn(3, 100), torch.full((3,), IGNORED)).item() == 0


@pytest.mark.method("K-21", "K-25")
def test_perplexity_of_an_even_guess_is_the_vocabularys_size_and_otherwise_exp_of_the_loss(teacher, texts, monkeypatch):
    monkeypatch.setattr(training, "compute_dtype", lambda device: torch.float32)
    split, model = task_of(texts).train, LanguageModel(teacher.bert)
    masking = Masking(4, 100, (0, 1, 2, 3, 4), share=0.5)
    found = language.perplexity(model, split, masking, seed=2)
    order = sorted(range(4), key=lambda row: len(split.input_ids[row]))
    rows = texts["input_ids"][order], texts["attention_mask"][order]
    masked, labels = masking(rows[0], torch.Generator().manual_seed(2))
    expected = math.exp(masked_loss(model(masked, rows[1]), labels).item())
    assert found == pytest.approx(expected, rel=1e-4) and found == language.perplexity(model, split, masking, seed=2)
    nn.init.zeros_(model.head.LayerNorm.weight)
    assert language.perplexity(model, split, masking) == pytest.approx(100, rel=1e-3)
    with pytest.raises(ValueError, match="no token was masked"):
        language.perplexity(model, split, Masking(4, 100, tuple(range(100))))


# --- K-25 -----------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-25")
def test_pretraining_teaches_the_trials_own_encoder_and_is_on_its_account(teacher, texts):
    trial, before = Trial(teacher, task_of(texts), get("smoke")), {n: p.detach().clone() for n, p in teacher.named_parameters()}
    masking, split = Masking(4, 100, (0, 1, 2, 3, 4), share=0.4), task_of(texts).train
    start = language.perplexity(LanguageModel(teacher.bert), split, masking)
    model = pretrain(trial, task_of(texts), masking, 60, learning_rate=5e-3)
    assert model.bert is trial.model.bert and trial.model is teacher and trial.task.train is not None
    assert (trial.steps, len(trial.losses)) == (60, 60) and trial.seconds > 0
    moved = {name for name, p in teacher.named_parameters() if not torch.equal(p, before[name])}
    assert "bert.embeddings.word_embeddings.weight" in moved and "bert.encoder.layer.1.output.dense.weight" in moved
    assert not any(name.startswith("classifier") for name in moved)
    assert language.perplexity(model, split, masking) < start / 2  # four sentences can be learned by heart


@pytest.mark.method("K-21", "K-25")
def test_a_head_is_trained_on_a_copy(teacher, texts):
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    model, log = language.train_head(teacher.bert, task_of(texts), MASKING, get("smoke"), steps=4, learning_rate=1e-2)
    assert len(log.losses) == 4 and all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert not torch.equal(model.head.dense.weight, torch.eye(32)) and model.head.bias.any()
    assert not torch.equal(model.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight)


@pytest.mark.method("K-25")
def test_word_frequencies_are_a_guess_of_known_perplexity(texts):
    masking, split = Masking(4, 10, (0, 2)), task_of(texts).train
    train = Split(None, [[2, 5, 5, 6, 0], [5]], torch.zeros(2))
    other = Split(None, [[2, 5, 7]], torch.zeros(1))
    odds = {5: (3 + 1) / (4 + 10), 7: 1 / (4 + 10)}  # three fives among four words, ten kinds
    assert unigram_perplexity(train, other, masking) == pytest.approx((odds[5] * odds[7]) ** -0.5)
    assert unigram_perplexity(split, split, Masking(4, 100, (0, 2, 3))) < 100  # better than a guess by lot


# --- K-21 -----------------------------------------------------------------------------------------------------------


def both(teacher, texts):
    guide = LanguageModel(teacher.bert)
    student = LanguageModel(students.from_layers(teacher, [0]).bert)
    nn.init.normal_(guide.head.bias)
    return guide, student


@pytest.mark.method("K-21")
def test_the_triple_loss_is_the_sum_of_torchs_terms(teacher, texts):
    guide, student = both(teacher, texts)
    torch.manual_seed(7)
    masked, labels = MASKING(texts["input_ids"])
    chosen, real = labels != IGNORED, texts["attention_mask"].bool()
    assert chosen.sum() > 1
    mine, given = student(masked, texts["attention_mask"])[chosen], guide(masked, texts["attention_mask"])[chosen]
    soft = 4 * nn.KLDivLoss(reduction="batchmean")((mine / 2).log_softmax(-1), (given / 2).softmax(-1))
    hard = nn.CrossEntropyLoss()(mine, labels[chosen])
    states = [model.states(masked, texts["attention_mask"])[real] for model in (student, guide)]
    cosine = nn.CosineEmbeddingLoss()(*states, torch.ones(int(real.sum())))
    for weights in (TripleLoss(), TripleLoss(1.0, 0.0, 0.0), TripleLoss(0.0, 1.0, 0.0), TripleLoss(0.0, 0.0, 1.0)):
        torch.manual_seed(7)
        found = triple_loss(guide, MASKING, weights)(student, texts)
        torch.testing.assert_close(
            found, weights.soft * soft + weights.language * hard + weights.cosine * cosine, atol=1e-4, rtol=1e-4
        )
    assert TripleLoss() == TripleLoss(5.0, 2.0, 1.0, 2.0)  # the authors' script


@pytest.mark.method("K-21")
def test_between_equals_only_the_labels_cost_and_the_teacher_gets_no_gradient(teacher, texts):
    guide, _ = both(teacher, texts)
    same = LanguageModel(students.from_layers(teacher, [0, 1]).bert)
    same.head.load_state_dict(guide.head.state_dict())
    assert triple_loss(guide, MASKING, TripleLoss(1.0, 0.0, 1.0))(same, texts).item() == pytest.approx(0, abs=1e-5)
    triple_loss(guide, MASKING)(same, texts).backward()
    assert all(p.grad is None for p in guide.parameters()) and same.head.dense.weight.grad is not None


@pytest.mark.method("K-21")
def test_a_student_cut_from_the_teacher_that_speaks_begins_as_that_speaks(teacher, texts):
    speaker, _ = language_model(teacher, texts)
    whole = students.from_layers(speaking(teacher, speaker), [0, 1])
    assert not torch.equal(whole.bert.encoder.layer[0].output.dense.weight, teacher.bert.encoder.layer[0].output.dense.weight)
    assert torch.equal(whole.classifier.weight, teacher.classifier.weight)
    trial = Trial(whole, task_of(texts), get("smoke"))
    student = pretrain(trial, task_of(texts), MASKING, 0, head=speaker.head)
    inputs = {name: texts[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(student(**inputs), speaker(**inputs))
    assert student.head is not speaker.head  # a copy, which the student may change
    assert pretrain(trial, task_of(texts), MASKING, 0).head.dense.weight.equal(torch.eye(32))


def language_model(teacher, texts):
    """A language model whose encoder and head have moved away from the classifier's."""
    return language.train_head(teacher.bert, task_of(texts), MASKING, get("smoke"), steps=2, learning_rate=1e-2)


@pytest.mark.method("K-21")
def test_triple_loss_refuses_other_widths_and_weights():
    with pytest.raises(ValueError, match="one width"):
        cosine_loss(torch.randn(3, 8), torch.randn(3, 6))
    with pytest.raises(ValueError, match="temperature"):
        TripleLoss(temperature=0.0)
    with pytest.raises(ValueError, match="weight"):
        TripleLoss(soft=-1.0)
