"""Sharing across layers against transformers' ALBERT and unshared gradients; halting token by token; fixed points against
linear algebra, and their gradients against unrolled iterations."""

import copy
import itertools
from functools import partial

import fresh
import numpy as np
import pytest
import torch
from small_task import task_of
from torch import nn
from torch.autograd.functional import jacobian
from transformers import AlbertConfig, AlbertModel, BertConfig, BertForSequenceClassification

from utils import artifacts, bert, contract, costs, profiles, structure, training
from utils.metrics import Estimate
from utils.parts.depth import (
    AdaptiveEncoder,
    Anderson,
    EquilibriumEncoder,
    Halting,
    adaptive_computation,
    find_fixed_point,
    jacobian_penalty,
    ponder_cost,
    real_tokens,
    vector_jacobian,
)
from utils.sharing import layers

INPUTS = ("input_ids", "attention_mask")
SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
         "num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
         "classifier_dropout": 0.0}  # fmt: skip


def make(initializer_range: float = 0.3, **changes) -> BertForSequenceClassification:
    """Four layers, hidden 32, no dropout; every LayerNorm and bias is random too."""
    model = BertForSequenceClassification(BertConfig(**{**SIZES, "initializer_range": initializer_range, **changes})).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.1)
    return model


@pytest.fixture
def deep():
    return make()


@pytest.fixture
def calm():
    """A layer of small weights contracts."""
    return make(0.05)


def inputs(batch: dict, rows: slice = slice(None), length: int | None = None) -> dict:
    return {name: batch[name][rows, :length] for name in INPUTS}


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**inputs(batch)).logits


# --- the contract ---------------------------------------------------------------------------------------------------


def shared(what: str, groups: int = 1, start: layers.Start = "mean", batches: list[dict] | None = None):
    def change(model: nn.Module) -> nn.Module:
        layers.share_layers(model, what, groups, start, batches)
        return model

    return change


def universal(**options):
    def change(model: nn.Module) -> nn.Module:
        layers.universal(model, **options)
        nn.init.normal_(model.bert.encoder.halt.weight, std=0.2)
        nn.init.normal_(model.bert.encoder.step_embeddings, std=0.2)
        return model

    return change


def equilibrium(**options):
    def change(model: nn.Module) -> nn.Module:
        layers.equilibrium(model, **options)
        nn.init.normal_(model.bert.encoder.inject.weight, std=0.2)
        return model

    return change


def cut(model: nn.Module) -> nn.Module:
    """Heads and neurons removed before a Universal Transformer is made, and after it."""
    structure.remove_heads(model, {number: torch.tensor([0, 2, 3]) for number in range(4)})
    structure.remove_neurons(model, {number: torch.arange(40) for number in range(4)})
    universal(start=1, halting_bias=-1.0)(model)
    structure.remove_heads(model, {0: torch.tensor([0, 1])})
    structure.remove_neurons(model, {0: torch.arange(20)})
    return model


SHARED = {"all": shared("all"), "two groups": shared("all", 2), "ffn": shared("ffn"), "attention": shared("attention", start=2)}
ADAPTIVE = {"universal": universal(halting_bias=-1.0), "blend": universal(blend=True, max_steps=3), "cut": cut,
            "copied": universal(halting_bias=-0.5, copy_halted=True), "equilibrium": equilibrium(),
            "damped": equilibrium(window=1, mixing=0.5, max_iterations=4), "unrolled": equilibrium(unrolled=3)}  # fmt: skip
MADE = SHARED | ADAPTIVE


@pytest.mark.method("S-16a", "S-16b", "S-16c", "S-17", "S-18")
def test_every_model_comes_back_in_a_fresh_process(tmp_path):
    for name, change in MADE.items():
        model = change(make()).eval()
        artifacts.save(model, tmp_path / f"{name}.safetensors")
        contract.write(tmp_path / f"{name}.safetensors", model, 7)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method("S-16a", "S-16b", "S-16c", "S-17", "S-18")
@pytest.mark.parametrize("name", MADE)
def test_closed_form_is_what_the_counter_sees_where_nothing_stops_early(name, deep):
    before = costs.macs(deep, 9)
    model = MADE[name](deep).eval()
    if name in SHARED:
        assert costs.macs(model, 9) == before
    elif "equilibrium" in model.bert.encoder.kind:
        model.bert.encoder.solver = Anderson(**{**vars(model.bert.encoder.solver), "tolerance": 0.0})
    else:
        nn.init.constant_(model.bert.encoder.halt.bias, -30.0)
    for length in (1, 4, 9):
        assert costs.macs(model, length, 2) == costs.measured_macs(model, length, 2)


@pytest.mark.method("S-17", "S-18")
def test_the_closed_form_is_the_most_and_stopping_early_takes_less(deep, calm):
    universal()(deep)  # p = 0.7: two steps or so
    equilibrium(tolerance=0.1)(calm)
    for model in (deep, calm):
        assert costs.measured_macs(model, 9) < costs.macs(model, 9)


@pytest.mark.method("S-16a", "S-17", "S-18")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "linear"])
@pytest.mark.parametrize("change", [shared("all"), universal(halting_bias=-1.0),
                                    equilibrium(tolerance=1e-6, max_iterations=80)],
                         ids=["shared", "universal", "equilibrium"])  # fmt: skip
