"""The benches of the integrations on small cases: every contender right, rows that are written."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import integrations_galore, integrations_stiefel

CPU = torch.device("cpu")


@pytest.mark.timing
@pytest.mark.parametrize("drift", [None, 0.5])
def test_galore_rows(drift):
    rows = integrations_galore.measure(48, 32, 5, drift, CPU, 1)
    assert [row.status for row in rows] == ["ok", "ok"]
    assert rows[1].contender == "osf-kernels"
    assert rows[0].times_peer == 1.0
    for row in rows:
        assert row.overlap == pytest.approx(1.0, abs=1e-4)
        assert row.captured_of_best == pytest.approx(1.0, abs=1e-4)
        assert row.median_ms > 0
        assert row.extra_bytes > 0


def test_a_wrong_basis_gets_no_time(monkeypatch):
    class Wrong(integrations_galore.Formula):
        def project(self, G, iter):
            low = super().project(G, iter)
            self.ortho_matrix = self.ortho_matrix.flip(1)
            return low

    monkeypatch.setattr(integrations_galore, "peer", lambda rank: ("wrong", Wrong(rank)))
    theirs, ours = integrations_galore.measure(48, 32, 5, None, CPU, 1)
    assert theirs.status.startswith("wrong: holds")
    assert theirs.median_ms is None
    assert ours.status == "ok"
    assert ours.times_peer is None


@pytest.mark.timing
def test_stiefel_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(integrations_stiefel, "CASES", ((2, 24, 4), (1, 12, 3)))
    path = tmp_path / "rows.csv"
    for _ in range(2):  # the second run replaces the first one's rows
        assert integrations_stiefel.main(["--rounds", "2", "--csv", str(path)]) == 0
    shown = capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert [(row["task"], row["case"]) for row in rows[::2]] == [
        (task, case) for case in ("2 x 24x4", "1 x 12x3") for task in ("retract", "step")
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert row["case"] in shown
        assert float(row["deviation"]) < 1e-5


def test_a_step_elsewhere_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(integrations_stiefel, "CASES", ((2, 24, 4),))
    monkeypatch.setattr(integrations_stiefel, "canonical", lambda G, X: -G)
    assert integrations_stiefel.main(["--rounds", "1"]) == 1
    assert "from the formulas' point" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "cpu, cuda or cuda:N, got abacus"),
        (["--rounds", "0"], "--rounds to be 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_rows_are_lost(tmp_path, capsys, arguments, message):
    path = tmp_path / "rows.csv"
    path.write_text("precious")
    assert integrations_galore.main([*arguments, "--csv", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert path.read_text() == "precious"
