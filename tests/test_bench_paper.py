"""bench.paper: the counts of bytes and FLOPs, against tensors and against one another."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import osf_torch
from bench import __main__ as cli
from bench import paper, protection_trainers
from osf_kernels import plan_free
from tests.helpers import generator_for


def test_plain_training_is_what_is_known_of_it() -> None:
    found = paper.total(paper.plain, 8192)
    numbers = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert found.bytes == (2 + 4 + 4 + 8) * numbers
    assert found.flops == 6 * 8192 * numbers
    assert paper.total(paper.plain_half, 1).bytes == (2 + 2 + 4) * numbers


def test_lora_trains_its_factors_alone() -> None:
    found = paper.lora(4096, 1024, 100)
    assert found.master == 4 * 32 * (4096 + 1024)
    assert found.flops == 100 * (4 * 4096 * 1024 + 6 * 32 * (4096 + 1024))


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
@pytest.mark.parametrize("rho", [0.25, 0.5, 0.75])
def test_confine_is_counted_as_it_is_held(shape: tuple[int, int], rho: float) -> None:
    m, n = shape
    model = nn.Sequential(nn.Linear(n, m, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(m, n, generator=generator_for(m, n, rho)))
    subspaces = osf_torch.refresh(model, rho, progress=False)
    confined = osf_torch.confine(model, subspaces)
    (place,) = confined.places
    found = paper.confine(m, n, 100, rho)
    (C,) = confined.parameters()
    assert found.master == C.nbytes
    assert found.weights == place.weight.nbytes
    assert found.copies == sum(t.nbytes for t in place.beside()) - C.nbytes
    assert found.bases == 2 * (place.spec.left.side.elements + place.spec.right.side.elements)
    plan = plan_free(100, place.spec.left.side, place.spec.right.side)
    assert found.flops == pytest.approx(plan.step_share * 3 * plan.plain_flops)
    beside = paper.confine(m, n, 100, rho, merged=False)
    assert (beside.copies, beside.flops) == (0, found.flops + plan.merge_flops)


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_peft_is_counted_as_it_is_held(shape: tuple[int, int]) -> None:
    pytest.importorskip("peft", reason="what is counted is peft's")
    m, n = shape
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    subspaces = osf_torch.refresh(model, 0.5, keep="all", progress=False)
    one = protection_trainers.trainer(protection_trainers.PEFT_OSF, model, subspaces)
    found = paper.peft_osf(m, n, 100, 0.5)
    trained = sum(p.nbytes for p in one.model.parameters() if p.requires_grad)
    assert found.master == trained
    assert found.bases == one.held_bytes // 2  # counted in bfloat16, held here in float32


def test_more_protection_takes_less() -> None:
    for of in (paper.confine, paper.peft_osf):
        low, high = (paper.total(partial(of, rho=rho), 8192) for rho in (0.5, 0.8))
        assert high.bytes < low.bytes
        assert high.flops < low.flops


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["paper", "--tokens", "4096", "--rho", "0.7"]) == 0
    out = capsys.readouterr().out
    assert "224 linear weights of 6.98e9 numbers, 4,096 tokens" in out
    for name in paper.methods([0.7]):
        assert name in out
    plain = next(line for line in out.splitlines() if line.startswith("plain fine-tuning"))
    assert plain.split()[2:6] == ["13.0", "26.0", "26.0", "52.0"]
    assert plain.split()[8:] == ["117.0", "1.00", "172", "1.00", "434"]
    assert "V_l on the inputs first" in out
    assert cli.main(["paper", "--rho", "1.5"]) == 2
    assert "0 < --rho < 1" in capsys.readouterr().err


def test_the_readme_shows_todays_counts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["paper"]) == 0
    assert capsys.readouterr().out in (root / "bench" / "README.md").read_text(encoding="utf-8")
