"""A model of a checkpoint alone: names, shapes and dtypes by the headers of its safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from osf_torch.packing import Packed, mxfp4

INDEX = ".safetensors.index.json"
FILE = ".safetensors"
LENGTH_BYTES = 8  # of the length of a header, which a file begins with
LONGEST = 100_000_000  # bytes of a header, as safetensors has it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EMBEDDINGS = re.compile(r"emb|wte|wpe|shared", re.I)  # of the module that has a table


class Told(NamedTuple):
    """Of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint(nn.Module):
    """What a checkpoint holds, by its names."""


class Experts(nn.Module):
    """What has batches of matrices."""


class Others(nn.Module):
    """What has other parameters; of which kind isn't known."""


def is_checkpoint(path: Path) -> bool:
    """Whether headers say what the model is: a file of safetensors, its index, or a folder with
    either and without a config.json."""
    if path.is_dir():
        return not (path / "config.json").is_file() and bool(_files_in(path))
    return path.is_file() and path.name.endswith((FILE, INDEX))


def _files_in(folder: Path) -> list[Path]:
    """The index where there is one, else the files."""
    return sorted(folder.glob(f"*{INDEX}"))[:1] or sorted(folder.glob(f"*{FILE}"))


def model_of(
    path: Path, operator: str, *, dequantized: bool = False
) -> tuple[nn.Module, dict[int, Packed]]:
    """On the meta device, and which of its weights are quantized, by id.

    A 2-D ``weight`` is taken for that of a linear layer, unless its module is called after an
    embedding, and a 3-D parameter within modules called after experts for theirs.

    Raises:
        ValueError: no such file, or one that is no safetensors; an adapter's; a quantized weight
            whose shape its header doesn't say.
    """
    if path.is_dir() and (path / "adapter_config.json").is_file():
        raise ValueError(
            f"osf_torch.{operator}: expected a model's checkpoint, got {str(path)!r}, an adapter's "
            "folder; pass the folder of the model that it adapts"
        )
    tensors = _told(path, operator)
    if dequantized:
        tensors = _dequantized(tensors)
    held: dict[str, dict[str, Told]] = {}  # by module
    for name, told in tensors.items():
        _require_shape(name, told, operator)
        path_of, _, attribute = name.rpartition(".")
        held.setdefault(path_of, {})[attribute] = told
    _require_apart(tensors, operator)
    model = Checkpoint()
    packed: dict[int, Packed] = {}
    for path_of, own in held.items():
        module = _placed(model, path_of, held)
        for attribute, told in own.items():
            module._parameters[attribute] = parameter = _parameter(told)
            scale = own.get(f"{attribute}_scale_inv")
            if scale is not None and _is_float8(told):
                size = _nbytes(told) + _nbytes(scale)
                packed[id(parameter)] = Packed("float8 with scales", size, torch.float32)
            elif _is_mxfp4(attribute, own):  # of which the scales are a parameter of their own
                packed[id(parameter)] = mxfp4(_nbytes(told))
    return model, packed


def _is_float8(told: Told) -> bool:
    return told.dtype.is_floating_point and told.dtype.itemsize == 1


def _is_mxfp4(name: str, beside: Mapping[str, Told]) -> bool:
    """Whether it is what MXFP4 has its codes in: (E, out, in / 32, 16) bytes, with scales."""
    stem, suffix, rest = name.rpartition("_blocks")
    scaled = bool(suffix) and not rest and f"{stem}_scales" in beside
    return scaled and len(beside[name].shape) == 4


def _dequantized(tensors: Mapping[str, Told]) -> dict[str, Told]:
    """What a model loads dequantized, without scales; in bfloat16, where they say no dtype."""
    found: dict[str, Told] = {}
    for name, told in tensors.items():
        if _is_mxfp4(name, tensors):
            count, out, blocks, half = told.shape
            shape = (count, blocks * half * 2, out)
            found[name.removesuffix("_blocks")] = Told(torch.bfloat16, shape)
        elif f"{name}_scale_inv" in tensors and _is_float8(told):
            found[name] = Told(torch.bfloat16, told.shape)
        elif not any(
            name.endswith(suffix) and name.removesuffix(suffix) + of in tensors
            for suffix, of in (("_scale_inv", ""), ("_scales", "_blocks"))
        ):
            found[name] = told
    return found


