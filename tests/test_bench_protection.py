"""bench.protection: what is measured about a protected training step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bench.__main__
from bench import protection, report
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
    for name in (protection.RESTORED, protection.PROJECTED, protection.EAGER):
        one = protection.trainer(name, model, subspaces)
        one.optimizer.zero_grad()
        one.model(x).square().mean().backward()
        one.optimizer.step()
        changed[name] = one.model[0].weight.grad.clone()
        drifted[name] = max(protection.drifts(model, one.model, subspaces).values())
        assert one.held_bytes > 0
    for grad in changed.values():
        assert torch.allclose(grad, changed[protection.RESTORED], atol=1e-6)
    assert drifted[protection.RESTORED] < 1e-6
    assert drifted[protection.PROJECTED] > 1e-5
    assert drifted[protection.EAGER] == pytest.approx(drifted[protection.PROJECTED], rel=1e-3)
    bare = protection.trainer(protection.UNPROTECTED, model, subspaces)
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
        protection.Row("case", protection.UNPROTECTED, 0.5, 2, overhead=0.0),
        protection.Row("case", protection.RESTORED, 0.5, 2, overhead=0.5),
        protection.Row("case", protection.RESTORED, 0.5, 2, tokens=320, overhead=overhead),
        protection.Row("case", protection.RESTORED, 0.5, 2, steps=9, drift=drift),
        protection.Row("case", protection.PROJECTED, 0.5, 2, steps=9, drift=0.3),
    ]
    found = protection.missed(rows)
    assert (not found) == good
    if overhead > 0.15:
        assert found == ["overhead of 'protect' at 320 tokens a step is 16.0%, to be at most 15%"]
    elif not good:
        assert found == [f"drift of 'protect' after 9 steps is {drift:.1e}, to be at most 1e-05"]


@pytest.mark.slow
def test_the_command_names_what_it_missed(monkeypatch, capsys):
    monkeypatch.setattr(protection, "DRIFT_TARGET", -1.0)
    monkeypatch.setattr(protection, "OVERHEAD_TARGET", 1e9)
    command = ["protect", "--batch", "2", "--rounds", "1", "--drift-steps", "1"]
    assert bench.__main__.main([*command, "--drift-batch", "2"]) == 1
    assert "MISSED: drift of 'protect' after 1 steps is" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timing
def test_the_command(tmp_path, capsys):
    csv = tmp_path / "protect.csv"
    command = ["protect", "--batch", "2,3", "--rounds", "1", "--drift-steps", "2"]
    bench.__main__.main([*command, "--drift-batch", "2", "--csv", str(csv)])
    out = capsys.readouterr().out
    rows = report.read_csv(csv)
    assert len(rows) == 2 * 4 + 2
    for row in rows:
        assert row["contender"] in out
        assert row["rho"] == "0.5"
        assert row["drift"] if row["steps"] else float(row["median_ms"]) > 0
    assert "drift after 2 steps" in out


def test_bad_arguments_are_refused(capsys):
    assert bench.__main__.main(["protect", "--rho", "1.5"]) == 2
    assert "expected 0 < --rho < 1" in capsys.readouterr().err
