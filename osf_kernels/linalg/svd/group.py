"""Group: the matrices that a method decomposes together, the sketches of them, and their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.linalg import primitives
from osf_kernels.linalg.svd.beside import PROBE_BLOCK, PROBE_STEPS
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.result import TruncatedSVD


@dataclass(frozen=True)
class Group:
    """Matrices of one shape, dtype and device, and how they are to be decomposed."""

    As: Sequence[Tensor]
    norms: Sequence[float]  # ‖A‖_F
    rank: int
    generator: Callable[[int], torch.Generator]  # of a sketch's width
    complement: bool = False
    tol: float | None = None
    niter: int | None = None
    oversample: int | None = None
    warm: Sequence[TruncatedSVD | Tensor | None] = ()
    workspace_bytes: float = math.inf

    def of(self, indices: Tensor) -> Group:
        """The group of some of the matrices."""
        chosen = indices.tolist()
        return replace(
            self,
            As=[self.As[i] for i in chosen],
            norms=[self.norms[i] for i in chosen],
            warm=[self.warm[i] for i in chosen] if self.warm else (),
        )

    def transposed(self) -> Group:
        """The group of the transposes."""
        return replace(self, As=[A.mT for A in self.As])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that factors are computed in."""
        return primitives.working_dtype(self.As[0].dtype)

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.As[0].shape
        return m, n

    @property
    def device(self) -> torch.device:
        return self.As[0].device

    def all_ok(self) -> Tensor:
        """(b,) True."""
        return torch.ones(len(self.As), dtype=torch.bool, device=self.device)

    def no_factors(self) -> Factors:
        """The factors of rank 0, without a step."""
        (m, n), b, new = self.shape, len(self.As), self.As[0].new_zeros
        U, S, V, residual = (
            new(shape, dtype=self.dtype) for shape in ((b, m, 0), (b, 0), (b, n, 0), (b,))
        )
        return Factors(U, S, V, residual, [0] * b, self.all_ok())

    # --- sketches --------------------------------------------------------------------------

    def sketch(self, rows: int, width: int, generator: torch.Generator) -> Tensor:
        """(1, rows, width): a Gaussian matrix whose columns have norm 1, about."""
        noise = torch.randn(
            1, rows, width, dtype=self.dtype, device=self.device, generator=generator
        )
        return noise / math.sqrt(rows)

    def starts(self, width: int, generator: torch.Generator) -> Tensor:
        """(b, n, width): the leading columns of earlier Vs, completed by random ones, which are
        the same for every matrix, so that no result depends on which matrices share the call."""
        Vs = [w if isinstance(w, Tensor) else w.V for w in self.warm if w is not None]
        Vs = [V[:, :width].to(self.dtype) for V in Vs]
        if any(V.shape[1] < width for V in Vs):
            noise = self.sketch(self.shape[1], width, generator)[0]
            Vs = [torch.cat([V, noise[:, V.shape[1] :]], -1) for V in Vs]
        return stacked(Vs)

    # --- bytes of one matrix ---------------------------------------------------------------

    @property
    def results_bytes(self) -> int:
        """U, S and V."""
        return self.dtype.itemsize * sum(self.shape) * (self.rank + 1)

    @property
    def looks_bytes(self) -> int:
        """The probes for a residual, or those for larger singular values beside triplets."""
        m, n = self.shape
        item, columns = self.dtype.itemsize, PROBE_BLOCK * (PROBE_STEPS + 2)
        probes = item * (m + n) * 8 * cpu.RESIDUAL_PROBES
        return max(probes, (item * (m + n) + 8 * max(m, n)) * columns)

    def held_bytes(self, factors_bytes: int) -> int:
        """The matrix in the dtype that factors are computed in, and the factors of a method."""
        copied = self.As[0].element_size() != self.dtype.itemsize
        return copied * math.prod(self.shape) * self.dtype.itemsize + factors_bytes

    def whole_bytes(self, working_bytes: int, factors_bytes: int) -> int:
        """``working_bytes`` of a method, or its factors while results are made of them."""
        r, low = self.rank, 0
        if self.complement:  # low bases, and the matrices that they are made in
            low = self.dtype.itemsize * sum(k * (k - r) + k * r + r * k for k in self.shape)
        finished = factors_bytes + self.results_bytes + low
        return self.held_bytes(max(working_bytes, finished))


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """A batch of matrices; of one a view."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))
