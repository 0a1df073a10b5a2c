"""Which runs there are, which are still to be trained, and by which learning rate."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.continual_tasks import Task
from bench.streams import data, rows
from bench.streams.methods import METHODS
from bench.streams.rows import Key, Row, Run
from bench.streams.subject import Subject
from bench.streams.training import Diverged, Outcome, Setting, average, learned, run
from bench.tuning import climb

# A learning rate is the one of which this is highest on validation examples. "learned" is what
# someone sees who trains one task after the other; "average" needs the later tasks.
TUNED_BY: dict[str, Callable[[Outcome, str], float]] = {"learned": learned, "average": average}
SEED = 0  # on which learning rates are tuned

Open = Callable[[data.Stream], Subject]
Say = Callable[[str], object]


class Wanted(NamedTuple):
    """A run that is asked for."""

    stream: str
    method: str
    seed: int
    rate: float

    def __str__(self) -> str:
        rate = f", lr {self.rate:g}" if METHODS[self.method].fixed is None else ""
        return f"{self.method}, stream {self.stream}, seed {self.seed}{rate}"


class Missing(ValueError):
    """A run or a learning rate that is needed first."""


class Runs:
    """Runs of one model on one file: a finished one is read from there, others are trained.

    Args:
        open: makes the model that learns a stream.
        rates: the learning rates that are tried, ascending.
        tuned_on: the stream on which they are tried for all streams with as many steps a task.
        tuned_by: one of ``TUNED_BY``.
        anew: trains what the file has too, once.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        setting: Setting,
        csv: Path,
        open: Open,
        *,
        model: str,
        rates: Sequence[float],
        tuned_on: str = "4",
        tuned_by: str = "learned",
        anew: bool = False,
        say: Say = lambda _: None,
    ) -> None:
        self.tasks, self.setting, self.csv, self.open = tasks, setting, csv, open
        self.model, self.grid, self.anew, self.say = model, rates, anew, say
        self._tuned_on, self.criterion = tuned_on, TUNED_BY[tuned_by]
        self.data = data.fingerprint(tasks.values())
        self._trained: set[Key] = set()

    def tuned_on(self, stream: str) -> str:
        """The stream on which the rates of a stream are tuned: one with as many steps a task."""
        return stream if stream == data.LONG else self._tuned_on

    def known(self) -> list[Run]:
        """The file's runs of this model, setting and data."""
        alike = rows.key(self._row(Wanted("", "", 0, 0.0)))
        free = {"stream", "method", "seed", "learning_rate"}
        fixed = [place for place, name in enumerate(rows.KEY) if name not in free]
        return [
            found
            for key, found in rows.read(self.csv).items()
            if all(key[place] == alike[place] for place in fixed)
        ]

    def finished(self, asked: Iterable[Wanted]) -> dict[Wanted, Run]:
        """Those that the file has, in the order in which they are asked for."""
        there = rows.read(self.csv)
        keys = {wanted: rows.key(self._row(wanted)) for wanted in asked}
        return {
            wanted: there[key]
            for wanted, key in keys.items()
            if key in there and not (self.anew and key not in self._trained)
        }

    def found(self, wanted: Wanted) -> Run | None:
        """From the file."""
        return self.finished([wanted]).get(wanted)

    def steps(self, wanted: Wanted) -> int:
        """How many steps a run takes."""
        stream = data.stream(self.tasks, wanted.stream)
        return self.setting.of(stream.parts).steps * len(stream.tasks)

    def train(self, wanted: Wanted) -> bool:
        """Trains a run that isn't there. False where another process is at it.

        Raises:
            Missing: another run is needed first.
            Diverged: a loss that isn't finite.
        """
        if self.found(wanted) is not None:
            return True
        row = self._row(wanted)
        partial = self._partial(row)
        with _claimed(partial.with_suffix(".lock")) as is_ours:
            if not is_ours:
                return False
            if self.found(wanted) is not None:
                return True
            stream = data.stream(self.tasks, wanted.stream)
            names = [task.name for task in stream.tasks]

            def on_step(number: int, loss: float) -> None:
                self.say(f"{wanted}: task {number + 1} of {len(names)}, {names[number]}")

            outcome = run(
                lambda subject: METHODS[wanted.method].make(subject, lambda: self._radii(wanted)),
                self.open(stream),
                len(names),
                self.setting.of(stream.parts),
                learning_rate=wanted.rate,
                seed=wanted.seed,
                partial=partial,
                on_step=on_step,
            )
            rows.write(self.csv, row, names, outcome)
            partial.unlink(missing_ok=True)  # not before: a run that is killed here writes its rows
            self._trained.add(rows.key(row))
        return True

    def tune(self, method: str, stream: str) -> dict[float, float] | None:
        """Learning rate -> what is tuned by, on validation examples, of those tried.

        A run whose loss overflows counts as 0. None where another process is at it.
        """

        def score(rate: float) -> float:
            wanted = Wanted(self.tuned_on(stream), method, SEED, rate)
            try:
                if not self.train(wanted):
                    raise _Elsewhere
            except Diverged:
                return 0.0
            there = self.found(wanted)
            assert there is not None
            return self.criterion(there.outcome, "validation")

        try:
            return climb(self.grid, score)
        except _Elsewhere:
            return None

    def rates(
        self, methods: Sequence[str], stream: str, given: float | None = None
    ) -> dict[str, float]:
        """The learning rate of each method: the one given, or the tuned one.

        Raises:
            Missing: one that wasn't tuned.
        """
        rates = {name: fixed for name in methods if (fixed := METHODS[name].fixed) is not None}
        asked = {name: METHODS[name].tuned_as or name for name in methods if name not in rates}
        if given is not None:
            return rates | dict.fromkeys(asked, given)
        return rates | self._tuned(asked, stream, ", or give --lr")

    def _tuned(self, asked: Mapping[str, str], stream: str, instead: str = "") -> dict[str, float]:
        """The best learning rate of those tried, of equals the smaller one.

        Args:
            asked: of a method, whose rate it takes.
            instead: what else may be done where one is missing.
        """
        tried: dict[str, list[tuple[float, float]]] = {}
        for one in self.known():
            if (one.stream, one.seed) == (self.tuned_on(stream), SEED):
                score = self.criterion(one.outcome, "validation")
                tried.setdefault(one.method, []).append((score, -one.learning_rate))
        missing = sorted({name for name in asked.values() if name not in tried})
        if missing:
            raise Missing(
                f"bench streams: {self.csv} has no learning rate of "
                f"{', '.join(_on_behalf(name, asked) for name in missing)}, for {self.model}, "
                f"{self.setting.steps} steps of {self.setting.batch}, on stream "
                f"{self.tuned_on(stream)}; run with --tune --stream {self.tuned_on(stream)} "
                f"--methods {','.join(missing)} first{instead}"
            )
        return {name: -max(tried[other])[1] for name, other in asked.items()}

    def needed(self, wanted: Wanted) -> Wanted | None:
        """The run that a run can't do without, by its method's tuned learning rate."""
        other = METHODS[wanted.method].needs
        if not other:
            return None
        rate = self._tuned({wanted.method: other}, wanted.stream)[wanted.method]
        return wanted._replace(method=other, rate=rate)

    def require_needed(self, asked: Sequence[Wanted]) -> None:
        """Refuses runs that need one that is neither in the file nor among those asked for.

        Raises:
            Missing: there is such a run.
        """
        for wanted in asked:
            other = self.needed(wanted)
            if other is not None and other not in asked and self.found(other) is None:
                raise _missing(wanted, other, self.csv)

    def _radii(self, wanted: Wanted) -> list[float]:
        other = self.needed(wanted)
        assert other is not None
        there = self.found(other)
        if there is None:
            raise _missing(wanted, other, self.csv)
        return [line.moved or 0.0 for line in there.outcome.after]

    def _row(self, wanted: Wanted) -> Row:
        return Row(
            model=self.model,
            stream=wanted.stream,
            method=wanted.method,
            seed=wanted.seed,
            learning_rate=wanted.rate,
            steps=self.setting.steps,
            batch=self.setting.batch,
            precision=self.setting.precision,
            data=self.data,
            code=rows.code(),
        )

    def _partial(self, row: Row) -> Path:
        """Where a run keeps its state between two tasks: by all that it is made of, its code too,
        so that no run goes on from what other code has left."""
        name = hashlib.sha256(repr((rows.key(row), row.code)).encode()).hexdigest()[:16]
        return self.csv.with_name(f"{self.csv.stem}.partial") / f"{name}.pt"


def _on_behalf(name: str, asked: Mapping[str, str]) -> str:
    """A method, and for which ones its learning rate is asked for where it isn't for itself."""
    takers = [method for method, whose in asked.items() if whose == name]
    return name if name in takers else f"{name} (for {', '.join(takers)})"


def _missing(wanted: Wanted, other: Wanted, csv: Path) -> Missing:
    return Missing(
        f"bench streams: {wanted.method} moves as far as {other.method} does, of which {csv} has "
        f"no run on stream {other.stream} with seed {other.seed} and lr {other.rate:g}; run "
        f"{other.method} first, or beside it"
    )


class _Elsewhere(Exception):
    """Another process trains what this one needs."""


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the lock, which ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
