"""Quantized weights: which kinds are known, and how each says the matrix that it stands for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from osf_torch.kinds import is_lazy, is_plain
from osf_torch.sharding import is_dtensor, local

KNOWN = (
    "bitsandbytes' Params4bit and Int8Params, torchao's tensors, weights of float8 with a "
    "_scale_inv beside them (transformers' FP8Linear and FP8Experts), _blocks with _scales of "
    "MXFP4 (gpt-oss), and tensor subclasses with a dequantize() of their own"
)
MX_BLOCK = 32  # values of MXFP4 that share a scale, two in a byte

LOAD_MXFP4 = "load it dequantized, of transformers by Mxfp4Config(dequantize=True)"

Owned = Sequence[tuple[nn.Module, str]]


@dataclass(frozen=True)
class Stored:
    """What a quantized parameter stands for.

    Attributes:
        kind: what it is, in words.
        shape: (m, n) of the matrix, or (E, m, n) of a batch of them.
        dtype: of the values: what the layer multiplies by, or float32.
        read: one matrix (m, n) by its index in the batch, by the function of its own library.
        tensors: all that it is stored in, which says whether two are the same.
        refusal: why it can't be read as it is now, and what to do; empty where it can.
        is_tensor: whether the parameter is a tensor of these values to torch's operators, so that
            what uses it runs with a plain one.
        remedy: how to have plain weights instead, where that is known.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int], Tensor]
    tensors: Callable[[], Iterable[Tensor]]
    refusal: str = ""
    is_tensor: bool = False
    remedy: str = ""

    def require(self, name: str, operator: str) -> None:
        """Refuses a parameter ``name`` that can't be read as it is now.

        Raises:
            TypeError: so it is.
        """
        if self.refusal:
            raise TypeError(
                f"osf_torch.{operator}: expected parameter {name!r} to be dequantized, got "
                f"{self.kind} that {self.refusal}"
            )

    @torch.no_grad()
    def matrix(self, name: str, index: int, operator: str) -> Tensor:
        """The values of one matrix of the parameter ``name``.

        Raises:
            TypeError: it can't be read, or its library reads another shape than it says.
        """
        expected = f"osf_torch.{operator}: expected parameter {name!r} to be dequantized"
        self.require(name, operator)
        try:
            found = self.read(index)
        except torch.cuda.OutOfMemoryError:
            raise
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{expected} by {self.kind}, got {type(error).__name__}: {error}; leave it out by "
                "filter=, or dequantize it"
            ) from error
        if tuple(found.shape) != self.shape[-2:]:
            raise TypeError(
                f"{expected} to shape {self.shape[-2:]} by {self.kind}, got {tuple(found.shape)}; "
                "leave it out by filter=, or dequantize it"
            )
        return found.to(self.dtype)

    def values(self, name: str, operator: str, first: int = 0, count: int = 1) -> Tensor:
        """(m, n) of a matrix, (count, m, n) of a batch from ``first`` on; read one by one.

        Raises:
            TypeError: as ``matrix``.
        """
        if len(self.shape) == 2:
            return self.matrix(name, 0, operator)
        found = self.matrix(name, first, operator)
        all_of_them = found.new_empty(count, *found.shape)
        for i in range(count):
            all_of_them[i] = found if i == 0 else self.matrix(name, first + i, operator)
        return all_of_them


def stored(weight: Tensor, owned: Owned) -> Stored | None:
    """What a parameter stands for that is quantized in a known way; None of any other.

    Args:
        owned: the modules that have the parameter, and as what: scales may stand beside it.
    """
    if is_lazy(weight) or weight.is_meta:
        return None
    if is_dtensor(weight):
        return _sharded(weight, owned)
    for known in (_bits4, _int8, _nf4, _float8, _mxfp4, _subclass):
        found = known(weight, owned)
        if found is not None:
            return found
    return None


def stored_whole(
    parameters: Mapping[str, Tensor | None], module: nn.Module, attribute: str
) -> Stored | None:
    """What a sharded parameter of codes stands for, with its scales; a collective.

    Args:
        parameters: of the module, as they are sharded.
    """
    weight = parameters[attribute]
    if weight is None or not _is_codes(weight):
        return None if weight is None else stored(weight, [(module, attribute)])
    gathered = nn.Module()
    for setting in ("block_size", "n_groups"):
        if hasattr(module, setting):
            setattr(gathered, setting, getattr(module, setting))
    for name in (attribute, f"{attribute}_scale_inv"):
        held = parameters.get(name)
        if held is not None:
            gathered.register_parameter(name, nn.Parameter(_whole(held), requires_grad=False))
    return stored(gathered.get_parameter(attribute), [(gathered, attribute)])


