"""Word tables in structured factors: scikit-learn's and scipy's solvers, numpy's SVD and least squares, closed forms, searches."""

import itertools
import warnings

import fresh
import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.cluster import KMeans
from sklearn.decomposition import dict_learning, sparse_encode
from torch import nn
from torch.nn.functional import mse_loss, normalize, one_hot
from torch.utils.flop_counter import FlopCounterMode

from utils import artifacts, bert, contract, costs, encodings, parts, tables
from utils.decomposition import codes
from utils.decomposition.codes import CodeTraining, Coding
from utils.parts.codes import BandedVectors, CompositionalVectors, DictionaryVectors, DigitVectors
from utils.parts.embeddings import SlimVectors

VOCABULARY, WIDTH = 100, 32
EVERY = torch.arange(VOCABULARY)


@pytest.fixture
def table() -> torch.Tensor:
    """100 vectors of width 32 in ten bunches."""
    generator = torch.Generator().manual_seed(3)
    middle = torch.randn(10, WIDTH, generator=generator)
    return middle.repeat_interleave(10, 0) + 0.5 * torch.randn(VOCABULARY, WIDTH, generator=generator)


@pytest.fixture
def counts() -> torch.Tensor:
    """How often each word occurs: no order by id, and with ties."""
    return torch.randint(0, 60, (VOCABULARY,), generator=torch.Generator().manual_seed(8))


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def error_of(vectors: nn.Module, table: torch.Tensor) -> float:
    return tables.reconstruction(vectors, table)["relative_error"]


def coded(table: torch.Tensor, atoms: int, places: int, coding: Coding | None = None) -> tuple[torch.Tensor, ...]:
    """A dictionary for all words' directions, and what it codes them with."""
    coding = coding or Coding(strength=0.2)
    dictionary, _, _ = codes.learn_dictionary(normalize(table), atoms, coding)
    return dictionary, *codes.code_words(table, dictionary, places, coding)


def sparse_part(table: torch.Tensor, atoms: int, places: int, coding: Coding | None = None) -> DictionaryVectors:
    coding = coding or Coding(strength=0.2)
    return codes.dictionary_vectors(table, *coded(table, atoms, places, coding), coding)


def binary_part(table: torch.Tensor, atoms: int, places: int, strength: float = 0.2) -> DictionaryVectors:
    return codes.binary_vectors(table, atoms, *coded(table, atoms, places, Coding(strength, nonnegative=True))[1:])


def codes_of(vectors: DictionaryVectors) -> torch.Tensor:
    """The codes of all words with their zeros, (vocabulary, atoms)."""
    index = vectors.index.long()
    values = (index < vectors.atoms).float() if vectors.binary else vectors.coefficients.float()
    return values.new_zeros(len(index), vectors.atoms + 1).scatter_add_(1, index, values)[:, : vectors.atoms]


# --- parts: the contract --------------------------------------------------------------------------------------------

MADE = {
    "T-03a": lambda table: sparse_part(table, 24, 4),
    "T-03b": lambda table: sparse_part(table, 24, 4, Coding(0.2, nonnegative=True)),
    "T-03c": lambda table: binary_part(table, 24, 4),
    "T-04": lambda table: codes.learn_codes(table, 4, 8, CodeTraining(steps=60, learning_rate=1e-2))[0],
    "T-04 control": lambda table: codes.additive_codes(table, 4, 8),
    "T-06": lambda table: codes.banded_vectors(table, (10, 30, 60), (32, 12, 4), EVERY),
    "T-06 narrow": lambda table: codes.banded_vectors(table, (20, 80), (12, 4)),
    "T-06 dense": lambda table: codes.banded_vectors(table, (VOCABULARY,), (WIDTH,)),
    "T-07": lambda table: codes.digit_vectors(table, 2),
    "T-07 renumbered": lambda table: codes.digit_vectors(table, 2, 12, torch.randperm(VOCABULARY)),
}
IDS = ("T-03a", "T-03b", "T-03c", "T-04", "T-06", "T-07")


@pytest.fixture(scope="module")
def made() -> dict[str, nn.Module]:
    """All of them, for a table of their own, in evaluation mode. Not to be changed: take `bert.fresh_copy`."""
    torch.manual_seed(0)
    vectors = {name: make(torch.randn(VOCABULARY, WIDTH)).eval() for name, make in MADE.items()}
    assert [type(part).__name__ for part in vectors.values()] == ["DictionaryVectors"] * 3 + ["CompositionalVectors"] * 2 + [
        "BandedVectors"
    ] * 3 + ["DigitVectors"] * 2
    return vectors


