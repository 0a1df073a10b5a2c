"""Partial sums of programs that run side by side, under Triton's interpreter (test_interpreter.py).

The parts of a sum arrive in any order; the sum has the same bits.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from osf_kernels.backends import triton as backend
from osf_kernels.backends.jobs import Coefficients
from osf_kernels.backends.triton import configs, dispatch, launch
from osf_kernels.backends.triton.kernels import coefficients as kernels
from tests.helpers import generator_for
from tests.triton.interleaving import Stuck, interleave
from tests.triton.jobs import assert_coefficients, draw, draw_coefficients
from tests.triton.watching import watch

ONE_PASS = configs.OnePass(32, 16, 16, 4, 1)
TWO_PASS = configs.TwoPass(32, 32, 16, 4, 1)
GRAM = configs.Gram(32, 32, 4, 1)
Config = configs.OnePass | configs.TwoPass
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


def jobs_of() -> list[Coefficients]:
    """Several parts each, but the first: one."""
    g = generator_for("side by side")
    shapes = [((20, 20), (4, 4)), ((68, 36), (12, 16)), ((20, 68), (4, 8))]
    return [draw_coefficients(shape, ranks, g) for shape, ranks in shapes]


def bits(jobs: list[Coefficients]) -> list[Tensor]:
    return [t.clone() for job in jobs for t in (job.A, job.B) if t is not None]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", [ONE_PASS, TWO_PASS], ids=["one_pass", "two_pass"])
def test_any_order_of_programs_gives_the_same_bits(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of()
    backend.coefficients(jobs, config=config)
    for job in jobs:
        assert_coefficients(job)
    expected = bits(jobs)
    for seed in SEEDS:
        for out in (t for job in jobs for t in (job.A, job.B) if t is not None):
            out.fill_(torch.nan)
        with monkeypatch.context() as patch:
            launched = interleave(patch, seed)
            backend.coefficients(jobs, config=config)
        assert launched == [PROGRAMS], "one launch"
        assert all(map(torch.equal, bits(jobs), expected)), seed


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_symmetric_products_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    g = generator_for("squares side by side")
    As = [draw(130, 40, torch.float32, g) for _ in range(2)]
    expected, out = torch.empty(2, 40, 40), torch.empty(2, 40, 40)
    backend.gram(As, expected, config=GRAM)
    for seed in SEEDS:
        with monkeypatch.context() as patch:
            launched = interleave(patch, seed)
            backend.gram(As, out.fill_(torch.nan), config=GRAM)
        assert launched == [PROGRAMS]
        assert torch.equal(out, expected), seed


@triton.jit
def no_wait(counters, products):
    pass


@triton.jit
def uncounted(counters, AMD: tl.constexpr):
    pass


@triton.jit
def not_reset(counters, claimed, tiles):
    pass


LAST = tl.constexpr(16)  # tile of jobs_of() with TWO_PASS


@triton.jit
def sums_first(counters):
    return LAST - tl.atomic_add(counters, 1, sem="relaxed", scope="gpu").to(tl.int32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", [ONE_PASS, TWO_PASS], ids=["one_pass", "two_pass"])
def test_a_sum_that_does_not_wait_is_seen(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what is not written yet."""
    jobs = jobs_of()
    monkeypatch.setattr(kernels, "wait_for_products", no_wait)
    for seed in range(12):
        with monkeypatch.context() as patch:
            interleave(patch, seed)
            backend.coefficients(jobs, config=config)
        if any(bool(t.isnan().any()) for t in bits(jobs)):
            return
    pytest.fail("never seen")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutant"), [("done", uncounted), ("claim", sums_first)])
def test_a_wait_without_end_is_seen(
    name: str, mutant: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a product that does not count, or that nobody is left to claim."""
    watching = watch(monkeypatch)
    monkeypatch.setattr(kernels, name, mutant)
    interleave(monkeypatch, 0, resident=2)
    with pytest.raises(InterpreterError, match=Stuck.__name__):
        backend.coefficients(jobs_of(), config=TWO_PASS)
    (made,) = watching.planned
    assert made.tiles + made.sum_tiles == LAST.value + 1


@pytest.mark.slow
@pytest.mark.parametrize("config", [ONE_PASS, TWO_PASS], ids=["one_pass", "two_pass"])
def test_parts_are_added_in_their_order(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element a part: the sum is that of a loop over the parts in float32, to the bit."""
    g = generator_for("order of parts")
    m, n = 9 * 32, 20
    scales = torch.logspace(-3, 3, m)[torch.randperm(m, generator=g)]
    x = torch.randn(m, n, generator=g) * scales[:, None]
    U = torch.zeros(m, 4)
    U[::32] = 1.0
    V = torch.zeros(n, 4)
    job = Coefficients(x, U, V, torch.empty(4, n), torch.empty(m, 4))
    expected, backwards = torch.zeros(n), torch.zeros(n)
    for part in range(9):
        expected = expected + x[32 * part]
        backwards = backwards + x[m - 32 - 32 * part]
    assert not torch.equal(expected, backwards)
    for seed in SEEDS:
        with monkeypatch.context() as patch:
            interleave(patch, seed)
            backend.coefficients([job], config=config, float32_precision="ieee")
        assert job.A is not None
        assert torch.equal(job.A, expected.expand(4, -1))


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same metadata serves the next call: nothing of it has changed."""
    watching = watch(monkeypatch)
    interleave(monkeypatch, 7)
    backend.coefficients(jobs_of(), config=ONE_PASS)
    backend.coefficients(jobs_of(), config=TWO_PASS)
    g = generator_for("squares")
    backend.gram([draw(130, 40, torch.float32, g)], torch.empty(1, 40, 40), config=GRAM)
    assert len(watching.planned) == 3
    for made, metadata in zip(watching.planned, watching.records, strict=True):
        assert made.sums > 0
        assert min(made.tiles, made.sum_tiles) > 0
        assert made.tiles + made.sum_tiles > PROGRAMS
        assert metadata[: len(made.metadata)].tolist() == made.metadata


def test_counters_that_are_not_reset_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = watch(monkeypatch)
    monkeypatch.setattr(kernels, "finish", not_reset)
    backend.coefficients(jobs_of(), config=ONE_PASS)
    (made,), (metadata,) = watching.planned, watching.records
    claims = made.tiles + made.sum_tiles + PROGRAMS
    assert metadata[: len(made.metadata)].tolist() == [claims, made.tiles, *made.metadata[2:]]


@pytest.mark.slow
def test_kept_records_serve_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated call copies no records to the device, and its counters start at zero."""
    watching = watch(monkeypatch)
    jobs = jobs_of()
    device = torch.device("cpu")
    plan = dispatch._plan_coefficients(device, jobs, None, TWO_PASS, "tf32x3", False)
    executable = launch.Executable(plan, device, kept=1)
    executable.run()
    expected = bits(jobs)
    for seed in SEEDS:
        for out in (t for job in jobs for t in (job.A, job.B) if t is not None):
            out.fill_(torch.nan)
        with monkeypatch.context() as patch:
            interleave(patch, seed)
            executable.run()
        assert all(map(torch.equal, bits(jobs), expected)), seed
    assert watching.uploads == 1
