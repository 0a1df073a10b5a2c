"""Estimate: what ``estimate`` found, and how it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from osf_torch.costs import Takes
from osf_torch.subspaces import table


@dataclass(frozen=True)
class Refreshing:
    """What ``refresh`` takes on the rank that has the most to do.

    Attributes:
        flops: of products of matrices.
        eigen_flops: of eigendecompositions, 9 n³ each.
        seconds: by the rates; None without one. A refresh takes longer than its products and
            eigendecompositions alone. Of SmolLM2's weights (576 wide, one core of a CPU): 1.7 times
            at ρ = .5, 2.0 times at .8, 7 times at .05, in narrow Krylov spaces.
        seconds_are_least: whether eigendecompositions are counted at the rate of products.
        gathered, sent: bytes of weights that ranks gather, and of bases that are broadcast.
    """

    flops: int
    eigen_flops: int
    seconds: float | None
    seconds_are_least: bool
    gathered: int
    sent: int


@dataclass(frozen=True)
class Estimate:
    """What training a model takes by each method; ``print`` it, or ``as_dict()``.

    Attributes:
        model: its class.
        tokens, world: a step and rank; how many ranks of FSDP2.
        architecture: that projections are planned for.
        weights: a line for each kind of weight: how many, shape, dtype, how it is quantized, rank,
            what is held of each side, the free block, the method of the refresh, the order of
            products and the form of the projection.
        bases: bytes that ``Subspaces.nbytes`` will be.
        methods: what each method takes of the selected weights, on a rank; of quantized ones
            "plain" is the model as it is, and C beside them the one way to train.
        others: weights, gradients and state of all other parameters, the same by every method.
        collectives: by method, collectives a step beside those that FSDP2 makes anyway.
        refresh: what the refresh takes.
        notes: what can't be confined, and what isn't counted.
    """

    model: str
    tokens: int
    world: int
    architecture: str
    weights: list[dict[str, Any]]
    bases: int
    methods: dict[str, Takes]
    others: Takes
    collectives: dict[str, int]
    refresh: Refreshing
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        found = asdict(self)
        for name, takes in self.methods.items():
            found["methods"][name]["bytes"] = takes.nbytes + self.others.nbytes
        return found

    def __str__(self) -> str:
        return "\n".join(_text(self))


# --- as text ---

ROWS = {
    "weights": "the weights",
    "block": "C, or B and A",
    "copies": "C merged, W0",
    "bases": "bases",
    "whole_bases": "bases as given, whole",
    "pinned": "pinned beside them",
    "gradient": "gradient",
    "state": "AdamW's state",
    "references": "what drift is measured by",
}
COLLECTIVES = {
    "gathered": "gathered",
    "scattered": "reduced and scattered",
    "reduced": "all-reduced",
}


def amount(count: float, step: int = 1024) -> str:
    """With one digit behind the point, in the largest unit of which there is one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB") if step == 1024 else ("", "k", "M", "G", "T", "P")
    power = 0
    while count >= step and power + 1 < len(units):
        count, power = count / step, power + 1
    return f"{count:,.{1 if power else 0}f} {units[power]}".rstrip()


def _text(found: Estimate) -> list[str]:
    where = f", on each of {found.world} ranks of FSDP2" if found.world > 1 else ""
    count = sum(one["count"] for one in found.weights)
    lines = [
        f"{found.model}: {count} weights, {found.tokens:,} tokens a step{where}; planned "
        f"for {found.architecture}",
        "",
    ]
    header = ("weights", "count", "dtype", "protected", "bases held", "free block", "refresh")
    rows = [
        (
            "x".join(map(str, one["shape"])),
            str(one["count"]),
            one["quantized"] or one["dtype"],
            str(one["rank"]),
            one["held"],
            "x".join(map(str, one["free"])),
            one["refresh"],
            one["order"],
            f"{one['form']} [{one['backend']}]",
        )
        for one in found.weights
    ]
    lines += table((*header, "gradient of C", "projection"), rows)
    lines += ["", *_sums(found), ""]
    lines += [*_tiles(found), *_of_refresh(found), *_said(found)]
    return [*lines, *(f"note: {note}" for note in found.notes)]


def _sums(found: Estimate) -> list[str]:
    methods = found.methods
    others = found.others.nbytes
    others_are = "trained as ever" if "protect" in methods else "as it is"
    rows = [
        (words, *(amount(getattr(takes, key)) for takes in methods.values()))
        for key, words in ROWS.items()
        if any(getattr(takes, key) for takes in methods.values())
    ]
    rows.append((f"everything else, {others_are}", *(amount(others) for _ in methods)))
    rows.append(("all of it", *(amount(t.nbytes + others) for t in methods.values())))
    rows.append(("inputs kept, at most", *(amount(t.inputs) for t in methods.values())))
    plain = max(1, methods["plain"].flops)
    rows.append(("FLOPs of a step", *(amount(t.flops, 1000) for t in methods.values())))
    rows.append(("times those of plain", *(f"{t.flops / plain:.2f}" for t in methods.values())))
    if found.world > 1:
        rows += [
            (f"{words} a step", *(amount(getattr(t, key)) for t in methods.values()))
            for key, words in COLLECTIVES.items()
        ]
        rows.append(
            ("collectives beside FSDP2's own", *(str(found.collectives[name]) for name in methods))
        )
    return table(("a rank takes", *methods), rows)


def _tiles(found: Estimate) -> list[str]:
    notes = dict.fromkeys(note for one in found.weights for note in one["tiles"])
    return [f"tiles of {found.architecture}, {note}" for note in notes]


def _of_refresh(found: Estimate) -> list[str]:
    r = found.refresh
    text = (
        f"refresh: {amount(r.flops, 1000)}FLOP of products and {amount(r.eigen_flops, 1000)}FLOP "
        f"of eigendecompositions{' on the rank with the most' if found.world > 1 else ''}"
    )
    if r.seconds is not None:
        least = "at least " if r.seconds_are_least else ""
        text += f", {least}{r.seconds:,.1f} s at the rate given or measured; a real refresh was "
        text += "measured to take 2 times as long, 7 times at a small rank of narrow weights"
    text += f"; it leaves {amount(found.bases)} of bases"
    if found.world > 1:
        text += f"; gathers {amount(r.gathered)} and broadcasts {amount(r.sent)}"
    return [text]


def _said(found: Estimate) -> list[str]:
    others = found.others.nbytes
    sizes = {name: takes.nbytes + others for name, takes in found.methods.items()}
    least = min((name for name in sizes if name != "plain"), key=lambda name: sizes[name])
    plain = max(1, sizes["plain"])
    base = "plain fine-tuning's" if "protect" in sizes else "the frozen model's"
    told = ", ".join(
        f"{name} {size / plain:.2f}" for name, size in sizes.items() if name != "plain"
    )
    return [f"of {base} bytes: {told}; {least} takes the least, {amount(sizes[least])}"]
