"""Which jobs share a launch, what their records say, which config serves them. No triton needed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from osf_kernels._padding import is_aligned
from osf_kernels.backends.jobs import Coefficients, Update
from osf_kernels.backends.triton import configs, gram_schedule, schedule
from osf_kernels.backends.triton.schedule import Layout, View


def job(m: int, n: int, r: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Coefficients:
    def matrix(rows: int, columns: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    A, B = matrix(r, n, torch.float32), matrix(m, k, torch.float32)
    return Coefficients(matrix(m, n), matrix(m, r), matrix(n, k), A, B)


def launches(jobs: list[Coefficients], architecture: str = "sm_90") -> list[schedule.Launch]:
    return schedule.coefficients_launches(
        jobs,
        fill=configs.FILL[architecture],
        float32_precision="tf32x3",
        choose=lambda _, width, r, k, aligned: configs.coefficients_config(
            architecture, width, r, k, aligned=aligned
        ),
    )


def update_job(c: Coefficients, beta: float = 1.0) -> Update:
    assert c.V is not None
    return Update(c.x, c.x, c.U, c.A, c.B, c.V.mT, -1.0, beta)


def update_launches(jobs: list[Update]) -> list[schedule.Launch]:
    return schedule.update_launches(
        jobs,
        float32_precision="tf32x3",
        choose=lambda _, width, rank, aligned: configs.update_config("sm_90", width, rank, aligned),
    )


def test_whole_model_takes_two_launches() -> None:
    """A hundred matrices of many shapes: products with their ordered sums, and the update."""
    shapes = [(64 * i, 128 * (1 + i % 5)) for i in range(1, 101)]
    jobs = [job(m, n, 32, 32) for m, n in shapes]
    (coefficients,) = launches(jobs)
    assert coefficients.kernel == "one_pass"
    assert (coefficients.problems, coefficients.sums) == (100, 200)
    (update,) = update_launches([update_job(each) for each in jobs])
    assert update.kernel == "update"
    assert update.problems == 100


def test_metadata_is_two_counters_at_zero_then_products_then_sums() -> None:
    (made,) = launches([job(64 * i, 128, 64, 48) for i in range(1, 40, 4)])
    assert made.kernel == "two_pass"
    assert made.metadata[:2] == [0, 0]
    at = 2
    for problems, tiles in ((made.problems, made.tiles), (made.sums, made.sum_tiles)):
        starts = made.metadata[at : at + problems + 1]
        assert starts == sorted(starts)
        assert (starts[0], starts[-1]) == (0, tiles)
        at += problems + 1 + 21 * problems
    assert len(made.metadata) == at
    assert 0 < made.sums < made.problems, "sums of one part have nothing to add"


def test_variant_follows_the_rank_sum() -> None:
    kinds = {
        ranks: type(configs.coefficients_config("sm_90", 2, *ranks))
        for ranks in ((32, 32), (60, 4), (33, 32), (64, 64), (0, 8), (8, 0))
    }
    assert [ranks for ranks, kind in kinds.items() if kind is configs.OnePass] == [
        (32, 32),
        (60, 4),
    ]


def test_variant_can_be_named_or_refused() -> None:
    assert isinstance(configs.coefficients_config("sm_80", 2, 64, 64, "one_pass"), configs.OnePass)
    assert isinstance(configs.coefficients_config("sm_80", 2, 4, 4, "two_pass"), configs.TwoPass)
    with pytest.raises(ValueError, match="use two_pass"):
        configs.coefficients_config("sm_80", 2, 65, 8, "one_pass")
    with pytest.raises(ValueError, match="use two_pass"):
        configs.coefficients_config("sm_80", 2, 8, 0, "one_pass")
    with pytest.raises(ValueError, match="'three'"):
        configs.coefficients_config("sm_80", 2, 8, 8, "three")


def products(
    As: list[Tensor], width: int, transpose: bool = False
) -> tuple[list[schedule.Launch], list[schedule.Launch]]:
    """Batches of A Q (or Aᵀ Q) and of Aᵀ A (or A Aᵀ), as they are planned for sm_90."""
    rows, columns = As[0].shape
    size, out = (rows, columns) if transpose else (columns, rows)
    Q = torch.empty(size, width, device="meta")
    results = [torch.empty(out, width, device="meta") for _ in As]
    jobs = [
        Coefficients(A, Q, None, result.mT, None)
        if transpose
        else Coefficients(A, None, Q, None, result)
        for A, result in zip(As, results, strict=True)
    ]
    name = str(As[0].dtype).removeprefix("torch.")
    fill = configs.FILL["sm_90"]
    multiply = schedule.coefficients_launches(
        jobs,
        fill=fill,
        float32_precision="tf32x3",
        choose=lambda _, width, r, k, aligned: configs.multiply_config(
            "sm_90", name, max(r, k), aligned
        ),
        accurate=True,
    )
    gram = gram_schedule.gram_launches(
        As,
        [torch.empty(size, size, device="meta") for _ in As],
        right=not transpose,
        fill=fill,
        float32_precision="tf32x3",
        choose=lambda _, size, aligned: configs.gram_config("sm_90", name, size, aligned),
    )
    return multiply, gram


def weights(
    count: int, m: int, n: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta"
) -> list[Tensor]:
    return [torch.empty(m, n, dtype=dtype, device=device) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_of_a_shape_group_take_one_launch(dtype: torch.dtype) -> None:
    multiply, gram = products(weights(24, 1024, 768, dtype), 96)
    assert [made.kernel for made in multiply] == ["two_pass"]
    assert [made.kernel for made in gram] == ["gram"]
    for made in (multiply[0], gram[0]):
        assert made.problems == made.sums == 24
        # Products of float32 as three of TF32, of 16-bit pieces exactly.
        assert made.constants["PRECISION"] == ("tf32x3" if dtype == torch.float32 else "ieee")
    pieces = torch.float32 if dtype == torch.float32 else torch.bfloat16
    assert multiply[0].constants["DOT"] == pieces
    assert gram[0].constants["DOT"] == dtype


def test_one_triangle_is_computed() -> None:
    (made,) = products(weights(3, 256, 4096), 8)[1]
    assert made.sums == 0
    block = made.config.block  # type: ignore[union-attr]
    count = 4096 // block
    assert made.tiles == 3 * count * (count + 1) // 2


def test_parts_of_a_gram_depend_on_the_matrix_alone_and_cover_its_sum() -> None:
    for m, n in ((50000, 64), (4096, 128), (3000, 1000), (600, 40), (511, 8), (8192, 2048)):
        alone = products(weights(1, m, n), 8)[1][0]
        parts, part = alone.metadata[4 + 5 : 4 + 7]
        assert (parts - 1) * part < m <= parts * part
        assert part % alone.config.block_k == 0  # type: ignore[union-attr]
        assert parts == 1 or part >= configs.SHORTEST_GRAM_SPLIT // 2
        together = products(weights(2, m, n), 8)[1][0]
        assert together.tiles == 2 * alone.tiles
        assert together.metadata[5 + 5 : 5 + 7] == [parts, part]


def test_workspace_of_grams_is_bounded() -> None:
    """A list whose parts would not fit is launched in slices, every matrix once."""
    slices = products(weights(200, 4096, 512), 8)[1]
    each = max(made.workspace_elements // made.problems for made in slices)
    assert len(slices) > 1
    assert sum(made.problems for made in slices) == 200
    for made in slices:
        assert made.workspace_elements <= configs.GRAM_WORKSPACE_ELEMENTS + each


def test_columns_of_products_are_scheduled_as_rows() -> None:
    """Aᵀ Q and A Aᵀ of a matrix in column order launch as A Q and Aᵀ A of its transpose."""
    rows = weights(1, 256, 128, device="cpu")
    columns = [A.mT for A in rows]
    for one, other in zip(products(rows, 8), products(columns, 8, transpose=True), strict=True):
        first, second = one[0], other[0]
        assert first.constants | {"A_LAYOUT": 0} == second.constants | {"A_LAYOUT": 0}
        assert (first.tiles, first.sum_tiles) == (second.tiles, second.sum_tiles)


def tiles_of(made: schedule.Launch) -> list[int]:
    """Of each problem's products."""
    starts = made.metadata[2 : made.problems + 3]
    return [after - before for before, after in itertools.pairwise(starts)]


