"""Tensorized attention: explicit Tucker tensors, numpy's least squares, sentences without their padding, and the contract."""

import itertools

import fresh
import numpy as np
import pytest
import torch
from small_task import task_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils import artifacts, bert, contract, costs, parts, profiles, training
from utils.decomposition import trilinear
from utils.decomposition.tensors import tucker_tensor
from utils.parts.trilinear import TrilinearAttention, from_sentence, from_tensor, pair_products, trilinear_tensor

INPUTS = ("input_ids", "attention_mask")


@pytest.fixture
def tiny(tiny):
    """With biases and weights large enough that every layer and every gradient counts."""
    for name, parameter in tiny.named_parameters():
        if name.endswith("bias") or parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return tiny


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def inputs(batch: dict) -> dict:
    return {name: batch[name] for name in INPUTS}


def replaced(model: nn.Module, batch: dict, layers=(0, 1), length: int = 9, **options):
    """Fit on the batch and put in place; the parts and what they explain."""
    examples = trilinear.attention_examples(model, [batch], layers, length)
    made, shares, _ = trilinear.trilinear_parts(model, examples, examples, length=length, **options)
    trilinear.put_attention(model, made)
    return made, shares


def random_part(rank: int = 5, length: int = 6, blocks: int = 2, hidden: int = 8) -> TrilinearAttention:
    part = TrilinearAttention(hidden, rank, length, blocks)
    for parameter in part.parameters():
        nn.init.normal_(parameter)
    return part


def lines(q, k, v, g) -> np.ndarray:
    """The tensor entry by entry, (n, n, n)."""
    q, k, v, g = (array(one) for one in (q, k, v, g))
    made = np.empty((len(q), len(k), len(v)))
    for i, j, m in np.ndindex(*made.shape):
        made[i, j, m] = sum(g[r] * q[i, r] * k[j, r] * v[m, r] for r in range(len(g)))
    return made


# --- the tensor -----------------------------------------------------------------------------------------------------


@pytest.mark.method("T-11")
def test_the_tensor_is_a_tucker_tensor_with_a_diagonal_core():
    q, k, v = (torch.randn(4, 3) for _ in range(3))
    g = torch.randn(3)
    core = torch.zeros(3, 3, 3)
    core[range(3), range(3), range(3)] = g
    found = trilinear_tensor(q, k, v, g)
    expected = np.einsum("pqr,ip,jq,kr->ijk", *(array(one) for one in (core, q, k, v)))
    np.testing.assert_allclose(array(found).reshape(4, 4, 4), expected, atol=1e-5)
    np.testing.assert_allclose(lines(q, k, v, g), expected, atol=1e-5)
    torch.testing.assert_close(tucker_tensor(core, (q, k, v)).flatten(1), found)


@pytest.mark.method("T-11")
def test_blocks_that_share_their_factors_are_one_block():
    part = random_part(blocks=3)
    x = torch.randn(2, 6, 8)
    q, k, v = part.factors(x, None)
    tensors = [trilinear_tensor(q, k, v, g) for g in part.self.core]
    expected = nn.functional.linear(sum(tensors) / 3, part.output.dense.weight, part.output.dense.bias)
    torch.testing.assert_close(part.attend(x), expected, atol=1e-3, rtol=1e-4)
    single = TrilinearAttention(8, 5, 6)
    single.load_state_dict({**part.state_dict(), "self.core": part.self.core.mean(0, keepdim=True)})
    torch.testing.assert_close(part(x)[0], single(x)[0])


@pytest.mark.method("T-11")
def test_a_sum_over_keys_is_attention_only_where_all_values_are_one_number():
    """Corollary 1 of the paper, softmax left out: its proof reads V_km, a token and a dimension, as V_mr, another of each."""
    q, k = torch.randn(4, 4), torch.randn(4, 4)  # as many tokens as dimensions, or the shapes differ
    rows_alike = torch.randn(4, 1).expand(4, 4)  # "the elements in each row of the matrix V are the same"
    for v, same in ((torch.randn(4, 4), False), (rows_alike, False), (rows_alike.T, False), (torch.full((4, 4), 0.7), True)):
        summed = trilinear_tensor(q, k, v, torch.ones(4)).unflatten(-1, (4, 4)).sum(1)
        assert torch.allclose(summed, q @ k.T @ v, atol=1e-4) == same


