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
        f"{_mib(4 * osf)}, its factors among them (all of float32)"
    )
    return "\n".join(text)


def _osf_elements(shape: Sequence[int], rank: int) -> int:
    """Numbers that PEFT's OSF (0.21) holds of a weight that it protects ``rank`` directions of,
    beside the weight: the low factors U, S, V, their gradient and two moments, what they began as,
    and the high factor of the longer side."""
    *lead, m, n = shape
    short, long = sorted((m, n))
    low = (m + n + 1) * (short - rank)
    return math.prod(lead) * ((3 + MOMENTS) * low + (rank * long if m != n else 0))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _factor_flops(left: FreeSide, right: FreeSide, rank: int, tokens: int) -> int:
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
            own = _factor_flops(kind[0], kind[1], spec.rank, tokens)
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
