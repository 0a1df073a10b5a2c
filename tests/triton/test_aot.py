"""Every pinned config, compiled ahead of time for every architecture, with no driver.

The gate: tensor-core instructions, no spills, shared memory within the limit, 16-byte loads where
rows are aligned, and as many programs resident on a processor as the grid counts on. It proves
that the code is what was meant, not that it is fast.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from osf_kernels.backends.triton import configs, launch
from osf_kernels.backends.triton.schedule import Launch, Layout
from tests.triton import aot

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLASSES = {
    "bf16": aot.Class(BF16, BF16, "tf32x3"),
    "fp16": aot.Class(FP16, FP16, "tf32x3"),
    "fp32": aot.Class(FP32, FP32, "tf32x3"),
    "tf32": aot.Class(FP32, FP32, "tf32"),
    "mixed": aot.Class(BF16, FP32, "tf32x3"),
    "coefficients": aot.Class(FP32, BF16, "tf32x3"),
}


def on(architecture: str, kind: aot.Class) -> aot.Class:
    """A class as it is computed there: AMD's matrix cores take float32 as it is."""
    native = architecture == "gfx942" and kind.float32_precision == "tf32x3"
    return kind._replace(float32_precision="ieee") if native else kind


def check(architecture: str, name: str, *, aligned: bool = True, strided: bool = False) -> int:
    """Compiles every config that serves a class of operands; returns how many.

    Not aligned: rows of odd width. Strided: no unit stride anywhere.
    """
    kind = on(architecture, CLASSES[name])
    wrong = []
    checked = 0
    rows = configs.shipped(architecture, aligned)
    for width, config in rows:
        if width != aot.operand_bytes(config, kind):
            continue
        made = aot.launches_of(config, kind, aligned=aligned)
        if strided:
            made.constants.update({key: 0 for key in made.constants if key.endswith("_LAYOUT")})
        compiled = aot.compile_launch(made, architecture)
        found = aot.faults(compiled, config, aligned=aligned)
        wrong += [f"{compiled.name}: {fault}" for fault in found]
        checked += 1
    assert not wrong, "\n".join(wrong)
    return checked


