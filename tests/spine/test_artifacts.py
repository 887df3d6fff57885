"""Packing is exact, files reload in a fresh process, and a damaged or foreign file is a clear error."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from utils import CompanionError, artifacts, contract, costs, encodings, parts, structure
from utils.artifacts import ArtifactError
from utils.encodings import decode
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
    done = subprocess.run([sys.executable, "-m", "utils.contract", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
