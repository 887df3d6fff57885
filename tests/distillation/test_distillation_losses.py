"""Losses of section 4.1 against closed forms, finite differences, and the simpler method at the limiting parameter."""

import numpy as np
import pytest
import torch
from small_distillation import first_batch, make_bert, make_trial
from torch.nn.functional import cross_entropy

from utils.distillation import layers, losses, objective, precision, teachers
from utils.distillation.outputs import LiveTeacher, Outputs, capture, needs

CLASSES = 5


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, CLASSES, generator=generator, dtype=torch.float64) for _ in range(2)]


def value(of: objective.Objective, student: torch.nn.Module, teacher: torch.nn.Module, batch: dict) -> torch.Tensor:
    return objective.as_loss(of, LiveTeacher(teacher, of.teacher))(student, batch)


ZERO_AT_THE_TEACHER = {
    "K-01": losses.logit_regression,
    "K-02": lambda: losses.noisy_logit_regression(0.0, 1.0),
    "K-03": lambda: losses.soft_targets(4.0),
    "K-04": losses.sobolev,
    "K-07": lambda: losses.hints(2, 2, objective.projector(32, 32)),
    "K-08": lambda: losses.flow_matrices([(1, 2), (2, 4)], [(1, 2), (2, 4)], objective.projector(32, 32), width=8),
    "K-09": lambda: losses.representational_distance({2: 2, 4: 4}),
    "K-17": lambda: teachers.specialist_targets([]),
    "K-20a": lambda: layers.patience({2: 2, 3: 3}),
    "K-22": lambda: layers.tiny_bert_layers({1: 1, 4: 4}, objective.projector(32, 32)),
    "K-24": lambda: layers.mini_lm(4, 4),
    "K-26": lambda: layers.earth_movers(4, 4, objective.projector(32, 32)),
}


@pytest.mark.method("K-01", "K-02", "K-03", "K-04", "K-07", "K-08", "K-09", "K-17", "K-20a", "K-22", "K-24", "K-26")
@pytest.mark.parametrize("method", ZERO_AT_THE_TEACHER)
def test_a_student_that_is_its_teacher_loses_nothing_and_any_other_does(method, teacher_model, task):
    batch, made = first_batch(task), ZERO_AT_THE_TEACHER[method]()
    assert value(made, teacher_model, teacher_model, batch).abs() < 1e-5
    other = make_bert(4, seed=5)
    loss = value(made, other, teacher_model, batch)
    assert loss > 1e-3
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in other.parameters())
    assert all(p.grad is None for p in teacher_model.parameters())  # also where the teacher's gradient is taken (K-04)


@pytest.mark.method("K-07", "K-08", "K-09", "K-20a", "K-20b", "K-22", "K-24", "K-26")
@pytest.mark.parametrize("method", ["K-07", "K-08", "K-09", "K-20a", "K-22", "K-24", "K-26"])
def test_padding_changes_no_loss(method, teacher_model, task):
    other, made, batch = make_bert(4, seed=5), ZERO_AT_THE_TEACHER[method](), first_batch(task)
    pad = torch.nn.functional.pad
    wider = batch | {name: pad(batch[name], (0, 5)) for name in ("input_ids", "attention_mask")}
    plain = value(made, other, teacher_model, batch)
    made = ZERO_AT_THE_TEACHER[method]()  # BERT-EMD's weights have moved
    torch.testing.assert_close(value(made, other, teacher_model, wider), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.method("K-01", "K-03", "K-10")
def test_gradients_by_finite_differences(logits):
    student, teacher = logits[0].requires_grad_(), logits[1]
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda z: losses.logit_loss(z, teacher), student)
    assert gradcheck(lambda z: losses.soft_target_loss(z, teacher, 3.0), student)
    words = torch.tensor([0, 1, 2, -100, 4, -100])
    assert gradcheck(lambda z: losses.word_level_loss(z, teacher, words, 0.3), student)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    states = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v: losses.hint_loss(v, torch.zeros_like(v), mask), states)


@pytest.mark.method("K-01")
def test_logit_regression_is_half_the_squared_distance_of_centred_logits(logits):
    student, teacher = logits
    centred = [z.numpy() - z.numpy().mean(1, keepdims=True) for z in logits]
    assert losses.logit_loss(student, teacher).item() == pytest.approx(0.5 * ((centred[0] - centred[1]) ** 2).sum(1).mean())
    shifted = teacher + torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(losses.logit_loss(student, shifted), losses.logit_loss(student, teacher))


