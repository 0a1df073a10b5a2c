"""``python -m bench.demo_decoder``: what a short fine-tune of a language model takes away.

SmolLM2-135M-Instruct is taught one task, then another one twice from there: by plain fine-tuning,
and with ``osf_torch.confine`` outside of what its weights read on the first task and on general
prose. Both runs see the same examples in the same order. After every few steps the accuracy of
both tasks and the loss on prose of neither are measured on text that no step has seen. Draws a
picture and prints one sentence; exits with status 1 where ours doesn't lose less than plain does.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import osf_torch
from bench import continual_tasks, smollm
from bench.bar import bar_on
from bench.continual_run import order_of, slope
from bench.decoder import WINDOW, Decoder, Encoded

FIRST, SECOND = "returns", "mathematics"  # of bench.continual_tasks; taught in this order
# Whose text they are made of, with the folders read.
PACKAGES = {
    "torch": ("_inductor", "distributed", "utils"),
    "sympy": continual_tasks.PACKAGES["sympy"],
}
FIRST_RATE, RATE = 1e-4, 3e-4
FIRST_STEPS = 16
BATCH = 8
LOOKS = 2  # at the second task's course, after the one at its start
JUDGED = 80  # examples of a task
PROSE = 4  # windows of general prose, judged or read for the bases
READ = 4  # batches of the first task that the bases are grown from
MAX_TOKENS = 512  # of a weight's inputs: the fewer, the smaller what eigenvalues are taken of
PLAIN, OURS = "plain fine-tuning", "confine"

Say = Callable[[str], object]


class Look(NamedTuple):
    """What a model can do after a number of steps of the second task."""

    step: int
    first: float  # accuracy
    second: float
    general: float  # nats a token


@dataclass
class Course:
    """The second task by one method.

    Attributes:
        looks: from its start on.
        seconds: of its steps, without the looks.
    """

    looks: list[Look]
    seconds: float = 0.0


class Bench:
    """Two tasks as tokens, and how a model is trained on them and judged by them.

    Args:
        steps: of the second task.
    """

    def __init__(self, decoder: Decoder, tasks: Mapping[str, Encoded], steps: int) -> None:
        self.decoder, self.tasks, self.steps = decoder, tasks, steps

    def look(self, model: nn.Module, step: int) -> Look:
        first, second = (
            self.decoder.accuracy(model, self.tasks[name], "test", JUDGED)
            for name in (FIRST, SECOND)
        )
        return Look(step, first, second, self.decoder.general_loss(model, PROSE))

    def steps_of(self, name: str) -> int:
        return FIRST_STEPS if name == FIRST else self.steps

    def order(self, name: str) -> tuple[Tensor, ...]:
        """The examples of each step, the same for every method."""
        count = len(self.tasks[name].gold["train"])
        generator = torch.Generator().manual_seed(0)
        chosen = order_of(count, self.steps_of(name) * BATCH, generator)
        batches: tuple[Tensor, ...] = chosen.split(BATCH)
        return batches

    def train(self, model: nn.Module, name: str, rate: float) -> Iterator[int]:
        """One task by AdamW; yields the number of steps after each."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, fused=True)
        steps = self.steps_of(name)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: slope(done, steps))
        for done, index in enumerate(self.order(name), 1):
            optimizer.zero_grad()
            self.decoder.loss(model, self.tasks[name], index).backward()
            optimizer.step()
            schedule.step()
            yield done

    def read(self) -> list[dict[str, Tensor]]:
        """What the bases are grown from: the first task's last examples, and prose."""
        examples = [
            self.decoder.inputs(self.tasks[FIRST], index) for index in self.order(FIRST)[-READ:]
        ]
        prose = self.decoder.prose("train", PROSE)
        return [*examples, *({"input_ids": part} for part in prose.split(2))]

    def second(self, model: nn.Module, start: Look, say: Say) -> Course:
        """The second task, looked at ``LOOKS`` times."""
        found = Course([start])
        every = max(1, self.steps // LOOKS)
        began = time.perf_counter()
        for done in self.train(model, SECOND, RATE):
            say(f"task 2, {SECOND}: step {done} of {self.steps}")
            if done % every == 0 or done == self.steps:
                found.seconds += time.perf_counter() - began
                found.looks.append(self.look(model, done))
                began = time.perf_counter()
        return found


def compare(model: nn.Module, bench: Bench, say: Say) -> tuple[Look, dict[str, Course]]:
    """What the model could do at first, and the second task's course by each method.

    Mutates the model: it has learned the first task afterwards.
    """
    decoder = bench.decoder
    say("looking at the model as it is")
    fresh = bench.look(model, 0)
    model.requires_grad_(False)
    for weight in decoder.weights(model).values():
        weight.requires_grad_(True)
    for done in bench.train(model, FIRST, FIRST_RATE):
        say(f"task 1, {FIRST}: step {done} of {FIRST_STEPS}")
    start = bench.look(model, 0)
    courses = {}
    plain = copy.deepcopy(model)
    courses[PLAIN] = bench.second(plain, start, lambda text: say(f"{PLAIN}: {text}"))
    del plain
    say("what the weights read")
    subspaces = osf_torch.input_subspaces(
        model, bench.read(), max_tokens=MAX_TOKENS, progress=False
    )
    confined = osf_torch.confine(model, subspaces)
    courses[OURS] = bench.second(model, start, lambda text: say(f"{OURS}: {text}"))
    confined.verify()
    return fresh, courses


def verdict(fresh: Look, courses: Mapping[str, Course]) -> tuple[bool, str]:
    """Whether ours lost less than plain did, and the one sentence that says what was lost."""
    start = courses[PLAIN].looks[0]
    plain, ours = courses[PLAIN].looks[-1], courses[OURS].looks[-1]
    steps = plain.step
    text = (
        f"{steps} steps on {SECOND!r} took its accuracy from {start.second:.0%} to "
        f"{plain.second:.0%} by plain fine-tuning and to {ours.second:.0%} by confine; that of "
        f"{FIRST!r}, which {FIRST_STEPS} steps before had brought from {fresh.first:.0%} to "
        f"{start.first:.0%}, went to {plain.first:.0%} and to {ours.first:.0%}, and the loss on "
        f"prose of neither task, {start.general:.3f} nats a token, rose by "
        f"{plain.general - start.general:+.3f} and by {ours.general - start.general:+.3f} "
        f"({JUDGED} test examples a task and {PROSE * WINDOW:,} tokens of prose: an accuracy is "
        "right to about five points)."
    )
    failures = []
    if not ours.general < plain.general:
        failures.append("the loss on prose rose no less")
    if not ours.first >= plain.first:
        failures.append(f"{FIRST!r} was forgotten more")
    if not ours.second > start.second:
        failures.append(f"{SECOND!r} wasn't learned")
    if failures:
        return False, f"Not shown, by confine {'; '.join(failures)}: {text}"
    return True, text


def draw(courses: Mapping[str, Course], picture: Path) -> None:
    """Three panels over the steps of the second task: both accuracies, and the loss on prose."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    values: tuple[tuple[str, Callable[[Look], float]], ...] = (
        (f"the earlier task ({FIRST}), accuracy in %", lambda look: 100 * look.first),
        ("prose of no task, loss in nats a token", lambda look: look.general),
        (f"the new task ({SECOND}), accuracy in %", lambda look: 100 * look.second),
    )
    for axes, (title, value) in zip(panels, values, strict=True):
        for (name, course), colour in zip(courses.items(), ("#D55E00", "#0072B2"), strict=True):
            axes.plot(
                [look.step for look in course.looks],
                [value(look) for look in course.looks],
                color=colour,
                marker="o",
                label=name,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"steps on {SECOND}", fontsize=9)
        axes.grid(True, color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def prepared(precision: torch.dtype, steps: int, say: Say) -> tuple[nn.Module, Bench]:
    """Raises ImportError or OSError where model or text can't be had."""
    say(f"loading {smollm.NAME}; the first time it is unpacked, which takes half a minute")
    model, tokenizer = smollm.load()
    say("reading text for the tasks")
    decoder = Decoder(tokenizer, precision=precision)
    tasks = continual_tasks.load(say, names=(FIRST, SECOND), packages=PACKAGES)
    return model, Bench(decoder, {task.name: decoder.encode(task) for task in tasks}, steps)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench.demo_decoder", description=__doc__)
    top.add_argument("--steps", type=int, default=12, help="AdamW steps of the second task")
    top.add_argument("--fp32", action="store_true", help="multiply in float32, not in bfloat16")
    top.add_argument("--picture", type=Path, default=Path("demo_decoder.png"))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.steps < 1:
        print(
            f"bench.demo_decoder: expected --steps to be at least 1, got {arguments.steps}",
            file=sys.stderr,
        )
        return 2
    began = time.perf_counter()
    torch.manual_seed(0)
    console = Console(soft_wrap=True)
    with bar_on(console) as progress:
        bar = progress.add_task("", total=FIRST_STEPS + 2 * arguments.steps + 6)

        def say(text: str) -> None:
            progress.update(bar, description=text, advance=1)

        try:
            precision = torch.float32 if arguments.fp32 else torch.bfloat16
            model, bench = prepared(precision, arguments.steps, say)
        except (ImportError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        fresh, courses = compare(model, bench, say)
    held, sentence = verdict(fresh, courses)
    try:
        draw(courses, arguments.picture)
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    else:
        console.print(f"picture: {arguments.picture}", markup=False, highlight=False)
    steps = " and ".join(f"{course.seconds:.0f} s by {name}" for name, course in courses.items())
    whole = time.perf_counter() - began
    console.print(f"{whole:.0f} s in all; the steps of task 2 took {steps}.", highlight=False)
    console.print(sentence, markup=False, highlight=False)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
