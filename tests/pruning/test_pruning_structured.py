"""Heads and layers: every method against an oracle, on a tiny BERT."""

import copy
import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from scipy import stats
from small_pruning import HEADS, HIDDEN, LAYERS, NEURONS, PAD, SEP, close, make_batch, one_sentence, tiny
from torch import nn
from transformers import BertForSequenceClassification
from transformers.pytorch_utils import prune_linear_layer

from utils import bert, structure
from utils.pruning import heads, layers
from utils.pruning.masks import hold_masks

SIZE = HIDDEN // HEADS


def logits(model: nn.Module, batch: dict, implementation: str = "sdpa") -> torch.Tensor:
    with torch.no_grad(), bert.attention(model, implementation):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def closeness(model: nn.Module) -> float:
    """A deterministic stand-in for a validation metric: how near the logits stay to fixed targets, in (0, 1]."""
    targets = torch.tensor([[1.0, -1.0], [0.5, 0.2], [-1.0, 1.0]])
    return float(torch.exp(-(logits(model, make_batch()) - targets).square().mean()))


def random_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


# --- structure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_removed_heads_equal_closed_gates(implementation):
    model, batch = tiny(), make_batch()
    gates = random_mask(LAYERS, HEADS)
    gates[1], gates[2] = False, True  # one layer loses every head, one keeps all
    with heads.head_gates(model, gates.float()):
        gated = logits(model, batch, implementation)
    heads.cut_closed(model, gates)
    close(logits(model, batch, implementation), gated)
    attention = model.bert.encoder.layer[0].attention
    kept = int(gates[0].sum())
    assert (attention.self.num_attention_heads, attention.self.all_head_size) == (kept, kept * SIZE)
    assert attention.output.dense.weight.shape == (HIDDEN, kept * SIZE)
    assert attention.self.attention_head_size == SIZE


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_removed_neurons_equal_zeroed_weights(implementation):
    model, batch = tiny(), make_batch()
    keep = {0: random_mask(NEURONS), 2: torch.tensor([5, 1, 1, 63]), 3: torch.zeros(NEURONS, dtype=torch.bool)}
    masked = copy.deepcopy(model)
    for number, kept in keep.items():
        index = kept.nonzero().flatten() if kept.dtype == torch.bool else kept
        gone = [i for i in range(NEURONS) if i not in index.tolist()]
        with torch.no_grad():
            masked.bert.encoder.layer[number].output.dense.weight[:, gone] = 0
    structure.remove_neurons(model, keep)
    close(logits(model, batch, implementation), logits(masked, batch, implementation))
    assert [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer] == [int(keep[0].sum()), NEURONS, 3, 0]


def test_take_equals_the_library():
    linear, index = nn.Linear(6, 5), torch.tensor([0, 2, 3])
    for dim in (0, 1):
        ours = copy.deepcopy(linear)
        structure.take(ours, index, dim)
        library = prune_linear_layer(linear, index, dim)
        close(ours.weight, library.weight, 0)
        close(ours.bias, library.bias, 0)
        assert (ours.in_features, ours.out_features) == (library.in_features, library.out_features)


def test_remove_ffn_leaves_the_bias_or_nothing():
    batch = make_batch()
    for keep_bias in (True, False):
        model = tiny()
        expected = copy.deepcopy(model)
        dense = expected.bert.encoder.layer[1].output.dense
        with torch.no_grad():
            dense.weight.zero_()
            if not keep_bias:
                dense.bias.zero_()
        structure.remove_ffn(model, 1, keep_bias)
        close(logits(model, batch), logits(expected, batch))


def test_removed_layers_equal_skipped_layers():
    model, batch = tiny(), make_batch()
    with layers.skip_layers(model, [3, 0]):
        skipped = logits(model, batch)
    whole = logits(model, batch)
    assert not torch.allclose(whole, skipped)
    structure.remove_layers(model, [3, 0])
    close(logits(model, batch), skipped, 0)
    assert model.config.num_hidden_layers == 2
    assert [layer.attention.self.layer_idx for layer in model.bert.encoder.layer] == [0, 1]


def structurally_pruned() -> BertForSequenceClassification:
    model = tiny()
    structure.remove_layers(model, [0, 2, 3])
    structure.remove_heads(model, {0: torch.tensor([1, 3]), 1: torch.zeros(HEADS, dtype=torch.bool)})
    structure.remove_neurons(model, {0: torch.arange(10, 30), 2: random_mask(NEURONS)})
    structure.remove_ffn(model, 1)
    return model


