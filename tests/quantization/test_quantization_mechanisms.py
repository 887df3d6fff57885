"""Scope, order and defaults of quantization methods: where they act, in which order, how far. Each test once had a mutant that lived."""

import copy
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from utils.bert import ENCODER, linear_matrices, matrices
from utils.quantization import binary, codebook, few_bits, integer, loss_aware, ternary, uniform
from utils.quantization.quantizer import attach
from utils.training import cross_entropy


def run(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# --- where ----------------------------------------------------------------------------------------------------------


@pytest.mark.method("Q-05")
def test_all_encoder_matrices_and_nothing_else_get_rounded_gradients(tiny, batch):
    def gradients() -> dict[str, torch.Tensor]:
        tiny.zero_grad()
        cross_entropy(tiny, batch).backward()
        return {name: p.grad.clone() for name, p in tiny.named_parameters() if p.grad is not None}

    exact = gradients()
    with binary.power_of_two_backprop(tiny):
        rounded = gradients()
    changed = {name for name in exact if not torch.allclose(exact[name], rounded[name], rtol=1e-4, atol=1e-9)}
    assert changed == {m.name for m in linear_matrices(tiny, ENCODER)} and len(changed) == 12


@pytest.mark.method("Q-06")
def test_every_linear_layer_of_a_bnn_sees_signs_and_sums_integers(tiny, batch):
    seen = {}

    def watch(name: str):
        return lambda module, inputs, output: seen.update({name: (inputs[0], output - module.bias)})

    attach(tiny, lambda m: binary.BinaryConnect(1.0))
    with torch.no_grad(), binary.binary_activations(tiny):
        handles = [m.module.register_forward_hook(watch(m.name)) for m in matrices(tiny)]
        run(tiny, batch)
        [handle.remove() for handle in handles]
    assert len(seen) == 12
    for x, product in seen.values():
        assert set(x.unique().tolist()) == {-1, 1}
        torch.testing.assert_close(product, product.round(), atol=1e-4, rtol=0)


@pytest.mark.method("Q-15")
def test_the_hybrid_is_ternary_in_every_layer(tiny, batch):
    hidden, maps = {}, {}
    with torch.no_grad(), ternary.ternary_activations(tiny, ternary.Slope(1.0, 1)):
        handles = []
        for number, layer in enumerate(tiny.bert.encoder.layer):
            handles.append(layer.output.dense.register_forward_pre_hook(lambda m, x, n=number: hidden.update({n: x[0]})))
            handles.append(layer.attention.self.register_forward_hook(lambda m, x, y, n=number: maps.update({n: y[1]})))
        run(tiny, batch)
        [handle.remove() for handle in handles]
    assert set(hidden) == set(maps) == {0, 1}
    for number in (0, 1):
        assert all(len(token.abs().unique()) <= 2 for token in hidden[number].flatten(0, 1))
        assert set(maps[number].unique().tolist()) <= {0, 1}


# --- in which order -------------------------------------------------------------------------------------------------


@pytest.mark.method("Q-13")
def test_the_step_search_goes_from_input_to_output(tiny):
    order = []

    def evaluate(model: nn.Module) -> float:
        order.extend(m.name for m in matrices(model) if parametrize.is_parametrized(m.module, "weight") and m.name not in order)
        return 0.0

    ternary.greedy_step_search(tiny, evaluate, factors=(1.0,))
    layer = "bert.encoder.layer.{}.{}.weight"
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
             "intermediate.dense", "output.dense")  # fmt: skip
    assert order == [layer.format(number, part) for number in (0, 1) for part in parts]


@pytest.mark.method("Q-25")
def test_refined_codes_are_chosen_for_the_residual_of_refined_scales():
    w = torch.randn(6, 50)
    rest, codes = w, []
    for _ in range(3):  # Guo et al. 2017, row by row with torch's least squares
        codes.append(torch.where(rest < 0, -1.0, 1.0))
        B = torch.stack(codes, 1)
        alpha = torch.stack([torch.linalg.lstsq(b.T, x).solution for b, x in zip(B, w, strict=True)])
        rest = w - (alpha.unsqueeze(-1) * B).sum(1)
    found_alpha, found_B = codebook.greedy_bits(w, 3, refine=True)
    assert torch.equal(found_B, B) and not torch.equal(found_B, codebook.greedy_bits(w, 3)[1])
    torch.testing.assert_close(found_alpha, alpha, atol=1e-4, rtol=1e-4)


@pytest.mark.method("Q-24", "Q-25", "Q-26")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_alternating_beats_refined_and_refined_beats_greedy(bits):
    w = torch.randn(32, 200)
    error = {name: (codebook.MultiBitQuantizer(bits, name).quantize(w) - w).square().sum() for name in codebook.MULTI_BIT}
    assert error["alternating"] < 0.995 * error["refined"] < 0.995 * error["greedy"]


