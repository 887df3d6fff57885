"""The board refuses what is not fit for it, and its rows say what the ruler says."""

import json
import math

import pytest
import torch
from utils.pruning.surgery import remove_layers

from utils import artifacts
from utils.board import RowRefused, flatten
from utils.pruning.magnitude import magnitude_masks
from utils.pruning.masks import apply_masks

ROW_FIELDS = {
    "method", "label", "hyperparameters", "seed", "control_of", "accuracy", "accuracy_ci95", "drop", "drop_ci95", "label_loyalty",
    "probability_loyalty", "parameters", "nonzero_parameters", "parameters_without_embeddings", "stored_bytes",
    "stored_bytes_without_embeddings", "macs", "latency_ratio", "peak_memory_bytes", "train_seconds", "simulated", "effect",
}  # fmt: skip


def test_a_method_that_changes_nothing_is_refused(board):
    with pytest.raises(RowRefused, match=r"changed nothing: all [\d,]+ weights equal the baseline's"):
        board.measure(board.fresh(), method="P-03", label="nothing")


def test_numbers_that_are_not_finite_are_refused(board):
    model = board.fresh()
    apply_masks(model, magnitude_masks(model, 0.5))
    with pytest.raises(RowRefused, match="not finite"):
        board.measure(model, method="P-03", label="broken", train_seconds=math.nan)


def test_an_artifact_that_disagrees_is_refused(board):
    model = board.fresh()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    wrong = {name: artifacts.dense(torch.zeros_like(model.get_parameter(name)))}
    with pytest.raises(RowRefused, match="reloaded artifact disagrees"):
        board.measure(model, method="P-03", label="wrong file", encoded=wrong)


def test_a_row_has_every_field_and_survives_json(board):
    model = board.fresh()
    apply_masks(model, magnitude_masks(model, 0.5))
    row = board.measure(model, method="P-03", label="half", effect={"sparsity": 0.5})
    assert set(row) >= ROW_FIELDS
    assert json.loads(json.dumps(row, allow_nan=False)) == json.loads(json.dumps(row))
    pruned = sum(p.numel() for n, p in model.named_parameters() if n.endswith("dense.weight") or ("self" in n and "weight" in n))
    assert row["effect"]["weights_touched"] == pytest.approx(0.5 * (pruned - 384 * 384), rel=0.01)
    assert row["stored_bytes"] < board.baseline_row["stored_bytes"]
    assert row["accuracy"] == pytest.approx(board.percent(board.predict(model)) / 100, abs=1e-6)
    assert row["drop"] == pytest.approx(board.baseline_row["accuracy"] - row["accuracy"], abs=2e-6)


def test_simulated_rows_claim_no_speed(board):
    model = board.fresh()
    remove_layers(model, [0])
    row = board.measure(model, method="P-23a", label="simulated", simulated=True)
    assert row["latency_ratio"] is None
    assert board.table().loc["P-23a", "speed ×1"] == ""


def test_fresh_copies_do_not_touch_the_baseline(board):
    before = board.predict(board.baseline.model)
    model = board.fresh()
    board.recover(model, steps=1)
    assert torch.equal(board.predict(board.baseline.model), before)
    assert not torch.equal(board.predict(model), before)


def test_same_seed_same_numbers(board):
    first, second = board.fresh(), board.fresh()
    losses = [board.recover(model, steps=2).losses for model in (first, second)]
    assert losses[0] == losses[1]
    assert torch.equal(board.predict(first), board.predict(second))


def test_flatten_names_nested_values():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_a_context_applies_to_the_measurement_and_to_the_reloaded_artifact(board):
    from utils.quantization.uniform import ActivationQuantizer, quantized_inputs

    def coarse(model):
        return quantized_inputs(model, lambda: ActivationQuantizer(2))

    row = board.measure(board.fresh(), method="Q-17", label="2-bit activations", simulated=True, within=coarse)
    assert row["effect"]["same_weights"] and row["effect"]["largest_logit_difference"] > 0
    assert torch.equal(board.predict(board.baseline.model), board.baseline.logits)  # the context is gone


def test_an_engine_is_measured_with_its_own_bytes_and_its_real_speed(board):
    from utils.quantization.integer import float_engine

    engine = float_engine(board.baseline.model)
    row = board.measure_engine(engine, method="control", label="bfloat16", embedding_bytes=2 * 11_920_896)
    assert set(row) >= ROW_FIELDS
    assert row["stored_bytes"] == pytest.approx(board.baseline_row["stored_bytes"] / 2, rel=0.01)
    assert row["latency_ratio"]["batch1"] > 0 and row["label_loyalty"] > 0.9
    assert row["control_of"] is None


def test_a_race_times_all_models_against_the_baseline(board):
    shallow = board.fresh()
    remove_layers(shallow, [0])
    found = board.race({"same": board.fresh(), "half the layers": shallow}, batch=32, rounds=9)
    assert list(found) == ["same", "half the layers"] and {e.n for e in found.values()} == {9}
    assert found["half the layers"].value > 1.15 * found["same"].value


def test_the_smoke_profile_keeps_the_first_layers(board):
    from utils import bert

    whole = bert.load().state_dict()
    assert board.baseline.model.config.num_hidden_layers == board.profile.num_layers == len(board.fresh().bert.encoder.layer)
    kept = bert.load(num_layers=board.profile.num_layers).state_dict()
    assert len(kept) < len(whole) and all(torch.equal(value, whole[name]) for name, value in kept.items())
    assert bert.load(num_layers=99).config.num_hidden_layers == 6
