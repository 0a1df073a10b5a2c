"""The inspection of machine code: listings, loops, occupancy and the command."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import pytest
import torch

from bench import __main__ as cli
from bench import occupancy, report, sass, static, static_cuda, static_kernels, static_triton

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def listing(*lines: str, architecture: str = "sm_80", name: str = "kernel") -> str:
    """A listing as cuobjdump prints it: 16 bytes an instruction, its encoding beside it."""
    text = [f"\tcode for {architecture}", f"\t\tFunction : {name}", '\t.headerflags @"EF"']
    for i, line in enumerate(lines):
        text.append(f"        /*{16 * i:04x}*/   {line} ;   /* 0x000000ff06067224 */")
        text.append("                              /* 0x000fe200078e00ff */")
    return "\n".join(text)


def code(*lines: str) -> tuple[sass.Instruction, ...]:
    (function,) = sass.parse(listing(*lines))
    return function.instructions


# listings


def test_parse_reads_guards_opcodes_and_functions() -> None:
    both = "\n".join(
        [
            listing("@!P0 LDG.E.128 R4, [R2.64+0x10]", "EXIT", name="first"),
            "Fatbin elf code:",
            "arch = sm_90",
            listing("@UP1 UIADD3 UR4, UR4, 0x1, URZ", architecture="sm_90a", name="second"),
        ]
    )
    first, second = sass.parse(both)
    assert (first.architecture, first.name) == ("sm_80", "first")
    assert first.instructions == (
        sass.Instruction(0, "@!P0", "LDG.E.128", "R4, [R2.64+0x10]"),
        sass.Instruction(16, "", "EXIT", ""),
    )
    assert (second.architecture, second.name) == ("sm_90a", "second")
    assert second.instructions[0].guard == "@UP1"


def test_parse_of_no_function() -> None:
    assert sass.parse("\tcode for sm_80\n\t.target sm_80\n") == []


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E.128", 16),
        ("LDG.E.LTC128B.64", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", 16),
        ("LDGSTS.E.LTC128B", 4),
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.S8", 1),
        ("LDG.E", 4),
        ("STG.E.EF.128", 16),
        ("LDG.E.ENL2.256", 32),
    ],
)
def test_width_of_an_access(opcode: str, width: int) -> None:
    (instruction,) = code(f"{opcode} R4, [R2.64]")
    assert sass.access_bytes(instruction) == width


def test_counts() -> None:
    counts = sass.count(
        code(
            "LDG.E.128 R4, [R2.64]",
            "LDGSTS.E.BYPASS.128 [R9], [R2.64]",
            "LDG.E.U16 R4, [R2.64]",
            "LDS.128 R4, [R8]",
            "STG.E.64 [R2.64], R4",
            "STG.E.128 [R2.64], R4",
            "STL [R1], R4",
            "LDL.LU R4, [R1]",
            "HMMA.16816.F32.BF16 R4, R8, R12, R4",
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT",
            "IMAD R1, R2, R3, R4",
            "UTMALDG.2D [UR8], [UR4], desc[UR14]",
            "NOP",
        )
    )
    assert counts == sass.Counts(12, 2, 2, 1, 1, 1, 1, 2)
    assert counts.tensor_core_share == 2 / 12
    assert sass.count([]).tensor_core_share == 0


def test_usage_of_a_library_and_of_a_cubin() -> None:
    figures = "\n  REG:96 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:568\n"
    assert sass.parse_usage(f" Function k:{figures}") == {("", "k"): sass.Usage(96, 24, 1024)}
    both = f"arch = sm_80\n Function k:{figures}arch = sm_90\n Function k:{figures}"
    assert set(sass.parse_usage(both)) == {("sm_80", "k"), ("sm_90", "k")}


# loops


def heads(*lines: str) -> dict[int, int]:
    """Number of instructions by index of a loop's first."""
    return {loop.head // 16: len(loop.instructions) for loop in sass.loops(code(*lines))}


def test_nested_loops_and_the_padding_behind_the_code() -> None:
    found = heads(
        "MOV R1, R2",
        "MOV R1, R2",  # 1: outer
        "HMMA.16816.F32 R4, R8, R12, R4",  # 2: inner
        "@P0 BRA 0x20",
        "@P1 BRA 0x10",
        "EXIT",
        "BRA 0x60",  # to itself, never reached
        "NOP",
    )
    assert found == {1: 4, 2: 2}


def test_code_out_of_line_belongs_to_its_loop_and_makes_none() -> None:
    found = heads(
        "MOV R1, R2",
        "LDG.E.128 R4, [R2.64]",  # 1: the loop
        "@P0 BRA 0x60",
        "HMMA.16816.F32 R4, R8, R12, R4",  # 3: where the cold code returns
        "@P1 BRA 0x10",
        "EXIT",
        "MOV R4, RZ",  # 6: cold
        "BRA 0x30",  # backward, but no loop
    )
    assert found == {1: 6}


def test_a_loop_left_by_a_call() -> None:
    """sm_80 leaves a loop by a CALL to behind the jump back; its target may be padding."""
    found = heads(
        "MOV R1, R2",  # 0: outer
        "HMMA.16816.F32 R4, R8, R12, R4",  # 1: inner
        "@P0 CALL.REL.NOINC 0x40",
        "BRA 0x10",
        "NOP",
        "@P1 EXIT",
        "BRA 0x0",
    )
    assert found == {0: 7, 1: 3}


def test_branches_meet_behind_a_bsync_out_of_line() -> None:
    found = heads(
        "BSSY B0, 0x30",  # 0: the loop
        "@P0 BRA 0x50",
        "BSYNC B0",
        "@P1 BRA 0x0",
        "EXIT",
        "MOV R1, R2",
        "BSYNC B0",  # goes to 3, not on
        "EXIT",
    )
    assert found == {0: 6}


def test_hot_loop_passes_over_a_wait_inside_and_takes_most_products() -> None:
    product = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT"
    found = sass.hot_loop(
        code(
            product,  # 0: a small loop
            "@P0 BRA 0x0",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2",  # 2: the hot loop, and a wait in it
            "@!P1 BRA 0x20",
            product,
            product,
            "LDG.E R4, [R2.64]",
            "@P0 BRA 0x20",
            "@P1 BRA 0x0",
            product,
            product,
            product,  # outside of any loop
            "EXIT",
        )
    )
    assert found is not None
    assert (found.instructions, found.tensor_core, found.loads_narrow) == (6, 2, 1)
    assert sass.hot_loop(code(product, "EXIT")) is None
    assert sass.hot_loop(()) is None


@pytest.mark.parametrize("seed", range(40))
def test_loops_are_those_of_the_control_flow_graph(seed: int) -> None:
    """Random jumps, against dominators and reachability by networkx."""
    draw = random.Random(seed)
    size = draw.randrange(3, 24)
    lines, graph = [], nx.DiGraph()
    graph.add_nodes_from(range(size + 1))
    for i in range(size):
        target = draw.randrange(size)
        kind = draw.choice(["MOV R1, R2", "MOV R1, R2", "@P0 BRA {}", "BRA {}", "BRA P3, {}"])
        lines.append(kind.format(hex(16 * target)))
        if "BRA" in kind:
            graph.add_edge(i, target)
        if not kind.startswith("BRA {"):
            graph.add_edge(i, i + 1)
    lines.append("EXIT")

    above = nx.immediate_dominators(graph, 0)

    def dominates(head: int, node: int) -> bool:
        while node != head and above.get(node, None) not in (None, node):
            node = above[node]
        return node == head

    expected: dict[int, set[int]] = {}
    reached = nx.descendants(graph, 0) | {0}
    for node, head in graph.edges:
        if node in reached and dominates(head, node):
            before = graph.reverse(copy=True)
            before.remove_node(head)
            body = {head} | ({node} | nx.descendants(before, node) if node != head else set())
            expected.setdefault(head, set()).update(body & reached)
    found = {
        loop.head // 16: {each.address // 16 for each in loop.instructions} & reached
        for loop in sass.loops(code(*lines))
    }
    assert found == expected


# occupancy


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


# the command

KERNEL = static_kernels.Kernel(
    "triton", "two_pass", "sm_90", "bf16", "aligned", "block_q=64", 128, 4096, 2
)
PRODUCTS = ("LDG.E.128 R4, [R2.64]", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "EXIT")


def row(
    *lines: str, registers: int = 64, local: int = 0, kernel: static_kernels.Kernel = KERNEL
) -> static.Row:
    (function,) = sass.parse(listing(*lines))
    usage = sass.Usage(registers, local, 1024)
    return static.row_of(kernel, static_kernels.Code(function, usage, "compiler"))


def test_row_leaves_out_the_systems_shared_memory() -> None:
    good = row(*PRODUCTS)
    assert (good.shared_bytes, good.blocks_per_sm, good.limited_by) == (4096, 8, "registers")
    assert (good.occupancy_percent, good.launched_occupancy_percent) == (50, 12.5)
    assert not static.faults(good)
    older = row(*PRODUCTS, kernel=KERNEL._replace(architecture="sm_80"))
    assert older.shared_bytes == 4096 + 1024


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (row(*PRODUCTS, local=8), "8 bytes of local memory, 0 accesses"),
        (row("STL [R1], R4", *PRODUCTS), "0 bytes of local memory, 1 accesses"),
        (row("LDG.E.128 R4, [R2.64]", "EXIT"), "no tensor-core instruction"),
        (row("HMMA.16816.F32 R4, R8, R12, R4", "EXIT"), "no 16-byte load"),
        (row(*PRODUCTS, registers=255, kernel=KERNEL._replace(threads=512)), "by its registers"),
        (row(*PRODUCTS, registers=255, kernel=KERNEL._replace(launched_per_sm=3)), "room for 2"),
    ],
)
def test_faults(made: static.Row, fault: str) -> None:
    (found,) = static.faults(made)
    assert fault in found
    assert found.startswith("triton two_pass sm_90 bf16 aligned block_q=64: ")


