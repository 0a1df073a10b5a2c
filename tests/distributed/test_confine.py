"""Confined models over real processes: what the ranks train together is what one process does."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from osf_torch import Subspace, confine, refresh
from osf_torch.free import merging
from tests.distributed.ranks import Collectives, run_ranks
from tests.helpers import generator_for

pytestmark = pytest.mark.slow

STEPS = 4


class Blocks(nn.Module):
    """Sizes that neither 2 nor 3 divides, a head with fewer rows than ranks, and a convolution and
    experts, whose weights are read by themselves."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(14, 25)
        self.second = nn.Linear(25, 25)
        self.conv = nn.Conv1d(5, 5, 3, padding=1)
        self.experts = Experts(5, 5, 5)
        self.head = nn.Linear(25, 2)
        self.checkpointed = False

    def forward(self, x):
        x = self.first(x).tanh()
        x = checkpoint(self.second, x, use_reentrant=False) if self.checkpointed else self.second(x)
        x = self.conv(x.tanh().view(-1, 5, 5)).tanh()
        x = self.experts(x).flatten(1).tanh()
        return self.head(x)


class Experts(nn.Module):
    def __init__(self, count, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, rows, columns))

    def forward(self, x):  # (T, count, columns)
        return torch.einsum("tec,erc->ter", x, self.weight)


SHARDED = ("first", "second", "conv", "experts", "head")


def blocks():
    model = Blocks()
    gen = generator_for("confine", "distributed")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=gen, dtype=torch.float64))
    return model


def orthonormal(gen, *shape):
    return torch.linalg.qr(torch.randn(*shape, generator=gen, dtype=torch.float64))[0]


def subspaces_of(model, ratio=0.4):
    """Of every matrix by refresh; of the convolution and the experts drawn ones."""
    found = dict(
        refresh(model, ratio, progress=False, compute_dtype=torch.float64, complement=False)
    )
    gen = generator_for("confine", "bases")
    dtype = model.first.weight.dtype
    for name, shapes in (
        ("conv.weight", ((5, 2), (15, 2))),
        ("experts.weight", ((5, 5, 1), (5, 5, 2))),
    ):
        found[name] = Subspace(*(orthonormal(gen, *shape).to(dtype) for shape in shapes))
    return found


def batch(step):
    x = torch.randn(12, 14, generator=generator_for("confine", "batch", step), dtype=torch.float64)
    return x, x[:, :2].sin()


# What is confined how, and what the training loop does.
VARIANTS = {
    "merge": {},
    "low bases": {"ratio": 0.7},
    "left gathered": {"reshard": False},
    "evaluated before the step": {"reshard": False, "evaluates": True},
    "checkpointed": {"checkpointed": True},
    "accumulated and clipped": {"parts": 2, "clip": 0.3},
    "fused": {"fused": True},
    "not foreach": {"foreach": False},
    "beside": {"update": "beside"},
    "factors": {"factors": 1},
}


def confined_model(dtype=torch.float64, ratio=0.4, **options):
    model = blocks().to(dtype)
    settings = {key: options[key] for key in ("update", "dtype") if key in options}
    settings["rank"] = options.get("factors")
    confined = confine(model, subspaces_of(model, ratio), **settings)
    model.checkpointed = options.get("checkpointed", False)
    return model, confined


def adamw(model, **options):
    chosen = {key: options[key] for key in ("fused", "foreach") if key in options}
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **chosen)


def train(model, optimizer, steps, rank=0, ranks=1, parts=1, clip=None, evaluates=False):
    """Every rank sees its part of the batch; losses are means, so gradients are averaged."""
    for step in steps:
        x, y = (t.chunk(ranks)[rank].to(model.first.bias.dtype) for t in batch(step))
        optimizer.zero_grad()
        for part in range(parts):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(part == parts - 1)
            found, wanted = (t.chunk(parts)[part] for t in (model(x), y))
            ((found - wanted).square().mean() / parts).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if evaluates:  # which leaves parameters gathered that the step then changes
            evaluated(model)
        optimizer.step()


