"""Survey section 5.1: words from their characters, at the input (S-01, S-02, S-04) and at the output (S-02, S-03) of a BERT.

The parts that read spellings are in `utils.parts.characters`. Here a vocabulary is spelled, a part is fitted to a table (its last
layer, which is linear, in closed form; what lies under it by `utils.tables.regress`), and words are guessed by rows that
characters make, or letter by letter. All papers train from scratch; here the pre-trained table is what is imitated, and the encoder
of a trained language model stays as it is while its output layer is replaced, as Jozefowicz et al. do with both of theirs.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, linear
from torch.nn.utils.rnn import pad_sequence

from utils import bert, tasks, training
from utils.language import IGNORED, LanguageModel, Masking
from utils.parts.characters import BEGIN, CONTINUE, END, FIRST, PAD, UNKNOWN, CharacterBiLSTM, CharacterCNN, CharacterVectors
from utils.profiles import Profile
from utils.sharing.tables import INSIDE, SPECIAL, check_special
from utils.tables import regress, word_counts
from utils.tasks import Split, Task
from utils.training import Loss, TrainingLog

# --- spelling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spelling:
    """How every piece of a vocabulary is spelled: `symbols` (vocabulary, longest), a row of `PAD` for pieces of `own` rows."""

    alphabet: str
    symbols: torch.Tensor
    own: tuple[int, ...]

    def options(self) -> dict:
        """What a part's constructor takes as `spelling`."""
        return {"alphabet": self.alphabet, "longest": self.symbols.shape[1], "own": list(self.own)}

    def alike(self) -> torch.Tensor:
        """How many pieces are spelled as each piece is, itself included; (vocabulary,). 0 for pieces that are not spelled."""
        _, group, counts = self.symbols.unique(dim=0, return_inverse=True, return_counts=True)
        return counts[group] * (self.symbols[:, 0] != PAD)


