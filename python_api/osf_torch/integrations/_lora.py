"""A LoRA's factors and those of a weight that is confined with a rank, each from the other."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osf_torch.free.spec import Place
from osf_torch.free.state import put
from osf_torch.kinds import is_conv1d
from osf_torch.selection import listed
from osf_torch.sharing import whole

log = logging.getLogger("osf_torch")

# What may lie outside of the free block without being a part of the adapter: the rounding of its
# factors, and of bases in float32.
ROUNDING = 1e-4
ROUNDINGS = 4.0  # of the factors' own dtype, where that is coarser
TINY = 1e-300  # in a denominator that may be zero

# Fields of a LoraConfig that don't say what an adapter adds to a layer. Whatever isn't here and is
# set makes another thing of it, fields of later versions too.
_HARMLESS = frozenset(
    (
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
        *("auto_mapping", "peft_version", "runtime_config", "lora_dropout", "fan_in_fan_out"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
        *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    )
)
# Values of init_lora_weights that leave the base's weights as they are.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


class Factors(NamedTuple):
    """ΔW = scaling · lora_B lora_A of a layer y = W x.

    Attributes:
        A: lora_A, (r, inputs).
        B: lora_B, (outputs, r).
    """

    A: Tensor
    B: Tensor
    scaling: float


def module_of(name: str) -> str:
    """The name of the module whose ``weight`` is called so."""
    return name.rpartition(".")[0]


# --- what is refused ---


def require_lora_layers(places: Sequence[Place], operator: str) -> None:
    """Refuses weights that PEFT has no plain LoRA layer for.

    Raises:
        TypeError: other weights than those of nn.Linear, transformers' Conv1D and quantized
            linear layers.
    """
    for place in places:
        module, spec = place.module, place.spec
        quantized = spec.is_opaque and not spec.is_dequantized
        linear = isinstance(module, nn.Linear) or is_conv1d(module) or quantized
        # nn.MultiheadAttention reads its weight by itself, where a LoRA around it isn't seen.
        linear &= not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if not (linear and module_of(place.name) and spec.attribute == "weight"):
            raise TypeError(
                f"osf_torch.{operator}: expected weights of nn.Linear and Conv1D in the model, got "
                f"{place.name!r} of {type(module).__name__.removeprefix('Confined')}; leave it out "
                "of the subspaces"
            )


def require_plain(config: Mapping[str, Any], operator: str, kept: Collection[str] = ()) -> None:
    """Refuses adapters that are more than a product of two factors beside each layer.

    Args:
        config: PEFT's, as a dict.
        kept: further fields that may be set.

    Raises:
        ValueError: another type than LORA, DoRA and other variants, biases, other modules, an
            initialisation that changes the base's weights.
    """
    kind = config.get("peft_type")
    kind = getattr(kind, "value", kind)
    if kind != "LORA":
        raise ValueError(
            f"osf_torch.{operator}: expected a LoRA adapter, got peft_type={kind!r}; merge it into "
            "the model and confine that"
        )
    for field, value in config.items():
        if field in _HARMLESS or field in kept or not value:
            continue
        if field == "bias" and value == "none":
            continue
        raise ValueError(
            f"osf_torch.{operator}: expected a plain LoRA, which adds scaling · B A to weights "
            f"alone, got {field}={value!r}; merge it into the model and confine that"
        )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _PLAIN_STARTS:
        raise ValueError(
            f"osf_torch.{operator}: expected an adapter of the model's own weights, got "
            f"init_lora_weights={start!r}, which changed these; convert it to a plain LoRA by "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def of_pattern(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """What a rank_pattern or an alpha_pattern has for a module, as PEFT looks it up."""
    found = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, otherwise)


# --- from a confined weight ---


@torch.no_grad()
def ambient_factors(place: Place) -> Factors:
    """lora_A = A V_lᵀ and lora_B = U_l B in float64, rounded once; exchanged of Conv1D.

    Of sharded factors a collective.
    """
    spec = place.spec
    spec.follow(place.device)
    B, A = (whole(place.get(name).detach()) for name in spec.factors)
    rows = spec.left.to(dtype=torch.float64).expand_rows(B.double())
    columns = spec.right.to(dtype=torch.float64).expand(A.double())
    if is_conv1d(place.module):  # its weight is (inputs, outputs)
        rows, columns = columns.mT, rows.mT
    return Factors(columns.to(A.dtype).contiguous(), rows.to(B.dtype).contiguous(), 1.0)


# --- into a confined weight ---


def inside(
    places: Sequence[Place],
    given: Mapping[str, Factors],
    rank: int,
    operator: str,
    *,
    project: bool,
    told: bool = True,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """B and A of every weight that has a LoRA, and which share of it they leave out.

    Args:
        given: by the name of the weight.
        rank: s, which the weights are confined with.
        project: whether the adapter may have a part outside of the free blocks.
        told: whether such a part is logged.

    Returns:
        By name B = scaling · U_lᵀ lora_B (p, r) and A = lora_A V_l (r, q), in float64, or of
        Conv1D B = U_lᵀ lora_Aᵀ and A = scaling · lora_Bᵀ V_l; and by name the share
        ‖ΔW − U_l B A V_lᵀ‖ / ‖ΔW‖.

    Raises:
        ValueError: of weights that aren't confined, of shapes that don't fit, of a higher rank,
            not finite, or outside of the free block.
    """
    known = {place.name: place for place in places}
    foreign = [name for name in given if name not in known]
    if foreign:
        raise ValueError(
            f"osf_torch.{operator}: expected an adapter of confined weights alone, got "
            f"{listed(foreign)} too; give subspaces for all that it has"
        )
    found, shares = {}, {}
    for name, factors in given.items():
        place = known[name]
        _require_fit(place, factors, rank, operator)
        found[name], shares[name] = _reduced(place, factors)
    over = {
        name: share
        for name, share in shares.items()
        if share > max(ROUNDING, ROUNDINGS * torch.finfo(given[name].A.dtype).eps)
    }
    named = listed([f"{share:.2g} of {name}" for name, share in over.items()])
    if over and not project:
        raise ValueError(
            f"osf_torch.{operator}: expected an adapter inside of the free blocks, up to "
            f"{ROUNDING:g} of its norm, got outside of them {named}; confine with the subspaces "
            "that it was trained with, or leave that part out by project=True"
        )
    if over and told:
        log.warning(
            "osf_torch.%s: left out what the adapter has outside of the free blocks, as shares of "
            "its norm %s",
            operator,
            named,
        )
    return found, shares


def _require_fit(place: Place, factors: Factors, rank: int, operator: str) -> None:
    m, n = place.spec.matrix_shape
    if is_conv1d(place.module):
        m, n = n, m
    A, B = tuple(factors.A.shape), tuple(factors.B.shape)
    told = f"osf_torch.{operator}: parameter {place.name!r}: expected"
    if len(A) != 2 or len(B) != 2 or (B[0], A[1]) != (m, n) or A[0] != B[1]:
        raise ValueError(
            f"{told} lora_A of shape (r, {n}) and lora_B of ({m}, r), got {A} and {B}; it is "
            "another model's"
        )
    if A[0] > rank:
        raise ValueError(
            f"{told} an adapter of rank {rank} at most, which the weight is confined with, got "
            f"{A[0]}; confine(..., rank={A[0]})"
        )
    if not (factors.A.is_floating_point() and factors.B.is_floating_point()):
        raise ValueError(
            f"{told} floating factors, got {factors.A.dtype} and {factors.B.dtype}; save the "
            "adapter again"
        )
    if not (bool(factors.A.isfinite().all()) and bool(factors.B.isfinite().all())):
        raise ValueError(f"{told} finite factors, got NaN or Inf; mend the adapter first")


@torch.no_grad()
def _reduced(place: Place, factors: Factors) -> tuple[tuple[Tensor, Tensor], float]:
    """(B, A), and the share outside, of which no difference of two large norms is formed."""
    spec = place.spec
    spec.follow(place.device)
    left, right = (side.to(dtype=torch.float64) for side in (spec.left, spec.right))
    columns = factors.A.detach().to(place.device, torch.float64)
    rows = factors.B.detach().to(place.device, torch.float64) * factors.scaling
    if is_conv1d(place.module):
        rows, columns = columns.mT, rows.mT
    B, A = left.reduce_rows(rows), right.reduce(columns)
    rows_out, columns_out = rows - left.expand_rows(B), columns - right.expand(A)
    outside = _squared(rows_out, columns) + _squared(B, columns_out)
    all_of_it = _squared(rows, columns)
    return (B, A), float((outside / all_of_it.clamp_min(TINY)).clamp_min(0).sqrt())


def _squared(rows: Tensor, columns: Tensor) -> Tensor:
    """‖rows columns‖²_F, without the product."""
    return ((rows.mT @ rows) * (columns @ columns.mT)).sum()


@torch.no_grad()
def write(
    places: Sequence[Place], found: Mapping[str, tuple[Tensor, Tensor]], operator: str
) -> None:
    """Puts B and A into the factors of their weights, each in the first r of s.

    Of the others B is zero and A stays as it was drawn, so that they can be trained; weights
    without a LoRA have B zero.
    """
    without = []
    for place in places:
        names = place.spec.factors
        B, A = (whole(place.get(name).detach()).clone() for name in names)
        B.zero_()
        if place.name in found:
            of_B, of_A = found[place.name]
            B[:, : of_B.shape[-1]] = of_B
            A[: of_A.shape[-2]] = of_A
        else:
            without.append(place.name)
        for name, t in zip(names, (B, A), strict=True):
            put(place.get(name), t)
    if without:
        log.info(
            "osf_torch.%s: the adapter has nothing for %s, which start at zero",
            operator,
            listed(without),
        )
