"""An earlier result as the sketch: one round, and more where that misses the tolerance."""

from __future__ import annotations

from dataclasses import replace

import torch

from osf_kernels.linalg.svd.beside import led
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.methods import gram, krylov, subspace_iteration


def run(group: Group, *, safe: bool) -> Factors:
    """One round of subspace iteration from the earlier V, and while tol isn't met a Krylov space
    from its result; eigenvectors of the Gram matrix where that would be the whole space."""
    width = _width(group)
    generator = group.generator(width)
    start = group.starts(width, generator)
    first = subspace_iteration.run(group, start, niter=1, safe=safe, generator=generator)
    first = led(group.As, first, group.tol, safe=safe)
    if group.tol is None or group.niter == 1:
        return first
    late = first.residual > group.tol
    if first.leading is not None:
        late = late | ~first.leading
    # A start that isn't finite gives nothing to go on from.
    late = torch.nonzero(late & first.residual.isfinite()).flatten()
    if not len(late):
        return first
    rest = replace(group.of(late), niter=None if group.niter is None else group.niter - 1)
    m, n = group.shape
    r = group.rank
    if 2 * r > min(m, n):
        more = gram.run(replace(rest, complement=False), safe=safe)
    elif m < n:  # a space of min(m, n) columns is then the whole one
        turned = rest.transposed()
        more = krylov.run(turned, first.U[late], 2 * r, safe=safe, generator=generator).swapped()
    else:
        more = krylov.run(rest, first.V[late], 2 * r, safe=safe, generator=generator)
    return first.merged(late, more._replace(iterations=[i + 1 for i in more.iterations]))


def workspace_bytes(group: Group, *, safe: bool) -> int:
    width, grown = _width(group), 0
    if group.tol is not None and group.niter != 1:
        if 2 * width > min(group.shape):
            plain = replace(group, complement=False)
            grown = max(gram.workspace_bytes(plain, safe=s) for s in (False, True))
        else:
            grown = krylov.workspace_bytes(group, width, 2 * width, safe=safe)
    first = subspace_iteration.workspace_bytes(group, width)
    return 2 * (group.results_bytes + group.looks_bytes) + max(grown, first)


def factors_bytes(group: Group) -> int:
    return group.results_bytes


def _width(group: Group) -> int:
    return min(min(group.shape), group.rank + (group.oversample or 0))
