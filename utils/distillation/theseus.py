"""Survey section 4.4: K-31, BERT-of-Theseus. Pieces of the teacher are replaced one after another until none of it is left.

Xu et al. 2020 (arXiv 2002.02925). The predecessor's layers fall into as many modules as the successor has layers; in training
every module is the successor's layer with probability p, else the predecessor's layers. No loss is added to that of the
labels: what reaches the successor from the predecessor comes through the layers around it.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertSelfAttention

Rate = Callable[[int], float]  # optimiser steps done -> probability that a module is the successor's


def constant_rate(rate: float, until: int | None = None) -> Rate:
    """p = `rate`, and 1 from step `until` on, where the successor is fine-tuned alone (the authors: 0.5). ValueError outside
    [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"the replacement rate must lie in [0, 1], got {rate}")
    return lambda step: rate if until is None or step < until else 1.0


def linear_rate(start: float, slope: float) -> Rate:
    """p = min(1, start + slope * step), the curriculum (the authors: 0.3 and 6e-4 a step). ValueError outside [0, 1], or
    falling.
    """
    if not 0 <= start <= 1 or slope < 0:
        raise ValueError(f"the replacement rate starts in [0, 1] and does not fall, got start {start} and slope {slope}")
    return lambda step: min(1.0, start + slope * step)


def modules_of(predecessor: nn.ModuleList, count: int) -> list[list[nn.Module]]:
    """The predecessor's layers in `count` equal modules, in order. Raises ValueError where the count does not divide them."""
    if count < 1 or len(predecessor) % count:
        raise ValueError(f"the successor's layers must divide the predecessor's {len(predecessor)}, got {count}")
    size = len(predecessor) // count
    return [list(predecessor[start : start + size]) for start in range(0, len(predecessor), size)]


class Theseus:
    """The replacing of modules while a successor trains. `replaced` and `drawn` count modules, over all training passes.

    Train inside `with theseus.replacing(successor):`, with `after_step=theseus.after_step` and
    `parameters=theseus.parameters(successor)`: the predecessor's layers never learn, and neither do embeddings and head,
    which the successor has from it. In evaluation mode the successor runs alone. `generator` is a CPU one.
    """

    def __init__(self, predecessor: nn.Module, rate: Rate, generator: torch.Generator | None = None):
        self.layers = copy.deepcopy(predecessor.bert.encoder.layer).requires_grad_(False)
        self.rate, self.generator = rate, generator
        self.step = self.replaced = self.drawn = 0

    @property
    def replaced_share(self) -> float:
        """Which share of all modules so far was the successor's."""
        return self.replaced / max(1, self.drawn)

    def parameters(self, successor: nn.Module) -> list[dict]:
        """What learns: the successor's layers and nothing else, as in the authors' code."""
        return [{"params": list(successor.bert.encoder.layer.parameters())}]

    def after_step(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Count a step, on which the rate depends; clear the gradients of all that does not learn, as the authors do."""
        self.step += 1
        model.zero_grad(set_to_none=True)

    def draw(self, own: nn.ModuleList, modules: list[list[nn.Module]]) -> nn.ModuleList:
        """The layers of one pass: module by module the successor's layer, or the predecessor's layers."""
        chosen = (torch.rand(len(own), generator=self.generator) < self.rate(self.step)).tolist()
        self.replaced += sum(chosen)
        self.drawn += len(own)
        return nn.ModuleList(layer for mine, theirs, new in zip(own, modules, chosen, strict=True)
                             for layer in ([mine] if new else theirs))  # fmt: skip

    @contextlib.contextmanager
    def replacing(self, successor: nn.Module) -> Iterator[None]:
        """Inside the block every training pass of the successor draws its modules. ValueError where the layers do not divide."""
        encoder = successor.bert.encoder
        own = encoder.layer
        modules = modules_of(self.layers.to(next(own.parameters()).device).train(), len(own))
        for attention in self.layers.modules():
            if isinstance(attention, BertSelfAttention):
                attention.config = successor.config  # one attention, and so one form of mask, for all layers of a pass

        def swap(module: nn.Module, args: tuple) -> None:
            if module.training:
                module.layer = self.draw(own, modules)

        def restore(module: nn.Module, args: tuple, output: object) -> None:
            module.layer = own

        with encoder.register_forward_pre_hook(swap), encoder.register_forward_hook(restore, always_call=True):
            yield
