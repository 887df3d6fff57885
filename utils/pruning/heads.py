"""Survey section 2.4: pruning attention heads, and whole feed-forward blocks with them.

Everything hangs on gates. A head's output z_h is multiplied by a gate xi_h before the output projection, a feed-forward
block's output by a gate nu. Closed gates (0) are the model without that part, gradients with respect to gates are importance
(P-19, P-24) or relevance (P-20), random gates with learned rates are L0 regularisation (P-21). `cut_closed` removes closed parts.
Gates have shape (layers, heads) and (layers,), or with a leading batch dimension, one set per sentence. Every choice here is
made on sentences that the caller hands over; which ones, and whether the metric is a loss, is the caller's business.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from utils import bert
from utils.structure import remove_ffn, remove_heads
from utils.training import Loss, autocast, check_batches, cross_entropy

Evaluate = Callable[[nn.Module], float]
Objective = Callable[[torch.Tensor, dict], torch.Tensor]  # (logits, batch) -> one value per sentence
LinearMap = Callable[[torch.Tensor], torch.Tensor]
BETA, GAMMA, ZETA = 0.33, -0.1, 1.1  # temperature and stretch of the hard concrete distribution
CLOSED = math.log(-GAMMA / ZETA)  # log_alpha at which the noiseless gate reaches exactly 0; at its negative it reaches 1
POSITIVE, NEGATIVE, TINY = 0.5, 0.5, 1e-9  # alpha and beta of the relevance rule, and what keeps a quotient finite


def head_counts(model: nn.Module) -> list[int]:
    """Number of heads in each layer."""
    return [layer.attention.self.num_attention_heads for layer in model.bert.encoder.layer]


def open_gates(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """All gates at one: heads (layers, heads) and feed-forward blocks (layers,). Heads that a layer lacks have 0."""
    counts = torch.tensor(head_counts(model), device=next(model.parameters()).device)
    heads = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    return heads.float(), torch.ones(len(counts), device=counts.device)


@contextlib.contextmanager
def head_gates(model: nn.Module, gates: torch.Tensor) -> Iterator[None]:
    """Inside the block head h of layer l outputs xi[l, h] * z. `gates` is xi, (layers, heads) or (batch, layers, heads)."""
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(model.bert.encoder.layer):

            def gate(module: nn.Module, args: tuple, number: int = number, attention: nn.Module = layer.attention.self) -> tuple:
                xi = gates[..., number, : attention.num_attention_heads].repeat_interleave(attention.attention_head_size, dim=-1)
                return (args[0] * xi.unsqueeze(-2).to(args[0]),)  # (batch, length, heads * size)

            hooks.enter_context(layer.attention.output.dense.register_forward_pre_hook(gate))
        yield


@contextlib.contextmanager
def ffn_gates(model: nn.Module, gates: torch.Tensor) -> Iterator[None]:
    """Inside the block layer l adds nu[l] * FFN(x), output bias included. `gates` is nu, (layers,) or (batch, layers)."""
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(model.bert.encoder.layer):

            def gate(module: nn.Module, args: tuple, output: torch.Tensor, number: int = number) -> torch.Tensor:
                return output * gates[..., number, None, None].to(output)

            hooks.enter_context(layer.output.dense.register_forward_hook(gate))
        yield


def cut_closed(model: nn.Module, heads: torch.Tensor, ffns: torch.Tensor | None = None) -> None:
    """Remove closed heads (layers, heads) and feed-forward blocks (layers,) for good, in place; the gated model's logits stay.

    Raises ValueError for a mask of another shape.
    """
    all_heads, all_ffns = open_gates(model)
    if heads.shape != all_heads.shape or (ffns is not None and ffns.shape != all_ffns.shape):
        raise ValueError(f"masks need shapes {tuple(all_heads.shape)} and {tuple(all_ffns.shape)}")
    remove_heads(model, {number: heads[number, :count].bool() for number, count in enumerate(head_counts(model))})
    for number in [] if ffns is None else (ffns == 0).nonzero().flatten().tolist():
        remove_ffn(model, number, keep_bias=False)


# --- P-18 one head at a time -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def resumed(model: nn.Module, number: int, states: torch.Tensor) -> Iterator[None]:
    """Inside the block the encoder begins at layer `number` with these states (batch, length, hidden); earlier layers do not run."""
    encoder = model.bert.encoder
    layers = encoder.layer

    def start(module: nn.Module, args: tuple) -> tuple:
        return (states, *args[1:])

    encoder.layer = nn.ModuleList(layers[number:])
    try:
        with encoder.register_forward_pre_hook(start):
            yield
    finally:
        encoder.layer = layers


@torch.no_grad()
def losses_per_head(
    model: nn.Module, batches: list[dict], change: Callable[[torch.Tensor, int, int], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every sentence's cross-entropy under gates that `change(gates, layer, head)` sets from all open, once per head.

    Returns them as (layers, heads, sentences), nan where a layer lacks the head, and those of the untouched model as
    (sentences,), both on the CPU. What lies below the changed layer is computed once. Raises ValueError for no batches.
    """
    check_batches(batches)
    changed, whole = [], []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with autocast(batch["input_ids"].device):
            out = model.eval()(**inputs, output_hidden_states=True)
            losses = torch.full((*open_gates(model)[0].shape, len(batch["labels"])), torch.nan)
            for layer, count in enumerate(head_counts(model)):
                for head in range(count):
                    gates, _ = open_gates(model)
                    change(gates, layer, head)
                    with head_gates(model, gates), resumed(model, layer, out.hidden_states[layer]):
                        losses[layer, head] = example_losses(model(**inputs).logits, batch).cpu()
        changed.append(losses)
        whole.append(example_losses(out.logits, batch).cpu())
    return torch.cat(changed, -1), torch.cat(whole)


