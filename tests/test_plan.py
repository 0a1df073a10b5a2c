"""The planner: forms, costs, and a plan a person can read."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from osf_kernels import Basis, gpu, plan, prepare
from osf_kernels.backends import choosing
from osf_kernels.forms import FORMS, calls_of, work
from osf_kernels.plan import Matrix, choose, on_backend
from osf_kernels.testing import random_basis


def bases(size: int, protected: int, spans: str, device: str = "meta") -> Basis:
    width = protected if spans == "high" else size - protected
    return Basis(torch.empty(size, width, device=device), spans)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rho", "left", "right", "label"),
    [
        (0.02, "high", "high", "dual"),
        (0.5, "high", "high", "sequential"),
        (0.5, "low", "high", "mixed, left first"),
        (0.5, "high", "low", "mixed, right first"),
        (0.8, "low", "low", "low/low, left first"),
    ],
)
def test_forms_of_the_issue(rho, left, right, label):
    n = 4096
    r = int(rho * n)
    g = torch.empty(n, n)
    chosen = plan(g, bases(n, r, left, "cpu"), bases(n, r, right, "cpu"))
    assert chosen.form == label
    assert chosen.backend == "torch"


def test_flops_of_each_form_in_cubes_of_n():
    """The method's table for square matrices, ρ = r/n and c = 1 − ρ."""
    n, rho = 1000, 0.8
    r, c = 800, 200
    cube = n**3

    def flops(left, right):
        widths = {"high": r, "low": c}
        x = Matrix(n, n, widths[left], widths[right], left, right)
        return choose(x, "complement", "cpu").flops / cube

    assert flops("high", "high") == pytest.approx(8 * rho)
    assert flops("low", "low") == pytest.approx(4 * 0.2 * 1.2)
    assert flops("low", "high") == pytest.approx(4 * (1 - rho**2))


def test_dual_reads_g_twice_and_writes_it_once():
    step = choose(Matrix(4096, 4096, 64, 64), "complement", "cuda")
    assert (step.form, step.passes) == ("dual", 3)
    assert step.bytes == pytest.approx(3 * 4096 * 4096 * 4, rel=0.15)


def test_dual_gives_way_where_its_correction_costs_more_than_two_passes():
    """The boundary is where 2 r k (m+n) FLOPs take as long as the passes that dual saves."""
    previous = "dual"
    for r in range(16, 2048, 16):
        form = choose(Matrix(4096, 4096, r, r), "complement", "cpu").form
        assert (previous, form) != ("sequential", "dual"), "one crossing"
        previous = form
    assert previous == "sequential"
    assert choose(Matrix(4096, 4096, 640, 640), "complement", "cuda").form == "dual"


def test_the_smaller_intermediate_goes_first():
    tall = Matrix(4096, 256, 3000, 64, "low", "low")
    assert choose(tall, "complement", "cpu").first == "right"
    wide = Matrix(256, 4096, 64, 3000, "low", "low")
    assert choose(wide, "complement", "cpu").first == "left"
    for x in (tall, wide):
        step = choose(x, "complement", "cpu")
        p, q = x.r, x.k
        orders = (4 * x.m * x.n * p + 4 * p * x.n * q, 4 * x.m * x.n * q + 4 * x.m * p * q)
        assert step.flops == min(orders)


def test_printed():
    g = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    U = torch.empty(4096, 64, dtype=torch.bfloat16, device="meta")
    text = str(plan([g, g, g], [U, U, None], [U, U, U]))
    for part in ("form", "FLOPs", "bytes", "launches", "backend", "why", "2 × 4096×4096 bfloat16"):
        assert part in text
    assert "dual" in text
    assert "one-sided (right, high)" in text


def test_meta_tensors_plan_what_lists_of_them_cost():
    g = torch.empty(512, 256, device="meta")
    U, V = torch.empty(512, 32, device="meta"), torch.empty(256, 16, device="meta")
    one, two = plan(g, U, V), plan([g, g], [U, U], [V, V])
    assert two.flops == 2 * one.flops
    assert two.bytes == 2 * one.bytes
    batch = plan(torch.empty(5, 512, 256, device="meta"), U, V)
    assert batch.flops == 5 * one.flops


