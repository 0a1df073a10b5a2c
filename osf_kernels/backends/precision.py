"""float32 products in float32, whatever the process lets torch's matmuls round to.

``torch.set_float32_matmul_precision`` and the ``fp32_precision`` of torch's backends let a GPU or
oneDNN on a CPU round operands to TF32 or bfloat16. That is fine for activations, but a projected
gradient would keep 1e-3 of what it is rid of, and bases would be orthonormal to 1e-3. Autocast
does the same to a thread's matmuls.

May import: torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_autocast = torch._C._is_any_autocast_enabled
_precision = torch._C._get_fp32_precision_getter
_set_precision = torch._C._set_fp32_precision_setter

# Of the libraries that this build of torch multiplies float32 with: each reading takes 0.1 µs.
_ON_GPU = torch.version.cuda is not None or torch.version.hip is not None
_SETTINGS = (("mkldnn", "matmul"), ("cuda", "matmul")) if _ON_GPU else (("mkldnn", "matmul"),)
_LOWERED = frozenset(("tf32", "bf16"))

# The settings are the process's: who comes first raises them and who leaves last puts them back.
_lock = threading.Lock()
_inside = 0
_found: dict[tuple[str, str], str] = {}
_turns = 0  # odd from before the settings are raised until after they are put back


def lowered() -> bool:
    """Whether products made now need :func:`full_precision` to be float32.

    Also while another thread is inside of it, and may put lowered settings back at any time.
    """
    turns = _turns
    if turns & 1 or _autocast() or _precision("mkldnn", "matmul") in _LOWERED:
        return True
    if _ON_GPU and _precision("cuda", "matmul") in _LOWERED:
        return True
    return turns != _turns


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Has torch multiply float32 as float32.

    Other threads see the raised settings until the last call that needs them has returned.
    """
    if not lowered():
        yield
    elif _autocast():
        with torch._C._DisableAutocast(), full_precision():
            yield
    else:
        _raise()
        try:
            yield
        finally:
            _put_back()


def _raise() -> None:
    global _inside, _turns
    with _lock:
        if not _inside:
            _turns += 1
        _inside += 1
        for setting in _SETTINGS:
            precision = _precision(*setting)
            if precision in _LOWERED:
                _found[setting] = precision
                _set_precision(*setting, "ieee")


def _put_back() -> None:
    global _inside, _turns
    with _lock:
        _inside -= 1
        if _inside:
            return
        for setting, precision in _found.items():
            if _precision(*setting) != "ieee":
                continue  # somebody has set it meanwhile, and means it
            _set_precision(*setting, "none")  # as inherited from the whole backend's or torch's
            if _precision(*setting) != precision:
                _set_precision(*setting, precision)
        _found.clear()
        _turns += 1
