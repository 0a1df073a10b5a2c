"""integrations.mini_trainer in several processes: sharded factors are projected as whole ones."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from osf_torch.integrations import mini_trainer as osft
from osf_torch.integrations.mini_trainer import low_bases
from tests.helpers import generator_for
from tests.integrations.osft_factors import (
    FUNCTIONS,
    KEYS,
    HeldShard,
    OSFTLinear,
    OSFTModel,
    by_formula,
    drawn,
)

SHARDED_SHAPES = [(20, 16, 10), (9, 24, 5), (13, 13, 9)]  # even; uneven; low bases, uneven
LAYOUTS = ("fsdp", "replicated", "hsdp", "columns")


def distributed(d: dict[str, Tensor], layout: str, rank: int) -> dict[str, Tensor]:
    """The same factors and gradients as DTensors."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if layout == "hsdp":
        mesh, placements = init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)]
    elif layout == "subgroup":  # two of three ranks, and one alone
        meshes = [DeviceMesh("cpu", members) for members in ([0, 1], [2])]  # by all ranks
        mesh, placements = meshes[rank // 2], [Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (2,))
        placements = [{"fsdp": Shard(0), "replicated": Replicate(), "columns": Shard(1)}[layout]]

    def placed(t: Tensor) -> Tensor:
        at = placements
        if t.dim() == 1:
            at = [Replicate() if p == Shard(1) else p for p in at]
        return distribute_tensor(t, mesh, at, src_data_rank=None)

    result = {}
    for name, value in d.items():
        if name == "rank_high":
            result[name] = value
            continue
        result[name] = placed(value.detach())
        if name.endswith("low"):
            result[name] = nn.Parameter(result[name])
            result[name].grad = placed(value.grad)
    return result


def counts(run) -> dict[str, int]:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        run()
    return {str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items() if n}


def project_sharded(rank: int, layouts: tuple[str, ...]) -> list[object]:
    found = []
    for layout in layouts:
        for i, shape in enumerate(SHARDED_SHAPES):
            for what, (function, pick) in FUNCTIONS.items():
                plain = drawn(*shape, torch.float64, i)
                expected = by_formula(plain, pick, torch.float64)
                d, holder = distributed(plain, layout, rank), nn.Module()
                comm = counts(lambda f=function, d=d: f(d))
                errors = []
                for attempt in range(2):  # without a holder, then with one: idempotent
                    if attempt:
                        function(d, cache_holder=holder)
                    for name, e in zip(("U_low", "V_low"), expected, strict=True):
                        errors.append(float((pick(d[name]).full_tensor() - e).norm() / e.norm()))
                found.append((layout, what, shape, comm, max(errors)))
    return found


def sent(comm: dict[str, int]) -> tuple[int, int]:
    """(sums, gathers), and nothing else."""
    sums = sum(n for op, n in comm.items() if "reduce" in op and "scatter" not in op)
    gathers = sum(n for op, n in comm.items() if "gather" in op)
    assert sums + gathers == sum(comm.values()), comm
    return sums, gathers


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_are_projected_as_the_whole(ranks):
    from tests.distributed.ranks import run_ranks

    layouts = LAYOUTS if ranks == 2 else ("subgroup",)
    for rank, found in enumerate(run_ranks(ranks, project_sharded, layouts)):
        assert len(found) == 2 * len(SHARDED_SHAPES) * len(layouts)
        for layout, what, shape, comm, error in found:
            assert error < 1e-13, (layout, what, shape)
            alone = layout == "replicated" or (layout == "subgroup" and rank == 2)
            # U's coefficients and V_high; in columns V's and U_high
            assert sent(comm) == ((0, 0) if alone else (1, 1)), (layout, what, shape)


def project_plain(rank: int) -> list[float]:
    """Every rank holds the whole, as under DDP; also what a sum over the default group gives."""
    import torch.distributed as dist

    d = drawn(20, 16, 10, torch.float64)
    expected = by_formula(d, lambda p: p.grad, torch.float64)
    raw, U = d["U_low"].grad.clone(), d["U_high"]
    coefficient = U.mT @ raw
    dist.all_reduce(coefficient)
    summed = raw - U @ coefficient
    comm = counts(lambda: osft.project_gradient_to_orthogonal_space(d))
    errors = [
        float((d[n].grad - e).norm() / e.norm())
        for n, e in zip(("U_low", "V_low"), expected, strict=True)
    ]
    return [sum(comm.values()), max(errors), float((summed - expected[0]).norm())]


def project_shards_of_no_mesh(rank: int) -> list[float]:
    """Rows as torch.chunk cuts them, in plain tensors or wrappers: V_high's missing rows tell."""
    found = []
    for shape, wrapped in product(SHARDED_SHAPES, (False, True)):
        for what, (function, pick) in FUNCTIONS.items():
            whole = drawn(*shape, torch.float64, what)
            expected = by_formula(whole, pick, torch.float64)
            d: dict[str, Tensor] = {"rank_high": whole["rank_high"]}
            for name in KEYS[:-1]:
                d[name] = whole[name].detach().chunk(2)[rank].clone()
                if name.endswith("low"):
                    d[name] = nn.Parameter(d[name])
                    d[name].grad = whole[name].grad.chunk(2)[rank].clone()
            if wrapped:
                d |= {name: HeldShard(d[name]) for name in ("U_high", "S_high", "V_high")}
            function(d)
            for name, value in zip(("U_low", "V_low"), expected, strict=True):
                mine = value.chunk(2)[rank]
                found.append(float((pick(d[name]) - mine).norm() / mine.norm()))
    return found


def project_fsdp_model(rank: int) -> dict[str, object]:
    """Four modules under FSDP2: gradients of its own backward, one sum for all coefficients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Network(OSFTModel):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def forward(self: OSFTLinear, x: Tensor) -> Tensor:
        low = self.osft_params
        high = (x @ self.osft_V_high.mT * self.osft_S_high) @ self.osft_U_high.mT
        return torch.tanh(high + (x @ low.V_low.mT * low.S_low) @ low.U_low.mT)

    OSFTLinear.forward = forward
    shapes = [(13, 13, 9), (20, 13, 7), (16, 20, 12), (16, 16, 8)]
    models = [Network([drawn(*s, torch.float64, i) for i, s in enumerate(shapes)]) for _ in "ab"]
    for model in models:
        model.zero_grad()
    single, sharded = models
    sharded.head = None
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    found: dict[str, object] = {"errors": [], "comm": []}
    x = torch.randn(8, 13, dtype=torch.float64, generator=generator_for("x"))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        osft.project_gradients(single)
        found["comm"].append(counts(lambda: osft.project_gradients(sharded)))
        for a, b in zip(single.layers, sharded.layers, strict=True):
            for name in ("U_low", "V_low"):
                mine = getattr(b.osft_params, name).grad.full_tensor()
                whole = getattr(a.osft_params, name).grad
                found["errors"].append(float((mine - whole).norm() / whole.norm()))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step()
            osft.project_parameters(model)
    leaks = []
    for layer in sharded.layers:
        U, V = layer.osft_U_high.full_tensor(), layer.osft_V_high.full_tensor()
        leaks.append(float((U.mT @ layer.osft_params.U_low.full_tensor()).norm()))
        leaks.append(float((layer.osft_params.V_low.full_tensor() @ V.mT).norm()))
    return found | {"leaks": leaks, "modules": len(shapes)}


@pytest.mark.slow
def test_a_model_under_fsdp2():
    from tests.distributed.ranks import run_ranks

    for found in run_ranks(2, project_fsdp_model):
        assert max(found["errors"]) < 1e-9
        assert max(found["leaks"]) < 1e-13
        for comm in found["comm"][1:]:  # low bases were computed in the first step
            assert sent(comm) == (1, found["modules"])


def refuse_a_partial_sum(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    d = distributed(drawn(20, 16, 10, torch.float64), "fsdp", rank)
    local = torch.ones(6, 16, dtype=torch.float64)
    partial = DTensor.from_local(local, init_device_mesh("cpu", (2,)), [Partial()])
    d["V_low"] = nn.Parameter(partial)
    with pytest.raises(ValueError, match="expected V_low and its gradient to be replicated") as e:
        osft.project_parameter_to_orthogonal_space(d, skip_u=True)
    return str(e.value)


def project_other_tensors(rank: int) -> tuple[list[float], list[float], str]:
    return project_plain(rank), project_shards_of_no_mesh(rank), refuse_a_partial_sum(rank)


@pytest.mark.slow
def test_tensors_that_are_no_shards_of_a_mesh():
    """Replicated ones are not reduced; shards in plain tensors are; a partial sum is refused."""
    from tests.distributed.ranks import run_ranks

    for (collectives, error, of_summing), errors, message in run_ranks(2, project_other_tensors):
        assert collectives == 0
        assert error < 1e-13
        assert of_summing > 1  # the fault this is there for shows
        assert max(errors) < 1e-13
        assert "redistribute it first" in message


def project_after_loading(rank: int) -> dict[str, float]:
    """Errors after each way that a checkpoint reaches high bases whose complements are kept."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    def local_writes(held: nn.Module, new: dict[str, Tensor]) -> None:
        for name, value in new.items():
            getattr(held, name).to_local().copy_(value.to_local())

    def past_autograd(held: nn.Module, new: dict[str, Tensor]) -> None:
        for name, value in new.items():
            getattr(held, name).data.copy_(value)
        osft.drop_low_bases()

    ways = {
        "load_state_dict": nn.Module.load_state_dict,
        "set_model_state_dict": set_model_state_dict,
        "local writes": local_writes,
        "past autograd": past_autograd,
    }
    errors = {}
    shape = (13, 13, 9)
    d, holder = distributed(drawn(*shape, torch.float64), "fsdp", rank), nn.Module()
    held = nn.ParameterDict({name: d[name] for name in ("U_high", "V_high")})
    held.requires_grad_(False)
    d |= dict(held)
    for way, load in ways.items():
        osft.project_gradient_to_orthogonal_space(d, cache_holder=holder)
        plain = drawn(*shape, torch.float64, way)
        new = distributed(plain, "fsdp", rank)
        load(held, {name: new[name] for name in held})
        for name in ("U_low", "V_low"):
            d[name].grad = new[name].grad
        osft.project_gradient_to_orthogonal_space(d, cache_holder=holder)
        expected = by_formula(plain, lambda p: p.grad, torch.float64)
        errors[way] = max(
            float((d[name].grad.full_tensor() - e).norm() / e.norm())
            for name, e in zip(("U_low", "V_low"), expected, strict=True)
        )
    assert len(low_bases._kept) == 2
    return errors


@pytest.mark.slow
def test_low_bases_are_renewed_when_shards_are_loaded():
    from tests.distributed.ranks import run_ranks

    for errors in run_ranks(2, project_after_loading):
        assert len(errors) == 4
        for way, error in errors.items():
            assert error < 1e-13, way
