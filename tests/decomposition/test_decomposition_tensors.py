"""Tensor formats: numpy's SVD, einsum and least squares, loops over entries, and the contract of every factorised model."""

import itertools
import math

import fresh
import numpy as np
import pytest
import torch
from small_task import task_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from utils import artifacts, bert, contract, costs, parts, profiles, replacing, training
from utils.decomposition import tensors
from utils.parts import tensors as formats
from utils.parts.tensors import BlockTermLinear, CPLinear, TensorLinear, TensorTrainLinear, TensorTrainVectors, TuckerLinear
from utils.tables import PLACE, reconstruction, replace_table, word_table

INPUTS = ("input_ids", "attention_mask")
FIRST = "bert.encoder.layer.0.intermediate.dense"
QUERIES = [f"bert.encoder.layer.{layer}.attention.self.query" for layer in (0, 1)]


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


def two_cores(out: int, width: int):
    return tensors.balanced_shape(out, width, cores=2)


def with_table(model):
    replace_table(model, tensors.tt_vectors(word_table(model), rank=6))


REVERSED = torch.arange(99, -1, -1)
MADE = {
    "train": lambda model: tensors.tt_layers(model, ("query", "ffn_in", "ffn_out"), size=0.5),
    "train of two": lambda model: tensors.tt_layers(model, ("pooler", "ffn_in"), rank=5, shape=two_cores),
    "table": with_table,
    "ordered table": lambda model: replace_table(model, tensors.tt_vectors(word_table(model), rank=6, order=REVERSED)),
    "block terms": lambda model: tensors.block_term_layers(model, terms=2, rank=3, sweeps=1),
    "cp": lambda model: tensors.cp_layers(model, ("query", "key", "ffn_in"), size=0.6, sweeps=1, joint=True),
    "tucker": lambda model: tensors.tucker_layers(model, ("query", "key", "ffn_in"), size=0.6, sweeps=1),
}
IDS = ("T-08", "T-09", "T-10", "T-12")
each_change = pytest.mark.parametrize("name", MADE)


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.method(*IDS)
def test_every_model_comes_back_in_a_fresh_process(tiny, tmp_path):
    for name, change in MADE.items():
        model = bert.fresh_copy(tiny)
        change(model)
        path = tmp_path / f"{name}.safetensors"
        artifacts.save(model, path)
        contract.write(path, model, 7)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method(*IDS)
@each_change
def test_every_order_computes_and_costs_what_it_says(name, tiny, batch):
    dense = costs.macs(tiny, 9)
    MADE[name](tiny)
    found = parts.find(tiny.eval())
    expected = replacing.expand(tiny)
    assert not parts.find(expected) and costs.macs(tiny, 9) != dense
    for order in set.intersection(*({"auto", *getattr(part, "costs", {"auto": 0})} for part in found.values())):
        if order != "auto" or "table" not in name:
            tensors.set_order(tiny, order)
        torch.testing.assert_close(tiny(**inputs(batch)).logits, expected(**inputs(batch)).logits, atol=1e-4, rtol=1e-4)
        for length, many in ((1, 1), (9, 1), (4, 3)):
            others = costs.macs(expected, length, many) - sum(tokens_of(path, length) * many * weights_of(expected, path)
                                                             for path in found)  # fmt: skip
            own = sum(part.macs(many * tokens_of(path, length)) for path, part in found.items())
            assert costs.measured_macs(tiny, length, many) == others + own <= costs.macs(tiny, length, many)
    alone = {key: batch[key][2:3, :5] for key in INPUTS}
    torch.testing.assert_close(tiny(**inputs(batch)).logits[2:3], tiny(**alone).logits, atol=1e-4, rtol=1e-4)


def tokens_of(path: str, length: int) -> int:
    return 1 if "pooler" in path else length


def weights_of(plain: nn.Module, path: str) -> int:
    module = plain.get_submodule(path)
    return module.weight.numel() if isinstance(module, nn.Linear) else 0  # a look-up multiplies nothing


@pytest.mark.method(*IDS)
@each_change
def test_training_changes_what_is_stored_and_keeps_ties(name, tiny, batch):
    MADE[name](tiny)
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    log = training.train(tiny, task_of(batch), profiles.get("smoke"), steps=2, learning_rate=1e-2, train_embeddings=True)
    own = {f"{path}.{key}" for path, part in parts.find(tiny).items() for key, _ in part.named_parameters()}
    assert own and np.isfinite(log.losses).all()
    assert all(not torch.equal(value, before[key]) for key, value in tiny.state_dict().items() if key in own)
    if name in ("cp", "tucker"):
        first, second = (tiny.get_submodule(path) for path in QUERIES)
        assert first.left is second.left and first.right is second.right


@pytest.mark.method(*IDS)
def test_a_refused_change_leaves_the_model_as_it_was(tiny):
    before, table = bert.fingerprint(tiny), word_table(tiny)
    refused = [
        (lambda: tensors.tt_layers(tiny, rank=0), r"sides \[16, 16, 8\]|ranks in 1..16, got 0"),
        (lambda: tensors.tt_layers(tiny, rank=17), r"ranks in 1..16, got 17"),
        (lambda: tensors.tt_layers(tiny, size=0.001), "2 weights do not hold"),
        (lambda: tensors.tt_layers(tiny, ("query", "classifier")), "2 is no product of 3 factors above 1"),
        (lambda: tensors.tt_layers(tiny, shape=lambda out, width: ((8, 8), (4, 9))), "product 32 are needed, got"),
        (lambda: tensors.tt_layers(tiny, ("word_embeddings",)), "not linear layers"),
        (lambda: tensors.tt_vectors(table, rank=0), "got 0"),
        (lambda: tensors.tt_vectors(table, 3, shape=lambda words, width: ((9, 11), (4, 8))), "product of 100 or more, got"),
        (lambda: tensors.tt_vectors(table, 3, shape=lambda words, width: ((10, 10), (4, 9))), "product 32 are needed, got"),
        (lambda: tensors.tt_vectors(table.index_fill(0, torch.tensor(3), torch.nan)), "finite weights"),
        (lambda: tensors.block_term_layers(tiny, terms=0), "1 term or more"),
        (lambda: tensors.block_term_layers(tiny, terms=1, rank=9), "rank in 1..8, got 1 terms of rank 9"),
        (lambda: tensors.block_term_layers(tiny, rank=8, size=0.1), "do not hold one term of rank 8"),
        (lambda: tensors.cp_layers(tiny, ("query", "ffn_in"), rank=0), "ranks in 1..64, got 0"),
        (lambda: tensors.cp_layers(tiny, ("ffn_in", "query"), rank=65), r"matrices of \(32, 32\) have ranks in 1..64, got 65"),
        (lambda: tensors.cp_layers(tiny, size=1e-4), "got 0"),
        (lambda: tensors.tucker_layers(tiny, ("ffn_in", "query"), (2, 20, 33)), r"1 to \(2, 32, 32\), none above"),
        (lambda: tensors.tucker_layers(tiny, ("query",), (1, 20, 10)), "none above the product of the others"),
        (lambda: tensors.tucker_layers(tiny, ("query",), (0, 2, 2)), r"got \[0, 2, 2\]"),
        (lambda: tensors.round_trains(tiny, 3), "no tensor trains"),
        (lambda: tensors.set_order(tiny, "left"), "none, got 'left'"),
        (lambda: tensors.error_table(tiny, tiny), "no matrices in a tensor format"),
    ]  # fmt: skip
    for change, match in refused:
        with pytest.raises(ValueError, match=match):
            change()
    assert bert.fingerprint(tiny) == before and not parts.find(tiny)
    tiny.get_submodule(FIRST).weight.data[0, 0] = torch.nan
    for change in (tensors.tt_layers, tensors.block_term_layers, tensors.cp_layers, tensors.tucker_layers):
        with pytest.raises(ValueError, match="finite weights"):
            change(tiny, ("query", "ffn_in"), **({"rank": 2} if change is tensors.block_term_layers else {}))
    assert not parts.find(tiny)