def test_neither_padding_nor_the_rest_of_the_batch_changes_a_sentence(change, attention, calm, batch):
    model = change(calm)
    with bert.attention(model, attention):
        together = logits(model, batch)
        torch.testing.assert_close(together[2:3], model(**inputs(batch, slice(2, 3), 5)).logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[:1], model(**inputs(batch, slice(0, 1))).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.method("S-16a", "S-17", "S-18")
@pytest.mark.parametrize("name", ["all", "universal", "equilibrium"])
def test_a_model_runs_the_attention_that_it_is_told_to(name, deep, batch, tmp_path):
    model = MADE[name](deep)
    if name == "equilibrium":
        model.bert.encoder.solver = Anderson(max_iterations=2)
    dense = logits(model, batch)
    for attention, same in (("eager", True), ("linear", False)):
        with bert.attention(model, attention):
            assert torch.allclose(logits(model, batch), dense, atol=1e-4) == same
            artifacts.save(model, tmp_path / attention)
            torch.testing.assert_close(
                logits(artifacts.load(tmp_path / attention), batch), logits(model, batch), atol=1e-4, rtol=1e-4
            )


@pytest.mark.method("S-16a", "S-17", "S-18")
@pytest.mark.parametrize("name", ["all", "universal", "equilibrium"])
def test_training_and_bfloat16_run_what_the_model_carries(name, calm, batch):
    model, task = MADE[name](calm), task_of(batch)
    exact = logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model, batch).float(), exact, atol=0.1, rtol=0.1)
    loss = {"all": training.cross_entropy, "universal": layers.ponder_loss(0.1), "equilibrium": layers.equilibrium_loss(0.1)}[
        name
    ]
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    log = training.train(model, task, profiles.get("smoke"), steps=2, learning_rate=1e-2, loss=loss)
    assert np.isfinite(log.losses).all()
    still = [key for key, p in model.named_parameters() if torch.equal(p, before[key]) and "embeddings." not in key]
    assert still == []  # gradients reach every weight above the embeddings: step embeddings, halting unit, injection
    again = bert.fresh_copy(model)  # no graph is left in the model
    torch.testing.assert_close(logits(again, batch), logits(model, batch))


# --- S-16 cross-layer sharing ---------------------------------------------------------------------------------------


def albert_of(model: BertForSequenceClassification, groups: int) -> AlbertModel:
    """transformers' ALBERT with the weights of a BERT whose layers are shared in groups."""
    config = AlbertConfig(vocab_size=100, embedding_size=32, hidden_size=32, num_hidden_layers=4, num_hidden_groups=groups,
                          num_attention_heads=4, intermediate_size=48, hidden_act="gelu",
                          max_position_embeddings=512)  # fmt: skip
    albert = AlbertModel(config).eval()
    albert.embeddings.load_state_dict(model.bert.embeddings.state_dict())
    with torch.no_grad():
        albert.encoder.embedding_hidden_mapping_in.weight.copy_(torch.eye(32))
        albert.encoder.embedding_hidden_mapping_in.bias.zero_()
    for group, theirs in enumerate(albert.encoder.albert_layer_groups):
        ours, theirs = model.bert.encoder.layer[group * 4 // groups], theirs.albert_layers[0]
        pairs = [(theirs.attention.query, ours.attention.self.query), (theirs.attention.key, ours.attention.self.key),
                 (theirs.attention.value, ours.attention.self.value), (theirs.attention.dense, ours.attention.output.dense),
                 (theirs.attention.LayerNorm, ours.attention.output.LayerNorm), (theirs.ffn, ours.intermediate.dense),
                 (theirs.ffn_output, ours.output.dense), (theirs.full_layer_layer_norm, ours.output.LayerNorm)]  # fmt: skip
        for to, given in pairs:
            to.load_state_dict(given.state_dict())
    albert.pooler.load_state_dict(model.bert.pooler.dense.state_dict())
    return albert


@pytest.mark.method("S-16a")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shared_layers_are_transformers_albert(groups, deep, batch):
    layers.share_layers(deep, "all", groups)
    theirs, ours = albert_of(deep, groups)(**inputs(batch)), deep.bert(**inputs(batch))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours.last_hidden_state[real], theirs.last_hidden_state[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=1e-5, rtol=1e-5)


def apart(model: nn.Module) -> nn.Module:
    """The same model with weights of its own at every depth."""
    model = copy.deepcopy(model)
    model.bert.encoder.layer = nn.ModuleList(copy.deepcopy(layer) for layer in model.bert.encoder.layer)
    return model


@pytest.mark.method("S-16a", "S-16b", "S-16c")
@pytest.mark.parametrize("what", layers.PIECES)
def test_the_gradient_of_what_is_shared_is_the_sum_over_the_depths(what, deep, batch):
    blocks = {"all": ("attention", "intermediate", "output"), "ffn": ("intermediate", "output"), "attention": "attention"}[what]
    layers.share_layers(deep, what)
    single = apart(deep)
    torch.testing.assert_close(logits(single, batch), logits(deep, batch))
    for model in (deep, single):
        training.cross_entropy(model, batch).backward()
    for name, parameter in deep.bert.encoder.layer[0].named_parameters():
        of_depths = [layer.get_parameter(name).grad for layer in single.bert.encoder.layer]
        expected = sum(of_depths) if name.startswith(blocks) else of_depths[0]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)
        assert all((layer.get_parameter(name) is parameter) == name.startswith(blocks) for layer in deep.bert.encoder.layer[1:])
    found = layers.depth_gradients(deep, batch, what)
    third = [p.grad.flatten() for name, p in single.bert.encoder.layer[2].named_parameters() if name.startswith(blocks)]
    torch.testing.assert_close(found[2], torch.cat(third))
    assert len(found) == 4


