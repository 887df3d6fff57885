"""Survey sections 6.1 and 6.2, embedding matrices: E = B D with codes B that have structure. T-03, T-04, T-06, T-07.

Sparse codes over a dictionary (T-03), one vector from each of several codebooks (T-04), a width for each band of frequency
(T-06), digits that look up blocks (T-07). All start from the pre-trained table (vocabulary, hidden) and make a part of
`utils.parts.codes`, which then learns on; `error_table` sets each beside the least error that its form allows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas
import torch
from torch import nn
from torch.nn.functional import normalize, softplus

from utils.parts.codes import BandedVectors, CompositionalVectors, DictionaryVectors, DigitVectors
from utils.parts.embeddings import WordVectors
from utils.tables import as_table, reconstruction, stored_bytes

CHUNK = 2048  # words that are coded at a time

# --- what the methods share -----------------------------------------------------------------------------------------


def check_table(table: torch.Tensor) -> None:
    """Raise ValueError for anything but a matrix of finite numbers."""
    if table.dim() != 2 or not table.isfinite().all():
        raise ValueError(f"a table is a (vocabulary, hidden) matrix of finite numbers, got shape {tuple(table.shape)}")


def binary_least_squares(index: torch.Tensor, table: torch.Tensor, size: int, ridge: float) -> torch.Tensor:
    """D (size, hidden) of least |B D - E|^2 + ridge |D|^2, where row i of B has ones at `index[i]`; E is the table.

    `index` (n, places) may hold `size`, which stands for no place. Where B leaves D open, the ridge chooses a small one.
    """
    gram, right = table.new_zeros(size, size).double(), table.new_zeros(size, table.shape[1]).double()
    for places, vectors in zip(index.split(CHUNK), table.split(CHUNK), strict=True):
        B = table.new_zeros(len(places), size + 1).scatter_(1, places, 1.0)[:, :size]
        gram += B.T @ B  # counts, which float32 holds
        right += B.double().T @ vectors.double()  # a rounded product would leave what B leaves open to chance
    return torch.linalg.solve(gram + ridge * torch.eye(size).to(gram), right).to(table.dtype)


def left_out(matrix: torch.Tensor, rank: int) -> float:
    """The sum of the squared singular values of a matrix after the first `rank`: what no matrix of that rank can have."""
    matrix = matrix.double()
    gram = matrix.T @ matrix if len(matrix) > matrix.shape[1] else matrix @ matrix.T
    return float(torch.linalg.eigvalsh(gram).flip(-1)[rank:].clamp(min=0).sum())


def least_error(vectors: WordVectors, table: torch.Tensor) -> float:
    """What any table of this part's form misses of |E|^2 at least, as a share. Raises ValueError for a part of another chapter.

    With bands and with digits that is reached: by truncated SVD in each band, by means of the words that share a digit. Codes
    are free, so that for dictionaries and codebooks it is only said that their vectors span so many dimensions: where these are
    all, the bound is 0.
    """
    if isinstance(vectors, BandedVectors):
        lost = sum(map(left_out, band_tables(vectors, table), vectors.widths))
    elif isinstance(vectors, DigitVectors):
        means, counts = digit_means(vectors, table)
        lost = float(table.double().square().sum() - (counts.unsqueeze(2) * means.double().square()).sum())
    elif isinstance(vectors, DictionaryVectors):
        lost = left_out(table, vectors.atoms)
    elif isinstance(vectors, CompositionalVectors):  # a sum of vectors each, so `count` of them have count - 1 differences
        lost = left_out(table - table.mean(0), vectors.books * (vectors.count - 1))
    else:
        raise ValueError(f"the bound is known for dictionaries, codebooks, bands and digits, got {type(vectors).__name__}")
    return lost / float(table.double().square().sum())


def error_table(made: dict[str, WordVectors], table: torch.Tensor) -> pandas.DataFrame:
    """A row per table of word vectors: stored `megabytes`, the relative squared `error`, and the `bound` (`least_error`)."""
    rows = {name: {"megabytes": stored_bytes(vectors) / 1e6, "error": reconstruction(vectors, table)["relative_error"],
                   "bound": least_error(vectors, table)} for name, vectors in made.items()}  # fmt: skip
    return pandas.DataFrame.from_dict(rows, orient="index")


def gaussian_error(table: torch.Tensor, bits: float) -> float:
    """What the best conceivable code of `bits` per word misses of |E|^2 if words were normal numbers of the table's covariance.

    Reverse water-filling (Cover and Thomas 2006, 10.3.3): every direction of variance v gets max(0, log2(v / level) / 2) bits
    and misses min(v, level); the level is such that the bits add up. A yardstick and no bound, since words are not normal and
    their codebooks are not counted. Raises ValueError for bits below 0.
    """
    if bits < 0:
        raise ValueError(f"a code has 0 bits or more, got {bits}")
    centred = (table - table.mean(0)).double()
    variances = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=torch.finfo(torch.float64).tiny)
    low, high = -1000.0, float(variances.max().log2())  # of log2(level)
    for _ in range(100):
        middle = (low + high) / 2
        spent = float((variances.log2() - middle).clamp(min=0).sum()) / 2
        low, high = (middle, high) if spent > bits else (low, middle)
    return float(variances.clamp(max=2**high).sum() / table.double().square().sum())


# --- T-03 sparse coding ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coding:
    """How vectors are coded: `strength` of the penalty on codes, `ridge` on the dictionary, and whether codes may be negative.

    `iterations` are steps per code, `rounds` turns of codes and dictionary. Raises ValueError for numbers below 0, and for no
    iteration.
    """

    strength: float = 0.1
    ridge: float = 1e-5
    nonnegative: bool = False
    iterations: int = 25
    rounds: int = 8
    seed: int = 0

    def __post_init__(self):
        if min(self.strength, self.ridge, self.rounds) < 0 or self.iterations < 1:
            raise ValueError(f"strength, ridge and rounds are 0 or more, iterations 1 or more, got {self}")


def coding_objective(targets: torch.Tensor, codes: torch.Tensor, dictionary: torch.Tensor, coding: Coding) -> float:
    """sum_i |E_i - B_i D|^2 + strength |B_i|_1, plus ridge |D|^2: targets E (n, hidden), codes B (n, atoms), D (atoms, hidden).

    Faruqui et al. 2015 (arXiv 1506.02004), survey 6.1.
    """
    error = (codes @ dictionary - targets).square().sum()
    return float(error + coding.strength * codes.abs().sum() + coding.ridge * dictionary.square().sum())


def shrink(codes: torch.Tensor, amount: torch.Tensor, nonnegative: bool) -> torch.Tensor:
    """The proximal step of amount |B|_1: entries go that far towards 0 and stop there; negative ones become 0 if asked."""
    positive = (codes - amount).clamp(min=0)
    return positive if nonnegative else positive + (codes + amount).clamp(max=0)


def sparse_codes(
    targets: torch.Tensor, dictionary: torch.Tensor, coding: Coding, start: torch.Tensor | None = None
) -> torch.Tensor:
    """The codes B_i (n, atoms) of least |E_i - B_i D|^2 + strength |B_i|_1 for targets (n, hidden), with exact zeros.

    Accelerated proximal gradient (FISTA, Beck and Teboulle 2009). Faruqui et al. 2015 take AdaGrad steps with dual averaging.
    """
    gram = dictionary @ dictionary.T if len(dictionary) < dictionary.shape[1] else dictionary.T @ dictionary
    step = 1 / (2 * torch.linalg.eigvalsh(gram)[-1]).clamp(min=1e-30)  # the gradient turns no faster
    codes = targets.new_zeros(len(targets), len(dictionary)) if start is None else start
    ahead, t = codes, 1.0
    for _ in range(coding.iterations):
        slope = 2 * (ahead @ dictionary - targets) @ dictionary.T
        moved = shrink(ahead - step * slope, step * coding.strength, coding.nonnegative)
        later = (1 + (1 + 4 * t**2) ** 0.5) / 2
        ahead = moved + (t - 1) / later * (moved - codes)
        codes, t = moved, later
    return codes


def improved_dictionary(targets: torch.Tensor, codes: torch.Tensor, dictionary: torch.Tensor, ridge: float) -> torch.Tensor:
    """One turn of block coordinate descent: each atom in use moves to its least squares, given the others, at length 1 at most.

    Mairal et al. 2009. The ridge alone, as in the paper, hardly holds the lengths: atoms twice as long need codes half as
    large, at half the penalty, and the minimum of that objective has long atoms and next to no sparsity. With lengths of at
    most 1 the strength means what it says.
    """
    gram, products, dictionary = codes.T @ codes, codes.T @ targets, dictionary.clone()
    for atom in gram.diagonal().nonzero().flatten().tolist():
        own = gram[atom, atom]
        moved = (products[atom] - gram[atom] @ dictionary + own * dictionary[atom]) / (own + ridge)
        dictionary[atom] = moved / moved.norm().clamp(min=1)
    return dictionary


def restarted(targets: torch.Tensor, codes: torch.Tensor, dictionary: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The dictionary, and how many of its atoms no code uses: these start anew at the targets that are coded worst."""
    idle = (codes == 0).all(0).nonzero().flatten()
    worst = (codes @ dictionary - targets).square().sum(1).topk(len(idle)).indices
    return dictionary.index_copy(0, idle, normalize(targets[worst])), len(idle)


