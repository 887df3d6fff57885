"""The numbers that prove rows: each one tells the method from what could stand in its place."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from utils import trials
from utils.bert import ENCODER, matrices
from utils.encodings import decode
from utils.quantization import binary, codebook, few_bits, loss_aware, proof, ternary, transformer, uniform
from utils.quantization.quantizer import attach, detach
from utils.training import cross_entropy

EVEN = lambda m: uniform.EvenQuantizer(3, "row")  # noqa: E731 - a maker, as lessons have them


def trial_of(model, make=None, within=trials.as_it_is) -> trials.Trial:
    """A trial that is finished: quantizers burnt in."""
    trial = trials.Trial(model, None, None, within=within)
    if make is not None:
        attach(model, make)
        trial.encoded = detach(model)
    return trial


def train(model, batch, count=3, groups=None, after_step=None):
    optimizer = torch.optim.AdamW(groups or [p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(1, count + 1):
        cross_entropy(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step:
            after_step(step, model, optimizer)
    model.eval()


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.method("Q-01", "Q-07", "Q-12", "Q-16")
@pytest.mark.parametrize(("make", "least", "most"), [
    (lambda m: binary.SignQuantizer(), 1.9, 2), (lambda m: ternary.TWN(), 2.5, 3), (lambda m: uniform.EvenQuantizer(2, "row"), 3, 4)])  # fmt: skip
def test_values_per_row_are_those_of_the_bits_and_of_the_model_itself(make, least, most, tiny):
    assert proof.values_per_row(tiny) > 30 and proof.few_valued(tiny, 4) == 0
    trial = trial_of(tiny, make)
    assert least <= proof.values_per_row(trial.model) <= most
    assert proof.values_per_row(trial.model, ("word_embeddings",)) > 30


@pytest.mark.method("Q-29a", "Q-29b")
def test_matrices_with_few_values_are_counted_one_by_one(tiny):
    trial = trial_of(tiny, lambda m: codebook.StaticKMeans(m.weight, 2 if m.group == "query" else 8))
    assert proof.few_valued(trial.model, 4) == proof.few_valued(trial.model, 4, ("query",)) == 2


@pytest.mark.method("Q-11")
def test_gaussian_ternary_zeroes_fewer_weights_than_twn(tiny):
    shares = {}
    for name, make in (("gaussian", lambda m: ternary.GaussianTernary()), ("twn", lambda m: ternary.TWN())):
        attach(tiny, make)
        shares[name] = proof.share_of_zeros(tiny)
        for m in matrices(tiny):
            torch.nn.utils.parametrize.remove_parametrizations(m.module, "weight", leave_parametrized=False)
    assert shares["gaussian"] == pytest.approx(38.3, abs=2) and shares["twn"] == pytest.approx(42.4, abs=2)


@pytest.mark.method("Q-22", "Q-23")
def test_codebooks_of_vectors_make_few_pieces_of_many_values(tiny):
    trial = trial_of(tiny, lambda m: codebook.ProductQuantizer(m.weight, m.weight.shape[1] // 4, 5, shared=True))
    assert proof.different_pieces(trial.model, 4) == 32 and proof.values_per_row(trial.model) > 16


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.method("Q-16", "Q-26", "Q-27", "Q-30", "Q-31")
@pytest.mark.parametrize("make", [
    EVEN, lambda m: transformer.GroupwiseQuantizer(4, 8), lambda m: codebook.MultiBitQuantizer(2),
    lambda m: codebook.StaticKMeans(m.weight, 2), lambda m: loss_aware.LossAwareQuantizer(m.weight, 3)])  # fmt: skip
def test_codes_cross_only_where_weights_move_and_not_where_levels_do(make, tiny, batch):
    dense = [m.weight.detach().clone() for m in matrices(tiny)]
    attach(tiny, few_bits.frozen(make))
    train(tiny, batch, after_step=loss_aware.update_curvature)
    held = trials.Trial(tiny, None, None)
    held.encoded = detach(tiny)
    for m, weight in zip(matrices(tiny), dense, strict=True):
        codes, old = proof.codes_and_old(held.encoded[m.name], weight)
        assert torch.equal(codes, old)
        codes, other = proof.codes_and_old(held.encoded[m.name], weight.roll(1, 0))
        assert (codes != other).float().mean() > 0.1


@pytest.mark.method("Q-16")
def test_the_share_of_codes_that_crossed_counts_moved_weights(tiny):
    trial = trial_of(tiny, EVEN)  # its model now holds the levels themselves
    assert proof.codes_crossed(trial, trial.model) == 0
    with torch.no_grad():
        first = matrices(trial.model)[0].weight
        first.copy_(-first.sign() * first.abs().max())
    total = sum(m.weight.numel() for m in matrices(trial.model))
    assert 50 * first.numel() / total < proof.codes_crossed(trial, trial.model) <= 100 * first.numel() / total


@pytest.mark.method("Q-12")
def test_codes_that_are_not_of_the_nearest_level_are_refused():
    weight = torch.randn(8, 16)
    item = codebook.ProductQuantizer(weight, 4, 2).encode(weight)
    with pytest.raises(ValueError, match="product"):
        proof.codes_and_old(item, weight)


@pytest.mark.method("Q-04", "Q-14")
@pytest.mark.parametrize("kind", [binary.BSFlexible, ternary.TTQ])
@pytest.mark.parametrize("learns", [True, False])
def test_levels_that_do_not_learn_do_not_move(kind, learns, tiny, batch):
    attach(tiny, lambda m: kind(m.weight).requires_grad_(learns))
    start = SimpleNamespace(encoded={m.name: m.module.parametrizations.weight[0].encode(m.module.parametrizations.weight.original.detach())
                                     for m in matrices(tiny)})  # fmt: skip
    start.encoded = {
        name: SimpleNamespace(parts={"centroids": item.parts["centroids"].clone()}) for name, item in start.encoded.items()
    }
    train(tiny, batch)
    trial = trials.Trial(tiny, None, None)
    trial.encoded = detach(tiny)
    assert proof.level_moves(trial, start) > 1 if learns else proof.level_moves(trial, start) == 0


@pytest.mark.method("Q-27")
def test_held_latents_stand_still_and_keep_their_curvature(tiny, batch):
    made = []
    attach(tiny, lambda m: made.append(loss_aware.LossAwareQuantizer(m.weight, 2)) or made[-1])
    latents = [m.module.parametrizations.weight.original for m in matrices(tiny)]
    before, bias = [latent.detach().clone() for latent in latents], matrices(tiny)[0].module.bias.detach().clone()
    groups = few_bits.held_latents(tiny, 1e-2)
    assert groups[0]["lr"] == 0 and sum(len(group["params"]) for group in groups) == len(list(tiny.parameters()))
    train(tiny, batch, groups=groups, after_step=loss_aware.update_curvature)
    assert all(torch.equal(latent, start) for latent, start in zip(latents, before, strict=True))
    assert not torch.equal(matrices(tiny)[0].module.bias, bias)
    assert binary.curvature_spread(made) > 2


@pytest.mark.method("Q-27")
def test_a_weight_without_gradient_keeps_its_curvature_of_one(tiny, batch):
    made = []
    attach(tiny, few_bits.frozen(lambda m: made.append(loss_aware.LossAwareQuantizer(m.weight, 2)) or made[-1]))
    train(tiny, batch, after_step=loss_aware.update_curvature)
    assert len(made) == 12 and all(torch.equal(q.D, torch.ones_like(q.D)) for q in made)


@pytest.mark.method("Q-02b", "Q-09b")
@pytest.mark.parametrize("kind", [binary.BinaryConnect, ternary.TernaryConnect])
def test_a_stochastic_network_draws_in_training_and_in_training_only(kind, tiny):
    attach(tiny, lambda m: kind(0.05, stochastic=True))
    modules = [m.module for m in matrices(tiny)]
    assert all(torch.equal(module.weight, module.weight) for module in modules)  # attached, not yet trained
    tiny.train()
    assert all(not torch.equal(module.weight, module.weight) for module in modules)
    tiny.eval()
    assert all(torch.equal(module.weight, module.weight) for module in modules)
    values = {m.name: m.weight.detach().clone() for m in matrices(tiny)}
    assert all(torch.equal(values[name], decode(item)) for name, item in detach(tiny).items())


# --- what runs through the network ----------------------------------------------------------------------------------


@pytest.mark.method("Q-06")
def test_signs_are_seen_where_they_enter_and_nowhere_else(tiny, batch):
    assert proof.signed_inputs(trial_of(tiny, within=binary.binary_activations), batch) == 12
    assert proof.signed_inputs(trial_of(tiny), batch) == 0
    some = trial_of(tiny, within=lambda model: binary.binary_activations(model, ("query", "ffn_out")))
    assert proof.signed_inputs(some, batch) == 4


@pytest.mark.method("Q-10", "Q-15")
def test_ternary_signals_are_seen_inside_the_context_alone(tiny, batch):
    hybrid = trial_of(tiny, within=lambda model: ternary.ternary_activations(model, ternary.Slope(2.0, 1)))
    assert len(proof.three_level_inputs(hybrid, batch, ("ffn_out",))) == proof.binary_maps(hybrid, batch) == 2
    assert not proof.three_level_inputs(hybrid, batch, ("query",))
    plain = trial_of(tiny)
    assert not proof.three_level_inputs(plain, batch) and proof.binary_maps(plain, batch) == 0

    @contextlib.contextmanager
    def coins(model):
        class Coin(torch.nn.Module):
            def forward(self, x):
                return ternary.scaled_ternary_activation(x)

        with uniform.quantized_inputs(model, Coin):
            yield

    zeros = proof.three_level_inputs(trial_of(tiny, within=coins), batch)
    assert len(zeros) == 12 and all(0.1 < share < 0.9 for share in zeros.values())


@pytest.mark.method("Q-17")
@pytest.mark.parametrize(("granularity", "bits"), [("tensor", 8), ("token", 3)])
def test_every_operand_of_every_product_is_rounded_to_its_bits(granularity, bits, tiny, batch):
    def make() -> uniform.ActivationQuantizer:
        return uniform.ActivationQuantizer(bits, granularity=granularity)

    full = trial_of(tiny, within=lambda model: uniform.quantized_matmuls(model, make))
    count, error, values = proof.operand_rounding(full, batch)
    assert count == 10 * 2 and 2 < values <= 2**bits and 0.01 < error < 40
    assert (
        len(ENCODER) * 2 == proof.operand_rounding(trial_of(tiny, within=lambda m: uniform.quantized_inputs(m, make)), batch)[0]
    )
    assert proof.operand_rounding(trial_of(tiny), batch) == (0, 0.0, 0)
