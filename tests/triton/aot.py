"""Compiles a launch for an architecture with no driver, and says what is wrong with the code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from osf_kernels.backends.chains import Chain, chain_of
from osf_kernels.backends.jobs import Problem
from osf_kernels.backends.operands import Arena
from osf_kernels.backends.triton import (
    configs,
    dispatch,
    groups,
    launch,
    product_schedule,
    tasks,
)
from osf_kernels.backends.triton.launches import Launch
from osf_kernels.forms import First, Name
from osf_kernels.plan import Step

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
    # Of 16 bytes, of what another program of the launch has written; not among wide_loads.
    passed_loads: int = 0
    # Of the narrow loads, those before and behind loops.
    narrow_outside: int = 0
    # Whether sums get singular values or what was stored before: both are read as a sum lies.
    with_addends: bool = False


def whole_width(columns: int) -> int:
    """Rounded up to 16 bytes of any dtype."""
    return -(-columns // 8) * 8


def matrix(rows: int, columns: int, dtype: torch.dtype, width: int = 0) -> torch.Tensor:
    """Rows ``width`` elements apart; contiguous where that is 0."""
    return torch.empty(rows, width or columns, dtype=dtype, device="meta")[:, :columns]


# What a weight is pinned to: its singular values, those and a residual, or a matrix beside it, of
# its own dtype or of float32.
Pin = Literal["", "S", "residual", "matrix", "float32 matrix"]

_FILL = 4096  # so many processors that every sum is split


def launches_of(
    config: configs.Projection,
    kind: Class,
    *,
    aligned: bool = True,
    padded: bool = False,
    pin: Pin = "",
    rank: int = 0,
) -> Launch:
    """The one launch of a dual projection of matrices so long that every sum is split.

    Args:
        aligned: or of odd width and rank.
        padded: the rank is three below the block's, in rows of whole 16-byte vectors.
        pin: with S coefficients are less U diag(S) and V diag(S).
        rank: by default the block's, or one less where that isn't aligned.
    """
    (made,), _ = _planned(config, kind, aligned=aligned, padded=padded, pin=pin, rank=rank)
    return made


def form_launches_of(
    config: configs.Projection,
    kind: Class,
    form: Name,
    first: First,
    rank: int,
    *,
    aligned: bool = True,
    padded: bool = False,
    pin: Pin = "",
) -> list[Launch]:
    """The same of another form: two launches where a coefficient is float32 until it is corrected,
    and rounded then."""
    launches, _ = _planned(
        config,
        kind,
        rank=rank,
        form=form,
        first=first,
        aligned=aligned,
        padded=padded,
        pin=pin,
    )
    return launches


def math_of(kind: Class) -> configs.Math:
    """Which rows of the config table a class of operands uses."""
    _, math = _planned(configs.projection_config("sm_80", "float32", 32), kind)
    return math


def ranks_served(
    architecture: str,
    math: configs.Math,
    config: configs.Projection,
    *,
    aligned: bool = True,
    padded: bool = False,
) -> list[int]:
    """A rank that a config's block holds, and one beyond all blocks: those for which the rules
    take it. The code for the two differs."""
    less = 3 if padded else int(not aligned)
    widest = max(row.block_r for _, row in configs.shipped(architecture, aligned))
    found = []
    for rank in (config.block_r - less, 2 * widest - less):
        if configs.projection_config(architecture, math, rank, aligned) == config:
            found.append(rank)
    return found


def _planned(
    config: configs.Projection,
    kind: Class,
    *,
    aligned: bool = True,
    padded: bool = False,
    pin: Pin = "",
    rank: int = 0,
    form: Name = "dual",
    first: First = "left",
) -> tuple[list[Launch], configs.Math]:
    m, n = (1024, 1024) if aligned else (1025, 1023)
    rank = rank or config.block_r - (3 if padded else not aligned)
    x = matrix(m, n, kind.x)
    U, V = (matrix(rows, rank, kind.basis, padded and whole_width(rank)) for rows in (m, n))
    step = Step(form, first, -1.0, 1.0, 0, 0, 0, "", "")
    problem = Problem(x, x, U, V, step)
    if pin in ("S", "residual"):
        problem = problem._replace(S=torch.empty(rank, device="meta"))
    if pin == "residual" and form == "inner":
        problem = problem._replace(rest_B=matrix(rank, rank, kind.x))
    elif pin == "residual":
        problem = problem._replace(rest_A=matrix(rank, n, kind.x), rest_B=matrix(m, rank, kind.x))
    if pin.endswith("matrix"):
        dtype = torch.float32 if pin == "float32 matrix" else kind.x
        problem = problem._replace(addend=matrix(m, n, dtype))
    arena = Arena(x.device)
    chain = chain_of(problem, dispatch._coefficient_dtype(problem), arena.new)
    maths: list[configs.Math] = []

    def choose(chain: Chain, math: configs.Math, *_: object) -> configs.Projection:
        maths.append(math)
        return configs.beside_addend(config, groups.addend_width(chain))

    planned = groups.plan_chain(chain, arena, kind.float32_precision, choose)
    launches, _ = tasks.projection_launches([planned], fill=_FILL, room=0.0, limit=1 << 40)
    return launches, maths[0]


def products_of(
    config: configs.Multiply | configs.Gram,
    dtype: torch.dtype,
    precision: str,
    *,
    aligned: bool = True,
    transposed: bool = False,
    rank: int = 128,
    padded: bool = False,
) -> Launch:
    """The launch a config makes of A Q (or Aᵀ Q), or of Aᵀ A (or A Aᵀ), in float32 accuracy.

    Not aligned: A has rows of odd width. Padded: Q has rows of whole 16-byte vectors.
    """
    m, n = (1024, 1024) if aligned else (1023, 1021)
    A = matrix(m, n, dtype)
    if isinstance(config, configs.Multiply):
        products = config
        width = padded and whole_width(rank)
        rows, columns = (n, m) if transposed else (m, n)
        Q = matrix(columns, rank, torch.float32, width)
        (made,) = product_schedule.multiply_launches(
            [A],
            [Q],
            [matrix(rows, rank, torch.float32, width)],
            transpose=transposed,
            fill=_FILL,
            float32_precision=precision,
            choose=lambda *_: products,
        )
        return made
    size = m if transposed else n
    (made,) = product_schedule.gram_launches(
        [A],
        [matrix(size, size, torch.float32)],
        right=not transposed,
        fill=_FILL,
        float32_precision=precision,
        choose=lambda *_: config,
    )
    return made


def compiled_of(made: Launch, architecture: str) -> Any:
    """What Triton makes of a launch for an architecture, with no driver."""
    kernel = launch.kernel_of(made)
    amd = architecture.startswith("gfx")
    constants = launch.constexprs(made, amd)
    pointers = {"meta": "*i64", "constant": "*i64", "workspace": "*fp32"}
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
    options = launch.compile_options(made.config, amd)
    return triton.compile(source, target=TARGETS[architecture], options=options)


def compile_launch(made: Launch, architecture: str) -> Compiled:
    compiled = compiled_of(made, architecture)
    constants = made.constants
    name = f"{made.kernel} {made.config} [{_words(constants)}] on {architecture}"
    read = _hip if architecture.startswith("gfx") else _cuda
    # The operands of ``multiply`` are those that x is cut into.
    operands = [constants.get(key) for key in ("DOT", "C_DOT", "UPDATE_DOT")]
    if made.kernel == "multiply":
        operands = [constants["X"]]
    return read(name, architecture, compiled)._replace(
        float32_operands=torch.float32 in operands,
        with_addends=bool(constants.get("HAS_OFFSET") or constants.get("HAS_INITIAL")),
    )


def _words(constants: dict[str, object]) -> str:
    """What tells launches of a config apart."""
    names = ("X", "U", "BASIS", "DOT", "PRECISION", "X_LAYOUT", "U_LAYOUT", "WHOLE", "HAS_OFFSET")
    return ", ".join(
        f"{name}={str(constants[name]).removeprefix('torch.')}"
        for name in names
        if name in constants
    )


def innermost_loops(text: str) -> list[str]:
    """The loops of PTX or of AMD's assembly that hold no other one, in the order of the text."""
    lines = text.splitlines()
    label = re.compile(r"^(\$L__BB\w+|\.LBB\w+):")
    places = {found[1]: i for i, line in enumerate(lines) if (found := label.match(line))}
    loops = []
    for end, line in enumerate(lines):
        jump = re.search(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\s+(\$L__BB\w+|\.LBB\w+)", line)
        if jump and places[jump[1]] <= end:
            loops.append((places[jump[1]], end))
    return [
        "\n".join(lines[start : end + 1])
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]


_PRODUCT = re.compile(r"\bw?g?mma\.(?:sync|mma_async)")


def sum_faults(made: Launch, ptx: str) -> list[str]:
    """What keeps the loads of A, B and parts of C from running beside their products."""
    assert isinstance(made.config, configs.Projection)
    found = []
    loops = [loop for loop in innermost_loops(ptx) if _PRODUCT.search(loop)]
    sums = [loop for loop in loops if "cp.async" in loop and "st.global" not in loop]
    if len(sums) != 3:
        found.append(f"{len(sums)} loops that copy, not those of A, B and C")
    for loop in sums:
        groups = loop.count("cp.async.commit_group")
        waits = [int(number) for number in re.findall(r"cp\.async\.wait_group\s+(\d+)", loop)]
        wanted = 2 * (made.config.reduction_stages - 2)  # of x and of the basis, in later steps
        if groups != 2 or min(waits, default=0) < wanted:
            found.append(f"{groups} copies a step, {waits} pending beside the products")
        if "ld.global" in loop:
            found.append("loads past the copies")
    return found


_SHAPE = re.compile(r"(w?g?mma)\.(?:sync|mma_async)\S*?\.m(\d+)n(\d+)k(\d+)")


def repeated_products(made: Launch, ptx: str) -> list[str]:
    """Loops in which a program multiplies more than its tiles: warps for which there are too few
    rows of them take the same products as others. The parts of C, which are few, may be."""
    config, constants = made.config, made.constants
    assert isinstance(config, configs.Projection)
    found: list[str] = []
    sums: list[str] = []
    for loop in innermost_loops(ptx):
        shapes = _SHAPE.findall(loop)
        if not shapes or "cp.async" not in loop:
            continue
        taken = 0.0
        for name, *sizes in shapes:  # of a warp, or of four
            m, n, k = map(int, sizes)
            taken += m * n * k * config.num_warps / (4 if name == "wgmma" else 1)
        wanted, precision = config.block_q * config.block_k * config.block_r, "PRECISION"
        if updates := "st.global" in loop:
            wanted, precision = (
                2 * config.block_m * config.block_n * config.block_r,
                "UPDATE_PRECISION",
            )
        wanted *= 3 if constants[precision] == "tf32x3" else 1
        if taken != wanted:
            fault = f"{taken / wanted:.2f} times the products, {precision}"
            (found if updates else sums).append(fault)
    # Of three loops over sums, those of A and B, which are alike, and that of parts of C.
    return found + (sums if len(sums) > 1 or not constants["C_OF_A"] else [])


def update_loop(ptx: str) -> str:
    """The loop that multiplies a panel by factors that are held, and stores it."""
    (found,) = [
        loop for loop in innermost_loops(ptx) if "st.global" in loop and _PRODUCT.search(loop)
    ]
    return found


def copy_faults(made: Launch, ptx: str) -> list[str]:
    """What keeps the loads of an update from running beside its products, in PTX before sm_100.

    Of the copies that a step issues, those of a later step must still be pending where it waits for
    its own; copies are of 16 bytes; and what is converted are x and the result alone.
    """
    config, loop = made.config, update_loop(ptx)
    assert isinstance(config, configs.Projection)
    found = []
    groups = loop.count("cp.async.commit_group")
    waits = [int(number) for number in re.findall(r"cp\.async\.wait_group\s+(\d+)", loop)]
    pending = min(waits, default=0)
    if not groups or pending < groups:
        found.append(f"{groups} copies a step, {pending} pending beside the products")
    if loop.rfind("cp.async.wait_group") > re.search(r"mma\.(?:sync|mma_async)", loop).start():  # type: ignore[union-attr]
        found.append("waits for copies behind a product")
    widths = re.findall(r"cp\.async\.c[ag]\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)", loop)
    if any(int(width, 0) != 16 for width in widths) or "cp.async.ca" in loop:
        found.append("copies of other than 16 bytes")
    if re.search(r"ld\.global", loop):
        found.append("loads past the copies")
    held = config.block_m * config.block_n // (32 * config.num_warps)  # of a tile, by a thread
    widened = len(re.findall(r"cvt\.f32\.bf16\s", loop))
    narrowed = len(re.findall(r"cvt\.rn\.bf16\.f32\s", loop))
    narrowed += 2 * len(re.findall(r"cvt\.rn\.bf16x2\.f32\s", loop))
    if (widened, narrowed) != (held, held):
        found.append(f"{widened} values widened and {narrowed} narrowed, not {held} each")
    return found


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
    widths = _widths(ptx)
    # Loops over tiles copy and multiply. In those that take S off it is read as it lies.
    product = rf"{TENSOR_CORE[architecture]}|mma\.sync"
    loops = [
        loop
        for loop in innermost_loops(ptx)
        if "ld.global.cg" not in loop
        and ("cp.async" not in ptx or ("cp.async" in loop and re.search(product, loop)))
    ]
    inside = [width for loop in loops for width in _widths(loop)]
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
        passed_loads=len(re.findall(r"ld\.global\.cg\.v4\.b32", ptx)),
        narrow_outside=sum(width < 8 for width in widths) - sum(width < 8 for width in inside),
    )


