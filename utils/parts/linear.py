"""Linear layers with fewer weights: factorised, grouped."""

import torch
from torch import nn

from utils.parts.part import Part


def in_place_of(linear: nn.Linear, kind: type[Part], size: int) -> Part:
    """A part with a linear layer's widths, number type and bias, and one size of its own; its weights are still to be set."""
    part = kind(linear.in_features, linear.out_features, size, linear.bias is not None).to(linear.weight)
    if linear.bias is not None:
        part.bias.copy_(linear.bias)
    return part


def check_rank(rank: int, rows: int, columns: int) -> None:
    """Raise ValueError for a rank that a matrix of this shape does not have."""
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"a {rows} x {columns} matrix has ranks in 1..{min(rows, columns)}, got {rank}")


class LowRankLinear(Part):
    """y = L (R x) + b with L (out, rank) and R (rank, in): it stays factorised in memory, on disk and in the clock.

    R may be common to several layers, whose rank together can be higher than that of one. Raises ValueError for a rank outside
    1..in.
    """

    kind = "low_rank_linear"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True):
        super().__init__()
        if not 1 <= rank <= in_features:
            raise ValueError(f"factors that read {in_features} numbers have ranks in 1..{in_features}, got {rank}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.left = nn.Parameter(torch.randn(out_features, rank) / rank**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """The best approximation of that rank (Eckart and Young 1936): the singular values are shared out between the
        factors. Raises ValueError for a rank that the matrix does not have.
        """
        check_rank(rank, *linear.weight.shape)
        part = in_place_of(linear, cls, rank)
        U, S, Vh = torch.linalg.svd(linear.weight.float(), full_matrices=False)
        root = S[:rank].sqrt()
        part.left.copy_(U[:, :rank] * root)
        part.right.copy_(root[:, None] * Vh[:rank])
        return part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out, in) that the factors make."""
        return self.left @ self.right

    @torch.no_grad()
    def expanded(self) -> nn.Linear:
        """A plain layer with the same matrix."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None).to(self.left)
        plain.load_state_dict({"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias}))
        return plain

    def options(self) -> dict:
        """Sizes and whether there is a bias."""
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
                "bias": self.bias is not None}  # fmt: skip

    def macs(self, length: int) -> int:
        """Each token passes both factors."""
        return length * self.rank * (self.in_features + self.out_features)


class GroupedLinear(Part):
    """y_g = W_g x_g + b_g: inputs and outputs fall into equal groups, and each group of outputs sees its own group of inputs
    only.

    A convolution of width 1 in groups, with 1 / groups of a dense layer's weights and multiply-adds. SqueezeBERT, Iandola et
    al. 2020 (arXiv 2006.11316), survey 4.4. Raises ValueError where the groups do not divide both widths.
    """

    kind = "grouped_linear"

    def __init__(self, in_features: int, out_features: int, groups: int, bias: bool = True):
        super().__init__()
        if groups < 1 or in_features % groups or out_features % groups:
            raise ValueError(f"groups must divide {in_features} inputs and {out_features} outputs, got {groups}")
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        start = torch.randn(groups, out_features // groups, in_features // groups)
        self.weight = nn.Parameter(start / (in_features // groups) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, groups: int) -> "GroupedLinear":
        """The diagonal blocks of a dense matrix: of all layers with these groups the nearest one, since it has no other
        entries.
        """
        part = in_place_of(linear, cls, groups)
        rows, columns = part.weight.shape[1:]
        part.weight.copy_(
            torch.stack([linear.weight[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)])
        )
        return part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        grouped = x.reshape(-1, self.groups, self.in_features // self.groups).transpose(0, 1)  # (groups, tokens, in / groups)
        y = torch.bmm(grouped, self.weight.transpose(1, 2).to(x.dtype)).transpose(0, 1)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def options(self) -> dict:
        """Widths, groups and whether there is a bias."""
        return {"in_features": self.in_features, "out_features": self.out_features, "groups": self.groups,
                "bias": self.bias is not None}  # fmt: skip

    def macs(self, length: int) -> int:
        """A dense layer's divided by the groups."""
        return length * self.in_features * self.out_features // self.groups
