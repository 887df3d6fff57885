"""LSH attention against dense attention of shared queries and keys, and against transformers' Reformer."""

import copy
import itertools

import fresh
import numpy as np
import pytest
import torch
from made import check_no_square
from small_task import task_of
from torch import nn
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from utils import artifacts, contract, costs, profiles, training
from utils.parts import hashing
from utils.parts.hashing import LSHAttention
from utils.subquadratic.hashing import (
    hash_recall,
    hashed_pattern,
    input_moments,
    map_overlap,
    meetings,
    queries_of,
    reformer,
    shared_scores,
    window_share,
)

INPUTS = ("input_ids", "attention_mask")


def make(**options) -> LSHAttention:
    """Hidden 32, 4 heads, biases random too; long queries, so that softmaxes are far from uniform."""
    part = LSHAttention(32, 4, **options).eval()
    nn.init.normal_(part.query.weight, std=0.5)
    nn.init.normal_(part.query.bias, std=0.5)
    return part


def run(part: LSHAttention, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
    return part(x, text)[0]


def dense(part: LSHAttention, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Dense attention of shared queries and keys to states (length, hidden); `added` (heads, length, length) to the scores."""
    q, v = queries_of(part, x)[0], part.value(x).unflatten(-1, (4, -1)).transpose(0, 1)
    weights = (q @ nn.functional.normalize(q, dim=-1).mT + added).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


# --- the contract ---------------------------------------------------------------------------------------------------

OPTIONS = {"two": {"chunk": 4}, "one": {"chunk": 4, "rounds": 1}, "fixed": {"chunk": 3, "buckets": 4, "count_once": False},
           "many": {"chunk": 1, "rounds": 3, "start": "mean"}, "lots": {"chunk": 4, "by_lot": True}}  # fmt: skip


@pytest.mark.method("L-04")
def test_every_model_comes_back_in_a_fresh_process(tiny, tmp_path):
    for name, options in OPTIONS.items():
        model = copy.deepcopy(tiny)
        reformer(model, **options)
        artifacts.save(model, tmp_path / f"{name}.safetensors")
        contract.write(tmp_path / f"{name}.safetensors", model, 9)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method("L-04")
@pytest.mark.parametrize("name", OPTIONS)
def test_closed_form_is_what_the_counter_sees(name, tiny):
    reformer(tiny, **OPTIONS[name])
    for length in (1, 5, 24, 150):  # 150 in chunks of 1: two hashes
        assert costs.macs(tiny, length, 2) == costs.measured_macs(tiny, length, 2)


@pytest.mark.method("L-04")
def test_one_projection_is_stored_for_two(tiny, tmp_path):
    before, parameters = artifacts.save(tiny, tmp_path / "dense")["stored_bytes"], costs.parameter_counts(tiny)["parameters"]
    reformer(tiny)
    assert parameters - costs.parameter_counts(tiny)["parameters"] == 2 * (32 * 32 + 32)
    assert before - artifacts.save(tiny, tmp_path / "shared")["stored_bytes"] == pytest.approx(8 * (32 * 32 + 32), abs=2500)


@pytest.mark.method("L-04")
def test_training_draws_new_rotations_and_reaches_every_weight(tiny, batch):
    reformer(tiny, chunk=2)
    inputs = {name: batch[name] for name in INPUTS}
    assert torch.equal(tiny(**inputs).logits, tiny(**inputs).logits)
    part, x = tiny.bert.encoder.layer[0].attention.self, torch.randn(1, 40, 32)
    q, text = queries_of(part, x[0]), torch.ones(1, 40, dtype=torch.bool)
    assert all(torch.equal(a, b) for a, b in zip(part.hash(q, text), part.hash(q, text), strict=True))
    part.train()
    assert not torch.equal(torch.stack(part.hash(q, text)), torch.stack(part.hash(q, text)))
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    log = training.train(tiny, task_of(batch), profiles.get("smoke"), steps=2, learning_rate=1e-2)
    still = [name for name, p in tiny.named_parameters() if torch.equal(p, before[name]) and "embeddings." not in name]
    assert np.isfinite(log.losses).all() and still == []


@pytest.mark.method("L-04")
def test_bfloat16_is_near():
    part, x = make(chunk=16, rounds=1), torch.randn(2, 16, 32)
    exact = run(part, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(part, x).float(), exact, atol=0.1, rtol=0.1)
    assert torch.isfinite(run(make(chunk=3).bfloat16(), x.bfloat16())).all()


@pytest.mark.method("L-04")
def test_what_makes_no_attention_is_refused(tiny):
    for options, message in (({"chunk": 0}, "at least 1"), ({"rounds": 0}, "at least 1"), ({"buckets": 6}, "power of two"),
                             ({"start": "middle"}, "start must be one of"), ({"batches": []}, "no calibration")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            reformer(tiny, **options)


# --- no length x length ---------------------------------------------------------------------------------------------


@pytest.mark.method("L-04")
def test_no_tensor_grows_with_the_square_of_the_length():
    check_no_square(make(chunk=8, rounds=2))


# --- dense attention at the limits, and by the pattern ----------------------------------------------------------------


@pytest.mark.method("L-04")
def test_one_chunk_is_dense_attention_to_all_others():
    x, padded = torch.randn(11, 32), torch.randn(1, 14, 32)
    padded[0, :11], text = x, (torch.arange(14) < 11)[None]
    for rounds, chunk in ((1, 11), (3, 64)):
        part = make(chunk=chunk, rounds=rounds)
        expected = dense(part, x, torch.eye(11) * -1e5)
        torch.testing.assert_close(run(part, x[None])[0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run(part, padded, text.long())[0, :11], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.method("L-04")
def test_many_rounds_are_dense_attention_once_every_pair_has_met():
    part, x = make(chunk=4, rounds=100), torch.randn(21, 32)
    assert hashed_pattern(part, x).sum() == 4 * 21 * 20
    torch.testing.assert_close(run(part, x[None])[0], dense(part, x, torch.eye(21) * -1e5), atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-04")
@pytest.mark.parametrize("rounds, count_once", [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize("chunk, length", [(4, 20), (4, 22), (1, 5), (7, 30)])
def test_rounds_are_dense_attention_with_the_mask_of_what_they_see(chunk, length, rounds, count_once):
    part, x = make(chunk=chunk, rounds=rounds, count_once=count_once), torch.randn(length, 32)
    times = meetings(part, x).float()
    added = (times > 0).float().log() if count_once else times.log()  # -inf for what never meets
    expected = dense(part, x, added - 1e5 * torch.eye(length))
    torch.testing.assert_close(run(part, x[None])[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-04")
def test_a_pattern_is_what_a_loop_over_sorted_tokens_sees():
    part, x, chunk = make(chunk=3, rounds=2), torch.randn(10, 32), 3
    buckets = part.hash(queries_of(part, x), torch.ones(1, 10, dtype=torch.bool))
    seen = torch.zeros(4, 10, 10, dtype=torch.bool)
    for one, head in itertools.product(buckets, range(4)):
        order = sorted(range(10), key=lambda token: (int(one[0, head, token]), token))
        for i, j in itertools.product(range(10), range(10)):
            if i // chunk - j // chunk in (0, 1) and i != j:
                seen[head, order[i], order[j]] = True
    assert torch.equal(hashed_pattern(part, x), seen)


@pytest.mark.method("L-04")
def test_a_token_attends_to_itself_only_where_there_is_no_other():
    alone = make(chunk=1, rounds=1)
    x = torch.randn(1, 6, 32)
    text = torch.tensor([[1, 1, 0, 0, 0, 0]])
    out, values = run(alone, x, text)[0], alone.value(x)[0]
    heads = lambda y: y.unflatten(-1, (4, 8))  # noqa: E731
    first, second = heads(out[0]), heads(out[1])  # one of the two stands first in the sort, and has no chunk before it
    own, other = (torch.isclose(first, heads(v), atol=1e-5).all(-1) for v in (values[0], values[1]))
    assert (own ^ other).all()
    torch.testing.assert_close(second, heads(torch.where(own[:, None], heads(values[0]), heads(values[1])).flatten()))
    assert hashed_pattern(alone, x[0, :1]).all()


# --- transformers' Reformer -------------------------------------------------------------------------------------------


@pytest.mark.method("L-04")
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("chunk", [4, 8, 32])
def test_transformers_reformer_computes_the_same(rounds, chunk):
    """With a chunk of padding behind the text, at which its first chunk looks instead of at nothing."""
    config = ReformerConfig(
        hidden_size=32, num_attention_heads=4, attention_head_size=8, attn_layers=["lsh"], num_hashes=rounds, num_buckets=8,
        lsh_attn_chunk_length=chunk, is_decoder=False, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs, ours = LSHSelfAttention(config).eval(), make(chunk=chunk, rounds=rounds, buckets=8, count_once=False)
    nn.init.zeros_(ours.query.bias)
    nn.init.zeros_(ours.value.bias)
    theirs.query_key.load_state_dict({"weight": ours.query.weight})
    theirs.value.load_state_dict({"weight": ours.value.weight})
    x, text = torch.randn(2, 32, 32), torch.ones(2, 32, dtype=torch.long)
    text[0, 24:], text[1, 19:] = 0, 0
    buckets = ours.hash(torch.cat([queries_of(ours, row) for row in x]), text.bool())
    numbered = torch.stack([one + i * 10_000 for i, one in enumerate(buckets)], 2)
    expected = theirs(x, attention_mask=text, num_hashes=rounds, buckets=numbered).hidden_states
    torch.testing.assert_close(run(ours, x, text)[text.bool()], expected[text.bool()], atol=1e-5, rtol=1e-4)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.method("L-04")
@pytest.mark.parametrize(
    "options", [{"chunk": 4}, {"chunk": 2, "rounds": 3}, {"chunk": 1, "rounds": 1}, {"chunk": 64}, {"chunk": 4, "by_lot": True}]
)
def test_neither_padding_nor_the_rest_of_the_batch_changes_a_text(options):
    part, x = make(**options), torch.randn(4, 150, 32)
    text = torch.arange(150) < torch.tensor([150, 7, 1, 40])[:, None]
    together = run(part, x, text.long())
    other = torch.where(text[..., None], x, 100 * torch.randn_like(x))
    torch.testing.assert_close(run(part, other, text.long())[text], together[text], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(together).all()
    for row, length in enumerate(text.sum(-1)):
        torch.testing.assert_close(run(part, x[row : row + 1, :length])[0], together[row, :length], atol=1e-5, rtol=1e-4)
    empty = run(part, x, torch.zeros_like(text).long())
    assert torch.isfinite(empty).all()


@pytest.mark.method("L-04")
def test_a_sentence_has_the_same_logits_alone(tiny, batch):
    reformer(tiny, chunk=2)
    together = tiny(**{name: batch[name] for name in INPUTS}).logits
    for row, length in enumerate((9, 7, 5, 9)):
        alone = tiny(**{name: batch[name][row : row + 1, :length] for name in INPUTS}).logits
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)


# --- the hash ---------------------------------------------------------------------------------------------------------


@pytest.mark.method("L-04")
def test_a_bucket_is_the_nearest_direction_of_a_rotation():
    x, rotation = torch.randn(2, 3, 50, 8), torch.randn(3, 8, 16)
    found = hashing.cross_polytope(x, rotation, torch.tensor([5, 3]))
    for row, columns in enumerate((16, 4)):
        rotated = x[row] @ rotation[..., :columns]
        number = torch.cat([rotated, -rotated], -1).argmax(-1)
        assert torch.equal(found[row], 2 * (number % columns) + (number >= columns))
    none = hashing.cross_polytope(x, rotation, torch.tensor([0, 1]))
    assert none[0].max() == 0 and set(none[1].flatten().tolist()) == {0, 1}


@pytest.mark.method("L-04")
def test_rotations_are_those_of_the_seed():
    first, same, other = (make(seed=seed).rotations for seed in (3, 3, 4))
    assert torch.equal(first, same) and not torch.allclose(first, other)
    assert "rotations" not in make().state_dict()  # a file says the seed


@pytest.mark.method("L-04")
def test_buckets_follow_the_length_and_their_hashes_stay_small():
    lengths = torch.tensor([1, 32, 33, 64, 65, 128, 512, 2048, 2049, 16384, 10**7])
    assert hashing.bucket_bits(lengths, 64).tolist() == [1, 1, 1, 1, 2, 2, 4, 6, 7, 9, 12]
    assert [hashing.hash_columns(bits) for bits in (1, 4, 6, 7, 9, 12)] == [(1, 0), (8, 0), (32, 0), (32, 4), (32, 8), (32, 32)]
    x, rotations = torch.randn(1, 2, 30_000, 8), [torch.randn(2, 8, 32), torch.randn(2, 8, 4)]
    buckets = hashing.lsh_buckets(x, rotations, torch.tensor([7]))
    assert len(buckets.unique()) == 128 and buckets.min() == 0 and buckets.max() == 127


@pytest.mark.method("L-04")
def test_the_hash_finds_more_of_the_highest_scores_than_windows_at_random():
    part, centres = make(chunk=8, rounds=2), torch.randn(16, 32)
    x = (centres[:, None] + 0.3 * torch.randn(16, 8, 32)).flatten(0, 1)[torch.randperm(128)]
    found, seen = hash_recall(part, x, top=4)
    assert found > 2.5 * seen and 0.1 < seen < 0.25
    assert hash_recall(make(chunk=128), x) == (1.0, 1.0)
    one = make(chunk=8, rounds=1)
    for length in (128, 60, 8, 3):
        assert hash_recall(one, x[:length], top=1)[1] == pytest.approx(window_share(length, 8))


@pytest.mark.method("L-04")
def test_buckets_by_lot_know_nothing_and_find_what_chance_finds():
    part, x, text = make(chunk=8, rounds=2, by_lot=True), torch.randn(2, 1, 4, 512, 8), torch.ones(1, 512, dtype=torch.bool)
    first, other = (torch.stack(part.hash(q, text)) for q in x)
    assert torch.equal(first, other) and not torch.equal(first[0], first[1]) and not torch.equal(first[:, :, 0], first[:, :, 1])
    shares = first.flatten().bincount(minlength=128) / first.numel()
    assert len(shares) == 128 and shares.max() < 3 / 128 and shares.min() > 0
    found, seen = hash_recall(part, torch.randn(512, 32))
    assert found == pytest.approx(seen, abs=0.01) and seen == pytest.approx(1 - (1 - window_share(512, 8)) ** 2, abs=1e-3)
    assert not torch.equal(torch.stack(make(chunk=8, by_lot=True, seed=1).hash(x[0], text)), first)
    part.train()
    assert not torch.equal(torch.stack(part.hash(x[0], text)), first)


# --- one projection out of two ------------------------------------------------------------------------------------------


def forms(query: nn.Linear, key: nn.Linear) -> torch.Tensor:
    """The scores' matrices per head, of inputs with a 1 appended: (heads, hidden + 1, hidden + 1)."""
    q, k = (torch.cat([p.weight, p.bias[:, None]], 1).double().unflatten(0, (4, -1)) for p in (query, key))
    return q.mT @ k / 8**0.5


def projections(count: int = 2) -> list[nn.Linear]:
    made = [nn.Linear(32, 32).requires_grad_(False) for _ in range(count)]
    for one in made:
        nn.init.normal_(one.bias)
    return made


@pytest.mark.method("L-04")
def test_nearest_is_the_symmetric_part_without_its_negative_eigenvalues():
    query, key = projections()
    A = torch.randn(33, 33, dtype=torch.double)
    for moment in (None, A @ A.T / 33):
        weight, bias = hashing.shared_projection(query, key, 4, "nearest", moment)
        shared = torch.cat([weight, bias[:, None]], 1).double().unflatten(0, (4, -1))
        white = np.eye(33) if moment is None else np.linalg.cholesky(moment.numpy())
        for head, form in enumerate(forms(query, key).detach().numpy()):
            form = white.T @ form @ white
            values, vectors = np.linalg.eigh((form + form.T) / 2)
            assert (values > 1e-9).sum() == 8  # as many as the head has dimensions
            best = vectors * values.clip(0) @ vectors.T
            found = white.T @ (shared[head].T @ shared[head]).detach().numpy() @ white
            np.testing.assert_allclose(found, best * np.trace(best), atol=1e-4, rtol=1e-4)  # times the mean square of |W x|


@pytest.mark.method("L-04")
def test_turning_a_heads_queries_changes_the_mean_and_not_the_nearest():
    query, key = projections()
    turned = copy.deepcopy(query), copy.deepcopy(key)
    turn = torch.block_diag(*torch.randn(4, 8, 8))
    with torch.no_grad():
        for given, one, by in zip((query, key), turned, (turn, torch.linalg.inv(turn).T), strict=True):
            one.weight.copy_(by @ given.weight)
            one.bias.copy_(by @ given.bias)
    torch.testing.assert_close(forms(*turned), forms(query, key), atol=1e-4, rtol=1e-3)  # the same scores
    for start, same in (("nearest", True), ("mean", False)):
        (a, _), (b, _) = (hashing.shared_projection(*pair, 4, start) for pair in ((query, key), turned))
        a, b = (w.unflatten(0, (4, -1)) for w in (a, b))
        assert torch.allclose(a.mT @ a, b.mT @ b, atol=1e-3) == same


@pytest.mark.method("L-04")
def test_where_queries_and_keys_are_one_every_start_keeps_the_scores():
    (query,) = projections(1)
    for start in hashing.STARTS:
        weight, bias = hashing.shared_projection(query, query, 4, start)
        shared = torch.cat([weight, bias[:, None]], 1).double().unflatten(0, (4, -1))
        form = forms(query, query)
        size = form.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        torch.testing.assert_close(shared.mT @ shared, form * size, atol=1e-3, rtol=1e-3)


@pytest.mark.method("L-04")
def test_scores_of_shared_queries_have_the_size_of_the_trained_ones():
    query, key = projections()
    x = torch.randn(4000, 32)
    nn.init.normal_(query.weight, std=1.0)
    attention = nn.Module()
    attention.query, attention.key, attention.value = query, query, key
    attention.num_attention_heads, attention.all_head_size, attention.training = 4, 32, False
    part = LSHAttention.from_attention(attention, "mean").requires_grad_(False)
    shared = shared_scores(queries_of(part, x[:300])[0])
    q = query(x[:300]).unflatten(-1, (4, -1)).transpose(0, 1)
    trained = (q @ q.mT / 8**0.5)[:, ~torch.eye(300, dtype=torch.bool)]
    assert float(shared[shared > -torch.inf].std() / trained.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.method("L-04")
def test_calibration_sees_the_inputs_of_real_tokens(tiny, batch):
    with torch.no_grad():
        states = tiny(**{name: batch[name] for name in INPUTS}, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    for state, moment in zip(states, input_moments(tiny, [batch, batch]), strict=False):
        rows = torch.cat([state[real], torch.ones(int(real.sum()), 1)], 1).double()
        torch.testing.assert_close(moment, rows.T @ rows / len(rows), atol=1e-5, rtol=1e-5)
    plain, seeing = copy.deepcopy(tiny), copy.deepcopy(tiny)
    reformer(plain)
    reformer(seeing, batches=[batch])
    assert not torch.allclose(*(m.bert.encoder.layer[1].attention.self.query.weight for m in (plain, seeing)), atol=1e-3)


@pytest.mark.method("L-04")
def test_overlap_of_maps_with_the_same_scores_is_all_but_what_a_token_gives_itself():
    x, part, attention = torch.randn(12, 32), make().requires_grad_(False), nn.Module()
    q = queries_of(part, x)[0]
    keys = nn.functional.normalize(q, dim=-1) * 8**0.5  # Reformer's
    attention.num_attention_heads, attention.query = 4, part.query
    attention.key = lambda x: keys.transpose(0, 1).flatten(1)
    own = (q @ nn.functional.normalize(q, dim=-1).mT).softmax(-1)
    kept = 1 - own.diagonal(dim1=-2, dim2=-1).mean()
    assert map_overlap(attention, part, x) == pytest.approx(float(kept), abs=1e-5) and 0.1 < kept < 0.9


@pytest.mark.method("L-04")
def test_each_layer_is_calibrated_on_its_own_inputs_and_has_its_own_seed(tiny, batch):
    moments, old = input_moments(tiny, [batch]), [layer.attention.self for layer in tiny.bert.encoder.layer]
    reformer(tiny, batches=[batch])
    for number, (layer, attention) in enumerate(zip(tiny.bert.encoder.layer, old, strict=True)):
        weight, _ = hashing.shared_projection(attention.query, attention.key, 4, "nearest", moments[number])
        torch.testing.assert_close(layer.attention.self.query.weight, weight)
        assert layer.attention.self.seed == number
