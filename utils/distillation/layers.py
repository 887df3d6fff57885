"""Survey section 4.4: what a Transformer student learns from its teacher's layers: states, attention, relations of values.

Each loss maps student layers to teacher layers (`utils.distillation.objective.layer_map`) and looks at real tokens alone.
"""

import numpy as np
import torch
from scipy.optimize import linprog
from torch import nn
from torch.nn.functional import kl_div, log_softmax, mse_loss, normalize

from utils.distillation.losses import soft_targets, token_mean, with_labels
from utils.distillation.objective import LayerMap, Objective, check_temperature, layer_map, project
from utils.distillation.outputs import Outputs, needs

# --- K-20 patient knowledge distillation ----------------------------------------------------------------------------


def patient_map(kind: str, student_layers: int, teacher_layers: int) -> LayerMap:
    """PKD-Skip (`skip`) or PKD-Last (`last`): the map without the last student layer, which learns from the logits.

    12 layers into 6: {2, 4, 6, 8, 10} or {7, 8, 9, 10, 11}. Raises ValueError for another kind and for a student of one layer.
    """
    if kind not in ("skip", "last"):
        raise ValueError(f"PKD knows the layer maps 'skip' and 'last', got {kind!r}")
    if student_layers < 2:
        raise ValueError("PKD needs a student of 2 layers or more: the last one learns from the logits alone")
    return {i: j for i, j in layer_map(kind, student_layers, teacher_layers).items() if i < student_layers}


