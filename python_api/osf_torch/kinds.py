"""What a parameter is: which modules own it, whether it is a layer's weight, how to call it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

Owners = dict[int, list[tuple[nn.Module, str]]]

# The factors of an adapter, by the names that PEFT, torchtune, LyCORIS and diffusers give them.
ADAPTER = re.compile(r"(?:^|\.)(lora(?:_layer)?[._](?:embedding_)?(?:[ab]|up|down))(?:\.|$)", re.I)
EXPERTS = re.compile(r"experts|moe|GroupedMLP", re.I)
ROUTERS = re.compile(r"router|gate", re.I)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def owners(model: nn.Module) -> Owners:
    """The modules that have a parameter, and as what, by the parameter's id."""
    found: Owners = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            found.setdefault(id(parameter), []).append((module, attribute))
    return found


def reparametrized(owned: Sequence[tuple[nn.Module, str]]) -> str | None:
    """What a weight is from which another one is computed before each call, by a parametrization
    or, as pruning and the older weight_norm and spectral_norm do, by a hook, and the remedy; None
    of a plain weight.

    Args:
        owned: the modules that have it, and as what.
    """
    if not any(
        isinstance(module, ParametrizationList) or _is_source(module, attribute)
        for module, attribute in owned
    ):
        return None
    return (
        "one that a parametrization or a hook computes another from, whose protected part that "
        "wouldn't hold; remove_parametrizations() first (of hooks remove_weight_norm(), "
        "remove_spectral_norm() or prune.remove()), or leave it out"
    )


def _is_source(module: nn.Module, attribute: str) -> bool:
    """Whether a hook computes a weight from it."""
    hooks = module._forward_pre_hooks.values()
    names = (getattr(h, "name", None) or getattr(h, "_tensor_name", None) for h in hooks)
    return any(isinstance(name, str) and attribute.startswith(f"{name}_") for name in names)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer with its weight as (inputs, outputs)."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def is_weight(module: nn.Module, attribute: str) -> bool:
    """Whether activations are multiplied with it: of a linear layer, attention, experts, a router.

    What a module computes isn't known where its class is none of torch's. Of one that is called
    after experts (``Qwen3MoeExperts``, ``GroupedExperts``) a 3-D parameter is taken for a batch of
    matrices, and of one that is called after a router or gate a 2-D ``weight`` for the matrix of a
    linear layer. Others may be tables, scales or heads cut apart: they are left to be named.
    """
    if isinstance(module, nn.MultiheadAttention):
        return attribute in PROJECTIONS
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return attribute == "weight"
    parameter = module._parameters.get(attribute)
    shape = None if parameter is None else shape_of(parameter)
    if shape is None or not _is_of_its_own(module):
        return False
    called = type(module).__name__
    if len(shape) == 3:
        return bool(EXPERTS.search(called))
    return len(shape) == 2 and attribute == "weight" and bool(ROUTERS.search(called))


def _is_of_its_own(module: nn.Module) -> bool:
    """Whether no layer of torch says what its parameters are; containers have none of their own."""
    plain = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return not isinstance(module, ParametrizationList) and all(
        kind in plain or not kind.__module__.startswith("torch.nn.modules.")
        for kind in type(module).__mro__
    )


def is_flat(parameter: nn.Parameter, owned: Sequence[tuple[nn.Module, str]]) -> bool:
    """Whether it is a convolution's weight, whose matrix has all dimensions but the first in one:
    (out, in/groups·kh·kw), of a transposed one (in, out/groups·kh·kw)."""
    shape = shape_of(parameter)
    return (
        shape is not None
        and len(shape) > 2
        and any(isinstance(module, nn.modules.conv._ConvNd) for module, _ in owned)
    )


def has_matrices(shape: Sequence[int]) -> bool:
    """Whether it is a matrix, a batch of them, or a convolution's weight, with elements."""
    return len(shape) >= 2 and min(shape) > 0


def is_vectors(name: str, shape: Sequence[int], owned: Sequence[tuple[nn.Module, str]]) -> bool:
    """Whether it is a vector, or one for each expert (a bias beside a batch of matrices), or has no
    elements."""
    if len(shape) < 2 or min(shape) == 0:
        return True
    batches = [
        other
        for module, _ in owned
        for p in module._parameters.values()
        if p is not None and len(other := shape_of(p) or ()) == 3
    ]
    is_bias = len(shape) == 2 and name.endswith("bias")
    return is_bias and any(other[0] == shape[0] for other in batches)


def adapter_part(name: str) -> str | None:
    """ "lora_A" of a LoRA adapter's factor; None of any other parameter.

    What such a factor spans isn't what the weight that it is added to spans.
    """
    found = ADAPTER.search(name)
    return found[1] if found else None


def adapted(model: nn.Module) -> tuple[str, ...]:
    """The names of layers that PEFT has put an adapter around, each with a dot: what is under one
    and not under its ``base_layer`` is the adapter's."""
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module._modules.get("base_layer"), nn.Module)
    )


def is_lazy(parameter: torch.Tensor) -> bool:
    """Whether it is a lazy module's that hasn't run, and has neither shape nor values."""
    return bool(nn.parameter.is_lazy(parameter))


def shape_of(parameter: nn.Parameter) -> tuple[int, ...] | None:
    """As the model was written, where ZeRO-3 holds a part; None before a lazy module has run."""
    if is_lazy(parameter):
        return None
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def described(name: str, parameter: nn.Parameter, owned: Sequence[tuple[nn.Module, str]]) -> str:
    """Its shape, and in a few words what it is."""
    shape = shape_of(parameter)
    if shape is None:
        return "no shape yet, a lazy module's"
    return f"{'x'.join(map(str, shape))}, {_kind(name, shape, owned)}"


def _kind(name: str, shape: tuple[int, ...], owned: Sequence[tuple[nn.Module, str]]) -> str:
    module, attribute = owned[0] if owned else (None, "parameter")
    part = adapter_part(name)
    if part is not None:
        return f"{part} of a LoRA adapter"
    if module is not None and EXPERTS.search(type(module).__name__) and len(shape) == 3:
        return f"3-D: a batch of matrices (experts), {attribute} of {type(module).__name__}"
    if isinstance(module, ParametrizationList):
        return f"{attribute} of a parametrized weight"
    kind = type(module).__name__
    if type(module).__module__.startswith("torch.nn."):
        kind = f"nn.{kind}"
    whose = kind if attribute == "weight" else f"{attribute} of {kind}"
    if len(shape) != 2:
        return f"{len(shape)}-D, {whose}"
    if min(shape) == 1:
        return f"rho leaves nothing free of one direction, a rank of 1 by name protects it, {whose}"
    return whose


def is_plain(parameter: torch.Tensor) -> bool:
    """Whether torch's own operators see its values: no subclass that stands between."""
    kind = type(parameter)
    functions = (nn.Parameter.__torch_function__, torch._C._disabled_torch_function_impl)
    own_function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return (
        kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and own_function in (*functions, torch.Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]
    )
