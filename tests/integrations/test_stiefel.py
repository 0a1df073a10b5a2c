"""integrations.stiefel: tangent spaces, frozen frames, retraction, and the optimizer of them."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from osf_kernels.testing import orthonormality_ratio
from osf_torch.integrations import stiefel
from osf_torch.integrations.stiefel import StiefelAdamW, project_away, retract, tangent_project
from tests.helpers import generator_for, randn

METRICS = ("canonical", "euclidean", "horizontal")


def gaussian(*shape: int, key: object = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(*shape, dtype=dtype, generator=generator_for(shape, key))


def point(*shape: int, key: object = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(gaussian(*shape, key=("point", key))).Q.to(dtype)


def split(m: int, r: int, p: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A point (m, r) and a frame (m, p) orthogonal to it."""
    both = point(m, r + p, key=p)
    return both[:, :r].to(dtype).contiguous(), both[:, r:].to(dtype).contiguous()


def formula(G: Tensor, X: Tensor, metric: str) -> Tensor:
    if metric == "canonical":
        return G - X @ (G.mT @ X)
    A = X.mT @ G
    return G - X @ (A if metric == "horizontal" else (A + A.mT) / 2)


def svd_polar(Y: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(Y, full_matrices=False)
    return U @ Vh


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))


def deviation(X: Tensor) -> float:
    """‖XᵀX − I‖_F, the largest of a batch, in float64."""
    X = X.detach().double()
    eye = torch.eye(X.shape[-1], dtype=torch.float64)
    return float(torch.linalg.matrix_norm(X.mT @ X - eye).max())


# the tangent space

SHAPES = st.tuples(
    st.lists(st.integers(1, 3), max_size=2), st.integers(1, 24), st.integers(1, 24)
).map(lambda s: (*s[0], max(s[1:]), min(s[1:])))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, metric=st.sampled_from(METRICS), key=st.integers(0, 99))
def test_projections_are_tangent_and_what_they_say(shape, metric, key):
    X, G, other = point(*shape, key=key), gaussian(*shape, key=key), gaussian(*shape, key=(key, 1))
    before = G.clone()
    D, E = tangent_project(G, X, metric=metric), tangent_project(other, X, metric="euclidean")
    size = 1e-13 * float(G.norm() * other.norm() + 1)
    assert torch.equal(G, before)
    assert float((X.mT @ D + D.mT @ X).abs().max()) < size, "tangent"
    if metric == "canonical":  # ⟨D, E⟩ of the canonical metric is the derivative along E
        paired = inner(D, E) - inner(X.mT @ D, X.mT @ E) / 2
        assert float((paired - inner(G, E)).abs().max()) < size
        return
    assert float((tangent_project(D, X, metric=metric) - D).abs().max()) < size, "idempotent"
    twin = tangent_project(other, X, metric=metric)
    assert float((inner(D, other) - inner(G, twin)).abs().max()) < size, "self-adjoint"
    if metric == "horizontal":
        assert float((X.mT @ D).abs().max()) < size
    else:  # what was taken away is normal to every tangent direction
        assert float(inner(G - D, E).abs().max()) < size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(300, 20), (4, 96, 7), (17, 17)])
def test_tangent_project_is_as_right_as_the_formula_in_its_dtype(shape, metric, dtype):
    X, G = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype)
    truth = formula(G.double(), X.double(), metric)
    ours = tangent_project(G, X, metric=metric)
    assert ours.dtype == dtype
    error = float((ours.double() - truth).norm() / G.double().norm())
    theirs = float((formula(G, X, metric).double() - truth).norm() / G.double().norm())
    assert error <= 2 * theirs + torch.finfo(dtype).eps / 4


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 8), p=st.integers(1, 8), spare=st.integers(0, 8), key=st.integers(0, 99))
@pytest.mark.parametrize("metric", METRICS)
def test_projecting_away_commutes_with_the_tangent_projection(metric, r, p, spare, key):
    X, F = split(r + p + spare, r, p)
    G = gaussian(*X.shape, key=key)
    one = tangent_project(project_away(G, F), X, metric=metric)
    two = project_away(tangent_project(G, X, metric=metric), F)
    assert float((one - two).abs().max()) < 1e-13
    assert float((F.mT @ one).abs().max()) < 1e-13
    assert float((project_away(X, F) - X).abs().max()) < 1e-14
    assert torch.equal(project_away(G, None), G)


