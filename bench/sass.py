"""What machine code says of a kernel before it has run: parsing of SASS.

Counts are static: each instruction once, however often it runs, those on paths for odd strides
included. They say that the code is what was meant, not that it is fast.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    guard: str  # "@!P0" or empty
    opcode: str  # "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


class Function(NamedTuple):
    """One kernel of a ``cuobjdump -sass`` listing."""

    architecture: str
    name: str
    instructions: tuple[Instruction, ...]


_HEADER = re.compile(r"\s*code for (sm_\w+)|\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def parse(listing: str) -> list[Function]:
    """The functions of a listing."""
    architecture = name = ""
    found: list[Function] = []
    instructions: list[Instruction] = []

    def close() -> None:
        if name:
            found.append(Function(architecture, name, tuple(instructions)))
        instructions.clear()

    for line in listing.splitlines():
        if match := _INSTRUCTION.match(line):
            address, guard, opcode, operands = match.groups()
            instructions.append(
                Instruction(int(address, 16), (guard or "").strip(), opcode, operands.strip())
            )
        elif match := _HEADER.match(line):
            close()
            architecture, name = match[1] or architecture, match[2] or ""
    close()
    return found


# --- loops ----------------------------------------------------------------------------------

_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")


def _target(instruction: Instruction) -> int | None:
    match = _TARGET.search(instruction.operands)
    return int(match[1], 16) if match else None


def _jumps(instructions: Sequence[Instruction]) -> dict[int, tuple[set[int], bool]]:
    """By address of each instruction that ends a block: where it may go, and whether on as well.

    BSYNC leads to the target of a BSSY of its barrier; mostly that is the next instruction. A
    call returns, and its target may as well be a part of the same code: sm_80 jumps by CALL where
    a warp must have met before. Where BRX and JMX lead is in a table that a listing doesn't show:
    to each piece of code that nothing else leads to, which misses those that something does.
    """
    last = [instruction.address for instruction in instructions[1:]] + [-1]
    meeting: dict[str, set[int]] = {}
    for instruction in instructions:
        target = _target(instruction)
        if instruction.name == "BSSY" and target is not None:
            meeting.setdefault(instruction.operands.split(",")[0], set()).add(target)
    found: dict[int, tuple[set[int], bool]] = {}
    for instruction, following in zip(instructions, last, strict=True):
        conditional = instruction.guard not in ("", "@PT", "@UPT")
        if instruction.name in ("BRA", "JMP"):
            target = _target(instruction)
            conditional |= "," in instruction.operands
            found[instruction.address] = ({target} if target is not None else set(), conditional)
        elif instruction.name == "CALL":
            target = _target(instruction)
            found[instruction.address] = ({target} if target is not None else set(), True)
        elif instruction.name in ("EXIT", "RET", "BRX", "JMX"):
            found[instruction.address] = (set(), conditional)
        elif instruction.name == "BSYNC":
            targets = meeting.get(instruction.operands, set())
            if following not in targets:
                found[instruction.address] = (targets, conditional)
    indirect = [i.address for i in instructions if i.name in ("BRX", "JMX")]
    if indirect:
        named = set().union(*(targets for targets, _ in found.values()))
        pieces = {
            after.address
            for before, after in itertools.pairwise(instructions)
            if not found.get(before.address, (set(), True))[1]
            and after.address not in named
            and after.name != "NOP"
        }
        for address in indirect:
            found[address] = (pieces, found[address][1])
    return found


class Loop(NamedTuple):
    """A natural loop: the instructions between a backward jump and the head it returns to."""

    head: int
    instructions: tuple[Instruction, ...]


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Every natural loop, back edges to the same head taken together, by address of the head.

    A block belongs to a loop where it can reach the backward jump without passing the head, so
    code that was moved out of line counts, and what lies between by address alone does not.
    """
    if not instructions:
        return []
    jumps = _jumps(instructions)
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    starts = {instructions[0].address}
    for i, instruction in enumerate(instructions):
        if instruction.address in jumps:
            starts |= jumps[instruction.address][0] & index.keys()
            starts |= {following.address for following in instructions[i + 1 : i + 2]}
    order = sorted(starts)
    bounds = [index[start] for start in order] + [len(instructions)]
    block_of = {start: block for block, start in enumerate(order)}

    successors: list[set[int]] = []
    for block in range(len(order)):
        last = instructions[bounds[block + 1] - 1]
        targets, onward = jumps.get(last.address, (set(), True))
        after = {block_of[target] for target in targets if target in block_of}
        if onward and block + 1 < len(order):
            after.add(block + 1)
        successors.append(after)
    predecessors: list[set[int]] = [set() for _ in order]
    for block, after in enumerate(successors):
        for each in after:
            predecessors[each].add(block)

    bodies: dict[int, set[int]] = {}
    dominators = _dominators(successors, predecessors)
    for block, after in enumerate(successors):
        for head in after:
            if dominators[block] >> head & 1:
                bodies.setdefault(head, {head}).update(_reaching(block, head, predecessors))
    return [
        Loop(
            order[head],
            tuple(i for b in sorted(body) for i in instructions[bounds[b] : bounds[b + 1]]),
        )
        for head, body in sorted(bodies.items())
    ]


