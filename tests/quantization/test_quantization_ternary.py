"""Two bits per weight: every method of survey 3.2 against a closed form, a sorted search, a sample mean or k-means."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn.functional import cross_entropy

from utils.bert import attention, matrices
from utils.encodings import decode
from utils.quantization import ternary
from utils.quantization.binary import clip_latent, latent_weights, weight_bound
from utils.quantization.quantizer import attach, detach

ODD = (7, 13)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(3)) * 0.05 + 0.005


# how to make each for a weight, and the bytes that it adds to two bits per weight for R rows
QUANTIZERS = {
    "connect": (lambda w: ternary.TernaryConnect(weight_bound(w, "rms")), lambda rows: 8),
    "connect-stochastic": (lambda w: ternary.TernaryConnect(weight_bound(w, "max"), stochastic=True), lambda rows: 8),
    "gaussian": (lambda w: ternary.GaussianTernary(), lambda rows: 8),
    "gaussian-raw": (lambda w: ternary.GaussianTernary(scaled=False), lambda rows: 8),
    "twn": (lambda w: ternary.TWN(), lambda rows: 8),
    "twn-row": (lambda w: ternary.TWN("row"), lambda rows: 4 * rows + 4),
    "twn-exact": (lambda w: ternary.TWN("row", exact=True), lambda rows: 4 * rows + 4),
    "step": (lambda w: ternary.StepQuantizer(ternary.lloyd_max_step(w)), lambda rows: 8),
    "ttq": (ternary.TTQ, lambda rows: 12),
}


def logits_of(model, batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def steps(model, batch, after_step=None, count=2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, count + 1):
        cross_entropy(logits_of(model, batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step, model, optimizer)


@pytest.mark.method("Q-09a", "Q-09b", "Q-11", "Q-12", "Q-13", "Q-14", "Q-15")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_file_holds_exactly_the_quantized_values_in_two_bits_each(name, weight):
    make, extra = QUANTIZERS[name]
    for w in (weight, torch.randn(ODD), torch.full(ODD, 0.3), torch.full(ODD, -0.3), torch.zeros(ODD), torch.ones(1, 1)):
        quantizer = make(w).eval()
        value, encoded = quantizer.quantize(w), quantizer.encode(w)
        assert torch.isfinite(value).all() and value.shape == w.shape and value.dtype == w.dtype
        assert torch.equal(decode(encoded), value)
        assert encoded.nbytes == math.ceil(w.numel() / 4) + extra(len(w))
        assert all(len(row.unique()) <= 3 for row in value)


@pytest.mark.method("Q-09a", "Q-09b", "Q-11", "Q-12", "Q-13", "Q-14")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_attached_trained_and_detached_the_model_keeps_its_predictions(name, tiny, batch):
    before = {m.name: m.weight.detach().clone() for m in matrices(tiny)}
    attach(tiny, lambda m: QUANTIZERS[name][0](m.weight))
    steps(tiny.train(), batch, clip_latent)
    tiny.eval()
    with torch.no_grad():
        logits = logits_of(tiny, batch)
        encoded = detach(tiny)
        assert torch.allclose(logits_of(tiny, batch), logits, atol=1e-5)
    for m in matrices(tiny):
        assert torch.allclose(decode(encoded[m.name]), m.weight, atol=1e-6)
        assert not torch.equal(m.weight, before[m.name])


@pytest.mark.method("Q-09a", "Q-09b", "Q-11", "Q-12", "Q-13", "Q-14")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_weight_that_is_not_finite_is_refused(name, weight):
    quantizer = QUANTIZERS[name][0](weight)
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        quantizer.encode(weight)


@pytest.mark.method("Q-09a")
def test_deterministic_ternary_connect_rounds_at_one_half():
    v = torch.tensor([[-2.0, -0.6, -0.5, -0.49, 0.0, 0.5, 0.51, 1.0]])
    assert ternary.nearest_ternary(v).tolist() == [[-1, -1, -1, 0, 0, 0, 1, 1]]
    assert torch.equal(ternary.TernaryConnect(0.25).quantize(0.25 * v), 0.25 * ternary.nearest_ternary(v))


@pytest.mark.method("Q-09b", "Q-10")
def test_the_mean_of_bernoulli_ternary_is_the_clipped_weight(weight):
    H = 0.08
    quantizer = ternary.TernaryConnect(H, stochastic=True).train()
    draws = torch.stack([quantizer.quantize(weight) for _ in range(4000)])
    assert torch.equal(draws.unique(), torch.tensor([-H, 0, H]))
    assert (draws.mean(0) - weight.clamp(-H, H)).abs().max() < 5 * 0.5 * H / math.sqrt(4000)
    assert (draws.sign() * weight.sign() >= 0).all()  # never the opposite sign
    assert torch.equal(quantizer.eval().quantize(weight), H * ternary.nearest_ternary(weight / H))


@pytest.mark.method("Q-10")
def test_bernoulli_ternary_on_activations_is_unbiased_within_its_scale_and_passes_its_gradient():
    x = torch.randn(3, 4, 20, requires_grad=True)
    mean = torch.stack([ternary.scaled_ternary_activation(x).detach() for _ in range(4000)]).mean(0)
    s = 1.02 * x.detach().square().mean(-1, keepdim=True).sqrt()
    assert ((mean - x.detach().clamp(-s, s)).abs() < 5 * 0.5 * s / math.sqrt(4000) + 1e-6).all()
    (ternary.scaled_ternary_activation(x) * 3).sum().backward()
    inside = x.detach().abs() < s
    assert torch.allclose(x.grad[inside], torch.tensor(3.0)) and not x.grad[~inside].any()
    sample = ternary.ternary_activation(x.detach() / s)
    assert set(sample.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(ternary.scaled_ternary_activation(torch.zeros(2, 5)), torch.zeros(2, 5))


@pytest.mark.method("Q-10", "Q-15")
def test_the_scale_of_ternary_activations_adds_the_least_noise_to_a_gaussian(monkeypatch):
    x = torch.randn(400, 768)

    def noise(deviations: float) -> float:
        monkeypatch.setattr(ternary, "LEAST_NOISE", deviations)
        return (ternary.scaled_ternary_activation(x) - x).square().mean().item()

    usual = noise(1.02)
    assert all(noise(deviations) > usual for deviations in (0.7, 0.85, 1.2, 1.5, 3.0))
    assert noise(3.0) > 4 * usual  # nearly max|x|: almost everything is sent to zero


@pytest.mark.method("Q-11")
def test_gaussian_thresholds_leave_38_percent_zeros():
    w = torch.randn(400, 500) * 0.04 + 0.02
    T = ternary.gaussian_ternary(w)
    within = math.erf(0.5 / math.sqrt(2))  # P(|z| < 1/2) = 0.383
    assert (T == 0).float().mean().item() == pytest.approx(within, abs=0.005)
    assert torch.equal(T == 1, w > w.mean() + w.std(correction=0) / 2)
    assert torch.equal(T == -1, w < w.mean() - w.std(correction=0) / 2)


@pytest.mark.method("Q-11")
def test_the_scale_of_gaussian_ternary_beats_a_grid(weight):
    T, alpha = ternary.GaussianTernary().split(weight)
    best = (alpha * T - weight).square().sum()
    assert all((a * T - weight).square().sum() >= best * (1 - 1e-6) for a in np.linspace(0, 0.2, 201))
    assert set(ternary.GaussianTernary(scaled=False).quantize(weight).unique().tolist()) == {-1, 0, 1}


@pytest.mark.method("Q-12")
def test_twn_is_the_formula(weight):
    delta = 0.7 * weight.abs().mean()
    kept = weight.abs() > delta
    expected = torch.where(kept, weight.sign() * weight.abs()[kept].mean(), 0)
    assert torch.allclose(ternary.TWN().quantize(weight), expected)
    rows = torch.cat([ternary.TWN().quantize(row[None]) for row in weight])
    assert torch.allclose(ternary.TWN("row").quantize(weight), rows)


@pytest.mark.method("Q-12")
@pytest.mark.parametrize("per", ["matrix", "row"])
def test_the_exact_threshold_beats_every_other(weight, per):
    groups = weight.reshape(1, -1) if per == "matrix" else weight
    exact = (ternary.TWN(per, exact=True).quantize(weight) - weight).square().reshape(groups.shape).sum(1)
    fast = (ternary.TWN(per).quantize(weight) - weight).square().reshape(groups.shape).sum(1)
    assert (exact <= fast * (1 + 1e-6)).all() and exact.sum() < fast.sum()
    for quantile in np.linspace(0, 0.99, 100):
        delta = groups.abs().quantile(quantile, dim=1, keepdim=True)
        value = ternary.twn_alpha(groups.abs(), delta) * groups.sign() * (groups.abs() > delta)
        assert ((value - groups).square().sum(1) >= exact * (1 - 1e-5)).all()


@pytest.mark.method("Q-12")
def test_the_exact_threshold_has_the_papers_closed_forms():
    normal, flat = torch.randn(1, 400_000), torch.rand(1, 400_000) * 2 - 1
    assert ternary.twn_threshold(normal.abs(), exact=True).item() == pytest.approx(0.6, abs=0.05)
    assert ternary.twn_threshold(flat.abs(), exact=True).item() == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.method("Q-13")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_finds_the_best_step_of_a_large_sample_and_a_fixed_point_of_a_small_one(weight, bits):
    def error(step: float, w: torch.Tensor) -> float:
        return (ternary.StepQuantizer(step, bits).quantize(w) - w).square().mean().item()

    large = torch.randn(500, 400)
    best = error(ternary.lloyd_max_step(large, bits), large)
    assert all(error(step, large) >= best * (1 - 1e-4) for step in np.linspace(0.05, 2.5, 99))
    step = ternary.lloyd_max_step(weight, bits)
    z = ternary.StepQuantizer(step, bits).split(weight)[0]
    assert step == pytest.approx(((weight * z).sum() / z.square().sum()).item(), rel=1e-5)
    encoded = ternary.StepQuantizer(step, bits).encode(weight)
    assert encoded.meta["bits"] == bits and torch.equal(decode(encoded), ternary.StepQuantizer(step, bits).quantize(weight))
    assert len(z.unique()) == 2**bits - 1


@pytest.mark.method("Q-13")
def test_lloyd_max_is_a_fixed_point_of_k_means(weight):
    values = torch.cat([weight, -weight]).flatten().double().numpy()  # symmetric: the centres stay -step, 0, +step
    step = ternary.lloyd_max_step(weight)
    found = KMeans(3, init=np.array([[-step], [0], [step]]), n_init=1, tol=0).fit(values.reshape(-1, 1))
    assert found.cluster_centers_.flatten() == pytest.approx([-step, 0, step], abs=1e-6)


@pytest.mark.method("Q-13")
def test_greedy_search_takes_the_best_step_of_each_matrix_in_turn(tiny, batch):
    with torch.no_grad():
        target = logits_of(tiny, batch)
    calls = []

    def evaluate(model) -> float:
        calls.append(len(latent_weights(model, ternary.StepQuantizer)))
        return (logits_of(model, batch) - target).square().mean().item()

    factors = (1.0, 0.8, 1.2)
    starts = {m.name: ternary.lloyd_max_step(m.weight) for m in matrices(tiny)}
    names = list(starts)
    steps_found = ternary.greedy_step_search(tiny, evaluate, factors=factors)
    assert calls == [count for count in range(1, 13) for _ in factors]  # later matrices are still in full precision
    assert all(min(abs(step / starts[name] - f) for f in factors) < 1e-6 for name, step in steps_found.items())
    quantizer = dict(zip(names, (q for _, q in latent_weights(tiny, ternary.StepQuantizer)), strict=True))[names[-1]]
    errors = {}
    for factor in factors:  # the last choice can be checked against the finished network
        quantizer.step = starts[names[-1]] * factor
        errors[factor] = evaluate(tiny)
    assert steps_found[names[-1]] == starts[names[-1]] * min(errors, key=errors.get)
    assert len(detach(tiny)) == 12


@pytest.mark.method("Q-13")
def test_greedy_search_is_no_worse_than_lloyd_max_alone(tiny, batch):
    with torch.no_grad():
        target = logits_of(tiny, batch)

    def evaluate(model) -> float:
        return (logits_of(model, batch) - target).square().mean().item()

    plain = copy.deepcopy(tiny)
    ternary.greedy_step_search(plain, evaluate, groups=("ffn_out",), factors=(1.0,))
    ternary.greedy_step_search(tiny, evaluate, groups=("ffn_out",))
    assert evaluate(tiny) < evaluate(plain)


@pytest.mark.method("Q-13")
def test_step_search_refuses_what_it_cannot_use(tiny):
    for step, bits in ((0.0, 2), (-1.0, 2), (float("nan"), 2), (0.1, 1), (0.1, 9)):
        with pytest.raises(ValueError, match="step > 0 and bits from 2 to 8"):
            ternary.StepQuantizer(step, bits)
    with pytest.raises(ValueError, match="finite error"):
        ternary.greedy_step_search(tiny, lambda model: float("nan"), groups=("query",))
    with pytest.raises(ValueError, match="one factor"):
        ternary.greedy_step_search(tiny, lambda model: 0.0, factors=())


@pytest.mark.method("Q-14")
def test_ttq_gradients_are_the_papers(weight):
    quantizer = ternary.TTQ(weight, t=0.2).double()
    with torch.no_grad():
        quantizer.W_p *= 1.5
    w = weight.double().requires_grad_()
    g = torch.randn(weight.shape, dtype=torch.double)
    (quantizer(w) * g).sum().backward()
    positive, negative = w > 0.2 * w.abs().max(), w < -0.2 * w.abs().max()
    assert quantizer.W_p.grad.item() == pytest.approx(g[positive].sum().item())
    assert quantizer.W_n.grad.item() == pytest.approx(-g[negative].sum().item())
    W_p, W_n = quantizer.W_p.item(), quantizer.W_n.item()
    assert torch.allclose(w.grad, g * torch.where(positive, W_p, torch.where(negative, W_n, 1.0).double()))
    assert quantizer(w).unique().tolist() == pytest.approx([-W_n, 0, W_p])


@pytest.mark.method("Q-14")
def test_ttq_levels_agree_with_finite_differences(weight):
    quantizer = ternary.TTQ(weight).double()
    w, target = weight.double(), torch.randn(weight.shape, dtype=torch.double)
    for level in (quantizer.W_p, quantizer.W_n):
        analytic = torch.autograd.grad((quantizer(w) - target).pow(4).sum(), level)[0].item()
        with torch.no_grad():
            level += 1e-5
            above = (quantizer(w) - target).pow(4).sum()
            level -= 2e-5
            below = (quantizer(w) - target).pow(4).sum()
            level += 1e-5
        assert analytic == pytest.approx(((above - below) / 2e-5).item(), rel=1e-5)


@pytest.mark.method("Q-14")
def test_ttq_levels_start_and_learn(tiny, batch, weight):
    assert ternary.TTQ(weight, initial=1.0).quantize(weight).unique().tolist() == [-1, 0, 1]
    above = weight.abs() > 0.05 * weight.abs().max()
    assert ternary.TTQ(weight).W_p.item() == pytest.approx(weight.abs()[above].mean().item())
    attach(tiny, lambda m: ternary.TTQ(m.weight))
    steps(tiny, batch)
    assert all(q.W_p.item() != q.W_n.item() for _, q in latent_weights(tiny, ternary.TTQ))
    for t in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            ternary.TTQ(weight, t=t)


@pytest.mark.method("Q-15")
def test_ternary_attention_without_sampling_noise_is_attention(tiny, batch, monkeypatch):
    """With the ternary step replaced by the identity, what remains must be the model's own eager attention, mask included."""
    with torch.no_grad(), attention(tiny, "eager"):
        expected = logits_of(tiny, batch)
    for name in ("ternary_activation", "scaled_ternary_activation"):
        monkeypatch.setattr(ternary, name, lambda x, stochastic: x)
    with torch.no_grad(), ternary.ternary_activations(tiny, ternary.Slope(1.0, 1)):
        assert torch.allclose(logits_of(tiny, batch), expected, atol=1e-6)
    with torch.no_grad(), ternary.ternary_activations(tiny, ternary.Slope(4.0, 1, value=4.0)):
        assert not torch.allclose(logits_of(tiny, batch), expected, atol=1e-6)


