"""osf_torch.input_subspaces and layer_importance of convolutions, by the patches that they read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osf_kernels import project
from osf_torch import input_subspaces, layer_importance, protect, refresh
from osf_torch.patches import Patches
from tests.helpers import generator_for, randn
from tests.small_convolutions import channels_last, images, matrix
from tests.small_guard import drawn
from tests.test_inputs import high, share

# Each reads fewer patches than its rows have columns, so that something is left to train.
KINDS = {
    "1d": lambda: nn.Conv1d(6, 5, 5),
    "1d dilated": lambda: nn.Conv1d(8, 5, 3, stride=2, dilation=2, padding=1),
    "1d same": lambda: nn.Conv1d(8, 5, 4, padding="same"),
    "1d grouped": lambda: nn.Conv1d(12, 8, 4, groups=2, stride=2),
    "2d": lambda: nn.Conv2d(4, 6, 3, stride=2),
    "2d padded": lambda: nn.Conv2d(6, 4, (3, 2), stride=(3, 4), padding=(1, 2)),
    "2d dilated": lambda: nn.Conv2d(4, 6, (2, 3), stride=3, dilation=(3, 2)),
    "2d grouped": lambda: nn.Conv2d(12, 6, 3, groups=3, stride=4),
    "2d depthwise": lambda: nn.Conv2d(2, 4, 5, groups=2, stride=2),
    "2d circular": lambda: nn.Conv2d(4, 6, 3, stride=4, padding=1, padding_mode="circular"),
    "2d reflecting": lambda: nn.Conv2d(4, 6, 3, stride=4, padding=1, padding_mode="reflect"),
    "2d of one place": lambda: nn.Conv2d(60, 6, 1, stride=2),
    "3d": lambda: nn.Conv3d(3, 7, (3, 2, 3), stride=4, padding=(1, 0, 1)),
    "3d dilated": lambda: nn.Conv3d(2, 7, 3, stride=4, dilation=(1, 2, 3)),
}
TRANSPOSED = {
    "1d": lambda: nn.ConvTranspose1d(16, 4, 3, stride=2, padding=1, output_padding=1),
    "2d": lambda: nn.ConvTranspose2d(60, 4, 3, stride=2, dilation=2),
    "2d grouped": lambda: nn.ConvTranspose2d(108, 6, 2, groups=2),
    "3d": lambda: nn.ConvTranspose3d(260, 2, 2),
}
SIDES = {"1d": 7, "1d dilated": 9, "3d": 6, "3d dilated": 7}
LAID = {"contiguous": torch.Tensor.contiguous, "channels last": channels_last}


def one(layer, *key):
    return drawn(nn.Sequential(layer), "reading", *key).double()


def moved(model, change):
    """A copy whose weight is changed by a matrix."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight += change.view(other[0].weight.shape)
    return other