def test_parts_that_cannot_be():
    for ranks in ([0, 1], [5, 4], [4, 5], [2, 9], [1, 1, 1]):
        with pytest.raises(ValueError, match=r"ranks in 1..\[4, 4\]|no product of 4"):
            TensorTrainLinear(8, 8, ranks)  # sides 4, 4, 4
    for ranks in ([16, 1], [1, 5]):
        with pytest.raises(ValueError, match="at most a neighbour's times the side between them"):
            TensorTrainLinear(8, 32, ranks, out_factors=[8, 2, 2], in_factors=[2, 2, 2])
    with pytest.raises(ValueError, match="2 factors of a width or more"):
        TensorTrainLinear(8, 8, [])
    with pytest.raises(ValueError, match="order must be one of auto, left, right, rebuild, got 'middle'"):
        TensorTrainLinear(8, 8, [2, 2], order="middle")
    with pytest.raises(ValueError, match="rank of 1 or more"):
        CPLinear(8, 8, 0)
    for ranks in ((1, 9, 1), (1, 1, 9), (0, 1, 1), (2, 2)):
        with pytest.raises(ValueError, match="three ranks of 1 or more"):
            TuckerLinear(8, 8, ranks)


# --- widths as products ---------------------------------------------------------------------------------------------


@pytest.mark.method("T-08", "T-09")
def test_factors_by_brute_force():
    for size, count in itertools.product((8, 36, 96, 97), (2, 3)):
        ways = [way for way in itertools.product(range(2, size + 1), repeat=count)
                if math.prod(way) == size and list(way) == sorted(way)]  # fmt: skip
        assert sorted(formats.factorisations(size, count)) == sorted(ways)
        if ways:
            assert formats.balanced_factors(size, count) == min(ways, key=np.var)
        smallest = min(sum(way) for way in itertools.product(range(1, size + 1), repeat=count) if math.prod(way) >= size)
        padded = formats.padded_factors(size, count)
        assert math.prod(padded) >= size and sum(padded) == smallest and max(padded) - min(padded) <= 1
    assert formats.padded_factors(30522, 3) == (31, 31, 32) and formats.padded_factors(30522, 2) == (175, 175)
    assert [formats.balanced_factors(n, 3) for n in (384, 1536)] == [(6, 8, 8), (8, 12, 16)]
    for size, count in ((97, 2), (8, 4), (8, 0)):
        with pytest.raises(ValueError, match="no product of"):
            formats.balanced_factors(size, count)
    with pytest.raises(ValueError, match="1 or more, got 0 and 3"):
        formats.padded_factors(0, 3)


@pytest.mark.method("T-08", "T-10")
@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((1536, 384), [48, 96, 128]),
        ((384, 1536), [48, 96, 128]),
        ((94, 46), [23, 4, 47]),
        ((46, 94), [47, 4, 23]),
        ((46, 46), [23, 4, 23]),
    ],
)
def test_large_factors_do_not_meet_in_one_side(shape, sides):
    rows, columns = tensors.balanced_shape(*shape)
    assert (math.prod(rows), math.prod(columns)) == shape and formats.tensor_sides(rows, columns) == sides


@pytest.mark.method("T-08", "T-10")
def test_twice_a_prime_is_a_width_that_trains_and_block_terms_have():
    model = BertForSequenceClassification(BertConfig(
        vocab_size=60, hidden_size=46, num_hidden_layers=1, num_attention_heads=2, intermediate_size=94
    )).eval()  # fmt: skip
    dense, ids = bert.fresh_copy(model), torch.tensor([[1, 2, 3]])
    for change in (lambda one: tensors.tt_layers(one, rank=8), lambda one: tensors.tt_layers(one, size=0.1),
                   lambda one: tensors.tt_layers(one, tensors.ATTENTION, size=0.5),
                   lambda one: tensors.block_term_layers(one, rank=4, size=0.1, sweeps=1)):  # fmt: skip
        kept = change(made := bert.fresh_copy(dense))
        table = tensors.error_table(dense, made)
        assert (table["size"] < 0.6).all() and (table["error"] <= table["most"] + 1e-6).all() and min(kept.values()) > 0
        assert made(ids).logits.isfinite().all()


@pytest.mark.method("T-08", "T-10")
def test_a_matrix_becomes_a_tensor_entry_by_entry():
    W = torch.randn(6, 8)
    tensor = tensors.tensorised(W, (2, 3), (4, 2))
    assert tensor.shape == (8, 6) and tensor.dtype == torch.float64
    for i, k, j, m in itertools.product(range(2), range(3), range(4), range(2)):
        assert tensor[i * 4 + j, k * 2 + m] == W[i * 3 + k, j * 2 + m]


# --- T-08 tensor-train matrices -------------------------------------------------------------------------------------


