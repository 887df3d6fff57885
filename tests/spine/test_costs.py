"""Closed forms against counters, timings against known work, memory against arithmetic."""

import copy
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from utils import bert, costs, parts
from utils.parts.patterns import WindowAttention
from utils.parts.self_attention import replace_attention
from utils.structure import remove_heads, remove_neurons


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_closed_form_macs_equal_the_mended_counter(tiny, length, implementation):
    with bert.attention(tiny, implementation):
        assert costs.macs(tiny, length, batch=3) == costs.measured_macs(tiny, length, batch=3)


def test_closed_form_macs_follow_physical_pruning(tiny):
    before = costs.macs(tiny, 16)
    remove_neurons(tiny, {0: torch.arange(16)})
    remove_heads(tiny, {1: torch.tensor([True, False, False, False])})
    assert costs.macs(tiny, 16) == costs.measured_macs(tiny, 16) < before


def test_macs_of_bert_base_are_the_published_arithmetic():
    with torch.device("meta"):
        base = BertForSequenceClassification(BertConfig())
    count = costs.macs_by_component(base, 256)
    assert count["qkv"] == 256 * 12 * 3 * 768**2
    assert count["attention_core"] == 12 * 2 * 256**2 * 768
    assert count["ffn"] == 256 * 12 * 2 * 768 * 3072
    parameters = costs.parameters_by_component(base)
    assert parameters["embeddings"] == 23_837_184 and parameters["ffn"] == 56_669_184 and parameters["qkv"] == 21_261_312


def test_parameter_counts_by_hand(tiny):
    counts = costs.parameter_counts(tiny)
    embeddings = (100 + 512 + 2 + 2) * 32
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
    assert (
        counts["parameters"]
        == embeddings + 2 * layer + 32 * 32 + 32 + 2 * 33
        == sum(costs.parameters_by_component(tiny).values())
    )
    assert counts["parameters_without_embeddings"] == counts["parameters"] - embeddings


def test_latency_ratio_sees_a_model_twice_as_deep():
    config = BertConfig(vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
    shallow = BertForSequenceClassification(config).eval()
    deep = copy.deepcopy(shallow)
    deep.bert.encoder.layer.extend(copy.deepcopy(list(shallow.bert.encoder.layer)) * 3)
    found = costs.race(deep, {"shallow": shallow, "twin": copy.deepcopy(deep)}, batch=8, seconds=0.05, rounds=3)
    assert found["shallow"].value > 1.5 and found.ratio("shallow", over="twin").value > 1.5
    assert found.ms["baseline"] > found.ms["shallow"] and list(found) == ["shallow", "twin"]


def test_structure_ignores_values_and_sees_shapes_types_parts_and_attention(tiny):
    def named(change) -> str:
        model = copy.deepcopy(tiny)
        change(model)
        return costs.structure(model)

    def low_rank(model) -> None:
        model.bert.pooler.dense = parts.LowRankLinear.from_linear(model.bert.pooler.dense, 32)

    assert named(lambda model: model.classifier.weight.data.zero_()) == costs.structure(tiny)
    others = [named(lambda model: remove_neurons(model, {0: torch.arange(16)})), named(lambda model: model.bfloat16()), named(low_rank),
              named(lambda model: setattr(model.config, "_attn_implementation", "linear"))]  # fmt: skip
    assert len({costs.structure(tiny), *others}) == 5


def test_structure_sees_options_of_parts_that_are_in_no_shape(tiny):
    def windowed(window: int) -> str:
        model = copy.deepcopy(tiny)
        replace_attention(model, lambda attention, _: WindowAttention.from_attention(attention, window=window, dilations=[1] * 4))
        return costs.structure(model)

    assert windowed(2) == windowed(2) != windowed(4)


def test_structure_sees_which_tensors_are_one(tiny):
    def shared(*places: int) -> str:
        model = copy.deepcopy(tiny)
        layers = model.bert.encoder.layer
        layers.extend(copy.deepcopy(layers[0]) for _ in range(2))
        for place in places:
            layers[place] = layers[0]
        return costs.structure(model)

    assert len({shared(), shared(2), shared(3), shared(2, 3)}) == 4
    assert shared(2, 3) == shared(2, 3)


def test_peak_memory_covers_weights_and_the_widest_activations(tiny):
    weights = sum(p.nbytes for p in tiny.parameters())
    batch, length = 16, 24
    hidden = batch * length * 64 * 4  # the FFN's hidden activations, twice alive around the GELU
    found = costs.peak_memory(tiny, batch, length)
    assert weights + 2 * hidden <= found <= weights + 12 * hidden


def test_component_seconds_account_for_most_of_a_pass(tiny):
    inputs = costs.example_inputs(tiny, 16, 64)
    seconds = costs.component_seconds(tiny, inputs, repeats=5)
    assert set(seconds) == set(costs.COMPONENTS) and all(len(values) == 5 for values in seconds.values())
    start = time.perf_counter()
    with torch.inference_mode():
        tiny(**inputs)
    assert sum(sorted(values)[0] for values in seconds.values()) < 3 * (time.perf_counter() - start)
    assert not tiny.bert.embeddings._forward_hooks


def test_every_round_of_a_timing_begins_with_another_model(monkeypatch, tiny):
    order, models = [], [copy.deepcopy(tiny) for _ in range(3)]

    class Recorder:
        def __init__(self, model):
            self.number = models.index(model)

        def blocked_autorange(self, min_run_time):
            order.append(self.number)
            return SimpleNamespace(median=1.0 + self.number)

    monkeypatch.setattr(costs, "timer", lambda model, inputs: Recorder(model))
    assert costs.interleaved_seconds(models, batch=1, seconds=0.01, rounds=3) == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert costs.speed_ratio([2.0, 4.0, 6.0], [1.0, 1.0, 2.0]).value == 3.0


def test_energy_meter_reports_something_positive_even_if_stopped_at_once():
    meter = costs.EnergyMeter()
    found = meter.stop()
    assert found["energy_kwh_estimate"] >= 0 and found["mean_watts_estimate"] >= 0


def test_a_users_own_settings_of_the_meter_do_not_reach_it(tmp_path, monkeypatch):
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\noutput_dir = /no/such/folder\nsave_to_file = true\nlog_level = 7\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CODECARBON_OUTPUT_DIR", "/no/such/folder")
    monkeypatch.chdir(tmp_path)
    meter = costs.EnergyMeter()
    assert meter.stop()["energy_kwh_estimate"] is not None
    assert meter.tracker._external_conf == {}


def test_a_meter_that_does_not_start_costs_nothing_but_its_estimate(monkeypatch):
    import codecarbon

    def broken(**options):
        raise AttributeError("no sensors")

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", broken)
    assert costs.EnergyMeter().stop() == {"energy_kwh_estimate": None, "mean_watts_estimate": None}
