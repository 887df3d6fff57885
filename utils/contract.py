"""The contract of every artifact: a fresh process that imports only `utils.artifacts` gets the same model back.

Beside a kept artifact lies what its model was (`write`); `broken` loads the file and says in which promise it fails: same logits,
same classes at the same places, same ties, same bytes when saved again, and multiply-adds that closed form and counter agree on
(the counter may find fewer of a part that decides itself how long it works).
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from utils import CompanionError, artifacts, costs, parts

TOLERANCE = 1e-4  # logits, float32


def facts(model: nn.Module, length: int) -> dict:
    """What must come back: logits on fixed inputs, class names by path, groups of tied parameters."""
    with torch.inference_mode():
        logits = model.eval()(**costs.example_inputs(model, 2, length, next(model.parameters()).device)).logits
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {
        "length": length,
        "logits": logits.float().cpu().tolist(),
        "classes": {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)},
        "ties": sorted(names for names in owners.values() if len(names) > 1),
    }


def write(path: Path, model: nn.Module, length: int) -> None:
    """Write the facts beside the artifact at `path`."""
    path.with_suffix(".json").write_text(json.dumps(facts(model, length)), encoding="utf-8")


def broken(path: Path) -> list[str]:
    """The promises that the artifact at `path` does not keep; that it loads is the first one."""
    try:
        expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        model = artifacts.load(path)
    except (CompanionError, OSError, ValueError) as error:
        return [" ".join(str(error).split())]
    found = facts(model, expected["length"])
    problems = [f"other {what}" for what in ("classes", "ties") if found[what] != expected[what]]
    difference = (torch.tensor(found["logits"]) - torch.tensor(expected["logits"])).abs().max().item()
    if not difference <= TOLERANCE:
        problems.append(f"logits differ by {difference:.3g}")
    if not same_bytes(path, model):
        problems.append("other bytes when saved again")
    counted, closed = costs.measured_macs(model, expected["length"]), costs.macs(model, expected["length"])
    adaptive = any(part.adaptive for part in parts.find(model).values())
    if counted > closed or (counted < closed and not adaptive):
        problems.append(f"{closed} multiply-adds in closed form, {counted} counted")
    return problems


def same_bytes(path: Path, model: nn.Module) -> bool:
    """Whether the reloaded model, stored with the same encodings, makes the same file."""
    _, given = artifacts.read_encoded(path)
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / path.name
        artifacts.save(model, again, given)
        return again.read_bytes() == path.read_bytes()


def check(folder: Path) -> dict[str, list[str]]:
    """The broken artifacts of a folder, by file name. Raises ValueError for a folder without artifacts."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ValueError(f"no *.safetensors file in {folder}")
    return {path.name: problems for path in found if (problems := broken(path))}
