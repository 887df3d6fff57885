"""Survey section 4.4: students that first learn the language: masked words, alone (K-25) or with a teacher beside them (K-21).

Masking, the head that guesses masked words and their loss are in `utils.language`.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cosine_embedding_loss

from utils import bert
from utils.distillation.objective import check_temperature, check_weight
from utils.language import IGNORED, LanguageHead, LanguageModel, Masking, language_loss, masked_loss
from utils.losses import soft_target_loss
from utils.tasks import Split, Task
from utils.training import Loss
from utils.trials import Trial

# --- K-25 pre-trained distillation ----------------------------------------------------------------------------------


def pretrain(
    trial: Trial,
    corpus: Task,
    masking: Masking,
    steps: int,
    *,
    loss: Loss | None = None,
    head: LanguageHead | None = None,
    **options,
) -> LanguageModel:
    """Teach a trial's BERT the language of a corpus before it learns a task: K-25. Embeddings learn too. Returns encoder and
    head.

    Turc, Chang, Lee and Toutanova 2019 (arXiv 1908.08962), survey 4.4: a small BERT is pre-trained on masked words, then
    distilled (with `utils.distillation.objective.distill`, on unlabelled texts) and fine-tuned. `loss` replaces
    `language_loss` (K-21 gives its own); a copy of `head` replaces the new one; options go to `trial.recover`, which counts
    steps and seconds.
    """
    language = LanguageModel(trial.model.bert, copy.deepcopy(head))
    learning = dataclasses.replace(trial, model=language, task=corpus)  # phases and losses are the trial's own lists
    learning.recover(steps, loss=loss or language_loss(masking), train_embeddings=True, **options)
    trial.seconds = learning.seconds
    return language


def unigram_perplexity(train: Split, split: Split, masking: Masking) -> float:
    """Perplexity of a table of word frequencies: every ordinary token of `split` guessed by how often `train` has it.

    One is added to each count, so that no word is impossible. Whoever guesses masked words worse than this has not used the
    words around them.
    """

    def ordinary(some: Split) -> torch.Tensor:
        ids = torch.tensor([token for row in some.input_ids for token in row])
        return ids[~torch.isin(ids, torch.tensor(masking.special))]

    counts = torch.bincount(ordinary(train), minlength=masking.vocab_size).double() + 1
    return math.exp(-(counts / counts.sum()).log()[ordinary(split)].mean().item())


# --- K-21 DistilBERT ------------------------------------------------------------------------------------------------


def speaking(classifier: nn.Module, language: LanguageModel) -> nn.Module:
    """A copy of a classifier with the weights of a language model's encoder and embeddings.

    DistilBERT's student is cut from the very model that teaches it: cut from this, with `pretrain(head=language.head)`, it is.
    """
    model = bert.fresh_copy(classifier)
    model.bert.load_state_dict(language.bert.state_dict())
    return model


@dataclass(frozen=True)
class TripleLoss:
    """Weights of DistilBERT's three losses, and the temperature of the first; the defaults are those of the authors' script."""

    soft: float = 5.0
    language: float = 2.0
    cosine: float = 1.0
    temperature: float = 2.0

    def __post_init__(self):
        check_temperature(self.temperature)
        for weight in (self.soft, self.language, self.cosine):
            check_weight(weight)


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cos between states (tokens, hidden), the mean over tokens. Raises ValueError for states of other widths."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"the cosine compares states of one width: the student's are {student.shape[-1]}, the teacher's {teacher.shape[-1]}"
        )
    return cosine_embedding_loss(student.float(), teacher.float(), student.new_ones(len(student), dtype=torch.float))


def triple_loss(teacher: LanguageModel, masking: Masking, weights: TripleLoss | None = None) -> Loss:
    """K-21: soft targets over the vocabulary, masked words, and the direction of the last states. Sanh et al. 2019, survey 4.4.

    The teacher reads the same masked sentence. Soft targets are compared at masked tokens (the authors'
    `restrict_ce_to_mask`; their default is every token, which costs seven times the products with the vocabulary), states at
    all real ones. Table only in the survey; arXiv 1910.01108.
    """
    weights = weights or TripleLoss()
    teacher.eval()

    def loss(model: LanguageModel, batch: dict) -> torch.Tensor:
        masked, labels = masking(batch["input_ids"])
        chosen, real = labels != IGNORED, batch["attention_mask"].bool()
        with torch.no_grad():
            given = teacher.states(masked, batch["attention_mask"])
            targets = teacher.guess(given[chosen])
        states = model.states(masked, batch["attention_mask"])
        guesses = model.guess(states[chosen])
        soft = soft_target_loss(guesses, targets, weights.temperature) if len(guesses) else guesses.sum()
        cosine = cosine_loss(states[real], given[real])
        return weights.soft * soft + weights.language * masked_loss(guesses, labels[chosen]) + weights.cosine * cosine

    return loss
