"""Survey section 2.2: every way to do without neurons against an oracle, on a tiny BERT whose biases are not zero."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import optimize
from small_pruning import HIDDEN, LAYERS, NEURONS, close, make_batch, one_sentence, tiny
from torch import nn
from torch.nn.utils import prune

from utils import structure
from utils.pruning import neurons


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# --- P-12 scores -----------------------------------------------------------------------------------------------------


@pytest.mark.method("P-12a")
def test_activation_entropy_counts_tokens_one_by_one():
    model, batches = tiny(), [make_batch(seed=0), make_batch(seed=1)]
    scores = neurons.activation_entropy(model, batches)
    on, tokens = np.zeros(NEURONS), 0
    for batch in batches:
        for row in range(3):  # each sentence alone and without padding
            seen = neurons.gelu_inputs(model, one_sentence(batch, row))
            on += (seen[2][0] > 0).sum(0).numpy()
            tokens += len(seen[2][0])
    p = on / tokens
    with np.errstate(all="ignore"):
        expected = -np.nan_to_num(p * np.log(p)) - np.nan_to_num((1 - p) * np.log(1 - p))
    np.testing.assert_allclose(scores[2], expected, atol=1e-6)
    assert min(s.min() for s in scores.values()) >= 0 and max(s.max() for s in scores.values()) <= math.log(2) + 1e-6


@pytest.mark.method("P-12a")
def test_a_neuron_that_never_changes_has_no_entropy():
    model = tiny()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[:2] = torch.tensor([1e3, -1e3])
    scores = neurons.activation_entropy(model, [make_batch()])
    assert scores[0][:2].tolist() == [0, 0]
    with pytest.raises(ValueError, match="no calibration batches"):
        neurons.activation_entropy(model, [])


@pytest.mark.method("P-12b", "P-12c")
def test_norms_are_means_of_absolute_weights():
    model = tiny()
    layer = model.bert.encoder.layer[1]
    for i in (0, 17):
        outgoing, incoming = layer.output.dense.weight[:, i].tolist(), layer.intermediate.dense.weight[i].tolist()
        assert neurons.onorm(model)[1][i] == pytest.approx(sum(map(abs, outgoing)) / HIDDEN)
        assert neurons.inorm(model)[1][i] == pytest.approx(sum(map(abs, incoming)) / HIDDEN)


@pytest.mark.method("P-12b", "P-12c")
def test_norm_pruning_agrees_with_torch_ln_structured():
    model = tiny()
    layer = model.bert.encoder.layer[0]
    ffn_in, ffn_out = copy.deepcopy(layer.intermediate.dense), copy.deepcopy(layer.output.dense)
    prune.ln_structured(ffn_in, "weight", amount=16, n=1, dim=0)
    prune.ln_structured(ffn_out, "weight", amount=16, n=1, dim=1)
    assert torch.equal(neurons.neuron_keep(neurons.inorm(model), 0.25)[0], ffn_in.weight_mask[:, 0].bool())
    assert torch.equal(neurons.neuron_keep(neurons.onorm(model), 0.25)[0], ffn_out.weight_mask[0].bool())


@pytest.mark.method("P-12a", "P-12b", "P-12c")
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_neuron_keep_drops_the_exact_share(scope):
    scores = {0: torch.arange(64.0), 1: 100 + torch.arange(64.0)}
    keep = neurons.neuron_keep(scores, 0.25, scope)
    assert sum(int((~mask).sum()) for mask in keep.values()) == 32
    assert int((~keep[0]).sum()) == (16 if scope == "layer" else 32)
    assert not keep[0][:16].any() and keep[0][32:].all()


def test_neuron_keep_refuses():
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            neurons.neuron_keep({0: torch.arange(4.0)}, share)
    with pytest.raises(ValueError, match="'layer' or 'global'"):
        neurons.neuron_keep({0: torch.arange(4.0)}, 0.5, "matrix")


PENALTIES = {
    neurons.prox_l21: lambda row: np.sqrt(np.square(row).sum()),
    neurons.prox_linf1: lambda row: np.abs(row).max(),
}


@pytest.mark.method("P-13a", "P-13b")
@pytest.mark.parametrize("prox", list(PENALTIES))
@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0, 5.0])
def test_prox_minimises_its_objective(prox, amount):
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = prox(rows, amount).numpy()
    for row, found in zip(rows.numpy(), ours, strict=True):

        def objective(v, row=row):
            return 0.5 * np.square(v - row).sum() + amount * PENALTIES[prox](v)

        starts = [row, row / 2, found, np.zeros(3)]
        options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 2000}
        best = min((optimize.minimize(objective, s, method="Nelder-Mead", options=options) for s in starts), key=lambda r: r.fun)
        assert objective(found) <= best.fun + 1e-9  # strongly convex: the values pin the argument, too
        np.testing.assert_allclose(found, best.x, atol=2e-4)


@pytest.mark.method("P-13b")
def test_l1_projection_solves_its_constrained_problem():
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row, found in zip(rows.numpy(), neurons.project_l1_ball(rows, 1.2).numpy(), strict=True):
        # v = a - b with a, b >= 0 makes the ball a smooth constraint
        solution = optimize.minimize(
            lambda ab, row=row: np.square(ab[:4] - ab[4:] - row).sum(), np.zeros(8), bounds=[(0, None)] * 8, method="SLSQP",
            constraints={"type": "ineq", "fun": lambda ab: 1.2 - ab.sum()}, options={"ftol": 1e-14},
        )  # fmt: skip
        np.testing.assert_allclose(found, solution.x[:4] - solution.x[4:], atol=1e-5)


@pytest.mark.method("P-13a", "P-13b")
def test_prox_zeroes_exactly_the_small_rows():
    rows = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]])
    close(neurons.prox_l21(rows, 0.5), torch.tensor([[0.0, 0.0], [2.7, 3.6], [0.0, 0.0]]))
    close(neurons.prox_linf1(rows, 0.8), torch.tensor([[0.0, 0.0], [3.0, 3.2], [0.0, 0.0]]))
    assert (neurons.prox_l21(rows, 0.6)[0] == 0).all() and (neurons.prox_linf1(rows, 0.8)[0] == 0).all()
    with pytest.raises(ValueError, match="0 or more"):
        neurons.prox_l21(rows, -1.0)


# --- P-13 penalties while training ----------------------------------------------------------------------------------

OPTIMIZER = SimpleNamespace(param_groups=[{"lr": 0.05, "initial_lr": 0.1}])
MAPS = [neurons.prox_l21, neurons.prox_linf1]


def weights(model: nn.Module, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Incoming and outgoing weights of a layer's neurons, (neurons, hidden) each, copied."""
    layer = model.bert.encoder.layer[number]
    return layer.intermediate.dense.weight.detach().clone(), layer.output.dense.weight.detach().T.clone()