@pytest.mark.parametrize("read_off_shapes", [False, True])
@pytest.mark.parametrize("built_with_layers", [3, 4])
def test_a_described_structure_is_built_again(built_with_layers, read_off_shapes):
    model, batch = structurally_pruned(), make_batch()
    state = model.state_dict()
    rebuilt = tiny(num_hidden_layers=built_with_layers)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    described = (
        structure.describe_shapes(shapes, HIDDEN // HEADS, HEADS, NEURONS) if read_off_shapes else structure.describe(model)
    )
    structure.cut_to(rebuilt, described)
    assert structure.describe(rebuilt) == structure.describe(model)
    rebuilt.load_state_dict(state)
    for implementation in ("eager", "sdpa"):
        close(logits(rebuilt, batch, implementation), logits(model, batch, implementation), 0)
    assert len(save(state)) < 0.6 * len(save(tiny().state_dict()))


def test_structures_that_are_larger_or_make_no_sense_are_refused():
    described = structure.describe(tiny())
    with pytest.raises(ValueError, match="keep one layer or more"):
        structure.cut_to(tiny(num_hidden_layers=2), described)
    with pytest.raises(ValueError, match="neuron indices"):
        structure.cut_to(tiny(intermediate_size=16), described)
    with pytest.raises(ValueError, match="no multiple"):
        structure.describe_shapes(
            {"bert.encoder.layer.0.attention.self.query.weight": (9, HIDDEN)}, HIDDEN // HEADS, HEADS, NEURONS
        )


def test_emptied_model_still_trains_attends_and_copies():
    model, batch = structurally_pruned(), make_batch()
    model.train()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with bert.attention(model, "eager"), torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs, output_attentions=True)
    assert [a.shape[1] for a in out.attentions] == [2, 0, HEADS]
    out.logits.float().sum().backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    close(logits(bert.fresh_copy(model), batch), logits(model.eval(), batch), 0)
    assert len(bert.matrices(model)) == 3 * 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: structure.remove_layers(m, []), "keep one layer or more"),
        (lambda m: structure.remove_layers(m, [0, 4]), r"0\.\.3"),
        (lambda m: structure.remove_neurons(m, {4: torch.arange(3)}), r"0\.\.3"),
        (lambda m: structure.remove_neurons(m, {0: torch.tensor([64])}), r"0\.\.63"),
        (lambda m: structure.remove_neurons(m, {0: torch.tensor([-1, 2])}), r"0\.\.63"),
        (lambda m: structure.remove_heads(m, {0: torch.ones(3, dtype=torch.bool)}), r"\(4,\)"),
        (lambda m: structure.remove_heads(m, {-1: torch.ones(4, dtype=torch.bool)}), r"0\.\.3"),
        (lambda m: structure.remove_ffn(m, 9), r"0\.\.3"),
        (lambda m: heads.cut_closed(m, torch.ones(2, 2)), "shapes"),
    ],
)
def test_surgery_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


def test_surgery_refuses_held_masks():
    model = tiny()
    hold_masks(model, {"bert.encoder.layer.0.intermediate.dense.weight": torch.ones(NEURONS, HIDDEN, dtype=torch.bool)})
    with pytest.raises(ValueError, match="burn the masks in"):
        structure.remove_neurons(model, {0: torch.arange(3)})


# --- heads -----------------------------------------------------------------------------------------------------------


