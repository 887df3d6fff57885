"""Parts that are not cut Linears: they stay what they are on disk, in training, in the count and in the clock."""

import fresh
import pytest
import torch
from small_task import task_of
from torch import nn

from utils import artifacts, bert, contract, costs, parts, profiles, structure, training

QUERY = "bert.encoder.layer.0.attention.self.query"


def low_rank(model: nn.Module) -> nn.Module:
    model.set_submodule(QUERY, parts.LowRankLinear.from_linear(model.get_submodule(QUERY), 5))
    return model


def tied(model: nn.Module) -> nn.Module:
    structure.tie(model, "bert.encoder.layer.1.intermediate", "bert.encoder.layer.0.intermediate")
    return model


def linear(model: nn.Module) -> nn.Module:
    model.config._attn_implementation = "linear"
    return model


def student(model: nn.Module) -> nn.Module:
    return parts.BiLSTM(100, 2, 16, 12, 8).eval()


def everything(model: nn.Module) -> nn.Module:
    """Cut, factorised, tied and with another attention at once."""
    structure.remove_heads(model, {1: torch.tensor([0, 2])})
    structure.remove_neurons(model, {0: torch.arange(20), 1: torch.arange(20)})
    return linear(tied(low_rank(model)))


CHANGES = (low_rank, tied, linear, student, everything)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_contract_holds_in_a_fresh_process(change, tiny, tmp_path):
    model = change(tiny).eval()
    artifacts.save(model, tmp_path / "m.safetensors")
    contract.write(tmp_path / "m.safetensors", model, 7)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_closed_form_equals_the_counter(change, tiny):
    model = change(tiny).eval()
    for length in (1, 9):
        assert costs.macs(model, length) == costs.measured_macs(model, length)


def test_a_broken_contract_is_named(tiny, tmp_path):
    path = tmp_path / "m.safetensors"
    artifacts.save(low_rank(tiny), path)
    contract.write(path, tied(linear(tiny)), 7)
    assert {problem.partition(" differ")[0] for problem in contract.broken(path)} == {"other ties", "logits"}


def test_a_factorised_layer_is_the_best_of_its_rank_and_smaller(tiny, tmp_path):
    dense = tiny.get_submodule(QUERY)
    part = parts.LowRankLinear.from_linear(dense, 5)
    error = torch.linalg.matrix_norm(part.left @ part.right - dense.weight) ** 2
    assert error.item() == pytest.approx((torch.linalg.svdvals(dense.weight)[5:] ** 2).sum().item(), rel=1e-4)
    torch.testing.assert_close(part(torch.eye(32)), (part.left @ part.right).T + dense.bias)
    torch.testing.assert_close(part.weight, part.left @ part.right)
    torch.testing.assert_close(part.expanded()(torch.eye(32)), part(torch.eye(32)))
    for rank in (0, 33):
        with pytest.raises(ValueError, match=rf"32 x 32 matrix has ranks in 1..32, got {rank}"):
            parts.LowRankLinear.from_linear(dense, rank)
        with pytest.raises(ValueError, match=rf"ranks in 1..32, got {rank}"):
            parts.LowRankLinear(32, 16, rank)
    before = artifacts.save(tiny, tmp_path / "dense")["stored_bytes"]
    after = artifacts.save(low_rank(tiny), tmp_path / "factors")["stored_bytes"]
    assert before - after == pytest.approx(4 * (32 * 32 - 5 * 64), abs=400)


def test_loading_a_part_draws_no_random_numbers(tiny, tmp_path):
    artifacts.save(low_rank(tiny), tmp_path / "m")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    artifacts.load(tmp_path / "m")
    assert torch.equal(torch.rand(1), expected)


def test_a_shared_layer_costs_parameters_once_and_multiply_adds_twice(tiny):
    parameters, macs = costs.parameter_counts(tiny)["parameters"], costs.macs(tiny, 8)
    tied(tiny)
    assert costs.macs(tiny, 8) == macs
    assert parameters - costs.parameter_counts(tiny)["parameters"] == 32 * 64 + 64


def test_linear_attention_equals_its_quadratic_form_and_ignores_padding(batch):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, 9, 8)
    mask = batch["attention_mask"]
    found, _ = parts.linear_attention(None, q, k, v, mask)
    scores = (nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).transpose(-1, -2) * mask[:, None, None, :]
    expected = (scores / scores.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_padding_reaches_a_registered_attention(tiny, batch):
    """Registered by AttentionInterface alone, a function gets no mask at all and attends to padding."""
    linear(tiny)
    short = {name: batch[name][2:3, :5] for name in ("input_ids", "attention_mask")}
    padded = {name: batch[name][2:3] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(tiny(**padded).logits, tiny(**short).logits)


@pytest.mark.parametrize("change", [student, linear], ids=lambda change: change.__name__)
def test_training_and_prediction_run_what_the_model_carries(change, tiny, batch, monkeypatch):
    """Training once replaced any attention by `eager`: an adapted linear attention would silently have trained dense."""
    calls = []
    attention = parts.ATTENTIONS["linear"].forward
    monkeypatch.setitem(training.bert.transformers.AttentionInterface._global_mapping, "linear",
                        lambda *args, **kwargs: (calls.append(args[1].shape), attention(*args, **kwargs))[1])  # fmt: skip
    model, task, profile = change(tiny), task_of(batch), profiles.get("smoke")
    before = [p.detach().clone() for p in model.parameters()]
    log = training.train(model, task, profile, steps=2, learning_rate=1e-2)
    logits = training.predict(model, task.validation, 0)
    assert len(log.losses) == 2 and logits.shape == (4, 2) and torch.isfinite(logits).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(calls) == (0 if change is student else 2 * (2 + 1))  # layers * (steps + passes)
    assert all(p.requires_grad for p in model.parameters())


def test_stock_attention_is_swapped_for_the_faster_equal_and_given_back(tiny):
    with bert.fastest_attention(tiny, "eager"):
        assert tiny.config._attn_implementation == "eager"
    assert tiny.config._attn_implementation == "sdpa"


def test_an_uncounted_attention_is_no_guess():
    with pytest.raises(ValueError, match="no closed form"):
        parts.attention_macs("mystery", 8, 2, 4)
