"""Packing is exact, files reload in a fresh process, and a damaged or foreign file is a clear error."""

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import fresh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from utils import CompanionError, artifacts, contract, costs, encodings, header, parts, structure
from utils.artifacts import ArtifactError
from utils.encodings import Encoded, EncodingError, decode
from utils.parts import depth, embeddings
from utils.parts.room import Room
from utils.pruning import masks
from utils.pruning.magnitude import magnitude_masks, random_masks
from utils.structure import remove_heads, remove_layers, remove_neurons


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
def test_packed_bits_come_back_and_take_their_bits(bits, values):
    codes = torch.tensor([value % 2**bits for value in values], dtype=torch.uint8)
    packed = encodings.pack_bits(codes, bits)
    assert packed.numel() == math.ceil(len(values) * bits / 8)
    assert torch.equal(encodings.unpack_bits(packed, bits, len(values)), codes)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        encodings.pack_bits(torch.tensor([4]), 2)
    with pytest.raises(ValueError, match="1 to 8"):
        encodings.pack_bits(torch.tensor([0]), 9)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 40), st.floats(0, 1), st.integers(1, 8), st.integers(0, 999))
@pytest.mark.method("P-03")
def test_sparse_encodings_are_exact(rows, columns, sparsity, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, columns, generator=generator)
    tensor[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    for item in (encodings.bitmap(tensor), encodings.index_difference(tensor, bits), encodings.sparse(tensor)):
        assert torch.equal(decode(item), tensor)
    assert encodings.sparse(tensor).nbytes <= encodings.dense(tensor).nbytes


def test_bitmap_bytes_match_the_formula_and_index_differences_win_when_very_sparse():
    tensor = torch.zeros(1000, 100)
    kept = torch.randperm(100_000)[:3000]
    tensor.view(-1)[kept] = 1.5
    assert encodings.bitmap(tensor).nbytes == 100_000 // 8 + 4 * 3000
    assert encodings.sparse(tensor).encoding == "index_difference"
    assert encodings.sparse(tensor).nbytes < encodings.bitmap(tensor).nbytes


def test_index_difference_bridges_long_gaps_with_stored_zeros():
    tensor = torch.zeros(1, 20)
    tensor[0, 9] = 2.0
    item = encodings.index_difference(tensor, 2)  # gap 9 = 2 * 4 + 1: two fillers
    assert item.parts["values"].tolist() == [0.0, 0.0, 2.0]
    assert encodings.unpack_bits(item.parts["gaps"], 2, 3).tolist() == [3, 3, 1]
    assert torch.equal(decode(item), tensor)


def test_uniform_codebook_and_factors_decode_to_their_definition():
    codes = torch.arange(12).view(3, 4) % 8
    scale, zero = torch.rand(3, 2), torch.rand(3, 2)
    expected = (codes.view(3, 2, 2) - zero[..., None]) * scale[..., None]
    assert torch.equal(decode(encodings.uniform(codes, scale, zero, 3)), expected.view(3, 4))
    centroids, indices = torch.randn(4, 2), torch.randint(0, 4, (3, 5))
    assert torch.equal(decode(encodings.codebook(indices, centroids, (3, 10), 2)), centroids[indices].view(3, 10))
    left, right = torch.randn(3, 2), torch.randn(2, 5)
    assert torch.equal(decode(encodings.factors(left, right)), left @ right)


def test_a_pruned_and_shrunk_model_reloads_in_a_fresh_process(tiny, batch, tmp_path):
    masks.apply_masks(tiny, magnitude_masks(tiny, 0.7))
    remove_neurons(tiny, {0: torch.arange(10), 1: torch.arange(0)})
    remove_heads(tiny, {0: torch.tensor([True, False, True, False]), 1: torch.zeros(4, dtype=torch.bool)})
    path = tmp_path / "model.safetensors"
    stored = artifacts.save(tiny, path)
    assert stored["stored_bytes"] == path.stat().st_size > stored["stored_bytes_without_embeddings"]
    program = (
        "import json, sys, torch; from utils import artifacts; ids, mask = json.loads(sys.argv[2]);"
        "model = artifacts.load(sys.argv[1]);"
        "print(json.dumps(model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.tolist()))"
    )
    given = json.dumps([batch["input_ids"].tolist(), batch["attention_mask"].tolist()])
    done = subprocess.run([sys.executable, "-c", program, str(path), given], capture_output=True, text=True, check=True)
    here = tiny(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), here, atol=1e-6, rtol=1e-5)


