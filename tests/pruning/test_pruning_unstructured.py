"""Survey sections 2.1.1, 2.1.3 and 2.1.4 against oracles: autograd, least squares, brute force, the papers' closed forms."""

import copy
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from utils import profiles
from utils.bert import ENCODER, dense_weight, matrices
from utils.pruning import densify, hessian, iterative
from utils.pruning.magnitude import class_blind_masks, magnitude_masks, random_masks
from utils.pruning.masks import apply_masks, held_masks, hold_masks, lowest, release_masks, sparsity_of
from utils.tasks import Split, Task
from utils.training import cross_entropy, train

FIRST = "bert.encoder.layer.0.attention.self.query.weight"


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=2
    )
    return BertForSequenceClassification(config).eval()


def make_batches(count: int = 2, size: int = 6, length: int = 9) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.arange(size) % (length - 3) + 3  # rows of many lengths, so that padding matters
    mask = (torch.arange(length) < lengths[:, None]).long()
    return [{"input_ids": torch.randint(1, 100, (size, length), generator=generator) * mask, "attention_mask": mask,
             "labels": torch.randint(2, (size,), generator=generator)} for _ in range(count)]  # fmt: skip


def fit(model: nn.Module, steps: int, after_step=None, learning_rate: float = 1e-3) -> None:
    """A training loop small enough to see through."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step, batch in enumerate((make_batches() * steps)[:steps], 1):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        if after_step is not None:
            after_step(step, model, optimizer)


def zero_share(model: nn.Module, groups: tuple[str, ...] = ENCODER) -> float:
    return sparsity_of({m.name: m.weight != 0 for m in matrices(model, groups)})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    return tiny_bert()


@pytest.fixture(scope="module")
def batches():
    return make_batches()


# --- P-01 Optimal Brain Damage ------------------------------------------------------------------------------------------


@pytest.mark.method("P-01")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_fisher_equals_a_loop_over_examples(model, batches, implementation):
    model.config._attn_implementation = implementation
    groups = ("query", "ffn_in", "ffn_out", "pooler", "classifier")
    fisher = hessian.fisher_diagonal(model, batches, groups)
    found = matrices(model, groups)
    expected = {m.name: torch.zeros_like(m.weight) for m in found}
    for batch in batches:
        for row in range(6):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            for m, g in zip(found, torch.autograd.grad(cross_entropy(model, one), [m.weight for m in found]), strict=True):
                expected[m.name] += g**2 / 12
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value, rtol=1e-3, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.method("P-01")
def test_squared_batch_gradient_would_be_biased_low(model, batches):
    fisher = hessian.fisher_diagonal(model, batches[:1], ("classifier",))["classifier.weight"]
    mean = torch.autograd.grad(cross_entropy(model, batches[0]), [model.classifier.weight])[0]
    assert (mean**2).sum() < 0.9 * fisher.sum()


@pytest.mark.method("P-01")
def test_hutchinson_meets_the_exact_hessian_of_a_small_network():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
    sizes = [(5, 4), (3, 5)]

    def loss(flat):
        w1, w2 = flat[:20].view(sizes[0]), flat[20:].view(sizes[1])
        return nn.functional.cross_entropy(torch.tanh(x @ w1.T) @ w2.T, y)

    flat = torch.randn(35, dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.functional.hessian(loss, flat.detach()).diagonal()
    estimate = hessian.hutchinson_diagonal(loss(flat), [flat], samples=4000)[0]
    assert (estimate - exact).abs().max() < 0.02 * exact.abs().max() + 0.01
    assert np.corrcoef(estimate, exact)[0, 1] > 0.99


@pytest.mark.method("P-01")
def test_hutchinson_is_exact_at_once_for_a_diagonal_hessian():
    h = torch.tensor([3.0, -1.0, 0.5])
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    torch.testing.assert_close(hessian.hutchinson_diagonal((0.5 * h * w**2).sum(), [w], samples=1)[0], h)


@pytest.mark.method("P-01")
def test_every_batch_gets_signs_of_its_own(model, batches):
    def diagonal(count, seed):
        found = hessian.hessian_diagonal(model, batches[:1] * count, ("classifier",), samples=1, seed=seed)
        return found["classifier.weight"]

    torch.testing.assert_close(diagonal(2, 0), (diagonal(1, 0) + diagonal(1, 1)) / 2)


@pytest.mark.method("P-01")
def test_hessian_diagonal_of_a_bert_classifier(model, batches):
    def loss(weight):
        total = 0.0
        for batch in batches:
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            logits = torch.func.functional_call(model, {"classifier.weight": weight}, kwargs=inputs).logits
            total = total + nn.functional.cross_entropy(logits, batch["labels"]) / len(batches)
        return total

    exact = torch.autograd.functional.hessian(loss, model.classifier.weight.detach()).view(64, 64).diagonal().view(2, 32)
    estimate = hessian.hessian_diagonal(model, batches, ("classifier",), samples=150)["classifier.weight"]
    assert (estimate - exact).norm() < 0.6 * exact.norm()
    assert estimate.sum().item() == pytest.approx(exact.sum().item(), rel=0.1)
    assert np.corrcoef(estimate.flatten(), exact.flatten())[0, 1] > 0.8


@pytest.mark.method("P-01")
def test_hessian_diagonal_reaches_through_the_attention(model, batches):
    model.config._attn_implementation = "sdpa"
    h = hessian.hessian_diagonal(model, batches, ("query", "ffn_out"), samples=1)
    assert all(value.isfinite().all() and value.abs().sum() > 0 for value in h.values())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.method("P-01")
def test_obd_ranks_by_magnitude_where_the_curvature_is_constant(model):
    weight = model.get_parameter(FIRST)
    saliency = hessian.obd_saliency(weight, torch.full_like(weight, 0.7))
    torch.testing.assert_close(saliency, 0.35 * weight.detach() ** 2)
    assert torch.equal(lowest(saliency, 0.6), lowest(weight.abs(), 0.6))


@pytest.mark.method("P-01")
def test_obd_predicts_the_rise_of_a_quadratic_loss():
    h, w = torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 3.0, 0.5])
    loss = lambda z: (0.5 * h * (z - w) ** 2).sum()  # noqa: E731
    rise = torch.stack([loss(w * (torch.arange(3) != i)) for i in range(3)])
    torch.testing.assert_close(hessian.obd_saliency(w, h), rise)


@pytest.mark.method("P-01")
@pytest.mark.parametrize("scope", ["global", "matrix"])
def test_obd_masks_have_the_sparsity_and_keep_the_salient(model, batches, scope):
    groups, name = ("value", "attention_output"), FIRST.replace("query", "value")
    masks = hessian.obd_masks(model, batches, 0.5, groups, scope)
    scores = hessian.obd_scores(model, batches, groups)
    assert sparsity_of(masks) == pytest.approx(0.5, abs=1e-4)
    assert scores[name][masks[name]].min() >= scores[name][~masks[name]].max()
    assert not torch.equal(masks[name], magnitude_masks(model, 0.5, groups)[name])


@pytest.mark.method("P-01")
def test_obd_goes_in_rounds(model, batches):
    score = partial(hessian.obd_scores, batches=batches)
    expected = lowest(score(model)[FIRST], 0.3)
    hook, seen = iterative.iterative_pruning([0.3, 0.6], [0, 3], score), {}
    hook(0, model, None)
    assert torch.equal(held_masks(model)[FIRST], expected)

    def after_step(step, model, optimizer):
        hook(step, model, optimizer)
        seen[step] = held_masks(model)[FIRST].clone()

    fit(model, 4, after_step)
    assert sparsity_of(held_masks(model)) == pytest.approx(0.6, abs=1e-3)
    assert torch.equal(seen[2], expected) and not (seen[4] & ~expected).any()


@pytest.mark.method("P-01", "P-02")
def test_hessian_methods_say_what_they_need(model, batches):
    for function in (hessian.fisher_diagonal, hessian.hessian_diagonal, hessian.layer_inputs_hessian):
        with pytest.raises(ValueError, match="at least one is needed"):
            function(model, [])
    with pytest.raises(ValueError, match="at least one is needed"):
        hessian.obs_prune(model, [], 0.5)
    with pytest.raises(ValueError, match="choose from query"):
        hessian.fisher_diagonal(model, batches, ("word_embeddings",))
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        hessian.obd_masks(model, batches, 1.0)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        hessian.obs_prune(model, batches, -0.1)
    with pytest.raises(ValueError, match="samples must be 1"):
        hessian.hutchinson_diagonal(torch.zeros(()), [], samples=0)
    with pytest.raises(ValueError, match="raise the damping"):
        hessian.damped_inverse(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at least one gradient"):
        hessian.inverse_hessian_recursion(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="block_size must be 1"):
        hessian.obs_prune_matrix(torch.ones(2, 2), torch.eye(2), 0.5, block_size=0)


# --- P-02 Optimal Brain Surgeon -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    """Correlated inputs X (samples, in), weights (out, in), and H = 2 X^T X."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    )
    return x, torch.randn(5, 12, generator=generator, dtype=torch.float64), 2 * x.T @ x


