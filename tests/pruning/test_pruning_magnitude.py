"""Magnitude pruning and its three allocations against torch.nn.utils.prune and bisection."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

from utils.bert import ENCODER, matrices
from utils.pruning import magnitude, masks


@pytest.mark.method("P-03", "P-04b")
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_per_matrix_masks_equal_torchs_l1_unstructured(tiny, sparsity):
    found = magnitude.magnitude_masks(tiny, sparsity)
    uniform = magnitude.class_uniform_masks(tiny, sparsity, ENCODER)
    for m in matrices(tiny):
        module = copy.deepcopy(m.module)
        prune.l1_unstructured(module, "weight", amount=sparsity)
        assert torch.equal(found[m.name], module.weight_mask.bool())
        assert torch.equal(uniform[m.name], module.weight_mask.bool())


@pytest.mark.method("P-04a")
@pytest.mark.parametrize("sparsity", [0.2, 0.8])
def test_class_blind_masks_equal_torchs_global_pruning(tiny, sparsity):
    found = magnitude.class_blind_masks(tiny, sparsity)
    model = copy.deepcopy(tiny)
    modules = [(m.module, "weight") for m in matrices(model, magnitude.PRUNABLE)]
    prune.global_unstructured(modules, pruning_method=prune.L1Unstructured, amount=sparsity)
    for m in matrices(model, magnitude.PRUNABLE):
        assert torch.equal(found[m.name], m.module.weight_mask.bool())


@pytest.mark.method("P-04c")
@pytest.mark.parametrize("sparsity", [0.25, 0.7])
def test_class_distribution_finds_the_common_multiplier(tiny, sparsity):
    weights = {m.name: m.weight.detach().numpy() for m in matrices(tiny, magnitude.PRUNABLE)}
    low, high = 0.0, 10.0
    for _ in range(60):  # bisection on lambda, the definition taken literally
        lam = (low + high) / 2
        pruned = sum((np.abs(w) < lam * w.std(ddof=1)).sum() for w in weights.values()) / sum(w.size for w in weights.values())
        low, high = (lam, high) if pruned < sparsity else (low, lam)
    found = magnitude.class_distribution_masks(tiny, sparsity)
    different = sum((found[n].numpy() != (np.abs(w) >= lam * w.std(ddof=1))).sum() for n, w in weights.items())
    assert different <= 2  # ties at the threshold
    assert masks.sparsity_of(found) == pytest.approx(sparsity, abs=1e-4)


@pytest.mark.method("P-03")
def test_random_masks_have_the_same_sparsity_everywhere_and_another_choice(tiny):
    by_lot, by_size = magnitude.random_masks(tiny, 0.6, seed=1), magnitude.magnitude_masks(tiny, 0.6)
    assert all(by_lot[name].sum() == by_size[name].sum() for name in by_size)
    assert any(not torch.equal(by_lot[name], by_size[name]) for name in by_size)
    assert all(
        torch.equal(a, b) for a, b in zip(by_lot.values(), magnitude.random_masks(tiny, 0.6, seed=1).values(), strict=True)
    )


@pytest.mark.method("P-03", "P-04a", "P-04b", "P-04c")
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0, float("nan")])
def test_sparsity_outside_its_range_is_refused(tiny, sparsity):
    for make in (magnitude.magnitude_masks, magnitude.class_blind_masks, magnitude.class_uniform_masks,
                 magnitude.class_distribution_masks, magnitude.random_masks):  # fmt: skip
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            make(tiny, sparsity)


def test_held_masks_survive_training_and_are_released(tiny, batch):
    before = tiny.bert.encoder.layer[0].intermediate.dense.weight.detach().clone()
    chosen = magnitude.magnitude_masks(tiny, 0.5)
    masks.hold_masks(tiny, chosen)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    for _ in range(3):
        logits = tiny(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(mask, masks.held_masks(tiny)[name]) for name, mask in chosen.items())
    masks.release_masks(tiny)
    weight = tiny.bert.encoder.layer[0].intermediate.dense.weight
    mask = chosen["bert.encoder.layer.0.intermediate.dense.weight"]
    assert torch.equal(weight == 0, ~mask) and not torch.equal(weight[mask], before[mask])


def test_releasing_without_zeros_brings_the_dense_weights_back(tiny):
    before = {m.name: m.weight.detach().clone() for m in matrices(tiny)}
    masks.hold_masks(tiny, magnitude.magnitude_masks(tiny, 0.5))
    masks.release_masks(tiny, keep_zeros=False)
    assert all(torch.equal(m.weight, before[m.name]) for m in matrices(tiny))


def test_lowest_removes_an_exact_count_even_among_ties():
    keep = masks.lowest(torch.zeros(10, 10), 0.37)
    assert keep.numel() - keep.sum() == 37


def test_scope_must_be_known(tiny):
    with pytest.raises(ValueError, match="'global' or 'matrix'"):
        masks.masks_from_scores({"a": torch.rand(3, 3)}, 0.5, scope="layer")


def test_masks_rank_over_all_matrices_unless_told_otherwise():
    scores = {"small": torch.tensor([0.1, 0.2]), "large": torch.tensor([1.0, 2.0])}
    assert [mask.tolist() for mask in masks.masks_from_scores(scores, 0.5).values()] == [[False, False], [True, True]]
    assert [mask.tolist() for mask in masks.masks_from_scores(scores, 0.5, "matrix").values()] == [[False, True]] * 2


@pytest.mark.method("P-03")
def test_another_seed_draws_another_lot(tiny):
    lots = [magnitude.random_masks(tiny, 0.6, seed=seed) for seed in (0, 1)]
    assert all(not torch.equal(lots[0][name], lots[1][name]) for name in lots[0])


@pytest.mark.method("P-04a", "P-04b", "P-04c")
@pytest.mark.parametrize("make", [magnitude.class_blind_masks, magnitude.class_uniform_masks, magnitude.class_distribution_masks])
def test_the_classes_are_all_matrices_but_pooler_and_classifier(tiny, make):
    head = ("classifier", "bert.pooler")
    names = {name for name, p in tiny.named_parameters() if p.dim() == 2 and not name.startswith(head)}
    assert make(tiny, 0.5).keys() == names
