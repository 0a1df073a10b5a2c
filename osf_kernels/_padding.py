"""Leading dimensions of whole 16-byte vectors, for what the library allocates on a GPU.

A matrix of 77 bfloat16 columns has rows of 154 bytes, of which only every eighth begins on a
16-byte boundary. Kernels then read it element by element, and so does cuBLAS. With rows 80
elements apart every row begins on a boundary, and 16 bytes are read at a time.

The rule: the lines of a matrix (its rows, or its columns where those are contiguous) begin on
16-byte boundaries, and its storage holds the last line's padding too, so that a kernel may read it.

May import: torch, ``osf_kernels.errors``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osf_kernels.errors import TypeRefusal

__all__ = [
    "VECTOR_BYTES",
    "empty",
    "empty_like",
    "is_aligned",
    "is_padded",
    "leading_dimension",
    "padded",
    "padded_rows",
    "pads",
]

VECTOR_BYTES = 16


def pads(device: torch.device) -> bool:
    """Whether what the library allocates on a device is padded: everywhere but on the CPU.

    There nothing is gained: BLAS copies its operands into panels of its own. torch 2.13's bfloat16
    matmul on the CPU even reads the padding, so that such a matrix has to be copied before it
    (``backends.torch._dense``).
    """
    return device.type != "cpu"


def leading_dimension(columns: int, device: torch.device, dtype: torch.dtype) -> int:
    """Elements from one row to the next of what the library allocates."""
    return padded_width(columns, dtype.itemsize) if pads(device) else columns


def padded_width(width: int, itemsize: int) -> int:
    """The width rounded up to whole vectors."""
    vector = VECTOR_BYTES // itemsize
    return -(-width // vector) * vector


def empty(
    rows: int,
    columns: int,
    like: Tensor,
    *,
    dtype: torch.dtype | None = None,
    batch: tuple[int, ...] = (),
) -> Tensor:
    """An uninitialised (*batch, rows, columns) matrix on ``like``'s device, its rows padded there.

    For contiguous columns take ``empty(columns, rows, ...).mT``. What the padding holds is left
    open: kernels may read it, and let nothing of it into a result.
    """
    dtype = dtype or like.dtype
    width = leading_dimension(columns, like.device, dtype)
    out = like.new_empty((*batch, rows, width), dtype=dtype)
    if width != columns:
        # In place: a view could not be written to under autograd as an operator's output is.
        out.as_strided_((*batch, rows, columns), out.stride())
    return out


def padded(
    t: Tensor, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """A basis on a device and in a dtype, its lines on 16-byte boundaries there.

    As ``t.to(device, dtype)``, which drops the padding of what it copies. Pass a basis whose
    width is no multiple of 16 bytes through it once, and no kernel has to read element by element.

    Args:
        t: (..., m, r), any strides. A vector has no lines: it is moved and converted alone.
        device, dtype: where to and in what; by default those of ``t``.

    Returns:
        ``t`` itself where it is there already and aligned (or on the CPU, where nothing is
        padded), else a copy. The copy's padding holds zeros, and its contiguous dimension is that
        of ``t``. Of (m, 77) bfloat16 on a GPU the strides are (80, 1): it is not contiguous.

    Raises:
        TypeError: t is no tensor; of a Basis pass its columns.

    Doesn't change ``t``; draws no random numbers; synchronises as ``Tensor.to`` does.
    """
    if not isinstance(t, Tensor):
        raise TypeRefusal.of("padded", "t", "a tensor", type(t).__name__)
    device = t.device if device is None else torch.device(device)
    dtype = dtype or t.dtype
    if not pads(device) or t.dim() < 2 or not t.numel():
        return t.to(device, dtype)
    here = device.index is None or device == t.device
    if here and (t.device.type, t.dtype) == (device.type, dtype) and is_aligned(t):
        return t
    down = t.stride(-1) != 1 and t.stride(-2) == 1
    source = t.mT if down else t
    *batch, rows, columns = source.shape
    width = padded_width(columns, dtype.itemsize)
    out = torch.zeros((*batch, rows, width), dtype=dtype, device=device)
    if width != columns:
        out.as_strided_(source.shape, out.stride())
    out.copy_(source)
    return out.mT if down else out


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b of matrices, or of batches of one dimension; without ``out`` into padded rows."""
    if out is None:
        out = empty(a.shape[-2], b.shape[-1], a, batch=a.shape[:-2])
    return torch.mm(a, b, out=out) if a.dim() == 2 else torch.bmm(a, b, out=out)


def cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat`` of matrices, or of batches, into padded rows; ``dim`` is -1 or -2."""
    first = tensors[0]
    shape = [first.shape[-2], first.shape[-1]]
    shape[dim] = sum(t.shape[dim] for t in tensors)
    out = empty(shape[0], shape[1], first, batch=first.shape[:-2])
    return torch.cat(list(tensors), dim, out=out)


def padded_rows(t: Tensor) -> Tensor:
    """A copy as :func:`empty` lays it out, whatever ``t`` was; ``t`` where nothing is padded."""
    whole = leading_dimension(t.shape[-1], t.device, t.dtype) == t.shape[-1]
    return t if whole else empty_like(t).copy_(t)


def empty_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`empty` of a tensor's shape."""
    return empty(t.shape[-2], t.shape[-1], t, dtype=dtype, batch=t.shape[:-2])


def is_aligned(t: Tensor) -> bool:
    """Whether every line of a matrix (or of a batch) can be read in aligned 16-byte pieces."""
    size = t.element_size()
    if 1 not in t.stride()[-2:] or t.data_ptr() % VECTOR_BYTES:
        return False
    _, width, stride = _lines(t)
    if any(step * size % VECTOR_BYTES for step in (stride, *t.stride()[:-2])):
        return False
    return width * size % VECTOR_BYTES == 0 or is_padded(t)


def is_padded(t: Tensor) -> bool:
    """Whether lines that aren't of whole vectors have padding, the storage that of the last one.

    An ``Operand`` knows it of the tensor that it stands for.
    """
    known: bool | None = getattr(t, "is_padded", None)
    if known is not None:
        return known
    lines, width, stride = _lines(t)
    whole = padded_width(width, t.element_size())
    if whole == width or stride < whole:
        return False
    batch = sum((size - 1) * step for size, step in zip(t.shape[:-2], t.stride(), strict=False))
    end = t.storage_offset() + batch + (lines - 1) * stride + whole
    return end * t.element_size() <= t.untyped_storage().nbytes()


def _lines(t: Tensor) -> tuple[int, int, int]:
    """(how many lines, the elements of one, the elements between two) of a matrix."""
    rows, columns = t.shape[-2:]
    row_stride, column_stride = t.stride()[-2:]
    if column_stride != 1 and row_stride == 1:
        return columns, rows, column_stride
    return rows, columns, row_stride