@torch.no_grad()
def evaluated(model):
    return whole(model(batch(100)[0].to(model.first.bias.dtype)))


def whole(t):
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t.clone()


def report(model, confined):
    """In this order: evaluating first tells whether the step had merged."""
    output = evaluated(model)
    return {
        "output": output,
        "weights": {name: whole(t) for name, t in model.state_dict().items()},
        "sharded": {name for name, t in model.state_dict().items() if isinstance(t, DTensor)},
        "drift": max(confined.drift().values()),
        "free": [whole(t) for t in confined.parameters()],
    }


def run(model, confined, rank=0, ranks=1, **options):
    optimizer = adamw(model, **options)
    start = evaluated(model)
    choices = {key: options[key] for key in ("parts", "clip", "evaluates") if key in options}
    train(model, optimizer, range(STEPS), rank, ranks, **choices)
    return report(model, confined) | {"start": start}


@lru_cache
def single(variant):
    options = VARIANTS[variant]
    return run(*confined_model(**options), **options)


def shard(model, mesh=None, reshard=None, **options):
    for name in SHARDED:
        fully_shard(getattr(model, name), mesh=mesh, reshard_after_forward=reshard, **options)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard, **options)


def sharded_run(rank, ranks, variant, mesh=None):
    options = VARIANTS[variant]
    model, confined = confined_model(**options)
    shard(model, mesh, options.get("reshard"))
    return run(model, confined, rank, ranks, **options)


def same(found, wanted, limit=1e-12):
    assert found["weights"].keys() == wanted["weights"].keys()
    for key in ("start", "output"):
        assert (found[key] - wanted[key]).norm() <= limit * wanted[key].norm(), key
    for name, W in wanted["weights"].items():
        assert (found["weights"][name] - W).norm() <= limit * W.norm(), name


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp2_is_the_single_process_run(ranks, variant):
    wanted = single(variant)
    plain = blocks().state_dict()
    assert wanted["weights"].keys() == plain.keys()
    assert not torch.allclose(wanted["start"], wanted["output"], rtol=1e-3)
    for runs in results(ranks, "variants"):
        same(runs[variant], wanted)
        assert runs[variant]["sharded"] == plain.keys()
        assert runs[variant]["drift"] <= 1e-13


def every_variant(rank, ranks):
    return {name: sharded_run(rank, ranks, name) for name in VARIANTS}


# --- other precisions and meshes ---


def mixed_runs(rank, ranks):
    """float32 and bfloat16 weights, gathered and multiplied in bfloat16."""
    found = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for update in ("merge", "beside"):
            model, confined = confined_model(torch.float32, update=update)
            if dtype == torch.bfloat16:
                model = blocks().to(dtype)
                confined = confine(model, subspaces_of(blocks()), update=update)
                for name, p in model.named_parameters():
                    p.requires_grad_(name.endswith("_free"))
            shard(model, mp_policy=policy)
            key = dtype, update
            found[key] = run(model, confined, rank, ranks)
    return found


def test_fsdp2_with_mixed_precision_moves_nothing_protected():
    for runs in results(2, "mixed precision"):
        for (dtype, _), found in runs.items():
            assert {t.dtype for t in found["free"]} == {torch.float32}
            # What is rounded to half precision once, W itself, drifts by that rounding.
            assert found["drift"] <= (1e-6 if dtype == torch.float32 else 2**-8)
            wanted, start = single("merge")["weights"], blocks().state_dict()
            for name, W in wanted.items():
                if dtype == torch.bfloat16 and name.endswith("bias"):  # frozen
                    continue
                moved = found["weights"][name].double() - start[name]
                assert (moved - (W - start[name])).norm() <= 0.3 * (W - start[name]).norm(), name
            # The evaluation after the last step has seen what the step has merged.
            plain = blocks()
            plain.load_state_dict(found["weights"])
            output = evaluated(plain.double())
            assert (found["output"] - output).norm() <= 0.03 * output.norm()
            assert (found["start"] - output).norm() > 0.1 * output.norm()


