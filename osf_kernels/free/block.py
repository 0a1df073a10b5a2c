"""What is computed with a free block: its coordinates, its gradient, adding it to the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.backends.precision import full_precision
from osf_kernels.errors import TypeRefusal, ValueRefusal
from osf_kernels.free.basis import FreeBasis
from osf_kernels.free.orders import LABELS, Order, plan_free, reduce_flops


def free_block(
    x: Tensor,
    left: FreeBasis,
    right: FreeBasis,
    rows: slice | None = None,
    columns: slice | None = None,
) -> Tensor:
    """The coordinates of a matrix in the free block, U_lᵀ x V_l.

    Args:
        x: (..., m, n), a weight or its dense gradient; where ``rows`` or ``columns`` say so, these
            of it alone, of which the sum over all parts is the block.
        left, right: of its rows and of its columns.

    Returns:
        (..., p, q) of x's dtype.

    Raises:
        ValueError: sizes that don't fit.

    Products are made as the process has torch make them: a gradient may be rounded like the others.
    Mutates nothing; doesn't synchronise; draws no random numbers.
    """
    _require("free_block", "x", x, (_count(rows, left.size), _count(columns, right.size)))
    _, right_first = reduce_flops(left.side, right.side)
    if right_first:
        return left.reduce_rows(right.reduce(x, columns), rows)
    return right.reduce(left.reduce_rows(x, rows), columns)


def free_matrix(
    C: Tensor,
    left: FreeBasis,
    right: FreeBasis,
    rows: slice | None = None,
    columns: slice | None = None,
) -> Tensor:
    """The matrix whose coordinates are C, U_l C V_lᵀ; some of its rows and columns where said.

    Returns:
        (..., m, n) of C's dtype.

    Raises:
        ValueError: sizes that don't fit.

    Products of float32 are of float32, whatever the process lets torch round to, since what is
    rounded here would move what is protected. Mutates nothing; doesn't synchronise; draws no random
    numbers.
    """
    _require("free_matrix", "C", C, (left.width, right.width))
    with full_precision():
        if _right_first(left, right, rows, columns):
            return left.expand_rows(right.expand(C, columns), rows)
        return right.expand(left.expand_rows(C, rows), columns)


@torch.no_grad()
def add_free_many_(
    weights: Sequence[Tensor],
    blocks: Sequence[Tensor],
    lefts: Sequence[FreeBasis],
    rights: Sequence[FreeBasis],
) -> None:
    """W += U_l C V_lᵀ in place, for every weight of a list.

    Args:
        weights: (..., m, n) float32 or float64.
        blocks: C (..., p, q).
        lefts, rights: of the rows and of the columns of each.

    Raises:
        ValueError: lists of other lengths, sizes that don't fit.
        TypeError: a weight of half precision. What is added in a step is below its rounding: form
            W₀ + U_l C V_lᵀ from one W₀ every time (``free_matrix``), and round that.

    Refuses before anything is written. Products of float32 are of float32, whatever the process
    lets torch round to. Doesn't synchronise; draws no random numbers.
    """
    counts = [len(weights), len(blocks), len(lefts), len(rights)]
    if len(set(counts)) > 1:
        raise ValueRefusal.of(
            "add_free_many_", "the lists", "of one length", ", ".join(map(str, counts))
        )
    for index, (W, C, left, right) in enumerate(zip(weights, blocks, lefts, rights, strict=True)):
        _require("add_free_many_", "weights", W, (left.size, right.size), index)
        _require("add_free_many_", "blocks", C, (left.width, right.width), index)
        if W.dtype not in (torch.float32, torch.float64):
            raise TypeRefusal.of(
                "add_free_many_",
                "weights",
                "float32 or float64",
                W.dtype,
                "round the sum of a kept weight and free_matrix",
                index=index,
            )
    with full_precision():
        for W, C, left, right in zip(weights, blocks, lefts, rights, strict=True):
            _add_free_(W, C.to(W.dtype), left, right)


def _require(
    op: str, argument: str, t: Tensor, shape: tuple[int, int], index: int | None = None
) -> None:
    if t.dim() < 2 or tuple(t.shape[-2:]) != shape:
        expected = f"of {shape[0]} rows and {shape[1]} columns"
        raise ValueRefusal.of(op, argument, expected, tuple(t.shape), index=index)


def _count(part: slice | None, size: int) -> int:
    return size if part is None else part.stop - part.start


def _right_first(
    left: FreeBasis, right: FreeBasis, rows: slice | None = None, columns: slice | None = None
) -> bool:
    """Whether C V_lᵀ, and then U_l of that, takes fewer FLOPs than the other way round. A part of a
    side takes its share of them, so that the smaller part goes first."""
    m, n = _count(rows, left.size), _count(columns, right.size)
    of_left = left.side.flops * m / max(1, left.size)
    of_right = right.side.flops * n / max(1, right.size)
    right_first = left.width * of_right + n * of_left
    return right_first <= right.width * of_left + m * of_right


def _add_free_(W: Tensor, C: Tensor, left: FreeBasis, right: FreeBasis) -> None:
    """One weight: the last product is added to W where it lies."""
    if _right_first(left, right):
        side, factor, target = left, right.expand(C), W
    else:
        side, factor, target = right, left.expand_rows(C).mT, W.mT
    if side.held == "everything":
        target += factor
    elif side.held == "columns":
        _addmm_(target, side.tensors[0], factor, 1.0)
    else:
        Y, N = (part.to(factor.dtype) for part in side.tensors)
        low = slice(side.size - side.width, side.size)
        target[..., low, :] += factor
        _addmm_(target, Y, N @ (Y[..., low, :].mT @ factor), -1.0)


def _addmm_(target: Tensor, A: Tensor, B: Tensor, alpha: float) -> None:
    """target += alpha·A B."""
    A = A.to(target.dtype)
    if target.dim() == A.dim() == B.dim() == 2:
        target.addmm_(A, B, alpha=alpha)
    elif target.dim() == A.dim() == B.dim() == 3:
        target.baddbmm_(A, B, alpha=alpha)
    else:
        target += alpha * (A @ B)


def free_gradient(
    outputs: Tensor,
    inputs: Tensor,
    left: FreeBasis,
    right: FreeBasis,
    *,
    order: Order | None = None,
    left_reduced: bool = False,
    right_reduced: bool = False,
    finish: bool = True,
) -> Tensor:
    """The free block of a product over tokens, U_lᵀ (outputsᵀ inputs) V_l, in the cheapest order.

    With ``outputs`` the gradient of y = x Wᵀ and ``inputs`` its x that is the gradient of C in
    W = W₀ + U_l C V_lᵀ.

    Args:
        outputs: (T, m); (T, p) where its basis is applied already.
        inputs: (T, n); (T, q) where its basis is applied already.
        left, right: of the m rows and of the n columns of the weight.
        order: of ``plan_free``; None for the cheapest.
        left_reduced, right_reduced: whether that is so, whatever the order.
        finish: False leaves what is to be done with the product over tokens to the caller, who may
            have more of them to add: ``left.reduce_rows`` where V_l is applied to the inputs,
            ``right.reduce`` where U_l is to the outputs, ``free_block`` where neither is.

    Returns:
        (p, q) of the operands' dtype; without ``finish`` (m, q), (p, n), (m, n) or (p, q).

    Raises:
        ValueError: sizes that don't fit, an unknown order.

    Products are made as the process has torch make them, like those of other gradients. Mutates
    nothing; doesn't synchronise; draws no random numbers.
    """
    tokens = len(inputs)
    m, n = (
        side.width if reduced else side.size
        for side, reduced in ((left, left_reduced), (right, right_reduced))
    )
    _require("free_gradient", "outputs", outputs, (tokens, m))
    _require("free_gradient", "inputs", inputs, (tokens, n))
    chosen = plan_free(tokens, left.side, right.side).order if order is None else order
    if chosen not in LABELS:
        raise ValueRefusal.of("free_gradient", "order", f"one of {', '.join(LABELS)}", repr(order))
    if chosen in ("right", "both") and not right_reduced:
        inputs, right_reduced = right.reduce(inputs), True
    if chosen in ("left", "both") and not left_reduced:
        outputs, left_reduced = left.reduce(outputs), True
    product = _over_tokens(outputs, inputs)
    if not finish:
        return product
    # What is left to do is done to the smaller product.
    if left_reduced:
        return product if right_reduced else right.reduce(product)
    return left.reduce_rows(product) if right_reduced else free_block(product, left, right)


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b over the rows of both; on a CPU as (bᵀ a)ᵀ where that is faster, see ``cpu``."""
    swapped = a.device.type == "cpu" and cpu.is_faster_transposed(a.shape[-1], b.shape[-1])
    return (b.mT @ a).mT if swapped else a.mT @ b
