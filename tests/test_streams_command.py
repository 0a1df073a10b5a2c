"""``python -m bench streams`` as a user calls it: what it refuses, how it ends, what it shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.streams import cli, data
from bench.streams.methods import METHODS
from bench.streams.runs import Runs, Wanted
from tests.small_streams import open_small, write_folder

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
Call = Callable[..., int]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return write_folder(tmp_path / "data", per_label=2)


@pytest.fixture
def call(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command with a small model, one step a task, and rows in ``rows.csv``."""
    monkeypatch.setitem(cli.MODELS, "minilm", cli.Model(lambda _: open_small, 80, 16, RATES, "4"))
    rows = str(tmp_path / "rows.csv")

    def called(*given: str) -> int:
        fixed = ["--data", str(folder), "--csv", rows, "--steps", "1", "--batch", "2"]
        return command.main(["streams", *fixed, "--precision", "fp32", *given])

    return called


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--methods", "magic"],
            r"expected --methods of minilm to be some of heads, plain, .* got magic",
        ),
        (["--methods", "heads", "--model", "smollm2"], r"of smollm2 to be .* got heads"),
        (["--stream", "6"], r"expected --stream to be some of 4, 5, 4x3, short, got 6"),
        (["--seeds", "0"], r"expected --seeds to be at least 1, got 0"),
        (["--methods", ""], r"expected --methods of minilm to be some of heads, .* got none"),
        (["--lr", "-1"], r"expected --lr to be a finite number above 0, got -1; without --lr"),
        (["--lr", "0"], r"above 0, got 0;"),
        (["--lr", "nan"], r"above 0, got nan;"),
        (["--lr", "inf"], r"above 0, got inf;"),
        (["--methods", "heads", "--tune"], r"one with a learning rate to --tune, got heads; run"),
        (["--data", "/nowhere"], r"expected a folder of tasks, got /nowhere"),
    ],
)
def test_a_bad_argument_is_named(
    folder: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["streams", "--data", str(folder), *given]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["csv", "picture"])
def test_a_file_that_can_not_be_written_is_named_before_training(
    call: Call, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file" / "x.csv", ".+"), (tmp_path, "it is a folder")):
        assert call("--methods", "plain", "--lr", "1e-3", f"--{name}", str(path)) == 2
        wanted = rf"expected --{name} to be a file .*, got {path}: {why}; name another one"
        assert re.search(wanted, capsys.readouterr().err)
    assert not list(tmp_path.glob("*.partial"))


def stopped(call: Call, monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    """Ends a run by Ctrl-C in the third task."""
    steps = 0

    def ending(tasks: dict[str, object], *rest: object, **options: object) -> Runs:
        def say(text: str) -> None:
            nonlocal steps
            steps += 1
            if steps == 3:
                raise KeyboardInterrupt

        return Runs(tasks, *rest, **options | {"say": say})  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(cli, "Runs", ending)
        assert call(*given) == 130
    assert steps == 3


def test_a_command_that_is_stopped_goes_on_after_the_last_finished_task(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--methods", "plain", "--lr", "1e-3", "--seeds", "1")
    stopped(call, monkeypatch, *given)
    err = capsys.readouterr().err
    assert err.endswith("stopped; the same command goes on after the last finished task\n")
    assert "Traceback" not in err
    (state,) = (tmp_path / "rows.partial").glob("*.pt")
    whole = state.read_bytes()
    for torn in (b"", b"none of torch's", whole[: len(whole) // 2], whole[:-100], whole[:1000]):
        state.write_bytes(torn)
        assert call(*given) == 2
        message = rf"expected {state} to be the state of a run .*, got .*; delete it, and the same"
        err = capsys.readouterr().err
        (line,) = [line for line in err.splitlines() if "expected" in line]
        assert re.search(message, line)
    state.write_bytes(whole)
    tasks: list[str] = []
    train = Runs.train

    def heard(self: Runs, wanted: Wanted) -> bool:
        say = self.say
        self.say = lambda text: (tasks.append(text), say(text))
        return train(self, wanted)

    monkeypatch.setattr(Runs, "train", heard)
    assert call(*given) == 0
    assert len(tasks) == len(data.ORDERS["4"]) - 2
    assert "task 3 of 14" in tasks[0]


def test_heads_are_trained_without_a_learning_rate(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--methods", "plain,heads") == 2
    assert "has no learning rate of plain, for minilm" in capsys.readouterr().err
    assert call("--methods", "heads", "--seeds", "1") == 0
    out = capsys.readouterr().out
    assert re.search(r"heads alone +│ +1 │ +- │", out)
    assert "±" not in out


def test_help_tells_what_seeds_methods_and_csv_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["streams", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "how many seeds, from 0 on" in told
    assert "an unknown one lists all" in told
    assert re.search(r"of the rows; default: \S*/results/ ?streams\.csv", told)


def test_the_command_trains_shows_and_draws(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--methods", "heads,plain", "--tune") == 0
    out = capsys.readouterr().out
    assert "accuracy on validation" in out
    assert "heads" not in out
    assert call("--methods", "plain", "--seeds", "2") == 0
    out = capsys.readouterr().out
    assert "NOT TRAINED NOW: 1 of 2 runs" in out  # the tuning's own
    assert METHODS["plain"].title in out
    assert "No verdict on stream 4" in out
    assert (tmp_path / "rows_minilm_4.png").exists()
