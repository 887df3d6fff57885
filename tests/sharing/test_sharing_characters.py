"""Words from their characters: recurrences and convolutions by hand, least squares, exact sampling, probabilities that sum to 1."""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace

import fresh
import numpy as np
import pytest
import torch
from small_task import task_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils import artifacts, bert, contract, costs, language, profiles
from utils import tables as word_tables
from utils.language import LanguageModel, Masking
from utils.parts.characters import BEGIN, CONTINUE, END, FIRST, PAD, UNKNOWN, CharacterBiLSTM, CharacterCNN, Highway
from utils.sharing import characters

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {"character_size": 5, "widths": (1, 2, 4), "filters": (3, 4, 6), "highways": 2}
MASKING = Masking(4, 100, (0, 1, 2, 3, 4), share=0.5)


def made_up_pieces(count: int = 100) -> list[str]:
    """Special tokens, letters, words of up to 8 letters with and without the mark, and a few foreign characters."""
    rng, pieces = np.random.default_rng(0), [*SPECIAL, "a", "##a", "ж", "##ж", "щ", "ing", "##ing", "deed"]
    while len(pieces) < count:
        word = "".join(rng.choice(list("abcdeing"), rng.integers(2, 9)))
        piece = "##" + word if rng.random() < 0.3 else word
        if piece not in pieces:
            pieces.append(piece)
    return pieces


PIECES = made_up_pieces()


@pytest.fixture
def spelling():
    return characters.spell_vocabulary(PIECES, characters=8)


@pytest.fixture
def table():
    return torch.randn(100, 32)


def cnn(table, spelling, **sizes) -> CharacterCNN:
    return characters.cnn_vectors(table, spelling, **(SMALL | sizes))


def bilstm(table, spelling, **sizes) -> CharacterBiLSTM:
    return characters.bilstm_vectors(table, spelling, **({"character_size": 5, "hidden_size": 6} | sizes))


def many_characters(table, _) -> CharacterCNN:
    """An alphabet that a byte cannot number."""
    pieces = [*SPECIAL, *(chr(0x4E00 + place) for place in range(300))][:100] + [chr(0x4E00 + place) for place in range(95, 300)]
    spelling = characters.spell_vocabulary(pieces, characters=300)
    cut = replace(spelling, symbols=spelling.symbols[-100:], own=())
    return characters.with_spelling(CharacterCNN(100, 32, cut.options(), **SMALL), cut)


MADE = {
    "bilstm": bilstm,
    "cnn": cnn,
    "cnn with correction": lambda table, spelling: cnn(table, spelling, correction_size=3),
    "many characters": many_characters,
}
ALL = pytest.mark.parametrize("name", MADE)


# --- spelling -------------------------------------------------------------------------------------------------------


@pytest.mark.method("S-01", "S-04")
def test_a_piece_is_spelled_from_its_begin_to_its_end(spelling):
    number = {character: FIRST + place for place, character in enumerate(spelling.alphabet)}
    row = dict(zip(PIECES, spelling.symbols.tolist(), strict=True))
    i, n, g = (number[c] for c in "ing")
    assert row["ing"][:6] == [BEGIN, i, n, g, END, PAD] and row["##ing"][:6] == [CONTINUE, i, n, g, END, PAD]
    assert row["ж"][:4] == [BEGIN, UNKNOWN, END, PAD] and row["##ж"][:4] == [CONTINUE, UNKNOWN, END, PAD]
    assert all(row[token] == [PAD] * spelling.symbols.shape[1] for token in SPECIAL) and spelling.own == (0, 1, 2, 3, 4)
    written = characters.letters(spelling.symbols, spelling.alphabet)
    assert written[5:] == [piece.replace("ж", "□").replace("щ", "□") for piece in PIECES[5:]] and written[:5] == [""] * 5
    assert characters.letters(characters.spell_words(["##", "#", "##x"], "#"), "#") == ["##", "#", "##□"]


