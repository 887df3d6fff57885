"""FLOP: the authors' formulas by loops, frequencies of samples, finite differences, and a task whose ranks are known."""

import itertools
import math

import fresh
import numpy as np
import pytest
import torch
from small_task import task_of
from torch import nn

from utils import artifacts, bert, contract, costs, parts, profiles, training
from utils.decomposition import factors, gates
from utils.parts import factorised
from utils.parts.factorised import GatedLowRankLinear, hard_concrete, mean_gates, open_probability, settled_gates
from utils.parts.linear import LowRankLinear

INPUTS = ("input_ids", "attention_mask")
FIRST = "bert.encoder.layer.0.intermediate.dense"


@pytest.fixture
def tiny(tiny):
    """With biases that are not all 0, and larger weights."""
    for name, parameter in tiny.named_parameters():
        if name.endswith("bias") or parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return tiny


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**{key: batch[key] for key in INPUTS}).logits


def spread(model: nn.Module, low: float = -4.0, high: float = 4.0) -> nn.Module:
    """Gates that differ, in an order of their own."""
    for number, part in enumerate(gates.gated(model).values()):
        part.log_alpha.data = torch.linspace(low, high, part.rank)[torch.randperm(part.rank)] + 0.01 * number
    return model


def layer(width: int = 6, out: int = 5, rank: int = 4) -> GatedLowRankLinear:
    part = GatedLowRankLinear(width, out, rank)
    nn.init.normal_(part.bias)
    part.log_alpha.data = torch.tensor([3.0, -5.0, 0.5, -0.7])[:rank]
    return part


# --- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.method("T-05")
def test_probabilities_and_means_are_frequencies_of_samples():
    log_alpha = torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0])
    samples = hard_concrete(log_alpha.expand(200_000, 5))
    torch.testing.assert_close(open_probability(log_alpha), (samples > 0).float().mean(0), atol=5e-3, rtol=0)
    torch.testing.assert_close(factorised.one_probability(log_alpha), (samples == 1).float().mean(0), atol=5e-3, rtol=0)
    torch.testing.assert_close(mean_gates(log_alpha), samples.mean(0), atol=0.012, rtol=0)
    assert samples.min() == 0 and samples.max() == 1
    closed_form = [1 / (1 + math.exp(-(a - math.log(0.1 / 1.1)))) for a in log_alpha.tolist()]  # the authors' l0_norm
    np.testing.assert_allclose(open_probability(log_alpha), closed_form, rtol=1e-5)


@pytest.mark.method("T-05")
def test_only_undecided_gates_have_a_gradient():
    log_alpha = torch.zeros(200, requires_grad=True)
    found = hard_concrete(log_alpha)
    (gradient,) = torch.autograd.grad(found.sum(), log_alpha)
    inside = (found > 0) & (found < 1)
    assert inside.any() and not inside.all() and (gradient[inside] > 0).all() and (gradient[~inside] == 0).all()


@pytest.mark.method("T-05")
def test_gates_settle_as_the_authors_compile_them():
    for shift in (-9.0, -1.0, 0.0, 2.0, 9.0):
        log_alpha = torch.randn(21) * 2 + shift
        values = log_alpha.tolist()
        zeros = round(21 - sum(1 / (1 + math.exp(-(a + math.log(11)))) for a in values))
        expected = [1 / (1 + math.exp(-0.8 * a)) for a in values]
        for place in sorted(range(21), key=values.__getitem__)[: min(zeros, 20)]:
            expected[place] = 0.0
        torch.testing.assert_close(settled_gates(log_alpha), torch.tensor(expected))
    assert settled_gates(torch.tensor([-30.0, -20.0])).count_nonzero() == 1  # a factorised layer keeps one component


# --- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.method("T-05")
def test_a_gated_product_by_loops():
    part, x = layer(), torch.randn(2, 3, 6)
    expected = part.bias.expand(2, 3, 5).clone()
    for k, gate in enumerate(settled_gates(part.log_alpha)):
        expected = expected + gate * (x @ part.right[k])[..., None] * part.left[:, k]
    torch.testing.assert_close(part.eval()(x), expected)
    torch.testing.assert_close(part.expanded()(x), expected)
    torch.testing.assert_close(nn.functional.linear(x, part.weight, part.bias), expected)
    torch.manual_seed(4)
    drawn = hard_concrete(part.log_alpha)
    torch.manual_seed(4)
    torch.testing.assert_close(part.train()(x), x @ ((part.left * drawn) @ part.right).T + part.bias)
    assert not torch.equal(part(x), part(x)) and torch.equal(part.weight, part.weight)
    assert 0 in settled_gates(part.log_alpha)


