"""osf_torch.input_subspaces: the energy it holds, what that bounds, and what is refused."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from osf_kernels import Basis
from osf_torch import (
    Subspace,
    input_subspaces,
    layer_importance,
    protect,
    ranks_by_energy,
    refresh,
)
from tests.helpers import generator_for, grown, randn


def mlp(*widths: int, dtype: torch.dtype = torch.float64, key: object = "mlp") -> nn.Sequential:
    model = nn.Sequential()
    for n, m in itertools.pairwise(widths):
        model.extend([nn.Linear(n, m, dtype=dtype), nn.Tanh()])
    generator = generator_for(key, widths, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(randn(*p.shape, dtype=dtype, generator=generator))
    return model


def decaying(
    tokens: int, width: int, decay: float, key: object, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Inputs whose spectrum falls by ``decay`` from direction to direction."""
    generator = generator_for(key, tokens, width)
    Q, _ = torch.linalg.qr(randn(width, width, dtype=torch.float64, generator=generator))
    x = randn(tokens, width, dtype=torch.float64, generator=generator)
    return (x * decay ** torch.arange(width, dtype=torch.float64) @ Q.mT).to(dtype)


def inputs_of(model: nn.Sequential, batches) -> dict[str, torch.Tensor]:
    """X (n, tokens) of each weight, in float64, by running the layers by hand."""
    seen: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for x in batches:
            for i, layer in enumerate(model):
                if isinstance(layer, nn.Linear):
                    seen.setdefault(f"{i}.weight", []).append(x.flatten(0, -2))
                x = layer(x)
    return {name: torch.cat(found).double().mT for name, found in seen.items()}


def high(V) -> torch.Tensor:
    """The protected columns in float64, of a low basis its complement."""
    columns = (V.columns if isinstance(V, Basis) else V).double()
    if not isinstance(V, Basis) or V.spans == "high":
        return columns
    return torch.linalg.qr(columns, mode="complete")[0][:, columns.shape[1] :]


def share(V: torch.Tensor, X: torch.Tensor) -> float:
    return float((V.mT @ X).square().sum() / X.square().sum())


# what it holds


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(1, 17), min_size=2, max_size=4),
    tokens=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    energy=st.floats(0.05, 0.9999),
    decay=st.floats(0.1, 1.0),
    seed=st.integers(0, 2**31),
)
def test_the_narrowest_basis_that_holds_the_energy(widths, tokens, energy, decay, seed):
    model = mlp(*widths, key=seed)
    batches = [decaying(count, widths[0], decay, (seed, i)) for i, count in enumerate(tokens)]
    found = input_subspaces(model, batches, energy=energy, min_free=0, progress=False)
    for name, X in inputs_of(model, batches).items():
        V = high(found[name].V)
        assert (V - grown(found[name]) @ (grown(found[name]).mT @ V)).abs().max() <= 1e-12
        assert found[name].U is None
        assert found[name].S is None
        assert share(V, X) >= energy - 1e-12
        assert (V.mT @ V - torch.eye(V.shape[1])).abs().max() <= 1e-12
        squares = torch.linalg.svdvals(X).square()
        best = squares.cumsum(0) / squares.sum()  # of the leading directions, Eckart and Young
        assert V.shape[1] == 1 or float(best[V.shape[1] - 2]) < energy + 1e-12


def test_nine_tenths_are_held_by_default():
    model = mlp(40, 30)
    x = decaying(200, 40, 0.9, "default")
    (V,) = (grown(s) for s in input_subspaces(model, [x], progress=False).values())
    squares = torch.linalg.svdvals(x.double()).square()
    held = squares.cumsum(0) / squares.sum()
    assert V.shape[1] == int((held < 0.9).sum()) + 1
    assert 2 < V.shape[1] < int((held < 0.95).sum()) + 1


