"""Peers against a loop written out by hand, cross-entropy for one peer, and copies that stay as old as they should."""

import pytest
import torch
from small_distillation import first_batch, make_bert, make_trial
from torch.nn.functional import cross_entropy, kl_div

from utils import training
from utils.distillation import peers
from utils.distillation.peers import Exchange

RATE = 1e-3


def weights(model: torch.nn.Module) -> torch.Tensor:
    # The bias of a key shifts all scores of a row: its gradient is zero, and Adam makes steps of the rounding.
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if not name.endswith("key.bias")])


def logits_of(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def make_cohort(task, count: int = 2) -> list:
    return [make_trial(make_bert(1 + k % 2, seed=k, classifier_dropout=0.0), task) for k in range(count)]


@pytest.mark.method("K-12", "K-13")
def test_the_mutual_loss_is_cross_entropy_and_the_mean_divergence_from_the_peers():
    generator = torch.Generator().manual_seed(0)
    z, first, second = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    labels = torch.tensor([0, 1, 2, 0, 1])
    divergence = [kl_div(z.log_softmax(-1), other.softmax(-1), reduction="batchmean") for other in (first, second)]
    expected = cross_entropy(z, labels) + 0.5 * sum(divergence) / 2
    torch.testing.assert_close(peers.mutual_loss(z, [first, second], labels, 0.5), expected)
    torch.testing.assert_close(peers.mutual_loss(z, [], labels), cross_entropy(z, labels))
    torch.testing.assert_close(peers.mutual_loss(z, [first, second], labels, 0.0), cross_entropy(z, labels))
    z.requires_grad_()  # codistillation: cross-entropy with the peers' mean prediction
    mean = (first.softmax(-1) + second.softmax(-1)) / 2
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (
        peers.mutual_loss(z, [first, second], labels), cross_entropy(z, labels) - (mean * z.log_softmax(-1)).sum(-1).mean())]  # fmt: skip
    torch.testing.assert_close(*gradients)


@pytest.mark.method("K-12", "K-13")
def test_one_peer_alone_trains_on_labels(task):
    alone, plain = make_cohort(task, 1)[0], make_cohort(task, 1)[0]
    peers.mutual_learning([alone], 4, RATE)
    plain.recover(4, learning_rate=RATE)
    torch.testing.assert_close(weights(alone.model), weights(plain.model))
    assert alone.phases == plain.phases and alone.losses == pytest.approx(plain.losses) and alone.seconds > 0


