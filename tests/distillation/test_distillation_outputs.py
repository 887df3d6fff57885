"""What is captured against transformers' own outputs, what is cached against what is captured, and what is refused."""

import pytest
import torch
from small_distillation import first_batch, make_bert, make_trial

from utils import tasks
from utils.distillation import layers, losses, objective
from utils.distillation.outputs import STORED, CachedTeacher, LiveTeacher, cached_teacher, capture, needs, size_of
from utils.parts import BiLSTM

EVERYTHING = tuple(need for kind in STORED for need in needs(kind, (1, 4))) + needs("hidden", (0,))


@pytest.mark.method("K-20a", "K-22", "K-24", "K-26")
def test_capture_is_what_transformers_gives(teacher_model, task):
    batch = first_batch(task)
    teacher_model.config._attn_implementation = "eager"
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    reference = teacher_model(**inputs, output_hidden_states=True, output_attentions=True)
    wanted = needs("hidden", range(5)) + needs("scores", range(1, 5)) + needs("cls", (3,)) + needs("values", (2,))
    found = capture(teacher_model, batch, wanted)
    torch.testing.assert_close(found.logits, reference.logits)
    for layer in range(5):
        torch.testing.assert_close(found["hidden", layer], reference.hidden_states[layer])
    torch.testing.assert_close(found["cls", 3], reference.hidden_states[3][:, 0])
    mask = batch["attention_mask"][:, None, None, :] == 0
    for layer in range(1, 5):
        attention = found["scores", layer].masked_fill(mask, float("-inf")).softmax(-1)
        torch.testing.assert_close(attention, reference.attentions[layer - 1])
    value = teacher_model.bert.encoder.layer[1].attention.self.value(reference.hidden_states[1])
    torch.testing.assert_close(found["values", 2][:, 3], value[:, :, 24:32])  # head 3 of 4, of size 8


@pytest.mark.method("K-04")
def test_captured_inputs_are_a_point_to_differentiate_at(student_model, task):
    batch = first_batch(task)
    found = capture(student_model, batch, needs("inputs", (0,)))
    torch.testing.assert_close(found["inputs", 0], student_model.bert.embeddings.word_embeddings(batch["input_ids"]))
    (gradient,) = torch.autograd.grad(found.logits.sum(), found["inputs", 0])
    assert gradient.abs().sum() > 0
    assert not student_model.bert.embeddings.word_embeddings._forward_hooks  # all hooks are gone


@pytest.mark.method("K-03", "K-22", "K-24")
def test_the_cache_gives_what_the_teacher_gives_in_any_order(teacher_model, task):
    cached, live = cached_teacher(teacher_model, task, EVERYTHING), LiveTeacher(teacher_model, EVERYTHING)
    seen = set()
    for batch in tasks.batches(task.train, 7, 0, seed=3):
        found, reference = cached(batch), live(batch)
        torch.testing.assert_close(found.logits, reference.logits, atol=1e-5, rtol=1e-5)
        mask = batch["attention_mask"].float()
        real = {"hidden": mask[:, :, None], "cls": mask[:, :1], "scores": mask[:, None, :, None] * mask[:, None, None, :]}
        for need in EVERYTHING:
            inside = real.get(need[0], mask[:, None, :, None])
            torch.testing.assert_close(found[need], reference[need] * inside, atol=2e-2, rtol=2e-3)
        seen |= set(batch["rows"].tolist())
    assert seen == set(range(len(task.train)))
    assert cached.rows_read == len(task.train) and cached.read_seconds > 0
    assert cached.seconds_saved == pytest.approx(cached.seconds - cached.read_seconds)


@pytest.mark.method("K-03")
def test_a_file_holds_two_bytes_for_each_number_of_a_real_token(teacher_model, task):
    cached = cached_teacher(teacher_model, task, EVERYTHING)
    lengths = [len(ids) for ids in task.train.input_ids]
    numbers = {"hidden": 32 * sum(lengths), "cls": 32 * len(lengths), "scores": 4 * sum(n * n for n in lengths),
               "queries": 32 * sum(lengths)}  # fmt: skip
    for kind, count in numbers.items():
        assert 2 * count < cached.bytes[f"{kind}-4"] < 2 * count + 200  # the rest is the header


