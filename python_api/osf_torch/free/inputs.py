"""Which form of a layer's inputs is kept for the backward pass: x, or x V_l, which is narrower.

x V_l takes less memory only where nothing else keeps x. Two others may: the operator that made it,
if its own backward pass needs its result (attention, tanh), and other confined layers that read the
same x (queries, keys and values). What is found here decides about memory alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from osf_torch.free.spec import Spec

# Nodes whose result is their argument seen anew.
_VIEWS = ("View", "Reshape", "Transpose", "Permute", "T", "Squeeze", "Unsqueeze", "Alias", "Expand")
# The names under which nodes keep what they returned.
RESULTS = ("_saved_output", "_saved_result", "_saved_out")
_DEPTH = 8  # how many of them stand one after the other at most


class Inputs:
    """The inputs that the confined layers of a model have read one after the other."""

    def __init__(self) -> None:
        self._key: object = None
        self._together: list[tuple[Spec, int]] = []
        self._before: dict[int, list[tuple[Spec, int]]] = {}

    def width_of(self, spec: Spec, x: Tensor, transposed: bool) -> int:
        """The columns of x V_l of all layers that read this x, as of the last forward pass; of this
        layer alone where there was none."""
        width = (spec.left if transposed else spec.right).width
        key = x.data_ptr(), x._version, x.shape
        if key != self._key:
            self._key, self._together = key, []
        known = self._before.get(spec.handle)
        self._together.append((spec, width))
        self._before[spec.handle] = self._together
        if known is None:
            return width
        return sum({one.handle: columns for one, columns in known}.values())


def is_kept(x: Tensor) -> bool:
    """Whether the operator that made x keeps it for its backward pass."""
    node: Any = x.grad_fn
    for _ in range(_DEPTH):
        if node is None:
            return False
        if not node.name().startswith(_VIEWS):
            break
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None:
        return False
    place = x.untyped_storage().data_ptr()
    results = (getattr(node, name, None) for name in RESULTS)
    return any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == place for t in results)
