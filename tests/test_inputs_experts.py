"""osf_torch.input_subspaces of mixtures of experts: each expert by the tokens routed to it."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from osf_torch import Subspace, confine, input_subspaces, layer_importance, protect, refresh
from tests.helpers import generator_for, grown
from tests.small_experts import EXPERTS, KINDS, WAYS, experts_model, experts_read, ids

EXPERT_WEIGHTS = "*.experts.*_proj"


def share(V: torch.Tensor, rows: torch.Tensor) -> float:
    rows = rows.double()
    return float((rows @ V.double()).square().sum() / rows.square().sum())


def only(subspace) -> torch.Tensor:
    """The directions of the one side that inputs made."""
    assert (subspace.U is None) != (subspace.V is None)
    return grown(subspace, "V" if subspace.U is None else "U")


def needed(rows: torch.Tensor, energy: float) -> int:
    squares = torch.linalg.svdvals(rows.double()).square()
    return int((squares.cumsum(0) / squares.sum() < energy).sum()) + 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_holds_what_it_read(kind, way, padded):
    model = experts_model(kind, way)
    batch = {"input_ids": ids(kind), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    if padded:
        batch["attention_mask"][1, 3:] = batch["attention_mask"][2, 6:] = 0
    found = input_subspaces(model, [batch], energy=0.9, progress=False)
    assert {name.split(".")[-1] for name in found} >= {"gate_up_proj", "down_proj"}
    assert any(name.endswith((".gate.weight", ".router.weight")) for name in found)
    transposed = kind == "gpt_oss"
    for name, read in experts_read(model, batch).items():
        assert (found[name].V is None) is transposed
        columns = only(found[name])
        weight = model.get_parameter(name)
        assert columns.shape[:2] == (EXPERTS, weight.shape[-2 if transposed else -1])
        # as wide as the expert needs that needs most, by the real tokens alone
        widths = [needed(rows, 0.9) for rows in read if len(rows)]
        assert columns.shape[-1] == max(widths)
        eye = torch.eye(columns.shape[-1])
        assert (columns.mT @ columns - eye).abs().max() <= 1e-5
        for V, rows in zip(columns, read, strict=True):
            assert not len(rows) or share(V, rows) >= 0.9 - 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_ways_to_run_experts_give_the_same_bases(kind):
    batch = {"input_ids": ids("ways"), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    batch["attention_mask"][3, 5:] = 0
    one, *others = (
        input_subspaces(experts_model(kind, way), [batch], energy=0.8, progress=False)
        for way in WAYS
    )
    for other in others:
        assert list(other) == list(one)
        for name, subspace in one.items():
            a, b = only(subspace), only(other[name])
            assert a.shape == b.shape
            if a.dim() > 2:
                continue  # what fills up an expert's columns may be of equal energy
            assert (a @ a.mT - b @ b.mT).abs().max() <= 1e-3


@pytest.mark.parametrize("per", ["block", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_importance_counts_experts(kind, per):
    batches = [{"input_ids": ids("importance")}]
    models = [experts_model(kind, way) for way in WAYS]
    with torch.no_grad():
        for model in models:  # so that they hand on some of their inputs' direction
            for p in model.parameters():
                if p.dim() > 2:
                    p.diagonal(dim1=-2, dim2=-1).add_(0.8)
    found = [layer_importance(model, batches, per=per, progress=False) for model in models]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)
    if per == "block":
        for name, value in found[0].items():
            layer = ".".join(name.split(".")[:3])
            if layer.startswith("model.layers"):
                assert value == found[0][f"{layer}.mlp.experts.down_proj"]
        return
    model = models[0]
    read = experts_read(model, batches[0])
    (up, up_read), (down, down_read) = read.items()
    wanted = []
    for name, rows in ((up, up_read), (down, down_read)):
        W = model.get_parameter(name).detach()
        W = W.mT if kind == "gpt_oss" else W
        cosines = []
        for e, x in enumerate(rows):
            y = x @ W[e].mT
            k = min(W.shape[-2:])
            cosines.append(torch.cosine_similarity(x[:, :k], y[:, :k], dim=-1))
        wanted.append(max(0.0, float(torch.cat(cosines).mean())))
    assert max(wanted) > 0
    assert found[0][up] * wanted[1] == pytest.approx(found[0][down] * wanted[0], rel=1e-3)


def only_first_experts(model: nn.Module) -> None:
    """Has the router of a layer of Mixtral's choose experts 0 and 1 always."""
    router = model.model.layers[0].mlp.gate

    def forward(x):
        x = x.reshape(-1, x.shape[-1])
        logits = torch.nn.functional.linear(x, router.weight)
        chosen = torch.tensor([[0, 1]]).expand(len(x), 2)
        return logits, torch.full((len(x), 2), 0.5), chosen

    router.forward = forward


