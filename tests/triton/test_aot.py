"""Every pinned config, compiled ahead of time for every architecture, with no driver.

The gate: tensor-core instructions, no spills, shared memory within the limit, 16-byte loads where
rows are aligned, as many programs resident on a processor as the grid counts on, and copies under
way while an update multiplies. It proves that the code is what was meant, not that it is fast.
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

from osf_kernels.backends.triton import configs, launch
from osf_kernels.backends.triton.launches import Launch
from osf_kernels.backends.triton.views import Layout
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
        for rank, offset in itertools.product(ranks, (False, True)):
            made = aot.launches_of(
                config, kind, aligned=aligned, padded=padded, offset=offset, rank=rank
            )
            assert made.constants["WHOLE"] == (rank <= config.block_r)
            assert made.constants["HAS_OFFSET"] == offset
            assert made.constants["HAS_PARTS"]
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


@pytest.mark.parametrize("architecture", ["sm_80", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_bfloat16(architecture: str) -> None:
    assert check(architecture, "bf16") == expected(architecture, "bf16") >= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_every_config(architecture: str, name: str) -> None:
    assert check(architecture, name) == expected(architecture, name) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_unaligned_strides(architecture: str, name: str, strided: bool) -> None:
    """Odd widths and strides compile to other code, which must not spill either."""
    assert check(architecture, name, aligned=False, strided=strided) == 4


def test_classes_take_every_row() -> None:
    """No row of the table is left out of the tests above."""
    for architecture in configs.ARCHITECTURES:
        maths = {aot.math_of(on(architecture, kind)) for kind in CLASSES.values()}
        assert maths >= {math for math, _ in configs.shipped(architecture)}
    assert [aot.math_of(kind) for kind in CLASSES.values()] == [
        *("bfloat16", "tf32", "float32", "tf32", "float32", "float32", "float32")
    ]


def test_small_shared_memory() -> None:
    """Capabilities 8.6, 8.9 and 12.x have rows of their own, compiled for 99 KB."""
    assert all(configs.architecture_of_capability(*c) == "sm_86" for c in ((8, 6), (8, 9), (12, 0)))
    assert aot.SHARED_LIMIT["sm_86"] == 99 << 10
    assert set(configs.ARCHITECTURES) == set(aot.TARGETS) == set(aot.SHARED_LIMIT)


def check_padded(architecture: str, name: str) -> int:
    """Compiles what serves bases and coefficients of padded rows; returns how many launches."""
    wrong = []
    checked = 0
    for made in launches(architecture, name, padded=True):
        # Coefficients that the launch writes itself have zeros there.
        assert {Layout.PADDED_ROW, Layout.ZERO_PADDED_ROW} <= set(made.constants.values())
        wrong += wrong_with(made, architecture)
        checked += 1
    assert not wrong, "\n".join(wrong)
    return checked


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_padded_rows(architecture: str, name: str) -> None:
    """Ragged ranks in rows of whole vectors compile to as good a code as whole ranks."""
    assert check_padded(architecture, name) == expected(architecture, name)


def test_padded_rows_of_bfloat16() -> None:
    made = next(launches("sm_80", "bf16", padded=True))
    assert not wrong_with(made, "sm_80")


# copies of the update

COPIES = ["sm_80", "sm_86", "sm_90"]


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


@pytest.mark.parametrize("architecture", COPIES)
def test_copies_are_under_way_while_an_update_multiplies(architecture: str) -> None:
    """A processor that waits for what it multiplies next leaves memory idle while it multiplies."""
    assert copies_of(whole_rows(architecture)[0], architecture) == []


@pytest.mark.parametrize("architecture", COPIES)
def test_copies_are_under_way_while_sums_are_multiplied(architecture: str) -> None:
    """Of A, whose x is read turned, of B and of C: several steps ahead."""
    made = aot.launches_of(whole_rows(architecture)[1], CLASSES["bf16"])
    assert aot.sum_faults(made, aot.compiled_of(made, architecture).asm["ptx"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", COPIES)
def test_copies_of_every_config(architecture: str) -> None:
    found = {config: copies_of(config, architecture) for config in whole_rows(architecture)}
    assert not any(found.values()), found


@pytest.mark.parametrize("architecture", [COPIES[0], pytest.param("sm_90", marks=pytest.mark.slow)])
def test_copies_that_are_not_under_way_are_seen(architecture: str) -> None:
    """With one stage everything is loaded where it is used; with two, copies begin behind it."""
    config = whole_rows(architecture)[0]
    (nothing, *_) = copies_of(config._replace(update_stages=1), architecture)
    assert nothing == "0 copies a step, 0 pending beside the products"
    (serial,) = copies_of(config._replace(update_stages=2), architecture)
    assert serial == "3 copies a step, 0 pending beside the products"


@pytest.mark.slow
def test_converted_factors_and_narrow_copies_are_seen() -> None:
    config = whole_rows("sm_80")[0]
    found = copies_of(config, "sm_80", R1=FP32)
    assert any("narrowed" in fault for fault in found), found
    found = copies_of(config, "sm_80", R1_LAYOUT=Layout.UNALIGNED_ROW.value)
    assert any(fault.startswith(("copies of", "loads past")) for fault in found), found


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
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_every_product_config(architecture: str) -> None:
    rows = products(architecture)
    assert len(rows) == 14
    wrong = [fault for row in rows for fault in check_product(architecture, *row)]
    assert not wrong, "\n".join(wrong)


def test_products_of_bfloat16() -> None:
    """The first of each kind, on the architecture that compiles fastest."""
    small, _, gram, *_ = configs.shipped_products("sm_80", "bfloat16")
    for config in (small, gram):
        assert not check_product("sm_80", "aligned", BF16, config, False, 128)


def test_gate_reports_a_running_sum_in_the_tensor_cores() -> None:
    """A projection keeps it there: what is left of one that makes A in one go adds nothing."""
    config = whole_rows("sm_80")[0]
    made = aot.launches_of(config, CLASSES["bf16"])
    flags = ("HAS_B", "HAS_C", "HAS_UPDATE", "HAS_PARTS", "HAS_CORRECTION")
    made.constants.update(dict.fromkeys(flags, False))
    tile = (config.block_q, config.block_k, config.block_r)
    product = configs.Multiply(*tile, config.num_warps, config.reduction_stages, 1)
    found = aot.product_faults(aot.compile_launch(made, "sm_80"), product, aligned=True)
    assert found == ["the running sum is kept in the tensor cores"]


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
        barrier = max(i for i in range(counts[-1]) if code[i] == "s_barrier")
        # A projection counts programs that leave, too, and waits for c beside each sum.
        leaves = [i for i in second if i not in counts]
        awaited = len(re.findall(polls, "\n".join(code)))
        checks = {
            "claims": len(claims) == (2 if projects else 3),
            "one count": len(counts) == 1,
            "programs that leave": len(leaves) == projects,
            "written back before the count": barrier < flushes[0] < counts[0]
            and len(flushes) == 1 + projects,
            "stores of every wavefront awaited": "s_waitcnt vmcnt(0)"
            in code[barrier - 4 : barrier],
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
            "one count": len(counts_at) == 1,
            "programs that leave": ptx.count("atom.global.gpu.acq_rel") == projects,
            "a barrier before the count": bool(counts_at)
            and ptx.rfind("bar.sync", 0, counts_at[0]) > ptx.rfind("st.global", 0, counts_at[0]),
            "no cache of constants": "ld.global.nc" not in ptx,
        }
    return [name for name, holds in checks.items() if not holds]


@pytest.mark.parametrize(
    "architecture",
    [
        "sm_80",
        *(pytest.param(name, marks=pytest.mark.slow) for name in configs.ARCHITECTURES[1:]),
    ],
)
def test_parts_pass_through_memory(architecture: str) -> None:
    kind = on(architecture, CLASSES["bf16"])
    gram = configs.gram_config(architecture, "bfloat16", 64)
    for made in (
        aot.launches_of(rows_of(architecture, kind)[0], kind),
        aot.products_of(gram, BF16, kind.float32_precision),
    ):
        assert order_of_parts(architecture, made) == []


@pytest.mark.slow
def test_stores_that_are_not_awaited_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's barrier alone leaves those of other wavefronts under way."""
    made = aot.launches_of(rows_of("gfx942", CLASSES["bf16"])[0], CLASSES["bf16"])
    constexprs = launch.constexprs
    monkeypatch.setattr(launch, "constexprs", lambda made, amd: constexprs(made, False))
    assert order_of_parts("gfx942", made) == ["stores of every wavefront awaited"]