@pytest.mark.method("K-02")
def test_noise_has_its_share_and_size_and_vanishes_at_zero():
    z = torch.full((4000, CLASSES), 2.0)
    noisy = losses.add_noise(z, 0.3, 0.5)
    changed = (noisy != z).any(1)
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (noisy - z)[changed].std().item() == pytest.approx(0.5, rel=0.03)
    assert abs((noisy - z)[changed].mean().item()) < 0.03
    assert (losses.add_noise(z, 1.0, 0.5, relative=True) - z).std().item() == pytest.approx(1.0, rel=0.03)  # times the logit 2
    assert torch.equal(losses.add_noise(z, 0.0, 0.5), z) and torch.equal(losses.add_noise(z, 1.0, 0.0), z)
    student, teacher = torch.randn(8, CLASSES), torch.randn(8, CLASSES)
    mask = torch.ones(8, 1)
    torch.manual_seed(5)
    loss = losses.noisy_logit_regression(0.5, 2.0).loss(Outputs(student, mask), Outputs(teacher, mask), {})
    torch.manual_seed(5)
    torch.testing.assert_close(loss, losses.logit_loss(student, losses.add_noise(teacher, 0.5, 2.0)))
    assert loss != losses.logit_loss(student, teacher)
    for share, sigma, told in ((1.2, 0.1, "share of noisy"), (0.5, -1.0, "sigma")):
        with pytest.raises(ValueError, match=told):
            losses.noisy_logit_regression(share, sigma)


@pytest.mark.method("K-03")
def test_soft_targets_tend_to_logit_regression_and_have_hintons_gradient(logits):
    student, teacher = logits[0].requires_grad_(), logits[1]
    limit = losses.logit_loss(student, teacher) / CLASSES
    errors = [abs(losses.soft_target_loss(student, teacher, T) - limit).item() for T in (10.0, 100.0, 1000.0)]
    assert errors[0] > 5 * errors[1] > 25 * errors[2] and errors[2] < 1e-2 * limit.item()
    T = 2.5
    (gradient,) = torch.autograd.grad(losses.soft_target_loss(student, teacher, T), student)
    by_hand = T * ((student / T).softmax(-1) - (teacher / T).softmax(-1)) / len(student)  # T^2 * (1 / T) * (q - p)
    torch.testing.assert_close(gradient, by_hand)


@pytest.mark.method("K-03", "K-15", "K-20a", "K-20b", "K-05", "K-06a")
def test_without_the_teachers_share_it_is_cross_entropy(teacher_model, student_model, task):
    batch = first_batch(task)
    reference = cross_entropy(capture(student_model, batch).logits, batch["labels"])
    patient = layers.patient_distillation({1: 2}, teacher_weight=0.0, patience_weight=0.0)
    for made in (losses.with_labels(losses.soft_targets(), 0.0), teachers.averaged_targets(2.0, 0.0), patient,
                 precision.apprentice(1.0, 0.0), precision.quantized_distillation(0.0)):  # fmt: skip
        torch.testing.assert_close(value(made, student_model, teacher_model, batch), reference)
    torch.testing.assert_close(value(losses.labels(), student_model, teacher_model, batch), reference)


@pytest.mark.method("K-04")
def test_the_input_gradient_is_the_slope_along_the_input(student_model, task):
    batch, model = first_batch(task), student_model.double()
    direction = torch.nn.functional.normalize(torch.randn(8, 3, dtype=torch.float64), dim=-1)
    found = capture(model, batch, needs("inputs", (0,)))
    gradient = losses.input_gradient(found, direction, create_graph=False)
    x, step, eps = found["inputs", 0].detach(), torch.randn(found["inputs", 0].shape, dtype=torch.float64), 1e-5

    def scalar(inputs: torch.Tensor) -> torch.Tensor:
        logits = model(inputs_embeds=inputs, attention_mask=batch["attention_mask"]).logits
        return (direction * logits.log_softmax(-1)).sum()

    slope = (scalar(x + eps * step) - scalar(x - eps * step)) / (2 * eps)
    assert (gradient * step).sum().item() == pytest.approx(slope.item(), rel=1e-3)


