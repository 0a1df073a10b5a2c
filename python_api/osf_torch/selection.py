"""Which weights of a model are decomposed, under which name, and to which rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral, Real

import torch
from torch import nn

from osf_torch.sharding import is_dtensor, resharded, sharding_of

Rank = int | float
Ranks = Rank | Mapping[str, Rank]
Filter = Callable[[str, nn.Parameter], bool] | str | Sequence[str] | None

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LISTED = 12  # how many names an error message lists


@dataclass(frozen=True)
class Selected:
    """A weight to decompose: its name in ``model.named_parameters()`` and its rank r."""

    name: str
    weight: nn.Parameter
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight.shape
        return m, n


WRAPPERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")
WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within torch.compile's, DistributedDataParallel's or DeepSpeed's module."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in WRAPPERS:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by every name they have, less what compiling and wrapping add to it.

    So a model goes by the same names bare, compiled, checkpointed and distributed.
    """
    resharded(model)
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPED): parameter
        for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False)
    }


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def select(
    model: nn.Module, ranks: Ranks, filter: Filter, *, operator: str, sharded: bool = False
) -> list[Selected]:
    """The weights that ``filter`` matches, each once and with its rank, in the model's order.

    A weight that several modules share is matched by any of its names and goes by the first one,
    as in ``model.named_parameters()``. One without elements is passed over: there is nothing to
    protect. ``sharded`` says whether DTensors are taken.

    Raises:
        TypeError, ValueError: as ``osf_torch.refresh``, whose name ``operator`` gives.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"osf_torch.{operator}: expected model to be an nn.Module, got {type(model).__name__}; "
            "load a state dict into its model first"
        )
    aliases: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in named_weights(model).items():
        aliases.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    matrices = [key for key, p in parameters.items() if p.dim() == 2 and p.numel()]
    matches = _matcher(model, filter, operator)
    chosen = [key for key in matrices if any(matches(n, parameters[key]) for n in aliases[key])]
    if not chosen:
        found = [_described(aliases[key][0], parameters[key]) for key in matrices]
        linear = "nn.Linear weights (and Conv1D's) that require grad"
        wanted = linear if filter is None else f"filter={filter!r}"
        raise ValueError(
            f"osf_torch.{operator}: expected {wanted} to match a 2-D parameter of the model, got "
            f"no match among its {len(found)}: {listed(found) or 'none'}; pass filter= with "
            "patterns such as '*.weight', or a function of name and parameter"
        )
    wanted_ranks = _ranks(ranks, [aliases[key] for key in chosen], operator)
    selected = []
    for key, rank in zip(chosen, wanted_ranks, strict=True):
        name, weight = aliases[key][0], parameters[key]
        _require_decomposable(name, weight, operator, sharded)
        m, n = weight.shape
        selected.append(Selected(name, weight, _resolved(rank, m, n, name, operator)))
    return selected


def _described(name: str, parameter: nn.Parameter) -> str:
    shape = "x".join(map(str, parameter.shape))
    return f"{name} ({shape}{'' if parameter.requires_grad else ', frozen'})"


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, and transformers' Conv1D: the same layer, with its weight as (inputs, outputs)."""
    kinds = type(module).__mro__
    return isinstance(module, nn.Linear) or any(kind.__name__ == "Conv1D" for kind in kinds)


def _matcher(
    model: nn.Module, filter: Filter, operator: str
) -> Callable[[str, nn.Parameter], bool]:
    if filter is None:
        weights = {
            id(module._parameters.get("weight")) for module in model.modules() if is_linear(module)
        }
        return lambda _, parameter: parameter.requires_grad and id(parameter) in weights
    if callable(filter):
        return filter
    patterns = [filter] if isinstance(filter, str) else filter
    if not isinstance(patterns, Collection) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"osf_torch.{operator}: expected filter to be a function of name and parameter, or "
            f"patterns of names, got {filter!r}"
        )
    return lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)


def _ranks(ranks: Ranks, names: Sequence[Sequence[str]], operator: str) -> list[Rank]:
    """One rank a weight: by its exact name, else by the first pattern that matches."""
    if not isinstance(ranks, Mapping):
        return [ranks] * len(names)
    used: set[str] = set()
    found: list[Rank] = []
    missing: list[str] = []
    for aliases in names:
        exact = [alias for alias in aliases if alias in ranks]
        fitting = [p for p in ranks if any(fnmatchcase(alias, p) for alias in aliases)]
        used.update(exact, fitting)
        if exact or fitting:
            found.append(ranks[(exact or fitting)[0]])
        else:
            missing.append(aliases[0])
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


def _require_decomposable(name: str, weight: nn.Parameter, operator: str, sharded: bool) -> None:
    if weight.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(
            f"osf_torch.{operator}: expected parameter {name!r} to be one of {known}, got "
            f"{weight.dtype}; leave it out by filter=, or dequantize it"
        )
    if weight.is_meta:
        raise ValueError(
            f"osf_torch.{operator}: expected parameter {name!r} to have values, got a meta tensor; "
            "load the weights first"
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
    """r of an int, or of a share ρ in (0, 1] of the shorter side, at least one."""
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
        return max(1, round(share * short))
    if not 1 <= int(rank) <= short:
        raise ValueError(
            f"osf_torch.{operator}: expected the rank of {name!r} to be from 1 to min(m, n) = "
            f"{short} of its shape ({m}, {n}), got {rank}; pass a float for a share of it"
        )
    return int(rank)
