"""Lists of the torch backend that are decided once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.guarded_calls import python_calls
from osf_kernels import plan
from osf_kernels.backends import torch as torch_backend
from osf_kernels.backends.jobs import Problem
from osf_kernels.backends.torch import Program, coefficients_of
from osf_kernels.plan import Matrix, choose, choose_pinned
from tests.helpers import DTYPES, KINDS, draw_basis, generator_for, randn

MODES = ("complement", "core")


def held(basis):
    return None if basis is None else basis.columns


def projections(count, gen, *, dtypes=DTYPES, size=24):
    """Problems of every form, ``count`` of each, on the torch backend."""
    problems = []
    sides = itertools.product(dtypes, MODES, KINDS, KINDS, range(count), (True, False))
    for i, (dtype, mode, left, right, _, batched) in enumerate(sides):
        shape = (2, size, size + i % 3) if batched else (size, size + i % 3)
        x = randn(*shape, dtype=dtype, generator=gen)
        U = draw_basis(shape[-2], 5, left, dtype, gen)
        V = draw_basis(shape[-1], size - 6, right, dtype, gen)
        step = plan(x, U, V, mode=mode).matrices[0][1]
        columns = [b and held(b).expand(*shape[:-2], *b.columns.shape) for b in (U, V)]
        problems.append(Problem(x, x, *columns, step))
    return problems


def pinned(count, gen, dtype=torch.float32, basis_dtype=torch.float32, size=16):
    """Restoring of both modes, with S, with S and its rests, and dense."""
    problems = []
    for mode, way, _ in itertools.product(MODES, ("S", "rests", "dense"), range(count)):
        x = randn(size, size, dtype=dtype, generator=gen)
        U, V = (held(draw_basis(size, 4, "high", basis_dtype, gen)) for _ in "UV")
        matrix = Matrix(size, size, 4, 4, dtype=str(dtype).removeprefix("torch."))
        if way == "dense":
            step = choose(matrix, mode, "cpu", once=dtype != torch.float32)
            addend = randn(size, size, dtype=torch.float32, generator=gen)
            problems.append(Problem(x, x, U, V, step, addend=addend))
            continue
        problem = Problem(x, x, U, V, choose_pinned(matrix, mode, "cpu"), torch.rand(4))
        if way == "rests":
            shapes = [None, (4, 4)] if mode == "core" else [(4, size), (size, 4)]
            rests = [s and randn(*s, dtype=basis_dtype, generator=gen) for s in shapes]
            problem = problem._replace(rest_A=rests[0], rest_B=rests[1])
        problems.append(problem)
    return problems


def fresh(problems):
    """The problems one by one on copies of their matrices, in place as a Program runs them."""
    expected = [p.x.clone() for p in problems]
    for p, x in zip(problems, expected, strict=True):
        torch_backend.run([p._replace(x=x, out=x)])
    return expected


def test_a_program_gives_the_bits_of_single_runs_again_and_again():
    gen = generator_for("program")
    problems = projections(1, gen)
    problems += pinned(2, gen) + pinned(2, gen, torch.bfloat16) + pinned(2, gen, torch.float16)
    assert {p.step.form for p in problems} >= set(torch_backend.LOOPS) - {"zero"}
    program = Program(problems)
    for _ in range(2):
        others = [randn(*p.x.shape, dtype=p.x.dtype, generator=gen) for p in problems]
        expected = fresh([p._replace(x=x, out=x) for p, x in zip(problems, others, strict=True)])
        given = [p.x.clone() for p in problems]
        program.run(others)
        for p, kept, actual, wanted in zip(problems, given, others, expected, strict=True):
            assert torch.equal(actual, wanted), p.step
            assert torch.equal(p.x, kept), "a Program wrote to the matrix that it was decided with"


def test_a_program_reads_what_its_bases_hold_now():
    gen = generator_for("refreshed")
    problems = projections(1, gen, dtypes=(torch.float32, torch.bfloat16))
    problems += pinned(1, gen, torch.bfloat16, torch.bfloat16)
    program = Program(problems)
    for p in problems:
        for t in (p.U, p.V):
            if t is not None:
                (t[0] if t.dim() == 3 else t).copy_(t.flip(-2)[0] if t.dim() == 3 else t.flip(-2))
    expected = fresh(problems)
    program.run([p.x for p in problems])
    assert all(torch.equal(p.x, wanted) for p, wanted in zip(problems, expected, strict=True))


class Copies(TorchDispatchMode):
    """Notes the largest number of elements that were converted before a product came."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.held = self.held + args[0].numel() if name == "_to_copy" else 0
        self.most = max(self.most, self.held)
        return func(*args, **(kwargs or {}))


