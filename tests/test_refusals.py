"""Refusals and warnings with fields: callers read these, and never the text."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from osf_kernels import ConvergenceWarning, Refusal, orthonormalize, truncated_svd
from osf_kernels.errors import TypeRefusal, ValueRefusal, describe
from tests.triplets import draw

FIELDS = ("op", "argument", "expected", "got", "remedy", "index", "each")


def fields(refusal: Refusal) -> tuple[object, ...]:
    return tuple(getattr(refusal, name) for name in FIELDS)


def named(argument: str, index: object) -> str:
    return f"{argument.removesuffix('A')}'layer {index}'"


def test_the_text_is_what_describe_gives() -> None:
    parts = ("project_", "U", "(m, r) with m=8", (4, 2), "pass U.mT")
    assert str(ValueRefusal.of(*parts)) == describe(*parts)
    entry = ValueRefusal.of(*parts).at(3)
    assert entry.index == 3
    assert str(entry) == describe("project_", "U[3]", *parts[2:])
    assert str(entry.at((0, 2))) == describe("project_", "U[0, 2]", *parts[2:])


@pytest.mark.parametrize("kind", [ValueRefusal, TypeRefusal])
def test_a_refusal_is_pickled_copied_and_made_of_a_text_like_any_exception(
    kind: type[Refusal],
) -> None:
    refusal = kind.of("op", "A", "finite", "NaN", "mend it", index=1, each={1: "has 2 of 3"})
    assert isinstance(refusal, ValueError if kind is ValueRefusal else TypeError)
    for other in (pickle.loads(pickle.dumps(refusal)), copy.copy(refusal)):
        assert type(other) is kind
        assert str(other) == str(refusal)
        assert fields(other) == fields(refusal)
    plain = type(refusal)(f"prefix: {refusal}")
    assert str(plain) == f"prefix: {refusal}"
    assert plain.argument == ""


def test_a_caller_puts_in_its_own_names() -> None:
    refusal = ValueRefusal.of("truncated_svd", "rank of A", "at most 4", 5, "lower it", index=2)
    mine = refusal.renamed(named, op="osf_torch.refresh", remedy="pass lower ranks")
    assert type(mine) is ValueRefusal
    assert str(mine) == (
        "osf_torch.refresh: expected rank of 'layer 2' to be at most 4, got 5; pass lower ranks"
    )
    several = ValueRefusal.of("svd", "A", "finite", "NaN", each={0: "has 1", 3: "has 2"})
    assert (
        str(several) == "osf_kernels.svd: expected A to be finite, got NaN: A[0] has 1, A[3] has 2"
    )
    assert str(several.renamed(lambda a, i: a if i is None else named(a, i))) == (
        "osf_kernels.svd: expected A to be finite, got NaN: 'layer 0' has 1, 'layer 3' has 2"
    )


def test_many_entries_at_fault_are_counted() -> None:
    refusal = ValueRefusal.of("svd", "A", "finite", "NaN", each=dict.fromkeys(range(20), "has 1"))
    assert str(refusal).endswith("A[7] has 1 and 12 more")
    assert len(refusal.each) == 20


def test_truncated_svd_names_the_entry_in_a_field() -> None:
    A = torch.ones(6, 4)
    with pytest.raises(Refusal) as caught:
        truncated_svd([A, A], [2, 5])
    assert (caught.value.op, caught.value.argument) == ("truncated_svd", "rank of A")
    assert (caught.value.index, caught.value.got) == (1, "5")
    with pytest.raises(Refusal) as caught:
        truncated_svd(torch.stack([A, A * torch.nan])[None], 2)
    assert caught.value.each == {(0, 1): "has 24 of 24"}


def test_a_missed_tolerance_is_a_warning_with_fields() -> None:
    easy, hard = draw(120, 120, "gap")[0], draw(120, 120, "flat")[0]
    with pytest.warns(ConvergenceWarning, match=r"A\[1\] has") as record:
        truncated_svd([easy, hard], 30, method="randomized", niter=3, tol=1e-5)
    (warning,) = (one.message for one in record)
    assert isinstance(warning, ConvergenceWarning)
    assert warning.tol == 1e-5
    ((index, missed),) = warning.missed.items()
    assert (index, missed.method, missed.iterations) == (1, "randomized", 3)
    assert missed.residual > 1e-5
    assert "raise niter" in warning.remedy
    other = pickle.loads(pickle.dumps(warning))
    assert (str(other), other.missed) == (str(warning), warning.missed)
    mine = warning.renamed(named, op="osf_torch.refresh", remedy="wait")
    assert str(mine).startswith("osf_torch.refresh: residuals above tol=1e-05: 'layer 1' has")
    assert str(mine).endswith("; wait")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        with pytest.raises(ConvergenceWarning):
            truncated_svd(hard, 30, method="randomized", niter=3, tol=1e-5)


@pytest.mark.slow
def test_a_refusal_names_a_shape_of_a_traced_tensor() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueRefusal, match=r"m=3, r=5; pass Y\.mT"):
        orthonormalize(torch.empty(3, 5))

    @torch.compile(backend="eager", dynamic=True)
    def wide(Y: torch.Tensor) -> torch.Tensor:
        return orthonormalize(Y)

    with pytest.raises(Exception, match="m ≥ r"):
        wide(torch.randn(3, 5))