@pytest.mark.method("T-05")
def test_a_shrunk_layer_holds_what_was_kept():
    part, x = layer().eval(), torch.randn(7, 6)
    kept = settled_gates(part.log_alpha) > 0
    small = factorised.shrunk(part, kept)
    assert type(small) is LowRankLinear and small.rank == int(kept.sum()) == 3 and small.macs(2) == 2 * 3 * 11
    torch.testing.assert_close(small(x), part(x))
    one = factorised.shrunk(part, torch.tensor([False, False, True, False]))
    gate = 1 / (1 + math.exp(-0.8 * 0.5))
    torch.testing.assert_close(one(x), gate * (x @ part.right[2])[:, None] * part.left[:, 2] + part.bias)
    with pytest.raises(ValueError, match="one component or more"):
        factorised.shrunk(part, torch.zeros(4, dtype=torch.bool))
    for rank in (0, 6):
        with pytest.raises(ValueError, match=rf"5 x 6 matrix has ranks in 1..5, got {rank}"):
            GatedLowRankLinear(6, 5, rank)


@pytest.mark.method("T-05")
def test_gated_and_shrunk_models_keep_the_contract(tiny, tmp_path):
    gates.gate_layers(tiny)
    shrunk = bert.fresh_copy(spread(tiny))
    gates.burn_in(shrunk)
    for name, model in (("gated", tiny.eval()), ("shrunk", shrunk)):
        path = tmp_path / f"{name}.safetensors"
        artifacts.save(model, path)
        contract.write(path, model, 7)
        for length, many in ((1, 1), (9, 1), (4, 3)):
            assert costs.measured_macs(model, length, many) == costs.macs(model, length, many)
    assert fresh.broken(tmp_path) == {}
    assert {type(part) for part in parts.find(shrunk).values()} == {LowRankLinear}


# --- start and size -------------------------------------------------------------------------------------------------


@pytest.mark.method("T-05")
def test_the_start_is_the_svd_at_the_break_even_rank(tiny):
    dense = {matrix.name: matrix.weight.clone() for matrix in bert.matrices(tiny)}
    kept = gates.gate_layers(tiny)  # psi = log 19: closed with 0.05
    for path, part in gates.gated(tiny).items():
        W = dense[f"{path}.weight"]
        out, columns = W.shape
        assert part.rank == int(out * columns / (out + columns)) == (16 if out == columns else 21)
        U, S, Vh = np.linalg.svd(W.detach().numpy(), full_matrices=False)
        np.testing.assert_allclose(
            (part.left @ part.right).detach(), U[:, : part.rank] * S[: part.rank] @ Vh[: part.rank], atol=1e-5
        )
        assert torch.allclose(part.log_alpha, torch.tensor(math.log(19)))
        assert kept[f"{path}.weight"] == pytest.approx(1 - ((W - part.weight).norm() / W.norm()).item() ** 2, abs=1e-5)
    assert set(kept) == set(dense)
    other = bert.fresh_copy(tiny)
    with pytest.raises(ValueError, match="not linear layers"):  # they are replaced already
        gates.gate_layers(other)


@pytest.mark.method("T-05")
def test_a_start_that_is_none_leaves_the_model_as_it_was(tiny):
    before = bert.fingerprint(tiny)
    for closed in (0, 1):
        with pytest.raises(ValueError, match="between closed"):
            gates.gate_layers(tiny, closed=closed)
    for rank in (0, 33):
        with pytest.raises(ValueError, match=rf"32 x 32 matrix has ranks in 1..32, got {rank}"):
            gates.gate_layers(tiny, rank=rank)
    tiny.get_submodule(FIRST).weight.data[1, 2] = torch.inf
    with pytest.raises(ValueError, match="finite weights"):
        gates.gate_layers(tiny)
    tiny.get_submodule(FIRST).weight.data[1, 2] = 0
    assert not parts.find(tiny) and before
    with pytest.raises(ValueError, match="call gate_layers first"):
        gates.sparsity(tiny)
    for target, warmup in ((1.0, 5), (-0.1, 5), (0.5, 0)):
        with pytest.raises(ValueError, match=r"a target in \[0, 1\)"):
            gates.Lagrangian(target, warmup)


