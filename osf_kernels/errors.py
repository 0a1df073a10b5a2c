"""How this library refuses: operator, argument, expected, got, remedy, before anything is written.

Imports nothing of ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

# Of an entry of a list or a batch; a name stands for itself.
Index = int | tuple[int, ...] | str | None
Label = Callable[[str, Index], str]
_LISTED = 8


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and can't serve the call; the message says why."""


def describe(op: str, argument: str, expected: str, got: object, remedy: str = "") -> str:
    """``osf_kernels.project_: expected U to be (m, r) with m=4096, got (4000, 64); pass U.mT …``

    An operator of another package has it in its name: ``osf_torch.refresh``.
    """
    text = f"{_whole(op)}: expected {argument} to be {expected}, got {got}"
    return f"{text}; {remedy}" if remedy else text


class Refusal(Exception):
    """A call that is refused, with the parts of its text as attributes.

    It is raised as a ``ValueRefusal`` or a ``TypeRefusal``, made by :meth:`of`. Like any exception
    it can also be made of a text alone, and pickled; without ``of`` its attributes are empty.

    Attributes:
        op, argument, expected, got, remedy: as ``describe`` has them, each a text.
        index: of the entry of a list or a batch; the text then has ``argument[index]``.
        each: where several entries may be at fault, what each of them has, by index.
    """

    op = argument = expected = got = remedy = ""
    index: Index = None
    each: Mapping[Index, Any] = MappingProxyType({})

    @classmethod
    def of(
        cls,
        op: str,
        argument: str,
        expected: str,
        got: object,
        remedy: str = "",
        *,
        index: Index = None,
        each: Mapping[Index, Any] = MappingProxyType({}),
    ) -> Self:
        """``describe``'s text, with ``argument[index]``, and after ``got`` what ``each`` has."""
        found = f"{got}: {_listed(argument, each)}" if each else str(got)
        refusal = cls(describe(op, _label(argument, index), expected, found, remedy))
        refusal.op, refusal.argument, refusal.expected = op, argument, expected
        refusal.got, refusal.remedy, refusal.index = str(got), remedy, index
        refusal.each = dict(each)
        return refusal

    def at(self, index: Index) -> Self:
        """The same refusal, of an entry of a list."""
        parts = self.op, self.argument, self.expected, self.got, self.remedy
        return self.of(*parts, index=index, each=self.each)

    @classmethod
    @contextlib.contextmanager
    def of_entry(cls, index: int) -> Iterator[None]:
        """Has refusals that are raised inside tell the entry, which their text names already."""
        try:
            yield
        except Refusal as refusal:
            refusal.index = index
            raise

    def renamed(self, label: Label, *, op: str = "", remedy: str = "") -> Self:
        """The same refusal in a caller's words; ``label`` names an argument and its index."""
        return self.of(
            op or self.op,
            label(self.argument, self.index),
            self.expected,
            self.got,
            remedy or self.remedy,
            each={label(self.argument, index): has for index, has in self.each.items()},
        )


class ValueRefusal(Refusal, ValueError):
    """A call that is refused for the value of an argument."""


class TypeRefusal(Refusal, TypeError):
    """A call that is refused for the type of an argument, or its dtype."""


class ConvergenceWarning(RuntimeWarning):
    """Results whose residual is above the tolerance that was asked for, made by :meth:`of`.

    Attributes:
        op: the operator.
        tol: the tolerance.
        missed: what each matrix of ``A`` that missed it has, by index.
        remedy: what the caller may change.
    """

    op = remedy = ""
    tol = 0.0
    missed: Mapping[Index, Any] = MappingProxyType({})

    @classmethod
    def of(cls, op: str, tol: float, missed: Mapping[Index, Any], remedy: str) -> Self:
        listed = _listed("A", missed)
        warning = cls(f"{_whole(op)}: residuals above tol={tol:g}: {listed}; {remedy}")
        warning.op, warning.tol, warning.missed, warning.remedy = op, tol, dict(missed), remedy
        return warning

    def renamed(self, label: Label, *, op: str = "", remedy: str = "") -> Self:
        """The same warning in a caller's words; ``label`` names A and an index."""
        missed: dict[Index, Any] = {label("A", index): has for index, has in self.missed.items()}
        return self.of(op or self.op, self.tol, missed, remedy or self.remedy)


def _whole(op: str) -> str:
    return op if "." in op else f"osf_kernels.{op}"


def _label(argument: str, index: Index) -> str:
    if index is None or isinstance(index, str):
        return index or argument
    return f"{argument}[{', '.join(map(str, index if isinstance(index, tuple) else (index,)))}]"


def _listed(argument: str, each: Mapping[Index, object]) -> str:
    shown = [f"{_label(argument, index)} {has}".rstrip() for index, has in each.items()]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more
