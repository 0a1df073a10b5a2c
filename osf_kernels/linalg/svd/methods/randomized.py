"""Block Krylov where its space fits the workspace, subspace iteration where it doesn't.

A space of one block or two is made of powers, for matrices where that loses nothing.
"""

from __future__ import annotations

import torch

from osf_kernels import cpu
from osf_kernels.linalg import primitives
from osf_kernels.linalg.svd.beside import led
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.methods import krylov, powers, subspace_iteration

# Subspace iteration converges by (σ_{l+1}/σ_r)² a step, so that more would not help much.
SUBSPACE_STEPS = 100


def run(group: Group, *, safe: bool) -> Factors:
    m, n = group.shape
    if m < n:  # a space of min(m, n) columns is then the whole one
        return run(group.transposed(), safe=safe).swapped()
    if not krylov.fits(group):
        return _by_subspace_iteration(group, safe)
    block, width = krylov.plan(group)
    generator = group.generator(block)
    noise = group.sketch(m, block, generator)

    def grown(group: Group) -> Factors:
        start = primitives.multiply(group.As, noise, transpose=True)
        return krylov.run(group, start, width, safe=safe, generator=generator)

    steps = width // block
    few = steps <= powers.MOST_STEPS and width < min(group.shape) and group.tol is None
    if safe or not few:
        return grown(group)
    found = powers.run(group, noise, steps=steps)
    late = torch.nonzero(~found.ok).flatten()
    found = led(group.As, found, group.tol, safe=safe)
    return found.merged(late, grown(group.of(late))) if len(late) else found


def workspace_bytes(group: Group, *, safe: bool) -> int:
    if krylov.fits(group):
        working = krylov.workspace_bytes(group, *krylov.plan(group), safe=safe)
    else:
        working = subspace_iteration.workspace_bytes(group, _width(group))
    return group.results_bytes + group.looks_bytes + working


def factors_bytes(group: Group) -> int:
    return group.results_bytes


def _by_subspace_iteration(group: Group, safe: bool) -> Factors:
    width = _width(group)
    generator = group.generator(width)
    start = group.sketch(group.shape[1], width, generator)
    niter = group.niter or (cpu.KRYLOV_STEPS if group.tol is None else SUBSPACE_STEPS)
    found = subspace_iteration.run(group, start, niter=niter, safe=safe, generator=generator)
    return led(group.As, found, group.tol, safe=safe)


def _width(group: Group) -> int:
    extra = max(8, group.rank // 8) if group.oversample is None else group.oversample
    return min(min(group.shape), group.rank + extra)
