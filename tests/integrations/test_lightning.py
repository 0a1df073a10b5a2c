"""integrations.lightning in real runs of Lightning's Trainer: held, saved, resumed, refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

# Whichever is installed: the callback serves both.
pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning isn't installed")
callbacks = pytest.importorskip("pytorch_lightning.callbacks")
from osf_torch.integrations.lightning import DRIFT, SubspaceCallback  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # importing Lightning takes seconds
    pytest.mark.filterwarnings("ignore"),  # Lightning's own
]
METHODS = ("confine", "protect")
both = pytest.mark.parametrize("method", METHODS)
MOVED = 2e-5  # of what a run has changed, the share in the protected span: rounding
RHO = 0.5


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


class Small(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = network(seed)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch, index):
        loss = (self.net(batch) - batch[:, :8]).float().square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("loss", (self.net(batch) - batch[:, :8]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Clipping(Small):
    """Tells the norm that clipping counts."""

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        self.norms.append(nn.utils.clip_grad_norm_(self.parameters(), 0.1).item())


class Manual(Small):
    """Two optimizers, one a layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizers: Any = self.optimizers()
        for each in optimizers:
            each.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for each in optimizers:
            each.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.net[0].parameters(), lr=1e-2, weight_decay=0.1)
        return [first, torch.optim.Adam(self.net[2].parameters(), lr=1e-2)]


def data() -> Any:
    rows = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(rows, batch_size=8)


def callback(method: str, **options: Any) -> SubspaceCallback:
    return SubspaceCallback(RHO, method, progress=False, **options)  # type: ignore[arg-type]


def fitted(
    module: Small, *using: Any, resume: Any = None, val: bool = False, **options: Any
) -> Any:
    defaults = {"max_epochs": 2, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(using),
        **defaults | options,
    )
    trainer.fit(module, data(), data() if val else None, ckpt_path=resume)
    return trainer


def shares(module: Small, start: nn.Sequential | None = None) -> list[float]:
    """Of each weight the larger share of its update in the span of U and in that of V."""
    found = []
    for before, after in zip((start or network())[::2], module.net[::2], strict=True):
        W = before.weight.detach().double()
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        r = round(RHO * min(W.shape))
        change = after.weight.detach().double() - W
        assert change.norm() > 1e-2 * W.norm(), "it has trained"
        in_span = [(U[:, :r].mT @ change).norm(), (change @ Vh[:r].mT).norm()]
        found.append(float(max(in_span) / change.norm()))
    return found


@both
def test_a_run_holds_what_is_protected_and_resumes_to_the_bit(method, tmp_path):
    module, saving = Small(), {"every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"}
    keep = callbacks.ModelCheckpoint(tmp_path, **saving)
    trainer = fitted(module, callback(method), keep, enable_checkpointing=True)
    assert max(shares(module)) <= MOVED
    assert trainer.callback_metrics[DRIFT] <= MOVED
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {f"net.{k}" for k in network().state_dict()}
    again = Small(seed=1)  # the weights that were pretrained aren't needed
    fitted(again, callback(method), resume=tmp_path / "step=4.ckpt")
    assert again.losses == module.losses[4:]
    assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))
    assert max(shares(again)) <= MOVED


@both
def test_a_second_fit_goes_on_and_next_task_protects_what_was_learned(method):
    module, one = Small(), callback(method)
    fitted(module, one)
    fitted(module, one)
    assert max(shares(module)) <= MOVED
    one.next_task(progress=False)
    middle = network()
    middle.load_state_dict(module.net.state_dict())
    fitted(module, one)
    assert max(shares(module, middle)) <= MOVED
    forward = {"forward": lambda module, x: module.net(x)}
    (found,) = one.next_task(batches=data(), energy=0.6, progress=False, **forward)
    assert {name for name, s in found.items() if "V" in s.spectra} == found.keys()
    fitted(module, one)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_options_of_the_trainer(options):
    for method in METHODS:
        module = Small()
        fitted(module, callback(method), **options)
        assert max(shares(module)) <= MOVED


