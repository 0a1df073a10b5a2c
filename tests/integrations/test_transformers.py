"""integrations.transformers in real runs of the Trainer: held, saved, resumed."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch

from osf_torch import input_subspaces, refresh
from tests.integrations.small_trainers import (
    MOVED,
    arguments,
    copied,
    history,
    moved,
    small_llama,
    tokens,
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


@both
def test_a_run_holds_what_is_protected_and_resumes_to_the_bit(method, tmp_path):
    model = small_llama()
    start = copied(model)
    trainer = trained(model, tmp_path, [callback(model, method)])
    assert moved(copied(model), start) <= MOVED
    assert unequal(copied(model), start), "it has trained"
    again = small_llama(1)  # what was pretrained isn't needed
    resumed = trained(again, tmp_path, [callback(again, method)], resume=tmp_path / "checkpoint-2")
    assert history(resumed, "loss") == history(trainer, "loss")
    assert not unequal(copied(again), copied(model))
    assert moved(copied(again), start) <= MOVED


@both
@pytest.mark.parametrize("asked", [0.25, {"*.mlp.*": 0.5}])
def test_a_run_isnt_resumed_with_other_ranks_or_weights(method, asked, tmp_path):
    model = small_llama()
    trained(model, tmp_path, [callback(model, method)])
    folder = tmp_path / "checkpoint-2"
    again = small_llama(1)
    if isinstance(asked, dict):
        asked = refresh(again, 0.5, filter=list(asked), progress=False)
    with pytest.raises(ValueError, match=r"expected .*q_proj.*folder"):
        trained(again, tmp_path, [callback(again, method, asked)], resume=folder)
    made = transformers.LlamaForCausalLM.from_pretrained(folder)
    made.get_input_embeddings().requires_grad_(False)
    trained(made, tmp_path, [callback(made, method, folder)], resume=folder)
    assert not unequal(copied(made), copied(model))


@both
def test_a_checkpoint_is_the_plain_models_and_what_is_beside_it_is_read_safely(method, tmp_path):
    model = small_llama()
    trainer = trained(model, tmp_path, [callback(model, method)])
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert not unequal(copied(plain), copied(model))
    trainer.save_model(str(tmp_path / "final"))
    final = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")
    assert not unequal(copied(final), copied(model))
    torch.load(tmp_path / "checkpoint-4" / "osf_subspaces.pt", weights_only=True)


@both
@pytest.mark.parametrize("limit", [0.0, 0.1])
def test_the_norm_that_is_told_and_clipped_is_what_is_kept_of_the_gradients(
    method, limit, tmp_path
):
    model = small_llama()
    whole = copy.deepcopy(model)
    batch = {key: torch.stack([t[key] for t in tokens(8)]) for key in tokens(1)[0]}
    whole(**batch).loss.backward()
    subspaces = refresh(whole, 0.5, progress=False)
    kept, raw = 0.0, 0.0
    for name, p in whole.named_parameters():
        if p.grad is None:
            continue
        g = p.grad.double()
        raw += float(g.square().sum())
        if name in subspaces:
            U, _, Vh = torch.linalg.svd(p.detach().double(), full_matrices=False)
            rank = subspaces[name].rank
            g = g - U[:, :rank] @ (U[:, :rank].mT @ g)
            g = g - (g @ Vh[:rank].mT) @ Vh[:rank]
        kept += float(g.square().sum())
    start = copied(model)
    trainer = transformers.Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=1,
            max_grad_norm=limit,
            optim="sgd",
            learning_rate=1.0,
            weight_decay=0,
        ),
        train_dataset=tokens(8),
        callbacks=[callback(model, method)],
    )
    trainer.train()
    (told,) = history(trainer, "grad_norm")
    assert told == pytest.approx(kept**0.5, rel=1e-4)
    assert told < 0.9 * raw**0.5, "the raw one is another"
    change = {name: t - start[name] for name, t in copied(model).items()}
    step = sum(float(t.double().square().sum()) for t in change.values()) ** 0.5
    assert step == pytest.approx(min(told, limit or told), rel=1e-3)


def test_projecting_at_the_step_is_there_by_argument(tmp_path):
    model = small_llama()
    given = callback(model, "protect", when="step")
    told = history(trained(model, tmp_path / "a", [given], max_steps=1), "grad_norm")
    model = small_llama()
    kept = trained(model, tmp_path / "b", [callback(model, "protect")], max_steps=1)
    assert told[0] > 1.1 * history(kept, "grad_norm")[0], "the Trainer's clipping counts all of it"


@both
@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True, "activation_checkpointing": True, "neftune_noise_alpha": 5.0},
        {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2},
        {"optim": "adafactor", "gradient_accumulation_steps": 2, "max_steps": 2},
        {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "max_grad_norm": 0.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_it_holds_under_the_trainers_options(method, options, tmp_path):
    model = small_llama()
    start = copied(model)
    trainer = trained(model, tmp_path, [callback(model, method)], **options)
    assert moved(copied(model), start) <= MOVED
    assert max(history(trainer, "osf/drift")) <= MOVED
    assert unequal(copied(model), start)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("confine", {"update": "beside"}),
        ("confine", {"rank": 4}),
        ("confine", {"decay_to": "zero"}),
        ("protect", {"when": "step", "restore": "deferred"}),
    ],
    ids=str,
)
def test_options_go_to_confine_and_protect_and_resume(method, options, tmp_path):
    model = small_llama()
    start = copied(model)
    first = callback(model, method, **options)
    trained(model, tmp_path, [first])
    assert moved(copied(model), start) <= MOVED
    for key, value in options.items():
        shown = {"restore": "restores"}.get(key, key)
        assert getattr(first.confined or first.guard, shown) == value
    again = small_llama(1)
    given = [callback(again, method, **options)]
    trained(again, tmp_path, given, resume=tmp_path / "checkpoint-2")
    if "update" in options or "rank" in options:  # of which a checkpoint's weight is the sum
        torch.testing.assert_close(copied(again), copied(model), rtol=1e-4, atol=1e-5)
    else:
        assert not unequal(copied(again), copied(model))


@both
def test_drift_is_logged_at_saves_and_evaluations(method, tmp_path):
    model = small_llama()
    options = {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 5}
    trainer = trained(model, tmp_path, [callback(model, method)], **options)
    entries = [e for e in trainer.state.log_history if "osf/drift" in e]
    assert [e["step"] for e in entries] == [1, 2, 3, 4, 5]
    assert all(0 < e["osf/drift"] <= MOVED for e in entries)
    saved = transformers.TrainerState.load_from_json(
        str(tmp_path / "checkpoint-4" / "trainer_state.json")
    )
    assert [e["step"] for e in saved.log_history if "osf/drift" in e] == [1, 2, 3, 4]


@both
def test_what_nothing_covers_is_refused_before_training_unless_it_is_left_out(
    method, tmp_path, caplog
):
    model = small_llama()
    model.model.embed_tokens.requires_grad_(True)
    covered = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n
    )
    total = sum(p.numel() for p in model.parameters())
    caplog.set_level(logging.INFO, "osf_torch")
    start, first = copied(model), callback(model, method)
    with pytest.raises(RuntimeError, match=r"got model\.embed_tokens\.weight \(48x32, nn"):
        trained(model, tmp_path, [first])
    assert not unequal(copied(model), start)
    if method == "confine":
        first.confined.release()
    caplog.clear()
    trained(model, tmp_path, [callback(model, method, leave_out="*embed_tokens*")], max_steps=1)
    name = "integrations.transformers.SubspaceCallback"
    (record,) = [r for r in caplog.records if f"{name}: {method}: " in r.getMessage()]
    assert record.levelno == logging.INFO, "since all was left out by name"
    told = math.floor(1000 * covered / total) / 10
    assert f"{told:g} % of the elements that train are covered" in record.getMessage()
    assert "free to move: model.embed_tokens.weight (48x32, nn.Embedding" in record.getMessage()


def test_the_line_of_coverage_names_nothing_where_all_matrices_are_covered(tmp_path, caplog):
    model = small_llama()
    caplog.set_level(logging.INFO, "osf_torch")
    trained(model, tmp_path, [callback(model, "confine")], max_steps=1)
    (record,) = [r for r in caplog.records if "Callback: confine: " in r.getMessage()]
    assert record.levelno == logging.INFO
    assert "free to move" not in record.getMessage()


def test_weights_that_modules_share_are_left_out_of_confining_by_name(tmp_path):
    model = small_llama(tie_word_embeddings=True)
    start, name = copied(model), "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=rf"{name}.*leave it out by name, leave_out='{name}'"):
        callback(model, "confine")
    trained(model, tmp_path, [callback(model, "confine", leave_out=name)])
    assert moved(copied(model), start) <= MOVED
    assert model.lm_head.weight is model.model.embed_tokens.weight


@both
def test_the_best_model_is_loaded_with_its_own_state(method, tmp_path):
    model = small_llama()
    start = copied(model)
    given = callback(model, method)
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"greater_is_better": True, "metric_for_best_model": "eval_loss", "max_steps": 6}
    options |= {"learning_rate": 2e-2}
    trainer = trained(model, tmp_path, [given], **options)
    losses = history(trainer, "eval_loss")
    assert losses[0] == max(losses), "the first checkpoint is the best by this measure"
    best = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert not unequal(copied(best), copied(model))
    (given.confined or given.guard).verify()
    assert moved(copied(model), start) <= MOVED
    after = trained(model, tmp_path / "next", [given], max_steps=2)
    assert max(history(after, "osf/drift")) <= MOVED
    assert moved(copied(model), start) <= MOVED


@both
def test_rotation_keeps_the_files_together(method, tmp_path):
    model = small_llama()
    options = {"save_steps": 1, "save_total_limit": 2, "save_only_model": True}
    trained(model, tmp_path, [callback(model, method)], **options)
    folders = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert folders == ["checkpoint-3", "checkpoint-4"]
    for folder in folders:
        (tmp_path / folder / "osf_subspaces.pt").stat()
        (tmp_path / folder / "model.safetensors").stat()
        assert not list((tmp_path / folder).glob("*.partial"))


@both
@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_every_save_is_verified_before_it_in_a_second_run_too(
    method, strategy, tmp_path, monkeypatch
):
    """A save at the step of an evaluation, or at the same step as the last one of another run."""
    model = small_llama()
    given = callback(model, method)
    said: list[str] = []
    kind = type(given._protection)
    for name in ("verify", "state"):
        inner = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, inner=inner, name=name: (said.append(name), inner(self))[1]
        )
    options = {"max_steps": 2, "save_strategy": strategy, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"metric_for_best_model": "loss"} if strategy == "best" else {}
    for folder in ("a", "b"):
        said.clear()
        trainer = trained(model, tmp_path / folder, [given], **options)
        assert said == ["verify", "state", "verify"], "the last at the end of training"
        assert len(history(trainer, "osf/drift")) == 1


@both
def test_several_tasks_and_another_folder(method, tmp_path):
    model = small_llama()
    start = copied(model)
    given = callback(model, method)
    trainer = trained(model, tmp_path / "a", [given], max_steps=2)
    trainer.train()  # again, with the optimizer that is there
    trained(model, tmp_path / "b", [given], max_steps=2)  # a new one
    assert moved(copied(model), start) <= MOVED
    learned = copied(model)
    given.next_task(widen=0.1, progress=False)
    trained(model, tmp_path / "c", [given])
    assert moved(copied(model), learned, 0.6) <= 3 * MOVED
    assert unequal(copied(model), learned)
    folder = tmp_path / "c" / "checkpoint-2"
    again = transformers.LlamaForCausalLM.from_pretrained(folder)
    again.get_input_embeddings().requires_grad_(False)
    trained(again, tmp_path / "d", [callback(again, method, folder)], resume=folder)
    assert not unequal(copied(again), copied(model))


@both
def test_subspaces_of_inputs_are_taken_as_they_are(method, tmp_path):
    model = small_llama()
    start = copied(model)
    inputs = [{"input_ids": torch.stack([t["input_ids"] for t in tokens(4)])}]
    subspaces = input_subspaces(model, inputs, energy=0.9)
    trained(model, tmp_path, [callback(model, method, subspaces)])
    require_held(subspaces, start, copied(model))


def require_held(subspaces, start, now):
    """What V holds of each weight hasn't moved."""
    for name, entry in subspaces.items():
        V = entry.V if isinstance(entry.V, torch.Tensor) else entry.V.columns
        low = not isinstance(entry.V, torch.Tensor) and entry.V.spans == "low"
        change = (now[name] - start[name]).double()
        kept = change @ V.double()
        gone = change - kept @ V.double().mT if low else kept
        assert float(gone.norm() / start[name].double().norm()) <= MOVED


