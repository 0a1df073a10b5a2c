"""Triton backend: lists of projections in one launch, and batched products in float32 accuracy, for
NVIDIA and AMD GPUs.

Importing this package needs no triton; :func:`unavailable_reason` says whether it can be used.
Under ``TRITON_INTERPRET=1``, set before triton is first imported, it runs on CPU tensors.

Layout: ``kernels`` holds the device code; ``configs`` the pinned tables; ``tasks`` plans launches
of projections and ``product_schedule`` those of products; ``views`` are matrices as kernels see
them; ``launch`` runs launches; ``dispatch`` ties these together; ``autotune`` searches.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from osf_kernels import gpu
from osf_kernels.backends.grouped import Runnable
from osf_kernels.backends.jobs import Coefficients, Problem, Update
from osf_kernels.plan import BYTES, Matrix

from . import configs

__all__ = [
    "coefficient_reads",
    "coefficients",
    "gram",
    "keeps",
    "multiply",
    "program",
    "unavailable_reason",
    "update",
]


@functools.lru_cache
def _import_failure() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return None


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot serve a device (default: the current CUDA device), or None."""
    failure = _import_failure()
    if failure is not None:
        return failure
    interpreting = _launch().INTERPRETING
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if interpreting:
            return None
        return "no CUDA or ROCm device; on a CPU it runs only with TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"no Triton kernels for {device.type} devices"
    if interpreting:
        return "TRITON_INTERPRET=1 is set: only CPU tensors are interpreted"
    if not torch.cuda.is_available():
        return "torch finds no CUDA or ROCm device"
    name = _launch().architecture(device)
    if name not in configs.ARCHITECTURES:
        return f"no configs for {name}; there are some for {', '.join(configs.ARCHITECTURES)}"
    if not _launch().ON_AMD and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def coefficient_reads(x: Matrix) -> int:
    """How often x is read from memory for both coefficients: the two sums meet in L2."""
    return 1


def keeps(x: Matrix, device: torch.device) -> bool:
    """Whether x is in L2 whenever it is read again.

    By a model of that cache (``python -m bench traffic``) it is up to a share of it, where bases
    and coefficients find room beside it; and with one basis whatever its size, since it goes in
    bands. Of a larger one with two bases 2.9 to 3.4 passes were counted, for 3.
    """
    return keeps_on("" if x.r is None or x.k is None else _launch().architecture(device), x)


def keeps_on(architecture: str, x: Matrix) -> bool:
    """The same of a named architecture."""
    if x.r is None or x.k is None:
        return True
    bases, coefficients = x.m * x.r + x.n * x.k, x.n * x.r + x.m * x.k
    beside = bases * BYTES[x.basis_dtype] + coefficients * BYTES[x.dtype]
    return gpu.fits_l2(architecture, x.m * x.n * BYTES[x.dtype], beside)


def coefficients(
    jobs: Sequence[Coefficients],
    *,
    config: configs.Projection | None = None,
    float32_precision: str | None = None,
) -> None:
    """A = Uᵀ x and B = x V, less diag(S) Vᵀ and U diag(S), for every job of the list.

    One launch for all jobs that agree on dtypes, layouts and config, whatever their shapes; it
    adds partial sums in order. Writes each job's A and B entirely; never synchronizes; two calls
    agree bit for bit. A list has other bits than a loop over it where its launch fills the machine,
    since sums aren't split then.

    Args:
        jobs: bfloat16, float16 or float32 matrices of any strides, each on one device.
        config: tile config instead of the pinned one.
        float32_precision: "tf32x3", "tf32" or "ieee" for float32 operands. Default: "tf32x3", on
            AMD "ieee", which is native there; what torch's matmuls may do changes nothing.

    Raises:
        TypeError: a float64 (or other) dtype. ValueError: an option that cannot be honoured.
    """
    _dispatch().run_jobs(jobs, config, float32_precision)


