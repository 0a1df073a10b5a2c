"""Builds osf-kernels: two import packages and, where nvcc is found, the CUDA extension.

Neither torch nor the network is needed. The extension links no libtorch and a static CUDA
runtime, so one build imports on a machine without a driver and serves every torch version.
It is compiled by nvcc itself, through ninja where that is installed: torch's own
`CUDAExtension` refuses to run where torch is a CPU build, even beside a CUDA toolkit.

Environment variables: see `osf_kernels/env.py`, which this file loads by its path.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
EXTENSION = "osf_kernels._cuda"
DEFAULT_CUDA_ROOT = Path("/usr/local/cuda")
# mma.sync on bf16 and cp.async, which every kernel uses, begin here.
OLDEST_CAPABILITY = (8, 0)
JOB_BYTES = 3 << 30
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-cudart",
    "static",
)


class BuildError(RuntimeError):
    """The build cannot go on; the message says what was expected and what was found."""


def _load_env_get() -> Callable[[str], str]:
    """`osf_kernels.env.get` without importing the package, which would import torch."""
    spec = importlib.util.spec_from_file_location("_osf_env", ROOT / "osf_kernels" / "env.py")
    if spec is None or spec.loader is None:
        raise BuildError(f"expected osf_kernels/env.py under {ROOT}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get: Callable[[str], str] = module.get
    return get


env_get = _load_env_get()


def cuda_sources() -> list[str]:
    """Every translation unit under csrc/, relative to the root, in a fixed order."""
    found = [p for suffix in ("cu", "cpp") for p in (ROOT / "csrc").rglob(f"*.{suffix}")]
    return sorted(p.relative_to(ROOT).as_posix() for p in found)


def cuda_headers() -> list[str]:
    found = [p for suffix in ("cuh", "h", "hpp") for p in (ROOT / "csrc").rglob(f"*.{suffix}")]
    return sorted(p.relative_to(ROOT).as_posix() for p in found)


# --- what the extension is built with -------------------------------------------------------


class Toolkit(NamedTuple):
    """What compiles the extension: nvcc, its release, and the header folders."""

    nvcc: str
    release: str
    includes: tuple[str, ...]


def find_nvcc() -> tuple[str | None, list[str]]:
    """Path of nvcc, or None, and the places that were looked at.

    A toolkit named by CUDA_HOME, or else by CUDA_PATH, is the only one that is taken.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := env_get(variable):
            return shutil.which(str(Path(root) / "bin" / "nvcc")), [f"{variable}={root}"]
    default = DEFAULT_CUDA_ROOT / "bin" / "nvcc"
    return shutil.which("nvcc") or shutil.which(str(default)), ["PATH", str(default)]


def nvcc_release(nvcc: str) -> str:
    """Release of an nvcc, such as '13.0'."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+\.\d+)", said.stdout)
    if said.returncode != 0 or match is None:
        raise BuildError(
            f"expected `{nvcc} --version` to name a release, got exit code {said.returncode} "
            f"and {(said.stdout + said.stderr).strip()[:200]!r}"
        )
    return match[1]


def find_pybind11() -> str | None:
    """pybind11's header folder: of its own package, else of the copy that torch ships.

    `find_spec` reads where torch is installed without importing it.
    """
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            include = Path(location) / "include"
            if (include / "pybind11" / "pybind11.h").is_file():
                return str(include)
    return None


def find_ninja() -> str | None:
    """ninja beside this interpreter, of the PyPI package, or on PATH."""
    beside = Path(sys.executable).parent / "ninja"
    if beside.is_file():
        return str(beside)
    spec = importlib.util.find_spec("ninja")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        # A build environment's scripts stand in its own bin/, off this interpreter's path.
        for inside in ("data/bin/ninja", "../../../../bin/ninja"):
            packaged = Path(location) / inside
            if packaged.is_file():
                return str(packaged.resolve())
    return shutil.which("ninja")


def torch_without_cuda() -> str | None:
    """The installed torch's version where that build has no CUDA; None where it has, or none is.

    pip hides the installed packages from an isolated build, but not the folders they lie in.
    `torch/version.py` is run by its path: it imports nothing of torch.
    """
    spec = importlib.util.find_spec("torch")
    found = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    for package in (*found, *(Path(folder) / "torch" for folder in site.getsitepackages())):
        if (package / "version.py").is_file():
            about = runpy.run_path(str(package / "version.py"))
            return None if about["cuda"] else str(about["__version__"])
    return None


def find_toolkit() -> Toolkit | str:
    """The toolkit, or one line that says what is missing and where it was looked for."""
    if platform.system() != "Linux":
        return f"the CUDA extension is built on Linux only, this is {platform.system()}"
    nvcc, looked = find_nvcc()
    if nvcc is None:
        return f"nvcc was not found; looked at {', '.join(looked)}"
    pybind11 = find_pybind11()
    if pybind11 is None:
        return "pybind11's headers were not found; looked at the packages pybind11 and torch"
    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").is_file():
        return f"Python.h was not found; looked at {python}"
    return Toolkit(nvcc, nvcc_release(nvcc), (pybind11, python))


def gencode_flags(arch_list: str) -> list[str]:
    """nvcc flags of a list such as '8.0;9.0+PTX': machine code for each, PTX where asked for."""
    flags: list[str] = []
    for arch in re.split(r"[;,\s]+", arch_list.strip(" ;,\t\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise BuildError(
                f"expected TORCH_CUDA_ARCH_LIST to hold capabilities such as 9.0 or 9.0+PTX, "
                f"got {arch!r}"
            )
        major, minor, suffix, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_CAPABILITY:
            print(f"osf-kernels: {arch} is left out, the kernels need 8.0 or newer")
            continue
        number = f"{major}{minor}{suffix}"
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if ptx else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    if not flags:
        raise BuildError(
            f"expected TORCH_CUDA_ARCH_LIST to name a capability of 8.0 or newer, got {arch_list!r}"
        )
    return flags


def available_memory() -> int:
    """Bytes this build may use: what the machine has free, or the container's limit if lower."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (m := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = int(m[1]) << 10
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text))
    return free


