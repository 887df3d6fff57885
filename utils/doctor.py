"""What is installed, what is missing, and how to get it: the checks behind `companion doctor`."""

import importlib.machinery
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from utils import CompanionError, first_line

Check = tuple[str, str, str, str]  # what, state (ok, optional, missing), what was found, what to do
PYTHONS = ((3, 11), (3, 12))
MEMORY = 5e9  # bytes: what the largest chapter takes at its peak, and some
SPACE = {"cache folder": 2e9, "results": 1e8, "temporary folder": 1e9}  # bytes that a run of all chapters writes there at most
MOVED_BY = {"cache folder": "set COMPANION_CACHE", "results": "name another folder with --out", "temporary folder": "set TMPDIR"}


def checks() -> list[Check]:
    """All checks in order; none of them raises."""
    probes = {
        "Python": _python, "package utils": _package, "embedded model": _embedded_model, "embedded data": _embedded_data,
        "processor": _processor, "cores": _cores, "CUDA GPU": _cuda, "bfloat16": _bfloat16, "memory": _memory,
        "Jupyter kernel": _kernel, "cache folder": _cache, "results": _results, "temporary folder": _temporary,
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
    """Run one probe; whatever it raises becomes a row, never a traceback. A message for users says itself what to do."""
    try:
        return (name, *probe())
    except Exception as error:
        said = first_line(error)
        advice = "" if isinstance(error, CompanionError) else MOVED_BY.get(name, "make setup")
        return (name, "missing", said, "set HOME" if "home directory" in said else advice)


def _python() -> tuple:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] in PYTHONS:
        return "ok", version, ""
    return "missing", version, "Python 3.11 or 3.12 is needed: make setup PYTHON=python3.11"


def _package() -> tuple:
    """Whether a notebook that is opened here would find our package or another one of that name."""
    from utils.catalogue import ROOT

    ours = ROOT / "utils"
    folders = [os.curdir, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for folder in map(os.path.abspath, folders):
        spec = importlib.machinery.PathFinder.find_spec("utils", [folder])
        for place in (spec.submodule_search_locations or [spec.origin]) if spec else []:
            if not (ours.exists() and os.path.exists(place) and os.path.samefile(place, ours)):
                return "optional", f"another one at {place}", "rename or move it: notebooks opened here would import it"
    return "ok", str(ours), ""


def _embedded_model() -> tuple:
    from utils import bert

    return "ok", bert.resolve(bert.EMBEDDED), ""


def _embedded_data() -> tuple:
    from utils import tasks

    return "ok", str(tasks.package_file(*tasks.EMBEDDED_FILE, tasks.EMBEDDED_SHA256)), ""


def _processor() -> tuple:
    from utils import results

    return "ok", results.machine_name(results.machine()), ""


def _cores() -> tuple:
    from utils import results

    allowed, shown = results.cores(), results.shown_cores()
    if allowed >= shown:
        return "ok", f"{shown}", ""
    threads = max(1, int(allowed))
    advice = f"runs take {threads} thread{'s' * (threads != 1)}; for notebooks opened in Jupyter set OMP_NUM_THREADS={threads}"
    return "optional", f"a quota allows {allowed:g} of {shown} cores", f"expect the {shown / allowed:.0f}-fold time; {advice}"


def _cuda() -> tuple:
    import torch

    if torch.cuda.is_available():
        return "ok", torch.cuda.get_device_name(0), ""
    return "optional", "none", "the cpu profile needs none; for a GPU install a CUDA build of torch"


def _bfloat16() -> tuple:
    import torch

    from utils import profiles

    native = profiles.compute_dtype(profiles.pick_device()) == torch.bfloat16
    if native:
        return "ok", "native: the minutes in the README hold on two cores", ""
    return "optional", "not native", "float32 is used: expect two to three times the minutes that the README names"


def _memory() -> tuple:
    from utils import results

    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "ok", "unknown", ""
    found = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *results.memory_limits()])
    advice = "" if found >= MEMORY else f"chapters may take {MEMORY / 1e9:.0f} GB at their peak: run one at a time, --track core"
    return "optional" if advice else "ok", f"{found / 1e9:.1f} GB", advice


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


def _cache() -> tuple:
    from utils import cache

    folder = cache.root()
    folder.mkdir(parents=True, exist_ok=True)
    return _space("cache folder", folder)


def _results() -> tuple:
    """Where `companion run` writes, as long as nobody names another folder."""
    folder = Path("runs").absolute()
    return _space("results", folder if folder.is_dir() else folder.parent)


def _temporary() -> tuple:
    return _space("temporary folder", Path(tempfile.gettempdir()))


def _space(name: str, folder: Path) -> tuple:
    """Whether a folder can be written, and has room enough; results may as well go elsewhere."""
    wrong = "optional" if name == "results" else "missing"
    if not os.access(folder, os.W_OK):
        return wrong, f"{folder} cannot be written", MOVED_BY[name]
    free = shutil.disk_usage(folder).free
    advice = "" if free > SPACE[name] else f"free {SPACE[name] / 1e9:g} GB, or {MOVED_BY[name]}"
    return wrong if advice else "ok", f"{folder} ({free / 1e9:.1f} GB free)", advice