@pytest.mark.method("S-01", "S-04")
def test_the_alphabet_is_what_most_pieces_need_and_the_rest_is_one_character(spelling):
    counts = Counter("".join(piece.removeprefix("##") for piece in PIECES[5:]))
    assert list(spelling.alphabet) == [character for character, _ in counts.most_common(8)]
    spelled = Counter(map(tuple, spelling.symbols.tolist()))
    expected = [spelled[tuple(row)] if any(row) else 0 for row in spelling.symbols.tolist()]
    assert spelling.alike().tolist() == expected
    assert spelling.alike()[PIECES.index("ж")] == 2 and spelling.alike()[PIECES.index("##ж")] == 1
    whole = characters.spell_vocabulary(PIECES, characters=1000)
    assert set("жщ") < set(whole.alphabet) and whole.alike().max() == 1
    apart = characters.spell_vocabulary(PIECES, 8, own=[0, 1, 2, 3, 4, PIECES.index("ж")])
    assert apart.alike().max() == 1 and apart.own[-1] == PIECES.index("ж")


@pytest.mark.method("S-01", "S-02", "S-04")
def test_what_cannot_be_spelled_or_built_is_refused(table, spelling):
    with pytest.raises(ValueError, match="lacks \\[CLS\\]"):
        characters.spell_vocabulary([piece for piece in PIECES if piece != "[CLS]"])
    with pytest.raises(ValueError, match="1 character or more"):
        characters.spell_vocabulary(PIECES, 0)
    with pytest.raises(ValueError, match="ids below 100"):
        characters.spell_vocabulary(PIECES, own=[100])
    for wrong, why in (({"alphabet": "aa"}, "once"), ({"longest": 2}, "3 symbols"), ({"own": [1, 1]}, "different ids")):
        with pytest.raises(ValueError, match=why):
            CharacterCNN(100, 32, spelling.options() | wrong)
    with pytest.raises(ValueError, match="number of filters"):
        CharacterCNN(100, 32, spelling.options(), widths=(1, 2), filters=(3,))
    with pytest.raises(ValueError, match="correction has 0"):
        CharacterCNN(100, 32, spelling.options(), correction_size=-1)
    with pytest.raises(ValueError, match="another spelling"):
        characters.with_spelling(CharacterCNN(100, 32, spelling.options() | {"own": [7]}), spelling)
    with pytest.raises(ValueError, match="no highway"):
        characters.mean_gate(cnn(table, spelling, highways=0), torch.arange(5, 9))
    with pytest.raises(ValueError, match="no correction"):
        characters.fit_correction(cnn(table, spelling), table)


# --- parts: the contract --------------------------------------------------------------------------------------------


def in_place(model: nn.Module, vectors) -> nn.Module:
    word_tables.replace_table(model, vectors)
    return model.eval()


@pytest.mark.method("S-01", "S-02", "S-04")
def test_every_part_comes_back_in_a_fresh_process(tiny, table, spelling, tmp_path):
    for name, make in MADE.items():
        model = in_place(bert.fresh_copy(tiny), make(table, spelling))
        artifacts.save(model, tmp_path / f"{name}.safetensors")
        contract.write(tmp_path / f"{name}.safetensors", model, 7)
    assert fresh.broken(tmp_path) == {}
    assert many_characters(table, None).spelling.dtype == torch.int16 and cnn(table, spelling).spelling.dtype == torch.uint8


@pytest.mark.method("S-01", "S-02", "S-04")
@ALL
def test_closed_form_equals_the_counter_on_the_longest_words_and_is_never_below_it(name, tiny, table, spelling):
    model = in_place(tiny, MADE[name](table, spelling))
    vectors = model.bert.embeddings.word_embeddings
    assert costs.measured_macs(model, 9) <= costs.macs(model, 9) and vectors.adaptive
    longest = (vectors.spelling != PAD).all(1).nonzero()[0]
    vectors.spelling[:] = vectors.spelling[longest]
    for length in (1, 4, 9):
        assert costs.macs(model, length, 2) == costs.measured_macs(model, length, 2)


def counted(vectors, ids: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False), counter:
        vectors(ids)
    return counter.get_total_flops() // 2


