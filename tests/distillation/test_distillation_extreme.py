"""XtremeDistil: its losses in closed form, and who learns in which phase."""

import pytest
import torch
from small_task import task_of
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from utils.distillation import extreme, students
from utils.distillation.outputs import LiveTeacher
from utils.profiles import get
from utils.trials import Trial

INPUTS = ("input_ids", "attention_mask")


@pytest.fixture
def teacher():
    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=2,
                        initializer_range=0.2)  # fmt: skip
    return BertForSequenceClassification(config).eval()


def inputs(batch: dict) -> dict:
    return {name: batch[name] for name in INPUTS}


@pytest.mark.method("K-28")
def test_representation_loss_is_torchs_kl_of_the_softmaxes_and_zero_between_equals():
    student, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    P, Q = (torch.distributions.Categorical(logits=z) for z in (teacher, student))
    expected = torch.distributions.kl_divergence(P, Q).mean()
    found = extreme.representation_loss(student, teacher)
    torch.testing.assert_close(found, expected)
    assert extreme.representation_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert extreme.representation_loss(teacher + 3.0, teacher).item() == pytest.approx(0, abs=1e-6)
    found.backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 5)


@pytest.mark.method("K-28")
def test_sentence_vectors_are_what_the_head_reads(teacher, batch):
    bilstm, cnn = students.bilstm(teacher, 8, 6, 5), students.cnn(teacher, 8, 6)
    for student in (bilstm, cnn, teacher):
        assert extreme.sentence_vector(student, batch).shape == (4, extreme.vector_size(student))
    vector = extreme.sentence_vector(bilstm, batch)
    torch.testing.assert_close(bilstm.classifier(bilstm.hidden(vector).relu()), bilstm(**inputs(batch)).logits)
    torch.testing.assert_close(cnn.classifier(extreme.sentence_vector(cnn, batch)), cnn(**inputs(batch)).logits)
    state = extreme.sentence_vector(teacher, batch)
    pooled = teacher.bert.pooler.dense(state).tanh()
    torch.testing.assert_close(teacher.classifier(pooled), teacher(**inputs(batch)).logits)
    projection = extreme.Projection(12, 32)
    expected = nn.functional.gelu(vector @ projection.dense.weight.T + projection.dense.bias)
    torch.testing.assert_close(projection(vector), expected)


@pytest.mark.method("K-28")
def test_stages_read_what_they_should(teacher, batch):
    live = LiveTeacher(teacher, (("cls", 1),))
    student = students.bilstm(teacher, 8, 6, 5)
    projection = extreme.Projection(12, 32)
    transfer, labelled = task_of(batch, "transfer"), task_of(batch, "labelled")
    first, second, third = extreme.xtreme_stages(live, 1, transfer, labelled, projection)
    assert [stage.task.name for stage in (first, second, third)] == ["transfer", "transfer", "labelled"]
    unlabelled = {**batch, "labels": torch.full((4,), -100)}
    state = teacher.bert(**inputs(batch), output_hidden_states=True).hidden_states[1][:, 0]
    torch.testing.assert_close(first.loss(student, unlabelled),
                               extreme.representation_loss(projection(student.encode(**inputs(batch))), state))  # fmt: skip
    mine, given = student(**inputs(batch)).logits, teacher(**inputs(batch)).logits
    difference = (mine - mine.mean(1, keepdim=True)) - (given - given.mean(1, keepdim=True))
    torch.testing.assert_close(second.loss(student, unlabelled), 0.5 * difference.square().sum(1).mean())
    torch.testing.assert_close(third.loss(student, batch), nn.functional.cross_entropy(mine, batch["labels"]))


