"""The methods of truncated_svd over one group of matrices: sketches, stopping, and what they need.

A method takes a :class:`Group` and returns :class:`Factors`; ``safe`` asks for factorizations that
hold for any spectrum where the fast ones reported that they broke down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from osf_kernels.backends import primitives
from osf_kernels.linalg import dense
from osf_kernels.linalg.auto import Method
from osf_kernels.linalg.factors import Factors
from osf_kernels.linalg.krylov import (
    PROBE_BLOCK,
    PROBE_STEPS,
    KrylovSpace,
    beyond,
    larger,
    subspace_iteration,
)
from osf_kernels.linalg.powers import MOST_STEPS, from_powers
from osf_kernels.linalg.residual import PROBES, confirmed, limit
from osf_kernels.linalg.result import TruncatedSVD
from osf_kernels.linalg.spread import EDGE

# A Krylov space of three times the rank in some twelve blocks: on σᵢ = i^-½ at n = 2048 it holds
# .9999 of the leading subspace, in less time than fewer wider blocks take to .999.
KRYLOV_STEPS = 12
KRYLOV_OVERSAMPLE = 2.0  # of the rank
# For a few triplets of a flat spectrum a space of three times the rank is too small: of MiniLM's
# weights at rank 4 it misses half of the subspace, 48 columns more a hundredth.
KRYLOV_LEAST_OVERSAMPLE = 48
BLOCK_MULTIPLE = 8
# Subspace iteration converges by (σ_{l+1}/σ_r)² a step, so that more would not help much.
SUBSPACE_STEPS = 100
# With tol the space grows by this factor between checks.
GROWTH = 1.3


@dataclass(frozen=True)
class Group:
    """Matrices of one shape, dtype and device, and how they are to be decomposed."""

    As: Sequence[Tensor]
    norms: Sequence[float]  # ‖A‖_F
    rank: int
    complement: bool
    tol: float | None
    niter: int | None
    oversample: int | None
    warm: Sequence[TruncatedSVD | Tensor | None]
    generator: Callable[[int], torch.Generator]  # of a sketch's width
    workspace_bytes: float

    def of(self, indices: Tensor) -> Group:
        """The group of some of the matrices."""
        chosen = indices.tolist()
        return replace(
            self,
            As=[self.As[i] for i in chosen],
            norms=[self.norms[i] for i in chosen],
            warm=[self.warm[i] for i in chosen],
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the factors are computed in."""
        return primitives.working_dtype(self.As[0].dtype)

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.As[0].shape
        return m, n


def run(method: Method, group: Group, safe: bool) -> Factors:
    """Factors of a group by a named method.

    Iterative ones of float64 matrices always run in the safe way: what the fast one loses to Gram
    matrices, of float32 numbers, it makes up for by having them in float64.
    """
    if group.dtype == torch.float64 and method in ("randomized", "warm"):
        safe = True
    if method == "randomized":
        m, n = group.shape
        if m < n:  # a space of min(m, n) columns is then the whole one
            return randomized(replace(group, As=[A.mT for A in group.As]), safe).swapped()
        return randomized(group, safe)
    if method == "warm":
        return warm(group, safe)
    if method == "gram":
        return _gram(group, safe)
    if method == "deflated":
        return confirmed(group.As, _deflated(group), group.tol)
    found = dense.exact(group.As, group.rank, group.complement)
    return confirmed(group.As, found, group.tol)


def workspace_bytes(method: Method, group: Group, *, safe: bool = False) -> int:
    """An upper estimate of what a method, and what finishes its results, allocates for one matrix
    beside them."""
    return _bytes(method, group, _working_bytes(method, group, safe=safe))


def _bytes(method: Method, group: Group, working: int) -> int:
    m, n = group.shape
    item, r = group.dtype.itemsize, group.rank
    finished = item * (m + n) * (r + 1)
    if group.complement:  # low bases, and what they are made in
        finished += item * sum(k * (k - r) + k * r + r * k for k in (m, n))
    return _copied_bytes(group) + max(working, _factors_bytes(method, group) + finished)


