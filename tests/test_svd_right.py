"""truncated_svd: as right as torch.linalg.svd without a tolerance, or said not to be."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import Tensor

from bench.timing import peak_extra_bytes
from osf_kernels import TruncatedSVD, truncated_svd
from osf_kernels.linalg.svd.methods import gram, steep
from osf_kernels.testing import matrix_with_spectrum, orthonormality_ratio
from tests.helpers import generator_for
from tests.triplets import COLD, draw, measured_residual, overlap

EPS = torch.finfo(torch.float32).eps


def _stepped(q: int, level: float, width: int, spread: float) -> Tensor:
    """Clusters of ``width`` values, each ``level`` times the one before, ``spread`` wide."""
    i = torch.arange(q)
    inside = 1 - spread * torch.rand(q, generator=generator_for("cluster", q), dtype=torch.float64)
    return (level ** (i // width).double() * inside).sort(descending=True).values


def _outliers(q: int, count: int, height: float) -> Tensor:
    rest = torch.linspace(height, 0.8 * height, q - count, dtype=torch.float64)
    return torch.cat([torch.linspace(1, 0.8, count, dtype=torch.float64), rest])


SPECTRA = {
    **{
        f"i^-{p}": lambda q, p=p: torch.arange(1, q + 1).double() ** -p
        for p in (0.25, 0.5, 0.7, 1.0, 2.0)
    },
    "an outlier": lambda q: _outliers(q, 1, 0.0125),
    "five outliers": lambda q: _outliers(q, 5, 0.05),
    "exponential": lambda q: torch.exp(-torch.arange(q).double() * 9 / q),
    "clusters": lambda q: _stepped(q, 0.5, q // 8, 1e-6),
    "trained": lambda q: 1.02 - torch.arange(q).double() / q + 4 / torch.arange(1, q + 1) ** 2,
}


def lost(truth: Tensor, found: Tensor) -> float:
    """How many of the leading directions a subspace lacks."""
    r = found.shape[-1]
    return r - float((truth[:, :r].mT @ torch.linalg.qr(found.double())[0]).square().sum())


def by_lapack(A: Tensor, rank: int) -> TruncatedSVD:
    return truncated_svd(A, rank, method="exact")


def assert_as_right(A: Tensor, result: TruncatedSVD) -> None:
    """Within ten times what torch.linalg.svd has in residual and in lost directions."""
    V = torch.linalg.svd(A.double(), full_matrices=False)[2].mT
    reference = by_lapack(A, result.rank)
    assert measured_residual(A, result) <= 10 * measured_residual(A, reference)
    assert lost(V, result.V) <= 10 * lost(V, reference.V) + 1e-4


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(64, 64), (260, 300)])
def test_a_gram_matrix_loses_no_more_than_an_svd(name: str, m: int, n: int) -> None:
    q = min(m, n)
    A, _, _ = matrix_with_spectrum(m, n, SPECTRA[name](q), generator=generator_for(name, m, n))
    for rank in (q // 8, q // 2, 3 * q // 4):
        result = truncated_svd(A, rank, method="gram", complement=True)
        assert bool(result.converged)
        assert_as_right(A, result)
        assert result.U_low is not None
        assert result.V_low is not None
        for whole in ((result.U, result.U_low), (result.V, result.V_low)):
            assert orthonormality_ratio(torch.cat(whole, -1)) < 30


def test_matrices_of_a_batch_are_each_as_right() -> None:
    """Some lowered, by different counts, some not, some in float64."""
    names = ("an outlier", "i^-0.25", "five outliers", "i^-2.0", "clusters", "i^-0.7")
    As = torch.stack(
        [
            matrix_with_spectrum(256, 256, SPECTRA[name](256), generator=generator_for(name))[0]
            for name in names
        ]
    )
    for A, one in zip(As, truncated_svd(As, 96, method="gram").unbind(), strict=True):
        assert_as_right(A, one)


def test_a_steep_gram_matrix_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is lowered for: the way in float64 isn't taken, and the result would need it."""
    monkeypatch.setattr(gram, "_in_double", None)
    A, _, _, _ = draw(400, 400)
    assert_as_right(A, truncated_svd(A, 200, method="gram"))
    monkeypatch.setattr(steep, "lower", lambda G: None)
    monkeypatch.setattr(gram, "limit", lambda *_: 1e9)
    unmended = truncated_svd(A, 200, method="gram")
    assert float(unmended.residual) > 2 * float(by_lapack(A, 200).residual)


