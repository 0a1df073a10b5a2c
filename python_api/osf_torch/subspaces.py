"""What is protected of a weight, and Subspaces: what a refresh found, by parameter name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from osf_kernels import Basis, TruncatedSVD, padded
from osf_torch.bases import Held, spans_of
from osf_torch.coverage import Coverage
from osf_torch.selection import listed

Keep = Literal["smaller", "all"]


@dataclass(frozen=True)
class Subspace:
    """What is protected of one weight.

    Attributes:
        U: (..., m, r) orthonormal columns, a Basis, or None for an unprotected side.
        V: (..., n, k) likewise.
        S: (..., r) singular values when U, S, V are triplets of the weight and both bases are high:
            then the protected part is known without a copy. Best from a float64 decomposition,
            rounded once (``refresh(compute_dtype=torch.float64)``): the columns of a float32
            torch.linalg.svd are orthonormal to 2e-5 only on trained weights, and that, and its
            residual, is what leaks and drifts.
        protected: (..., m, n) W_ref − P(W_ref), instead of S. Where neither is given, ``protect``
            computes it from the weight as it stands.
    """

    U: Held
    V: Held
    S: Tensor | None = None
    protected: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition(Subspace):
    """The Subspace of one weight, with the factors kept of it and how right they are.

    U and V are Basis objects, each side held by the smallest basis kept of it. S (..., r) is always
    kept; ``protect`` restores from it where U and V are both high.

    Attributes:
        svd: the singular triplets, with the low bases that were kept; None where only smaller
            low bases were. A warm or deflated refresh starts from it.
        shape: (..., m, n) of the weight.
        rank: r.
        method, iterations: what ran, as in ``osf_kernels.TruncatedSVD``.
        residual: of the triplets, relative to σ₁, as computed: before the bases were rounded. Of
            a batch of matrices this and what follows are those of the worst.
        captured: share of ‖W‖²_F that they hold.
        converged: whether the residual is at most tol, or where no tol was given within what
            ``osf_kernels.truncated_svd`` promises; None where that isn't known.
        seconds: of the decomposition, an equal share of its batch's.
    """

    svd: TruncatedSVD | None
    shape: tuple[int, ...]
    rank: int
    method: str
    iterations: int
    residual: float
    captured: float
    converged: bool | None
    seconds: float

    def __repr__(self) -> str:
        return (
            f"Decomposition({'x'.join(map(str, self.shape))}, rank {self.rank}, "
            f"held {_spans(self)}; {_ran(self)}, residual {self.residual:.1e}, "
            f"captured {self.captured:.4f}, {self.nbytes / 2**20:.1f} MiB)"
        )

    def factors(self) -> dict[str, Tensor]:
        """The tensors kept, each once: of U, U_low, S, V, V_low those there are."""
        assert self.S is not None
        found = {"S": self.S}
        for side, basis in (("U", self.U), ("V", self.V)):
            assert isinstance(basis, Basis)
            found[side if basis.spans == "high" else f"{side}_low"] = basis.columns
        if self.svd is not None:
            kept = {name: getattr(self.svd, name) for name in ("U", "U_low", "V", "V_low")}
            found |= {name: factor for name, factor in kept.items() if factor is not None}
        return found

    @property
    def nbytes(self) -> int:
        """Of the factors kept."""
        return sum(factor.nbytes for factor in self.factors().values())


def assemble(factors: Mapping[str, Tensor], **facts: Any) -> Decomposition:
    """A Decomposition of the factors kept: for each side U, U_low or both, and S.

    Args:
        factors: tensors named as the fields of ``osf_kernels.TruncatedSVD``.
        facts: the fields of Decomposition that are no tensors.
    """
    S = factors["S"]
    svd = None
    if "U" in factors and "V" in factors:
        converged = facts["converged"]
        svd = TruncatedSVD(
            factors["U"],
            S,
            factors["V"],
            torch.tensor(facts["residual"], dtype=S.dtype, device="cpu"),
            torch.tensor(facts["captured"], dtype=S.dtype, device="cpu"),
            facts["iterations"],
            facts["method"],
            None if converged is None else torch.tensor(converged, device="cpu"),
            factors.get("U_low"),
            factors.get("V_low"),
        )
    return Decomposition(U=smallest(factors, "U"), V=smallest(factors, "V"), S=S, svd=svd, **facts)


def smaller(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors without the larger basis of each side that has both."""
    kept = {"S": factors["S"]}
    for side in "UV":
        basis = smallest(factors, side)
        kept[side if basis.spans == "high" else f"{side}_low"] = basis.columns
    return kept


def smallest(factors: Mapping[str, Tensor], side: str) -> Basis:
    high, low = factors.get(side), factors.get(f"{side}_low")
    if high is None or (low is not None and low.shape[-1] < high.shape[-1]):
        assert low is not None
        return Basis(low, "low")
    return Basis(high, "high")


