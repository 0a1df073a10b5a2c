"""What a confined layer keeps for its backward pass: recomputed, offloaded, or kept by others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from osf_torch import confine
from tests.small_confine import adamw, batches, drawn, filled, loss_of, relative

LIMIT = 3e-6
UPDATES = ["merge", "beside"]


class Blocks(nn.Module):
    """Queries, keys and values of one input, what keeps its results, and one layer called twice."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how = how
        self.q, self.k, self.v = (nn.Linear(20, 20) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(20, 32), nn.Linear(32, 20), nn.Linear(20, 6)

    def block(self, x):
        mixed = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        x = x + self.down(torch.relu(self.up(torch.tanh(mixed))))
        return torch.tanh(x)

    def forward(self, x):
        for _ in range(2):
            if self.how == "plain":
                x = self.block(x)
            elif self.how == "offloaded":
                with save_on_cpu():
                    x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.how == "reentrant")
        return self.head(x)


@pytest.mark.parametrize("how", ["reentrant", "recomputed", "offloaded"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("protected", [0.2, 0.8])
def test_activation_checkpointing(update, how, protected):
    """The same gradients as without, step after step, to what float64 has of sums in another order;
    and nothing is recomputed but in the backward pass."""
    runs = {}
    for kind in ("plain", how):
        model = filled(Blocks(kind), "checkpoint").double()
        subspaces = {
            f"{name}.weight": drawn(*module.weight.shape, protected, "UV", "high")
            for name, module in model.named_children()
        }
        confined = confine(model, subspaces, update=update)
        optimizer = adamw(model.parameters())
        calls = []
        model.up.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        runs[kind] = []
        for x in batches(3, "checkpoint", size=8):
            optimizer.zero_grad()
            x = x.double().requires_grad_()
            loss = loss_of(model, x)
            forwards = len(calls)
            loss.backward()
            assert forwards == 2
            assert len(calls) == (4 if how != "offloaded" and kind == how else 2)
            calls.clear()
            runs[kind].append([t.grad.clone() for t in (*confined.parameters(), x)])
            optimizer.step()
    for plain, other in zip(runs["plain"], runs[how], strict=True):
        for a, b in zip(plain, other, strict=True):
            assert relative(b, a) <= 1e-12


def test_checkpointed_sequences():
    model = filled(nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)), nn.Linear(20, 6)), "seq")
    confined = confine(model, {f"{i}.weight": drawn(20, 20, 0.5, "UV", "high") for i in range(4)})
    (x,) = batches(1, "seq")
    grads = []
    for segments in (None, 2):
        model.zero_grad()
        x = x.detach().requires_grad_()
        y = (
            model(x)
            if segments is None
            else checkpoint_sequential(model, segments, x, use_reentrant=False)
        )
        y.sin().sum().backward()
        grads.append([t.grad.clone() for t in confined.parameters()])
    for a, b in zip(*grads, strict=True):
        assert relative(b, a) <= LIMIT


def test_what_made_the_inputs_is_asked_without_unpacking_anything():
    """Not of a graph that was let go of, nor of results that hooks have packed."""
    model = filled(nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 6)), "asked")
    confined = confine(model, {"2.weight": drawn(6, 24, 0.8, "UV", "high")})
    (x,) = batches(1, "asked")
    hidden = model[1](model[0](x))
    hidden.sum().backward()
    model[2](hidden)  # its graph is gone
    unpacked = []
    packing = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t))
    with packing:
        hidden = model[1](model[0](x))
    out = model[2](hidden)
    assert not unpacked
    assert out.requires_grad
    assert confined.parameters()[0].grad is None


def test_one_input_over_and_over_is_remembered_once():
    model = filled(nn.Sequential(nn.Linear(24, 6)), "over")
    confined = confine(model, {"0.weight": drawn(6, 24, 0.8, "UV", "high")})
    (x,) = batches(1, "over", width=24)
    for _ in range(5):
        model(x).sum().backward()
    (place,) = confined.places
    assert len(place.spec.inputs._together) <= 1


@pytest.mark.parametrize("made", ["read", "computed", "kept", "shared"])
def test_the_narrower_form_of_the_inputs_is_kept_where_that_saves_memory(made):
    """x V_l where nothing else keeps x; x itself where tanh does, or where three layers share it
    whose x V_l are wider together."""
    names = ("q", "k", "v") if made == "shared" else ("q",)
    model = filled(nn.ModuleDict({name: nn.Linear(40, 30) for name in names}), made)
    confined = confine(model, {f"{n}.weight": drawn(30, 40, 26 / 30, "V", "high") for n in names})
    assert {place.spec.plan(16).order for place in confined.places} == {"right"}
    for _ in range(2):
        (x,) = batches(1, made, width=40)
        x = {
            "read": lambda x: x,
            "computed": lambda x: 2 * x.requires_grad_(),
            "kept": lambda x: torch.tanh(x.requires_grad_()),
            "shared": lambda x: 2 * x.requires_grad_(),
        }[made](x)
        outs = [model[name](x) for name in names]
    q = confined.places[0].spec.right.width
    kept = [out.grad_fn.saved_tensors[1].shape[-1] for out in outs]
    assert kept == ([40] * len(names) if made in ("kept", "shared") else [q])
