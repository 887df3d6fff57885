"""Shared weight matrices: brute force, scipy and xxhash on the same numbers, and the contract of every part."""

import itertools
import struct

import fresh
import numpy as np
import pytest
import scipy.linalg
import torch
import xxhash
from scipy.spatial.transform import Rotation
from small_task import task_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils import artifacts, bert, contract, costs, parts, profiles, replacing, training
from utils.parts import shared
from utils.parts.attention import quaternion_attention
from utils.parts.linear import LowRankLinear
from utils.sharing import weights

INPUTS = ("input_ids", "attention_mask")
FIRST = "bert.encoder.layer.0.intermediate.dense"
TABLE = "bert.embeddings.word_embeddings"


@pytest.fixture
def tiny(tiny):
    """With biases that are not all 0, so that a lost one shows."""
    for name, parameter in tiny.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return tiny


def inputs(batch: dict) -> dict:
    return {name: batch[name] for name in INPUTS}


def changed(change, *args, **options):
    """A change in place that gives back the model."""

    def make(model):
        change(model, *args, **options)
        return model

    return make


def with_hashed_table(model):
    model.set_submodule(TABLE, weights.hashed_vectors(weights_of(model, TABLE), 300, seed=5))
    return model


def weights_of(model, path: str) -> torch.Tensor:
    return model.get_submodule(path).weight.detach().clone()


def quaternions(model):
    weights.quaternion_attention(model)
    weights.quaternion_layers(model)
    return model


MADE = {
    "random": changed(weights.share_randomly, ratio=4),
    "hashed": changed(weights.hash_weights, ratio=8),
    "hashed table": with_hashed_table,
    "toeplitz": changed(weights.toeplitz_like, ("query", "ffn_in", "ffn_out"), rank=3),
    "toeplitz, composed": changed(weights.toeplitz_like, ("query", "ffn_in", "ffn_out"), rank=3, by_fft=False),
    "quaternions": quaternions,
    "factors of layers": changed(weights.share_factors, rank=5),
    "factors of states": changed(weights.share_factors, ("query", "key", "value", "ffn_in"), rank=5, across="states"),
}
IDS = ("S-05", "S-06", "S-07", "S-08", "S-09")


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.method(*IDS)
def test_every_shared_model_comes_back_in_a_fresh_process(tiny, tmp_path):
    for name, make in MADE.items():
        model = make(bert.fresh_copy(tiny)).eval()
        path = tmp_path / f"{name}.safetensors"
        artifacts.save(model, path, weights.packed_index(model))
        contract.write(path, model, 7)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_closed_form_equals_the_counter(name, tiny):
    model = MADE[name](tiny).eval()
    once = sum(part.macs(0) for part in parts.find(model).values())  # of weights: the sequences of a batch share it
    assert (once > 0) == name.startswith("toeplitz")
    for length, batch in ((1, 1), (9, 1), (4, 3)):
        assert costs.measured_macs(model, length, batch) == costs.macs(model, length, batch) - (batch - 1) * once


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_padding_changes_nothing_and_expansion_is_exact(name, tiny, batch):
    model = MADE[name](tiny).eval()
    alone = {key: batch[key][2:3, :5] for key in INPUTS}
    expected = model(**inputs(batch)).logits
    torch.testing.assert_close(expected[2:3], model(**alone).logits, atol=1e-5, rtol=1e-4)
    plain = replacing.expand(model)
    torch.testing.assert_close(plain(**inputs(batch)).logits, expected, atol=1e-5, rtol=1e-4)
    assert not parts.find(plain)


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_training_changes_what_is_stored(name, tiny, batch):
    model = MADE[name](tiny)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    log = training.train(model, task_of(batch), profiles.get("smoke"), steps=2, learning_rate=1e-2, train_embeddings=True)
    own = {f"{path}.{key}" for path, part in parts.find(model).items() for key, _ in part.named_parameters()}
    assert own and np.isfinite(log.losses).all()
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in own)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key.endswith("index"))


