"""Survey section 2.1.2: magnitude pruning, and three ways to allot a sparsity to the weight classes.

A weight class is one matrix of one layer (See et al. 2016 use the matrices of each LSTM layer in the same way). Biases,
LayerNorms, pooler and classifier are never pruned.
"""

import torch
from torch import nn

from utils.bert import ALL_GROUPS, ENCODER, HEAD_GROUPS, matrices
from utils.pruning.masks import Masks, check_sparsity, lowest, masks_from_scores

# The head stays whole: pooler and classifier are one small matrix each, and all that the task reads comes through them.
PRUNABLE = tuple(group for group in ALL_GROUPS if group not in HEAD_GROUPS)


def magnitude_masks(model: nn.Module, sparsity: float, groups: tuple[str, ...] = ENCODER) -> Masks:
    """One-shot magnitude pruning: in each matrix, the `sparsity` share of smallest |w| goes.

    Han, Mao, Dally 2015 (arXiv 1510.00149), survey 2.1.2. Raises ValueError for a sparsity outside [0, 1).
    """
    return {m.name: lowest(m.weight.abs(), sparsity) for m in matrices(model, groups)}


def class_blind_masks(model: nn.Module, sparsity: float, groups: tuple[str, ...] = PRUNABLE) -> Masks:
    """One sort over all classes: the smallest |w| go wherever they are.

    See, Luong, Manning 2016 (arXiv 1606.09274), survey 2.1.2.
    """
    return masks_from_scores({m.name: m.weight.abs() for m in matrices(model, groups)}, sparsity, scope="global")


def class_uniform_masks(model: nn.Module, sparsity: float, groups: tuple[str, ...] = PRUNABLE) -> Masks:
    """Every class loses the same share. See et al. 2016, survey 2.1.2."""
    return masks_from_scores({m.name: m.weight.abs() for m in matrices(model, groups)}, sparsity, scope="matrix")


def class_distribution_masks(model: nn.Module, sparsity: float, groups: tuple[str, ...] = PRUNABLE) -> Masks:
    """Class c loses |w| < lam * sigma_c, with one lam for all, found so that the total is `sparsity`.

    sigma_c is the standard deviation of the class. Dividing by it turns the search for lam into one sort of |w| / sigma_c.
    See et al. 2016, survey 2.1.2.
    """
    scores = {m.name: m.weight.abs() / m.weight.std() for m in matrices(model, groups)}
    return masks_from_scores(scores, sparsity, scope="global")


def random_masks(model: nn.Module, sparsity: float, groups: tuple[str, ...] = ENCODER, seed: int = 0) -> Masks:
    """The control: the same sparsity in each matrix, weights chosen by lot."""
    check_sparsity(sparsity)
    generator = torch.Generator().manual_seed(seed)
    return {m.name: lowest(torch.rand(m.weight.shape, generator=generator), sparsity).to(m.weight.device)
            for m in matrices(model, groups)}  # fmt: skip
