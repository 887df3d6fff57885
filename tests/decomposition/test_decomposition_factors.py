"""Two factors: numpy's SVD and least squares, closed forms of the papers, loops, and the contract of every factorised model."""

import functools
import itertools

import fresh
import numpy as np
import pytest
import torch
from small_task import task_of
from torch import nn

from utils import artifacts, bert, contract, costs, parts, profiles, training
from utils.decomposition import factors
from utils.parts.linear import LowRankLinear

INPUTS = ("input_ids", "attention_mask")
ATTENTION = "bert.encoder.layer.0.attention.self"
QKV = tuple(f"{ATTENTION}.{group}.weight" for group in factors.READ_ONE_STATE)
FFN_IN, FFN_OUT = "bert.encoder.layer.0.intermediate.dense.weight", "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture
def tiny(tiny):
    """With biases and weights large enough that every layer and every gradient counts."""
    for name, parameter in tiny.named_parameters():
        if name.endswith("bias") or parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return tiny


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_submodule(name.removesuffix(".weight")).weight.detach().clone()


def part_of(model: nn.Module, name: str) -> LowRankLinear:
    return model.get_submodule(name.removesuffix(".weight"))


def inputs_of(model: nn.Module, name: str, batch: dict) -> torch.Tensor:
    """X (in, tokens) of a layer, sentence by sentence, each without its padding."""
    seen = []
    hook = part_of(model, name).register_forward_hook(lambda module, args, y: seen.append(args[0][0]))
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        model(input_ids=ids[mask.bool()][None])
    hook.remove()
    return torch.cat(seen).detach().T


def joint(model, batch):
    return factors.joint_svd(model, factors.even_plan(model))


def anchored(model, batch):
    return factors.joint_svd(model, factors.even_plan(model), anchor="value")


def separate(model, batch):
    return factors.joint_svd(model, factors.plan_by_variance(factors.spectra(model, shared=False)))


def at_random(model, batch):
    return factors.random_start(model, factors.even_plan(model), seed=3)


def data_aware(model, batch):
    return factors.weighted_svd(model, factors.even_plan(model), factors.input_moments(model, [batch]))


def fisher(model, batch):
    return factors.weighted_svd(model, factors.even_plan(model, shared=False), factors.fisher_moments(model, [batch]))


CHANGES = (joint, anchored, separate, at_random, data_aware, fisher)
each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.method("T-01", "T-02")
def test_every_factorised_model_comes_back_in_a_fresh_process(tiny, batch, tmp_path):
    for change in CHANGES:
        model = bert.fresh_copy(tiny)
        change(model, batch)
        path = tmp_path / f"{change.__name__}.safetensors"
        artifacts.save(model, path)
        contract.write(path, model, 7)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method("T-01", "T-02")
