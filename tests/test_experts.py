"""Mixtures of experts end to end: every matrix of every expert is covered, and stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from osf_torch import (
    allocate_ranks,
    confine,
    load_subspaces,
    protect,
    ranks_by_energy,
    refresh,
    save_subspaces,
)
from osf_torch.bases import columns_of
from osf_torch.coverage import coverage
from tests.small_experts import KINDS, experts_model, ids
from tests.small_refresh import Recorder, linear


class Experts(nn.Module):
    """As transformers has them; each matrix with a spectrum of its own."""

    def __init__(self, count: int, m: int, n: int, key: int = 0) -> None:
        super().__init__()
        weights = [linear(m, n, key, i).weight.detach() for i in range(count)]
        self.up = nn.Parameter(torch.stack(weights))


def projector(columns: torch.Tensor) -> torch.Tensor:
    return columns.double() @ columns.double().mT


def mixture(kind: str) -> nn.Module:
    """Two layers of four experts, of which a token goes to two; embeddings are frozen."""
    model = experts_model(kind).train()
    model.get_input_embeddings().requires_grad_(False)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    """Steps on other tokens each."""
    for step in range(steps):
        x = ids("experts", seed, step, shape=(2, 6))
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()


# what refresh makes of a batch of matrices


@pytest.mark.parametrize("rho", [0.25, 0.75])
def test_each_expert_is_decomposed_by_itself(rho):
    model = Experts(5, 12, 8)
    found = refresh(model, rho, progress=False)["up"]
    assert found.shape == (5, 12, 8)
    U, S, Vh = torch.linalg.svd(model.up.detach().double(), full_matrices=False)
    r = found.rank
    for side, exact in ((found.U, U[..., :r]), (found.V, Vh[:, :r].mT)):
        columns, high = columns_of(side), side.spans == "high"
        held = projector(columns) if high else torch.eye(columns.shape[-2]) - projector(columns)
        torch.testing.assert_close(held, projector(exact), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.S, S[:, :r].float())


def test_experts_of_all_layers_go_together_and_in_parts(monkeypatch):
    model = nn.ModuleList([Experts(5, 12, 8, i) for i in range(3)])
    whole = refresh(model, 3, progress=False, keep="all")
    recorder = Recorder(monkeypatch)
    refresh(model, 3, progress=False)
    assert [tuple(call["A"].shape) for call in recorder.calls] == [(15, 12, 8)]
    monkeypatch.setattr("osf_torch.batching.BATCH", 4)
    recorder.calls.clear()
    parts = refresh(model, 3, progress=False, keep="all", offload="cpu")
    assert [call["A"].shape[0] for call in recorder.calls] == [4, 1, 4, 1, 4, 1]
    for name, entry in whole.items():
        torch.testing.assert_close(parts[name].S, entry.S)
        torch.testing.assert_close(
            projector(parts[name].svd.V), projector(entry.svd.V), atol=1e-5, rtol=0
        )


def test_however_experts_are_parted_the_method_is_that_of_all(monkeypatch):
    model = Experts(8, 256, 256)
    whole = refresh(model, 26, progress=False)["up"]
    monkeypatch.setattr("osf_torch.batching.BATCH", 1)
    assert refresh(model, 26, progress=False)["up"].method == whole.method


@pytest.mark.parametrize("complement", [False, True])
def test_the_next_refresh_of_experts_starts_from_the_last(complement):
    """Warm from triplets, or deflated to the low block."""
    model = Experts(4, 40, 24)
    options = {"progress": False, "keep": "all", "complement": complement}
    rank = 16 if complement else 8
    first = refresh(model, rank, **options)
    with torch.no_grad():
        model.up += 1e-6 * torch.randn_like(model.up)
    second = refresh(model, rank, previous=first, **options)
    assert second["up"].method == ("deflated" if complement else "warm")
    exact = torch.linalg.svd(model.up.detach().double(), full_matrices=False)
    torch.testing.assert_close(second["up"].S, exact[1][:, :rank].float(), atol=1e-4, rtol=0)


def test_a_bad_expert_is_named_by_its_index():
    model = Experts(4, 12, 8)
    model.up.data[2, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf: 'up' has 1 such"):
        refresh(model, 3, progress=False)
    model.up.data[2, 3, 3] = 1.0
    with pytest.warns(RuntimeWarning, match=r"'up'\[[0-3]\]"):
        refresh(model, 3, progress=False, tol=1e-12)


def test_one_rank_serves_all_experts_by_the_one_that_needs_most():
    model = Experts(3, 10, 10)
    with torch.no_grad():
        model.up[0] = torch.diag(torch.tensor([1.0] + 9 * [1e-3]))
        model.up[1] = torch.eye(10)
    assert ranks_by_energy(model, 0.9, progress=False) == {"up": 9}
    assert ranks_by_energy(Experts(3, 10, 10), 0.9, progress=False)["up"] < 9
    assert allocate_ranks({"up": 1.0}, model, trr=0.5) == {"up": 5}
    assert refresh(model, {"u*": 0.3}, progress=False)["up"].rank == 3


def test_experts_are_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors", reason="the files are safetensors")
    model = Experts(3, 12, 8)
    for ranks in (0.25, 0.75):
        found = refresh(model, ranks, progress=False)
        save_subspaces(tmp_path / "s", found, model)
        loaded = load_subspaces(tmp_path / "s", model)
        assert loaded["up"].shape == (3, 12, 8)
        for part, factor in found["up"].factors().items():
            assert torch.equal(loaded["up"].factors()[part], factor)
    other = Experts(4, 12, 8)
    with pytest.raises(ValueError, match=r"'up' to be \(3, 12, 8\).*got \(4, 12, 8\)"):
        load_subspaces(tmp_path / "s", other)


@pytest.mark.parametrize("rho", [0.25, 0.5, 0.9])
def test_bases_of_another_weight_are_not_confined(rho):
    """All of it replaced, or one expert of many; of the same spectrum."""
    model = nn.ModuleDict({"experts": Experts(8, 12, 10), "layer": linear(12, 10)})
    subspaces = refresh(model, rho, progress=False)
    for changed in (model["layer"].weight, model["experts"].up):
        before = changed.detach().clone()
        with torch.no_grad():
            part = changed if changed.dim() == 2 else changed[3]
            part.copy_(torch.linalg.qr(torch.randn(12, 12))[0] @ part)
            part.copy_(part @ torch.linalg.qr(torch.randn(10, 10))[0])
        with pytest.raises(ValueError, match=r"its own singular triplets, got ones.*refresh the"):
            confine(model, subspaces)
        with torch.no_grad():
            changed.copy_(before)
    confine(model, subspaces).verify()


# whole models


def moved(before: torch.Tensor, after: torch.Tensor, rank: int) -> float:
    """The worst of max(‖UᵀΔW‖, ‖ΔW V‖) / ‖W‖ over the matrices, against float64 triplets."""
    W, change = before.double(), after.double() - before.double()
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    U, V = U[..., :rank], Vh.mT[..., :rank]
    norms = torch.linalg.matrix_norm
    both = torch.maximum(norms(U.mT @ change), norms(change @ V))
    return float((both / norms(W)).max())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["protect", "confine"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_a_mixture_is_covered_and_stays(kind, way):
    """50 steps of AdamW with decay, of which most leave some expert without a token."""
    model = mixture(kind)
    subspaces = refresh(model, 0.5, progress=False, compute_dtype=torch.float64)
    assert not subspaces.left_out
    assert {name.rpartition(".")[2] for name in subspaces} == {
        "weight",
        "gate_up_proj",
        "down_proj",
    }
    before = {name: model.get_parameter(name).detach().clone() for name in subspaces}
    if way == "protect":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        holder = protect(model, subspaces, optimizer=optimizer)
    else:
        holder = confine(model, subspaces)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    train(model, optimizer, 50)
    holder.verify()
    assert not holder.coverage().left_out
    now = model.state_dict()
    for name, weight in before.items():
        assert moved(weight, now[name], subspaces[name].rank) < 1e-5, name
        assert float((now[name] - weight).norm() / weight.norm()) > 1e-2
    holder.next_task(widen=0.1, progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3) if way == "confine" else optimizer
    train(model, optimizer, 2)
    holder.verify()


@pytest.mark.parametrize("way", ["protect", "confine"])
def test_a_mixture_is_resumed(way):
    def made():
        model = mixture("qwen3_moe")
        return model, refresh(model, 0.5, progress=False)

    def optimizer_of(model):
        return torch.optim.AdamW(model.parameters(), lr=3e-3)

    model, subspaces = made()
    optimizer = optimizer_of(model)
    holder = protect(model, subspaces, optimizer) if way == "protect" else confine(model, subspaces)
    optimizer = optimizer if way == "protect" else optimizer_of(model)
    train(model, optimizer, 3, seed=1)
    weights, steps = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    state = holder.state_dict()
    other, _ = made()
    other.load_state_dict(weights)
    again = optimizer_of(other)
    if way == "protect":
        protect(other, state, again)
    else:
        confine(other, state)
        again = optimizer_of(other)
    again.load_state_dict(steps)
    train(model, optimizer, 2, seed=2)
    train(other, again, 2, seed=2)
    for name, t in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], t, rtol=1e-6, atol=1e-7)


def test_experts_without_tokens_stay_as_they_are():
    """A step in which no token goes to an expert: it neither moves nor fails under SGD."""
    model = mixture("qwen3_moe")
    subspaces = refresh(model, 0.5, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = protect(model, subspaces, optimizer=optimizer)
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.detach().clone()
    x = torch.full((1, 2), 3)
    model(input_ids=x, labels=x).loss.backward()
    reached = experts.gate_up_proj.grad.flatten(1).norm(dim=1) > 0
    assert 0 < int(reached.sum()) < len(reached)
    optimizer.step()
    guard.verify()
    change = (experts.gate_up_proj.detach() - before).flatten(1).norm(dim=1)
    assert bool((change[reached] > 0).all())
    assert float(change[~reached].max()) <= 1e-6 * float(before.norm())


def test_biases_of_experts_are_vectors():
    model = mixture("gpt_oss")
    found = coverage(model, {id(p) for p in model.parameters() if p.dim() > 2})
    assert not any("bias" in name for name in found.left_out)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert found.vectors >= sum(p.numel() for p in biases)