@torch.no_grad()
def learn_dictionary(
    targets: torch.Tensor, atoms: int, coding: Coding
) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, float]]]:
    """Atoms (atoms, hidden), codes (n, atoms) of the targets (n, hidden), and per round what the objective was.

    Codes and dictionary in turn, from the directions of random targets; with 0 rounds these are the dictionary. The log has the
    `objective` per target, the `nonzeros` of a code, and how many atoms were `restarted`. Raises ValueError for fewer targets
    than atoms, and for numbers that are not finite.
    """
    check_table(targets)
    if not 1 <= atoms <= len(targets):
        raise ValueError(f"the dictionary has 1 to {len(targets)} atoms, as many as vectors to learn from, got {atoms}")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(coding.seed))[:atoms]
    dictionary, codes, log = normalize(targets[order.to(targets.device)]), None, []
    for _ in range(coding.rounds):
        codes = sparse_codes(targets, dictionary, coding, codes)
        dictionary = improved_dictionary(targets, codes, dictionary, coding.ridge)
        objective = coding_objective(targets, codes, dictionary, coding) / len(targets)
        dictionary, idle = restarted(targets, codes, dictionary)
        log.append({"objective": objective, "nonzeros": float((codes != 0).sum() / len(codes)), "restarted": idle})
    return dictionary, sparse_codes(targets, dictionary, coding, codes), log


