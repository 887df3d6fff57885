"""BERT-of-Theseus: at rate 0 it is the predecessor, at rate 1 the successor, and only the successor learns."""

import pytest
import torch
from small_task import task_of
from transformers import BertConfig, BertForSequenceClassification

from utils import bert
from utils.distillation import students
from utils.distillation.theseus import Theseus, constant_rate, linear_rate, modules_of
from utils.profiles import get
from utils.training import cross_entropy
from utils.trials import Trial


@pytest.fixture
def predecessor():
    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, num_labels=2,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0, initializer_range=0.2)  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def successor(predecessor):
    return students.from_layers(predecessor, [0, 1])


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.method("K-31")
@pytest.mark.parametrize("attention", ["sdpa", "eager", "linear"])
def test_at_rate_0_the_predecessor_at_rate_1_the_successor(attention, predecessor, successor, batch):
    with bert.attention(successor, attention), bert.attention(predecessor, attention):
        alone, whole = logits(successor, batch), logits(predecessor, batch)
    assert (alone - whole).abs().max() > 0.01
    for rate, expected in ((0.0, whole), (1.0, alone)):
        theseus = Theseus(predecessor, constant_rate(rate))
        with theseus.replacing(successor), bert.attention(successor, attention):
            torch.testing.assert_close(logits(successor.train(), batch), expected, atol=1e-5, rtol=1e-5)
            assert theseus.replaced_share == rate and theseus.drawn == 2
            torch.testing.assert_close(
                logits(successor.eval(), batch), alone, atol=1e-5, rtol=1e-5
            )  # measuring: the successor alone
            assert theseus.drawn == 2
        assert len(successor.bert.encoder.layer) == 2


@pytest.mark.method("K-31")
def test_a_mixed_pass_runs_one_module_or_the_other(predecessor, successor, batch):
    """With rate 1/2 the passes are exactly the four mixtures, each built by hand, each about as often."""
    own, theirs = list(successor.bert.encoder.layer), list(predecessor.bert.encoder.layer)
    mixtures = {}
    for first in (own[:1], theirs[:2]):
        for second in (own[1:], theirs[2:]):
            model = bert.fresh_copy(successor)
            model.bert.encoder.layer = torch.nn.ModuleList([*first, *second])
            mixtures[len(first), len(second)] = logits(model, batch)
    theseus, seen = Theseus(predecessor, constant_rate(0.5), torch.Generator().manual_seed(0)), dict.fromkeys(mixtures, 0)
    with theseus.replacing(successor.train()):
        for _ in range(80):
            found = logits(successor, batch)
            [name] = [name for name, expected in mixtures.items() if torch.allclose(found, expected, atol=1e-5)]
            seen[name] += 1
    assert all(8 <= count <= 32 for count in seen.values()), seen
    share = sum(count * ((name[0] == 1) + (name[1] == 1)) for name, count in seen.items()) / 160
    assert theseus.replaced_share == pytest.approx(share)


@pytest.mark.method("K-31")
def test_only_the_successors_layers_learn_and_the_rate_rises_with_the_steps(predecessor, successor, batch):
    before = {name: p.detach().clone() for name, p in predecessor.named_parameters()}
    own = {name: p.detach().clone() for name, p in successor.named_parameters()}
    trial, rates = Trial(successor, task_of(batch), get("smoke")), []
    theseus = Theseus(predecessor, lambda step: rates.append(step) or linear_rate(0.5, 0.25)(step))
    with theseus.replacing(successor):
        trial.recover(
            5, learning_rate=1e-2, loss=cross_entropy, after_step=theseus.after_step, parameters=theseus.parameters(successor)
        )
    assert rates == [0, 1, 2, 3, 4] and theseus.drawn == 10
    moved = {name for name, p in successor.named_parameters() if not torch.equal(p, own[name])}
    assert moved and all(name.startswith("bert.encoder.layer") for name in moved)
    assert all(p.grad is None for p in successor.parameters())  # what does not learn gathers no gradient over the steps
    assert all(torch.equal(p, before[name]) and p.requires_grad and p.grad is None for name, p in predecessor.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in theseus.layers.parameters())
    assert not successor.bert.encoder._forward_pre_hooks and not successor.bert.encoder._forward_hooks


@pytest.mark.method("K-31")
def test_the_gradient_reaches_a_replaced_module_through_the_predecessors_layers(predecessor, successor, batch):
    theseus = Theseus(predecessor, constant_rate(0.5))
    theseus.draw = lambda own, modules: torch.nn.ModuleList([own[0], *modules[1]])
    with theseus.replacing(successor.train()):
        cross_entropy(successor, batch).backward()
    assert successor.bert.encoder.layer[0].output.dense.weight.grad.abs().max() > 0
    assert successor.bert.encoder.layer[1].output.dense.weight.grad is None


@pytest.mark.method("K-31")
def test_an_error_inside_leaves_the_successor_whole(predecessor, successor):
    with pytest.raises(AttributeError), Theseus(predecessor, constant_rate(0.0)).replacing(successor.train()):
        successor.bert.encoder(None)
    assert len(successor.bert.encoder.layer) == 2


@pytest.mark.method("K-31")
def test_rates_by_hand_and_refusals(predecessor):
    linear, constant = linear_rate(0.3, 6e-4), constant_rate(0.5, until=2500)
    assert [round(linear(step), 3) for step in (0, 500, 2000)] == [0.3, 0.6, 1.0]
    assert [constant(step) for step in (0, 2499, 2500)] == [0.5, 0.5, 1.0]
    layers = predecessor.bert.encoder.layer
    assert modules_of(layers, 2) == [[layers[0], layers[1]], [layers[2], layers[3]]]
    for wrong, match in ((lambda: constant_rate(1.5), r"\[0, 1\]"), (lambda: linear_rate(0.3, -1), "does not fall"),
                         (lambda: modules_of(layers, 3), "must divide the predecessor's 4")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            wrong()
