"""The table of forms and its jobs, which Triton and CUDA run, over plain kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

from osf_kernels.backends import jobs
from osf_kernels.forms import FORMS
from osf_kernels.plan import Matrix, Step, choose, choose_pinned
from osf_kernels.testing import project_reference, relative_error, restore_reference
from tests.helpers import KINDS, draw_basis, generator_for, kernels_of, launches, randn, run_eagerly


class PlainKernels:
    """The two kernels as their docstrings define them; counts launches and refuses misuse."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int]] = []

    def coefficients(self, jobs):
        self.launches.append(("coefficients", len(jobs)))
        for x, U, V, A, B, S, root in jobs:
            assert x.dim() == 2
            assert (U is None) == (A is None)
            assert (V is None) == (B is None)
            value_A = None if U is None else U.mT @ x
            value_B = None if V is None else x @ V
            if S is not None:
                value_A = value_A - S[:, None] * V.mT if root else value_A
                value_B = value_B - U * S
            for out, value in ((A, value_A), (B, value_B)):
                if out is not None:
                    out.copy_(value)

    def update(self, jobs):
        self.launches.append(("update", len(jobs)))
        for out, x, L1, R1, L2, R2, alpha, beta, addend in jobs:
            assert (L1 is None) == (R1 is None)
            assert (L2 is None) == (R2 is None)
            assert beta in (0.0, 1.0, -1.0)
            value = beta * x if beta else torch.zeros_like(out)
            if L1 is not None:
                value = value + alpha * (L1 @ R1)
            if L2 is not None:
                value = value + alpha * (L2 @ R2)
            out.copy_(value if addend is None else value + addend)


def matrix_of(g, U, V):
    return Matrix(
        m=g.shape[0],
        n=g.shape[1],
        r=None if U is None else U.columns.shape[1],
        k=None if V is None else V.columns.shape[1],
        u_spans="high" if U is None else U.spans,
        v_spans="high" if V is None else V.spans,
        dtype="float64",
        basis_dtype="float64",
    )


def held(basis):
    return None if basis is None else basis.columns


@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize(("left", "right"), list(itertools.product(KINDS, KINDS)))
def test_projection(mode, left, right):
    gen = generator_for("forms", mode, left, right)
    m, n = 30, 22
    for (r, k), device in itertools.product(((4, 6), (25, 3), (28, 20), (30, 5)), ("cpu", "cuda")):
        g = randn(m, n, dtype=torch.float64, generator=gen)
        U, V = draw_basis(m, r, left, g.dtype, gen), draw_basis(n, k, right, g.dtype, gen)
        step = choose(matrix_of(g, U, V), mode, device)
        reference = project_reference(g, U, V, mode=mode)
        in_place = g.clone()
        out = torch.full_like(g, float("nan"))
        kernels = PlainKernels()
        run_eagerly([jobs.Problem(in_place, in_place, held(U), held(V), step)], kernels)
        run_eagerly([jobs.Problem(g, out, held(U), held(V), step)], PlainKernels())
        assert relative_error(in_place, reference, g) < 1e-14
        assert relative_error(out, reference, g) < 1e-14
        kinds = "".join(kind[0].upper() for kind, _ in kernels.launches)
        assert kinds == kernels_of(step.form)


TABLE = [
    (form, first, beta)
    for form, first, beta in itertools.product(FORMS, ("left", "right"), (0.0, 1.0))
    if FORMS[form].calls
    and (first == "left" or FORMS[form].right_first)
    and (form, beta) not in {("sequential", 0.0), ("dual in turn", 1.0)}
]


