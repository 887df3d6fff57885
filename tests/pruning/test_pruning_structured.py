"""Neurons, heads and layers: every method against an oracle, on a tiny BERT."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save
from scipy import optimize
from torch import nn
from torch.nn.utils import prune
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import prune_linear_layer

from utils import bert, structure
from utils.pruning import heads, layers, neurons
from utils.pruning.masks import hold_masks

LAYERS, HEADS, SIZE, HIDDEN, NEURONS = 4, 4, 8, 32, 64
SEP, PAD = 3, 0


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes) -> BertForSequenceClassification:
    """A random BERT with 4 layers, 4 heads, and biases that are not zero."""
    config = BertConfig(
        vocab_size=100, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=NEURONS,
        num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    config.update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "LayerNorm" not in name:
                    parameter.normal_(0, 0.2)
    return model


def make_batch(size: int = 3, length: int = 7, seed: int = 0) -> dict:
    """Random sentences; each ends in [SEP], later ones are shorter and padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 100, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(size):
        end = length - row
        ids[row, end - 1], ids[row, end:], mask[row, end:] = SEP, PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (size,), generator=generator)}


def one_sentence(batch: dict, row: int) -> dict:
    """One sentence of a batch without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return {name: batch[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}


def logits(model: nn.Module, batch: dict, implementation: str = "sdpa") -> torch.Tensor:
    with torch.no_grad(), bert.attention(model, implementation):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def closeness(model: nn.Module) -> float:
    """A deterministic stand-in for a validation metric: how near the logits stay to fixed targets, in (0, 1]."""
    targets = torch.tensor([[1.0, -1.0], [0.5, 0.2], [-1.0, 1.0]])
    return float(torch.exp(-(logits(model, make_batch()) - targets).square().mean()))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


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


# --- neurons ---------------------------------------------------------------------------------------------------------


@pytest.mark.method("P-12a")
def test_activation_entropy_counts_tokens_one_by_one():
    model, batches = tiny(), [make_batch(seed=0), make_batch(seed=1)]
    scores = neurons.activation_entropy(model, batches)
    on, tokens = np.zeros(NEURONS), 0
    for batch in batches:
        for row in range(3):  # each sentence alone and without padding
            seen = neurons.gelu_inputs(model, one_sentence(batch, row))
            on += (seen[2][0] > 0).sum(0).numpy()
            tokens += len(seen[2][0])
    p = on / tokens
    with np.errstate(all="ignore"):
        expected = -np.nan_to_num(p * np.log(p)) - np.nan_to_num((1 - p) * np.log(1 - p))
    np.testing.assert_allclose(scores[2], expected, atol=1e-6)
    assert min(s.min() for s in scores.values()) >= 0 and max(s.max() for s in scores.values()) <= math.log(2) + 1e-6


@pytest.mark.method("P-12a")
def test_a_neuron_that_never_changes_has_no_entropy():
    model = tiny()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[:2] = torch.tensor([1e3, -1e3])
    scores = neurons.activation_entropy(model, [make_batch()])
    assert scores[0][:2].tolist() == [0, 0]
    with pytest.raises(ValueError, match="no calibration batches"):
        neurons.activation_entropy(model, [])


@pytest.mark.method("P-12b", "P-12c")
def test_norms_are_means_of_absolute_weights():
    model = tiny()
    layer = model.bert.encoder.layer[1]
    for i in (0, 17):
        outgoing, incoming = layer.output.dense.weight[:, i].tolist(), layer.intermediate.dense.weight[i].tolist()
        assert neurons.onorm(model)[1][i] == pytest.approx(sum(map(abs, outgoing)) / HIDDEN)
        assert neurons.inorm(model)[1][i] == pytest.approx(sum(map(abs, incoming)) / HIDDEN)


@pytest.mark.method("P-12b", "P-12c")
def test_norm_pruning_agrees_with_torch_ln_structured():
    model = tiny()
    layer = model.bert.encoder.layer[0]
    ffn_in, ffn_out = copy.deepcopy(layer.intermediate.dense), copy.deepcopy(layer.output.dense)
    prune.ln_structured(ffn_in, "weight", amount=16, n=1, dim=0)
    prune.ln_structured(ffn_out, "weight", amount=16, n=1, dim=1)
    assert torch.equal(neurons.neuron_keep(neurons.inorm(model), 0.25)[0], ffn_in.weight_mask[:, 0].bool())
    assert torch.equal(neurons.neuron_keep(neurons.onorm(model), 0.25)[0], ffn_out.weight_mask[0].bool())


@pytest.mark.method("P-12a", "P-12b", "P-12c")
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_neuron_keep_drops_the_exact_share(scope):
    scores = {0: torch.arange(64.0), 1: 100 + torch.arange(64.0)}
    keep = neurons.neuron_keep(scores, 0.25, scope)
    assert sum(int((~mask).sum()) for mask in keep.values()) == 32
    assert int((~keep[0]).sum()) == (16 if scope == "layer" else 32)
    assert not keep[0][:16].any() and keep[0][32:].all()


def test_neuron_keep_refuses():
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            neurons.neuron_keep({0: torch.arange(4.0)}, share)
    with pytest.raises(ValueError, match="'layer' or 'global'"):
        neurons.neuron_keep({0: torch.arange(4.0)}, 0.5, "matrix")


PENALTIES = {
    neurons.prox_l21: lambda row: np.sqrt(np.square(row).sum()),
    neurons.prox_linf1: lambda row: np.abs(row).max(),
}


@pytest.mark.method("P-13a", "P-13b")
@pytest.mark.parametrize("prox", list(PENALTIES))
@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0, 5.0])
def test_prox_minimises_its_objective(prox, amount):
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = prox(rows, amount).numpy()
    for row, found in zip(rows.numpy(), ours, strict=True):

        def objective(v, row=row):
            return 0.5 * np.square(v - row).sum() + amount * PENALTIES[prox](v)

        starts = [row, row / 2, found, np.zeros(3)]
        options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 2000}
        best = min((optimize.minimize(objective, s, method="Nelder-Mead", options=options) for s in starts), key=lambda r: r.fun)
        assert objective(found) <= best.fun + 1e-9  # strongly convex: the values pin the argument, too
        np.testing.assert_allclose(found, best.x, atol=2e-4)


@pytest.mark.method("P-13b")
def test_l1_projection_solves_its_constrained_problem():
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row, found in zip(rows.numpy(), neurons.project_l1_ball(rows, 1.2).numpy(), strict=True):
        # v = a - b with a, b >= 0 makes the ball a smooth constraint
        solution = optimize.minimize(
            lambda ab, row=row: np.square(ab[:4] - ab[4:] - row).sum(), np.zeros(8), bounds=[(0, None)] * 8, method="SLSQP",
            constraints={"type": "ineq", "fun": lambda ab: 1.2 - ab.sum()}, options={"ftol": 1e-14},
        )  # fmt: skip
        np.testing.assert_allclose(found, solution.x[:4] - solution.x[4:], atol=1e-5)


@pytest.mark.method("P-13a", "P-13b")
def test_prox_zeroes_exactly_the_small_rows():
    rows = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]])
    close(neurons.prox_l21(rows, 0.5), torch.tensor([[0.0, 0.0], [2.7, 3.6], [0.0, 0.0]]))
    close(neurons.prox_linf1(rows, 0.8), torch.tensor([[0.0, 0.0], [3.0, 3.2], [0.0, 0.0]]))
    assert (neurons.prox_l21(rows, 0.6)[0] == 0).all() and (neurons.prox_linf1(rows, 0.8)[0] == 0).all()
    with pytest.raises(ValueError, match="0 or more"):
        neurons.prox_l21(rows, -1.0)


@pytest.mark.method("P-13c")
@pytest.mark.parametrize("groups", neurons.GROUPS)
def test_proximal_training_deletes_whole_neurons(groups):
    model, batch = tiny(), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    after_step = neurons.proximal_step(12.0, groups=groups)
    for step in range(1, 11):
        nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(step, model, optimizer)
    keep, zeroed = neurons.neurons_after_prox(model, 0.25, groups)
    assert 0 < sum(zeroed.values()) < LAYERS * NEURONS
    assert all(int((~mask).sum()) == 16 for mask in keep.values())
    before = logits(model, batch)
    dead = {number: norm > 0 for number, norm in neurons.group_norms(model, groups).items()}
    neurons.fold_constant_neurons(model)
    close(logits(model, batch), before)
    structure.remove_neurons(model, dead)  # what the penalty zeroed leaves without a trace
    close(logits(model, batch), before)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == NEURONS - zeroed[0]


@pytest.mark.method("P-13c")
def test_one_proximal_step_on_each_kind_of_group():
    for groups in neurons.GROUPS:
        layer = tiny().bert.encoder.layer[0]
        w_in, w_out = layer.intermediate.dense.weight.detach().clone(), layer.output.dense.weight.detach().clone()
        neurons.shrink_neurons(layer, neurons.prox_l21, 0.4, groups)
        for i in (0, 40):
            norm_in, norm_out = w_in[i].norm(), w_out[:, i].norm()
            norm = torch.hypot(norm_in, norm_out) if groups == "coupled" else None
            scale_in = 1 - 0.4 / (norm if groups == "coupled" else norm_in)
            scale_out = 1 - 0.4 / (norm if groups == "coupled" else norm_out)
            close(layer.intermediate.dense.weight[i], w_in[i] * (1 if groups == "outgoing" else scale_in))
            close(layer.output.dense.weight[:, i], w_out[:, i] * (1 if groups == "incoming" else scale_out))
    for bad in (lambda: neurons.proximal_step(-1.0), lambda: neurons.proximal_step(1.0, groups="rows")):
        with pytest.raises(ValueError, match="must be"):
            bad()


def brute_force_merging(incoming: np.ndarray, outgoing: np.ndarray, count: int):
    """All pairs, written as the equation says, recomputed from scratch at every step."""
    alive, outgoing, picked = list(range(len(incoming))), outgoing.copy(), []
    for _ in range(count):
        pairs = itertools.permutations(alive, 2)
        s, i, j = min((np.mean(outgoing[j] ** 2) * np.sum((incoming[i] - incoming[j]) ** 2), i, j) for i, j in pairs)
        outgoing[i] += outgoing[j]
        alive.remove(j)
        picked.append(s)
    return alive, outgoing[alive], picked


@pytest.mark.method("P-14")
def test_merging_equals_the_brute_force():
    generator = torch.Generator().manual_seed(0)
    incoming, outgoing = (torch.randn(14, d, generator=generator, dtype=torch.float64) for d in (5, 6))
    outgoing[3] = 0  # a neuron nobody listens to goes first, at no cost
    keep, merged, saliencies = neurons.merge_pairs(incoming, outgoing, 13)
    alive, expected, picked = brute_force_merging(incoming.numpy(), outgoing.numpy(), 13)
    assert keep.nonzero().flatten().tolist() == alive
    np.testing.assert_allclose(merged[keep], expected)
    np.testing.assert_allclose(saliencies, picked)
    assert saliencies[0] == 0


@pytest.mark.method("P-14")
def test_a_duplicate_neuron_merges_without_a_trace():
    model, batch = tiny(), make_batch()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[9] = layer.intermediate.dense.weight[40]
            layer.intermediate.dense.bias[9] = layer.intermediate.dense.bias[40]
    before = logits(model, batch)
    saliencies = neurons.merge_neurons(model, 1)
    close(logits(model, batch), before, 1e-6)
    assert all(values == [0.0] for values in saliencies.values())
    assert all(layer.output.dense.weight.shape == (HIDDEN, NEURONS - 1) for layer in model.bert.encoder.layer)


@pytest.mark.method("P-14")
def test_merging_minds_the_bias_and_its_bounds():
    model, batch = tiny(), make_batch()
    with torch.no_grad():  # the same weights, but biases far apart: no twins
        ffn_in = model.bert.encoder.layer[0].intermediate.dense
        ffn_in.weight[9], ffn_in.bias[9], ffn_in.bias[40] = ffn_in.weight[40].clone(), 50.0, -50.0
    assert neurons.merge_neurons(copy.deepcopy(model), 1)[0][0] > 0
    before = logits(model, batch)
    neurons.merge_neurons(model, 0)
    close(logits(model, batch), before, 0)
    for count in (-1, NEURONS):
        with pytest.raises(ValueError, match=r"0\.\.63"):
            neurons.merge_neurons(model, count)


# --- heads -----------------------------------------------------------------------------------------------------------


def zero_head(model: nn.Module, layer: int, head: int) -> nn.Module:
    """An independent way to silence a head: its columns of the output projection become zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.bert.encoder.layer[layer].attention.output.dense.weight[:, head * SIZE : (head + 1) * SIZE] = 0
    return model


