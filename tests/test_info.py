"""`python -m osf_kernels info` and the table of environment variables it prints."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import osf_kernels
from osf_kernels import env
from osf_kernels.__main__ import main
from osf_kernels.backends.choosing import NAMES, unavailable_reason


def run_info(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "osf_kernels", *arguments],
        cwd=root,
        env={k: v for k, v in os.environ.items() if k not in env.VARIABLES} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The JSON of a run with one good and one bad variable set."""
    root = Path(__file__).resolve().parent.parent
    done = run_info(root, "info", "--json", OSF_AUTOTUNE="1", OSF_BACKEND="gpu")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_json_names_the_versions_in_use(found: dict[str, Any]) -> None:
    versions = found["versions"]
    assert versions["osf-kernels"] == osf_kernels.__version__
    assert versions["torch"] == torch.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["CUDA of torch"] == torch.version.cuda


def test_json_holds_every_backend_on_every_device(found: dict[str, Any]) -> None:
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    assert [d["device"] for d in found["devices"]] == devices
    reported = {(b["device"], b["backend"]): b for b in found["backends"]}
    assert set(reported) == {(device, backend) for device in devices for backend in NAMES}
    for (device, backend), entry in reported.items():
        assert entry["available"] == (entry["reason"] is None)
        assert entry["reason"] == unavailable_reason(backend, torch.device(device))
    assert reported["cpu", "torch"]["available"]
    assert not reported["cpu", "cuda"]["available"]


def test_json_holds_every_variable_with_its_value(found: dict[str, Any]) -> None:
    settings = {s["name"]: s for s in found["environment"]}
    assert list(settings) == list(env.VARIABLES)
    assert settings["OSF_AUTOTUNE"]["value"] == "1"
    assert settings["OSF_AUTOTUNE"]["is_set"]
    assert settings["OSF_CUDA"]["value"] == "auto"
    assert not settings["OSF_CUDA"]["is_set"]


def test_a_bad_value_is_reported_and_not_fatal(found: dict[str, Any]) -> None:
    settings = {s["name"]: s for s in found["environment"]}
    assert settings["OSF_BACKEND"]["value"] == "gpu"
    assert settings["OSF_BACKEND"]["problem"] == "not auto | torch | triton | cuda"
    assert [s["name"] for s in found["environment"] if s["problem"]] == ["OSF_BACKEND"]


def test_text_shows_all_of_the_json_in_aligned_columns(
    capsys: pytest.CaptureFixture[str], found: dict[str, Any]
) -> None:
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    blocks = {lines[0]: lines[1:] for lines in map(str.splitlines, out.split("\n\n"))}
    assert list(blocks) == ["Versions", "Devices", "Backends", "Who runs what", "Environment"]
    assert len(blocks["Versions"]) == len(found["versions"])
    assert len(blocks["Backends"]) == len(found["backends"])
    assert len(blocks["Who runs what"]) == len(found["choices"]) == 6 * len(found["devices"])
    assert [line.split()[0] for line in blocks["Environment"]] == list(env.VARIABLES)
    for lines in blocks.values():
        # Two blanks end the first column; the second begins where it does in every row.
        starts = {re.match(r"  .+?  +", line).end() for line in lines}  # type: ignore[union-attr]
        assert len(starts) == 1, lines


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "usage: python -m osf_kernels" in out
    assert "info" in out


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"osf-kernels {osf_kernels.__version__}\n"


@pytest.mark.parametrize("arguments", [["inform"], ["info", "--yaml"], ["info", "extra"]])
def test_bad_arguments_are_refused_with_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert "usage:" in err
    assert out == ""


@pytest.mark.parametrize("name", list(env.VARIABLES))
def test_unset_and_empty_mean_the_default(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name, raising=False)
    assert env.get(name) == env.VARIABLES[name].default
    monkeypatch.setenv(name, " ")
    assert env.get(name) == env.VARIABLES[name].default


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OSF_BACKEND", "cuda"),
        ("OSF_CUDA", "1"),
        ("OSF_AUTOTUNE", "1"),
        ("MAX_JOBS", "12"),
        ("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX"),
        ("TORCH_CUDA_ARCH_LIST", "8.0;8.6,10.0f"),
        ("CUDA_HOME", "/opt/my cuda"),
    ],
)
def test_values_that_are_taken(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert env.get(name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OSF_BACKEND", "Torch"),
        ("OSF_BACKEND", "auto|torch"),
        ("OSF_CUDA", "yes"),
        ("OSF_AUTOTUNE", "2"),
        ("MAX_JOBS", "0"),
        ("MAX_JOBS", "-1"),
        ("MAX_JOBS", "²"),
        ("TORCH_CUDA_ARCH_LIST", "Ampere"),
        ("TORCH_CUDA_ARCH_LIST", "sm_80"),
        ("TORCH_CUDA_ARCH_LIST", "8.0+ptx"),
    ],
)
def test_values_that_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name) as caught:
        env.get(name)
    assert repr(value) in str(caught.value)
    assert env.VARIABLES[name].expected in str(caught.value)


def test_a_value_changed_while_running_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSF_BACKEND", "torch")
    assert env.get("OSF_BACKEND") == "torch"
    monkeypatch.setenv("OSF_BACKEND", "auto")
    assert env.get("OSF_BACKEND") == "auto"


def test_env_imports_the_standard_library_only(root: Path) -> None:
    tree = ast.parse((root / "osf_kernels" / "env.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def environment_reads(source: str) -> list[str]:
    """Names given in clear to os.environ, os.getenv or env.get anywhere in a source."""
    clear = r"[\"']([A-Z][A-Z0-9_]+)[\"']"
    ways = (rf"environ\[{clear}\]", rf"environ\.get\({clear}", rf"getenv\({clear}")
    ways += (rf"\benv\.get\({clear}", rf"\benv_get\({clear}")
    return [name for way in ways for name in re.findall(way, source)]


def test_every_variable_that_is_read_stands_in_the_table(root: Path) -> None:
    files = [root / "setup.py"]
    for folder in ("osf_kernels", "python_api", "bench"):
        files += sorted((root / folder).rglob("*.py"))
    reads = {(p.name, name) for p in files for name in environment_reads(p.read_text())}
    assert ("setup.py", "OSF_CUDA") in reads
    assert {entry for entry in reads if entry[1] not in env.VARIABLES} == set()
