"""integrations.peft.confine_lora: a LoRA model of PEFT's becomes a confined one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osf_kernels.testing import random_basis
from osf_torch import Subspace, confine
from osf_torch.integrations import lora
from osf_torch.integrations import peft as osf_peft
from tests.helpers import generator_for, randn
from tests.integrations.peft_layers import TARGETS, inputs, loss_of, plain

pytestmark = pytest.mark.slow  # PEFT's import


def wrapped(peft: ModuleType, moved: float = 0.0, **options: Any) -> Any:
    """A LoRA model; ``moved`` says how far its factors are from where they start."""
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": TARGETS} | options))
    model = peft.get_peft_model(plain(), config)
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_" in name:
            p.data += moved * randn(*p.shape, dtype=p.dtype, generator=generator_for("moved", i))
    return model


def subspaces(prefix: str = "", suffix: str = "weight") -> dict[str, Subspace]:
    found = {}
    for name in TARGETS:
        m, n = plain().get_submodule(name).weight.shape
        U, V = (random_basis(k, 6, generator=generator_for(name, k)) for k in (m, n))
        found[f"{prefix}{name}.{suffix}"] = Subspace(U, V)
    return found


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize(
    "names", [{}, {"prefix": "base_model.model.", "suffix": "base_layer.weight"}]
)
def test_a_new_lora_becomes_a_confined_model(peft, names):
    theirs = wrapped(peft)
    base = theirs.get_base_model()
    A = theirs.base_model.model[0].lora_A["default"].weight.detach().clone()
    model, confined = osf_peft.confine_lora(theirs, subspaces(**names))
    assert model is base
    assert confined.rank == 3
    assert list(model.state_dict()) == list(plain().state_dict())
    assert torch.equal(model(inputs(0)), plain()(inputs(0)))
    V = subspaces()["0.weight"].V.columns
    free = lora.ambient_factors(confined.places[0]).A
    assert off(free, A - A @ V @ V.mT) < 1e-5
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in confined.parameters()
    }
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, inputs(step)).backward()
        optimizer.step()
    for name, subspace in subspaces().items():
        delta = model.state_dict()[name] - plain().get_parameter(name).detach()
        assert float((subspace.U.columns.mT @ delta).norm() / delta.norm()) < 1e-4


def test_a_trained_lora_is_projected_where_that_is_asked_for(peft, caplog):
    theirs = wrapped(peft, moved=0.3)
    products = {
        name: 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for name in TARGETS
        for layer in [theirs.get_base_model().get_submodule(name)]
    }
    expected = theirs(inputs(0))
    with pytest.raises(ValueError, match=r"outside of them .* project=True"):
        osf_peft.confine_lora(theirs, subspaces())
    assert torch.equal(theirs(inputs(0)), expected), "nothing is changed"
    model, _ = osf_peft.confine_lora(theirs, subspaces(), rank=4, project=True)
    assert caplog.text.count("left out what the adapter has outside") == 1
    for name, subspace in subspaces().items():
        U, V = subspace.U.columns, subspace.V.columns
        D = products[name.removesuffix(".weight")]
        D = D - U @ (U.mT @ D)
        D = D - D @ V @ V.mT
        assert off(model.state_dict()[name], plain().get_parameter(name) + D) < 1e-5


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"2": 1}}])
def test_a_lora_that_is_free_keeps_its_outputs(peft, tmp_path, options):
    model = plain()
    confined = confine(model, subspaces(), rank=3)
    with torch.no_grad():
        for i, t in enumerate(confined.parameters()):
            t.add_(0.3 * randn(*t.shape, dtype=t.dtype, generator=generator_for(i)))
    lora.save_adapter(confined, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path)
    for name, factor in options.items():
        config = theirs.peft_config["default"]
        setattr(config, name, factor)
    if options:
        theirs.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(plain(), tmp_path)
    expected = theirs(inputs(0)).detach()
    model, _ = osf_peft.confine_lora(theirs, subspaces())
    assert off(model(inputs(0)), expected) < 1e-5


def test_what_peft_trains_beside_goes_on(peft):
    theirs = wrapped(peft, target_modules=["0"], modules_to_save=["4"], bias="lora_only")
    with torch.no_grad():
        theirs.get_base_model()[4].modules_to_save["default"].weight.add_(0.1)
        theirs.get_base_model()[0].base_layer.bias.add_(0.1)
    expected = theirs(inputs(0)).detach()
    given = {"0.weight": subspaces()["0.weight"]}
    model, _ = osf_peft.confine_lora(theirs, given)
    assert off(model(inputs(0)), expected) < 1e-6
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"0.bias", "4.weight", "4.bias"} < trained


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_variants_are_refused(peft, options, match):
    with pytest.raises(ValueError, match=match):
        osf_peft.confine_lora(wrapped(peft, **options), subspaces())


def test_what_does_not_fit_is_refused_before_anything_is_changed(peft):
    theirs = wrapped(peft)
    expected = theirs(inputs(0))
    given = subspaces()
    few = {name: given[name] for name in ("0.weight", "2.weight")}
    other = given | {"9.weight": given["0.weight"]}
    for subs, options, match in (
        (few, {}, "confined weights alone, got 4.base_layer.weight"),
        (other, {}, "got '9.weight'"),
        (given, {"rank": 2}, "of rank 2 at most"),
        (given, {"rank": 0}, "rank to be an int of at least 1"),
        (given, {"rank": 15}, "a free block of at least rank=15"),
    ):
        with pytest.raises(ValueError, match=match):
            osf_peft.confine_lora(theirs, subs, **options)
    with pytest.raises(TypeError, match="to be a PeftModel, got Sequential"):
        osf_peft.confine_lora(plain(), given)
    with pytest.raises(TypeError, match="to be a mapping from parameter name"):
        osf_peft.confine_lora(theirs, [given])
    theirs.merge_adapter()
    with pytest.raises(ValueError, match="aren't merged"):
        osf_peft.confine_lora(theirs, given)
    theirs.unmerge_adapter()
    theirs.add_adapter("second", peft.LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="expected one adapter, got default, second"):
        osf_peft.confine_lora(theirs, given)
    assert off(theirs(inputs(0)), expected) < 1e-6
    osf = peft.get_peft_model(plain(), peft.OSFConfig(target_modules=TARGETS, effective_rank=0.5))
    with pytest.raises(ValueError, match="expected a LoRA adapter, got peft_type='OSF'"):
        osf_peft.confine_lora(osf, given)


def test_an_embedding_is_refused(peft):
    model = nn.Sequential(nn.Embedding(12, 24), nn.Linear(24, 24))
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"], r=2))
    with pytest.raises(TypeError, match="LoRA layers of linear layers, got Embedding in '0'"):
        osf_peft.confine_lora(theirs, subspaces())
