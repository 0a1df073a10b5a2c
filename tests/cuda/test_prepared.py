"""Prepared lists with backend "cuda", its kernels in the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests import lists
from tests.cuda.emulated import Emulated
from tests.emulator.harness import compiler
from tests.lists import F32, MIXED, PINNED, SPLIT, Entry, List

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++)"),
    pytest.mark.usefixtures("emulated"),
]
MODES = ("complement", pytest.param("core", marks=pytest.mark.slow))
FEW = (MIXED[0], MIXED[1], MIXED[2], MIXED[4])


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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["complement", "core"])
def test_halves_make_the_whole(mode: str) -> None:
    lists.halves_make_the_whole(List(SPLIT, "halves", mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "way",
    ["residual", *(pytest.param(w, marks=pytest.mark.slow) for w in ("project", "S", "protected"))],
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
def test_what_is_written_to_bases_and_pins_counts() -> None:
    lists.writes_to_bases_count(List(FEW, "bases"))
    lists.writes_to_pins_count(List(PINNED[:2], "pins"))


def test_launches_of_a_list_do_not_grow_with_it(emulated: Emulated) -> None:
    """A dozen matrices of mixed shapes take the launches of three: four, as is planned."""
    shapes = [(24, 32), (32, 16), (16, 48), (40, 24), (64, 16), (16, 16)]
    entries = [Entry(shapes[i % 6], F32, "high high", (4, 4)) for i in range(12)]
    for count in (3, 12):
        case = List(entries[:count], "launches", count)
        xs = case.draw()
        prepared = case.prepare(xs)
        before = emulated.launches
        prepared.project_(xs)
        assert emulated.launches - before == prepared.plan.launches == 4
