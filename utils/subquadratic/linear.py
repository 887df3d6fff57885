"""Survey section 7.2, methods in linear time that change what attention computes: a relay node (Star-Transformer), projections
along the length (Linformer), and products in another order (efficient attention, Linear Transformer).

Parts are in `utils.parts.projected`, attentions without options in `utils.parts.attention`.
"""

import torch
from torch import nn

from utils.parts.attention import ATTENTIONS, OWN
from utils.parts.projected import SHARING as INSIDE
from utils.parts.projected import LinformerAttention, StarAttention
from utils.parts.self_attention import SelfAttention, replace_attention
from utils.subquadratic.adaptation import attention_map, core_of, dense_pairs

SHARING = (*INSIDE, "layerwise")  # the paper's variants: each shares what the one before it does, and more
STARTS = ("means", "random")


# --- L-05 Star-Transformer ------------------------------------------------------------------------------------------


def star(model: nn.Module, cycles: int = 1) -> None:
    """A relay and a ring in the place of every layer's attention, in place. Guo et al. 2019 (arXiv 1902.09113), survey 7.2.

    Raises ValueError for no cycle.
    """
    replace_attention(model, lambda attention, number: StarAttention.from_attention(attention, cycles=cycles))


def star_pattern(length: int, heads: int = 1) -> torch.Tensor:
    """What each token of a text without padding sees in one cycle: (heads, length, length), 1 where it does."""
    seen = torch.zeros(length, length)
    satellites = torch.arange(1, length)
    for step in (-1, 0, 1) if length > 1 else ():
        seen[satellites, 1 + (satellites - 1 + step) % (length - 1)] = 1
    seen[:, 0] = seen[0] = 1
    return seen.expand(heads, -1, -1)


def star_links(length: int) -> int:
    """How many ones `star_pattern` has: the relay's row and column, and three for every satellite of a ring of three or more."""
    return 2 * length - 1 + (length - 1) * min(3, length - 1)


# --- L-06 Linformer -------------------------------------------------------------------------------------------------


@torch.no_grad()
def linformer(model: nn.Module, projected_length: int, sharing: str = "headwise", start: str = "means", seed: int = 0) -> None:
    """Project keys and values of every layer along the length, in place, for texts of up to as many tokens as there are positions.

    `sharing`: a pair of projections per head (`none`), per layer (`headwise`), one matrix per layer for keys and values
    (`key_value`), or one for all layers (`layerwise`). They start as segment means, or `random`: independent normal numbers of
    variance 1/n_r, as the paper's proof has them. Wang et al. 2020 (arXiv 2006.04768), survey 7.2. Raises ValueError for another
    sharing or start, and for sizes that cannot be.
    """
    if sharing not in SHARING:
        raise ValueError(f"sharing must be one of {', '.join(SHARING)}, got {sharing!r}")
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    inside = "key_value" if sharing == "layerwise" else sharing
    sizes = {"max_length": model.config.max_position_embeddings, "projected_length": projected_length}
    replace_attention(model, lambda attention, number: LinformerAttention.from_attention(attention, **sizes, sharing=inside))
    if start == "random":
        draw_projections(model, seed)
    if sharing == "layerwise":
        first, *others = linformer_parts(model)
        for part in others:
            part.projection_k = first.projection_k


def linformer_parts(model: nn.Module) -> list[LinformerAttention]:
    """The attentions of a model's layers that project along the length, first layer first."""
    return [part for part in model.modules() if isinstance(part, LinformerAttention)]


def projections(model: nn.Module) -> list[nn.Parameter]:
    """The projections along the length, each once, (heads or 1, projected length, max length)."""
    found = [p for part in linformer_parts(model) for p in (part.projection_k, part.projection_v) if p is not None]
    return list({id(p): p for p in found}.values())


def projection_count(model: nn.Module) -> int:
    """How many matrices W_n a model stores: 2 A L without sharing, then 2 L, L and 1."""
    return sum(len(p) for p in projections(model))


def draw_projections(model: nn.Module, seed: int = 0) -> None:
    """Independent normal numbers of variance 1 / n_r in every projection, as Johnson and Lindenstrauss need them. In place."""
    generator = torch.Generator().manual_seed(seed)
    for p in projections(model):
        p.data.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)


def spectrum_share(maps: torch.Tensor) -> torch.Tensor:
    """Which share of the sum of singular values of maps (..., length, length) the 1, 2, ... largest hold, (..., length).

    The paper's reason for projecting: of pre-trained maps a few hold nearly all. 1 from the rank of a map on.
    """
    values = torch.linalg.svdvals(maps.float())
    return values.cumsum(-1) / values.sum(-1, keepdim=True)


# --- L-10 efficient attention, L-11 Linear Transformer --------------------------------------------------------------


def use_attention(model: nn.Module, name: str) -> None:
    """Let a model's layers run an attention without parameters of its own, by name (`efficient`, `linear`, `mean`). In place.

    Raises ValueError for a name that `utils.parts.ATTENTIONS` does not hold.
    """
    allowed = [known for known in ATTENTIONS if known != OWN]
    if name not in allowed:
        raise ValueError(f"the attention must be one of {', '.join(allowed)}, got {name!r}")
    model.config._attn_implementation = name


@torch.no_grad()
def layer_maps(model: nn.Module, dense: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The weights of a swapped model's layers, each on the dense model's states: (layers, heads, length, length).

    `ids` (1, length) is one short text without padding (`attention_map`). Both models in evaluation mode.
    """
    maps = []
    pairs = dense_pairs(dense, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for layer, (x, _) in zip(model.base_model.encoder.layer, pairs, strict=True):
        attention = layer.attention.self
        core = core_of(attention if isinstance(attention, SelfAttention) else model.config._attn_implementation)
        heads = (attention.num_attention_heads, attention.attention_head_size)
        q, k = (project(x)[0].unflatten(-1, heads).transpose(0, 1) for project in (attention.query, attention.key))
        maps.append(attention_map(core, q, k))
    return torch.stack(maps)


def map_rank(maps: torch.Tensor) -> torch.Tensor:
    """Numerical rank of attention maps (..., length, length), (...). Whoever multiplies keys with values first cannot exceed the
    head size, a Linformer its projected length; a softmax over the tokens usually has full rank.
    """
    return torch.linalg.matrix_rank(maps.double(), rtol=1e-5)


def map_evenness(maps: torch.Tensor) -> torch.Tensor:
    """Entropy of a query's weights over the entropy of equal ones, mean over queries: maps (..., length, length) to (...).

    1 where every query looks at all tokens alike. For maps without negative weights.
    """
    return torch.special.entr(maps).sum(-1).mean(-1) / torch.log(torch.tensor(float(maps.shape[-1])))
