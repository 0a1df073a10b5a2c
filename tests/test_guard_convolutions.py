"""Guards of convolutions, whose weights are protected by their (out, in/groups·kh·kw) matrices."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from osf_torch import (
    Subspace,
    load_subspaces,
    protect,
    refresh,
    save_subspaces,
)
from tests.helpers import generator_for
from tests.small_convolutions import (
    KINDS,
    bases,
    channels_last,
    convolution,
    images,
    matrix,
    projected,
)
from tests.small_guard import drawn

ROUNDING = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}
LAID = {"contiguous": torch.Tensor.contiguous, "channels last": channels_last}


def laid(layer, how):
    """The layer with a weight that lies so in memory."""
    with torch.no_grad():
        layer.weight.data = LAID[how](layer.weight)
    return layer


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def train(model, optimizer, steps, *key):
    layer = model[0]
    gen = generator_for("images", *key)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images(layer, 3, gen)).square().mean().backward()
        optimizer.step()


def stepped_by_formula(start, s, grads, mode):
    """AdamW of the projected gradients, then the protected part put back, all in float64."""
    W = nn.Parameter(matrix(start))
    H = W.detach() - projected(W.detach(), s, mode)
    optimizer = torch.optim.AdamW([W], lr=1e-2, weight_decay=0.1)
    for g in grads:
        W.grad = projected(matrix(g), s, mode)
        optimizer.step()
        with torch.no_grad():
            W.copy_(projected(W, s, mode) + H)
    return W.detach()


@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize("weights", LAID)
@pytest.mark.parametrize("gradients", LAID)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_its_matrix(kind, weights, gradients, mode):
    """However the weight and its gradient lie in memory, each like the other or not."""
    model = convolution(kind, weights, gradients, mode)
    layer = laid(model[0], weights)
    start, s = layer.weight.detach().clone(), bases(layer, 3)
    optimizer = adamw(model)
    guard = protect(model, {"0.weight": s}, optimizer=optimizer, mode=mode, record=True)
    gen = generator_for("gradients", kind, weights, gradients)
    grads = [torch.randn(start.shape, generator=gen, dtype=start.dtype) for _ in range(4)]
    for g in grads:
        layer.weight.grad = LAID[gradients](g.clone())
        optimizer.step()
        assert guard.leak()["0.weight"].applied < 1e-14 < guard.leak()["0.weight"].raw
    wanted = stepped_by_formula(start, s, grads, mode)
    off = (matrix(layer.weight) - wanted).norm() / wanted.norm()
    assert off < ROUNDING[torch.float64]
    assert (matrix(layer.weight) - matrix(start)).norm() > 1e-2 * wanted.norm()
    assert layer.weight.stride() == LAID[weights](start).stride()
    guard.verify()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("weights", LAID)
@pytest.mark.parametrize("ratio", [0.4, 0.7])  # high bases and low ones
@pytest.mark.parametrize(
    "options",
    [
        {"when": "step"},
        {"when": "backward"},
        {"restore": "deferred"},
        {"restore": False, "when": "backward"},
        {"restore": False, "when": "step"},
    ],
    ids=str,
)
def test_every_setting_holds_what_it_promises(options, ratio, weights, dtype):
    model = convolution("2d", ratio, weights, dtype=dtype)
    laid(model[0], weights)
    subspaces = refresh(model, ratio, filter="*.weight", progress=False)
    # Steps of SGD alone keep to the span of the gradients.
    linear = options.get("restore") is False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5) if linear else adamw(model)
    guard = protect(model, subspaces, optimizer=optimizer, record=True, **options)
    before = matrix(model[0].weight)
    train(model, optimizer, 5, ratio, weights)
    guard.clip_grad_norm_(1.0)
    assert max(guard.drift().values()) < ROUNDING[dtype]
    leak = guard.leak()["0.weight"]
    assert leak.applied < ROUNDING[dtype]
    assert leak.raw > 0.1
    guard.verify(tol=None if dtype == torch.bfloat16 else ROUNDING[dtype])
    assert (matrix(model[0].weight) - before).norm() > 1e-3 * before.norm()


def test_a_gradient_in_another_format_is_projected_where_nothing_is_pinned():
    """Its copy goes back to it: what a step uses is the projected one."""
    model = convolution("2d", "written")
    layer, s = model[0], bases(model[0], 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = protect(model, {"0.weight": s}, optimizer=optimizer, restore=False)
    gen = generator_for("written")
    g = torch.randn(layer.weight.shape, generator=gen, dtype=torch.float64)
    layer.weight.grad = channels_last(g)
    before = matrix(layer.weight)
    optimizer.step()
    change = before - matrix(layer.weight)
    wanted = projected(matrix(g), s, "complement")
    assert (change - wanted).norm() < 1e-13 * wanted.norm()
    guard.verify()
    layer.weight.grad.add_(channels_last(g))  # after it was projected
    guard.project_grads()
    wanted = 2 * wanted
    assert (matrix(layer.weight.grad) - wanted).norm() < 1e-13 * wanted.norm()


def test_a_gradient_that_repeats_memory_is_refused_by_name():
    model = convolution("2d", "repeated")
    layer = model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    protect(model, {"0.weight": bases(layer, 3)}, optimizer=optimizer)
    before = layer.weight.detach().clone()
    for g in (torch.ones(9, 1, 3, 3), torch.ones(9, 4, 1, 1)):
        layer.weight.grad = g.double().expand(9, 4, 3, 3)
        with pytest.raises(ValueError, match=r"'0\.weight' with an element.*grad\.contiguous"):
            optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("weights", LAID)
@pytest.mark.parametrize("kind", ["2d", "3d", "1d transposed, grouped"])
@pytest.mark.parametrize("when", ["step", "backward"])
def test_a_run_resumes_to_the_bit(kind, weights, when):
    model = convolution(kind, "resumed", dtype=torch.float32)
    laid(model[0], weights)
    subspaces = refresh(model, 0.5, filter="*.weight", progress=False)
    optimizer = adamw(model)
    guard = protect(model, subspaces, optimizer=optimizer, when=when)
    train(model, optimizer, 3, "first")
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), guard.state_dict()), buffer)
    train(model, optimizer, 3, "second")
    guard.next_task(widen=1, keep="all", progress=False)
    train(model, optimizer, 2, "third")

    buffer.seek(0)
    weights_then, moments, state = torch.load(buffer, weights_only=True)
    resumed = laid(convolution(kind, "another", dtype=torch.float32)[0], weights)
    resumed = nn.Sequential(resumed)
    other = adamw(resumed)
    resumed.load_state_dict(weights_then)
    other.load_state_dict(moments)
    fresh = protect(resumed, state, optimizer=other)
    train(resumed, other, 3, "second")
    fresh.next_task(widen=1, keep="all", progress=False)
    train(resumed, other, 2, "third")
    assert torch.equal(model[0].weight, resumed[0].weight)
    assert fresh.drift() == guard.drift()
    fresh.verify()


def test_a_state_of_another_convolution_is_refused_and_nothing_changes():
    model = convolution("2d", "state")
    optimizer = adamw(model)
    guard = protect(model, {"0.weight": bases(model[0], 3)}, optimizer=optimizer)
    good = guard.state_dict()
    for key, value, message in (
        ("shape", (9, 36), r"shape \(9, 4, 3, 3\), got \(9, 36\)"),
        ("V", good["weights"]["0.weight"]["V"][:-1], "all of V of '0.weight', 36 along dim.*-2"),
        ("U", good["weights"]["0.weight"]["U"][:-1], "all of U of '0.weight', 9 along dim.*-2"),
    ):
        bad = {**good, "weights": {"0.weight": {**good["weights"]["0.weight"], key: value}}}
        with pytest.raises(ValueError, match=message):
            guard.load_state_dict(bad)
    train(model, optimizer, 2, "after")
    guard.verify()


@pytest.mark.parametrize("weights", LAID)
def test_the_next_task_renews_ranks_and_momenta(weights):
    """A momentum is a 4-D tensor in its weight's format: M ← P(M) by the new bases."""
    model = convolution("2d", "next")
    laid(model[0], weights)
    optimizer = adamw(model)
    subspaces = refresh(model, 3, filter="*.weight", progress=False)
    guard = protect(model, subspaces, optimizer=optimizer)
    train(model, optimizer, 3, "first")
    state = optimizer.state[model[0].weight]
    before = {name: value.clone() for name, value in state.items()}
    found = guard.next_task(widen=2, optimizer_state="project", keep="all", progress=False)
    assert found["0.weight"].rank == 5
    svd = found["0.weight"].svd
    wanted = projected(matrix(before["exp_avg"]), Subspace(svd.U, svd.V), "complement")
    assert (matrix(state["exp_avg"]) - wanted).norm() < 1e-13 * wanted.norm()
    assert state["exp_avg"].stride() == before["exp_avg"].stride()
    assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"])
    assert guard.released()["0.weight"] < 0.5
    W = model[0].weight.detach().clone()
    train(model, optimizer, 3, "second")
    change = matrix(model[0].weight) - matrix(W)
    assert (svd.U.mT @ change).norm() + (change @ svd.V).norm() < 1e-12
    guard.verify()
    guard.next_task(4, optimizer_state="clear", progress=False)
    assert model[0].weight not in optimizer.state
    assert guard.subspaces["0.weight"].rank == 4
    guard.remove()