@pytest.mark.method("P-02")
def test_obs_row_is_the_constrained_least_squares_solution(problem):
    x, weights, H = problem
    for w in weights:
        pruned = hessian.obs_exact_row(w, torch.linalg.inv(H), 0.5)
        kept = pruned != 0
        assert kept.sum() == 6
        solution = np.linalg.lstsq(x[:, kept].numpy(), (x @ w).numpy(), rcond=None)[0]
        np.testing.assert_allclose(pruned[kept].numpy(), solution, rtol=1e-7, atol=1e-9)


@pytest.mark.method("P-02")
def test_obs_removes_the_weight_whose_loss_costs_least(problem):
    x, weights, H = problem
    for w in weights:
        errors = []
        for q in range(12):
            others = [i for i in range(12) if i != q]
            errors.append(np.linalg.lstsq(x[:, others].numpy(), (x @ w).numpy(), rcond=None)[1][0])
        pruned = hessian.obs_exact_row(w, torch.linalg.inv(H), 1 / 12)
        assert pruned[int(np.argmin(errors))] == 0 and (pruned == 0).sum() == 1
        L = 0.5 * w**2 / torch.linalg.inv(H).diagonal()
        np.testing.assert_allclose(L.numpy(), errors, rtol=1e-6)  # L_q is the rise of ||X w - X w'||^2


@pytest.mark.method("P-02")
def test_inverse_hessian_recursion_is_the_inverse():
    g = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direct = torch.linalg.inv(1e-3 * torch.eye(8, dtype=torch.float64) + g.T @ g / 30)
    torch.testing.assert_close(hessian.inverse_hessian_recursion(g, 1e-3), direct)


@pytest.mark.method("P-02")
def test_damping_is_a_hundredth_of_the_mean_curvature():
    H = torch.diag(torch.tensor([1.0, 3.0]).double())
    torch.testing.assert_close(hessian.damped_inverse(H).diagonal(), 1 / (H.diagonal() + 0.02))