def update(
    jobs: Sequence[Update],
    *,
    config: configs.Projection | None = None,
    float32_precision: str | None = None,
) -> None:
    """out = beta·x + alpha·(L1 R1 + L2 R2) + addend for every job of the list.

    One launch for all jobs that agree on dtypes, layouts and config, whatever their shapes. x is
    read once (with beta = 0 not at all) and out written once; ``out`` may be x. Sums are float32
    and rounded once. Never synchronizes; two calls agree bit for bit, and a list with a loop.

    Args and Raises: as :func:`coefficients`.
    """
    _dispatch().run_jobs(jobs, config, float32_precision)


def program(problems: Sequence[Problem], limit: int, *, kept: int, halves: bool) -> Runnable:
    """``grouped.Kernels.program``: all steps of a projection in one launch."""
    made: Runnable = _dispatch().program(problems, limit, kept=kept, halves=halves)
    return made


def multiply(
    As: Sequence[Tensor],
    Q: Tensor,
    out: Tensor,
    *,
    transpose: bool = False,
    config: configs.Multiply | None = None,
) -> None:
    """out[i] = A_i Q[i], or A_iᵀ Q[i], in float32 accuracy whatever the dtype of A.

    16-bit A at the tensor cores' 16-bit rate: Q is split into three bfloat16 pieces and float16 A
    into two (bfloat16 A is one), so that every product is exact in float32. float32 A by tf32x3
    (on AMD IEEE float32), whatever torch's matmul precision allows. Sums are float32, rounded to
    nearest between steps of the tensor cores.

    One launch for matrices of like strides, which adds partial sums in order. Writes ``out``
    entirely; never synchronizes; draws no random numbers. Two calls agree bit for bit, and a list
    with a loop over it.

    Args:
        As: b matrices (m, n) of one shape, of bfloat16, float16 or float32, any strides.
        Q: (b, n, l) float32, or (1, n, l) to share one; (b, m, l) or (1, m, l) with transpose.
        out: (b, m, l) float32, or (b, n, l) with transpose; overlaps no input.
        transpose: multiply by A_iᵀ.
        config: tile config instead of the pinned one.

    A NaN or Inf makes every sum it is part of non-finite; an Inf may come out as NaN, since its
    pieces are Inf and NaN. Elements of Q below 2⁻¹⁰⁹ (1.5e-33) lose what falls under bfloat16's
    least step, 2⁻¹³³: scale such a Q first.

    Raises:
        TypeError: a float64 (or other) dtype. ValueError: shapes, devices or kinds that differ.

    Source: splitting as in Henry, Tang and Heinecke 2019 (arXiv 1904.06376); sums kept outside
    of the tensor cores as in Ootomo and Yokota 2022 (arXiv 2203.03341).
    """
    _dispatch().multiply(As, Q, out, transpose, config)


def gram(
    As: Sequence[Tensor],
    out: Tensor,
    *,
    side: Literal["right", "left"] = "right",
    config: configs.Gram | None = None,
) -> None:
    """out[i] = A_iᵀ A_i (right) or A_i A_iᵀ (left), symmetric to the bit, in float32 accuracy.

    Only the tiles of one triangle are computed; the others are their mirror images. Products of
    16-bit values are exact in float32, those of float32 are taken by tf32x3 (on AMD as IEEE
    float32), whatever torch's matmul precision allows. Sums as in :func:`multiply`, as is what is
    said there of launches, order, synchronization and non-finite values.

    Args:
        As: b matrices (m, n) of one shape, of bfloat16, float16 or float32, any strides.
        out: (b, n, n), or (b, m, m) for the left side, float32; overlaps no input.
        side: which of the two products.
        config: tile config instead of the pinned one.

    Raises: as :func:`multiply`.
    """
    _dispatch().gram(As, out, side, config)


def _dispatch() -> ModuleType:
    return importlib.import_module(f"{__name__}.dispatch")


def _launch() -> ModuleType:
    return importlib.import_module(f"{__name__}.launch")
