"""Integers that compute: the same BERT in bfloat16, and in the int8 of torchao, ONNX Runtime and OpenVINO.

Fake quantization is arithmetic in float32 on fewer values, and no faster. The engines here change the arithmetic: int8 weights
times int8 activations, with integer sums. They differ in who shares a scale of the activations, and in when it is found: torchao
takes one per token and ONNX Runtime one per tensor, both as the numbers come; OpenVINO one per tensor, found beforehand on
calibration sentences. Each is wrapped as an `Engine`, which predicts and is timed like any model, so accuracy, bytes and
milliseconds belong to one and the same thing. The libraries are imported where they are used: a missing one is a CompanionError
that names it.
"""

import contextlib
import importlib
import io
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch._inductor.config as inductor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from utils import CompanionError, bert
from utils.costs import REST, Race
from utils.training import check_batches, steady_memory

Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (input_ids, attention_mask) -> logits
INPUTS = ("input_ids", "attention_mask")


def optional(name: str) -> ModuleType:
    """Import a package that the suite can do without. Raises CompanionError where it is not installed.

    OpenVINO and NNCF report their use to their makers over the network by a package of its own; here they find it missing.
    """
    sys.modules.setdefault("openvino_telemetry", None)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CompanionError(f"this comparison needs {name.split('.')[0]}, which is not installed here ({error})") from None


class Engine(nn.Module):
    """A finished classifier in whatever arithmetic: called like a BERT, it returns an object with float32 `.logits`.

    `nbytes` is the size of its files, `embedding_bytes` of them for the embeddings; `run(input_ids, attention_mask)` computes the
    logits; `integer_products` is how many of a pass's matrix products multiply integers. It cannot be trained.
    """

    def __init__(self, run: Run, config: BertConfig, nbytes: int, embedding_bytes: int, integer_products: int = 0):
        super().__init__()
        self.run, self.config, self.nbytes, self.embedding_bytes = run, config, nbytes, embedding_bytes
        self.integer_products = integer_products
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
    """Whether torch.compile finds the C++ compiler that it needs on a CPU, and its own headers where there is no blank in their path.

    It does not quote them (torch 2.13).
    """
    return shutil.which(os.environ.get("CXX", "g++")) is not None and " " not in torch.__file__


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