# --- how far --------------------------------------------------------------------------------------------------------


def squared(quantizer: nn.Module, w: torch.Tensor) -> float:
    return (quantizer.quantize(w) - w).square().sum().item()


@pytest.mark.method("Q-20")
def test_k_means_of_scalars_goes_on_until_little_moves():
    w = torch.randn(100, 200)
    few, many = (squared(codebook.StaticKMeans(w, 4, "linear", n), w) for n in (3, 2000))
    usual = squared(codebook.StaticKMeans(w, 4, "linear"), w)
    assert usual < 1.02 * many and few > 1.2 * many


@pytest.mark.method("Q-22")
def test_k_means_of_vectors_goes_on_until_little_moves():
    w = torch.randn(400, 8)
    one, many = (squared(codebook.ProductQuantizer(w, 2, 4, fit=codebook.Fit(iterations=n)), w) for n in (1, 200))
    usual = squared(codebook.ProductQuantizer(w, 2, 4), w)
    assert usual < 1.03 * many and one > 1.1 * many


@pytest.mark.method("Q-19a", "Q-19b", "Q-19c")
@pytest.mark.parametrize("bins", uniform.BALANCED)
def test_balanced_levels_reach_from_end_to_end_of_the_mean_range(bins):
    w = torch.randn(40, 50)
    levels = uniform.BalancedQuantizer(3, bins, clip="mean").quantize(w).unique()
    end = 1.25 * w.abs().mean()
    torch.testing.assert_close(levels, torch.linspace(-end, end, 8), atol=1e-6, rtol=0)


@pytest.mark.method("Q-27")
def test_each_alternation_starts_from_the_scale_of_the_step_before(tiny, batch):
    attach(tiny, lambda m: loss_aware.LossAwareQuantizer(m.weight, 3), ("ffn_in",))
    module = tiny.bert.encoder.layer[0].intermediate.dense
    quantizer, latent = module.parametrizations.weight[0], module.parametrizations.weight.original
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-3)
    for step in (1, 2):
        cross_entropy(tiny, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = quantizer.alpha.clone()
        loss_aware.update_curvature(step, tiny, optimizer)
        D = optimizer.state[latent]["exp_avg_sq"].sqrt() + 1e-8
        expected = loss_aware.loss_aware_scale(latent.detach(), D, quantizer.levels, before)
        assert torch.equal(quantizer.alpha, expected) and not torch.equal(quantizer.alpha, before)


@pytest.mark.method("Q-08", "Q-27")
def test_curvature_makes_loss_aware_weights_differ_from_those_of_least_distance(tiny, batch):
    """What a row of these methods may claim: without the hook they would be BWN and TWN."""
    attach(tiny, lambda m: binary.LAB(m.weight), ("ffn_in",))
    module = tiny.bert.encoder.layer[0].intermediate.dense
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-3)
    cross_entropy(tiny, batch).backward()
    optimizer.step()
    latent = module.parametrizations.weight.original.detach()
    assert torch.allclose(module.weight, binary.BWN().quantize(latent))
    binary.track_curvature(1, tiny, optimizer)
    assert not torch.allclose(module.weight, binary.BWN().quantize(latent), rtol=1e-3)


@pytest.mark.method("Q-27")
@pytest.mark.parametrize("bits", [2, 3])
def test_the_alternation_goes_on_until_the_scale_hardly_moves(bits):
    w, D, levels = torch.randn(20_000), torch.rand(20_000), loss_aware.level_values(bits)
    fixed = loss_aware.loss_aware_scale(w, D, levels, loss_aware.first_alpha(w, levels), 500, 0.0).item()
    far = {n: abs(loss_aware.loss_aware_scale(w, D, levels, torch.tensor(1.3 * fixed), n).item() - fixed) for n in (1, 10)}
    usual = abs(loss_aware.loss_aware_scale(w, D, levels, torch.tensor(1.3 * fixed)).item() - fixed)
    assert usual == far[10] < 0.5 * far[1]  # the paper's ten rounds, each nearer
    fresh = loss_aware.LossAwareQuantizer(w.view(100, 200), bits)  # solved for at once, too
    plain = loss_aware.loss_aware_scale(w, torch.ones_like(w), levels, loss_aware.first_alpha(w, levels), 500, 0.0)
    assert fresh.alpha.item() == pytest.approx(plain.item(), rel=0.02)


@pytest.mark.method("Q-27")
@pytest.mark.parametrize(("bits", "kind"), [(2, "linear"), (3, "linear"), (4, "linear"), (3, "logarithmic")])
def test_evenly_spaced_levels_need_no_search(bits, kind):
    levels, x = loss_aware.level_values(bits, kind), torch.randn(5000)
    assert torch.equal(loss_aware.nearest_value(x, levels), levels[loss_aware.nearest_level(x, levels)])