def refusal(kind, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        return str(error)
    return "nothing was refused"


def hsdp_run(rank, ranks):
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    return {name: sharded_run(rank, ranks, name, mesh) for name in ("merge", "beside")}


@pytest.mark.parametrize("variant", ["merge", "beside"])
def test_hsdp_is_the_single_process_run(variant):
    for found in results(4, "hsdp"):
        same(found[variant], single(variant))


# --- what is sent ---


def wide_model():
    """Layers of one size, without anything else that is trained."""
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(3))).double()
    gen = generator_for("confine", "wide")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=gen, dtype=torch.float64))
    bases = refresh(model, 0.5, progress=False, compute_dtype=torch.float64, complement=False)
    return model, confine(model, bases)


FREE, FULL, LAYERS = 12 * 12, 24 * 24, 3


def traffic(rank, ranks):
    """Elements that FSDP2 and DDP send in a step: of the backward pass, then of the step."""
    model, confined = wide_model()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = batch(0)[0].repeat(1, 2)[:, :24]
    model(x).square().mean().backward()  # once before, which sets FSDP2 up
    optimizer.zero_grad()
    with Collectives() as forward:
        loss = model(x).square().mean()
    with Collectives() as backward:
        loss.backward()
    with Collectives() as stepped:
        optimizer.step()
    with Collectives() as merged:
        confined.merge()
    model, _ = wide_model()
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, hook)
    parallel(x).square().mean().backward()
    calls = [[call[:2] for call in c.calls] for c in (forward, backward, stepped, merged)]
    return calls, reduced


def test_gradients_and_merging_send_what_is_trained_alone():
    for (forward, backward, stepped, merged), reduced in results(2, "traffic"):
        assert {name for name, _ in forward} == {"all_gather_into_tensor"}
        scattered = [count for name, count in backward if name == "reduce_scatter_tensor"]
        assert scattered == [FREE] * LAYERS
        assert stepped == [("all_gather_into_tensor", LAYERS * FREE)], "one for all weights"
        assert merged == stepped
        assert sum(reduced) == LAYERS * FREE


def replicated_run(rank, ranks):
    found = {}
    for name in ("merge", "beside", "factors"):
        model, confined = confined_model(**VARIANTS[name])
        parallel = DistributedDataParallel(model)
        optimizer = adamw(model)
        start = evaluated(model)
        for step in range(STEPS):
            x, y = (t.chunk(ranks)[rank] for t in batch(step))
            optimizer.zero_grad()
            (parallel(x) - y).square().mean().backward()
            with Collectives() as counted:
                optimizer.step()
            assert counted.calls == []
        found[name] = report(model, confined) | {"start": start}
    return found


def test_ddp_is_the_single_process_run():
    for runs in results(2, "replicated"):
        for variant, found in runs.items():
            same(found, single(variant))
            assert not found["sharded"]


# --- tensor parallel ---


def stack():
    """Of widths that two ranks divide, as DTensor's own products want them."""
    sizes = [(14, 26), (26, 26), (26, 10), (10, 2)]
    model = nn.Sequential(*(part for n, m in sizes for part in (nn.Linear(n, m), nn.Tanh())))[:-1]
    gen = generator_for("confine", "stack")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=gen, dtype=torch.float64))
    return model.double()


PARALLEL = {
    "confined afterwards": {},
    "rounded afterwards": {"dtype": torch.bfloat16},
    "beside afterwards": {"update": "beside"},
    "factors afterwards": {"rank": 1},
    "confined before": {"first": True},
    "beside before": {"first": True, "update": "beside"},
}


