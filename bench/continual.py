"""``python -m bench continual``: five tasks one after the other, and what each method forgets.

The trained MiniLM encoder learns five classification tasks in a row from text that installed
packages ship, with a head a task, by plain fine-tuning, LoRA and OSF of peft, and ours. Every
method trains the nn.Linear weights of the encoder alone (or adapters of them), with AdamW, the same
batches and heads, and with the learning rate of a grid at which it learned best: the mean
validation accuracy right after each task, with seed 0 (``--tune``; ``continual_lr.csv``). What is
left of it after later tasks doesn't count there, since who learns in sequence doesn't know them
yet. The variants of ours take the one of ours. No test document is looked at before that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import continual_cost, continual_tasks, minilm, report
from bench.continual_cost import Cost
from bench.continual_methods import COMPARED, METHODS
from bench.continual_plot import draw
from bench.continual_rows import (
    Key,
    Row,
    Run,
    counterpart,
    key,
    provenance,
    read,
    rows_of,
    summarise,
    verdict,
    write,
)
from bench.continual_run import (
    Build,
    EncodedTask,
    Setting,
    encode,
    learned,
    train_sequence,
)
from bench.continual_tasks import Split
from bench.training_cli import RESULTS
from bench.tuning import climb

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
TUNING_SEED = 0
JUDGED = ("complement", "inputs")
COUNTERPARTS = {"confine": "complement", "confine-inputs": "inputs"}  # with the same bases
TRAINED, RANDOM = "all-MiniLM-L6-v2", "random"
QUICK = minilm.Config(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
)
QUICK_STEPS = 2

Say = Callable[[str], object]


def setting_of(arguments: argparse.Namespace) -> Setting:
    """Raises ValueError for a number below 1."""
    given = {name: getattr(arguments, name) for name in ("seeds", "steps", "batch")}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"bench: expected --{name} to be at least 1, got {value}")
    default = Setting()
    return Setting(given["steps"] or default.steps, given["batch"] or default.batch)


def methods_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Raises ValueError for a name that stands for no method."""
    names: tuple[str, ...] = COMPARED if arguments.methods is None else arguments.methods
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(
            f"bench continual: expected --methods to be some of {', '.join(METHODS)}, got "
            f"{', '.join(unknown) or 'none'}"
        )
    return names


class Sequences:
    """Runs sequences of tasks, each once: a finished one is read from its file.

    ``anew`` trains it again, and its rows are replaced.
    """

    def __init__(
        self,
        encoder: minilm.SentenceEncoder,
        tasks: Sequence[EncodedTask],
        setting: Setting,
        *,
        model: str = TRAINED,
        text: str = "",
        say: Say = lambda _: None,
        anew: bool = False,
    ) -> None:
        self.encoder = encoder
        self.tasks = tasks
        self.setting = setting
        self.model = model
        self.text = text
        self.say = say
        self.anew = anew

    def asked(self, method: str, seed: int, rate: float, split: Split) -> Row:
        first, last = self.setting.ranks
        return Row(
            method=method,
            seed=seed,
            learning_rate=rate,
            steps=self.setting.steps,
            batch=self.setting.batch,
            first_rank=first,
            last_rank=last,
            model=self.model,
            text=self.text,
            split=split,
        )

    def taken(
        self, csv: Path, asked: Iterable[tuple[str, int, float]], split: Split = "test"
    ) -> str:
        """Which of these (method, seed, learning rate) ``run`` takes from the file; "" for none."""
        keys = [key(self.asked(*which, split)) for which in asked]
        done = {} if self.anew else read(csv)
        found = [done[one] for one in keys if one in done]
        return provenance(found, len(keys), csv) if found else ""

    def run(
        self,
        csv: Path,
        method: str,
        seed: int,
        rate: float,
        split: Split = "test",
        build: Build | None = None,
    ) -> Run:
        """From the file, or trained now and put into it; ``build`` for a method of no table."""
        asked = self.asked(method, seed, rate, split)
        done: dict[Key, Run] = read(csv)
        if self.anew or key(asked) not in done:
            started = time.perf_counter()
            matrix = train_sequence(
                build or METHODS[method].build,
                self.encoder,
                self.tasks,
                self.setting,
                learning_rate=rate,
                seed=seed,
                split=split,
                on_step=lambda task: self.say(f"{method}, lr {rate:g}, seed {seed}: {task}"),
            )
            seconds = time.perf_counter() - started
            names = [task.name for task in self.tasks]
            rows = rows_of(asked, matrix, names, seconds)
            write(csv, asked, rows, report.environment(torch.device("cpu")))
            done = read(csv)
        else:
            for _ in range(self.setting.steps * len(self.tasks)):
                self.say(f"{method}, seed {seed}: already there")
        return done[key(asked)]

    def tune(self, csv: Path, method: str) -> dict[float, float]:
        """Learning rate -> mean validation accuracy right after each task, of those tried.

        A run whose loss overflows counts as 0.
        """

        def score(rate: float) -> float:
            try:
                run = self.run(csv, method, TUNING_SEED, rate, "validation")
            except FloatingPointError:
                return 0.0
            return learned(run.matrix)

        return climb(GRID, score)