def _whole(held: Any) -> Tensor:
    """All of a parameter; of one byte a number by its bytes, since backends gather no float8."""
    held = held.detach()
    if not is_dtensor(held) or held.element_size() > 1:
        found: Tensor = held.full_tensor() if is_dtensor(held) else held
        return found
    from torch.distributed.tensor import DTensor

    bytes_of: Any = DTensor.from_local(
        local(held).view(torch.uint8),
        held.device_mesh,
        held.placements,
        run_check=False,
        shape=held.shape,
        stride=held.stride(),
    )
    whole: Tensor = bytes_of.full_tensor().view(held.dtype)
    return whole


def _is_codes(weight: Tensor) -> bool:
    """Whether it is a DTensor of float8."""
    if not (is_dtensor(weight) and is_plain(local(weight))):
        return False
    return weight.is_floating_point() and weight.element_size() == 1


def is_scale(owned: Owned) -> bool:
    """Whether the parameter is the scale of a quantized weight beside it, and no weight itself."""
    return any(
        module._parameters.get(attribute.removesuffix(suffix) + of) is not None
        for module, attribute in owned
        for suffix, of in (("_scale_inv", ""), ("_scales", "_blocks"))
        if attribute.endswith(suffix)
    )


def unheld(module: nn.Module) -> tuple[str, ...]:
    """The weights that a module holds in no parameter, packed for kernels of its own: transformers'
    experts of gpt-oss in MXFP4, once they are loaded."""
    if not any(
        kind.__name__ == "Mxfp4GptOssExperts" and kind.__module__.split(".")[0] == "transformers"
        for kind in type(module).__mro__
    ):
        return ()
    names = ("gate_up_proj", "down_proj")
    return tuple(name for name in names if name in module.__dict__)


def _is_of(weight: Tensor, package: str, name: str) -> bool:
    """Whether it is of a peer's class, told by the class's name: nothing is imported for it."""
    return any(
        kind.__name__ == name and kind.__module__.split(".")[0] == package
        for kind in type(weight).__mro__
    )


def _sharded(weight: Tensor, owned: Owned) -> Stored | None:
    """A DTensor whose values torch's operators don't read, or that holds codes."""
    packed = any(
        kind.__name__ == "Linear4bit" and kind.__module__.split(".")[0] == "bitsandbytes"
        for module, _ in owned
        for kind in type(module).__mro__
    )
    if is_plain(local(weight)) and not (packed or _is_codes(weight)):
        return None
    refusal = "is sharded; refresh and confine the model before it is sharded"
    shape = tuple(weight.shape)
    return Stored("a quantized weight", shape, torch.float32, _none, tuple, refusal)


# --- bitsandbytes ---


def _bits4(weight: Any, owned: Owned) -> Stored | None:
    """NF4 and FP4, packed as (k, 1) with what unpacks it in ``quant_state``."""
    if not _is_of(weight, "bitsandbytes", "Params4bit"):
        return None
    state, kind = weight.quant_state, "bitsandbytes' Params4bit"
    if state is None:
        refusal = "isn't quantized yet; move the model to its device first, which quantizes it"
        return Stored(kind, tuple(weight.shape), weight.dtype, _none, tuple, refusal)
    refusal = ""
    if getattr(state, "packing_format_for_cpu", False):
        refusal = (
            "was packed anew for inference on the CPU, which rounds its scales: a call in eval "
            "mode without gradients does so; load the model anew, and call it in train mode"
        )

    def read(_: int) -> Tensor:
        functional = importlib.import_module("bitsandbytes.functional")
        found: Tensor = functional.dequantize_4bit(weight.data, state)
        return found

    def tensors() -> Iterator[Tensor]:
        yield from (weight.data, state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)

    return Stored(kind, tuple(state.shape), state.dtype, read, tensors, refusal)


def _int8(weight: Any, owned: Owned) -> Stored | None:
    """LLM.int8(): codes, and a scale a row, which the layer takes to itself when it is called."""
    if not _is_of(weight, "bitsandbytes", "Int8Params") or weight.has_fp16_weights:
        return None  # or trained in half precision, and plain
    states = [getattr(module, "state", None) for module, _ in owned]
    scales = [weight.SCB, *(getattr(state, "SCB", None) for state in states)]
    scale: Any = next((s for s in scales if s is not None), None)
    refusal = ""
    if weight.dtype != torch.int8 or scale is None:
        refusal = "isn't quantized yet; move the model to its device first, which quantizes it"

    def read(_: int) -> Tensor:
        functional = importlib.import_module("bitsandbytes.functional")
        found: Tensor = functional.int8_vectorwise_dequant(weight.data, scale)
        return found

    return Stored(
        "bitsandbytes' Int8Params",
        tuple(weight.shape),
        torch.float32,
        read,
        lambda: (weight.data, scale),
        refusal,
    )


def _none(_: int) -> Tensor:
    raise TypeError("it has no values yet")


# --- torchao, and whatever dequantizes itself ---


def _nf4(weight: Any, owned: Owned) -> Stored | None:
    """Whose ``dequantize`` is something else."""
    if not _is_of(weight, "torchao", "NF4Tensor"):
        return None
    return Stored(
        "torchao's NF4Tensor",
        tuple(weight.shape),
        weight.dtype,
        lambda _: weight.get_original_weight(),
        lambda: _inner(weight),
        is_tensor=True,
    )