def held_bytes(method: Method, group: Group) -> int:
    """What of that stays while some of a group are decomposed once more, in the safe way."""
    return _copied_bytes(group) + _factors_bytes(method, group)


def _copied_bytes(group: Group) -> int:
    """Of the matrix in the dtype that is computed in."""
    m, n = group.shape
    item = group.dtype.itemsize
    return 0 if group.As[0].element_size() == item else m * n * item


def _factors_bytes(method: Method, group: Group) -> int:
    """Of what a method returns for one matrix, and of what that is a part of."""
    m, n = group.shape
    item, r, small = group.dtype.itemsize, group.rank, min(m, n)
    if method == "exact":
        return item * (m * m + n * n if group.complement else (m + n) * small)
    if method == "deflated":
        return item * 2 * (m * m + n * n)
    whole = small * small if method == "gram" and group.complement else 0
    return item * ((m + n) * (r + 1) + whole)


def _working_bytes(method: Method, group: Group, *, safe: bool) -> int:
    m, n = group.shape
    small, large, r = min(m, n), max(m, n), group.rank
    item = group.dtype.itemsize
    results = item * (m + n) * (r + 1) + _looks_bytes(group)
    if method == "randomized":
        if _takes_krylov(group):
            block, width = _krylov_plan(group)
            return results + _krylov_bytes(group, width, block, safe)
        return results + _subspace_bytes(group, _width(group))
    if method == "warm":
        width = _warm_width(group)
        grown = 0
        if group.tol is not None and group.niter != 1:
            grown = _krylov_bytes(group, 2 * width, width, safe)
            if 2 * width > small:
                plain = replace(group, complement=False)
                grown = max(_working_bytes("gram", plain, safe=s) for s in (False, True))
        return 2 * results + max(grown, _subspace_bytes(group, width))
    if method == "gram" and not (safe and group.dtype == torch.float64):
        # The Gram matrix, its eigenvectors and twice as much that finds them; or the eigenvectors
        # and products.
        if safe:
            products = small * small + r * (4 * large + small + 2 * r)
            return results + 8 * (m * n + max(4 * small * small, products))
        wide = min(small, r + EDGE)
        products = 2 * small * small + large * (2 * wide + 2 * r) + r * r
        return results + item * max(4 * small * small, products)
    if method == "deflated":
        core = (m - r) * (n - r) + (m - r) ** 2 + (n - r) ** 2
        starts = (m + n) * r + m * (m - r) + n * (n - r)
        return results + item * (starts + m * n + 2 * core + 3 * (m * m + n * n))
    return results + 2 * _factors_bytes("exact", group) + item * (m * n + small * small + 8 * large)


def randomized(group: Group, safe: bool) -> Factors:
    """Block Krylov where its space fits the workspace, subspace iteration where it doesn't.

    A space of one block or two is made of powers, for matrices where that loses nothing.
    """
    block, width = _krylov_plan(group)
    if not _takes_krylov(group):
        block = _width(group)
        generator = group.generator(block)
        found = subspace_iteration(
            group.As,
            _sketch(group, group.shape[1], block, generator),
            group.rank,
            tol=group.tol,
            niter=group.niter or (KRYLOV_STEPS if group.tol is None else SUBSPACE_STEPS),
            safe=safe,
            generator=generator,
        )
        return _led(group, found, safe)
    generator = group.generator(block)
    noise = _sketch(group, group.shape[0], block, generator)

    def grown(group: Group) -> Factors:
        start = primitives.multiply(group.As, noise, transpose=True)
        return _grown(group, start, width, safe, generator)

    steps = width // block
    few = steps <= MOST_STEPS and width < min(group.shape) and group.tol is None
    if safe or not few:
        return grown(group)
    found = from_powers(group.As, noise, group.norms, group.rank, steps=steps)
    late = torch.nonzero(~found.ok).flatten()
    found = _led(group, found, safe)
    return merged(found, late, grown(group.of(late))) if len(late) else found


