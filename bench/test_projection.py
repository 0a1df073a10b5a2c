"""pytest-benchmark cases of the same kernels at sizes of seconds: ``pytest bench``.

For a quick look after a change; the figures to quote come from ``python -m bench``, whose rounds
interleave. Each case passes the correctness gate before it is timed.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import projection
from bench.contenders import COMPILED, HAND, NAIVE, OURS
from bench.models import Rank, shapes_of
from bench.problem import draw

CASES = [("512x512", "64"), ("512x512", "0.5"), ("512x512", "0.8"), ("1536x384", "0.5")]


@pytest.mark.timing
@pytest.mark.parametrize("contender", [OURS, HAND, NAIVE])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("model", "rank"), CASES)
def test_projection(
    benchmark: BenchmarkFixture, model: str, rank: str, dtype: str, contender: str
) -> None:
    device = torch.device("cpu")
    case = projection.Case(model, shapes_of(model), Rank.parse(rank), dtype, device)
    problem = draw(case.shapes, case.rank, projection.DTYPES[dtype], device, case.spans)
    found = projection.entries(case, problem)
    found.pop(COMPILED)  # compiling takes longer than all the cases together
    entry = found[contender]
    gate = projection.Gate(case, problem)
    row = projection.examine(case, problem, gate, contender, entry)
    assert row.status == "ok"
    benchmark.group = case.name
    benchmark.pedantic(entry.call, setup=problem.restore, rounds=9, warmup_rounds=1)
