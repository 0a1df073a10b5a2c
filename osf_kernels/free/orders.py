"""In which order the gradient of C is computed, what that costs and why: no tensors.

Of y = x Wᵀ with W = W₀ + U_l C V_lᵀ the gradient of C is U_lᵀ g V_l, where g = (∂L/∂y)ᵀ x is the
weight's own gradient, a product over all T tokens. Either basis may be applied to g, which has m n
entries, or beforehand to ∂L/∂y or x, of which each token has a row. Source of the costs: counted,
2 a b c FLOPs a product of (a, b) and (b, c).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from osf_kernels.errors import TypeRefusal, ValueRefusal

Order = Literal["dense", "right", "left", "both"]
Held = Literal["columns", "reflector", "everything"]

LABELS: dict[Order, str] = {
    "dense": "no basis first",
    "right": "V_l on the inputs first",
    "left": "U_l on the outputs' gradients first",
    "both": "both bases first",
}


class Side(NamedTuple):
    """A free basis (n, q), and how it is held; of :meth:`of` where there are no tensors."""

    size: int
    width: int
    held: Held

    @classmethod
    def of(cls, size: int, protected: int) -> Side:
        """Of a side of which so many directions are protected, held by whatever is smaller."""
        if not protected:
            return cls(size, size, "everything")
        free = size - protected
        held = (cls(size, free, "columns"), cls(size, free, "reflector"))
        return min(held, key=lambda side: side.elements)

    @property
    def flops(self) -> int:
        """Of one row that the basis is applied to."""
        n, q = self.size, self.width
        if self.held == "everything":
            return 0
        if self.held == "columns":
            return 2 * n * q
        k = n - q
        return 2 * k * (n + k + q)

    @property
    def elements(self) -> int:
        """Of what is held."""
        if self.held == "everything":
            return 0
        if self.held == "columns":
            return self.size * self.width
        k = self.size - self.width
        return k * (self.size + k)


@dataclass(frozen=True, slots=True)
class FreePlan:
    """How the gradient of C (p, q) is computed. ``print`` it.

    Attributes:
        order: which basis is applied before the product over tokens: "dense" none, "right" V_l,
            "left" U_l, "both".
        flops: of the gradient of C.
        plain_flops: of the weight's own gradient, 2 T m n.
        reduce_flops: of U_lᵀ g V_l for a dense g.
        merge_flops: of W += U_l C V_lᵀ, once a step.
        why: in words.
    """

    tokens: int
    left: Side
    right: Side
    order: Order
    flops: int
    plain_flops: int
    reduce_flops: int
    merge_flops: int
    why: str

    def kept_of(self, *, transposed: bool = False) -> int:
        """Elements that the backward pass needs of each token: q where V_l is applied to x in the
        forward pass, else n. Of a weight held as (inputs, outputs) it is U_l, and p or m.
        """
        side, first = (self.left, "left") if transposed else (self.right, "right")
        return side.width if self.order in (first, "both") else side.size

    @property
    def kept(self) -> int:
        """``kept_of()``."""
        return self.kept_of()

    @property
    def step_share(self) -> float:
        """FLOPs of a training step's products over those of plain training, merging included."""
        others = 2 * self.plain_flops  # the outputs, and the gradient of x
        return (others + self.flops + self.merge_flops) / max(1, others + self.plain_flops)

    def __str__(self) -> str:
        m, n = self.left.size, self.right.size
        return (
            f"{m}×{n}, free {self.left.width}×{self.right.width}, {self.tokens} tokens: a step "
            f"takes {self.step_share:.2f} of plain training's products, merging included; "
            f"{self.why}; {self.kept} of {n} numbers a token are kept for the backward pass"
        )


def reduce_flops(left: Side, right: Side) -> tuple[int, bool]:
    """The fewest FLOPs of U_lᵀ g V_l for a dense g, and whether V_l goes first."""
    m, n = left.size, right.size
    right_first = m * right.flops + right.width * left.flops
    left_first = n * left.flops + left.width * right.flops
    return min(right_first, left_first), right_first <= left_first


@lru_cache(maxsize=4096)
def plan_free(tokens: int, left: Side, right: Side) -> FreePlan:
    """The order with the fewest FLOPs for a weight whose sides have these free bases.

    Args:
        tokens: T, the rows of x, at least 0.
        left, right: of the m rows and of the n columns of the weight.

    Returns:
        A FreePlan. Of equal costs the first of dense, right, left, both.

    Raises:
        ValueError: tokens below 0.
        TypeError: tokens isn't an int.
    """
    if isinstance(tokens, bool) or not hasattr(tokens, "__index__"):
        raise TypeRefusal.of("plan_free", "tokens", "an int", repr(tokens))
    if tokens < 0:
        raise ValueRefusal.of("plan_free", "tokens", "at least 0", tokens)
    m, n, p, q = left.size, right.size, left.width, right.width
    plain = 2 * tokens * m * n
    reduced, _ = reduce_flops(left, right)
    costs: dict[Order, int] = {
        "dense": plain + reduced,
        "right": tokens * right.flops + 2 * tokens * m * q + q * left.flops,
        "left": tokens * left.flops + 2 * tokens * p * n + p * right.flops,
        "both": tokens * (left.flops + right.flops) + 2 * tokens * p * q,
    }
    order = min(costs, key=lambda name: costs[name])
    shares = {name: f"{LABELS[name]} {costs[name] / max(1, plain):.2f}" for name in costs}
    others = ", ".join(shares[name] for name in costs if name != order)
    return FreePlan(
        tokens,
        left,
        right,
        order,
        costs[order],
        plain,
        reduced,
        min(p * right.flops + n * left.flops, q * left.flops + m * right.flops),
        f"its gradient {shares[order]} of the plain one's ({others})",
    )
