"""The rows of ``bench protect``, the figures that they are to reach, and their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench import report
from bench.protection_trainers import CONFINED, RESTORED, UNPROTECTED

OVERHEAD_TARGET = 0.15
DRIFT_TARGET = 1e-5
LONG_STEP, SHORT_STEP = 5120, 1280  # tokens that the figures of a step's time are about
PEAK_FROM = 0.6  # ρ from which on a confined step is to peak lower than a plain one


@dataclass
class Row:
    """One contender's training step, or (``steps``) one long run's drift."""

    case: str
    contender: str
    rho: float
    matrices: int
    tokens: int | None = None  # of a step, padding included
    rounds: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    overhead: float | None = None  # of the unprotected step, from medians
    parameter_bytes: int | None = None  # when a step begins: of the model, frozen ones too
    state_bytes: int | None = None  # then, of the optimizer
    held_bytes: int | None = None  # then, all else: bases, pins, buffers
    extra_bytes: int | None = None  # most that a step allocates beyond those three
    peak_bytes: int | None = None  # all four
    trained_bytes: int | None = None  # gradients and optimizer state of the protected weights
    steps: int | None = None
    drift: float | None = None


def plain_of(rows: Sequence[Row], row: Row) -> Row | None:
    """The unprotected step that ran in the same rounds."""
    for other in rows:
        same = (other.rho, other.tokens) == (row.rho, row.tokens)
        if same and other.contender == UNPROTECTED and other.steps is None:
            return other
    return None


@dataclass(frozen=True)
class Limit:
    """What a figure of a contender's rows is to be at most.

    Attributes:
        value: of a row and the unprotected one beside it; None where it has none.
        applies: to which rows.
        shown: format of the figure.
    """

    contender: str
    what: str
    value: Callable[[Row, Row], float | None]
    limit: float
    applies: Callable[[Row], bool]
    shown: str = ".1%"


def _share(row: float | None, plain: float | None) -> float | None:
    return None if row is None or not plain else row / plain


def _time(row: Row, plain: Row) -> float | None:
    return _share(row.median_ms, plain.median_ms)


def _trained(row: Row, plain: Row) -> float | None:
    return _share(row.trained_bytes, plain.trained_bytes)


def _at(rho: float, tokens: int = 0) -> Callable[[Row], bool]:
    return lambda row: math.isclose(row.rho, rho) and (row.tokens or 0) >= tokens


TRAINED = "gradients and state of the protected weights"
LIMITS = (
    Limit(CONFINED, "time", _time, 1.03, _at(0.5, LONG_STEP), ".3f"),
    Limit(CONFINED, "time", _time, 1.00, _at(0.8, LONG_STEP), ".3f"),
    Limit(
        *(CONFINED, "time", _time, 1.10),
        lambda row: SHORT_STEP <= (row.tokens or 0) < LONG_STEP,
        ".3f",
    ),
    Limit(CONFINED, TRAINED, _trained, 0.45, _at(0.5)),
    Limit(CONFINED, TRAINED, _trained, 0.15, _at(0.8)),
    Limit(
        *(
            CONFINED,
            "peak of a step in all",
            lambda row, plain: _share(row.peak_bytes, plain.peak_bytes),
        ),
        1.0,
        lambda row: row.rho >= PEAK_FROM - 1e-9,
        ".3f",
    ),
)


def missed(rows: Sequence[Row]) -> list[str]:
    """Which figures are above what they are to be, in words."""
    found = []
    for rho in dict.fromkeys(row.rho for row in rows):
        steps = [
            row
            for row in rows
            if row.rho == rho and row.contender == RESTORED and row.overhead is not None
        ]
        found += [  # of the largest batch
            f"overhead of {RESTORED!r} at {row.tokens} tokens a step is {row.overhead:.1%}, to be "
            f"at most {OVERHEAD_TARGET:.0%}"
            for row in steps[-1:]
            if row.overhead is not None and not row.overhead <= OVERHEAD_TARGET
        ]
    for row in rows:
        plain = plain_of(rows, row)
        for limit in LIMITS if plain is not None and row.steps is None else ():
            if row.contender != limit.contender or not limit.applies(row):
                continue
            assert plain is not None
            value = limit.value(row, plain)
            if value is not None and not value <= limit.limit:
                found.append(
                    f"{limit.what} of {row.contender!r} at rho={row.rho:g}, {row.tokens} tokens a "
                    f"step, is {format(value, limit.shown)} of the unprotected step's, to be at "
                    f"most {format(limit.limit, limit.shown)}"
                )
    return found + [
        f"drift of {row.contender!r} after {row.steps} steps is {row.drift:.1e}, to be at most "
        f"{DRIFT_TARGET:.0e}"
        for row in rows
        if row.contender in (RESTORED, CONFINED)
        and row.drift is not None
        and not row.drift <= DRIFT_TARGET
    ]


def table(rows: Sequence[Row]) -> str:
    """A line a contender and step, then the drifts."""

    def mib(count: int | None) -> str:
        return report.shown(None if count is None else count / 2**20, ".0f")

    lines = []
    for row in rows:
        if row.steps is not None:
            continue
        plain = plain_of(rows, row)
        trained = None if plain is None else _trained(row, plain)
        lines.append(
            (
                f"{row.rho:g}",
                str(row.tokens),
                row.contender,
                report.shown(row.median_ms, ".0f"),
                report.shown(row.p20_ms, ".0f"),
                report.shown(row.p80_ms, ".0f"),
                report.shown(None if row.overhead is None else 1 + row.overhead, ".2f"),
                mib(row.parameter_bytes),
                mib(row.state_bytes),
                mib(row.held_bytes),
                mib(row.extra_bytes),
                mib(row.peak_bytes),
                report.shown(trained, ".0%"),
            )
        )
    header = (
        *("rho", "tokens", "step", "ms", "p20", "p80", "x plain"),
        *("weights", "state", "bases", "+ step", "peak", "grad+state"),
    )
    text = report.table(header, lines)
    for row in rows:
        if row.steps is not None:
            text += (
                f"\ndrift after {row.steps} steps, {row.contender}, rho={row.rho:g}: "
                f"{row.drift:.1e}"
            )
    return text
