"""The free block of a matrix: what project leaves, in coordinates; its gradient, and adding it."""

from __future__ import annotations

import pytest
import torch

from osf_kernels import (
    Basis,
    FreeBasis,
    FreeSide,
    Refusal,
    add_free_many_,
    free_block,
    free_gradient,
    free_matrix,
    plan_free,
)
from osf_kernels.testing import project_reference
from tests.helpers import generator_for

F64 = torch.float64
SHAPES = [
    (40, 40, 20, 20),
    (96, 32, 16, 16),
    (32, 96, 26, 26),
    (30, 50, None, 20),
    (50, 30, 12, None),
    (24, 36, 3, 33),
]


def basis(size, count, generator, dtype=F64, batch=()):
    if count is None:
        return None
    return torch.linalg.qr(torch.randn(*batch, size, count, generator=generator, dtype=F64))[0].to(
        dtype
    )


def sides(m, n, r, k, generator, dtype=F64, batch=()):
    U, V = (basis(s, c, generator, dtype, batch) for s, c in ((m, r), (n, k)))
    return U, V, FreeBasis.of(U, m), FreeBasis.of(V, n)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_is_what_project_leaves(shape, batch):
    generator = generator_for(*[s or 0 for s in shape])
    U, V, left, right = sides(*shape, generator, batch=batch)
    g = torch.randn(*batch, *shape[:2], generator=generator, dtype=F64)
    C = free_block(g, left, right)
    assert C.shape == (*batch, left.width, right.width)
    torch.testing.assert_close(
        free_matrix(C, left, right), project_reference(g, U, V), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(free_block(free_matrix(C, left, right), left, right), C)


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_a_matrix(shape):
    generator = generator_for(shape[0])
    _, _, left, right = sides(*shape, generator)
    m, n = shape[:2]
    g = torch.randn(m, n, generator=generator, dtype=F64)
    C = free_block(g, left, right)
    cuts = [(slice(0, 11), None), (slice(11, m), None)]
    total = sum(free_block(g[rows], left, right, rows, None) for rows, _ in cuts)
    torch.testing.assert_close(total, C)
    total = sum(
        free_block(g[:, part], left, right, None, part) for part in (slice(0, 7), slice(7, n))
    )
    torch.testing.assert_close(total, C)
    whole = free_matrix(C, left, right)
    torch.testing.assert_close(free_matrix(C, left, right, slice(4, 9)), whole[4:9])
    torch.testing.assert_close(
        free_matrix(C, left, right, slice(4, 9), slice(3, 12)), whole[4:9, 3:12]
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [None, "dense", "right", "left", "both"])
def test_gradient_is_that_of_autograd(shape, order):
    generator = generator_for(shape[1])
    _, _, left, right = sides(*shape, generator)
    m, n = shape[:2]
    dy = torch.randn(70, m, generator=generator, dtype=F64)
    x = torch.randn(70, n, generator=generator, dtype=F64)
    C = torch.zeros(left.width, right.width, dtype=F64, requires_grad=True)
    Ul, Vl = (
        torch.eye(s.size, dtype=F64) if s.held == "everything" else s.columns()
        for s in (left, right)
    )
    (x @ (Ul @ C @ Vl.mT).mT).backward(dy)
    assert C.grad is not None
    torch.testing.assert_close(free_gradient(dy, x, left, right, order=order), C.grad)
    torch.testing.assert_close(
        free_gradient(dy, right.reduce(x), left, right, order=order, right_reduced=True), C.grad
    )
    torch.testing.assert_close(
        free_gradient(left.reduce(dy), x, left, right, order=order, left_reduced=True), C.grad
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_those_of_the_formula(shape):
    """float32 against float64: at most twice what the same products of eager torch err."""
    generator = generator_for(shape[0], shape[1])
    _, _, left, right = sides(*shape, generator, torch.float32)
    g = torch.randn(*shape[:2], generator=generator)
    wide = [s.to(dtype=F64) for s in (left, right)]
    exact = free_block(g.double(), *wide)
    dense = [torch.eye(s.size) if s.held == "everything" else s.columns() for s in (left, right)]
    eager = dense[0].mT @ g @ dense[1]
    error, allowed = ((t.double() - exact).norm() for t in (free_block(g, left, right), eager))
    # A reflector's two steps err by as much again as the one product of its columns.
    assert error <= 3 * allowed + 1e-6 * exact.norm()


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("strided", [False, True])
def test_adds_to_every_weight_of_a_list(batch, strided):
    generator = generator_for(len(batch))
    weights, blocks, lefts, rights, expected = [], [], [], [], []
    for shape in SHAPES:
        _, _, left, right = sides(*shape, generator, torch.float32, batch)
        W = torch.randn(*batch, *shape[:2], generator=generator)
        W = W.mT.contiguous().mT if strided else W
        C = torch.randn(*batch, left.width, right.width, generator=generator)
        for list_, entry in zip((weights, blocks, lefts, rights), (W, C, left, right), strict=True):
            list_.append(entry)
        expected.append(W + free_matrix(C, left, right))
    kept = [C.clone() for C in blocks]
    add_free_many_(weights, blocks, lefts, rights)
    for W, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(W, wanted, atol=2e-5, rtol=0)
    assert all(torch.equal(C, before) for C, before in zip(blocks, kept, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_protected_stays(shape):
    """A thousand additions in float32 move U'W and W V by rounding alone."""
    generator = generator_for(7)
    U, V, left, right = sides(*shape, generator, torch.float32)
    W = torch.randn(*shape[:2], generator=generator)
    before = W.double()
    for _ in range(1000):
        C = 0.01 * torch.randn(left.width, right.width, generator=generator)
        add_free_many_([W], [C], [left], [right])
    moved = W.double() - before
    kept = moved - project_reference(moved, *(None if b is None else b.double() for b in (U, V)))
    assert moved.norm() > 0.05 * before.norm()
    assert kept.norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_adds_in_float32_whatever_the_process_says(precision):
    generator = generator_for(8)
    U, V, left, right = sides(64, 64, 32, 32, generator, torch.float32)
    C = torch.randn(32, 32, generator=generator)
    torch.set_float32_matmul_precision(precision)
    try:
        W = torch.zeros(64, 64)
        add_free_many_([W], [C], [left], [right])
        with torch.autocast("cpu", torch.bfloat16):
            formed = free_matrix(C, left, right)
    finally:
        torch.set_float32_matmul_precision("highest")
    for update in (W, formed):
        kept = update.double() - project_reference(update.double(), U.double(), V.double())
        assert kept.norm() <= 1e-6 * update.norm()


def test_not_a_number_stays_one():
    _, _, left, right = sides(40, 40, 20, 20, generator_for(9), torch.float32)
    C = torch.zeros(20, 20)
    C[3, 4] = float("nan")
    W = torch.zeros(40, 40)
    add_free_many_([W], [C], [left], [right])
    assert W.isnan().all()


def test_planned_order_has_the_fewest_flops():
    for tokens in (1, 64, 600, 5000):
        for m, n, r in ((384, 384, 192), (1536, 384, 77), (384, 1536, 307), (64, 4096, 8)):
            left, right = FreeSide.of(m, r), FreeSide.of(n, r)
            plan = plan_free(tokens, left, right)
            p, q = left.width, right.width
            costs = {
                "dense": plan.plain_flops
                + min(
                    m * right.flops + q * left.flops,
                    n * left.flops + p * right.flops,
                ),
                "right": tokens * right.flops + 2 * tokens * m * q + q * left.flops,
                "left": tokens * left.flops + 2 * tokens * p * n + p * right.flops,
                "both": tokens * (left.flops + right.flops) + 2 * tokens * p * q,
            }
            assert plan.flops == costs[plan.order] == min(costs.values())
            assert plan.kept == (q if plan.order in ("right", "both") else n)


def test_all_orders_are_planned():
    def order(tokens, left, right):
        return plan_free(tokens, left, right).order

    half = FreeSide.of(64, 32)
    assert order(16, FreeSide.of(64, 48), FreeSide.of(64, 48)) == "both"
    assert order(4096, FreeSide.of(64, 32), FreeSide.of(4096, 32)) == "left"
    assert order(4096, FreeSide.of(4096, 32), FreeSide.of(64, 32)) == "right"
    assert order(4096, FreeSide.of(64, 8), FreeSide.of(64, 8)) == "dense"
    assert order(4096, half, half) == "right"  # of equals


@pytest.mark.parametrize("rho", [0.6, 0.7, 0.8, 0.9])
def test_from_three_fifths_on_the_gradient_is_cheaper_than_plain(rho):
    for m, n in ((1024, 1024), (4096, 1024), (1024, 4096)):
        r = int(rho * min(m, n))
        plan = plan_free(8192, FreeSide.of(m, r), FreeSide.of(n, r))
        assert plan.flops < plan.plain_flops
        assert plan.step_share < 1


def test_the_plan_says_which_way_and_why():
    text = str(plan_free(5120, FreeSide.of(384, 307), FreeSide.of(384, 307)))
    assert "384×384, free 77×77, 5120 tokens: a step takes 0.81 of plain training's" in text
    assert "its gradient V_l on the inputs first 0.40 of the plain one's" in text
    assert "(no basis first 1.02, U_l on the outputs' gradients first 0.40, both bases" in text
    assert "77 of 384 numbers a token are kept" in text


@pytest.mark.parametrize("tokens", [-1, "8", None, 2.0, True])
def test_a_plan_of_no_number_of_tokens_is_refused(tokens):
    with pytest.raises(Refusal, match="plan_free: expected tokens to be"):
        plan_free(tokens, FreeSide.of(8, 4), FreeSide.of(8, 4))


def well_formed():
    _, _, left, right = sides(8, 6, 3, 2, generator_for(10), torch.float32)
    return left, right


@pytest.mark.parametrize(
    ("call", "op", "argument"),
    [
        (lambda a, b: free_block(torch.zeros(6, 8), a, b), "free_block", "x"),
        (lambda a, b: free_block(torch.zeros(8), a, b), "free_block", "x"),
        (lambda a, b: free_matrix(torch.zeros(4, 5), a, b), "free_matrix", "C"),
        (
            lambda a, b: free_gradient(torch.zeros(9, 8), torch.zeros(7, 6), a, b),
            "free_gradient",
            "outputs",
        ),
        (
            lambda a, b: free_gradient(torch.zeros(9, 8), torch.zeros(9, 4), a, b),
            "free_gradient",
            "inputs",
        ),
        (
            lambda a, b: free_gradient(torch.zeros(9, 8), torch.zeros(9, 6), a, b, order="up"),
            "free_gradient",
            "order",
        ),
    ],
)
def test_refuses(call, op, argument):
    with pytest.raises(Refusal) as refusal:
        call(*well_formed())
    assert (refusal.value.op, refusal.value.argument) == (op, argument)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weights": torch.zeros(6, 8)}, r"weights\[1\] to be of 8 rows and 6 columns"),
        ({"blocks": torch.zeros(5, 5)}, r"blocks\[1\] to be of 5 rows and 4 columns"),
        ({"weights": torch.zeros(8, 6, dtype=torch.bfloat16)}, r"weights\[1\].*float32 or"),
    ],
)
def test_refuses_a_list_before_it_writes(change, text):
    left, right = well_formed()
    entries = {"weights": torch.zeros(8, 6), "blocks": torch.ones(5, 4)}
    lists = {name: [entries[name].clone(), change.get(name, entries[name])] for name in entries}
    with pytest.raises(Refusal, match=text):
        add_free_many_(lists["weights"], lists["blocks"], [left, left], [right, right])
    assert not lists["weights"][0].any()
    with pytest.raises(Refusal, match="of one length"):
        add_free_many_(lists["weights"][:1], lists["blocks"][:1], [left, left], [right])


def test_a_low_basis_is_taken_as_it_is():
    low = basis(30, 10, generator_for(11))
    left = FreeBasis.of(Basis(low, "low"), 30)
    g = torch.randn(30, 30, generator=generator_for(12), dtype=F64)
    torch.testing.assert_close(free_block(g, left, left), low.mT @ g @ low)
