"""integrations.transformers on two ranks: DistributedDataParallel, and FSDP2 through accelerate."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.integrations.small_trainers import (
    MOVED,
    arguments,
    copied,
    history,
    moved,
    small_llama,
    tokens,
    unequal,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
RUNS: list[tuple[bool, str, dict[str, Any]]] = [
    (False, "confine", {}),
    (False, "protect", {}),
    (True, "confine", {}),
    (True, "protect", {}),
    (True, "protect", {"when": "step", "restore": "deferred"}),
]
LAYERS = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}


def _ready(rank: int) -> None:
    """What a launcher says to accelerate."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def _trainer(model: Any, folder: Path, callback: Any, shards: bool) -> Any:
    import transformers
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    given: dict[str, Any] = {"per_device_train_batch_size": 4, "load_best_model_at_end": True}
    given |= {"eval_strategy": "steps", "eval_steps": 2}
    given |= {"fsdp": True, "fsdp_config": dict(LAYERS)} if shards else {}
    args = arguments(folder, **given)
    if shards:
        # accelerate leaves FSDP out where its state says MULTI_CPU, and asks for nothing else of a
        # device: told of another kind it shards on the CPU, over gloo.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    data = {"train_dataset": tokens(), "eval_dataset": tokens(8)}
    return transformers.Trainer(model, args, callbacks=[callback], **data)


def _whole(trainer: Any) -> dict[str, torch.Tensor]:
    state = trainer.model.state_dict()
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for name, t in state.items()
    }


def _runs(rank: int, folder: str) -> list[Any]:
    _ready(rank)
    return [_run(Path(folder) / str(i), *run) for i, run in enumerate(RUNS)] + [_refused(rank)]


def _run(folder: Path, shards: bool, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Trains, resumes in the middle, and says what came of both."""
    import transformers

    from osf_torch.integrations.transformers import SubspaceCallback

    found: dict[str, Any] = {}
    for name, seed in (("first", 0), ("resumed", 1)):
        model = small_llama(seed)
        start = copied(model)
        callback = SubspaceCallback(model, 0.5, method, progress=False, **options)
        trainer = _trainer(model, folder, callback, shards)
        resume = None if name == "first" else str(folder / "checkpoint-2")
        trainer.train(resume_from_checkpoint=resume)
        found[name] = _whole(trainer)
        found[f"{name} losses"] = history(trainer, "loss")
        if name == "first":
            found["moved"] = moved(found[name], start)
            found["norms"] = history(trainer, "grad_norm")
            found["drift"] = max(history(trainer, "osf/drift"))
            found["kind"] = type(trainer.model).__name__
            best = trainer.state.best_model_checkpoint
            plain = transformers.LlamaForCausalLM.from_pretrained(best)
            found["saved"] = unequal(copied(plain), found[name])
            found["started"] = start
    return found


def _refused(rank: int) -> list[str]:
    from osf_torch.integrations import _training

    told = []
    try:
        _training.Protection(small_llama(seed=rank), 0.5, operator="x", progress=False)
    except ValueError as error:
        told.append(str(error))
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    held = _training.Protection(model, 0.5, operator="x", progress=False)
    held._imprint += rank  # as of bases that ranks had made apart from each other
    try:
        held.begin(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    except ValueError as error:
        told.append(str(error))
    return told


def test_two_ranks_hold_save_and_resume(tmp_path):
    """And refuse weights and bases that aren't the same on both."""
    (*one, told), (*other, told_too) = run_ranks(2, _runs, str(tmp_path))
    for (shards, _, _), a, b in zip(RUNS, one, other, strict=True):
        assert a["kind"] == ("FSDPLlamaForCausalLM" if shards else "LlamaForCausalLM")
        assert a["moved"] <= MOVED
        assert a["drift"] <= MOVED
        assert unequal(a["first"], a["started"]), "it has trained"
        assert not a["saved"], "a checkpoint has the plain model's names and weights"
        assert not unequal(a["resumed"], a["first"])
        assert a["resumed losses"] == a["first losses"]
        assert not unequal(a["first"], b["first"]), "ranks have one model"
    norms = [run["norms"][0] for run in one]
    assert norms[:4] == pytest.approx([norms[0]] * 4, rel=1e-4), "of what is kept of the gradients"
    assert norms[4] > 1.1 * norms[0], "of all of them"
    for weights, bases in (told, told_too):
        assert "got other weights" in weights
        assert "got other bases" in bases