def job_count(tasks: int) -> int:
    """Compilers to run at a time: MAX_JOBS, else by cores and about 3 GB of memory each."""
    if asked := env_get("MAX_JOBS"):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(tasks, cores or 1, available_memory() // JOB_BYTES))


# --- running the compilers ------------------------------------------------------------------


class Step(NamedTuple):
    """One command of the build. A depfile names the headers that the output depends on."""

    command: list[str]
    inputs: list[str]
    output: str
    depfile: str | None


def build_steps(toolkit: Toolkit, sources: Sequence[str], folder: Path) -> list[Step]:
    """Compile each source into `folder`, then link. The last step's output is the extension."""
    flags = [
        *NVCC_FLAGS,
        *gencode_flags(env_get("TORCH_CUDA_ARCH_LIST")),
        *("-I", str(ROOT / "csrc")),
        *(part for include in toolkit.includes for part in ("-isystem", include)),
    ]
    steps: list[Step] = []
    for source in sources:
        path, output = str(ROOT / source), str(folder / f"{source}.o")
        depfile = f"{output}.d"
        command = [toolkit.nvcc, *flags, "-MD", "-MF", depfile, "-c", path, "-o", output]
        steps.append(Step(command, [path], output, depfile))
    objects = [step.output for step in steps]
    library = str(folder / "_cuda.so")
    link = [toolkit.nvcc, "-shared", "-cudart", "static", *objects, "-o", library]
    return [*steps, Step(link, objects, library, None)]


def write_ninja(steps: Sequence[Step], path: Path) -> None:
    """Write the steps as a build.ninja; ninja then tracks headers and changed commands."""

    def escape(text: str) -> str:
        return re.sub(r"([$ :])", r"$\1", text)

    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        "  command = $cmd",
        "  depfile = $dep",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        "  command = $cmd",
        "  description = link $out",
    ]
    for step in steps:
        rule = "compile" if step.depfile else "link"
        lines.append(
            f"build {escape(step.output)}: {rule} {' '.join(escape(i) for i in step.inputs)}"
        )
        lines.append("  cmd = " + shlex.join(step.command).replace("$", "$$"))
        if step.depfile:
            lines.append("  dep = " + step.depfile.replace("$", "$$"))
    path.write_text("\n".join(lines) + "\n")


def run_with_ninja(ninja: str, steps: Sequence[Step], folder: Path, jobs: int) -> None:
    write_ninja(steps, folder / "build.ninja")
    done = subprocess.run([ninja, "-C", str(folder), "-j", str(jobs)], check=False)
    if done.returncode != 0:
        raise BuildError("compiling the CUDA extension failed; OSF_CUDA=0 installs without it")