@pytest.mark.parametrize("count", [1, 5])
def test_a_few_large_values_stay_in_float32(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer are set than a block finds: those between them and the wanted ones are coupled too."""
    monkeypatch.setattr(gram, "_in_double", None)
    sigma = torch.linspace(1, 0.1, 400, dtype=torch.float64)
    sigma[:count] = 30
    A, _, _ = matrix_with_spectrum(400, 400, sigma, generator=generator_for("spikes", count))
    for rank in (50, 200):
        assert_as_right(A, truncated_svd(A, rank, method="gram"))


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_eigenvalues_far_above_the_others_are_found_in_every_matrix(p: float) -> None:
    """Where rounding in the first one kept all from being lowered, one matrix in ten to thirty went
    the way in float64, which takes three times as long."""
    sigma = torch.arange(1, 401).double() ** -p
    for seed in range(40):
        A, _, _ = matrix_with_spectrum(400, 400, sigma, generator=generator_for("found", seed))
        G = A.mT @ A
        before = torch.linalg.eigh(G.double())[1]
        lowered = steep.lower(G.unsqueeze(0))
        assert lowered is not None
        assert lowered.most >= 8
        # The others' eigenvectors are what they were.
        values, after = torch.linalg.eigh(G.double())
        k = lowered.most
        assert float(values[-1]) < 0.2 * float(sigma[0] ** 2)
        mixed = after[:, : 400 - k].mT @ before[:, 400 - k :]
        assert float(torch.linalg.matrix_norm(mixed, 2)) < 1e-4


def test_eigenvalues_within_rounding_of_the_last_one_take_float64() -> None:
    """An equal cluster across the rank that is wider than what is solved again."""
    sigma = torch.cat([torch.ones(1), torch.full((299,), 0.02)]).double()
    A, _, _ = matrix_with_spectrum(300, 300, sigma, generator=generator_for("tie"))
    result = truncated_svd(A, 150, method="gram")
    assert measured_residual(A, result) <= 10 * measured_residual(A, by_lapack(A, 150))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", ["randomized", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_tolerance_a_result_is_as_right_or_says_that_it_is_not(
    name: str, method: str, dtype: torch.dtype
) -> None:
    sigma = SPECTRA[name](160)
    A, _, _ = matrix_with_spectrum(
        200, 160, sigma, dtype=dtype, generator=generator_for(name, "said")
    )
    for rank in (2, 40, 110):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing was asked for that could be missed
            result = truncated_svd(A, rank, method=method)
        assert result.converged is not None
        assert result.converged.dtype == torch.bool
        if bool(result.converged):
            assert_as_right(A, result)
            assert "not converged" not in repr(result)
        else:
            assert result.method == "randomized"
            assert ", not converged" in repr(result)


def test_lapacks_own_result_is_always_as_right() -> None:
    for A in (torch.randn(40, 50) * 1e-30, torch.zeros(9, 9), draw(90, 90, "flat")[0]):
        assert bool(truncated_svd(A, 5, method="exact").converged)


# --- converged means leading ----------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [20, 33])
def test_a_cluster_wider_than_a_block_is_met_whole(
    spread: float, dtype: torch.dtype, width: int
) -> None:
    sigma = torch.cat([_stepped(3 * width, 0.9, width, spread), torch.full((270,), 0.1)]).double()
    sigma = sigma[:280]
    rank = width - 4
    for seed in range(2):
        A, _, _ = matrix_with_spectrum(
            300, 280, sigma, dtype=dtype, generator=generator_for("wide", seed)
        )
        generator = torch.Generator().manual_seed(seed)
        result = truncated_svd(A, rank, method="randomized", tol=1e-3, generator=generator)
        assert bool(result.converged)
        assert float((result.S.double() - sigma[:rank]).abs().max()) < 1e-3
        few = truncated_svd(A, rank, method="randomized", generator=generator, oversample=8)
        assert not bool(few.converged) or float(few.S[-1]) > 0.999


def test_each_of_a_list_with_clusters_has_what_it_would_have_alone() -> None:
    wide = torch.cat([torch.ones(30), torch.full((30,), 0.9), torch.full((240,), 0.1)]).double()
    plain = torch.arange(1, 301).double() ** -1.0
    As = [
        matrix_with_spectrum(300, 300, s, generator=generator_for("list", i))[0]
        for i, s in enumerate((wide, plain, wide))
    ]

    def run(A: object) -> object:
        generator = torch.Generator().manual_seed(3)
        return truncated_svd(A, 26, method="randomized", tol=1e-4, generator=generator)

    for A, one in zip(As, run(As), strict=True):
        alone = run(A)
        assert bool(one.converged)
        assert one.iterations == alone.iterations
        torch.testing.assert_close(one.S, alone.S, rtol=0, atol=1e-5)


def test_what_may_not_go_on_to_what_it_lacks_says_so() -> None:
    A, _, _, V = draw(120, 90)
    options = {"method": "warm", "warm_start": V[:, 1:7].float(), "tol": 1e-3, "niter": 1}
    with pytest.warns(RuntimeWarning, match="A has .* but lacks leading triplets"):
        result = truncated_svd(A, 6, **options)
    assert float(result.residual) < 1e-3
    assert not bool(result.converged)


@pytest.mark.parametrize("share", [0.02, 0.2])
@pytest.mark.parametrize(("m", "n"), [(220, 180), (180, 220)])
@pytest.mark.parametrize("lacking", [0, 5])
def test_a_warm_start_without_a_leading_direction_finds_it_or_says_so(
    share: float, m: int, n: int, lacking: int
) -> None:
    A, _, S, V = draw(m, n)
    rank = round(share * 180)
    lacking = min(lacking, rank - 1)
    start = torch.cat([V[:, :lacking], V[:, lacking + 1 : rank + 1]], -1).float()
    found = truncated_svd(A, rank, method="warm", warm_start=start, tol=1e-3)
    assert bool(found.converged)
    assert float((found.S.double() - S[:rank]).abs().max() / S[0]) < 1e-3
    said = truncated_svd(A, rank, method="warm", warm_start=start)
    assert float(said.residual) < 1e-5
    assert not bool(said.converged)
    chosen = truncated_svd(A, rank, warm_start=start)
    assert chosen.method != "warm"
    assert overlap(V, chosen.V) > 0.999


@pytest.mark.parametrize("name", ["flat", "tie", "tie across"])
@pytest.mark.parametrize("method", ["randomized", "warm"])
def test_equal_and_close_values_raise_no_false_alarm(name: str, method: str) -> None:
    sigma = {
        "flat": torch.linspace(1.2, 0.8, 160),
        "tie": torch.ones(160),
        "tie across": torch.cat([torch.ones(12), torch.full((148,), 0.5)]),
    }[name].double()
    for seed in range(2):
        g = generator_for(name, seed)
        A, _, V = matrix_with_spectrum(200, 160, sigma, generator=g)
        for rank in (12, 30):
            options = {"method": method, "tol": 1e-2, "generator": g}
            if method == "warm":
                options["warm_start"] = V[:, :rank].float()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                result = truncated_svd(A, rank, **options)
            assert bool(result.converged)


def test_a_wide_matrix_goes_on_from_a_warm_start() -> None:
    """Its space ends with a side of fewer columns than the start's is long."""
    for seed in range(4):
        g = generator_for("wide", seed)
        falling = torch.logspace(0, -6, 300)
        A = torch.randn(40, 300, generator=g) * falling
        start = truncated_svd(A + 0.05 * torch.randn(40, 300, generator=g) * falling, 16).V
        result = truncated_svd(A, 16, method="warm", warm_start=start, tol=1e-5)
        assert bool(result.converged)
        assert measured_residual(A, result) < 1.2e-5


# --- starts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [8, 20, 30])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_a_narrower_start_does_not_limit_a_wider_result(rank: int, narrow: torch.dtype) -> None:
    A = torch.randn(60, 40, generator=generator_for("narrow", rank), dtype=torch.float64)
    A = A if narrow == torch.float32 else A.float()
    earlier = truncated_svd(A.float(), rank, complement=True)
    fields = ("U", "S", "V", "U_low", "V_low")
    held = {field: getattr(earlier, field).to(narrow) for field in fields}
    start = TruncatedSVD(
        **held, residual=earlier.residual, captured=earlier.captured, iterations=1, method="gram"
    )
    for given in (start, start.V):
        result = truncated_svd(A, rank, warm_start=given, complement=True)
        assert bool(result.converged)
        assert_as_right(A, result)
        assert max(orthonormality_ratio(result.U), orthonormality_ratio(result.V)) < 30
    with pytest.raises(ValueError, match=r"with low bases .*, of torch\.float.*got torch\."):
        truncated_svd(A, rank, method="deflated", warm_start=start)


@pytest.mark.parametrize("name", ["U", "V", "U_low", "V_low"])
def test_a_start_that_is_not_orthonormal_is_not_deflated(name: str) -> None:
    A = torch.randn(60, 40, generator=generator_for("cast"), dtype=torch.float64)
    start = copy.deepcopy(truncated_svd(A, 20, complement=True))
    getattr(start, name).copy_(getattr(start, name).float())
    with pytest.raises(ValueError, match="warm_start of A to be orthonormal to rounding"):
        truncated_svd(A, 20, method="deflated", warm_start=start)
    result = truncated_svd(A, 20, warm_start=start)
    assert result.method != "deflated"
    assert orthonormality_ratio(result.U) < 30


def test_a_deflated_start_near_overflow_is_scaled_with_its_matrix() -> None:
    A, _, _, _ = draw(50, 40)
    plain = truncated_svd(A, 20, method="exact", complement=True)
    for scale in (2.0**100, 2.0**-100):
        earlier = truncated_svd(A * scale, 20, method="exact", complement=True)
        result = truncated_svd(A * scale, 20, method="deflated", warm_start=earlier)
        assert bool(result.converged)
        torch.testing.assert_close(result.S / scale, plain.S, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("U", (60, 7), r"U \(60, 8\)"),
        ("S", (7,), r"S \(8,\)"),
        ("U_low", (60, 51), r"U_low \(60, 52\)"),
        ("V_low", (40, 8), r"V_low \(40, 32\)"),
        ("U", (40, 8), "a result of a 60 × 40 matrix"),
    ],
)
def test_factors_of_a_start_fit_each_other(
    field: str, shape: tuple[int, ...], message: str
) -> None:
    A = torch.randn(60, 40)
    good = truncated_svd(A, 8, complement=True)
    fields = {name: getattr(good, name) for name in ("U", "S", "V", "U_low", "V_low")}
    fields[field] = torch.zeros(shape)
    start = TruncatedSVD(
        **fields, residual=good.residual, captured=good.captured, iterations=1, method="gram"
    )
    for method in ("auto", "warm", "deflated"):
        with pytest.raises(ValueError, match=re.escape("truncated_svd: expected warm_start of A")):
            truncated_svd(A, 8, method=method, warm_start=start)
        with pytest.raises(ValueError, match=message):
            truncated_svd(A, 8, method=method, warm_start=start)


