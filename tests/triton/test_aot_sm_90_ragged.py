"""Compiled for sm_90 (H100): padded rows, odd widths, strides. See ``test_aot.py``."""

from __future__ import annotations

import pytest

from tests.triton.aot_cases import (
    test_other_forms_unaligned,
    test_padded_rows,
    test_unaligned_strides,
)

__all__ = ["test_other_forms_unaligned", "test_padded_rows", "test_unaligned_strides"]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("architecture", ["sm_90"])]
