"""Prepared lists on the Triton backend under the interpreter (interpreter.py)."""

from __future__ import annotations

import gc
import threading
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import osf_torch
from osf_kernels import Basis, requested_backend, use_backend
from osf_kernels.backends.triton import launch
from tests import lists
from tests.lists import F16, F32, MIXED, PINNED, SPLIT, Entry, List
from tests.triton.watching import Watching, records_of, watch

MODES = ("complement", pytest.param("core", marks=pytest.mark.slow))
FEW = (MIXED[0], MIXED[1], MIXED[2], MIXED[4])


@pytest.fixture(autouse=True)
def _chosen() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.parametrize(
    "entries", [FEW, pytest.param(MIXED, marks=pytest.mark.slow)], ids=["few", "mixed"]
)
@pytest.mark.parametrize("mode", MODES)
def test_projects_wherever_the_matrices_lie(entries: Sequence[Entry], mode: str) -> None:
    lists.follows_every_address_and_layout(List(entries, "project", mode=mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["complement", "core"])
def test_restores_what_is_pinned(mode: str) -> None:
    lists.restores_what_is_pinned(List(PINNED, "restore", mode=mode))


def test_restores_a_mixture() -> None:
    """Triplets with and without rests, and a dense part, in one list."""
    case = List(PINNED[:3], "mixture")
    (S, pinned), (rests, added), (dense, protected) = (
        case.triplets(),
        case.residuals(),
        case.dense(),
    )
    prepared, weights = case.prepare(), case.draw()
    expected = [pinned[0], pinned[1] + added[1], protected[2]]
    for _ in range(2):
        before = [x.clone() for x in weights]
        prepared.restore_(
            weights,
            S=[*S[:2], None],
            residual=[None, rests[1], None],
            protected=[None, None, dense[2]],
        )
        case.assert_restored(weights, before, expected)


@pytest.mark.parametrize(
    "entries", [FEW, pytest.param(SPLIT, marks=pytest.mark.slow)], ids=["few", "split"]
)
@pytest.mark.parametrize("mode", MODES)
def test_halves_make_the_whole(entries: Sequence[Entry], mode: str) -> None:
    lists.halves_make_the_whole(List(entries, "halves", mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "way",
    ["project", *(pytest.param(w, marks=pytest.mark.slow) for w in ("S", "residual", "protected"))],
)
def test_shards_make_the_whole(mode: str, way: str) -> None:
    case = List(PINNED, "shards", way, mode=mode)
    S, pinned = case.triplets()
    pins: dict[str, Any] = {"S": S} if way in ("S", "residual") else {}
    if way == "residual":
        pins["residual"], added = case.residuals()
        pinned = [p + a for p, a in zip(pinned, added, strict=True)]
    if way == "protected":
        pins["protected"], pinned = case.dense()
    lists.shards_make_the_whole(case, 2, pins, pinned)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["complement", "core"])
def test_what_is_written_to_bases_and_pins_counts(mode: str) -> None:
    lists.writes_to_bases_count(List(FEW, "bases", mode=mode))
    for dtype in (F32, F16):
        lists.writes_to_pins_count(List(PINNED[:2], "pins", mode=mode), dtype)


@pytest.fixture
def same_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies where it lay, as torch's allocator on a GPU has it."""
    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    empty = torch.empty

    def reused(*sizes: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8:
            return workspace[: sizes[0]]
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", reused)


@pytest.mark.usefixtures("same_workspace")
def test_a_call_with_the_same_memory_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = watch(monkeypatch)
    case = List(FEW, "uploads")
    prepared, xs = case.prepare(), case.draw()
    other = case.draw()
    for matrices, uploads in ((xs, 1), (xs, 1), (other, 2), (xs, 2), (other, 2)):
        before = [x.clone() for x in matrices]
        prepared.project_(matrices)
        case.assert_projected(matrices, before)
        assert watching.uploads == uploads
    assert len(watching.planned) * 5 == len(watching.records)


@pytest.mark.parametrize(("asked", "other"), [("triton", "torch"), ("torch", "triton")])
def test_runs_where_it_was_prepared(
    asked: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever backend is in use when it is called, first or later."""
    watching = watch(monkeypatch)
    case = List(PINNED[:2], "backends")
    S, _ = case.triplets()
    xs = case.draw()
    with use_backend(asked):  # type: ignore[arg-type]
        prepared = case.prepare()
    with use_backend(other):  # type: ignore[arg-type]
        for call in (
            lambda: prepared.project_(xs),
            lambda: prepared.coefficients(xs),
            lambda: prepared.coefficients(xs, S=S),
            lambda: prepared.apply_(xs, prepared.coefficients(xs)),
            lambda: prepared.restore_(xs, S=S),
            lambda: prepared.restore_(xs, coefficients=prepared.coefficients(xs, S=S)),
        ):
            watching.records.clear()
            call()
            assert bool(watching.records) == (asked == "triton")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, torch.profiler.profile])
def test_what_is_in_force_changes_nothing(around: Any) -> None:
    case = List(PINNED[:2], "around")
    prepared = case.prepare()
    S, pinned = case.triplets()
    with around():
        xs = case.draw()
        before = [x.clone() for x in xs]
        prepared.project_(xs)
        case.assert_projected(xs, before)
        again = [x.clone() for x in before]
        prepared.apply_(again, prepared.coefficients(before))
        case.assert_projected(again, before)
        restored = [x.clone() for x in before]
        prepared.restore_(restored, S=S)
        case.assert_restored(restored, before, pinned)


def test_pins_and_bases_of_fewer_batch_dimensions() -> None:
    case = List([Entry((3, 12, 8), F32, "high high", (2, 2))], "broadcast")
    case.Us = [Basis(case.Us[0].columns[:1])]  # type: ignore[union-attr]
    case.Vs = [Basis(case.Vs[0].columns[0])]  # type: ignore[union-attr]
    prepared = case.prepare()
    for shape in ((2,), (1, 2), (3, 2)):
        S = torch.rand(shape, generator=case.generator)
        U, V = case.Us[0].columns.double(), case.Vs[0].columns.double()  # type: ignore[union-attr]
        pinned = (U * S.double()[..., None, :]) @ V.mT
        xs = case.draw()
        before = [x.clone() for x in xs]
        halves = prepared.coefficients(xs, S=[S])
        prepared.restore_(xs, S=[S])
        case.assert_restored(xs, before, [pinned])
        again = [x.clone() for x in before]
        prepared.restore_(again, coefficients=halves)
        case.assert_restored(again, before, [pinned])


@pytest.mark.parametrize("limit", [1, 4000, 1 << 20])
def test_turns_share_the_workspace(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch, matrices one after another in the same memory, however small it is."""
    watching = watch(monkeypatch)
    entries = [Entry((24 + 4 * i, 32), F32, "high high", (4, 4)) for i in range(5)]
    lists.small_workspace_serves(List(entries, "turns"), limit, 2)
    assert {made.tasks for made in watching.planned[:2]} == {watching.planned[0].tasks}
    assert len(watching.records) == 4


# --- captures ------------------------------------------------------------------------------


class Capturing(Watching):
    """A device whose streams are captured, as long as ``capturing``; launches nothing then."""

    def __init__(self) -> None:
        super().__init__()
        self.capturing = True
        self.launched = 0

    def stream(self, device: torch.device) -> tuple[int, bool]:
        return 7, self.capturing

    def launch(self, kernel: Any, grid: tuple[int, int, int], *args: Any, **options: Any) -> None:
        self.launched += 1
        if not self.capturing:
            super().launch(kernel, grid, *args, **options)


@pytest.mark.usefixtures("same_workspace")
def test_a_thousand_captures_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has records and counters of its own, which the list doesn't keep; then a call runs."""
    driver = Capturing()
    monkeypatch.setattr(launch, "driver", driver)
    made: list[Tensor] = []
    held = True

    def upload(records: array[int], device: torch.device, capturing: bool) -> Tensor:
        assert capturing == driver.capturing
        memory = torch.tensor(records.tolist(), dtype=torch.int64)  # quicker than for a graph
        if held:
            made.append(memory)
        return memory

    monkeypatch.setattr(driver, "upload", upload)
    executables: list[launch.Executable] = []
    make = launch.Executable.__init__

    def making(self: launch.Executable, *args: Any, **options: Any) -> None:
        executables.append(self)
        make(self, *args, **options)

    monkeypatch.setattr(launch.Executable, "__init__", making)
    case = List(FEW, "captures")
    prepared, xs = case.prepare(), case.draw()
    for _ in range(10):
        prepared.project_(xs)
    (executable,) = executables
    assert len(made) == len({memory.data_ptr() for memory in made}) == 10
    assert all(memory[:2].tolist() == [0, 0] for memory in made)
    held = False
    before = tensors_alive()
    for _ in range(1000):
        prepared.project_(xs)
    assert tensors_alive() == before
    assert executables == [executable]
    assert driver.launched == 1010 * len(executable._launches)
    assert len(executable._kept) == 0

    driver.capturing, held = False, True
    old = [x.clone() for x in xs]
    prepared.project_(xs)
    case.assert_projected(xs, old)
    (kept,) = executable._kept.values()
    assert {t.untyped_storage().data_ptr() for t in kept} == {made[-1].data_ptr()}
    driver.capturing = True
    prepared.project_(xs)
    assert len(made) == 12, "a graph doesn't borrow the records of calls"


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


def test_records_of_a_capture_are_those_of_a_copy() -> None:
    """To the bit, also beyond the integers that a double holds."""
    values = [0, 1, -1, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**47 + 3]
    driver, device = launch.Driver(), torch.device("cpu")
    records = array("q", values)
    for capturing in (True, False):
        memory = driver.upload(records, device, capturing)
        assert memory.dtype == torch.int64
        assert memory.tolist() == values
        memory.fill_(7)
        assert records.tolist() == values, "the copy shares no memory"


@pytest.mark.usefixtures("same_workspace")
def test_records_of_more_addresses_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were used least lately go; what comes again is made again, and is right."""
    watching = watch(monkeypatch)
    case = List(FEW[:2], "addresses")
    prepared = case.prepare()
    held = [case.draw() for _ in range(6)]
    for turn, uploads in (("012345", 6), ("012345", 12), ("5", 12), ("05152535", 16)):
        for i in turn:
            xs = held[int(i)]
            before = [x.clone() for x in xs]
            prepared.project_(xs)
            case.assert_projected(xs, before)
        assert watching.uploads == uploads, turn


def test_threads_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over other matrices of one list, one in other strides; the interpreter runs one at a time."""
    turn = threading.Lock()

    class OneByOne(launch.Driver):
        def launch(self, *args: Any, **options: Any) -> None:
            with turn:
                super().launch(*args, **options)

        def stream(self, device: torch.device) -> tuple[int, bool]:
            return threading.get_ident(), False

    monkeypatch.setattr(launch, "driver", OneByOne())
    case = List(FEW, "threads")
    prepared = case.prepare()
    work = [[case.draw(layout) for _ in range(3)] for layout in ("rows", "columns", "odd offset")]
    before = [[[x.clone() for x in xs] for xs in mine] for mine in work]
    errors: list[BaseException] = []

    def body(mine: list[list[Tensor]]) -> None:
        try:
            for xs in mine:
                prepared.project_(xs)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(mine,)) for mine in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for mine, old in zip(work, before, strict=True):
        for after, was in zip(mine, old, strict=True):
            case.assert_projected(after, was)


def test_launches_of_a_list_do_not_grow_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen matrices of mixed shapes take the one launch of three, which is what is planned."""
    watching = watch(monkeypatch)
    shapes = [(24, 32), (32, 16), (16, 48), (40, 24), (64, 16), (16, 16)]
    entries = [Entry(shapes[i % 6], F32, "high high", (4, 4)) for i in range(12)]
    for count in (3, 12):
        case = List(entries[:count], "launches", count)
        xs = case.draw()
        watching.records.clear()
        watching.planned.clear()
        prepared = case.prepare(xs)
        prepared.project_(xs)
        assert len(watching.records) == len(watching.planned) == prepared.plan.launches == 1
        (made,) = watching.planned
        # Of each matrix tiles of A, B and the update, none of them in parts here.
        kinds = [fields[0] for fields in records_of(made)]
        assert [kinds.count(kind) for kind in range(3)] == [count, count, 0]
        assert kinds.count(3) >= count
    assert requested_backend() == "triton"


def test_a_guard_under_an_explicit_backend() -> None:
    """Protected, trained, measured and refreshed: what is float64 inside is torch's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = osf_torch.refresh(model, 4, progress=False)
    guard = osf_torch.protect(model, found, optimizer=optimizer, record=True)
    for _ in range(2):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    assert max(guard.drift().values()) < 1e-5
    assert max(leak.applied for leak in guard.leak().values()) < 1e-5
    guard.verify()
    assert requested_backend() == "triton"
