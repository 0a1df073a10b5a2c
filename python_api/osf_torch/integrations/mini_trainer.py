"""mini_trainer's OSFT on osf_kernels: its decomposition and its two projections, drop-in.

``enable()`` puts these in the place of mini_trainer's own, ``disable()`` puts its own back::

    from osf_torch.integrations import mini_trainer as osf_mini_trainer

    osf_mini_trainer.enable()  # before create_osft_model_class / setup_model
    model = mini_trainer.setup_model_for_training.setup_model(..., osft=True)

The factors are mini_trainer's: W (N, M) = U_high diag(S_high) V_high + U_low diag(S_low) V_low,
with U_high (N, k) and U_low (N, R − k) in columns, V_high (k, M) and V_low (R − k, M) in rows,
R = min(N, M); the high ones are frozen, the low ones trained. What is other than there:

- Collectives follow the placements of a DTensor, on its own mesh: a sum over the ranks that hold
  shards of one column (row of V), a gather where V_high is sharded. A plain tensor is whole: under
  DDP nothing is reduced, where mini_trainer sums the coefficients of equal gradients over the ranks
  of the default group and so subtracts them world-size times. (A V_high with fewer rows than
  rank_high is a shard all the same, and on the default group, as mini_trainer takes it.)
- ``model.project_gradients()`` and ``project_parameters()`` of classes made while enabled project
  all factors that are local in one list call, and sum the others' coefficients in one collective
  per mesh group, in float32.
- Beyond half the rank the complement of U_high or V_high is the smaller basis, by (1 − ρ)/ρ in
  FLOPs and in what a gather moves. It is computed at the first projection with a ``cache_holder``
  (as from a model), sharded like its high basis, and dropped with it; ``enable(low_bases=False)``
  does without, and without its memory. With OSFT_CACHE_V mini_trainer's own cache of V_high is
  filled and used in its stead.

Supports rhai-innovation-mini-trainer 0.9.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from osf_kernels import (
    Basis,
    apply_,
    coefficients,
    orthonormalize,
    project_,
    project_many_,
    truncated_svd,
)
from osf_torch.integrations._peer import require_peer

DISTRIBUTION = "rhai-innovation-mini-trainer"
VERSIONS = ">=0.9,<0.10"

SVDDict = Mapping[str, Any]
Spans = Literal["high", "low"]

# How far the split's high triplets may be from those of float32, relative to σ₁: torch.linalg.svd
# leaves 5 to 15 eps.
RESIDUAL_LIMIT = 32 * torch.finfo(torch.float32).eps


# --- decomposition ---------------------------------------------------------------------------


def create_svd_dict(
    weight: Tensor,
    top_k: int,
    decompose_existing: bool = True,
    upcast_dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    use_meta: bool = False,
) -> dict[str, Any]:
    """W = U_high diag(S_high) V_high + U_low diag(S_low) V_low, split after ``top_k`` triplets.

    Args:
        weight: (N, M), any floating dtype.
        top_k: k, how many triplets are frozen; capped to R = min(N, M).
        decompose_existing: False gives zeros of the right shapes, to be filled later.
        upcast_dtype: what the SVD is computed in, and is exact to; float32 for half precisions.
        output_dtype: of the factors; default ``upcast_dtype``.
        use_meta: with decompose_existing=False, factors on the meta device.

    Returns:
        U_high (N, k), S_high (k,), V_high (k, M): tensors; U_low (N, R − k), S_low (R − k,),
        V_low (R − k, M): parameters that require grad; rank_high: k. Contiguous, on weight's
        device. Columns of [U_high, U_low] and rows of [V_high; V_low] are orthonormal to rounding,
        S is descending.

    Raises:
        ValueError: weight isn't a matrix, is on the meta device with decompose_existing, holds
            NaN or Inf; top_k is negative.

    Mutates nothing; synchronizes; draws no random numbers.
    """
    if weight.ndim != 2:
        raise ValueError(
            "osf_torch.integrations.mini_trainer.create_svd_dict: expected weight to be a matrix, "
            f"got {tuple(weight.shape)}; a non-2D tensor is currently unsupported"
        )
    on_meta = use_meta or weight.is_meta
    if decompose_existing and on_meta:
        raise ValueError(
            "osf_torch.integrations.mini_trainer.create_svd_dict: expected a weight with data, got "
            "meta; it cannot decompose meta weights, pass decompose_existing=False"
        )
    if top_k < 0:
        raise ValueError(
            "osf_torch.integrations.mini_trainer.create_svd_dict: expected top_k to be at least 0, "
            f"got {top_k}"
        )
    m, n = weight.shape
    k = min(top_k, m, n)
    dtype = output_dtype or upcast_dtype
    if decompose_existing:
        split = _split_triplets if _splits(weight, upcast_dtype, k) else _whole_triplets
        factors = split(weight.detach().to(upcast_dtype), k, dtype)
    else:
        device = torch.device("meta") if on_meta else weight.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        p = min(m, n) - k
        factors = [(zeros(m, k), zeros(m, p)), (zeros(k), zeros(p)), (zeros(k, n), zeros(p, n))]
    svd_dict: dict[str, Any] = {}
    svd_dict |= {f"{x}_high": high for x, (high, _) in zip("USV", factors, strict=True)}
    svd_dict |= {f"{x}_low": nn.Parameter(low) for x, (_, low) in zip("USV", factors, strict=True)}
    return svd_dict | {"rank_high": k}


Factors = list[tuple[Tensor, Tensor]]  # (high, low) of U, of S, and of V in rows


def _splits(weight: Tensor, upcast_dtype: torch.dtype, k: int) -> bool:
    """Whether high and low triplets are computed apart.

    On a GPU torch.linalg.svd is Jacobi's and slow; eigenvectors of the Gram matrix and the SVD of
    the low block, (1 − ρ)³ of the work, are to be less (unmeasured). On a CPU LAPACK's SVD takes
    less time than float64 eigenvectors, and float32 ones leave 3 to 10 times its error on
    σᵢ = i^-½ (measured).
    """
    return weight.is_cuda and upcast_dtype != torch.float64 and 0 < k < min(weight.shape)


@torch.no_grad()
def _whole_triplets(W: Tensor, k: int, dtype: torch.dtype) -> Factors:
    """LAPACK's, split; at most one factor is held twice."""
    W = W if W.dtype == torch.float64 else W.float()
    if not bool(W.isfinite().all()):
        raise ValueError(
            "osf_torch.integrations.mini_trainer.create_svd_dict: expected weight to be finite, "
            "got NaN or Inf; mend it first"
        )
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    left = _own(U[:, :k], dtype), _own(U[:, k:], dtype)
    del U
    return [
        left,
        (_own(S[:k], dtype), _own(S[k:], dtype)),
        (_own(Vh[:k], dtype), _own(Vh[k:], dtype)),
    ]


