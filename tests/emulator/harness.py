"""Builds the SIMT emulator around csrc/ and runs jobs of ``backends.jobs`` in it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from osf_kernels.backends.cuda.factorizations import CholeskyJob, JacobiJob
from osf_kernels.backends.cuda.records import Address, pack
from osf_kernels.backends.jobs import Coefficients, Update

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
# Largest shared memory of a block: compute capability 8.0, and 9.0.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}

FLAGS = (
    "-std=c++17",
    "-DOSF_SIMT_EMULATOR",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
)
FAST = ("-O2",)
SANITIZED = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)

# How main.cpp numbers them.
KINDS = {Coefficients: 0, Update: 1, CholeskyJob: 2, JacobiJob: 3}
Factorization = CholeskyJob | JacobiJob
Job = Coefficients | Update | Factorization

Mutations = Mapping[str, Callable[[str], str]]


class EmulatorError(RuntimeError):
    """The emulator or a sanitizer stopped the kernel; the message is what it said."""


@dataclass(frozen=True)
class Run:
    """One seed's outcome, a tensor of the jobs to what it became."""

    results: dict[int, Tensor]
    bytes_read: dict[int, int]
    bytes_written: dict[int, int]
    launches: int

    def __getitem__(self, tensor: Tensor) -> Tensor:
        return self.results[id(tensor)]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(*, sanitize: bool = False, mutations: Mutations | None = None, only: str = "*") -> Path:
    """The emulator's path, compiled where its sources changed.

    ``mutations`` maps names of files of csrc/ to functions of their text, applied to a copy that
    the sources matching ``only`` (relative to csrc/) are compiled from.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = CSRC
        if mutations:
            source = Path(scratch) / "csrc"
            shutil.copytree(CSRC, source)
            for name, mutate in mutations.items():
                text = (source / name).read_text()
                changed = mutate(text)
                assert changed != text, f"the mutation leaves {name} as it is"
                (source / name).write_text(changed)
        return _compile(source, only, (*FLAGS, *(SANITIZED if sanitize else FAST)))


def run(
    jobs: Sequence[Job],
    *,
    seeds: Sequence[int] = (1,),
    emulator: Path | None = None,
    multiprocessors: int = 4,
    allow_tf32: bool = False,
    shared_limit: int = SHARED_LIMIT[80],
) -> list[Run]:
    """Runs a list of jobs on CPU tensors once a seed; the tensors stay as they are."""
    storages = _Storages()
    records = b"".join(_record(job, storages.address) for job in jobs)
    kind = KINDS[type(jobs[0])]
    header = [kind, multiprocessors, int(allow_tf32), shared_limit]
    header += [len(seeds), len(storages.found), len(jobs), *seeds]
    blobs = [_bytes_of(storage) for storage in storages.found.values()]
    header += [len(blob) for blob in blobs]
    request = struct.pack(f"<{len(header)}q", *header) + b"".join(blobs) + records
    result = _call_emulator(request, emulator)
    if kind == KINDS[Coefficients]:
        result = result[8 * len(jobs) :]  # as in workspace_bytes
    return _read(result, [len(blob) for blob in blobs], storages, len(seeds))


def workspace_bytes(jobs: Sequence[Coefficients], multiprocessors: int) -> list[int]:
    """What each job takes by itself for partial sums; its tensors need no memory."""
    records = b"".join(pack([job], lambda _: 1 << 40) for job in jobs)
    header = [KINDS[Coefficients], multiprocessors, 0, SHARED_LIMIT[80], 0, 1, len(jobs), 0]
    data = _call_emulator(struct.pack(f"<{len(header)}q", *header) + records)
    return list(struct.unpack(f"<{len(jobs)}q", data))


def _call_emulator(request: bytes, emulator: Path | None = None) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        asked, result = Path(scratch) / "request", Path(scratch) / "result"
        asked.write_bytes(request)
        done = subprocess.run(
            [str(emulator or build()), str(asked), str(result)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"},
        )
        if done.returncode != 0:
            raise EmulatorError(done.stderr.strip() or f"exit code {done.returncode}")
        return result.read_bytes()


def _record(job: Job, address: Address) -> bytes:
    return job.pack(address) if isinstance(job, Factorization) else pack([job], address)


class _Storages:
    """The storages behind the tensors of a list of jobs, numbered as they come."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}
        self.tensors: dict[int, Tensor] = {}

    def address(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.found.setdefault(storage.data_ptr(), _whole(tensor))
        self.tensors[id(tensor)] = tensor
        index = list(self.found).index(storage.data_ptr())
        return (1 + index) << 40 | int(tensor.storage_offset()) * tensor.element_size()

    def index(self, tensor: Tensor) -> int:
        return list(self.found).index(tensor.untyped_storage().data_ptr())


def _whole(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def _bytes_of(whole: Tensor) -> bytes:
    return whole.numpy().tobytes()


def _read(data: bytes, sizes: list[int], storages: _Storages, seeds: int) -> list[Run]:
    runs, at = [], 0
    for _ in range(seeds):
        counts = struct.unpack_from(f"<{2 * len(sizes) + 1}q", data, at)
        at += 8 * len(counts)
        buffers = []
        for size in sizes:
            buffers.append(
                torch.frombuffer(bytearray(data[at : at + size] or b"\0"), dtype=torch.uint8)
            )
            at += size
        results, read, written = {}, {}, {}
        for key, tensor in storages.tensors.items():
            index = storages.index(tensor)
            buffer = buffers[index].untyped_storage()
            results[key] = torch.empty(0, dtype=tensor.dtype).set_(
                buffer, tensor.storage_offset(), tensor.shape, tensor.stride()
            )
            read[key], written[key] = counts[2 * index], counts[2 * index + 1]
        runs.append(Run(results, read, written, counts[-1]))
    assert at == len(data)
    return runs


# --- compiling ------------------------------------------------------------------------------


def _compile(source: Path, only: str, flags: tuple[str, ...]) -> Path:
    units = []
    for unit in sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cpp")]):
        relative = unit.relative_to(CSRC)
        if relative.name != "binding.cpp":
            units.append((source if relative.match(only) else CSRC) / relative)
    units += [HERE / "simt.cpp", HERE / "main.cpp"]
    # Of inline functions with one name the linker keeps the first: the mutated.
    units.sort(key=lambda unit: not unit.is_relative_to(source))

    def compile_unit(unit: Path) -> Path:
        folder = source if unit.is_relative_to(source) else CSRC
        return _object(unit, flags, (HERE / "include", folder))

    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, units))
    program = CACHE / f"emulator-{_digest(*(o.name for o in objects), *flags)}"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            linked = Path(scratch) / "program"
            _call([*flags, *map(str, objects), "-o", str(linked)])
            linked.replace(program)
    return program