@pytest.mark.method("S-16a", "S-16b", "S-16c")
def test_what_is_stored_falls_by_arithmetic_and_work_does_not(deep, tmp_path):
    attention, ffn = 4 * (32 * 32 + 32) + 2 * 32, 32 * 48 + 48 + 48 * 32 + 32 + 2 * 32
    spared = {"all": attention + ffn, "ffn": ffn, "attention": attention}
    dense_bytes = artifacts.save(deep, tmp_path / "dense")["stored_bytes"]
    for what, weights in spared.items():
        model = shared(what)(copy.deepcopy(deep))
        assert layers.shared_share(model) == pytest.approx(3 * weights / (4 * (attention + ffn)))
        assert dense_bytes - artifacts.save(model, tmp_path / what)["stored_bytes"] == pytest.approx(
            12 * weights, abs=9000
        )  # header
        evidence = layers.smaller_not_cheaper(deep, model, 8)
        assert evidence[0].effect.value == pytest.approx(4 * (attention + ffn) / (4 * (attention + ffn) - 3 * weights))
        assert [item.verdict() for item in evidence] == ["supported", "supported"] and evidence[1].effect.value == 0
    assert layers.shared_share(deep) == 0
    assert layers.smaller_not_cheaper(deep, deep, 8)[0].verdict() != "supported"


@pytest.mark.method("S-16a")
def test_the_same_speed_is_two_one_sided_tests():
    def verdicts(*speed: float) -> list[str]:
        return [item.verdict() for item in layers.same_speed("batch 1", Estimate(*speed, 9))]

    assert verdicts(1.0, 0.97, 1.03) == ["supported", "supported"]
    assert verdicts(1.1, 1.08, 1.12) == ["supported", "contradicted"] and verdicts(1.0, 0.9, 1.1) == ["inconclusive"] * 2