# --- settings and memory ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *COLD, "warm", "deflated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_default_device_changes_nothing(method: str, dtype: torch.dtype) -> None:
    As = [draw(280, 260, "power law", dtype)[0], draw(90, 70, "steep", dtype)[0]]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"method": method, "complement": True}
    if method in ("warm", "deflated"):
        options["warm_start"] = [
            truncated_svd(A.to(work), 6, method="exact", complement=True) for A in As
        ]

    def run(tol: float | None) -> list[TruncatedSVD]:
        generator = torch.Generator().manual_seed(1)
        return truncated_svd(As, 6, tol=tol, generator=generator, **options)

    for tol in (None, 1e-4):
        plain = run(tol)
        generator = torch.Generator("cpu").manual_seed(1)
        with torch.device("meta"):
            found = truncated_svd(As, 6, tol=tol, generator=generator, **options)
            truncated_svd(As, 6, **options)
        for a, b in zip(plain, found, strict=True):
            assert torch.equal(a.S, b.S)
            assert torch.equal(a.U, b.U)


def _graded(m: int, n: int, dtype: torch.dtype, steep: float) -> Tensor:
    A = torch.randn(m, n, generator=generator_for("cap", m, n, steep), dtype=torch.float64)
    return (A * torch.logspace(0, -steep, n, dtype=torch.float64)).to(dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", ["auto", *COLD, "warm", "deflated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(200, 50), pytest.param(50, 200, marks=pytest.mark.slow)])
