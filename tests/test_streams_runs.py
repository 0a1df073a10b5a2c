"""The runs of a file: what is taken from it, tuned, told, drawn, and trained by whom."""

from __future__ import annotations

import fcntl
import re
from pathlib import Path

import pytest

from bench.streams import arguments, cli, data, plot, rows, show
from bench.streams.methods import DEFAULT, HEADS, HEADS_RATE
from bench.streams.runs import SEED, TUNED_BY, Missing, Runs, Wanted
from bench.streams.training import After, Outcome, Setting
from tests.small_streams import open_small, write_folder

SETTING = Setting(steps=1, batch=2, precision="fp32")
PLAIN = Wanted("4", "plain", 0, 1e-3)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return write_folder(tmp_path / "data", per_label=2)


def runs_of(folder: Path, csv: Path, **options: object) -> Runs:
    return Runs(data.read(folder), SETTING, csv, open_small, model="small", rates=RATES, **options)  # type: ignore[arg-type]


def test_a_finished_run_is_read_and_not_trained_again(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv, say=said.append)
    assert runs.found(PLAIN) is None
    assert runs.train(PLAIN)
    assert len(said) == SETTING.steps * 14 == runs.steps(PLAIN)
    first = runs.found(PLAIN)
    assert first is not None
    assert first.names == data.ORDERS["4"]
    assert [len(line.test) for line in first.outcome.after] == [1] * 13 + [14]
    assert [len(line.course) for line in first.outcome.after][:6] == [0, 0, 3, 0, 0, 6]
    assert runs.train(PLAIN)
    assert len(said) == SETTING.steps * 14
    assert runs_of(folder, csv).found(PLAIN) == first
    # Others are trained: another seed, learning rate, or data.
    assert runs.found(PLAIN._replace(seed=1)) is None
    assert runs.found(PLAIN._replace(rate=2e-3)) is None
    (folder / "cb.jsonl").write_text((folder / "cb.jsonl").read_text().replace("cb", "bc"))
    assert runs_of(folder, csv).found(PLAIN) is None


def test_a_run_that_is_killed_before_its_rows_are_written_is_not_trained_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv, say=said.append)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rows, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.train(PLAIN)
    assert runs.found(PLAIN) is None
    assert len(said) == runs.steps(PLAIN)
    assert runs.train(PLAIN)
    assert len(said) == runs.steps(PLAIN)
    assert runs.found(PLAIN) is not None
    assert not list(csv.with_name("rows.partial").glob("*.pt"))


def test_anew_trains_once_and_its_rows_count(folder: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    runs_of(folder, csv).train(PLAIN)
    said: list[str] = []
    anew = runs_of(folder, csv, anew=True, say=said.append)
    assert anew.found(PLAIN) is None
    anew.train(PLAIN)
    anew.train(PLAIN)
    assert len(said) == SETTING.steps * 14
    assert len(rows.read(csv)) == 1


def test_a_run_that_another_process_trains_is_left_to_it(folder: Path, tmp_path: Path) -> None:
    runs = runs_of(folder, tmp_path / "rows.csv")
    partial = runs._partial(runs._row(PLAIN))
    partial.parent.mkdir()
    with partial.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert runs.train(PLAIN) is False
        assert runs.found(PLAIN) is None
    assert runs.train(PLAIN) is True


def known(
    csv: Path,
    runs: Runs,
    wanted: Wanted,
    score: float,
    *,
    own: float | None = None,
    moved: float = 1.0,
    general: float | None = 3.0,
) -> None:
    """Puts a run into the file whose accuracies are all ``score``; before the last task ``own``."""
    names = data.ORDERS["4"]
    after = []
    for number in range(14):
        accuracies = [score] * 14 if number == 13 else [score if own is None else own]
        course = [score] * (number + 1) if number % 3 == 2 else []
        loss = None if general is None else general + number
        after.append(After(accuracies, accuracies, course, moved, 1.0, loss, 2.0))
    rows.write(csv, runs._row(wanted), names, Outcome(after, 30.0, general))


def test_the_learning_rate_is_the_best_on_validation_of_equals_the_smaller(
    folder: Path, tmp_path: Path
) -> None:
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv)
    scores = {1e-4: 0.5, 3e-4: 0.6, 1e-3: 0.6, 3e-5: 0.4, 3e-3: 0.9}
    for rate, score in scores.items():
        known(csv, runs, Wanted("4", "plain", SEED, rate), score)
    tried = runs.tune("plain", "4")
    # From the first two upwards for as long as it gets better: 3e-3 isn't reached.
    assert tried == pytest.approx({rate: scores[rate] for rate in (1e-4, 3e-4, 1e-3)})
    del scores[3e-3]
    assert runs.rates(["plain", "matched"], "4") == {"plain": 3e-3, "matched": 3e-3}
    with pytest.raises(Missing, match=r"has no learning rate of lora, for small, 1 steps of 2, on"):
        runs.rates(["plain", "lora"], "4")
    assert runs.rates(["plain", "lora"], "4", 0.5) == {"plain": 0.5, "lora": 0.5}


