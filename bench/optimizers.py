"""``python -m bench optimizers``: what each optimizer does under ``protect`` and ``confine``.

Two square layers, weights of a spectrum i^(-1/2) of whose singular directions the top third is
protected, learn what two others compute. Each optimizer takes the same steps four times: plain,
under ``protect`` without restoring, under ``protect``, and under ``confine``.

* "leak" is ‖ΔW − P(ΔW)‖ / ‖ΔW‖ after the steps whose gradients were projected and whose weights
  were not restored: the share of what was trained that is in the protected span. A linear optimizer
  leaves 0, an elementwise one a large part, and weight decay a part of its own. Muon takes a
  polynomial of the matrix, which keeps its rows and columns: what it leaks is the rounding of its
  products in bfloat16, 1.3e-2 here and 4e-6 where the same ones are computed in float32.
* "drift" is how far what is protected has moved, ‖H(W) − H(W₀)‖ / ‖H(W₀)‖ with H(W) = W − P(W).
* "learned" is the share of the first loss that is gone, on inputs that no step has seen.

All are of both weights together and in float64. An optimizer of a package that isn't installed, or
that can't run on this machine, has a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import osf_torch
from bench import report
from osf_kernels import Basis

WIDTH, RANK, BATCH, HELD_OUT = 96, 32, 32, 256
STEPS = 50
NEEDLESS, HARDLY = 1e-5, 0.05  # leaks up to which restoring isn't needed, or hardly
CPU = torch.device("cpu")

How = Literal["plain", "projected", "restored", "confined"]
HOWS: tuple[How, ...] = ("plain", "projected", "restored", "confined")


@dataclass
class Row:
    """One optimizer. None stands for a figure that was not measured."""

    optimizer: str
    package: str
    version: str
    settings: str
    steps: int
    leak: float | None = None
    drift_unrestored: float | None = None
    drift_restored: float | None = None
    drift_confined: float | None = None
    learned_plain: float | None = None
    learned_unrestored: float | None = None
    learned_restored: float | None = None
    learned_confined: float | None = None
    restoring: str = ""
    status: str = "ok"


@dataclass(frozen=True)
class Named:
    """An optimizer of some package.

    Attributes:
        package: the distribution that has it.
        module: what is imported of that.
        attribute: its class there.
        options: what the class is called with beside the parameters.
        relative: whether its steps are shares of what a parameter is, for which C begins as the
            free part of the weight and not as 0.
        accelerator: whether it runs on a GPU alone.
    """

    package: str
    module: str
    attribute: str
    options: dict[str, Any]
    relative: bool = False
    accelerator: bool = False

    @property
    def settings(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options.items())

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Raises ImportError where the package isn't installed."""
        kind = getattr(importlib.import_module(self.module), self.attribute)
        optimizer: torch.optim.Optimizer = kind(parameters, **self.options)
        return optimizer


ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
OPTIMIZERS = {
    "AdamW": Named("torch", "torch.optim", "AdamW", ADAMW),
    "AdamW, fused": Named("torch", "torch.optim", "AdamW", ADAMW | {"fused": True}),
    "AdamW, 8 bits (torchao)": Named("torchao", "torchao.optim", "AdamW8bit", ADAMW),
    "AdamW, 8 bits (bitsandbytes)": Named(
        "bitsandbytes", "bitsandbytes.optim", "AdamW8bit", ADAMW | {"min_8bit_size": 256}
    ),
    "AdamW, schedule-free": Named("schedulefree", "schedulefree", "AdamWScheduleFree", ADAMW),
    "AdamW, offloaded (torchao)": Named(
        "torchao", "torchao.optim", "CPUOffloadOptimizer", ADAMW, accelerator=True
    ),
    "Adafactor": Named("torch", "torch.optim", "Adafactor", {"lr": 1e-2}, relative=True),
    "Adafactor (transformers)": Named(
        "transformers",
        "transformers.optimization",
        "Adafactor",
        {"lr": 1e-3, "scale_parameter": False, "relative_step": False},
    ),
    "Lion": Named("lion-pytorch", "lion_pytorch", "Lion", {"lr": 3e-4, "weight_decay": 0.0}),
    "Muon": Named("torch", "torch.optim", "Muon", {"lr": 1e-2, "weight_decay": 0.0}),
    "Muon with decay": Named("torch", "torch.optim", "Muon", {"lr": 1e-2, "weight_decay": 0.1}),
    "SGD with momentum": Named("torch", "torch.optim", "SGD", {"lr": 0.3, "momentum": 0.9}),
    "SGD with momentum and decay": Named(
        "torch", "torch.optim", "SGD", {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-3}
    ),
}


