"""Star-Transformer, Linformer, efficient and linear attention against loops over tokens, dense attention and quadratic forms."""

import fresh
import pytest
import torch
from small_task import task_of
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from utils import artifacts, bert, contract, costs, parts, profiles, training
from utils.parts.attention import efficient_attention, feature_map, linear_attention, mean_attention
from utils.parts.projected import BLOCK, LinformerAttention, StarAttention, segment_means, text_share
from utils.subquadratic import adaptation, linear

IDS = ("L-05", "L-06a", "L-06b", "L-06c", "L-06d", "L-10", "L-11")
POSITIONS = 40
INPUTS = ("input_ids", "attention_mask")


@pytest.fixture
def model() -> BertForSequenceClassification:
    """Two layers, hidden 32, 4 heads, 40 positions, with weights large enough for uneven attention."""
    return make()


def make(**sizes) -> BertForSequenceClassification:
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
             "max_position_embeddings": POSITIONS, "hidden_dropout_prob": 0.0, "classifier_dropout": 0.0,
             "initializer_range": 0.3} | sizes  # fmt: skip
    made = BertForSequenceClassification(BertConfig(**sizes)).eval()
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.1)
    return made


def projected(**options):
    def change(model: nn.Module) -> None:
        linear.linformer(model, 5, **options)
        for p in linear.projections(model):
            p.data += 0.05 * torch.randn_like(p)

    return change


MADE = {
    "star": linear.star,
    "star, 3 cycles": lambda model: linear.star(model, cycles=3),
    "no sharing": projected(sharing="none"),
    "headwise": projected(sharing="headwise"),
    "key_value": projected(sharing="key_value"),
    "layerwise": projected(sharing="layerwise", start="random"),
    "efficient": lambda model: linear.use_attention(model, "efficient"),
    "linear": lambda model: linear.use_attention(model, "linear"),
}


def made(name: str, **sizes) -> nn.Module:
    model = make(**sizes)
    MADE[name](model)
    return model.eval()


def states(length: int, batch: int = 1, heads: int = 4, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(batch, heads, length, size) for _ in range(3))


def texts(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def dense_core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~text[:, None, None], -torch.inf).softmax(-1) @ v


