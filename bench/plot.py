"""A picture of a results file: how many times faster than the formula as written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.contenders import COMPILED, HAND, NAIVE, OURS

COLOURS = {HAND: "#8da0b6", COMPILED: "#c9a66b", OURS: "#1b6ca8"}


SpeedUp = tuple[float, float, float]  # median, low, high


def speed_ups(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[str, SpeedUp]]:
    """case -> contender -> (median, low, high) of naive's median over the contender's times.

    low and high come from the contender's own 80th and 20th percentile. The last row of a
    (case, contender) counts. Contenders without a speed, and cases without naive, are absent.
    """
    times: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in rows:
        cases = times.setdefault(row["case"], {})
        if row["median_ms"]:
            cases[row["contender"]] = row
    found = {}
    for case, contenders in times.items():
        if NAIVE not in contenders:
            continue
        reference = float(contenders[NAIVE]["median_ms"])
        found[case] = {
            name: (
                reference / float(row["median_ms"]),
                reference / float(row["p80_ms"]),
                reference / float(row["p20_ms"]),
            )
            for name, row in contenders.items()
            if name != NAIVE
        }
    return found


def draw(rows: Sequence[Mapping[str, str]], picture: Path) -> None:
    """Grouped bars, one group a case, whiskers from the 20th to the 80th percentile.

    Raises ValueError where no row carries a speed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = speed_ups(rows)
    if not cases:
        raise ValueError("bench: nothing to plot: no case has both naive eager and another speed")
    present = {name for contenders in cases.values() for name in contenders}
    names = [name for name in COLOURS if name in present] + sorted(present - set(COLOURS))
    height = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(8.0, 0.8 + 0.85 * len(cases)), layout="constrained")
    labelled: set[str] = set()
    for offset, name in enumerate(names):
        for position, contenders in enumerate(cases.values()):
            if name not in contenders:
                continue
            median, low, high = contenders[name]
            y = position + (offset - (len(names) - 1) / 2) * height
            axes.barh(
                y,
                median,
                height,
                color=COLOURS.get(name, "#6b9e78"),
                xerr=[[max(0.0, median - low)], [max(0.0, high - median)]],
                error_kw={"elinewidth": 0.8, "capsize": 2},
                label="_" if name in labelled else name,
            )
            labelled.add(name)
            axes.annotate(
                f"{median:.1f}",
                (max(median, high), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the formula as written in eager torch")
    axes.spines[["top", "right"]].set_visible(False)
    # Below the axes: which corner of them has no bar depends on the rows.
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=len(names))
    first = rows[0]
    machine = first["gpu"] or f"{first['cpu']}, {first['threads']} threads"
    axes.set_title(f"{machine}; torch {first['torch']}; {first['date']}", fontsize=8, loc="left")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    plt.close(figure)
