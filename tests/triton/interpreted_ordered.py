"""Partial sums of programs that run side by side, under Triton's interpreter (interpreter.py).

The parts of a product in float32 accuracy arrive in any order; the sum has the same bits. Those of
a projection are in interpreted_tasks.py.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from osf_kernels.backends import triton as backend
from osf_kernels.backends.triton import configs, dispatch, launch
from osf_kernels.backends.triton.kernels import gram as gram_kernels
from osf_kernels.backends.triton.kernels import multiply as multiply_kernels
from tests.helpers import generator_for
from tests.triton.interleaving import Stuck, interleave
from tests.triton.jobs import assert_gram, assert_multiply, draw
from tests.triton.watching import watch

MULTIPLY = configs.Multiply(32, 16, 16, 4, 1)
GRAM = configs.Gram(32, 32, 4, 1)
SEEDS = range(3)
# More than are resident side by side, and fewer than there are tiles: some claim several, and those
# that start when others have ended find what these have left.
PROGRAMS = 9


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SHORTEST_SPLIT", 32)
    monkeypatch.setattr(configs, "SHORTEST_GRAM_SPLIT", 32)


@pytest.fixture(autouse=True)
def _more_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_INTERPRETED_PROGRAMS", PROGRAMS)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is read before it is written is NaN."""
    empty = torch.empty

    def nan(*args: object, **options: object) -> Tensor:
        made: Tensor = empty(*args, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan)


class Multiply:
    """Aᵀ Q of two matrices, the sum over 100 rows in three parts."""

    kernels: ModuleType = multiply_kernels

    def __init__(self) -> None:
        g = generator_for("products side by side")
        self.As = [draw(100, 40, torch.float32, g) for _ in range(2)]
        self.Q = torch.randn(2, 100, 12, generator=g)
        self.out = torch.empty(2, 40, 12)

    def run(self) -> None:
        self.out.fill_(torch.nan)
        backend.multiply(self.As, self.Q, self.out, transpose=True, config=MULTIPLY)

    def check(self) -> None:
        assert_multiply(self.As, self.Q, self.out, True)


class Gram:
    """Aᵀ A of two matrices, the sum over 100 rows in three parts."""

    kernels: ModuleType = gram_kernels

    def __init__(self) -> None:
        g = generator_for("squares side by side")
        self.As = [draw(100, 40, torch.float32, g) for _ in range(2)]
        self.out = torch.empty(2, 40, 40)

    def run(self) -> None:
        self.out.fill_(torch.nan)
        backend.gram(self.As, self.out, config=GRAM)

    def check(self) -> None:
        assert_gram(self.As, self.out, "right")


PRODUCTS: dict[str, type[Multiply | Gram]] = {"multiply": Multiply, "gram": Gram}
NAMES = ("multiply", pytest.param("gram", marks=pytest.mark.slow))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", NAMES)
def test_any_order_of_programs_gives_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = PRODUCTS[name]()
    case.run()
    case.check()
    expected = case.out.clone()
    for seed in SEEDS:
        with monkeypatch.context() as patch:
            launched = interleave(patch, seed)
            case.run()
        assert launched == [PROGRAMS], "one launch"
        assert torch.equal(case.out, expected), seed


@triton.jit
def no_wait(counters, products):
    pass


@triton.jit
def uncounted(counters, AMD: tl.constexpr):
    pass


@triton.jit
def not_reset(counters, claimed, tiles):
    pass


LAST = tl.constexpr(15)  # tile of Multiply()


@triton.jit
def sums_first(counters):
    return LAST - tl.atomic_add(counters, 1, sem="relaxed", scope="gpu").to(tl.int32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", NAMES)
def test_a_sum_that_does_not_wait_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what is not written yet."""
    case = PRODUCTS[name]()
    monkeypatch.setattr(case.kernels, "wait_for_products", no_wait)
    for seed in range(12):
        with monkeypatch.context() as patch:
            interleave(patch, seed)
            case.run()
        if bool(case.out.isnan().any()):
            return
    pytest.fail("never seen")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutant"), [("done", uncounted), ("claim", sums_first)])
def test_a_wait_without_end_is_seen(
    name: str, mutant: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a product that does not count, or that nobody is left to claim."""
    watching = watch(monkeypatch)
    monkeypatch.setattr(multiply_kernels, name, mutant)
    interleave(monkeypatch, 0, resident=2)
    with pytest.raises(InterpreterError, match=Stuck.__name__):
        Multiply().run()
    (made,) = watching.planned
    assert made.tasks == LAST.value + 1


@pytest.mark.slow
def test_parts_are_added_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """One element a part: the sum is that of a loop over the parts in float32, to the bit."""
    g = generator_for("order of parts")
    m, n = 9 * 32, 20
    scales = torch.logspace(-3, 3, m)[torch.randperm(m, generator=g)]
    x = torch.randn(m, n, generator=g) * scales[:, None]
    Q = torch.zeros(1, m, 4)
    Q[:, ::32] = 1.0
    rows = x[::32]
    square = torch.zeros(m, n)
    square[::32] = rows
    expected, backwards = torch.zeros(n), torch.zeros(n)
    squared, squared_backwards = torch.zeros(n, n), torch.zeros(n, n)
    for part in range(9):
        expected, backwards = expected + rows[part], backwards + rows[8 - part]
        squared = squared + rows[part, :, None] * rows[part]
        squared_backwards = squared_backwards + rows[8 - part, :, None] * rows[8 - part]
    assert not torch.equal(expected, backwards)
    assert not torch.equal(squared, squared_backwards)
    out, squares = torch.empty(1, n, 4), torch.empty(1, n, n)
    for seed in SEEDS:
        with monkeypatch.context() as patch:
            interleave(patch, seed)
            backend.multiply([x], Q, out, transpose=True, config=MULTIPLY)
            backend.gram([square], squares, config=GRAM)
        assert torch.equal(out[0], expected[:, None].expand(n, 4))
        assert torch.equal(squares[0], squared)


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same metadata serves the next call: nothing of it has changed."""
    watching = watch(monkeypatch)
    interleave(monkeypatch, 7)
    Multiply().run()
    Gram().run()
    assert len(watching.planned) == 2
    for made, metadata in zip(watching.planned, watching.records, strict=True):
        _, tiles, sums = made.counts
        assert sums == 2
        assert min(tiles, made.tasks - tiles) > 0
        assert made.tasks > PROGRAMS
        assert metadata[: len(made.metadata)].tolist() == made.metadata


def test_counters_that_are_not_reset_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = watch(monkeypatch)
    monkeypatch.setattr(multiply_kernels, "finish", not_reset)
    Multiply().run()
    (made,), (metadata,) = watching.planned, watching.records
    left = [made.tasks + PROGRAMS, made.counts[1], *made.metadata[2:]]
    assert metadata[: len(made.metadata)].tolist() == left


@pytest.mark.slow
def test_kept_records_serve_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated call copies no records to the device, and its counters start at zero."""
    watching = watch(monkeypatch)
    case = Gram()
    device = torch.device("cpu")
    plan = dispatch._plan_gram(device, case.As, case.out, "right", GRAM, "tf32x3")
    executable = launch.Executable(plan, device, kept=1)
    executable.run()
    case.check()
    expected = case.out.clone()
    for seed in SEEDS:
        case.out.fill_(torch.nan)
        with monkeypatch.context() as patch:
            interleave(patch, seed)
            executable.run()
        assert torch.equal(case.out, expected), seed
    assert watching.uploads == 1
