"""Survey section 3.3.5: quantization made for embeddings and Transformers.

Word2Bits (embeddings that learn inside a fixed grid), what to quantize (all layers, or attention only), Q-BERT's group-wise
ranges and its mixed precision by the Hessian; and GOBO's outliers, from a later survey.
"""

import numpy as np
import torch
from torch import nn

from utils import bert, encodings
from utils.bert import ENCODER, dense_weight, matrices
from utils.encodings import Encoded
from utils.quantization.codebook import borders, check_count, nearest
from utils.quantization.loss_aware import first_alpha, loss_aware_levels
from utils.quantization.quantizer import Quantizer, ascending, check_bits, check_weight
from utils.quantization.uniform import RangeFunction, UniformQuantizer, even_grid, from_codes
from utils.sizes import divisor
from utils.tasks import Split, collate
from utils.training import check_batches, cross_entropy, to_device

# --- Word2Bits ------------------------------------------------------------------------------------------------------

WORD2BITS = {1: torch.tensor([-1 / 3, 1 / 3]), 2: torch.tensor([-3 / 4, -1 / 4, 1 / 4, 3 / 4])}


class Word2Bits(Quantizer):
    """The word-embedding table during training: 1 bit is +-1/3, 2 bits are +-1/4 and +-3/4 with a border at 0.5. Lam 2018.

    Survey 3.3.5. Lam's vectors learn from scratch on that grid. BERT's table is trained already, in a range of its own, so the
    grid is multiplied by one number per table, the least-squares fit to the table that it starts from, and then stays fixed as
    Lam's does. Needs `train(..., train_embeddings=True)`. Raises ValueError for bits other than 1 and 2.
    """

    def __init__(self, weight: torch.Tensor, bits: int):
        super().__init__()
        if bits not in WORD2BITS:
            raise ValueError(f"bits must be 1 or 2, got {bits}")
        check_weight(weight)
        self.bits = bits
        w, levels = weight.detach().float(), WORD2BITS[bits].to(weight.device)
        s, _ = loss_aware_levels(w, torch.ones_like(w), levels, first_alpha(w, levels))
        self.register_buffer("s", torch.where(s > 0, s, 1.0))

    def codes(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scale and zero of value = scale * (code - zero)."""
        check_weight(weight)
        step = self.s * 2 / 3 if self.bits == 1 else self.s / 2
        zero = torch.full_like(step, (2**self.bits - 1) / 2)
        return torch.floor(weight.detach().float() / step + 2 ** (self.bits - 1)).clamp(0, 2**self.bits - 1), step, zero

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The scaled level of every entry."""
        return from_codes(*self.codes(weight)).to(weight.dtype)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed codes and one scale."""
        codes, scale, zero = self.codes(weight)
        return encodings.uniform(codes, scale.view(1, 1), zero.view(1, 1), self.bits)


# --- what to quantize -----------------------------------------------------------------------------------------------

ATTENTION = ("query", "key", "value", "attention_output")
SCOPES = {"all layers": ENCODER, "attention only": ATTENTION}  # Cheong, Daniel 2019, survey 3.3.5


@torch.no_grad()
def attention_maps(model: nn.Module, batch: dict) -> torch.Tensor:
    """The attention probabilities of all layers, (layers, batch, heads, tokens, tokens)."""
    inputs = to_device(batch, next(model.parameters()).device)
    with bert.attention(model, "eager"):  # the fused kernels never form the probabilities
        out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_attentions=True)
    return torch.stack(out.attentions).float()


def attention_kl(model: nn.Module, other: nn.Module, batch: dict) -> torch.Tensor:
    """KL(P || Q) of the attention maps of two models, mean over all tokens that are not padding, (layers, heads), in nats.

    How far quantization turns attention elsewhere: near 0 at 4 bits, say Cheong and Daniel 2019 (survey 3.3.5).
    """
    P, Q = attention_maps(model, batch), attention_maps(other, batch)
    terms = torch.where(P > 0, P * (P.clamp(min=1e-30) / Q.clamp(min=1e-30)).log(), 0)
    tokens = batch["attention_mask"].to(P.device, P.dtype)
    return torch.einsum("lbhi,bi->lh", terms.sum(-1), tokens) / tokens.sum()


# --- Q-BERT ---------------------------------------------------------------------------------------------------------


class GroupwiseQuantizer(UniformQuantizer):
    """Q-BERT's group-wise quantization: consecutive output neurons share a range. Shen et al. 2019, survey 3.3.5.

    One group is one range per tensor, as many groups as rows one range per neuron; the paper settles for 128. Where `groups` does
    not divide the rows, the next smaller number that does is taken. A range is the `even` grid of least squared error (see
    `EvenQuantizer`), or ends where `clip` says; the paper's, from the smallest to the largest weight, is `max`. Raises ValueError
    for bits outside 1 to 8, no groups and an unknown `clip`.
    """

    def __init__(self, bits: int, groups: int = 128, clip: str | RangeFunction = "even", symmetric: bool = False):
        super().__init__(bits, symmetric, clip="mse" if clip == "even" else clip)
        if groups < 1:
            raise ValueError(f"groups must be 1 or more, got {groups}")
        self.groups, self.even = groups, clip == "even"

    def search(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class."""
        return even_grid(x, self.bits) if self.even else super().search(x)

    def grid(self, weight: torch.Tensor) -> tuple[int, int]:
        """How many ranges there are along the rows and along the columns."""
        return divisor(weight.shape[0], self.groups), 1


def random_slices(split: Split, count: int, size: int, pad_token_id: int, seed: int = 0) -> list[dict]:
    """`count` batches of `size` random sentences each, none of them twice: slices of the data that differ by chance alone.

    Batches for training will not do: they are sorted by length, and a Hessian on long sentences is another one. Raises ValueError
    where the split has too few sentences.
    """
    if count * size > len(split):
        raise ValueError(f"{count} slices of {size} sentences need {count * size}, the split has {len(split)}")
    rows = np.random.default_rng(seed).permutation(len(split))[: count * size]
    return [collate(split, part, pad_token_id) for part in np.split(rows, count)]


def top_eigenvalue(
    loss: torch.Tensor, parameters: list[torch.Tensor], iterations: int = 20, tolerance: float = 1e-3, seed: int = 0
) -> float:
    """The Hessian eigenvalue of largest size, by power iteration: v <- H v / |H v|, lambda = v^T H v.

    H v is the gradient of (gradient . v), so H is never formed. Stops when lambda changes by less than `tolerance` of itself.
    """
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    v = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    eigenvalue = 0.0
    for _ in range(iterations):
        norm = torch.sqrt(sum(v_i.square().sum() for v_i in v)).clamp(min=1e-30)
        v = [v_i / norm for v_i in v]
        Hv = torch.autograd.grad(gradients, parameters, grad_outputs=v, retain_graph=True)
        before, eigenvalue = eigenvalue, float(sum((v_i * Hv_i).sum() for v_i, Hv_i in zip(v, Hv, strict=True)))
        if abs(eigenvalue - before) <= tolerance * abs(eigenvalue):
            break
        v = Hv
    return eigenvalue


def layer_eigenvalues(
    model: nn.Module, slices: list[dict], groups: tuple[str, ...] = ENCODER, iterations: int = 20, tolerance: float = 1e-3
) -> dict[int, list[float]]:
    """The top Hessian eigenvalue of each layer's matrices on each slice of the data: {layer: [lambda of slice 1, ...]}.

    Q-BERT takes ten slices of a tenth of the data. Raises ValueError without slices and for groups that are in no layer.
    """
    check_batches(slices)
    found = [m for m in matrices(model, groups) if m.layer is not None]
    if not found:
        raise ValueError(f"groups must hold at least one of {', '.join(ENCODER)}, got {groups}")
    weights = {layer: [dense_weight(m) for m in found if m.layer == layer] for layer in sorted({m.layer for m in found})}
    eigenvalues: dict[int, list[float]] = {layer: [] for layer in weights}
    model.eval()  # dropout would make each Hessian another one
    with bert.attention(model, "eager"):  # the fused attention kernels have no second derivative
        for batch in slices:
            loss = cross_entropy(model, to_device(batch, weights[found[0].layer][0].device))
            for layer, parameters in weights.items():
                eigenvalues[layer].append(top_eigenvalue(loss, parameters, iterations, tolerance))
    return eigenvalues


def sensitivity(eigenvalues: list[float]) -> float:
    """Omega = |mean(lambda)| + std(lambda) over the slices: a layer is delicate if its loss is steep, or steep on some data."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    return (values.mean().abs() + values.std(correction=0)).item()


def allocate_bits(omega: dict[int, float], sizes: dict[int, int], average: float, high: int = 3, low: int = 2) -> dict[int, int]:
    """`high` bits to the most sensitive layers, `low` to the rest: as many high ones as the average per weight allows.

    `omega` and `sizes` (weights per layer) have the same keys. Shen et al. 2019, survey 3.3.5. Raises ValueError for bits outside
    1 to 8 or an average that is not between low and high.
    """
    check_bits(low)
    check_bits(high)
    if not low <= average <= high:
        raise ValueError(f"average must lie in low to high, {low} to {high}, got {average}")
    budget = average * sum(sizes.values()) - low * sum(sizes.values())  # bits to give away
    bits = dict.fromkeys(omega, low)
    for layer in sorted(omega, key=omega.get, reverse=True):
        price = (high - low) * sizes[layer]
        if price > budget + 1e-6:
            break
        bits[layer], budget = high, budget - price
    return bits


def other_allocation(bits: dict[int, int], seed: int) -> dict[int, int]:
    """The same numbers of bits in a random order of the layers, other than the given one where there is another. A control."""
    generator, values = np.random.default_rng(seed), list(bits.values())
    shuffled = values
    while shuffled == values and len(set(values)) > 1:
        shuffled = generator.permutation(values).tolist()
    return dict(zip(bits, shuffled, strict=True))


def layer_sizes(model: nn.Module, groups: tuple[str, ...] = ENCODER) -> dict[int, int]:
    """How many weights the groups have in each layer: {layer: count}."""
    sizes: dict[int, int] = {}
    for m in matrices(model, groups):
        if m.layer is not None:
            sizes[m.layer] = sizes.get(m.layer, 0) + m.weight.numel()
    return sizes


# --- GOBO -----------------------------------------------------------------------------------------------------------


def outliers(weight: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where log N(w; mean, std) < threshold, the Gaussian being the one of the whole matrix."""
    if std == 0:  # all values equal: none stands out
        return torch.zeros_like(weight, dtype=torch.bool)
    return torch.distributions.Normal(mean, std).log_prob(weight) < threshold


def gobo_centroids(x: torch.Tensor, k: int, iterations: int = 50) -> torch.Tensor:
    """k centroids of sorted values: means of k equally filled bins, then nearest assignment and means, while sum|x - c| falls."""
    centroids = torch.stack([part.mean() for part in x.tensor_split(k)])
    best, best_error = centroids, torch.inf
    for _ in range(iterations):
        index = torch.bucketize(x, borders(centroids))
        error = (x - centroids[index]).abs().sum().item()
        if error >= best_error:
            break
        best, best_error = centroids, error
        counts = torch.bincount(index, minlength=k)
        sums = torch.zeros_like(centroids).scatter_add_(0, index, x)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return best


class Gobo(Quantizer):
    """GOBO: a few outliers stay in float32, all other weights share 2^bits centroids; no retraining. Zadeh et al. 2020.

    Outliers lie below `threshold` in Gaussian log-likelihood. That is a density: at the paper's -4 a matrix of standard deviation
    0.04 keeps 0.04 % of its weights in full, one of standard deviation 1 keeps 1.3 %. `threshold=-inf` keeps none. From a later
    survey. Raises ValueError for bits outside 1 to 8 and more centroids than weights.
    """

    def __init__(self, weight: torch.Tensor, bits: int = 3, threshold: float = -4.0):
        super().__init__()
        check_bits(bits)
        check_weight(weight)
        w = weight.detach().float()
        self.bits, self.threshold = bits, threshold
        self.register_buffer("mean", w.mean())
        self.register_buffer("std", w.std(correction=0))
        x = ascending(w[~self.outliers(w)])
        check_count(2**bits, x.numel(), "values that are no outliers")
        self.register_buffer("centroids", gobo_centroids(x, 2**bits))

    def outliers(self, weight: torch.Tensor) -> torch.Tensor:
        """True for the weights that stay as they are."""
        return outliers(weight.detach().float(), self.mean, self.std, self.threshold)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest centroid, or the weight itself for an outlier."""
        return torch.where(self.outliers(weight), weight, self.centroids[nearest(weight, self.centroids)].to(weight.dtype))

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Packed indices, the codebook, and each outlier's position (int32) and value (float32)."""
        positions = torch.nonzero(self.outliers(weight).flatten()).flatten()
        index = nearest(weight, self.centroids)
        return encodings.outliers(index, self.centroids, positions, weight.detach().float(), self.bits)


def gobo(weight: torch.Tensor, bits: int = 3, threshold: float = -4.0) -> torch.Tensor:
    """The weight as GOBO stores it: see `Gobo`."""
    return Gobo(weight, bits, threshold).quantize(weight)
