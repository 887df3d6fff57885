"""Masked language modelling at small scale: BERT's masking, a head that guesses masked words, their loss and its perplexity.

The embedded BERT comes without that head, so one is trained, on the reviews at hand: a small scale, whose perplexity says how
small. A `Masking` draws which words to hide; a `LanguageModel` is a BERT with the head, its output matrix tied to the word
embeddings; losses have the form of `utils.training.train`.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, linear
from transformers import BertModel, PreTrainedTokenizerBase

from utils import bert, tasks, training
from utils.profiles import Profile
from utils.tasks import Split, Task
from utils.training import Loss, TrainingLog

IGNORED = -100  # label of a position that asks for nothing


# --- masking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masking:
    """BERT's masking (Devlin et al. 2018): of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    `special` ids are never chosen. Raises ValueError for a share outside (0, 1] and for a [MASK] beyond the vocabulary.
    """

    mask_id: int
    vocab_size: int
    special: tuple[int, ...]
    share: float = 0.15

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"the share of masked tokens must lie in (0, 1], got {self.share}")
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"[MASK] must be one of the {self.vocab_size} tokens, got id {self.mask_id}")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int, share: float = 0.15) -> "Masking":
        """For a tokenizer's special tokens; `vocab_size` is the model's (smaller than the tokenizer's where ids are folded)."""
        return cls(tokenizer.mask_token_id, vocab_size, tuple(tokenizer.all_special_ids), share)

    def choose(self, input_ids: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Which tokens are to be guessed, boolean, shape of `input_ids`."""
        ordinary = ~torch.isin(input_ids, torch.tensor(self.special, device=input_ids.device))
        return ordinary & (self._rolls(input_ids, generator) < self.share)

    def hide(self, input_ids: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """The ids with the chosen ones hidden: 80 % masked, 10 % random, 10 % as they are."""
        rolls = self._rolls(input_ids, generator)
        others = torch.randint(self.vocab_size, input_ids.shape, generator=generator).to(input_ids.device)
        hidden = torch.where(chosen & (rolls < 0.8), self.mask_id, input_ids)
        return torch.where(chosen & (rolls >= 0.9), others, hidden)

    def __call__(self, input_ids: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids with hidden words, and labels: the true id where a token is to be guessed, `IGNORED` elsewhere."""
        chosen = self.choose(input_ids, generator)
        return self.hide(input_ids, chosen, generator), torch.where(chosen, input_ids, IGNORED)

    @staticmethod
    def _rolls(input_ids: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return torch.rand(input_ids.shape, generator=generator).to(input_ids.device)


# --- the model ------------------------------------------------------------------------------------------------------


class LanguageHead(nn.Module):
    """BERT's head for masked words: dense, GELU, LayerNorm, then the product with a table of word vectors, and a bias per word.

    The table is the embedding's, given with every call, so that head and embedding are one set of weights.
    """

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.eye_(self.dense.weight)  # at first a word is guessed from the state as it is: on few texts that is a head start
        nn.init.zeros_(self.dense.bias)

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """States (..., hidden) before the product with a table; shape stays."""
        return self.LayerNorm(gelu(self.dense(hidden)))

    def forward(self, hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary) of states (..., hidden); `table` is (vocabulary, hidden)."""
        return linear(self.transform(hidden), table, self.bias)


class LanguageModel(nn.Module):
    """A BERT's encoder, which it shares with the classifier that it came from, and a head for masked words with tied
    embeddings.
    """

    def __init__(self, encoder: BertModel, head: LanguageHead | None = None):
        super().__init__()
        table = encoder.embeddings.word_embeddings.weight
        self.bert, self.config = encoder, encoder.config
        self.head = (head or LanguageHead(table.shape[1], table.shape[0])).to(table.device)

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The last layer's states, (batch, length, hidden)."""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def guess(self, states: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, float32, of states (..., hidden)."""
        return self.head(states, self.bert.embeddings.word_embeddings.weight).float()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, vocabulary) at every position; training asks for the masked ones only."""
        return self.guess(self.states(input_ids, attention_mask))


def masked_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the positions whose label is not `IGNORED`, 0 where there is none. Logits (..., vocabulary)."""
    total = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def language_loss(masking: Masking) -> Loss:
    """The loss of a `LanguageModel` on a batch whose words are masked anew each time."""

    def loss(model: LanguageModel, batch: dict) -> torch.Tensor:
        masked, labels = masking(batch["input_ids"])
        chosen = labels != IGNORED
        states = model.states(masked, batch["attention_mask"])
        return masked_loss(model.guess(states[chosen]), labels[chosen])

    return loss


@torch.no_grad()
def perplexity(model: LanguageModel, split: Split, masking: Masking, pad_token_id: int = 0, seed: int = 0) -> float:
    """exp of the mean loss per masked token of a split, each sentence masked once, the same way for every model.

    A model that guesses evenly has the vocabulary's size. It is no perplexity of whole texts: a masked word is guessed from
    both sides. Raises ValueError where no token is masked.
    """
    generator, total, count = torch.Generator().manual_seed(seed), 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    for batch in tasks.batches(split, 64, pad_token_id):
        masked, labels = (ids.to(device) for ids in masking(batch["input_ids"], generator))
        chosen = labels != IGNORED
        with training.autocast(device):
            states = model.states(masked, batch["attention_mask"].to(device))[chosen]
        total += float(cross_entropy(model.guess(states.float()), labels[chosen], reduction="sum"))
        count += int(chosen.sum())
    if not count:
        raise ValueError("no token was masked: the split is too short for this share")
    return math.exp(total / count)


def train_head(
    encoder: BertModel, corpus: Task, masking: Masking, profile: Profile, **options
) -> tuple[LanguageModel, TrainingLog]:
    """A head for an encoder that has none, on a copy of it: encoder, embeddings and head learn together. Options go to
    `train`.
    """
    language = LanguageModel(bert.fresh_copy(encoder))
    log = training.train(language, corpus, profile, loss=language_loss(masking), train_embeddings=True, **options)
    return language, log
