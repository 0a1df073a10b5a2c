"""Spec: what is confined of one weight, and the names of the tensors that a module holds for it.

Of a weight ``weight`` a confined module has these parameters beside it:

================  ==========================================================================
``weight``        W itself, frozen. With update="merge" it is always W₀ + U_l C V_lᵀ for the
                  C of ``weight_merged``, with "beside" always W₀.
``weight_free``   C, the parameter that is trained. Of rank s the factors ``weight_free_B``
                  (p, s) and ``weight_free_A`` (s, q) instead, C = B A.
``weight_merged`` the C that W has in it, frozen; "merge" alone.
``weight_base``   W₀ of a weight of half precision, frozen; "merge" alone.
================  ==========================================================================

All are parameters, so that whatever averages, copies, shards or moves the parameters of a model
does the same to all of them: an average of W and of ``weight_merged`` belong together as W and
``weight_merged`` do, since W is linear in it.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from osf_kernels import FreeBasis, FreePlan, plan_free
from osf_torch.free.inputs import Inputs
from osf_torch.quantized import Stored, stored, stored_whole
from osf_torch.sharding import is_dtensor, local

if TYPE_CHECKING:
    from osf_torch.grown import Spectrum

Update = Literal["merge", "beside"]
MANY_TOKENS = 1 << 20
# What modules that stand around another one call it.
WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
SPECS = "_osf_free"  # of a module, in its __dict__: Spec by attribute
_RESTING = "_osf_resting"  # of a module of FSDP2: its parameters as they are sharded, by name
OF_FSDP = "_is_fsdp_managed_module"  # what fully_shard sets on every module that it shards

_numbers = itertools.count(1)
_BY_HANDLE: weakref.WeakValueDictionary[int, Spec] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class Spec:
    """One confined weight.

    Attributes:
        name: of the weight in the model.
        attribute: of the weight in its module.
        update, rank: as ``confine`` has them.
        left, right: the free bases of the rows and of the columns.
        shape: of the weight.
        is_flat: whether the matrix is the weight with all dimensions but the first in one, as of a
            convolution.
        is_rounded: whether W is rounded from ``weight_base``.
        is_opaque: whether torch's operators can't read the weight's values (quantized), so that its
            module runs as it is and the free block is added to what it returns.
        is_dequantized: whether an opaque weight's module runs with a plain one in its place, which
            has the free block in it, since no layer adds to what it returns (experts).
        trained: whether the weight required a gradient before.
        dtype: of what is trained.
        decays_to_zero: whether C is the free part of the weight itself, and not what is added.
        spectra: of the sides that inputs made, by "U" or "V"; on the host, since the turn to the
            next task alone reads them.
        reference: a ``drifting.Reference`` of what the weight was when it was confined; None of one
            that can't be read.
        inputs: what the confined layers of the model have read, of all its weights.
        owner: the ``Confined`` that made it, which lives as long as a module has it.
        shared: what layers that use the weight give their gradients to, see ``linear._shared``.
        handle: by which operators find it.
        lock: held by a thread that brings the weight up to date.
        free, merged, base, factors: the names of what the module has beside the weight.
        trainable: those of what is trained.
        beside: all of them.
    """

    name: str
    attribute: str
    update: Update
    rank: int | None
    left: FreeBasis
    right: FreeBasis
    shape: tuple[int, ...]
    is_flat: bool
    is_rounded: bool
    is_opaque: bool
    is_dequantized: bool
    trained: bool
    dtype: torch.dtype
    decays_to_zero: bool = False
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    reference: Any = None
    owner: object = None
    inputs: Inputs = field(default_factory=Inputs)
    shared: tuple[Any, ...] | None = None
    handle: int = field(default_factory=lambda: next(_numbers))
    lock: Any = field(default_factory=threading.Lock)
    free: str = field(init=False)
    merged: str = field(init=False)
    base: str = field(init=False)
    factors: tuple[str, str] = field(init=False)
    trainable: tuple[str, ...] = field(init=False)
    beside: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        _BY_HANDLE[self.handle] = self
        # Kept, since every forward pass of a layer asks for them.
        self.free = f"{self.attribute}_free"
        self.merged, self.base = f"{self.attribute}_merged", f"{self.attribute}_base"
        self.factors = f"{self.free}_B", f"{self.free}_A"
        self.trainable = (self.free,) if self.rank is None else self.factors
        merged = (self.merged,) if self.update == "merge" else ()
        self.beside = (*self.trainable, *merged, *((self.base,) if self.is_rounded else ()))

    # Copies of a module share it: what differs between them are their parameters.
    def __copy__(self) -> Spec:
        return self

    def __deepcopy__(self, memo: object) -> Spec:
        return self

    # --- the matrix ---

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(..., m, n)."""
        return (self.shape[0], self.right.size) if self.is_flat else self.shape

    @property
    def is_even(self) -> bool:
        """Whether as many directions of the rows are protected as of the columns, of a matrix or
        of each of a batch."""
        protected = self.left.size - self.left.width
        return protected == self.right.size - self.right.width

    def follow(self, device: torch.device) -> None:
        """Brings the bases to the device that the weight was moved to."""
        if not torch.compiler.is_compiling():
            self.left, self.right = self.left.to(device), self.right.to(device)

    def plan(self, tokens: int) -> FreePlan:
        return plan_free(tokens, self.left.side, self.right.side)

    def order(self, tokens: int) -> str:
        """In which the gradient of C is computed. A compiled graph may be for any number of tokens:
        what it keeps of them is as for many."""
        if not torch.compiler.is_compiling():
            return self.plan(tokens).order
        # The cache would be warned of.
        compiled: FreePlan = plan_free.__wrapped__(MANY_TOKENS, self.left.side, self.right.side)
        return compiled.order


