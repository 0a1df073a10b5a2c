"""The inspection of machine code: rows, their faults, and the command that tabulates them."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__ as cli
from bench import occupancy, report, sass, static, static_cuda, static_kernels, static_triton
from tests.listings import code, listing

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

KERNEL = static_kernels.Kernel(
    "triton", "projection", "sm_90", "bf16", "aligned", "block_q=64", 128, 4096, 2
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
    assert found.startswith("triton projection sm_90 bf16 aligned block_q=64: ")


def test_odd_widths_and_factorizations_need_no_wide_loads() -> None:
    odd = row(*PRODUCTS[1:], kernel=KERNEL._replace(layout="odd width"))
    assert not static.faults(odd)
    assert not static.faults(row("EXIT", kernel=KERNEL._replace(kernel="cholesky")))


def test_summary_spans_a_group() -> None:
    other = row(*PRODUCTS, registers=96)
    text = static.summary([row(*PRODUCTS), other])
    assert "triton projection sm_90     2      64-96" in text
    assert "31-50" in text


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["static", "--backend", "torch"]) == 2
    assert "expected --backend of triton, cuda, got 'torch'" in capsys.readouterr().err
    assert cli.main(["static", "--arch", "sm_80,gfx942"]) == 2
    assert "expected --arch of sm_80, sm_86, sm_90" in capsys.readouterr().err
    assert cli.main(["static", "--backend", "cuda", "--arch", "sm_86"]) == 2
    assert "is built for sm_80, sm_90; expected one of them" in capsys.readouterr().err


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
    from osf_kernels.backends.triton.configs import shipped
    from tests.triton import aot

    path = tmp_path / "static.csv"
    path.write_text("replaced\n")
    arguments = ["static", "--backend", "triton", "--arch", "sm_80", "--kernel", "projection"]
    assert cli.main([*arguments, "--dtype", "bf16", "--csv", str(path)]) == 0
    said = capsys.readouterr().out
    rows = report.read_csv(path)
    assert f"triton projection sm_80  {len(rows):4d}" in said
    assert "no faults" in said
    configs = sum(taken == "bfloat16" for taken, _ in shipped("sm_80"))
    layouts = ["aligned"] * configs + ["odd width"] + ["padded"] * configs
    assert [r["layout"] for r in rows] == layouts
    launches = [
        made
        for kernel, made in static_triton.triton_launches("sm_80")
        if (kernel.kernel, kernel.dtype) == ("projection", "bf16")
    ]
    for got, made in zip(rows, launches, strict=True):
        gate = aot.compile_launch(made, "sm_80")
        assert int(got["tensor_core"]) == gate.tensor_core > 0
        assert int(got["registers"]) == gate.registers
        assert int(got["shared_bytes"]) == gate.shared_bytes
        assert int(got["threads_per_block"]) == 32 * made.config.num_warps
        assert int(got["local_bytes"]) == gate.spilled_bytes == 0
        assert int(got["blocks_per_sm"]) >= made.config.programs_per_sm
        assert int(got["launched_per_sm"]) == made.config.programs_per_sm
        hot = int(got["hot_tensor_core"])
        assert 0 < hot <= int(got["tensor_core"])
        if got["layout"] != "odd width":
            # ptxas may unroll the loops that add parts (of A and B, and of C eight at once), and
            # no other.
            c = made.config
            rows = math.gcd(c.block_q, 8 * made.constants["BLOCK_C"])
            a_step = rows * c.block_r // (4 * 32 * c.num_warps)
            copies, rest = divmod(
                int(got["loads_16"]) - gate.wide_loads - gate.passed_loads, a_step
            )
            assert copies >= 0
            assert rest == 0
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
