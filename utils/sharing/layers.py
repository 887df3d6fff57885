"""Survey section 5.3: one layer's weights at every depth (ALBERT), as many steps as a token needs (Universal Transformer), as
many as a fixed point needs (deep equilibrium model).

Layers are numbered from 0. All three begin with the layers of a pre-trained BERT, for which one layer must stand: `start_layer`
says which. The encoders of the last two are parts, in `utils.parts.depth`.
"""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import layer_norm
from transformers.masking_utils import create_bidirectional_mask

from utils import bert, costs
from utils.claims import Evidence, exact
from utils.metrics import Estimate
from utils.parts.depth import (
    AdaptiveEncoder,
    EquilibriumEncoder,
    OneLayerEncoder,
    jacobian_penalty,
    ponder_cost,
    vector_jacobian,
)
from utils.structure import tie
from utils.training import Loss, autocast, check_batches, cross_entropy

PIECES = {"all": ("attention", "intermediate", "output"), "ffn": ("intermediate", "output"), "attention": ("attention",)}
STARTS = ("mean", "least_squares")  # besides the number of a layer

Start = str | int


# --- S-16 cross-layer sharing ---------------------------------------------------------------------------------------


def share_layers(
    model: nn.Module, what: str = "all", groups: int = 1, start: Start = "mean", batches: list[dict] | None = None
) -> None:
    """One set of weights for all layers of a group, in place: of everything, or of the `ffn` or the `attention` block alone.

    Each block goes with its LayerNorm. The groups are equal and consecutive, one of all layers by default. What a group shares
    begins as `start_layer` says. Lan et al. 2019 (arXiv 1909.11942), survey 5.3. Raises ValueError for another `what` or start,
    for groups that do not divide the layers, and for layers of unlike shapes.
    """
    if what not in PIECES:
        raise ValueError(f"what must be one of {', '.join(PIECES)}, got {what!r}")
    members = layer_groups(len(model.bert.encoder.layer), groups)
    starts = [start_layer(model, group, start, batches) for group in members]  # all of them seen in the model as it was
    for group, layer in zip(members, starts, strict=True):
        for piece in PIECES[what]:
            first = model.bert.encoder.layer[group[0]].get_submodule(piece)
            first.load_state_dict(layer.get_submodule(piece).state_dict())
            for path, module in first.named_modules(prefix=piece):
                for number in group[1:] if module._parameters else ():  # leaves: layers and their attentions stay their own
                    tie(model, f"bert.encoder.layer.{number}.{path}", f"bert.encoder.layer.{group[0]}.{path}")


def layer_groups(num_layers: int, groups: int) -> list[list[int]]:
    """Consecutive layers in equal groups. Raises ValueError where the groups do not divide the layers."""
    if groups < 1 or num_layers % groups:
        raise ValueError(f"groups must divide the {num_layers} layers, got {groups}")
    size = num_layers // groups
    return [list(range(first, first + size)) for first in range(0, num_layers, size)]


def shared_share(model: nn.Module) -> float:
    """Which share of the encoder's weights, counted at every depth, is a layer's that is stored elsewhere already."""
    layers = model.bert.encoder.layer
    passed = sum(p.numel() for layer in layers for p in layer.parameters())
    return 1 - sum(p.numel() for p in layers.parameters()) / passed


def start_layer(model: nn.Module, group: list[int], start: Start = "mean", batches: list[dict] | None = None) -> nn.Module:
    """A layer to begin with in place of a group of layers.

    `mean` is that of their weights; `least_squares` needs calibration batches (`least_squares_layer`); a number k copies the
    group's k-th layer. Neurons and heads of different layers have no common order, so a mean of layers is no layer between
    them. Raises ValueError for another start, and for layers of unlike shapes.
    """
    layers = [model.bert.encoder.layer[number] for number in group]
    if len({tuple(p.shape for p in layer.parameters()) for layer in layers}) > 1:
        raise ValueError("layers with unlike heads or neurons cannot share weights: cut all layers alike, or after sharing")
    if isinstance(start, int) and 0 <= start < len(group):
        return copy.deepcopy(layers[start])
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, or a number from 0 to {len(group) - 1}, got {start!r}")
    mean = copy.deepcopy(layers[0])
    states = [layer.state_dict() for layer in layers]
    mean.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return mean if start == "mean" else least_squares_layer(model, group, mean, batches or [])


