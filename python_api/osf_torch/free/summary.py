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
    header = (
        *("parameter", "shape", "protected", "free block", "trained"),
        *("gradient", "state", "bases", "beside"),
    )
    lines, sums = [], [0, 0, 0, 0, 0]
    plain, osf = 0, 0
    for place in places:
        spec = place.spec
        trained = sum(t.numel() for t in place.trained())
        gradient = sum(t.numel() * t.element_size() for t in place.trained())
        bases = spec.left.nbytes + spec.right.nbytes
        beside = sum(t.numel() * t.element_size() for t in place.beside()) - gradient
        figures = (trained, gradient, MOMENTS * gradient, bases, beside)
        sums = [total + figure for total, figure in zip(sums, figures, strict=True)]
        protected = [side.size - side.width for side in (spec.left, spec.right)]
        block = f"{spec.left.width}x{spec.right.width}"
        if spec.rank is not None:
            block += f", rank {spec.rank}"
        lines.append(
            (
                place.name,
                "x".join(map(str, spec.matrix_shape)),
                "/".join(map(str, protected)),
                block,
                f"{trained:,}",
                *map(_mib, figures[1:]),
            )
        )
        plain += math.prod(spec.matrix_shape)
        osf += _osf_elements(spec.matrix_shape, min(protected) or max(protected))
    lines.append((f"all {len(places)}", "", "", "", f"{sums[0]:,}", *map(_mib, sums[1:])))
    total = sum(sums[1:4])
    text = table(header, lines)
    text.append(
        f"gradient, AdamW's state and bases, MiB: {_mib(total)}; plain fine-tuning "
        f"{_mib(4 * (1 + MOMENTS) * plain)}, of gradient and state alone; PEFT's OSF "
        f"{_mib(4 * osf)}, its frozen factors among them (float32)"
    )
    return "\n".join(text)


def _osf_elements(shape: Sequence[int], rank: int) -> int:
    """Numbers that PEFT's OSF holds of a weight that it protects ``rank`` directions of, beside it:
    gradient and two moments of the low factors U, S, V, and the high ones, which are frozen."""
    *lead, m, n = shape
    short = min(m, n)
    low = (m + n + 1) * (short - rank)
    high = (m + n + 1) * rank
    return math.prod(lead) * ((1 + MOMENTS) * low + high + low)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def plans(places: Sequence[Place], tokens: int) -> str:
    """One line for each kind of weight, and one for all of them."""
    kinds: Counter[tuple[FreeSide, FreeSide]] = Counter()
    flops = plain = 0
    for place in places:
        kinds[place.spec.left.side, place.spec.right.side] += 1
        plan = place.spec.plan(tokens)
        flops += plan.flops + plan.merge_flops
        plain += plan.plain_flops
    lines = []
    for (left, right), count in kinds.items():
        found = next(
            p.spec.plan(tokens)
            for p in places
            if (p.spec.left.side, p.spec.right.side) == (left, right)
        )
        lines.append(f"{count:4d} × {found}")
    share = (2 * plain + flops) / max(1, 3 * plain)
    lines.append(
        f"all {len(places)}: {share:.2f} of the products of a plain training step, merging included"
    )
    return "\n".join(lines)