def _nbytes(told: Told) -> int:
    return int(torch.Size(told.shape).numel()) * told.dtype.itemsize


def _require_apart(tensors: Mapping[str, Told], operator: str) -> None:
    """Refuses tensors under the name of another one."""
    for name in tensors:
        path = name.split(".")
        above = next((p for i in range(1, len(path)) if (p := ".".join(path[:i])) in tensors), None)
        if above is not None:
            raise ValueError(
                f"osf_torch.{operator}: expected a model's checkpoint, got one with a tensor "
                f"{above!r} and {name!r} under that name; pass the folder with its config.json"
            )


def _require_shape(name: str, told: Told, operator: str) -> None:
    """Refuses codes that don't say what shape the matrix has."""
    attribute = name.rpartition(".")[2]
    if attribute in ("weight", "qweight") and not told.dtype.is_floating_point:
        raise ValueError(
            f"osf_torch.{operator}: expected weights whose headers say the shape of their "
            f"matrices, got {name!r} of {told.dtype} with shape {told.shape}, which is quantized; "
            "pass the folder with its config.json"
        )


def _parameter(told: Told) -> nn.Parameter:
    trains = told.dtype.is_floating_point and told.dtype.itemsize > 1
    tensor = torch.empty(told.shape, dtype=told.dtype, device="meta")
    return nn.Parameter(tensor, requires_grad=trains)


def _placed(model: nn.Module, name: str, held: Mapping[str, Mapping[str, Told]]) -> nn.Module:
    """The module of that name, made with those around it where it isn't there."""
    module, path = model, name.split(".") if name else []
    for i, part in enumerate(path):
        child = module._modules.get(part)
        if child is None:
            child = _module(path[: i + 1], held.get(".".join(path[: i + 1]), {}))
            module.add_module(part, child)
        module = child
    return module


def _module(path: Sequence[str], own: Mapping[str, Told]) -> nn.Module:
    """Of the kind that its name and its parameters say, without these."""
    weight = own.get("weight")
    if any(len(told.shape) == 3 for told in own.values()) and any(
        "experts" in part.lower() for part in path
    ):
        return Experts()
    if weight is None or len(weight.shape) != 2:
        return Others()
    rows, columns = weight.shape
    if EMBEDDINGS.search(path[-1]):
        return nn.Embedding(rows, columns, device="meta")
    return nn.Linear(columns, rows, bias=False, device="meta")


# --- headers ---


def _told(path: Path, operator: str) -> dict[str, Told]:
    """Every tensor of a checkpoint, by name."""
    files = _files_in(path) if path.is_dir() else [path]
    if len(files) == 1 and files[0].name.endswith(INDEX):
        return _of_index(files[0], operator)
    found: dict[str, Told] = {}
    for file in files:
        found |= _header(file, operator)
    return found


def _of_index(index: Path, operator: str) -> dict[str, Told]:
    try:
        held: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / file for name, file in held.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"osf_torch.{operator}: expected {str(index)!r} to be an index of safetensors, got "
            f"{type(error).__name__}: {error}; load the file anew"
        ) from error
    headers = {file: _header(file, operator) for file in dict.fromkeys(files.values())}
    lost = [name for name, file in files.items() if name not in headers[file]]
    if lost:
        raise ValueError(
            f"osf_torch.{operator}: expected {files[lost[0]].name!r} to hold {lost[0]!r}, as "
            f"{index.name!r} says, got none; load the files anew"
        )
    return {name: headers[file][name] for name, file in files.items()}


def _header(file: Path, operator: str) -> dict[str, Told]:
    """Of one file; its tensors aren't read."""
    told = f"osf_torch.{operator}: expected {str(file)!r} to be a file of safetensors, got"
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            text = opened.read(length) if 0 < length <= LONGEST else b""
        held = json.loads(text) if len(text) == length else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{told} {type(error).__name__}: {error}; load the file anew") from error
    if not isinstance(held, dict):
        raise ValueError(f"{told} one that ends within its header; load the file anew")
    held.pop("__metadata__", None)
    unknown = {one["dtype"] for one in held.values()} - DTYPES.keys()
    if unknown:
        raise ValueError(
            f"{told} tensors of {', '.join(sorted(unknown))}, which isn't known; pass a folder "
            "with config.json, or a model on the meta device"
        )
    return {name: Told(DTYPES[one["dtype"]], tuple(one["shape"])) for name, one in held.items()}