@pytest.mark.parametrize(("form", "first", "beta"), TABLE)
def test_forms_the_planner_seldom_picks(form, first, beta):
    """Every form in both orders equals its formula, whichever shape the planner wants it for."""
    gen = generator_for(form, first, beta)
    g = randn(12, 9, dtype=torch.float64, generator=gen)
    U = draw_basis(12, 5, "high", g.dtype, gen).columns
    V = draw_basis(9, 4, "high", g.dtype, gen).columns
    E, F, I, J = U @ U.mT, V @ V.mT, torch.eye(12).double(), torch.eye(9).double()
    value = {
        "dual": E @ g + g @ F - E @ g @ F,
        "sequential": E @ g + g @ F - E @ g @ F,
        "dual in turn": E @ g + g @ F - E @ g @ F,
        "left": E @ g,
        "right": g @ F,
        "mixed": E @ g @ (J - F) if first == "left" else (I - E) @ g @ F,
        "inner": E @ g @ F,
        "mixed in turn": (I - E) @ g @ F,
        "inner in turn": E @ g @ F,
    }[form]
    alpha = 1.0 if beta == 0.0 else -1.0
    step = Step(form, first, alpha, beta, 0, 0, 0, "", form)
    addend = randn(12, 9, dtype=torch.float64, generator=gen)
    wanted = beta * g + alpha * value
    for more in (None, addend):
        out, in_place = torch.full_like(g, float("nan")), g.clone()
        for x, y in ((g, out), (in_place, in_place)):
            run_eagerly([jobs.Problem(x, y, U, V, step, addend=more)], PlainKernels())
            assert relative_error(y, wanted if more is None else wanted + more, g) < 1e-14


@pytest.mark.parametrize("mode", ["complement", "core"])
def test_restore(mode):
    gen = generator_for("forms restore", mode)
    W0 = randn(14, 11, dtype=torch.float64, generator=gen)
    u, s, vt = torch.linalg.svd(W0)
    U, S, V = u[:, :6], s[:6], vt[:6].mT
    W = W0 + 0.1 * randn(14, 11, dtype=torch.float64, generator=gen)
    matrix = Matrix(14, 11, 6, 6, dtype="float64")
    reference = restore_reference(W, U, V, S=S, mode=mode)
    pinned, dense = W.clone(), W.clone()
    run_eagerly(
        [
            jobs.Problem(pinned, pinned, U, V, choose_pinned(matrix, mode, "cpu"), S=S),
            jobs.Problem(
                dense,
                dense,
                U,
                V,
                choose(matrix, mode, "cpu", once=True),
                addend=W0 - project_reference(W0, U, V, mode=mode),
            ),
        ],
        PlainKernels(),
    )
    assert relative_error(pinned, reference, W) < 1e-14
    assert relative_error(dense, reference, W) < 1e-14


def test_a_list_takes_the_launches_of_its_longest_form():
    gen = generator_for("launches")
    problems = []
    for m, n, left, right in (
        (30, 20, "high", "high"),
        (20, 30, "low", "low"),
        (9, 9, "low", None),
    ):
        g = randn(m, n, dtype=torch.float64, generator=gen)
        U, V = draw_basis(m, 4, left, g.dtype, gen), draw_basis(n, 4, right, g.dtype, gen)
        step = choose(matrix_of(g, U, V), "complement", "cuda")
        problems.append(jobs.Problem(g, g, held(U), held(V), step))
    kernels = PlainKernels()
    run_eagerly(problems, kernels)
    assert kernels.launches == [
        ("coefficients", 3),
        ("coefficients", 2),
        ("update", 3),
        ("update", 2),
    ]
    assert launches(problem.step.form for problem in problems) == 4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_launches_of_a_plan_are_those_of_a_run(count):
    gen = generator_for("launch counts")
    g = randn(8, 6, dtype=torch.float64, generator=gen)
    U = draw_basis(8, 3, "high", g.dtype, gen).columns
    V = draw_basis(6, 2, "high", g.dtype, gen).columns
    for chosen in itertools.combinations_with_replacement(FORMS, count):
        kernels = PlainKernels()
        problems = []
        for form in chosen:
            x = g.clone()
            problems.append(jobs.Problem(x, x, U, V, Step(form, "left", 1.0, 0.0, 0, 0, 0, "", "")))
        run_eagerly(problems, kernels)
        assert len(kernels.launches) == launches(chosen)
