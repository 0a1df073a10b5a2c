"""What confining weights takes and saves, in tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from osf_kernels import FreeSide
from osf_torch.free.spec import Place
from osf_torch.subspaces import table

MOMENTS = 2  # of AdamW, each of the gradient's size


def table_of(places: Sequence[Place]) -> str:
    """A line a weight and one over all, in bytes that AdamW trains with, then the others' sums."""
    rows = [_row_of(place) for place in places]
    sums = [sum(figures) for figures in zip(*(figures for _, figures in rows), strict=True)]
    rows.append(((f"all {len(places)}", "", "", ""), sums))
    own = sum(sums[1:4])
    unit, size = ("MiB", 2**20) if own >= 2**20 else ("KiB", 2**10)

    def amount(count: float) -> str:
        return f"{count / size:,.1f}"

    header = (
        *("parameter", "shape", "protected", "free block", "trained"),
        *(f"{what} {unit}" for what in ("gradient", "state", "bases", "beside")),
    )
    lines = [(*words, f"{count:,}", *map(amount, rest)) for words, (count, *rest) in rows]
    shapes = [place.spec.matrix_shape for place in places]
    plain = 4 * (1 + MOMENTS) * sum(map(math.prod, shapes))
    osf = 4 * sum(_osf_elements(place.spec.matrix_shape, _rank_of(place)) for place in places)
    return "\n".join(
        (
            *table(header, lines),
            f"gradient, AdamW's state and bases: {amount(own)} {unit}; plain fine-tuning "
            f"{amount(plain)} {unit}, of gradient and state alone; PEFT's OSF {amount(osf)} "
            f"{unit}, its factors among them (all of float32)",
        )
    )


def _row_of(place: Place) -> tuple[tuple[str, ...], list[int]]:
    """The words of a line, and its figures: numbers that are trained, then bytes."""
    spec = place.spec
    gradient = sum(t.nbytes for t in place.trained())
    block = f"{spec.left.width}x{spec.right.width}"
    words = (
        place.name,
        "x".join(map(str, spec.matrix_shape)),
        "/".join(str(side.size - side.width) for side in (spec.left, spec.right)),
        block if spec.rank is None else f"{block}, rank {spec.rank}",
    )
    return words, [
        sum(t.numel() for t in place.trained()),
        gradient,
        MOMENTS * gradient,
        spec.left.nbytes + spec.right.nbytes,
        sum(t.nbytes for t in place.beside()) - gradient,
    ]


def _rank_of(place: Place) -> int:
    """How many triplets PEFT's OSF would hold of the weight."""
    protected = [side.size - side.width for side in (place.spec.left, place.spec.right)]
    return min(protected) or max(protected)


def _osf_elements(shape: Sequence[int], rank: int) -> int:
    """Numbers that PEFT's OSF (0.21) holds of a weight that it protects ``rank`` directions of,
    beside the weight: the low factors U, S, V, their gradient and two moments, what they began as,
    and the high factor of the longer side."""
    *lead, m, n = shape
    short, long = sorted((m, n))
    low = (m + n + 1) * (short - rank)
    return math.prod(lead) * ((3 + MOMENTS) * low + (rank * long if m != n else 0))


def factor_flops(left: FreeSide, right: FreeSide, rank: int, tokens: int) -> int:
    """Of U_l B and A V_lᵀ: both of them, their products with the tokens and all gradients."""
    return rank * (6 * tokens * (left.size + right.size) + 2 * (left.flops + right.flops))


def plans(places: Sequence[Place], tokens: int) -> str:
    """One line for each kind of weight, and one for all of them."""
    kinds: Counter[tuple[FreeSide, FreeSide, int | None]] = Counter()
    found: dict[tuple[FreeSide, FreeSide, int | None], str] = {}
    flops = plain = 0
    for place in places:
        spec = place.spec
        kind = spec.left.side, spec.right.side, spec.rank
        kinds[kind] += 1
        plan = spec.plan(tokens)
        plain += plan.plain_flops
        if spec.rank is None:
            flops += plan.flops + plan.merge_flops
            found[kind] = str(plan)
        else:
            own = factor_flops(kind[0], kind[1], spec.rank, tokens)
            flops += own
            found[kind] = (
                f"{kind[0].size}×{kind[1].size}, free {kind[0].width}×{kind[1].width}, rank "
                f"{spec.rank}, {tokens} tokens: as a LoRA beside the weight; "
                f"it and its gradient {own / max(1, plan.plain_flops):.2f} of the plain gradient"
            )
    lines = [f"{count:4d} × {found[kind]}" for kind, count in kinds.items()]
    share = (2 * plain + flops) / max(1, 3 * plain)
    lines.append(
        f"all {len(places)}: a step takes {share:.2f} of plain training's products, merging "
        "included"
    )
    return "\n".join(lines)