def _object(unit: Path, flags: tuple[str, ...], includes: tuple[Path, ...]) -> Path:
    """The unit's object file, under a name that holds a hash of all it is made from."""
    texts = {path.name: path.read_text() for path in sorted(_closure(unit, includes))}
    name = _digest(*flags, _compiler_version(), *texts.keys(), *texts.values())
    target = CACHE / f"{unit.stem}-{name}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / "unit.o"
            search = [part for folder in includes for part in ("-I", str(folder))]
            _call([*flags, *search, "-x", "c++", "-c", str(unit), "-o", str(made)])
            made.replace(target)
    return target


def _closure(unit: Path, includes: tuple[Path, ...]) -> set[Path]:
    """A source and every header of ours that it includes, directly or not."""
    found, todo = {unit}, [unit]
    while todo:
        for name in re.findall(r'^#include [<"]([^>"]+)[>"]', todo.pop().read_text(), re.M):
            for folder in includes:
                header = folder / name
                if header.is_file() and header not in found:
                    found.add(header)
                    todo.append(header)
    return found


def _call(arguments: list[str]) -> None:
    program = compiler()
    assert program is not None, "no C++ compiler"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EmulatorError(f"{' '.join(arguments)}\n{done.stderr}")


@functools.lru_cache(maxsize=1)
def _compiler_version() -> str:
    return subprocess.run(
        [str(compiler()), "--version"], capture_output=True, text=True, check=True
    ).stdout


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
