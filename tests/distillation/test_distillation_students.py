"""Students and the parts they are made of: transformers' own modules with the same weights, and the contract of every part."""

import fresh
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from small_task import task_of
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, MobileBertConfig, SqueezeBertConfig
from transformers.models.mobilebert.modeling_mobilebert import MobileBertEmbeddings
from transformers.models.mobilebert.modeling_mobilebert import MobileBertLayer as TheirLayer
from transformers.models.squeezebert.modeling_squeezebert import SqueezeBertModule

from utils import artifacts, bert, contract, costs, parts
from utils.distillation import mobile, students
from utils.distillation.layers import layer_map
from utils.distillation.outputs import LiveTeacher, needs
from utils.profiles import get
from utils.trials import Trial

INPUTS = ("input_ids", "attention_mask")
BLOCK = {"bottleneck_size": 16, "num_heads": 4, "neurons": 24, "num_ffns": 3}


@pytest.fixture
def teacher():
    """Four layers, hidden 32."""
    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, num_labels=2,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0, initializer_range=0.3)  # fmt: skip
    return BertForSequenceClassification(config).eval()


def inputs(batch: dict) -> dict:
    return {name: batch[name] for name in INPUTS}


# --- parts: the contract --------------------------------------------------------------------------------------------


def squeezed(teacher):
    students.squeeze(teacher, 4)
    return teacher


def spelled(teacher):
    options = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
               "num_labels": 3, "hidden_dropout_prob": 0.0}  # fmt: skip
    part = parts.SpelledBert(100, 3, 1.5, options)
    generator = torch.Generator().manual_seed(0)
    part.spelling[:, 0] = torch.randint(1, 20, (100,), generator=generator)
    part.spelling[50:, 1] = torch.randint(1, 20, (50,), generator=generator)
    return part


MADE = {
    "squeezed": squeezed,
    "mobile": lambda teacher: mobile.mobile_bert(teacher, 2, BLOCK, 8),
    "mobile with the teacher's embeddings": lambda teacher: mobile.mobile_bert(teacher, 2, {**BLOCK, "norm": "layer_norm"}, None),
    "bilstm": lambda teacher: students.bilstm(teacher, 8, 6, 5),
    "cnn": lambda teacher: students.cnn(teacher, 8, 6, (2, 3, 5)),
    "spelled": spelled,
    "narrower": lambda teacher: students.narrower(teacher, 2, 16, num_heads=2),
    "random layers": lambda teacher: students.with_random_layers(teacher, 3),
}


@pytest.mark.method("K-19", "K-27", "K-29", "K-30")
def test_every_student_comes_back_in_a_fresh_process(teacher, tmp_path):
    for name, make in MADE.items():
        model = make(bert.fresh_copy(teacher)).eval()
        path = tmp_path / f"{name}.safetensors"
        artifacts.save(model, path)
        contract.write(path, model, 7)
    assert fresh.broken(tmp_path) == {}


@pytest.mark.method("K-19", "K-27", "K-29", "K-30")
@pytest.mark.parametrize("name", MADE)
def test_closed_form_equals_the_counter(name, teacher):
    model = MADE[name](teacher).eval()
    for length in (1, 4, 9):
        assert costs.macs(model, length, 2) == costs.measured_macs(model, length, 2)


@pytest.mark.method("K-19", "K-27", "K-29", "K-30")
@pytest.mark.parametrize("name", [name for name in MADE if name != "spelled"])  # its room grows with the longest sentence
def test_padding_changes_nothing(name, teacher, batch):
    model = MADE[name](teacher).eval()
    alone = {key: batch[key][2:3, :5] for key in INPUTS}
    torch.testing.assert_close(model(**inputs(batch)).logits[2:3], model(**alone).logits, atol=1e-5, rtol=1e-5)


# --- K-30 grouped layers --------------------------------------------------------------------------------------------