def test_the_least_cap_that_is_taken_holds(method: str, dtype: torch.dtype, m: int, n: int) -> None:
    """With low bases, in the safe way, and where a warm start goes on."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    for decades, tol, rank in ((12, None, 30), (1, 1e-4, 4)):
        As = [_graded(m, n, dtype, decades) for _ in range(2)]
        options = {"method": method, "complement": True, "tol": tol}
        if method in ("warm", "deflated"):
            earlier = [A.to(work) for A in As]
            options["warm_start"] = truncated_svd(earlier, rank, method="exact", complement=True)
            As = [A + 0.01 * _graded(m, n, dtype, decades + 1) for A in As]
        with pytest.raises(ValueError, match="at least") as refused:
            truncated_svd(As, rank, max_workspace_bytes=1, **options)
        cap = int(re.findall(r"at least (\d+)", str(refused.value))[0])
        found: list[list[TruncatedSVD]] = []

        def call(cap: int = cap, As: list[Tensor] = As, options: dict = options) -> None:
            found.append(truncated_svd(As, rank, max_workspace_bytes=cap, **options))  # noqa: B023

        peak = peak_extra_bytes(call, torch.device("cpu"))
        fields = ("U", "S", "V", "U_low", "V_low")
        held = sum(getattr(r, field).nbytes for r in found[0] for field in fields)
        assert peak - held <= cap