@pytest.mark.method("P-18")
def test_single_head_ablation_equals_zeroed_columns():
    model = tiny()
    found = heads.single_head_ablation(model, closeness)
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        assert found[layer, head] == pytest.approx(closeness(zero_head(model, layer, head)), rel=1e-5)
    assert closeness(model) == closeness(tiny())  # no gate is left behind


@pytest.mark.method("P-18")
def test_only_one_head_equals_zeroed_columns():
    model = tiny()
    found = heads.only_one_head(model, closeness)
    for layer, head in ((0, 0), (2, 3)):
        expected = model
        for other in set(range(HEADS)) - {head}:
            expected = zero_head(expected, layer, other)
        assert found[layer, head] == pytest.approx(closeness(expected), rel=1e-5)


def test_head_maps_cope_with_missing_heads():
    model = structurally_pruned()
    found = heads.single_head_ablation(model, closeness)
    assert found.isnan().sum(1).tolist() == [2, HEADS, 0]
    importance = heads.head_importance(model, [make_batch()])
    assert (importance == 0).sum(1).tolist() == [2, HEADS, 0]


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


def lrp_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, relevance: np.ndarray, epsilon: float) -> np.ndarray:
    """The epsilon rule as printed: R_i = sum_j x_i w_ji / (z_j + epsilon sign(z_j)) R_j, with z_j = sum_i w_ji x_i + b_j."""
    z = weight @ x + bias
    z = z + epsilon * np.sign(z)
    return np.array([sum(x[i] * weight[j, i] / z[j] * relevance[j] for j in range(len(z))) for i in range(len(x))])


