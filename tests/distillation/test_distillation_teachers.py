"""Several teachers against one, torch's triplet loss, scipy's minimiser, and arithmetic on small tables."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from small_distillation import first_batch, make_bert, make_task, make_trial
from torch.nn.functional import cross_entropy, kl_div

from utils import training
from utils.distillation import layers, losses, objective, teachers
from utils.distillation.outputs import LiveTeacher, cached_teacher, capture, needs
from utils.distillation.teachers import AveragedTeachers, Opinion, SelectiveTeachers, Specialist


def value(of: objective.Objective, student: torch.nn.Module, teacher, batch: dict) -> torch.Tensor:
    return objective.as_loss(of, teacher)(student, batch)


# --- K-14 -----------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-14", "K-24")
def test_each_member_of_a_chain_learns_from_the_one_before(teacher_model, task):
    assistant, student = make_trial(make_bert(3, seed=1), task), make_trial(make_bert(1, seed=2), task)
    taught = []

    def teach(trial):
        taught.append(trial)
        return cached_teacher(trial.model, task)

    options = {"steps": 3, "learning_rate": 1e-3}
    teachers.teacher_assistant(
        LiveTeacher(teacher_model), [assistant, student], lambda i: losses.soft_targets(), teach, **options
    )
    assert taught == [assistant] and [assistant.steps, student.steps] == [3, 3]
    first, second = make_trial(make_bert(3, seed=1), task), make_trial(make_bert(1, seed=2), task)
    objective.distill(first, losses.soft_targets(), LiveTeacher(teacher_model), **options)
    objective.distill(second, losses.soft_targets(), cached_teacher(first.model, task), **options)
    torch.testing.assert_close(capture(student.model, first_batch(task)).logits, capture(second.model, first_batch(task)).logits)
    direct = make_trial(make_bert(1, seed=2), task)
    teachers.teacher_assistant(LiveTeacher(teacher_model), [direct], lambda i: losses.soft_targets(), teach, **options)
    assert not torch.allclose(
        capture(direct.model, first_batch(task)).logits, capture(second.model, first_batch(task)).logits, atol=1e-4
    )


@pytest.mark.method("K-14", "K-24")
def test_minilm_takes_an_assistant(teacher_model, task):
    trials = [make_trial(make_bert(2, hidden_size=16, seed=1), task), make_trial(make_bert(1, hidden_size=8, seed=2), task)]

    def teach(trial):
        return cached_teacher(trial.model, task, needs("scores", (2,)) + needs("values", (2,)))

    steps = [layers.mini_lm(2, 4), layers.mini_lm(1, 2)]
    live = LiveTeacher(teacher_model, steps[0].teacher)
    teachers.teacher_assistant(live, trials, lambda i: steps[i], teach, steps=25, learning_rate=2e-3)
    assert all(np.mean(trial.losses[-3:]) < np.mean(trial.losses[:3]) for trial in trials)


@pytest.mark.method("K-14")
def test_a_chain_that_grows_is_refused(student_model, teacher_model, task):
    for chain in ([], [make_trial(make_bert(1), task), make_trial(make_bert(2), task)]):
        with pytest.raises(ValueError, match="none larger than the one before"):
            teachers.teacher_assistant(LiveTeacher(teacher_model), chain, lambda i: losses.soft_targets(), lambda trial: None)


# --- K-15, K-23 -----------------------------------------------------------------------------------------------------


@pytest.mark.method("K-15")
def test_the_mean_of_teachers_is_that_of_their_probabilities(student_model, teacher_model, task):
    batch, T = first_batch(task), 2.0
    members = [LiveTeacher(teacher_model), LiveTeacher(make_bert(3, seed=7))]
    both = AveragedTeachers(members)
    p = sum((member(batch).logits / T).softmax(-1) for member in members) / 2
    q = (capture(student_model, batch).logits / T).log_softmax(-1)
    torch.testing.assert_close(
        value(teachers.averaged_targets(T, 1.0), student_model, both, batch), T**2 * kl_div(q, p, reduction="batchmean")
    )
    torch.testing.assert_close(both(batch).logits.softmax(-1), sum(member(batch).logits.softmax(-1) for member in members) / 2)
    plain = losses.with_labels(losses.soft_targets(T), 0.7)
    alone = value(teachers.averaged_targets(T, 0.7), student_model, AveragedTeachers(members[:1]), batch)
    torch.testing.assert_close(alone, value(plain, student_model, members[0], batch))  # one teacher: K-03
    assert both.size == members[0].size
    with pytest.raises(ValueError, match="one teacher or more"):
        AveragedTeachers([])


@pytest.mark.method("K-23")
def test_a_task_with_a_teacher_takes_the_mean_of_hard_and_soft(task):
    student, model, other = make_bert(1, num_labels=5), make_bert(2, num_labels=5, seed=3), make_bert(2, num_labels=5, seed=4)
    batch, task_of = first_batch(task), torch.tensor([0, 1] * 12)
    batch["labels"] = torch.tensor([0, 1, 2, 0, 1, 1, 0, 0])  # tasks of 3 and of 2 classes
    ensemble = AveragedTeachers([LiveTeacher(model), LiveTeacher(other)])
    mine, given = capture(student, batch).logits, [capture(one, batch).logits for one in (model, other)]
    first, second = torch.arange(0, 8, 2), torch.arange(1, 8, 2)
    hard = [cross_entropy(mine[first, :3], batch["labels"][first]), cross_entropy(mine[second, 3:], batch["labels"][second])]
    p = sum(z[first, :3].softmax(-1) for z in given) / 2
    soft = -(p * mine[first, :3].log_softmax(-1)).sum(-1).mean()
    expected = ((hard[0] + soft) / 2 + hard[1]) / 2  # as many sentences of each
    torch.testing.assert_close(value(teachers.multi_task([3, 2], [True, False], task_of), student, ensemble, batch), expected)
    neither = value(teachers.multi_task([3, 2], [False, False], task_of), student, ensemble, batch)
    torch.testing.assert_close(neither, sum(hard) / 2)


# --- K-16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-16")
def test_the_majority_decides_which_is_nearer():
    near, far = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [5.0], [2.0]])
    triplets = torch.tensor([[0, 1, 2], [1, 0, 2]])
    assert teachers.vote([near], triplets).tolist() == [True, True]  # |0-1| < |0-2|; |1-0| = |1-2|
    assert teachers.vote([far], triplets).tolist() == [False, False]
    assert teachers.vote([near, near, far], triplets).tolist() == [True, True]
    assert teachers.vote([near, far, far], triplets).tolist() == [False, False]


@pytest.mark.method("K-16")
def test_relative_dissimilarity_is_torchs_triplet_loss():
    states, triplets = torch.randn(6, 4), torch.tensor([[0, 1, 2], [3, 4, 5], [1, 5, 0]])
    nearer = torch.tensor([True, False, True])
    positive, negative = torch.tensor([1, 5, 5]), torch.tensor([2, 4, 0])
    reference = torch.nn.TripletMarginLoss(margin=0.7, eps=0.0)(states[[0, 3, 1]], states[positive], states[negative])
    torch.testing.assert_close(teachers.relative_dissimilarity(states, triplets, nearer, 0.7), reference)
    by_hand = [max(0.0, (states[i] - states[a]).norm().item() - (states[i] - states[b]).norm().item() + 0.7)
               for i, a, b in zip([0, 3, 1], positive, negative, strict=True)]  # fmt: skip
    assert reference.item() == pytest.approx(np.mean(by_hand), rel=1e-5)


@pytest.mark.method("K-16")
def test_a_student_that_agrees_with_the_vote_pays_no_more_than_the_margin(teacher_model, task):
    batch = first_batch(task)
    ensemble = AveragedTeachers([LiveTeacher(teacher_model, needs("cls", (layer,))) for layer in (4, 4)])
    assert value(teachers.voted_dissimilarity(4, [4, 4], margin=0.0), teacher_model, ensemble, batch) == 0
    assert 0 < value(teachers.voted_dissimilarity(4, [4, 4], margin=0.1), teacher_model, ensemble, batch) <= 0.1
    assert value(teachers.voted_dissimilarity(4, [4, 4]), make_bert(4, seed=5), ensemble, first_batch(task, 2)) == 0  # no triplet
    student = make_bert(2, seed=9)
    assert value(teachers.voted_dissimilarity(2, [4, 4], margin=0.0), student, ensemble, batch) > 0
    trial = make_trial(student, task)
    log = objective.distill(trial, teachers.voted_dissimilarity(2, [4, 4]), ensemble, steps=30, learning_rate=1e-3)
    assert np.mean(log.losses[-5:]) < np.mean(log.losses[:5])


@pytest.mark.method("K-16")
def test_triplets_are_of_three_different_examples():
    found = teachers.random_triplets(200, 5, torch.device("cpu"))
    assert found.shape == (200, 3) and all(len(set(row)) == 3 for row in found.tolist()) and len(found.unique()) == 5


@pytest.mark.method("K-16")
def test_as_many_layers_as_teachers(teacher_model, student_model, task):
    ensemble = AveragedTeachers([LiveTeacher(teacher_model, needs("cls", (4,)))])
    with pytest.raises(ValueError, match="there are 1 and 2 layers"):
        value(teachers.voted_dissimilarity(2, [4, 4]), student_model, ensemble, first_batch(task))


# --- K-17 -----------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-17")
def test_subsets_are_the_classes_that_are_confused():
    """The generalist knows which pair it is in, and never which of the two."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.randint(0, 3, (300,), generator=generator)
    probabilities = torch.zeros(300, 6)
    for row, k in enumerate(pair.tolist()):
        probabilities[row, [k, k + 3]] = 0.5  # classes 0 and 3, 1 and 4, 2 and 5
    assert sorted(teachers.confusable_subsets(probabilities, 3)) == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match=r"count must lie in 1\.\.5"):
        teachers.confusable_subsets(probabilities, 6)