def zero_head(model: nn.Module, layer: int, head: int) -> nn.Module:
    """An independent way to silence a head: its columns of the output projection become zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.bert.encoder.layer[layer].attention.output.dense.weight[:, head * SIZE : (head + 1) * SIZE] = 0
    return model


def sentence_losses(model: nn.Module, batch: dict) -> torch.Tensor:
    return nn.functional.cross_entropy(logits(model, batch), batch["labels"], reduction="none")


@pytest.mark.method("P-18")
def test_single_head_ablation_equals_zeroed_columns():
    model, batches = tiny(), [make_batch(), make_batch(size=2, length=5, seed=1)]
    found = heads.single_head_ablation(model, batches)
    assert found.shape == (LAYERS, HEADS, 5)
    whole = torch.cat([sentence_losses(model, batch) for batch in batches])
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        without = zero_head(model, layer, head)
        close(found[layer, head], torch.cat([sentence_losses(without, batch) for batch in batches]) - whole)
    assert found.abs().mean() > 1e-3
    assert closeness(model) == closeness(tiny())  # no gate and no shortcut is left behind
    with pytest.raises(ValueError, match="no calibration batches"):
        heads.single_head_ablation(model, [])


@pytest.mark.method("P-18")
def test_only_one_head_equals_zeroed_columns():
    model, batch = tiny(), make_batch()
    found = heads.only_one_head(model, [batch])
    for layer, head in ((0, 0), (2, 3)):
        expected = model
        for other in set(range(HEADS)) - {head}:
            expected = zero_head(expected, layer, other)
        close(found[layer, head], sentence_losses(expected, batch) - sentence_losses(model, batch))


@pytest.mark.method("P-18")
def test_a_resumed_encoder_runs_only_what_is_above():
    model, batch = tiny(), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        expected, ran = logits(model, batch), []
        handle = model.bert.encoder.layer[0].register_forward_hook(lambda *_: ran.append(0))
        for number in range(LAYERS):
            with heads.resumed(model, number, states[number]):
                close(logits(model, batch), expected)
        handle.remove()
    assert len(ran) == 1 and len(model.bert.encoder.layer) == LAYERS
    with pytest.raises(ZeroDivisionError), heads.resumed(model, 2, states[2]):
        _ = 1 / 0
    assert len(model.bert.encoder.layer) == LAYERS and not model.bert.encoder._forward_pre_hooks


@pytest.mark.method("P-18")
def test_bootstrap_p_agrees_with_student_and_sees_the_pairing():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 400, generator=generator)
    differences = noise - noise.mean(1, keepdim=True) + torch.tensor([0.0, 0.05, 0.1, 0.15, -0.1, 0.3])[:, None]
    found = heads.bootstrap_p(differences, resamples=20_000)
    student = stats.ttest_1samp(differences.numpy(), 0, axis=1).pvalue
    np.testing.assert_allclose(found, student, atol=0.03)
    assert found[0] > 0.9 and found[5] == pytest.approx(2 / 20_001)
    assert torch.equal(heads.bootstrap_p(-differences), heads.bootstrap_p(differences))
    assert heads.bootstrap_p(torch.full((2, 9), torch.nan)).isnan().all()


def test_head_maps_cope_with_missing_heads():
    model = structurally_pruned()
    found = heads.single_head_ablation(model, [make_batch()])
    assert found.isnan().any(-1).sum(1).tolist() == [2, HEADS, 0]
    assert torch.equal(found.isnan().any(-1), found.isnan().all(-1))
    importance = heads.head_importance(model, [make_batch()])
    assert (importance == 0).sum(1).tolist() == [2, HEADS, 0]
    relevance = heads.head_relevance(model, [make_batch()])
    assert (relevance == 0).sum(1).tolist() == [2, HEADS, 0]


def numerical_importance(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """E_x |dL/d gate| by central differences, one sentence at a time, in double precision."""
    model = copy.deepcopy(model).double()
    of_heads, of_ffns, step = torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS), 1e-4
    for row in range(len(batch["labels"])):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}

        def loss(xi: torch.Tensor, nu: torch.Tensor, one: dict = one) -> float:
            with heads.head_gates(model, xi), heads.ffn_gates(model, nu):
                return float(nn.functional.cross_entropy(logits(model, one), one["labels"]))

        xi, nu = torch.ones(LAYERS, HEADS, dtype=torch.float64), torch.ones(LAYERS, dtype=torch.float64)
        for layer in range(LAYERS):
            unit = torch.zeros_like(nu)
            unit[layer] = step
            of_ffns[layer] += abs(loss(xi, nu + unit) - loss(xi, nu - unit)) / (2 * step)
            for head in range(HEADS):
                unit = torch.zeros_like(xi)
                unit[layer, head] = step
                of_heads[layer, head] += abs(loss(xi + unit, nu) - loss(xi - unit, nu)) / (2 * step)
    return of_heads / len(batch["labels"]), of_ffns / len(batch["labels"])


@pytest.mark.method("P-19", "P-24")
def test_importance_is_the_mean_absolute_gradient_per_sentence():
    model, batch = tiny(), make_batch()
    of_heads, of_ffns = heads.gate_importance(model, [batch])
    expected_heads, expected_ffns = numerical_importance(model, batch)
    close(of_heads, expected_heads, 1e-4)
    close(of_ffns, expected_ffns, 1e-4)
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 1), slice(1, 3))]
    close(heads.gate_importance(model, halves)[0], of_heads)  # the batches do not matter
    close(heads.head_importance(model, [batch]), expected_heads / expected_heads.norm(dim=1, keepdim=True), 1e-3)


@pytest.mark.method("P-19")
def test_importance_equals_output_times_gradient():
    """The paper's second form: |z_h . dL/dz_h| of one sentence."""
    model, batch = tiny(), make_batch(size=1)
    seen = []
    projection = model.bert.encoder.layer[1].attention.output.dense
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = model(batch["input_ids"], batch["attention_mask"])
    handle.remove()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(out.logits, batch["labels"]), seen[0])
    expected = (seen[0] * gradient).view(-1, HEADS, SIZE).sum((0, 2)).abs()
    close(heads.gate_importance(model, [batch])[0][1], expected.detach(), 1e-5)


@pytest.mark.method("P-19", "P-24")
def test_importance_does_not_see_dropout():
    batch, training = make_batch(), tiny(hidden_dropout_prob=0.5).train()
    close(heads.gate_importance(training, [batch])[0], heads.gate_importance(tiny(), [batch])[0])