# retraction


@pytest.mark.parametrize("shape", [(40, 6), (3, 20, 20), (2, 2, 12, 1)])
def test_retraction_follows_the_tangent_to_second_order(shape):
    X = point(*shape)
    D = tangent_project(gaussian(*shape), X)
    for t in (1e-1, 1e-2, 1e-3):
        Y = retract(X, t * D)
        assert orthonormality_ratio(Y.reshape(-1, *shape[-2:])[0]) < 30
        away = torch.linalg.matrix_norm(Y - (X + t * D))
        assert bool(
            (away <= t * t * torch.linalg.matrix_norm(D, 2) * torch.linalg.matrix_norm(D)).all()
        )
    assert float((retract(X, torch.zeros_like(X)) - X).abs().max()) < 1e-14


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_retraction_is_the_nearest_point_beside_the_frame(size):
    X, F = split(30, 5, 9, torch.float32)
    D = project_away(tangent_project(size * gaussian(30, 5, dtype=torch.float32), X), F)
    Y = retract(X, D, frozen=F)
    X64, F64 = X.double(), F.double()
    moved = X64 + D.double()
    wanted = svd_polar(moved - F64 @ torch.linalg.lstsq(F64, moved).solution)
    eps = torch.finfo(torch.float32).eps
    assert deviation(Y) < 10 * math.sqrt(5) * eps
    assert float((Y.double() - wanted).norm()) < 20 * math.sqrt(5) * eps
    assert float((F64.mT @ Y.double()).norm()) < 20 * math.sqrt(5) * eps


# the optimizer


class Reference:
    """EBLoRA's step written down for one matrix in float64, its polar factor by an SVD."""

    def __init__(self, X: Tensor, lr: float, metric: str = "canonical", frozen=None) -> None:
        self.X, self.lr, self.metric, self.F = X.clone(), lr, metric, frozen
        self.m, self.v, self.t = torch.zeros_like(X), torch.zeros_like(X), 0

    def _onto(self, D: Tensor) -> Tensor:
        if self.F is not None:
            D = D - self.F @ (self.F.mT @ D)
        return formula(D, self.X, self.metric)

    def step(self, grad: Tensor) -> None:
        self.t += 1
        g = self._onto(grad)
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g * g
        mean, square = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        Y = self.X + self._onto(-self.lr * mean / (square.sqrt() + 1e-8))
        if self.F is not None:
            Y = Y - self.F @ (self.F.mT @ Y)
        self.X = svd_polar(Y)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("frozen", [0, 5])
@pytest.mark.parametrize("metric", METRICS)
def test_a_run_is_the_reference_step_by_step(metric, frozen, rows):
    X, F = split(24, 4, frozen)
    F = F if frozen else None
    p = torch.nn.Parameter((X.mT if rows else X).clone())
    optimizer = StiefelAdamW([p], lr=0.03, metric=metric, frozen=F, rows=rows)
    reference = Reference(X, 0.03, metric, F)
    for step in range(30):
        G = gaussian(24, 4, key=step) * 10.0 ** (step % 5 - 2)
        p.grad = (G.mT if rows else G).clone()
        optimizer.step()
        reference.step(G)
        assert torch.equal(p.grad, G.mT if rows else G), "gradients are not written"
        assert float(((p.mT if rows else p).detach() - reference.X).norm()) < 1e-9
    assert float((reference.X - X).norm()) > 0.1, "it did move"


