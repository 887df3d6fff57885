"""Encoders of one layer that is applied again and again, as often as the data ask. Each stands at `bert.encoder`.

In an `AdaptiveEncoder` every token halts by itself; an `EquilibriumEncoder` looks for the states that its layer leaves as they
are. The one layer stands in a list, `layer`, where the rest of the suite looks for a BERT's layers.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
from torch import nn
from transformers import BertConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from utils import structure
from utils.header import check_bert
from utils.parts.attention import ATTENTIONS, STOCK, attention_macs
from utils.parts.part import Part

SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps", "hidden_dropout_prob",
         "attention_probs_dropout_prob")  # fmt: skip


# --- one layer, many times ------------------------------------------------------------------------------------------


def real_tokens(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens are no padding, boolean (batch, length): those that some query may look at.

    The mask comes in the form that the model's attention takes: none, (batch, length), or (batch, 1, queries, keys), which is
    boolean or added to the scores.
    """
    if attention_mask is None:
        return torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    if attention_mask.dim() == 2:
        return attention_mask.bool()
    if attention_mask.dtype != torch.bool:
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return attention_mask.any(dim=(1, 2)).expand(hidden_states.shape[:2])


def macs_inside(module: nn.Module, length: int) -> int:
    """Multiply-adds of one pass through the linear layers, attention cores and parts inside a module."""
    if isinstance(module, Part):
        return module.macs(length)
    if isinstance(module, nn.Linear):
        return length * module.in_features * module.out_features
    core = 0
    if isinstance(module, BertSelfAttention):
        name = module.config._attn_implementation
        core = attention_macs(name, length, module.num_attention_heads, module.attention_head_size)
    return core + sum(macs_inside(child, length) for child in module.children())


def check_sizes(sizes: dict) -> None:
    """Raise ValueError for sizes beyond those of a layer, and for an attention that is in no table: transformers would fetch it."""
    attention = sizes.get("attn_implementation", "sdpa")
    if attention not in (*STOCK, *ATTENTIONS):
        raise ValueError(f"the attention must be one of {', '.join((*STOCK, *ATTENTIONS))}, got {attention!r}")
    if not set(sizes) <= {*SIZES, "attn_implementation"}:
        raise ValueError(f"the sizes of a layer are {', '.join(SIZES)}, got {', '.join(sizes)}")
    check_bert({name: value for name, value in sizes.items() if name in SIZES})


class OneLayerEncoder(Part):
    """Base: holds one BERT layer. `sizes` are those of its `BertConfig` (`SIZES`), `heads` the attention heads it has left.

    Raises ValueError for more heads than the sizes allow, and for sizes that are none of a layer. While `passes` is a list, every
    pass of the encoder adds its record to it (`utils.sharing.layers.watch_passes`).
    """

    adaptive = True

    def __init__(self, sizes: dict, heads: int):
        super().__init__()
        check_sizes(sizes)
        config = BertConfig(**{"attn_implementation": "sdpa", **sizes})
        self.sizes, self.layer, self.passes = dict(sizes), nn.ModuleList([BertLayer(config)]), None
        if heads != config.num_attention_heads:
            structure.remove_heads(SimpleNamespace(bert=SimpleNamespace(encoder=self)), {0: torch.arange(heads)})

    @classmethod
    def around(cls, layer: BertLayer, config: BertConfig, **options) -> "OneLayerEncoder":
        """An encoder that applies a copy of a layer of the model with that configuration, under that model's attention."""
        sizes = {name: getattr(config, name) for name in SIZES} | {"intermediate_size": layer.intermediate.dense.out_features}
        part = cls(sizes, layer.attention.self.num_attention_heads, **options).to(next(layer.parameters()))
        part.layer[0].load_state_dict(layer.state_dict())
        part.layer[0].attention.self.config = config  # the model's own: whoever changes its attention changes it here
        return part

    def options(self) -> dict:
        """The layer's sizes, heads and neurons as they are now, and its attention where it is none of the stock ones."""
        attention, name = self.layer[0].attention.self, self.layer[0].attention.self.config._attn_implementation
        own = {"attn_implementation": name} if name in ATTENTIONS else {}
        neurons = self.layer[0].intermediate.dense.out_features
        sizes = {name: self.sizes[name] for name in SIZES} | {"intermediate_size": neurons} | own
        return {"sizes": sizes, "heads": attention.num_attention_heads}

    def note(self, one_pass: object) -> None:
        """Keep the record of a pass, where somebody watches."""
        if self.passes is not None:
            self.passes.append(one_pass)


