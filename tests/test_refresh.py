"""osf_torch.refresh: how right, what is kept, what the next one starts from, and where it lies."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench.timing import peak_extra_bytes
from osf_kernels import Basis, TruncatedSVD
from osf_kernels.testing import orthonormality_ratio, project_reference
from osf_torch import Subspaces, project_grad, protect, refresh
from tests.helpers import generator_for
from tests.small_refresh import REFRESH, Recorder, linear, small_model

# what it finds


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=4),
    rho=st.floats(0.05, 1.0),
    keep=st.sampled_from(["smaller", "all"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_bases_are_orthonormal_and_split_the_space(shapes, rho, keep, dtype):
    shapes = [(2, 2), *shapes]  # a weight of one direction is passed over
    model = nn.ModuleList(linear(m, n, i, dtype=dtype) for i, (m, n) in enumerate(shapes))
    found = refresh(model, rho, keep=keep)
    taken = [i for i, shape in enumerate(shapes) if min(shape) > 1 or rho == 1]
    assert list(found) == [f"{i}.weight" for i in taken]
    for i, entry in zip(taken, found.values(), strict=True):
        (m, n), layer = shapes[i], model[i]
        W = layer.weight.detach().double()
        r = min(m, n) if rho == 1 else min(max(1, round(rho * min(m, n))), min(m, n) - 1)
        assert (entry.shape, entry.rank) == ((m, n), r)
        truth = torch.linalg.svdvals(W)
        rounding = torch.finfo(entry.S.dtype).eps
        assert (entry.S.double() - truth[:r]).abs().max() < 30 * max(m, n) * rounding * truth[0]
        for basis, size in ((entry.U, m), (entry.V, n)):
            width = r if basis.spans == "high" else size - r
            assert basis.columns.shape == (size, width)
            assert orthonormality_ratio(basis.columns) < 30
            if keep == "smaller":
                assert basis.spans == "high" or width < r
        # what is left of W without the top subspaces, however they are held, is its tail
        free = project_reference(W, entry.U, entry.V).norm()
        slack = 30 * max(m, n) * rounding * truth.norm()
        assert (free - truth[r:].norm()).abs() < slack


def test_figures_are_those_of_the_weight():
    model = small_model()
    found = refresh(model, 6)
    for name, entry in found.items():
        W = model.get_parameter(name).detach().double()
        U, V, S = entry.U.columns.double(), entry.V.columns.double(), entry.S.double()
        errors = ((W @ V - U * S).square().sum(0) + (W.mT @ U - V * S).square().sum(0)).sqrt()
        assert float(errors.max() / S[0]) < entry.residual + 1e-6
        captured = float((W @ V).square().sum() / W.square().sum())
        assert entry.captured == pytest.approx(captured, abs=1e-5)
        assert entry.method
        assert entry.iterations >= 1
        assert entry.seconds > 0


def test_low_bases_are_kept_where_they_are_smaller():
    model = nn.Sequential(linear(20, 20, 0), linear(20, 20, 1), linear(80, 20, 2))
    ranks = {"0.weight": 10, "1.weight": 11, "2.weight": 16}
    found = refresh(model, ranks)
    spans = {name: (s.U.spans, s.V.spans) for name, s in found.items()}
    high, low = ("high", "high"), ("low", "low")
    assert spans == {"0.weight": high, "1.weight": low, "2.weight": high}
    # of a 4:1 weight the longer side's low basis is many times its high one: asked for only
    asked = refresh(model, {"2.*": 16}, complement=True, filter="2.*")["2.weight"]
    assert (asked.U.spans, asked.V.spans) == ("high", "low")
    assert asked.svd is None
    none = refresh(model, 0.9, complement=False)
    assert {(s.U.spans, s.V.spans) for s in none.values()} == {high}


def test_keep_all_holds_every_factor_and_says_its_bytes():
    model = nn.Sequential(linear(20, 20))
    smaller = refresh(model, 15)["0.weight"]
    everything = refresh(model, 15, keep="all")["0.weight"]
    assert smaller.svd is None
    assert isinstance(everything.svd, TruncatedSVD)
    assert smaller.nbytes == 4 * (15 + 2 * 20 * 5)
    assert everything.nbytes == 4 * (15 + 2 * 20 * 20)
    assert torch.equal(smaller.U.columns, everything.U.columns)
    assert torch.equal(everything.svd.U_low, everything.U.columns)
    high = refresh(model, 5, keep="all")
    assert high.nbytes == 4 * (5 + 2 * 20 * 5)


def test_nothing_kept_holds_on_to_more_memory():
    found = refresh(nn.Sequential(linear(20, 20), linear(20, 20)), 15)
    for entry in found.values():
        for factor in entry.factors().values():
            assert factor.untyped_storage().nbytes() == factor.nbytes


@pytest.mark.parametrize("rho", [0.25, 0.8])
@pytest.mark.parametrize("keep", ["smaller", "all"])
def test_protect_takes_it_and_the_protected_part_holds(rho, keep):
    model = nn.Sequential(linear(16, 16, 0), nn.Tanh(), linear(10, 16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    guard = protect(model, refresh(model, rho, keep=keep), optimizer=optimizer, record=True)
    generator = generator_for(rho)
    for _ in range(10):
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=generator)
        (model(x) - x[:, :10]).square().mean().backward()
        optimizer.step()
    guard.verify()
    assert max(guard.drift().values()) < 1e-5
    assert max(leak.applied for leak in guard.leak().values()) < 1e-5
    assert all((p - before[name]).norm() > 1e-3 for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_double_precision_is_rounded_once(dtype):
    model = nn.Sequential(linear(64, 48, 0, dtype=dtype), linear(40, 40, 1, dtype=dtype))
    found = refresh(model, {"0.*": 0.4, "1.*": 0.8}, compute_dtype=torch.float64)
    for name, entry in found.items():
        W = model.get_parameter(name).detach().double()
        truth = torch.linalg.svdvals(W)
        assert entry.S.dtype == torch.float64
        assert (entry.S - truth[: entry.rank]).abs().max() < 1e-13
        for basis in (entry.U, entry.V):
            assert basis.columns.dtype == torch.float32
            columns = basis.columns.double()
            defect = columns.mT @ columns - torch.eye(columns.shape[1])
            assert torch.linalg.matrix_norm(defect, 2) < 2 * torch.finfo(torch.float32).eps
        tail = project_reference(W, entry.U, entry.V).norm()
        assert float((tail - truth[entry.rank :].norm()).abs() / truth[0]) < 1e-7
    kept = refresh(nn.Sequential(linear(16, 16, dtype=dtype)), 4, compute_dtype=torch.float64)
    assert refresh(nn.Sequential(linear(16, 16, dtype=dtype)), 4, previous=kept)


def test_batching_changes_nothing(monkeypatch):
    model = nn.Sequential(*(linear(12, 12, i) for i in range(5)))
    together = refresh(model, 4)
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(REFRESH, "FACTOR_BYTES", 4 * (2 * 12 * 4) * 2)
    apart = refresh(model, 4)
    assert [len(call["A"]) for call in recorder.calls] == [2, 2, 1]
    for name, entry in together.items():
        torch.testing.assert_close(apart[name].S, entry.S, rtol=1e-5, atol=1e-6)
        overlap = (apart[name].V.columns.mT @ entry.V.columns).square().sum() / 4
        assert overlap > 0.9999


@pytest.mark.filterwarnings("ignore:.*taken .* at a time")
@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 4, "compute_dtype": torch.float64},
        {"ranks": 48, "compute_dtype": torch.float64},
        {"ranks": 0.8},
        {"ranks": 0.8, "keep": "all"},
    ],
)
def test_memory_beyond_the_result_is_within_the_promise(options):
    """Twice the cap: what truncated_svd works in, and what a call is given and returns."""
    model = nn.Sequential(*(linear(128, 128, i) for i in range(24)))
    cap = 1_500_000
    found = []
    peak = peak_extra_bytes(
        lambda: found.append(refresh(model, max_workspace_bytes=cap, progress=False, **options)),
        torch.device("cpu"),
    )
    assert peak - found[0].nbytes < 2 * cap


def test_weights_of_one_kind_go_together(monkeypatch):
    model = nn.Sequential(
        linear(12, 12, 0), linear(8, 12, 1), linear(12, 12, 2), linear(12, 12, 3).bfloat16()
    )
    recorder = Recorder(monkeypatch)
    found = refresh(model, 4)
    assert list(found) == ["0.weight", "1.weight", "2.weight", "3.weight"]
    kinds = [[(tuple(a.shape), a.dtype) for a in call["A"]] for call in recorder.calls]
    assert kinds == [
        [((12, 12), torch.float32)] * 2,
        [((8, 12), torch.float32)],
        [((12, 12), torch.bfloat16)],
    ]
    assert found["3.weight"].S.dtype == torch.float32


def test_the_seed_decides_and_the_global_generator_is_left_alone(monkeypatch):
    model = small_model()
    recorder = Recorder(monkeypatch)
    state = torch.random.get_rng_state()
    found = refresh(model, 4, seed=7)
    assert found.seed == 7
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {call["generator"].initial_seed() for call in recorder.calls} == {7}
    again = refresh(model, 4, seed=7)
    assert all(torch.equal(again[n].V.columns, found[n].V.columns) for n in found)


def test_weights_are_left_as_they_are():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    versions = {name: p._version for name, p in model.named_parameters()}
    found = refresh(model, 0.6)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p._version == versions[name]
        assert p.grad is None
    assert not any(f.requires_grad for s in found.values() for f in s.factors().values())


# previous


def drifted(model: nn.Module, size: float) -> None:
    for i, p in enumerate(model.parameters()):
        noise = torch.randn(p.shape, generator=generator_for("drift", i))
        p.data += size * noise * p.data.norm() / noise.norm()


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_the_next_refresh_starts_from_the_previous_one(monkeypatch, offload):
    model = nn.Sequential(linear(48, 48, 0), linear(32, 48, 1))
    first = refresh(model, 8, offload=offload)
    drifted(model, 1e-3)
    recorder = Recorder(monkeypatch)
    second = refresh(model, 8, previous=first)
    starts = [start for call in recorder.calls for start in call["warm_start"]]
    for start, entry in zip(starts, first.values(), strict=True):
        assert isinstance(start, TruncatedSVD)
        assert torch.equal(start.V, entry.V.columns)
    cold = refresh(model, 8)
    for name, entry in second.items():
        assert entry.method == "warm"
        assert entry.captured == pytest.approx(cold[name].captured, rel=1e-4)


def test_a_refresh_that_kept_everything_is_deflated():
    model = nn.Sequential(linear(48, 48, 0))
    first = refresh(model, 0.75, keep="all")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    protect(model, first, optimizer=optimizer)
    for i in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 48, generator=generator_for(i))).square().mean().backward()
        optimizer.step()
    second = refresh(model, 0.75, keep="all", previous=first)["0.weight"]
    assert second.method == "deflated"
    cold = refresh(model, 0.75, method="exact")["0.weight"]
    torch.testing.assert_close(second.S, cold.S, rtol=1e-3, atol=1e-4)
    assert second.residual < 1e-3


def test_a_previous_of_rounded_bases_is_a_sketch(monkeypatch):
    model = nn.Sequential(linear(16, 16))
    first = refresh(model, 4, dtype=torch.bfloat16)
    assert first["0.weight"].V.columns.dtype == torch.bfloat16
    assert first["0.weight"].S.dtype == torch.float32
    recorder = Recorder(monkeypatch)
    refresh(model, 4, previous=first)
    (start,) = recorder.calls[0]["warm_start"]
    assert isinstance(start, torch.Tensor)
    assert start.dtype == torch.float32


def test_a_previous_that_does_not_fit_is_refused_by_name():
    model = small_model()
    first = refresh(model, 4, filter="0.*")
    with pytest.raises(ValueError, match=r"got none for 2\.weight, 3\.weight"):
        refresh(model, 4, previous=first)
    other = nn.Sequential(linear(30, 16))
    with pytest.raises(ValueError, match=r"'0\.weight' with shape \(30, 16\), got \(24, 16\)"):
        refresh(other, 4, previous=first)
    square = nn.Sequential(linear(16, 16))
    low = refresh(square, 0.75)
    with pytest.raises(ValueError, match=r"got low bases alone for 0\.weight.*keep='all'"):
        refresh(square, 0.75, previous=low)
    assert refresh(square, 0.75, previous=refresh(square, 0.75, keep="all"))
    with pytest.raises(TypeError, match=r"expected previous to be the Subspaces.*got dict"):
        refresh(model, 4, previous=dict(first))


# moving


def test_to_moves_and_casts_all_but_the_singular_values():
    model = nn.Sequential(linear(16, 16, 0), linear(16, 16, 1))
    found = refresh(model, {"0.weight": 4, "1.weight": 12}, keep="all")
    half = found.to(dtype=torch.bfloat16)
    assert isinstance(half, Subspaces)
    for name, entry in half.items():
        assert entry.S.dtype == torch.float32
        assert all(f.dtype == torch.bfloat16 for p, f in entry.factors().items() if p != "S")
        assert torch.equal(entry.svd.V, found[name].svd.V.bfloat16())
        assert (entry.residual, entry.method) == (found[name].residual, found[name].method)
    assert half.nbytes < 0.51 * found.nbytes + 100
    meta = found.to("meta")
    assert all(f.device.type == "meta" for s in meta.values() for f in s.factors().values())


def test_to_takes_a_dtype_alone():
    found = refresh(small_model(), 4)
    half = found.to(torch.bfloat16)
    assert half["0.weight"].U.columns.dtype == torch.bfloat16
    assert half["0.weight"].S.dtype == torch.float32
    with pytest.raises(TypeError, match=r"got the dtypes torch\.bfloat16 and torch\.float16"):
        found.to(torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"keep": "all", "complement": True}])
def test_results_of_inference_mode_take_part_in_autograd(dtype, options):
    with torch.inference_mode():
        model = nn.Sequential(linear(16, 24, dtype=dtype)).requires_grad_()
        first = refresh(model, 4, **options)
        second = refresh(model, 4, previous=first, **options)
        double = refresh(model, 4, compute_dtype=torch.float64, **options)
    for found in (first, second, double):
        entry = found["0.weight"]
        assert not any(factor.is_inference() for factor in entry.factors().values())
        g = torch.ones(16, 24, dtype=entry.U.columns.dtype, requires_grad=True)
        project_grad(g, entry.U, entry.V).square().sum().backward()
        assert g.grad is not None


def test_offload_moves_every_result():
    found = refresh(small_model(), 4, offload="meta")
    assert {f.device.type for s in found.values() for f in s.factors().values()} == {"meta"}


@pytest.mark.gpu
def test_results_stay_on_each_weights_device_or_go_to_the_host():
    model = nn.Sequential(linear(64, 48, 0).cuda(), linear(64, 48, 0))
    found = refresh(model, 8)
    assert [s.V.columns.device.type for s in found.values()] == ["cuda", "cpu"]
    torch.testing.assert_close(found["0.weight"].S.cpu(), found["1.weight"].S, rtol=1e-5, atol=0)
    offloaded = refresh(model, 8, offload="cpu")
    assert {s.V.columns.device.type for s in offloaded.values()} == {"cpu"}
    assert refresh(model, 8, previous=offloaded)["0.weight"].V.columns.is_cuda


# what the result says


def test_a_tolerance_that_is_missed_is_said_by_name():
    model = nn.Sequential(linear(64, 64, 0), linear(64, 64, 1))
    message = r"osf_torch\.refresh: .*'0\.weight' has .*'1\.weight' has"
    with pytest.warns(RuntimeWarning, match=message):
        found = refresh(model, 8, method="gram", tol=1e-9)
    assert [s.converged for s in found.values()] == [False, False]
    assert "gram, approximate" in found.summary()
    assert "(2 approximate)" in repr(found)
    fine = refresh(model, 8, method="randomized", tol=1e-3)
    assert [s.converged for s in fine.values()] == [True, True]


@pytest.mark.parametrize("options", [{}, {"keep": "all"}])
def test_an_entry_prints_as_one_line(options):
    text = str(refresh(small_model(), 4, **options)["0.weight"])
    assert re.fullmatch(
        r"Decomposition\(24x16, rank 4, held high/high; gram, residual \d\.\de-\d\d, "
        r"captured 0\.\d{4}, 0\.0 MiB\)",
        text,
    )


def test_a_basis_of_the_result_is_an_operators_argument():
    entry = refresh(nn.Sequential(linear(16, 16)), 12)["0.weight"]
    assert isinstance(entry.U, Basis)
    with pytest.raises(AttributeError):
        entry.rank = 3
