"""The forms of the projection: one table of what each multiplies, in which order, and why.

Two kinds of jobs compute all of them (``backends/jobs.py``): one reduces a matrix to coefficients,
one adds products of a basis and a coefficient. With E = U Uᵀ and F = V Vᵀ of the columns a caller
passed, whatever they span, the result is beta·g + alpha·X:

==============  ================================  ===================================
form            X                                 calls
==============  ================================  ===================================
left / right    E g  /  g F                       A | U A   /   B | B Vᵀ
dual            E g + g F − E g F                 A, B | C = A V | B −= U C | U A + B Vᵀ
sequential      the same, one side at a time      A | g −= U A | B | g −= B Vᵀ
dual in turn    the same, where g is kept         A | g − U A | B | g − (… − B Vᵀ)
mixed, left     E g (I − F)                       A | C = A V | A −= C Vᵀ | U A
mixed, right    (I − E) g F                       B | C = Uᵀ B | B −= U C | B Vᵀ
inner, left     E g F                             A | C = A V | A = C Vᵀ | U A
inner, right    E g F                             B | C = Uᵀ B | B = U C | B Vᵀ
mixed in turn   (I − E) g F                       A | g − U A | B | B Vᵀ
inner in turn   E g F                             A | U A | B | B Vᵀ
==============  ================================  ===================================

The forms in turn keep one side's result in a matrix like g, which errs least where both sides hold
most of g. Pure Python, no tensors.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Name = Literal[
    "identity",
    "zero",
    "left",
    "right",
    "dual",
    "sequential",
    "dual in turn",
    "mixed",
    "inner",
    "mixed in turn",
    "inner in turn",
]
First = Literal["left", "right"]


class Reduce(NamedTuple):
    """The coefficients A = Uᵀ x and B = x V of a matrix, or C = A V or Uᵀ B of a coefficient.

    Operands are letters: x is the matrix that is projected, y the result, w one that is kept beside
    them.
    """

    of: str
    into: str

    @property
    def multiplied(self) -> tuple[str, str]:
        """The matrix on one side of the products, and the coefficients on the other."""
        return self.of, self.into

    def operands(self, beta: float) -> str:
        """What is read or written, the bases aside."""
        return self.of + self.into


class Expand(NamedTuple):
    """into = beta·of + alpha·(U A + B Vᵀ) + plus; of a coefficient, with U C or C Vᵀ.

    Attributes:
        by: the coefficients that are multiplied.
        alpha, beta: None for those of the step.
    """

    into: str
    of: str
    by: str
    alpha: float | None = None
    beta: float | None = None
    plus: str = ""

    @property
    def multiplied(self) -> tuple[str, str]:
        """The matrix on one side of the products, and the coefficients on the other."""
        return self.into, self.by

    def operands(self, beta: float) -> str:
        """What is read or written, the bases aside; ``beta``: of the step."""
        is_read = beta if self.beta is None else self.beta
        return self.into + (self.of if is_read else "") + self.by + self.plus


Call = Reduce | Expand


class Form(NamedTuple):
    """One way to compute the projection.

    Attributes:
        calls: of the two kernels, in order; with mixed and inner those that go left first.
        right_first: of these two, those that go right first.
        labels: what a person calls it, where beta is 0 and where it is 1.
        reasons: why it is taken, likewise.
    """

    calls: tuple[Call, ...] = ()
    right_first: tuple[Call, ...] = ()
    labels: tuple[str, str] = ("", "")
    reasons: tuple[str, str] = ("", "")


def _both(text: str) -> tuple[str, str]:
    return text, text


_ALONE = "one side only: two products"
_IN_TURN = _both("small, or float64: left, then right on all of g errs least")
_SEQUENTIAL = _both("FLOP-bound: one side after the other needs no r·k correction")
_SMALL = "both sides on the smaller block"

_A, _B, _B_OF_W = Reduce("x", "A"), Reduce("x", "B"), Reduce("w", "B")
_C_OF_A, _C_OF_B = Reduce("A", "C"), Reduce("B", "C")
_BY_A, _BY_B = Expand("y", "x", "A"), Expand("y", "x", "B")
_BY_AB = Expand("y", "x", "AB")
_A_LESS_C, _B_LESS_C = Expand("A", "A", "C", -1.0, 1.0), Expand("B", "B", "C", -1.0, 1.0)
_A_FROM_C, _B_FROM_C = Expand("A", "A", "C", 1.0, 0.0), Expand("B", "B", "C", 1.0, 0.0)
_X_LESS_A, _FROM_A = Expand("w", "x", "A", -1.0, 1.0), Expand("w", "x", "A", 1.0, 0.0)

FORMS: dict[Name, Form] = {
    "identity": Form(),
    "zero": Form(),
    "left": Form(
        (_A, _BY_A),
        labels=("one-sided (left, low)", "one-sided (left, high)"),
        reasons=(f"{_ALONE}; a low basis needs no subtraction", _ALONE),
    ),
    "right": Form(
        (_B, _BY_B),
        labels=("one-sided (right, low)", "one-sided (right, high)"),
        reasons=(f"{_ALONE}; a low basis needs no subtraction", _ALONE),
    ),
    "dual": Form(
        (Reduce("x", "AB"), _C_OF_A, _B_LESS_C, _BY_AB),
        labels=("dual of two low bases", "dual"),
        reasons=_both(
            "both coefficients of g as it is, one update: the extra r·k products cost less than "
            "two more passes over g"
        ),
    ),
    "sequential": Form(
        (
            *(_A, Expand("y", "x", "A", -1.0, 1.0)),
            *(Reduce("y", "B"), Expand("y", "y", "B", -1.0, 1.0)),
        ),
        labels=_both("sequential"),
        reasons=_SEQUENTIAL,
    ),
    "dual in turn": Form(
        (_A, _X_LESS_A, _B_OF_W, Expand("y", "w", "B", 1.0, -1.0, plus="x")),
        labels=_both("g less its sequential complement"),
        reasons=_SEQUENTIAL,
    ),
    "mixed": Form(
        (_A, _C_OF_A, _A_LESS_C, _BY_A),
        (_B, _C_OF_B, _B_LESS_C, _BY_B),
        labels=_both("mixed, {first} first"),
        reasons=_both("the low side goes first and shrinks what the high side works on"),
    ),
    "inner": Form(
        (_A, _C_OF_A, _A_FROM_C, _BY_A),
        (_B, _C_OF_B, _B_FROM_C, _BY_B),
        labels=("low/low, {first} first", "core, {first} first"),
        reasons=(f"{_SMALL}; nothing is subtracted", f"{_SMALL}, then one update"),
    ),
    "mixed in turn": Form(
        (_A, _X_LESS_A, _B_OF_W, _BY_B), labels=_both("mixed in turn"), reasons=_IN_TURN
    ),
    "inner in turn": Form(
        (_A, _FROM_A, _B_OF_W, _BY_B),
        labels=("low/low in turn", "core in turn"),
        reasons=_IN_TURN,
    ),
}


def calls_of(form: Name, first: First = "left") -> tuple[Call, ...]:
    """The calls of a form in order."""
    chosen = FORMS[form]
    return (first == "right" and chosen.right_first) or chosen.calls


def in_halves(calls: tuple[Call, ...], sides: str) -> tuple[Call, ...]:
    """The calls of ``coefficients`` and ``apply_`` together: the first knows no form and computes
    the coefficients of all ``sides``, the second takes C from A, which is the whole matrix's."""
    second = tuple(_C_OF_A if call == _C_OF_B else call for call in calls[1:])
    return (Reduce("x", sides), *second)