def single_head_ablation(model: nn.Module, batches: list[dict]) -> torch.Tensor:
    """What each sentence's loss gains when one head is closed, for every head: (layers, heads, sentences), in nats.

    Michel et al. 2019, survey 2.4. Raises ValueError for no batches.
    """

    def close(gates: torch.Tensor, layer: int, head: int) -> None:
        gates[layer, head] = 0

    changed, whole = losses_per_head(model, batches, close)
    return changed - whole


def only_one_head(model: nn.Module, batches: list[dict]) -> torch.Tensor:
    """What each sentence's loss gains when a layer keeps one head (others whole): (layers, heads, sentences), in nats.

    Michel et al. 2019, survey 2.4. Raises ValueError for no batches.
    """

    def leave(gates: torch.Tensor, layer: int, head: int) -> None:
        gates[layer] = 0
        gates[layer, head] = 1

    changed, whole = losses_per_head(model, batches, leave)
    return changed - whole


def bootstrap_p(differences: torch.Tensor, resamples: int = 2000, seed: int = 0) -> torch.Tensor:
    """Two-sided p-value of "the mean difference is 0", sentences drawn again with replacement: (..., sentences) -> (...).

    Michel et al. 2019 mark the heads whose removal matters at p < 0.01 in such a paired test. nan where a difference is nan.
    """
    n = differences.shape[-1]
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(resamples, n)) / n
    means = differences.float() @ weights.T
    below, above = ((side.sum(-1) + 1) / (resamples + 1) for side in (means <= 0, means >= 0))
    return (2 * torch.minimum(below, above)).clamp(max=1).masked_fill(means.isnan().any(-1), torch.nan)


# --- P-19, P-24 importance of heads and of feed-forward blocks -------------------------------------------------------


