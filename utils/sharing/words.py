"""Survey section 5.2, embedding matrices: S-10 to S-14; and 5.3: S-15, ALBERT's factorised table.

Six ways in which words share vectors. A rare word is a sum of frequent ones (S-10); a word is a row plus a column of a table
whose cells are handed out anew (S-11); blocks of a vector come from a few reference vectors, learned under that constraint
(S-12) or found afterwards (S-13); sub-vectors are dealt out at random (S-14); all vectors lie in a narrow space (S-15). Each
function takes the pre-trained table (vocabulary, hidden) and returns a part of `utils.parts.embeddings`, which then learns on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.functional import linear, log_softmax
from transformers import BertModel

from utils import tasks, training
from utils.language import IGNORED, LanguageHead, Masking
from utils.parts.embeddings import FactorizedVectors, ReferenceVectors, SlimVectors, SparseVectors, TwoComponentVectors
from utils.tables import PLACE, replace_table, word_table
from utils.tasks import Split
from utils.training import Loss

CHUNK = 256  # words whose Gram matrices fit a processor's cache

# --- S-10 sparse word representations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparsePenalties:
    """Weights of the three penalties: on the size of coefficients, on a sum other than 1, on negative ones."""

    alpha: float = 0.3
    beta: float = 0.1
    gamma: float = 1.0


def sparse_objective(x: torch.Tensor, bases: torch.Tensor, targets: torch.Tensor, penalties: SparsePenalties) -> torch.Tensor:
    """|x U - w|^2 + alpha |x|_1 + beta |sum(x) - 1| + gamma sum(max(0, -x)) of each word, (n,).

    x (n, bases), bases U (bases, hidden), targets w (n, hidden). Chen et al. 2016, survey 5.2.
    """
    error = (x @ bases - targets).square().sum(-1)
    size, total = x.abs().sum(-1), x.sum(-1)
    return error + penalties.alpha * size + penalties.beta * (total - 1).abs() + penalties.gamma * (-x).clamp(min=0).sum(-1)


def sparse_coefficients(
    bases: torch.Tensor,
    targets: torch.Tensor,
    penalties: SparsePenalties,
    iterations: int = 150,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The x of least `sparse_objective`, (n, bases), for each target (n, hidden) and bases of its own (n, bases, hidden).

    By the primal-dual method of Condat and Vu (2013): the two penalties on single coefficients are a shrinking by `alpha` from
    above and by `alpha + gamma` from below, exact zeros included, and the one on the sum has a dual variable in [-beta, beta].
    Where `allowed` (n, bases) is false a coefficient stays 0.
    """
    gram, products = bases @ bases.mT, (bases @ targets.unsqueeze(-1)).squeeze(-1)
    largest = gram.abs().sum(-1).amax(-1, keepdim=True).clamp(min=1e-30)  # no eigenvalue is above the largest row sum
    share = 0.1  # of the step that goes to the dual variable: 1 / step - dual_step * bases must be `largest` or more
    step, dual_step = 1 / ((1 + share) * largest), share * largest / gram.shape[-1]
    above, below = step * penalties.alpha, step * (penalties.alpha + penalties.gamma)
    x, dual = torch.zeros_like(products), torch.zeros_like(products[:, :1])
    for _ in range(iterations):
        moved = x - step * (2 * ((gram @ x.unsqueeze(-1)).squeeze(-1) - products) + dual)
        shrunk = (moved - above).clamp(min=0) + (moved + below).clamp(max=0)
        shrunk = shrunk if allowed is None else shrunk * allowed
        dual = (dual + dual_step * ((2 * shrunk - x).sum(-1, keepdim=True) - 1)).clamp(-penalties.beta, penalties.beta)
        x = shrunk
    return x


