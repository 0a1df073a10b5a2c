"""What is trained and not covered: protection holds for the weights that it names alone."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import nn

from osf_torch.free.spec import places_of
from osf_torch.kinds import adapted, described, is_vectors, owners, shape_of
from osf_torch.quantized import is_scale
from osf_torch.selection import Names, is_named, listed, named_weights, patterns_of, require_module

log = logging.getLogger("osf_torch")
NAMED = 6  # how many the log line names; a summary names all
BY_NAME = "left out by name"


class Attached(Protocol):
    """A guard, whose hooks are on the weights with these ids."""

    @property
    def _items(self) -> Mapping[int, object]: ...

    def _let_go(self, keys: set[int]) -> None: ...


# Guards whose hooks are on, so that protecting a parameter again replaces what was there.
ATTACHED: weakref.WeakSet[Attached] = weakref.WeakSet()


def guarded() -> set[int]:
    """The ids of the weights that some guard's hooks are on."""
    return {key for guard in ATTACHED for key in guard._items}


@dataclass(frozen=True)
class Coverage:
    """Which of the parameters that train are covered, and what the others are.

    Attributes:
        covered: elements of the covered matrices.
        vectors: elements of biases, norms and other vectors, which no subspace is one of.
        left_out: the other matrices, and what each is, by parameter name in the model's order.
        elements: of each of these.
        by_name: those of them that somebody has named, so that ``verify`` takes them.
    """

    covered: int = 0
    vectors: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)
    elements: Mapping[str, int] = field(default_factory=dict)
    by_name: frozenset[str] = frozenset()

    @property
    def share(self) -> float:
        """Of the elements that train, how many are covered, in [0, 1]."""
        return self.covered / self.total if self.total else 1.0

    @property
    def total(self) -> int:
        """Of all that trains, the elements."""
        return self.covered + self.vectors + sum(self.elements.values())

    @property
    def untold(self) -> dict[str, str]:
        """What is left out and was named by nobody."""
        return {name: what for name, what in self.left_out.items() if name not in self.by_name}

    def without(self, more: Mapping[str, Sequence[int]]) -> Coverage:
        """The same less some weights, given by their shapes, which are left out by name."""
        told = {name: f"{'x'.join(map(str, shape))}, {BY_NAME}" for name, shape in more.items()}
        elements = {name: math.prod(shape) for name, shape in more.items()}
        return replace(
            self,
            covered=self.covered - sum(elements.values()),
            left_out={**self.left_out, **told},
            elements={**self.elements, **elements},
            by_name=self.by_name | more.keys(),
        )

    def __str__(self) -> str:
        """One line: the share, and what isn't covered."""
        line = f"{_percent(self.share)} of the elements that train are covered"
        if self.vectors:
            line += f", {_percent(self.vectors / self.total)} are biases and other vectors"
        if self.left_out:
            named = [f"{name} ({what})" for name, what in self.left_out.items()]
            line += f"; left out and free to move: {listed(named, NAMED)}"
        return line

    def table(self) -> str:
        """The same in several lines, which name everything."""
        lines = [str(replace(self, left_out={}))]
        if self.left_out:
            width = max(map(len, self.left_out))
            lines.append(f"left out, and free to move where it trains: {len(self.left_out)}")
            lines += [f"  {name.ljust(width)}  {what}" for name, what in self.left_out.items()]
        return "\n".join(lines)