@pytest.mark.method("K-04")
def test_sobolev_differentiates_twice_and_sees_no_shift_of_the_logits(teacher_model, student_model, task):
    batch, want = first_batch(task), needs("inputs", (0,))
    direction = torch.nn.functional.normalize(torch.randn(8, 3), dim=-1)
    weight = student_model.bert.encoder.layer[0].intermediate.dense.weight

    def loss() -> torch.Tensor:
        with torch.enable_grad():
            return losses.sobolev_loss(capture(student_model, batch, want), LiveTeacher(teacher_model, want)(batch), direction)

    (gradient,) = torch.autograd.grad(loss(), weight)
    step, eps = gradient / gradient.norm(), 1e-2
    with torch.no_grad():
        weight += eps * step
        above = loss().item()
        weight -= 2 * eps * step
        below = loss().item()
        weight += eps * step
    assert (above - below) / (2 * eps) == pytest.approx(gradient.norm().item(), rel=2e-2)
    before = loss().item()
    student_model.classifier.bias.data += 3.0
    assert loss().item() == pytest.approx(before, rel=1e-4)
    student_model.classifier.bias.data[0] += 3.0
    assert loss().item() != pytest.approx(before, rel=1e-2)


@pytest.mark.method("K-04")
def test_sobolev_with_no_weight_is_soft_targets_and_needs_one_embedding_width(teacher_model, student_model, task):
    batch = first_batch(task)
    plain = value(losses.soft_targets(1.0), student_model, teacher_model, batch)
    torch.testing.assert_close(value(losses.sobolev(0.0), student_model, teacher_model, batch), plain)
    with pytest.raises(ValueError, match="theirs are 16 and 32 wide"):
        value(losses.sobolev(), make_bert(2, hidden_size=16), teacher_model, batch)


@pytest.mark.method("K-07")
def test_a_hint_reaches_the_guided_layer_and_nothing_above(teacher_model, student_model, task):
    loss = value(losses.hints(1, 2), student_model, teacher_model, first_batch(task))
    loss.backward()
    below, above = student_model.bert.encoder.layer
    assert below.output.dense.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*above.parameters(), *student_model.classifier.parameters()])


@pytest.mark.method("K-07")
def test_the_hint_loss_is_a_mean_over_real_tokens():
    guided, hint = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    real = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    by_hand = np.mean([0.5 * ((guided[i, j] - hint[i, j]) ** 2).mean().item() for i, j in real])
    assert losses.hint_loss(guided, hint, mask).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.method("K-08")
def test_the_gram_matrix_is_a_mean_of_outer_products_of_real_tokens():
    lower, upper = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    found = losses.gram(lower, upper, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    for one, n in ((0, 3), (1, 2)):
        torch.testing.assert_close(found[one], sum(torch.outer(lower[one, k], upper[one, k]) for k in range(n)) / n)


@pytest.mark.method("K-08")
def test_the_random_projection_of_the_flow_is_one_for_both_and_preserves_size(teacher_model, task):
    batch, other = first_batch(task), make_bert(4, seed=5)
    sizes = [
        value(losses.flow_matrices([(1, 3)], [(1, 3)], width=512, seed=s), other, teacher_model, batch).item() * 512**2
        for s in (0, 1)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)
    wanted = needs("hidden", (1, 3))
    full = [
        losses.gram(o["hidden", 1], o["hidden", 3], batch["attention_mask"])
        for o in (capture(other, batch, wanted), capture(teacher_model, batch, wanted))
    ]
    assert sizes[0] == pytest.approx((full[0] - full[1]).pow(2).sum((1, 2)).mean().item(), rel=0.3)
    for pairs in ([], [(1, 2), (2, 3)]):
        with pytest.raises(ValueError, match="as many pairs of student layers"):
            losses.flow_matrices(pairs, [(1, 2)] if pairs else [])


@pytest.mark.method("K-09")
def test_distances_are_squared_means_and_see_no_rotation():
    states = torch.randn(5, 8)
    reference = torch.cdist(states.double(), states.double()).pow(2) / 8
    torch.testing.assert_close(losses.distance_matrix(states).double(), reference, atol=1e-5, rtol=1e-4)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert losses.distance_loss(states @ rotation, states) < 1e-9
    twice = losses.distance_loss(2**0.5 * states, states)  # all distances double
    pairs = np.triu_indices(5, 1)
    assert twice.item() == pytest.approx((reference.numpy()[pairs] ** 2).mean(), rel=1e-4)
    assert losses.distance_loss(states[:1], states[:1]) == 0


@pytest.mark.method("K-10")
def test_word_level_is_k03_at_every_word_to_predict(logits):
    student, teacher = (z.view(2, 3, CLASSES) for z in logits)
    words = torch.tensor([[0, -100, 2], [-100, 4, 1]])
    here = [(0, 0), (0, 2), (1, 1), (1, 2)]
    rows = [torch.stack([z[i, j] for i, j in here]) for z in (student, teacher)]
    soft = losses.soft_target_loss(*rows, 2.0)
    hard = cross_entropy(rows[0], torch.tensor([0, 2, 4, 1]))
    torch.testing.assert_close(losses.word_level_loss(student, teacher, words, 1.0, 2.0), soft)
    torch.testing.assert_close(losses.word_level_loss(student, teacher, words, 0.0, 2.0), hard)
    torch.testing.assert_close(losses.word_level_loss(student, teacher, words, 0.25, 2.0), 0.25 * soft + 0.75 * hard)


@pytest.mark.method("K-11a", "K-11b")
def test_interpolation_lies_between_labels_and_the_teachers_best(teacher_model, student_model, task):
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.45, 0.5, 0.05], [0.2, 0.75, 0.05]]).log()
    gold = torch.tensor([0, 0, 2])
    assert losses.nearest_outputs(teacher, gold, 0.4).tolist() == [0, 0, 1]
    assert losses.nearest_outputs(teacher, gold, 0.5).tolist() == [0, 1, 1]
    batch = first_batch(task)
    best, label = (value(one, student_model, teacher_model, batch) for one in (losses.best_outputs(), losses.labels()))
    torch.testing.assert_close(value(losses.interpolated_outputs(0.0), student_model, teacher_model, batch), label)
    torch.testing.assert_close(value(losses.interpolated_outputs(1.1), student_model, teacher_model, batch), best)
    pseudo = capture(teacher_model, batch).logits.argmax(-1)
    assert not torch.equal(pseudo, batch["labels"])
    torch.testing.assert_close(best, cross_entropy(capture(student_model, batch).logits, pseudo))