def alphabet_of(pieces: Sequence[str], size: int) -> str:
    """The `size` characters that most pieces need, or all where there are fewer; of equally frequent ones the first.

    Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"an alphabet needs 1 character or more, got {size}")
    counts = Counter(character for piece in pieces for character in split_mark(piece)[1])
    return "".join(character for character, _ in counts.most_common(size))


def split_mark(piece: str) -> tuple[bool, str]:
    """Whether a piece continues a word, and its characters without the mark for that."""
    continues = piece.startswith(INSIDE) and piece != INSIDE
    return continues, piece.removeprefix(INSIDE) if continues else piece


def spell_words(words: Sequence[str], alphabet: str) -> torch.Tensor:
    """Spellings (words, longest) of words or pieces: `##ing` begins with another symbol than `ing`. No empty word."""
    number = {character: FIRST + place for place, character in enumerate(alphabet)}
    rows = []
    for word in words:
        continues, text = split_mark(word)
        rows.append([CONTINUE if continues else BEGIN, *(number.get(character, UNKNOWN) for character in text), END])
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def spell_vocabulary(pieces: Sequence[str], characters: int = 200, own: Sequence[int] | None = None) -> Spelling:
    """Spell a vocabulary in its most frequent characters; others become one unknown character, and pieces may become alike.

    Pieces of rows of their `own` (by default the special tokens, which mean no text) are not spelled. Pieces that are spelled alike
    are composed alike, whatever their vectors were: list those that matter among `own`, or take more characters. Raises ValueError
    for a vocabulary without special tokens, an alphabet of no character, and ids beyond the vocabulary.
    """
    check_special(pieces)
    own = [place for place, piece in enumerate(pieces) if piece in SPECIAL] if own is None else own
    if not all(0 <= place < len(pieces) for place in own):
        raise ValueError(f"rows of their own need ids below {len(pieces)}, got {list(own)}")
    texts = [piece for place, piece in enumerate(pieces) if place not in set(own)]
    alphabet = alphabet_of(texts, characters)
    spelled = spell_words(texts, alphabet)
    symbols = spelled.new_zeros(len(pieces), spelled.shape[1])
    symbols[[place for place in range(len(pieces)) if place not in set(own)]] = spelled
    return Spelling(alphabet, symbols, tuple(sorted(own)))


def letters(symbols: torch.Tensor, alphabet: str) -> list[str]:
    """What spellings (words, longest) say, up to their end; an unknown character is written as □."""
    written = {BEGIN: "", CONTINUE: INSIDE, UNKNOWN: "□"}
    texts = []
    for row in symbols.tolist():
        row = row[: row.index(END)] if END in row else [symbol for symbol in row if symbol != PAD]
        texts.append("".join(alphabet[symbol - FIRST] if symbol >= FIRST else written.get(symbol, "") for symbol in row))
    return texts


# --- S-01 C2W, S-04 CNN and highway, S-02 with a correction: parts fitted to a table --------------------------------


@torch.no_grad()
def with_spelling(vectors: CharacterVectors, spelling: Spelling) -> CharacterVectors:
    """Give a part the spelling for which it was made. Raises ValueError for another one."""
    if vectors.given != spelling.options():
        raise ValueError("the part was made for another spelling: build it with `spelling.options()`")
    vectors.spelling.copy_(spelling.symbols)
    return vectors


def bilstm_vectors(table: torch.Tensor, spelling: Spelling, seed: int = 0, **sizes) -> CharacterBiLSTM:
    """S-01: a BiLSTM over characters in the place of a table (vocabulary, hidden); `sizes` as in `CharacterBiLSTM`.

    Ling et al. 2015 (arXiv 1508.02096), survey 5.1. Random but for the rows of pieces that are not spelled and for the last layer.
    Added to the paper: symbols for begin and end of a piece, without which `ing` and `##ing` were one.
    """
    return _fitted(CharacterBiLSTM, table, spelling, seed, sizes)


def cnn_vectors(table: torch.Tensor, spelling: Spelling, seed: int = 0, **sizes) -> CharacterCNN:
    """S-04: convolution and highway over characters in the place of a table (vocabulary, hidden); `sizes` as in `CharacterCNN`.

    Kim et al. 2016 (arXiv 1508.06615), survey 5.1. With a `correction_size` these are the rows of S-02 (Jozefowicz et al. 2016),
    whose input and output layers have such a network each. Random but for the rows of pieces that are not spelled and for the last
    layer; the correction begins at 0 (see `fit_correction`).
    """
    return _fitted(CharacterCNN, table, spelling, seed, sizes)


def _fitted(kind: type[CharacterVectors], table: torch.Tensor, spelling: Spelling, seed: int, sizes: dict) -> CharacterVectors:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vectors = with_spelling(kind(*table.shape, spelling.options(), **sizes), spelling).to(table.device)
    with torch.no_grad():
        vectors.rows.copy_(table[list(spelling.own)])
    fit_projection(vectors, table)
    return vectors


@torch.no_grad()
def fit_projection(vectors: CharacterVectors, table: torch.Tensor, counts: torch.Tensor | None = None, chunk: int = 4096) -> None:
    """Set the last layer, which is linear, to the least squares solution for the features as they are: min ||F W + b - E||^2.

    Words count alike, or by `counts` (vocabulary,). A ridge of a millionth of the features' mean square keeps the solution finite.
    """
    ids = (vectors.spelling[:, 0] != PAD).nonzero().flatten()
    size = vectors.projection.in_features + 1
    gram, cross = (table.new_zeros(size, width, dtype=torch.double) for width in (size, table.shape[1]))
    for part in ids.split(chunk):
        features = nn.functional.pad(vectors.features(vectors.spelling[part]).double(), (0, 1), value=1.0)
        target = table[part] - vectors.corrections(part) if vectors.correction_size else table[part]
        weighted = features if counts is None else features * counts.to(features)[part, None]
        gram += weighted.T @ features
        cross += weighted.T @ target.double()
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, cross)
    vectors.projection.weight.copy_(solution[:-1].T)
    vectors.projection.bias.copy_(solution[-1])


def fit_in_turns(
    vectors: CharacterVectors, table: torch.Tensor, counts: torch.Tensor | None = None, turns: int = 4, *, steps: int, **options
) -> None:
    """Fit a network to a table: the last layer in closed form (`fit_projection`), then what lies under it by Adam, in turns.

    `steps` of `regress` are shared out among the turns, `options` go to it; words count alike, or by `counts` (vocabulary,). The last
    layer is held while the rest learns: steps of both at once undo what was solved. Raises ValueError for fewer steps than turns.
    """
    if not 1 <= turns <= steps:
        raise ValueError(f"a fit needs 1 turn or more, and a step for each, got {turns} turns and {steps} steps")
    options = {"counts": counts, **options}
    seed = options.pop("seed", 0)
    fit_projection(vectors, table, counts)
    for turn in range(turns):
        vectors.projection.requires_grad_(False)
        regress(vectors, table, steps=steps // turns, seed=1000 * seed + turn, **options)  # no two seeds share a turn
        vectors.projection.requires_grad_(True)
        fit_projection(vectors, table, counts)


def own_rate(model: nn.Module, learning_rate: float) -> list[dict]:
    """Parameter groups for `utils.training.train`: the word table's own weights at `learning_rate`, all others at the run's.

    A composed vector sums hundreds of features, so a step of Adam moves it much farther than a row of a table.
    """
    own = list(bert.embeddings(model).word_embeddings.parameters())
    held = {id(parameter) for parameter in own}
    others = [parameter for parameter in model.parameters() if id(parameter) not in held]
    return [{"params": others}, {"params": own, "lr": learning_rate}]


@torch.no_grad()
def fit_correction(vectors: CharacterVectors, table: torch.Tensor, counts: torch.Tensor | None = None) -> None:
    """Set the correction to what helps most: the truncated SVD of what the characters miss (Eckart and Young 1936).

    M gets orthonormal columns. Words count alike, or by `counts` (vocabulary,). The paper learns it with everything else. Raises
    ValueError for a part without a correction.
    """
    if not vectors.correction_size:
        raise ValueError("this part has no correction: make it with a correction_size of 1 or more")
    vectors.correction.weight.zero_()
    missed = table.float() - vectors.expanded().weight
    weighted = missed if counts is None else missed * counts.to(missed).unsqueeze(1)
    _, directions = torch.linalg.eigh(weighted.T @ missed)  # ascending; far smaller than the table
    directions = directions.flip(1)[:, : vectors.correction_size]
    vectors.correction.weight.copy_(missed @ directions)
    vectors.up.weight.copy_(directions)


@torch.no_grad()
def vectors_of(vectors: CharacterVectors, words: Sequence[str]) -> torch.Tensor:
    """Vectors (words, hidden) of any words, in the vocabulary or not: what only composed tables can give."""
    symbols = spell_words(words, vectors.given["alphabet"]).to(vectors.rows.device)
    return vectors.of_spellings(symbols)


# --- what the compositions do ---------------------------------------------------------------------------------------


def backwards(symbols: torch.Tensor) -> torch.Tensor:
    """The same spellings with their characters in reverse order, between begin and end as before."""
    turned = symbols.clone()
    for row, length in zip(turned, (symbols != PAD).sum(1).tolist(), strict=True):
        row[1 : length - 1] = row[1 : length - 1].flip(0)
    return turned


@torch.no_grad()
def backwards_cosine(vectors: CharacterVectors, ids: torch.Tensor) -> float:
    """Mean cosine between the vectors of words and of the same words backwards; 1 where the order of letters says nothing.

    Palindromes do not count, nor pieces without a spelling; nan where nothing is left.
    """
    symbols = vectors.spelling[ids]
    turned = backwards(symbols)
    differ = (symbols != turned).any(1)
    first, second = (vectors.of_spellings(some[differ]) for some in (symbols, turned))
    return cosine_similarity(first, second).mean().item()


@torch.no_grad()
def mean_gate(vectors: CharacterCNN, ids: torch.Tensor) -> float:
    """How far the highway layers open, the mean of their gates over words and units: 0 passes features on, 1 transforms all.

    It begins near sigmoid(-2) = 0.12. Raises ValueError for a part without highway layers.
    """
    if not len(vectors.highways):
        raise ValueError("this part has no highway layers: make it with highways of 1 or more")
    seen: list[torch.Tensor] = []
    handles = [highway.register_forward_pre_hook(lambda module, args: seen.append(module.gate(args[0]).mean()))
               for highway in vectors.highways]  # fmt: skip
    try:
        vectors.compose(ids)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen).mean().item()


@torch.no_grad()
def correction_share(vectors: CharacterVectors, ids: torch.Tensor) -> float:
    """Mean length of a word's correction over the length of its vector; 0 where nothing is corrected."""
    return (vectors.corrections(ids).norm(dim=1) / vectors.compose(ids).norm(dim=1).clamp(min=1e-12)).mean().item()