@pytest.mark.parametrize("spans", ["high", "low"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_previous_bases_are_kept_and_grown(spans, dtype):
    model = mlp(12, 9, 12, dtype=dtype)
    before = refresh(model, 0.75 if spans == "low" else 0.25, progress=False)
    assert {s.V.spans for s in before.values()} == {spans}
    x = decaying(40, 12, 0.8, spans, dtype)
    found = input_subspaces(model, [x], energy=0.995, previous=before, min_free=0, progress=False)
    tolerance = 50 * torch.finfo(dtype).eps
    grew = 0
    for name, X in inputs_of(model, [x]).items():
        V, earlier = high(found[name].V), high(before[name].V)
        assert found[name].V.spans == "high"
        assert bool(found[name].low) == (2 * V.shape[1] > V.shape[0])
        assert found[name].V.columns.dtype == dtype
        assert found[name].U.spans == before[name].U.spans
        assert torch.equal(found[name].U.columns, before[name].U.columns)
        assert share(V, X) >= 0.995 - tolerance
        assert (earlier - V @ (V.mT @ earlier)).abs().max() <= tolerance
        grew += V.shape[1] - earlier.shape[1]
    assert grew > 0


def test_inputs_that_are_held_already_add_nothing():
    model = mlp(10, 8)
    x = decaying(30, 10, 0.7, "held")
    once = input_subspaces(model, [x], energy=0.99, progress=False)
    twice = input_subspaces(model, [x[:20]], energy=0.9, previous=once, progress=False)
    one, two = grown(once["0.weight"]), grown(twice["0.weight"])
    assert one.shape == two.shape
    assert (one @ one.mT - two @ two.mT).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype):
    """Bases are float32, and hold the energy of the inputs as the model saw them."""
    model = mlp(16, 12, 16, dtype=dtype)
    x = decaying(50, 16, 0.8, dtype, dtype)
    found = input_subspaces(model, [x], energy=0.99, min_free=0, progress=False)
    for name, X in inputs_of(model, [x]).items():
        assert found[name].V.columns.dtype == torch.float32
        assert share(high(found[name].V), X) >= 0.99 - 1e-6


def test_a_shared_weight_is_watched_wherever_it_is_used():
    one, two = nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 6, dtype=torch.float64)
    two.weight = one.weight
    model = nn.Sequential(one, nn.Tanh(), two)
    x = decaying(2, 6, 1.0, "shared")
    found = input_subspaces(model, [x], energy=1.0, progress=False)
    assert list(found) == ["0.weight"]
    with torch.no_grad():
        X = torch.cat([x, torch.tanh(one(x))]).mT
    assert share(high(found["0.weight"].V), X) >= 1 - 1e-12
    assert grown(found["0.weight"]).shape == (6, 4)


def test_padding_is_left_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mlp(8, 8)

        def forward(self, x, attention_mask):
            return self.layer(x)

    model = Masked()
    x, mask = randn(3, 5, 8, dtype=torch.float64, generator=generator_for("pad")), torch.ones(3, 5)
    mask[1, 2:] = mask[2, 1:] = 0
    expected = input_subspaces(model.layer, [x[mask != 0]], energy=0.9, progress=False)
    x[mask == 0] = 100.0
    batch = {"x": x, "attention_mask": mask}
    found = input_subspaces(model, [batch], energy=0.9, progress=False)
    assert torch.equal(found["layer.0.weight"].V.columns, expected["0.weight"].V.columns)


