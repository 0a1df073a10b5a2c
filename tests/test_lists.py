"""Lists of matrices that guards and adapters run: how often they launch, and what they keep."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from osf_kernels import use_backend
from osf_kernels.backends import choosing
from osf_kernels.backends.cuda.slices import SlicedProgram
from osf_kernels.ops import _validation
from osf_kernels.testing import project_reference, relative_error
from osf_torch import Subspace, lists, protect, refresh
from osf_torch.lists import Entry, Lists, MatrixList, Side
from tests.distributed.ranks import Collectives
from tests.helpers import draw_basis, generator_for, randn
from tests.small_guard import drawn, one_rank, sharded


class CountingKernels:
    """A grouped backend that launches nothing and counts what it would."""

    def __init__(self) -> None:
        self.launches = 0

    def unavailable_reason(self, device):
        return None

    def program(self, problems, limit, *, kept, halves):
        """As the CUDA backend's, which takes a call of a kernel for each stage."""
        return SlicedProgram(
            problems,
            limit,
            lambda stages: Launches(self, len(stages)),
            lambda job: 0,
            halves=halves,
        )


class Launches:
    parts_bytes = 0

    def __init__(self, kernels, count):
        self.kernels, self.count = kernels, count

    def run(self, addresses):
        self.kernels.launches += self.count


@pytest.fixture
def kernels(monkeypatch):
    """Stands in for Triton, also on a CPU."""
    counting, real = CountingKernels(), choosing.module
    monkeypatch.setattr(
        choosing, "module", lambda name: counting if name == "triton" else real(name)
    )
    for cached in (choosing.unavailable_reason, _validation.admit):
        cached.cache_clear()
    with use_backend("triton"):
        yield counting
    monkeypatch.undo()
    for cached in (choosing.unavailable_reason, _validation.admit):
        cached.cache_clear()


def stack(count, size=18):
    """Square, tall and wide weights in turn."""
    widths = [(size, size), (size, size + 6), (size + 6, size)]
    return drawn(
        nn.Sequential(*(nn.Linear(*widths[i % 3], bias=False) for i in range(count))), "lists"
    )


def figures(kernels, count, restore, pinned_by, *, over_ranks):
    """Launches and collectives of a step, after two others."""
    model = stack(count)
    with use_backend("torch"):
        subspaces = refresh(model, 0.4, progress=False)
    if pinned_by == "dense parts":
        subspaces = {name: Subspace(s.U, s.V) for name, s in subspaces.items()}
    if over_ranks:
        model = sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with use_backend("torch"):
        guard = protect(model, subspaces, optimizer=optimizer, restore=restore)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = kernels.launches
        with Collectives() as seen:
            optimizer.step()
        found = kernels.launches - before, [name for name, *_ in seen.calls]
    guard.remove()
    return found


@pytest.mark.parametrize("pinned_by", ["dense parts", "singular values"])
@pytest.mark.parametrize("restore", [False, True, "deferred"])
def test_a_sharded_step_launches_as_an_unsharded_one_and_sums(kernels, restore, pinned_by):
    """However many weights there are."""
    with one_rank():
        found = {
            (count, over_ranks): figures(kernels, count, restore, pinned_by, over_ranks=over_ranks)
            for count, over_ranks in itertools.product((3, 12), (False, True))
        }
    for over_ranks in (False, True):
        assert found[3, over_ranks] == found[12, over_ranks]
    (whole, silent), (parts, sums) = found[3, False], found[3, True]
    assert whole >= (8 if restore else 4)
    assert silent == []
    assert sums == ["all_reduce"] * (2 if restore is True else 1)
    assert parts == whole


def test_a_list_runs_on_the_backend_that_is_asked_for_now(kernels):
    ready, xs = Lists(), [x.float() for x in matrices(2)]
    of, keys = bases(xs, torch.float32), [(0, 0), (1, 0)]
    for backend, launched in (("torch", False), ("triton", True), ("torch", False)):
        before = kernels.launches
        with use_backend(backend):
            run(ready, keys, xs, of)
        assert (kernels.launches > before) is launched


def whole_group():
    assert dist.group.WORLD is not None
    return (dist.group.WORLD,)


def matrices(count, dtype=torch.float64, *key):
    gen = generator_for("lists", count, *key)
    shapes = [(14, 14), (20, 14), (14, 20)]
    return [
        randn(*shapes[i % 3], dtype=torch.float64, generator=gen).to(dtype) for i in range(count)
    ]


def bases(xs, dtype=torch.float64):
    gen = generator_for("bases of lists", len(xs))
    return [tuple(draw_basis(size, 5, "high", dtype, gen) for size in x.shape) for x in xs]


