"""Which matrices share a launch, its records, by which config and views. No triton needed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from osf_kernels._padding import is_aligned
from osf_kernels.backends.chains import Chain, chain_of
from osf_kernels.backends.jobs import Coefficients, Update
from osf_kernels.backends.operands import Arena, Lie, Operand, Placed
from osf_kernels.backends.triton import configs, groups, tasks
from osf_kernels.backends.triton.launches import Launch
from osf_kernels.backends.triton.views import Layout, View, accurate_rule, dot_rule
from tests.triton.task_checks import (
    BF16,
    FIELDS,
    FP16,
    FP32,
    META,
    UPDATE,
    A,
    B,
    C,
    Operands,
    argument_of,
    assert_progress,
    job,
    of_jobs,
    of_problems,
    problem,
    read,
    record_of,
    tiles_in,
    update_job,
)

# --- what shares a launch --------------------------------------------------------------------


def test_a_whole_model_takes_one_launch() -> None:
    """A hundred matrices of many shapes: sums, parts of them, what corrects them, updates."""
    new = Operands()
    shapes = [(64 * i, 128 * (1 + i % 5)) for i in range(1, 101)]
    problems = [problem(new, m, n, (32, 32)) for m, n in shapes]
    (launch,) = of_problems(problems).launches
    assert launch.kernel == "projection"
    order = read(launch)
    assert {task.kind for task in order} == {A, B, C, UPDATE}
    assert {task.matrix for task in order if task.kind == UPDATE} == {
        each.x.data_ptr().argument for each in problems
    }
    assert_progress(launch)


def test_jobs_of_one_kind_take_one_launch() -> None:
    jobs = [job(64 * i, 128, 64, 48) for i in range(1, 40, 4)]
    (sums,) = of_jobs(jobs)
    assert {task.kind for task in read(sums)} == {A, B}
    (updates,) = of_jobs([update_job(each) for each in jobs])
    assert {task.kind for task in read(updates)} == {UPDATE}
    for launch in (sums, updates):
        assert_progress(launch)


def test_dtypes_layouts_and_configs_take_launches_of_their_own() -> None:
    new = Operands()
    like = problem(new, 512, 512, (64, 64))
    for other in (
        problem(new, 512, 512, (64, 64), dtype=FP32),
        problem(new, 512, 512, (64, 64), basis=FP32),
        problem(new, 512, 512, (128, 128)),
        problem(new, 513, 511, (64, 64)),
    ):
        assert len(of_problems([like, other]).launches) == 2
    # Neither shapes, ranks of one block nor forms of the same layouts.
    for other in (
        problem(new, 1024, 256, (40, 64)),
        problem(new, 512, 512, (64, 64), "sequential"),
        problem(new, 512, 512, (64, 64), values=True),
    ):
        assert len(of_problems([like, other]).launches) == 1


def test_constant_is_tasks_then_records() -> None:
    """And holds nothing that another call could have otherwise."""
    new = Operands()
    problems = [problem(new, 640, 512, (64, 64)) for _ in range(3)]
    (launch,) = of_problems(problems).launches
    counters, count = launch.counts
    assert count == launch.tasks
    assert all(type(number) is int for number in launch.constant)
    order = read(launch)
    places = sorted({task.record for task in order})
    length = len(launch.constant) - count
    assert places[0] == 0
    # Each record is as long as its kind's, and none is without a task.
    kinds = {task.record: task.kind for task in order}
    sizes = [after - before for before, after in itertools.pairwise([*places, length])]
    assert [FIELDS[kinds[place]] for place in places] == sizes
    assert launch.constants["HAS_PARTS"]
    assert sum(kind == UPDATE for kind in kinds.values()) == len(problems), "a record an update"
    # Of a record every tile has a task.
    for place in places:
        tiles = sorted(task.tile for task in order if task.record == place)
        assert tiles == list(range(tiles_in(launch, place)))
    assert {counter for task in order for counter, _ in task.waits} < set(range(2, counters))


def test_metadata_is_counters_then_the_addresses_of_arguments() -> None:
    """The first address is of none, so that a word without a number is the address itself."""
    new = Operands()
    problems = [problem(new, 640, 512, (64, 64)) for _ in range(3)]
    (launch,) = of_problems(problems).launches
    counters = launch.counts[0]
    assert launch.metadata[:counters] == [0] * counters
    assert not any(isinstance(number, Placed) for number in launch.metadata[: counters + 1])
    none, *arguments = launch.metadata[counters:]
    assert none == 0
    assert [(int(each), getattr(each, "argument", None)) for each in arguments] == [
        (0, argument) for argument in range(1 + len(new.ends))
    ]
    # The records name every one of them and no more.
    named = {
        argument_of(record_of(launch, task.record)[at])
        for task in read(launch)
        for at in ((4, 7, 14, 17, 21, 24) if task.kind == UPDATE else (4, 9, 15))
    }
    assert named == set(range(len(arguments)))


def test_an_address_is_an_argument_and_what_is_added() -> None:
    """Of a tensor whose address is known it is that, and the call brings no argument."""
    new = Operands()
    x = new(64, 256).narrow(1, 128, 128)
    out, ready = new(64, 128), new(128, 16).mT
    held = torch.empty(64, 16, dtype=BF16)
    (launch,) = of_jobs([Update(out, x, held, ready, None, None, -1.0, 1.0)])
    record = record_of(launch, read(launch)[0].record)
    bits = tasks.ARGUMENT_BITS
    assert record[4:7] == [3 << bits, 128, 1]
    assert record[7:10] == [(2 << bits) + 256, 256, 1]
    assert record[14:17] == [held.data_ptr(), 16, 1]
    assert record[17:20] == [4 << bits, 1, 16]
    assert len(launch.metadata) == launch.counts[0] + 5


def test_arguments_are_as_many_as_a_record_can_name() -> None:
    lie, most = Lie((64, 64), (64, 1), BF16, 0, is_padded=False), 2**15 - 2
    basis = torch.empty(64, 16, dtype=BF16, device=META)

    def planned(argument: int) -> list[Launch]:
        x = Operand.lying(lie, META, argument)
        return of_jobs([Update(x, x, basis, basis.mT, None, None, -1.0, 1.0)])

    (launch,) = planned(most)
    address = record_of(launch, 0)[4]
    assert argument_of(address) == most
    assert address < 1 << 63, "a word of the array"
    with pytest.raises(ValueError, match=f"expected at most {most} matrices in a list"):
        planned(most + 1)


# --- configs ---------------------------------------------------------------------------------


def chosen(
    dtype: torch.dtype, basis: torch.dtype, rank: int, precision: str = "tf32x3", odd: bool = False
) -> tuple[configs.Math, int, bool]:
    """What a config is chosen by."""
    asked: list[tuple[configs.Math, int, bool]] = []

    def choose(_: Chain, *by: Any) -> configs.Projection:
        asked.append(by)
        return configs.projection_config("sm_90", *by)

    arena = Arena(META)
    shape = (255, 257) if odd else (256, 256)
    each = problem(Operands(), *shape, (rank, 8), dtype=dtype, basis=basis)
    coefficient, _ = dot_rule(dtype, (basis,), (FP32,), "tf32x3")
    groups.plan_chain(chain_of(each, coefficient, arena.new), arena, precision, choose)
    (found,) = asked
    return found


def test_a_config_is_chosen_by_math_and_the_larger_rank() -> None:
    assert chosen(BF16, BF16, 16) == ("bfloat16", 16, True)
    assert chosen(BF16, BF16, 4)[1] == 8
    assert chosen(BF16, BF16, 16, "ieee")[0] == "bfloat16"
    for dtypes in ((FP32, FP32), (BF16, FP32), (FP32, BF16), (FP16, FP32)):
        assert chosen(*dtypes, 16)[0] == "float32"
    assert chosen(FP32, FP32, 16, "tf32")[0] == "tf32"
    assert chosen(BF16, BF16, 16, odd=True)[2] is False
    assert chosen(BF16, BF16, 15)[2] is False  # rows of 30 bytes


def test_float16_is_multiplied_in_tf32() -> None:
    """Its coefficients may pass 65504, but sixteen bits are exact in TF32.

    C is of float32 coefficients and takes more; but beside products of a matrix it is small.
    """
    assert chosen(FP16, FP16, 16)[0] == "tf32"
    (launch,) = of_problems([problem(Operands(), 256, 256, (16, 8), dtype=FP16)]).launches
    assert (launch.constants["C_DOT"], launch.constants["C_PRECISION"]) == (FP32, "tf32x3")
    assert launch.config == configs.projection_config("sm_90", "tf32", 16)
    assert launch.config != configs.projection_config("sm_90", "float32", 16)


def test_blocks_hold_the_rank_up_to_the_last() -> None:
    """The last config serves ranks beyond all blocks, which it may do by a smaller one."""
    for architecture in configs.ARCHITECTURES:
        rows = [row for math, row in configs.shipped(architecture) if math == "bfloat16"]
        blocks = [row.block_r for row in rows[:-1]]
        assert blocks == sorted(set(blocks))
        for rank in (1, 16, 32, 33, 64, 65, 128, 129, 1000):
            config = configs.projection_config(architecture, "bfloat16", rank)
            assert config == next((row for row in rows if row.block_r >= rank), rows[-1])
            assert config.block_r >= rank or config == rows[-1]


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_a_matrix_beside_takes_little_more_shared_memory(architecture: str) -> None:
    """Of updates, per step: tiles of x, of the matrix, and of two factors."""
    for math, config in configs.shipped(architecture):
        size = 2 if math == "bfloat16" else 4
        for width in {1.0, 4 / size}:
            chosen = configs.beside_addend(config, width)
            if config.update_stages == 1:
                assert chosen == config
                continue
            before, after = (
                row.update_stages * size * row.block_n * (row.block_m * share + 2 * row.block_r)
                for row, share in ((config, 1), (chosen, 1 + width))
            )
            assert after <= 1.5 * before, (config, chosen)
            assert chosen.strip % chosen.block_n == chosen.block_q % chosen.block_k == 0
            assert min(chosen.block_n, chosen.block_k) >= 16


def test_width_of_what_updates_add() -> None:
    plain = problem(Operands(), 256, 256, (16, 8))
    for dtype, width in ((None, 0.0), (BF16, 1.0), (FP32, 2.0)):
        addend = None if dtype is None else Operands()(256, 256, dtype)
        chain = chain_of(plain._replace(addend=addend), BF16, Arena(META).new)
        assert groups.addend_width(chain) == width


# --- views -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "layout"),
    [
        (torch.zeros(64, 64), Layout.ROW),
        (torch.zeros(64, 64).mT, Layout.COLUMN),
        (torch.zeros(64, 66), Layout.UNALIGNED_ROW),  # rows of 264 bytes
        (torch.zeros(64, 65)[:, :64], Layout.UNALIGNED_ROW),
        (torch.zeros(64, 68)[:, 1:65], Layout.UNALIGNED_ROW),  # starts off a boundary
        (torch.zeros(64, 72)[:, 4:68], Layout.ROW),
        (torch.zeros(64, 128)[:, ::2], Layout.GENERAL),
        (torch.zeros(1, 64).expand(64, 64), Layout.ROW),
        (torch.zeros(64, 80)[:, :77], Layout.PADDED_ROW),
        (torch.zeros(64, 80)[:, 4:77], Layout.PADDED_ROW),
        (torch.zeros(64, 80)[1:, :79], Layout.PADDED_ROW),
        (torch.zeros(64 * 80 - 1).as_strided((64, 77), (80, 1)), Layout.UNALIGNED_ROW),
        (torch.zeros(64 * 80 - 4).as_strided((64, 76), (80, 1)), Layout.ROW),
        (torch.zeros(64, 76).as_strided((60, 77), (76, 1)), Layout.UNALIGNED_ROW),  # overlap
        (torch.zeros(64, 80, dtype=torch.bfloat16)[:, :76], Layout.PADDED_ROW),
        (torch.zeros(64, 84, dtype=torch.bfloat16)[:, :77], Layout.UNALIGNED_ROW),
    ],
)
def test_layout(view: Tensor, layout: Layout) -> None:
    assert View.of(view).layout is layout
    assert is_aligned(view) is layout.aligned
    turned = {
        Layout.ROW: Layout.COLUMN,
        Layout.UNALIGNED_ROW: Layout.UNALIGNED_COLUMN,
        Layout.PADDED_ROW: Layout.PADDED_COLUMN,
        Layout.GENERAL: Layout.GENERAL,
    }
    flipped = turned.get(layout, Layout.ROW)
    assert View.of(view).mT.layout is flipped


def test_columns_are_scheduled_as_rows() -> None:
    """x.mT in column order is the same launch as x, bases and outputs exchanged."""
    c = job(128, 256, 16, 32)
    assert c.U is not None
    assert c.V is not None
    assert c.A is not None
    assert c.B is not None
    turned = Coefficients(c.x.mT, c.V, c.U, c.B.mT, c.A.mT)
    assert of_jobs([c]) == of_jobs([turned])
    update = update_job(c)
    other = Update(c.x.mT, c.x.mT, c.V, c.B.mT, c.A.mT, c.U.mT, -1.0, 1.0)
    assert of_jobs([update]) == of_jobs([other])


def test_dot_rule() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert dot_rule(bf16, (bf16,), (fp32,), "tf32x3") == (bf16, "ieee")
    assert dot_rule(fp16, (fp16,), (), "tf32x3") == (fp16, "ieee")
    assert dot_rule(fp16, (fp16,), (fp32,), "tf32x3") == (fp32, "tf32")
    assert dot_rule(bf16, (fp16,), (), "tf32x3") == (fp32, "tf32")
    for precision in ("tf32x3", "ieee"):
        assert accurate_rule(fp32, precision) == (fp32, precision)
        assert accurate_rule(bf16, precision) == (bf16, "ieee")
        assert accurate_rule(fp16, precision) == (bf16, "ieee")
    assert accurate_rule(fp32, "tf32") == (fp32, "tf32x3")
    for dtypes in ((fp32, fp32), (fp32, bf16), (bf16, fp32)):
        for precision in ("tf32x3", "tf32", "ieee"):
            assert dot_rule(*((dtypes[0]), dtypes[1:]), (), precision) == (fp32, precision)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="got float64; float64 runs on the torch backend"):
        of_jobs([job(8, 8, 2, 2, torch.float64)])
    with pytest.raises(TypeError, match="expected S to be float32"):
        of_jobs([job(8, 8, 2, 2)._replace(S=torch.zeros(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match="beta to be 0, 1 or -1"):
        of_jobs([update_job(job(8, 8, 2, 2), beta=0.5)])
    long = torch.zeros(1).expand(1, 2**31)
    with pytest.raises(ValueError, match="no dimension beyond"):
        View.of(long)


def test_nothing_to_do_launches_nothing() -> None:
    assert of_jobs([]) == []
    assert of_jobs([job(0, 0, 2, 2), job(8, 8, 0, 0)]) == []
    assert of_jobs([update_job(job(0, 8, 2, 2)), update_job(job(8, 0, 2, 2))]) == []


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_86"),
    ],
)
def test_capability(capability: tuple[int, int], row: str) -> None:
    assert configs.architecture_of_capability(*capability) == row


def run_python(root: Path, code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


def test_imports_without_triton(root: Path) -> None:
    """The package imports, and says why it cannot be used."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from osf_kernels.backends import triton\n"
        "print(triton.unavailable_reason())"
    )
    assert "triton cannot be imported: " in run_python(root, code)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unavailable_on_a_cpu_unless_interpreted(root: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "import torch\nfrom osf_kernels.backends import triton\n"
        "print(triton.unavailable_reason(torch.device('cpu')), triton.unavailable_reason())"
    )
    assert "only with TRITON_INTERPRET=1" in run_python(root, code, TRITON_INTERPRET="0")
    assert run_python(root, code, TRITON_INTERPRET="1").split() == ["None", "None"]


def test_import_does_not_load_triton(root: Path) -> None:
    code = "import sys, osf_kernels, osf_kernels.backends.triton\nprint('triton' in sys.modules)"
    assert run_python(root, code).strip() == "False"
