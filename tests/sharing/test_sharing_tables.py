"""What all word tables share, against loops, hand-made vocabularies and the tokenizers library; a trimmed BERT against a plain one."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from utils import artifacts, contract, encodings
from utils import tables as word_tables
from utils.parts.embeddings import FactorizedVectors, ReferenceVectors, SlimVectors, SparseVectors, TwoComponentVectors
from utils.sharing import tables
from utils.sharing.words import factorized_vectors
from utils.tasks import Split

LETTERS = [mark + letter for mark in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
PIECES = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS,
          "good", "film", "##s", "un", "##wat", "##watch", "##chab", "##able", "##ab", "##le", "very", "ed", "##ed"]  # fmt: skip
PIECES = list(dict.fromkeys(PIECES))


def vectors_for(words: int = 100) -> FactorizedVectors:
    return FactorizedVectors(words, 32, 4)


def split_of(*rows: list[int]) -> Split:
    return Split(None, list(rows), torch.zeros(len(rows), dtype=torch.long))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")  # fmt: skip


# --- the table's place ----------------------------------------------------------------------------------------------


def test_a_table_of_full_width_in_the_tables_place_changes_nothing(tiny, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    before, table = tiny(**inputs).logits, word_tables.word_table(tiny)
    word_tables.replace_table(tiny, factorized_vectors(table, 32))
    assert not tiny.bert.embeddings.word_embeddings.training
    torch.testing.assert_close(tiny(**inputs).logits, before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(word_tables.word_table(tiny), table, atol=1e-5, rtol=1e-4)
    for wrong in (FactorizedVectors(99, 32, 4), FactorizedVectors(100, 16, 4)):
        with pytest.raises(ValueError, match="needs vectors for 100 words of width 32"):
            word_tables.replace_table(tiny, wrong)


# --- fitting and comparing ------------------------------------------------------------------------------------------


def test_words_are_counted():
    assert word_tables.word_counts(split_of([1, 2, 2], [5, 2]), 7).tolist() == [0, 1, 3, 0, 0, 1, 0]
    with pytest.raises(ValueError, match="hold id 5, the vocabulary ends at 4"):
        word_tables.word_counts(split_of([5]), 5)


def test_regression_finds_a_table_that_it_can_make_and_leaves_words_that_it_never_draws():
    table, vectors = vectors_for().expanded().weight.detach() * 20, vectors_for()
    fresh = [p.detach().clone() for p in vectors.parameters()]
    losses = word_tables.regress(vectors, table, steps=400, learning_rate=0.05, batch_size=256)
    assert len(losses) == 400 and losses[-1] < 1e-3 * losses[0]
    with torch.no_grad():
        for parameter, value in zip(vectors.parameters(), fresh, strict=True):
            parameter.copy_(value)
    counts = torch.zeros(100)
    counts[10:20] = 1
    word_tables.regress(vectors, table, steps=5, learning_rate=0.05, batch_size=64, counts=counts)
    moved = (vectors.table != fresh[0]).any(1)
    assert moved.nonzero().flatten().tolist() == list(range(10, 20)) and vectors.training
    for wrong in (torch.zeros(100), torch.ones(99), -torch.ones(100)):
        with pytest.raises(ValueError, match="100 numbers of at least 0"):
            word_tables.regress(vectors, table, steps=1, learning_rate=0.1, counts=wrong)
    with pytest.raises(ValueError, match=r"shape \(100, 32\)"):
        word_tables.regress(vectors, table[:50], steps=1, learning_rate=0.1)


def test_the_first_step_of_regression_is_adams_on_the_mean_squared_error():
    vectors, table = vectors_for(), torch.randn(100, 32)
    again, reference = vectors_for(), vectors_for()
    again.load_state_dict(vectors.state_dict())
    reference.load_state_dict(vectors.state_dict())
    counts = torch.zeros(100)
    counts[7] = 3
    (loss,) = word_tables.regress(vectors, table, steps=1, learning_rate=0.1, batch_size=5, counts=counts)
    error = reference.compose(torch.tensor([7])) - table[7]
    assert loss == pytest.approx(error.square().mean().item(), rel=1e-5)
    error.square().mean().backward()
    torch.optim.Adam(reference.parameters(), lr=0.1).step()
    torch.testing.assert_close(vectors.expanded().weight, reference.expanded().weight)


def test_reconstruction_by_hand():
    table = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    made = torch.tensor([[6.0, 8.0], [0.0, 1.0], [0.0, 1.0]])
    found = word_tables.reconstruction(made, table, torch.tensor([1, 3, 0]))
    assert found == pytest.approx({"cosine": 2 / 3, "cosine_by_count": 1 / 4, "relative_error": (25 + 2 + 1) / 30})
    vectors = vectors_for()
    assert word_tables.reconstruction(vectors, vectors.weight.detach())["relative_error"] == pytest.approx(0, abs=1e-10)
    assert "cosine_by_count" not in word_tables.reconstruction(vectors, vectors.weight.detach())


def test_neighbours_are_those_of_a_loop_and_special_tokens_are_none(tokenizer):
    table = torch.randn(len(PIECES), 8)
    table[1] = table[PIECES.index("good")]  # [unused0] points the same way, and must not show
    found = word_tables.neighbours(table, tokenizer, ["good", "film"], 3)
    for word in ("good", "film"):
        own = table[PIECES.index(word)]
        ranked = sorted((p for p in PIECES if p != word and not p.startswith("[")),
                        key=lambda p: -cosine_similarity(own, table[PIECES.index(p)], dim=0).item())  # fmt: skip
        assert found.loc[word].tolist() == ranked[:3]
    with pytest.raises(ValueError, match="no pieces of the vocabulary: movie"):
        word_tables.neighbours(table, tokenizer, ["good", "movie"])
    ids = torch.tensor([8, 9, 10])
    assert word_tables.neighbours_kept(table, table, ids, 5) == 1
    changed = table.clone()
    changed[torch.randperm(len(table))] = table
    assert word_tables.neighbours_kept(changed, table, ids, 5) < 0.5


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices, bits", [(1, 1), (2, 1), (17, 5), (256, 8), (257, 10), (4096, 12), (30522, 16), (2**18, 18)])
def test_whole_numbers_come_back_and_take_their_bits(choices, bits):
    codes = torch.randint(0, choices, (40, 5))
    codes[0, :2] = torch.tensor([0, choices - 1])
    item = word_tables.whole_numbers(codes.to(torch.int32), choices)
    assert torch.equal(encodings.decode(item).long(), codes)
    assert item.parts["codes"].nbytes == -(-200 * bits // 8)


@pytest.mark.method("S-10", "S-11", "S-12", "S-14", "S-15")
def test_counted_bytes_are_those_of_the_file(tiny, tmp_path):
    fresh = artifacts.save(tiny, tmp_path / "dense")
    for vectors in (SparseVectors(100, 32, 20, 3), TwoComponentVectors(100, 32, 10, 10), ReferenceVectors(100, 32, 8, 16),
                    SlimVectors(100, 32, 4, 40), FactorizedVectors(100, 32, 4)):  # fmt: skip
        word_tables.replace_table(tiny, vectors)
        given = word_tables.packed(tiny)
        items = artifacts.encode_model(tiny, given)
        mine = sum(item.nbytes for name, item in items.items() if name.startswith(word_tables.PLACE))
        assert word_tables.stored_bytes(vectors) == mine
        assert set(given) == {f"{word_tables.PLACE}.{name}" for name in word_tables.pack(vectors)}
        # what stands in the file beyond the tensors is its header, which says a little more of a part
        saved = artifacts.save(tiny, tmp_path / "part", given)
        assert abs(fresh["stored_bytes"] - 100 * 32 * 4 + mine - saved["stored_bytes"]) < 1500
    assert word_tables.pack(nn.Embedding(10, 4)) == {} and word_tables.stored_bytes(nn.Embedding(10, 4)) == 160


@pytest.mark.method("S-10", "S-11", "S-12", "S-13", "S-14", "S-15")
def test_sizes_fill_the_budget():
    budget = 300 * 32 * 4 // 4
    makers = {"S-10": SparseVectors, "S-11": TwoComponentVectors, "S-12": ReferenceVectors, "S-14": SlimVectors,
              "S-15": FactorizedVectors}  # fmt: skip
    sizes = tables.sizes_for(budget, 300, 32, choices=16, pieces=4, nonzeros=4)
    assert sizes["S-13"] == sizes["S-12"]
    grow = {"S-10": {"bases": 1}, "S-11": {"columns": 1}, "S-12": {"blocks": sizes["S-12"]["blocks"]}, "S-14": {"pool": 4},
            "S-15": {"size": 1}}  # fmt: skip
    for name, maker in makers.items():
        assert word_tables.stored_bytes(maker(**sizes[name])) <= budget
        larger = sizes[name] | {key: sizes[name][key] + more for key, more in grow[name].items()}
        assert (name == "S-12" and larger["blocks"] > 32) or word_tables.stored_bytes(maker(**larger)) > budget
    with pytest.raises(ValueError, match="do not hold the smallest table"):
        tables.sizes_for(1000, 300, 32)


# --- vocabulary trimming --------------------------------------------------------------------------------------------


def counts_of(**occurring: int) -> torch.Tensor:
    counts = torch.zeros(len(PIECES), dtype=torch.long)
    for piece, count in occurring.items():
        counts[PIECES.index(piece.replace("__", "##"))] = count
    return counts


def test_the_most_frequent_words_stay_and_of_equal_ones_the_first():
    counts = torch.tensor([0, 5, 2, 2, 9, 2, 0])
    assert tables.most_frequent(counts, 3).tolist() == [1, 2, 4]
    assert tables.most_frequent(counts, 4, always=(6, 0)).tolist() == [0, 1, 4, 6]
    for number in (0, 1, 8):
        with pytest.raises(ValueError, match=r"must lie in 2\.\.7"):
            tables.most_frequent(counts, number, always=(0, 6))


def test_words_are_spelled_in_the_longest_pieces_that_stay():
    trimming = tables.trim(PIECES, counts_of(good=5, very=3, un=2, __wat=2, __ab=1), None)
    assert trimming.pieces[0] == "[PAD]" and len(trimming.kept) == 5 + len(LETTERS) + 5
    assert [PIECES[old] for old in trimming.kept] == list(trimming.pieces)

    def spelled(piece: str) -> list[str]:
        return [trimming.pieces[new] for new in trimming.rewrite([PIECES.index(piece)])]

    assert spelled("good") == ["good"] and spelled("##wat") == ["##wat"]
    assert spelled("film") == ["f", "##i", "##l", "##m"]
    assert spelled("##watch") == ["##wat", "##c", "##h"] and spelled("##able") == ["##ab", "##l", "##e"]
    assert spelled("[unused0]") == ["[UNK]"] and spelled("[CLS]") == ["[CLS]"]
    number = {piece: place for place, piece in enumerate(PIECES)}
    split = split_of([number[p] for p in ("[CLS]", "good", "film", "[SEP]")], [number[p] for p in ("very", "good")])
    assert trimming.untouched_share(split) == pytest.approx(5 / 6)
    assert trimming.growth(split, covered=1.0) == pytest.approx(7 / 4)
    assert tables.spell("é", {"[UNK]": 1}) == [1]


def test_a_vocabulary_without_its_special_tokens_is_refused():
    for token in tables.NEEDED:
        pieces = [piece for piece in PIECES if piece != token]
        with pytest.raises(ValueError, match=rf"this one lacks \[{token[1:-1]}\]"):
            tables.trim(pieces, torch.ones(len(pieces)), 70)
    with pytest.raises(ValueError, match="the number of words must lie in"):
        tables.trim(PIECES, torch.ones(len(PIECES)), 5)
    with pytest.raises(ValueError, match="need as many counts"):
        tables.trim(PIECES, torch.ones(3))


def test_rewritten_ids_are_those_of_a_tokenizer_with_the_small_vocabulary(tokenizer):
    texts = ["Good film", "very good films", "unwatchable", "a very unwatchable film!", "good"]
    trimming = tables.trim(PIECES, counts_of(good=5, very=3, un=2, __wat=2, __s=2), None)
    old, new = tokenizer(texts)["input_ids"], tables.retokenise(texts, tokenizer, trimming, 64)
    assert [trimming.rewrite(row) for row in old] == new
    assert tables.respelling_agrees(old, new, trimming) == {"untouched": 1.0, "all": 1.0}
    # Without ##watch a whole word is cut across the seam of two old pieces, where ##chab fits.
    other = tables.trim(PIECES, counts_of(un=2, __able=2, __wat=1, __chab=1), None)
    old, new = tokenizer(["unwatchable"])["input_ids"], tables.retokenise(["unwatchable"], tokenizer, other, 64)
    assert [other.pieces[number] for number in other.rewrite(old[0])[1:-1]] == ["un", "##wat", "##c", "##h", "##able"]
    assert [other.pieces[number] for number in new[0][1:-1]] == ["un", "##wat", "##chab", "##l", "##e"]
    assert tables.respelling_agrees(old, new, other)["all"] == 0
    cut = tables.retokenise(texts, tokenizer, trimming, 4)
    assert all(len(row) <= 4 and row[-1] == trimming.pieces.index("[SEP]") for row in cut)


@pytest.fixture
def trimming() -> tables.Trimming:
    """100 words of which 40 stay; each other one is spelled in two or three of them."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.cat([torch.tensor([0]), 1 + torch.randperm(99, generator=generator)[:39].sort().values])
    spelling = torch.zeros(100, 3, dtype=torch.long)
    spelling[:, :2] = torch.randint(1, 40, (100, 2), generator=generator)
    spelling[::3, 2] = torch.randint(1, 40, (34,), generator=generator)
    spelling[kept] = 0
    spelling[kept, 0] = torch.arange(40)
    return tables.Trimming(kept, spelling, tuple(str(number) for number in kept.tolist()))