def test_odd_widths_and_factorizations_need_no_wide_loads() -> None:
    odd = row(*PRODUCTS[1:], kernel=KERNEL._replace(layout="odd width"))
    assert not static.faults(odd)
    assert not static.faults(row("EXIT", kernel=KERNEL._replace(kernel="cholesky")))


def test_summary_spans_a_group() -> None:
    other = row(*PRODUCTS, registers=96)
    text = static.summary([row(*PRODUCTS), other])
    assert "triton two_pass sm_90     2      64-96" in text
    assert "31-50" in text


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["static", "--backend", "torch"]) == 2
    assert "expected --backend of triton, cuda, got 'torch'" in capsys.readouterr().err
    assert cli.main(["static", "--arch", "sm_80,gfx942"]) == 2
    assert "expected --arch of sm_80, sm_90" in capsys.readouterr().err


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(static_kernels.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(static_kernels.shutil, "which", lambda _: None)
    nvcc = tmp_path / "nvcc"
    setup = SimpleNamespace(find_nvcc=lambda: (str(nvcc), []))
    monkeypatch.setattr(static_kernels, "setup_module", lambda: setup)
    (tmp_path / "cuobjdump").touch()  # without its nvdisasm
    with pytest.raises(ValueError, match=rf"were not found; looked at {tmp_path}; install triton"):
        static_kernels.find_cuobjdump()
    (tmp_path / "nvdisasm").touch()
    assert static_kernels.find_cuobjdump() == tmp_path / "cuobjdump"


def test_extension_must_be_built_and_current(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(static_cuda.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="run `make build` where nvcc is, or leave it out"):
        static_cuda.extension()
    old = tmp_path / "_cuda.so"
    old.touch()
    os.utime(old, (0, 0))
    spec = SimpleNamespace(origin=str(old))
    monkeypatch.setattr(static_cuda.importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(ValueError, match=r"csrc/\S+ is newer than"):
        static_cuda.extension()
    os.utime(old)
    assert static_cuda.extension() == old


@NEEDS_TRITON
@pytest.mark.slow
def test_command_compiles_and_tabulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One kernel through the whole of it, against what the compiler's own gate counts."""
    from tests.triton import aot

    path = tmp_path / "static.csv"
    path.write_text("replaced\n")
    arguments = ["static", "--backend", "triton", "--arch", "sm_80", "--kernel", "one_pass"]
    assert cli.main([*arguments, "--dtype", "bf16", "--csv", str(path)]) == 0
    said = capsys.readouterr().out
    assert "triton one_pass sm_80     4" in said
    assert "no faults" in said
    rows = report.read_csv(path)
    assert [r["layout"] for r in rows] == ["aligned", "aligned", "odd width", "odd width"]
    launches = [
        made
        for kernel, made in static_triton.triton_launches("sm_80")
        if (kernel.kernel, kernel.dtype) == ("one_pass", "bf16")
    ]
    for got, made in zip(rows, launches, strict=True):
        gate = aot.compile_launch(made, "sm_80")
        assert int(got["tensor_core"]) == gate.tensor_core > 0
        assert int(got["registers"]) == gate.registers
        assert int(got["shared_bytes"]) == gate.shared_bytes
        assert int(got["threads_per_block"]) == 32 * made.config.num_warps
        assert int(got["local_bytes"]) == gate.spilled_bytes == 0
        assert int(got["blocks_per_sm"]) >= made.config.programs_per_sm
        hot = int(got["hot_tensor_core"])
        assert 0 < hot <= int(got["tensor_core"])
        if got["layout"] == "aligned":
            assert int(got["loads_16"]) == gate.wide_loads + gate.part_loads
            assert int(got["hot_loads_narrow"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_launches_of_the_extension() -> None:
    """A launch of each file of csrc/inst at least, each with a name that is its own."""
    found = list(static_cuda.cuda_launches(["sm_80", "sm_90"]))
    for architecture in ("sm_80", "sm_90"):
        own = [(k, p) for k, p in found if k.architecture == architecture]
        stems = {(k.kernel, p.pattern) for k, p in own}
        files = [p.stem for p in (report.ROOT / "csrc" / "inst").glob("*.cu")]
        assert len(stems) == len(files) + 1  # cholesky.cu
        limit = occupancy.LIMITS[architecture].shared_bytes_of_block
        assert all(0 <= k.dynamic_shared_bytes <= limit for k, _ in own)
        assert all(k.threads % 32 == 0 and 32 <= k.threads <= 1024 for k, _ in own)
        largest = max(k.dynamic_shared_bytes for k, _ in own if k.kernel == "cholesky")
        l = next(l for l in range(1000) if 2 * (l + 1) * (l + 2) > limit)
        assert largest == 2 * l * (l + 1)


def test_mangled_names_are_told_apart() -> None:
    _, wide = static_cuda._described("coefficients;0,128;bf16;rows=256;256;1000", "sm_80")
    _, narrow = static_cuda._described("coefficients;0,64;bf16;rows=256;256;1000", "sm_80")
    _, jacobi = static_cuda._described("jacobi;1;fp32;l=64;1024;1000", "sm_80")
    name = "_ZN3osf19coefficients_kernelINS_18CoefficientsTraitsILNS_4MathE0ELi128EEEEEvNS_6ParamsE"
    assert wide.match(name)
    assert not narrow.match(name)
    assert jacobi.match("_ZN3osf13jacobi_kernelILb1EEEvNS_12JacobiParamsE")
    assert not jacobi.match("_ZN3osf13jacobi_kernelILb0EEEvNS_12JacobiParamsE")


def test_extension_is_read_by_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch gets its own kernel's code; two launches may share one."""
    names = ["_ZN3osf15cholesky_kernelENS_14CholeskyParamsE", "_ZN3osf13jacobi_kernelILb1EEEvv"]
    codes = [
        (sass.Function(architecture, name, code("EXIT")), sass.Usage(registers, 0, 0))
        for architecture, registers in (("sm_80", 75), ("sm_90", 76))
        for name in names
    ]
    lines = [
        "cholesky;;fp32;l=64;128;100",
        "cholesky;;fp32;l=288;512;200",
        "jacobi;1;fp32;l=9;32;9",
    ]
    monkeypatch.setattr(static_cuda, "dump", lambda *_: codes)
    monkeypatch.setattr(static_cuda, "_nvcc_release", lambda _: "13.0")
    monkeypatch.setattr(
        static_cuda,
        "cuda_launches",
        lambda architectures: (static_cuda._described(x, a) for a in architectures for x in lines),
    )

    def read() -> list[static_kernels.Inspected]:
        return list(static_cuda.read_extension(Path("x.so"), Path("cuobjdump"), ["sm_90"]))

    found = read()
    assert [(k.config, c.function.name, c.usage.registers) for k, c in found] == [
        ("l=64", names[0], 76),
        ("l=288", names[0], 76),
        ("l=9", names[1], 76),
    ]
    assert {c.compiler for _, c in found} == {"nvcc 13.0"}
    lines.append("update;0;bf16;rows=128;256;0")
    with pytest.raises(ValueError, match=r"one update kernel of bf16 for sm_90, got 0; run `make"):
        read()
