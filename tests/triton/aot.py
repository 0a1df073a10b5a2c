"""Compiles a launch for an architecture with no driver, and says what is wrong with the code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from osf_kernels.backends.jobs import Coefficients, Update
from osf_kernels.backends.triton import configs, gram_schedule, launch, schedule

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory a program may use, and what a processor has for all of its programs (each of
# which the driver charges another KB).
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
REGISTERS = 65536
TENSOR_MEMORY_COLUMNS = 512
TENSOR_CORE = {
    "sm_80": r"mma\.sync",
    "sm_86": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "gfx942": r"v_mfma",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Class(NamedTuple):
    """What the operands of a launch are."""

    x: torch.dtype
    basis: torch.dtype
    float32_precision: str


class Compiled(NamedTuple):
    """One kernel's machine code, in figures."""

    name: str
    architecture: str
    tensor_core: int
    fallback: int  # mma.sync of the generation before, where a newer instruction is wanted
    spilled_bytes: int
    registers: int
    shared_bytes: int
    wide_loads: int
    narrow_loads: int
    tensor_memory_columns: int  # Blackwell's, of 512
    # Additions outside of the tensor cores, of what a thread holds of a tile.
    additions: int
    # A TF32 operand must run along the summed dimension. One that does not is turned on its way
    # into shared memory, by copies of 4 bytes (still a warp's 128 bytes at once).
    float32_operands: bool = False
    part_loads: int = 0  # of 16 bytes, of parts of sums; not among wide_loads


def whole_width(columns: int) -> int:
    """Rounded up to 16 bytes of any dtype."""
    return -(-columns // 8) * 8


def matrix(rows: int, columns: int, dtype: torch.dtype, width: int) -> torch.Tensor:
    """Rows ``width`` elements apart; contiguous where that is 0."""
    return torch.empty(rows, width or columns, dtype=dtype)[:, :columns]


def launches_of(
    config: configs.Config, kind: Class, *, aligned: bool = True, padded: int = 0
) -> schedule.Launch:
    """The launch a config makes of contiguous matrices, metadata and all.

    Padded: bases and coefficients of so many columns, or as many as a one_pass config can take,
    in rows of whole 16-byte vectors.
    """
    m, n = (512, 512) if aligned else (513, 511)  # long enough for every sum to be split
    rank = 64 if aligned else 63
    if isinstance(config, configs.OnePass):
        rank = config.block_r if aligned else config.block_r - 1
    if padded:
        rank = min(padded, config.block_r - 3) if isinstance(config, configs.OnePass) else padded
    width = padded and whole_width(rank)
    x = torch.empty(m, n, dtype=kind.x)
    U, V = (matrix(rows, rank, kind.basis, width) for rows in (m, n))
    A, B = torch.empty(rank, n), matrix(m, rank, torch.float32, width)
    if isinstance(config, configs.Update):
        (made,) = schedule.update_launches(
            [Update(x, x, U, A, B, V.mT, -1.0, 1.0)],
            float32_precision=kind.float32_precision,
            choose=lambda *_: config,
        )
        return made
    products = config
    assert isinstance(products, (configs.OnePass, configs.TwoPass))
    (made,) = schedule.coefficients_launches(
        [Coefficients(x, U, V, A, B)],
        fill=4096,
        float32_precision=kind.float32_precision,
        choose=lambda *_: products,
    )
    return made


def products_of(
    config: configs.TwoPass | configs.Gram,
    dtype: torch.dtype,
    precision: str,
    *,
    aligned: bool = True,
    transposed: bool = False,
    rank: int = 128,
    padded: bool = False,
) -> schedule.Launch:
    """The launch a config makes of A Q (or Aᵀ Q), or of Aᵀ A (or A Aᵀ), in float32 accuracy.

    Not aligned: A has rows of odd width. Padded: Q has rows of whole 16-byte vectors.
    """
    m, n = (1024, 1024) if aligned else (1023, 1021)
    A = torch.empty(m, n, dtype=dtype)
    if isinstance(config, configs.TwoPass):
        products = config
        width = padded and whole_width(rank)
        Q, out = (matrix(rows, rank, torch.float32, width) for rows in (n, m))
        job = Coefficients(A, None, Q, None, out)
        if transposed:
            job = Coefficients(A, torch.empty(m, rank), None, torch.empty(rank, n), None)
        (made,) = schedule.coefficients_launches(
            [job],
            fill=4096,
            float32_precision=precision,
            choose=lambda *_: products,
            accurate=True,
        )
        return made
    size = m if transposed else n
    (made,) = gram_schedule.gram_launches(
        [A],
        [torch.empty(size, size)],
        right=not transposed,
        fill=4096,
        float32_precision=precision,
        choose=lambda *_: config,
    )
    return made


def operand_bytes(config: configs.Config, kind: Class) -> int:
    """Which rows of the config table a class of operands uses."""
    dot = launches_of(config, kind).constants["DOT"]
    assert isinstance(dot, torch.dtype)
    return dot.itemsize


def compiled_of(made: schedule.Launch, architecture: str) -> Any:
    """What Triton makes of a launch for an architecture, with no driver."""
    kernel = launch.kernel_of(made)
    constants = launch.constexprs(made, architecture.startswith("gfx"))
    pointers = {"meta": "*i64", "workspace": "*fp32"}
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32")
        for name in kernel.arg_names
    }
    position = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={position[name]: value for name, value in constants.items()},
        attrs={position[name]: [["tt.divisibility", 16]] for name in pointers if name in signature},
    )
    return triton.compile(
        source, target=TARGETS[architecture], options=launch.compile_options(made.config)
    )