def test_clipping_counts_what_is_kept():
    counted = {}
    for method in METHODS:
        module = Clipping()
        fitted(module, callback(method), max_epochs=1)
        counted[method] = module.norms[0]
        assert max(shares(module)) <= MOVED
    plain = Clipping()
    fitted(plain, max_epochs=1)
    assert counted["confine"] == pytest.approx(counted["protect"], rel=1e-4)
    assert counted["protect"] < 0.95 * plain.norms[0]


@both
def test_several_optimizers(method, tmp_path):
    module, one = Manual(), callback(method)
    trainer = fitted(module, one)
    assert max(shares(module)) <= MOVED
    assert len(one.guards) == (2 if method == "protect" else 0)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = Manual(seed=1)
    fitted(again, callback(method), resume=tmp_path / "end.ckpt", max_epochs=3)
    assert max(shares(again)) <= MOVED


@both
@pytest.mark.parametrize("kind", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages_of_weights(method, kind):
    settings = {"swa_lrs": 1e-2, "swa_epoch_start": 1} if "Stoch" in kind else {"decay": 0.5}
    if not hasattr(callbacks, kind):
        pytest.skip(f"this Lightning has no {kind}")
    module = Small()
    fitted(module, callback(method), getattr(callbacks, kind)(**settings), val=True, max_epochs=3)
    assert max(shares(module)) <= MOVED
    if method == "confine":
        with pytest.raises(ValueError, match=f"{kind}.* put it after SubspaceCallback"):
            fitted(Small(), getattr(callbacks, kind)(**settings), callback(method))


class Unfreezes(callbacks.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.late.requires_grad_(trainer.current_epoch > 0)


class Late(Small):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(8, 8).requires_grad_(False)


class Foreign(Manual):
    """Steps an optimizer that configure_optimizers doesn't return."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Any = None

    def configure_optimizers(self) -> Any:
        self.hidden = torch.optim.SGD(self.net[0].parameters(), lr=1e-1)
        return super().configure_optimizers()

    def training_step(self, batch, index):
        super().training_step(batch, index)
        self.manual_backward(Small.training_step(self, batch, index))
        self.hidden.step()


class Lacks(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net[0].parameters(), lr=1e-2)


class Replaces(callbacks.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            trainer.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=1e-1)]


class Empty(Small):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential()

    def configure_model(self) -> None:
        self.net = network()


class Backbone(callbacks.BackboneFinetuning):
    """By its class alone."""


REFUSED: dict[str, tuple[Any, str, type[Exception], str]] = {
    "frozen": (lambda: (Late(), [Unfreezes()], {}), "both", RuntimeError, "late"),
    "foreign": (lambda: (Foreign(), [], {}), "protect", RuntimeError, "net.0.weight"),
    "owner": (lambda: (Lacks(), [], {}), "both", ValueError, "net.2.weight"),
    "replaced": (
        lambda: (Small(), [Replaces()], {}),
        "protect",
        RuntimeError,
        "the optimizer that the weights were protected with",
    ),
    "empty": (lambda: (Empty(), [], {}), "both", ValueError, "configure_model"),
    "half": (
        lambda: (Small(), [], {"precision": "bf16-true"}),
        "confine",
        ValueError,
        "HalfPrecision",
    ),
    "pruning": (
        lambda: (Small(), [callbacks.ModelPruning("l1_unstructured", amount=0.5)], {}),
        "both",
        ValueError,
        "ModelPruning",
    ),
    "finetuning": (lambda: (Small(), [Backbone()], {}), "both", ValueError, "BaseFinetuning|Back"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_defeats_protection_is_refused_by_name(name):
    make, methods, error, match = REFUSED[name]
    for method in METHODS if methods == "both" else [methods]:
        module, using, options = make()
        with pytest.raises(error, match=match):
            fitted(module, callback(method), *using, **options)


@pytest.mark.parametrize("kind", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_train_other_tensors_are_refused(kind):
    strategy: Any = type(kind, (getattr(pl.strategies, kind),), {"__init__": lambda self: None})
    one = callback("confine")
    trainer = SimpleNamespace(
        strategy=strategy(), callbacks=[one], precision_plugin=None, is_global_zero=True
    )
    with pytest.raises(ValueError, match=kind):
        one.setup(trainer, Small(), "fit")


def test_whole_checkpoints_of_a_sharded_confined_module_are_refused():
    one = callback("confine")
    strategy = pl.strategies.ModelParallelStrategy(save_distributed_checkpoint=False)
    trainer = SimpleNamespace(
        strategy=strategy, callbacks=[one], precision_plugin=None, is_global_zero=True
    )
    with pytest.raises(ValueError, match="save_distributed_checkpoint=False"):
        one.setup(trainer, Small(), "fit")


@both
def test_a_checkpoint_without_the_callback_is_refused(method, tmp_path):
    trainer = fitted(Small())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="saved with this callback"):
        fitted(Small(), callback(method), resume=tmp_path / "plain.ckpt", max_epochs=3)
    other = fitted(Small(), callback("protect" if method == "confine" else "confine"))
    other.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="go on with that method"):
        fitted(Small(), callback(method), resume=tmp_path / "other.ckpt", max_epochs=3)


def test_arguments():
    with pytest.raises(ValueError, match="deferred"):
        callback("protect", restore="deferred")
    with pytest.raises(ValueError, match="verify"):
        callback("protect", verify="never")
    with pytest.raises(RuntimeError, match="none so far"):
        callback("confine").next_task()


@both
def test_coverage_is_told_in_one_line(method, caplog):
    with caplog.at_level(logging.INFO, "osf_torch"):
        fitted(Small(), callback(method), max_epochs=1)
    told = [r.message for r in caplog.records if "SubspaceCallback" in r.message]
    assert len(told) == 1
    assert f"{method}: 93 % of the elements that train are covered" in told[0]


SCRIPT = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch.distributed.fsdp import fully_shard
from tests.integrations.test_lightning import *

class Sharded(Small):
    def configure_model(self):
        for part in (self.net[0], self.net[2], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

def whole(module):
    return {k: getattr(t, "full_tensor", lambda: t)() for k, t in module.state_dict().items()}

def strategies():
    yield "ddp", Small, lambda: pl.strategies.DDPStrategy()
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    yield "fsdp2", Sharded, lambda: pl.strategies.ModelParallelStrategy(**sizes)

def run(folder, method, kind, strategy):
    saving = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    keep = callbacks.ModelCheckpoint(folder, **saving)
    for name, using, resume in (("one", [keep], None), ("two", [], f"{folder}/step=2.ckpt")):
        module = kind(seed=int(name == "two"))
        options = {"strategy": strategy(), "devices": 2, "enable_checkpointing": bool(using)}
        trainer = fitted(module, callback(method), *using, resume=resume, **options)
        torch.save([module.losses, whole(module)], f"{folder}/{name}-{trainer.global_rank}")

for name, kind, strategy in strategies():
    for method in METHODS:
        run(f"{sys.argv[1]}/{name}-{method}", method, kind, strategy)
"""


def test_two_ranks_hold_the_same_and_resume_to_the_bit(tmp_path):
    root = Path(__file__).parents[2]
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = [str(root), str(root / "python_api"), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case in ("ddp-confine", "ddp-protect", "fsdp2-confine", "fsdp2-protect"):
        found = {path.name: torch.load(path) for path in (tmp_path / case).glob("*-[01]")}
        assert found.keys() == {"one-0", "one-1", "two-0", "two-1"}
        for name in found:
            assert all(map(torch.equal, found[name][1].values(), found["one-0"][1].values()))
        module = Small()
        module.load_state_dict(found["one-1"][1])
        assert max(shares(module)) <= MOVED
        for rank in (0, 1):
            assert found[f"two-{rank}"][0] == found[f"one-{rank}"][0][2:]