def in_groups(w_in: torch.Tensor, w_out: torch.Tensor, groups: str) -> list[torch.Tensor]:
    return {"incoming": [w_in], "outgoing": [w_out], "separate": [w_in, w_out], "coupled": [torch.cat([w_in, w_out], 1)]}[groups]


def dual_norm(rows: torch.Tensor, prox) -> torch.Tensor:
    return rows.square().sum(1).sqrt() if prox is neurons.prox_l21 else rows.abs().sum(1)


def grow_norms(model: nn.Module) -> None:
    """Give neuron i of every layer a group whose size rises with i."""
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            size = torch.arange(1, NEURONS + 1).float()
            layer.intermediate.dense.weight.copy_(size[:, None] * 0.01)
            layer.output.dense.weight.copy_(size[None, :] * 0.01)


@pytest.mark.method("P-13a", "P-13b", "P-13c")
@pytest.mark.parametrize("prox", MAPS)
@pytest.mark.parametrize("groups", neurons.GROUPS)
def test_one_proximal_step_on_each_kind_of_group(groups, prox):
    layer = (model := tiny()).bert.encoder.layer[0]
    before = weights(model)
    neurons.shrink_neurons(layer, prox, 0.4, groups)
    after = weights(model)
    for old, new in zip(in_groups(*before, groups), in_groups(*after, groups), strict=True):
        close(new, prox(old, 0.4))
        other = MAPS[1 - MAPS.index(prox)]
        assert not torch.allclose(new, other(old, 0.4), atol=1e-4)
    if groups in ("incoming", "outgoing"):  # the other half is left alone
        untouched = 1 if groups == "incoming" else 0
        close(after[untouched], before[untouched], 0)


@pytest.mark.method("P-13a", "P-13b", "P-13c")
@pytest.mark.parametrize("prox", MAPS)
@pytest.mark.parametrize("groups", neurons.GROUPS)
def test_a_step_of_any_size_zeroes_no_more_than_the_share(groups, prox):
    model = tiny()
    expected = torch.stack([dual_norm(group, prox) for group in in_groups(*weights(model), groups)]).amin(0)
    neurons.shrink_neurons(model.bert.encoder.layer[0], prox, 1e3, groups, share=0.25)
    dead = torch.stack([group.norm(dim=1) for group in in_groups(*weights(model), groups)]).amin(0) == 0
    assert dead.nonzero().flatten().tolist() == sorted(expected.argsort()[:16].tolist())  # the smallest, to the last bit
    neurons.shrink_neurons(model.bert.encoder.layer[0], prox, 1e3, groups, share=0.0)
    assert int((neurons.smallest_norm(model.bert.encoder.layer[0], groups) == 0).sum()) == 16