@pytest.mark.method("P-19")
def test_iterative_head_pruning_follows_the_scores():
    model, batches = tiny(), [make_batch()]
    path = heads.prune_heads_iteratively(model, batches, closeness, step=0.25, threshold=0.0)
    assert [int(step.heads.sum()) for step in path] == [16, 12, 8, 4, 0]
    for before, after in itertools.pairwise(path):
        assert not (after.heads & ~before.heads).any() and after.ffns.all()
        scores = heads.head_importance(model, batches, before.heads)
        closed = before.heads & ~after.heads
        assert scores[closed].max() <= scores[after.heads].min() if after.heads.any() else True
    with heads.head_gates(model, path[2].heads):
        assert path[2].metric == pytest.approx(closeness(model))
    cut = copy.deepcopy(model)
    heads.cut_closed(cut, path[2].heads)
    assert closeness(cut) == pytest.approx(path[2].metric, rel=1e-5)


@pytest.mark.method("P-19")
def test_iterative_head_pruning_stops_at_the_threshold():
    metrics = iter([1.0, 0.95, 0.91, 0.89, 0.99])
    path = heads.prune_heads_iteratively(tiny(), [make_batch()], lambda model: next(metrics), step=0.1)
    assert [step.metric for step in path] == [1.0, 0.95, 0.91, 0.89]
    assert heads.last_acceptable(path).metric == 0.91
    assert [int(step.heads.sum()) for step in path] == [16, 15, 14, 13]
    for step in (0, 1.5):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            heads.prune_heads_iteratively(tiny(), [make_batch()], closeness, step=step)
    with pytest.raises(ValueError, match="no calibration batches"):
        heads.head_importance(tiny(), [])


def lrp_linear(x: np.ndarray, weight: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Bach et al. 2015, equation 60, with alpha = beta = 1/2, contribution by contribution; then the sum is restored."""
    found = np.zeros_like(x)
    for j, of_unit in enumerate(relevance):
        z = weight[j] * x
        for i in range(len(x)):
            part = z[z > 0].sum() if z[i] > 0 else z[z < 0].sum()
            found[i] += 0.5 * z[i] / part * of_unit if z[i] else 0
    return found * relevance.sum() / found.sum()


@pytest.mark.method("P-20a")
def test_relevance_of_a_linear_layer_is_the_printed_rule():
    generator = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(5, 4).double(), torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(4, 5, generator=generator))
        x[0, 0] = x[0, 0].abs() * linear.weight[2].sign()  # one unit has positive contributions only
    relevance = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    out = heads.relevance_linear(linear, x)
    close(out.detach(), linear(x).detach(), 0)
    (found,) = torch.autograd.grad(out, x, relevance)
    for row, token in itertools.product(range(2), range(3)):
        expected = lrp_linear(x[row, token].detach().numpy(), linear.weight.detach().numpy(), relevance[row, token].numpy())
        np.testing.assert_allclose(found[row, token], expected, rtol=1e-6)
    assert (found >= 0).all()


@pytest.mark.method("P-20a")
def test_relevance_of_a_residual_sum_and_of_attention_by_hand():
    a, b = torch.tensor([[[2.0, -3.0, 1.0]]]), torch.tensor([[[2.0, 1.0, -1.0]]])
    output = SimpleNamespace(dense=nn.Identity(), LayerNorm=nn.Identity())
    a.requires_grad_(), b.requires_grad_()
    out = heads.relevance_residual(output, a, b)
    close(out.detach(), (a + b).detach(), 0)
    of_a, of_b = torch.autograd.grad(out, (a, b), torch.tensor([[[4.0, 2.0, 2.0]]]))
    # unit 0: both positive, (1, 1) of 4 with half lost; units 1, 2: one each, half of 2 for either; then 6 becomes 8 again
    close(of_a, torch.tensor([[[1.0, 1.0, 1.0]]]) * 8 / 6)
    close(of_b, torch.tensor([[[1.0, 1.0, 1.0]]]) * 8 / 6)
    value, probabilities = torch.tensor([[[[1.0], [-2.0], [3.0]]]]), torch.tensor([[[[0.5, 0.2, 0.3]]]])
    mixed = functools.partial(torch.matmul, probabilities)
    found = heads.alpha_beta(torch.tensor([[[[1.0]]]]), value, mixed, heads.nothing)
    close(found.flatten(), torch.tensor([0.5 * 0.5 / 1.4, 0.5, 0.5 * 0.9 / 1.4]))


@pytest.mark.method("P-20a")
def test_relevance_is_conserved_through_the_whole_bert_and_never_negative():
    """One unit per sentence arrives whole at every layer's attention and at the embeddings; no output changes."""
    model, batch = tiny().double(), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    seen = []
    handle = model.bert.embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    with heads.relevance_rules(model) as put_out:
        out = model(**inputs).logits
    handle.remove()
    close(out.detach(), logits(model, batch), 1e-10)
    found = torch.autograd.grad(out.amax(-1).sum(), [seen[0], *put_out])
    assert min(relevance.min() for relevance in found) >= 0
    close(found[0].sum((1, 2)), torch.ones(3, dtype=torch.float64), 1e-5)
    assert (found[0][batch["attention_mask"] == 0] == 0).all()  # padding takes nothing
    for relevance in found[1:]:  # the residual branch carries the rest past the heads
        assert ((relevance.sum((1, 2)) > 0) & (relevance.sum((1, 2)) < 1)).all()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not model.bert.encoder.layer[0].attention.output.dense._forward_pre_hooks


@pytest.mark.method("P-20a")
def test_head_relevance_is_a_mean_of_shares_of_sentences():
    model, batch = tiny(), make_batch()
    found = heads.head_relevance(model, [batch])
    alone = [heads.head_relevance(model, [{name: tensor[row : row + 1] for name, tensor in batch.items()}]) for row in range(3)]
    close(found, torch.stack(alone).mean(0))
    close(found.sum(1), torch.ones(LAYERS))
    assert (found >= 0).all() and found.std() > 0.01
    with pytest.raises(ValueError, match="no calibration batches"):
        heads.head_relevance(model, [])


@pytest.mark.method("P-20b")
def test_confidence_by_hand():
    model, batch = tiny(), make_batch()
    with torch.no_grad(), bert.attention(model, "eager"):
        maps = model(batch["input_ids"], batch["attention_mask"], output_attentions=True).attentions
    expected, tokens = torch.zeros(HEADS), 0
    for row in range(3):
        for position, token in enumerate(batch["input_ids"][row].tolist()):
            if token not in (SEP, PAD):
                expected += maps[1][row, :, position].max(-1).values
                tokens += 1
    found = heads.head_confidence(model, [batch], (SEP,))
    close(found[1], expected / tokens)
    assert found.max() <= 1
    with pytest.raises(ValueError, match="no token is left"):
        heads.head_confidence(model, [batch], tuple(range(100)))
    with pytest.raises(ValueError, match="no calibration batches"):
        heads.head_confidence(model, [], (SEP,))


@pytest.mark.method("P-21")
def test_open_probability_equals_the_frequency_of_open_gates():
    log_alpha = torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0])
    samples = heads.hard_concrete(log_alpha.expand(200_000, 5), generator=torch.Generator().manual_seed(0))
    frequency = (samples > 0).float().mean(0)
    close(heads.open_probability(log_alpha), frequency, 5e-3)
    assert samples.min() == 0 and samples.max() == 1
    closed_form = [1 / (1 + math.exp(-(a - 0.33 * math.log(0.1 / 1.1)))) for a in log_alpha.tolist()]
    np.testing.assert_allclose(heads.open_probability(log_alpha), closed_form, rtol=1e-5)


