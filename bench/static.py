"""``python -m bench static``: what the machine code of every shipped kernel holds, with no GPU.

Every pinned Triton config is compiled for each class of operands it serves, and the CUDA
extension is read as it was built. What the columns mean:

- ``local_bytes``, ``local_accesses``: local memory a thread, and the instructions on it; any is a
  spill or an array indexed at run time.
- ``instructions``, and those of a kind beside them, count each instruction of the code once,
  NOPs left out, paths for odd strides included.
- ``hot_…``: the same of the hot loop, the innermost one with most of the tensor-core
  instructions; empty where no loop has any. One HGMMA (m64n256k16, four warps) does the work of 32
  HMMA (m16n8k16) of each, so shares compare within an architecture, not across.
- ``loads_16``, ``stores_16`` move 16 bytes a thread, cp.async included; ``bulk_copies`` are TMA's.
  Narrow loads outside of the hot loop are the scheduler's scalars, and the paths for odd strides.
- ``blocks_by_…``: blocks a multiprocessor holds by each of its limits, ``occupancy_percent`` their
  warps of the most there can be. The grid has ``launched_per_sm`` blocks for each multiprocessor
  (of the factorizations a block a matrix, of Triton's products a block a tile), which gives
  ``launched_occupancy_percent``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import report, sass
from bench.occupancy import LIMITS, SHARED_RESERVE, occupancy
from bench.static_cuda import BUILT_FOR, extension, read_extension
from bench.static_kernels import Code, Inspected, Kernel, find_cuobjdump
from bench.static_triton import compile_triton, launch_key, triton_launches

BACKENDS = ("triton", "cuda")
MULTIPLYING = ("projection", "multiply", "gram", "coefficients", "update")
KERNELS = (*MULTIPLYING, "cholesky", "jacobi")
# Gets what is at work, how many kernels were compiled, and of how many (None: not known yet).
Step = Callable[[str, int, int | None], None]


@dataclass
class Row:
    """One kernel of one config for one architecture. None: there is no such loop or limit."""

    backend: str
    kernel: str
    arch: str
    dtype: str
    layout: str
    config: str
    threads_per_block: int
    registers: int
    local_bytes: int
    local_accesses: int
    shared_bytes: int
    instructions: int
    tensor_core: int
    tensor_core_share: float
    hot_instructions: int | None
    hot_tensor_core: int | None
    hot_tensor_core_share: float | None
    hot_loads_narrow: int | None
    loads_16: int
    loads_narrow: int
    stores_16: int
    stores_narrow: int
    bulk_copies: int
    blocks_by_registers: int
    blocks_by_shared: int
    blocks_by_threads: int
    blocks_by_blocks: int
    blocks_per_sm: int
    limited_by: str
    occupancy_percent: float
    launched_per_sm: int | None
    launched_occupancy_percent: float
    compiler: str


def row_of(kernel: Kernel, code: Code) -> Row:
    whole = sass.count(code.function.instructions)
    hot = sass.hot_loop(code.function.instructions)
    shared = code.usage.static_shared_bytes
    if not kernel.architecture.startswith("sm_8") and shared >= SHARED_RESERVE:
        shared -= SHARED_RESERVE  # from 9.0 on the report holds the system's part
    shared += kernel.dynamic_shared_bytes
    held = occupancy(kernel.architecture, code.usage.registers, shared, kernel.threads)
    return Row(
        backend=kernel.backend,
        kernel=kernel.kernel,
        arch=kernel.architecture,
        dtype=kernel.dtype,
        layout=kernel.layout,
        config=kernel.config,
        threads_per_block=kernel.threads,
        registers=code.usage.registers,
        local_bytes=code.usage.local_bytes,
        local_accesses=whole.local,
        shared_bytes=shared,
        instructions=whole.instructions,
        tensor_core=whole.tensor_core,
        tensor_core_share=whole.tensor_core_share,
        hot_instructions=None if hot is None else hot.instructions,
        hot_tensor_core=None if hot is None else hot.tensor_core,
        hot_tensor_core_share=None if hot is None else hot.tensor_core_share,
        hot_loads_narrow=None if hot is None else hot.loads_narrow,
        loads_16=whole.loads_16,
        loads_narrow=whole.loads_narrow,
        stores_16=whole.stores_16,
        stores_narrow=whole.stores_narrow,
        bulk_copies=whole.bulk_copies,
        blocks_by_registers=held.by_registers,
        blocks_by_shared=held.by_shared,
        blocks_by_threads=held.by_threads,
        blocks_by_blocks=held.by_blocks,
        blocks_per_sm=held.blocks,
        limited_by=held.limited_by,
        occupancy_percent=100 * held.share(),
        launched_per_sm=kernel.launched_per_sm,
        launched_occupancy_percent=100 * held.share(kernel.launched_per_sm),
        compiler=code.compiler,
    )


def faults(row: Row) -> list[str]:
    """What the code must not be, whatever its speed."""
    found = []
    if row.local_bytes or row.local_accesses:
        found.append(f"{row.local_bytes} bytes of local memory, {row.local_accesses} accesses")
    if row.kernel in MULTIPLYING and not row.tensor_core:
        found.append("no tensor-core instruction")
    if row.kernel in MULTIPLYING and row.layout != "odd width" and not row.loads_16:
        found.append("no 16-byte load")
    if not row.blocks_per_sm:
        found.append(f"can't be launched, by its {row.limited_by}")
    elif row.launched_per_sm and row.blocks_per_sm < row.launched_per_sm:
        found.append(
            f"{row.launched_per_sm} blocks a processor launched, room for {row.blocks_per_sm}"
        )
    name = f"{row.backend} {row.kernel} {row.arch} {row.dtype} {row.layout} {row.config}"
    return [f"{name}: {fault}" for fault in found]


def _span(values: Sequence[float], pattern: str) -> str:
    low, high = (format(each, pattern) for each in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def summary(rows: Sequence[Row]) -> str:
    """A line for each kernel and architecture, over its configs, dtypes and layouts."""
    header = (
        *("kernel", "rows", "registers", "local B", "shared KB", "instructions"),
        *("hot loop", "tensor %", "blocks/SM", "occupancy %", "launched %"),
    )
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.backend, row.kernel, row.arch].append(row)
    lines = []
    for (backend, kernel, arch), group in groups.items():
        hot = [row for row in group if row.hot_instructions is not None]
        lines.append(
            (
                f"{backend} {kernel} {arch}",
                str(len(group)),
                _span([row.registers for row in group], "d"),
                str(max(row.local_bytes for row in group)),
                _span([row.shared_bytes / 1024 for row in group], ".0f"),
                _span([row.instructions for row in group], "d"),
                _span([row.hot_instructions or 0 for row in hot], "d") if hot else "-",
                _span([100 * (row.hot_tensor_core_share or 0) for row in hot], ".1f")
                if hot
                else "-",
                _span([row.blocks_per_sm for row in group], "d"),
                _span([row.occupancy_percent for row in group], ".0f"),
                _span([row.launched_occupancy_percent for row in group], ".0f"),
            )
        )
    return report.table(header, lines)


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def add(commands: Any) -> None:
    """The subcommand's arguments."""
    static = commands.add_parser("static", help="machine code of every kernel, inspected, no GPU")
    static.add_argument("--backend", type=_listed, default=list(BACKENDS), help="with commas")
    static.add_argument("--arch", type=_listed, default=list(LIMITS), help="with commas")
    static.add_argument("--kernel", type=_listed, help=f"of {', '.join(KERNELS)}; default: all")
    static.add_argument("--dtype", type=_listed, help="by name, with commas; default: all")
    static.add_argument("--csv", type=Path, help="write the rows to this file, anew")