def patches_of(layer, x):
    """(n, tokens) of a 2-D convolution by torch's own unfold, those of one group after another."""
    pad = [p for p in reversed(layer.padding) for _ in "ab"]
    return torch.cat(
        [
            F.unfold(F.pad(part, pad), layer.kernel_size, layer.dilation, 0, layer.stride)
            .mT.flatten(0, 1)
            .mT
            for part in x.chunk(layer.groups, 1)
        ],
        1,
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("kind", [*KINDS, *(f"transposed {kind}" for kind in TRANSPOSED)])
def test_an_update_off_what_is_read_leaves_the_outputs(kind, laid, inference):
    """To rounding, whatever the update is; of a transposed one it is U that holds the inputs."""
    known = TRANSPOSED if kind.startswith("transposed") else KINDS
    model = one(known[kind.removeprefix("transposed ")](), kind)
    with torch.no_grad():
        model[0].weight.data = LAID[laid](model[0].weight)
    gen = generator_for("reading", kind)
    side = SIDES.get(kind, 4 if known is TRANSPOSED else 7)
    x = LAID[laid](images(model[0], 2, gen, side))

    def forward(model, x):
        with torch.inference_mode(inference):
            return model(x)

    found = input_subspaces(
        model, [x], energy=1.0, filter="*.weight", progress=False, forward=forward
    )["0.weight"]
    basis, other = (found.U, found.V) if known is TRANSPOSED else (found.V, found.U)
    W = matrix(model[0].weight)
    assert other is None
    assert basis.columns.shape[0] == W.shape[0 if known is TRANSPOSED else 1]
    assert 0 < basis.columns.shape[1] < basis.columns.shape[0]
    change = randn(*W.shape, dtype=torch.float64, generator=gen)
    kept = project(change.clone(), found.U, found.V)
    assert kept.norm() > 0.1 * change.norm()
    with torch.no_grad():
        y, free, held = (model(x), moved(model, change)(x), moved(model, kept)(x))
    assert (held - y).norm() < 1e-12 * (free - y).norm()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in ("2d", "2d padded")])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_it_is_the_narrowest_that_holds_the_energy_of_the_patches(kind, energy):
    model = one(KINDS[kind](), kind)
    x = images(model[0], 3, generator_for("narrow", kind))
    X = patches_of(model[0], x)
    found = input_subspaces(model, x.split(2), energy=energy, filter="*.weight", progress=False)
    V = high(found["0.weight"].V)
    S = torch.linalg.svdvals(X).square()
    shares = S.cumsum(0) / S.sum()
    width = int((shares < energy - 1e-12).sum()) + 1
    assert V.shape[1] == width
    assert share(V, X) == pytest.approx(float(shares[width - 1]), abs=1e-9)


def test_a_group_reads_its_own_channels_and_the_basis_holds_them_all():
    model = one(KINDS["2d grouped"](), "groups")
    x = images(model[0], 2, generator_for("groups"))
    found = input_subspaces(model, [x], energy=0.9, filter="*.weight", progress=False)
    X = patches_of(model[0], x)
    assert X.shape == (36, 3 * 2 * 4)
    assert share(high(found["0.weight"].V), X) >= 0.9 - 1e-12


def test_what_was_protected_is_kept_and_grown():
    model = one(KINDS["2d"](), "grown")
    before = refresh(model, 3, filter="*.weight", progress=False)
    x = images(model[0], 1, generator_for("grown"))
    found = input_subspaces(
        model, [x], energy=0.99, previous=before, filter="*.weight", progress=False
    )["0.weight"]
    assert found.U is before["0.weight"].U or torch.equal(
        found.U.columns, before["0.weight"].U.columns
    )
    old, new = high(before["0.weight"].V), high(found.V)
    assert (old - new @ (new.mT @ old)).norm() < 1e-6
    assert new.shape[1] > old.shape[1]
    assert share(new, patches_of(model[0], x)) >= 0.99 - 1e-6


def test_drawn_patches_alone_are_laid_out(monkeypatch):
    """An image's patches are many times the image."""
    most = []
    laid = Patches._laid

    def counted(self, index):
        most.append(len(index))
        return laid(self, index)

    monkeypatch.setattr(Patches, "_laid", counted)
    model = one(nn.Conv2d(3, 4, 5), "drawn")
    x = images(model[0], 4, generator_for("drawn"), 40)
    options = {"energy": 1.0, "filter": "*.weight", "progress": False}
    found = input_subspaces(model, x.split(1), max_tokens=20, **options)
    assert max(most) == 20
    V = high(found["0.weight"].V)
    assert V.shape == (75, 20)
    again = input_subspaces(model, x.split(1), max_tokens=20, **options)
    assert torch.equal(V, high(again["0.weight"].V))
    assert share(V, patches_of(model[0], x)) > 0.2


class Crossing(nn.Module):
    """Uses a convolution's weight in ways of its own."""

    def __init__(self, way) -> None:
        super().__init__()
        self.inner, self.way = nn.Conv2d(4, 6, 3, stride=2), way

    def forward(self, x):
        return self.way(self.inner.weight, x)


def unfolded(x):
    return F.unfold(x, 3, stride=2).mT


