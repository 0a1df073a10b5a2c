"""Lists that are decided once and run at every step, on the torch backend."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import osf_kernels
from osf_kernels import Prepared, prepare
from osf_kernels.ops.prepared import CoefficientList
from osf_kernels.testing import (
    assert_error_within,
    project_eager,
    project_reference,
    random_basis,
)
from tests import lists
from tests.helpers import generator_for, randn
from tests.lists import F32, F64, MIXED, PINNED, SPLIT, Entry, List

MODES = ("complement", "core")
SEVERAL = (
    *MIXED,
    Entry((14, 12), F64, "high low", (3, 8)),
    Entry((2, 3, 12, 9), F32, "high high", (2, 3)),
)


@pytest.mark.parametrize("mode", MODES)
def test_projects_wherever_the_matrices_lie(mode):
    lists.follows_every_address_and_layout(List(MIXED, "project", mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_restores_what_is_pinned(mode):
    lists.restores_what_is_pinned(List(PINNED, "restore", mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_restores_dense_parts_of_any_basis(mode):
    case = List(MIXED, "dense", mode=mode)
    prepared = case.prepare()
    for layout in ("rows", "columns", "rows"):
        dense, protected = case.dense()
        weights = case.draw(layout)
        before = [x.clone() for x in weights]
        prepared.restore_(weights, protected=dense)
        case.assert_restored(weights, before, protected)


@pytest.mark.parametrize("mode", MODES)
def test_halves_make_the_whole(mode):
    lists.halves_make_the_whole(List(SPLIT, "halves", mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["project", "S", "residual", "protected"])
def test_shards_make_the_whole(mode, way):
    case = List(PINNED, "shards", way, mode=mode)
    S, pinned = case.triplets()
    pins = {"S": S} if way in ("S", "residual") else {}
    if way == "residual":
        pins["residual"], added = case.residuals()
        pinned = [p + a for p, a in zip(pinned, added, strict=True)]
    if way == "protected":
        pins["protected"], pinned = case.dense()
    lists.shards_make_the_whole(case, 3, pins, pinned)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_to_bases_and_pins_counts(mode):
    lists.writes_to_bases_count(List(MIXED, "bases", mode=mode))
    for dtype in (F32, F64):
        lists.writes_to_pins_count(List(PINNED, "pins", mode=mode), dtype)


@pytest.mark.parametrize("mode", MODES)
def test_every_dtype_and_batches_of_batches(mode):
    lists.follows_every_address_and_layout(List(SEVERAL, "several", mode=mode))
    lists.halves_make_the_whole(List(SEVERAL[len(MIXED) :], "several halves", mode=mode))


def test_pairs_of_rests_are_told_apart_whatever_holds_them():
    """A list that is written to, or another at its address, isn't the pair of before."""
    case = List(PINNED[:1], "pairs")
    S, pinned = case.triplets()
    prepared, weights = case.prepare(), case.draw()
    for kind in (list, tuple):
        box = None
        for _ in range(3):
            ((A, B),), added = case.residuals()
            box = kind((A, B)) if box is None or kind is tuple else box
            if kind is list:
                box[:] = A, B
            before = [x.clone() for x in weights]
            prepared.restore_(weights, S=S, residual=[box])
            case.assert_restored(weights, before, [pinned[0] + added[0]])


@pytest.mark.parametrize("way", ["project_", "restore_", "coefficients", "apply_"])
def test_keeps_no_matrix_alive(way):
    case = List(MIXED, "alive")
    prepared = case.prepare()
    dense, _ = case.dense()

    def call():
        xs = case.draw()
        halves = prepared.coefficients(xs)
        if way == "project_":
            prepared.project_(xs)
        elif way == "restore_":
            prepared.restore_(xs, protected=dense)
        elif way == "apply_":
            prepared.apply_(xs, halves)
        return [weakref.ref(t) for t in (*xs, *halves.A, *halves.B)]

    watched = call()
    gc.collect()
    assert not any(ref() is not None for ref in watched)


