"""Survey section 2.4: pruning attention heads, and whole feed-forward blocks with them.

Everything hangs on gates. A head's output z_h is multiplied by a gate xi_h before the output projection, a feed-forward
block's output by a gate nu. Closed gates (0) are the model without that part, gradients with respect to gates are importance
(P-19, P-24) or relevance (P-20), random gates with learned rates are L0 regularisation (P-21). `cut_closed` removes closed parts.
Gates have shape (layers, heads) and (layers,), or with a leading batch dimension, one set per sentence.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from utils import bert
from utils.structure import remove_ffn, remove_heads
from utils.training import Loss, check_batches, cross_entropy

Evaluate = Callable[[nn.Module], float]
Objective = Callable[[torch.Tensor, dict], torch.Tensor]  # (logits, batch) -> one value per sentence
BETA, GAMMA, ZETA = 0.33, -0.1, 1.1  # temperature and stretch of the hard concrete distribution


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


def metric_per_head(model: nn.Module, evaluate: Evaluate, change: Callable[[torch.Tensor, int, int], None]) -> torch.Tensor:
    """evaluate(model) once per head, (layers, heads), under gates that `change(gates, layer, head)` sets from all open."""
    metrics = torch.full(open_gates(model)[0].shape, torch.nan)
    for layer, count in enumerate(head_counts(model)):
        for head in range(count):
            gates, _ = open_gates(model)
            change(gates, layer, head)
            with head_gates(model, gates):
                metrics[layer, head] = evaluate(model)
    return metrics


def single_head_ablation(model: nn.Module, evaluate: Evaluate) -> torch.Tensor:
    """The metric with one head closed, for every head in turn: (layers, heads). Michel et al. 2019, survey 2.4."""

    def close(gates: torch.Tensor, layer: int, head: int) -> None:
        gates[layer, head] = 0

    return metric_per_head(model, evaluate, close)


def only_one_head(model: nn.Module, evaluate: Evaluate) -> torch.Tensor:
    """The metric with one head left in its layer (other layers whole), for every head: (layers, heads). Michel et al. 2019."""

    def leave(gates: torch.Tensor, layer: int, head: int) -> None:
        gates[layer] = 0
        gates[layer, head] = 1

    return metric_per_head(model, evaluate, leave)


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


@contextlib.contextmanager
def relevance_rules(model: nn.Module) -> Iterator[None]:
    """Inside the block, gradient times input is layer-wise relevance: same outputs, another backward pass.

    Linear layers and residual sums: relevance in proportion to each contribution w_ji x_i (the epsilon rule, epsilon -> 0).
    Attention probabilities and LayerNorm's 1 / sigma are constants; GELU and tanh scale by the constant f(x) / x. The
    network is then linear in its inputs and biases together, so R(embeddings) + R(biases) = logit: biases take theirs out.
    """
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                hooks.enter_context(module.register_forward_hook(constant_scale))
        for layer in model.bert.encoder.layer:
            hooks.enter_context(layer.attention.self.query.register_forward_hook(constant))
            hooks.enter_context(layer.attention.self.key.register_forward_hook(constant))
            hooks.enter_context(layer.intermediate.intermediate_act_fn.register_forward_hook(constant_ratio))
        hooks.enter_context(model.bert.pooler.activation.register_forward_hook(constant_ratio))
        yield


def constant(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """No relevance flows back through this output."""
    return output.detach()


def constant_ratio(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """f(x) = x * (f(x) / x), the ratio held constant."""
    x = args[0]
    return x * torch.where(x == 0, 0, output / x).detach()


def constant_scale(norm: nn.LayerNorm, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """LayerNorm with 1 / sigma held constant; centring is linear and stays."""
    x = args[0]
    scale = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt().detach()
    return (x - x.mean(-1, keepdim=True)) * scale * norm.weight + norm.bias


def head_relevance(model: nn.Module, batches: list[dict]) -> torch.Tensor:
    """Mean share of each head in its layer's relevance for the predicted logit: (layers, heads).

    R_h = sum over tokens and units of z_h * dlogit/dz_h under `relevance_rules`, which is dlogit/dxi_h at xi_h = 1; per
    sentence divided by the layer's sum of |R|. Voita et al. 2019 (arXiv 1905.09418) with the rules of Ding et al. 2017 (they
    let relevance through the softmax, too), survey 2.4. Raises ValueError for no batches.
    """
    check_batches(batches)
    relevance = []
    for batch in batches:
        with relevance_rules(model):
            of_heads, _ = gate_gradients(model, batch, *open_gates(model), lambda logits, batch: logits.amax(-1))
        relevance.append(nn.functional.normalize(of_heads, p=1, dim=-1))  # (batch, layers, heads)
    return torch.cat(relevance).mean(0)


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


def l0_loss(log_alpha: torch.Tensor, penalty: float, generator: torch.Generator | None = None) -> Loss:
    """The loss L(g) + penalty * sum_h P(g_h != 0), one sample of the gates per batch. `log_alpha` is (layers, heads)."""

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        with head_gates(model, hard_concrete(log_alpha, generator=generator)):
            task_loss = cross_entropy(model, batch)
        return task_loss + penalty * open_probability(log_alpha).sum()

    return loss


def gate_groups(model: nn.Module, log_alpha: torch.Tensor, learning_rate: float) -> list[dict]:
    """Optimiser groups for `utils.training.train`: the model's parameters, and the gates with their own learning rate.

    Weight decay would pull log_alpha to 0, a gate that is neither open nor closed, so the gates have none.
    """
    return [{"params": list(model.parameters())}, {"params": [log_alpha], "lr": learning_rate, "weight_decay": 0.0}]


def open_heads(log_alpha: torch.Tensor, num_keep: int | None = None) -> torch.Tensor:
    """The binary gates after training: heads whose noiseless gate is above 1/2, that is log_alpha > 0; boolean mask.

    With `num_keep` exactly that many heads stay, those most likely open. Raises ValueError outside 0..number of heads.
    """
    if num_keep is None:
        return log_alpha.detach() > 0
    if not 0 <= num_keep <= log_alpha.numel():
        raise ValueError(f"num_keep must lie in 0..{log_alpha.numel()}, got {num_keep}")
    return close_lowest(torch.ones_like(log_alpha, dtype=torch.bool), log_alpha.detach(), log_alpha.numel() - num_keep)
