"""Survey section 4.1: what a student can learn from one teacher: its logits, its derivatives, its features, its decisions.

Every method is a pure function of tensors, and a constructor that makes an `Objective` of it. Students of low precision are in
`utils.distillation.precision`, the losses between Transformer layers (section 4.4) in `utils.distillation.layers`.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from utils.distillation.objective import Objective, check_share, check_temperature, check_weight, project
from utils.distillation.outputs import Outputs, needs
from utils.losses import soft_target_loss


def labels() -> Objective:
    """Cross-entropy with the labels alone: what every method is compared with."""
    return Objective(lambda student, teacher, batch: cross_entropy(student.logits, batch["labels"]))


# --- K-01 logit regression, K-02 noisy teacher ----------------------------------------------------------------------


def logit_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """1/2 ||z_s - z_t||^2, the mean over examples, both centred over the classes, for no softmax sees a common shift.

    Logits (batch, classes). Ba and Caruana 2014, survey 4.1.
    """
    difference = student_logits - teacher_logits
    difference = difference - difference.mean(-1, keepdim=True)
    return 0.5 * difference.pow(2).sum(-1).mean()


def logit_regression() -> Objective:
    """K-01: the student regresses the teacher's logits and sees no label. Ba and Caruana 2014, survey 4.1."""
    return Objective(lambda student, teacher, batch: logit_loss(student.logits, teacher.logits))


def add_noise(teacher_logits: torch.Tensor, share: float, sigma: float, relative: bool = False) -> torch.Tensor:
    """z_t + xi for a random `share` of the examples, z_t for the others; xi ~ N(0, sigma^2) for every logit.

    With `relative` z_t (1 + xi), as Sau and Balasubramanian write it; the survey's text adds (4.1).
    """
    chosen = torch.rand(len(teacher_logits), 1, device=teacher_logits.device) < share
    noise = sigma * torch.randn_like(teacher_logits)
    return teacher_logits + chosen * noise * (teacher_logits if relative else 1)


def noisy_logit_regression(share: float, sigma: float, relative: bool = False) -> Objective:
    """K-02: logit regression on a teacher whose logits are noisy, which regularises. Sau and Balasubramanian 2016, survey 4.1.

    Raises ValueError for a share outside [0, 1] or a negative sigma.
    """
    check_share(share, "the share of noisy examples")
    check_weight(sigma, "sigma")
    return Objective(lambda s, t, batch: logit_loss(s.logits, add_noise(t.logits, share, sigma, relative)))


# --- K-03 soft targets ----------------------------------------------------------------------------------------------


def soft_targets(temperature: float = 2.0) -> Objective:
    """K-03: the teacher's probabilities at a temperature. Hinton, Vinyals and Dean 2015, survey 4.1. ValueError for T <= 0."""
    check_temperature(temperature)
    return Objective(lambda student, teacher, batch: soft_target_loss(student.logits, teacher.logits, temperature))


def with_labels(objective: Objective, teacher_weight: float) -> Objective:
    """kappa * (the teacher's loss) + (1 - kappa) * (cross-entropy with labels). ValueError for a weight outside [0, 1]."""
    check_share(teacher_weight, "teacher_weight")
    return teacher_weight * objective + (1 - teacher_weight) * labels()


# --- K-04 Sobolev training ------------------------------------------------------------------------------------------


def input_gradient(outputs: Outputs, direction: torch.Tensor, create_graph: bool) -> torch.Tensor:
    """d <v, log p> / dx for every token's embedding x, (batch, length, hidden size). `direction` is v, (batch, classes)."""
    value = (direction * outputs.logits.log_softmax(-1)).sum()
    with torch.autocast(value.device.type, enabled=False):
        return torch.autograd.grad(value, outputs["inputs", 0], create_graph=create_graph)[0].float()


def sobolev_loss(student: Outputs, teacher: Outputs, direction: torch.Tensor) -> torch.Tensor:
    """|| d <v, log p_s> / dx - d <v, log p_t> / dx ||^2 over a sentence's tokens, the mean over sentences.

    Raises ValueError where the two do not read embeddings of the same size.
    """
    mine, given = input_gradient(student, direction, True), input_gradient(teacher, direction, False)
    if mine.shape != given.shape:
        widths = f"{mine.shape[-1]} and {given.shape[-1]}"
        raise ValueError(f"student and teacher must read the same embeddings, but theirs are {widths} wide")
    return (mine - given.detach()).pow(2).sum((1, 2)).mean()


