"""What is asked of the code compiled for an architecture: the tests that all of them share.

A file of tests is of one architecture. It imports those tests that it holds and names the
architecture, by which pytest then parametrizes them::

    pytestmark = [pytest.mark.parametrize("architecture", ["sm_80"])]

Asserts carry their own messages, as pytest explains those of test files alone. A kernel that two
tests need is compiled once: Triton keeps it in its cache on disk.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from osf_kernels.backends.triton import configs
from osf_kernels.backends.triton.launches import Launch
from osf_kernels.backends.triton.views import Layout
from osf_kernels.forms import First, Name
from tests.triton import aot

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLASSES = {
    "bf16": aot.Class(BF16, BF16, "tf32x3"),
    "fp16": aot.Class(FP16, FP16, "tf32x3"),
    "fp32": aot.Class(FP32, FP32, "tf32x3"),
    "tf32": aot.Class(FP32, FP32, "tf32"),
    "bf16, fp32 bases": aot.Class(BF16, FP32, "tf32x3"),
    "fp32, bf16 bases": aot.Class(FP32, BF16, "tf32x3"),
    "fp16, fp32 bases": aot.Class(FP16, FP32, "tf32x3"),
}


def on(architecture: str, kind: aot.Class) -> aot.Class:
    """A class as it is computed there: AMD's matrix cores take float32 as it is."""
    native = architecture == "gfx942" and kind.float32_precision == "tf32x3"
    return kind._replace(float32_precision="ieee") if native else kind


def rows_of(architecture: str, kind: aot.Class, aligned: bool = True) -> list[configs.Projection]:
    """The configs that serve a class of operands."""
    math, shipped = aot.math_of(kind), configs.shipped(architecture, aligned)
    if math not in dict(shipped):
        math = "float32"
    return [row for of, row in shipped if of == math]


def launches(
    architecture: str, name: str, *, aligned: bool = True, padded: bool = False
) -> Iterator[Launch]:
    """Of every config that serves a class, at each kind of ranks, with S and without."""
    kind = on(architecture, CLASSES[name])
    for config in rows_of(architecture, kind, aligned):
        ranks = aot.ranks_served(
            architecture, aot.math_of(kind), config, aligned=aligned, padded=padded
        )
        pins: tuple[aot.Pin, ...] = ("", "S")
        for rank, pin in itertools.product(ranks, pins):
            made = aot.launches_of(config, kind, aligned=aligned, padded=padded, pin=pin, rank=rank)
            assert made.constants["WHOLE"] == (rank <= config.block_r), (made.constants, rank)
            assert made.constants["HAS_OFFSET"] == bool(pin), made.constants
            assert made.constants["HAS_PARTS"], made.constants
            yield made


def wrong_with(made: Launch, architecture: str, *, aligned: bool = True) -> list[str]:
    compiled = aot.compile_launch(made, architecture)
    found = aot.faults(compiled, made.config, aligned=aligned)
    return [f"{compiled.name}: {fault}" for fault in found]


def check(architecture: str, name: str, *, aligned: bool = True, strided: bool = False) -> int:
    """Compiles every launch of a class of operands; returns how many.

    Not aligned: rows of odd width. Strided: no unit stride anywhere.
    """
    wrong = []
    checked = 0
    for made in launches(architecture, name, aligned=aligned):
        if strided:
            made.constants.update({key: 0 for key in made.constants if key.endswith("_LAYOUT")})
        wrong += wrong_with(made, architecture, aligned=aligned)
        checked += 1
    assert not wrong, "\n".join(wrong)
    return checked


