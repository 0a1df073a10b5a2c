"""Compiled for sm_100 (B200): every aligned config, products. See ``test_aot.py``."""

from __future__ import annotations

import pytest

from tests.triton.aot_cases import (
    test_every_config,
    test_every_product_config,
    test_other_forms,
    test_parts_pass_through_memory,
)

__all__ = [
    "test_every_config",
    "test_every_product_config",
    "test_other_forms",
    "test_parts_pass_through_memory",
]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("architecture", ["sm_100"])]
