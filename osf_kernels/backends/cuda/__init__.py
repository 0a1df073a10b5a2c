"""CUDA backend: the two grouped kernels of ``backends.jobs`` and two batched factorizations of
small matrices, compiled ahead of time from csrc/.

The extension is built where nvcc was found and links neither torch nor the driver, so its absence
is a reason kept here, not an import error. A call hands over pointers, sizes and strides: one
packed record a job, in the layout of ``csrc/api.h``.

What a product runs in (accumulators are always float32; nothing is converted by a copy,
the kernels convert while they load):

=========================================  ==================  ===================
x and both bases                           coefficients        update
=========================================  ==================  ===================
bfloat16                                   bf16                bf16, the coefficient rounded to it
float16                                    fp16                tf32: a coefficient may exceed 65504
float32, and every mixture of dtypes       tf32x3              tf32x3
=========================================  ==================  ===================

The factorizations are float32 throughout and hold a matrix in one block's shared memory;
``largest_cholesky`` and ``largest_jacobi`` say how large it may be (227 KB: 340 and 240, 163 KB:
288 and 203).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Literal, TypedDict, TypeVar

import torch
from torch import Tensor

from osf_kernels.backends.cuda import factorizations
from osf_kernels.backends.cuda.records import Call, address_of, pack
from osf_kernels.backends.cuda.slices import SlicedProgram
from osf_kernels.backends.jobs import Coefficients, Job, Problem, Update
from osf_kernels.errors import BackendUnavailableError, ValueRefusal
from osf_kernels.plan import Matrix

__all__ = [
    "build_info",
    "cholesky_inverse",
    "coefficient_reads",
    "coefficients",
    "gram",
    "jacobi_svd",
    "keeps",
    "largest_cholesky",
    "largest_jacobi",
    "multiply",
    "pack",
    "parts_bytes",
    "program",
    "unavailable_reason",
    "update",
]

JobT = TypeVar("JobT", Coefficients, Update)

# The kernels could round float32 operands to TF32; what is projected is never rounded so.
_ALLOW_TF32 = False


class BuildInfo(TypedDict):
    nvcc_version: str
    architectures: list[str]


@functools.lru_cache(maxsize=1)
def _load() -> ModuleType | str:
    """The extension, or why there is none."""
    try:
        return importlib.import_module("osf_kernels._cuda")
    except ModuleNotFoundError:
        if torch.version.cuda is None:
            return f"the CUDA extension was not built: torch {torch.__version__} has no CUDA"
        return "the CUDA extension was not built (OSF_CUDA=1 pip install says what is missing)"
    except Exception as error:
        return f"the CUDA extension cannot be loaded: {type(error).__name__}: {error}"


def build_info() -> BuildInfo | None:
    """What the extension was compiled with and for; None where there is none."""
    extension = _load()
    if isinstance(extension, str):
        return None
    return {
        "nvcc_version": extension.nvcc_version,
        "architectures": extension.cuda_archs.split(),
    }


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot serve a device (default: the current CUDA device), or None."""
    extension = _load()
    if isinstance(extension, str):
        return extension
    if torch.version.hip is not None:
        return f"the CUDA extension runs on NVIDIA GPUs, torch {torch.__version__} is built for AMD"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device is None:
        device = torch.device("cuda")
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or later, {device} has {_version(capability)}"
    reason: str | None = extension.unsupported(_index(device))
    return reason


