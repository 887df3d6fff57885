"""Codebooks, binary codes and loss-aware levels against scikit-learn, faiss, numpy's least squares and brute force."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

from utils import artifacts
from utils.encodings import decode
from utils.quantization import codebook, loss_aware
from utils.quantization.codebook import Fit, MultiBitQuantizer, ProductQuantizer, ResidualQuantizer, StaticKMeans, TrainedKMeans
from utils.quantization.loss_aware import LossAwareQuantizer
from utils.quantization.quantizer import attach, detach
from utils.training import cross_entropy


def error(w: torch.Tensor, quantized: torch.Tensor) -> float:
    return (w - quantized).square().sum().item()


@pytest.fixture
def weight():
    return torch.randn(64, 32) * 0.05


@pytest.mark.method("Q-20")
@pytest.mark.parametrize("init", codebook.INITS)
def test_lloyd_is_scikit_learns_from_the_same_start(weight, init):
    x = weight.flatten().sort().values
    start = codebook.INITS[init](x, 8, 0).sort().values
    reference = KMeans(8, init=start.numpy()[:, None], n_init=1, tol=0, max_iter=300).fit(x.double().numpy()[:, None])
    centroids = codebook.kmeans(weight, 8, init, 300)
    np.testing.assert_allclose(centroids.numpy(), np.sort(reference.cluster_centers_[:, 0]), atol=2e-4)
    assert error(weight, StaticKMeans(weight, 3, init, 300).quantize(weight)) == pytest.approx(reference.inertia_, rel=1e-3)


@pytest.mark.method("Q-20")
def test_kmeans_reaches_the_optimum_of_a_small_problem_and_never_beats_it():
    x = torch.randn(40).sort().values

    def cost(part):
        return error(part, part.mean())

    best = min(
        sum(cost(x[a:b]) for a, b in itertools.pairwise((0, *cuts, 40))) for cuts in itertools.combinations(range(1, 40), 3)
    )
    found = [error(x, StaticKMeans(x.view(4, 10), 2, seed=seed).quantize(x)) for seed in range(20)]
    assert min(found) == pytest.approx(best, rel=1e-4)


@pytest.mark.method("Q-20")
def test_starts_are_what_they_claim(weight):
    x = weight.flatten().sort().values
    torch.testing.assert_close(codebook.linear_init(x, 5), torch.linspace(x[0].item(), x[-1].item(), 5))
    quantiles = np.quantile(x.numpy(), (np.arange(4) + 0.5) / 4)
    np.testing.assert_allclose(codebook.density_init(x, 4).numpy(), quantiles, atol=1e-3)
    apart = torch.cat([torch.zeros(500), torch.ones(500), torch.full((3,), 50.0)]) + torch.rand(1003).sort().values * 1e-3
    assert codebook.plus_plus_init(apart, 2)[1] > 49  # probability 0.997: far values are drawn
    assert not torch.equal(codebook.plus_plus_init(x, 4, 0), codebook.plus_plus_init(x, 4, 1))


@pytest.mark.method("Q-20", "Q-21")
def test_by_default_kmeans_runs_until_nothing_moves_and_nobody_changes_what_is_remembered():
    w = torch.randn(100, 300) ** 3
    x = w.flatten().sort().values
    for make in (StaticKMeans, TrainedKMeans):
        quantizer = make(w, 4)
        assert torch.equal(codebook.lloyd(x, quantizer.centroids.detach(), 1), quantizer.centroids)
    with torch.no_grad():
        quantizer.centroids.add_(1)
    assert torch.equal(TrainedKMeans(w, 4).centroids + 1, quantizer.centroids)


@pytest.mark.method("Q-20")
def test_a_large_matrix_takes_a_moment():
    import time

    w = torch.randn(1536, 384)
    start = time.perf_counter()
    quantizer = StaticKMeans(w, 4)
    assert time.perf_counter() - start < 5
    gain = error(w, quantizer.quantize(w)) / w.numel()
    assert gain == pytest.approx(0.009497, rel=0.05)  # the distortion of Max's 16-level quantizer for a Gaussian


@pytest.mark.method("Q-21")
def test_a_centroids_gradient_is_the_sum_of_its_weights_gradients(weight):
    quantizer = TrainedKMeans(weight, 3)
    x = torch.randn(10, 32)
    latent = nn.Parameter(weight.clone())
    (x @ quantizer(latent).T).square().sum().backward()
    dense = quantizer.quantize(weight).detach().requires_grad_()
    (x @ dense.T).square().sum().backward()
    expected = torch.zeros(8).scatter_add(0, quantizer.index.flatten().long(), dense.grad.flatten())
    torch.testing.assert_close(quantizer.centroids.grad, expected)
    assert latent.grad is None
    exact = quantizer.centroids.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: codebook.SharedWeights.apply(c, quantizer.index[:4]).square().sum(), exact)


@pytest.mark.method("Q-21")
def test_only_centroids_learn_and_the_loss_falls(tiny, batch):
    names = attach(tiny, lambda m: TrainedKMeans(m.weight, 4))
    before = [tiny.get_submodule(n[:-7]).parametrizations.weight[0].index.clone() for n in names]
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(8):
        loss = cross_entropy(tiny, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(a, tiny.get_submodule(n[:-7]).parametrizations.weight[0].index) for a, n in zip(before, names, strict=True)
    )
    encoded = detach(tiny)
    for name in names:
        torch.testing.assert_close(decode(encoded[name]), tiny.get_parameter(name))
        assert tiny.get_parameter(name).unique().numel() <= 16


@pytest.mark.method("Q-21")
@pytest.mark.parametrize("seed", range(5))
def test_huffman_lengths_are_optimal_and_near_the_entropy(seed):
    counts = torch.randint(0, 1000, (2 ** (seed + 1),), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths = codebook.huffman_lengths(counts)
    used = [length for length, count in zip(lengths, counts, strict=True) if count]
    assert sum(2.0**-length for length in used) == 1  # Kraft: a prefix code without waste
    assert codebook.entropy_bits(counts) <= codebook.huffman_bits(counts) < codebook.entropy_bits(counts) + sum(counts)
    if len(counts) == 4:  # every prefix code of four symbols
        best = min(sum(c * n for c, n in zip(counts, p, strict=True))
                   for code in ((2, 2, 2, 2), (1, 2, 3, 3)) for p in itertools.permutations(code))  # fmt: skip
        assert codebook.huffman_bits(counts) == best


@pytest.mark.method("Q-21")
def test_huffman_edge_cases_entropy_and_the_rate(weight):
    from scipy.stats import entropy

    assert codebook.huffman_lengths([0, 7, 0]) == [0, 1, 0] and codebook.huffman_lengths([]) == []
    assert codebook.huffman_bits([8, 4, 2, 2]) == codebook.entropy_bits([8, 4, 2, 2]) == 28  # powers of two: no loss
    quantizer = TrainedKMeans(weight, 4)
    counts = quantizer.counts()
    assert codebook.entropy_bits(counts) == pytest.approx(sum(counts) * entropy(counts, base=2))
    assert codebook.huffman_bits(counts) < 4 * weight.numel()  # linear centroids are used unevenly
    assert weight.numel() * 4 / quantizer.encode(weight).nbytes == pytest.approx(codebook.sharing_rate(weight.numel(), 16))


@pytest.mark.method("Q-22")
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_product_quantization_is_kmeans_on_each_block(axis):
    w = torch.randn(96, 96)
    quantizer = ProductQuantizer(w, s=12, bits=4, axis=axis, fit=Fit(50))
    blocks = (w if axis == "columns" else w.T).reshape(96, 12, 8).transpose(0, 1)
    total = 0.0
    for block, centroids in zip(blocks, quantizer.centroids, strict=True):
        start = block[torch.randperm(96, generator=torch.Generator().manual_seed(0))[:16]]
        total += KMeans(16, init=start.numpy(), n_init=1, tol=0, max_iter=50).fit(block.numpy()).inertia_
        nearest = torch.cdist(block, centroids).argmin(1)
        moved = torch.stack([block[nearest == i].mean(0) for i in range(16)])
        torch.testing.assert_close(moved, centroids, atol=1e-4, rtol=1e-4)  # a fixed point of Lloyd's algorithm
    assert error(w, quantizer.quantize(w)) == pytest.approx(total, rel=1e-3)


@pytest.mark.method("Q-22", "Q-23")
def test_products_and_residuals_reconstruct_as_well_as_faiss():
    import faiss

    w = torch.randn(2000, 16)
    reference = faiss.ProductQuantizer(16, 4, 5)
    reference.train(w.numpy())
    expected = error(w, torch.from_numpy(reference.decode(reference.compute_codes(w.numpy()))))
    assert error(w, ProductQuantizer(w, 4, 5).quantize(w)) == pytest.approx(expected, rel=0.03)
    reference = faiss.ResidualQuantizer(16, 3, 5)
    reference.max_beam_size = 1
    reference.train(w.numpy())
    expected = error(w, torch.from_numpy(reference.decode(reference.compute_codes(w.numpy()))))
    assert error(w, ResidualQuantizer(w, 3, 5).quantize(w)) == pytest.approx(expected, rel=0.03)


@pytest.mark.method("Q-22", "Q-23")
def test_by_default_vectors_are_clustered_until_little_moves_and_a_sample_serves_all():
    w = torch.randn(512, 32)
    points = w.reshape(1, -1, 4)
    centroids = codebook.kmeans_vectors(points, 16)

    def left(centroids):
        return (points - codebook.look_up(centroids, codebook.nearest_vector(points, centroids))).square().sum().item()

    longer = left(codebook.kmeans_vectors(points, 16, Fit(200)))
    assert left(centroids) < 1.01 * longer < 1.01 * left(codebook.kmeans_vectors(points, 16, Fit(1)))
    assert left(codebook.kmeans_vectors(points, 16, Fit(sample=1000))) < 1.1 * longer
    assert not torch.equal(codebook.kmeans_vectors(points, 16, Fit(seed=1)), centroids)


@pytest.mark.method("Q-22")
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_a_shared_codebook_is_kmeans_on_all_blocks_together_and_is_stored_once(axis):
    w = torch.randn(96, 64)
    quantizer = ProductQuantizer(w, 16, 5, axis, shared=True)
    turned = w if axis == "columns" else w.T
    points = turned.unflatten(1, (16, -1)).transpose(0, 1).flatten(0, 1).unsqueeze(0)
    assert torch.equal(codebook.kmeans_vectors(points, 32), quantizer.centroids)
    d = turned.shape[1] // 16
    nearest = torch.cdist(turned.reshape(-1, d), quantizer.centroids[0]).argmin(1)
    expected = quantizer.centroids[0][nearest].view_as(turned)
    torch.testing.assert_close(quantizer.quantize(w), expected if axis == "columns" else expected.T)
    assert quantizer.encode(w).nbytes == 16 * len(turned) * 5 // 8 + 4 * 32 * d
    assert error(w, quantizer.quantize(w)) > error(w, ProductQuantizer(w, 16, 5, axis).quantize(w))  # what sharing costs


@pytest.mark.method("Q-22", "Q-23")
def test_rates_are_those_of_the_bytes():
    w = torch.randn(256, 64)
    assert w.nbytes / ProductQuantizer(w, 8, 4).encode(w).nbytes == pytest.approx(codebook.product_rate(256, 64, 8, 16))
    assert w.nbytes / ResidualQuantizer(w, 3, 4).encode(w).nbytes == pytest.approx(codebook.residual_rate(256, 64, 3, 16))


@pytest.mark.method("Q-23")
def test_each_residual_round_is_kmeans_on_what_is_left():
    w = torch.randn(200, 12)
    one, three = ResidualQuantizer(w, 1, 4), ResidualQuantizer(w, 3, 4)
    assert torch.equal(one.centroids[0], three.centroids[0])
    left = w - one.quantize(w)
    torch.testing.assert_close(codebook.kmeans_vectors(left.unsqueeze(0), 16)[0], three.centroids[1])
    errors = [error(w, ResidualQuantizer(w, t, 4).quantize(w)) for t in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    pieces = ResidualQuantizer(w, 2, 4, length=4)
    assert pieces.centroids.shape == (2, 16, 4) and error(w, pieces.quantize(w)) < errors[1]


@pytest.mark.method("Q-24")
def test_one_greedy_code_is_the_binary_weight_network_and_more_follow_the_residual(weight):
    alpha, B = codebook.greedy_bits(weight, 1)
    assert torch.equal(alpha[:, 0], weight.abs().mean(1)) and torch.equal(B[:, 0], weight.sign())
    r, expected = weight.clone(), torch.zeros_like(weight)
    for _ in range(3):
        step = r.abs().mean(1, keepdim=True) * r.sign()
        expected, r = expected + step, r - step
    torch.testing.assert_close(MultiBitQuantizer(3, "greedy").quantize(weight), expected)
    errors = [error(weight, MultiBitQuantizer(k, "greedy").quantize(weight)) for k in range(1, 9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.method("Q-25")
def test_refined_alphas_are_numpys_least_squares(weight):
    alpha, B = codebook.greedy_bits(weight, 3, refine=True)
    for row in range(0, 64, 7):
        expected = np.linalg.lstsq(B[row].T.numpy(), weight[row].numpy(), rcond=None)[0]
        np.testing.assert_allclose(alpha[row].numpy(), expected, atol=1e-6)
    for k in (2, 3, 4):
        refined, greedy = (MultiBitQuantizer(k, how).quantize(weight) for how in ("refined", "greedy"))
        assert error(weight, refined) < error(weight, greedy)
    same = torch.full((2, 8), 0.5)  # the second code repeats the first: B^T B is singular
    torch.testing.assert_close(MultiBitQuantizer(3, "refined").quantize(same), same)


@pytest.mark.method("Q-25")
def test_refining_goes_on_from_the_refined_residual(weight):
    _, B = codebook.greedy_bits(weight, 3, refine=True)
    for row in range(0, 64, 9):
        two = B[row, :2].T.numpy()
        left = weight[row].numpy() - two @ np.linalg.lstsq(two, weight[row].numpy(), rcond=None)[0]
        np.testing.assert_array_equal(B[row, 2].numpy(), np.where(left < 0, -1, 1))


@pytest.mark.method("Q-24", "Q-25", "Q-26")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_alternating_is_better_than_refined_which_is_better_than_greedy(weight, bits):
    errors = [error(weight, MultiBitQuantizer(bits, how).quantize(weight)) for how in ("greedy", "refined", "alternating")]
    assert errors[0] > errors[1] > errors[2]
    two_cycles = codebook.decode_bits(*codebook.alternating_bits(weight, bits, 2))
    assert torch.equal(MultiBitQuantizer(bits).quantize(weight), two_cycles)


@pytest.mark.method("Q-26")
def test_in_training_alternation_goes_on_from_the_last_step(weight):
    quantizer = MultiBitQuantizer(2).train()
    errors = [error(weight, quantizer.quantize(weight)) for _ in range(6)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors)) and errors[-1] < errors[0]
    expected = codebook.decode_bits(*codebook.alternating_bits(weight, 2, 2 + 5))
    torch.testing.assert_close(quantizer.quantize(weight), codebook.decode_bits(*codebook.alternating_bits(weight, 2, 2 + 6)))
    assert error(weight, expected) == pytest.approx(errors[-1], rel=1e-6)
    held = quantizer.eval().held.clone()
    torch.testing.assert_close(decode(quantizer.encode(weight)), quantizer.quantize(weight), atol=1e-6, rtol=0)
    assert torch.equal(quantizer.held, held)  # measuring moves nothing
    for how in ("greedy", "refined"):
        plain = MultiBitQuantizer(2, how).train()
        assert torch.equal(plain.quantize(weight), plain.quantize(weight))


@pytest.mark.method("Q-26")
def test_recoding_is_the_nearest_of_all_sums_and_cycles_never_hurt(weight):
    alpha = torch.rand(64, 3)
    sums = torch.stack([sum(s * a for s, a in zip(p, alpha.T, strict=True)) for p in itertools.product((-1, 1), repeat=3)], 1)
    best = (weight.unsqueeze(2) - sums.unsqueeze(1)).abs().amin(2)
    found = (weight - codebook.decode_bits(alpha, codebook.recode(weight, alpha))).abs()
    torch.testing.assert_close(found, best)
    errors = [error(weight, codebook.decode_bits(*codebook.alternating_bits(weight, 2, cycles))) for cycles in range(6)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[2] < error(weight, MultiBitQuantizer(2, "refined").quantize(weight))


@pytest.mark.method("Q-26")
def test_two_alternating_bits_are_near_the_best_of_all_codes():
    w = torch.randn(30, 6)
    B = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)))
    for row in w:
        best = min(error(row, p @ torch.linalg.lstsq(p, row.unsqueeze(1)).solution[:, 0])
                   for b, c in itertools.combinations(B[:32], 2) for p in [torch.stack([b, c], 1)])  # fmt: skip
        found = error(row, MultiBitQuantizer(2).quantize(row.unsqueeze(0))[0])
        assert best - 1e-5 <= found
        assert found <= error(row, MultiBitQuantizer(2, "greedy").quantize(row.unsqueeze(0))[0]) + 1e-6


@pytest.mark.method("Q-26")
def test_bi_level_training_moves_the_weights_underneath(tiny, batch):
    attach(tiny, lambda m: MultiBitQuantizer(2))
    latent = tiny.bert.encoder.layer[0].attention.self.query.parametrizations.weight.original
    before = latent.detach().clone()
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(tiny, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(before, latent)


@pytest.mark.method("Q-27")
def test_without_curvature_ternary_levels_are_the_ternary_weight_network(weight):
    a = weight.abs().flatten().sort(descending=True).values
    gains = a.cumsum(0).square() / torch.arange(1, a.numel() + 1)  # exact: try every threshold
    best = (weight.square().sum() - gains.max()).item()
    levels = torch.tensor([-1.0, 0, 1])
    start = loss_aware.first_alpha(weight, levels)
    assert start.item() == pytest.approx(weight.abs()[weight.abs() > 0.7 * weight.abs().mean()].mean().item())
    alpha, index = loss_aware.loss_aware_levels(weight, torch.ones_like(weight), levels, start, iterations=200)
    kept = index != 1
    assert alpha.item() == pytest.approx(weight[kept].abs().mean().item())
    assert torch.equal(kept, weight.abs() > alpha / 2)
    assert error(weight, alpha * (index - 1.0)) == pytest.approx(best, rel=1e-3)


@pytest.mark.method("Q-27")
@pytest.mark.parametrize(("bits", "kind"), [(2, "linear"), (3, "linear"), (4, "linear"), (3, "logarithmic"), (4, "logarithmic")])
def test_loss_aware_levels_lower_the_weighted_error_to_a_fixed_point(weight, bits, kind):
    levels, D = loss_aware.level_values(bits, kind), torch.rand_like(weight) ** 2
    start = loss_aware.first_alpha(weight, levels)

    def weighted(alpha, index):
        return (D * (alpha * levels[index] - weight).square()).sum().item()

    found = [weighted(*loss_aware.loss_aware_levels(weight, D, levels, start, iterations)) for iterations in range(1, 12)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(found))
    alpha, index = loss_aware.loss_aware_levels(weight, D, levels, start, 500, 0)
    nearest = (alpha * levels - weight.unsqueeze(-1)).abs().argmin(-1)
    assert (levels[nearest] != levels[index]).sum() <= 2  # ties
    b = levels[index]
    slope = np.linalg.lstsq((D.sqrt() * b).reshape(-1, 1).numpy(), (D.sqrt() * weight).flatten().numpy(), rcond=None)[0]
    assert alpha.item() == pytest.approx(slope[0], rel=1e-4)
    plain = loss_aware.loss_aware_levels(weight, torch.ones_like(D), levels, start, 500, 0)
    assert weighted(alpha, index) <= weighted(*plain)


@pytest.mark.method("Q-27")
def test_levels_are_the_papers():
    assert loss_aware.level_values(2).tolist() == [-1, 0, 1] == loss_aware.level_values(2, "logarithmic").tolist()
    assert loss_aware.level_values(3).tolist() == pytest.approx([-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1])
    assert loss_aware.level_values(3, "logarithmic").tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    for bits, kind in ((1, "linear"), (2, "cubic")):
        with pytest.raises(ValueError, match="2 to 8"):
            loss_aware.level_values(bits, kind)


@pytest.mark.method("Q-27")
def test_curvature_comes_from_adams_second_moment(tiny, batch):
    attach(tiny, lambda m: LossAwareQuantizer(m.weight))
    parametrized = tiny.bert.encoder.layer[1].output.dense.parametrizations.weight
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-3, betas=(0.9, 0.99))
    cross_entropy(tiny, batch).backward()
    gradient = parametrized.original.grad.clone()
    optimizer.step()
    plain = parametrized[0].solve(parametrized.original)[0]
    loss_aware.update_curvature(1, tiny, optimizer)
    torch.testing.assert_close(parametrized[0].D, (0.01 * gradient**2).sqrt() + 1e-8)
    assert parametrized[0].solve(parametrized.original)[0] != plain


ALL = {
    **{f"kmeans-{b}-{i}": functools.partial(StaticKMeans, bits=b, init=i) for b in (1, 4) for i in codebook.INITS},
    "trained": functools.partial(TrainedKMeans, bits=3),
    **{f"product-{a}-{s}": functools.partial(ProductQuantizer, s=8, bits=3, axis=a, shared=s)
       for a in ("columns", "rows") for s in (False, True)},
    "residual": functools.partial(ResidualQuantizer, t=2, bits=4),
    "residual-pieces": functools.partial(ResidualQuantizer, t=3, bits=5, length=8),
    **{f"{how}-{b}": lambda w, b=b, how=how: MultiBitQuantizer(b, how) for how in codebook.MULTI_BIT for b in (1, 3)},
    **{f"loss-aware-{k}-{b}": functools.partial(LossAwareQuantizer, bits=b, kind=k) for b in (2, 5, 8) for k in loss_aware.KINDS},
}  # fmt: skip


@pytest.mark.method("Q-20", "Q-21", "Q-22", "Q-23", "Q-24", "Q-25", "Q-26", "Q-27")
@pytest.mark.parametrize("name", ALL)
def test_what_is_stored_decodes_to_what_is_computed(weight, name):
    for w in (weight, torch.zeros(64, 32), torch.full((64, 32), -0.3), weight.bfloat16()):
        quantizer = ALL[name](w)
        quantized = quantizer.quantize(w)
        assert torch.isfinite(quantized).all() and quantized.dtype == w.dtype
        torch.testing.assert_close(decode(quantizer.encode(w)).to(w.dtype), quantized, atol=1e-6, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantizer.quantize(w), quantized)  # mixed precision must not move a code
        if w.unique().numel() == 1:
            torch.testing.assert_close(quantized, w, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="finite"):
        broken = torch.full((64, 32), math.inf)
        ALL[name](broken).quantize(broken)


@pytest.mark.method("Q-20", "Q-24", "Q-27")
def test_bytes_follow_the_bits(weight):
    n = weight.numel()
    assert StaticKMeans(weight, 4).encode(weight).nbytes == n * 4 // 8 + 4 * 16
    assert MultiBitQuantizer(3).encode(weight).nbytes == n * 3 // 8 + 4 * 3 * 64
    assert LossAwareQuantizer(weight, 3).encode(weight).nbytes == n * 3 // 8 + 4 * 7


@pytest.mark.method("Q-20", "Q-22", "Q-23", "Q-24")
def test_impossible_settings_are_refused(weight):
    for make in (StaticKMeans, TrainedKMeans, functools.partial(ProductQuantizer, s=4), functools.partial(ResidualQuantizer, t=2),
                 LossAwareQuantizer, lambda w, bits: MultiBitQuantizer(bits)):  # fmt: skip
        with pytest.raises(ValueError, match="1 to 8"):
            make(weight, bits=9)
    for make, match in (
        (lambda: StaticKMeans(torch.rand(3, 3), 4), "16 centroids need as many values"),
        (lambda: ProductQuantizer(weight, 4), "256 centroids need as many sub-vectors per codebook"),
        (lambda: ProductQuantizer(weight, 5, 2), "divide the 32 columns"),
        (lambda: ProductQuantizer(weight, 4, 2, axis="depth"), "'columns' or 'rows'"),
        (lambda: ResidualQuantizer(weight, 0, 2), "t must be 1 or more"),
        (lambda: ResidualQuantizer(weight, 1), "256 centroids need as many vectors"),
        (lambda: StaticKMeans(weight, 2, init="random"), "linear, density"),
        (lambda: MultiBitQuantizer(2, "exact"), "greedy, refined, alternating"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.mark.method("Q-20", "Q-22", "Q-23", "Q-26")
def test_files_hold_the_measured_model(tiny, batch, tmp_path):
    makers = [lambda w: StaticKMeans(w, 4), lambda w: ProductQuantizer(w, 4, 4), lambda w: ResidualQuantizer(w, 2, 4),
              lambda w: MultiBitQuantizer(3)]  # fmt: skip
    order = itertools.cycle(makers)
    attach(tiny, lambda m: next(order)(m.weight))
    with torch.no_grad():
        before = tiny(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    artifacts.save(tiny, tmp_path / "model", detach(tiny))
    with torch.no_grad():
        after = artifacts.load(tmp_path / "model")(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


@pytest.mark.method("Q-20")
@pytest.mark.parametrize("seed", range(20))
def test_the_third_start_is_far_from_both_others(seed):
    apart = torch.cat([center + 0.01 * torch.rand(300) for center in (0.0, 50.0, 100.0)]).sort().values
    assert [round(c / 50) for c in codebook.plus_plus_init(apart, 3, seed).tolist()] == [0, 1, 2]


@pytest.mark.method("Q-21")
def test_trained_centroids_start_evenly_spaced_as_in_the_paper():
    w = torch.randn(30, 40)
    at_start = TrainedKMeans(w, 3, iterations=0).centroids
    torch.testing.assert_close(at_start.detach(), torch.linspace(w.min().item(), w.max().item(), 8))