@pytest.mark.method("K-28")
@pytest.mark.parametrize("make", [lambda t: students.bilstm(t, 8, 6, 5), lambda t: students.cnn(t, 8, 6), lambda t: t])
def test_layers_thaw_from_the_top_in_every_stage(make, teacher, batch):
    live = LiveTeacher(teacher, (("cls", 1),))
    student = students.from_layers(teacher, [0, 1]) if make(teacher) is teacher else make(teacher)
    groups = extreme.from_the_top(student)
    assert sum(p.numel() for group in groups for m in group for p in m.parameters()) == sum(
        p.numel() for p in student.parameters()
    )
    projection = extreme.Projection(extreme.vector_size(student), 32)
    transfer, labelled = task_of({**batch, "labels": torch.full((4,), -100)}, "transfer"), task_of(batch, "labelled")
    read, stages = [], []
    for stage in extreme.xtreme_stages(live, 1, transfer, labelled, projection):
        noting = lambda model, batch, stage=stage: (read.append(int(batch["labels"].min())), stage.loss(model, batch))[1]  # noqa: E731
        stages.append(extreme.Stage(noting, stage.task, stage.modules, stage.reaches_head))
    trial, seen = Trial(student, labelled, get("smoke")), []

    def watch(step, model, optimizer):
        seen.append([any(p.requires_grad for m in group for p in m.parameters()) for group in groups])

    learned = extreme.train_in_stages(trial, stages, len(groups) + 1, learning_rate=1e-3, after_step=watch)
    sizes = [sum(p.numel() for m in group for p in m.parameters()) for group in groups]
    cumulative = [sum(sizes[: phase + 1]) for phase in range(len(groups))]
    below = [total - sizes[0] for total in cumulative[1:]]  # the first loss is that of the sentence vector: the head stays frozen
    assert learned == below + cumulative * 2
    assert trial.steps == len(seen) == 3 * (len(groups) + 1)
    stage = [[position <= phase for position in range(len(groups))] for phase in range(len(groups))]
    first = [[position and position <= phase for position in range(len(groups))] for phase in range(1, len(groups))]
    steps = len(groups) + 1
    shares = [steps * (k + 1) // len(first) - steps * k // len(first) for k in range(len(first))]
    assert seen[:steps] == [
        [bool(one) for one in phase] for phase, times in zip(first, shares, strict=True) for _ in range(times)
    ]
    assert seen[steps:] == [*stage, stage[-1]] * 2  # the last phase has the step that is left over
    assert read == [-100] * 2 * (len(groups) + 1) + [0] * (len(groups) + 1)  # the first two stages see unlabelled sentences
    assert trial.task is labelled and all(p.requires_grad for p in student.parameters())


@pytest.mark.method("K-28")
def test_the_top_of_a_bert_is_its_head_then_its_last_layer(teacher):
    order = [type(group[0]).__name__ for group in extreme.from_the_top(teacher)]
    assert order == ["Linear", "BertLayer", "BertLayer", "BertEmbeddings"]
    assert [group[0] for group in extreme.from_the_top(teacher)[1:3]] == list(teacher.bert.encoder.layer)[::-1]


@pytest.mark.method("K-28")
def test_without_gradual_thawing_a_stage_is_one_phase(teacher, batch):
    student, labelled = students.bilstm(teacher, 8, 6, 5), task_of(batch, "labelled")
    trial = Trial(student, labelled, get("smoke"))
    stage = extreme.xtreme_stages(LiveTeacher(teacher, (("cls", 1),)), 1, labelled, labelled, extreme.Projection(12, 32))[2]
    assert extreme.train_in_stages(trial, [stage], 2, gradual=False) == [sum(p.numel() for p in student.parameters())]
    with pytest.raises(ValueError, match="each of its 3 phases"):
        extreme.train_in_stages(trial, [stage], 2)


@pytest.mark.method("K-28")
def test_the_projection_learns_with_the_student_and_frozen_layers_stay(teacher, batch):
    student, transfer = students.bilstm(teacher, 8, 6, 5), task_of(batch, "labelled")
    trial, projection = Trial(student, transfer, get("smoke")), extreme.Projection(12, 32)
    stage = extreme.xtreme_stages(LiveTeacher(teacher, (("cls", 1),)), 1, transfer, transfer, projection)[0]
    before = [p.detach().clone() for p in (projection.dense.weight, student.lstm.weight_hh_l0, student.embeddings.weight)]
    extreme.train_open(trial, [student.lstm], stage, 2, learning_rate=1e-2)
    after = (projection.dense.weight, student.lstm.weight_hh_l0, student.embeddings.weight)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True]
    student.lstm.requires_grad_(False)
    with extreme.unfrozen(student, [student.classifier]):
        assert student.classifier.weight.requires_grad and not student.hidden.weight.requires_grad
    assert student.hidden.weight.requires_grad and not student.lstm.weight_hh_l0.requires_grad
