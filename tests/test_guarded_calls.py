"""A guard's step makes as many Python calls for many weights as for few, and not many."""

from __future__ import annotations

import pytest

from bench import guarded_calls


@pytest.mark.parametrize("case", guarded_calls.MOST)
def test_a_guarded_step_makes_few_python_calls_and_none_a_weight(case):
    few, many = (guarded_calls.calls_of_a_step(case, count) for count in (5, guarded_calls.WEIGHTS))
    # A collection or an address may make a few more: fewer than there are more weights.
    assert abs(len(many) - len(few)) < guarded_calls.WEIGHTS - 5
    bare = guarded_calls.calls_of_a_step("bare")
    assert len(bare) < len(many) <= guarded_calls.MOST[case]
    ours = [file for file in many if "/osf_torch/" in file]
    assert 0 < len(ours) <= (60 if case == "projecting" else 120)


def test_calls_are_counted():
    def inner():
        return sorted(i for i in range(3))

    def outer():
        for _ in range(5):
            inner()

    files = guarded_calls.python_calls(outer)
    assert len(files) >= 6
    assert set(files) == {__file__}
