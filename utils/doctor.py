"""What is installed, what is missing, and how to get it: the checks behind `companion doctor`."""

import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

Check = tuple[str, str, str, str]  # what, state (ok, optional, missing), what was found, what to do


def checks() -> list[Check]:
    """All checks in order; none of them raises."""
    probes = {
        "embedded model": _embedded_model, "embedded data": _embedded_data, "processor": _processor, "CUDA GPU": _cuda,
        "bfloat16": _bfloat16, "Jupyter kernel": _kernel, "cache folder": _cache,
    }  # fmt: skip
    return [*_check_packages(), *(_check(name, probe) for name, probe in probes.items())]


def _check_packages() -> list[Check]:
    found = []
    try:
        requirements = metadata.requires("bert-compression-companion") or []
    except metadata.PackageNotFoundError:
        return [("bert-compression-companion", "missing", "not installed", "make setup")]
    for requirement in requirements:
        name = requirement.partition(";")[0].partition("[")[0].partition("=")[0].strip(" ~<>!")
        if "extra ==" in requirement:
            continue
        try:
            found.append((name, "ok", metadata.version(name), ""))
        except metadata.PackageNotFoundError:
            found.append((name, "missing", "not installed", f"pip install -c constraints.txt {name}"))
    return found


def _check(name: str, probe: Callable[[], tuple]) -> Check:
    """Run one probe; whatever it raises becomes a row, never a traceback."""
    try:
        return (name, *probe())
    except Exception as error:
        return (name, "missing", str(error).splitlines()[0] if str(error) else type(error).__name__, "make setup")


def _embedded_model() -> tuple:
    from utils import bert

    return "ok", bert.resolve(bert.EMBEDDED), ""


def _embedded_data() -> tuple:
    from utils import tasks

    return "ok", str(tasks.package_file(*tasks.EMBEDDED_FILE, tasks.EMBEDDED_SHA256)), ""


def _cuda() -> tuple:
    import torch

    if torch.cuda.is_available():
        return "ok", torch.cuda.get_device_name(0), ""
    return "optional", "none", "the cpu profile needs none; for a GPU install a CUDA build of torch"


def _bfloat16() -> tuple:
    import torch

    from utils import profiles

    native = profiles.compute_dtype(profiles.pick_device()) == torch.bfloat16
    return ("ok", "native", "") if native else ("optional", "not native", "float32 is used: expect three to four times the time")


def _kernel() -> tuple:
    """Whether the kernel `python3` runs in this environment. Links are not followed: every environment's python is one to the system's."""
    from jupyter_client.kernelspec import KernelSpecManager

    program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    version = sys.version_info
    if program in ("python", f"python{version[0]}", f"python{version[0]}.{version[1]}"):
        program = sys.executable  # as jupyter_client itself reads these names
    found = os.path.abspath(shutil.which(program) or program)
    if not os.access(found, os.X_OK):
        wrong = f"kernel python3 runs {found}, which is no program"
    elif not Path(found).is_relative_to(sys.prefix) and found != os.path.abspath(sys.executable):
        wrong = f"kernel python3 runs {found}, not {sys.executable}"
    else:
        return "ok", found, ""
    return "missing", wrong, f"{sys.executable} -m ipykernel install --sys-prefix"


def _processor() -> tuple:
    from utils import results

    return "ok", results.machine_name(results.machine()), ""


def _cache() -> tuple:
    from utils import cache

    folder = cache.root()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return "missing", f"{folder} cannot be written", "set COMPANION_CACHE to a folder you can write"
    state, advice = ("ok", "") if free > 2e9 else ("missing", "free 2 GB, or set COMPANION_CACHE")
    return state, f"{folder} ({free / 1e9:.0f} GB free)", advice