@pytest.mark.method(*IDS)
def test_every_table_comes_back_in_a_fresh_process(tiny, made, tmp_path):
    for name, vectors in made.items():
        model = bert.fresh_copy(tiny)
        tables.replace_table(model, bert.fresh_copy(vectors))
        path = tmp_path / f"{name}.safetensors"
        artifacts.save(model, path, tables.packed(model))
        contract.write(path, model, 7)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_a_table_is_what_it_says(name, tiny, made):
    vectors = bert.fresh_copy(made[name])
    ids = torch.tensor([[0, 3, 99], [3, 50, 0]])
    with torch.no_grad():
        torch.testing.assert_close(vectors(ids), vectors.expanded().weight[ids])
        torch.testing.assert_close(vectors.weight, vectors.expanded().weight)
    again = parts.build(vectors.kind, vectors.options())
    again.load_state_dict(vectors.state_dict())
    torch.testing.assert_close(again.weight, vectors.weight)
    tables.replace_table(tiny, vectors)
    for length in (1, 9):
        assert costs.macs(tiny, length, 2) == costs.measured_macs(tiny, length, 2)
    vectors.train()
    torch.testing.assert_close(vectors(ids), vectors.expanded().weight[ids])
    vectors(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in vectors.parameters())


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_padding_has_a_vector_that_no_sentence_sees(name, tiny, made, batch):
    vectors = bert.fresh_copy(made[name])
    tables.replace_table(tiny, vectors)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    other = inputs | {"input_ids": torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"])}
    torch.testing.assert_close(tiny(**inputs).logits, tiny(**other).logits)


@pytest.mark.method(*IDS)
@pytest.mark.parametrize(
    "kind, sizes, message",
    [
        (DictionaryVectors, (3, 4), "1 <= nonzeros <= atoms"),
        (DictionaryVectors, (3, 0), "1 <= nonzeros <= atoms"),
        (CompositionalVectors, (0, 4), "1 codebook or more"),
        (CompositionalVectors, (4, 0), "1 codebook or more"),
        (BandedVectors, ((50, 51), (32, 8)), "add up to 100"),
        (BandedVectors, ((100, 0), (32, 8)), "add up to 100"),
        (BandedVectors, ((50, 50), (32,)), "a width each"),
        (BandedVectors, ((), ()), "a width each"),
        (BandedVectors, ((50, 50), (32, 0)), "widths in 1..32"),
        (BandedVectors, ((50, 50), (33, 8)), "widths in 1..32"),
        (BandedVectors, ((10, 90), (11, 8)), "widths in 1..10, or 32"),
        (DigitVectors, (3, 5), "digits must divide the width 32"),
        (DigitVectors, (0, 100), "digits must divide"),
        (DigitVectors, (2, 9), "cannot tell 100 words apart"),
        (DigitVectors, (4, 300), "31 bits at most"),
        (DigitVectors, (2, 0), "cannot tell 100 words apart"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind, sizes, message):
    with pytest.raises(ValueError, match=message):
        kind(VOCABULARY, WIDTH, *sizes)


@pytest.mark.method(*IDS)
def test_numbers_that_are_not_finite_are_refused(table):
    table[7, 3] = torch.nan
    makers = (lambda t: codes.learn_dictionary(t, 8, Coding()), lambda t: codes.code_words(t, torch.eye(8, WIDTH), 2, Coding()),
              lambda t: codes.learn_codes(t, 2, 4), lambda t: codes.additive_codes(t, 2, 4),
              lambda t: codes.banded_vectors(t, (100,), (4,)), lambda t: codes.digit_vectors(t, 2))  # fmt: skip
    for make, wrong in itertools.product(makers, (table, table[0])):
        with pytest.raises(ValueError, match="matrix of finite numbers"):
            make(wrong)


# --- what the methods share -----------------------------------------------------------------------------------------


@pytest.mark.method("T-03c", "T-04")
def test_least_squares_of_ones_are_numpys_and_an_index_beyond_the_end_is_none(table):
    index = torch.stack([torch.randperm(9)[:3] for _ in range(VOCABULARY)])  # of 8 places, and none
    design = np.concatenate([one_hot(index, 9).sum(1)[:, :8].numpy(), 0.1**0.5 * np.eye(8)])
    wanted = np.concatenate([array(table), np.zeros((8, WIDTH))])
    expected = np.linalg.lstsq(design, wanted, rcond=None)[0]
    np.testing.assert_allclose(array(codes.binary_least_squares(index, table, 8, 0.1)), expected, atol=1e-5)


@pytest.mark.method(*IDS)
def test_no_table_comes_nearer_than_its_bound(made):
    torch.manual_seed(0)
    wanted = torch.randn(VOCABULARY, WIDTH)  # what `made` was made for in its first draw: any table will do
    report = codes.error_table({name: bert.fresh_copy(vectors) for name, vectors in made.items()}, wanted)
    assert (report["error"] >= report["bound"] - 1e-6).all() and report.loc["T-06 dense", "bound"] == 0
    assert report.loc["T-03a", "bound"] == pytest.approx(tail(wanted, 24), rel=1e-5)
    few = codes.additive_codes(wanted, 2, 8)
    assert codes.least_error(few, wanted) == pytest.approx(tail(wanted - wanted.mean(0), 14, wanted), rel=1e-5)
    number = 88 + 4 * 128  # 7 bits a number, and what they count
    assert report.loc["T-07", "megabytes"] == pytest.approx((4 * 10 * WIDTH + number) / 1e6)
    assert report.loc["T-04", "megabytes"] == pytest.approx((4 * 4 * 8 * WIDTH + VOCABULARY * 4 * 3 / 8 + 4 * 8) / 1e6)
    with pytest.raises(ValueError, match="got SlimVectors"):
        codes.least_error(SlimVectors(VOCABULARY, WIDTH, 4, 40), wanted)


def tail(matrix: torch.Tensor, rank: int, whole: torch.Tensor | None = None) -> float:
    """What a truncated SVD leaves out, as a share of the sum of squares of `whole`."""
    singular = np.linalg.svd(array(matrix), compute_uv=False)
    return float((singular[rank:] ** 2).sum() / (array(matrix if whole is None else whole) ** 2).sum())


@pytest.mark.method("T-04")
def test_reverse_water_filling_on_spectra_that_can_be_done_by_hand():
    square = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))  # covariance 1, mean 0
    for bits in (0, 2, 7):
        assert codes.gaussian_error(square, bits) == pytest.approx(2 ** (-2 * bits / 4), rel=1e-5)
    flat = square * torch.tensor([4.0, 1.0, 1.0, 1.0])  # variances 16, 1, 1, 1
    assert codes.gaussian_error(flat, 1) == pytest.approx((4 + 3) / 19)  # one bit, all for the first: 16 / 4
    assert codes.gaussian_error(flat, 2) == pytest.approx(4 / 19)  # the second bit brings it down to the others
    assert codes.gaussian_error(flat, 4) == pytest.approx(2 / 19)  # and half a bit each halves them all
    assert codes.gaussian_error(flat + 3, 0) == pytest.approx(19 / (19 + 36))  # the mean is not coded
    with pytest.raises(ValueError, match="0 bits or more"):
        codes.gaussian_error(square, -1)


# --- T-03 sparse coding ---------------------------------------------------------------------------------------------

LONG = {"iterations": 3000, "ridge": 0.0}


@pytest.mark.method("T-03a", "T-03b")
@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("atoms", [6, 20])
def test_sparse_codes_are_sklearns_lasso(atoms, nonnegative):
    dictionary, targets = normalize(torch.randn(atoms, 12).double()), torch.randn(5, 12).double()
    found = codes.sparse_codes(targets, dictionary, Coding(strength=0.8, nonnegative=nonnegative, **LONG))
    expected = sparse_encode(targets.numpy(), dictionary.numpy(), algorithm="lasso_cd", alpha=0.4, max_iter=100_000,
                             positive=nonnegative)  # fmt: skip
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)
    slope = 2 * (found @ dictionary - targets) @ dictionary.T  # where a code is 0 the slope is less than the penalty's
    torch.testing.assert_close(slope[found > 0], torch.full_like(slope[found > 0], -0.8), atol=1e-6, rtol=0)
    assert (slope[found == 0] >= -0.8 - 1e-6).all() and (found == 0).any() and (found > 0).any()
    assert (found >= 0).all() == nonnegative


