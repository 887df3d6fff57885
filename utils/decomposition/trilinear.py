"""Survey section 6.3: attention as one tensor (T-11), begun by regression onto the attention of a trained layer.

An *example* of a layer is what its attention reads and adds for some sentences: hidden states x, the mask of real tokens, and
outputs y before the residual sum. The method and its controls are fitted and judged on the same examples.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertAttention

from utils import bert
from utils.parts.trilinear import TrilinearAttention, trilinear_tensor
from utils.training import autocast, check_batches

ROWS, RANDOM = "rows", "random"
STARTS = (ROWS, RANDOM)
RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
PROJECTIONS = ("query", "key", "value")
READ = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
Map = tuple[torch.Tensor, torch.Tensor]  # matrix (out, in), bias (out,)
# layer, x (batch, n, hidden), mask (batch, n) -> (batch, n, any)
OfLayer = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]

# --- examples of a layer's attention, and least squares -------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Hidden states x (batch, n, hidden) that an attention reads, its real tokens (batch, n), and what it adds, y (as x)."""

    x: torch.Tensor
    mask: torch.Tensor
    y: torch.Tensor


Examples = list[dict[int, Example]]  # for each batch an example of every layer


def first_tokens(length: int) -> Callable[[nn.Module], contextlib.AbstractContextManager]:
    """A context for a model (`within` of a trial) in which it reads the first `length` tokens of every sentence, and no more."""

    def cut(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        short = {name: kwargs[name][:, :length] for name in READ if kwargs.get(name) is not None}
        return args, {**kwargs, **short}

    @contextlib.contextmanager
    def within(model: nn.Module) -> Iterator[None]:
        handle = model.register_forward_pre_hook(cut, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return within


@torch.no_grad()
def attention_examples(model: nn.Module, batches: Iterable[dict], layers: Sequence[int], length: int) -> Examples:
    """For each batch an example of every named layer, from the first `length` tokens; `model` has BERT's own attention there.

    Raises ValueError for a layer that is not there or has another attention already, and for no layers or batches.
    """
    known = {number: layer.attention for number, layer in enumerate(model.bert.encoder.layer)}
    if not layers or not all(isinstance(known.get(layer), BertAttention) for layer in layers):
        raise ValueError(f"layers with BERT's own attention, one or more of 0..{len(known) - 1}, got {list(layers)}")
    path, found, device = "bert.encoder.layer.{}.attention.{}.weight", [], next(model.parameters()).device
    for batch in batches:
        inputs = {name: batch[name][:, :length].to(device) for name in READ[:2]}
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def visit(name: str, x: torch.Tensor, y: torch.Tensor, seen: dict = seen) -> None:
            seen[name] = x.float(), y.float()

        with bert.watch(model, ("query", "attention_output"), visit), autocast(device):
            model(**inputs)
        mask = inputs["attention_mask"].bool()
        found.append({layer: Example(seen[path.format(layer, "self.query")][0], mask, seen[path.format(layer, "output.dense")][1])
                      for layer in layers})  # fmt: skip
    check_batches(found)
    return found


class LeastSquares:
    """y ~ W x + b over examples that come in pieces: sums of x x^T and x y^T, x with a 1 behind it; float64."""

    def __init__(self) -> None:
        self.gram, self.cross = 0.0, 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Inputs (N, in) and outputs (N, out)."""
        x = nn.functional.pad(x, (0, 1), value=1.0)
        self.gram = self.gram + (x.T @ x).double()
        self.cross = self.cross + (x.T @ y).double()

    def solve(self, ridge: float) -> Map:
        """W and b that minimise |y - W x - b|^2 + penalty |W|^2; the penalty is a share `ridge` of the mean of sum x_j^2."""
        gram = self.gram.clone()
        gram.diagonal()[:-1] += ridge * gram.diagonal()[:-1].mean()
        found = torch.linalg.solve(gram, self.cross).float()
        return found[:-1].T, found[-1]


@torch.no_grad()
def regress(examples: Examples, features: OfLayer) -> dict[int, LeastSquares]:
    """For every layer the sums of least squares from `features(layer, x, mask)` to y, over real tokens."""
    sums: dict[int, LeastSquares] = {}
    for example in examples:
        for layer, one in example.items():
            found = features(layer, one.x, one.mask)[one.mask].float()
            sums.setdefault(layer, LeastSquares()).add(found, one.y[one.mask])
    return sums


def linear_prediction(features: OfLayer, maps: dict[int, Map]) -> OfLayer:
    """W f + b with each layer's map and `features` f."""
    return lambda layer, x, mask: nn.functional.linear(features(layer, x, mask), *maps[layer])


@torch.no_grad()
def explained(examples: Examples, predict: OfLayer) -> dict[int, float]:
    """Per layer the share of the outputs' variance that `predict(layer, x, mask)` explains, over real tokens.

    1 for all of it, 0 for what their mean explains, negative for something worse.
    """
    sums: dict[int, torch.Tensor] = {}
    for example in examples:
        for layer, one in example.items():
            y = one.y[one.mask].double()
            missed = (predict(layer, one.x, one.mask)[one.mask] - y).square().sum()
            new = torch.cat([y.sum(0), torch.stack([y.square().sum(), missed, missed.new_tensor(len(y))])])
            sums[layer] = sums.get(layer, 0) + new
    return {layer: float(1 - s[-2] / (s[-3] - s[:-3].square().sum() / s[-1])) for layer, s in sums.items()}


def best_maps(
    fit: Examples, held: Examples, features: OfLayer, ridges: Sequence[float] = RIDGES
) -> tuple[dict[int, Map], dict[int, float], dict[int, float]]:
    """Per layer the ridge regression of y on `features`, with that one of the ridges which explains most of the `held` examples;
    the share of their variance that it explains; and that ridge. The method's maps and its controls' are found alike.
    """
    best: dict[int, Map] = {}
    shares: dict[int, float] = {}
    chosen: dict[int, float] = {}
    sums = regress(fit, features)
    for ridge in ridges:
        maps = {layer: one.solve(ridge) for layer, one in sums.items()}
        for layer, share in explained(held, linear_prediction(features, maps)).items():
            if share > shares.get(layer, -torch.inf):
                best[layer], shares[layer], chosen[layer] = maps[layer], share, ridge
    return best, shares, chosen


# --- T-11 tensorized attention --------------------------------------------------------------------------------------


def pair_features(part: TrilinearAttention, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the output map sees of hidden states x (batch, n, hidden): (batch, n, length^2), 0 for pairs beyond a sentence."""
    n, most = x.shape[1], part.length
    pairs = trilinear_tensor(*part.factors(x, mask), part.core()).unflatten(-1, (n, n))
    return nn.functional.pad(pairs, (0, most - n, 0, most - n)).flatten(-2)


def begin_projections(part: TrilinearAttention, attention: BertAttention, start: str, seed: int) -> None:
    """Queries, keys and values of a part from a trained layer: every (hidden / rank)-th row of each matrix, so that all heads
    are there alike ("rows"); or normal numbers of the same standard deviation, without bias ("random").
    """
    generator = torch.Generator().manual_seed(seed)
    for name in PROJECTIONS:
        trained, own = getattr(attention.self, name), getattr(part.self, name)
        rows = torch.arange(part.rank) * trained.out_features // part.rank
        noise = torch.randn(own.weight.shape, generator=generator).to(own.weight) * trained.weight.std()
        own.weight.copy_(trained.weight[rows] if start == ROWS else noise)
        own.bias.copy_(trained.bias[rows] * (start == ROWS))


def scale_core(part: TrilinearAttention, example: Example) -> None:
    """Cores such that the numbers which the output map sees have mean square 1: its weights are then of the size that an
    optimiser's rate is made for.
    """
    seen = pair_features(part, example.x, example.mask)[example.mask]
    part.self.core.div_(seen.square().mean().sqrt().clamp(min=1e-15))


@torch.no_grad()
def trilinear_start(
    attention: BertAttention, example: Example, rank: int, length: int, blocks: int = 1, start: str = ROWS, seed: int = 0
) -> TrilinearAttention:
    """A part for the place of an attention, with its projections, cores and LayerNorm; the output map is still to be fitted.

    Raises ValueError for a start that there is not, and for sizes that the part refuses.
    """
    if start not in STARTS:
        raise ValueError(f"the start must be one of {', '.join(STARTS)}, got {start!r}")
    part = TrilinearAttention(attention.output.dense.out_features, rank, length, blocks).to(attention.output.dense.weight)
    begin_projections(part, attention, start, seed)
    scale_core(part, example)
    part.output.LayerNorm.load_state_dict(attention.output.LayerNorm.state_dict())
    return part


@torch.no_grad()
def trilinear_parts(
    model: nn.Module, fit: Examples, held: Examples, rank: int = 64, length: int = 32, blocks: int = 1, start: str = ROWS, seed: int = 0
) -> tuple[dict[int, TrilinearAttention], dict[int, float], dict[int, float]]:  # fmt: skip
    """T-11: for each layer of the examples an attention that is one trilinear tensor and a linear map of its lines.

    Ma et al. 2019 (arXiv 1906.09777), survey 6.3: language models that learn so from scratch. Here a layer begins as near to
    the dense one as its form allows: projections from trained rows, and the map by ridge regression onto the dense attention's
    outputs, each layer for itself. Returns the parts, to be put in place by `put_attention`, the share of the variance of the
    `held` outputs that each explains, and the ridge of each. Raises ValueError for a start that there is not, and for sizes that
    the part refuses.
    """
    layers = model.bert.encoder.layer
    made = {layer: trilinear_start(layers[layer].attention, one, rank, length, blocks, start, seed + layer)
            for layer, one in fit[0].items()}  # fmt: skip
    maps, shares, ridges = best_maps(fit, held, lambda layer, x, mask: pair_features(made[layer], x, mask))
    for layer, (weight, bias) in maps.items():
        made[layer].output.dense.weight.copy_(weight)
        made[layer].output.dense.bias.copy_(bias)
    return made, shares, ridges


def put_attention(model: nn.Module, made: dict[int, TrilinearAttention]) -> None:
    """Copies of the parts in the place of their layers' attention. In place."""
    for layer, part in made.items():
        model.bert.encoder.layer[layer].attention = copy.deepcopy(part).train(model.training)


# --- controls -------------------------------------------------------------------------------------------------------


def own_state(layer: int, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Control of what attention is for: each token's own hidden state, and nothing of the others."""
    return x


def mean_of_tokens(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """For every token the mean of x (batch, n, any) over the real tokens of its sentence; same shape."""
    real = mask.unsqueeze(-1).to(x)
    return ((x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)).expand_as(x)


def mean_of_values(model: nn.Module) -> OfLayer:
    """The mean of a layer's values, the same for every token: what attention is where all its scores are equal."""
    layers = model.bert.encoder.layer
    return lambda layer, x, mask: mean_of_tokens(layers[layer].attention.self.value(x), mask)


@torch.no_grad()
def put_mean(model: nn.Module, maps: dict[int, Map]) -> None:
    """Control of T-11: layers look at no token in particular, and add a map of the mean of all values. In place.

    `maps` are those of `mean_of_values`. Queries and keys are 0, so that all scores are equal; and since neither has a gradient
    where the other is 0, no training changes that.
    """
    for layer, (weight, bias) in maps.items():
        attention = model.bert.encoder.layer[layer].attention
        attention.output.dense.weight.copy_(weight)
        attention.output.dense.bias.copy_(bias)
        for parameter in (*attention.self.query.parameters(), *attention.self.key.parameters()):
            parameter.zero_()


@torch.no_grad()
def put_bias(model: nn.Module, examples: Examples, layers: Sequence[int]) -> None:
    """Control of T-11 with the attention off: layers add the mean of their outputs over the examples, whatever they read. In
    place.

    Values and the map behind them are 0, too, and neither has a gradient where the other is 0: no training changes that.
    """
    for layer in layers:
        seen = torch.cat([example[layer].y[example[layer].mask] for example in examples])
        attention = model.bert.encoder.layer[layer].attention
        for parameter in (*attention.self.parameters(), attention.output.dense.weight):
            parameter.zero_()
        attention.output.dense.bias.copy_(seen.mean(0))