def expected(architecture: str, name: str) -> int:
    """A launch with S and one without, of each block of ranks and of ranks beyond them all."""
    *rows, last = rows_of(architecture, on(architecture, CLASSES[name]))
    blocks = [row.block_r for row in rows]
    return 2 * (len(rows) + 1 + (last.block_r > max(blocks, default=0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_config(architecture: str, name: str) -> None:
    checked, least = check(architecture, name), 6 if name == "bf16" else 4
    assert checked == expected(architecture, name) >= least, f"{checked} launches"


@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_unaligned_strides(architecture: str, name: str, strided: bool) -> None:
    """Odd widths and strides compile to other code, which must not spill either."""
    checked = check(architecture, name, aligned=False, strided=strided)
    assert checked == 4, f"{checked} launches"


def check_form(
    architecture: str,
    name: str,
    form: Name,
    first: First,
    *,
    aligned: bool = True,
    padded: bool = False,
    pin: aot.Pin = "",
) -> int:
    """Compiles a form at each kind of ranks; returns how many launches."""
    kind = on(architecture, CLASSES[name])
    math = aot.math_of(kind)
    wrong = []
    checked = 0
    for config in rows_of(architecture, kind, aligned):
        ranks = aot.ranks_served(architecture, math, config, aligned=aligned, padded=padded)
        for rank in ranks:
            made = aot.form_launches_of(
                config, kind, form, first, rank, aligned=aligned, padded=padded, pin=pin
            )
            of_each = [each.constants for each in made]
            # What C is made from: of a mixed form it is float32, else bfloat16 stays.
            wide = form == "mixed" or (form in ("inner", "dual") and {*kind[:2]} != {BF16})
            assert any(each["FROM"] == FP32 for each in of_each) == wide
            pinned = {
                "HAS_OFFSET": pin in ("S", "residual"),
                "HAS_INITIAL": pin == "residual" or form == "mixed",
                "HAS_ADDEND": pin.endswith("matrix") or form == "dual in turn",
            }
            for flag, wanted in pinned.items():
                assert any(each[flag] for each in of_each) == wanted, flag
            taken = {value for each in of_each for value in each.values()}
            assert (Layout.PADDED_ROW in taken) == padded, of_each
            # Coefficients that a launch writes itself have zeros in their padding.
            assert Layout.ZERO_PADDED_ROW in taken or not padded, of_each
            wrong += [
                fault for each in made for fault in wrong_with(each, architecture, aligned=aligned)
            ]
            checked += len(made)
    assert not wrong, "\n".join(wrong)
    return checked


# Beside dual's own tests, with what a weight is pinned to: a loop of sums holds more for it, or an
# update reads one matrix more. The first are those that hold most, for more classes of operands.
MOST: list[tuple[Name, First, aot.Pin]] = [
    ("left", "left", ""),
    ("mixed", "left", ""),
    ("mixed", "right", ""),
    ("inner", "left", ""),
    ("inner", "left", "S"),
    ("dual", "left", "residual"),
    ("dual", "left", "matrix"),
]
FORMS: list[tuple[Name, First, aot.Pin]] = [
    *MOST,
    ("right", "left", ""),
    ("inner", "right", "residual"),
    ("sequential", "left", ""),
    ("dual in turn", "left", ""),
    ("dual", "left", "float32 matrix"),
]


def expected_of_form(architecture: str, name: str, form: Name) -> int:
    """One launch of each kind of ranks, or two.

    A mixed form of bfloat16 is two, as C corrects what is float32 until then, and so is dual in
    turn, of whose updates the second adds a matrix.
    """
    two = form == "dual in turn" or (form == "mixed" and name == "bf16")
    return expected(architecture, name) // 2 * (1 + two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "first", "pin"),
    [
        *(("bf16", *each) for each in FORMS),
        *((name, *each) for name in ("tf32", "fp32") for each in MOST),
    ],
)
def test_other_forms(architecture: str, name: str, form: Name, first: First, pin: aot.Pin) -> None:
    checked = check_form(architecture, name, form, first, pin=pin)
    assert checked == expected_of_form(architecture, name, form), f"{checked} launches"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "first", "pin"),
    [
        *((name, "dual", "left", pin) for name in CLASSES for pin in ("", "S")),
        *(("bf16", *each) for each in MOST),
    ],
)
def test_padded_rows(architecture: str, name: str, form: Name, first: First, pin: aot.Pin) -> None:
    """Ragged ranks in rows of whole vectors compile to as good a code as whole ranks."""
    checked = check_form(architecture, name, form, first, padded=True, pin=pin)
    assert checked == expected_of_form(architecture, name, form), f"{checked} launches"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "pin"),
    [("mixed", ""), ("inner", ""), ("inner", "S"), ("sequential", ""), ("dual", "residual")],
)
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "bf16, fp32 bases"])
def test_other_forms_unaligned(architecture: str, name: str, form: Name, pin: aot.Pin) -> None:
    assert check_form(architecture, name, form, "left", aligned=False, pin=pin) > 1


