"""PEFT's OSF tuner on the operators of ``osf_kernels``, on one device or sharded by FSDP2.

:func:`enable` switches PEFT to it and :func:`disable` back; training code stays as it is::

    from osf_torch.integrations import peft as osf_peft

    osf_peft.enable()
    model = peft.get_peft_model(model, peft.OSFConfig(effective_rank=0.5))

PEFT freezes W_high = U_high S_high V_high, the leading triplets of a weight, and trains U_low,
S_low, V_low from the others. What is replaced:

- decomposition: ``decompose_weight_matrix`` works on the tall side of a weight, and beyond
  ``SPLIT_SIZE`` finds the leading triplets by ``osf_kernels.truncated_svd`` and then only the SVD
  of what they leave;
- hooks: each gradient is projected in place once it is accumulated. PEFT's tensor hooks allocate
  another, never fire on FSDP2's shards, and are lost where a bfloat16 model's adapter is cast to
  float32, which is PEFT's default;
- forward: the frozen part takes no gradient and no concatenated copies of the factors;
- ``project_gradient_to_orthogonal_space``: the V side from V_high itself instead of an n × n Gram
  matrix; a gradient that is whole on every rank is projected there, and not summed over them.

With FSDP2, whose ``fully_shard`` replaces parameters, attach again after it::

    fully_shard(model)
    osf_peft.attach(model)

Then U_low's coefficients of a whole backward pass are summed over the ranks in one collective, on
the shards' own group; V_low, sharded by singular triplets, needs none. ``attach`` is also for
models made before :func:`enable` and after ``load_state_dict(assign=True)``; :func:`verify` says
where it is due. ``copy.deepcopy`` carries the hooks along.

A projected gradient isn't enough with AdamW: its elementwise scaling turns the step back into the
protected span. ``enable(restore=True)`` projects U_low and V_low themselves after every step of
every optimizer, :func:`restore_after` after those of one; then U_highᵀ W = S_high V_high holds to
rounding.

Supported: peft 0.21. Beyond rounding, this differs from PEFT in that ``torch.autograd.grad``,
which accumulates nothing, returns gradients that aren't projected, and that a backward pass
projects what was accumulated before once more, which P² = P makes the same. Sharded gradients are
projected at the end of the backward pass, so after hooks that step an optimizer within it.

Source: Sculpting Subspaces, arXiv 2504.07097, and PEFT's OSF tuner.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from osf_kernels import (
    Basis,
    apply_,
    coefficients,
    project_,
    project_many_,
    truncated_svd,
)
from osf_torch.integrations._peer import require_peer
from osf_torch.sharding import is_dtensor, local, sharding_of, sum_over

PEER = ("peft", "peft", ">=0.21,<0.22")

# From this min(m, n) on, and this share of it held high, leading triplets by eigenvectors and the
# SVD of the low block take less time than one SVD: .6 s against .9 s at 1024 with ρ = .5 on a CPU,
# even at 768. On a GPU, where LAPACK's divide and conquer isn't, unmeasured.
SPLIT_SIZE = {"cpu": 1024, "cuda": 256}
SPLIT_RATIO = 0.4

_MODULES = ("layer", "model", "utils")
_ROWS, _COLUMNS = -2, -1
_SIDES = {"U_low": _ROWS, "V_low": _COLUMNS}


# --- switching ---


@dataclass
class _Switched:
    """What was replaced: (owner, name, the peer's own or None), and the hook on all optimizers."""

    replaced: list[tuple[Any, str, Any]]
    restoring: Any = None


_switched: _Switched | None = None


def enable(*, restore: bool = False) -> None:
    """Switches PEFT's OSF tuner to this module, for layers made from now on. Idempotent.

    Layers that exist are switched by :func:`attach`.

    Args:
        restore: also project U_low and V_low after every step of every optimizer; a later call
            changes it.

    Raises:
        ImportError: peft isn't installed, or in another version than those supported.
    """
    global _switched
    require_peer(*PEER, "peft")
    if _switched is None:
        layer, model, utils = map(
            importlib.import_module, (f"peft.tuners.osf.{name}" for name in _MODULES)
        )
        _switched = _Switched([])
        for owner, name, ours in (
            (utils, "decompose_weight_matrix", decompose_weight_matrix),
            (layer, "decompose_weight_matrix", decompose_weight_matrix),
            (
                utils,
                "project_gradient_to_orthogonal_space",
                project_gradient_to_orthogonal_space,
            ),
            (layer.OSFLayer, "_attach_hooks", _attach_layer),
            (layer.Linear, "forward", _forward),
            (model.OSFModel, "_cast_adapter_dtype", _cast_adapter_dtype),
        ):
            _switched.replaced.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, ours)
    if restore and _switched.restoring is None:
        _switched.restoring = register_optimizer_step_post_hook(_restore_hook)
    elif not restore and _switched.restoring is not None:
        _switched.restoring.remove()
        _switched.restoring = None


