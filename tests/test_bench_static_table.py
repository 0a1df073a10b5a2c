"""The committed table of machine code: it holds every kernel, and none has a fault."""

from __future__ import annotations

import csv
import importlib.util

import pytest

from bench import occupancy, report, static, static_cuda, static_triton

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="module")
def committed() -> list[dict[str, str]]:
    with (report.ROOT / "bench" / "results" / "static.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@NEEDS_TRITON
def test_committed_table_holds_every_pinned_config(committed: list[dict[str, str]]) -> None:
    for architecture in occupancy.LIMITS:
        shipped = {
            (k.kernel, k.dtype, k.layout, k.config)
            for k, _ in static_triton.triton_launches(architecture)
        }
        held = {
            (r["kernel"], r["dtype"], r["layout"], r["config"])
            for r in committed
            if r["backend"] == "triton" and r["arch"] == architecture
        }
        assert held == shipped, "run `python -m bench static --csv bench/results/static.csv`"


@NEEDS_TRITON
def test_committed_code_leaves_room_for_what_its_config_counts_on(
    committed: list[dict[str, str]],
) -> None:
    for architecture in occupancy.LIMITS:
        held = {
            (r["kernel"], r["dtype"], r["layout"], r["config"]): int(r["blocks_per_sm"])
            for r in committed
            if r["backend"] == "triton" and r["arch"] == architecture
        }
        for k, made in static_triton.triton_launches(architecture):
            room = held[k.kernel, k.dtype, k.layout, k.config]
            assert room >= made.config.programs_per_sm, k


def test_committed_table_holds_every_cuda_kernel(committed: list[dict[str, str]]) -> None:
    for architecture in static_cuda.BUILT_FOR:
        own = [r for r in committed if r["backend"] == "cuda" and r["arch"] == architecture]
        for source in (report.ROOT / "csrc" / "inst").glob("*_*.cu"):
            kind, variant, *rank = source.stem.split("_")
            dtype = static_cuda._DTYPES.get(variant, "fp32")
            matching = [r for r in own if (r["kernel"], r["dtype"]) == (kind, dtype)]
            if rank:
                matching = [r for r in matching if f"rank={rank[0]} " in r["config"]]
            if kind == "jacobi":
                matching = [r for r in matching if r["config"].endswith(f"V {variant}")]
            assert matching, source.stem
        assert {r["kernel"] for r in own} == {"coefficients", "update", "cholesky", "jacobi"}


def test_committed_code_has_no_faults(committed: list[dict[str, str]]) -> None:
    for r in committed:
        what = f"{r['backend']} {r['kernel']} {r['arch']} {r['dtype']} {r['layout']} {r['config']}"
        assert (r["local_bytes"], r["local_accesses"]) == ("0", "0"), what
        limits = occupancy.LIMITS[r["arch"]]
        assert int(r["shared_bytes"]) <= limits.shared_bytes_of_block, what
        assert int(r["registers"]) <= 255, what
        assert int(r["blocks_per_sm"]) >= int(r["launched_per_sm"] or 1), what
        if r["kernel"] in static.MULTIPLYING:
            assert int(r["tensor_core"]) > 0, what
            assert int(r["hot_tensor_core"]) > 0, what
        if r["kernel"] in static.MULTIPLYING and r["layout"] != "odd width":
            assert int(r["loads_16"]) > 0, what
        held = occupancy.occupancy(
            r["arch"], int(r["registers"]), int(r["shared_bytes"]), int(r["threads_per_block"])
        )
        assert held.blocks == int(r["blocks_per_sm"]), what
