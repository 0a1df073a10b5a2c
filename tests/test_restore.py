"""restore_ and the halves: what they promise, in every dtype and with every basis."""

from __future__ import annotations

import itertools

import pytest
import torch

from osf_kernels import Basis, apply_, coefficients, project, restore_, restore_many_
from osf_kernels.testing import (
    assert_error_within,
    project_eager,
    project_reference,
    relative_error,
    restore_reference,
)
from tests.helpers import DTYPES, KINDS, draw_basis, generator_for, randn

MODES = ("complement", "core")


def triplets(W, rank, dtype):
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return tuple(t.to(dtype) for t in (U[..., :rank], S[..., :rank], Vh[..., :rank, :].mT))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 7, 20, 30])
def test_singular_values_pin_the_protected_part(mode, rank):
    gen = generator_for("restore", mode, rank)
    W0 = randn(40, 30, dtype=torch.float32, generator=gen)
    U, S, V = triplets(W0, rank, torch.float32)
    W = W0 + 0.1 * randn(40, 30, dtype=torch.float32, generator=gen)
    reference = restore_reference(W, U, V, S=S, mode=mode)
    restored = restore_(W.clone(), U, V, S=S, mode=mode)
    assert relative_error(restored, reference, W) < 5e-7
    if mode == "complement":
        assert relative_error(U.mT @ restored, S[:, None] * V.mT, W) < 1e-6
        assert relative_error(restored @ V, U * S, W) < 1e-6
    assert relative_error(U.mT @ restored @ V, S.diag(), W) < 1e-6
    free_before = project(W, U, V, mode=mode)
    assert relative_error(project(restored, U, V, mode=mode), free_before, W) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("left", "right"), list(itertools.product(KINDS, KINDS)))
def test_a_dense_protected_part_serves_any_basis(dtype, mode, left, right):
    gen = generator_for("dense", dtype, mode, left, right)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for r, k in ((6, 9), (33, 25), (40, 3), (0, 0)):
        U, V = draw_basis(40, r, left, wide, gen), draw_basis(30, k, right, wide, gen)
        W0 = randn(40, 30, dtype=dtype, generator=gen)
        protected = (W0.double() - project_reference(W0, U, V, mode=mode)).to(wide)
        W = W0 + 0.05 * randn(40, 30, dtype=dtype, generator=gen)
        reference = restore_reference(W, U, V, protected=protected, mode=mode)
        peer = (project_eager(W.to(wide), U, V, mode=mode) + protected).to(dtype)
        restored = restore_(W.clone(), U, V, protected=protected, mode=mode)
        assert_error_within(restored, reference, peer, scale=W)


def test_sixteen_bit_weights_are_rounded_once():
    gen = generator_for("bf16 restore")
    W0 = randn(60, 50, dtype=torch.bfloat16, generator=gen)
    U, S, V = triplets(W0, 20, torch.float32)
    W = (W0.float() + 0.02 * torch.randn(60, 50)).bfloat16()
    exact = restore_reference(W, U, V, S=S)
    restored = restore_(W.clone(), U, V, S=S)
    assert relative_error(restored, exact, W) <= 1.05 * relative_error(exact.bfloat16(), exact, W)


