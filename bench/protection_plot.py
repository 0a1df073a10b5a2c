"""The sweep over ρ in a picture: what training protected weights takes, beside plain training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.protection_trainers import (
    BESIDE,
    CONFINED,
    EAGER,
    FACTORED,
    PEFT_OSF,
    PROJECTED,
    RESTORED,
    UNPROTECTED,
)

# Okabe and Ito's colours, told apart by every kind of colour vision; ours are the filled markers.
STYLES: dict[str, tuple[str, str, bool]] = {  # contender -> colour, marker, filled
    CONFINED: ("#0072B2", "o", True),
    BESIDE: ("#56B4E9", "P", True),
    RESTORED: ("#009E73", "^", True),
    PROJECTED: ("#E69F00", "v", True),
    EAGER: ("#555555", "x", False),
    PEFT_OSF: ("#D55E00", "s", False),
    FACTORED: ("#CC79A7", "D", False),
}
NAMES = {PEFT_OSF: "PEFT's OSF", FACTORED: "mini_trainer's OSFT"}
PANELS = (
    "gradients and state of the protected weights,\nand all that is held beside them",
    "peak of a step in all:\nweights, state, bases and what it allocates",
    "time of a step\n(bars: 20 % to 80 % of the rounds)",
)


class Point(NamedTuple):
    """One contender at one ρ, each over the unprotected step of the same rounds."""

    rho: float
    bytes: float  # gradients, state, and all that is held beside the plain weights
    peak: float
    time: float
    fast: float  # 20th percentile of the time
    slow: float  # 80th


def points(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Point]]:
    """contender -> its points by ρ, of the steps with the most tokens beside an unprotected one."""
    steps = [row for row in rows if row["median_ms"] and row["peak_bytes"]]
    if not steps:
        return {}
    most = max(int(row["tokens"]) for row in steps)
    steps = [row for row in steps if int(row["tokens"]) == most]
    plain = {row["rho"]: row for row in steps if row["contender"] == UNPROTECTED}
    found: dict[str, list[Point]] = {}
    for row in steps:
        base = plain.get(row["rho"])
        if base is None or row["contender"] == UNPROTECTED:
            continue

        def figure(name: str, of: Mapping[str, str] = row) -> float:
            return float(of[name])

        beside = figure("parameter_bytes") - figure("parameter_bytes", base) + figure("held_bytes")
        bare = figure("median_ms", base)
        found.setdefault(row["contender"], []).append(
            Point(
                float(row["rho"]),
                (figure("trained_bytes") + beside) / figure("trained_bytes", base),
                figure("peak_bytes") / figure("peak_bytes", base),
                figure("median_ms") / bare,
                figure("p20_ms") / bare,
                figure("p80_ms") / bare,
            )
        )
    for line in found.values():
        line.sort()
    return found


def draw(rows: Sequence[Mapping[str, str]], picture: Path) -> None:
    """A panel for what training holds, one for a step's peak, one for its time; lower is better.

    Raises ValueError where no contender has a step beside an unprotected one.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = points(rows)
    if not lines:
        raise ValueError("bench: nothing to plot: no step beside an unprotected one")
    figure, grid = plt.subplots(1, 3, figsize=(11.5, 4.6), layout="constrained")
    for place, (axes, title) in enumerate(zip(grid, PANELS, strict=True)):
        axes.axhline(1.0, color="#333333", linestyle="--", linewidth=1.2, label="plain fine-tuning")
        for name, line in lines.items():
            colour, marker, filled = STYLES.get(name, ("#888888", "x", True))
            shares = [point[1 + place] for point in line]
            spread = None
            if place == 2:
                spread = [
                    [max(0.0, p.time - p.fast) for p in line],
                    [max(0.0, p.slow - p.time) for p in line],
                ]
            axes.errorbar(
                [point.rho for point in line],
                shares,
                yerr=spread,
                color=colour,
                marker=marker,
                markersize=5.5,
                markerfacecolor=colour if filled else "white",
                linewidth=1.4,
                elinewidth=0.8,
                capsize=2,
                label=NAMES.get(name, name),
            )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("ρ, protected share of a weight's directions", fontsize=8)
        axes.set_ylim(bottom=0.0)
        axes.grid(True, color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    grid[0].set_ylabel("share of plain fine-tuning's; lower is better", fontsize=8)
    handles = grid[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(lines) + 1, fontsize=8)
    first = rows[0]
    tokens = max(int(row["tokens"]) for row in rows if row["tokens"])
    count = first["threads"]
    threads = f"{count} thread{'' if count == '1' else 's'}"
    machine = first["gpu"] or f"{first['cpu']}, {threads}"
    figure.suptitle(
        "What a step of AdamW takes while a share ρ of each weight is protected, beside plain "
        "fine-tuning\n"
        f"{first['case'].partition(' ')[0]}, {first['matrices']} linear weights, {tokens:,} tokens "
        f"a step; {machine}; torch {first['torch']}; {first['date']}",
        fontsize=10,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
