"""Lightning's Trainer: one callback that keeps protected directions where they are.

::

    trainer = Trainer(callbacks=[SubspaceCallback(0.5)])
    trainer.fit(module, data)  # trainer.fit(module, data, ckpt_path=...) resumes

Bases are made in ``setup``, of the module as it is when ``fit`` is called: before a checkpoint is
loaded, before DistributedDataParallel and ``configure_model``, and before ``configure_optimizers``.
What resuming takes is part of Lightning's own checkpoint, under the callback's name; the weights
there have the plain module's names and values. Nothing in it but tensors, numbers and strings, so
that it loads with ``weights_only=True``.

Supported: Lightning 2.x, imported as ``lightning`` or ``pytorch_lightning``, on one device, under
DDPStrategy and under ModelParallelStrategy (FSDP2), where the module makes its weights in __init__
and ``configure_model`` shards them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from osf_torch.confined import Confined
from osf_torch.coverage import NAMED, named_in
from osf_torch.grown import Grown
from osf_torch.guard import Guard
from osf_torch.integrations import _state_files
from osf_torch.integrations._peer import require_peer
from osf_torch.integrations._training import Method, Protection, innermost, is_model_of
from osf_torch.selection import Ranks, listed, named_weights, unknown
from osf_torch.steps import owned_by
from osf_torch.subspaces import Subspace, Subspaces

NAME = "integrations.lightning.SubspaceCallback"
DRIFT = "osf/drift"  # among the trainer's logged metrics
VERSIONS = ">=2.0,<3"


def _bases() -> tuple[Any, ...]:
    """Callback of the packages that are imported already, which know their own class alone."""
    names = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch-lightning"}
    found = [name for name in names if name in sys.modules]
    if not found:
        try:
            require_peer("lightning.pytorch", "lightning", VERSIONS, "lightning")
            found = ["lightning.pytorch"]
        except ImportError:
            found = ["pytorch_lightning"]
    return tuple(require_peer(name, names[name], VERSIONS, "lightning").Callback for name in found)


_CALLBACK: Any = type("_CALLBACK", _bases(), {})


class SubspaceCallback(_CALLBACK):
    """Confines a module, or protects it, while Lightning's Trainer fits it.

    With ``method="confine"`` the module is confined in ``setup``, and ``configure_optimizers`` is
    called with the free blocks among ``parameters()``. With "protect" bases are made then, and the
    optimizers are hooked before the first step; several optimizers (manual optimization) get a
    guard each. Clipping by the Trainer, and ``configure_gradient_clipping``, see projected
    gradients, so that norms count what is kept.

    A run that is resumed by ``ckpt_path=`` goes on with what the first run protected, which its
    checkpoint holds. A second ``fit`` of the same module goes on with the same subspaces;
    :meth:`next_task` protects what has been learned too.

    A log line says at the beginning what is covered; at the end of each epoch the largest drift is
    logged as "osf/drift".

    Args:
        subspaces: ranks, as ``refresh`` takes them; or subspaces by the names of the
            LightningModule's parameters.
        method: "confine" or "protect".
        verify: "save" verifies before each checkpoint and at the end of training, "end" at the end.
        progress: whether ``refresh`` shows a bar.
        options: ``leave_out``, names or patterns of names of matrices that are to move freely,
            without which those that nothing covers are refused before the first step; of
            ``confine`` (update, rank, decay_to, dtype, generator) or of ``protect`` (when, restore,
            mode, record).

    Attributes:
        confined: the ``Confined``, or None.
        guards: by the optimizer's index the ``Guard``, from the beginning of training on.

    Raises:
        ValueError, TypeError: as ``refresh``, ``confine`` and ``protect``; another ``verify``. When
            ``fit`` is called: a module without weights yet (made in its ``setup`` or
            ``configure_model``), FSDP1, DeepSpeed and XLA, ``precision="16-true"`` and "bf16-true"
            under "confine", callbacks that prune weights or unfreeze them, averages of weights that
            are set up before a module is confined, a checkpoint of a run without this callback,
            optimizers that don't own what is protected, ranks with different weights.
        RuntimeError: a matrix trains that nothing covers and that wasn't left out by name; a step
            of an optimizer that isn't among those that were hooked; verifying has
            found that something protected has moved.
    """

    def __init__(
        self,
        subspaces: Ranks | Mapping[str, Subspace],
        method: Method = "confine",
        *,
        verify: Literal["save", "end"] = "save",
        progress: bool = True,
        **options: Any,
    ) -> None:
        if verify not in ("save", "end"):
            raise ValueError(
                f'osf_torch.{NAME}: expected verify to be "save" or "end", got {verify!r}'
            )
        if options.get("restore") == "deferred":
            raise ValueError(
                f"osf_torch.{NAME}: expected restore to be True or False, got 'deferred': the "
                "Trainer evaluates and saves weights before the next step restores them"
            )
        self._given, self._method, self._options = subspaces, method, options
        self._verify, self._progress = verify, progress
        self._protection: Protection | None = None  # whose bases were made in setup
        self._parts: dict[int, Protection] = {}  # by the optimizer's index, once training begins
        self._loaded: Mapping[str, Any] | None = None  # of a checkpoint, until training begins
        self._optimizers: list[Any] = []
        self._writes = True

    @property
    def confined(self) -> Confined | None:
        return None if self._protection is None else self._protection.confined

    @property
    def guards(self) -> dict[int, Guard]:
        return {i: part.guard for i, part in self._parts.items() if part.guard is not None}

    def next_task(self, ranks: Ranks | None = None, **options: Any) -> list[Subspaces | Grown]:
        """Between two calls of ``fit``: protects what the module has learned too.

        Args:
            ranks, options: as of ``Confined.next_task`` and ``Guard.next_task``, such as
                ``batches`` of the task that ends, on which the bases grow; of several optimizers
                they are run for each, and are to be such as can be iterated again.

        Returns:
            The new subspaces, of each optimizer's weights.

        Raises:
            RuntimeError: nothing was trained yet; as these.
            ValueError: as these.
        """
        if not self._parts:
            raise RuntimeError(
                f"osf_torch.{NAME}: expected fit to have trained a module, got none so far"
            )
        return [part.next_task(ranks, **options) for part in self._parts.values()]

    # --- what the Trainer calls ---

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._writes = trainer.is_global_zero
        self._loaded = None
        self._require_trainer(trainer)
        if self._protection is not None and is_model_of(self._protection, pl_module):
            return
        if not any(p.dim() > 1 for p in pl_module.parameters()):
            raise ValueError(
                f"osf_torch.{NAME}: expected a module that has its weights when fit is called, of "
                "which bases are made, got none: setup() and configure_model() come later; make "
                "and load them in __init__"
            )
        if _named_as(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy"):
            # What the strategy does next in any case: bases are computed on the device, of the
            # weights in the dtype in which they train.
            if _named_as(trainer.precision_plugin, "HalfPrecision", "DoublePrecision"):
                trainer.precision_plugin.convert_module(pl_module)
            trainer.strategy.model_to_device()
        self._parts, self._optimizers = {}, []
        self._protection = Protection(
            pl_module,
            self._given,
            self._method,
            operator=NAME,
            progress=self._progress,
            options=self._options,
        )

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Where the Trainer has loaded the module's weights, and not yet the optimizers' states."""
        if self._protection is None or not is_model_of(self._protection, pl_module):
            return  # it validates or tests a module that is plain
        # Taken out, so that the Trainer doesn't copy it for load_state_dict.
        saved = checkpoint["callbacks"].pop(self.state_key, None)
        fits = trainer.state.fn == "fit"
        if saved is None:
            if fits:
                raise ValueError(
                    f"osf_torch.{NAME}: expected a checkpoint that was saved with this callback, "
                    "got one without: what is to be protected can't be found in weights that were "
                    "trained; load them into the module before fit to protect what they are now"
                )
            return
        if saved["method"] != self._method:
            raise ValueError(
                f'osf_torch.{NAME}: expected a checkpoint of method="{self._method}", got one of '
                f'method="{saved["method"]}"; go on with that method'
            )
        states = saved["states"]
        if self._method == "confine":
            self._protection.load(states["0"])
        if fits:
            self._loaded = states

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        protection = self._begun
        if trainer.ckpt_path and self._loaded is None:
            raise ValueError(
                f"osf_torch.{NAME}: expected the state of subspaces in {trainer.ckpt_path}, got "
                "none; resume from a checkpoint that was saved with this callback"
            )
        self._optimizers = [innermost(optimizer) for optimizer in trainer.optimizers]
        states = self._loaded or {}
        if self._method == "confine":
            owner: Any = Optimizers(self._optimizers)
            protection.begin(self._optimizers[0] if len(self._optimizers) == 1 else owner)
            self._parts = {0: protection}
        else:
            self._parts = self._shared_out(protection, states)
            for i, part in self._parts.items():
                part.begin(self._optimizers[i], states.get(str(i)))
        self._loaded = None
        for i, part in enumerate(self._parts.values()):
            part.tell(aloud=trainer.is_global_zero and i == 0)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._method == "confine":
            return
        inner = innermost(optimizer)
        if not any(inner is known for known in self._optimizers):
            raise RuntimeError(
                f"osf_torch.{NAME}: expected a step of an optimizer that was there when training "
                f"began, got another {type(inner).__name__}, which nothing hooks: the optimizers "
                "were replaced; return all of them from configure_optimizers()"
            )
        clips = trainer.gradient_clip_val or _overrides(pl_module, "configure_gradient_clipping")
        for guard in self.guards.values():
            if clips and guard.when == "step":
                guard.project_grads()  # the step projects what clipping by value takes out again

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        drifts = [part.drift() for part in self._parts.values()]
        drift = math.nan if any(map(math.isnan, drifts)) else max(drifts)
        pl_module.log(DRIFT, drift, sync_dist=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for part in self._parts.values():
            part.settle()
        self._look()

    def state_dict(self) -> dict[str, Any]:
        """For the Trainer's checkpoint: the state of ``Confined`` or of each ``Guard``, whole and
        on the host of the rank that writes. Of sharded weights a collective.

        Raises:
            RuntimeError: as ``verify``, with verify="save".
        """
        if self._protection is None:
            return {}
        parts = self._parts or ({0: self._protection} if self.confined is not None else {})
        if self._verify == "save" and self._has_stepped:
            self._look()
        gathered = {
            str(i): _state_files.gathered(part.state(), keep=self._writes)
            for i, part in parts.items()
        }
        return {"method": self._method, "states": gathered}

    # --- what these take ---

    @property
    def _begun(self) -> Protection:
        if self._protection is None:
            raise RuntimeError(
                f"osf_torch.{NAME}: expected setup() to have been called before training, got a "
                "callback that was added later; give it to Trainer(callbacks=)"
            )
        return self._protection

    @property
    def _has_stepped(self) -> bool:
        """Guards that have seen no step yet would say that their hooks don't fire."""
        return bool(self._parts) and all(g.projections for g in self.guards.values())

    def _look(self) -> None:
        for part in self._parts.values():
            part.verify()

    def _shared_out(
        self, protection: Protection, states: Mapping[str, Any]
    ) -> dict[int, Protection]:
        """Of each optimizer that owns a weight to protect, by its index, its own protection."""
        if states:
            return {int(i): self._part(i, protection, state) for i, state in states.items()}
        weights = named_weights(protection.model)
        foreign = [name for name in protection.subspaces if name not in weights]
        if foreign:
            raise unknown(NAME, foreign[0], weights)
        names = [name for name in protection.subspaces if weights[name].requires_grad]
        owners = {
            name: [i for i, o in enumerate(self._optimizers) if id(weights[name]) in owned_by(o)]
            for name in names
        }
        for count, lacks in ((0, "none"), (2, "several")):
            odd = [n for n, found in owners.items() if min(len(found), 2) == count]
            if odd:
                raise ValueError(
                    f"osf_torch.{NAME}: expected one of the optimizers of configure_optimizers() "
                    f"to own each protected weight, got {lacks} for {listed(odd, NAMED)}; "
                    'leave them out by subspaces=, or pass method="confine"'
                )
        if len(self._optimizers) == 1:
            return {0: protection}
        found = {}
        for i in range(len(self._optimizers)):
            own = {n: protection.subspaces[n] for n in names if owners[n] == [i]}
            if own:
                found[i] = self._parts.get(i) or self._made(protection, own)
        return found

    def _part(self, index: str, protection: Protection, state: Mapping[str, Any]) -> Protection:
        """Of an optimizer's weights, those that its state is of."""
        if int(index) >= len(self._optimizers):
            raise ValueError(
                f"osf_torch.{NAME}: expected the optimizers of the run that was saved, got "
                f"{len(self._optimizers)}, and a state of optimizer {index}"
            )
        if len(self._optimizers) == 1:
            return protection
        asked = protection.subspaces
        own = {name: asked[name] for name in state["weights"] if name in asked}
        return self._parts.get(int(index)) or self._made(protection, own or asked)

    def _made(self, protection: Protection, own: Mapping[str, Any]) -> Protection:
        named = named_in(
            protection.model, self._options.get("leave_out"), protection.subspaces, NAME
        )
        options = {**self._options, "leave_out": named}
        return Protection(protection.model, own, "protect", operator=NAME, options=options)

    def _require_trainer(self, trainer: Any) -> None:
        """Refuses what would train weights past the protection, by its name."""
        confines = self._method == "confine"
        callbacks = list(trainer.callbacks)
        before = callbacks[: next(i for i, found in enumerate(callbacks) if found is self)]
        half = _named_as(trainer.precision_plugin, "HalfPrecision")
        for refused, remedy in (
            (
                _named_as(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy"),
                "which trains flat or partitioned copies of the weights; take DDPStrategy, or "
                "ModelParallelStrategy (FSDP2)",
            ),
            (
                half if confines else "",
                "which would round the free block to half precision; convert the module before "
                'fit and pass precision="32-true", or take "bf16-mixed"',
            ),
            (
                "ModelParallelStrategy(save_distributed_checkpoint=False)"
                if confines
                and getattr(trainer.strategy, "_save_distributed_checkpoint", None) is False
                else "",
                "whose loading asks for each parameter by name, C among them, which the checkpoint "
                "has elsewhere; pass True",
            ),
            (
                _any_named_as(callbacks, "ModelPruning"),
                "which zeroes weights, protected parts too; prune before fit",
            ),
            (
                _any_named_as(callbacks, "BaseFinetuning"),
                "which unfreezes weights when training goes on, of which no bases were made; "
                "freeze what isn't to train before fit",
            ),
            (
                _any_named_as(before, "StochasticWeightAveraging", "WeightAveraging")
                if confines
                else "",
                "which copies the module before it is confined; put it after SubspaceCallback",
            ),
        ):
            if refused:
                raise ValueError(
                    f"osf_torch.{NAME}: expected a Trainer under which weights can be protected, "
                    f"got {refused}, {remedy}"
                )


class Optimizers:
    """Several optimizers of one module, as what owns the parameters of all."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.param_groups = [group for one in optimizers for group in one.param_groups]


def _named_as(found: object, *names: str) -> str:
    """The first class of ``found`` with one of these names; by name, so that both packages'
    classes are known and none is imported."""
    return next((kind.__name__ for kind in type(found).__mro__ if kind.__name__ in names), "")


def _any_named_as(found: Iterable[object], *names: str) -> str:
    return next((type(each).__name__ for each in found if _named_as(each, *names)), "")


def _overrides(module: nn.Module, method: str) -> bool:
    """Whether a LightningModule has a method of its own in the place of Lightning's."""
    kind = next(k for k in type(module).__mro__ if method in vars(k))
    return kind.__name__ != "LightningModule" or method in vars(module)
