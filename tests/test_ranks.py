"""Ranks by importance and by energy: the formula, its limits, and that refresh takes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from osf_kernels.testing import matrix_with_spectrum
from osf_torch import refresh
from osf_torch.ranks import allocate_ranks, ranks_by_energy
from tests.helpers import generator_for, randn

sides = st.integers(1, 60)
ratios = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


def layer(m: int, n: int, spectrum: list[float], dtype: torch.dtype = torch.float64) -> nn.Linear:
    found = nn.Linear(n, m, bias=False, dtype=dtype)
    values = torch.tensor(spectrum, dtype=torch.float64)
    A, _, _ = matrix_with_spectrum(m, n, values, generator=generator_for(m, n, spectrum))
    found.weight.data.copy_(A)
    return found


def layers(*shapes: tuple[int, int]) -> nn.ModuleList:
    found = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)
    for i, member in enumerate(found):
        m, n = member.weight.shape
        member.weight.data.copy_(randn(m, n, dtype=torch.float32, generator=generator_for(i)))
    return found


# by importance


@settings(max_examples=100, deadline=None)
@given(
    importance=st.lists(st.floats(-5, 20), min_size=1, max_size=8),
    data=st.data(),
    ratios=ratios,
)
def test_ranks_are_the_formulas_and_in_range(importance, data, ratios):
    mrr, trr = ratios
    names = [f"layer.{i}" for i in range(len(importance))]
    shapes = {name: (data.draw(sides), data.draw(sides)) for name in names}
    found = allocate_ranks(dict(zip(names, importance, strict=True)), shapes, mrr=mrr, trr=trr)
    assert list(found) == names
    for name, value in zip(names, importance, strict=True):
        short = min(shapes[name])
        rank = found[name]
        assert isinstance(rank, int)
        assert 1 <= rank <= short
        share = mrr + max(0.0, value) * (trr - mrr)
        if share >= 1:
            assert rank == short
        else:  # something stays free, where there are two directions
            assert rank == max(1, min(round(share * short), short - 1))


@settings(max_examples=100, deadline=None)
@given(st.floats(-5, 20), st.floats(-5, 20), ratios, sides, sides)
def test_more_importance_never_gives_less(one, two, ratios, m, n):
    mrr, trr = ratios
    low, high = sorted((one, two))
    shapes = {"low": (m, n), "high": (m, n)}
    found = allocate_ranks({"low": low, "high": high}, shapes, mrr=mrr, trr=trr)
    assert found["low"] <= found["high"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=10), st.floats(0, 0.6))
def test_the_mean_share_is_trr_where_nothing_is_clamped(raw, mrr):
    trr, short = 0.6, 100_000
    mean = sum(raw) / len(raw)
    importance = {str(i): value / mean for i, value in enumerate(raw)}
    if mrr + max(importance.values()) * (trr - mrr) > 1:
        return
    found = allocate_ranks(importance, dict.fromkeys(importance, (short, short)), mrr=mrr, trr=trr)
    share = sum(found.values()) / len(found) / short
    assert share == pytest.approx(trr, abs=0.5 / short + 1e-9)


def test_papers_defaults():
    importance = {"a": 0.0, "b": 1.0, "c": 0.5, "d": 2.0, "e": -1.0}
    found = allocate_ranks(importance, dict.fromkeys(importance, (1000, 100)))
    assert found == {"a": 10, "b": 80, "c": 45, "d": 100, "e": 10}


def test_shapes_may_be_the_model_and_refresh_takes_the_ranks():
    model = layers((20, 12), (12, 30), (9, 9))
    names = ["0.weight", "1.weight", "2.weight"]
    ranks = allocate_ranks({"0.weight": 0.5, "1.weight": 1.0, "2.weight": 1.5}, model)
    assert ranks == {"0.weight": 5, "1.weight": 10, "2.weight": 9}
    assert {name: s.rank for name, s in refresh(model, ranks).items()} == ranks
    # over and beside them: an exact name goes first, a pattern serves the rest
    over = refresh(model, ranks | {"1.weight": 0.25})
    assert [over[name].rank for name in names] == [5, 3, 9]
    del ranks["0.weight"]
    rest = refresh(model, ranks | {"*.weight": 2})
    assert [rest[name].rank for name in names] == [2, 10, 9]


def test_wrapped_models_go_by_the_names_that_refresh_gives_them():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = layers((20, 12), (12, 30))
    wanted = allocate_ranks({"0.weight": 0.5, "1.weight": 1.0}, model)
    wrapped = nn.ModuleList(
        [checkpoint_wrapper(model[0]), torch.compile(model[1], backend="eager")]
    )
    names = list(refresh(wrapped, 2))
    assert names == ["0.weight", "1.weight"]
    assert allocate_ranks(dict(zip(names, (0.5, 1.0), strict=True)), wrapped) == wanted


@pytest.mark.parametrize("rank", [0, 13, -1])
def test_refresh_refuses_an_allocation_out_of_range_by_name(rank):
    model = layers((20, 12), (12, 30))
    ranks = allocate_ranks({"0.weight": 1.0, "1.weight": 1.0}, model) | {"1.weight": rank}
    with pytest.raises(ValueError, match=rf"rank of '1\.weight'.*= 12 of its shape.*got {rank}"):
        refresh(model, ranks)


@pytest.mark.parametrize(
    ("importance", "shapes", "options", "message"),
    [
        ({"a": 1.0}, {"a": (4, 4)}, {"mrr": -0.1}, r"mrr to be a share in \[0, 1\], got -0\.1"),
        ({"a": 1.0}, {"a": (4, 4)}, {"trr": 1.1}, r"trr to be a share in \[0, 1\], got 1\.1"),
        ({"a": 1.0}, {"a": (4, 4)}, {"trr": float("nan")}, r"trr .* got nan"),
        ({"a": 1.0}, {"a": (4, 4)}, {"mrr": 0.5, "trr": 0.4}, r"mrr=0\.5 and trr=0\.4"),
        ({}, {"a": (4, 4)}, {}, "at least one layer, got none"),
        ({"a": 1.0, "b": float("nan")}, {"a": (4, 4), "b": (4, 4)}, {}, "got 'b': nan"),
        ({"b": float("inf")}, {"b": (4, 4)}, {}, "got 'b': inf"),
        ({"a": 1.0, "b": 1.0}, {"a": (4, 4)}, {}, "none for 'b'"),
        ({"b": 1.0}, {"b": (4,)}, {}, r"shape of 'b' to be \(\.\.\., m, n\), got \(4,\)"),
        ({"b": 1.0}, {"b": (4, 0)}, {}, r"shape of 'b' to be \(\.\.\., m, n\), got \(4, 0\)"),
    ],
)
def test_bad_allocations(importance, shapes, options, message):
    with pytest.raises(ValueError, match=rf"osf_torch\.allocate_ranks: .*{message}"):
        allocate_ranks(importance, shapes, **options)


# by energy


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    decay=st.floats(0, 4),
    energy=st.floats(0.01, 1.0),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_smallest_rank_that_holds_the_energy(m, n, decay, energy, dtype):
    """Against LAPACK's singular values in float64; decay 4 is κ up to 3e5."""
    spectrum = [(i + 1) ** -decay for i in range(min(m, n))]
    model = nn.Sequential(layer(m, n, spectrum, dtype))
    (rank,) = ranks_by_energy(model, energy).values()
    squares = torch.linalg.svdvals(model[0].weight.detach().double()).square()
    held = squares.cumsum(0) / squares.sum()
    slack = 1e-13
    assert held[rank - 1] >= energy - slack
    assert rank == 1 or held[rank - 2] < energy + slack


