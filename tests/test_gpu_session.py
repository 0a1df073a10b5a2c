"""The GPU session without a GPU: its script's own logic, its build, its parts on tiny matrices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

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
from osf_kernels.backends.triton import configs as table

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
    pytest.importorskip("triton")
    done = session(root, "--dry-run", str(tmp_path), python=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "550 s of 550 s",
        "4096x4096 bf16 r=64: 1 matrices on cuda",
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
case "$*" in *broken.cu*) exit 1 ;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


def build(
    root: Path, folder: Path, *arguments: str, setup: str, extra: str = "inst/update_bf16.cu"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """build.sh over a copy of csrc with a stand-in compiler, whose calls are returned too."""
    tree = folder / "tree"
    (tree / "bench" / "gpu").mkdir(parents=True)
    (tree / "osf_kernels").mkdir()
    shutil.copy(root / "bench" / "gpu" / "build.sh", tree / "bench" / "gpu")
    shutil.copytree(root / "csrc", tree / "csrc")
    (tree / "csrc" / extra).touch()
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
    done, calls = build(root, tmp_path, "9.0", setup=REFUSED, extra="inst/broken.cu")
    assert any("broken.cu" in call for call in calls)
    assert done.returncode != 0
    assert list((tmp_path / "tree" / "osf_kernels").iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("90",), ("--plain",), ("9.0", "8.0")])
def test_build_refuses_bad_arguments(
    root: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done, calls = build(root, tmp_path, *arguments, setup=REFUSED)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert calls == []


# the parts


def rows_of(path: Path) -> list[dict[str, str]]:
    return report.read_csv(path)


def part(tmp_path: Path, name: str = "part", rounds: int = 1) -> Part:
    return Part(name, CPU, tmp_path / "rows.csv", rounds, tiny=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_parts_run_on_tiny_matrices(root: Path, tmp_path: Path, name: str) -> None:
    """Triton's kernels by its interpreter: that nothing crashes and results are right, no more."""
    pytest.importorskip("triton")
    out = tmp_path / "rows.csv"
    paths = os.pathsep.join((str(root), str(root / "python_api")))
    done = subprocess.run(
        [sys.executable, "-m", f"bench.gpu.{name}", "--dry-run", "--out", str(out)],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "OSF_BACKEND": "triton"}
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(out)
    assert rows
    for row in rows:
        assert (row["part"], row["device"], row["status"]) == (name, "cpu", "ok"), row
        assert float(row["error"]) <= float(row["error_bound"])
        assert row["gpu"] == ""


def test_a_backend_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    """Here Triton has neither a GPU nor its interpreter: its row says so, and others go on."""
    if osf_kernels.backends.choosing.unavailable_reason("triton", CPU) is None:
        pytest.skip("Triton's interpreter is on in this process")
    out = tmp_path / "rows.csv"
    assert measure.main("first_kernel", first_kernel.run, 1, ["--dry-run", "--out", str(out)]) == 1
    ours, *others = rows_of(out)
    assert ours["contender"] == "triton"
    assert ours["status"].startswith("failed: BackendUnavailableError")
    assert ours["device_ms"] == ""
    assert [row["status"] for row in others] == ["ok", "ok"]


@pytest.mark.parametrize("run", [whole_model.run, restoring.run, captures.run])
def test_wrong_results_get_no_speed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: object
) -> None:
    """A prepared list that leaves matrices as they are is caught before it is timed."""
    for method in ("project_", "restore_"):
        monkeypatch.setattr(osf_kernels.Prepared, method, lambda self, xs, **pins: None)
    chosen = part(tmp_path)
    if run is captures.run:  # compared with an eager call, which must be right
        monkeypatch.undo()
        monkeypatch.setattr(captures, "captured", lambda call, device: lambda: None)
    run(chosen)  # type: ignore[operator]
    ours = [row for row in rows_of(tmp_path / "rows.csv") if row["contender"] == "prepared"]
    assert ours
    for row in ours:
        assert row["status"].startswith("wrong: error"), row
        assert row["device_ms"] == row["host_hit_ms"] == row["host_miss_ms"] == ""
    assert chosen.failed == len(ours)


