"""Which weights ``confine`` takes, what it refuses before anything is changed, what it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from osf_kernels import Basis, FreeBasis, free_block
from osf_torch.bases import Held, columns_of, spans_of
from osf_torch.coverage import guarded
from osf_torch.free.formed import runs_plain
from osf_torch.free.merging import cut_of
from osf_torch.free.spec import AtRest, Place, Spec, Update, is_fsdp, specs_of
from osf_torch.grown import narrowest, spectra_on_host
from osf_torch.kinds import is_conv1d, is_lazy, is_plain, owners, reparametrized
from osf_torch.measures import TINY, TRIPLETS_LIMIT
from osf_torch.protected import require_orthonormal
from osf_torch.quantized import Stored, stored
from osf_torch.selection import (
    named_weights,
    require_matrices,
    require_values,
    unheld_weights,
    unknown,
)
from osf_torch.sharding import is_cut, is_dtensor
from osf_torch.sharing import whole
from osf_torch.subspaces import Subspace

Origin = Literal["start", "zero"]


class Sides(NamedTuple):
    """The free bases of a weight's two sides, in the place of a Subspace, and the dtype of C."""

    U: FreeBasis
    V: FreeBasis
    dtype: torch.dtype


@dataclass(frozen=True)
class Settings:
    """Arguments of ``confine``."""

    update: Update
    rank: int | None
    decay_to: Origin
    dtype: torch.dtype | None


def admitted(
    model: nn.Module, subspaces: Mapping[str, Any], settings: Settings, *, anew: bool = False
) -> list[Place]:
    """The places of the weights, each with the Spec that it will have. Changes nothing.

    Args:
        anew: whether the weights are confined already, and are to be so with other bases.

    Raises:
        ValueError, TypeError: as ``confine``.
    """
    named = _named(model, subspaces)
    weights, having = named_weights(model), owners(model)
    places = []
    for name, subspace in named.items():
        owned = having[id(weights[name])]
        places.append(_checked(name, weights[name], owned, subspace, settings, anew))
    _require_once(places)
    return places


