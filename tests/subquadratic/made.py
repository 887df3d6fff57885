"""What a self-attention makes on its way, for tests of parts."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sizes(TorchDispatchMode):
    """Notes the most elements that any tensor has which is made under it, views too."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.most = max([self.most, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


def check_no_square(part: nn.Module) -> None:
    """Forwards and backwards, twice the length makes no tensor of much more than twice the elements."""
    most = {}
    for length in (512, 1024):
        x = torch.randn(1, length, 32, requires_grad=True)
        with Sizes() as sizes:
            part(x, None)[0].sum().backward()
        most[length] = sizes.most
    assert most[1024] <= 2.1 * most[512] and most[1024] < 1024 * 1024 / 4