def disable() -> None:
    """Gives PEFT its own functions back. Idempotent.

    Layers made or attached meanwhile keep their hooks, and so go on projecting; what
    ``enable(restore=True)`` restored is restored no more.
    """
    global _switched
    if _switched is None:
        return
    for owner, name, own in _switched.replaced:
        if own is None:
            delattr(owner, name)  # inherited
        else:
            setattr(owner, name, own)
    if _switched.restoring is not None:
        _switched.restoring.remove()
    _switched = None


def attach(model: nn.Module) -> int:
    """Hooks the parameters that the OSF layers of ``model`` have now. Idempotent.

    Call it after ``fully_shard``, after ``load_state_dict(assign=True)``, and for a model made
    before :func:`enable`, whose own hooks it takes off.

    Returns:
        How many parameters are hooked.

    Raises:
        ImportError: as enable.
        ValueError: the model has no OSF layer, or a parameter is sharded in a way that isn't
            one Shard; nothing is attached.
    """
    require_peer(*PEER, "peft")
    layers = _layers(model, "attach")
    for name, layer in layers:
        for adapter in layer.osf_svd_params:
            for side in _SIDES:
                try:
                    sharding_of(layer.osf_svd_params[adapter][side])
                except ValueError as error:
                    raise ValueError(
                        f"osf_torch.integrations.peft.attach: {side} of {adapter!r} in {name!r}: "
                        f"{error}"
                    ) from None
    return sum(_attach_anew(layer) for _, layer in layers)


def verify(model: nn.Module) -> None:
    """Raises RuntimeError where a trainable U_low or V_low isn't hooked, naming the layer.

    Raises:
        ValueError: the model has no OSF layer.
        RuntimeError: see above; call :func:`attach`.
    """
    for name, layer in _layers(model, "verify"):
        for adapter in layer.osf_svd_params:
            for side in _SIDES:
                parameter = layer.osf_svd_params[adapter][side]
                if parameter.requires_grad and _projection_of(parameter) is None:
                    raise RuntimeError(
                        "osf_torch.integrations.peft.verify: expected gradients to be projected, "
                        f"got no hook on {side} of {adapter!r} in {name!r}: the parameter was "
                        "replaced, or made before enable(); call attach(model)"
                    )


