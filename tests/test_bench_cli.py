"""What the bench prints, writes and refuses: suite, pictures, files, command line."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as cli
from bench import (
    contenders,
    continual_cost,
    continual_rows,
    integrations_galore,
    integrations_mini_trainer,
    integrations_peft,
    integrations_stiefel,
    optimizer_state,
    optimizers,
    overhead,
    plot,
    protection_rows,
    redundancy,
    refresh,
    refresh_auto,
    report,
    rounding,
    static,
    suite,
    traffic_cli,
)
from bench.streams import rows as streams_rows

CPU = torch.device("cpu")


# suite, plot, overhead


def test_cpu_suite_is_the_six_committed_cases() -> None:
    cases = [target.case(CPU) for target in suite.CPU_SUITE]
    ranks = [(c.model, c.dtype, c.rank.of(c.shapes[0])) for c in cases]
    assert ranks == [
        ("4096x4096", "fp32", 64),
        ("4096x4096", "fp32", 2048),
        ("4096x4096", "fp32", 3277),
        ("4096x4096", "bf16", 64),
        ("4096x4096", "bf16", 3277),
        ("minilm", "fp32", 192),
    ]


def test_verdicts() -> None:
    assert suite.verdict(4.0, 3.5) == "reached"
    assert suite.verdict(2.7, 3.5) == "within noise"
    assert suite.verdict(2.6, 3.5) == "missed"
    assert suite.verdict(None, 3.5) == "no speed"


def row(contender: str, median: str, p20: str, p80: str) -> dict[str, str]:
    return {"case": "c", "contender": contender, "median_ms": median, "p20_ms": p20, "p80_ms": p80}


def test_speed_ups_are_over_naive_and_leave_out_what_has_no_speed() -> None:
    rows = [
        row(contenders.NAIVE, "8", "7", "9"),
        row(contenders.OURS, "2", "1.6", "4"),
        row(contenders.COMPILED, "", "", ""),
    ]
    assert plot.speed_ups(rows) == {"c": {contenders.OURS: (4.0, 2.0, 5.0)}}
    assert plot.speed_ups(rows[1:]) == {}


def test_plot_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    where = dict.fromkeys(report.ENVIRONMENT_FIELDS, "x") | {"gpu": ""}
    rows = [
        row(contenders.NAIVE, "8", "7", "9") | where,
        row(contenders.OURS, "2", "1.6", "4") | where,
    ]
    plot.draw(rows, tmp_path / "deep" / "picture.png")
    assert (tmp_path / "deep" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to plot"):
        plot.draw(rows[1:], tmp_path / "none.png")


def test_the_legend_names_every_contender_once_and_lies_outside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib draws the picture")
    where = dict.fromkeys(report.ENVIRONMENT_FIELDS, "x") | {"gpu": ""}
    first = [row(contenders.NAIVE, "8", "7", "9"), row(contenders.OURS, "2", "1.6", "4")]
    second = [*first, row(contenders.HAND, "4", "3", "5")]
    rows = [r | where for r in first] + [r | where | {"case": "d"} for r in second]
    kept: list[Any] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    plot.draw(rows, tmp_path / "picture.png")
    monkeypatch.undo()
    (figure,) = kept
    (axes,), (legend,) = figure.axes, figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    pyplot.close(figure)
    assert sorted(texts) == sorted([contenders.HAND, contenders.OURS])
    assert axes.get_legend() is None
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize("spans", ["high", "low"])
def test_overhead_compares_like_with_like(spans: str) -> None:
    form, calls = overhead.calls(spans, torch.Generator().manual_seed(1))
    assert form in overhead.BARE
    results = {name: call() for name, call in calls.items()}
    assert isinstance(results["project"], Tensor)
    torch.testing.assert_close(results["project"], results["bare"], atol=1e-5, rtol=0)
    torch.testing.assert_close(results["project_"], results["bare, in place"], atol=1e-5, rtol=0)


def test_host_times_every_call_without_a_device(root: Path, tmp_path: Path) -> None:
    """In a process of its own, since Triton has to be told to interpret before it is imported."""
    path = tmp_path / "host.csv"
    command = [sys.executable, "-m", "bench", "host", "--layers", "1", "--rounds", "2"]
    done = subprocess.run(
        [*command, "--csv", str(path)], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, 1), done.stderr  # 1: slower than it is to be
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    calls = {row["contender"] for row in rows}
    assert calls >= {"prepared, g as before", "prepared, g elsewhere", "project_, g elsewhere"}
    assert all(float(row["median_ms"]) > 0 for row in rows)
    named = done.stdout.count("above what it is to be")
    assert (named > 0) == (done.returncode == 1)


# progress


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_progress_in_a_log_is_a_line_at_first_and_then_by_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=False))
    say = report.progress()
    for text, later in (("a", 0.0), ("b", 9.0), ("", 2.0), ("c", 0.0), ("d", 1.0), ("", 99.0)):
        now[0] += later
        say(text)
    assert stream.getvalue() == "a\nc\n"


def test_progress_on_a_terminal_is_one_line_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=True))
    say = report.progress()
    for text in ("a", "b", ""):
        say(text)
    assert stream.getvalue() == "\r\033[Ka\r\033[Kb\r\033[K"


def test_a_bar_without_a_terminal_says_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    console = pytest.importorskip("rich.console", reason="rich draws the bar")
    from bench.bar import bar_on

    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=False))
    for terminal in (False, True):
        with bar_on(console.Console(file=io.StringIO(), force_terminal=terminal)) as progress:
            task = progress.add_task("reading", total=2)
            progress.update(task, description=f"step on a terminal: {terminal}", advance=1)
            assert progress.tasks[0].completed == 1
    assert stream.getvalue() == "step on a terminal: False\n"


# files and command line


def test_csv_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        report.append_csv(path, [], {})


def test_committed_results_have_todays_columns(root: Path) -> None:
    kinds = {
        "host_cpu.csv": report.Row,
        "overhead_cpu.csv": report.Row,
        "projection_cpu.csv": report.Row,
        "refresh_cpu.csv": refresh.RefreshRow,
        "refresh_figures_cpu.csv": refresh.RefreshRow,
        "refresh_auto_cpu.csv": refresh_auto.AutoRow,
        "protect_cpu.csv": protection_rows.Row,
        "confine_cpu.csv": protection_rows.Row,
        "rounding_cpu.csv": rounding.Row,
        "optimizers_cpu.csv": optimizers.Row,
        "optimizer_state_cpu.csv": optimizer_state.Row,
        "continual.csv": continual_rows.Row,
        "continual_lr.csv": continual_rows.Row,
        "continual_mrr.csv": continual_rows.Row,
        "streams.csv": streams_rows.Row,
        "continual_cost.csv": continual_cost.Cost,
        "redundancy.csv": redundancy.Row,
        "integrations_galore_cpu.csv": integrations_galore.Row,
        "integrations_mini_trainer_cpu.csv": integrations_mini_trainer.Row,
        "integrations_peft_cpu.csv": integrations_peft.Row,
        "integrations_stiefel_cpu.csv": integrations_stiefel.Row,
        "static.csv": static.Row,
        "traffic.csv": traffic_cli.Row,
    }
    found = sorted((root / "bench" / "results").glob("*.csv"))
    assert found
    for path in found:
        with path.open(newline="") as file:
            assert tuple(next(csv.reader(file))) == report.columns(kinds[path.name]), path.name


def test_show_prints_every_committed_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((root / "bench" / "results").glob("*.csv")):
        assert cli.main(["show", str(path)]) == 0
        rows = report.read_csv(path)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) - len(rows) in (2, 3), path.name
        assert rows[-1]["commit"] not in lines[-1]


def test_show_says_once_what_all_rows_share() -> None:
    rows = [
        {"a": "1", "b": "x", "c": "", "commit": "k"},
        {"a": "1", "b": "", "c": "", "commit": "l"},
    ]
    assert report.short_table(rows) == "a=1\nb\n-\nx\n-"
    assert report.short_table(rows[:1]) == "a=1, b=x\n1 rows alike"
    assert report.short_table([]) == "no rows"


def test_plot_refuses_rows_that_it_cannot_draw(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("continual.csv", "refresh_auto_cpu.csv"):
        path = root / "bench" / "results" / name
        assert cli.main(["plot", str(path), str(tmp_path / "p.png")]) == 2
        assert f"got none in {path}" in capsys.readouterr().err


def test_cells_keep_four_digits_and_leave_unmeasured_empty() -> None:
    assert [report.cell(v) for v in (None, 0.000123456, 12345.6, 7, "x")] == [
        "",
        "0.0001235",
        "1.235e+04",
        "7",
        "x",
    ]


def test_cases_are_every_combination() -> None:
    arguments = cli.parser().parse_args(
        ["projection", "--model", "8x8,16x8", "--rank", "2", "--rank", "0.5", "--dtype", "bf16"]
    )
    assert [c.name for c in cli.cases(arguments)] == [
        "8x8 bf16 r=2",
        "8x8 bf16 rho=0.5",
        "16x8 bf16 r=2",
        "16x8 bf16 rho=0.5",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt"], "expected --model"),
        (["--rank", "0"], "expected --rank"),
        (["--dtype", "int8"], "expected --dtype to be one of fp64, fp32, bf16, fp16, got 'int8'"),
        (["--backend", "rocm"], "expected --backend to be auto, torch, triton or cuda"),
        (["--device", "meta"], "expected --device to be cpu, cuda or cuda:N"),
        (["--rounds", "-1"], "expected --rounds to be 0 or more"),
        (["--layers", "2"], "--layers needs a model"),
        (
            ["--model", "256x512", "--rank", "257"],
            "--rank to be at most the shorter side, 256, got 257",
        ),
        (["--model", "minilm", "--rank", "385"], "at most the shorter side, 384, got 385"),
    ],
)
def test_bad_arguments_are_refused_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["projection", "--list", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", ["4 x 384x384", "4x384x384"])
def test_cases_go_with_and_without_spaces(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measure(case: str, *_: object) -> list[integrations_peft.Row]:
        asked.append(case)
        return [integrations_peft.Row(case, "step", None, "cpu", "c")]

    monkeypatch.setattr(integrations_peft, "measure", measure)
    assert integrations_peft.main(["--case", given]) == 0
    assert asked == ["4 x 384x384"]
    with pytest.raises(SystemExit):
        integrations_peft.main(["--case", "4x384"])
    assert "invalid choice: '4x384'" in capsys.readouterr().err


def test_make_bench_goes_on_after_a_miss_and_fails_at_the_end(root: Path, tmp_path: Path) -> None:
    """With a stand-in interpreter, so that nothing is measured."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\ncase "$*" in *protect_cpu*) exit 1 ;; esac\n')
    python.chmod(0o755)
    command = ["make", "bench", f"VENV={tmp_path}", "-o", str(tmp_path / ".installed")]
    (tmp_path / ".installed").touch()

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=60, check=False
        )

    done = run()
    assert done.returncode != 0
    assert "failed: bench protect; see above" in done.stderr
    for later in ("integrations_peft", "integrations_stiefel", "bench refresh --suite all"):
        assert later in done.stdout
    python.write_text("#!/bin/sh\n")
    assert run().returncode == 0


def test_a_missing_gpu_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["projection", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_needs_no_rich() -> None:
    """A GPU machine may lack it; only the demo draws with it."""
    code = "import sys; sys.modules['rich'] = None; import bench.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=report.ROOT, check=True, timeout=120)
