"""What nvcc makes of csrc/: no spills, tensor-core instructions, a module that imports."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = sorted([*(CSRC / "inst").glob("*.cu"), CSRC / "cholesky.cu"])
# Those that multiply matrices on tensor cores.
PRODUCTS = [k.stem for k in KERNELS if k.stem.startswith(("coefficients", "update"))]
# The most threads of a block: on the 64 Ki registers of a multiprocessor they must start at all.
THREADS = {"cholesky": 512, "jacobi_shared": 1024, "jacobi_global": 1024}
ARCHITECTURES = (80, 90)
# Largest dynamic and static shared memory of a block on the older of the two.
SHARED_LIMIT = 163 * 1024

MMA = {
    "bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "f16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "tf32x3": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
}


@functools.lru_cache(maxsize=1)
def nvcc() -> str | None:
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return found if Path(found).is_file() else None


pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc was not found")


class Report(NamedTuple):
    """What ptxas said of one kernel, and its PTX."""

    registers: int
    spilled_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    ptx: str


def compile_kernel(source: Path, architecture: int, folder: Path) -> Report:
    """Compiles one source with the flags of setup.py and reads the resource report."""
    folder = folder / f"{source.stem}-{architecture}"
    folder.mkdir()
    virtual = f"compute_{architecture}"
    command = [str(nvcc()), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-I", str(CSRC)]
    command += ["-Xptxas", "-v", f"-gencode=arch={virtual},code=sm_{architecture}"]
    command += ["-keep", "-keep-dir", str(folder)]
    command += ["-cubin", str(source), "-o", str(folder / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stderr

    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, said))

    (registers,) = re.findall(r"Used (\d+) registers", said)
    (ptx,) = folder.glob("*.ptx")
    return Report(
        registers=int(registers),
        spilled_bytes=total(r"(\d+) bytes spill (?:stores|loads)"),
        stack_bytes=total(r"(\d+) bytes stack frame"),
        static_shared_bytes=total(r"(\d+) bytes smem"),
        ptx=ptx.read_text(),
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Report]:
    folder = tmp_path_factory.mktemp("nvcc")
    wanted = [(source, architecture) for source in KERNELS for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda job: compile_kernel(job[0], job[1], folder), wanted)
        return {(s.stem, a): report for (s, a), report in zip(wanted, made, strict=True)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", [source.stem for source in KERNELS])
def test_kernel(kernel: str, architecture: int, reports: dict[tuple[str, int], Report]) -> None:
    report = reports[kernel, architecture]
    assert report.spilled_bytes == 0
    assert report.stack_bytes == 0
    assert report.registers <= min(255, 65536 // THREADS.get(kernel, 256))
    assert report.static_shared_bytes == 0, "shared memory is dynamic, and counted by the traits"
    ptx = report.ptx
    if kernel not in PRODUCTS:
        return
    assert MMA[kernel.split("_")[1]] in ptx
    for size in (16, 8, 4):
        assert re.search(rf"cp\.async\.c[ag]\.shared\.global\S* \[\S+\], \[\S+\], {size},", ptx)
    assert "cp.async.wait_group" in ptx
    assert re.search(r"ld\.global(\.nc)?\.v4", ptx), "16-byte loads"
    if "tf32" not in kernel:
        assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in ptx
    if kernel.startswith("update"):
        assert re.search(r"st\.global\.v4", ptx), "16-byte stores"
        return
    # Between two blocks: a fence before what is written and who has finished are counted, an
    # acquire and a barrier before a read.
    straight = r"(?:\s+(?!bra)[a-z][^;]*;){,8}?"
    counted = re.findall(rf"(?:membar\.gl|fence\.\w+\.gpu);{straight}\s+atom\.global\.add", ptx)
    assert len(counted) >= 2
    assert re.search(r"ld\.acquire\.gpu\.global.*?bar\.sync.*?ld\.global\.cg\.v4", ptx, re.DOTALL)


@pytest.mark.slow
def test_a_spill_is_reported(tmp_path: Path) -> None:
    """The gate bites: the same kernel, squeezed into half the registers, spills."""
    source = tmp_path / "squeezed.cu"
    text = (CSRC / "update.cuh").read_text()
    changed = re.sub(r"__launch_bounds__\(kThreads,\s*1\)", "__launch_bounds__(kThreads, 2)", text)
    assert changed != text
    (tmp_path / "update.cuh").write_text(changed)
    source.write_text((CSRC / "inst" / "update_bf16.cu").read_text())
    assert compile_kernel(source, 80, tmp_path).spilled_bytes > 0


@pytest.mark.slow
def test_dynamic_shared_memory_fits(tmp_path: Path) -> None:
    """Every instantiation asks for at most what a block of compute capability 8.0 can have."""
    program = tmp_path / "sizes.cu"
    program.write_text(
        '#include <cstdio>\n#include "coefficients.cuh"\n#include "update.cuh"\n'
        "using namespace osf;\n"
        "int main() {\n"
        + "".join(
            f'  std::printf("%d\\n", CoefficientsTraits<Math::{math}, {rank}>::kSharedBytes);\n'
            for math, rank in re.findall(r"coefficients_(\w+)_(\d+)", " ".join(PRODUCTS))
        )
        + "".join(
            f'  std::printf("%d\\n", UpdateTraits<Math::{math}>::kSharedBytes);\n'
            for math in re.findall(r"update_(\w+)", " ".join(PRODUCTS))
        )
        + "}\n"
    )
    built = tmp_path / "sizes"
    command = [str(nvcc()), "-std=c++17", "--expt-relaxed-constexpr", "-cudart", "static"]
    command += ["-I", str(CSRC), "-arch=sm_80", str(program), "-o", str(built)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    said = subprocess.run([str(built)], capture_output=True, text=True, check=True, timeout=60)
    sizes = [int(line) for line in said.stdout.split()]
    assert len(sizes) == len(PRODUCTS)
    assert min(sizes) > 0
    assert max(sizes) <= SHARED_LIMIT


def test_importing_the_extension_needs_no_driver() -> None:
    """The module says what it was built for; a call without a device names the failed call."""
    pytest.importorskip("osf_kernels._cuda", reason="the CUDA extension was not built")
    program = (
        "import osf_kernels._cuda as c\n"
        "print(c.nvcc_version, '|', c.cuda_archs)\n"
        "try:\n"
        "    c.update(b'', 0, False, 0)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=120,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
    )
    built, said = done.stdout.splitlines()
    assert re.fullmatch(r"\d+\.\d+ \| \d+\.\d( \d+\.\d)*", built)
    assert re.fullmatch(r"osf_kernels: cuda\w+(\(\w+\))? failed: .+", said)
