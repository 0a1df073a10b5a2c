"""Refusals: a clear error in one style, before anything is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from osf_kernels import (
    BackendUnavailableError,
    Basis,
    apply_,
    coefficients,
    plan,
    project,
    project_,
    project_many_,
    restore_,
    restore_many_,
    use_backend,
)

M, N, R, K = 12, 9, 3, 2


def good():
    U = torch.linalg.qr(torch.randn(M, R))[0]
    V = torch.linalg.qr(torch.randn(N, K))[0]
    return torch.randn(M, N), U, V


CASES = {
    "rows for U": (
        lambda g, U, V: (g, U.mT, V),
        ValueError,
        "expected U to be (..., m, r) with m=12, got (3, 12); pass U.mT",
    ),
    "rows for V": (
        lambda g, U, V: (g, U, V.mT),
        ValueError,
        "expected V to be (..., n, k) with n=9, got (2, 9); pass V.mT",
    ),
    "another size": (
        lambda g, U, V: (g, U[:-1], V),
        ValueError,
        "expected U to be (..., m, r) with m=12, got (11, 3)",
    ),
    "too wide": (
        lambda g, U, V: (g, torch.randn(M, M + 1), V),
        ValueError,
        "expected U to be no wider than its side",
    ),
    "a vector": (lambda g, U, V: (g, U[:, 0], V), ValueError, "expected U to be (..., m, r)"),
    "g a vector": (lambda g, U, V: (g[0], U, V), ValueError, "expected g to be (..., m, n)"),
    "complex": (
        lambda g, U, V: (g.to(torch.complex64), U, V),
        TypeError,
        "expected g to be float32",
    ),
    "integer": (lambda g, U, V: (g.long(), U, V), TypeError, "expected g to be float32"),
    "integer basis": (lambda g, U, V: (g, U.int(), V), TypeError, "expected U to be float32"),
    "float64 mixed": (
        lambda g, U, V: (g, U.double(), V),
        TypeError,
        "expected U to be float64 together",
    ),
    "device": (lambda g, U, V: (g, U.to("meta"), V), ValueError, "expected U to be on cpu"),
    "batch": (
        lambda g, U, V: (g, U.expand(4, M, R), V),
        ValueError,
        "expected U to be broadcastable to batch dimensions (), got (4, 12, 3)",
    ),
    "no tensor": (
        lambda g, U, V: (g, [1, 2], V),
        TypeError,
        "expected U to be a tensor, a Basis or None, got list",
    ),
    "g no tensor": (
        lambda g, U, V: ([[1.0]], U, V),
        TypeError,
        "expected g to be a tensor, got list",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_arguments_of_one_matrix(case):
    make, kind, text = CASES[case]
    g, U, V = make(*good())
    before = g.clone() if isinstance(g, torch.Tensor) else g
    # To plan, a list is a list of matrices, as it is to project_many_.
    for op in (project, project_) if isinstance(g, list) else (project, project_, plan):
        with pytest.raises(kind, match=re.escape(text)) as caught:
            op(g, U, V)
        assert str(caught.value).startswith(f"osf_kernels.{op.__name__}: ")
    if case != "too wide":  # a shard of a basis may be
        with pytest.raises(kind, match=r"osf_kernels\.coefficients: expected"):
            coefficients(g, U, V)
    if isinstance(g, torch.Tensor):
        assert torch.equal(g, before)


def test_mode_and_spans():
    g, U, V = good()
    with pytest.raises(
        ValueError, match='expected mode to be "complement" or "core", got \'both\''
    ):
        project(g, U, V, mode="both")
    with pytest.raises(ValueError, match='expected spans to be "high" or "low", got \'mid\''):
        Basis(U, "mid")


def test_a_basis_holds_a_tensor():
    with pytest.raises(TypeError, match=r"Basis: expected columns to be a tensor, got list"):
        Basis([[1.0]], "low")


def test_a_list_is_refused_whole():
    g, U, V = good()
    h, first, second = g.clone(), g.clone(), g.clone()
    with pytest.raises(
        ValueError, match=r"osf_kernels\.project_many_: expected Us\[1\] to be .*pass Us\[1\]\.mT"
    ):
        project_many_([first, second], [U, U.mT], [V, V])
    assert torch.equal(first, h)
    with pytest.raises(ValueError, match=r"expected grads\[1\] to be a tensor whose elements have"):
        project_many_([first, g[:1].expand(M, N)], [U, U], [V, V])
    with pytest.raises(ValueError, match=r"expected Ws\[1\] to be \(\.\.\., m, n\)"):
        restore_many_([first, g[0]], [U, U], [V, V], protected=[h, h])
    assert torch.equal(first, h)


def test_unequal_lists():
    g, U, V = good()
    with pytest.raises(
        ValueError, match=r"expected Vs to be as long as grads \(2\), got 1 entries"
    ):
        project_many_([g, g.clone()], [U, U], [V])
    with pytest.raises(TypeError, match="expected Us to be a list or a tuple, got Tensor"):
        project_many_([g], U, [V])
    with pytest.raises(ValueError, match=r"expected S to be as long as Ws \(1\)"):
        restore_many_([g], [U], [V], S=[])


def test_a_list_that_shares_memory():
    g, U, V = good()
    with pytest.raises(ValueError, match=r"expected grads\[1\] to be apart from grads\[0\].*tied"):
        project_many_([g, g], [U, U], [V, V])
    buffer = torch.randn(4 * M * N)
    views = [buffer[i * M * N : (i + 1) * M * N].view(M, N) for i in range(4)]
    project_many_(views, [U] * 4, [V] * 4)  # one buffer, apart: fine
    late = buffer[M * N + N : 2 * M * N + N].view(M, N)
    before = buffer.clone()
    with pytest.raises(ValueError, match=r"expected grads\[2\] to be apart from grads\[1\]"):
        project_many_([views[0], views[1], late], [U] * 3, [V] * 3)
    basis = views[3][:, :R]
    with pytest.raises(ValueError, match=r"expected grads\[1\] to be apart from Us\[0\]"):
        project_many_([g, views[3]], [basis, U], [V, V])
    assert torch.equal(buffer, before)
    fused = torch.randn(M, 2 * N)
    project_many_([fused[:, :N], fused[:, N:]], [U, U], [V, V])  # column blocks: fine


def test_overlapping_memory():
    block = torch.randn(M, 2 * N)
    g, beside = block[:, :N], block[:, N:]
    U = torch.linalg.qr(torch.randn(M, R))[0]
    project(g, U, None, out=beside)  # other columns of the same storage: fine
    for out in (g, block[:, 1 : N + 1]):
        with pytest.raises(ValueError, match=r"expected out to be apart from g, got overlapping"):
            project(g, U, None, out=out)
    square = torch.linalg.qr(torch.randn(M, M))[0]
    with pytest.raises(ValueError, match="expected g to be apart from U"):
        project_(square, square[:, :3], None)
    out = torch.empty(M, N + 1)
    with pytest.raises(ValueError, match=r"expected out to be \(12, 9\) torch.float32"):
        project(g, U, None, out=out)
    with pytest.raises(ValueError, match="expected out to be a tensor whose elements have"):
        project(g, U, None, out=torch.empty(1, N).expand(M, N))


def test_leaves_that_require_grad():
    g, U, V = good()
    leaf = g.clone().requires_grad_()
    with pytest.raises(ValueError, match="expected g to be a tensor that may be written in place"):
        project_(leaf, U, V)
    with pytest.raises(ValueError, match=r"expected grads\[1\] to be a tensor that may be written"):
        project_many_([g, leaf], [U, U], [V, V])
    with pytest.raises(ValueError, match="expected W to be a tensor that may be written in place"):
        restore_(leaf, U, V, protected=g)
    with pytest.raises(ValueError, match="expected out to be used without autograd"):
        project(leaf, U, V, out=torch.empty_like(g))
    assert torch.equal(leaf, g)
    with torch.no_grad():
        project_(leaf, U, V)
    assert torch.equal(leaf, project(g, U, V))


def test_restore_refusals():
    g, U, _ = good()
    V = torch.linalg.qr(torch.randn(N, R))[0]
    S = torch.ones(R)
    low = Basis(torch.linalg.qr(U, mode="complete")[0][:, R:], "low")
    for arguments, text in (
        ({}, "expected exactly one of S and protected to be given, got neither"),
        ({"S": S, "protected": g}, "got both"),
        ({"S": S[:-1]}, "expected S to be (..., r) with r=3, got (2,)"),
        ({"S": S, "U": low}, "expected U to be a high basis beside S, got a low basis"),
        ({"S": S, "V": None}, "expected V to be a high basis beside S, got no basis"),
        ({"S": S, "V": V[:, :2]}, "expected V to be as wide as U (r=3) beside S, got k=2"),
        ({"protected": g[:-1]}, "expected protected to be (12, 9) like the weight"),
    ):
        bases = {"U": U, "V": V} | {k: v for k, v in arguments.items() if k in "UV"}
        pinned = {k: v for k, v in arguments.items() if k not in "UV"}
        before = g.clone()
        with pytest.raises(ValueError, match=re.escape(text)):
            restore_(g, bases["U"], bases["V"], **pinned)
        assert torch.equal(g, before)
    with pytest.raises(TypeError, match="expected S to be a floating dtype"):
        restore_(g, U, V, S=S.long())


def test_apply_refusals():
    g, U, V = good()
    A, B = coefficients(g, U, V)
    before = g.clone()
    for arguments, kind, text in (
        ((A.mT, B), ValueError, "expected A to be (3, 9), got (9, 3); take both from"),
        ((A, B[:-1]), ValueError, "expected B to be (12, 2)"),
        ((A.double(), B), TypeError, "expected A to be torch.float32"),
    ):
        with pytest.raises(kind, match=re.escape(text)):
            apply_(g, U, V, *arguments)
    assert torch.equal(g, before)


def test_a_backend_by_name_works_or_raises():
    g, U, V = good()
    with pytest.raises(ValueError, match="expected name to be one of"), use_backend("cublas"):
        pass
    with use_backend("torch"):
        project(g, U, V)
    if not torch.cuda.is_available():
        for name in ("triton", "cuda"):
            expected = pytest.raises(BackendUnavailableError, match=f'"{name}" was asked for')
            with expected, use_backend(name):
                project(g, U, V)


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        pytest.param("torch", "ran", marks=pytest.mark.slow),
        pytest.param("auto", "ran", marks=pytest.mark.slow),
        ("triton", 'BackendUnavailableError: osf_kernels: backend "triton" was asked for'),
        ("fast", "ValueError: "),
    ],
)
def test_a_backend_named_by_the_environment(root, value, outcome):
    """In a process of its own: the variable is read once."""
    program = (
        "import torch, osf_kernels\n"
        "try:\n"
        "    osf_kernels.project(torch.ones(3, 2), torch.eye(3)[:, :1])\n"
        "    print('ran')\n"
        "except Exception as error:\n"
        "    print(f'{type(error).__name__}: {error}')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OSF_BACKEND": value, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.startswith(outcome)
    if value == "fast":
        assert "OSF_BACKEND" in done.stdout
