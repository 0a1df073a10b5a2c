"""integrations.galore: the projector against GaLore's formula in float64, and the switch."""

from __future__ import annotations

import copy
import importlib
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from osf_kernels.testing import matrix_with_spectrum, orthonormality_ratio
from osf_torch.integrations import galore
from osf_torch.integrations.galore import GaLoreProjector
from tests.helpers import generator_for, randn

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")


def side_of(proj_type: str, shape: tuple[int, int]) -> str:
    tall = shape[0] >= shape[1]
    if proj_type == "std":
        return "right" if tall else "left"
    if proj_type == "reverse_std":
        return "left" if tall else "right"
    return proj_type


class Formula:
    """GaLore's projector written down with torch.linalg.svd in ``dtype``; signs as ours are."""

    def __init__(self, rank, gap=200, scale=1.0, proj_type="std", dtype=torch.float64):
        self.rank, self.gap, self.scale, self.proj_type = rank, gap, scale, proj_type
        self.dtype, self.U, self.V, self.side = dtype, None, None, ""

    def project(self, G: Tensor, step: int) -> Tensor:
        G = G.to(self.dtype)
        self.side = side_of(self.proj_type, tuple(G.shape))
        if self.U is None or step % self.gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            U, V = U[:, : self.rank], Vh[: self.rank].mT
            of = U if self.side == "left" else V
            signs = of.gather(0, of.abs().argmax(0, keepdim=True)).sign()
            self.U, self.V = U * signs, V * signs
        if self.side == "full":
            return self.U.mT @ G @ self.V
        return G @ self.V if self.side == "right" else self.U.mT @ G

    def project_back(self, low: Tensor) -> Tensor:
        low = low.to(self.dtype)
        if self.side == "full":
            return self.scale * (self.U @ low @ self.V.mT)
        return self.scale * (low @ self.V.mT if self.side == "right" else self.U @ low)


def gapped(m: int, n: int, r: int, *key: object) -> Tensor:
    """A float64 gradient whose leading r directions are well defined: σ_r = 1, σ_{r+1} = .5."""
    small = min(m, n)
    lead = torch.linspace(2, 1, min(r, small), dtype=torch.float64)
    tail = torch.linspace(0.5, 0.1, small - len(lead), dtype=torch.float64)
    A, _, _ = matrix_with_spectrum(
        m, n, torch.cat([lead, tail]), generator=generator_for(m, n, *key)
    )
    return A.double()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# the projection


