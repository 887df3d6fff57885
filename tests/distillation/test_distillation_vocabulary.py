"""Mixed vocabularies: the vocabulary against the tokenizers library, spellings by hand, and the limits at which dual training is plain."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from utils import bert, profiles, tasks
from utils.distillation import students, vocabulary
from utils.distillation.vocabulary import SPECIAL, DualModel, DualTraining, MixedTeacher, Mixer, SharedProjections
from utils.language import IGNORED, LanguageModel, Masking, language_loss
from utils.profiles import get
from utils.tasks import Split, Task
from utils.trials import Trial

# teacher's pieces by id: special tokens, then words and continuing pieces
PIECES = [*SPECIAL, "play", "##ing", "##ed", "good", "bad", "##ly", "film", "s", "##s", "[unused1]", "été", "goods"]
OWN = [*SPECIAL, "p", "##l", "##a", "##y", "##ing", "good", "##e", "##d", "f", "##i", "##m", "b", "s", "##s"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def make_bert(vocab_size: int, hidden: int = 32, layers: int = 2) -> BertForSequenceClassification:
    config = BertConfig(vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * hidden,
                        num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3)  # fmt: skip
    return BertForSequenceClassification(config).eval()


def numbers(words: str, pieces: list[str] = PIECES) -> torch.Tensor:
    return torch.tensor([pieces.index(word) for word in words.split()])


def as_words(ids: torch.Tensor, pieces: list[str] = OWN) -> str:
    return " ".join(pieces[token] for token in ids.tolist())


SENTENCE = "[CLS] play ##ing good film ##s [SEP]"


def make_batch() -> dict:
    rows = [numbers(SENTENCE), numbers("[CLS] bad ##ly play ##ed [SEP]")]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1])}


# --- the vocabulary -------------------------------------------------------------------------------------------------


def by_brute_force(counts: Counter, size: int) -> list[str]:
    """The definition: count all pairs anew before every merge."""
    spelled = {word: [word[0], *("##" + letter for letter in word[1:])] for word in counts}
    pieces = [*SPECIAL, *sorted({piece for parts in spelled.values() for piece in parts})]
    while len(pieces) < size:
        pairs = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        joined = best[0] + best[1][2:]
        pieces += [joined] if joined not in pieces else []
        for word, parts in spelled.items():
            text = " " + " ".join(parts) + " "
            while f" {best[0]} {best[1]} " in text:
                text = text.replace(f" {best[0]} {best[1]} ", f" {joined} ", 1)
            spelled[word] = text.split()
    return pieces


@pytest.mark.method("K-19")
@pytest.mark.parametrize("size", [30, 60, 1000])
def test_the_vocabulary_is_that_of_the_definition(size):
    rng = np.random.default_rng(0)
    counts = Counter({"".join(rng.choice(list("abcde"), rng.integers(1, 9))): int(rng.integers(1, 30)) for _ in range(80)})
    counts["aaaaa"] = 50  # overlapping pairs
    assert vocabulary.build_vocabulary(counts, size) == by_brute_force(counts, size)


@pytest.mark.method("K-19")
def test_the_vocabulary_is_that_of_the_tokenizers_library_where_counts_decide():
    """On whole reviews the first merges have counts of their own; ties, which the library breaks at random, come later."""
    texts = tasks.column(tasks.embedded("rotten_tomatoes"), "text")
    words = [word for text in texts for word in text.split() if word.isascii() and word.isalpha()]
    theirs = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.train_from_iterator(
        words, trainers.WordPieceTrainer(vocab_size=305, special_tokens=list(SPECIAL), show_progress=False)
    )
    ours = vocabulary.build_vocabulary(Counter(words), 305)
    assert len(ours) == 305 and set(ours) == set(theirs.get_vocab())


@pytest.mark.method("K-19")
def test_ties_go_by_the_alphabet_and_too_small_a_vocabulary_is_refused():
    counts = Counter({"ab": 2, "cd": 2, "ee": 1})
    found = vocabulary.build_vocabulary(counts, 12)
    assert found == [*SPECIAL, "##b", "##d", "##e", "a", "c", "e", "ab"]
    assert vocabulary.build_vocabulary(counts, 100)[11:] == ["ab", "cd", "ee"]  # and then nothing is left to join
    with pytest.raises(ValueError, match="needs 11 pieces"):
        vocabulary.build_vocabulary(counts, 10)


@pytest.mark.method("K-19")
def test_words_are_counted_out_of_token_ids():
    rows = [numbers(SENTENCE).tolist(), numbers("[CLS] play ##ing [UNK] good [SEP]").tolist()]
    assert vocabulary.count_words(rows, PIECES) == Counter({"playing": 2, "good": 2, "films": 1})


# --- spelling -------------------------------------------------------------------------------------------------------


@pytest.mark.method("K-19")
def test_spelling_is_greedy_and_equals_the_libraries_on_whole_words():
    ids = {piece: number for number, piece in enumerate(OWN)}
    wordpiece = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    for word in ("play", "playing", "good", "bad", "film", "films", "été", "gooding", "sing"):
        assert vocabulary.spell(word, ids) == wordpiece.encode(word).ids, word
    assert as_words(torch.tensor(vocabulary.spell("##mila", ids))) == "##m ##i ##l ##a"
    assert as_words(torch.tensor(vocabulary.spell("[unused1]", ids))) == "[UNK]"
    assert [vocabulary.spell(piece, ids) for piece in SPECIAL] == [[0], [1], [2], [3], [4]]


@pytest.mark.method("K-19")
def test_a_share_of_the_words_is_spelled_whole_by_the_student():
    mixer, ids = Mixer.of(PIECES, OWN), numbers(SENTENCE)
    assert torch.equal(mixer.mix(ids, 0.0), ids)
    assert as_words(mixer.own(ids)) == "[CLS] p ##l ##a ##y ##ing good f ##i ##l ##m ##s [SEP]"
    foreign = mixer.mix(ids, 1.0)
    assert foreign[0] == 2 and foreign[-1] == 3  # special tokens stay the teacher's
    assert torch.equal(foreign[1:-1] - len(PIECES), mixer.own(ids)[1:-1])
    joint = [*PIECES, *(f"<{piece}>" for piece in OWN)]
    torch.manual_seed(0)
    seen = Counter(as_words(mixer.mix(ids, 0.3), joint) for _ in range(3000))
    assert len(seen) == 8  # three words, each in one spelling or the other, never in half
    whole = sum(count for text, count in seen.items() if "<f> <##i> <##l> <##m> <##s>" in text)
    assert whole / 3000 == pytest.approx(0.3, abs=0.03)
    assert seen["[CLS] <p> <##l> <##a> <##y> <##ing> good film ##s [SEP]"] / 3000 == pytest.approx(0.3 * 0.49, abs=0.02)
    assert mixer.growth([ids.tolist()]) == pytest.approx(13 / 7, abs=0.01) and mixer.growth([[2, 8, 3]]) == 1.0


@pytest.mark.method("K-19")
def test_a_batch_is_written_anew_and_padded():
    batch, mixer = make_batch(), Mixer.of(PIECES, OWN)
    found = vocabulary.rewrite(batch, mixer.own)
    assert found["input_ids"].shape == (2, 13) and found["attention_mask"].sum(1).tolist() == [13, 13]
    assert torch.equal(found["input_ids"][1], mixer.own(numbers("[CLS] bad ##ly play ##ed [SEP]")))


@pytest.mark.method("K-19")
def test_the_student_begins_with_the_teachers_vectors_and_reads_the_teachers_ids(tmp_path):
    teacher, mixer, batch = make_bert(len(PIECES)), Mixer.of(PIECES, OWN), make_batch()
    student = vocabulary.spelled_student(teacher, mixer, OWN, SIZES, 2.0)
    table = teacher.bert.embeddings.word_embeddings.weight @ students.principal_directions(
        teacher.bert.embeddings.word_embeddings.weight, 16
    )
    own = student.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(own[OWN.index("good")], table[PIECES.index("good")])
    spelled = [PIECES.index(piece) for piece in ("play", "##ly", "film")]  # what has an l after the beginning
    torch.testing.assert_close(own[OWN.index("##l")], table[spelled].mean(0))
    own_batch = vocabulary.rewrite(batch, mixer.own)
    torch.testing.assert_close(student(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits,
                               student.classifier(student.bert(**own_batch).pooler_output), atol=1e-5, rtol=1e-5)  # fmt: skip
    with pytest.raises(ValueError, match="16 bits"):
        vocabulary.spelled_student(teacher, mixer, ["x"] * 40_000, SIZES, 2.0)


# --- the teacher that reads both ------------------------------------------------------------------------------------


@pytest.mark.method("K-19")
def test_with_nothing_mixed_in_the_teacher_is_a_plain_language_model():
    """The limit of the catalogue: identical spelling, plain masked words."""
    language, batch = LanguageModel(make_bert(len(PIECES)).bert), make_batch()
    mixed = MixedTeacher(language, nn.Embedding(len(OWN), 16))
    masking = Masking(4, len(PIECES), (0, 1, 2, 3, 4), share=0.5)
    torch.manual_seed(1)
    expected = language_loss(masking)(language, batch)
    torch.manual_seed(1)
    torch.testing.assert_close(vocabulary.guess_loss(mixed, batch, masking), expected)


@pytest.mark.method("K-19")
def test_a_mixed_sentence_is_read_and_guessed_by_hand():
    language, mixer = LanguageModel(make_bert(len(PIECES)).bert), Mixer.of(PIECES, OWN)
    nn.init.normal_(language.head.bias)
    mixed = MixedTeacher(language, nn.Embedding(len(OWN), 16))
    nn.init.normal_(mixed.student_bias)
    ids = torch.cat([numbers("[CLS] play ##ing"), mixer.own(numbers("film ##s")) + len(PIECES), numbers("[SEP]")])[None]
    vectors = [language.bert.embeddings.word_embeddings.weight[token] if token < len(PIECES)
               else mixed.up.weight @ mixed.student_table.weight[token - len(PIECES)] for token in ids[0].tolist()]  # fmt: skip
    torch.testing.assert_close(mixed.vectors(ids)[0], torch.stack(vectors))
    states = mixed.states(ids, torch.ones_like(ids))
    torch.testing.assert_close(states, language.bert(inputs_embeds=torch.stack(vectors)[None]).last_hidden_state)
    asked = torch.tensor([1, 4])  # ##... of play, and a piece of film: one token in each vocabulary
    labels, ready = ids[0, asked], language.head.transform(states[0, asked])
    own = ready[0] @ language.bert.embeddings.word_embeddings.weight.T + language.head.bias
    theirs = ready[1] @ (mixed.student_table.weight @ mixed.up.weight.T).T + mixed.student_bias
    expected = (nn.functional.cross_entropy(own, labels[0]) + nn.functional.cross_entropy(theirs, labels[1] - len(PIECES))) / 2
    torch.testing.assert_close(mixed.losses(states[0, asked], labels), expected)


@pytest.mark.method("K-19")
def test_the_students_word_vectors_learn_from_both_and_are_one_table():
    teacher, mixer, batch = make_bert(len(PIECES)), Mixer.of(PIECES, OWN), make_batch()
    student = vocabulary.spelled_student(teacher, mixer, OWN, SIZES, 2.0)
    dual = DualModel(LanguageModel(teacher.bert), LanguageModel(student.bert))
    assert dual.teacher.student_table is student.bert.embeddings.word_embeddings
    masking = DualTraining.of(mixer, PIECES, OWN).joint
    mixed = vocabulary.rewrite(batch, lambda ids: mixer.mix(ids, 1.0))
    vocabulary.guess_loss(dual.teacher, mixed, masking).backward()
    assert student.bert.embeddings.word_embeddings.weight.grad[OWN.index("##l")].abs().max() > 0
    assert dual.teacher.up.weight.grad.abs().max() > 0 and student.bert.encoder.layer[0].output.dense.weight.grad is None


# --- shared projections ---------------------------------------------------------------------------------------------


@pytest.mark.method("K-19")
@pytest.mark.parametrize("direction", ["up", "down"])
def test_shared_projections_by_hand(direction):
    teacher, student = make_bert(20, 32, 4).bert, make_bert(20, 16, 2).bert
    found = SharedProjections(teacher, student, direction)
    for parameter in found.parameters():
        nn.init.normal_(parameter)
    total, count = 0.0, 0
    names = {(32, 16): "32-16", (64, 32): "64-32"}
    for i, j in ((0, 0), (1, 2)):
        for name in SharedProjections.MATRICES:
            theta_t, theta_s = (model.encoder.layer[k].get_submodule(name) for model, k in ((teacher, j), (student, i)))
            U, V = (
                side[names[theta_t.weight.shape[axis], theta_s.weight.shape[axis]]]
                for axis, side in ((0, found.left), (1, found.right))
            )
            source, target = (theta_s, theta_t) if direction == "up" else (theta_t, theta_s)
            total += (U @ source.weight @ V.T - target.weight).square().mean() + (U @ source.bias - target.bias).square().mean()
            count += 2
    torch.testing.assert_close(found(), total / count)
    assert len(list(found.parameters())) == 4  # two widths, two sides, whatever the number of layers
    found().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.encoder.layer[1].intermediate.dense.weight.grad.abs().max() > 0


@pytest.mark.method("K-19")
def test_projections_between_equals_begin_at_zero():
    model = make_bert(20)
    for direction in ("up", "down"):
        assert SharedProjections(model.bert, bert.fresh_copy(model).bert, direction)().item() == 0
    assert SharedProjections(model.bert, make_bert(20).bert)().item() > 1e-3
    with pytest.raises(ValueError, match="up or down"):
        SharedProjections(model.bert, model.bert, "sideways")


# --- dual training --------------------------------------------------------------------------------------------------


@pytest.mark.method("K-19")
def test_the_dual_loss_is_the_sum_of_its_three_parts():
    teacher, mixer, batch = make_bert(len(PIECES)), Mixer.of(PIECES, OWN), make_batch()
    student = vocabulary.spelled_student(teacher, mixer, OWN, SIZES, 2.0)
    dual = DualModel(LanguageModel(teacher.bert), LanguageModel(student.bert))
    parts = {}
    for weight in (0.0, 2.0):
        training = DualTraining.of(mixer, PIECES, OWN, share=0.5, projection_weight=weight)
        torch.manual_seed(4)
        parts[weight] = training.loss()(dual, batch)
    torch.testing.assert_close(parts[2.0] - parts[0.0], 2 * dual.projections())
    torch.manual_seed(4)
    mixed = vocabulary.rewrite(batch, lambda ids: mixer.mix(ids, 0.5))
    expected = vocabulary.guess_loss(dual.teacher, mixed, training.joint)
    masked, labels = training.own(vocabulary.rewrite(batch, mixer.own)["input_ids"])
    chosen = labels != IGNORED
    states = dual.student.states(masked, vocabulary.rewrite(batch, mixer.own)["attention_mask"])
    expected = expected + nn.functional.cross_entropy(dual.student.guess(states[chosen]), labels[chosen])
    torch.testing.assert_close(parts[0.0], expected)
    with pytest.raises(ValueError, match="share of the student's spelling"):
        DualTraining.of(mixer, PIECES, OWN, share=1.5)


@pytest.mark.method("K-19")
def test_the_projections_pull_by_default_and_balanced_as_hard_as_the_words():
    teacher, mixer, batch = make_bert(len(PIECES)), Mixer.of(PIECES, OWN), make_batch()
    student = vocabulary.spelled_student(teacher, mixer, OWN, SIZES, 2.0)
    dual = DualModel(LanguageModel(teacher.bert), LanguageModel(student.bert))
    plain, without = DualTraining.of(mixer, PIECES, OWN), DualTraining.of(mixer, PIECES, OWN, projection_weight=0.0)
    found = []
    for training in (plain, without):
        torch.manual_seed(4)
        found.append(training.loss()(dual, batch))
    torch.testing.assert_close(found[0] - found[1], dual.projections())
    torch.manual_seed(5)
    weight = plain.balanced(dual, batch).projection_weight
    weights = [given.weight for _, given in dual.projections.pairs]
    torch.manual_seed(5)
    words = vocabulary.guess_loss(dual.student, vocabulary.rewrite(batch, mixer.own), plain.own)
    lengths = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).norm() for loss in (words, dual.projections())
    ]
    torch.testing.assert_close(weight * lengths[1], lengths[0])
    assert weight > 0 and all(p.grad is None for p in dual.parameters())


@pytest.mark.method("K-19")
def test_dual_training_runs_in_the_common_loop_and_moves_teacher_student_and_projections():
    teacher, mixer, batch = make_bert(len(PIECES)), Mixer.of(PIECES, OWN), make_batch()
    student = vocabulary.spelled_student(teacher, mixer, OWN, SIZES, 2.0)
    dual = DualModel(LanguageModel(teacher.bert), LanguageModel(student.bert))
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    split = Split(None, rows, batch["labels"])

    class Names:
        pad_token_id = 0

    task = Task("made up", split, split, split, ["no", "yes"], Names(), "key")
    before = {name: p.detach().clone() for name, p in dual.named_parameters()}
    loss = DualTraining.of(mixer, PIECES, OWN).loss()
    trial = Trial(dual, task, get("smoke"))
    trial.recover(4, learning_rate=1e-2, loss=loss, train_embeddings=True)
    still = {name for name, p in dual.named_parameters() if torch.equal(p, before[name])}
    assert all("pooler" in name for name in still), still


@pytest.mark.method("K-19")
def test_a_small_vocabulary_for_the_tasks_own_texts_is_the_same_every_time():
    profile = profiles.get("smoke")
    task = tasks.load("rotten_tomatoes", bert.load_tokenizer(), profile)
    pieces = task.tokenizer.convert_ids_to_tokens(range(profile.vocabulary))
    counts = vocabulary.count_words(task.train.input_ids, pieces)
    own = vocabulary.build_vocabulary(counts, 465)
    assert own == vocabulary.build_vocabulary(vocabulary.count_words(task.train.input_ids, pieces), 465) and len(own) == 465
    mixer = Mixer.of(pieces, own)
    ids = torch.tensor(task.train.input_ids[0])
    text = "".join(own[token].removeprefix("##") for token in mixer.own(ids).tolist())
    assert text == "".join(pieces[token].removeprefix("##") for token in ids.tolist())  # spelled anew, letter by letter the same
    assert 1 <= mixer.growth(task.train.input_ids) < 5


@pytest.mark.method("K-19")
def test_transformers_agrees_on_the_students_own_loss():
    teacher, mixer, batch = make_bert(len(PIECES)), Mixer.of(PIECES, OWN), make_batch()
    student = vocabulary.spelled_student(teacher, mixer, OWN, SIZES, 2.0)
    language, own = LanguageModel(student.bert), vocabulary.rewrite(batch, mixer.own)
    theirs = BertForMaskedLM(student.bert.config).eval()
    theirs.bert.load_state_dict(student.bert.state_dict(), strict=False)
    theirs.cls.predictions.transform.dense.load_state_dict(language.head.dense.state_dict())
    theirs.tie_weights()
    masking = DualTraining.of(mixer, PIECES, OWN).own
    torch.manual_seed(2)
    masked, labels = masking(own["input_ids"])
    torch.manual_seed(2)
    found = vocabulary.guess_loss(language, own, masking)
    torch.testing.assert_close(
        found, theirs(input_ids=masked, attention_mask=own["attention_mask"], labels=labels).loss, atol=1e-4, rtol=1e-4
    )
