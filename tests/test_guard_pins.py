"""What a guard pins is the weight as it is at protect, however rough its decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from osf_kernels import project
from osf_kernels.testing import matrix_with_spectrum
from osf_torch import Subspace, protect, refresh
from tests.helpers import generator_for
from tests.small_guard import adamw, drawn

SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "slow": lambda i: i**-0.25,
    "power law": lambda i: i**-0.5,
    "steep": lambda i: i**-2.0,
    "outlier": lambda i: torch.where(i == 1, 1.0, 0.012).double(),
}
n = 96


def one(name, dtype=torch.float32, rows=n):
    i = torch.arange(1, min(rows, n) + 1, dtype=torch.float64)
    gen = generator_for("pins", name, rows)
    W = matrix_with_spectrum(rows, n, SPECTRA[name](i), dtype=torch.float64, generator=gen)[0]
    model = nn.Sequential(nn.Linear(n, rows, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(W)
    return model.to(dtype)


def rough(model, rank, noise=0.05):
    """Triplets as an iteration that stopped early gives them: exact on one side by construction."""
    W = model[0].weight.detach().double()
    V = torch.linalg.svd(W)[2][:rank].mT
    V = torch.linalg.qr(V + noise / V.shape[0] ** 0.5 * torch.randn(V.shape, dtype=V.dtype))[0]
    U, S, Wh = torch.linalg.svd(W @ V, full_matrices=False)
    dtype = torch.float64 if model[0].weight.dtype == torch.float64 else torch.float32
    return Subspace(U.to(dtype), (V @ Wh.mT).to(dtype), S.to(dtype))


def stepped(model, optimizer):
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()


def moved(before, after):
    return float((after.double() - before.double()).norm() / before.double().norm())


def protected_part(W, s, mode):
    return W - project(W, s.U, s.V, mode=mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_step_of_nothing_moves_a_weight_by_its_rounding(name, rank, mode, dtype):
    model = one(name, dtype)
    given = {"0.weight": rough(model, rank)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = protect(model, given, optimizer=optimizer, mode=mode)
    before = model[0].weight.detach().clone()
    stepped(model, optimizer)
    eps = torch.finfo(dtype).eps
    assert moved(before, model[0].weight.detach()) <= 4 * eps
    assert guard.drift()["0.weight"] <= 8 * eps * before.norm() / given["0.weight"].S.norm()
    guard.verify()


@pytest.mark.parametrize("ratio", [0.03, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"complement": False}], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_what_refresh_makes_protect_takes_and_pins(name, options, ratio):
    model = one(name, rows=2 * n)
    found = refresh(model, ratio, progress=False, **options)
    optimizer = adamw(model)
    guard = protect(model, found, optimizer=optimizer)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.randn_like(model[0].weight)
    optimizer.step()
    s = found["0.weight"]
    W = [w.detach().double() for w in (before, model[0].weight)]
    double = Subspace(*(basis_in_double(b) for b in (s.U, s.V)))
    was, now = (protected_part(w, double, "complement") for w in W)
    limit = 2e-3 if "dtype" in options else 2e-6
    assert moved(before, model[0].weight.detach()) > 1e-3, "it did train"
    assert float((now - was).norm() / was.norm()) <= limit
    drift = float((now - was).norm() / was.norm())
    assert guard.drift()["0.weight"] == pytest.approx(drift, rel=0.05)
    guard.verify()


def basis_in_double(basis):
    return type(basis)(basis.columns.double(), basis.spans)


def test_drift_is_of_the_weight_and_not_of_its_triplets():
    model = one("slow")
    s = rough(model, 8)
    U, S, V = s.U.double(), s.S.double(), s.V.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = protect(model, {"0.weight": s}, optimizer=optimizer)
    stepped(model, optimizer)
    before = model[0].weight.detach().double()
    was = protected_part(before, Subspace(U, V), "complement")
    with torch.no_grad():  # what restoring from S alone would do
        model[0].weight.copy_(project(before, U, V) + (U * S) @ V.mT)
    now = protected_part(model[0].weight.detach().double(), Subspace(U, V), "complement")
    away = float((now - was).norm() / was.norm())
    assert away > 1e-3
    assert guard.drift()["0.weight"] == pytest.approx(away, rel=1e-3)
    with pytest.raises(RuntimeError, match=r"expected the protected part of '0\.weight'"):
        guard.verify()


@pytest.mark.parametrize("rank", [4, 30, 90])
def test_what_is_held_beside_triplets_is_as_small_as_accuracy_allows(rank):
    model = one("power law")
    W = model[0].weight.detach().double()
    U, S, Vh = torch.linalg.svd(W)
    exact = Subspace(*(t.float() for t in (U[:, :rank], Vh[:rank].mT, S[:rank])))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    held = {}
    for name, s in {"exact": exact, "rough": rough(model, rank)}.items():
        guard = protect(model, {"0.weight": s}, optimizer=optimizer)
        (item,) = guard._items.values()
        rests = [t for t in (item.held.rest_A, item.held.rest_B) if t is not None]
        held[name] = sum(t.nbytes for t in rests) + (
            0 if item.held.protected is None else item.held.protected.nbytes
        )
    dense = W.numel() * 4
    assert held["exact"] <= min(dense, rank * 2 * n * 2), "16 bits where they do"
    assert held["exact"] <= held["rough"] <= min(dense, rank * 2 * n * 4)


def test_subspaces_of_another_weight_are_refused_on_either_side():
    model, other = one("power law"), one("slow")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine = rough(model, 12)
    for s in (
        rough(other, 12),
        Subspace(mine.V, mine.U, mine.S),
        Subspace(mine.U, mine.V, mine.S * 1.5),
    ):
        with pytest.raises(ValueError, match=r"'0\.weight' to be singular triplets of it"):
            protect(model, {"0.weight": s}, optimizer=optimizer)
    H = protected_part(model[0].weight.detach(), mine, "complement")
    with pytest.raises(ValueError, match=r"protected of parameter '0\.weight' to be W - P\(W\)"):
        protect(model, {"0.weight": Subspace(mine.U, mine.V, None, 1.1 * H)}, optimizer=optimizer)
    protect(model, {"0.weight": Subspace(mine.U, mine.V, None, H)}, optimizer=optimizer)


def test_columns_that_are_nearly_orthonormal_are_refused_by_their_dtype():
    model = drawn(nn.Sequential(nn.Linear(20, 20)), "columns")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    U = torch.linalg.qr(torch.randn(20, 4))[0]
    off = U * (1 + 2e-4)
    with pytest.raises(ValueError, match=r"U'U off from I by 4\.0e-04"):
        protect(model, {"0.weight": Subspace(off, None)}, optimizer=optimizer)
    protect(model, {"0.weight": Subspace(off.bfloat16(), None)}, optimizer=optimizer)