@pytest.mark.parametrize("way", WAYS)
def test_unreached_experts(way, caplog):
    model = experts_model("mixtral", way, layers=1)
    only_first_experts(model)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    generator = generator_for("before")
    before = torch.linalg.qr(torch.randn(EXPERTS, 16, 2, generator=generator))[0]
    found = input_subspaces(
        model,
        [{"input_ids": ids("unreached")}],
        previous={name: Subspace(None, before)},
        energy=0.9,
        filter=EXPERT_WEIGHTS,
        progress=False,
    )
    (line,) = [text for text in caplog.messages if "no token reached" in text]
    assert f"2 of 4 of {name} (2, 3)" in line
    V = grown(found[name])
    assert (before - V @ (V.mT @ before)).abs().max() <= 1e-5
    assert V.shape[-1] > 2
    assert (V.mT @ V - torch.eye(V.shape[-1])).abs().max() <= 1e-5


def test_max_tokens_bounds_what_is_kept_of_each_expert():
    model = experts_model("mixtral", layers=1)
    batches = [{"input_ids": ids("many", i)} for i in range(2)]
    found = input_subspaces(
        model, batches, energy=1.0, max_tokens=3, filter=EXPERT_WEIGHTS, progress=False
    )
    for subspace in found.values():
        assert subspace.V.columns.shape[-1] == 3


def test_an_expert_whose_memory_is_read_by_a_kernel_of_its_own_is_refused():
    class OpaqueExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 5, generator=generator_for("opaque")))

        def forward(self, x):
            read = torch.from_numpy(self.up.detach().numpy())  # as a kernel reads its pointer
            return torch.einsum("ti,eoi->to", x, read.clone())

    with pytest.raises(ValueError, match=r"none that reached 0\.up by a product.*filter="):
        input_subspaces(nn.Sequential(OpaqueExperts()), [torch.ones(2, 5)], progress=False)


def batch_of(kind: str, key: object) -> dict[str, torch.Tensor]:
    tokens = ids(kind, key)
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("method", ["protect", "confine"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_inputs_move_within_the_bound(kind, method):
    """‖ΔW X‖_F ≤ √(1 − energy)·‖ΔW‖₂·‖X‖_F of each expert's own inputs, after AdamW on others."""
    model, energy = experts_model(kind, "grouped_mm"), 0.95
    batch = {"input_ids": ids(kind, "old")}
    read = experts_read(model, batch)
    bases = input_subspaces(model, [batch], energy=energy, progress=False)
    before = {name: model.get_parameter(name).detach().double().clone() for name in read}
    if method == "protect":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        protect(model, bases, optimizer=optimizer)
    else:
        confined = confine(model, bases)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for i in range(4):
        optimizer.zero_grad()
        model(**batch_of(kind, i)).loss.backward()
        optimizer.step()
    if method == "confine":
        confined.merge()
    moved = 0
    for name, rows in read.items():
        after = functools.reduce(getattr, name.split("."), model)
        delta = after.detach().double() - before[name]
        delta = delta.mT if kind == "gpt_oss" else delta
        for change, x in zip(delta, rows, strict=True):
            size = float(torch.linalg.matrix_norm(change, 2))
            bound = math.sqrt(1 - energy) * size * float(x.double().norm())
            assert float((x.double() @ change.mT).norm()) <= bound * (1 + 1e-3) + 1e-5
            moved += size > 1e-3
    assert moved >= EXPERTS


@pytest.mark.parametrize(
    ("kind", "share_of_all"), [("qwen3_moe", 0.25), ("qwen3_moe", 0.75), ("gpt_oss", 0.25)]
)
def test_what_was_protected_of_each_expert_is_kept_and_grown(kind, share_of_all):
    """From high bases of ``refresh``, and from low ones, which lose directions."""
    model = experts_model(kind, "batched_mm", layers=1)
    before = refresh(model, share_of_all, filter=EXPERT_WEIGHTS, progress=False)
    batch = {"input_ids": ids("grown")}
    found = input_subspaces(
        model,
        [batch],
        energy=0.95,
        previous=before,
        min_free=0,
        filter=EXPERT_WEIGHTS,
        progress=False,
    )
    side, other = ("U", "V") if kind == "gpt_oss" else ("V", "U")
    spans = set()
    for name, read in experts_read(model, batch).items():
        had, basis = getattr(before[name], side), getattr(found[name], side)
        spans.add(had.spans)
        assert torch.equal(
            getattr(found[name], other).columns, getattr(before[name], other).columns
        )
        V = grown(found[name], side)
        size, width = V.shape[-2:]
        assert basis.spans == "high"
        low = found[name].low.get(side)
        assert (low is None) == (2 * width <= size)
        for e, rows in enumerate(read):
            B, A = V[e], had.columns[e]
            assert share(B, rows) >= 0.95 - 1e-5
            if had.spans == "high":
                assert float((A - B @ (B.mT @ A)).norm()) <= 1e-5
                assert width > A.shape[1]
            else:
                assert float((A.mT @ B).norm() ** 2) == pytest.approx(width - size + A.shape[1])
            if low is not None:
                assert share(low.columns[e], rows) <= 0.05 + 1e-5
    assert "low" in spans or share_of_all < 0.5
