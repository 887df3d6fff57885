"""What every method of the chapter needs: a pre-trained BERT made longer, its layers taught what the dense attention gave, and
measurements of how time and memory grow with the length.
"""

import contextlib
import copy
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils import bert, costs, training
from utils.metrics import CONFIDENCE, Estimate, median_interval
from utils.parts.attention import ATTENTIONS, DENSE
from utils.parts.part import Part
from utils.parts.self_attention import SelfAttention

LENGTHS = tuple(2**power for power in range(8, 15))  # 256 to 16,384 tokens


# --- what a pass makes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A tensor that an operation has made: the numbers that its memory holds, its shape, the operation's name."""

    numbers: int
    shape: tuple[int, ...]
    operation: str


class Allocations(TorchDispatchMode):
    """Watches the tensors that are made inside the block, forwards and backwards; `largest` is the one of the most numbers.

    Memory counts, not shapes: a view or an expanded tensor makes nothing new. What a kernel needs for itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.largest = Made(0, (), "none")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run the operation, and look at what it gives."""
        out = operation(*args, **(kwargs or {}))
        given = {storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and storage(tensor) not in given:
                numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
                if numbers > self.largest.numbers:
                    self.largest = Made(numbers, tuple(tensor.shape), str(operation))
        return out


def storage(tensor: torch.Tensor) -> int:
    """The address of a tensor's memory, by which a view is told from something new."""
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def attention_calls(model: nn.Module) -> Iterator[Counter]:
    """Count, inside the block, how often a layer attended, by the attention that was in force when it did.

    An attention without parameters counts under its name (`linear`, or `sdpa` and `eager` of the dense one), a part under its
    kind. A training of 10 steps that really runs what a model of 6 layers carries has counted 60 of it, and nothing else.
    """
    calls = Counter()

    def count(attention: nn.Module, *_) -> None:
        calls[attention.kind if isinstance(attention, Part) else attention.config._attn_implementation] += 1

    attentions = dict.fromkeys(layer.attention.self for layer in model.base_model.encoder.layer)  # a shared one once
    handles = [attention.register_forward_pre_hook(count) for attention in attentions]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# --- what a query sees ----------------------------------------------------------------------------------------------

Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def core_of(attention: str | SelfAttention) -> Core:
    """The core of an attention, (q, k, v, text) -> outputs, shapes as in `SelfAttention.core`: a part's, or one of a name."""
    if isinstance(attention, SelfAttention):
        return attention.core
    forward = ATTENTIONS[attention].forward
    return lambda q, k, v, text: forward(None, q, k, v, text)[0].transpose(1, 2)


@torch.no_grad()
def attention_map(core: Core, q: torch.Tensor, k: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
    """The weights (heads, length, length) with which a core sums up values, for queries and keys (heads, length, head size).

    Outputs are linear in the values, so it is enough to give token j the value 1 and all others 0, for every j: a batch of
    length texts, for short ones only. `text` (length,), boolean. Rows need not sum to 1 (a Linformer's do not).
    """
    length = q.shape[1]
    text = torch.ones(length, dtype=torch.bool, device=q.device) if text is None else text
    one = torch.eye(length, dtype=q.dtype, device=q.device)[:, None, :, None]  # (j, 1, length, 1)
    q, k, v = (x.expand(length, *q.shape) for x in (q, k, one))
    found = core(q, k, v, text.expand(length, -1))
    return found[..., 0].permute(1, 2, 0)


# --- long positions -------------------------------------------------------------------------------------------------


@torch.no_grad()
def extend_positions(model: nn.Module, length: int) -> None:
    """Make a BERT that takes `length` tokens: its learned positions are copied one after the other until they suffice. In place.

    So position 512 begins as position 0, as in Beltagy et al. 2020 (arXiv 2004.05150), section 5: nearness survives within each
    copy. Raises ValueError for a length below the model's.
    """
    embeddings, before = bert.embeddings(model), model.config.max_position_embeddings
    if length < before:
        raise ValueError(f"the model takes {before} tokens already: length must be at least that, got {length}")
    learned = embeddings.position_embeddings.weight
    copies = learned.repeat(-(-length // before), 1)[:length].clone()
    embeddings.position_embeddings = nn.Embedding.from_pretrained(copies, freeze=not learned.requires_grad)
    embeddings.position_ids = torch.arange(length, device=learned.device).expand(1, -1)
    embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)
    model.config.max_position_embeddings = length


def check_length(model: nn.Module, length: int) -> None:
    """Raise ValueError for a text longer than the model's positions (transformers' own message speaks of sizes of tensors)."""
    allowed = model.config.max_position_embeddings
    if not 1 <= length <= allowed:
        raise ValueError(f"the model takes 1 to {allowed} tokens, got {length}: see extend_positions")


# --- distillation, layer by layer -----------------------------------------------------------------------------------

TRAINED = ("new", "all")


@dataclass(frozen=True)
class Recipe:
    """How long, at which rate, and what is trained: `new`, what the attentions add to queries, keys and values, or `all` of them.

    Raises ValueError for another `what` and for less than one step.
    """

    steps: int
    learning_rate: float = 1e-3
    what: str = "new"

    def __post_init__(self):
        if self.what not in TRAINED:
            raise ValueError(f"what must be one of {', '.join(TRAINED)}, got {self.what!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class LayerFit:
    """How far each layer's attention block was from the dense one before and after (`layer_errors`), and what closing in took."""

    before: list[float]
    after: list[float]
    losses: list[float]
    seconds: float


@torch.no_grad()
def dense_pairs(dense: nn.Module, batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What every layer's attention block of the dense model takes and gives: (batch, length, hidden) each."""
    pairs = []

    def keep(block: nn.Module, args: tuple, out: tuple) -> None:
        pairs.append((args[0], out[0]))

    handles = [layer.attention.register_forward_hook(keep) for layer in dense.base_model.encoder.layer]
    try:
        dense.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for handle in handles:
            handle.remove()
    return pairs


def block_losses(model: nn.Module, dense: nn.Module, batch: dict) -> torch.Tensor:
    """Squared distance of each layer's attention block from the dense one's, over the dense one's squared size: (layers,).

    Every layer gets what the dense model's layer gets, so errors do not add up. Text alone counts.
    """
    losses, mask = [], batch["attention_mask"]
    for layer, (x, wanted) in zip(model.base_model.encoder.layer, dense_pairs(dense, batch), strict=True):
        off = (layer.attention(x, mask)[0] - wanted)[mask.bool()].float()
        losses.append(off.square().sum() / wanted[mask.bool()].float().square().sum())
    return torch.stack(losses)


@torch.no_grad()
def layer_errors(model: nn.Module, dense: nn.Module, batches: list[dict]) -> list[float]:
    """`block_losses`, layer by layer, mean over batches; both models in evaluation mode. Raises ValueError for no batch."""
    training.check_batches(batches)
    device = batches[0]["input_ids"].device
    with training.autocast(device):
        return torch.stack([block_losses(model.eval(), dense.eval(), batch) for batch in batches]).mean(0).tolist()


def trained_parameters(model: nn.Module, what: str) -> list[nn.Parameter]:
    """What a recipe may change (`Recipe`), each parameter once. Raises ValueError for dense attention and where nothing is new."""
    if model.config._attn_implementation in DENSE:
        raise ValueError(f"the model's attention is still the dense {model.config._attn_implementation!r}: swap it first")
    old = ("query.", "key.", "value.")
    named = [item for layer in model.base_model.encoder.layer for item in layer.attention.self.named_parameters()]
    found = list({id(p): p for name, p in named if what == "all" or not name.startswith(old)}.values())
    if not found:
        raise ValueError("this attention has no parameters beyond queries, keys and values: train 'all'")
    return found


@contextlib.contextmanager
def only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone inside the block."""
    before = {p: p.requires_grad for p in model.parameters()}
    chosen = set(parameters)
    try:
        for p in before:
            p.requires_grad_(p in chosen)
        yield
    finally:
        for p, required in before.items():
            p.requires_grad_(required)


def distill_layers(model: nn.Module, dense: nn.Module, batches: list[dict], held_out: list[dict], recipe: Recipe) -> LayerFit:
    """Teach every swapped attention to give what the dense one gave, all layers at once, each from the dense model's states.

    One AdamW step a batch (`training.make_optimizer`), batches again from the first when they run out; the fit is measured on
    `held_out` ones. Loss: `block_losses`, summed over layers. `dense` is the model before the swap and stays as it is. Raises
    ValueError for no batches and as `trained_parameters` does.
    """
    training.check_batches(batches)
    chosen, start = trained_parameters(model, recipe.what), time.perf_counter()
    before, losses = layer_errors(model, dense, held_out), []

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return block_losses(model, dense, batch).sum()

    with only(model, chosen), training.steady_memory(), training.training_mode(model):
        optimizer, schedule = training.make_optimizer(model, recipe.steps, recipe.learning_rate)
        for batch in itertools.islice(itertools.cycle(batches), recipe.steps):
            losses.append(training.optimizer_step(model, batch, loss, optimizer))
            schedule.step()
    return LayerFit(before, layer_errors(model, dense, held_out), losses, time.perf_counter() - start)


# --- scaling: what is measured --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A measurement at one length: seconds of a pass, and the bytes that it allocates at most beyond weights and inputs."""

    length: int
    seconds: Estimate
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """Which lengths are measured, in how many rounds, and when a series ends: before a pass that would take over `limit` seconds.

    At each length there are two passes more than rounds, one that warms up and one whose memory is watched. `shortest` is the
    least that a round lasts, in seconds; a short pass is repeated in it. Raises ValueError for a plan of nothing.
    """

    lengths: tuple[int, ...] = LENGTHS
    rounds: int = 5
    limit: float = 10.0
    shortest: float = 0.05

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths must be ascending and at least 1, got {self.lengths}")
        if self.rounds < 1 or self.limit <= 0:
            raise ValueError(f"rounds must be at least 1 and limit above 0, got {self.rounds} and {self.limit}")


@dataclass(frozen=True)
class Pass:
    """Runs `forward` of a module once when called, with gradients of weights and `inputs` where wanted; it leaves none behind."""

    module: nn.Module
    forward: Callable[[], torch.Tensor]
    backward: bool = False
    dtype: torch.dtype = torch.float32
    inputs: tuple[torch.Tensor, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def __call__(self) -> None:
        """One pass, waited for."""
        with training.autocast(self.device, self.dtype), torch.enable_grad() if self.backward else torch.inference_mode():
            out = self.forward()
        if self.backward:
            out.sum().backward()
            for tensor in (*self.module.parameters(), *self.inputs):
                tensor.grad = None
        if self.device.type == "cuda":
            torch.cuda.synchronize()


Make = Callable[[int], nn.Module]  # a module for texts of a length


def layer_pass(make: Make, backward: bool = False, dtype: torch.dtype = torch.float32, batch: int = 1) -> Callable[[int], Pass]:
    """A pass through a self-attention alone, projections included: from a length to its `Pass` over random states.

    `make` gives the module; that of an attention without parameters is `named`. With `backward`, gradients of the states and of
    all weights too. `dtype` is the precision of the products, under autocast.
    """

    def at(length: int) -> Pass:
        attention = make(length)
        weight = attention.query.weight
        x = torch.randn(batch, length, weight.shape[1], generator=torch.Generator().manual_seed(length)).to(weight.device)
        x.requires_grad_(backward)
        return Pass(attention, lambda: attention(x, None)[0], backward, dtype, (x,))

    return at


def model_pass(make: Make, backward: bool = False, dtype: torch.dtype = torch.float32, batch: int = 1) -> Callable[[int], Pass]:
    """A pass through a whole model, as `layer_pass`. Raises ValueError for a length beyond its positions."""

    def at(length: int) -> Pass:
        model = make(length)
        check_length(model, length)
        inputs = costs.example_inputs(model, batch, length, next(model.parameters()).device)
        return Pass(model, lambda: model(**inputs).logits, backward, dtype)

    return at


def named(attention: nn.Module, name: str) -> nn.Module:
    """A copy of a BERT's self-attention that runs the attention of that name (`sdpa`, `linear`, ...)."""
    attention = copy.deepcopy(attention)
    attention.config._attn_implementation = name
    return attention


# --- scaling: measuring ---------------------------------------------------------------------------------------------


def measure_scaling(passes: dict[str, Callable[[int], Pass]], plan: Plan | None = None) -> dict[str, list[Point]]:
    """Time and peak memory of several passes over the lengths of a plan. At each length all of them are timed in turns, so that
    a busy machine hurts all alike; a series ends before the first pass that is expected to exceed the limit.
    """
    plan = plan or Plan()
    series: dict[str, list[Point]] = {name: [] for name in passes}
    with training.steady_memory():
        for length in plan.lengths:
            running = [name for name in passes if expected_seconds(series[name], length) <= plan.limit]
            runs = {name: passes[name](length) for name in running}
            seconds = in_turns(runs, plan)
            for name, run in runs.items():
                peak = costs.highest_allocation(run, run.device)
                series[name].append(Point(length, median_interval(seconds[name]), peak))
    return series


def expected_seconds(points: list[Point], length: int) -> float:
    """What a pass at a greater length should take, by the slope of the last two points in logarithms, between 1 and 2.

    With a single point the slope is 2; with none nothing is known, and 0 is returned.
    """
    if not points:
        return 0.0
    slope = 2.0
    if len(points) > 1:
        (n, t), (m, u) = ((p.length, p.seconds.value) for p in points[-2:])
        slope = min(2.0, max(1.0, math.log(u / t) / math.log(m / n)))
    return points[-1].seconds.value * (length / points[-1].length) ** slope


def in_turns(runs: dict[str, Pass], plan: Plan) -> dict[str, list[float]]:
    """Seconds of a pass, a list over rounds per name. The first pass of each, which warms up, says how often to repeat it."""
    times = {name: max(elapsed(run, 1), 1e-9) for name, run in runs.items()}
    repeats = {name: max(1, round(plan.shortest / first)) for name, first in times.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(plan.rounds):
        for name in order[number % len(order) :] + order[: number % len(order)] if order else ():
            seconds[name].append(elapsed(runs[name], repeats[name]))
    return seconds


def elapsed(run: Pass, repeats: int) -> float:
    """Seconds of one run, mean over repeats."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


# --- scaling: reading -----------------------------------------------------------------------------------------------


def fitted_exponent(lengths: Sequence[float], values: Sequence[float]) -> Estimate:
    """The b of values = a * lengths^b by least squares in logarithms, with Student's interval over n - 2 degrees of freedom.

    The interval speaks of the scatter around one power law. Raises ValueError for less than three points.
    """
    if len(lengths) < 3:
        raise ValueError(f"an exponent with an interval needs three points or more, got {len(lengths)}")
    fit = stats.linregress(np.log(lengths), np.log(values))
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(lengths) - 2) * fit.stderr
    return Estimate(float(fit.slope), float(fit.slope - half), float(fit.slope + half), len(lengths))


def exponents(points: list[Point], first: int = 2048, last: int = 16384) -> dict[str, Estimate]:
    """How time and peak memory grow between two lengths: `seconds` and `peak_bytes`. See `fitted_exponent`."""
    inside = [p for p in points if first <= p.length <= last]
    lengths = [p.length for p in inside]
    return {"seconds": fitted_exponent(lengths, [p.seconds.value for p in inside]),
            "peak_bytes": fitted_exponent(lengths, [p.peak_bytes for p in inside])}  # fmt: skip


def overtakes(method: list[Point], dense: list[Point]) -> float | None:
    """The length from which a method is the faster one, up to the greatest length at which both were measured.

    Between two lengths both times are taken as straight lines in logarithms. The shortest length where it always is the faster
    one; None where it is not so even at the greatest.
    """
    seconds = {p.length: p.seconds.value for p in method}
    ratios = [(p.length, math.log(seconds[p.length] / p.seconds.value)) for p in dense if p.length in seconds]
    behind = [index for index, (_, ratio) in enumerate(ratios) if ratio >= 0]
    if not ratios or ratios[-1][1] >= 0:
        return None
    if not behind:
        return float(ratios[0][0])
    (n, a), (m, b) = ratios[behind[-1] : behind[-1] + 2]
    return math.exp(math.log(n) + a / (a - b) * math.log(m / n))