@pytest.mark.method("S-16a", "S-16c")
@pytest.mark.parametrize("what", ["all", "attention"])
def test_a_shared_model_gives_the_states_and_maps_of_every_depth(what, deep, batch):
    layers.share_layers(deep, what)
    with bert.attention(deep, "eager"):
        out = deep(**inputs(batch), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5 and len(out.attentions) == 4


@pytest.mark.method("S-16a", "S-16b", "S-16c")
def test_what_cannot_be_shared_is_refused(deep, batch):
    refused = [({"what": "heads"}, "what must be one of"), ({"groups": 3}, "groups must divide"), ({"groups": 0}, "groups"),
               ({"start": 4}, "a number from 0 to 3"), ({"start": "median"}, "start must be one of"),
               ({"groups": 2, "start": 2}, "a number from 0 to 1"), ({"start": "least_squares"}, "no calibration")]  # fmt: skip
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            layers.share_layers(deep, **options)
    structure.remove_heads(deep, {1: torch.tensor([0, 2])})
    with pytest.raises(ValueError, match="unlike heads or neurons"):
        layers.share_layers(deep)


# --- S-16 starts ----------------------------------------------------------------------------------------------------


@pytest.mark.method("S-16a", "S-16b")
def test_a_start_is_the_mean_or_one_of_the_groups_layers(deep):
    name = "intermediate.dense.weight"
    weights = [layer.get_parameter(name).detach().clone() for layer in deep.bert.encoder.layer]
    mean, second = (shared("ffn", 2, start)(copy.deepcopy(deep)) for start in ("mean", 1))
    for found, expected in ((mean, (weights[0] + weights[1]) / 2), (second, weights[1])):
        torch.testing.assert_close(found.bert.encoder.layer[0].get_parameter(name), expected)
    torch.testing.assert_close(second.bert.encoder.layer[2].get_parameter(name), weights[3])
    kept = "attention.self.query.weight"
    assert torch.equal(mean.bert.encoder.layer[1].get_parameter(kept), deep.bert.encoder.layer[1].get_parameter(kept))


@pytest.mark.method("S-16a")
def test_least_squares_is_numpys_on_the_inputs_of_all_layers(deep, batch):
    rows = {"intermediate.dense": ([], []), "attention.output.LayerNorm": ([], [])}
    real = batch["attention_mask"].bool()
    for layer in deep.bert.encoder.layer:
        for path, (xs, ys) in rows.items():
            layer.get_submodule(path).register_forward_pre_hook(lambda m, args, xs=xs: xs.append(args[0][real].double()))
            layer.get_submodule(path).register_forward_hook(lambda m, args, y, ys=ys: ys.append(y[real].double()))
    logits(deep, batch)
    rows = {path: [torch.cat(part).detach().numpy() for part in both] for path, both in rows.items()}
    mean = layers.start_layer(deep, [0, 1, 2, 3], "mean")
    found = layers.least_squares_layer(deep, [0, 1, 2, 3], mean, [batch], ridge=0)
    x, y = rows["intermediate.dense"]
    expected = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
    np.testing.assert_allclose(found.intermediate.dense.weight.detach(), expected[:-1].T, atol=2e-3)
    np.testing.assert_allclose(found.intermediate.dense.bias.detach(), expected[-1], atol=2e-3)
    x, y = rows["attention.output.LayerNorm"]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
    slopes = [np.polyfit(x[:, unit], y[:, unit], 1) for unit in range(32)]
    np.testing.assert_allclose(found.attention.output.LayerNorm.weight.detach(), [slope for slope, _ in slopes], atol=1e-4)
    np.testing.assert_allclose(found.attention.output.LayerNorm.bias.detach(), [offset for _, offset in slopes], atol=1e-4)


@pytest.mark.method("S-16a")
def test_least_squares_of_equal_layers_is_that_layer_and_a_large_ridge_is_the_mean(deep, batch):
    mean = layers.start_layer(deep, [0, 1, 2, 3], "mean")
    stiff = layers.least_squares_layer(deep, [0, 1, 2, 3], mean, [batch], ridge=1e9)
    torch.testing.assert_close(stiff.output.dense.weight, mean.output.dense.weight, atol=1e-5, rtol=0)
    halves = shared("all", 2, "least_squares", [batch])(copy.deepcopy(deep))
    upper = layers.start_layer(
        deep, [2, 3], "least_squares", [batch]
    )  # fitted in the model as it was, not with its lower half shared
    torch.testing.assert_close(halves.bert.encoder.layer[3].state_dict(), upper.state_dict())
    layers.share_layers(deep, "all", start=1)
    same = layers.start_layer(deep, [0, 1, 2, 3], "least_squares", [batch])
    torch.testing.assert_close(same.state_dict(), deep.bert.encoder.layer[0].state_dict(), atol=1e-3, rtol=1e-3)


@pytest.mark.method("S-16a")
def test_layer_errors_are_those_of_the_sentences_one_by_one(deep, batch):
    torch.testing.assert_close(layers.layer_errors(deep, deep, batch), torch.zeros(4))
    model, squares, moved = shared("all", start=0)(copy.deepcopy(deep)), torch.zeros(4), torch.zeros(4)
    for row, length in enumerate((9, 7, 5, 9)):
        states = deep(**inputs(batch, slice(row, row + 1), length), output_hidden_states=True).hidden_states
        for number, (x, y) in enumerate(itertools.pairwise(states)):
            squares[number] += (deep.bert.encoder.layer[0](x, None) - y).square().sum().detach()
            moved[number] += (x - y).square().sum().detach()
    found = layers.layer_errors(model, deep, batch)
    torch.testing.assert_close(found, squares / moved, atol=1e-5, rtol=1e-4)
    assert found[0].item() == pytest.approx(0, abs=1e-9) and found[1:].min() > 0.1


@pytest.mark.method("S-16a", "S-16b", "S-16c")
@pytest.mark.parametrize("what", layers.PIECES)
def test_the_distilled_start_comes_nearer_without_labels(what, deep, batch):
    model = shared(what)(copy.deepcopy(deep))
    unlabelled = inputs(batch)
    before, head = layers.layer_errors(model, deep, unlabelled).mean().item(), model.classifier.weight.clone()
    errors = layers.reproduce_layers(model, deep, [unlabelled], 20, 3e-3)
    after = layers.layer_errors(model, deep, unlabelled).mean().item()
    assert errors[0] == pytest.approx(before, rel=0.02) and after < 0.8 * before
    assert torch.equal(model.classifier.weight, head) and layers.shared_share(model) > 0  # still shared


@pytest.mark.method("S-16a")
def test_start_losses_name_every_start_and_groups_of_one_layer_change_nothing(deep, batch):
    found = layers.start_losses(deep, [batch], [batch], steps=2)
    names = ["not shared", "mean", "least squares", "distilled", *(f"layer {k}" for k in range(4))]
    assert sorted(found) == sorted(names) and len(set(found.values())) == len(names)
    assert found["layer 2"] == pytest.approx(layers.mean_loss(shared("all", start=2)(copy.deepcopy(deep)), [batch]))
    alone = layers.start_losses(deep, [batch], [batch], groups=4, steps=2)
    assert sorted(alone) == sorted(["not shared", "mean", "least squares", "distilled", "layer 0"])
    assert list(alone.values()) == pytest.approx([found["not shared"]] * 5, abs=0.03)  # Adam walks on noise
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    assert layers.mean_loss(deep, halves) == pytest.approx(found["not shared"], rel=0.01)


@pytest.mark.method("S-16a")
def test_agreement_of_depths_by_hand():
    assert layers.agreement(torch.tensor([[1.0, 0.0], [3.0, 0.0]])) == pytest.approx(1)
    assert layers.agreement(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])) == pytest.approx(2 * 0.5**0.5 / 3)


# --- S-17 halting ---------------------------------------------------------------------------------------------------


def halt_one(p: list[float], x: list[float], threshold: float, blend: bool) -> tuple[float, int, float]:
    """Graves 2016 for one token, in plain numbers: output, N and R."""
    spent, out = 0.0, 0.0
    for n, (probability, state) in enumerate(zip(p, x, strict=True), 1):
        halts = spent + probability > threshold or n == len(p)
        weight = 1 - spent if halts else probability
        out = weight * state + ((1 - weight) * out if blend else out)
        if halts:
            return out, n, weight
        spent += probability
    raise AssertionError


@pytest.mark.method("S-17")
@pytest.mark.parametrize("blend", [False, True])
def test_every_token_halts_as_if_it_were_alone(blend):
    p, x = 0.6 * torch.rand(5, 3, 7, dtype=torch.float64), torch.randn(5, 3, 7, 1, dtype=torch.float64)
    real = torch.ones(3, 7, dtype=torch.bool)
    out, halting = adaptive_computation(lambda n, states: (p[n], x[n]), x[0], real, 5, 0.9, blend)
    for place in np.ndindex(3, 7):
        expected, steps, left = halt_one(p[(slice(None), *place)].tolist(), x[(slice(None), *place, 0)].tolist(), 0.9, blend)
        assert out[(*place, 0)].item() == pytest.approx(expected)
        assert halting.updates[place] == steps and halting.remainder[place].item() == pytest.approx(left)
    assert set(halting.updates.unique().tolist()) >= {2, 3, 4} and not halting.running.any()
    torch.testing.assert_close(halting.spent, torch.ones_like(halting.spent))