@torch.no_grad()
def _split_triplets(W: Tensor, k: int, dtype: torch.dtype) -> Factors:
    """The high triplets from the Gram matrix in float64, and the SVD of what they leave."""
    A = W.double()
    high = truncated_svd(A, k, method="gram", complement=True)
    if float(high.residual) > RESIDUAL_LIMIT:
        return _whole_triplets(W, k, dtype)
    assert high.U_low is not None
    assert high.V_low is not None
    block = high.U_low.mT @ (A @ high.V_low)  # (N − k, M − k)
    low = truncated_svd(block, min(block.shape), method="exact")
    return [
        (_own(high.U, dtype), _own(high.U_low @ low.U, dtype)),
        (_own(high.S, dtype), _own(low.S, dtype)),
        (_own(high.V.mT, dtype), _own((high.V_low @ low.V).mT, dtype)),
    ]


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)


# --- projections -----------------------------------------------------------------------------


@torch.no_grad()
def project_gradient_to_orthogonal_space(
    svd_dict: SVDDict, *, skip_u: bool = False, cache_holder: nn.Module | None = None
) -> None:
    """dU ← (I − U_high U_highᵀ) dU and dV ← dV (I − V_highᵀ V_high), in place.

    Args:
        svd_dict: factors as from :func:`create_svd_dict`, plain or DTensors; a ``.grad`` that is
            None is left out.
        skip_u: leave dU alone, for a caller that projects it itself.
        cache_holder: the module that owns the factors. With one, the smaller of the high basis
            and its complement is used, and V_high is cached on it where OSFT_CACHE_V is set.

    Raises:
        ValueError: shapes that don't fit, a placement that isn't Replicate or Shard, V_high with
            fewer rows than rank_high on a single rank.

    Mutates the gradients; a collective only where they, or V_high, are sharded.
    """
    _project_factors(svd_dict, _gradient, skip_u, cache_holder)


