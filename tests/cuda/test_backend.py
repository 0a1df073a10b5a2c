"""The host side of the CUDA backend: records, refusals, and what it says where it cannot run."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from osf_kernels import BackendUnavailableError
from osf_kernels.backends import cuda
from osf_kernels.backends.cuda import factorizations
from osf_kernels.backends.jobs import Coefficients, Job, Update
from osf_kernels.backends.operands import Arena, Operand, Placed


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the extension had not been built."""
    find = importlib.import_module

    def missing(name: str, package: str | None = None) -> object:
        if name == "osf_kernels._cuda":
            raise ModuleNotFoundError(name)
        return find(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    cuda._load.cache_clear()
    yield
    cuda._load.cache_clear()


@pytest.mark.usefixtures("absent")
def test_without_the_extension_the_reason_is_kept() -> None:
    reason = cuda.unavailable_reason()
    assert reason is not None
    assert "was not built" in reason
    assert cuda.build_info() is None
    x = torch.randn(4, 3)
    with pytest.raises(BackendUnavailableError, match="was not built"):
        cuda.update([Update(x, x, None, None, None, None, 1.0, 0.0)])
    with pytest.raises(BackendUnavailableError, match='backend "cuda" is not available'):
        cuda.coefficients([Coefficients(x, None, None, None, None)])


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize(
    ("cuda_of_torch", "why"),
    [
        (None, f"not built: torch {torch.__version__} has no CUDA"),
        ("13.0", "OSF_CUDA=1 pip install"),
    ],
)
def test_why_it_was_not_built_turns_on_torch(
    monkeypatch: pytest.MonkeyPatch, cuda_of_torch: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda_of_torch)
    assert why in str(cuda.unavailable_reason())


def test_an_extension_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ImportError("undefined symbol: nothing")

    monkeypatch.setattr(importlib, "import_module", broken)
    cuda._load.cache_clear()
    try:
        assert "cannot be loaded: ImportError: undefined symbol" in str(cuda.unavailable_reason())
    finally:
        cuda._load.cache_clear()


def test_build_info_of_a_built_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(nvcc_version="13.0", cuda_archs="8.0 9.0")
    monkeypatch.setattr(cuda, "_load", lambda: built)
    assert cuda.build_info() == {"nvcc_version": "13.0", "architectures": ["8.0", "9.0"]}


def test_where_there_is_no_device_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", lambda: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable_reason() == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda.unavailable_reason(torch.device("cpu")) == "it runs on CUDA devices, not on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = cuda.unavailable_reason(torch.device("cuda:1"))
    assert reason == "needs compute capability 8.0 or later, cuda:1 has 7.5"


@pytest.mark.parametrize("freed", [True, False])
def test_no_room_for_the_counters_empties_torchs_cache_once(
    monkeypatch: pytest.MonkeyPatch, freed: bool
) -> None:
    done: list[str] = []

    def coefficients(*_: object) -> None:
        done.append("call")
        if not (freed and "empty" in done):
            raise MemoryError("osf_kernels: cudaMalloc failed: out of memory")

    extension = SimpleNamespace(
        coefficients=coefficients, coefficients_workspace_bytes=lambda *_: 8
    )
    monkeypatch.setattr(cuda, "_load", lambda: extension)
    monkeypatch.setattr(cuda, "_index", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    x = torch.zeros(4, 3)
    job = Coefficients(x, None, torch.zeros(3, 2), None, torch.zeros(4, 2))
    with nullcontext() if freed else pytest.raises(MemoryError, match="cudaMalloc failed"):
        cuda.coefficients([job])
    assert done == ["call", "empty", "call"]


def test_a_program_hands_over_the_records_of_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a call over tensors there would pack, whatever addresses a call brings."""
    handed: list[bytes] = []
    extension = SimpleNamespace(
        coefficients=lambda records, *_: handed.append(records),
        update=lambda records, *_: handed.append(records),
        coefficients_workspace_bytes=lambda records, *_: len(records),
    )
    monkeypatch.setattr(cuda, "_load", lambda: extension)
    monkeypatch.setattr(cuda, "_index", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    device = torch.device("cpu")
    V, arena = torch.randn(12, 3), Arena(device)
    batch, x = (
        Operand.like(torch.empty(s)[..., 1:], i + 1) for i, s in enumerate(((2, 6, 13), (6, 13)))
    )
    B = arena.new(6, 3, torch.float32), arena.new(6, 3, torch.float32)
    stages: list[list[Job]] = [
        [
            Coefficients(batch[(1,)], None, V, None, B[0]),
            Coefficients(x, None, V, None, B[1]),
        ],
        [Update(x, x, None, None, B[1], V.mT, -1.0, 1.0)],
        [Update(x.mT, batch[(0,)].mT, None, None, None, None, 1.0, -1.0, x.mT)],
    ]
    executable = cuda.Executable(stages, device)
    assert executable.parts_bytes == 2 * 27 * 8
    for addresses in ([1 << 20, 1 << 40, (1 << 62) + 16], [1 << 21, 16, 32]) * 2:

        def address(t: Tensor | Operand, at: list[int] = addresses) -> int:
            place = t.data_ptr()
            return at[place.argument] + place if isinstance(place, Placed) else place

        handed.clear()
        executable.run(addresses)
        assert handed == [cuda.pack(stage, address) for stage in stages]


def test_a_record_holds_sizes_addresses_strides_and_dtypes() -> None:
    x = torch.empty(5, 7, dtype=torch.bfloat16)
    V = torch.empty(3, 7, dtype=torch.bfloat16).mT
    B = torch.empty(5, 3)
    (record,) = struct.iter_unpack(
        "<27q", cuda.pack([Coefficients(x, None, V, None, B)], Tensor.data_ptr)
    )
    assert record[:4] == (5, 7, 0, 3)
    assert record[4:8] == (x.data_ptr(), 7, 1, 1)
    assert record[8:12] == (0, 0, 0, 0)
    assert record[12:16] == (V.data_ptr(), 1, 7, 1)
    assert record[20:24] == (B.data_ptr(), 3, 1, 3)
    assert record[24:] == (0, 0, 1)

    update = Update(x, x, None, None, B, V.mT, -1.0, 1.0)
    (record,) = struct.iter_unpack("<32q2d", cuda.pack([update], Tensor.data_ptr))
    assert record[:4] == (5, 7, 0, 3)
    assert record[4:8] == record[8:12] == (x.data_ptr(), 7, 1, 1)
    assert record[28:32] == (V.data_ptr(), 7, 1, 1)
    assert record[32:] == (-1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32])
def test_a_dtype_the_kernels_lack_is_refused(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 3, dtype=dtype)
    with pytest.raises(
        TypeError, match=r'x to be bfloat16, float16 or float32 with backend "cuda"'
    ):
        cuda.pack([Coefficients(x, None, None, None, None)], Tensor.data_ptr)
    with pytest.raises(TypeError, match=r"expected out to be .*; other dtypes run on"):
        cuda.pack([Update(x, x, None, None, None, None, 1.0, 0.0)], Tensor.data_ptr)
    y = torch.zeros(4, 3)
    with pytest.raises(TypeError, match="expected S to be float32"):
        cuda.pack([Coefficients(y, y, y, y, y, x[0])], Tensor.data_ptr)


def test_a_record_of_a_factorization() -> None:
    G = torch.empty(4, 6, 6).mT
    cholesky = factorizations.cholesky_job(G)
    (record,) = struct.iter_unpack("<8q", cholesky.pack(Tensor.data_ptr))
    assert record[:6] == (4, 6, G.data_ptr(), 36, 1, 6)
    assert record[6:] == (cholesky.inverse.data_ptr(), cholesky.info.data_ptr())
    assert cholesky.inverse.shape == (4, 6, 6)

    M = torch.empty(4, 8, 6)
    jacobi = factorizations.jacobi_job(M)
    (record,) = struct.iter_unpack("<11q", jacobi.pack(Tensor.data_ptr))
    assert record[:7] == (4, 8, 6, M.data_ptr(), 48, 6, 1)
    assert record[7:] == tuple(x.data_ptr() for x in jacobi[1:])
    assert [tuple(x.shape) for x in jacobi[1:]] == [(4, 6, 8), (4, 6), (4, 6, 6), (4,)]


@pytest.mark.parametrize("call", [cuda.cholesky_inverse, cuda.jacobi_svd])
def test_what_is_no_batch_of_float32_matrices_on_a_device_is_refused(
    call: Callable[[Tensor], object],
) -> None:
    op = call.__name__
    with pytest.raises(TypeError, match=rf"osf_kernels\.{op}: expected . to be a torch.Tensor"):
        call([[1.0]])  # type: ignore[arg-type]
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=rf"{op}: expected . to be float32, .*; pass .\.float"):
            call(torch.zeros(1, 3, 3, dtype=dtype))
    with pytest.raises(ValueError, match=r"a batch .*, got \(3, 3\); pass .\[None\] for a single"):
        call(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"a batch .*, got \(1, 1, 3, 3\)$"):
        call(torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match=rf"{op}: expected . to be on a CUDA device, got cpu"):
        call(torch.zeros(1, 3, 3))


def test_matrices_of_a_wrong_shape_or_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match=r"G to be \(b, l, l\), got \(1, 3, 4\)"):
        cuda.cholesky_inverse(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"M to be \(b, p, l\) with p >= l, got .*; pass M.mT"):
        cuda.jacobi_svd(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"l <= 8, which .* memory of cpu, .*linalg.cholesky_ex"):
        factorizations.check_square_size(torch.zeros(1, 9, 9), 8)
    with pytest.raises(ValueError, match=r"l <= 8 for p=10, .*got \(1, 10, 9\); use torch.linalg"):
        factorizations.check_columns(torch.zeros(1, 10, 9), 8)
    factorizations.check_square_size(torch.zeros(1, 8, 8), 8)
    factorizations.check_columns(torch.zeros(1, 10, 8), 8)


def test_the_largest_sizes_are_asked_of_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    extension = SimpleNamespace(
        largest_cholesky=lambda device: asked.append((device,)) or 340,
        largest_jacobi=lambda device, rows: asked.append((device, rows)) or 240,
    )
    monkeypatch.setattr(cuda, "_load", lambda: extension)
    device = torch.device("cuda:1")
    assert cuda.largest_cholesky(device) == 340
    assert cuda.largest_jacobi(device) == 240
    assert cuda.largest_jacobi(device, square=False, rows=1000) == 240
    assert asked == [(1,), (1, 0), (1, 1000)]
    with pytest.raises(ValueError, match="rows to be a positive number with square=False, got Non"):
        cuda.largest_jacobi(device, square=False)
    for largest in (cuda.largest_cholesky, cuda.largest_jacobi):
        with pytest.raises(ValueError, match="device to be a CUDA device, got cpu"):
            largest(torch.device("cpu"))