@pytest.mark.method("T-03a")
def test_with_orthonormal_atoms_a_code_is_the_shrunk_projection_after_one_step_and_goes_on_from_a_start():
    atoms = torch.linalg.qr(torch.randn(12, 5))[0].T
    targets = torch.randn(4, 12)
    projected = targets @ atoms.T
    expected = projected.sign() * (projected.abs() - 0.3).clamp(min=0)
    torch.testing.assert_close(codes.sparse_codes(targets, atoms, Coding(strength=0.6, iterations=1)), expected)
    again = codes.sparse_codes(targets, atoms, Coding(strength=0.6, iterations=1), expected + 1)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    value = codes.coding_objective(targets, expected, atoms, Coding(strength=0.6, ridge=0.5))
    by_hand = (targets - expected @ atoms).square().sum() + 0.6 * expected.abs().sum() + 0.5 * 5
    assert value == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.method("T-03a")
def test_momentum_saves_iterations():
    atoms, targets = normalize(torch.randn(30, 12) + 1.0), torch.randn(20, 12)
    coding = Coding(strength=0.1, iterations=200, ridge=0.0)
    fast = codes.coding_objective(targets, codes.sparse_codes(targets, atoms, coding), atoms, coding)
    slow, step = torch.zeros(20, 30), 1 / (2 * torch.linalg.matrix_norm(atoms, 2) ** 2)
    for _ in range(200):
        slow = codes.shrink(slow - step * 2 * (slow @ atoms - targets) @ atoms.T, step * 0.1, False)
    best = codes.coding_objective(targets, codes.sparse_codes(targets, atoms, Coding(strength=0.1, **LONG)), atoms, coding)
    assert fast - best < 0.2 * (codes.coding_objective(targets, slow, atoms, coding) - best)


@pytest.mark.method("T-03a")
def test_atoms_move_to_ridge_regression_or_stop_at_length_one():
    targets, weights = 0.1 * torch.randn(40, 12).double(), torch.randn(40, 6).double()
    weights[:, 4] = 0  # an atom that no code uses stays
    start = normalize(torch.randn(6, 12).double())
    dictionary = start
    for _ in range(300):
        dictionary = codes.improved_dictionary(targets, weights, dictionary, 0.5)
    used = [0, 1, 2, 3, 5]
    A = weights[:, used]
    expected = torch.linalg.solve(A.T @ A + 0.5 * torch.eye(5), A.T @ targets)
    torch.testing.assert_close(dictionary[used], expected)
    torch.testing.assert_close(dictionary[4], start[4])
    one = codes.improved_dictionary(100 * targets, weights[:, :1], start[:1], 0.5)
    torch.testing.assert_close(one[0], normalize(weights[:, 0] @ targets, dim=0))
    many = codes.improved_dictionary(100 * targets, weights, start, 0.0)
    torch.testing.assert_close(many[used].norm(dim=1), torch.ones(5).double())


@pytest.mark.method("T-03a")
def test_idle_atoms_start_anew_at_the_worst_words():
    dictionary, targets = torch.eye(4, 6), torch.randn(8, 6)
    weights = torch.zeros(8, 4)
    weights[:, 1] = targets[:, 1]
    moved, idle = codes.restarted(targets, weights, dictionary)
    left = targets.clone()
    left[:, 1] = 0
    worst = left.square().sum(1).argsort(descending=True)[:3]
    assert idle == 3
    torch.testing.assert_close(moved[1], dictionary[1])
    torch.testing.assert_close(moved[[0, 2, 3]], normalize(targets[worst]))


@pytest.mark.method("T-03a")
def test_a_dictionary_is_found_again_and_as_good_as_sklearns():
    atoms = normalize(torch.randn(10, 16))
    weights = torch.zeros(300, 10).scatter_(1, torch.rand(300, 10).topk(2).indices, 1 + torch.rand(300, 2))
    targets = weights @ atoms
    coding = Coding(strength=0.3, rounds=40, iterations=60)
    found, made_of, log = codes.learn_dictionary(targets, 10, coding)
    assert (found @ atoms.T).abs().amax(0).min() > 0.99
    objective = [entry["objective"] for entry in log]
    assert all(later <= before + 1e-4 for before, later in itertools.pairwise(objective)) and objective[-1] < 0.7 * objective[0]
    assert objective[-1] * 300 >= codes.coding_objective(targets, made_of, found, coding) - 1e-3
    assert log[-1]["nonzeros"] == pytest.approx((made_of != 0).sum().item() / 300, rel=0.05)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:10]
    start = normalize(targets[order]).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, directions, _ = dict_learning(targets.numpy(), 10, alpha=0.15, max_iter=40, method="cd", random_state=0,
                                              dict_init=start, code_init=np.zeros((300, 10)))  # fmt: skip
    other = codes.coding_objective(targets, torch.tensor(theirs).float(), torch.tensor(directions).float(), coding)
    assert objective[-1] * 300 < 1.01 * other
    kept, _, none = codes.learn_dictionary(targets, 10, Coding(rounds=0))
    assert none == [] and np.allclose(kept.numpy(), start)
    for number in (0, 301):
        with pytest.raises(ValueError, match="has 1 to 300 atoms"):
            codes.learn_dictionary(targets, number, coding)