@pytest.mark.method("S-17")
@pytest.mark.parametrize("copied", [False, True])
def test_others_see_what_a_token_halted_with_only_where_it_is_copied(copied):
    """Two tokens; the second halts after one step and is looked at by the first, whose states are twice what it sees there."""
    p = torch.tensor([[0.2, 0.995], [0.3, 0.5], [0.6, 0.5]]).unsqueeze(1).requires_grad_()

    def step(number: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return p[number], torch.stack([2 * states[:, 1], 3 * states[:, 1]], 1)

    out, halting = adaptive_computation(step, torch.ones(1, 2, 1), torch.ones(1, 2, dtype=torch.bool), 3, copy_halted=copied)
    seen = [1, 3, 3] if copied else [1, 3, 9]  # the second token before each step: halted with 3, or carried on
    assert halting.updates.tolist() == [[3, 1]] and out[0, 1].item() == pytest.approx(3)
    assert out[0, 0].item() == pytest.approx(0.2 * 2 * seen[0] + 0.3 * 2 * seen[1] + 0.5 * 2 * seen[2])


@pytest.mark.method("S-17")
@pytest.mark.parametrize("copied", [False, True])
def test_the_halting_of_other_tokens_reaches_a_classifier_only_where_it_is_copied(copied, deep, batch):
    layers.universal(deep, halting_bias=-0.5, copy_halted=copied)
    encoder = deep.bert.encoder
    with torch.no_grad():  # words halt at once or after a step, [CLS] goes on: the unit reads where a step's embedding has put it
        encoder.halt.weight[0, 0], encoder.step_embeddings[1, 0] = 1.0, 1.5
    seen = []
    encoder.halt.register_forward_hook(lambda m, args, out: seen.append(out))
    pulls = torch.autograd.grad(training.cross_entropy(deep, batch), seen, allow_unused=True)
    pulls = torch.stack([pull for pull in pulls if pull is not None]).squeeze(-1)  # (steps, batch, length)
    assert pulls[..., 0].abs().max() > 1e-6 and (pulls[..., 1:].abs().max() > 1e-6) == copied


@pytest.mark.method("S-17")
def test_halting_by_hand():
    halting = Halting.begin(torch.tensor([[True, True, False]]), torch.float32)
    p = torch.tensor([[0.4, 0.995, 0.0]])
    weights = torch.cat([halting.step(p, 0.99) for _ in range(3)])
    torch.testing.assert_close(weights, torch.tensor([[0.4, 1.0, 0.0], [0.4, 0.0, 0.0], [0.2, 0.0, 0.0]]))
    assert halting.updates.tolist() == [[3, 1, 0]] and not halting.running.any()
    assert ponder_cost(halting).item() == pytest.approx((3 + 0.2 + 1 + 1) / 2)


@pytest.mark.method("S-17")
def test_padding_keeps_no_batch_running_and_becomes_zero():
    real, calls = torch.tensor([[True, True, False]]), []

    def step(number: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(number)
        return torch.tensor([[0.6, 0.7, 0.0]]), states + 1

    out, halting = adaptive_computation(step, torch.zeros(1, 3, 2), real, 9)
    assert calls == [0, 1] and halting.updates.tolist() == [[2, 2, 0]]
    torch.testing.assert_close(out[0, :, 0], torch.tensor([1.4, 1.3, 0.0]))  # 0.6 * 1 + 0.4 * 2, 0.7 * 1 + 0.3 * 2


@pytest.mark.method("S-17")
def test_the_ponder_cost_pulls_at_every_probability_before_the_last():
    p = torch.full((4, 1, 1), 0.3, requires_grad=True)
    _, halting = adaptive_computation(
        lambda n, states: (p[n], states), torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool), 4, 0.8
    )
    cost = ponder_cost(halting)
    (gradient,) = torch.autograd.grad(cost, p)
    assert cost.item() == pytest.approx(3 + 0.4) and gradient.flatten().tolist() == [-1, -1, 0, 0]


@pytest.mark.method("S-17")
def test_without_halting_it_is_the_shared_model(deep, batch):
    expected = logits(shared("all")(copy.deepcopy(deep)), batch)
    layers.universal(deep, halting_bias=-30.0)
    torch.testing.assert_close(logits(deep, batch), expected, atol=1e-5, rtol=1e-5)
    assert deep.config.num_hidden_layers == 1 and len(deep.bert.encoder.layer) == 1
    assert (layers.halting_map(deep, batch) == 4 * batch["attention_mask"]).all()


@pytest.mark.method("S-17")
@pytest.mark.parametrize("blend", [False, True])
def test_the_authors_start_is_two_steps_with_their_weights(blend, deep, batch):
    layers.universal(deep, start=1, max_steps=6, blend=blend)
    encoder, one = deep.bert.encoder, inputs(batch, slice(0, 1))
    nn.init.normal_(encoder.step_embeddings, std=0.5)
    x = deep.bert.embeddings(one["input_ids"])
    first = encoder.layer[0](x + encoder.step_embeddings[0], None)
    second = encoder.layer[0](first + encoder.step_embeddings[1], None)
    p = torch.tensor(1.0).sigmoid()
    expected = (1 - p) * second + (p if blend else 1) * p * first
    torch.testing.assert_close(deep.bert(**one).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    numbers = layers.halting_numbers(deep, [batch])
    assert numbers == {"steps": 2, "spread": 0, "longest": 2}


@pytest.mark.method("S-17")
def test_the_halting_unit_reads_the_states_of_its_step(deep, batch):
    universal(halting_bias=0.5)(deep)
    encoder = deep.bert.encoder
    halted = layers.halting_map(deep, batch)
    assert ((halted == 0) == (batch["attention_mask"] == 0)).all() and halted.unique().numel() > 2
    x = deep.bert.embeddings(batch["input_ids"][:1])
    p = [torch.sigmoid(encoder.halt(x + encoder.step_embeddings[0])).squeeze(-1)]
    states = encoder.layer[0](x + encoder.step_embeddings[0], None)
    p.append(torch.sigmoid(encoder.halt(states + encoder.step_embeddings[1])).squeeze(-1))
    assert ((halted[:1] == 1) == (p[0] > 0.99)).all() and ((halted[:1] <= 2) == (p[0] + p[1] > 0.99)).all()
    numbers = layers.halting_numbers(deep, [batch])
    assert numbers["steps"] == pytest.approx(halted[halted > 0].double().mean().item())
    assert numbers["longest"] == halted.amax(1).double().mean().item() >= numbers["steps"]


@pytest.mark.method("S-17")
def test_the_loss_adds_the_weighted_ponder_cost(deep, batch):
    layers.universal(deep, halting_bias=0.0)  # p = 1/2: two steps, remainder 1/2
    plain = training.cross_entropy(deep, batch).item()
    assert layers.ponder_loss(0.2)(deep, batch).item() == pytest.approx(plain + 0.2 * 2.5)
    with pytest.raises(ValueError, match="applies every layer once"):
        layers.ponder_loss()(make(), batch)
    for options, message in (({"max_steps": 0}, "max_steps"), ({"threshold": 1.0}, "threshold")):
        with pytest.raises(ValueError, match=message):
            layers.universal(make(), **options)


@pytest.mark.method("S-17")
def test_the_halting_unit_may_learn_at_its_own_rate(deep, batch):
    layers.universal(deep)
    groups = layers.halting_groups(deep, 0.5)
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in deep.parameters())
    before = {name: p.detach().clone() for name, p in deep.bert.encoder.named_parameters()}
    training.train(deep, task_of(batch), profiles.get("smoke"), steps=1, learning_rate=1e-5, parameters=groups)
    moved = {name: (p - before[name]).abs().max().item() for name, p in deep.bert.encoder.named_parameters()}
    own = {name: moved.pop(name) for name in ("halt.weight", "step_embeddings")}
    assert min(own.values()) > 0.1 and max(moved.pop("halt.bias"), *moved.values()) < 1 and max(moved.values()) < 1e-3


@pytest.mark.method("S-17", "S-18")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "linear"])
def test_real_tokens_are_read_off_the_mask_that_bert_hands_on(attention, deep, batch):
    seen = []
    deep.bert.encoder.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args[0], kwargs["attention_mask"])), with_kwargs=True
    )
    with bert.attention(deep, attention):
        logits(deep, batch)
        deep(input_ids=batch["input_ids"])
    assert torch.equal(real_tokens(*seen[0]), batch["attention_mask"].bool())
    assert real_tokens(*seen[1]).all()