def sobolev(weight: float = 1.0) -> Objective:
    """K-04: soft targets (T = 1) and, with `weight`, the derivative by the embedded input along one random direction.

    The stochastic, first-order form of Czarnecki et al. 2017, survey 4.1. Log-probabilities, so that no shift of the logits
    costs. Needs a `LiveTeacher` with the same word embeddings as the student.
    """
    check_weight(weight)

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        direction = nn.functional.normalize(torch.randn_like(student.logits), dim=-1)
        soft = soft_target_loss(student.logits, teacher.logits.detach(), 1.0)
        return soft + weight * sobolev_loss(student, teacher, direction)

    return Objective(loss, needs("inputs", (0,)), needs("inputs", (0,)))


# --- K-07 FitNets hints ---------------------------------------------------------------------------------------------


def token_mean(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean of (batch, length, size) over real tokens and the last axis."""
    mask = attention_mask.unsqueeze(-1)
    return (values * mask).sum() / (mask.sum() * values.shape[-1])


def hint_loss(guided: torch.Tensor, hint: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """1/2 (u_h - r(v_g))^2, the mean over real tokens and units. States (batch, length, size)."""
    return 0.5 * token_mean((guided - hint).pow(2), attention_mask)


def hints(student_layer: int, teacher_layer: int, projection: nn.Module | None = None) -> Objective:
    """K-07, first stage: the guided layer regresses the hint layer through a regressor; what lies above gets no gradient.

    Second stage: soft targets (`utils.distillation.objective.in_stages`). Romero et al. 2014, survey 4.1.
    """

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        hint = teacher["hidden", teacher_layer]
        return hint_loss(project(student["hidden", student_layer], projection, hint), hint, student.attention_mask)

    modules = () if projection is None else (projection,)
    return Objective(loss, needs("hidden", (student_layer,)), needs("hidden", (teacher_layer,)), modules)


# --- K-08 flow of solution procedure --------------------------------------------------------------------------------


def gram(lower: torch.Tensor, upper: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """G = F_1^T F_2 / n, the mean over a sentence's n real tokens: (batch, size, size) of features (batch, length, size)."""
    mask = attention_mask.unsqueeze(-1)
    return (lower * mask).float().transpose(1, 2) @ upper.float() / mask.sum(1, keepdim=True)


def flow_matrices(
    student_pairs: list[tuple[int, int]],
    teacher_pairs: list[tuple[int, int]],
    projection: nn.Module | None = None,
    width: int = 64,
    seed: int = 0,
) -> Objective:
    """K-08: match how features change from a lower to an upper layer, the FSP matrices of pairs. Yim et al. 2017, 4.1.

    The mean squared difference over entries and pairs. BERT's matrices would have 384^2 entries and more, so that both models'
    states first pass one fixed random projection to `width`. In the paper a first stage, before the task. Raises ValueError for
    lists of different lengths, or none.
    """
    if len(student_pairs) != len(teacher_pairs) or not student_pairs:
        counts = f"{len(student_pairs)} and {len(teacher_pairs)}"
        raise ValueError(f"give as many pairs of student layers as of teacher layers, one or more; got {counts}")
    generator = torch.Generator().manual_seed(seed)
    fixed: dict[int, torch.Tensor] = {}

    def reduced(outputs: Outputs, layer: int, learned: nn.Module | None, like: torch.Tensor) -> torch.Tensor:
        state = project(outputs["hidden", layer], learned, like)
        if not fixed:
            fixed[0] = torch.randn(state.shape[-1], width, generator=generator) / width**0.5
        return state @ fixed[0].to(state.device)

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        total, like = 0.0, teacher["hidden", teacher_pairs[0][0]]
        for pair, teacher_pair in zip(student_pairs, teacher_pairs, strict=True):
            mine = gram(*(reduced(student, layer, projection, like) for layer in pair), student.attention_mask)
            given = gram(*(reduced(teacher, layer, None, like) for layer in teacher_pair), student.attention_mask)
            total += mse_loss(mine, given)
        return total / len(student_pairs)

    layers = [tuple(dict.fromkeys(layer for pair in pairs for layer in pair)) for pairs in (student_pairs, teacher_pairs)]
    modules = () if projection is None else (projection,)
    return Objective(loss, needs("hidden", layers[0]), needs("hidden", layers[1]), modules)


# --- K-09 representational distance ---------------------------------------------------------------------------------


def distance_matrix(states: torch.Tensor) -> torch.Tensor:
    """Squared distance between every two examples, over the number of units: (batch, batch) of states (batch, size).

    Rotating all states changes nothing, and no width is asked for.
    """
    difference = states.float().unsqueeze(1) - states.float().unsqueeze(0)
    return difference.pow(2).mean(-1)


def distance_loss(student_states: torch.Tensor, teacher_states: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the two distance matrices over pairs of examples (zero for a batch of one)."""
    pairs = torch.triu_indices(len(student_states), len(student_states), 1)
    mine, given = (distance_matrix(states)[pairs[0], pairs[1]] for states in (student_states, teacher_states))
    return (mine - given).pow(2).sum() / max(1, pairs.shape[1])


def representational_distance(layers: dict[int, int]) -> Objective:
    """K-09: examples shall be as far from each other for the student as for its teacher, at [CLS] of the mapped layers.

    McClure and Kriegeskorte 2016, survey 4.1.
    """

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        return sum(distance_loss(student["cls", i], teacher["cls", j]) for i, j in layers.items()) / len(layers)

    return Objective(loss, needs("cls", layers), needs("cls", layers.values()))


# --- K-10 word level, K-11 sequence level ---------------------------------------------------------------------------


def word_level_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, words: torch.Tensor, teacher_weight: float, temperature: float = 1
) -> torch.Tensor:
    """kappa * T^2 KL(teacher || student) + (1 - kappa) * cross-entropy with the gold word, the mean over predicted positions.

    Logits (batch, length, words), `words` (batch, length) with -100 where nothing is predicted. Kim and Rush 2016 (survey 4.1)
    for a decoder's next word; here for the words that a masked language model predicts.
    """
    check_temperature(temperature)
    check_share(teacher_weight, "teacher_weight")
    here = words != -100
    soft = soft_target_loss(student_logits[here], teacher_logits[here], temperature)
    return teacher_weight * soft + (1 - teacher_weight) * cross_entropy(student_logits[here], words[here])


def best_outputs() -> Objective:
    """K-11a, analogue of sequence-level KD: the teacher's best output is the label. Kim and Rush 2016, survey 4.1.

    A classifier's output is one class, so the best of a beam is its most probable class.
    """
    return Objective(lambda student, teacher, batch: cross_entropy(student.logits, teacher.logits.argmax(-1)))


def nearest_outputs(teacher_logits: torch.Tensor, gold: torch.Tensor, beam: float) -> torch.Tensor:
    """The label where the teacher gives it a probability of at least `beam`, the teacher's best class elsewhere: (batch,)."""
    trusted = teacher_logits.softmax(-1).gather(-1, gold.unsqueeze(-1)).squeeze(-1) >= beam
    return torch.where(trusted, gold, teacher_logits.argmax(-1))


def interpolated_outputs(beam: float = 0.1) -> Objective:
    """K-11b, analogue of sequence-level interpolation: of the teacher's likely outputs the one that is nearest to the label.

    Kim and Rush take it from the beam by BLEU; here the beam are the classes with a probability of at least `beam`. 0 gives the
    labels, above 1 the teacher's best outputs. Survey 4.1. Raises ValueError for a negative or infinite `beam`.
    """
    check_weight(beam, "beam")
    return Objective(lambda s, t, batch: cross_entropy(s.logits, nearest_outputs(t.logits, batch["labels"], beam)))


def ensemble_outputs() -> Objective:
    """K-11c, analogue of ensemble distillation: the best output of several teachers' mean prediction is the label.

    Freitag, Al-Onaizan and Sankaran 2017, survey 4.1. Needs `utils.distillation.teachers.AveragedTeachers`.
    """

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        if not teacher.members:
            raise ValueError("an ensemble is needed: give an AveragedTeachers of two teachers or more")
        mean = torch.stack([member.logits.softmax(-1) for member in teacher.members]).mean(0)
        return cross_entropy(student.logits, mean.argmax(-1))

    return Objective(loss)