def spec_of(handle: int) -> Spec:
    """By the handle that an operator or a graph has.

    Raises:
        RuntimeError: no weight has it any more.
    """
    spec = _BY_HANDLE.get(abs(handle))
    if spec is None:
        raise RuntimeError(
            "osf_torch.confine: expected a backward pass, or a compiled graph, of weights that are "
            "confined as they were in the forward pass, got one of weights that Confined.release() "
            "or next_task() has ended since; run the forward pass again, or compile anew"
        )
    return spec


def specs_of(module: nn.Module) -> dict[str, Spec]:
    found: dict[str, Spec] = module.__dict__.get(SPECS, {})
    return found


@dataclass(frozen=True, eq=False)
class Place:
    """A confined weight of one module, which a copy of the module has too."""

    module: nn.Module
    spec: Spec

    def get(self, name: str) -> Tensor:
        """What the module has now: within a forward pass of FSDP2 a gathered tensor."""
        found = self._held(name)
        if found is None:
            raise RuntimeError(
                f"osf_torch.confine: expected the module of {self.name!r} to have its parameter "
                f"{name!r}, got none: something else has replaced it, such as a parametrization; "
                "release() before that"
            )
        return found

    def _held(self, name: str) -> Tensor | None:
        return self.module._parameters.get(name)

    @property
    def is_sharded(self) -> bool:
        """Whether the tensors are DTensors, or what FSDP2 has gathered of them: they are merged
        between steps only, never within a forward pass."""
        held = self.get(self.spec.attribute), self.get(self.spec.trainable[0])
        return is_fsdp(self.module) or any(map(is_dtensor, held))

    @property
    def handle(self) -> int:
        """By which operators find the spec; negative where they mustn't merge."""
        return -self.spec.handle if self.is_sharded else self.spec.handle

    @property
    def weight(self) -> Tensor:
        return self.get(self.spec.attribute)

    @property
    def block(self) -> Tensor:
        """C; of a weight of rank s the product of its factors."""
        if self.spec.rank is None:
            return self.get(self.spec.free)
        B, A = (self.get(name) for name in self.spec.factors)
        return B @ A

    @property
    def base(self) -> Tensor | None:
        """W₀ of a weight that is rounded from it."""
        return self.get(self.spec.base) if self.spec.is_rounded else None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        return self.spec.matrix_shape

    def trained(self) -> list[Tensor]:
        return [self.get(name) for name in self.spec.trainable]

    @property
    def is_trained(self) -> bool:
        """Whether a gradient is wanted of what is trained, of a factor at least."""
        return any(self.get(name).requires_grad for name in self.spec.trainable)

    def steps(self, owned: Collection[int]) -> bool:
        """Whether what is trained is among the parameters of these ids."""
        return any(id(self._held(name)) in owned for name in self.spec.trainable)

    def beside(self) -> list[Tensor]:
        """All that the module has beside the weight itself."""
        return [self.get(name) for name in self.spec.beside]

    @property
    def stored(self) -> Stored | None:
        """What an opaque weight stands for; None of any other, and where that isn't known. Of one
        that was sharded since a collective, which gathers its codes and scales."""
        if not self.spec.is_opaque:
            return None
        attribute, weight = self.spec.attribute, self.weight
        if is_dtensor(weight):
            held = {name: self._held(name) for name in self.module._parameters}
            return stored_whole(held, self.module, attribute)
        return stored(weight, [(self.module, attribute)])

    @property
    def is_read(self) -> bool:
        """Whether the weight's values are known, which ``drift`` takes."""
        return not self.spec.is_opaque or self.stored is not None

    @property
    def device(self) -> torch.device:
        return local(self.weight).device

    @property
    def is_attached(self) -> bool:
        """Whether the module has what it trains; not before ``confine`` is sure of all weights."""
        return self.spec.trainable[0] in self.module._parameters