# copies of the update


def whole_rows(architecture: str) -> list[configs.Projection]:
    """Those whose block holds every rank that they are taken for."""
    return [
        row
        for row in rows_of(architecture, CLASSES["bf16"])
        if row.block_r in aot.ranks_served(architecture, "bfloat16", row)
    ]


def copies_of(config: configs.Projection, architecture: str, **constants: object) -> list[str]:
    made = aot.launches_of(config, CLASSES["bf16"])
    made.constants.update(constants)
    return aot.copy_faults(made, aot.compiled_of(made, architecture).asm["ptx"])


def test_copies_are_under_way_while_an_update_multiplies(architecture: str) -> None:
    """A processor that waits for what it multiplies next leaves memory idle while it multiplies."""
    found = copies_of(whole_rows(architecture)[0], architecture)
    assert not found, found


def test_copies_are_under_way_while_sums_are_multiplied(architecture: str) -> None:
    """Of A, whose x is read turned, of B and of parts of C: several steps ahead."""
    made = aot.launches_of(whole_rows(architecture)[1], CLASSES["bf16"])
    found = aot.sum_faults(made, aot.compiled_of(made, architecture).asm["ptx"])
    assert not found, found


@pytest.mark.slow
def test_copies_of_every_config(architecture: str) -> None:
    found = {config: copies_of(config, architecture) for config in whole_rows(architecture)}
    assert not any(found.values()), found


def test_copies_that_are_not_under_way_are_seen(architecture: str) -> None:
    """With one stage everything is loaded where it is used; with two, copies begin behind it."""
    config = whole_rows(architecture)[0]
    (nothing, *_) = copies_of(config._replace(update_stages=1), architecture)
    assert nothing == "0 copies a step, 0 pending beside the products", nothing
    (serial,) = copies_of(config._replace(update_stages=2), architecture)
    assert serial == "3 copies a step, 0 pending beside the products", serial


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "tf32"])
def test_products_are_taken_once(architecture: str, name: str) -> None:
    """Of each tile, by one warp or another."""
    kind = CLASSES[name]
    for config in rows_of(architecture, kind):
        if config.block_r in aot.ranks_served(architecture, aot.math_of(kind), config):
            made = aot.launches_of(config, kind)
            found = aot.repeated_products(made, aot.compiled_of(made, architecture).asm["ptx"])
            assert not found, (config, found)


# products


Product = tuple[str, torch.dtype, configs.Multiply | configs.Gram, bool, int]


def products(architecture: str) -> list[Product]:
    """(class, dtype, config, transposed, rank): every config once, on either side in turn.

    ``odd``: A of odd width; ``strided``: no unit stride; ``ragged``: Q of odd width, A aligned;
    ``padded``: the same in rows of whole vectors.
    """
    found: list[Product] = []
    for i, dtype in enumerate((BF16, FP16, FP32)):
        name = str(dtype).removeprefix("torch.")
        for row, config in enumerate(configs.shipped_products(architecture, name)):
            # Symmetric products of float16 are those of bfloat16.
            own = dtype == BF16 or isinstance(config, configs.Multiply)
            if own or (dtype == FP32 and isinstance(config, configs.Gram)):
                found.append(("aligned", dtype, config, bool((i + row) % 2), 128))
    ragged = configs.multiply_config(architecture, "bfloat16", 8, whole=False)
    multiply, gram = configs.shipped_products(architecture, "bfloat16", aligned=False)
    return [
        *found,
        ("ragged", BF16, ragged, False, 127),
        ("padded", BF16, configs.multiply_config(architecture, "bfloat16", 77), False, 77),
        ("odd", BF16, multiply, False, 127),
        ("strided", FP32, gram, True, 127),
    ]


def check_product(
    architecture: str,
    kind: str,
    dtype: torch.dtype,
    config: configs.Multiply | configs.Gram,
    transposed: bool,
    rank: int,
) -> list[str]:
    precision = on(architecture, CLASSES["fp32"]).float32_precision
    aligned = kind in ("aligned", "ragged", "padded")
    made = aot.products_of(
        config,
        dtype,
        precision,
        aligned=aligned,
        transposed=transposed,
        rank=rank,
        padded=kind == "padded",
    )
    if kind == "strided":
        made.constants.update({key: 0 for key in made.constants if key.endswith("_LAYOUT")})
    compiled = aot.compile_launch(made, architecture)
    found = aot.product_faults(compiled, config, aligned=kind in ("aligned", "padded"))
    return [f"{kind} {compiled.name}: {fault}" for fault in found]