def test_removed_layers_reload(tiny, batch, tmp_path):
    remove_layers(tiny, [1])
    artifacts.save(tiny, tmp_path / "m")
    reloaded = artifacts.load(tmp_path / "m")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert len(reloaded.bert.encoder.layer) == 1
    assert torch.equal(reloaded(**inputs).logits, tiny(**inputs).logits)


def test_tied_tensors_are_stored_once(tiny, tmp_path):
    untied = artifacts.save(tiny, tmp_path / "untied")["stored_bytes"]
    first, second = (layer.intermediate.dense for layer in tiny.bert.encoder.layer)
    second.weight = first.weight
    tied = artifacts.save(tiny, tmp_path / "tied")["stored_bytes"]
    assert untied - tied == pytest.approx(first.weight.nbytes, abs=300)
    assert torch.equal(artifacts.load(tmp_path / "tied").bert.encoder.layer[1].intermediate.dense.weight, first.weight)


def test_sparser_is_smaller(tiny, tmp_path):
    sizes = []
    for sparsity in (0.0, 0.5, 0.9):
        model = type(tiny)(tiny.config)
        model.load_state_dict(tiny.state_dict())
        masks.apply_masks(model, random_masks(model, sparsity))
        sizes.append(artifacts.save(model, tmp_path / f"{sparsity}")["stored_bytes"])
    assert sizes[0] > sizes[1] > sizes[2]


def test_damaged_files_are_clear_errors(tiny, tmp_path):
    path = tmp_path / "m"
    artifacts.save(tiny, path)
    whole = path.read_bytes()
    for damaged, message in ((whole[:-100], "damaged"), (b"not a model", "damaged"), (b"", "damaged"),
                             (whole[:-5] + bytes([whole[-5] ^ 255]) + whole[-4:], "checksum")):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=message):
            artifacts.load(path)


def test_foreign_and_missing_files_are_clear_errors(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ArtifactError, match="not an artifact of this suite"):
        artifacts.load(tmp_path / "foreign")
    with pytest.raises(ArtifactError, match="no artifact"):
        artifacts.load(tmp_path / "missing")


def test_a_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save(Bomb(), tmp_path / "bomb")
    with pytest.raises(ArtifactError):
        artifacts.load(tmp_path / "bomb")
    assert not (tmp_path / "executed").exists()


def test_an_encoding_for_an_unknown_tensor_is_refused(tiny, tmp_path):
    with pytest.raises(ArtifactError, match="does not have"):
        artifacts.save(tiny, tmp_path / "m", {"nonsense": encodings.dense(torch.zeros(1))})


FORMAT_1 = Path(__file__).with_name("format1.safetensors")


def test_an_artifact_of_the_first_format_still_loads():
    """Two heads of four, ten neurons of 24, two layers of three, and six encodings, written by the first edition."""
    expected = json.loads(FORMAT_1.with_suffix(".json").read_text())
    with pytest.warns(UserWarning, match="checksum leaves out the header"):
        model = artifacts.load(FORMAT_1)
    inputs = {name: torch.tensor(expected[name]) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**inputs).logits, torch.tensor(expected["logits"]), atol=1e-6, rtol=0)
    assert structure.describe(model) == [{"heads": 2, "neurons": 24}, {"heads": 4, "neurons": 10}]


def test_a_changed_header_is_noticed(tiny, tmp_path):
    """Another head count or epsilon would load without complaint and predict something else."""
    artifacts.save(tiny, tmp_path / "m")
    raw = (tmp_path / "m").read_bytes()
    for old, new in ((b'num_attention_heads\\": 4', b'num_attention_heads\\": 8'), (b'\\"layers\\"', b'\\"Layers\\"')):
        assert raw.count(old) == 1
        (tmp_path / "changed").write_bytes(raw.replace(old, new))
        with pytest.raises(ArtifactError, match="checksum"):
            artifacts.load(tmp_path / "changed")


