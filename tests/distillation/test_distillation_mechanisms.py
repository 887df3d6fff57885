"""Defaults, randomness and targets of distillation: each test once had a mutant that lived."""

import pytest
import torch
from small_distillation import first_batch, make_bert, make_trial
from torch import nn
from torch.nn.functional import cross_entropy

from utils import training
from utils.distillation import layers, losses, mobile, objective, precision, teachers
from utils.distillation.outputs import LiveTeacher, Outputs, capture, needs
from utils.parts import BiLSTM


def value(of: objective.Objective, student: torch.nn.Module, teacher, batch: dict) -> torch.Tensor:
    return objective.as_loss(of, teacher)(student, batch)


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-31")
def test_what_the_optimiser_does_not_hold_shrinks_nobodys_gradient(student_model, task):
    """A clip counts what learns. Gradients of the rest would grow over the steps, for nothing clears them."""
    batch, own = first_batch(task), list(student_model.bert.encoder.layer.parameters())
    student_model.classifier.weight.grad = torch.full_like(student_model.classifier.weight, 1e6)
    optimizer = torch.optim.SGD(own, lr=1.0)
    before = [p.detach().clone() for p in own]
    gradient = torch.autograd.grad(training.cross_entropy(student_model, batch), own)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    training.optimizer_step(student_model, batch, training.cross_entropy, optimizer)
    moved = torch.cat([(p - old).flatten() for p, old in zip(own, before, strict=True)]).norm()
    assert moved.item() == pytest.approx(min(norm.item(), training.CLIP_NORM), rel=0.05)  # bfloat16 in the step


# --- defaults that the lesson uses ----------------------------------------------------------------------------------


@pytest.mark.method("K-05")
def test_apprentice_by_default_is_half_labels_half_teacher(teacher_model, student_model, task):
    batch, teacher = first_batch(task), LiveTeacher(teacher_model)
    mine, given = capture(student_model, batch).logits, capture(teacher_model, batch).logits
    soft = cross_entropy(mine, given.softmax(-1))
    expected = 0.5 * cross_entropy(mine, batch["labels"]) + 0.5 * soft
    torch.testing.assert_close(value(precision.apprentice(), student_model, teacher, batch), expected)


@pytest.mark.method("K-20a", "K-20b")
def test_patient_distillation_by_default_is_patient(teacher_model, student_model, task):
    batch, teacher = first_batch(task), LiveTeacher(teacher_model, needs("cls", (2,)))
    plain = value(losses.with_labels(losses.soft_targets(10.0), 0.5), student_model, teacher, batch)
    term = value(layers.patience({1: 2}), student_model, teacher, batch)
    torch.testing.assert_close(value(layers.patient_distillation({1: 2}), student_model, teacher, batch), plain + 100 * term)


# --- what is random -------------------------------------------------------------------------------------------------


@pytest.mark.method("K-02")
def test_noise_differs_between_logits_and_between_calls():
    """A shift of all logits is no noise: no softmax sees it."""
    z = torch.zeros(200, 4)
    first, second = losses.add_noise(z, 1.0, 1.0), losses.add_noise(z, 1.0, 1.0)
    assert not torch.equal(first, second)
    assert (first - first.mean(-1, keepdim=True)).pow(2).sum(-1).mean().item() == pytest.approx(3.0, rel=0.2)  # C - 1
    student, mask = torch.zeros(200, 4), torch.ones(200, 1)
    cost = losses.noisy_logit_regression(0.5, 1.0).loss(Outputs(student, mask), Outputs(z, mask), {})
    assert cost.item() == pytest.approx(0.5 * 0.5 * 3, rel=0.3)  # share * half the squared noise, which logit regression lacks