# --- refusals ------------------------------------------------------------------------------

LEAF = Entry((24, 18), F32, "high high", (4, 5))


class Refused:
    """A prepared list of three that has run, its matrices and what is pinned."""

    def __init__(self) -> None:
        self.case = List([LEAF] * 3, "refused")
        self.prepared = self.case.prepare()
        self.xs = self.case.draw()
        self.halves = self.prepared.coefficients([x.clone() for x in self.xs])
        self.dense, _ = self.case.dense()
        for call in self.calls().values():
            call(self.xs)

    def calls(self):
        return {
            "project_": self.prepared.project_,
            "restore_": lambda xs: self.prepared.restore_(xs, protected=self.dense),
            "apply_": lambda xs: self.prepared.apply_(xs, self.halves),
        }

    def with_(self, x):
        return [*self.xs[:1], x, *self.xs[2:]]


def leaf(r):
    return r.xs[1].clone().requires_grad_()


def recorded(r):
    return leaf(r) * 1


def of_inference(r):
    with torch.inference_mode():
        return r.xs[1].clone()


def overlapping_a_pin(r):
    flat = torch.cat([r.dense[0].flatten(), r.xs[1].flatten()])
    r.dense[0] = flat[: 24 * 18].view(24, 18)
    return flat[10 : 10 + 24 * 18].view(24, 18)


def overlapping_a_basis(r):
    held = r.case.Us[2].columns
    flat = torch.cat([held.flatten(), torch.zeros(24 * 18)])
    held.data = flat[: held.numel()].view(held.shape)
    return flat[held.numel() - 1 :][: 24 * 18].view(24, 18)


ENTRIES = {
    "shape": (lambda r: r.xs[1][:, 1:], ValueError, r"xs\[1\] to be \(24, 18\) .* as it was prep"),
    "dtype": (lambda r: r.xs[1].double(), TypeError, r"xs\[1\] to be .* as it was prepared"),
    "batch": (lambda r: r.xs[1][None], ValueError, r"xs\[1\] to be .* as it was prepared"),
    "device": (lambda r: r.xs[1].to("meta"), ValueError, r"xs\[1\] to be .* got .* on meta"),
    "twice": (lambda r: r.xs[0], ValueError, r"xs\[1\] to be apart from xs\[0\], got over"),
    "basis": (overlapping_a_basis, ValueError, r"xs\[1\] to be apart from Us\[2\], got over"),
    "leaf": (leaf, ValueError, r"xs\[1\] to be a tensor that may be written in place, got a leaf"),
    "recorded": (recorded, ValueError, r"xs\[1\] to be a tensor without gradient"),
    "expanded": (
        lambda r: r.xs[1][:1].expand(24, 18),
        ValueError,
        r"xs\[1\] to be a tensor whose elements have memory of their own",
    ),
    "sparse": (lambda r: r.xs[1].to_sparse(), TypeError, r"xs\[1\] to be a dense tensor"),
    "inference": (of_inference, ValueError, r"xs\[1\] to be a tensor that may be written here"),
    "no tensor": (lambda r: r.xs[1].tolist(), TypeError, r"xs\[1\] to be a tensor"),
    "none": (lambda r: None, TypeError, r"xs\[1\] to be a tensor"),
}
NAMES = {"project_": "grads", "restore_": "weights", "apply_": "xs"}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("way", NAMES)
def test_what_differs_is_refused_and_nothing_is_written(way, name):
    """The entry is named, also after calls that were admitted, and those go on as before."""
    r = Refused()
    make, error, text = ENTRIES[name]
    bad = make(r)
    xs = r.with_(bad)
    before = [x.clone() if torch.is_tensor(x) else x for x in xs]
    match = rf"osf_kernels\.Prepared\.{way}: expected {text.replace('xs', NAMES[way])}"
    for _ in range(2):
        with pytest.raises(error, match=match):
            r.calls()[way](xs)
        for x, old in zip(xs, before, strict=True):
            if torch.is_tensor(x) and not x.is_meta and not x.is_sparse:
                assert torch.equal(x, old)
    if name != "basis":
        r.calls()[way](r.xs)