def gate_gradients(
    model: nn.Module, batch: dict, heads: torch.Tensor, ffns: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """d objective / d gates for each sentence on its own: (batch, layers, heads) and (batch, layers).

    `objective(logits, batch)` returns one value per sentence. Every sentence has gates of its own, so one backward pass
    through their sum gives all the gradients apart, and an absolute value can be taken before the mean.
    """
    size = len(batch["input_ids"])
    xi = heads.expand(size, *heads.shape).clone().requires_grad_()
    nu = ffns.expand(size, *ffns.shape).clone().requires_grad_()
    with torch.enable_grad(), head_gates(model, xi), ffn_gates(model, nu):
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.autograd.grad(objective(logits, batch).sum(), (xi, nu))


def example_losses(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Cross-entropy of each sentence, (batch,)."""
    return nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="none")


def gate_importance(
    model: nn.Module, batches: list[dict], heads: torch.Tensor | None = None, ffns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """I = E_x |dL(x) / d gate|, at the given gates (default: all open): heads (layers, heads), blocks (layers,).

    Raises ValueError for no batches.
    """
    check_batches(batches)
    all_heads, all_ffns = open_gates(model)
    heads, ffns = all_heads if heads is None else heads.float(), all_ffns if ffns is None else ffns.float()
    totals, count = [torch.zeros_like(all_heads), torch.zeros_like(all_ffns)], 0
    for batch in batches:
        gradients = gate_gradients(model, batch, heads, ffns, example_losses)
        totals = [total + gradient.abs().sum(0) for total, gradient in zip(totals, gradients, strict=True)]
        count += len(batch["input_ids"])
    return totals[0] / count, totals[1] / count


def head_importance(model: nn.Module, batches: list[dict], gates: torch.Tensor | None = None) -> torch.Tensor:
    """I_h = E_x |dL/dxi_h| = E_x |z_h . dL/dz_h|, divided by its L2 norm in each layer: (layers, heads).

    Heads that `gates` has closed are scored too (at xi = 0). Michel, Levy, Neubig 2019 (arXiv 1905.10650), survey 2.4.
    """
    importance, _ = gate_importance(model, batches, gates)
    return nn.functional.normalize(importance, dim=1)


def structure_importance(
    model: nn.Module, batches: list[dict], heads: torch.Tensor | None = None, ffns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """E_x |dL/d gate| for heads (layers, heads), L2-normalised per layer, and feed-forward blocks (layers,), each in [0, 1].

    Prasanna, Rogers, Rumshisky 2020 (arXiv 2005.00561), survey 2.4.
    """
    of_heads, of_ffns = gate_importance(model, batches, heads, ffns)
    return min_max(nn.functional.normalize(of_heads, dim=1)), min_max(of_ffns)


def min_max(scores: torch.Tensor) -> torch.Tensor:
    """Stretch scores to [0, 1]; equal scores become 0."""
    return (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=torch.finfo(scores.dtype).tiny)


@dataclass(frozen=True)
class PruningStep:
    """What is open at one point of an iterative pruning, heads (layers, heads) and blocks (layers,), and the metric there."""

    heads: torch.Tensor
    ffns: torch.Tensor
    metric: float


def prune_heads_iteratively(
    model: nn.Module, batches: list[dict], evaluate: Evaluate, step: float = 0.1, threshold: float = 0.9
) -> list[PruningStep]:
    """Close the `step` share of heads with the lowest importance, score the rest again, and so on. The model is not cut.

    Stops below `threshold` times the first metric; that last, failed step is in the list too (`last_acceptable` finds the
    one before; threshold=0 goes on to the end). Michel et al. 2019, survey 2.4. Raises ValueError for a step outside (0, 1].
    """
    path = [measure(model, evaluate, *(gates.bool() for gates in open_gates(model)))]
    return path + prune_on(model, batches, evaluate, path[0], step_size(model, step), 0, threshold * path[0].metric)


def prune_structures(
    model: nn.Module, batches: list[dict], evaluate: Evaluate, step: float = 0.1, threshold: float = 0.9
) -> list[PruningStep]:
    """Close heads and feed-forward blocks together: per iteration the `step` share of heads and one block.

    When that fails, go on from the last acceptable step with half as many heads and no block, then with blocks alone: the
    three phases of Prasanna et al. 2020. Survey 2.4. Raises ValueError for a step outside (0, 1].
    """
    path = [measure(model, evaluate, *(gates.bool() for gates in open_gates(model)))]
    floor = threshold * path[0].metric
    num_heads = step_size(model, step)
    for heads, ffns in ((num_heads, 1), (max(1, num_heads // 2), 0), (0, 1)):
        path += prune_on(model, batches, evaluate, last_acceptable(path, threshold), heads, ffns, floor)
    return path


def prune_on(
    model: nn.Module, batches: list[dict], evaluate: Evaluate, start: PruningStep, num_heads: int, num_ffns: int, floor: float
) -> list[PruningStep]:
    """Close the least important `num_heads` heads and `num_ffns` blocks, again and again, until the metric is below `floor`."""
    path, now = [], start
    while now.metric >= floor and (not num_heads or now.heads.any()) and (not num_ffns or now.ffns.any()):
        of_heads, of_ffns = structure_importance(model, batches, now.heads, now.ffns)
        now = measure(model, evaluate, close_lowest(now.heads, of_heads, num_heads), close_lowest(now.ffns, of_ffns, num_ffns))
        path.append(now)
    return path


def close_lowest(gates: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
    """Close the `count` lowest-scoring gates among the open ones (all, where fewer are open)."""
    order = scores.masked_fill(~gates, torch.inf).flatten().argsort(stable=True)
    closed = gates.flatten().clone()
    closed[order[:count]] = False
    return closed.view(gates.shape)


def measure(model: nn.Module, evaluate: Evaluate, heads: torch.Tensor, ffns: torch.Tensor) -> PruningStep:
    """The metric of the model with these gates."""
    with head_gates(model, heads), ffn_gates(model, ffns):
        return PruningStep(heads, ffns, evaluate(model))


def step_size(model: nn.Module, step: float) -> int:
    """Heads per iteration: a share of all heads, at least one. Raises ValueError for a share outside (0, 1]."""
    if not 0 < step <= 1:
        raise ValueError(f"step must be a share in (0, 1], got {step}")
    return max(1, int(step * sum(head_counts(model))))


def last_acceptable(path: list[PruningStep], threshold: float = 0.9) -> PruningStep:
    """The last step of a pruning whose metric is `threshold` times the first one or more."""
    return [step for step in path if step.metric >= threshold * path[0].metric][-1]


def matched_subnetwork(good: torch.Tensor, kind: str, seed: int = 0) -> torch.Tensor:
    """A mask with as many open gates as the `good` one: `random`, or `bad`, made of what pruning threw away.

    Where the thrown-away gates are too few, a random part of the good ones fills up; where they are too many, chance picks.
    Prasanna et al. 2020 retrain good, random and bad sub-networks of equal size. Raises ValueError for another kind.
    """
    if kind not in ("random", "bad"):
        raise ValueError(f"kind must be 'random' or 'bad', got {kind!r}")
    priority = torch.rand(good.shape, generator=torch.Generator().manual_seed(seed))
    if kind == "bad":
        priority = priority + (~good).cpu()  # above 1 for what did not survive
    chosen = torch.zeros(good.numel(), dtype=torch.bool)
    chosen[priority.flatten().argsort(descending=True)[: int(good.sum())]] = True
    return chosen.view(good.shape).to(good.device)


# --- P-20a relevance -------------------------------------------------------------------------------------------------


def alpha_beta(relevance: torch.Tensor, x: torch.Tensor, positive: LinearMap, negative: LinearMap) -> torch.Tensor:
    """Relevance of the inputs of z = positive(x) + negative(x), two maps with weights >= 0 and <= 0; its shape is that of x.

    R_i = sum_j (alpha z_ij^+ / sum_i z_ij^+ + beta z_ij^- / sum_i z_ij^-) R_j with z_ij = w_ji x_i and alpha = beta = 1/2, so
    R >= 0 stays. Where z_j has contributions of one sign only, half of R_j would be lost: as in the authors' code the sum is
    restored, per token (per head in attention). Bach et al. 2015, equation 60, as used by Voita et al. 2019; survey 2.4.
    """
    with torch.enable_grad():
        up, down = x.detach().clamp(min=0).requires_grad_(), x.detach().clamp(max=0).requires_grad_()
        z = positive(up) + negative(down), positive(down) + negative(up)
    per_unit = POSITIVE * relevance / (z[0].detach() + TINY), NEGATIVE * relevance / (z[1].detach() - TINY)
    of_up, of_down = torch.autograd.grad(z, (up, down), per_unit)
    found = (of_up * up + of_down * down).detach()
    kept = min(2, relevance.dim() - 1)  # (batch, length, ...) or (batch, heads, ...), and (batch, ...) behind the pooler
    share = relevance.flatten(kept).sum(-1) / (found.flatten(kept).sum(-1) + TINY)
    return found * share.view(*share.shape, *[1] * (found.dim() - kept))


class Rule(torch.autograd.Function):
    """Whatever runs forward as `output`, with `backward(relevance)` in place of its gradient; gradients then are relevance."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, run: Callable, backward: Callable) -> torch.Tensor:
        """run(x), of any shape."""
        ctx.rule = backward
        return run(x)

    @staticmethod
    def backward(ctx, relevance: torch.Tensor) -> tuple:
        """Relevance of x, in its shape."""
        return ctx.rule(relevance), None, None


def nothing(x: torch.Tensor) -> torch.Tensor:
    """The map whose weights are all 0, for sums and means, which have no negative weights."""
    return 0 * x.sum()


def relevance_linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """A linear layer under the rule; its bias takes no relevance."""
    positive, negative = (functools.partial(nn.functional.linear, weight=side) for side in
                          (linear.weight.detach().clamp(min=0), linear.weight.detach().clamp(max=0)))  # fmt: skip
    run = functools.partial(nn.functional.linear, weight=linear.weight, bias=linear.bias)
    return Rule.apply(x, run, lambda relevance: alpha_beta(relevance, x, positive, negative))


def relevance_through(function: Callable, x: torch.Tensor) -> torch.Tensor:
    """GELU, tanh and LayerNorm hand every unit's relevance on as it is."""
    return Rule.apply(x, function, lambda relevance: relevance)


def relevance_residual(output: nn.Module, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
    """`BertSelfOutput` and `BertOutput`: the residual sum shares relevance out between its two terms, unit by unit."""
    terms = torch.stack([output.dense(hidden_states), input_tensor], -1)
    total = Rule.apply(terms, lambda t: t.sum(-1), lambda relevance: alpha_beta(relevance, terms, lambda t: t.sum(-1), nothing))
    return output.LayerNorm(total)


def relevance_attention(module: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options):
    """`BertSelfAttention` with its attention probabilities held constant: relevance flows to the values only."""
    shape = (*hidden_states.shape[:2], module.num_attention_heads, module.attention_head_size)
    query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in (module.query, module.key, module.value))
    scores = query @ key.transpose(2, 3) * module.scaling
    probabilities = (scores if attention_mask is None else scores + attention_mask).softmax(-1).detach()
    mix = functools.partial(torch.matmul, probabilities)
    z = Rule.apply(value, mix, lambda relevance: alpha_beta(relevance, value, mix, nothing))
    return z.transpose(1, 2).flatten(2), probabilities


@contextlib.contextmanager
def relevance_rules(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside the block gradients are relevance, and outputs are what they were; yields what the heads put out.

    The list gets a tensor (batch, length, heads * size) per layer in each forward pass: relevance with respect to it is that
    of the heads. Differences from Voita et al. 2019: attention probabilities are constants (an option of theirs), biases
    take no relevance (they spread them evenly over the inputs), and LayerNorm hands it on (they share it out).
    """
    put_out, changed = [], []

    def replace(module: nn.Module, forward: Callable) -> None:
        module.forward = forward
        changed.append(module)

    def heads(module: nn.Module, args: tuple) -> None:
        put_out.append(args[0])

    linears = [model.bert.pooler.dense, model.classifier]
    with contextlib.ExitStack() as stack:
        stack.enter_context(bert.attention(model, "eager"))
        stack.callback(lambda: [module.__dict__.pop("forward") for module in changed])
        for layer in model.bert.encoder.layer:
            attention = layer.attention
            linears += [attention.self.value, attention.output.dense, layer.intermediate.dense, layer.output.dense]
            if attention.self.num_attention_heads:
                replace(attention.self, functools.partial(relevance_attention, attention.self))
            for output in (attention.output, layer.output):
                replace(output, functools.partial(relevance_residual, output))
                replace(output.LayerNorm, functools.partial(relevance_through, output.LayerNorm.forward))
            stack.enter_context(attention.output.dense.register_forward_pre_hook(heads))
        activations = {layer.intermediate.intermediate_act_fn for layer in model.bert.encoder.layer} | {
            model.bert.pooler.activation
        }
        for activation in activations:
            replace(activation, functools.partial(relevance_through, activation.forward))
        for linear in linears:
            replace(linear, functools.partial(relevance_linear, linear))
        yield put_out


def head_relevance(model: nn.Module, batches: list[dict]) -> torch.Tensor:
    """Mean share of each head in its layer's relevance for the predicted logit: (layers, heads), 0 or more, rows sum to 1.

    One unit of relevance starts at the largest logit of each sentence. R is never negative, so nothing cancels between
    units, tokens or sentences. Voita et al. 2019 (arXiv 1905.09418), after Ding et al. 2017; survey 2.4. Raises ValueError
    for no batches.
    """
    check_batches(batches)
    counts, shares = head_counts(model), []
    for batch in batches:
        with relevance_rules(model) as put_out:
            logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            found = torch.autograd.grad(logits.amax(-1).sum(), put_out)
        share = logits.new_zeros(len(logits), len(counts), max(counts))
        for number, (relevance, count) in enumerate(zip(found, counts, strict=True)):
            if count:
                of_heads = relevance.unflatten(-1, (count, -1)).sum((1, 3))  # (batch, heads)
                share[:, number, :count] = nn.functional.normalize(of_heads, p=1, dim=-1)
        shares.append(share.detach())
    return torch.cat(shares).mean(0)


# --- P-20b confidence ------------------------------------------------------------------------------------------------


@torch.no_grad()
def head_confidence(model: nn.Module, batches: list[dict], excluded_ids: tuple[int, ...]) -> torch.Tensor:
    """Mean over tokens of a head's largest attention weight: (layers, heads).

    Query tokens that are padding or in `excluded_ids` (the id of [SEP]) do not count. Voita et al. 2019, survey 2.4. Raises
    ValueError for no batches, or where no token is left.
    """
    check_batches(batches)
    total, tokens = torch.zeros_like(open_gates(model)[0]), 0
    for batch in batches:
        ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        counts = attention_mask.bool() & ~torch.isin(ids, torch.tensor(excluded_ids, device=ids.device))  # (batch, length)
        with bert.attention(model, "eager"):
            maps = model.eval()(input_ids=ids, attention_mask=attention_mask, output_attentions=True).attentions
        for number, probabilities in enumerate(maps):  # (batch, heads, queries, keys)
            largest = probabilities.amax(-1).float() * counts[:, None]
            total[number, : largest.shape[1]] += largest.sum((0, 2))
        tokens += int(counts.sum())
    if not tokens:
        raise ValueError(f"no token is left once padding and the ids {excluded_ids} are excluded")
    return total / tokens


# --- P-21 learned gates ----------------------------------------------------------------------------------------------


def hard_concrete(log_alpha: torch.Tensor, training: bool = True, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gates in [0, 1] that are 0 or 1 with positive probability, yet have a gradient in log_alpha; its shape.

    u ~ U(0, 1); s = sigmoid((log u - log(1 - u) + log_alpha) / beta); g = clip(s (zeta - gamma) + gamma, 0, 1). When not
    training, s = sigmoid(log_alpha). `generator` is a CPU one. Louizos et al. 2018 as used by Voita et al. 2019, survey 2.4.
    """
    s = log_alpha.sigmoid()
    if training:
        u = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(log_alpha.device)
        s = ((u.logit() + log_alpha) / BETA).sigmoid()
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """P(g != 0) = sigmoid(log_alpha - beta log(-gamma / zeta)), the penalty of a gate. Voita et al. 2019, survey 2.4."""
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def gate_states(log_alpha: torch.Tensor) -> dict[str, int]:
    """How many noiseless gates are exactly 0 (`closed`), exactly 1 (`open`), and in between (`undecided`)."""
    gates = hard_concrete(log_alpha.detach(), training=False)
    closed, opened = int((gates == 0).sum()), int((gates == 1).sum())
    return {"closed": closed, "open": opened, "undecided": gates.numel() - closed - opened}


def l0_loss(log_alpha: torch.Tensor, penalty: float, generator: torch.Generator | None = None, enough: int | None = None) -> Loss:
    """The loss L(g) + penalty * sum_h P(g_h != 0), one sample of the gates per batch. `log_alpha` is (layers, heads).

    Voita et al. 2019 take as many heads as the penalty leaves, and try several. With `enough` the penalty rests while that
    many gates are closed, so that the number is known beforehand. Survey 2.4.
    """

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        with head_gates(model, hard_concrete(log_alpha, generator=generator)):
            task_loss = cross_entropy(model, batch)
        if enough is not None and gate_states(log_alpha)["closed"] >= enough:
            return task_loss
        return task_loss + penalty * open_probability(log_alpha).sum()

    return loss


def gate_groups(model: nn.Module, log_alpha: torch.Tensor, learning_rate: float, momentum: float = 0.9) -> list[dict]:
    """Optimiser groups for `utils.training.train`: the model's parameters, and the gates with their own learning rate.

    Weight decay would pull log_alpha to 0, a gate that is neither open nor closed, so the gates have none. Without `momentum`
    (Adam's first beta) a gate stops where its penalty rests.
    """
    gates = {"params": [log_alpha], "lr": learning_rate, "weight_decay": 0.0, "betas": (momentum, 0.999)}
    return [{"params": list(model.parameters())}, gates]


def open_heads(log_alpha: torch.Tensor, num_keep: int | None = None) -> torch.Tensor:
    """The binary gates after training: heads whose noiseless gate is above 1/2, that is log_alpha > 0; boolean mask.

    With `num_keep` exactly that many heads stay, those most likely open. Raises ValueError outside 0..number of heads.
    """
    if num_keep is None:
        return log_alpha.detach() > 0
    if not 0 <= num_keep <= log_alpha.numel():
        raise ValueError(f"num_keep must lie in 0..{log_alpha.numel()}, got {num_keep}")
    return close_lowest(torch.ones_like(log_alpha, dtype=torch.bool), log_alpha.detach(), log_alpha.numel() - num_keep)


def really_closed(log_alpha: torch.Tensor, keep: torch.Tensor) -> float:
    """The share of the heads that `keep` (layers, heads) cuts whose gate training had closed for good; nan where none is cut."""
    cut = log_alpha.detach()[~keep]
    return (cut <= CLOSED).float().mean().item()
