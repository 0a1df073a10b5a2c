"""Which form of a layer's inputs is kept for the backward pass: x, or x V_l, which is narrower.

x V_l takes less memory only where nothing else keeps x. Two others may: the operator that made it,
if its own backward pass needs its result (attention, tanh), and other confined layers that read the
same x (queries, keys and values). What is found here decides about memory alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from osf_torch.free.spec import Spec

# Nodes whose result is their argument seen anew, by what comes before "Backward".
_VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Alias", "Expand"}
_VIEWS |= {"Squeeze", "Unsqueeze"}
# The names under which nodes keep what they returned, as they hold it: not unpacked by hooks.
RESULTS = ("_raw_saved_output", "_raw_saved_result", "_raw_saved_out")
_DEPTH = 8  # how many of them stand one after the other at most


class Inputs:
    """The inputs that the confined layers of a model have read one after the other."""

    def __init__(self) -> None:
        self._key: object = None
        # Of the layers that read one input: the columns of x V_l, by a layer's handle.
        self._together: dict[int, int] = {}
        self._before: dict[int, dict[int, int]] = {}

    def width_of(self, spec: Spec, x: Tensor, transposed: bool) -> int:
        """The columns of x V_l of all layers that read this x, as of the last forward pass; of this
        layer alone where there was none."""
        width = (spec.left if transposed else spec.right).width
        key = x.data_ptr(), x._version, x.shape
        if key != self._key:
            self._key, self._together = key, {}
        known = self._before.get(spec.handle)
        self._together[spec.handle] = width
        self._before[spec.handle] = self._together
        return width if known is None else sum(known.values())


def is_packed() -> bool:
    """Whether something packs what is saved for the backward pass, as recomputing and offloading
    do.

    What a layer saves must then depend on its arguments alone: recomputed it has to be the same.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_kept(x: Tensor) -> bool:
    """Whether the operator that made x keeps it for its backward pass."""
    node: Any = x.grad_fn
    for _ in range(_DEPTH):
        if node is None:
            return False
        if node.name().partition("Backward")[0] not in _VIEWS:
            break
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None:
        return False
    place = x.untyped_storage().data_ptr()
    return any(_holds(getattr(node, name, None), place) for name in RESULTS)


def _holds(saved: Any, place: int) -> bool:
    """Whether a SavedTensor is memory at this place; not one that hooks have packed, or that was
    let go of."""
    t = getattr(saved, "data", None)
    if not isinstance(t, Tensor) or getattr(saved, "unpack_hook", None) is not None:
        return False
    return t.untyped_storage().data_ptr() == place
