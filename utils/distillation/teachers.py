"""Survey section 4.3: several teachers: a chain, a mean, a vote, specialists, and teachers that are left when they are outdone.

MT-DNN's ensemble (survey 4.4) is here too: it is a mean of teachers for some of several tasks.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from utils import bert
from utils.distillation.losses import with_labels
from utils.distillation.objective import Objective, check_share, check_temperature, check_weight, distill
from utils.distillation.outputs import Need, Outputs, Teacher, needs, size_of
from utils.losses import soft_target_loss
from utils.tasks import Split, Task
from utils.trials import Trial

# --- K-14 teacher assistant -----------------------------------------------------------------------------------------


def teacher_assistant(
    teacher: Teacher, chain: Sequence[Trial], objective: Callable[[int], Objective], teach: Callable[[Trial], Teacher], **options
) -> None:
    """K-14: train the models of a chain in turn, each by the one before: assistants first, the student last, in place.

    `objective(i)` is the loss of the chain's member i, `teach(trial)` makes a teacher of a trained assistant (a cache of its
    outputs). With one member it is plain distillation; with `mini_lm` it is MiniLM's assistant. Mirzadeh et al. 2019 (arXiv
    1902.03393), survey 4.3. Raises ValueError for an empty chain, or one that grows.
    """
    sizes = [teacher.size.parameters, *(size_of(trial.model).parameters for trial in chain)]
    if not chain or any(later > earlier for earlier, later in itertools.pairwise(sizes)):
        raise ValueError(f"a chain needs one member or more, none larger than the one before it: its parameters are {sizes}")
    for number, trial in enumerate(chain):
        if number:
            teacher = teach(chain[number - 1])
        distill(trial, objective(number), teacher, **options)


# --- K-15 averaged teachers, K-23 MT-DNN's ensemble -----------------------------------------------------------------


def mean_prediction(logits: Sequence[torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    """log of the mean over teachers of softmax(z / T): (batch, classes)."""
    each = torch.stack([log_softmax(one / temperature, -1) for one in logits])
    return each.logsumexp(0) - math.log(len(each))


class AveragedTeachers:
    """Several teachers that speak as one: their probabilities are averaged; `members` keeps what each gave.

    Its logits are the logarithm of the mean, its states those of the first. Survey 4.3. Raises ValueError without a teacher.
    """

    def __init__(self, teachers: Sequence[Teacher]):
        if not teachers:
            raise ValueError("averaging needs one teacher or more")
        self.teachers = list(teachers)
        self.size = max((teacher.size for teacher in teachers), key=lambda size: size.parameters)
        self.wanted: tuple[Need, ...] = tuple(set.intersection(*(set(teacher.wanted) for teacher in teachers)))

    def __call__(self, batch: dict) -> Outputs:
        """The mean prediction, the states of the first teacher, and all members."""
        members = tuple(teacher(batch) for teacher in self.teachers)
        logits = mean_prediction([member.logits for member in members])
        return Outputs(logits, batch["attention_mask"], members[0].states, members)


def averaged_targets(temperature: float = 2.0, teacher_weight: float = 0.5) -> Objective:
    """K-15: (1 - kappa) labels + kappa T^2 KL(mean of the teachers' p_t || p_s), all at T, for `AveragedTeachers`.

    With one teacher it is K-03. Survey 4.3. Raises ValueError for T <= 0 and for a weight outside [0, 1].
    """
    check_temperature(temperature)

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        mean = mean_prediction([member.logits for member in teacher.members or (teacher,)], temperature)
        return soft_target_loss(student.logits, temperature * mean, temperature)

    return with_labels(Objective(loss), teacher_weight)


def task_rows(label_counts: Sequence[int]) -> list[slice]:
    """The logits of each task where one classifier holds the classes of all, one task after the other."""
    ends = np.cumsum([0, *label_counts]).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def multi_task(label_counts: Sequence[int], taught: Sequence[bool], task_of: torch.Tensor) -> Objective:
    """K-23: tasks share the encoder; a task with a teacher takes the mean of hard and soft cross-entropy, others the hard.

    `task_of` (examples,) is the task of each row of the split, `taught` says which tasks have a teacher; labels count from 0
    within their task, and student and teacher hold all tasks' classes in one classifier (`task_rows`). The teacher may be an
    ensemble (`AveragedTeachers`). Liu et al. 2019 (arXiv 1904.09482), survey 4.4.
    """
    slices = task_rows(label_counts)

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        total, here = 0.0, task_of[torch.as_tensor(batch["rows"])].to(student.logits.device)
        for number in here.unique().tolist():
            mine, labels = student.logits[here == number][:, slices[number]], batch["labels"][here == number]
            one = cross_entropy(mine, labels)
            if taught[number]:
                members = [member.logits[here == number][:, slices[number]] for member in teacher.members or (teacher,)]
                soft = mean_prediction(members).exp()
                one = (one - (soft * log_softmax(mine, -1)).sum(-1).mean()) / 2
            total = total + one * len(labels)
        return total / len(here)

    return Objective(loss)


# --- K-16 relative dissimilarity, by vote ---------------------------------------------------------------------------


def vote(members: Sequence[torch.Tensor], triplets: torch.Tensor) -> torch.Tensor:
    """Whether most teachers find the second example of each triplet nearer to the first than the third is; a tie says yes.

    `members` are each teacher's states (batch, size), `triplets` (count, 3) indices; returns (count,) of bool.
    """
    first, second, third = triplets.T
    votes = [(one[first] - one[second]).norm(dim=-1) <= (one[first] - one[third]).norm(dim=-1) for one in members]
    return torch.stack(votes).float().mean(0) >= 0.5


def relative_dissimilarity(states: torch.Tensor, triplets: torch.Tensor, nearer: torch.Tensor, margin: float) -> torch.Tensor:
    """max(0, d(p_i, p_i+) - d(p_i, p_i-) + Delta), the mean over triplets. Student states (batch, size).

    `nearer` says for each triplet whether its second example is the nearer one (+), else its third is.
    """
    first, second, third = triplets.T
    positive, negative = torch.where(nearer, second, third), torch.where(nearer, third, second)
    near, far = ((states[first] - states[other]).norm(dim=-1) for other in (positive, negative))
    return (near - far + margin).clamp(min=0).mean()


def random_triplets(count: int, examples: int, device: torch.device) -> torch.Tensor:
    """`count` triplets of three different examples, (count, 3); there must be three or more."""
    return torch.rand(count, examples, device=device).argsort(-1)[:, :3]


def voted_dissimilarity(student_layer: int, teacher_layers: Sequence[int], margin: float = 0.1, count: int = 64) -> Objective:
    """K-16: the student shall find nearer what most teachers find nearer, at [CLS] of one layer each, for random triplets.

    It is added to `averaged_targets`. You et al. 2017, survey 4.3. Needs `AveragedTeachers`. Raises ValueError for a negative
    margin, and where there are not as many teachers as layers.
    """
    check_weight(margin, "margin")

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        if len(teacher.members) != len(teacher_layers):
            raise ValueError(f"one layer for each teacher: there are {len(teacher.members)} and {len(teacher_layers)} layers")
        states = student["cls", student_layer].float()
        if len(states) < 3:
            return 0 * states.sum()  # an epoch's last batch may be too small for a triplet
        triplets = random_triplets(count, len(states), states.device)
        given = [member["cls", layer].float() for member, layer in zip(teacher.members, teacher_layers, strict=True)]
        return relative_dissimilarity(states, triplets, vote(given, triplets), margin)

    return Objective(loss, needs("cls", (student_layer,)))


# --- K-17 generalist and specialists --------------------------------------------------------------------------------


def confusable_subsets(probabilities: torch.Tensor, count: int, seed: int = 0) -> list[list[int]]:
    """Cut the classes into `count` sets that the generalist confuses: k-means on the columns of its predictions' covariance.

    `probabilities` (examples, classes). Sets of one class are dropped: nothing in them can be confused. Hinton et al. 2015,
    survey 4.3. Raises ValueError unless 1 <= count < classes.
    """
    classes = probabilities.shape[1]
    if not 1 <= count < classes:
        raise ValueError(f"count must lie in 1..{classes - 1}, got {count}")
    columns = np.cov(probabilities.double().cpu().numpy(), rowvar=False)
    _, cluster = kmeans2(columns, count, seed=seed, minit="++")
    return [found for k in range(count) if len(found := np.flatnonzero(cluster == k).tolist()) > 1]


def merge_labels(labels: torch.Tensor, subset: Sequence[int]) -> torch.Tensor:
    """A specialist's labels: 0, 1, ... for the classes of its subset in order, and last the dustbin for all others."""
    merged = torch.full_like(labels, len(subset))
    for number, label in enumerate(subset):
        merged[labels == label] = number
    return merged


def merge_probabilities(probabilities: torch.Tensor, subset: Sequence[int]) -> torch.Tensor:
    """(..., classes) to (..., subset + 1): the dustbin gets what the other classes have."""
    inside = probabilities[..., list(subset)]
    rest = torch.ones(probabilities.shape[-1], dtype=torch.bool, device=probabilities.device)
    rest[list(subset)] = False
    return torch.cat([inside, probabilities[..., rest].sum(-1, keepdim=True)], -1)


def specialist_task(task: Task, subset: Sequence[int], seed: int = 0) -> tuple[Task, float]:
    """The specialist's task: all training sentences of its subset and as many random others, labels merged.

    Also returns how many times the subset is oversampled against the dustbin, whose logit must rise by its logarithm
    (`unbiased`). Raises ValueError for a subset without a sentence, or one that leaves none.
    """
    labels = task.train.labels
    special = torch.isin(labels, torch.tensor(list(subset)))
    inside, outside = special.nonzero().flatten(), (~special).nonzero().flatten()
    if not len(inside) or not len(outside):
        raise ValueError(f"the subset {list(subset)} must have some sentences of {task.name}, and not all")
    count = min(len(inside), len(outside))
    rows = torch.cat([inside, outside[torch.randperm(len(outside), generator=torch.Generator().manual_seed(seed))[:count]]])
    train = _part(task.train, rows.sort().values, subset)
    splits = {name: _part(getattr(task, name), None, subset) for name in ("validation", "selection")}
    names = [*(task.label_names[label] for label in subset), "other"]
    key = f"{task.key}-specialist-{'-'.join(map(str, subset))}-{seed}"
    return dataclasses.replace(task, train=train, label_names=names, key=key, **splits), len(outside) / count


def _part(split: Split, rows: torch.Tensor | None, subset: Sequence[int]) -> Split:
    """Some rows of a split (None: all) with a specialist's labels."""
    chosen = range(len(split)) if rows is None else rows.tolist()
    labels = merge_labels(split.labels[list(chosen)], subset)
    data = split.data.select(chosen).remove_columns("label").add_column("label", labels.tolist())
    return Split(data, [split.input_ids[row] for row in chosen], labels)


@torch.no_grad()
def specialist_from(generalist: nn.Module, subset: Sequence[int]) -> nn.Module:
    """A copy of the generalist whose classifier has the subset's rows, and for the dustbin the mean of the other rows."""
    model = bert.fresh_copy(generalist)
    weight, bias = model.classifier.weight, model.classifier.bias
    others = [label for label in range(len(bias)) if label not in set(subset)]
    head = nn.Linear(weight.shape[1], len(subset) + 1).to(weight)
    head.weight.copy_(torch.cat([weight[list(subset)], weight[others].mean(0, keepdim=True)]))
    # As probable as all the others together, were they equally likely.
    head.bias.copy_(torch.cat([bias[list(subset)], bias[others].mean(0, keepdim=True) + math.log(len(others))]))
    model.classifier, model.num_labels, model.config.num_labels = head, len(head.bias), len(head.bias)
    return model


def unbiased(specialist_logits: torch.Tensor, oversampled: float) -> torch.Tensor:
    """The specialist's logits as if it had seen its classes as often as the data has them."""
    corrected = specialist_logits.clone()
    corrected[..., -1] += math.log(oversampled)
    return corrected


class Opinion(NamedTuple):
    """What a specialist says of a batch: probabilities (batch, subset + 1, the dustbin last) over the classes of its subset."""

    probabilities: torch.Tensor
    subset: Sequence[int]


def specialist_loss(logits: torch.Tensor, generalist: torch.Tensor, opinions: Sequence[Opinion], top: int = 1) -> torch.Tensor:
    """KL(p_g || q) + the sum over the active specialists m of KL(p_m || q merged to m's classes), one value an example.

    q = softmax(logits), (batch, classes); `generalist` holds p_g. A specialist is active where its subset holds one of the
    generalist's `top` classes. Hinton et al. 2015, survey 4.3.
    """
    q, likely = logits.softmax(-1), generalist.topk(top, -1).indices
    loss = kl_div(log_softmax(logits, -1), generalist, reduction="none").sum(-1)
    for p, subset in opinions:
        active = torch.isin(likely, torch.tensor(list(subset), device=likely.device)).any(-1)
        merged = merge_probabilities(q, subset).clamp(min=torch.finfo(q.dtype).tiny)
        loss = loss + active * kl_div(merged.log(), p, reduction="none").sum(-1)
    return loss


def combined_prediction(generalist: torch.Tensor, opinions: Sequence[Opinion], top: int = 1) -> torch.Tensor:
    """K-17: q of least `specialist_loss` for every example, (batch, classes): what generalist and specialists say together.

    Found by L-BFGS from the generalist's own prediction, (batch, classes).
    """
    p_g = generalist.double()
    opinions = [Opinion(one.probabilities.double(), one.subset) for one in opinions]
    logits = p_g.clamp(min=1e-12).log().requires_grad_()
    options = {"max_iter": 200, "tolerance_grad": 1e-9, "tolerance_change": 1e-12, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = specialist_loss(logits, p_g, opinions, top).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1).to(generalist.dtype)


@dataclasses.dataclass(frozen=True)
class Specialist:
    """A trained specialist as a teacher (on the whole task's sentences), its subset, and how oversampled that was."""

    teacher: Teacher
    subset: Sequence[int]
    oversampled: float

    def opinion(self, batch: dict) -> Opinion:
        """What it says of a batch, corrected for the sentences it was trained on."""
        return Opinion(unbiased(self.teacher(batch).logits, self.oversampled).softmax(-1), self.subset)


def specialist_targets(specialists: Sequence[Specialist], top: int = 1) -> Objective:
    """K-17 for a student: it minimises `specialist_loss` itself, with the generalist as its teacher and specialists beside it.

    Without a specialist it is the KL to the generalist. Hinton et al. 2015, survey 4.3.
    """

    def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        opinions = [specialist.opinion(batch) for specialist in specialists]
        return specialist_loss(student.logits, teacher.logits.softmax(-1), opinions, top).mean()

    return Objective(loss)


# --- K-18 teachers with a threshold, and their best K classes -------------------------------------------------------


def top_probabilities(teacher_logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's `count` most probable classes and their probabilities, made to sum to 1: (batch, count) each.

    All that is stored of a teacher with many classes. Raises ValueError unless 1 <= count <= classes.
    """
    if not 1 <= count <= teacher_logits.shape[-1]:
        raise ValueError(f"count must lie in 1..{teacher_logits.shape[-1]}, got {count}")
    best = teacher_logits.softmax(-1).topk(count, -1)
    return best.values / best.values.sum(-1, keepdim=True), best.indices


def top_loss(student_logits: torch.Tensor, probabilities: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the student with the teacher's stored probabilities, (batch,)."""
    return -(probabilities * log_softmax(student_logits, -1).gather(-1, classes)).sum(-1)


class SelectiveTeachers:
    """K-18: one teacher for each part of the data; a part loses its teacher once the student beats it by a threshold.

    Tan et al. 2019 (arXiv 1902.10461, survey 4.3) have a teacher for each pair of languages; here, an analogue, for each part
    of the sentences. `part_of` (examples,) is the part of each row, `accuracies` what each teacher reaches, in percent,
    `threshold` in points. `seen` counts the rows on which the student trained, `taught` those with a teacher, `switches` how
    often a review took a teacher away or gave one back.
    """

    def __init__(
        self, teachers: Sequence[Teacher], part_of: torch.Tensor, accuracies: Sequence[float], threshold: float, top: int = 2
    ):
        if len(teachers) != len(accuracies) or int(part_of.max()) >= len(teachers):
            raise ValueError(f"one accuracy and one teacher for each part: got {len(accuracies)}, {len(teachers)} and "
                             f"parts up to {int(part_of.max())}")  # fmt: skip
        self.teachers, self.part_of, self.accuracies = list(teachers), part_of, list(accuracies)
        self.threshold, self.top = threshold, top
        self.active = [True] * len(self.teachers)
        self.seen = self.taught = self.switches = 0
        self.size, self.wanted = max((t.size for t in teachers), key=lambda size: size.parameters), ()

    def review(self, student_accuracies: Sequence[float]) -> None:
        """A teacher teaches while the student's accuracy on its part is below the teacher's plus the threshold."""
        pairs, before = zip(student_accuracies, self.accuracies, strict=True), self.active
        self.active = [mine < given + self.threshold for mine, given in pairs]
        self.switches += sum(now != then for now, then in zip(self.active, before, strict=True))

    def reviewing(self, every: int, accuracies: Callable[[nn.Module], Sequence[float]]) -> Callable:
        """A hook for `after_step` that reviews the teachers every so many steps. ValueError for fewer than one."""
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")

        def after_step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            if step % every == 0:
                self.review(accuracies(model))
                model.train()

        return after_step

    def __call__(self, batch: dict) -> Outputs:
        """Each row's logits by the teacher of its part."""
        found = [teacher(batch) for teacher in self.teachers]
        parts = self.part_of[torch.as_tensor(batch["rows"])].to(found[0].logits.device)
        logits = torch.stack([one.logits for one in found])[parts, torch.arange(len(parts), device=parts.device)]
        return Outputs(logits, batch["attention_mask"], {}, tuple(found))

    def objective(self, teacher_weight: float = 0.5) -> Objective:
        """(1 - kappa) labels + kappa best-K soft targets on rows with an active teacher, the labels alone on others."""
        check_share(teacher_weight, "teacher_weight")

        def loss(student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
            hard = cross_entropy(student.logits, batch["labels"], reduction="none")
            soft = top_loss(student.logits, *top_probabilities(teacher.logits, self.top))
            taught = torch.tensor(self.active)[self.part_of[torch.as_tensor(batch["rows"])]]
            self.seen, self.taught = self.seen + len(taught), self.taught + int(taught.sum())
            share = teacher_weight * taught.to(hard)
            return ((1 - share) * hard + share * soft).mean()

        return Objective(loss)