def test_matrices_of_one_shape_take_one_polar(monkeypatch):
    shapes = []
    run = stiefel.polar

    def counted(Y):
        shapes.append(tuple(Y.shape))
        return run(Y)

    monkeypatch.setattr(stiefel, "polar", counted)
    _, F = split(20, 3, 4)
    groups = [
        {"params": [point(20, 3, key=1), point(2, 2, 20, 3, key=2)], "lr": 0.1},
        {"params": [project_away(gaussian(20, 3, key=3), F)], "frozen": F, "lr": 0.01},
        {"params": [point(20, 3, key=4).mT, point(5, 20, 3, key=5).mT], "rows": True},
        {"params": [point(9, 3, key=6)]},
        {"params": [point(20, 3, key=7)], "metric": "euclidean"},
    ]
    groups[1]["params"][0] = svd_polar(groups[1]["params"][0])
    for group in groups:
        group["params"] = [torch.nn.Parameter(p.clone()) for p in group["params"]]
    together, apart = groups, copy.deepcopy(groups)
    one = StiefelAdamW(together, lr=0.05)
    many = [StiefelAdamW([{**g, "params": [p]}], lr=0.05) for g in apart for p in g["params"]]
    for step in range(3):
        for a, b in zip(together, apart, strict=True):
            for i, (p, q) in enumerate(zip(a["params"], b["params"], strict=True)):
                p.grad = gaussian(*p.shape, key=(step, i))
                q.grad = p.grad.clone()
        shapes.clear()
        one.step()
        assert shapes == [(12, 20, 3), (1, 9, 3), (1, 20, 3)]
        for optimizer in many:
            optimizer.step()
    for a, b in zip(together, apart, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert float((p - q).detach().abs().max()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_a_thousand_steps_stay_orthonormal(metric):
    """In float32, with gradients of condition 1e8, rank deficient ones, huge ones and zeros."""
    eps = torch.finfo(torch.float32).eps
    X, F = split(40, 6, 20, torch.float32)
    full, none_left = split(12, 5, 7, torch.float32)  # r + p = m: only turns within the span
    groups = [
        {"params": [point(40, 6, dtype=torch.float32)]},
        {"params": [point(3, 40, 6, dtype=torch.float32).mT.contiguous()], "rows": True},
        {"params": [X], "frozen": F, "transport": True},
    ]
    if metric == "canonical":
        groups.append({"params": [point(16, 16, dtype=torch.float32)]})
        groups.append({"params": [full], "frozen": none_left})
    for group in groups:
        group["params"] = [torch.nn.Parameter(p) for p in group["params"]]
    optimizer = StiefelAdamW(groups, lr=0.05, metric=metric)
    started = [p.detach().clone() for group in groups for p in group["params"]]
    generator = generator_for(metric)

    def gradient(shape: torch.Size, step: int) -> Tensor:
        G = randn(*shape, dtype=torch.float32, generator=generator)
        if step % 10 == 9:
            return torch.zeros_like(G)
        if step < 250:
            return G * torch.logspace(0, -8, shape[-1])
        if step < 500:
            return 1e-3 * G[..., :1].expand(shape).contiguous()
        return G if step < 750 else 1e12 * G

    worst = 0.0
    for step in range(1000):
        for group in groups:
            for p in group["params"]:
                p.grad = gradient(p.shape, step)
        optimizer.step()
        if step % 20 and step < 980:
            continue
        for group in groups:
            for p in group["params"]:
                Y = p.detach().mT if group.get("rows") else p.detach()
                worst = max(worst, deviation(Y) / (math.sqrt(Y.shape[-1]) * eps))
            if group["frozen"] is not None:
                Y, frame = group["params"][0].detach().double(), group["frozen"].double()
                assert float((frame.mT @ Y).norm()) < 10 * math.sqrt(Y.shape[-1]) * eps
    assert worst < 10
    ended = [p.detach() for group in groups for p in group["params"]]
    assert all(float((a - b).norm()) > 0.1 for a, b in zip(started, ended, strict=True))


@pytest.mark.parametrize("transport", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_finds_the_leading_eigenvectors(metric, transport):
    """max tr(XᵀAX) over orthonormal X: the span of the r leading eigenvectors of A."""
    m, r = 24, 3
    vectors = point(m, m)
    values = torch.cat([torch.tensor([4.0, 3.5, 3.0]), torch.linspace(1.5, 0.1, m - r)]).double()
    A = ((vectors * values) @ vectors.mT).float()
    p = torch.nn.Parameter(point(m, r, key="start", dtype=torch.float32))
    optimizer = StiefelAdamW([p], lr=0.1, metric=metric, transport=transport)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.96)
    for _ in range(300):
        optimizer.zero_grad()
        (-(p.mT @ A @ p).trace()).backward()
        optimizer.step()
        schedule.step()
    overlap = float((vectors[:, :r].mT @ p.detach().double()).square().sum()) / r
    assert overlap > 1 - 1e-6
    assert float((p.mT @ A @ p).trace().detach()) == pytest.approx(10.5, rel=1e-6)


def test_a_frozen_frame_holds_what_came_before():
    """With the leading eigenvectors frozen the next ones are found."""
    m, r = 20, 2
    vectors = point(m, m)
    values = torch.tensor([9.0, 8.0, 5.0, 4.0, *torch.linspace(1, 0.1, m - 4).tolist()]).double()
    A = ((vectors * values) @ vectors.mT).float()
    F = vectors[:, :r].float()
    start = retract(point(m, r, key="start", dtype=torch.float32), torch.zeros(m, r), frozen=F)
    p = torch.nn.Parameter(start)
    optimizer = StiefelAdamW([p], lr=0.1, frozen=F)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.96)
    for _ in range(300):
        optimizer.zero_grad()
        (-(p.mT @ A @ p).trace()).backward()
        optimizer.step()
        schedule.step()
    overlap = float((vectors[:, r : 2 * r].mT @ p.detach().double()).square().sum()) / r
    assert overlap > 1 - 1e-6


def test_transport_keeps_the_first_moment_tangent():
    for metric in METRICS:
        p = torch.nn.Parameter(point(15, 4))
        optimizer = StiefelAdamW([p], lr=0.2, metric=metric, transport=True)
        for step in range(3):
            p.grad = gaussian(15, 4, key=step)
            optimizer.step()
        mean, X = optimizer.state[p]["exp_avg"], p.detach()
        assert float(mean.norm()) > 0.1
        assert float((X.mT @ mean + mean.mT @ X).abs().max()) < 1e-14


# as an optimizer is used


def run(optimizer, p, steps):
    for step in steps:
        p.grad = gaussian(*p.shape, key=step, dtype=p.dtype)
        optimizer.step()


@pytest.mark.parametrize("through_file", [False, True])
def test_a_state_dict_resumes_to_the_bit(through_file):
    X, F = split(18, 3, 4, torch.float32)
    p = torch.nn.Parameter(X.clone())
    optimizer = StiefelAdamW([{"params": [p], "frozen": F}], lr=0.05, metric="euclidean")
    run(optimizer, p, range(3))
    state = optimizer.state_dict()
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    else:
        state = copy.deepcopy(state)
    q = torch.nn.Parameter(p.detach().clone())
    resumed = StiefelAdamW([q], lr=0.9)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.param_groups[0]["frozen"], F)
    run(optimizer, p, range(3, 6))
    run(resumed, q, range(3, 6))
    assert torch.equal(p, q)