def _led(group: Group, factors: Factors, safe: bool) -> Factors:
    """The factors, those whose residual is small enough looked at for whether they are leading."""
    r, small = factors.S.shape[-1], min(group.shape)
    right = limit(group.tol, group.dtype, small)
    met = torch.nonzero(factors.ok & (factors.residual <= right)).flatten()
    if not len(met) or r == small:  # synchronizes
        return factors
    As = [group.As[i] for i in met.tolist()]
    _, Z = beyond(As, factors.V[met], safe=safe)
    leading = torch.ones_like(factors.ok)
    leading[met] = ~larger(Z, factors._replace(S=factors.S[met], residual=factors.residual[met]))
    return factors._replace(leading=leading)


def warm(group: Group, safe: bool) -> Factors:
    """One round of subspace iteration from the earlier V, and while tol isn't met a Krylov space
    from what it gave; the Gram matrix's eigenvectors where that would be the whole space."""
    width = _warm_width(group)
    generator = group.generator(width)
    start = _starts(group, width, generator)
    first = subspace_iteration(
        group.As, start, group.rank, tol=group.tol, niter=1, safe=safe, generator=generator
    )
    first = _led(group, first, safe)
    if group.tol is None or group.niter == 1:
        return first
    late = first.residual > group.tol
    if first.leading is not None:
        late = late | ~first.leading
    # From a start that isn't finite nothing is to be had.
    late = torch.nonzero(late & first.residual.isfinite()).flatten()
    if not len(late):
        return first
    rest = replace(group.of(late), niter=None if group.niter is None else group.niter - 1)
    m, n = group.shape
    if 2 * first.V.shape[-1] > min(m, n):
        more = _gram(replace(rest, complement=False), safe)
    elif m < n:  # a space of min(m, n) columns is then the whole one
        turned = replace(rest, As=[A.mT for A in rest.As])
        more = _grown(turned, first.U[late], 2 * first.U.shape[-1], safe, generator).swapped()
    else:
        more = _grown(rest, first.V[late], 2 * first.V.shape[-1], safe, generator)
    return merged(first, late, more._replace(iterations=[i + 1 for i in more.iterations]))


def _gram(group: Group, safe: bool) -> Factors:
    """Eigenvectors of the Gram matrix, not ok where a wider one may meet the tolerance."""
    factors = dense.gram(group.As, group.rank, group.complement, safe=safe)
    factors = confirmed(group.As, factors, group.tol)
    if safe or group.tol is None:
        return factors
    return factors._replace(ok=factors.ok & (factors.residual <= group.tol))


def _deflated(group: Group) -> Factors:
    earlier = [w for w in group.warm if isinstance(w, TruncatedSVD)]

    def stacked(name: str) -> Tensor:
        return _stacked([getattr(result, name) for result in earlier]).to(group.dtype)

    high, low = map(stacked, "USV"), map(stacked, ("U_low", "V_low"))
    return dense.deflated(group.As, tuple(high), tuple(low), group.rank)


def merged(factors: Factors, indices: Tensor, others: Factors) -> Factors:
    """``factors`` with those of some of its matrices replaced, its bases in place."""

    def put(old: Tensor | None, new: Tensor | None) -> Tensor | None:
        if old is None or new is None:
            return None
        large = old.dim() == 3
        return old.index_copy_(0, indices, new) if large else old.index_copy(0, indices, new)

    swapped: dict[str, Any] = {
        name: put(getattr(factors, name), getattr(others, name))
        for name in ("U", "S", "V", "residual", "ok", "U_low", "V_low")
    }
    iterations = list(factors.iterations)
    for i, other in zip(indices.tolist(), others.iterations, strict=True):
        iterations[i] = other
    if factors.leading is not None or others.leading is not None:
        swapped["leading"] = put(_leading(factors), _leading(others))
    return factors._replace(iterations=iterations, **swapped)


