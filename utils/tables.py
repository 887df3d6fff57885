"""What all word tables share, whatever composes their vectors: their place in the model, fitting, comparing, and their bytes.

Half of a small BERT is one table, a vector of `hidden_size` numbers per word piece. Chapters replace it by parts that compose a
word's vector from fewer numbers (`utils.parts.embeddings.WordVectors`).
"""

import math
from collections.abc import Callable, Iterable, Sequence

import pandas
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, mse_loss, normalize
from transformers import PreTrainedTokenizerBase

from utils import encodings
from utils.encodings import Encoded
from utils.parts.embeddings import CodedVectors, WordVectors
from utils.tasks import Split

PLACE = "bert.embeddings.word_embeddings"

# --- the table's place ----------------------------------------------------------------------------------------------


@torch.no_grad()
def word_table(model: nn.Module) -> torch.Tensor:
    """A copy of the vectors of all words, (vocabulary, hidden), float32."""
    return model.get_submodule(PLACE).weight.detach().float().clone()


def replace_table(model: nn.Module, vectors: WordVectors) -> None:
    """Put `vectors` in the place of the model's word table. Raises ValueError where vocabulary or width differ."""
    now = model.get_submodule(PLACE)
    needed, given = ((table.num_embeddings, table.embedding_dim) for table in (now, vectors))
    if needed != given:
        raise ValueError(
            f"the model needs vectors for {needed[0]} words of width {needed[1]}, got {given[0]} of width {given[1]}"
        )
    model.set_submodule(PLACE, vectors.to(next(model.parameters()).device).train(model.training))


# --- fitting and comparing ------------------------------------------------------------------------------------------


def word_counts(split: Split, vocab_size: int) -> torch.Tensor:
    """How often each id occurs in a split, (vocab_size,), whole numbers. Raises ValueError for an id beyond the vocabulary."""
    ids = torch.tensor([token for row in split.input_ids for token in row], dtype=torch.long)
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise ValueError(f"the texts hold id {int(ids.max())}, the vocabulary ends at {vocab_size - 1}")
    return torch.bincount(ids, minlength=vocab_size)


def regress(
    vectors: WordVectors,
    table: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 1024,
    counts: torch.Tensor | None = None,
    seed: int = 0,
) -> list[float]:
    """Fit composed vectors to a table (vocabulary, hidden) by Adam on the mean squared error; returns the losses.

    Words are drawn uniformly, or in proportion to `counts` (vocabulary,); the rate falls linearly to 0. Raises ValueError where
    the sizes differ or nothing can be drawn.
    """
    shape = (vectors.num_embeddings, vectors.embedding_dim)
    if table.shape != shape:
        raise ValueError(f"the table must have shape {shape}, got {tuple(table.shape)}")
    weights = torch.ones(len(table)) if counts is None else counts.double().cpu()
    if weights.shape != (len(table),) or not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(f"counts must be {len(table)} numbers of at least 0, one of them above 0")
    generator = torch.Generator().manual_seed(seed)
    optimizer, losses, training = torch.optim.Adam(vectors.parameters(), lr=learning_rate), [], vectors.training
    vectors.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        words = torch.multinomial(weights, batch_size, replacement=True, generator=generator).to(table.device)
        loss = mse_loss(vectors(words), table[words])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    vectors.train(training)
    return losses


def as_table(vectors: WordVectors | nn.Embedding | torch.Tensor) -> torch.Tensor:
    """The vectors of all words as a plain tensor without gradients."""
    if isinstance(vectors, WordVectors):
        return vectors.expanded().weight.detach()
    return (vectors.weight if isinstance(vectors, nn.Embedding) else vectors).detach().float()


def reconstruction(
    vectors: WordVectors | torch.Tensor, table: torch.Tensor, counts: torch.Tensor | None = None
) -> dict[str, float]:
    """How near the vectors come to a table (vocabulary, hidden).

    `cosine`: its mean over words; `cosine_by_count`: over the words of a text, given `counts` (vocabulary,); `relative_error`:
    squared error over the table's squared norm, 0 for the table itself and 1 for zeros.
    """
    made = as_table(vectors)
    cosine = cosine_similarity(made, table, dim=1)
    found = {"cosine": cosine.mean().item()}
    if counts is not None:
        found["cosine_by_count"] = ((cosine * counts).sum() / counts.sum()).item()
    return found | {"relative_error": ((made - table).square().sum() / table.square().sum()).item()}