def _named(model: nn.Module, subspaces: Mapping[str, Any]) -> dict[str, Subspace | Sides]:
    """The subspaces, of names that the model has."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "osf_torch.confine: expected a model without DistributedDataParallel around it, got "
            "one whose ranks would not reduce C; confine the model first, then wrap it"
        )
    if any(hasattr(module, "reshard") and hasattr(module, "unshard") for module in model.modules()):
        raise ValueError(
            "osf_torch.confine: expected a model that isn't sharded yet, got modules of "
            "fully_shard, which would not shard C; confine first, then fully_shard"
        )
    require_matrices(model, "confine")
    parameters = named_weights(model)
    for name, subspace in subspaces.items():
        if not isinstance(subspace, Subspace | Sides):
            raise TypeError(
                f"osf_torch.confine: expected a Subspace for parameter {name!r}, got "
                f"{type(subspace).__name__}; of triplets that is Subspace(U, V, S)"
            )
        if name not in parameters:
            raise unknown("confine", name, parameters, unheld_weights(model))
    return dict(subspaces)


def _checked(
    name: str,
    weight: nn.Parameter,
    having: Sequence[tuple[nn.Module, str]],
    subspace: Subspace | Sides,
    settings: Settings,
    anew: bool,
) -> Place:
    """The weight's place, with the Spec that it will have."""
    update, rank, decay_to = settings.update, settings.rank, settings.decay_to
    module, attribute = having[0]
    told = f"osf_torch.confine: parameter {name!r}: expected"
    before = specs_of(module).get(attribute)
    if before is not None and not anew:
        raise ValueError(
            f"{told} a weight that isn't confined yet, got one that is; release() first, or "
            "next_task() to protect more (Confined.of(model) has both)"
        )
    if len(having) > 1:
        others = " and ".join(f"{type(m).__name__}.{a}" for m, a in having[:3])
        raise ValueError(
            f"{told} a weight of one module, got one that is shared by {others}; leave it out by "
            f"name, leave_out={name!r} of refresh or input_subspaces, or untie it"
        )
    source = reparametrized(having)
    if source is not None:
        raise ValueError(f"{told} a plain weight, got {source}")
    if id(weight) in guarded():
        raise ValueError(
            f"{told} a weight without a guard, got one that protect() watches; Guard.remove() first"
        )
    if is_fsdp(module):
        raise ValueError(
            f"{told} a weight that isn't sharded yet, got one of a module of fully_shard, which "
            "would not shard C; confine first, then fully_shard"
        )
    if hasattr(weight, "ds_shape"):
        raise ValueError(
            f"{told} a whole weight, got one that DeepSpeed's ZeRO-3 has partitioned; call "
            'confine(..., update="beside") before deepspeed.initialize'
        )
    if getattr(module, "sparse", False) or getattr(module, "max_norm", None) is not None:
        raise TypeError(
            f"{told} an embedding with dense gradients that nothing renormalises, got sparse=True "
            "or max_norm; leave it out"
        )
    packed = stored(weight, having)
    opaque = _is_opaque(name, weight, module, update, packed)
    if not weight.requires_grad and update == "merge" and before is None:
        raise ValueError(
            f"{told} a weight that is trained, got a frozen one; leave it out, requires_grad_() "
            'it, or pass update="beside"'
        )
    cut_of(name, weight)  # a weight that is sharded otherwise is refused
    dequantized = packed is not None and opaque and not _is_layer(module)
    shape, is_flat = _matrix(name, weight, module, subspace, opaque, packed)
    m, n = shape[-2:]
    device = weight.device
    left, right = (
        _free(told, side, basis, size, device)
        for side, basis, size in zip("UV", narrowest(subspace), (m, n), strict=True)
    )
    _require_some(told, left, right, rank)
    if not opaque and getattr(subspace, "S", None) is not None:
        _require_triplets(told, weight, (shape[0], right.size) if is_flat else shape, left, right)
    if decay_to == "zero" and (weight.element_size() < 4 or is_dtensor(weight)):
        raise ValueError(
            f'{told} float32 or float64 with decay_to="zero", got {weight.dtype}: a weight without '
            'its free part would be rounded; pass decay_to="start"'
        )
    spec = Spec(
        name=name,
        attribute=attribute,
        update=update,
        rank=rank,
        left=left,
        right=right,
        shape=tuple(weight.shape) if not opaque else shape,
        is_flat=is_flat,
        is_rounded=update == "merge" and weight.element_size() < 4,
        is_opaque=opaque,
        is_dequantized=dequantized,
        trained=weight.requires_grad if before is None else before.trained,
        decays_to_zero=decay_to == "zero",
        dtype=_dtype_of(weight, subspace, settings.dtype),
        spectra=spectra_on_host(subspace),
    )
    return AtRest(module, spec)


def _dtype_of(weight: Tensor, subspace: Subspace | Sides, dtype: torch.dtype | None) -> torch.dtype:
    """Of what is trained."""
    if isinstance(subspace, Sides):
        return subspace.dtype
    return dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _is_opaque(
    name: str, weight: nn.Parameter, module: nn.Module, update: Update, packed: Stored | None
) -> bool:
    """Whether torch's operators can't read it: then its layer runs as it is, and the free block is
    added to what it returns, or its module runs with a plain weight in its place.

    Args:
        packed: what the weight stands for, where it is quantized in a known way.
    """
    readable = packed is None and (
        is_lazy(weight) or is_dtensor(weight) or (is_plain(weight) and weight.is_floating_point())
    )
    if update == "merge" and packed is not None:
        raise TypeError(
            f"osf_torch.confine: parameter {name!r}: expected a weight that can be written to with "
            f'update="merge", got {packed.kind}; leave it out, or pass update="beside"'
        )
    if packed is not None:
        packed.require(name, "confine")
    if update == "merge" or readable:
        require_values(name, weight, "confine")
        return False
    if not _is_layer(module):
        if packed is not None and runs_plain(module, packed):
            return True
        kind = type(weight).__name__ if packed is None else packed.kind
        remedy = "" if packed is None else packed.remedy
        raise TypeError(
            f"osf_torch.confine: parameter {name!r}: expected a linear layer around a weight of "
            f"{kind}, or experts that run with a plain one, got {type(module).__name__}; leave it "
            f"out, which leaves it as it is, or {remedy or 'load it dequantized'}"
        )
    features = _features(module)
    if packed is not None and packed.shape != features:
        raise TypeError(
            f"osf_torch.confine: parameter {name!r}: expected a weight of shape {features}, as the "
            f"layer says, got {packed.kind} of shape {packed.shape}; leave it out"
        )
    return True