def numpy_train(cores) -> np.ndarray:
    """The tensor of cores (r, side, s), entry by entry a product of matrices."""
    cores = [array(core) for core in cores]
    made = np.empty([core.shape[1] for core in cores])
    for place in np.ndindex(*made.shape):
        made[place] = np.linalg.multi_dot([core[:, i] for core, i in zip(cores, place, strict=True)]).item()
    return made


def numpy_svds(tensor: np.ndarray, ranks) -> tuple[np.ndarray, list[float]]:
    """TT-SVD as a chain of projections of the whole tensor, each onto the leading left singular vectors of a cut; and what
    each of them leaves out."""
    shape, lost = tensor.shape, []
    for cut, rank in enumerate(ranks, 1):
        matrix = tensor.reshape(math.prod(shape[:cut]), -1)
        U = np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
        projection = U @ (U.T @ matrix)
        lost.append(((matrix - projection) ** 2).sum())
        tensor = projection.reshape(shape)
    return tensor, lost


@pytest.mark.method("T-08", "T-09")
@pytest.mark.parametrize(("shape", "ranks"), [((4, 5, 6), (3, 2)), ((3, 4, 2, 5), (2, 3, 4)), ((7, 9), (4,))])
def test_tt_svd_is_a_chain_of_truncated_svds(shape, ranks):
    tensor = torch.randn(shape, dtype=torch.float64)
    cores = tensors.tt_svd(tensor, ranks)
    assert [tuple(core.shape) for core in cores] == list(zip((1, *ranks), shape, (*ranks, 1), strict=True))
    expected, lost = numpy_svds(array(tensor), ranks)
    np.testing.assert_allclose(numpy_train(cores), expected, atol=1e-10)
    error = ((array(tensor) - expected) ** 2).sum() / (array(tensor) ** 2).sum()
    least, most = tensors.train_bounds(tensor, ranks)
    assert sum(lost) / (array(tensor) ** 2).sum() == pytest.approx(error) and least <= error + 1e-12 and error <= most + 1e-12
    tails = [(np.linalg.svd(array(tensor).reshape(math.prod(shape[:cut]), -1), compute_uv=False)[rank:] ** 2).sum()
             for cut, rank in enumerate(ranks, 1)]  # fmt: skip
    assert (least, most) == pytest.approx((max(tails) / (array(tensor) ** 2).sum(), sum(tails) / (array(tensor) ** 2).sum()))
    full = tensors.tt_svd(tensor, formats.full_ranks(shape))
    np.testing.assert_allclose(numpy_train(full), array(tensor), atol=1e-10)


@pytest.mark.method("T-08")
def test_rounding_is_the_svd_of_the_tensor_that_it_does_not_make():
    shape, big = (4, 5, 6, 3), (4, 7, 3)
    cores = [torch.randn(r, side, s) for r, side, s in zip((1, *big), shape, (*big, 1), strict=True)]
    tensor = torch.from_numpy(numpy_train(cores))
    for ranks in ((2, 3, 2), (4, 7, 3)):
        expected = numpy_train(tensors.tt_svd(tensor, ranks))
        found = tensors.tt_round(cores, ranks)
        assert [core.shape[-1] for core in found] == [*ranks, 1]
        np.testing.assert_allclose(numpy_train(found), expected, atol=1e-9)
        even = tensors.balanced(found)
        np.testing.assert_allclose(numpy_train(even), expected, atol=1e-9)
        lengths = even[0].flatten(0, 1).norm(dim=0), even[1].flatten(1).norm(dim=1)
        torch.testing.assert_close(*lengths)
    # a train plus itself has twice the ranks, and rounds back to its own
    double = [torch.cat([cores[0]] * 2, -1)]
    for core in cores[1:-1]:
        zero = torch.zeros_like(core)
        double.append(torch.cat([torch.cat([core, zero], -1), torch.cat([zero, core], -1)], 0))
    double.append(torch.cat([cores[-1]] * 2, 0))
    np.testing.assert_allclose(numpy_train(tensors.tt_round(double, big)), 2 * array(tensor), atol=1e-9)


@pytest.mark.method("T-08")
@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [((3, 2, 4), (2, 5, 3), (4, 5)), ((2, 3, 2, 2), (3, 1, 2, 2), (2, 5, 3)), ((5, 4), (1, 6), (3,))],
)
def test_a_product_by_entries_and_its_cost_by_loops(rows, columns, ranks):
    out, width = math.prod(rows), math.prod(columns)
    part = TensorTrainLinear(width, out, ranks, out_factors=rows, in_factors=columns)
    nn.init.normal_(part.bias)
    expected, cores = np.empty((out, width)), [array(core) for core in part.cores]
    for row, column in itertools.product(np.ndindex(*rows), np.ndindex(*columns)):
        entry = np.linalg.multi_dot([core[:, i, j] for core, i, j in zip(cores, row, column, strict=True)])
        expected[np.ravel_multi_index(row, rows), np.ravel_multi_index(column, columns)] = entry.item()
    np.testing.assert_allclose(array(part.weight), expected, atol=1e-6)
    x, bonds, d = torch.randn(2, 3, width), (1, *ranks, 1), len(rows)
    for order, cores_in_order in (("left", range(d)), ("right", range(d)[::-1]), ("rebuild", ())):
        part.settle(order)
        np.testing.assert_allclose(array(part(x)), array(x) @ expected.T + array(part.bias), atol=1e-5)
        sides, macs = list(columns), 0
        for j in cores_in_order:  # every number of the state takes part in n_j products for each rank on the other side
            sides[j] = rows[j]
            macs += math.prod(sides) * columns[j] * bonds[j] * bonds[j + 1]
        assert order == "rebuild" or part.costs[order] == (0, macs)
        with FlopCounterMode(display=False) as counter:
            part(x)
        assert counter.get_total_flops() == 2 * part.macs(6) == 2 * (part.costs[order][0] + 6 * part.costs[order][1])
    part.settle("auto")
    for tokens in (1, 3, 10, 10_000):
        cheapest = min(once + tokens * each for once, each in part.costs.values())
        assert part.macs(tokens) == cheapest