@pytest.mark.method("Q-27")
def test_without_curvature_the_scale_is_that_of_least_squares_and_still_follows_the_weights(tiny, batch):
    made = {}
    for curvature in (True, False):
        model = copy.deepcopy(tiny)
        attach(model, lambda m, curvature=curvature: loss_aware.LossAwareQuantizer(m.weight, 3, curvature=curvature))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        before = [q.alpha.clone() for _, q in binary.latent_weights(model, loss_aware.LossAwareQuantizer)]
        cross_entropy(model, batch).backward()
        optimizer.step()
        loss_aware.update_curvature(1, model, optimizer)
        made[curvature] = [q for _, q in binary.latent_weights(model, loss_aware.LossAwareQuantizer)]
        assert all(q.alpha != alpha for q, alpha in zip(made[curvature], before, strict=True))
    assert binary.curvature_spread(made[True]) > 2 and binary.curvature_spread(made[False]) == 1
    assert all(a.alpha != b.alpha for a, b in zip(made[True], made[False], strict=True))


# --- what a row of few bits tells -----------------------------------------------------------------------------------


def rows_of_few_bits(accuracy: float, low: float, high: float) -> SimpleNamespace:
    """A board with one trained row, as `reading` and `guessing` see it."""
    effect = {few_bits.CHANGED: 1.25, few_bits.FIRST: 0.7, few_bits.LAST: 0.5}
    against = {"control": "dense, 60 steps at 0.0003", "difference": -0.05, "ci95": [-0.07, -0.03]}
    row = SimpleNamespace(label="BWN", effect=effect, against_control=against, accuracy=accuracy, accuracy_ci95=[low, high])
    return SimpleNamespace(find=lambda label: row, compare=lambda first, second: f"{first} with {second}",
                           task=SimpleNamespace(majority_accuracy=lambda: 0.5))  # fmt: skip


@pytest.mark.method("Q-07", "Q-12")
def test_a_reading_has_the_codes_the_losses_and_both_controls():
    text = few_bits.reading(rows_of_few_bits(0.7, 0.68, 0.72), "BWN", "BWN, frozen").replace("\n", " ")
    for part in (
        "1.25 % of the codes",
        "from 0.70 to 0.50",
        "dense, 60 steps at 0.0003",
        "-5.0 points [-7.0, -3.0]",
        "BWN with BWN, frozen",
    ):
        assert part in text
    assert "frozen" not in few_bits.reading(rows_of_few_bits(0.7, 0.68, 0.72), "BWN")


@pytest.mark.method("Q-01", "Q-06", "Q-10", "Q-15")
@pytest.mark.parametrize(("low", "high", "level", "verb"), [
    (0.49, 0.53, "at", "contains"), (0.51, 0.53, "above", "excludes"), (0.45, 0.49, "below", "excludes")])  # fmt: skip
def test_guessing_is_said_where_the_interval_contains_it(low, high, level, verb):
    text = few_bits.guessing(rows_of_few_bits(0.5, low, high), "BWN").replace("\n", " ")
    assert f"BWN: {level} the level of guessing" in text and verb in text


@pytest.mark.method("Q-07", "Q-12")
def test_the_mechanism_of_a_trained_row_is_bounded_from_below_and_that_of_a_frozen_one_is_zero():
    trial = SimpleNamespace(losses=[6.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0])
    assert few_bits.moved(trial, 0.7) == {
        few_bits.CHANGED: (0.7, 0.5, None), few_bits.FIRST: (3.5, None, None), few_bits.LAST: (2.0, None, None)}  # fmt: skip
    assert few_bits.moved(trial, 0.0, None, 0.0)[few_bits.CHANGED] == (0.0, None, 0.0)
    with pytest.raises(ValueError, match="without training"):
        few_bits.moved(SimpleNamespace(losses=[]), 0.0)


# --- in which arithmetic --------------------------------------------------------------------------------------------


@pytest.mark.method("Q-16")
def test_torchao_rounds_what_comes_in_and_multiplies_integers(tiny, batch):
    engine = integer.torchao_int8(tiny, compiled=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine(**batch)
    counts = {event.key: event.count for event in profile.key_averages()}
    linears = sum(isinstance(module, nn.Linear) for module in tiny.modules())
    assert counts.get("aten::_int_mm") == linears and "aten::addmm" not in counts


@pytest.mark.method("Q-16")
def test_onnx_runtime_gets_as_many_threads_as_torch(tiny, tmp_path, monkeypatch):
    asked = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options, **kwargs):
            asked.append(options.intra_op_num_threads)
            super().__init__(path, options, **kwargs)

    integer.export_onnx(tiny, tmp_path / "float32.onnx")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    integer.onnx_runtime(tmp_path / "float32.onnx", tiny.config)
    assert asked == [3]