@torch.no_grad()
def project_parameter_to_orthogonal_space(
    svd_dict: SVDDict, *, skip_u: bool = False, cache_holder: nn.Module | None = None
) -> None:
    """U_low ← (I − U_high U_highᵀ) U_low and V_low ← V_low (I − V_highᵀ V_high), in place.

    Args, Raises: as :func:`project_gradient_to_orthogonal_space`, for the parameters themselves.

    Mutates U_low and V_low; a collective only where they, or V_high, are sharded.
    """
    _project_factors(svd_dict, _value, skip_u, cache_holder)


def project_gradients(model: nn.Module) -> None:
    """:func:`project_gradient_to_orthogonal_space` for every OSFT module of a model at once."""
    _project_model(model, _gradient)


def project_parameters(model: nn.Module) -> None:
    """:func:`project_parameter_to_orthogonal_space` for every OSFT module of a model at once."""
    _project_model(model, _value)


Pick = Callable[[Tensor], Tensor | None]


def _gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad


def _value(parameter: Tensor) -> Tensor | None:
    return parameter.data


class _Side(NamedTuple):
    """One local projection: x ← x − H x (dim 0) or x − x H (dim 1), H the basis' protected span.

    ``groups`` are those over which the coefficients are summed.
    """

    x: Tensor
    basis: Basis
    dim: int
    groups: tuple[dist.ProcessGroup, ...]

    @property
    def bases(self) -> tuple[Basis | None, Basis | None]:
        return (self.basis, None) if self.dim == 0 else (None, self.basis)


def _project_factors(svd_dict: SVDDict, pick: Pick, skip_u: bool, holder: nn.Module | None) -> None:
    sides = [] if skip_u else _sides(svd_dict, pick, "U", holder)
    _project(sides + _sides(svd_dict, pick, "V", holder))


@torch.no_grad()
def _project_model(model: Any, pick: Pick) -> None:
    names = ("osft_params", "osft_U_high", "osft_S_high", "osft_V_high")
    sides, gathered = [], []
    for module in model.modules():
        if not all(hasattr(module, name) for name in names):
            continue
        svd_dict = model.get_svd_dict_for_module(module)
        sides += _sides(svd_dict, pick, "U", module)
        if _is_dtensor(svd_dict["V_high"]) or _rank_of_shards(svd_dict) is not None:
            gathered.append((svd_dict, module))
        else:
            sides += _sides(svd_dict, pick, "V", module)
    _project(sides)
    for svd_dict, module in gathered:  # one gathered V_high in memory at a time
        _project(_sides(svd_dict, pick, "V", module))


def _project(sides: Iterable[_Side]) -> None:
    local: list[_Side] = []
    summed: dict[tuple[object, ...], list[_Side]] = {}
    for side in sides:
        if side.groups:
            key = (side.groups, side.x.device, side.x.dtype == torch.float64)
            summed.setdefault(key, []).append(side)
        else:
            local.append(side)
    if len(local) == 1:
        project_(local[0].x, *local[0].bases)
    elif local:
        lefts, rights = zip(*(side.bases for side in local), strict=True)
        project_many_([side.x for side in local], lefts, rights)
    for members in summed.values():
        _project_summed(members)


def _project_summed(sides: list[_Side]) -> None:
    """Coefficients of all sides in one all-reduce a group, which all of them share."""
    halves = [list(coefficients(side.x, *side.bases)) for side in sides]
    parts = [half[side.dim] for half, side in zip(halves, sides, strict=True)]
    flat = torch.cat([part.flatten() for part in parts])
    for group in sides[0].groups:
        dist.all_reduce(flat, group=group)
    totals = flat.split([part.numel() for part in parts])
    for side, half, part, total in zip(sides, halves, parts, totals, strict=True):
        half[side.dim] = total.view(part.shape)
        apply_(side.x, *side.bases, half[0], half[1])


# --- what is held where ----------------------------------------------------------------------