def _subclass(weight: Any, owned: Owned) -> Stored | None:
    kind = type(weight)
    if is_plain(weight) or getattr(kind, "dequantize", None) is Tensor.dequantize:
        return None
    if not 2 <= weight.dim() <= 3:
        return None
    shape = tuple(weight.shape)
    is_known = weight.is_floating_point() and weight.element_size() > 1
    dtype: torch.dtype = weight.dtype if is_known else torch.float32

    def read(index: int) -> Tensor:
        found: Tensor = (weight if len(shape) == 2 else weight[index]).dequantize()
        return found

    def tensors() -> Iterator[Tensor]:
        if hasattr(weight, "__tensor_flatten__"):
            yield from _inner(weight)
        else:
            yield from (read(i) for i in range(1 if len(shape) == 2 else shape[0]))

    named = f"{kind.__module__.split('.')[0]}'s {kind.__name__}"
    return Stored(named, shape, dtype, read, tensors, is_tensor=True)


def _inner(weight: Any) -> Iterator[Tensor]:
    """The plain tensors that a subclass is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    names, _ = weight.__tensor_flatten__()
    for name in names:
        held = getattr(weight, name)
        if held is not None:
            yield from _inner(held)


# --- a plain tensor of codes, with scales beside it in its module ---


def _float8(weight: Any, owned: Owned) -> Stored | None:
    """Float8 with a scale a block, or one for all of a matrix: W = codes · scale, as transformers'
    FP8Linear multiplies.

    Its own converter reads the block's size off the grid of scales, which is another one where the
    last block isn't full; the size that the module says is right.
    """
    if not (weight.is_floating_point() and weight.element_size() == 1 and is_plain(weight)):
        return None
    beside = (
        (module, module._parameters.get(f"{attribute}_scale_inv")) for module, attribute in owned
    )
    module, scale = next(((m, s) for m, s in beside if s is not None), (None, None))
    if scale is None or not 2 <= weight.dim() <= 3:
        return None
    *lead, m, n = shape = tuple(weight.shape)
    size: Any = getattr(module, "block_size", None)
    rows, columns = (m, n) if size is None else (int(size[0]), int(size[1]))
    grid = (*lead, -(-m // rows), -(-n // columns))
    refusal = ""
    if not scale.is_floating_point() or (tuple(scale.shape) != grid and scale.numel() != 1):
        refusal = (
            f"has scales {tuple(scale.shape)} of {scale.dtype} where blocks of {rows} by {columns} "
            f"take {grid} of a floating-point dtype; load it dequantized"
        )
    elif getattr(module, "n_groups", 1) > 1:
        refusal = "is the weight of a grouped layer, several matrices in one; leave it out"

    def read(index: int) -> Tensor:
        codes, scales = weight.detach(), scale.detach().float()
        if lead:
            codes = codes[index]
            scales = scales[index] if scales.dim() == 3 else scales
        found: Tensor = codes.float()
        if scales.numel() == 1:
            return found * scales.reshape(())
        by_row = scales.repeat_interleave(rows, -2)[:m]
        for i in range(by_row.shape[-1]):
            found[:, i * columns : (i + 1) * columns] *= by_row[:, i : i + 1]
        return found

    return Stored(
        f"a weight of {weight.dtype} with a scale",
        shape,
        torch.float32,
        read,
        lambda: (weight.detach(), scale.detach()),
        refusal,
        remedy="load it dequantized, of transformers by FineGrainedFP8Config(dequantize=True)",
    )


def _mxfp4(weight: Any, owned: Owned) -> Stored | None:
    """Experts of gpt-oss: (E, out, in / 32, 16) bytes and an exponent for each 32 values, read as
    transformers reads them, (E, in, out)."""
    found = (
        module._parameters.get(attribute.removesuffix("_blocks") + "_scales")
        for module, attribute in owned
        if attribute.endswith("_blocks")
    )
    scales = next((s for s in found if s is not None), None)
    if scales is None or weight.dim() != 4 or weight.dtype != torch.uint8:
        return None
    count, out, blocks, _ = weight.shape

    def read(index: int) -> Tensor:
        peer = importlib.import_module("transformers.integrations.mxfp4")
        one = slice(index, index + 1)
        # Releases differ in whether it is turned, which a square matrix wouldn't tell: a row does.
        row = peer.convert_moe_packed_tensors(weight.detach()[one, :1], scales.detach()[one, :1])
        converted: Tensor = peer.convert_moe_packed_tensors(
            weight.detach()[one], scales.detach()[one]
        )
        return converted[0] if row.shape[1] == blocks * MX_BLOCK else converted[0].mT

    return Stored(
        "experts of MXFP4",
        (count, blocks * MX_BLOCK, out),
        torch.bfloat16,  # exact: four bits times a power of two
        read,
        lambda: (weight.detach(), scales.detach()),
        remedy=LOAD_MXFP4,
    )