@pytest.mark.parametrize("mode", ["complement", "core"])
def test_projected_and_restored_whole_and_sharded_in_one_list(mode):
    with one_rank():
        xs = matrices(6)
        references, entries = [], []
        for i, (x, (U, V)) in enumerate(zip(xs, bases(xs), strict=True)):
            groups = whole_group() if i % 2 else ()
            pin = randn(*x.shape, dtype=x.dtype, generator=generator_for("pin", i))
            P = project_reference(x, U, V, mode=mode)
            pinned = i >= 3
            references.append(P + pin if pinned else P)
            entries.append(Entry(U, V, groups, protected=pin if pinned else None))
        found = MatrixList(xs, entries, mode)
        with Collectives() as seen:
            found.run_(xs)
        assert len(seen.calls) == 1
        for x, reference in zip(xs, references, strict=True):
            assert relative_error(x, reference, reference) < 1e-14


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("over_ranks", [False, True])
@pytest.mark.parametrize("straight", [False, True])
def test_one_side_and_columns_that_are_not_quite_orthonormal(dim, over_ranks, straight):
    with one_rank():
        (x,) = matrices(1)
        B = draw_basis(x.shape[dim], 5, "high", x.dtype, generator_for("one side")).columns
        held = B if straight else B @ torch.diag(torch.linspace(0.9, 1.1, 5, dtype=B.dtype))
        inverse = None if straight else torch.linalg.inv(held.mT @ held)
        pair = (B, None) if dim == -2 else (None, B)
        reference = project_reference(x, *pair)
        side = Side(dim, whole_group() if over_ranks else (), inverse)
        MatrixList([side.view(x)], [side.entry(held)]).run_([side.view(x)])
        assert relative_error(x, reference, reference) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_16_bits_are_restored_with_one_rounding(dtype):
    """P(W) and the dense part are added before they are rounded: as for a whole weight."""
    with one_rank():
        (x,) = matrices(1, dtype)
        ((U, V),) = bases([x], torch.float32)
        H = 30 * randn(*x.shape, dtype=torch.float32, generator=generator_for("dense"))
        exact = project_reference(x.double(), U, V) + H.double()
        MatrixList([x], [Entry(U, V, whole_group(), protected=H)]).run_([x])
        off = (x.double() - exact).abs()
        once = (exact.to(dtype).double() - exact).abs()
        assert (off <= once + 1e-5 * exact.abs()).all()


@pytest.fixture
def made(monkeypatch):
    """How many matrices each list had that was made anew."""
    counts = []

    class Counted(MatrixList):
        def __init__(self, like, entries, mode):
            counts.append(len(entries))
            super().__init__(like, entries, mode)

    monkeypatch.setattr(lists, "MatrixList", Counted)
    return counts


def run(ready, keys, xs, of):
    ready.run_(keys, xs, lambda: [Entry(U, V) for U, V in of])


def test_lists_that_alternate_are_made_once(made):
    ready, xs = Lists(), matrices(4)
    of, keys = bases(xs), [(i, 0) for i in range(4)]
    some = [0, 2]
    for _ in range(3):
        run(ready, keys, xs, of)
        run(ready, [keys[i] for i in some], [xs[i] for i in some], [of[i] for i in some])
        for i in range(4):  # as of hooks that project each gradient as it comes
            run(ready, keys[i : i + 1], xs[i : i + 1], of[i : i + 1])
    assert made == [4, 2, 1, 1, 1, 1]


def test_of_longer_lists_the_last_few_are_kept(made):
    ready, xs = Lists(), matrices(lists.KEPT + 2)
    of, keys = bases(xs), [(i, 0) for i in range(len(xs))]
    for n in range(2, lists.KEPT + 3):
        run(ready, keys[:n], xs[:n], of[:n])
    assert len(ready._kept) == lists.KEPT
    made.clear()
    run(ready, keys, xs, of)
    run(ready, keys[:3], xs[:3], of[:3])
    run(ready, keys[:2], xs[:2], of[:2])
    assert made == [2]


def test_other_bases_other_dtypes_and_other_shapes_make_a_list_anew(made):
    ready, xs = Lists(), matrices(2)
    run(ready, [(0, 0), (1, 0)], xs, bases(xs))
    run(ready, [(0, 0)], xs[:1], bases(xs)[:1])
    run(ready, [(0, 1), (1, 0)], xs, bases(xs))
    assert list(ready._kept) == [((0, 1), (1, 0))], "those of the earlier bases are gone"
    single = [x.float() for x in xs]
    run(ready, [(0, 1), (1, 0)], single, bases(xs, torch.float32))
    tall = [x[:13] for x in single]
    with pytest.raises(ValueError, match=r"expected Us\[0\] to be .* with m=13, got"):
        run(ready, [(0, 1), (1, 0)], tall, bases(xs, torch.float32))
    assert made == [2, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("when", "restore"),
    [
        ("step", False),
        ("step", True),
        ("step", "deferred"),
        ("backward", False),
        ("backward", True),
    ],
)
def test_a_guard_keeps_no_gradient_alive_and_no_basis_that_it_took_back(when, restore):
    model = stack(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = protect(
        model, refresh(model, 0.4, progress=False), optimizer=optimizer, when=when, restore=restore
    )
    for _ in range(2):
        model(torch.ones(2, 18)).sum().backward()
        optimizer.step()
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.zero_grad()
        gc.collect()
        assert [ref() for ref in grads] == [None] * 3
    held = [weakref.ref(t) for s in guard.subspaces.values() for t in (s.U.columns, s.V.columns)]
    guard.next_task(progress=False)
    gc.collect()
    assert [ref() for ref in held] == [None] * 6


def test_a_guard_prepares_its_lists_once(made):
    model = stack(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = protect(model, refresh(model, 0.4, progress=False), optimizer=optimizer)
    for step in range(6):
        model(torch.ones(2, 18)).sum().backward()
        if step % 2:
            model[1].weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
    # gradients of three and of two; weights to restore of three, and of the two and the one that
    # had no gradient, which nothing tells to have moved
    assert sorted(made) == [2, 2, 3, 3]
    model.double()
    model(torch.ones(2, 18).double()).sum().backward()
    optimizer.step()
    assert sorted(made) == [2, 2, 3, 3, 3, 3], "bases followed the weights into float64"
    guard.verify()
