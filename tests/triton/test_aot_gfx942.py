"""Compiled for gfx942 (MI300): all configs, products, padded and odd rows. See ``test_aot.py``."""

from __future__ import annotations

import pytest

from tests.triton.aot_cases import (
    test_every_config,
    test_every_product_config,
    test_other_forms,
    test_other_forms_unaligned,
    test_padded_rows,
    test_parts_pass_through_memory,
    test_unaligned_strides,
)

__all__ = [
    "test_every_config",
    "test_every_product_config",
    "test_other_forms",
    "test_other_forms_unaligned",
    "test_padded_rows",
    "test_parts_pass_through_memory",
    "test_unaligned_strides",
]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("architecture", ["gfx942"])]