def compile_launch(made: schedule.Launch, architecture: str) -> Compiled:
    compiled = compiled_of(made, architecture)
    kind = ", ".join(str(v).removeprefix("torch.") for v in list(made.constants.values())[:7])
    name = f"{made.kernel} {made.config} [{kind}] on {architecture}"
    read = _hip if architecture.startswith("gfx") else _cuda
    float32_operands = made.constants["DOT"] == torch.float32
    return read(name, architecture, compiled)._replace(float32_operands=float32_operands)


def _cuda(name: str, architecture: str, compiled: Any) -> Compiled:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    # The scheduler's own scalars are 64 bits wide; a narrower access is a part of a tile. Parts of
    # sums come by .cg, and are as wide as they can be whatever the operands are.
    widths = [
        int(width, 0) for width in re.findall(r"cp\.async\.c[ag]\S* \[.*?\], \[.*?\], (\w+)", ptx)
    ]
    for kind in re.findall(r"ld\.global(?!\.cg)(\S*)", ptx):
        vector, element = re.search(r"\.v(\d)", kind), re.search(r"\.[bfsu](\d+)$", kind)
        assert element, kind
        widths.append(int(element[1]) * (int(vector[1]) if vector else 1) // 8)
    return Compiled(
        name,
        architecture,
        len(re.findall(TENSOR_CORE[architecture], ptx)),
        len(re.findall(r"mma\.sync", ptx)),
        stack + local,
        registers,
        int(compiled.metadata.shared),
        sum(width >= 16 for width in widths),
        sum(width < 8 for width in widths),
        int(getattr(compiled.metadata, "tmem_size", None) or 0),
        len(re.findall(r"add(?:\.rn)?\.f32 ", ptx))
        + 2 * len(re.findall(r"add(?:\.rn)?\.f32x2 ", ptx)),
        part_loads=len(re.findall(r"ld\.global\.cg\.v4\.b32", ptx)),
    )


def _hip(name: str, architecture: str, compiled: Any) -> Compiled:
    text = compiled.asm["amdgcn"]

    def figure(key: str) -> int:
        return sum(map(int, re.findall(rf"\.{key}:\s+(\d+)", text)))

    return Compiled(
        name,
        architecture,
        len(re.findall(TENSOR_CORE[architecture], text)),
        0,
        4 * (figure("vgpr_spill_count") + figure("sgpr_spill_count"))
        + figure("private_segment_fixed_size"),
        figure("vgpr_count"),
        int(compiled.metadata.shared),
        len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        len(re.findall(r"(?:global|buffer)_load_(?:u?short|d16|u?byte|sbyte)", text)),
        0,
        len(re.findall(r"v_add_f32", text)) + 2 * len(re.findall(r"v_pk_add_f32", text)),
    )


def faults(compiled: Compiled, config: configs.Config, *, aligned: bool = True) -> list[str]:
    """What a config must not do to its kernel."""
    found = []
    limit = SHARED_LIMIT[compiled.architecture]
    # Small tiles of odd strides may use the instruction of the generation before.
    if not (compiled.tensor_core or (compiled.fallback and not aligned)):
        found.append("no tensor-core instruction")
    if compiled.spilled_bytes:
        found.append(f"spills {compiled.spilled_bytes} bytes a thread")
    if compiled.shared_bytes > limit:
        found.append(f"{compiled.shared_bytes} bytes of shared memory, limit {limit}")
    if aligned and not compiled.wide_loads:
        found.append("no 16-byte load")
    if aligned and compiled.narrow_loads and not compiled.float32_operands:
        found.append(f"{compiled.narrow_loads} loads of under 8 bytes")
    if compiled.architecture.startswith("sm_"):
        resident = config.programs_per_sm
        registers = compiled.registers * config.num_warps * 32 * resident
        if registers > REGISTERS:
            found.append(f"{resident} programs a processor hold {registers} registers")
        if (compiled.shared_bytes + 1024) * resident > limit + 1024:
            found.append(f"{resident} programs a processor do not fit its shared memory")
        if compiled.tensor_memory_columns * resident > TENSOR_MEMORY_COLUMNS:
            found.append(f"{resident} programs a processor do not fit its tensor memory")
    return found


def product_faults(
    compiled: Compiled, config: configs.TwoPass | configs.Gram, *, aligned: bool
) -> list[str]:
    """The same of the products in float32 accuracy, whose running sums are added apart."""
    found = faults(compiled, config, aligned=aligned)
    if isinstance(config, configs.TwoPass):
        tile = config.block_q * config.block_r
    else:
        tile = config.block**2
    # AMD's matrix cores round to nearest, so there it matters less.
    cuda = compiled.architecture.startswith("sm_")
    threads = 32 * config.num_warps
    of_parts = 2 * configs.sum_block(config) ** 2 // threads  # two a step of sum_parts
    if cuda and compiled.additions - of_parts < tile // threads:
        found.append("the running sum is kept in the tensor cores")
    return found
