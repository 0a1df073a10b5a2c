"""LoRA adapters in PEFT's files, of a model that is confined with a rank; PEFT isn't needed.

``confine(model, subspaces, rank=s)`` trains W = W₀ + U_l B A V_lᵀ, which is a LoRA with the factors

    lora_B = U_l B (m, s),  lora_A = A V_lᵀ (s, n),  scaling 1.

:func:`save_adapter` writes these as PEFT does, so that whatever serves LoRA adapters serves them::

    confined = osf_torch.confine(model, subspaces, rank=16)
    ...
    lora.save_adapter(confined, "adapter")
    model = peft.PeftModel.from_pretrained(base, "adapter")

:func:`load_adapter` takes an adapter back into a confined model: A = lora_A V_l and
B = scaling · U_lᵀ lora_B. What an adapter has outside of the free block is projected away, and only
if that is asked for. ``osf_torch.integrations.peft.confine_lora`` does the same to a LoRA model of
PEFT's in memory.

Source: LoRA, arXiv 2106.09685; OPLoRA, arXiv 2510.13003, of which these are the adapters that no
optimizer makes leak; the format is that of PEFT 0.21.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osf_torch.confined import Confined
from osf_torch.free.spec import WRAPPED
from osf_torch.integrations._lora import (
    Factors,
    ambient_factors,
    inside,
    log,
    module_of,
    of_pattern,
    require_lora_layers,
    require_plain,
    write,
)
from osf_torch.kinds import is_conv1d
from osf_torch.selection import listed, named_weights
from osf_torch.storage import require_safetensors, together

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

__all__ = ["load_adapter", "save_adapter"]


# A weight that a state was taken from and put back to is off by rounding of its dtype, 4e-3 of half
# precision; one that was trained by more.
BASE_LIMIT = 5e-3


def _require_base(confined: Confined, operator: str) -> None:
    """Refuses weights that something has loaded since they were confined."""
    moved = confined.base_moved()
    name = max(moved, key=lambda key: moved[key], default="")
    if name and not moved[name] <= BASE_LIMIT:
        raise ValueError(
            f"osf_torch.{operator}: expected the weights that were confined, to which the adapter "
            f"is added, got others, such as {name!r}, off by {moved[name]:.1e}: a state was loaded "
            "since; load what Confined.state_dict() was when that was saved, or save the model"
        )


def save_adapter(
    confined: Confined,
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes a LoRA adapter that PEFT loads: adapter_config.json and adapter_model.safetensors.

    The config has r and lora_alpha s, so that the scaling is 1, and as target_modules exactly the
    confined modules (a regular expression where their names in a list would match others too). The
    tensors are ``base_model.model.MODULE.lora_A.weight`` (s, inputs) and ``lora_B.weight``
    (outputs, s), computed in float64 and rounded once to the dtype of the factors. On the model as
    it was confined the adapter gives the outputs of the confined model, to rounding.

    What else was trained isn't in an adapter: parameters that require a gradient beside the
    confined weights are named in a log line.

    Args:
        confined: of ``confine(..., rank=s)``.
        directory: is made where there is none; files of these names are replaced.
        base_model: base_model_name_or_path, by which PEFT finds the base; None for what a
            transformers model says of itself.
        task_type: of PEFT's, such as "CAUSAL_LM".

    Raises:
        ImportError: the package safetensors isn't installed.
        ValueError: confined without a rank, whose C has no factors; weights that aren't those that
            were confined, to which the adapter doesn't belong.
        TypeError: confined is none; weights of other layers than nn.Linear, Conv1D and quantized
        linear ones.
        RuntimeError: the model was released; another rank failed.

    Mutates nothing but the files. Of sharded weights all ranks call it, and the first writes.
    Synchronises.
    """
    operator = "integrations.lora.save_adapter"
    if not isinstance(confined, Confined):
        raise TypeError(
            f"osf_torch.{operator}: expected confined to be what confine() returned, got "
            f"{type(confined).__name__}"
        )
    places = confined.places
    _require_rank(confined, operator)
    require_lora_layers(places, operator)
    _require_base(confined, operator)
    save_file = require_safetensors(operator, "torch").save_file
    _tell_others(confined, operator)
    tensors: dict[str, Tensor] = {}
    for place in places:
        factors = ambient_factors(place)
        key = f"base_model.model.{module_of(place.name)}"
        tensors[f"{key}.lora_A.weight"] = factors.A.cpu()
        tensors[f"{key}.lora_B.weight"] = factors.B.cpu()
    if base_model is None:
        base_model = getattr(getattr(confined.model, "config", None), "name_or_path", None) or None
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": confined.rank,
        "lora_alpha": confined.rank,
        "lora_dropout": 0.0,
        "target_modules": _targets(confined),
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(place.module) for place in places),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    folder = Path(directory)
    with together(confined.model, operator) as ranks:
        if ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config, indent=2, ensure_ascii=False)
            _replace(folder / TENSORS, lambda path: save_file(tensors, path, {"format": "pt"}))
            _replace(folder / CONFIG, lambda path: path.write_text(text, "utf-8"))