def test_a_trimmed_bert_is_the_plain_one_on_the_ids_that_it_spells(tiny, batch, trimming):
    spelling, shipped = tables.respelling_bert(tiny, trimming, 3.0), tables.trimmed_bert(tiny, trimming)
    plain = BertForSequenceClassification(BertConfig(**(tiny.config.to_diff_dict() | {"vocab_size": 40}))).eval()
    state = tiny.state_dict()
    state["bert.embeddings.word_embeddings.weight"] = state["bert.embeddings.word_embeddings.weight"][trimming.kept]
    plain.load_state_dict(state)
    logits = spelling(batch["input_ids"], batch["attention_mask"]).logits
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        own = torch.tensor([trimming.rewrite(ids[mask.bool()].tolist())])
        torch.testing.assert_close(logits[row], plain(input_ids=own).logits[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shipped(input_ids=own).logits, plain(input_ids=own).logits)
    kept = trimming.kept[torch.randint(1, 40, (2, 6))]  # sentences that lost no piece: the model of before
    torch.testing.assert_close(spelling(kept, torch.ones_like(kept)).logits, tiny(kept).logits, atol=1e-5, rtol=1e-4)
    assert tiny.config.vocab_size == 100 and shipped.config.vocab_size == 40


def test_trimmed_models_keep_the_contract(tiny, trimming, tmp_path):
    for name, model in (
        ("shipped", tables.trimmed_bert(tiny, trimming)),
        ("spelling", tables.respelling_bert(tiny, trimming, 1.5)),
    ):
        artifacts.save(model, tmp_path / f"{name}.safetensors")
        contract.write(tmp_path / f"{name}.safetensors", model, 7)
        assert contract.broken(tmp_path / f"{name}.safetensors") == []


def test_a_trimmed_table_means_the_pieces_that_spell_a_word(tiny, trimming):
    table = word_tables.word_table(tiny)
    table[0] = 0.7
    vectors = tables.trimmed_vectors(table, trimming)
    torch.testing.assert_close(vectors(trimming.kept), table[trimming.kept])  # [PAD] too
    word = next(number for number in range(0, 100, 3) if number not in trimming.kept.tolist())
    old = trimming.kept[trimming.spelling[word]]
    torch.testing.assert_close(vectors(torch.tensor([word]))[0], table[old].mean(0))
    two = next(number for number in range(1, 100, 3) if number not in trimming.kept.tolist())
    torch.testing.assert_close(vectors(torch.tensor([two]))[0], table[trimming.kept[trimming.spelling[two, :2]]].mean(0))


def test_a_split_is_tokenised_anew(tokenizer):
    data = Dataset.from_dict({"text": ["good film", "very good"], "label": [0, 1]})
    trimming = tables.trim(PIECES, counts_of(good=2, very=1), None)
    split = tables.retokenised(Split(data, [[3, 4]] * 2, torch.tensor([0, 1])), tokenizer, trimming, 16)
    assert [trimming.pieces[new] for new in split.input_ids[1]] == ["[CLS]", "very", "good", "[SEP]"]
    assert split.labels.tolist() == [0, 1] and len(split) == 2
