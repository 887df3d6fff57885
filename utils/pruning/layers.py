"""Survey section 2.4: dropping whole encoder layers (LayerDrop, Fan, Grave, Joulin 2019, arXiv 1909.11556).

Layers are numbered from 0 in the code. A dropped layer passes its input on: output = input. Nothing is renumbered or deleted
until `utils.structure.remove_layers` does so.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from utils.structure import check_layers
from utils.training import Loss, check_batches, cross_entropy

Evaluate = Callable[[nn.Module], float]
STRATEGIES = ("every_other", "top", "bottom", "symmetric")


@contextlib.contextmanager
def skip_layers(model: nn.Module, keep: list[int]) -> Iterator[None]:
    """Run with the given layers only, inside the block; the weights are not touched.

    Raises ValueError unless `keep` names one existing layer or more.
    """
    encoder = model.bert.encoder
    layers = encoder.layer
    kept = check_layers(keep, len(layers))
    encoder.layer = nn.ModuleList(layers[number] for number in kept)
    try:
        yield
    finally:
        encoder.layer = layers


@contextlib.contextmanager
def layer_drop(model: nn.Module, rate: float, generator: torch.Generator | None = None) -> Iterator[list[tuple[int, ...]]]:
    """Structured dropout: inside the block, each training forward pass drops every layer with probability `rate`.

    Every layer has a coin of its own. Yields a list that gets the layers of every training pass. In evaluation mode all
    layers run, and nothing is rescaled. `generator` is a CPU one. Survey 2.4. Raises ValueError for a rate outside [0, 1).
    """
    check_rate(rate)
    encoder = model.bert.encoder
    layers = encoder.layer
    passes: list[tuple[int, ...]] = []

    def draw(module: nn.Module, args: tuple) -> None:
        if module.training:
            stays = (torch.rand(len(layers), generator=generator) >= rate).tolist()
            module.layer = nn.ModuleList(itertools.compress(layers, stays))
            passes.append(tuple(itertools.compress(range(len(layers)), stays)))

    def restore(module: nn.Module, args: tuple, output: object) -> None:
        module.layer = layers

    with encoder.register_forward_pre_hook(draw), encoder.register_forward_hook(restore, always_call=True):
        yield passes


def check_rate(rate: float) -> None:
    """Raise ValueError unless the drop rate lies in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"the drop rate must lie in [0, 1), got {rate}")


def check_depth(num_layers: int, keep: int) -> None:
    """Raise ValueError unless between one layer and all stay."""
    if not 1 <= keep <= num_layers:
        raise ValueError(f"keep between 1 and {num_layers} layers, got {keep}")


