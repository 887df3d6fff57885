"""Losses between layers against loops over tokens, the authors' arithmetic, and an assignment problem for the earth mover."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from small_distillation import first_batch, make_bert

from utils.distillation import layers, losses, objective
from utils.distillation.outputs import LiveTeacher, capture, needs


def value(of: objective.Objective, student: torch.nn.Module, teacher: torch.nn.Module, batch: dict) -> torch.Tensor:
    return objective.as_loss(of, LiveTeacher(teacher, of.teacher))(student, batch)


# --- K-20 -----------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-20a", "K-20b")
def test_patience_compares_directions(teacher_model, student_model, task):
    batch, pairs = first_batch(task), {1: 2, 2: 3}
    mine = capture(student_model, batch, needs("cls", (1, 2)))
    given = capture(teacher_model, batch, needs("cls", (2, 3)))
    total = 0.0
    for i, j in pairs.items():
        a, b = (x.detach().numpy() for x in (mine["cls", i], given["cls", j]))
        total += np.mean([np.mean((p / np.linalg.norm(p) - q / np.linalg.norm(q)) ** 2) for p, q in zip(a, b, strict=True)])
    assert value(layers.patience(pairs), student_model, teacher_model, batch).item() == pytest.approx(total / 2, rel=1e-5)
    states = torch.randn(4, 8)
    assert layers.patience_loss(3 * states, states) < 1e-12 < layers.patience_loss(-states, states)


@pytest.mark.method("K-20a", "K-20b")
def test_pkd_without_patience_is_k03(teacher_model, student_model, task):
    batch = first_batch(task)
    patient = layers.patient_distillation({1: 2}, patience_weight=0.0, temperature=5.0, teacher_weight=0.3)
    plain = losses.with_labels(losses.soft_targets(5.0), 0.3)
    torch.testing.assert_close(
        value(patient, student_model, teacher_model, batch), value(plain, student_model, teacher_model, batch)
    )
    more = layers.patient_distillation({1: 2}, patience_weight=10.0, temperature=5.0, teacher_weight=0.3)
    term = value(layers.patience({1: 2}), student_model, teacher_model, batch)
    torch.testing.assert_close(
        value(more, student_model, teacher_model, batch) - value(plain, student_model, teacher_model, batch), 10 * term
    )


# --- K-22 -----------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-22")
def test_tinybert_is_embeddings_states_and_scores_over_real_tokens(teacher_model, task):
    student, batch, pairs = make_bert(2, hidden_size=16, seed=1), first_batch(task), {1: 2, 2: 4}
    projection = objective.projector(16, 32)
    mine = capture(student, batch, needs("hidden", range(3)) + needs("scores", (1, 2)))
    given = capture(teacher_model, batch, needs("hidden", range(5)) + needs("scores", range(1, 5)))
    lengths = batch["attention_mask"].sum(1).tolist()
    total = 0.0
    for i, j in {0: 0, **pairs}.items():
        errors = [
            (projection(mine["hidden", i][row, :n]) - given["hidden", j][row, :n]).pow(2).flatten()
            for row, n in enumerate(lengths)
        ]
        total += torch.cat(errors).mean()
    for i, j in pairs.items():
        errors = [
            (mine["scores", i][row, :, :n, :n] - given["scores", j][row, :, :n, :n]).pow(2).flatten()
            for row, n in enumerate(lengths)
        ]
        total += torch.cat(errors).mean()
    made = layers.tiny_bert_layers(pairs, projection)
    torch.testing.assert_close(value(made, student, teacher_model, batch), total)
    assert set(made.modules) == {projection}
    value(made, student, teacher_model, batch).backward()
    assert projection.weight.grad.abs().sum() > 0 and student.classifier.weight.grad is None


@pytest.mark.method("K-22", "K-24", "K-26")
def test_heads_that_do_not_match_are_refused(teacher_model, task):
    student = make_bert(2, num_attention_heads=2)
    for made in (layers.attention_scores({1: 2}), layers.mini_lm(2, 4), layers.value_relation(2, 4), layers.earth_movers(2, 4)):
        with pytest.raises(ValueError, match="the student has 2, its teacher 4"):
            value(made, student, teacher_model, first_batch(task))


# --- K-24 -----------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-24")
def test_minilm_is_the_divergence_of_attention_and_of_value_relations(teacher_model, task):
    student, batch = make_bert(2, hidden_size=16, seed=1), first_batch(task)  # narrower heads
    mine = capture(student, batch, needs("scores", (2,)) + needs("values", (2,)))
    given = capture(teacher_model, batch, needs("scores", (4,)) + needs("values", (4,)))
    rows = {"attention": [], "values": []}
    for row, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        for head, place in itertools.product(range(4), range(n)):
            p, q = (one["scores", layer][row, head, place, :n].softmax(-1) for one, layer in ((given, 4), (mine, 2)))
            rows["attention"].append((p * (p / q).log()).sum())
            relations = []
            for one, layer in ((given, 4), (mine, 2)):
                v = one["values", layer][row, head, :n]
                relations.append((v @ v[place] / v.shape[-1] ** 0.5).softmax(-1))
            rows["values"].append((relations[0] * (relations[0] / relations[1]).log()).sum())
    expected = {name: torch.stack(found).mean() for name, found in rows.items()}
    torch.testing.assert_close(
        value(layers.attention_relation(2, 4), student, teacher_model, batch), expected["attention"], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        value(layers.value_relation(2, 4), student, teacher_model, batch), expected["values"], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        value(layers.mini_lm(2, 4), student, teacher_model, batch), sum(expected.values()), rtol=1e-4, atol=1e-6
    )


# --- K-26 -----------------------------------------------------------------------------------------------------------


def cheapest_assignment(cost: np.ndarray, student: list[int], teacher: list[int]) -> float:
    """Weights in whole parts of their sum: each part is a worker or a job, so that the least flow is an assignment."""
    i, j = np.repeat(np.arange(len(student)), student), np.repeat(np.arange(len(teacher)), teacher)
    expanded = cost[np.ix_(i, j)]
    return expanded[linear_sum_assignment(expanded)].sum() / sum(student)


@pytest.mark.method("K-26")
@pytest.mark.parametrize(
    "student, teacher", [([1, 1], [1, 1]), ([3, 1, 2], [1, 1, 1, 3]), ([5, 5], [1, 2, 3, 4]), ([10], [4, 6])]
)
def test_the_earth_movers_flow_costs_what_the_cheapest_assignment_costs(student, teacher):
    generator = np.random.default_rng(0)
    for _ in range(5):
        cost = generator.random((len(student), len(teacher)))
        weights = [np.array(one) / sum(one) for one in (student, teacher)]
        flow = layers.earth_movers_flow(cost, *weights)
        assert (flow * cost).sum() == pytest.approx(cheapest_assignment(cost, student, teacher), abs=1e-9)
        np.testing.assert_allclose(flow.sum(1), weights[0], atol=1e-9)
        np.testing.assert_allclose(flow.sum(0), weights[1], atol=1e-9)
        assert flow.min() >= 0


@pytest.mark.method("K-26")
def test_weights_that_are_none_are_refused():
    for student, teacher in (([0.5, 0.5], [0.5, 0.6]), ([1.5, -0.5], [0.5, 0.5])):
        with pytest.raises(ValueError, match="at least 0 and have one sum"):
            layers.earth_movers_flow(np.ones((2, 2)), np.array(student), np.array(teacher))


@pytest.mark.method("K-26")
def test_cost_attention_prefers_cheap_layers():
    flow, cost = np.array([[0.3, 0.1], [0.2, 0.4]]), np.array([[1.0, 2.0], [0.5, 0.25]])
    weights, T = np.array([0.4, 0.6]), 2.0
    unit = np.array([(0.3 * 1 + 0.1 * 2) / 0.4, (0.2 * 0.5 + 0.4 * 0.25) / 0.6])  # transfer cost of a unit, layer by layer
    raised = np.exp(unit.sum() / unit / T)
    found = layers.cost_attention(flow, cost, weights, T)
    np.testing.assert_allclose(found, raised / raised.sum())
    assert found[1] > found[0]  # the second layer is the cheaper one
    np.testing.assert_allclose(layers.cost_attention(flow, cost, weights, 1e9), [0.5, 0.5], atol=1e-6)
    none = layers.cost_attention(np.array([[0.0, 0.0], [0.5, 0.5]]), cost, np.array([1e-9, 1 - 1e-9]), T)
    assert none[0] < none[1]  # a layer that moves nothing is not thereby cheap


@pytest.mark.method("K-26")
def test_bert_emd_moves_weights_and_sends_no_gradient_through_the_flow(teacher_model, task):
    student, batch, projection = make_bert(2, hidden_size=16, seed=1), first_batch(task), objective.projector(16, 32)
    made = layers.earth_movers(2, 4, projection)
    loss, mover = value(made, student, teacher_model, batch), made.loss
    kinds = needs("hidden", range(1, 5)) + needs("scores", range(1, 5))
    mine = capture(student, batch, [need for need in kinds if need[1] <= 2])
    given = capture(teacher_model, batch, kinds)
    by_hand = 0.0
    for kind in ("hidden", "scores"):
        cost = mover.costs(mine, given, kind)
        assert cost.shape == (2, 4)
        by_hand += (torch.from_numpy(mover.flow[kind]).float() * cost).sum()
        np.testing.assert_allclose(mover.flow[kind].sum(1), [0.5, 0.5], atol=1e-9)  # the weights of the first step
    torch.testing.assert_close(loss, by_hand)
    single = losses.token_mean((projection(mine["hidden", 2]) - given["hidden", 3]).pow(2), batch["attention_mask"])
    torch.testing.assert_close(mover.costs(mine, given, "hidden")[1, 2], single)
    expected = {"student": [], "teacher": []}  # the authors: softmax for each kind, their mean, softmax again
    for kind in ("hidden", "scores"):
        flow, cost = mover.flow[kind], mover.costs(mine, given, kind).detach().double().numpy()
        expected["student"].append(layers.cost_attention(flow, cost, np.full(2, 1 / 2), 1.0))
        expected["teacher"].append(layers.cost_attention(flow.T, cost.T, np.full(4, 1 / 4), 1.0))
    for found, both in ((mover.student_weights, expected["student"]), (mover.teacher_weights, expected["teacher"])):
        raised = np.exp((both[0] + both[1]) / 2)
        np.testing.assert_allclose(found, raised / raised.sum(), rtol=1e-5)
        assert not np.allclose(both[0], both[1]) and not np.allclose(found, found[0])
    fixed = layers.earth_movers(2, 4, projection, learn=False)
    value(fixed, student, teacher_model, batch)
    assert np.allclose(fixed.loss.student_weights, 0.5)


@pytest.mark.method("K-26")
def test_a_layer_that_costs_next_to_nothing_does_not_take_all_the_weight(monkeypatch):
    """A student that begins with the teacher's own layers has such costs on the diagonal."""
    cost = torch.full((3, 6), 1.0) + 0.1 * torch.arange(6.0)
    cost[0, 0], cost[1, 1], cost[2, 2] = 1e-5, 1e-4, 1e-3
    mover = layers.earth_movers(3, 6).loss
    monkeypatch.setattr(mover, "costs", lambda student, teacher, kind: cost)
    for _ in range(20):
        mover(None, None, {})
    for weights in (mover.student_weights, mover.teacher_weights):
        assert weights.sum() == pytest.approx(1) and weights.min() > 0.05 and weights.max() <= np.e * weights.min() * (1 + 1e-9)