def load_adapter(
    confined: Confined, directory: str | os.PathLike[str], *, project: bool = False
) -> dict[str, float]:
    """Takes a LoRA adapter of PEFT's into the factors: A = lora_A V_l, B = scaling · U_lᵀ lora_B.

    The scaling is lora_alpha / r, or lora_alpha / √r with use_rslora, by alpha_pattern and
    rank_pattern. An adapter of rank r below s fills the first r of s; there B is zero for the
    others, and A as it was drawn, so that they can be trained. B of a confined weight that the
    adapter has nothing for is zero, which a log line says.

    Args:
        confined: of ``confine(..., rank=s)``, of the model that the adapter was trained on.
        directory: with adapter_config.json and adapter_model.safetensors.
        project: leave out what the adapter has outside of the free blocks, which a plain LoRA has;
            a log line says how much of each. Without it that is an error beyond rounding.

    Returns:
        By the name of the weight, the share ‖ΔW − U_l B A V_lᵀ‖ / ‖ΔW‖ that is left out.

    Raises:
        ImportError: the package safetensors isn't installed.
        FileNotFoundError: the files aren't there.
        ValueError: confined without a rank; an adapter that isn't a plain LoRA (DoRA and others,
            biases, further modules, one that changed the base's weights); of modules that aren't
            confined, of other shapes or a higher rank; not finite; outside of the free blocks;
            nothing is changed.
        TypeError: weights of other layers than nn.Linear, Conv1D and quantized linear ones.
        RuntimeError: the model was released.

    Mutates B and A in place, so that an optimizer may be kept; its moments are of what they were.
    Whether the base is the one that the adapter was trained on isn't in its files, and not
    checked. Synchronises. Of sharded weights all ranks call it.
    """
    operator = "integrations.lora.load_adapter"
    places = confined.places
    rank = _require_rank(confined, operator)
    require_lora_layers(places, operator)
    with together(confined.model, operator):
        given = _read(Path(directory), operator)
        found, shares = inside(places, given, rank, operator, project=project)
    write(places, found, operator)
    return shares


def _require_rank(confined: Confined, operator: str) -> int:
    if confined.rank is None:
        raise ValueError(
            f"osf_torch.{operator}: expected a model confined with a rank, got all of C, which has "
            "no factors; confine(..., rank=s), or save model.state_dict()"
        )
    return confined.rank


# --- writing ---


def _tell_others(confined: Confined, operator: str) -> None:
    """What is trained beside the confined weights, in one line at WARNING, if there is anything."""
    others = [n for n, p in named_weights(confined.model).items() if p.requires_grad]
    if others:
        log.warning(
            "osf_torch.%s: the adapter has the confined weights alone, and not %s, which are "
            "trained beside them; save model.state_dict() too if they were, or freeze them",
            operator,
            listed(others, 6),
        )


def _targets(confined: Confined) -> Sequence[str] | str:
    """target_modules that match these modules and no other: PEFT takes names in a list for the
    ends of longer ones too."""
    targets = sorted({module_of(place.name) for place in confined.places})
    modules = {
        ".".join(part for part in name.split(".") if part not in WRAPPED)
        for name, _ in confined.model.named_modules()
    }
    ends = tuple(f".{target}" for target in targets)
    if any(name.endswith(ends) for name in modules.difference(targets)):
        return "|".join(map(re.escape, targets))
    return targets


def _replace(path: Path, save: Any) -> None:
    """Writes a file in one step, so that it never holds half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- reading ---


def _read(folder: Path, operator: str) -> dict[str, Factors]:
    """An adapter's factors by the name of the weight, on the CPU."""
    safe_open = require_safetensors(operator).safe_open
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"osf_torch.{operator}: expected {CONFIG} and {TENSORS} in {folder}, got no "
                f"{name}; PEFT's save_pretrained(directory) writes both"
            )
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"osf_torch.{operator}: expected {folder / CONFIG} to be JSON, got {error}; save the "
            "adapter again"
        ) from error
    if not isinstance(config, Mapping):
        raise ValueError(
            f"osf_torch.{operator}: expected {folder / CONFIG} to hold a LoraConfig, got "
            f"{type(config).__name__}; save the adapter again"
        )
    require_plain(config, operator)
    try:
        file = safe_open(folder / TENSORS, framework="pt")
    except Exception as error:  # safetensors has an exception of its own for a bad header
        raise ValueError(
            f"osf_torch.{operator}: expected {folder / TENSORS} to be a safetensors file, got one "
            f"that can't be read ({error}); save the adapter again"
        ) from error
    halves: dict[str, dict[str, Tensor]] = {}
    with torch.device("cpu"), file as tensors:
        matched = {key: _KEY.fullmatch(key) for key in list(tensors.keys())}
        others = [key for key, match in matched.items() if match is None]
        if others:
            raise ValueError(
                f"osf_torch.{operator}: expected lora_A and lora_B of linear layers alone, got "
                f"{listed(others)} in {folder / TENSORS}; merge the adapter into the model and "
                "confine that"
            )
        for key, match in matched.items():
            assert match is not None
            halves.setdefault(match["module"], {})[match["factor"]] = tensors.get_tensor(key)
    found = {}
    for module, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(
                f"osf_torch.{operator}: expected lora_A and lora_B of {module!r}, got "
                f"lora_{next(iter(pair))} alone; the file is damaged, save the adapter again"
            )
        scaling = _scaling(config, module, pair["A"], operator)
        found[f"{module}.weight"] = Factors(pair["A"], pair["B"], scaling)
    return found


def _scaling(config: Mapping[str, Any], module: str, A: Tensor, operator: str) -> float:
    rank = of_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if rank != A.shape[0] or not isinstance(alpha, int | float):
        raise ValueError(
            f"osf_torch.{operator}: expected r to be the rank of lora_A of {module!r}, "
            f"{A.shape[0]}, and lora_alpha a number, got {rank!r} and {alpha!r} in {CONFIG}; save "
            "the adapter again"
        )
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