@torch.no_grad()
def code_words(table: torch.Tensor, dictionary: torch.Tensor, places: int, coding: Coding) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms of the `places` largest entries of each word's code, largest first, and these entries; both (vocabulary, places).

    What is coded is a word's direction, so that the penalty is the same for all. Raises ValueError for more places than atoms,
    and for numbers that are not finite.
    """
    check_table(table)
    if not 1 <= places <= len(dictionary):
        raise ValueError(f"a code over {len(dictionary)} atoms has 1 to {len(dictionary)} places, got {places}")
    index, entries = [], []
    for targets in normalize(table).split(CHUNK):
        codes = sparse_codes(targets, dictionary, coding)
        index.append(codes.abs().topk(places).indices)
        entries.append(codes.gather(1, index[-1]))
    return torch.cat(index), torch.cat(entries)


def refitted(
    targets: torch.Tensor, dictionary: torch.Tensor, index: torch.Tensor, codes: torch.Tensor, coding: Coding
) -> torch.Tensor:
    """Codes (n, places) over the atoms `index` (n, places), found again without the penalty, which had made them too small.

    Coordinate descent on each word's own least squares; a code of 0 stays 0, and non-negative ones never fall below it.
    """
    gram = (dictionary @ dictionary.T)[index.unsqueeze(2), index.unsqueeze(1)]
    products = (targets @ dictionary.T).gather(1, index)
    allowed, codes = codes != 0, codes.clone()
    for place in (place for _ in range(coding.iterations) for place in range(index.shape[1])):
        own = gram[:, place, place].clamp(min=1e-12)
        moved = codes[:, place] + (products[:, place] - (gram[:, place] * codes).sum(1)) / own
        codes[:, place] = (moved.clamp(min=0) if coding.nonnegative else moved) * allowed[:, place]
    return codes


@torch.no_grad()
def dictionary_vectors(
    table: torch.Tensor, dictionary: torch.Tensor, index: torch.Tensor, codes: torch.Tensor, coding: Coding
) -> DictionaryVectors:
    """T-03a, and with a non-negative coding T-03b: what `code_words` found, refitted, times the lengths of the words.

    Faruqui et al. 2015 (arXiv 1506.02004), survey 6.1: ten times as many atoms as dimensions, all entries, for vectors that
    people can read; a small dictionary and few entries make a small table of it. The paper's formula also keeps D from being
    negative, its code does not, and no such D could make vectors with entries of both signs.
    """
    vectors = DictionaryVectors(*table.shape, len(dictionary), index.shape[1]).to(table.device)
    cut = zip(*(part.split(CHUNK) for part in (normalize(table), index, codes)), strict=True)
    found = [refitted(targets, dictionary, places, entries, coding) for targets, places, entries in cut]
    vectors.coefficients.copy_(torch.cat(found) * table.norm(dim=1, keepdim=True))
    vectors.index.copy_(index)
    vectors.dictionary.copy_(dictionary)
    return vectors


@torch.no_grad()
def binary_vectors(
    table: torch.Tensor, atoms: int, index: torch.Tensor, codes: torch.Tensor, ridge: float = 1e-5
) -> DictionaryVectors:
    """T-03c: ones where a non-negative code (`code_words`) is above 0, and the dictionary of least squared error for them.

    In Faruqui et al. 2015 (arXiv 1506.02004), survey 6.1, these ones are features of a classifier and need no dictionary any
    more; a BERT needs vectors of its width.
    """
    index = index.masked_fill(codes <= 0, atoms)  # none
    vectors = DictionaryVectors(*table.shape, atoms, index.shape[1], binary=True).to(table.device)
    vectors.index.copy_(index)
    vectors.dictionary.copy_(binary_least_squares(index, table, atoms, ridge))
    return vectors


def strongest_words(codes: torch.Tensor, names: Sequence[str], dimensions: Sequence[int], k: int = 5) -> pandas.DataFrame:
    """A row per dimension of the codes (n, dimensions): the k words with its largest entries; `names` has the n words."""
    top = codes[:, list(dimensions)].topk(k, dim=0).indices.T.tolist()
    return pandas.DataFrame([[names[word] for word in row] for row in top], index=list(dimensions), columns=range(1, k + 1))


def coherence(codes: torch.Tensor, table: torch.Tensor, k: int = 5) -> torch.Tensor:
    """Per dimension of the codes (n, dimensions) how near its k strongest words are in the table (n, hidden), mean cosine.

    A stand-in for the paper's word intrusion, where people look for the word that does not belong to these. Dimensions with
    fewer than k positive entries are left out. The table itself as codes says how much its own dimensions mean.
    """
    top = codes.topk(k, dim=0).indices
    total = normalize(table, dim=1)[top].sum(0).square().sum(1)  # k cosines of 1, and each pair twice
    return ((total - k) / (k * (k - 1)))[(codes > 0).sum(0) >= k]


# --- T-04 compositional codes ---------------------------------------------------------------------------------------


def gumbel_softmax(scores: torch.Tensor, temperature: float, noise: float = 1.0) -> torch.Tensor:
    """A random choice from softmax(scores) over the last dimension: nearly a one at one place, yet with a gradient.

    softmax((scores + G) / T) with G = -log(-log u), u uniform: the largest entry is at place j with probability softmax_j. With
    G weighed by `noise` it is a choice from softmax(scores / noise), which is the more decided the less of it is left.
    """
    drawn = -torch.empty_like(scores).exponential_().log()  # -log u is an exponential number
    return ((scores + noise * drawn) / temperature).softmax(-1)


class CodeLearner(nn.Module):
    """The autoencoder of T-04: a vector chooses an entry of each codebook, and is made again as their sum.

    h = tanh(W_1 e + b_1) of width books * count / 2, scores = log softplus(W_2 h + b_2). Shu and Nakayama 2017 (arXiv
    1711.01068), survey 6.1; sizes and start as in their code.
    """

    def __init__(self, embedding_dim: int, books: int, count: int):
        super().__init__()
        self.hidden = nn.Linear(embedding_dim, max(1, books * count // 2))
        self.choice = nn.Linear(self.hidden.out_features, books * count)
        self.codebooks = nn.Parameter(torch.empty(books, count, embedding_dim))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.01, 0.01)

    def scores(self, vectors: torch.Tensor) -> torch.Tensor:
        """Log of what speaks for each entry, (n, books, count), of vectors (n, width)."""
        found = softplus(self.choice(self.hidden(vectors).tanh()))
        return (found + 1e-8).log().unflatten(1, self.codebooks.shape[:2])

    def forward(self, vectors: torch.Tensor, temperature: float, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors made again, (n, width), and the random choices that made them, (n, books, count)."""
        chosen = gumbel_softmax(self.scores(vectors), temperature, noise)
        return chosen.flatten(1) @ self.codebooks.flatten(0, 1), chosen


