"""The refresh in a picture: what is missing of the subspace, against the time it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.contenders import OURS
from bench.decompositions import GRAM, LOWRANK, SVD

FLOOR = 1e-8  # of 1 − overlap: a float32 subspace is no better than this
# Okabe and Ito's colours, told apart by every kind of colour vision; ours are the filled markers.
STYLES: dict[str, tuple[str, str, bool]] = {  # family -> colour, marker, filled
    f"{OURS} auto": ("#0072B2", "o", True),
    f"{OURS} randomized": ("#56B4E9", "s", True),
    f"{OURS} gram": ("#009E73", "^", True),
    LOWRANK: ("#D55E00", "D", False),
    GRAM: ("#CC79A7", "^", False),
    SVD: ("#555555", "v", False),
}
NAMES = {
    f"{OURS} auto": "auto",
    f"{OURS} randomized": "randomized",
    f"{OURS} gram": "gram",
    LOWRANK: "svd_lowrank",
    GRAM: "by hand",
    SVD: "linalg.svd",
}
LABEL_POINTS = 6.0  # font size
# Where a label may stand beside its point, in points; the first that covers no other is taken.
PLACES = [
    (5, -2),
    (5, 5),
    (5, -9),
    (-5, -2),
    (-5, 5),
    (-5, -9),
    (5, 12),
    (-5, 12),
    (5, 19),
    (5, 26),
]

Point = tuple[float, float, str]  # ms, 1 − overlap, setting


def families(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], dict[str, list[Point]]]:
    """(source, rank) -> family -> its points by time, of cold starts at a ρ that have a speed.

    Where several cases share source and rank, those of the first.
    """
    found: dict[tuple[str, str], dict[str, list[Point]]] = {}
    cases: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["task"] != "cold" or not row["median_ms"] or not row["rank"].startswith("rho="):
            continue
        key = row["source"], row["rank"]
        if cases.setdefault(key, row["case"]) != row["case"]:
            continue
        missing = max(FLOOR, float(row["missing_overlap"]))
        point = (float(row["median_ms"]), missing, row["setting"])
        found.setdefault(key, {}).setdefault(row["family"], []).append(point)
    for panel in found.values():
        for points in panel.values():
            points.sort()
    return found


def draw(rows: Sequence[Mapping[str, str]], picture: Path) -> None:
    """Small multiples, a row a spectrum and a column a ρ; lower and further left is better.

    Raises ValueError where no row has both a time and an overlap.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    panels = families(rows)
    if not panels:
        raise ValueError("bench: nothing to plot: no cold case with a time and an overlap")
    sources = list(dict.fromkeys(source for source, _ in panels))
    ranks = sorted({rank for _, rank in panels}, key=lambda rank: float(rank.partition("=")[2]))
    figure, grid = plt.subplots(
        len(sources),
        len(ranks),
        figsize=(0.8 + 2.5 * len(ranks), 1.3 + 2.1 * len(sources)),
        sharex="row",
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for i, source in enumerate(sources):
        for j, rank in enumerate(ranks):
            axes = grid[i][j]
            panel = panels.get((source, rank), {})
            for family, points in panel.items():
                colour, marker, filled = STYLES.get(family, ("#888888", "x", True))
                times, missing = [p[0] for p in points], [p[1] for p in points]
                axes.plot(
                    times,
                    missing,
                    color=colour,
                    marker=marker,
                    markersize=7 if family == f"{OURS} auto" else 5,
                    markerfacecolor=colour if filled else "white",
                    linewidth=1.0,
                    zorder=3 if family.startswith(OURS) else 2,
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(FLOOR / 2, 50.0)
            axes.margins(x=0.2)
            axes.grid(True, which="major", color="#dddddd", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=7)
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
            if i == 0:
                axes.set_title(f"ρ = {rank.removeprefix('rho=')}", fontsize=9)
            if j == 0:
                axes.set_ylabel(f"{source}\n1 − overlap", fontsize=9)
            if i == len(sources) - 1:
                axes.set_xlabel("ms", fontsize=8)
    first = rows[0]
    machine = first["gpu"] or f"{first['cpu']}, {first['threads']} threads"
    figure.suptitle(
        "What is missing of the top-r subspace against the time to find it: lower left is better.\n"
        "Filled: truncated_svd by method; open: torch, with niter of svd_lowrank.\n"
        f"{machine}; torch {first['torch']}; {first['date']}",
        fontsize=9,
    )
    figure.draw_without_rendering()  # lays out: labels are placed by where points have come to lie
    for (source, rank), panel in panels.items():
        _label(grid[sources.index(source)][ranks.index(rank)], panel, figure.dpi)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


Box = tuple[float, float, float, float]  # left, bottom, right, top, in points


def _label(axes: Any, panel: Mapping[str, Sequence[Point]], dpi: float) -> None:
    """A family's name beside its fastest point, and svd_lowrank's iterations beside each."""
    wanted = []
    for family, points in panel.items():
        name = NAMES.get(family, family)
        for i, (ms, missing, setting) in enumerate(points):
            niter = setting.removeprefix("niter=") if family == LOWRANK else ""
            text = f"{name} {niter}".strip() if i == 0 else niter
            if text:
                wanted.append((ms, missing, text, STYLES.get(family, ("#888888",))[0]))
    centres = [
        tuple(axes.transData.transform((ms, missing)) * 72 / dpi)
        for points in panel.values()
        for ms, missing, _ in points
    ]
    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in centres]
    frame = axes.get_window_extent()
    far = 1e6
    taken += [  # beside and below the panel
        (-far, -far, frame.x0 * 72 / dpi, far),
        (frame.x1 * 72 / dpi, -far, far, far),
        (-far, -far, far, frame.y0 * 72 / dpi),
    ]
    for ms, missing, text, colour in wanted:
        x, y = axes.transData.transform((ms, missing)) * 72 / dpi
        place, box = _free_place(x, y, 0.55 * LABEL_POINTS * len(text), taken)
        taken.append(box)
        axes.annotate(
            text,
            (ms, missing),
            xytext=place,
            textcoords="offset points",
            ha="left" if place[0] > 0 else "right",
            fontsize=LABEL_POINTS,
            color=colour,
        )


def _free_place(
    x: float, y: float, width: float, taken: Sequence[Box]
) -> tuple[tuple[int, int], Box]:
    """The first of PLACES whose label covers nothing, else the last."""
    place, box = PLACES[0], (x, y, x, y)
    for place in PLACES:
        left = x + place[0] - (width if place[0] < 0 else 0.0)
        bottom = y + place[1] - 1.0
        box = (left, bottom, left + width, bottom + LABEL_POINTS)
        if not any(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
            for other in taken
        ):
            break
    return place, box
