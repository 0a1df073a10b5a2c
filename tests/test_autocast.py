"""Operators inside an autocast region compute what they compute outside of it."""

from __future__ import annotations

import pytest
import torch

from osf_kernels import (
    apply_,
    coefficients,
    orthonormalize,
    polar,
    project,
    project_,
    project_many_,
    restore_,
    truncated_svd,
)
from tests.helpers import generator_for, randn

M, N, R = 40, 28, 6


def operands(*key):
    gen = generator_for(*key)
    g = randn(M, N, dtype=torch.float32, generator=gen)
    U, V = (torch.linalg.qr(randn(size, R, dtype=g.dtype, generator=gen))[0] for size in (M, N))
    return g, U, V


def many(g, U, V):
    grads = [g.clone(), 2 * g]
    project_many_(grads, [U, None], [V, V])
    return torch.stack(grads)


def halves(g, U, V):
    return apply_(g.clone(), U, V, *coefficients(g, U, V))


def factors(g, U, V):
    found = truncated_svd(g, R, generator=torch.Generator().manual_seed(0))
    return torch.cat((found.U, found.V, found.S.expand(1, R)))


CALLS = {
    "project": project,
    "project_": lambda g, U, V: project_(g.clone(), U, V),
    "project_many_": many,
    "coefficients and apply_": halves,
    "restore_": lambda g, U, V: restore_(2 * g, U, V, protected=g - project(g, U, V)),
    "orthonormalize": lambda g, U, V: orthonormalize(g),
    "polar": lambda g, U, V: polar(g),
    "truncated_svd": factors,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_into_operators(name, dtype):
    arguments = operands(name)
    plain = CALLS[name](*arguments)
    with torch.autocast("cpu", dtype=dtype):
        assert (arguments[0] @ arguments[2]).dtype == dtype, "autocast is on"
        within = CALLS[name](*arguments)
    assert within.dtype == plain.dtype == torch.float32
    assert torch.equal(within, plain)
