"""max_workspace_bytes: what truncated_svd allocates beside its results, and takes in parts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bench.timing import peak_extra_bytes
from osf_kernels import TruncatedSVD, cpu, truncated_svd
from tests.helpers import generator_for
from tests.triplets import draw, overlap

MIB = 1 << 20


def matrices(count: int, m: int, n: int, steep: bool = False) -> list[Tensor]:
    """Random ones whose columns fall off."""
    generator = generator_for(count, m, n, steep)
    i = torch.arange(1, n + 1)
    falling = 0.7**i if steep else i**-0.5
    return [torch.randn(m, n, generator=generator) * falling for _ in range(count)]


def held(results: Sequence[TruncatedSVD]) -> int:
    factors = [x for r in results for x in (r.U, r.S, r.V, r.U_low, r.V_low) if x is not None]
    return sum(x.numel() * x.element_size() for x in factors)


@pytest.mark.parametrize(
    ("count", "size", "rank", "mib", "options"),
    [
        (64, 256, 1, 4, {"method": "randomized"}),
        pytest.param(64, 256, 2, 4, {"method": "randomized", "tol": 1e-4}, marks=pytest.mark.slow),
        (64, 256, 8, 8, {"method": "randomized", "niter": 2}),
        (24, 256, 60, 8, {"method": "gram"}),
        (24, 256, 60, 8, {"method": "gram", "complement": True}),
        (24, 256, 60, 8, {"method": "exact", "complement": True}),
    ],
)
def test_a_cap_holds(count: int, size: int, rank: int, mib: int, options: dict) -> None:
    As = matrices(count, size, size)
    found: list[list[TruncatedSVD]] = []

    def call() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found.append(truncated_svd(As, rank, max_workspace_bytes=mib * MIB, **options))

    peak = peak_extra_bytes(call, torch.device("cpu"))
    assert peak - held(found[0]) <= mib * MIB


@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_a_cap_holds_where_the_fast_way_breaks_down(scale: float) -> None:
    """A Gram matrix in float64, and copies of matrices near overflow."""
    As = [A * scale for A in matrices(12, 1024, 96, steep=True)]
    found: list[list[TruncatedSVD]] = []
    options = {"method": "gram", "max_workspace_bytes": 4 * MIB}
    with pytest.warns(RuntimeWarning, match="taken"):
        peak = peak_extra_bytes(
            lambda: found.append(truncated_svd(As, 40, **options)), torch.device("cpu")
        )
    assert peak - held(found[0]) <= 4 * MIB
    with pytest.raises(ValueError, match=r"max_workspace_bytes for A\[0\] to be at least"):
        truncated_svd(As, 40, method="gram", max_workspace_bytes=MIB)


def test_a_warm_start_that_grows_keeps_to_its_cap() -> None:
    As = matrices(8, 256, 256)
    earlier = [truncated_svd(A, 40, method="gram") for A in As]
    moved = [A + 0.3 * A.norm() / 256 * torch.randn_like(A) for A in As]
    found: list[list[TruncatedSVD]] = []
    options = {"method": "warm", "warm_start": earlier, "tol": 1e-3}
    with pytest.warns(RuntimeWarning, match="taken"):
        peak = peak_extra_bytes(
            lambda: found.append(truncated_svd(moved, 40, max_workspace_bytes=4 * MIB, **options)),
            torch.device("cpu"),
        )
    assert peak - held(found[0]) <= 4 * MIB
    assert all(bool(result.converged) for result in found[0])


def test_matrices_that_wait_for_room_get_what_they_would_alone() -> None:
    As = matrices(6, 160, 150)
    options = {"method": "randomized", "tol": 1e-5, "oversample": 8}
    roomy = truncated_svd(As, 8, **options, generator=torch.Generator().manual_seed(0))
    tight = truncated_svd(
        As, 8, **options, generator=torch.Generator().manual_seed(0), max_workspace_bytes=2_000_000
    )
    for a, b in zip(roomy, tight, strict=True):
        assert bool(b.converged)
        assert a.iterations == b.iterations
        assert overlap(a.V.double(), b.V) > 1 - 1e-5


def test_groups_in_parts_are_said_in_one_warning() -> None:
    As = [*matrices(8, 60, 60), *matrices(8, 64, 56)]
    with pytest.warns(RuntimeWarning) as record:
        truncated_svd(As, 4, method="gram", max_workspace_bytes=230_000)
    assert len(record) == 1
    assert "60 × 60" in str(record[0].message)
    assert "64 × 56" in str(record[0].message)
    assert record[0].filename == __file__


def test_a_large_matrix_alone_has_room_for_its_krylov_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Subspace iteration, which the default cap once meant for it, is slower and misses more."""
    monkeypatch.setattr(cpu, "WORKSPACE_BYTES", 1 << 16)
    A, _, _, V = draw(320, 300)
    result = truncated_svd(A, 75, method="randomized")
    assert overlap(V, result.V) > 0.9999
