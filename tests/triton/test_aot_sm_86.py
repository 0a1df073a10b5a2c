"""Compiled for sm_86 (A10): every aligned config, products, copies. See ``test_aot.py``."""

from __future__ import annotations

import pytest

from tests.triton.aot_cases import (
    test_copies_are_under_way_while_an_update_multiplies,
    test_copies_are_under_way_while_sums_are_multiplied,
    test_copies_of_every_config,
    test_every_config,
    test_every_product_config,
    test_other_forms,
    test_parts_pass_through_memory,
    test_products_are_taken_once,
)

__all__ = [
    "test_copies_are_under_way_while_an_update_multiplies",
    "test_copies_are_under_way_while_sums_are_multiplied",
    "test_copies_of_every_config",
    "test_every_config",
    "test_every_product_config",
    "test_other_forms",
    "test_parts_pass_through_memory",
    "test_products_are_taken_once",
]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("architecture", ["sm_86"])]