# --- the task ---


def network(seed: int) -> nn.Sequential:
    """Two layers of weights with singular values ∝ i^(-1/2) that keep the size of inputs."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False)
    )
    values = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -0.5
    values *= (WIDTH / values.square().sum()).sqrt()
    with torch.no_grad():
        for weight in model.parameters():
            left, right = (
                torch.linalg.qr(
                    torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
                )[0]
                for _ in range(2)
            )
            weight.copy_(left @ (values[:, None] * right))
    return model


def subspaces_of(model: nn.Module) -> osf_torch.Subspaces:
    return osf_torch.refresh(model, RANK, compute_dtype=torch.float64, progress=False)


def loss_of(model: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = teacher(x)
    loss: Tensor = (model(x) - wanted).square().mean()
    return loss


@dataclass
class Outcome:
    """A model that was trained, and what was there before."""

    model: nn.Module
    before: dict[str, Tensor]
    subspaces: osf_torch.Subspaces
    optimizer: torch.optim.Optimizer
    guard: osf_torch.Guard | None
    learned: float = 0.0
    moved_by_exchange: float | None = None  # what was protected, before Guard.restore()

    def share(self) -> float:
        """‖ΔW − P(ΔW)‖ / ‖ΔW‖."""
        return _norm(self._protected(moved=True)) / _norm(self._moved())

    def drift(self) -> float:
        """‖H(W) − H(W₀)‖ / ‖H(W₀)‖."""
        return _norm(self._protected(moved=True)) / _norm(self._protected(moved=False))

    def _moved(self) -> list[Tensor]:
        now = self.model.state_dict()
        return [now[name].double() - self.before[name].double() for name in self.subspaces]

    def _protected(self, *, moved: bool) -> list[Tensor]:
        """H of what the weights have moved by, or of what they were; H is linear."""
        start = [self.before[name].double() for name in self.subspaces]
        pairs = zip(self._moved() if moved else start, self.subspaces.values(), strict=True)
        return [x - _left_free(_left_free(x, s.U).mT, s.V).mT for x, s in pairs]


def _left_free(x: Tensor, basis: Tensor | Basis | None) -> Tensor:
    """x without what is protected of its columns."""
    assert isinstance(basis, Basis), "which refresh makes of both sides"
    Q: Tensor = torch.linalg.qr(basis.columns.double())[0]
    spanned = Q @ (Q.mT @ x)
    return spanned if basis.spans == "low" else x - spanned


def _norm(parts: list[Tensor]) -> float:
    return float(torch.stack([part.norm() for part in parts]).norm())


# --- the runs ---


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """torchao compiles its step, for 20 seconds; what it computes is the same without."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def train(named: Named, how: How, steps: int = STEPS, device: torch.device = CPU) -> Outcome:
    """The optimizer's steps from the same weights, on the same inputs."""
    model, teacher = network(0).to(device), network(1).to(device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    subspaces = subspaces_of(model)
    generator = torch.Generator().manual_seed(2)
    held_out = torch.randn(HELD_OUT, WIDTH, generator=generator).to(device)
    with torch.no_grad():
        first = float(loss_of(model, teacher, held_out))
    guard = None
    if how == "confined":
        osf_torch.confine(model, subspaces, decay_to="zero" if named.relative else "start")
    optimizer = named.make([p for p in model.parameters() if p.requires_grad])
    if how in ("projected", "restored"):
        guard = osf_torch.protect(model, subspaces, optimizer=optimizer, restore=how == "restored")
    exchange(optimizer, "train", guard)
    with eagerly():
        take_steps(model, teacher, optimizer, steps, generator)
    outcome = Outcome(model, before, subspaces, optimizer, guard)
    if exchange(optimizer, "eval", None):
        outcome.moved_by_exchange = outcome.drift()
        if guard is not None and guard.restores:
            guard.restore()
    with torch.no_grad():
        outcome.learned = 1 - float(loss_of(model, teacher, held_out)) / first
    return outcome


def take_steps(
    model: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    generator: torch.Generator,
) -> None:
    """On inputs that are drawn on the host and taken where the model is."""
    device = next(model.parameters()).device
    for _ in range(steps):
        x = torch.randn(BATCH, WIDTH, generator=generator).to(device)
        optimizer.zero_grad()
        loss_of(model, teacher, x).backward()
        optimizer.step()


def exchange(optimizer: Any, to: str, guard: osf_torch.Guard | None) -> bool:
    """Has an optimizer that keeps weights in its state exchange them, and whether it does."""
    call = getattr(optimizer, to, None)
    if call is None:
        return False
    call()
    if guard is not None and guard.restores:
        guard.restore()
    return True


def missing(named: Named) -> str | None:
    """Why the optimizer can't run here, or None."""
    if named.accelerator and not torch.cuda.is_available():
        return "not measured: needs a GPU"
    try:
        importlib.import_module(named.module)
    except ImportError:
        return f"not measured: {named.package} isn't installed"
    return None


def measure(name: str, steps: int = STEPS, say: Callable[[str], object] = print) -> Row:
    """The row of one optimizer."""
    named = OPTIMIZERS[name]
    row = Row(name, named.package, report.version(named.package), named.settings, steps)
    reason = missing(named)
    if reason is not None:
        row.status = reason
        return row
    device = torch.device("cuda") if named.accelerator else CPU
    for how in HOWS:
        say(f"{name}: {how}")
        try:
            outcome = train(named, how, steps, device)
        except TypeError as error:
            if not str(error).startswith("osf_torch.protect: "):
                raise
            row.status = str(error).partition(";")[0]  # its steps call no hooks
            continue
        if how == "plain":
            row.learned_plain = outcome.learned
        elif how == "projected":
            row.leak, row.drift_unrestored = outcome.share(), outcome.drift()
            row.learned_unrestored = outcome.learned
        elif how == "restored":
            row.drift_restored, row.learned_restored = outcome.drift(), outcome.learned
            if outcome.moved_by_exchange is not None:
                row.status = (
                    f"ok; after eval() {outcome.moved_by_exchange:.1e} until Guard.restore()"
                )
        else:
            row.drift_confined, row.learned_confined = outcome.drift(), outcome.learned
    if row.leak is not None:
        row.restoring = restoring(row.leak)
    return row


def restoring(leak: float) -> str:
    """Whether weights have to be restored, by the leak without."""
    if leak <= NEEDLESS:
        return "not needed"
    return "hardly needed" if leak <= HARDLY else "needed"


def run(arguments: argparse.Namespace) -> int:
    """Print a table, and write the rows where a file is named."""
    if arguments.steps < 1:
        raise ValueError(f"bench: expected --steps of at least 1, got {arguments.steps}")
    say = report.progress()
    rows = [measure(name, arguments.steps, say) for name in OPTIMIZERS]
    say("")
    print(table(rows))
    if arguments.csv is not None:
        arguments.csv.unlink(missing_ok=True)
        report.append_csv(arguments.csv, rows, report.environment(CPU), Row)
    return 0


def table(rows: list[Row]) -> str:
    text = (
        f"{rows[0].steps} steps of two weights {WIDTH} x {WIDTH}, {RANK} directions of each side "
        "protected; learned: share of the first loss that is gone\n"
    )
    header = (
        "optimizer",
        "leak",
        "restoring",
        "drift without",
        "with",
        "confined",
        "learned: plain",
        "protect",
        "confine",
    )
    lines = [
        (
            row.optimizer,
            report.shown(row.leak, ".2g"),
            row.restoring or "-",
            report.shown(row.drift_unrestored, ".1e"),
            report.shown(row.drift_restored, ".1e"),
            report.shown(row.drift_confined, ".1e"),
            report.shown(row.learned_plain, ".0%"),
            report.shown(row.learned_restored, ".0%"),
            report.shown(row.learned_confined, ".0%"),
        )
        for row in rows
    ]
    notes = [f"{row.optimizer}: {row.status}" for row in rows if row.status != "ok"]
    return "\n".join([text + report.table(header, lines), *notes])