@pytest.mark.method("P-21")
def test_hard_concrete_limits_and_gradient():
    far = torch.tensor([-20.0, 20.0])
    for training in (True, False):
        assert heads.hard_concrete(far, training, torch.Generator().manual_seed(0)).tolist() == [0, 1]
    assert heads.hard_concrete(torch.zeros(1), training=False).item() == pytest.approx(0.5)
    log_alpha = torch.zeros(64, requires_grad=True)
    gates = heads.hard_concrete(log_alpha, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(gates.sum(), log_alpha)
    inside = (gates > 0) & (gates < 1)
    assert (gradient[inside] > 0).all() and (gradient[~inside] == 0).all()


@pytest.mark.method("P-21")
def test_l0_training_closes_gates_and_cuts_them():
    model, batch = tiny(), make_batch()
    log_alpha = torch.full((LAYERS, HEADS), 2.0, requires_grad=True)
    groups = heads.gate_groups(model, log_alpha, 0.5)
    assert groups[1] == {"params": [log_alpha], "lr": 0.5, "weight_decay": 0.0, "betas": (0.9, 0.999)}
    assert heads.gate_groups(model, log_alpha, 0.5, momentum=0.0)[1]["betas"] == (0.0, 0.999)
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    loss = heads.l0_loss(log_alpha, 0.5, torch.Generator().manual_seed(0))
    for _ in range(10):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert heads.open_probability(log_alpha).sum() < 0.6 * 16
    keep = heads.open_heads(log_alpha)
    assert torch.equal(keep, heads.hard_concrete(log_alpha, training=False) > 0.5)
    assert int(heads.open_heads(log_alpha, 5).sum()) == 5
    assert log_alpha[heads.open_heads(log_alpha, 5)].min() >= log_alpha[~heads.open_heads(log_alpha, 5)].max()
    with heads.head_gates(model, keep.float()):
        gated = logits(model, batch)
    heads.cut_closed(model, keep)
    close(logits(model, batch), gated)
    with pytest.raises(ValueError, match=r"0\.\.16"):
        heads.open_heads(log_alpha, 17)


@pytest.mark.method("P-21")
def test_a_gate_is_closed_from_one_point_on_and_open_from_its_negative():
    assert pytest.approx(-2.3979, abs=1e-4) == heads.CLOSED
    around = heads.CLOSED + torch.tensor([-0.01, 0.01])
    assert (heads.hard_concrete(around, training=False) == 0).tolist() == [True, False]
    assert (heads.hard_concrete(-around, training=False) == 1).tolist() == [True, False]
    log_alpha = torch.tensor([[-9.0, -2.5, -2.3, 0.0], [1.0, 2.3, 2.5, 9.0]])
    assert heads.gate_states(log_alpha) == {"closed": 2, "open": 2, "undecided": 4}
    keep = torch.tensor([[False, False, False, True], [True, True, False, True]])
    assert heads.really_closed(log_alpha, keep) == 0.5
    assert heads.really_closed(log_alpha, heads.open_heads(log_alpha, 6)) == 1


@pytest.mark.method("P-21")
def test_the_penalty_rests_while_enough_gates_are_closed():
    model, batch = tiny(), make_batch()
    log_alpha = torch.full((LAYERS, HEADS), 1.0)
    log_alpha[0] = -3.0

    def value(enough: int | None, penalty: float = 0.1) -> float:
        return heads.l0_loss(log_alpha, penalty, torch.Generator().manual_seed(0), enough)(model, batch).item()

    assert value(4) == value(3) == value(None, 0.0)
    assert value(5) == value(None) > value(4)


@pytest.mark.method("P-21")
def test_l0_penalty_is_lambda_times_expected_open_gates():
    model, batch = tiny(), make_batch()
    log_alpha = torch.linspace(-2, 3, 16).view(LAYERS, HEADS)
    values = [heads.l0_loss(log_alpha, p, torch.Generator().manual_seed(0))(model, batch).item() for p in (0.0, 0.1)]
    assert values[1] - values[0] == pytest.approx(0.1 * heads.open_probability(log_alpha).sum().item(), rel=1e-4)


@pytest.mark.method("P-21")
def test_every_batch_draws_gates_of_its_own():
    model, batch, log_alpha = tiny(), make_batch(), torch.zeros(LAYERS, HEADS)
    loss = heads.l0_loss(log_alpha, 0.0, torch.Generator().manual_seed(0))
    same = torch.Generator().manual_seed(0)
    for _ in range(2):
        with heads.head_gates(model, heads.hard_concrete(log_alpha, generator=same)):
            expected = sentence_losses(model, batch).mean().item()
        assert loss(model, batch).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.method("P-24")
def test_structure_importance_is_scaled():
    of_heads, of_ffns = heads.structure_importance(tiny(), [make_batch()])
    raw_heads, raw_ffns = numerical_importance(tiny(), make_batch())
    per_layer = raw_heads / raw_heads.norm(dim=1, keepdim=True)
    close(of_heads, (per_layer - per_layer.min()) / (per_layer.max() - per_layer.min()), 1e-3)
    close(of_ffns, (raw_ffns - raw_ffns.min()) / (raw_ffns.max() - raw_ffns.min()), 1e-3)


@pytest.mark.method("P-24")
def test_structure_pruning_runs_three_phases():
    metrics = iter([1.0, 0.95, 0.5, 0.94, 0.5, 0.93, 0.5])
    path = heads.prune_structures(tiny(), [make_batch()], lambda model: next(metrics), step=0.25)
    open_parts = [(int(step.heads.sum()), int(step.ffns.sum())) for step in path]
    # joint: 4 heads and 1 block, until it fails; then 2 heads; then 1 block, each from the last acceptable step
    assert open_parts == [(16, 4), (12, 3), (8, 2), (10, 3), (8, 3), (10, 2), (10, 1)]
    assert heads.last_acceptable(path) is path[5]


@pytest.mark.method("P-24")
def test_by_default_a_tenth_of_the_heads_and_one_block_go():
    metrics = iter([1.0, 0.91, 0.89, 0.89, 0.89])
    path = heads.prune_structures(tiny(), [make_batch()], lambda model: next(metrics))
    found = [(int(step.heads.sum()), int(step.ffns.sum())) for step in path]
    assert found == [(16, 4), (15, 3), (14, 2), (14, 3), (15, 2)]


@pytest.mark.method("P-24")
def test_structures_are_scored_again_under_all_that_is_closed(monkeypatch):
    asked, score = [], heads.structure_importance
    monkeypatch.setattr(heads, "structure_importance", lambda *args: asked.append(args[2:]) or score(*args))
    path = heads.prune_structures(tiny(), [make_batch()], closeness, step=0.25, threshold=0.0)
    for step, (of_heads, of_ffns) in zip(path[:-1], asked, strict=True):
        assert torch.equal(of_heads, step.heads) and torch.equal(of_ffns, step.ffns)


@pytest.mark.method("P-24")
def test_cutting_structures_equals_closed_gates():
    model, batch = tiny(), make_batch()
    path = heads.prune_structures(model, [batch], closeness, step=0.25, threshold=0.5)
    step = path[2]
    assert not step.heads.all() and not step.ffns.all()
    with heads.head_gates(model, step.heads), heads.ffn_gates(model, step.ffns):
        gated = logits(model, batch)
    heads.cut_closed(model, step.heads, step.ffns)
    close(logits(model, batch), gated)


@pytest.mark.method("P-24")
@pytest.mark.parametrize("size", [3, 12])
def test_matched_subnetworks(size):
    good = torch.zeros(16, dtype=torch.bool)
    good[:size] = True
    good = good.view(LAYERS, HEADS)
    bad, chance = (heads.matched_subnetwork(good, kind) for kind in ("bad", "random"))
    assert bad.sum() == chance.sum() == size
    assert int((bad & ~good).sum()) == min(size, 16 - size)  # as much as possible of what was thrown away
    assert not torch.equal(chance, heads.matched_subnetwork(good, "random", seed=1))
    with pytest.raises(ValueError, match="'random' or 'bad'"):
        heads.matched_subnetwork(good, "good")


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.method("P-22")
def test_layer_drop_runs_a_random_subset():
    model, batch = tiny(), make_batch()
    subsets = {}
    for size in range(LAYERS + 1):
        for keep in itertools.combinations(range(LAYERS), size):
            shrunk = copy.deepcopy(model)
            shrunk.bert.encoder.layer = nn.ModuleList(shrunk.bert.encoder.layer[i] for i in keep)
            subsets[keep] = logits(shrunk, batch)
    counts = np.zeros(LAYERS)
    model.train()
    with layers.layer_drop(model, 0.3, torch.Generator().manual_seed(0)) as passes:
        for _ in range(200):
            out = logits(model, batch)
            (match,) = [keep for keep, expected in subsets.items() if torch.equal(out, expected)]
            counts[list(match)] += 1
            assert passes[-1] == match
        assert len(passes) == 200
        assert len(model.bert.encoder.layer) == LAYERS
        close(logits(model.eval(), batch), subsets[0, 1, 2, 3], 0)  # no dropping, no rescaling in evaluation
        assert len(passes) == 200
    assert abs(counts / 200 - 0.7).max() < 4 * math.sqrt(0.3 * 0.7 / 200)


@pytest.mark.method("P-22")
def test_layer_drop_trains_and_leaves_no_trace():
    model, batch = tiny().train(), make_batch()
    with pytest.raises(IndexError), layers.layer_drop(model, 0.5):
        model(torch.tensor([[1000]]))  # an error inside leaves the model whole
    assert len(model.bert.encoder.layer) == LAYERS
    with layers.layer_drop(model, 0.6, torch.Generator().manual_seed(0)):
        model(batch["input_ids"], batch["attention_mask"]).logits.sum().backward()
    got = [layer.output.dense.weight.grad is not None for layer in model.bert.encoder.layer]
    assert not all(got)
    assert not model.bert.encoder._forward_hooks and not model.bert.encoder._forward_pre_hooks
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"\[0, 1\)"), layers.layer_drop(model, rate):
            pass


