"""integrations.transformers: what the Trainer would train past the protection is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations.small_trainers import (
    MOVED,
    arguments,
    copied,
    made,
    moved,
    small_llama,
    trained,
    unequal,
)

transformers = pytest.importorskip("transformers")
osf = pytest.importorskip("osf_torch.integrations.transformers")
SubspaceCallback = osf.SubspaceCallback

pytestmark = [
    pytest.mark.slow,  # importing transformers takes seconds
    pytest.mark.filterwarnings("ignore"),  # transformers' own
]
METHODS = ("confine", "protect")
both = pytest.mark.parametrize("method", METHODS)


def callback(model: Any, method: str, subspaces: Any = 0.5, **options: Any) -> Any:
    return SubspaceCallback(model, subspaces, method, progress=False, **options)


def refused(match: str, model: Any, folder: Any, callbacks: Any, **options: Any) -> None:
    steps: list[int] = []

    class Count(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            steps.append(state.global_step)

    with pytest.raises(ValueError, match=match):
        trained(model, folder, [*callbacks, Count()], **options)
    assert not steps, "refused before training"


@both
def test_another_model_is_refused(method, tmp_path):
    given = callback(small_llama(), method)
    refused("got another, a LlamaForCausalLM", small_llama(), tmp_path, [given])


@both
def test_a_model_that_the_trainer_makes_is_refused(method, tmp_path):
    given = callback(small_llama(), method)
    refused("not by model_init=", None, tmp_path, [given], model_init=lambda: small_llama())


@both
def test_adapters_are_refused(method, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"])
    model = small_llama()
    given = callback(model, method)
    refused("with an adapter", peft.get_peft_model(model, config), tmp_path, [given])
    model = small_llama()
    given = callback(model, method)
    model.add_adapter(config)
    match = "LoRA adapter" if method == "confine" else "q_proj.lora_A"
    refused(match, model, tmp_path, [given])


def test_an_optimizer_from_before_is_refused_under_confine_alone(tmp_path):
    model = small_llama()
    early = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = callback(model, "confine")
    match = "made before the model was confined"
    refused(match, model, tmp_path, [given], optimizers=(early, None))
    model = small_llama()
    start = copied(model)
    early = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(model, tmp_path, [callback(model, "protect")], optimizers=(early, None))
    assert moved(copied(model), start) <= MOVED


def test_an_optimizer_of_other_weights_is_refused(tmp_path):
    model = small_llama()
    other = torch.optim.AdamW(small_llama().parameters(), lr=1e-2)
    match = "expected optimizer to own parameter"
    refused(match, model, tmp_path, [callback(model, "protect")], optimizers=(other, None))


class Exchanging(torch.optim.SGD):
    """As schedule-free ones: what is evaluated is another point than what trains."""

    def eval(self) -> None:
        self._exchange(0.5)

    def train(self) -> None:
        self._exchange(2.0)

    @torch.no_grad()
    def _exchange(self, factor: float) -> None:
        if self.param_groups[0].setdefault("evaluates", False) is (factor < 1):
            return
        self.param_groups[0]["evaluates"] = factor < 1
        for p in self.param_groups[0]["params"]:
            p.mul_(factor)


def test_exchanged_weights_are_current_under_confine_and_refused_under_protect(tmp_path):
    model = small_llama()
    start = copied(model)
    given = callback(model, "confine")
    optimizer = Exchanging([p for n, p in model.named_parameters() if n.endswith("_free")], lr=0.1)
    options = {"eval_strategy": "steps", "eval_steps": 2, "optimizers": (optimizer, None)}
    trained(model, tmp_path, [given], **options)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert optimizer.param_groups[0]["evaluates"], "saved as it is evaluated"
    assert not unequal(copied(plain), copied(model))
    assert moved(copied(plain), start) <= MOVED
    model = small_llama()
    given, optimizer = callback(model, "protect"), Exchanging(model.parameters(), lr=0.1)
    refused("which exchanges them", model, tmp_path, [given], optimizers=(optimizer, None))


@both
def test_arguments_that_would_train_past_it_are_refused(method, tmp_path):
    """Of what takes other machines, the arguments alone."""
    given = callback(small_llama(), method)
    loading = {"version": 2, "cpu_ram_efficient_loading": True}
    for match, changed in {
        "got DeepSpeed": {"deepspeed": "zero3.json"},
        "got FSDP1": {"fsdp": True, "fsdp_config": {"version": 1}},
        "steps in the backward pass": {"optim": "galore_adamw_layerwise"},
        '"adalomo", which steps': {"optim": "adalomo"},
        "C among them": {"fsdp": True, "fsdp_config": loading},
        "DataParallel over 2": {"_n_gpu": 2},
    }.items():
        args = arguments(tmp_path)
        vars(args).update(changed)
        if method == "protect" and match in ("C among them", "DataParallel over 2"):
            given.on_init_end(args, None, None)
            continue
        with pytest.raises(ValueError, match=match):
            given.on_init_end(args, None, None)
        with pytest.raises(ValueError, match=match):
            given.on_train_begin(args, SimpleNamespace(global_step=0), None)


@both
@pytest.mark.parametrize(
    ("match", "launched"),
    [
        ("got DeepSpeed", {"ACCELERATE_USE_DEEPSPEED": "true"}),
        ("got FSDP1", {"ACCELERATE_USE_FSDP": "true"}),
        (
            "C among them",
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
            },
        ),
    ],
)
def test_what_accelerate_launch_says_is_looked_at(method, match, launched, tmp_path, monkeypatch):
    given, args = callback(small_llama(), method), arguments(tmp_path)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    if method == "protect" and match == "C among them":
        given.on_init_end(args, None, None)
        return
    with pytest.raises(ValueError, match=match):
        given.on_init_end(args, None, None)


def test_arguments_are_refused_when_the_trainer_is_made(tmp_path):
    model = small_llama()
    with pytest.raises(ValueError, match="steps in the backward pass"):
        made(model, tmp_path, [callback(model, "confine")], optim="lomo")


@both
def test_a_search_is_refused(method, tmp_path):
    model = small_llama()
    state = SimpleNamespace(global_step=0, is_hyper_param_search=True)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="got a hyperparameter search"):
        callback(model, method).on_train_begin(
            arguments(tmp_path), state, None, model=model, optimizer=optimizer
        )


class Replaced(transformers.TrainerCallback):
    """Steps with another optimizer from the second step on."""

    trainer: Any = None

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 1:
            weights = [p for p in model.parameters() if p.requires_grad]
            self.trainer.optimizer = torch.optim.AdamW(weights, lr=1e-2)


def test_another_optimizer_is_refused_under_protect(tmp_path):
    model = small_llama()
    replaced = Replaced()
    replaced.trainer = made(model, tmp_path, [callback(model, "protect"), replaced])
    with pytest.raises(RuntimeError, match="the optimizer that the weights were protected with"):
        replaced.trainer.train()
    assert not (tmp_path / "checkpoint-2").exists(), "before anything is saved"


def test_another_optimizer_holds_under_confine(tmp_path):
    model = small_llama()
    start = copied(model)
    replaced = Replaced()
    replaced.trainer = made(model, tmp_path, [callback(model, "confine"), replaced])
    replaced.trainer.train()
    assert moved(copied(model), start) <= MOVED


@both
@pytest.mark.parametrize("verify", ["save", "end"])
def test_weights_that_are_written_to_are_found_at_saves_or_at_the_end(method, verify, tmp_path):
    model = small_llama()

    class Write(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 1:
                model.lm_head.weight.data.view(-1)[0] += 1.0

    given = callback(model, method, verify=verify)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        trained(model, tmp_path, [Write(), given], save_steps=1, max_steps=1)
    assert (tmp_path / "checkpoint-1").exists() is (verify == "end")


@both
def test_running_out_of_memory(method, tmp_path):
    model = small_llama()
    start = copied(model)
    trainer = made(model, tmp_path, [callback(model, method)], auto_find_batch_size=True)
    _fails_once(trainer, 3)
    trainer.train()
    assert moved(copied(model), start) <= MOVED
    again = small_llama(1)
    trainer = made(again, tmp_path, [callback(again, method)], auto_find_batch_size=True)
    _fails_once(trainer, 2)
    folder = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="resume anew, with per_device_train_batch_size="):
        trainer.train(resume_from_checkpoint=folder)


def _fails_once(trainer: Any, at: int) -> None:
    step, calls = trainer.training_step, []

    def training_step(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("CUDA out of memory.")
        return step(*args, **options)

    trainer.training_step = training_step


@both
def test_a_checkpoint_without_its_state_or_with_anothers_is_refused(method, tmp_path):
    model = small_llama()
    trained(model, tmp_path, [callback(model, method)], max_steps=2)
    file = tmp_path / "checkpoint-2" / "osf_subspaces.pt"
    own = file.read_bytes()
    other = small_llama(7)
    trained(other, tmp_path / "other", [callback(other, method)], max_steps=2)
    again = small_llama()
    file.write_bytes((tmp_path / "other" / "checkpoint-2" / "osf_subspaces.pt").read_bytes())
    refused("off by", again, tmp_path, [callback(again, method)], resume=file.parent)
    file.write_bytes(own)
    again = small_llama()
    switched = METHODS[method == "confine"]
    match = f'expected a state of method="{switched}"'
    refused(match, again, tmp_path, [callback(again, switched)], resume=file.parent)
    file.unlink()
    again = small_llama()
    with pytest.raises(FileNotFoundError, match=r"osf_subspaces\.pt beside the checkpoint"):
        trained(again, tmp_path, [callback(again, method)], resume=file.parent)


def test_options_of_a_resumed_run_are_the_states_or_refused(tmp_path):
    model = small_llama()
    given = callback(model, "protect", when="step")
    trained(model, tmp_path, [given], max_steps=2)
    folder = tmp_path / "checkpoint-2"
    again = small_llama(1)
    resumed = callback(again, "protect", record=True)
    trained(again, tmp_path, [resumed], resume=folder, max_steps=3)
    assert resumed.guard.when == "step"
    assert resumed.guard.leak()
    again = small_llama(1)
    other = callback(again, "protect", restore=False)
    refused("expected restore to be left out", again, tmp_path, [other], resume=folder)


def test_a_save_after_what_is_deferred_is_refused(tmp_path):
    model = small_llama()

    class Save(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_save = state.global_step == 1
            return control

    given = callback(model, "protect", when="step", restore="deferred")
    with pytest.raises(RuntimeError, match="put this one last"):
        trained(model, tmp_path / "a", [given, Save()])
    model = small_llama()
    given = callback(model, "protect", when="step", restore="deferred")
    trained(model, tmp_path / "b", [Save(), given])


@pytest.mark.parametrize(
    ("given", "match"), [({"verify": "never"}, "verify"), ({"method": "guard"}, "method")]
)
def test_arguments_of_its_own_are_refused(given, match):
    with pytest.raises(ValueError, match=f"expected {match} to be"):
        SubspaceCallback(small_llama(), 0.5, **given)