@pytest.mark.method("K-17")
def test_merging_labels_and_probabilities_agree():
    probabilities = torch.eye(4)
    merged = teachers.merge_probabilities(probabilities, [2, 0])
    assert merged.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert teachers.merge_labels(torch.arange(4), [2, 0]).tolist() == merged.argmax(-1).tolist()


@pytest.mark.method("K-17")
def test_a_specialist_trains_half_on_its_subset():
    task = make_task(classes=6, count=60)
    special, oversampled = teachers.specialist_task(task, [1, 4])
    assert torch.bincount(special.train.labels).tolist() == [10, 10, 20] and special.label_names == [
        "class 1",
        "class 4",
        "other",
    ]
    assert oversampled == pytest.approx(40 / 20)  # 40 others, of which 20 were drawn
    for ids, label in zip(special.train.input_ids, special.train.labels.tolist(), strict=True):
        place = task.train.input_ids.index(ids)
        assert label == {1: 0, 4: 1}.get(task.train.labels[place].item(), 2)
    assert len(special.validation) == len(task.validation) and special.train.data["label"] == special.train.labels.tolist()
    again, _ = teachers.specialist_task(task, [1, 4], seed=1)
    assert again.train.input_ids != special.train.input_ids and again.key != special.key
    with pytest.raises(ValueError, match="and not all"):
        teachers.specialist_task(task, range(6))


