"""Machine code as it is read: listings, registers, and loops."""

from __future__ import annotations

import random

import networkx as nx
import pytest

from bench import sass
from tests.listings import code, listing


def test_parse_reads_guards_opcodes_and_functions() -> None:
    both = "\n".join(
        [
            listing("@!P0 LDG.E.128 R4, [R2.64+0x10]", "EXIT", name="first"),
            "Fatbin elf code:",
            "arch = sm_90",
            listing("@UP1 UIADD3 UR4, UR4, 0x1, URZ", architecture="sm_90a", name="second"),
        ]
    )
    first, second = sass.parse(both)
    assert (first.architecture, first.name) == ("sm_80", "first")
    assert first.instructions == (
        sass.Instruction(0, "@!P0", "LDG.E.128", "R4, [R2.64+0x10]"),
        sass.Instruction(16, "", "EXIT", ""),
    )
    assert (second.architecture, second.name) == ("sm_90a", "second")
    assert second.instructions[0].guard == "@UP1"


def test_parse_of_no_function() -> None:
    assert sass.parse("\tcode for sm_80\n\t.target sm_80\n") == []


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E.128", 16),
        ("LDG.E.LTC128B.64", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", 16),
        ("LDGSTS.E.LTC128B", 4),
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.S8", 1),
        ("LDG.E", 4),
        ("STG.E.EF.128", 16),
        ("LDG.E.ENL2.256", 32),
    ],
)
def test_width_of_an_access(opcode: str, width: int) -> None:
    (instruction,) = code(f"{opcode} R4, [R2.64]")
    assert sass.access_bytes(instruction) == width


def test_counts() -> None:
    counts = sass.count(
        code(
            "LDG.E.128 R4, [R2.64]",
            "LDGSTS.E.BYPASS.128 [R9], [R2.64]",
            "LDG.E.U16 R4, [R2.64]",
            "LDS.128 R4, [R8]",
            "STG.E.64 [R2.64], R4",
            "STG.E.128 [R2.64], R4",
            "STL [R1], R4",
            "LDL.LU R4, [R1]",
            "HMMA.16816.F32.BF16 R4, R8, R12, R4",
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT",
            "IMAD R1, R2, R3, R4",
            "UTMALDG.2D [UR8], [UR4], desc[UR14]",
            "NOP",
        )
    )
    assert counts == sass.Counts(12, 2, 2, 1, 1, 1, 1, 2)
    assert counts.tensor_core_share == 2 / 12
    assert sass.count([]).tensor_core_share == 0


def test_usage_of_a_library_and_of_a_cubin() -> None:
    figures = "\n  REG:96 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:568\n"
    assert sass.parse_usage(f" Function k:{figures}") == {("", "k"): sass.Usage(96, 24, 1024)}
    both = f"arch = sm_80\n Function k:{figures}arch = sm_90\n Function k:{figures}"
    assert set(sass.parse_usage(both)) == {("sm_80", "k"), ("sm_90", "k")}


# loops


