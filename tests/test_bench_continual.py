"""The continual bench's figures, rows, tuning and pictures, and a tiny run end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import __main__ as cli
from bench import (
    continual,
    continual_cost,
    continual_plot,
    continual_rows,
    continual_run,
    continual_tasks,
    mrr_sweep,
    redundancy,
    report,
)
from bench.continual_methods import COMPARED, METHODS
from bench.continual_rows import Row
from bench.continual_run import Setting
from bench.continual_tasks import SPLITS, TASKS
from tests.small_continual import sequences, small_encoder, small_tasks


def test_figures_of_a_matrix() -> None:
    R = [[0.9], [0.6, 0.8], [0.5, 0.9, 0.7]]
    assert continual_run.average_accuracy(R) == pytest.approx(0.7)
    assert continual_run.learned(R) == pytest.approx(0.8)
    assert continual_run.forgetting(R) == pytest.approx([0.4, -0.1])  # the second one gained
    assert continual_run.mean_forgetting(R) == pytest.approx(0.15)
    assert continual_run.mean_forgetting([[0.9]]) == 0.0


def test_spread_is_mean_and_sample_deviation() -> None:
    spread = continual_rows.Spread.over([0.1, 0.2, 0.3])
    assert (spread.mean, spread.deviation) == pytest.approx((0.2, 0.1))
    assert str(spread) == "20.0 ± 10.0"
    assert str(continual_rows.Spread.over([0.5])) == "50.0"


def summary(method: str, average: float, forgotten: float) -> continual_rows.Summary:
    R = [[average + forgotten], [average, average]]
    run = continual_rows.Run(method, 0, 1e-3, R, ("a", "b"))
    return continual_rows.summarise([run, run])


def judge(summaries: dict[str, continual_rows.Summary]) -> str:
    return continual_rows.verdict(summaries, "complement", "ours")


def test_verdict_says_yes_and_no_from_the_figures() -> None:
    plain, osf = summary("plain", 0.6, 0.15), summary("peft-osf", 0.65, 0.02)
    good = {"plain": plain, "peft-osf": osf, "complement": summary("complement", 0.66, 0.04)}
    assert judge(good).count("yes") == 3
    bad = good | {"complement": summary("complement", 0.59, 0.06)}
    assert judge(bad).count("NO") == 3
    mixed = judge(good | {"complement": summary("complement", 0.62, 0.04)})
    assert (mixed.count("yes"), mixed.count("NO")) == (2, 1)
    assert "peft-osf did not run" in judge({"plain": plain, "complement": plain})


def test_a_counterpart_is_judged_on_accuracy_and_forgetting() -> None:
    base = summary("complement", 0.66, 0.05)

    def says(own: continual_rows.Summary) -> str:
        both = {"complement": base, "confine": own}
        return continual_rows.counterpart(both, "confine", "complement", "ours, confined")

    assert says(summary("confine", 0.66, 0.05)).count("yes") == 2
    assert says(summary("confine", 0.6, 0.06)).count("NO") == 2
    mixed = says(summary("confine", 0.7, 0.06))
    assert "no lower, yes" in mixed
    assert "no more, NO" in mixed
    missing = continual_rows.counterpart({}, "confine", "complement", "ours, confined")
    assert "did not run" in missing


# rows, resuming, tuning


def test_finished_runs_are_read_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = tmp_path / "deep" / "rows.csv"
    said: list[str] = []
    found = sequences(say=said.append)
    first = found.run(csv, "plain", 0, 1e-3)
    assert [len(line) for line in first.matrix] == [1, 2]
    assert first.names == ("t0", "t1")
    assert len(said) == 4

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(continual, "train_sequence", refuse)
    again = sequences(say=said.append).run(csv, "plain", 0, 1e-3)
    assert again == first
    assert len(said) == 8  # the bar goes on all the same
    for other in (("plain", 1, 1e-3), ("plain", 0, 2e-3), ("complement", 0, 1e-3)):
        with pytest.raises(AssertionError, match="trained again"):
            sequences().run(csv, *other)
    for changed in (sequences(steps=3), sequences(model="another")):
        with pytest.raises(AssertionError, match="trained again"):
            changed.run(csv, "plain", 0, 1e-3)


def test_a_run_cut_short_in_the_file_is_not_taken_for_one(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    found = sequences()
    whole = found.run(csv, "plain", 0, 1e-3)
    lines = csv.read_text().splitlines(keepends=True)
    csv.write_text("".join(lines[:-1]))
    assert continual_rows.read(csv) == {}
    assert found.run(csv, "plain", 0, 1e-3) == whole
    assert len(continual_rows.read(csv)) == 1
    csv.write_text("".join(lines) + lines[-1][:20])  # killed in the middle of a line
    assert list(continual_rows.read(csv).values()) == [whole]


def test_anew_trains_what_is_there_and_replaces_its_rows_alone(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    sequences().run(csv, "complement", 0, 1e-3)
    kept = csv.read_text()
    sequences().run(csv, "plain", 0, 1e-3)
    lines = len(csv.read_text().splitlines())
    csv.write_text(csv.read_text() + "plain,1,0.0")  # killed in the middle of a line
    said: list[str] = []
    sequences(anew=True, say=said.append).run(csv, "plain", 0, 1e-3)
    assert all("already there" not in text for text in said)
    assert csv.read_text().startswith(kept)
    assert len(csv.read_text().splitlines()) == lines
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_what_is_taken_from_a_file_is_said_with_its_commits_and_dates(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    found = sequences()
    asked = [(name, seed, 1e-3) for name in ("plain", "complement") for seed in (0, 1)]
    assert found.taken(csv, asked) == ""
    for (name, seed, rate), (commit, date) in zip(
        asked, [("abc", "2026-01-01"), ("abc", "2026-01-01"), ("def", "2026-02-02")], strict=False
    ):
        where = dict.fromkeys(report.ENVIRONMENT_FIELDS, "x") | {"commit": commit, "date": date}
        row = found.asked(name, seed, rate, "test")
        rows = continual_rows.rows_of(row, [[0.5], [0.5, 0.5]], "ab", 1.0)
        continual_rows.write(csv, row, rows, where)
    text = found.taken(csv, asked)
    assert f"3 of 4 runs are taken from {csv}" in text
    assert "2 of abc (2026-01-01), 1 of def (2026-02-02)" in text
    assert "--anew" in text
    assert sequences(anew=True).taken(csv, asked) == ""


def scored(
    monkeypatch: pytest.MonkeyPatch, scores: dict[float, float]
) -> tuple[continual.Sequences, list[float]]:
    """Sequences whose validation accuracy is given by the learning rate."""
    asked: list[float] = []

    def train(*_: object, learning_rate: float, split: str, **__: object) -> list[list[float]]:
        assert split == "validation"
        asked.append(learning_rate)
        if math.isnan(scores[learning_rate]):
            raise FloatingPointError("overflow")
        value = scores[learning_rate]
        return [[value], [value, value]]

    monkeypatch.setattr(continual, "train_sequence", train)
    return sequences(), asked


@pytest.mark.parametrize(
    ("values", "tried", "best"),
    [
        ((0.9, 0.7, 0.6, 0.5, 0.4), [3e-4, 1e-4, 3e-5], 3e-5),
        ((0.4, 0.7, 0.6, 0.5, 0.9), [3e-4, 1e-4, 3e-5], 1e-4),
        ((0.9, 0.5, 0.6, 0.5, 0.9), [3e-4, 1e-3, 1e-4], 3e-4),
        ((0.0, 0.1, 0.2, 0.3, 0.4), [3e-4, 1e-3, 3e-3, 1e-4], 3e-3),
        ((0.0, 0.1, 0.2, 0.3, math.nan), [3e-4, 1e-3, 3e-3, 1e-4], 1e-3),
        ((0.2, 0.2, 0.2, 0.2, 0.2), [3e-4, 3e-5, 1e-4], 3e-5),
    ],
)
def test_tuning_climbs_the_grid(
    values: tuple[float, ...],
    tried: list[float],
    best: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, asked = scored(monkeypatch, dict(zip(continual.GRID, values, strict=True)))
    csv = tmp_path / "rates.csv"
    scores = found.tune(csv, "plain")
    assert sorted(asked) == sorted(tried) == sorted(scores)
    assert continual.rates_for(["plain"], csv, found) == {"plain": best}
    asked.clear()
    found.tune(csv, "plain")
    assert all(math.isnan(dict(zip(continual.GRID, values, strict=True))[rate]) for rate in asked)
    with pytest.raises(ValueError, match=r"no learning rate of lora for 2 steps .* --tune"):
        continual.rates_for(["plain", "lora"], csv, found)


def test_variants_of_ours_take_its_rate(tmp_path: Path) -> None:
    found = sequences()
    csv = tmp_path / "rates.csv"
    where = dict.fromkeys(report.ENVIRONMENT_FIELDS, "x")
    row = found.asked("complement", 0, 3e-4, "validation")
    report.append_csv(csv, continual_rows.rows_of(row, [[0.5], [0.5, 0.5]], "ab", 1.0), where, Row)
    assert continual.rates_for(["core", "adaptive"], csv, found) == {"core": 3e-4, "adaptive": 3e-4}
    with pytest.raises(ValueError, match=r"no learning rate of lora for"):
        continual.rates_for(["core", "lora"], csv, found)


def test_rates_of_another_setting_or_seed_do_not_count(tmp_path: Path) -> None:
    found = sequences()
    csv = tmp_path / "rates.csv"
    where = dict.fromkeys(report.ENVIRONMENT_FIELDS, "x")
    matrix = [[0.5], [0.5, 0.5]]
    right = found.asked("plain", 0, 1e-3, "validation")
    for other in ({"steps": 9}, {"seed": 1}, {"split": "test"}, {"text": "other"}):
        wrong = dataclasses.replace(right, learning_rate=1e-4, **other)
        better = [[0.9], [0.9, 0.9]]
        report.append_csv(csv, continual_rows.rows_of(wrong, better, "ab", 1.0), where, Row)
    report.append_csv(csv, continual_rows.rows_of(right, matrix, "ab", 1.0), where, Row)
    assert continual.rates_for(["plain"], csv, found) == {"plain": 1e-3}


# picture, table, cost


def some_runs() -> dict[str, list[continual_rows.Run]]:
    names = ("a", "b", "c")
    R = [[0.9], [0.6, 0.8], [0.5, 0.9, 0.7]]
    S = [[0.7], [0.8, 0.8], [0.7, 0.7, 0.7]]
    return {
        method: [continual_rows.Run(method, i, 1e-3, m, names) for i, m in enumerate((R, S))]
        for method in METHODS
    }


def test_course_of_a_task_is_its_mean_from_its_own_on() -> None:
    runs = some_runs()["plain"]
    assert continual_plot.course(runs, 0) == pytest.approx([0.8, 0.7, 0.6])
    assert continual_plot.course(runs, 2) == pytest.approx([0.7])


def test_picture_has_a_panel_a_task(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    picture = tmp_path / "deep" / "picture.png"
    continual_plot.draw(some_runs(), picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to plot"):
        continual_plot.draw({"plain": []}, picture)


def test_table_shows_every_method() -> None:
    pytest.importorskip("rich", reason="the table is rich's")
    from rich.console import Console

    from bench import continual_show

    summaries = {name: continual_rows.summarise(runs) for name, runs in some_runs().items()}
    costs = {"plain": continual_cost.Cost("plain", median_step_ms=12.0, times_plain=1.0)}
    console = Console(width=200)
    with console.capture() as shown:
        console.print(continual_show.draw_table(summaries, costs, ["a", "b", "c"]))
    text = shown.get()
    assert all(METHODS[name].title in text for name in METHODS)
    assert "63.3" not in text  # of neither: (0.7 + 0.7)/2 is the average
    assert "70.0 ± 0.0" in text
    tuning = continual_show.tuning_table({"plain": {1e-4: 0.5, 3e-4: 0.6}}, continual.GRID)
    assert tuning.splitlines()[-1].split() == ["plain", "-", "50.0", "60.0", "-", "-", "0.0003"]


@pytest.mark.timing
@pytest.mark.slow
def test_step_times_are_of_every_method() -> None:
    names = ("plain", "complement")
    costs = continual_cost.times(names, small_encoder(), Setting(batch=4), rounds=3)
    assert list(costs) == list(names)
    assert costs["plain"].times_plain == 1.0
    for cost in costs.values():
        assert 0 < cost.p20_ms <= cost.median_step_ms <= cost.p80_ms
        assert cost.rounds == 3


def test_memory_counts_what_a_method_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = continual_cost.memory("plain", small_encoder(), Setting(batch=4))
    loaded, peak = found["loaded_mib"], found["peak_mib"]
    assert loaded is not None
    assert peak is not None
    assert 0 < loaded <= peak
    cost = continual_cost.Cost(loaded_mib=loaded, peak_mib=peak)
    assert cost.added_mib == peak - loaded
    assert continual_cost.Cost(peak_mib=peak).added_mib is None
    held: list[Tensor] = []

    def heavy(name: str, *_: object) -> tuple[Callable[[], object], float]:
        held.append(torch.ones(32 * 2**20))  # 128 MiB
        return (lambda: None), 0.0

    monkeypatch.setattr(continual_cost, "prepared", heavy)
    more = continual_cost.memory("plain", small_encoder(), Setting(batch=4))
    assert more["peak_mib"] is not None
    assert more["loaded_mib"] is not None
    assert more["peak_mib"] - more["loaded_mib"] > 100


def test_memory_in_a_process_of_its_own_reads_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"loaded_mib": 1.0, "peak_mib": 2.0, "steps_peak_mib": None}

    def answer(command: list[str], **_: object) -> object:
        assert command[1:4] == ["-m", "bench.continual_cost", "plain"]
        failed = "--batch" not in command or command[-1] != "4"
        return type(
            "Done", (), {"returncode": failed, "stdout": json.dumps(figures), "stderr": "why"}
        )

    monkeypatch.setattr(continual_cost.subprocess, "run", answer)
    assert continual_cost.memory_apart("plain", Setting(batch=4)) == figures
    with pytest.raises(RuntimeError, match="memory of plain: why"):
        continual_cost.memory_apart("plain", Setting(batch=5))


# command line


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands on the small encoder and made tasks."""

    def opened(
        setting: Setting, say: Callable[[str], object], *, quick: bool = False
    ) -> tuple[continual.Sequences, list[continual_tasks.Task]]:
        say("reading")
        names = list(TASKS)[:2]
        tasks = [
            continual_tasks.Task(name, ("a", "b", "c"), dict.fromkeys(SPLITS, ())) for name in names
        ]
        made = [
            dataclasses.replace(task, name=name)
            for task, name in zip(small_tasks(2), names, strict=True)
        ]
        found = continual.Sequences(small_encoder(), made, setting, model="small", text="made")
        return found, tasks

    monkeypatch.setattr(continual_tasks, "sources", lambda: "made up")
    for module in (continual, mrr_sweep, redundancy):
        monkeypatch.setattr(module, "opened", opened)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_tune_then_run_writes_rows_costs_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("rich", "matplotlib", "peft"):
        pytest.importorskip(module, reason="what the command draws with and compares to")
    csv, rates = tmp_path / "out.csv", tmp_path / "rates.csv"
    common = ["continual", "--steps", "6", "--batch", "8", "--csv", str(csv), "--rates", str(rates)]
    methods = ["--methods", "plain,peft-osf,complement"]
    assert cli.main([*common, *methods]) == 2
    assert "has no learning rate of plain, peft-osf, complement" in capsys.readouterr().err
    assert cli.main([*common, *methods, "--tune"]) == 0
    assert not csv.exists()
    assert "peft-osf" in capsys.readouterr().out
    rest = ["--seeds", "2", "--rounds", "0"]
    assert cli.main([*common, *methods, *rest]) == 0
    out = capsys.readouterr().out
    assert "Over 2 seeds, 'ours' forgets" in out
    assert len(continual_rows.read(csv)) == 6
    assert csv.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "NOT TRAINED NOW" not in out
    written = csv.read_bytes()
    assert cli.main([*common, *methods, *rest]) == 0
    assert csv.read_bytes() == written
    assert f"6 of 6 runs are taken from {csv}" in capsys.readouterr().out
    monkeypatch.setattr(report, "commit", lambda: "later")
    assert cli.main([*common, *methods, *rest, "--anew"]) == 0
    assert "NOT TRAINED NOW" not in capsys.readouterr().out
    assert {run.commit for run in continual_rows.read(csv).values()} == {"later"}


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_quick_run_takes_one_seed_and_two_steps(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="the table is rich's")
    csv = tmp_path / "quick.csv"
    command = ["continual", "--quick", "--methods", "plain,complement", "--csv", str(csv)]
    assert cli.main([*command, "--rounds", "1"]) == 0
    assert {(r.seed, r.learning_rate) for r in continual_rows.read(csv).values()} == {(0, 1e-3)}
    assert {row["steps"] for row in report.read_csv(csv)} == {"2"}
    assert [row["method"] for row in report.read_csv(tmp_path / "quick_cost.csv")] == [
        "plain",
        "complement",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_quick_run_leaves_the_committed_results_alone(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich", reason="the table is rich's")
    monkeypatch.setattr(continual, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(continual.tempfile, "tempdir", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (root / "bench" / "results").iterdir()}
    for rest in ([], ["--tune"]):
        assert cli.main(["continual", "--quick", "--methods", "plain", "--rounds", "1", *rest]) == 0
    after = {path: path.stat().st_mtime_ns for path in (root / "bench" / "results").iterdir()}
    assert after == before
    assert not (tmp_path / "committed").exists()
    out = capsys.readouterr().out
    written = [path for path in tmp_path.glob("bench-*/*.csv") if "cost" not in path.name]
    assert {path.name for path in written} == {"continual.csv", "continual_lr.csv"}
    assert all(f"rows in {path}" in out for path in written)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_mrr_sweep_and_redundancy_print_and_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="the bar is rich's")
    csv = tmp_path / "mrr.csv"
    command = ["mrr", "--mrr", "0.1,0.5", "--trr", "0.5", "--steps", "3", "--csv", str(csv)]
    for taken in (False, True):
        assert cli.main(command) == 0
        assert ("2 of 2 runs are taken from" in capsys.readouterr().out) == taken
    assert {run.method for run in continual_rows.read(csv).values()} == {
        "adaptive mrr=0.1",
        "adaptive mrr=0.5",
    }
    assert cli.main(["mrr", "--mrr", "0.9", "--trr", "0.5", "--csv", str(csv)]) == 2
    assert "mrr <= trr" in capsys.readouterr().err
    assert cli.main(["redundancy", "--csv", str(tmp_path / "redundancy.csv")]) == 0
    assert "Without the bottom half" in capsys.readouterr().out
    assert len(report.read_csv(tmp_path / "redundancy.csv")) == len(redundancy.CUTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds to be at least 1"),
        (["--steps", "0"], "--steps to be at least 1"),
        (["--batch", "-1"], "--batch to be at least 1"),
        (["--ranks", "0.5"], "--ranks to be two shares in (0, 1), got 0.5"),
        (["--ranks", "0.5,1.5"], "--ranks to be two shares in (0, 1)"),
    ],
)
def test_numbers_that_make_no_run_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="the command draws with rich")
    assert cli.main(["continual", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_methods_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="the command draws with rich")
    assert cli.main(["continual", "--methods", "plain,nothing"]) == 2
    assert "got nothing" in capsys.readouterr().err
    assert set(COMPARED) < set(METHODS)