def test_costs_are_counted_from_the_calls_of_a_form():
    """By hand: FLOPs, passes over g, what is read and written of bases and coefficients."""
    m, n, r, k = 50, 40, 6, 7
    one, other, small = r * n, m * k, r * k
    both, correction = 4 * m * n * (r + k), 2 * r * k * (m + n)
    U, V = m * r, n * k
    expected = {
        ("dual", "left", 1.0): (
            both + correction,
            3,
            3 * (U + V) - 0,
            3 * one + 4 * other + 2 * small,
        ),
        ("sequential", "left", 1.0): (both, 6, 2 * (U + V), 2 * one + 2 * other),
        ("dual in turn", "left", 0.0): (both, 7, 2 * (U + V), 2 * one + 2 * other),
        ("mixed", "left", 0.0): (
            4 * m * n * r + 4 * r * n * k,
            2,
            2 * (U + V),
            5 * one + 2 * small,
        ),
        ("inner", "right", 1.0): (
            4 * m * n * k + 4 * r * m * k,
            3,
            2 * (U + V),
            4 * other + 2 * small,
        ),
        ("mixed in turn", "left", 1.0): (both, 6, 2 * (U + V), 2 * one + 2 * other),
        ("left", "left", 1.0): (4 * m * n * r, 3, 2 * U, 2 * one),
    }
    for (form, first, beta), (flops, passes, bases, coefficients) in expected.items():
        found = work(calls_of(form, first), beta, m, n, r, k)
        assert found[:4] == (flops, passes, bases, coefficients), form
    held = {form: work(calls_of(form), 1.0, m, n, r, k).held for form in FORMS}
    assert held["dual"] == one + other + small
    assert held["sequential"] == max(one, other)
    assert held["mixed"] == held["inner"] == one + small
    assert held["mixed in turn"] == m * n + max(one, other)


@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize("sharded", [False, True])
def test_flops_and_launches_are_the_products_that_torch_makes(mode, sharded):
    """Of a sharded list those of coefficients and apply_ together."""
    gen = torch.Generator().manual_seed(0)
    for left, right, (r, k) in itertools.product(
        ("high", "low", None), ("high", "low", None), ((40, 24), (3, 50), (100, 24), (40, 96))
    ):
        x = torch.randn(100, 96, generator=gen, dtype=torch.float64)
        U, V = (
            None if spans is None else random_basis(size, rank, spans=spans, dtype=x.dtype)
            for size, rank, spans in ((100, r, left), (96, k, right))
        )
        prepared = prepare([x], [U], [V], mode=mode, sharded=sharded)
        with FlopCounterMode(display=False) as counter, Matmuls() as made:
            if sharded:
                prepared.apply_([x], prepared.coefficients([x]))
            else:
                prepared.project_([x])
        told = prepared.plan
        assert (told.flops, told.launches) == (counter.get_total_flops(), made.count), told


class Matmuls(TorchDispatchMode):
    """Counts products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in ("mm", "addmm", "bmm", "baddbmm")
        return function(*args, **(kwargs or {}))


def test_passes_are_those_of_the_backend_that_runs():
    """g is read once for both coefficients where a kernel does, else twice; and torch adds the two
    terms of an update one after another where it doesn't join them."""
    reads = {
        (name, rank): choosing.module(name).coefficient_reads(
            Matrix(4096, 4096, rank, rank, dtype="bfloat16", basis_dtype="bfloat16")
        )
        for name, rank in itertools.product(choosing.NAMES, (16, 64, 200))
    }
    assert [reads["triton", rank] for rank in (16, 64, 200)] == [1, 1, 1]
    assert [reads["cuda", rank] for rank in (16, 64, 200)] == [1, 1, 2]
    assert [reads["torch", rank] for rank in (16, 64, 200)] == [2, 2, 2]
    for rank, joined in ((64, True), (1024, False)):
        x = Matrix(4096, 4096, rank, rank)
        step = choose(x, "complement", "cuda", once=True)
        assert (step.form, step.joined, step.passes) == ("dual", joined, 3)
        size = 4 * x.m * x.n
        for count, composed in itertools.product((1, 2), (False, True)):
            told = on_backend(x, step, count, composed)
            more = count - 1 + (2 if composed and not joined else 0)
            assert (told.passes, told.bytes) == (3 + more, step.bytes + more * size)
        kept = on_backend(x, step, 1, False, kept=True)
        assert (kept.passes, kept.bytes) == (2, step.bytes - size)
        assert "in L2" in kept.why