@pytest.mark.method("K-03")
def test_a_teacher_is_asked_once_for_the_same_outputs(teacher_model, task, monkeypatch):
    first = cached_teacher(teacher_model, task, needs("cls", (1, 2)))
    monkeypatch.setattr("utils.distillation.outputs._Builder.__call__", lambda *_: pytest.fail("computed again"))
    assert cached_teacher(teacher_model, task, needs("cls", (2, 1))).folder == first.folder
    teacher_model.classifier.bias.data += 1
    with pytest.raises(pytest.fail.Exception):
        cached_teacher(teacher_model, task, needs("cls", (1, 2)))


@pytest.mark.method("K-03")
def test_outputs_of_another_split_are_refused(teacher_model, task):
    cached = cached_teacher(teacher_model, task, split=task.validation)
    with pytest.raises(ValueError, match="not of the split of 9 examples"):
        cached(first_batch(task, 9))
    with pytest.raises(ValueError, match="not of the split of 9 examples"):
        cached(first_batch(task, 12))


@pytest.mark.method("K-20a", "K-22")
def test_what_is_lacking_is_said_before_a_step_is_made(teacher_model, student_model, task):
    cached = cached_teacher(teacher_model, task, needs("hidden", (2,)))
    objective.as_loss(losses.representational_distance({1: 2}), cached)  # [CLS] is part of hidden
    with pytest.raises(ValueError, match=r"reads cls of layer 4.*hold the logits, hidden of layer 2"):
        objective.as_loss(losses.representational_distance({1: 4}), cached)
    with pytest.raises(ValueError, match="no scores of layer 1 in these outputs"):
        cached(first_batch(task))["scores", 1]
    with pytest.raises(ValueError, match="cannot store inputs: choose from hidden, cls, scores"):
        cached_teacher(teacher_model, task, needs("inputs", (0,)))
    with pytest.raises(ValueError, match="unknown kind 'logit': choose from"):
        needs("logit", (1,))


@pytest.mark.method("K-22", "K-24")
@pytest.mark.parametrize(
    "need, allowed", [(("hidden", 5), "0..4"), (("scores", 0), "1..4"), (("values", -1), "1..4"), (("inputs", 1), "0..0")]
)
def test_layers_that_do_not_exist_are_refused(teacher_model, task, need, allowed):
    with pytest.raises(ValueError, match=f"layers {allowed}"):
        capture(teacher_model, first_batch(task), [need])


@pytest.mark.method("K-03")
def test_a_student_without_layers_gives_its_logits_and_nothing_else(task):
    student = BiLSTM(100, 3, 8, 8, 8).eval()
    assert capture(student, first_batch(task)).logits.shape == (8, 3)
    with pytest.raises(ValueError, match="the model has no encoder layers"):
        capture(student, first_batch(task), needs("hidden", (1,)))


@pytest.mark.method("K-22")
def test_states_too_large_for_the_file_are_refused(teacher_model, task):
    norm = teacher_model.bert.encoder.layer[1].output.LayerNorm
    norm.weight.data *= 1e6
    with pytest.raises(ValueError, match=r"hidden of layer 2 holds values beyond torch\.float16"):
        cached_teacher(teacher_model, task, needs("hidden", (2,)))
    found = cached_teacher(teacher_model, task, needs("hidden", (2,)), dtype=torch.bfloat16)(first_batch(task))
    assert found["hidden", 2].abs().max() > 65504


@pytest.mark.method("K-03")
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_must_be_above_zero(temperature):
    for make in (
        losses.soft_targets,
        lambda T: layers.patient_distillation({1: 2}, temperature=T),
        lambda T: layers.earth_movers(2, 4, temperature=T),
    ):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            make(temperature)


@pytest.mark.method("K-03")
@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_must_be_at_least_zero(weight):
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        weight * losses.labels()
    with pytest.raises(ValueError, match=r"teacher_weight must lie in \[0, 1\]"):
        losses.with_labels(losses.soft_targets(), weight)


