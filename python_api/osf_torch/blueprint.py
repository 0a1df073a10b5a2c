"""A model whose weights aren't there: its modules on the meta device, made of a config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

REMEDY = (
    "pass a folder with config.json, a config.json, a model type of transformers (such as "
    '"llama"), or in Python a model on the meta device'
)


def blueprint(given: nn.Module | str | os.PathLike[str] | object, operator: str) -> nn.Module:
    """The model itself, or one on the meta device: of a folder with a config.json, of such a file,
    of a config of transformers, or of a model type that it knows.

    Nothing is loaded from the network, and no weight from anywhere.

    Raises:
        ValueError: nothing of these, a name of a hub among it.
        ImportError: of a config where transformers isn't installed.
    """
    if isinstance(given, nn.Module):
        return given
    if isinstance(given, str | os.PathLike):
        return _of_config(_read(given, operator), operator)
    if hasattr(given, "model_type") and hasattr(given, "to_dict"):
        return _of_config(given, operator)
    raise ValueError(
        f"osf_torch.{operator}: expected a model or what says how one is built, got "
        f"{type(given).__name__}; {REMEDY}"
    )


def _transformers(operator: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"osf_torch.{operator}: expected transformers, which builds a model of its config, to "
            f"be importable, got {error}; install it, or pass a model on the meta device"
        ) from error
    return transformers


def _read(given: str | os.PathLike[str], operator: str) -> Any:
    path = Path(given)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and file.suffix == ".json":
        try:
            return _transformers(operator).AutoConfig.from_pretrained(
                str(file), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"osf_torch.{operator}: expected {str(file)!r} to be a config of transformers, got "
                f"{type(error).__name__}: {str(error).splitlines()[0]}; {REMEDY}"
            ) from error
    name = str(given)
    if not path.exists() and _is_type(name, operator):
        return _transformers(operator).AutoConfig.for_model(name)
    got = "a folder without one" if path.is_dir() else "none of these"
    if path.is_file():
        got = "another file"
    elif not path.exists() and name.count("/") == 1:
        got = "a name of a hub, of which nothing is here"
    raise ValueError(
        f"osf_torch.{operator}: expected a folder with config.json, a config.json or a model type "
        f"of transformers, got {name!r}, {got}; {REMEDY}"
    )


def _is_type(name: str, operator: str) -> bool:
    _transformers(operator)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return name in CONFIG_MAPPING


def _of_config(config: Any, operator: str) -> nn.Module:
    """On the meta device, in the dtype of the config; the class that it names first, else a causal
    language model where its type has one, else the bare model."""
    transformers = _transformers(operator)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with torch.device("meta"):
        if named is not None:
            model = named._from_config(config)
        elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = transformers.AutoModel.from_config(config)
    made: nn.Module = model
    dtype = getattr(config, "dtype", None)
    return made if dtype is None else made.to(dtype)
