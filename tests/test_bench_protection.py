"""bench.protection: what is measured about a protected training step."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import bench.__main__
from bench import minilm, protection, protection_plot, protection_rows, protection_trainers, report
from osf_torch import refresh
from tests.helpers import generator_for


def small():
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    gen = generator_for("bench protection")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
    options = {"keep": "all", "compute_dtype": torch.float64, "progress": False}
    return model, refresh(model, 0.5, **options)


def test_contenders_project_alike_and_only_ours_restores():
    model, subspaces = small()
    x = torch.randn(8, 16, generator=generator_for("x"))
    changed, drifted = {}, {}
    for name in (
        protection_trainers.RESTORED,
        protection_trainers.PROJECTED,
        protection_trainers.EAGER,
    ):
        one = protection_trainers.trainer(name, model, subspaces)
        one.optimizer.zero_grad()
        one.model(x).square().mean().backward()
        one.optimizer.step()
        changed[name] = one.model[0].weight.grad.clone()
        drifted[name] = max(protection.drifts(model, one.model, subspaces).values())
        assert one.held_bytes > 0
    for grad in changed.values():
        assert torch.allclose(grad, changed[protection_trainers.RESTORED], atol=1e-6)
    assert drifted[protection_trainers.RESTORED] < 1e-6
    assert drifted[protection_trainers.PROJECTED] > 1e-5
    assert drifted[protection_trainers.EAGER] == pytest.approx(
        drifted[protection_trainers.PROJECTED], rel=1e-3
    )
    bare = protection_trainers.trainer(protection_trainers.UNPROTECTED, model, subspaces)
    assert bare.held_bytes == 0


def test_drift_is_of_the_protected_part():
    model, subspaces = small()
    other, _ = small()
    with torch.no_grad():
        other[0].weight.mul_(1.25)
    found = protection.drifts(model, other, subspaces)
    assert found["0.weight"] == pytest.approx(0.25, rel=1e-5)
    assert found["2.weight"] == 0.0


@pytest.mark.parametrize(
    ("overhead", "drift", "good"),
    [(0.1, 1e-6, True), (0.16, 1e-6, False), (0.1, 1e-4, False), (0.1, float("nan"), False)],
)
def test_what_counts_as_reached(overhead, drift, good):
    rows = [
        protection_rows.Row("case", protection_trainers.UNPROTECTED, 0.5, 2, overhead=0.0),
        protection_rows.Row("case", protection_trainers.RESTORED, 0.5, 2, overhead=0.5),
        protection_rows.Row(
            "case", protection_trainers.RESTORED, 0.5, 2, tokens=320, overhead=overhead
        ),
        protection_rows.Row("case", protection_trainers.RESTORED, 0.5, 2, steps=9, drift=drift),
        protection_rows.Row("case", protection_trainers.PROJECTED, 0.5, 2, steps=9, drift=0.3),
    ]
    found = protection_rows.missed(rows)
    assert (not found) == good
    if overhead > 0.15:
        assert found == ["overhead of 'protect' at 320 tokens a step is 16.0%, to be at most 15%"]
    elif not good:
        assert found == [f"drift of 'protect' after 9 steps is {drift:.1e}, to be at most 1e-05"]


@pytest.fixture
def small_encoder(monkeypatch):
    """The commands on an encoder of two small layers."""
    config = minilm.Config(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
    )
    torch.manual_seed(0)
    encoder = minilm.SentenceEncoder(config).eval()
    monkeypatch.setattr(minilm, "load", lambda _: encoder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small_encoder")
def test_the_command_names_what_it_missed(monkeypatch, capsys):
    monkeypatch.setattr(protection_rows, "DRIFT_TARGET", -1.0)
    monkeypatch.setattr(protection_rows, "OVERHEAD_TARGET", 1e9)
    monkeypatch.setattr(protection_rows, "LIMITS", ())
    command = ["protect", "--rho", "0.5", "--batch", "2", "--rounds", "1", "--drift-steps", "1"]
    assert bench.__main__.main([*command, "--drift-batch", "2"]) == 1
    assert "MISSED: drift of 'protect' after 1 steps is" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small_encoder")
def test_the_command(tmp_path, capsys):
    csv = tmp_path / "protect.csv"
    command = ["protect", "--rho", "0.5,0.8", "--batch", "2", "--rounds", "1"]
    drift = ["--drift-steps", "2", "--drift-batch", "2"]
    bench.__main__.main([*command, *drift, "--csv", str(csv)])
    out = capsys.readouterr().out
    rows = report.read_csv(csv)
    absent = protection_trainers.without_package(protection_trainers.COMPARED)
    assert len(rows) == 2 * (len(protection_trainers.COMPARED) - len(absent)) + 3
    for row in rows:
        assert row["contender"] in out
        assert row["rho"] in (("0.5",) if row["steps"] else ("0.5", "0.8"))
        assert row["drift"] if row["steps"] else float(row["median_ms"]) > 0
    assert "drift after 2 steps, confine, rho=0.5" in out
    for name in absent:
        assert f"LEFT OUT: {name!r}" in out


def test_bad_arguments_are_refused(capsys):
    assert bench.__main__.main(["protect", "--rho", "0.5,1.5"]) == 2
    assert "expected 0 < --rho < 1" in capsys.readouterr().err


# --- the contenders beside protect ---


def trained(name: str, steps: int = 1):
    model, subspaces = small()
    x = torch.randn(8, 16, generator=generator_for("x"))
    one = protection_trainers.trainer(name, model, subspaces)
    start = (one.model(x) - model(x)).abs().max()
    for _ in range(steps):
        one.optimizer.zero_grad()
        one.model(x).square().mean().backward()
        one.optimizer.step()
    return model, subspaces, one, float(start.detach())


def available():
    names = protection_trainers.COMPARED
    return [name for name in names if name not in protection_trainers.without_package(names)]


@pytest.mark.filterwarnings("ignore")
def test_every_contender_starts_from_the_model_and_trains_all_of_it():
    for name in available():
        model, _, one, start = trained(name)
        assert start < 1e-3, name
        assert len(one.others) == 2  # the biases
        for bias, before in zip(one.others, (model[0].bias, model[2].bias), strict=True):
            assert not torch.equal(bias, before), name


@pytest.mark.parametrize("name", [protection_trainers.CONFINED, protection_trainers.BESIDE])
def test_a_confined_model_doesnt_drift(name):
    model, subspaces, one, _ = trained(name, steps=5)
    assert max(protection.drifts(model, one.model, subspaces).values()) < 1e-6
    before, after = model.state_dict(), one.model.state_dict()
    assert list(after) == list(before)
    for weight in subspaces:
        assert not torch.allclose(after[weight], before[weight], atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_bytes_of_each_contender():
    sizes = {"0": (24, 16), "2": (16, 24)}
    weights = 4 * sum(m * n for m, n in sizes.values())
    biases = 4 * (24 + 16)
    rank = 8
    low = 4 * sum((min(s) - rank) * (m + n + 1) for s in sizes.values() for m, n in (s,))
    high = 4 * sum(rank * (m + n + 1) for m, n in sizes.values())
    free = 4 * sum((m - rank) * (n - rank) for m, n in sizes.values())
    scalars = 2 * 4  # AdamW counts the steps of each parameter
    parameters = {
        protection_trainers.CONFINED: weights + 2 * free,
        protection_trainers.BESIDE: weights + free,
        protection_trainers.PEFT_OSF: weights + low,
        protection_trainers.FACTORED: low + high,
    }
    for name in available():
        _, _, one, _ = trained(name)
        memory = one.memory()
        confined = name in (protection_trainers.CONFINED, protection_trainers.BESIDE)
        own = free if confined else low if name in protection_trainers.MODULES else weights
        factors = 3 if name in protection_trainers.MODULES else 1
        assert memory.parameters == parameters.get(name, weights) + biases, name
        assert memory.trained == 3 * own + factors * scalars, name
        assert memory.state == 2 * own + 2 * biases + (factors + 1) * scalars, name
        bare = (protection_trainers.UNPROTECTED, protection_trainers.FACTORED)
        assert (memory.held == 0) == (name in bare), name


def test_a_contender_whose_package_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    found = protection_trainers.without_package(protection_trainers.COMPARED)
    assert "peft" in found[protection_trainers.PEFT_OSF]
    assert protection_trainers.CONFINED not in found


def step(contender: str, rho: float, tokens: int = 5120, **figures):
    row = protection_rows.Row("MiniLM", contender, rho, 2, tokens, 1, 100.0, 90.0, 110.0)
    row.parameter_bytes, row.state_bytes, row.held_bytes = 100, 200, 0
    row.extra_bytes, row.peak_bytes, row.trained_bytes = 300, 600, 400
    for name, value in figures.items():
        assert hasattr(row, name)
        setattr(row, name, value)
    return row


@pytest.mark.parametrize(
    ("rho", "tokens", "figures", "reached"),
    [
        (0.5, 5120, {"median_ms": 103.0, "trained_bytes": 180}, True),
        (0.5, 5120, {"median_ms": 104.0, "trained_bytes": 180}, False),
        (0.8, 5120, {"median_ms": 100.0, "trained_bytes": 60}, True),
        (0.8, 5120, {"median_ms": 103.0, "trained_bytes": 60}, False),
        (0.5, 1280, {"median_ms": 110.0, "trained_bytes": 180}, True),
        (0.8, 1280, {"median_ms": 111.0, "trained_bytes": 60}, False),
        (0.5, 5120, {"trained_bytes": 181}, False),
        (0.8, 1280, {"trained_bytes": 61}, False),
        (0.5, 5120, {"peak_bytes": 700, "trained_bytes": 10}, True),
        (0.6, 5120, {"peak_bytes": 601, "trained_bytes": 10}, False),
        (0.7, 320, {"median_ms": 150.0, "peak_bytes": 599, "trained_bytes": 10}, True),
        (0.5, 5120, {"median_ms": float("nan"), "trained_bytes": 10}, False),
    ],
)
def test_figures_of_a_confined_step(rho, tokens, figures, reached):
    plain = step(protection_trainers.UNPROTECTED, rho, tokens)
    confined = step(protection_trainers.CONFINED, rho, tokens, **figures)
    beside = step(protection_trainers.BESIDE, rho, tokens, median_ms=900.0, trained_bytes=999)
    found = protection_rows.missed([plain, confined, beside])
    assert len(found) == (0 if reached else 1)
    if found:
        assert f"of 'confine' at rho={rho:g}, {tokens} tokens a step, is " in found[0]
    text = protection_rows.table([plain, confined, beside])
    assert f"{(confined.trained_bytes or 0) / 400:.0%}" in text


def test_a_figure_of_each_rho_is_judged():
    rows = [
        protection_rows.Row("c", protection_trainers.RESTORED, rho, 2, 320, overhead=overhead)
        for rho, overhead in ((0.5, 0.3), (0.8, 0.1))
    ]
    rows.append(protection_rows.Row("c", protection_trainers.CONFINED, 0.5, 2, steps=3, drift=1e-4))
    found = protection_rows.missed(rows)
    assert [text.partition(" of ")[0] for text in found] == ["overhead", "drift"]


# --- the sweep's picture ---


def swept():
    rows = []
    for rho in (0.2, 0.5, 0.8):
        rows.append(step(protection_trainers.UNPROTECTED, rho))
        rows.append(step(protection_trainers.UNPROTECTED, rho, 1280))
        for name in (protection_trainers.CONFINED, protection_trainers.PEFT_OSF, "another"):
            rows.append(
                step(name, rho, median_ms=80.0, parameter_bytes=150, held_bytes=50, peak_bytes=500)
            )
    where = dict.fromkeys(report.ENVIRONMENT_FIELDS, "")
    return [{name: report.cell(value) for name, value in vars(row).items()} | where for row in rows]


def test_points_are_over_the_unprotected_step():
    found = protection_plot.points(swept())
    assert list(found) == [protection_trainers.CONFINED, protection_trainers.PEFT_OSF, "another"]
    assert [point.rho for point in found["another"]] == [0.2, 0.5, 0.8]
    first = found["another"][0]
    assert first[1:] == pytest.approx(((400 + 50 + 50) / 400, 500 / 600, 0.8, 0.9, 1.1))


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    csv, picture = tmp_path / "rows.csv", tmp_path / "deep" / "picture.png"
    rows = [step(protection_trainers.UNPROTECTED, 0.5), step(protection_trainers.CONFINED, 0.5)]
    where = report.environment(torch.device("cpu"))
    report.append_csv(csv, rows, where, protection_rows.Row)
    assert bench.__main__.main(["plot", str(csv), str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    protection_plot.draw(swept(), picture)
    with pytest.raises(ValueError, match="nothing to plot"):
        protection_plot.draw(swept()[2:5], picture)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small_encoder")
def test_the_sweep_draws_beside_its_rows(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    csv = tmp_path / "confine.csv"
    command = ["protect", "--sweep", "--rho", "0.3,0.7", "--batch", "2", "--rounds", "1"]
    bench.__main__.main([*command, "--csv", str(csv)])
    assert f"picture in {tmp_path / 'confine.png'}" in capsys.readouterr().out
    found = protection_plot.points(report.read_csv(csv))
    assert {name: [p.rho for p in line] for name, line in found.items()} == {
        name: [0.3, 0.7]
        for name in protection.SWEPT
        if name in available() and name != protection_trainers.UNPROTECTED
    }
