"""The suite's own fixtures do what the other tests rely on."""

from __future__ import annotations

import warnings

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fresh_allocations_are_nan(dtype: torch.dtype) -> None:
    x = torch.ones(3, 5, dtype=dtype)
    for fresh in (
        torch.empty(3, 5, dtype=dtype),
        torch.empty_like(x),
        x.new_empty(7),
        torch.empty_strided((3, 5), (1, 3), dtype=dtype),
    ):
        assert fresh.isnan().all()


@pytest.mark.timing
def test_a_timing_test_runs_on_plain_allocations() -> None:
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="planted"):
        warnings.warn("planted", UserWarning, stacklevel=1)


@pytest.mark.gpu
def test_gpu_tests_run_only_where_a_gpu_is() -> None:
    assert torch.ones(3, device="cuda").sum().item() == 3