def _features(module: nn.Module) -> tuple[Any, Any]:
    """(m, n) as a linear layer says them; None where it doesn't."""
    return getattr(module, "out_features", None), getattr(module, "in_features", None)


def _is_layer(module: nn.Module) -> bool:
    """Whether it multiplies its inputs by the transpose of a quantized weight, and does no more."""
    return None not in _features(module) and not is_conv1d(module)


def _matrix(
    name: str,
    weight: Tensor,
    module: nn.Module,
    subspace: Subspace | Sides,
    opaque: bool,
    packed: Stored | None,
) -> tuple[tuple[int, ...], bool]:
    """The shape (..., m, n) that the bases are of, and whether dimensions are taken together."""
    shape: tuple[int, ...] = tuple(weight.shape)
    if opaque:  # of what is packed in it
        m, n = _features(module)
        shape = (int(m), int(n)) if packed is None else packed.shape
    if len(shape) < 2:
        raise ValueError(
            f"osf_torch.confine: parameter {name!r}: expected a weight of at least two dimensions, "
            f"got one of shape {shape}; leave it out"
        )
    rows = [_rows(basis) for basis in (subspace.U, subspace.V)]
    flat = (shape[0], int(torch.Size(shape[1:]).numel()))

    def fits(sizes: tuple[int, ...]) -> bool:
        return all(row in (None, size) for row, size in zip(rows, sizes, strict=True))

    convolution = isinstance(module, nn.modules.conv._ConvNd)
    if len(shape) > 2 and not opaque and fits(flat) and (convolution or not fits(shape[-2:])):
        return flat, True
    if not fits(shape[-2:]):
        raise ValueError(
            f"osf_torch.confine: parameter {name!r}: expected bases of {shape[-2]} and {shape[-1]} "
            f"rows for a weight of shape {shape}, got {rows[0]} and {rows[1]}; pass V.mT if it "
            "holds rows"
        )
    return shape, False


def _rows(basis: Held | FreeBasis) -> int | None:
    if isinstance(basis, FreeBasis):  # of a state
        return basis.size
    return None if basis is None else columns_of(basis).shape[-2]


def _free(
    told: str, side: str, basis: Held | FreeBasis, size: int, device: torch.device
) -> FreeBasis:
    if isinstance(basis, FreeBasis):
        return basis.to(device)
    if basis is not None and is_dtensor(columns_of(basis)):
        raise ValueError(f"{told} whole bases, got {side} sharded; gather it by full_tensor()")
    try:
        require_orthonormal(side, basis)
        if basis is not None:
            basis = Basis(columns_of(basis).to(device), spans_of(basis))
        return FreeBasis.of(basis, size)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{told.removesuffix(' expected')} {error}") from None


def _require_some(told: str, left: FreeBasis, right: FreeBasis, rank: int | None) -> None:
    if left.width + right.width == left.size + right.size:
        raise ValueError(
            f"{told} something protected, got bases that protect nothing; leave the weight out, "
            "which trains it as a whole"
        )
    if not (left.width and right.width):
        raise ValueError(
            f"{told} something free, got bases that protect all {left.size} rows or all "
            f"{right.size} columns; give it a smaller rank, or bases by inputs a min_free, or "
            "freeze it and leave it out"
        )
    if rank is not None and rank > min(left.width, right.width):
        raise ValueError(
            f"{told} a free block of at least rank={rank}, got {left.width} by {right.width}; pass "
            "a smaller rank, or leave the weight out by name"
        )


