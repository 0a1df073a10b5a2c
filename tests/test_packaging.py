"""What is built and installed: the wheel, the choice to compile, the compiling itself."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest
import torch

import osf_kernels
from osf_kernels import env

# Of the root, what README's commands need or point to.
ROOT_FILES = ("Makefile", "README.md", "CHANGELOG.md", ".clang-format")


def load_setup(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("osf_setup", root / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with no variable of the table set."""
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return load_setup(root)


def clean_environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in env.VARIABLES}
    return kept | variables


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that nothing is written beside the sources."""
    root = Path(__file__).resolve().parent.parent
    copy = tmp_path_factory.mktemp("source")
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("osf_kernels", "python_api", "csrc", "tests", "bench", ".ci"):
        shutil.copytree(root / name, copy / name, ignore=built)
    for name in (*ROOT_FILES, "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(root / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip builds it, without the extension, the network or build isolation."""
    out = tmp_path_factory.mktemp("wheel")
    quiet = ["--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *quiet, *offline, "-w", str(out), str(source_tree)],
        env=clean_environment(OSF_CUDA="0"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"osf_kernels-{osf_kernels.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"osf_kernels", "osf_torch", info}
    inside = {name for name in names if not name.startswith(info)}
    expected = {
        path.relative_to(source_root).as_posix()
        for source_root, package in ((root, "osf_kernels"), (root / "python_api", "osf_torch"))
        for path in (source_root / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {"osf_kernels/py.typed", "osf_torch/py.typed"} <= expected
    assert inside == expected
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_without_the_extension_is_pure(wheel: Path) -> None:
    assert wheel.name == f"osf_kernels-{osf_kernels.__version__}-py3-none-any.whl"


def test_metadata_asks_for_torch_alone(metadata: Message) -> None:
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert required == ["torch>=2.10"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Version"] == osf_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == {"triton", "subspaces", "test", "bench", "demo", "lint", "dev"}


def test_the_extra_for_development_serves_make_test(metadata: Message, root: Path) -> None:
    """Its options name plugins: `-n` is of xdist, `timeout` of pytest-timeout."""
    of_tests = [
        r
        for r in metadata.get_all("Requires-Dist", [])
        if "extra == 'test'" in r or 'extra == "test"' in r
    ]
    named = {re.split(r"[ ;>=]", r)[0] for r in of_tests}
    assert "-n $(WORKERS)" in (root / "Makefile").read_text()
    assert {"pytest", "pytest-xdist", "pytest-timeout", "pytest-benchmark"} <= named


def test_sdist_holds_what_readmes_commands_need(source_tree: Path, tmp_path: Path) -> None:
    (source_tree / "osf_kernels" / "_cuda.so").touch()
    try:
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "sdist", "--formats=zip", "-d", str(tmp_path)],
            cwd=source_tree,
            env=clean_environment(OSF_CUDA="0"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        (source_tree / "osf_kernels" / "_cuda.so").unlink()
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.iterdir()
    with zipfile.ZipFile(archive) as opened:
        held = {name.partition("/")[2] for name in opened.namelist()}
    folders = ("osf_kernels", "python_api", "csrc", "tests", "bench", ".ci")
    files = {
        path.relative_to(source_tree).as_posix()
        for folder in folders
        for path in (source_tree / folder).rglob("*")
        if path.is_file()
    }
    needed = {"csrc/api.h", "bench/gpu_session.sh", "tests/cuda/test_gpu.py", ".ci/venv.sh"}
    assert needed <= files
    generated = {name for name in files if ".egg-info/" in name or "__pycache__" in name}
    assert files - generated | {*ROOT_FILES, "setup.py", "pyproject.toml", "LICENSE"} <= held
    assert [name for name in held if re.search(r"\.(so|o|pyc)$", name)] == []


def test_setup_runs_where_torch_cannot_be_imported(source_tree: Path) -> None:
    program = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=source_tree,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == osf_kernels.__version__


def test_pins_are_exact_and_serve_every_named_requirement(root: Path) -> None:
    def lines(name: str) -> list[str]:
        text = (root / ".ci" / name).read_text()
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    pins = lines("constraints.txt")
    assert [pin for pin in pins if not re.match(r"[\w.-]+==[\w.]+(;.*)?$", pin)] == []
    pinned = {re.split("==", pin)[0] for pin in pins}
    files = sorted(path.name for path in (root / ".ci").glob("requirements*.txt"))
    asked = [line for name in files for line in lines(name)]
    assert len(files) == 3
    assert {re.split("[; ]", name)[0] for name in asked} <= pinned


# --- the choice: OSF_CUDA, nvcc, architectures, jobs ------------------------------------------


@pytest.fixture
def without_nvcc(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source to build, and no nvcc in any place; the folder is where tests put one."""
    monkeypatch.setattr(build, "cuda_sources", lambda: ["csrc/kernel.cu"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "DEFAULT_CUDA_ROOT", tmp_path / "default")
    return tmp_path


def fake_nvcc(root: Path, said: str = "Cuda compilation tools, release 13.0, V13.0.88") -> Path:
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '{said}'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_auto_says_in_one_line_what_is_missing(
    build: ModuleType, without_nvcc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.extensions("auto") == []
    (line,) = capsys.readouterr().out.splitlines()
    assert "without the CUDA extension: nvcc was not found" in line
    assert f"looked at PATH, {without_nvcc / 'default' / 'bin' / 'nvcc'}" in line


def test_one_fails_with_what_was_looked_for(build: ModuleType, without_nvcc: Path) -> None:
    with pytest.raises(build.BuildError, match=r"OSF_CUDA=1 .* nvcc was not found; looked at"):
        build.extensions("1")


def test_zero_does_not_look(build: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.extensions("0") == []
    assert capsys.readouterr().out == ""


def pretend_torch(folder: Path, cuda: str | None) -> None:
    """A torch that can be read but not imported, in a folder of installed packages."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    about = f"__version__ = '2.13.0+pretended'\ncuda = {cuda!r}\nhip = None\n"
    (folder / "torch" / "version.py").write_text(about)


@pytest.fixture
def with_toolkit(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as if nvcc, pybind11 and Python.h were here, and no torch."""
    monkeypatch.setattr(build, "find_toolkit", lambda: build.Toolkit("nvcc", "13.0", ()))
    monkeypatch.setattr(build.site, "getsitepackages", list)
    monkeypatch.setitem(sys.modules, "torch", None)
    return build


@pytest.mark.parametrize("isolated", [False, True], ids=["on the path", "isolated build"])
def test_an_install_leaves_the_extension_out_of_a_torch_without_cuda(
    with_toolkit: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    isolated: bool,
) -> None:
    pretend_torch(tmp_path, cuda=None)
    if isolated:
        monkeypatch.setattr(with_toolkit.site, "getsitepackages", lambda: [str(tmp_path)])
    else:
        monkeypatch.delitem(sys.modules, "torch")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert with_toolkit.extensions("auto") == []
    (line,) = capsys.readouterr().out.splitlines()
    assert "without the CUDA extension: torch 2.13.0+pretended is a build without CUDA" in line
    assert "OSF_CUDA=1" in line
    for asked in (
        with_toolkit.extensions("1"),
        with_toolkit.extensions("auto", by_name=True),
    ):
        assert [extension.name for extension in asked] == ["osf_kernels._cuda"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("cuda", ["13.0", "no torch"])
def test_an_install_builds_for_a_torch_with_cuda_and_before_torch_is_there(
    with_toolkit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str
) -> None:
    if cuda != "no torch":
        pretend_torch(tmp_path, cuda)
    monkeypatch.setattr(with_toolkit.site, "getsitepackages", lambda: [str(tmp_path)])
    assert with_toolkit.torch_without_cuda() is None
    assert [e.name for e in with_toolkit.extensions("auto")] == ["osf_kernels._cuda"]


def test_torchs_build_is_read_as_torch_says_it(build: ModuleType) -> None:
    expected = None if torch.version.cuda else torch.__version__
    assert build.torch_without_cuda() == expected


@pytest.mark.parametrize(("command", "named"), [("build_ext", True), ("bdist_wheel", False)])
def test_only_build_ext_by_name_compiles_for_any_torch(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, command: str, named: bool
) -> None:
    """`make build` names it, for the tests of csrc/ on a machine without a GPU; pip doesn't."""
    seen: list[bool] = []

    def extensions(wanted: str, *, by_name: bool) -> list[object]:
        seen.append(by_name)
        return []

    monkeypatch.setattr(build, "extensions", extensions)
    monkeypatch.setattr(build, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    build.main()
    assert seen == [named]


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_without_sources_there_is_nothing_to_build(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wanted: str,
) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    if wanted == "1":
        with pytest.raises(build.BuildError, match="nothing to build"):
            build.extensions(wanted)
    else:
        assert build.extensions(wanted) == []
        assert "nothing to build" in capsys.readouterr().out


def test_a_bad_choice_stops_the_build_before_it_starts(source_tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source_tree,
        env=clean_environment(OSF_CUDA="yes"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "expected the environment variable OSF_CUDA to be auto | 0 | 1, got 'yes'" in done.stderr
    assert "Traceback" not in done.stderr


def test_nvcc_is_looked_for_in_order(
    build: ModuleType, without_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = fake_nvcc(without_nvcc / "default")
    assert build.find_nvcc()[0] == str(default)
    on_path = fake_nvcc(without_nvcc / "path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert build.find_nvcc()[0] == str(on_path)
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        named = fake_nvcc(without_nvcc / variable)
        monkeypatch.setenv(variable, str(without_nvcc / variable))
        assert build.find_nvcc()[0] == str(named)


def test_a_named_toolkit_without_nvcc_is_not_replaced(
    build: ModuleType, without_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(without_nvcc / "default")
    fake_nvcc(without_nvcc / "named").chmod(0o644)
    monkeypatch.setenv("CUDA_HOME", str(without_nvcc / "named"))
    assert build.find_nvcc() == (None, [f"CUDA_HOME={without_nvcc / 'named'}"])


def test_release_is_read_from_nvcc(build: ModuleType, tmp_path: Path) -> None:
    assert build.nvcc_release(str(fake_nvcc(tmp_path / "good"))) == "13.0"
    with pytest.raises(build.BuildError, match="no compiler here"):
        build.nvcc_release(str(fake_nvcc(tmp_path / "bad", "no compiler here")))


@pytest.mark.parametrize(
    ("arch_list", "codes"),
    [
        ("8.0;9.0", ["80:sm_80", "90:sm_90"]),
        ("8.0 9.0+PTX", ["80:sm_80", "90:sm_90", "90:compute_90"]),
        ("9.0a", ["90a:sm_90a"]),
        (" 8.6, 10.0f+PTX; ", ["86:sm_86", "100f:sm_100f", "100f:compute_100f"]),
        ("7.5;8.0", ["80:sm_80"]),
    ],
)
def test_architectures(build: ModuleType, arch_list: str, codes: list[str]) -> None:
    expected = ["-gencode=arch=compute_{},code={}".format(*code.split(":")) for code in codes]
    assert build.gencode_flags(arch_list) == expected


def test_default_architectures_are_ampere_and_hopper_with_ptx(build: ModuleType) -> None:
    codes = [
        flag.rpartition("=")[2] for flag in build.gencode_flags(env.get("TORCH_CUDA_ARCH_LIST"))
    ]
    assert codes == ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize("arch_list", ["Ampere", "80", "8.0;sm_90", "7.0;7.5", ""])
def test_bad_architectures_are_refused(build: ModuleType, arch_list: str) -> None:
    with pytest.raises(build.BuildError, match="TORCH_CUDA_ARCH_LIST"):
        build.gencode_flags(arch_list)


def test_jobs_are_capped_by_memory_cores_and_tasks(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(build, "available_memory", lambda: 64 << 30)
    assert build.job_count(100) == 16
    assert build.job_count(3) == 3
    monkeypatch.setattr(build, "available_memory", lambda: 10 << 30)
    assert build.job_count(100) == 3
    monkeypatch.setattr(build, "available_memory", lambda: 1 << 30)
    assert build.job_count(100) == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.job_count(100) == 7


def test_pybind11_is_taken_from_torch_where_it_is_missing(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("pybind11", "torch"):
        header = tmp_path / name / "include" / "pybind11" / "pybind11.h"
        header.parent.mkdir(parents=True)
        header.touch()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    # Only these two are on the path, and neither survives an import.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("pybind11", "torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert build.find_pybind11() == str(tmp_path / "pybind11" / "include")
    shutil.rmtree(tmp_path / "pybind11")
    importlib.invalidate_caches()
    assert build.find_pybind11() == str(tmp_path / "torch" / "include")


def test_pybind11_of_this_environment_is_found(build: ModuleType) -> None:
    assert (Path(build.find_pybind11()) / "pybind11" / "pybind11.h").is_file()


def test_setup_imports_no_torch(root: Path) -> None:
    tree = ast.parse((root / "setup.py").read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {
        name for name in imported if name and name.split(".")[0] in {"torch", "osf_kernels"}
    } == set()


# --- the compiling: a small extension, by ninja and by the thread pool -------------------------

# Python's own API rather than pybind11, which would make each of these builds take ten seconds.
BINDING = """
#include <Python.h>
#include "shared.h"
int device_count();
int architecture();
static PyObject* ask(PyObject*, PyObject*) {
    return Py_BuildValue("iii", SHARED, architecture(), device_count());
}
static PyMethodDef methods[] = {{"ask", ask, METH_NOARGS, ""}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", "", -1, methods};
PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&definition); }
"""
KERNEL = """
#include <cuda_runtime.h>
__global__ void fill(float* x) { x[threadIdx.x] = 1.0f; }
int architecture() {
    constexpr int compiled[] = {__CUDA_ARCH_LIST__};
    return compiled[0];
}
int device_count() {
    int count = -1;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : -1;
}
"""


def nvcc_missing() -> str:
    found = load_setup(Path(__file__).resolve().parent.parent).find_toolkit()
    return found if isinstance(found, str) else ""


@pytest.mark.slow
@pytest.mark.skipif(bool(nvcc_missing()), reason=nvcc_missing() or "nvcc is here")
@pytest.mark.parametrize("with_ninja", [True, False], ids=["ninja", "thread pool"])
def test_extension_builds_loads_and_rebuilds_what_changed(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_ninja: bool
) -> None:
    tree = tmp_path / "a tree"  # the blank must survive ninja, depfiles and the shell
    (tree / "csrc").mkdir(parents=True)
    (tree / "csrc" / "binding.cpp").write_text(BINDING)
    (tree / "csrc" / "kernel.cu").write_text(KERNEL)
    (tree / "csrc" / "shared.h").write_text("#define SHARED 1\n")
    monkeypatch.setattr(build, "ROOT", tree)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    if with_ninja:
        assert build.find_ninja(), "ninja is among the pinned requirements"
    else:
        monkeypatch.setattr(build, "find_ninja", lambda: None)
    toolkit, folder = build.find_toolkit(), tree / "build"

    def compile_all() -> tuple[Path, dict[str, int]]:
        library = build.compile_extension(toolkit, build.cuda_sources(), folder)
        made = [*folder.rglob("*.o"), library]
        return library, {path.name: path.stat().st_mtime_ns for path in made}

    def ask(library: Path) -> tuple[int, int]:
        """What the extension answers, loaded in a process of its own."""
        shutil.copyfile(library, tree / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")
        program = "import _cuda; print(repr(_cuda.ask()))"
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tree,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        value, architecture, devices = ast.literal_eval(done.stdout)
        assert devices >= -1  # -1 is the runtime's own answer where there is no driver
        return value, architecture

    library, first = compile_all()
    assert ask(library) == (1, 800)
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True)
    assert not re.search(r"libcudart|libcuda\.|libtorch|libc10", needed.stdout), needed.stdout

    _, again = compile_all()
    assert again == first

    (tree / "csrc" / "shared.h").write_text("#define SHARED 2\n")
    library, touched = compile_all()
    changed = {name for name in first if touched[name] != first[name]}
    assert changed == {"binding.cpp.o", "_cuda.so"}
    assert ask(library) == (2, 800)

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    library, retargeted = compile_all()
    assert {name for name in touched if retargeted[name] == touched[name]} == set()
    assert ask(library) == (2, 900)

    (tree / "csrc" / "kernel.cu").write_text("this is no C++\n")
    with pytest.raises(build.BuildError, match="OSF_CUDA=0 installs without it"):
        compile_all()