@pytest.mark.method("P-20a")
def test_relevance_rules_equal_the_printed_epsilon_rule():
    """Feed-forward block of a BERT, linear - GELU - linear: gradient times input against rule by rule."""
    model = tiny()
    layer = model.bert.encoder.layer[0]
    x = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    layer.double()
    with heads.relevance_rules(model):
        y = layer.output.dense(layer.intermediate(x))
    (gradient,) = torch.autograd.grad(y[5], x)
    w1, b1 = layer.intermediate.dense.weight.detach().numpy(), layer.intermediate.dense.bias.detach().numpy()
    w2, b2 = layer.output.dense.weight.detach().numpy(), layer.output.dense.bias.detach().numpy()
    inputs = x.detach().numpy()
    hidden = layer.intermediate(x).detach().numpy()
    start = np.zeros(HIDDEN)
    start[5] = y[5].item()
    at_hidden = lrp_linear(hidden, w2, b2, start, 1e-12)  # GELU hands its relevance through
    at_input = lrp_linear(inputs, w1, b1, at_hidden, 1e-12)
    np.testing.assert_allclose((gradient * x).detach().numpy(), at_input, rtol=1e-6, atol=1e-9)
    without_bias = lrp_linear(inputs, w1, 0 * b1, np.ones(NEURONS), 1e-12)
    assert without_bias.sum() == pytest.approx(NEURONS)  # conservation: a layer without bias hands on everything
    bias_share = sum(b2[5:6]) + sum(b1 * (at_hidden / (w1 @ inputs + b1)))
    assert at_input.sum() + bias_share == pytest.approx(y[5].item())


