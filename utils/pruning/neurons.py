"""Survey section 2.2: pruning neurons. A neuron i of a feed-forward block is one hidden unit: h_i = f(W1[i] x + b1[i]).

Its incoming weights are row i of W1 (`ffn_in`), its outgoing weights column i of W2 (`ffn_out`). Scores say which neurons
matter least (P-12), penalties push whole groups of weights to zero while the model trains (P-13), and merging adds a neuron
to its nearest twin without looking at data (P-14). `utils.structure.remove_neurons` then deletes them.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from utils.pruning.masks import check_sparsity, lowest, masks_from_scores
from utils.structure import Keep, remove_neurons
from utils.training import check_batches

NeuronScores = dict[int, torch.Tensor]
Prox = Callable[[torch.Tensor, float], torch.Tensor]
GROUPS = ("coupled", "incoming", "outgoing", "separate")


@torch.no_grad()
def activation_entropy(model: nn.Module, batches: list[dict]) -> NeuronScores:
    """H_i = -(p_i log p_i + (1 - p_i) log(1 - p_i)), where p_i is the share of tokens on which neuron i is on.

    He et al. 2014 call a sigmoid unit on above 0.5; a GELU's middle is the input 0. Padding does not count. Returns one
    tensor (neurons,) per layer, in nats. Survey 2.2, whose formula lacks the minus sign. Raises ValueError for no batches.
    """
    check_batches(batches)
    on = {number: 0 for number in range(len(model.bert.encoder.layer))}
    tokens = 0
    for batch in batches:
        real = batch["attention_mask"].bool()  # (batch, length)
        for number, inputs in gelu_inputs(model, batch).items():
            on[number] = on[number] + (inputs[real] > 0).sum(0)
        tokens += int(real.sum())
    shares = {number: count / tokens for number, count in on.items()}
    return {number: -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) for number, p in shares.items()}


def gelu_inputs(model: nn.Module, batch: dict) -> NeuronScores:
    """What each layer's feed-forward neurons see before the activation: (batch, length, neurons) per layer."""
    seen = {}
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(model.bert.encoder.layer):

            def remember(module: nn.Module, args: tuple, output: torch.Tensor, number: int = number) -> None:
                seen[number] = output

            hooks.enter_context(layer.intermediate.dense.register_forward_hook(remember))
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return seen


def onorm(model: nn.Module) -> NeuronScores:
    """Mean |w| of a neuron's outgoing weights: (1/d) sum_k |W2[k, i]|. He et al. 2014, survey 2.2."""
    layers = enumerate(model.bert.encoder.layer)
    return {number: layer.output.dense.weight.detach().abs().mean(0) for number, layer in layers}


def inorm(model: nn.Module) -> NeuronScores:
    """Mean |w| of a neuron's incoming weights: (1/d) sum_k |W1[i, k]|. He et al. 2014, survey 2.2."""
    layers = enumerate(model.bert.encoder.layer)
    return {number: layer.intermediate.dense.weight.detach().abs().mean(1) for number, layer in layers}


