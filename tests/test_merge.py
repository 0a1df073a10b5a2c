"""merge_basis against dense sums in float64, and over a long stream of samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import osf_kernels
from osf_kernels import Basis, MergedBasis, extend_basis, merge_basis
from osf_kernels.testing import hard_matrices, orthonormality_ratio, random_basis
from tests.helpers import generator_for, randn

REALS = [torch.float32, torch.float64]


def drawn(m: int, s: int, *key: object, dtype: torch.dtype = torch.float64) -> Tensor:
    """Samples (m, s) with a spectrum that falls, each draw along other directions."""
    generator = generator_for("merge", m, s, *key)
    Q = torch.linalg.qr(randn(m, m, dtype=torch.float64, generator=generator))[0]
    decay = 0.7 ** torch.arange(m, dtype=torch.float64)
    return (Q * decay @ randn(m, s, dtype=torch.float64, generator=generator)).to(dtype)


def spread(X: Tensor) -> Tensor:
    """XXᵀ/‖X‖²_F in float64; zero of samples of zeros."""
    X = X.double() / X.double().abs().max().clamp_min(1e-300)
    return X @ X.mT / X.square().sum().clamp_min(1e-300)


def share(V: Tensor, X: Tensor) -> float:
    V = torch.linalg.qr(V.double())[0]
    return float((V.mT @ X.double()).square().sum() / X.double().square().sum())


def dense(found: MergedBasis) -> Tensor:
    V = found.columns.double()
    return V * found.energies.unsqueeze(-2) @ V.mT


class Reference:
    """Σ over tasks of XXᵀ/‖X‖² as an n × n matrix, restricted at each task to what is held."""

    def __init__(self, m: int) -> None:
        self.M = torch.zeros(m, m, dtype=torch.float64)
        self.V = self.M[:, :0]

    def take(self, X: Tensor, energy: float, most: int) -> float:
        """Extends, merges and releases; what it released."""
        m = len(self.M)
        X = X.double()
        residual = X - self.V @ (self.V.mT @ X)
        U, S, _ = torch.linalg.svd(residual, full_matrices=False)
        total, held = X.square().sum(), (self.V.mT @ X).square().sum()
        k = 0
        while held < energy * total and k < m - self.V.shape[1]:
            held = held + S[k] ** 2
            k += 1
        Q = torch.linalg.qr(torch.cat([self.V, U[:, :k]], 1))[0]
        whole = Q @ (Q.mT @ (self.M + spread(X)) @ Q) @ Q.mT
        squares, R = torch.linalg.eigh(whole)
        count = min(Q.shape[1], most)
        self.V = R.flip(1)[:, :count]
        self.M = self.V * squares.flip(0)[:count] @ self.V.mT
        return float(1 - self.M.trace() / whole.trace())


# --- what it is ---


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("most", [24, 13, 6])
def test_it_is_the_sum_of_all_tasks_restricted_to_what_is_held(
    dtype: torch.dtype, most: int
) -> None:
    reference = Reference(24)
    nothing = torch.zeros(24, 0, dtype=dtype)
    held = MergedBasis(nothing, torch.zeros(0), torch.eye(24, dtype=dtype), torch.zeros(()))
    released = 0.0
    for task in range(8):
        X = drawn(24, 15, task, dtype=dtype)
        held = merge_basis(held.columns, held.energies, X, energy=0.9, max_rank=most)
        wanted = reference.take(X, 0.9, most)
        tolerance = 2e-5 if dtype == torch.float32 else 1e-10
        assert held.columns.shape == reference.V.shape
        assert float((dense(held) - reference.M).norm()) <= tolerance * (task + 1)
        assert float(held.released) == pytest.approx(wanted, abs=tolerance)
        assert held.energies.dtype == torch.float64
        assert torch.equal(held.energies, held.energies.sort(descending=True).values)
        released += float(held.released)
    assert (released > 0.05) == (most < 24)


def test_without_a_bound_it_is_the_whole_sum_at_full_energy() -> None:
    """Then nothing lies outside what is held: the energies are eigenvalues of the whole sum."""
    samples = [drawn(20, 6, task) * 10.0**task for task in range(3)]
    held = merge_basis(None, None, samples[0], energy=1.0)
    for X in samples[1:]:
        held = merge_basis(held.columns, held.energies, X, energy=1.0)
    whole = sum(map(spread, samples))
    assert held.columns.shape == (20, 18)
    assert float((dense(held) - whole).norm()) <= 1e-12
    assert float(held.energies.sum()) == pytest.approx(3, rel=1e-12)
    assert float(held.released) == 0


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 20),
    r=st.integers(0, 20),
    s=st.integers(1, 30),
    energy=st.floats(0.05, 1.0),
    most=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_it_spans_what_extend_basis_does_as_far_as_it_may(
    m: int, r: int, s: int, energy: float, most: int, seed: int
) -> None:
    r = min(r, m)
    B = random_basis(m, r, dtype=torch.float64, generator=generator_for("B", seed)).columns
    e = torch.rand(r, dtype=torch.float64, generator=generator_for("e", seed))
    X = drawn(m, s, seed)
    extended = extend_basis(B, X, energy=energy)
    found = merge_basis(B, e, X, energy=energy)
    assert found.columns.shape == extended.shape
    gap = extended @ extended.mT - found.columns @ found.columns.mT
    assert float(gap.norm()) <= 1e-10
    assert float(found.released) == 0
    bounded = merge_basis(B, e, X, energy=energy, max_rank=most)
    assert bounded.columns.shape == (m, min(most, extended.shape[1]))
    assert bounded.free.shape == (m, m - min(most, extended.shape[1]))
    both = bounded.columns @ bounded.columns.mT + bounded.free @ bounded.free.mT
    assert float((both - torch.eye(m, dtype=both.dtype)).norm()) <= 1e-12 * m
    assert torch.equal(bounded.energies, found.energies[:most])
    off = (bounded.columns.mT @ found.columns).abs() - torch.eye(m, dtype=X.dtype)[
        : min(most, extended.shape[1]), : extended.shape[1]
    ]
    assert not off.numel() or float(off.abs().max()) <= 1e-10, "the leading ones, up to signs"
    lost, total = float(found.energies[most:].sum()), float(found.energies.sum())
    assert float(bounded.released) == pytest.approx(lost / total if total else 0, abs=1e-12)


def test_the_size_of_samples_does_not_matter() -> None:
    B = random_basis(16, 4, dtype=torch.float32, generator=generator_for("size")).columns
    X = drawn(16, 9, dtype=torch.float32)
    e = torch.rand(4, generator=generator_for("energies"))
    one, other = (merge_basis(B, e, X * 2.0**power, energy=0.9) for power in (0, 90))
    assert torch.equal(one.columns, other.columns)
    assert torch.equal(one.energies, other.energies)


def test_what_counts_least_over_all_tasks_is_released() -> None:
    """A direction that two tasks read stays, one that the last task alone read goes."""
    axes = torch.eye(8, dtype=torch.float64)
    held = merge_basis(None, None, axes[:, :2] * torch.tensor([3.0, 1.0]), energy=1.0)
    held = merge_basis(held.columns, held.energies, axes[:, :1], energy=1.0)
    last = axes[:, 2:4] * torch.tensor([2.0, 0.2], dtype=torch.float64)
    held = merge_basis(held.columns, held.energies, last, energy=1.0, max_rank=3)
    # Energies 0.9 + 1, 0.1, 4/4.04 and 0.04/4.04.
    assert torch.allclose(held.columns, axes[:, [0, 2, 1]])
    small = 0.04 / 4.04
    assert held.energies.tolist() == pytest.approx([1.9, 1 - small, 0.1])
    assert float(held.released) == pytest.approx(small / 3)


def test_unknown_energies_count_as_one_task_that_had_them_alike() -> None:
    axes = torch.eye(12, dtype=torch.float64)
    found = merge_basis(axes[:, :4], None, axes[:, 4:6] * torch.tensor([3.0, 1.0]), energy=1.0)
    assert found.energies.tolist() == pytest.approx([0.9, 0.25, 0.25, 0.25, 0.25, 0.1])
    given = merge_basis(axes[:, :4], torch.full((4,), 0.25), axes[:, 4:6], energy=1.0)
    assert torch.equal(
        merge_basis(axes[:, :4], None, axes[:, 4:6], energy=1.0).energies, given.energies
    )


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_a_low_basis_is_its_complement(dtype: torch.dtype) -> None:
    Q = torch.linalg.qr(randn(18, 18, dtype=torch.float64, generator=generator_for("low")))[0]
    X = drawn(18, 10, dtype=dtype)
    high = merge_basis(Basis(Q[:, :7].to(dtype)), None, X, energy=0.9, max_rank=9)
    low = merge_basis(Basis(Q[:, 7:].to(dtype), "low"), None, X, energy=0.9, max_rank=9)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert high.columns.shape == low.columns.shape
    assert float((dense(high) - dense(low)).norm()) <= tolerance
    assert float(low.released) == pytest.approx(float(high.released), abs=tolerance)


# --- over a long stream ---


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("most", [40, 33])
def test_a_hundred_tasks(dtype: torch.dtype, most: int) -> None:
    columns, energies = None, None
    tasks = [drawn(40, 12, "stream", task, dtype=dtype) for task in range(100)]
    full, seen = 0, []
    for X in tasks:
        columns, energies, free, released = merge_basis(
            columns, energies, X, energy=0.95, max_rank=most
        )
        assert columns.shape[-1] <= most
        assert orthonormality_ratio(columns) < 3
        assert orthonormality_ratio(torch.cat([columns, free], -1)) < 3
        full += columns.shape[-1] == most
        seen.append(X)
        if not released and most == 40:
            assert all(share(columns, x) >= 0.95 - 1e-6 for x in seen)
    assert full > 50
    if most == 40:
        assert float(energies.sum()) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_all_tasks_keep_their_energy_while_nothing_is_released(dtype: torch.dtype) -> None:
    """Each of a hundred tasks along three directions of its own, in room for all."""
    generator = generator_for("own", dtype)
    Q = torch.linalg.qr(randn(320, 320, dtype=torch.float64, generator=generator))[0]
    columns, energies, tasks = None, None, []
    for task in range(100):
        own = Q[:, 3 * task : 3 * task + 3] * torch.tensor([1.0, 0.5, 0.1])
        X = (own @ randn(3, 9, dtype=torch.float64, generator=generator)).to(dtype)
        columns, energies, _, released = merge_basis(columns, energies, X, energy=0.9, max_rank=310)
        tasks.append(X)
        assert released == 0
    assert columns is not None
    assert orthonormality_ratio(columns) < 3
    assert all(share(columns, X) >= 0.9 - 1e-6 for X in tasks)


# --- hard samples, batches ---


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("size", [(48, 20), (12, 30), (1, 1)])
def test_hard_samples(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Ill-conditioned, of low rank, of zeros, of sizes at the ends of the range."""
    m, s = size
    B = random_basis(m, m // 4, dtype=dtype, generator=generator_for(size, dtype)).columns
    e = torch.rand(m // 4, dtype=torch.float64, generator=generator_for("e", size))
    for name, X in hard_matrices(m, s, dtype=dtype, generator=generator_for(size)):
        extended = extend_basis(B, X, energy=0.95)
        found = merge_basis(B, e, X, energy=0.95)
        assert orthonormality_ratio(torch.cat([found.columns, found.free], -1)) < 3, name
        assert found.columns.shape == extended.shape, name
        V = extended.double()
        wanted = V @ (V.mT @ (B.double() * e @ B.double().mT + spread(X)) @ V) @ V.mT
        assert float((dense(found) - wanted).norm()) <= 1e-5, name
        bounded = merge_basis(B, e, X, energy=0.95, max_rank=m // 2)
        assert bounded.columns.shape[-1] == min(m // 2, extended.shape[-1]), name
        assert orthonormality_ratio(torch.cat([bounded.columns, bounded.free], -1)) < 3, name
        assert 0 <= float(bounded.released) <= 1, name


def test_samples_of_zeros_add_nothing() -> None:
    B = random_basis(9, 3, dtype=torch.float64, generator=generator_for("zeros")).columns
    e = torch.tensor([0.5, 2.0, 1.0])
    found = merge_basis(B, e, torch.zeros(9, 4, dtype=torch.float64), energy=0.9)
    assert torch.allclose(dense(found), B * e @ B.mT, atol=1e-14)
    found = merge_basis(None, None, torch.zeros(9, 4), energy=0.9)
    assert found.columns.shape == (9, 0)
    assert float(found.released) == 0


@pytest.mark.parametrize("shape", [(5, 0, 0), (0, 0, 3), (5, 5, 3), (5, 2, 0), (1, 0, 1)])
def test_edges(shape: tuple[int, int, int]) -> None:
    m, r, s = shape
    B, X = torch.eye(m)[:, :r], torch.ones(m, s)
    found = merge_basis(B, torch.ones(r), X, energy=1.0)
    assert found.columns.shape == (m, r + (1 if shape == (1, 0, 1) else 0))
    assert found.released.shape == ()
    none = merge_basis(B.expand(0, m, r), None, X.expand(0, m, s), energy=0.5)
    assert (none.columns.shape, none.released.shape) == ((0, m, r), (0,))


def test_a_batch_is_its_matrices_beside_what_fills_them_up() -> None:
    pairs = [
        (random_basis(20, 3, generator=generator_for("batch", i)).columns, drawn(20, 9, "batch", i))
        for i in range(3)
    ]
    B = torch.stack([B for B, _ in pairs]).float()
    X = torch.stack([X for _, X in pairs]).float()
    X[1] = B[1] @ torch.ones(3, 9)  # nothing new in it
    X[2] = 0
    e = torch.rand(3, 3, dtype=torch.float64, generator=generator_for("batch e"))
    found = merge_basis(B, e, X, energy=0.9)
    alone = [merge_basis(*one, energy=0.9) for one in zip(B, e, X, strict=True)]
    width = max(one.columns.shape[-1] for one in alone)
    assert found.columns.shape == (3, 20, width)
    assert width > 3
    for i, one in enumerate(alone):
        matrix = MergedBasis(*(part[i] for part in found))
        assert orthonormality_ratio(matrix.columns) < 3
        # What fills a matrix up is of its own residual while there is some.
        V = torch.linalg.qr(one.columns.double())[0]
        inside = V @ (V.mT @ dense(matrix) @ V) @ V.mT
        assert float((inside - dense(one)).norm()) <= 1e-5
    bounded = merge_basis(B, e, X, energy=0.9, max_rank=3)
    assert bounded.columns.shape == (3, 20, 3)
    assert float(bounded.released[0]) > 0
    assert bounded.released[1:].tolist() == pytest.approx([0, 0], abs=1e-12)
    V = bounded.columns[2].double()
    assert float((V @ V.mT - B[2].double() @ B[2].double().mT).norm()) <= 1e-5


# --- what is refused ---


def test_nothing_given_is_written() -> None:
    B, X = torch.eye(6, 2), drawn(6, 4, dtype=torch.float32)
    e = torch.tensor([1.0, 0.5])
    before = [t.clone() for t in (B, e, X)]
    merge_basis(B, e, X, energy=0.9, max_rank=1)
    assert all(map(torch.equal, (B, e, X), before))
    with pytest.raises(ValueError, match=r"energies to be a tensor without gradient.*detach"):
        merge_basis(B, e.clone().requires_grad_(), X, energy=0.9)


@pytest.mark.parametrize("where", ["basis", "samples", "energies"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(where: str, value: float) -> None:
    given = {"basis": torch.eye(6, 2), "samples": torch.ones(6, 4), "energies": torch.ones(2)}
    given[where] = given[where].clone()
    given[where].view(-1)[1] = value
    with pytest.raises(ValueError, match=rf"merge_basis: expected {where} to be finite.*1 of"):
        merge_basis(given["basis"], given["energies"], given["samples"], energy=0.9)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"energy": 0.0}, ValueError, r"energy to be in \(0, 1\], got 0"),
        ({"max_rank": -1}, ValueError, "max_rank to be at least 0, got -1"),
        ({"max_rank": 2.0}, TypeError, "max_rank to be an int or None, got 2.0"),
        ({"max_rank": True}, TypeError, "max_rank to be an int or None, got True"),
        ({"energies": torch.ones(3)}, ValueError, r"energies to be \(2,\).*got \(3,\)"),
        (
            {"energies": torch.tensor([1.0, -1.0])},
            ValueError,
            "energies to be .* got 1 of 2 entries neg",
        ),
        ({"energies": torch.ones(2).int()}, TypeError, "energies to be float32"),
        ({"energies": [1.0, 1.0]}, TypeError, "energies to be a tensor, got list"),
        ({"energies": torch.ones(2, device="meta")}, ValueError, "energies to be on cpu"),
        ({"basis": torch.eye(5, 2)}, ValueError, r"basis to be \(4,\).*\(5, 2\)"),
        ({"basis": torch.eye(4, 2).double()}, TypeError, "basis to be float64 together"),
        ({"basis": [torch.eye(4, 2)]}, TypeError, "basis to be a tensor, a Basis or None"),
        ({"samples": None}, TypeError, "samples to be a tensor, got NoneType"),
        ({"samples": torch.ones(4)}, ValueError, r"samples to be \(..., m, s\)"),
    ],
)
def test_refusals(changes: dict[str, object], error: type[Exception], match: str) -> None:
    given = {"basis": torch.eye(4, 2), "energies": torch.ones(2), "samples": torch.ones(4, 3)}
    given |= {"energy": 0.9} | changes
    with pytest.raises(error, match=rf"osf_kernels\.merge_basis: expected {match}"):
        osf_kernels.merge_basis(**given)  # type: ignore[arg-type]