@pytest.mark.method("P-02")
@pytest.mark.parametrize("block_size", [3, 4, 5, 128])
def test_obs_sweep_leaves_every_later_column_at_its_optimum(problem, block_size):
    x, weights, H = problem
    pruned = hessian.obs_prune_matrix(weights, H, 0.5, damping=0.0, block_size=block_size)
    for w, result in zip(weights, pruned, strict=True):
        v = w.clone()
        for j in range(12):  # once column j has its value, the columns after it are the best answer to it
            v[j] = 0.0 if result[j] == 0 else v[j]
            residual = x[:, : j + 1] @ (w[: j + 1] - v[: j + 1])
            v[j + 1 :] = w[j + 1 :] + torch.from_numpy(np.linalg.lstsq(x[:, j + 1 :].numpy(), residual.numpy(), rcond=None)[0])
        torch.testing.assert_close(result, v, rtol=1e-3, atol=1e-4)


@pytest.mark.method("P-02")
def test_obs_sweep_ranks_by_the_inverse_of_what_is_still_to_come(problem):
    _, weights, H = problem
    diagonal = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(12)])
    expected = lowest(weights**2 / diagonal, 0.5)
    assert torch.equal(hessian.obs_prune_matrix(weights, H, 0.5, damping=0.0) != 0, expected)


@pytest.mark.method("P-02")
def test_obs_is_magnitude_pruning_where_inputs_are_uncorrelated_and_alike():
    w = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    expected = w * lowest(w.abs(), 0.5)
    torch.testing.assert_close(hessian.obs_prune_matrix(w, 3 * torch.eye(10), 0.5), expected)


@pytest.mark.method("P-02")
def test_obs_sweep_is_near_the_exact_surgeon(problem):
    _, weights, H = problem
    error = lambda v: torch.einsum("oi,ij,oj->", v - weights, H, v - weights).item()  # noqa: E731
    exact = torch.stack([hessian.obs_exact_row(w, torch.linalg.inv(H), 0.5) for w in weights])
    sweep = hessian.obs_prune_matrix(weights, H, 0.5, damping=0.0)
    magnitude = torch.stack([w * lowest(w.abs(), 0.5) for w in weights])
    assert error(exact) < error(magnitude) and error(sweep) < error(magnitude)


@pytest.mark.method("P-02")
def test_layer_hessian_is_the_gram_matrix_of_real_tokens(model, batches):
    found = hessian.layer_inputs_hessian(model, batches, ("query", "key", "ffn_out", "pooler"))
    with torch.no_grad():
        x = torch.cat([model.bert.embeddings(input_ids=b["input_ids"])[b["attention_mask"].bool()] for b in batches])
    torch.testing.assert_close(found[FIRST], 2 * x.T @ x, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[FIRST], found[FIRST.replace("query", "key")])
    assert found["bert.encoder.layer.1.output.dense.weight"].shape == (64, 64)
    assert found["bert.pooler.dense.weight"].shape == (32, 32)


@pytest.mark.method("P-02")
def test_obs_prunes_a_bert_and_beats_magnitude_in_every_matrix(model, batches):
    dense = copy.deepcopy(model)
    hessians = hessian.layer_inputs_hessian(model, batches)
    masks = hessian.obs_prune(model, batches, 0.5)
    assert sparsity_of(masks) == pytest.approx(0.5, abs=1e-4) == zero_share(model)
    magnitude = magnitude_masks(dense, 0.5)
    for before, after in zip(matrices(dense), matrices(model), strict=True):
        H, w = hessians[before.name], before.weight.detach()
        error = lambda v, H=H, w=w: torch.einsum("oi,ij,oj->", v - w, H, v - w).item()  # noqa: E731
        assert error(after.weight.detach()) < error(w * magnitude[before.name])
    assert torch.equal(dense.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


# --- P-05 iterative magnitude -------------------------------------------------------------------------------------------


@pytest.mark.method("P-05")
@pytest.mark.parametrize(("scope", "one_shot"), [("matrix", magnitude_masks), ("global", class_blind_masks)])
def test_one_round_is_one_shot(model, scope, one_shot):
    expected = one_shot(model, 0.6, groups=ENCODER)
    hook = iterative.iterative_magnitude(iterative.round_targets(0.0, 0.6, 1), [3], scope=scope)
    hook(2, model, None)
    assert not held_masks(model)
    hook(3, model, None)
    assert all(torch.equal(held_masks(model)[name], expected[name]) for name in expected)


@pytest.mark.method("P-05")
def test_rounds_rank_in_each_matrix_unless_told_otherwise(model):
    with torch.no_grad():
        model.get_parameter(FIRST).mul_(100)
    iterative.iterative_magnitude([0.5], [0])(0, model, None)
    assert {round(1 - mask.float().mean().item(), 3) for mask in held_masks(model).values()} == {0.5}


@pytest.mark.method("P-05")
def test_frozen_rounds_are_monotone_and_reach_their_targets(model):
    targets = iterative.round_targets(0.2, 0.8, 3)
    assert targets == pytest.approx([0.2, 0.4, 0.6, 0.8])
    hook, seen = iterative.iterative_magnitude(targets, [1, 3, 5, 7]), []

    def after_step(step, model, optimizer):
        hook(step, model, optimizer)
        seen.append({name: mask.clone() for name, mask in held_masks(model).items()})

    fit(model, 9, after_step)
    assert [sparsity_of(s) for s in seen] == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 0.8], abs=1e-3)
    assert all(not (later[n] & ~earlier[n]).any() for earlier, later in pairwise(seen) for n in later)
    assert zero_share(model) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.method("P-05")
def test_unfrozen_weights_may_come_back_until_the_last_round(model):
    hook, seen = iterative.iterative_magnitude([0.3, 0.5], [1, 4], frozen=False), []

    def after_step(step, model, optimizer):
        hook(step, model, optimizer)
        seen.append({m.name: m.weight.detach() != 0 for m in matrices(model)})

    fit(model, 6, after_step, learning_rate=1e-2)
    assert [sparsity_of(seen[i]) for i in (0, 3, 5)] == pytest.approx([0.3, 0.5, 0.5], abs=1e-3)
    assert sparsity_of(seen[2]) < 0.1  # zeroed once, and left to the gradient
    assert any((seen[3][name] & ~seen[0][name]).any() for name in seen[0])