def test_a_pin_that_shares_memory_is_refused():
    r = Refused()
    bad = overlapping_a_pin(r)
    before = bad.clone()
    match = r"Prepared\.restore_: expected weights\[1\] to be apart from protected\[0\]"
    with pytest.raises(ValueError, match=match):
        r.calls()["restore_"](r.with_(bad))
    assert torch.equal(bad, before)


@pytest.mark.parametrize("way", NAMES)
@pytest.mark.parametrize("count", [0, 2, 4])
def test_another_count_is_refused(way, count):
    r = Refused()
    xs = (r.xs * 2)[:count]
    with pytest.raises(ValueError, match=rf"Prepared\.{way}: expected {NAMES[way]} to be as long"):
        r.calls()[way](xs)


def test_coefficients_of_other_matrices_are_refused():
    r = Refused()
    entries = [LEAF, Entry((18, 24), F32, "high high", (5, 4)), LEAF]
    other = List(entries, "other")
    halves = other.prepare().coefficients(other.draw())
    before = [x.clone() for x in r.xs]
    wide = r.halves._replace(A=[A.double() for A in r.halves.A])
    short = r.halves._replace(B=r.halves.B[:2])
    recorded = r.halves._replace(B=[B.clone().requires_grad_() for B in r.halves.B])
    for bad, error, text in (
        (halves, ValueError, r"coefficients\.A\[1\] to be \(4, 18\) torch.float32 on cpu, got \(5"),
        (wide, ValueError, r"coefficients\.A\[0\] to be .*float32 on cpu, got .*float64"),
        (short, ValueError, "coefficients to be those of 3 matrices"),
        (tuple(r.halves)[:2], ValueError, "coefficients to be those of 3 matrices"),
        (recorded, ValueError, r"coefficients\.B\[0\] to be a tensor without gradient"),
    ):
        for call in (
            r.prepared.apply_,
            lambda xs, c: r.prepared.restore_(xs, coefficients=c),
        ):
            with pytest.raises(error, match=rf"expected {text}"):
                call(r.xs, bad)
    assert all(map(torch.equal, r.xs, before))
    halves = r.prepared.coefficients(r.xs)
    spread = CoefficientList(
        [A.mT.clone().mT for A in halves.A],
        [torch.cat([B, B], -1)[:, ::2].copy_(B) for B in halves.B],
        (),
    )
    with torch.no_grad():
        r.prepared.apply_(r.xs, spread)
    r.case.assert_projected(r.xs, before)


SQUARE = Entry((18, 24), F32, "high high", (4, 4))