# --- S-18 solver ----------------------------------------------------------------------------------------------------


@pytest.mark.method("S-18")
def test_anderson_ends_on_linear_maps_in_one_step_more_than_their_dimension():
    """As GMRES does (Walker and Ni 2011), even where the plain iteration runs away."""
    A, b = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    A = (
        A
        / torch.linalg.eigvals(A).abs().amax(1)[:, None, None]
        * torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)[:, None, None]
    )

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bij,bj->bi", A, x) + b

    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - A, b)
    found = find_fixed_point(f, torch.zeros_like(b), Anderson(max_iterations=7, tolerance=1e-9, window=5, ridge=1e-16))
    torch.testing.assert_close(found.fixed_point, exact, atol=1e-6, rtol=1e-6)
    assert found.iterations.max() <= 6  # the start, four directions, and the solution itself
    plain = find_fixed_point(f, torch.zeros_like(b), Anderson(max_iterations=7, tolerance=1e-9, window=1))
    assert plain.residuals[-1, 0] < 0.2 and plain.residuals[-1, 2] > 0.5


@pytest.mark.method("S-18")
@pytest.mark.parametrize("mixing", [1.0, 0.6])
def test_anderson_takes_the_steps_of_a_constrained_least_squares(mixing):
    weight, b = torch.randn(6, 6, dtype=torch.float64) / 3, torch.randn(1, 6, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ weight.T + b)

    x, xs, gaps, expected = np.zeros(6), [], [], []
    for _ in range(9):
        image = f(torch.from_numpy(x)[None])[0].numpy()
        xs, gaps = [*xs, x][-3:], [*gaps, image - x][-3:]
        expected.append(np.linalg.norm(image - x) / np.linalg.norm(image))
        G, X = np.array(gaps), np.array(xs)
        free = np.linalg.lstsq((G[:-1] - G[-1]).T, -G[-1], rcond=None)[0]  # weights of all but the last, which takes the rest
        a = np.append(free, 1 - free.sum())
        x = a @ (X + mixing * G)
    found = find_fixed_point(f, torch.zeros(1, 6, dtype=torch.float64), Anderson(9, 0.0, 3, mixing, 1e-15))
    np.testing.assert_allclose(found.residuals[:, 0], expected, rtol=1e-4)


