"""osf_torch.input_subspaces of weights that modules multiply with in ways of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from osf_torch import input_subspaces
from tests.helpers import generator_for, randn
from tests.test_inputs import decaying, high, share


class Autoencoder(nn.Module):
    """Decodes by the transpose of what encodes."""

    def __init__(self) -> None:
        super().__init__()
        generator = generator_for("autoencoder")
        self.weight = nn.Parameter(randn(5, 8, dtype=torch.float64, generator=generator))

    def forward(self, x):
        return torch.tanh(x @ self.weight.mT) @ self.weight


def test_a_weight_that_is_read_by_both_sides_grows_both():
    model, x = nn.Sequential(Autoencoder()), decaying(3, 8, 0.5, "both")
    found = input_subspaces(model, [x], energy=0.98, filter="*.weight", progress=False)
    entry = found["0.weight"]
    hidden = torch.tanh(x @ model[0].weight.detach().mT)
    assert share(high(entry.V), x.mT) >= 0.98
    assert share(high(entry.U), hidden.mT) >= 0.98
    assert entry.V.columns.shape[1] < 3


def test_attention_holds_what_it_projects_on_the_way_out():
    """Whose layer attention multiplies with, and never calls."""
    model = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = decaying(5, 8, 0.6, "attention")[None]
    found = input_subspaces(
        model, [x], energy=0.9, progress=False, forward=lambda model, x: model(x, x, x)
    )
    assert share(high(found["in_proj_weight"].V), x[0].mT) >= 0.9
    with torch.no_grad():
        y = model(x, x, x)[0][0] - model.out_proj.bias
        read = torch.linalg.solve(model.out_proj.weight, y.mT)
    assert share(high(found["out_proj.weight"].V), read) >= 0.9 - 1e-9


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_tied_embedding_is_told_of_what_is_looked_up(is_tied, caplog):
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False))
    if is_tied:
        model[2].weight = model[0].weight
    names = ["1.weight", "0.weight" if is_tied else "2.weight"]
    found = input_subspaces(model, [torch.arange(5)], filter=names, progress=False)
    assert set(found) == set(names)
    assert ("0.weight is looked up by row too" in caplog.text) == is_tied
