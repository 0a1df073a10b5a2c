"""Arguments that several operators take, refused before anything runs where they can't be meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral

from torch import Tensor


def require_batches(batches: object, operator: str) -> None:
    """Refuses what holds no batches, and one batch by itself, whose rows, keys or characters would
    be taken for batches.

    Args:
        operator: with its package, as ``osf_torch.input_subspaces``.

    Raises:
        TypeError: a tensor, mapping or text; what can't be iterated over.
    """
    what = "expected batches to be a list, data loader or other iterable of batches, got"
    if isinstance(batches, Tensor | Mapping | str | bytes):
        raise TypeError(
            f"{operator}: {what} one {type(batches).__name__}; a single batch is [batch]"
        )
    if not (isinstance(batches, Iterable) or hasattr(type(batches), "__getitem__")):
        raise TypeError(f"{operator}: {what} {type(batches).__name__}; a single batch is [batch]")


def require_count(name: str, value: object, operator: str) -> None:
    """Refuses what is no int of at least 1, by the argument's name.

    Raises:
        TypeError: no int.
        ValueError: below 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{operator}: expected {name} to be an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{operator}: expected {name} to be at least 1, got {value}")


def require_forward(forward: object, operator: str) -> None:
    """Refuses what can't be called.

    Raises:
        TypeError: it can't.
    """
    if forward is not None and not callable(forward):
        raise TypeError(
            f"{operator}: expected forward to be a function of model and batch, got {forward!r}; "
            "such as lambda model, batch: model(batch[0])"
        )


def require_show(progress: object, operator: str) -> None:
    """Refuses what says of no progress bar whether it is shown.

    Raises:
        TypeError: neither a bool nor "always".
    """
    if not isinstance(progress, bool) and progress != "always":
        raise TypeError(
            f'{operator}: expected progress to be True, False or "always", got {progress!r}'
        )
