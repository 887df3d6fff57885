"""Word tables that share vectors: each against a solver, a brute-force search or a library, and the contract of their parts."""

import itertools

import fresh
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import Lasso
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.flop_counter import FlopCounterMode
from transformers import AlbertConfig, AlbertModel

from utils import artifacts, bert, contract, costs, encodings, language, parts
from utils import tables as word_tables
from utils.parts.embeddings import (
    FactorizedVectors,
    ReferenceVectors,
    SlimVectors,
    SparseVectors,
    TrimmedVectors,
    TwoComponentVectors,
    slim_codes,
)
from utils.quantization.codebook import Fit, ProductQuantizer
from utils.sharing import tables, words
from utils.tasks import Split

VOCABULARY, WIDTH = 100, 32


@pytest.fixture
def table() -> torch.Tensor:
    """100 vectors of width 32 in ten bunches."""
    generator = torch.Generator().manual_seed(3)
    middle = torch.randn(10, WIDTH, generator=generator)
    return middle.repeat_interleave(10, 0) + 0.5 * torch.randn(VOCABULARY, WIDTH, generator=generator)


# --- parts: the contract --------------------------------------------------------------------------------------------


def trimmed(table: torch.Tensor) -> TrimmedVectors:
    spelling = torch.randint(1, 40, (VOCABULARY, 3))
    spelling[::2, 2] = 0
    return tables.trimmed_vectors(table, tables.Trimming(torch.arange(40), spelling, tuple("w" * 40)))


MADE = {
    "S-10": lambda table: words.sparse_vectors(table, torch.arange(5, 25), 3),
    "S-11": lambda table: words.light_rnn(table, rounds=1)[0],
    "S-12": lambda table: words.block_kmeans(table, 8, 16),
    "S-14": lambda table: words.slim_vectors(table, 4, 40, seed=5),
    "S-14 common": lambda table: words.slim_vectors(table, 4, 42, common=True),
    "S-15": lambda table: words.factorized_vectors(table, 6),
    "trimmed": trimmed,
}


@pytest.mark.method("S-10", "S-11", "S-12", "S-13", "S-14", "S-15")
def test_every_table_comes_back_in_a_fresh_process(tiny, table, tmp_path):
    for name, make in MADE.items():
        model = bert.fresh_copy(tiny)
        word_tables.replace_table(model, make(table))
        path = tmp_path / f"{name}.safetensors"
        artifacts.save(model, path, word_tables.packed(model))
        contract.write(path, model, 7)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method("S-10", "S-11", "S-12", "S-13", "S-14", "S-15")
@pytest.mark.parametrize("name", MADE)
def test_a_table_is_what_it_says(name, tiny, table):
    vectors = MADE[name](table)
    ids = torch.tensor([[0, 3, 99], [3, 50, 0]])
    with torch.no_grad():
        torch.testing.assert_close(vectors(ids), vectors.expanded().weight[ids])
        torch.testing.assert_close(vectors.weight, vectors.expanded().weight)
    again = parts.build(vectors.kind, vectors.options())
    again.load_state_dict(vectors.state_dict())
    torch.testing.assert_close(again.weight, vectors.weight)
    word_tables.replace_table(tiny, vectors)
    for length in (1, 9):
        assert costs.macs(tiny, length, 2) == costs.measured_macs(tiny, length, 2)
    vectors(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in vectors.parameters())


