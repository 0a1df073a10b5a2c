"""A confined model under torch.compile: its graph, its optimizer's, and what runs around them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from osf_torch import confine
from tests.small_confine import (
    Conv1D,
    adamw,
    bases,
    batches,
    drawn,
    filled,
    loss_of,
    net,
    relative,
    weights_of,
    worst,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]
LIMIT = 3e-6
MODES = {"merge": {}, "beside": {"update": "beside"}, "rank": {"rank": 2}}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Mixed(nn.Module):
    """A linear layer, a Conv1D, a weight that is read, and a convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 24), Conv1D(20, 24)
        self.read, self.conv = nn.Linear(20, 20), nn.Conv1d(1, 4, 5, padding=2)
        self.head = nn.Linear(80, 6)

    def forward(self, x):
        x = torch.tanh(self.second(torch.relu(self.first(x))))
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        return self.head(self.conv(x[:, None]).flatten(1))


def mixed():
    model = filled(Mixed(), "mixed")
    subspaces = {
        f"{name}.weight": drawn(*module.weight.flatten(1).shape, 0.5, "UV", "high")
        for name, module in model.named_children()
    }
    return model, subspaces


# Inductor takes longer than the others together.
WHOLE = [*((mode, "aot_eager", dynamic) for mode in MODES for dynamic in (None, True))]
WHOLE.append(("merge", "inductor", None))


@pytest.mark.parametrize(("mode", "backend", "dynamic"), WHOLE)
def test_a_whole_graph(mode, backend, dynamic):
    """In one graph, without a break and compiled once; the same steps as uncompiled."""
    finals, losses = [], {}
    for compiled in (False, True):
        model, subspaces = mixed()
        start = weights_of(model)
        confined = confine(model, subspaces, **MODES[mode])
        counter = CompileCounterWithBackend(backend)
        run = (
            torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
            if compiled
            else model
        )
        optimizer = adamw(model.parameters())
        losses[compiled] = []
        for x in batches(5, "whole"):
            optimizer.zero_grad()
            loss = loss_of(run, x)
            loss.backward()
            optimizer.step()
            losses[compiled].append(loss.item())
        if compiled:
            assert counter.frame_count == 1
        finals.append(weights_of(model))
        assert worst(start, model, subspaces) <= LIMIT
        assert max(confined.drift().values()) <= LIMIT
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    for name, t in finals[0].items():
        assert relative(finals[1][name], t) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step_and_a_model_compiled_before(mode):
    """``confine`` takes a model that torch.compile wraps, and a compiled optimizer.step merges."""
    finals = []
    for compiled in (False, True):
        model = net("compiled")
        subspaces, start = bases(model), weights_of(model)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        confined = confine(run, subspaces, **MODES[mode])
        optimizer = adamw(model.parameters())
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for x in batches(4, "compiled"):
            optimizer.zero_grad()
            loss_of(run, x).backward()
            step()
            for place in confined.places:
                if mode == "merge":
                    held, C = place.get(place.spec.merged), place.get(place.spec.free)
                    assert torch.equal(held, C), "merged after the step"
        finals.append(weights_of(model))
        assert worst(start, model, subspaces) <= LIMIT
    for name, t in finals[0].items():
        assert relative(finals[1][name], t) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model_sees_what_is_written_by_hand(mode):
    """Writes that no hook follows, through ``.data`` too, and evaluation in between."""
    model = net("written")
    confined = confine(model, bases(model), **MODES[mode])
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    (x,) = batches(1, "written")
    run(x).sum().backward()
    for t in confined.parameters():
        t.data.add_(0.1)
    out = run(x)
    plain = net("plain")
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    assert relative(out, plain(x)) <= LIMIT
    for t in confined.parameters():
        t.data.sub_(0.05)
    with torch.no_grad():
        out = run(x)
    plain.load_state_dict(model.state_dict())
    assert relative(out, plain(x)) <= LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_autocast_and_half_precision(dtype):
    """Compiled in half precision as uncompiled: within its rounding."""
    outs, grads = [], []
    (x,) = batches(1, "half")
    for compiled in (False, True):
        model = net("half").to(dtype)
        confined = confine(model, bases(net("half")))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            out = run(x.to(dtype))
        assert out.dtype == torch.bfloat16
        out.float().sin().sum().backward()
        outs.append(out)
        grads.append([t.grad for t in confined.parameters()])
    assert relative(outs[1], outs[0]) <= 2e-2
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        assert relative(b, a) <= 5e-2


@pytest.mark.parametrize("protected", [0.25, 0.3, 0.75, 0.8])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_operators_are_what_torch_asks_of_operators(protected, transposed):
    """Schemas, fake tensors, how results lie and autograd, by torch's own check; of even and odd
    widths, which a CPU multiplies in other orders."""
    layer = Conv1D(20, 28) if transposed else nn.Linear(28, 20)
    model = filled(nn.Sequential(layer), "opcheck")
    m, n = layer.weight.shape
    for update in ("merge", "beside"):
        subspaces = {"0.weight": drawn(m, n, protected, "UV", "high")}
        confined = confine(model, subspaces, update=update)
        place = confined.places[0]
        spec = place.spec
        merged = place.get(spec.merged) if update == "merge" else None
        W, C = place.weight, place.get(spec.free)
        with torch.no_grad():
            C.normal_()
        confined.merge()
        (x,) = batches(1, "opcheck", width=28)
        x.requires_grad_()
        ops = torch.ops.osf_torch
        for reduced in (False, True):
            arguments = x, layer.bias, C, W, merged, None, spec.handle, transposed, reduced
            torch.library.opcheck(ops.confined_linear.default, arguments)
            held = ops.confined_linear(*arguments)[1].detach() if reduced else x.detach()
            dy = torch.randn(16, 20)
            arguments = dy, held, spec.handle, transposed, reduced, torch.float32
            torch.library.opcheck(ops.confined_linear_gradient.default, arguments)
        if merged is None:
            torch.library.opcheck(ops.confined_sum.default, (W, C.detach(), spec.handle))
        else:
            torch.library.opcheck(ops.confined_weight.default, (W, C, merged, None, spec.handle))
            arguments = torch.randn(m, n), spec.handle, torch.float32
            torch.library.opcheck(ops.confined_weight_gradient.default, arguments)
        confined.release()
