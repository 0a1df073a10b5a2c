"""Listings of machine code as cuobjdump prints them, made of a few instructions."""

from __future__ import annotations

from bench import sass


def listing(*lines: str, architecture: str = "sm_80", name: str = "kernel") -> str:
    """A listing as cuobjdump prints it: 16 bytes an instruction, its encoding beside it."""
    text = [f"\tcode for {architecture}", f"\t\tFunction : {name}", '\t.headerflags @"EF"']
    for i, line in enumerate(lines):
        text.append(f"        /*{16 * i:04x}*/   {line} ;   /* 0x000000ff06067224 */")
        text.append("                              /* 0x000fe200078e00ff */")
    return "\n".join(text)


def code(*lines: str) -> tuple[sass.Instruction, ...]:
    (function,) = sass.parse(listing(*lines))
    return function.instructions