@torch.no_grad()
def chosen_codes(learner: CodeLearner, vectors: torch.Tensor) -> torch.Tensor:
    """The entry that speaks for itself most in each codebook, without noise: codes (n, books) of vectors (n, width)."""
    return torch.cat([learner.scores(part).argmax(-1) for part in vectors.split(CHUNK)])


@dataclass(frozen=True)
class CodeTraining:
    """How a `CodeLearner` is trained. The authors: Adam at 1e-4, batches of 64, 200 epochs, gradients clipped to norm 0.001.

    The temperature falls by a constant factor each step to `last_temperature`, and stays where none is given; `noise` weighs the
    random numbers. With a `spread` the network does not begin as theirs, but decided (`begin_decided`).
    """

    steps: int = 500
    learning_rate: float = 3e-3
    batch_size: int = 128
    temperature: float = 1.0
    last_temperature: float | None = None
    noise: float = 1.0
    clip: float = 1e-3
    spread: float = 0.0
    looks: int = 5  # how often the codes are looked at
    seed: int = 0

    def temperature_at(self, step: int) -> float:
        """That of step 1, 2, ...: the first one at step 1, the last one at the end."""
        last = self.temperature if self.last_temperature is None else self.last_temperature
        return self.temperature * (last / self.temperature) ** ((step - 1) / max(1, self.steps - 1))