@pytest.mark.method("P-23a")
def test_every_other():
    assert layers.every_other(6, 3) == [0, 2, 4]  # depths 2, 4, 6 go
    assert layers.every_other(6, 4) == [0, 1, 3, 4]  # depths 3 and 6 go
    assert layers.every_other(6, 2) == [0, 3]
    assert layers.every_other(6, 5) == [0, 1, 2, 3, 4]
    assert layers.every_other(6, 1) == [0]
    for total in range(1, 13):
        for keep in range(1, total + 1):
            kept = layers.every_other(total, keep)
            assert len(kept) == keep and kept == sorted(set(kept)) and set(kept) <= set(range(total))
            dropped = total - keep
            if dropped and 2 * dropped <= total and total % dropped == 0:  # where the rule needs no convention
                p = dropped / total
                assert kept == [d - 1 for d in range(1, total + 1) if d % math.floor(1 / p + 1e-9) != 0]


@pytest.mark.method("P-23a")
def test_fixed_selections():
    assert layers.select_layers(6, 4, "top") == [0, 1, 2, 3]
    assert layers.select_layers(6, 4, "bottom") == [2, 3, 4, 5]
    assert layers.select_layers(6, 4, "symmetric") == [0, 1, 4, 5]
    assert layers.select_layers(6, 3, "symmetric") == [0, 1, 5]
    assert layers.select_layers(6, 3, "every_other") == [0, 2, 4]
    assert all(layers.select_layers(6, 6, strategy) == list(range(6)) for strategy in layers.STRATEGIES)
    with pytest.raises(ValueError, match="strategy must be"):
        layers.select_layers(6, 3, "middle")
    for keep in (0, 7):
        with pytest.raises(ValueError, match="between 1 and 6"):
            layers.select_layers(6, keep, "top")