@pytest.mark.method("T-03a")
def test_the_papers_objective_alone_prefers_long_atoms(table):
    coding = Coding(strength=0.5, rounds=2)
    dictionary, weights, _ = codes.learn_dictionary(normalize(table), 24, coding)
    long = codes.coding_objective(normalize(table), weights / 10, 10 * dictionary, coding)
    assert long < codes.coding_objective(normalize(table), weights, dictionary, coding)


@pytest.mark.method("T-03a", "T-03b", "T-03c")
def test_words_are_coded_by_the_largest_entries_of_their_directions_codes(table, monkeypatch):
    monkeypatch.setattr(codes, "CHUNK", 30)  # the last chunk is shorter
    coding = Coding(strength=0.2)
    dictionary, _, _ = codes.learn_dictionary(normalize(table), 24, coding)
    index, entries = codes.code_words(3 * table, dictionary, 4, coding)
    whole = codes.sparse_codes(normalize(table), dictionary, coding)
    expected = np.take_along_axis(whole.numpy(), np.argsort(-whole.abs().numpy(), 1, kind="stable")[:, :4], 1)
    np.testing.assert_allclose(entries.numpy(), expected, atol=1e-5)
    torch.testing.assert_close(whole.gather(1, index), entries, atol=1e-5, rtol=1e-5)
    for places in (0, 25):
        with pytest.raises(ValueError, match="has 1 to 24 places"):
            codes.code_words(table, dictionary, places, coding)


@pytest.mark.method("T-03a", "T-03b")
@pytest.mark.parametrize("nonnegative", [False, True])
def test_kept_entries_are_found_again_by_least_squares(nonnegative):
    dictionary, targets = normalize(torch.randn(9, 12)), torch.randn(6, 12)
    index = torch.stack([torch.randperm(9)[:4] for _ in range(6)])
    start = torch.rand(6, 4) + 0.1
    start[2, 1] = 0
    found = codes.refitted(targets, dictionary, index, start, Coding(nonnegative=nonnegative, iterations=300))
    assert found[2, 1] == 0 and start[2, 0] > 0
    for row in range(6):
        kept = start[row] != 0
        design = array(dictionary[index[row][kept]].T)
        expected = (
            nnls(design, array(targets[row]))[0] if nonnegative else np.linalg.lstsq(design, array(targets[row]), rcond=None)[0]
        )
        np.testing.assert_allclose(found[row][kept].numpy(), expected, atol=1e-4)


def mixed(nonzeros: int, negative: bool) -> torch.Tensor:
    """Words of length 1 to 3 that are mixtures of the first 20."""
    atoms = torch.linalg.qr(torch.randn(WIDTH, 20))[0].T
    weights = torch.zeros(VOCABULARY, 20).scatter_(
        1, torch.rand(VOCABULARY, 20).topk(nonzeros).indices, 0.5 + torch.rand(VOCABULARY, nonzeros)
    )
    weights[:20] = torch.eye(20)
    weights = weights * (torch.randint(0, 2, weights.shape) * 2 - 1) if negative else weights
    return (1 + 2 * torch.rand(VOCABULARY, 1)) * (weights @ atoms)


@pytest.mark.method("T-03a", "T-03b")
@pytest.mark.parametrize("nonnegative", [False, True])
def test_words_that_are_mixtures_of_few_atoms_are_coded_by_them(nonnegative):
    mixtures = mixed(2, not nonnegative)
    coding = Coding(strength=0.1, nonnegative=nonnegative, rounds=60, iterations=60)
    vectors = sparse_part(mixtures, 20, 2, coding)
    assert error_of(vectors, mixtures) < 0.03
    assert not nonnegative or (vectors.coefficients >= 0).all()
    assert nonnegative or (vectors.coefficients < 0).any()
    lengths = mixtures.norm(dim=1)
    direction = sparse_part(normalize(mixtures), 20, 2, coding)
    torch.testing.assert_close(direction.index, vectors.index)  # the penalty does not depend on a word's length
    torch.testing.assert_close(direction.coefficients * lengths.unsqueeze(1), vectors.coefficients.float(), atol=2e-3, rtol=2e-3)
    dense = codes_of(vectors)
    assert dense.shape == (VOCABULARY, 20) and (dense != 0).sum(1).max() <= 2
    torch.testing.assert_close(dense @ vectors.dictionary, vectors.weight)


@pytest.mark.method("T-03a")
def test_a_learned_dictionary_beats_random_words_and_learns_on_alone(table):
    errors = [error_of(sparse_part(table, 12, 3, Coding(0.2, rounds=rounds)), table) for rounds in (0, 10)]
    assert errors[1] < 0.9 * errors[0]
    vectors = sparse_part(table, 12, 3)
    assert [name for name, _ in vectors.named_parameters()] == ["dictionary"]
    mse_loss(vectors(EVERY), table, reduction="sum").backward()
    dense = codes_of(vectors)
    torch.testing.assert_close(vectors.dictionary.grad, 2 * dense.T @ (vectors.weight.detach() - table), atol=1e-3, rtol=1e-3)
    for wrong in ({"strength": -1.0}, {"ridge": -1.0}, {"iterations": 0}, {"rounds": -1}):
        with pytest.raises(ValueError, match="are 0 or more"):
            Coding(**wrong)