def nearest_words(table: torch.Tensor, ids: torch.Tensor, k: int, hidden: Iterable[int] = ()) -> torch.Tensor:
    """The k ids whose vectors have the largest cosine with that of each id, itself and `hidden` ones left out; (ids, k)."""
    directions = normalize(table, dim=1)
    closeness = directions[ids] @ directions.T
    closeness[:, list(hidden)] = -torch.inf
    closeness[torch.arange(len(ids)), ids] = -torch.inf
    return closeness.topk(k, dim=1).indices


def neighbours(
    vectors: WordVectors | torch.Tensor, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], k: int = 4
) -> pandas.DataFrame:
    """A row per word: its k nearest neighbours by cosine, nearest first. Special and unused tokens are no neighbours.

    Raises ValueError for a word that is no piece of the vocabulary.
    """
    table = as_table(vectors)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(table))))
    number = {piece: place for place, piece in enumerate(pieces)}
    unknown = [word for word in words if word not in number]
    if unknown:
        raise ValueError(f"no pieces of the vocabulary: {', '.join(unknown)}")
    hidden = [place for place, piece in enumerate(pieces) if piece.startswith("[") and len(piece) > 1]
    found = nearest_words(table, torch.tensor([number[word] for word in words]), k, hidden)
    return pandas.DataFrame([[pieces[i] for i in row] for row in found.tolist()], index=list(words), columns=range(1, k + 1))


def neighbours_kept(vectors: WordVectors | torch.Tensor, table: torch.Tensor, ids: torch.Tensor, k: int = 10) -> float:
    """Share of the k nearest neighbours of each id in the table that still are among the k nearest."""
    before, after = (nearest_words(t, ids, k) for t in (table, as_table(vectors)))
    return (before[:, :, None] == after[:, None, :]).any(-1).float().mean().item()


# --- bytes ----------------------------------------------------------------------------------------------------------


def whole_numbers(codes: torch.Tensor, choices: int) -> Encoded:
    """Whole numbers below `choices` in as few bits each as that takes; above 8 bits as two digits or more of equal size.

    The digits are codebooks whose entries add up (`encodings.residual`), so 9 bits take 10.
    """
    bits = max(1, (choices - 1).bit_length())
    digits = math.ceil(bits / 8)
    size = math.ceil(bits / digits)  # bits of a digit
    units = 2 ** (size * torch.arange(digits))  # what a digit's 1 is worth
    number = codes.flatten().long() // units.unsqueeze(1) % 2**size
    books = torch.arange(2**size) * units.unsqueeze(1)
    return encodings.residual(number, books.unsqueeze(-1).int(), codes.shape, size)


def pack(vectors: nn.Module) -> dict[str, Encoded]:
    """How the codes of a part are stored, by the name of their buffer; nothing for a part without codes."""
    choices = vectors.choices() if isinstance(vectors, CodedVectors) else {}
    return {name: whole_numbers(getattr(vectors, name).cpu(), count) for name, count in choices.items()}


def packed(model: nn.Module) -> dict[str, Encoded]:
    """The same for the table of a model: what `Trial.finish` hands to the file."""
    return {f"{PLACE}.{name}": item for name, item in pack(model.get_submodule(PLACE)).items()}


def stored_bytes(vectors: nn.Module) -> int:
    """Bytes that a table takes in a file, codes packed, without the header."""
    given = pack(vectors)
    state = {name: tensor.detach().cpu() for name, tensor in vectors.state_dict().items()}
    return sum((given[name] if name in given else encodings.sparse(tensor)).nbytes for name, tensor in state.items())


def largest_size(make: Callable[[int], nn.Module], budget_bytes: int, most: int, least: int = 1) -> int:
    """The largest size from `least` to `most` for which `make(size)` is stored in `budget_bytes`, by bisection.

    Raises ValueError where not even `least` fits.
    """
    if stored_bytes(make(least)) > budget_bytes:
        raise ValueError(f"{budget_bytes} bytes do not hold the smallest table, which takes {stored_bytes(make(least))}")
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stored_bytes(make(middle)) <= budget_bytes else (low, middle - 1)
    return low
