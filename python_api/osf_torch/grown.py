"""Grown: what inputs made protected, by parameter name, with how much was read along what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from osf_kernels import Basis
from osf_torch.bases import Held, columns_of, spans_of
from osf_torch.coverage import Coverage
from osf_torch.selection import listed
from osf_torch.subspaces import Subspace, Subspaces, coverage_lines, smallest, table

ENERGIES = "_energies"  # after a side's letter, the name of its energies among factors


class Spectrum(NamedTuple):
    """How much of the inputs of all tasks so far a grown side holds along what.

    directions diag(energies) directionsᵀ is, within the span of the directions, the sum over tasks
    of XXᵀ/‖X‖²_F.

    Attributes:
        directions: (..., n, r) orthonormal columns that span what is protected.
        energies: (..., r) float64, descending.
    """

    directions: Tensor
    energies: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class InputSubspace(Subspace):
    """What inputs made of one weight: a Subspace whose grown sides know their spectrum.

    A grown side is its directions. Where a low basis is narrower it is held beside them, which
    makes projecting cheaper: at 0.9 n directions a ninth of the FLOPs, for n/10 columns more.

    Attributes:
        spectra: of the sides that inputs made, by "U" or "V".
        low: of those of them that have one, the low basis.
    """

    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    low: Mapping[str, Basis] = field(default_factory=dict)

    @classmethod
    def of(cls, factors: Mapping[str, Tensor]) -> InputSubspace:
        """Of what ``factors`` returns."""
        spectra = {
            side: Spectrum(factors[side], factors[side + ENERGIES])
            for side in "UV"
            if side + ENERGIES in factors
        }
        low = {
            side: Basis(factors[f"{side}_low"], "low")
            for side in spectra
            if f"{side}_low" in factors
        }

        def basis(side: str) -> Held:
            if side in spectra:
                return Basis(factors[side])
            return smallest(factors, side) if factors.keys() & {side, f"{side}_low"} else None

        beside = {name: factors.get(name) for name in ("S", "protected")}
        return cls(U=basis("U"), V=basis("V"), spectra=spectra, low=low, **beside)

    def factors(self) -> dict[str, Tensor]:
        """The tensors that it consists of, each once: of U, U_low, U_energies and the same of V
        those there are."""
        found = {"S": self.S, "protected": self.protected}
        for side, basis in (("U", self.U), ("V", self.V)):
            if basis is not None:
                found[side if spans_of(basis) == "high" else f"{side}_low"] = columns_of(basis)
            if side in self.spectra:
                found[side], found[side + ENERGIES] = self.spectra[side]
            if side in self.low:
                found[f"{side}_low"] = self.low[side].columns
        return {name: factor for name, factor in found.items() if factor is not None}


def narrowest(s: Any) -> tuple[Any, Any]:
    """U and V of a Subspace, each by the basis that projecting takes the fewest FLOPs by; of
    anything else that has sides these."""
    if not isinstance(s, InputSubspace):
        return s.U, s.V
    return s.low.get("U", s.U), s.low.get("V", s.V)


def factors_of(s: Subspace) -> dict[str, Tensor]:
    """The tensors that any Subspace protects by, named as those of an InputSubspace."""
    if not isinstance(s, InputSubspace):
        s = InputSubspace(U=s.U, V=s.V, S=s.S, protected=s.protected)
    return s.factors()


def sides_of(s: Subspace) -> dict[str, Tensor]:
    """Those of both sides alone."""
    return {name: t for name, t in factors_of(s).items() if name not in ("S", "protected")}


def spectra_on_host(s: object) -> dict[str, Spectrum]:
    """The spectra of a Subspace that inputs made; of any other none."""
    if not isinstance(s, InputSubspace):
        return {}
    return {side: Spectrum(*(t.cpu() for t in spectrum)) for side, spectrum in s.spectra.items()}


def is_of_inputs(names: Mapping[str, object]) -> bool:
    """Whether factors by these names are those of an InputSubspace with a spectrum."""
    return any(name.endswith(ENERGIES) for name in names)


class Grown(dict[str, Subspace]):
    """Subspaces by parameter name that inputs made; of ``input_subspaces``.

    Attributes:
        coverage: as of ``Subspaces``.
        released: of each weight that inputs were read of, the share of the energy of all tasks so
            far, of the present one too, that was let go of to keep ``min_free`` directions free; of
            experts that of the one that lost most. 0 where there was room. Empty where these were
            loaded.
    """

    def __init__(
        self,
        subspaces: Mapping[str, Subspace],
        *,
        coverage: Coverage | None = None,
        released: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(subspaces)
        self.coverage = coverage
        self.released = dict(released or {})

    @property
    def left_out(self) -> dict[str, str]:
        """As of ``Subspaces``."""
        return {} if self.coverage is None else dict(self.coverage.left_out)

    def __repr__(self) -> str:
        omitted = listed(list(self.left_out), 3)
        return f"Grown({len(self)} weights{omitted and f'; left out: {omitted}'})"

    def summary(self) -> str:
        """A table of what is protected of each side and what was let go of, then what is covered
        and what isn't."""
        header = ["parameter", "U", "V"] + ["released"] * bool(self.released)
        lines = [
            [name, _side(entry.U), _side(entry.V)]
            + [f"{self.released.get(name, 0):.1%}"] * bool(self.released)
            for name, entry in self.items()
        ]
        return "\n".join([*table(header, lines), *coverage_lines(self.coverage)])


def covering(subspaces: Mapping[str, Subspace], found: Coverage) -> Subspaces | Grown:
    """The same with what is known of what they cover."""
    if isinstance(subspaces, Subspaces):
        return Subspaces(dict(subspaces), seed=subspaces.seed, coverage=found)
    return Grown(subspaces, coverage=found)


def _side(basis: Held) -> str:
    """How many directions of how many are protected, and whether they or the others are held."""
    if basis is None:
        return "none"
    spans = spans_of(basis)
    size, width = columns_of(basis).shape[-2:]
    return f"{width if spans == 'high' else size - width} of {size} {spans}"
