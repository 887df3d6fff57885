"""Survey section 4.2: students that learn from each other, without a teacher: deep mutual learning and codistillation."""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from utils import bert, training
from utils.baseline import Phase
from utils.distillation.objective import check_weight
from utils.losses import soft_target_loss
from utils.trials import Trial

# --- K-12 deep mutual learning --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """How peers learn from each other.

    `burn_in` steps with labels alone come first. A peer sees the others as they were at their last multiple of `interval`
    updates (1: as they are now). `weight` is that of the peers' term. With `own_order` every peer reads the data in an order of
    its own.
    """

    burn_in: int = 0
    interval: int = 1
    weight: float = 1.0
    own_order: bool = False

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if self.burn_in < 0 or self.interval < 1:
            raise ValueError(f"burn_in must be at least 0 and interval at least 1, got {self.burn_in} and {self.interval}")


def mutual_loss(logits: torch.Tensor, peers: list[torch.Tensor], labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """Cross-entropy + weight * mean over the peers of KL(p_peer || p_k), (batch, classes) logits. Without peers cross-entropy.

    Codistillation's cross-entropy with the peers' mean prediction has the same gradient.
    """
    loss = cross_entropy(logits, labels)
    return loss + weight * sum(soft_target_loss(logits, peer, 1.0) for peer in peers) / len(peers) if peers else loss


def mutual_learning(trials: list[Trial], steps: int, learning_rate: float | None = None) -> None:
    """K-12: a cohort of students, each with labels and with what the others think of the same batch, updated in turn, in place.

    No teacher takes part. With one student it is cross-entropy. Zhang et al. 2018 (arXiv 1706.00384), survey 4.2.
    """
    train_peers(trials, Exchange(), steps, learning_rate)


# --- K-13 codistillation --------------------------------------------------------------------------------------------


def codistillation(trials: list[Trial], exchange: Exchange, steps: int, learning_rate: float | None = None) -> None:
    """K-13: peers that begin alone and exchange checkpoints rarely: each learns from stale copies of the others, in place.

    `Exchange(burn_in=0, interval=1)` is mutual learning. Anil et al. 2018 (arXiv 1804.03235), survey 4.2.
    """
    train_peers(trials, exchange, steps, learning_rate)


def train_peers(trials: list[Trial], exchange: Exchange, steps: int, learning_rate: float | None) -> None:
    """Train several trials' models at once, in turns, with the optimiser of `utils.training`; time and phases go to the trials.

    All read the batches of the first trial's seed, or each those of its own. Raises ValueError without a trial.
    """
    if not trials:
        raise ValueError("peers need one trial or more")
    rate = learning_rate or trials[0].profile.recovery_learning_rate
    with ExitStack() as modes, training.steady_memory():
        torch.manual_seed(trials[0].seed)
        for trial in trials:
            plain = next(trial.model.parameters()).device.type == "cpu"
            modes.enter_context(trial.within(trial.model))
            modes.enter_context(training.frozen_embeddings(trial.model))
            modes.enter_context(bert.fastest_attention(trial.model, "eager" if plain else "sdpa"))
            modes.enter_context(training.training_mode(trial.model))
        cohort = Cohort(trials, exchange)
        optimizers = [training.make_optimizer(trial.model, steps, rate) for trial in trials]
        for step, batches in enumerate(zip(*_streams(trials, exchange, steps), strict=True), 1):
            for k, (optimizer, schedule) in enumerate(optimizers):
                cohort.update(k, step, batches[k], optimizer)
                schedule.step()
    for trial, (seed, _) in zip(trials, _orders(trials, exchange), strict=True):
        trial.phases.append(Phase(steps, rate, False, seed))


class Cohort:
    """The peers and the copies of them that the others see. A copy is only taken where it would differ from the peer itself."""

    def __init__(self, trials: list[Trial], exchange: Exchange):
        self.trials, self.exchange = trials, exchange
        stale = exchange.interval > 1
        self.seen = [bert.fresh_copy(trial.model) if stale else trial.model for trial in trials]

    def update(self, k: int, step: int, batch: dict, optimizer: torch.optim.Optimizer) -> None:
        """One step of peer k, after which the others may see it anew."""
        start, trial = time.perf_counter(), self.trials[k]
        batch = training.to_device(batch, next(trial.model.parameters()).device)

        def loss(model: nn.Module, batch: dict) -> torch.Tensor:
            peers = self.predictions(k, batch) if step > self.exchange.burn_in else []
            return mutual_loss(_logits(model, batch), peers, batch["labels"], self.exchange.weight)

        trial.losses.append(training.optimizer_step(trial.model, batch, loss, optimizer))
        if self.seen[k] is not trial.model and step % self.exchange.interval == 0:
            self.seen[k].load_state_dict(trial.model.state_dict())
        trial.seconds += time.perf_counter() - start

    @torch.no_grad()
    def predictions(self, k: int, batch: dict) -> list[torch.Tensor]:
        """Logits of all other peers as peer k sees them, without dropout."""
        found = []
        for number, model in enumerate(self.seen):
            if number != k:
                was_training = model.training
                model.eval()
                found.append(_logits(model, batch))
                model.train(was_training)
        return found


def _logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def _orders(trials: list[Trial], exchange: Exchange) -> list[tuple[int, Trial]]:
    """The seed of each peer's order of the data."""
    return [(trial.seed if exchange.own_order else trials[0].seed, trial) for trial in trials]


def _streams(trials: list[Trial], exchange: Exchange, steps: int) -> list:
    """The batches of each peer."""
    return [training.endless_batches(trial.task.train, trial.profile.batch_size, trial.task.tokenizer.pad_token_id, seed, steps)
            for seed, trial in _orders(trials, exchange)]  # fmt: skip