@pytest.mark.parametrize("architecture", ["sm_80", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_bfloat16(architecture: str) -> None:
    assert check(architecture, "bf16") == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_every_config(architecture: str, name: str) -> None:
    assert check(architecture, name) == 6


@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_unaligned_strides(architecture: str, name: str, strided: bool) -> None:
    """Odd widths and strides compile to other code, which must not spill either."""
    assert check(architecture, name, aligned=False, strided=strided) == 4


@pytest.mark.slow
def test_small_shared_memory() -> None:
    """Capabilities 8.6, 8.9 and 12.x (99 KB) take sm_80's tiles."""
    for name in ("bf16", "fp32"):
        kind = CLASSES[name]
        for width, config in configs.shipped(configs.architecture_of_capability(8, 6)):
            if width == aot.operand_bytes(config, kind):
                compiled = aot.compile_launch(aot.launches_of(config, kind), "sm_86")
                found = aot.faults(compiled, config)
                assert not found, f"{compiled.name}: {found}"


def check_padded(architecture: str, name: str, rank: int) -> int:
    """Compiles what serves bases and coefficients of padded rows; returns how many configs."""
    kind = on(architecture, CLASSES[name])
    wrong = []
    checked = 0
    for width, config in configs.shipped(architecture):
        if width != aot.operand_bytes(config, kind):
            continue
        made = aot.launches_of(config, kind, padded=rank)
        assert Layout.PADDED_ROW in made.constants.values()
        compiled = aot.compile_launch(made, architecture)
        wrong += [f"{compiled.name}: {fault}" for fault in aot.faults(compiled, config)]
        checked += 1
    assert not wrong, "\n".join(wrong)
    return checked


def test_padded_rows_of_bfloat16() -> None:
    assert check_padded("sm_80", "bf16", 77) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_padded_rows(architecture: str, name: str) -> None:
    """Ragged ranks in rows of whole vectors compile to as good a code as whole ranks.

    Rows of 100 are whole in float32 and ragged in 16 bits, so there the operands differ.
    """
    narrow = CLASSES[name].basis != FP32
    for rank in (77, 100) if narrow else (77,):
        assert check_padded(architecture, name, rank) == 6


Product = tuple[str, torch.dtype, configs.TwoPass | configs.Gram, bool, int]


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
            own = dtype == BF16 or isinstance(config, configs.TwoPass)
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
    config: configs.TwoPass | configs.Gram,
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
    # Capabilities 8.6, 8.9 and 12.x (99 KB) take sm_80's tiles.
    held_to = [compiled]
    if architecture == "sm_80":
        held_to.append(compiled._replace(architecture="sm_86"))
    return [
        f"{kind} {each.name} for {each.architecture}: {fault}"
        for each in held_to
        for fault in aot.product_faults(each, config, aligned=kind in ("aligned", "padded"))
    ]


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
    """The projection's own kernel keeps it there; and the products do where they are told to."""
    config = configs.TwoPass(64, 32, 64, 4, 2, 1)
    compiled = aot.compile_launch(aot.launches_of(config, CLASSES["bf16"]), "sm_80")
    found = aot.product_faults(compiled, config, aligned=True)
    assert found == ["the running sum is kept in the tensor cores"]


def order_of_parts(architecture: str, made: Launch) -> list[str]:
    """What is wrong with how parts pass from one program to another, as it was compiled.

    Written, they are in memory before a program counts as done; read, they come after the wait
    for that, in a loop, and not from a cache that does not know of them.
    """
    compiled = aot.compiled_of(made, architecture)
    if architecture.startswith("gfx"):
        lines = [line.strip() for line in compiled.asm["amdgcn"].splitlines()]
        code = [line for line in lines if line and line[0] not in ";."]
        atomics = [i for i, line in enumerate(code) if line.startswith("global_atomic_add")]
        counts = [i for i in atomics if code[i].endswith("offset:8")]
        flushes = [i for i, line in enumerate(code) if line.startswith("buffer_wbl2 sc1")]
        polls = r"global_load_dwordx2 [^\n]* sc1\ns_waitcnt vmcnt\(0\)\nbuffer_inv sc1\n"
        barrier = max(i for i in range(counts[-1]) if code[i] == "s_barrier")
        checks = {
            "a claim, one a product, one a sum": len(atomics) - len(counts) == 3,
            "one count": len(counts) == 1,
            "written back before the count": len(flushes) == 1 and barrier < flushes[0] < counts[0],
            "stores of every wavefront awaited": "s_waitcnt vmcnt(0)"
            in code[barrier - 4 : barrier],
            "an acquiring wait": len(re.findall(polls, "\n".join(code))) == 1,
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
            "a barrier before the count": bool(counts_at)
            and ptx.rfind("bar.sync", 0, counts_at[0]) > ptx.rfind("st.global", 0, counts_at[0]),
            "no cache of constants": "ld.global.nc" not in ptx,
        }
    return [name for name, holds in checks.items() if not holds]


@pytest.mark.parametrize(
    "architecture",
    [
        "sm_80",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_90", "sm_100", "gfx942")),
    ],
)
def test_parts_pass_through_memory(architecture: str) -> None:
    kind = on(architecture, CLASSES["bf16"])
    rows = [config for width, config in configs.shipped(architecture) if width == 2]
    one_pass, two_pass = rows[0], rows[2]
    gram = configs.gram_config(architecture, "bfloat16", 64)
    for made in (
        aot.launches_of(one_pass, kind),
        aot.launches_of(two_pass, kind),
        aot.products_of(gram, BF16, kind.float32_precision),
    ):
        assert order_of_parts(architecture, made) == []


@pytest.mark.slow
def test_stores_that_are_not_awaited_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's barrier alone leaves those of other wavefronts under way."""
    made = aot.launches_of(configs.shipped("gfx942")[0][1], CLASSES["bf16"])
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
        ("sm_80", configs.Update(128, 128, 64, 8, 1, 2), "fp32", "spills"),
        pytest.param(
            *("gfx942", configs.TwoPass(256, 128, 128, 8, 2)),
            *("bf16", "shared memory, limit 65536"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gate_reports_a_bad_config(
    architecture: str, config: configs.Config, kind: str, fault: str
) -> None:
    compiled = aot.compile_launch(aot.launches_of(config, CLASSES[kind]), architecture)
    assert any(fault in found for found in aot.faults(compiled, config)), compiled


def test_gate_reports_missing_tensor_cores_and_narrow_loads() -> None:
    """IEEE float32 runs on NVIDIA's ordinary cores; odd strides load one element at a time."""
    ieee = aot.Class(FP32, FP32, "ieee")
    config = configs.Update(32, 32, 16, 8, 4, 1)
    compiled = aot.compile_launch(aot.launches_of(config, ieee), "sm_80")
    assert aot.faults(compiled, config) == ["no tensor-core instruction"]
    made = aot.launches_of(config, CLASSES["bf16"], aligned=False)
    found = aot.faults(aot.compile_launch(made, "sm_80"), config)
    assert any("under 8 bytes" in fault for fault in found), found


def test_gate_reports_programs_that_do_not_fit() -> None:
    config = configs.Update(128, 128, 64, 8, 8, 2, programs_per_sm=3)
    compiled = aot.compile_launch(aot.launches_of(config, CLASSES["bf16"]), "sm_80")
    assert any("3 programs" in fault for fault in aot.faults(compiled, config))


def test_float64_is_not_compiled() -> None:
    """There is no class of it: the launcher refuses before a kernel is chosen."""
    with pytest.raises(TypeError, match="float64 runs on the torch backend"):
        aot.launches_of(
            configs.TwoPass(64, 32, 32, 4, 1), aot.Class(torch.float64, torch.float64, "ieee")
        )


def test_rows_are_all_reachable() -> None:
    """Every row of the tables is chosen by some rank, and no rule names a row they lack."""
    for architecture in configs.ARCHITECTURES:
        chosen: set[tuple[int, configs.Config]] = set()
        for width in (2, 4):
            for rank in (1, 20, 32, 33, 64, 65, 500):
                chosen.add((width, configs.update_config(architecture, width, rank)))
                chosen.add((width, configs.coefficients_config(architecture, width, rank, 0)))
                if rank <= 64:
                    chosen.add(
                        (
                            width,
                            configs.coefficients_config(architecture, width, rank, 1, "one_pass"),
                        )
                    )
        assert chosen == set(configs.shipped(architecture))