class Subspaces(Mapping[str, Decomposition]):
    """Decompositions by parameter name, in the model's order; made by ``refresh``.

    ``protect`` takes it as it is; a plain dict of some of its items too.

    Attributes:
        seed: what the random sketches were drawn from.
        coverage: which of the parameters that trained were covered when these were made or loaded,
            and what the others are; None where that isn't known.
    """

    def __init__(
        self,
        decompositions: Mapping[str, Decomposition],
        *,
        seed: int,
        coverage: Coverage | None = None,
    ) -> None:
        self._decompositions = dict(decompositions)
        self.seed = seed
        self.coverage = coverage

    @property
    def left_out(self) -> dict[str, str]:
        """What trained and wasn't covered, by parameter name: its shape and what it is. The biases
        and other vectors aren't among it."""
        return {} if self.coverage is None else dict(self.coverage.left_out)

    def __getitem__(self, name: str) -> Decomposition:
        return self._decompositions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decompositions)

    def __len__(self) -> int:
        return len(self._decompositions)

    def __repr__(self) -> str:
        methods: dict[str, int] = {}
        for entry in self.values():
            methods[entry.method] = methods.get(entry.method, 0) + 1
        counts = ", ".join(f"{count} {method}" for method, count in methods.items())
        worst = max((entry.residual for entry in self.values()), default=0.0)
        rough = sum(entry.converged is False for entry in self.values())
        approximate = f" ({rough} approximate)" if rough else ""
        omitted = listed(list(self.left_out), 3)
        return (
            f"Subspaces({len(self)} weights: {counts or 'none'}; worst residual {worst:.1e}"
            f"{approximate}, {self.nbytes / 2**20:.1f} MiB{omitted and f'; left out: {omitted}'})"
        )

    @property
    def nbytes(self) -> int:
        """Of all factors kept."""
        return sum(entry.nbytes for entry in self.values())

    def without(self, *names: str) -> Subspaces:
        """The same less some weights, which are left out by name.

        Raises:
            ValueError: a name that isn't among them.
        """
        unknown = [name for name in names if name not in self]
        if unknown:
            raise ValueError(
                f"osf_torch.Subspaces.without: expected names of its weights, got {listed(unknown)}"
            )
        kept = {name: entry for name, entry in self.items() if name not in names}
        before = self.coverage or Coverage(sum(math.prod(entry.shape) for entry in self.values()))
        after = before.without({name: self[name].shape for name in names})
        return Subspaces(kept, seed=self.seed, coverage=after)

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Subspaces:
        """The same on another device, or with bases of another dtype; S keeps its own.

        As of a tensor, ``to(torch.bfloat16)`` takes a dtype alone.

        Bases of bfloat16 take half the memory, leak 6e-4 held low and 3e-3 held high, and serve
        a later refresh as a sketch only.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(
                    "osf_torch.Subspaces.to: expected a device and a dtype, got the dtypes "
                    f"{device} and {dtype}"
                )
            device, dtype = None, device
        moved = {}
        for name, entry in self.items():
            factors = {
                part: padded(factor, device, dtype if part != "S" else None)
                for part, factor in entry.factors().items()
            }
            moved[name] = assemble(factors, **facts_of(entry))
        return Subspaces(moved, seed=self.seed, coverage=self.coverage)

    def summary(self) -> str:
        """A table, a line a weight and one over all of them, then what is covered and what not."""
        header = (
            "parameter",
            "shape",
            "rank",
            "held",
            "method",
            "residual",
            "captured",
            "seconds",
            "MiB",
        )
        lines = [
            (
                name,
                "x".join(map(str, entry.shape)),
                str(entry.rank),
                _spans(entry),
                _ran(entry),
                f"{entry.residual:.1e}",
                f"{entry.captured:.4f}",
                f"{entry.seconds:.3f}",
                f"{entry.nbytes / 2**20:.1f}",
            )
            for name, entry in self.items()
        ]
        entries = list(self.values())
        lines.append(
            (
                f"all {len(entries)}",
                "",
                "",
                "",
                "",
                f"{max((e.residual for e in entries), default=0.0):.1e}",
                f"{min((e.captured for e in entries), default=1.0):.4f}",
                f"{sum(e.seconds for e in entries):.3f}",
                f"{self.nbytes / 2**20:.1f}",
            )
        )
        return "\n".join([*table(header, lines), *coverage_lines(self.coverage)])


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of one width a column, the first column to the left."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, tuple("-" * width for width in widths), *lines)
    ]


def coverage_lines(found: Coverage | None) -> list[str]:
    return [] if found is None else [found.table()]


FACTS = (
    "shape",
    "rank",
    "method",
    "iterations",
    "residual",
    "captured",
    "converged",
    "seconds",
)


def facts_of(entry: Decomposition) -> dict[str, Any]:
    """The fields of a Decomposition that ``assemble`` takes beside the factors."""
    return {name: getattr(entry, name) for name in FACTS}


def _ran(entry: Decomposition) -> str:
    """The method, and whether what it found misses what was asked of it."""
    return entry.method + (", approximate" if entry.converged is False else "")


def _spans(entry: Decomposition) -> str:
    return "/".join(map(spans_of, (entry.U, entry.V)))