def patience_loss(student_cls: torch.Tensor, teacher_cls: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the [CLS] states (..., size) at length 1: directions are compared, not lengths.

    The mean also runs over the units, as in the authors' code, to which their grid for the weight (10 to 1000) belongs.
    """
    return mse_loss(normalize(student_cls.float(), dim=-1), normalize(teacher_cls.float(), dim=-1))


def patience(layers: LayerMap, projection: nn.Module | None = None) -> Objective:
    """The patient term of K-20a and K-20b: [CLS] of intermediate layers, the mean over mapped pairs. Sun et al. 2019, 4.4."""

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        pairs = [(student["cls", i], teacher["cls", j]) for i, j in layers.items()]
        return sum(patience_loss(project(mine, projection, given), given) for mine, given in pairs) / len(pairs)

    return Objective(loss, needs("cls", layers), needs("cls", layers.values()), _modules(projection))


def patient_distillation(
    layers: LayerMap, *, patience_weight: float = 100.0, temperature: float = 10.0, teacher_weight: float = 0.5
) -> Objective:
    """K-20a (PKD-Skip) and K-20b (PKD-Last), by the map: (1 - kappa) labels + kappa soft targets + beta patience.

    Without patience it is K-03. Sun, Cheng, Gan and Liu 2019 (arXiv 1908.09355), survey 4.4.
    """
    return with_labels(soft_targets(temperature), teacher_weight) + patience_weight * patience(layers)


# --- K-22 TinyBERT --------------------------------------------------------------------------------------------------


def hidden_states(layers: LayerMap, projection: nn.Module | None = None) -> Objective:
    """Mean squared difference of the states (of W_d times the student's), summed over mapped layers. Jiao et al. 2019, 4.4.

    Layer 0 are the embeddings: the map {0: 0} is TinyBERT's embedding loss.
    """

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        total = 0.0
        for i, j in layers.items():
            given = teacher["hidden", j]
            difference = project(student["hidden", i], projection, given) - given
            total = total + token_mean(difference.pow(2), student.attention_mask)
        return total

    return Objective(loss, needs("hidden", layers), needs("hidden", layers.values()), _modules(projection))


def token_pairs(attention_mask: torch.Tensor) -> torch.Tensor:
    """Which pairs of positions are both real tokens: (batch, 1, length, length), as numbers."""
    mask = attention_mask.float()
    return (mask.unsqueeze(-1) * mask.unsqueeze(-2)).unsqueeze(1)


def check_heads(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raise ValueError where student and teacher do not have the same number of heads, (batch, heads, length, ...)."""
    if student.shape[1] != teacher.shape[1]:
        counts = f"the student has {student.shape[1]}, its teacher {teacher.shape[1]}"
        raise ValueError(f"each head learns from one head, so that both must have as many: {counts}")


def score_loss(student: torch.Tensor, teacher: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of scores before their softmax, (batch, heads, length, length), over real pairs and heads.

    Raises ValueError for different numbers of heads.
    """
    check_heads(student, teacher)
    pairs = token_pairs(attention_mask)
    return ((student.float() - teacher.float()).pow(2) * pairs).sum() / (pairs.sum() * student.shape[1])


def attention_scores(layers: LayerMap) -> Objective:
    """TinyBERT's attention loss, summed over the mapped layers. Jiao et al. 2019, survey 4.4."""

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        return sum(score_loss(student["scores", i], teacher["scores", j], student.attention_mask) for i, j in layers.items())

    return Objective(loss, needs("scores", layers), needs("scores", layers.values()))


def tiny_bert_layers(layers: LayerMap, projection: nn.Module | None = None) -> Objective:
    """K-22, first stage: embeddings, hidden states (one W_d for all) and attention scores. Second stage: `soft_targets(1.0)`.

    Train both with `in_stages`. Jiao et al. 2019 (arXiv 1909.10351), survey 4.4.
    """
    return hidden_states({0: 0, **layers}, projection) + attention_scores(layers)


# --- K-24 MiniLM ----------------------------------------------------------------------------------------------------


def relation_loss(student_scores: torch.Tensor, teacher_scores: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher) || softmax(student)) of each real token's row over real tokens, the mean over rows and heads.

    Scores (batch, heads, length, length): scaled products of queries and keys give attention, of values among themselves the
    value relation. Raises ValueError for different numbers of heads.
    """
    check_heads(student_scores, teacher_scores)
    padding = attention_mask[:, None, None, :] == 0
    hidden = torch.finfo(torch.float32).min
    mine, given = (scores.float().masked_fill(padding, hidden) for scores in (student_scores, teacher_scores))
    rows = kl_div(log_softmax(mine, -1), log_softmax(given, -1), reduction="none", log_target=True).sum(-1)
    return (rows * attention_mask[:, None, :]).sum() / (attention_mask.sum() * rows.shape[1])


def value_scores(values: torch.Tensor) -> torch.Tensor:
    """V V^T / sqrt(head size), whose softmax is the value relation: (batch, heads, length, length)."""
    return values @ values.transpose(-1, -2) / values.shape[-1] ** 0.5


def attention_relation(student_layer: int, teacher_layer: int) -> Objective:
    """MiniLM's first term: the attention distributions of one layer. Wang et al. 2020 (arXiv 2002.10957), survey 4.4."""

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        return relation_loss(student["scores", student_layer], teacher["scores", teacher_layer], student.attention_mask)

    return Objective(loss, needs("scores", (student_layer,)), needs("scores", (teacher_layer,)))


def value_relation(student_layer: int, teacher_layer: int) -> Objective:
    """MiniLM's second term: how alike the values of a layer's tokens are. Head sizes may differ. Wang et al. 2020, 4.4."""

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        mine, given = student["values", student_layer], teacher["values", teacher_layer]
        return relation_loss(value_scores(mine), value_scores(given), student.attention_mask)

    return Objective(loss, needs("values", (student_layer,)), needs("values", (teacher_layer,)))


def mini_lm(student_layers: int, teacher_layers: int) -> Objective:
    """K-24: attention and value relation of the last layer alone; any depth and width, as many heads. No label, no logit.

    It is followed by fine-tuning. For very small students a teacher assistant stands in between, trained by the same loss
    (`utils.distillation.teachers.teacher_assistant`). Wang et al. 2020 (arXiv 2002.10957), survey 4.4.
    """
    return attention_relation(student_layers, teacher_layers) + value_relation(student_layers, teacher_layers)


# --- K-26 BERT-EMD --------------------------------------------------------------------------------------------------


def earth_movers_flow(cost: np.ndarray, student_weights: np.ndarray, teacher_weights: np.ndarray) -> np.ndarray:
    """Gamma >= 0, (S, T), of least sum(Gamma * cost) whose rows sum to the student's and columns to the teacher's weights.

    Rubner's earth mover's distance, as a linear programme. Raises ValueError for weights that are negative or do not sum alike.
    """
    S, T = cost.shape
    if min(student_weights.min(), teacher_weights.min()) < 0 or not np.isclose(student_weights.sum(), teacher_weights.sum()):
        raise ValueError("the weights of layers must be at least 0 and have one sum for student and teacher")
    rows, columns = np.kron(np.eye(S), np.ones(T)), np.kron(np.ones(S), np.eye(T))
    sums = np.concatenate([student_weights, teacher_weights * (student_weights.sum() / teacher_weights.sum())])
    # One of the equations follows from the others; left in, rounding could make the programme infeasible.
    solved = linprog(cost.ravel(), A_eq=np.vstack([rows, columns])[:-1], b_eq=sums[:-1], method="highs")
    if not solved.success:
        raise ValueError(f"no flow between the layers was found: {solved.message}")
    return solved.x.reshape(S, T).clip(min=0)


def cost_attention(flow: np.ndarray, cost: np.ndarray, weights: np.ndarray, temperature: float) -> np.ndarray:
    """Weights of the layers in rows, before both kinds are averaged: softmax(sum(c) / c_i / T), c_i = sum_j Gamma_ij cost_ij / w_i.

    c_i is what a unit of layer i costs: a layer that is cheap to move counts more at the next step. Give the transposes for the
    teacher's layers.
    """
    unit = (flow * cost).sum(1) / weights.clip(min=np.finfo(float).tiny)
    # A weight too small for the solver moves nothing; as in the authors' code it stays small: nobody knows what its layer costs.
    ratio = np.divide(unit.sum(), unit, out=np.zeros_like(unit), where=unit > 0) / temperature
    raised = np.exp(ratio - ratio.max())
    return raised / raised.sum()


def flattened(weights: np.ndarray) -> np.ndarray:
    """Softmax of weights in [0, 1]: none is more than e times another.

    The authors' code has this second softmax (`add_softmax`, on by default). Without it a layer whose cost is nearly zero, such
    as a copy of a teacher's layer, takes all the weight, and the others are taught nothing.
    """
    return np.exp(weights) / np.exp(weights).sum()


class EarthMover:
    """The loss of K-26: sum(Gamma * cost) for hidden states and for attention scores, with weights of the layers that move.

    `student_weights` and `teacher_weights` start uniform; after each step cost attention renews them for both kinds, their mean
    is taken, and flattened. `flow` keeps the last flow of both kinds, each (S, T). No gradient passes the flow.
    """

    def __init__(self, student_layers: int, teacher_layers: int, projection: nn.Module | None, temperature: float, learn: bool):
        check_temperature(temperature)
        self.student_weights = np.full(student_layers, 1 / student_layers)
        self.teacher_weights = np.full(teacher_layers, 1 / teacher_layers)
        self.projection, self.temperature, self.learn = projection, temperature, learn
        self.flow: dict[str, np.ndarray] = {}

    def costs(self, student: Outputs, teacher: Outputs, kind: str) -> torch.Tensor:
        """Mean squared difference between every student layer and every teacher layer, (S, T)."""
        mask, rows = student.attention_mask, []
        for i in range(1, len(self.student_weights) + 1):
            given = [teacher[kind, j] for j in range(1, len(self.teacher_weights) + 1)]
            if kind == "scores":
                rows.append(torch.stack([score_loss(student[kind, i], one, mask) for one in given]))
            else:
                mine = project(student[kind, i], self.projection, given[0])
                rows.append(torch.stack([token_mean((mine - one).pow(2), mask) for one in given]))
        return torch.stack(rows)

    def __call__(self, student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        """The distance, summed over hidden states and attention scores."""
        total, renewed = 0.0, []
        for kind in ("hidden", "scores"):
            cost = self.costs(student, teacher, kind)
            fixed = cost.detach().double().cpu().numpy()
            flow = self.flow[kind] = earth_movers_flow(fixed, self.student_weights, self.teacher_weights)
            renewed.append((cost_attention(flow, fixed, self.student_weights, self.temperature),
                            cost_attention(flow.T, fixed.T, self.teacher_weights, self.temperature)))  # fmt: skip
            total = total + (torch.from_numpy(flow).to(cost) * cost).sum()
        if self.learn:
            means = (np.mean(both, axis=0) for both in zip(*renewed, strict=True))
            self.student_weights, self.teacher_weights = (flattened(mean) for mean in means)
        return total


def earth_movers(
    student_layers: int, teacher_layers: int, projection: nn.Module | None = None, temperature: float = 1.0, learn: bool = True
) -> Objective:
    """K-26: every student layer may learn from every teacher layer, as much as the earth mover's distance moves between them.

    `learn=False` keeps the layers' weights uniform. Its `loss` is an `EarthMover`, where flow and weights can be read. The
    authors add it, times 0.01, to soft targets and labels, in one stage. Li et al. 2020 (arXiv 2010.06133), survey 4.4. Raises
    ValueError for a temperature of 0 or less.
    """
    mover = EarthMover(student_layers, teacher_layers, projection, temperature, learn)
    mine = needs("hidden", range(1, student_layers + 1)) + needs("scores", range(1, student_layers + 1))
    given = needs("hidden", range(1, teacher_layers + 1)) + needs("scores", range(1, teacher_layers + 1))
    return Objective(mover, mine, given, _modules(projection))


def _modules(projection: nn.Module | None) -> tuple[nn.Module, ...]:
    return () if projection is None else (projection,)
