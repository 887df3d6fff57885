"""Students in few bits: the grid against its closed form, the straight-through step by hand, learned levels by their gradient."""

import copy

import numpy as np
import pytest
import torch
from small_distillation import first_batch, make_trial
from torch.nn.functional import cross_entropy

from utils.bert import matrices
from utils.distillation import losses, objective, precision
from utils.distillation.outputs import LiveTeacher, capture, size_of
from utils.encodings import decode


@pytest.mark.method("K-05", "K-06a")
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_grid_reaches_from_the_least_to_the_greatest_weight_of_a_bucket(bits):
    weight = torch.randn(3, 16)
    found = precision.FakeQuantizer(bits, 8)(weight).numpy()
    for row, start in np.ndindex(3, 2):
        bucket = weight[row, 8 * start : 8 * start + 8].numpy()
        levels = np.linspace(bucket.min(), bucket.max(), 2**bits)
        nearest = levels[np.abs(bucket[:, None] - levels).argmin(1)]
        np.testing.assert_allclose(found[row, 8 * start : 8 * start + 8], nearest, atol=1e-5)
    constant = torch.full((2, 8), 0.3)
    torch.testing.assert_close(precision.FakeQuantizer(bits, 8)(constant), constant)


@pytest.mark.method("K-05", "K-06a")
def test_a_step_takes_the_gradient_at_the_quantized_weight_and_moves_the_full_one(student_model, task):
    weight = torch.randn(4, 8, requires_grad=True)
    quantizer = precision.FakeQuantizer(2, 8)
    quantizer(weight).pow(3).sum().backward()
    torch.testing.assert_close(weight.grad, 3 * quantizer(weight).detach().pow(2))
    assert not torch.allclose(weight.grad, 3 * weight.detach().pow(2))


@pytest.mark.method("K-05", "K-06a")
def test_a_student_trains_in_low_precision_and_is_stored_in_it(teacher_model, task):
    student = copy.deepcopy(teacher_model)
    names = precision.lower_precision(student, 2, bucket=16)
    assert len(names) == 4 * 6 and size_of(student) == size_of(teacher_model)
    trial = make_trial(student, task)
    log = objective.distill(trial, precision.quantized_distillation(), LiveTeacher(teacher_model), steps=30, learning_rate=1e-3)
    assert sum(log.losses[-3:]) < sum(log.losses[:3])
    before = capture(student, first_batch(task)).logits
    stored = precision.burn_in(student)
    torch.testing.assert_close(capture(student, first_batch(task)).logits, before)
    for m in matrices(student):
        assert type(m.module) is torch.nn.Linear and torch.equal(decode(stored[m.name]), m.weight)
        assert all(len(row.unique()) <= 4 for row in m.weight.view(-1, 16))
    assert set(stored) == set(names)


@pytest.mark.method("K-05")
def test_apprentice_is_both_cross_entropies(teacher_model, student_model, task):
    batch = first_batch(task)
    mine, given = capture(student_model, batch).logits, capture(teacher_model, batch).logits
    soft = -(given.softmax(-1) * mine.log_softmax(-1)).sum(-1).mean()
    expected = 0.3 * cross_entropy(mine, batch["labels"]) + 0.6 * soft
    loss = objective.as_loss(precision.apprentice(0.3, 0.6), LiveTeacher(teacher_model))
    torch.testing.assert_close(loss(student_model, batch), expected)
    (first,) = torch.autograd.grad(loss(student_model, batch), student_model.classifier.weight)
    other = 0.3 * losses.labels() + 0.6 * losses.soft_targets(1.0)  # the entropy of the teacher has no gradient
    (second,) = torch.autograd.grad(
        objective.as_loss(other, LiveTeacher(teacher_model))(student_model, batch), student_model.classifier.weight
    )
    torch.testing.assert_close(first, second)
    with pytest.raises(ValueError, match="soft_weight must be finite"):
        precision.apprentice(0.5, -1.0)


@pytest.mark.method("K-06a")
def test_quantized_distillation_weighs_teacher_and_labels(teacher_model, student_model, task):
    batch, teacher = first_batch(task), LiveTeacher(teacher_model)
    parts = [objective.as_loss(one, teacher)(student_model, batch) for one in (losses.soft_targets(3.0), losses.labels())]
    found = objective.as_loss(precision.quantized_distillation(0.7, 3.0), teacher)(student_model, batch)
    torch.testing.assert_close(found, 0.7 * parts[0] + 0.3 * parts[1])


@pytest.mark.method("K-06b")
def test_every_entry_takes_the_nearest_level_and_gives_it_its_gradient():
    weight = torch.randn(6, 10)
    learned = precision.LearnedLevels(weight, 2)
    learned.levels.data = torch.tensor([0.9, -1.0, 0.1, -0.2])  # they may cross while they learn
    distances = (weight.unsqueeze(-1) - learned.levels.detach()).abs()
    assert torch.equal(learned.nearest(weight), distances.argmin(-1))
    factor = torch.randn(6, 10)
    (learned(weight) * factor).sum().backward()
    by_hand = torch.stack([factor[distances.argmin(-1) == k].sum() for k in range(4)])
    torch.testing.assert_close(learned.levels.grad, by_hand)


@pytest.mark.method("K-06b")
def test_levels_start_at_quantiles():
    learned = precision.LearnedLevels(torch.arange(100.0).view(10, 10), 2)
    assert learned.levels.tolist() == [12.0, 37.0, 62.0, 87.0]
    assert torch.bincount(learned.nearest(torch.arange(100.0)), minlength=4).tolist() == [25, 25, 25, 25]


@pytest.mark.method("K-06b")
def test_levels_learn_while_their_weights_stand_still(teacher_model, task):
    student = copy.deepcopy(teacher_model)
    names = precision.learn_levels(student, 2)
    held = student.bert.encoder.layer[1].intermediate.dense.parametrizations.weight
    original, levels = held.original.detach().clone(), held[0].levels.detach().clone()
    assert size_of(student) == size_of(teacher_model)
    log = objective.distill(
        make_trial(student, task), losses.soft_targets(2.0), LiveTeacher(teacher_model), steps=40, learning_rate=2e-3
    )
    assert sum(log.losses[-3:]) < 0.8 * sum(log.losses[:3])
    assert torch.equal(held.original, original) and not torch.equal(held[0].levels, levels)
    before, stored = capture(student, first_batch(task)).logits, precision.burn_in(student)
    torch.testing.assert_close(capture(student, first_batch(task)).logits, before)
    assert set(stored) == set(names)
    for m in matrices(student):
        assert torch.equal(decode(stored[m.name]), m.weight) and len(m.weight.unique()) <= 4 and m.weight.requires_grad


@pytest.mark.method("K-05", "K-06a", "K-06b")
@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_what_no_grid_has_is_refused(student_model, bits):
    for lower in (precision.lower_precision, precision.learn_levels):
        with pytest.raises(ValueError, match="whole number from 1 to 8"):
            lower(student_model, bits)
    with pytest.raises(ValueError, match="bucket must divide the 32 columns"):
        precision.lower_precision(student_model, 2, bucket=12)
    assert not any("parametrizations" in name for name, _ in student_model.named_parameters())
