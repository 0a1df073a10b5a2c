"""Which weights of a model are decomposed, under which name, and to which rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real

import torch
from torch import nn

from osf_torch.free.spec import WRAPPED, places_of
from osf_torch.kinds import (
    Owners,
    adapter_part,
    described,
    has_matrices,
    is_flat,
    is_lazy,
    is_plain,
    is_weight,
    owners,
    shape_of,
)
from osf_torch.quantized import KNOWN, LOAD_MXFP4, Stored, is_scale, stored, unheld
from osf_torch.sharding import is_dtensor, resharded, sharding_of

Rank = int | float
Ranks = Rank | Mapping[str, Rank]
Filter = Callable[[str, nn.Parameter], bool] | str | Sequence[str] | None
Names = str | Sequence[str] | None

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LISTED = 12  # how many names an error message lists


@dataclass(frozen=True)
class Selected:
    """A weight to decompose: its name in ``model.named_parameters()`` and its rank r.

    A rank of 0 says that the share that was asked for leaves nothing free. ``stored`` is what a
    quantized weight stands for; None of any other.
    """

    name: str
    weight: nn.Parameter
    rank: int
    stored: Stored | None = None
    is_flat: bool = False  # a convolution's, all dimensions but the first in one

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """(..., m, n) of what it is or stands for."""
        return tuple(self.weight.shape) if self.stored is None else self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.weight.dtype if self.stored is None else self.stored.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix, or of each of them."""
        m, n = matrix_of(self.whole_shape, self.is_flat)
        return m, n

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading dimensions of a batch of matrices (experts); none of a matrix."""
        return () if self.is_flat else self.whole_shape[:-2]

    @property
    def matrices(self) -> int:
        """How many there are."""
        return math.prod(self.batch)


# Modules that stand around a whole model, and what they call it.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within torch.compile's, DistributedDataParallel's or DeepSpeed's module."""
    while True:
        inner = getattr(model, WRAPPERS.get(type(model).__name__, ""), None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by every name they have, less what compiling and wrapping add to it.

    So a model goes by the same names bare, compiled, checkpointed and distributed. Where two
    parameters would go by one name they keep the names that the model gives them. What ``confine``
    holds beside a weight isn't one of the model.
    """
    resharded(model)
    model = unwrapped(model)
    others = {id(t) for place in places_of(model) for t in place.beside()}
    full = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in others
    }
    short = {name: ".".join(p for p in name.split(".") if p not in WRAPPED) for name in full}
    bearers: dict[str, set[int]] = {}
    for name, parameter in full.items():
        bearers.setdefault(short[name], set()).add(id(parameter))
    return {
        short[name] if len(bearers[short[name]]) == 1 else name: parameter
        for name, parameter in full.items()
    }


def unheld_weights(model: nn.Module) -> list[str]:
    """The names of quantized weights that the model holds in no parameter."""
    return [
        ".".join(part for part in f"{name}.{attribute}".split(".") if part not in {"", *WRAPPED})
        for name, module in model.named_modules()
        for attribute in unheld(module)
    ]


def unknown(
    operator: str, name: str, known: Collection[str], held_apart: Collection[str] = ()
) -> ValueError:
    """Of subspaces that name a parameter which the model doesn't have.

    Args:
        held_apart: what the model holds in no parameter.
    """
    held = f"it has {len(known)}, the first are {', '.join(list(known)[:5])}"
    if not known:
        held = "it has none: a quantized layer may hold its weight as something else"
    if name in held_apart:
        held = f"its module has packed it for kernels of its own; {LOAD_MXFP4}"
    return ValueError(
        f"osf_torch.{operator}: expected subspaces to name parameters of the model, got {name!r}; "
        + held
    )


def listed(names: Sequence[str], count: int = LISTED) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


def matrix_of(shape: Sequence[int], is_flat: bool) -> tuple[int, int]:
    """(m, n) of a weight's matrix, or of each of a batch's."""
    if is_flat:
        return shape[0], math.prod(shape[1:])
    m, n = shape[-2:]
    return m, n


def patterns_of(names: Names, argument: str, operator: str) -> list[str]:
    """Names and patterns of names as a list.

    Raises:
        TypeError: it is no text, and no sequence of texts.
    """
    given = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(given, Collection) or not all(isinstance(p, str) for p in given):
        raise TypeError(
            f"osf_torch.{operator}: expected {argument} to be a name, a pattern of names or "
            f"several, got {names!r}"
        )
    return list(given)


def is_named(aliases: Iterable[str], names: Iterable[str]) -> bool:
    """Whether one of a parameter's names is among them, or fits a pattern among them."""
    names = list(names)
    return any(alias == name or fnmatchcase(alias, name) for alias in aliases for name in names)


def select(
    model: nn.Module,
    ranks: Ranks,
    filter: Filter,
    *,
    operator: str,
    sharded: bool = False,
    leave_out: Names = None,
    values: bool = True,
    quantized: bool = False,
) -> list[Selected]:
    """The weights that ``filter`` matches, each once and with its rank, in the model's order.

    A weight that several modules share is matched by any of its names and goes by the first one,
    as in ``model.named_parameters()``. One without elements is passed over: there is nothing to
    protect. ``sharded`` says whether DTensors are taken, ``values`` whether meta tensors are
    refused, ``quantized`` whether weights are taken that are quantized in a known way, by default
    where nothing else is; what ``leave_out`` names isn't.

    Raises:
        TypeError, ValueError: as ``osf_torch.refresh``, whose name ``operator`` gives.
    """
    require_module(model, operator)
    require_matrices(model, operator)
    having = owners(model)
    aliases: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in named_weights(model).items():
        aliases.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    matches = _matcher(model, having, aliases, filter, operator)
    if filter is None and quantized:
        matches = _or_quantized(matches, having, aliases, parameters)
    left = patterns_of(leave_out, "leave_out", operator)
    matched = [
        key
        for key, p in parameters.items()
        if any(matches(n, p) for n in aliases[key]) and not is_named(aliases[key], left)
    ]
    unfit = {key for key, p in parameters.items() if not _may_be_taken(p, having)}
    chosen = [key for key in matched if key not in unfit]
    if not chosen or not _named(filter, aliases, matched) <= set(chosen):
        raise _no_match(having, aliases, parameters, matched, unfit, filter, operator)
    omitted = [names for names in aliases.values() if is_named(names, left)]
    wanted_ranks = _ranks(ranks, [aliases[key] for key in chosen], omitted, operator)
    selected = []
    for key, rank in zip(chosen, wanted_ranks, strict=True):
        name, weight = aliases[key][0], parameters[key]
        packed = stored(weight, having.get(key, ())) if quantized else None
        if packed is not None:
            packed.require(name, operator)
        elif values or not weight.is_meta:
            require_values(name, weight, operator)
        _require_layout(name, weight, operator, sharded)
        flat = packed is None and is_flat(weight, having.get(key, ()))
        taken = Selected(name, weight, 0, packed, flat)
        selected.append(replace(taken, rank=_resolved(rank, *taken.shape, name, operator)))
    return selected


def frozen_quantized(model: nn.Module) -> dict[int, str]:
    """The weights of layers and experts that are quantized in a known way and don't train, by id:
    their first names."""
    having = owners(model)
    found: dict[int, str] = {}
    for name, parameter in named_weights(model).items():
        owned = having.get(id(parameter), ())
        if not parameter.requires_grad and _is_quantized(parameter, owned):
            found.setdefault(id(parameter), name)
    return found


def _is_quantized(parameter: nn.Parameter, owned: Sequence[tuple[nn.Module, str]]) -> bool:
    embeds = any(isinstance(module, nn.Embedding) for module, _ in owned)
    return not (embeds or is_scale(owned)) and stored(parameter, owned) is not None


def _or_quantized(
    matches: Callable[[str, nn.Parameter], bool],
    having: Owners,
    aliases: Mapping[int, Sequence[str]],
    parameters: Mapping[int, nn.Parameter],
) -> Callable[[str, nn.Parameter], bool]:
    """The default where something trains, else the quantized weights, which are frozen always."""
    if any(matches(name, p) for key, p in parameters.items() for name in aliases[key]):
        return matches
    packed = {key for key, p in parameters.items() if _is_quantized(p, having.get(key, ()))}
    return lambda _, parameter: id(parameter) in packed


def _may_be_taken(parameter: nn.Parameter, having: Owners) -> bool:
    """Whether it is a matrix with elements or a batch of them, or may be one that isn't there, and
    is refused; the scale of a quantized weight is none."""
    shape, owned = shape_of(parameter), having.get(id(parameter), ())
    return shape is None or (has_matrices(shape) and not is_scale(owned))


def _no_match(
    having: Owners,
    aliases: Mapping[int, Sequence[str]],
    parameters: Mapping[int, nn.Parameter],
    matched: Sequence[int],
    unfit: Collection[int],
    filter: Filter,
    operator: str,
) -> ValueError:
    found, factors, others = [], [], []
    for key, parameter in parameters.items():
        name = aliases[key][0]
        told = f"{name} ({described(name, parameter, having.get(key, ()))})"
        packed = stored(parameter, having.get(key, ()))
        if key not in unfit:
            known = shape_of(parameter) if packed is None else packed.shape
            shape = "x".join(map(str, known or ("lazy",)))
            found.append(f"{name} ({shape}{'' if parameter.requires_grad else ', frozen'})")
            if filter is None and parameter.requires_grad and adapter_part(name):
                factors.append(told)
        elif key in matched and (filter is not None or parameter.numel()):
            others.append(told)
    linear = "weights of linear layers, attention, experts or routers that require grad"
    wanted = linear if filter is None else f"filter={filter!r}"
    text = (
        f"osf_torch.{operator}: expected {wanted} to match matrices of the model, got "
        f"{f'no matrix in {listed(others)}' if others else 'no match'} among its {len(found)}: "
        f"{listed(found) or 'none'}"
    )
    if factors:
        return ValueError(
            f"{text}; what trains are {listed(factors)}, and what these span isn't what the weight "
            "spans that their product is added to: refresh the model before it gets its adapters "
            "and train the weights themselves, take PEFT's OSF tuner instead "
            "(osf_torch.integrations.peft), or pass filter='*' for the factors as they are"
        )
    return ValueError(
        f"{text}; pass filter= with patterns such as '*.weight', or a function of name and "
        "parameter"
    )


def _matcher(
    model: nn.Module,
    having: Owners,
    aliases: Mapping[int, Sequence[str]],
    filter: Filter,
    operator: str,
) -> Callable[[str, nn.Parameter], bool]:
    if filter is None:
        weights = {
            key
            for key, owned in having.items()
            if any(is_weight(module, attribute) for module, attribute in owned)
        }
        confined = {id(place.weight) for place in places_of(model)}  # frozen, and trained by C
        return lambda name, parameter: (
            (parameter.requires_grad or id(parameter) in confined)
            and id(parameter) in weights
            and adapter_part(name) is None
        )
    if callable(filter):  # asked of what may be taken alone, which has two dimensions at least
        return lambda name, parameter: (
            not is_lazy(parameter) and has_matrices(parameter.shape) and filter(name, parameter)
        )
    given = [filter] if isinstance(filter, str) else filter
    if not isinstance(given, Collection) or not all(isinstance(p, str) for p in given):
        raise TypeError(
            f"osf_torch.{operator}: expected filter to be a function of name and parameter, or "
            f"patterns of names, got {filter!r}"
        )
    exact, patterns = _exact_and_patterns(given, aliases.values())
    return lambda name, _: name in exact or any(fnmatchcase(name, p) for p in patterns)


def _exact_and_patterns(
    keys: Iterable[str], names: Iterable[Sequence[str]]
) -> tuple[set[str], list[str]]:
    """The keys that are names, which are no patterns even with brackets in them, and the others."""
    keys = list(keys)
    exact = set(keys) & {alias for aliases in names for alias in aliases}
    return exact, [key for key in keys if key not in exact]


def _named(
    filter: Filter, aliases: Mapping[int, Sequence[str]], matched: Iterable[int]
) -> set[int]:
    """Those of ``matched`` whose names stand in ``filter`` in full, and not by a pattern."""
    if filter is None or callable(filter):
        return set()
    given = {filter} if isinstance(filter, str) else set(filter)
    return {key for key in matched if not given.isdisjoint(aliases[key])}


def _ranks(
    ranks: Ranks,
    names: Sequence[Sequence[str]],
    omitted: Sequence[Sequence[str]],
    operator: str,
) -> list[Rank]:
    """One rank a weight: by its exact name, else by the first pattern that matches.

    Args:
        omitted: the names of weights that are left out, for which there may be ranks too.
    """
    if not isinstance(ranks, Mapping):
        return [ranks] * len(names)
    named, patterns = _exact_and_patterns(ranks, names)
    used: set[str] = set()
    found: list[Rank] = []
    missing: list[str] = []
    for aliases in names:
        exact = [alias for alias in aliases if alias in named]
        fitting = [p for p in patterns if any(fnmatchcase(alias, p) for alias in aliases)]
        used.update(exact, fitting)
        if exact or fitting:
            found.append(ranks[(exact or fitting)[0]])
        else:
            missing.append(aliases[0])
    used |= {key for key in ranks if any(is_named(aliases, [key]) for aliases in omitted)}
    unused = [repr(pattern) for pattern in ranks if pattern not in used]
    if missing:
        raise ValueError(
            f"osf_torch.{operator}: expected ranks to give a rank for every weight that the filter "
            f"matches, got none for {listed(missing)}; add them or a pattern '*', or narrow filter"
        )
    if unused:
        raise ValueError(
            f"osf_torch.{operator}: expected every key of ranks to match a weight that the filter "
            f"selects, got {listed(unused)} which match none; widen filter= or leave them out"
        )
    return found


def require_module(model: object, operator: str) -> None:
    """Refuses what is no model, such as a state dict."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"osf_torch.{operator}: expected model to be an nn.Module, got {type(model).__name__}; "
            "load a state dict into its model first"
        )


def require_matrices(model: nn.Module, operator: str) -> None:
    """Refuses a model whose weights are held flat, as vectors that no subspace is one of.

    Raises:
        ValueError: parameters of FSDP1 (``FullyShardedDataParallel``) outside
            ``summon_full_params``.
    """
    having = owners(model)
    flat = [
        name
        for name, parameter in named_weights(model).items()
        if getattr(parameter, "_is_flat_param", False)
        or (
            getattr(parameter, "_fsdp_flattened", False)  # with use_orig_params=True
            and parameter.dim() == 1
            and any(
                is_weight(module, attribute) or isinstance(module, nn.Embedding)
                for module, attribute in having.get(id(parameter), ())
            )
        )
    ]
    if flat:
        raise ValueError(
            f"osf_torch.{operator}: expected weights to be matrices, got FSDP1's flat parameters, "
            f"{listed(flat, 3)}; shard by torch.distributed.fsdp.fully_shard (FSDP2), which keeps "
            "matrices, or call this before FullyShardedDataParallel wraps the model"
        )


def require_values(name: str, weight: nn.Parameter, operator: str) -> None:
    """Refuses a parameter whose values torch's operators can't read, by its name.

    Raises:
        ValueError: a meta tensor, or the parameter of a lazy module that hasn't run.
        TypeError: another dtype than float32, bfloat16, float16 or float64; a sparse tensor; a
            tensor subclass other than nn.Parameter and DTensor, such as quantized weights.
    """
    if is_lazy(weight):
        raise ValueError(
            f"osf_torch.{operator}: expected parameter {name!r} to have values, got one of a lazy "
            "module; run the model on a batch first"
        )
    if not is_dtensor(weight) and not is_plain(weight):
        raise TypeError(
            f"osf_torch.{operator}: expected parameter {name!r} to be a plain tensor or a DTensor, "
            f"got {type(weight).__name__}; leave it out by filter=, or dequantize it (of quantized "
            f"weights refresh knows {KNOWN})"
        )
    if weight.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(
            f"osf_torch.{operator}: expected parameter {name!r} to be one of {known}, got "
            f"{weight.dtype}; leave it out by filter=, or dequantize it (of quantized weights "
            f"refresh knows {KNOWN})"
        )
    if weight.layout != torch.strided:
        raise TypeError(
            f"osf_torch.{operator}: expected parameter {name!r} to be dense, got "
            f"{weight.layout}; leave it out by filter=, or make it dense"
        )
    if weight.is_meta:
        raise ValueError(
            f"osf_torch.{operator}: expected parameter {name!r} to have values, got a meta tensor; "
            "load the weights first"
        )


def _require_layout(name: str, weight: nn.Parameter, operator: str, sharded: bool) -> None:
    if tuple(weight.shape) != shape_of(weight):
        raise ValueError(
            f"osf_torch.{operator}: expected parameter {name!r} to be whole, got a part that "
            "DeepSpeed's ZeRO-3 left; call this before deepspeed.initialize, or within "
            "deepspeed.zero.GatheredParameters"
        )
    if is_dtensor(weight) and sharded:
        try:
            sharding_of(weight)
        except ValueError as error:
            raise ValueError(f"osf_torch.{operator}: parameter {name!r}: {error}") from None
    elif is_dtensor(weight):
        raise TypeError(
            f"osf_torch.{operator}: expected parameter {name!r} to be a whole tensor, got a "
            "DTensor; do this before sharding, or gather the weight first"
        )


def _resolved(rank: object, m: int, n: int, name: str, operator: str) -> int:
    """r of an int, or of a share ρ in (0, 1] of the shorter side, at least one.

    A share below 1 leaves at least one direction free; of a weight with one alone that is 0.
    """
    short = min(m, n)
    if isinstance(rank, bool) or not isinstance(rank, Real):
        raise TypeError(
            f"osf_torch.{operator}: expected the rank of {name!r} to be an int or a float in "
            f"(0, 1], got {rank!r}"
        )
    if not isinstance(rank, Integral):
        share = float(rank)
        if not 0.0 < share <= 1.0:
            raise ValueError(
                f"osf_torch.{operator}: expected the rank of {name!r} to be a float in (0, 1], got "
                f"{rank!r}; pass an int for a number of directions"
            )
        return share_of(share, short)
    if not 1 <= int(rank) <= short:
        raise ValueError(
            f"osf_torch.{operator}: expected the rank of {name!r} to be from 1 to min(m, n) = "
            f"{short} of its shape ({m}, {n}), got {rank}; pass a float for a share of it"
        )
    return int(rank)


def share_of(share: float, short: int) -> int:
    """Directions of ``short`` that a share ρ in (0, 1] is: below 1 it leaves one free at least."""
    return short if share >= 1.0 else min(max(1, round(share * short)), short - 1)


def require_seed(seed: object, operator: str) -> None:
    """Refuses what no torch.Generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"osf_torch.{operator}: expected seed to be an int, got {seed!r}")
    if not -(1 << 63) <= int(seed) < 1 << 64:
        raise ValueError(
            f"osf_torch.{operator}: expected seed to have 64 bits, got {seed}; any int such as 0"
        )
