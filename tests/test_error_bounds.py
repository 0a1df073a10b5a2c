"""The bound on errors for gradients that lie in one block: held or left by U, held or left by V."""

from __future__ import annotations

import itertools

import pytest
import torch

from osf_kernels import Basis, plan, project, restore_
from osf_kernels.testing import assert_error_within, project_eager, project_reference
from tests.helpers import DTYPES, generator_for, randn

SHAPES = (
    (16, 16, 3, 5),
    (64, 64, 8, 8),
    (64, 64, 8, 57),
    (200, 80, 100, 10),
    (256, 256, 1, 1),
    (256, 256, 32, 1),
    (256, 64, 32, 32),
    (300, 40, 39, 1),
    (300, 300, 100, 20),
    (384, 384, 192, 1),
    (64, 300, 30, 200),
    (64, 256, 40, 32),
    (256, 300, 248, 8),
)


def drawn(shape, held_U, held_V, size, dtype):
    """A gradient of ``size`` along one direction beside noise, and the columns of both sides."""
    m, n, r, k = shape
    gen = generator_for(shape, held_U, held_V, size, dtype)
    Qs = [torch.linalg.qr(randn(s, s, dtype=torch.float64, generator=gen))[0] for s in (m, n)]
    directions = [Q[:, 0 if held else -1] for Q, held in zip(Qs, (held_U, held_V), strict=True)]
    g = randn(m, n, dtype=torch.float64, generator=gen) + size * n**0.5 * torch.outer(*directions)
    return g.to(dtype), *(Q[:, :c].to(dtype) for Q, c in zip(Qs, (r, k), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_direction(dtype, shape):
    for held_U, held_V, size in itertools.product((True, False), (True, False), (50.0, 1e4)):
        if dtype == torch.float16 and size > 50:
            continue  # beyond its range
        g, U, V = drawn(shape, held_U, held_V, size, dtype)
        for left, right, mode in itertools.product(
            ("high", "low"), ("high", "low"), ("complement", "core")
        ):
            bases = Basis(U, left), Basis(V, right)
            reference = project_reference(g, *bases, mode=mode)
            peer = project_eager(g, *bases, mode=mode)
            assert_error_within(project(g, *bases, mode=mode), reference, peer, scale=g)


def test_large_sums_that_cancel_are_taken_in_turn():
    """Too many columns to be summed in float64, too few to hold much of a gradient by chance."""
    shape = (700, 240, 180, 60)
    for size in (0.0, 50.0):
        g, U, V = drawn(shape, True, True, size, torch.float32)
        bases = U, Basis(V, "low")
        assert "mixed, right first" in plan(g, *bases).form
        reference, peer = project_reference(g, *bases), project_eager(g, *bases)
        actual = project(g, *bases)
        assert_error_within(actual, reference, peer, scale=g)
        batch = project(torch.stack([g, g]), *bases)
        assert_error_within(batch[1], reference, peer, scale=g)


@pytest.mark.parametrize("mode", ["complement", "core"])
def test_restoring_keeps_the_bound(mode):
    for held_U, held_V in itertools.product((True, False), (True, False)):
        W, U, V = drawn((256, 256, 32, 4), held_U, held_V, 50.0, torch.float32)
        for left, right in itertools.product(("high", "low"), ("high", "low")):
            bases = Basis(U, left), Basis(V, right)
            reference = project_reference(W, *bases, mode=mode)
            peer = project_eager(W, *bases, mode=mode)
            restored = restore_(W.clone(), *bases, protected=torch.zeros_like(W), mode=mode)
            assert_error_within(restored, reference, peer, scale=W)