def test_a_state_that_is_not_one_loads_nothing():
    X, F = split(18, 3, 4, torch.float32)
    p = torch.nn.Parameter(X.clone())
    optimizer = StiefelAdamW([{"params": [p], "frozen": F}], lr=0.05)
    run(optimizer, p, range(2))
    for changes, text in (
        ({"frozen": 2 * F}, "expected frozen to be orthonormal"),
        ({"frozen": F[:9]}, r"\(\.\.\., m, p\) with m=18 .*, got \(9, 4\)"),
        ({"metric": "flat"}, "expected metric to be one of"),
        ({"lr": -1.0}, "expected lr to be at least 0"),
    ):
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0] |= changes
        state["state"][0]["exp_avg"] += 1
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=r"integrations\.stiefel\.StiefelAdamW: .*" + text):
            optimizer.load_state_dict(state)
        after = optimizer.state_dict()
        assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
        assert torch.equal(after["param_groups"][0]["frozen"], F)
        assert after["param_groups"][0]["lr"] == 0.05
    adam = torch.optim.Adam([torch.nn.Parameter(X.clone())])
    with pytest.raises(ValueError, match="a group without frozen, metric, rows, transport"):
        optimizer.load_state_dict(adam.state_dict())
    run(copy.deepcopy(optimizer), p, range(2, 3))  # a copy is one