@pytest.mark.method("T-03c")
def test_binary_codes_are_ones_where_the_nonnegative_code_is_positive(table):
    coding = Coding(strength=0.4, nonnegative=True)
    dictionary, index, entries = coded(table, 24, 6, coding)
    vectors = codes.binary_vectors(table, 24, index, entries)
    ones = codes_of(vectors)
    assert set(ones.unique().tolist()) == {0.0, 1.0} and vectors.coefficients is None
    whole = torch.zeros(VOCABULARY, 24).scatter_(1, index, entries)
    torch.testing.assert_close(ones, (whole > 0).float())
    assert ones.sum(1).min() < 6 and (vectors.index == 24).any()  # a short code has places that hold none
    expected = np.linalg.lstsq(ones.numpy(), array(table), rcond=None)[0]
    np.testing.assert_allclose(array(vectors.weight), ones.numpy() @ expected, atol=1e-3)
    positive = codes.dictionary_vectors(table, dictionary, index, entries, coding)
    assert vectors.choices() == {"index": 25} and tables.stored_bytes(vectors) < tables.stored_bytes(positive)


@pytest.mark.method("T-03a", "T-03b")
def test_dimensions_are_read_by_their_strongest_words(table):
    weights = torch.zeros(VOCABULARY, 3)
    weights[[4, 8, 15], 0] = torch.tensor([1.0, 3.0, 2.0])
    weights[[0, 1, 2, 3], 2] = torch.tensor([4.0, 3.0, 2.0, -9.0])
    words = codes.strongest_words(weights, [f"w{i}" for i in range(VOCABULARY)], [2, 0], k=3)
    assert words.loc[0].tolist() == ["w8", "w15", "w4"] and words.loc[2].tolist() == ["w0", "w1", "w2"]
    found = codes.coherence(weights, table, k=3)  # the second dimension has no words
    pairs = [[(4, 8), (4, 15), (8, 15)], [(0, 1), (0, 2), (1, 2)]]
    unit = normalize(table, dim=1)
    expected = [sum(float(unit[i] @ unit[j]) for i, j in three) / 3 for three in pairs]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


# --- T-04 compositional codes ---------------------------------------------------------------------------------------


@pytest.mark.method("T-04")
def test_gumbel_softmax_is_torchs_and_chooses_as_often_as_a_softmax():
    scores = torch.randn(5, 3, 4)
    torch.manual_seed(1)
    mine = codes.gumbel_softmax(scores, 0.7)
    torch.manual_seed(1)
    torch.testing.assert_close(mine, nn.functional.gumbel_softmax(scores, tau=0.7))
    for noise in (1.0, 0.4):
        many = codes.gumbel_softmax(scores[0, 0].expand(20_000, -1), 1.0, noise)
        shares = torch.bincount(many.argmax(-1), minlength=4) / 20_000
        torch.testing.assert_close(shares, (scores[0, 0] / noise).softmax(-1), atol=0.015, rtol=0)
    assert codes.gumbel_softmax(scores, 0.01).amax(-1).mean() > 0.98 > mine.amax(-1).mean()


@pytest.mark.method("T-04")
def test_the_autoencoder_is_the_papers_formula():
    learner = codes.CodeLearner(8, 3, 4)
    assert learner.hidden.out_features == 6 and all(p.abs().max() <= 0.01 for p in learner.parameters())
    for parameter in learner.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 8)
    h = np.tanh(array(x) @ array(learner.hidden.weight).T + array(learner.hidden.bias))
    expected = np.log(np.log1p(np.exp(h @ array(learner.choice.weight).T + array(learner.choice.bias))))
    np.testing.assert_allclose(array(learner.scores(x)).reshape(5, 12), expected, atol=1e-4)
    made, chosen = learner(x, 1.0)
    torch.testing.assert_close(made, torch.einsum("nmk,mkd->nd", chosen, learner.codebooks), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chosen.sum(-1), torch.ones(5, 3))


def sums(books: int = 2, count: int = 4, noise: float = 0.02) -> torch.Tensor:
    """100 words that are sums of an entry from each codebook, nearly."""
    generator = torch.Generator().manual_seed(6)
    parts_of = torch.randn(books, count, WIDTH, generator=generator)
    chosen = torch.randint(count, (VOCABULARY, books), generator=generator)
    whole = sum(parts_of[book][chosen[:, book]] for book in range(books))
    return whole + noise * torch.randn(VOCABULARY, WIDTH, generator=generator)


@pytest.mark.method("T-04")
def test_codes_are_learned_by_the_autoencoder_and_codebooks_can_be_fitted_to_them():
    table = sums()
    training = CodeTraining(steps=400, learning_rate=1e-2, batch_size=64)
    state = torch.get_rng_state()
    vectors, log = codes.learn_codes(table, 2, 8, training)
    assert torch.equal(state, torch.get_rng_state()) and [entry["step"] for entry in log] == [80, 160, 240, 320, 400]
    assert log[-1]["loss"] < 0.2 * log[0]["loss"] < 0.2 * WIDTH and log[-1]["certainty"] > 0.8  # of entries of size 1
    assert log[0]["moved"] > 0.4 > 0.1 > log[-1]["moved"]  # codes come to rest
    before = error_of(vectors, table)
    assert before < 0.3
    again = codes.learn_codes(100 * table, 2, 8, training)[0]  # the scale of a table changes nothing else
    torch.testing.assert_close(again.codes, vectors.codes)
    torch.testing.assert_close(again.codebooks, 100 * vectors.codebooks, atol=1.0, rtol=0.05)
    codes.fit_codebooks(vectors, table)
    assert error_of(vectors, table) <= before
    untrained, nothing = codes.learn_codes(table, 2, 8, CodeTraining(steps=0))
    codes.fit_codebooks(untrained, table)
    assert nothing == [] and error_of(untrained, table) > 1.3 * error_of(vectors, table)