def test_a_list_is_converted_a_part_at_a_time():
    """A whole model in float32 beside it would take twice its memory again."""
    gen = generator_for("large")
    problems = []
    for size in (700, 40, 600, 40, 40, 300):
        problems += pinned(1, gen, torch.bfloat16, size=size)
    expected = fresh(problems)
    with Copies() as copies:
        Program(problems).run([p.x for p in problems])
    assert all(torch.equal(p.x, wanted) for p, wanted in zip(problems, expected, strict=True))
    assert 700 * 700 <= copies.most <= 700 * 700 + 2 * 700 * 4


def test_bfloat16_rows_may_be_padded():
    gen = generator_for("padded program")
    problems = projections(1, gen, dtypes=(torch.bfloat16,), size=202)
    expected = fresh(problems)
    padded = []
    for p in problems:
        room = torch.full((*p.x.shape[:-1], p.x.shape[-1] + 8), float("nan"), dtype=p.x.dtype)
        padded.append(room[..., : p.x.shape[-1]].copy_(p.x))
    Program(problems).run(padded)
    for actual, wanted in zip(padded, expected, strict=True):
        assert not actual.isnan().any()
        assert (actual - wanted).norm() <= 0.02 * (1 + wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_a_list(dtype):
    gen = generator_for("halves of a list", dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    problems, As, Bs = [], [], []
    for mode, left, right in itertools.product(MODES, KINDS, KINDS):
        x = randn(30, 24, dtype=dtype, generator=gen)
        U, V = draw_basis(30, 7, left, dtype, gen), draw_basis(24, 9, right, dtype, gen)
        spans = [b.spans if b else "high" for b in (U, V)]
        widths = [None if b is None else b.columns.shape[1] for b in (U, V)]
        matrix = Matrix(30, 24, *widths, *spans, dtype=str(dtype).removeprefix("torch."))
        step = choose(matrix, mode, "cpu", once=True, shard=True)
        problems.append(Problem(x, x, held(U), held(V), step))
        As.append(None if U is None else x.new_empty(widths[0], 24, dtype=wide))
        Bs.append(None if V is None else x.new_empty(30, widths[1], dtype=wide))
    Us, Vs = [p.U for p in problems], [p.V for p in problems]
    coefficients_of([p.x for p in problems], Us, Vs, As, Bs)
    for p, A, B in zip(problems, As, Bs, strict=True):
        A2, B2 = (None if t is None else torch.empty_like(t) for t in (A, B))
        coefficients_of([p.x], [p.U], [p.V], [A2], [B2])
        assert A is None or torch.equal(A, A2)
        assert B is None or torch.equal(B, B2)
    ready = list(zip(As, Bs, strict=True))
    kept = [[t if t is None else t.clone() for t in pair] for pair in ready]
    expected = fresh([p._replace(A=A, B=B) for p, (A, B) in zip(problems, ready, strict=True)])
    Program(problems).run([p.x for p in problems], ready)
    for p, pair, before, wanted in zip(problems, ready, kept, expected, strict=True):
        assert torch.equal(p.x, wanted), p.step
        assert all(t is None or torch.equal(t, b) for t, b in zip(pair, before, strict=True))


def calls_of(run):
    """How many Python functions ``run`` enters."""
    return len(python_calls(run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", ["project", "restore", "coefficients"])
def test_no_python_function_runs_for_each_matrix(what, dtype):
    counts = []
    for count in (1, 13):
        gen = generator_for("calls")
        if what == "restore":
            problems = pinned(count, gen, dtype)
        else:
            problems = projections(count, gen, dtypes=(dtype,), size=8)
            # but where sums that cancel are looked for
            problems = [p for p in problems if (p.step.form, p.step.first) != ("mixed", "right")]
        xs = [p.x for p in problems]
        if what == "coefficients":
            Us, Vs = [p.U for p in problems], [p.V for p in problems]
            widths = [(0 if U is None else U.shape[-1], x) for U, x in zip(Us, xs, strict=True)]
            As = [
                x.new_empty(*x.shape[:-2], w, x.shape[-1], dtype=torch.float32) for w, x in widths
            ]
            none = [None] * len(xs)
            counts.append(calls_of(lambda a=(xs, Us, Vs, As, none): coefficients_of(*a)))
        else:
            program = Program(problems)
            program.run(xs)
            counts.append(calls_of(lambda run=program.run, xs=xs: run(xs)))
    assert counts[0] == counts[1]
    assert counts[0] > 0