def projection_part(projected_length: int, max_length: int, sharing: str = "none") -> LinformerAttention:
    part = LinformerAttention(32, 4, max_length, projected_length, sharing)
    for p in (part.projection_k, part.projection_v):
        if p is not None:
            nn.init.normal_(p)
    return part


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.method(*IDS)
def test_every_model_comes_back_in_a_fresh_process(tmp_path):
    for name in MADE:
        model = made(name)
        artifacts.save(model, tmp_path / f"{name}.safetensors")
        contract.write(tmp_path / f"{name}.safetensors", model, 19)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_closed_form_is_what_the_counter_sees(name):
    model = made(name)
    for length in (1, 9, BLOCK, 33):
        assert costs.macs(model, length, 2) == costs.measured_macs(model, length, 2)


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_twice_the_text_costs_twice_the_work_and_no_tensor_is_quadratic(name):
    length, longer = 768, 1536
    model = made(name, max_position_embeddings=longer)
    assert costs.macs(model, longer) <= 2.01 * costs.macs(model, length)
    with adaptation.Allocations() as watched:
        model(**costs.example_inputs(model, 1, length)).logits.sum().backward()
    assert 0 < watched.largest.numbers < length * length / 2, watched.largest


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_neither_padding_nor_the_rest_of_the_batch_changes_a_text(name):
    model = made(name)
    ids, mask = torch.randint(1, 100, (4, 35)), texts(35, 17, 3, 1)
    together = model.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    others = torch.where(mask, ids, torch.randint(1, 100, ids.shape))
    again = model.bert(input_ids=others, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(together[mask], again[mask], atol=1e-5, rtol=1e-4)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model.bert(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(together[row, :length], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_a_text_of_padding_alone_gives_finite_numbers_and_gradients(name):
    model = made(name)
    mask = texts(20, 0).long()
    ids = torch.randint(1, 100, mask.shape)
    found = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    found.square().sum().backward()
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(p.grad).all() for p in model.bert.encoder.parameters() if p.grad is not None)


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_bfloat16_is_near(name):
    model, mask = made(name), texts(40, 21).long()
    ids = torch.randint(1, 100, mask.shape)
    exact = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    with torch.autocast("cpu", torch.bfloat16):
        found = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.method(*IDS)
@pytest.mark.parametrize("name", MADE)
def test_training_and_prediction_run_what_the_model_carries(name, batch):
    model, task = made(name), task_of(batch)
    carried = {"star, 3 cycles": "star_attention", "star": "star_attention"}.get(
        name, name if name in parts.ATTENTIONS else "linformer"
    )
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with adaptation.attention_calls(model) as calls:
        log = training.train(model, task, profiles.get("smoke"), steps=2, learning_rate=1e-2)
        training.predict(model, task.validation, 0)
    assert calls == {carried: 2 * (2 + 1)} and len(log.losses) == 2
    still = [key for key, p in model.named_parameters() if torch.equal(p, before[key]) and "embeddings." not in key]
    assert still == []


# --- L-05 Star-Transformer ------------------------------------------------------------------------------------------


def star_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cycles: int) -> torch.Tensor:
    """One head of one text without padding, (length, head size), token by token."""
    length, size = q.shape
    state = [torch.cat([q[i], k[i], v[i]]) for i in range(length)]
    start = list(state)
    for _ in range(cycles):
        new = []
        for i in range(length):
            if i == 0:
                seen = state
            else:
                left = i - 1 if i > 1 else length - 1
                right = i + 1 if i < length - 1 else 1
                seen = [state[left], state[i], state[right], start[i], state[0]]
            scores = torch.stack([state[i][:size] @ other[size : 2 * size] for other in seen]) / size**0.5
            new.append(scores.softmax(0) @ torch.stack(seen))
        state = new
    return torch.stack(state)[:, 2 * size :]


@pytest.mark.method("L-05")
@pytest.mark.parametrize("cycles", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 3, BLOCK, BLOCK + 1, 37])
def test_star_is_a_loop_over_tokens(cycles, length):
    q, k, v = states(length)
    found = StarAttention(32, 4, cycles).core(q, k, v, texts(length))
    expected = torch.stack([star_by_hand(*(x[0, head] for x in (q, k, v)), cycles) for head in range(4)])
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-05")
def test_the_relay_is_the_first_token_of_the_text_and_attends_like_a_dense_one():
    q, k, v = states(21, 2)
    text = texts(21, 15)
    found = StarAttention(32, 4).core(q, k, v, text)
    torch.testing.assert_close(found[:, :, 0], dense_core(q, k, v, text)[:, :, 0])
    shifted = [torch.cat([torch.randn_like(x[:, :, :4]), x], 2) for x in (q, k, v)]  # padding in front
    left = torch.cat([torch.zeros(2, 4, dtype=torch.bool), text], 1)
    torch.testing.assert_close(StarAttention(32, 4).core(*shifted, left)[:, :, 4:], found)


@pytest.mark.method("L-05")
def test_what_a_star_sees_is_its_pattern_and_every_two_tokens_are_two_cycles_apart():
    for length in (1, 2, 3, 4, 19):
        q, k, _ = states(length)
        once = adaptation.attention_map(StarAttention(32, 4).core, q[0], k[0])
        pattern = linear.star_pattern(length, 4)
        assert torch.equal((once > 0).float(), pattern)
        assert pattern[0].sum() == linear.star_links(length)
        torch.testing.assert_close(once.sum(-1), torch.ones(4, length))
        assert (adaptation.attention_map(StarAttention(32, 4, 2).core, q[0], k[0]) > 0).all()


@pytest.mark.method("L-05")
def test_a_star_needs_a_cycle(model):
    with pytest.raises(ValueError, match="cycles must be at least 1, got 0"):
        linear.star(model, cycles=0)


