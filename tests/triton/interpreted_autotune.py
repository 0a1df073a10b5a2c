"""A search as a call starts it, under the interpreter: on copies, never on a caller's tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import osf_kernels
from osf_kernels.backends import triton as backend
from osf_kernels.backends.chains import chain_of
from osf_kernels.backends.jobs import Coefficients, Problem, Update
from osf_kernels.backends.operands import Arena, Operand
from osf_kernels.backends.triton import autotune, configs, dispatch
from osf_kernels.plan import Step
from osf_kernels.testing import (
    assert_error_within,
    project_eager,
    project_reference,
    random_basis,
)
from tests.helpers import generator_for, randn
from tests.triton.jobs import assert_coefficients, assert_gram, assert_multiply, assert_update
from tests.triton.watching import Watching, watch


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watching:
    """Every launch, with a search switched on."""
    monkeypatch.setenv("OSF_AUTOTUNE", "1")
    return watch(monkeypatch)


def touching(watched: Watching, *tensors: torch.Tensor) -> list[bool]:
    """Of every launch, in order, whether its records hold the address of a tensor."""
    addresses = {t.data_ptr() for t in tensors}
    return [
        bool(addresses & {*records.tolist(), *constant.tolist()})
        for records, constant in zip(watched.records, watched.constants, strict=True)
    ]


def rank_by(monkeypatch: pytest.MonkeyPatch, wanted: int) -> list[int]:
    """Replaces the clock: the wanted candidate is the fastest. Returns the runs it saw."""
    runs: list[int] = []

    def timer(run: Callable[[], None]) -> float:
        run()
        runs.append(len(runs))
        return 1.0 if runs[-1] == wanted else 2.0

    tuner = autotune.Tuner(timer)
    monkeypatch.setattr(dispatch, "_tuner", lambda: tuner)
    return runs


def test_coefficients(monkeypatch: pytest.MonkeyPatch, watched: Watching) -> None:
    runs = rank_by(monkeypatch, 2)
    g = generator_for("autotune")
    x = randn(40, 48, dtype=torch.float32, generator=g)
    U, V = (randn(size, 8, dtype=x.dtype, generator=g) for size in x.shape)
    job = Coefficients(x, U, V, torch.empty(8, 48), torch.empty(40, 8))
    backend.coefficients([job])
    assert_coefficients(job)
    pinned = configs.projection_config("sm_80", "float32", 8)
    assert len(runs) == len(configs.candidates(pinned))
    # The search's launches know no address of the job, the last does.
    own = [t for t in job if isinstance(t, torch.Tensor)]
    assert touching(watched, *own) == [False] * len(runs) + [True]


def test_update_in_place(monkeypatch: pytest.MonkeyPatch, watched: Watching) -> None:
    """An update searched on the caller's matrix would have been applied once a candidate."""
    runs = rank_by(monkeypatch, 1)
    g = generator_for("autotune update")
    x = randn(40, 48, dtype=torch.bfloat16, generator=g)
    U, V = (randn(size, 8, dtype=x.dtype, generator=g) for size in x.shape)
    before = x.clone()
    factors = (U, torch.randn(8, 48, generator=g), torch.randn(40, 8, generator=g), V.mT)
    kept = [factor.clone() for factor in factors]
    job = Update(x, x, *factors, -1.0, 1.0)
    backend.update([job])
    assert_update(job, before)
    assert all(map(torch.equal, factors, kept))
    assert touching(watched, x) == [False] * len(runs) + [True]
    job.x.copy_(before)
    count = len(runs)
    backend.update([job])
    assert len(runs) == count, "the bucket's choice is remembered"
    assert_update(job, before)


def test_copies_of_a_chain() -> None:
    """Each matrix is copied once, with its strides, wherever it stands in the chain, also turned;
    what has no values yet gets some. Nothing of the caller's is among them."""
    g = generator_for("autotune chain")
    wide = randn(40, 64, dtype=torch.bfloat16, generator=g)
    x = wide[:, 8:56]
    U, V = (randn(size, 8, dtype=x.dtype, generator=g) for size in x.shape)
    step = Step("dual", "left", -1.0, 1.0, 0, 0, 0, "", "")
    chain = chain_of(Problem(x, x, U, V, step), torch.bfloat16, Arena(x.device).new)
    copies, _ = autotune.scratch_chain(chain, x.device)
    found: dict[int, set[int]] = {}
    for link, copied in zip(chain, copies, strict=True):
        assert (link.after, link.c_after) == (copied.after, copied.c_after)
        assert type(link.step) is type(copied.step)
        for own, copy in zip(link.step, copied.step, strict=True):
            if not isinstance(own, (torch.Tensor, Operand)):
                assert own == copy
                continue
            assert (own.shape, own.stride(), own.dtype) == (copy.shape, copy.stride(), copy.dtype)
            assert bool(copy.isfinite().all())
            if isinstance(own, torch.Tensor):
                assert torch.equal(own, copy)
                found.setdefault(own.data_ptr(), set()).add(copy.data_ptr())
    assert found.keys() == {t.data_ptr() for t in (x, U, V)}
    assert all(len(places) == 1 for places in found.values())
    own_memory = {t.untyped_storage().data_ptr() for t in (wide, U, V)}
    used = [t for link in copies for t in link.step if isinstance(t, torch.Tensor)]
    assert not own_memory & {t.untyped_storage().data_ptr() for t in used}


def test_products(monkeypatch: pytest.MonkeyPatch, watched: Watching) -> None:
    """The products in float32 accuracy are searched on copies too, among configs of their own."""
    runs = rank_by(monkeypatch, 1)
    g = generator_for("autotune products")
    A = randn(24, 40, dtype=torch.bfloat16, generator=g)
    Q, out, square = torch.randn(1, 40, 4, generator=g), torch.empty(1, 24, 4), torch.empty(24, 24)
    backend.multiply([A], Q, out)
    assert_multiply([A], Q, out, False)
    pinned = configs.multiply_config("sm_80", "bfloat16", 4)
    assert len(runs) == len(configs.candidates(pinned))
    backend.gram([A], square[None], side="left")
    assert_gram([A], square[None], "left")
    tried = len(configs.candidates(configs.gram_config("sm_80", "bfloat16", 24)))
    # The timer above ranks by the number of the run, so the second search keeps its first.
    assert len(runs) == len(configs.candidates(pinned)) + tried
    assert [i for i, own in enumerate(touching(watched, A)) if own] == [
        len(configs.candidates(pinned)),
        len(watched.records) - 1,
    ]


def test_a_program_is_searched_once(monkeypatch: pytest.MonkeyPatch, watched: Watching) -> None:
    """Before its operands have addresses, on values of their layouts; its calls search no more."""
    runs = rank_by(monkeypatch, 1)
    g = generator_for("autotune program")
    U, V = (random_basis(size, 8, generator=g) for size in (40, 48))
    grads = [randn(40, 48, dtype=torch.float32, generator=g) for _ in range(3)]
    with osf_kernels.use_backend("triton"):
        prepared = osf_kernels.prepare(grads[:1], [U], [V])
    for x in grads:
        before = x.clone()
        prepared.project_([x])
        peer = project_eager(before, U, V)
        assert_error_within(x, project_reference(before, U, V), peer, scale=before)
        assert len(runs) == len(set(runs)), "a candidate was run again"
        if x is grads[0]:
            searched = len(runs)
    assert len(runs) == searched > 0
    launches = len(watched.records) - searched
    assert touching(watched, *grads) == [False] * searched + [True] * launches