class Conv1D(nn.Module):
    """transformers' layer of GPT-2: y = x W + b, W (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        generator = generator_for("conv1d", inputs, outputs)
        self.weight = nn.Parameter(randn(inputs, outputs, dtype=torch.float64, generator=generator))

    def forward(self, x):
        return x @ self.weight


def test_a_layer_whose_weight_holds_inputs_by_row_grows_its_u():
    model = nn.Sequential(Conv1D(10, 6))
    x = decaying(30, 10, 0.6, "conv1d")
    previous = refresh(model, 0.3, progress=False)
    for before in (None, previous):
        found = input_subspaces(model, [x], energy=0.99, previous=before, progress=False)
        entry = found["0.weight"]
        assert share(high(entry.U), x.mT) >= 0.99 - 1e-6
        if before is None:
            assert entry.V is None
        else:
            assert torch.equal(entry.V.columns, previous["0.weight"].V.columns)
            U, earlier = high(entry.U), previous["0.weight"].U.columns
            assert (earlier - U @ (U.mT @ earlier)).abs().max() <= 1e-12
    started = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    protect(model, found, optimizer=optimizer)
    model(torch.ones(1, 10, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    moved = model[0].weight.detach() - started
    size = float(torch.linalg.matrix_norm(moved, 2))
    assert size > 0.05
    assert float((x @ moved).norm()) <= math.sqrt(0.01) * size * float(x.norm()) * (1 + 1e-6)


def test_more_tokens_than_asked_for_are_drawn():
    """Each token as likely as another: what is kept of ordered inputs is spread over them."""
    model = nn.Sequential(nn.Linear(40, 3, bias=False))
    x = torch.eye(40)
    drawn = torch.zeros(40)
    for seed in range(200):
        found = input_subspaces(
            model, x.split(7), energy=1.0, max_tokens=10, seed=seed, progress=False
        )
        V = high(found["0.weight"].V)
        assert V.shape == (40, 10)
        drawn += V.square().sum(1).float()  # 1 for each token that was kept
        again = input_subspaces(
            model, x.split(7), energy=1.0, max_tokens=10, seed=seed, progress=False
        )
        assert torch.equal(V, high(again["0.weight"].V))
    mean, deviation = 50.0, math.sqrt(200 * 0.25 * 0.75)
    assert (drawn - mean).abs().max() <= 5 * deviation
    whole = input_subspaces(
        model, x.split(7), energy=1.0, max_tokens=40, min_free=0, progress=False
    )
    assert grown(whole["0.weight"]).shape == (40, 40)


# what it is for


@pytest.mark.parametrize("spans", [None, "previous"])
def test_outputs_for_the_inputs_move_within_the_bound(spans):
    """‖ΔW X‖_F ≤ √(1 − energy)·‖ΔW‖₂·‖X‖_F after AdamW with decay on other data."""
    model = mlp(20, 16, 20, dtype=torch.float32)
    x = decaying(60, 20, 0.8, "old", torch.float32)
    before = refresh(model, 0.25, progress=False) if spans else None
    X = inputs_of(model, [x])
    energy = 0.98
    bases = input_subspaces(model, [x], energy=energy, previous=before, progress=False)
    old = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    guard = protect(model, bases, optimizer=optimizer)
    generator = generator_for("new")
    for _ in range(50):
        optimizer.zero_grad()
        y = model(randn(8, 20, dtype=torch.float32, generator=generator))
        (y - 1).square().mean().backward()
        optimizer.step()
    guard.verify()
    for name, x in X.items():
        moved = dict(model.named_parameters())[name].detach().double() - old[name]
        size = float(torch.linalg.matrix_norm(moved, 2))
        assert size > 0.05, "it learned something"
        bound = math.sqrt(1 - energy) * size * float(x.norm())
        assert float((moved @ x).norm()) <= bound * (1 + 1e-4)
        unprotected = float((moved.norm() / math.sqrt(moved.shape[1])) * x.norm())
        assert bound < unprotected


def test_bases_grow_over_tasks_by_protecting_again():
    """The README's loop: protect, train, extend, protect anew; the first guard is replaced."""
    model = mlp(12, 12, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tasks = [decaying(20, 12, 0.6, i, torch.float32) for i in range(3)]
    bases: dict[str, Subspace] = dict(refresh(model, 0.1, progress=False))
    ranks = []
    for x in tasks:
        protect(model, bases, optimizer=optimizer)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        bases = input_subspaces(model, [x], energy=0.9, previous=bases, progress=False)
        ranks.append(grown(bases["0.weight"]).shape[1])
    assert ranks[0] < ranks[-1] < 12
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    for x in tasks:
        assert share(high(bases["0.weight"].V), x.double().mT) >= 0.9 - 1e-6


def test_the_model_and_the_generators_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5), nn.Linear(5, 5)).train()
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    drawn = torch.get_rng_state()
    x = torch.ones(3, 5)
    input_subspaces(model, torch.utils.data.DataLoader(x, shuffle=True), progress=False)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())
    for name, p in model.state_dict().items():
        assert torch.equal(p, weights[name])
    for module in model.modules():
        assert not module._forward_hooks


def test_progress_counts_batches_and_weights(capsys):
    model = mlp(5, 4, 3)
    x = torch.ones(2, 5, dtype=torch.float64)
    input_subspaces(model, [x, x], progress="always")
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4
    assert "inputs 2/2" in lines[1]
    assert "bases 2/2" in lines[3]


# what is refused