# --- S-17 adaptive computation time ---------------------------------------------------------------------------------

Step = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # (number, states) -> probabilities to halt, new states


@dataclass
class Halting:
    """Which tokens of a batch still run, and what each has spent; all tensors (batch, length).

    `spent` is the probability that a token has used up, `updates` counts its steps N, `remainder` is the R that was left for
    its last one, `real` tells tokens from padding. Graves 2016 (arXiv 1603.08983), section 2.
    """

    running: torch.Tensor
    spent: torch.Tensor
    updates: torch.Tensor
    remainder: torch.Tensor
    real: torch.Tensor

    @classmethod
    def begin(cls, real: torch.Tensor, dtype: torch.dtype) -> "Halting":
        """All real tokens run; padding has halted before the first step, so that it keeps no batch running."""
        zeros = torch.zeros(real.shape, dtype=dtype, device=real.device)
        return cls(real, zeros, zeros, zeros, real)

    def step(self, p: torch.Tensor, threshold: float, last: bool = False) -> torch.Tensor:
        """Weights of this step's states: p while a token runs on, what is left of 1 where it halts, 0 afterwards.

        A token halts where p would take it beyond the threshold, and in the `last` step: its weights always sum to 1.
        """
        halts = self.running & ((self.spent + p > threshold) | last)
        left = 1 - self.spent
        weights = torch.where(halts, left, p) * self.running
        self.updates = self.updates + self.running
        self.remainder = self.remainder + left * halts
        self.spent = self.spent + weights
        self.running = self.running & ~halts
        return weights


def ponder_cost(halting: Halting) -> torch.Tensor:
    """Mean of N + R over the real tokens, a scalar; its gradient is that of R, since N is a count. Graves 2016, section 2."""
    return ((halting.updates + halting.remainder) * halting.real).sum() / halting.real.sum()


def adaptive_computation(
    step: Step, states: torch.Tensor, real: torch.Tensor, max_steps: int, threshold: float = 0.99, blend: bool = False,
    copy_halted: bool = False,
) -> tuple[torch.Tensor, Halting]:  # fmt: skip
    """Repeat `step` on states (batch, length, hidden) until every real token has halted, at most `max_steps` times.

    Returns, in the shape of the states, sum_i p_i x_i over each token's steps (Graves 2016; `accumulated` in the code of
    Dehghani et al. 2018), or with `blend` what their listing does: x <- p_i x_i + (1 - p_i) x, from zero, whose weights sum to
    less than 1. Halted tokens are carried through the step, since others look at them; with `copy_halted` these see the sum
    with which a token halted, as section 2 of that paper says and its code does not. Padding becomes zero.
    """
    mixed, halting = torch.zeros_like(states), Halting.begin(real, states.dtype)
    for number in range(max_steps):
        p, states = step(number, states)
        weights = halting.step(p, threshold, last=number == max_steps - 1).unsqueeze(-1)
        mixed = weights * states + ((1 - weights) * mixed if blend else mixed)
        if copy_halted:
            states = torch.where(halting.running.unsqueeze(-1), states, mixed)
        if not halting.running.any():
            break
    return mixed, halting