@pytest.mark.method("S-18")
def test_a_window_of_one_is_the_plain_iteration_damped_by_mixing():
    x, seen = torch.tensor([[1.0]]), []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.item())
        return torch.cos(x)

    found = find_fixed_point(f, x, Anderson(5, 0.0, 1, 0.25))
    for value in seen:
        assert value == pytest.approx(x.item(), abs=1e-6)
        x = 0.75 * x + 0.25 * torch.cos(x)
    assert found.residuals.shape == (5, 1) and found.iterations.tolist() == [5]


@pytest.mark.method("S-18")
def test_examples_stop_alone_and_the_best_state_is_kept():
    rate = torch.tensor([[0.1], [0.9], [2.0]])
    found = find_fixed_point(lambda x: rate * x + 1, torch.zeros(3, 1), Anderson(10, 0.02, 1))
    alone = find_fixed_point(lambda x: rate[:1] * x + 1, torch.zeros(1, 1), Anderson(10, 0.02, 1))
    assert torch.equal(found.fixed_point[:1], alone.fixed_point) and found.iterations.tolist() == [3, 10, 10]
    assert found.residuals[0].tolist() == [1, 1, 1] and (found.residuals[2:, 0] == found.residuals[2, 0]).all()
    torch.testing.assert_close(found.image, rate * found.fixed_point + 1)
    worse = find_fixed_point(lambda x: x + torch.where(x < 2, 1.0, 5 * x), torch.zeros(1, 1), Anderson(6, 0.0, 1))
    assert worse.fixed_point.item() == 1 and worse.iterations.item() == 2  # 1/1, 1/2, then 5/6 for ever
    for options in ({"max_iterations": 0}, {"window": 0}, {"mixing": 0.0}, {"mixing": 1.5}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="must"):
            layers.equilibrium(make(), **options)


# --- S-18 encoder ---------------------------------------------------------------------------------------------------

TIGHT = {"tolerance": 1e-12, "max_iterations": 200}


@pytest.mark.method("S-18")
def test_implicit_gradients_are_those_of_unrolled_iterations(calm, batch):
    equilibrium(start=1, **TIGHT)(calm.double())
    encoder, real = calm.bert.encoder, batch["attention_mask"].bool()[..., None]
    with layers.watch_passes(calm) as passes:
        training.cross_entropy(calm, batch).backward()
    implicit = {name: p.grad.clone() for name, p in calm.named_parameters()}
    calm.zero_grad()
    with bert.attention(calm, "eager"):
        x = calm.bert.embeddings(batch["input_ids"])
        mask = torch.where(batch["attention_mask"].bool(), 0.0, -1e30)[:, None, None].double()
        states = torch.zeros_like(x)
        for _ in range(150):
            states = torch.where(real, encoder.layer[0](states + encoder.inject(x), mask), 0.0)
        nn.functional.cross_entropy(calm.classifier(calm.bert.pooler(states)).float(), batch["labels"]).backward()
    for name, parameter in calm.named_parameters():
        torch.testing.assert_close(implicit[name], parameter.grad, atol=1e-7, rtol=1e-4, msg=name)
    assert passes[0].forward.residuals.amin(0).max() < 1e-11 and passes[0].backward.residuals.amin(0).max() < 1e-11
    torch.testing.assert_close(passes[0].forward.fixed_point, states.detach())


@pytest.mark.method("S-18")
def test_unrolled_passes_end_where_the_plain_iteration_does(calm, batch):
    """And a contracting layer's implicit gradient is the limit of theirs."""
    equilibrium(start=1, unrolled=3)(calm.double())
    encoder, real = calm.bert.encoder, batch["attention_mask"].bool()[..., None]
    x = calm.bert.embeddings(batch["input_ids"])
    mask = torch.where(batch["attention_mask"].bool(), 0.0, -1e30)[:, None, None].double()
    states = torch.zeros_like(x)
    for _ in range(3):
        states = torch.where(real, encoder.layer[0](states + encoder.inject(x), mask), 0.0)
    torch.testing.assert_close(calm.bert(**inputs(batch)).last_hidden_state, states)
    found = {}
    for encoder.unrolled in (3, 150, 0):
        encoder.solver = Anderson(**TIGHT)
        training.cross_entropy(calm, batch).backward()
        found[encoder.unrolled] = encoder.inject.weight.grad.clone()
        calm.zero_grad()
    torch.testing.assert_close(found[0], found[150], atol=1e-7, rtol=1e-4)
    assert (found[0] - found[3]).norm() > 1e-3 * found[0].norm()
    with pytest.raises(ValueError, match="unrolled"):
        layers.equilibrium(make(), unrolled=-1)


@pytest.mark.method("S-17", "S-18")
@pytest.mark.parametrize("name", ["universal", "equilibrium"])
def test_gradients_in_bfloat16_point_where_they_should(name, calm, batch):
    """The iterations without gradients must leave no rounded weights behind for the one that has them."""
    model, found = MADE[name](calm), []
    for dtype in (torch.bfloat16, torch.float32):
        with training.autocast(torch.device("cpu"), dtype):
            loss = training.cross_entropy(model, batch)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.bert.encoder.parameters()]))
        model.zero_grad()
    assert nn.functional.cosine_similarity(*found, dim=0) > 0.98


