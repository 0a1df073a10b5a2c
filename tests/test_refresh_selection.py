"""osf_torch.refresh: which weights it takes and at what rank, what it shows, what it refuses."""

from __future__ import annotations

import io
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from osf_torch import protect, refresh, selection
from tests.small_refresh import DECOMPOSING, Recorder, linear, small_model

# which weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(18, 12)
        self.inner = linear(12, 12)
        self.head = nn.Linear(12, 18, bias=False)
        self.again = self.inner
        self.head.weight = self.embedding.weight


def test_tied_weights_are_decomposed_once_by_their_first_name():
    model = Tied()
    found = refresh(model, 3)
    assert list(found) == ["embedding.weight", "inner.weight"]
    named = refresh(model, {"head.weight": 2, "again.*": 5}, filter=["head.*", "again.*"])
    assert {name: s.rank for name, s in named.items()} == {"embedding.weight": 2, "inner.weight": 5}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert "2 parameters" in repr(protect(model, found, optimizer=optimizer))


def test_frozen_weights_are_left_out_unless_a_filter_takes_them():
    model = small_model()
    model[2].weight.requires_grad_(False)
    assert list(refresh(model, 3)) == ["0.weight", "3.weight"]
    assert list(refresh(model, 3, filter="2.*")) == ["2.weight"]