def test_kernels_that_write_nothing_are_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the contender before wrote isn't taken for the work of the next."""
    monkeypatch.setattr(launches.triton, "coefficients", lambda jobs, **options: None)
    monkeypatch.setattr(launches.triton, "update", lambda jobs, **options: None)
    monkeypatch.setattr(osf_kernels, "project_", lambda g, U, V: g)
    launches.run(part(tmp_path))
    rows = rows_of(tmp_path / "rows.csv")
    ours = [row for row in rows if not row["contender"].startswith("torch")]
    cases = list(launches.cases(tiny=True))
    alone = [row for row in ours if not row["case"].startswith("projection")]
    assert len(alone) == 2 * len(cases)
    assert all(row["status"].startswith("wrong: error inf") for row in alone)
    whole = [row for row in ours if row["case"].startswith("projection")]
    assert whole
    assert not any(row["status"] == "ok" for row in whole)
    torchs = [row for row in rows if row["contender"].startswith("torch")]
    assert all(row["status"] == "ok" for row in torchs)


def test_configs_that_write_nothing_are_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(configs, "launched", lambda *matrix_and_config: lambda: None)
    configs.run(part(tmp_path))
    rows = rows_of(tmp_path / "rows.csv")
    assert len({row["config"] for row in rows}) == len(rows) == 6
    assert all(row["status"].startswith("wrong: error") for row in rows)
    assert all(row["device_ms"] == "" for row in rows)


def test_a_config_that_does_not_fit_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refusing(*matrix_and_config: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(configs, "launched", refusing)
    configs.run(part(tmp_path))
    rows = rows_of(tmp_path / "rows.csv")
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {
        "failed: RuntimeError: out of resource: shared memory"
    }


def test_the_configs_tried_differ_and_begin_with_the_pinned_one() -> None:
    for architecture in ("sm_80", "sm_90", "sm_100"):
        for rank in (64, 128):
            pinned = table.projection_config(architecture, "bfloat16", rank)
            found = configs.tried(pinned)
            assert found[0] == pinned
            assert len(set(found)) == len(found) == 6


def test_results_that_differ_from_call_to_call_are_wrong(tmp_path: Path) -> None:
    calls = iter((1.0, 1.0 + 2.0**-6))
    row = Measurement()
    chosen = part(tmp_path)
    right = chosen.gate(row, lambda: [torch.full((2,), next(calls))], lambda results: 0.0, 1.0)
    assert not right
    assert row.status == "wrong: two runs differ in their bits"


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    """Also that of a contender that raises, after which the next one has its turn."""
    chosen = part(tmp_path)
    with chosen.writing(chosen.row("case", BF16, 4, "first")):
        raise RuntimeError("out of resource: shared memory")
    (row,) = rows_of(tmp_path / "rows.csv")
    assert row["status"] == "failed: RuntimeError: out of resource: shared memory"
    with chosen.writing(chosen.row("case", BF16, 4, "second")):
        pass
    assert [row["status"] for row in rows_of(tmp_path / "rows.csv")][1:] == ["ok"]
    with pytest.raises(KeyboardInterrupt), chosen.writing(chosen.row("case", BF16, 4, "third")):
        raise KeyboardInterrupt
    assert chosen.failed == 1


def test_gradients_lie_at_new_addresses_each_time() -> None:
    like = [torch.randn(5, 7), torch.randn(40, 8)]
    moving = whole_model.Moving(like, 3)
    seen: set[tuple[int, int]] = set()
    for _ in range(3):
        first, second = views = moving.next()
        assert [view.shape for view in views] == [g.shape for g in like]
        places = {(i, view.data_ptr()) for i, view in enumerate(views)}
        assert not places & seen
        seen |= places
        assert second.data_ptr() >= first.data_ptr() + first.numel() * first.element_size()


def test_padded_rows_keep_their_values() -> None:
    columns = torch.randn(6, 5)
    padded = launches.led(columns, 8)
    assert padded.stride() == (8, 1)
    assert torch.equal(padded, columns)


def test_no_part_measures_on_a_missing_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        measure.main("first_kernel", first_kernel.run, 1, ["--out", str(tmp_path / "rows.csv")])
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