def _widths(ptx: str) -> list[int]:
    """The bytes of every load and copy of a tile.

    The scheduler's own scalars are 64 bits wide; a narrower access is a part of a tile. What
    another program has written comes by .cg: parts of sums, as wide as they can be whatever the
    operands are, and coefficients, of which C has any strides.
    """
    widths = [
        int(width, 0) for width in re.findall(r"cp\.async\.c[ag]\S* \[.*?\], \[.*?\], (\w+)", ptx)
    ]
    for kind in re.findall(r"ld\.global(?!\.cg)(\S*)", ptx):
        vector, element = re.search(r"\.v(\d)", kind), re.search(r"\.[bfsu](\d+)$", kind)
        assert element, kind
        widths.append(int(element[1]) * (int(vector[1]) if vector else 1) // 8)
    return widths


def _hip(name: str, architecture: str, compiled: Any) -> Compiled:
    text = compiled.asm["amdgcn"]
    narrow = r"(?:global|buffer)_load_(?:u?short|d16|u?byte|sbyte)"
    inside = sum(len(re.findall(narrow, loop)) for loop in innermost_loops(text))

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
        len(re.findall(narrow, text)),
        0,
        len(re.findall(r"v_add_f32", text)) + 2 * len(re.findall(r"v_pk_add_f32", text)),
        narrow_outside=len(re.findall(narrow, text)) - inside,
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
    narrow = compiled.narrow_loads
    if compiled.with_addends:
        narrow -= compiled.narrow_outside
    if aligned and narrow and not compiled.float32_operands:
        found.append(f"{narrow} loads of under 8 bytes")
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
    compiled: Compiled, config: configs.Multiply | configs.Gram, *, aligned: bool
) -> list[str]:
    """The same of the products in float32 accuracy, whose running sums are added apart."""
    found = faults(compiled, config, aligned=aligned)
    if isinstance(config, configs.Multiply):
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