@pytest.mark.method("K-11c")
def test_an_ensembles_output_is_the_class_of_the_mean(student_model, teacher_model, task):
    batch = first_batch(task)
    members = [LiveTeacher(make_bert(1, seed=seed)) for seed in range(5)]
    ensemble = teachers.AveragedTeachers(members)
    mean = sum(member(batch).logits.softmax(-1) for member in members)
    found = objective.as_loss(losses.ensemble_outputs(), ensemble)(student_model, batch)
    torch.testing.assert_close(found, cross_entropy(capture(student_model, batch).logits, mean.argmax(-1)))
    mask, own = torch.ones(1, 1), [[0.6, 0.35, 0.05], [0.05, 0.45, 0.5], [0.05, 0.45, 0.5]]
    torn = Outputs(torch.zeros(1, 3), mask, {}, tuple(Outputs(torch.tensor([p]).log(), mask) for p in own))
    student = torch.tensor([[0.1, 0.7, -0.4]])
    compromise = cross_entropy(student, torch.tensor([1]))  # the mean's class, and no member's own
    torch.testing.assert_close(losses.ensemble_outputs().loss(Outputs(student, mask), torn, {}), compromise)
    one = objective.as_loss(losses.ensemble_outputs(), teachers.AveragedTeachers([LiveTeacher(teacher_model)]))
    torch.testing.assert_close(one(student_model, batch), value(losses.best_outputs(), student_model, teacher_model, batch))
    with pytest.raises(ValueError, match="an ensemble is needed"):
        value(losses.ensemble_outputs(), student_model, teacher_model, batch)


@pytest.mark.method("K-01", "K-03")
def test_objectives_add_and_multiply(teacher_model, student_model, task):
    batch = first_batch(task)
    first, second = losses.logit_regression(), losses.hints(1, 2, objective.projector(32, 32))
    both = 0.5 * first + 2.0 * second
    parts = [value(one, student_model, teacher_model, batch) for one in (first, second)]
    torch.testing.assert_close(value(both, student_model, teacher_model, batch), 0.5 * parts[0] + 2.0 * parts[1])
    assert both.student == (("hidden", 1),) and both.teacher == (("hidden", 2),) and both.modules == second.modules


@pytest.mark.method("K-01", "K-03")
@pytest.mark.parametrize("made", [losses.logit_regression(), losses.soft_targets()])
def test_a_student_comes_nearer_to_its_teacher(made, teacher_model, student_model, task):
    trial = make_trial(student_model, task)
    log = objective.distill(trial, made, LiveTeacher(teacher_model), steps=30, learning_rate=1e-3)
    assert sum(log.losses[-3:]) < 0.5 * sum(log.losses[:3])