def stack_run(mesh, dtype=torch.float64, first=False, **settings):
    model = stack().to(dtype)
    bases = refresh(stack(), 0.4, progress=False, complement=False)
    plan = {
        "0": ColwiseParallel(),
        "2": RowwiseParallel(),
        "4": ColwiseParallel(output_layouts=Replicate()),
    }
    if first:
        confined = confine(model, bases, **settings)
    if mesh is not None:
        with torch.no_grad():
            parallelize_module(model, mesh, plan)
    if not first:
        confined = confine(model, bases, **settings)
    # AdamW makes steps of equal size of gradients whose sign is a matter of rounding.
    kind = torch.optim.AdamW if dtype == torch.float64 else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)

    def output(x):
        return model(x.to(dtype))

    with torch.no_grad():
        start = whole(output(batch(100)[0]))
    gradients = None
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        (output(x) - y).square().mean().backward()
        if gradients is None:
            gradients = [whole(t.grad) for t in confined.parameters()]
        optimizer.step()
    with torch.no_grad():
        ended = whole(output(batch(100)[0]))
    return {
        "start": start,
        "output": ended,
        "weights": {name: whole(t) for name, t in model.state_dict().items()},
        "gradients": gradients,
        "drift": max(confined.drift().values()),
        "released": released(model, confined),
    }


def released(model, confined):
    confined.release()
    return {name: whole(t) for name, t in model.named_parameters()}