def test_restore_undoes_what_adamw_does_to_the_protected_part():
    torch.manual_seed(1)
    W = torch.nn.Parameter(torch.randn(24, 18))
    U, S, V = triplets(W.detach(), 8, torch.float32)
    optimizer = torch.optim.AdamW([W], lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        (W @ torch.randn(18, 7)).square().mean().backward()
        with torch.no_grad():
            W.grad.copy_(project(W.grad, U, V))
            optimizer.step()
            drifted = relative_error(U.mT @ W, S[:, None] * V.mT, S)
            restore_(W, U, V, S=S)
        optimizer.zero_grad()
    assert drifted > 1e-4, "AdamW alone would have moved it"
    assert relative_error(U.mT @ W.detach(), S[:, None] * V.mT, S) < 1e-6


def test_a_list_with_both_ways_equals_a_loop():
    gen = generator_for("restore list")
    Ws, Us, Vs, Ss, Hs = [], [], [], [], []
    for m, n, rank, way in ((20, 16, 4, "S"), (16, 20, 5, "H"), (12, 12, 6, "S"), (0, 4, 0, "H")):
        W0 = randn(m, n, dtype=torch.float32, generator=gen)
        U, S, V = triplets(W0, rank, torch.float32)
        Ws.append(W0 + 0.1 * randn(m, n, dtype=torch.float32, generator=gen))
        Us.append(U)
        Vs.append(V)
        Ss.append(S if way == "S" else None)
        Hs.append(W0 - project(W0, U, V) if way == "H" else None)
    listed = [W.clone() for W in Ws]
    restore_many_(listed, Us, Vs, S=Ss, protected=Hs)
    for W, U, V, S, H, actual in zip(Ws, Us, Vs, Ss, Hs, listed, strict=True):
        assert torch.equal(restore_(W.clone(), U, V, S=S, protected=H), actual)
    restore_many_([], [], [])


def test_what_is_pinned_may_be_wider_than_the_weight():
    gen = generator_for("wide pins")
    for dtype in (torch.float32, torch.bfloat16):
        W0 = randn(20, 16, dtype=dtype, generator=gen)
        U, S, V = triplets(W0, 5, torch.float32)
        W = (W0.float() + 0.1 * torch.randn(20, 16)).to(dtype)
        reference = restore_reference(W, U, V, S=S)
        protected = (U.double() * S.double()) @ V.double().mT
        for pin in ({"S": S.double()}, {"protected": protected}):
            restored = restore_(W.clone(), U, V, **pin)
            assert relative_error(restored, reference, W) <= 2 * torch.finfo(dtype).eps


def test_batched_restore():
    gen = generator_for("batched restore")
    W0 = randn(3, 14, 12, dtype=torch.float32, generator=gen)
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    U, S, V = U[..., :4], S[..., :4], Vh[..., :4, :].mT
    W = W0 + 0.1 * randn(3, 14, 12, dtype=torch.float32, generator=gen)
    restored = restore_(W.clone(), U, V, S=S)
    for i in range(3):
        assert relative_error(restored[i], restore_reference(W[i], U[i], V[i], S=S[i]), W[i]) < 5e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("left", "right"), list(itertools.product(KINDS, KINDS)))