@pytest.mark.method("P-13c")
def test_of_two_separate_groups_the_smaller_one_counts():
    model = tiny()
    grow_norms(model)
    model.bert.encoder.layer[0].output.dense.weight.data[:, 63] = 0  # the largest neuron is cut off at its output
    norms = neurons.group_norms(model, "separate")[0]
    assert norms[63] == 0
    close(norms[:63], model.bert.encoder.layer[0].intermediate.dense.weight.detach().norm(dim=1)[:63])
    close(neurons.group_norms(model, "incoming", order=1)[0], 0.01 * HIDDEN * torch.arange(1, 65.0))


@pytest.mark.method("P-13a", "P-13b", "P-13c")
@pytest.mark.parametrize("prox", MAPS)
@pytest.mark.parametrize("groups", neurons.GROUPS)
def test_the_planned_travel_zeroes_the_share_and_no_more(groups, prox):
    """Without a gradient the travel alone decides: after each step those are dead whose dual norm it has covered."""
    model = tiny()
    norms = [torch.stack([dual_norm(group, prox) for group in in_groups(*weights(model, number), groups)]).amin(0)
             for number in range(LAYERS)]  # fmt: skip
    penalty = neurons.ProximalPruning(0.25, 20, prox, groups)
    for step in range(1, 21):
        penalty(step, model, SimpleNamespace(param_groups=[{"lr": 0.1, "initial_lr": 0.1}]))
        for number, norm in enumerate(norms):
            travel = norm.kthvalue(16).values * step * (step + 1) / 420
            assert penalty.zeroed[number] == int((norm <= travel * (1 + 1e-5)).sum())
    assert penalty.zeroed == dict.fromkeys(range(LAYERS), 16)
    for number, alive in penalty.alive.items():  # the smallest groups went: not the largest, not some others
        assert alive.nonzero().flatten().tolist() == sorted(norms[number].argsort()[16:].tolist())


@pytest.mark.method("P-13a", "P-13b")
@pytest.mark.parametrize("prox", MAPS)
def test_a_step_shrinks_by_its_rate_and_its_part_of_the_way_that_is_left(prox):
    model = tiny()
    before, _ = weights(model)
    penalty = neurons.ProximalPruning(0.5, 10, prox, "incoming")
    penalty(1, model, OPTIMIZER)  # at half of its full rate
    way = dual_norm(before, prox).kthvalue(32).values.item()
    first, _ = weights(model)
    close(first, prox(before, 0.5 * way * 1 / 55))  # 1 + 2 + ... + 10
    assert penalty.strength[0] == pytest.approx(way / 55 / 0.1, rel=1e-5)
    with torch.no_grad():  # a gradient pulls up, and the plan follows
        model.bert.encoder.layer[0].intermediate.dense.weight.mul_(3)
    penalty(8, model, OPTIMIZER)
    close(weights(model)[0], prox(3 * first, 0.5 * dual_norm(3 * first, prox).kthvalue(32).values.item() * 8 / (8 + 9 + 10)))


@pytest.mark.method("P-13a", "P-13b", "P-13c")
@pytest.mark.parametrize("groups", neurons.GROUPS)
def test_what_the_penalty_does_not_reach_goes_by_norm_at_the_end(groups):
    model = tiny()
    grow_norms(model)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.01, "initial_lr": 0.1}])  # a tenth of the planned travel
    penalty = neurons.ProximalPruning(0.25, 2, groups=groups)
    penalty(1, model, optimizer)
    assert not penalty.alive
    penalty(2, model, optimizer)
    assert all(kept.nonzero().flatten().tolist() == list(range(16, 64)) for kept in penalty.alive.values())
    assert 0 < sum(penalty.zeroed.values()) < LAYERS * 16
    assert not any(rows[:16].any() for rows in weights(model))  # at once, and not only from the next step on


