"""Which products in float32 accuracy share a launch, what their records say. No triton needed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from osf_kernels.backends.triton import configs
from osf_kernels.backends.triton.launches import Launch
from osf_kernels.backends.triton.product_schedule import gram_launches, multiply_launches

_FIELDS = {"multiply": 15, "gram": 11}  # of a record


def products(
    As: list[Tensor], width: int, transpose: bool = False
) -> tuple[list[Launch], list[Launch]]:
    """Batches of A Q (or Aᵀ Q) and of Aᵀ A (or A Aᵀ), as they are planned for sm_90."""
    rows, columns = As[0].shape
    size, out = (rows, columns) if transpose else (columns, rows)
    Q = torch.empty(size, width, device="meta")
    name = str(As[0].dtype).removeprefix("torch.")
    fill = configs.FILL["sm_90"]
    multiply = multiply_launches(
        As,
        [Q] * len(As),
        [torch.empty(out, width, device="meta") for _ in As],
        transpose=transpose,
        fill=fill,
        float32_precision="tf32x3",
        choose=lambda _, basis, __, aligned: configs.multiply_config(
            "sm_90", name, basis.shape[1], aligned
        ),
    )
    gram = gram_launches(
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


def tiles_of(made: Launch) -> list[int]:
    """Of each problem's products."""
    starts = made.metadata[2 : made.counts[0] + 3]
    return [after - before for before, after in itertools.pairwise(starts)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_of_a_shape_group_take_one_launch(dtype: torch.dtype) -> None:
    multiply, gram = products(weights(24, 1024, 768, dtype), 96)
    assert [made.kernel for made in multiply] == ["multiply"]
    assert [made.kernel for made in gram] == ["gram"]
    for made in (multiply[0], gram[0]):
        problems, _, sums = made.counts
        assert problems == sums == 24
        # Products of float32 as three of TF32, of 16-bit pieces exactly.
        assert made.constants["PRECISION"] == ("tf32x3" if dtype == torch.float32 else "ieee")
        assert made.constants["X"] == dtype
    assert gram[0].constants["DOT"] == dtype


def test_metadata_is_two_counters_at_zero_then_products_then_sums() -> None:
    for launches in products(weights(5, 1024, 768), 96):
        (made,) = launches
        problems, tiles, sums = made.counts
        assert made.metadata[:2] == [0, 0]
        at = 2
        for count, end in ((problems, tiles), (sums, made.tasks - tiles)):
            starts = made.metadata[at : at + count + 1]
            assert starts == sorted(starts)
            assert (starts[0], starts[-1]) == (0, end)
            at += count + 1 + _FIELDS[made.kernel] * count
        assert len(made.metadata) == at
        assert sums == problems == 5


def test_one_triangle_is_computed() -> None:
    (made,) = products(weights(3, 256, 4096), 8)[1]
    _, tiles, sums = made.counts
    assert sums == 0
    block = made.config.block  # type: ignore[union-attr]
    count = 4096 // block
    assert tiles == made.tasks == 3 * count * (count + 1) // 2


def test_parts_of_a_gram_depend_on_the_matrix_alone_and_cover_its_sum() -> None:
    for m, n in ((50000, 64), (4096, 128), (3000, 1000), (600, 40), (511, 8), (8192, 2048)):
        alone = products(weights(1, m, n), 8)[1][0]
        parts, part = alone.metadata[4 + 5 : 4 + 7]
        assert (parts - 1) * part < m <= parts * part
        assert part % alone.config.block_k == 0  # type: ignore[union-attr]
        assert parts == 1 or part >= configs.SHORTEST_GRAM_SPLIT // 2
        together = products(weights(2, m, n), 8)[1][0]
        assert together.counts[1] == 2 * alone.counts[1]
        assert together.metadata[5 + 5 : 5 + 7] == [parts, part]


def test_workspace_of_grams_is_bounded() -> None:
    """A list whose parts would not fit is launched in slices, every matrix once."""
    slices = products(weights(200, 4096, 512), 8)[1]
    each = max(made.workspace_elements // made.counts[0] for made in slices)
    assert len(slices) > 1
    assert sum(made.counts[0] for made in slices) == 200
    for made in slices:
        assert made.workspace_elements <= configs.GRAM_WORKSPACE_ELEMENTS + each


def test_columns_of_products_are_scheduled_as_rows() -> None:
    """Aᵀ Q and A Aᵀ of a matrix in column order launch as A Q and Aᵀ A of its transpose."""
    rows = weights(1, 256, 128, device="cpu")
    columns = [A.mT for A in rows]
    for one, other in zip(products(rows, 8), products(columns, 8, transpose=True), strict=True):
        first, second = one[0], other[0]
        assert first.constants == second.constants
        assert (first.counts, first.tasks) == (second.counts, second.tasks)


def test_split_of_a_product_depends_on_the_matrix_alone() -> None:
    """Each takes as many tiles in a list as by itself, and so has the same bits."""
    As = weights(1, 4096, 512)
    for transpose in (False, True):
        (alone,) = products(As, 96, transpose)[0]
        (together,) = products(As * 24, 96, transpose)[0]
        assert tiles_of(together) == 24 * tiles_of(alone)
        assert (together.counts[2], alone.counts[2]) == (24, 1)


def test_parts_of_a_product_cover_its_sum_and_share_no_memory() -> None:
    (made,) = products(weights(3, 4096, 512), 96, transpose=True)[0]
    start = 2 + made.counts[0] + 1
    end = 0
    for i in range(3):
        record = made.metadata[start + 15 * i :][:15]
        parts, part, offset = record[9:12]
        assert (parts - 1) * part < record[4] == 4096 <= parts * part
        assert parts > 1
        assert offset == end
        end += parts * record[3] * record[8]
    assert made.workspace_elements == end