@each_change
def test_factors_are_what_they_say(change, tiny, batch):
    dense, before = bert.fresh_copy(tiny), {m.name: m.weight.clone() for m in bert.matrices(tiny)}
    kept = change(tiny, batch)
    assert {type(part) for part in parts.find(tiny).values()} == {LowRankLinear} and set(kept) == set(before)
    for length, many in ((1, 1), (9, 1), (4, 3)):
        assert costs.measured_macs(tiny, length, many) == costs.macs(tiny, length, many)
    for name, W in before.items():
        part = part_of(tiny, name)
        made = part.left @ part.right
        assert kept[name] == pytest.approx(1 - ((W - made) ** 2).sum().item() / (W**2).sum().item(), abs=1e-5)
        torch.testing.assert_close(part.bias, part_of(dense, name).bias)
        plain = nn.Linear(part.in_features, part.out_features)
        plain.weight.data, plain.bias.data = made.detach(), part.bias.detach()
        dense.set_submodule(name.removesuffix(".weight"), plain)
    found = tiny(**{key: batch[key] for key in INPUTS}).logits
    torch.testing.assert_close(found, dense(**{key: batch[key] for key in INPUTS}).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.method("T-01", "T-02")
@pytest.mark.parametrize("change", [joint, at_random], ids=lambda change: change.__name__)
def test_one_projection_is_stored_trained_and_counted_once(change, tiny, batch, tmp_path):
    before = costs.parameter_counts(tiny)["parameters"]
    plan = factors.even_plan(tiny, 0.4)
    with_plan = {joint: factors.joint_svd, at_random: factors.random_start}[change]
    with_plan(tiny, plan)
    shapes = {1: (96, 32), 2: (32, 32), 3: (64, 32), 4: (32, 64)}  # query, key and value; output; feed-forward in; and out
    rank = [int(0.4 * rows * columns / (rows + columns)) for rows, columns in shapes.values()]
    assert list(plan.values()) == 2 * rank
    weights = 2 * sum(r * (rows + columns) for r, (rows, columns) in zip(rank, shapes.values(), strict=True))
    assert before - costs.parameter_counts(tiny)["parameters"] == 2 * (4 * 32 * 32 + 2 * 32 * 64) - weights
    artifacts.save(tiny, tmp_path / "m")
    for model in (tiny, artifacts.load(tmp_path / "m"), bert.fresh_copy(tiny)):
        query, key, value = (part_of(model, name) for name in QKV)
        assert query.right is key.right is value.right and query.left is not key.left
    old = tiny.state_dict()[f"{ATTENTION}.query.right"].clone()
    training.train(tiny, task_of(batch), profiles.get("smoke"), steps=2, learning_rate=1e-2)
    assert not torch.equal(part_of(tiny, QKV[1]).right, old) and part_of(tiny, QKV[0]).right is part_of(tiny, QKV[2]).right


def test_columns_of_one_factor_are_as_long_as_rows_of_the_other():
    lefts, right = [torch.randn(3, 4), torch.randn(5, 4)], torch.randn(4, 6)
    lefts[0][:, 2] = lefts[1][:, 2] = 0  # a component that is none
    made, common = factors.balanced(lefts, right)
    torch.testing.assert_close(torch.cat(made) @ common, torch.cat(lefts) @ right)
    lengths = torch.cat(made).norm(dim=0)[[0, 1, 3]], common.norm(dim=1)[[0, 1, 3]]
    torch.testing.assert_close(*lengths)


# --- what may not be ------------------------------------------------------------------------------------------------


@pytest.mark.method("T-01", "T-02")
def test_a_refused_plan_leaves_the_model_as_it_was(tiny, batch):
    before, moments = bert.fingerprint(tiny), factors.input_moments(tiny, [batch], ("query", "key", "value"))
    methods = (factors.joint_svd, factors.random_start, functools.partial(factors.weighted_svd, moments=moments))
    for method, rank in itertools.product(methods, (0, 33)):
        with pytest.raises(ValueError, match=rf"96 x 32 matrix has ranks in 1..32, got {rank}"):
            method(tiny, {(FFN_IN,): 3, QKV: rank} if method is not methods[2] else {QKV: rank})
    with pytest.raises(ValueError, match=r"no moments of bert.encoder.layer.0.intermediate"):
        methods[2](tiny, {QKV: 2, (FFN_IN,): 2})
    with pytest.raises(ValueError, match="one of query, key, value, got 'ffn_in'"):
        factors.joint_svd(tiny, {QKV: 3}, anchor="ffn_in")
    with pytest.raises(ValueError, match=r"weights of linear layers, got bert.embeddings.word_embeddings.weight"):
        factors.joint_svd(tiny, {("bert.embeddings.word_embeddings.weight",): 3})
    with pytest.raises(ValueError, match="have other widths"):
        factors.joint_svd(tiny, {(FFN_IN, FFN_OUT): 3})
    assert bert.fingerprint(tiny) == before and not parts.find(tiny)
    factors.joint_svd(tiny, {QKV: 3})
    with pytest.raises(ValueError, match="weights of linear layers, got"):
        factors.random_start(tiny, {QKV: 3})
    part_of(tiny, FFN_IN).weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"intermediate.dense.weight must have finite weights"):
        factors.joint_svd(tiny, {(FFN_IN,): 3})