def test_thresholds_on_a_known_spectrum():
    """σ² = 8, 4, 2, 1, 1 of 16, on the diagonal: every sum is exact."""
    model = nn.Sequential(nn.Linear(7, 5, bias=False, dtype=torch.float64))
    squares = torch.tensor([2.0, 1.0, 8.0, 1.0, 4.0], dtype=torch.float64)
    model[0].weight.data.copy_(torch.eye(5, 7) * squares.sqrt()[:, None])
    expected = {0.01: 1, 0.499: 1, 0.501: 2, 0.749: 2, 0.751: 3, 0.876: 4, 0.938: 5, 1.0: 5}
    for energy, rank in expected.items():
        assert ranks_by_energy(model, energy) == {"0.weight": rank}


def test_all_of_the_energy_is_the_numerical_rank():
    model = nn.Sequential(layer(40, 25, [1.0] * 6 + [1e-3] * 3 + [1e-6] + [0.0] * 15))
    assert ranks_by_energy(model, 1.0) == {"0.weight": 10}


def test_float32_energy_would_miss_what_float64_tells():
    """A tail of 4e-8 of the energy: rounding in a float32 Gram matrix is as large."""
    model = nn.Sequential(layer(64, 64, [1.0] + [2e-4] * 63 + [], torch.float64))
    tail = 63 * 4e-8 / (1 + 63 * 4e-8)
    assert ranks_by_energy(model, 1 - tail * 1.01) == {"0.weight": 1}
    assert ranks_by_energy(model, 1 - tail * 0.5)["0.weight"] == pytest.approx(32, abs=1)