# --- L-06 Linformer -------------------------------------------------------------------------------------------------


@pytest.mark.method("L-06a", "L-06b", "L-06c", "L-06d")
@pytest.mark.parametrize("sharing", linear.SHARING)
def test_with_as_many_rows_as_tokens_the_means_are_dense_attention(sharing, model):
    ids, mask = torch.randint(1, 100, (2, POSITIONS)), texts(POSITIONS, 23).long()
    dense = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    linear.linformer(model, POSITIONS, sharing)
    assert torch.equal(linear.projections(model)[0][0], torch.eye(POSITIONS))
    found = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], dense[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.method("L-06a", "L-06b", "L-06c")
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value"])
def test_a_text_of_full_length_is_the_papers_formula(sharing):
    part, (q, k, v) = projection_part(3, 10, sharing), states(10, 2)
    found = part.core(q, k, v, texts(10, 10))
    for head in range(4):
        own = head if sharing == "none" else 0
        for_k = part.projection_k[own]
        for_v = for_k if sharing == "key_value" else part.projection_v[own]
        weights = (q[:, head] @ (for_k @ k[:, head]).transpose(-1, -2) / 8**0.5).softmax(-1)
        torch.testing.assert_close(found[:, head], weights @ (for_v @ v[:, head]), atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-06a", "L-06b", "L-06c")
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value"])
def test_a_shorter_text_meets_the_first_columns_and_rows_count_by_the_text_they_see(sharing):
    part, (q, k, v) = projection_part(3, 10, sharing), states(7, 2)
    text = texts(7, 4)
    share = text_share(part.projection_k, text)
    found = part.core(q, k, v, text)
    for row, length in enumerate((7, 4)):
        for head in range(4):
            own = head if sharing == "none" else 0
            for_k = part.projection_k[own, :, :length]
            for_v = for_k if sharing == "key_value" else part.projection_v[own, :, :length]
            torch.testing.assert_close(share[row, own], for_k.abs().sum(-1) / part.projection_k[own].abs().sum(-1))
            scores = q[row, head] @ (for_k @ k[row, head, :length]).T / 8**0.5
            weights = share[row, own] * scores.exp()
            expected = weights / weights.sum(-1, keepdim=True) @ (for_v @ v[row, head, :length])
            torch.testing.assert_close(found[row, head], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.method("L-06a", "L-06b", "L-06c", "L-06d")
def test_each_sharing_stores_as_many_matrices_as_the_paper_counts(tmp_path):
    expected = {"none": 2 * 4 * 2, "headwise": 2 * 2, "key_value": 2, "layerwise": 1}
    for sharing, count in expected.items():
        dense = make()
        weights = sum(p.numel() for p in dense.parameters())
        linear.linformer(dense, 5, sharing, start="random")
        assert linear.projection_count(dense) == count
        assert sum(p.numel() for p in dense.parameters()) - weights == count * 5 * POSITIONS
        artifacts.save(dense, tmp_path / sharing)
        assert linear.projection_count(artifacts.load(tmp_path / sharing)) == count
        drawn = {tuple(matrix[0].tolist()) for p in linear.projections(dense) for matrix in p}
        assert len(drawn) == count  # and no two of them are alike


@pytest.mark.method("L-06b")
def test_starts():
    means = segment_means(4, 10)
    x = torch.arange(10.0)
    assert (means @ x).tolist() == [1.0, 3.5, 6.0, 8.5] and torch.equal(means.sum(-1), torch.ones(4))
    for number in (1, 7, 10):
        assert torch.equal(segment_means(number, 10).count_nonzero(0), torch.ones(10))  # every token in one segment
    drawn = [make(max_position_embeddings=400) for _ in range(3)]
    for model, seed in zip(drawn, (0, 0, 1), strict=True):
        linear.linformer(model, 64, start="random", seed=seed)
    one, same, other = (linear.projections(model)[0].detach() for model in drawn)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.std().item() == pytest.approx(64**-0.5, rel=0.03) and abs(one.mean().item()) < 0.01


@pytest.mark.method("L-06a", "L-06b", "L-06c", "L-06d")
def test_what_cannot_be_projected_is_refused(model):
    refused = [({"projected_length": 0}, r"must lie in 1\.\.40"), ({"projected_length": 41}, r"1\.\.40 \(max_length\), got 41"),
               ({"sharing": "all"}, "sharing must be one of none, headwise"), ({"start": "zeros"}, "start must be one of"),
               ({"sharing": "layerwise", "projected_length": 0}, "must lie in")]  # fmt: skip
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            linear.linformer(model, **{"projected_length": 4, **options})
    with pytest.raises(ValueError, match="at most 10 tokens, got 11"):
        projection_part(3, 10).core(*states(11), texts(11))
    with pytest.raises(ValueError, match="sharing must be one of"):
        LinformerAttention(32, 4, 8, 2, "layerwise")


@pytest.mark.method("L-06a")
def test_few_singular_values_hold_a_smooth_map_and_none_are_left_beyond_the_rank():
    maps = torch.randn(2, 3, 12, 4) @ torch.randn(2, 3, 4, 12)
    share = linear.spectrum_share(maps)
    assert share.shape == (2, 3, 12) and (share[..., 2] < 1 - 1e-3).all()
    torch.testing.assert_close(share[..., 3:], torch.ones(2, 3, 9))
    torch.testing.assert_close(linear.spectrum_share(torch.diag(torch.tensor([1.0, 3.0, -2.0]))), torch.tensor([3.0, 5, 6]) / 6)


# --- L-10, L-11 -----------------------------------------------------------------------------------------------------


@pytest.mark.method("L-10")
def test_efficient_attention_is_the_product_of_two_softmaxes_in_any_order():
    (q, k, v), text = states(9, 3), texts(9, 6, 1)
    found, _ = efficient_attention(None, q, k, v, text.long())
    keys = torch.zeros_like(k)
    for row, length in enumerate((9, 6, 1)):
        keys[row, :, :length] = k[row, :, :length].softmax(-2)
    maps = q.softmax(-1) @ keys.transpose(-1, -2)
    torch.testing.assert_close(found, (maps @ v).transpose(1, 2))
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, 9))  # rows of the implied map sum to 1
    torch.testing.assert_close(efficient_attention(None, q, k, v, None)[0][:1], found[:1])


@pytest.mark.method("L-11")
def test_linear_attention_is_its_quadratic_form():
    (q, k, v), text = states(9, 3), texts(9, 6, 1)
    found, _ = linear_attention(None, q, k, v, text.long())
    scores = (nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).transpose(-1, -2) * text[:, None, None]
    torch.testing.assert_close(found, (scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2))
    torch.testing.assert_close(linear_attention(None, q, k, v, None)[0][:1], found[:1])


@pytest.mark.method("L-11")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_feature_map_stays_positive_and_keeps_its_digits(dtype):
    x = torch.tensor([-40.0, -20.0, -7.0, -1.0, -0.0, 0.0, 0.5, 30.0], dtype=dtype)
    exact = torch.where(x > 0, 1 + x.double(), x.double().exp())
    torch.testing.assert_close(feature_map(x).double(), exact, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert (nn.functional.elu(x[1]) + 1) == 0  # the usual form loses all of them
    x.requires_grad_()
    feature_map(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), torch.where(x > 0, 1.0, x.double().exp()), rtol=8e-3, atol=0)


@pytest.mark.method("L-11")
def test_queries_and_keys_far_below_zero_still_give_a_mean_of_values():
    q, k, v = states(7)
    found, _ = linear_attention(None, q - 4, k - 4, v, None)
    scores = (feature_map((q - 4).double()) @ feature_map((k - 4).double()).transpose(-1, -2))[0]
    exact = scores / scores.sum(-1, keepdim=True) @ v[0].double()
    torch.testing.assert_close(found[0].transpose(0, 1).double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.method("L-10", "L-11")
@pytest.mark.parametrize("name", ["efficient", "linear"])
def test_long_sums_in_bfloat16_stay_near(name):
    q, k, v = states(4096, heads=2)
    v = v + 1
    core, text = adaptation.core_of(name), texts(4096)
    exact, found = core(q, k, v, text), core(*(x.bfloat16() for x in (q, k, v)), text)
    assert (found.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.method("L-06b", "L-10", "L-11")
def test_the_rank_of_a_map_tells_who_multiplied_keys_with_values_first():
    q, k, _ = (x[0] for x in states(30))
    maps = {name: adaptation.attention_map(adaptation.core_of(name), q, k) for name in ("efficient", "linear")}
    maps["linformer"] = adaptation.attention_map(projection_part(5, 30, "headwise").core, q, k)
    dense = adaptation.attention_map(dense_core, q, k)
    assert [linear.map_rank(maps[name]).max().item() for name in ("efficient", "linear", "linformer")] == [8, 8, 5]
    assert (linear.map_rank(dense) > 20).all()
    evenness = {name: linear.map_evenness(found).mean().item() for name, found in (maps | {"dense": dense}).items()}
    assert evenness["dense"] < evenness["linear"] < 1 and evenness["dense"] < evenness["efficient"] < 1
    torch.testing.assert_close(linear.map_evenness(torch.full((3, 8, 8), 1 / 8)), torch.ones(3))


@pytest.mark.method("L-11")
def test_the_control_gives_every_token_the_mean_of_its_text():
    (q, k, v), text = states(9, 3), texts(9, 6, 0)
    found, _ = mean_attention(None, q, k, v, text.long())
    for row, length in enumerate((9, 6)):
        expected = v[row, :, :length].mean(1).expand(9, -1, -1)  # (heads, size), for each of the 9 tokens
        torch.testing.assert_close(found[row], expected)
    assert (found[2] == 0).all()
    torch.testing.assert_close(mean_attention(None, q, k, v, None)[0][0], found[0])
    mean = adaptation.attention_map(adaptation.core_of("mean"), q[0], k[0])
    assert (linear.map_rank(mean) == 1).all()
    torch.testing.assert_close(linear.map_evenness(mean), torch.ones(4))


@pytest.mark.method("L-11")
def test_a_model_with_the_control_trains_saves_and_counts(batch, tmp_path):
    model = make()
    linear.use_attention(model, "mean")
    assert costs.macs(model, 9, 2) == costs.measured_macs(model, 9, 2)
    training.train(model, task_of(batch), profiles.get("smoke"), steps=1, learning_rate=1e-2)
    artifacts.save(model, tmp_path / "mean")
    assert artifacts.load(tmp_path / "mean").config._attn_implementation == "mean"


@pytest.mark.method("L-05", "L-06a", "L-10", "L-11")
@pytest.mark.parametrize("name", ["star", "no sharing", "efficient", "linear"])
def test_maps_of_layers_are_what_the_layers_do_to_the_dense_models_states(name):
    torch.manual_seed(1)
    dense = make()
    model = bert.fresh_copy(dense)
    MADE[name](model)
    ids = torch.randint(1, 100, (1, 11))
    maps = linear.layer_maps(model.eval(), dense, ids)
    assert maps.shape == (2, 4, 11, 11)
    pairs = adaptation.dense_pairs(dense, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for layer, found, (x, _) in zip(model.bert.encoder.layer, maps, pairs, strict=True):
        attention = layer.attention.self
        values = attention.value(x)[0].unflatten(-1, (4, -1)).transpose(0, 1)
        expected = attention(x, torch.ones_like(ids))[0][0]
        torch.testing.assert_close((found @ values).transpose(0, 1).flatten(1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.method("L-10", "L-11")
def test_only_attentions_of_the_table_can_be_used(model):
    for name in ("own", "sdpa", "mystery"):
        with pytest.raises(ValueError, match="must be one of linear, efficient, quaternion"):
            linear.use_attention(model, name)
    linear.use_attention(model, "linear")
    assert bert.fresh_copy(model).config._attn_implementation == "linear"