def test_pinned_coefficients_restore_and_others_apply():
    """What pins a weight is told once: to coefficients."""
    case = List([SQUARE] * 3, "told once")
    prepared, xs = case.prepare(), case.draw()
    (S, _), (dense, _) = case.triplets(), case.dense()
    plain, pinned = prepared.coefficients(xs), prepared.coefficients(xs, S=S)
    before = [x.clone() for x in xs]
    for call, text in (
        (lambda: prepared.apply_(xs, pinned), r"without S or protected, got of pinned"),
        (lambda: prepared.restore_(xs, coefficients=plain), r"of coefficients\(weights, S="),
        (lambda: prepared.restore_(xs, S=S, coefficients=pinned), "S to be None beside coeff"),
        (lambda: prepared.coefficients(xs, S=S, root=1), "root to be True or False, got 1"),
        (lambda: prepared.coefficients(xs, S=S[:2]), "S to be as long as xs"),
        (lambda: prepared.coefficients(xs, S=S, protected=dense), r"exactly one of S\[0\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            call()
    assert all(map(torch.equal, xs, before))


STALE = {
    "a weight": (lambda case, S, xs: xs[1].add_(1), r"of \w+\[1\] as it was before"),
    "a basis": (lambda case, S, xs: case.Us[1].columns.mul_(-1), "of bases that were written to"),
    "a pin": (lambda case, S, xs: S[2].mul_(2), "of S, residual or protected that were written"),
}


@pytest.mark.parametrize("what", STALE)
@pytest.mark.parametrize("mode", MODES)
def test_coefficients_of_what_was_written_to_since_are_refused(what, mode):
    case = List([SQUARE] * 3, "stale", mode=mode)
    prepared, xs = case.prepare(), case.draw()
    S, _ = case.triplets()
    write, text = STALE[what]
    plain, pinned = prepared.coefficients(xs), prepared.coefficients(xs, S=S)
    write(case, S, xs)
    before = [x.clone() for x in xs]
    with pytest.raises(ValueError, match=rf"coefficients to be of these weights, got {text}"):
        prepared.restore_(xs, coefficients=pinned)
    if what != "a pin":
        with pytest.raises(ValueError, match=rf"coefficients to be of these xs, got {text}"):
            prepared.apply_(xs, plain)
    assert all(map(torch.equal, xs, before))


def test_coefficients_serve_their_list_once():
    """A second time the weights aren't what they were computed from; copies of these are."""
    case = List([SQUARE] * 2, "once")
    prepared, xs = case.prepare(), case.draw()
    again, found = [x.clone() for x in xs], prepared.coefficients(xs)
    prepared.apply_(xs, found)
    with pytest.raises(ValueError, match=r"xs\[0\] as it was before something was written"):
        prepared.apply_(xs, found)
    prepared.apply_(again, found)
    assert all(map(torch.equal, xs, again))
    with pytest.raises(ValueError, match="of another prepared list, or a copy; take them from"):
        case.prepare().apply_(again, prepared.coefficients(again))
    found = prepared.coefficients(again)
    summed = found._replace(sums=tuple(t.clone() for t in found.sums))
    with pytest.raises(ValueError, match="sums of their own; all-reduce coefficients"):
        prepared.apply_(again, summed)
    with torch.inference_mode():
        inside = [x.clone() for x in again]
        prepared.apply_(inside, prepared.coefficients(inside))


def test_matrices_of_one_buffer_are_not_taken_for_written_to():
    """torch counts the writes to a buffer together."""
    case = List([SQUARE] * 4, "buffer")
    held = torch.stack(case.draw()).unbind()
    before = [x.clone() for x in held]
    halves = [
        (one, one.coefficients([x]), x)
        for x, U, V in zip(held, case.Us, case.Vs, strict=True)
        for one in [prepare([x], [U], [V])]
    ]
    for one, found, x in halves:
        one.apply_([x], found)
    case.assert_projected(held, before)


def test_a_copy_of_coefficients_or_of_a_list_is_another():
    case = List([SQUARE], "copies")
    prepared, xs = case.prepare(), case.draw()
    found = prepared.coefficients(xs, S=case.triplets()[0])
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        with pytest.raises(ValueError, match="got of another prepared list, or a copy"):
            prepared.restore_(xs, coefficients=other)
    twin = copy.deepcopy(prepared)
    with pytest.raises(ValueError, match="got of another prepared list, or a copy"):
        twin.restore_(xs, coefficients=found)
    before = [x.clone() for x in xs]
    twin.apply_(xs, twin.coefficients(xs))
    case.assert_projected(xs, before)


@pytest.mark.parametrize("keeps_origin", [True, False])
def test_coefficients_in_the_memory_of_a_matrix_are_refused(keeps_origin):
    buffer = torch.randn(96)
    x, A = buffer[:64].view(8, 8), buffer[32:64].view(4, 8)
    U, V = (random_basis(8, 4, generator=generator_for(side)).columns for side in "UV")
    prepared = prepare([x], [U], [V])
    found = prepared.coefficients([x])
    given = found._replace(A=[A]) if keeps_origin else CoefficientList([A], found.B, ())
    before = buffer.clone()
    with pytest.raises(ValueError, match=r"xs\[0\] to be apart from coefficients\.A\[0\]"):
        prepared.apply_([x], given)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("mode", MODES)
def test_pins_of_other_batch_dimensions_are_refused_at_once(mode):
    case = List([Entry((3, 12, 8), F32, "high high", (2, 2))] * 2, "batches", mode=mode)
    prepared, xs = case.prepare(), case.draw()
    S, _ = case.triplets()
    bad = [S[0], S[1][:2]]
    before = [x.clone() for x in xs]
    for call in (
        lambda: prepared.restore_(xs, S=bad),
        lambda: prepared.coefficients(xs, S=bad),
        lambda: osf_kernels.restore_many_(xs, case.Us, case.Vs, S=bad, mode=mode),
    ):
        with pytest.raises(
            ValueError, match=r"S\[1\] to be broadcastable to .* \(3,\), got \(2, 2\)"
        ):
            call()
    assert all(map(torch.equal, xs, before))


@pytest.mark.parametrize("bad", [torch.rand(2, 4), iter([1, 2]), {0: 1, 1: 2}])
@pytest.mark.parametrize("name", ["S", "protected", "residual"])
def test_pins_that_are_no_list_are_refused_by_name(name, bad):
    case = List([SQUARE] * 2, "no list")
    prepared, xs = case.prepare(), case.draw()
    pins = {"S": case.triplets()[0]} | {name: bad} if name != "protected" else {name: bad}
    for call in (
        lambda: prepared.restore_(xs, **pins),
        lambda: prepared.coefficients(xs, **pins),
        lambda: osf_kernels.restore_many_(xs, case.Us, case.Vs, **pins),
    ):
        for _ in range(2):
            with pytest.raises(TypeError, match=f"expected {name} to be a list or a tuple, got"):
                call()


def test_the_whole_side_of_a_shard_is_no_wider_than_itself():
    U, V = torch.zeros(16, 20), torch.zeros(12, 13)
    x = torch.zeros(16, 12)
    prepare([x], [U], [V[:, :12]], sharded=True)  # U is 16 rows of more
    with pytest.raises(ValueError, match=r"Vs\[0\] to be no wider than its side"):
        prepare([x], [U], [V], sharded=True)


def test_restoring_from_coefficients_refuses_weights_that_overlap_a_pin():
    r = Refused()
    flat = torch.zeros(2, 24, 18)
    r.dense[0], x = flat[0], flat[1]
    found = r.prepared.coefficients(r.with_(x), protected=r.dense)
    r.prepared.restore_(r.with_(x), coefficients=found)
    inside = flat.view(-1)[100:][: 24 * 18].view(24, 18)
    found = r.prepared.coefficients(r.with_(inside), protected=r.dense)  # reads alone
    with pytest.raises(ValueError, match=r"weights\[1\].*memory.*protected\[0\]"):
        r.prepared.restore_(r.with_(inside), coefficients=found)


@pytest.mark.parametrize("which", ["second", "first again"])
def test_coefficients_of_other_pins_stay_apart(which):
    """Two sets of pins in turn: each result restores to its own."""
    case = List([SQUARE] * 2, "two pins")
    prepared = case.prepare()
    S, pinned = case.triplets()
    dense, others = case.dense()
    xs = case.draw()
    first = prepared.coefficients(xs, S=S)
    second = prepared.coefficients(xs, protected=dense)
    before = [x.clone() for x in xs]
    if which == "second":
        prepared.restore_(xs, coefficients=second)
        case.assert_restored(xs, before, others)
    else:
        prepared.restore_(xs, coefficients=first)
        case.assert_restored(xs, before, pinned)


def test_coefficients_are_of_what_autograd_does_not_record():
    r = Refused()
    with pytest.raises(ValueError, match=r"coefficients: expected xs\[1\] to be a tensor without"):
        r.prepared.coefficients(r.with_(recorded(r)))
    with torch.no_grad():
        halves = r.prepared.coefficients([x.requires_grad_() for x in r.xs])
    assert not any(t.requires_grad for t in (*halves.A, *halves.B))


def test_a_basis_that_no_longer_fits_is_refused():
    r = Refused()
    held = r.case.Us[1].columns
    kept = held.data
    held.data = torch.zeros(23, 4)
    before = [x.clone() for x in r.xs]
    for way, call in r.calls().items():
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"Prepared\.{way}: expected Us\[1\] to be .*m=24"
            ):
                call(r.xs)
    assert all(map(torch.equal, r.xs, before))
    held.data = kept
    for way, call in r.calls().items():
        if way != "apply_":  # its coefficients are of the basis as it was
            call(r.xs)
    with pytest.raises(ValueError, match=r"of these xs, got of bases that were written to since"):
        r.prepared.apply_(r.xs, r.halves)
    r.prepared.apply_(r.xs, r.prepared.coefficients(r.xs))


def test_a_basis_of_another_rank_is_planned_anew():
    case = List([LEAF], "rank")
    prepared, xs = case.prepare(), case.draw()
    prepared.project_(xs)
    assert "U 4 high" in str(prepared)
    case.Us[0].columns.data = random_basis(24, 9, generator=case.generator).columns
    before = [x.clone() for x in xs]
    prepared.project_(xs)
    case.assert_projected(xs, before)
    assert "U 9 high" in str(prepared)
    halves = prepared.coefficients(before)
    assert halves.A[0].shape == (9, 18)
    prepared.apply_(before, halves)


# --- what goes on around a call ------------------------------------------------------------


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.profiler.profile,
        lambda: pytest.MonkeyPatch.context(),
    ],
    ids=["no_grad", "inference_mode", "autocast", "profiler", "nothing"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_in_force_changes_nothing(around):
    case = List(PINNED, "around")
    prepared = case.prepare()
    S, pinned = case.triplets()
    for context in (around, lambda: pytest.MonkeyPatch.context(), around):
        with context():
            xs = case.draw()
            before = [x.clone() for x in xs]
            prepared.project_(xs)
            case.assert_projected(xs, before)
            halves = prepared.coefficients(before)
            again = [x.clone() for x in before]
            prepared.apply_(again, halves)
            case.assert_projected(again, before)
            restored = [x.clone() for x in before]
            prepared.restore_(restored, S=S)
            case.assert_restored(restored, before, pinned)


def test_float32_products_stay_float32():
    case = List([Entry((64, 48), F32, "high high", (16, 16))], "precision")
    prepared = case.prepare()
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        lists.follows_every_address_and_layout(case)
        xs = case.draw()
        old = [x.clone() for x in xs]
        prepared.apply_(xs, prepared.coefficients(xs))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    case.assert_projected(xs, old)


def test_deterministic_algorithms():
    case = List(SPLIT, "deterministic")
    torch.use_deterministic_algorithms(True)
    lists.follows_every_address_and_layout(case)
    lists.halves_make_the_whole(case)


def test_a_compiled_step_runs_it():
    """Dynamo traces into the operator, or breaks there: either way the call has its effect."""
    case = List(MIXED[:3], "compiled")
    prepared, xs = case.prepare(), case.draw()

    @torch.compile(backend="eager")
    def step(grads):
        scaled = [g * 2 for g in grads]
        prepared.project_(scaled)
        return [g + 1 for g in scaled]

    for _ in range(2):
        doubled = [x * 2 for x in xs]
        after = step(xs)
        case.assert_projected([y - 1 for y in after], doubled)
        xs = case.draw()


def test_differentiated_gradients_go_by_the_operators():
    """Under grad mode plain gradients are written; versions count, so autograd sees the writes."""
    case = List([LEAF], "versions")
    prepared, xs = case.prepare(), case.draw()
    seen = xs[0]._version
    prepared.project_(xs)
    assert xs[0]._version > seen
    weight = torch.randn(24, 18, requires_grad=True)
    saved = (weight * xs[0]).sum()
    prepared.project_(xs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def run_side_by_side(bodies):
    """Each in a thread of its own; raises what one of them raised."""
    errors = []

    def guarded(body):
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_side_by_side():
    """Of one prepared list: other matrices, other layouts, other pins."""
    case = List(PINNED, "threads")
    prepared = case.prepare()
    work = []
    for layout in ("rows", "columns", "odd offset"):
        S, pinned = case.triplets()
        fresh = [case.draw(layout) for _ in range(20)]
        work.append((S, pinned, fresh, [[x.clone() for x in xs] for xs in fresh]))

    def body(S, _, fresh, __):
        def run():
            for i, xs in enumerate(fresh):
                if i % 2:
                    prepared.project_(xs)
                else:
                    prepared.restore_(xs, S=S)

        return run

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        run_side_by_side([body(*each) for each in work])
    finally:
        sys.setswitchinterval(interval)
    for _, pinned, fresh, old in work:
        for i, (xs, before) in enumerate(zip(fresh, old, strict=True)):
            if i % 2:
                case.assert_projected(xs, before)
            else:
                case.assert_restored(xs, before, pinned)


def test_a_call_that_another_overtakes_keeps_its_pins(monkeypatch):
    """One while the other is planned, then both again."""
    case = List(PINNED, "overtaken")
    prepared = case.prepare()
    (S, pinned), (other, others) = case.triplets(), case.triplets()
    restoring = Prepared._restoring

    def overtaken(*args):
        monkeypatch.setattr(Prepared, "_restoring", restoring)
        restore(other, others)
        return restoring(*args)

    def restore(pins, expected):
        before = [x.clone() for x in weights[id(pins)]]
        prepared.restore_(weights[id(pins)], S=pins)
        case.assert_restored(weights[id(pins)], before, expected)

    weights = {id(S): case.draw(), id(other): case.draw()}
    monkeypatch.setattr(Prepared, "_restoring", overtaken)
    for pins, expected in ((S, pinned), (other, others), (S, pinned)):
        restore(pins, expected)


def test_an_empty_list():
    prepared = prepare([], [], [])
    prepared.project_([])
    prepared.restore_([], S=[])
    halves = prepared.coefficients([])
    assert tuple(halves)[:3] == ([], [], ())
    prepared.apply_([], halves)
    prepared.restore_([], coefficients=prepared.coefficients([], S=[]))
    with pytest.raises(ValueError, match="mode"):
        prepare([], [], [], mode="other")
    assert len(prepared) == 0
    assert osf_kernels.Prepared is type(prepared)


# --- where something watches -------------------------------------------------------------------


def one(rows: int = 12) -> tuple[Tensor, Tensor, Tensor, Prepared]:
    generator = generator_for("one", rows)
    U, V = (
        torch.linalg.qr(randn(size, 3, dtype=torch.float32, generator=generator))[0]
        for size in (rows, 8)
    )
    g = randn(rows, 8, dtype=torch.float32, generator=generator)
    return g, U, V, prepare([g], [U], [V])


@contextmanager
def default_device() -> Iterator[None]:
    with torch.device("cpu"):
        yield


WATCHED = {
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "default device": default_device,
    "flops": lambda: FlopCounterMode(display=False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("watching", WATCHED)
def test_what_watches_a_call_opens_no_other_door(watching: str) -> None:
    """The same refusals, the same backend and the same bits as unwatched."""
    g, U, V, prepared = one()
    expected = g.clone()
    prepared.project_([expected])
    sharded = prepare([g[:6]], [U[:6]], [V], sharded=True)
    before = g.clone()
    with WATCHED[watching]():
        with pytest.raises(ValueError, match="expected the list to be of whole matrices"):
            sharded.project_([g[:6]])
        for bad in ([], [g, g], [None], [g.to(torch.bfloat16)], [g[None]]):
            with pytest.raises((TypeError, ValueError), match=r"osf_kernels\.Prepared\.project_"):
                prepared.project_(bad)  # type: ignore[arg-type]
        assert torch.equal(g, before)
        prepared.project_([g])
    assert torch.equal(g, expected)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_nothing_differentiates_through_a_prepared_list() -> None:
    g, _, _, prepared = one()

    def through(a: Tensor) -> Tensor:
        b = a * 1
        prepared.project_([b])
        return b.square().sum()

    refused = pytest.raises(
        ValueError, match=r"outside of torch\.func, of forward mode and of traces"
    )
    with refused:
        torch.func.grad(through)(g)
    with refused:
        torch.func.jvp(through, (g,), (g,))
    with refused:
        torch.func.vmap(lambda a: prepared.project_([a]))(g[None])
    with pytest.raises(ValueError, match=r"grads\[0\] to be a tensor without gradient"):
        through(g.clone().requires_grad_())
    compiled = torch.compile(through, backend="aot_eager")
    with pytest.raises(Exception, match="without gradient"):
        compiled(g.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(compiled(g), through(g))


def test_inference_tensors_are_refused_outside_of_inference_mode_each_time() -> None:
    g, U, V, _ = one()
    with torch.inference_mode():
        made = g.clone()
    prepared = prepare([g, g], [U, U], [V, V])
    with torch.inference_mode():
        prepared.project_([g, made])
    before = g.clone()
    with pytest.raises(ValueError, match=r"grads\[1\] to be a tensor that may be written here"):
        prepared.project_([g.mul_(2), made])
    assert torch.equal(g, 2 * before)


def test_coefficients_serve_again() -> None:
    """Restoring from S leaves them as they were."""
    generator = generator_for("again")
    W = randn(12, 8, dtype=torch.float32, generator=generator)
    u, s, vt = torch.linalg.svd(W)
    prepared = prepare([W], [u[:, :3]], [vt[:3].mT])
    moved = W + randn(12, 8, dtype=torch.float32, generator=generator)
    found = prepared.coefficients([moved], S=[s[:3]])
    kept = found.A[0].clone(), found.B[0].clone()
    first, second = moved.clone(), moved.clone()
    for x in (first, second):
        prepared.restore_([x], coefficients=found)
    assert torch.equal(first, second)
    assert torch.equal(found.A[0], kept[0])
    assert torch.equal(found.B[0], kept[1])


@pytest.mark.parametrize("bad", [iter([1]), None, {1: 2}.values(), 3])
def test_no_list_is_refused_by_name_the_second_time_too(bad: object) -> None:
    g, _, _, prepared = one()
    for _ in range(2):
        with pytest.raises(TypeError, match="expected grads to be a list or a tuple"):
            prepared.project_(bad)  # type: ignore[arg-type]
        prepared.project_([g])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sharded": "no"}, "sharded to be True or False"),
        ({"workspace_bytes": True}, "workspace_bytes to be a positive number"),
        ({"workspace_bytes": 0}, "workspace_bytes to be a positive number"),
    ],
)
def test_options_are_looked_at(options: dict[str, Any], match: str) -> None:
    g, U, V, _ = one()
    with pytest.raises((TypeError, ValueError), match=match):
        prepare([g], [U], [V], **options)


@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_what_has_no_values_leaves_nothing_behind() -> None:
    """Routes and allocations are kept: those of fake tensors or of a trace would serve later."""
    g, U, V, prepared = one()
    with FakeTensorMode(allow_non_fake_inputs=True):
        calls = (
            lambda: prepare([g], [U], [V]),
            lambda: prepared.project_([g]),
            lambda: prepared.coefficients([g]),
            lambda: prepared.restore_([g], protected=[g.clone()]),
        )
        for call in calls:
            with pytest.raises(ValueError, match="outside of FakeTensorMode"):
                call()
    with pytest.raises(ValueError, match=r"outside of torch\.func, of forward mode and of traces"):
        torch.jit.trace(lambda a: prepared.coefficients([a]).A[0], (g,), check_trace=False)
    expected, halves = g.clone(), g.clone()
    prepared.project_([expected])
    prepared.apply_([halves], prepared.coefficients([halves]))
    truth, peer = project_reference(g, U, V), project_eager(g, U, V)
    assert_error_within(expected, truth, peer, scale=g)
    assert_error_within(halves, truth, peer, scale=g)
