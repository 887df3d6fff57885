"""Scope, order and defaults of pruning methods: what is cut, by which rule, with which data. Each test once had a mutant that lived."""

import ast
import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from utils import notebooks, profiles
from utils.bert import dense_weight, matrices
from utils.pruning import densify, heads, hessian, layers
from utils.pruning.iterative import agp_pruning
from utils.pruning.magnitude import magnitude_masks
from utils.pruning.masks import held_masks, hold_masks
from utils.training import cross_entropy

OPTIMIZER = SimpleNamespace(param_groups=[{"lr": 0.1}])


@pytest.mark.method("P-11")
def test_pruning_back_keeps_the_largest_active_weights(tiny):
    hold_masks(tiny, {m.name: torch.ones_like(m.weight, dtype=torch.bool) for m in matrices(tiny)})
    first = matrices(tiny)[0]
    with torch.no_grad():
        dense_weight(first).copy_(torch.arange(1.0, 1025.0).view(32, 32))
    densify.prune_back(tiny, 0.75, {})
    assert held_masks(tiny)[first.name].flatten().nonzero().flatten().tolist() == list(range(768, 1024))


@pytest.mark.method("P-11")
@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_the_lesson_grows_and_prunes_in_turn_whatever_the_steps_of_its_profile(profile):
    """In `full` the turns once did not divide the last step, and the method failed where nobody had run it yet."""
    cells = [cell.source for cell in notebooks.weave("01_pruning", ("4",)).cells if cell.cell_type == "code"]
    names = {"last_of", "LAST", "pause", "growth"}
    statements = [node for cell in cells for node in ast.parse(cell).body if notebooks._bound_names(node) & names]
    known = {"STEPS": profiles.get(profile).recovery_steps}
    exec(compile(ast.Module(statements, []), "lesson", "exec"), known)
    densify.grow_and_prune(densify.random_scores, 0.7, **known["growth"])
    assert known["LAST"] - 2 * known["pause"] < known["growth"]["end"] <= known["LAST"]


@pytest.mark.method("P-11")
def test_growth_looks_at_all_batches_and_at_its_alpha(tiny, batch):
    other = {**batch, "labels": 1 - batch["labels"]}

    def grown(batches: list[dict], alpha: float) -> dict:
        model = copy.deepcopy(tiny)
        hold_masks(model, magnitude_masks(model, 0.9))
        score = partial(densify.dense_gradients, batches=batches)
        densify.grow_and_prune(score, 0.9, alpha=alpha, frequency=1, end=2)(1, model, OPTIMIZER)
        return held_masks(model)

    def share(masks: dict) -> float:
        return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())

    both = grown([batch, other], 0.9)
    assert any(not torch.equal(both[name], mask) for name, mask in grown([batch], 0.9).items())
    assert share(grown([batch], 0.95)) < share(grown([batch], 0.9)) < share(grown([batch], 0.5))
    seed = magnitude_masks(tiny, 0.9)
    hold_masks(tiny, seed)  # the gradient is that of the sparse model
    gradients = densify.dense_gradients(tiny, [batch, other])
    assert all(torch.equal(both[name], densify.grown_mask(seed[name], gradients[name], 0.9)) for name in both)


@pytest.mark.method("P-01")
def test_obd_scores_weigh_the_curvature_with_the_squared_weight(tiny, batch):
    h = hessian.fisher_diagonal(tiny, [batch])
    scores = hessian.obd_scores(tiny, [batch], damping=0.0)
    for m in matrices(tiny):
        torch.testing.assert_close(scores[m.name], 0.5 * h[m.name] * m.weight.detach() ** 2, atol=0, rtol=1e-5)


@pytest.mark.method("P-01")
def test_obd_ranks_over_the_whole_network_unless_told_otherwise(tiny, batch):
    scores = hessian.obd_scores(tiny, [batch])
    masks = hessian.obd_masks(tiny, [batch], 0.5)
    threshold = torch.cat([score.flatten() for score in scores.values()]).median()
    assert all(torch.equal(masks[name], score > threshold) for name, score in scores.items())
    assert len({mask.float().mean().item() for mask in masks.values()}) > 1
    per_matrix = hessian.obd_masks(tiny, [batch], 0.5, scope="matrix")
    assert {round(mask.float().mean().item(), 3) for mask in per_matrix.values()} == {0.5}


