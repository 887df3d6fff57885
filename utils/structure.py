"""Physical removal: a neuron, head or layer that a mask has switched off leaves the model, and the matrices shrink.

A feed-forward neuron is a row of `ffn_in` and a column of `ffn_out`; a head is `attention_head_size` rows of query, key and
value and as many columns of `attention_output`. Removing them is exact: the shrunk model computes what the masked one did.
A block that loses everything keeps its empty matrices and adds its output bias alone, so that every chapter still finds the
matrices under their names. `describe` and `cut_to` carry a structure into a file and back.
"""

import re

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.bert.modeling_bert import BertSelfAttention

Keep = dict[int, torch.Tensor]
LAYER_NAME = re.compile(r"bert\.encoder\.layer\.(\d+)\.")


class NoHeads(BertSelfAttention):
    """Self-attention without heads. Its output has width 0, so of the output projection only the bias is left."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (batch, length, 0) and attention weights (batch, 0, length, length)."""
        batch, length, _ = hidden_states.shape
        return hidden_states[..., :0], hidden_states.new_zeros(batch, 0, length, length)


def remove_neurons(model: nn.Module, keep: Keep) -> None:
    """Delete feed-forward neurons in place: f(W1[keep] x + b1[keep]) W2[:, keep]' + b2.

    `keep` maps a layer to the neurons that stay, as a boolean mask (neurons,) or as indices. Keeping none is allowed.
    Survey 2.2. Raises ValueError for an unknown layer or neuron.
    """
    for number, kept in keep.items():
        layer = get_layer(model, number)
        index = kept_index(kept, layer.intermediate.dense.out_features, "neuron", layer.output.dense.weight.device)
        take(layer.intermediate.dense, index, dim=0)
        take(layer.output.dense, index, dim=1)


@torch.no_grad()
def remove_ffn(model: nn.Module, layer: int, keep_bias: bool = True) -> None:
    """Delete all feed-forward neurons of a layer; its residual and LayerNorm stay, and its output bias unless told otherwise.

    Survey 2.4. Raises ValueError for an unknown layer.
    """
    remove_neurons(model, {layer: torch.empty(0, dtype=torch.long)})
    if not keep_bias:
        model.bert.encoder.layer[layer].output.dense.bias.zero_()