@pytest.mark.method("T-08")
def test_layers_are_the_trains_of_their_matrices(tiny):
    W = tiny.get_submodule(FIRST).weight.detach().clone()
    dense = bert.fresh_copy(tiny)
    kept = tensors.tt_layers(tiny, ("ffn_in",), rank=7)
    part = tiny.get_submodule(FIRST)
    assert (part.out_factors, part.in_factors, part.ranks) == ([4, 4, 4], [2, 4, 4], [7, 7])
    tensor = array(W).reshape(4, 4, 4, 2, 4, 4).transpose(0, 3, 1, 4, 2, 5).reshape(8, 16, 16)
    made = numpy_svds(tensor, (7, 7))[0].reshape(4, 2, 4, 4, 4, 4).transpose(0, 2, 4, 1, 3, 5).reshape(64, 32)
    np.testing.assert_allclose(array(part.weight), made, atol=1e-5)
    assert torch.equal(part.bias, dense.get_submodule(FIRST).bias)
    assert kept[f"{FIRST}.weight"] == pytest.approx(1 - ((array(W) - made) ** 2).sum() / (array(W) ** 2).sum(), abs=1e-5)
    low_rank = bert.fresh_copy(dense)
    kept = tensors.tt_layers(low_rank, ("ffn_in",), rank=5, shape=lambda out, width: ((out, 1), (1, width)))
    singular = np.linalg.svd(array(W), compute_uv=False) ** 2
    assert kept[f"{FIRST}.weight"] == pytest.approx(singular[:5].sum() / singular.sum(), abs=1e-5)  # Eckart and Young
    part = low_rank.get_submodule(FIRST)  # two factors, and which comes first makes 43 times as many multiply-adds
    assert part.costs["right"] == (0, 5 * (64 + 32)) and part.costs["left"] == (0, 2 * 5 * 64 * 32)
    assert part.order_for(9) == "right"


@pytest.mark.method("T-08")
def test_the_rank_is_the_largest_that_fits(tiny):
    for size in (0.1, 0.5, 0.9):
        model = bert.fresh_copy(tiny)
        tensors.tt_layers(model, ("ffn_in", "query"), size=size)
        for path in (FIRST, QUERIES[0]):
            part = model.get_submodule(path)
            held = sum(core.numel() for core in part.cores)
            budget = size * part.out_features * part.in_features
            sides = [n * m for n, m in zip(part.out_factors, part.in_factors, strict=True)]
            more = [min(max(part.ranks) + 1, full) for full in formats.full_ranks(sides)]
            assert held == tensors.train_weights(sides, part.ranks) <= budget
            assert tensors.train_weights(sides, more) > budget or more == part.ranks


@pytest.mark.method("T-08", "T-09")
def test_random_cores_have_the_deviation_that_was_asked_for():
    part = TensorTrainLinear(120, 120, [3, 5])
    assert part.weight.std().item() * 120**0.5 == pytest.approx(1, abs=0.15)
    table = TensorTrainVectors(1000, 60, [4, 6])
    assert table.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert BlockTermLinear(120, 120, 4, 3).weight.std().item() * 120**0.5 == pytest.approx(1, abs=0.2)


