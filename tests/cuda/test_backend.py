"""The host side of the CUDA backend: records, refusals, and what it says where it cannot run."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from osf_kernels import BackendUnavailableError
from osf_kernels.backends import cuda
from osf_kernels.backends.forms import Coefficients, Update


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


def test_a_record_holds_sizes_addresses_strides_and_dtypes() -> None:
    x = torch.empty(5, 7, dtype=torch.bfloat16)
    V = torch.empty(3, 7, dtype=torch.bfloat16).mT
    B = torch.empty(5, 3)
    (record,) = struct.iter_unpack(
        "<26q", cuda.pack([Coefficients(x, None, V, None, B)], Tensor.data_ptr)
    )
    assert record[:4] == (5, 7, 0, 3)
    assert record[4:8] == (x.data_ptr(), 7, 1, 1)
    assert record[8:12] == (0, 0, 0, 0)
    assert record[12:16] == (V.data_ptr(), 1, 7, 1)
    assert record[20:24] == (B.data_ptr(), 3, 1, 3)
    assert record[24:] == (0, 0)

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