def test_a_refused_change_leaves_the_model_as_it_was(tiny):
    before = bert.fingerprint(tiny)
    with pytest.raises(ValueError, match="4 must divide"):  # the classifier has two outputs
        weights.quaternion_layers(tiny, ("query", "classifier"))
    with pytest.raises(ValueError, match="not linear layers"):
        weights.hash_weights(tiny, ("word_embeddings",))
    with pytest.raises(ValueError, match=r"a rank in 1..32, got 33"):
        weights.share_factors(tiny, ("query", "ffn_in"), rank=33)
    assert bert.fingerprint(tiny) == before and not parts.find(tiny)


def test_kept_and_buckets_by_hand():
    assert replacing.kept(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(9 / 25)
    assert replacing.kept(torch.ones(2), torch.zeros(2)) == 0 and replacing.kept(torch.ones(2), torch.full((2,), 3.0)) == -3
    assert (weights.buckets_for(100, 8), weights.buckets_for(3, 8), weights.buckets_for(7, 1)) == (12, 1, 7)
    with pytest.raises(ValueError, match="1 or more"):
        weights.buckets_for(100, 0.5)


@pytest.mark.parametrize("kind", [shared.HashedLinear, shared.RandomlySharedLinear])
@pytest.mark.parametrize("buckets", [0, 13])
def test_buckets_that_are_none(kind, buckets):
    with pytest.raises(ValueError, match=f"between 1 and 12 values, got {buckets} buckets"):
        kind(4, 3, buckets)


# --- S-05 random sharing --------------------------------------------------------------------------------------------


@pytest.mark.method("S-05")
def test_random_sharing_is_the_nearest_with_its_index(tiny):
    W = weights_of(tiny, FIRST)
    found = weights.share_randomly(tiny, ("ffn_in",), ratio=8, seed=3)
    part = tiny.get_submodule(FIRST)
    chosen = np.eye(len(part.values))[part.index.flatten().numpy()]  # a row per weight: least squares by a library
    expected = np.linalg.lstsq(chosen, W.flatten().double().numpy(), rcond=None)[0]
    torch.testing.assert_close(part.values, torch.from_numpy(expected).float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(part.weight, part.values[part.index.long()])
    assert found[f"{FIRST}.weight"] == pytest.approx(1 - ((W - part.weight) ** 2).sum().item() / (W**2).sum().item(), rel=1e-4)
    other = tiny.get_submodule("bert.encoder.layer.1.intermediate.dense")
    assert len(part.values) == W.numel() // 8 and not torch.equal(part.index, other.index)
    again = shared.RandomlySharedLinear(4, 3, 2)
    again.weight.backward(gradient=torch.arange(12.0).view(3, 4))
    assert again.values.grad.tolist() == [66, 0]  # the sum over a bucket


@pytest.mark.method("S-05")
def test_the_index_costs_what_sharing_saves(tiny, tmp_path):
    dense = artifacts.save(tiny, tmp_path / "dense")["stored_bytes"]
    hashed = bert.fresh_copy(tiny)
    weights.hash_weights(hashed, ratio=8)
    weights.share_randomly(tiny, ratio=8)
    packed = weights.packed_index(tiny)
    numbers = 4 * 32 * 64  # four matrices of 32 * 64, 256 values each: 8 bits to name one
    sizes = {name: artifacts.save(model, tmp_path / name, given)["stored_bytes"]
             for name, model, given in (("plain", tiny, {}), ("packed", tiny, packed), ("hashed", hashed, {}))}  # fmt: skip
    assert sum(item.nbytes for item in packed.values()) == numbers + 4 * 4 * 256  # and four code books of their own numbers
    assert sizes["plain"] > dense > sizes["packed"] > sizes["hashed"]
    assert dense - sizes["hashed"] == pytest.approx(4 * (numbers - numbers // 8), abs=1000)  # but for what the header says
    again = artifacts.load(tmp_path / "packed").get_submodule(FIRST)
    assert torch.equal(again.index, tiny.get_submodule(FIRST).index) and again.index.dtype == torch.int32


# --- S-06 HashedNets ------------------------------------------------------------------------------------------------


def xx(row: int, column: int, seed: int) -> int:
    return xxhash.xxh32(struct.pack("<II", row, column), seed=seed % 2**32).intdigest()


@pytest.mark.method("S-06")
@pytest.mark.parametrize("seed", [0, 1, 17, 2**31 + 5])
def test_the_hash_is_xxhash(seed):
    rows, columns = torch.tensor([0, 1, 5, 30521, 2**31, 2**32 - 1]), torch.tensor([0, 1, 383, 2**32 - 1])
    found = shared.xxh32(rows[:, None], columns, seed)
    assert found.tolist() == [[xx(row, column, seed) for column in columns.tolist()] for row in rows.tolist()]
    assert found.dtype == torch.int64


@pytest.mark.method("S-06")
def test_a_hashed_matrix_and_its_gradient_by_loops():
    part, upstream = shared.HashedLinear(7, 5, 6, seed=11), torch.randn(5, 7)
    nn.init.normal_(part.bias)
    part.weight.backward(gradient=upstream)
    expected, gradient = torch.zeros(5, 7), torch.zeros(6)
    for i, j in itertools.product(range(5), range(7)):
        bucket, sign = xx(i, j, 11) % 6, -1 if xx(i, j, ~11) % 2 else 1
        expected[i, j] = sign * part.values[bucket]
        gradient[bucket] += sign * upstream[i, j]
    torch.testing.assert_close(part.weight, expected)
    torch.testing.assert_close(part.values.grad, gradient)
    x = torch.randn(3, 2, 7)
    torch.testing.assert_close(part(x), x @ expected.T + part.bias)


@pytest.mark.method("S-06")
def test_the_start_is_least_squares(tiny):
    W = weights_of(tiny, FIRST)
    found = weights.hash_weights(tiny, ("ffn_in",), ratio=8, seed=2)
    part = tiny.get_submodule(FIRST)
    basis = torch.stack([shared.signed_values(one, part.place).flatten() for one in torch.eye(len(part.values))], 1)
    expected = np.linalg.lstsq(basis.double().numpy(), W.flatten().double().numpy(), rcond=None)[0]
    torch.testing.assert_close(part.values.detach().double(), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)
    assert found[f"{FIRST}.weight"] == pytest.approx(replacing.kept(W, part.weight), rel=1e-5)
    seeds = {module.seed for module in tiny.modules() if isinstance(module, shared.HashedLinear)}
    assert seeds == {2, 3} and part.options() == {"in_features": 32, "out_features": 64, "bias": True, "buckets": 256, "seed": 2}
    assert set(part.state_dict()) == {"values", "bias"}  # no index is stored


@pytest.mark.method("S-05", "S-06")
def test_a_hash_keeps_what_chance_keeps():
    """(1 - exp(-ratio)) / ratio on average over hashes, for any matrix: no two weights of a bucket help each other."""
    W, shares = torch.randn(40, 50) + 1, []  # a mean that is not 0: random sharing without signs keeps it
    for seed in range(40):
        place = shared.signed_buckets(torch.arange(40)[:, None], torch.arange(50), 250, seed)
        shares.append(replacing.kept(W, shared.signed_values(weights.hashed_means(W, place, 250), place)))
    assert np.mean(shares) == pytest.approx((1 - np.exp(-8)) / 8, abs=4 * np.std(shares) / 40**0.5)
    unsigned = weights.bucket_means(W, place % 250, 250)
    assert replacing.kept(W, unsigned[place % 250]) > 0.5
    counts = torch.bincount((place % 250).flatten(), minlength=250).double()
    assert ((counts - 8) ** 2 / 8).sum().item() == pytest.approx(250, abs=4 * 500**0.5)  # chi squared: buckets are filled evenly
    assert (place >= 250).double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.method("S-06")
def test_hashed_vectors_by_loops_and_in_both_modes():
    table = torch.randn(30, 6)
    vectors = weights.hashed_vectors(table, 20, seed=4)
    place = vectors.places(torch.arange(30))
    for word, size in itertools.product((0, 13, 29), (0, 5)):
        assert place[word, size] == xx(word, size, 4) % 20 + 20 * (xx(word, size, ~4) % 2)
    torch.testing.assert_close(vectors.values.detach(), weights.hashed_means(table, place, 20))
    ids = torch.tensor([[3, 3, 29], [0, 13, 3]])
    found = {mode: vectors.train(mode)(ids) for mode in (True, False)}
    torch.testing.assert_close(found[True], found[False])
    torch.testing.assert_close(found[False], vectors.weight[ids])
    torch.testing.assert_close(vectors.expanded().weight, vectors.weight)
    assert set(vectors.state_dict()) == {"values"}
    with pytest.raises(ValueError, match="between 1 and 180 values, got 0"):
        weights.hashed_vectors(table, 0)


@pytest.mark.method("S-06")
def test_hashed_values_by_counts_are_weighted_means_and_err_least_for_what_is_read():
    table, counts = torch.randn(30, 6), torch.arange(30.0) ** 2 + 1
    vectors, even = weights.hashed_vectors(table, 20, seed=4, weights=counts), weights.hashed_vectors(table, 20, seed=4)
    place = vectors.places(torch.arange(30))
    sign = torch.where(place < 20, 1.0, -1.0)
    for bucket in (0, 7, 19):
        who = place % 20 == bucket
        often = counts[:, None].expand(30, 6)[who]
        assert vectors.values[bucket].item() == pytest.approx(
            ((sign * table)[who] @ often / often.sum()).item(), rel=1e-4, abs=1e-6
        )

    def error(part, often: torch.Tensor) -> float:
        return ((part.weight - table).square().sum(1) @ often).item()

    assert error(vectors, counts) < error(even, counts) and error(even, torch.ones(30)) < error(vectors, torch.ones(30))
    torch.testing.assert_close(weights.hashed_vectors(table, 20, seed=4, weights=torch.full((30,), 3.0)).values, even.values)
    empty = weights.bucket_means(table[:1], torch.zeros(1, 6).long(), 2, torch.full((1, 1), 2.0))
    assert empty[1] == 0 and empty[0].item() == pytest.approx(table[0].mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="above 0"):
        weights.hashed_vectors(table, 20, weights=torch.zeros(30))


# --- S-07 Toeplitz-like matrices ------------------------------------------------------------------------------------


def shift(n: int, f: float) -> torch.Tensor:
    Z = torch.diag(torch.ones(n - 1), -1)
    Z[0, -1] = f
    return Z


def powers(v: torch.Tensor, f: float) -> torch.Tensor:
    """Z_f(v): the columns v, Z_f v, Z_f^2 v, ..."""
    columns = [v]
    for _ in range(len(v) - 1):
        columns.append(shift(len(v), f) @ columns[-1])
    return torch.stack(columns, 1)


@pytest.mark.method("S-07")
@pytest.mark.parametrize(("n", "rank"), [(2, 1), (8, 1), (12, 3), (12, 12)])
def test_product_and_matrix_are_circulant_times_skew_circulant(n, rank):
    g, h, x = torch.randn(rank, n), torch.randn(rank, n), torch.randn(70, n)  # more tokens than fit in one go
    expected = sum(powers(a, 1.0) @ powers(b.flip(0), -1.0) for a, b in zip(g, h, strict=True)) / 2
    torch.testing.assert_close(shared.toeplitz_matrix(g, h), expected, atol=1e-4, rtol=1e-4)
    found = shared.toeplitz_product(g[None, None], h[None, None], x[:, None])[:, 0]
    torch.testing.assert_close(found, x @ expected.T, atol=1e-3, rtol=1e-4)
    Q = (g.T @ h).double().numpy()
    solved = scipy.linalg.solve_sylvester(shift(n, 1.0).double().numpy(), -shift(n, -1.0).double().numpy(), Q)
    torch.testing.assert_close(expected.double(), torch.from_numpy(solved), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights.displacement(expected), g.T @ h, atol=1e-4, rtol=1e-4)
    assert weights.displacement_rank(expected) == rank


@pytest.mark.method("S-07")
def test_displacement_rank_of_known_matrices():
    T = torch.from_numpy(scipy.linalg.toeplitz(torch.randn(16), torch.randn(16))).double()
    W = torch.randn(16, 16)
    torch.testing.assert_close(weights.displacement(W), shift(16, 1.0) @ W - W @ shift(16, -1.0))
    assert weights.displacement_rank(T) == weights.displacement_rank(torch.linalg.inv(T)) == 2
    assert weights.displacement_rank(torch.randn(16, 3) @ torch.randn(3, 16)) == 6
    assert weights.displacement_rank(W) == 16 and weights.displacement_rank(powers(torch.randn(16), 1.0)) == 1


@pytest.mark.method("S-07")
def test_each_half_of_a_sweep_is_least_squares():
    target, factor = torch.randn(5, 5, dtype=torch.complex128), torch.randn(5, 2, dtype=torch.complex128)
    entries = torch.randn(5, 5, dtype=torch.complex128)
    found = weights.solve_rows(target, entries, factor)
    for i in range(5):
        expected = np.linalg.lstsq((entries[i][:, None] * factor).numpy(), target[i].numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[i], expected, rtol=1e-6)
    g, h = torch.randn(3, 4, 10, dtype=torch.float64), torch.randn(3, 4, 10, dtype=torch.float64)
    again = weights.real_factors(*weights.eigen_factors(g, h))
    torch.testing.assert_close(again[0].transpose(1, 2) @ again[1], g.transpose(1, 2) @ h)
    torch.testing.assert_close(again[0].norm(dim=-1), again[1].norm(dim=-1))


@pytest.mark.method("S-07")
def test_the_fit_never_grows_and_beats_half_the_rank():
    W = torch.randn(2, 24, 24)
    singular = torch.linalg.svdvals(W).square()
    for rank in (2, 4):
        g, h, errors = weights.fit_toeplitz(W, rank, 6)
        half = (singular[:, rank // 2 :].sum() / singular.sum()).item()
        assert errors[0] == pytest.approx(half, rel=1e-4)  # the nearest matrix of half the rank, Eckart and Young
        assert all(after < before - 1e-6 for before, after in itertools.pairwise(errors)) and errors[-1] < half - 0.02
        assert 1 - replacing.kept(W, shared.toeplitz_matrix(g, h)) == pytest.approx(errors[-1], rel=1e-5)
        far = shared.toeplitz_matrix(*weights.displacement_start(W, rank))
        assert replacing.kept(W, far) < -1  # the displacement's SVD alone would be worse than zeros
    assert weights.fit_toeplitz(W, 24, 1)[2][-1] < 1e-6  # every matrix has a displacement of rank n
    T = torch.from_numpy(scipy.linalg.toeplitz(torch.randn(24), torch.randn(24)))
    assert weights.fit_toeplitz(torch.linalg.inv(T), 2, 1)[2][-1] < 1e-6
    assert weights.fit_toeplitz(W, 3, 2)[0].shape == (2, 3, 24)


@pytest.mark.method("S-07")
def test_blocks_of_a_wide_and_of_a_high_matrix(tiny):
    dense = {path: weights_of(tiny, path) for path in (FIRST, "bert.encoder.layer.0.output.dense")}
    found = weights.toeplitz_like(tiny, rank=16, sweeps=3)
    for path, W in dense.items():
        part = tiny.get_submodule(path)
        blocks = part.g.shape[:2]
        assert blocks == (W.shape[0] // 32, W.shape[1] // 32)
        for row, column in itertools.product(*map(range, blocks)):
            expected = shared.toeplitz_matrix(part.g[row, column], part.h[row, column])
            piece = slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32)
            torch.testing.assert_close(part.weight[piece], expected)
            assert replacing.kept(W[piece], expected) > 0.5
        assert found[f"{path}.weight"] == pytest.approx(replacing.kept(W, part.weight), rel=1e-5)
        assert sum(p.numel() for p in (part.g, part.h)) == 2 * 16 * W.numel() // 32


@pytest.mark.method("S-07")
def test_all_ways_of_multiplying_agree_and_so_do_their_gradients():
    part, x = shared.ToeplitzLinear(24, 16, 3), torch.randn(2, 5, 24)  # blocks of 8: two rows, three columns
    nn.init.normal_(part.bias)
    found, gradients = [], []
    for training_mode, by_fft in ((True, True), (False, True), (False, False)):
        part.by_fft = by_fft
        y = part.train(training_mode)(x)
        found.append(y)
        gradients.append(torch.autograd.grad(y.square().sum(), [part.g, part.h]))
        assert parts.build(part.kind, part.options()).options() == part.options() and part.options()["by_fft"] is by_fft
    for y, gradient in zip(found[1:], gradients[1:], strict=True):
        torch.testing.assert_close(y, found[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gradient, gradients[0], atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        halves = [part.train(mode)(x.bfloat16()) for mode in (True, False)]
    part.by_fft = True
    with torch.autocast("cpu", torch.bfloat16):
        halves.append(part(x.bfloat16()))
    for y in halves:
        torch.testing.assert_close(y.float(), found[0], atol=0.05, rtol=0.05)
    for wrong in ({"rank": 0}, {"rank": 9}):
        with pytest.raises(ValueError, match=r"size 8: it must be even, and the rank in 1..8"):
            shared.ToeplitzLinear(24, 16, **wrong)
    with pytest.raises(ValueError, match="it must be even"):
        shared.ToeplitzLinear(27, 9, 1)


@pytest.mark.method("S-07")
def test_the_counter_sees_fourier_transforms_as_they_are_customarily_counted():
    mapping = dict.fromkeys((torch.ops.aten._fft_r2c, torch.ops.aten._fft_c2c, torch.ops.aten._fft_c2r), costs.transform_flops)

    def flops(run) -> int:
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            run()
        return counter.get_total_flops()

    x = torch.randn(3, 5, 16)
    assert flops(lambda: torch.fft.fft(x + 0j)) == flops(lambda: torch.fft.ifft(x + 0j)) == 15 * 5 * 16 * 4
    assert flops(lambda: torch.fft.rfft(x)) == flops(lambda: torch.fft.irfft(torch.randn(15, 9) + 0j)) == 15 * 5 * 16 * 4 // 2
    assert flops(lambda: torch.fft.fft(torch.randn(16, 7) + 0j, dim=0)) == 7 * 5 * 16 * 4
    assert flops(lambda: torch.fft.fft2(torch.randn(8, 16) + 0j)) == 5 * 128 * 7
    assert shared.fft_macs(16) == 160 and shared.fft_macs(16, real=True) == 80 and shared.fft_macs(1) == 0


# --- S-08 quaternions -----------------------------------------------------------------------------------------------

TABLE_OF_HAMILTON = {(0, 0): (0, 1), (1, 1): (0, -1), (2, 2): (0, -1), (3, 3): (0, -1), (1, 2): (3, 1), (2, 1): (3, -1),
                     (2, 3): (1, 1), (3, 2): (1, -1), (3, 1): (2, 1), (1, 3): (2, -1)}  # ij = k, jk = i, ki = j  # fmt: skip
TABLE_OF_HAMILTON |= {pair: (max(pair), 1) for a in (1, 2, 3) for pair in ((0, a), (a, 0))}


@pytest.mark.method("S-08")
def test_the_matrix_is_the_hamilton_product():
    part, x = shared.QuaternionLinear(12, 8), torch.randn(5, 12)
    nn.init.normal_(part.bias)
    expected = torch.zeros(5, 4, 2)
    for (a, b), (c, sign) in TABLE_OF_HAMILTON.items():
        expected[:, c] += sign * x.view(5, 4, 3)[:, b] @ part.components[a].T
    torch.testing.assert_close(part(x), expected.reshape(5, 8) + part.bias)
    first, second = Rotation.random(rng=0), Rotation.random(rng=1)  # scipy writes the real component last
    unit = [torch.from_numpy(np.roll(rotation.as_quat(), 1)) for rotation in (first, second)]
    product = shared.hamilton_matrix(unit[0].view(4, 1, 1)) @ unit[1]
    np.testing.assert_allclose(np.roll((first * second).as_quat(), 1), product, atol=1e-12)
    with pytest.raises(ValueError, match="4 must divide 10 inputs and 8 outputs"):
        shared.QuaternionLinear(10, 8)
    with pytest.raises(ValueError, match="4 must divide both widths"):
        weights.fold_quaternion(torch.zeros(6, 8))


@pytest.mark.method("S-08")
def test_the_mean_of_four_blocks_is_least_squares(tiny):
    W = weights_of(tiny, FIRST)
    found = weights.quaternion_layers(tiny, ("ffn_in",))
    part = tiny.get_submodule(FIRST)
    basis = torch.stack([shared.hamilton_matrix(one.view(4, 16, 8)).flatten() for one in torch.eye(512)], 1)
    expected = np.linalg.lstsq(basis.numpy(), W.flatten().numpy(), rcond=None)[0]
    np.testing.assert_allclose(part.components.detach().flatten(), expected, atol=1e-5)
    assert found[f"{FIRST}.weight"] == pytest.approx(0.25, abs=0.05)  # random weights: a quarter of the directions
    torch.testing.assert_close(weights.fold_quaternion(part.weight), part.components)  # what is a quaternion matrix stays
    assert part.weight.numel() == 4 * part.components.numel()


@pytest.mark.method("S-08")
def test_quaternion_attention_by_the_table_of_products(batch):
    q, k, v = torch.randn(3, 4, 2, 9, 8)
    real = batch["attention_mask"].bool()
    scores = torch.zeros(4, 2, 4, 9, 9)
    for (a, b), (c, sign) in TABLE_OF_HAMILTON.items():
        scores[:, :, c] += sign * q.chunk(4, -1)[a] @ k.chunk(4, -1)[b].transpose(-1, -2) / 8**0.5
    maps = scores.masked_fill(~real[:, None, None, None], -torch.inf).softmax(-1)
    expected = torch.cat([maps[:, :, c] @ v.chunk(4, -1)[c] for c in range(4)], -1).transpose(1, 2)
    torch.testing.assert_close(quaternion_attention(None, q, k, v, batch["attention_mask"])[0], expected)
    torch.testing.assert_close(quaternion_attention(None, q[:1], k[:1], v[:1], None)[0], expected[:1])
    with pytest.raises(ValueError, match="head size that 4 divides, got 6"):
        quaternion_attention(None, q[..., :6], k[..., :6], v[..., :6], None)


@pytest.mark.method("S-08")
def test_conjugated_keys_keep_the_map_that_the_model_knows(tiny, batch):
    layer = tiny.bert.encoder.layer[0].attention.self
    hidden, heard = torch.randn(4, 9, 32), {}
    with torch.no_grad():
        layer.query.weight.mul_(20)
    mask = torch.zeros(4, 1, 1, 9).masked_fill(batch["attention_mask"][:, None, None] == 0, -torch.inf)
    with bert.attention(tiny, "eager"):
        heard["dense"] = layer(hidden, mask)[0].view(4, 9, 4, 8)
    keys = layer.key(hidden).view(4, 9, 4, 8)
    weights.quaternion_attention(tiny)
    signs = torch.tensor([1.0, 1, -1, -1, -1, -1, -1, -1])
    torch.testing.assert_close(layer.key(hidden).view(4, 9, 4, 8), keys * signs)  # no map depends on the bias, but keys do
    heard["quaternion"] = layer(hidden, batch["attention_mask"])[0].view(4, 9, 4, 8)
    torch.testing.assert_close(heard["quaternion"][..., :2], heard["dense"][..., :2])  # a quarter of every head
    assert (heard["quaternion"][..., 2:] - heard["dense"][..., 2:]).abs().mean() > 1e-3
    with pytest.raises(ValueError, match="takes the place of eager or sdpa, not of 'quaternion'"):
        weights.quaternion_attention(tiny)


@pytest.mark.method("S-08")
def test_quaternion_attention_refuses_what_it_cannot_conjugate(tiny):
    weights.quaternion_layers(tiny, ("key",))
    with pytest.raises(ValueError, match=r"\['key'\] are not linear layers"):
        weights.quaternion_attention(tiny)
    tiny.config.num_attention_heads = 16
    with pytest.raises(ValueError, match="4 divides, got 2"):
        weights.quaternion_attention(tiny)
    assert tiny.config._attn_implementation == "sdpa"


# --- S-09 shared factors --------------------------------------------------------------------------------------------


@pytest.mark.method("S-09")
def test_the_joint_factors_are_optimal():
    matrices = [torch.randn(7, 10), torch.randn(5, 10), torch.randn(12, 10)]
    lefts, right = weights.shared_factors(matrices, 4)
    error = sum((W - A @ right).square().sum() for W, A in zip(matrices, lefts, strict=True))
    singular = np.linalg.svd(torch.cat(matrices).numpy(), compute_uv=False)
    assert error.item() == pytest.approx((singular[4:] ** 2).sum(), rel=1e-4)
    for W, A in zip(matrices, lefts, strict=True):  # given B, each factor is the best one by itself
        expected = np.linalg.lstsq(right.T.numpy(), W.T.numpy(), rcond=None)[0].T
        np.testing.assert_allclose(A, expected, atol=1e-4)
    alone = weights.shared_factors(matrices[:1], 4)
    dense = nn.Linear(10, 7)
    with torch.no_grad():
        dense.weight.copy_(matrices[0])
    single = LowRankLinear.from_linear(dense, 4)
    torch.testing.assert_close(alone[0][0] @ alone[1], single.left @ single.right)
    for wrong, match in ((0, "got 0"), (11, r"1..10, got 11")):
        with pytest.raises(ValueError, match=match):
            weights.shared_factors(matrices, wrong)
    with pytest.raises(ValueError, match=r"one input width, got \[9, 10\]"):
        weights.shared_factors([torch.zeros(3, 9), torch.zeros(3, 10)], 2)


@pytest.mark.method("S-09")
def test_one_factor_is_stored_trained_and_changed_once(tiny, batch, tmp_path):
    parameters = costs.parameter_counts(tiny)["parameters"]
    weights.share_factors(tiny, ("query", "ffn_out"), rank=5)
    paths = [f"bert.encoder.layer.{layer}.attention.self.query" for layer in (0, 1)]
    saved = 2 * (32 * 32 + 32 * 64) - 2 * 5 * (32 + 32) - 5 * (32 + 64)  # two left factors a group, and one right one
    assert parameters - costs.parameter_counts(tiny)["parameters"] == saved
    artifacts.save(tiny, tmp_path / "shared")
    for model in (tiny, artifacts.load(tmp_path / "shared"), bert.fresh_copy(tiny)):
        first, second = (model.get_submodule(path) for path in paths)
        assert first.right is second.right and first.left is not second.left
        with torch.no_grad():
            second.right.zero_()
        assert torch.equal(first(torch.ones(32)), first.bias)  # a change of one shows in the other
    untied = bert.fresh_copy(tiny)
    tiny(**inputs(batch)).logits.sum().backward()
    untied.get_submodule(paths[1]).right = nn.Parameter(tiny.get_submodule(paths[1]).right.detach().clone())
    untied(**inputs(batch)).logits.sum().backward()
    gradients = [untied.get_submodule(path).right.grad for path in paths]
    torch.testing.assert_close(tiny.get_submodule(paths[0]).right.grad, sum(gradients))


@pytest.mark.method("S-09")
def test_families_of_layers_and_of_states(tiny):
    def named(across):
        return [[m.name.removeprefix("bert.encoder.layer.").removesuffix(".weight") for m in family]
                for family in weights.families(tiny, ("query", "key", "ffn_in"), across)]  # fmt: skip

    query, key, ffn = "attention.self.query", "attention.self.key", "intermediate.dense"
    assert named("layers") == [[f"0.{query}", f"1.{query}"], [f"0.{key}", f"1.{key}"], [f"0.{ffn}", f"1.{ffn}"]]
    assert named("states") == [[f"0.{query}", f"0.{key}"], [f"0.{ffn}"], [f"1.{query}", f"1.{key}"], [f"1.{ffn}"]]
    with pytest.raises(ValueError, match="across 'layers' or 'states', got 'heads'"):
        named("heads")
    dense = {path: weights_of(tiny, path) for path in (f"bert.encoder.layer.1.{query}", f"bert.encoder.layer.1.{key}")}
    found = weights.share_factors(tiny, ("query", "key"), rank=6, across="states")
    first, second = (tiny.get_submodule(path) for path in dense)
    assert first.right is second.right
    for (path, W), part in zip(dense.items(), (first, second), strict=True):
        assert found[f"{path}.weight"] == pytest.approx(replacing.kept(W, part.left @ part.right), rel=1e-4)
