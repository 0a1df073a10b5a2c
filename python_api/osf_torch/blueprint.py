"""A model whose weights aren't there: on the meta device, made of a config or of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from osf_torch.headers import is_checkpoint, model_of
from osf_torch.packing import Packed, packed_by

REMEDY = (
    "pass a folder with config.json or with safetensors, a config.json, a .safetensors file or its "
    'index, a model type of transformers (such as "llama"), or in Python a model on the meta device'
)


OF_HEADERS = (
    "what the parameters are is told by names and shapes in the checkpoint alone: a 2-D weight is "
    "a linear layer's, unless its module is called after an embedding"
)


class Blueprint(NamedTuple):
    """Attributes:
    model: whose weights needn't be there.
    packed: what will be quantized of it, by the parameters' ids; what is quantized in a model that
        was given isn't among them.
    notes: what is to be known of it, in sentences.
    """

    model: nn.Module
    packed: dict[int, Packed]
    notes: list[str]


def blueprint(
    given: nn.Module | str | os.PathLike[str] | object,
    operator: str,
    *,
    dequantized: bool = False,
) -> Blueprint:
    """The model itself, or one on the meta device: of a folder with a config.json, of such a file,
    of a config of transformers, of a model type that it knows, or of what the headers of a
    checkpoint's safetensors say.

    Nothing is loaded from the network, and no weight from anywhere.

    Args:
        dequantized: whether the quantization that a config names is left out.

    Raises:
        ValueError: nothing of these, a name of a hub among it; a config that transformers can't
            build a model of, or whose quantization isn't known.
        ImportError: of a config where transformers isn't installed.
    """
    if isinstance(given, nn.Module):
        return Blueprint(given, {}, [])
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        if is_checkpoint(path):
            model, packed = model_of(path, operator, dequantized=dequantized)
            return Blueprint(model, _frozen(model, packed), [OF_HEADERS])
        given = _read(given, operator)
    if hasattr(given, "model_type") and hasattr(given, "to_dict"):
        model = _of_config(given, operator)
        if dequantized:
            return Blueprint(model, {}, [])
        return Blueprint(model, _frozen(model, packed_by(given, model, operator)), [])
    raise ValueError(
        f"osf_torch.{operator}: expected a model or what says how one is built, got "
        f"{type(given).__name__}; {REMEDY}"
    )


def _frozen(model: nn.Module, packed: dict[int, Packed]) -> dict[int, Packed]:
    """Freezes what is quantized, and where C can train beside that, all of the model, as PEFT
    prepares it."""
    beside = any(not one.refusal for one in packed.values())
    for parameter in model.parameters():
        if beside or id(parameter) in packed:
            parameter.requires_grad_(False)
    return packed


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
        f"osf_torch.{operator}: expected a folder with config.json or safetensors, a config.json, "
        f"a file of safetensors or a model type of transformers, got {name!r}, {got}; {REMEDY}"
    )


def _is_type(name: str, operator: str) -> bool:
    _transformers(operator)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return name in CONFIG_MAPPING


def _of_config(config: Any, operator: str) -> nn.Module:
    """On the meta device, in the dtype of the config; the class that it names first, else a causal
    language model where its type has one, else the bare model.

    Raises:
        ValueError: transformers can't.
    """
    transformers = _transformers(operator)
    try:
        return _built(transformers, config)
    except Exception as error:  # whatever the code of one of its models raises
        raise ValueError(
            f"osf_torch.{operator}: expected a config that transformers {transformers.__version__} "
            f"builds a model of on the meta device, got a {type(config).__name__} of which it says "
            f"{type(error).__name__}: {(str(error) or 'nothing').splitlines()[0]}; pass the "
            "checkpoint instead (a folder with safetensors and without config.json, a .safetensors "
            "file or its index), or in Python a model on the meta device"
        ) from error


def _built(transformers: Any, config: Any) -> nn.Module:
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