def by_hand(task, steps: int, interval: int, burn_in: int) -> list[torch.nn.Module]:
    """Two peers in turn, written out: each sees the other as it was after its last multiple of `interval` updates."""
    cohort = [trial.model for trial in make_cohort(task)]
    seen = [{k: v.clone() for k, v in model.state_dict().items()} for model in cohort]
    viewed = [trial.model for trial in make_cohort(task)]
    for model in [*cohort, *viewed]:
        model.config._attn_implementation = "eager"
    for model in cohort:
        for p in model.bert.embeddings.parameters():
            p.requires_grad_(False)
    tools = [training.make_optimizer(model.train(), steps, RATE) for model in cohort]
    for step, batch in enumerate(training.endless_batches(task.train, 8, 0, 0, steps), 1):
        for k in (0, 1):
            loss = cross_entropy(logits_of(cohort[k], batch), batch["labels"])
            if step > burn_in:
                viewed[1 - k].load_state_dict(seen[1 - k])
                with torch.no_grad():
                    peer = logits_of(viewed[1 - k].eval(), batch).softmax(-1)
                loss = loss + kl_div(logits_of(cohort[k], batch).log_softmax(-1), peer, reduction="batchmean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(cohort[k].parameters(), 1.0)
            tools[k][0].step()
            tools[k][0].zero_grad()
            tools[k][1].step()
            if step % interval == 0:
                seen[k] = {name: value.clone() for name, value in cohort[k].state_dict().items()}
    return cohort


@pytest.mark.method("K-12", "K-13")
@pytest.mark.parametrize("interval, burn_in", [(1, 0), (3, 0), (1, 2), (2, 3)])
def test_peers_do_what_the_loop_by_hand_does(task, interval, burn_in):
    trials = make_cohort(task)
    peers.codistillation(trials, Exchange(burn_in, interval), 6, RATE)
    for trial, reference in zip(trials, by_hand(task, 6, interval, burn_in), strict=True):
        torch.testing.assert_close(weights(trial.model), weights(reference), atol=2e-5, rtol=1e-4)
    if (interval, burn_in) == (1, 0):
        mutual = make_cohort(task)
        peers.mutual_learning(mutual, 6, RATE)
        assert all(torch.equal(weights(a.model), weights(b.model)) for a, b in zip(mutual, trials, strict=True))


@pytest.mark.method("K-12", "K-13")
def test_settings_lead_to_different_students(task):
    found = {}
    for name, exchange in {
        "live": Exchange(),
        "stale": Exchange(0, 3),
        "late": Exchange(3, 1),
        "weak": Exchange(weight=0.1),
    }.items():
        trials = make_cohort(task)
        peers.codistillation(trials, exchange, 6, RATE)
        found[name] = weights(trials[0].model)
    names = list(found)
    assert all(not torch.allclose(found[a], found[b], atol=1e-5) for a in names for b in names if a != b)


@pytest.mark.method("K-13")
def test_a_burn_in_that_never_ends_is_training_on_labels(task):
    trials, plain = make_cohort(task), make_cohort(task)
    peers.codistillation(trials, Exchange(burn_in=10), 4, RATE)
    for trial, alone in zip(trials, plain, strict=True):
        alone.recover(4, learning_rate=RATE)
        torch.testing.assert_close(weights(trial.model), weights(alone.model))


@pytest.mark.method("K-13")
def test_peers_may_read_in_orders_of_their_own(task):
    cohort = [make_trial(make_bert(1, seed=k), task, seed=k) for k in range(2)]
    common, own = Exchange(), Exchange(own_order=True)
    rows = {
        name: [next(iter(stream))["rows"].tolist() for stream in peers._streams(cohort, one, 2)]
        for name, one in (("common", common), ("own", own))
    }
    assert rows["common"][0] == rows["common"][1] and rows["own"][0] != rows["own"][1]
    peers.codistillation(cohort, own, 2, RATE)
    assert [trial.phases[0].seed for trial in cohort] == [0, 1]


@pytest.mark.method("K-12")
def test_mutual_learning_brings_three_peers_together(task):
    batch = first_batch(task, 24)
    trials, alone = make_cohort(task, 3), make_cohort(task, 3)
    peers.train_peers(trials, Exchange(weight=5.0), 40, RATE)
    for trial in alone:
        trial.recover(40, learning_rate=RATE)

    def spread(cohort: list) -> float:
        with torch.no_grad():
            return torch.stack([logits_of(trial.model, batch).softmax(-1) for trial in cohort]).var(0).sum().item()

    assert spread(trials) < spread(alone)
    assert all(not trial.model.training and all(p.requires_grad for p in trial.model.parameters()) for trial in trials)


@pytest.mark.method("K-12", "K-13")
def test_what_is_no_exchange_is_refused(task):
    for options in ({"burn_in": -1}, {"interval": 0}):
        with pytest.raises(ValueError, match="burn_in must be at least 0 and interval at least 1"):
            Exchange(**options)
    with pytest.raises(ValueError, match="finite and at least 0"):
        Exchange(weight=-1.0)
    with pytest.raises(ValueError, match="one trial or more"):
        peers.mutual_learning([], 2)


@pytest.mark.method("K-12", "K-13")
@pytest.mark.parametrize("interval", [1, 2])
def test_a_peer_is_asked_without_its_dropout_and_trains_on_with_it(task, interval):
    trials, batch = [make_trial(make_bert(1, seed=k, classifier_dropout=0.5), task) for k in range(2)], first_batch(task)
    reference = logits_of(trials[1].model, batch)
    for trial in trials:
        trial.model.train()
    (found,) = peers.Cohort(trials, Exchange(interval=interval)).predictions(0, batch)
    torch.testing.assert_close(found, reference)
    assert trials[1].model.training
