"""How a caller knows the arguments of an operator, made into words only where one is refused."""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """An operator, its matrix or list of matrices and their bases, and whether it is one matrix."""

    op: str
    xs: str
    U: str = "Us"
    V: str = "Vs"
    single: bool = False

    def entry(self, i: int) -> tuple[str, str, str]:
        """The matrix, U and V."""
        tail = "" if self.single else f"[{i}]"
        return f"{self.xs}{tail}", f"{self.U}{tail}", f"{self.V}{tail}"

    def pin(self, name: str, i: int) -> str:
        return name if self.single else f"{name}[{i}]"

    def pins(self, i: int) -> tuple[str, str, str, str]:
        """S, the addend and the two tensors of the residual."""
        residual = self.pin("residual", i)
        return self.pin("S", i), self.pin("protected", i), residual, residual
