"""Integer engines against float32: same answers, integers inside, as many threads as torch, and no word to anybody outside."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from torch import nn

from utils import CompanionError
from utils.costs import Race
from utils.quantization import integer


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def linears(model) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.modules())


def check_engine(engine, tiny, batch, tolerance):
    found = engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    expected = logits(tiny, batch)
    assert found.shape == expected.shape and engine.nbytes > 0
    assert 0 < (found - expected).abs().max() < tolerance


def test_bfloat16_halves_the_bytes(tiny, batch):
    engine = integer.float_engine(tiny)
    check_engine(engine, tiny, batch, 0.02)
    assert engine.nbytes < 0.6 * integer.float_engine(tiny, torch.float32).nbytes
    assert tiny.dtype == torch.float32


def test_torchao_int8_linears_are_integers_and_close(tiny, batch):
    engine = integer.torchao_int8(tiny, compiled=False)
    check_engine(engine, tiny, batch, 0.05)
    plain = integer.float_engine(tiny, torch.float32)
    assert type(tiny.classifier.weight) is nn.Parameter and engine.nbytes < plain.nbytes
    assert engine.integer_products == linears(tiny) and plain.integer_products == 0


@pytest.mark.skipif(not integer.can_compile(), reason="torch.compile needs a C++ compiler, and a path without blanks")
def test_a_compiled_engine_computes_the_same_logits_at_any_length(tiny, batch):
    engine = integer.float_engine(tiny, torch.float32, compiled=True)
    torch.testing.assert_close(engine(**batch).logits, logits(tiny, batch), atol=1e-4, rtol=1e-3)
    short = {name: value[:, :5] if value.dim() == 2 else value for name, value in batch.items()}
    torch.testing.assert_close(engine(**short).logits, logits(tiny, short), atol=1e-4, rtol=1e-3)


def test_compiling_needs_a_compiler_and_a_path_without_blanks(monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/home/me/torch/__init__.py")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not integer.can_compile()
    monkeypatch.setenv("CXX", sys.executable)
    assert integer.can_compile()
    monkeypatch.setattr(torch, "__file__", "/home/me/a clone/torch/__init__.py")
    assert not integer.can_compile()


def test_a_missing_engine_is_named():
    with pytest.raises(CompanionError, match="needs no_such_engine"):
        integer.optional("no_such_engine.quantization")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model, exported once for the whole file, with its int8 graphs for both engines."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model, folder = BertForSequenceClassification(config).eval(), tmp_path_factory.mktemp("graphs")
    ids = torch.randint(1, 100, (8, 9))
    mask = (torch.arange(9) < torch.tensor([9, 8, 7, 6, 5, 4, 3, 9])[:, None]).long()
    integer.export_onnx(model, folder / "float32.onnx")
    integer.quantize_onnx(folder / "float32.onnx", folder / "tensor.onnx")
    integer.quantize_onnx(folder / "float32.onnx", folder / "channel.onnx", per_channel=True)
    integer.quantize_openvino(folder / "float32.onnx", folder / "int8.xml", [{"input_ids": ids * mask, "attention_mask": mask}])
    return model, folder


def test_one_export_serves_both_engines_at_any_batch_and_length(files, batch):
    model, folder = files
    short = {name: value[:1, :5] if value.dim() == 2 else value[:1] for name, value in batch.items()}
    for load in (integer.onnx_runtime, integer.openvino_runtime):
        engine = load(folder / "float32.onnx", model.config)
        for given in (batch, short):
            torch.testing.assert_close(engine(**given).logits, logits(model, given), atol=1e-4, rtol=0)
        assert engine.integer_products == 0
        assert engine.nbytes == sum(file.stat().st_size for file in folder.glob("float32.onnx*"))
        tables = 4 * sum(p.numel() for p in model.bert.embeddings.parameters())
        assert tables * 0.9 < engine.embedding_bytes <= tables


def test_the_export_needs_no_second_exporter(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    integer.export_onnx(tiny, tmp_path / "float32.onnx")
    assert "MatMul" in integer.onnx_operators(tmp_path / "float32.onnx")


def test_int8_engines_are_close_small_and_multiply_integers(files, batch):
    model, folder = files
    plain = integer.onnx_runtime(folder / "float32.onnx", model.config)
    engines = {
        "tensor": integer.onnx_runtime(folder / "tensor.onnx", model.config),
        "channel": integer.onnx_runtime(folder / "channel.onnx", model.config),
        "openvino": integer.openvino_runtime(folder / "int8.xml", model.config),
    }
    short = {name: value[:1, :5] if value.dim() == 2 else value[:1] for name, value in batch.items()}
    for engine in engines.values():
        check_engine(engine, model, batch, 0.05)
        check_engine(engine, model, short, 0.05)
        assert engine.integer_products >= linears(model)
        assert engine.embedding_bytes < 0.5 * plain.embedding_bytes
    assert engines["tensor"].nbytes < engines["channel"].nbytes < plain.nbytes
    assert engines["openvino"].nbytes == sum((folder / f"int8.{end}").stat().st_size for end in ("xml", "bin"))


def test_openvino_computes_in_the_precision_that_it_is_asked_for(files, monkeypatch):
    _, folder = files
    assert integer.openvino_computes("FP32") and not integer.openvino_computes("no such type")
    compiled = integer.openvino_compile(folder / "float32.onnx")
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    asked = []  # a processor without bfloat16 falls back to float32, and processors with it would not compute in float32 by themselves

    class Core:
        def compile_model(self, path, device, settings):
            asked.append((device, settings["INFERENCE_PRECISION_HINT"]))

    monkeypatch.setattr(integer, "optional", lambda name: SimpleNamespace(Core=Core))
    integer.openvino_compile(folder / "float32.onnx")
    integer.openvino_compile(folder / "float32.onnx", "bf16")
    assert asked == [("CPU", "f32"), ("CPU", "bf16")]


@pytest.mark.method("Q-16")
def test_engines_get_as_many_threads_as_torch(files, monkeypatch):
    model, folder = files
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    session = integer.onnx_session(folder / "float32.onnx")
    assert isinstance(session, onnxruntime.InferenceSession) and session.get_session_options().intra_op_num_threads == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert integer.openvino_compile(folder / "float32.onnx").get_property("INFERENCE_NUM_THREADS") == 1
    asked = []
    monkeypatch.setattr(integer, "onnx_session", lambda path, disabled: asked.append((path.name, *disabled)) or session)
    integer.onnx_runtime(folder / "float32.onnx", model.config)
    assert asked == [("float32.onnx", "SkipLayerNormFusion")]


def test_smoothquant_calibrates_on_sentences_without_their_padding(files, tmp_path, monkeypatch):
    import nncf

    _, folder = files
    seen = {}

    def quantize(graph, dataset, **options):
        seen.update(options, lengths=[item["input_ids"].shape for item in dataset.get_inference_data()])
        return graph

    monkeypatch.setattr(nncf, "quantize", quantize)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    integer.quantize_openvino(
        folder / "float32.onnx", tmp_path / "int8.xml", [{"input_ids": mask * 7, "attention_mask": mask}] * 2
    )
    assert seen["lengths"] == [(1, 3), (1, 2)] * 2
    assert seen["subset_size"] == 4 and seen["model_type"] == nncf.ModelType.TRANSFORMER
    with pytest.raises(ValueError, match="no calibration batches"):
        integer.quantize_openvino(folder / "float32.onnx", tmp_path / "int8.xml", [])


QUIET = """
import sys, torch
from pathlib import Path
from utils.quantization import integer