def calls(**options):
    model = options.pop("model", None) or mlp(6, 5, 4)
    batches = options.pop("batches", [torch.ones(3, 6, dtype=torch.float64)])
    return input_subspaces(model, batches, progress=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, r"expected energy in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, r"expected energy in \(0, 1\], got 1.5"),
        ({"energy": float("nan")}, "got nan"),
        ({"max_tokens": 0}, "expected max_tokens to be at least 1, got 0"),
        ({"max_batches": 0}, "expected max_batches to be at least 1, got 0"),
        ({"batches": []}, "expected at least one batch, got none"),
        ({"filter": "q.*"}, r"input_subspaces: expected filter='q\.\*'.*0\.weight"),
        ({"previous": {"5.weight": Subspace(None, None)}}, r"previous, got none for 5\.weight"),
        (
            {"previous": {"0.weight": Subspace(None, torch.eye(5, 2))}},
            r"parameter '0\.weight'.*got \(5, 2\)",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        calls(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": "x"}, r"energy to be a number in \(0, 1\], got 'x'; 0\.9 is the default"),
        ({"energy": True}, "energy to be a number.*got True"),
        ({"max_tokens": 1.5}, "max_tokens to be an int of at least 1, got 1.5"),
        ({"max_batches": 1.5}, "max_batches to be an int of at least 1, got 1.5"),
        ({"max_batches": True}, "max_batches to be an int of at least 1, got True"),
        ({"forward": 3}, "forward to be a function of model and batch, got 3"),
        ({"batches": 5}, r"iterable of batches, got int; a single batch is \[batch\]"),
        ({"batches": None}, "iterable of batches, got NoneType"),
        ({"batches": mlp}, "iterable of batches, got function"),
        ({"batches": list}, "iterable of batches, got type"),
        ({"batches": torch.ones(3, 6)}, r"got one Tensor; a single batch is \[batch\]"),
        ({"batches": {"input": torch.ones(3, 6)}}, r"got one dict; a single batch is \[batch\]"),
        ({"batches": "text", "forward": len}, r"got one str; a single batch is \[batch\]"),
        (
            {"masks": {"a": "b"}},
            r"batches to be mappings with the keys of masks=\{'a': 'b'\}, got Tensor; leave masks",
        ),
    ],
)
def test_arguments_of_another_type(options, message):
    model = mlp(6, 5, 4)
    model.train()
    arguments = {"batches": [torch.ones(3, 6, dtype=torch.float64)], "progress": False, **options}
    for run in (input_subspaces, layer_importance):
        if options.keys() <= inspect.signature(run).parameters.keys():
            told = rf"^osf_torch\.{run.__name__}: expected .*{message}"
            with pytest.raises(TypeError, match=told):
                run(model, **arguments)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("progress", ["yes", None, 2])
def test_what_says_nothing_of_a_progress_bar(progress):
    model, x = mlp(6, 5, 4), [torch.ones(3, 6, dtype=torch.float64)]
    for run in (
        lambda: input_subspaces(model, x, progress=progress),
        lambda: layer_importance(model, x, progress=progress),
        lambda: refresh(model, 2, progress=progress),
        lambda: ranks_by_energy(model, 0.9, progress=progress),
    ):
        with pytest.raises(
            TypeError,
            match=rf'^osf_torch\.\w+: expected progress to be True, False or "always", got '
            rf"{progress!r}",
        ):
            run()


def test_batches_need_no_iterator_of_their_own():
    """As of a map-style dataset, which is read by number."""

    class Numbered:
        def __getitem__(self, i):
            return (torch.ones(3, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))[i]

    assert grown(calls(batches=Numbered(), energy=1.0, min_free=0)["0.weight"]).shape == (6, 6)


@pytest.mark.parametrize("batches", [[torch.empty(0, 6, dtype=torch.float64)]])
def test_what_no_batch_reaches_is_told_with_a_remedy_that_a_turn_has_too(batches):
    model = mlp(6, 5, 4)
    told = r"none that reached 0\.weight, 2\.weight .*; pass other batches or forward=, or call "
    told += r"osf_torch\.input_subspaces with a filter= that leaves these out"
    with pytest.raises(ValueError, match=told):
        calls(model=model, batches=batches)
    guard = protect(model, calls(model=model), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=told):
        guard.next_task(batches=batches, progress=False)


def test_a_batch_of_another_type():
    with pytest.raises(TypeError, match=r"input_subspaces: expected batches of tensors.*got str"):
        calls(batches=["text"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_inputs_name_the_first_weight_that_read_them(value):
    model = mlp(6, 5, 4, 3)
    model[2].bias.data[0] = value if math.isnan(value) else -value  # tanh of Inf is finite
    expected = r"first in '4\.weight', and in 1 of 3"
    if math.isinf(value):
        model[3] = nn.Identity()
    with pytest.raises(ValueError, match=rf"NaN or Inf {expected}"):
        calls(model=model)


def test_a_weight_that_no_batch_reaches_is_named():
    model = mlp(6, 5, 4)
    with pytest.raises(ValueError, match=r"none that reached 2\.weight"):
        calls(model=model, forward=lambda m, x: m[0](x))


def test_a_module_that_is_no_linear_is_named():
    model = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"'0\.weight' .* an nn\.Linear.*, got one of Embedding"):
        calls(model=model, filter="*weight", batches=[torch.arange(6)])


def test_a_part_of_the_inputs_is_refused():
    """As a row-wise parallel layer sees."""

    class Half(nn.Linear):
        def forward(self, x):
            return x[..., :3] @ self.weight[:, :3].mT

    model = nn.Sequential(nn.Identity(), Half(6, 5, dtype=torch.float64))
    model[1].register_forward_pre_hook(lambda module, args: (args[0][..., :3],))
    with pytest.raises(ValueError, match=r"'1\.weight' to have n=6 features, got 3"):
        calls(model=model)
