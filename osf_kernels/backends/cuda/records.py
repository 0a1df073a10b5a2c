"""Jobs as the records of ``csrc/api.h``: eight-byte words, packed once, placed at each call."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from osf_kernels.backends.jobs import Coefficients, Job, Update
from osf_kernels.backends.operands import Placed
from osf_kernels.errors import TypeRefusal

Address = Callable[[Any], int]

_DTYPES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_ABSENT = (0, 0, 0, 0)


class Call:
    """Records of one call of the extension, and which of their words wait for an address."""

    def __init__(self, sums: bool, jobs: Sequence[Job]) -> None:
        self.sums = sums
        words = [word for job in jobs for word in _words(job, address_of)]
        self.words = array("q", words)
        self._waiting = [(i, v, v.argument) for i, v in enumerate(words) if type(v) is Placed]
        self._last: tuple[list[int], bytes] = [], b""

    def placed(self, addresses: Sequence[int]) -> bytes:
        known, records = self._last
        if known != addresses or not records:
            words = array("q", self.words)
            for i, offset, argument in self._waiting:
                words[i] = addresses[argument] + offset
            records = words.tobytes()
            self._last = list(addresses), records
        return records


def pack(jobs: Iterable[Job], address: Address) -> bytes:
    """The jobs as records of ``csrc/api.h``; ``address`` gives a tensor's first element.

    Raises:
        TypeError: a dtype the kernels do not compute.
    """
    return array("q", [word for job in jobs for word in _words(job, address)]).tobytes()


def address_of(t: Any) -> int:
    found: int = t.data_ptr()
    return found


def _words(job: Job, address: Address) -> list[int]:
    if isinstance(job, Coefficients):
        return _coefficient_words(job, address)
    return _update_words(job, address)


def _coefficient_words(job: Coefficients, address: Address) -> list[int]:
    m, n = job.x.shape
    S = job.S
    if S is not None and S.dtype is not torch.float32:
        raise TypeRefusal.of("coefficients", "S", "float32", S.dtype)
    return [
        m,
        n,
        0 if job.U is None else job.U.shape[1],
        0 if job.V is None else job.V.shape[1],
        *_matrix("x", job.x, address),
        *_matrix("U", job.U, address),
        *_matrix("V", job.V, address),
        *_matrix("A", job.A, address),
        *_matrix("B", job.B, address),
        0 if S is None else address(S),
        0 if S is None else S.stride(0),
        int(job.root),
    ]


def _update_words(job: Update, address: Address) -> list[int]:
    m, n = job.out.shape
    return [
        m,
        n,
        0 if job.L1 is None else job.L1.shape[1],
        0 if job.L2 is None else job.L2.shape[1],
        *_matrix("out", job.out, address),
        *_matrix("x", job.x, address),
        *_matrix("addend", job.addend, address),
        *_matrix("L1", job.L1, address),
        *_matrix("R1", job.R1, address),
        *_matrix("L2", job.L2, address),
        *_matrix("R2", job.R2, address),
        *struct.unpack("<2q", struct.pack("<2d", job.alpha, job.beta)),
    ]


def _matrix(name: str, tensor: Any, address: Address) -> tuple[int, int, int, int]:
    if tensor is None:
        return _ABSENT
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        expected = 'bfloat16, float16 or float32 with backend "cuda"'
        remedy = 'other dtypes run on "torch" or "auto"'
        raise TypeRefusal.of("use_backend", name, expected, tensor.dtype, remedy)
    return address(tensor), tensor.stride(0), tensor.stride(1), dtype