@pytest.mark.method("Q-15", "Q-10")
@pytest.mark.parametrize("stochastic", [True, False])
def test_ternary_activations_are_ternary_and_ignore_padding(tiny, batch, stochastic):
    seen = []
    with torch.no_grad(), ternary.ternary_activations(tiny, ternary.Slope(2.0, 1, value=2.0), stochastic):
        layer = tiny.bert.encoder.layer[0]
        handles = [layer.attention.self.register_forward_hook(lambda module, inputs, output: seen.append(output[1])),
                   layer.output.dense.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))]  # fmt: skip
        logits_of(tiny, batch)  # also where something else, as the training loop does, sets the attention
        [handle.remove() for handle in handles]
    P, x = seen
    assert set(P.unique().tolist()) <= {0, 1}
    padding = (batch["attention_mask"] == 0)[:, None, None, :].expand_as(P)
    assert not P[padding].any()
    assert all(len(token.abs().unique()) <= 2 for token in x.flatten(0, 1))
    assert not stochastic or P.sum() > 0


@pytest.mark.method("Q-15")
def test_sampled_attention_is_unbiased():
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
    module = torch.nn.Module()
    options = {"attention_mask": None, "scaling": 0.5, "slope": ternary.Slope(1.0, 1), "stochastic": True}
    draws = torch.stack([ternary.ternary_attention(module, query, key, value, **options)[0] for _ in range(2000)])
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / math.sqrt(2000) + 1e-6).all()


