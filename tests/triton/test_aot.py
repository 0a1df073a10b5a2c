"""Every pinned config, compiled ahead of time for every architecture, with no driver.

The gate: tensor-core instructions, no spills, shared memory within the limit, 16-byte loads where
rows are aligned, as many programs resident on a processor as the grid counts on, and copies under
way while an update multiplies. It proves that the code is what was meant, not that it is fast.

Here stand a first config of each kind, that the gate sees what it is there for, and that the tables
are whole. Every other config is in the ``test_aot_*`` of its architecture.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from bench.gpu.configs import tried
from osf_kernels.backends.chains import chain_of
from osf_kernels.backends.jobs import Problem
from osf_kernels.backends.operands import Arena
from osf_kernels.backends.triton import configs, dispatch, launch
from osf_kernels.backends.triton.views import Layout
from osf_kernels.plan import Step
from tests.triton import aot, aot_cases
from tests.triton.aot_cases import (
    BF16,
    CLASSES,
    FP32,
    check_product,
    copies_of,
    launches,
    on,
    order_of_parts,
    rows_of,
    whole_rows,
    wrong_with,
)

# a first config of each kind


def test_first_config_of_bfloat16() -> None:
    """With S and without, on the architecture that compiles fastest."""
    for made in itertools.islice(launches("sm_80", "bf16"), 2):
        assert not wrong_with(made, "sm_80")


def test_padded_rows_of_bfloat16() -> None:
    made = next(launches("sm_80", "bf16", padded=True))
    assert not wrong_with(made, "sm_80")


def test_products_of_bfloat16() -> None:
    """The first of each kind, on the architecture that compiles fastest."""
    small, _, gram, *_ = configs.shipped_products("sm_80", "bfloat16")
    for config in (small, gram):
        assert not check_product("sm_80", "aligned", BF16, config, False, 128)


# that the gate sees what it is there for


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "config", "kind", "fault"),
    [
        ("sm_80", configs.Projection(128, 64, 128, 128, 128, 1024, 4, 1, 1), "bf16", "spills"),
        (
            *("gfx942", configs.Projection(256, 128, 128, 128, 64, 1024, 8, 2, 1)),
            *("bf16", "shared memory, limit 65536"),
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
    pins: tuple[aot.Pin, ...] = ("", "S")
    for pin in pins:
        made = aot.launches_of(SMALL, CLASSES["bf16"], aligned=False, pin=pin)
        found = aot.faults(aot.compile_launch(made, "sm_80"), SMALL)
        assert any("under 8 bytes" in fault for fault in found), found


def test_gate_reports_programs_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = whole_rows("sm_80")[0]._replace(programs_per_sm=3)
    made = aot.launches_of(config, CLASSES["bf16"])
    found = aot.faults(aot.compile_launch(made, "sm_80"), config)
    assert any("spills" in fault for fault in found), found
    assert any("3 programs a processor do not fit its shared memory" in f for f in found), found
    monkeypatch.setattr(configs, "registers", lambda _: 255)
    found = aot.faults(aot.compile_launch(made, "sm_80"), config)
    assert any("3 programs a processor hold" in fault for fault in found), found


@pytest.mark.parametrize(("programs", "registers"), [(1, 255), (2, 128), (3, 80)])
def test_a_thread_may_hold_its_share_of_registers(programs: int, registers: int) -> None:
    """And the compiler is told so; AMD's knows no such option."""
    config = whole_rows("sm_80")[0]._replace(programs_per_sm=programs)
    assert configs.registers(config) == registers
    assert launch.compile_options(config, amd=False)["maxnreg"] == registers
    assert "maxnreg" not in launch.compile_options(config, amd=True)


def test_registers_reach_the_compiler() -> None:
    made = aot.launches_of(whole_rows("sm_80")[0], CLASSES["bf16"])
    assert re.search(r"\.maxnreg 255\b", aot.compiled_of(made, "sm_80").asm["ptx"])


def test_gate_reports_a_running_sum_in_the_tensor_cores() -> None:
    """A projection keeps it there: what is left of one that makes A in one go adds nothing."""
    config = whole_rows("sm_80")[0]
    made = aot.launches_of(config, CLASSES["bf16"])
    flags = ("HAS_B", "HAS_UPDATE", "HAS_PARTS", "C_OF_A", "C_INTO_B")
    made.constants.update(dict.fromkeys(flags, False))
    tile = (config.block_q, config.block_k, config.block_r)
    product = configs.Multiply(*tile, config.num_warps, config.reduction_stages, 1)
    found = aot.product_faults(aot.compile_launch(made, "sm_80"), product, aligned=True)
    assert found == ["the running sum is kept in the tensor cores"]


