"""The methods of truncated_svd, one file each.

A method has three functions of a :class:`Group`:

* ``run(group, safe=...)`` gives its :class:`Factors`. ``safe`` asks for factorizations that hold
  for any spectrum, where the fast ones reported that they broke down.
* ``workspace_bytes(group, safe=...)`` is an upper estimate of what that allocates for one matrix.
* ``factors_bytes(group)`` is what the factors of one matrix, and what they are views of, take.

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

    Iterative ones of float64 matrices always run with ``safe``: the fast way makes up for the Gram
    matrices of float32 numbers by having them in float64, which of float64 numbers is no gain.
    """
    if group.dtype == torch.float64 and method in ("randomized", "warm"):
        safe = True
    found: Factors = _MODULES[method].run(group, safe=safe)
    return found


def workspace_bytes(method: Method, group: Group, *, safe: bool = False) -> int:
    """An upper estimate of all that one matrix takes beside its results until they are finished."""
    module = _MODULES[method]
    working = module.workspace_bytes(group, safe=safe)
    return group.whole_bytes(working, module.factors_bytes(group))


def held_bytes(method: Method, group: Group) -> int:
    """The part of that which stays while some of a group are decomposed again with ``safe``."""
    return group.held_bytes(_MODULES[method].factors_bytes(group))