@pytest.mark.method("P-05")
def test_no_tie_brings_a_removed_weight_back(model):
    with torch.no_grad():
        model.get_parameter(FIRST).zero_()  # nothing but ties
    first = random_masks(model, 0.3)
    hold_masks(model, first)
    iterative.iterative_magnitude([0.5], [0])(0, model, None)
    assert not (held_masks(model)[FIRST] & ~first[FIRST]).any()


@pytest.mark.method("P-05")
@pytest.mark.parametrize("targets", [[], [0.5, 0.3], [1.0]])
def test_bad_targets(targets):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        iterative.iterative_magnitude(targets, range(len(targets)))


@pytest.mark.method("P-05")
def test_bad_rounds():
    for arguments in ((0.5, 0.4, 2), (0.0, 1.0, 2), (0.0, 0.5, 0)):
        with pytest.raises(ValueError, match="0 <= x < y < 1"):
            iterative.round_targets(*arguments)
    for steps in ([1], [2, 1], [1, 1], [-1, 2], [1, 2, 3]):
        with pytest.raises(ValueError, match="needs a later step"):
            iterative.iterative_magnitude([0.3, 0.5], steps)


# --- P-06 Narang --------------------------------------------------------------------------------------------------------


@pytest.mark.method("P-06")
def test_threshold_rises_and_ends_at_q():
    times = {"start": 100, "ramp": 1000, "end": 2000, "frequency": 10}
    theta, phi = iterative.narang_slopes(0.08, **times)
    assert phi == 1.5 * theta
    thresholds = [iterative.narang_threshold(i, **times, theta=theta, phi=phi) for i in range(2100)]
    assert all(a <= b for a, b in pairwise(thresholds))
    assert thresholds[99] == 0 and thresholds[100] == pytest.approx(theta / 10)
    assert thresholds[1000] == pytest.approx(theta * 901 / 10)
    assert thresholds[2000] == thresholds[2099] == pytest.approx(0.08, rel=2e-3)
    assert thresholds[2000] == pytest.approx(0.08 * (1 + 5 / (2 * 900 + 3 * 1000)))  # the survey's formulas, by hand
    weight = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    q = iterative.percentile(weight.abs(), 0.9).item()
    final = iterative.narang_threshold(2000, **times, theta=q * theta / 0.08, phi=q * phi / 0.08)
    assert (weight.abs() < final).float().mean() == pytest.approx(0.9, abs=2e-3)