def _leading(factors: Factors) -> Tensor:
    return torch.ones_like(factors.ok) if factors.leading is None else factors.leading


def _grown(
    group: Group, start: Tensor, width: int, safe: bool, generator: torch.Generator
) -> Factors:
    """A Krylov space of ``width`` from ``start``; with tol it grows until residuals meet it and
    nothing larger is found beside it."""
    block = start.shape[-1]
    space = KrylovSpace(group.As, start, safe=safe, generator=generator)
    space.grow(width)
    factors = space.factors(group.rank)
    if group.tol is None:
        return _led(group, factors, safe)
    most = min(group.shape)
    if group.niter is not None:
        most = max(width, min(most, group.niter * block))
    while most > width and _krylov_bytes(group, most, block, safe) > group.workspace_bytes:
        most = (most - 1) // block * block
    most = max(most, width)
    waiting = torch.arange(len(group.As), device=start.device)
    postponed: list[int] = []
    lacking: list[int] = []
    factors = current = confirmed(group.As, factors, group.tol)
    while True:
        missed = current.residual <= group.tol
        late = torch.nonzero(~missed).flatten()
        if space.width < group.shape[1] and bool(missed.any()):  # else it has all there is
            # Beside the others too: a batch costs what one does.
            _, Z = space.beside()
            lacking += waiting[missed & larger(Z, current)].tolist()
        if not len(late) or space.width >= most:
            break
        grown = min(most, _next_width(space))
        fitting = int(group.workspace_bytes // _krylov_bytes(group, grown, block, safe))
        postponed += waiting[late[max(1, fitting) :]].tolist()
        late = late[: max(1, fitting)]
        if len(late) < len(waiting):
            waiting = waiting[late]
            space.keep(late)
        space.grow(grown)
        current = confirmed(
            [group.As[i] for i in waiting.tolist()], space.factors(group.rank), group.tol
        )
        factors = merged(factors, waiting, current)
    del space, current

    def of(indices: list[int]) -> tuple[Tensor, Group, Tensor]:
        at = torch.tensor(indices, device=start.device)
        return at, group.of(at), start if len(start) == 1 else start[at]

    for i in lacking:  # each alone, so that none depends on which others share the call
        at, one, begun = of([i])
        factors = merged(factors, at, _completed(one, begun, width, most, safe, generator))
    if postponed:
        at, rest, begun = of(postponed)
        factors = merged(factors, at, _grown(rest, begun, width, safe, generator))
    return factors


def _completed(
    group: Group, start: Tensor, width: int, most: int, safe: bool, generator: torch.Generator
) -> Factors:
    """Triplets of one matrix in a Krylov space that takes in what is found beside it."""
    assert group.tol is not None
    space = KrylovSpace(group.As, start, safe=safe, generator=generator)
    space.grow(width)
    while True:
        factors = confirmed(group.As, space.factors(group.rank), group.tol)
        if bool(factors.residual > group.tol):
            grown = _next_width(space)
            if grown > most:
                grown = most if most == group.shape[1] else space.width
            needed = _krylov_bytes(group, grown, space.block, safe)
            if grown == space.width or needed > group.workspace_bytes:
                return factors
            space.grow(grown)
        elif space.width == group.shape[1]:
            return factors
        else:
            Q, Z = space.beside()
            more = larger(Z, factors)
            joined = space.width + Q.shape[-1]
            needed = _krylov_bytes(group, joined, space.block + PROBE_BLOCK, safe)
            if not bool(more) or joined > most or needed > group.workspace_bytes:
                return factors._replace(leading=~more)
            space.join(Q, Z)


def _next_width(space: KrylovSpace) -> int:
    """Of a space that grows by a share, in whole blocks."""
    blocks = math.ceil(space.width * GROWTH / space.block) - math.ceil(space.width / space.block)
    return space.width + max(1, blocks) * space.block


def _takes_krylov(group: Group) -> bool:
    """Whether all that the space of one matrix takes, in the safe way too, fits the workspace."""
    block, width = _krylov_plan(group)
    m, n = group.shape
    results = group.dtype.itemsize * (m + n) * (group.rank + 1) + _looks_bytes(group)
    safely = _bytes("randomized", group, results + _krylov_bytes(group, width, block, True))
    return held_bytes("randomized", group) + safely <= group.workspace_bytes


def _krylov_plan(group: Group) -> tuple[int, int]:
    """(block, width) of the space that is built before residuals are looked at."""
    small, r = min(group.shape), group.rank
    extra = group.oversample
    if extra is None:
        extra = max(KRYLOV_LEAST_OVERSAMPLE, math.ceil(KRYLOV_OVERSAMPLE * r))
    width = min(small, r + extra)
    if group.niter is None:
        block = max(1, width // (KRYLOV_STEPS * BLOCK_MULTIPLE)) * BLOCK_MULTIPLE
        width = math.ceil(width / block) * block
    else:  # as many as were asked for, in blocks as wide as that takes
        block = math.ceil(width / group.niter)
        width = block * group.niter
    return min(block, small), min(width, small)


def _krylov_bytes(group: Group, width: int, block: int, safe: bool = False) -> int:
    m, n = group.shape
    item = group.dtype.itemsize
    # The space, once more while it grows, blocks on their way and triplets as they are replaced; Z,
    # its Gram matrix, the eigenvectors of that and the work of finding them in float64. An SVD of Z
    # copies it, and has left vectors.
    space = item * (m + n) * (2 * width + 4 * block + 2 * group.rank)
    if safe or group.dtype == torch.float64:
        return space + 8 * (max(m, n) * (3 * width + group.rank) + 10 * width * width)
    return space + 8 * (max(m, n) * (width + group.rank) + 6 * width * width)


def _subspace_bytes(group: Group, width: int) -> int:
    m, n = group.shape
    item = group.dtype.itemsize
    return item * (m + n) * 3 * width + 8 * n * width + 8 * 3 * width * width


def _looks_bytes(group: Group) -> int:
    """Of the probes that a residual is measured by, or of what is looked for beside triplets."""
    m, n = group.shape
    item, columns = group.dtype.itemsize, PROBE_BLOCK * (PROBE_STEPS + 2)
    return max(item * (m + n) * 8 * PROBES, (item * (m + n) + 8 * max(m, n)) * columns)


def _width(group: Group) -> int:
    """Of the block in subspace iteration."""
    extra = group.oversample
    if extra is None:
        extra = max(8, group.rank // 8)
    return min(min(group.shape), group.rank + extra)


def _warm_width(group: Group) -> int:
    return min(min(group.shape), group.rank + (group.oversample or 0))


def _sketch(group: Group, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """(1, rows, width): a Gaussian matrix of columns of norm 1, about."""
    device = group.As[0].device
    noise = torch.randn(1, rows, width, dtype=group.dtype, device=device, generator=generator)
    return noise / math.sqrt(rows)


def _starts(group: Group, width: int, generator: torch.Generator) -> Tensor:
    """(b, n, width): the leading columns of earlier Vs, and random ones where they have fewer: the
    same for every matrix, so that none depends on which others share the call."""
    Vs = [w if isinstance(w, Tensor) else w.V for w in group.warm if w is not None]
    Vs = [V[:, :width].to(group.dtype) for V in Vs]
    if any(V.shape[1] < width for V in Vs):
        noise = _sketch(group, group.shape[1], width, generator)[0]
        Vs = [torch.cat([V, noise[:, V.shape[1] :]], -1) for V in Vs]
    return _stacked(Vs)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """A batch of matrices; of one a view."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))