def _sides(svd_dict: SVDDict, pick: Pick, letter: str, holder: nn.Module | None) -> list[_Side]:
    """The side of one letter, none where there is no gradient. Gathers a sharded V_high."""
    x, high = pick(svd_dict[f"{letter}_low"]), svd_dict[f"{letter}_high"]
    if x is None:
        return []
    dim = 0 if letter == "U" else 1  # the one that is summed over
    rank = _rank_of_shards(svd_dict)
    if rank is not None:
        high = _local(high)
    spans: Spans = "high"
    if dim == 1 and holder is not None and _caches_v():
        held = _cached_v(high, rank, holder)
    elif dim == 1 and rank is not None:
        held = _gathered(high, rank)
    else:
        low = None if holder is None or rank is not None else _low_basis(high, dim)
        held, spans = (high, "high") if low is None else (low, "low")
    x, held, groups = _aligned(x, held, dim, letter)
    if dim == 0 and rank is not None:
        assert dist.group.WORLD is not None
        groups = (dist.group.WORLD,)
    return [_Side(x, Basis(held if dim == 0 else held.mT, spans), dim, groups)]


def _rank_of_shards(svd_dict: SVDDict) -> int | None:
    """rank_high where the factors are shards that aren't DTensors, as V_high's missing rows tell.

    Only the default group can be theirs.
    """
    V_high, rank = svd_dict["V_high"], svd_dict.get("rank_high")
    if rank is None or _is_dtensor(V_high):
        return None
    rows = _local(V_high).shape[0]
    if rows >= int(rank):
        return None
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        raise ValueError(
            f"osf_torch.integrations.mini_trainer: expected V_high to have rank_high={int(rank)} "
            f"rows, got {rows} and no other ranks that hold the others"
        )
    return int(rank)


def _gathered(shard: Tensor, rows: int) -> Tensor:
    """All rows of a matrix whose rows the default group's ranks hold as torch.chunk cuts them."""
    ranks = dist.get_world_size()
    each = -(-rows // ranks)
    padded = shard.new_zeros(each, shard.shape[1])
    padded[: shard.shape[0]] = shard
    whole = shard.new_empty(each * ranks, shard.shape[1])
    dist.all_gather_into_tensor(whole, padded)
    return whole[:rows]


def _aligned(
    x: Tensor, basis: Tensor, dim: int, letter: str
) -> tuple[Tensor, Tensor, tuple[dist.ProcessGroup, ...]]:
    """x and its basis as local tensors that fit each other, and the groups to sum over.

    Where x is sharded along ``dim`` the basis is sharded alike and the coefficients are partial
    sums; elsewhere the basis has to be whole.
    """
    if not _is_dtensor(x):
        return x, _whole(basis), ()
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(x, DTensor)
    mesh = x.device_mesh
    wanted: list[Replicate | Shard] = []
    groups = []
    for i, placement in enumerate(x.placements):
        if type(placement) not in (Replicate, Shard):
            raise ValueError(
                f"osf_torch.integrations.mini_trainer: expected {letter}_low and its gradient to "
                f"be replicated or sharded evenly, got {x.placements}; redistribute it first"
            )
        wanted.append(Shard(dim) if placement == Shard(dim) else Replicate())
        if placement == Shard(dim) and mesh.size(i) > 1:
            groups.append(mesh.get_group(i))
    if not isinstance(basis, DTensor):
        replicated = [Replicate()] * mesh.ndim
        basis = DTensor.from_local(basis, mesh, replicated, run_check=False)
    elif basis.device_mesh != mesh:
        raise ValueError(
            f"osf_torch.integrations.mini_trainer: expected {letter}_high on the mesh of "
            f"{letter}_low, {mesh}, got {basis.device_mesh}; shard both alike"
        )
    local = basis.redistribute(mesh, wanted).to_local()
    return x.to_local(), local, tuple(groups)


def _is_dtensor(x: object) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _local(x: Any) -> Tensor:
    local: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return local


def _whole(x: Any) -> Tensor:
    whole: Tensor = x.full_tensor() if _is_dtensor(x) else _local(x)
    return whole


# --- caches ----------------------------------------------------------------------------------

_PEER = "mini_trainer.osft_utils"
_CACHE = "_osft_v_high_full"  # mini_trainer's name, which its reinitialization deletes


def _caches_v() -> bool:
    peer = sys.modules.get(_PEER)
    default = os.getenv("OSFT_CACHE_V", "0") == "1"
    return bool(getattr(peer, "OSFT_CACHE_V", default))


def _cached_v(V_high: Tensor, rank_of_shards: int | None, holder: nn.Module) -> Tensor:
    cached: Tensor | None = getattr(holder, _CACHE, None)
    if cached is None:
        whole = _whole(V_high) if rank_of_shards is None else _gathered(V_high, rank_of_shards)
        cached = whole.detach()  # no parameter, which the module would register
        setattr(holder, _CACHE, cached)
    return cached


class _Low(NamedTuple):
    stamp: tuple[int, int]  # of the high basis it was computed from
    basis: Tensor


_low_bases: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_use_low_bases = True


def _low_basis(high: Tensor, dim: int) -> Tensor | None:
    """The complement of a high basis, laid out and sharded alike; None where it isn't smaller.

    Kept as long as the high basis is, and computed anew when that was written to. The first call
    gathers a sharded basis.
    """
    size, k = high.shape[dim], high.shape[1 - dim]
    if not _use_low_bases or size - k >= k:
        return None
    local = _local(high)
    stamp = (local.data_ptr(), 0 if local.is_inference() else local._version)
    known: _Low | None = _low_bases.get(high)
    if known is not None and known.stamp == stamp:
        return known.basis
    columns = _whole(high).detach()
    low = _complement(columns if dim == 0 else columns.mT)
    low = (low if dim == 0 else low.mT).to(high.dtype).contiguous()
    if _is_dtensor(high):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = high.device_mesh, high.placements  # type: ignore[attr-defined]
        low = distribute_tensor(low, mesh, placements)  # the first rank's, the same on all
    _low_bases[high] = _Low(stamp, low)
    return low


def drop_low_bases() -> None:
    """Frees the complements that are kept; the next projections compute those they need."""
    _low_bases.clear()


def _complement(columns: Tensor) -> Tensor:
    """Orthonormal columns, float64, of what random ones have beside ``columns`` (size, k).

    A round leaves of the protected part what the columns fall short of orthonormal by, 3e-3 in
    bfloat16 and 1e-7 in float32, times the condition of the random block in the first.
    """
    size, k = columns.shape
    rounds = 2 if columns.dtype in (torch.float32, torch.float64) else 3
    columns = columns.double()
    generator = torch.Generator(columns.device).manual_seed(0)
    low = torch.randn(
        size, size - k, dtype=columns.dtype, device=columns.device, generator=generator
    )
    for _ in range(rounds):
        low = orthonormalize(project_(low, columns))
    return low


# --- switching -------------------------------------------------------------------------------

_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "create_svd_dict": create_svd_dict,
    "project_gradient_to_orthogonal_space": project_gradient_to_orthogonal_space,
    "project_parameter_to_orthogonal_space": project_parameter_to_orthogonal_space,
}
_METHODS: dict[str, Callable[[Any], None]] = {
    "project_gradients": project_gradients,
    "project_parameters": project_parameters,
}
_replaced: list[tuple[ModuleType, str, Any]] = []
_classes: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()


