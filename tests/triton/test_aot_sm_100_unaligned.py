"""Compiled for sm_100 (B200): odd widths, strides. See ``test_aot.py``."""

from __future__ import annotations

import pytest

from tests.triton.aot_cases import test_other_forms_unaligned, test_unaligned_strides

__all__ = ["test_other_forms_unaligned", "test_unaligned_strides"]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("architecture", ["sm_100"])]
