"""``python -m bench streams``: long streams of tasks, and what each method forgets of them."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from bench import minilm, smollm
from bench.decoder import Decoder
from bench.streams import data, decoder, encoder, rows
from bench.streams.decoder import Reader
from bench.streams.encoder import Encoder
from bench.streams.methods import HEADS, METHODS, PRIOR
from bench.streams.runs import SEED, Open, Runs, Wanted
from bench.streams.subject import Subject
from bench.streams.training import Diverged, Setting

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAIT_S = 20.0
TRIED = 3  # learning rates of most methods
Tokens = TypeVar("Tokens")


@dataclass(frozen=True)
class Model:
    """A model that learns streams.

    Attributes:
        opener: of a precision, what makes a subject of a stream.
        steps, batch: of a task, by default.
        rates: the learning rates that are tried.
        tuned_on: the stream on which they are, of all with as many steps a task.
        left_out: methods that it can't be trained by.
    """

    opener: Callable[[torch.dtype], Open]
    steps: int
    batch: int
    rates: tuple[float, ...]
    tuned_on: str
    left_out: tuple[str, ...] = ()


def once(prepare: Callable[[data.Stream], Tokens]) -> Callable[[data.Stream], Tokens]:
    """The same, of each stream by its name once: several runs learn one stream."""
    known: dict[str, Tokens] = {}

    def prepared(stream: data.Stream) -> Tokens:
        if stream.name not in known:
            known[stream.name] = prepare(stream)
        return known[stream.name]

    return prepared


def minilm_opener(precision: torch.dtype) -> Open:
    """Raises FileNotFoundError where the model's package isn't installed."""
    directory = minilm.model_directory()
    pretrained = minilm.load(directory)
    tokens = once(lambda stream: encoder.encoded(stream, directory))

    def open_stream(stream: data.Stream) -> Subject:
        classes = [len(task.classes) for task in stream.tasks]
        return Encoder(pretrained, tokens(stream), classes, precision)

    return open_stream


def smollm_opener(precision: torch.dtype) -> Open:
    """Raises FileNotFoundError where the model's package, or one that reads it, isn't installed."""
    pretrained, tokenizer = smollm.load()
    judge = Decoder(tokenizer, precision=precision)
    tokens = once(lambda stream: decoder.encoded(stream.tasks, judge))

    def open_stream(stream: data.Stream) -> Subject:
        return Reader(pretrained, judge, tokens(stream))

    return open_stream


MODELS: dict[str, Model] = {
    "minilm": Model(minilm_opener, 80, 16, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3), "4", (PRIOR,)),
    "smollm2": Model(smollm_opener, 30, 8, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), data.SHORT, (HEADS,)),
}


def run(arguments: argparse.Namespace) -> int:
    """Raises ValueError for a bad argument, data that isn't as it should be, a state that is
    damaged, and where a run needs another first."""
    from bench.bar import bar_on  # rich: only where something is drawn
    from bench.streams import show
    from bench.streams.plot import draw

    model = MODELS[arguments.model]
    fitting = [name for name in METHODS if name not in model.left_out]
    methods: list[str] | None = arguments.methods
    if methods is None:
        methods = [name for name in fitting if METHODS[name].compared]
    _require(arguments, methods, fitting)
    setting = Setting(
        arguments.steps or model.steps, arguments.batch or model.batch, arguments.precision
    )
    console = show.console_of()
    with bar_on(console) as progress:
        bar = progress.add_task("reading", total=None)
        tasks = data.read(arguments.data)
        _require_place("csv", arguments.csv)
        if arguments.picture is not None:
            _require_place("picture", arguments.picture)
        runs = Runs(
            tasks,
            setting,
            arguments.csv,
            model.opener(PRECISIONS[arguments.precision]),
            model=arguments.model,
            rates=model.rates,
            tuned_on=model.tuned_on,
            tuned_by=arguments.tuned_by,
            anew=arguments.anew,
            say=lambda text: progress.update(bar, description=text, advance=1),
        )
        if arguments.tune:
            when = (
                "of each task right after it" if arguments.tuned_by == "learned" else "at the end"
            )
            for stream in dict.fromkeys(map(runs.tuned_on, arguments.stream)):
                tuned = tune(
                    runs,
                    methods,
                    stream,
                    lambda steps: progress.update(bar, completed=0, total=steps),
                )
                console.print(f"accuracy on validation {when}, stream {stream}, in %:")
                console.print(show.tuning_table(tuned, model.rates), markup=False, highlight=False)
            return 0
        rates = {stream: runs.rates(methods, stream, arguments.lr) for stream in arguments.stream}
        asked = [
            Wanted(stream, name, seed, rates[stream][name])
            for seed in range(arguments.seeds)
            for stream in arguments.stream
            for name in methods
        ]
        taken = runs.finished(asked)
        notice = rows.provenance(list(taken.values()), len(asked), arguments.csv)
        show.say(console, notice)
        missing = [wanted for wanted in asked if wanted not in taken]
        runs.require_needed(missing)
        progress.update(bar, total=sum(map(runs.steps, missing)))
        failed = train(runs, missing)
    finished = runs.finished(asked)
    for stream in arguments.stream:
        by_method: dict[str, list[rows.Run]] = {}
        for wanted, one in finished.items():
            if wanted.stream == stream:
                by_method.setdefault(wanted.method, []).append(one)
        if not by_method:
            continue
        console.print(show.figures_table(by_method, stream))
        show.say(console, notice)
        show.say(console, show.verdict(by_method, stream))
        name = f"{arguments.csv.stem}_{arguments.model}_{stream}.png"
        picture = arguments.picture or arguments.csv.with_name(name)
        try:
            draw(by_method, stream, picture)
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)
        else:
            console.print(f"rows in {arguments.csv}, picture in {picture}", soft_wrap=True)
    for text in failed:
        show.say(console, text)
    return 1 if failed else 0


def _require(arguments: argparse.Namespace, methods: Sequence[str], fitting: Sequence[str]) -> None:
    for what, given, known in (
        (f"--methods of {arguments.model}", methods, fitting),
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
    if arguments.lr is not None and not 0 < arguments.lr < math.inf:
        raise ValueError(
            f"bench streams: expected --lr to be a finite number above 0, got {arguments.lr:g}; "
            "without --lr each method has the rate that --tune found"
        )
    if arguments.tune and all(METHODS[name].fixed is not None for name in methods):
        raise ValueError(
            "bench streams: expected --methods to have one with a learning rate to --tune, got "
            f"{', '.join(methods)}; run without --tune"
        )


def _require_place(name: str, path: Path) -> None:
    """Makes the folder of a file that is written later."""
    trouble = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        trouble = error.strerror or str(error)
    else:
        if path.is_dir():
            trouble = "it is a folder"
        elif not os.access(path if path.exists() else path.parent, os.W_OK):
            trouble = "it can't be written to"
    if trouble:
        raise ValueError(
            f"bench streams: expected --{name} to be a file that can be written, got {path}: "
            f"{trouble}; name another one"
        )


def train(runs: Runs, asked: Sequence[Wanted]) -> list[str]:
    """Trains what is asked for; waits for what another process trains, or another run needs.
    Returns what diverged, in words."""
    failed: dict[Wanted, str] = {}

    def is_done(wanted: Wanted) -> bool:
        other = runs.needed(wanted)
        if other in failed:
            failed[wanted] = f"{wanted}: needs {other}"
            return True
        if other is not None and runs.found(other) is None:
            return False
        try:
            return runs.train(wanted)
        except Diverged as error:
            failed[wanted] = f"{wanted}: {error}"
            return True

    waiting = sorted(asked, key=lambda wanted: bool(METHODS[wanted.method].needs))
    while waiting := [wanted for wanted in waiting if not is_done(wanted)]:
        time.sleep(WAIT_S)
    return list(failed.values())


def tune(
    runs: Runs, methods: Sequence[str], stream: str, expect: Callable[[int], object]
) -> dict[str, dict[float, float]]:
    """Scores of the learning rates tried, by method."""
    tunable = [name for name in methods if METHODS[name].fixed is None]
    todo = list(dict.fromkeys(METHODS[name].tuned_as or name for name in tunable))
    expect(TRIED * sum(runs.steps(Wanted(stream, name, SEED, 0.0)) for name in todo))
    tuned: dict[str, dict[float, float]] = {}
    while todo:
        for name in list(todo):
            scores = runs.tune(name, stream)
            if scores is not None:
                tuned[name] = scores
                todo.remove(name)
        if todo:
            time.sleep(WAIT_S)
    return tuned