@pytest.mark.method("T-04")
def test_the_codes_are_the_largest_scores_and_what_moved_is_counted(table):
    learner = codes.CodeLearner(WIDTH, 3, 4)
    for parameter in learner.parameters():
        nn.init.normal_(parameter)
    before = codes.chosen_codes(learner, table)
    expected = [[int(np.argmax(array(learner.scores(row.unsqueeze(0)))[0, book])) for book in range(3)] for row in table]
    assert before.tolist() == expected
    log = codes.train_learner(learner, table, CodeTraining(steps=3, learning_rate=0.3, batch_size=16, looks=1))
    after = codes.chosen_codes(learner, table)
    assert len(log) == 1 and log[0]["moved"] == pytest.approx((after != before).float().mean().item()) and log[0]["moved"] > 0


@pytest.mark.method("T-04")
def test_fitted_codebooks_are_the_smallest_least_squares(table):
    vectors = CompositionalVectors(VOCABULARY, WIDTH, 3, 4)
    vectors.codes.copy_(torch.randint(4, (VOCABULARY, 3)))
    codes.fit_codebooks(vectors, table)
    design = array(one_hot(vectors.codes.long(), 4).flatten(1))
    expected = np.linalg.lstsq(design, array(table), rcond=None)[0]  # numpy takes the smallest, too
    np.testing.assert_allclose(array(vectors.codebooks.flatten(0, 1)), expected, atol=1e-3)


@pytest.mark.method("T-04")
def test_kmeans_is_sklearns_from_the_groups_of_random_directions(table):
    directions = torch.randn(WIDTH, 6, generator=torch.Generator().manual_seed(2))
    group = (table @ directions).argmax(1)
    start = torch.stack([table[group == number].mean(0) for number in range(6)])
    torch.testing.assert_close(codes.kmeans(table, 6, 1, seed=2), start)
    theirs = KMeans(6, init=start.numpy(), n_init=1, max_iter=300, algorithm="lloyd", tol=0).fit(table.numpy())
    np.testing.assert_allclose(codes.kmeans(table, 6, 300, seed=2).numpy(), theirs.cluster_centers_, atol=1e-4)
    empty = codes.kmeans(torch.zeros(5, 3), 2)
    torch.testing.assert_close(empty, torch.zeros(2, 3))


@pytest.mark.method("T-04")
def test_the_control_is_residual_quantization(table):
    vectors = codes.additive_codes(table, 3, 8)
    item = encodings.residual(vectors.codes.T.long(), vectors.codebooks.detach(), table.shape, 3)
    torch.testing.assert_close(encodings.decode(item), vectors.weight.detach())
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    left = table.clone()
    for place, book in enumerate(vectors.codebooks.detach()):
        torch.testing.assert_close(book, codes.kmeans(left[order], 8, seed=place), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vectors.codes[:, place].long(), torch.cdist(left, book).argmin(1))
        left = left - book[vectors.codes[:, place].long()]
    assert left.square().sum() < 0.5 * table.square().sum()
    before = error_of(vectors, table)
    codes.fit_codebooks(vectors, table)
    assert error_of(vectors, table) < before
    few = codes.additive_codes(table, 2, 8, sample=20)
    assert len(few.codes.unique(dim=0)) > 8 and error_of(few, table) > error_of(codes.additive_codes(table, 2, 8), table)
    with pytest.raises(ValueError, match="the sample has 20"):
        codes.additive_codes(table, 2, 21, sample=20)


@pytest.mark.method("T-04")
def test_how_a_code_is_used_is_counted_and_words_with_equal_codes_are_found():
    vectors = CompositionalVectors(4, 8, 2, 4)
    vectors.codes.copy_(torch.tensor([[0, 1], [1, 1], [2, 1], [2, 1]]))
    found = codes.code_usage(vectors)
    assert found == pytest.approx({"entropy": (0.25 * 2 + 0.25 * 2 + 0.5) / 2, "used": 0.5, "distinct": 0.5})
    assert codes.similar_codes(vectors, 2, torch.tensor([0, 2, 3]), k=2) == [(3, 2), (0, 1)]


# --- T-06 differentiated softmax ------------------------------------------------------------------------------------


@pytest.mark.method("T-06")
def test_one_band_is_the_dense_table_or_its_truncated_svd(table, counts):
    dense = codes.banded_vectors(table, (VOCABULARY,), (WIDTH,), counts)
    assert torch.equal(dense.weight, table) and dense.word_macs() == 0 and dense.up is None
    states = torch.randn(3, WIDTH)
    torch.testing.assert_close(codes.band_logits(dense, states), states @ table.T)
    narrow = codes.banded_vectors(table, (VOCABULARY,), (5,))
    U, S, Vh = np.linalg.svd(array(table), full_matrices=False)
    np.testing.assert_allclose(array(narrow.weight), (U[:, :5] * S[:5]) @ Vh[:5], atol=1e-4)
    torch.testing.assert_close(narrow.tables[0].norm(dim=0), narrow.up.norm(dim=1))  # both factors have their share


