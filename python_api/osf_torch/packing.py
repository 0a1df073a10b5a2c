"""How many bytes a quantized weight will be, by the quantization that a model's config names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from osf_torch.kinds import EXPERTS, is_conv1d
from osf_torch.quantized import LOAD_MXFP4, Stored

KNOWN = "bitsandbytes in 4 or 8 bits, fp8 and mxfp4"
BLOCK = 64  # values of NF4 and FP4 that share a scale
NESTED = 256  # of these scales that share one, where they are quantized too
CODES = {True: 16 + 256, False: 16}  # numbers of the tables, of nested ones both


@dataclass(frozen=True)
class Packed:
    """What a quantized weight is held in.

    Attributes:
        kind: in words.
        nbytes: of codes and scales.
        dtype: of the values that ``refresh`` reads.
        refusal: why nothing can be trained beside it, and what to do; empty where it can.
    """

    kind: str
    nbytes: int
    dtype: torch.dtype
    refusal: str = ""

    @classmethod
    def of(cls, stored: Stored) -> Packed:
        """Of a weight that is there."""
        return cls(stored.kind, sum(t.nbytes for t in stored.tensors()), stored.dtype)


def packed_by(config: Any, model: nn.Module, operator: str) -> dict[int, Packed]:
    """The weights that a config of transformers quantizes as the model is loaded, by id; none where
    it names no quantization.

    Args:
        config: whose ``quantization_config`` is a dict or one of transformers' own.
        model: made of it, on the meta device, unquantized.

    Raises:
        ValueError: a quantization that isn't known.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return {}
    said: Mapping[str, Any] = given if isinstance(given, Mapping) else given.to_dict()
    if said.get("dequantize"):
        return {}
    method = _method(said)
    makers: dict[str, Callable[..., Packed | None]] = {
        "bitsandbytes 4": _bits4,
        "bitsandbytes 8": _bits8,
        "fp8": _float8,
        "mxfp4": _mxfp4,
    }
    if method not in makers:
        raise ValueError(
            f"osf_torch.{operator}: expected a config that is quantized by {KNOWN}, or not at all, "
            f"got quant_method={method!r}; pass weights= (--dtype) to count the model loaded "
            "dequantized"
        )
    kept = _kept(said, model)
    found: dict[int, Packed] = {}
    for name, module in model.named_modules():
        if _is_kept(name, kept):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() in (2, 3):
                packed = makers[method](module, name, attribute, parameter, said)
                if packed is not None:
                    found[id(parameter)] = packed
    return found


def _method(said: Mapping[str, Any]) -> str:
    method = said.get("quant_method", "bitsandbytes" if "load_in_4bit" in said else None)
    named = str(getattr(method, "value", method))
    if named != "bitsandbytes":
        return named
    if said.get("load_in_4bit"):
        return "bitsandbytes 4"
    return "bitsandbytes 8" if said.get("load_in_8bit") else named


def _kept(said: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The modules that aren't converted: those that are named, else the head, as transformers has
    it, with what it keeps in float32."""
    named = said.get("modules_to_not_convert") or said.get("llm_int8_skip_modules")
    if named is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        named = [name for name, module in model.named_modules() if module is head]
    return [*named, *(getattr(model, "_keep_in_fp32_modules", None) or ())]


def _is_kept(name: str, patterns: Iterable[str]) -> bool:
    """As transformers matches them: from the start up to a dot, as a pattern, or as the end."""
    return any(
        re.match(rf"(?:{pattern})(?=\.|$)", name) or name.endswith(pattern) for pattern in patterns
    )


def _is_linear(module: nn.Module, attribute: str) -> bool:
    return attribute == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module))


def _bits4(
    module: nn.Module, name: str, attribute: str, weight: Tensor, said: Mapping[str, Any]
) -> Packed | None:
    if not _is_linear(module, attribute):
        return None
    count = weight.numel()
    blocks = -(-count // BLOCK)
    nested = bool(said.get("bnb_4bit_use_double_quant"))
    scales = blocks + 4 * -(-blocks // NESTED) + 4 if nested else 4 * blocks  # with an offset
    nbytes = -(-count // 2) + scales + 4 * CODES[nested]
    kind = f"bitsandbytes' {said.get('bnb_4bit_quant_type', 'fp4')}"
    return Packed(kind, nbytes, weight.dtype)


def _bits8(
    module: nn.Module, name: str, attribute: str, weight: Tensor, said: Mapping[str, Any]
) -> Packed | None:
    if not _is_linear(module, attribute):
        return None
    nbytes = weight.numel() + 4 * weight.shape[0]
    return Packed("bitsandbytes' LLM.int8()", nbytes, torch.float32)


def _float8(
    module: nn.Module, name: str, attribute: str, weight: Tensor, said: Mapping[str, Any]
) -> Packed | None:
    if not (_is_linear(module, attribute) or _is_experts(name, weight)):
        return None
    block = said.get("weight_block_size") or weight.shape[-2:]
    grid = math.prod(-(-size // by) for size, by in zip(weight.shape[-2:], block, strict=True))
    scales = grid * math.prod(weight.shape[:-2]) * (1 if said.get("scale_fmt") == "ue8m0" else 4)
    return Packed("float8 with scales", weight.numel() + scales, torch.float32)


def _mxfp4(
    module: nn.Module, name: str, attribute: str, weight: Tensor, said: Mapping[str, Any]
) -> Packed | None:
    """Bytes of two codes, and of an exponent for 32 of them."""
    if not _is_experts(name, weight):
        return None
    return mxfp4(weight.numel() // 2 + weight.numel() // 32)


def mxfp4(nbytes: int) -> Packed:
    refusal = f"is packed for kernels that nothing can be added to; {LOAD_MXFP4}"
    return Packed("experts of MXFP4", nbytes, torch.bfloat16, refusal)


def _is_experts(name: str, weight: Tensor) -> bool:
    return weight.dim() == 3 and bool(EXPERTS.search(name.rpartition(".")[2]))