@pytest.mark.method("T-05")
def test_sparsity_is_expected_size_over_dense_size(tiny):
    gates.gate_layers(tiny, ("query", "ffn_in"), rank=5)
    spread(tiny)
    expected = 0.0
    for part in gates.gated(tiny).values():
        for a in part.log_alpha.tolist():
            expected += (part.in_features + part.out_features) / (1 + math.exp(-a - math.log(11)))
    assert gates.sparsity(tiny).item() == pytest.approx(1 - expected / (2 * (32 * 32 + 32 * 64)), rel=1e-5)
    part = tiny.get_submodule(FIRST)
    gates.sparsity(tiny).backward()
    a, step = part.log_alpha[2].item(), 0.05
    values = []
    for sign in (1, -1):
        part.log_alpha.data[2] = a + sign * step
        values.append(gates.sparsity(tiny).item())
    assert part.log_alpha.grad[2].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.01)


# --- the Lagrangian -------------------------------------------------------------------------------------------------


@pytest.mark.method("T-05")
def test_the_penalty_and_its_rising_goal(tiny):
    gates.gate_layers(tiny)
    lagrangian = gates.Lagrangian(target=0.6, warmup=4)
    lagrangian.multipliers.data = torch.tensor([2.0, 30.0])
    s, goals = gates.sparsity(tiny).item(), []
    for step in range(1, 7):
        goals.append(lagrangian.goal)
        gap = s - goals[-1]
        assert lagrangian.penalty(tiny).item() == pytest.approx(2 * gap + 30 * gap**2, rel=1e-5)
        lagrangian.advance(step, tiny, None)
    assert goals == pytest.approx([0, 0.15, 0.3, 0.45, 0.6, 0.6])
    assert lagrangian.history == [(goal, pytest.approx(s)) for goal in goals]


@pytest.mark.method("T-05")
def test_weights_and_gates_descend_and_multipliers_climb(tiny):
    gates.gate_layers(tiny)
    lagrangian = gates.Lagrangian(0.5, 1, step=1)
    lagrangian.multipliers.data = torch.tensor([0.1, 0.1])
    groups = gates.optimizer_groups(tiny, lagrangian, gate_rate=0.02, multiplier_rate=0.3)
    assert [group.get("lr") for group in groups] == [None, 0.02, 0.3] and groups[1]["weight_decay"] == groups[2][
        "weight_decay"
    ] == 0
    counted = [sum(p.numel() for p in group["params"]) for group in groups]
    ranks = sum(part.rank for part in gates.gated(tiny).values())
    assert counted == [sum(p.numel() for p in tiny.parameters()) - ranks, ranks, 2]
    optimizer, _ = training.make_optimizer(tiny, 5, 1e-3, groups)
    before = [part.log_alpha.clone() for part in gates.gated(tiny).values()]
    gap = gates.sparsity(tiny).item() - 0.5
    assert gap < 0
    lagrangian.penalty(tiny).backward()
    optimizer.step()
    first, second = lagrangian.multipliers.tolist()
    assert first == pytest.approx(0.1 - 0.3, abs=1e-4) and second == pytest.approx(
        0.1 + 0.3, abs=1e-4
    )  # signs of gap, gap squared
    # 0.1 - 2 * 0.1 * |gap| > 0: at first less sparsity costs less, so gates open
    assert all((part.log_alpha > old).all() for part, old in zip(gates.gated(tiny).values(), before, strict=True))