def _inspected(arguments: argparse.Namespace, step: Step) -> Iterator[Inspected]:
    """Each kernel asked for."""

    def wanted(kernel: Kernel) -> bool:
        named = arguments.kernel is None or kernel.kernel in arguments.kernel
        return named and (arguments.dtype is None or kernel.dtype in arguments.dtype)

    cuobjdump = find_cuobjdump()
    if "cuda" in arguments.backend:
        step("the CUDA extension", 0, None)
        architectures = [name for name in arguments.arch if name in BUILT_FOR]
        for each in read_extension(extension(), cuobjdump, architectures):
            if wanted(each[0]):
                yield each
    if "triton" not in arguments.backend:
        return
    todo: dict[tuple[str, str], list[tuple[Kernel, Any]]] = defaultdict(list)
    for architecture in arguments.arch:
        for kernel, made in triton_launches(architecture):
            if wanted(kernel):
                todo[architecture, launch_key(made)].append((kernel, made))
    for done, ((architecture, _), same) in enumerate(todo.items()):
        kernel, made = same[0]
        what = f"{kernel.kernel} {architecture} {kernel.dtype}, {kernel.layout}"
        step(what, done, len(todo))
        shared, code = compile_triton(made, architecture, cuobjdump)
        labels = {each._replace(dynamic_shared_bytes=shared): None for each, _ in same}
        yield from ((each, code) for each in labels)


def inspect(arguments: argparse.Namespace, step: Step) -> list[Row]:
    """Rows of what is asked for, in the order they are made.

    Raises ValueError for a name that is unknown or a tool that is missing.
    """
    for name, given, known in (
        ("--backend", arguments.backend, BACKENDS),
        ("--arch", arguments.arch, tuple(LIMITS)),
    ):
        if not given or not set(given) <= set(known):
            raise ValueError(
                f"bench static: expected {name} of {', '.join(known)}, got {','.join(given)!r}"
            )
    for name in arguments.kernel or ():
        if name not in KERNELS:
            raise ValueError(
                f"bench static: expected --kernel of {', '.join(KERNELS)}, got {name!r}"
            )
    if arguments.backend == ["cuda"] and not set(arguments.arch) & set(BUILT_FOR):
        raise ValueError(
            f"bench static: the CUDA extension is built for {', '.join(BUILT_FOR)}; expected one "
            f"of them as --arch, got {','.join(arguments.arch)!r}"
        )
    rows = [row_of(*each) for each in _inspected(arguments, step)]
    if not rows:
        raise ValueError("bench static: no kernel has that name and dtype; see --kernel, --dtype")
    return rows


def run(arguments: argparse.Namespace) -> int:
    """Prints the table and writes the rows; 1 where some code has a fault."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    from bench.bar import Bar

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def step(what: str, done: int, total: int | None) -> None:
            progress.update(task, description=what, completed=done, total=total)

        rows = inspect(arguments, step)
    print(summary(rows))
    found = [fault for row in rows for fault in faults(row)]
    print(*found, sep="\n") if found else print("no faults")
    if arguments.csv is not None:
        arguments.csv.unlink(missing_ok=True)
        report.append_csv(arguments.csv, rows, report.environment(torch.device("cpu")), Row)
        print(f"{len(rows)} rows in {arguments.csv}")
    return 1 if found else 0
