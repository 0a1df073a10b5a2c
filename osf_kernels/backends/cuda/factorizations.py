"""Factorizations of the CUDA backend before their launch: what is refused, and the records.

``backends/cuda.py`` calls this; nothing here needs the extension or a device.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels.errors import TypeRefusal, ValueRefusal

_CHOLESKY = struct.Struct("<8q")
_JACOBI = struct.Struct("<11q")


class CholeskyJob(NamedTuple):
    """inverse = R⁻¹ of each G = RᵀR; the outputs are contiguous."""

    G: Tensor  # (b, l, l)
    inverse: Tensor  # (b, l, l)
    info: Tensor  # (b,), int32

    def pack(self, address: Callable[[Tensor], int]) -> bytes:
        """The record of ``csrc/api.h``."""
        b, l, _ = self.G.shape
        outputs = map(address, (self.inverse, self.info))
        return _CHOLESKY.pack(b, l, address(self.G), *self.G.stride(), *outputs)


class JacobiJob(NamedTuple):
    """M = U diag(S) Vᵀ; the outputs are contiguous."""

    M: Tensor  # (b, p, l)
    Ut: Tensor  # (b, l, p)
    S: Tensor  # (b, l)
    Vt: Tensor  # (b, l, l)
    info: Tensor  # (b,), int32

    def pack(self, address: Callable[[Tensor], int]) -> bytes:
        """The record of ``csrc/api.h``."""
        outputs = map(address, (self.Ut, self.S, self.Vt, self.info))
        return _JACOBI.pack(*self.M.shape, address(self.M), *self.M.stride(), *outputs)


def cholesky_job(G: Tensor) -> CholeskyJob:
    """A job with outputs to be written."""
    b, l, _ = G.shape
    return CholeskyJob(G, G.new_empty(b, l, l), G.new_zeros(b, dtype=torch.int32))


def jacobi_job(M: Tensor) -> JacobiJob:
    """A job with outputs to be written."""
    b, p, l = M.shape
    info = M.new_zeros(b, dtype=torch.int32)
    return JacobiJob(M, M.new_empty(b, l, p), M.new_empty(b, l), M.new_empty(b, l, l), info)


def check_gram(G: Tensor) -> None:
    """Refuses what is not a batch of square float32 matrices on a CUDA device."""
    _check_batch("cholesky_inverse", "G", G)
    if G.shape[1] != G.shape[2]:
        raise ValueRefusal.of("cholesky_inverse", "G", "(b, l, l)", tuple(G.shape))
    _check_device("cholesky_inverse", "G", G)


def check_square_size(G: Tensor, limit: int) -> None:
    """Refuses Gram matrices of more than ``limit`` columns."""
    if G.shape[2] > limit:
        expected = f"(b, l, l) with l <= {limit}, which fits in the shared memory of {G.device}"
        remedy = "use torch.linalg.cholesky_ex"
        raise ValueRefusal.of("cholesky_inverse", "G", expected, tuple(G.shape), remedy)


def check_tall(M: Tensor) -> None:
    """Refuses what is not a batch of square or tall float32 matrices on a CUDA device."""
    _check_batch("jacobi_svd", "M", M)
    if M.shape[1] < M.shape[2]:
        remedy = "pass M.mT, whose U is V"
        raise ValueRefusal.of("jacobi_svd", "M", "(b, p, l) with p >= l", tuple(M.shape), remedy)
    _check_device("jacobi_svd", "M", M)


def check_columns(M: Tensor, limit: int) -> None:
    """Refuses matrices of more than ``limit`` columns."""
    if M.shape[2] > limit:
        expected = (
            f"(b, p, l) with l <= {limit} for p={M.shape[1]}, "
            f"which fits in the shared memory of {M.device}"
        )
        remedy = "use torch.linalg.svd"
        raise ValueRefusal.of("jacobi_svd", "M", expected, tuple(M.shape), remedy)


def _check_batch(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeRefusal.of(op, name, "a torch.Tensor", type(tensor).__name__)
    if tensor.dtype is not torch.float32:
        raise TypeRefusal.of(op, name, "float32", tensor.dtype, f"pass {name}.float()")
    if tensor.ndim != 3:
        remedy = f"pass {name}[None] for a single matrix" if tensor.ndim == 2 else ""
        expected = "a batch of matrices, (b, rows, columns)"
        raise ValueRefusal.of(op, name, expected, tuple(tensor.shape), remedy)


def _check_device(op: str, name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cuda":
        raise ValueRefusal.of(op, name, "on a CUDA device", tensor.device)
