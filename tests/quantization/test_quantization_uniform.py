"""Uniform, power-of-two and balanced quantization, of weights and activations, against torch's own and numpy."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from utils import artifacts, bert
from utils.encodings import decode
from utils.quantization import uniform
from utils.quantization.quantizer import attach, detach, remembered
from utils.quantization.uniform import (
    ActivationQuantizer,
    BalancedQuantizer,
    EvenQuantizer,
    PowerOfTwoQuantizer,
    UniformQuantizer,
)
from utils.training import cross_entropy

BITS = [1, 2, 3, 4, 8]


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture
def weight():
    return torch.randn(24, 32) * 0.05 + 0.01


@pytest.mark.method("Q-16")
@pytest.mark.parametrize("bits", BITS)
def test_printed_formulas_have_their_levels_and_agree_with_each_other(bits):
    x = torch.rand(4000)
    n = 2**bits - 1
    assert set((uniform.q_k(x, bits) * n).round().int().tolist()) == set(range(n + 1))
    assert (uniform.q_k(x, bits) - x).abs().max() <= 0.5 / n + 1e-6
    signed = uniform.q_k_signed(2 * x - 1, bits)
    torch.testing.assert_close(signed, 2 * uniform.q_k(x, bits) - 1, atol=1e-6, rtol=0)
    general = uniform.q_k_general(3 * x - 1, bits)
    quantized = UniformQuantizer(bits, symmetric=False, zero_on_grid=False).quantize((3 * x - 1).view(40, 100)).flatten()
    torch.testing.assert_close(general, quantized, atol=1e-5, rtol=0)
    assert torch.equal(uniform.q_k_general(torch.full((5,), 2.0), bits), torch.full((5,), 2.0))


@pytest.mark.method("Q-16")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_per_tensor_and_per_row_equal_torchs_fake_quantization(weight, bits):
    n = 2 ** (bits - 1) - 1
    scale = weight.abs().max() / n
    expected = torch.fake_quantize_per_tensor_affine(weight, scale.item(), 0, -n, n)
    torch.testing.assert_close(UniformQuantizer(bits).quantize(weight), expected, atol=1e-7, rtol=1e-6)
    scales = weight.abs().amax(1) / n
    expected = torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros(24, dtype=torch.int32), 0, -n, n)
    torch.testing.assert_close(UniformQuantizer(bits, granularity="row").quantize(weight), expected, atol=1e-7, rtol=1e-6)


@pytest.mark.method("Q-16")
@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_groups_equal_torchs_per_channel_fake_quantization(weight, bits):
    groups = weight.reshape(24 * 4, 8)
    lo, hi = groups.amin(1), groups.amax(1)
    if bits > 1:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = (hi - lo) / (2**bits - 1)
    zero = torch.round(-lo / scale).int() if bits > 1 else -lo / scale  # torch's zero points are whole numbers
    expected = torch.fake_quantize_per_channel_affine(groups, scale, zero, 0, 0, 2**bits - 1).view_as(weight)
    quantizer = UniformQuantizer(bits, symmetric=False, granularity="group", group_size=8)
    torch.testing.assert_close(quantizer.quantize(weight), expected, atol=1e-6, rtol=0)


@pytest.mark.method("Q-16")
@pytest.mark.parametrize("bits", BITS[1:])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_zero_is_a_level_unless_the_formula_is_taken_as_printed(weight, bits, granularity):
    skewed = weight + 0.03 * (weight > 0)
    skewed[:, :2] = 0
    assert not UniformQuantizer(bits, False, granularity).quantize(skewed)[:, :2].any()
    assert UniformQuantizer(bits, False, granularity, zero_on_grid=False).quantize(skewed)[:, :2].all()


@pytest.mark.method("Q-16")
def test_one_symmetric_bit_has_two_levels_and_more_bits_keep_zero(weight):
    assert UniformQuantizer(1).quantize(weight).unique().numel() == 2
    weight[:3] = 0
    for bits in BITS[1:]:
        assert torch.equal(UniformQuantizer(bits).quantize(weight)[:3], torch.zeros(3, 32))


@pytest.mark.method("Q-16")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_mse_range_is_as_good_as_a_fine_search_and_ranges_follow_their_rules(bits, symmetric):
    x = torch.cat([torch.randn(3, 2000) * 0.05 + 0.01, torch.tensor([[2.0], [0.1], [-0.4]])], 1)

    def error(lo, hi):
        return (uniform.fake_quantize(x, lo, hi, bits, symmetric) - x).square().sum(-1)

    lo, hi = uniform.max_range(x, bits, symmetric)
    fine = torch.stack([error(lo * i / 1500, hi * i / 1500) for i in range(1, 1501)]).amin(0)
    found = uniform.mse_range(x, bits, symmetric)
    lucky = 1.01 if bits < 8 else 1.05  # with 256 levels the last per cent is which values happen to lie on one
    assert (error(*found) <= fine * lucky).all()
    torch.testing.assert_close(uniform.mse_range(x[1], bits, symmetric)[1], found[1][1])  # rows do not see each other
    x = x[0, :768]
    lo, hi = uniform.percentile_range(x, bits, symmetric, share=0.9)
    tail = x.abs() if symmetric else x
    assert hi.item() == np.quantile(tail.numpy(), 0.9, method="inverted_cdf")
    assert lo.item() == (-hi.item() if symmetric else -np.quantile(-x.numpy(), 0.9, method="inverted_cdf"))
    assert uniform.mean_range(x, bits, True)[1].item() == pytest.approx(1.25 * x.abs().mean().item())


@pytest.mark.method("Q-16")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_searched_error_is_exact_and_the_even_grid_is_the_best_of_three(bits):
    x, top = torch.randn(5, 300) * 0.05, 2**bits - 1
    x[0] = x[0].abs()  # one side alone: a level more above zero
    x[1] = 0.1 * torch.randint(0, top + 1, (300,)) - 0.05 * top  # on a grid without zero
    x[2, 30:] = 0  # mostly zeros: zero is a level
    ranges, peak, found = uniform.SortedValues.of(x), x.abs().amax(-1, keepdim=True), []
    for zero in (top / 2, top // 2, top // 2 + 1) if bits > 1 else (top / 2,):
        widest = peak / min(zero, top - zero)
        scale, error = uniform.least_error_scale(ranges, widest, torch.full_like(peak, zero), top)

        def measured(scale, zero=zero):
            return (scale * (torch.round(x / scale + zero).clamp(0, top) - zero) - x).double().square().sum(-1, keepdim=True)

        torch.testing.assert_close(error, measured(scale), atol=1e-6, rtol=1e-3)
        fine = torch.stack([measured(widest * i / 1000) for i in range(10, 1001)]).amin(0)
        assert (error <= fine * 1.02 + 1e-6).all()
        found.append(error)
    expected = torch.cat(found, 1)
    quantizer = EvenQuantizer(bits, "row")
    reached = (quantizer.quantize(x) - x).double().square().sum(-1)
    torch.testing.assert_close(reached, expected.amin(1), atol=1e-6, rtol=1e-3)
    zeros = quantizer.levels(x)[2].flatten().tolist()
    assert bits == 1 or (zeros[0] == top // 2 and zeros[1] == top / 2 and zeros[2] != top / 2)
    if bits == 2:  # the lesson's six numbers
        six = torch.tensor([[0.3, -0.3, 0.3, -0.3, 0.3, 0.9]])
        errors = [(q.quantize(six) - six).square().sum().item() for q in (UniformQuantizer(2), UniformQuantizer(2, clip="mse"))]
        assert errors == pytest.approx([0.45, 0.30])
        torch.testing.assert_close(EvenQuantizer(2).quantize(six), six)


@pytest.mark.method("Q-16")
def test_a_search_in_pieces_finds_the_same(weight, monkeypatch):
    whole = [EvenQuantizer(3, "row").quantize(weight), uniform.mse_range(weight, 3, True)[1]]
    monkeypatch.setattr(uniform, "CHUNK", 7 * 25 * 7)  # seven of the 24 rows at a time
    pieces = [uniform.even_grid.__wrapped__(weight.unsqueeze(1), 3), uniform.mse_range(weight, 3, True)[1]]
    again = uniform.from_codes(uniform.to_codes(weight.unsqueeze(1), *pieces[0], 3, False), *pieces[0]).view_as(weight)
    assert torch.equal(again, whole[0]) and torch.equal(pieces[1], whole[1])


@pytest.mark.method("Q-16")
def test_in_training_the_scale_follows_the_weight_by_least_squares_and_outside_it_is_searched(weight, monkeypatch):
    quantizer = EvenQuantizer(2, "row")
    scale, zero = quantizer.levels(weight)[1:]
    moved = weight * 1.3
    assert torch.allclose(quantizer.levels(moved)[1], 1.3 * scale) and quantizer.held is None
    quantizer.train()
    quantizer.levels(weight)
    monkeypatch.setattr(uniform, "even_grid", lambda *_: pytest.fail("searched again"))
    codes = torch.round(moved.unsqueeze(1) / scale + zero).clamp(0, 3) - zero
    expected = (moved.unsqueeze(1) * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
    torch.testing.assert_close(quantizer.levels(moved)[1], expected)
    quantizer.eval()
    held = quantizer.held[0].clone()
    torch.testing.assert_close(decode(quantizer.encode(moved)), quantizer.quantize(moved))  # one state for the value and the file
    assert torch.equal(quantizer.held[0], held)


@pytest.mark.method("Q-16", "Q-20")
def test_a_search_is_done_once_per_content_and_options(weight):
    calls = []

    @remembered
    def search(x, bits):
        calls.append(bits)
        return x.sum() * bits

    assert search(weight, 2) == search(weight.clone(), 2) and calls == [2]
    changed = weight.clone()
    changed[3, 4] += 1e-3
    assert search(changed, 2) != search(weight, 2)
    search(weight, 3), search(weight.view(-1), 2)
    assert calls == [2, 2, 3, 2]


@pytest.mark.method("Q-16", "Q-17")
def test_one_range_per_token_depends_on_that_token_alone():
    x = torch.randn(3, 5, 16)
    quantizer = ActivationQuantizer(3, clip="mse", granularity="token")
    alone = torch.stack([ActivationQuantizer(3, clip="mse")(token) for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(quantizer(x), alone)
    assert torch.equal(quantizer(x[1:2, 2:3]), quantizer(x)[1:2, 2:3])
    quantizer.observing = True
    with pytest.raises(ValueError, match="can be calibrated"):
        quantizer(x)
    with pytest.raises(ValueError, match="'tensor' or 'token'"):
        ActivationQuantizer(3, granularity="row")


@pytest.mark.method("Q-16")
def test_kl_divergence_is_scipys_and_the_clip_falls_between_bulk_and_outlier():
    from scipy.stats import entropy

    counts = torch.tensor([5.0, 3.0, 0.0, 2.0, 1.0, 4.0])
    P, Q = (
        np.array([5, 3, 0, 7.0]),
        np.array([4, 4, 1e-12, 2.0]),
    )  # kept 4 bins, 2 levels of 2 bins, the tail 1 + 4 goes into the last
    assert uniform.clip_divergence(counts, 4, 2).item() == pytest.approx(entropy(P, Q), rel=1e-5)
    x = torch.cat([torch.randn(20000), torch.tensor([14.0])])
    _, hi = uniform.kl_range(x, 8, True)
    assert 2.5 < hi.item() < 10
    rows = torch.stack([x, x.flip(0) * 2])
    assert torch.allclose(uniform.kl_range(rows, 8, True)[1].flatten(), hi * torch.tensor([1.0, 2.0]))


ALL = {
    **{f"uniform-{b}-{s}-{g}": functools.partial(UniformQuantizer, b, s, g, 8)
       for b in BITS for s in (True, False) for g in uniform.GRANULARITIES},
    **{f"uniform-{clip}": functools.partial(UniformQuantizer, 4, True, "row", clip=clip) for clip in uniform.RANGES},
    **{f"power-{b}-{u}-{s}": functools.partial(PowerOfTwoQuantizer, b, s, u)
       for b in (2, 4, 8) for u in ("zero", "smallest") for s in (True, False)},
    **{f"balanced-{b}-{how}-{c}": functools.partial(BalancedQuantizer, b, how, c)
       for b in BITS for how in uniform.BALANCED for c in ("lsq", "max", "mean")},
    **{f"even-{b}-{g}": functools.partial(EvenQuantizer, b, g, 8) for b in BITS[:4] for g in uniform.GRANULARITIES},
}  # fmt: skip


@pytest.mark.method("Q-16", "Q-18a", "Q-18b", "Q-19a", "Q-19b", "Q-19c")
@pytest.mark.parametrize("name", ALL)
def test_what_is_stored_decodes_to_what_is_computed(weight, name):
    quantizer = ALL[name]()
    for w in (weight, torch.zeros(24, 32), torch.full((24, 32), -0.3), weight.bfloat16()):
        quantized = quantizer.quantize(w)
        assert torch.isfinite(quantized).all() and quantized.dtype == w.dtype
        torch.testing.assert_close(decode(quantizer.encode(w)).to(w.dtype), quantized, atol=1e-6, rtol=0)
        assert quantized.unique().numel() <= 2**quantizer.bits * (24 * 4)
    with pytest.raises(ValueError, match="finite"):
        quantizer.quantize(torch.tensor([[1.0, math.nan]]))


@pytest.mark.method("Q-16", "Q-19a")
def test_constants_survive_and_bytes_follow_the_bits(weight):
    constant = torch.full((4, 32), 0.7)
    for quantizer in (UniformQuantizer(3, False), UniformQuantizer(1), BalancedQuantizer(2, clip="max")):
        torch.testing.assert_close(quantizer.quantize(constant), constant)
    n = 24 * 32
    assert UniformQuantizer(3).encode(weight).nbytes == n * 3 // 8 + 8
    assert UniformQuantizer(3, granularity="row").encode(weight).nbytes == n * 3 // 8 + 8 * 24
    assert UniformQuantizer(2, granularity="group", group_size=16).encode(weight).nbytes == n * 2 // 8 + 8 * 48
    assert PowerOfTwoQuantizer(4).encode(weight).nbytes == n * 4 // 8 + 4 * 15
    assert BalancedQuantizer(2).encode(weight).nbytes == n * 2 // 8 + 8


@pytest.mark.method("Q-18a")
def test_powers_of_two_are_the_nearest_and_underflow_as_told(weight):
    powers = PowerOfTwoQuantizer(8).quantize(weight)
    assert torch.equal(torch.log2(powers.abs()), torch.log2(powers.abs()).round())
    assert ((powers - weight).abs() <= weight.abs() / 3 + 1e-9).all()
    exponents = np.floor(np.log2(weight.abs().numpy()))
    p = weight.abs().numpy() / 2**exponents - 1
    expected = np.sign(weight.numpy()) * 2 ** (exponents + (p > 0.5))
    np.testing.assert_array_equal(powers.numpy(), expected)
    few, low = PowerOfTwoQuantizer(3).quantize(weight), PowerOfTwoQuantizer(3, underflow="smallest").quantize(weight)
    top = powers.abs().max()
    assert set((few.abs() / top).unique().tolist()) == {0.0, 0.25, 0.5, 1.0}
    assert set((low.abs() / top).unique().tolist()) == {0.125, 0.25, 0.5, 1.0}
    assert torch.equal(few == 0, weight.abs() <= top / 8)
    assert PowerOfTwoQuantizer(1, underflow="smallest").quantize(weight).abs().unique().numel() == 1


@pytest.mark.method("Q-18b")
def test_stochastic_powers_have_the_weight_as_their_mean_and_repeat_outside_training(weight):
    quantizer = PowerOfTwoQuantizer(4, stochastic=True)
    assert torch.equal(quantizer.quantize(weight), quantizer.quantize(weight))
    quantizer.train()
    draws = torch.stack([quantizer.quantize(weight) for _ in range(4000)])
    error = (draws.mean(0) - weight).abs() / (draws.std(0) / 4000**0.5 + 1e-9)
    assert error.max() < 5 and not torch.equal(draws[0], draws[1])


@pytest.mark.method("Q-19a", "Q-19b")
@pytest.mark.parametrize("bits", BITS)
def test_balanced_bins_are_numpys_quantiles_and_equally_filled(bits):
    x = torch.randn(64, 64)
    edges = np.quantile(x.numpy(), np.arange(1, 2**bits) / 2**bits, method="inverted_cdf")
    codes = np.searchsorted(edges, x.numpy().flatten())
    for how in ("percentile", "median"):
        borders = uniform.BALANCED[how](x.flatten(), bits)
        np.testing.assert_allclose(borders.numpy(), edges, atol=1e-6)
        found = BalancedQuantizer(bits, how).codes(x.flatten())
        np.testing.assert_array_equal(found.numpy(), codes)
        assert torch.bincount(found).tolist() == [64 * 64 // 2**bits] * 2**bits
    quantized = BalancedQuantizer(bits, clip="max").quantize(x)
    expected = x.min().item() + codes / (2**bits - 1) * (x.max() - x.min()).item()
    np.testing.assert_allclose(quantized.numpy().flatten(), expected, atol=1e-5)


@pytest.mark.method("Q-19a", "Q-19c")
def test_means_split_like_medians_where_values_are_symmetric_and_recursively_otherwise():
    def bins(how, x, bits):
        return BalancedQuantizer(bits, how).codes(x)

    half = torch.rand(500)
    x = torch.cat([half, -half])
    assert torch.equal(bins("mean", x, 1), bins("percentile", x, 1))
    skewed = torch.rand(1000) ** 3

    def split(values, bits):  # the recursion in plain words
        if not bits:
            return [values]
        return split(values[values <= values.mean()], bits - 1) + split(values[values > values.mean()], bits - 1)

    parts = split(skewed.double().numpy(), 3)
    assert torch.bincount(bins("mean", skewed, 3)).tolist() == [len(part) for part in parts]
    even = torch.bincount(bins("mean", torch.randn(10000), 2)) / 10000
    assert (even - 0.25).abs().max() < 0.06  # nearly balanced


@pytest.mark.method("Q-19a", "Q-19b", "Q-19c")
def test_balanced_levels_span_their_range_or_are_the_least_squares_line(weight):
    x = weight.flatten().numpy()
    for bits, how in ((1, "mean"), (2, "median"), (3, "percentile")):
        codes = BalancedQuantizer(bits, how).codes(weight.flatten()).numpy()
        slope, level = np.polyfit(codes, x, 1)
        np.testing.assert_allclose(
            BalancedQuantizer(bits, how).quantize(weight).numpy().ravel(), slope * codes + level, atol=1e-6
        )
        levels = BalancedQuantizer(bits, how, "mean").quantize(weight)
        assert (levels.max() - levels.min()).item() == pytest.approx(2.5 * np.abs(x).mean(), rel=1e-4)
        levels = BalancedQuantizer(bits, how, "max").quantize(weight)
        assert (levels.min().item(), levels.max().item()) == pytest.approx((x.min(), x.max()), rel=1e-4)


@pytest.mark.method("Q-19a", "Q-19b", "Q-19c")
@pytest.mark.parametrize("how", uniform.BALANCED)
def test_in_training_borders_are_refreshed_every_few_steps_and_outside_always(weight, how):
    quantizer = BalancedQuantizer(2, how).train()
    ages = [
        torch.equal(quantizer.codes((weight + 0.01 * i).flatten()), BalancedQuantizer(2, how).codes(weight.flatten()))
        for i in range(21)
    ]
    assert [i for i, same in enumerate(ages) if same] == [0, 10, 20]  # in between the weights move on under old borders
    shares = torch.bincount(quantizer.eval().codes(weight.flatten() * 3 - 1), minlength=4) / weight.numel()
    assert (shares - 0.25).abs().max() < 0.08


@pytest.mark.method("Q-19a")
def test_empty_bins_do_not_disturb_the_order_of_the_borders():
    x = torch.tensor([0.0] * 30 + [1.0] * 2)
    for how in uniform.BALANCED:
        borders = uniform.BALANCED[how](x, 3)
        assert torch.equal(borders, borders.sort().values) and not borders.isnan().any()
        assert BalancedQuantizer(3, how).codes(x).unique().numel() <= 2


@pytest.mark.method("Q-16", "Q-18a", "Q-19a")
def test_impossible_settings_are_refused(weight):
    for make in (UniformQuantizer, PowerOfTwoQuantizer, BalancedQuantizer, ActivationQuantizer):
        for bits in (0, 9, 2.5):
            with pytest.raises(ValueError, match="1 to 8"):
                make(bits)
    with pytest.raises(ValueError, match="tensor, row, group"):
        UniformQuantizer(4, granularity="head")
    with pytest.raises(ValueError, match="max, percentile"):
        UniformQuantizer(4, clip="best")
    with pytest.raises(ValueError, match="divide the 32 columns"):
        UniformQuantizer(4, granularity="group", group_size=5).quantize(weight)
    with pytest.raises(ValueError, match=r"0\.5 to 1"):
        uniform.percentile_range(weight, 4, True, share=2)
    with pytest.raises(ValueError, match="2 to 8"):
        PowerOfTwoQuantizer(1)
    with pytest.raises(ValueError, match="'zero' or 'smallest'"):
        PowerOfTwoQuantizer(2, underflow="drop")
    with pytest.raises(ValueError, match="percentile, median, mean"):
        BalancedQuantizer(2, "mode")
    with pytest.raises(ValueError, match="as many values"):
        BalancedQuantizer(4).quantize(torch.rand(2, 3))


@pytest.mark.method("Q-16", "Q-18b")
def test_on_a_model_gradients_go_straight_through_and_the_file_holds_the_measured_model(tiny, batch, tmp_path):
    plain = logits(tiny, batch)
    names = attach(tiny, lambda m: UniformQuantizer(4, granularity="row") if m.layer else PowerOfTwoQuantizer(4, stochastic=True))
    before = logits(tiny, batch)
    assert not torch.equal(plain, before)
    cross_entropy(tiny, batch).backward()
    assert all(tiny.get_submodule(n[:-7]).parametrizations.weight.original.grad.abs().sum() > 0 for n in names)
    encoded = detach(tiny)
    artifacts.save(tiny, tmp_path / "model", encoded)
    reloaded = artifacts.load(tmp_path / "model")
    torch.testing.assert_close(logits(reloaded, batch), before, atol=1e-5, rtol=0)
    assert set(encoded) == set(names)


@pytest.mark.method("Q-16")
def test_activation_ranges_are_dynamic_until_calibrated(tiny, batch):
    x = torch.randn(3, 5, 7)
    quantizer = ActivationQuantizer(4)
    lo, hi = x.min(), x.max()
    scale = (hi - lo) / 15
    expected = torch.fake_quantize_per_tensor_affine(x, scale.item(), round((-lo / scale).item()), 0, 15)
    torch.testing.assert_close(quantizer(x), expected, atol=1e-5, rtol=0)
    plain = logits(tiny, batch)
    with uniform.quantized_inputs(tiny, lambda: ActivationQuantizer(3)) as dynamic:
        assert len(dynamic) == 12 and not torch.equal(logits(tiny, batch), plain)
        assert all(q.lo is None for q in dynamic.values())
    assert torch.equal(logits(tiny, batch), plain)
    with uniform.quantized_inputs(tiny, ActivationQuantizer, ("ffn_out",), [batch]) as fixed:
        assert all(q.lo.numel() == 1 and q.lo < q.hi for q in fixed.values()) and len(fixed) == 2
        torch.testing.assert_close(logits(tiny, batch), plain, atol=1e-2, rtol=0)
    clipped = ActivationQuantizer(8)
    clipped.lo, clipped.hi = torch.tensor([-1.0]), torch.tensor([1.0])
    assert clipped(torch.tensor([-3.0, 0.2, 3.0])).tolist() == pytest.approx([-1, 0.2, 1], abs=0.005)
    with (
        pytest.raises(ValueError, match="not linear layers"),
        uniform.quantized_inputs(tiny, ActivationQuantizer, ("word_embeddings",)),
    ):
        pass


@pytest.mark.method("Q-17")
def test_attention_without_rounding_is_eager_attention_padding_included(tiny, batch):
    with bert.attention(tiny, "eager"):
        expected = logits(tiny, batch)
    with uniform.quantized_attention(tiny, nn.Identity):
        torch.testing.assert_close(logits(tiny, batch), expected)
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][2, 5:] = 9  # padding must not be attended to
        torch.testing.assert_close(logits(tiny, changed)[2], expected[2])
    assert not hasattr(tiny.bert.encoder.layer[0].attention.self, "operand_quantizers")


@pytest.mark.method("Q-17")
def test_every_operand_of_attention_is_rounded_to_its_own_range():
    module = nn.Module()
    module.operand_quantizers = nn.ModuleDict({name: ActivationQuantizer(3) for name in uniform.OPERANDS})
    Q, K, V = torch.randn(3, 2, 4, 6, 5).unbind(0)
    mask = torch.zeros(2, 1, 1, 6)
    mask[1, ..., 4:] = -torch.inf
    output, _ = uniform.quantized_attention_forward(module, Q, K, V, mask, 5**-0.5)

    def r(x):
        scale = ((x.max().clamp(min=0) - x.min().clamp(max=0)) / 7).item()
        return torch.fake_quantize_per_tensor_affine(x, scale, round(-min(x.min().item(), 0) / scale), 0, 7)

    expected = r(torch.softmax(r(Q) @ r(K).mT / 5**0.5 + mask, -1)) @ r(V)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.method("Q-17")
def test_all_matmuls_are_quantized_and_training_keeps_them_so(tiny, batch):
    plain = logits(tiny, batch)
    drop = {}
    for bits in (8, 4, 2):
        with uniform.quantized_matmuls(tiny, lambda bits=bits: ActivationQuantizer(bits), [batch]) as quantizers:
            assert len(quantizers) == 2 * (6 + 4) and all(q.lo is not None for q in quantizers.values())
            drop[bits] = (logits(tiny, batch) - plain).abs().max().item()
    assert 0 < drop[8] < drop[4] < drop[2]
    with uniform.quantized_matmuls(tiny, lambda: ActivationQuantizer(2)):
        inside = cross_entropy(tiny, batch)
        with bert.fastest_attention(tiny, "eager"):  # what the training loop does: it swaps a stock attention only
            loss = cross_entropy(tiny, batch)
        assert loss == inside
        loss.backward()
    assert cross_entropy(tiny, batch) != inside
    assert tiny.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


@pytest.mark.method("Q-16")
def test_the_percentile_is_one_in_a_thousand_and_a_group_has_64_columns():
    x = torch.randperm(10_000).float() + 1
    assert uniform.percentile_range(x.view(1, -1), 8, True)[1].item() == 9990
    for quantizer in (uniform.UniformQuantizer(4, granularity="group"), uniform.EvenQuantizer(4, "group")):
        assert quantizer.encode(torch.randn(3, 192)).parts["scale"].shape == (3, 3)


@pytest.mark.method("Q-16", "Q-17")
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_the_codes_of_a_bfloat16_activation_are_found_in_float32(granularity):
    x = torch.randn(4, 500).bfloat16()
    found = ActivationQuantizer(8, granularity=granularity)(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, ActivationQuantizer(8, granularity=granularity)(x.float()).bfloat16())