def test_halves_make_the_whole(dtype, mode, left, right):
    gen = generator_for("halves", dtype, mode, left, right)
    g = randn(40, 30, dtype=dtype, generator=gen)
    U, V = draw_basis(40, 9, left, dtype, gen), draw_basis(30, 21, right, dtype, gen)
    A, B = coefficients(g, U, V)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert A.dtype == B.dtype == wide
    for value, basis, product in (
        (A, U, lambda c: c.mT @ g.double()),
        (B, V, lambda c: g.double() @ c),
    ):
        if basis is None:
            assert value.numel() == 0
        else:
            exact = product(basis.columns.double())
            assert relative_error(value, exact, g) <= 4 * torch.finfo(wide).eps
    kept = A.clone(), B.clone()
    actual = apply_(g.clone(), U, V, A, B, mode=mode)
    reference = project_reference(g, U, V, mode=mode)
    assert_error_within(actual, reference, project_eager(g, U, V, mode=mode), scale=g)
    assert torch.equal(A, kept[0])
    assert torch.equal(B, kept[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spans", ["high", "low"])
def test_halves_with_rows_sharded(mode, spans):
    """B is local, A is summed over the shards, then each shard finishes alone; columns are the
    mirror image."""
    gen = generator_for("shards", mode, spans)
    g = randn(31, 22, dtype=torch.float64, generator=gen)
    U, V = draw_basis(31, 8, spans, g.dtype, gen), draw_basis(22, 6, spans, g.dtype, gen)
    whole = project_reference(g, U, V, mode=mode)

    def shards(g, U, V):
        rows = [slice(0, 12), slice(12, 13), slice(13, 31)]
        local = [Basis(U.columns[s], spans) for s in rows]
        halves = [coefficients(g[s], u, V) for s, u in zip(rows, local, strict=True)]
        A = sum(A for A, _ in halves)
        parts = zip(rows, local, halves, strict=True)
        return [apply_(g[s].clone(), u, V, A, B, mode=mode) for s, u, (_, B) in parts]

    assert relative_error(torch.cat(shards(g, U, V)), whole, g) < 1e-14


def rough(W, rank, dtype, gen):
    """Bases near the leading ones, as an iteration that stopped early gives them, and S of them."""
    U, S, V = triplets(W, rank, torch.float64)
    noise = (0.03 * torch.randn(B.shape, generator=gen) for B in (U, V))
    U, V = (torch.linalg.qr(B + x)[0] for B, x in zip((U, V), noise, strict=True))
    return tuple(t.to(dtype) for t in (U, S, V))


def missing(W, U, S, V, mode):
    """What the triplets miss of W, in float64."""
    U, S, V, W = (t.double() for t in (U, S, V, W))
    if mode == "core":
        return U.mT @ W @ V - S.diag_embed()
    return U.mT @ W - S[..., None] * V.mT, W @ V - U * S[..., None, :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 7, 30])
def test_with_the_residual_the_weight_is_pinned_and_not_its_triplets(dtype, mode, rank):
    gen = generator_for("residual", dtype, mode, rank)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    W0 = randn(40, 30, dtype=dtype, generator=gen)
    U, S, V = rough(W0, rank, wide, gen)
    rest = missing(W0, U, S, V, mode)
    rest = rest.to(wide) if mode == "core" else tuple(t.to(wide) for t in rest)
    eps = torch.finfo(dtype).eps
    assert relative_error(restore_(W0.clone(), U, V, S=S, mode=mode), W0, W0) > eps
    kept = restore_(W0.clone(), U, V, S=S, residual=rest, mode=mode)
    assert relative_error(kept, W0, W0) <= 4 * eps
    W = W0 + 0.1 * randn(40, 30, dtype=dtype, generator=gen)
    protected = W0.double() - project_reference(W0, U, V, mode=mode)
    reference = restore_reference(W, U, V, protected=protected, mode=mode)
    restored = restore_(W.clone(), U, V, S=S, residual=rest, mode=mode)
    assert relative_error(restored, reference, W) <= 4 * eps


def test_a_residual_of_a_batch_and_in_a_list():
    gen = generator_for("residual list")
    Ws = [randn(3, 20, 16, dtype=torch.float32, generator=gen) for _ in range(2)]
    found = [rough(W, 5, torch.float32, gen) for W in Ws]
    rests = [
        tuple(t.bfloat16() for t in missing(W, *f, "complement"))
        for W, f in zip(Ws, found, strict=True)
    ]
    Us, Ss, Vs = (list(column) for column in zip(*found, strict=True))
    listed = [W.clone() for W in Ws]
    restore_many_(listed, Us, Vs, S=Ss, residual=[rests[0], None])
    assert torch.equal(listed[0], restore_(Ws[0].clone(), Us[0], Vs[0], S=Ss[0], residual=rests[0]))
    assert torch.equal(listed[1], restore_(Ws[1].clone(), Us[1], Vs[1], S=Ss[1]))
    for i in range(3):
        one = restore_(
            Ws[0][i].clone(), Us[0][i], Vs[0][i], S=Ss[0][i], residual=tuple(t[i] for t in rests[0])
        )
        assert relative_error(listed[0][i], one, one) <= 4 * torch.finfo(torch.float32).eps


def test_a_residual_that_does_not_fit_is_refused_before_anything_is_written():
    gen = generator_for("residual refused")
    W0 = randn(20, 16, dtype=torch.float32, generator=gen)
    U, S, V = triplets(W0, 5, torch.float32)
    A, B = missing(W0, U, S, V, "complement")
    for options, error, text in (
        (
            {"residual": (A, B), "protected": W0},
            ValueError,
            r"residual to be beside S, got one alone",
        ),
        ({"S": S, "residual": A}, TypeError, r"residual to be a pair of tensors .*, got Tensor"),
        ({"S": S, "residual": (B, A)}, ValueError, r"residual to be of shape \(5, 16\)"),
        ({"S": S, "residual": (A, B[:, 1:])}, ValueError, r"residual to be of shape \(20, 5\)"),
        ({"S": S, "residual": (A, B), "mode": "core"}, TypeError, r"a tensor \(..., r, r\)"),
        ({"S": S, "residual": (A.long(), B)}, TypeError, "residual to be a floating dtype"),
        (
            {"S": S, "residual": (A, B.clone().requires_grad_())},
            ValueError,
            "residual.* requires grad",
        ),
    ):
        W = W0.clone()
        with pytest.raises(error, match=rf"osf_kernels\.restore_: expected .*{text}"):
            restore_(W, U, V, **options)
        assert torch.equal(W, W0)