def test_tied_parameters_are_one_parameter_again(tiny, tmp_path):
    structure.tie(tiny, "bert.encoder.layer.1", "bert.encoder.layer.0")
    artifacts.save(tiny, tmp_path / "m")
    first, second = artifacts.load(tmp_path / "m").bert.encoder.layer
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert costs.parameter_counts(artifacts.load(tmp_path / "m")) == costs.parameter_counts(tiny)


def test_an_attention_that_no_file_can_name_is_refused(tiny, tmp_path):
    tiny.config._attn_implementation = "flex_attention"
    with pytest.raises(ArtifactError, match="cannot name the attention"):
        artifacts.save(tiny, tmp_path / "m")


def test_a_part_of_unknown_kind_is_a_clear_error(tiny, tmp_path, monkeypatch):
    tiny.classifier = parts.LowRankLinear.from_linear(tiny.classifier, 1)
    artifacts.save(tiny, tmp_path / "m")
    monkeypatch.delitem(parts.PARTS, "low_rank_linear")
    with pytest.raises(CompanionError, match="unknown part 'low_rank_linear'"):
        artifacts.load(tmp_path / "m")


@pytest.mark.parametrize("encoding", sorted(encodings.DECODERS))
def test_every_encoding_loads_in_a_process_that_imports_only_artifacts(encoding, tiny, tmp_path):
    """Decoders once registered by importing a chapter: files of product, residual, multi-bit and outlier codes did not load."""
    name, shape = "bert.encoder.layer.0.attention.self.query.weight", (32, 32)
    weight = tiny.get_parameter(name)
    codes, centroids = torch.randint(0, 4, (1024,)), torch.randn(4, 1)
    item = {
        "dense": lambda: encodings.dense(weight),
        "bitmap": lambda: encodings.bitmap(weight),
        "index_difference": lambda: encodings.index_difference(weight, 4),
        "uniform": lambda: encodings.uniform(codes.view(shape), torch.rand(32, 1), torch.rand(32, 1), 2),
        "codebook": lambda: encodings.codebook(codes, centroids, shape, 2),
        "factors": lambda: encodings.factors(torch.randn(32, 2), torch.randn(2, 32)),
        "product": lambda: encodings.product(torch.randint(0, 4, (8, 32)), torch.randn(8, 4, 4), shape, 2),
        "residual": lambda: encodings.residual(torch.randint(0, 4, (2, 128)), torch.randn(2, 4, 8), shape, 2),
        "multi_bit": lambda: encodings.multi_bit(torch.randn(32, 2, 32).sign(), torch.rand(32, 2), shape),
        "outliers": lambda: encodings.outliers(codes, centroids.flatten(), torch.tensor([5, 900]), weight.detach(), 2),
    }[encoding]()
    with torch.no_grad():
        weight.copy_(decode(item))
    artifacts.save(tiny, tmp_path / "m.safetensors", {name: item})
    contract.write(tmp_path / "m.safetensors", tiny, 6)
    assert fresh.broken(tmp_path) == {}


# --- decoding -------------------------------------------------------------------------------------------------------

