"""Word2Bits, scopes, Q-BERT and GOBO against their definitions, a full Hessian and SciPy."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from utils import artifacts, bert
from utils.bert import matrices
from utils.encodings import decode
from utils.quantization import transformer
from utils.quantization.codebook import StaticKMeans
from utils.quantization.quantizer import attach, detach
from utils.quantization.transformer import Gobo, GroupwiseQuantizer, Word2Bits
from utils.quantization.uniform import ActivationQuantizer, EvenQuantizer, UniformQuantizer, quantized_inputs
from utils.training import cross_entropy


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture
def weight():
    return torch.randn(48, 32) * 0.05


@pytest.fixture
def thumb():
    """A BERT small enough for its full Hessian: 2 layers, hidden 8; float64, since its top eigenvalues lie close together."""
    config = BertConfig(vocab_size=100, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
                        num_labels=2, initializer_range=0.5)  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


@pytest.mark.method("Q-28")
def test_word2bits_levels_and_borders_are_lams_times_the_tables_scale(weight):
    one, two = Word2Bits(weight, 1), Word2Bits(weight, 2)
    assert one.s.item() == pytest.approx(3 * weight.abs().mean().item(), rel=1e-5)  # least squares for two levels
    torch.testing.assert_close(one.quantize(weight), torch.where(weight < 0, -1.0, 1.0) * one.s / 3)
    two.s.fill_(1.0)
    x = torch.tensor([[-2.0, -0.6, -0.4, -0.1, 0.1, 0.4, 0.6, 2.0]])
    assert two.quantize(x).flatten().tolist() == [-0.75, -0.75, -0.25, -0.25, 0.25, 0.25, 0.75, 0.75]
    fitted = Word2Bits(weight, 2)

    def error(s):
        return (weight - s * (torch.floor(weight / s * 2).clamp(-2, 1) + 0.5) / 2).square().sum().item()

    best = min(error(s) for s in torch.linspace(0.02, 0.3, 2000).tolist())
    assert (weight - fitted.quantize(weight)).square().sum().item() == pytest.approx(best, rel=5e-3)


@pytest.mark.method("Q-28")
def test_the_embedding_table_learns_inside_a_fixed_grid(tiny, batch):
    attach(tiny, lambda m: Word2Bits(m.weight, 2), ("word_embeddings",))
    table = tiny.bert.embeddings.word_embeddings.parametrizations.weight
    scale, before = table[0].s.clone(), table.original.detach().clone()
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(4):
        cross_entropy(tiny, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    used = batch["input_ids"].unique()
    assert not torch.equal(table.original[used[used > 0]], before[used[used > 0]]) and torch.equal(table[0].s, scale)
    assert tiny.bert.embeddings.word_embeddings.weight.unique().numel() == 4
    assert detach(tiny)["bert.embeddings.word_embeddings.weight"].nbytes == 100 * 32 * 2 // 8 + 8


@pytest.mark.method("Q-29a", "Q-29b")
def test_scopes_differ_in_the_feed_forward_matrices_and_attention_follows_the_bits(tiny, batch):
    everything = {m.name for m in matrices(tiny, transformer.SCOPES["all layers"])}
    attention = {m.name for m in matrices(tiny, transformer.SCOPES["attention only"])}
    assert attention == {name for name in everything if ".attention." in name} and len(everything - attention) == 4
    for scope, groups in transformer.SCOPES.items():
        divergence = []
        for bits in (1, 2, 4):
            model = bert.fresh_copy(tiny)
            assert len(attach(model, lambda m, bits=bits: StaticKMeans(m.weight, bits), groups)) == len(matrices(tiny, groups)), (
                scope
            )
            divergence.append(transformer.attention_kl(tiny, model, batch).mean().item())
        assert divergence[0] > divergence[1] > divergence[2] > 0


@pytest.mark.method("Q-29a", "Q-29b")
def test_attention_divergence_is_scipys_and_ignores_padding(tiny, batch):
    from scipy.stats import entropy

    other = bert.fresh_copy(tiny)
    other.bert.encoder.layer[0].attention.self.key.weight.data *= 9
    P, Q = (transformer.attention_maps(model, batch).double().numpy() for model in (tiny, other))
    rows = [entropy(P[:, b, :, i], Q[:, b, :, i], axis=-1) for b in range(4) for i in range(9) if batch["attention_mask"][b, i]]
    found = transformer.attention_kl(tiny, other, batch)
    assert found.shape == (2, 4)
    np.testing.assert_allclose(found.numpy(), np.mean(rows, axis=0), atol=1e-6)
    assert transformer.attention_kl(tiny, tiny, batch).abs().max() == 0


@pytest.mark.method("Q-30")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_reach_from_one_range_per_tensor_to_one_per_neuron(weight, bits, symmetric):
    for groups, granularity in ((1, "tensor"), (48, "row"), (1000, "row")):
        found = GroupwiseQuantizer(bits, groups, "max", symmetric).quantize(weight)
        assert torch.equal(found, UniformQuantizer(bits, symmetric, granularity).quantize(weight))
        assert torch.equal(GroupwiseQuantizer(bits, groups).quantize(weight), EvenQuantizer(bits, granularity).quantize(weight))
    lo, hi = weight.amin(1), weight.amax(1)
    scale = (hi - lo) / (2**bits - 1)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, torch.round(-lo / scale).int(), 0, 0, 2**bits - 1)
    torch.testing.assert_close(GroupwiseQuantizer(bits, 48, "max").quantize(weight), expected, atol=1e-6, rtol=0)
    twelve = GroupwiseQuantizer(bits, 12, "max", symmetric)
    pieces = [UniformQuantizer(bits, symmetric).quantize(piece) for piece in weight.split(4)]
    torch.testing.assert_close(twelve.quantize(weight), torch.cat(pieces))
    assert twelve.encode(weight).nbytes == 48 * 32 * bits // 8 + 8 * 12


@pytest.mark.method("Q-30")
def test_the_number_of_groups_is_fitted_to_the_rows_and_finer_is_closer(weight):
    assert [transformer.divisor(rows, 128) for rows in (384, 768, 1536, 2, 30522)] == [128, 128, 128, 2, 6]
    w = torch.randn(256, 64) * torch.rand(256, 1)
    errors = [(w - GroupwiseQuantizer(4, groups).quantize(w)).square().sum().item() for groups in (1, 8, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    assert GroupwiseQuantizer(4).groups == 128  # the paper's


@pytest.mark.method("Q-30")
def test_the_default_grid_is_within_a_hundredth_of_the_least_error_of_all_grids(weight):
    def error(quantizer):
        return (weight - quantizer.quantize(weight)).square().sum().item()

    best = 0.0
    for group in weight.split(4):
        steps = group.abs().max() * torch.linspace(0.05, 1.2, 400)[:, None, None]
        tries = [(torch.round(group / steps + zero).clamp(0, 7) - zero) * steps for zero in (3.5, 3, 4)]
        best += min((group - found).square().sum((1, 2)).min().item() for found in tries)
    assert error(GroupwiseQuantizer(3, 12)) <= best * 1.01
    assert error(GroupwiseQuantizer(3, 12)) < 0.9 * error(GroupwiseQuantizer(3, 12, "max"))


@pytest.mark.method("Q-30")
def test_ranges_follow_the_weights_in_training(weight):
    quantizer = GroupwiseQuantizer(3, 12).train()
    quantizer.quantize(weight)
    grown = 1.3 * weight
    for _ in range(20):
        quantizer.quantize(grown)
    errors = [(grown - q.quantize(grown)).square().sum().item() for q in (quantizer.eval(), GroupwiseQuantizer(3, 12))]
    assert errors[0] < 1.1 * errors[1]


def full_hessian(model, batch, groups, layer):
    weights = [m.weight for m in matrices(model, groups) if m.layer == layer]
    with bert.attention(model, "eager"):
        gradients = torch.autograd.grad(cross_entropy64(model, batch), weights, create_graph=True)
        flat = torch.cat([g.flatten() for g in gradients])
        rows = [torch.cat([h.flatten() for h in torch.autograd.grad(g, weights, retain_graph=True)]) for g in flat]
    return torch.stack(rows)


def cross_entropy64(model, batch):
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(out, batch["labels"])


@pytest.mark.method("Q-31")
def test_power_iteration_finds_the_top_eigenvalue_of_the_full_hessian(thumb, batch):
    groups = ("query", "value", "ffn_in")
    slices = [{name: value[i : i + 2] for name, value in batch.items()} for i in (0, 2)]
    found = transformer.layer_eigenvalues(thumb, slices, groups, iterations=400, tolerance=1e-7)
    for i, part in enumerate(slices):
        for layer in (0, 1):
            values = torch.linalg.eigvalsh(full_hessian(thumb, part, groups, layer))
            top = values[values.abs().argmax()].item()
            assert found[layer][i] == pytest.approx(top, rel=1e-2)


@pytest.mark.method("Q-31")
def test_power_iteration_on_a_known_matrix_keeps_the_sign():
    for eigenvalues in ([3.0, 1.0, -2.0], [-3.0, 1.0, 2.0]):
        Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
        H = Q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.T
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        assert transformer.top_eigenvalue(0.5 * x @ H @ x, [x], 200, 1e-9) == pytest.approx(eigenvalues[0], rel=1e-4)


@pytest.mark.method("Q-31")
def test_slices_are_random_and_not_sorted_by_length(board):
    train, pad = board.task.train, board.task.tokenizer.pad_token_id
    slices = transformer.random_slices(train, 4, 16, pad)
    rows = [int(row) for batch in slices for row in batch["rows"]]
    assert len(set(rows)) == 64 and rows != sorted(rows) and all(batch["input_ids"].shape[0] == 16 for batch in slices)
    lengths = [batch["attention_mask"].sum(1).float() for batch in slices]
    spread = torch.tensor([len(ids) for ids in train.input_ids]).float().std()
    assert min(length.std().item() for length in lengths) > spread / 2  # batches sorted by length hardly vary inside
    assert [int(row) for batch in transformer.random_slices(train, 4, 16, pad, seed=1) for row in batch["rows"]] != rows
    with pytest.raises(ValueError, match="the split has"):
        transformer.random_slices(train, 50, 50, pad)


@pytest.mark.method("Q-31")
def test_the_control_of_an_allocation_has_its_bits_in_another_order():
    bits = {0: 4, 1: 4, 2: 4, 3: 2, 4: 2, 5: 2}
    others = [transformer.other_allocation(bits, seed) for seed in range(30)]
    assert all(sorted(other.values()) == [2, 2, 2, 4, 4, 4] and list(other) == list(bits) and other != bits for other in others)
    assert len({tuple(other.values()) for other in others}) > 5
    assert transformer.other_allocation({0: 3, 1: 3}, 0) == {0: 3, 1: 3}


@pytest.mark.method("Q-31")
def test_bits_go_to_the_most_sensitive_layers_within_the_average(tiny):
    assert transformer.sensitivity([1.0, -3.0, 5.0]) == pytest.approx(1 + np.std([1, -3, 5]))
    assert transformer.sensitivity([-4.0]) == 4
    omega, sizes = {0: 5.0, 1: 1.0, 2: 9.0, 3: 2.0}, dict.fromkeys(range(4), 100)
    for average, high in ((2, []), (2.3, [2]), (2.5, [2, 0]), (2.75, [2, 0, 3]), (3, [0, 1, 2, 3])):
        bits = transformer.allocate_bits(omega, sizes, average)
        assert sorted(bits) == [0, 1, 2, 3] and {layer for layer, b in bits.items() if b == 3} == set(high)
    sizes = transformer.layer_sizes(tiny)
    assert sizes == dict.fromkeys((0, 1), 4 * 32 * 32 + 2 * 32 * 64)
    chosen = transformer.allocate_bits({0: 1.0, 1: 2.0}, sizes, 2.5)
    attach(tiny, lambda m: GroupwiseQuantizer(chosen[m.layer], 8))
    stored = detach(tiny)
    assert {name.split(".")[3]: item.meta["bits"] for name, item in stored.items()} == {"0": 2, "1": 3}
    packed = sum(item.parts["codes"].nbytes for item in stored.values())
    assert packed * 8 / sum(sizes.values()) == 2.5


@pytest.mark.method("Q-30", "Q-31")
def test_gobo_keeps_unlikely_weights_exactly_and_clusters_the_rest():
    from scipy.stats import norm

    w = torch.cat([torch.randn(4000) * 0.04, torch.tensor([0.5, -0.9, 0.3])]).view(1, -1)
    quantizer = Gobo(w, 3)
    unlikely = norm.logpdf(w.numpy(), w.numpy().mean(), w.numpy().std()) < -4
    assert np.array_equal(quantizer.outliers(w).numpy(), unlikely) and unlikely[0, -3:].all()
    quantized = transformer.gobo(w, 3)
    assert torch.equal(quantized[torch.from_numpy(unlikely)], w[torch.from_numpy(unlikely)])
    rest = torch.from_numpy(~unlikely)
    assert quantized[rest].unique().numel() == 8
    nearest = (w[rest].unsqueeze(1) - quantizer.centroids).abs().amin(1)
    torch.testing.assert_close((w - quantized)[rest].abs(), nearest)
    minmax = UniformQuantizer(3, False).quantize(w)
    assert (w - quantized).square().sum() < 0.1 * (w - minmax).square().sum()
    assert quantizer.encode(w).nbytes == math.ceil(4003 * 3 / 8) + 4 * 8 + 8 * unlikely.sum()
    assert not Gobo(w, 3, -math.inf).outliers(w).any()


@pytest.mark.method("Q-30", "Q-31")
def test_gobo_starts_from_equal_bins_and_stops_at_the_least_absolute_error():
    x = torch.randn(800).sort().values
    centroids = torch.stack([part.mean() for part in x.view(8, 100)])
    torch.testing.assert_close(transformer.gobo_centroids(x, 8, iterations=1), centroids)
    trail = []
    for _ in range(60):
        index = (x.unsqueeze(1) - centroids).abs().argmin(1)
        trail.append((x - centroids[index]).abs().sum().item())
        centroids = torch.stack([x[index == i].mean() for i in range(8)])
    stop = next(i for i, (a, b) in enumerate(itertools.pairwise(trail)) if b >= a)
    found = transformer.gobo_centroids(x, 8)
    error = (x.unsqueeze(1) - found).abs().amin(1).sum().item()
    assert error == pytest.approx(trail[min(stop, 49)], rel=1e-5)


ALL = {
    **{f"word2bits-{b}": functools.partial(Word2Bits, bits=b) for b in (1, 2)},
    **{f"groups-{b}-{g}-{c}-{s}": lambda w, b=b, g=g, c=c, s=s: GroupwiseQuantizer(b, g, c, s)
       for b in (1, 2, 8) for g in (1, 12, 48) for c, s in (("even", False), ("max", True), ("max", False))},
    **{f"gobo-{b}": functools.partial(Gobo, bits=b) for b in (1, 3, 8)},
}  # fmt: skip


@pytest.mark.method("Q-28", "Q-30")
@pytest.mark.parametrize("name", ALL)
def test_what_is_stored_decodes_to_what_is_computed(weight, name):
    for w in (weight, torch.zeros(48, 32), torch.full((48, 32), -0.3), weight.bfloat16()):
        quantizer = ALL[name](w)
        quantized = quantizer.quantize(w)
        assert torch.isfinite(quantized).all() and quantized.dtype == w.dtype
        torch.testing.assert_close(decode(quantizer.encode(w)).to(w.dtype), quantized, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="finite"):
        broken = torch.full((48, 32), math.nan)
        ALL[name](broken).quantize(broken)


@pytest.mark.method("Q-28", "Q-30", "Q-31")
def test_impossible_settings_are_refused(tiny, batch, weight):
    for make, match in (
        (lambda: Word2Bits(weight, 3), "1 or 2"),
        (lambda: GroupwiseQuantizer(0), "1 to 8"),
        (lambda: GroupwiseQuantizer(2, 0), "groups must be 1 or more"),
        (lambda: Gobo(weight, 9), "1 to 8"),
        (lambda: Gobo(torch.rand(2, 3), 3), "8 centroids need as many"),
        (lambda: transformer.layer_eigenvalues(tiny, []), "no calibration batches"),
        (lambda: transformer.layer_eigenvalues(tiny, [batch], ("classifier",)), "query"),
        (lambda: transformer.allocate_bits({0: 1.0}, {0: 1}, 4), "2 to 3"),
        (lambda: transformer.allocate_bits({0: 1.0}, {0: 1}, 9, high=9), "1 to 8"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.mark.method("Q-16", "Q-30")
def test_weights_only_and_activations_only_are_one_line_each(tiny, batch):
    plain = logits(tiny, batch)
    model = bert.fresh_copy(tiny)
    attach(model, lambda m: UniformQuantizer(4))
    weights_only = (logits(model, batch) - plain).abs().max()
    with quantized_inputs(tiny, lambda: ActivationQuantizer(4)):
        activations_only = (logits(tiny, batch) - plain).abs().max()
    assert weights_only > 0 and activations_only > 0


@pytest.mark.method("Q-30")
def test_files_hold_the_measured_model(tiny, batch, tmp_path):
    attach(tiny, lambda m: Word2Bits(m.weight, 2), ("word_embeddings",))
    attach(tiny, lambda m: Gobo(m.weight, 3) if m.layer else GroupwiseQuantizer(3, 8))
    before = logits(tiny, batch)
    artifacts.save(tiny, tmp_path / "model", detach(tiny))
    torch.testing.assert_close(logits(artifacts.load(tmp_path / "model"), batch), before, atol=1e-5, rtol=0)