def _dominators(successors: Sequence[set[int]], predecessors: Sequence[set[int]]) -> list[int]:
    """Of each block the blocks on every path to it from the first, as bits; 0 where none leads."""
    reached, waiting = {0}, [0]
    while waiting:
        new = successors[waiting.pop()] - reached
        reached |= new
        waiting += new
    every = sum(1 << block for block in reached)
    found = [every if block in reached else 0 for block in range(len(successors))]
    found[0] = 1
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = every
            for each in predecessors[block] & reached:
                common &= found[each]
            if found[block] != (new_bits := common | 1 << block):
                found[block], changed = new_bits, True
    return found


def _reaching(block: int, head: int, predecessors: Sequence[set[int]]) -> set[int]:
    found, waiting = {head}, [block]
    while waiting:
        if (each := waiting.pop()) not in found:
            found.add(each)
            waiting += predecessors[each]
    return found


# --- counts ---------------------------------------------------------------------------------


def is_tensor_core(instruction: Instruction) -> bool:
    """HMMA, IMMA, DMMA, HGMMA, UTCHMMA and their kin."""
    return instruction.name.endswith("MMA")


_LOADS, _STORES = ("LDG", "LDGSTS", "LD"), ("STG", "ST")
_BULK = re.compile(r"UBLKCP|UBLKPF|UTMA(LDG|STG|REDG)")
_WIDTH = re.compile(r"\.(?:[US](8|16)|(32|64|128|256))(?=\.|$)")


def access_bytes(instruction: Instruction) -> int:
    """Bytes a thread moves by one load or store."""
    # A modifier such as LTC128B is a hint to the cache, not a width.
    widths = [int(a or b) for a, b in _WIDTH.findall(instruction.opcode)]
    return (widths[-1] if widths else 32) // 8


@dataclass(frozen=True)
class Counts:
    """What a stretch of code holds, NOPs left out."""

    instructions: int
    tensor_core: int
    loads_16: int  # global, of 16 bytes or more a thread
    loads_narrow: int
    stores_16: int
    stores_narrow: int
    bulk_copies: int  # TMA and cp.async.bulk
    local: int  # loads and stores of local memory: spills, or arrays indexed at run time

    @property
    def tensor_core_share(self) -> float:
        return self.tensor_core / self.instructions if self.instructions else 0.0


def count(instructions: Iterable[Instruction]) -> Counts:
    listed = [each for each in instructions if each.name != "NOP"]

    def number(holds: Callable[[Instruction], object]) -> int:
        return sum(bool(holds(each)) for each in listed)

    def wide(each: Instruction) -> bool:
        return access_bytes(each) >= 16

    return Counts(
        len(listed),
        number(is_tensor_core),
        number(lambda each: each.name in _LOADS and wide(each)),
        number(lambda each: each.name in _LOADS and not wide(each)),
        number(lambda each: each.name in _STORES and wide(each)),
        number(lambda each: each.name in _STORES and not wide(each)),
        number(lambda each: _BULK.match(each.name)),
        number(lambda each: each.name in ("LDL", "STL")),
    )


def hot_loop(instructions: Sequence[Instruction]) -> Counts | None:
    """Counts of the loop that holds most of the tensor-core instructions; None where none does.

    Candidates hold no smaller loop with such an instruction, which passes over loops that only
    wait for a barrier or copy; of equals the shortest is taken.
    """
    found = [
        (loop, {each.address for each in loop.instructions if is_tensor_core(each)})
        for loop in loops(instructions)
    ]
    found = [(loop, products) for loop, products in found if products]

    def holds_another(loop: Loop) -> bool:
        addresses = {each.address for each in loop.instructions}
        return any(other.head != loop.head and other.head in addresses for other, _ in found)

    innermost = [(loop, products) for loop, products in found if not holds_another(loop)]
    if not innermost:
        return None
    best, _ = max(innermost, key=lambda pair: (len(pair[1]), -len(pair[0].instructions)))
    return count(best.instructions)


_USAGE = re.compile(
    r"arch = (\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
)


class Usage(NamedTuple):
    """Of ``cuobjdump -res-usage``, a thread or a block."""

    registers: int
    local_bytes: int  # spills and arrays in local memory
    static_shared_bytes: int


def parse_usage(said: str) -> dict[tuple[str, str], Usage]:
    """By architecture (empty in the report on a single cubin) and function."""
    architecture = ""
    found: dict[tuple[str, str], Usage] = {}
    for match in _USAGE.finditer(said):
        if match[1]:
            architecture = match[1]
            continue
        registers, stack, shared, local = map(int, match.groups()[2:])
        found[architecture, match[2]] = Usage(registers, stack + local, shared)
    return found