class AtRest(Place):
    """The same, with the tensors that an optimizer has, also while FSDP2 has gathered others in
    their place."""

    def _held(self, name: str) -> Tensor | None:
        return resting(self.module).get(name, super()._held(name))


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` shards the parameters of this module."""
    return bool(module.__dict__.get(OF_FSDP, False))


def resting(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a confined module as FSDP2 shards them; none where it doesn't.

    A module doesn't say which they are while it has gathered ones, so that they are kept whenever
    they are seen. FSDP2 reads every weight before the first forward pass, and after the parameters
    were moved, which ``layers`` tells of.
    """
    if not is_fsdp(module):
        return {}
    held: dict[str, Tensor] = module.__dict__.get(_RESTING, {})
    name = next((spec.trainable[0] for spec in specs_of(module).values()), None)
    now: Any = None if name is None else module._parameters[name]
    if name is None or not is_dtensor(now) or now is held.get(name):
        return held
    # Of other meshes are DTensors that a forward pass has, or leaves until its backward pass.
    if held and now.device_mesh != held[name].device_mesh:  # type: ignore[attr-defined]
        return held
    held = {key: t for key, t in module._parameters.items() if t is not None}
    module.__dict__[_RESTING] = held
    return held


def require_in_place(model: nn.Module, place: Place) -> None:
    """Refuses a confined module that isn't where it was in the model.

    Raises:
        RuntimeError: another module stands there, or none.
    """
    found: nn.Module | None = model
    for key in place.spec.name.split(".")[:-1]:
        found = _within(found)._modules.get(key) if found is not None else None
    found = None if found is None else _within(found)
    if found is not place.module:
        got = "none" if found is None else f"another {type(found).__name__}"
        raise RuntimeError(
            f"osf_torch.confine: expected the module of {place.name!r} in the model, got {got}, "
            "which trains unconfined; put back what was confined, or Confined.release() and "
            "confine the model as it is now"
        )


def _within(module: nn.Module) -> nn.Module:
    """The module that another is wrapped around."""
    while inner := next((module._modules[w] for w in WRAPPED if w in module._modules), None):
        module = inner
    return module


def places_of(model: nn.Module) -> list[Place]:
    """Every confined weight of a model, in its order."""
    return [Place(module, spec) for module in model.modules() for spec in specs_of(module).values()]