BYTES = torch.zeros(2, dtype=torch.uint8)
ONE, FOUR = torch.ones(1), torch.ones(4)
MISFITS = {
    "an encoding that there is not": Encoded("pickle", (4,), {"values": FOUR}),
    "a part too many": Encoded("dense", (4,), {"values": FOUR, "more": FOUR}),
    "no part": Encoded("dense", (4,)),
    "another shape": Encoded("dense", (2, 2), {"values": FOUR}),
    "a value for many places": Encoded("bitmap", (16,), {"bitmap": BYTES + 255, "values": ONE}),
    "one value for two gaps": Encoded("index_difference", (16,), {"gaps": BYTES, "values": ONE}, {"bits": 8, "count": 2}),
    "a gap beyond the end": Encoded(
        "index_difference", (16,), {"gaps": BYTES + 9, "values": torch.ones(2)}, {"bits": 8, "count": 2}
    ),
    "bits of 0": Encoded("codebook", (2,), {"codes": BYTES, "centroids": torch.ones(1, 1)}, {"bits": 0, "count": 2}),
    "bits of 64": Encoded("codebook", (2,), {"codes": BYTES, "centroids": torch.ones(1, 1)}, {"bits": 64, "count": 2}),
    "bits that are a truth value": Encoded(
        "codebook", (2,), {"codes": BYTES, "centroids": torch.ones(1, 1)}, {"bits": True, "count": 2}
    ),
    "a code beyond the codebook": Encoded(
        "codebook", (2,), {"codes": BYTES + 1, "centroids": torch.ones(1, 1)}, {"bits": 8, "count": 2}
    ),
    "codes that fill less": Encoded("codebook", (3,), {"codes": BYTES, "centroids": torch.ones(1, 1)}, {"bits": 8, "count": 2}),
    "no ranges": Encoded("uniform", (1, 2), {"codes": BYTES, "scale": torch.ones(1, 0), "zero": torch.ones(1, 0)}, {"bits": 8}),
    "ranges that do not divide": Encoded(
        "uniform", (1, 2), {"codes": BYTES, "scale": torch.ones(1, 3), "zero": torch.ones(1, 3)}, {"bits": 8}
    ),
    "a position before the first": Encoded(
        "outliers", (2,), {"codes": BYTES, "centroids": ONE, "positions": torch.tensor([-1]), "values": ONE}, {"bits": 8}
    ),
    "an axis that there is not": Encoded(
        "product", (2, 1), {"codes": BYTES, "centroids": torch.ones(1, 1, 1)}, {"bits": 8, "axis": "depth"}
    ),
    "blocks that do not divide": Encoded(
        "product", (1, 5), {"codes": BYTES, "centroids": torch.ones(1, 1, 2)}, {"bits": 8, "axis": "columns"}
    ),
    "vectors that do not divide": Encoded("residual", (5,), {"codes": BYTES, "centroids": torch.ones(1, 1, 2)}, {"bits": 8}),
    "scales of other rows": Encoded("multi_bit", (2, 4), {"codes": BYTES, "alpha": torch.ones(3, 1)}),
    "factors of other ranks": Encoded("factors", (2, 2), {"left": torch.ones(2, 3), "right": torch.ones(2, 2)}),
    "codes that are no bytes": Encoded("codebook", (2,), {"codes": FOUR, "centroids": torch.ones(1, 1)}, {"bits": 8, "count": 2}),
    "a tie": Encoded("tied", (4,), meta={"to": "x"}),
}


@pytest.mark.parametrize("what", MISFITS)
def test_parts_that_do_not_fit_are_refused(what):
    with pytest.raises(EncodingError):
        decode(MISFITS[what])


def test_long_sums_of_residual_vectors_are_added_up_in_pieces(monkeypatch):
    item = encodings.residual(torch.randint(0, 4, (3, 100)), torch.randn(3, 4, 8), (20, 40), 2)
    whole = decode(item)
    monkeypatch.setattr(encodings, "AT_ONCE", 100)
    assert torch.equal(decode(item), whole)


def test_a_dense_tensor_keeps_the_sign_of_its_zeros():
    tensor = torch.ones(64).index_fill(0, torch.tensor([3]), -0.0)
    assert torch.equal(decode(encodings.sparse(tensor)).signbit(), tensor == 0)


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_text_names_a_file_and_missing_folders_are_made(tiny, tmp_path):
    path = tmp_path / "a" / "b" / "m.safetensors"
    assert artifacts.save(tiny, str(path))["stored_bytes"] == path.stat().st_size
    assert torch.equal(artifacts.load(str(path)).classifier.weight, tiny.classifier.weight)
    assert artifacts.read(str(path))[1].keys() == tiny.state_dict().keys()


