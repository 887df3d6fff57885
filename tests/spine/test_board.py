"""The board refuses what is not fit for it, and its rows say what the ruler says."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from utils import CompanionError, costs, encodings, training
from utils.baseline import Phase, dense_control
from utils.board import Board, RowRefused, flatten, in_turn
from utils.claims import Evidence, exact
from utils.metrics import Estimate
from utils.pruning.magnitude import magnitude_masks
from utils.pruning.masks import apply_masks, hold_masks, release_masks
from utils.structure import remove_layers
from utils.trials import Seeds


def half(model) -> None:
    apply_masks(model, magnitude_masks(model, 0.5))


def test_a_method_that_changes_nothing_is_refused(board):
    with pytest.raises(RowRefused, match=r"changed nothing: all [\d,]+ weights equal the baseline's"):
        board.put(board.fresh(), "P-03", "nothing")


def test_numbers_that_are_not_finite_are_refused(board):
    with pytest.raises(RowRefused, match="not finite"):
        board.put(board.trial(half), "P-03", "broken", effect={"share": math.nan})


def test_an_artifact_that_disagrees_is_refused(board):
    trial = board.trial(half)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    trial.encoded[name] = encodings.dense(torch.zeros_like(trial.model.get_parameter(name)))
    with pytest.raises(RowRefused, match="reloaded artifact disagrees"):
        board.put(trial, "P-03", "wrong file")


def test_a_row_has_every_field_and_survives_json(board):
    board.section("1")
    trial = board.trial(half)
    row = board.put(trial, "P-03", "half", effect={"sparsity": 0.5}, sparsity=0.5)
    assert json.loads(json.dumps(row.as_dict(), allow_nan=False)) == row.as_dict()
    pruned = sum(
        p.numel() for n, p in trial.model.named_parameters() if n.endswith("dense.weight") or ("self" in n and "weight" in n)
    )
    assert row.effect["weights_touched"] == pytest.approx(0.5 * (pruned - 384 * 384), rel=0.01)
    assert row.stored_bytes < board.baseline_row.stored_bytes
    assert row.accuracy == pytest.approx(board.percent(trial) / 100, abs=1e-6)
    assert row.drop == pytest.approx(board.baseline_row.accuracy - row.accuracy, abs=2e-6)
    assert row.section == "1" and row.track == "core" and row.hyperparameters == {"sparsity": 0.5, "steps": 0}
    assert row.against_control is None  # nothing was trained


def test_a_mask_is_as_fast_as_the_dense_model_and_equal_structures_are_timed_once(board):
    masked = board.put(board.trial(half), "P-03", "half again")
    assert masked.latency_of == "baseline" and masked.latency_ratio == {"batch1": 1.0, "batch32": 1.0}
    shallow = board.put(board.trial(lambda model: remove_layers(model, [0])), "P-23a", "first layer")
    again = board.put(board.trial(lambda model: (remove_layers(model, [0]), half(model))), "P-23a", "first layer, pruned")
    # timed itself, not copied from the dense model; which of the two is faster, a busy machine may not show in so small a model
    assert shallow.latency_of is None and set(shallow.latency_ratio.values()).isdisjoint({1.0})
    assert again.latency_of == "first layer" and again.latency_ratio == shallow.latency_ratio


def test_simulated_rows_claim_no_speed(board):
    row = board.put(board.trial(lambda model: remove_layers(model, [0])), "P-23a", "simulated", simulated=True)
    assert row.latency_ratio is None and row.speeds() == "emulated"


def test_fresh_copies_do_not_touch_the_baseline(board):
    before = board.predict(board.dense)
    trial = board.trial(steps=1)
    assert torch.equal(board.predict(board.dense), before)
    assert not torch.equal(board.predict(trial), before)


def test_a_section_gives_the_same_numbers_alone(board):
    def numbers() -> tuple:
        board.section("3")
        return torch.rand(1).item(), board.trial(steps=2).losses

    first = numbers()
    torch.rand(5)
    assert numbers() == first


def test_a_trained_row_is_held_against_the_dense_model_with_the_same_training(board):
    trial = board.trial(lambda model: hold_masks(model, magnitude_masks(model, 0.9)), steps=2, finish=release_masks)
    trial.recover(steps=1, learning_rate=1e-3, seed=5)
    row = board.put(trial, "P-03", "90 %, trained twice")
    assert row.hyperparameters["steps"] == 3 and row.hyperparameters["learning_rate"] == [1e-4, 1e-3]
    assert row.against_control["control"] == "dense, 2 steps at 0.0001, then 1 steps at 0.001"
    control = board.trial(steps=2)
    control.recover(steps=1, learning_rate=1e-3, seed=5)  # another order of the batches: the control must repeat it
    stored = dense_control(board.baseline, tuple(trial.phases), board.task, board.profile)
    assert torch.equal(board.predict(control), stored)
    expected = board.points(trial, control)
    assert 100 * row.against_control["difference"] == pytest.approx(expected.value, abs=1e-3)
    assert board.put(control, "control", "dense, the same").against_control is None


def test_the_control_holds_the_rate_as_long_and_equal_phases_are_said_once(board):
    trial = board.trial(half, steps=4, hold=2)
    row = board.put(trial, "P-07", "rate held", simulated=True)
    assert trial.phases[0].hold == 2 and row.hyperparameters["hold"] == 2
    control = dense_control(board.baseline, tuple(trial.phases), board.task, board.profile)
    assert torch.equal(control, board.predict(board.trial(steps=4, hold=2)))
    assert not torch.equal(control, board.predict(board.trial(steps=4)))
    assert in_turn((Phase(3, 1e-4, False, 0), Phase(3, 1e-4, False, 1))) == ["2 times 3 steps at 0.0001"]


def test_a_method_that_did_not_act_is_refused_except_in_smoke(board):
    acted = {"gates_closed": (0, 1, None)}
    assert board.put(board.trial(half), "P-21", "no gate", acted=acted).effect["bounds"] == {"gates_closed": [1, None]}
    board.rows.pop()
    board.profile, smoke = replace(board.profile, name="cpu"), board.profile
    try:
        with pytest.raises(RowRefused, match=r"did not act as its name says: gates_closed is 0, expected at least 1"):
            board.put(board.trial(half), "P-21", "no gate", acted=acted)
        with pytest.raises(RowRefused, match=r"zeroed is 0.7, expected between 0.4 and 0.5"):
            board.put(board.trial(half), "P-13a", "too many", acted={"zeroed": (0.7, 0.4, 0.5)})
        assert board.put(board.trial(half), "P-13a", "as many", acted={"zeroed": (0.5, 0.4, 0.5)}).effect["zeroed"] == 0.5
    finally:
        board.profile = smoke


def test_choices_are_made_on_training_sentences_that_nobody_trains_on(board):
    logits = board.predict(board.dense, board.task.selection)
    loss = torch.nn.functional.cross_entropy(logits, board.task.selection.labels)
    assert board.selection_loss(board.dense) == pytest.approx(loss.item())
    assert board.selection_accuracy(board.dense) == pytest.approx(
        100 * (logits.argmax(-1) == board.task.selection.labels).float().mean().item()
    )
    assert not set(board.selection.data["text"]) & set(board.task.validation.data["text"])


def test_a_context_holds_while_everything_is_measured_and_for_the_reloaded_artifact(board):
    from utils import bert

    def linear(model):
        return bert.attention(model, "linear")

    row = board.put(board.trial(within=linear), "L-01", "linear attention", simulated=True)
    assert row.effect["same_weights"] and row.effect["largest_logit_difference"] > 0
    assert row.macs != board.baseline_row.macs  # counted inside the context, where attention is another
    assert torch.equal(board.predict(board.dense), board.baseline.logits)  # the context is gone


def test_a_model_that_cuts_its_texts_is_counted_at_what_it_reads(board):
    row = board.put(board.trial(half), "P-03", "half, read at two tokens", reads=2)
    length = board.profile.latency_length
    assert row.macs == costs.macs(board.dense, 2) < board.baseline_row.macs and row.macs_length == length
    assert row.hyperparameters["reads"] == 2
    longer = board.put(board.trial(half), "P-03", "half, reads more than there is", reads=100 * length)
    assert longer.macs == board.baseline_row.macs


def test_the_difference_of_two_rows_is_paired(board, monkeypatch):
    right = torch.nn.functional.one_hot(board.task.validation.labels, 2).float()
    monkeypatch.setattr(board, "_logits", {"right": right, "wrong": -right})
    assert board.difference("right", "wrong").value == 100 and board.difference("wrong", "right").value == -100
    with pytest.raises(CompanionError, match="nothing to compare: no row 'gone'"):
        board.difference("right", "gone")


@pytest.mark.parametrize(("length", "name"), [(16, "sentences"), (128, "sentences"), (512, "texts")])
def test_long_texts_are_no_sentences(board, monkeypatch, length, name):
    monkeypatch.setattr(board, "profile", replace(board.profile, max_length=length))
    monkeypatch.setattr(board, "_logits", {"one": board.baseline.logits, "two": board.baseline.logits})
    assert f"that {len(board.task.validation)} {name} can show" in " ".join(board.compare("one", "two").split())


def test_a_failed_method_costs_its_row_and_is_named(board, capsys):
    with board.attempt("P-05"):
        raise ValueError("no such thing\nsecond line")
    assert board.failures.pop() == {"method": "P-05", "section": board._section, "error": "ValueError: no such thing"}
    assert "P-05 FAILED" in capsys.readouterr().err


def test_seeds_are_paired(board):
    found = board.over_seeds({"dense": lambda seed: board.dense, "shifted": lambda seed: board.trial(steps=1, seed=seed)})
    assert len(found["dense"]) == len(board.seeds) and found.mean("dense") == pytest.approx(
        100 * board.baseline_row.accuracy, abs=1e-3
    )
    assert found.difference("shifted", "dense").value == pytest.approx(found.mean("shifted") - found.mean("dense"))


def test_comparisons_are_sentences(board):
    board.put(board.trial(lambda model: model.classifier.weight.data.neg_()), "P-03", "upside down", simulated=True)
    board.put(board.trial(half), "P-03", "half, compared", simulated=True)
    told = board.compare("upside down", "half, compared")
    text = " ".join(told.split())
    assert max(map(len, told.splitlines())) <= 120
    assert "half, compared" in text and ("better than" in text or "no difference that 32 sentences can show" in text)
    with pytest.raises(CompanionError, match="no row is called"):
        board.find("nobody")


def test_the_better_row_is_named_first_with_its_own_gain(board, monkeypatch):
    right = torch.nn.functional.one_hot(board.task.validation.labels, 2).float()
    half_right = torch.where(torch.arange(len(right))[:, None] % 2 == 0, right, -right)
    monkeypatch.setattr(board, "_logits", {"right": right, "half right": half_right})
    gain = board.points(right, half_right)
    expected = f"right is {gain.value:.1f} points better than half right [{gain.low:+.1f}, {gain.high:+.1f}]."
    assert 0 < gain.low < 50 < gain.high
    for pair in (("right", "half right"), ("half right", "right")):
        assert " ".join(board.compare(*pair).split()) == expected


def test_a_row_stands_for_its_way_with_the_boards_own_seed(board, monkeypatch):
    right = torch.nn.functional.one_hot(board.task.validation.labels, 2).float()
    monkeypatch.setattr(board, "_logits", {"the row": right})
    monkeypatch.setattr(board, "profile", replace(board.profile, seeds=(board.seed, board.seed + 1)))
    trained = []

    def wrong(seed: int) -> torch.Tensor:
        trained.append(seed)
        return -right

    found = board.over_seeds({"way": wrong, "other": wrong}, rows={"way": "the row"})
    assert found["way"].tolist() == [100, 0] and found["other"].tolist() == [0, 0]
    assert trained == [board.seed, board.seed + 1, board.seed + 1]


def test_a_claim_says_which_of_its_arms_have_hardly_begun_to_learn(board, capsys, monkeypatch):
    monkeypatch.setattr(board, "profile", replace(board.profile, name="full"))
    floor = 100 * board.task.majority_accuracy()
    good, mixed, low = (np.array([floor + more for more in each]) for each in ((20, 21, 22), (5, 4, 9), (-1, 0, 1)))
    arms = Seeds({"good": good, "mixed": mixed, "low": low})

    def claim(second: str, **options):
        seeds = arms.only("good", second)
        evidence = [Evidence("difference", seeds.difference("good", second), "above")]
        return board.claim("C1", "It is better", "someone", "seed", evidence, arms=seeds, **options)

    told = "less than 5 points above the most frequent label: "
    assert claim("good").departs is None and told not in capsys.readouterr().out
    assert claim("mixed", departs="shorter").departs == f"shorter; {told}mixed (1 of 3)"
    found = claim("low")
    assert found.verdict == "supported" and found.departs == f"{told}low (3 of 3)"
    printed = capsys.readouterr().out
    assert f"good: {floor + 21:.1f} % ({floor + 20:.1f}, {floor + 21:.1f}, {floor + 22:.1f})" in printed
    assert f"always naming the most frequent label: {floor:.1f} %" in printed
    evidence = [Evidence("difference", arms.difference("low", "good"), "above")]
    assert board.claim("C1", "It is better", "someone", "seed", evidence, arms=arms).verdict == "not tested as stated"


def test_claims_about_time_name_their_machine(board, capsys):
    timed = board.claim("C2", "It is fast", "someone", "round", [Evidence("speed", exact(1.0), "below", 1.1)])
    other = board.claim("C3", "It is small", "someone", "arithmetic", [Evidence("size", exact(1.0), "below", 1.1)])
    assert timed.machine == board.machine and other.machine is None
    assert board.machine in capsys.readouterr().out
    long = board.claim(
        "C4", "It is " + "very " * 30 + "long", "someone", "arithmetic", [Evidence("size", exact(1.0), "below", 1.1)]
    )
    capsys.readouterr()
    board.verdicts()
    printed = capsys.readouterr().out
    for claim in (timed, other, long):
        line = f"{claim.id}, {claim.verdict}: {claim.statement} (unit: {claim.unit})"
        assert line in " ".join(printed.split()) and max(map(len, printed.splitlines())) < 120


def test_the_journal_gives_back_finished_sections_only(board, tmp_path, monkeypatch):
    journal = tmp_path / "rows.json"
    monkeypatch.setenv("COMPANION_JOURNAL", str(journal))
    board.section("5")
    board.put(board.trial(lambda model: remove_layers(model, [1])), "P-23a", "in section 5")
    board.claim("C17", "x", "y", "example", [Evidence("seen", Estimate(1.0, -math.inf, math.inf, 1), "above")])
    board.section("6")
    assert "5" in json.loads(journal.read_text())["section_seconds"]  # before any row of the next section
    board.put(board.trial(half), "P-03", "in section 6", simulated=True)
    monkeypatch.setenv("COMPANION_FINISHED", '["5"]')
    again = Board.open("01_pruning", "smoke")
    assert [row.label for row in again.rows if row.section in "56"] == ["in section 5"]
    assert again.claims[-1] == [claim for claim in board.claims if claim.section == "5"][-1]
    assert again.put(again.trial(lambda model: remove_layers(model, [1])), "P-23b", "the same").latency_of is not None
    again._energy.stop()
    monkeypatch.setenv("COMPANION_OUT", str(tmp_path))
    monkeypatch.setattr(again._energy, "stop", lambda: {"energy_kwh_estimate": 0.0, "mean_watts_estimate": 36.0})
    again.section_seconds["5"] = 1e5
    content = json.loads(again.close().read_text())  # the meter saw the sections of this process, the estimate is of all
    assert content["provenance"]["energy_kwh_estimate"] == pytest.approx(36 * content["wall_seconds"] / 3.6e6, rel=1e-6)


def test_flatten_names_nested_values():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_engines_are_rows_of_the_same_kind_timed_in_the_race(board):
    from utils.quantization.integer import float_engine

    engine = float_engine(board.dense)
    races = {f"batch{batch}": board.race({"bfloat16": engine}, batch) for batch in (1, 32)}
    row = board.put(engine, "control", "bfloat16", control_of="Q-16", latency=races)
    assert row.stored_bytes == pytest.approx(board.baseline_row.stored_bytes / 2, rel=0.01)
    assert row.latency_ratio["batch1"] == round(races["batch1"]["bfloat16"].value, 3) and row.label_loyalty > 0.9
    table = sum(p.numel() for p in board.dense.bert.embeddings.parameters())
    assert row.stored_bytes - row.stored_bytes_without_embeddings == 2 * table > 0


def test_a_race_times_all_models_against_the_baseline(board):
    shallow = board.trial(lambda model: remove_layers(model, [0])).model
    found = board.race({"same": board.fresh(), "half the layers": shallow}, batch=32, rounds=9)
    assert list(found) == ["same", "half the layers"] and {e.n for e in found.values()} == {9}
    assert found["half the layers"].value > 1.15 * found["same"].value


def test_the_smoke_profile_keeps_the_first_layers(board):
    from utils import bert

    whole = bert.load().state_dict()
    assert board.baseline.model.config.num_hidden_layers == board.profile.num_layers == len(board.fresh().bert.encoder.layer)
    sizes = board.profile
    kept = bert.load(num_layers=sizes.num_layers, vocabulary=board.task.vocabulary, neurons=sizes.neurons).state_dict()
    assert len(kept) < len(whole) and board.baseline.model.config.intermediate_size == sizes.neurons
    assert all(torch.equal(value, whole[name][tuple(map(slice, value.shape))]) for name, value in kept.items())
    assert board.baseline.model.config.vocab_size == board.profile.vocabulary == board.task.vocabulary
    assert max(max(ids) for ids in board.task.train.input_ids) < board.profile.vocabulary
    assert bert.load(num_layers=99).config.num_hidden_layers == 6


def test_a_student_is_held_against_itself_on_labels_alone(board):
    from utils import parts

    student = parts.BiLSTM(board.profile.vocabulary, board.task.num_labels, 8, 8, 8)

    def doubled(model, batch):
        return 2 * training.cross_entropy(model, batch)

    trial = board.trial(student=student, steps=2, learning_rate=1e-2, loss=doubled)
    row = board.put(trial, "control", "a student", control_of="baseline")
    assert row.against_control["control"] == "student on labels, 2 steps at 0.01"
    control = board.trial(student=student, steps=2, learning_rate=1e-2)
    expected = board.points(trial, control)
    assert 100 * row.against_control["difference"] == pytest.approx(expected.value, abs=1e-3)
    assert board.put(control, "control", "a student on labels", control_of="baseline").against_control is None
    assert board.put(board.trial(start=student, steps=1), "control", "no student", control_of="baseline").against_control is None