@pytest.mark.method("T-11")
@pytest.mark.parametrize("rank", [2, 7])
def test_both_orders_compute_and_cost_what_they_say(rank):
    hidden, most = 8, 5
    part = random_part(rank, most, blocks=2, hidden=hidden)
    W, b = array(part.output.dense.weight).reshape(hidden, most, most), array(part.output.dense.bias)
    for n in range(1, most + 1):
        x = torch.randn(3, n, hidden)
        q, k, v = part.factors(x, None)
        g = part.self.core.mean(0)
        expected = np.stack([np.einsum("ijk,ojk->io", lines(*one, g), W[:, :n, :n]) + b for one in zip(q, k, v, strict=True)])
        weight, pairs = part.pairs_weight(n), pair_products(k, v)
        for name, order in (("tensor", from_tensor), ("sentence", from_sentence)):
            with FlopCounterMode(display=False) as counter:
                found = order(q * g, pairs, weight)
            np.testing.assert_allclose(array(found) + b, expected, atol=1e-3, rtol=1e-4)
            assert counter.get_total_flops() == 2 * 3 * part.orders(n)[name]
        assert part.orders(n) == {"tensor": n * n * n * rank + n * n * n * hidden,
                                  "sentence": rank * n * n * hidden + n * rank * hidden}  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            np.testing.assert_allclose(array(part.attend(x)), expected, atol=1e-3, rtol=1e-4)
        assert counter.get_total_flops() == 2 * 3 * part.macs(n)
    cheapest = {n: part.tensor_first(n) for n in range(1, most + 1)}
    assert cheapest == {n: n * n * (rank + hidden) <= rank * hidden * (n + 1) for n in cheapest}
    assert len(set(cheapest.values())) == 2 or rank == 7  # both orders are the cheaper one somewhere


@pytest.mark.method("T-11")
def test_without_a_softmax_the_output_is_linear_in_the_query():
    part = random_part(length=4)
    with torch.no_grad():
        x = torch.randn(2, 4, 8)
        before = part.attend(x) - part.output.dense.bias
        part.self.query.weight *= -3
        part.self.query.bias *= -3
        torch.testing.assert_close(part.attend(x) - part.output.dense.bias, -3 * before, atol=1e-3, rtol=1e-4)


# --- padding and long sentences -------------------------------------------------------------------------------------