@pytest.mark.slow
def test_every_product_config(architecture: str) -> None:
    rows = products(architecture)
    assert len(rows) == 14, rows
    wrong = [fault for row in rows for fault in check_product(architecture, *row)]
    assert not wrong, "\n".join(wrong)


# what programs pass to each other


def order_of_parts(architecture: str, made: Launch) -> list[str]:
    """What is wrong with how values pass from one program to another, as it was compiled.

    Written, they are in memory before a program counts what it did; read, they come after the wait
    for that, in a loop, and not from a cache that does not know of them.
    """
    compiled = aot.compiled_of(made, architecture)
    projects = made.kernel == "projection"
    if architecture.startswith("gfx"):
        lines = [line.strip() for line in compiled.asm["amdgcn"].splitlines()]
        code = [line for line in lines if line and line[0] not in ";."]
        atomics = [i for i, line in enumerate(code) if line.startswith("global_atomic_add")]
        second = [i for i in atomics if "offset:8" in code[i]]  # of the second counter
        counts = [i for i in atomics if not code[i].endswith("sc0")]
        claims = [i for i in atomics if i not in (*second, *counts)]
        flushes = [i for i, line in enumerate(code) if line.startswith("buffer_wbl2 sc1")]
        polls = r"global_load_dwordx2 [^\n]* sc1\ns_waitcnt vmcnt\(0\)\nbuffer_inv sc1\n"
        barriers = [max(i for i in range(at) if code[i] == "s_barrier") for at in counts]
        # A projection counts programs that leave, too, and tiles of C beside tasks: it waits for
        # what a task needs, for parts of C, and for C.
        leaves = [i for i in second if i not in counts]
        awaited = len(re.findall(polls, "\n".join(code)))
        checks = {
            "claims": len(claims) == (4 if projects else 3),
            "counts": len(counts) == 1 + projects,
            "programs that leave": len(leaves) == projects,
            "written back before the count": len(flushes) == 1 + 2 * projects
            and all(
                any(barrier < flush < at for flush in flushes)
                for barrier, at in zip(barriers, counts, strict=True)
            ),
            "stores of every wavefront awaited": all(
                "s_waitcnt vmcnt(0)" in code[barrier - 4 : barrier] for barrier in barriers
            ),
            "an acquiring wait": awaited == (3 if projects else 1),
        }
    else:
        ptx = "\n".join(
            line
            for line in compiled.asm["ptx"].splitlines()
            if not line.lstrip().startswith((".loc", "//"))
        )
        wait = re.search(r"(\$L__BB\w+):[^$]*ld\.global\.gpu\.acquire\.b64.*?bra\s+\1;", ptx, re.S)
        parts = [match.start() for match in re.finditer(r"ld\.global\.cg", ptx)]
        counts_at = [match.start() for match in re.finditer(r"atom\.global\.gpu\.release", ptx)]
        checks = {
            "an acquiring wait in a loop": wait is not None,
            "parts from L2, after the wait": bool(parts)
            and wait is not None
            and parts[0] > wait.end(),
            "counts": len(counts_at) == 1 + projects,  # of a projection also those of C's tiles
            "programs that leave": ptx.count("atom.global.gpu.acq_rel") == projects,
            "a barrier before the count": all(
                ptx.rfind("bar.sync", 0, at) > ptx.rfind("st.global", 0, at) for at in counts_at
            ),
            "no cache of constants": "ld.global.nc" not in ptx,
        }
    return [name for name, holds in checks.items() if not holds]


def test_parts_pass_through_memory(architecture: str) -> None:
    kind = on(architecture, CLASSES["bf16"])
    gram = configs.gram_config(architecture, "bfloat16", 64)
    for made in (
        aot.launches_of(rows_of(architecture, kind)[0], kind),
        aot.products_of(gram, BF16, kind.float32_precision),
    ):
        wrong = order_of_parts(architecture, made)
        assert not wrong, wrong
