"""One bit per weight: every method of survey 3.1 against a closed form, a grid, a sample mean or a library."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn.functional import cross_entropy, linear

from utils.bert import matrices
from utils.encodings import decode
from utils.quantization import binary
from utils.quantization.few_bits import frozen
from utils.quantization.quantizer import attach, detach

ODD = (7, 13)  # 91 weights do not fill their last byte


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(3)) * 0.05 + 0.005


def lab(weight: torch.Tensor) -> binary.LAB:
    quantizer = binary.LAB(weight, per="row")
    quantizer.D.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) + 0.1)
    return quantizer


# how to make each for a weight, and the bytes that it adds to one bit per weight for R rows
QUANTIZERS = {
    "sign": (lambda w: binary.SignQuantizer(), lambda rows: 8),
    "connect": (lambda w: binary.BinaryConnect(binary.weight_bound(w)), lambda rows: 8),
    "connect-stochastic": (lambda w: binary.BinaryConnect(binary.weight_bound(w, "rms"), stochastic=True), lambda rows: 8),
    "fixed": (lambda w: binary.BSFixed(), lambda rows: 8),
    "fixed-tuned": (lambda w: binary.BSFixed(*binary.tuned_levels(w)), lambda rows: 8),
    "flexible": (binary.BSFlexible, lambda rows: 8),
    "bwn": (lambda w: binary.BWN(), lambda rows: 8),
    "bwn-row": (lambda w: binary.BWN("row"), lambda rows: 4 * rows + 4),
    "lab": (lab, lambda rows: 4 * rows + 4),
}


def loss_of(model, batch) -> torch.Tensor:
    return cross_entropy(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])


def steps(model, batch, after_step=None, count=3, groups=None) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=1e-2)
    for step in range(1, count + 1):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step, model, optimizer)
    return optimizer


@pytest.mark.method("Q-01", "Q-02a", "Q-02b", "Q-03", "Q-04", "Q-07", "Q-08")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_file_holds_exactly_the_quantized_values_in_one_bit_each(name, weight):
    make, extra = QUANTIZERS[name]
    for w in (weight, torch.randn(ODD), torch.full(ODD, 0.3), torch.full(ODD, -0.3), torch.zeros(ODD), torch.ones(1, 1)):
        quantizer = make(w).eval()
        value, encoded = quantizer.quantize(w), quantizer.encode(w)
        assert torch.isfinite(value).all() and value.shape == w.shape and value.dtype == w.dtype
        assert torch.equal(decode(encoded), value)
        assert encoded.nbytes == math.ceil(w.numel() / 8) + extra(len(w))
        assert len(value.unique()) <= 2 * len(w)


@pytest.mark.method("Q-01", "Q-02a", "Q-02b", "Q-03", "Q-04", "Q-07", "Q-08")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_attached_trained_and_detached_the_model_keeps_its_predictions(name, tiny, batch):
    before = {m.name: m.weight.detach().clone() for m in matrices(tiny)}
    names = attach(tiny, lambda m: QUANTIZERS[name][0](m.weight))
    steps(tiny.train(), batch, count=2)
    tiny.eval()
    with torch.no_grad():
        logits = tiny(batch["input_ids"], batch["attention_mask"]).logits
        encoded = detach(tiny)
        assert sorted(encoded) == sorted(names)
        assert torch.allclose(tiny(batch["input_ids"], batch["attention_mask"]).logits, logits, atol=1e-5)
    for m in matrices(tiny):
        assert torch.allclose(decode(encoded[m.name]), m.weight, atol=1e-6)
        assert not torch.equal(m.weight, before[m.name])


@pytest.mark.method("Q-01", "Q-02a", "Q-02b", "Q-03", "Q-04", "Q-07", "Q-08")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_weight_that_is_not_finite_is_refused(name, bad, weight):
    make, _ = QUANTIZERS[name]
    quantizer = make(weight)
    weight[0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        quantizer.encode(weight)


@pytest.mark.method("Q-01")
def test_static_signs_are_raw_and_pack_as_numpy_packs(weight):
    quantizer = binary.SignQuantizer()
    assert torch.equal(quantizer.quantize(weight), torch.where(weight < 0, -torch.ones(()), torch.ones(())))
    assert np.array_equal(quantizer.encode(weight).parts["codes"].numpy(), np.packbits(weight.numpy() >= 0))
    assert torch.equal(binary.sign(torch.tensor([0.0, -0.0])), torch.ones(2))


@pytest.mark.method("Q-02a", "Q-02b")
def test_binary_connect_bounds(weight):
    assert binary.weight_bound(weight, "one") == 1
    assert binary.weight_bound(weight, "glorot") == pytest.approx(math.sqrt(1.5 / 64))
    assert binary.weight_bound(weight, "mean") == pytest.approx(weight.abs().mean().item())
    assert binary.weight_bound(weight, "max") == pytest.approx(weight.abs().max().item())
    assert binary.weight_bound(weight, "rms") == pytest.approx(2 * np.sqrt(np.mean(np.square(weight.numpy()))))
    for H in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            binary.BinaryConnect(H)
    with pytest.raises(ValueError, match="glorot"):
        binary.weight_bound(weight, "xavier")
    with pytest.raises(ValueError, match="nearest, draw, float"):
        binary.BinaryConnect(1.0, at_test="binary")


@pytest.mark.method("Q-02a")
def test_deterministic_binary_connect_is_h_times_the_sign(weight):
    quantizer = binary.BinaryConnect(0.07)
    assert torch.equal(quantizer.train().quantize(weight), 0.07 * binary.sign(weight))
    assert torch.equal(quantizer.eval().quantize(weight), 0.07 * binary.sign(weight))


@pytest.mark.method("Q-02b")
def test_the_mean_of_stochastic_binary_connect_is_the_clipped_weight(weight):
    H = 0.06
    quantizer = binary.BinaryConnect(H, stochastic=True).train()
    draws = torch.stack([quantizer.quantize(weight) for _ in range(4000)])
    assert torch.equal(draws.unique(), torch.tensor([-H, H]))
    assert (draws.mean(0) - weight.clamp(-H, H)).abs().max() < 5 * H / math.sqrt(4000)


@pytest.mark.method("Q-02a", "Q-02b")
def test_binary_connect_at_test_time(weight):
    H = 0.06
    quantizer = binary.BinaryConnect(H, stochastic=True).eval()
    assert torch.equal(quantizer.quantize(weight), H * binary.sign(weight))  # deterministic unless asked
    sampled = binary.BinaryConnect(H, stochastic=True, at_test="draw").eval()
    assert not torch.equal(sampled.quantize(weight), sampled.quantize(weight))
    with pytest.raises(ValueError, match="one network"):
        sampled.encode(weight)
    floating = binary.BinaryConnect(H, at_test="float").eval()
    assert torch.equal(decode(floating.encode(weight)), weight.clamp(-H, H))
    assert torch.equal(floating.quantize(weight), weight.clamp(-H, H))
    assert torch.equal(floating.train().quantize(weight), H * binary.sign(weight))


@pytest.mark.method("Q-02b")
def test_real_weights_are_the_clipped_latent_ones_of_every_connected_matrix(tiny):
    latents = {m.name: m.weight.detach().clone() for m in matrices(tiny)}
    attach(tiny, lambda m: binary.BinaryConnect(0.03, stochastic=True), groups=("query", "ffn_out"))
    found = binary.real_weights(tiny)
    assert sorted(found) == sorted(m.name for m in matrices(tiny, ("query", "ffn_out")))
    assert all(torch.equal(w, latents[name].clamp(-0.03, 0.03)) for name, w in found.items())
    assert any((latents[name].abs() > 0.03).any() for name in found)


@pytest.mark.method("Q-02a", "Q-02b")
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_hook_keeps_latent_weights_within_their_bound(stochastic, tiny, batch):
    attach(tiny, lambda m: binary.BinaryConnect(binary.weight_bound(m.weight), stochastic))
    steps(tiny.train(), batch, binary.clip_latent)
    latents = binary.latent_weights(tiny, binary.BinaryConnect)
    assert len(latents) == 12 and all(w.abs().max() <= q.H * (1 + 1e-6) for w, q in latents)
    assert all((w.abs() < q.H).any() for w, q in latents)


@pytest.mark.method("Q-02a")
@pytest.mark.parametrize("H", [0.02, 1.0])
def test_a_step_is_the_same_share_of_the_way_to_a_flip_for_any_bound(H, tiny, batch):
    attach(tiny, lambda m: binary.BinaryConnect(H), groups=("query", "ffn_in"))
    groups = binary.scaled_learning_rates(tiny, 1e-3)
    square, wide = math.sqrt(1.5 / 64), math.sqrt(1.5 / 96)  # the authors: steps 1 / glorot times as long on weights in [-1, 1]
    assert [group["lr"] / H for group in groups[:-1]] == pytest.approx([1e-3 / square, 1e-3 / wide] * 2)
    assert groups[-1]["lr"] == 1e-3
    assert sum(len(group["params"]) for group in groups) == len(list(tiny.parameters()))
    steps(tiny, batch, groups=groups)


@pytest.mark.method("Q-02a", "Q-07")
def test_latent_weights_move_by_the_scaled_rate(tiny, batch):
    attach(tiny, lambda m: binary.BinaryConnect(0.05), groups=("query",))
    (w, _), *_ = binary.latent_weights(tiny, binary.BinaryConnect)
    before = w.detach().clone()
    optimizer = torch.optim.AdamW(binary.scaled_learning_rates(tiny, 1e-3), lr=1.0, weight_decay=0)
    loss_of(tiny, batch).backward()
    optimizer.step()
    assert (w - before).abs().max().item() == pytest.approx(1e-3 * 0.05 / math.sqrt(1.5 / 64), rel=0.02)


@pytest.mark.method("Q-01", "Q-02a", "Q-03", "Q-04", "Q-07")
@pytest.mark.parametrize("name", ["sign", "connect", "fixed-tuned", "flexible", "bwn", "lab"])
def test_frozen_latent_weights_stand_still_while_all_else_trains(name, tiny, batch):
    attach(tiny, frozen(lambda m: QUANTIZERS[name][0](m.weight)))
    latents = binary.latent_weights(tiny, binary.Quantizer)
    assert len(latents) == 12
    before = [w.detach().clone() for w, _ in latents]
    others = {n: p.detach().clone() for n, p in tiny.named_parameters() if not n.endswith("original") and "pooler" not in n}
    steps(tiny.train(), batch, count=2)
    assert all(torch.equal(w, start) for (w, _), start in zip(latents, before, strict=True))
    after = dict(tiny.named_parameters())
    still = [n for n, value in others.items() if torch.equal(after[n], value)]
    assert not still, still
    assert len(detach(tiny)) == 12


@pytest.mark.method("Q-01", "Q-02a", "Q-07", "Q-08")
def test_the_weight_gets_the_gradient_of_its_binary_value(weight):
    g = torch.randn(weight.shape)
    for quantizer in (binary.SignQuantizer(), binary.BinaryConnect(0.1), binary.BWN("row"), lab(weight)):
        w = weight.clone().requires_grad_()
        (quantizer(w) * g).sum().backward()
        assert torch.allclose(w.grad, g)


@pytest.mark.method("Q-03")
def test_fixed_levels_are_word2bits_or_the_best_for_a_boundary_at_zero(weight):
    assert binary.BSFixed().quantize(torch.tensor([[0.0, -1e-9, 5.0]])).tolist()[0] == pytest.approx([1 / 3, -1 / 3, 1 / 3])
    c1, c2 = binary.tuned_levels(weight)
    best = (binary.BSFixed(c1, c2).quantize(weight) - weight).square().sum()
    for d1 in np.linspace(-0.02, 0.02, 9):
        for d2 in np.linspace(-0.02, 0.02, 9):
            assert (binary.BSFixed(c1 + d1, c2 + d2).quantize(weight) - weight).square().sum() >= best * (1 - 1e-6)
    for levels in ((-1.0, 1.0), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match="c1 >= c2"):
            binary.BSFixed(*levels)


@pytest.mark.method("Q-04")
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_flexible_levels_start_as_two_means(weight, offset):
    w = weight + offset
    w[0, 0] += 1  # an outlier catches Lloyd's algorithm, not an exact search
    values = w.flatten().sort().values.double().numpy()
    errors = [values[:k].var() * k + values[k:].var() * (len(values) - k) for k in range(1, len(values))]
    k = int(np.argmin(errors)) + 1
    quantizer = binary.BSFlexible(w)
    assert quantizer.c1.item() == pytest.approx(values[k:].mean(), rel=1e-5)
    assert quantizer.c2.item() == pytest.approx(values[:k].mean(), rel=1e-5)
    assert quantizer.upper(w).sum() == len(values) - k
    found = KMeans(2, init=np.array([[values[:k].mean()], [values[k:].mean()]]), n_init=1).fit(w.double().numpy().reshape(-1, 1))
    assert np.array_equal(found.labels_.astype(bool), quantizer.upper(w).flatten().numpy())


@pytest.mark.method("Q-04")
def test_flexible_levels_learn_the_sum_of_their_bin(weight):
    quantizer = binary.BSFlexible(weight).double()
    w = weight.double().requires_grad_()
    g = torch.randn(weight.shape, dtype=torch.double)
    (quantizer(w) * g).sum().backward()
    upper = quantizer.upper(w)
    assert quantizer.c1.grad.item() == pytest.approx(g[upper].sum().item())
    assert quantizer.c2.grad.item() == pytest.approx(g[~upper].sum().item())
    assert torch.equal(w.grad, g)
    for c in (quantizer.c1, quantizer.c2):  # and by finite differences of a loss that is not linear
        analytic = torch.autograd.grad(((quantizer(w) - 1) ** 4 * g).sum(), c)[0]
        with torch.no_grad():
            c += 1e-6
            above = ((quantizer(w) - 1) ** 4 * g).sum()
            c -= 2e-6
            below = ((quantizer(w) - 1) ** 4 * g).sum()
            c += 1e-6
        assert analytic.item() == pytest.approx(((above - below) / 2e-6).item(), rel=1e-4)


@pytest.mark.method("Q-04")
def test_flexible_levels_move_in_training(tiny, batch):
    attach(tiny, lambda m: binary.BSFlexible(m.weight), groups=("query",))
    before = [q.c1.item() for _, q in binary.latent_weights(tiny, binary.BSFlexible)]
    steps(tiny, batch)
    assert all(q.c1.item() != b for (_, q), b in zip(binary.latent_weights(tiny, binary.BSFlexible), before, strict=True))


@pytest.mark.method("Q-05")
def test_powers_of_two_are_the_one_below_or_the_one_above():
    x = torch.cat(
        [torch.randn(2000) * 10.0 ** torch.randint(-20, 20, (2000,)), torch.tensor([0.0, 1.0, -2.0, 1.41, 1.42, 1e38, 1e-37])]
    )
    p = binary.power_of_two(x)
    mantissa, _ = torch.frexp(p[p != 0])
    assert (mantissa.abs() == 0.5).all() and torch.equal(p == 0, x == 0)
    live = x != 0
    assert torch.equal(p[live].sign(), x[live].sign())
    exponent, below = p[live].abs().double().log2(), x[live].abs().double().log2().floor()
    assert set((exponent - below).unique().tolist()) == {0, 1}
    powers = 2.0 ** torch.arange(-20, 20)
    assert torch.equal(binary.power_of_two(powers), powers)  # what is a power of two stays
    assert binary.power_of_two(torch.tensor([0.3], dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.method("Q-05")
def test_the_mean_of_powers_of_two_is_the_number_itself():
    x, draws = torch.linspace(-4, 4, 161), 4000
    mean = torch.stack([binary.power_of_two(x) for _ in range(draws)]).mean(0)
    step = 2.0 ** x.abs().clamp(min=1e-3).log2().floor()  # from the lower power to the upper: the largest deviation is half of it
    assert ((mean - x).abs() <= 5 * 0.5 * step / math.sqrt(draws)).all()


@pytest.mark.method("Q-05")
@pytest.mark.parametrize("shape", [(6, 10), (2, 5, 10)])
def test_only_the_weight_gradient_uses_powers_of_two(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(4, 10, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.manual_seed(7)
    p = binary.power_of_two(x.detach())
    torch.manual_seed(7)
    y, expected = binary.PowerOfTwoLinear.apply(x, weight, bias), linear(x, weight, bias)
    dy = torch.randn(y.shape)
    dx, dW, db = torch.autograd.grad(y, (x, weight, bias), dy)
    for found, true in zip((y, dx, db), (expected, *torch.autograd.grad(expected, (x, bias), dy)), strict=True):
        assert torch.allclose(found, true, atol=1e-6)
    true_dW = torch.autograd.grad(linear(p, weight, bias), weight, dy)[0]
    assert torch.allclose(dW, true_dW, atol=1e-5)


@pytest.mark.method("Q-05")
def test_power_of_two_backprop_is_right_on_average_and_can_be_removed(tiny, batch):
    def gradients() -> list[torch.Tensor]:
        tiny.zero_grad()
        loss_of(tiny, batch).backward()
        return [m.module.weight.grad.clone() for m in matrices(tiny)]

    exact = gradients()
    with binary.power_of_two_backprop(tiny):
        draws = [gradients() for _ in range(64)]
        with torch.autocast("cpu", torch.bfloat16):
            gradients()
    for a, *rounded in zip(exact, *draws, strict=True):
        one, mean = rounded[0], torch.stack(rounded).mean(0)
        assert (one - a).norm() > 0.1 * a.norm()  # a draw is off, and noise of 64 draws is an eighth of one's
        assert (mean - a).norm() < 0.2 * (one - a).norm()
    assert all(torch.equal(a, b) for a, b in zip(exact, gradients(), strict=True))
    with pytest.raises(ValueError, match="word_embeddings"), binary.power_of_two_backprop(tiny, ("word_embeddings",)):
        pass


@pytest.mark.method("Q-06")
def test_binary_activations_pass_a_gradient_only_inside_minus_one_to_one():
    x = torch.tensor([-3.0, -1.0, -0.2, 0.0, 0.9, 1.0, 1.1], requires_grad=True)
    y = binary.binary_activation(x)
    y.sum().backward()
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


@pytest.mark.method("Q-06")
def test_linear_layers_of_a_bnn_see_signs_and_can_be_released(tiny, batch):
    before = tiny(batch["input_ids"], batch["attention_mask"]).logits
    seen = []
    attach(tiny, lambda m: binary.BinaryConnect(1.0))
    layer = tiny.bert.encoder.layer[0].intermediate.dense
    with binary.binary_activations(tiny):
        handle = layer.register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0], (output - module.bias).detach()))
        )
        tiny(batch["input_ids"], batch["attention_mask"])
        handle.remove()
        steps(tiny, batch, binary.clip_latent, count=2)
    x, sums = seen[0]
    assert set(x.unique().tolist()) == {-1, 1}
    assert torch.allclose(sums, sums.round(), atol=1e-4) and sums.abs().max() <= 32
    assert all(w.abs().max() <= 1 for w, _ in binary.latent_weights(tiny, binary.BinaryConnect))
    assert not any(m.module._forward_pre_hooks for m in matrices(tiny))
    assert not torch.equal(tiny(batch["input_ids"], batch["attention_mask"]).logits, before)
    with pytest.raises(ValueError, match="token_type_embeddings"), binary.binary_activations(tiny, ("token_type_embeddings",)):
        pass


@pytest.mark.method("Q-06")
@pytest.mark.parametrize("n", [1, 8, 37, 384])
def test_xor_and_popcount_give_the_product_of_signs(n):
    a, b = torch.randn(9, n), torch.randn(5, n)
    packed = binary.pack_signs(a), binary.pack_signs(b)
    assert packed[0].dtype == torch.uint8 and packed[0].shape == (9, math.ceil(n / 8))
    assert np.array_equal(packed[0].numpy(), np.packbits(a.numpy() >= 0, axis=1))
    assert torch.equal(binary.xnor_matmul(*packed, n).float(), binary.sign(a) @ binary.sign(b).T)
    with pytest.raises(ValueError, match="words a row"):
        binary.xnor_matmul(*packed, n + 8)


@pytest.mark.method("Q-06")
def test_popcount_counts():
    assert binary.popcount(torch.arange(256).to(torch.uint8)).tolist() == [bin(word).count("1") for word in range(256)]


@pytest.mark.method("Q-07")
@pytest.mark.parametrize("per", ["matrix", "row"])
def test_the_closed_form_of_bwn_beats_a_grid(weight, per):
    groups = weight.reshape(1, -1) if per == "matrix" else weight
    quantizer = binary.BWN(per)
    error = (quantizer.quantize(weight) - weight).square().reshape(groups.shape).sum(1)
    for alpha in np.linspace(0, 0.2, 401):
        assert ((alpha * binary.sign(groups) - groups).square().sum(1) >= error * (1 - 1e-5)).all()
    flips = torch.rand(weight.shape) < 0.1  # and no other B does better
    assert (torch.where(flips, -1, 1) * quantizer.quantize(weight) - weight).square().sum() > error.sum()
    with pytest.raises(ValueError, match="'matrix' or 'row'"):
        binary.BWN("layer").quantize(weight)


@pytest.mark.method("Q-08")
@pytest.mark.parametrize("per", ["matrix", "row"])
def test_lab_with_constant_curvature_is_bwn(weight, per):
    quantizer = binary.LAB(weight, per)
    for constant in (1.0, 3e-5):
        quantizer.D.fill_(constant)
        assert torch.allclose(quantizer.quantize(weight), binary.BWN(per).quantize(weight), rtol=1e-5)


@pytest.mark.method("Q-08")
def test_lab_minimises_the_weighted_distance(weight):
    quantizer = lab(weight)
    error = (quantizer.D * (quantizer.quantize(weight) - weight).square()).sum(1)
    for alpha in np.linspace(0, 0.2, 401):
        assert ((quantizer.D * (alpha * binary.sign(weight) - weight).square()).sum(1) >= error * (1 - 1e-5)).all()
    plain = (quantizer.D * (binary.BWN("row").quantize(weight) - weight).square()).sum()
    assert error.sum() < plain


@pytest.mark.method("Q-08")
def test_lab_reads_its_curvature_from_adam(tiny, batch):
    attach(tiny, lambda m: binary.LAB(m.weight), groups=("query", "ffn_out"))
    untouched = copy.deepcopy(tiny)
    optimizer = steps(tiny, batch, binary.track_curvature)
    for w, quantizer in binary.latent_weights(tiny, binary.LAB):
        D = optimizer.state[w]["exp_avg_sq"].sqrt() + 1e-8
        assert torch.equal(quantizer.D, D)
        assert quantizer.alpha(w).item() == pytest.approx(((D * w.abs()).sum() / D.sum()).item(), rel=1e-5)
    assert not any(name.endswith(".D") for name in tiny.state_dict())
    with pytest.raises(ValueError, match="Adam"):
        binary.track_curvature(1, untouched, torch.optim.AdamW(untouched.parameters()))


@pytest.mark.method("Q-08")
def test_the_curvature_spreads_only_where_the_hook_tracks_it(tiny, batch):
    """What keeps the row of LAB from being one of BWN: without `track_curvature` this number is 1, and the board refuses the row."""
    for hook, spread in ((None, 1.0), (binary.track_curvature, None)):
        model, made = copy.deepcopy(tiny), []

        def make(m, made=made):
            made.append(binary.LAB(m.weight))
            return made[-1]

        attach(model, make)
        steps(model, batch, hook)
        found = binary.curvature_spread(made)
        assert found == 1.0 if spread else found > 2.0
        detach(model)
        assert binary.curvature_spread(made) == found  # also when the model is burnt in


@pytest.mark.method("Q-08", "Q-27")
def test_the_spread_is_that_of_percentiles_in_the_median_matrix():
    made = [binary.LAB(torch.ones(10, 101)) for _ in range(3)]
    for quantizer, factor in zip(made, (1.0, 4.0, 50.0), strict=True):
        quantizer.D.copy_(1 + (factor - 1) * torch.linspace(0, 1, 1010)[torch.randperm(1010)].view(10, 101))
    high, low = np.quantile(np.linspace(1, 4, 1010), [0.9, 0.1])
    assert binary.curvature_spread(made) == pytest.approx(high / low, rel=0.01)


@pytest.mark.method("Q-01", "Q-07")
def test_raw_signs_do_far_more_harm_than_scaled_ones(tiny, batch):
    def change(make) -> float:
        model = copy.deepcopy(tiny)
        attach(model, make)
        hidden = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return (hidden - tiny.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state).norm().item()

    assert change(lambda m: binary.SignQuantizer()) > 3 * change(lambda m: binary.BWN("row"))