def neuron_keep(scores: NeuronScores, share: float, scope: str = "layer") -> Keep:
    """Keep-masks that drop the `share` of lowest-scoring neurons, ranked inside each layer, or over all (`global`).

    Raises ValueError for a share outside [0, 1) or an unknown scope.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
    return masks_from_scores(scores, share, scope="matrix" if scope == "layer" else "global")


def kept_by_both(keep: Keep, other: Keep) -> float:
    """The share of the neurons in `keep` that `other` keeps as well; two draws at random share as much as they keep."""
    both = sum(int((kept & other[number]).sum()) for number, kept in keep.items())
    return both / sum(int(kept.sum()) for kept in keep.values())


def prox_l21(rows: torch.Tensor, amount: float) -> torch.Tensor:
    """argmin_V 1/2 ||V - W||^2 + amount * sum_i ||V_i||_2: every row gets shorter by `amount`, or vanishes.

    V_i = max(0, 1 - amount / ||W_i||) W_i. Murray & Chiang 2015, survey 2.2. `rows` is (groups, members).
    """
    check_amount(amount)
    length = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return (1 - amount / length).clamp(min=0) * rows


def prox_linf1(rows: torch.Tensor, amount: float) -> torch.Tensor:
    """argmin_V 1/2 ||V - W||^2 + amount * sum_i max_k |V_ik|: the largest entries of each row come down to a common level.

    By Moreau's identity V_i = W_i - projection of W_i onto the L1 ball of radius `amount`; a row with ||W_i||_1 <= amount
    vanishes. Murray & Chiang 2015, survey 2.2. `rows` is (groups, members).
    """
    check_amount(amount)
    return rows - project_l1_ball(rows, amount)


def project_l1_ball(rows: torch.Tensor, radius: float) -> torch.Tensor:
    """The nearest point of each row with ||v||_1 <= radius: sign(w) max(|w| - theta, 0), theta found by one sort."""
    ordered = rows.abs().sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - radius  # of the k largest entries
    rank = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    support = (ordered * rank > excess).sum(1, keepdim=True).clamp(min=1)  # how many entries stay above theta
    theta = (excess.gather(1, support - 1) / support).clamp(min=0)
    return rows.sign() * (rows.abs() - theta).clamp(min=0)


def check_amount(amount: float) -> None:
    """Raise ValueError for a negative strength."""
    if amount < 0:
        raise ValueError(f"the strength of a penalty must be 0 or more, got {amount}")


def check_groups(groups: str) -> None:
    """Raise ValueError for an unknown way to group a neuron's weights."""
    if groups not in GROUPS:
        raise ValueError(f"groups must be one of {', '.join(GROUPS)}, got {groups!r}")


# A map zeroes a group once the *dual* norm of the group is at most the amount: L2 is its own dual, L1 is that of Linf.
DUAL_ORDER = {prox_l21: 2, prox_linf1: 1}


def neuron_groups(layer: nn.Module, groups: str = "coupled") -> list[torch.Tensor]:
    """The weights that a penalty presses on together, a row per neuron: one or two tensors (neurons, members).

    `incoming` (li) takes the rows of W1, `outgoing` (lo) the columns of W2, `separate` both as the two penalties of
    DropNeuron, `coupled` one group per neuron [W1[i], W2[:, i]], which leaves no half-dead neurons. Raises ValueError for
    others.
    """
    check_groups(groups)
    incoming, outgoing = layer.intermediate.dense.weight.detach(), layer.output.dense.weight.detach().T
    return {"incoming": [incoming], "outgoing": [outgoing], "separate": [incoming, outgoing],
            "coupled": [torch.cat([incoming, outgoing], dim=1)]}[groups]  # fmt: skip


@torch.no_grad()
def set_groups(layer: nn.Module, groups: str, values: list[torch.Tensor]) -> None:
    """Write what `neuron_groups` gave back into the layer, in place."""
    incoming, outgoing = layer.intermediate.dense.weight, layer.output.dense.weight.T  # both (neurons, hidden)
    places = {"incoming": [incoming], "outgoing": [outgoing]}.get(groups, [incoming, outgoing])
    pieces = values[0].split(incoming.shape[1], dim=1) if groups == "coupled" else values
    for place, piece in zip(places, pieces, strict=True):
        place.copy_(piece)


def smallest_norm(layer: nn.Module, groups: str = "coupled", order: int = 2) -> torch.Tensor:
    """Norm of each neuron's group, (neurons,). Of two `separate` groups the smaller: one zero kills a neuron."""
    norms = [torch.linalg.vector_norm(group, order, dim=1) for group in neuron_groups(layer, groups)]
    return torch.stack(norms).amin(0)


def group_norms(model: nn.Module, groups: str = "coupled", order: int = 2) -> NeuronScores:
    """`smallest_norm` of every layer, (neurons,) each."""
    return {number: smallest_norm(layer, groups, order) for number, layer in enumerate(model.bert.encoder.layer)}


