"""Layers whose weights can't be read: C stands beside what they return."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osf_torch import confine
from tests.small_confine import adamw, batches, columns, drawn, relative, train
from tests.test_confine_refusals import Coded

LIMIT = 3e-6


class CodedLinear(nn.Linear):
    """Codes times a scale, which its own forward pass reads."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        codes = torch.randint(-8, 8, (m, n), dtype=torch.int8)
        self.weight = nn.Parameter(Coded(codes), requires_grad=False)

    def forward(self, x):
        return F.linear(x, 0.05 * self.weight.codes.to(x.dtype), self.bias)


class Packed(nn.Linear):
    """Two codes of four bits in a byte, a plain tensor of integers."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        codes = torch.randint(0, 255, (m * n // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        codes = torch.cat([self.weight % 16, self.weight // 16]).view(self.out_features, -1)
        return F.linear(x, 0.05 * (codes.to(x.dtype) - 8), self.bias)


@pytest.mark.parametrize("kind", [CodedLinear, Packed], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{"update": "beside"}, {"rank": 3}], ids=str)
def test_training_beside_a_quantized_layer(kind, options):
    model = nn.Sequential(kind(20, 16), nn.Tanh(), nn.Linear(16, 6))
    subspaces = {
        "0.weight": drawn(16, 20, 0.5, "UV", "high"),
        "2.weight": drawn(6, 16, 0.5, "UV", "high"),
    }
    (x,) = batches(1, "opaque")
    before = model[0](x)
    held = model[0]._parameters["weight"]
    confined = confine(model, subspaces, **options)
    assert torch.equal(model[0](x), before)
    train(model, batches(20, "opaque"), adamw(confined.parameters()))
    place = confined.places[0]
    U, V, C = columns(place.spec.left), columns(place.spec.right), place.block.double()
    assert relative(model[0](x), before.double() + x.double() @ (U @ C @ V.mT).mT) <= LIMIT
    assert relative(model[0](x), before) > 1e-3
    assert model[0]._parameters["weight"] is held
    assert held._version == 0
    # The gradient is that of the sum written out.
    model.zero_grad()
    model[0](x).sin().sum().backward()
    blocks = [t.detach().double().requires_grad_() for t in place.trained()]
    C = blocks[0] if len(blocks) == 1 else blocks[0] @ blocks[1]
    with torch.no_grad():
        constant = model[0](x).double() - x.double() @ (U @ place.block.double() @ V.mT).mT
    (constant + x.double() @ (U @ C @ V.mT).mT).sin().sum().backward()
    for ours, theirs in zip(place.trained(), blocks, strict=True):
        assert relative(ours.grad, theirs.grad) <= 1e-4
    assert list(confined.drift()) == ["2.weight"], "of what can be read"
    assert "0.weight" in confined.summary()
    with pytest.raises(RuntimeError, match=r"can be written to, got quantized ones, 0\.weight"):
        confined.release()
    assert relative(model[0](x), before) > 1e-3, "it goes on confined"
    assert len(confined.parameters()) == len(place.trained()) * 2


def test_a_quantized_layer_s_state_has_its_block_by_name():
    """What nothing can be added to keeps C beside it, in states too."""
    torch.manual_seed(1)
    model = nn.Sequential(Packed(20, 16))
    subspaces = {"0.weight": drawn(16, 20, 0.5, "UV", "high")}
    confined = confine(model, subspaces, update="beside")
    train(
        model,
        batches(5, "opaque"),
        adamw(confined.parameters()),
        lambda one, x: one(x).square().mean(),
    )
    assert list(model.state_dict()) == ["0.weight", "0.bias", "0.weight_free"]
    file = io.BytesIO()
    torch.save((model.state_dict(), confined.state_dict()), file)
    file.seek(0)
    state, run = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    again = nn.Sequential(Packed(20, 16))
    confine(again, run)
    again.load_state_dict(state)
    (x,) = batches(1, "opaque")
    assert torch.equal(again(x), model(x))
    fresh = nn.Sequential(Packed(20, 16))
    confine(fresh, subspaces, update="beside")
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