def parallel_runs(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    return {name: stack_run(mesh, **options) for name, options in PARALLEL.items()}


@pytest.mark.parametrize("variant", PARALLEL)
def test_tensor_parallel_is_the_single_process_run(variant):
    options = PARALLEL[variant]
    wanted = stack_run(None, **options)
    # Of bfloat16 four layers' roundings, of 2**-8 each.
    limit = 2**-6 if options.get("dtype") else 1e-12
    for runs in results(2, "parallel"):
        found = runs[variant]
        same(found, wanted, limit)
        for ours, theirs in zip(found["gradients"], wanted["gradients"], strict=True):
            assert (ours - theirs).norm() <= limit * theirs.norm()
        for name, W in found["released"].items():
            assert torch.equal(W, found["weights"][name])
        assert found["drift"] <= max(limit, wanted["drift"] * 1.1)


def rowwise_after(rank, ranks):
    model = stack()
    confine(model, refresh(model, 0.4, progress=False, complement=False))
    mesh = init_device_mesh("cpu", (ranks,))
    by_torch = refusal(RuntimeError, parallelize_module, model, mesh, {"2": RowwiseParallel()})
    model[0].weight_free = nn.Parameter(
        distribute_tensor(model[0].weight_free.detach(), mesh, [Replicate()])
    )
    return by_torch, refusal(RuntimeError, model, batch(0)[0])


def test_a_weight_and_its_block_are_parallel_together():
    """RowwiseParallel asks for ``module.weight``, which is a leaf without a gradient alone."""
    for by_torch, told in results(2, "rowwise"):
        assert "found non-leaf tensor" in by_torch
        assert "call parallelize_module before confine" in told


def expert_parallel_run(rank, ranks):
    """Experts shared out by their batch, before they are confined: C is shared out alike."""
    model = blocks().double()
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        cut = distribute_tensor(model.experts.weight.detach(), mesh, [Shard(0)])
        model.experts.weight = nn.Parameter(cut)
    confined = confine(model, {"experts.weight": subspaces_of(blocks().double())["experts.weight"]})
    (C,) = confined.parameters()
    optimizer = torch.optim.AdamW([C], lr=1e-2)
    x = torch.randn(6, 5, 5, generator=generator_for("confine", "experts"), dtype=torch.float64)
    for _ in range(STEPS):
        optimizer.zero_grad()
        W = model.experts.weight
        if ranks > 1:
            x_ = distribute_tensor(x, W.device_mesh, [Replicate()])
        else:
            x_ = x
        # As a product of matrices, which DTensor knows how to share out.
        whole_loss = torch.bmm(x_.transpose(0, 1), W.mT).square().mean()
        whole_loss.backward()
        with Collectives() as counted:
            optimizer.step()
        assert counted.calls == [], "each rank merges the experts that it has"
    shape = tuple(C.to_local().shape) if ranks > 1 else tuple(C.shape)
    return whole(model.state_dict()["experts.weight"]), shape, max(confined.drift().values())


def test_experts_are_merged_where_they_are():
    wanted, shape, _ = expert_parallel_run(0, 1)
    found = results(2, "experts")
    assert [one[1] for one in found] == [(3, *shape[1:]), (2, *shape[1:])]
    for W, _, drift in found:
        assert (W - wanted).norm() <= 1e-12 * wanted.norm()
        assert (W - blocks().double().experts.weight).norm() > 0.01 * W.norm()
        assert drift <= 1e-13


# --- what is refused ---


def refused_runs(rank, ranks):
    model, confined = confined_model()
    shard(model)
    optimizer = adamw(model)
    train(model, optimizer, range(1), rank, ranks)
    found = {
        "release": refusal(RuntimeError, confined.release),
        "next_task": refusal(RuntimeError, confined.next_task, widen=1),
    }
    late = shard(blocks())
    bases = subspaces_of(blocks())
    found["whole"] = refusal(ValueError, confine, late, bases)
    found["part"] = refusal(ValueError, confine, late.first, {"weight": bases["first.weight"]})
    found["wrapped"] = refusal(ValueError, confine, DistributedDataParallel(blocks()), bases)
    # Something else than an optimizer writes to C, of which every rank has a part.
    C = model.first.weight_free
    with torch.no_grad():
        C.add_(0.1)
    found["forward"] = refusal(RuntimeError, model, batch(0)[0])
    found["state"] = refusal(RuntimeError, model.state_dict)
    expected = whole(model.first._parameters["weight"])
    confined.merge()
    moved = whole(model.state_dict()["first.weight"]) - expected
    output = evaluated(model)
    plain = blocks().double()
    plain.load_state_dict({name: whole(t) for name, t in model.state_dict().items()})
    found["merged"] = float(moved.norm()), float((evaluated(plain) - output).norm())
    return found


def test_what_fully_shard_rules_out_is_refused():
    for told in results(2, "refused"):
        for method in ("release", "next_task"):
            assert "a model that fully_shard wasn't called on" in told[method]
        for model in ("whole", "part"):
            assert "confine first, then fully_shard" in told[model]
        assert "confine the model first, then wrap it" in told["wrapped"]
        for reader in ("forward", "state"):
            assert "call Confined.merge() on every rank after such writes" in told[reader]
        moved, off = told["merged"]
        assert moved > 0.1
        assert off <= 1e-12


def counted_run(rank, ranks):
    """As where comparing values would wait for the device: counts of writes tell."""
    kept, equal = merging.is_compared, torch.equal
    compared = []

    def counting(a, b):
        compared.append(a.shape)
        return equal(a, b)

    merging.is_compared = lambda t: False
    torch.equal = counting
    try:
        model, confined = confined_model()
        shard(model)
        optimizer = adamw(model)
        train(model, optimizer, range(1), rank, ranks)
        compared.clear()
        train(model, optimizer, range(1, STEPS), rank, ranks)
        found = report(model, confined)
        waited = len(compared)
        C = model.second.weight_free
        with torch.no_grad():
            C.to_local().mul_(2)
        told = refusal(RuntimeError, model, batch(0)[0])
        confined.merge()
        evaluated(model)
        return found | {"start": single("merge")["start"], "waited": waited, "told": told}
    finally:
        merging.is_compared, torch.equal = kept, equal


def test_writes_are_counted_where_values_would_have_to_be_waited_for():
    for found in results(2, "counted"):
        same(found, single("merge"))
        assert found["waited"] == 0
        assert "call Confined.merge() on every rank after such writes" in found["told"]


# --- checkpoints ---

KINDS = ("merge", "beside", "factors", "rounded")
BEFORE, AFTER = range(3), range(3, 6)


def begun(kind, state=None):
    """A plain model that is confined, or confined by a state."""
    if kind == "rounded":
        model = blocks().bfloat16()
        # Neither are rounded biases trained, nor has AdamW gradients of a rounding's sign.
        for name, p in model.named_parameters():
            p.requires_grad_(not name.endswith("bias"))
        return model, confine(model, subspaces_of(blocks()) if state is None else state)
    model = blocks().double()
    options = VARIANTS[kind]
    if state is not None:
        return model, confine(model, state)
    settings = {"update": options.get("update"), "rank": options.get("factors")}
    return model, confine(model, subspaces_of(model), **settings)


def optimizer_of(model, kind):
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "rounded":
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def states(model, optimizer, confined):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "confined": confined.state_dict(),
    }