@settings(max_examples=50, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    r=st.integers(1, 48),
    proj_type=st.sampled_from(PROJ_TYPES),
    scale=st.sampled_from([1.0, 0.25]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_there_and_back_is_the_formula(m, n, r, proj_type, scale, dtype):
    G = gapped(m, n, r, r).to(dtype)
    ours = GaLoreProjector(r, scale=scale, proj_type=proj_type)
    truth = Formula(r, scale=scale, proj_type=proj_type)
    plain = Formula(r, scale=scale, proj_type=proj_type, dtype=dtype)
    low, wanted = ours.project(G, 0), truth.project(G, 0)
    assert low.shape == wanted.shape
    assert low.dtype == dtype
    back, wanted = ours.project_back(low), truth.project_back(wanted)
    # In float64 the formula is its own truth: a few rounding errors over the relative gap of 1/4.
    rounding = torch.finfo(dtype).eps * math.sqrt(max(m, n))
    same_dtype = relative(plain.project_back(plain.project(G, 0)), wanted)
    allowed = 4 * same_dtype if dtype == torch.float32 else 24 * rounding
    assert relative(back, wanted) <= allowed + 8 * rounding
    bases = ours.ortho_matrix if proj_type == "full" else [ours.ortho_matrix]
    for basis in bases:
        columns = basis if basis.shape[0] == m and basis.shape[1] == min(r, m, n) else basis.mT
        assert orthonormality_ratio(columns) < 30


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_bases_are_laid_out_as_galore_torch_does(shape, proj_type):
    m, n = shape
    projector = GaLoreProjector(4, proj_type=proj_type)
    assert projector.ortho_matrix is None
    low = projector.project(gapped(m, n, 4), 0)
    held, side = projector.ortho_matrix, side_of(proj_type, shape)
    shapes = [tuple(basis.shape) for basis in held] if side == "full" else tuple(held.shape)
    assert shapes == {"right": (4, n), "left": (m, 4), "full": [(m, 4), (4, n)]}[side]
    assert tuple(low.shape) == {"right": (m, 4), "left": (4, n), "full": (4, 4)}[side]
    for basis in held if side == "full" else [held]:
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()


@pytest.mark.parametrize("r", [6, 12])
def test_the_side_is_the_one_that_was_projected(r):
    """Of a wide gradient of full rank (m, m) is low on the right, where shapes say left."""
    G = gapped(6, 10, r)
    projector = GaLoreProjector(r, proj_type="reverse_std")
    low = projector.project(G, 0)
    assert low.shape == (6, 6)
    assert relative(projector.project_back(low), G) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_half_precision(dtype, proj_type):
    G = gapped(40, 24, 5).to(dtype)
    ours, truth = GaLoreProjector(5, proj_type=proj_type), Formula(5, proj_type=proj_type)
    plain = Formula(5, proj_type=proj_type, dtype=torch.float32)
    plain.project(G, 0)
    for name in "UV":  # what a projector that keeps its basis in the gradient's dtype has
        setattr(plain, name, getattr(plain, name).to(dtype))
    plain.dtype = dtype
    wanted = truth.project_back(truth.project(G, 0))
    theirs = relative(plain.project_back(plain.project(G, 1)), wanted)
    back = ours.project_back(ours.project(G, 0))
    assert back.dtype == dtype
    assert relative(back, wanted) <= 2 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize(("m", "n", "r"), [(512, 384, 28), (384, 512, 20)])
def test_iterated_bases_of_a_slow_spectrum(m, n, r):
    """No gap to speak of: what a basis captures is what the best one does, and nearly its span."""
    spectrum = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.5
    G, _, _ = matrix_with_spectrum(m, n, spectrum, generator=generator_for(m, n, r))
    projector = GaLoreProjector(r)
    projector.project(G.float(), 0)
    assert projector.method == "randomized"
    best = float(spectrum[:r].square().sum() / spectrum.square().sum())
    assert float(projector.captured) == pytest.approx(best, rel=1e-4)
    truth = Formula(r)
    truth.project(G, 0)
    wanted = truth.V if m >= n else truth.U
    basis = projector.ortho_matrix.mT if m >= n else projector.ortho_matrix
    assert float((wanted.mT @ basis.double()).square().sum()) / r > 0.999


# refreshes


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_refreshes_at_the_steps_of_the_gap_and_starts_warm(proj_type, monkeypatch):
    starts = []
    run = galore.truncated_svd

    def recorded(A, rank, **options):
        starts.append(options["warm_start"])
        return run(A, rank, **options)

    monkeypatch.setattr(galore, "truncated_svd", recorded)
    projector = GaLoreProjector(4, update_proj_gap=3, proj_type=proj_type)
    G = gapped(24, 16, 4).float()
    before = None
    for step in range(1, 8):  # the first one whatever its number, then 3 and 6
        before = projector.ortho_matrix
        projector.project(G + 1e-4 * gapped(24, 16, 4, "other", step).float(), step)
        assert (projector.ortho_matrix is before) is (step in (2, 4, 5, 7))
    assert projector.refreshes == len(starts) == 3
    assert starts[0] is None
    assert starts[1].shape == ({"left": 24, "reverse_std": 24}.get(proj_type, 16), 4)
    assert projector.method == "warm"


def test_a_warm_start_that_no_longer_fits_is_dropped():
    projector = GaLoreProjector(8)
    projector.project(gapped(400, 330, 8, "before").float(), 0)
    after = gapped(400, 330, 8, "after")
    back = projector.project_back(projector.project(after.float(), 0))
    truth = Formula(8)
    assert projector.method == "randomized"
    assert relative(back, truth.project_back(truth.project(after, 0))) < 1e-4


def test_a_tolerance_is_met():
    spectrum = torch.arange(1, 385, dtype=torch.float64) ** -0.5
    G, _, _ = matrix_with_spectrum(400, 384, spectrum, generator=generator_for("tol"))
    projector = GaLoreProjector(16, tol=1e-5, update_proj_gap=1)
    truth = Formula(16)
    truth.project(G, 0)
    for step in range(2):
        projector.project(G.float(), step)
        # sin θ ≤ residual · σ₁ / gap, and the gap at 16 is .0074
        missing = projector.ortho_matrix.mT.double()
        missing = missing - truth.V @ (truth.V.mT @ missing)
        assert float(torch.linalg.matrix_norm(missing, 2)) < 1e-5 / 0.0074


def test_of_a_gradient_that_is_zero():
    projector = GaLoreProjector(3, update_proj_gap=1)
    G = gapped(12, 8, 3).float()
    for step, gradient in enumerate([torch.zeros(12, 8), G, torch.zeros(12, 8), G]):
        low = projector.project(gradient, step)
        assert orthonormality_ratio(projector.ortho_matrix.mT) < 30
        assert bool(low.isfinite().all())
    truth = Formula(3)
    assert relative(projector.project_back(low), truth.project_back(truth.project(G, 0))) < 1e-5


def test_random_numbers_are_its_own():
    G = gapped(400, 330, 8).float()
    state = torch.get_rng_state()
    a, b, other = GaLoreProjector(8), GaLoreProjector(8), GaLoreProjector(8, seed=7)
    first = a.project(G, 0)
    torch.manual_seed(11)
    assert torch.equal(b.project(G, 0), first)
    assert not torch.equal(other.project(G, 0), first)
    torch.set_rng_state(state)
    a.project(G, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_goes_on_as_the_original_would(copied):
    first, second = gapped(400, 330, 8).float(), gapped(400, 330, 8, "then").float()
    projector = GaLoreProjector(8, update_proj_gap=5, scale=0.25)
    projector.project(first, 0)
    twin = copied(projector)
    for step, G in ((1, first), (5, second)):
        low, same = projector.project(G, step), twin.project(G, step)
        assert torch.equal(low, same)
        assert torch.equal(projector.project_back(low), twin.project_back(same))


def stored(projector: GaLoreProjector) -> io.BytesIO:
    """In optimizer state, as galore-torch's optimizers keep it."""
    file = io.BytesIO()
    torch.save({"state": {0: {"step": 1, "projector": projector}}}, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("projected", [True, False])
def test_a_checkpoint_loads(weights_only, proj_type, projected):
    projector = GaLoreProjector(8, update_proj_gap=5, proj_type=proj_type)
    if projected:
        projector.project(gapped(40, 33, 8).float(), 0)
    loaded = torch.load(stored(projector), weights_only=weights_only)["state"][0]["projector"]
    for step, key in ((1, "between"), (5, "refresh")):
        G = gapped(40, 33, 8, key).float()
        low, same = projector.project(G, step), loaded.project(G, step)
        assert torch.equal(low, same)
        assert torch.equal(projector.project_back(low), loaded.project_back(same))


@pytest.mark.slow
def test_a_checkpoint_loads_in_a_process_that_imports_the_module_alone(tmp_path):
    projector = GaLoreProjector(4)
    projector.project(gapped(12, 8, 4), 0)
    path = tmp_path / "optimizer.pt"
    path.write_bytes(stored(projector).read())
    code = (
        "import torch, osf_torch.integrations.galore\n"
        f"held = torch.load({str(path)!r}, weights_only=True)['state'][0]['projector']\n"
        "print(held.project(torch.ones(12, 8, dtype=torch.float64), 1).shape)"
    )
    source = Path(galore.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{source.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "torch.Size([12, 4])", done.stderr


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rank", "four", "rank to be at least 1, got four"),
        ("update_proj_gap", 0, "update_proj_gap to be at least 1"),
        ("proj_type", "up", "proj_type to be one of"),
        ("_side", "up", "ortho_matrix to be one basis, or two of a full, got a Tensor and up"),
        ("_side", "full", "ortho_matrix to be one basis"),
        ("ortho_matrix", "a string", "ortho_matrix to be one basis"),
        ("ortho_matrix", torch.zeros(3), "ortho_matrix to be one basis"),
        ("other", 1, "the state of one, got rank, .*, other"),
    ],
)
def test_a_state_that_is_no_projectors_is_refused(name, value, expected):
    projector = GaLoreProjector(4)
    projector.project(gapped(12, 8, 4), 0)
    projector.__dict__[name] = value
    with pytest.raises(ValueError, match=expected):
        torch.load(stored(projector), weights_only=True)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("before", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("after", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_run_goes_on_in_another_precision(proj_type, before, after):
    G = gapped(24, 16, 4)
    projector = GaLoreProjector(4, update_proj_gap=3, proj_type=proj_type)
    projector.project(G.to(before), 0)
    truth = Formula(4, proj_type=proj_type)
    wanted = truth.project_back(truth.project(G, 0))
    for step in (1, 2, 3, 4):  # between refreshes, at one, after it
        low = projector.project(G.to(after), step)
        assert low.dtype == after
        for dtype in (after, torch.float32):  # Adam's moments may be kept in float32
            back = projector.project_back(low.to(dtype))
            assert back.dtype == dtype
            rounding = max(torch.finfo(dtype).eps for dtype in (before, after, dtype))
            assert relative(back, wanted) < 16 * rounding


def test_a_run_goes_on_on_another_device():
    projector = GaLoreProjector(4, update_proj_gap=3)
    projector.project(gapped(24, 16, 4).float(), 0)
    low = projector.project(torch.empty(24, 16, device="meta"), 1)
    assert low.is_meta
    assert projector.project_back(low).shape == (24, 16)


def test_the_gradient_is_not_written_and_needs_no_autograd():
    G = gapped(12, 8, 3).float().requires_grad_()
    before = G.detach().clone()
    projector = GaLoreProjector(3)
    low = projector.project(G, 0)
    assert not projector.project_back(low).requires_grad
    assert torch.equal(G, before)


# what is refused


def test_refusals():
    prefix = r"osf_torch\.integrations\.galore\.GaLoreProjector"
    with pytest.raises(ValueError, match=prefix + ": expected rank to be at least 1, got 0"):
        GaLoreProjector(0)
    with pytest.raises(ValueError, match="update_proj_gap to be at least 1, got -1"):
        GaLoreProjector(4, update_proj_gap=-1)
    with pytest.raises(ValueError, match=r"proj_type to be one of std, .*, got both"):
        GaLoreProjector(4, proj_type="both")
    projector = GaLoreProjector(4)
    with pytest.raises(ValueError, match=r"project_back: expected a projected gradient"):
        projector.project_back(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"expected an \(m, n\) gradient, got \(2, 3, 4\)"):
        projector.project(torch.ones(2, 3, 4), 0)
    with pytest.raises(ValueError, match='to be "right", "left" or "full", got up'):
        projector.get_orthogonal_matrix(torch.eye(4), 2, "up")


@pytest.mark.parametrize(
    ("proj_type", "others"),
    [
        ("right", [(12, 9), (8, 12)]),
        ("left", [(9, 8), (8, 12)]),
        ("full", [(12, 9), (9, 8), (8, 12)]),
        ("std", [(12, 9), (8, 12), (8, 13)]),
    ],
)
def test_a_gradient_of_another_shape_waits_for_a_refresh(proj_type, others):
    projector = GaLoreProjector(3, update_proj_gap=10, proj_type=proj_type)
    low = projector.project(torch.randn(12, 8), 0)
    held = copy.deepcopy(projector.ortho_matrix)
    for shape in others:
        match = rf"expected a gradient of the shape that the last refresh saw, .*got .{shape[0]}, "
        with pytest.raises(ValueError, match=match):
            projector.project(torch.randn(shape), 1)
    for a, b in zip(projector.ortho_matrix, held, strict=True):
        assert torch.equal(a, b)
    assert projector.project(torch.randn(12, 8), 1).shape == low.shape
    for shape in others:
        projector.project(torch.randn(shape), 10)
        assert projector.project(torch.randn(shape), 11).numel()


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_told_as_one(proj_type, value):
    G = gapped(12, 8, 3)
    G[1, 2] = G[4, 5] = value
    projector = GaLoreProjector(3, proj_type=proj_type)
    with pytest.raises(ValueError) as caught:
        projector.project(G, 0)
    assert str(caught.value) == (
        "osf_torch.integrations.galore.GaLoreProjector.project: expected a finite gradient, "
        "got 2 NaN or Inf of 96; leave the step out (GradScaler), lower the loss scale"
    )
    with pytest.raises(ValueError, match="truncated_svd"):  # what else is wrong is told as it is
        GaLoreProjector(3, tol=-1.0).project(gapped(12, 8, 3), 0)


def test_a_nan_leaves_the_basis_as_it_was():
    projector = GaLoreProjector(3, update_proj_gap=1)
    projector.project(gapped(12, 8, 3), 0)
    before = projector.ortho_matrix.clone()
    with pytest.raises(ValueError, match="finite"):
        projector.project(torch.full((12, 8), math.nan), 1)
    assert torch.equal(projector.ortho_matrix, before)
    assert projector.refreshes == 1


# training


def trained(projectors, steps: int, dtype: torch.dtype) -> list[float]:
    """Losses of a small regression under GaLore's Adam: moments of the low-rank gradient."""
    generator = generator_for("training")
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 6)).to(dtype)
    x = randn(64, 12, dtype=torch.float64, generator=generator)
    y = torch.sin(x @ randn(12, 6, dtype=torch.float64, generator=generator)).to(dtype)
    for p in model.parameters():
        p.data = 0.3 * randn(*p.shape, dtype=dtype, generator=generator)
    weights = [p for p in model.parameters() if p.dim() == 2]
    moments: dict[int, tuple[Tensor, Tensor]] = {}
    losses = []
    for step in range(steps):
        model.zero_grad()
        loss = (model(x.to(dtype)) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for i, p in enumerate(weights):
                low = projectors[i].project(p.grad, step)
                mean, square = moments.setdefault(i, (torch.zeros_like(low), torch.zeros_like(low)))
                mean.mul_(0.9).add_(low, alpha=0.1)
                square.mul_(0.999).addcmul_(low, low, value=0.001)
                rate = 0.02 * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
                update = projectors[i].project_back(mean / (square.sqrt() + 1e-8))
                p.sub_(update.to(dtype), alpha=rate)
    return losses


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_training_follows_the_formula(proj_type):
    """In float64 step by step, over refreshes, cold and warm."""
    options = {"scale": 0.5, "proj_type": proj_type}
    ours = trained(
        [GaLoreProjector(4, update_proj_gap=10, **options) for _ in range(2)], 40, torch.float64
    )
    wanted = trained([Formula(4, gap=10, **options) for _ in range(2)], 40, torch.float64)
    assert wanted[-1] < 0.9 * wanted[0], "it did train"
    first = [abs(a - b) / b for a, b in zip(ours[:10], wanted[:10], strict=True)]
    assert max(first) < 1e-9
    # From the second refresh on a basis is as right as a warm start is taken to be.
    assert max(abs(a - b) / b for a, b in zip(ours, wanted, strict=True)) < 2e-2


def test_training_in_float32_ends_where_the_formula_does():
    ours = trained([GaLoreProjector(4, update_proj_gap=10) for _ in range(2)], 100, torch.float32)
    wanted = trained([Formula(4, gap=10) for _ in range(2)], 100, torch.float64)
    assert wanted[-1] < 0.5 * wanted[0]
    assert ours[-1] == pytest.approx(wanted[-1], rel=0.1)


# the switch


@pytest.fixture
def switched_off() -> Iterator[None]:
    yield
    galore.disable()


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, bits: bool) -> None:
    """A package laid out as galore-torch 1.0, with or without what its 8-bit optimizer needs."""
    package = tmp_path / "galore_torch"
    package.mkdir()
    arguments = "self, rank, verbose=False, update_proj_gap=200, scale=1.0, proj_type='std'"
    (package / "galore_projector.py").write_text(
        f"class GaLoreProjector:\n    def __init__({arguments}):\n        pass\n"
    )
    taken = "from .galore_projector import GaLoreProjector\n\n"
    body = "class Optimizer:\n    def projector(self, *a, **k):\n"
    body += "        return GaLoreProjector(*a, **k)\n"
    for name in ("adafactor", "adamw", "adamw8bit"):
        needs = "import bitsandbytes\n" if name == "adamw8bit" else ""
        (package / f"{name}.py").write_text(needs + taken + body)
    order = ("adafactor", "adamw", "adamw8bit")
    (package / "__init__.py").write_text("".join(f"from . import {name}\n" for name in order))
    info = tmp_path / f"galore_torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: galore-torch\nVersion: {version}\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "galore_torch"]:
        monkeypatch.delitem(sys.modules, name)
    # None in sys.modules is what isn't there to import.
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys if bits else None)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("", *(f".{name}" for name in (*order, "galore_projector"))):
        monkeypatch.setitem(sys.modules, "galore_torch" + name, sys)
        monkeypatch.delitem(sys.modules, "galore_torch" + name)


@pytest.mark.usefixtures("switched_off")
@pytest.mark.parametrize("bits", [True, False])
def test_enable_switches_every_optimizer_that_imports(tmp_path, monkeypatch, bits):
    pretend(tmp_path, monkeypatch, "1.0", bits)
    names = {"adamw", "adafactor"} | ({"adamw8bit"} if bits else set())
    assert set(galore.enable()) == {f"galore_torch.{name}" for name in names}
    assert set(galore.enable()) == {f"galore_torch.{name}" for name in names}
    for name in names:
        module = importlib.import_module(f"galore_torch.{name}")
        made = module.Optimizer().projector(4, update_proj_gap=2, scale=0.5, proj_type="left")
        assert type(made) is GaLoreProjector
        assert (made.rank, made.update_proj_gap, made.scale) == (4, 2, 0.5)
    if bits:  # pickle imports the package, which needs them
        own = importlib.import_module("galore_torch.galore_projector").GaLoreProjector
        assert type(pickle.loads(pickle.dumps(own(4)))) is own, "one from before, in a checkpoint"
    galore.disable()
    galore.disable()
    for name in names:
        module = importlib.import_module(f"galore_torch.{name}")
        assert module.GaLoreProjector.__module__ == "galore_torch.galore_projector"


@pytest.mark.usefixtures("switched_off")
@pytest.mark.parametrize("how", ["missing", "other arguments"])
def test_enable_switches_all_or_nothing(tmp_path, monkeypatch, how):
    pretend(tmp_path, monkeypatch, "1.0", True)
    adamw, adafactor = (
        importlib.import_module(f"galore_torch.{n}") for n in ("adamw", "adafactor")
    )
    own = adamw.GaLoreProjector
    if how == "missing":
        del adafactor.GaLoreProjector
    else:
        adafactor.GaLoreProjector = lambda rank, quantized: None
    for _ in range(2):
        text = r"galore\.enable: expected galore_torch\.adafactor\.GaLoreProjector to take \(rank, "
        with pytest.raises(ImportError, match=text + ".*galore-torch >=1.0,<2, got .* in 1.0"):
            galore.enable()
        assert adamw.GaLoreProjector is own
    adafactor.GaLoreProjector = own
    galore.enable()
    assert adamw.GaLoreProjector is adafactor.GaLoreProjector is GaLoreProjector


@pytest.mark.usefixtures("switched_off")
def test_enable_names_the_supported_versions(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, "2.0", True)
    text = r"integrations\.galore: expected galore-torch >=1\.0,<2 to be installed, got 2\.0"
    with pytest.raises(ImportError, match=text + '; pip install "galore-torch>=1.0,<2"'):
        galore.enable()
    assert "galore_torch" not in sys.modules


@pytest.mark.usefixtures("switched_off")
def test_enable_passes_on_what_else_fails_to_import(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, "1.0", True)
    path = tmp_path / "galore_torch" / "adafactor.py"
    path.write_text("import osf_no_such_module\n")
    with pytest.raises(ImportError, match="expected galore_torch to import, got ModuleNotFound"):
        galore.enable()


# beside galore-torch itself


@pytest.fixture
def peer() -> Iterator[object]:
    """galore_torch.galore_projector, where galore-torch is installed."""
    try:
        galore.enable()
    except ImportError as error:
        pytest.skip(f"without galore-torch: {error}")
    galore.disable()
    yield sys.modules["galore_torch.galore_projector"]
    galore.disable()


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_there_and_back_is_galore_torchs(peer, shape, proj_type):
    ours = GaLoreProjector(5, update_proj_gap=2, scale=0.25, proj_type=proj_type)
    theirs = peer.GaLoreProjector(5, update_proj_gap=2, scale=0.25, proj_type=proj_type)
    for step in range(5):
        G = gapped(*shape, 5, step).float()
        low, other = ours.project(G, step), theirs.project(G, step)
        assert low.shape == other.shape
        if step % 2 == 0:  # in between a float32 basis of another gradient: its rounding counts
            truth = Formula(5, scale=0.25, proj_type=proj_type)
            wanted = truth.project_back(truth.project(G, 0))
            error = relative(theirs.project_back(other), wanted)
            assert relative(ours.project_back(low), wanted) <= 4 * error + 1e-6
        assert relative(ours.project_back(low), theirs.project_back(other)) < 1e-4


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_galore_torchs_optimizers_train_alike(peer, name):
    del peer
    module = importlib.import_module(f"galore_torch.{name}")
    kind, options = {
        "adamw": ("AdamW", {"no_deprecation_warning": True, "lr": 0.02}),
        "adafactor": ("Adafactor", {"lr": 0.02, "scale_parameter": False, "relative_step": False}),
    }[name]

    def losses() -> list[float]:
        generator = generator_for("galore-torch")
        W = nn.Parameter(randn(24, 16, dtype=torch.float32, generator=generator))
        target = randn(24, 16, dtype=torch.float32, generator=generator)
        group = {"rank": 4, "update_proj_gap": 100, "scale": 1.0, "proj_type": "std"}
        optimizer = getattr(module, kind)([{"params": [W], **group}], **options)
        values = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (W - target).square().mean()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        found = type(optimizer.state[W]["projector"])
        values.append(float(found is GaLoreProjector))
        return values

    theirs = losses()
    galore.enable()
    ours = losses()
    assert (theirs.pop(), ours.pop()) == (0.0, 1.0)
    assert ours[-1] < 0.95 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)