def test_a_list_that_fills_the_machine_splits_no_sum() -> None:
    """Matrices that by themselves would leave processors idle are split only by themselves."""
    jobs = [job(4096, 512, 128, 128), job(512, 4096, 128, 104), job(64, 64, 96, 72)]
    alone = [launches([each])[0] for each in jobs]
    assert [made.sums > 0 for made in alone] == [True, True, False]
    (few,) = launches(jobs)
    assert sum(map(sum, map(tiles_of, alone))) > few.tiles > 0
    (many,) = launches(jobs * 8)
    assert many.sums == 0
    assert many.tiles >= configs.FILL["sm_90"]
    assert many.workspace_elements == 0
    # A kernel that reads x once writes a part of B for each strip, however full the machine is, and
    # of A then one part.
    (one_read,) = launches([job(4096, 4096, 32, 32)] * 8)
    assert one_read.kernel == "one_pass"
    strips = 4096 // one_read.config.block_n  # type: ignore[union-attr]
    assert one_read.workspace_elements == 8 * (4096 * 32 + strips * 4096 * 32)


def test_split_of_a_product_depends_on_the_matrix_alone() -> None:
    """Each takes as many tiles in a list as by itself, and so has the same bits."""
    As = weights(1, 4096, 512)
    for transpose in (False, True):
        (alone,) = products(As, 96, transpose)[0]
        (together,) = products(As * 24, 96, transpose)[0]
        assert tiles_of(together) == 24 * tiles_of(alone)
        assert (together.sums, alone.sums) == (24, 1)


