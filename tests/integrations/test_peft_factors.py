"""integrations.peft: factors and one gradient against formulas in float64; PEFT isn't imported
but where its own factors are what counts."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osf_kernels.testing import assert_error_within, orthonormality_ratio, project_eager, svd_ratio
from osf_torch.integrations import peft as osf_peft
from tests.integrations.peft_layers import SIDES, drawn, formula, with_gradients

SHAPES = [(48, 48, 24), (60, 36, 20), (36, 60, 27), (90, 24, 12), (24, 90, 12)]


def sides(d: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    U = torch.cat([d["U_high"], d["U_low"].detach()], 1)
    S = torch.cat([d["S_high"], d["S_low"].detach()])
    return U, S, torch.cat([d["V_high"], d["V_low"].detach()]).mT


def rebuilt(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    return (U.double() * S.double()) @ V.double().mT


@pytest.mark.parametrize("kind", ["flat", "steep", "deficient", "outlier"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_decomposition_meets_lapacks_ratios(m, n, k, kind):
    W = drawn(m, n, kind, torch.float32)
    before = W.clone()
    d = osf_peft.decompose_weight_matrix(W, k)
    assert torch.equal(W, before)
    assert list(d) == ["U_high", "S_high", "V_high", "U_low", "S_low", "V_low", "rank_high"]
    assert d["rank_high"] == k
    U, S, V = sides(d)
    assert orthonormality_ratio(U) < 30
    assert orthonormality_ratio(V) < 30
    assert svd_ratio(W, U, S, V) < 30
    truth = torch.linalg.svdvals(W.double())
    assert (S - truth).abs().max() < 10 * torch.finfo(torch.float32).eps * truth[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decomposition_keeps_the_dtype(dtype):
    W = drawn(40, 30, "flat", dtype)
    d = osf_peft.decompose_weight_matrix(W, 12)
    for name, factor in d.items():
        if name != "rank_high":
            assert factor.dtype == dtype
            assert factor.is_contiguous()
            assert factor.untyped_storage().nbytes() == factor.nbytes
            assert isinstance(factor, nn.Parameter) == name.endswith("low")
    error = (rebuilt(*sides(d)) - W.double()).norm() / W.double().norm()
    assert error < max(4 * torch.finfo(dtype).eps, 20 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("top_k", [0, 20, 33])
def test_one_part_may_be_empty(top_k):
    W = drawn(20, 31, "flat", torch.float32)
    d = osf_peft.decompose_weight_matrix(W, top_k)
    assert d["rank_high"] == min(top_k, 20)
    assert d["U_high"].shape == (20, min(top_k, 20))
    assert d["V_low"].shape == (20 - min(top_k, 20), 31)
    assert (rebuilt(*sides(d)) - W.double()).norm() < 1e-5 * W.norm()


def test_a_zero_weight_has_orthonormal_factors():
    U, S, V = sides(osf_peft.decompose_weight_matrix(torch.zeros(24, 24), 12))
    assert not S.any()
    assert orthonormality_ratio(U) < 30
    assert orthonormality_ratio(V) < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    ("m", "n", "k", "kind"),
    [(*shape, kind) for shape in SHAPES for kind in ("flat", "deficient", "equal")]
    + [(1040, 1024, 512, "equal")],
)
def test_factors_are_pefts_to_the_bit(m, n, k, kind, dtype):
    """An adapter is saved without what its factors began as. Of equal singular values every
    rotation of the vectors is as right, and only the same one gives the adapter its meaning."""
    utils = importlib.import_module("peft.tuners.osf.utils")
    if kind == "equal":
        W = torch.linalg.qr(drawn(max(m, n), min(m, n), "flat", torch.float64))[0]
        W = (W if m >= n else W.mT).to(dtype)
    else:
        W = drawn(m, n, kind, torch.float64).to(dtype)
    theirs, ours = utils.decompose_weight_matrix(W, k), osf_peft.decompose_weight_matrix(W, k)
    assert list(ours) == list(theirs)
    for name, factor in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(factor)), name
        assert type(ours[name]) is type(factor)


def test_a_weight_that_is_not_finite_is_refused():
    W = drawn(20, 31, "flat", torch.float32)
    W[3, 4] = torch.nan
    with pytest.raises(ValueError, match="decompose_weight_matrix: expected weight to be finite"):
        osf_peft.decompose_weight_matrix(W, 4)


def test_a_meta_weight_has_shapes_alone():
    d = osf_peft.decompose_weight_matrix(torch.empty(8, 6, device="meta"), 2)
    assert {name: tuple(d[name].shape) for name in ("U_high", "U_low", "S_low", "V_low")} == {
        "U_high": (8, 2),
        "U_low": (8, 4),
        "S_low": (4,),
        "V_low": (4, 6),
    }
    assert d["U_low"].is_meta


# --- one gradient, without PEFT ---


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_project_gradient_is_the_formula(m, n, k):
    d = with_gradients(m, n, k)
    grads = {side: d[side].grad for side in SIDES}
    raw = {side: g.clone() for side, g in grads.items()}
    osf_peft.project_gradient_to_orthogonal_space(d)
    for side, g in raw.items():
        assert d[side].grad is grads[side], "in place"
        peer = (
            project_eager(g, d["U_high"], None)
            if side == "U_low"
            else project_eager(g, None, d["V_high"].mT)
        )
        assert_error_within(d[side].grad, formula(d, side, g), peer, scale=g)


def test_project_gradient_takes_what_there_is():
    d = with_gradients(20, 30, 8)
    raw = d["V_low"].grad.clone()
    d["U_low"].grad = None
    osf_peft.project_gradient_to_orthogonal_space(d)
    assert d["U_low"].grad is None
    assert not torch.equal(d["V_low"].grad, raw)
    d["V_low"].grad = None
    osf_peft.project_gradient_to_orthogonal_space(d)


def test_another_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.18.1")
    with pytest.raises(ImportError, match=r"expected peft >=0\.21,<0\.22 to be .*got 0\.18"):
        osf_peft.enable()