def test_shares_that_are_none(tiny):
    energies = factors.spectra(tiny)
    for variance in (0, -0.1, 1.01):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            factors.plan_by_variance(energies, variance)
    for size in (1.0, 0.03):
        with pytest.raises(ValueError, match=r"\[0.0469, 1\), got"):
            factors.plan_by_size(tiny, energies, size)
        with pytest.raises(ValueError, match="below 1 and leave every family a rank"):
            factors.even_plan(tiny, size)
    for gather in (factors.input_moments, factors.fisher_moments):
        with pytest.raises(ValueError, match="no calibration batches"):
            gather(tiny, [])
        with pytest.raises(ValueError, match="not linear layers"):
            gather(tiny, [{}], ("word_embeddings",))


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.method("T-01")
def test_a_measured_break_even_is_where_straight_lines_cross_one():
    ranks = [10, 20, 40]
    assert factors.crossing(ranks, [0.5, 0.9, 1.4]) == pytest.approx(24)  # a fifth of the way from 0.9 to 1.4
    assert factors.crossing(ranks, [0.5, 1.0, 0.9]) == 20  # the first time counts
    assert factors.crossing(ranks, [1.1, 0.7, 1.4]) == 0 and factors.crossing(ranks, [0.3, 0.5, 0.9]) == np.inf
    with pytest.raises(ValueError, match="3 ranks and 2 ratios"):
        factors.crossing(ranks, [0.5, 1.5])


@pytest.mark.method("T-01")
def test_break_even_is_where_the_counts_cross(tiny):
    table = factors.break_even(tiny, (*bert.ENCODER, "pooler"))
    assert table.index.tolist() == [("query+key+value", 96, 32), ("attention_output", 32, 32), ("ffn_in", 64, 32),
                                    ("ffn_out", 32, 64), ("pooler", 32, 32)]  # fmt: skip
    assert table["full"].tolist() == [32] * 5
    assert factors.break_even_rank(768, 3072) == 614.4 and factors.break_even_rank(768, 768) == 384
    for family, what in itertools.product(factors.families(tiny), ("parameters", "macs")):
        limit = table.xs(family.label)[what].item()
        for rank, fewer in ((int(np.ceil(limit)) - 1, True), (int(limit) + 1, False)):
            model = bert.fresh_copy(tiny)
            count = {"parameters": lambda m: costs.parameter_counts(m)["parameters"], "macs": lambda m: costs.macs(m, 5)}[what]
            before = count(model)
            factors.joint_svd(model, {family.names: rank})
            assert (count(model) < before) == fewer


@pytest.mark.method("T-01")
def test_families_are_what_reads_one_input(tiny, batch):
    names = [[m.group for m in family.matrices] for family in factors.families(tiny)]
    assert names == 2 * [["query", "key", "value"], ["attention_output"], ["ffn_in"], ["ffn_out"]]
    assert [len(family.matrices) for family in factors.families(tiny, ("query", "key"), shared=False)] == [1] * 4
    for family in factors.families(tiny):
        read = [inputs_of(tiny, name, batch) for name in family.names]
        assert all(torch.equal(one, read[0]) for one in read)
        assert family.shape == tuple(torch.cat(family.weights).shape) and family.parameters() == sum(
            w.numel() for w in family.weights
        )


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.method("T-01")
def test_the_rank_is_the_first_that_retains_the_variance():
    energies = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    torch.testing.assert_close(factors.retained(energies), torch.tensor([0.4, 0.7, 0.9, 1.0, 1.0]).double())
    found = {variance: factors.rank_for(energies, variance) for variance in (0.01, 0.39, 0.41, 0.69, 0.71, 0.95, 1.0)}
    assert list(found.values()) == [1, 1, 2, 2, 3, 4, 4]
    assert factors.rank_for(energies) == 2 == factors.plan_by_variance({("w",): energies})["w",]