@pytest.mark.method("K-30")
def test_a_grouped_layer_is_a_grouped_convolution_and_a_block_diagonal_matrix():
    part, x = parts.GroupedLinear(12, 20, 4), torch.randn(3, 5, 12)
    nn.init.normal_(part.bias)
    conv = nn.Conv1d(12, 20, 1, groups=4)
    with torch.no_grad():
        conv.weight.copy_(part.weight.reshape(20, 3, 1))
        conv.bias.copy_(part.bias)
    torch.testing.assert_close(part(x), conv(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(part(x), nn.functional.linear(x, torch.block_diag(*part.weight), part.bias))
    with pytest.raises(ValueError, match="groups must divide"):
        parts.GroupedLinear(12, 20, 5)


@pytest.mark.method("K-30")
def test_diagonal_blocks_are_the_nearest_grouped_layer():
    dense = nn.Linear(12, 8)
    part = parts.GroupedLinear.from_linear(dense, 4)
    mask = torch.block_diag(*torch.ones(4, 2, 3))
    torch.testing.assert_close(
        torch.block_diag(*part.weight), dense.weight * mask
    )  # least squares: what may be non-zero is copied
    torch.testing.assert_close(part.bias, dense.bias)
    torch.testing.assert_close(parts.GroupedLinear.from_linear(dense, 1)(torch.eye(12)), dense(torch.eye(12)))


@pytest.mark.method("K-30")
def test_a_squeezed_layer_is_transformers_squeezebert_module(teacher):
    students.squeeze(teacher, 4)
    ours = teacher.bert.encoder.layer[1]
    theirs = SqueezeBertModule(SqueezeBertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64)).eval()
    pairs = [(theirs.attention.query, ours.attention.self.query), (theirs.attention.key, ours.attention.self.key),
             (theirs.attention.value, ours.attention.self.value), (theirs.post_attention.conv1d, ours.attention.output.dense),
             (theirs.intermediate.conv1d, ours.intermediate.dense), (theirs.output.conv1d, ours.output.dense)]  # fmt: skip
    with torch.no_grad():
        for conv, layer in pairs:
            assert conv.groups == getattr(layer, "groups", 1)  # the paper's choice of what is grouped
            conv.weight.copy_(layer.weight.reshape(conv.weight.shape))
            conv.bias.copy_(layer.bias)
    theirs.post_attention.layernorm.load_state_dict(ours.attention.output.LayerNorm.state_dict())
    theirs.output.layernorm.load_state_dict(ours.output.LayerNorm.state_dict())
    x, mask = torch.randn(2, 7, 32), torch.zeros(2, 1, 1, 7)
    mask[1, ..., 5:] = torch.finfo(torch.float32).min
    expected = theirs(x.transpose(1, 2), mask, False)["feature_map"].transpose(1, 2)
    torch.testing.assert_close(ours(x, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.method("K-30")
def test_four_groups_leave_a_quarter_of_the_multiply_adds(teacher):
    before = costs.macs_by_component(teacher, 8)
    students.squeeze(teacher, 4)
    after = costs.macs_by_component(teacher, 8)
    assert (after["qkv"], after["ffn"]) == (before["qkv"] // 4, before["ffn"] // 4)
    assert after["attention_output"] == before["attention_output"]


# --- K-29 MobileBERT ------------------------------------------------------------------------------------------------


@pytest.mark.method("K-29")
@pytest.mark.parametrize("norm", ["no_norm", "layer_norm"])
@pytest.mark.parametrize("mask_kind", ["none", "added", "boolean"])
def test_the_bottleneck_layer_is_transformers_mobilebert_layer(norm, mask_kind):
    config = MobileBertConfig(hidden_size=32, intra_bottleneck_size=16, num_attention_heads=4, intermediate_size=24, num_feedforward_networks=3,
                              normalization_type=norm, attn_implementation="eager")  # fmt: skip
    theirs, ours = TheirLayer(config).eval(), parts.MobileBertLayer(hidden_size=32, norm=norm, **BLOCK).eval()
    theirs.output.LayerNorm.eps = 1e-12  # theirs forgets the configuration's here
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys
    x = torch.randn(2, 7, 32)
    real = torch.arange(7)[None] < torch.tensor([7, 5])[:, None]
    added = torch.zeros(2, 1, 1, 7).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    mask = {"none": None, "added": added, "boolean": real[:, None, None]}[mask_kind]
    expected = theirs(x, None if mask_kind == "none" else added)
    torch.testing.assert_close(ours(x, mask), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.method("K-29")
def test_the_trigram_block_is_transformers_mobilebert_embeddings():
    config = MobileBertConfig(vocab_size=50, embedding_size=8, hidden_size=32, max_position_embeddings=16)
    theirs, ours = MobileBertEmbeddings(config).eval(), parts.TrigramEmbeddings(50, 8, 32, 16)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(1, 50, (3, 9))
    torch.testing.assert_close(ours(ids), theirs(ids))


@pytest.mark.method("K-29")
def test_a_mobile_student_gives_its_states_and_maps_and_begins_with_the_teachers_words(teacher, batch):
    student = mobile.mobile_bert(teacher, 3, BLOCK, 32)
    out = student(**inputs(batch), output_hidden_states=True)
    assert len(out.hidden_states) == 4 and out.hidden_states[1].shape == (4, 9, 32)
    with bert.attention(student, "eager"):
        assert student(**inputs(batch), output_attentions=True).attentions[2].shape == (4, 4, 9, 9)
    words = batch["input_ids"] != 0
    found, expected = student.bert.embeddings(batch["input_ids"]), teacher.bert.embeddings(batch["input_ids"])
    torch.testing.assert_close(found[words], expected[words], atol=1e-4, rtol=1e-4)  # rank 32 of 32: nothing is lost
    with pytest.raises(ValueError, match="between 1 and the teacher's 4 layers"):
        mobile.mobile_bert(teacher, 5, BLOCK)
    with pytest.raises(ValueError, match="divide the hidden size"):
        mobile.mobile_bert(teacher, 2, {**BLOCK, "num_heads": 5, "bottleneck_size": 15})


@pytest.mark.method("K-29")
def test_layer_transfer_is_zero_between_equals_and_progressive_transfer_moves_one_layer_at_a_time(teacher, batch):
    wanted = (*needs("hidden", range(5)), *needs("scores", range(1, 5)))
    live = LiveTeacher(teacher, wanted)
    student = mobile.mobile_bert(teacher, 2, BLOCK, 8)
    trial = Trial(student, task_of(batch), get("smoke"))
    seen = []

    def watch(step, model, optimizer):
        seen.append(
            {
                name.split(".")[3] if "layer" in name else name.split(".")[1]
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        )

    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    learned = mobile.progressive_transfer(trial, live, layer_map("uniform", 2, 4), 2, learning_rate=1e-2, after_step=watch)
    assert seen == [{"0", "embeddings"}] * 2 + [{"1"}] * 2
    assert learned[1] == sum(p.numel() for p in student.bert.encoder.layer[1].parameters()) < learned[0]
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any(name.startswith(("classifier", "bert.pooler")) for name in moved)
    assert all(p.requires_grad for p in student.parameters())
    same = mobile.layer_transfer(2, 2).loss(live(batch), live(batch), batch)
    assert same.item() == pytest.approx(0, abs=1e-6)
    assert mobile.layer_transfer(1, 2).loss(live(batch), live(batch), batch).item() > 0.01
    with pytest.raises(ValueError, match="every layer of the student"):
        mobile.progressive_transfer(trial, live, {2: 4}, 1)


# --- layers of the teacher, narrower students -----------------------------------------------------------------------


@pytest.mark.method("K-21")
def test_starting_layers_by_hand(teacher, batch):
    assert students.starting_layers(12, 6, "alternate") == [0, 2, 4, 6, 8, 10]
    assert students.starting_layers(6, 4, "alternate") == [0, 1, 3, 4]
    assert students.starting_layers(6, 2, "first") == [0, 1] and students.starting_layers(6, 2, "last") == [4, 5]
    student = students.from_layers(teacher, students.starting_layers(4, 2, "alternate"))
    torch.testing.assert_close(
        student.bert.encoder.layer[1].output.dense.weight, teacher.bert.encoder.layer[2].output.dense.weight
    )
    assert len(teacher.bert.encoder.layer) == 4 and student.config.num_hidden_layers == 2
    whole = students.from_layers(teacher, [0, 1, 2, 3])
    torch.testing.assert_close(whole(**inputs(batch)).logits, teacher(**inputs(batch)).logits)
    with pytest.raises(ValueError, match="between 1 and the teacher's 4"):
        students.with_random_layers(teacher, 5)
    with pytest.raises(ValueError, match="start must be one of"):
        students.starting_layers(6, 2, "middle")


@pytest.mark.method("K-21")
def test_random_layers_differ_in_the_layers_alone(teacher):
    student, again = students.with_random_layers(teacher, 2, seed=3), students.with_random_layers(teacher, 2, seed=3)
    state, given = student.state_dict(), teacher.state_dict()
    drawn = {name for name in state if not torch.equal(state[name], given[name])}
    assert drawn and all(name.startswith("bert.encoder.layer") for name in drawn)
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert not torch.equal(student.bert.encoder.layer[0].intermediate.dense.weight,
                           students.with_random_layers(teacher, 2, seed=4).bert.encoder.layer[0].intermediate.dense.weight)  # fmt: skip


@pytest.mark.method("K-28")
def test_projected_rows_are_the_truncated_svd():
    table = torch.randn(60, 12) @ torch.diag(torch.linspace(3, 0.1, 12))
    directions = students.principal_directions(table, 5)
    torch.testing.assert_close(directions.T @ directions, torch.eye(5), atol=1e-5, rtol=0)
    error = (table - table @ directions @ directions.T).square().sum()
    assert error.item() == pytest.approx((torch.linalg.svdvals(table)[5:] ** 2).sum().item(), rel=1e-4)
    found, expected = (
        students.project_rows(table, 5),
        torch.from_numpy(TruncatedSVD(5, algorithm="arpack").fit_transform(table.double().numpy())),
    )
    torch.testing.assert_close(found.abs(), expected.float().abs(), atol=1e-3, rtol=1e-3)  # signs are free
    with pytest.raises(ValueError, match="size must lie"):
        students.project_rows(table, 13)


@pytest.mark.method("K-19", "K-28")
def test_a_narrow_student_keeps_what_it_can_of_the_embeddings(teacher):
    student = students.narrower(teacher, 2, 16, num_heads=2, intermediate_size=24, seed=3)
    again, other = (students.narrower(teacher, 2, 16, num_heads=2, intermediate_size=24, seed=seed) for seed in (3, 4))
    first, same, different = (model.bert.encoder.layer[0].intermediate.dense.weight for model in (student, again, other))
    assert first.shape == (24, 16) and torch.equal(first, same) and not torch.equal(first, different)
    assert students.narrower(teacher, 2, 16, num_heads=2).config.intermediate_size == 64
    table = teacher.bert.embeddings.word_embeddings.weight
    directions = students.principal_directions(table, 16)
    torch.testing.assert_close(student.bert.embeddings.word_embeddings.weight, table @ directions)
    torch.testing.assert_close(student.bert.embeddings.position_embeddings.weight,
                               teacher.bert.embeddings.position_embeddings.weight @ directions)  # fmt: skip
    with pytest.raises(ValueError, match="at most as wide"):
        students.narrower(teacher, 2, 64, num_heads=2)


@pytest.mark.method("K-27")
def test_word_vectors_of_other_students_are_the_teachers(teacher):
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight[0] = 1.0  # a pre-trained [PAD] has a vector
    for student in (students.bilstm(teacher, 8, 6, 5), students.cnn(teacher, 8, 6)):
        expected = students.project_rows(teacher.bert.embeddings.word_embeddings.weight, 8)
        torch.testing.assert_close(student.embeddings.weight[1:], expected[1:])
        assert not student.embeddings.weight[0].any()


@pytest.mark.method("K-27")
def test_the_cnn_takes_the_highest_answer_of_every_filter(batch):
    part = parts.TextCNN(100, 2, 8, 64, (2, 3)).eval()
    ids = batch["input_ids"][2, :5]
    x = part.embeddings(ids)
    answers = []
    for conv, before in zip(part.convolutions, (0, 1), strict=True):
        width = conv.kernel_size[0]
        padded = torch.cat([torch.zeros(before, 8), x, torch.zeros(width - 1 - before, 8)])
        windows = [(conv.weight * padded[start : start + width].T).sum((1, 2)) + conv.bias for start in range(5)]
        answers.append(torch.stack(windows).relu().amax(0))
    torch.testing.assert_close(part.encode(ids[None], torch.ones(1, 5)), torch.cat(answers)[None])


@pytest.mark.method("K-19")
def test_a_spelled_bert_is_the_small_bert_on_the_spelled_sentence():
    part = spelled(None).eval()
    ids = torch.tensor([[60, 10, 20, 70], [11, 12, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    own, own_mask = part.spell(ids, mask)
    table = part.spelling.long()
    assert own.tolist() == [[*table[60, :2].tolist(), table[10, 0].item(), table[20, 0].item(), *table[70, :2].tolist()],
                            [table[11, 0].item(), table[12, 0].item(), 0, 0, 0, 0]]  # fmt: skip
    assert own_mask.sum(1).tolist() == [6, 2] and part.places(4) == 6
    expected = part.classifier(part.bert(input_ids=own[:1]).pooler_output)
    torch.testing.assert_close(part(ids, mask).logits[:1], expected)
    short = part.spell(torch.tensor([[60, 61, 62, 63]]), torch.ones(1, 4, dtype=torch.long))[0]
    assert short.shape == (1, 6)  # eight pieces, six places: the last two are cut off
    with pytest.raises(ValueError, match="growth must lie"):
        parts.SpelledBert(10, 2, 2.5, {"hidden_size": 8, "num_attention_heads": 2})