@pytest.mark.method("S-01", "S-02", "S-04")
@ALL
@pytest.mark.filterwarnings("ignore")
def test_the_cost_of_given_words_is_counted_exactly(name, table, spelling):
    vectors = MADE[name](table, spelling).eval()
    for ids in (torch.tensor([[5, 60, 61], [7, 5, 99]]), torch.tensor([8])):
        assert vectors.macs_of(ids) == counted(vectors, ids)
    if name != "many characters":
        mixed = torch.tensor([0, 2, 60, 5])
        assert vectors.macs_of(mixed) == counted(vectors, mixed)


@pytest.mark.method("S-01", "S-02", "S-04")
@ALL
def test_a_vector_depends_on_its_word_alone(name, table, spelling):
    vectors = MADE[name](table, spelling).eval()
    ids = torch.tensor([[60, 2, 5], [60, 94, 12], [11, 10, 0]]) + (5 if name == "many characters" else 0)
    alone = torch.stack([vectors(word[None])[0] for word in ids.flatten()]).view(3, 3, 32)
    torch.testing.assert_close(vectors(ids), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vectors.train()(ids), alone, atol=1e-5, rtol=1e-5)  # in training each word is composed once
    torch.testing.assert_close(vectors.expanded().weight[ids], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vectors.weight[ids], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.method("S-01", "S-02", "S-04")
def test_pieces_without_a_spelling_keep_their_rows_and_those_spelled_alike_share_one(table, spelling):
    for make in (bilstm, cnn):
        vectors = make(table, spelling)
        torch.testing.assert_close(vectors(torch.tensor([3, 0, 4])), table[[3, 0, 4]])
        same = vectors(torch.tensor([PIECES.index("ж"), PIECES.index("щ")]))
        torch.testing.assert_close(same[0], same[1])
        first, other = vectors(torch.tensor([PIECES.index("ing"), PIECES.index("##ing")]))
        assert (first - other).norm() > 1e-3
        torch.testing.assert_close(characters.vectors_of(vectors, PIECES[5:]), vectors(torch.arange(5, 100)))
        assert characters.vectors_of(vectors, ["abandoning", "##ness"]).shape == (2, 32)  # longer than any, and unknown letters


# --- S-01 C2W -------------------------------------------------------------------------------------------------------


def last_state(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """The last state of an LSTM over x (length, size), by its equations."""
    w_x, w_h, b_x, b_h = weights
    state = cell = torch.zeros(w_h.shape[1])
    for row in x:
        i, f, g, o = (w_x @ row + b_x + w_h @ state + b_h).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        state = o.sigmoid() * cell.tanh()
    return state


@pytest.mark.method("S-01")
def test_c2w_is_two_recurrences_from_both_ends_and_a_linear_layer(table, spelling):
    vectors = bilstm(table, spelling)
    weights = [getattr(vectors.lstm, f"{name}_l0{way}") for way in ("", "_reverse") for name in
               ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip
    D_f, D_b = vectors.projection.weight.split(6, 1)
    for word in (5, 11, 60, 99):
        x = vectors.characters.weight[[symbol for symbol in spelling.symbols[word].tolist() if symbol != PAD]]
        expected = D_f @ last_state(x, weights[:4]) + D_b @ last_state(x.flip(0), weights[4:]) + vectors.projection.bias
        torch.testing.assert_close(vectors(torch.tensor([word]))[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.method("S-01")
def test_backwards_turns_the_letters_and_nothing_else(table, spelling):
    turned = characters.letters(characters.backwards(spelling.symbols), spelling.alphabet)
    plain = [(piece[:2], piece[2:]) if piece.startswith("##") else ("", piece) for piece in PIECES[5:]]
    assert turned[5:] == [mark + text.replace("ж", "□").replace("щ", "□")[::-1] for mark, text in plain]
    vectors, ids = bilstm(table, spelling), torch.tensor([2, PIECES.index("deed"), PIECES.index("ing"), PIECES.index("##ing")])
    one, other = (characters.vectors_of(vectors, words) for words in (["ing", "##ing"], ["gni", "##gni"]))
    expected = nn.functional.cosine_similarity(one, other).mean().item()
    assert characters.backwards_cosine(vectors, ids) == pytest.approx(expected, abs=1e-5) and expected < 0.999


# --- S-04 convolution and highway -----------------------------------------------------------------------------------


@pytest.mark.method("S-04")
def test_the_composition_is_convolution_maximum_tanh_highway_and_projection(table, spelling):
    vectors = cnn(table, spelling)
    for word in (5, 11, 60, 99):
        found = []
        x = vectors.characters.weight[[symbol for symbol in spelling.symbols[word].tolist() if symbol != PAD]].T
        for width, filters in zip(SMALL["widths"], vectors.filters, strict=True):
            conv = nn.Conv1d(5, filters.out_features, width)
            conv.weight.data = filters.weight.unflatten(1, (width, 5)).transpose(1, 2)
            conv.bias.data = filters.bias
            found.append(conv(nn.functional.pad(x, (0, width - 1))).tanh().amax(-1))
        y = torch.cat(found)
        for highway in vectors.highways:
            w, b = highway.both.weight, highway.both.bias
            t = torch.sigmoid(w[13:] @ y + b[13:])
            y = t * torch.relu(w[:13] @ y + b[:13]) + (1 - t) * y
        torch.testing.assert_close(vectors(torch.tensor([word]))[0], vectors.projection(y), atol=1e-5, rtol=1e-4)


@pytest.mark.method("S-04")
def test_a_closed_highway_passes_its_input_and_an_open_one_is_a_layer(table, spelling):
    highway, x = Highway(4), torch.randn(3, 4)
    assert highway.both.bias[4:].tolist() == [-2.0] * 4
    dense = torch.relu(x @ highway.both.weight[:4].T + highway.both.bias[:4])
    for bias, expected in ((-200.0, x), (200.0, dense)):
        nn.init.constant_(highway.both.bias[4:], bias)
        torch.testing.assert_close(highway(x), expected)
    vectors, ids = cnn(table, spelling), torch.arange(5, 60)
    assert 0.05 < characters.mean_gate(vectors, ids) < 0.25  # it begins at sigmoid(-2), give or take the weights
    for opened in vectors.highways:
        nn.init.constant_(opened.both.bias[13:], 200.0)
    assert characters.mean_gate(vectors, ids) == pytest.approx(1)


@pytest.mark.method("S-04")
def test_the_default_is_kims_small_model():
    spelling = characters.spell_vocabulary(PIECES)
    vectors = CharacterCNN(100, 384, spelling.options())
    conv, highway = 15 * sum(w * 25 * w for w in range(1, 7)) + 525, 2 * (525 * 525 + 525)
    expected = conv + highway + 525 * 384 + 384 + 15 * (FIRST + len(spelling.alphabet)) + 5 * 384
    assert sum(p.numel() for p in vectors.parameters()) == expected


# --- fitting --------------------------------------------------------------------------------------------------------


def squared_error(vectors, table: torch.Tensor, weight: torch.Tensor) -> float:
    return float(((vectors.expanded().weight - table).square().sum(1) * weight)[5:].sum().detach())


@pytest.mark.method("S-01", "S-04")
@pytest.mark.parametrize("weighted", [False, True])
def test_the_last_layer_is_numpys_least_squares(weighted, table, spelling):
    counts = torch.randint(1, 9, (100,)) if weighted else None
    weight = torch.ones(100) if counts is None else counts.float()
    for make in (bilstm, cnn):
        vectors = make(table, spelling)
        characters.fit_projection(vectors, table, counts, chunk=30)
        with torch.no_grad():
            features = nn.functional.pad(vectors.features(vectors.spelling[5:]), (0, 1), value=1.0).double().numpy()
        root = weight[5:].double().sqrt()[:, None].numpy()
        best = np.linalg.lstsq(features * root, table[5:].double().numpy() * root, rcond=None)[0]
        expected = float((((features @ best - table[5:].double().numpy()) * root) ** 2).sum())
        assert squared_error(vectors, table, weight) == pytest.approx(expected, rel=2e-3)


@pytest.mark.method("S-01", "S-04")
def test_a_fit_in_turns_holds_the_last_layer_while_the_rest_learns_and_ends_with_its_solution(table, spelling, monkeypatch):
    counts, weight = torch.randint(1, 9, (100,)), torch.ones(100)
    for make in (bilstm, cnn):
        vectors, solved, held = make(table, spelling), make(table, spelling), []
        characters.fit_projection(solved, table, counts)
        regress = characters.regress

        def watched(part, *args, regress=regress, held=held, **options):
            before = part.projection.weight.clone()
            losses = regress(part, *args, **options)
            held.append((torch.equal(before, part.projection.weight), options["seed"], options["steps"]))
            return losses

        monkeypatch.setattr(characters, "regress", watched)
        characters.fit_in_turns(vectors, table, counts, turns=3, steps=30, learning_rate=1e-2, seed=5)
        monkeypatch.setattr(characters, "regress", regress)
        assert held == [(True, 5000, 10), (True, 5001, 10), (True, 5002, 10)] and vectors.projection.weight.requires_grad
        weight = counts.float()
        assert squared_error(vectors, table, weight) < 0.98 * squared_error(solved, table, weight)
        again = copy.deepcopy(vectors)
        characters.fit_projection(again, table, counts)
        torch.testing.assert_close(again.projection.weight, vectors.projection.weight)
    with pytest.raises(ValueError, match="1 turn or more"):
        characters.fit_in_turns(vectors, table, counts, turns=3, steps=2, learning_rate=1e-2)


@pytest.mark.method("S-01", "S-02", "S-04")
def test_a_network_learns_at_its_own_rate(tiny, table, spelling):
    model = bert.fresh_copy(tiny)
    word_tables.replace_table(model, cnn(table, spelling))
    others, own = characters.own_rate(model, 0.5)
    assert own["lr"] == 0.5 and "lr" not in others
    assert {id(p) for p in own["params"]} == {id(p) for p in model.bert.embeddings.word_embeddings.parameters()}
    together = [*others["params"], *own["params"]]
    assert len(together) == len({id(p) for p in together}) == len(list(model.parameters()))


@pytest.mark.method("S-02")
def test_the_fitted_correction_is_the_best_of_its_rank(table, spelling):
    plain, vectors = cnn(table, spelling), cnn(table, spelling, correction_size=3)
    torch.testing.assert_close(plain.expanded().weight, vectors.expanded().weight)  # it begins at nothing
    assert characters.correction_share(vectors, torch.arange(100)) == 0
    missed = table - plain.expanded().weight
    characters.fit_correction(vectors, table)
    left = (table - vectors.expanded().weight).square().sum().item()
    assert left == pytest.approx(torch.linalg.svdvals(missed)[3:].square().sum().item(), rel=1e-4)
    counts = torch.arange(100.0) ** 2 + 1
    by_count = copy.deepcopy(vectors)
    characters.fit_correction(by_count, table, counts)
    cut = torch.linalg.svdvals(counts.sqrt()[:, None] * missed)[3:].square().sum().item()
    assert squared_error(by_count, table, counts) == pytest.approx(cut, rel=1e-3) and squared_error(vectors, table, counts) > cut
    ids = torch.arange(100)
    by_hand = (vectors.up.weight @ vectors.correction.weight.T).T
    torch.testing.assert_close(vectors(ids), plain(ids) + by_hand, atol=1e-5, rtol=1e-4)
    expected = (by_hand.norm(dim=1) / vectors(ids).norm(dim=1)).mean().item()
    assert characters.correction_share(vectors, ids) == pytest.approx(expected, rel=1e-4)
    nn.init.normal_(vectors.correction.weight)
    by_hand = (vectors.up.weight @ vectors.correction.weight.T).T
    characters.fit_projection(vectors, table)  # the last layer fits what a correction leaves: no feature explains the rest
    with torch.no_grad():
        explained = vectors.features(vectors.spelling[5:]).T @ (table - vectors.expanded().weight)[5:]
    assert explained.abs().max() < 0.05 < (vectors.features(vectors.spelling[5:]).T @ by_hand[5:]).abs().max()


@pytest.mark.method("S-01", "S-04")
def test_regression_comes_nearer_and_padding_stays_nothing(table, spelling):
    for make in (bilstm, cnn):
        target = make(table, spelling, seed=1).expanded().weight.detach()  # what such a part can make
        vectors = make(target, spelling)
        before = squared_error(vectors, target, torch.ones(100))
        word_tables.regress(vectors, target, steps=50, learning_rate=1e-2, batch_size=64)
        assert squared_error(vectors, target, torch.ones(100)) < 0.9 * before
        assert not vectors.characters.weight[PAD].any()


# --- S-02 output: rows that characters make ---------------------------------------------------------------------------


@pytest.fixture
def trained(tiny) -> LanguageModel:
    """A language model whose head is not the start any more."""
    model = LanguageModel(tiny.bert)
    nn.init.normal_(model.head.dense.weight, std=0.3)
    nn.init.normal_(model.head.bias)
    return model.eval()


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(6, 32)


@pytest.mark.method("S-02")
def test_with_the_encoders_own_table_it_is_the_tied_softmax(trained, batch, hidden):
    tied = characters.WordSoftmax(trained, trained.bert.embeddings.word_embeddings)
    torch.testing.assert_close(tied.guess(hidden), trained.guess(hidden))
    split = task_of(batch).validation
    losses = characters.token_losses(tied, split, MASKING, seed=3)
    expected = language.perplexity(trained, split, MASKING, seed=3)
    assert math.exp(losses.mean().item()) == pytest.approx(expected, rel=1e-4) and len(losses) > 5
    with pytest.raises(ValueError, match="no token was masked"):
        characters.token_losses(tied, split, Masking(4, 100, tuple(range(100))))


@pytest.mark.method("S-02")
def test_logits_are_products_with_composed_rows_and_corrections(trained, table, spelling, hidden):
    vectors = cnn(table, spelling, correction_size=3)
    nn.init.normal_(vectors.correction.weight)
    model = characters.WordSoftmax(trained, vectors)
    h = model.head.transform(hidden)
    composed = torch.cat([table[:5], characters.vectors_of(vectors, PIECES[5:])])
    corrected = h @ (vectors.correction.weight @ vectors.up.weight.T).T
    expected = h @ composed.T + corrected + model.head.bias
    torch.testing.assert_close(model.guess(hidden), expected, atol=1e-4, rtol=1e-4)
    words = torch.tensor([7, 90, 7, 2, 55, 31])
    torch.testing.assert_close(model.guess_among(hidden, words), expected[:, words], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.surprise(hidden, words), -expected.log_softmax(1)[torch.arange(6), words],
                               atol=1e-4, rtol=1e-4)  # fmt: skip
    ready = model.ready()
    assert isinstance(ready.rows, nn.Embedding)
    torch.testing.assert_close(ready.guess(hidden), expected, atol=1e-4, rtol=1e-4)


class FreeLogits(nn.Module):
    """Stands in for a model: the logits are what they are, whatever the state."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def guess_among(self, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.logits[words].expand(len(states), -1)


@pytest.mark.method("S-02")
def test_importance_sampling_has_its_minimum_at_the_true_distribution():
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])

    def expected_gradient(logits: torch.Tensor) -> torch.Tensor:
        """Over every word and every two drawn words, each with its probability."""
        logits = logits.clone().requires_grad_()
        total = 0.0
        for word, *drawn in itertools.product(range(4), repeat=3):
            chance = p[word] * q[drawn[0]] * q[drawn[1]]
            model, words = FreeLogits(logits), torch.tensor([word])
            total = total + chance * characters.sampled_loss(model, torch.zeros(1, 1), words, torch.tensor(drawn), q)
        return torch.autograd.grad(total, logits)[0]

    assert expected_gradient(p.log() + 0.7).abs().max() < 1e-6  # any constant may be added
    assert expected_gradient(torch.zeros(4)).abs().max() > 0.03


@pytest.mark.method("S-02")
def test_a_sampled_loss_is_that_of_its_few_words(hidden):
    logits, q = torch.randn(20), torch.rand(20).softmax(0)
    words, drawn = torch.tensor([3, 3, 8, 1, 0, 19]), torch.tensor([5, 8, 8, 2])
    scores = logits - q.log()
    expected = [-(scores[w] - torch.logsumexp(torch.cat([scores[w, None], scores[drawn]]), 0)) for w in words]
    found = characters.sampled_loss(FreeLogits(logits), hidden, words, drawn, q)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    none = characters.sampled_loss(FreeLogits(logits), hidden[:0], words[:0], drawn, q)
    assert none.item() == 0
    with pytest.raises(ValueError, match="probability above 0"):
        characters.importance_sampling(MASKING, torch.tensor([0.0, 1.0]))


@pytest.mark.method("S-02")
def test_every_word_can_be_drawn_as_often_as_it_occurs_and_once_more(batch):
    split = task_of(batch).train
    counts = Counter(token for row in split.input_ids for token in row)
    expected = torch.tensor([counts[word] + 1.0 for word in range(100)])
    torch.testing.assert_close(characters.unigrams(split, 100), expected / expected.sum())


@pytest.mark.method("S-02", "S-03")
def test_training_an_output_layer_leaves_the_encoder_as_it_is(trained, table, spelling, batch):
    task, profile = task_of(batch), profiles.get("smoke")
    noise = characters.unigrams(task.train, 100)
    models = {
        characters.WordSoftmax(trained, cnn(table, spelling, correction_size=3)): characters.importance_sampling(MASKING, noise, 16),
        characters.WordSoftmax(trained, nn.Embedding.from_pretrained(table.clone(), freeze=False)): language.language_loss(MASKING),
        characters.SpellingModel(trained, spelling, size=12): characters.spelling_loss(MASKING),
    }  # fmt: skip
    assert not any(model.states(batch["input_ids"], batch["attention_mask"]).requires_grad for model in models)
    for model, loss in models.items():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        log = characters.train_output(model, task, profile, loss, steps=3, learning_rate=1e-2)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved and not any(name.startswith("bert.") for name in moved)
        assert len(moved) >= len(model.output()) - 1 and np.isfinite(log.losses).all()
        losses = characters.token_losses(model, task.validation, MASKING)
        assert len(losses) == len(characters.token_losses(next(iter(models)), task.validation, MASKING))


# --- S-03 a word spelled by an LSTM -----------------------------------------------------------------------------------


def by_hand(decoder: characters.SpellingDecoder, state: torch.Tensor, symbols: list[int]) -> list[float]:
    """log p of each symbol after those before it, by the equations of the LSTM."""
    w_x, w_h, b_x, b_h = decoder.lstm._flat_weights
    start, cell = (decoder.begin.weight @ state + decoder.begin.bias).chunk(2)
    now, found = start.tanh(), []
    for before, symbol in zip([PAD, *symbols], symbols, strict=False):
        i, f, g, o = (w_x @ decoder.characters.weight[before] + b_x + w_h @ now + b_h).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        now = o.sigmoid() * cell.tanh()
        scores = decoder.out.weight @ now + decoder.out.bias
        found.append((scores[symbol - 1] - torch.logsumexp(scores, 0)).item())
    return found


@pytest.fixture
def speller(trained, spelling) -> characters.SpellingModel:
    model = characters.SpellingModel(trained, spelling, character_size=5, size=7)
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=0.7)
    nn.init.zeros_(model.decoder.characters.weight[PAD])
    return model.eval()


@pytest.mark.method("S-03")
def test_the_surprise_of_a_word_is_the_sum_over_its_symbols(speller, spelling, hidden):
    words = torch.tensor([5, 11, 60, 99, 12, 10])
    rows = [[symbol for symbol in spelling.symbols[word].tolist() if symbol != PAD] for word in words]
    expected = [-sum(by_hand(speller.decoder, state, row)) for state, row in zip(hidden, rows, strict=True)]
    torch.testing.assert_close(speller.surprise(hidden, words), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert speller.surprise(hidden[:0], words[:0]).shape == (0,)
    with pytest.raises(ValueError, match="not spelled"):
        speller.surprise(hidden, torch.tensor([5, 11, 2, 60, 61, 62]))


@pytest.mark.method("S-03")
def test_probabilities_of_all_spellings_and_of_what_never_ends_sum_to_one():
    decoder, state, longest = characters.SpellingDecoder(32, 6, 3, 5), torch.randn(1, 32), 4
    others = [symbol for symbol in range(1, 6) if symbol != END]
    total = 0.0
    for length in range(longest + 1):
        ends = [END] if length < longest else []  # what has not ended by then goes on in ways that sum to its probability
        strings = torch.tensor([[*string, *ends] for string in itertools.product(others, repeat=length)], dtype=torch.long)
        strings = nn.functional.pad(strings.view(len(strings), -1), (0, longest + 1 - strings.shape[-1]))
        total += (-decoder(state.expand(len(strings), -1), strings)).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.method("S-03")
def test_the_tree_of_beginnings_gives_every_word_its_probability(speller, spelling, hidden):
    found = characters.vocabulary_log_probs(speller, hidden)
    words = torch.arange(5, 100)
    expected = -speller.surprise(hidden[2].expand(95, -1), words)
    torch.testing.assert_close(found[2, 5:], expected, atol=1e-4, rtol=1e-4)
    assert (found[:, :5] == -torch.inf).all()
    mass = characters.vocabulary_mass(speller, hidden)
    torch.testing.assert_close(mass, found.exp().sum(1)) and (mass < 1).all()
    beginnings = {tuple(row[: end + 1]) for row in spelling.symbols.tolist() for end in range(len(row)) if row[end] != PAD}
    tree = characters.spelling_tree(spelling.symbols)
    assert sum(len(level.symbols) for level in tree) == len(beginnings)
    assert sum(int(level.inner.sum()) for level in tree) == sum(END not in beginning for beginning in beginnings)


@pytest.mark.method("S-03")
def test_pieces_spelled_alike_share_the_probability_of_their_spelling(speller, spelling, hidden):
    alike = torch.tensor([PIECES.index("ж"), PIECES.index("щ")])
    both = -speller.surprise(hidden[:1].expand(2, -1), alike)
    row = [symbol for symbol in spelling.symbols[alike[0]].tolist() if symbol != PAD]
    assert both.exp().sum().item() == pytest.approx(math.exp(sum(by_hand(speller.decoder, hidden[0], row))), rel=1e-4)


@pytest.mark.method("S-03")
def test_writing_takes_the_likeliest_symbol_until_the_end(speller, hidden):
    with torch.no_grad():
        speller.decoder.out.bias[END - 1] += 2.0  # some spellings end, others are cut off
    written = characters.likeliest_spelling(speller.decoder, hidden, 10)
    for state, row in zip(hidden, written.tolist(), strict=True):
        for place, symbol in enumerate(row):
            if END in row[:place]:
                assert symbol == PAD
            else:
                scores = [
                    by_hand(speller.decoder, state, [*row[:place], other])[-1]
                    for other in range(1, speller.decoder.out.out_features + 1)
                ]
                assert symbol == 1 + int(np.argmax(scores))
    assert len(speller.write(hidden)) == 6


@pytest.mark.method("S-03")
def test_a_decoder_learns_to_spell(trained, spelling):
    torch.manual_seed(0)
    model, states = characters.SpellingModel(trained, spelling, size=24), torch.randn(8, 32)
    words = torch.tensor([10, 11, 12, 40, 50, 60, 70, 80])
    optimizer = torch.optim.Adam(model.output(), lr=2e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model.surprise(states, words).mean().backward()
        optimizer.step()
    assert model.write(states) == [PIECES[word] for word in words.tolist()]
