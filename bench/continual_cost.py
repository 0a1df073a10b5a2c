"""What a step of each method costs: time in interleaved rounds, peak memory in a process each."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench import minilm, report
from bench.continual_methods import METHODS, Tokens
from bench.continual_run import MAX_TOKENS, Setting, new_head, step, trainer
from bench.timing import Clock, Timed, interleave, percentile

TASK, TASKS = 2, 5  # timed as the third task of five: the middle rank of the schedule
MEMORY_STEPS = 3
WARM_UP_STEPS = 2


@dataclass
class Cost:
    """One method's row. None: not measured."""

    method: str = ""
    rank: float = 0.0
    batch: int = 0
    tokens: int = 0
    begin_s: float = 0.0  # ending a task, decomposing and wrapping for the next: once a task
    median_step_ms: float = 0.0
    p20_ms: float = 0.0
    p80_ms: float = 0.0
    rounds: int = 0
    times_plain: float | None = None
    loaded_mib: float | None = None  # resident with the encoder loaded, before the method begins
    peak_mib: float | None = None
    steps_peak_mib: float | None = None  # peak of the steps alone, after ``begin``

    @property
    def added_mib(self) -> float | None:
        """What decomposing, gradients, the optimizer and bases take at their peak."""
        if self.peak_mib is None or self.loaded_mib is None:
            return None
        return self.peak_mib - self.loaded_mib


def tokens_of(batch: int, vocabulary: int, length: int = MAX_TOKENS) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (batch, length), generator=generator)
    return ids, torch.ones(batch, length, dtype=torch.bool)


def _import_peer(name: str) -> None:
    """Before anything is measured: what an import takes is no cost of the method."""
    if METHODS[name].imports:
        importlib.import_module(METHODS[name].imports)


def prepared(
    name: str, encoder: minilm.SentenceEncoder, setting: Setting
) -> tuple[Callable[[], object], float]:
    """A training step of a method after an earlier task, and the seconds between the two."""
    _import_peer(name)
    torch.manual_seed(0)
    method = METHODS[name].build(copy.deepcopy(encoder))
    tokens = tokens_of(setting.batch, encoder.config.vocab_size)
    labels = torch.arange(setting.batch) % 4
    head = new_head(encoder.config.hidden_size, 4, torch.Generator().manual_seed(0))
    before = method.begin(0, setting.rank(0, TASKS), [tokens])
    optimizer = trainer(before, head, 1e-4)
    method.protect(optimizer)
    step(before, head, optimizer, tokens, labels)
    del before, optimizer
    started = time.perf_counter()
    method.end()
    model = method.begin(TASK, setting.rank(TASK, TASKS), [tokens])
    seconds = time.perf_counter() - started
    optimizer = trainer(model, head, 1e-4)
    method.protect(optimizer)

    def run() -> None:
        step(model, head, optimizer, tokens, labels)

    run.method = method  # type: ignore[attr-defined]  # keeps hooks and wrappers alive
    return run, seconds


def times(
    names: Sequence[str],
    encoder: minilm.SentenceEncoder,
    setting: Setting,
    rounds: int,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Cost]:
    """Median step of each method: a round is one step of every one of them."""
    timed, costs = {}, {}
    for name in names:
        say(f"preparing {name}")
        run, seconds = prepared(name, encoder, setting)
        for _ in range(WARM_UP_STEPS):
            run()
        timed[name] = Timed(run)
        costs[name] = Cost(
            name, setting.rank(TASK, TASKS), setting.batch, MAX_TOKENS, seconds, rounds=rounds
        )
    found = interleave(
        timed,
        rounds,
        Clock(torch.device("cpu")),
        on_round=lambda index: say(f"step times, round {index + 1} of {rounds}"),
    )
    for name, cost in costs.items():
        cost.median_step_ms, cost.p20_ms, cost.p80_ms = (
            percentile(found[name], q) for q in (50.0, 20.0, 80.0)
        )
    if "plain" in costs:
        for cost in costs.values():
            cost.times_plain = cost.median_step_ms / costs["plain"].median_step_ms
    return costs


def high_water_mib() -> float:
    """Peak resident memory of this process.

    ru_maxrss counts the parent's memory at the fork as well; Linux's VmHWM does not.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def reset_high_water() -> bool:
    """Starts VmHWM anew from what is resident now; False where the system can't."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory(name: str, encoder: minilm.SentenceEncoder, setting: Setting) -> dict[str, float | None]:
    """Peaks of this process over ``begin`` and a few steps. Meant for a process of its own."""
    _import_peer(name)
    reset_high_water()
    loaded = high_water_mib()
    run, _ = prepared(name, encoder, setting)
    whole = high_water_mib()
    alone = reset_high_water()
    for _ in range(MEMORY_STEPS):
        run()
    steps = high_water_mib()
    return {
        "loaded_mib": loaded,
        "peak_mib": max(loaded, whole, steps),  # the kernel counts pages in batches
        "steps_peak_mib": steps if alone else None,
    }


def memory_apart(name: str, setting: Setting) -> dict[str, float | None]:
    """``memory`` of the trained encoder in a new process. Raises RuntimeError if that fails."""
    command = [sys.executable, "-m", "bench.continual_cost", name, "--batch", str(setting.batch)]
    path = os.pathsep.join(filter(None, sys.path))  # imports as here
    done = subprocess.run(
        command,
        cwd=report.ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"bench.continual: measuring the memory of {name}: {done.stderr[-500:]}")
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=memory.__doc__)
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    encoder: nn.Module = minilm.load(minilm.model_directory())
    assert isinstance(encoder, minilm.SentenceEncoder)
    print(json.dumps(memory(arguments.method, encoder, Setting(batch=arguments.batch))))


if __name__ == "__main__":
    main()