@torch.no_grad()
def shrink_neurons(
    layer: nn.Module, prox: Prox, amount: float, groups: str = "coupled", share: float = 1.0
) -> list[torch.Tensor]:
    """Apply a proximal map to a layer's neuron groups, in place, but by no more than zeroes `share` of its neurons.

    Returns what it took from each group, shaped as `neuron_groups`.
    """
    order = DUAL_ORDER[prox]
    vanish_at = smallest_norm(layer, groups, order)
    most = round(share * len(vanish_at))
    amount = min(amount, vanish_at.kthvalue(most).values.item()) if most else 0.0
    before = [group.clone() for group in neuron_groups(layer, groups)]
    shrunk = []
    for group in before:
        vanishes = torch.linalg.vector_norm(group, order, dim=1, keepdim=True) <= amount
        shrunk.append(prox(group, amount).masked_fill(vanishes, 0))  # at equality rounding would leave crumbs
    set_groups(layer, groups, shrunk)
    return [old - new for old, new in zip(before, shrunk, strict=True)]


@torch.no_grad()
def fold_constants(layer: nn.Module) -> int:
    """A neuron without incoming weights outputs the constant f(b1[i]): move it into b2, so that its removal is exact.

    b2 += f(b1[i]) W2[:, i], then W2[:, i] = 0. Returns the number of neurons folded.
    """
    ffn_in, ffn_out = layer.intermediate.dense, layer.output.dense
    constant = (ffn_in.weight == 0).all(1)
    ffn_out.bias += ffn_out.weight[:, constant] @ layer.intermediate.intermediate_act_fn(ffn_in.bias[constant])
    ffn_out.weight[:, constant] = 0
    return int(constant.sum())


@torch.no_grad()
def silence(layer: nn.Module, neurons: torch.Tensor) -> None:
    """Set all weights from and to the neurons (a boolean mask) to zero, in place."""
    layer.intermediate.dense.weight[neurons] = 0
    layer.output.dense.weight[:, neurons] = 0


