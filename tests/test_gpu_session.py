"""The GPU session without a GPU: its script's own logic, its build, its parts on tiny matrices."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

import osf_kernels
from bench import report
from bench.gpu import (
    captures,
    configs,
    first_kernel,
    launches,
    measure,
    restoring,
    whole_model,
)
from bench.gpu.measure import Measurement, Part

CPU = torch.device("cpu")
BF16 = torch.bfloat16
PARTS = ("first_kernel", "launches", "configs", "whole_model", "restoring", "captures")


# the script


def session(root: Path, *arguments: str, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(root / "bench" / "gpu_session.sh"), *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_dry_run_runs_every_part_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    done = session(root, "--dry-run", str(tmp_path), python=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "540 s of 550 s",
        "4096x4096 bf16 r=128: 1 matrices on cuda",
        *(f"== {part}" for part in PARTS),
        "tests/triton/test_gpu.py",
    ):
        assert line in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--help",), ("a", "b")])
def test_bad_arguments(root: Path, arguments: tuple[str, ...]) -> None:
    done = session(root, *arguments, python=sys.executable)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def stand_in(folder: Path, lines: str) -> Path:
    """An interpreter that does what the lines of a `case` on its arguments say, else nothing."""
    fake = folder / "python"
    fake.write_text(f'#!/usr/bin/env bash\ncase "$*" in\n{lines}\n*) exit 0 ;;\nesac\n')
    fake.chmod(0o755)
    return fake


FAILING = """
"-") echo 9.0 ;;                         # the capability probe reads its program from stdin
"-c import pytest_timeout") exit 1 ;;    # a plugin this machine lacks
*"setup.py build_ext"*) exit 3 ;;        # a build that fails, and so does nvcc after it
*"bench.gpu.first_kernel --out"*) exit 1 ;;
*"bench.gpu.launches"*) exit 124 ;;      # a part that overruns
*"-m pytest"*) echo "4 passed in 1.00s" ;;
"""


def test_parts_that_fail_overrun_or_are_missing_end_nothing(root: Path, tmp_path: Path) -> None:
    """The script's own logic with a stand-in interpreter: nothing is built or measured."""
    out = tmp_path / "out"
    done = session(root, str(out), python=str(stand_in(tmp_path, FAILING)))
    summary = (out / "summary.txt").read_text()
    assert done.returncode == 1
    said = {line.split()[0]: line for line in summary.splitlines()}
    assert "failed (status 1)" in said["build"]
    assert "failed (status 1)" in said["first_kernel"]
    assert "stopped after" in said["launches"]
    for part in ("configs", "whole_model", "restoring", "tests", "captures", "refresh", "compile"):
        assert "passed" in said[part], summary
    assert {"ncu", "sanitizer"} <= said.keys()
    assert "missing: pytest_timeout" in summary
    assert "4 passed" in summary
    assert len(list(out.iterdir())) <= 8


def test_the_parts_run_in_order_of_the_evidence_they_bring(root: Path, tmp_path: Path) -> None:
    python = stand_in(tmp_path, '"-") echo 9.0 ;;\n*"-m pytest"*) echo "4 passed in 1.00s" ;;')
    session(root, str(tmp_path / "out"), python=str(python))
    lines = (tmp_path / "out" / "session.log").read_text().splitlines()
    order = [line.split()[1] for line in lines if line.startswith("== ")]
    assert order == [
        *("first_kernel", "launches", "configs", "build", "whole_model", "restoring"),
        *("environment", "tests", "captures", "refresh", "compile"),
    ]
    (call,) = [line for line in lines if "-m pytest" in line]
    assert " -W default " in call
    assert " -n 8 " in call
    assert " -c " in call, "pyproject.toml's settings name plugins that a machine may lack"
    named = {word for word in call.split() if word.startswith("tests/")}
    assert {"tests/cuda/test_gpu.py", "tests/triton/test_gpu.py"} <= named
    assert "tests/test_gpu_session.py" not in named, "it has none"


def test_without_a_gpu_there_is_no_session(root: Path, tmp_path: Path) -> None:
    python = stand_in(tmp_path, '"-") exit 1 ;;')
    done = session(root, str(tmp_path / "out"), python=str(python))
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stdout


# the build

NVCC = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$(dirname "$0")/calls"
case "$*" in *FAILS*) exit 1 ;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


def build(
    root: Path, folder: Path, *arguments: str, setup: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """build.sh over a copy of csrc with a stand-in compiler, whose calls are returned too."""
    tree = folder / "tree"
    (tree / "bench" / "gpu").mkdir(parents=True)
    (tree / "osf_kernels").mkdir()
    shutil.copy(root / "bench" / "gpu" / "build.sh", tree / "bench" / "gpu")
    shutil.copytree(root / "csrc", tree / "csrc")
    (tree / "setup.py").write_text(setup)
    nvcc = folder / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    done = subprocess.run(
        ["bash", str(tree / "bench" / "gpu" / "build.sh"), *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "NVCC": str(nvcc)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return done, calls


REFUSED = "raise SystemExit('invalid pyproject.toml config: `project.license`.')\n"


def test_nvcc_builds_where_setuptools_refuses(root: Path, tmp_path: Path) -> None:
    done, calls = build(root, tmp_path, "9.0", setup=REFUSED)
    assert done.returncode == 0, done.stderr
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert (tmp_path / "tree" / "osf_kernels" / f"_cuda{suffix}").is_file()
    sources = {
        path.relative_to(root).as_posix()
        for pattern in ("*.cu", "*.cpp")
        for path in (root / "csrc").rglob(pattern)
    }
    compiled = [call for call in calls if " -c " in f" {call} "]
    assert {call.split(" -c ")[1].split()[0] for call in compiled} == sources
    assert all("-gencode=arch=compute_90,code=sm_90" in call for call in compiled)
    assert all("pybind11" in call or "torch" in call for call in compiled)


def test_setup_py_comes_first(root: Path, tmp_path: Path) -> None:
    done, calls = build(root, tmp_path, "9.0", setup="import sys; print(sys.argv)\n")
    assert done.returncode == 0
    assert "['setup.py', 'build_ext', '--inplace']" in done.stdout
    assert calls == []


def test_plain_build_skips_setup_py(root: Path, tmp_path: Path) -> None:
    done, calls = build(root, tmp_path, "--plain", "8.0", setup="raise SystemExit('was run')\n")
    assert done.returncode == 0
    assert "was run" not in done.stderr
    assert any("code=sm_80" in call for call in calls)


def test_a_source_that_fails_leaves_no_extension(root: Path, tmp_path: Path) -> None:
    (tmp_path / "FAILS").mkdir()
    done, calls = build(root, tmp_path / "FAILS", "9.0", setup=REFUSED)
    assert calls
    assert done.returncode != 0 or not FAILS_IN_PATH


@pytest.mark.parametrize("arguments", [(), ("90",), ("--plain",), ("9.0", "8.0")])
def test_build_refuses_bad_arguments(
    root: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done, calls = build(root, tmp_path, *arguments, setup=REFUSED)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert calls == []