def test_passes_are_printed():
    """Of a list whose matrices take more and fewer, the least and the most."""
    g = torch.empty(96, 64, device="meta")
    both, one = bases(96, 8, "high"), bases(64, 8, "high")
    assert "passes    3 over" in str(plan(g, both, None))
    passes = [step.passes for _, step, _ in plan([g, g], [both, both], [None, one]).matrices]
    assert len(set(passes)) == 2
    told = f"passes    {min(passes)} to {max(passes)} over"
    assert told in str(plan([g, g], [both, both], [None, one]))


def test_more_than_one_launch_is_explained():
    def told(**changed):
        return str(replace(plan(torch.empty(8, 8, device="meta"), None, None), **changed))

    assert "launches  2: one a kind of dtypes" in told(backend="triton", launches=2)
    assert "launches  1\n" in told(backend="triton", launches=1)
    assert "launches  4\n" in told(backend="torch", launches=4)


def test_what_fits_l2_is_read_from_memory_once():
    """Of Triton's launches, by the cache of the device they are planned for."""
    triton = choosing.module("triton")
    pytest.importorskip("triton")
    device = torch.device("cpu")  # planned as for sm_80, whose L2 has 40 MB
    for size, kept in ((512, True), (4096, True), (8192, False)):
        x = Matrix(size, size, 64, 64, dtype="bfloat16", basis_dtype="bfloat16")
        assert triton.keeps(x, device) == kept
        assert not choosing.module("torch").keeps(x, device)
        assert not choosing.module("cuda").keeps(x, device)
        assert triton.keeps(replace(x, r=None), device), "in bands, whatever its size"
    wide = Matrix(4096, 4096, 512, 512, dtype="bfloat16", basis_dtype="bfloat16")
    assert not triton.keeps(wide, device), "bases and coefficients take another 16 MB"


def test_what_an_update_does_not_read_is_not_said_to_be_in_l2():
    """Of both sides low, g is read for the coefficients alone, and the result written."""
    x = Matrix(96, 64, 8, 8, u_spans="low", v_spans="low")
    step = choose(x, "complement", "cuda")
    assert step.form == "inner"
    kept = on_backend(x, step, 1, False, True)
    assert (kept.passes, kept.why) == (2, step.why)


def test_rank_limits_are_of_an_architecture_a_dtype_and_sides():
    """And each names what it rests on; a dtype or an architecture without rows has some all the
    same."""
    for architecture, dtype, sides in itertools.product(
        gpu.ARCHITECTURES, ("bfloat16", "float16", "float32"), (1, 2)
    ):
        limit = gpu.rank_limit(architecture, dtype, sides)
        assert limit.rank >= 64
        assert limit.source
    limits = {
        gpu.rank_limit(*key).rank
        for key in itertools.product(("sm_80", "sm_90"), ("bfloat16", "float32"), (1, 2))
    }
    assert len(limits) > 4, "not one number for all"
    at, beyond = (
        choosing.verdict(torch.device("meta"), "bfloat16", 2, rank) for rank in (112, 113)
    )
    assert (at.ahead, beyond.ahead) == (True, False)
    assert "beyond rank 112" in beyond.why