@pytest.mark.method("P-20a")
def test_relevance_is_conserved_through_the_whole_bert():
    """R(embeddings) + R(all biases) = logit, and the rules change no output."""
    model, batch = tiny().double(), make_batch(size=1)
    seen = []
    embeddings = model.bert.embeddings
    handle = embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    with heads.relevance_rules(model):
        out = model(batch["input_ids"], batch["attention_mask"]).logits
    handle.remove()
    close(out.detach(), logits(model, batch), 1e-10)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and "embeddings" not in name]
    gradients = torch.autograd.grad(out[0, 0], [seen[0], *biases], materialize_grads=True)
    total = sum((g * value).sum() for g, value in zip(gradients, [seen[0], *biases], strict=True))
    assert total.item() == pytest.approx(out[0, 0].item(), abs=1e-9)


@pytest.mark.method("P-20a")
def test_head_relevance_is_the_share_of_output_times_gradient():
    model, batch = tiny(), make_batch(size=2)
    shares = []
    for row in range(2):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        seen = []
        projection = model.bert.encoder.layer[2].attention.output.dense
        handle = projection.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with heads.relevance_rules(model):
            top = model(one["input_ids"], one["attention_mask"]).logits.max()
        handle.remove()
        (gradient,) = torch.autograd.grad(top, seen[0])
        relevance = (gradient * seen[0]).view(-1, HEADS, SIZE).sum((0, 2)).detach()
        shares.append(relevance / relevance.abs().sum())
    found = heads.head_relevance(model, [batch])
    close(found[2], torch.stack(shares).mean(0))
    assert found.abs().sum(1).max() <= 1 + 1e-5
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
    assert groups[1] == {"params": [log_alpha], "lr": 0.5, "weight_decay": 0.0}
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
def test_l0_penalty_is_lambda_times_expected_open_gates():
    model, batch = tiny(), make_batch()
    log_alpha = torch.linspace(-2, 3, 16).view(LAYERS, HEADS)
    values = [heads.l0_loss(log_alpha, p, torch.Generator().manual_seed(0))(model, batch).item() for p in (0.0, 0.1)]
    assert values[1] - values[0] == pytest.approx(0.1 * heads.open_probability(log_alpha).sum().item(), rel=1e-4)


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
    with layers.layer_drop(model, 0.3, torch.Generator().manual_seed(0)):
        for _ in range(200):
            out = logits(model, batch)
            (match,) = [keep for keep, expected in subsets.items() if torch.equal(out, expected)]
            counts[list(match)] += 1
        assert len(model.bert.encoder.layer) == LAYERS
        close(logits(model.eval(), batch), subsets[0, 1, 2, 3], 0)  # no dropping, no rescaling in evaluation
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