@pytest.mark.method("K-17")
def test_the_dustbin_is_put_right_for_the_sampling():
    """Bayes: a class seen `rate` times too rarely has its odds multiplied by the rate."""
    logits, rate = torch.randn(5, 3), 4.0
    p = logits.softmax(-1)
    expected = p * torch.tensor([1.0, 1.0, rate])
    torch.testing.assert_close(teachers.unbiased(logits, rate).softmax(-1), expected / expected.sum(-1, keepdim=True))


@pytest.mark.method("K-17")
def test_a_specialist_starts_from_the_generalist(task):
    generalist = make_bert(2, num_labels=5)
    generalist.classifier.bias.data = torch.randn(5)
    special, batch = teachers.specialist_from(generalist, [3, 1]), first_batch(task)
    mine, given = capture(special, batch).logits, capture(generalist, batch).logits
    torch.testing.assert_close(mine[:, :2], given[:, [3, 1]])
    torch.testing.assert_close(mine[:, 2], given[:, [0, 2, 4]].mean(-1) + math.log(3))
    assert special.config.num_labels == 3 and generalist.config.num_labels == 5


@pytest.fixture
def opinions():
    generator = torch.Generator().manual_seed(4)
    generalist = torch.randn(4, 5, generator=generator).softmax(-1)
    found = [Opinion(torch.randn(4, 3, generator=generator).softmax(-1), subset) for subset in ([0, 1], [2, 4])]
    return generalist, found