@pytest.mark.method("T-11")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "linear"])  # the forms in which a layer is given its mask
def test_padding_is_zeroed(attention, tiny, batch):
    replaced(tiny, batch, rank=6)
    with bert.attention(tiny, attention), torch.inference_mode():
        together = tiny(**inputs(batch)).logits
        for row, length in enumerate((9, 7, 5, 9)):
            alone = tiny(**{name: batch[name][row : row + 1, :length] for name in INPUTS}).logits
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.method("T-11")
def test_a_shorter_sentence_is_one_with_zeros_behind_it():
    part = random_part(length=6)
    x, mask = torch.randn(2, 6, 8), torch.ones(2, 6)
    mask[:, 4:] = 0
    torch.testing.assert_close(part.attend(x, mask)[:, :4], part.attend(x[:, :4]), atol=1e-4, rtol=1e-4)
    features = trilinear.pair_features(part, x[:, :4], mask[:, :4].bool())
    assert features.shape == (2, 4, 36)
    expected = nn.functional.linear(features, part.output.dense.weight, part.output.dense.bias)
    torch.testing.assert_close(part.attend(x[:, :4]), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.method("T-11")
def test_too_many_tokens_are_refused_and_cut_off_by_the_context(tiny, batch):
    replaced(tiny, batch, (1,), 7, rank=6)
    part = tiny.bert.encoder.layer[1].attention
    for call in (lambda: tiny(**inputs(batch)), lambda: part.macs(8), lambda: costs.macs(tiny, 8)):
        with pytest.raises(ValueError, match=r"first 7 tokens, got [89] tokens: cut the sentences"):
            call()
    cut = {name: batch[name][:, :7] for name in INPUTS}
    with torch.inference_mode():
        expected = tiny(**cut).logits
        with trilinear.first_tokens(7)(tiny):
            torch.testing.assert_close(tiny(**inputs(batch)).logits, expected)
            torch.testing.assert_close(tiny(**cut).logits, expected)
    assert not tiny._forward_pre_hooks


# --- least squares --------------------------------------------------------------------------------------------------


@pytest.mark.method("T-11")
def test_ridge_regression_is_numpys():
    x, y = torch.randn(40, 3) + 2, torch.randn(40, 2)
    sums = trilinear.LeastSquares()
    for piece in (slice(0, 15), slice(15, 40)):
        sums.add(x[piece], y[piece])
    for ridge in (0.0, 0.5):
        penalty = ridge * (array(x) ** 2).sum(0).mean()
        left = np.vstack([np.hstack([array(x), np.ones((40, 1))]), np.hstack([penalty**0.5 * np.eye(3), np.zeros((3, 1))])])
        solution = np.linalg.lstsq(left, np.vstack([array(y), np.zeros((3, 2))]), rcond=None)[0]
        weight, bias = sums.solve(ridge)
        np.testing.assert_allclose(array(weight), solution[:3].T, atol=1e-5)
        np.testing.assert_allclose(array(bias), solution[3], atol=1e-5)


def examples_of(part: TrilinearAttention, count: int, n: int = 4) -> list[dict]:
    """Sentences of up to n tokens whose outputs a known part makes."""
    found = []
    for _ in range(count):
        x, mask = torch.randn(8, n, part.hidden_size), torch.arange(n) < torch.randint(1, n + 1, (8, 1))
        found.append({3: trilinear.Example(x, mask, part.attend(x, mask).detach())})
    return found


@pytest.mark.method("T-11")
def test_a_planted_map_is_found_again_and_the_best_ridge_is_taken():
    planted = random_part(length=4)
    fit, held = examples_of(planted, 30), examples_of(planted, 3)
    features = lambda layer, x, mask: trilinear.pair_features(planted, x, mask)  # noqa: E731
    maps, shares, chosen = trilinear.best_maps(fit, held, features, ridges=(10.0, 1e-9, 1.0))
    assert chosen == {3: 1e-9} and trilinear.best_maps(fit, held, features)[2] == {3: 0.01}  # nothing is noise here
    torch.testing.assert_close(maps[3][0], planted.output.dense.weight.detach(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(maps[3][1], planted.output.dense.bias.detach(), atol=1e-3, rtol=1e-3)
    assert shares[3] == pytest.approx(1, abs=1e-4)
    each = [trilinear.best_maps(fit, held, features, ridges=(ridge,))[1][3] for ridge in (10.0, 1.0)]
    assert max(each) < shares[3] and trilinear.best_maps(fit, held, features, ridges=(10.0, 1.0))[1][3] == max(each)


@pytest.mark.method("T-11")
def test_explained_is_the_share_of_the_variance_of_real_tokens():
    examples = examples_of(random_part(length=4), 3)
    features = lambda layer, x, mask: trilinear.mean_of_tokens(x, mask)  # noqa: E731
    maps = {layer: sums.solve(1e-3) for layer, sums in trilinear.regress(examples, features).items()}
    y = np.concatenate([array(one[3].y[one[3].mask]) for one in examples])
    means = []
    for one in (example[3] for example in examples):
        for x, mask in zip(one.x, one.mask, strict=True):
            means.append(np.repeat(array(x)[mask.numpy()].mean(0, keepdims=True), int(mask.sum()), 0))
    made = np.concatenate(means) @ array(maps[3][0]).T + array(maps[3][1])
    expected = 1 - ((y - made) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert trilinear.explained(examples, trilinear.linear_prediction(features, maps))[3] == pytest.approx(expected, abs=1e-6)
    mean = torch.from_numpy(y.mean(0))
    assert trilinear.explained(examples, lambda layer, x, mask: mean.expand(*mask.shape, -1))[3] == pytest.approx(0, abs=1e-9)


# --- the method -----------------------------------------------------------------------------------------------------


@pytest.mark.method("T-11")
def test_layers_begin_at_the_regression_onto_the_dense_attention(tiny, batch, monkeypatch):
    dense = bert.fresh_copy(tiny)
    examples = trilinear.attention_examples(tiny, [batch], (1,), 7)
    monkeypatch.setattr(trilinear.best_maps, "__defaults__", ((1e-3,),))
    made, shares = replaced(tiny, batch, (1,), 7, rank=8)
    assert list(parts.find(tiny)) == ["bert.encoder.layer.1.attention"] and list(made) == [1]
    layer, cut = dense.bert.encoder.layer[1].attention, {name: batch[name][:, :7] for name in INPUTS}
    real = cut["attention_mask"].bool()
    with torch.no_grad():
        x = dense(**cut, output_hidden_states=True).hidden_states[1]
        mask = torch.zeros(4, 1, 1, 7).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
        with bert.attention(dense, "eager"):
            y = layer.output.dense(layer.self(x, mask)[0])
        rows = torch.arange(8) * 4
        q, k, v = (nn.functional.linear(x, one.weight[rows], one.bias[rows])
                   for one in (layer.self.query, layer.self.key, layer.self.value))  # fmt: skip
    torch.testing.assert_close(examples[0][1].x, x)
    torch.testing.assert_close(examples[0][1].y, y)
    T = np.stack([lines(q[i], k[i] * real[i, :, None], v[i] * real[i, :, None], torch.ones(8)) for i in range(4)])
    T, y = T.reshape(4, 7, 49)[real.numpy()], array(y)[real.numpy()]
    T /= (T**2).mean() ** 0.5  # the scale is in the core
    left = np.hstack([T, np.ones((len(T), 1))])
    penalty = np.diag([1e-3 * (T**2).sum(0).mean()] * 49 + [0.0])
    solution = np.linalg.solve(left.T @ left + penalty, left.T @ y)
    np.testing.assert_allclose(array(made[1].output.dense.weight), solution[:-1].T, atol=1e-3 * np.abs(solution).max())
    np.testing.assert_allclose(array(made[1].attend(x, real)[real]), left @ solution, atol=1e-3 * np.abs(y).max())
    expected = 1 - ((y - left @ solution) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert shares[1] == pytest.approx(expected, abs=1e-4)
    assert torch.equal(made[1].output.LayerNorm.weight, layer.output.LayerNorm.weight)
    untouched = tiny.bert.encoder.layer[0].state_dict()
    assert all(torch.equal(value, untouched[key]) for key, value in dense.bert.encoder.layer[0].state_dict().items())


@pytest.mark.method("T-11")
def test_a_random_start_knows_nothing_of_the_rows(tiny, batch):
    attention, (examples,) = tiny.bert.encoder.layer[0].attention, trilinear.attention_examples(tiny, [batch], (0, 1), 9)
    first, again, other = (
        trilinear.trilinear_start(attention, examples[0], 6, 9, start="random", seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.self.query.weight, again.self.query.weight)
    assert not torch.equal(first.self.query.weight, other.self.query.weight)
    assert not first.self.key.bias.any()
    assert float(first.self.value.weight.std()) == pytest.approx(float(attention.self.value.weight.std()), rel=0.2)
    made, *_ = trilinear.trilinear_parts(tiny, [examples], [examples], rank=6, length=9, start="random")
    assert not torch.equal(made[0].self.query.weight / made[0].self.query.weight.std(),
                           made[1].self.query.weight / made[1].self.query.weight.std())  # fmt: skip


@pytest.mark.method("T-11")
def test_training_moves_everything_and_keeps_the_form(tiny, batch):
    replaced(tiny, batch, length=8, rank=6, blocks=2)
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    with trilinear.first_tokens(8)(tiny):
        log = training.train(tiny, task_of(batch), profiles.get("smoke"), steps=2, learning_rate=1e-2)
    own = {f"{path}.{key}" for path, part in parts.find(tiny).items() for key, _ in part.named_parameters()}
    assert len(own) == 2 * 11 and np.isfinite(log.losses).all()
    assert all(not torch.equal(value, before[key]) for key, value in tiny.state_dict().items() if key in own)


@pytest.mark.method("T-11")
def test_the_control_adds_a_map_of_the_mean_of_all_values(tiny, batch):
    dense = bert.fresh_copy(tiny)
    fitted = trilinear.attention_examples(dense, [batch], (0,), 9)
    maps, *_ = trilinear.best_maps(fitted, fitted, trilinear.mean_of_values(tiny))
    trilinear.put_mean(tiny, maps)
    attention = tiny.bert.encoder.layer[0].attention
    one = trilinear.attention_examples(tiny, [batch], (0,), 9)[0][0]
    values = dense.bert.encoder.layer[0].attention.self.value(one.x)
    for row, length in enumerate((9, 7, 5, 9)):
        mean = values[row, :length].mean(0)
        expected = nn.functional.linear(mean, attention.output.dense.weight, attention.output.dense.bias)
        torch.testing.assert_close(one.y[row, :length], expected.expand(length, -1), atol=1e-4, rtol=1e-4)
    assert torch.equal(attention.output.dense.weight, maps[0][0])
    training.train(tiny, task_of(batch), profiles.get("smoke"), steps=3, learning_rate=1e-2)
    assert not any(p.any() for module in (attention.self.query, attention.self.key) for p in module.parameters())
    assert not torch.equal(attention.self.value.weight, dense.bert.encoder.layer[0].attention.self.value.weight)


@pytest.mark.method("T-11")
def test_the_other_control_adds_one_vector_and_training_leaves_it_at_that(tiny, batch):
    fitted = trilinear.attention_examples(tiny, [batch], (0, 1), 9)
    trilinear.put_bias(tiny, fitted, (0,))
    attention = tiny.bert.encoder.layer[0].attention
    expected = fitted[0][0].y[fitted[0][0].mask].mean(0)
    found = trilinear.attention_examples(tiny, [batch], (0, 1), 9)[0]
    torch.testing.assert_close(found[0].y, expected.expand_as(found[0].y), atol=1e-6, rtol=1e-5)
    assert found[1].y.std() > 0.01
    training.train(tiny, task_of(batch), profiles.get("smoke"), steps=3, learning_rate=1e-2)
    assert not any(p.any() for p in (*attention.self.parameters(), attention.output.dense.weight))
    assert not torch.equal(attention.output.dense.bias, expected)


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.method("T-11")
def test_every_model_comes_back_in_a_fresh_process(tiny, batch, tmp_path):
    for name, options in {"all": {"layers": (0, 1), "rank": 3}, "one": {"layers": (1,), "rank": 20, "blocks": 3}}.items():
        model = bert.fresh_copy(tiny)
        replaced(model, batch, **options)
        path = tmp_path / f"{name}.safetensors"
        artifacts.save(model, path)
        for length in (5, 9):
            assert costs.measured_macs(model, length, 2) == costs.macs(model, length, 2)
        contract.write(path, model, 7)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method("T-11")
def test_sizes_are_those_of_the_formula(tiny, batch):
    for rank, n, blocks in itertools.product((1, 32), (2, 9), (1, 4)):
        part = TrilinearAttention(32, rank, n, blocks)
        own = 3 * (32 + 1) * rank + blocks * rank + 32 * n * n + 32 + 2 * 32
        assert sum(p.numel() for p in part.parameters()) == own
        assert part.options() == {"hidden_size": 32, "rank": rank, "length": n, "blocks": blocks}


@pytest.mark.method("T-11")
def test_what_cannot_be_is_refused_and_leaves_the_model_as_it_was(tiny, batch):
    before = bert.fingerprint(tiny)
    refused = [
        ({"layers": (2,)}, r"one or more of 0..1, got \[2\]"),
        ({"layers": ()}, r"one or more of 0..1, got \[\]"),
        ({"rank": 0}, "rank in 1..32, and 1 token and 1 block or more, got rank 0"),
        ({"rank": 33}, "got rank 33"),
        ({"blocks": 0}, "0 blocks"),
        ({"start": "zeros"}, "rows, random, got 'zeros'"),
    ]
    for change, match in refused:
        with pytest.raises(ValueError, match=match):
            replaced(tiny, batch, **{"rank": 4, **change})
    with pytest.raises(ValueError, match="no calibration batches"):
        trilinear.attention_examples(tiny, [], (0,), 9)
    with pytest.raises(ValueError, match="1 token and 1 block or more, got rank 4, 0 tokens"):
        TrilinearAttention(32, 4, 0)
    assert bert.fingerprint(tiny) == before and not parts.find(tiny)
    replaced(tiny, batch, (0,), rank=4)
    with pytest.raises(ValueError, match=r"BERT's own attention, one or more of 0..1, got \[0, 1\]"):
        trilinear.attention_examples(tiny, [batch], (0, 1), 9)