WAYS = {
    "some rows": lambda W, x: F.conv2d(x, W[2:5], stride=2),
    "all of them in two": lambda W, x: [F.conv2d(x, part, stride=2) for part in W.split(3)],
    "its matrix": lambda W, x: F.linear(unfolded(x), W.flatten(1)),
    "its matrix, cast": lambda W, x: F.linear(unfolded(x).float(), W.float().flatten(1)),
    "cast": lambda W, x: F.conv2d(x.float(), W.float(), stride=2),
    "scaled": lambda W, x: F.conv2d(x, W * 0.5, stride=2),
    "with its channels last": lambda W, x: F.conv2d(
        x, W.contiguous(memory_format=torch.channels_last), stride=2
    ),
    "in three dimensions": lambda W, x: F.conv3d(x[:, :, None], W[:, :, None], stride=(1, 2, 2)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_is_followed_to_whatever_convolves_with_it(way):
    model = drawn(nn.Sequential(Crossing(WAYS[way])), "crossing").double()
    x = images(model[0].inner, 2, generator_for("crossing"))
    found = input_subspaces(model, [x], energy=1.0, filter="*.weight", progress=False)
    X = patches_of(model[0].inner, x)
    V = high(found["0.inner.weight"].V)
    assert V.shape[1] == torch.linalg.matrix_rank(X)
    assert share(V, X) > 1 - 1e-6


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (lambda W, x: F.conv2d(x, W[:, :, :2], stride=2), r"whole rows of '0\.inner\.weight'"),
        (lambda W, x: F.conv2d(x[:, :2], W[:, :2]), r"inputs of '0\.inner\.weight' to have n=36"),
        (lambda W, x: F.conv2d(x, W.transpose(2, 3)), "whole rows of .*got a part or a view"),
        (lambda W, x: F.conv2d(x, torch.tanh(W)), "none that reached 0.inner.weight"),
    ],
)
def test_parts_of_its_rows_are_refused_by_name(way, message):
    model = drawn(nn.Sequential(Crossing(way)), "parts").double()
    x = images(model[0].inner, 2, generator_for("parts"))
    with pytest.raises(ValueError, match=message):
        input_subspaces(model, [x], filter="*.weight", progress=False)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_layers_weight_may_be_convolved_with(transposed):
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(20, 30)

        def forward(self, x):
            W = self.inner.weight[..., None]
            return F.conv_transpose1d(x, W) if transposed else F.conv1d(x, W)

    model = drawn(nn.Sequential(Pointwise()), "pointwise").double()
    x = randn(
        2, 30 if transposed else 20, 3, dtype=torch.float64, generator=generator_for("pointwise")
    )
    found = input_subspaces(model, [x], energy=1.0, progress=False)["0.inner.weight"]
    basis = high(found.U if transposed else found.V)
    assert basis.shape[1] == 6
    assert share(basis, x.mT.flatten(0, 1).mT) > 1 - 1e-9


def test_autocast_reads_what_it_rounds():
    model = one(KINDS["2d"](), "autocast").float()
    x = images(model[0], 2, generator_for("autocast"))

    def forward(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            model(x)

    found = input_subspaces(
        model, [x], energy=0.999, filter="*.weight", progress=False, forward=forward
    )
    assert share(high(found["0.weight"].V), patches_of(model[0], x).double()) > 0.99


class Tokens(nn.Module):
    """Convolves over a batch's tokens."""

    def __init__(self, size) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 30)
        self.mix = nn.Conv1d(30, 4, size, padding="same")

    def forward(self, input_ids, attention_mask):
        return self.mix(self.table(input_ids).mT)