@pytest.mark.method("P-06")
def test_percentile_agrees_with_numpy():
    values = torch.rand(999, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert iterative.percentile(values, share).item() == pytest.approx(
            np.quantile(values.numpy(), share, method="inverted_cdf"), abs=2e-3
        )


@pytest.mark.method("P-06")
def test_narang_masks_what_lies_below_the_threshold(model):
    times = {"start": 2, "ramp": 6, "end": 12, "frequency": 2}
    hook = iterative.narang_pruning(0.7, **times)
    w = model.get_parameter(FIRST).detach().clone()  # no training here, so the dense weight stays what it is
    theta, phi = iterative.narang_slopes(iterative.percentile(w.abs(), 0.7).item(), **times)
    for step in range(1, 12):
        hook(step, model, None)
        if step % 2 == 0:
            eps = iterative.narang_threshold(step, **times, theta=theta, phi=phi)
            assert torch.equal(held_masks(model)[FIRST], w.abs() > eps) or eps > iterative.percentile(w.abs(), 0.7)
    hook(12, model, None)
    assert sparsity_of(held_masks(model)) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.method("P-06")
def test_narang_while_training_is_monotone_and_lands_on_target(model):
    hook, seen = iterative.narang_pruning(0.9, start=2, ramp=5, end=10, frequency=1), []

    def after_step(step, model, optimizer):
        hook(step, model, optimizer)
        seen.append({m.name: m.weight.detach() != 0 for m in matrices(model)})

    fit(model, 12, after_step)
    shares = [sparsity_of(s) for s in seen]
    assert shares[0] == 0 and 0 < shares[3] < shares[6] < 0.9
    assert shares[9] == shares[11] == pytest.approx(0.9, abs=1e-3)
    assert all(not (b[n] & ~a[n]).any() for a, b in pairwise(seen) for n in b)


@pytest.mark.method("P-06")
def test_bad_narang_schedules():
    for times in ((5, 3, 9, 1), (1, 10, 9, 1), (3, 3, 3, 1), (1, 2, 3, 0), (0, 2, 3, 1)):
        with pytest.raises(ValueError, match="start <= ramp <= end"):
            iterative.narang_pruning(0.9, **dict(zip(("start", "ramp", "end", "frequency"), times, strict=True)))


@pytest.mark.method("P-06")
def test_every_matrix_has_a_threshold_of_its_own(model):
    with torch.no_grad():
        model.get_parameter(FIRST).mul_(100)
    hook = iterative.narang_pruning(0.7, start=2, ramp=6, end=12, frequency=2)
    for step in (2, 4):
        hook(step, model, None)
    assert all(0.1 < 1 - mask.float().mean().item() < 0.3 for mask in held_masks(model).values())


# --- P-07 AGP, P-08 transformers.zip ------------------------------------------------------------------------------------


@pytest.mark.method("P-07")
def test_cubic_schedule():
    at = partial(iterative.cubic_sparsity, start=10, end=50, initial=0.1, final=0.9)
    assert at(0) == at(10) == pytest.approx(0.1) and at(50) == at(90) == pytest.approx(0.9)
    assert at(30) == pytest.approx(0.9 - 0.8 * 0.125)
    steps = np.diff([at(i) for i in range(10, 51)])
    assert (steps > 0).all() and (np.diff(steps) < 0).all()  # fast at first, slow at the end


@pytest.mark.method("P-07")
def test_agp_follows_the_cubic_while_training(model):
    hook, seen = iterative.agp_pruning(0.8, start=2, end=9, frequency=3), {}

    def after_step(step, model, optimizer):
        hook(step, model, optimizer)
        seen[step] = {m.name: m.weight.detach() != 0 for m in matrices(model)}

    fit(model, 10, after_step)
    expected = {1: 0, 2: 0, 4: 2, 5: 5, 7: 5, 8: 8, 9: 9, 10: 9}  # the last pruning before each step
    for step, last in expected.items():
        target = iterative.cubic_sparsity(last, start=2, end=9, final=0.8)
        assert sparsity_of(seen[step]) == pytest.approx(target if last != 2 or step > 3 else 0.0, abs=1e-3)
    assert not (seen[10][FIRST] & ~seen[5][FIRST]).any()


@pytest.mark.method("P-07", "P-08")
def test_bad_schedules(model):
    with pytest.raises(ValueError, match="start < end"):
        iterative.agp_pruning(0.5, start=5, end=5, frequency=1)
    with pytest.raises(ValueError, match="initial <= sparsity"):
        iterative.agp_pruning(0.5, start=1, end=5, frequency=1, initial=0.6)
    with pytest.raises(ValueError, match="frequency >= 1"):
        iterative.agp_pruning(0.5, start=1, end=5, frequency=0)
    with pytest.raises(ValueError, match="first <= final"):
        iterative.transformers_zip_pruning(model, 0.5, 0.4, end=100)
    with pytest.raises(ValueError, match="times < end"):
        iterative.transformers_zip_pruning(model, 0.2, 0.4, end=9)


@pytest.mark.method("P-08")
@pytest.mark.parametrize("end", [20, 29])
def test_transformers_zip_prunes_at_once_and_nine_times_more(model, end):
    embeddings = model.bert.embeddings.word_embeddings.weight.detach().clone()
    hook = iterative.transformers_zip_pruning(model, 0.2, 0.65, end=end)
    shares = [sparsity_of(held_masks(model))]
    for step in range(1, end + 1):
        hook(step, model, None)
        shares.append(sparsity_of(held_masks(model)))
    rises = [step for step in range(1, end + 1) if shares[step] > shares[step - 1]]
    assert rises == list(range(2, 19, 2))  # nine, equally spaced, and the last tenth left for recovery
    assert [shares[0], *(shares[s] for s in rises)] == pytest.approx([0.2 + 0.05 * i for i in range(10)], abs=1e-3)
    per_matrix = [1 - mask.float().mean().item() for mask in held_masks(model).values()]
    assert per_matrix == pytest.approx([0.65] * 12, abs=1e-3)
    assert torch.equal(embeddings, model.bert.embeddings.word_embeddings.weight)


@pytest.mark.method("P-08")
def test_staircase_is_the_papers():
    at = partial(iterative.staircase_sparsity, interval=1001, first=0.3, final=0.5)
    assert at(0) == at(1000) == 0.3 and at(1001) == pytest.approx(0.3 + 0.2 / 9) and at(9009) == at(10_000) == pytest.approx(0.5)


# --- P-09 reweighted proximal pruning -----------------------------------------------------------------------------------


@pytest.mark.method("P-09")
def test_soft_threshold_is_softshrink_and_minimises_its_objective():
    w = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(iterative.soft_threshold(w, 0.3), nn.functional.softshrink(w, 0.3))
    amounts = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    objective = 0.5 * (grid - w[:, None]) ** 2 + amounts[:, None] * grid.abs()
    torch.testing.assert_close(iterative.soft_threshold(w, amounts), grid[objective.argmin(1)], rtol=0, atol=1e-4)


@pytest.mark.method("P-09")
def test_alphas_fall_with_the_weight():
    torch.testing.assert_close(
        iterative.reweighted_alphas(torch.tensor([0.0, -1.0, 4.0]), 0.5), torch.tensor([2.0, 1 / 1.5, 1 / 4.5])
    )


@pytest.mark.method("P-09")
@pytest.mark.parametrize("fused", [False, True])
def test_adam_learning_rate_explains_adams_own_step(fused):
    w = nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW(
        [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [w], "lr": 0.01}], weight_decay=0.0, fused=fused
    )
    for scale in (1.0, 0.1, 3.0):
        before = w.detach().clone()
        w.grad = scale * torch.arange(1.0, 21.0)
        optimizer.step()
    state = optimizer.state[w]
    m_hat = state["exp_avg"] / (1 - 0.9**3)
    torch.testing.assert_close(w.detach(), before - iterative.adam_learning_rate(optimizer, w) * m_hat)
    with pytest.raises(ValueError, match="AdamW"):
        iterative.adam_learning_rate(optimizer, nn.Parameter(torch.ones(1)))


