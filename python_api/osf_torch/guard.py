"""protect: keep a model's updates out of its protected subspaces while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from osf_kernels import Basis, Mode, plan, project, project_, project_many_, restore_many_

When = Literal["auto", "step", "backward"]

# How far U, S, V may be from triplets of the weight, relative to S: float32 decompositions of
# trained weights are off by 1e-6 to 1e-5, bfloat16 bases by 3e-3.
TRIPLETS_LIMIT = 2e-2


@dataclass(frozen=True)
class Subspace:
    """What is protected of one weight.

    Attributes:
        U: (m, r) orthonormal columns, a Basis, or None for an unprotected side.
        V: (n, k) likewise.
        S: (r,) singular values when U, S, V are triplets of the weight and both bases are high:
            then the protected part is known without a copy. Best from a float64 decomposition,
            rounded once (``refresh(compute_dtype=torch.float64)``): the columns of a float32
            torch.linalg.svd are orthonormal to 2e-5 only on trained weights, and that, and its
            residual, is what leaks and drifts.
        protected: (m, n) W_ref − P(W_ref), instead of S. Where neither is given, ``protect``
            computes it from the weight as it stands.
    """

    U: Tensor | Basis | None
    V: Tensor | Basis | None
    S: Tensor | None = None
    protected: Tensor | None = None


@dataclass(frozen=True)
class Leak:
    """The share ‖g − P(g)‖ / ‖g‖ of a gradient in the protected span, before and after."""

    raw: float
    applied: float


@dataclass
class _Entry:
    name: str
    weight: nn.Parameter
    subspace: Subspace
    leak: Leak | None = None


def protect(
    model: nn.Module,
    subspaces: Mapping[str, Subspace],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    when: When = "auto",
    restore: bool = True,
    mode: Mode = "complement",
    record: bool = False,
) -> Guard:
    """Projects the gradients of ``model`` and pins what its optimizer moves all the same.

    Each step g ← P(g) before the optimizer, and with ``restore`` W ← P(W) + protected after it:
    elementwise optimizers and weight decay reach into the protected span even from a
    projected gradient.

    Args:
        model: its 2-D (or batched) parameters named in ``subspaces`` are protected.
        subspaces: by parameter name as in ``model.named_parameters()``; ``refresh`` makes them.
        optimizer: the one that steps the model; required for when="step" and for restore.
        when: "step" projects all gradients in one list call in the optimizer's step pre-hook;
            "backward" projects each gradient when it has been accumulated; "auto" takes "step"
            with an optimizer and "backward" without, and ``Guard.when`` says which.
        restore: pin the protected part in the optimizer's step post-hook.
        mode: "complement" or "core", for projecting and restoring.
        record: measure the leak at every projection for ``Guard.leak()``; costs another
            projection and a synchronisation per matrix.

    Returns:
        A :class:`Guard`, attached.

    Raises:
        ValueError: no subspace, an unknown parameter name, a shape that doesn't fit, an
            optimizer that is missing or doesn't own a protected parameter, S that isn't the
            weight's; nothing is attached.
    """
    if not subspaces:
        raise ValueError(
            "osf_torch.protect: expected subspaces to name at least one parameter, got none"
        )
    if when not in ("auto", "step", "backward"):
        raise ValueError(
            f'osf_torch.protect: expected when to be "auto", "step" or "backward", got {when!r}'
        )
    for need, wanted in (("restore=True", restore), ('when="step"', when == "step")):
        if wanted and optimizer is None:
            raise ValueError(
                f"osf_torch.protect: expected optimizer to be given with {need}, got None; "
                'pass optimizer=, or restore=False and when="backward"'
            )
    entries = _entries(model, subspaces, mode)
    if optimizer is not None:
        _require_owner(optimizer, entries)
    if restore:
        for entry in entries:
            entry.subspace = _pinnable(entry, mode)
    chosen: Literal["step", "backward"]
    chosen = when if when != "auto" else ("backward" if optimizer is None else "step")
    return Guard(model, entries, optimizer, chosen, restore, mode, record)


def _entries(model: nn.Module, subspaces: Mapping[str, Subspace], mode: Mode) -> list[_Entry]:
    parameters = dict(model.named_parameters())
    entries: list[_Entry] = []
    for name, subspace in subspaces.items():
        weight = parameters.get(name)
        if weight is None:
            known = ", ".join(list(parameters)[:5])
            raise ValueError(
                f"osf_torch.protect: expected subspaces to name parameters of the model, "
                f"got {name!r}; it has {len(parameters)}, the first are {known}"
            )
        try:
            plan(weight, subspace.U, subspace.V, mode=mode)
        except (TypeError, ValueError) as error:
            raise type(error)(f"osf_torch.protect: parameter {name!r}: {error}") from None
        if weight.requires_grad:
            entries.append(_Entry(name, weight, subspace))
    if not entries:
        raise ValueError(
            "osf_torch.protect: expected a protected parameter that requires grad, got none; "
            "every named parameter is frozen"
        )
    return entries


def _require_owner(optimizer: torch.optim.Optimizer, entries: list[_Entry]) -> None:
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for entry in entries:
        if id(entry.weight) not in owned:
            raise ValueError(
                f"osf_torch.protect: expected optimizer to own parameter {entry.name!r}, got one "
                "that doesn't; build the optimizer from this model's parameters"
            )


def _pinnable(entry: _Entry, mode: Mode) -> Subspace:
    """The subspace with what restore_ needs: S for triplets, else the dense protected part."""
    s = entry.subspace
    if s.protected is not None:
        return Subspace(s.U, s.V, None, s.protected)
    high = all(b is not None and getattr(b, "spans", "high") == "high" for b in (s.U, s.V))
    with torch.no_grad():
        W = entry.weight.detach()
        W = W if W.dtype == torch.float64 else W.float()
        if s.S is None or not high:
            return Subspace(s.U, s.V, None, W - project(W, s.U, s.V, mode=mode))
        # Restoring sets UᵀW to S Vᵀ: were they another weight's, the first step would replace it.
        U, V, S = _double(s.U), _double(s.V), s.S.double()
        assert isinstance(U, Tensor)
        assert isinstance(V, Tensor)
        off = float((U.mT @ W.double() - S.unsqueeze(-1) * V.mT).norm() / S.norm())
        if off > TRIPLETS_LIMIT:
            raise ValueError(
                f"osf_torch.protect: expected U, S, V of parameter {entry.name!r} to be singular "
                f"triplets of it, got |U'W - S V'| = {off:.1e} |S|; take them from the weight "
                "as it stands, or leave S out"
            )
        return s


class Guard:
    """Hooks on a model and its optimizer; made by :func:`protect`.

    Attributes:
        when: "step" or "backward": where gradients are projected.
        restores: whether the protected part is pinned after each step.
        projections: how many times gradients were projected so far.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: list[_Entry],
        optimizer: torch.optim.Optimizer | None,
        when: Literal["step", "backward"],
        restore: bool,
        mode: Mode,
        record: bool,
    ) -> None:
        self.when = when
        self.restores = restore
        self.projections = 0
        self._model = model
        self._entries = entries
        self._mode = mode
        self._record = record
        self._stepped: list[_Entry] = []
        self._handles: list[Any] = []
        if when == "backward":
            for entry in entries:
                hook = self._after_accumulation(entry)
                self._handles.append(entry.weight.register_post_accumulate_grad_hook(hook))
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            if restore:
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def __repr__(self) -> str:
        pinned = "restored after each step" if self.restores else "not restored"
        count = len(self._entries)
        return f"Guard({count} parameters, projected at {self.when}, {pinned}, mode={self._mode!r})"

    # --- hooks ---

    def _after_accumulation(self, entry: _Entry) -> Any:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._project([entry])

        return hook

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        self._stepped = [entry for entry in self._entries if entry.weight.grad is not None]
        if self.when == "step":
            self._project(self._stepped)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        """Pins what the step has moved; weights that had no gradient stood still."""
        entries = self._stepped
        restore_many_(
            [entry.weight for entry in entries],
            [entry.subspace.U for entry in entries],
            [entry.subspace.V for entry in entries],
            S=[entry.subspace.S for entry in entries],
            protected=[entry.subspace.protected for entry in entries],
            mode=self._mode,
        )

    @torch.no_grad()
    def _project(self, entries: list[_Entry]) -> None:
        grads = [entry.weight.grad for entry in entries if entry.weight.grad is not None]
        raw = [self._share(entry) for entry in entries] if self._record else []
        bases = [(entry.subspace.U, entry.subspace.V) for entry in entries]
        if len(grads) == 1:
            project_(grads[0], *bases[0], mode=self._mode)
        else:
            project_many_(grads, [U for U, _ in bases], [V for _, V in bases], mode=self._mode)
        for entry, before in zip(entries, raw, strict=False):
            entry.leak = Leak(before, self._share(entry))
        self.projections += 1

    def _share(self, entry: _Entry) -> float:
        g = entry.weight.grad
        assert g is not None
        g = g.double()
        U, V = _double(entry.subspace.U), _double(entry.subspace.V)
        removed = g - project(g, U, V, mode=self._mode)
        return float(removed.norm() / g.norm().clamp_min(torch.finfo(torch.float64).tiny))

    # --- what a user asks ---

    def leak(self) -> dict[str, Leak]:
        """Per parameter, the protected share of its last gradient before and after projecting.

        Computed in float64 when the gradient was projected, with ``record=True``.

        Raises:
            RuntimeError: recording is off or no gradient was projected yet.
        """
        if not self._record:
            raise RuntimeError(
                "osf_torch.Guard.leak: expected protect(..., record=True), got record=False"
            )
        measured = {entry.name: entry.leak for entry in self._entries if entry.leak is not None}
        if not measured:
            raise RuntimeError(
                "osf_torch.Guard.leak: expected a projected gradient, got none so far; run a "
                "backward pass and, with when='step', an optimizer step first"
            )
        return measured

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """Per parameter ‖H(W) − H_ref‖ / ‖H_ref‖, how far the protected part H(W) = W − P(W)
        has moved since it was protected; computed in float64.

        Raises:
            RuntimeError: with restore=False nothing was kept to compare with, unless the
                subspace came with S or protected.
        """
        drifts: dict[str, float] = {}
        for entry in self._entries:
            s = entry.subspace
            W, U, V = entry.weight.detach().double(), _double(s.U), _double(s.V)
            if s.protected is not None:
                reference = s.protected.double()
            elif s.S is not None and isinstance(U, Tensor) and isinstance(V, Tensor):
                reference = (U * s.S.double().unsqueeze(-2)) @ V.mT
            else:
                raise RuntimeError(
                    f"osf_torch.Guard.drift: expected a reference for {entry.name!r}, got a "
                    "subspace without S and protected and restore=False; give one of them"
                )
            moved = W - project(W, U, V, mode=self._mode) - reference
            drifts[entry.name] = float(moved.norm() / reference.norm().clamp_min(1e-300))
        return drifts

    def verify(self) -> None:
        """Raises RuntimeError when the protection isn't working: a parameter was replaced since
        (``load_state_dict(assign=True)``, a deepcopy trained in its place) or no hook ever fired.
        """
        parameters = dict(self._model.named_parameters())
        for entry in self._entries:
            if parameters.get(entry.name) is not entry.weight:
                raise RuntimeError(
                    f"osf_torch.Guard.verify: expected parameter {entry.name!r} to be the one that "
                    "was protected, got another; protect the model again after replacing it"
                )
        if self.projections == 0:
            raise RuntimeError(
                "osf_torch.Guard.verify: expected projected gradients, got none so far; the hooks "
                "never fired: is this the model, and the optimizer, that is trained?"
            )

    def remove(self) -> None:
        """Takes every hook off; the model and the optimizer are as before. Idempotent."""
        while self._handles:
            self._handles.pop().remove()


def _double(basis: Tensor | Basis | None) -> Tensor | Basis | None:
    if isinstance(basis, Basis):
        columns = basis.columns.double()
        return columns if basis.spans == "high" else Basis(columns, basis.spans)
    return None if basis is None else basis.double()
