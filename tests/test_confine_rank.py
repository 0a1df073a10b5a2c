"""confine(rank=s): a LoRA in the coordinates of the free block, against plain references."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osf_kernels import Basis
from osf_torch import Subspace, confine
from osf_torch.free.spec import places_of
from tests.helpers import draw_basis, generator_for, randn

M, N = 14, 18  # of the first layer: (M, N); the second is (N, M)
RANK = 3
EXACT = 1e-12  # of float64, after a few dozen steps


class Conv1D(nn.Module):
    """transformers' layer, which holds (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class Experts(nn.Module):
    """A batch of matrices, every one of which reads all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, M, N))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("tn,emn->etm", x, self.weight).sum(0)


def drawn(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    gen = generator_for("weights")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=gen, dtype=torch.float64))
    return model.to(dtype)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    return drawn(nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, N)), dtype)


def subspaces(
    kinds: tuple[str | None, str | None] = ("high", "high"), dtype: torch.dtype = torch.float64
) -> dict[str, Subspace]:
    def side(size: int, rank: int, kind: str | None, *key: object) -> Basis | None:
        return draw_basis(size, rank, kind, dtype, generator_for("bases", *key))

    U, V = kinds
    return {
        "0.weight": Subspace(side(M, 5, U, 0, "U"), side(N, 7, V, 0, "V")),
        "2.weight": Subspace(side(N, 7, U, 2, "U"), side(M, 5, V, 2, "V")),
    }


def batch(step: int, dtype: torch.dtype = torch.float64, rows: int = 16) -> Tensor:
    return randn(rows, N, dtype=dtype, generator=generator_for("data", step))


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **options)


def train(model, optimizer, steps: int, start: int = 0, dtype: torch.dtype = torch.float64) -> None:
    for step in range(start, start + steps):
        x = batch(step, dtype)
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def sides(spec) -> tuple[Tensor, Tensor]:
    """U_l and V_l as matrices."""
    left, right = (
        side.expand(torch.eye(side.width, dtype=torch.float64)).mT
        for side in (spec.left, spec.right)
    )
    return left, right


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if t.dim() > 1}


class PlainLoRA:
    """The same model by torch.func: W = W₀ + U_l B A V_lᵀ, with B and A leaves of autograd."""

    def __init__(self, confined) -> None:
        self.bases = {p.name: sides(p.spec) for p in confined.places}
        self.factors = {
            p.name: tuple(t.detach().clone().requires_grad_() for t in p.trained())
            for p in confined.places
        }

    def weights(self, plain: nn.Module) -> dict[str, Tensor]:
        found = {}
        for name, (B, A) in self.factors.items():
            left, right = self.bases[name]
            W = plain.get_parameter(name).detach()
            found[name] = W + ((left @ B) @ (A @ right.mT)).reshape(W.shape)
        return found

    def __call__(self, plain: nn.Module, x: Tensor) -> Tensor:
        return torch.func.functional_call(plain, self.weights(plain), (x,))

    def parameters(self) -> list[Tensor]:
        return [t for pair in self.factors.values() for t in pair]


def both_trained(model: nn.Module, given, steps: int = 20):
    """The confined model and the reference, trained alike with AdamW, weight decay included."""
    plain = copy.deepcopy(model)
    confined = confine(model, given, rank=RANK)
    reference = PlainLoRA(confined)
    others = [p for p in model.parameters() if p.dim() < 2]
    plain_others = [p for p in plain.parameters() if p.dim() < 2]
    ours = adamw([*confined.parameters(), *others])
    theirs = adamw([*reference.parameters(), *plain_others])
    for step in range(steps):
        x = batch(step)
        target = x.sin()[:, : model(x).shape[-1]]
        ours.zero_grad()
        theirs.zero_grad()
        (model(x) - target).square().mean().backward()
        (reference(plain, x) - target).square().mean().backward()
        ours.step()
        theirs.step()
    return confined, reference, plain


@pytest.mark.parametrize(
    "kinds",
    [("high", "high"), ("low", "low"), ("high", None), (None, "high"), ("low", "high")],
    ids=str,
)
def test_training_is_that_of_a_lora_in_free_coordinates(kinds):
    model = mlp()
    confined, reference, plain = both_trained(model, subspaces(kinds))
    for place in confined.places:
        for found, expected in zip(place.trained(), reference.factors[place.name], strict=True):
            assert off(found, expected) < EXACT
    now = weights(model)
    for name, expected in reference.weights(plain).items():
        assert off(now[name], expected) < EXACT
        assert off(plain.get_parameter(name), expected) > 1e-2, "it did train"


def test_training_of_conv1d_is_that_of_its_transposed_lora():
    model = drawn(nn.Sequential(Conv1D(M, N), nn.Tanh(), Conv1D(N, M)))
    given = subspaces()
    given = {"0.weight": given["2.weight"], "2.weight": given["0.weight"]}
    _, reference, plain = both_trained(model, given)
    now = weights(model)
    for name, expected in reference.weights(plain).items():
        assert off(now[name], expected) < EXACT
    x = batch(99)
    assert off(model(x), reference(plain, x)) < EXACT


@pytest.mark.parametrize("batched", [False, True])
def test_experts_have_factors_each(batched):
    model = drawn(nn.Sequential(Experts()))

    def side(size: int, rank: int, *key: object) -> Tensor:
        lead = range(4) if batched else range(1)
        one = [draw_basis(size, rank, "high", torch.float64, generator_for(*key, i)) for i in lead]
        return torch.stack([b.columns for b in one]) if batched else one[0].columns

    given = {"0.weight": Subspace(side(M, 5, "U"), side(N, 7, "V"))}
    confined, reference, plain = both_trained(model, given)
    B, A = confined.parameters()
    assert B.shape == (4, M - 5, RANK)
    assert A.shape == (4, RANK, N - 7)
    moved = weights(model)["0.weight"] - plain[0].weight.detach()
    assert off(weights(model)["0.weight"], reference.weights(plain)["0.weight"]) < EXACT
    assert float((given["0.weight"].U.mT @ moved).norm() / moved.norm()) < EXACT


def test_a_convolution_is_one_matrix():
    model = drawn(nn.Sequential(nn.Conv2d(3, 8, 2)))
    plain = copy.deepcopy(model)
    U, V = (
        draw_basis(size, 3, "high", torch.float64, generator_for(size)).columns for size in (8, 12)
    )
    confined = confine(model, {"0.weight": Subspace(U, V)}, rank=2)
    reference = PlainLoRA(confined)
    x = randn(2, 3, 5, 5, dtype=torch.float64, generator=generator_for("image"))
    with torch.no_grad():
        for t, other in zip(confined.parameters(), reference.parameters(), strict=True):
            t.add_(0.1)
            other.add_(0.1)
    model(x).square().sum().backward()
    reference(plain, x).square().sum().backward()
    for t, other in zip(confined.parameters(), reference.parameters(), strict=True):
        assert off(t.grad, other.grad) < EXACT


# --- what is protected ---


def leaks(before: dict[str, Tensor], now: dict[str, Tensor], given) -> list[float]:
    """‖Uᵀ ΔW‖ / ‖ΔW‖ and ‖ΔW V‖ / ‖ΔW‖, of every weight."""
    found = []
    for name, subspace in given.items():
        moved = now[name] - before[name]
        found.append(float((subspace.U.columns.mT @ moved).norm() / moved.norm()))
        found.append(float((moved @ subspace.V.columns).norm() / moved.norm()))
    return found


def test_adamw_with_weight_decay_moves_nothing_protected():
    model, given = mlp(), subspaces()
    before = weights(model)
    confined = confine(model, given, rank=RANK)
    train(model, adamw(model.parameters()), 30)
    assert max(leaks(before, weights(model), given)) < EXACT
    assert max(confined.drift().values()) < EXACT


def test_a_lora_with_projected_gradients_leaks_under_adamw():
    """What OPLoRA's projections don't hold: the check above can fail."""
    model, given = mlp(), subspaces()
    before = weights(model)
    layers = nn.ModuleDict()
    for i in (0, 2):
        subspace = given[f"{i}.weight"]
        layer = model[i]
        PU, PV = (
            torch.eye(len(b.columns), dtype=torch.float64) - b.columns @ b.columns.mT
            for b in (subspace.U, subspace.V)
        )
        m, n = layer.weight.shape
        lora = nn.Module()
        A = randn(RANK, n, dtype=torch.float64, generator=generator_for("A", i)) / n**0.5
        lora.B = nn.Parameter(torch.zeros(m, RANK, dtype=torch.float64))
        lora.A = nn.Parameter(A @ PV)
        lora.B.register_hook(lambda g, P=PU: P @ g)
        lora.A.register_hook(lambda g, P=PV: g @ P)
        layers[str(i)] = lora

    def forward(x: Tensor) -> Tensor:
        W = {i: model[int(i)].weight.detach() + lora.B @ lora.A for i, lora in layers.items()}
        return F.linear(F.linear(x, W["0"], model[0].bias).tanh(), W["2"], model[2].bias)

    train(forward, adamw(layers.parameters()), 30)
    now = {
        f"{i}.weight": before[f"{i}.weight"] + (lora.B @ lora.A).detach()
        for i, lora in layers.items()
    }
    assert min(leaks(before, now, given)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_model_starts_as_it_was_and_the_weight_is_never_written_to(dtype):
    model, plain = mlp(dtype), mlp(dtype)
    given = subspaces(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    confined = confine(model, given, rank=RANK)
    x = batch(0, dtype)
    assert torch.equal(model(x), plain(x))
    held = [place.weight for place in confined.places]
    versions = [W._version for W in held]
    train(model, adamw(model.parameters()), 5, dtype=dtype)
    assert not torch.equal(model(x), plain(x))
    for W, version, i in zip(held, versions, (0, 2), strict=True):
        assert W._version == version
        assert torch.equal(W, plain[i].weight)
    assert {t.dtype for t in confined.parameters()} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }


# --- how it is trained ---


def test_gradients_accumulate_over_parts_of_a_batch():
    model = mlp()
    confined = confine(model, subspaces(), rank=RANK)
    train(model, adamw(model.parameters()), 3)
    x = batch(7)
    model.zero_grad()
    model(x).square().sum().backward()
    whole = [t.grad.clone() for t in confined.parameters()]
    model.zero_grad()
    for part in x.split(5):
        model(part).square().sum().backward()
    for t, expected in zip(confined.parameters(), whole, strict=True):
        assert off(t.grad, expected) < EXACT


def test_leading_dimensions_of_the_inputs_are_kept():
    model = mlp()
    confine(model, subspaces(), rank=RANK)
    train(model, adamw(model.parameters()), 2)
    x = batch(7)
    assert off(model(x.view(2, 8, N)).view(16, N), model(x)) < EXACT


def test_autocast_computes_in_its_dtype_and_trains_in_float32():
    model, exact = mlp(torch.float32), mlp()
    ours = confine(model, subspaces(dtype=torch.float32), rank=RANK)
    theirs = confine(exact, subspaces(), rank=RANK)
    with torch.no_grad():
        for t, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.add_(0.1)
            t.copy_(other)
    x = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x.float())
    assert y.dtype == torch.bfloat16
    assert off(y.double(), exact(x)) < 2e-2
    y.float().square().mean().backward()
    exact(x).square().mean().backward()
    for t, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert t.grad.dtype == torch.float32
        assert off(t.grad.double(), other.grad) < 5e-2


@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize("kind", ["high", "low"])
def test_what_is_written_within_autocast_stays_in_the_free_block(rank, kind):
    model = mlp(torch.float32)
    before, given = weights(model), subspaces(dtype=torch.float32)
    held = subspaces((kind, kind), torch.float32)
    confined = confine(model, held, rank=rank)
    with torch.no_grad():
        for t in confined.parameters():
            t.copy_(torch.randn(t.shape))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch(0, torch.float32))
        assert model[0].weight.dtype == torch.float32
        now = weights(model)
    assert max(leaks(before, now, given)) < 1e-5


@pytest.mark.slow
def test_a_compiled_model_trains_alike():
    model, other = mlp(), mlp()
    confined, same = (confine(m, subspaces(), rank=RANK) for m in (model, other))
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    train(model, adamw(model.parameters()), 4)
    train(compiled, adamw(other.parameters()), 4)
    for t, expected in zip(same.parameters(), confined.parameters(), strict=True):
        assert off(t, expected) < EXACT


def test_factors_are_drawn_alike_each_time_and_differently_by_layer():
    def drawn_A(generator: torch.Generator | None, model: nn.Module | None = None) -> list[Tensor]:
        confined = confine(model or mlp(), subspaces(), rank=RANK, generator=generator)
        return [A for place in confined.places for A in place.trained()[1:]]

    first, again = drawn_A(None), drawn_A(None)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    seeded = [drawn_A(torch.Generator().manual_seed(7)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*seeded, strict=True))
    assert not torch.equal(seeded[0][0], first[0])
    model, state = mlp(), torch.get_rng_state()
    drawn_A(None, model)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    width = min(first[0].shape[-1], first[1].shape[-1])
    scaled = [A * A.shape[-1] ** 0.5 for A in first]
    assert not torch.allclose(scaled[0][:, :width], scaled[1][:, :width])


# --- what is saved ---


def test_a_state_has_the_names_and_the_values_of_the_plain_model():
    model, plain = mlp(), mlp()
    confined = confine(model, subspaces(), rank=RANK)
    train(model, adamw(model.parameters()), 5)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    x = batch(50)
    assert off(model(x), plain(x)) < EXACT
    for place in confined.places:
        left, right = sides(place.spec)
        B, A = place.trained()
        assert off(state[place.name], place.weight + left @ B @ A @ right.mT) < EXACT


def test_a_model_loads_its_own_state_where_it_is():
    model = mlp()
    confined = confine(model, subspaces(), rank=RANK)
    train(model, adamw(model.parameters()), 5)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    drawn = [place.trained()[1].detach().clone() for place in confined.places]
    model.load_state_dict(state)
    for name, t in model.state_dict().items():
        assert torch.allclose(t, state[name], rtol=0, atol=EXACT)
    for place, A in zip(confined.places, drawn, strict=True):
        assert not place.trained()[0].any()
        assert torch.equal(place.trained()[1], A)


def test_release_leaves_the_sum_and_a_plain_model():
    model, plain = mlp(), mlp()
    confined = confine(model, subspaces(), rank=RANK)
    optimizer = adamw(model.parameters())
    train(model, optimizer, 5)
    expected, x = weights(model), batch(50)
    y = model(x).detach()
    confined.release()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad
    for name, W in expected.items():
        assert torch.equal(model.get_parameter(name), W)
    assert off(model(x), y) < EXACT
    with pytest.raises(RuntimeError, match=r"made after Confined\.release"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["as it was saved", "as it was confined"])
def test_training_goes_on_from_a_state(start, dtype):
    given = subspaces(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    model = mlp(dtype)
    first = {n: t.clone() for n, t in model.state_dict().items()}
    confined = confine(model, given, rank=RANK)
    optimizer = adamw(model.parameters())
    train(model, optimizer, 4, dtype=dtype)
    saved = io.BytesIO()
    now = model.state_dict()
    if start == "as it was confined":
        now = now | {n: t for n, t in first.items() if t.dim() > 1}
    torch.save((now, confined.state_dict(), optimizer.state_dict()), saved)
    train(model, optimizer, 4, start=4, dtype=dtype)

    saved.seek(0)
    of_model, of_confined, of_optimizer = torch.load(saved)
    other = mlp(dtype)
    other.load_state_dict(of_model)
    again = confine(other, of_confined)
    assert again.rank == RANK
    assert again.update == "beside"
    resumed = adamw(other.parameters())
    resumed.load_state_dict(of_optimizer)
    train(other, resumed, 4, start=4, dtype=dtype)
    tolerance = {torch.float64: EXACT, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for t, expected in zip(again.parameters(), confined.parameters(), strict=True):
        assert off(t, expected) <= tolerance
    x = batch(50, dtype)
    assert off(other(x).double(), model(x).double()) <= tolerance


def test_a_copy_of_the_model_trains_by_itself():
    model = mlp()
    confine(model, subspaces(), rank=RANK)
    other = copy.deepcopy(model)
    train(other, adamw(other.parameters()), 3)
    assert not any(t.any() for place in places_of(model) for t in place.trained()[:1])
    assert all(t.any() for place in places_of(other) for t in place.trained())


def test_a_plan_is_of_the_factors():
    confined = confine(mlp(), subspaces(), rank=RANK)
    text = confined.plan(64)
    flops = RANK * 6 * 64 * (M + N)
    assert "rank 3, 64 tokens: as a LoRA beside the weight" in text
    assert float(text.split("it and its gradient ")[1].split()[0]) >= flops / (2 * 64 * M * N)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 8}, "a free block of at least rank=8, got 9 by 7"),
        ({"rank": 0}, "rank to be an int of at least 1"),
        ({"rank": True}, "rank to be an int of at least 1"),
        ({"rank": 2, "update": "merge"}, 'update="beside" with rank'),
        ({"rank": 2, "decay_to": "zero"}, 'decay_to="start"'),
    ],
)
def test_ranks_that_make_no_sense_are_refused_before_anything_is_changed(options, match):
    model = mlp()
    given = subspaces()
    given["2.weight"] = Subspace(
        draw_basis(N, 9, "high", torch.float64, generator_for(1)),
        draw_basis(M, 7, "high", torch.float64, generator_for(2)),
    )
    with pytest.raises(ValueError, match=match):
        confine(model, given, **options)
    assert not places_of(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_next_task_is_for_weights_that_are_merged():
    confined = confine(mlp(), subspaces(), rank=RANK)
    with pytest.raises(RuntimeError, match=r'Confined.next_task: expected update="merge"'):
        confined.next_task()


def test_a_state_of_another_rank_is_refused():
    model, other = mlp(), mlp()
    state = confine(model, subspaces(), rank=RANK).state_dict()
    with pytest.raises(ValueError, match=r"expected a state with rank=2, got 3"):
        confine(other, subspaces(), rank=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"rank to be left out with a state"):
        confine(mlp(), state, rank=2)