@pytest.mark.method("T-06")
def test_words_are_ordered_by_frequency_and_each_band_is_its_own_svd(table, counts):
    rows = codes.frequency_rows(torch.tensor([3, 9, 9, 0]))
    assert rows.tolist() == [2, 0, 1, 3]
    vectors = codes.banded_vectors(table, (10, 30, 60), (WIDTH, 8, 2), counts)
    order = sorted(range(VOCABULARY), key=lambda word: (-counts[word].item(), word))
    assert torch.equal(vectors.row.long(), codes.frequency_rows(counts)) and vectors.row.long().argsort().tolist() == order
    weighted = codes.banded_vectors(table, (VOCABULARY,), (5,), counts, weighted=True).weight.detach()
    root = np.sqrt(array(counts) + 1)[:, None]
    U, S, Vh = np.linalg.svd(root * array(table), full_matrices=False)
    np.testing.assert_allclose(array(weighted), (U[:, :5] * S[:5]) @ Vh[:5] / root, atol=1e-4)
    with pytest.raises(ValueError, match="their counts are needed"):
        codes.banded_vectors(table, (VOCABULARY,), (5,), weighted=True)
    made = vectors.weight.detach()
    torch.testing.assert_close(made[order[:10]], table[order[:10]])
    for words, width in ((order[10:40], 8), (order[40:], 2)):
        U, S, Vh = np.linalg.svd(array(table[words]), full_matrices=False)
        np.testing.assert_allclose(array(made[words]), (U[:, :width] * S[:width]) @ Vh[:width], atol=1e-4)
    blocks = torch.block_diag(*vectors.tables[1:])  # the paper's matrix: a block per band
    torch.testing.assert_close(made[order[10:]], (blocks @ vectors.up).detach(), atol=1e-5, rtol=1e-5)
    assert error_of(vectors, table) == pytest.approx(codes.least_error(vectors, table), rel=1e-4)


@pytest.mark.method("T-06")
@pytest.mark.parametrize("widths", [(WIDTH, 8, 2), (16, WIDTH, 4), (12, 8, 2)])
def test_the_banded_output_layer_is_the_dense_product_at_its_price(table, counts, widths):
    vectors, states = codes.banded_vectors(table, (20, 40, 40), widths, counts), torch.randn(2, 3, WIDTH)
    with FlopCounterMode(display=False) as counter:
        logits = codes.band_logits(vectors, states)
    torch.testing.assert_close(logits, states @ vectors.weight.T, atol=1e-4, rtol=1e-4)
    narrow = sum(width for width in widths if width < WIDTH)
    expected = sum(size * width for size, width in zip((20, 40, 40), widths, strict=True)) + narrow * WIDTH
    assert sum(p.numel() for p in vectors.parameters()) == expected and counter.get_total_flops() == 2 * 6 * expected


@pytest.mark.method("T-06")
def test_the_report_of_the_bands_adds_up(table, counts):
    vectors = codes.banded_vectors(table, (10, 30, 60), (WIDTH, 8, 2), counts)
    report = codes.band_report(vectors, table, counts)
    assert report["tokens"].sum() == pytest.approx(1) and report["numbers"].sum() == pytest.approx(1)
    descending = counts.sort(descending=True).values
    assert report.loc[1, "tokens"] == pytest.approx((descending[:10].sum() / counts.sum()).item())
    assert report.loc[2, "numbers"] == pytest.approx((30 * 8 + 8 * WIDTH) / (10 * WIDTH + 30 * 8 + 60 * 2 + 10 * WIDTH))
    assert report.loc[1, "error"] == report.loc[1, "bound"] == 0
    np.testing.assert_allclose(report["error"], report["bound"], rtol=1e-3, atol=1e-9)
    with torch.no_grad():
        vectors.tables[2].mul_(2)
    assert codes.band_report(vectors, table, counts).loc[3, "error"] > 1.1 * report.loc[3, "error"]


# --- T-07 WEST ------------------------------------------------------------------------------------------------------