def stepped(model: nn.Module, batch: dict, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    """An AdamW that has taken its first step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    cross_entropy(model, batch).backward()
    optimizer.step()
    return optimizer


@pytest.mark.method("P-09")
def test_the_strength_lets_the_target_share_travel_to_zero_in_its_steps():
    generator = torch.Generator().manual_seed(0)
    w, rate = torch.randn(40, 25, generator=generator), torch.rand(40, 25, generator=generator) + 0.1
    alphas = iterative.reweighted_alphas(w, 1e-2)
    gamma = iterative.proximal_strength(w, rate, 0.3, 4, 1e-2)
    zeros = []
    for _ in range(4):
        w = iterative.soft_threshold(w, 1.0001 * gamma * rate * alphas)
        zeros.append((w == 0).float().mean().item())
    assert zeros[-1] == pytest.approx(0.3, abs=2e-3) and zeros[2] < 0.28


@pytest.mark.method("P-09")
def test_adams_saliency_is_the_order_in_which_the_penalty_takes_weights(model, batches):
    optimizer = stepped(model, batches[0])
    found = iterative.adam_saliency(model, optimizer)
    for m in matrices(model):
        v_hat = optimizer.state[m.weight]["exp_avg_sq"] / (1 - 0.999)
        torch.testing.assert_close(found[m.name], m.weight.detach() ** 2 * (v_hat.sqrt() + 1e-8) / 1e-3)
        arrives = m.weight.detach().abs() / (
            iterative.adam_learning_rate(optimizer, m.weight) * iterative.reweighted_alphas(m.weight, 1e-9)
        )
        assert torch.equal(lowest(found[m.name], 0.5), lowest(arrives, 0.5))


@pytest.mark.method("P-09")
def test_the_control_of_the_penalty_cuts_once_at_its_last_step(model, batches):
    optimizer = stepped(model, batches[0])
    wanted = {name: lowest(score, 0.7) for name, score in iterative.adam_saliency(model, optimizer).items()}
    by_size = magnitude_masks(model, 0.7)
    cut = iterative.cut_by_adam(0.7, last=3)
    for step, held in ((1, False), (2, False), (3, True), (4, True)):
        cut(step, model, optimizer)
        assert bool(held_masks(model)) == held
    masks = held_masks(model)
    assert masks.keys() == wanted.keys() and all(torch.equal(masks[name], wanted[name]) for name in wanted)
    assert all(not torch.equal(masks[name], by_size[name]) for name in wanted)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        iterative.cut_by_adam(1.0, last=3)


@pytest.mark.method("P-09")
def test_the_penalty_ramps_and_then_rests():
    penalty = iterative.Penalty(0.6, ramp=12, every=4, epsilon=1e-2)
    generator = torch.Generator().manual_seed(0)
    w, rate = torch.randn(40, 25, generator=generator), torch.rand(40, 25, generator=generator) + 0.1
    found = [penalty.strength(step, w, rate) for step in (1, 5, 9, 13, 17)]
    expected = [iterative.proximal_strength(w, rate, target, steps, 1e-2)
                for target, steps in ((0.2, 4), (0.4, 4), (0.6, 4), (0.6, 1), (0.6, 1))]  # fmt: skip
    assert found == pytest.approx(expected) and found[0] < found[1] < found[2] < found[3]
    for bad in ({"sparsity": 1.0}, {"ramp": 0}, {"every": 0}, {"epsilon": 0.0}):
        with pytest.raises(ValueError, match=r"ramp >= 1|\[0, 1\)"):
            iterative.Penalty(**{"sparsity": 0.5, "ramp": 4, **bad})


@pytest.mark.method("P-09")
def test_the_hook_takes_the_proximal_step_at_adams_own_rate(model, batches):
    optimizer = stepped(model, batches[0])
    w = model.get_parameter(FIRST)
    before, rate = w.detach().clone(), 1e-3 / (w.grad.abs() + 1e-8)  # after one step v_hat is the squared gradient
    pulled = {}
    iterative.reweighted_proximal(iterative.Penalty(0.5, ramp=8, every=4, epsilon=1e-2), pulled)(1, model, optimizer)
    alphas = 1 / (before.abs() + 1e-2)
    gamma = iterative.percentile(before.abs() / (rate * alphas), 0.25).item() / 4
    expected = nn.functional.softshrink(before, 0.0).sign() * (before.abs() - rate * gamma * alphas).clamp(min=0)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(pulled[FIRST], expected - before, rtol=1e-3, atol=1e-6)


@pytest.mark.method("P-09")
def test_alphas_and_strength_are_renewed_on_schedule(model, batches):
    optimizer, w = stepped(model, batches[0]), model.get_parameter(FIRST)
    rate = iterative.adam_learning_rate(optimizer, w)
    hook = iterative.reweighted_proximal(iterative.Penalty(0.4, ramp=4, every=2), {})
    now = w.detach().clone()
    for step in (1, 2, 3, 4):
        if step in (1, 3):
            alphas = iterative.reweighted_alphas(now)
            gamma = iterative.proximal_strength(now, rate, 0.2 if step == 1 else 0.4, 2)
        now = iterative.soft_threshold(now, rate * gamma * alphas)
        hook(step, model, optimizer)
        torch.testing.assert_close(w.detach(), now, rtol=1e-5, atol=1e-8)
    assert (now == 0).float().mean().item() == pytest.approx(0.4, abs=2e-2)


@pytest.mark.method("P-09")
def test_the_proximal_steps_reach_the_target_in_every_matrix_while_training(model):
    with torch.no_grad():
        model.get_parameter(FIRST).mul_(10)  # one strength for all matrices would leave this one as it is
    penalty, pulled, zeros = iterative.Penalty(0.6, ramp=6, every=3), {}, {}
    hook = iterative.reweighted_proximal(penalty, pulled)

    def after_step(step, model, optimizer):
        hook(step, model, optimizer)
        zeros[step] = [(m.weight == 0).float().mean().item() for m in matrices(model)]

    fit(model, 12, after_step, learning_rate=1e-4)
    assert max(zeros[2]) < 0.45  # the target ramps
    for step in (6, 9, 12):  # and while it rests nothing drifts away
        assert zeros[step] == pytest.approx([0.6] * 12, abs=0.05)
    assert iterative.freeze_pattern(model, 0.6, pulled) == pytest.approx(0.6, abs=0.04)


@pytest.mark.method("P-09")
def test_a_penalty_of_nothing_changes_nothing(model):
    twin, pulled = copy.deepcopy(model), {}
    fit(model, 4)
    fit(twin, 4, iterative.reweighted_proximal(iterative.Penalty(0.0, ramp=2), pulled))
    torch.testing.assert_close(model.get_parameter(FIRST), twin.get_parameter(FIRST), rtol=0, atol=1e-5)


@pytest.mark.method("P-09")
def test_the_found_pattern_is_frozen_and_what_stays_gets_back_what_was_taken(model):
    before = {m.name: m.weight.detach().clone() for m in matrices(model)}
    optimizer, pulled = stepped(model, make_batches()[0], learning_rate=1e-9), {}  # the task moves nothing
    hook = iterative.reweighted_proximal(iterative.Penalty(0.5, ramp=1, every=1), pulled)
    hook(1, model, optimizer)
    shrunk = {m.name: m.weight.detach().clone() for m in matrices(model)}
    found = zero_share(model)
    assert found == pytest.approx(0.5, abs=5e-3)
    assert iterative.freeze_pattern(model, 0.7, pulled) == pytest.approx(found)
    masks = held_masks(model)
    for m in matrices(model):
        mask = masks[m.name]
        assert mask.float().mean().item() == pytest.approx(0.3, abs=1e-3)  # in every matrix
        assert torch.equal(mask, lowest(shrunk[m.name].abs(), 0.7)) and not (mask & (shrunk[m.name] == 0)).any()
        assert (shrunk[m.name][mask].abs() < before[m.name][mask].abs()).float().mean() > 0.99
        torch.testing.assert_close(m.weight.detach(), before[m.name] * mask, rtol=0, atol=1e-6)
    fit(model, 3)
    assert zero_share(model) == pytest.approx(0.7, abs=1e-3)


# --- P-10 DSD, P-11 grow and prune --------------------------------------------------------------------------------------


@pytest.mark.method("P-10")
def test_dense_sparse_dense(model):
    start = {}

    def sparse(model):
        fit(model, 3)
        assert zero_share(model) == pytest.approx(0.4, abs=1e-3)

    def dense(model):
        start.update({m.name: m.weight.detach().clone() for m in matrices(model)})
        fit(model, 3)

    expected = magnitude_masks(model, 0.4)
    masks = densify.dense_sparse_dense(model, 0.4, sparse, dense)
    assert not held_masks(model)
    for m in matrices(model):
        assert torch.equal(masks[m.name], expected[m.name])
        assert (start[m.name][~masks[m.name]] == 0).all()  # they restart from zero
        assert (m.weight[~masks[m.name]] != 0).float().mean() > 0.9  # and move
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        densify.dense_sparse_dense(model, 1.0, sparse, dense)


@pytest.mark.method("P-11")
def test_dense_gradients_see_through_the_mask(model, batches):
    groups = ("query", "ffn_in", "ffn_out", "classifier")
    masks = magnitude_masks(model, 0.7, groups)
    burnt = copy.deepcopy(model)
    apply_masks(burnt, masks)
    hold_masks(model, masks)
    gradients = densify.dense_gradients(model, batches, groups)
    loss = sum(cross_entropy(burnt, batch) for batch in batches) / len(batches)
    expected = torch.autograd.grad(loss, [m.weight for m in matrices(burnt, groups)])
    for name, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-7)
        assert (value[~masks[name]] != 0).any()


@pytest.mark.method("P-11")
def test_growth_and_pruning_rules():
    mask = torch.tensor([[True, True, False, False, False]])
    gradient = torch.tensor([[-5.0, 1.0, -4.0, 3.0, 2.0]])
    assert densify.grown_mask(mask, gradient, 0.6).tolist() == [[True, True, True, False, False]]  # the top two of five
    weight = torch.tensor([[0.5, -3.0, 2.0, 0.1, 0.0]])
    assert densify.pruned_mask(torch.ones(1, 5, dtype=torch.bool), weight, 0.4).tolist() == [[True, True, True, False, False]]
    assert densify.pruned_mask(mask, weight, 0.8).tolist() == [[False, True, False, False, False]]


@pytest.mark.method("P-11")
def test_woken_weights_start_at_zero_where_the_gradient_points(model, batches):
    hold_masks(model, magnitude_masks(model, 0.8))
    before, seed = dense_weight(matrices(model)[0]).detach().clone(), held_masks(model)[FIRST].clone()
    gradients = densify.dense_gradients(model, batches)
    woken = densify.grow(model, gradients, 0.9)[FIRST]
    after, mask = dense_weight(matrices(model)[0]).detach(), held_masks(model)[FIRST]
    g = gradients[FIRST]
    assert woken.any() and torch.equal(woken, ~seed & (g.abs() > iterative.percentile(g.abs(), 0.9)))
    assert torch.equal(mask, seed | woken)
    assert (after[woken] == 0).all() and torch.equal(after[~woken], before[~woken])


@pytest.mark.method("P-11")
def test_spared_weights_stay_and_the_smallest_old_ones_go_for_them():
    weight = torch.tensor([[0.5, 3.0, 0.0, 1.0, 2.0]])
    mask, spared = torch.ones(1, 5, dtype=torch.bool), torch.tensor([[False, False, True, False, False]])
    assert densify.pruned_mask(mask, weight, 0.4).tolist() == [[False, True, False, True, True]]
    assert densify.pruned_mask(mask, weight, 0.4, spared).tolist() == [[False, True, True, False, True]]


@pytest.mark.method("P-11")
def test_exchanged_is_the_share_of_old_connections_that_went():
    before = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True, True, False])}
    after = {"a": torch.tensor([True, True, True]), "b": torch.tensor([False, True, True])}
    assert densify.exchanged(before, after) == 0.25 and densify.exchanged(before, before) == 0


@pytest.mark.method("P-11")
def test_newborns_are_spared_once_and_compete_from_then_on(model):
    hold_masks(model, magnitude_masks(model, 0.8))
    scores = [{m.name: torch.zeros(m.weight.shape) for m in matrices(model)} for _ in range(2)]
    scores[0][FIRST][0], scores[1][FIRST][1] = 1.0, 1.0  # the first growth wakes row 0, the second row 1
    hook = densify.grow_and_prune(lambda model: scores.pop(0), 0.8, alpha=0.9, frequency=1, end=4)
    born = []
    for step in (1, 2, 3, 4):
        before = held_masks(model)[FIRST]
        hook(step, model, None)  # nothing trains, so a newborn stays at zero
        after = held_masks(model)[FIRST]
        if step % 2:
            born.append(after & ~before)
        else:
            assert born[-1].any() and (after & born[-1]).sum() == born[-1].sum()  # spared, although zero is the smallest
            assert after.float().mean().item() == pytest.approx(0.2, abs=1e-3)
    assert not (after & born[0]).any()  # the first ones, still zero, have lost


@pytest.mark.method("P-11")
def test_random_scores_are_drawn_anew_and_differ_by_seed(model):
    generator = torch.Generator().manual_seed(0)
    first, second = (densify.random_scores(model, generator)[FIRST] for _ in range(2))
    again = densify.random_scores(model, torch.Generator().manual_seed(0))[FIRST]
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert densify.random_scores(model, generator).keys() == {m.name for m in matrices(model)}


@pytest.mark.method("P-11")
@pytest.mark.parametrize("way", ["gradient", "lot"])
def test_grow_and_prune_exchanges_and_ends_at_the_target(model, batches, way):
    hold_masks(model, magnitude_masks(model, 0.8))
    seed = {name: mask.clone() for name, mask in held_masks(model).items()}
    score = (partial(densify.dense_gradients, batches=batches) if way == "gradient"
             else partial(densify.random_scores, generator=torch.Generator().manual_seed(0)))  # fmt: skip
    hook, shares = densify.grow_and_prune(score, 0.8, alpha=0.95, frequency=2, end=8), {}

    def after_step(step, model, optimizer):
        hook(step, model, optimizer)
        shares[step] = sparsity_of(held_masks(model))

    fit(model, 10, after_step, learning_rate=1e-5)  # far too little for a newborn to outgrow anything
    assert shares[1] == pytest.approx(0.8, abs=1e-3) and shares[2] < 0.79 and shares[6] < 0.79
    assert shares[4] == shares[8] == shares[10] == pytest.approx(0.8, abs=1e-3)
    assert densify.exchanged(seed, held_masks(model)) > 0.05


@pytest.mark.method("P-11")
def test_bad_growth(model, batches):
    score = partial(densify.dense_gradients, batches=batches)
    for changes, match in (({"end": 6}, "multiple of 2"), ({"alpha": 1.0}, "alpha must lie"), ({"sparsity": 1.0}, r"\[0, 1\)")):
        with pytest.raises(ValueError, match=match):
            densify.grow_and_prune(score, **{"sparsity": 0.5, "alpha": 0.9, "frequency": 2, "end": 4, **changes})
    with pytest.raises(ValueError, match="at least one is needed"):
        densify.dense_gradients(model, [])
    with pytest.raises(ValueError, match="sparse seed"):
        densify.grow_and_prune(score, 0.5, alpha=0.9, frequency=1, end=2)(1, model, None)


# --- the real training loop ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    rows = make_batches(count=1, size=32)[0]
    split = Split(None, [ids[mask.bool()].tolist() for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)],
                  rows["labels"])  # fmt: skip
    return Task("tiny", split, split, split, ["no", "yes"], SimpleNamespace(pad_token_id=0), "tiny")


@pytest.mark.method("P-05", "P-06", "P-07", "P-08", "P-09", "P-11")
@pytest.mark.parametrize("name", ["rounds", "narang", "agp", "zip", "rpp", "grow"])
def test_hooks_work_inside_the_training_loop(model, batches, task, name):
    if name == "grow":
        hold_masks(model, magnitude_masks(model, 0.5))
    pulled, zeroed = {}, []
    proximal = iterative.reweighted_proximal(iterative.Penalty(0.5, ramp=2, every=1), pulled)

    def rpp(step, model, optimizer):
        if step <= 4:
            proximal(step, model, optimizer)
        if step == 4:
            zeroed.append(iterative.freeze_pattern(model, 0.5, pulled))

    growth = partial(densify.dense_gradients, batches=batches)
    hooks = {
        "rounds": lambda: iterative.iterative_magnitude([0.25, 0.5], [1, 4]),
        "narang": lambda: iterative.narang_pruning(0.5, start=1, ramp=2, end=4, frequency=1),
        "agp": lambda: iterative.agp_pruning(0.5, start=1, end=4, frequency=1),
        "zip": lambda: iterative.transformers_zip_pruning(model, 0.1, 0.5, end=4, times=3),
        "rpp": lambda: rpp,
        "grow": lambda: densify.grow_and_prune(growth, 0.5, alpha=0.9, frequency=1, end=4),
    }
    start = model.bert.encoder.layer[0].output.dense.bias.detach().clone()
    log = train(model, task, profiles.get("smoke"), steps=6, hold=4, after_step=hooks[name]())
    assert zeroed == ([pytest.approx(0.5, abs=0.05)] if name == "rpp" else [])
    release_masks(model)
    assert np.isfinite(log.losses).all() and not torch.equal(start, model.bert.encoder.layer[0].output.dense.bias)
    assert zero_share(model) == pytest.approx(0.5, abs=2e-3)
