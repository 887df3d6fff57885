"""Attention in fixed patterns against dense attention with a mask, transformers' Longformer, loops over pairs, and what is seen
by trial."""

import copy
import math

import fresh
import numpy as np
import pytest
import torch
from small_task import task_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, LongformerConfig, LongformerModel

from utils import artifacts, bert, contract, costs, parts, profiles, training
from utils.parts.patterns import (
    BlockAttention,
    FixedAttention,
    GlobalWindowAttention,
    StridedAttention,
    WindowAttention,
    partner_blocks,
    summary_columns,
)
from utils.parts.self_attention import SelfAttention
from utils.subquadratic import patterns

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}  # fmt: skip


def make_part(name: str) -> SelfAttention:
    """Hidden 32, 4 heads; weights large enough that the softmax is far from uniform."""
    part = {
        "block": lambda: BlockAttention(32, 4, block=10, shifts=[0, 0, 1, 2]),
        "strided": lambda: StridedAttention(32, 4, stride=7, local_heads=2),
        "fixed": lambda: FixedAttention(32, 4, block=8, summaries=2, subblocks=3),
        "window": lambda: WindowAttention(32, 4, window=8, dilations=[1] * 4),
        "dilated": lambda: WindowAttention(32, 4, window=6, dilations=[1, 1, 2, 5]),
        "global": lambda: GlobalWindowAttention(32, 4, window=8, dilations=[1, 1, 1, 3], global_tokens=3),
    }[name]()
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    return part


@pytest.fixture
def dense():
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


PUT = {
    "block": lambda model: patterns.block_attention(model, 3, length=30),
    "strided": lambda model: patterns.strided_attention(model, 7),
    "fixed": lambda model: patterns.fixed_attention(model, 8, 2, 3),
    "window": lambda model: patterns.window_attention(model, 8),
    "dilated": lambda model: patterns.window_attention(model, 6, dilation=[2, 5], dilated_heads=2),
    "global": lambda model: patterns.window_attention(model, 8, dilation=3, dilated_heads=1, global_tokens=3),
}


def put(name: str, model: nn.Module) -> nn.Module:
    """The model with the pattern, whose global tokens no longer see as the others do."""
    PUT[name](model)
    for key, parameter in model.named_parameters():
        if "_global" in key:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


