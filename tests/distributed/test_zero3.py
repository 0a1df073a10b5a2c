"""DeepSpeed's ZeRO-3: gradients are projected by post-accumulate hooks, before they are cut up; and
what is confined beside its weights is partitioned with them."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import nn

from osf_torch import confine, protect, refresh
from tests.distributed.ranks import run_ranks
from tests.helpers import generator_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
    ),
]


def mlp():
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    gen = generator_for("zero3")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=gen))
    return model


def partitioned(model, optimizer=None):
    import deepspeed

    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    # What is gathered is let go at once.
    stage |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": stage | {"stage3_prefetch_bucket_size": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def trained(rank, ranks, first):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    model = mlp()
    weights = dict(model.named_parameters())
    subspaces = refresh(model, 0.4, progress=False, compute_dtype=torch.float64)
    if first == "protect":
        guard = protect(model, subspaces, restore=False)
        engine = partitioned(model)
    else:
        engine = partitioned(model)
        guard = protect(engine, subspaces, restore=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"'0\.weight' partitioned by DeepSpeed's ZeRO-3"):
            protect(engine, subspaces, optimizer=optimizer)
    worst = 0.0
    for step in range(3):
        x = torch.randn(4 * ranks, 16, generator=generator_for(step)).chunk(ranks)[rank]
        engine.backward((engine(x) - x.sin()).square().mean())
        for name, s in subspaces.items():
            g = safe_get_full_grad(weights[name]).double()
            U, V = s.U.columns.double(), s.V.columns.double()
            worst = max(worst, float((U.mT @ g).norm() / g.norm()))
            worst = max(worst, float((g @ V).norm() / g.norm()))
        engine.step()
    guard.verify()
    confined = confined_runs(rank, ranks) if first == "protect" else {}
    return (
        confined,
        worst,
        guard.when,
        {n: safe_get_full_fp32_param(p).clone() for n, p in weights.items()},
    )


CONFINED = {"beside": {"update": "beside"}, "factors": {"rank": 2}}


def confined_model(**options):
    model = mlp()
    subspaces = refresh(model, 0.4, progress=False, compute_dtype=torch.float64)
    confined = confine(model, subspaces, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, confined, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def confined_runs(rank, ranks):
    import deepspeed

    found = {}
    for name, options in CONFINED.items():
        model, confined, optimizer = confined_model(**options)
        engine = partitioned(model, optimizer)
        for step in range(3):
            x = torch.randn(4 * ranks, 16, generator=generator_for(step)).chunk(ranks)[rank]
            engine.backward((engine(x) - x.sin()).square().mean())
            engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            weights = {n: t.clone() for n, t in model.state_dict().items()}
            found[name] = weights, max(confined.drift().values())
    model, _, optimizer = confined_model()
    engine = partitioned(model, optimizer)
    with pytest.raises(RuntimeError, match=r"'0\.weight' to stay on this rank.*update=\"beside\""):
        engine(torch.randn(4, 16))
    return found


def confined_by_one(ranks, name):
    model, _, optimizer = confined_model(**CONFINED[name])
    for step in range(3):
        x = torch.randn(4 * ranks, 16, generator=generator_for(step))
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def by_one(ranks):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    subspaces = refresh(model, 0.4, progress=False, compute_dtype=torch.float64)
    protect(model, subspaces, optimizer=optimizer, restore=False)
    for step in range(3):
        x = torch.randn(4 * ranks, 16, generator=generator_for(step))
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize("first", ["protect", "initialize"])
def test_projected_gradients_and_what_is_confined_are_those_of_one_process(first):
    wanted = by_one(2)
    for confined, leak, when, weights in run_ranks(2, trained, 2, first):
        assert when == "backward"
        assert leak <= 1e-6
        for name, weight in wanted.items():
            assert (weights[name] - weight.detach()).norm() <= 1e-5 * weight.norm()
        for name, (found, drift) in confined.items():
            assert drift <= 1e-6
            for key, W in confined_by_one(2, name).items():
                assert (found[key] - W).norm() <= 1e-5 * W.norm(), (name, key)
