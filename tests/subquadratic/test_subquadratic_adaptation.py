"""Long positions, layer-wise distillation, and measurements of scaling against exact power laws."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from utils import artifacts, bert
from utils.metrics import Estimate
from utils.parts.projected import LinformerAttention
from utils.subquadratic import adaptation, linear, sorting
from utils.subquadratic.adaptation import Plan, Point, Recipe

INPUTS = ("input_ids", "attention_mask")


@pytest.fixture
def dense() -> BertForSequenceClassification:
    """Two layers, hidden 32, 16 positions, with weights large enough for uneven attention."""
    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                        max_position_embeddings=16, hidden_dropout_prob=0.0, initializer_range=0.3)  # fmt: skip
    return BertForSequenceClassification(config).eval()


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**{name: batch[name] for name in INPUTS}).logits


# --- what a pass makes ----------------------------------------------------------------------------------------------


def test_allocations_sees_what_is_made_and_no_views():
    x = torch.randn(50, requires_grad=True)
    with adaptation.Allocations() as watched:
        x.expand(40, 50).t().unsqueeze(0)
        y = x * 2
        y.mul_(2)
    assert watched.largest.numbers == 50 and watched.largest.shape == (50,)
    with adaptation.Allocations() as watched:
        torch.outer(y, x)
    assert watched.largest == adaptation.Made(2500, (50, 50), watched.largest.operation)
    z = torch.randn(20, requires_grad=True).unsqueeze(1)
    with adaptation.Allocations() as watched:
        small = z.expand(20, 30).sum()
    assert watched.largest.numbers <= 20
    with adaptation.Allocations() as watched:
        (small * 2).backward()  # the gradient of a sum is expanded, that of an expansion summed: nothing large
    assert watched.largest.numbers <= 20


def test_allocations_finds_the_scores_of_dense_attention_forwards_and_backwards(dense):
    adaptation.extend_positions(dense, 300)
    inputs = {"input_ids": torch.randint(1, 100, (1, 300))}
    with bert.attention(dense, "eager"):
        with adaptation.Allocations() as forwards:
            loss = dense(**inputs).logits.sum()
        with adaptation.Allocations() as backwards:
            loss.backward()
    assert forwards.largest.numbers == backwards.largest.numbers == 4 * 300 * 300


def test_calls_are_counted_under_the_attention_in_force(dense, batch):
    with adaptation.attention_calls(dense) as calls:
        logits(dense, batch)
        with bert.attention(dense, "eager"):
            logits(dense, batch)
        linear.use_attention(dense, "linear")
        logits(dense, batch)
    assert calls == {"sdpa": 2, "eager": 2, "linear": 2}
    linear.star(dense)
    with adaptation.attention_calls(dense) as calls:
        logits(dense, batch)
    assert calls == {"star_attention": 2}
    logits(dense, batch)
    assert calls == {"star_attention": 2}  # nothing is counted outside
    dense.bert.encoder.layer[1].attention.self = dense.bert.encoder.layer[0].attention.self
    with adaptation.attention_calls(dense) as calls:
        logits(dense, batch)
    assert calls == {"star_attention": 2}


def test_an_attention_map_holds_the_weights_of_the_sum():
    q, k, v = torch.randn(3, 2, 6, 4)
    text = torch.arange(6) < 5

    def core(q, k, v, text):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=text[:, None, None])

    found = adaptation.attention_map(core, q, k, text)
    expected = (q @ k.transpose(-1, -2) / 2).masked_fill(~text, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found @ v, core(q[None], k[None], v[None], text[None])[0])


# --- long positions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [16, 20, 50])
def test_positions_are_copied_until_they_suffice(length, dense, batch, tmp_path):
    before, learned = logits(dense, batch), dense.bert.embeddings.position_embeddings.weight.detach().clone()
    adaptation.extend_positions(dense, length)
    found = dense.bert.embeddings.position_embeddings
    assert found.num_embeddings == dense.config.max_position_embeddings == length and found.weight.requires_grad
    for position in range(length):
        assert torch.equal(found.weight[position], learned[position % 16])
    assert torch.equal(logits(dense, batch), before)
    longest = {"input_ids": torch.randint(1, 100, (2, length)), "attention_mask": torch.ones(2, length, dtype=torch.long)}
    artifacts.save(dense, tmp_path / "long")
    torch.testing.assert_close(logits(artifacts.load(tmp_path / "long"), longest), logits(dense, longest))


def test_positions_are_not_taken_away_and_lengths_are_checked(dense):
    with pytest.raises(ValueError, match="takes 16 tokens already: length must be at least that, got 15"):
        adaptation.extend_positions(dense, 15)
    for length in (0, 17):
        with pytest.raises(ValueError, match=f"takes 1 to 16 tokens, got {length}"):
            adaptation.check_length(dense, length)
    adaptation.check_length(dense, 16)


# --- distillation, layer by layer -----------------------------------------------------------------------------------


def swapped(dense: nn.Module, projected_length: int = 4, sharing: str = "headwise", start: str = "random") -> nn.Module:
    model = copy.deepcopy(dense)
    linear.linformer(model, projected_length, sharing, start)
    return model


@pytest.mark.method("L-06b")
def test_errors_are_means_over_batches_and_every_batch_is_taught(dense, batch):
    model, other = swapped(dense), {**batch, "input_ids": (batch["input_ids"] + 7) % 100}
    one, two, both = (adaptation.layer_errors(model, dense, given) for given in ([batch], [other], [batch, other]))
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(one, two, strict=True)], rel=1e-4)
    assert sum(one) != pytest.approx(sum(two), rel=1e-3)
    fit = adaptation.distill_layers(model, dense, [batch, other], [batch], Recipe(4, 1e-12))
    assert fit.losses == pytest.approx([sum(one), sum(two)] * 2, rel=1e-4)


@pytest.mark.method("L-07")
def test_attentions_are_taught_in_training_mode(dense, batch):
    sorting.sinkhorn_transformer(model := copy.deepcopy(dense), block=2)
    part, seen = model.bert.encoder.layer[0].attention.self, []
    part.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    adaptation.distill_layers(model, dense, [batch], [batch], Recipe(2, 1e-3, "all"))
    assert seen == [False, True, True, False]  # measured, taught twice, measured


@pytest.mark.method("L-06b", "L-06d")
@pytest.mark.parametrize("sharing", ["headwise", "layerwise"])
def test_distillation_brings_every_layer_nearer_and_changes_what_it_may(sharing, dense, batch):
    model = swapped(dense, sharing=sharing)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.bert.embeddings.requires_grad_(False)
    untouched = bert.fingerprint(dense)
    fit = adaptation.distill_layers(model, dense, [batch], [batch], Recipe(60, 1e-2))
    assert len(fit.losses) == 60 and len(fit.before) == len(fit.after) == 2 and fit.seconds > 0
    assert sum(fit.after) < 0.7 * sum(fit.before) and max(fit.after) < max(fit.before)
    assert fit.losses[0] == pytest.approx(sum(fit.before), rel=1e-4)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".projection_" in name for name in changed)
    assert bert.fingerprint(dense) == untouched and not model.training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all("embeddings" in name for name in frozen)
    assert all(p.grad is None for p in (*model.parameters(), *dense.parameters()))


@pytest.mark.method("L-11")
def test_without_new_parameters_queries_keys_and_values_learn(dense, batch):
    model = copy.deepcopy(dense)
    linear.use_attention(model, "linear")
    with pytest.raises(ValueError, match="no parameters beyond queries, keys and values: train 'all'"):
        adaptation.distill_layers(model, dense, [batch], [batch], Recipe(1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit = adaptation.distill_layers(model, dense, [batch], [batch], Recipe(40, 1e-2, "all"))
    assert all(b < a for a, b in zip(fit.before, fit.after, strict=True))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("attention.self." in name for name in changed)


def test_a_layer_is_measured_on_the_dense_models_states_and_on_text_alone(dense, batch):
    exact = swapped(dense, 16, start="means")  # as many rows as positions: dense attention
    assert max(adaptation.layer_errors(exact, dense, [batch])) < 1e-8
    model = swapped(dense)
    errors = adaptation.layer_errors(model, dense, [batch])
    states = dense.bert(**{name: batch[name] for name in INPUTS}, output_hidden_states=True).hidden_states
    text = batch["attention_mask"].bool()
    with torch.no_grad():
        for number, error in enumerate(errors):
            block = dense.bert.encoder.layer[number].attention
            wanted = block(states[number], text[:, None, None])[0]
            found = model.bert.encoder.layer[number].attention(states[number], batch["attention_mask"])[0]
            relative = (found - wanted)[text].square().sum() / wanted[text].square().sum()
            assert error == pytest.approx(relative.item(), rel=1e-4)
    nn.init.zeros_(model.bert.encoder.layer[0].attention.self.projection_v)  # another first layer, the same inputs of the second
    after = adaptation.layer_errors(model, dense, [batch])
    assert after[0] != errors[0] and after[1] == errors[1]
    other = {**batch, "input_ids": torch.where(text, batch["input_ids"], 7)}
    assert adaptation.layer_errors(model, dense, [other]) == pytest.approx(after, rel=1e-4)


def test_what_cannot_be_distilled_is_refused(dense, batch):
    for options, message in [((0,), "steps must be"), ((1, 1e-3, "values"), "what must be one of new, all")]:
        with pytest.raises(ValueError, match=message):
            Recipe(*options)
    with pytest.raises(ValueError, match="still the dense 'sdpa'"):
        adaptation.distill_layers(copy.deepcopy(dense), dense, [batch], [batch], Recipe(1, what="all"))
    for given in (([], [batch]), ([batch], [])):
        with pytest.raises(ValueError, match="no calibration batches"):
            adaptation.distill_layers(swapped(dense), dense, *given, Recipe(1))


# --- scaling --------------------------------------------------------------------------------------------------------


def points(seconds: dict[int, float]) -> list[Point]:
    return [Point(n, Estimate(t, t, t, 1), 1000 * n) for n, t in seconds.items()]


def test_a_pass_without_gradients_builds_no_graph(dense):
    seen = []
    adaptation.Pass(dense, lambda: seen.append(torch.is_inference_mode_enabled()))()
    assert seen == [True]


def test_a_short_pass_is_repeated_and_its_time_is_the_mean(monkeypatch):
    now, runs = [0.0], []

    class Fake:
        device = torch.device("cpu")

        def __call__(self) -> None:
            runs.append(1)
            now[0] += 0.01

    monkeypatch.setattr(adaptation.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(adaptation.costs, "highest_allocation", lambda run, device: 1)
    found = adaptation.measure_scaling({"short": lambda n: Fake()}, Plan((100,), rounds=3, shortest=0.05))
    assert found["short"][0].seconds.value == pytest.approx(0.01) and len(runs) == 1 + 3 * 5


def test_exponents_end_at_the_last_length():
    found = adaptation.exponents(points({n: 1e-6 * n if n <= 2048 else 1.0 for n in adaptation.LENGTHS}), 512, 2048)
    assert found["seconds"].n == 3 and found["seconds"].value == pytest.approx(1)


def test_an_exponent_is_the_slope_of_a_power_law_with_students_interval():
    lengths = [256, 512, 1024, 2048, 4096]
    found = adaptation.fitted_exponent(lengths, [3e-9 * n**1.5 for n in lengths])
    assert (found.value, found.low, found.high, found.n) == (pytest.approx(1.5), pytest.approx(1.5), pytest.approx(1.5), 5)
    noise = np.array([0.1, -0.2, 0.05, 0.15, -0.1])
    values = np.array(lengths) ** 2 * np.exp(noise)
    x, y = np.log(lengths), np.log(values)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    rest = y - y.mean() - slope * (x - x.mean())
    half = stats.t.ppf(0.975, 3) * math.sqrt((rest**2).sum() / 3 / ((x - x.mean()) ** 2).sum())
    found = adaptation.fitted_exponent(lengths, values)
    assert (found.value, found.low, found.high) == (
        pytest.approx(slope),
        pytest.approx(slope - half),
        pytest.approx(slope + half),
    )
    with pytest.raises(ValueError, match="three points or more, got 2"):
        adaptation.fitted_exponent(lengths[:2], values[:2])


def test_exponents_of_time_and_memory_between_two_lengths():
    found = adaptation.exponents(points({n: 1e-6 * n**2 if n > 1000 else 1.0 for n in adaptation.LENGTHS}))
    assert found["seconds"].value == pytest.approx(2) and found["peak_bytes"].value == pytest.approx(1)
    assert found["seconds"].n == 4


def test_a_method_overtakes_where_the_lines_cross_for_good():
    lengths = (256, 512, 1024, 2048, 4096)
    dense = points({n: 1e-9 * n**2 for n in lengths})
    assert adaptation.overtakes(points({n: 1e-6 * n for n in lengths}), dense) == pytest.approx(1000)
    assert adaptation.overtakes(points({n: 1e-8 * n for n in lengths}), dense) == 256  # from the first length on
    assert adaptation.overtakes(points({n: 1e-5 * n for n in lengths}), dense) is None
    twice = {256: 1e-9, 512: 1.0, 1024: 1.0, 2048: 1e-9, 4096: 1e-9, 8192: 1e-9}  # ahead, behind, ahead
    found = adaptation.overtakes(points(twice), dense)
    assert 1024 < found < 2048
    assert adaptation.overtakes(points({8192: 1.0}), dense) is None


def test_the_time_of_the_next_length_follows_the_last_slope():
    assert adaptation.expected_seconds([], 512) == 0
    assert adaptation.expected_seconds(points({256: 1.0}), 512) == 4
    assert adaptation.expected_seconds(points({256: 1.0, 512: 2.0}), 1024) == pytest.approx(4)
    assert adaptation.expected_seconds(points({256: 1.0, 512: 2.0**1.5}), 1024) == pytest.approx(2**3)
    assert adaptation.expected_seconds(points({256: 1.0, 512: 2.0**1.5}), 2048) == pytest.approx(2**4.5)
    assert adaptation.expected_seconds(points({256: 2.0, 512: 1.0}), 1024) == pytest.approx(2)  # never less than linear
    assert adaptation.expected_seconds(points({256: 1.0, 512: 64.0}), 1024) == pytest.approx(256)  # nor more than quadratic


def test_a_series_ends_before_a_pass_over_the_limit_and_the_others_go_on(monkeypatch):
    """With a clock of its own: a pass through `dense` takes (n / 100)^2 seconds, one through `line` n / 100."""
    now, order = [0.0], []

    class Fake:
        device = torch.device("cpu")

        def __init__(self, name: str, length: int):
            self.name, self.length = name, length

        def __call__(self) -> None:
            order.append((self.name, self.length))
            now[0] += (self.length / 100) ** (2 if self.name == "dense" else 1)

    monkeypatch.setattr(adaptation.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(adaptation.costs, "highest_allocation", lambda run, device: run.length)
    passes = {name: lambda length, name=name: Fake(name, length) for name in ("dense", "line")}
    found = adaptation.measure_scaling(passes, Plan((100, 200, 400, 800, 1600), rounds=2, limit=20))
    assert [p.length for p in found["dense"]] == [100, 200, 400] and [p.seconds.value for p in found["dense"]] == [1, 4, 16]
    assert [p.seconds.value for p in found["line"]] == [1, 2, 4, 8, 16] and found["line"][-1].peak_bytes == 1600
    assert [name for name, length in order if length == 100] == ["dense", "line", "dense", "line", "line", "dense"]
    assert max(n for name, n in order if name == "dense") == 400  # what was not to be measured was not tried either


@pytest.mark.parametrize("plan", [{"lengths": ()}, {"lengths": (4, 2)}, {"lengths": (0, 2)}, {"rounds": 0}, {"limit": 0}])
def test_a_plan_of_nothing_is_refused(plan):
    with pytest.raises(ValueError, match="must be"):
        Plan(**plan)


def test_passes_run_layers_and_models_and_leave_no_gradients(dense):
    attention = dense.bert.encoder.layer[0].attention.self
    modules = {"sdpa": adaptation.named(attention, "sdpa"), "linear": adaptation.named(attention, "linear"),
               "linformer": LinformerAttention.from_attention(attention, max_length=64, projected_length=4)}  # fmt: skip
    assert attention.config is dense.config and dense.config._attn_implementation == "sdpa"
    plan = Plan((16, 32, 64), rounds=1, shortest=0.0)
    for backward in (False, True):
        passes = {name: adaptation.layer_pass(lambda length, m=m: m, backward) for name, m in modules.items()}
        found = adaptation.measure_scaling(passes, plan)
        assert all([p.length for p in series] == [16, 32, 64] for series in found.values())
        for series in found.values():
            assert all(p.seconds.value > 0 for p in series)
            peaks = [p.peak_bytes for p in series]
            assert peaks[0] < peaks[1] < peaks[2] and peaks[0] >= 16 * 32 * 4
        assert all(p.grad is None for m in modules.values() for p in m.parameters())
    forwards, both = (adaptation.layer_pass(lambda length: modules["linear"], backward)(64) for backward in (False, True))
    assert adaptation.costs.highest_allocation(both, both.device) > adaptation.costs.highest_allocation(forwards, both.device)
    whole = adaptation.model_pass(lambda length: dense, backward=True)
    whole(16)()
    assert all(p.grad is None for p in dense.parameters())
    with pytest.raises(ValueError, match="takes 1 to 16 tokens, got 17"):
        whole(17)


def test_a_pass_with_gradients_really_takes_them(dense):
    attention, seen = dense.bert.encoder.layer[0].attention.self, []
    attention.value.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    run = adaptation.layer_pass(lambda length: attention, backward=True)(8)
    run.inputs[0].register_hook(lambda gradient: seen.append(gradient.shape))
    run()
    assert sorted(seen) == sorted([torch.Size([32, 32]), torch.Size([1, 8, 32])])
