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
    two = occupancy.occupancy(architecture, 64, 0, 512)
    assert (two.blocks, two.share(), two.limited_by) == (2, 0.5, "registers")
    one = occupancy.occupancy(architecture, 65, 0, 512)
    assert (one.blocks, one.share(), one.limited_by) == (1, 0.25, "registers")


def test_occupancy_by_each_limit() -> None:
    full = occupancy.occupancy("sm_80", 32, 0, 256)
    assert (full.blocks, full.share(), full.limited_by) == (8, 1.0, "registers, threads")
    assert full.share(3) == 3 * 8 / 64
    small = occupancy.occupancy("sm_80", 16, 0, 32)
    assert (small.blocks, small.share(), small.limited_by) == (32, 0.5, "blocks")
    # 48 KB and the system's 1 KB: three of them in 164 KB, four in 228 KB.
    shared = [occupancy.occupancy(a, 32, 48 << 10, 128).blocks for a in ("sm_80", "sm_90")]
    assert shared == [3, 4]
    assert occupancy.occupancy("sm_80", 32, 163 << 10, 128).blocks == 1
    beyond = occupancy.occupancy("sm_80", 32, (163 << 10) + 1, 128)
    assert (beyond.blocks, beyond.limited_by) == (0, "shared memory")
    assert occupancy.occupancy("sm_80", 32, 0, 1056).by_threads == 0
    assert occupancy.occupancy("sm_80", 65, 0, 1024).by_registers == 0
    with pytest.raises(ValueError, match="expected one of sm_80, sm_90, got 'gfx942'"):
        occupancy.occupancy("gfx942", 32, 0, 128)


CALCULATOR = """
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int minor_version, major, shared_sm, shared_block, registers, shared, threads;
  while (std::scanf("%d %d %d %d %d %d", &major, &shared_sm, &shared_block, &registers, &shared,
                    &threads) == 6) {
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = 0;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 2048;
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
            f"{architecture[3]} {limits.shared_bytes} {limits.shared_bytes_of_block} "
            f"{registers} {shared} {threads}"
        )
        held = occupancy.occupancy(architecture, registers, shared, threads)
        ours.append(f"0 {held.by_registers} {held.by_shared} {held.by_threads} {held.blocks}")
    done = subprocess.run(
        [str(built)], input="\n".join(cases), capture_output=True, text=True, check=True
    )
    theirs = done.stdout.splitlines()
    wrong = [each for each in zip(cases, ours, theirs, strict=True) if each[1] != each[2]]
    assert not wrong, wrong[:5]
