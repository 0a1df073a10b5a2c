"""transformers' Trainer, and TRL's: one callback that keeps protected directions where they are.

::

    callback = SubspaceCallback(model, 0.5, leave_out="*embed_tokens*")
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])
    trainer.train()  # trainer.train(resume_from_checkpoint=True) resumes

Bases are made when the callback is, of the model as it is then. What resuming takes is written
beside each checkpoint, whose weights have the plain model's names and values. What can't be
protected under the trainer's arguments is refused by name before training.

Supported: transformers 5.x on one device, under DistributedDataParallel and under FSDP2, with TRL's
SFTTrainer and DPOTrainer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from osf_torch.confined import Confined
from osf_torch.grown import Grown
from osf_torch.guard import Guard
from osf_torch.integrations import _training
from osf_torch.integrations._peer import require_peer
from osf_torch.integrations._training import Method, Protection
from osf_torch.selection import Ranks
from osf_torch.subspaces import Subspace, Subspaces

_PEER: Any = require_peer("transformers", "transformers", ">=5.0,<6", "transformers")
_CALLBACK: Any = _PEER.TrainerCallback

NAME = "integrations.transformers.SubspaceCallback"
DRIFT = "osf/drift"  # in the trainer's log history


class SubspaceCallback(_CALLBACK):
    """Confines a model, or protects it, while transformers' Trainer trains it.

    Make it after ``TrainingArguments`` and before the Trainer, of the model that the Trainer is
    given; of a model on a GPU the bases are computed there. With ``method="confine"`` the model is
    confined from then on, and the Trainer trains the free blocks; with "protect" it is protected
    once the Trainer has made its optimizer.

    In a run that is resumed make it of the model as ever, of whatever weights, and call
    ``trainer.train(resume_from_checkpoint=...)``: bases, and what was protected, are those of the
    checkpoint, where ``osf_subspaces.pt`` is beside its weights. The folder is taken to be
    ``output_dir/checkpoint-<step>``; name it as ``subspaces`` where it is another. After
    :meth:`next_task` the free blocks are of another size: make the model of the checkpoint's folder
    and give that folder as ``subspaces``. Weights that the Trainer hasn't loaded are refused (it
    misses the experts of some mixtures). The run is the
    one that was never stopped: to the bit, or to rounding where C stands beside the weight
    (update="beside", rank=), of which a checkpoint has the sum.

    The reference model of DPO is a copy from before or after, by ``copy.deepcopy(model)`` or TRL's
    ``create_reference_model``.

    A log line says at the beginning what is covered. At every save and evaluation, before it, the
    largest drift goes into ``trainer.state.log_history`` as "osf/drift".

    Args:
        model: the model that the Trainer is given.
        subspaces: ranks, as ``refresh`` takes them; or subspaces by parameter name (of ``refresh``,
            ``input_subspaces`` or ``load_subspaces``); or a checkpoint's folder, of whose weights
            the model is.
        method: "confine" or "protect".
        verify: "save" verifies before each save and at the end of training, "end" at the end.
        progress: whether ``refresh`` shows a bar.
        options: ``leave_out``, names or patterns of names of matrices that are to move freely,
            such as "*embed_tokens*", without which those that nothing covers are refused before
            training; of ``confine`` (update, rank, decay_to, dtype, generator) or of ``protect``
            (when, restore, mode, record). ``when`` is "backward" if it isn't given, so that the
            Trainer's clipping and its ``grad_norm`` count what is kept of the gradients alone.

    Attributes:
        confined: the ``Confined``, or None.
        guard: the ``Guard``, from the beginning of training on, or None.

    Raises:
        ValueError, TypeError: as ``refresh``, ``confine`` and ``protect``; another ``verify``;
            ranks that hold weights which differ. Before training begins: another model (also one
            that ``model_init`` makes or that has adapters in it), an optimizer that doesn't own
            what is trained, that steps in the backward pass (layer-wise ones, LOMO), or that
            exchanges weights outside of its steps (schedule-free ones, under "protect"), DeepSpeed,
            FSDP1, hyperparameter search, DataParallel, a state of other weights.
        FileNotFoundError: a resumed run's checkpoint has no ``osf_subspaces.pt``.
        RuntimeError: a matrix trains that nothing covers and that wasn't left out by name;
            verifying has found that something protected has moved.

    Of several ranks every one makes it; where weights are sharded, the state is gathered tensor by
    tensor, and whoever writes the Trainer's checkpoints writes it. There ``when="backward"``
    takes a collective a weight; ``when="step"`` takes one for all, and ``grad_norm`` and the
    Trainer's clipping then count what is removed.
    """

    def __init__(
        self,
        model: nn.Module,
        subspaces: Ranks | Mapping[str, Subspace] | str | os.PathLike[str],
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
        self._verify = verify
        self._began = False
        self._looked_at = -1  # the step at which weights were last settled and looked at
        self._verified_at = -1
        self._folder: Path | None = None
        given: Any = subspaces
        if isinstance(subspaces, str | os.PathLike):
            self._folder = Path(subspaces)
            given = _training.read_state(self._folder, operator=NAME)
        self._protection = Protection(
            model,
            given,
            method,
            operator=NAME,
            progress=progress,
            options=options,
            defaults={"when": "backward"} if method == "protect" else {},
        )

    @property
    def confined(self) -> Confined | None:
        return self._protection.confined

    @property
    def guard(self) -> Guard | None:
        return self._protection.guard

    def next_task(self, ranks: Ranks | None = None, **options: Any) -> Subspaces | Grown:
        """Between two Trainers: protects what the model has learned too.

        Give this callback to the next Trainer, which makes an optimizer of its own.

        Args:
            ranks, options: as of ``Confined.next_task`` and ``Guard.next_task``, such as
                ``batches`` of the task that ends, on which the bases grow.

        Raises:
            ValueError, RuntimeError: as these.
        """
        return self._protection.next_task(ranks, **options)

    # --- what the Trainer calls ---

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._require_arguments(args)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._require_arguments(args)
        self._require_model(model)
        self._require_optimizer(optimizer)
        if state.is_hyper_param_search:
            raise ValueError(
                f"osf_torch.{NAME}: expected one run, got a hyperparameter search, which makes a "
                "model for each trial; make a Trainer and a callback for each"
            )
        saved = None
        if state.global_step:
            folder = self._resumed_from(args, state)
            saved = _training.read_state(folder, operator=NAME)
        try:
            self._protection.begin(optimizer, saved)
        except ValueError as error:
            if not (saved and self._began and args.auto_find_batch_size):
                raise
            raise ValueError(
                f"osf_torch.{NAME}: expected the checkpoint's weights, got those that the attempt "
                "at a larger batch has trained from them, to which the Trainer loads no checkpoint "
                "again; resume anew, with per_device_train_batch_size= as small as it has found"
            ) from error
        self._began = True
        self._looked_at = self._verified_at = -1  # of an earlier run
        self._protection.tell(aloud=state.is_world_process_zero)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save or control.should_evaluate:
            self._look(state, control.should_save)

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._began:
            self._look(state, False)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._looked_at != state.global_step and self._protection.is_deferred:
            raise RuntimeError(
                f"osf_torch.{NAME}: expected to be told of a save before it, got weights saved "
                'that restore="deferred" had still to restore: another callback asks for saves '
                "after this one; put this one last among callbacks="
            )
        self._look(state, True)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        _training.write_state(folder, self._protection.state(), writes=args.should_save)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # Whose weights the Trainer has loaded.
            folder = state.best_model_checkpoint
            saved = _training.read_state(folder, operator=NAME)
            self._protection.load(saved)
        self._protection.settle()
        self._protection.verify()

    def _look(self, state: Any, saves: bool) -> None:
        """Once a step: weights as they are to be saved, verified, and their drift logged."""
        step = state.global_step
        if self._looked_at != step:
            self._protection.settle()
        if saves and self._verify == "save" and self._verified_at != step:
            self._verified_at = step
            self._protection.verify()
        if self._looked_at == step:
            return
        self._looked_at = step
        entry = {DRIFT: self._protection.drift(), "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(entry)

    def _resumed_from(self, args: Any, state: Any) -> Path:
        """The folder of the checkpoint that the Trainer has loaded, which it doesn't tell."""
        name = f"checkpoint-{state.global_step}"
        if self._folder is not None and self._folder.name == name:
            return self._folder
        return Path(args.output_dir) / name

    # --- what is refused before training ---

    def _require_model(self, model: nn.Module) -> None:
        if model is not None and _training.is_model_of(self._protection, model):
            return
        got = type(model).__name__
        why = "that is given to the Trainer as model=, and not by model_init= or by a name"
        if hasattr(model, "peft_config"):
            got += " with an adapter, whose factors aren't the weights that are protected"
            why = "without peft_config=, or take PEFT's OSF tuner (osf_torch.integrations.peft)"
        raise ValueError(
            f"osf_torch.{NAME}: expected the Trainer to train the model that the callback was made "
            f"of, got another, a {got}; make the callback of the model {why}"
        )

    def _require_arguments(self, args: Any) -> None:
        """Refuses what would train weights past the protection, whatever the optimizer is."""
        fsdp: Mapping[str, Any] = _launched_fsdp()
        if args.fsdp:
            fsdp = args.fsdp_config if isinstance(args.fsdp_config, Mapping) else {}
        confines = self._protection.method == "confine"
        for refused, got, remedy in (
            (
                args.deepspeed or _is_true(os.environ.get("ACCELERATE_USE_DEEPSPEED", "")),
                "DeepSpeed, which trains flat copies of the weights",
                "take fsdp=True, or one of osf_torch's own calls with accelerate",
            ),
            (
                int(fsdp.get("version", 2)) < 2,
                "FSDP1",
                'take fsdp_config["version"]=2',
            ),
            (fsdp.get("xla", False), "FSDP of XLA", "take FSDP2"),
            (
                confines and str(fsdp.get("cpu_ram_efficient_loading", False)).lower() == "true",
                'fsdp_config["cpu_ram_efficient_loading"], which makes every parameter that is not '
                "in the state dict anew, C among them",
                'pass False, or method="protect" with subspaces that load_subspaces has read',
            ),
            (
                confines and args.n_gpu > 1,
                f"DataParallel over {args.n_gpu} GPUs, whose copies of a module have no C",
                "start a process for each GPU (torchrun), or show this one a single GPU",
            ),
            (
                _steps_in_backward(args.optim),
                f'optim="{_value(args.optim)}", which steps in the backward pass',
                "take one that steps once all gradients are there",
            ),
        ):
            if refused:
                raise ValueError(
                    f"osf_torch.{NAME}: expected arguments under which weights can be protected, "
                    f"got {got}; {remedy}"
                )

    def _require_optimizer(self, optimizer: Any) -> None:
        inner = _training.innermost(optimizer)
        exchanges = callable(getattr(inner, "train", None)) and callable(
            getattr(inner, "eval", None)
        )
        if exchanges and self._protection.method == "protect":
            raise ValueError(
                f"osf_torch.{NAME}: expected an optimizer that writes to weights in its steps "
                f"alone, got {type(inner).__name__}, which exchanges them for evaluations and "
                'saves, after which nothing would restore them; pass method="confine", of whose '
                "free blocks it may"
            )
        if not isinstance(inner, torch.optim.Optimizer):
            raise ValueError(
                f"osf_torch.{NAME}: expected a torch.optim.Optimizer, got {type(inner).__name__}"
            )


def _is_true(flag: str) -> bool:
    return flag.lower() in ("1", "true", "yes")


def _launched_fsdp() -> dict[str, Any]:
    """What ``accelerate launch`` says of FSDP, of which the Trainer's arguments know nothing; its
    version is 1 where nothing says otherwise."""
    if not _is_true(os.environ.get("ACCELERATE_USE_FSDP", "")):
        return {}
    return {
        "version": os.environ.get("FSDP_VERSION", "1"),
        "cpu_ram_efficient_loading": _is_true(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "")),
    }


def _value(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def _steps_in_backward(optim: Any) -> bool:
    name = _value(optim)
    return name.endswith("layerwise") or "lomo" in name