@pytest.mark.parametrize("scale", [1e300, 1e160, 1e-160, 1e-300])
def test_float64_weights_of_any_size(scale):
    """Whose squares overflow, or vanish."""
    model = nn.Sequential(layer(12, 9, [2.0**-i for i in range(9)]))
    wanted = {energy: ranks_by_energy(model, energy) for energy in (0.5, 0.9, 0.999)}
    assert len({rank["0.weight"] for rank in wanted.values()}) == 3
    model[0].weight.data.mul_(scale)
    assert {energy: ranks_by_energy(model, energy) for energy in wanted} == wanted


def test_batches_of_all_shapes_keep_the_models_order(monkeypatch):
    monkeypatch.setattr("osf_torch.ranks.BATCH", 2)
    shapes = [(8, 5), (5, 8), (8, 5), (6, 6), (8, 5)]
    model = layers(*shapes)
    found = ranks_by_energy(model, 0.7)
    assert list(found) == [f"{i}.weight" for i in range(5)]
    for i, member in enumerate(model):
        assert ranks_by_energy(nn.Sequential(member), 0.7) == {"0.weight": found[f"{i}.weight"]}


def test_limits_by_share_number_and_pattern():
    model = layers((20, 12), (12, 30), (9, 9))
    names = ["0.weight", "1.weight", "2.weight"]
    free = ranks_by_energy(model, 0.5)
    assert all(1 < free[name] < 9 for name in names)
    assert ranks_by_energy(model, 0.5, minimum=0.75) == dict(zip(names, [9, 9, 7], strict=True))
    assert ranks_by_energy(model, 0.99, maximum=0.5) == dict(zip(names, [6, 6, 4], strict=True))
    assert ranks_by_energy(model, 0.5, minimum={"1.*": 11, "*": 1}) == free | {"1.weight": 11}


def test_zeros_get_the_minimum():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data.zero_()
    assert ranks_by_energy(model, 0.9) == {"0.weight": 1}
    assert ranks_by_energy(model, 1.0, minimum=3) == {"0.weight": 3}


def test_refresh_captures_the_energy():
    model = layers((20, 12), (12, 30), (9, 9))
    ranks = ranks_by_energy(model, 0.8)
    for name, entry in refresh(model, ranks).items():
        assert entry.rank == ranks[name]
        assert entry.captured >= 0.8 - 1e-5
    fewer = {name: rank - 1 for name, rank in ranks.items()}
    assert all(entry.captured < 0.8 for entry in refresh(model, fewer).values())


def test_nothing_is_drawn_or_changed_and_progress_counts_weights(capsys):
    model = layers((6, 4), (6, 4), (3, 3))
    before = [p.detach().clone() for p in model.parameters()]
    drawn = torch.get_rng_state()
    ranks_by_energy(model, 0.9, progress="always")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "energy 3/3" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.01, float("nan")])
def test_energy_out_of_range(energy):
    with pytest.raises(ValueError, match=r"ranks_by_energy: expected energy .* got"):
        ranks_by_energy(layers((4, 4)), energy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "q.*"}, r"filter='q\.\*'"),
        ({"minimum": 5}, r"rank of '1\.weight'.*= 4 of its shape"),
        ({"maximum": 0}, r"rank of '0\.weight'"),
        ({"minimum": 4, "maximum": {"0.*": 8, "1.*": 2}}, r"got '1\.weight': 4 > 2"),
    ],
)
def test_bad_limits(options, message):
    with pytest.raises(ValueError, match=rf"osf_torch\.ranks_by_energy: .*{message}"):
        ranks_by_energy(layers((9, 8), (4, 4)), 0.9, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = layers((4, 4), (5, 4))
    model[1].weight.data[2, 3] = value
    with pytest.raises(ValueError, match=r"NaN or Inf in '1\.weight'"):
        ranks_by_energy(model, 0.9)