@pytest.mark.method("S-10", "S-11", "S-12", "S-14", "S-15")
@pytest.mark.parametrize("name", MADE)
def test_padding_has_a_vector_that_no_sentence_sees(name, tiny, table, batch):
    vectors = MADE[name](table)
    assert vectors(torch.tensor([0])).abs().sum() > 0
    word_tables.replace_table(tiny, vectors)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    other = inputs | {"input_ids": torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"])}
    torch.testing.assert_close(tiny(**inputs).logits, tiny(**other).logits)


@pytest.mark.method("S-10", "S-11", "S-12", "S-14", "S-15")
@pytest.mark.parametrize(
    "kind, sizes, message",
    [
        (SparseVectors, (3, 4), "nonzeros <= bases"),
        (SparseVectors, (100, 4), "bases < 100"),
        (SparseVectors, (10, 0), "1 <= nonzeros"),
        (TwoComponentVectors, (9, 11), "as many cells"),
        (TwoComponentVectors, (0, 200), "as many cells"),
        (ReferenceVectors, (5, 16), "blocks must divide the width 32"),
        (ReferenceVectors, (0, 16), "blocks must divide"),
        (ReferenceVectors, (4, 0), "1 value or more"),
        (SlimVectors, (5, 40), "pieces must divide"),
        (SlimVectors, (4, 41), "a multiple of the 4 pieces"),
        (SlimVectors, (4, 0), "a multiple of the 4 pieces"),
        (SlimVectors, (4, 12), "cannot tell 100 words apart"),
        (FactorizedVectors, (0,), "must lie in 1..32"),
        (FactorizedVectors, (33,), "must lie in 1..32"),
        (TrimmedVectors, (101, 2), "1 to 100 words can be kept"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind, sizes, message):
    with pytest.raises(ValueError, match=message):
        kind(VOCABULARY, WIDTH, *sizes)


# --- S-10 sparse word representations -------------------------------------------------------------------------------


def for_each(targets: torch.Tensor, bases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same bases for every target."""
    return bases.expand(len(targets), -1, -1), targets


@pytest.mark.method("S-10")
def test_without_the_sum_sparse_coefficients_are_the_positive_lasso():
    bases, targets = torch.randn(8, WIDTH).double(), torch.randn(3, WIDTH).double()
    penalties = words.SparsePenalties(alpha=3.0, beta=0.0, gamma=1e6)
    found = words.sparse_coefficients(*for_each(targets, bases), penalties, 3000)
    for x, target in zip(found, targets, strict=True):
        lasso = Lasso(alpha=3.0 / (2 * WIDTH), fit_intercept=False, positive=True, tol=1e-12, max_iter=100_000)
        expected = lasso.fit(bases.T.numpy(), target.numpy()).coef_
        np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
        assert ((x == 0).numpy() == (expected == 0)).all() and (x > 0).any() and (x == 0).any()


@pytest.mark.method("S-10")
@pytest.mark.parametrize("beta, gamma", [(0.5, 0.5), (30.0, 0.5), (4.0, 20.0), (0.0, 0.0)])
def test_sparse_coefficients_are_the_minimum_of_the_whole_objective(beta, gamma):
    """A convex function is least where 0 is a subgradient: every x_i and the sum have a slope that its kink allows."""
    bases, target = torch.randn(6, 12).double(), torch.randn(1, 12).double()
    alpha, penalties = 1.0, words.SparsePenalties(1.0, beta, gamma)
    x = words.sparse_coefficients(*for_each(target, bases), penalties, 5000)[0]
    slopes = 2 * bases @ (x @ bases - target[0])
    some = x.nonzero()[0, 0]
    of_sum = -slopes[some] - (alpha if x[some] > 0 else -alpha - gamma)  # the slope of beta |sum - 1| that this x_i needs
    assert of_sum.abs() <= beta + 1e-6
    if abs(x.sum() - 1) > 1e-6:
        assert of_sum.item() == pytest.approx(beta if x.sum() > 1 else -beta, abs=1e-6)
    rest = -(slopes + of_sum)
    torch.testing.assert_close(rest[x > 0], torch.full_like(rest[x > 0], alpha), atol=1e-6, rtol=0)
    torch.testing.assert_close(rest[x < 0], torch.full_like(rest[x < 0], -alpha - gamma), atol=1e-6, rtol=0)
    assert ((rest <= alpha + 1e-6) & (rest >= -alpha - gamma - 1e-6)).all()
    value = words.sparse_objective(x[None], bases, target, penalties)
    nearby = x + 0.05 * torch.randn(200, 6).double() * (torch.rand(200, 6) < 0.5)
    assert (words.sparse_objective(nearby, bases, target, penalties) >= value - 1e-9).all()
    by_hand = (x @ bases - target[0]).square().sum() + x.abs().sum() + beta * (x.sum() - 1).abs() - gamma * x[x < 0].sum()
    torch.testing.assert_close(value[0], by_hand)


@pytest.mark.method("S-10")
def test_words_that_are_mixtures_are_found_again(table):
    table = table.clone()
    frequent = torch.tensor([4, 10, 11, 30, 55, 70, 90])
    table[20] = 0.3 * table[10] + 0.7 * table[70]
    table[0] = 0.5 * table[4] + 0.5 * table[90]
    vectors = words.sparse_vectors(table, frequent, 2, words.SparsePenalties(0.01, 0.0, 1.0), iterations=2000)
    made = vectors.expanded().weight
    assert torch.equal(made[frequent], table[frequent])
    torch.testing.assert_close(made[[20, 0]], table[[20, 0]], atol=5e-3, rtol=0)  # coefficients have 16 bits
    number = sum(int(w) < 20 for w in frequent)
    assert {frequent[i].item() for i in vectors.index[20 - number].long()} == {10, 70}
    vectors(torch.tensor([20])).sum().backward()
    expected = torch.zeros(7, 1)
    expected[[1, 5]] = torch.tensor([[0.3], [0.7]])
    torch.testing.assert_close(vectors.bases.grad, expected.expand(-1, WIDTH), atol=1e-3, rtol=0)


@pytest.mark.method("S-10")
def test_only_the_largest_coefficients_stay_and_are_found_again_without_shrinking(table):
    bases, penalties = table[::5], words.SparsePenalties(0.5, 0.0, 0.0)
    targets = table[[1, 2, 3]]
    whole = words.sparse_coefficients(*for_each(targets, bases), penalties, 2000)
    index, x = words.sparse_codes(targets, bases, 3, penalties, candidates=len(bases), iterations=2000)
    for row in range(3):
        assert set(index[row].tolist()) == set(whole[row].abs().topk(3).indices.tolist())
        kept = x[row] != 0
        expected = np.linalg.lstsq(bases[index[row][kept]].T.numpy(), targets[row].numpy(), rcond=None)[0]
        np.testing.assert_allclose(x[row][kept].numpy(), expected, atol=1e-3)


# --- S-11 LightRNN --------------------------------------------------------------------------------------------------


def total_of(prices: torch.Tensor, allocation: words.Allocation, columns: int) -> float:
    place = allocation.cells[: len(prices), 0] * columns + allocation.cells[: len(prices), 1]
    return prices.gather(1, place.unsqueeze(1)).sum().item()


def price_list(prices: torch.Tensor, columns: int) -> words.Cost:
    return lambda group, cells: prices[group][:, cells[:, 0] * columns + cells[:, 1]]


@pytest.mark.method("S-11")
def test_reallocation_of_few_words_is_the_best_of_all():
    prices = torch.rand(5, 6, dtype=torch.float64)  # a word per row, a cell of 2 x 3 per column; one stays empty
    start = words.Allocation.at_random(5, 3)
    assert (start.rows, start.columns) == (2, 3)
    found = words.reallocate(start, price_list(prices, 3), 5, size=6)
    best = min(sum(prices[word, cell].item() for word, cell in enumerate(cells)) for cells in itertools.permutations(range(6), 5))
    assert total_of(prices, found, 3) == pytest.approx(best)
    assert best < total_of(prices, start, 3)


@pytest.mark.method("S-11")
def test_reallocation_reaches_scipys_optimum_in_one_group_and_never_rises_in_small_ones():
    prices = torch.rand(97, 100, dtype=torch.float64)
    start, cost = words.Allocation.at_random(97), price_list(prices, 10)
    optimum = prices.numpy()[linear_sum_assignment(prices.numpy())].sum()
    whole = words.reallocate(start, cost, 97, size=100)
    assert total_of(prices, whole, 10) == pytest.approx(optimum)
    totals, step = [start.total(cost, 97)], start
    for number in range(6):
        step = words.reallocate(step, cost, 97, size=20, seed=number)
        totals.append(step.total(cost, 97))
        assert len({tuple(cell) for cell in step.cells.tolist()}) == 100  # every cell once
    assert totals == sorted(totals, reverse=True) and totals[0] > 4 * totals[-1] and totals[-1] < 2 * optimum
    assert totals[-1] == pytest.approx(total_of(prices, step, 10))
    assert step.moved(start, 97) > 0.8 and step.moved(step, 97) == 0
    with pytest.raises(ValueError, match="at least 2 words"):
        words.reallocate(start, cost, 97, size=1)
    with pytest.raises(ValueError, match="1 column or more"):
        words.Allocation.at_random(97, 0)


@pytest.mark.method("S-11")
def test_groups_of_a_column_exchange_rows_alone():
    allocation = words.Allocation.at_random(97)
    for kind, stays in (("column", 1), ("row", 0)):
        for size, lengths in ((10, {10}), (7, {7, 3})):  # what is longer than a group may be is cut, at random
            groups = words.exchange_groups(allocation, kind, size, torch.Generator().manual_seed(1))
            assert sorted(torch.cat(groups).tolist()) == list(range(100))
            assert {len(group) for group in groups} == lengths
            assert all(len(allocation.cells[group, stays].unique()) == 1 for group in groups)
        others = words.exchange_groups(allocation, kind, 7, torch.Generator().manual_seed(2))
        assert {tuple(sorted(group.tolist())) for group in groups} != {tuple(sorted(group.tolist())) for group in others}


@pytest.mark.method("S-11")
def test_row_and_column_vectors_are_least_squares(table):
    allocation = words.Allocation.at_random(VOCABULARY - 7, 10, seed=2)  # not a full table
    design = np.zeros((93, 20))
    design[np.arange(93), allocation.cells[:93, 0].numpy()] = 1
    design[np.arange(93), 10 + allocation.cells[:93, 1].numpy()] = 1
    weights = 0.1 + torch.rand(93)
    for given, root in ((None, np.ones((93, 1))), (weights, weights.sqrt().unsqueeze(1).numpy())):
        rows, columns = words.component_vectors(table[:93], allocation, given, passes=300)
        expected = design @ np.linalg.lstsq(root * design, root * table[:93].numpy(), rcond=None)[0]
        made = rows[allocation.cells[:93, 0]] + columns[allocation.cells[:93, 1]]
        np.testing.assert_allclose(made.numpy(), expected, atol=1e-3)
    cost = words.reconstruction_cost(table, rows, columns)
    word, cell = torch.tensor([5, 60]), torch.tensor([[1, 2], [9, 0], [3, 3]])
    by_hand = [[(table[w] - rows[i] - columns[j]).square().sum() for i, j in cell.tolist()] for w in word.tolist()]
    torch.testing.assert_close(cost(word, cell), torch.tensor(by_hand), atol=1e-4, rtol=1e-4)
    weighted = words.reconstruction_cost(table, rows, columns, torch.arange(100) + 1.0)
    torch.testing.assert_close(weighted(word, cell), torch.tensor(by_hand) * torch.tensor([[6.0], [61.0]]), atol=1e-2, rtol=1e-4)


@pytest.mark.method("S-11")
def test_words_find_their_cells_again_and_rounds_lower_the_error(table):
    rows, columns = torch.randn(10, WIDTH), torch.randn(10, WIDTH)
    true = words.Allocation.at_random(VOCABULARY, seed=9)
    planted = rows[true.cells[:, 0]] + columns[true.cells[:, 1]]
    found = words.reallocate(words.Allocation.at_random(VOCABULARY), words.reconstruction_cost(planted, rows, columns), VOCABULARY,
                             size=VOCABULARY)  # fmt: skip
    assert torch.equal(found.cells, true.cells)
    vectors, log = words.light_rnn(table, rounds=4, size=50)
    errors = [entry["relative_error"] for entry in log]
    start = words.two_component_vectors(table, words.Allocation.at_random(VOCABULARY))
    begin = word_tables.reconstruction(start, table)["relative_error"]
    assert [begin, *errors] == sorted([begin, *errors], reverse=True) and errors[-1] < 0.8 * begin
    assert word_tables.reconstruction(vectors, table)["relative_error"] == pytest.approx(errors[-1], rel=1e-3)
    assert log[0]["moved"] > 0.5 and log[-1]["moved"] < log[0]["moved"]
    counts = torch.ones(VOCABULARY)
    counts[::10] = 30
    aimed, log = words.light_rnn(table, rounds=4, size=50, weights=counts)
    share = [((made.expanded().weight - table).square().sum(1) * counts).sum() / (table.square().sum(1) * counts).sum()
             for made in (aimed, vectors)]  # fmt: skip
    assert share[0] < 0.7 * share[1] and log[-1]["relative_error"] == pytest.approx(share[0].item(), rel=1e-3)
    with pytest.raises(ValueError, match="weights must be above 0"):
        words.light_rnn(table, weights=torch.zeros(VOCABULARY))
    again = words.allocation_of(vectors)
    assert len({tuple(cell) for cell in again.cells.tolist()}) == 100
    torch.testing.assert_close(words.two_component_vectors(table, again).expanded().weight, vectors.expanded().weight)


@pytest.mark.method("S-11")
def test_no_two_seeds_share_a_round(table, monkeypatch):
    seen = []

    def watched(allocation, cost, words, seed):
        seen.append(seed)
        return allocation

    monkeypatch.setattr(words, "reallocate", watched)
    for seed in (0, 1, 2):
        words.light_rnn(table, rounds=3, seed=seed)
    assert seen == [0, 1, 2, 1000, 1001, 1002, 2000, 2001, 2002]


@pytest.fixture
def light(tiny, table) -> words.LightLanguageModel:
    """A full table of 10 x 10: every cell is a word."""
    word_tables.replace_table(tiny, words.two_component_vectors(table, words.Allocation.at_random(VOCABULARY)))
    model = words.LightLanguageModel(tiny.bert).eval()
    nn.init.normal_(model.head.bias)
    return model


def sentences() -> Split:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(5, 100, (8,), generator=generator).tolist() for _ in range(12)]
    return Split(None, rows, torch.zeros(12, dtype=torch.long))


@pytest.mark.method("S-11")
def test_probabilities_of_all_words_sum_to_one_and_need_only_rows_and_columns(light):
    every = torch.arange(VOCABULARY)
    state = torch.randn(1, WIDTH).expand(VOCABULARY, -1)
    row, column = light.losses(state, every)
    assert row.shape == column.shape == (VOCABULARY, 10)
    own = words.own_losses(light.vectors, (row, column), every)
    assert (-own).exp().sum().item() == pytest.approx(1, abs=1e-5)
    head, vectors = light.head, light.vectors
    i, j = int(vectors.row[42]), int(vectors.column[42])
    first = head.transform(state[:1]) @ vectors.row_vectors.T + head.bias[:10]
    second = head.transform(state[:1] + vectors.row_vectors[i]) @ vectors.column_vectors.T + head.bias[10:]
    expected = cross_entropy(first, torch.tensor([i])) + cross_entropy(second, torch.tensor([j]))
    torch.testing.assert_close(own[42], expected)


@pytest.mark.method("S-11")
def test_losses_of_the_language_model_reallocate_words_and_lower_what_they_cost(light):
    masking = language.Masking(4, VOCABULARY, (0, 1, 2, 3, 4), share=0.5)
    found = words.allocation_losses(light, sentences(), masking, passes=3)
    assert torch.equal(found.row[:5], torch.zeros(5, 10)) and found.count > 100  # special tokens are never masked
    place = words.allocation_of(light.vectors)
    rows, columns = place.cells[:, 0], place.cells[:, 1]
    own = found.row[torch.arange(100), rows] + found.column[torch.arange(100), columns]
    assert found.perplexity(place) == pytest.approx(float((own.double().sum() / found.count).exp()), rel=1e-5)
    cells = torch.tensor([[0, 1], [7, 3]])
    torch.testing.assert_close(found.cost(torch.tensor([50]), cells)[0, 1], found.row[50, 7] + found.column[50, 3])
    better = words.reallocate(place, found.cost, VOCABULARY, size=VOCABULARY)
    whole = found.cost(torch.arange(100), place.cells).double().numpy()
    optimum = whole[linear_sum_assignment(whole)].sum()
    assert better.total(found.cost, VOCABULARY) == pytest.approx(optimum, rel=1e-6)
    assert found.perplexity(better) < 0.9 * found.perplexity(place)
    words.move_words(light.vectors, better)
    torch.testing.assert_close(words.allocation_of(light.vectors).cells, better.cells)
    with pytest.raises(ValueError, match="no token was masked"):
        words.allocation_losses(light, Split(None, [[1, 2]], torch.zeros(1)), masking)


@pytest.mark.method("S-11")
def test_the_two_step_loss_is_the_mean_over_masked_words_and_teaches_head_and_table(light, batch, tiny):
    masking = language.Masking(4, VOCABULARY, (0, 1, 2, 3, 4), share=0.4)
    torch.manual_seed(2)
    loss = words.light_loss(masking)(light, batch)
    torch.manual_seed(2)
    masked, labels = masking(batch["input_ids"])
    states, total = light.states(masked, batch["attention_mask"]), []
    for row, position in (labels != language.IGNORED).nonzero().tolist():
        word = labels[row, position].view(1)
        total.append(words.own_losses(light.vectors, light.losses(states[row, position].view(1, -1), word), word))
    torch.testing.assert_close(loss, torch.cat(total).mean())
    loss.backward()
    for parameter in (light.head.bias, light.vectors.row_vectors, light.vectors.column_vectors):
        assert parameter.grad.abs().sum() > 0
    plain = bert.fresh_copy(tiny)
    plain.bert.embeddings.word_embeddings = nn.Embedding(VOCABULARY, WIDTH)
    with pytest.raises(ValueError, match="must be a TwoComponentVectors, got Embedding"):
        words.LightLanguageModel(plain.bert)


# --- S-13 block-wise k-means ----------------------------------------------------------------------------------------


@pytest.mark.method("S-13")
def test_block_kmeans_is_product_quantization_and_sklearns_kmeans(table):
    vectors = words.block_kmeans(table, 8, 16, iterations=6, sample=None, seed=1)
    theirs = ProductQuantizer(table, 8, 4, fit=Fit(iterations=6, seed=1))
    torch.testing.assert_close(vectors.expanded().weight, theirs.quantize(table))
    item = theirs.encode(table)
    assert item.parts["codes"].nbytes == word_tables.pack(vectors)["codes"].parts["codes"].nbytes == VOCABULARY * 8 // 2
    mine = encodings.product(vectors.codes.T, vectors.references.detach(), table.shape, 4)
    torch.testing.assert_close(encodings.decode(mine), vectors.expanded().weight)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))
    block = table[:, 4:8].numpy()
    sklearn = KMeans(16, init=block[order[:16].numpy()], n_init=1, max_iter=300, algorithm="lloyd", tol=0).fit(block)
    whole = words.block_kmeans(table, 8, 16, iterations=300, sample=None, seed=1)
    np.testing.assert_allclose(whole.references[1].detach().numpy(), sklearn.cluster_centers_, atol=1e-4)
    with pytest.raises(ValueError, match="need as many words"):
        words.block_kmeans(table, 8, 101)


@pytest.mark.method("S-13")
def test_a_sample_is_enough_and_an_unused_reference_stays(table):
    error = [
        word_tables.reconstruction(words.block_kmeans(table, 8, 16, sample=size), table)["relative_error"] for size in (None, 50)
    ]
    assert error[0] < error[1] < 1.5 * error[0]
    references = torch.cat([table[:3, :4], torch.full((1, 4), 99.0)]).unsqueeze(0)
    codes = words.nearest_references(table[:, :4], references)
    moved = words.reference_means(table[:, :4], codes, references)[0]
    assert torch.equal(moved[3], references[0, 3])
    torch.testing.assert_close(moved[1], table[:, :4][codes[:, 0] == 1].mean(0))
    distances = torch.cdist(table[:, :4], references[0])
    assert torch.equal(codes[:, 0], distances.argmin(1))


# --- S-12 shared reference vectors ----------------------------------------------------------------------------------


class TableModel(nn.Module):
    """A table where a BERT has one, and a loss that weighs the words: f(E) = sum_w a_w |e_w - t_w|^2 / 2."""

    def __init__(self, table: torch.Tensor, weights: torch.Tensor):
        super().__init__()
        self.bert = nn.Module()
        self.bert.embeddings = nn.Module()
        self.bert.embeddings.word_embeddings = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        self.wanted, self.weights = table, weights

    def loss(self) -> torch.Tensor:
        error = (self.bert.embeddings.word_embeddings.weight - self.wanted).square().sum(1)
        return (self.weights * error).sum() / 2


def train_shared(model: TableModel, training: words.ReferenceTraining, steps: int, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        training.after_step(step, model, optimizer)


@pytest.mark.method("S-12")
def test_the_constraint_inside_training_finds_the_weighted_mean_that_kmeans_cannot_know():
    table, weights = torch.randn(12, 6), torch.linspace(0.2, 3, 12)
    start = words.block_kmeans(table, 1, 1)
    torch.testing.assert_close(start.references[0, 0], table.mean(0))
    model = TableModel(table, weights)
    training = words.ReferenceTraining(model, start, strength=1.0, every=10)
    train_shared(model, training, 1500, 0.1)
    best = (weights.unsqueeze(1) * table).sum(0) / weights.sum()  # of all tables with equal rows the one with the least loss
    torch.testing.assert_close(training.references[0, 0], best, atol=1e-3, rtol=0)
    assert training.gap[-1] < 1e-6 < training.gap[0]
    training.finish(model)
    torch.testing.assert_close(word_tables.word_table(model), best.expand(12, -1), atol=1e-3, rtol=0)


@pytest.mark.method("S-12")
def test_codes_change_in_training_and_the_constrained_loss_beats_kmeans(table):
    weights = torch.ones(VOCABULARY)
    weights[::4] = 20
    start = words.block_kmeans(table, 4, 5)
    held, model, posthoc = (TableModel(table, weights) for _ in range(3))
    word_tables.replace_table(posthoc, start)
    # A strong pull keeps the codes, and the references become the weighted means, in closed form.
    strong = words.ReferenceTraining(held, start, strength=20.0, every=10)
    train_shared(held, strong, 600, 0.02)
    assert set(strong.changed) == {0.0}
    mine = start.codes[:, 1] == 3
    best = (weights[mine, None] * table[mine, 8:16]).sum(0) / weights[mine].sum()
    torch.testing.assert_close(strong.references[1, 3], best, atol=1e-3, rtol=0)
    # A weaker one lets words change their codes, and finds less loss still.
    training = words.ReferenceTraining(model, start, strength=10.0, every=10)
    train_shared(model, training, 600, 0.02)
    assert len(training.gap) == len(training.changed) == 60 and training.gap[-1] < 0.5 * training.gap[0]
    assert 0 < max(training.changed) < 0.2
    strong.finish(held)
    training.finish(model)
    assert isinstance(model.bert.embeddings.word_embeddings, ReferenceVectors)
    assert model.loss().item() < held.loss().item() < 0.95 * posthoc.loss().item()
    for strength, every in ((0, 5), (1.0, 0)):
        with pytest.raises(ValueError, match="strength must be above 0"):
            words.ReferenceTraining(TableModel(table, weights), start, strength, every)


@pytest.mark.method("S-12")
def test_a_reference_vector_learns_from_all_words_that_share_it(table):
    vectors = words.block_kmeans(table, 4, 6)
    wanted = torch.randn(VOCABULARY, WIDTH)
    mse_loss(vectors(torch.arange(VOCABULARY)), wanted, reduction="sum").backward()
    difference = 2 * (vectors.expanded().weight - wanted)
    block, code = 2, 3
    expected = difference[vectors.codes[:, block] == code, 8 * block : 8 * block + 8].sum(0)
    torch.testing.assert_close(vectors.references.grad[block, code], expected, atol=1e-4, rtol=1e-4)


# --- S-14 Slim embeddings -------------------------------------------------------------------------------------------


@pytest.mark.method("S-14")
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("pool", [16, 40, 64])
def test_codes_are_dealt_out_evenly_differ_and_come_again_from_their_seed(pool, common):
    codes = slim_codes(VOCABULARY, 4, pool, seed=1, common=common)
    uses = torch.bincount(codes.flatten(), minlength=pool)
    assert uses.max() - uses.min() <= 1 and len(uses) == pool
    assert len({tuple(row) for row in codes.tolist()}) == VOCABULARY
    if not common:
        assert torch.equal(codes // (pool // 4), torch.arange(4).expand(VOCABULARY, -1).int())
    assert torch.equal(codes, slim_codes(VOCABULARY, 4, pool, seed=1, common=common))
    assert not torch.equal(codes, slim_codes(VOCABULARY, 4, pool, seed=2, common=common))


@pytest.mark.method("S-14")
def test_the_draw_is_the_one_that_files_rely_on():
    """These codes must never change: a file holds the seed alone."""
    assert slim_codes(6, 2, 6, seed=3).tolist() == [[0, 5], [2, 4], [1, 4], [1, 5], [0, 3], [2, 3]]


@pytest.mark.method("S-14")
def test_words_with_the_same_codes_are_told_apart():
    codes = slim_codes(14, 2, 8, seed=0)  # 16 combinations for 14 words: a draw without repair has many alike
    assert len({tuple(row) for row in codes.tolist()}) == 14


@pytest.mark.method("S-14")
@pytest.mark.parametrize("name", ["S-14", "S-14 common"])
def test_sub_vectors_begin_as_least_squares(name, table):
    vectors = MADE[name](table)
    design = nn.functional.one_hot(vectors.codes.flatten().long(), len(vectors.pool)).double().numpy()
    expected = np.linalg.lstsq(design, table.reshape(-1, WIDTH // 4).double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(vectors.pool.detach().numpy(), expected, atol=1e-5)
    weights = 0.1 + torch.rand(VOCABULARY)
    root = weights.double().sqrt().repeat_interleave(4).unsqueeze(1).numpy()
    expected = np.linalg.lstsq(root * design, root * table.reshape(-1, WIDTH // 4).double().numpy(), rcond=None)[0]
    again = words.slim_vectors(table, 4, len(vectors.pool), weights, vectors.seed, vectors.common)
    np.testing.assert_allclose(again.pool.detach().numpy(), expected, atol=1e-5)
    assert vectors.pool.numel() == len(vectors.pool) * WIDTH // 4


@pytest.mark.method("S-14")
@pytest.mark.parametrize("name", ["S-14", "S-14 common"])
def test_the_fast_output_layer_is_the_dense_product_at_its_price(name, table):
    vectors, states = MADE[name](table), torch.randn(5, WIDTH)
    with FlopCounterMode(display=False) as counter:
        logits = words.slim_logits(vectors, states)
    torch.testing.assert_close(logits, states @ vectors.weight.T, atol=1e-4, rtol=1e-4)
    pool, pieces = len(vectors.pool), 4
    assert words.slim_output_macs(vectors) == (pool * WIDTH if vectors.common else pool * WIDTH // pieces)
    assert counter.get_total_flops() == 2 * 5 * words.slim_output_macs(vectors)
    expected = 400 * (6 if vectors.common else 4) / 8  # 42 sub-vectors to choose from, or 10
    assert words.slim_index_bytes(vectors) == expected
    assert "codes" not in vectors.state_dict()


# --- S-15 ALBERT's factorised table ---------------------------------------------------------------------------------


@pytest.mark.method("S-15")
def test_the_factorised_table_is_the_best_of_its_width(table):
    vectors = words.factorized_vectors(table, 6)
    centred = table - table.mean(0)
    error = (vectors.expanded().weight - table).square().sum()
    assert error.item() == pytest.approx((torch.linalg.svdvals(centred)[6:] ** 2).sum().item(), rel=1e-4)
    assert sum(p.numel() for p in vectors.parameters()) == VOCABULARY * 6 + 6 * WIDTH + WIDTH


@pytest.mark.method("S-15")
def test_weights_turn_the_factorised_table_towards_frequent_words(table):
    weights = torch.ones(VOCABULARY)
    weights[::7] = 50
    aimed, plain = words.factorized_vectors(table, 6, weights), words.factorized_vectors(table, 6)
    mean = (weights.unsqueeze(1) * table).sum(0) / weights.sum()
    discarded = (torch.linalg.svdvals(weights.sqrt().unsqueeze(1) * (table - mean))[6:] ** 2).sum().item()
    error = [(weights * (made.expanded().weight - table).square().sum(1)).sum().item() for made in (aimed, plain)]
    assert error[0] == pytest.approx(discarded, rel=1e-4) and error[0] < 0.8 * error[1]
    again = words.factorized_vectors(table, 6, torch.full((VOCABULARY,), 3.0))
    torch.testing.assert_close(again.expanded().weight, plain.expanded().weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain.table.norm(dim=0), plain.up.weight.norm(dim=0), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="weights must be above 0"):
        words.factorized_vectors(table, 6, torch.zeros(VOCABULARY))


@pytest.mark.method("S-15")
def test_the_factorised_table_is_transformers_albert_embedding(table):
    config = AlbertConfig(vocab_size=VOCABULARY, embedding_size=6, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=8)
    theirs, vectors = AlbertModel(config).eval(), words.factorized_vectors(table, 6)
    embeddings, up = theirs.embeddings, theirs.encoder.embedding_hidden_mapping_in
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(vectors.table)
        up.load_state_dict(vectors.up.state_dict())
        embeddings.position_embeddings.weight.zero_()  # theirs are narrow too; here the BERT's own come after the map
        embeddings.token_type_embeddings.weight.zero_()
    embeddings.LayerNorm = nn.Identity()
    ids = torch.randint(0, VOCABULARY, (3, 7))
    torch.testing.assert_close(vectors(ids), up(embeddings(ids)))
    assert vectors.word_macs() == up.weight.numel()