@dataclass
class ProximalPruning:
    """Hook: proximal gradient under a penalty that rises until `share` of each layer's neurons is zero, and then rests.

    After each optimiser step on the task loss alone, W <- prox(W, lr * strength). Once the share is zero (at `end` at the
    latest) a layer is settled; `alive` then holds the keep-masks, and `zeroed` how many neurons the penalty itself zeroed. The
    step is AdamW's where the papers use plain SGD; ramp, target and what is given back are ours, for a constant strength stops
    anywhere. Murray & Chiang 2015 (arXiv 1508.05051); Pan, Dong, Guo 2016 (arXiv 1606.07326); survey 2.2. Raises ValueError for
    a share outside [0, 1), an `end` below 1 and unknown groups.
    """

    share: float
    end: int
    prox: Prox = prox_l21
    groups: str = "coupled"
    alive: Keep = field(default_factory=dict)
    zeroed: dict[int, int] = field(default_factory=dict)
    strength: dict[int, float] = field(default_factory=dict)  # of the latest step
    taken: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # from each group so far

    def __post_init__(self) -> None:
        check_penalty(self.share, self.end, self.groups)

    def __call__(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Press on every layer that is not settled yet, and hold the dead of those that are."""
        rates = optimizer.param_groups[0]
        for number, layer in enumerate(model.bert.encoder.layer):
            if number in self.alive:
                silence(layer, ~self.alive[number])
                continue
            self.strength[number] = plan(self, layer, step, rates.get("initial_lr", rates["lr"]))
            amount = rates["lr"] * self.strength[number]
            parts = shrink_neurons(layer, self.prox, amount, self.groups, self.share)
            taken = self.taken.get(number, [0.0] * len(parts))
            self.taken[number] = [total + part for total, part in zip(taken, parts, strict=True)]
            self.zeroed[number] = int((smallest_norm(layer, self.groups) == 0).sum())
            if step >= self.end or self.zeroed[number] >= round(self.share * layer.intermediate.dense.out_features):
                settle(self, number, layer)


def check_penalty(share: float, end: int, groups: str) -> None:
    """Raise ValueError for a share outside [0, 1), an `end` before the first step, and unknown groups."""
    check_sparsity(share)
    check_groups(groups)
    if end < 1:
        raise ValueError(f"end must be a step, 1 or later, got {end}")


def plan(penalty: "ProximalPruning", layer: nn.Module, step: int, learning_rate: float) -> float:
    """The strength of this step, from the way that is left.

    Over a training a group shrinks by sum_i lr_i * strength_i, unless its gradient pulls it up again. The way to go is the dual
    norm below which `share` of the groups lie; it grows with the size of a group, so that penalties of different shape travel
    equally far. A ramp 1, 2, ..., end shares it out, and is planned anew at every step for what is left of both.
    """
    most = round(penalty.share * layer.intermediate.dense.out_features)
    if not most:
        return 0.0
    distance = smallest_norm(layer, penalty.groups, DUAL_ORDER[penalty.prox]).kthvalue(most).values.item()
    return distance * step / sum(range(step, penalty.end + 1)) / learning_rate


def settle(penalty: "ProximalPruning", number: int, layer: nn.Module) -> None:
    """The penalty rests: what is missing of `share` goes by norm, constants are folded, and survivors get back what it took.

    A penalty chooses and shrinks, and only the choice is wanted: the relaxed lasso (Meinshausen 2007) fits what survives anew
    without the penalty. The papers train long enough to regain the lengths; a short training has to begin with them.
    """
    penalty.alive[number] = alive = lowest(smallest_norm(layer, penalty.groups), penalty.share)
    fold_constants(layer)
    restored = [now + taken for now, taken in zip(neuron_groups(layer, penalty.groups), penalty.taken[number], strict=True)]
    set_groups(layer, penalty.groups, restored)
    silence(layer, ~alive)


def merge_pairs(incoming: torch.Tensor, outgoing: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Merge away `count` neurons, one at a time: the pair (i, j) with the least s_ij = <a_j^2> ||W_i - W_j||^2 becomes i.

    W_i is row i of `incoming` (neurons, inputs + 1), bias included; a_j is row j of `outgoing` (neurons, outputs), <> the
    mean over outputs. Surgery: a_i += a_j. Since <a_j^2> does not depend on i, the best i for j is its nearest neighbour. A
    merge changes the outputs by a_j (f(W_i x) - f(W_j x)), whose mean square is at most s_ij times E ||x||^2 times the square
    of f's steepest slope. Returns the keep-mask, the new outgoing weights and the saliencies s_ij in order. Srinivas & Babu
    2015, survey 2.2.
    """
    outgoing, kept = outgoing.clone(), torch.ones(len(incoming), dtype=torch.bool, device=incoming.device)
    # The faster way to compute distances, by a matrix product, would lose the digits that tell twins from neighbours.
    distance = torch.cdist(incoming, incoming, compute_mode="donot_use_mm_for_euclid_dist").square().fill_diagonal_(torch.inf)
    closest, partner = distance.min(dim=0)
    energy = outgoing.square().mean(1)
    saliencies = []
    for _ in range(count):
        saliency = torch.where(kept, energy * closest, torch.inf)
        j = int(saliency.argmin())
        i = int(partner[j])
        saliencies.append(float(saliency[j]))
        outgoing[i] += outgoing[j]
        energy[i] = outgoing[i].square().mean()
        kept[j] = False
        distance[j] = torch.inf
        orphans = kept & (partner == j)
        closest[orphans], partner[orphans] = distance[:, orphans].min(dim=0)
    return kept, outgoing, saliencies


@torch.no_grad()
def merge_neurons(model: nn.Module, count_per_layer: int, surgery: bool = True) -> dict[int, list[float]]:
    """Data-free merging of `count_per_layer` neurons in each layer, in place; the matrices shrink.

    Without `surgery` the same neurons go, and nobody takes over their outgoing weights: the control. Returns the saliency of
    each merge, per layer. Srinivas & Babu 2015 (arXiv 1507.06149), survey 2.2. Raises ValueError unless every layer keeps a
    neuron.
    """
    fewest = min(layer.intermediate.dense.out_features for layer in model.bert.encoder.layer)
    if not 0 <= count_per_layer < fewest:
        raise ValueError(f"count_per_layer must lie in 0..{fewest - 1}, got {count_per_layer}")
    saliencies = {}
    for number, layer in enumerate(model.bert.encoder.layer):
        ffn_in, ffn_out = layer.intermediate.dense, layer.output.dense
        incoming = torch.cat([ffn_in.weight, ffn_in.bias[:, None]], dim=1)
        keep, outgoing, saliencies[number] = merge_pairs(incoming, ffn_out.weight.T, count_per_layer)
        if surgery:
            ffn_out.weight.copy_(outgoing.T)
        remove_neurons(model, {number: keep})
    return saliencies
