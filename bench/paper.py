"""``python -m bench paper``: what training Llama-3.1-8B takes on paper, without a tensor.

Counted are the linear weights of the blocks; attention, norms, embeddings and the head are the
same for all. Everything that is trained is held in float32, with its gradient and AdamW's two
moments, as mixed-precision training holds it; what is frozen is in bfloat16. FLOPs are of the
products of a step: the outputs, the gradient of what a layer reads, the gradients of what is
trained, and merging. The order of ``confine``'s products is the planner's, ``plan_free``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

from bench import report
from osf_kernels import FreeSide, plan_free

# (count in a block, m, n) of Llama-3.1-8B: q and o, k and v, gate and up, down.
BLOCK = ((2, 4096, 4096), (2, 1024, 4096), (2, 14336, 4096), (1, 4096, 14336))
BLOCKS = 32
LORA_RANK = 32
PEAK_TFLOPS, ATTAINED = 989.0, 0.4  # H100 SXM, dense bfloat16, by its data sheet; assumed
FULL, HALF = 4, 2  # bytes a number of float32 and of bfloat16
MOMENTS = 2  # of AdamW


@dataclass(frozen=True)
class Sum:
    """Bytes and FLOPs of one or of all weights.

    Attributes:
        weights: what layers run with and is there in plain inference too, in bfloat16.
        master: what is trained, in float32 (of plain training the weights' master copy).
        gradients, state: of what is trained, in float32.
        bases: bases and frozen factors, in bfloat16.
        copies: of confine the C that is merged, in float32, and W₀, in bfloat16.
        flops: of the products of a step.
    """

    weights: int
    master: int = 0
    gradients: int = 0
    state: int = 0
    bases: int = 0
    copies: int = 0
    flops: int = 0

    def __add__(self, other: Sum) -> Sum:
        return Sum(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: int) -> Sum:
        return Sum(*(getattr(self, f.name) * count for f in fields(self)))

    @property
    def bytes(self) -> int:
        held = self.weights + self.master + self.gradients + self.state
        return held + self.bases + self.copies


def trained(m: int, n: int, count: int, flops: int, bases: int = 0, copies: int = 0) -> Sum:
    """Of a weight (m, n) of which so many numbers are trained."""
    held = FULL * count
    return Sum(HALF * m * n, held, held, MOMENTS * held, bases, copies, flops)


def plain(m: int, n: int, tokens: int) -> Sum:
    return trained(m, n, m * n, 6 * tokens * m * n)


def plain_half(m: int, n: int, tokens: int) -> Sum:
    """All in bfloat16, without a master copy: the gradient and the moments too."""
    return Sum(HALF * m * n, 0, HALF * m * n, MOMENTS * HALF * m * n, flops=6 * tokens * m * n)


def lora(m: int, n: int, tokens: int) -> Sum:
    """Two products more forward, two in the gradient of x, two in those of A and B."""
    count = LORA_RANK * (m + n)
    return trained(m, n, count, tokens * (4 * m * n + 6 * count))


def confine(m: int, n: int, tokens: int, rho: float, *, merged: bool = True) -> Sum:
    """Free sides of the size that ``refresh`` at ρ leaves; W, merged, is rounded from W₀."""
    left, right = sides(m, n, rho)
    plan = plan_free(tokens, left, right)
    count = left.width * right.width
    bases = HALF * (left.elements + right.elements)
    # Merged once a step; beside the weight the sum is formed forward and anew backward.
    sums = plan.merge_flops * (1 if merged else 2)
    copies = FULL * count + HALF * m * n if merged else 0
    return trained(m, n, count, 2 * plan.plain_flops + plan.flops + sums, bases, copies)


def sides(m: int, n: int, rho: float) -> tuple[FreeSide, FreeSide]:
    protected = round(rho * min(m, n))
    return FreeSide.of(m, protected), FreeSide.of(n, protected)


def peft_osf(m: int, n: int, tokens: int, rho: float) -> Sum:
    """As of peft 0.21: W and the low factors it began with stay beside those that are trained, and
    the high one of the longer side; a layer adds two products of twice the low rank."""
    short, long = sorted((m, n))
    high = round(rho * short)
    low = short - high
    count = low * (m + n + 1)
    bases = HALF * (count + (high * long if m != n else 0))
    factors = 3 * 2 * tokens * 2 * low * (m + n)  # forward, of x and of both factors
    square, other = 4 * short * low * low, 4 * long * low * (low if m == n else high)
    return trained(m, n, count, 4 * tokens * m * n + factors + square + other, bases)


def methods(rhos: Sequence[float]) -> dict[str, Callable[[int, int, int], Sum]]:
    """Name -> what one weight takes at so many tokens."""
    found: dict[str, Callable[[int, int, int], Sum]] = {
        "plain fine-tuning": plain,
        "plain, all bfloat16": plain_half,
        f"LoRA, r = {LORA_RANK}": lora,
    }
    for rho in rhos:
        found |= {
            f"PEFT OSF, ρ = {rho:g}": partial(peft_osf, rho=rho),
            f"confine, ρ = {rho:g}": partial(confine, rho=rho),
            f"confine, beside, ρ = {rho:g}": partial(confine, rho=rho, merged=False),
        }
    return found


def total(of: Callable[[int, int, int], Sum], tokens: int) -> Sum:
    """Of all blocks."""
    found = Sum(0)
    for count, m, n in BLOCK:
        found += of(m, n, tokens).times(count * BLOCKS)
    return found


def table(tokens: int, rhos: Sequence[float]) -> str:
    sums = {name: total(of, tokens) for name, of in methods(rhos).items()}
    bare = sums["plain fine-tuning"]

    def gib(count: int) -> str:
        return f"{count / 2**30:.1f}"

    lines = [
        (
            name,
            gib(one.weights),
            gib(one.master),
            gib(one.gradients),
            gib(one.state),
            gib(one.bases),
            gib(one.copies),
            gib(one.bytes),
            f"{one.bytes / bare.bytes:.2f}",
            f"{one.flops / 1e12:.0f}",
            f"{one.flops / bare.flops:.2f}",
            f"{one.flops / (PEAK_TFLOPS * ATTAINED * 1e9):.0f}",
        )
        for name, one in sums.items()
    ]
    header = (
        *("GiB", "weights", "trained", "gradients", "state", "bases", "copies", "all", "x plain"),
        *("TFLOP", "x plain", "ms"),
    )
    return report.table(header, lines)


def run(arguments: argparse.Namespace) -> int:
    """Raises ValueError for tokens below 1 or a ρ outside (0, 1)."""
    tokens, rhos = arguments.tokens, arguments.rho
    if tokens < 1 or not rhos or not all(0.0 < rho < 1.0 for rho in rhos):
        raise ValueError("bench paper: expected --tokens of at least 1 and 0 < --rho < 1")
    matrices = sum(count for count, _, _ in BLOCK) * BLOCKS
    numbers = sum(count * m * n for count, m, n in BLOCK) * BLOCKS
    print(
        f"on paper: Llama-3.1-8B, {matrices} linear weights of {numbers / 1e9:.2f}e9 numbers, "
        f"{tokens:,} tokens a step, AdamW\n"
        "trained numbers, their gradients and moments in float32, in the second line in bfloat16; "
        "weights, bases and W₀ in bfloat16\n"
        f"ms: products alone on an H100 at {ATTAINED:.0%} of {PEAK_TFLOPS:.0f} TFLOP/s, an "
        "assumption; without attention, the optimizer's and the merging's traffic"
    )
    print(table(tokens, rhos))
    print("confine's order of products, by kind of weight:")
    for rho in rhos:
        for count, m, n in BLOCK:
            print(f"{count * BLOCKS:4d} × {plan_free(tokens, *sides(m, n, rho))}")
    return 0