@torch.no_grad()
def _require_triplets(
    told: str, weight: Tensor, shape: Sequence[int], left: FreeBasis, right: FreeBasis
) -> None:
    """Refuses bases of singular triplets of another weight: by its own, W V_l lies in the span of
    U_l and Wᵀ U_l in that of V_l. Of sharded weights a collective."""
    W = whole(weight.detach()).reshape(tuple(shape)).double()
    by_rows, by_columns = (side.to(dtype=torch.float64) for side in (left, right))
    across, down = by_columns.reduce(W), by_rows.reduce(W.mT)
    inner = by_rows.reduce(across.mT)
    squares = [t.square().sum((-2, -1)) for t in (across, down, inner, W)]
    outside = torch.minimum(squares[0], squares[1]) - squares[2]
    off = (outside.clamp_min(0) / (squares[3] - squares[2]).clamp_min(TINY)).sqrt()
    if not float(off.max()) <= TRIPLETS_LIMIT:
        raise ValueError(
            f"{told} bases of its own singular triplets, got ones that are off by "
            f"{float(off.max()):.1e} of it: they are of other weights, or of these before a "
            "checkpoint was loaded; refresh the model as it is, or pass Subspace(U, V) without S "
            "for bases of yours"
        )


def _require_once(places: list[Place]) -> None:
    seen: dict[tuple[int, str], str] = {}
    for place in places:
        key = id(place.module), place.spec.attribute
        if key in seen:
            raise ValueError(
                f"osf_torch.confine: expected each weight once, got {seen[key]!r} and "
                f"{place.spec.name!r}, which are one"
            )
        seen[key] = place.spec.name


# --- what a module gets ---


@torch.no_grad()
def made(
    place: Place, settings: Settings, generator: torch.Generator | None = None
) -> dict[str, nn.Parameter]:
    """C or its factors, and what is held beside them, by name; of whole or replicated tensors."""
    spec, weight = place.spec, place.weight
    dtype, device = spec.dtype, weight.device
    lead = spec.matrix_shape[:-2]
    p, q = spec.left.width, spec.right.width
    found: dict[str, nn.Parameter] = {}
    if spec.rank is not None:
        assert generator is not None
        # Where the generator draws, so that the weights' device makes no difference.
        options: Any = {"generator": generator, "device": generator.device}
        drawn = torch.randn(*lead, spec.rank, q, dtype=torch.float32, **options)
        B, A = spec.factors
        zeros = torch.zeros(*lead, p, spec.rank, dtype=dtype, device=device)
        # As LoRA draws A: uniform in ±1/sqrt(n) there, of that variance here.
        drawn = (drawn / (3 * q) ** 0.5).to(device, dtype)
        found[B], found[A] = (nn.Parameter(_placed(t, weight)) for t in (zeros, drawn))
        return found
    if settings.decay_to == "zero":
        matrix = weight.detach().reshape(spec.matrix_shape)
        C = free_block(matrix, spec.left, spec.right).to(dtype)
    else:
        C = torch.zeros(*lead, p, q, dtype=dtype, device=device)
    C = _placed(C.contiguous(), weight)
    found[spec.free] = nn.Parameter(C)
    if spec.update == "merge":
        found[spec.merged] = nn.Parameter(C.clone(), requires_grad=False)
    if spec.is_rounded:
        found[spec.base] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return found


def _placed(t: Tensor, like: Tensor) -> Tensor:
    """On the mesh of a weight that is a DTensor: cut as its batch is, and else whole on all ranks.

    Args:
        t: all of it, the same on every rank.
    """
    if not is_dtensor(like):
        return t
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    placements: Sequence[Any] = like.placements  # type: ignore[attr-defined]
    batch = t.dim() - 2
    chosen = [p if is_cut(p) and p.dim % like.dim() < batch else Replicate() for p in placements]
    placed: Tensor = distribute_tensor(t, mesh, chosen, src_data_rank=None)
    return placed