def heads(*lines: str) -> dict[int, int]:
    """Number of instructions by index of a loop's first."""
    return {loop.head // 16: len(loop.instructions) for loop in sass.loops(code(*lines))}


def test_nested_loops_and_the_padding_behind_the_code() -> None:
    found = heads(
        "MOV R1, R2",
        "MOV R1, R2",  # 1: outer
        "HMMA.16816.F32 R4, R8, R12, R4",  # 2: inner
        "@P0 BRA 0x20",
        "@P1 BRA 0x10",
        "EXIT",
        "BRA 0x60",  # to itself, never reached
        "NOP",
    )
    assert found == {1: 4, 2: 2}


def test_code_out_of_line_belongs_to_its_loop_and_makes_none() -> None:
    found = heads(
        "MOV R1, R2",
        "LDG.E.128 R4, [R2.64]",  # 1: the loop
        "@P0 BRA 0x60",
        "HMMA.16816.F32 R4, R8, R12, R4",  # 3: where the cold code returns
        "@P1 BRA 0x10",
        "EXIT",
        "MOV R4, RZ",  # 6: cold
        "BRA 0x30",  # backward, but no loop
    )
    assert found == {1: 6}


def test_a_loop_left_by_a_call() -> None:
    """sm_80 leaves a loop by a CALL to behind the jump back; its target may be padding."""
    found = heads(
        "MOV R1, R2",  # 0: outer
        "HMMA.16816.F32 R4, R8, R12, R4",  # 1: inner
        "@P0 CALL.REL.NOINC 0x40",
        "BRA 0x10",
        "NOP",
        "@P1 EXIT",
        "BRA 0x0",
    )
    assert found == {0: 7, 1: 3}


def test_branches_meet_behind_a_bsync_out_of_line() -> None:
    found = heads(
        "BSSY B0, 0x30",  # 0: the loop
        "@P0 BRA 0x50",
        "BSYNC B0",
        "@P1 BRA 0x0",
        "EXIT",
        "MOV R1, R2",
        "BSYNC B0",  # goes to 3, not on
        "EXIT",
    )
    assert found == {0: 6}


def test_kinds_of_tasks_behind_an_indirect_branch() -> None:
    """It leads to each piece of code behind an end of another that nothing else leads to."""
    lines = [
        "MOV R1, R2",  # 0: the loop over tasks
        "@P0 EXIT",
        "BRX R36 -0x30",
        "MOV R4, RZ",  # 3: the first kind
        "HMMA.16816.F32 R4, R8, R12, R4",  # 4: its loop
        "@P1 BRA 0x40",
        "BRA 0xc0",
        "@P2 BRA 0xa0",  # 7: the second kind
        "HMMA.16816.F32 R4, R8, R12, R4",  # 8: its loop
        "@P1 BRA 0x80",
        "STG.E.128 [R2.64], R4",  # 10: where both ways of the second meet
        "BRA 0xc0",
        "BRA 0x0",  # 12: the next task
        "BRA 0xd0",  # 13: padding, never reached
        "NOP",
    ]
    assert heads(*lines) == {0: 13, 4: 2, 8: 2}
    assert heads(*[line.replace("BRX", "JMX") for line in lines]) == {0: 13, 4: 2, 8: 2}
    found = sass.hot_loop(code(*lines))
    assert found is not None
    assert (found.instructions, found.tensor_core) == (2, 1)
    # A conditional one leads on as well.
    lines[2] = "@P3 BRX R36 -0x30"
    assert heads(*lines) == {0: 13, 4: 2, 8: 2}


def test_hot_loop_passes_over_a_wait_inside_and_takes_most_products() -> None:
    product = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT"
    found = sass.hot_loop(
        code(
            product,  # 0: a small loop
            "@P0 BRA 0x0",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2",  # 2: the hot loop, and a wait in it
            "@!P1 BRA 0x20",
            product,
            product,
            "LDG.E R4, [R2.64]",
            "@P0 BRA 0x20",
            "@P1 BRA 0x0",
            product,
            product,
            product,  # outside of any loop
            "EXIT",
        )
    )
    assert found is not None
    assert (found.instructions, found.tensor_core, found.loads_narrow) == (6, 2, 1)
    assert sass.hot_loop(code(product, "EXIT")) is None
    assert sass.hot_loop(()) is None


@pytest.mark.parametrize("seed", range(40))
def test_loops_are_those_of_the_control_flow_graph(seed: int) -> None:
    """Random jumps, against dominators and reachability by networkx."""
    draw = random.Random(seed)
    size = draw.randrange(3, 24)
    lines, graph = [], nx.DiGraph()
    graph.add_nodes_from(range(size + 1))
    for i in range(size):
        target = draw.randrange(size)
        kind = draw.choice(["MOV R1, R2", "MOV R1, R2", "@P0 BRA {}", "BRA {}", "BRA P3, {}"])
        lines.append(kind.format(hex(16 * target)))
        if "BRA" in kind:
            graph.add_edge(i, target)
        if not kind.startswith("BRA {"):
            graph.add_edge(i, i + 1)
    lines.append("EXIT")

    above = nx.immediate_dominators(graph, 0)

    def dominates(head: int, node: int) -> bool:
        while node != head and above.get(node, None) not in (None, node):
            node = above[node]
        return node == head

    expected: dict[int, set[int]] = {}
    reached = nx.descendants(graph, 0) | {0}
    for node, head in graph.edges:
        if node in reached and dominates(head, node):
            before = graph.reverse(copy=True)
            before.remove_node(head)
            body = {head} | ({node} | nx.descendants(before, node) if node != head else set())
            expected.setdefault(head, set()).update(body & reached)
    found = {
        loop.head // 16: {each.address // 16 for each in loop.instructions} & reached
        for loop in sass.loops(code(*lines))
    }
    assert found == expected
