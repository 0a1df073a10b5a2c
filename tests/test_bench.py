"""The bench's own logic: statistics, rotation, roofline arithmetic, shapes, gate, one case.

Not its timings: nothing here asserts how long a kernel takes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import osf_kernels
from bench import check, contenders, projection, report, roofline, timing
from bench.check import Side
from bench.models import MODELS, Rank, Shape, low_is_smaller, shapes_of
from bench.problem import draw

CPU = torch.device("cpu")


# models


def test_llama_has_its_published_linear_weights() -> None:
    shapes = shapes_of("llama-2-7b")
    assert len(shapes) == 224
    # 6.74 B parameters less two 32000x4096 embeddings and 65 norms of 4096
    assert sum(m * n for m, n in shapes) == 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096


def test_t5_large_has_its_published_linear_weights() -> None:
    shapes = shapes_of("t5-large")
    assert len(shapes) == 24 * 6 + 24 * 10
    # 737.67 M parameters less the shared 32128x1024 embedding, 2·48+24+2 norms, 2 bias tables
    norms, tables = (2 * 24 + 3 * 24 + 2) * 1024, 2 * 32 * 16
    assert sum(m * n for m, n in shapes) == 737_668_096 - 32128 * 1024 - norms - tables


def test_minilm_lists_every_matrix_of_the_demos_model() -> None:
    minilm = pytest.importorskip("bench.minilm")
    with torch.device("meta"):
        model = minilm.SentenceEncoder()
    present = sorted(tuple(p.shape) for p in model.parameters() if p.dim() == 2)
    assert sorted(map(tuple, shapes_of("minilm"))) == present


@pytest.mark.parametrize("name", list(MODELS))
def test_layers_scale_a_model(name: str) -> None:
    one, two, three = (len(shapes_of(name, layers=count)) for count in (1, 2, 3))
    assert two - one == three - two > 0


def test_shape_argument() -> None:
    assert shapes_of("4096x11008") == [Shape(4096, 11008)]


@pytest.mark.parametrize("bad", ["", "4096", "0x5", "4096x", "gpt-9", "-3x4", "3x4x5"])
def test_bad_model_is_refused_by_name(bad: str) -> None:
    with pytest.raises(ValueError, match="expected --model to be one of llama-2-7b"):
        shapes_of(bad)


def test_layers_of_a_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="--layers needs a model"):
        shapes_of("8x8", layers=2)


def test_rank_is_a_count_or_a_fraction_of_the_shorter_side() -> None:
    assert Rank.parse("64").of(Shape(4096, 4096)) == 64
    assert Rank.parse("64").of(Shape(4096, 16)) == 16
    assert Rank.parse("0.8").of(Shape(4096, 4096)) == 3277
    assert Rank.parse("0.5").of(Shape(30522, 384)) == 192
    assert Rank.parse("0.1").of(Shape(2, 384)) == 1


@pytest.mark.parametrize("bad", ["0", "1.0", "1.5", "-4", "nan", "half", ""])
def test_bad_rank_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="expected --rank to be a positive integer or a fraction"):
        Rank.parse(bad)


def test_low_basis_is_taken_from_half_the_side_on() -> None:
    assert [low_is_smaller(10, r) for r in (4, 5, 6)] == [False, True, True]


# timing


def test_percentiles_match_torch_quantiles() -> None:
    for count in (1, 2, 5, 16):
        values = torch.rand(count, dtype=torch.float64)
        for q in (0.0, 20.0, 50.0, 80.0, 100.0):
            expected = float(torch.quantile(values, q / 100.0))
            assert timing.percentile(values.tolist(), q) == pytest.approx(expected, rel=1e-12)


def test_summary_orders_its_percentiles() -> None:
    summary = timing.Summary.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (summary.p20_ms, summary.median_ms, summary.p80_ms) == pytest.approx((1.8, 3.0, 4.2))
    assert summary.rounds == 5


def test_no_times_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="percentile of no values"):
        timing.percentile([], 50.0)


def test_every_contender_leads_in_turn() -> None:
    orders = [timing.rotation(3, i) for i in range(3)]
    assert [order[0] for order in orders] == [0, 1, 2]
    assert all(sorted(order) == [0, 1, 2] for order in orders)


def test_rounds_interleave_and_prepare_before_each_call() -> None:
    log: list[str] = []
    timed = {
        name: timing.Timed(lambda n=name: log.append(n), lambda n=name: log.append(f"prepare {n}"))  # type: ignore[misc]
        for name in "ab"
    }
    times = timing.interleave(timed, 2, timing.Clock(CPU), warm_up=0)
    first = ["prepare a", "a", "prepare b", "b"]
    assert log == [*first, "prepare b", "b", "prepare a", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert all(value >= 0.0 for values in times.values() for value in values)


def test_warm_up_is_not_recorded() -> None:
    calls: list[None] = []
    timed = {"a": timing.Timed(lambda: calls.append(None))}
    times = timing.interleave(timed, 3, timing.Clock(CPU), warm_up=2)
    assert len(calls) == 5
    assert len(times["a"]) == 3


@pytest.mark.parametrize("begun", [False, True])
def test_a_gpu_waits_for_the_host_before_it_counts(
    monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Or what a small call plans on the host would pass for its time there. The GPU is a fake."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            log.append("record")

        def query(self) -> bool:
            return begun  # while the host still worked

        def synchronize(self) -> None:
            log.append("synchronize event")

        def elapsed_time(self, end: Event) -> float:
            return 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: log.append(f"wait {cycles}"), raising=False
    )
    clock = timing.Clock(torch.device("cuda", 0), cold=False, head_start_cycles=7)
    timed = timing.Timed(lambda: log.append("call"), lambda: log.append("prepare"))
    assert clock.time_ms(timed) == 0.5
    wanted = ["prepare", "synchronize", "wait 7", "record", "call", "record", "synchronize event"]
    assert log == wanted
    assert clock.exposed == begun


def test_peak_counts_what_lives_at_once_and_not_what_was_freed() -> None:
    def two_in_turn() -> None:
        for _ in range(2):
            torch.ones(1 << 20, dtype=torch.uint8)

    def two_at_once() -> list[Tensor]:
        return [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(2)]

    assert timing.peak_extra_bytes(two_in_turn, CPU) == pytest.approx(1 << 20, rel=0.01)
    assert timing.peak_extra_bytes(two_at_once, CPU) == pytest.approx(2 << 20, rel=0.01)


# roofline


@pytest.mark.parametrize("rho", [0.1, 0.25, 0.5, 0.8, 0.9])
def test_square_costs_are_those_of_the_method(rho: float) -> None:
    """In units of n³, with c = 1 − ρ: naive 12ρ+4ρ², dual 8ρ (and 4ρ² small), mixed, low/low."""
    n, c = 1000, 1.0 - rho
    r = round(rho * n)
    cost = {work.form: work.flops / n**3 for work in roofline.forms(n, n, r, 4)}
    assert cost["sequential"] == pytest.approx(8 * rho)
    assert cost["dual"] == pytest.approx(8 * rho + 4 * rho**2)
    assert cost["mixed, low left"] == cost["mixed, low right"] == pytest.approx(4 * (1 - rho**2))
    assert cost["low/low"] == pytest.approx(4 * c * (1 + c))
    assert roofline.naive_flops(n, n, r) / n**3 == pytest.approx(12 * rho + 4 * rho**2)


def test_savings_at_high_ranks_are_those_of_the_method() -> None:
    for rho, times in ((0.8, 12.7), (0.9, 32.0)):
        r = round(rho * 10_000)
        least = min(work.flops for work in roofline.forms(10_000, 10_000, r, 4))
        assert roofline.naive_flops(10_000, 10_000, r) / least == pytest.approx(times, rel=0.01)


def test_dual_moves_three_passes() -> None:
    dual = next(w for w in roofline.forms(4096, 2048, 8, 2) if w.form == "dual")
    assert dual.bytes == 2 * (3 * 4096 * 2048 + 8 * (4096 + 2048))


def test_bound_is_memory_at_low_rank_and_compute_at_high_rank() -> None:
    ceilings = roofline.Ceilings(copy_bytes_per_s=4e12, gemm_flops_per_s=800e12)
    low = roofline.bound([(4096, 4096, 16)], 2, ceilings)
    half = roofline.bound([(4096, 4096, 2048)], 2, ceilings)
    assert (low.kind, half.kind) == ("memory", "compute")
    assert low.ms == pytest.approx(1e3 * low.bytes / 4e12)
    assert half.ms == pytest.approx(1e3 * half.flops / 800e12)
    assert half.flops == 12 * 2048 * 4096 * 2048  # mixed or low/low: 3 n³ either way


def test_bound_of_a_list_adds_up() -> None:
    ceilings = roofline.Ceilings(1e10, 1e11)
    one = roofline.bound([(512, 256, 8)], 4, ceilings)
    three = roofline.bound([(512, 256, 8)] * 3, 4, ceilings)
    assert (three.flops, three.bytes) == (3 * one.flops, 3 * one.bytes)


def test_ceilings_count_a_copy_twice_and_a_product_as_two() -> None:
    second = timing.Summary(1000.0, 1000.0, 1000.0, 3)
    found = roofline.ceilings(second, second, CPU)
    assert found.copy_bytes_per_s == 2 * roofline.COPY_BYTES
    assert found.gemm_flops_per_s == 2 * roofline.GEMM_SIZE["cpu"] ** 3


def test_planner_and_ruler_agree_on_flops() -> None:
    """Written twice, independently: the plan never claims less than the least of the forms."""
    for rank in (8, 64, 100):
        split = torch.linalg.qr(torch.randn(128, 128)).Q
        U = split[:, :rank]
        g = torch.randn(128, 128)
        low = osf_kernels.Basis(split[:, rank:], spans="low")
        least = min(work.flops for work in roofline.forms(128, 128, rank, 4))
        assert osf_kernels.plan(g, U, U).flops >= least
        if rank == 100:
            assert osf_kernels.plan(g, low, low).flops == least


# contenders and gate


def split(size: int, rank: int) -> tuple[Tensor, Tensor]:
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return q[:, :rank], q[:, rank:]


@pytest.mark.parametrize("mode", ["complement", "core"])
def test_peers_are_the_formula(mode: contenders.Mode) -> None:
    (U, _), (V, _) = split(40, 7), split(24, 7)
    g = torch.randn(40, 24, dtype=torch.float64)
    left, right = torch.eye(40) - U @ U.mT, torch.eye(24) - V @ V.mT
    truth = left @ g @ right if mode == "complement" else g - U @ U.mT @ g @ V @ V.mT
    torch.testing.assert_close(contenders.FORMULAS[mode](g, U, V), truth, atol=1e-13, rtol=0)
    inside = g.clone()
    assert contenders.HAND_ORDERED[mode](inside, U, V) is inside
    torch.testing.assert_close(inside, truth, atol=1e-13, rtol=0)


@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize("low", [(False, False), (True, False), (False, True), (True, True)])
def test_slabs_and_eager_agree_with_the_formula(
    mode: contenders.Mode, low: tuple[bool, bool]
) -> None:
    bases = [split(50, 9), split(36, 9)]
    g = torch.randn(50, 36, dtype=torch.float64)
    truth = contenders.FORMULAS[mode](g, bases[0][0], bases[1][0])
    left, right = (
        Side(b[1], "low") if held_low else Side(b[0], "high")
        for b, held_low in zip(bases, low, strict=True)
    )
    slabs = check.slabs(g, left, right, mode, torch.Generator().manual_seed(3))
    assert len(slabs.columns.unique()) == len(slabs.rows.unique()) == check.SLAB
    assert check.error(truth, slabs) < 1e-14
    assert check.error(check.eager(g, left, right, mode), slabs) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_admits_honest_rounding_and_refuses_a_missing_term(dtype: torch.dtype) -> None:
    m, n, r = 512, 512, 64
    (U, _), (V, _) = (tuple(b.to(dtype) for b in split(size, r)) for size in (m, n))
    g = torch.randn(m, n).to(dtype)
    truth = check.slabs(
        g, Side(U, "high"), Side(V, "high"), "complement", torch.Generator().manual_seed(0)
    )
    honest = contenders.naive(g, U, V)
    without_last_term = g - U @ (U.mT @ g) - (g @ V) @ V.mT
    limit = check.bound(dtype)
    assert check.refusal(check.error(honest, truth), limit) is None
    assert "wrong: error" in (check.refusal(check.error(without_last_term, truth), limit) or "")
    honest[:, truth.columns[0]] = float("nan")
    assert "error inf" in (check.refusal(check.error(honest, truth), limit) or "")


def test_gate_refuses_runs_that_differ() -> None:
    assert "bits" in (check.refusal(0.0, 1.0, reproducible=lambda: False) or "")


def test_leak_of_the_raw_gradient_is_one_and_of_the_projected_none() -> None:
    (U, _), (V, _) = split(64, 12), split(48, 12)
    g = torch.randn(64, 48, dtype=torch.float64)
    truth = check.slabs(
        g, Side(U, "high"), Side(V, "high"), "complement", torch.Generator().manual_seed(0)
    )
    assert check.leak(g, g, U, V, truth) == pytest.approx(1.0)
    assert check.leak(contenders.naive(g, U, V), g, U, V, truth) < 1e-13


@pytest.mark.parametrize(
    ("spans", "expected"), [("high", "high/high"), ("low", "low/low"), ("auto", "high/low")]
)
def test_problem_holds_orthonormal_complements(
    spans: projection.SpansChoice, expected: str
) -> None:
    problem = draw([Shape(60, 20), Shape(60, 20)], Rank(12), torch.float64, CPU, spans)
    assert problem.spans == expected
    for index, (left, right) in enumerate(problem.held):
        for side, exact in zip((left, right), problem.exact[index], strict=True):
            columns = side.columns.double()
            gram = columns.mT @ columns
            torch.testing.assert_close(gram, torch.eye(len(gram)).double(), atol=1e-5, rtol=0)
            overlap = float((exact.double().mT @ columns).norm())
            assert overlap == pytest.approx(12**0.5 if side.spans == "high" else 0.0, abs=1e-4)
    assert not torch.equal(problem.high_U[0], problem.high_U[1])  # each matrix has its own
    assert not torch.equal(problem.pristine[0], problem.pristine[1])


def case(**changes: object) -> projection.Case:
    arguments: dict[str, object] = {
        "model": "48x32",
        "shapes": [Shape(48, 32)] * 2,
        "rank": Rank(8),
        "dtype": "fp32",
        "device": CPU,
    }
    return projection.Case(**(arguments | changes))  # type: ignore[arg-type]


def refuse(*_: object) -> Tensor:
    raise RuntimeError("no compiler here\nand more")


def test_a_backend_of_ours_that_raises_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(osf_kernels, "project_many_", lambda *_, mode: refuse())
    monkeypatch.setattr(contenders, "compiled", lambda mode: refuse)
    rows = {row.contender: row for row in projection.measure(case(), rounds=0)}
    ours = rows[contenders.OURS]
    assert ours.status == "wrong: it raised RuntimeError: no compiler here"
    assert report.failed(ours)
    assert rows[contenders.NAIVE].status == "ok"


@pytest.mark.timing
def test_a_case_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contenders, "compiled", lambda mode: refuse)
    monkeypatch.setitem(roofline.GEMM_SIZE, "cpu", 64)
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 16)
    rows = {row.contender: row for row in projection.measure(case(), rounds=3)}
    assert list(rows) == [
        contenders.OURS,
        contenders.HAND,
        contenders.NAIVE,
        contenders.COMPILED,
    ]
    refused = rows[contenders.COMPILED]
    assert refused.status == "unavailable: RuntimeError: no compiler here"
    assert refused.median_ms is None
    ours = rows[contenders.OURS]
    assert ours.status == "ok"
    assert ours.error is not None
    assert ours.error_bound is not None
    assert ours.error <= ours.error_bound
    assert ours.leak is not None
    assert ours.leak < 1e-5
    assert ours.median_ms is not None
    naive_ms = rows[contenders.NAIVE].median_ms
    assert naive_ms is not None
    assert ours.times_naive == pytest.approx(naive_ms / ours.median_ms)
    assert ours.roofline_fraction == pytest.approx((ours.bound_ms or 0.0) / ours.median_ms)
    table = report.case_table(list(rows.values()))
    assert "torch.compile: unavailable: RuntimeError: no compiler here" in table

    path = tmp_path / "rows.csv"
    report.append_csv(path, rows.values(), report.environment(CPU))
    report.append_csv(path, rows.values(), report.environment(CPU))
    stored = report.read_csv(path)
    assert len(stored) == 8
    assert tuple(stored[0]) == report.FIELDS
    for name in ("date", "cpu", "cores", "threads", "python", "torch", "osf_kernels"):
        assert stored[0][name], f"{name} is empty"
    assert float(stored[0]["median_ms"]) == pytest.approx(ours.median_ms, rel=1e-3)
    assert stored[3]["median_ms"] == ""
    assert contenders.OURS in report.short_table(stored)


def test_a_wrong_contender_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(g: Tensor, U: Tensor, V: Tensor) -> Tensor:
        return contenders.naive(g, U, V) * 1.001

    monkeypatch.setitem(contenders.HAND_ORDERED, "complement", off)
    monkeypatch.setattr(contenders, "compiled", lambda mode: contenders.naive)
    monkeypatch.setitem(roofline.GEMM_SIZE, "cpu", 16)
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 12)
    rows = {row.contender: row for row in projection.measure(case(), rounds=1)}
    wrong = rows[contenders.HAND]
    assert wrong.status.startswith("wrong: error")
    assert wrong.median_ms is None
    assert rows[contenders.OURS].times_hand_ordered is None
    assert report.failed(wrong)
    assert not report.failed(rows[contenders.OURS])


def test_no_rounds_check_and_time_nothing() -> None:
    rows = projection.measure(case(peers=False, mode="core", dtype="bf16"), rounds=0)
    assert [row.status for row in rows] == ["ok"]
    assert rows[0].median_ms is None
    assert rows[0].leak is None  # the core keeps what crosses the spans