def seen():
    places = (torch, torch.Tensor, torch.nn.functional)
    return {(place.__name__, name): id(value) for place in places for name, value in vars(place).items()}

folder, mask, before = Path(sys.argv[1]), torch.ones(1, 4, dtype=torch.long), seen()
assert not {"openvino", "nncf", "onnxruntime"} & set(sys.modules), "imported before it was asked for"
integer.quantize_openvino(folder / "float32.onnx", folder / "quiet.xml", [{"input_ids": mask, "attention_mask": mask}])
after = seen()
assert not [name for name in before if before[name] != after.get(name)], "torch was patched"
"""


def test_openvino_and_nncf_send_nothing_and_leave_torch_alone(files, tmp_path):
    """In a process of its own: NNCF keeps silent under pytest anyway, and what it did to torch would stay."""
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", QUIET, str(files[1])], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "intel").exists()  # where the reporting package writes its number for this user
    assert "telemetry" not in run.stdout + run.stderr


def test_only_one_scale_per_tensor_makes_a_sentence_depend_on_its_batch(files, batch):
    model, folder = files
    found = {
        "float32": integer.onnx_runtime(folder / "float32.onnx", model.config),
        "ONNX Runtime": integer.onnx_runtime(folder / "channel.onnx", model.config),
        "OpenVINO": integer.openvino_runtime(folder / "int8.xml", model.config),
    }
    moved = {name: integer.batch_dependence(engine, batch) for name, engine in found.items()}
    assert moved["float32"] < 1e-5 and moved["OpenVINO"] < moved["ONNX Runtime"] / 2 and moved["ONNX Runtime"] > 1e-4


def test_a_race_over_real_batches_takes_turns_and_sees_all_of_them(batch):
    log = []

    class Model(nn.Module):
        def __init__(self, name, seconds):
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, input_ids, attention_mask):
            log.append((self.name, tuple(input_ids.shape), torch.is_inference_mode_enabled()))
            time.sleep(self.seconds)

    models = {Race.BASELINE: Model("a", 0.02), "half": Model("b", 0.01)}
    short = {name: value[:2] for name, value in batch.items()}
    race = integer.race_over(models, [batch, short], rounds=3, rest=0.0)
    assert 1.5 < race["half"].value < 2.5 and race.batch == 4 and len(race.rounds["half"]) == 3
    both = [(4, 9), (2, 9)]
    assert log == [(name, shape, True) for name in "abbaab" for shape in both]


def test_left_out_fusions_change_kernels_and_no_logits(files, batch):
    model, folder = files
    parts, fused = (
        integer.onnx_runtime(folder / "float32.onnx", model.config, disabled) for disabled in (["SkipLayerNormFusion"], [])
    )
    torch.testing.assert_close(parts(**batch).logits, fused(**batch).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("given", "columns", "expected"), [(1, 5, (1, 8)), (3, 8, (4, 8)), (4, 9, (4, 16)), (9, 18, (4, 20))])
def test_padding_repeats_shapes_and_changes_no_logits(tiny, given, columns, expected):
    shapes = []

    def run(ids, mask):
        shapes.append(tuple(ids.shape))
        return tiny(input_ids=ids, attention_mask=mask).logits

    torch.manual_seed(0)
    ids = torch.randint(1, tiny.config.vocab_size, (given, columns))
    mask = torch.ones_like(ids)
    mask[0, columns // 2 :] = 0
    with torch.inference_mode():
        padded = integer.in_few_shapes(run, longest=20, rows=4, length=8)(ids, mask)
        torch.testing.assert_close(padded, run(ids, mask), atol=1e-5, rtol=1e-4)
    assert set(shapes[:-1]) == {expected}


@pytest.mark.method("Q-16")
@pytest.mark.parametrize(("found", "saturates"), [
    ({"avx2": True}, True), ({"avx2": True, "avx512_vnni": True}, False), ({"avx2": True, "avx_vnni": True}, False),
    ({"avx2": True, "amx_int8": True}, False), ({"sve": True}, False), ({}, False)])  # fmt: skip
def test_weights_take_seven_bits_where_sums_of_products_could_overflow(found, saturates):
    assert integer.sums_saturate(found) is saturates


class FakeNode:
    """A node of a graph: its kind and what enters it; counts how often it is looked at."""

    looks = 0

    def __init__(self, kind, *inputs):
        self.kind, self.inputs = kind, inputs

    def get_type_name(self):
        FakeNode.looks += 1
        return self.kind

    def input_values(self):
        return [type("Value", (), {"get_node": lambda value, node=node: node})() for node in self.inputs]


@pytest.mark.method("Q-16")
def test_constants_are_looked_for_nearby_and_not_along_every_path_through_the_layers():
    table, scale = FakeNode("Constant"), FakeNode("Constant")
    assert integer.constants_above(FakeNode("Multiply", FakeNode("Convert", table), scale)) == [table, scale]
    state = FakeNode("Parameter")
    assert integer.constants_above(FakeNode("Gather", state, table)) == []
    for _ in range(60):  # layers with a residual: twice as many paths with each
        state = FakeNode("Add", state, state)
    FakeNode.looks = 0
    assert integer.constants_above(state) == [] and FakeNode.looks < 1000