def test_heads_have_one_rate_for_their_rows_and_need_no_other(folder: Path, tmp_path: Path) -> None:
    runs = runs_of(folder, tmp_path / "rows.csv")
    for given in (None, 0.5):
        assert runs.rates([HEADS], "4", given) == {HEADS: HEADS_RATE}
    assert HEADS_RATE == 1e-4  # of the rows that there are
    assert str(Wanted("4", HEADS, 0, HEADS_RATE)) == "heads, stream 4, seed 0"
    with pytest.raises(Missing, match=r"no learning rate of plain, for .* --methods plain first"):
        runs.rates([HEADS, "plain"], "4")


def test_a_rate_that_another_method_takes_is_asked_for_on_its_behalf(
    folder: Path, tmp_path: Path
) -> None:
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv)
    message = r"of bases-inputs \(for soft-1, rank-half\), plain, .* bases-inputs,plain first, or"
    with pytest.raises(Missing, match=message):
        runs.rates(["soft-1", "rank-half", "plain"], "4")
    with pytest.raises(Missing, match=r"of bases-inputs, for small"):
        runs.rates(["soft-1", "bases-inputs"], "4")
    with pytest.raises(
        Missing, match=rf"of {DEFAULT} \(for matched\), .*--methods {DEFAULT} first$"
    ):
        runs.train(Wanted("4", "matched", 0, 1e-3))


def test_a_stream_takes_rates_of_one_with_as_many_steps_a_task(
    folder: Path, tmp_path: Path
) -> None:
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv)
    assert [runs.setting.of(data.stream(runs.tasks, name).parts) for name in data.STREAMS] == [
        runs.setting.of(data.stream(runs.tasks, runs.tuned_on(name)).parts) for name in data.STREAMS
    ]
    known(csv, runs, Wanted("4", "plain", SEED, 1e-4), 0.5)
    assert runs.rates(["plain"], "5") == {"plain": 1e-4}
    with pytest.raises(
        Missing, match=r"on stream 4x3; run with --tune --stream 4x3 --methods plain first"
    ):
        runs.rates(["plain"], data.LONG)
    known(csv, runs, Wanted(data.LONG, "plain", SEED, 3e-4), 0.5)
    assert runs.rates(["plain"], data.LONG) == {"plain": 3e-4}
    short = runs_of(folder, csv, tuned_on=data.SHORT)
    with pytest.raises(Missing, match=r"on stream short; run with --tune --stream short --methods"):
        short.rates(["plain"], "4")
    known(csv, runs, Wanted(data.SHORT, "plain", SEED, 1e-3), 0.5)
    assert short.rates(["plain"], "4") == short.rates(["plain"], data.SHORT) == {"plain": 1e-3}
    assert short.rates(["plain"], data.LONG) == {"plain": 3e-4}


def test_tuned_by_what_is_learned_or_by_what_is_left(folder: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    learned, left = (runs_of(folder, csv, tuned_by=by) for by in ("learned", "average"))
    for rate, own, score in ((3e-5, 0.4, 0.3), (1e-4, 0.5, 0.45), (3e-4, 0.6, 0.4), (1e-3, 0.5, 0)):
        known(csv, learned, Wanted("4", "plain", SEED, rate), score, own=own)
    assert set(learned.tune("plain", "4") or ()) == {1e-4, 3e-4, 1e-3}
    assert learned.rates(["plain"], "4") == {"plain": 3e-4}
    assert left.tune("plain", "4") == pytest.approx({3e-5: 0.3, 1e-4: 0.45, 3e-4: 0.4})
    assert left.rates(["plain"], "4") == {"plain": 1e-4}
    assert tuple(TUNED_BY) == arguments.CRITERIA


def test_a_matched_run_needs_the_other_one(folder: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv)
    known(csv, runs, Wanted("4", DEFAULT, 0, 1e-3), 0.5, moved=0.02)
    matched = Wanted("4", "matched", 1, 1e-3)
    lacking = rf"as far as {DEFAULT} does, .* stream 4 with seed 1 and lr 0.001; run"
    with pytest.raises(Missing, match=lacking):
        runs.train(matched)
    with pytest.raises(Missing, match=lacking):
        runs.require_needed([matched])
    ours = runs.needed(matched)
    assert ours == Wanted("4", DEFAULT, 1, 1e-3)
    runs.require_needed([matched, ours])
    assert cli.train(runs, [matched, ours]) == []
    assert list(runs.finished([matched, ours])) == [matched, ours]
    runs.train(matched._replace(seed=0))
    found = runs.found(matched._replace(seed=0))
    assert found is not None
    assert all(line.moved is not None and line.moved < 0.0201 for line in found.outcome.after)


def test_what_is_taken_is_told_with_the_code_that_trained_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv)
    known(csv, runs, PLAIN, 0.5)
    told = rows.provenance(runs.known(), 3, csv)
    assert re.match(r"NOT TRAINED NOW: 1 of 3 runs are taken from .*: 1 by this code at", told)
    monkeypatch.setattr(rows, "code", lambda: "another")
    assert f"1 by OTHER CODE {runs.known()[0].code}" in rows.provenance(runs.known(), 3, csv)
    assert rows.provenance([], 3, csv) == ""


