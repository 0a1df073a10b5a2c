"""Weights without some of their singular directions, and the classifier that judges them."""

from __future__ import annotations

import pytest
import torch

from bench import redundancy
from bench.continual_methods import linear_weights
from tests.small_continual import small_encoder, small_tasks


@pytest.mark.parametrize(("end", "share"), [("bottom", 0.5), ("top", 0.25), ("bottom", 0.0)])
def test_cut_zeroes_singular_directions(end: redundancy.End, share: float) -> None:
    encoder = small_encoder()
    found, energy = redundancy.cut(encoder, end, share)
    kept = whole = 0.0
    for name, weight in linear_weights(encoder).items():
        U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        zeroed = round(share * len(S))
        T = S.clone()
        T[len(S) - zeroed :] *= end == "top"
        T[:zeroed] *= end == "bottom"
        wanted = (U * T) @ Vh
        kept, whole = kept + float(T.square().sum()), whole + float(S.square().sum())
        got = linear_weights(found)[name].detach().double()
        assert (got - wanted).norm() <= 1e-5 * weight.norm()
    assert energy == pytest.approx(kept / whole, rel=1e-5)


def test_redundancy_of_nothing_zeroed_is_the_whole_model() -> None:
    rows = redundancy.measure(
        small_encoder(), small_tasks(2), (("bottom", 0.0), ("bottom", 0.5), ("top", 0.5))
    )
    assert rows[0].agreement == pytest.approx(1.0, abs=1e-6)
    assert rows[0].energy == 1.0
    assert rows[1].energy > 0.5 > rows[2].energy
    assert rows[1].agreement > rows[2].agreement
    text = redundancy.sentence(rows)
    assert f"{100 * rows[1].accuracy:.1f}%" in text
    assert redundancy.sentence(rows[:2]) == ""
    assert redundancy.table(rows).splitlines()[2].startswith("nothing")
    with pytest.raises(ValueError, match="share in"):
        redundancy.cut(small_encoder(), "top", 1.0)


def test_classifier_separates_what_is_separable() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(90) % 3
    features = 5 * torch.eye(3)[labels] + torch.randn(90, 3, generator=generator)
    assert redundancy.accuracy(features, labels, redundancy.classifier(features, labels, 3)) > 0.9