class AdaptiveEncoder(OneLayerEncoder):
    """A Universal Transformer's encoder: one layer with adaptive computation time.

    Dehghani et al. 2018 (arXiv 1807.03819), survey 5.3. Each step adds its embedding (zero at first) to the states, reads off
    the probability to halt, sigmoid(w x + b), and applies the layer. The authors' code has a threshold of 1 - 0.01, b = 1 at
    first, a weight of 0.01 on the ponder cost, and at most twice as many steps as a Transformer has layers. Here BERT's own
    position embeddings stand below, so that steps add none; and where the steps end, a token's last one takes what is left of
    1, which the authors' code drops. Without `copy_halted` a token's halting has no part in what others see: of a classifier
    that reads one token, only that token's halting counts. Raises ValueError for less than one step and for a threshold outside (0, 1).
    """

    kind = "adaptive_encoder"

    def __init__(
        self, sizes: dict, heads: int, max_steps: int = 6, threshold: float = 0.99, blend: bool = False, copy_halted: bool = False
    ):
        super().__init__(sizes, heads)
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        if not 0 < threshold < 1:
            raise ValueError(f"the threshold must lie between 0 and 1, got {threshold}")
        self.max_steps, self.threshold, self.blend, self.copy_halted = max_steps, threshold, blend, copy_halted
        self.step_embeddings = nn.Parameter(torch.zeros(max_steps, sizes["hidden_size"]))
        self.halt = nn.Linear(sizes["hidden_size"], 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.ones_(self.halt.bias)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None,
                **kwargs) -> BaseModelOutputWithPastAndCrossAttentions:  # fmt: skip
        """(batch, length, hidden) to the same shape."""

        def step(number: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            states = states + self.step_embeddings[number]
            p = self.halt(states).squeeze(-1).to(hidden_states.dtype).sigmoid()  # summed up: bfloat16 would not do
            return p, self.layer[0](states, attention_mask)

        real = real_tokens(hidden_states, attention_mask)
        how = (self.max_steps, self.threshold, self.blend, self.copy_halted)
        mixed, halting = adaptive_computation(step, hidden_states, real, *how)
        self.note(halting)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=mixed)

    def options(self) -> dict:
        """The layer, the most steps, the threshold, how steps are joined, and what others see of a token that halted."""
        names = ("max_steps", "threshold", "blend", "copy_halted")
        return super().options() | {name: getattr(self, name) for name in names}

    def macs(self, length: int) -> int:
        """The most that a sequence can take: the layer and the halting unit in every step."""
        return self.max_steps * (macs_inside(self.layer, length) + macs_inside(self.halt, length))


# --- S-18 fixed points ----------------------------------------------------------------------------------------------