@pytest.mark.method("P-13a", "P-13b", "P-13c")
@pytest.mark.parametrize("prox", MAPS)
@pytest.mark.parametrize("groups", neurons.GROUPS)
def test_survivors_get_back_what_was_taken_and_nothing_else_changed(groups, prox):
    """Without a gradient the whole journey ends at the first weights, less the dead neurons."""
    model, start = tiny(), tiny()
    penalty = neurons.ProximalPruning(0.25, 10, prox, groups)
    for step in range(1, 13):
        penalty(step, model, SimpleNamespace(param_groups=[{"lr": 0.1, "initial_lr": 0.1}]))
        if step == 5:
            assert neurons.group_norms(model, groups)[0].mean() < 0.8 * neurons.group_norms(start, groups)[0].mean()
    for number, alive in penalty.alive.items():
        for now, then in zip(weights(model, number), weights(start, number), strict=True):
            close(now[alive], then[alive])
            assert not now[~alive].any()


@pytest.mark.method("P-13a", "P-13b", "P-13c")
@pytest.mark.parametrize("prox", MAPS)
@pytest.mark.parametrize("groups", neurons.GROUPS)
def test_the_dead_stay_dead_while_the_others_train(groups, prox):
    model, batch = tiny(), make_batch()
    penalty = neurons.ProximalPruning(0.25, 10, prox, groups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(1, 15):
        nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        penalty(step, model, optimizer)
    assert sorted(penalty.alive) == list(range(LAYERS))
    for number, alive in penalty.alive.items():
        w_in, w_out = weights(model, number)
        assert int((~alive).sum()) == 16 and not w_in[~alive].any() and not w_out[~alive].any()
        assert w_in[alive].norm(dim=1).min() > 0.3 and w_out[alive].norm(dim=1).min() > 0.3
    before = logits(model, batch)
    structure.remove_neurons(model, penalty.alive)  # nothing is left that the cut could change
    close(logits(model, batch), before)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == NEURONS - 16


@pytest.mark.method("P-13a")
def test_a_gradient_can_save_a_small_neuron():
    """The loss has a vote: a neuron that is pulled up faster than the penalty shrinks it survives, and a larger one goes."""
    model = tiny()
    grow_norms(model)
    penalty = neurons.ProximalPruning(0.25, 20, neurons.prox_l21, "incoming")
    for step in range(1, 21):
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight.data[3] *= 2
        penalty(step, model, SimpleNamespace(param_groups=[{"lr": 0.1}]))
    assert penalty.alive[0][3] and not penalty.alive[0][16]
    assert int((~penalty.alive[0]).sum()) == 16


@pytest.mark.method("P-13a", "P-13b")
def test_a_constant_neuron_is_folded_without_a_trace():
    model, batch = tiny(), make_batch()
    layer = model.bert.encoder.layer[1]
    layer.intermediate.dense.weight.data[:5] = 0
    before = logits(model, batch)
    assert neurons.fold_constants(layer) == 5 and not layer.output.dense.weight[:, :5].any()
    close(logits(model, batch), before)
    structure.remove_neurons(model, {1: torch.arange(5, NEURONS)})
    close(logits(model, batch), before)


@pytest.mark.method("P-13a")
def test_settling_folds_what_the_penalty_zeroed():
    model, batch = tiny(), make_batch()
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense.weight.data[:16] = 0
    before = logits(model, batch)
    penalty = neurons.ProximalPruning(0.25, 4, neurons.prox_l21, "incoming")
    penalty(1, model, OPTIMIZER)
    assert sorted(penalty.alive) == list(range(LAYERS))  # the target is reached at once, and the penalty rests
    close(logits(model, batch), before)


def test_a_penalty_says_what_is_allowed():
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            neurons.ProximalPruning(share, 5)
    with pytest.raises(ValueError, match="1 or later"):
        neurons.ProximalPruning(0.5, 0)
    with pytest.raises(ValueError, match="groups must be one of"):
        neurons.ProximalPruning(0.5, 5, groups="rows")
    with pytest.raises(ValueError, match="0 or more"):
        neurons.shrink_neurons(tiny().bert.encoder.layer[0], neurons.prox_l21, -1.0)


@pytest.mark.method("P-12a", "P-12b", "P-12c", "P-13a")
def test_neurons_kept_by_both():
    keep = {0: torch.tensor([True, True, False, False]), 1: torch.tensor([True, True, True, False])}
    other = {0: torch.tensor([True, False, True, False]), 1: torch.tensor([False, False, True, True])}
    assert neurons.kept_by_both(keep, other) == 2 / 5
    assert neurons.kept_by_both(keep, keep) == 1


# --- P-14 merging ----------------------------------------------------------------------------------------------------


def brute_force_merging(incoming: np.ndarray, outgoing: np.ndarray, count: int):
    """All pairs, written as the equation says, recomputed from scratch at every step."""
    alive, outgoing, picked = list(range(len(incoming))), outgoing.copy(), []
    for _ in range(count):
        pairs = itertools.permutations(alive, 2)
        s, i, j = min((np.mean(outgoing[j] ** 2) * np.sum((incoming[i] - incoming[j]) ** 2), i, j) for i, j in pairs)
        outgoing[i] += outgoing[j]
        alive.remove(j)
        picked.append(s)
    return alive, outgoing[alive], picked


@pytest.mark.method("P-14")
def test_merging_equals_the_brute_force():
    generator = torch.Generator().manual_seed(0)
    incoming, outgoing = (torch.randn(14, d, generator=generator, dtype=torch.float64) for d in (5, 6))
    outgoing[3] = 0  # a neuron nobody listens to goes first, at no cost
    keep, merged, saliencies = neurons.merge_pairs(incoming, outgoing, 13)
    alive, expected, picked = brute_force_merging(incoming.numpy(), outgoing.numpy(), 13)
    assert keep.nonzero().flatten().tolist() == alive
    np.testing.assert_allclose(merged[keep], expected)
    np.testing.assert_allclose(saliencies, picked)
    assert saliencies[0] == 0


@pytest.mark.method("P-14")
def test_a_duplicate_neuron_merges_without_a_trace():
    model, batch = tiny(), make_batch()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[9] = layer.intermediate.dense.weight[40]
            layer.intermediate.dense.bias[9] = layer.intermediate.dense.bias[40]
    before = logits(model, batch)
    saliencies = neurons.merge_neurons(model, 1)
    close(logits(model, batch), before, 1e-6)
    assert all(values == [0.0] for values in saliencies.values())
    assert all(layer.output.dense.weight.shape == (HIDDEN, NEURONS - 1) for layer in model.bert.encoder.layer)


@pytest.mark.method("P-14")
def test_merging_minds_the_bias_and_its_bounds():
    model, batch = tiny(), make_batch()
    with torch.no_grad():  # the same weights, but biases far apart: no twins
        ffn_in = model.bert.encoder.layer[0].intermediate.dense
        ffn_in.weight[9], ffn_in.bias[9], ffn_in.bias[40] = ffn_in.weight[40].clone(), 50.0, -50.0
    assert neurons.merge_neurons(copy.deepcopy(model), 1)[0][0] > 0
    before = logits(model, batch)
    neurons.merge_neurons(model, 0)
    close(logits(model, batch), before, 0)
    for count in (-1, NEURONS):
        with pytest.raises(ValueError, match=r"0\.\.63"):
            neurons.merge_neurons(model, count)


@pytest.mark.method("P-14")
def test_the_control_deletes_the_same_neurons_without_surgery():
    merged, deleted, start = tiny(), tiny(), tiny()
    assert neurons.merge_neurons(merged, 20) == neurons.merge_neurons(deleted, 20, surgery=False)
    for number in range(LAYERS):
        (w_in, w_out), (d_in, d_out) = weights(merged, number), weights(deleted, number)
        old_in, old_out = weights(start, number)
        close(w_in, d_in, 0)  # the same neurons are left
        row = torch.tensor([int((old_in == kept).all(1).nonzero()) for kept in d_in])
        close(d_out, old_out[row], 0)  # and nobody took anything over
        gone = torch.ones(NEURONS, dtype=torch.bool)
        gone[row] = False
        close((w_out - d_out).sum(0), old_out[gone].sum(0))  # with surgery, all that went was taken over


@pytest.mark.method("P-14")
def test_the_saliency_bounds_the_damage_of_a_merge():
    """E <(a_j (f(W_i x) - f(W_j x)))^2> <= slope^2 E||x||^2 s_ij; where f is steepest nothing is given away."""
    z = torch.linspace(-6, 6, 100_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(nn.functional.gelu(z).sum(), z)
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((500, 6), (9, 6), (9, 4))]
    worst = [torch.tensor(rows, dtype=torch.float64) for rows in ([[2**0.5]], [[1.0], [1 + 1e-5]], [[2.0], [1.0]])]
    for x, incoming, outgoing in (random, worst):
        keep, merged, (saliency,) = neurons.merge_pairs(incoming, outgoing, 1)
        out = nn.functional.gelu(x @ incoming.T)
        damage = (out @ outgoing - out[:, keep] @ merged[keep]).square().mean().item()
        bound = slopes.abs().max().item() ** 2 * x.square().sum(1).mean().item() * saliency
        assert damage <= bound * (1 + 1e-4)
    assert damage == pytest.approx(bound, rel=1e-3)