# --- S-16 a layer fitted by least squares ---------------------------------------------------------------------------


def by_system(module: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Values (n, size) in the systems of equations that they belong to: one, (1, n, size), for a linear layer; for a LayerNorm
    one of each unit, (size, n, 1).
    """
    return values.t().unsqueeze(-1) if isinstance(module, nn.LayerNorm) else values.unsqueeze(0)


def design(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a module's output is linear in, by system: its inputs (n, in), normalised by a LayerNorm, with a 1 appended."""
    if isinstance(module, nn.LayerNorm):
        x = layer_norm(x, module.normalized_shape, eps=module.eps)
    x = by_system(module, x)
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def normal_equations(model: nn.Module, group: list[int], batches: list[dict]) -> dict[str, list[torch.Tensor]]:
    """A = sum x x' and B = sum x y' over all real tokens and layers of a group, float64, by a module's path in its layer.

    x is the `design` of a module's inputs at a depth, y what the module of that depth makes of them.
    """
    sums, real = defaultdict(lambda: [0.0, 0.0]), torch.empty(0)

    def add(path: str, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = design(module, x[real]), by_system(module, y[real])
        for place, product in enumerate((x.mT @ x, x.mT @ y)):
            sums[path][place] = sums[path][place] + product.double()

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for number in group:
            for path, module in model.bert.encoder.layer[number].named_modules():
                if isinstance(module, nn.Linear | nn.LayerNorm):
                    hooks.enter_context(module.register_forward_hook(lambda m, args, y, path=path: add(path, m, args[0], y)))
        for batch in batches:
            real = batch["attention_mask"].bool()
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return sums


@torch.no_grad()
def least_squares_layer(
    model: nn.Module, group: list[int], near: nn.Module, batches: list[dict], ridge: float = 1e-3
) -> nn.Module:
    """The layer whose every matrix and LayerNorm comes closest to what those of a group make of their own inputs.

    Least |W x - W_l x|^2 over the layers l and the inputs x that each has in the model, W staying `near` where the inputs say
    nothing (the ridge is a share of their mean square): a mean in which a layer counts where its inputs lie. Jin et al. 2022
    (arXiv 2212.09849) merge whole models so; here it is the layers of one. Raises ValueError for no batches.
    """
    check_batches(batches)
    fitted = copy.deepcopy(near)
    for path, (A, B) in normal_equations(model, group, batches).items():
        module = fitted.get_submodule(path)
        first = by_system(module, torch.cat([torch.atleast_2d(module.weight.t()), module.bias[None]])).double()
        square = A.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        left = A + ridge * square * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        best = first + torch.linalg.solve(left, B - A @ first)
        best = best.squeeze(-1).t() if isinstance(module, nn.LayerNorm) else best.squeeze(0)  # (in + 1, out), (2, units)
        module.weight.copy_(best[:-1].t().reshape(module.weight.shape))
        module.bias.copy_(best[-1])
    return fitted


# --- S-16 a layer distilled -----------------------------------------------------------------------------------------


def layer_errors(model: nn.Module, teacher: nn.Module, batch: dict) -> torch.Tensor:
    """How badly each layer of a model does on the teacher's input of that depth, (layers,), with gradients.

    The squared distance to the teacher's output over that between the teacher's input and output: 0 is the same, 1 no better
    than passing the input on. Padding does not count.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = teacher.eval()(**inputs, output_hidden_states=True).hidden_states
    mask = create_bidirectional_mask(config=model.config, inputs_embeds=states[0], attention_mask=batch["attention_mask"])
    real = batch["attention_mask"].bool()
    return torch.stack([(layer(x, mask) - y)[real].square().sum() / (x - y)[real].square().sum()
                        for layer, x, y in zip(model.bert.encoder.layer, states[:-1], states[1:], strict=True)])  # fmt: skip


def reproduce_layers(
    model: nn.Module, teacher: nn.Module, batches: list[dict], steps: int, learning_rate: float = 1e-3
) -> list[float]:
    """Train the layers, in place and without labels, to make of the teacher's input at each depth what the teacher makes of it.

    Returns the mean of `layer_errors` at each step (Adam, rate falling to 0). For shared layers it is the distilled start.
    Raises ValueError for no batches.
    """
    check_batches(batches)
    optimizer = torch.optim.Adam(model.bert.encoder.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
    errors = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        with autocast(batch["input_ids"].device), bert.fastest_attention(model, "eager"):
            loss = layer_errors(model.eval(), teacher, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        errors.append(loss.item())
    return errors


@torch.inference_mode()
def mean_loss(model: nn.Module, batches: list[dict]) -> float:
    """Cross-entropy per sentence over some batches. Raises ValueError for no batches."""
    check_batches(batches)
    with autocast(batches[0]["input_ids"].device):
        losses = [cross_entropy(model.eval(), batch).item() * len(batch["labels"]) for batch in batches]
    return sum(losses) / sum(len(batch["labels"]) for batch in batches)


def start_losses(
    model: nn.Module, calibration: list[dict], batches: list[dict], what: str = "all", groups: int = 1, steps: int = 30
) -> dict[str, float]:
    """Cross-entropy on `batches` of every start of shared layers, before any training; `not shared` is the model itself.

    `calibration` is what the fitted starts look at; `distilled` takes `steps` of `reproduce_layers` after least squares.
    """
    size = len(layer_groups(len(model.bert.encoder.layer), groups)[0])
    starts = {"mean": "mean", "least squares": "least_squares", **{f"layer {k}": k for k in range(size)}}
    losses = {"not shared": mean_loss(model, batches)}
    for name, start in starts.items():
        shared = bert.fresh_copy(model)
        share_layers(shared, what, groups, start, calibration)
        losses[name] = mean_loss(shared, batches)
        if start == "least_squares":
            reproduce_layers(shared, model, calibration, steps)
            losses["distilled"] = mean_loss(shared, batches)
    return losses


# --- S-16 what sharing does -----------------------------------------------------------------------------------------


def depth_gradients(model: nn.Module, batch: dict, what: str = "all") -> torch.Tensor:
    """The loss gradient of each depth as if its layer had weights of its own, (layers, weights of `what` in a layer).

    Where all layers share one set of weights, its gradient is the sum over the depths.
    """
    single = bert.fresh_copy(model)
    config = {id(single.config): single.config}  # one for all: it names the attention
    single.bert.encoder.layer = nn.ModuleList(copy.deepcopy(layer, dict(config)) for layer in single.bert.encoder.layer)
    cross_entropy(single, batch).backward()
    return torch.stack([torch.cat([p.grad.flatten() for piece in PIECES[what] for p in layer.get_submodule(piece).parameters()])
                        for layer in single.bert.encoder.layer])  # fmt: skip


def agreement(gradients: torch.Tensor) -> float:
    """Mean cosine between the gradients (depths, weights) of two depths: 1 where all want the same, 0 where unrelated."""
    unit = nn.functional.normalize(gradients.flatten(1), dim=1)
    cosines = unit @ unit.T
    return cosines[~torch.eye(len(unit), dtype=torch.bool, device=unit.device)].mean().item()


def smaller_not_cheaper(dense: nn.Module, shared: nn.Module, length: int = 32) -> list[Evidence]:
    """Arithmetic for the claim that sharing cuts bytes and no multiply-adds: both models in weights and in work."""
    before, after = (sum(p.numel() for p in model.bert.encoder.parameters()) for model in (dense, shared))
    work = costs.macs(shared, length) / costs.macs(dense, length)
    return [Evidence("weights of the encoder, dense over shared", exact(before / after), "above", 1.0),
            Evidence("multiply-adds saved, share of the dense model's", exact(1 - work), "below", 0.001)]  # fmt: skip


def same_speed(what: str, speed: Estimate, margin: float = 0.05) -> list[Evidence]:
    """Two one-sided tests for "the latency stays": the speed against the dense model, over rounds, within a margin of 1."""
    return [Evidence(f"{what}: speed over the dense model's", speed, "above", 1 - margin),
            Evidence(f"{what}: the same", speed, "below", 1 + margin)]  # fmt: skip


# --- S-17 Universal Transformer -------------------------------------------------------------------------------------


def universal(
    model: nn.Module, start: Start = "mean", batches: list[dict] | None = None, halting_bias: float = 1.0, **options
) -> None:
    """Replace the encoder, in place, by one layer that every token passes as often as it needs (`AdaptiveEncoder`).

    `halting_bias` b is where halting begins, p = sigmoid(b): 1 in the authors' code, which lets tokens go after two steps; a
    negative one keeps the depth of the pre-trained model at first. Options are `max_steps` (by default the model's layers),
    `threshold`, `blend` and `copy_halted`. A model whose layers are shared already begins with that layer. Survey 5.3.
    """
    layers = len(model.bert.encoder.layer)
    layer = start_layer(model, list(range(layers)), start, batches)
    encoder = AdaptiveEncoder.around(layer, model.config, **{"max_steps": layers, **options})
    nn.init.constant_(encoder.halt.bias, halting_bias)
    replace_encoder(model, encoder)


def replace_encoder(model: nn.Module, encoder: OneLayerEncoder) -> None:
    """Put an encoder of one layer in place."""
    model.bert.encoder = encoder
    model.config.num_hidden_layers = 1


@contextlib.contextmanager
def watch_passes(model: nn.Module) -> Iterator[list]:
    """Inside the block every pass of the encoder adds its record to the list: `Halting`, or `EquilibriumPass`.

    Raises ValueError for a model without such an encoder.
    """
    encoder = model.bert.encoder
    if not isinstance(encoder, OneLayerEncoder):
        raise ValueError("the model's encoder applies every layer once: see universal and equilibrium")
    encoder.passes = []
    try:
        yield encoder.passes
    finally:
        encoder.passes = None


def ponder_loss(weight: float = 0.01) -> Loss:
    """Cross-entropy plus `weight` times the ponder cost N + R, a token's steps and what the last one was left with."""

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        with watch_passes(model) as passes:
            task_loss = cross_entropy(model, batch)
        return task_loss + weight * ponder_cost(passes[0])

    return loss


def halting_groups(model: nn.Module, learning_rate: float) -> list[dict]:
    """Optimiser groups for `utils.training.train`: halting unit and step embeddings, which start from nothing, learn at a rate
    of their own and without decay.
    """
    encoder = model.bert.encoder
    own = [*encoder.halt.parameters(), encoder.step_embeddings]
    rest = [p for p in model.parameters() if all(p is not one for one in own)]
    return [{"params": rest}, {"params": own, "lr": learning_rate, "weight_decay": 0.0}]


@torch.inference_mode()
def halting_map(model: nn.Module, batch: dict) -> torch.Tensor:
    """Steps that each token took, (batch, length), 0 for padding."""
    with watch_passes(model) as passes:
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return passes[0].updates.long()


def halting_numbers(model: nn.Module, batches: list[dict]) -> dict[str, float]:
    """Over real tokens the mean of their steps and its standard deviation; over sentences the mean of the longest token's.

    The last is what a sentence alone costs: a token that has halted is carried on until the last of its sentence halts.
    """
    check_batches(batches)
    maps = [halting_map(model, batch) for batch in batches]
    tokens = torch.cat([steps[steps > 0] for steps in maps]).double()
    sentences = torch.cat([steps.amax(1) for steps in maps]).double()
    return {"steps": tokens.mean().item(), "spread": tokens.std().item(), "longest": sentences.mean().item()}


# --- S-18 deep equilibrium ------------------------------------------------------------------------------------------


def equilibrium(model: nn.Module, start: Start = "mean", batches: list[dict] | None = None, **solver: float) -> None:
    """Replace the encoder, in place, by one layer's fixed point (`EquilibriumEncoder`), solved with the options of `Anderson`.

    With `unrolled` passes it is the control that iterates so often and keeps all. Survey 5.3.
    """
    layer = start_layer(model, list(range(len(model.bert.encoder.layer))), start, batches)
    replace_encoder(model, EquilibriumEncoder.around(layer, model.config, **solver))


def equilibrium_loss(strength: float = 0.0) -> Loss:
    """Cross-entropy plus `strength` times the squared Jacobian at the fixed point (`jacobian_penalty`)."""

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        with watch_passes(model) as passes, bert.fastest_attention(model, "eager"):  # the fused kernel has no second derivative
            task_loss = cross_entropy(model, batch)
            return task_loss + strength * jacobian_penalty(passes[0]) if strength else task_loss

    return loss


@contextlib.contextmanager
def with_solver(model: nn.Module, **options: float) -> Iterator[None]:
    """Inside the block the model's equilibrium is solved with other options of `Anderson`."""
    encoder = model.bert.encoder
    before, encoder.solver = encoder.solver, replace(encoder.solver, **options)
    try:
        yield
    finally:
        encoder.solver = before


@torch.inference_mode()
def convergence(model: nn.Module, batch: dict, **solver: float) -> torch.Tensor:
    """Relative residual of each sentence after each iteration, (iterations, batch), for the picture of a solver's way."""
    with with_solver(model, **{"tolerance": 0.0, **solver}), watch_passes(model) as passes:
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return passes[0].forward.residuals


def equilibrium_numbers(model: nn.Module, batches: list[dict]) -> dict[str, float]:
    """Over sentences: mean iterations, the share within the tolerance, and the mean relative residual that is left."""
    check_batches(batches)
    found = []
    with torch.inference_mode(), watch_passes(model) as passes:
        for batch in batches:
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found = [one.forward for one in passes]
    left = torch.cat([one.residuals.amin(0) for one in found])
    within = (left <= model.bert.encoder.solver.tolerance).double().mean().item()
    iterations = torch.cat([one.iterations for one in found]).double().mean().item()
    return {"iterations": iterations, "within": within, "residual": left.mean().item()}


def spectral_radius(model: nn.Module, batch: dict, steps: int = 40) -> torch.Tensor:
    """Largest absolute eigenvalue of each sentence's Jacobian at its fixed point, (batch,).

    Where it is below 1, the plain iteration converges from close by.
    The power method: by how much a random vector grows per step, over the second half of the steps (complex pairs of
    eigenvalues turn the vector, but do not bother a mean growth).
    """
    with watch_passes(model) as passes:
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    times_jacobian, growth = vector_jacobian(passes[0].f, passes[0].forward.fixed_point), []
    v = torch.randn_like(passes[0].forward.fixed_point) * passes[0].real
    for _ in range(steps):
        v = times_jacobian(v / v.flatten(1).norm(dim=1)[:, None, None])
        growth.append(v.flatten(1).norm(dim=1))
    return torch.stack(growth[steps // 2 :]).log().mean(0).exp()


def activation_bytes(model: nn.Module, loss: Callable[[nn.Module, dict], torch.Tensor], batch: dict) -> int:
    """Bytes that a loss keeps for its backward pass, each storage once and the model's own not counted."""
    own, kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(model, batch)
    return sum(kept.values()) if value.requires_grad else 0  # `value` lives until here: no storage was used twice
