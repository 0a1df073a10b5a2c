"""What protect and its Guard refuse or notice, before anything is written."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from osf_kernels import truncated_svd
from osf_torch import Subspace, checks, confine, protect, refresh
from tests.helpers import generator_for
from tests.small_guard import REPARAMETRIZE, adamw, drawn, train


def mlp(*key, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18))
    return drawn(model, "checks", *key).to(dtype)


def bases(model, ratio=0.4, **options):
    return refresh(model, ratio, progress=False, **options)


def copied(model):
    return copy.deepcopy(model.state_dict())


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# --- weights that something else has written to ---


@pytest.mark.parametrize("when", ["step", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_refuses_a_checkpoint_that_was_loaded_without_the_guards_state(dtype, when):
    model = mlp("loaded", dtype=dtype)
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, when=when)
    train(model, optimizer, 2)
    other = mlp("other", dtype=dtype).state_dict()
    model.load_state_dict(other)
    with pytest.raises(RuntimeError, match=r"protected part of '0\.weight' .* load the guard's"):
        train(model, optimizer, 1)
    assert same(model, other), "nothing was written"
    protect(model, bases(model), optimizer=optimizer, when=when)
    train(model, optimizer, 1)
    assert not same(model, other)
    guard.remove()


@pytest.mark.parametrize("restore", [True, "deferred"])
def test_weights_that_are_exchanged_and_put_back_are_no_error(restore):
    """An average for evaluation, a checkpoint of the same task, a lookahead: H(W) stays."""
    model = mlp("exchanged")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=restore)
    train(model, optimizer, 2)
    guard.restore()
    first = copied(model)
    train(model, optimizer, 2)
    guard.restore()
    second = copied(model)
    model.load_state_dict(mlp("other").state_dict())
    model.load_state_dict(second)
    train(model, optimizer, 1)
    guard.restore()
    model.load_state_dict(first)
    train(model, optimizer, 1)
    guard.restore()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.lerp_(second[name], 0.5)
    train(model, optimizer, 1)
    guard.verify()


def test_resuming_loads_the_guards_state_and_goes_on():
    model = mlp("resumed")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer)
    train(model, optimizer, 2)
    state, weights = guard.state_dict(), copied(model)
    other = mlp("other")
    fresh = protect(other, bases(other), optimizer=adamw(other))
    other.load_state_dict(weights)
    fresh.load_state_dict(state)
    train(other, fresh._optimizer, 2)
    fresh.verify()


# --- verify ---


def test_verify_notices_a_weight_that_was_frozen_at_protect():
    model = mlp("frozen")
    subspaces = bases(model)
    model[0].weight.requires_grad_(False)
    optimizer = adamw(model)
    guard = protect(model, subspaces, optimizer=optimizer)
    train(model, optimizer, 1)
    guard.verify()
    model[0].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"guarded, got '0\.weight', which was frozen"):
        guard.verify()


def test_verify_refuses_what_trains_uncovered():
    model = nn.ModuleDict(
        {"a": nn.Linear(18, 18), "b": nn.Linear(18, 18), "e": nn.Embedding(4, 18)}
    )
    model["b"].requires_grad_(False)
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer)
    model["a"](torch.ones(4, 18)).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"to be covered, got e\.weight \(4x18, nn\.Embedding\)"):
        guard.verify()
    guard = protect(model, guard.state_dict(), optimizer=optimizer, leave_out="e.*")
    optimizer.step()
    guard.verify()
    model["b"].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"to be covered, got b\.weight \(18x18"):
        guard.verify()
    other = torch.optim.SGD(model["b"].parameters(), lr=0.1)
    protect(model, bases(model, filter="b.weight"), other)
    guard.verify()


def test_weights_without_values_are_refused_by_name():
    subspaces = bases(mlp("meta"))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18))
    for options in ({"optimizer": adamw(model)}, {"restore": False}):
        with pytest.raises(ValueError, match=r"protect: .* parameter '0\.weight' to have values"):
            protect(model, subspaces, **options)


def test_verify_takes_a_weight_that_a_later_guard_has_taken_over():
    model = mlp("taken")
    subspaces = bases(model)
    first, second = adamw(model[0]), adamw(model[2])
    guards = [protect(model, {"0.weight": subspaces["0.weight"]}, optimizer=first)]
    both = protect(model, subspaces, optimizer=adamw(model))
    train(model, both._optimizer, 1)
    guards.append(protect(model, {"2.weight": subspaces["2.weight"]}, optimizer=second))
    both.verify()
    guards[1].remove()
    with pytest.raises(RuntimeError, match=r"guarded, got '2\.weight'.* a guard that was removed"):
        both.verify()


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("project_grads", ()),
        ("restore", ()),
        ("clip_grad_norm_", (1.0,)),
        ("next_task", ()),
        ("drift", ()),
        ("state_dict", ()),
        ("load_state_dict", ({},)),
    ],
)
def test_a_guard_whose_weights_a_later_one_has_taken_over_does_nothing_in_silence(
    operator, arguments
):
    model = mlp("taken over", operator)
    optimizer = adamw(model)
    earlier = protect(model, bases(model), optimizer=optimizer)
    train(model, optimizer, 1)
    later = protect(model, bases(model), optimizer=optimizer)
    train(model, optimizer, 1)
    before = copied(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError,
        match=rf"Guard\.{operator}: .* later protect\(\) has all taken over",
    ):
        getattr(earlier, operator)(*arguments)
    assert same(model, before[0])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before[1], strict=True))
    train(model, optimizer, 1)
    later.verify()


def test_verify_notices_other_writes_where_nothing_is_pinned():
    model = mlp("optimizer")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=False)
    train(model, optimizer, 1)
    guard.verify()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad.sign()
    with pytest.raises(
        RuntimeError, match=r"got something else since the last one in 0\.weight, 2"
    ):
        guard.verify()


def outgrown(scale, dtype, lr, steps):
    """A guard of a weight that began ``scale`` times as large as the others."""
    model = nn.Sequential(nn.Linear(96, 160), nn.Tanh(), nn.Linear(160, 96))
    model = drawn(model, "outgrown").to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    guard = protect(model, bases(model, 0.5), optimizer=optimizer)
    generator = generator_for("outgrown")
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 96, generator=generator).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()
    return guard


@pytest.mark.parametrize(("scale", "lr"), [(1e-3, 3e-2), (1e-4, 1e-2)])
def test_verify_takes_the_rounding_of_a_weight_that_has_outgrown_its_protected_part(
    scale, lr, caplog
):
    outgrown(scale, torch.float32, lr, 60).verify()
    assert not caplog.records


@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_verify_tells_what_sixteen_bits_hold_no_more(scale, caplog):
    guard = outgrown(scale, torch.bfloat16, 1e-2, 60)
    guard.verify()
    (record,) = caplog.records
    assert "which rounding of the weight explains" in record.getMessage()
    with pytest.raises(RuntimeError, match="expected the protected part"):
        guard.verify(tol=1e-2)
    caplog.clear()
    outgrown(1.0, torch.bfloat16, 1e-3, 20).verify()
    assert not caplog.records


def test_verify_tells_a_nan_from_a_drift():
    model = mlp("nan")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer)
    train(model, optimizer, 1)
    model[2].weight.grad[0, 0] = float("nan")
    optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"expected finite weights, got NaN or Inf in '2\.weight'"
    ):
        guard.verify()


@pytest.mark.parametrize("fused", [False, True])
def test_verify_names_a_scaler_that_skipped_every_step(fused):
    model = mlp("scaler")
    optimizer = adamw(model, fused=fused)
    guard = protect(model, bases(model), optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaler.scale(model(torch.ones(4, 18)).square().sum() * 1e9).backward()
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match="GradScaler that skipped every step"):
        guard.verify()


# --- what protect is given ---


def test_what_protect_refuses_by_type():
    model = mlp("types")
    optimizer = adamw(model)
    subspaces = bases(model)
    svd = truncated_svd(model[0].weight.detach(), 4)
    for given, text in (
        ({"0.weight": svd}, r"for parameter '0\.weight', got TruncatedSVD; .* Subspace\(U, V, S\)"),
        ({"0.weight": (svd.U, svd.V)}, r"for parameter '0\.weight', got tuple"),
        (["0.weight"], "expected subspaces to be a mapping .* got list"),
        (None, "expected subspaces to be a mapping .* got NoneType"),
    ):
        with pytest.raises(TypeError, match=rf"osf_torch\.protect: .*{text}"):
            protect(model, given, optimizer=optimizer)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got list; .* once for each"):
        protect(model, subspaces, optimizer=[optimizer, optimizer])
    other = mlp("types")
    state = confine(other, bases(other)).state_dict()
    with pytest.raises(ValueError, match=r"Confined\.state_dict\(\) .* confine\(model, st"):
        protect(model, state, optimizer=optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    protect(model, {"0.weight": Subspace(svd.U, svd.V, svd.S)}, optimizer=optimizer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("way", REPARAMETRIZE)
@pytest.mark.parametrize("when", ["step", "backward"])
def test_a_weight_that_another_one_is_computed_from_is_refused(way, when):
    """What the layer multiplies with would move in the span, while what is protected stays."""
    model = mlp("computed", way)
    REPARAMETRIZE[way](model[0])
    subspaces = bases(model, filter="*")
    (source,) = (name for name in subspaces if name.startswith("0."))
    optimizer = adamw(model)
    options = {"when": when, "restore": when == "step"}
    with pytest.raises(
        ValueError,
        match=rf"^osf_torch\.protect: expected parameter '{source}' to be a plain weight, got one "
        r"that a parametrization or a hook .*remove_parametrizations\(\).*prune\.remove\(\)",
    ):
        protect(model, subspaces, optimizer=optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks
    others = subspaces.without(source)
    guard = protect(model, others, optimizer=optimizer, leave_out="0.*", **options)
    train(model, optimizer, 1, "others", way)
    guard.verify()
    if "prune" in way:
        prune.remove(model[0], "weight")
    elif "parametri" in way:
        parametrize.remove_parametrizations(model[0], "weight")
    else:
        remove = {"weight_norm": "remove_weight_norm", "spectral_norm": "remove_spectral_norm"}
        getattr(nn.utils, remove[way])(model[0])
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, **options)
    train(model, optimizer, 2, "computed", way)
    guard.verify()


@pytest.mark.parametrize("restore", [True, False])
def test_what_protect_refuses_of_a_subspace(restore):
    model = mlp("subspaces")
    optimizer = adamw(model)
    U = torch.linalg.qr(torch.randn(30, 4))[0]
    twice, scaled = U.clone(), U * 1.02
    twice[:, 1] = twice[:, 0]
    for s, text in (
        (Subspace(None, None), r"a basis of parameter '0\.weight' on one side at least"),
        (
            Subspace(twice, None),
            r"'0\.weight': expected U to have orthonormal columns, got U'U off",
        ),
        (Subspace(scaled, None), r"orthonormal columns, got U'U off from I by 4\.0e-02"),
        (Subspace(U * float("nan"), None), "off from I by nan"),
        (Subspace(None, torch.ones(18, 2)), "V to have orthonormal columns"),
    ):
        with pytest.raises(ValueError, match=text):
            protect(model, {"0.weight": s}, optimizer=optimizer, restore=restore)
    assert not optimizer._optimizer_step_pre_hooks
    for dtype in (torch.bfloat16, torch.float16):
        protect(model, {"0.weight": Subspace(U.to(dtype), None)}, optimizer=optimizer)


# --- gradients that don't fit ---


@pytest.mark.parametrize("when", ["step", "backward"])
def test_a_sparse_gradient_is_refused_by_name(when):
    model = nn.Sequential(nn.Embedding(20, 12, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    protect(model, bases(model, filter="*.weight"), optimizer=optimizer, when=when)

    def step():
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()

    with pytest.raises(TypeError, match=r"dense gradient of parameter '0\.weight', got .*sparse"):
        step()


@pytest.mark.parametrize("ratio", [0.4, 0.7])
@pytest.mark.parametrize(("start", "then"), [("float", "double"), ("double", "float")])
@pytest.mark.parametrize("restore", [True, False])
def test_a_model_may_be_converted_to_another_precision(start, then, ratio, restore):
    model = getattr(mlp("converted"), start)()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = protect(model, bases(model, ratio), optimizer=optimizer, restore=restore)
    train(model, optimizer, 2)
    getattr(model, then)()
    train(model, optimizer, 2)
    guard.verify()
    assert max(guard.drift().values()) <= 1e-6


def rewrite(how, subspace):
    """Writes to what is protected in a way that torch doesn't count."""
    U = subspace.U if isinstance(subspace.U, torch.Tensor) else subspace.U.columns
    other = torch.linalg.qr(torch.randn_like(U))[0]
    if how == "data":
        U.data.copy_(other)
    elif how == "other data":
        U.data = other
    elif how == "numpy":
        U.numpy()[:] = other.numpy()
    else:
        subspace.S.data.mul_(1.05)


