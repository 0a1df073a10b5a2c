"""integrations.axolotl on axolotl's own plug-in base, manager and configuration.

axolotl's trainers need packages in versions of its own. transformers' Trainer, of which they are
subclasses, stands for them, and takes the callbacks that axolotl's builders take from the manager.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from osf_torch import load_subspaces, refresh, save_subspaces
from tests.integrations.small_trainers import MOVED, copied, moved, small_llama, trained, unequal

base = pytest.importorskip("axolotl.integrations.base", reason="axolotl isn't installed")
config = pytest.importorskip("axolotl.integrations.config")
dicts = pytest.importorskip("axolotl.utils.dict")

pytestmark = [
    pytest.mark.slow,  # importing transformers takes seconds
    pytest.mark.filterwarnings("ignore"),  # the peers' own
]
PLUGIN = "osf_torch.integrations.axolotl.SubspacePlugin"
both = pytest.mark.parametrize("method", ["confine", "protect"])


@pytest.fixture
def manager() -> Iterator[Any]:
    found = base.PluginManager.get_instance()
    found.register(PLUGIN)
    assert PLUGIN in found.plugins, "the manager logs what it can't import, and goes on"
    yield found
    found.plugins.clear()


def configured(**keys: Any) -> Any:
    """As axolotl reads its YAML file: validated by its class with the plug-in's keys among its."""
    _, kind = config.merge_input_args()
    given = {
        "base_model": "small",
        "datasets": [{"path": "data", "type": "alpaca"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "plugins": [PLUGIN],
        **keys,
    }
    return dicts.DictDefault(kind(**given).model_dump(exclude_none=True))


@both
def test_a_run_is_held_and_resumed(method, manager, tmp_path):
    cfg = configured(subspaces_rank=0.5, subspaces_method=method)

    def run(seed: int, **options: Any) -> Any:
        model = small_llama(seed)
        start = copied(model)
        callbacks = manager.add_callbacks_pre_trainer(cfg, model)
        trainer = trained(model, tmp_path, callbacks, **options)
        manager.post_trainer_create(cfg, trainer)
        return model, start

    model, start = run(0)
    assert moved(copied(model), start) <= MOVED
    assert unequal(copied(model), start), "it has trained"
    if method == "protect":  # which resumes by the same callback
        return
    again, _ = run(1, resume=tmp_path / "checkpoint-2")
    assert not unequal(copied(again), copied(model))


def test_subspaces_of_a_file(manager, tmp_path):
    model = small_llama()
    path = tmp_path / "subspaces.safetensors"
    save_subspaces(path, refresh(model, 3, filter="*q_proj*", progress=False), model)
    cfg = configured(subspaces_file=str(path))
    (callback,) = manager.add_callbacks_pre_trainer(cfg, model)
    assert [place.name for place in callback.confined.places] == list(
        load_subspaces(path, small_llama())
    )


def test_a_number_of_directions_stays_one(manager):
    assert configured(subspaces_rank=1).subspaces_rank == 1
    assert isinstance(configured(subspaces_rank=1).subspaces_rank, int)
    assert isinstance(configured(subspaces_rank=1.0).subspaces_rank, float)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({}, "got neither"),
        ({"subspaces_rank": 0.5, "subspaces_file": "x"}, "got subspaces_rank and subspaces_file"),
        ({"subspaces_rank": 0.5, "subspaces_method": "freeze"}, "subspaces_method"),
        ({"subspaces_rank": 0.5, "adapter": "lora"}, "adapter: lora"),
        ({"subspaces_rank": 0.5, "load_in_8bit": True}, "load_in_8bit"),
        (
            {"subspaces_rank": 0.5, "unfrozen_parameters": ["lm_head.weight[:10]"]},
            "reaches into the other rows",
        ),
    ],
    ids=str,
)
def test_what_would_train_something_else_is_refused_by_name(keys, match, manager):
    with pytest.raises(ValueError, match=match):
        configured(**keys)


def test_a_trainer_without_the_callback_is_refused(manager, tmp_path):
    cfg = configured(subspaces_rank=0.5)
    trainer = trained(small_llama(), tmp_path, [])
    with pytest.raises(ValueError, match="without it, under which nothing would be protected"):
        manager.post_trainer_create(cfg, trainer)