class _IntegerProducts(TorchDispatchMode):
    """Counts the products of integer matrices inside the block."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._int_mm.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def integer_products(model: nn.Module) -> int:
    """How many matrix products of one forward pass of a torch model multiply int8 by int8 (torch's `_int_mm`)."""
    ids = torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with _IntegerProducts() as products:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return products.count


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
    device, products = next(model.parameters()).device, integer_products(model)
    return Engine(call, model.config, state_bytes(model), embedding_bytes, products).to(device)


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


# --- one exported graph for the engines outside PyTorch -------------------------------------------------------------


class _Logits(nn.Module):
    """The exporter wants tensors in and a tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantizers warn about what is as it should be, and draw progress bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export_onnx(model: nn.Module, path: Path) -> None:
    """Write an ONNX graph for any batch size and length, which ONNX Runtime and OpenVINO read.

    By torch's older exporter, which records the operators of one pass: the graphs of both are as fast, and it takes a tenth of
    the time of the newer one (2 seconds instead of 20 for six layers).
    """
    optional("onnx")
    copy = bert.fresh_copy(model).float().cpu()
    ids = torch.ones(2, 8, dtype=torch.long)
    any_size = {0: "batch", 1: "length"}
    axes = {"input_ids": any_size, "attention_mask": any_size, "logits": {0: "batch"}}
    with bert.attention(copy, "eager"), _quiet():
        torch.onnx.export(_Logits(copy).eval(), (ids, torch.ones_like(ids)), path, input_names=list(INPUTS),
                          output_names=["logits"], dynamic_axes=axes, dynamo=False)  # fmt: skip


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------


def quantize_onnx(source: Path, path: Path, per_channel: bool = False) -> None:
    """Dynamic int8: weights, embeddings included, are stored in 8 bits, and activations are quantized as they come.

    A weight has one scale, or with `per_channel` one per output; an activation tensor has one scale either way. Where sums of products
    could overflow (`sums_saturate`), weights take 7 of the 8 bits, as ONNX Runtime advises.
    """
    onnx, quantization = optional("onnx"), optional("onnxruntime.quantization")
    with _quiet():
        quantization.quantize_dynamic(onnx.load(source), path, per_channel=per_channel, reduce_range=sums_saturate())


def sums_saturate(capabilities: dict | None = None) -> bool:
    """Whether this processor adds two products of 8-bit codes in 16 bits: x86 with AVX2 and without VNNI or AMX. The sum may not fit.

    `capabilities` are those that torch finds.
    """
    found = torch.cpu.get_capabilities() if capabilities is None else capabilities
    exact = any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return bool(found.get("avx2")) and not exact


def onnx_operators(path: Path) -> list[str]:
    """The operators of an exported graph: MatMulInteger says that integers are multiplied."""
    onnx = optional("onnx")
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


# ONNX Runtime adds the residual inside the normalisation, in one kernel that took 0.9 ms where a plain LayerNormalization took
# 0.1 (its own profiler, 1,024 tokens, ONNX Runtime 1.31): without this fusion int8 is a fifth faster.
DISABLED_FUSIONS = ("SkipLayerNormFusion",)


def onnx_session(path: Path, disabled: Sequence[str] = DISABLED_FUSIONS) -> object:
    """An `onnxruntime.InferenceSession` of an exported graph on the CPU, with as many threads as torch has."""
    runtime = optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled))


def onnx_runtime(path: Path, config: BertConfig, disabled: Sequence[str] = DISABLED_FUSIONS) -> Engine:
    """An exported graph of a model of that `config` in ONNX Runtime.

    `disabled` names graph optimizations that are left out. `nbytes` counts the graph and the weights that may lie beside it
    (`<name>.data`). Raises CompanionError without onnxruntime.
    """
    session = onnx_session(path, disabled)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"input_ids": ids.cpu().numpy(), "attention_mask": mask.cpu().numpy()})
        return torch.from_numpy(logits)

    nbytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return Engine(run, config, nbytes, onnx_embedding_bytes(path), onnx_operators(path).count("MatMulInteger"))


def onnx_embedding_bytes(path: Path) -> int:
    """Bytes of an exported graph's weights that belong to the embeddings, in whatever type they are stored."""
    onnx = optional("onnx")
    return sum(math.prod(weight.dims) * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
               for weight in onnx.load(path, load_external_data=False).graph.initializer if "embeddings" in weight.name)  # fmt: skip


# --- OpenVINO -------------------------------------------------------------------------------------------------------

INTEGERS = ("i8", "u8")  # OpenVINO's names of the types of a product


def quantize_openvino(source: Path, path: Path, batches: list[dict]) -> None:
    """Static int8 by NNCF, from an exported float32 graph to an OpenVINO model `path` (.xml, its weights beside it in .bin).

    The scales of the activations are found on the sentences of the batches, one by one and without their padding. The model type
    says what stays in float (softmax, normalisation) and turns SmoothQuant on: Xiao et al. 2022 divide channels of activations
    that dwarf the others by a number by which they multiply the weights. Raises ValueError without batches.
    """
    check_batches(batches)
    openvino, nncf = optional("openvino"), optional("nncf")
    sentences = [{"input_ids": ids[mask.bool()][None].cpu().numpy(), "attention_mask": mask[mask.bool()][None].cpu().numpy()}
                 for batch in batches for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    with _quiet():
        model = nncf.quantize(openvino.Core().read_model(source), nncf.Dataset(sentences), subset_size=len(sentences),
                              model_type=nncf.ModelType.TRANSFORMER)  # fmt: skip
    openvino.save_model(model, path, compress_to_fp16=False)


def openvino_computes(precision: str) -> bool:
    """Whether OpenVINO finds instructions for a type (`FP32`, `BF16`, `INT8`) on this processor."""
    return precision in optional("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino_compile(path: Path, precision: str = "f32") -> object:
    """A compiled OpenVINO model with as many threads as torch has; what is not int8 is computed in `precision`, f32 or bf16."""
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    return optional("openvino").Core().compile_model(path, "CPU", settings)


def openvino_runtime(path: Path, config: BertConfig, precision: str = "f32") -> Engine:
    """An exported graph (.onnx) or a quantized model (.xml) of that `config` in OpenVINO. Raises CompanionError without it."""
    compiled = openvino_compile(path, precision)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = compiled({"input_ids": ids.cpu().numpy(), "attention_mask": mask.cpu().numpy()})
        return torch.from_numpy(found[0].copy())  # the next pass writes into the same memory

    nbytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*") if file.suffix in (path.suffix, ".bin"))
    embeddings = openvino_embedding_bytes(optional("openvino").Core().read_model(path))
    return Engine(run, config, nbytes, embeddings, openvino_integer_products(compiled))


def openvino_integer_products(compiled: object) -> int:
    """How many matrix products of a compiled OpenVINO model multiply integers: its own report of the kernels that it chose."""
    kernels = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    said = [
        [kernel[name].astype(str) for name in ("layerType", "runtimePrecision")] for kernel in kernels if "layerType" in kernel
    ]
    return sum(layer in ("FullyConnected", "MatMul") and precision in INTEGERS for layer, precision in said)


def openvino_embedding_bytes(model: object) -> int:
    """Bytes of the constants of two dimensions that tables are looked up in, their scales included."""
    tables = [node.input_value(0).get_node() for node in model.get_ops() if node.get_type_name() == "Gather"]
    constants = {node.get_name(): node for table in tables for node in constants_above(table)}
    return sum(node.get_byte_size() for node in constants.values() if len(node.get_output_shape(0)) == 2)


def constants_above(node: object, steps: int = 8) -> list:
    """The constants that a node of an OpenVINO graph is computed from in a few `steps` (conversions, zero points, scales).

    None where anything else enters. Whoever follows more steps walks through the layers, where paths double with every residual.
    """
    if node.get_type_name() == "Constant":
        return [node]
    above = []
    for value in node.input_values() if steps else ():
        found = constants_above(value.get_node(), steps - 1)
        if not found:
            return []
        above += found
    return above


# --- measuring ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def batch_dependence(model: nn.Module, batch: dict) -> float:
    """The largest difference between a sentence's logits in a padded batch and its logits alone, without padding.

    Zero, but for rounding, wherever a sentence's numbers have scales of their own, or fixed ones.
    """
    together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = [mask.bool() for mask in batch["attention_mask"]]
    alone = [model(input_ids=ids[row][None], attention_mask=row[row][None].long()).logits
             for ids, row in zip(batch["input_ids"], rows, strict=True)]  # fmt: skip
    return (together.float() - torch.cat(alone).float()).abs().max().item()


def race_over(models: dict[str, nn.Module], batches: list[dict], rounds: int, rest: float = REST) -> Race:
    """Seconds that each model takes for the same real batches, all models in turns, each round beginning with the next one.

    The baseline is among the models, under the name `Race.BASELINE`. `rest` see `costs.interleaved_seconds`.
    """
    names, seconds = list(models), {name: [] for name in models}
    with steady_memory(), torch.inference_mode():
        for round_number in range(rounds):
            for turn in range(len(names)):
                name = names[(turn + round_number) % len(names)]
                time.sleep(rest)
                start = time.perf_counter()
                for batch in batches:
                    models[name](input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                seconds[name].append(time.perf_counter() - start)
    return Race(seconds, len(batches[0]["input_ids"]))
