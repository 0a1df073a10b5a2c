"""The methods of truncated_svd, one file each.

A method has three functions of a :class:`Group`:

* ``run(group, safe=...)`` gives its :class:`Factors`. ``safe`` asks for factorizations that hold
  for any spectrum, after the fast ones reported that they broke down.
* ``workspace_bytes(group, safe=...)`` is an upper estimate of the bytes that ``run`` allocates for
  one matrix.
* ``factors_bytes(group)`` is the size of the factors of one matrix, and of the tensors that they
  are views of.

``randomized`` and ``warm`` build on ``krylov``, ``powers`` and ``subspace_iteration``, which take a
sketch; ``gram`` on ``steep``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch

from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.methods import deflated, exact, gram, randomized, warm

Method = Literal["auto", "randomized", "gram", "warm", "deflated", "exact"]
METHODS = get_args(Method)

_MODULES: dict[str, ModuleType] = {
    "randomized": randomized,
    "gram": gram,
    "warm": warm,
    "deflated": deflated,
    "exact": exact,
}


def run(method: Method, group: Group, safe: bool) -> Factors:
    """Factors of a group by a method.

    Iterative methods always run with ``safe`` for float64 matrices: their fast way relies on Gram
    matrices in a wider dtype.
    """
    if group.dtype == torch.float64 and method in ("randomized", "warm"):
        safe = True
    found: Factors = _MODULES[method].run(group, safe=safe)
    return found


def workspace_bytes(method: Method, group: Group, *, safe: bool = False) -> int:
    """An upper estimate of the bytes of one matrix, beside its results, until they are finished."""
    module = _MODULES[method]
    working = module.workspace_bytes(group, safe=safe)
    return group.whole_bytes(working, module.factors_bytes(group))


def held_bytes(method: Method, group: Group) -> int:
    """The bytes of one matrix that stay while others of its group are decomposed with ``safe``."""
    return group.held_bytes(_MODULES[method].factors_bytes(group))
