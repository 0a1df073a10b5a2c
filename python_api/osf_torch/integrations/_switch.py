"""Replaces attributes of a peer package, all of them or none, and puts its own back."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from osf_torch.integrations._peer import require_version

Owner = ModuleType | type
_ABSENT = object()  # what an owner holds under a name that it inherits, or that isn't there


@dataclass(frozen=True)
class Replacement:
    """An attribute of a module or of a class, and what takes its place."""

    owner: Owner
    name: str
    ours: Callable[..., Any]

    @property
    def module(self) -> str:
        owner = self.owner
        return owner.__name__ if isinstance(owner, ModuleType) else owner.__module__

    def __str__(self) -> str:
        owner = "" if isinstance(self.owner, ModuleType) else f".{self.owner.__qualname__}"
        return f"{self.module}{owner}.{self.name}"

    def current(self) -> Any:
        return vars(self.owner).get(self.name, _ABSENT)


class Switch:
    """The attributes of one peer that one integration replaces.

    Args:
        distribution, versions: the peer, and the versions whose attributes ours stand in for.
        integration: the module name under ``osf_torch.integrations``.
    """

    def __init__(self, distribution: str, versions: str, integration: str) -> None:
        self.distribution, self.versions, self.integration = distribution, versions, integration
        self._held: list[tuple[Replacement, Any]] = []  # with the peer's own

    def __bool__(self) -> bool:
        """Whether anything is replaced."""
        return bool(self._held)

    def own(self, owner: Owner, name: str) -> Any:
        """The peer's own attribute, whether it is replaced or not."""
        for replaced, own in self._held:
            if replaced.owner is owner and replaced.name == name:
                return own
        return getattr(owner, name)

    def on(self, replacements: Iterable[Replacement]) -> None:
        """Replaces what isn't replaced so far.

        Raises:
            ImportError: an attribute is missing, or takes other arguments than ours; nothing is
                replaced then.

        What someone else has put in the place of ours since is left there, with a RuntimeWarning.
        """
        wanted = [r for r in replacements if r.current() is not r.ours]
        known = {(id(held.owner), held.name) for held, _ in self._held}
        foreign = [r for r in wanted if (id(r.owner), r.name) in known]
        wanted = [r for r in wanted if r not in foreign]
        self.require(wanted)
        for replacement in wanted:
            self._held.append((replacement, replacement.current()))
            setattr(replacement.owner, replacement.name, replacement.ours)
        if foreign:
            self._warn("enable", foreign, "ours")

    def off(self) -> None:
        """Puts the peer's own back, also where a module has imported ours since.

        What someone else has put in the place of ours is left there, with a RuntimeWarning; once
        theirs is off, a later call puts the peer's own back.
        """
        foreign = []
        held, self._held = self._held, []
        for replaced, own in reversed(held):
            if replaced.current() is not replaced.ours:
                foreign.append((replaced, own))
            elif own is _ABSENT:
                delattr(replaced.owner, replaced.name)
            else:
                setattr(replaced.owner, replaced.name, own)
        for replaced, own in held:
            for module in holders(replaced.module, replaced.name):
                if vars(module)[replaced.name] is replaced.ours:
                    setattr(module, replaced.name, own)
        self._held = foreign[::-1]
        if foreign:
            self._warn("disable", [replaced for replaced, _ in self._held], "the peer's own")

    def require(self, replacements: Iterable[Replacement]) -> None:
        """Raises ImportError unless every attribute is there, and takes the arguments of ours."""
        for replacement in replacements:
            theirs = getattr(replacement.owner, replacement.name, None)
            if theirs is not None and _stands_in(replacement, theirs):
                continue
            installed = require_version(self.distribution, self.versions, self.integration)
            path = getattr(sys.modules.get(replacement.module), "__file__", None)
            raise ImportError(
                f"osf_torch.integrations.{self.integration}.enable: expected {replacement} to take "
                f"{_arguments(replacement.ours)}, as it does in {self.distribution} "
                f"{self.versions}, got {'none' if theirs is None else _arguments(theirs)} in "
                f"{installed}, imported from {path}; nothing is replaced, install a release and "
                "keep other checkouts off the path",
                name=str(replacement),
                path=path,
            )

    def _warn(self, operator: str, foreign: list[Replacement], wanted: str) -> None:
        found = ", ".join(f"{_named(r.current())} as {r}" for r in foreign)
        warnings.warn(
            f"osf_torch.integrations.{self.integration}.{operator}: expected what enable() put in "
            f"the peer, got {found}, put there since; it is left and may still call ours: take it "
            f"off and call {operator}() again for {wanted}",
            RuntimeWarning,
            stacklevel=4,
        )


def holders(package: str, name: str) -> list[ModuleType]:
    """The loaded modules of a package, given by it or one of them, that have a global ``name``."""
    top = package.partition(".")[0]
    return [
        module
        for loaded, module in list(sys.modules.items())
        if loaded.partition(".")[0] == top and name in getattr(module, "__dict__", {})
    ]


def _stands_in(replacement: Replacement, theirs: Any) -> bool:
    """Whether ours takes the arguments of theirs: the same, and keywords of its own at most.

    A function of (*args, **kwargs) tells nothing, and passes: it is how others wrap a function.
    """
    first = 0 if isinstance(replacement.owner, ModuleType) else 1  # what a method is called on
    try:
        mine = list(inspect.signature(replacement.ours).parameters.values())[first:]
        other = list(inspect.signature(theirs).parameters.values())[first:]
    except (TypeError, ValueError):
        return False
    if [p.kind for p in other] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return True
    names = {p.name for p in other}
    shared = [p for p in mine if p.name in names or p.kind is not inspect.Parameter.KEYWORD_ONLY]
    return [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in other
    ]


def _arguments(function: Any) -> str:
    """(x, rank=4), without annotations."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return f"a {type(function).__name__}"
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _named(value: Any) -> str:
    """By where it is written too: a wrapper carries the name of what it wraps."""
    if value is _ABSENT:
        return "nothing"
    name = f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', value)}"
    code = getattr(value, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"