@pytest.mark.method("T-01")
@pytest.mark.parametrize("size", [0.1, 0.35, 0.8])
def test_no_larger_variance_fits_the_budget(size, tiny):
    for layer in tiny.bert.encoder.layer:
        layer.intermediate.dense.weight.data[:, 3:] = 0  # of rank 3
        nn.init.orthogonal_(layer.attention.output.dense.weight)  # of equal singular values: the first to be better off dense
    energies = factors.spectra(tiny)
    plan = factors.plan_by_size(tiny, energies, size)

    def weights(ranks: dict) -> int:
        shapes = {names: torch.cat([weight_of(tiny, name) for name in names]).shape for names in ranks}
        return sum(min(rank * sum(shapes[names]), shapes[names].numel()) for names, rank in ranks.items())

    def at(variance: float) -> dict:
        return {names: int(np.argmax(np.cumsum(e) / np.sum(e) >= variance - 1e-12)) + 1
                for names, e in ((names, array(values)) for names, values in energies.items())}  # fmt: skip

    steps = sorted({float(v) for values in energies.values() for v in factors.retained(values)})
    fits = [at(variance) for variance in steps if weights(at(variance)) <= size * 2 * (4 * 32 * 32 + 2 * 32 * 64)]
    best = {names: rank for names, rank in fits[-1].items() if weights({names: rank}) < weights({names: 10_000})}
    assert plan == best and set(plan.values()) != {1}
    assert factors.plan_size(tiny, plan) == pytest.approx(weights(plan) / weights(dict.fromkeys(plan, 10_000)))


@pytest.mark.method("T-01")
def test_an_even_plan_is_the_largest_below_its_size(tiny):
    for (names, rank), family in zip(factors.even_plan(tiny, 0.37).items(), factors.families(tiny), strict=True):
        assert names == family.names
        assert family.parameters(rank) <= 0.37 * family.parameters() < family.parameters(rank + 1)


# --- T-01 joint SVD -------------------------------------------------------------------------------------------------


@pytest.mark.method("T-01")
def test_the_shared_projection_is_the_best_there_is(tiny):
    stack = np.concatenate([array(weight_of(tiny, name)) for name in QKV])
    U, S, Vh = np.linalg.svd(stack, full_matrices=False)
    factors.joint_svd(tiny, {QKV: 7})
    made = np.concatenate([array(part_of(tiny, name).left @ part_of(tiny, name).right) for name in QKV])
    np.testing.assert_allclose(made, U[:, :7] * S[:7] @ Vh[:7], atol=1e-5)
    assert ((stack - made) ** 2).sum() == pytest.approx((S[7:] ** 2).sum(), rel=1e-5)


@pytest.mark.method("T-01")
def test_an_anchor_gives_the_projection_and_least_squares_the_rest(tiny):
    dense = {name: array(weight_of(tiny, name)) for name in QKV}
    stacked = bert.fresh_copy(tiny)
    factors.joint_svd(stacked, {QKV: 7})
    factors.joint_svd(tiny, {QKV: 7}, anchor="value")
    _, S, Vh = np.linalg.svd(dense[QKV[2]])
    errors = {}
    for name, W in dense.items():
        made = array(part_of(tiny, name).left @ part_of(tiny, name).right)
        Z = np.linalg.lstsq(Vh[:7].T, W.T, rcond=None)[0].T
        np.testing.assert_allclose(made, Z @ Vh[:7], atol=1e-5)
        np.testing.assert_allclose((W - made) @ Vh[:7].T, 0, atol=1e-5)  # what is left has nothing of P in it
        errors[name] = ((W - made) ** 2).sum()
    assert errors[QKV[2]] == pytest.approx((S[7:] ** 2).sum(), rel=1e-5)  # the anchor has its own best
    ours = [part_of(stacked, name) for name in QKV]
    missed = [W - array(part.left @ part.right) for W, part in zip(dense.values(), ours, strict=True)]
    assert sum(errors.values()) > 1.05 * np.square(missed).sum()
    with pytest.raises(ValueError, match=r"32 x 48 matrix has ranks in 1..32, got 40"):
        factors.shared_projection([torch.randn(32, 48)] * 3, 40, anchor=0)