class Conv1D(nn.Module):
    """transformers' layer of GPT-2: y = x W + b, W (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear(inputs, outputs).weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_conv1d_is_a_linear_layer():
    model = nn.Sequential(Conv1D(18, 12), nn.Conv1d(3, 3, 1), nn.Embedding(9, 5), linear(8, 8))
    found = refresh(model, 0.5)
    assert list(found) == ["0.weight", "3.weight"]
    assert (found["0.weight"].shape, found["0.weight"].rank) == ((12, 18), 6)
    guard = protect(model, {"0.weight": found["0.weight"]}, restore=False, when="backward")
    model[0](torch.randn(4, 12)).square().sum().backward()
    gradient = model[0].weight.grad
    guard.remove()
    assert float(gradient.norm()) > 0.01
    assert float((found["0.weight"].U.columns.mT @ gradient).norm()) < 1e-5
    assert float((gradient @ found["0.weight"].V.columns).norm()) < 1e-5


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_without_elements_are_passed_over():
    model = nn.Sequential(nn.Linear(0, 4), linear(8, 8), nn.Linear(4, 0))
    for filter in (None, "*.weight", lambda name, parameter: parameter.dim() == 2):
        assert list(refresh(model, 0.5, filter=filter)) == ["1.weight"]
    with pytest.raises(ValueError, match="no match among its 0: none"):
        refresh(model[:1], 0.5)


@pytest.mark.parametrize(
    ("given", "rank"), [(np.int64(3), 3), (np.float32(0.25), 4), (Fraction(1, 4), 4)]
)
def test_numbers_of_other_types_are_ranks(given, rank):
    entry = refresh(small_model(), given)["0.weight"]
    assert entry.rank == rank
    assert type(entry.rank) is int


def test_filters():
    model = nn.ModuleDict({"emb": nn.Embedding(10, 6), "a": nn.Linear(6, 6), "b": linear(6, 6)})
    assert list(refresh(model, 2)) == ["a.weight", "b.weight"]
    assert list(refresh(model, 2, filter="*")) == ["emb.weight", "a.weight", "b.weight"]
    assert list(refresh(model, 2, filter=["b.*", "emb.*"])) == ["emb.weight", "b.weight"]
    small = refresh(model, 2, filter=lambda name, p: p.shape[0] == 6 and name < "b")
    assert list(small) == ["a.weight"]


def test_ranks_by_name_then_by_the_first_pattern():
    model = nn.ModuleDict({"q": linear(12, 12), "k": linear(12, 12), "up": linear(24, 12)})
    found = refresh(model, {"[qk].*": 0.25, "q.weight": 7, "*": 1.0})
    assert {name: s.rank for name, s in found.items()} == {
        "q.weight": 7,
        "k.weight": 3,
        "up.weight": 12,
    }


def test_a_share_is_of_the_shorter_side_and_at_least_one():
    found = refresh(nn.Sequential(linear(24, 8), linear(2, 24)), 0.1)
    assert [s.rank for s in found.values()] == [1, 1]


# showing


def test_summary_has_a_line_for_every_weight_and_one_for_all():
    model = nn.Sequential(linear(16, 16, 0), linear(24, 16, 1))
    found = refresh(model, {"0.weight": 12, "1.weight": 4})
    lines = found.summary().splitlines()
    assert lines.pop() == "100 % of the elements that train are covered"
    assert len(lines) == 2 + len(found) + 1
    assert lines[2].split()[:4] == ["0.weight", "16x16", "12", "low/low"]
    assert lines[3].split()[:4] == ["1.weight", "24x16", "4", "high/high"]
    assert lines[4].startswith("all 2")
    assert len({len(line) for line in lines[1:]}) == 1
    assert "2 weights" in repr(found)
    assert found.nbytes == sum(s.nbytes for s in found.values())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_bar_off_a_terminal(capsys):
    refresh(small_model(), 4)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_always_prints_a_line_a_batch_off_a_terminal(capsys):
    refresh(small_model(), 4, progress="always")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("refresh 2/3 [")
    assert "24x16 r=4 0.weight" in lines[0]
    assert "refresh 3/3 [########################]" in lines[1]
    assert "0:00 left" in lines[1]


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_bar_on_a_terminal(monkeypatch, with_rich):
    if with_rich:
        pytest.importorskip("rich", reason="rich draws this bar")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    refresh(small_model(), 4)
    assert "refresh 3/3" in stream.getvalue()
    silent = Terminal()
    monkeypatch.setattr(sys, "stderr", silent)
    refresh(small_model(), 4, progress=False)
    assert silent.getvalue() == ""


# bad input


def test_nothing_matching_names_what_there_is():
    model = nn.ModuleDict({"emb": nn.Embedding(10, 6), "conv": nn.Conv2d(3, 3, 3)})
    with pytest.raises(
        ValueError, match=r"weights of linear layers.*emb\.weight \(10x6\).*filter="
    ):
        refresh(model, 2)
    with pytest.raises(ValueError, match=r"filter='decoder\.\*'.*among its 3: 0\.weight \(24x16\)"):
        refresh(small_model(), 2, filter="decoder.*")
    frozen = nn.Sequential(linear(6, 6)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight \(6x6, frozen\)"):
        refresh(frozen, 2)
    with pytest.raises(ValueError, match="among its 0: none"):
        refresh(nn.ReLU(), 2)


def test_many_names_are_cut_short():
    model = nn.Sequential(*(nn.Embedding(3, 3) for _ in range(20)))
    with pytest.raises(ValueError, match=f"and {20 - selection.LISTED} more"):
        refresh(model, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_before_anything_runs(monkeypatch, bad):
    model = small_model()
    model[3].weight.data[2, 3] = bad
    model[3].weight.data[4, 1] = bad
    recorder = Recorder(monkeypatch)
    with pytest.raises(ValueError, match=r"NaN or Inf: '3\.weight' has 2 such entries"):
        refresh(model, 4)
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("ranks", "kind", "message"),
    [
        (17, ValueError, r"'0\.weight' to be from 1 to min\(m, n\) = 16 of its shape .*got 17"),
        (0, ValueError, "got 0"),
        (-1, ValueError, "got -1"),
        (0.0, ValueError, r"float in \(0, 1\], got 0\.0"),
        (1.5, ValueError, r"float in \(0, 1\], got 1\.5"),
        (float("nan"), ValueError, "got nan"),
        (True, TypeError, "got True"),
        (np.bool_(True), TypeError, "got np"),
        ("half", TypeError, "got 'half'"),
        ({"0.*": 4}, ValueError, r"rank for every weight.*got none for 2\.weight, 3\.weight"),
        ({"*": 4, "lm_head.*": 2}, ValueError, r"every key of ranks.*got 'lm_head\.\*'"),
        ({"*": 4, "3.weight": 99}, ValueError, r"'3\.weight'.*got 99"),
    ],
)
def test_bad_ranks_are_refused_by_name(ranks, kind, message):
    with pytest.raises(kind, match=message):
        refresh(small_model(), ranks)


def test_other_bad_input():
    model = small_model()
    with pytest.raises(ValueError, match='expected keep to be "smaller" or "all", got \'low\''):
        refresh(model, 4, keep="low")
    with pytest.raises(
        ValueError, match=r"compute_dtype to be torch\.float64 or None, got torch\.f"
    ):
        refresh(model, 4, compute_dtype=torch.float32)
    with pytest.raises(TypeError, match="expected filter to be a function"):
        refresh(model, 4, filter=[3])
    with pytest.raises(ValueError, match=r"'0\.weight' to have values, got a meta tensor"):
        refresh(nn.Sequential(nn.Linear(4, 4, device="meta")), 2)
    model.register_parameter("codes", nn.Parameter(torch.zeros(4, 4).int(), requires_grad=False))
    with pytest.raises(TypeError, match=r"'codes' to be one of float32.*got torch\.int32"):
        refresh(model, 4, filter="codes")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"filter": 3}, TypeError, "filter to be a function.*got 3"),
        ({"max_workspace_bytes": "1GB"}, TypeError, "max_workspace_bytes to be an int.*got '1GB'"),
        ({"max_workspace_bytes": True}, TypeError, "max_workspace_bytes to be an int.*got True"),
        ({"max_workspace_bytes": 0}, ValueError, "max_workspace_bytes to be at least 1, got 0"),
        ({"offload": "foo"}, ValueError, "offload to name a device.*got 'foo'"),
        ({"offload": 3}, TypeError, "offload to be a torch.device.*got int"),
        ({"dtype": torch.int32}, TypeError, r"dtype to be a floating-point.*got torch\.int32"),
        ({"dtype": "bfloat16"}, TypeError, "dtype to be a floating-point.*got 'bfloat16'"),
    ],
)
def test_options_of_other_types_are_refused_before_anything_runs(
    monkeypatch, options, kind, message
):
    recorder = Recorder(monkeypatch)
    with pytest.raises(kind, match=rf"osf_torch\.refresh: expected {message}"):
        refresh(small_model(), 4, **options)
    assert recorder.calls == []


def test_a_state_dict_is_no_model():
    with pytest.raises(TypeError, match=r"model to be an nn\.Module, got OrderedDict"):
        refresh(small_model().state_dict(), 4)


def test_advice_is_of_arguments_that_refresh_takes():
    model = small_model()
    with pytest.raises(ValueError, match="raise it, or lower ranks") as raised:
        refresh(model, 4, max_workspace_bytes=100)
    assert "oversample" not in str(raised.value)
    for method in ("exact", "gram", "randomized"):
        with pytest.warns(RuntimeWarning, match="tol") as warned:
            refresh(model, 4, method=method, tol=1e-12)
        for one in warned:
            assert one.filename == __file__
            assert not re.search("niter|oversample|pass float64", str(one.message))


def test_an_error_of_the_solver_names_the_parameters(monkeypatch):
    model = small_model()
    with pytest.raises(ValueError, match=r"max_workspace_bytes for '0\.weight' .* \(24 × 16, "):
        refresh(model, 4, max_workspace_bytes=100)

    def fail(*_, **__):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(DECOMPOSING, "truncated_svd", fail)
    with pytest.raises(RuntimeError, match=r"osf_torch\.refresh: 0\.weight, 3\.weight: no conv"):
        refresh(model, 4)