@pytest.mark.method("T-08", "T-09")
def test_a_model_is_rounded_after_training(tiny, batch):
    tensors.tt_layers(tiny, ("ffn_in",), rank=12)
    with_table(tiny)
    before = {path: (part.weight.detach(), part.ranks) for path, part in parts.find(tiny).items()}
    same = bert.fresh_copy(tiny)
    assert min(tensors.round_trains(same, 99).values()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(same(**inputs(batch)).logits, tiny(**inputs(batch)).logits, atol=1e-4, rtol=1e-4)
    found = tensors.round_trains(tiny, 4)
    for path, part in parts.find(tiny).items():
        W, ranks = before[path]
        assert part.ranks == [min(4, r) for r in ranks]
        assert found[path] == pytest.approx(replacing.kept(W, part.weight), abs=1e-6) and 0 < found[path] < 1
    assert torch.equal(tiny.get_submodule(FIRST).bias, same.get_submodule(FIRST).bias)
    with pytest.raises(ValueError, match=r"rounded to 1\.\.4, got 0"):
        tensors.round_trains(tiny, 0)


# --- T-09 TT-embedding ----------------------------------------------------------------------------------------------


@pytest.mark.method("T-09")
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_a_row_is_a_product_of_slices(cores):
    words, width = 101, 16
    vectors = TensorTrainVectors(words, width, [2] * (cores - 1))
    ids = torch.randint(0, words, (4, 6))
    ids[0, 0] = words - 1
    expected = np.empty((words, width))
    for word in range(words):
        digits = np.unravel_index(word, vectors.word_factors)
        made = np.ones((1, 1))
        for core, digit in zip(vectors.cores, digits, strict=True):
            made = np.einsum("pr,rms->pms", made, array(core[:, digit])).reshape(-1, core.shape[-1])
        expected[word] = made.squeeze(-1)
    np.testing.assert_allclose(array(vectors(ids)), expected[ids.numpy()], atol=1e-7)
    np.testing.assert_allclose(array(vectors.weight), expected, atol=1e-7)
    np.testing.assert_allclose(array(vectors.eval().expanded().weight), expected, atol=1e-7)
    with FlopCounterMode(display=False) as counter:
        vectors(ids)
    assert counter.get_total_flops() == 2 * vectors.macs(24)
    assert math.prod(vectors.word_factors) >= words and math.prod(vectors.vector_factors) == width


@pytest.mark.method("T-09")
def test_words_share_the_gradients_of_their_slices():
    vectors, ids, upstream = TensorTrainVectors(60, 8, [2, 3]), torch.tensor([3, 3, 59, 12]), torch.randn(4, 8)
    vectors.train()(ids).backward(upstream)
    found = [core.grad.clone() for core in vectors.cores]
    vectors.zero_grad()
    vectors.weight[ids].backward(upstream)
    for mine, core in zip(found, vectors.cores, strict=True):
        torch.testing.assert_close(mine, core.grad)
    assert found[0].count_nonzero() < found[0].numel()  # no other first slice had a part in it


@pytest.mark.method("T-09")
def test_a_table_starts_at_its_tt_svd(tiny):
    table = word_table(tiny)
    for words in (100, 97):  # three of 4 * 5 * 5 rows are never looked up
        vectors = tensors.tt_vectors(table[:words], rank=9)
        assert (vectors.word_factors, vectors.vector_factors, vectors.ranks) == ([4, 5, 5], [2, 4, 4], [8, 9])
        padded = np.concatenate([array(table[:words]), np.zeros((100 - words, 32))]).reshape(4, 5, 5, 2, 4, 4)
        made = numpy_svds(padded.transpose(0, 3, 1, 4, 2, 5).reshape(8, 20, 20), (8, 9))[0]
        expected = made.reshape(4, 2, 5, 4, 5, 4).transpose(0, 2, 4, 1, 3, 5).reshape(100, 32)
        np.testing.assert_allclose(array(vectors.weight), expected[:words], atol=1e-5)
    uneven = tensors.tt_vectors(table[:97], size=0.5)
    held = sum(core.numel() for core in uneven.cores)
    assert math.prod(uneven.word_factors) == 100 and uneven.weight.shape == (97, 32) and 0.3 * 97 * 32 < held <= 0.5 * 97 * 32
    exact = tensors.tt_vectors(table[:97], rank=20)
    torch.testing.assert_close(exact.weight, table[:97], atol=1e-5, rtol=1e-5)
    assert reconstruction(exact, table[:97])["relative_error"] < 1e-9 < reconstruction(uneven, table[:97])["relative_error"] < 1
    model = bert.fresh_copy(tiny)
    with_table(model)
    assert costs.macs(model, 7) - costs.macs(tiny, 7) == 7 * model.get_submodule(PLACE).word_macs()


@pytest.mark.method("T-09")
def test_words_in_an_order_of_their_own_are_a_train_of_that_table(tiny):
    table, order = word_table(tiny), torch.randperm(100)
    ordered, plain = tensors.tt_vectors(table, rank=6, order=order), tensors.tt_vectors(table[order], rank=6)
    torch.testing.assert_close(ordered.weight[order], plain.weight)
    ids = torch.tensor([3, 3, 99, 0])
    torch.testing.assert_close(ordered.compose(ids), ordered.weight[ids])
    assert not torch.allclose(ordered.weight, tensors.tt_vectors(table, rank=6).weight, atol=1e-3)
    replace_table(tiny, ordered)
    small = tensors.rounded(ordered, 3)
    torch.testing.assert_close(small.weight[order], tensors.rounded(plain, 3).weight, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="the ids 0 to 99, each once"):
        tensors.tt_vectors(table, rank=6, order=order.clamp(max=98))


@pytest.mark.method("T-09")
def test_the_least_error_of_a_table_knows_nothing_of_rows_that_no_word_has():
    source = TensorTrainVectors(100, 32, [2, 2])
    table = source.weight.detach()[:97]
    zeros_too = tensors.train_bounds(tensors.table_tensor(table, source.word_factors, source.vector_factors), [2, 2])[0]
    vectors = TensorTrainVectors(97, 32, [2, 2])
    vectors.load_state_dict(source.state_dict())
    found = tensors.table_errors(vectors, table)
    assert max(found["least"], found["error"]) < 1e-6 < 1e-3 < zeros_too
    table = torch.randn(97, 32)
    vectors = tensors.tt_vectors(table, rank=6)
    found = tensors.table_errors(vectors, table)
    tensor = array(table[:75]).reshape(3, 5, 5, 2, 4, 4).transpose(0, 3, 1, 4, 2, 5)
    tails = [(np.linalg.svd(tensor.reshape(rows, -1), compute_uv=False)[6:] ** 2).sum() for rows in (6, 120)]
    assert found["least"] == pytest.approx(max(tails) / (array(table) ** 2).sum())
    assert found["least"] < found["error"] < found["most"] <= 1
    assert found["error"] == pytest.approx(squared_error(array(vectors.weight), array(table)), abs=1e-5)
    assert tensors.table_errors(tensors.tt_vectors(table[:20], rank=1), table[:20])["least"] >= 0
    lone = TensorTrainVectors(5, 32, [1, 1], word_factors=[2, 5, 5])  # no first digit has all its words
    assert tensors.table_bounds(lone, table[:5])[0] == 0


@pytest.mark.method("T-09")
def test_words_that_are_alike_get_the_same_first_digits():
    group, within = torch.arange(5).repeat_interleave(12), torch.arange(3).repeat_interleave(4).repeat(5)
    table = torch.zeros(60, 8)
    table[:, 0], table[:, 1] = 10.0 * group, 1.0 * within
    table += 0.01 * torch.randn(60, 8)
    shuffled = torch.randperm(60)
    order = tensors.similar_order(table[shuffled], (5, 3, 4))
    assert order.sort().values.tolist() == list(range(60))
    groups, parts_of = group[shuffled][order].view(5, 12), within[shuffled][order].view(5, 3, 4)
    assert (groups == groups[:, :1]).all() and (parts_of == parts_of[:, :, :1]).all()
    assert (groups[:, 0].diff().sign() == groups[:, 0].diff().sign()[0]).all()  # neighbours are next to each other
    before, after = (tensors.table_errors(tensors.tt_vectors(rows, 5, shape=lambda words, width: ((5, 3, 4), (2, 2, 2))), rows)
                     for rows in (table[shuffled], table[shuffled][order]))  # fmt: skip
    assert after["error"] < 0.5 * before["error"]
    assert sorted(tensors.similar_order(table[:57], (5, 3, 4)).tolist()) == list(range(57))  # the last group may be short


# --- Tucker decompositions ------------------------------------------------------------------------------------------


def numpy_unfold(tensor: np.ndarray, side: int) -> np.ndarray:
    return np.moveaxis(tensor, side, 0).reshape(tensor.shape[side], -1)


def numpy_hooi(tensor: np.ndarray, ranks, sweeps: int) -> list[np.ndarray]:
    """The tensors of HOSVD and of each sweep of HOOI, three sides, by projections with U U^T."""

    def leading(matrix: np.ndarray, rank: int) -> np.ndarray:
        U = np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
        return U @ U.T

    P = [leading(numpy_unfold(tensor, side), rank) for side, rank in enumerate(ranks)]
    made = [np.einsum("abc,ai,bj,ck->ijk", tensor, *P)]
    for _ in range(sweeps):
        for side, rank in enumerate(ranks):
            others = [np.eye(len(p)) if j == side else p for j, p in enumerate(P)]
            P[side] = leading(numpy_unfold(np.einsum("abc,ai,bj,ck->ijk", tensor, *others), side), rank)
        made.append(np.einsum("abc,ai,bj,ck->ijk", tensor, *P))
    return made


def squared_error(made: np.ndarray, tensor: np.ndarray) -> float:
    return ((made - tensor) ** 2).sum() / (tensor**2).sum()


@pytest.mark.method("T-10", "T-12")
def test_tucker_is_hooi():
    tensor = torch.randn(4, 6, 7, dtype=torch.float64)
    core, factors, errors = tensors.fit_tucker(tensor, (2, 3, 4), sweeps=3)
    expected = numpy_hooi(array(tensor), (2, 3, 4), 3)
    np.testing.assert_allclose(array(tensors.tucker_tensor(core, factors)), expected[-1], atol=1e-9)
    np.testing.assert_allclose(errors, [squared_error(made, array(tensor)) for made in expected], atol=1e-12)
    assert errors[-1] < errors[0] - 1e-3 and sorted(errors, reverse=True) == errors
    for U in factors:
        torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=U.dtype))
    singular = [np.linalg.svd(numpy_unfold(array(tensor), side), compute_uv=False) ** 2 for side in range(3)]
    tails = [values[rank:].sum() / values.sum() for values, rank in zip(singular, (2, 3, 4), strict=True)]
    assert tensors.tucker_bounds(tensor, (2, 3, 4)) == pytest.approx((max(tails), sum(tails)))
    assert max(tails) <= errors[-1] and errors[0] <= sum(tails)
    assert tensors.tucker_bounds(tensor, (1, 1, 1))[1] == tensors.train_bounds(tensor, (1, 1))[1] == 1  # none loses more
    assert tensors.tucker_weights((4, 6, 7), (2, 3, 4)) == core.numel() + sum(U.numel() for U in factors)