@pytest.mark.method("P-23b")
@pytest.mark.parametrize("num_keep", [1, 2, 3])
def test_search_equals_brute_force(num_keep):
    model = tiny()
    found, tried = layers.search_layers(model, num_keep, closeness)
    brute = {}
    for keep in itertools.combinations(range(LAYERS), num_keep):
        shrunk = copy.deepcopy(model)
        structure.remove_layers(shrunk, list(keep))
        brute[keep] = closeness(shrunk)
    assert tried == pytest.approx(brute)
    assert found == list(max(brute, key=brute.get))
    assert len(model.bert.encoder.layer) == LAYERS


@pytest.mark.method("P-23b")
def test_greedy_search_drops_one_layer_at_a_time():
    model = tiny()
    found, tried = layers.search_layers(model, 2, closeness, limit=1)
    first = max((k for k in tried if len(k) == 3), key=tried.get)
    second = max((k for k in tried if len(k) == 2), key=tried.get)
    assert len(tried) == 4 + 3 and set(second) < set(first) and found == list(second)
    with pytest.raises(ValueError, match="between 1 and 4"):
        layers.search_layers(model, 0, closeness)
    with pytest.raises(ValueError, match="keep one layer"), layers.skip_layers(model, []):
        pass


@pytest.mark.method("P-23c")
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.9])
def test_keep_rates_have_the_mean_and_the_gradient(rate):
    scores = torch.tensor([0.3, -2.0, 5.0, 0.0], dtype=torch.float64, requires_grad=True)
    rates = layers.keep_rates(scores, rate)
    assert rates.mean().item() == pytest.approx(1 - rate, abs=1e-9)
    assert torch.equal(rates.argsort(), scores.argsort()) or rate == 0
    if rate:
        assert torch.autograd.gradcheck(lambda s: layers.keep_rates(s, rate), scores)


