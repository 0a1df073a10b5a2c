"""The launches that the Triton backend plans for a list of projections, without any tensors.

The matrices have shapes and made-up addresses, but no memory. ``planned`` returns the tasks of each
launch (``traffic_tasks``), and ``traffic`` runs the tasks in a model of a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from bench.traffic_tasks import Tasks

# The workspace lies between these addresses. The matrices of a call lie above.
WORKSPACE_START = 1 << 20
WORKSPACE_END = 1 << 36


def planned(
    shapes: Sequence[tuple[int, int]],
    ranks: tuple[int | None, int | None],
    architecture: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    config: Any = None,
    limit: int | None = None,
) -> list[Tasks]:
    """The tasks of each launch of a list of in-place projections.

    Each matrix is projected onto the complement of bases of the ``ranks`` (r, k); None leaves a
    side out.

    Args:
        config: the config of every projection; None takes the configs that ship.
        limit: the most bytes of workspace; None takes the backend's own limit.
    """
    from osf_kernels import gpu
    from osf_kernels.backends import grouped
    from osf_kernels.backends.chains import Chain, chains_of
    from osf_kernels.backends.jobs import Problem
    from osf_kernels.backends.operands import WORKSPACE, Lie, Operand, Placed
    from osf_kernels.backends.triton import configs, groups, tasks
    from osf_kernels.backends.triton.views import dot_rule
    from osf_kernels.plan import Matrix, choose

    device = torch.device("meta")
    addresses = {WORKSPACE: WORKSPACE_START}
    numbers, free = itertools.count(1), WORKSPACE_END

    def operand(rows: int, columns: int) -> Operand:
        nonlocal free
        number = next(numbers)
        addresses[number] = free
        free += -(-rows * columns * dtype.itemsize // 512) * 512
        lie = Lie((rows, columns), (columns, 1), dtype, 0, is_padded=False)
        return Operand.lying(lie, device, number)

    def choose_config(
        chain: Chain, math: configs.Math, rank: int, aligned: bool
    ) -> configs.Projection:
        return config or configs.projection_config(architecture, math, rank, aligned)

    room = gpu.room_in_l2(architecture)
    r, k = ranks
    name = str(dtype).removeprefix("torch.")
    chains = []
    coefficient, _ = dot_rule(dtype, (dtype,), (torch.float32,), "tf32x3")
    for m, n in shapes:
        x = operand(m, n)
        U = None if r is None else operand(m, r)
        V = None if k is None else operand(n, k)
        step = choose(Matrix(m, n, r, k, dtype=name, basis_dtype=name), "complement", "cuda", True)
        problem = Problem(x, x, U, V, step)
        chains += [
            groups.plan_chain(chain, arena, "tf32x3", choose_config)
            for chain, arena in chains_of(problem, coefficient, room / 4)
        ]
    launches, _ = tasks.projection_launches(
        chains,
        fill=configs.FILL[architecture],
        room=room,
        limit=limit or grouped.WORKSPACE_BYTES,
    )

    def placed(number: int) -> int:
        base = addresses[number.argument] if isinstance(number, Placed) else 0
        return base + int(number)

    return [Tasks(each, list(map(placed, each.metadata))) for each in launches]