# --- T-02 a random start --------------------------------------------------------------------------------------------


@pytest.mark.method("T-02")
def test_a_random_start_is_the_same_graph_that_knows_nothing(tiny):
    plan, dense, informed, again = factors.even_plan(tiny), tiny, bert.fresh_copy(tiny), bert.fresh_copy(tiny)
    factors.joint_svd(informed, plan)
    tiny = bert.fresh_copy(tiny)
    kept = factors.random_start(tiny, plan, seed=5)
    assert costs.structure(tiny) == costs.structure(informed)
    assert np.mean(list(kept.values())) == pytest.approx(-1, abs=0.1)  # two unrelated matrices of one norm
    for name in (*QKV, FFN_IN, FFN_OUT):
        part, W = part_of(tiny, name), weight_of(dense, name)
        assert (part.left @ part.right).norm().item() == pytest.approx(W.norm().item(), rel=1e-4)
    for module in again.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.roll(1, 0)  # other matrices of the same norms
    factors.random_start(again, plan, seed=5)
    for name in (*QKV, FFN_IN, FFN_OUT):
        torch.testing.assert_close(part_of(again, name).left, part_of(tiny, name).left)
    other = bert.fresh_copy(dense)
    factors.random_start(other, plan, seed=6)
    assert not torch.equal(part_of(other, FFN_IN).right, part_of(tiny, FFN_IN).right)


# --- data and gradients ---------------------------------------------------------------------------------------------


def test_input_moments_are_those_of_unpadded_sentences(tiny, batch):
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    groups = ("query", "ffn_out", "pooler")
    found, centred = (factors.input_moments(tiny, halves, groups, centred) for centred in (False, True))
    for name in (QKV[0], FFN_OUT, "bert.pooler.dense.weight"):
        X = array(inputs_of(tiny, name, batch)) if "pooler" not in name else None
        if X is None:
            hidden = tiny.bert(**{key: batch[key] for key in INPUTS}).last_hidden_state
            X = array(hidden[:, 0]).T
        np.testing.assert_allclose(found[name], X @ X.T / X.shape[1], atol=1e-5)
        np.testing.assert_allclose(centred[name], np.cov(X, bias=True), atol=1e-5)
    assert len(found) == 2 + 2 + 1


def test_fisher_information_by_one_backward_pass_per_sentence(tiny, batch):
    groups = ("key", "ffn_in", "ffn_out", "classifier")
    found = factors.fisher_moments(tiny, [{key: value[:3] for key, value in batch.items()},
                                          {key: value[3:] for key, value in batch.items()}], groups)  # fmt: skip
    expected = {matrix.name: 0 for matrix in bert.matrices(tiny, groups)}
    for row in range(4):
        tiny.zero_grad()
        one = {key: value[row : row + 1] for key, value in batch.items()}
        training.cross_entropy(tiny.eval(), one).backward()
        for name in expected:
            expected[name] = expected[name] + (part_of(tiny, name).weight.grad ** 2).sum(0) / 4
    assert set(found) == set(expected)
    for name, information in expected.items():
        assert found[name].shape == (part_of(tiny, name).in_features,) and information.max() > 0
        torch.testing.assert_close(found[name], information.double(), rtol=1e-4, atol=1e-9)