@pytest.mark.method("K-17")
def test_active_specialists_are_those_of_the_likely_classes(opinions):
    generalist, found = opinions
    logits = torch.randn(4, 5)
    q = logits.softmax(-1)
    loss = teachers.specialist_loss(logits, generalist, found, top=2)
    activity = 0
    for row in range(4):
        expected = kl_div(q[row].log(), generalist[row], reduction="sum")
        for p, subset in found:
            if set(generalist[row].argsort(descending=True)[:2].tolist()) & set(subset):
                rest = [k for k in range(5) if k not in subset]
                merged = torch.stack([*(q[row, k] for k in subset), q[row, rest].sum()])
                expected, activity = expected + (p[row] * (p[row] / merged).log()).sum(), activity + 1
        assert loss[row].item() == pytest.approx(expected.item(), rel=1e-4)
    assert activity > 0  # some are at work


@pytest.mark.method("K-17")
def test_the_combined_prediction_is_the_minimum(opinions):
    generalist, found = opinions
    q = teachers.combined_prediction(generalist, found, top=2)
    torch.testing.assert_close(q.sum(-1), torch.ones(4))
    for row in range(4):
        own = [Opinion(p[row : row + 1].double(), subset) for p, subset in found]

        def loss(z: np.ndarray, row: int = row, own: list = own) -> float:
            return teachers.specialist_loss(torch.from_numpy(z)[None], generalist[row : row + 1].double(), own, 2).item()

        best = minimize(
            loss, np.zeros(5), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 20000, "maxfev": 20000}
        )
        assert loss(q[row].double().log().numpy()) <= best.fun + 1e-7
    alone = teachers.combined_prediction(generalist, [])
    torch.testing.assert_close(alone, generalist, atol=1e-4, rtol=1e-3)  # no specialist: the generalist


@pytest.mark.method("K-17")
def test_a_student_learns_from_generalist_and_specialists(student_model, teacher_model, task):
    batch, generalist = first_batch(task), LiveTeacher(teacher_model)
    none = value(teachers.specialist_targets([]), student_model, generalist, batch)
    torch.testing.assert_close(none, value(losses.soft_targets(1.0), student_model, generalist, batch))
    special = teachers.specialist_from(teacher_model, [0, 1])
    one = Specialist(cached_teacher(special, task), [0, 1], 2.0)
    opinion = Opinion(teachers.unbiased(capture(special, batch).logits, 2.0).softmax(-1), [0, 1])
    expected = teachers.specialist_loss(capture(student_model, batch).logits, generalist(batch).logits.softmax(-1), [opinion])
    torch.testing.assert_close(value(teachers.specialist_targets([one]), student_model, generalist, batch), expected.mean())


