"""How a caller knows the arguments of an operator, made into words only where one is refused."""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """An operator, the name of its matrix or list of matrices, and whether it is a list."""

    op: str
    xs: str
    single: bool = False

    def entry(self, i: int) -> tuple[str, str, str]:
        """The matrix, U and V."""
        if self.single:
            return self.xs, "U", "V"
        return f"{self.xs}[{i}]", f"Us[{i}]", f"Vs[{i}]"

    def pin(self, name: str, i: int) -> str:
        return name if self.single else f"{name}[{i}]"

    def pins(self, i: int) -> tuple[str, str, str, str]:
        """S, the addend and the two tensors of the residual."""
        residual = self.pin("residual", i)
        return self.pin("S", i), self.pin("protected", i), residual, residual
