"""Integers that compute: the same BERT in bfloat16, in torchao's int8, and in ONNX Runtime's int8.

Fake quantization is arithmetic in float32 on fewer values, and no faster. The engines here change the arithmetic: int8 weights
times activations that are quantized on the fly, row by row, with integer sums. Each is wrapped as an `Engine`, which predicts and
is timed like any model, so accuracy, bytes and milliseconds belong to one and the same thing. torchao, onnx, onnxscript and
onnxruntime are imported where they are used: a missing one is a CompanionError that names it.
"""

import contextlib
import importlib
import io
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch._inductor.config as inductor
from torch import nn
from transformers import BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from utils import CompanionError, bert

Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (input_ids, attention_mask) -> logits
INPUTS = ("input_ids", "attention_mask")


def optional(name: str) -> ModuleType:
    """Import a package that the suite can do without. Raises CompanionError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CompanionError(f"this comparison needs {name.split('.')[0]}, which is not installed here ({error})") from None


class Engine(nn.Module):
    """A finished classifier in whatever arithmetic: called like a BERT, it returns an object with float32 `.logits`.

    `nbytes` is the size of its files, `embedding_bytes` of them for the embeddings; `run(input_ids, attention_mask)` computes the
    logits. It cannot be trained.
    """

    def __init__(self, run: Run, config: BertConfig, nbytes: int, embedding_bytes: int):
        super().__init__()
        self.run, self.config, self.nbytes, self.embedding_bytes = run, config, nbytes, embedding_bytes
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # says on which device the inputs are wanted

    def stored(self) -> dict[str, int]:
        """What its own files take: an engine has no artifact of this suite."""
        return {"stored_bytes": self.nbytes, "stored_bytes_without_embeddings": self.nbytes - self.embedding_bytes}

    @torch.inference_mode()
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


def in_few_shapes(run: Run, longest: int, rows: int = 32, length: int = 32) -> Run:
    """Pad what comes to shapes that repeat: one sentence, or `rows` at a time; `length` tokens, or 2, 4, ... times that.

    A compiler writes better code for a shape that it knows, and takes seconds for each. Padding is masked, padded rows are
    dropped, and no row gets more than the `longest` tokens that the model takes.
    """

    def padded(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        given, columns = input_ids.shape
        total = 1 if given == 1 else rows * math.ceil(given / rows)
        width = min(longest, length * 2 ** math.ceil(math.log2(max(1, columns / length))))
        ids, mask = input_ids.new_zeros(total, width), attention_mask.new_zeros(total, width)
        ids[:given, :columns], mask[:given, :columns] = input_ids, attention_mask
        mask[given:] = 1  # a row without any token has no softmax
        return torch.cat([run(*part) for part in zip(ids.split(rows), mask.split(rows), strict=True)])[:given]

    return padded


def torch_engine(model: nn.Module, compiled: bool) -> Engine:
    """An engine around a torch model, which torch.compile may fuse, with its weights as constants that it lays out in advance.

    The first pass of a compiled engine in each of its few shapes takes ten seconds or so; it must not be changed afterwards.
    """

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return model(input_ids=input_ids, attention_mask=attention_mask).logits

    call = run
    if compiled:
        inductor.freezing = True  # torch.compile's `options` would not do: the tracer reads this switch itself
        fused = torch.compile(run, dynamic=False, isolate_recompiles=True)
        call = in_few_shapes(fused, model.config.max_position_embeddings)
    embedding_bytes = sum(p.nbytes for p in bert.embeddings(model).parameters())
    return Engine(call, model.config, state_bytes(model), embedding_bytes).to(next(model.parameters()).device)


def float_engine(model: nn.Module, dtype: torch.dtype = torch.bfloat16, compiled: bool = False) -> Engine:
    """All weights and products in another floating-point type: bfloat16 halves the file, float32 is the reference."""
    return torch_engine(bert.fresh_copy(model).to(dtype), compiled)


def torchao_int8(model: nn.Module, compiled: bool = True) -> Engine:
    """torchao: every linear layer gets int8 weights (one scale per output) and dynamic int8 activations (one per token).

    Embeddings stay in float32. Uncompiled, a single sentence is slower than in float32: its scales cost more than its products
    save. Raises CompanionError without torchao.
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


def quantize_onnx(source: Path, path: Path) -> None:
    """Dynamic int8: weights, embeddings included, are stored in 8 bits, and activations are quantized as they come."""
    onnx, quantization = optional("onnx"), optional("onnxruntime.quantization")
    graph = onnx.load(source)
    del graph.graph.value_info[:]  # shapes noted by the exporter contradict the quantized graph, and would stop the quantizer
    with _quiet():
        quantization.quantize_dynamic(graph, path)


def onnx_operators(path: Path) -> list[str]:
    """The operators of an exported graph: MatMulInteger says that integers are multiplied."""
    onnx = optional("onnx")
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


# ONNX Runtime adds the residual inside the normalisation, in one kernel that took 0.9 ms where a plain LayerNormalization took
# 0.1 (its own profiler, 1,024 tokens, ONNX Runtime 1.31): without this fusion int8 is a fifth faster.
DISABLED_FUSIONS = ("SkipLayerNormFusion",)


def onnx_runtime(path: Path, config: BertConfig, disabled: Sequence[str] = DISABLED_FUSIONS) -> Engine:
    """An exported graph of a model of that `config` in ONNX Runtime on the CPU, with as many threads as torch has.

    `disabled` names graph optimizations that are left out. `nbytes` counts the graph and the weights that lie beside it
    (`<name>.data`). Raises CompanionError without onnxruntime.
    """
    runtime = optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled))

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"input_ids": ids.cpu().numpy(), "attention_mask": mask.cpu().numpy()})
        return torch.from_numpy(logits)

    nbytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return Engine(run, config, nbytes, onnx_embedding_bytes(path))


def onnx_embedding_bytes(path: Path) -> int:
    """Bytes of an exported graph's weights that belong to the embeddings, in whatever type they are stored."""
    onnx = optional("onnx")
    return sum(math.prod(weight.dims) * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
               for weight in onnx.load(path, load_external_data=False).graph.initializer if "embeddings" in weight.name)  # fmt: skip
