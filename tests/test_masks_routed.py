"""Padding among the tokens that are routed to experts, whose places and number it changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from osf_torch.masks import Padding
from osf_torch.reads import Reads
from tests.helpers import generator_for, randn
from tests.test_reads import Kept, same_rows

BATCH, LENGTH, WIDTH, EXPERTS = 3, 4, 6, 3


def mask_of(*real: int) -> torch.Tensor:
    return (torch.arange(LENGTH) < torch.tensor(real)[:, None]).long()


def routed(x: torch.Tensor, chosen: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """The rows of x (tokens, width) by the experts (tokens, k) that are chosen for each."""
    return [(e, x[(chosen == e).any(-1)]) for e in range(EXPERTS) if (chosen == e).any()]


def by_expert(parts) -> dict[int, torch.Tensor]:
    found: dict[int, list[torch.Tensor]] = {}
    for e, rows in parts:
        found.setdefault(e, []).append(rows)
    return {e: torch.cat(rows) for e, rows in found.items() if sum(map(len, rows))}


def started(mask: torch.Tensor) -> Padding:
    padding = Padding("auto", "test")
    ids = torch.arange(1, mask.numel() + 1).view(mask.shape)
    assert padding.probe({"input_ids": ids, "attention_mask": mask}) is not None
    assert padding.found
    assert padding.probing
    return padding


@settings(max_examples=40, deadline=None)
@given(
    real=st.tuples(*[st.integers(1, LENGTH)] * BATCH).filter(lambda r: min(r) < LENGTH),
    k=st.integers(1, EXPERTS),
    seed=st.integers(0, 2**31),
)
def test_real_tokens_alone_count_wherever_padding_is_routed(real, k, seed):
    mask = mask_of(*real)
    generator = generator_for("routed", seed)
    x = randn(mask.numel(), WIDTH, dtype=torch.float64, generator=generator)
    flat = mask.flatten() != 0
    chosen = torch.rand(len(x), EXPERTS, generator=generator).topk(k, -1).indices
    other, elsewhere = x.clone(), chosen.clone()
    other[~flat] += 1
    again = torch.rand(len(x), EXPERTS, generator=generator).topk(k, -1).indices
    elsewhere[~flat] = again[~flat]
    padding = started(mask)
    assert padding.routed("w", routed(other, elsewhere)) == []
    padding.run()
    shuffled = torch.randperm(len(x), generator=generator)  # experts one by one, or sorted
    found = by_expert(padding.routed("w", routed(x[shuffled], chosen[shuffled])))
    expected = by_expert(routed(x[flat], chosen[flat]))
    assert found.keys() == expected.keys()
    for e, rows in expected.items():
        assert same_rows(found[e], rows)


CHANGES = {
    "a real token that padding reaches": lambda x, chosen: (x + torch.eye(12, WIDTH) * 0.1, chosen),
    "a real token that is routed elsewhere": lambda x, chosen: (
        x,
        chosen.index_fill(0, torch.tensor([0]), 2),
    ),
    "padding that a model blanks out, and a real token": lambda x, chosen: (
        torch.cat([x[:1] + 1, x[1:]]),
        chosen,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_row_counts_where_real_tokens_changed(change):
    mask = mask_of(4, 2, 1)
    generator = generator_for("leak")
    x = randn(12, WIDTH, dtype=torch.float64, generator=generator)
    chosen = torch.zeros(12, 1, dtype=torch.long)
    padding = started(mask)
    padding.routed("w", routed(*CHANGES[change](x, chosen)))
    padding.run()
    found = by_expert(padding.routed("w", routed(x, chosen)))
    assert same_rows(found[0], x)


def test_every_row_counts_where_tokens_are_dropped():
    """Of experts with a capacity it can't be said how many real tokens they have to read."""
    mask = mask_of(4, 2, 1)
    x = randn(12, WIDTH, dtype=torch.float64, generator=generator_for("dropped"))
    chosen = torch.zeros(12, 1, dtype=torch.long)
    padding = started(mask)
    padding.routed("w", routed(x[:11] + (mask.flatten() == 0)[:11, None], chosen[:11]))
    padding.run()
    found = by_expert(padding.routed("w", routed(x[:11], chosen[:11])))
    assert same_rows(found[0], x[:11])


class Mixture(nn.Module):
    """One layer of experts, each token read by the one that its first number names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH, dtype=torch.float64)
        self.experts = nn.Parameter(
            randn(EXPERTS, 5, WIDTH, dtype=torch.float64, generator=generator_for("mixture"))
        )

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).flatten(0, 1)
        chosen = input_ids.flatten() % EXPERTS
        for e in chosen.unique():
            x[chosen == e] @ self.experts[e].mT


def test_a_module_that_is_called_twice_is_matched_call_by_call():
    model, mask = Mixture(), mask_of(4, 2, 1)
    ids = torch.randint(1, 16, mask.shape, generator=generator_for("twice"))
    batch = {"input_ids": ids, "attention_mask": mask}
    weights = {"experts": model.experts}
    kept = Kept()
    padding = Padding("auto", "test")
    with torch.no_grad(), Reads(model, weights, {"experts": kept}, "test").watching(padding):
        other = padding.probe(batch)
        for _ in range(2):
            model(**other)
        assert not kept.rows
        padding.run()
        for _ in range(2):
            model(**batch)
    real = ids[mask != 0]
    for (side, e), rows in kept.all().items():
        assert side == "V"
        expected = model.embed(real[real % EXPERTS == e]).detach()
        # a padded token that is some real token's twin can't be told from it, and may count
        distinct = {tuple(row) for row in rows.tolist()}
        assert distinct == {tuple(row) for row in expected.tolist()}
        assert len(rows) >= 2 * len(expected)
