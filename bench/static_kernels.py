"""A kernel and its machine code, and the tools that show it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from bench import sass
from bench.report import ROOT


class Kernel(NamedTuple):
    """One kernel, as it is launched."""

    backend: str
    kernel: str
    architecture: str
    dtype: str
    layout: str
    config: str
    threads: int
    dynamic_shared_bytes: int
    launched_per_sm: int | None  # blocks a grid has for each multiprocessor; None: as many as fit


class Code(NamedTuple):
    """What the compiler made of a kernel."""

    function: sass.Function
    usage: sass.Usage
    compiler: str


Inspected = tuple[Kernel, Code]


def setup_module() -> ModuleType:
    """The project's setup.py, which knows how nvcc is found."""
    spec = importlib.util.spec_from_file_location("osf_setup", ROOT / "setup.py")
    if spec is None or spec.loader is None:
        raise ValueError(f"bench static: expected setup.py under {ROOT}; run it from a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_cuobjdump() -> Path:
    """cuobjdump with its nvdisasm: Triton's, else the CUDA toolkit's.

    Triton's first, since it must read what Triton's own ptxas writes. Raises ValueError, which
    names what is missing and where it was looked for.
    """
    looked: list[Path] = []
    if (spec := importlib.util.find_spec("triton")) is not None:
        for location in spec.submodule_search_locations or ():
            looked.append(Path(location) / "backends" / "nvidia" / "bin")
    nvcc, _ = setup_module().find_nvcc()
    if nvcc is not None:
        looked.append(Path(nvcc).resolve().parent)
    if (on_path := shutil.which("cuobjdump")) is not None:
        looked.append(Path(on_path).parent)
    for folder in looked:
        if all((folder / tool).is_file() for tool in ("cuobjdump", "nvdisasm")):
            return folder / "cuobjdump"
    places = ", ".join(map(str, looked)) or "no triton, no nvcc and nothing on PATH"
    raise ValueError(
        "bench static: cuobjdump and nvdisasm, side by side, were not found; looked at "
        f"{places}; install triton, which ships both, or a whole CUDA toolkit"
    )


def run_tool(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"bench static: `{' '.join(command)}` failed: {done.stderr.strip()[:400]}")
    return done.stdout


def dump(cuobjdump: Path, binary: Path) -> list[tuple[sass.Function, sass.Usage]]:
    """Every kernel of a cubin or shared library."""

    def said(option: str) -> str:
        return run_tool([str(cuobjdump), option, str(binary)])

    usages = sass.parse_usage(said("-res-usage"))
    found = []
    for function in sass.parse(said("-sass")):
        usage = usages.get((function.architecture, function.name))
        found.append((function, usage or usages["", function.name]))
    return found