def test_a_run_whose_rows_were_cut_off_is_none(folder: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv)
    known(csv, runs, PLAIN, 0.5)
    lines = csv.read_text().splitlines(keepends=True)
    csv.write_text("".join(lines[:-1]) + lines[-1][:40])
    assert runs.found(PLAIN) is None
    known(csv, runs, PLAIN, 0.25)
    found = runs.found(PLAIN)
    assert found is not None
    assert found.outcome.last() == [0.25] * 14


def test_rows_of_other_columns_are_refused(folder: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    csv.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        runs_of(folder, csv).found(PLAIN)


def test_the_code_is_told_apart_by_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows.report, "ROOT", tmp_path)
    monkeypatch.setattr(rows, "CODE", ("library",))
    monkeypatch.setattr(rows, "MODULES", ("bench.one",))
    for folder in ("library", "bench/deep"):
        (tmp_path / folder).mkdir(parents=True)

    def code(**texts: str) -> str:
        for name, text in texts.items():
            (tmp_path / (name.replace("__", "/") + ".py")).write_text(text)
        rows.code.cache_clear()
        return rows.code()

    first = code(
        library__a="x = 1\n",
        bench__one='"""A."""\nfrom bench import two\nx = 1\n',
        bench__two="def f():\n    from bench.deep.three import y\n",
        bench__deep__three="from bench import one\ny = 1\n",
        bench__four="x = 1\n",
    )
    same = '"""B."""\nfrom bench import two\nx = 1  # why\n'
    assert code(bench__one=same) == first
    assert code(bench__four="x = 2\n") == first  # which nothing imports
    others = [code(bench__deep__three="y = 2\n"), code(library__a="x = 2\n")]
    assert len({first, *others}) == 3
    rows.code.cache_clear()


def test_table_verdict_and_picture(folder: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv)
    scores = {"plain": 0.5, "lora": 0.52, "peft-osf": 0.55, "replay": 0.63, DEFAULT: 0.62}
    for name, score in scores.items():
        for seed in range(2):
            known(csv, runs, Wanted("4", name, seed, 1e-3), score)
    found: dict[str, list[rows.Run]] = {}
    for one in runs.known():
        found.setdefault(one.method, []).append(one)
    said = show.verdict(found, "4")
    assert "2 seeds" in said
    assert (
        "Its average accuracy is 62.0, the best other one 55.0 (OSF (peft)): above it, yes" in said
    )
    assert "replay reaches 63.0: within 1.5 points, yes" in said
    assert "less, NO" in said  # all forget nothing
    assert "lora did not run" in show.verdict({n: r for n, r in found.items() if n != "lora"}, "4")
    table = show.figures_table(found, "4")
    assert table.row_count == len(scores)
    assert "general: how much" in str(table.caption)
    assert list(table.columns[-1].cells) == ["1300.0 ± 0.0"] * len(scores)  # from 3 to 16 nats
    assert plot.general(found["plain"]) == (list(range(15)), [3.0, *range(3, 17)])
    known(csv, runs, Wanted("4", "olora", 0, 1e-3), 0.25, own=0.75)
    other = [one for one in runs.known() if one.method == "olora"]
    looked = ([3, 6, 9, 12], [25.0] * 4)
    assert plot.so_far(other) == (looked, ([14], [25.0]))
    assert plot.of_task(other, 0) == (looked, ([1, 14], [75.0, 25.0]))
    assert plot.of_task(other, 13) == (([], []), ([14, 14], [25.0, 25.0]))


def test_a_table_of_one_seed_has_no_deviations_and_explains_its_own_columns(
    folder: Path, tmp_path: Path
) -> None:
    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv)
    known(csv, runs, Wanted("4", HEADS, 0, HEADS_RATE), 0.5, general=None)
    known(csv, runs, PLAIN, 0.25, general=None)
    found = {one.method: [one] for one in runs.known()}
    table = show.figures_table(found, "4")
    assert [list(column.cells) for column in table.columns[2:6]] == [
        ["-", "0.001"],
        ["50.0", "25.0"],
        ["50.0", "25.0"],
        ["0.0", "0.0"],
    ]
    assert "one seed" in str(table.title)
    assert "general" not in str(table.caption)
    assert table.columns[-1].header == "s"
    known(csv, runs, PLAIN._replace(seed=1), 0.75, general=None)
    two = [one for one in runs.known() if one.method == "plain"]
    table = show.figures_table(found | {"plain": two}, "4")
    assert list(table.columns[3].cells) == ["50.0", "50.0 ± 35.4"]
    assert "standard deviation over the seeds" in str(table.title)


def test_the_picture_says_how_many_examples_lines_and_dots_are_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    csv = tmp_path / "rows.csv"
    runs = runs_of(folder, csv)
    known(csv, runs, PLAIN, 0.5)
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot.draw({"plain": runs.known()}, "4", tmp_path / "picture.png")
    monkeypatch.undo()
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    (figure,) = drawn
    (legend,) = figure.subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain fine-tuning"]
    below = figure.subfigs[1]._supxlabel.get_text()
    assert "lines: 64 test examples; dots: 250" in below
    plt.close(figure)
