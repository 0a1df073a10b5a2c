"""How many blocks a processor holds, by hand and by NVIDIA's calculator."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bench import occupancy


@pytest.mark.parametrize("architecture", occupancy.LIMITS)
def test_occupancy_of_the_programming_guide(architecture: str) -> None:
    """ "Multiprocessor Level": 64 registers and 512 threads, two blocks; one more, one block."""
    most_warps = {"sm_80": 64, "sm_86": 48, "sm_90": 64}[architecture]
    two = occupancy.occupancy(architecture, 64, 0, 512)
    assert (two.blocks, two.share(), two.limited_by) == (2, 32 / most_warps, "registers")
    one = occupancy.occupancy(architecture, 65, 0, 512)
    assert (one.blocks, one.share(), one.limited_by) == (1, 16 / most_warps, "registers")


def test_occupancy_by_each_limit() -> None:
    full = occupancy.occupancy("sm_80", 32, 0, 256)
    assert (full.blocks, full.share(), full.limited_by) == (8, 1.0, "registers, threads")
    assert full.share(3) == 3 * 8 / 64
    small = occupancy.occupancy("sm_80", 16, 0, 32)
    assert (small.blocks, small.share(), small.limited_by) == (32, 0.5, "blocks")
    # A block takes 48 KB and the system's 1 KB: two blocks fit 100 KB, three 164 KB, four 228 KB.
    architectures = ("sm_86", "sm_80", "sm_90")
    assert [occupancy.occupancy(a, 32, 48 << 10, 128).blocks for a in architectures] == [2, 3, 4]
    assert occupancy.occupancy("sm_80", 32, 163 << 10, 128).blocks == 1
    beyond = occupancy.occupancy("sm_80", 32, (163 << 10) + 1, 128)
    assert (beyond.blocks, beyond.limited_by) == (0, "shared memory")
    assert occupancy.occupancy("sm_80", 32, 0, 1056).by_threads == 0
    assert occupancy.occupancy("sm_80", 65, 0, 1024).by_registers == 0
    with pytest.raises(ValueError, match="expected one of sm_80, sm_86, sm_90, got 'gfx942'"):
        occupancy.occupancy("gfx942", 32, 0, 128)


def test_occupancy_of_sm_86_by_each_limit() -> None:
    """A processor of 8.6 has 48 warps, 16 blocks and 100 KB, and a block has at most 99 KB."""
    full = occupancy.occupancy("sm_86", 40, 0, 256)
    assert (full.blocks, full.share(), full.limited_by) == (6, 1.0, "registers, threads")
    small = occupancy.occupancy("sm_86", 16, 0, 32)
    assert (small.blocks, small.share(), small.limited_by) == (16, 1 / 3, "blocks")
    assert occupancy.occupancy("sm_86", 32, 99 << 10, 128).blocks == 1
    beyond = occupancy.occupancy("sm_86", 32, (99 << 10) + 1, 128)
    assert (beyond.blocks, beyond.limited_by) == (0, "shared memory")


CALCULATOR = """
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int capability, threads_sm, shared_sm, shared_block, registers, shared, threads;
  while (std::scanf("%d %d %d %d %d %d %d", &capability, &threads_sm, &shared_sm, &shared_block,
                    &registers, &shared, &threads) == 7) {
    cudaOccDeviceProp device;
    device.computeMajor = capability / 10, device.computeMinor = capability % 10;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = threads_sm;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32, device.sharedMemPerBlock = 48 << 10, device.numSms = 1;
    device.sharedMemPerMultiprocessor = shared_sm, device.sharedMemPerBlockOptin = shared_block;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024, function.numRegs = registers;
    function.sharedSizeBytes = 0, function.maxDynamicSharedSizeBytes = shared;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function,
                                                                 &state, threads, shared);
    std::printf("%d %d %d %d %d\\n", error, result.blockLimitRegs, result.blockLimitSharedMem,
                result.blockLimitWarps, result.activeBlocksPerMultiprocessor);
  }
}
"""


def calculator_folder() -> Path | None:
    """Where NVIDIA's calculator is: beside the toolkit's headers, or those that Triton ships."""
    roots = [Path("/usr/local/cuda/include")]
    if (nvcc := shutil.which("nvcc")) is not None:
        roots.append(Path(nvcc).resolve().parents[1] / "include")
    spec = importlib.util.find_spec("triton")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        roots.append(Path(location) / "backends" / "nvidia" / "include")
    return next((root for root in roots if (root / "cuda_occupancy.h").is_file()), None)


@pytest.mark.skipif(calculator_folder() is None, reason="cuda_occupancy.h was not found")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")
def test_occupancy_agrees_with_nvidias_calculator(tmp_path: Path) -> None:
    source, built = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    include = str(calculator_folder())
    subprocess.run(["g++", "-w", "-I", include, str(source), "-o", str(built)], check=True)
    draw = random.Random(torch.seed())
    cases, ours = [], []
    for _ in range(600):
        architecture = draw.choice(list(occupancy.LIMITS))
        limits = occupancy.LIMITS[architecture]
        registers, threads = draw.randint(1, 255), draw.randint(1, 1024)
        shared = draw.choice([0, draw.randint(0, limits.shared_bytes_of_block)])
        cases.append(
            f"{architecture[3:]} {limits.warps * occupancy.WARP} "
            f"{limits.shared_bytes} {limits.shared_bytes_of_block} {registers} {shared} {threads}"
        )
        held = occupancy.occupancy(architecture, registers, shared, threads)
        ours.append(f"0 {held.by_registers} {held.by_shared} {held.by_threads} {held.blocks}")
    done = subprocess.run(
        [str(built)], input="\n".join(cases), capture_output=True, text=True, check=True
    )
    theirs = done.stdout.splitlines()
    wrong = [each for each in zip(cases, ours, theirs, strict=True) if each[1] != each[2]]
    assert not wrong, wrong[:5]