@torch.no_grad()
def begin_decided(learner: CodeLearner, scaled: torch.Tensor, spread: float) -> None:
    """A start from which few steps come farther: choices that are decided, and codebooks that fit them. In place.

    The weights are normal numbers, so that for vectors (n, width) whose entries have size 1 the hidden layer sees numbers of
    size 1 and the choice layer gives about `spread`. The codebooks are those of least squares for the codes that this makes.
    """
    for layer, size in ((learner.hidden, 1.0), (learner.choice, spread)):
        nn.init.normal_(layer.weight, std=size / layer.in_features**0.5)
        nn.init.zeros_(layer.bias)
    vectors = CompositionalVectors(*scaled.shape, *learner.codebooks.shape[:2]).to(scaled.device)
    vectors.codes.copy_(chosen_codes(learner, scaled))
    fit_codebooks(vectors, scaled)
    learner.codebooks.copy_(vectors.codebooks)


def train_learner(learner: CodeLearner, scaled: torch.Tensor, training: CodeTraining) -> list[dict[str, float]]:
    """Train the autoencoder on vectors (n, width) whose entries have size 1. The log has a line per look:

    the `step`, the mean `loss` |e - e'|^2 / 2 since the last one, the `certainty` of the choices (the mean largest entry: 1 for
    a decided code), and the share of the codes of about a thousand words that `moved` since the last look.
    """
    optimizer, losses, log = torch.optim.Adam(learner.parameters(), lr=training.learning_rate), [], []
    watched = scaled[:: max(1, len(scaled) // 1000)]
    codes = chosen_codes(learner, watched)
    for step in range(1, training.steps + 1):
        batch = scaled[torch.randint(len(scaled), (training.batch_size,)).to(scaled.device)]
        made, chosen = learner(batch, training.temperature_at(step), training.noise)
        loss = (made - batch).square().sum(1).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), training.clip)
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, training.steps // training.looks) == 0:
            before, codes = codes, chosen_codes(learner, watched)
            log.append({"step": step, "loss": sum(losses) / len(losses), "certainty": chosen.amax(-1).mean().item(),
                        "moved": (codes != before).float().mean().item()})  # fmt: skip
            losses = []
    return log


