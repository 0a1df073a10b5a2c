"""osf_torch.reads: every row that a weight is multiplied with, by whatever product reads it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osf_torch.masks import Padding
from osf_torch.reads import Reads
from tests.helpers import generator_for, randn


class Kept:
    """A meter that keeps all."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], list[torch.Tensor]] = {}

    def add(self, side, matrix, rows):
        if len(rows):
            self.rows.setdefault((side, matrix), []).append(rows.clone())

    def all(self) -> dict[tuple[str, int], torch.Tensor]:
        return {key: torch.cat(rows) for key, rows in self.rows.items()}


def reads(model: nn.Module, run) -> dict[str, dict[tuple[str, int], torch.Tensor]]:
    """What each parameter with a matrix read while ``run`` ran, by side and matrix."""
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    meters = {name: Kept() for name in weights}
    with torch.no_grad(), Reads(model, weights, meters, "test").watching(Padding(None, "test")):
        run()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    return {name: meter.all() for name, meter in meters.items()}


def holding(*shape: int) -> nn.Module:
    """A module with one parameter W of a shape."""
    model = nn.Module()
    W = randn(*shape, dtype=torch.float64, generator=generator_for("W", shape))
    model.W = nn.Parameter(W)
    return model


def tokens(*shape: int, key: object = "x") -> torch.Tensor:
    return randn(*shape, dtype=torch.float64, generator=generator_for(key, shape))


