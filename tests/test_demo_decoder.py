"""What the demo says of a decoder: on a tiny random Llama, and from figures made by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="the demo draws with rich")
pytest.importorskip("tokenizers", reason="the vocabulary is read by tokenizers")
pytest.importorskip("transformers", reason="the decoder is one of transformers")

import osf_torch
from bench import demo_decoder as demo
from bench.decoder import Decoder
from bench.demo_decoder import FIRST, OURS, PLAIN, SECOND, Bench, Course, Look
from tests.small_decoder import small_decoder, small_tokenizer, task


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


def bench_of(tokenizer: Any, steps: int = 4) -> Bench:
    decoder = Decoder(tokenizer)
    tasks = [task(name, per_split=24) for name in (FIRST, SECOND)]
    return Bench(decoder, {one.name: decoder.encode(one) for one in tasks}, steps)


def test_both_methods_start_where_the_first_task_ended(tokenizer: Any) -> None:
    model, bench = small_decoder(), bench_of(tokenizer)
    said: list[str] = []
    fresh, courses = demo.compare(model, bench, said.append)
    assert list(courses) == [PLAIN, OURS]
    plain, ours = courses.values()
    assert plain.looks[0] == ours.looks[0]
    assert [look.step for look in plain.looks] == [look.step for look in ours.looks] == [0, 2, 4]
    assert fresh.general != plain.looks[0].general, "the first task was trained"
    assert plain.looks[-1] != ours.looks[-1]
    assert all(course.seconds > 0 for course in courses.values())
    assert len(said) == 2 + demo.FIRST_STEPS + 2 * bench.steps


def test_what_is_read_of_the_first_task_and_of_prose_is_protected(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What confine is given stays, and the rest moves."""
    held: dict[str, Any] = {}
    start: dict[str, torch.Tensor] = {}
    confine = osf_torch.confine

    def noted(model: nn.Module, subspaces: Any) -> Any:
        held.update(subspaces)
        start.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return confine(model, subspaces)

    monkeypatch.setattr(osf_torch, "confine", noted)
    model, bench = small_decoder(), bench_of(tokenizer)
    demo.compare(model, bench, lambda _: None)
    assert held.keys() == bench.decoder.weights(small_decoder()).keys()
    after = model.state_dict()
    for name, entry in held.items():
        change = (after[name] - start[name]).double()
        assert entry.U is None
        kept = (change @ entry.V.columns.double()).norm() / change.norm()
        assert float(change.norm()) > 0
        assert float(kept) < 1e-4, name


def test_steps_are_the_same_for_every_method(tokenizer: Any) -> None:
    bench = bench_of(tokenizer)
    one, other = bench.order(SECOND), bench.order(SECOND)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert [len(index) for index in one] == [demo.BATCH] * bench.steps
    batches = bench.read()
    assert sum("attention_mask" in batch for batch in batches) == demo.READ
    assert sum(len(batch["input_ids"]) for batch in batches) >= demo.BATCH + demo.PROSE


def course(*looks: tuple[int, float, float, float]) -> Course:
    return Course([Look(*look) for look in looks], 1.0)


START = (0, 0.5, 0.2, 3.0)
FRESH = Look(0, 0.25, 0.2, 2.9)


def test_the_sentence_tells_what_each_method_took_and_learned() -> None:
    courses = {PLAIN: course(START, (4, 0.3, 0.45, 3.4)), OURS: course(START, (4, 0.48, 0.5, 3.01))}
    held, sentence = demo.verdict(FRESH, courses)
    assert held
    for part in (
        "from 20% to 45% by plain fine-tuning and to 50% by confine",
        "from 25% to 50%, went to 30% and to 48%",
        "rose by +0.400 and by +0.010",
    ):
        assert part in sentence


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ((4, 0.48, 0.5, 3.5), "the loss on prose rose no less"),
        ((4, 0.2, 0.5, 3.01), f"'{FIRST}' was forgotten more"),
        ((4, 0.48, 0.2, 3.01), f"'{SECOND}' wasn't learned"),
        ((4, 0.48, 0.5, float("nan")), "the loss on prose rose no less"),
    ],
)
def test_what_did_not_hold_is_said(end: tuple[int, float, float, float], reason: str) -> None:
    courses = {PLAIN: course(START, (4, 0.3, 0.45, 3.4)), OURS: course(START, end)}
    held, sentence = demo.verdict(FRESH, courses)
    assert not held
    assert sentence.startswith("Not shown, by confine ")
    assert reason in sentence


def test_picture_and_exit_status(
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")
    model, bench = small_decoder(), bench_of(tokenizer)
    monkeypatch.setattr(demo, "prepared", lambda *_: (copy.deepcopy(model), bench))
    picture = tmp_path / "folder" / "demo.png"
    status = demo.main(["--steps", "4", "--picture", str(picture)])
    out = capsys.readouterr().out
    assert status == (1 if "Not shown" in out else 0)
    assert f"picture: {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_and_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--steps", "0"]) == 2
    assert "expected --steps to be at least 1, got 0" in capsys.readouterr().err

    def missing(*_: object) -> Any:
        raise FileNotFoundError("bench.smollm: expected the packages")

    monkeypatch.setattr(demo, "prepared", missing)
    assert demo.main([]) == 2
    assert "bench.smollm: expected the packages" in capsys.readouterr().err
