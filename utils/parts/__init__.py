"""Parts: modules that stand in for a piece of a BERT, and attentions that stand in for the dense one.

A part answers two questions that the rest of the suite would otherwise answer by looking at its class: from which `options`
it can be built again, and how many multiply-adds it takes (`macs`). Files name a part by its `kind` in the closed table
`PARTS`, and an attention by its name in `attention.ATTENTIONS`, so that no file can name code. At the path "" a part is a whole
student; then it also has a `config` (with `vocab_size` and `num_labels`) and calls its embedding block `embeddings`.
"""

import torch
from torch import nn

from utils import CompanionError
from utils.parts import room
from utils.parts.attention import ATTENTIONS, DENSE, STOCK, attention_macs, linear_attention, register_dense
from utils.parts.characters import CharacterBiLSTM, CharacterCNN
from utils.parts.codes import BandedVectors, CompositionalVectors, DictionaryVectors, DigitVectors
from utils.parts.depth import AdaptiveEncoder, EquilibriumEncoder
from utils.parts.embeddings import (
    FactorizedVectors,
    ReferenceVectors,
    SlimVectors,
    SparseVectors,
    TrimmedVectors,
    TwoComponentVectors,
)
from utils.parts.factorised import GatedLowRankLinear
from utils.parts.hashing import LSHAttention
from utils.parts.linear import GroupedLinear, LowRankLinear
from utils.parts.mobile import MobileBertLayer, TrigramEmbeddings
from utils.parts.part import Part
from utils.parts.patterns import (
    BlockAttention,
    FixedAttention,
    GlobalWindowAttention,
    StridedAttention,
    WindowAttention,
)
from utils.parts.projected import LinformerAttention, StarAttention
from utils.parts.shared import HashedLinear, HashedVectors, QuaternionLinear, RandomlySharedLinear, ToeplitzLinear
from utils.parts.sorting import SinkhornAttention, SinkhornMixture, SortCutAttention
from utils.parts.students import BiLSTM, SpelledBert, TextCNN
from utils.parts.tensors import (
    BlockTermLinear,
    CPLinear,
    OrderedTrainVectors,
    TensorTrainLinear,
    TensorTrainVectors,
    TuckerLinear,
)
from utils.parts.trilinear import TrilinearAttention

__all__ = [
    "ATTENTIONS",
    "DENSE",
    "PARTS",
    "STOCK",
    "Part",
    "attention_macs",
    "build",
    "find",
    "linear_attention",
    "register_dense",
]

PARTS: dict[str, type[Part]] = {
    part.kind: part
    for part in (
        LowRankLinear,
        GroupedLinear,
        GatedLowRankLinear,
        MobileBertLayer,
        TrigramEmbeddings,
        BiLSTM,
        TextCNN,
        SpelledBert,
        CharacterBiLSTM,
        CharacterCNN,
        SparseVectors,
        TwoComponentVectors,
        ReferenceVectors,
        SlimVectors,
        FactorizedVectors,
        TrimmedVectors,
        DictionaryVectors,
        CompositionalVectors,
        BandedVectors,
        DigitVectors,
        RandomlySharedLinear,
        HashedLinear,
        HashedVectors,
        ToeplitzLinear,
        QuaternionLinear,
        AdaptiveEncoder,
        EquilibriumEncoder,
        TensorTrainLinear,
        TensorTrainVectors,
        OrderedTrainVectors,
        BlockTermLinear,
        CPLinear,
        TuckerLinear,
        TrilinearAttention,
        BlockAttention,
        StridedAttention,
        FixedAttention,
        LSHAttention,
        StarAttention,
        LinformerAttention,
        SinkhornAttention,
        SortCutAttention,
        SinkhornMixture,
        WindowAttention,
        GlobalWindowAttention,
    )
}


def build(kind: str, options: dict) -> Part:
    """A part of that kind with fresh weights; the global random numbers stay as they are.

    Raises CompanionError for an unknown kind and for options that do not make one; what they take is bounded by a `room.Room`
    around the call.
    """
    if kind not in PARTS:
        raise CompanionError(f"unknown part {kind!r}: this version knows {', '.join(PARTS)}")
    room.check_options(PARTS[kind], options, kind)
    with torch.random.fork_rng(devices=[]):
        part = PARTS[kind](**options)
    room.check_came_back(options, part.options(), kind)
    return part


def find(model: nn.Module, every_place: bool = False) -> dict[str, Part]:
    """All parts of a model by path, outer ones first; one that stands in several places once, or at `every_place`."""
    found = model.named_modules(remove_duplicate=not every_place)
    return {path: module for path, module in found if isinstance(module, Part)}