def coefficient_reads(x: Matrix) -> int:
    """How often x is read for both coefficients: once for each block of ranks."""
    half = x.dtype == x.basis_dtype != "float32"
    return -(-max(x.r or 0, x.k or 0, 1) // (128 if half else 64))


def keeps(x: Matrix, device: torch.device) -> bool:
    """Whether x is in L2 whenever it is read again: not where a launch goes through a list."""
    return False


def coefficients(jobs: Sequence[Coefficients]) -> None:
    """A = Uᵀ x and B = x V, less diag(S) Vᵀ and U diag(S), for every job of the list.

    One launch for up to 141 jobs of one arithmetic (see the module's table) and, in bf16 and fp16,
    of ranks up to 64 or beyond: products into partial sums in a float32 workspace, and their sum
    in a fixed order. x is read once for ranks up to 128 (64 in tf32 and tf32x3), and once more for
    each further block of as many. Writes each job's A and B entirely; never synchronizes, but the
    first call on a stream allocates half a kilobyte that stays, and empties torch's cache where
    the device has none left; two calls agree bit for bit, and a list with a loop over it.

    Args:
        jobs: bfloat16, float16 or float32 matrices of any strides, each job on one device.

    Raises:
        TypeError: another dtype. BackendUnavailableError: no extension. MemoryError: no room for
            that half a kilobyte. RuntimeError: another call of the CUDA runtime failed; the
            message names it.
    """
    extension = _extension()
    for device, mine in _by_device(jobs).items():
        records = pack(mine, address_of)
        with torch.cuda.device(device):
            size = extension.coefficients_workspace_bytes(records, _index(device), _ALLOW_TF32)
            stream = torch.cuda.current_stream(device).cuda_stream
            _run_coefficients(records, size, device, stream)


def update(jobs: Sequence[Update]) -> None:
    """out = beta·x + alpha·(L1 R1 + L2 R2) + addend for every job of the list.

    One launch for up to 127 jobs of one arithmetic (see the module's table). x is read once (with
    beta = 0 not at all) and out written once; ``out`` may be x. Sums are float32 and rounded
    once. Never synchronizes; two calls agree bit for bit, and a list with a loop over it.

    Args and Raises: as :func:`coefficients`.
    """
    extension = _extension()
    for device, mine in _by_device(jobs).items():
        records = pack(mine, address_of)
        stream = torch.cuda.current_stream(device).cuda_stream
        extension.update(records, _index(device), _ALLOW_TF32, stream)


def multiply(As: Sequence[Tensor], Q: Tensor, out: Tensor, *, transpose: bool = False) -> None:
    """out[i] = A_i Q[i], or A_iᵀ Q[i], in float32 accuracy: coefficients of one side.

    Args, returns and raises: as ``backends.triton.multiply``, with as many launches as
    :func:`coefficients` takes.
    """
    shared = len(Q) == 1
    jobs = [
        Coefficients(A.mT if transpose else A, None, Q[0 if shared else i], None, out[i])
        for i, A in enumerate(As)
    ]
    coefficients(jobs)


def gram(As: Sequence[Tensor], out: Tensor, *, side: Literal["left", "right"] = "right") -> None:
    """out[i] = A_iᵀ A_i, or A_i A_iᵀ on the left, exactly symmetric: the upper triangle's products.

    Args and raises: as ``backends.triton.gram``. Both triangles are computed; Triton's kernel
    does half of that.
    """
    sides = [A if side == "right" else A.mT for A in As]
    coefficients([Coefficients(X, X, None, out[i], None) for i, X in enumerate(sides)])
    out.copy_(torch.triu(out) + torch.triu(out, 1).mT)


def cholesky_inverse(G: Tensor) -> tuple[Tensor, Tensor]:
    """R⁻¹ where G = RᵀR with R upper triangular, for every matrix of a batch.

    One launch, a matrix a block, in shared memory. Reads the upper triangle of G alone; draws no
    random numbers, never synchronizes, and two calls agree bit for bit, as does a batch with a
    loop over it.

    Args:
        G: (b, l, l) float32 on a CUDA device, any strides, l up to ``largest_cholesky``.

    Returns:
        The inverses, (b, l, l) float32, upper triangular with zeros below: R⁻ᵀ G R⁻¹ = I to
        rounding times the condition of G. And info, (b,) int32: 0, or one more than the index of
        the first pivot that is not positive and finite; that matrix's inverse is all NaN.

    Raises:
        TypeError: another dtype. ValueError: another shape or device, or too large an l.
        BackendUnavailableError: no extension. RuntimeError: a call of the CUDA runtime failed.

    Source: right-looking blocked Cholesky, Golub & Van Loan, Matrix Computations, 4.2.6.
    """
    factorizations.check_gram(G)
    factorizations.check_square_size(G, largest_cholesky(G.device))
    job = factorizations.cholesky_job(G)
    stream = torch.cuda.current_stream(G.device).cuda_stream
    _extension().cholesky_inverse(job.pack(Tensor.data_ptr), _index(G.device), stream)
    return job.inverse, job.info


def largest_cholesky(device: torch.device) -> int:
    """The largest l that :func:`cholesky_inverse` takes on a CUDA device.

    Raises:
        ValueError: not a CUDA device. BackendUnavailableError: no extension.
    """
    largest: int = _extension().largest_cholesky(_cuda_index("largest_cholesky", device))
    return largest


def jacobi_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """M = U diag(S) Vᵀ by one-sided Jacobi, for every matrix of a batch.

    One launch, a matrix a block, its columns in shared memory. Matrices are scaled by a power of
    two, so none over- or underflows, and where M = D B or B D with D diagonal and B orthogonal,
    small singular values are as accurate relative to themselves as large ones. A singular value
    below 2⁻¹²⁰ S[0] may come out as zero. Draws no random numbers, never synchronizes, and two
    calls agree bit for bit, as does a batch with a loop over it.

    Args:
        M: (b, p, l) float32 on a CUDA device, any strides, p >= l, l up to ``largest_jacobi``.

    Returns:
        U (b, p, l), S (b, l) and V (b, l, l), float32. S is descending and not negative. U and V
        have orthonormal columns to rounding, whatever the rank, and are views of tensors that hold
        their columns as lines. And info, (b,) int32: 0; the number of sweeps where those did not
        suffice; -1 where M holds a NaN or an Inf, and then that matrix's U, S and V are all NaN.

    Raises:
        TypeError: another dtype. ValueError: another shape or device, p < l, or too large.
        BackendUnavailableError: no extension. RuntimeError: a call of the CUDA runtime failed.

    Source: Hestenes 1958; the order of pairs, Brent & Luk 1985; the triangular start, Drmač &
    Veselić 2008; relative accuracy, Demmel & Veselić 1992 and Cox & Higham 1998.
    """
    factorizations.check_tall(M)
    factorizations.check_columns(M, largest_jacobi(M.device, square=False, rows=max(M.shape[1], 1)))
    job = factorizations.jacobi_job(M)
    stream = torch.cuda.current_stream(M.device).cuda_stream
    _extension().jacobi_svd(job.pack(Tensor.data_ptr), _index(M.device), stream)
    return job.Ut.mT, job.S, job.Vt.mT, job.info


def largest_jacobi(device: torch.device, square: bool = True, *, rows: int | None = None) -> int:
    """The largest l that :func:`jacobi_svd` takes on a device, of (l, l) or (rows, l) matrices.

    Args:
        rows: read where ``square`` is False, and then needed.

    Raises:
        ValueError: not a CUDA device, or no rows. BackendUnavailableError: no extension.
    """
    if square:
        rows = 0
    elif rows is None or rows < 1:
        raise ValueRefusal.of("largest_jacobi", "rows", "a positive number with square=False", rows)
    largest: int = _extension().largest_jacobi(_cuda_index("largest_jacobi", device), rows)
    return largest


class Executable:
    """``slices.Executable``: records packed once, in which a call puts the addresses.

    The extension hands records to the kernels as their parameters, so a CUDA graph owns them.
    """

    def __init__(self, stages: Sequence[Sequence[Job]], device: torch.device) -> None:
        self._device = device
        self._calls: list[Call] = []
        for stage in stages:
            for kind in (Coefficients, Update):
                jobs = [job for job in stage if isinstance(job, kind)]
                if jobs:
                    self._calls.append(Call(kind is Coefficients, jobs))
        extension, index = _extension(), _index(device)
        self._workspaces = [
            extension.coefficients_workspace_bytes(call.words.tobytes(), index, _ALLOW_TF32)
            if call.sums
            else 0
            for call in self._calls
        ]
        self.parts_bytes = max(self._workspaces, default=0)

    def run(self, addresses: Sequence[int]) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        for call, size in zip(self._calls, self._workspaces, strict=True):
            records = call.placed(addresses)
            if call.sums:
                _run_coefficients(records, size, self._device, stream)
            else:
                _extension().update(records, _index(self._device), _ALLOW_TF32, stream)


def program(problems: Sequence[Problem], limit: int, *, kept: int, halves: bool) -> SlicedProgram:
    """``grouped.Kernels.program``; records are on the host, those of the last call kept."""
    device = problems[0].x.device
    return SlicedProgram(
        problems, limit, lambda stages: Executable(stages, device), parts_bytes, halves=halves
    )


# Rows and columns of x in a unit of work: of float32 operands, of 16-bit ones at ranks up to 64 and
# beyond (``coefficients_shape`` of csrc/launch.h); splits are bound as in coefficients_host.cpp.
_SHAPES = {"float32": (128, 32), "narrow": (256, 64), "wide": (256, 32)}
_MOST_SPLITS = 32
_H200_PROCESSORS = 132


def parts_bytes(job: Coefficients) -> int:
    """What the partial sums of a job take, as csrc/coefficients_host.cpp cuts it: a part of A for
    each block of rows, and one of B for each split of the columns."""
    (m, n), U, V = job.x.shape, job.U, job.V
    r = 0 if U is None else U.shape[1]
    k = 0 if V is None else V.shape[1]
    if r > k:
        m, n, r, k = n, m, k, r
    rank = max(r, k)
    if not (m and n and rank):
        return 0
    present = (t for t in (U, V) if t is not None and t.shape[1])
    half = {job.x.dtype, *(t.dtype for t in present)} in ({torch.bfloat16}, {torch.float16})
    rank_block = 128 if half and rank > 64 else 64
    rows, columns = _SHAPES["float32" if not half else "wide" if rank > 64 else "narrow"]
    row_blocks, tiles = -(-m // rows), -(-n // columns)
    wanted = _processors(job.x.device) // (row_blocks * -(-rank // rank_block))
    tiles_per_split = -(-tiles // max(1, min(wanted, tiles, _MOST_SPLITS)))
    splits = -(-tiles // tiles_per_split)
    elements: int = row_blocks * r * -(-n // 4) * 4 + splits * m * -(-k // 4) * 4
    return 4 * elements


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return _H200_PROCESSORS  # to plan for, where there is none
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _run_coefficients(records: bytes, size: int, device: torch.device, stream: int) -> None:
    extension = _extension()
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    arguments = records, _index(device), _ALLOW_TF32, workspace.data_ptr(), size, stream
    try:
        extension.coefficients(*arguments)
    except MemoryError:  # counters are not of torch's pool, which may hold all there is
        torch.cuda.empty_cache()
        extension.coefficients(*arguments)


def _cuda_index(op: str, device: torch.device) -> int:
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueRefusal.of(op, "device", "a CUDA device", device)
    return _index(device)


def _extension() -> ModuleType:
    extension = _load()
    if isinstance(extension, str):
        raise BackendUnavailableError(f'osf_kernels: backend "cuda" is not available: {extension}')
    return extension


def _by_device(jobs: Iterable[JobT]) -> dict[torch.device, list[JobT]]:
    found: dict[torch.device, list[JobT]] = {}
    for job in jobs:
        found.setdefault(job.x.device, []).append(job)
    return found


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _version(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
