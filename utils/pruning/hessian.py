"""Survey section 2.1.1: pruning by second derivatives, Optimal Brain Damage and Optimal Brain Surgeon.

Near a minimum the gradient vanishes, and the loss changes by 0.5 * dw^T H dw. Optimal Brain Damage keeps the diagonal of H
and asks which weight may go; Optimal Brain Surgeon keeps all of H and also asks how the other weights should make up for it.
"""

from collections.abc import Callable

import torch
from torch import nn

from utils import bert
from utils.bert import ENCODER, dense_weight, linear_matrices, matrices, watch
from utils.pruning.masks import Masks, Scores, check_sparsity, lowest, masks_from_scores
from utils.training import check_batches, cross_entropy

Diagonal = Callable[[nn.Module, list[dict], tuple[str, ...]], Scores]


def output_gradients(model: nn.Module, batch: dict, groups: tuple[str, ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per matrix the layer's input x (batch, tokens, in) and d(sum of losses)/dy (batch, tokens, out), float32.

    Examples do not mix inside a BERT, so row n of the second is the gradient of example n's own loss.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with watch(model, groups, lambda name, x, y: seen.update({name: (x, y)})):
        loss = cross_entropy(model, batch) * len(batch["labels"])
        dys = torch.autograd.grad(loss, [y for _, y in seen.values()])
    return {name: (x.float(), dy.float()) for (name, (x, _)), dy in zip(seen.items(), dys, strict=True)}


def fisher_diagonal(model: nn.Module, batches: list[dict], groups: tuple[str, ...] = ENCODER) -> Scores:
    """Empirical Fisher diagonal: h_ii = (1/N) sum_n (d loss_n / d w_i)^2, with one gradient per example.

    The square of a batch's mean gradient would not do: gradients of opposite sign cancel before they are squared. For a
    linear layer the gradient of one example is dy^T x, summed over its tokens. Survey 2.1.1. Raises ValueError for an empty
    list of batches and for groups that are not linear layers.
    """
    check_batches(batches)
    h = {m.name: torch.zeros(m.weight.shape, device=m.weight.device) for m in linear_matrices(model, groups)}
    for batch in batches:
        for name, (x, dy) in output_gradients(model, batch, groups).items():
            for x_n, dy_n in zip(x, dy, strict=True):
                g_n = torch.atleast_2d(dy_n).T @ torch.atleast_2d(x_n)  # (out, in)
                h[name].addcmul_(g_n, g_n)
    examples = sum(len(batch["labels"]) for batch in batches)
    return {name: total / examples for name, total in h.items()}


def hutchinson_diagonal(
    loss: torch.Tensor, parameters: list[torch.Tensor], samples: int = 16, seed: int = 0
) -> list[torch.Tensor]:
    """The Hessian's diagonal by Hutchinson's estimator: h = E[v * (H v)], each v_i being -1 or +1 with equal chance.

    The mean of v_i * v_j is 1 for i = j and 0 otherwise, so only the diagonal survives the averaging. H v is the gradient of
    (gradient . v): no Hessian is ever formed. Survey 2.1.1. Raises ValueError for fewer than one sample.
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    h = [torch.zeros_like(p) for p in parameters]
    for _ in range(samples):
        v = [(2 * torch.randint(2, p.shape, generator=generator) - 1).to(p) for p in parameters]
        Hv = torch.autograd.grad(gradients, parameters, grad_outputs=v, retain_graph=True)
        for total, v_i, Hv_i in zip(h, v, Hv, strict=True):
            total.addcmul_(v_i, Hv_i, value=1 / samples)
    return h


def hessian_diagonal(
    model: nn.Module, batches: list[dict], groups: tuple[str, ...] = ENCODER, samples: int = 4, seed: int = 0
) -> Scores:
    """Hutchinson's diagonal of the mean loss over the batches, for the matrices of a BERT: fresh signs in every batch.

    Raises ValueError for an empty list of batches.
    """
    check_batches(batches)
    found = matrices(model, groups)
    h = {m.name: torch.zeros_like(m.weight) for m in found}
    with bert.attention(model, "eager"):  # the fused attention kernels have no second derivative
        for i, batch in enumerate(batches):
            estimate = hutchinson_diagonal(cross_entropy(model, batch), [dense_weight(m) for m in found], samples, seed + i)
            for m, h_m in zip(found, estimate, strict=True):
                h[m.name] += h_m / len(batches)
    return h


def obd_saliency(weight: torch.Tensor, h: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
    """What the loss gains when a weight goes: s_i = 0.5 * (h_ii + damping) * w_i^2.

    LeCun, Denker, Solla 1990 (Optimal Brain Damage), survey 2.1.1. Damping orders weights whose curvature is zero by size.
    """
    # A negative h says that we are not at a minimum, where the formula holds; it must not make a weight look harmful.
    return 0.5 * (h.clamp(min=0) + damping) * weight.detach() ** 2


def obd_scores(
    model: nn.Module,
    batches: list[dict],
    groups: tuple[str, ...] = ENCODER,
    damping: float = 1e-8,
    diagonal: Diagonal = fisher_diagonal,
) -> Scores:
    """The saliency of every weight; `diagonal` is `fisher_diagonal` or `hessian_diagonal`.

    `damping` is a share of the mean h over all matrices: small enough only to order weights that no example moves.
    """
    h = diagonal(model, batches, groups)
    mean = torch.cat([h_m.flatten() for h_m in h.values()]).clamp(min=0).mean().item()
    return {m.name: obd_saliency(m.weight, h[m.name], damping * mean) for m in matrices(model, groups)}


def obd_masks(
    model: nn.Module,
    batches: list[dict],
    sparsity: float,
    groups: tuple[str, ...] = ENCODER,
    scope: str = "global",
    damping: float = 1e-8,
) -> Masks:
    """One round of Optimal Brain Damage: the `sparsity` share of smallest saliency goes, ranked over the whole network.

    `scope` is `matrix` to rank inside each matrix, as magnitude pruning does by default. The paper deletes, retrains and repeats:
    give `obd_scores` to `utils.pruning.iterative.iterative_pruning` for that. LeCun et al. 1990, survey 2.1.1. Raises ValueError
    for a sparsity outside [0, 1) and an empty list of batches.
    """
    check_sparsity(sparsity)
    return masks_from_scores(obd_scores(model, batches, groups, damping), sparsity, scope)


def inverse_hessian_recursion(gradients: torch.Tensor, damping: float = 1e-4) -> torch.Tensor:
    """Inverse of H = damping * I + (1/P) sum_m g_m g_m^T, one example at a time, without inverting a matrix.

    H_0^-1 = I / damping;  H_m^-1 = H_{m-1}^-1 - (H_{m-1}^-1 g g^T H_{m-1}^-1) / (P + g^T H_{m-1}^-1 g)

    Hassibi, Stork 1993, survey 2.1.1. `gradients` has shape (P, n), the result (n, n). Raises ValueError where there are no
    gradients, or where the damping is not positive.
    """
    P, n = gradients.shape
    if P == 0 or damping <= 0:
        raise ValueError(f"at least one gradient and a damping above 0 are needed, got {P} gradients and damping {damping}")
    H_inv = torch.eye(n, dtype=gradients.dtype, device=gradients.device) / damping
    for g in gradients:
        Hg = H_inv @ g
        H_inv -= torch.outer(Hg, Hg) / (P + g @ Hg)
    return H_inv


def damped_inverse(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Inverse of H + damping * mean(diag H) * I, in float64. Raises ValueError where that is not positive definite."""
    H = hessian.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    L, failed = torch.linalg.cholesky_ex(H)
    if failed:
        raise ValueError(f"the Hessian is singular at damping {damping}: raise the damping, or calibrate on more data")
    return torch.cholesky_inverse(L)


def obs_exact_row(weight: torch.Tensor, inverse_hessian: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Optimal Brain Surgeon on one vector of weights, shape (n,): remove one weight, repair all others, repeat.

    Removes the q of smallest L_q = 0.5 * w_q^2 / [H^-1]_qq and moves all weights by dw = -(w_q / [H^-1]_qq) * H^-1 e_q; one
    step of Gaussian elimination then takes q out of H^-1. Hassibi, Stork 1993, survey 2.1.1. Float64 inside. Raises
    ValueError for a sparsity outside [0, 1).
    """
    check_sparsity(sparsity)
    w, H_inv = weight.detach().double().clone(), inverse_hessian.double().clone()
    gone = torch.zeros_like(w, dtype=torch.bool)
    for _ in range(round(sparsity * w.numel())):
        L = 0.5 * w**2 / H_inv.diagonal()
        q = L.masked_fill(gone, torch.inf).argmin()
        w -= w[q] / H_inv[q, q] * H_inv[:, q]
        H_inv -= torch.outer(H_inv[:, q], H_inv[q]) / H_inv[q, q]
        gone[q] = True
        w[gone] = 0.0
    return w.to(weight.dtype)


def obs_prune_matrix(
    weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, damping: float = 0.01, block_size: int = 128
) -> torch.Tensor:
    """Optimal Brain Surgeon for all rows of a matrix at once: sweep over the columns, and repair only those still to come.

    Greedy removal needs an inverse per row. In a fixed column order one serves all rows: row j of the Cholesky factor U of
    H^-1 = U^T U is what the inverse of the not yet swept part becomes (scaled by U_jj). Each block of columns picks its own
    lowest L = 0.5 * w^2 / U_jj^2, over all rows, when the sweep reaches it (SparseGPT, Frantar, Alistarh 2023, on the OBS of
    survey 2.1.1). Shapes: weight (out, in), hessian (in, in). Returns the new weight. Raises ValueError for a sparsity outside
    [0, 1), a block size below 1, and a singular Hessian.
    """
    check_sparsity(sparsity)
    if block_size < 1:
        raise ValueError(f"block_size must be 1 or more, got {block_size}")
    W = weight.detach().float().clone()
    U = torch.linalg.cholesky(damped_inverse(hessian, damping), upper=True).float()
    for start in range(0, W.shape[1], block_size):
        block = slice(start, start + block_size)
        errors = sweep_block(W[:, block], U[block, block], sparsity)
        W[:, start + block_size :] -= errors @ U[block, start + block_size :]  # one product for all later columns
    return W.to(weight.dtype)


def sweep_block(W: torch.Tensor, U: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prune one block of columns in place, left to right. Returns each column's error over U_jj, shape (out, block)."""
    L = 0.5 * W**2 / U.diagonal() ** 2
    keep = lowest(L, sparsity)
    errors = torch.empty_like(W)
    for j in range(W.shape[1]):
        errors[:, j] = W[:, j] * ~keep[:, j] / U[j, j]
        W[:, j:] -= torch.outer(errors[:, j], U[j, j:])
    W *= keep  # rounding would leave crumbs where a zero belongs
    return errors


def layer_inputs_hessian(model: nn.Module, batches: list[dict], groups: tuple[str, ...] = ENCODER) -> dict[str, torch.Tensor]:
    """H = 2 X X^T of every matrix, X holding the layer's inputs (in, tokens) over all tokens that are not padding.

    It is the Hessian of the layer's squared output error ||W X - W' X||^2, the same for each row of W. Raises ValueError for an
    empty list of batches and for groups that are not linear layers.
    """
    check_batches(batches)
    hessians = {m.name: torch.zeros(2 * m.weight.shape[1:], device=m.weight.device) for m in linear_matrices(model, groups)}
    for batch in batches:
        tokens = batch["attention_mask"].bool()

        def visit(name: str, x: torch.Tensor, _, tokens: torch.Tensor = tokens) -> None:
            x = (x[tokens] if x.dim() == 3 else x).float()  # pooler and classifier see one vector per example
            hessians[name] += 2 * x.T @ x

        with torch.no_grad(), watch(model, groups, visit):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return hessians


@torch.no_grad()
def obs_prune(
    model: nn.Module, batches: list[dict], sparsity: float, groups: tuple[str, ...] = ENCODER, damping: float = 0.01
) -> Masks:
    """Layer-wise Optimal Brain Surgeon on a BERT, in place: every matrix loses `sparsity` and repairs what is left of it.

    The full inverse Hessian of a BERT would fill petabytes; a layer's own least-squares Hessian is small, and exact for the
    layer's output. All Hessians come from the dense model. Survey 2.1.1. Returns the masks. Raises ValueError for a sparsity
    outside [0, 1), an empty list of batches, and groups that are not linear layers.
    """
    check_sparsity(sparsity)
    hessians = layer_inputs_hessian(model, batches, groups)
    masks = {}
    for m in linear_matrices(model, groups):
        dense_weight(m).copy_(obs_prune_matrix(m.weight, hessians[m.name], sparsity, damping))
        masks[m.name] = m.weight != 0
    return masks