@pytest.mark.method("T-07")
def test_digits_are_those_of_the_number_and_the_table_is_sparse_times_block_diagonal(table):
    vectors = codes.digit_vectors(table, 4, 4)
    assert vectors.codes(torch.tensor([0, 27, 99])).tolist() == [[0, 0, 0, 0], [3, 2, 1, 0], [3, 0, 2, 1]]  # 27 = 3 + 2*4 + 1*16
    numbers = torch.randperm(VOCABULARY)
    renumbered = codes.digit_vectors(table, 4, 4, numbers)
    assert torch.equal(renumbered.codes(EVERY), vectors.codes(numbers))
    for part in (vectors, renumbered):
        B, D = codes.west_matrices(part)
        assert ((B != 0).sum(1) == 4).all() and B.shape == (VOCABULARY, 16) and set(B.unique().tolist()) == {0.0, 1.0}
        outside = 1 - torch.block_diag(*[torch.ones(4, 8)] * 4)
        assert not (D * outside).any() and D.shape == (16, WIDTH)
        torch.testing.assert_close(B @ D, part.weight.detach())
    spread = codes.digit_vectors(table, 4, 4, 2 * EVERY + 1)  # any numbers of four digits will do
    assert torch.equal(spread.codes(EVERY), torch.stack([(2 * EVERY + 1) // 4**place % 4 for place in range(4)], 1))
    for wrong in (torch.zeros(VOCABULARY, dtype=torch.long), EVERY + 157, EVERY - 1):
        with pytest.raises(ValueError, match="from 0 to 255, one each"):
            codes.digit_vectors(table, 4, 4, wrong)


@pytest.mark.method("T-07")
def test_the_same_form_with_random_sub_units_is_slim_embeddings(table):
    vectors, slim = codes.digit_vectors(table, 2, 20), SlimVectors(VOCABULARY, WIDTH, 2, 40, seed=4)
    slim.codes.copy_(vectors.codes(EVERY) + torch.tensor([0, 20]))
    slim.load_state_dict({"pool": vectors.blocks.detach().flatten(0, 1)})
    assert torch.equal(slim.weight, vectors.weight)


@pytest.mark.method("T-07")
def test_blocks_begin_as_least_squares(table):
    for numbers in (None, torch.randperm(VOCABULARY)):
        vectors = codes.digit_vectors(table, 2, numbers=numbers)
        design = array(one_hot(vectors.codes(EVERY), 10).double())
        for place in range(2):
            block = array(table[:, 16 * place : 16 * place + 16])
            expected = np.linalg.lstsq(design[:, place], block, rcond=None)[0]
            np.testing.assert_allclose(array(vectors.blocks[place]), expected, atol=1e-5)
        assert error_of(vectors, table) == pytest.approx(codes.least_error(vectors, table), rel=1e-5)
    assert not codes.digit_vectors(table, 2, 12).blocks[1, 9:].any()  # no word has the digits 9 to 11 there


@pytest.mark.method("T-07")
def test_random_digits_keep_what_chance_says_and_ids_in_bunches_more(table):
    report = codes.digit_report(codes.digit_vectors(table, 2), table)
    assert report["digits"].tolist() == [10, 10]
    np.testing.assert_allclose(report["chance"], 9 / 99)
    block = array(table[:, 16:])
    means = block.reshape(10, 10, 16).mean(1)  # the second digit names the bunch
    expected = 10 * ((means - block.mean(0)) ** 2).sum() / ((block - block.mean(0)) ** 2).sum()
    assert report.loc[1, "kept"] == pytest.approx(expected, rel=1e-5) and report.loc[1, "kept"] > 0.6
    kept = [codes.digit_report(codes.digit_vectors(table, 2, numbers=torch.randperm(VOCABULARY)), table)["kept"].mean()
            for _ in range(40)]  # fmt: skip
    assert np.mean(kept) == pytest.approx(9 / 99, rel=0.05)


@pytest.mark.method("T-07")
def test_sorted_numbers_follow_the_main_direction_of_each_half():
    low, high = torch.randn(VOCABULARY), torch.randn(VOCABULARY)
    plane = torch.linalg.qr(torch.randn(WIDTH // 2, 3))[0].T
    halves = [x.unsqueeze(1) * plane[:1] + 0.01 * torch.randn(VOCABULARY, 2) @ plane[1:] + 5 for x in (low, high)]
    table = torch.cat(halves, 1)
    digits = codes.digit_vectors(table, 2, numbers=codes.sorted_numbers(table, 10)).codes(EVERY)
    rank = high.argsort().argsort() // 10
    assert torch.equal(digits[:, 1], rank) or torch.equal(digits[:, 1], 9 - rank)  # a direction has no sign
    signs = set()
    for digit in range(10):
        bunch = digits[:, 1] == digit
        own = low[bunch].argsort().argsort()
        signs |= {name for name, order in (("up", own), ("down", 9 - own)) if torch.equal(digits[bunch, 0], order)}
    assert len(signs) == 1
    report = codes.digit_report(codes.digit_vectors(table, 2, numbers=codes.sorted_numbers(table, 10)), table)
    assert (report["kept"] > 0.7).all()
    digits = codes.digit_vectors(table, 2, 25, codes.sorted_numbers(table, 25)).codes(EVERY)  # numbers to spare: 4 words a digit
    for place, half in enumerate((low, high)):
        rank = half.argsort().argsort() // 4
        apart = min((digits[:, place] - way).abs().float().mean().item() for way in (rank, 24 - rank))
        assert apart < 0.5 if place == 0 else apart == 0  # few words had to move on


@pytest.mark.method("T-07")
def test_the_digit_output_layer_is_the_dense_product_at_its_price(table):
    vectors, states = codes.digit_vectors(table, 4, numbers=torch.randperm(VOCABULARY)), torch.randn(2, 3, WIDTH)
    with FlopCounterMode(display=False) as counter:
        logits = codes.digit_logits(vectors, states)
    torch.testing.assert_close(logits, states @ vectors.weight.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(codes.digit_logits(vectors, states[0, 0]), logits[0, 0])
    assert counter.get_total_flops() == 2 * 6 * 4 * WIDTH


@pytest.mark.method("T-07")
def test_the_smallest_base_tells_all_words_apart():
    expected = {(30522, 2): 175, (30522, 3): 32, (30522, 1): 30522, (27, 3): 3, (28, 3): 4, (1, 2): 1, (10**6, 3): 100,
                (10**6 + 1, 3): 101}  # fmt: skip
    for (number, digits), base in expected.items():
        assert codes.smallest_base(number, digits) == base and (base - 1) ** digits < number
    with pytest.raises(ValueError, match="1 digit or more"):
        codes.smallest_base(27, 0)


@pytest.mark.method("T-03a", "T-04")
def test_what_the_lesson_leaves_at_its_default_is_what_it_says():
    coding, training = Coding(), CodeTraining()
    assert (coding.strength, coding.ridge, coding.iterations, coding.rounds, coding.nonnegative) == (0.1, 1e-5, 25, 8, False)
    assert (training.temperature, training.noise, training.clip) == (1.0, 1.0, 1e-3)


@pytest.mark.method("T-04")
def test_a_decided_start_has_codebooks_that_fit_its_codes_and_the_temperature_falls(table):
    torch.manual_seed(0)
    learner = codes.CodeLearner(WIDTH, 3, 4)
    codes.begin_decided(learner, table / table.square().mean().sqrt(), 4.0)
    chosen = learner.scores(table).softmax(-1).amax(-1).mean()
    assert chosen > 0.6 > 1.5 * codes.CodeLearner(WIDTH, 3, 4).scores(table).softmax(-1).amax(-1).mean()
    found, log = codes.learn_codes(table, 3, 4, CodeTraining(steps=0, spread=4.0))
    before = found.codebooks.clone()
    codes.fit_codebooks(found, table)
    assert log == [] and error_of(found, table) < 0.9
    torch.testing.assert_close(before, found.codebooks, atol=1e-3, rtol=1e-3)  # they were fitted already
    falling = CodeTraining(steps=5, temperature=1.0, last_temperature=0.0625)
    assert [falling.temperature_at(step) for step in range(1, 6)] == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625])
    assert CodeTraining(steps=5).temperature_at(3) == 1.0