def enable(*, low_bases: bool = True) -> None:
    """Puts the functions of this module in the place of mini_trainer's, wherever it looks them up.

    Call it before ``create_osft_model_class`` or ``setup_model``: the batched
    ``project_gradients`` and ``project_parameters`` are replaced in classes that are made while
    enabled; an earlier class takes only the three functions. Idempotent.

    Args:
        low_bases: keep the complement of a high basis where it is smaller; see the module.

    Raises:
        ImportError: mini_trainer is missing or of an unsupported version; nothing is changed.
    """
    global _use_low_bases
    peer = require_peer(_PEER, DISTRIBUTION, VERSIONS, "mini_trainer")
    _use_low_bases = low_bases
    if not low_bases:
        drop_low_bases()
    if _replaced:
        return
    replacements = _REPLACEMENTS | {
        "create_osft_model_class": _adopting(peer.create_osft_model_class)
    }
    for name, replacement in replacements.items():
        original = getattr(peer, name)
        for module in list(sys.modules.values()):
            owner = getattr(module, "__name__", "").partition(".")[0]
            if owner == "mini_trainer" and vars(module).get(name) is original:
                _replaced.append((module, name, original))
                setattr(module, name, replacement)


def disable() -> None:
    """Puts mini_trainer's own functions and methods back, and drops the low bases. Idempotent."""
    while _replaced:
        module, name, original = _replaced.pop()
        setattr(module, name, original)
    for cls, originals in list(_classes.items()):
        for name, original in originals.items():
            setattr(cls, name, original)
    _classes.clear()
    drop_low_bases()


def _adopting(original: Callable[[type], type]) -> Callable[[type], type]:
    def create_osft_model_class(base_cls: type) -> type:
        cls = original(base_cls)
        _classes[cls] = {name: vars(cls)[name] for name in _METHODS}
        for name, method in _METHODS.items():
            setattr(cls, name, method)
        return cls

    return create_osft_model_class
