"""Machine code of every pinned Triton config, compiled ahead of time with no driver."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.occupancy import WARP
from bench.static_kernels import Code, Kernel, dump


def _shorter(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _layout(aligned: bool) -> str:
    return "aligned" if aligned else "odd width"


def triton_launches(architecture: str) -> Iterator[tuple[Kernel, Any]]:
    """Every pinned config with each class of operands it serves, and its launch.

    The launches are those that the test suite gates. Of odd widths, and of ragged ranks in padded
    rows, the main classes alone: tf32 and mixed dtypes take the same configs there.
    """
    from osf_kernels.backends.triton import configs
    from tests.triton import aot

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    classes = {
        "bf16": aot.Class(bf16, bf16, "tf32x3"),
        "fp16": aot.Class(fp16, fp16, "tf32x3"),
        "fp32 (tf32x3)": aot.Class(fp32, fp32, "tf32x3"),
        "fp32 (tf32)": aot.Class(fp32, fp32, "tf32"),
        "bf16, fp32 bases": aot.Class(bf16, fp32, "tf32x3"),
        "fp32, bf16 bases": aot.Class(fp32, bf16, "tf32x3"),
    }

    def serving(kind: aot.Class, *, aligned: bool = True, padded: bool = False) -> Iterator[Any]:
        """The configs of a class, each with the least rank by which its code differs."""
        math = aot.math_of(kind)
        for of, config in configs.shipped(architecture, aligned):
            if of == math:
                rank, *_ = aot.ranks_served(
                    architecture, math, config, aligned=aligned, padded=padded
                )
                yield aot.launches_of(config, kind, aligned=aligned, padded=padded, rank=rank)

    def described(made: Any, dtype: str, layout: str) -> tuple[Kernel, Any]:
        values = made.config._asdict()
        resident = values.pop("programs_per_sm")
        # The grid of a product has a program a tile; each of a projection's does tasks in turn.
        launched = resident if made.kernel == "projection" else None
        config = " ".join(f"{key}={value}" for key, value in values.items())
        threads = WARP * made.config.num_warps
        # The launch's own shared memory is known once it is compiled.
        return Kernel(
            "triton", made.kernel, architecture, dtype, layout, config, threads, 0, launched
        ), made

    for aligned in (True, False):
        for dtype, kind in classes.items():
            if not aligned and dtype not in ("bf16", "fp16", "fp32 (tf32x3)"):
                continue
            for made in serving(kind, aligned=aligned):
                yield described(made, dtype, _layout(aligned))
    for dtype in ("bf16", "fp32 (tf32x3)"):
        for made in serving(classes[dtype], padded=True):
            yield described(made, dtype, "padded")
    for aligned in (True, False):
        for x in (bf16, fp16, fp32):
            name = str(x).removeprefix("torch.")
            rows = [
                (config, _layout(aligned), 128 if aligned else 127)
                for config in configs.shipped_products(architecture, name, aligned)
            ]
            if aligned:
                ragged = configs.multiply_config(architecture, name, 8, whole=False)
                rows.append((ragged, "odd basis", 127))
            for product, layout, rank in rows:
                made = aot.products_of(product, x, "tf32x3", aligned=aligned, rank=rank)
                yield described(made, _shorter(x), layout)


def compile_triton(made: Any, architecture: str, cuobjdump: Path) -> tuple[int, Code]:
    """Dynamic shared memory and code of a launch, compiled for an architecture with no driver."""
    import triton

    from tests.triton import aot

    compiled = aot.compiled_of(made, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((function, usage),) = dump(cuobjdump, Path(file.name))
    return int(compiled.metadata.shared), Code(function, usage, f"triton {triton.__version__}")


def launch_key(made: Any) -> str:
    """Equal for launches that compile to the same code."""
    from osf_kernels.backends.triton import launch

    constants = sorted((name, str(value)) for name, value in launch.constexprs(made).items())
    return repr((made.kernel, constants, launch.compile_options(made.config)))
