"""Optimization over orthonormal columns: what EBLoRA's optimizer needs, in batches.

A point X (..., m, r) has XᵀX = I. A step from it is three functions over ``osf_kernels``: the
gradient is projected on the tangent space (:func:`tangent_project`) and away from a frozen frame
(:func:`project_away`), and what the optimizer makes of it is retracted (:func:`retract`).
:class:`StiefelAdamW` is the reference made of them::

    optimizer = StiefelAdamW(
        [
            {"params": left_factors},  # (m, r)
            {"params": right_factors, "rows": True, "frozen": earlier},  # (r, n), (n, p)
        ],
        lr=1e-3,
    )

EBLoRA freezes what earlier tasks used on the input side of each layer: then a layer is a group.
Its scaling of steps by the width of a factor is a group's ``lr``. No peer is needed.

Source: Spectral Imbalance Causes Forgetting in Low-Rank Continual Adaptation, arXiv 2602.00722;
Absil, Mahony & Sepulchre 2008, Optimization Algorithms on Matrix Manifolds (tangent space,
retraction); Edelman, Arias & Smith 1998, The geometry of algorithms with orthogonality constraints
(canonical metric).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from osf_kernels import apply_, coefficients, polar, project, project_, project_many_
from osf_torch.scalars import read

Metric = Literal["canonical", "euclidean", "horizontal"]
_METRICS = ("canonical", "euclidean", "horizontal")
_OPTIONS = {"lr", "betas", "eps", "weight_decay", "metric", "transport", "frozen", "rows"}


def tangent_project(G: Tensor, X: Tensor, *, metric: Metric = "euclidean") -> Tensor:
    """What a direction G is on the tangent space {D : XᵀD + DᵀX = 0} at X.

    "euclidean": G − X sym(XᵀG), the orthogonal projection; of a gradient, the steepest direction
    under the Euclidean metric. "horizontal": G − X XᵀG, the part that moves the span of X.
    "canonical": G − X GᵀX; of a gradient, the steepest direction under the canonical metric. It is
    tangent for any G, but no projection: it doubles the part of a tangent direction that turns X
    within its span. EBLoRA takes it for gradients and steps alike.

    Args:
        G: (..., m, r) float32, bfloat16, float16 or float64; never written.
        X: (..., m, r) with orthonormal columns.

    Returns:
        (..., m, r) of G's dtype, new.

    Raises:
        TypeError: dtypes that osf_kernels.project refuses.
        ValueError: shapes that differ, an unknown metric.

    Doesn't synchronise; draws no random numbers; not differentiable.
    """
    if metric not in _METRICS:
        raise _error("tangent_project", f"metric to be one of {', '.join(_METRICS)}", metric)
    _require_alike("tangent_project", "G", G, X)
    with torch.no_grad():
        return _tangent_(G.clone(memory_format=torch.contiguous_format), X, metric)


def _tangent_(G: Tensor, X: Tensor, metric: Metric) -> Tensor:
    """:func:`tangent_project` in place."""
    if metric == "horizontal":
        return project_(G, X)
    A, B = coefficients(G, X, None)  # XᵀG (..., r, r), and nothing of the right side
    A = A.mT if metric == "canonical" else (A + A.mT) / 2
    return apply_(G, X, None, A, B)


def project_away(G: Tensor, frozen: Tensor | None) -> Tensor:
    """G − F FᵀG: what of G (..., m, r) is orthogonal to a frozen frame F (..., m, p).

    With X orthogonal to F it commutes with every :func:`tangent_project`, so a direction that is
    both tangent and orthogonal to F comes of either order. None freezes nothing.
    ``osf_kernels.project`` with one basis, under the name of its use here.
    """
    return project(G, frozen)


def retract(X: Tensor, step: Tensor, *, frozen: Tensor | None = None) -> Tensor:
    """The point nearest to X + step: polar(X + step), with ``frozen`` polar((I − F Fᵀ)(X + step)).

    After a tangent step D, (X + D)ᵀ(X + D) = I + DᵀD, so the polar factor is always well
    conditioned, and is (X + D)(I + DᵀD)^(-1/2).

    Args:
        X: (..., m, r); with step = 0 any matrix of full rank is brought to orthonormal columns.
        step: (..., m, r).
        frozen: (..., m, p) orthonormal columns with r + p ≤ m, or None.

    Returns:
        (..., m, r) with orthonormal columns, float32 (float64 of float64), as
        ``osf_kernels.polar`` promises, and orthogonal to ``frozen`` to rounding of X + step.

    Raises:
        TypeError, ValueError: as ``osf_kernels.polar``; NaN or Inf; shapes that differ.

    Mutates nothing; synchronizes once; draws no random numbers; not differentiable.
    """
    _require_alike("retract", "step", step, X)
    with torch.no_grad():
        moved = X + step
        return polar(moved if frozen is None else project_away(moved, frozen))


class _Entry(NamedTuple):
    """A parameter that moves in this step."""

    group: dict[str, Any]
    p: Tensor
    X: Tensor  # (..., m, r) a view of p
    G: Tensor  # (..., m, r) a view of its gradient


class StiefelAdamW(torch.optim.Optimizer):
    """AdamW over matrices with orthonormal columns, XᵀX = I, and XᵀF = 0 with a frozen frame F.

    Each step projects the gradient on the tangent space and away from F, lets AdamW make an
    elementwise scaled step of it, projects that step the same way, since scaling leaves the
    tangent space, and retracts X + step by its polar factor. Parameters of one shape (m, r) are
    projected and retracted together.

    Args:
        params: parameters (..., m, r), m ≥ r, float32 or float64, or groups of them; they have
            orthonormal columns.
        lr, betas, eps: as of torch.optim.AdamW.
        weight_decay: 0, accepted so that common group options may be passed. Decay pulls X along
            −X, which is normal to the manifold and undone by the retraction: there is nothing
            that a weight decay would do.
        metric: of both projections, see :func:`tangent_project`; "canonical" is EBLoRA's.
        transport: project the first moment on the tangent space of the new point after each
            step. Without it, as in EBLoRA, it keeps a normal part, which the projection of the
            step removes.
        frozen: F (m, p), or (..., m, p) that broadcasts over batches, orthonormal and orthogonal
            to every parameter of its group, or None.
        rows: parameters are (..., r, m) with orthonormal rows, such as LoRA's A; F stays (m, p).

    All of them may differ by group.

    Raises:
        TypeError: a parameter that isn't float32 or float64: what is rounded to 16 bits isn't
            orthonormal.
        ValueError: hyperparameters out of range, a nonzero weight decay, a parameter or frame
            that isn't orthonormal, or not orthogonal to the other, by more than √eps; nothing is
            added then. In ``load_state_dict``, the same of hyperparameters and frames, and groups
            of another optimizer; nothing is loaded then. At a step, NaN or Inf in a gradient;
            nothing has moved then.

    After every step ‖XᵀX − I‖ and ‖FᵀX‖ are at rounding, whatever came before: errors don't
    accumulate. A step synchronizes once, and once for every shape. Gradients are not written. The
    state of a parameter is as torch.optim.Adam's (step, exp_avg, exp_avg_sq); frames are part of
    the groups in ``state_dict``.

    Source: arXiv 2602.00722, whose optimizer this is with metric="canonical" and transport=False.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        metric: Metric = "canonical",
        transport: bool = False,
        frozen: Tensor | None = None,
        rows: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "metric": metric,
            "transport": transport,
            "frozen": frozen,
            "rows": rows,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a pickle, a copy or ``load_state_dict`` holds, which is checked first."""
        with torch.no_grad():
            for group in state["param_groups"]:
                missing = sorted(_OPTIONS - group.keys())
                if missing:
                    expected = "the state of a StiefelAdamW"
                    raise _error("StiefelAdamW", expected, f"a group without {', '.join(missing)}")
                _check_options(group)
                for i, p in enumerate(group["params"]):
                    _check_frame(_name(group, i), p, group)
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group whose parameters and frame were found to be orthonormal."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            with torch.no_grad():
                for i, p in enumerate(group["params"]):
                    _check_point(_name(group, i), p, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient; the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[tuple[object, ...], list[_Entry]] = {}
        for entry in self._moving():
            kind = (entry.X.shape[-2:], entry.X.dtype, entry.X.device, entry.group["metric"])
            alike.setdefault(kind, []).append(entry)
        for entries in alike.values():
            self._move(entries)
        return loss

    def _moving(self) -> list[_Entry]:
        entries, names = [], []
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise _error(
                        "StiefelAdamW.step", "dense gradients", f"a sparse one of {_name(group, i)}"
                    )
                X, G = (p.mT, p.grad.mT) if group["rows"] else (p, p.grad)
                entries.append(_Entry(group, p, X, G))
                names.append(_name(group, i))
        if entries:
            # A sum takes a thirtieth of the time of isfinite().all(); finite numbers may overflow
            # in it, so that one that isn't finite is looked at again.
            sums = read([entry.G.sum() for entry in entries])
            wrong = [
                name
                for entry, name, total in zip(entries, names, sums, strict=True)
                if not math.isfinite(total) and not bool(entry.G.isfinite().all())
            ]
            if wrong:
                got = f"NaN or Inf in that of {', '.join(wrong)}"
                raise _error("StiefelAdamW.step", "finite gradients", got, "skip this step")
        return entries

    def _move(self, entries: list[_Entry]) -> None:
        """A step of parameters of one shape (m, r) and metric, of any batch shapes."""
        metric: Metric = entries[0].group["metric"]
        counts = [math.prod(entry.X.shape[:-2]) for entry in entries]
        frames = [_frame(entry) for entry in entries]

        def away_(stacked: Tensor) -> Tensor:
            held = [
                (part.reshape(entry.X.shape), F)
                for part, F, entry in zip(stacked.split(counts), frames, entries, strict=True)
                if F is not None
            ]
            project_many_([part for part, _ in held], [F for _, F in held], [None] * len(held))
            return stacked

        X = _stacked(entry.X for entry in entries)
        step = _tangent_(away_(_stacked(entry.G for entry in entries)), X, metric)
        for entry, g in zip(entries, step.split(counts), strict=True):
            self._adam_(entry, g.view(entry.X.shape))
        moved = away_(_tangent_(away_(step), X, metric).add_(X))
        for entry, point in zip(entries, polar(moved).split(counts), strict=True):
            entry.X.copy_(point.reshape(entry.X.shape))
            if entry.group["transport"]:
                mean = _columns(self.state[entry.p]["exp_avg"], entry.group)
                onto: Metric = "horizontal" if metric == "horizontal" else "euclidean"
                mean.copy_(tangent_project(mean, entry.X, metric=onto))

    def _adam_(self, entry: _Entry, g: Tensor) -> None:
        """g ← −lr · m̂ / (√v̂ + eps) of one parameter, whose moments take in g (..., m, r) first."""
        group, state = entry.group, self.state[entry.p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(entry.p)
            state["exp_avg_sq"] = torch.zeros_like(entry.p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = (_columns(state[name], group) for name in ("exp_avg", "exp_avg_sq"))
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        unbiased = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        g.copy_(mean).div_(unbiased).mul_(-group["lr"] / (1 - beta1 ** state["step"]))


def _columns(p: Tensor, group: dict[str, Any]) -> Tensor:
    return p.mT if group["rows"] else p


def _stacked(tensors: Iterable[Tensor]) -> Tensor:
    """(b, m, r): the matrices of tensors (..., m, r), one after another; always a copy."""
    return torch.cat([t.reshape(-1, *t.shape[-2:]) for t in tensors])


def _frame(entry: _Entry) -> Tensor | None:
    frozen: Tensor | None = entry.group["frozen"]
    return None if frozen is None else frozen.to(entry.X.device, entry.X.dtype)


def _name(group: dict[str, Any], i: int) -> str:
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"parameter {i} of its group"


def _check_options(group: dict[str, Any]) -> None:
    what = "StiefelAdamW"
    beta1, beta2 = group["betas"]
    for name, value, fine, expected in (
        ("lr", group["lr"], group["lr"] >= 0, "at least 0"),
        ("betas", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1, "in [0, 1)"),
        ("eps", group["eps"], group["eps"] >= 0, "at least 0"),
        ("metric", group["metric"], group["metric"] in _METRICS, f"one of {', '.join(_METRICS)}"),
    ):
        if not fine:
            raise _error(what, f"{name} to be {expected}", value)
    if group["weight_decay"] != 0:
        remedy = "decay is normal to the manifold, and the retraction undoes it; leave it out"
        raise _error(what, "weight_decay to be 0", group["weight_decay"], remedy)


def _check_point(name: str, p: Tensor, group: dict[str, Any]) -> None:
    what = "StiefelAdamW"
    if p.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            str(_error(what, f"{name} to be float32 or float64", p.dtype, "keep it in float32"))
        )
    X = _columns(p, group) if p.dim() >= 2 else p
    layout = "(..., r, m) with m ≥ r" if group["rows"] else "(..., m, r) with m ≥ r"
    if X.dim() < 2 or X.shape[-2] < X.shape[-1]:
        remedy = "pass rows=True if it holds rows" if not group["rows"] else ""
        raise _error(what, f"{name} to be {layout}", tuple(p.shape), remedy)
    limit = _limit(p)
    _require_orthonormal(what, name, X, limit, "bring it there with osf_kernels.polar")
    F = _check_frame(name, p, group)
    off = 0.0 if F is None else _largest(F.mT @ X)
    if not off <= limit:
        remedy = "start from retract(X, torch.zeros_like(X), frozen=F)"
        raise _error(what, f"{name} to be orthogonal to frozen", f"|F'X| = {off:.1e}", remedy)


def _check_frame(name: str, p: Tensor, group: dict[str, Any]) -> Tensor | None:
    """The group's frame where p is, once it is known to be one for it."""
    what, frozen = "StiefelAdamW", group["frozen"]
    if frozen is None:
        return None
    m = _columns(p, group).shape[-2]
    if frozen.dim() < 2 or frozen.shape[-2] != m:
        raise _error(what, f"frozen to be (..., m, p) with m={m} of {name}", tuple(frozen.shape))
    F: Tensor = frozen.to(p)
    _require_orthonormal(what, "frozen", F, _limit(p), "pass osf_kernels.orthonormalize of it")
    return F


def _limit(p: Tensor) -> float:
    return math.sqrt(torch.finfo(p.dtype).eps)


def _require_orthonormal(what: str, name: str, X: Tensor, limit: float, remedy: str) -> None:
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    off = _largest(X.mT @ X - eye)
    if not off <= limit:  # a NaN is refused too
        raise _error(what, f"{name} to be orthonormal", f"|X'X - I| = {off:.1e}", remedy)


def _largest(M: Tensor) -> float:
    """Of the Frobenius norms in a batch."""
    return float(torch.linalg.matrix_norm(M).max()) if M.numel() else 0.0


def _require_alike(what: str, name: str, tensor: Tensor, X: Tensor) -> None:
    if tensor.shape != X.shape:
        expected = f"{name} to be {tuple(X.shape)} like X"
        raise _error(what, expected, tuple(tensor.shape))


def _error(what: str, expected: str, got: object, remedy: str = "") -> ValueError:
    tail = f"; {remedy}" if remedy else ""
    message = f"osf_torch.integrations.stiefel.{what}: expected {expected}, got {got}{tail}"
    return ValueError(message)