def restore_after(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Projects U_low and V_low of ``model`` after each step of ``optimizer``.

    U_low ← P_U U_low, V_low ← V_low P_V for those that had a gradient, as a whole in one list
    call, and in one collective where they are sharded. Attaches the model too.

    Returns:
        A handle; ``.remove()`` stops restoring, and leaves the gradients' hooks.

    Raises:
        ImportError, ValueError: as attach; the optimizer owns none of the parameters.
    """
    attach(model)
    ours = {
        id(layer.osf_svd_params[adapter][side])
        for _, layer in _layers(model, "restore_after")
        for adapter in layer.osf_svd_params
        for side in _SIDES
    }
    if not any(id(p) in ours for p in _owned(optimizer)):
        raise ValueError(
            "osf_torch.integrations.peft.restore_after: expected optimizer to own U_low and V_low "
            "of the model, got one that owns none; make it from this model's parameters, after "
            "fully_shard"
        )
    return optimizer.register_step_post_hook(_restore_hook)


# --- what stands in for the peer's functions ---


def decompose_weight_matrix(weight: Tensor, top_k: int) -> dict[str, Any]:
    """W = U_high S_high V_high + U_low S_low V_low, the thin SVD split behind triplet ``top_k``.

    Args:
        weight: (m, n) of any floating dtype; computed in float32 (float64 of float64).
        top_k: how many triplets are high, at most min(m, n).

    Returns:
        U_high (m, k), S_high (k,), V_high (k, n), and the trainable parameters U_low, S_low, V_low,
        of the weight's dtype; rank_high = k. U's columns and V's rows are orthonormal, between
        high and low too.

    Raises:
        ValueError: NaN or Inf in a weight of ``SPLIT_SIZE`` and more.

    Mutates nothing; synchronises; draws no random numbers.
    """
    k = min(top_k, *weight.shape)
    if weight.is_meta:  # shapes are all there is
        U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
        V = V.mT
    else:
        W = weight.detach()
        U, S, V = _thin_svd(W if W.dtype == torch.float64 else W.float(), k)

    def kept(factor: Tensor) -> Tensor:
        return factor.to(weight.dtype).clone(memory_format=torch.contiguous_format)

    return {
        "U_high": kept(U[:, :k]),
        "S_high": kept(S[:k]),
        "V_high": kept(V[:, :k].mT),
        "U_low": nn.Parameter(kept(U[:, k:])),
        "S_low": nn.Parameter(kept(S[k:])),
        "V_low": nn.Parameter(kept(V[:, k:].mT)),
        "rank_high": k,
    }


def _thin_svd(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of W, all min(m, n) triplets in order."""
    m, n = W.shape
    if m < n:  # LAPACK takes twice the time for a wide matrix of rows
        V, S, U = _thin_svd(W.mT.contiguous(), k)
        return U, S, V
    if n < SPLIT_SIZE.get(W.device.type, SPLIT_SIZE["cuda"]) or not SPLIT_RATIO * n <= k < n:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U, S, Vh.mT
    Q = None
    if m > n:  # the low block of what is tall is tall itself
        Q, W = torch.linalg.qr(W)
    high = truncated_svd(W, k, complement=True)
    whole = truncated_svd(W, n, method="deflated", warm_start=high)
    return whole.U if Q is None else Q @ whole.U, whole.S, whole.V


def project_gradient_to_orthogonal_space(svd_dict: dict[str, Any]) -> None:
    """dU ← (I − U_high U_highᵀ) dU and dV ← dV (I − V_highᵀ V_high), of U_low's and V_low's grad.

    In place. A DTensor that is sharded along the projected dimension takes one all-reduce of
    coefficients, on its own mesh's group; whatever is whole takes none.

    Args:
        svd_dict: as decompose_weight_matrix makes it; its tensors may be DTensors.
    """
    targets = []
    for side, high in (("U_low", "U_high"), ("V_low", "V_high")):
        grad = svd_dict[side].grad
        if grad is not None:
            basis = svd_dict[high].detach()
            basis = basis.full_tensor() if is_dtensor(basis) else basis
            targets.append(_Target(grad, basis if side == "U_low" else basis.mT, _SIDES[side]))
    _project(targets)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y = base(x) + (U_low S_low V_low − the same as they began) x, in factors."""
    result: Tensor = self.base_layer(x, *args, **kwargs)
    adapter = self.active_adapters[0] if self.active_adapters else None
    if self.disable_adapters or self.merged or adapter not in self.osf_svd_params:
        return result
    params = self.osf_svd_params[adapter]
    U, S, V = params["U_low"], params["S_low"], params["V_low"]
    U0, S0, V0 = (
        getattr(self, f"_osf_{name}_init")[adapter] for name in ("U_low", "S_low", "V_low")
    )
    dtype = torch.promote_types(U.dtype, U0.dtype)
    U, S, V, U0, S0, V0 = (factor.to(dtype) for factor in (U, S, V, U0, S0, V0))
    h = self._cast_input_dtype(x, dtype)
    began = F.linear(F.linear(h, V0) * S0, U0)
    # S goes to the smaller factor: what it multiplies is kept for the backward pass.
    if h.shape[:-1].numel() > U.shape[0]:
        now = F.linear(F.linear(h, V), U * S)
    else:
        now = F.linear(F.linear(h, V) * S, U)
    return result + (now - began).to(x.dtype)


# --- hooks ---


class _Projection:
    """Hook, and handle, of one parameter of one OSF layer; in the layer's ``hook_handles``."""

    def __init__(self, layer: Any, adapter: str, side: str, parameter: Tensor) -> None:
        # Weakly: torch keeps hooks where the garbage collector can't see a cycle through them.
        self._layer, self.adapter, self.side = weakref.ref(layer), adapter, side
        self._inverse: tuple[Tensor, Tensor] | None = None
        # Hooks go onto what requires grad; an adapter that isn't active is to have its own too.
        trainable = parameter.requires_grad
        parameter.requires_grad_(True)
        self._handle = parameter.register_post_accumulate_grad_hook(self)
        parameter.requires_grad_(trainable)

    def live(self) -> bool:
        """Whether the layer's parameter is still the one that was hooked."""
        parameter = self._parameter()
        return parameter is not None and _projection_of(parameter) is self

    def _parameter(self) -> Tensor | None:
        layer = self._layer() if self._handle is not None else None
        if layer is None or self.adapter not in layer.osf_svd_params:
            return None
        parameter: Tensor = layer.osf_svd_params[self.adapter][self.side]
        return parameter

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if is_dtensor(parameter.grad):
            _later(parameter)
        else:
            _project([self.target(parameter.grad)])

    def basis(self) -> Tensor | Basis:
        """What projects: high where PEFT keeps it, else low, which is then the complement."""
        layer: Any = self._layer()  # alive, as what owns the parameter that is projected
        high = getattr(layer, f"_osf_{self.side[0]}_high")
        if self.adapter in high:
            columns: Tensor = high[self.adapter]
            return columns if self.side == "U_low" else columns.mT
        columns = getattr(layer, f"_osf_{self.side}_init")[self.adapter]
        return Basis(columns if self.side == "U_low" else columns.mT, "low")

    def target(self, matrix: Tensor) -> _Target:
        return _Target(matrix, self.basis(), _SIDES[self.side])

    def restoring_target(self, matrix: Tensor) -> _Target:
        """With B (BᵀB)⁻¹ Bᵀ for a low basis: B Bᵀ scales what it keeps by 1 ± ‖BᵀB − I‖, rounding
        in float32 and 4e-3 in bfloat16, and this is applied at every step."""
        target = self.target(matrix)
        if not isinstance(target.basis, Basis):
            return target
        held = getattr(self._layer(), f"_osf_{self.side}_init")[self.adapter]
        if self._inverse is None or self._inverse[0] is not held:
            B = target.basis.columns.double()
            self._inverse = held, torch.linalg.inv(B.mT @ B)
        return replace(target, inverse=self._inverse[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Projection:
        """Hooks the layer's copy, whose parameters, copied before, come without hooks."""
        layer, parameter = memo.get(id(self._layer())), memo.get(id(self._parameter()))
        if not self.live() or layer is None or parameter is None:
            return _unhooked()
        return _Projection(layer, self.adapter, self.side, parameter)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _unhooked, ()  # a pickled parameter comes back without its hooks: attach(model)


def _unhooked() -> _Projection:
    """A handle of nothing."""
    handle = _Projection.__new__(_Projection)
    handle._handle = None
    return handle


def _attach_layer(self: Any, adapter_name: str) -> None:
    """OSFLayer._attach_hooks."""
    if adapter_name not in self.osf_svd_params:
        return
    for side in _SIDES:
        parameter = self.osf_svd_params[adapter_name][side]
        if _projection_of(parameter) is None:
            self.hook_handles.append(_Projection(self, adapter_name, side, parameter))


def _attach_anew(layer: Any) -> int:
    """Hooks the parameters that the layer has now, in place of whatever hooks it had."""
    kept = [h for h in layer.hook_handles if isinstance(h, _Projection) and h.live()]
    for handle in layer.hook_handles:
        if handle not in kept:
            handle.remove()
    layer.hook_handles[:] = kept
    for adapter in layer.osf_svd_params:
        _attach_layer(layer, adapter)
    return len(layer.hook_handles)


def _cast_adapter_dtype(self: Any, *args: Any, **kwargs: Any) -> None:
    """OSFModel._cast_adapter_dtype, the last step of making and of loading an adapter: that of a
    bfloat16 model gets float32 parameters here, new ones, on which no hook is."""
    base = importlib.import_module("peft.tuners.tuners_utils").BaseTuner
    base._cast_adapter_dtype(self, *args, **kwargs)
    for module in self.model.modules():
        if hasattr(module, "osf_svd_params"):
            _attach_anew(module)


def _projection_of(parameter: Tensor) -> _Projection | None:
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return next((hook for hook in hooks.values() if isinstance(hook, _Projection)), None)


def _layers(model: nn.Module, operator: str) -> list[tuple[str, Any]]:
    layer = importlib.import_module("peft.tuners.osf.layer")
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, layer.OSFLayer)]
    if not found:
        raise ValueError(
            f"osf_torch.integrations.peft.{operator}: expected model to have OSF layers, got none; "
            "make it by peft.get_peft_model(model, peft.OSFConfig(...))"
        )
    return found


def _owned(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


@torch.no_grad()
def _restore_hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    hooked = [
        (p, hook)
        for p in _owned(optimizer)
        if p.grad is not None and (hook := _projection_of(p)) is not None
    ]
    _project([hook.restoring_target(p.detach()) for p, hook in hooked])


# FSDP2 calls hooks as each group of parameters is reduced. Sharded gradients wait for the end of
# the backward pass, so that one collective serves them all.
_waiting: dict[int, tuple[Tensor, Any]] = {}


def _later(parameter: Tensor) -> None:
    ready = None
    if parameter.is_cuda:  # FSDP2 reduces on a stream of its own
        ready = torch.cuda.current_stream(parameter.device).record_event()
    _waiting[id(parameter)] = parameter, ready
    # Once a hook and not once a pass: a pass that raised would have left its callback uncalled.
    torch.autograd.Variable._execution_engine.queue_callback(_project_waiting)


@torch.no_grad()
def _project_waiting() -> None:
    waiting = list(_waiting.values())
    _waiting.clear()
    targets = []
    for parameter, ready in waiting:
        if ready is not None:
            torch.cuda.current_stream(parameter.device).wait_event(ready)
        hook = _projection_of(parameter)
        if hook is not None and parameter.grad is not None:
            targets.append(hook.target(parameter.grad))
    _project(targets)


# --- projecting ---


@dataclass(frozen=True)
class _Target:
    """A matrix, or the DTensor of one, and the basis that its ``dim`` is projected with.

    Attributes:
        basis: (whole matrix.shape[dim], r) columns, whole on every rank.
        dim: -2 for (I − B Bᵀ) X, -1 for X (I − B Bᵀ).
        inverse: (BᵀB)⁻¹ (r, r), where a low basis isn't to be taken as orthonormal.
    """

    matrix: Tensor
    basis: Tensor | Basis
    dim: int
    inverse: Tensor | None = None


@torch.no_grad()
def _project(targets: Sequence[_Target]) -> None:
    """P of each in place; those sharded along ``dim`` share one collective a group and dtype."""
    whole: list[tuple[Tensor, Tensor | Basis, int]] = []
    halves: dict[Any, list[tuple[Tensor, Tensor | Basis, Tensor | None]]] = {}
    for target in targets:
        X = local(target.matrix)
        basis = _mapped(target.basis, X.device)
        sharding = sharding_of(target.matrix)
        shared = sharding is not None and sharding.dim == target.dim
        if not shared and target.inverse is None:
            whole.append((X, basis, target.dim))
            continue
        group = None
        if shared:
            assert sharding is not None
            group = sharding.group
            basis = _narrowed(basis, sharding.start, sharding.size)
        kind = (group, X.dtype == torch.float64, X.device)
        rows = X if target.dim == _ROWS else X.mT
        halves.setdefault(kind, []).append((rows, basis, target.inverse))
    if len(whole) == 1:
        X, basis, dim = whole[0]
        project_(X, *((basis, None) if dim == _ROWS else (None, basis)))
    elif whole:
        project_many_(
            [X for X, _, _ in whole],
            [basis if dim == _ROWS else None for _, basis, dim in whole],
            [basis if dim == _COLUMNS else None for _, basis, dim in whole],
        )
    for (group, *_), parts in halves.items():
        ready = [coefficients(X, basis, None) for X, basis, _ in parts]
        sums = [A for A, _ in ready]
        if group is not None:
            sums = sum_over(group, sums)
        for (X, basis, inverse), A, (_, B) in zip(parts, sums, ready, strict=True):
            apply_(X, basis, None, A if inverse is None else inverse.to(A) @ A, B)


def _mapped(basis: Tensor | Basis, device: torch.device) -> Tensor | Basis:
    """Where the matrix is: FSDP2 offloads parameters to the CPU, and no buffers."""
    if isinstance(basis, Basis):
        return Basis(basis.columns.to(device), basis.spans)
    return basis.to(device)


def _narrowed(basis: Tensor | Basis, start: int, size: int) -> Tensor | Basis:
    if isinstance(basis, Basis):
        return Basis(basis.columns.narrow(-2, start, size), basis.spans)
    return basis.narrow(-2, start, size)
