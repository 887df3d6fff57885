"""Integers that compute: the same BERT in bfloat16, in torchao's int8, and in ONNX Runtime's int8.

Fake quantization is arithmetic in float32 on fewer values, and no faster. The engines here change the arithmetic: int8 weights
times activations that are quantized on the fly, row by row, with integer sums. Each is wrapped as an `Engine`, which predicts and
is timed like any model, so accuracy, bytes and milliseconds belong to one and the same thing. torchao, onnx, onnxscript and
onnxruntime are imported where they are used: a missing one is a CompanionError that names it.
"""

import contextlib
import functools
import importlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from utils import CompanionError, bert

INPUTS = ("input_ids", "attention_mask")


def optional(name: str) -> ModuleType:
    """Import a package that the suite can do without. Raises CompanionError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CompanionError(f"this comparison needs {name.split('.')[0]}, which is not installed here ({error})") from None


class Engine(nn.Module):
    """A finished classifier in whatever arithmetic: called like a BERT, it returns an object with float32 `.logits`.

    `nbytes` is the size of its files; `run(input_ids, attention_mask)` computes the logits. It cannot be trained.
    """

    def __init__(self, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], config: BertConfig, nbytes: int):
        super().__init__()
        self.run, self.config, self.nbytes = run, config, nbytes
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # says on which device the inputs are wanted

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> SequenceClassifierOutput:
        """Logits of shape (batch, classes). Mixed precision around the call is off inside: the engine has a precision."""
        with torch.autocast(input_ids.device.type, enabled=False):
            return SequenceClassifierOutput(logits=self.run(input_ids, attention_mask).float())


def can_compile() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def state_bytes(model: nn.Module) -> int:
    """Bytes of the file that `torch.save` would write of the weights (it is only counted, never kept)."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def torch_engine(model: nn.Module, compiled: bool) -> Engine:
    """An engine around a torch model, which torch.compile may fuse. The first calls of a compiled engine take a minute."""
    call = torch.compile(model) if compiled else model
    engine = Engine(lambda ids, mask: call(input_ids=ids, attention_mask=mask).logits, model.config, state_bytes(model))
    return engine.to(next(model.parameters()).device)


def float_engine(model: nn.Module, dtype: torch.dtype = torch.bfloat16, compiled: bool = False) -> Engine:
    """All weights and products in another floating-point type: bfloat16 halves the file, float32 is the reference."""
    return torch_engine(bert.fresh_copy(model).to(dtype), compiled)


def torchao_int8(model: nn.Module, compiled: bool = True) -> Engine:
    """torchao: every linear layer gets int8 weights (one scale per output) and dynamic int8 activations (one per token).

    Embeddings stay in float32. Uncompiled it is slower than float32: only the fused kernels pay. Raises CompanionError without
    torchao.
    """
    quantization = optional("torchao.quantization")
    copy = bert.fresh_copy(model).float()
    quantization.quantize_(copy, quantization.Int8DynamicActivationInt8WeightConfig())
    return torch_engine(copy, compiled)


class _Logits(nn.Module):
    """The exporter wants tensors in and a tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantizer warn about what is as it should be."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export_onnx(model: nn.Module, path: Path) -> None:
    """Write an ONNX graph for any batch size and length (the exporter may put weights into a second file beside it)."""
    optional("onnxscript")
    copy = bert.fresh_copy(model).float().cpu()
    ids, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)  # one sentence would freeze the batch size
    mask[1, 5:] = 0  # and an example without padding would lose the mask
    shape = {0: "batch", 1: "length"}
    with bert.attention(copy, "eager"), _quiet():
        program = torch.onnx.export(_Logits(copy).eval(), (ids, mask), input_names=INPUTS, output_names=["logits"],
                                    dynamic_shapes=dict.fromkeys(INPUTS, shape), dynamo=True, verbose=False)  # fmt: skip
        program.save(path)


@functools.lru_cache(maxsize=1)
def _exported(model: nn.Module, fingerprint: str) -> tempfile.TemporaryDirectory:
    """A folder with the model's graph. Exporting takes seconds, and the float and the int8 engine start from one graph."""
    folder = tempfile.TemporaryDirectory()
    export_onnx(model, Path(folder.name) / "model.onnx")
    return folder


def quantize_onnx(source: Path, path: Path, per_channel: bool = False) -> None:
    """Dynamic int8: weights, embeddings included, are stored in 8 bits, and activations are quantized as they come."""
    onnx, quantization = optional("onnx"), optional("onnxruntime.quantization")
    graph = onnx.load(source)
    del graph.graph.value_info[:]  # shapes noted by the exporter contradict the quantized graph, and would stop the quantizer
    with _quiet():
        quantization.quantize_dynamic(graph, path, per_channel=per_channel)


def onnx_operators(folder: Path) -> list[str]:
    """The operators of an exported graph: MatMulInteger says that integers are multiplied."""
    onnx = optional("onnx")
    return [node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]


def onnx_runtime(model: nn.Module, folder: Path, int8: bool = True, per_channel: bool = False) -> Engine:
    """ONNX Runtime on the CPU, with as many threads as torch has; int8 by `quantize_onnx`, else float32.

    The graph goes to `folder`, whose older .onnx files are replaced; `nbytes` counts all of its files. Raises CompanionError
    without onnx, onnxscript and onnxruntime.
    """
    runtime = optional("onnxruntime")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.onnx*"):
        stale.unlink()
    exported = Path(_exported(model, bert.fingerprint(model)).name)
    if int8:
        quantize_onnx(exported / "model.onnx", folder / "model.onnx", per_channel)
    else:
        for file in exported.iterdir():
            shutil.copy(file, folder)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"input_ids": ids.cpu().numpy(), "attention_mask": mask.cpu().numpy()})
        return torch.from_numpy(logits)

    return Engine(run, model.config, sum(file.stat().st_size for file in folder.glob("*.onnx*")))