def test_a_place_that_cannot_be_written_is_a_clear_error(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "file" / "m"):
        with pytest.raises(ArtifactError, match="cannot be written"):
            artifacts.save(tiny, place)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifacts, "save_file", full)
    with pytest.raises(ArtifactError, match="No space left"):
        artifacts.save(tiny, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_tensors_may_have_one_codebook(tiny, tmp_path):
    codes, books = torch.randint(0, 4, (1024,)), torch.randn(4, 1)
    names = [f"bert.encoder.layer.0.attention.self.{which}.weight" for which in ("query", "key")]
    artifacts.save(tiny, tmp_path / "m", {name: encodings.codebook(codes, books, (32, 32), 2) for name in names})
    again = artifacts.load(tmp_path / "m").bert.encoder.layer[0].attention.self
    assert torch.equal(again.query.weight, again.key.weight) and again.query.weight is not again.key.weight


def test_who_is_stopped_while_writing_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    artifacts.save(tiny, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()

    def half(tensors, path, metadata):
        Path(path).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        artifacts.save(tiny, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_model_that_no_file_holds_is_refused(tiny, tmp_path):
    class Mine(parts.PARTS["low_rank_linear"]):
        """Of a kind that a file would take for another."""

    with pytest.raises(ArtifactError, match=r"float16.*call model\.float"):
        artifacts.save(type(tiny)(tiny.config).half(), tmp_path / "m")
    with pytest.raises(ArtifactError, match="no Linear"):
        artifacts.save(torch.nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(ArtifactError, match="has the shape"):
        artifacts.save(tiny, tmp_path / "m", {"classifier.bias": encodings.dense(torch.zeros(3))})
    with torch.no_grad():
        tiny.classifier.bias[0] = torch.nan
    with pytest.raises(ArtifactError, match=r"classifier\.bias holds numbers that are not finite"):
        artifacts.save(tiny, tmp_path / "m")
    tiny.classifier = Mine(32, 2, 1)
    with pytest.raises(ArtifactError, match="cannot name the Mine at 'classifier'"):
        artifacts.save(tiny, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_part_that_stands_in_two_places_comes_back(tiny, batch, tmp_path):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    structure.tie(tiny, "bert.encoder.layer.1", "bert.encoder.layer.0")
    tiny.bert.encoder.layer[0].intermediate.dense = parts.LowRankLinear(32, 64, 3)
    artifacts.save(tiny, tmp_path / "m")
    again = artifacts.load(tmp_path / "m")
    assert torch.equal(again(**inputs).logits, tiny(**inputs).logits)
    assert again.bert.encoder.layer[1].intermediate.dense.left is again.bert.encoder.layer[0].intermediate.dense.left


# --- reading what somebody has made up ------------------------------------------------------------------------------


def crafted(path: Path, change, tmp_path: Path) -> Path:
    """The artifact at `path` after `change(header, tensors)`, with the checksum that it should have."""
    with artifacts.safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["companion"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(said, tensors)
    said["sha256"] = artifacts._digest({name: value for name, value in said.items() if name != "sha256"}, tensors)
    save_file(tensors, tmp_path / "crafted", metadata={"companion": json.dumps(said)})
    return tmp_path / "crafted"


def zeros(said: dict, tensors: dict, name: str, shape: list[int]) -> None:
    """Let a tensor be zeros of that shape, in no bytes at all."""
    for part in said["tensors"][name]["parts"]:
        del tensors[f"{name}/{part}"]
    said["tensors"][name] = {"encoding": "index_difference", "shape": shape, "parts": ["gaps", "values"], "bits": 8, "count": 0}
    tensors |= {f"{name}/gaps": torch.zeros(0, dtype=torch.uint8), f"{name}/values": torch.zeros(0)}


def test_a_zero_bias_of_eight_gigabytes_is_refused_before_it_is_made(tiny, tmp_path, monkeypatch):
    artifacts.save(tiny, tmp_path / "m")
    path = crafted(tmp_path / "m", lambda said, tensors: zeros(said, tensors, "classifier.bias", [2**31]), tmp_path)
    monkeypatch.setitem(encodings.DECODERS, "index_difference", lambda *args: pytest.fail("it was made"))
    with pytest.raises(ArtifactError, match="grow to"):
        artifacts.load(path)
    with pytest.raises(ArtifactError, match="grow to"):
        artifacts.read(path)
    path = crafted(tmp_path / "m", lambda said, tensors: zeros(said, tensors, "classifier.bias", [2**20]), tmp_path)
    with pytest.raises(ArtifactError, match=r"classifier\.bias has the shape \(2,\), in the file"):
        artifacts.load(path)


def test_numbers_that_are_none_are_refused(tiny, tmp_path):
    artifacts.save(tiny, tmp_path / "m")
    for value in (torch.nan, torch.inf):
        path = crafted(
            tmp_path / "m", lambda said, tensors, value=value: tensors["classifier.weight/values"].fill_(value), tmp_path
        )
        with pytest.raises(ArtifactError, match=r"classifier\.weight holds numbers that are not finite"):
            artifacts.load(path)


def test_codes_that_their_type_does_not_hold_are_refused(tiny, tmp_path):
    tiny.bert.embeddings.word_embeddings = parts.build("two_component_vectors",
                                                      {"num_embeddings": 100, "embedding_dim": 32, "rows": 10, "columns": 10})  # fmt: skip
    artifacts.save(tiny, tmp_path / "m")
    name = "bert.embeddings.word_embeddings.row"

    def wide(said, tensors):
        tensors.pop(f"{name}/bitmap", None)
        said["tensors"][name] = {"encoding": "dense", "shape": [100], "parts": ["values"]}
        tensors[f"{name}/values"] = torch.full((100,), 300)

    with pytest.raises(ArtifactError, match=r"holds numbers that a torch\.uint8 does not"):
        artifacts.load(crafted(tmp_path / "m", wide, tmp_path))


def test_a_million_layers_are_refused_before_they_are_built(tiny, tmp_path, monkeypatch):
    artifacts.save(tiny, tmp_path / "m")
    monkeypatch.setattr(artifacts, "rebuild", lambda *args: pytest.fail("they were built"))
    for count in (500, 10**5):

        def many(said, tensors, count=count):
            said["config"]["num_hidden_layers"], said["layers"] = count, said["layers"][:1] * count

        with pytest.raises(ArtifactError, match=r"num_hidden_layers|layers are described"):
            artifacts.load(crafted(tmp_path / "m", many, tmp_path))


def test_ties_in_a_circle_and_to_nothing_are_refused(tiny, tmp_path):
    artifacts.save(tiny, tmp_path / "m")
    first, second = (f"bert.encoder.layer.{layer}.output.dense.bias" for layer in (0, 1))
    for ties in ({first: first}, {first: second, second: first}, {first: "nothing"}, {first: "classifier.bias"}):

        def knot(said, tensors, ties=ties):
            for name, to in ties.items():
                for part in said["tensors"][name]["parts"]:
                    del tensors[f"{name}/{part}"]
                said["tensors"][name] = {"encoding": "tied", "shape": [32], "parts": [], "to": to}

        with pytest.raises(ArtifactError, match="is tied to"):
            artifacts.load(crafted(tmp_path / "m", knot, tmp_path))


def test_a_part_of_other_widths_than_what_it_replaces_is_refused(tiny, tmp_path):
    tiny.classifier = parts.LowRankLinear(32, 2, 1)
    artifacts.save(tiny, tmp_path / "m")

    def wider(said, tensors):
        said["parts"]["classifier"]["options"]["in_features"] = said["tensors"]["classifier.right"]["shape"][1] = 33
        tensors["classifier.right/values"] = torch.ones(1, 33)

    with pytest.raises(ArtifactError, match="in_features 33, in place of 32"):
        artifacts.load(crafted(tmp_path / "m", wider, tmp_path))


@pytest.mark.parametrize("name", ["kernels-community/flash-attn", "flash_attention_2", "sdpa", 3])
def test_an_attention_is_looked_up_and_never_fetched(name, tiny, tmp_path):
    artifacts.save(tiny, tmp_path / "m")
    with pytest.raises(ArtifactError, match="attention"):
        artifacts.load(crafted(tmp_path / "m", lambda said, tensors: said.update(attention=name), tmp_path))
    with pytest.raises(ArtifactError, match="must not hold"):
        artifacts.load(crafted(tmp_path / "m", lambda said, tensors: said["config"].update(_attn_implementation=name), tmp_path))
    with pytest.raises(ValueError, match="attention must be one of"):
        depth.AdaptiveEncoder({"hidden_size": 8, "num_attention_heads": 2, "attn_implementation": f"x/{name}"}, 2)
    with pytest.raises(ValueError, match="must not hold"):
        parts.build("spelled_bert", {"vocab_size": 9, "pieces": 2, "growth": 1.0, "bert": {"_attn_implementation": name}})


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1']
)
def test_a_header_is_strict_json(text):
    with pytest.raises(ValueError):
        header.parse(text)


FIVE_HUNDRED_LAYERS = {
    "hidden_size": 8,
    "num_attention_heads": 1,
    "vocab_size": 9,
    "intermediate_size": 8,
    "num_hidden_layers": 500,
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hashed_linear", {"in_features": 10**6, "out_features": 10**6, "buckets": 9}),
        ("low_rank_linear", {"in_features": 10**7, "out_features": 10, "rank": 9}),
        ("cp_linear", {"in_features": 2**30, "out_features": 2**30, "rank": 9}),
        ("lsh_attention", {"hidden_size": 8, "num_attention_heads": 2, "rounds": 10**4}),
        ("linformer", {"hidden_size": 8, "num_attention_heads": 2, "max_length": 10**5, "projected_length": 10**5}),
        ("adaptive_encoder", {"sizes": {"hidden_size": 2**15, "num_attention_heads": 1}, "heads": 1}),
        ("spelled_bert", {"vocab_size": 9, "pieces": 2, "growth": 1.0, "bert": FIVE_HUNDRED_LAYERS}),
    ],
)
def test_a_part_that_asks_for_more_than_a_file_can_fill_is_not_built(kind, options):
    with pytest.raises(CompanionError, match="more memory or work"), Room.of(1000, 20):
        parts.build(kind, options)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 3.0},
        {"rank": True},
        {"rank": "3"},
        {"bias": 1},
        {"rank": 10**30},
        {"rank": float("nan")},
        {"rank": [[[[1]]]]},
        pytest.param({"rank": object()}, id="no JSON"),
    ],
    ids=str,
)
def test_options_of_another_type_are_refused(change):
    with pytest.raises(CompanionError, match=r"option '(rank|bias)'"):
        parts.build("low_rank_linear", {"in_features": 16, "out_features": 32, "rank": 3} | change)


def test_a_draw_that_could_take_hours_is_refused():
    with pytest.raises(ValueError, match="codes"):
        embeddings.slim_codes(10**6, 32, 10**6)


def test_a_fault_of_ours_stays_to_be_seen(tiny, tmp_path, monkeypatch):
    """Whatever a crafted file provokes is an ArtifactError; where a healthy file provokes it, the cause says where to look."""
    artifacts.save(tiny, tmp_path / "m")
    monkeypatch.setattr(structure, "cut_to", lambda *args: 1 / 0)
    with pytest.raises(ArtifactError, match="ZeroDivisionError") as caught:
        artifacts.load(tmp_path / "m")
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and caught.value.__cause__.__traceback__


def test_the_contract_names_a_file_that_does_not_load(tiny, tmp_path):
    path = tmp_path / "m.safetensors"
    artifacts.save(tiny, path)
    assert "m.json" in contract.broken(path)[0]
    contract.write(path, tiny, 5)
    assert contract.broken(path) == []
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged" in contract.broken(path)[0]


def test_a_healthy_file_comes_back_without_a_word(tiny, tmp_path):
    artifacts.save(tiny, tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = artifacts.load(tmp_path / "m")
    assert artifacts.describe(again) == artifacts.describe(tiny)
    assert again.state_dict().keys() == tiny.state_dict().keys() and not any(
        tensor.is_meta for tensor in again.state_dict().values()
    )
    assert torch.equal(again.bert.embeddings.position_ids, tiny.bert.embeddings.position_ids)
