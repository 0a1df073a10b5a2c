"""From a LoRA model of PEFT's, in memory, to a confined one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from osf_torch.confine import confine
from osf_torch.confined import Confined
from osf_torch.free.admission import Settings, admitted
from osf_torch.integrations._lora import (
    Factors,
    inside,
    module_of,
    require_lora_layers,
    require_plain,
    write,
)
from osf_torch.integrations._peer import require_peer
from osf_torch.integrations.peft.switching import PEER
from osf_torch.selection import listed
from osf_torch.subspaces import Subspace

_PREFIX = "base_model.model."  # of names within a PeftModel
_OPERATOR = "integrations.peft.confine_lora"


def confine_lora(
    peft_model: Any,
    subspaces: Mapping[str, Subspace],
    rank: int | None = None,
    *,
    project: bool = False,
) -> tuple[nn.Module, Confined]:
    """The base model without PEFT's LoRA layers, confined, with the adapter in its free factors.

    A LoRA layer W x + scaling · lora_B lora_A x becomes (W + U_l B A V_lᵀ) x with A = lora_A V_l
    and B = scaling · U_lᵀ lora_B. The base's weights aren't merged and not written to. A new
    adapter, of which lora_B is zero, loses nothing. One that was trained has parts outside of the
    free blocks, which are left out with ``project=True``. Dropout of the LoRA layers goes with
    them. What PEFT has frozen stays frozen, and what it trains beside (biases, modules_to_save)
    goes on to be trained::

        model, confined = osf_peft.confine_lora(peft_model, subspaces)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        peft_model: a PeftModel with one LoRA adapter. It is of no use afterwards.
        subspaces: what is protected, by the names of the base model's weights; of all weights that
            have a LoRA, and of others. Names within the PeftModel are taken too.
        rank: s of ``osf_torch.confine``; None for the highest rank of the adapter.
        project: leave out what the adapter has outside of the free blocks; a log line says how
            much of each. Without it that is an error beyond rounding.

    Returns:
        The base model, the same object that peft_model has within, and its Confined.

    Raises:
        ImportError: peft isn't installed, or in another version than those supported.
        TypeError: peft_model isn't a PeftModel; LoRA layers of other modules than nn.Linear, Conv1D
            and quantized linear ones, or of parameters; as ``osf_torch.confine``.
        ValueError: no LoRA adapter or several; DoRA and other variants; merged layers; a LoRA of a
            weight that has no subspace, of a higher rank than ``rank``, not finite or outside of
            its free block; as ``osf_torch.confine``; nothing is changed.

    Mutates the base model. Synchronises. Draws random numbers where ``rank`` is above the
    adapter's, from a generator of its own. Supported: peft 0.21.
    """
    peft = require_peer(*PEER, "peft")
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(
            f"osf_torch.{_OPERATOR}: expected peft_model to be a PeftModel, got "
            f"{type(peft_model).__name__}; of a plain model that is osf_torch.confine"
        )
    if not isinstance(subspaces, Mapping) or not all(
        isinstance(entry, Subspace) for entry in subspaces.values()
    ):
        raise TypeError(
            f"osf_torch.{_OPERATOR}: expected subspaces to be a mapping from parameter name to "
            f"Subspace, got {type(subspaces).__name__}; refresh makes one"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"osf_torch.{_OPERATOR}: expected rank to be an int of at least 1 or None, got {rank!r}"
        )
    wrapped: nn.Module = peft_model.get_base_model()
    given = _factors_of(peft_model, wrapped)
    named = {_plain_name(name): entry for name, entry in subspaces.items()}
    if rank is None:
        rank = max(len(factors.A) for factors in given.values())
    # All that may be refused is, while the model is still PEFT's.
    settings = Settings("beside", rank, "start", None)
    layers = {f"{module_of(name)}.base_layer.weight": name for name in given}
    within = {name: wrapping for wrapping, name in layers.items()}
    places = admitted(wrapped, {within.get(name, name): of for name, of in named.items()}, settings)
    require_lora_layers(places, _OPERATOR)
    of_layers = {within[name]: factors for name, factors in given.items()}
    inside(places, of_layers, rank, _OPERATOR, project=project)

    model: nn.Module = peft_model.unload()
    confined = confine(model, named, rank=rank)
    found, _ = inside(confined.places, given, rank, _OPERATOR, project=True, told=False)
    write(confined.places, found, _OPERATOR)
    return model, confined


def _plain_name(name: str) -> str:
    """Of the base model, where a name is one within a PeftModel."""
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _factors_of(peft_model: Any, wrapped: nn.Module) -> dict[str, Factors]:
    """The factors of the one adapter, by the name of the weight in the base model."""
    adapters = list(peft_model.peft_config)
    if len(adapters) != 1:
        raise ValueError(
            f"osf_torch.{_OPERATOR}: expected one adapter, got {listed(adapters)}; "
            "delete_adapter() the others first"
        )
    adapter = adapters[0]
    # unload() keeps biases and modules_to_save as they were trained.
    config = peft_model.peft_config[adapter].to_dict()
    require_plain(config, _OPERATOR, kept=("bias", "modules_to_save"))
    layer = importlib.import_module("peft.tuners.lora.layer")
    found: dict[str, Factors] = {}
    for name, module in wrapped.named_modules():
        if not isinstance(module, layer.LoraLayer):
            continue
        base: Any = module
        if adapter not in base.lora_A or isinstance(module, layer.ParamWrapper):
            raise TypeError(
                f"osf_torch.{_OPERATOR}: expected LoRA layers of linear layers, got "
                f"{type(module).__name__} in {name!r}; merge the adapter into the model and "
                "confine that"
            )
        if base.merged:
            raise ValueError(
                f"osf_torch.{_OPERATOR}: expected layers that aren't merged, got {name!r}, which "
                "is; unmerge_adapter() first"
            )
        A, B = (half[adapter].weight.detach() for half in (base.lora_A, base.lora_B))
        found[f"{name}.weight"] = Factors(A, B, float(base.scaling[adapter]))
    if not found:
        raise ValueError(
            f"osf_torch.{_OPERATOR}: expected LoRA layers, got none in the model; make it by "
            "get_peft_model(model, LoraConfig(...))"
        )
    return found
