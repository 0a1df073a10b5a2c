"""Machine code of the CUDA extension as it was built, and the launches of its hosts."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.occupancy import LIMITS
from bench.report import ROOT
from bench.static_kernels import Code, Inspected, Kernel, dump, run_tool, setup_module


def extension() -> Path:
    """The built extension. Raises ValueError where there is none, or csrc/ is newer."""
    spec = importlib.util.find_spec("osf_kernels._cuda")
    if spec is None or spec.origin is None:
        raise ValueError(
            "bench static: the CUDA extension is not built; run `make build` where nvcc is, or "
            "leave it out by --backend triton"
        )
    built = Path(spec.origin)
    folder = ROOT / "csrc"
    sources = [*folder.rglob("*.cu"), *folder.rglob("*.cuh"), *folder.rglob("*.h")]
    newer = [each for each in sources if each.stat().st_mtime > built.stat().st_mtime]
    if newer:
        raise ValueError(
            f"bench static: {newer[0].relative_to(ROOT)} is newer than {built}; run `make build`"
        )
    return built


BUILT_FOR = ("sm_80", "sm_90")  # The build compiles machine code of these architectures.
_PROGRAM = ROOT / "bench" / "static_launches.cu"
_INSTANCES = re.compile(r"(coefficients|update)_([a-z0-9]+?)(?:_(\d+))?$")
# Blocks a multiprocessor in the grids of csrc/; a factorization has a block a matrix.
_GRIDS = {"coefficients": 1, "update": 1}
_DTYPES = {"bf16": "bf16", "f16": "fp16", "tf32": "fp32 (tf32)", "tf32x3": "fp32 (tf32x3)"}


def cuda_launches(
    architectures: Sequence[str],
) -> Iterator[tuple[Kernel, re.Pattern[str]]]:
    """Every launch of the extension and what its kernel's mangled name looks like.

    A small program, which nvcc compiles against csrc/, prints what the hosts decide.
    """
    nvcc, looked = setup_module().find_nvcc()
    if nvcc is None:
        raise ValueError(
            f"bench static: nvcc was not found; looked at {', '.join(looked)}; leave the CUDA "
            "backend out by --backend triton"
        )
    lines = []
    for source in sorted((ROOT / "csrc" / "inst").glob("*.cu")):
        if match := _INSTANCES.match(source.stem):
            kind, math, rank = match.groups()
            arguments = f"Math::{math}" + (f", {rank}" if rank else "")
            lines.append(f'{kind}_line<{arguments}>("{_DTYPES[math]}");')
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "launches"
        (Path(folder) / "instances.inc").write_text("\n".join(lines))
        flags = ["-std=c++17", "--expt-relaxed-constexpr", "-cudart", "static", "-arch", "sm_80"]
        run_tool(
            [nvcc, *flags, "-I", str(ROOT / "csrc"), "-I", folder, str(_PROGRAM), "-o", str(built)]
        )
        for architecture in architectures:
            limit = LIMITS[architecture].shared_bytes_of_block
            for line in run_tool([str(built), str(limit)]).splitlines():
                yield _described(line, architecture)


def _described(line: str, architecture: str) -> tuple[Kernel, re.Pattern[str]]:
    kind, arguments, dtype, config, threads, shared = line.split(";")
    values = [value for value in arguments.split(",") if value]
    mangled = ".*".join(rf"(?:E|b|Li){value}E" for value in values)
    kernel = Kernel(
        *("cuda", kind, architecture, dtype, "any", config),
        *(int(threads), int(shared), _GRIDS.get(kind)),
    )
    return kernel, re.compile(rf"_ZN3osf\d+{kind}_kernel.*?{mangled}")


def read_extension(
    built: Path, cuobjdump: Path, architectures: Sequence[str]
) -> Iterator[Inspected]:
    """Every launch of the extension with its code."""
    codes = dump(cuobjdump, built)
    compiler = f"nvcc {_nvcc_release(built)}"
    for kernel, pattern in cuda_launches(architectures):
        matches = [
            code
            for code in codes
            if code[0].architecture == kernel.architecture and pattern.match(code[0].name)
        ]
        if len(matches) != 1:
            raise ValueError(
                f"bench static: expected {built} to hold one {kernel.kernel} kernel of "
                f"{kernel.dtype} for {kernel.architecture}, got {len(matches)}; run `make build`"
            )
        yield kernel, Code(*matches[0], compiler)


def _nvcc_release(built: Path) -> str:
    spec = importlib.util.spec_from_file_location("osf_kernels._cuda", built)
    if spec is None or spec.loader is None:
        raise ValueError(f"bench static: {built} is no Python extension")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.nvcc_version)