# --- T-10 block terms -----------------------------------------------------------------------------------------------


@pytest.mark.method("T-10")
@pytest.mark.parametrize("d", [2, 3, 4])
def test_block_terms_by_einsum_and_their_cost_by_loops(d):
    rows, columns, N, R = (2, 3, 2, 2)[:d], (3, 2, 2, 2)[:d], 3, 2
    out, width = math.prod(rows), math.prod(columns)
    part = BlockTermLinear(width, out, N, R, out_factors=rows, in_factors=columns)
    letters = "abcd"[:d], "ijkl"[:d], "mnop"[:d]
    terms = ",".join(f"z{i}{j}{a}" for a, i, j in zip(*letters, strict=True))
    formula = f"z{letters[0]},{terms}->{letters[1]}{letters[2]}"
    expected = np.einsum(formula, array(part.core), *map(array, part.factors)).reshape(out, width)
    np.testing.assert_allclose(array(part.weight), expected, atol=1e-6)
    fold = N * rows[0] * columns[0] * R**d
    sides, macs = list(columns), 0
    for j in range(d):
        sides[j] = rows[j]
        macs += N * math.prod(sides) * columns[j] * R ** (d - max(j, 1))
    assert part.costs["left"] == (fold, macs)
    x = torch.randn(5, width)
    for order in ("left", "rebuild"):
        part.settle(order)
        np.testing.assert_allclose(array(part(x)), array(x) @ expected.T, atol=1e-5)
        with FlopCounterMode(display=False) as counter:
            part(x)
        assert counter.get_total_flops() == 2 * part.macs(5)


@pytest.mark.method("T-10")
def test_one_term_is_tucker_and_terms_of_rank_1_are_cp():
    tensor = torch.randn(5, 6, 7, dtype=torch.float64)
    core, factors, errors = tensors.fit_block_terms(tensor, 1, 3, sweeps=4)
    expected = numpy_hooi(array(tensor), (3, 3, 3), 4)
    np.testing.assert_allclose(
        np.einsum("abc,ia,jb,kc->ijk", array(core[0]), *(array(U[0]) for U in factors)), expected[-1], atol=1e-9
    )
    np.testing.assert_allclose(errors, [squared_error(made, array(tensor)) for made in expected], atol=1e-12)
    a, b, c = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64))[0] for n in (5, 6, 7))
    tilt = torch.tensor([[1, 0.3, 0.2], [0, 1, 0.3], [0, 0, 1]], dtype=torch.float64)  # components that are not orthogonal
    low = torch.einsum("ir,jr,kr->ijk", a @ tilt, b @ tilt, c @ tilt)
    core, factors, errors = tensors.fit_block_terms(low, 3, 1, sweeps=60)
    np.testing.assert_allclose(np.einsum("z,iz,jz,kz->ijk", array(core.flatten()), *(array(U[..., 0]).T for U in factors)),
                               array(low), atol=1e-3)  # fmt: skip
    assert errors[0] > 1e-2 and errors[-1] < 1e-6 and (np.diff(errors) < 1e-12).all()
    assert tensors.tucker_bounds(low, (1, 1, 1), 3)[0] < 1e-12 < tensors.tucker_bounds(low, (1, 1, 1), 2)[0]