def best_rates(runs: Mapping[Key, Run], wanted: Row) -> dict[str, float]:
    """The learning rate at which each method learned best, of the runs like ``wanted``.

    Of equals, the smaller one.
    """
    best: dict[str, tuple[float, float]] = {}
    for run_key, run in runs.items():
        like = replace(wanted, method=run.method, learning_rate=run.learning_rate)
        if key(like) == run_key:
            candidate = (learned(run.matrix), -run.learning_rate)
            best[run.method] = max(best.get(run.method, candidate), candidate)
    return {method: -negative for method, (_, negative) in best.items()}


def rates_for(methods: Sequence[str], csv: Path, sequences: Sequences) -> dict[str, float]:
    """Raises ValueError where a method was not tuned in this setting."""
    wanted = sequences.asked("", TUNING_SEED, 0.0, "validation")
    found = best_rates(read(csv), wanted)
    tuned = {name: METHODS[name].tuned_as or name for name in methods}
    missing = [name for name in dict.fromkeys(tuned.values()) if name not in found]
    if missing:
        raise ValueError(
            f"bench.continual: {csv} has no learning rate of {', '.join(missing)} for "
            f"{wanted.steps} steps of {wanted.batch} on the text {wanted.text}; run with --tune "
            "first, or give --lr"
        )
    return {name: found[tuned[name]] for name in methods}


def measure_costs(
    methods: Sequence[str],
    encoder: minilm.SentenceEncoder,
    setting: Setting,
    rounds: int,
    csv: Path,
    *,
    apart: bool,
    say: Say = lambda _: None,
) -> dict[str, Cost]:
    """Step times here, memory in a process each (``apart``); the file is written anew."""
    costs = continual_cost.times(methods, encoder, setting, rounds, say)
    for name in methods if apart else ():
        say(f"memory of {name}")
        for field, value in continual_cost.memory_apart(name, setting).items():
            setattr(costs[name], field, value)
    csv.unlink(missing_ok=True)
    report.append_csv(csv, costs.values(), report.environment(torch.device("cpu")), Cost)
    return costs


def opened(
    setting: Setting, say: Say, *, quick: bool = False
) -> tuple[Sequences, list[continual_tasks.Task]]:
    """The encoder and the tasks. Raises FileNotFoundError where a package is missing."""
    directory = minilm.model_directory()
    if quick:
        torch.manual_seed(0)
        encoder, model = minilm.SentenceEncoder(QUICK).eval(), RANDOM
    else:
        encoder, model = minilm.load(directory), TRAINED
    tasks = continual_tasks.load(say)
    encoded = encode(tasks, directory)
    text = continual_tasks.fingerprint(tasks)
    return Sequences(encoder, encoded, setting, model=model, text=text, say=say), tasks