def learn_codes(
    table: torch.Tensor, books: int, count: int, training: CodeTraining | None = None
) -> tuple[CompositionalVectors, list[dict[str, float]]]:
    """T-04: train the autoencoder on the table, and keep its codebooks and the entry that each word chooses in each.

    Shu and Nakayama 2017 (arXiv 1711.01068), survey 6.1. Entries of the table are scaled to size 1 before, and codebooks scaled
    back. Fewer and larger steps than theirs. Returns the part and the log of `train_learner`. Raises ValueError for sizes that
    do not fit and for numbers that are not finite.
    """
    check_table(table)
    training, scale = training or CodeTraining(), table.square().mean().sqrt().clamp(min=1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        vectors = CompositionalVectors(*table.shape, books, count).to(table.device)
        learner = CodeLearner(table.shape[1], books, count).to(table.device)
        if training.spread:
            begin_decided(learner, table / scale, training.spread)
        log = train_learner(learner, table / scale, training)
    with torch.no_grad():
        vectors.codes.copy_(chosen_codes(learner, table / scale))
        vectors.codebooks.copy_(learner.codebooks * scale)
    return vectors, log


@torch.no_grad()
def fit_codebooks(vectors: CompositionalVectors, table: torch.Tensor) -> None:
    """The codebooks of least squared error for the codes as they are; in place.

    A vector added to all entries of one codebook and taken from those of another changes no sum: of these the smallest is
    taken.
    """
    places = vectors.codes.long() + vectors.count * torch.arange(vectors.books, device=table.device)
    size = vectors.books * vectors.count
    vectors.codebooks.copy_(binary_least_squares(places, table, size, 1e-6 * len(table)).view_as(vectors.codebooks))


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The number of the nearest centroid (k, d) of each point (n, d)."""
    return (centroids.square().sum(1) / 2 - points @ centroids.T).argmin(1)


def kmeans(points: torch.Tensor, k: int, iterations: int = 6, seed: int = 0) -> torch.Tensor:
    """The k centroids (k, d) of Lloyd's algorithm for points (n, d); an empty cluster keeps its centroid.

    It begins with the groups that random directions make: each point goes with the direction along which it lies farthest.
    Random points for centroids would not do in many dimensions: the mean is nearer to most points than any other point is.
    """
    directions = torch.randn(points.shape[1], k, generator=torch.Generator().manual_seed(seed)).to(points)
    code, centroids = (points @ directions).argmax(1), points.new_zeros(k, points.shape[1])
    for _ in range(iterations):
        sums = torch.zeros_like(centroids).index_add_(0, code, points)
        counts = torch.bincount(code, minlength=k).unsqueeze(1)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        code = nearest(points, centroids)
    return centroids


def greedy_codes(targets: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Codes (n, books): in each codebook (books, count, width) in turn the entry nearest to what is left of a target."""
    left, found = targets.clone(), []
    for book in codebooks:
        found.append(nearest(left, book))
        left -= book[found[-1]]
    return torch.stack(found, 1)


@torch.no_grad()
def additive_codes(table: torch.Tensor, books: int, count: int, sample: int = 12_288, seed: int = 0) -> CompositionalVectors:
    """The control of T-04: the same form without a network, by residual k-means.

    One codebook after the other is k-means of what those before it leave of a random `sample` of the words; then all words are
    coded so. Raises ValueError for more entries than words in the sample, and for numbers that are not finite.
    """
    check_table(table)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:sample]
    vectors, left = CompositionalVectors(*table.shape, books, count).to(table.device), table[order.to(table.device)]
    if count > len(left):
        raise ValueError(f"{count} vectors of a codebook need as many words, the sample has {len(left)}")
    for place in range(books):
        book = kmeans(left, count, seed=seed + place)
        left = left - book[nearest(left, book)]
        vectors.codebooks[place] = book
    vectors.codes.copy_(torch.cat([greedy_codes(part, vectors.codebooks) for part in table.split(CHUNK)]))
    return vectors


def code_usage(vectors: CompositionalVectors) -> dict[str, float]:
    """How a code is used: `entropy` in bits, mean over codebooks; the share of entries `used`; the share of words with a code
    of their own (`distinct`). An even code has log2(count) bits.
    """
    uses = torch.stack([torch.bincount(code.long(), minlength=vectors.count) for code in vectors.codes.T])
    shares = uses / len(vectors.codes)
    counts = vectors.codes.unique(dim=0, return_counts=True)[1]
    entropy = -(shares * shares.clamp(min=1e-30).log2()).sum(1).mean().item()
    return {"entropy": entropy, "used": (shares > 0).float().mean().item(),
            "distinct": (counts == 1).sum().item() / len(vectors.codes)}  # fmt: skip


def similar_codes(vectors: CompositionalVectors, word: int, among: torch.Tensor, k: int = 3) -> list[tuple[int, int]]:
    """The k ids of `among` (n,) that share the most codes with a word, without itself; pairs of id and number of codes."""
    others = among[among != word]
    shared = (vectors.codes[others] == vectors.codes[word]).sum(1).topk(k)
    return list(zip(others[shared.indices].tolist(), shared.values.tolist(), strict=True))


# --- T-06 differentiated softmax ------------------------------------------------------------------------------------


def frequency_rows(counts: torch.Tensor) -> torch.Tensor:
    """The place of each word by frequency, 0 for the most frequent, (vocabulary,); where these are equal, by id."""
    order = counts.double().argsort(descending=True, stable=True)
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))