@pytest.mark.method("P-23c")
def test_relaxed_coin_falls_with_its_probability():
    q = torch.tensor([0.1, 0.5, 0.9])
    z = layers.relaxed_bernoulli(q.expand(100_000, 3), 0.5, torch.Generator().manual_seed(0))
    close((z > 0.5).float().mean(0), q, 6e-3)


@pytest.mark.method("P-23c")
def test_layer_gates_at_zero_and_one_skip_layers():
    model, batch = tiny(), make_batch()
    with layers.skip_layers(model, [1, 2]):
        skipped = logits(model, batch)
    with layers.layer_gates(model, torch.tensor([0.0, 1.0, 1.0, 0.0])):
        close(logits(model, batch), skipped)


@pytest.mark.method("P-23c")
def test_learned_rates_find_the_harmful_layer():
    """The last layer shouts over the signal; gradient descent on the scores alone must learn to drop it."""
    model, batch = tiny(), make_batch(size=8, length=9)
    with torch.no_grad():
        last = model.bert.encoder.layer[3].output.LayerNorm
        last.weight.zero_()
        last.bias.copy_(-5 * random_mask(HIDDEN).float())
        model.classifier.weight.mul_(4)
    with layers.skip_layers(model, [0, 1, 2]):
        batch["labels"] = logits(model, batch).argmax(-1)  # what the model says without it is the truth
    assert (logits(model, batch).argmax(-1) != batch["labels"]).all()
    model.requires_grad_(False)
    weight = torch.zeros(LAYERS, HIDDEN, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    loss = layers.learned_drop_loss(weight, 0.25, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    keep, scores = layers.learned_layers(model, [batch], weight, 3)
    assert keep == [0, 1, 2]
    rates = layers.keep_rates(scores.log(), 0.25)  # the softmax gives the rates back
    close(rates, layers.keep_rates(layers.layer_scores(model, batch, weight).detach(), 0.25), 1e-4)
    assert rates[3] == rates.min() and rates.max() - rates.min() > 0.1
    assert scores.sum().item() == pytest.approx(1) and scores.shape == (LAYERS,)
    with pytest.raises(ValueError, match="no calibration batches"):
        layers.learned_layers(model, [], weight, 3)


@pytest.mark.method("P-23c")
def test_layer_scores_ignore_padding():
    model, batch = tiny(), make_batch()
    weight = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(0))
    alone = []
    for row in range(3):
        alone.append(layers.layer_scores(model, one_sentence(batch, row), weight))
    close(layers.layer_scores(model, batch, weight), torch.stack(alone).mean(0), 1e-4)


@pytest.mark.method("P-23c")
def test_learned_layers_look_at_all_batches():
    model, both = tiny(), [make_batch(seed=0), make_batch(seed=1)]
    weight = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([layers.layer_scores(model, batch, weight) for batch in both]).mean(0).softmax(0)
    close(layers.learned_layers(model, both, weight, 2)[1], expected)


@pytest.mark.method("P-23c")
def test_a_layer_is_scored_by_its_own_output():
    model, batch = tiny(), make_batch(size=1)
    weight = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(0))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = model.bert(**inputs, output_hidden_states=True).hidden_states
    expected = [(weight[d] * states[d + 1][0].mean(0).tanh()).sum() for d in range(LAYERS)]
    close(layers.layer_scores(model, batch, weight), torch.stack(expected), 1e-4)