def same_rows(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they are the same rows in any order."""
    if found.shape != expected.shape:
        return False
    a, b = (sorted(x.double().tolist()) for x in (found, expected))
    return bool(torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-6, atol=1e-9))


# matrices

FORMS = {
    "linear": (lambda W, x: F.linear(x, W), "V"),
    "linear of sequences": (lambda W, x: F.linear(x.view(2, 3, -1), W), "V"),
    "linear of strided sequences": (
        lambda W, x: F.linear(x.view(2, 3, -1).transpose(0, 1).mT.contiguous().mT, W),
        "V",
    ),
    "linear with a bias": (lambda W, x: F.linear(x, W, W.new_ones(len(W))), "V"),
    "matrix first": (lambda W, x: W @ x.mT, "V"),
    "batches": (lambda W, x: torch.matmul(W, x.view(2, 3, -1).mT), "V"),
    "a vector at a time": (lambda W, x: [W @ row for row in x], "V"),
    "parts of its rows": (lambda W, x: F.linear(x, W[2:4]), "V"),
    "heads": (lambda W, x: x @ W.view(2, -1, W.shape[-1]).mT, "V2"),
    "einsum": (lambda W, x: torch.einsum("ti,oi->to", x, W), "V"),
    "einsum the other way": (lambda W, x: torch.einsum("ti,io->to", x, W.mT), "V"),
    "cast": (lambda W, x: F.linear(x.float(), W.float()), "V"),
    "scaled": (lambda W, x: F.linear(x, W * 0.5), "V"),
    "with something added": (lambda W, x: F.linear(x, W + torch.ones_like(W)), "V"),
    "the other side": (lambda W, x: x @ W, "U"),
    "the other side, cast": (lambda W, x: x.float() @ W.float(), "U"),
    "the other side, matrix first": (lambda W, x: W.mT @ x.mT, "U"),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_matrix_reads(form, inference):
    run, side = FORMS[form]
    times = int(side[1:] or 1)
    for m, n in ((6, 4), (4, 6), (6, 6), (6, 1), (1, 6)):
        if m == 1 and form in ("heads", "parts of its rows"):
            continue
        if n == 1 and "einsum" in form:
            continue  # no product: each element of a column is multiplied with a number
        model = holding(m, n)
        x = tokens(6, m if side == "U" else n)

        def ran(model=model, x=x):
            with torch.inference_mode(inference):
                run(model.W, x)

        found = reads(model, ran)["W"]
        assert list(found) == [(side[0], 0)]
        assert same_rows(found[side[0], 0], torch.cat([x] * times))


@pytest.mark.parametrize(
    "made",
    [lambda W: W * torch.arange(1.0, 5.0), lambda W: W / (1 + W.abs()), lambda W: 1 / W],
    ids=["by column", "by itself", "its inverse"],
)
def test_a_weight_that_is_scaled_by_more_than_a_number_is_not_followed(made):
    """What the product reads isn't what the weight reads: such a weight is refused as unread."""
    model, x = holding(6, 4), tokens(3, 4)
    assert not reads(model, lambda: F.linear(x, made(model.W)))["W"]


def test_both_sides_of_one_weight():
    """As of an autoencoder whose decoder is the encoder's transpose."""
    model, x, y = holding(5, 3), tokens(4, 3), tokens(7, 5)
    found = reads(model, lambda: (F.linear(x, model.W), y @ model.W))["W"]
    assert set(found) == {("U", 0), ("V", 0)}
    assert torch.equal(found["V", 0], x)
    assert torch.equal(found["U", 0], y)


def test_products_of_weights_and_of_activations_are_no_reads():
    model = holding(4, 4)
    model.other = nn.Parameter(model.W.detach().clone())
    x = tokens(3, 4)
    found = reads(model, lambda: (model.W @ model.other, x @ x.mT, model.W.sum() * x))
    assert found == {"W": {}, "other": {}}


def test_memory_that_is_used_again_is_no_weight():
    """Copies are let go of; activations that come to lie where they lay aren't taken for them."""
    model, x = holding(6, 6), tokens(6, 6)

    def run():
        for _ in range(50):
            F.linear(x, model.W * 2)
            F.linear(x, x + 1)

    assert len(reads(model, run)["W"]["V", 0]) == 50 * 6


def test_a_part_of_its_columns_is_refused():
    model, x = holding(5, 6), tokens(4, 3)
    with pytest.raises(
        ValueError, match=r"test: expected inputs of 'W' to have n=6.*got 3.*filter"
    ):
        reads(model, lambda: F.linear(x, model.W[:, :3]))
    with pytest.raises(ValueError, match=r"test: expected inputs of 'W' to have m=5.*got 3"):
        reads(model, lambda: x @ model.W[1:4])


# modules


@pytest.mark.parametrize("same", [True, False])
def test_attention(same):
    model = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    q, k, v = tokens(2, 3, 6, key="q"), tokens(2, 4, 6, key="k"), tokens(2, 4, 6, key="v")
    if same:
        k = v = q
    found = reads(model, lambda: model(q, k, v))
    read = [q] if same else [q, k, v]
    expected = torch.cat([x.transpose(0, 1).flatten(0, 1) for x in read])
    assert same_rows(found["in_proj_weight"]["V", 0], expected)
    out = found["out_proj.weight"]["V", 0]
    with torch.no_grad():
        y = F.linear(out, model.out_proj.weight, model.out_proj.bias)
        assert same_rows(y, model(q, k, v)[0].flatten(0, 1))


def test_attention_of_other_widths():
    model = nn.MultiheadAttention(6, 2, kdim=5, vdim=4, batch_first=True, dtype=torch.float64)
    q, k, v = tokens(2, 3, 6), tokens(2, 4, 5), tokens(2, 4, 4)
    found = reads(model, lambda: model(q, k, v))
    for part, x in (("q", q), ("k", k), ("v", v)):
        assert same_rows(found[f"{part}_proj_weight"]["V", 0], x.flatten(0, 1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_autocast_whose_casts_were_kept_from_before():
    model, x = nn.Linear(5, 4), tokens(3, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        found = reads(model, lambda: model(x))
    assert torch.equal(found["weight"]["V", 0], x.bfloat16())


# experts


def routing(tokens: int, experts: int, k: int) -> torch.Tensor:
    """Which k experts (tokens, k) read a token; the last expert none."""
    scores = torch.rand(tokens, experts - 1, generator=generator_for("route"))
    return scores.topk(k, -1).indices


def one_by_one(W, x, chosen):
    for e in chosen.unique():  # as an index of no dimensions
        F.linear(x[(chosen == e).any(-1)], W[e])


def gathered(W, x, chosen):
    rows = x.repeat_interleave(chosen.shape[-1], 0)
    torch.bmm(W[chosen.flatten()], rows[:, :, None])


def gathered_by_token(W, x, chosen):
    torch.einsum("tkoi,ti->tko", W[chosen], x)


def grouped(W, x, chosen):
    flat, order = chosen.flatten().sort(stable=True)
    ends = torch.bincount(flat, minlength=len(W)).cumsum(0).int()
    torch._grouped_mm(x.repeat_interleave(chosen.shape[-1], 0)[order], W.mT, offs=ends)


WAYS = [
    (run, transposed, cast)
    for run in (one_by_one, gathered, grouped)
    for transposed in (False, True)
    for cast in (False, True)
]


# Of what is gathered by token a copy isn't followed: its matrices lie along two dimensions.
@pytest.mark.parametrize(("run", "transposed", "cast"), [*WAYS, (gathered_by_token, False, False)])
def test_an_expert_reads_the_tokens_routed_to_it(run, transposed, cast):
    E, m, n = 4, 8, 16
    model = holding(E, n, m) if transposed else holding(E, m, n)
    model.float()
    x, chosen = tokens(9, n).float(), routing(9, E, 2)

    def ran():
        W = model.W.mT if transposed else model.W
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            run(W, x, chosen)

    found = reads(model, ran)["W"]
    side = "U" if transposed else "V"
    reached = chosen.unique().tolist()
    assert sorted(found) == [(side, e) for e in reached]
    assert len(reached) == 3
    for e in reached:
        expected = x[(chosen == e).any(-1)]
        rows = found[side, e]
        if cast:
            expected, rows = expected.bfloat16(), rows.bfloat16()
        assert same_rows(rows, expected)


def test_the_only_expert():
    model, x = holding(1, 4, 5), tokens(6, 5)
    run = lambda: gathered(model.W, x, torch.zeros(6, 1, dtype=torch.long))  # noqa: E731
    assert same_rows(reads(model, run)["W"]["V", 0], x)


def test_a_copy_that_repeats_a_matrix_is_no_batch_of_experts():
    model, x = holding(4, 5), tokens(3, 2, 5)
    found = reads(model, lambda: x @ model.W.expand(3, 4, 5).clone().mT)["W"]
    assert set(found) <= {("V", 0)}


@pytest.mark.parametrize("form", ["bi,eoi->beo", "bi,eio->beo", "bei,eoi->beo", "ebi,eio->beo"])
def test_experts_that_all_read_every_token(form):
    inputs, weight = form.split("->")[0].split(",")
    E, side = 3, "V" if weight[-1] == "i" else "U"
    model = holding(E, 4, 5) if side == "V" else holding(E, 5, 4)
    x = tokens(*[{"b": 6, "e": E, "i": 5}[axis] for axis in inputs])
    found = reads(model, lambda: torch.einsum(form, x, model.W))["W"]
    assert sorted(found) == [(side, e) for e in range(E)]
    for e in range(E):
        own = x.movedim(inputs.index("e"), 0)[e] if "e" in inputs else x
        assert same_rows(found[side, e], own)


def test_experts_that_are_mixed_before_they_are_multiplied_read_nothing():
    """A weighted sum of matrices reads: none of them by itself."""
    model, x = holding(3, 4, 5), tokens(3, 5)
    mix = torch.einsum("e,eoi->oi", tokens(3), model.W.detach())
    found = reads(model, lambda: F.linear(x, torch.einsum("e,eoi->oi", tokens(3), model.W)))
    assert found == {"W": {}}
    assert mix.shape == (4, 5)