def band_tables(vectors: BandedVectors, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of a table (vocabulary, hidden) that are each band's, in the band's order."""
    return table[vectors.row.long().argsort()].split(vectors.sizes)


def leading_factors(matrix: torch.Tensor, width: int, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """W_a (n, width) and W_b (width, hidden) of least |matrix - W_a W_b|^2, columns of the first as long as rows of the second.

    The truncated SVD of a tall matrix, by the eigenvectors of its small Gram matrix. With `weights` (n,) an error counts so much
    in each row.
    """
    rows = matrix.double() if weights is None else matrix.double() * weights.double().unsqueeze(1)
    directions = torch.linalg.eigh(rows.T @ matrix.double()).eigenvectors
    right = directions[:, -width:].flip(1).T.to(matrix.dtype)
    left = matrix @ right.T
    root = left.norm(dim=0).sqrt().clamp(min=1e-6)  # of the singular values
    return left / root, root.unsqueeze(1) * right


@torch.no_grad()
def banded_vectors(
    table: torch.Tensor,
    sizes: Sequence[int],
    widths: Sequence[int],
    counts: torch.Tensor | None = None,
    weighted: bool = False,
) -> BandedVectors:
    """T-06: bands of `sizes` words by frequency, each in its own number of dimensions; started by the SVD of each band.

    Chen, Grangier and Auli 2015 (arXiv 1512.04906), survey 6.2. `counts` (vocabulary,) orders the words, without them their ids
    do. One band is a truncated SVD of the table, and one of full width the table. If `weighted`, an error counts as often as its
    word is read, and once more, so that words that never are count, too. Raises ValueError for sizes and widths that do not
    fit, for weights without counts, and for numbers that are not finite.
    """
    check_table(table)
    if weighted and counts is None:
        raise ValueError("to weigh words by how often they are read, their counts are needed")
    vectors = BandedVectors(*table.shape, sizes, widths).to(table.device)
    if counts is not None:
        vectors.row.copy_(frequency_rows(counts))
    ups, often = [], [None] * len(vectors.sizes)
    if weighted:
        often = band_tables(vectors, counts.to(table.device) + 1)
    for own, band, weights in zip(vectors.tables, band_tables(vectors, table), often, strict=True):
        narrow = own.shape[1] < table.shape[1]
        left, right = leading_factors(band, own.shape[1], weights) if narrow else (band, None)
        own.copy_(left)
        ups += [right] if narrow else []
    if ups:
        vectors.up.copy_(torch.cat(ups))
    return vectors


def band_report(vectors: BandedVectors, table: torch.Tensor, counts: torch.Tensor) -> pandas.DataFrame:
    """A row per band: `words`, `width`, its share of a text's `tokens` (`counts`) and of the `numbers` stored, its relative
    squared `error` and the `bound` on it.
    """
    rows, hidden = [], table.shape[1]
    made = band_tables(vectors, as_table(vectors))
    tokens = counts.double()[vectors.row.long().argsort().to(counts.device)].split(vectors.sizes)
    total = sum(parameter.numel() for parameter in vectors.parameters())
    for own, own_tokens, band, now in zip(vectors.tables, tokens, band_tables(vectors, table), made, strict=True):
        words, width = own.shape
        numbers, norm = own.numel() + (width * hidden if width < hidden else 0), float(band.double().square().sum())
        error, bound = float((now - band).double().square().sum()) / norm, left_out(band, width) / norm
        rows.append({"words": words, "width": width, "tokens": float(own_tokens.sum() / counts.sum()),
                     "numbers": numbers / total, "error": error, "bound": bound})  # fmt: skip
    return pandas.DataFrame(rows, index=pandas.RangeIndex(1, len(rows) + 1, name="band"))


def band_logits(vectors: BandedVectors, states: torch.Tensor) -> torch.Tensor:
    """states E^T without E, the output layer of T-06: (..., vocabulary) from states (..., hidden).

    Each band sees its own slice of `states up^T`, which is the paper's last hidden layer; then one product with each band's
    table. A state costs as many multiply-adds as the part has numbers.
    """
    slices, start, found = states, 0, []
    if vectors.up is not None:
        slices = states @ vectors.up.T.to(states.dtype)
    for table in vectors.tables:
        width = table.shape[1]
        narrow = width < vectors.embedding_dim
        found.append((slices[..., start : start + width] if narrow else states) @ table.T.to(states.dtype))
        start += width if narrow else 0
    return torch.cat(found, -1)[..., vectors.row.long()]


# --- T-07 WEST ------------------------------------------------------------------------------------------------------


def smallest_base(words: int, digits: int) -> int:
    """The smallest base in which so many digits tell `words` words apart. Raises ValueError for less than 1 digit."""
    if digits < 1:
        raise ValueError(f"a number has 1 digit or more, got {digits}")
    guess = math.ceil(words ** (1 / digits))  # may be off by one in floating point
    return next(base for base in range(max(1, guess - 1), guess + 2) if base**digits >= words)


def digit_means(vectors: DigitVectors, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each place and digit the mean part of the words that have it there, (digits, base, width), and how many these are.

    The mean is 0 where no word has the digit.
    """
    codes = vectors.codes(torch.arange(len(table), device=table.device))
    means, counts = table.new_zeros(vectors.blocks.shape), []
    for place, block in enumerate(table.chunk(vectors.digits, 1)):
        counts.append(torch.bincount(codes[:, place], minlength=vectors.base))
        means[place].index_add_(0, codes[:, place], block)
    counts = torch.stack(counts)
    return means / counts.clamp(min=1).unsqueeze(2), counts


def main_coordinate(block: torch.Tensor) -> torch.Tensor:
    """Where each row of a block (n, width) lies along the direction in which the rows differ most, (n,)."""
    centred = block - block.mean(0)
    return centred @ torch.linalg.eigh((centred.T @ centred).double()).eigenvectors[:, -1].to(block.dtype)


def sorted_numbers(table: torch.Tensor, base: int) -> torch.Tensor:
    """Numbers (vocabulary,) whose two digits say where the halves of a word's vector lie, each along its main direction.

    The high digit cuts the words, sorted by the second half, into groups of nearly equal size, and the low digit does so by the
    first. Words that share a high digit must differ in the low one: those that would not move on to the next. In the smallest
    base that moves most, and leaves the order in a group; in a large one it hardly moves any.
    """
    low, high = (main_coordinate(half) for half in table.chunk(2, 1))
    place = torch.arange(len(table), device=table.device) * base // len(table)  # the digit of the first, second, ... word
    wanted = torch.empty_like(place).index_copy_(0, low.argsort(), place)
    numbers = torch.empty_like(wanted)
    for digit, group in enumerate(high.argsort().split(torch.bincount(place, minlength=base).tolist())):
        group = group[low[group].argsort()]
        step = torch.arange(len(group), device=group.device)
        apart = (wanted[group] - step).cummax(0).values + step  # each at least one more than the one before it
        numbers[group] = digit * base + apart.clamp(max=base - len(group) + step)
    return numbers


@torch.no_grad()
def digit_vectors(table: torch.Tensor, digits: int, base: int | None = None, numbers: torch.Tensor | None = None) -> DigitVectors:
    """T-07: the blocks of least squared error, means of the words that have a digit. Without a `base` the smallest.

    WEST, Variani, Suresh and Weintraub 2018 (arXiv 1811.08417), survey 6.2, is trained from the start. `numbers` (vocabulary,)
    are those of the words, without them their ids. Raises ValueError for digits and bases that do not fit, and for numbers of
    more digits, or that two words share.
    """
    check_table(table)
    base = smallest_base(len(table), digits) if base is None else base
    vectors = DigitVectors(*table.shape, digits, base).to(table.device)
    if numbers is not None:
        known = numbers.unique()
        if len(known) != len(table) or known[0] < 0 or known[-1] >= base**digits:
            raise ValueError(f"the words need numbers from 0 to {base**digits - 1}, one each")
        vectors.number.copy_(numbers)
    vectors.blocks.copy_(digit_means(vectors, table)[0])
    return vectors


def digit_report(vectors: DigitVectors, table: torch.Tensor) -> pandas.DataFrame:
    """A row per place, lowest first: `digits` in use, the share of the block's variance between them (`kept`), and what
    `chance` would have: (digits - 1) / (words - 1), whatever the table, if words had their digits at random.
    """
    means, counts = digit_means(vectors, table.double())
    rows = []
    for block, own, count in zip(table.double().chunk(vectors.digits, 1), means, counts, strict=True):
        between = (count.unsqueeze(1) * (own - block.mean(0)).square()).sum() / (block - block.mean(0)).square().sum()
        used = int((count > 0).sum())
        rows.append({"digits": used, "kept": float(between), "chance": (used - 1) / (len(table) - 1)})
    return pandas.DataFrame(rows, index=pandas.RangeIndex(vectors.digits, name="place"))


def west_matrices(vectors: DigitVectors) -> tuple[torch.Tensor, torch.Tensor]:
    """B (vocabulary, digits * base), with `digits` ones a row, and block-diagonal D (digits * base, hidden): E = B D.

    To look at, for small vocabularies: B is nearly all zeros.
    """
    ids = torch.arange(vectors.num_embeddings, device=vectors.blocks.device)
    place = vectors.codes(ids) + vectors.base * torch.arange(vectors.digits, device=ids.device)
    B = vectors.blocks.new_zeros(len(ids), vectors.digits * vectors.base).scatter_(1, place, 1.0)
    return B, torch.block_diag(*vectors.blocks.detach())


def digit_logits(vectors: DigitVectors, states: torch.Tensor) -> torch.Tensor:
    """states E^T without E, the output layer of T-07: (..., vocabulary) from states (..., hidden).

    Each part of a state meets each digit of its place once, base * hidden multiply-adds in all; a word's logit is the sum of
    what its digits got, which multiplies nothing.
    """
    cut = states.unflatten(-1, (vectors.digits, -1))
    scores = torch.einsum("...ps,pbs->p...b", cut, vectors.blocks.to(states.dtype))
    codes = vectors.codes(torch.arange(vectors.num_embeddings, device=states.device))
    return sum(score[..., code] for score, code in zip(scores, codes.T, strict=True))
