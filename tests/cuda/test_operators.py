"""The public operators with backend "cuda", its kernels in the emulator: every form, in lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from osf_kernels import Basis, plan, project_many_, restore_
from osf_kernels.backends.jobs import Problem
from osf_kernels.plan import Matrix, Mode, Step, choose
from osf_kernels.testing import (
    leak,
    project_eager,
    project_reference,
    random_basis,
    relative_error,
)
from tests.cuda.emulated import Emulated
from tests.emulator.harness import compiler
from tests.helpers import launches, run_eagerly

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++)")


def draw(
    m: int, n: int, r: int | None, k: int | None, spans: str, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Basis | None, Basis | None]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=g, dtype=torch.float64).to(dtype)
    u_spans, v_spans = spans.split("-")
    U = None if r is None else random_basis(m, r, spans=u_spans, dtype=dtype, generator=g)  # type: ignore[arg-type]
    V = None if k is None else random_basis(n, k, spans=v_spans, dtype=dtype, generator=g)  # type: ignore[arg-type]
    return x, U, V


CASES = [
    (70, 90, 8, 12, "high-high"),
    (70, 90, 60, 80, "low-low"),
    (70, 90, 60, 12, "low-high"),
    (70, 90, 8, 80, "high-low"),
    (70, 90, 45, 60, "high-high"),
    (90, 70, 8, None, "high-high"),
    (90, 70, None, 60, "high-low"),
]


def step_on_a_gpu(x: Tensor, U: Basis | None, V: Basis | None, mode: Mode) -> Step:
    """The form that the planner chooses where these kernels run."""
    matrix = Matrix(
        x.shape[0],
        x.shape[1],
        r=None if U is None else U.columns.shape[1],
        k=None if V is None else V.columns.shape[1],
        u_spans="high" if U is None else U.spans,
        v_spans="high" if V is None else V.spans,
        dtype=str(x.dtype).removeprefix("torch."),
        basis_dtype=str(x.dtype).removeprefix("torch."),
    )
    return choose(matrix, mode, "cuda")


@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32],
)
def test_a_list_of_every_form(dtype: torch.dtype, mode: Mode) -> None:
    """Both modes, high and low bases, one list: as accurate as eager torch in the same dtype."""
    drawn = [draw(*case, dtype, seed) for seed, case in enumerate(CASES)]
    if mode == "core":
        drawn = [(x, U, V) for x, U, V in drawn if U is not None and V is not None]
    problems = [
        Problem(
            x.clone(),
            torch.empty_like(x),
            None if U is None else U.columns,
            None if V is None else V.columns,
            step_on_a_gpu(x, U, V, mode),
        )
        for x, U, V in drawn
    ]
    run_eagerly(problems, Emulated())
    planned = {problem.step.form for problem in problems}
    assert planned >= ({"inner"} if mode == "core" else {"dual", "mixed", "left", "right"})
    for problem, (x, U, V) in zip(problems, drawn, strict=True):
        truth = project_reference(x, U, V, mode=mode)
        allowed = 2 * relative_error(project_eager(x, U, V, mode=mode), truth, x)
        assert relative_error(problem.out, truth, x) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dual_reads_each_gradient_twice_and_writes_it_once(dtype: torch.dtype) -> None:
    x, U, V = draw(120, 100, 6, 6, "high-high", dtype, 3)
    assert U is not None
    assert V is not None
    step = step_on_a_gpu(x, U, V, "complement")
    assert step.form == "dual"
    before, kernels = x.clone(), Emulated()
    run_eagerly([Problem(x, x, U.columns, V.columns, step)], kernels)
    size, address = x.numel() * x.element_size(), x.data_ptr()
    assert kernels.read[address] == 2 * size
    assert kernels.written[address] == size
    assert kernels.launches == launches([step.form]) == 4
    assert leak(x, before, U) <= (4e-3 if dtype == torch.bfloat16 else 1e-6)


def test_the_list_operator_calls_the_kernels(emulated: Emulated) -> None:
    drawn = [draw(*case, torch.float32, seed) for seed, case in enumerate(CASES)]
    grads = [x.clone() for x, _, _ in drawn]
    Us, Vs = [U for _, U, _ in drawn], [V for _, _, V in drawn]
    planned = plan(grads, Us, Vs)
    project_many_(grads, Us, Vs)
    assert emulated.launches == planned.launches > 0
    for got, (x, U, V) in zip(grads, drawn, strict=True):
        truth = project_reference(x, U, V)
        assert relative_error(got, truth, x) <= 2 * relative_error(project_eager(x, U, V), truth, x)


@pytest.mark.usefixtures("emulated")
def test_restore_pins_the_singular_values() -> None:
    g = torch.Generator().manual_seed(9)
    reference = torch.randn(80, 60, generator=g, dtype=torch.float64)
    left, S, right = torch.linalg.svd(reference, full_matrices=False)
    U, V, S = left[:, :10].float(), right[:10].mT.float(), S[:10].float()
    W = (reference + 1e-2 * torch.randn(80, 60, generator=g, dtype=torch.float64)).float()
    restore_(W, U, V, S=S)
    for pinned, wanted in ((U.mT @ W, S[:, None] * V.mT), (W @ V, U * S)):
        assert (pinned - wanted).norm() <= 1e-5 * S.norm()