@pytest.mark.method("T-05")
def test_the_constraint_is_met():
    """With nothing but the penalty the multipliers first pull sparsity up, and come to rest where it is the target."""
    model = nn.ModuleList([GatedLowRankLinear(32, 32, 16), GatedLowRankLinear(32, 64, 21)])
    for part in model:
        part.log_alpha.data.fill_(3.0)
    lagrangian = gates.Lagrangian(0.5, warmup=150)
    groups = gates.optimizer_groups(model, lagrangian, 0.2, 1.0)
    optimizer, schedule = training.make_optimizer(model, 300, 1e-4, groups, hold=150)
    for step in range(1, 301):
        lagrangian.penalty(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        lagrangian.advance(step, model, optimizer)
        schedule.step()
    found = [s for _, s in lagrangian.history]
    assert found[0] == pytest.approx(0.01, abs=0.01) and found[-1] == pytest.approx(0.5, abs=0.005)
    assert lagrangian.multipliers[0].abs() < 2 and lagrangian.multipliers[1] > 10
    gates.burn_in(model)
    assert 1 - sum(part.rank * (part.in_features + part.out_features) for part in model) / 3072 == pytest.approx(0.5, abs=0.03)


@pytest.mark.method("T-05")
def test_training_moves_gates_and_burning_in_changes_no_logit(tiny, batch):
    gates.gate_layers(tiny, closed=0.3)
    before = {name: parameter.clone() for name, parameter in tiny.named_parameters()}
    lagrangian = gates.Lagrangian(0.6, warmup=2)
    options = {
        "loss": gates.constrained(lagrangian),
        "parameters": gates.optimizer_groups(tiny, lagrangian, 0.3, 1.0),
        "after_step": lagrangian.advance,
    }
    log = training.train(tiny, task_of(batch), profiles.get("smoke"), steps=3, learning_rate=1e-3, hold=1, **options)
    assert [goal for goal, _ in lagrangian.history] == pytest.approx([0, 0.3, 0.6]) and np.isfinite(log.losses).all()
    own = {f"{path}.{name}" for path, part in gates.gated(tiny).items() for name, _ in part.named_parameters()}
    assert all(not torch.equal(parameter, before[name]) for name, parameter in tiny.named_parameters() if name in own)
    assert lagrangian.multipliers[1] > 0.5
    expected, parameters = logits(tiny.eval(), batch), costs.parameter_counts(tiny)["parameters"]
    assert torch.equal(logits(tiny, batch), expected)  # nothing is drawn in evaluation
    gates.burn_in(tiny)
    torch.testing.assert_close(logits(tiny, batch), expected, atol=1e-5, rtol=1e-4)
    assert costs.parameter_counts(tiny)["parameters"] < parameters - 100


def test_the_penalty_is_added_to_any_loss(tiny, batch):
    gates.gate_layers(tiny)
    lagrangian = gates.Lagrangian(0.5, 1, step=1)
    lagrangian.multipliers.data = torch.tensor([0.0, 4.0])
    extra = lagrangian.penalty(tiny).item()
    tiny.eval()
    task_loss = training.cross_entropy(tiny, batch).item()
    assert gates.constrained(lagrangian)(tiny, batch).item() == pytest.approx(task_loss + extra)
    assert gates.constrained(lagrangian, lambda model, batch: torch.tensor(3.0))(tiny, batch).item() == pytest.approx(3 + extra)
    assert extra > 0.5


@pytest.mark.method("T-05")
def test_gates_keep_the_components_that_the_task_needs():
    """Two matrices with flat spectra; their inputs lie along 2 and 8 of 16 singular vectors, the last ones. A truncated SVD
    would keep none of these."""
    model, bases, needed = nn.ModuleList(), [], (2, 8)
    for _ in needed:
        U, V = (torch.linalg.qr(torch.randn(16, 16)).Q for _ in range(2))
        linear = nn.Linear(16, 16)
        linear.weight.data = U @ torch.diag(torch.linspace(2, 1, 16)) @ V.T
        model.append(GatedLowRankLinear.from_linear(linear, 16))
        bases.append((linear, V))
    lagrangian = gates.Lagrangian(1 - 10 * 32 / (2 * 16 * 16), warmup=60)
    optimizer = torch.optim.AdamW(gates.optimizer_groups(model, lagrangian, 0.2, 0.3), lr=1e-4)
    for step in range(1, 201):
        loss = lagrangian.penalty(model)
        for part, (linear, V), rank in zip(model, bases, needed, strict=True):
            x = torch.randn(32, rank) @ V[:, -rank:].T
            loss = loss + (part(x) - linear(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lagrangian.advance(step, model, optimizer)
    for path, rank in zip(("0", "1"), needed, strict=True):
        kept = gates.kept_components(model)[path].nonzero().flatten().tolist()
        assert set(range(16 - rank, 16)) <= set(kept) and len(kept) <= rank + 1
    report = gates.gate_report(model, size=10 * 32 / 512)
    assert report["reordered"] > 0.75 and report["sparsity"] == pytest.approx(0.375, abs=0.1)
    assert (report["smallest"], report["largest"]) == (2 * 32 / 256, 8 * 32 / 256)
    assert gates.learned_plan(model, size=10 * 32 / 512) == {("0.weight",): 2, ("1.weight",): 8}


# --- components that stay -------------------------------------------------------------------------------------------


@pytest.mark.method("T-05")
@pytest.mark.parametrize("size", [0.1, 0.31, 0.7])
def test_the_likeliest_components_that_fit(size, tiny):
    gates.gate_layers(tiny, ("query", "ffn_in"))
    spread(tiny)
    first = tiny.get_submodule("bert.encoder.layer.1.attention.self.query")
    first.log_alpha.data -= 20  # none of it would be kept
    kept = gates.kept_components(tiny, size)
    layers = gates.gated(tiny)
    entries = sorted(((part.log_alpha[k].item(), path, k) for path, part in layers.items() for k in range(part.rank)),
                     reverse=True)  # fmt: skip
    best = {path: max(entry for entry in entries if entry[1] == path) for path in kept}
    budget, chosen = size * 2 * (32 * 32 + 32 * 64), []
    for entry in [*best.values(), *(entry for entry in entries if entry not in best.values())]:
        cost = 64 if "query" in entry[1] else 96
        if cost > budget:
            break
        budget, chosen = budget - cost, [*chosen, entry[1:]]
    assert {(path, int(k)) for path, mask in kept.items() for k in mask.nonzero()} == set(chosen)
    before = bert.fresh_copy(tiny)
    gates.burn_in(tiny, size)
    weights = sum(part.left.numel() + part.right.numel() for part in parts.find(tiny).values())
    assert size - 96 / 6144 < weights / 6144 <= size
    plan = gates.learned_plan(before, size)
    assert {names[0].removesuffix(".weight"): rank for names, rank in plan.items()} == {
        path: part.rank for path, part in parts.find(tiny).items()
    }
    with pytest.raises(ValueError, match=r"share of 0.05 of the weights does not hold one component of each"):
        gates.burn_in(before, 0.05)


@pytest.mark.method("T-05")
def test_learned_ranks_are_a_plan_for_other_methods(tiny):
    dense = bert.fresh_copy(tiny)
    gates.gate_layers(tiny)
    plan = gates.learned_plan(spread(tiny))
    gates.burn_in(tiny)
    factors.joint_svd(dense, plan)
    ranks = [{path: part.rank for path, part in parts.find(model).items()} for model in (tiny, dense)]
    assert ranks[0] == ranks[1] and len(set(ranks[0].values())) > 1
    assert costs.structure(tiny) == costs.structure(dense)


@pytest.mark.method("T-05")
def test_the_report_by_hand():
    model = nn.ModuleList([GatedLowRankLinear(4, 4, 4), GatedLowRankLinear(4, 12, 3)])
    model[0].log_alpha.data = torch.tensor([-9.0, 9.0, 9.0, 0.0])
    model[1].log_alpha.data = torch.tensor([9.0, -9.0, -9.0])
    report = gates.gate_report(model)
    opened = open_probability(torch.cat([part.log_alpha for part in model])).tolist()
    ones = factorised.one_probability(torch.cat([part.log_alpha for part in model])).tolist()
    assert report["undecided"] == pytest.approx(np.mean(opened) - np.mean(ones), abs=1e-5)
    assert report["sparsity"] == pytest.approx(1 - (8 * sum(opened[:4]) + 16 * sum(opened[4:])) / 64, abs=1e-5)
    assert report["reordered"] == 1 / 4  # of three kept components of the first layer one is not among its three leading ones
    ways = [np.mean([sum(place >= k for place in drawn) for drawn in itertools.combinations(range(R), k)])
            for k, R in ((3, 4), (1, 3))]  # fmt: skip
    assert report["by_lot"] == pytest.approx(sum(ways) / 4)
    assert (report["smallest"], report["largest"]) == (1 * 16 / 48, 3 * 8 / 16)
    assert factorised.settled_gates(model[0].log_alpha).count_nonzero() == 3
    for part, size in itertools.product(model, (1, 5)):
        assert part.macs(size) == size * part.rank * (part.in_features + part.out_features)


@pytest.mark.method("T-05")
def test_the_control_draws_components_by_lot_among_those_that_gates_begin_with(tiny):
    path, dense = FIRST, tiny.get_submodule(FIRST).weight.detach().numpy()
    U, S, Vh = np.linalg.svd(dense, full_matrices=False)
    drawn = []
    for seed in (0, 0, 1):
        model = bert.fresh_copy(tiny)
        kept = gates.lot_start(model, {(f"{path}.weight",): 6}, seed)
        made = model.get_submodule(path).weight.detach().numpy()
        shares = np.einsum("ok,oi,ki->k", U, made, Vh) / S  # 1 for a component that stayed, 0 for one that did not
        np.testing.assert_allclose(shares * (1 - shares), 0, atol=1e-4)
        drawn.append(np.flatnonzero(shares > 0.5).tolist())
        assert kept[f"{path}.weight"] == pytest.approx((S[drawn[-1]] ** 2).sum() / (S**2).sum(), abs=1e-4)
    assert len(drawn[0]) == 6 and max(drawn[0] + drawn[2]) < 21  # of 64 x 32: the break-even rank
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != list(range(6))
