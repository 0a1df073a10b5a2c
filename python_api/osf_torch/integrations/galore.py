"""GaLore: low-rank projections of gradients, on ``osf_kernels.truncated_svd`` with warm starts.

:class:`GaLoreProjector` has the interface of galore-torch's, and nothing of that package is
needed to use it::

    projector = GaLoreProjector(rank=128, update_proj_gap=200, scale=0.25)
    low = projector.project(grad, step)  # (m, r) of a tall gradient
    update = projector.project_back(adam(low))  # (m, n), times scale

:func:`enable` switches galore-torch's own optimizers to it, also those that a trainer makes from
``optim="galore_adamw"``; :func:`disable` switches back::

    from osf_torch.integrations import galore

    galore.enable()
    from galore_torch.adamw import AdamW  # GaLoreAdamW

    optimizer = AdamW(groups, lr=1e-3)

Supported: galore-torch 1.x with transformers, its optimizers ``adamw``, ``adafactor`` and, where
bitsandbytes is installed, ``adamw8bit``. galore-torch's package imports all three and fails without
bitsandbytes: ``galore_torch.GaLoreAdamW`` is there with it alone. :func:`enable` loads and switches
the first two all the same, and from then on they are imported from their own modules, as above.

What differs from galore-torch's projector: signs of singular vectors, and with them those of the
low-rank gradient, which Adam's update is indifferent to once it is projected back; a basis is as
near to the leading singular vectors as ``truncated_svd`` promises instead of exact; a float64
gradient is decomposed in float64; what isn't a finite matrix is an error.

Source: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv 2403.03507.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal, cast

import torch
from torch import Tensor

from osf_kernels import padded, truncated_svd
from osf_torch.integrations._peer import require_peer
from osf_torch.integrations._switch import Replacement, Switch

PEER = ("galore_torch", "galore-torch", ">=1.0,<2")

ProjectionType = Literal["std", "reverse_std", "right", "left", "full"]
Side = Literal["right", "left", "full"]
_TYPES = ("std", "reverse_std", "right", "left", "full")


class GaLoreProjector:
    """Projects gradients on their leading singular vectors, found anew every so many steps.

    right: low = G V, back = scale · low Vᵀ; left: low = Uᵀ G, back = scale · U low; full: low =
    Uᵀ G V, back = scale · U low Vᵀ. U and V span the leading left and right singular vectors of
    the gradient at the last refresh. A refresh takes the basis before it as the sketch.

    Args:
        rank: columns of the basis; what is beyond min(m, n) is left out.
        verbose: accepted for galore-torch's sake, and as there without effect.
        update_proj_gap: a refresh at every step that this divides.
        scale: of what ``project_back`` returns.
        proj_type: "std" projects the longer side away: right where m ≥ n, left elsewhere;
            "reverse_std" the other way round; "right", "left", "full" whatever the shape.
        tol: of the residual, for ``truncated_svd``; None for its fixed number of iterations.
        seed: of the sketches. Refresh k of a projector draws from the generator seeded seed + k
            and never from the default one, so runs repeat and every rank of a replicated
            gradient finds the same basis.

    Attributes:
        ortho_matrix: V.mT (r, n) rows, U (m, r) columns, or [U, V.mT], in the gradient's dtype;
            None before the first refresh.
        method: how ``truncated_svd`` found it.
        captured: ‖G V‖²_F / ‖G‖²_F of that refresh, a scalar tensor.
        refreshes: how many there were.

    Raises:
        ValueError: a rank or gap below 1, an unknown proj_type.

    Can be copied and pickled between steps, and goes on as the original would, with gradients of
    another dtype or device too. ``torch.load`` takes a checkpoint that holds one, with
    ``weights_only`` as without, once this module is imported: what is pickled is tensors, numbers
    and strings, and those that make no projector are refused.
    """

    def __init__(
        self,
        rank: int,
        verbose: bool = False,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: ProjectionType = "std",
        *,
        tol: float | None = None,
        seed: int = 0,
    ) -> None:
        _check_options(rank=rank, update_proj_gap=update_proj_gap, proj_type=proj_type)
        self.rank = rank
        self.verbose = verbose
        self.update_proj_gap = update_proj_gap
        self.scale = scale
        self.proj_type = proj_type
        self.tol = tol
        self.seed = seed
        self.ortho_matrix: Tensor | list[Tensor] | None = None
        self.method: str | None = None
        self.captured: Tensor | None = None
        self.refreshes = 0
        self._side: Side | None = None

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """What a pickle or a copy holds.

        Raises:
            ValueError: it isn't the state of a projector.
        """
        if state.keys() != GaLoreProjector(1).__dict__.keys():
            raise _error("GaLoreProjector", "the state of one", ", ".join(map(str, state)))
        _check_options(**{name: state[name] for name in ("rank", "update_proj_gap", "proj_type")})
        held, side = state["ortho_matrix"], state["_side"]
        bases = held if isinstance(held, list) else [] if held is None else [held]
        fine = all(isinstance(basis, Tensor) and basis.dim() == 2 for basis in bases)
        if not fine or len(bases) != {None: 0, "right": 1, "left": 1, "full": 2}.get(side):
            got = f"a {type(held).__name__} and {side}"
            raise _error("GaLoreProjector", "ortho_matrix to be one basis, or two of a full", got)
        self.__dict__.update(state)

    @torch.no_grad()
    def project(self, full_rank_grad: Tensor, iter: int) -> Tensor:
        """The low-rank gradient, (m, r), (r, n) or (r, r); refreshes the basis where it is due.

        Args:
            full_rank_grad: (m, n) float32, bfloat16, float16 or float64; never written.
            iter: the step, counted from 0.

        Raises:
            ValueError: not a matrix; at a refresh one with NaN or Inf, and between two one that
                the basis doesn't fit. The basis is then the one before.

        Synchronizes at a refresh only.
        """
        if full_rank_grad.dim() != 2:
            shape = tuple(full_rank_grad.shape)
            raise _error("GaLoreProjector.project", "an (m, n) gradient", shape, "flatten it first")
        side = self._side_of(full_rank_grad)
        if self.ortho_matrix is None or iter % self.update_proj_gap == 0:
            found = self.get_orthogonal_matrix(full_rank_grad, self.rank, side)
            self.ortho_matrix, self._side = found, side
            self.refreshes += 1
        else:
            self._require_fit(full_rank_grad, side)
        bases = self._bases(full_rank_grad)
        if side == "full":
            return bases[0].mT @ full_rank_grad @ bases[1].mT
        return full_rank_grad @ bases[0].mT if side == "right" else bases[0].mT @ full_rank_grad

    @torch.no_grad()
    def project_back(self, low_rank_grad: Tensor) -> Tensor:
        """The full-rank update, (m, n), times ``scale``.

        The side is the one that ``project`` took. galore-torch guesses it from the shape of
        ``low_rank_grad``, which fails with "reverse_std" for a wide gradient of full rank, where
        an (m, m) low-rank gradient looks like the other side's.

        Raises:
            ValueError: nothing was projected before.
        """
        if self.ortho_matrix is None:
            raise _error("GaLoreProjector.project_back", "a projected gradient", "none so far")
        bases = self._bases(low_rank_grad)
        if self._side == "full":
            return (bases[0] @ low_rank_grad @ bases[1]) * self.scale
        basis = bases[0]
        full = low_rank_grad @ basis if self._side == "right" else basis @ low_rank_grad
        return full * self.scale

    @torch.no_grad()
    def get_orthogonal_matrix(
        self, weights: Tensor, rank: int, type: Side
    ) -> Tensor | list[Tensor]:
        """The leading singular vectors of ``weights`` (m, n), the present basis as the sketch.

        Returns:
            V.mT (r, n) for "right", U (m, r) for "left", [U, V.mT] for "full", of the dtype of
            ``weights``; orthonormal to rounding of it.

        Raises:
            ValueError: an unknown type; NaN or Inf.

        Sets ``method`` and ``captured``, and not the basis.
        """
        if type not in ("right", "left", "full"):
            expected = 'type to be "right", "left" or "full"'
            raise _error("GaLoreProjector.get_orthogonal_matrix", expected, type)
        # A sketch is of the right vectors: the left ones are those of the transpose.
        A = weights.detach().mT if type == "left" else weights.detach()
        try:
            found = truncated_svd(
                A,
                min(rank, *A.shape),
                tol=self.tol,
                warm_start=self._sketch(A, type),
                generator=torch.Generator(A.device).manual_seed(self.seed + self.refreshes),
            )
        except ValueError:
            wrong = A.numel() - int(A.isfinite().sum())
            if not wrong:
                raise
            raise _error(
                "GaLoreProjector.project",
                "a finite gradient",
                f"{wrong} NaN or Inf of {A.numel()}",
                "leave the step out (GradScaler), lower the loss scale",
            ) from None
        self.method, self.captured = found.method, found.captured
        V = padded(found.V, dtype=weights.dtype)
        if type == "left":
            return V
        return V.mT if type == "right" else [padded(found.U, dtype=weights.dtype), V.mT]

    def _side_of(self, grad: Tensor) -> Side:
        tall = grad.shape[0] >= grad.shape[1]
        if self.proj_type == "std":
            return "right" if tall else "left"
        if self.proj_type == "reverse_std":
            return "left" if tall else "right"
        return self.proj_type

    def _require_fit(self, grad: Tensor, side: Side) -> None:
        """The gradient has the sides that the basis was found on."""
        bases = self._bases(grad)
        m = None if self._side == "right" else len(bases[0])
        n = None if self._side == "left" else bases[-1].shape[1]
        if side != self._side or grad.shape != (m or grad.shape[0], n or grad.shape[1]):
            raise _error(
                "GaLoreProjector.project",
                f"a gradient of the shape that the last refresh saw, ({m or 'm'}, {n or 'n'})",
                tuple(grad.shape),
                "a gradient of another shape takes another projector, or waits for a refresh",
            )

    def _bases(self, like: Tensor) -> list[Tensor]:
        """The present ones, in the dtype and on the device of what is to be projected: a run may
        resume in another precision, or elsewhere."""
        held = self.ortho_matrix if isinstance(self.ortho_matrix, list) else [self.ortho_matrix]
        return [cast(Tensor, basis).to(like) for basis in held]

    def _sketch(self, A: Tensor, side: Side) -> Tensor | None:
        """The present basis as columns (n, k) of A's right side, where it is one."""
        if self.ortho_matrix is None or side != self._side:
            return None
        basis = self._bases(A)[-1]
        V = basis if side == "left" else basis.mT
        return V if len(V) == A.shape[1] else None