Map = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Solution:
    """Where a solver ended: `fixed_point` x, `image` f(x), both in the shape of the start, and the way there.

    `residuals` (iterations, batch) are |f(x) - x| / |f(x)| after each evaluation of f; that of a finished example stays.
    """

    fixed_point: torch.Tensor
    image: torch.Tensor
    residuals: torch.Tensor

    @property
    def iterations(self) -> torch.Tensor:
        """Evaluations of f up to the lowest residual of each example, (batch,)."""
        return self.residuals.argmin(0) + 1


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (1965; Walker and Ni 2011): x = f(x), solved from the last `window` states and gaps f(x) - x.

    Every state is moved by `mixing` of its gap before the next one is extrapolated. A window of 1 is the plain iteration,
    damped where mixing is below 1. Raises ValueError for values that make no solver.
    """

    max_iterations: int = 24
    tolerance: float = 1e-2
    window: int = 5
    mixing: float = 1.0
    ridge: float = 1e-6

    def __post_init__(self):
        if not type(self.max_iterations) is type(self.window) is int:
            raise ValueError(f"max_iterations and window must be whole numbers, got {self.max_iterations} and {self.window}")
        if self.max_iterations < 1 or self.window < 1:
            raise ValueError(f"max_iterations and window must be at least 1, got {self.max_iterations} and {self.window}")
        if not 0 < self.mixing <= 1:
            raise ValueError(f"mixing must lie in (0, 1], got {self.mixing}")
        if self.tolerance < 0 or self.ridge < 0:
            raise ValueError(f"tolerance and ridge must not be negative, got {self.tolerance} and {self.ridge}")


def extrapolate(gaps: list[torch.Tensor], moved: list[torch.Tensor], ridge: float) -> torch.Tensor:
    """Anderson's next state, (batch, size): sum_i a_i moved_i with the a, summing to 1, for which |sum_i a_i gap_i| is least.

    `gaps` and `moved` are a few of (batch, size) each. a is proportional to (G G' + ridge I)^-1 1, with the gaps in the rows of
    G, scaled to a mean square of 1.
    """
    with torch.autocast(gaps[0].device.type, enabled=False):  # residuals are small differences
        G = torch.stack(gaps, 1)
        gram = G @ G.transpose(1, 2)  # (batch, few, few)
        scale = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=torch.finfo(gram.dtype).tiny)
        gram = gram / scale[:, None, None] + ridge * torch.eye(len(gaps), dtype=gram.dtype, device=gram.device)
        a = torch.linalg.solve(gram, torch.ones_like(gram[..., 0]))
        a = a / a.sum(-1, keepdim=True)
        return (a[:, None] @ torch.stack(moved, 1))[:, 0]


@torch.no_grad()
def find_fixed_point(f: Map, start: torch.Tensor, solver: Anderson) -> Solution:
    """A fixed point x = f(x) for each example of a batch, from `start`, (batch, ...); without gradients.

    An example is done once its relative residual is within the tolerance, whatever the others do. Of each the state with the
    lowest residual is returned, be it within the tolerance or not.
    """
    x, best, image = start, start, start
    lowest = start.new_full((len(start),), torch.inf)
    residuals, gaps, moved = [], [], []
    for _ in range(solver.max_iterations):
        x = extrapolate(gaps, moved, solver.ridge).view_as(start) if gaps else start
        found = f(x)
        gap = (found - x).flatten(1)
        residual = gap.norm(dim=1) / found.flatten(1).norm(dim=1).clamp(min=torch.finfo(gap.dtype).tiny)
        running = lowest > solver.tolerance
        better = (running & (residual < lowest)).view(-1, *[1] * (start.dim() - 1))
        best, image = torch.where(better, x, best), torch.where(better, found, image)
        residuals.append(torch.where(running, residual, lowest))
        lowest = torch.where(running, residual.minimum(lowest), lowest)
        if (lowest <= solver.tolerance).all():
            break
        gaps = [*gaps, gap][-solver.window :]
        moved = [*moved, x.flatten(1) + solver.mixing * gap][-solver.window :]
    return Solution(best, image, torch.stack(residuals))


@dataclass
class EquilibriumPass:
    """A pass of an equilibrium encoder: the map `f`, its solution, and that of the adjoint system once there was a backward
    pass. `real` (batch, length, 1) tells tokens from padding.
    """

    f: Map
    real: torch.Tensor
    forward: Solution
    backward: Solution | None = None


def vector_jacobian(f: Map, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The function v -> v' J with the Jacobian J of f at x; v and v' J have the shape of x. f is evaluated once."""
    at = x.detach().requires_grad_()
    image = f(at)
    return lambda v, create_graph=False: torch.autograd.grad(image, at, v, retain_graph=True, create_graph=create_graph)[0]


def implicit(one: EquilibriumPass, solver: Anderson) -> torch.Tensor:
    """f at the fixed point of a pass, with the gradient of the fixed point: as if every iteration had been kept.

    x* = f(x*) gives dL/dw = g' df/dw, where g = J' g + dL/dx*. A hook turns dL/dx* into g on its way back, by the solver that
    also found x*. What is kept is one application of f, and a second one for the products with J. Bai et al. 2019, theorem 1.
    """
    output = one.f(one.forward.fixed_point)
    if output.requires_grad:
        times_jacobian = vector_jacobian(one.f, one.forward.fixed_point)

        def adjoint(gradient: torch.Tensor) -> torch.Tensor:
            one.backward = find_fixed_point(lambda g: times_jacobian(g) + gradient, torch.zeros_like(gradient), solver)
            return one.backward.image

        output.register_hook(adjoint)
    return output


def jacobian_penalty(one: EquilibriumPass) -> torch.Tensor:
    """|v' J|^2 per number of the states, v random normal: Hutchinson's estimate of |J|_F^2, a scalar with a graph.

    Where it is small, iterations converge. Bai, Koltun and Kolter 2021 (arXiv 2106.14342).
    """
    v = torch.randn_like(one.forward.fixed_point)
    product = vector_jacobian(one.f, one.forward.fixed_point)(v, create_graph=True)
    return product.square().sum() / (one.real.sum() * v.shape[-1])


class EquilibriumEncoder(OneLayerEncoder):
    """A deep equilibrium model's encoder: the states x* = layer(x* + W x) that one layer leaves as they are, x being its input.

    Bai, Kolter and Koltun 2019 (arXiv 1909.01377), survey 5.3. W, the identity at first, injects the input; options beyond the
    layer's are those of `Anderson`, which solves forwards and backwards. BERT's layer ends in a LayerNorm, so its image is
    bounded and a fixed point exists (Brouwer); nothing says that there is but one, or that an iteration finds it. The layer has
    no dropout: it would be another function in every iteration. A tolerance below 0.004 is beyond what bfloat16 can resolve.

    With `unrolled` passes it is the control: that many plain iterations from zero, all kept for the backward pass, no solver.
    Raises ValueError where they are negative.
    """

    kind = "equilibrium_encoder"

    def __init__(self, sizes: dict, heads: int, unrolled: int = 0, **solver: float):
        if unrolled < 0:
            raise ValueError(f"unrolled must not be negative, got {unrolled}")
        super().__init__({**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, heads)
        self.unrolled, self.solver = unrolled, Anderson(**solver)
        self.inject = nn.Linear(sizes["hidden_size"], sizes["hidden_size"], bias=False)
        nn.init.eye_(self.inject.weight)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None,
                **kwargs) -> BaseModelOutputWithPastAndCrossAttentions:  # fmt: skip
        """(batch, length, hidden) to the same shape; padding is zero and has no part in residuals."""
        real = real_tokens(hidden_states, attention_mask).unsqueeze(-1)
        injected = self.inject(hidden_states)

        def f(states: torch.Tensor) -> torch.Tensor:
            return torch.where(real, self.layer[0](states + injected, attention_mask), 0.0)

        if self.unrolled:
            states = torch.zeros_like(hidden_states)
            for _ in range(self.unrolled):
                states = f(states)
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)
        one = EquilibriumPass(f, real, find_fixed_point(f, torch.zeros_like(hidden_states), self.solver))
        states = implicit(one, self.solver) if torch.is_grad_enabled() else one.forward.image
        self.note(one)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)

    def options(self) -> dict:
        """The layer, the passes of the control, and the solver."""
        return super().options() | {"unrolled": self.unrolled} | asdict(self.solver)

    def macs(self, length: int) -> int:
        """The most that a sequence can take: the injection, the layer in every iteration, and the extrapolations between."""
        if self.unrolled:
            return macs_inside(self.inject, length) + self.unrolled * macs_inside(self.layer, length)
        few = [min(done, self.solver.window) for done in range(1, self.solver.max_iterations)]
        extrapolations = length * self.inject.in_features * sum(n * n + n for n in few)
        layers = self.solver.max_iterations * macs_inside(self.layer, length)
        return macs_inside(self.inject, length) + layers + extrapolations
