"""Sizes adapt to any BERT: few and many layers, one head, widths that 16 and 64 do not divide, few positions, many classes.

`python tests/spine/test_any_bert.py` (`make test-models`) takes every BERT of `BERTS` through every chapter in smoke and prints a table; the tests
take one of them through the core of the two chapters with the most sizes.
"""

import contextlib
import csv
import io
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from utils import CompanionError, bert, catalogue, profiles, sizes
from utils import run as runs
from utils.board import Board, within_positions
from utils.decomposition.tensors import balanced_shape, block_term_layers, tt_layers, width_factors
from utils.distillation.students import bilstm, cnn
from utils.pruning.blocks import bank_balanced_masks, block_masks
from utils.sharing.tables import sizes_for
from utils.tables import stored_bytes

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
REFUSALS = ("RowRefused", "CompanionError", "ValueError")  # in one line each; anything else is an accident


@dataclass(frozen=True)
class Shape:
    """What makes a tiny BERT odd, and how many classes its task has."""

    layers: int = 2
    heads: int = 3
    hidden: int = 60
    neurons: int = 100
    positions: int = 512
    classes: int = 2
    refuses: tuple[str, ...] = ()  # chapters in which some method cannot apply


BERTS = {
    "narrow, three classes": Shape(classes=3),
    "one layer, one head": Shape(layers=1, heads=1, hidden=24, neurons=100, refuses=("02", "03")),
    "40 positions, 20 classes": Shape(layers=4, heads=4, hidden=40, neurons=160, positions=40, classes=20, refuses=("04",)),
    "widths with little in common": Shape(layers=3, heads=2, hidden=44, neurons=90, refuses=("04",)),
    "24 layers, 16 heads": Shape(layers=24, heads=16, hidden=64, neurons=48),
    "312 wide, 12 heads": Shape(layers=2, heads=12, hidden=312, neurons=1248, refuses=("04",)),
    "five layers, five heads": Shape(layers=5, heads=5, hidden=50, neurons=90, positions=64, classes=5, refuses=("04",)),
    "two layers, one wide head": Shape(layers=2, heads=1, hidden=48, neurons=36, classes=4),
}


def make(shape: Shape, folder: Path) -> Path:
    """A random BERT of that shape, with the tokenizer of the embedded one."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=30522, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        intermediate_size=shape.neurons, max_position_embeddings=shape.positions,
    ))  # fmt: skip
    model.save_pretrained(folder)
    source = Path(bert.resolve(bert.EMBEDDED))
    for name in TOKENIZER:
        shutil.copy(source / name, folder / name)
    return folder


def make_table(classes: int, file: Path) -> Path:
    """30 rows a class of made-up words, 4 to 60 of them; the class stands in the first word."""
    drawn = random.Random(0)
    words = [
        *("the", "a", "plot", "actor", "scene", "music", "ending", "was", "felt", "looked"),
        *("rather", "quite", "slow", "bright", "dull", "long", "short", "again", "and", "but"),
    ]
    with open(file, "w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened)
        table.writerow(["text", "label"])
        for row in range(30 * classes):
            kind = row % classes
            table.writerow([" ".join([words[kind], *drawn.choices(words, k=drawn.randint(4, 60))]), f"kind {kind}"])
    return file


def run_chapter(shape: Shape, chapter: str, folder: Path, track: str = "all") -> tuple[runs.Outcome, dict]:
    """A chapter, or its core track, in smoke with that BERT; how it ended, and the results that it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    model, table = folder / "model", folder / "table.csv"
    if not model.is_dir():
        make(shape, model)
        make_table(shape.classes, table)
    parameters = {"PROFILE": "smoke", "MODEL": str(model), "DATASET": str(table), "DEVICE": "cpu"}
    (outcome,) = runs.run_all([chapter], runs.Request(folder / "out", "smoke", parameters, track=track))
    written = folder / "out" / "results" / "smoke" / f"{outcome.name}.json"
    return outcome, json.loads(written.read_text()) if written.is_file() else {}


def accidents(message: str) -> list[str]:
    """What a run says went wrong, but for methods that refused: an exception's name stands before every message."""
    return [name for name in re.findall(r"\b([A-Z]\w*(?:Error|Refused|Iteration))\b: ", message) if name not in REFUSALS]