# --- S-02 and S-03: other output layers behind an encoder that stays as it is -----------------------------------------


class OutputModel(nn.Module):
    """The encoder of a trained language model, which takes no gradient, and an output layer that is to be trained.

    Jozefowicz et al. 2016 (arXiv 1602.02410) replace the softmax of a converged model so. Subclasses say how surprising a word is.
    """

    def __init__(self, language: LanguageModel):
        super().__init__()
        self.bert, self.config = language.bert, language.config

    @torch.no_grad()
    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The last layer's states, (batch, length, hidden)."""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def surprise(self, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """-log p(word | state) in nats, (n,), of states (n, hidden) and word ids (n,)."""
        raise NotImplementedError

    def output(self) -> list[nn.Parameter]:
        """The parameters of the output layer: those that the encoder does not have."""
        encoder = set(map(id, self.bert.parameters()))
        return [parameter for parameter in self.parameters() if id(parameter) not in encoder]

    def ready(self) -> "OutputModel":
        """The model as it judges many words: here itself."""
        return self


class WordSoftmax(OutputModel):
    """S-02: logits h . e_w + b_w with rows e_w of any table, composed or not: a softmax over words.

    `rows` is an `nn.Embedding` or a `WordVectors`; with those of `cnn_vectors` it is the CNN softmax, with a `correction_size` the
    one with correction (128 numbers per word, an eighth of the states' width, in the paper), with the encoder's own table it is the
    tied softmax. The head's transform and bias begin as the language model's. The paper needs a much smaller learning rate for
    composed rows, all of which move with every step. Survey 5.1.
    """

    def __init__(self, language: LanguageModel, rows: nn.Module):
        super().__init__(language)
        self.head, self.rows = copy.deepcopy(language.head), rows

    def guess(self, states: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, float32, of states (..., hidden); composed rows are composed for it, all of them."""
        return self.head(states, self.rows.weight).float()

    def guess_among(self, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Logits (..., m) of m words (m,) only, float32, of states (..., hidden)."""
        return linear(self.head.transform(states), self.rows(words), self.head.bias[words]).float()

    def surprise(self, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """-log of the softmax over the whole vocabulary, (n,)."""
        return cross_entropy(self.guess(states), words, reduction="none")

    def ready(self) -> "WordSoftmax":
        """The same with a plain table, so that its rows are composed once; its head is a copy."""
        rows = self.rows if isinstance(self.rows, nn.Embedding) else self.rows.expanded()
        return WordSoftmax(self, rows)


def unigrams(split: Split, vocab_size: int) -> torch.Tensor:
    """The words' shares of a split's tokens, each counted once more than it occurs, so that all can be drawn; (vocab_size,)."""
    counts = word_counts(split, vocab_size) + 1.0
    return counts / counts.sum()


def importance_sampling(masking: Masking, noise: torch.Tensor, samples: int = 1024) -> Loss:
    """The loss of a `WordSoftmax` that composes few rows: find the hidden word among `samples` words drawn from `noise`.

    Of the set {word, drawn words} the word is the true one with probability softmax(s_w - log q_w), if s_w are the logits and
    q = `noise` (vocabulary,) the probabilities of drawing. Its minimum has s_w = log p_w + constant. All words of a batch share the
    drawn ones. Jozefowicz et al. 2016, section 3.1 (8192 of 793,471 words). Raises ValueError for a word that is never drawn.
    """
    if not bool((noise > 0).all()) or samples < 1:
        raise ValueError("every word needs a probability above 0 in the noise, and 1 sample or more is to be drawn")

    def loss(model: WordSoftmax, batch: dict) -> torch.Tensor:
        masked, labels = masking(batch["input_ids"])
        chosen = labels != IGNORED
        states, words = model.states(masked, batch["attention_mask"])[chosen], labels[chosen]
        drawn = torch.multinomial(noise, samples, replacement=True).to(words.device)
        return sampled_loss(model, states, words, drawn, noise.to(words.device))

    return loss


def sampled_loss(
    model: WordSoftmax, states: torch.Tensor, words: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Mean over the true words (n,) of -log softmax(s - log q), each against the drawn words (samples,); 0 for no word."""
    needed, place = torch.cat([words, drawn]).unique(return_inverse=True)  # every row is composed once
    scores = model.guess_among(states, needed) - noise[needed].log()
    true, others = scores.gather(1, place[: len(words), None]), scores[:, place[len(words) :]]
    losses = torch.logsumexp(torch.cat([true, others], 1), 1) - true.flatten()
    return losses.sum() / max(1, len(words))


class SpellingDecoder(nn.Module):
    """S-03: an LSTM that spells a word, symbol by symbol; a state of the encoder is what it begins with.

    -log p(word | h) = -sum_i log p(symbol_i | symbols before, h), the end included. No table of words: its size does not depend on
    the vocabulary. Jozefowicz et al. 2016 (arXiv 1602.02410): one layer of 1024 units, here fewer; forget gates begin at bias 1.
    """

    def __init__(self, hidden_size: int, symbols: int, character_size: int = 16, size: int = 256):
        super().__init__()
        self.begin = nn.Linear(hidden_size, 2 * size)
        self.characters = nn.Embedding(symbols, character_size, padding_idx=PAD)
        self.lstm = nn.LSTM(character_size, size, batch_first=True)
        self.out = nn.Linear(size, symbols - 1)  # `PAD` is never written
        with torch.no_grad():
            self.lstm.bias_ih_l0[size : 2 * size] = 1.0
            self.lstm.bias_hh_l0[size : 2 * size] = 0.0

    def memory(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """State and cell with which the LSTM begins, (1, n, size) each, of encoder states (n, hidden)."""
        state, cell = self.begin(states).unsqueeze(0).chunk(2, -1)
        return state.tanh().contiguous(), cell.contiguous()

    def scores(self, read: torch.Tensor, memory: tuple) -> tuple[torch.Tensor, tuple]:
        """Log-probabilities (n, length, symbols - 1) of the symbol after each of those read (n, length), and the new memory."""
        hidden, memory = self.lstm(self.characters(read), memory)
        return self.out(hidden).float().log_softmax(-1), memory

    def forward(self, states: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """-log p of spellings (n, longest) given states (n, hidden), (n,): every symbol is predicted from the true ones before."""
        before = nn.functional.pad(symbols[:, :-1], (1, 0), value=PAD)  # `PAD`: nothing is written yet
        scores, _ = self.scores(before, self.memory(states))
        target = (symbols - 1).clamp(min=0).unsqueeze(-1)
        return -(scores.gather(2, target).squeeze(-1) * (symbols != PAD)).sum(1)


@torch.no_grad()
def likeliest_spelling(decoder: SpellingDecoder, states: torch.Tensor, longest: int) -> torch.Tensor:
    """Symbols (n, longest), each the likeliest after those before it, of states (n, hidden); `PAD` after the end."""
    read, memory, written = states.new_full((len(states), 1), PAD, dtype=torch.long), decoder.memory(states), []
    ended = torch.zeros_like(read, dtype=torch.bool)
    for _ in range(longest):
        scores, memory = decoder.scores(read, memory)
        read = (scores.argmax(-1) + 1).masked_fill(ended, PAD)
        ended = ended | (read == END)
        written.append(read)
    return torch.cat(written, 1)


class SpellingModel(OutputModel):
    """A language model that spells the hidden word (S-03), on a vocabulary spelled by `spelling`.

    Pieces that are spelled alike share the probability of their spelling evenly, so that those of all pieces sum to at most 1. What is
    missing to 1 went to spellings that are no piece.
    """

    def __init__(self, language: LanguageModel, spelling: Spelling, **sizes):
        super().__init__(language)
        self.alphabet = spelling.alphabet
        self.register_buffer("symbols", spelling.symbols.long(), persistent=False)
        self.register_buffer("shared", spelling.alike().clamp(min=1).log(), persistent=False)
        self.decoder = SpellingDecoder(self.config.hidden_size, FIRST + len(spelling.alphabet), **sizes)
        self.to(next(language.parameters()).device)

    def surprise(self, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """-log p(spelling | state), and the logarithm of how many pieces share it, (n,). ValueError for a piece without one."""
        symbols = self.symbols[words]
        if bool((symbols[:, :1] == PAD).any()):
            raise ValueError("pieces with rows of their own are not spelled, and cannot be guessed: do not mask them")
        longest = int((symbols != PAD).sum(1).max()) if len(words) else 1
        return self.decoder(states, symbols[:, :longest]) + self.shared[words]

    def write(self, states: torch.Tensor) -> list[str]:
        """What the decoder spells for each of the states (n, hidden), its likeliest symbol at a time; it may be no word at all."""
        return letters(likeliest_spelling(self.decoder, states, self.symbols.shape[1]), self.alphabet)


def spelling_loss(masking: Masking) -> Loss:
    """The loss of a `SpellingModel`: its mean surprise at hidden words, 0 where there is none."""

    def loss(model: SpellingModel, batch: dict) -> torch.Tensor:
        masked, labels = masking(batch["input_ids"])
        chosen = labels != IGNORED
        states = model.states(masked, batch["attention_mask"])[chosen]
        return model.surprise(states, labels[chosen]).sum() / chosen.sum().clamp(min=1)

    return loss


def train_output(model: OutputModel, corpus: Task, profile: Profile, loss: Loss, **options) -> TrainingLog:
    """Train what stands behind the encoder, which stays as it is; options go to `utils.training.train`."""
    return training.train(model, corpus, profile, loss=loss, parameters=[{"params": model.output()}], **options)


@torch.no_grad()
def token_losses(model: OutputModel, split: Split, masking: Masking, pad_token_id: int = 0, seed: int = 0) -> torch.Tensor:
    """Surprise at every hidden token of a split, (tokens,), in nats: the same tokens in the same order for every model.

    exp of the mean is the perplexity of `utils.language`. Raises ValueError where no token is masked.
    """
    generator, found, device = torch.Generator().manual_seed(seed), [], next(model.parameters()).device
    model = model.eval().ready().eval()
    for batch in tasks.batches(split, 64, pad_token_id):
        masked, labels = (ids.to(device) for ids in masking(batch["input_ids"], generator))
        chosen = labels != IGNORED
        with training.autocast(device):
            states = model.states(masked, batch["attention_mask"].to(device))[chosen]
        found.append(model.surprise(states.float(), labels[chosen]).cpu())
    losses = torch.cat(found)
    if not len(losses):
        raise ValueError("no token was masked: the split is too short for this share")
    return losses


# --- S-03 over the whole vocabulary -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """The beginnings of spellings of one length: the beginning before each (`parents`), its last symbol, and what ends there.

    `words` (ids) end at the beginnings `places`; those that go on are `inner`, boolean, and only they are parents.
    """

    parents: torch.Tensor
    symbols: torch.Tensor
    inner: torch.Tensor
    words: torch.Tensor
    places: torch.Tensor


def spelling_tree(symbols: torch.Tensor) -> list[Level]:
    """All beginnings of spellings (vocabulary, longest), each once, level by level: words share the work of what they share."""
    base = int(symbols.max()) + 1
    levels, node = [], symbols.new_zeros(len(symbols), dtype=torch.long)
    for symbol in symbols.long().unbind(1):
        words = (symbol != PAD).nonzero().flatten()
        if not len(words):
            break
        beginnings, place = (node[words] * base + symbol[words]).unique(return_inverse=True)
        last = beginnings % base
        inner, ends = last != END, symbol[words] == END
        levels.append(Level(beginnings // base, last, inner, words[ends], place[ends]))
        node[words] = (inner.cumsum(0) - 1)[place]
    return levels


@torch.no_grad()
def vocabulary_log_probs(model: SpellingModel, states: torch.Tensor) -> torch.Tensor:
    """log p of every piece, (n, vocabulary), of states (n, hidden); -inf for pieces that are not spelled."""
    tree = spelling_tree(model.symbols)
    return torch.stack([_walk(model.decoder, state, tree, len(model.symbols)) for state in states]) - model.shared


def _walk(decoder: SpellingDecoder, state: torch.Tensor, tree: list[Level], vocab_size: int) -> torch.Tensor:
    found = state.new_full((vocab_size,), -torch.inf)
    memory, read, total = decoder.memory(state[None]), torch.full((1, 1), PAD, device=state.device), state.new_zeros(1)
    for level in tree:
        scores, memory = decoder.scores(read, memory)
        total = total[level.parents] + scores[level.parents, 0, level.symbols - 1]
        found[level.words] = total[level.places]
        go_on = level.parents[level.inner]
        memory = tuple(part[:, go_on].contiguous() for part in memory)
        read, total = level.symbols[level.inner, None], total[level.inner]
    return found


def vocabulary_mass(model: SpellingModel, states: torch.Tensor) -> torch.Tensor:
    """The probability that a spelling is a piece of the vocabulary, (n,), of states (n, hidden); never above 1.

    Its logarithm added to a surprise is the surprise among the vocabulary alone: so Jozefowicz et al. compare with a softmax
    (perplexity 47.9 after it, 49.0 before).
    """
    return vocabulary_log_probs(model, states).logsumexp(1).exp()