@pytest.mark.method("T-10")
def test_block_term_layers_are_fits_of_their_matrices(tiny):
    W, dense = tiny.get_submodule(FIRST).weight.detach().clone(), bert.fresh_copy(tiny)
    start = tensors.block_term_layers(bert.fresh_copy(tiny), ("ffn_in",), terms=4, rank=3, sweeps=0)
    kept = tensors.block_term_layers(tiny, ("ffn_in",), terms=4, rank=3, sweeps=4)
    part, name = tiny.get_submodule(FIRST), f"{FIRST}.weight"
    tensor = tensors.tensorised(W, (4, 4, 4), (2, 4, 4))
    errors = tensors.fit_block_terms(tensor, 4, 3, 4)[2]
    assert kept[name] == pytest.approx(1 - errors[-1], abs=1e-5) and start[name] == pytest.approx(1 - errors[0], abs=1e-5)
    assert kept[name] > start[name] + 0.005 and torch.equal(part.bias, dense.get_submodule(FIRST).bias)
    assert sum(p.numel() for p in part.parameters()) - 64 == 4 * tensors.tucker_weights((8, 16, 16), (3, 3, 3))
    by_size = bert.fresh_copy(dense)
    tensors.block_term_layers(by_size, ("ffn_in",), rank=3, size=0.3, sweeps=0)
    assert by_size.get_submodule(FIRST).terms == int(0.3 * 2048 // (3 * 40 + 27))


# --- T-12 CP and Tucker across layers -------------------------------------------------------------------------------


def numpy_als(tensor: np.ndarray, factors, sweeps: int) -> list[float]:
    """Errors of alternating least squares on the explicit Khatri-Rao products, from given factors."""
    factors, errors = [array(factor) for factor in factors], []
    for _ in range(sweeps):
        for side in range(3):
            first, second = (factor for j, factor in enumerate(factors) if j != side)
            design = np.einsum("ir,jr->ijr", first, second).reshape(-1, first.shape[1])
            factors[side] = np.linalg.lstsq(design, numpy_unfold(tensor, side).T, rcond=None)[0].T
        errors.append(squared_error(np.einsum("ir,jr,kr->ijk", *factors), tensor))
    return errors


@pytest.mark.method("T-12")
def test_cp_is_alternating_least_squares_from_the_best_own_factors():
    tensor = torch.randn(3, 6, 8, dtype=torch.float64)
    start = tensors.largest_components(tensor, 7)
    factors, errors = tensors.fit_cp(tensor, 7, sweeps=4)
    singular = np.stack([np.linalg.svd(W, compute_uv=False) ** 2 for W in array(tensor)])
    assert errors[0] == pytest.approx(1 - np.sort(singular.flatten())[-7:].sum() / singular.sum())
    made = np.einsum("ir,jr,kr->ijk", *map(array, start))
    assert squared_error(made, array(tensor)) == pytest.approx(errors[0])
    np.testing.assert_allclose(errors[1:], numpy_als(array(tensor), start, 4), atol=1e-9)
    made = np.einsum("ir,jr,kr->ijk", *map(array, factors))
    assert squared_error(made, array(tensor)) == pytest.approx(errors[-1], abs=1e-10) and errors[-1] < errors[0] - 1e-3
    for factor in factors[1:]:
        torch.testing.assert_close(factor.norm(dim=0), torch.ones(7, dtype=torch.float64))
    least, most = tensors.cp_bounds(tensor, 7)
    assert least <= errors[-1] and most == pytest.approx(errors[0])
    errors = tensors.fit_cp(tensor[:1], 4, sweeps=2)[1]  # of a single matrix it is the SVD, and both bounds are its error
    assert errors == pytest.approx([singular[0][4:].sum() / singular[0].sum()] * 3)
    assert tensors.cp_bounds(tensor[:1], 4) == pytest.approx((errors[0], errors[0]))


@pytest.mark.method("T-12")
def test_equal_components_do_not_break_the_least_squares():
    matrix = torch.randn(5, 6, dtype=torch.float64)
    tensor = torch.stack([matrix, matrix, 2 * matrix])  # rank 5 at most, fitted with 9 components
    errors = tensors.fit_cp(tensor, 9, sweeps=3)[1]
    assert np.isfinite(errors).all() and errors[-1] < 1e-6 < errors[0]


@pytest.mark.method("T-12")
@pytest.mark.parametrize("change", [tensors.cp_layers, tensors.tucker_layers])
@pytest.mark.parametrize("joint", [False, True])
def test_layers_share_their_factors(change, joint, tiny, batch, tmp_path):
    names = ("query", "key", "ffn_out")
    dense = {m.name: m.weight.detach().clone() for m in bert.matrices(tiny, names)}
    before = costs.parameter_counts(tiny)["parameters"]
    ranks = {tensors.cp_layers: {"rank": 9}, tensors.tucker_layers: {"ranks": (2, 10, 12)}}[change]
    kept = change(tiny, names, **ranks, joint=joint, sweeps=2)
    kinds = [2, 2, 2] if not joint else [4, 2]
    shapes = [(32, 32), (32, 32), (32, 64)] if not joint else [(32, 32), (32, 64)]
    weights = [9 * (n + sum(shape)) if "rank" in ranks else tensors.tucker_weights((n, *shape), (2, 10, 12))
               for n, shape in zip(kinds, shapes, strict=True)]  # fmt: skip
    assert before - costs.parameter_counts(tiny)["parameters"] == sum(W.numel() for W in dense.values()) - sum(weights)
    artifacts.save(tiny, tmp_path / "m")
    for model in (tiny, artifacts.load(tmp_path / "m"), bert.fresh_copy(tiny)):
        first, second = (model.get_submodule(path) for path in QUERIES)
        other = model.get_submodule(QUERIES[0].replace("query", "key"))
        assert first.left is second.left and first.right is second.right and (first.left is other.left) == joint
        assert getattr(first, "core", None) is getattr(second, "core", None)
        for name, W in dense.items():
            made = model.get_submodule(name.removesuffix(".weight")).weight
            assert kept[name] == pytest.approx(replacing.kept(W, made), abs=1e-5)
    own = "scale" if "rank" in ranks else "mix"
    untied = bert.fresh_copy(tiny)
    untied.get_submodule(QUERIES[1]).left = nn.Parameter(first.left.detach().clone())
    for model in (tiny, untied):
        model(**inputs(batch)).logits.sum().backward()
    if not joint:
        apart = sum(untied.get_submodule(path).left.grad for path in QUERIES)
        torch.testing.assert_close(tiny.get_submodule(QUERIES[0]).left.grad, apart, atol=1e-5, rtol=1e-4)
    assert not torch.equal(*(getattr(tiny.get_submodule(path), own) for path in QUERIES))


@pytest.mark.method("T-12")
def test_stacks_hold_the_fits_of_their_tensors(tiny):
    W = torch.stack([tiny.get_submodule(path).weight.detach().clone() for path in QUERIES]).double()
    by_tucker, by_cp = bert.fresh_copy(tiny), bert.fresh_copy(tiny)
    tensors.tucker_layers(by_tucker, ("query",), (2, 10, 12), sweeps=2)
    tensors.cp_layers(by_cp, ("query",), 20, sweeps=3)
    found = [torch.stack([model.get_submodule(path).weight for path in QUERIES]) for model in (by_tucker, by_cp)]
    np.testing.assert_allclose(array(found[0]), numpy_hooi(array(W), (2, 10, 12), 2)[-1], atol=1e-5)
    factors, _ = tensors.fit_cp(W, 20, 3)
    np.testing.assert_allclose(array(found[1]), np.einsum("ir,jr,kr->ijk", *map(array, factors)), atol=1e-5)
    scales = torch.stack([by_cp.get_submodule(path).scale for path in QUERIES])
    torch.testing.assert_close(scales.square().mean(0), torch.ones(20))
    part = by_cp.get_submodule(QUERIES[0])
    torch.testing.assert_close(part.left.norm(dim=0), part.right.norm(dim=1))
    swept = {change: tensors.fit_cp(W, 20, 10)[1][-1] if change is tensors.cp_layers else tensors.fit_tucker(W, (2, 10, 12), 5)[2][-1]
             for change in (tensors.cp_layers, tensors.tucker_layers)}  # fmt: skip
    for change, ranks in ((tensors.cp_layers, 20), (tensors.tucker_layers, (2, 10, 12))):  # sweeps that nobody names
        change(model := bert.fresh_copy(tiny), ("query",), ranks)
        assert tensors.error_table(tiny, model)["error"].item() == pytest.approx(swept[change], rel=1e-5)


@pytest.mark.method("T-12")
def test_matrices_of_norm_1_count_alike_in_a_stack(tiny):
    large, small = (tiny.get_submodule(path) for path in QUERIES)
    large.weight.data *= 50
    W = torch.stack([large.weight.detach() / large.weight.norm(), small.weight.detach() / small.weight.norm()]).double()
    expected = numpy_hooi(array(W), (1, 10, 10), 3)[-1]
    model = bert.fresh_copy(tiny)
    kept = tensors.tucker_layers(model, ("query",), (1, 10, 10), sweeps=3, unit=True)
    for path, made, dense in zip(QUERIES, expected, (large, small), strict=True):
        norm = dense.weight.norm().item()
        np.testing.assert_allclose(array(model.get_submodule(path).weight) / norm, made, atol=1e-5)
    plain = tensors.tucker_layers(bert.fresh_copy(tiny), ("query",), (1, 10, 10), sweeps=3)
    name = f"{QUERIES[1]}.weight"  # the small matrix, which a squared error over both hardly sees
    assert plain[name] < 0.1 < kept[name]


@pytest.mark.method("T-12")
def test_how_many_matrices_a_component_serves_is_counted(tiny):
    with pytest.raises(ValueError, match="call cp_layers first"):
        tensors.matrices_of_a_component(tiny)
    started, swept = bert.fresh_copy(tiny), bert.fresh_copy(tiny)
    tensors.cp_layers(started, ("query",), 20, sweeps=0)
    tensors.cp_layers(swept, ("query",), 20, sweeps=3)
    assert tensors.matrices_of_a_component(started) == pytest.approx(1)
    assert tensors.matrices_of_a_component(swept) > 1.01
    for path, weights in zip(QUERIES, (torch.ones(20), torch.tensor([1.0] * 10 + [0.5] * 10)), strict=True):
        started.get_submodule(path).scale.data = weights
    assert tensors.matrices_of_a_component(started) == pytest.approx((2 + 1.25**2 / (1 + 0.5**4)) / 2)


@pytest.mark.method("T-12")
@pytest.mark.parametrize(("sides", "size"), [((3, 12, 12), 0.5), ((3, 24, 6), 0.6), ((6, 8, 8), 0.3)])
def test_tucker_ranks_by_brute_force(sides, size):
    alike = torch.randn(sides[1:]) + 0.3 * torch.randn(sides)  # the first side takes a lower rank than where none are alike
    for tensor in (torch.randn(sides).double(), alike.double()):
        energies = [np.linalg.svd(numpy_unfold(array(tensor), side), compute_uv=False) ** 2 for side in range(3)]
        ways, weights = [], size * math.prod(sides)
        for first, longest in itertools.product(range(1, sides[0] + 1), range(1, max(sides) + 1)):
            wanted = [first, *(math.ceil(side * longest / max(sides[1:])) for side in sides[1:])]
            way = [min(rank, math.prod(wanted) // rank) for rank in wanted]
            if tensors.tucker_weights(sides, way) <= weights:
                ways.append((sum(values[rank:].sum() for values, rank in zip(energies, way, strict=True)), way))
        found = tensors.tucker_ranks(tensor, weights)
        assert found == min(ways)[1]
        assert all(1 <= r <= min(side, math.prod(found) // r) for side, r in zip(sides, found, strict=True))
    with pytest.raises(ValueError, match="do not hold the smallest decomposition"):
        tensors.tucker_ranks(tensor, 3)


# --- errors and costs -----------------------------------------------------------------------------------------------


@pytest.mark.method("T-08", "T-10", "T-12")
@pytest.mark.parametrize("name", [name for name in MADE if "table" not in name])
def test_errors_lie_between_their_bounds(name, tiny):
    dense, before = bert.fresh_copy(tiny), costs.parameter_counts(tiny)["parameters"]
    kept = MADE[name](tiny)
    table = tensors.error_table(dense, tiny)
    assert (table["least"] <= table["error"] + 1e-6).all() and (table["error"] <= table["most"] + 1e-6).all()
    assert (table["error"] > 0.01).all() and table["matrices"].sum() == len(kept)
    replaced = table["matrices"] * [dense.get_submodule(path).weight.numel() for path in table.index]
    saved = ((1 - table["size"]) * replaced).sum()
    assert before - costs.parameter_counts(tiny)["parameters"] == pytest.approx(saved)
    if name == "train of two":  # one cut: TT-SVD is optimal
        np.testing.assert_allclose(table["least"], table["most"], rtol=1e-9)
    if len(table) == len(kept):
        np.testing.assert_allclose(sorted(table["error"]), sorted(1 - share for share in kept.values()), atol=1e-5)


@pytest.mark.method("T-08")
def test_the_cost_of_every_order_beside_the_dense_layer(tiny):
    tensors.tt_layers(tiny, ("ffn_in",), rank=7)
    part = tiny.get_submodule(FIRST)
    table = tensors.contraction_table(part, (1, 50))
    assert list(table.index) == ["left", "right", "rebuild"] and table.loc["rebuild", "per token"] == 64 * 32
    for order, row in table.iterrows():
        part.settle(order)
        assert row["1 tokens"] * 2048 == pytest.approx(part.macs(1)) and row["50 tokens"] * 50 * 2048 == pytest.approx(
            part.macs(50)
        )
    tensors.set_order(tiny, "auto")
    alone, shared = (costs.measured_macs(tiny, 9, many) / many for many in (1, 32))
    assert tensors.macs_in_batch(tiny, 9) == shared < alone == tensors.macs_in_batch(tiny, 9, 1)
    assert part.macs(50) == min(part.costs[order][0] + 50 * part.costs[order][1] for order in part.costs)
    tensors.set_order(tiny, "right")
    assert {p.order for p in tiny.modules() if isinstance(p, TensorLinear)} == {"right"}
    with pytest.raises(ValueError, match="have the orders auto, left, rebuild, right, got 'core into left'"):
        tensors.set_order(tiny, "core into left")
