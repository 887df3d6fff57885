"""Survey section 4: the students that learn, and where they start: layers of the teacher, narrower BERTs, other architectures.

A student of a teacher's own layers has its width, embeddings and head. Others take what fits: word vectors through the nearest
matrix of lower rank (a truncated SVD), the classifier where widths agree, nothing where there is nothing to take.
"""

from collections.abc import Callable

import torch
from torch import nn

from utils import bert, parts
from utils.structure import check_layers, remove_layers

# --- layers of the teacher: K-03, K-20, K-21, K-22 and others start here --------------------------------------------

STARTS: dict[str, Callable[[int, int], list[int]]] = {
    "first": lambda total, keep: list(range(keep)),
    "last": lambda total, keep: list(range(total - keep, total)),
    "alternate": lambda total, keep: [
        i * total // keep for i in range(keep)
    ],  # one of every total / keep, beginning with the lowest
}


def starting_layers(total: int, keep: int, start: str) -> list[int]:
    """The teacher's layers, counted from 0, that a student of `keep` layers begins with: `first`, `last` or `alternate`.

    `alternate` is DistilBERT's choice, one layer out of two (Sanh et al. 2019), for any ratio. Raises ValueError for another
    start, and for a student with no layer or with more than its teacher.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    if not 1 <= keep <= total:
        raise ValueError(f"a student has between 1 and the teacher's {total} layers, got {keep}")
    return STARTS[start](total, keep)


def from_layers(teacher: nn.Module, layers: list[int]) -> nn.Module:
    """A copy of the teacher with the given layers only, and its embeddings, pooler and classifier.

    Raises ValueError for no layer, and for one that the teacher does not have.
    """
    check_layers(layers, len(teacher.bert.encoder.layer))
    student = bert.fresh_copy(teacher)
    remove_layers(student, layers)
    return student


def with_random_layers(teacher: nn.Module, num_layers: int, seed: int = 0) -> nn.Module:
    """A BERT of the teacher's width with random layers, and the teacher's embeddings, pooler and classifier.

    Against `from_layers` it differs in nothing but the layers. Raises ValueError for too many layers.
    """
    config = teacher.config
    starting_layers(len(teacher.bert.encoder.layer), num_layers, "first")
    student = bert.small(config, num_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size, seed)
    for path in ("bert.embeddings", "bert.pooler", "classifier"):
        student.get_submodule(path).load_state_dict(teacher.get_submodule(path).state_dict())
    return student.to(next(teacher.parameters()).device)


# --- narrower: word vectors through a truncated SVD -----------------------------------------------------------------


@torch.no_grad()
def principal_directions(table: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` right singular vectors of a table (rows, width) with the largest singular values, as columns (width, size).

    table V V^T is the nearest table of that rank (Eckart and Young 1936). Raises ValueError for a size outside 1..width.
    """
    if not 1 <= size <= min(table.shape):
        raise ValueError(f"size must lie in 1..{min(table.shape)}, the rank of the table at most, got {size}")
    _, vectors = torch.linalg.eigh(table.float().T @ table.float())  # (width, width): far smaller than the table; ascending
    return vectors.flip(1)[:, :size]


@torch.no_grad()
def project_rows(table: torch.Tensor, size: int) -> torch.Tensor:
    """Every row in `size` numbers, such that as much as possible of all squared lengths is kept; (rows, size).

    Mukherjee and Awadallah 2020 give a student its word vectors so (survey 4.4).
    """
    return table.float() @ principal_directions(table, size)