def test_product_rows_are_all_reachable() -> None:
    for architecture in configs.ARCHITECTURES:
        for name in ("bfloat16", "float16", "float32"):
            chosen: set[configs.Config] = set()
            for size in (1, 16, 64, 65, 128, 129, 5000):
                chosen.add(configs.multiply_config(architecture, name, size))
                chosen.add(configs.gram_config(architecture, name, size))
            shipped = configs.shipped_products(architecture, name)
            assert chosen == set(shipped)
            assert len(chosen) == len(shipped)


@pytest.mark.parametrize(
    ("architecture", "config", "kind", "fault"),
    [
        ("sm_80", configs.Projection(128, 64, 128, 128, 128, 1024, 4, 1, 1), "bf16", "spills"),
        pytest.param(
            *("gfx942", configs.Projection(256, 128, 128, 128, 64, 1024, 8, 2, 1)),
            *("bf16", "shared memory, limit 65536"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gate_reports_a_bad_config(
    architecture: str, config: configs.Projection, kind: str, fault: str
) -> None:
    compiled = aot.compile_launch(aot.launches_of(config, CLASSES[kind]), architecture)
    assert any(fault in found for found in aot.faults(compiled, config)), compiled


SMALL = configs.Projection(32, 32, 32, 32, 32, 256, 4, 1, 1)


def test_gate_reports_missing_tensor_cores_and_narrow_loads() -> None:
    """IEEE float32 runs on NVIDIA's ordinary cores; odd strides load one element at a time."""
    ieee = aot.Class(FP32, FP32, "ieee")
    compiled = aot.compile_launch(aot.launches_of(SMALL, ieee), "sm_80")
    assert "no tensor-core instruction" in aot.faults(compiled, SMALL)
    for offset in (False, True):
        made = aot.launches_of(SMALL, CLASSES["bf16"], aligned=False, offset=offset)
        found = aot.faults(aot.compile_launch(made, "sm_80"), SMALL)
        assert any("under 8 bytes" in fault for fault in found), found


def test_gate_reports_programs_that_do_not_fit() -> None:
    config = whole_rows("sm_80")[0]._replace(programs_per_sm=3)
    compiled = aot.compile_launch(aot.launches_of(config, CLASSES["bf16"]), "sm_80")
    found = aot.faults(compiled, config)
    assert any("3 programs a processor hold" in fault for fault in found), found
    assert any("3 programs a processor do not fit its shared memory" in f for f in found), found


def test_float64_is_not_compiled() -> None:
    """There is no class of it: the launcher refuses before a kernel is chosen."""
    with pytest.raises(TypeError, match="float64 runs on the torch backend"):
        aot.launches_of(SMALL, aot.Class(torch.float64, torch.float64, "ieee"))


def test_rows_are_all_reachable() -> None:
    """Every row of the tables is chosen by some rank, and no rule names a row they lack."""
    ranks = (1, 20, 32, 33, 64, 65, 128, 129, 256, 500)
    for architecture in configs.ARCHITECTURES:
        for aligned in (True, False):
            shipped = configs.shipped(architecture, aligned)
            chosen = {
                (math, configs.projection_config(architecture, math, rank, aligned))
                for math in {of for of, _ in shipped}
                for rank in ranks
            }
            assert chosen == set(shipped)
            assert len(chosen) == len(shipped)