def sparse_codes(
    targets: torch.Tensor,
    bases: torch.Tensor,
    nonzeros: int,
    penalties: SparsePenalties,
    candidates: int = 32,
    iterations: int = 150,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which bases each word takes and how much of them, both (n, nonzeros).

    Only the `candidates` bases with the largest product are looked at: with all of them the minimum is exact, with 32 a table
    takes seconds. The largest coefficients stay, and are found again without the penalty on their size.
    """
    index = (targets @ bases.T).topk(min(candidates, len(bases))).indices
    x = sparse_coefficients(bases[index], targets, penalties, iterations)
    place = x.abs().topk(nonzeros).indices
    index, allowed = index.gather(1, place), x.gather(1, place) != 0
    return index, sparse_coefficients(bases[index], targets, replace(penalties, alpha=0.0), iterations, allowed)


@torch.no_grad()
def sparse_vectors(
    table: torch.Tensor, words: torch.Tensor, nonzeros: int = 8, penalties: SparsePenalties | None = None, **options
) -> SparseVectors:
    """S-10: the `words` (ids) keep their vectors, the others become sums of a few. Options go to `sparse_codes`.

    Chen et al. 2016 (arXiv 1610.03950), survey 5.2. The paper's words are those of a corpus by frequency, and so are these
    (`tables.most_frequent`). Raises ValueError where there are fewer words than nonzeros.
    """
    vectors, words = SparseVectors(*table.shape, len(words), nonzeros).to(table.device), words.sort().values
    rare = torch.ones(len(table), dtype=torch.bool)
    rare[words.cpu()] = False
    codes = [sparse_codes(part, table[words], nonzeros, penalties or SparsePenalties(), **options)
             for part in table[rare.to(table.device)].split(CHUNK)]  # fmt: skip
    vectors.words.copy_(words)
    vectors.bases.copy_(table[words])
    vectors.index.copy_(torch.cat([index for index, _ in codes]))
    vectors.coefficients.copy_(torch.cat([x for _, x in codes]))
    return vectors


# --- S-11 LightRNN --------------------------------------------------------------------------------------------------

# words (n,), cells (m, 2) -> what each word costs in each cell, (n, m)
Cost = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Allocation:
    """Which word stands where in a table. `cells` (rows * columns, 2) holds row and column of each word, then empty cells."""

    cells: torch.Tensor
    rows: int
    columns: int

    @classmethod
    def at_random(cls, words: int, columns: int | None = None, seed: int = 0) -> "Allocation":
        """Words in random cells, as LightRNN starts; `columns` makes another table than a square. Raises ValueError below 1."""
        columns = math.ceil(math.sqrt(words)) if columns is None else columns
        if columns < 1:
            raise ValueError(f"a table needs 1 column or more, got {columns}")
        rows = math.ceil(words / columns)
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return cls(cells[torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))], rows, columns)

    def moved(self, other: "Allocation", words: int) -> float:
        """The share of the first `words` words that stand elsewhere in the other allocation."""
        return (self.cells[:words] != other.cells[:words]).any(1).float().mean().item()

    def total(self, cost: Cost, words: int) -> float:
        """What all words cost where they stand."""
        return sum(cost(part, self.cells[part]).diagonal().double().sum().item() for part in torch.arange(words).split(CHUNK))


def exchange_groups(allocation: Allocation, kind: str, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Groups of places whose words may exchange their cells: `random` ones of a size, or all of a `column`, or of a `row`; a column
    or row of more than `size` is cut at random, for an assignment takes n^3 steps."""
    if kind == "random":
        return list(torch.randperm(len(allocation.cells), generator=generator).split(size))
    key, side = (allocation.cells[:, 1], allocation.rows) if kind == "column" else (allocation.cells[:, 0], allocation.columns)
    order = torch.randperm(len(key), generator=generator) if side > size else torch.arange(len(key))
    return [part for group in order[key[order].argsort(stable=True)].split(side) for part in group.split(size)]


def reallocate(allocation: Allocation, cost: Cost, words: int, sweeps: int = 1, size: int = 500, seed: int = 0) -> Allocation:
    """Move words to cells where they cost less in all, each cell holding one word at most: an assignment problem.

    Solved exactly (scipy's `linear_sum_assignment`) within groups that exchange their cells: the words of each column, those of
    each row (both in parts of at most `size`), random groups of `size`; `sweeps` times. The total never rises, and a group that
    holds all words gives the optimum. All 30,522 words at once would take n^3 = 3e13 steps; Li et al. 2016 give an approximation
    for that reason, and their code fills rows and then columns greedily. Raises ValueError for a size below 2.
    """
    if size < 2:
        raise ValueError(f"at least 2 words can exchange their cells, got groups of {size}")
    generator = torch.Generator().manual_seed(seed)
    for kind in ("column", "row", "random") * sweeps:
        cells = allocation.cells.clone()
        for group in exchange_groups(allocation, kind, size, generator):
            real = group[group < words]
            prices = np.zeros((len(group), len(group)))  # an empty cell costs nothing wherever it goes
            prices[: len(real)] = cost(real, cells[group]).double().cpu().numpy()
            order = torch.cat([real, group[group >= words]])
            cells[order] = cells[group][torch.from_numpy(linear_sum_assignment(prices)[1])]
        allocation = replace(allocation, cells=cells)
    return allocation


def component_vectors(
    table: torch.Tensor, allocation: Allocation, weights: torch.Tensor | None = None, passes: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows (rows, hidden) and columns (columns, hidden) whose sums come nearest to the table, in (weighted) least squares.

    In turn each row vector is the mean of what its words lack of their column, and the other way round; in a full table
    without weights one pass is exact, as in a two-way analysis of variance.
    """
    row, column = allocation.cells[: len(table)].to(table.device).T
    rows, columns = table.new_zeros(allocation.rows, table.shape[1]), table.new_zeros(allocation.columns, table.shape[1])
    for _ in range(passes):
        rows = group_means(table - columns[column], row, allocation.rows, weights)
        columns = group_means(table - rows[row], column, allocation.columns, weights)
    return rows, columns


def group_means(values: torch.Tensor, group: torch.Tensor, count: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of the values (n, d) of each group, (count, d), weighted by `weights` (n,); zeros where a group is empty.

    Raises ValueError for a weight of 0 or less.
    """
    weights = values.new_ones(len(values)) if weights is None else check_weights(weights.to(values.device))
    shares = torch.cat([values, values.new_ones(len(values), 1)], 1).double() * weights.double().unsqueeze(1)
    total = shares.new_zeros(count, shares.shape[1]).index_add_(0, group, shares)
    return (total[:, :-1] / total[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)).to(values.dtype)


def check_weights(weights: torch.Tensor) -> torch.Tensor:
    """The weights of words, (n,), as they came. Raises ValueError for one of 0 or less."""
    if not (weights > 0).all():
        raise ValueError("weights must be above 0: add 1 to counts, so that no word is left out")
    return weights


def reconstruction_cost(
    table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, weights: torch.Tensor | None = None
) -> Cost:
    """Squared distance between a word's vector and the sum of a cell's row and column, times the word's weight."""

    def cost(words: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        distance = torch.cdist(table[words], rows[cells[:, 0]] + columns[cells[:, 1]]).square()
        return distance if weights is None else distance * weights[words].unsqueeze(1)

    return cost


@torch.no_grad()
def two_component_vectors(
    table: torch.Tensor, allocation: Allocation, weights: torch.Tensor | None = None
) -> TwoComponentVectors:
    """The part for an allocation, with the vectors of least squares. Raises ValueError where it has no cell for each word."""
    vectors = TwoComponentVectors(*table.shape, allocation.rows, allocation.columns).to(table.device)
    vectors.row.copy_(allocation.cells[: len(table), 0])
    vectors.column.copy_(allocation.cells[: len(table), 1])
    rows, columns = component_vectors(table, allocation, weights)
    vectors.row_vectors.copy_(rows)
    vectors.column_vectors.copy_(columns)
    return vectors


@torch.no_grad()
def light_rnn(
    table: torch.Tensor,
    rounds: int = 3,
    columns: int | None = None,
    weights: torch.Tensor | None = None,
    seed: int = 0,
    **options,
) -> tuple[TwoComponentVectors, list[dict[str, float]]]:
    """S-11 on a given table: fit the vectors, reallocate the words, fit again, `rounds` times. Options go to `reallocate`.

    LightRNN, Li et al. 2016 (arXiv 1610.09893), survey 5.2. `weights` (vocabulary,) say how much a word's error counts: the
    paper's losses, those of a language model (`AllocationLosses`), are sums over a text, so that frequent words count more.
    No two seeds share the groups of a round. Returns the part and, per round, the weighted squared error over the table's weighted
    squared norm (`relative_error`) and the share of words that moved (`moved`). Raises ValueError for a weight of 0 or less.
    """
    words, norms = len(table), table.square().sum(1)
    whole = float((norms if weights is None else norms * weights).sum())
    allocation, log = Allocation.at_random(words, columns, seed), []
    cost = reconstruction_cost(table, *component_vectors(table, allocation, weights), weights)
    for number in range(rounds):
        before, allocation = allocation, reallocate(allocation, cost, words, seed=1000 * seed + number, **options)
        cost = reconstruction_cost(table, *component_vectors(table, allocation, weights), weights)
        log.append({"relative_error": allocation.total(cost, words) / whole, "moved": allocation.moved(before, words)})
    return two_component_vectors(table, allocation, weights), log


class LightLanguageModel(nn.Module):
    """A BERT that guesses a masked word's row and then, knowing the row, its column: two softmaxes over a table's sides.

    P(word) = P(row) P(column | row), sqrt(V) + sqrt(V) products in place of V. In LightRNN the recurrent network reads the
    row's vector between the two guesses; here it is added to the state. Input and output have one set of vectors and one table
    (the paper's two sets share the table alone). Raises ValueError for a BERT without a `TwoComponentVectors`.
    """

    def __init__(self, encoder: BertModel):
        super().__init__()
        vectors = encoder.embeddings.word_embeddings
        if not isinstance(vectors, TwoComponentVectors):
            raise ValueError(f"the word table must be a TwoComponentVectors, got {type(vectors).__name__}")
        self.bert, self.config = encoder, encoder.config
        guesses = len(vectors.row_vectors) + len(vectors.column_vectors)
        self.head = LanguageHead(vectors.embedding_dim, guesses).to(vectors.row_vectors.device)

    @property
    def vectors(self) -> TwoComponentVectors:
        """The words' table."""
        return self.bert.embeddings.word_embeddings

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The last layer's states, (batch, length, hidden)."""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def losses(self, states: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-log P of every row (n, rows), and of every column after the true row (n, columns); states (n, hidden) of `words`."""
        rows, columns = self.vectors.row_vectors, self.vectors.column_vectors
        row_bias, column_bias = self.head.bias.split([len(rows), len(columns)])
        row_logits = linear(self.head.transform(states), rows, row_bias)
        known = states + rows[self.vectors.row[words].long()].to(states.dtype)
        column_logits = linear(self.head.transform(known), columns, column_bias)
        return -log_softmax(row_logits.float(), -1), -log_softmax(column_logits.float(), -1)


def own_losses(vectors: TwoComponentVectors, losses: tuple[torch.Tensor, torch.Tensor], words: torch.Tensor) -> torch.Tensor:
    """The loss of each word at its own row and column, (n,)."""
    places = (vectors.row[words].long(), vectors.column[words].long())
    return sum(side.gather(1, place.unsqueeze(1)).squeeze(1) for side, place in zip(losses, places, strict=True))


def light_loss(masking: Masking) -> Loss:
    """The loss of a `LightLanguageModel` on a batch whose words are masked anew each time, for `utils.training.train`."""

    def loss(model: LightLanguageModel, batch: dict) -> torch.Tensor:
        masked, labels = masking(batch["input_ids"])
        chosen = labels != IGNORED
        states = model.states(masked, batch["attention_mask"])[chosen]
        own = own_losses(model.vectors, model.losses(states, labels[chosen]), labels[chosen])
        return own.sum() / chosen.sum().clamp(min=1)

    return loss


@dataclass
class AllocationLosses:
    """What a language model loses on each word in each row and in each column, summed over where it was masked.

    `row` (vocabulary, rows), `column` (vocabulary, columns), `count` masked words. The paper takes their sum for what the word
    would cost in a cell. A word that never occurred costs nothing anywhere: it goes where the others leave room.
    """

    row: torch.Tensor
    column: torch.Tensor
    count: int

    def cost(self, words: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """The `Cost` of `reallocate`."""
        return self.row[words][:, cells[:, 0]] + self.column[words][:, cells[:, 1]]

    def perplexity(self, allocation: Allocation) -> float:
        """exp of the mean loss per masked word if the words stood so and the model stayed as it is."""
        return math.exp(allocation.total(self.cost, len(self.row)) / self.count)


@torch.no_grad()
def allocation_losses(
    model: LightLanguageModel, split: Split, masking: Masking, pad_token_id: int = 0, passes: int = 1, seed: int = 0
) -> AllocationLosses:
    """Collect the losses of S-11 over a split, each sentence masked `passes` times. Raises ValueError for no masked word."""
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    words, rows, columns = (model.vectors.options()[name] for name in ("num_embeddings", "rows", "columns"))
    found = AllocationLosses(torch.zeros(words, rows), torch.zeros(words, columns), 0)
    model.eval()
    for batch in (batch for _ in range(passes) for batch in tasks.batches(split, 64, pad_token_id)):
        masked, labels = masking(batch["input_ids"], generator)
        chosen = labels != IGNORED
        with training.autocast(device):
            states = model.states(masked.to(device), batch["attention_mask"].to(device))[chosen.to(device)]
        row, column = model.losses(states.float(), labels[chosen].to(device))
        found.row.index_add_(0, labels[chosen], row.cpu())
        found.column.index_add_(0, labels[chosen], column.cpu())
        found.count += int(chosen.sum())
    if not found.count:
        raise ValueError("no token was masked: the split is too short for this share")
    return found


@torch.no_grad()
def move_words(vectors: TwoComponentVectors, allocation: Allocation) -> None:
    """Let the words stand where the allocation says, in place; the vectors of rows and columns stay."""
    vectors.row.copy_(allocation.cells[: vectors.num_embeddings, 0])
    vectors.column.copy_(allocation.cells[: vectors.num_embeddings, 1])


def allocation_of(vectors: TwoComponentVectors) -> Allocation:
    """Where the words of a part stand, and which cells are empty."""
    rows, columns = len(vectors.row_vectors), len(vectors.column_vectors)
    taken = (vectors.row.long() * columns + vectors.column.long()).cpu()
    empty = torch.ones(rows * columns, dtype=torch.bool)
    empty[taken] = False
    place = torch.cat([taken, empty.nonzero().flatten()])
    return Allocation(torch.stack([place // columns, place % columns], 1), rows, columns)


# --- S-13 block-wise k-means ----------------------------------------------------------------------------------------


def nearest_references(table: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """The nearest reference vector of each block of each word, (vocabulary, blocks); `references` (blocks, count, size)."""
    points = table.unflatten(1, (len(references), -1))
    pairs = zip(points.unbind(1), references, strict=True)
    return torch.stack([(book.square().sum(1) / 2 - block @ book.T).argmin(1) for block, book in pairs], 1)


def reference_means(table: torch.Tensor, codes: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """The mean of the blocks that share a code, (blocks, count, size); a code without words keeps its vector."""
    blocks, count, _ = references.shape
    points = table.unflatten(1, (blocks, -1)).transpose(0, 1)
    means = torch.stack([group_means(block, code, count) for block, code in zip(points, codes.T, strict=True)])
    used = torch.stack([torch.bincount(code, minlength=count) > 0 for code in codes.T])
    return torch.where(used.unsqueeze(-1), means, references)


@torch.no_grad()
def block_kmeans(
    table: torch.Tensor, blocks: int, count: int = 256, iterations: int = 10, sample: int | None = 4096, seed: int = 0
) -> ReferenceVectors:
    """S-13: Lloyd's k-means of each block's pieces, after training: product quantization. Survey 5.2.

    It starts from the pieces of `count` random words, the same for all blocks, looks at a random `sample` of the words, and
    ends with a step of all words. Raises ValueError for blocks that do not divide the width, and more reference vectors than
    words.
    """
    vectors = ReferenceVectors(*table.shape, blocks, count).to(table.device)
    if count > len(table):
        raise ValueError(f"{count} reference vectors need as many words, the table has {len(table)}")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).to(table.device)
    references = table[order[:count]].unflatten(1, (blocks, -1)).transpose(0, 1).contiguous()
    seen = table if sample is None else table[order[: max(count, sample)]]
    for words in (*[seen] * (iterations - 1), table):
        references = reference_means(words, nearest_references(words, references), references)
    vectors.references.copy_(references)
    vectors.codes.copy_(nearest_references(table, references))
    return vectors


# --- S-12 shared reference vectors ----------------------------------------------------------------------------------


class ReferenceTraining:
    """S-12: train a dense table so that its blocks come to lie on few reference vectors: alternating directions (ADMM).

    Minimise f(E) subject to E = P, where each block of P is one of `count` reference vectors:

        f(E) + strength / 2 |E - P + U|^2

    In turn the training steps on f move E, and E is pulled to P - U at the same rate (`after_step`, for `training.train` with
    `train_embeddings`). Every `every` steps P becomes the nearest shared vectors of E + U and then their means, one step of
    k-means, and U collects E - P. Suzuki and Nagata 2016, survey 5.2, put this constraint on the training of skip-gram vectors;
    here it is fine-tuning, so most words of the table are moved by the pull alone. `gap` |E - P|^2 / |E|^2 and `changed`, the
    share of codes that changed, are logged at each renewal. Raises ValueError for a strength of 0 or less and `every` below 1.
    """

    def __init__(self, model: nn.Module, start: ReferenceVectors, strength: float, every: int):
        if strength <= 0 or every < 1:
            raise ValueError(f"strength must be above 0 and every at least 1, got {strength} and {every}")
        self.weight = model.get_submodule(PLACE).weight
        self.strength, self.every = strength, every
        self.codes, self.references = start.codes.long(), start.references.detach().clone()
        self.dual, self.shared = torch.zeros_like(self.weight), self.look_up()
        self.gap: list[float] = []
        self.changed: list[float] = []

    def look_up(self) -> torch.Tensor:
        """P: the reference vectors of all words, (vocabulary, hidden)."""
        return torch.cat([book[code] for book, code in zip(self.references, self.codes.T, strict=True)], 1)

    @torch.no_grad()
    def renew(self) -> None:
        """New codes and means for E + U, then U + E - P."""
        lifted = self.weight + self.dual
        codes = nearest_references(lifted, self.references)
        self.changed.append((codes != self.codes).float().mean().item())
        self.codes, self.references = codes, reference_means(lifted, codes, self.references)
        self.shared = self.look_up()
        self.dual += self.weight - self.shared
        self.gap.append(((self.weight - self.shared).square().sum() / self.weight.square().sum()).item())

    @torch.no_grad()
    def after_step(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Pull E to P - U by the learning rate times the strength, at most all the way."""
        pull = min(1.0, optimizer.param_groups[0]["lr"] * self.strength)
        self.weight.lerp_(self.shared - self.dual, pull)
        if step % self.every == 0:
            self.renew()

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Put the table that the constraint leaves in the model's place: codes of E + U, means of E."""
        table = word_table(model)
        blocks, count, _ = self.references.shape
        vectors = ReferenceVectors(*table.shape, blocks, count).to(table.device)
        codes = nearest_references(table + self.dual, self.references)
        vectors.codes.copy_(codes)
        vectors.references.copy_(reference_means(table, codes, self.references))
        replace_table(model, vectors)


# --- S-14 Slim embeddings -------------------------------------------------------------------------------------------


@torch.no_grad()
def slim_vectors(
    table: torch.Tensor,
    pieces: int,
    pool: int,
    weights: torch.Tensor | None = None,
    seed: int = 0,
    common: bool = False,
) -> SlimVectors:
    """S-14: the part whose sub-vectors are the means of the pieces that they stand for, the least error for these codes.

    Li et al. 2018 (arXiv 1711.09873), survey 5.2, start from random sub-vectors and train the language model; with ten random
    pieces to a sub-vector a mean says little, so here too what counts is the training. `weights`
    (vocabulary,) let frequent words count more. Raises ValueError as `SlimVectors` does, and for a weight of 0 or less.
    """
    vectors = SlimVectors(*table.shape, pieces, pool, seed, common).to(table.device)
    cut = table.unflatten(1, (pieces, -1)).flatten(0, 1)
    weights = None if weights is None else weights.repeat_interleave(pieces)
    vectors.pool.copy_(group_means(cut, vectors.codes.flatten().long(), pool, weights))
    return vectors


def slim_logits(vectors: SlimVectors, states: torch.Tensor) -> torch.Tensor:
    """states E^T without E: (n, vocabulary) from states (n, hidden).

    Each piece of a state meets each sub-vector of its place once, M d / K multiply-adds for a pool of M in K places, and a
    word's logit is a sum of K of those products, V K additions; the dense product takes V d. With a `common` pool each piece
    meets all M: M d. Li et al. 2018, survey 5.2.
    """
    cut = states.unflatten(-1, (vectors.pieces, -1)).transpose(0, 1)  # (pieces, n, size)
    pool = vectors.pool.to(states.dtype)
    if vectors.common:
        products = cut @ pool.T
        first = torch.zeros(vectors.pieces, dtype=torch.long, device=states.device)
    else:
        products = torch.bmm(cut, pool.unflatten(0, (vectors.pieces, -1)).mT)
        first = torch.arange(vectors.pieces, device=states.device) * products.shape[-1]
    codes = vectors.codes.long() - first
    return sum(products[place][:, codes[:, place]] for place in range(vectors.pieces))


def slim_output_macs(vectors: SlimVectors) -> int:
    """Multiply-adds of `slim_logits` for one state: M d / K, or M d with a common pool. Its V K additions multiply nothing."""
    return vectors.pool.numel() * (vectors.pieces if vectors.common else 1)


def slim_index_bytes(vectors: SlimVectors) -> int:
    """Bytes that the codes would take in a file, in as few bits each as possible: what drawing them from a seed saves."""
    share = len(vectors.pool) // (1 if vectors.common else vectors.pieces)
    return math.ceil(vectors.codes.numel() * max(1, (share - 1).bit_length()) / 8)


# --- S-15 ALBERT's factorised table ---------------------------------------------------------------------------------


@torch.no_grad()
def factorized_vectors(table: torch.Tensor, size: int, weights: torch.Tensor | None = None) -> FactorizedVectors:
    """S-15: the nearest table of `size` dimensions around its mean, by truncated singular value decomposition.

    ALBERT, Lan et al. 2019 (arXiv 1909.11942), survey 5.3, trains it from scratch. The map's bias takes the mean, so the error
    is the sum of the squared singular values of the centred table that are cut off. `weights` (vocabulary,) let frequent words
    count more: mean and directions are then those of the weighted rows, in which every word keeps its own place. Raises
    ValueError for a size outside 1 to the width, and for a weight of 0 or less.
    """
    vectors = FactorizedVectors(*table.shape, size).to(table.device)
    weights = table.new_ones(len(table)) if weights is None else check_weights(weights.to(table))
    mean = weights @ table / weights.sum()
    directions = torch.linalg.svd(weights.sqrt().unsqueeze(1) * (table - mean), full_matrices=False).Vh[:size]
    narrow = (table - mean) @ directions.T
    root = narrow.norm(dim=0).clamp(min=torch.finfo(table.dtype).tiny).sqrt()  # both factors get an equal share of the scale
    vectors.table.copy_(narrow / root)
    vectors.up.weight.copy_((root.unsqueeze(1) * directions).T)
    vectors.up.bias.copy_(mean)
    return vectors