def every_other(num_layers: int, keep: int) -> list[int]:
    """Drop depth d where d mod floor(1/p) = 0, with p the share to drop; returns the layers kept. Fan et al. 2019.

    Depth counts from 1, so that p = 1/2 keeps depths 1, 3, 5, ... (layers 0, 2, 4, ...). Where the rule names too many
    layers, the shallowest of them go, as many as needed. For p > 1/2 floor(1/p) = 1 names every layer: there the rule
    spaces what is kept, depths with (d - 1) mod floor(1/(1 - p)) = 0.
    """
    check_depth(num_layers, keep)
    dropped = num_layers - keep
    if dropped == 0:
        return list(range(num_layers))
    if dropped <= keep:
        gone = [d for d in range(1, num_layers + 1) if d % (num_layers // dropped) == 0][:dropped]
        return [d - 1 for d in range(1, num_layers + 1) if d not in gone]
    return [d - 1 for d in range(1, num_layers + 1) if (d - 1) % (num_layers // keep) == 0][:keep]


def select_layers(num_layers: int, keep: int, strategy: str) -> list[int]:
    """The layers that stay under a fixed rule: `every_other`, or drop from the `top`, the `bottom`, or the middle.

    `symmetric` keeps both ends, the lower one first where `keep` is odd. Raises ValueError for an unknown strategy, or a
    `keep` outside 1..num_layers.
    """
    check_depth(num_layers, keep)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "every_other":
        return every_other(num_layers, keep)
    low = {"top": keep, "bottom": 0, "symmetric": math.ceil(keep / 2)}[strategy]  # how many stay at the lower end
    return [*range(low), *range(num_layers - (keep - low), num_layers)]


def search_layers(
    model: nn.Module, num_keep: int, evaluate: Evaluate, limit: int = 1000
) -> tuple[list[int], dict[tuple[int, ...], float]]:
    """Try subsets of `num_keep` layers; returns the best one and the metric (higher is better) of every subset tried.

    The sentences behind `evaluate` should be none that the model is tested on. All subsets are tried where there are `limit`
    or fewer (12 choose 6 is 924), else greedily: drop the layer that is missed least, again and again. Ties keep the lower
    layers. Fan et al. 2019, survey 2.4. Raises ValueError for a bad `num_keep`.
    """
    num_layers = len(model.bert.encoder.layer)
    check_depth(num_layers, num_keep)
    tried: dict[tuple[int, ...], float] = {}
    if math.comb(num_layers, num_keep) <= limit:
        return list(best_subset(model, itertools.combinations(range(num_layers), num_keep), evaluate, tried)), tried
    keep = tuple(range(num_layers))
    while len(keep) > num_keep:
        keep = best_subset(model, itertools.combinations(keep, len(keep) - 1), evaluate, tried)
    return list(keep), tried


def best_subset(model: nn.Module, subsets: Iterator[tuple[int, ...]], evaluate: Evaluate, tried: dict) -> tuple[int, ...]:
    """The subset of layers with the highest metric; each metric is noted in `tried`."""
    metrics = {}
    for keep in subsets:
        with skip_layers(model, list(keep)):
            metrics[keep] = evaluate(model)
    tried |= metrics
    return max(metrics, key=metrics.get)


def layer_scores(model: nn.Module, batch: dict, weight: torch.Tensor) -> torch.Tensor:
    """A score per layer from its activation: s_d = mean over sentences of w_d . tanh(mean over tokens of h_d), (layers,).

    `weight` (layers, hidden) is learned; the activations h_d of the full model are taken as given.
    """
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        states = torch.stack(model.bert(**inputs, output_hidden_states=True).hidden_states[1:])  # (layers, batch, length, hidden)
        real = batch["attention_mask"][..., None].to(states.dtype)
        pooled = (states * real).sum(2) / real.sum(1)  # (layers, batch, hidden)
    return (pooled.tanh() * weight[:, None]).sum(-1).mean(1)


def keep_rates(scores: torch.Tensor, rate: float) -> torch.Tensor:
    """Keep rates q_d = 1 - p_d = sigmoid(s_d + c), with the one c that makes their mean 1 - `rate`; (layers,).

    c comes from bisection; a last Newton step, which changes nothing, carries the gradient of c with respect to the scores.
    """
    check_rate(rate)
    if rate == 0:
        return torch.ones_like(scores)
    fixed = scores.detach()
    offset = math.log((1 - rate) / rate)
    low, high = offset - fixed.max(), offset - fixed.min()
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (fixed + middle).sigmoid().mean() < 1 - rate else (low, middle)
    q = (fixed + middle).sigmoid()
    c = middle - ((scores + middle).sigmoid().mean() - (1 - rate)) / (q * (1 - q)).mean()
    return (scores + c).sigmoid()


def relaxed_bernoulli(probability: torch.Tensor, temperature: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """A soft coin z = sigmoid((logit(q) + logit(u)) / temperature), u uniform: P(z > 1/2) = q, and z has a gradient in q."""
    u = torch.rand(probability.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(probability.device)
    return ((probability.logit(eps=1e-6) + u.logit()) / temperature).sigmoid()


@contextlib.contextmanager
def layer_gates(model: nn.Module, gates: torch.Tensor) -> Iterator[None]:
    """Inside the block layer d outputs z_d * layer(h) + (1 - z_d) * h. `gates` is z, shape (layers,)."""
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(model.bert.encoder.layer):

            def blend(module: nn.Module, args: tuple, output: torch.Tensor, number: int = number) -> torch.Tensor:
                return args[0] + gates[number] * (output - args[0])

            hooks.enter_context(layer.register_forward_hook(blend))
        yield


def learned_drop_loss(
    weight: torch.Tensor, rate: float, temperature: float = 0.5, generator: torch.Generator | None = None
) -> Loss:
    """The loss of data-driven pruning: cross-entropy under random layer gates whose rates p_d, with mean `rate`, are learned.

    Per batch: scores from the activations, keep rates 1 - p_d, one relaxed coin per layer. Fan et al. 2019 make p_d a
    non-linear function of the layer's activation and normalise by a softmax; a sigmoid with a common offset does the same
    here, because L * (1 - rate) * softmax may exceed one. `weight` (layers, hidden) needs a parameter group of its own.
    """
    check_rate(rate)

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        rates = keep_rates(layer_scores(model, batch, weight), rate)
        with layer_gates(model, relaxed_bernoulli(rates, temperature, generator)):
            return cross_entropy(model, batch)

    return loss


@torch.no_grad()
def learned_layers(model: nn.Module, batches: list[dict], weight: torch.Tensor, num_keep: int) -> tuple[list[int], torch.Tensor]:
    """The fixed set of `num_keep` layers with the highest softmax score over the batches, and the softmax; (layers,).

    The same layers run for every input. The logarithm of the softmax gives the scores back, up to the offset that
    `keep_rates` chooses. Raises ValueError for no batches or a bad `num_keep`.
    """
    check_batches(batches)
    check_depth(len(weight), num_keep)
    model.eval()
    scores = torch.stack([layer_scores(model, batch, weight) for batch in batches]).mean(0).softmax(0)
    return sorted(scores.topk(num_keep).indices.tolist()), scores