@pytest.mark.method("P-01")
def test_the_default_damping_orders_weights_that_no_example_moves(tiny, batch):
    def no_curvature(model, batches, groups):
        return {m.name: torch.zeros_like(m.weight) if number else torch.ones_like(m.weight)
                for number, m in enumerate(matrices(model, groups))}  # fmt: skip

    scores = hessian.obd_scores(tiny, [batch], diagonal=no_curvature)
    first, second, *_ = matrices(tiny)
    assert (scores[second.name] > 0).all() and scores[second.name].max() < 1e-6 * scores[first.name].max()
    share = first.weight.numel() / sum(m.weight.numel() for m in matrices(tiny))  # the mean curvature
    torch.testing.assert_close(scores[second.name], 0.5e-8 * share * second.weight.detach() ** 2)


@pytest.mark.method("P-01")
def test_a_negative_curvature_does_not_make_a_weight_look_harmful():
    weight, h = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-5.0, 0.0, 1.0])
    assert hessian.obd_saliency(weight, h).tolist() == [0.0, 0.0, 4.5]
    assert hessian.obd_saliency(weight, h, damping=0.5).tolist() == [0.25, 1.0, 6.75]  # damping orders what has none


@pytest.mark.method("P-07")
def test_agp_prunes_every_matrix_to_the_schedule(tiny):
    with torch.no_grad():  # matrices of other sizes: one ranking over all would empty the first
        for number, m in enumerate(matrices(tiny)):
            m.weight.mul_(10.0 ** (number % 3))
    hook = agp_pruning(0.5, start=1, end=3, frequency=1)
    for step in (1, 2, 3):
        hook(step, tiny, OPTIMIZER)
    assert {round(1 - mask.float().mean().item(), 3) for mask in held_masks(tiny).values()} == {0.5}


@pytest.mark.method("P-22")
def test_every_layer_has_a_coin_of_its_own(tiny, batch):
    tiny.train()
    seen = set()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ran = []
    for number, layer in enumerate(tiny.bert.encoder.layer):
        layer.register_forward_pre_hook(lambda module, args, number=number: ran.append(number))
    with layers.layer_drop(tiny, 0.5, torch.Generator().manual_seed(0)):
        for _ in range(40):
            ran.clear()
            tiny(**inputs)
            seen.add(tuple(ran))
    assert seen == {(), (0,), (1,), (0, 1)}


@pytest.mark.method("P-20a")
def test_relevance_is_that_of_the_predicted_logit(tiny, batch):
    """Where all sentences are predicted as one class, relevance is that class's, and not that of logit 0."""
    found = {}
    for label in (0, 1):
        model = copy.deepcopy(tiny)
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor([50.0, 0.0]) if label == 0 else torch.tensor([0.0, 50.0]))
        found[label] = heads.head_relevance(model, [batch])
        with heads.relevance_rules(model) as put_out:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            relevance = torch.autograd.grad(logits[:, label].sum(), put_out)
        for number, of_layer in enumerate(relevance):
            of_heads = of_layer.unflatten(-1, (tiny.config.num_attention_heads, -1)).sum((1, 3))
            torch.testing.assert_close(found[label][number], (of_heads / of_heads.sum(1, keepdim=True)).mean(0))
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.method("P-23c")
def test_a_coin_is_as_hard_as_its_temperature_says(tiny, batch):
    rates = torch.full((2000,), 0.7)
    spread = [
        layers.relaxed_bernoulli(rates, t, torch.Generator().manual_seed(0)).sub(0.5).abs().mean().item()
        for t in (0.1, 0.5, 25.0)
    ]
    assert spread[0] > 0.45 and spread[0] > spread[1] > 0.3 and spread[2] < 0.05
    weight = torch.zeros(2, 32)
    for temperature in (0.5, 25.0):  # one half is the default
        options = {} if temperature == 0.5 else {"temperature": temperature}
        found = layers.learned_drop_loss(weight, 0.3, generator=torch.Generator().manual_seed(0), **options)(tiny, batch)
        by_hand = layers.relaxed_bernoulli(torch.full((2,), 0.7), temperature, torch.Generator().manual_seed(0))
        with layers.layer_gates(tiny, by_hand):
            torch.testing.assert_close(found, cross_entropy(tiny, batch))