@pytest.mark.method("Q-15")
def test_the_hybrid_trains_and_leaves_no_trace(tiny, batch):
    before = tiny.config._attn_implementation
    attach(tiny, lambda m: ternary.TWN())
    expected = logits_of(tiny, batch)
    with ternary.ternary_activations(tiny, ternary.Slope(1.0, 1)):
        torch.manual_seed(1)
        first = logits_of(tiny, batch)
        torch.manual_seed(1)
        assert torch.equal(first, logits_of(tiny, batch))  # seeded, it repeats
        assert not torch.allclose(first, expected)
        cross_entropy(first, batch["labels"]).backward()
        with pytest.raises(IndexError):
            tiny(input_ids=batch["input_ids"] + 1000)
    assert all(w.grad.abs().sum() > 0 for w, _ in latent_weights(tiny, ternary.TWN))
    assert torch.equal(logits_of(tiny, batch), expected) and tiny.config._attn_implementation == before
    with pytest.raises(ValueError, match="positive"), ternary.ternary_activations(tiny, ternary.Slope(1.0, 1, value=0.0)):
        pass


@pytest.mark.method("Q-15")
def test_the_slope_rises_during_training_in_every_layer_and_stays(tiny, batch):
    slope, seen = ternary.Slope(4.0, ramp=2), []

    def largest() -> list[float]:
        """The mean largest probability of a query, layer by layer."""
        maps = []
        with torch.no_grad(), ternary.ternary_activations(tiny, slope), pytest.MonkeyPatch.context() as patch:
            patch.setattr(ternary, "ternary_activation", lambda x, stochastic: maps.append(x) or x)
            patch.setattr(ternary, "scaled_ternary_activation", lambda x, stochastic: x)
            logits_of(tiny, batch)
        assert len(maps) == 2
        return [P.amax(-1).mean().item() for P in maps]

    with ternary.ternary_activations(tiny, slope):
        steps(tiny, batch, lambda *step: (slope.anneal(*step), seen.append(slope.value)), count=3)
    assert seen == [2.5, 4.0, 4.0]
    steep, slope.value = largest(), 1.0
    assert all(after > before for after, before in zip(steep, largest(), strict=True))