@pytest.mark.parametrize("how", ["data", "other data", "numpy", "S"])
@pytest.mark.parametrize("restore", [True, False])
def test_verify_sees_bases_that_were_written_to_past_torchs_count(how, restore):
    if how == "S" and not restore:
        pytest.skip("nothing is pinned to S")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24))
    subspaces = refresh(model, 6, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = protect(model, subspaces, optimizer=optimizer, restore=restore)

    def step():
        model(torch.randn(4, 24)).square().mean().backward()
        optimizer.step()

    step()
    guard.verify()
    rewrite(how, subspaces["0.weight"])
    step()
    with pytest.raises(RuntimeError, match=r"got others of 0\.weight: something has written"):
        guard.verify()


def test_a_basis_in_the_memory_of_its_weight_is_refused():
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(8))
    U = model.weight.detach()[:, :3]
    with pytest.raises(ValueError, match="a view of the weight, which training moves"):
        protect(model, {"weight": Subspace(U, None)}, restore=False)


def test_verify_sees_a_square_tensor_that_was_turned():
    torch.manual_seed(2)
    model = nn.Linear(12, 12, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = protect(model, refresh(model, 1.0, progress=False), optimizer=optimizer)
    model(torch.randn(4, 12)).square().mean().backward()
    optimizer.step()
    guard.verify()
    (item,) = guard._steps.together.items
    square = next(t for t in item.held.tensors() if t.shape == (12, 12))
    square.data.copy_(square.clone().mT)
    with pytest.raises(RuntimeError, match="got others of weight: something has written"):
        guard.verify()


def test_verify_says_nothing_of_values_whose_norm_overflows():
    torch.manual_seed(2)
    model = nn.Linear(12, 10, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.mul_(1e160)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = protect(model, refresh(model, 3, progress=False), optimizer=optimizer, restore=False)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    checks.require_contents(guard._steps.together.items, "Guard.verify")
