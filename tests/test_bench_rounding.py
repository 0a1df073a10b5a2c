"""bench.rounding: what is measured of confined weights of bfloat16, by how C gets into them."""

from __future__ import annotations

import torch

from bench import minilm, rounding
from osf_torch import refresh
from osf_torch.free import merging
from tests.helpers import generator_for

SMALL = minilm.Config(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)


def pairs(count):
    generator = generator_for("rounding")
    mask = torch.ones(4, 8, dtype=torch.bool)
    return [
        tuple((torch.randint(0, 50, (4, 8), generator=generator), mask) for _ in range(2))
        for _ in range(count)
    ]


def test_only_what_is_rounded_from_one_base_has_all_that_was_trained():
    torch.manual_seed(0)
    model = minilm.SentenceEncoder(SMALL).eval()
    subspaces = refresh(model, 0.5, progress=False)
    before, merge = model.state_dict(), merging._merge_whole
    rows = {
        policy: rounding.run_policy(policy, model, subspaces, pairs(30), 2e-5, 0.5, lambda _: None)
        for policy in rounding.POLICIES
    }
    assert merging._merge_whole is merge
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    lost = {policy: row.lost for policy, row in rows.items()}
    assert lost[rounding.FLOAT32] < 1e-2
    assert lost[rounding.KEPT] < lost[rounding.ADDED]
    assert lost[rounding.BESIDE] == 0
    assert rows[rounding.FLOAT32].drift < 1e-5
    # Each step of chance adds to what is protected; a weight that is rounded once stays.
    assert rows[rounding.STOCHASTIC].drift > 2 * rows[rounding.KEPT].drift
    text = rounding.table(list(rows.values()))
    assert all(policy in text for policy in rounding.POLICIES)


def test_chance_rounds_to_the_mean():
    x = torch.full((20_000,), 1.0 + 2.0**-10)
    rounded = rounding.stochastically_rounded(x, generator_for("chance"))
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(float(rounded.double().mean()) - float(x[0])) < 2e-4
    exact = torch.tensor([0.5, -2.0, 0.0])
    assert torch.equal(rounding.stochastically_rounded(exact, generator_for(1)).float(), exact)
