"""Tables of word vectors with fewer numbers than vocabulary times hidden size. Each stands at `bert.embeddings.word_embeddings`.

A `WordVectors` says how the vectors of some ids are composed (`compose`), and so what is stored, what a look-up costs
while the table stays composed, and what the table is once it is expanded for inference (`expanded`).
"""

import torch
from torch import nn

from utils.parts.part import Part


class WordVectors(Part):
    """Base: composes vectors of width `embedding_dim` for `num_embeddings` ids.

    Subclasses give `compose`, `options` and `word_macs`. `heavy` ones compute much per word: in training each word of a batch
    is composed once, however often it occurs (in evaluation every occurrence is, so that multiply-adds do not depend on the
    text).
    """

    heavy = False

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def compose(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors (n, embedding_dim) of word ids (n,)."""
        raise NotImplementedError

    def word_macs(self) -> int:
        """Multiply-adds to compose one vector."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Vectors (..., embedding_dim) of token ids (...)."""
        if self.training and self.heavy:
            words, place = input_ids.unique(return_inverse=True)
            return self.compose(words)[place]
        return self.compose(input_ids.flatten()).view(*input_ids.shape, self.embedding_dim)

    @property
    def weight(self) -> torch.Tensor:
        """The whole table (num_embeddings, embedding_dim), composed with gradients: what a tied output layer multiplies with."""
        return self.compose(torch.arange(self.num_embeddings, device=next(self.parameters()).device))

    @torch.no_grad()
    def expanded(self, chunk: int = 4096) -> nn.Embedding:
        """A plain table with the same vectors: the fastest look-up, at the memory of the table that was compressed."""
        ids = torch.arange(self.num_embeddings, device=next(self.parameters()).device)
        training, self.training = self.training, False
        table = torch.cat([self.compose(part).float() for part in ids.split(chunk)])
        self.training = training
        return nn.Embedding.from_pretrained(table, freeze=False)

    def macs(self, length: int) -> int:
        """Every token is composed."""
        return length * self.word_macs()