def coverage(
    model: nn.Module, covered: Collection[int] = (), leave_out: Collection[str] = ()
) -> Coverage:
    """Of a model whose parameters with the ids in ``covered`` are covered, beside those that guards
    and ``confine`` cover.

    Args:
        leave_out: names, or patterns of names, that are left out on purpose.
    """
    having, weights, layers = owners(model), named_weights(model), adapted(model)
    places = {id(place.weight): place for place in places_of(model)}
    covered = {*covered, *guarded()}
    total, vectors = 0, 0
    left_out: dict[str, str] = {}
    elements: dict[str, int] = {}
    named: set[str] = set()
    aliases: dict[int, list[str]] = {}
    for name, parameter in weights.items():
        aliases.setdefault(id(parameter), []).append(name)
    for key, called in aliases.items():
        name = called[0]
        parameter = weights[name]
        if key in places:
            total += math.prod(places[key].spec.shape)  # a quantized weight itself is packed
            continue
        if not parameter.requires_grad:
            continue
        shape = shape_of(parameter)
        count = 0 if shape is None else math.prod(shape)
        owned = having.get(key, ())
        around = next((layer for layer in layers if name.startswith(layer)), None)
        adapts = around is not None and not name.startswith(f"{around}base_layer.")
        is_vector = shape is not None and is_vectors(name, shape, owned)
        if key not in covered and is_vector and not (adapts and count):
            vectors += count
        elif key in covered:
            total += count
        else:
            by_name = is_named(called, leave_out)
            what = described(name, parameter, owned)
            if adapts and "adapter" not in what:
                what += ", of an adapter, which changes a weight"
            if is_scale(owned):
                what += ", a quantized weight's scale, which moves all of it: freeze it"
            left_out[name] = f"{what}, {BY_NAME}" if by_name else what
            elements[name] = count
            named |= {name} if by_name else set()
    return Coverage(total, vectors, left_out, elements, frozenset(named))


def named_in(model: nn.Module, leave_out: Names, subspaces: object, operator: str) -> list[str]:
    """What is left out on purpose: by the argument ``leave_out``, and in making ``subspaces``.

    Raises:
        TypeError: ``model`` is no module, or ``leave_out`` no text.
        ValueError: it has a name or pattern that no parameter goes by.
    """
    require_module(model, operator)
    names, weights = patterns_of(leave_out, "leave_out", operator), named_weights(model)
    foreign = [name for name in names if not is_named(weights, [name])]
    if foreign:
        raise ValueError(
            f"osf_torch.{operator}: expected leave_out to name parameters of the model, got "
            f"{listed(list(map(repr, foreign)))}; its first are {listed(list(weights), 5)}"
        )
    return [*names, *sorted(named_by(subspaces))]


def require_others(
    model: nn.Module, leave_out: Names, covered: Collection[int], operator: str
) -> None:
    """Refuses a covered weight that ``leave_out`` has by its name; a pattern means the others.

    Args:
        covered: ids of the parameters that are to be covered.

    Raises:
        ValueError: it has one.
    """
    weights = named_weights(model)
    names = patterns_of(leave_out, "leave_out", operator)
    both = [name for name in names if name in weights and id(weights[name]) in covered]
    if both:
        raise ValueError(
            f"osf_torch.{operator}: expected leave_out to name what isn't protected, got "
            f"{listed(list(map(repr, both)))}, which the subspaces protect; a weight that is to "
            "move freely is left out of refresh or input_subspaces, whose subspaces then hold none "
            "of it"
        )


def named_by(subspaces: object) -> frozenset[str]:
    """What was left out by name in making subspaces."""
    found: Coverage | None = getattr(subspaces, "coverage", None)
    return frozenset() if found is None else found.by_name


def tell(found: Coverage, operator: str) -> Coverage:
    """One line by the logger "osf_torch": at WARNING where something was left out by nobody's
    word, else at INFO."""
    line = f"osf_torch.{operator}: {found}"
    if found.untold:
        remedy = "take these in by refresh(filter=...), freeze them, or name them in leave_out="
        if operator == "input_subspaces":
            remedy = (
                "freeze these, name them in leave_out=, or take in by input_subspaces(filter=...) "
                "those that are multiplied with activations, as an embedding isn't"
            )
        log.warning("%s; %s; until one of these is done verify() refuses them", line, remedy)
    else:
        log.info("%s", line)
    return found


def require_told(found: Coverage, operator: str) -> None:
    """Refuses matrices that train, that nothing covers and that nobody has left out by name.

    Raises:
        RuntimeError: there are some.
    """
    named = [f"{name} ({what})" for name, what in found.untold.items()]
    if named:
        raise RuntimeError(
            f"osf_torch.{operator}: expected every matrix that trains to be covered, got "
            f"{listed(named)}, which nothing covers: all of them may move; take them in by refresh "
            "or input_subspaces (filter= takes others than the default), freeze them, or leave "
            "them out by name, in protect, confine or next_task: "
            f"leave_out={list(found.untold)[:NAMED]}"
        )


def _percent(share: float) -> str:
    """Rounded down, so that 100 % is all."""
    return f"{math.floor(1000 * share) / 10:g} %"