def test_subspaces_of_convolutions_go_through_a_file(tmp_path):
    pytest.importorskip("safetensors", reason="the files are safetensors")
    model = convolution("2d", "file")
    found = refresh(model, 0.5, filter="*.weight", progress=False)
    save_subspaces(tmp_path / "s", found, model)
    optimizer = adamw(model)
    guard = protect(model, load_subspaces(tmp_path / "s", model), optimizer=optimizer)
    train(model, optimizer, 2, "file")
    guard.verify()


def test_what_does_not_fit_the_matrix_is_refused_by_name():
    """Also what fits the (kh, kw) matrices that torch's batches of matrices would be of."""
    model = convolution("2d", "refused")
    gen = generator_for("refused")
    U, V = (torch.linalg.qr(torch.randn(9, 4, 3, 2, generator=gen).double())[0] for _ in "UV")
    good = bases(model[0], 3)
    for bad, error in (
        (Subspace(U, V), "0.weight.*"),
        (Subspace(good.V, good.U), "0.weight.*"),
        (Subspace(good.U, good.V[:9]), "0.weight.*36"),
        (Subspace(good.U, good.V, good.S.flip(0)), "triplets"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            protect(model, {"0.weight": bad}, optimizer=adamw(model))
    assert not model[0].weight._backward_hooks
    train(model, adamw(model), 1, "unguarded")


def test_a_convolution_that_two_modules_share_is_protected_once():
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    model = drawn(nn.Sequential(first, nn.Tanh(), second), "shared").double()
    second.weight = first.weight
    optimizer = adamw(model)
    found = refresh(model, 0.5, filter="*.weight", progress=False)
    assert list(found) == ["0.weight"]
    guard = protect(model, found, optimizer=optimizer)
    train(model, optimizer, 3, "shared")
    assert max(guard.drift().values()) < 1e-13
    guard.verify()


def test_a_format_that_changes_while_it_trains():
    """``Module.to(memory_format=...)`` gives the weight other memory; a step then goes on."""
    model = convolution("2d", "moved")
    optimizer = adamw(model)
    guard = protect(model, {"0.weight": bases(model[0], 3)}, optimizer=optimizer)
    other = copy.deepcopy(model)
    same = adamw(other)
    beside = protect(other, {"0.weight": bases(model[0], 3)}, optimizer=same)
    train(model, optimizer, 2, "a")
    train(other, same, 2, "a")
    model.to(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    train(model, optimizer, 2, "b")
    train(other, same, 2, "b")
    torch.testing.assert_close(model[0].weight, other[0].weight, rtol=0, atol=1e-12)
    guard.verify()
    beside.verify()
