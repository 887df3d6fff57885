"""What training does to weights of one and two bits (survey sections 3.1 to 3.3): did levels change, and was it worth it?

A level changes only when a latent weight crosses a threshold. Where few do, what a network regains comes from its scales,
biases, LayerNorm and classifier. The control that tells holds the latent weights still and trains all else.
"""

import textwrap
from collections.abc import Callable

import torch
from torch import nn

from utils.baseline import Phase, dense_control
from utils.bert import Matrix
from utils.board import Acted, Board
from utils.quantization.binary import latent_weights
from utils.quantization.quantizer import Quantizer
from utils.results import COLUMNS
from utils.trials import Trial

CHANGED, FIRST, LAST = "codes changed (%)", "first training loss", "last training loss"
ONE_TRAINING = "\n    (One training each: another seed may differ.)"
LEAST = 0.5  # per cent of the codes: at a rate that leaves the dense model unharmed fewer change, and nothing is tried


def frozen(make: Callable[[Matrix], Quantizer]) -> Callable[[Matrix], Quantizer]:
    """The same maker of quantizers, whose latent weights take no gradient: the control that says what moving them is worth.

    Learned levels, scales, biases, LayerNorm and the classifier train as they do in the method. A weight changes its level only
    where levels are learned and the border between them moves with them.
    """

    def held(matrix: Matrix) -> Quantizer:
        matrix.module.weight.requires_grad_(False)
        return make(matrix)

    return held


def held_latents(model: nn.Module, learning_rate: float) -> list[dict]:
    """Optimiser groups that hold the weights under quantizers at rate 0: they stand still, and Adam goes on following their gradients.

    What `frozen` cannot be for a method that reads Adam's curvature: a weight without gradient has none.
    """
    held = [latent for latent, _ in latent_weights(model, Quantizer)]
    taken = {id(latent) for latent in held}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [{"params": held, "lr": 0.0}, {"params": others, "lr": learning_rate}]


def moved(trial: Trial, changed: float, at_least: float | None = LEAST, at_most: float | None = None) -> dict[str, Acted]:
    """The mechanism of a trained row: per cent of the codes that `changed`, with its bounds, and the training loss in nats.

    The two losses are means over the first and over the last sixth of the steps. Raises ValueError for a trial without training.
    """
    if not trial.losses:
        raise ValueError("a trial without training moved nothing")
    part = max(1, len(trial.losses) // 6)
    first, last = (sum(losses) / part for losses in (trial.losses[:part], trial.losses[-part:]))
    return {CHANGED: (changed, at_least, at_most), FIRST: (first, None, None), LAST: (last, None, None)}


def reading(board: Board, label: str, control: str | None = None) -> str:
    """What the training of a row did, its difference from the dense model with the same training, and from its control."""
    row = board.find(label)
    against, (low, high) = row.against_control, row.against_control["ci95"]
    text = (f"{label}: {row.effect[CHANGED]:.2f} % of the codes changed, the training loss went from {row.effect[FIRST]:.2f} to "
            f"{row.effect[LAST]:.2f}. Against {against['control']}: {100 * against['difference']:+.1f} points "
            f"[{100 * low:+.1f}, {100 * high:+.1f}].")  # fmt: skip
    told = [textwrap.fill(text, COLUMNS)]
    return "\n".join(told if control is None else [*told, board.compare(label, control) + ONE_TRAINING])


def dense_after(board: Board, steps: int, learning_rate: float, seed: int | None = None) -> torch.Tensor:
    """Validation logits of the dense model after such a training on labels; trained once, then from the cache of controls."""
    phase = Phase(steps, learning_rate, False, board.seed if seed is None else seed)
    return dense_control(board.baseline, (phase,), board.task, board.profile)


def rate_costs(board: Board) -> str:
    """What the recovery budget does to the dense model at the rate of few bits and at the common one, a sentence for each."""
    told = []
    for rate in dict.fromkeys((board.profile.few_bits_learning_rate, board.profile.recovery_learning_rate)):
        found = board.points(dense_after(board, board.steps, rate), board.baseline.logits)
        low, high = found.low, found.high
        verdict = "worse than" if high < 0 else "better than" if low > 0 else "not told apart from"
        text = (f"The dense model after {board.steps} steps at {rate:g}: {found.value:+.1f} points [{low:+.1f}, {high:+.1f}] against "
                f"the baseline, {verdict} it.")  # fmt: skip
        told.append(textwrap.fill(text, COLUMNS))
    return "\n".join(told)


def guessing(board: Board, label: str) -> str:
    """Whether the interval of a row's accuracy contains what always answering the most frequent label gives."""
    low, high = (100 * end for end in board.find(label).accuracy_ci95)
    majority = 100 * board.task.majority_accuracy()
    inside = low <= majority <= high
    level = "at" if inside else "above" if low > majority else "below"
    text = (f"{label}: {level} the level of guessing. Its interval, {low:.1f} to {high:.1f} %, "
            f"{'contains' if inside else 'excludes'} the {majority:.1f} % of always answering the most frequent label.")  # fmt: skip
    return textwrap.fill(text, COLUMNS)