def remove_heads(model: nn.Module, keep: Keep) -> None:
    """Delete attention heads in place. `keep` maps a layer to a boolean mask (heads,) or to the indices of heads that stay.

    The size of a head does not change; a layer may lose all its heads. Survey 2.4. Raises ValueError for an unknown layer
    or head.
    """
    for number, kept in keep.items():
        attention = get_layer(model, number).attention
        size = attention.self.attention_head_size
        heads = kept_index(kept, attention.self.num_attention_heads, "head", attention.output.dense.weight.device)
        index = (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()
        for projection in (attention.self.query, attention.self.key, attention.self.value):
            take(projection, index, dim=0)
        take(attention.output.dense, index, dim=1)
        _set_heads(attention.self, len(heads))


def remove_layers(model: nn.Module, keep: list[int]) -> None:
    """Keep the given encoder layers only, in their old order, and renumber them. Survey 2.4.

    Raises ValueError unless `keep` names one existing layer or more.
    """
    kept = check_layers(keep, len(model.bert.encoder.layer))
    model.bert.encoder.layer = nn.ModuleList(model.bert.encoder.layer[number] for number in kept)
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.attention.self.layer_idx = number
    model.config.num_hidden_layers = len(kept)


def describe(model: nn.Module) -> list[dict[str, int]]:
    """Heads and feed-forward neurons of every encoder layer, as JSON values. `cut_to` makes the same structure again."""
    return [{"heads": layer.attention.self.num_attention_heads, "neurons": layer.intermediate.dense.out_features}
            for layer in model.bert.encoder.layer]  # fmt: skip


def describe_shapes(shapes: dict[str, tuple[int, ...]], head_size: int, heads: int, neurons: int) -> list[dict[str, int]]:
    """What `describe` would say, read off the shapes of a state dict (artifacts of the first format say no more).

    `heads` and `neurons` hold where a matrix is missing. Raises ValueError for query rows that make no whole heads, and for layers
    that are left out.
    """
    layers = sorted({int(match[1]) for name in shapes if (match := LAYER_NAME.match(name))})
    if layers != list(range(len(layers))):
        raise ValueError(f"layers 0 to {layers[-1]} are not all there")
    found = []
    for number in layers:
        prefix = f"bert.encoder.layer.{number}"
        rows = shapes.get(f"{prefix}.attention.self.query.weight", (heads * head_size,))[0]
        if rows % head_size:
            raise ValueError(f"layer {number}: {rows} query rows are no multiple of {head_size}")
        width = shapes.get(f"{prefix}.intermediate.dense.weight", (neurons,))[0]
        found.append({"heads": rows // head_size, "neurons": width})
    return found


def cut_to(model: nn.Module, described: list[dict[str, int]]) -> None:
    """Shrink a freshly built BERT in place to a described structure; its weights mean nothing afterwards: load the stored ones.

    Works without memory, on the meta device, too. Raises ValueError where the description asks for more than the model has.
    """
    remove_layers(model, list(range(len(described))))
    for number, (layer, sizes) in enumerate(zip(model.bert.encoder.layer, described, strict=True)):
        attention, neurons = layer.attention.self, layer.intermediate.dense.out_features
        for what, asked, most in (("neuron", sizes["neurons"], neurons), ("head", sizes["heads"], attention.num_attention_heads)):
            if not 0 <= asked <= most:
                raise ValueError(f"layer {number}: {what} indices must lie in 0..{most - 1}, got {asked} of them")
        if sizes["neurons"] != neurons:
            _narrow_linear(layer.intermediate.dense, sizes["neurons"], dim=0)
            _narrow_linear(layer.output.dense, sizes["neurons"], dim=1)
        if sizes["heads"] != attention.num_attention_heads:
            width = sizes["heads"] * attention.attention_head_size
            for projection in (attention.query, attention.key, attention.value):
                _narrow_linear(projection, width, dim=0)
            _narrow_linear(layer.attention.output.dense, width, dim=1)
            _set_heads(attention, sizes["heads"])


def _narrow_linear(linear: nn.Linear, size: int, dim: int) -> None:
    """The first `size` outputs (`dim=0`) or inputs (`dim=1`): `take` without indices, which the meta device could not look at."""
    linear.weight = nn.Parameter(linear.weight.detach().narrow(dim, 0, size).clone())
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:size].clone())
    linear.out_features, linear.in_features = linear.weight.shape


def _set_heads(attention: nn.Module, heads: int) -> None:
    """Write down how many heads are left."""
    attention.num_attention_heads = heads
    attention.all_head_size = heads * attention.attention_head_size
    if not heads:
        attention.__class__ = NoHeads  # the same module with another forward: hooks and names survive


def tie(model: nn.Module, path: str, to: str) -> None:
    """Let the module at `path` be the one at `to`: one set of weights in two places. Raises ValueError where shapes differ."""
    shapes = [[tuple(p.shape) for p in model.get_submodule(place).parameters()] for place in (path, to)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{path} and {to} have parameters of other shapes: they cannot be tied")
    model.set_submodule(path, model.get_submodule(to))


@torch.no_grad()
def take(linear: nn.Linear, index: torch.Tensor, dim: int) -> None:
    """Keep the outputs (`dim=0`) or inputs (`dim=1`) of a linear layer that `index` lists; the bias follows the outputs."""
    if parametrize.is_parametrized(linear):
        raise ValueError("the weight is held by a parametrization: burn the masks in first (utils.pruning.masks.release_masks)")
    linear.weight = nn.Parameter(linear.weight.index_select(dim, index), requires_grad=linear.weight.requires_grad)
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[index], requires_grad=linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def get_layer(model: nn.Module, number: int) -> nn.Module:
    """The encoder layer of that number. Raises ValueError where there is none."""
    layers = model.bert.encoder.layer
    if not 0 <= number < len(layers):
        raise ValueError(f"layer must lie in 0..{len(layers) - 1}, got {number}")
    return layers[number]


def check_layers(keep: list[int], num_layers: int) -> list[int]:
    """The kept layers in ascending order, each once. Raises ValueError for none, or for one that does not exist."""
    kept = sorted(set(keep))
    if not kept or kept[0] < 0 or kept[-1] >= num_layers:
        raise ValueError(f"keep one layer or more out of 0..{num_layers - 1}, got {list(keep)}")
    return kept


def kept_index(keep: torch.Tensor, count: int, what: str, device: torch.device) -> torch.Tensor:
    """Ascending indices of what stays, from a boolean mask (count,) or from indices. Raises ValueError where they do not fit."""
    keep = torch.as_tensor(keep).to(device)
    if keep.dtype == torch.bool and keep.shape != (count,):
        raise ValueError(f"a {what} mask needs shape ({count},), got {tuple(keep.shape)}")
    index = keep.nonzero().flatten() if keep.dtype == torch.bool else keep.long().unique()
    if len(index) and (index[0] < 0 or index[-1] >= count):
        raise ValueError(f"{what} indices must lie in 0..{count - 1}, got {index[0].item()}..{index[-1].item()}")
    return index
