"""Attention as one tensor (survey 6.3): queries, keys and values of a sentence are the factors of a Tucker tensor."""

import torch
from torch import nn

from utils.parts.mobile import DenseNorm
from utils.parts.part import Part

# --- T-11 tensorized attention --------------------------------------------------------------------------------------


def pair_products(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every key with every value, entry by entry: (.., n, rank) twice to (.., n * n, rank), pair (j, k) in row j * n + k."""
    return (k.unsqueeze(-2) * v.unsqueeze(-3)).flatten(-3, -2)


def trilinear_tensor(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """T_ijk = sum_r core_r q_ir k_jr v_kr: (.., n, rank) three times and (rank,) to (.., n, n * n), row i of T in one line.

    A Tucker tensor whose core has `core` on its diagonal and 0 elsewhere. Ma et al. 2019, equation 5.
    """
    return (q * core) @ pair_products(k, v).transpose(-1, -2)


def from_tensor(q: torch.Tensor, pairs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The order of the paper: T first, (.., n, n * n), then the map of each of its lines; n^3 (rank + hidden) multiply-adds."""
    return nn.functional.linear(q @ pairs.transpose(-1, -2), weight)


def from_sentence(q: torch.Tensor, pairs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The other order: one matrix (.., rank, hidden) for the sentence, and every query times that matrix.

    rank n hidden (n + 1) multiply-adds, and no tensor of n^3 numbers.
    """
    return q @ nn.functional.linear(pairs.transpose(-1, -2), weight)


def without_padding(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros for the padded tokens of x (batch, n, rank): no softmax is there to leave them out.

    The mask is (batch, n), 1 for a token; or (batch, 1, n or 1, n), boolean as for `sdpa`, or added scores as for `eager`.
    """
    if attention_mask is None:
        return x
    row = attention_mask if attention_mask.dim() == 2 else attention_mask[:, 0, 0]
    real = row if row.dtype == torch.bool else row > 0 if attention_mask.dim() == 2 else row == 0
    return x * real.unsqueeze(-1).to(x.dtype)


class Factors(nn.Module):
    """Queries, keys and values of the whole hidden state, (batch, n, rank) each, which all blocks share, and the blocks' cores.

    A core is the diagonal of a tensor (rank, rank, rank): `core` is (blocks, rank).
    """

    num_attention_heads = 1  # what `structure` writes down: there are no heads

    def __init__(self, hidden_size: int, rank: int, blocks: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden_size, rank) for _ in range(3))
        self.core = nn.Parameter(torch.ones(blocks, rank))


class TrilinearAttention(Part):
    """y_i = W vec(T_i) + b with T_ijk = 1/h sum_b sum_r g_br Q_ir K_jr V_kr over h blocks; no softmax over positions.

    Ma et al. 2019 (arXiv 1906.09777), survey 6.3; their language models have no bias in the maps, and positions in a second
    term. It takes the place of a `BertAttention` (self-attention, output matrix, residual sum and LayerNorm), with matrices
    under BERT's names. The columns of W (hidden, length^2) are *pairs of positions*: a shorter sentence uses those that it has,
    a longer one raises ValueError. Raises ValueError for a rank outside 1 to the hidden size, no block, and no token.
    """

    kind = "trilinear_attention"

    def __init__(self, hidden_size: int, rank: int, length: int, blocks: int = 1):
        super().__init__()
        if not 1 <= rank <= hidden_size or length < 1 or blocks < 1:
            raise ValueError(f"a rank in 1..{hidden_size}, and 1 token and 1 block or more, got rank {rank}, {length} tokens and "
                             f"{blocks} blocks")  # fmt: skip
        self.hidden_size, self.rank, self.length, self.blocks = hidden_size, rank, length, blocks
        self.self = Factors(hidden_size, rank, blocks)
        self.output = DenseNorm(length * length, hidden_size, "layer_norm")

    def core(self) -> torch.Tensor:
        """The mean of the blocks' diagonals, (rank,): blocks share Q, K and V, so the mean of their tensors has this core."""
        return self.self.core.mean(0)

    def factors(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Q, K and V, (batch, n, rank) each, K and V with zeros for padding. Raises ValueError for too many tokens."""
        self.check(hidden_states.shape[1])
        k, v = (without_padding(project(hidden_states), attention_mask) for project in (self.self.key, self.self.value))
        return self.self.query(hidden_states), k, v

    def pairs_weight(self, length: int) -> torch.Tensor:
        """The columns of W for pairs among the first `length` positions: (hidden, length^2)."""
        weight = self.output.dense.weight.unflatten(1, (self.length, self.length))
        return weight[:, :length, :length].flatten(1)

    def attend(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What is added to the hidden states (batch, n, hidden) before the LayerNorm; the same shape."""
        q, k, v = self.factors(hidden_states, attention_mask)
        n = hidden_states.shape[1]
        product = from_tensor if self.tensor_first(n) else from_sentence
        return product(q * self.core(), pair_products(k, v), self.pairs_weight(n)) + self.output.dense.bias

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args, **kwargs
    ) -> tuple[torch.Tensor, None]:
        """(batch, n, hidden) to the same shape, as a `BertAttention` returns it; there are no attention weights."""
        return self.output.LayerNorm(self.attend(hidden_states, attention_mask) + hidden_states), None

    def check(self, length: int) -> None:
        """Raise ValueError for more tokens than the map has pairs for."""
        if length > self.length:
            raise ValueError(f"the output map has a column for each pair of the first {self.length} tokens, got {length} tokens: "
                             f"cut the sentences, or make it for more (its weights grow with the square)")  # fmt: skip

    def orders(self, length: int) -> dict[str, int]:
        """Multiply-adds after the projections, in both orders, for one sentence."""
        return {"tensor": length**3 * (self.rank + self.hidden_size),
                "sentence": self.rank * length * self.hidden_size * (length + 1)}  # fmt: skip

    def tensor_first(self, length: int) -> bool:
        """Whether the paper's order is the cheaper one: where the rank is not much below the number of tokens."""
        costs = self.orders(length)
        return costs["tensor"] <= costs["sentence"]

    def options(self) -> dict:
        """Hidden size, rank, most tokens, blocks."""
        return {"hidden_size": self.hidden_size, "rank": self.rank, "length": self.length, "blocks": self.blocks}

    def macs(self, length: int) -> int:
        """Three projections, and the cheaper order. Raises ValueError for too many tokens."""
        self.check(length)
        return 3 * length * self.hidden_size * self.rank + min(self.orders(length).values())
