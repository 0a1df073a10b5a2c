"""Compiled for sm_100 (B200): padded rows. See ``test_aot.py``."""

from __future__ import annotations

import pytest

from tests.triton.aot_cases import test_padded_rows

__all__ = ["test_padded_rows"]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("architecture", ["sm_100"])]