def test_data_aware_factors_are_those_of_drone(tiny, batch):
    dense, plan = bert.fresh_copy(tiny), {QKV: 6, (FFN_IN,): 5, (FFN_OUT,): 5}
    factors.weighted_svd(tiny, plan, factors.input_moments(tiny, [batch]))
    plain = bert.fresh_copy(dense)
    factors.joint_svd(plain, plan)
    for names, rank in plan.items():
        W = np.concatenate([array(weight_of(dense, name)) for name in names])
        X = array(inputs_of(dense, names[0], batch))  # fewer tokens than inputs of the second feed-forward matrix
        _, S_w, V_w = np.linalg.svd(W, full_matrices=False)
        U_x, S_x, _ = np.linalg.svd(X, full_matrices=False)
        t = int((S_x > 1e-6 * S_x[0]).sum())
        U_z, S_z, V_z = np.linalg.svd(S_w[:, None] * (V_w @ U_x[:, :t]) * S_x[:t])
        Z = U_z[:, :rank] * S_z[:rank] @ V_z[:rank]
        M = V_w.T / S_w @ Z / S_x[:t] @ U_x[:, :t].T  # theorem 1
        made, other = (np.concatenate([array(part_of(model, name).left @ part_of(model, name).right) for name in names])
                       for model in (tiny, plain))  # fmt: skip
        np.testing.assert_allclose(made @ X, W @ M @ X, atol=1e-3)
        error = ((W @ X - made @ X) ** 2).sum()
        assert error == pytest.approx((np.linalg.svd(W @ X)[1][rank:] ** 2).sum(), rel=1e-3)
        assert error < 0.95 * ((W @ X - other @ X) ** 2).sum() and np.linalg.matrix_rank(made, tol=1e-4) == rank


def test_fisher_weighted_factors_are_those_of_the_paper(tiny, batch):
    information = factors.fisher_moments(tiny, [batch])
    information[FFN_IN][4] = 0  # an input that no loss depends on
    plan, W = {(FFN_IN,): 5}, array(weight_of(tiny, FFN_IN)).T  # (in, out), the paper's
    factors.weighted_svd(tiny, plan, information)
    root = np.sqrt(array(information[FFN_IN]))[:, None]
    U, S, Vh = np.linalg.svd(root * W, full_matrices=False)
    made = array(part_of(tiny, FFN_IN).left @ part_of(tiny, FFN_IN).right).T
    some = np.arange(32) != 4
    np.testing.assert_allclose(made[some], (U[:, :5] * S[:5] @ Vh[:5])[some] / root[some], atol=1e-4)
    np.testing.assert_allclose(made[4], W[4] @ Vh[:5].T @ Vh[:5], atol=1e-4)  # as near as the others' directions come