def is_current(step: Step) -> bool:
    """Whether the output is newer than all it depends on and was made by the same command."""
    output, record = Path(step.output), Path(f"{step.output}.cmd")
    if not (output.is_file() and record.is_file()):
        return False
    if record.read_text() != shlex.join(step.command):
        return False
    inputs = list(step.inputs)
    if step.depfile:
        depfile = Path(step.depfile)
        if not depfile.is_file():
            return False
        # Make's syntax: `target: a b \<newline> c`, with blanks inside a name escaped.
        _, _, named = depfile.read_text().replace("\\\n", " ").partition(": ")
        inputs += [re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"(?:\\.|\S)+", named)]
    made = output.stat().st_mtime_ns
    return all(Path(i).is_file() and Path(i).stat().st_mtime_ns <= made for i in inputs)


def run_without_ninja(steps: Sequence[Step], jobs: int) -> None:
    """Run the stale compile steps on a thread pool, then the link."""
    *compiles, link = steps
    stale = [step for step in compiles if not is_current(step)]

    def run(step: Step) -> None:
        print(f"nvcc {' '.join(step.inputs)}" if step.depfile else f"link {step.output}")
        record = Path(f"{step.output}.cmd")
        record.unlink(missing_ok=True)
        done = subprocess.run(step.command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(
                f"compiling the CUDA extension failed; OSF_CUDA=0 installs without it\n"
                f"{shlex.join(step.command)}\n{done.stdout}{done.stderr}"
            )
        record.write_text(shlex.join(step.command))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, stale))
    if stale or not is_current(link):
        run(link)


def compile_extension(toolkit: Toolkit, sources: Sequence[str], folder: Path) -> Path:
    """Bring the extension in `folder` up to date and return its path."""
    steps = build_steps(toolkit, sources, folder)
    for step in steps:
        Path(step.output).parent.mkdir(parents=True, exist_ok=True)
    jobs = job_count(len(sources))
    ninja = find_ninja()
    print(
        f"osf-kernels: building {EXTENSION} from {len(sources)} sources, nvcc {toolkit.release}, "
        f"{env_get('TORCH_CUDA_ARCH_LIST')}, {jobs} jobs, {'ninja' if ninja else 'no ninja'}",
        flush=True,
    )
    if ninja:
        run_with_ninja(ninja, steps, folder, jobs)
    else:
        run_without_ninja(steps, jobs)
    return Path(steps[-1].output)


# --- setuptools -----------------------------------------------------------------------------


def extensions(wanted: str, *, by_name: bool = False) -> list[Extension]:
    """The CUDA extension, or nothing and one line why; OSF_CUDA=1 turns the line into an error.

    A torch without CUDA has no tensor to hand to the extension, so an install leaves it out.
    `by_name`: the command line names `build_ext` itself, which compiles for any torch.
    """
    if wanted == "0":
        return []
    sources = cuda_sources()
    found = find_toolkit() if sources else "csrc/ holds no sources, there is nothing to build"
    unasked = isinstance(found, Toolkit) and wanted == "auto" and not by_name
    if unasked and (version := torch_without_cuda()):
        found = f"torch {version} is a build without CUDA; OSF_CUDA=1 compiles it all the same"
    if isinstance(found, Toolkit):
        return [Extension(EXTENSION, sources=sources, depends=cuda_headers())]
    if wanted == "1":
        raise BuildError(f"OSF_CUDA=1 asks for the CUDA extension, but {found}")
    print(f"osf-kernels: building without the CUDA extension: {found}")
    return []


class BuildCuda(build_ext):
    """`build_ext` by nvcc, into a folder that is kept so that the next build is incremental."""

    def build_extension(self, ext: Extension) -> None:
        toolkit = find_toolkit()
        if isinstance(toolkit, str):
            raise BuildError(toolkit)
        folder = ROOT / "build" / f"cuda-{sysconfig.get_config_var('SOABI')}"
        built = compile_extension(toolkit, ext.sources, folder)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)


def main() -> None:
    compiles = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
    try:
        wanted = env_get("OSF_CUDA")
        setup(
            packages=[
                *find_packages(str(ROOT), include=["osf_kernels", "osf_kernels.*"]),
                *find_packages(str(ROOT / "python_api"), include=["osf_torch", "osf_torch.*"]),
            ],
            package_dir={"osf_torch": "python_api/osf_torch"},
            package_data={"osf_kernels": ["py.typed"], "osf_torch": ["py.typed"]},
            ext_modules=extensions(wanted, by_name="build_ext" in sys.argv)
            if compiles.intersection(sys.argv)
            else [],
            cmdclass={"build_ext": BuildCuda},
        )
    except (BuildError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
