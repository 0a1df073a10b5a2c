"""estimate: what it says before a run is what the run then holds and computes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop

from osf_kernels import Basis, plan, plan_svd, truncated_svd
from osf_torch import confine, estimate, protect, refresh
from osf_torch.__main__ import main
from osf_torch.costs import Takes
from tests.helpers import generator_for
from tests.small_guard import adamw, drawn

TOKENS = 64


def stack(dtype=torch.float32, device="cpu"):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(48, 80), nn.Tanh(), nn.Linear(80, 80), nn.Linear(80, 24))
    return model.to(dtype)


class Experts(nn.Module):
    """Three experts in one parameter, and a layer of transposed weight."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(3, 40, 24))
        self.down = nn.Linear(40, 24)

    def forward(self, x):
        return self.down(torch.einsum("eti,eoi->eto", x.expand(3, *x.shape), self.up).mean(0))


def experts(dtype=torch.float32, device="cpu"):
    with torch.device(device):
        return Experts().to(dtype)


def real(dtype=torch.float32):
    return drawn(stack(dtype), "estimate")


def counting():
    """FLOPs of products, those in place too."""

    def of(rule):
        def count(*shapes, out_shape=None, **_):
            return rule(*shapes)

        return count

    in_place = {torch.ops.aten.addmm_: of(addmm_flop), torch.ops.aten.baddbmm_: of(baddbmm_flop)}
    return FlopCounterMode(display=False, custom_mapping=in_place)


def bytes_of(tensors):
    return sum(t.nbytes for t in tensors)


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rho", [0.25, 0.5, 0.8])
def test_bytes_are_those_of_the_run(dtype, rho):
    found = estimate(stack(dtype, "meta"), rho, tokens=TOKENS)
    model = real(dtype)
    subspaces = refresh(model, rho, progress=False)
    assert found.bases == subspaces.nbytes

    optimizer = adamw(model)
    guard = protect(model, subspaces, optimizer=optimizer)
    takes = found.methods["protect"]
    held = [item.held for item in guard._items.values()]
    bases = [t for h in held for t in (h.U.columns, h.V.columns)]
    pins = [t for h in held for t in (h.rest_A, h.rest_B, h.protected) if t is not None]
    S = sum(s.S.nbytes for s in subspaces.values())
    assert takes.bases == bytes_of(bases) + S  # which the guard keeps in its subspaces
    assert takes.pinned == bytes_of(pins)
    guard.remove()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rho", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("method", ["confine", "beside", "rank 3"])