# Those that construct projectors. The module that defines galore-torch's own keeps it: a projector
# of that class is pickled by the name of its class.
_MODULES = ("adamw", "adafactor", "adamw8bit")
_switch = Switch(*PEER[1:], "galore")
torch.serialization.add_safe_globals([GaLoreProjector])


def enable() -> tuple[str, ...]:
    """Makes galore-torch's optimizers take :class:`GaLoreProjector` for projectors they create.

    Returns:
        The modules of galore_torch that now do. ``galore_torch.adamw8bit`` is among them where
        bitsandbytes is installed.

    Raises:
        ImportError: galore-torch isn't installed, in another version, or doesn't import, or an
            optimizer of it makes projectors of another kind; nothing is changed.

    Warns:
        RuntimeWarning: someone else has replaced what an earlier call put there, and is left there.

    Projectors that an optimizer has created by then stay what they are. Idempotent.
    """
    try:
        require_peer(*PEER, "galore")
    except ImportError as error:
        # The submodules that a failing package has loaded stay in sys.modules.
        if (error.name or "").split(".")[0] != "bitsandbytes":
            raise
    names = [f"{PEER[0]}.{name}" for name in _MODULES]
    loaded = [sys.modules[name] for name in names if name in sys.modules]
    _switch.on(Replacement(module, "GaLoreProjector", GaLoreProjector) for module in loaded)
    return tuple(m.__name__ for m in loaded if vars(m)["GaLoreProjector"] is GaLoreProjector)


def disable() -> None:
    """Undoes :func:`enable`; projectors that were created stay what they are.

    Warns:
        RuntimeWarning: someone else has replaced what :func:`enable` put there, and is left there.
    """
    _switch.off()


def _check_options(rank: Any, update_proj_gap: Any, proj_type: Any) -> None:
    for name, value in (("rank", rank), ("update_proj_gap", update_proj_gap)):
        if not isinstance(value, Integral) or value < 1:
            raise _error("GaLoreProjector", f"{name} to be at least 1", value)
    if proj_type not in _TYPES:
        raise _error("GaLoreProjector", f"proj_type to be one of {', '.join(_TYPES)}", proj_type)


def _error(what: str, expected: str, got: object, remedy: str = "") -> ValueError:
    tail = f"; {remedy}" if remedy else ""
    return ValueError(f"osf_torch.integrations.galore.{what}: expected {expected}, got {got}{tail}")
