"""Sinkhorn attention, SortCut and the mixture against masked dense attention and loops; balancing against its laws."""

import copy
import itertools

import fresh
import numpy as np
import pytest
import torch
from made import check_no_square
from scipy.optimize import linear_sum_assignment
from small_task import task_of
from torch import nn

from utils import artifacts, contract, costs, profiles, training
from utils.parts import sorting
from utils.parts.sorting import SinkhornAttention, SinkhornMixture, SortCutAttention, SortingNetwork, sinkhorn
from utils.subquadratic.sorting import (
    balance_error,
    causal_sinkhorn,
    permutation_entropy,
    sinkhorn_mixture,
    sinkhorn_transformer,
    soft_permutation,
    sortcut,
    sorted_pattern,
)

INPUTS = ("input_ids", "attention_mask")
KINDS = {"L-07": SinkhornAttention, "L-08": SortCutAttention, "L-09": SinkhornMixture}


def make(kind: type = SinkhornAttention, **options) -> SinkhornAttention:
    """Hidden 32, 4 heads; queries and keys long enough for softmaxes that are far from uniform."""
    part = kind(32, 4, **{"max_blocks": 64, **options}).eval()
    for project in (part.query, part.key):
        nn.init.normal_(project.weight, std=0.4)
    return part


def run(part: nn.Module, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
    return part(x, text)[0]


def dense(part: nn.Module, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Dense attention with a mask (heads, length, length) or broadcast to it; states (length, hidden)."""
    q, k, v = (project(x).unflatten(-1, (4, -1)).transpose(0, 1) for project in (part.query, part.key, part.value))
    weights = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def fixed(part: nn.Module, matrix: torch.Tensor) -> nn.Module:
    """The part with that permutation (blocks, blocks), whatever the text."""
    part.permutation = lambda q, k, text: matrix.expand(*q.shape[:2], -1, -1)
    return part


def same_block(length: int, block: int) -> torch.Tensor:
    number = torch.arange(length) // block
    return number[:, None] == number


# --- the contract ---------------------------------------------------------------------------------------------------

CHANGES = {
    "sinkhorn": lambda model: sinkhorn_transformer(model, block=4),
    "means": lambda model: sinkhorn_transformer(model, block=3, sorter="means", iterations=3, temperature=0.5),
    "sortcut": lambda model: sortcut(model, 2, 4),
    "cut means": lambda model: sortcut(model, 1, 3, sorter="means"),
    "mixture": lambda model: sinkhorn_mixture(model, 4),
    "unsorted": lambda model: sinkhorn_transformer(model, block=4, sorter="none"),
    "unsorted, cut": lambda model: sortcut(model, 1, 3, sorter="none"),
}


@pytest.mark.method("L-07", "L-08", "L-09")
def test_every_model_comes_back_in_a_fresh_process(tiny, tmp_path):
    for name, change in CHANGES.items():
        model = copy.deepcopy(tiny)
        change(model)
        artifacts.save(model, tmp_path / f"{name}.safetensors")
        contract.write(tmp_path / f"{name}.safetensors", model, 9)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method("L-07", "L-08", "L-09")
@pytest.mark.parametrize("name", CHANGES)
def test_closed_form_is_what_the_counter_sees(name, tiny):
    CHANGES[name](tiny)
    for length in (1, 5, 24):
        assert costs.macs(tiny, length, 2) == costs.measured_macs(tiny, length, 2)


@pytest.mark.method("L-07", "L-08", "L-09")
@pytest.mark.parametrize("kind", KINDS.values())
def test_training_has_noise_and_reaches_every_weight(kind, tiny, batch):
    sinkhorn_transformer(tiny, kind, block=2)
    inputs = {name: batch[name] for name in INPUTS}
    assert torch.equal(tiny(**inputs).logits, tiny(**inputs).logits)
    part, x = tiny.bert.encoder.layer[0].attention.self, torch.randn(1, 9, 32)
    part.train()
    assert not torch.allclose(soft_permutation(part, x), soft_permutation(part, x), atol=1e-2)
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    log = training.train(tiny, task_of(batch), profiles.get("smoke"), steps=2, learning_rate=1e-2)
    still = {name for name, p in tiny.named_parameters() if torch.equal(p, before[name]) and "embeddings." not in name}
    assert np.isfinite(log.losses).all() and still == set()


@pytest.mark.method("L-07", "L-08", "L-09")
@pytest.mark.parametrize("kind", KINDS.values())
def test_bfloat16_is_near(kind):
    part, x = make(kind, block=4), torch.randn(2, 15, 32)
    text = (torch.arange(15) < torch.tensor([15, 9])[:, None]).long()
    exact = run(part, x, text)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(part, x, text).float(), exact, atol=0.1, rtol=0.1)
    assert torch.isfinite(run(part.bfloat16(), x.bfloat16(), text)).all()


@pytest.mark.method("L-07", "L-08")
def test_what_makes_no_attention_is_refused(tiny):
    refused = [({"block": 0}, "at least 1"), ({"iterations": 0}, "at least 1"), ({"temperature": 0.0}, "positive"),
               ({"sorter": "quick"}, "one of network, means"), ({"max_blocks": 0}, "max_blocks must be")]  # fmt: skip
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            sinkhorn_transformer(tiny, **options)
    with pytest.raises(ValueError, match="kept must be at least 1"):
        sortcut(tiny, 0)
    part = make(block=4, max_blocks=2)
    assert run(part, torch.randn(1, 8, 32)).shape == (1, 8, 32)
    with pytest.raises(ValueError, match="knows 2 places, a text has 3 blocks"):
        run(part, torch.randn(1, 9, 32))
    assert run(make(block=4, max_blocks=2, sorter="means"), torch.randn(1, 90, 32)).shape == (1, 90, 32)


# --- no length x length ---------------------------------------------------------------------------------------------


@pytest.mark.method("L-07", "L-08")
@pytest.mark.parametrize("kind, sorter", itertools.product([SinkhornAttention, SortCutAttention], sorting.SORTERS))
def test_no_tensor_grows_with_the_square_of_the_length(kind, sorter):
    check_no_square(make(kind, block=16, sorter=sorter))  # 64 blocks at most


# --- L-07 balancing -------------------------------------------------------------------------------------------------


@pytest.mark.method("L-07")
def test_rows_and_columns_of_a_balanced_matrix_sum_to_one():
    scores = 2 * torch.randn(3, 4, 9, 9)
    errors = [balance_error(sinkhorn(scores, iterations)) for iterations in (1, 4, 16, 200)]
    assert sorted(errors, reverse=True) == errors and errors[0] > 0.1 and errors[-1] < 1e-5
    torch.testing.assert_close(sinkhorn(scores, 1).sum(-1), torch.ones(3, 4, 9))  # rows last
    assert balance_error(torch.tensor([[0.5, 0.4], [0.5, 0.5]])) == pytest.approx(0.1)  # what is missing counts, too
    one = scores.exp() / scores.exp().sum(-2, keepdim=True)
    torch.testing.assert_close(sinkhorn(scores, 1), one / one.sum(-1, keepdim=True))


@pytest.mark.method("L-07")
def test_balancing_scales_rows_and_columns_and_nothing_else():
    scores = torch.randn(6, 6, dtype=torch.double)
    balanced = sinkhorn(scores, 500)
    scaled = scores + torch.randn(6, 1, dtype=torch.double) + torch.randn(6, dtype=torch.double)
    torch.testing.assert_close(sinkhorn(scaled, 500), balanced)
    left = balanced.log() - scores  # a row's term plus a column's
    torch.testing.assert_close(left - left[:1] - left[:, :1] + left[0, 0], torch.zeros(6, 6, dtype=torch.double))


@pytest.mark.method("L-07")
def test_cold_permutations_are_best_assignments_and_hot_ones_uniform():
    scores = torch.randn(5, 8, 8, dtype=torch.double)
    cold = sinkhorn(scores / 0.01, 3000)
    for matrix, given in zip(cold, scores, strict=True):
        rows, columns = linear_sum_assignment(given.numpy(), maximize=True)
        assert matrix[rows, columns].min() > 0.5
    assert permutation_entropy(cold) < 0.2 and permutation_entropy(sinkhorn(scores / 1000, 7)) > 0.999
    assert permutation_entropy(torch.eye(4)) == 0 and permutation_entropy(torch.ones(1, 1)) == 0
    assert permutation_entropy(torch.full((4, 4), 0.25)) == pytest.approx(1)


@pytest.mark.method("L-07")
def test_blocks_of_text_are_balanced_among_themselves():
    scores, real = torch.randn(2, 3, 6, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()[:, None]
    balanced = sinkhorn(scores.requires_grad_(), 50, real)
    torch.testing.assert_close(balanced[0, :, :4, :4], sinkhorn(scores[0, :, :4, :4], 50))
    for row, count in enumerate((4, 1)):
        assert torch.equal(balanced[row, :, count:, count:], torch.eye(6 - count).expand(3, -1, -1))
    balanced.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.method("L-07")
def test_noise_is_gumbels():
    noise = sorting.gumbel(torch.empty(200_000))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02) and noise.std().item() == pytest.approx(1.2825, abs=0.02)
    drawn = (torch.tensor([0.0, 1.0, 2.0]) + sorting.gumbel(torch.empty(100_000, 3))).argmax(-1).bincount() / 100_000
    torch.testing.assert_close(drawn, torch.tensor([0.0, 1.0, 2.0]).softmax(-1), atol=0.01, rtol=0)


@pytest.mark.method("L-07")
def test_a_sorting_network_scores_blocks_by_themselves():
    network, means = SortingNetwork(4, 8, 6), torch.randn(2, 4, 5, 8)
    nn.init.normal_(network.inner_bias)
    scores = network(means)
    for b, h, block in itertools.product(range(2), range(4), range(5)):
        hidden = torch.relu(network.inner[h].T @ means[b, h, block] + network.inner_bias[h, 0])
        places = network.outer[h].T @ hidden
        torch.testing.assert_close(scores[b, h, :, block], places[:5])


@pytest.mark.method("L-07")
def test_means_score_a_block_by_the_queries_at_its_place():
    part, x = make(block=4, sorter="means", iterations=9, temperature=0.3), torch.randn(10, 32)
    q, k = (project(x).unflatten(-1, (4, 8)) for project in (part.query, part.key))
    scores = torch.zeros(4, 3, 3)
    for h, place, block in itertools.product(range(4), range(3), range(3)):
        mean_q, mean_k = (y[4 * number : 4 * number + 4, h].mean(0) for y, number in ((q, place), (k, block)))
        scores[h, place, block] = mean_q @ mean_k / 8**0.5
    torch.testing.assert_close(soft_permutation(part, x[None])[0], sinkhorn(scores / 0.3, 9), atol=1e-5, rtol=1e-4)


# --- L-07 attention -------------------------------------------------------------------------------------------------


@pytest.mark.method("L-07")
@pytest.mark.parametrize("length, block", [(12, 4), (10, 4), (5, 1), (9, 16)])
def test_the_identity_gives_local_attention(length, block):
    x, blocks = torch.randn(length, 32), -(-length // block)
    part = fixed(make(block=block), torch.eye(blocks))
    torch.testing.assert_close(run(part, x[None])[0], dense(part, x, same_block(length, block)), atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-07", "L-08")
def test_where_nothing_is_sorted_blocks_stay_where_they_are():
    x, number = torch.randn(10, 32), torch.arange(10) // 4
    local, cut = make(block=4, sorter="none"), make(SortCutAttention, block=4, kept=2, sorter="none")
    torch.testing.assert_close(run(local, x[None])[0], dense(local, x, same_block(10, 4)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(cut, x[None])[0], dense(cut, x, (number < 2).expand(10, -1)), atol=1e-5, rtol=1e-4)
    assert not hasattr(local, "network") and torch.equal(soft_permutation(local.train(), x[None])[0, 0], torch.eye(3))


@pytest.mark.method("L-07")
def test_one_block_is_dense_attention():
    part, x = make(block=16), torch.randn(13, 32)
    torch.testing.assert_close(run(part, x[None])[0], dense(part, x, torch.ones(13, 13).bool()), atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-07")
def test_a_hard_permutation_adds_the_block_that_it_brings():
    order, x = torch.tensor([2, 0, 1, 3]), torch.randn(15, 32)
    part = fixed(make(block=4), torch.eye(4)[order])
    number = torch.arange(15) // 4
    brought = order[number][:, None] == number
    seen = same_block(15, 4) | brought
    assert seen[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]  # place 0 holds block 2
    fourth = same_block(15, 4) & (number == 3)  # a block that comes to its own place counts twice, which changes no softmax
    assert (seen | fourth).equal(seen)
    torch.testing.assert_close(run(part, x[None])[0], dense(part, x, seen), atol=1e-5, rtol=1e-4)
    assert torch.equal(sorted_pattern(part, x), seen.expand(4, -1, -1))


def by_loops(part: nn.Module, x: torch.Tensor, text: torch.Tensor, R: torch.Tensor, places, own: bool) -> torch.Tensor:
    """One text (length, hidden) with a soft permutation (heads, places, blocks): every softmax over a list of keys."""
    block, length = part.block, len(x)
    q, k, v = (project(x).unflatten(-1, (4, -1)) for project in (part.query, part.key, part.value))
    out = torch.zeros(length, 4, 8)
    for i, h in itertools.product(range(length), range(4)):
        keys, values, weights = [], [], []
        if own:
            for j in range(i // block * block, min(length, i // block * block + block)):
                keys, values, weights = [*keys, k[j, h]], [*values, v[j, h]], [*weights, float(text[j])]
        for place, t in itertools.product(places(i // block), range(block)):
            js = [j for j in range(t, length, block) if text[j]]
            share = sum(R[h, place, j // block] for j in js)
            if share > 0:
                keys.append(sum(R[h, place, j // block] * k[j, h] for j in js) / share)
                values.append(sum(R[h, place, j // block] * v[j, h] for j in js) / share)
                weights.append(float(share))
        scores = torch.stack(keys) @ q[i, h] / 8**0.5 + torch.tensor(weights).log()
        out[i, h] = scores.softmax(0) @ torch.stack(values)
    return out.flatten(1)


@pytest.mark.method("L-07", "L-08", "L-09")
@pytest.mark.parametrize("kind, sorter", itertools.product(KINDS.values(), ("network", "means")))
def test_soft_permutations_with_padding_are_a_loop_over_slots(kind, sorter):
    part, x = make(kind, block=3, sorter=sorter, iterations=4), torch.randn(1, 11, 32)
    text = torch.ones(1, 11, dtype=torch.bool)
    text[0, 7:] = False  # blocks of 3, 3 and 1 token, and one without any
    R = soft_permutation(part, x, text)[0]
    assert R[:, :3, 3].eq(0).all() and R[:, :3, :3].min() > 1e-6
    places = (lambda own: range(2)) if kind is SortCutAttention else lambda own: [own]
    expected = by_loops(part, x[0], text[0], R, places, kind is not SortCutAttention)
    if kind is SinkhornMixture:
        expected = (expected + dense(part, x[0], text)) / 2
    torch.testing.assert_close(run(part, x, text.long())[0, :7], expected[:7], atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-07")
def test_a_slot_counts_by_the_weight_of_its_text_and_an_empty_one_not_at_all():
    R, text = torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([[[1, 1, 1], [1, 0, 0]]]).bool()
    k = torch.randn(1, 4, 2, 3, 8)
    keys, _, bias = sorting.sort_blocks(R.expand(1, 4, -1, -1), k, k, text)
    torch.testing.assert_close(bias[0, 0], torch.tensor([[1, 0.75, 0.75], [1, 0.25, 0.25]]).log())
    torch.testing.assert_close(
        keys[:, :, :, 1:], k[:, :, :1, 1:].expand(-1, -1, 2, -1, -1)
    )  # only the first block has text there
    torch.testing.assert_close(keys[:, :, 0, 0], 0.75 * k[:, :, 0, 0] + 0.25 * k[:, :, 1, 0])
    text[..., 2] = False
    assert sorting.sort_blocks(R.expand(1, 4, -1, -1), k, k, text)[2][..., 2].eq(sorting.NOTHING).all()


# --- L-08 SortCut -----------------------------------------------------------------------------------------------------


@pytest.mark.method("L-08")
def test_all_blocks_in_any_order_are_dense_attention_and_a_few_a_mask():
    order, x = torch.tensor([2, 0, 3, 1]), torch.randn(15, 32)
    number = torch.arange(15) // 4
    for kept in (1, 2, 4, 9):
        part = fixed(make(SortCutAttention, block=4, kept=kept), torch.eye(4)[order])
        seen = (number == order[:kept, None]).any(0).expand(15, -1)
        torch.testing.assert_close(run(part, x[None])[0], dense(part, x, seen), atol=1e-5, rtol=1e-4)
        assert torch.equal(sorted_pattern(part, x), seen.expand(4, -1, -1))
        assert seen.all() == (kept >= 4)


@pytest.mark.method("L-08")
def test_the_work_to_attend_is_linear_in_the_length():
    core = [make(SortCutAttention, block=64, kept=2).core_macs(length) for length in (8192, 16384)]
    whole = [make(block=64).core_macs(length) for length in (8192, 16384)]
    mixture = [make(SinkhornMixture, block=64).core_macs(length) for length in (8192, 16384)]
    assert core[1] / core[0] < 2.1 < whole[1] / whole[0] < 3.2 < mixture[1] / mixture[0] < 4


# --- L-09 -------------------------------------------------------------------------------------------------------------


def causal_by_loops(scores: torch.Tensor, iterations: int) -> torch.Tensor:
    """Balance step by step, in plain numbers and double precision."""
    n = len(scores)
    S = [[float(scores[p, b].exp()) if b <= p else 0.0 for b in range(n)] for p in range(n)]
    for _ in range(iterations):
        S = [[S[p][b] / sum(S[above][b] for above in range(b, p + 1)) if b <= p else 0.0 for b in range(n)] for p in range(n)]
        S = [[entry / sum(row) for entry in row] for row in S]
    return torch.tensor(S, dtype=torch.double)


@pytest.mark.method("L-09")
def test_causal_balancing_is_a_loop_and_its_rows_sum_to_one():
    scores = 2 * torch.randn(7, 7, dtype=torch.double)
    for iterations in (1, 2, 8):
        found = causal_sinkhorn(scores, iterations)
        torch.testing.assert_close(found, causal_by_loops(scores, iterations))
        assert torch.equal(found, found.tril()) and found[0, 0] == 1
        torch.testing.assert_close(found.sum(-1), torch.ones(7, dtype=torch.double))


@pytest.mark.method("L-09")
def test_no_place_hears_of_a_later_block_which_plain_balancing_lets_it():
    scores = torch.randn(2, 6, 6, requires_grad=True)
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for balance, silent in ((causal_sinkhorn, True),
                            (lambda s, n: sinkhorn(s.masked_fill(future, -torch.inf), n), False)):  # fmt: skip
        heard = torch.autograd.grad(balance(scores, 5)[:, 2, :2].sum(), scores)[0]
        assert torch.isfinite(heard).all() and heard[:, :3].abs().max() > 1e-4
        assert (heard[:, 3:].abs().max() == 0) == silent


@pytest.mark.method("L-09")
def test_a_triangle_that_is_balanced_to_the_end_becomes_the_identity():
    scores, future = torch.randn(5, 5, dtype=torch.double), torch.ones(5, 5, dtype=torch.bool).triu(1)
    for balance, given in ((causal_sinkhorn, scores), (sinkhorn, scores.masked_fill(future, -torch.inf))):
        gaps = [float((balance(given, iterations) - torch.eye(5)).abs().max()) for iterations in (2, 20, 200, 2000)]
        assert sorted(gaps, reverse=True) == gaps and gaps[0] > 0.2 and gaps[-1] < 2e-3


@pytest.mark.method("L-09")
def test_the_mixture_is_half_local_and_half_dense_where_nothing_moves():
    part, x = fixed(make(SinkhornMixture, block=4), torch.eye(3)), torch.randn(11, 32)
    local, everything = dense(part, x, same_block(11, 4)), dense(part, x, torch.ones(11, 11).bool())
    torch.testing.assert_close(run(part, x[None])[0], (local + everything) / 2, atol=1e-5, rtol=1e-4)
    assert sorted_pattern(part, x).all()


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.method("L-07", "L-08", "L-09")
@pytest.mark.parametrize("kind, sorter", itertools.product(KINDS.values(), sorting.SORTERS))
def test_neither_padding_nor_the_rest_of_the_batch_changes_a_text(kind, sorter):
    part, x = make(kind, block=4, sorter=sorter), torch.randn(4, 23, 32)
    text = torch.arange(23) < torch.tensor([23, 7, 1, 12])[:, None]
    together = run(part, x, text.long())
    other = torch.where(text[..., None], x, 100 * torch.randn_like(x))
    torch.testing.assert_close(run(part, other, text.long())[text], together[text], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(together).all() and torch.isfinite(run(part, x, torch.zeros_like(text).long())).all()
    for row, length in enumerate(text.sum(-1)):
        torch.testing.assert_close(run(part, x[row : row + 1, :length])[0], together[row, :length], atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-07", "L-08", "L-09")
@pytest.mark.parametrize("kind", KINDS.values())
def test_a_sentence_has_the_same_logits_alone(kind, tiny, batch):
    sinkhorn_transformer(tiny, kind, block=2)
    together = tiny(**{name: batch[name] for name in INPUTS}).logits
    for row, length in enumerate((9, 7, 5, 9)):
        alone = tiny(**{name: batch[name][row : row + 1, :length] for name in INPUTS}).logits
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-07")
def test_rows_count_in_the_balance_error_too():
    assert balance_error(torch.tensor([[0.5, 0.3], [0.5, 0.7]])) == pytest.approx(0.2)  # columns sum to 1


@pytest.mark.method("L-07")
def test_the_longest_text_has_a_place_for_its_last_short_block(tiny):
    sinkhorn_transformer(tiny, block=7)
    length = tiny.config.max_position_embeddings
    assert length % 7 and tiny.bert.encoder.layer[0].attention.self.options()["max_blocks"] == -(-length // 7)
