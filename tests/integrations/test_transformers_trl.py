"""integrations.transformers in TRL's trainers: SFTTrainer and DPOTrainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.integrations.small_trainers import MOVED, copied, history, moved, small_llama, unequal

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="TRL isn't installed: .ci/requirements-peers.txt has it")
osf = pytest.importorskip("osf_torch.integrations.transformers")
create_reference_model = pytest.importorskip("trl.experimental.utils").create_reference_model

pytestmark = [
    pytest.mark.slow,  # importing TRL takes seconds
    pytest.mark.filterwarnings("ignore"),  # transformers' and TRL's own
]
both = pytest.mark.parametrize("method", ["confine", "protect"])
OPTIONS = {
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


def tokenizer() -> Any:
    """Of forty words, in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(f"w{int(i)}" for i in torch.randint(0, 40, (count,), generator=generator))


def texts() -> Any:
    from datasets import Dataset

    drawn = torch.Generator().manual_seed(0)
    return Dataset.from_list([{"text": words(8, drawn)} for _ in range(16)])


def preferences() -> Any:
    from datasets import Dataset

    drawn = torch.Generator().manual_seed(0)
    return Dataset.from_list(
        [
            {
                "prompt": words(4, drawn),
                "chosen": f" {words(3, drawn)}",
                "rejected": f" {words(3, drawn)}",
            }
            for _ in range(16)
        ]
    )


def sft(model: Any, folder: Any, method: str, **options: Any) -> Any:
    given = osf.SubspaceCallback(model, 0.5, method, progress=False)
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(folder), **OPTIONS),
        train_dataset=texts(),
        processing_class=tokenizer(),
        callbacks=[given],
        **options,
    )


def dpo(model: Any, folder: Any, callback: Any, reference: Any, **options: Any) -> Any:
    return trl.DPOTrainer(
        model,
        ref_model=reference,
        args=trl.DPOConfig(str(folder), **OPTIONS, **options),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        callbacks=[callback],
    )


@both
def test_sft_holds_and_resumes_to_the_bit(method, tmp_path):
    model = small_llama()
    start = copied(model)
    trainer = sft(model, tmp_path, method)
    trainer.train()
    assert moved(copied(model), start) <= MOVED
    assert unequal(copied(model), start)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert not unequal(copied(plain), copied(model))
    again = small_llama(1)
    resumed = sft(again, tmp_path, method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not unequal(copied(again), copied(model))
    assert history(resumed, "loss") == history(trainer, "loss")


def test_sft_with_an_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"])
    trainer = sft(small_llama(), tmp_path, "confine", peft_config=config)
    with pytest.raises(ValueError, match="with an adapter, whose factors"):
        trainer.train()


@both
def test_dpo_holds_and_leaves_a_copied_reference_as_it_was(method, tmp_path):
    model = small_llama()
    start = copied(model)
    callback = osf.SubspaceCallback(model, 0.5, method, progress=False)
    trainer = dpo(model, tmp_path, callback, copy.deepcopy(model))
    trainer.train()
    assert moved(copied(model), start) <= MOVED
    assert unequal(copied(model), start)
    assert not unequal(copied(trainer.ref_model), start)
    assert history(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-4)


def test_dpo_holds_where_the_reference_follows(tmp_path):
    model = small_llama()
    start = copied(model)
    callback = osf.SubspaceCallback(model, 0.5, progress=False)
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    trainer = dpo(model, tmp_path, callback, copy.deepcopy(model), **options)
    trainer.train()
    assert moved(copied(model), start) <= MOVED
    assert moved(copied(trainer.ref_model), start) <= MOVED
    assert unequal(copied(trainer.ref_model), start)


@pytest.mark.parametrize("first", ["reference", "confined"])
def test_a_reference_is_made_of_the_model_before_it_is_confined_or_after(first, tmp_path):
    model = small_llama()
    start = copied(model)
    if first == "reference":
        reference = create_reference_model(model)
    callback = osf.SubspaceCallback(model, 0.5, progress=False)
    if first == "confined":
        reference = create_reference_model(model)
    trainer = dpo(model, tmp_path, callback, reference)
    trainer.train()
    assert moved(copied(model), start) <= MOVED
    assert not unequal(copied(trainer.ref_model), start)


@both
@pytest.mark.parametrize("shared", [None, 1])
def test_a_reference_model_is_a_frozen_copy_of_what_trains(method, shared):
    """TRL asks for every parameter by its name, and shares the memory of the first layers."""
    model = small_llama()
    callback = osf.SubspaceCallback(model, 0.5, method=method, progress=False)
    if method == "confine":
        with torch.no_grad():
            for t in callback.confined.parameters():
                t.add_(0.1)
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    reference = create_reference_model(model, num_shared_layers=shared)
    wanted = model.eval()(ids).logits.detach()
    assert torch.equal(reference(ids).logits, wanted)
    assert not any(p.requires_grad for p in reference.parameters())
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("layers.1." in name for name in trains)
    assert any("layers.0." in name for name in trains) is (shared is None)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trains:
                p.add_(0.1)
    assert not torch.equal(model(ids).logits, wanted)
    assert torch.equal(reference(ids).logits, wanted)
