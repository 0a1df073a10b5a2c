"""What is computed with a free block: its coordinates, its gradient, adding it to the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osf_kernels.cpu import WHOLE_VECTORS
from osf_kernels.errors import ValueRefusal
from osf_kernels.free.basis import FreeBasis
from osf_kernels.free.orders import Order, plan_free, reduce_flops


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
        (..., p, q) of x's dtype. Mutates nothing; doesn't synchronise; draws no random numbers.
    """
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
        (..., m, n) of C's dtype. Mutates nothing; doesn't synchronise; draws no random numbers.
    """
    p, q = left.width, right.width
    m, n = (
        side.size if part is None else part.stop - part.start
        for side, part in ((left, rows), (right, columns))
    )
    # Of each side as much as its part takes, so that the smaller part goes first.
    left_flops = left.side.flops * m / left.size
    right_flops = right.side.flops * n / right.size
    if p * right_flops + n * left_flops <= q * left_flops + m * right_flops:
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
        ValueError: lists of other lengths, sizes that don't fit; nothing is written.

    A weight of half precision is not taken: what is added a step is below its rounding. Form
    W₀ + U_l C V_lᵀ from one W₀ every time (``free_matrix``), and round that. Doesn't synchronise;
    draws no random numbers.
    """
    counts = [len(weights), len(blocks), len(lefts), len(rights)]
    if len(set(counts)) > 1:
        raise ValueRefusal.of(
            "add_free_many_", "the lists", "of one length", ", ".join(map(str, counts))
        )
    for index, (W, C, left, right) in enumerate(zip(weights, blocks, lefts, rights, strict=True)):
        shape, wanted = (left.size, right.size), (left.width, right.width)
        if tuple(W.shape[-2:]) != shape:
            raise ValueRefusal.of(
                "add_free_many_", "weights", str(shape), tuple(W.shape), index=index
            )
        if tuple(C.shape[-2:]) != wanted:
            raise ValueRefusal.of(
                "add_free_many_", "blocks", str(wanted), tuple(C.shape), index=index
            )
        if W.dtype not in (torch.float32, torch.float64):
            raise ValueRefusal.of(
                "add_free_many_",
                "weights",
                "float32 or float64",
                W.dtype,
                "round the sum of a kept weight and free_matrix",
                index=index,
            )
    for W, C, left, right in zip(weights, blocks, lefts, rights, strict=True):
        _add_free_(W, C.to(W.dtype), left, right)


def _add_free_(W: Tensor, C: Tensor, left: FreeBasis, right: FreeBasis) -> None:
    """One weight: the last product is added to W where it lies, by a basis of columns."""
    p, q = left.width, right.width
    right_first = p * right.side.flops + right.size * left.side.flops
    left_first = q * left.side.flops + left.size * right.side.flops
    if right_first <= left_first:
        side, factor, target = left, right.expand(C), W
    else:
        side, factor, target = right, left.expand_rows(C).mT, W.mT
    if side.held == "everything":
        target += factor
    elif side.held == "columns":
        _addmm_(target, side.tensors[0], factor, 1.0)
    else:
        Y, N = side.tensors
        low = Y[..., -side.width :, :]
        target[..., -side.width :, :] += factor
        _addmm_(target, Y, N.to(factor.dtype) @ (low.mT.to(factor.dtype) @ factor), -1.0)


def _addmm_(target: Tensor, A: Tensor, B: Tensor, alpha: float) -> None:
    """target += alpha·A B."""
    A = A.to(target.dtype)
    if target.dim() == 2:
        target.addmm_(A, B, alpha=alpha)
    elif target.dim() == 3 and A.dim() == 3:
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
) -> Tensor:
    """The free block of a product over tokens, U_lᵀ (outputsᵀ inputs) V_l, in the cheapest order.

    With ``outputs`` the gradient of y = x Wᵀ and ``inputs`` its x that is the gradient of C in
    W = W₀ + U_l C V_lᵀ.

    Args:
        outputs: (T, m); (T, p) where its basis is applied already.
        inputs: (T, n); (T, q) where its basis is applied already.
        left, right: of the m rows and of the n columns of the weight.
        order: of ``plan_free``; None for the cheapest.
        left_reduced, right_reduced: whether that is so, as the order has it.

    Returns:
        (p, q) of the operands' dtype. Mutates nothing; doesn't synchronise; draws no random
        numbers.
    """
    chosen = plan_free(len(inputs), left.side, right.side).order if order is None else order
    if chosen == "dense" and not (left_reduced or right_reduced):
        return free_block(outputs.mT @ inputs, left, right)
    if chosen in ("right", "both") and not right_reduced:
        inputs, right_reduced = right.reduce(inputs), True
    if chosen in ("left", "both") and not left_reduced:
        outputs, left_reduced = left.reduce(outputs), True
    # What is left to do is done to the smaller product.
    if left_reduced:
        block = _over_tokens(outputs, inputs)
        return block if right_reduced else right.reduce(block)
    return left.reduce_rows(_over_tokens(outputs, inputs))


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b over the rows of both. On a CPU the larger of two even widths is of the result's rows,
    and an odd one before an even one."""
    m, n = a.shape[-1], b.shape[-1]
    if n % WHOLE_VECTORS:
        swapped = m % WHOLE_VECTORS == 0 or m < n
    else:
        swapped = m % WHOLE_VECTORS == 0 and m < n
    return (b.mT @ a).mT if swapped and a.device.type == "cpu" else a.mT @ b