def saving_run(rank, ranks, folder):
    """Trains and saves, then trains on."""
    found = {}
    for kind in KINDS:
        model, confined = begun(kind)
        shard(model)
        optimizer = optimizer_of(model, kind)
        train(model, optimizer, BEFORE, rank, ranks)
        dcp.save(states(model, optimizer, confined), checkpoint_id=f"{folder}/{kind}")
        train(model, optimizer, AFTER, rank, ranks)
        found[kind] = report(model, confined)
    return found


def resuming_run(rank, ranks, folder):
    """Loads into models that are confined alike, then into ones confined by the loaded state."""
    return [
        {kind: resumed(kind, rank, ranks, f"{folder}/{kind}", anew) for kind in KINDS}
        for anew in (False, True)
    ]


def resumed(kind, rank, ranks, folder, anew):
    model, confined = begun(kind)
    if anew:
        state = {"confined": confined.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        model, confined = begun(kind, state["confined"])
    if ranks > 1:
        shard(model)
    optimizer = optimizer_of(model, kind)
    found = states(model, optimizer, confined)
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(model, found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"])
    confined.load_state_dict(found["confined"])
    train(model, optimizer, AFTER, rank, ranks)
    return report(model, confined)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_run_resumes_on_other_ranks(tmp_path):
    runs = run_ranks(2, saving_run, 2, tmp_path)
    for found in (*run_ranks(3, resuming_run, 3, tmp_path), resuming_run(0, 1, tmp_path)):
        runs += found
    for kind in KINDS:
        model, confined = begun(kind)
        optimizer = optimizer_of(model, kind)
        train(model, optimizer, [*BEFORE, *AFTER])
        wanted = report(model, confined)
        limit = 2**-7 if kind == "rounded" else 1e-12
        for run_ in runs:
            found = run_[kind]
            assert found["weights"].keys() == wanted["weights"].keys()
            for name, W in wanted["weights"].items():
                assert (found["weights"][name] - W).norm() <= limit * W.norm(), (kind, name)
            # C goes on from where it was, whichever part of it the weight has.
            for ours, theirs in zip(found["free"], wanted["free"], strict=True):
                assert (ours - theirs).norm() <= 4 * limit * theirs.norm(), kind
            assert found["drift"] <= (2**-8 if kind == "rounded" else 1e-13), kind


RUNS = {
    2: {
        "variants": every_variant,
        "mixed precision": mixed_runs,
        "traffic": traffic,
        "replicated": replicated_run,
        "parallel": parallel_runs,
        "rowwise": rowwise_after,
        "experts": expert_parallel_run,
        "refused": refused_runs,
        "counted": counted_run,
    },
    3: {"variants": every_variant},
    4: {"hsdp": hsdp_run},
}


def everything(rank, ranks):
    return {name: function(rank, ranks) for name, function in RUNS[ranks].items()}


@lru_cache
def all_results(ranks):
    """Starting processes takes longer than what they do: once for each number of ranks."""
    return run_ranks(ranks, everything, ranks)


def results(ranks, name):
    return [found[name] for found in all_results(ranks)]