every_pattern = pytest.mark.parametrize("name", PUT)
LENGTHS = (150, 75, 128, 3)  # the texts of a batch: the last one is shorter than any window


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (4, 150, 32), padding included, and the mask (4, 150)."""
    return torch.randn(len(LENGTHS), max(LENGTHS), 32), (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()


def dense_with_mask(part: SelfAttention, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """What a part should make of (1, length, hidden), `seen` (heads, length, length): every score, those unseen at -inf."""

    def attention(suffix: str, seen: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.heads(getattr(part, name + suffix)(hidden)) for name in ("query", "key", "value"))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    found, first = attention("", seen), getattr(part, "global_tokens", 0)
    return torch.cat([attention("_global", torch.ones_like(seen))[:, :first], found[:, first:]], 1) if first else found


# --- equal to dense attention with the mask -------------------------------------------------------------------------


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@every_pattern
def test_looking_at_a_part_changes_none_of_its_weights(name, dense):
    PUT[name](dense)
    part = dense.bert.encoder.layer[0].attention.self
    before = copy.deepcopy(part.state_dict())
    patterns.seen(part, 30)
    assert all(torch.equal(before[key], value) for key, value in part.state_dict().items())


@pytest.mark.method("L-12a")
def test_a_summary_says_what_is_heard_in_the_last_layer(dense, batch):
    attention = patterns.mean_attention(dense, {key: batch[key][:1] for key in ("input_ids", "attention_mask")})
    patterns.window_attention(model := copy.deepcopy(dense), 4)
    assert patterns.summary(model, dense, attention, 60)["heard by [CLS]"] == 1 + 2 * 2


@pytest.mark.method("L-01")
def test_of_an_odd_number_of_heads_the_larger_half_stays_local():
    assert patterns.head_shifts(3, 3) == [0, 0, 1]


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@every_pattern
def test_outputs_are_those_of_dense_attention_with_the_mask_whatever_the_padding(name):
    """Each row alone, without its padding, is the oracle of the row in its batch."""
    part, (hidden, mask) = make_part(name), padded_batch()
    together, _ = part(hidden, mask)
    for row, length in enumerate(LENGTHS):
        expected = dense_with_mask(part, hidden[row : row + 1, :length], patterns.pattern(part, length))
        torch.testing.assert_close(together[row, :length], expected[0], atol=1e-5, rtol=1e-4)
    other = torch.where(mask.bool()[..., None], hidden, 1e3 * torch.randn_like(hidden))
    torch.testing.assert_close(part(other, mask)[0][mask.bool()], together[mask.bool()], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(part(hidden)[0][:1], together[:1])  # no mask: all is text


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@every_pattern
def test_gradients_are_those_of_dense_attention_with_the_mask(name):
    part, hidden = make_part(name), torch.randn(1, 140, 32)
    weights, found = torch.randn(1, 140, 32), []
    for output in (part(hidden)[0], dense_with_mask(part, hidden, patterns.pattern(part, 140))):
        found.append(torch.autograd.grad((output * weights).sum(), list(part.parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@every_pattern
def test_what_is_seen_by_trial_is_the_definition(name, dense):
    part = make_part(name)
    for length in (1, 7, 75, 150):
        assert torch.equal(patterns.seen(part, length), patterns.pattern(part, length))
    model = put(name, dense)
    assert patterns.seen_share(model, 150) == pytest.approx(patterns.expected_share(model, 150), abs=1e-7)
    assert patterns.seen_share(model, 150) < 0.5


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@every_pattern
def test_any_mask_gives_numbers_and_padding_no_gradient(name):
    """Padding in front, a block of padding in the middle, a text without tokens."""
    part, hidden = make_part(name), torch.randn(4, 150, 32, requires_grad=True)
    mask = torch.ones(4, 150, dtype=torch.long)
    mask[0, :70], mask[1, 10:140], mask[2], mask[3, ::2] = 0, 0, 0, 0
    output, _ = part(hidden, mask)
    assert output.isfinite().all()
    output[mask.bool()].square().sum().backward()
    assert hidden.grad.isfinite().all() and (hidden.grad[mask == 0] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in part.parameters())


@pytest.mark.method("L-01")
def test_a_query_whose_partner_holds_padding_only_gets_nothing():
    part, hidden = BlockAttention(32, 4, block=10, shifts=[0, 0, 0, 1]), torch.randn(1, 30, 32)
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[0, 10:20] = 0
    found = part(hidden, mask)[0].unflatten(2, (4, 8))[0, :, 3]
    assert (found[:10] == 0).all() and (found[20:] != 0).all()  # the last block turns around to the first


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@pytest.mark.parametrize("change", [
    pytest.param(lambda model: patterns.block_attention(model, 1, length=9), id="one block"),
    pytest.param(lambda model: patterns.block_attention(model, 2, length=18), id="short text"),
    pytest.param(lambda model: patterns.strided_attention(model, 9, 4), id="stride n"),
    pytest.param(lambda model: patterns.strided_attention(model, 1, 0), id="stride 1"),
    pytest.param(lambda model: patterns.fixed_attention(model, 9, 1, 1), id="block n"),
    pytest.param(lambda model: patterns.fixed_attention(model, 4, 4, 1), id="all summaries"),
    pytest.param(lambda model: patterns.window_attention(model, 16), id="window 2(n-1)"),
    pytest.param(lambda model: patterns.window_attention(model, 2000), id="wide window"),
    pytest.param(lambda model: patterns.window_attention(model, 16, dilation=1, dilated_heads=2), id="dilation 1"),
    pytest.param(lambda model: patterns.window_attention(model, 2, global_tokens=9), id="all global"),
    pytest.param(lambda model: patterns.window_attention(model, 16, global_tokens=2), id="both"),
    pytest.param(lambda model: patterns.window_attention(model, 2, global_tokens=99), id="more than all"),
])  # fmt: skip
def test_at_its_limit_every_pattern_is_dense_attention(change, dense, batch):
    """Global projections included: they begin as the common ones."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = dense(**inputs).logits
    change(dense)
    torch.testing.assert_close(dense(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-12c")
def test_a_global_token_begins_with_its_dense_outputs_and_then_goes_its_own_way(dense):
    hidden, attention = torch.randn(2, 140, 32), dense.bert.encoder.layer[0].attention.self
    expected, _ = attention(hidden)
    part = GlobalWindowAttention.from_attention(attention, window=4, dilations=[1] * 4, global_tokens=2)
    before, _ = part(hidden)
    torch.testing.assert_close(before[:, :2], expected[:, :2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before[:, 2:], expected[:, 2:], atol=0.1)
    nn.init.normal_(part.value_global.weight)
    after, _ = part(hidden)
    assert torch.equal(after[:, 2:], before[:, 2:]) and not torch.allclose(after[:, :2], before[:, :2], atol=0.1)
    assert part.key_global.weight is not part.key.weight


# --- against transformers' Longformer -------------------------------------------------------------------------------


@pytest.mark.method("L-12a", "L-12c")
@pytest.mark.parametrize("global_tokens", [0, 1, 3])
def test_the_model_is_transformers_longformer(global_tokens, dense):
    patterns.window_attention(dense, 8, global_tokens=global_tokens)
    for key, parameter in dense.named_parameters():
        if "_global" in key:
            nn.init.normal_(parameter, std=0.3)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = LongformerConfig(**{name: SIZES[name] for name in names}, attention_window=8, max_position_embeddings=512,
                              type_vocab_size=2, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    longformer = LongformerModel(config).eval()
    missing, unknown = longformer.load_state_dict(dense.bert.state_dict(), strict=False)
    assert not unknown and all("_global" in name for name in missing) and bool(missing) == (global_tokens == 0)
    ids, mask = torch.randint(1, 100, (3, 150)), (torch.arange(150) < torch.tensor([150, 70, 7])[:, None]).long()
    everywhere = (torch.arange(150) < global_tokens).long().expand(3, -1)
    theirs = longformer(ids, mask, global_attention_mask=everywhere, position_ids=torch.arange(150).expand(3, -1))
    ours = dense.bert(ids, mask).last_hidden_state
    torch.testing.assert_close(ours[mask.bool()], theirs.last_hidden_state[mask.bool()], atol=1e-4, rtol=1e-4)


# --- patterns by their definitions ----------------------------------------------------------------------------------


def by_loops(sees, heads: int = 4, length: int = 23) -> torch.Tensor:
    places = range(length)
    return torch.tensor([[[bool(sees(h, i, j)) for j in places] for i in places] for h in range(heads)])


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@pytest.mark.parametrize("name, sees", [
    pytest.param("block", lambda h, i, j: (i // 10 + (0, 0, 1, 2)[h]) % 3 == j // 10),
    pytest.param("strided", lambda h, i, j: abs(i - j) < 7 if h < 2 else (i - j) % 7 == 0),
    pytest.param("fixed", lambda h, i, j: i // 8 == j // 8 or j % 8 in ((6, 7), (4, 5), (2, 3), (6, 7))[h]),
    pytest.param("window", lambda h, i, j: abs(i - j) <= 4),
    pytest.param("dilated", lambda h, i, j: any(j == i + k * (1, 1, 2, 5)[h] for k in range(-3, 4))),
    pytest.param("global", lambda h, i, j: min(i, j) < 3 or any(j == i + k * (1, 1, 1, 3)[h] for k in range(-4, 5))),
])  # fmt: skip
def test_patterns_are_their_definitions(name, sees):
    part = make_part(name)
    assert torch.equal(patterns.pattern(part, 23), by_loops(sees))
    assert torch.equal(patterns.seen(part, 23), by_loops(sees))


@pytest.mark.method("L-01")
def test_blocks_and_heads_of_blockbert(dense):
    assert patterns.head_shifts(12, 2) == [0] * 10 + [1] * 2 and patterns.head_shifts(12, 3) == [0] * 8 + [1, 1, 2, 2]
    assert patterns.head_shifts(12, 1) == [0] * 12 and patterns.head_shifts(12, 8) == [0] * 6 + [1, 2, 3, 4, 5, 6]
    assert patterns.head_shifts(12, 2, 0) == [1] * 12 and patterns.head_shifts(5, 4, 0) == [1, 1, 2, 2, 3]
    filled = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert partner_blocks(filled, 1).tolist() == [[1, 2, 3, 0], [1, 0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    patterns.block_attention(dense, 3)
    assert dense.bert.encoder.layer[1].attention.self.options() == {
        "hidden_size": 32, "num_attention_heads": 4, "block": 171, "shifts": [0, 0, 1, 2]}  # fmt: skip
    for blocks in (2, 3, 4):  # a block sees one block: 1 / n of the pairs
        patterns.block_attention(dense, blocks, length=48)
        assert patterns.seen_share(dense, 48) == pytest.approx(1 / blocks)


@pytest.mark.method("L-02", "L-03", "L-12a")
def test_shares_by_arithmetic(dense):
    n, w = 192, 8
    patterns.window_attention(dense, w)
    assert patterns.seen_share(dense, n) == pytest.approx(((w + 1) * n - w // 2 * (w // 2 + 1)) / n**2)
    patterns.strided_attention(dense, 8)
    assert patterns.seen_share(dense, n) == pytest.approx((15 * n - 7 * 8 + n * n / 8) / 2 / n**2)
    patterns.fixed_attention(dense, 8, 2)
    assert patterns.seen_share(dense, n) == pytest.approx((8 + 23 * 2) / n)
    patterns.window_attention(dense, w, global_tokens=2)
    m = n - 2
    assert patterns.seen_share(dense, n) == pytest.approx((n**2 - m**2 + (w + 1) * m - w // 2 * (w // 2 + 1)) / n**2)


@pytest.mark.method("L-12b")
def test_dilation_by_layer_and_head(dense):
    PUT["dilated"](dense)
    assert [layer.attention.self.dilations for layer in dense.bert.encoder.layer] == [[1, 1, 2, 2], [1, 1, 5, 5]]
    patterns.window_attention(dense, 6, dilation=4)
    assert dense.bert.encoder.layer[0].attention.self.dilations == [4] * 4


@pytest.mark.method("L-03")
def test_summaries_of_heads_are_the_last_places_or_those_before():
    assert summary_columns(5, 8, 2, 3).tolist() == [[6, 7], [4, 5], [2, 3], [6, 7], [4, 5]]


@pytest.mark.method("L-01", "L-02", "L-12a", "L-12c")
def test_what_two_layers_reach(dense):
    n, reach = 60, 3
    patterns.window_attention(dense, 2 * reach)
    band = [((2 * r + 1) * n - r * (r + 1)) / n**2 for r in (reach, 2 * reach)]
    torch.testing.assert_close(patterns.reached(dense, n), torch.tensor(band))
    patterns.strided_attention(dense, 8)
    first, second = patterns.reached(dense, n).tolist()
    assert first < 0.5 and second == 1
    patterns.window_attention(dense, 2, global_tokens=1)
    assert patterns.reached(dense, n)[1] == 1
    patterns.block_attention(dense, 4, length=n, local_heads=3)  # two steps, each of 0 or 1 blocks
    torch.testing.assert_close(patterns.reached(dense, n), torch.tensor([2 / 4, 3 / 4]))
    patterns.block_attention(dense, 4, length=n, local_heads=4)
    torch.testing.assert_close(patterns.reached(dense, n), torch.tensor([1 / 4, 1 / 4]))
    patterns.block_attention(dense, 4, length=n, local_heads=0)  # others' blocks, and the token itself
    torch.testing.assert_close(patterns.reached(dense, n), torch.tensor([3 / 4 + 1 / n, 1]))


# --- what it costs --------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The largest piece of memory that any operation returned, in bytes, and the names of all operations."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *(tensor.untyped_storage().nbytes() for tensor in tensors)])
        self.names.add(func.name())
        return found


def long_part(name: str, length: int) -> SelfAttention:
    """The part with sizes that suit a long text."""
    if name == "block":
        return BlockAttention(32, 4, block=length // 8, shifts=[0, 0, 1, 3])
    if name == "strided":
        return StridedAttention(32, 4, stride=patterns.square_root_block(length), local_heads=2)
    if name == "fixed":
        return FixedAttention(32, 4, block=patterns.square_root_block(length, 2), summaries=2, subblocks=4)
    return make_part(name)


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@every_pattern
def test_no_tensor_is_as_large_as_length_by_length(name):
    """Not even with a byte per pair of one text and head, forwards or backwards; the fused kernel takes every block."""
    largest = []
    for length in (2048, 4096):
        part, mask = long_part(name, length), torch.ones(2, length)
        mask[1, -100:] = 0
        with Watch() as watch:
            part(torch.randn(2, length, 32), mask)[0].square().sum().backward()
        assert watch.largest < length**2
        assert not [one for one in watch.names if "softmax" in one]
        assert "aten::_scaled_dot_product_flash_attention_for_cpu" in watch.names
        largest.append(watch.largest)
    growth = largest[1] / largest[0]
    assert growth <= (2**1.5 * 1.1 if name in ("strided", "fixed") else 2.01)


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@every_pattern
def test_closed_form_is_what_the_counter_sees(name, dense):
    model = put(name, dense)
    for length in (1, 2, 9, 75, 150):
        assert costs.macs(model, length, 2) == costs.measured_macs(model, length, 2)


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
def test_work_grows_as_the_papers_say():
    def exponent(part_of) -> float:
        few, many = (part_of(n).core_macs(n) for n in (4096, 16384))
        return math.log(many / few) / math.log(4)

    assert exponent(lambda n: BlockAttention(32, 4, n // 2, [0, 0, 0, 1])) == 2  # a fixed number of blocks
    assert exponent(lambda n: BlockAttention(32, 4, 512, [0, 0, 0, 1])) == 1  # a fixed size
    assert exponent(lambda n: long_part("strided", n)) == pytest.approx(1.5, abs=0.05)
    assert exponent(lambda n: long_part("fixed", n)) == pytest.approx(1.5, abs=0.05)
    for name in ("window", "dilated", "global"):
        assert exponent(lambda n, name=name: make_part(name)) == pytest.approx(1, abs=0.01)


@pytest.mark.method("L-02", "L-03")
def test_the_square_root_is_the_cheapest_block():
    keys = lambda block, summaries: block + summaries * 4096 / block  # noqa: E731
    for summaries in (1, 4):
        best = min(range(1, 4097), key=lambda block: keys(block, summaries))
        assert patterns.square_root_block(4096, summaries) == best
    assert patterns.square_root_block(1) == 1


# --- in a model -----------------------------------------------------------------------------------------------------


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
def test_every_model_comes_back_in_a_fresh_process(dense, tmp_path):
    for name in PUT:
        model = put(name, copy.deepcopy(dense))
        artifacts.save(model, tmp_path / f"{name}.safetensors")
        contract.write(tmp_path / f"{name}.safetensors", model, 150)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@every_pattern
def test_a_model_keeps_its_weights_trains_and_computes_in_bfloat16(name, dense, batch):
    weights = dense.bert.encoder.layer[1].attention.self.key.weight.clone()
    model, inputs = put(name, dense), {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.bert.encoder.layer[1].attention.self.key.weight, weights)
    exact = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**inputs).logits.float(), exact, atol=0.1, rtol=0.1)
    calls, core = [], type(model.bert.encoder.layer[0].attention.self).core
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.bert.encoder.layer[0].attention.self), "core",
                      lambda self, *args: (calls.append(1), core(self, *args))[1])  # fmt: skip
        log = training.train(model, task_of(batch), profiles.get("smoke"), steps=2, learning_rate=1e-2)
    assert np.isfinite(log.losses).all() and len(calls) == 2 * 2
    still = [key for key, p in model.named_parameters() if torch.equal(p, before[key]) and "embeddings." not in key]
    idle = ["key.bias", "key_global.bias"]  # the softmax cancels a bias of keys
    if name == "global":  # the classifier reads [CLS], and in the last layer a global token sees by its own projections only
        idle += [f"1.attention.self.{which}.bias" for which in ("query", "key", "value")]
    assert [key for key in still if not key.endswith(tuple(idle))] == []


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@every_pattern
def test_attention_kept_is_the_share_that_the_pattern_sees(name, dense, batch):
    model, cut = put(name, copy.deepcopy(dense)), {key: batch[key][:2, :7] for key in ("input_ids", "attention_mask")}
    attention = patterns.mean_attention(dense, cut)
    kept = patterns.attention_kept(model, attention)
    assert kept.shape == (2,) and (kept <= 1 + 1e-6).all() and (kept > 0).all()
    with bert.attention(dense, "eager"):
        maps = dense(cut["input_ids"], cut["attention_mask"], output_attentions=True).attentions
    for layer, found in enumerate(maps):
        torch.testing.assert_close(attention[layer], found.mean(0))
        mask = patterns.pattern(model.bert.encoder.layer[layer].attention.self, 7)
        expected = sum(found[:, h, i, j].mean() for h in range(4) for i in range(7) for j in range(7) if mask[h, i, j]) / 28
        torch.testing.assert_close(kept[layer], expected)
    with pytest.raises(ValueError, match="texts of one length"):
        patterns.mean_attention(dense, batch)


@pytest.mark.method("L-01", "L-12a", "L-12c")
def test_what_is_heard_of_goes_through_any_head_and_layer_by_layer():
    blocks = patterns.block_pattern(8, 2, [0, 1])
    assert patterns.heard([blocks] * 3)[:, 0].sum(-1).tolist() == [4, 6, 8]
    dilated = patterns.windows_pattern(8, [(1, 2)])
    assert patterns.heard([dilated] * 9)[-1, 7].tolist() == [False, True] * 4  # odd places hear of odd ones only
    first = patterns.windows_pattern(8, [(1, 1)], global_tokens=1)
    assert patterns.heard([first, dilated])[0, 7].tolist() == [True] + [False] * 5 + [True] * 2
    assert patterns.heard([first, dilated])[1, 7].nonzero().flatten().tolist() == [0, 4, 5, 6, 7]  # of 5, what 5 heard before
    assert patterns.heard([dilated, first])[1, 7].nonzero().flatten().tolist() == [0, 2, 4, 5, 6, 7]


@pytest.mark.method("L-01", "L-12a", "L-12c")
def test_the_summary_of_a_pattern(dense, batch):
    attention = patterns.mean_attention(dense, {key: batch[key][:1] for key in ("input_ids", "attention_mask")})
    patterns.block_attention(model := copy.deepcopy(dense), 4, length=60, local_heads=4)
    found = patterns.summary(model, dense, attention, 60)
    assert found["pairs"] == pytest.approx(1 / 4) and found["core"] == 1 / 4 and found["kept"] == pytest.approx(1)  # 9 tokens
    assert found["model"] == costs.macs(model, 60) / costs.macs(dense, 60) < 1
    assert found["heard by [CLS]"] == 15 and math.isnan(found["all heard in layer"])
    patterns.window_attention(model := copy.deepcopy(dense), 4, global_tokens=1)
    found = patterns.summary(model, dense, attention, 60)
    assert found["heard by [CLS]"] == 60 and found["all heard in layer"] == 2


@pytest.mark.method("L-01", "L-02", "L-03", "L-12a", "L-12b", "L-12c")
@pytest.mark.parametrize("change, message", [
    (lambda model: patterns.block_attention(model, 0), r"blocks must lie in 1\.\.512"),
    (lambda model: patterns.block_attention(model, 600), r"blocks must lie in 1\.\.512"),
    (lambda model: patterns.block_attention(model, 2, local_heads=5), r"local_heads must lie in 0\.\.4"),
    (lambda model: patterns.head_shifts(4, 0), "at least 1"),
    (lambda model: BlockAttention(32, 4, 0, [0] * 4), "block must be at least 1"),
    (lambda model: BlockAttention(32, 4, 8, [0] * 3), "shifts must be 4 numbers"),
    (lambda model: BlockAttention(32, 4, 8, [0, 0, 0, -1]), "shifts must be 4 numbers"),
    (lambda model: patterns.strided_attention(model, 0), "stride must be at least 1"),
    (lambda model: patterns.strided_attention(model, 8, 5), r"local_heads must lie in 0\.\.4"),
    (lambda model: patterns.fixed_attention(model, 0), "block must be at least 1"),
    (lambda model: patterns.fixed_attention(model, 8, 0), "summaries must be at least 1"),
    (lambda model: patterns.fixed_attention(model, 8, 2, 5), "at most the block of 8"),
    (lambda model: patterns.window_attention(model, 0), "even and at least 2"),
    (lambda model: patterns.window_attention(model, 7), "even and at least 2"),
    (lambda model: patterns.window_attention(model, 8, dilation=0), "from 1 on"),
    (lambda model: patterns.window_attention(model, 8, dilation=[1, 2, 3]), "each of the 2 layers"),
    (lambda model: patterns.window_attention(model, 8, 2, dilated_heads=5), r"dilated_heads must lie in 0\.\.4"),
    (lambda model: patterns.window_attention(model, 8, global_tokens=-1), "global_tokens must be at least 1"),
    (lambda model: WindowAttention(32, 4, 8, [1] * 3), "dilations must be 4 numbers"),
    (lambda model: patterns.pattern(parts.LowRankLinear(4, 4, 2), 8), "no fixed pattern"),
])  # fmt: skip
def test_what_makes_no_pattern_is_refused(change, message, dense):
    with pytest.raises(ValueError, match=message):
        change(dense)