# --- K-18 -----------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-18")
def test_the_best_classes_are_kept_and_all_of_them_are_exact():
    teacher, student = torch.randn(6, 5), torch.randn(6, 5)
    p = teacher.softmax(-1)
    full = teachers.top_loss(student, *teachers.top_probabilities(teacher, 5))
    torch.testing.assert_close(full, -(p * student.log_softmax(-1)).sum(-1))
    kept, classes = teachers.top_probabilities(teacher, 2)
    for row in range(6):
        best = p[row].argsort(descending=True)[:2]
        assert classes[row].tolist() == best.tolist()
        torch.testing.assert_close(kept[row], p[row, best] / p[row, best].sum())
    one = teachers.top_loss(student, *teachers.top_probabilities(teacher, 1))
    torch.testing.assert_close(one, cross_entropy(student, teacher.argmax(-1), reduction="none"))
    with pytest.raises(ValueError, match=r"count must lie in 1\.\.5, got 6"):
        teachers.top_probabilities(teacher, 6)


@pytest.fixture
def selective(teacher_model):
    members = [LiveTeacher(teacher_model), LiveTeacher(make_bert(3, seed=7))]
    return SelectiveTeachers(members, torch.tensor([0, 1] * 12), [80.0, 60.0], threshold=1.0, top=2)


@pytest.mark.method("K-18")
def test_a_teacher_is_left_once_it_is_beaten_by_the_threshold(selective):
    assert selective.active == [True, True]
    changes = 0
    for accuracies, active in (([80.9, 61.0], [True, False]), ([81.0, 60.5], [False, True]), ([79.0, 59.0], [True, True])):
        changes += sum(now != then for now, then in zip(active, selective.active, strict=True))
        selective.review(accuracies)
        assert selective.active == active and selective.switches == changes


@pytest.mark.method("K-18")
def test_each_part_has_its_teacher_and_without_it_the_labels(selective, student_model, task):
    batch, kappa = first_batch(task), 0.4
    outputs = [teacher(batch).logits for teacher in selective.teachers]
    mine, labels = capture(student_model, batch).logits, batch["labels"]
    expected = {True: [], False: []}  # is the second teacher active?
    for row in range(8):
        hard = cross_entropy(mine[row : row + 1], labels[row : row + 1])
        p = outputs[row % 2][row : row + 1]
        soft = teachers.top_loss(mine[row : row + 1], *teachers.top_probabilities(p, 2))[0]
        for active, found in expected.items():
            found.append((1 - kappa) * hard + kappa * soft if active or row % 2 == 0 else hard)
    for accuracies, active in (([0.0, 0.0], True), ([0.0, 99.0], False)):
        selective.review(accuracies)
        torch.testing.assert_close(
            value(selective.objective(kappa), student_model, selective, batch), torch.stack(expected[active]).mean()
        )
    assert (selective.seen, selective.taught) == (16, 8 + 4)  # in the second pass the odd rows have no teacher


@pytest.mark.method("K-18")
def test_teachers_are_reviewed_as_the_student_trains(selective, student_model, task):
    asked = []

    def accuracies(model: torch.nn.Module) -> list[float]:
        asked.append(model)
        model.eval()
        return [99.0, 10.0]

    trial = make_trial(student_model, task)
    hook = selective.reviewing(2, accuracies)
    objective.distill(trial, selective.objective(), selective, steps=5, after_step=hook)
    assert len(asked) == 2 and selective.active == [False, True]
    training.make_optimizer(student_model, 1, 1e-3)
    hook(4, student_model, None)
    assert student_model.training  # an evaluation in between does not end the training
    with pytest.raises(ValueError, match="every must be at least 1"):
        selective.reviewing(0, accuracies)
    with pytest.raises(ValueError, match="one accuracy and one teacher for each part"):
        SelectiveTeachers(selective.teachers[:1], torch.tensor([0, 1]), [80.0], 1.0)
