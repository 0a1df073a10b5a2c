"""A parameter is known by more than its Python object: bodies, devices, gathered and sharded."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from osf_kernels import project
from osf_torch import input_subspaces, protect, refresh
from tests.small_guard import adamw, drawn, local, one_rank, sharded, train


def mlp(*key, dtype=torch.float64):
    model = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18))
    return drawn(model, "identity", *key).to(dtype)


def bases(model, ratio=0.4):
    return refresh(model, ratio, progress=False)


def off(model, start, subspaces):
    """The share of what weights have moved by that lies in the protected span."""
    shares = []
    for name, s in subspaces.items():
        step = local(model.get_parameter(name)) - start[name]
        kept = project(step, s.U, s.V)
        shares.append(float((step - kept).norm() / step.norm()))
    return max(shares)


def weights(model, subspaces):
    return {name: local(model.get_parameter(name)).clone() for name in subspaces}


@pytest.mark.parametrize("optimizer_known", [False, True])
@pytest.mark.parametrize("then", ["train", "protect again", "verify"])
def test_weights_whose_bodies_were_exchanged(then, optimizer_known):
    """As Module.to and load_state_dict do under swap_module_params_on_conversion."""
    model = mlp("swapped")
    subspaces = bases(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"optimizer": optimizer} if optimizer_known else {}
    guard = protect(model, subspaces, restore=False, when="backward", **given)
    train(model, optimizer, 1)
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
    if then == "verify":
        with pytest.raises(RuntimeError, match=r"hooks on 0\.weight, 2\.weight, got tensors witho"):
            guard.verify()
        return
    if then == "protect again":
        guard = protect(model, subspaces, restore=False, when="backward", **given)
    start = weights(model, subspaces)
    train(model, optimizer, 3)
    assert off(model, start, subspaces) <= 1e-12
    guard.verify()


def test_verify_notices_hooks_that_were_taken_off():
    model = mlp("off")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, when="backward")
    train(model, optimizer, 1)
    guard.verify()
    model[0].weight._post_accumulate_grad_hooks.clear()
    with pytest.raises(RuntimeError, match=r"expected hooks on 0\.weight, got tensors without"):
        guard.verify()
    guard = protect(model, bases(model), optimizer=optimizer)
    train(model, optimizer, 1)
    optimizer._optimizer_step_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="expected hooks on the model, got none"):
        guard.verify()


@pytest.mark.parametrize("ratio", [0.4, 0.7])
def test_what_is_held_follows_a_weight_to_its_device(ratio):
    model = mlp("devices")
    guard = protect(model, bases(model, ratio), optimizer=adamw(model))
    for item in guard._items.values():
        item.weight = nn.Parameter(item.weight.detach().to("meta"))
        item.follow()
        held = [item.held.U.columns, item.held.V.columns, item.held.S, item.held.protected]
        assert {t.device.type for t in held if t is not None} == {"meta"}


@pytest.mark.parametrize("target", ["cpu", torch.float32, torch.float64], ids=str)
def test_a_sharded_model_may_be_moved_after_a_step(target):
    with one_rank():
        model = sharded(mlp("moved"))
        subspaces = bases(model)
        optimizer = adamw(model)
        guard = protect(model, subspaces, optimizer=optimizer)
        start = weights(model, subspaces)
        train(model, optimizer, 2)
        model.to(target)
        if target != torch.float32:
            train(model, optimizer, 2)
            guard.verify()
            assert off(model, start, subspaces) <= 1e-12


def test_sharded_parameters_are_found_after_an_evaluation():
    """FSDP2 leaves the root's parameters gathered, plain tensors, after a forward alone."""
    with one_rank():
        model = mlp("evaluated")
        fully_shard(model[0])
        fully_shard(model)
        optimizer = adamw(model)
        guard = protect(model, bases(model), optimizer=optimizer)
        train(model, optimizer, 1)

        def evaluate():
            with torch.no_grad():
                model(torch.ones(2, 18).double())
            assert not hasattr(model[2].weight, "placements")

        evaluate()
        guard.verify()
        evaluate()
        guard.next_task(progress=False)
        train(model, optimizer, 1)
        guard.verify()
        found = input_subspaces(model, [torch.randn(9, 18).double()], energy=0.5, progress=False)
        guard = protect(model, found, optimizer=optimizer)
        train(model, optimizer, 1)
        guard.verify()


def test_a_replaced_parameter_is_named():
    model = mlp("replaced")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer)
    train(model, optimizer, 1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match=r"parameter '0\.weight' to be the one that was protect"):
        guard.verify()


# --- what is held, and for how long ---


@pytest.mark.parametrize("when", ["step", "backward"])
@pytest.mark.parametrize("known", [True, False])
def test_a_guard_goes_with_its_model_and_not_before(when, known):
    model = mlp("freed")
    subspaces = bases(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"optimizer": optimizer} if known or when == "step" else {"restore": False}
    guard = weakref.ref(protect(model, subspaces, when=when, **given))
    gc.collect()
    assert guard() is not None, "the model holds it"
    start = weights(model, subspaces)
    train(model, optimizer, 2)
    assert off(model, start, subspaces) <= 1e-12
    alive = [guard, weakref.ref(model[0])]
    del model, optimizer, given
    gc.collect()
    assert [one() for one in alive] == [None, None]


def test_two_guards_of_one_module_are_both_held():
    model = nn.ParameterDict({name: torch.randn(12, 8) for name in "ab"})
    guards = []
    for name in "ab":
        subspaces = refresh(model, 0.4, filter=name, progress=False)
        guards.append(weakref.ref(protect(model, subspaces, restore=False)))
    gc.collect()
    (model["a"] * model["b"]).sum().backward()
    assert [guard().projections for guard in guards] == [1, 1]
    for guard in guards:
        guard().remove()
    gc.collect()
    assert [guard() for guard in guards] == [None, None]


@pytest.mark.parametrize("when", ["step", "backward"])
def test_copies_and_files_of_a_guarded_model_have_no_guard(when):
    model = mlp("copied")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, when=when)
    train(model, optimizer, 1)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        before = guard.projections
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), 1)
        assert guard.projections == before
        protect(other, bases(other), optimizer=adamw(other), when=when)
    guard.verify()
    guard.remove()
    assert "_osf_guard" not in model[0].__dict__


def test_importing_is_light_of_the_compiler():
    import subprocess
    import sys

    code = "import torch, sys; had = 'torch._dynamo' in sys.modules; import osf_torch; "
    code += "sys.exit(not had and 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
