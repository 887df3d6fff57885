"""Survey section 2.3 against oracles: loops over blocks, torch's own block-sparse layout, gradients by hand."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from utils.bert import ENCODER, dense_weight, matrices
from utils.pruning import blocks, iterative
from utils.pruning.magnitude import magnitude_masks
from utils.pruning.masks import held_masks, hold_masks, sparsity_of
from utils.training import cross_entropy

FIRST = "bert.encoder.layer.0.attention.self.query.weight"
RAMP = blocks.Ramp(start=2, ramp=4, end=8, frequency=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=2
    )
    return BertForSequenceClassification(config).eval()


def make_batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(8) < torch.tensor([8, 5, 3, 6])[:, None]).long()
    return {"input_ids": torch.randint(1, 100, (4, 8), generator=generator) * mask, "attention_mask": mask,
            "labels": torch.tensor([0, 1, 1, 0])}  # fmt: skip


def fit(model: nn.Module, steps: int, after_step=None, loss=cross_entropy) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model, make_batch()).backward()
        optimizer.step()
        if after_step is not None:
            after_step(step, model, optimizer)


def loop_scores(weight: torch.Tensor, r: int, c: int) -> torch.Tensor:
    rows, columns = weight.shape
    return torch.stack(
        [torch.stack([weight[i : i + r, j : j + c].abs().max() for j in range(0, columns, c)]) for i in range(0, rows, r)]
    )


# --- P-15 block pruning -------------------------------------------------------------------------------------------------


@pytest.mark.method("P-15")
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (8, 2), (32, 1), (1, 32)])
def test_block_score_is_the_largest_weight(model, block):
    weight = model.get_parameter(FIRST).detach()
    assert torch.equal(blocks.block_scores(weight, block), loop_scores(weight, *block))


@pytest.mark.method("P-15")
@pytest.mark.filterwarnings("ignore:Sparse BSR")
def test_block_masks_remove_whole_blocks_of_lowest_score(model):
    masks = blocks.block_masks(model, 0.75, (4, 4))
    for m in matrices(model):
        weight = m.weight.detach()
        scores, kept = loop_scores(weight, 4, 4), loop_scores(masks[m.name].float(), 4, 4).bool()
        assert (~kept).sum() == round(0.75 * kept.numel())
        assert scores[kept].min() > scores[~kept].max()
        assert torch.equal(masks[m.name], kept.repeat_interleave(4, 0).repeat_interleave(4, 1))
        stored = (weight * masks[m.name]).to_sparse_bsr((4, 4))  # torch's own block layout finds the same blocks
        assert stored.values().shape[0] == kept.sum()


@pytest.mark.method("P-15")
def test_blocks_of_one_weight_are_magnitude_pruning(model):
    expected = magnitude_masks(model, 0.6, groups=ENCODER)
    masks = blocks.block_masks(model, 0.6, (1, 1))
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


@pytest.mark.method("P-15")
def test_every_matrix_loses_its_own_share_and_the_default_block_is_4x4(model):
    with torch.no_grad():
        model.get_parameter(FIRST).mul_(100)
    masks = blocks.block_masks(model, 0.5)
    assert all(mask.float().mean() == 0.5 for mask in masks.values())
    kept = masks[FIRST].view(8, 4, 8, 4).transpose(1, 2).flatten(2)
    assert (kept.all(-1) | ~kept.any(-1)).all()


@pytest.mark.method("P-15")
def test_blocks_can_be_ranked_by_another_score(model):
    masks = blocks.block_masks(model, 0.5, (4, 4), score=lambda weight, block: -blocks.block_scores(weight, block))
    scores, kept = loop_scores(model.get_parameter(FIRST).detach(), 4, 4), masks[FIRST][::4, ::4]
    assert scores[kept].max() < scores[~kept].min()


@pytest.mark.method("P-15")
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("block", [(1, 1), (2, 2), (4, 4)])
def test_the_block_threshold_is_planned_from_block_scores(model, block, sparsity):
    weight = model.get_parameter(FIRST).detach().clone()
    ramp = blocks.Ramp(start=2, ramp=22, end=42, frequency=2)
    hook = blocks.block_pruning(sparsity, ramp, block)
    q = iterative.percentile(loop_scores(weight, *block), sparsity).item()
    theta = 2 * q * 2 / (2 * 20 + 3 * 20)
    gone = []
    for step in range(1, 43):
        hook(step, model, None)
        if step >= 2 and step % 2 == 0:
            slow, fast = min(step, 22) - 2 + 1, step - 22 + 1
            eps = theta * (slow + 1.5 * fast * (step > 22)) / 2
            below = (loop_scores(weight, *block) <= eps).float().mean().item()
            kept = loop_scores(held_masks(model)[FIRST].float(), *block).bool()
            gone.append((~kept).float().mean().item())
            assert gone[-1] == pytest.approx(min(below, sparsity) if step < 42 else sparsity, abs=0.5 / kept.numel())
    jumps = [later - earlier for earlier, later in pairwise([0.0, *gone])]
    assert max(jumps) < 0.2  # the threshold arrives with the schedule, as smoothly as a matrix of 32x32 allows
    assert gone[-2] > 0.8 * sparsity  # almost nothing is left for the last moment


@pytest.mark.method("P-15")
def test_the_threshold_is_planned_once_and_the_end_is_exact(model):
    """Weights that triple after the plan outgrow the threshold; at the end the share goes all the same."""
    hook = blocks.block_pruning(0.5, RAMP, (2, 2))
    q = iterative.percentile(blocks.block_scores(model.get_parameter(FIRST), (2, 2)), 0.5).item()
    hook(2, model, None)
    with torch.no_grad():
        for m in matrices(model):
            dense_weight(m).mul_(3)
    hook(6, model, None)
    eps = 2 * q * 2 / (2 * 2 + 3 * 4) * (3 + 1.5 * 3) / 2
    expected = (loop_scores(dense_weight(matrices(model)[0]).detach(), 2, 2) <= eps).float().mean().item()
    assert 1 - held_masks(model)[FIRST].float().mean().item() == pytest.approx(expected, abs=1e-6) and expected < 0.4
    hook(8, model, None)
    assert sparsity_of(held_masks(model)) == 0.5


@pytest.mark.method("P-15")
def test_block_pruning_while_training(model):
    hook, seen = blocks.block_pruning(0.75, RAMP), []

    def after_step(step, model, optimizer):
        hook(step, model, optimizer)
        seen.append({m.name: m.weight.detach() != 0 for m in matrices(model)})

    fit(model, 10, after_step)
    assert sparsity_of(seen[0]) == 0 and sparsity_of(seen[7]) == sparsity_of(seen[9]) == pytest.approx(0.75, abs=1e-3)
    assert all(not (later[n] & ~earlier[n]).any() for earlier, later in pairwise(seen) for n in later)
    for mask in held_masks(model).values():
        tiles = mask.view(mask.shape[0] // 4, 4, -1, 4).transpose(1, 2).flatten(2)
        assert (tiles.all(-1) | ~tiles.any(-1)).all()


@pytest.mark.method("P-15", "P-16", "P-17")
def test_bad_blocks_and_banks_say_what_is_allowed(model):
    for block in ((5, 4), (4, 5), (0, 4)):
        with pytest.raises(ValueError, match="divisors of 32 and 32"):
            blocks.block_masks(model, 0.5, block)
        with pytest.raises(ValueError, match="divisors of 32 and 32"):
            blocks.block_group_lasso(model, block)
    for sparsity in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            blocks.block_masks(model, sparsity)
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            blocks.block_pruning(sparsity, RAMP)
    with pytest.raises(ValueError, match="start <= ramp <= end"):
        blocks.Ramp(start=5, ramp=2, end=8, frequency=1)
    with pytest.raises(ValueError, match="lam must be 0 or more"):
        blocks.group_lasso_pruning(0.5, -1.0, RAMP)
    with pytest.raises(ValueError, match="divisor of 32"):
        blocks.bank_balanced_masks(model, 5, 2)
    for keep in (0, 5):
        with pytest.raises(ValueError, match=r"1\.\.4"):
            blocks.bank_balanced_masks(model, 4, keep)
    for keeps in ([], [1, 2]):
        with pytest.raises(ValueError, match="falling"):
            blocks.iterative_banks(4, keeps, range(len(keeps)))
    for steps in ([0], [2, 1], [1, 1], [-1, 2]):
        with pytest.raises(ValueError, match="later step"):
            blocks.iterative_banks(4, [3, 2], steps)


# --- P-16 group lasso ---------------------------------------------------------------------------------------------------


@pytest.mark.method("P-16")
def test_group_lasso_value_and_gradient(model):
    weight = model.get_parameter(FIRST)
    with torch.no_grad():
        weight[:4, :4] = 0
    blocks.block_group_lasso(model, (4, 4), ("query",)).backward()
    total = 0.0
    for m in matrices(model, ("query",)):
        for i in range(0, 32, 4):
            for j in range(0, 32, 4):
                w_g, gradient = m.weight[i : i + 4, j : j + 4].detach(), m.weight.grad[i : i + 4, j : j + 4]
                norm = w_g.norm()
                torch.testing.assert_close(gradient, w_g / norm if norm > 0 else torch.zeros(4, 4))
                total += norm.item()
    assert blocks.block_group_lasso(model, (4, 4), ("query",)).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.method("P-16")
def test_blocks_of_one_weight_make_it_the_l1_norm(model):
    expected = sum(m.weight.abs().sum().item() for m in matrices(model))
    assert blocks.block_group_lasso(model, (1, 1)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.method("P-16")
def test_no_lambda_is_plain_block_pruning(model):
    twin = copy.deepcopy(model)
    fit(model, 9, blocks.block_pruning(0.75, RAMP))
    loss, hook = blocks.group_lasso_pruning(0.75, 0.0, RAMP)
    fit(twin, 9, hook, loss)
    for ours, theirs in zip(matrices(model), matrices(twin), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.method("P-16")
def test_penalty_shrinks_blocks_and_stops_with_the_schedule(model):
    batch, lam = make_batch(), 0.01
    loss, hook = blocks.group_lasso_pruning(0.5, lam, RAMP)
    penalty = lam * blocks.block_group_lasso(model, (4, 4)).item()
    assert loss(model, batch).item() == pytest.approx(cross_entropy(model, batch).item() + penalty, rel=1e-5)
    twin = copy.deepcopy(model)
    fit(model, 7, hook, loss)
    assert loss(model, batch).item() > cross_entropy(model, batch).item()
    hook(8, model, None)
    assert loss(model, batch).item() == cross_entropy(model, batch).item()
    fit(twin, 8, blocks.block_pruning(0.5, RAMP))
    ours, theirs = blocks.block_lengths(model), blocks.block_lengths(twin)
    alive = (ours > 0) & (theirs > 0)
    assert (ours[alive] < theirs[alive]).float().mean() > 0.9
    assert sparsity_of(held_masks(model)) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.method("P-16")
def test_the_strength_gives_the_penalty_a_gradient_of_the_asked_length(model):
    for block, pull in (((4, 4), 1.0), ((8, 2), 0.25)):
        model.zero_grad()
        lam = blocks.lasso_strength(model, block, pull=pull)
        (lam * blocks.block_group_lasso(model, block)).backward()
        total = torch.stack([m.weight.grad.norm() for m in matrices(model)]).norm().item()
        assert total == pytest.approx(pull, rel=1e-4)


@pytest.mark.method("P-16")
def test_block_lengths_one_by_one(model):
    found = blocks.block_lengths(model, (8, 16), ("query",))
    expected = [m.weight[i : i + 8, j : j + 16].norm().item() for m in matrices(model, ("query",))
                for i in range(0, 32, 8) for j in range(0, 32, 16)]  # fmt: skip
    assert found.tolist() == pytest.approx(expected)
    assert blocks.block_lengths(model).sum().item() == pytest.approx(blocks.block_group_lasso(model).item(), rel=1e-5)


# --- P-17 bank-balanced -------------------------------------------------------------------------------------------------


@pytest.mark.method("P-17")
@pytest.mark.parametrize(("bank_size", "keep"), [(4, 2), (8, 1), (16, 4), (32, 32)])
def test_every_bank_keeps_its_largest(model, bank_size, keep):
    masks = blocks.bank_balanced_masks(model, bank_size, keep)
    for m in matrices(model):
        weights, kept = m.weight.detach().abs(), masks[m.name]
        for row in range(0, len(weights), 7):
            for start in range(0, weights.shape[1], bank_size):
                bank, mask = weights[row, start : start + bank_size], kept[row, start : start + bank_size]
                assert mask.sum() == keep
                assert sorted(bank[mask].tolist()) == sorted(bank.tolist())[-keep:]
    assert sparsity_of(masks) == 1 - keep / bank_size


@pytest.mark.method("P-17")
def test_two_of_four(model):
    mask = blocks.bank_mask(torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 0.1, 0.2]]), 4, 2)
    assert mask.tolist() == [[False, True, True, False, False, False, True, True]]


@pytest.mark.method("P-17")
def test_a_bank_as_long_as_the_row_is_magnitude_pruning_per_row(model):
    weight = model.get_parameter(FIRST).detach()
    expected = weight.abs() >= weight.abs().sort(1, descending=True).values[:, 7:8]
    assert torch.equal(blocks.bank_mask(weight.abs(), 32, 8), expected)


@pytest.mark.method("P-17")
def test_banks_narrow_round_by_round(model):
    hook, seen = blocks.iterative_banks(8, [6, 4, 2], [1, 3, 5]), []

    def after_step(step, model, optimizer):
        hook(step, model, optimizer)
        seen.append({name: mask.clone() for name, mask in held_masks(model).items()})

    fit(model, 6, after_step)
    assert [sparsity_of(s) for s in seen] == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert all(not (later[n] & ~earlier[n]).any() for earlier, later in pairwise(seen) for n in later)
    assert all((mask.view(len(mask), -1, 8).sum(-1) == 2).all() for mask in seen[-1].values())


@pytest.mark.method("P-17")
def test_banks_rank_by_what_they_are_told(model):
    lot = {m.name: torch.rand(m.weight.shape) for m in matrices(model)}
    asked = []

    def score(model):
        asked.append(model)
        return lot

    hook = blocks.iterative_banks(4, [3, 2], [0, 1], score=score)
    hook(0, model, None)
    hook(1, model, None)
    for name, mask in held_masks(model).items():
        assert torch.equal(mask, blocks.bank_mask(lot[name], 4, 2))  # what was removed first would have been removed now, too
    assert len(asked) == 2


@pytest.mark.method("P-17")
def test_what_a_round_removed_stays_removed_whatever_its_score(model):
    first = {m.name: torch.rand(m.weight.shape) for m in matrices(model)}
    scores = iter([first, {name: -score for name, score in first.items()}])
    hook = blocks.iterative_banks(4, [3, 2], [0, 1], score=lambda model: next(scores))
    hook(0, model, None)
    before = held_masks(model)
    hook(1, model, None)
    assert not any((mask & ~before[name]).any() for name, mask in held_masks(model).items())


@pytest.mark.method("P-17")
def test_the_default_is_two_of_four_by_size(model):
    masks = blocks.bank_balanced_masks(model)
    for m in matrices(model):
        assert torch.equal(masks[m.name], blocks.bank_mask(m.weight.abs(), 4, 2))
    assert set(masks) == {m.name for m in matrices(model, ENCODER)}


@pytest.mark.method("P-17")
def test_removed_weights_stay_removed_in_banks(model):
    first = blocks.bank_balanced_masks(model, 4, 2)
    hold_masks(model, first)
    assert not any((mask & ~first[name]).any() for name, mask in blocks.bank_balanced_masks(model, 8, 2).items())


@pytest.mark.method("P-15")
def test_a_removed_block_stays_removed_whatever_lies_under_its_mask(model):
    hook = blocks.block_pruning(0.5, RAMP, (2, 2))
    hook(2, model, None)
    hook(4, model, None)
    before = held_masks(model)
    assert sparsity_of(before) > 0
    with torch.no_grad():
        for m in matrices(model):
            dense_weight(m)[~before[m.name]] = 9.0
    for step in (6, 8):
        hook(step, model, None)
        assert not any((mask & ~before[name]).any() for name, mask in held_masks(model).items())
