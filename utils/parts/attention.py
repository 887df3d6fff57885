"""Attentions without parameters of their own, by name, and what their core costs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask


@dataclass(frozen=True)
class Attention:
    """An attention without parameters of its own. `macs(length, num_heads, head_size)` counts its core for one sequence."""

    forward: Callable
    macs: Callable[[int, int, int], int]


def padding_mask(*args, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """transformers builds masks by attention name; without this one a registered attention would see no padding at all."""
    return attention_mask


# --- L-11 Linear Transformer ---


def feature_map(x: torch.Tensor) -> torch.Tensor:
    """phi(x) = elu(x) + 1 > 0, written so that it stays positive: elu rounds to -1 below -17 (float32) or -6 (bfloat16)."""
    return x.clamp(max=0).exp() + x.relu()


def linear_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attention in linear time: phi(Q) (phi(K)^T V) over phi(Q) sum(phi(K)), with phi(x) = elu(x) + 1.

    `query`, `key`, `value` (batch, heads, length, head size), `attention_mask` (batch, length); returns (batch, length, heads,
    head size). No length x length tensor is formed. Katharopoulos et al. 2020 (arXiv 2006.16236), survey 7.2.
    """
    q, k = feature_map(query), feature_map(key)
    if attention_mask is not None:
        k = k * attention_mask[:, None, :, None].to(k.dtype)
    summary = k.transpose(-1, -2) @ value  # (batch, heads, head size, head size)
    weight = q @ k.sum(-2).unsqueeze(-1)  # (batch, heads, length, 1)
    return ((q @ summary) / weight.clamp(min=1e-6)).transpose(1, 2), None  # no text at all: 0 / 1e-6


# --- L-10 efficient attention ---


def efficient_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Two softmaxes in place of one: over a query's features, and over the positions of each feature of the keys.

    softmax_d(Q) (softmax_n(K)^T V), shapes as in `linear_attention`; nothing is divided by sqrt(d). Padding is left out of the
    softmax over positions. Shen et al. 2018 (arXiv 1812.01243), whose code says so; survey 7.2 prints softmax(K^T V).
    """
    if attention_mask is not None:
        key = key.masked_fill(attention_mask[:, None, :, None] == 0, torch.finfo(key.dtype).min)
    context = key.softmax(-2).transpose(-1, -2) @ value  # (batch, heads, head size, head size)
    return (query.softmax(-1) @ context).transpose(1, 2), None


# --- a control ---


def mean_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Every token gets the mean of its text's values, whatever it asks: a control for attentions that may look at all alike.

    Shapes as in `linear_attention`. Queries and keys have no say, and no gradient.
    """
    text = torch.ones_like(value[:, 0, :, 0]) if attention_mask is None else attention_mask.to(value.dtype)
    total = (value * text[:, None, :, None]).sum(-2, keepdim=True)
    mean = total / text.sum(-1).clamp(min=1)[:, None, None, None]  # no text at all: 0 / 1
    return mean.expand_as(value).transpose(1, 2), None


# --- S-08 quaternion attention ---


def quaternion_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Four attention maps: the components of the Hamilton product of queries and keys, each for one component of the values.

    Shapes as in `linear_attention`; each head holds its real components first, then those of i, j and k. Tay et al. 2019 (arXiv
    1906.04393), survey 5.2. Raises ValueError for a head size that 4 does not divide.
    """
    if query.shape[-1] % 4:
        raise ValueError(f"quaternion attention needs a head size that 4 divides, got {query.shape[-1]}")
    r, i, j, k = key.chunk(4, -1)
    products = (r, -i, -j, -k), (i, r, k, -j), (j, -k, r, i), (k, j, -i, r)  # what each component of a query meets
    keys = torch.stack([torch.cat(product, -1) for product in products], 2)  # (batch, heads, 4, length, head size)
    scores = query.unsqueeze(2) @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    if attention_mask is not None:
        padding = attention_mask[:, None, None, None, :] == 0
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    attended = scores.softmax(-1) @ torch.stack(value.chunk(4, -1), 2)  # (batch, heads, 4, length, head size / 4)
    return attended.permute(0, 3, 1, 2, 4).flatten(-2), None


def own_attention(*args, **kwargs) -> tuple[torch.Tensor, None]:
    """What `own` stands for: attention by parts in the layers' places. Raises ValueError where a layer has none."""
    raise ValueError("the attention 'own' is that of utils.parts.self_attention, and a layer of this model has none")


OWN = "own"
ATTENTIONS: dict[str, Attention] = {
    "linear": Attention(
        linear_attention, lambda length, num_heads, head_size: num_heads * length * head_size * (2 * head_size + 1)
    ),
    "efficient": Attention(
        efficient_attention, lambda length, num_heads, head_size: 2 * num_heads * length * head_size * head_size
    ),
    "quaternion": Attention(
        quaternion_attention, lambda length, num_heads, head_size: 5 * length * length * num_heads * head_size
    ),
    "mean": Attention(mean_attention, lambda length, num_heads, head_size: 0),  # sums alone, no products
    OWN: Attention(own_attention, lambda length, num_heads, head_size: 0),
}
for _name, _attention in ATTENTIONS.items():
    AttentionInterface.register(_name, _attention.forward)
    AttentionMaskInterface.register(_name, padding_mask)
STOCK = ("eager", "sdpa")
DENSE = set(STOCK)  # attentions that form every product of length x length, and so cost what the dense one costs


def register_dense(name: str, forward: Callable) -> None:
    """Register an attention that computes the dense products in other numbers, for use in a context: no file can name it."""
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, eager_mask)
    DENSE.add(name)


def attention_macs(name: str | None, length: int, num_heads: int, head_size: int) -> int:
    """Multiply-adds of an attention core for one sequence. Raises ValueError for an attention that nobody counted."""
    if name in DENSE:
        return 2 * length * length * num_heads * head_size  # scores, and sums weighted by them
    if name not in ATTENTIONS:
        raise ValueError(f"no closed form for the attention {name!r}: give it one in utils.parts.ATTENTIONS")
    return ATTENTIONS[name].macs(length, num_heads, head_size)
