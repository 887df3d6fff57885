"""Survey section 4.4: K-28, XtremeDistil. One thing after another, on unlabelled texts, and unfrozen from the top down.

Mukherjee and Awadallah 2020 (ACL). Stage 1: the student's sentence vector, projected, becomes the teacher's; stage 2: its
logits become the teacher's; both on unlabelled texts. Stage 3: labels. Within a stage the top layer learns first, then the
next with it, and so on, so that a new goal does not wipe out what the layers below have learned. `unfrozen` serves
MobileBERT's progressive transfer too.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import gelu, kl_div, log_softmax

from utils.distillation.losses import logit_loss
from utils.distillation.outputs import Teacher
from utils.parts import BiLSTM, TextCNN
from utils.tasks import Task
from utils.training import Loss, cross_entropy
from utils.trials import Trial

# --- what is compared -----------------------------------------------------------------------------------------------


class Projection(nn.Module):
    """GELU(W h + b): a student's sentence vector in the teacher's width."""

    def __init__(self, student_size: int, teacher_size: int):
        super().__init__()
        self.dense = nn.Linear(student_size, teacher_size)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(batch, student size) to (batch, teacher size)."""
        return gelu(self.dense(h))


def sentence_vector(student: nn.Module, batch: dict) -> torch.Tensor:
    """A student's vector of a sentence before its head: what the LSTM or the filters leave, or the last layer's [CLS];
    (batch, size).
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return student.encode(**inputs) if isinstance(student, BiLSTM | TextCNN) else student.bert(**inputs).last_hidden_state[:, 0]


def vector_size(student: nn.Module) -> int:
    """The size of `sentence_vector`."""
    if isinstance(student, BiLSTM):
        return 2 * student.lstm.hidden_size
    return student.classifier.in_features


def representation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(softmax(z_t) || softmax(z_s)) over the units of a state, the mean over sentences; (batch, size) both.

    The paper writes KLD of two states without saying how they become distributions; a softmax makes them so. (The authors'
    later code for Transformer students has a mean squared error in its place.)
    """
    return kl_div(log_softmax(student.float(), -1), teacher.float().softmax(-1), reduction="none").sum(-1).mean()


# --- stages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One goal: a loss, the task on whose training sentences it is pursued, and modules that learn beside the student.

    `reaches_head` is False for a loss on the sentence vector: what lies above it gets no gradient, and does not thaw.
    """

    loss: Loss
    task: Task
    modules: tuple[nn.Module, ...] = ()
    reaches_head: bool = True


def xtreme_stages(teacher: Teacher, layer: int, transfer: Task, labelled: Task, projection: Projection) -> list[Stage]:
    """Representation, logits, labels: the three stages. `teacher` must give the [CLS] of `layer` on the transfer sentences.

    Paper: a middle layer of the teacher is the best hint. Logits by half the squared difference, labels by cross-entropy.
    """

    def representation(model: nn.Module, batch: dict) -> torch.Tensor:
        return representation_loss(projection(sentence_vector(model, batch)), teacher(batch)["cls", layer])

    def logits(model: nn.Module, batch: dict) -> torch.Tensor:
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        return logit_loss(found, teacher(batch).logits)

    first = Stage(representation, transfer, (projection,), reaches_head=False)
    return [first, Stage(logits, transfer), Stage(cross_entropy, labelled)]


def from_the_top(student: nn.Module) -> list[list[nn.Module]]:
    """A student's layers, the head first, then down to the embeddings: the order in which they thaw."""
    if isinstance(student, BiLSTM):
        return [[student.classifier, student.hidden], [student.lstm], [student.embeddings]]
    if isinstance(student, TextCNN):
        return [[student.classifier], [student.convolutions], [student.embeddings]]
    layers = [[layer] for layer in reversed(student.bert.encoder.layer)]
    return [[student.classifier, student.bert.pooler], *layers, [student.bert.embeddings]]


@contextlib.contextmanager
def unfrozen(model: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Inside the block nothing of the model takes a gradient but these modules; afterwards all is as it was."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for module in modules:
            module.requires_grad_(True)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def train_in_stages(trial: Trial, stages: list[Stage], steps: int, *, gradual: bool = True, **options) -> list[int]:
    """Pursue one goal after another, each for `steps`; returns how many parameters moved in each phase. K-28.

    `gradual`: a stage falls into phases, one per layer that its loss reaches, each with one layer more, from the top down, and
    as equal as the steps allow; without it there is one phase, in which everything learns. Options go to `trial.recover`.
    Raises ValueError for fewer steps than layers.
    """
    layers = from_the_top(trial.model)
    if gradual and steps < len(layers):
        raise ValueError(f"a stage needs a step for each of its {len(layers)} phases, got {steps}")
    learned, before = [], trial.task
    for stage in stages:
        trial.task = stage.task
        groups = layers if stage.reaches_head else layers[1:]
        groups = groups if gradual else [[module for group in groups for module in group]]
        for phase in range(len(groups)):
            open_modules = [module for group in groups[: phase + 1] for module in group]
            share = steps * (phase + 1) // len(groups) - steps * phase // len(groups)
            learned.append(train_open(trial, open_modules, stage, share, **options))
    trial.task = before
    return learned


def train_open(trial: Trial, open_modules: list[nn.Module], stage: Stage, steps: int, **options) -> int:
    """Train the given modules of a trial's model, and those of the stage; returns how many parameters the model has in tensors
    that moved.
    """
    device = next(trial.model.parameters()).device
    beside = [parameter for module in stage.modules for parameter in module.to(device).parameters()]
    with unfrozen(trial.model, open_modules):
        own = [parameter for parameter in trial.model.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in own]
        trial.recover(steps, loss=stage.loss, train_embeddings=True, parameters=[{"params": own + beside}], **options)
    return sum(now.numel() for now, then in zip(own, before, strict=True) if not torch.equal(now, then))