@pytest.mark.method("K-20a", "K-20b", "K-22")
def test_layer_maps():
    assert objective.layer_map("first", 3, 6) == {1: 1, 2: 2, 3: 3}
    assert objective.layer_map("last", 3, 6) == {1: 4, 2: 5, 3: 6}
    assert objective.layer_map("skip", 4, 6) == {1: 1, 2: 2, 3: 3, 4: 4}  # floor(6 / 4) is 1
    assert objective.layer_map("uniform", 4, 6) == {1: 2, 2: 3, 3: 5, 4: 6}
    assert objective.layer_map("uniform", 4, 12) == {1: 3, 2: 6, 3: 9, 4: 12}  # TinyBERT's
    assert list(layers.patient_map("skip", 6, 12).values()) == [2, 4, 6, 8, 10]  # PKD's
    assert list(layers.patient_map("last", 6, 12).values()) == [7, 8, 9, 10, 11]
    for S in (0, 7):
        with pytest.raises(ValueError, match=r"1\.\.6"):
            objective.layer_map("first", S, 6)
    with pytest.raises(ValueError, match="choose from first, last, skip, uniform"):
        objective.layer_map("middle", 2, 6)
    with pytest.raises(ValueError, match="'skip' and 'last'"):
        layers.patient_map("uniform", 3, 6)
    with pytest.raises(ValueError, match="2 layers or more"):
        layers.patient_map("skip", 1, 6)


@pytest.mark.method("K-03")
def test_a_student_larger_than_its_teacher_is_refused(teacher_model, student_model, task):
    small, large = LiveTeacher(student_model), make_trial(teacher_model, task)
    with pytest.raises(ValueError, match="no larger than its teacher"):
        objective.distill(large, losses.soft_targets(), small, steps=1)
    assert size_of(teacher_model).num_layers == 4 and size_of(teacher_model).num_heads == 4
    assert size_of(teacher_model).parameters == sum(p.numel() for p in teacher_model.parameters())


@pytest.mark.method("K-07", "K-22")
def test_the_loop_trains_student_and_projection_and_leaves_the_teacher_alone(teacher_model, task):
    student, projection = make_bert(2, hidden_size=16, seed=1), objective.projector(16, 32)
    before, teacher_before = projection.weight.detach().clone(), {k: v.clone() for k, v in teacher_model.state_dict().items()}
    trial = make_trial(student, task)
    teacher = cached_teacher(teacher_model, task, needs("hidden", (4,)))
    log = objective.distill(trial, losses.hints(2, 4, projection), teacher, steps=40, learning_rate=1e-3)
    assert sum(log.losses[-5:]) < 0.8 * sum(log.losses[:5]) and trial.steps == 40
    assert not torch.equal(before, projection.weight)
    assert all(torch.equal(value, teacher_before[name]) for name, value in teacher_model.state_dict().items())
    assert all(p.grad is None for p in teacher_model.parameters())


@pytest.mark.method("K-07", "K-22")
def test_stages_follow_each_other(teacher_model, student_model, task):
    trial, teacher = (
        make_trial(student_model, task),
        CachedTeacher(cached_teacher(teacher_model, task, needs("hidden", (4,))).folder),
    )
    stages = [(losses.hints(2, 4), 3), (losses.soft_targets(), 2), (losses.labels(), 0)]
    logs = objective.in_stages(trial, stages, teacher)
    assert [log.steps for log in logs] == [3, 2] and trial.steps == 5


@pytest.mark.method("K-07")
def test_widths_that_differ_need_a_projection(teacher_model, task):
    student, batch = make_bert(2, hidden_size=16), first_batch(task)
    hint = losses.hints(1, 2)
    with pytest.raises(ValueError, match=r"16 wide, the teacher's 32: give projection=projector\(16, 32\)"):
        objective.as_loss(hint, LiveTeacher(teacher_model, hint.teacher))(student, batch)
    assert torch.equal(objective.projector(8, 8).weight, torch.eye(8))
    wide = objective.projector(8, 12).weight
    torch.testing.assert_close(wide.T @ wide, torch.eye(8), atol=1e-5, rtol=0)