@pytest.mark.slow
def test_converted_factors_and_narrow_copies_are_seen() -> None:
    config = whole_rows("sm_80")[0]
    found = copies_of(config, "sm_80", R1=FP32)
    assert any("narrowed" in fault for fault in found), found
    found = copies_of(config, "sm_80", R1_LAYOUT=Layout.UNALIGNED_ROW.value)
    assert any(fault.startswith(("copies of", "loads past")) for fault in found), found


@pytest.mark.slow
def test_repeated_products_are_seen() -> None:
    """Eight warps of 16 rows have 128, of which a tile of 64 has half."""
    config = rows_of("sm_80", CLASSES["fp32"])[0]._replace(num_warps=8)
    made = aot.launches_of(config, CLASSES["fp32"])
    found = aot.repeated_products(made, aot.compiled_of(made, "sm_80").asm["ptx"])
    assert any(fault.startswith("2.00 times") for fault in found), found


@pytest.mark.slow
def test_stores_that_are_not_awaited_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's barrier alone leaves those of other wavefronts under way."""
    made = aot.launches_of(rows_of("gfx942", CLASSES["bf16"])[0], CLASSES["bf16"])
    constexprs = launch.constexprs
    monkeypatch.setattr(launch, "constexprs", lambda made, amd: constexprs(made, False))
    assert order_of_parts("gfx942", made) == ["stores of every wavefront awaited"]


def test_float64_is_not_compiled() -> None:
    """There is no class of it: the launcher refuses before a kernel is chosen."""
    with pytest.raises(TypeError, match="float64 runs on the torch backend"):
        aot.launches_of(SMALL, aot.Class(torch.float64, torch.float64, "ieee"))


# what a list that adds matrices is given


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 1.0), (FP32, 2.0)])
def test_a_matrix_beside_is_given_a_config_that_holds_it(dtype: torch.dtype, width: float) -> None:
    W, U, V = (
        aot.matrix(rows, columns, BF16) for rows, columns in ((256, 128), (256, 32), (128, 32))
    )
    step = Step("dual", "left", -1.0, 1.0, 0, 0, 0, "", "")
    problem = Problem(W, W, U, V, step, addend=aot.matrix(256, 128, dtype))
    arena = Arena(W.device)
    chains = [(chain_of(problem, BF16, arena.new), arena)]
    ((made,), _) = dispatch._launches(W.device, chains, None, None, 1 << 40)
    pinned = configs.projection_config("sm_80", "bfloat16", 32)
    assert made.config == configs.beside_addend(pinned, width) != pinned


# what a GPU session tries


@pytest.mark.slow
@pytest.mark.parametrize("rank", [64, 128])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_deepest_config_tried_fits_shared_memory(architecture: str, rank: int) -> None:
    """Of a session's configs the one that takes most: a row that fails is a fault there."""
    pinned = configs.projection_config(architecture, "bfloat16", rank)
    config = tried(pinned)[-1]
    assert config.update_stages > pinned.update_stages
    compiled = aot.compile_launch(aot.launches_of(config, CLASSES["bf16"]), architecture)
    assert compiled.shared_bytes <= aot.SHARED_LIMIT[architecture], config


# that the tables are whole


def test_every_architecture_has_its_tests() -> None:
    """In the files of its own, whatever it is split into."""
    held: dict[str, set[str]] = {}
    for path in Path(__file__).parent.glob("test_aot_*.py"):
        module = importlib.import_module(f"tests.triton.{path.stem}")
        ((_, (architecture,)),) = (m.args for m in module.pytestmark if m.name == "parametrize")
        assert set(module.__all__).isdisjoint(held.setdefault(architecture, set()))
        held[architecture].update(module.__all__)
    every = {name for name in vars(aot_cases) if name.startswith("test_")}
    # Copies and products are seen in the code of NVIDIA's architectures before sm_100.
    in_loops = {name for name in every if "copies" in name or "taken_once" in name}
    for architecture in configs.ARCHITECTURES:
        left_out = every - in_loops - held[architecture]
        assert not left_out, (architecture, left_out)
    of_each = {name for name in in_loops if not name.endswith("_seen")}
    assert {name for name, tests in held.items() if of_each <= tests} == {"sm_80", "sm_86", "sm_90"}


def test_classes_take_every_row() -> None:
    """No row of the tables is left out of the tests of all configs."""
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
