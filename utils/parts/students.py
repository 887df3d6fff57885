"""Whole students: a BiLSTM, a convolution, a BERT with a vocabulary of its own."""

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

from utils.header import check_bert
from utils.parts.attention import attention_macs
from utils.parts.part import Part


class BiLSTM(Part):
    """A student without any BERT inside: embeddings, one bidirectional LSTM, a hidden layer, a classifier.

    After Tang et al. 2019 (arXiv 1903.12136): the last states of both directions are joined. Padding must be on the right.
    """

    kind = "bilstm"

    def __init__(self, vocab_size: int, num_labels: int, embedding_size: int = 128, hidden_size: int = 128, head_size: int = 128):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, num_labels=num_labels)
        self.embeddings = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(2 * hidden_size, head_size)
        self.classifier = nn.Linear(head_size, num_labels)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The sentence as the LSTM leaves it, both directions joined, each at its own end; (batch, 2 * hidden)."""
        lengths = attention_mask.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(self.embeddings(input_ids), lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)  # (2, batch, hidden)
        return last.transpose(0, 1).flatten(1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> SequenceClassifierOutput:
        """Logits (batch, classes) of token ids (batch, length)."""
        return SequenceClassifierOutput(logits=self.classifier(torch.relu(self.hidden(self.encode(input_ids, attention_mask)))))

    def options(self) -> dict:
        """Vocabulary, classes and widths."""
        return {"vocab_size": self.config.vocab_size, "num_labels": self.config.num_labels,
                "embedding_size": self.embeddings.embedding_dim, "hidden_size": self.lstm.hidden_size,
                "head_size": self.hidden.out_features}  # fmt: skip

    def macs(self, length: int) -> int:
        """Four gates, two directions, input and state, per token; the head once."""
        gates = 2 * 4 * self.lstm.hidden_size * (self.lstm.input_size + self.lstm.hidden_size)
        return length * gates + self.hidden.weight.numel() + self.classifier.weight.numel()


class TextCNN(Part):
    """A student of one convolution: filters over windows of several widths, their maximum over the sentence, a classifier.

    Kim 2014 (arXiv 1408.5882). Padding is taken out before the maximum, and windows that reach over an end see zeros.
    """

    kind = "text_cnn"

    def __init__(
        self, vocab_size: int, num_labels: int, embedding_size: int = 128, filters: int = 100, widths: tuple[int, ...] = (3, 4, 5)
    ):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, num_labels=num_labels)
        self.embeddings = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(embedding_size, filters, width) for width in widths)
        self.classifier = nn.Linear(filters * len(widths), num_labels)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The highest answer of every filter; (batch, filters * widths)."""
        real = attention_mask[:, None].bool()
        x = self.embeddings(input_ids).transpose(1, 2) * real  # (batch, embedding, length)
        highest = []
        for conv in self.convolutions:
            before, after = (conv.kernel_size[0] - 1) // 2, conv.kernel_size[0] // 2  # as many windows as tokens
            answers = conv(nn.functional.pad(x, (before, after))).relu()
            highest.append(answers.masked_fill(~real, 0.0).amax(-1))
        return torch.cat(highest, 1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> SequenceClassifierOutput:
        """Logits (batch, classes) of token ids (batch, length)."""
        return SequenceClassifierOutput(logits=self.classifier(self.encode(input_ids, attention_mask)))

    def options(self) -> dict:
        """Vocabulary, classes, filters and the widths of their windows."""
        return {"vocab_size": self.config.vocab_size, "num_labels": self.config.num_labels,
                "embedding_size": self.embeddings.embedding_dim, "filters": self.convolutions[0].out_channels,
                "widths": [conv.kernel_size[0] for conv in self.convolutions]}  # fmt: skip

    def macs(self, length: int) -> int:
        """Every filter at every token; the classifier once."""
        return length * sum(conv.weight.numel() for conv in self.convolutions) + self.classifier.weight.numel()


class SpelledBert(Part):
    """A BERT with a small vocabulary of its own that reads the ids of a larger one: each id is spelled in its own word pieces.

    `spelling` (vocabulary, pieces) lists the own ids of every foreign one, padded with 0 ([PAD]). Sentences grow by spelling,
    so a batch of `length` ids takes ceil(growth * length) places; what is beyond them is cut off. `bert` holds the options of
    a `BertConfig`. Made for mixed-vocabulary training, Zhao et al. 2019 (arXiv 1909.11687), survey 4.4: a user would ship the
    small tokenizer, and not the table; it lets such a student be measured on the same token ids as everybody else, and its
    bytes count.
    """

    kind = "spelled_bert"

    def __init__(self, vocab_size: int, pieces: int, growth: float, bert: dict):
        super().__init__()
        if not 1 <= growth <= pieces:
            raise ValueError(f"growth must lie between 1 and the {pieces} pieces of the longest spelling, got {growth}")
        check_bert(bert)
        own = BertConfig(
            **bert, attn_implementation="eager"
        )  # plain products are faster than fused ones at sentence length on a CPU
        self.given, self.growth = dict(bert), growth
        self.config = SimpleNamespace(vocab_size=vocab_size, num_labels=own.num_labels)
        self.register_buffer("spelling", torch.zeros(vocab_size, pieces, dtype=torch.int16))
        self.bert = BertModel(own)
        self.classifier = nn.Linear(own.hidden_size, own.num_labels)

    def places(self, length: int) -> int:
        """Places for the own pieces of a batch of `length` foreign ids."""
        most = min(length * self.spelling.shape[1], self.bert.config.max_position_embeddings)
        return min(math.ceil(self.growth * length), most)

    def spell(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Own ids and their attention mask, (batch, places), of foreign ids (batch, length)."""
        pieces = self.spelling[input_ids].long() * attention_mask[..., None]
        flat = pieces.flatten(1)
        order = (flat == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.places(input_ids.shape[1])]  # pieces first
        own = flat.gather(1, order)
        return own, (own != 0).long()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> SequenceClassifierOutput:
        """Logits (batch, classes) of foreign token ids (batch, length); options such as `output_hidden_states` go to the BERT
        inside.
        """
        own, mask = self.spell(input_ids, attention_mask)
        out = self.bert(input_ids=own, attention_mask=mask, **kwargs)
        return SequenceClassifierOutput(
            logits=self.classifier(out.pooler_output), hidden_states=out.hidden_states, attentions=out.attentions
        )

    def options(self) -> dict:
        """The foreign vocabulary, the longest spelling, the room for it, and the BERT inside."""
        return {
            "vocab_size": self.config.vocab_size,
            "pieces": self.spelling.shape[1],
            "growth": self.growth,
            "bert": dict(self.given),
        }

    def macs(self, length: int) -> int:
        """A BERT's closed form at the places of `length` ids; pooler and classifier once."""
        own, places = self.bert.config, self.places(length)
        token = 4 * own.hidden_size**2 + 2 * own.hidden_size * own.intermediate_size
        core = attention_macs("eager", places, own.num_attention_heads, own.hidden_size // own.num_attention_heads)
        return own.num_hidden_layers * (places * token + core) + own.hidden_size**2 + self.classifier.weight.numel()