def test_without_weights_the_directions_are_those_of_the_svd():
    for shape in ((7, 4), (4, 7), (5, 5)):
        W = torch.randn(shape)
        U, energies = factors.leading_directions(W)
        expected = np.linalg.svd(array(W), full_matrices=False)
        np.testing.assert_allclose(energies, expected[1] ** 2, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(np.abs(np.sum(array(U) * expected[0], 0)), 1, atol=1e-9)
        c = torch.rand(shape[1])
        same = factors.leading_directions(W, c), factors.leading_directions(W, torch.diag(c))
        torch.testing.assert_close(same[0][1], same[1][1])
        np.testing.assert_allclose(same[0][1], np.linalg.svd(array(W * c.sqrt()), compute_uv=False) ** 2, rtol=1e-5)


def test_spectra_of_weights_inputs_and_outputs(tiny, batch):
    moments = factors.input_moments(tiny, [batch])
    of_weights, of_outputs = factors.spectra(tiny), factors.spectra(tiny, moments)
    of_inputs = factors.input_spectra(moments)
    W = np.concatenate([array(weight_of(tiny, name)) for name in QKV])
    X = array(inputs_of(tiny, QKV[0], batch))
    scale = X.shape[1]
    np.testing.assert_allclose(of_weights[QKV], np.linalg.svd(W, compute_uv=False) ** 2, rtol=1e-5)
    np.testing.assert_allclose(
        of_outputs[QKV][:20], np.linalg.svd(W @ X, compute_uv=False)[:20] ** 2 / scale, rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(
        of_inputs[QKV[0],][:20], np.linalg.svd(X, compute_uv=False)[:20] ** 2 / scale, rtol=1e-3, atol=1e-6
    )


def test_ranks_are_counted_in_directions_of_weights_and_inputs_alike(tiny, batch):
    groups = ("key", "ffn_out")
    X = torch.linalg.qr(torch.randn(64, 64)).Q  # inputs of the second feed-forward matrix: 64 directions, all of one length
    moments = factors.input_moments(tiny, [batch], groups)
    found = {"W": factors.spectra(tiny, groups=groups, shared=False), "random": factors.noise_spectra(tiny, groups),
             "X": factors.input_spectra(moments | {FFN_OUT: X @ X.T})}  # fmt: skip
    table = factors.ranks_needed(found, 0.8)
    assert list(table.columns) == ["W", "random", "X"] and len(table) == 4
    for name in (QKV[1], FFN_OUT):
        energies = np.linalg.svd(array(weight_of(tiny, name)), compute_uv=False) ** 2
        assert table.loc[name, "W"] == np.argmax(np.cumsum(energies) / energies.sum() >= 0.8) + 1 <= 32
    assert table.loc[FFN_OUT, "X"] == 52  # of 64: more than W, which is 32 by 64, has at all
    noise = {name: len(energies) for (name,), energies in found["random"].items()}
    assert noise == dict.fromkeys(table.index, 32) and table["random"].between(10, 24).all()
    square, wide = (found["random"][name,] for name in (QKV[1], FFN_OUT))
    assert not torch.equal(square, wide) and wide.mean() == pytest.approx(64, rel=0.1)


def test_a_family_has_the_mean_of_its_matrices_moments(tiny, batch):
    information = factors.fisher_moments(tiny, [batch])  # each matrix has its own, though they read one input
    family = factors.family_of(tiny, QKV)
    expected = sum(information[name] for name in QKV) / 3
    torch.testing.assert_close(factors.moment_of(family, information), expected)
    assert not torch.allclose(information[QKV[0]], expected, rtol=0.05)


# --- errors and bounds ----------------------------------------------------------------------------------------------


@pytest.mark.method("T-01", "T-02")
def test_errors_stand_beside_the_least_that_they_can_be(tiny, batch):
    plan, moments = factors.even_plan(tiny), factors.input_moments(tiny, [batch])
    information, made = factors.fisher_moments(tiny, [batch]), {}
    for name, method in (("svd", factors.joint_svd), ("random", factors.random_start),
                         ("drone", functools.partial(factors.weighted_svd, moments=moments)),
                         ("fisher", functools.partial(factors.weighted_svd, moments=information))):  # fmt: skip
        made[name] = bert.fresh_copy(tiny)
        method(made[name], plan)
    excess = {(name, what): factors.excess(factors.error_table(tiny, model, plan, weights)) for name, model in made.items()
              for what, weights in (("weights", None), ("outputs", moments), ("loss", information))}  # fmt: skip
    best = {("svd", "weights"), ("drone", "outputs"), ("fisher", "loss")}
    for which, value in excess.items():
        assert value == pytest.approx(1, abs=1e-3) if which in best else value > 1.02
    table = factors.error_table(tiny, made["random"], plan, moments)
    W = torch.cat([weight_of(tiny, name) for name in QKV])
    X, parts_of = inputs_of(tiny, QKV[0], batch), [part_of(made["random"], name) for name in QKV]
    missed = W - torch.cat([part.left @ part.right for part in parts_of])
    row = table.loc[0, "query+key+value"]
    assert row["error"] == pytest.approx(((missed @ X).norm() ** 2 / (W @ X).norm() ** 2).item(), rel=1e-4)
    tail = np.linalg.svd(array(W @ X), compute_uv=False) ** 2
    assert row["bound"] == pytest.approx(tail[plan[QKV] :].sum() / tail.sum(), rel=1e-3) and row["rank"] == plan[QKV]
    assert list(table.index) == [(layer, label) for layer in (0, 1) for label in
                                 ("query+key+value", "attention_output", "ffn_in", "ffn_out")]  # fmt: skip


def test_no_excess_where_nothing_is_missed(tiny):
    plan = {(FFN_IN,): 32}
    model = bert.fresh_copy(tiny)
    factors.joint_svd(model, plan)
    table = factors.error_table(tiny, model, plan)
    assert table["bound"].item() == 0 and table["error"].item() < 1e-9 and factors.excess(table) == np.inf