@pytest.mark.method("S-18")
def test_one_application_is_kept_however_many_iterations_there_are(deep, batch):
    def kept(change, **options) -> int:
        model = change(copy.deepcopy(deep), **options) or copy.deepcopy(deep)
        return layers.activation_bytes(model, training.cross_entropy, batch)

    few, many = (kept(equilibrium(tolerance=0.0, max_iterations=n)) for n in (2, 20))
    assert few == many
    depth = [kept(universal(halting_bias=-30.0, max_steps=n)) for n in (2, 4, 6)]
    assert depth[2] - depth[1] == pytest.approx(depth[1] - depth[0], rel=0.05) and depth[2] > few


@pytest.mark.method("S-18")
def test_activation_bytes_by_hand():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))  # backwards needs both inputs; the second weight is the model's own
    found = layers.activation_bytes(model, lambda model, batch: model(batch["x"]).sum(), {"x": torch.randn(4, 3)})
    assert found == 4 * (4 * 3 + 4 * 5)


def one_sentence(model: nn.Module, batch: dict):
    """The first sentence's pass at its fixed point, the layer there as a function, and that layer's Jacobian as a matrix."""
    with layers.watch_passes(model) as passes, bert.attention(model, "eager"):
        model(**inputs(batch, slice(0, 1), 4))
    injected = model.bert.encoder.inject(model.bert.embeddings(batch["input_ids"][:1, :4])).detach()
    f = lambda states: model.bert.encoder.layer[0](states + injected, None)  # noqa: E731
    return passes[0], f, jacobian(f, passes[0].forward.fixed_point).reshape(128, 128)


@pytest.mark.method("S-18")
def test_the_pass_ends_at_a_fixed_point_of_its_layer_and_knows_its_jacobian(calm, batch):
    equilibrium(**TIGHT)(calm.double())
    one, f, J = one_sentence(calm, batch)
    torch.testing.assert_close(f(one.forward.fixed_point), one.forward.fixed_point)
    v = torch.randn_like(one.forward.fixed_point)
    torch.testing.assert_close(vector_jacobian(one.f, one.forward.fixed_point)(v).flatten(), v.flatten() @ J)
    found = torch.stack([jacobian_penalty(one).detach() for _ in range(200)]).mean().item()
    assert found == pytest.approx((J.square().sum() / 128).item(), rel=0.05)
    radius = torch.linalg.eigvals(J).abs().max().item()
    short = {name: batch[name][:1, :4] for name in INPUTS}
    assert layers.spectral_radius(calm, short, 120).item() == pytest.approx(radius, rel=0.05)


@pytest.mark.method("S-18")
def test_the_jacobian_is_penalised_and_shrinks(deep, batch):
    equilibrium()(deep)
    torch.manual_seed(0)
    plain = layers.equilibrium_loss(0.0)(deep, batch).item()
    with layers.watch_passes(deep) as passes, bert.attention(deep, "eager"):
        training.cross_entropy(deep, batch)
        torch.manual_seed(1)
        penalty = jacobian_penalty(passes[0]).item()
    torch.manual_seed(1)
    assert layers.equilibrium_loss(0.3)(deep, batch).item() == pytest.approx(plain + 0.3 * penalty, rel=1e-4)
    optimizer = torch.optim.Adam(deep.bert.encoder.parameters(), lr=3e-3)
    for _ in range(10):
        layers.equilibrium_loss(10.0)(deep, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with layers.watch_passes(deep) as passes, bert.attention(deep, "eager"):
        training.cross_entropy(deep, batch)
        assert jacobian_penalty(passes[0]).item() < 0.5 * penalty


@pytest.mark.method("S-18")
def test_the_convergence_picture_and_the_numbers(calm, batch):
    equilibrium()(calm)
    residuals = layers.convergence(calm, batch, max_iterations=12, window=5)
    plain = layers.convergence(calm, batch, max_iterations=12, window=1)
    assert residuals.shape == plain.shape == (12, 4) and torch.equal(residuals[0], torch.ones(4))
    assert (residuals[6] < plain[6]).all() and calm.bert.encoder.solver == Anderson()
    numbers = layers.equilibrium_numbers(calm, [batch])
    within = 1 + (residuals <= 0.01).double().argmax(0)
    assert numbers["within"] == 1 and numbers["iterations"] == within.double().mean() and numbers["residual"] <= 0.01
    assert calm.bert.encoder.passes is None
    with layers.with_solver(calm, tolerance=0.0, max_iterations=2):
        assert layers.equilibrium_numbers(calm, [batch])["within"] == 0


@pytest.mark.method("S-18")
def test_the_layer_of_an_equilibrium_has_no_dropout(batch):
    model = make(0.05, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    equilibrium(**TIGHT)(model)
    states = model.bert.embeddings(batch["input_ids"])
    found = [model.bert.encoder.train(training)(states).last_hidden_state for training in (True, False)]
    torch.testing.assert_close(*found)
    assert model.bert.encoder.layer[0].attention.self.dropout.p == 0
    model = make(0.05, hidden_dropout_prob=0.5)
    layers.universal(model)
    assert isinstance(model.bert.encoder, AdaptiveEncoder) and model.bert.encoder.layer[0].output.dropout.p == 0.5
    assert isinstance(partial(EquilibriumEncoder.around, model.bert.encoder.layer[0], model.config)(), EquilibriumEncoder)