@both
def test_a_turn_by_inputs_and_a_resumed_run_that_takes_the_next_one(method, tmp_path):
    model = small_llama()
    given = callback(model, method)
    trained(model, tmp_path / "a", [given])
    inputs = [{"input_ids": torch.stack([t["input_ids"] for t in tokens(4)])}]
    options = {"batches": inputs, "energy": 0.9, "progress": False}
    found, start = given.next_task(**options), copied(model)
    trained(model, tmp_path / "b", [given])
    require_held(found, start, copied(model))
    folder = tmp_path / "b" / "checkpoint-2"
    again = transformers.LlamaForCausalLM.from_pretrained(folder)
    again.get_input_embeddings().requires_grad_(False)
    resumed = callback(again, method, folder)
    trained(again, tmp_path / "c", [resumed], resume=folder)
    one, other = (held.next_task(**options) for held in (given, resumed))
    assert one.keys() == other.keys()
    for name, entry in one.items():
        pairs = zip(entry.spectra["V"], other[name].spectra["V"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


class Convolving(torch.nn.Module):
    """Guesses from the last few tokens, by convolutions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(48, 12).requires_grad_(False)
        self.mix = torch.nn.Conv1d(12, 20, 3)
        self.head = torch.nn.ConvTranspose1d(20, 48, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.head(torch.tanh(self.mix(self.table(input_ids).mT)))
        return {"loss": torch.nn.functional.cross_entropy(x, labels), "logits": x}


@both
def test_convolutions_are_held_and_resumed_to_the_bit(method, tmp_path):
    def begun(seed: int) -> tuple[Any, Any]:
        model = Convolving(seed)
        found = refresh(model, 0.5, filter=["mix.weight", "head.weight"], progress=False)
        return model, callback(model, method, found)

    model, own = begun(0)
    start = copied(model)
    trained(model, tmp_path, [own])
    weights = ("mix.weight", "head.weight")
    now, then = (
        {name: state[name].flatten(1) for name in weights} for state in (copied(model), start)
    )
    assert moved(now, then) <= MOVED
    assert unequal(now, then) == list(weights), "they have trained"
    again, own = begun(1)
    trained(again, tmp_path, [own], resume=tmp_path / "checkpoint-2")
    assert not unequal(copied(again), copied(model))


# --- accelerate alone ---


def _steps(accelerator: Any, model: Any, optimizer: Any) -> None:
    batch = {key: torch.stack([t[key] for t in tokens(8)]) for key in tokens(1)[0]}
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@both
def test_accelerate_by_hand(method):
    from accelerate import Accelerator

    from osf_torch import confine, protect

    model = small_llama()
    start = copied(model)
    accelerator = Accelerator(cpu=True)
    subspaces = refresh(model, 0.5, progress=False)
    held = confine(model, subspaces) if method == "confine" else None
    weights = [p for p in model.parameters() if p.requires_grad]
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(weights, lr=1e-2))
    if method == "protect":
        held = protect(prepared, subspaces, optimizer=optimizer)
    _steps(accelerator, prepared, optimizer)
    held.verify()
    assert moved(copied(model), start) <= MOVED
    assert unequal(copied(model), start)


@both
def test_a_mixture_of_experts_is_resumed_or_refused(method, tmp_path):
    """transformers 5 saves Mixtral's experts under names that its Trainer doesn't load: weights
    that aren't the checkpoint's are refused, and a model made of its folder goes on."""

    def made_anew() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = transformers.MixtralConfig(**sizes, **heads, num_local_experts=4)
        model = transformers.MixtralForCausalLM(config)
        model.get_input_embeddings().requires_grad_(False)
        return model

    model = made_anew()
    trained(model, tmp_path, [callback(model, method)])
    folder = tmp_path / "checkpoint-2"
    other = made_anew()
    if method == "protect":
        with pytest.raises(ValueError, match=r"experts.*by from_pretrained, and resume then"):
            trained(other, tmp_path, [callback(other, method)], resume=folder)
    else:  # the state of a confined model makes its weights of what they began as
        trained(other, tmp_path, [callback(other, method)], resume=folder)
        assert _nearly(other, model)
    again = type(model).from_pretrained(folder)
    again.get_input_embeddings().requires_grad_(False)
    trained(again, tmp_path, [callback(again, method, folder)], resume=folder)
    assert _nearly(again, model)


@both
def test_what_was_left_out_and_is_not_loaded_is_refused(method, tmp_path):
    """A router and experts that train freely are in no state but the model's own checkpoint."""

    def made_anew() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
        config = transformers.MixtralConfig(**sizes, **heads, num_local_experts=4)
        return transformers.MixtralForCausalLM(config)

    def given(model: Any, subspaces: Any = 0.5) -> Any:
        free = ["*experts*", "*gate.weight", "*embed_tokens*"]
        return SubspaceCallback(model, subspaces, method=method, leave_out=free)

    model = made_anew()
    trained(model, tmp_path, [given(model)])
    folder = tmp_path / "checkpoint-2"
    other = made_anew()
    with pytest.raises(ValueError, match=r"experts.*by from_pretrained, and resume then"):
        trained(other, tmp_path, [given(other)], resume=folder)
    again = type(model).from_pretrained(folder)
    trained(again, tmp_path, [given(again, folder)], resume=folder)
    assert _nearly(again, model)


def _nearly(one: Any, other: Any) -> bool:
    expected = copied(other)
    return all(torch.allclose(t, expected[n], rtol=1e-4, atol=1e-6) for n, t in copied(one).items())
