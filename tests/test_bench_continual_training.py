"""The continual bench's training: schedule, order, accuracy, and what each method leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench import continual_run
from bench.continual_methods import INPUT_ENERGY, METHODS, Plain, Tokens, linear_weights
from bench.continual_run import Encoded, Setting
from tests.small_continual import small_encoder, small_tasks


@pytest.mark.parametrize("steps", [1, 7, 80])
def test_rate_warms_up_and_ends_near_zero(steps: int) -> None:
    factors = [continual_run.slope(i, steps) for i in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[-1] == pytest.approx(1 / steps)
    assert continual_run.slope(steps, steps) == 0


def test_ranks_grow_over_the_sequence() -> None:
    setting = Setting(ranks=(0.3, 0.7))
    assert [setting.rank(i, 5) for i in range(5)] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert setting.rank(0, 1) == 0.3


def test_order_shows_every_example_before_any_again() -> None:
    order = continual_run.order_of(7, 17, torch.Generator().manual_seed(3))
    assert len(order) == 17
    assert sorted(order[:7].tolist()) == sorted(order[7:14].tolist()) == list(range(7))


def test_accuracy_counts_by_example_whatever_the_lengths() -> None:
    examples = small_tasks(1)[0].splits["test"]
    encoder = small_encoder()
    head = continual_run.new_head(24, 3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        one_by_one = [
            int(continual_run.logits(encoder, head, examples.batch(i[None])).argmax())
            for i in torch.arange(30)
        ]
    wanted = (torch.tensor(one_by_one) == examples.labels).double().mean()
    assert continual_run.accuracy(encoder, head, examples) == pytest.approx(float(wanted))


PEFT = ("lora", "peft-osf")


def require_peer(method: str) -> None:
    if method in PEFT:
        pytest.importorskip("peft", reason="the method is peft's")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_train_linear_weights_alone(method: str) -> None:
    require_peer(method)
    encoder = small_encoder()
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    learner = METHODS[method].build(encoder)
    tokens = small_tasks(1)[0].splits["train"].batch(torch.arange(8))
    for task in range(2):
        model = learner.begin(task, 0.5, [tokens])
        head = continual_run.new_head(24, 3, torch.Generator().manual_seed(1))
        optimizer = continual_run.trainer(model, head, 1e-2)
        learner.protect(optimizer)
        continual_run.step(model, head, optimizer, tokens, torch.arange(8) % 3)
        learner.end()
    if method == "lora":  # merged here to look at; the sequence goes on with the adapter
        learner.encoder = learner.encoder.merge_and_unload()  # type: ignore[operator]
    after = learner.encoder.state_dict()  # of a confined encoder the plain one's
    assert list(after) == list(before)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    linear = set(linear_weights(small_encoder()))
    if method == "everything":
        assert moved > linear
    else:
        assert moved == linear


@pytest.mark.parametrize(
    ("method", "pinned"), [("complement", True), ("no-restore", False), ("confine", True)]
)
def test_ours_pins_the_protected_part(method: str, pinned: bool) -> None:
    encoder = small_encoder()
    weights = linear_weights(encoder)
    before = {name: w.detach().double().clone() for name, w in weights.items()}
    run_a_task(METHODS[method].build, encoder, 0.5)

    def moved(name: str) -> float:
        U, _, Vh = torch.linalg.svd(before[name], full_matrices=False)
        r = min(before[name].shape) // 2
        change = weights[name].detach().double() - before[name]
        inside = (U[:, :r].mT @ change).norm() + (change @ Vh[:r].mT).norm()
        return float(inside / change.norm())

    worst = max(map(moved, weights))
    assert (worst < 1e-3) == pinned


def test_confined_tasks_grow_and_keep_what_the_one_before_left() -> None:
    encoder, examples = small_encoder(), small_tasks(1)[0].splits["train"]
    learner = METHODS["confine"].build(encoder)
    tokens = examples.batch(torch.arange(8))
    trained = []
    for task, rank in enumerate((0.5, 0.75)):
        left = {name: w.detach().clone() for name, w in linear_weights(encoder).items()}
        a_task(learner, examples, rank, task)
        trained.append(sum(p.numel() for p in encoder.parameters() if p.requires_grad))
        assert all(not torch.equal(w, left[name]) for name, w in linear_weights(encoder).items())
    assert trained[1] < trained[0]
    with torch.no_grad():
        shown = encoder(*tokens)
        plain = small_encoder()
        plain.load_state_dict(encoder.state_dict())
        assert torch.allclose(plain(*tokens), shown, atol=1e-6)


@pytest.mark.parametrize("method", ["inputs", "confine-inputs"])
def test_ours_with_inputs_keeps_later_updates_off_earlier_inputs(method: str) -> None:
    encoder = small_encoder()
    learner = METHODS[method].build(encoder)
    first, second = (task.splits["train"] for task in small_tasks(2))
    a_task(learner, first)
    seen = inputs_of(encoder, first.batch(torch.arange(8)))
    before = {name: w.detach().double().clone() for name, w in linear_weights(encoder).items()}
    a_task(learner, second)
    for name, W in linear_weights(encoder).items():
        change = W.detach().double() - before[name]
        share = (change @ seen[name]).norm() / (seen[name].norm() * torch.linalg.norm(change, 2))
        assert 0 < share <= (1 - INPUT_ENERGY) ** 0.5 + 1e-3, name


def inputs_of(encoder: nn.Module, tokens: Tokens) -> dict[str, Tensor]:
    """Columns that each linear weight is multiplied with, padding left out."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({f"{name}.weight": args[0][tokens[1]].mT})
        )
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        encoder(*tokens)
    for handle in handles:
        handle.remove()
    return {name: x.double() for name, x in seen.items()}


def a_task(learner: Plain, examples: Encoded, rank: float = 0.5, number: int = 0) -> None:
    tokens = examples.batch(torch.arange(8))
    model = learner.begin(number, rank, [tokens])
    head = continual_run.new_head(24, 3, torch.Generator().manual_seed(1))
    optimizer = continual_run.trainer(model, head, 1e-2)
    learner.protect(optimizer)
    for _ in range(4):
        continual_run.step(model, head, optimizer, tokens, torch.arange(8) % 3)
    learner.end()


def run_a_task(build: Callable[[nn.Module], Plain], encoder: nn.Module, rank: float) -> None:
    a_task(build(encoder), small_tasks(1)[0].splits["train"], rank)


def test_sequence_learns_and_leaves_the_encoder_alone() -> None:
    encoder, tasks = small_encoder(), small_tasks(2)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    asked = (METHODS["plain"].build, encoder, tasks, Setting(steps=40, batch=12))
    R = continual_run.train_sequence(*asked, learning_rate=3e-3, seed=0)
    assert [len(line) for line in R] == [1, 2]
    assert continual_run.learned(R) > 0.6  # of three classes
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())
    assert continual_run.train_sequence(*asked, learning_rate=3e-3, seed=0) == R


def test_loss_that_overflows_is_an_error_that_names_the_task() -> None:
    asked = (METHODS["plain"].build, small_encoder(), small_tasks(1), Setting(steps=3, batch=4))
    with pytest.raises(FloatingPointError, match=r"task 't0' is (nan|inf)"):
        continual_run.train_sequence(*asked, learning_rate=math.inf, seed=0)