def test_a_closure_is_called_with_gradients_on():
    p = torch.nn.Parameter(point(6, 2))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p[0].square().sum()
        loss.backward()
        return loss

    optimizer = StiefelAdamW([p], lr=0.1)
    first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert last < first
    assert p.requires_grad


def test_what_has_no_gradient_stands_still():
    moved, still = (torch.nn.Parameter(point(6, 2, key=i)) for i in range(2))
    before = still.detach().clone()
    optimizer = StiefelAdamW([moved, still], lr=0.1)
    run(optimizer, moved, range(2))
    assert torch.equal(still, before)
    assert still not in optimizer.state
    StiefelAdamW([still]).step()
    assert torch.equal(still, before)


def test_a_nan_moves_nothing():
    fine, broken = (torch.nn.Parameter(point(6, 2, key=i)) for i in range(2))
    optimizer = StiefelAdamW([("fine", fine), ("broken", broken)], lr=0.1)
    before = [p.detach().clone() for p in (fine, broken)]
    fine.grad, broken.grad = gaussian(6, 2), torch.full((6, 2), math.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got NaN or Inf in that of parameter 'broken'"):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(p, b) for p, b in zip((fine, broken), before, strict=True))


def test_a_sparse_gradient_is_refused():
    p = torch.nn.Parameter(point(6, 2))
    p.grad = torch.ones(6, 2, dtype=torch.float64).to_sparse()
    with pytest.raises(
        ValueError, match="expected dense gradients, got a sparse one of parameter 0"
    ):
        StiefelAdamW([p]).step()


def test_refusals_add_nothing():
    X, F = split(10, 3, 4)
    optimizer = StiefelAdamW([torch.nn.Parameter(point(10, 3))])
    short = {"params": [torch.nn.Parameter(X.mT.clone())]}
    for group, kind, text in (
        ({"lr": -1.0}, ValueError, "expected lr to be at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"expected betas to be in \[0, 1\)"),
        ({"eps": -1e-8}, ValueError, "expected eps to be at least 0"),
        ({"metric": "flat"}, ValueError, "expected metric to be one of canonical, .*, got flat"),
        ({"weight_decay": 0.01}, ValueError, "weight_decay to be 0, got 0.01; decay is normal"),
        (short, ValueError, r"got \(3, 10\); pass rows=True if it holds rows"),
        ({"rows": True}, ValueError, r"to be \(\.\.\., r, m\) with m ≥ r, got \(10, 3\)"),
        ({"params": [torch.nn.Parameter(X.bfloat16())]}, TypeError, "to be float32 or float64"),
        ({"params": [torch.nn.Parameter(1.01 * X)]}, ValueError, r"parameter 0 .* orthonormal"),
        ({"params": [torch.nn.Parameter(X * math.nan)]}, ValueError, "to be orthonormal"),
        ({"frozen": 2 * F}, ValueError, "expected frozen to be orthonormal"),
        ({"frozen": F[:9]}, ValueError, r"\(\.\.\., m, p\) with m=10 .*, got \(9, 4\)"),
        ({"frozen": X[:, :1]}, ValueError, r"orthogonal to frozen, got .*; start from retract"),
    ):
        with pytest.raises(
            kind,
            match=r"integrations\.stiefel\.StiefelAdamW: .*" + text,
        ):
            optimizer.add_param_group({"params": [torch.nn.Parameter(X.clone())], **group})
        assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"stiefel\.tangent_project: expected G to be \(10, 3\)"):
        tangent_project(X[:9], X)
    with pytest.raises(ValueError, match=r"stiefel\.retract: expected step to be \(10, 3\)"):
        retract(X, X[:, :2])
    with pytest.raises(ValueError, match="expected metric to be one of"):
        tangent_project(X, X, metric="flat")