def test_parts_cover_the_sum_once() -> None:
    for tiles in (1, 7, 32, 500):
        for length in (1, 31, 255, 256, 4096, 5000):
            for step in (32, 64):
                parts, part = schedule._parts(tiles, length, step, 128)
                assert part % step == 0
                assert (parts - 1) * part < length <= parts * part
                assert parts == 1 or part >= min(configs.SHORTEST_SPLIT, length) // 2


def test_small_output_fills_the_machine() -> None:
    """A 64-wide output over a long sum is split into about as many tiles as there are SMs."""
    (made,) = launches([job(16384, 64, 64, 64)])
    assert made.tiles >= 128


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
    assert launches([c]) == launches([turned])
    update = update_job(c)
    other = Update(c.x.mT, c.x.mT, c.V, c.B.mT, c.A.mT, c.U.mT, -1.0, 1.0)
    assert update_launches([update]) == update_launches([other])


def test_dot_rule() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert schedule.dot_rule(bf16, (bf16,), (fp32,), "tf32x3") == (bf16, "ieee")
    assert schedule.dot_rule(fp16, (fp16,), (), "tf32x3") == (fp16, "ieee")
    assert schedule.dot_rule(fp16, (fp16,), (fp32,), "tf32x3") == (fp32, "tf32")
    assert schedule.dot_rule(bf16, (fp16,), (), "tf32x3") == (fp32, "tf32")
    for precision in ("tf32x3", "ieee"):
        assert schedule.accurate_rule(fp32, precision) == (fp32, precision)
        assert schedule.accurate_rule(bf16, precision) == (bf16, "ieee")
        assert schedule.accurate_rule(fp16, precision) == (bf16, "ieee")
    assert schedule.accurate_rule(fp32, "tf32") == (fp32, "tf32x3")
    for dtypes in ((fp32, fp32), (fp32, bf16), (bf16, fp32)):
        for precision in ("tf32x3", "tf32", "ieee"):
            assert schedule.dot_rule(*((dtypes[0]), dtypes[1:]), (), precision) == (fp32, precision)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="got float64; float64 runs on the torch backend"):
        launches([job(8, 8, 2, 2, torch.float64)])
    with pytest.raises(TypeError, match="expected S to be float32"):
        launches([job(8, 8, 2, 2)._replace(S=torch.zeros(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match="beta to be 0, 1 or -1"):
        update_launches([update_job(job(8, 8, 2, 2), beta=0.5)])
    long = torch.zeros(1).expand(1, 2**31)
    with pytest.raises(ValueError, match="no dimension beyond"):
        View.of(long)


def test_nothing_to_do_launches_nothing() -> None:
    assert launches([]) == []
    assert launches([job(0, 0, 2, 2), job(8, 8, 0, 0)]) == []
    assert update_launches([update_job(job(0, 8, 2, 2)), update_job(job(8, 0, 2, 2))]) == []


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_80"),
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
