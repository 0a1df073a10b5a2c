"""Quantized linear layers: a stand-in that runs everywhere, and those of peers where they import.

Every maker gives a layer (n inputs, m outputs) whose weight has a well defined top subspace, and
what it stands for in float64, not by the function that ``osf_torch.quantized`` calls.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.small_experts import experts_model
from tests.small_refresh import linear

Made = tuple[nn.Module, Tensor]


class Scaled(torch.Tensor):
    """Codes of int8 and a scale a row: float32 to the eye, which torch's operators don't read."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight):
        scale = weight.detach().abs().amax(-1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        W = args[0]
        aten = torch.ops.aten
        same = function is aten.view.default and tuple(args[1]) == tuple(W.shape)
        if same or function in (aten.detach.default, aten.alias.default):
            return cls(W.codes, W.scale)
        if function is aten.select.int:
            return cls(W.codes.select(*args[1:]), W.scale.select(*args[1:]))
        raise NotImplementedError(f"{function} of scaled weights")


class ScaledLinear(nn.Linear):
    """Multiplies by what its weight stands for."""

    def forward(self, x):
        return F.linear(x, self.weight.dequantize(), self.bias)


class Float8Linear(nn.Linear):
    """As transformers' FP8Linear holds its weight, with a forward pass that the CPU runs."""

    def __init__(self, weight: Tensor, size: int | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.block_size = None if size is None else (size, size)
        grid = (weight.shape[0], weight.shape[1]) if size is None else (size, size)
        blocks = _blocks(weight, grid)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
        codes = codes[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = scale.reshape(()) if size is None else scale
        self.weight_scale_inv = nn.Parameter(scale.float(), requires_grad=False)

    def forward(self, x):
        return F.linear(x, exact_float8(self).to(x.dtype), self.bias)


def _blocks(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """(rows of blocks, rows, columns of blocks, columns), with zeros at the ends."""
    m, n = weight.shape
    rows, columns = -(-m // size[0]), -(-n // size[1])
    padded = F.pad(weight.detach(), (0, columns * size[1] - n, 0, rows * size[0] - m))
    return padded.reshape(rows, size[0], columns, size[1])


def exact_float8(layer: Float8Linear) -> Tensor:
    """Every code times the scale of its block, in float64."""
    codes, scale = layer.weight.detach().double(), layer.weight_scale_inv.detach().double()
    if layer.block_size is None:
        return codes * scale
    size = layer.block_size[0]
    i, j = (torch.arange(side) // size for side in codes.shape)
    return codes * scale[i[:, None], j[None]]


def exact_int8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double()


def scaled(n: int, m: int, key: object) -> Made:
    layer = ScaledLinear(n, m)
    layer.weight = nn.Parameter(Scaled.of(linear(m, n, key).weight), requires_grad=False)
    return layer, exact_int8(layer.weight.codes, layer.weight.scale)


def float8(n: int, m: int, key: object) -> Made:
    layer = Float8Linear(linear(m, n, key).weight, 12)  # the last block isn't full
    return layer, exact_float8(layer)


def float8_of_one_scale(n: int, m: int, key: object) -> Made:
    layer = Float8Linear(linear(m, n, key).weight, None)
    return layer, exact_float8(layer)


def peer(name: str) -> ModuleType:
    """The package, or the test is skipped; what it warns of when it is imported is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.split(".")[0], reason=f"{name} isn't installed")
        return importlib.import_module(name)


def run_on_identity(layer: nn.Module, n: int) -> Tensor:
    """W of a layer, from what it makes of the unit vectors."""
    with torch.no_grad():
        return (layer(torch.eye(n)) - (0 if layer.bias is None else layer.bias)).mT.double()


def _bits4(n: int, m: int, key: object, **options) -> Made:
    bnb = peer("bitsandbytes")
    layer = bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, **options)
    layer.weight.data = linear(m, n, key).weight.detach()
    layer = layer.to("cpu")
    return layer, run_on_identity(layer, n)


def nf4(n: int, m: int, key: object) -> Made:
    return _bits4(n, m, key, quant_type="nf4", compress_statistics=False)


def nf4_twice(n: int, m: int, key: object) -> Made:
    return _bits4(n, m, key, quant_type="nf4", compress_statistics=True)


def fp4_in_bfloat16(n: int, m: int, key: object) -> Made:
    return _bits4(n, m, key, quant_type="fp4", quant_storage=torch.bfloat16)


def int8(n: int, m: int, key: object) -> Made:
    bnb = peer("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False, bias=False)
    layer.weight.data = linear(m, n, key).weight.detach()
    layer = layer.to("cpu")
    return layer, exact_int8(layer.weight.CB, layer.weight.SCB[:, None] / 127)


def _torchao(n: int, m: int, key: object, config: str) -> Made:
    quantization = peer("torchao.quantization")
    layer = nn.Linear(n, m)
    layer.weight.data.copy_(linear(m, n, key).weight.detach())
    quantization.quantize_(layer, getattr(quantization, config)())
    return layer, run_on_identity(layer, n)


def torchao_float8(n: int, m: int, key: object) -> Made:
    return _torchao(n, m, key, "Float8WeightOnlyConfig")


def torchao_int8(n: int, m: int, key: object) -> Made:
    return _torchao(n, m, key, "Int8WeightOnlyConfig")


def torchao_nf4(n: int, m: int, key: object) -> Made:
    module = peer("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = nn.Linear(n, m, bias=False)
    packed = module.to_nf4(linear(m, n, key).weight.detach(), 32, m * n // 32)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    return layer, run_on_identity(layer, n)


def torchao_mxfp4(n: int, m: int, key: object) -> Made:
    module = peer("torchao.prototype.mx_formats.mx_tensor")
    packed = module.MXTensor.to_mx(linear(m, n, key).weight.detach(), torch.float4_e2m1fn_x2, 32)
    layer = ScaledLinear(n, m)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    return layer, run_on_identity(layer, n)


STAND_INS: tuple[Callable[[int, int, object], Made], ...] = (scaled, float8, float8_of_one_scale)
PEERS: tuple[Callable[[int, int, object], Made], ...] = (
    *(nf4, nf4_twice, fp4_in_bfloat16, int8),
    *(torchao_float8, torchao_int8, torchao_nf4, torchao_mxfp4),
)


def quantized_model(
    make: Callable[[int, int, object], Made],
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two quantized layers and a head, and what the first two stand for."""
    torch.manual_seed(0)
    (first, W), (second, X) = make(64, 32, 0), make(32, 64, 1)
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(64, 6))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, {"0.weight": W, "2.weight": X}


# --- experts ---


def float8_experts(way: str, size: int = 8) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A model of transformers whose experts are its FP8Experts, the same with plain experts of
    float64 that hold what these stand for, and that by name.

    Args:
        way: in which its experts run.
        size: of a block, whose last isn't full here.
    """
    fp8 = peer("transformers.integrations.finegrained_fp8")
    plain = experts_model("qwen3_moe", way, layers=2).requires_grad_(False)
    model = copy.deepcopy(plain)
    config = peer("transformers").FineGrainedFP8Config(weight_block_size=(size, size))
    fp8.replace_with_fp8_linear(model, [".*self_attn", "lm_head"], config)
    exact: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, fp8.FP8Experts):
            module.to_empty(device="cpu").requires_grad_(False)
            for attribute in ("gate_up_proj", "down_proj"):
                weight = plain.get_parameter(f"{name}.{attribute}")
                layers = [Float8Linear(W, size) for W in weight]
                put(module, attribute, [layer.weight for layer in layers])
                scales = [layer.weight_scale_inv for layer in layers]
                put(module, f"{attribute}_scale_inv", scales)
                exact[f"{name}.{attribute}"] = torch.stack([exact_float8(one) for one in layers])
    plain.double().set_experts_implementation("eager")  # the others take no float64
    for name, W in exact.items():
        plain.get_parameter(name).data.copy_(W)
    return model.train(), plain.train(), exact


def put(module: nn.Module, attribute: str, parts: list[Tensor]) -> None:
    """A batch of what a module's parameter has of each expert; float8 has no stack of its own."""
    bytes_of = torch.stack([t.detach().view(torch.uint8) for t in parts])
    module._parameters[attribute].data = bytes_of.view(parts[0].dtype)