@pytest.mark.method("K-04")
def test_sobolev_is_its_two_terms_along_a_direction_that_changes(teacher_model, student_model, task):
    batch, want = first_batch(task), needs("inputs", (0,))
    live, made = LiveTeacher(teacher_model, want), losses.sobolev(2.0)
    torch.manual_seed(3)
    found = value(made, student_model, live, batch)
    torch.manual_seed(3)
    direction = nn.functional.normalize(torch.randn(8, 3), dim=-1)
    mine, given = capture(student_model, batch, want), live(batch)
    slope = losses.sobolev_loss(mine, given, direction)
    torch.testing.assert_close(found, losses.soft_target_loss(mine.logits, given.logits, 1.0) + 2.0 * slope)
    assert value(made, student_model, live, batch).item() != pytest.approx(found.item(), rel=1e-3)
    assert slope > 1e-3


# --- who is listened to ---------------------------------------------------------------------------------------------


@pytest.mark.method("K-16")
def test_every_teacher_has_a_vote(task):
    batch = first_batch(task)
    members = [LiveTeacher(make_bert(2, seed=seed), needs("cls", (2,))) for seed in (3, 4, 5)]
    triplets = teachers.random_triplets(64, 8, torch.device("cpu"))
    states = [member(batch)["cls", 2] for member in members]
    alone = [teachers.vote([one], triplets) for one in states]
    majority = torch.stack(alone).sum(0) >= 2
    assert not any(torch.equal(one, majority) for one in alone)  # three opinions
    student, made = make_bert(2, seed=9), teachers.voted_dissimilarity(2, [2, 2, 2], margin=0.3)
    torch.manual_seed(6)
    found = value(made, student, teachers.AveragedTeachers(members), batch)
    torch.manual_seed(6)
    drawn = teachers.random_triplets(64, 8, torch.device("cpu"))
    nearer = torch.stack([teachers.vote([one], drawn) for one in states]).sum(0) >= 2
    mine = capture(student, batch, needs("cls", (2,)))["cls", 2]
    torch.testing.assert_close(found, teachers.relative_dissimilarity(mine, drawn, nearer, 0.3))


@pytest.mark.method("K-29")
def test_a_layer_in_transfer_is_told_the_states_and_the_attention_of_its_teacher_layer(teacher_model, task):
    batch, student = first_batch(task), make_bert(2, seed=1)
    wanted = (*needs("hidden", (3,)), *needs("scores", (3,)))
    live, mine = LiveTeacher(teacher_model, wanted), capture(student, batch, (*needs("hidden", (1,)), *needs("scores", (1,))))
    given, mask = live(batch), batch["attention_mask"]
    states = losses.token_mean((mine["hidden", 1] - given["hidden", 3]).pow(2), mask)
    attention = layers.relation_loss(mine["scores", 1], given["scores", 3], mask)
    assert attention > 1e-3
    torch.testing.assert_close(value(mobile.layer_transfer(1, 3), student, live, batch), states + attention)


@pytest.mark.method("K-29")
def test_progressive_transfer_tells_every_layer_its_own_teacher_layer(teacher_model, student_model, task, monkeypatch):
    asked, real = [], mobile.layer_transfer
    monkeypatch.setattr(mobile, "layer_transfer", lambda own, given: asked.append((own, given)) or real(own, given))
    live = LiveTeacher(teacher_model, (*needs("hidden", (1, 2, 3, 4)), *needs("scores", (1, 2, 3, 4))))
    mobile.progressive_transfer(make_trial(student_model, task), live, {1: 2, 2: 4}, 1, learning_rate=1e-3)
    assert asked == [(1, 2), (2, 4)]


@pytest.mark.method("K-27")
def test_the_bilstm_reads_in_both_directions():
    """Each direction against a plain LSTM, on the sentence and on the sentence reversed."""
    student = BiLSTM(100, 3, 8, 6, 5).eval()
    ids = torch.tensor([[5, 17, 3, 9]])
    x = student.embeddings(ids)
    found = student.encode(ids, torch.ones_like(ids))
    for direction, (suffix, read) in enumerate((("", x), ("_reverse", x.flip(1)))):
        one = nn.LSTM(8, 6, batch_first=True)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(one, name).data.copy_(getattr(student.lstm, name + suffix))
        torch.testing.assert_close(found[:, 6 * direction : 6 * direction + 6], one(read)[1][0][0])