@pytest.mark.parametrize(("size", "left_out"), [(1, True), (3, False)])
def test_padding_is_left_out_where_places_are_tokens(size, left_out):
    """A wider patch around a real token has padding in it, which the output depends on."""
    model = drawn(Tokens(size), "tokens").double()
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    found = input_subspaces(
        model, [batch], energy=1.0, filter="mix.weight", leave_out="table.weight", progress=False
    )
    real = 7
    x = model.table(ids).detach().mT
    X = F.unfold(F.pad(x, (size // 2, size // 2))[:, :, None], (1, size)).mT.flatten(0, 1).mT
    kept = int(torch.linalg.matrix_rank(X)) if not left_out else real
    V = high(found["mix.weight"].V)
    assert V.shape[1] == kept
    assert share(V, X[:, (ids > 0).flatten()]) > 1 - 1e-9


@pytest.mark.parametrize("groups", [1, 2])
def test_importance_is_of_each_patch_and_its_outputs(groups):
    layers = (nn.Conv2d(4, 6, 3, groups=groups), nn.ConvTranspose2d(6, 4, 2, groups=groups))
    model = drawn(nn.Sequential(*layers), "importance", groups).double()
    x = images(model[0], 3, generator_for("importance", groups))
    found = layer_importance(model, x.split(2), per="weight", filter="*.weight", progress=False)
    cosines = []
    with torch.no_grad():
        y = model[0](x)
    parts = zip(
        patches_of(model[0], x).chunk(groups, 1), matrix(model[0].weight).chunk(groups), strict=True
    )
    cosines.append([(X, W @ X) for X, W in parts])
    pairs = zip(
        y.movedim(1, 0).flatten(1).chunk(groups), matrix(model[1].weight).chunk(groups), strict=True
    )
    cosines.append([(X, W.mT @ X) for X, W in pairs])
    means = []
    for of_layer in cosines:
        widths = [min(len(X), len(Y)) for X, Y in of_layer]
        each = [
            F.cosine_similarity(X[:width], Y[:width], dim=0)
            for (X, Y), width in zip(of_layer, widths, strict=True)
        ]
        means.append(max(0.0, float(torch.cat(each).mean())))
    mean = sum(means) / 2
    assert mean > 0
    assert list(found) == ["0.weight", "1.weight"]
    assert list(found.values()) == pytest.approx([m / mean for m in means], abs=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_inputs_name_the_convolution(value):
    model = one(KINDS["2d"](), "bad")
    x = images(model[0], 1, generator_for("bad"))
    x[0, 0, 2, 2] = value
    with pytest.raises(ValueError, match=r"NaN or Inf first in '0\.weight'"):
        input_subspaces(model, [x], filter="*.weight", progress=False)
    with pytest.raises(ValueError, match=r"NaN or Inf first in '0\.weight'"):
        layer_importance(model, [x], per="weight", filter="*.weight", progress=False)


class Network(nn.Module):
    """A small network whose outputs its matrices alone decide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 10, 3, stride=2, bias=False)
        self.second = nn.Conv2d(10, 8, 3, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, bias=False)
        self.head = nn.Linear(24, 4, bias=False)

    def forward(self, x):
        for layer in (self.first, self.second, self.up):
            x = torch.tanh(layer(x))
        return self.head(x.flatten(1))


@pytest.mark.parametrize("laid", [torch.contiguous_format, torch.channels_last])
def test_outputs_for_old_inputs_stay_while_a_network_learns(laid):
    model = drawn(Network(), "network").double().to(memory_format=laid)
    gen = generator_for("old images")
    old = randn(2, 3, 7, 7, dtype=torch.float64, generator=gen).to(memory_format=laid)
    found = input_subspaces(model, [old], energy=1.0, filter="*.weight", progress=False)
    assert list(found) == ["first.weight", "second.weight", "up.weight", "head.weight"]
    assert found["up.weight"].V is None
    with torch.no_grad():
        before = model(old)
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    guard = protect(model, found, optimizer=optimizer)
    losses = []
    for _ in range(50):
        x = randn(8, 3, 7, 7, dtype=torch.float64, generator=gen).to(memory_format=laid)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1].flatten(1)[:, :4].sin()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    guard.verify()
    with torch.no_grad():
        after, new = model(old), randn(8, 3, 7, 7, dtype=torch.float64, generator=gen)
        assert (after - before).norm() < 1e-12 * before.norm()
        assert (model(new) - start(new)).norm() > 0.1 * start(new).norm()
    assert sum(losses[-10:]) < sum(losses[:10])
    for a, b in zip(model.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() > 1e-2 * b.norm(), "each of them learned something"