# --- sizes ----------------------------------------------------------------------------------------------------------


def tiny(**options) -> BertForSequenceClassification:
    given = {"vocab_size": 60, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 100}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**given | options)).eval()


def test_the_largest_divisor_by_trial():
    for size in (1, 2, 7, 51, 60, 312, 384, 1248):
        for most in (1, 2, 4, 16, 64, 2000):
            assert sizes.divisor(size, most) == [n for n in range(1, most + 1) if size % n == 0][-1]


@pytest.mark.parametrize(("hidden", "neurons", "most", "expected"), [
    (60, 100, 4, 4), (60, 100, 8, 5), (60, 100, 64, 20), (36, 90, 16, 9), (52, 208, 64, 52), (32, 64, 16, 16), (51, 77, 4, 1),
])  # fmt: skip
def test_blocks_and_banks_divide_every_matrix(hidden, neurons, most, expected):
    model = tiny(hidden_size=hidden, intermediate_size=neurons, num_attention_heads=1)
    side = sizes.common_divisor(model, most)
    assert side == expected
    masks = block_masks(model, 0.5, (side, side)) | bank_balanced_masks(model, side, max(1, side // 2))
    assert {mask.shape for mask in masks.values()} == {(hidden, hidden), (neurons, hidden), (hidden, neurons)}


def test_widths_are_cut_into_as_many_factors_as_they_have():
    assert [width_factors(n, 3) for n in (384, 1536, 60, 51, 77)] == [(6, 8, 8), (8, 12, 16), (3, 4, 5), (1, 3, 17), (1, 7, 11)]
    with pytest.raises(ValueError, match="37 is no product of 3 factors"):
        balanced_shape(37, 60)
    for layers in (tt_layers, block_term_layers):
        model = tiny(hidden_size=51, intermediate_size=77, num_attention_heads=3)
        whole = sum(parameter.numel() for parameter in model.parameters())
        layers(model, **({"rank": 1} if layers is block_term_layers else {}))
        assert sum(parameter.numel() for parameter in model.parameters()) < whole
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("width", [24, 37, 51, 60, 312, 384])
def test_every_way_to_share_word_vectors_fits_its_budget(width):
    found = sizes_for(400 * width, 1000, width, choices=16)
    pieces = found["S-14"]["pieces"]
    assert width % pieces == 0 and pieces == {24: 8, 37: 37, 51: 17, 60: 10, 312: 8, 384: 8}[width]
    from utils.parts import embeddings

    kinds = {"S-10": embeddings.SparseVectors, "S-12": embeddings.ReferenceVectors, "S-14": embeddings.SlimVectors}
    assert all(stored_bytes(kind(**found[method])) <= 400 * width for method, kind in kinds.items())
    assert found["S-10"]["nonzeros"] == 8 if width > 100 else 1 <= found["S-10"]["nonzeros"] <= 8


@pytest.mark.parametrize("width", [20, 200])
def test_students_of_other_kinds_are_no_wider_than_their_teacher(width):
    teacher = tiny(hidden_size=width, vocab_size=300)  # a table of as many directions
    lstm, windows = bilstm(teacher), cnn(teacher)
    assert {lstm.embeddings.embedding_dim, lstm.hidden.out_features} == {min(128, width)}
    assert lstm.lstm.hidden_size == min(128, width // 2)
    assert (windows.embeddings.embedding_dim, windows.convolutions[0].out_channels) == (min(128, width), min(100, width))


def test_no_length_is_beyond_the_positions():
    for profile in profiles.PROFILES.values():
        assert within_positions(profile, 512) == profile  # of the embedded model
        cut = within_positions(profile, 40)
        assert max(cut.max_length, cut.latency_length, *cut.lengths) <= 40 and cut.lengths == tuple(sorted(set(cut.lengths)))
        assert replace(cut, lengths=(), max_length=0, latency_length=0) == replace(
            profile, lengths=(), max_length=0, latency_length=0
        )


# --- the board ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A board on a BERT of one layer, one head and 20 positions, with three classes; and what it printed."""
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_CACHE", str(folder / "cache"))
        patch.setenv("COMPANION_OUT", str(folder / "out"))
        shape = Shape(layers=1, heads=1, hidden=24, neurons=50, positions=20, classes=3)
        model, table = make(shape, folder / "model"), make_table(3, folder / "table.csv")
        with open(table, "a", encoding="utf-8") as file:
            file.write(",kind 0\n")  # a row without a text
        with contextlib.redirect_stdout(io.StringIO()) as told:
            board = Board.open("06_subquadratic_transformers", "smoke", str(model), str(table), documents=True)
        yield board, told.getvalue().splitlines()


def test_opening_says_what_is_odd_about_model_and_data(opened):
    board, told = opened
    notes = [line for line in told if line.startswith("note: ")]
    assert "note: the model has 20 positions: no text of this run has more tokens" in notes
    assert any("1 of 91 rows" in note for note in notes) and all("\n" not in note for note in notes)
    assert [f"note: {note}" for note in (*board.task.notes, *board.baseline.notes)] == notes[1:]


def test_nothing_is_longer_than_the_model(opened):
    board, _ = opened
    assert board.profile.max_length == 20 and max(map(len, board.task.train.input_ids)) == 20
    assert board.baseline_row.macs_length == 16 and board.profile.lengths == (20,)


def test_the_embedded_model_needs_no_note(board, capsys):
    assert board.profile == profiles.get("smoke") and board.task.notes == [] == board.baseline.notes


def test_a_board_tells_as_many_classes_apart_as_there_are(opened):
    board, _ = opened
    trial = board.trial(lambda model: model.classifier.weight.data.mul_(-1))
    row = board.put(trial, "control", "turned", control_of="baseline")
    assert board.predict(trial).shape == (len(board.task.validation), 3) and 0 <= row.label_loyalty <= 1
    assert math.isfinite(board.selection_loss(trial)) and "turned" in board.compare("turned", "turned")


def test_bounds_of_the_embedded_model_refuse_no_row_of_another(opened, monkeypatch, capsys):
    """They are said, for a method may have failed; but a narrower table keeps another share, and that is no failure."""
    board, _ = opened
    monkeypatch.setattr(board, "profile", replace(board.profile, name="cpu"))
    row = board.put(board.trial(lambda model: model.classifier.weight.data.mul_(2)), "control", "doubled", control_of="baseline",
                    acted={"kept": (0.9, 0.1, 0.2)})  # fmt: skip
    assert row in board.rows
    assert "note: control doubled did not act as its name says: kept is 0.9, expected" in capsys.readouterr().out


def test_a_row_that_is_not_there_is_named_in_one_line(opened):
    board, _ = opened
    for ask in (lambda: board.compare("turned", "nothing"), lambda: board.find("nothing")):
        with pytest.raises(CompanionError, match="nothing") as caught:
            ask()
        assert "\n" not in str(caught.value)


# --- whole chapters -------------------------------------------------------------------------------------------------


def test_only_refusals_are_no_accidents():
    assert accidents("section 8: ValueError: keep one; section 9: RowRefused: nothing") == []
    assert accidents("section 8: KeyError: 'skip'; sources: CompanionError: methods that failed: P-1 (NameError: x)") == [
        "KeyError", "NameError",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("chapter", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in catalogue.chapters()
                                     if name.startswith(("01", "06"))])  # fmt: skip
def test_a_narrow_bert_goes_through_the_chapter(chapter, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "cache"))
    outcome, written = run_chapter(replace(BERTS["narrow, three classes"], positions=40), chapter, tmp_path / "run", "core")
    assert outcome.ok, outcome.message
    assert written["rows"] and written["failures"] == []


def main(names: list[str]) -> int:
    """Every BERT through every chapter, or those that are named; a line each. 1 where one had an accident or lost its results."""
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["COMPANION_CACHE"] = str(Path(scratch) / "cache")
        for name in names or BERTS:
            for chapter in catalogue.chapters():
                shape = BERTS[name]
                outcome, written = run_chapter(shape, chapter, Path(scratch) / name.replace(" ", "-").replace(",", ""))
                allowed = chapter[:2] in shape.refuses and not accidents(outcome.message)
                fine = bool(written.get("rows")) and (outcome.ok or allowed)
                bad += not fine
                how = "ok" if outcome.ok else f"{'refusals' if fine else 'FAILED'}: {outcome.message}"
                print(f"{name:34} {chapter:30} {len(written.get('rows', [])):3} rows  {how}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