def matmuls(calls: tuple[Call, ...], joined: bool) -> int:
    """How many products the torch backend makes of them; ``joined``: as in ``plan.Step``."""
    return sum(1 if joined and call == _BY_AB else len(call.multiplied[1]) for call in calls)


def basis_of(coefficient: str, other: str) -> str:
    """The basis that makes a coefficient of a matrix and multiplies it: C's is that of A, V, or
    that of B, U."""
    return {"A": "U", "B": "V"}.get(coefficient) or {"A": "V", "B": "U"}[other]


class Work(NamedTuple):
    """What the calls of a form do.

    Attributes:
        flops: floating-point operations.
        passes: reads and writes of g, of the result and of what is kept beside them.
        bases, coefficients: elements of bases read, and of coefficients read and written.
        held: the most elements of coefficients, and of what is kept beside g, at one time.
    """

    flops: int
    passes: int
    bases: int
    coefficients: int
    held: int


def work(calls: tuple[Call, ...], beta: float, m: int, n: int, r: int, k: int) -> Work:
    """Counted from the calls, each operand once a call; ``beta``: of the step."""
    sizes = {"A": r * n, "B": m * k, "C": r * k, "w": m * n}
    widths, lengths = {"U": r, "V": k}, {"U": m, "V": n}
    flops = passes = bases = coefficients = held = 0
    made: set[str] = set()
    for i, call in enumerate(calls):
        matrix, factors = call.multiplied
        for factor in factors:
            basis = basis_of(factor, matrix)
            flops += 2 * sizes.get(matrix, m * n) * widths[basis]
            bases += widths[basis] * lengths[basis]
        touched = call.operands(beta)
        passes += sum(name in "xyw" for name in touched)
        coefficients += sum(sizes[name] for name in touched if name in "ABC")
        made.update(call.into)
        needed = {name for later in calls[i:] for name in later.operands(beta)}
        held = max(held, sum(sizes.get(name, 0) for name in made & needed))
    return Work(flops, passes, bases, coefficients, held)
