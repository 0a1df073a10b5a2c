"""``python -m bench streams``: long streams of tasks, and what each method forgets of them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import minilm, report, smollm
from bench.arguments import listed
from bench.decoder import Decoder
from bench.streams import data, decoder, encoder, rows
from bench.streams.decoder import Reader
from bench.streams.encoder import Encoder
from bench.streams.methods import METHODS
from bench.streams.runs import FIRST_TRIED, TUNED_ON, Open, Runs, Wanted
from bench.streams.subject import Subject
from bench.streams.training import Diverged, Setting

RESULTS = report.ROOT / "bench" / "results"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAIT_S = 20.0


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    streams = commands.add_parser("streams", help="14 and 42 tasks in a row, and what is forgotten")
    streams.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    streams.add_argument("--stream", type=listed, default=["4"], help=", ".join(data.STREAMS))
    streams.add_argument("--methods", type=listed, help=f"of {', '.join(METHODS)}")
    streams.add_argument("--seeds", type=int, default=3, help="0, 1, ...: how many")
    streams.add_argument("--lr", type=float, help="instead of the tuned ones")
    streams.add_argument("--tune", action="store_true", help="find the learning rates")
    streams.add_argument("--model", choices=tuple(MODELS), default="minilm")
    streams.add_argument("--steps", type=int, help="of each task")
    streams.add_argument("--batch", type=int)
    streams.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16")
    streams.add_argument("--csv", type=Path, default=RESULTS / "streams.csv")
    streams.add_argument("--picture", type=Path, help="default: beside the CSV")
    streams.add_argument("--anew", action="store_true", help="train what has rows too")


@dataclass(frozen=True)
class Model:
    """A model that learns streams.

    Attributes:
        opener: of a precision, what makes a subject of a stream.
        steps, batch: of a task, by default.
        rates: the learning rates that are tried.
    """

    opener: Callable[[torch.dtype], Open]
    steps: int
    batch: int
    rates: tuple[float, ...]


def minilm_opener(precision: torch.dtype) -> Open:
    """Raises FileNotFoundError where the model's package isn't installed."""
    directory = minilm.model_directory()
    pretrained = minilm.load(directory)

    def open_stream(stream: data.Stream) -> Subject:
        classes = [len(task.classes) for task in stream.tasks]
        return Encoder(pretrained, encoder.encoded(stream, directory), classes, precision)

    return open_stream


def smollm_opener(precision: torch.dtype) -> Open:
    """Raises FileNotFoundError where the model's package, or one that reads it, isn't installed."""
    pretrained, tokenizer = smollm.load()
    judge = Decoder(tokenizer, precision=precision)

    def open_stream(stream: data.Stream) -> Subject:
        return Reader(pretrained, judge, decoder.encoded(stream.tasks, judge))

    return open_stream


MODELS: dict[str, Model] = {
    "minilm": Model(minilm_opener, 80, 16, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
    "smollm2": Model(smollm_opener, 30, 8, (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)),
}


def run(arguments: argparse.Namespace) -> int:
    """Raises ValueError for a bad argument, data that isn't as it should be, and where a run needs
    another first."""
    from bench.bar import bar_on  # rich: only where something is drawn
    from bench.streams import show
    from bench.streams.plot import draw

    methods = arguments.methods or [name for name, m in METHODS.items() if m.compared]
    _require(arguments, methods)
    model = MODELS[arguments.model]
    setting = Setting(
        arguments.steps or model.steps, arguments.batch or model.batch, arguments.precision
    )
    console = show.console_of()
    with bar_on(console) as progress:
        bar = progress.add_task("reading", total=None)
        runs = Runs(
            data.read(arguments.data),
            setting,
            arguments.csv,
            model.opener(PRECISIONS[arguments.precision]),
            model=arguments.model,
            rates=model.rates,
            anew=arguments.anew,
            say=lambda text: progress.update(bar, description=text, advance=1),
        )
        if arguments.tune:
            tuned = tune(runs, methods, lambda total: progress.update(bar, total=total))
            console.print(f"accuracy on validation at the end of stream {TUNED_ON[0]}, in %:")
            console.print(show.tuning_table(tuned, model.rates), markup=False, highlight=False)
            return 0
        rates = (
            runs.rates(methods) if arguments.lr is None else dict.fromkeys(methods, arguments.lr)
        )
        asked = [
            Wanted(stream, name, seed, rates[name])
            for seed in range(arguments.seeds)
            for stream in arguments.stream
            for name in methods
        ]
        found = [one for wanted in asked if (one := runs.found(wanted)) is not None]
        notice = rows.provenance(found, len(asked), arguments.csv)
        show.say(console, notice)
        missing = [wanted for wanted in asked if runs.found(wanted) is None]
        progress.update(bar, total=sum(runs.steps(wanted) for wanted in missing))
        failed = train(runs, missing)
    for stream in arguments.stream:
        finished: dict[str, list[rows.Run]] = {}
        for wanted in asked:
            one = runs.found(wanted) if wanted.stream == stream else None
            if one is not None:
                finished.setdefault(wanted.method, []).append(one)
        if not finished:
            continue
        console.print(show.figures_table(finished, stream))
        show.say(console, notice)
        show.say(console, show.verdict(finished, stream))
        name = f"{arguments.csv.stem}_{arguments.model}_{stream}.png"
        picture = arguments.picture or arguments.csv.with_name(name)
        try:
            draw(finished, stream, picture)
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)
        else:
            console.print(f"rows in {arguments.csv}, picture in {picture}", soft_wrap=True)
    for text in failed:
        show.say(console, text)
    return 1 if failed else 0


def _require(arguments: argparse.Namespace, methods: Sequence[str]) -> None:
    for what, given, known in (
        ("--methods", methods, tuple(METHODS)),
        ("--stream", arguments.stream, data.STREAMS),
    ):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise ValueError(
                f"bench streams: expected {what} to be some of {', '.join(known)}, got "
                f"{', '.join(unknown) or 'none'}"
            )
    for name in ("seeds", "steps", "batch"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise ValueError(f"bench streams: expected --{name} to be at least 1, got {given}")


def train(runs: Runs, asked: Sequence[Wanted]) -> list[str]:
    """Trains what is asked for; waits for what another process trains. What diverged, in words."""
    failed: list[str] = []

    def is_done(wanted: Wanted) -> bool:
        try:
            return runs.train(wanted)
        except Diverged as error:
            failed.append(f"{wanted}: {error}")
            return True

    waiting = list(asked)
    while waiting := [wanted for wanted in waiting if not is_done(wanted)]:
        time.sleep(WAIT_S)
    return failed


def tune(
    runs: Runs, methods: Sequence[str], expect: Callable[[int], object]
) -> dict[str, dict[float, float]]:
    """Scores of the learning rates tried, by method."""
    todo = list(dict.fromkeys(METHODS[name].tuned_as or name for name in methods))
    tried = len(FIRST_TRIED) + 1  # of most methods
    expect(tried * sum(runs.steps(Wanted(TUNED_ON[0], name, TUNED_ON[1], 0.0)) for name in todo))
    tuned: dict[str, dict[float, float]] = {}
    while todo:
        for name in list(todo):
            scores = runs.tune(name)
            if scores is not None:
                tuned[name] = scores
                todo.remove(name)
        if todo:
            time.sleep(WAIT_S)
    return tuned
