"""Bases that grow by inputs over a long stream of tasks: what they hold, free and let go of."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from osf_torch import (
    Subspace,
    confine,
    input_subspaces,
    load_subspaces,
    protect,
    refresh,
    save_subspaces,
)
from tests.helpers import generator_for, grown, randn
from tests.small_experts import experts_model, experts_read, ids
from tests.test_inputs import Conv1D, decaying, inputs_of, mlp, share


def spread(X: torch.Tensor) -> torch.Tensor:
    """XXᵀ/‖X‖²_F."""
    return X @ X.mT / X.square().sum()


def dense(subspace, side: str = "V") -> torch.Tensor:
    directions, energies = subspace.spectra[side]
    V = directions.double()
    return V * energies.unsqueeze(-2) @ V.mT


def task(number: int, width: int, *key, dtype=torch.float64) -> torch.Tensor:
    return decaying(25, width, 0.75, ("task", number, *key), dtype)


# --- the sum over tasks ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energies_are_those_of_all_tasks_whatever_the_size_of_their_activations(dtype):
    """At full energy nothing lies outside what is held, and the sum is that of whole matrices."""
    model = mlp(14, 12, dtype=dtype)
    bases, wanted = None, torch.zeros(14, 14, dtype=torch.float64)
    for number in range(4):
        x = task(number, 14, dtype=dtype)[:3] * 10.0**number
        bases = input_subspaces(model, [x], energy=1.0, previous=bases, min_free=0, progress=False)
        wanted = wanted + spread(x.double().mT)
    found = bases["0.weight"]
    assert grown(found).shape == (14, 12)
    assert found.V.spans == "high"
    assert found.low["V"].spans == "low"
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert (dense(found) - wanted).norm() <= tolerance
    low = found.low["V"].columns.double()
    assert (grown(found).double().mT @ low).norm() <= tolerance
    assert bases.released == {"0.weight": 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_earlier_task_is_held_until_the_floor_is_reached(dtype):
    model = mlp(60, 8, dtype=dtype)
    bases, tasks, turns, lost = None, [], 0, 0.0
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for number in range(30):
        tasks.append(task(number, 60, dtype=dtype))
        bases = input_subspaces(
            model, tasks[-1:], energy=0.9, previous=bases, min_free=7, progress=False
        )
        V = grown(bases["0.weight"]).double()
        assert V.shape[1] <= 53
        assert (V.mT @ V - torch.eye(V.shape[1])).abs().max() <= tolerance
        lost += bases.released["0.weight"]
        if not lost:
            turns += 1
            for x in tasks:
                assert share(V, x.double().mT) >= 0.9 - tolerance
    assert V.shape[1] == 53
    assert 5 < turns < 30


@pytest.mark.parametrize(
    ("min_free", "most"), [(0, 20), (1, 19), (0.1, 18), (0.11, 17), (0.5, 10), (19, 1), (0.99, 1)]
)
def test_a_floor_of_free_directions_is_kept(min_free, most, caplog):
    model = mlp(20, 6)
    bases, wanted = None, torch.zeros(20, 20, dtype=torch.float64)
    for number in range(6):
        caplog.clear()
        x = task(number, 20)
        bases = input_subspaces(
            model, [x], energy=1.0, previous=bases, min_free=min_free, progress=False
        )
        whole = wanted + spread(x.mT)
        squares, R = torch.linalg.eigh(whole)
        kept = R[:, -most:]
        wanted = kept * squares[-most:] @ kept.mT
        assert grown(bases["0.weight"]).shape == (20, most)
        assert (dense(bases["0.weight"]) - wanted).norm() <= 1e-10
        lost = float(1 - squares[-most:].sum() / squares.sum())
        assert bases.released["0.weight"] == pytest.approx(lost, abs=1e-12)
        told = [line for line in caplog.messages if "floor" in line]
        assert len(told) == (lost > 0)
        if told:
            assert "1 of 1 weights are at their floor" in told[0]
            assert f"up to {100 * bases.released['0.weight']:.2g} % was let go of (0.w" in told[0]
        assert f"{bases.released['0.weight']:.1%}" in bases.summary()
    assert (lost > 1e-3) == (min_free != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_floor_that_is_reached_without_letting_go_is_no_warning(dtype, caplog):
    model = mlp(20, 6).to(dtype)
    drawn = {"dtype": torch.float64, "generator": generator_for("floor", dtype)}
    directions = torch.linalg.qr(randn(20, 18, **drawn))[0]
    x = (randn(60, 18, **drawn) @ directions.mT).to(dtype)
    found = input_subspaces(model, [x], energy=1.0, progress=False)
    assert grown(found["0.weight"]).shape == (20, 18)
    assert found.released["0.weight"] <= 1e-12
    assert not caplog.messages
    x = randn(60, 20, **drawn).to(dtype)
    found = input_subspaces(model, [x], energy=1.0, previous=found, progress=False)
    (line,) = caplog.messages
    assert "of the energy of the inputs so far up to" in line
    assert found.released["0.weight"] > 1e-3


def test_a_task_that_most_tasks_are_like_stays():
    """What many tasks read is kept where one task alone read what is released."""
    model, axes = nn.Sequential(nn.Linear(10, 3, dtype=torch.float64)), torch.eye(10).double()
    bases = None
    for which in ([0, 1], [0, 1], [0, 1], [2, 3, 4], [5, 6, 7]):
        x = axes[which] * torch.linspace(2, 1, len(which), dtype=torch.float64)[:, None]
        bases = input_subspaces(model, [x], energy=1.0, previous=bases, min_free=6, progress=False)
    V = grown(bases["0.weight"])
    assert V.shape == (10, 4)
    assert [float(V[i].norm()) for i in (0, 1, 2, 5)] == pytest.approx([1, 1, 1, 1])
    assert bases.released["0.weight"] > 0


# --- where it starts from ---


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_bases_without_energies_count_as_one_task(ratio):
    model = mlp(16, 16)
    before = refresh(model, ratio, progress=False)
    assert before["0.weight"].V.spans == ("high" if ratio < 0.5 else "low")
    V = before["0.weight"].svd
    Q = before["0.weight"].V.columns if V is None else V.V
    Q = (
        Q
        if ratio < 0.5
        else torch.linalg.qr(before["0.weight"].V.columns, mode="complete")[0][:, 4:]
    )
    x = task(0, 16)
    found = input_subspaces(model, [x], energy=1.0, previous=before, min_free=0, progress=False)[
        "0.weight"
    ]
    wanted = Q @ Q.mT / Q.shape[1] + spread(x.mT)
    assert (dense(found) - wanted).norm() <= 1e-10
    assert found.U is not None
    assert list(found.spectra) == ["V"]
    again = input_subspaces(
        model, [x], energy=1.0, previous={"0.weight": found}, min_free=0, progress=False
    )["0.weight"]
    assert (dense(again) - wanted - spread(x.mT)).norm() <= 1e-10
    assert torch.equal(again.U.columns, before["0.weight"].U.columns)


def test_a_floor_releases_of_bases_that_were_wider_before():
    model = mlp(16, 16)
    found = input_subspaces(
        model, [task(0, 16)[:2]], previous=refresh(model, 15, progress=False), progress=False
    )
    assert grown(found["0.weight"]).shape == (16, 14)
    assert 0 < found.released["0.weight"] < 0.1


def test_a_side_that_sums_over_rows_grows_its_u():
    model = nn.Sequential(Conv1D(20, 6))
    bases, wanted = None, torch.zeros(20, 20, dtype=torch.float64)
    for number in range(5):
        x = task(number, 20, "rows")
        bases = input_subspaces(model, [x], energy=1.0, previous=bases, progress=False)
        squares, R = torch.linalg.eigh(wanted + spread(x.mT))
        wanted = R[:, 2:] * squares[2:] @ R[:, 2:].mT
    found = bases["0.weight"]
    assert found.V is None
    assert found.low["U"].spans == "low"
    assert found.low["U"].columns.shape == (20, 2)
    assert (dense(found, "U") - wanted).norm() <= 1e-10


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_each_expert_merges_what_it_read(kind):
    """With the directions of an expert that reads less than another filled up by none that count:
    what each read of all tasks is held until the floor, and never more than that leaves."""
    model = experts_model(kind, "batched_mm", layers=1)
    side = "U" if kind == "gpt_oss" else "V"
    bases, read = None, {}
    for number in range(4):
        batch = {"input_ids": ids("grow", number)}
        bases = input_subspaces(
            model, [batch], energy=0.7, previous=bases, filter="*.experts.*_proj", progress=False
        )
        for name, rows in experts_read(model, batch).items():
            read.setdefault(name, []).append(rows)
            V, energies = bases[name].spectra[side]
            size = V.shape[-2]
            assert V.shape[-1] <= size - math.ceil(0.1 * size)
            assert (V.mT @ V - torch.eye(V.shape[-1])).abs().max() <= 1e-5
            assert energies.shape == (len(rows), V.shape[-1])
            for e, expert in enumerate(V.double()):
                seen = [one[e].double() for one in read[name] if len(one[e])]
                total = float(energies[e].sum())
                assert total <= len(seen) + 1e-6
                if bases.released[name] == 0:
                    assert total >= 0.7 * len(seen)
                    assert all(share(expert, x.mT) >= 0.7 - 1e-5 for x in seen)


# --- what takes it ---


def test_a_file_goes_on_to_the_next_task_to_the_bit(tmp_path):
    pytest.importorskip("safetensors", reason="the files are safetensors")
    model = mlp(20, 16, 20)
    bases = None
    for number in range(3):
        bases = input_subspaces(model, [task(number, 20)], previous=bases, progress=False)
    save_subspaces(tmp_path / "s", bases, model)
    loaded = load_subspaces(tmp_path / "s", model)
    one, other = (
        input_subspaces(model, [task(9, 20)], previous=held, progress=False)
        for held in (bases, loaded)
    )
    assert one.released == other.released
    for name in one:
        assert one[name].V.spans == other[name].V.spans == "high"
        assert torch.equal(one[name].V.columns, other[name].V.columns)
        assert one[name].low.keys() == other[name].low.keys() == {"V"}
        assert torch.equal(one[name].low["V"].columns, other[name].low["V"].columns)
        for a, b in zip(one[name].spectra["V"], other[name].spectra["V"], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("energy", [0.6, 0.999])
@pytest.mark.parametrize("method", ["protect", "confine"])
def test_what_is_held_either_way_holds_still(method, energy):
    """Of high bases and of low ones the outputs for old inputs move within the bound."""
    model = mlp(20, 16, 20)
    x = task(0, 20)
    bases = input_subspaces(model, [x], energy=energy, min_free=1, progress=False)
    assert all(bool(s.low) == (energy > 0.9) for s in bases.values())
    X = inputs_of(model, [x])
    old = {name: p.detach().clone() for name, p in model.state_dict().items()}
    if method == "confine":
        confined = confine(model, bases)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    if method == "protect":
        guard = protect(model, bases, optimizer=optimizer)
    generator = generator_for("steps")
    for _ in range(20):
        optimizer.zero_grad()
        y = model(randn(8, 20, dtype=torch.float64, generator=generator))
        (y - 1).square().mean().backward()
        optimizer.step()
    (guard if method == "protect" else confined).verify()
    for name, inputs in X.items():
        moved = model.state_dict()[name].detach() - old[name]
        size = float(torch.linalg.matrix_norm(moved, 2))
        assert size > 1e-3
        bound = math.sqrt(1 - energy) * size * float(inputs.norm())
        assert float((moved @ inputs).norm()) <= bound * (1 + 1e-4)


def test_without_a_floor_all_of_a_side_may_be_protected():
    model = mlp(8, 6)
    bases = input_subspaces(model, [task(0, 8)], energy=1.0, min_free=0, progress=False)
    assert bases["0.weight"].V.columns.shape == (8, 8)
    assert bases["0.weight"].low["V"].columns.shape == (8, 0)
    started = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD([model[0].weight], lr=1.0)
    protect(model, bases, optimizer=optimizer)
    model(torch.ones(1, 8).double()).sum().backward()
    optimizer.step()
    assert (model[0].weight - started).abs().max() <= 1e-14
    with pytest.raises(ValueError, match="something free"):
        confine(mlp(8, 6), bases)


# --- what is refused ---


@pytest.mark.parametrize(
    ("min_free", "error", "match"),
    [
        (-1, ValueError, r"min_free to be an int of at least 0 or a float in \[0, 1\), got -1"),
        (1.0, ValueError, r"\[0, 1\), got 1.0"),
        (float("nan"), ValueError, "got nan"),
        (True, TypeError, r"min_free to be an int or a float in \[0, 1\), got True"),
        ("some", TypeError, "got 'some'"),
        (
            6,
            ValueError,
            r"parameter '0\.weight': expected min_free to be below the 6 dir.*got 6, .*; "
            "pass a smaller count, or a share such as 0.1$",
        ),
    ],
)
def test_bad_floors(min_free, error, match):
    with pytest.raises(error, match=rf"osf_torch\.input_subspaces: .*{match}"):
        input_subspaces(mlp(6, 5), [task(0, 6)], min_free=min_free, progress=False)


def test_what_is_released_is_told_where_there_is_a_floor_alone(caplog):
    caplog.set_level(logging.INFO, "osf_torch")
    found = input_subspaces(mlp(40, 5), [task(0, 40)], energy=0.8, progress=False)
    assert found.released == {"0.weight": 0.0}
    assert not any("floor" in line for line in caplog.messages)
    V = grown(found["0.weight"])
    assert input_subspaces(
        mlp(40, 5),
        [task(1, 40)],
        energy=0.8,
        previous={"0.weight": Subspace(None, V)},
        progress=False,
    ).released == {"0.weight": 0.0}