@torch.no_grad()
def narrower(
    teacher: nn.Module, num_layers: int, hidden_size: int, *, num_heads: int, intermediate_size: int | None = None, seed: int = 0
) -> nn.Module:
    """A narrower BERT with random layers, whose embeddings are the teacher's in the directions that matter most to its word
    vectors.

    `intermediate_size` is the feed-forward size, four times the hidden size where none is given. Raises ValueError for a student
    wider or deeper than the teacher.
    """
    config = teacher.config
    starting_layers(len(teacher.bert.encoder.layer), num_layers, "first")
    if not 1 <= hidden_size <= config.hidden_size:
        raise ValueError(
            f"a student is at most as wide as its teacher: hidden_size must lie in 1..{config.hidden_size}, got {hidden_size}"
        )
    student = bert.small(config, num_layers, hidden_size, num_heads, intermediate_size or 4 * hidden_size, seed)
    source, target = teacher.bert.embeddings, student.bert.embeddings
    directions = principal_directions(source.word_embeddings.weight, hidden_size)
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        getattr(target, name).weight.copy_(getattr(source, name).weight.float() @ directions)
    return student.to(next(teacher.parameters()).device)


# --- other architectures: K-27 BiLSTM, a CNN ------------------------------------------------------------------------


@torch.no_grad()
def with_word_vectors(student: parts.Part, teacher: nn.Module) -> parts.Part:
    """Give a BiLSTM or a CNN the teacher's word vectors in its own embedding size; padding stays zero."""
    table = teacher.bert.embeddings.word_embeddings.weight
    student.embeddings.weight.copy_(project_rows(table, student.embeddings.embedding_dim))
    student.embeddings.weight[0].zero_()
    return student.to(table.device)


def bilstm(
    teacher: nn.Module, embedding_size: int = 128, hidden_size: int = 128, head_size: int = 128, seed: int = 0
) -> parts.BiLSTM:
    """K-27's student: one bidirectional LSTM over the teacher's word vectors. Tang et al. 2019 (300, 150 and 200), survey 4.4.

    No size is above the teacher's width, nor the LSTM's above half of it: of a narrow teacher the student would be the larger one.
    """
    most = teacher.config.hidden_size
    options = {"embedding_size": min(embedding_size, most), "hidden_size": min(hidden_size, max(1, most // 2)),
               "head_size": min(head_size, most)}  # fmt: skip
    return with_word_vectors(seeded(parts.BiLSTM, teacher, options, seed), teacher).eval()


def cnn(
    teacher: nn.Module, embedding_size: int = 128, filters: int = 100, widths: tuple[int, ...] = (3, 4, 5), seed: int = 0
) -> parts.TextCNN:
    """A text CNN (Kim 2014) over the teacher's word vectors; neither these nor the filters of a width are more than the teacher's."""
    most = teacher.config.hidden_size
    options = {"embedding_size": min(embedding_size, most), "filters": min(filters, most), "widths": widths}
    return with_word_vectors(seeded(parts.TextCNN, teacher, options, seed), teacher).eval()


def seeded(part: type[parts.Part], teacher: nn.Module, options: dict, seed: int) -> parts.Part:
    """A student of that kind for the teacher's vocabulary and classes, with a random start that the seed fixes."""
    words = teacher.bert.embeddings.word_embeddings.num_embeddings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return part(words, teacher.config.num_labels, **options)


# --- K-30 SqueezeBERT -----------------------------------------------------------------------------------------------

SQUEEZED = ("query", "key", "value", "ffn_in", "ffn_out")  # the projection after the attention stays dense, as in the paper


def squeeze(model: nn.Module, groups: int = 4, matrices: tuple[str, ...] = SQUEEZED) -> None:
    """Put grouped layers in place of a BERT's dense ones; each keeps the diagonal blocks of what it replaces. In place.

    Iandola et al. 2020 (arXiv 2006.11316), survey 4.4: they pre-train the grouped network; from a dense one, 1 - 1 / groups
    of the weights are lost, and training has to make up for it. Raises ValueError where groups do not divide the widths.
    """
    for matrix in bert.linear_matrices(model, matrices):
        model.set_submodule(matrix.name.removesuffix(".weight"), parts.GroupedLinear.from_linear(matrix.module, groups))