def test_confined_bytes_are_those_of_the_run(dtype, rho, method):
    takes = estimate(stack(dtype, "meta"), rho, tokens=TOKENS, rank=3).methods[method]
    model = real(dtype)
    options = {"confine": {}, "beside": {"update": "beside"}, "rank 3": {"rank": 3}}[method]
    confined = confine(model, refresh(model, rho, progress=False), **options)
    places = confined.places
    trained = [t for place in places for t in place.trained()]
    beside = [t for place in places for t in place.beside()]
    bases = [t for p in places for side in (p.spec.left, p.spec.right) for t in side.tensors]
    references = [t for pair in confined.references.values() for t in pair]
    assert takes.weights == bytes_of(place.weight for place in places)
    assert takes.block == takes.gradient == bytes_of(trained)
    assert takes.copies == bytes_of(beside) - bytes_of(trained)
    assert takes.bases == bytes_of(bases)
    assert takes.references == bytes_of(references)
    x = drawn_inputs(dtype)
    optimizer = torch.optim.AdamW(confined.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert takes.state == bytes_of(moments)


def drawn_inputs(dtype):
    return torch.randn(TOKENS, 48, generator=generator_for("inputs")).to(dtype)


@pytest.mark.parametrize("rho", [0.25, 0.8])
def test_bytes_of_experts_are_those_of_the_run(rho):
    found = estimate(experts(device="meta"), rho, tokens=TOKENS)
    assert [w["shape"] for w in found.weights] == [[3, 40, 24], [24, 40]]
    model = drawn(experts(), "experts")
    subspaces = refresh(model, rho, progress=False)
    assert found.bases == subspaces.nbytes
    assert [w["refresh"] for w in found.weights] == [s.method for s in subspaces.values()]
    guard = protect(model, subspaces, optimizer=adamw(model))
    held = [item.held for item in guard._items.values()]
    pins = [t for h in held for t in (h.rest_A, h.rest_B, h.protected) if t is not None]
    assert found.methods["protect"].pinned == bytes_of(pins)
    guard.remove()
    places = confine(model, subspaces).places
    takes = found.methods["confine"]
    trained = [t for place in places for t in place.trained()]
    assert takes.block == takes.copies == bytes_of(trained)
    bases = [t for p in places for side in (p.spec.left, p.spec.right) for t in side.tensors]
    assert takes.bases == bytes_of(bases)


def test_others_and_plain_are_all_of_the_model():
    model = stack(torch.bfloat16, "meta")
    found = estimate(model, 0.5, tokens=TOKENS)
    plain, others = found.methods["plain"], found.others
    whole = bytes_of(model.parameters())
    assert plain.weights + others.weights == plain.gradient + others.gradient == whole
    assert plain.state + others.state == 2 * whole


@pytest.mark.parametrize("rho", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("method", ["plain", "confine", "beside", "rank 3"])
def test_flops_of_a_step_are_those_of_the_run(rho, method):
    found = estimate(stack(device="meta"), rho, tokens=TOKENS, rank=3, architecture="cpu")
    model = real()
    options = {"confine": {}, "beside": {"update": "beside"}, "rank 3": {"rank": 3}}
    if method != "plain":
        confine(model, refresh(model, rho, progress=False), **options[method])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = drawn_inputs(torch.float32).requires_grad_()
    with counting() as counted:
        model(x).square().mean().backward()
        optimizer.step()
    assert counted.get_total_flops() == pytest.approx(found.methods[method].flops, rel=0.03)


@pytest.mark.parametrize("rho", [0.25, 0.8])
def test_flops_of_protect_are_those_of_the_run(rho):
    found = estimate(stack(device="meta"), rho, tokens=TOKENS, architecture="cpu").methods
    model = real()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    protect(model, refresh(model, rho, progress=False), optimizer=optimizer)
    model(drawn_inputs(torch.float32)).square().mean().backward()
    optimizer.step()  # which prepares
    model(drawn_inputs(torch.float32)).sin().square().mean().backward()
    with counting() as counted:
        optimizer.step()
    own = found["protect"].flops - found["plain"].flops
    # Beside them verifying products with a few columns.
    assert counted.get_total_flops() == pytest.approx(own, rel=0.25)


@pytest.mark.parametrize(
    ("m", "n", "r", "low"),
    [(96, 160, 48, False), (160, 96, 80, True), (300, 300, 16, False), (256, 512, 40, False)],
)
def test_plan_svd_counts_what_runs(m, n, r, low):
    A = torch.randn(m, n, generator=generator_for(m, n))
    told = plan_svd(m, n, r, complement=low)
    with counting() as counted:
        (result,) = truncated_svd([A], r, complement=low)
    assert told.method == result.method
    assert counted.get_total_flops() == pytest.approx(told.flops, rel=0.15)


def test_plan_svd_refuses():
    with pytest.raises(ValueError, match="expected rank to be from 0 to min"):
        plan_svd(8, 8, 9)


def test_ranks_share_what_is_sharded():
    alone = estimate(stack(device="meta"), 0.8, tokens=TOKENS)
    shared = estimate(stack(device="meta"), 0.8, tokens=TOKENS, world=8)
    one, eighth = alone.methods["confine"], shared.methods["confine"]
    assert eighth.bases == one.bases  # whole on every rank
    assert eighth.weights * 8 == one.weights
    assert alone.collectives == dict.fromkeys(alone.methods, 0)
    assert shared.collectives == {"plain": 0, "protect": 2, "confine": 1, "beside": 0}
    # C alone is reduced.
    assert eighth.scattered == one.block
    assert shared.methods["plain"].scattered == one.weights
    assert alone.refresh.sent == 0
    assert shared.refresh.sent == shared.bases


def test_a_plan_is_for_the_architecture_that_is_named():
    g = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    U = Basis(torch.empty(4096, 112, device="meta"), "high")
    sm_80, sm_90 = (plan(g, U, U, architecture=name) for name in ("sm_80", "sm_90"))
    assert (sm_80.backend, sm_90.backend) == ("torch", "triton")
    assert "complement projection on sm_90" in str(sm_90)
    assert any("rank 112" in note for note in sm_90.notes)
    cpu = plan(torch.empty(512, 512), None, None, architecture="cpu")
    assert cpu.architecture == "cpu"
    with pytest.raises(ValueError, match=r"architecture to be one of|architecture one of cpu"):
        plan(g, U, U, architecture="sm_70")


def test_weights_that_confine_refuses_are_told():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

    found = estimate(Tied(), 0.5, tokens=4)
    assert found.methods["confine"] == found.methods["plain"]
    assert any("a.weight" in note for note in found.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 0}, "tokens to be an int of at least 1, got 0"),
        ({"tokens": 4, "world": True}, "world to be an int"),
        ({"tokens": 4, "rank": 60}, "free block of at least rank=60 of '0.weight'"),
        ({"tokens": 4, "device": "cpu", "tflops": 1.0}, "device or tflops, got both"),
        ({"tokens": 4, "tflops": 0.0}, "tflops above 0"),
        ({"tokens": 4, "architecture": "sm_1"}, "architecture"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        estimate(stack(device="meta"), 0.5, **given)


def test_a_model_that_is_not_there_says_what_to_pass():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"name of a hub.*pass a folder with config\.json"):
        estimate("someone/some-model", 0.5, tokens=4)
    with pytest.raises(ValueError, match="pass a folder"):
        estimate(3, 0.5, tokens=4)


def test_the_command_reads_a_config(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    command = ["estimate", str(tmp_path), "--rho", ".5", "--tokens", "128"]
    assert main([*command, "--json", "--rank", "*.k_proj.weight=3", "--world", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "LlamaForCausalLM"
    assert {tuple(w["shape"]): w["rank"] for w in found["weights"]}[(64, 64)] == 32
    assert 3 in {w["rank"] for w in found["weights"]}
    assert found["refresh"]["seconds"] is None
    assert main([*command, "--device", "cpu", "--confine-rank", "4"]) == 0
    text = capsys.readouterr().out
    assert "s at the rate" in text
    assert "rank 4" in text
    assert main(["estimate", str(tmp_path), "--tokens", "4"]) == 2
    assert "expected --rho or --rank" in capsys.readouterr().err


def test_help_and_version(root):
    for option, said in (("--help", "estimate"), ("--version", "osf-kernels")):
        done = subprocess.run(
            [sys.executable, "-m", "osf_torch", option],
            cwd=root / "python_api",
            env={"PYTHONPATH": str(root), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert said in done.stdout


def test_takes_add_up():
    one = Takes(weights=1, bases=2, flops=3)
    assert (one + one).times(2) == Takes(weights=4, bases=8, flops=12)
    assert one.nbytes == 3