def places(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Files of rows and of the tuning's: the committed ones, and of --quick in a folder apart."""
    folder = RESULTS
    if arguments.quick:
        folder = arguments.csv.parent if arguments.csv else Path(tempfile.mkdtemp(prefix="bench-"))
    csv, rates = arguments.csv, arguments.rates
    return csv or folder / "continual.csv", rates or folder / "continual_lr.csv"


def run(arguments: argparse.Namespace) -> int:
    if arguments.quick:
        arguments.steps, arguments.seeds = min(arguments.steps or QUICK_STEPS, QUICK_STEPS), 1
        arguments.lr = arguments.lr or 1e-3
    from bench import continual_show as show  # rich: only where something is drawn
    from bench.bar import bar_on

    setting = setting_of(arguments)
    if arguments.ranks is not None:
        if len(arguments.ranks) != 2 or not all(0 < rank < 1 for rank in arguments.ranks):
            raise ValueError(
                f"bench continual: expected --ranks to be two shares in (0, 1), got "
                f"{', '.join(map(str, arguments.ranks))}"
            )
        setting = replace(setting, ranks=arguments.ranks)
    methods = methods_of(arguments)
    if arguments.tune:
        methods = tuple(dict.fromkeys(METHODS[name].tuned_as or name for name in methods))
    seeds = 1 if arguments.tune else arguments.seeds
    csv, rates_csv = places(arguments)
    console = show.console_of()
    started = time.perf_counter()
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    tried: dict[str, dict[float, float]] = {}
    costs: dict[str, Cost] = {}
    with bar_on(console) as progress:
        reading = progress.add_task("reading", total=None)

        def say_reading(text: str) -> None:
            progress.update(reading, description=text)

        sequences, tasks = opened(setting, say_reading, quick=arguments.quick)
        progress.remove_task(reading)
        sequences.anew = arguments.anew
        show.describe(console, tasks, setting, sequences.model)
        rates = dict.fromkeys(methods, arguments.lr)
        if arguments.lr is None and not arguments.tune:
            rates = rates_for(methods, rates_csv, sequences)
        if arguments.tune:
            grid = ((name, TUNING_SEED, rate) for name in methods for rate in GRID)
            notice = sequences.taken(rates_csv, grid, "validation")
        else:
            wanted = ((name, seed, rates[name]) for name in methods for seed in range(seeds))
            notice = sequences.taken(csv, wanted)
        show.say(console, notice)
        # Three rates of the grid are tried of most methods.
        total = len(methods) * (3 if arguments.tune else seeds) * setting.steps * len(tasks)
        bar = progress.add_task("training", total=total)
        sequences.say = lambda text: progress.update(bar, description=text, advance=1)
        # Seeds outermost: an interrupted run has all methods of the seeds that it finished.
        for seed in range(seeds):
            for name in methods:
                if arguments.tune:
                    tried[name] = sequences.tune(rates_csv, name)
                else:
                    runs[name].append(sequences.run(csv, name, seed, rates[name]))
        if arguments.rounds and not arguments.tune:
            costs = measure_costs(
                methods,
                sequences.encoder,
                setting,
                arguments.rounds,
                csv.with_name(f"{csv.stem}_cost.csv"),
                apart=not arguments.quick,
                say=lambda text: progress.update(bar, description=text),
            )
    if arguments.tune:
        console.print("mean validation accuracy right after each task, %, by learning rate:")
        console.print(show.tuning_table(tried, GRID), markup=False, highlight=False)
        show.say(console, f"{time.perf_counter() - started:.0f} s; rows in {rates_csv}")
        return 0
    summaries = {name: summarise(found) for name, found in runs.items()}
    console.print(show.draw_table(summaries, costs, [task.name for task in tasks]))
    show.say(console, notice)
    picture = arguments.picture or csv.with_suffix(".png")
    try:
        draw(runs, picture)
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    else:
        console.print(f"rows in {csv}, picture in {picture}", soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    for name in JUDGED:
        if name in summaries:
            sentence = verdict(summaries, name, METHODS[name].title)
            show.say(console, sentence)
    for name, other in COUNTERPARTS.items():
        if name in summaries:
            show.say(console, counterpart(summaries, name, other, METHODS[name].title))
    return 0
