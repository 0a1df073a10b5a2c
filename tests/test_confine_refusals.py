"""What confine refuses, by name and with a remedy, and that nothing is changed by then."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from osf_kernels import Basis
from osf_torch import Subspace, confine, protect
from tests.small_confine import (
    adamw,
    bases,
    batches,
    drawn,
    filled,
    loss_of,
    net,
    relative,
    train,
    weights_of,
)


class Coded(torch.Tensor):
    """As quantized weights are: codes and a scale, of which only a layer's own forward reads."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes)
        raise NotImplementedError(f"{function} of coded weights")


def layers():
    return filled(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)), "refusals")


def of(model, name="0.weight", rho=0.5, sides="UV"):
    return {name: drawn(*model.get_parameter(name).shape, rho, sides, "high")}


def tied():
    model = nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 10, bias=False))
    model[1].weight = model[0].weight
    return filled(model, "tied")


def changed(how):
    model = layers()
    how(model)
    return model


def frozen(model):
    model[0].weight.requires_grad_(False)


def coded(model):
    model[0].weight = nn.Parameter(Coded(torch.ones(10, 12, dtype=torch.int8)))


def basis(m, r, scale=1.0):
    return scale * torch.linalg.qr(torch.randn(m, r))[0]


NORMED = {"0.parametrizations.weight.original1": Subspace(basis(10, 4), basis(12, 4))}
SPECTRAL = {"0.parametrizations.weight.original": Subspace(basis(10, 4), basis(12, 4))}
PLAIN = {"0.weight": Subspace(basis(10, 4), basis(12, 4))}

# name: (model, subspaces, options, error, what it says beside the name)
CASES = {
    "a seed for a generator": (layers, {"0.weight": Subspace(basis(10, 4), basis(12, 4))},
                               {"rank": 2, "generator": 7}, TypeError,
                               r"torch\.Generator or None, got int"),
    "no parameters": (nn.Sequential, {"0.weight": Subspace(basis(10, 4), basis(12, 4))}, {},
                      ValueError, "got '0.weight'; it has none: a quantized layer"),
    "all protected": (layers, {"0.weight": Subspace(basis(10, 10), basis(12, 4))}, {}, ValueError,
                      "something free, got .* all 10 rows"),
    "none protected": (layers, {"0.weight": Subspace(None, None)}, {}, ValueError,
                       "something protected, .*leave the weight out"),
    "low of everything": (layers, {"0.weight": Subspace(Basis(basis(10, 10), "low"), None)}, {},
                          ValueError, "something protected"),
    "tied": (tied, {"0.weight": Subspace(basis(10, 4), basis(12, 4))}, {}, ValueError,
             "shared by Embedding.weight and Linear.weight; leave it out"),
    "weight norm": (lambda: changed(lambda m: parametrizations.weight_norm(m[0])), NORMED, {},
                    ValueError, "a plain weight, .*remove_parametrizations"),
    "spectral norm": (lambda: changed(lambda m: parametrizations.spectral_norm(m[0])), SPECTRAL,
                      {}, ValueError, "a plain weight, .*remove_parametrizations"),
    "pruned": (lambda: changed(lambda m: prune.random_unstructured(m[0], "weight", 0.5)),
               {"0.weight_orig": PLAIN["0.weight"]}, {}, ValueError, "a plain weight"),
    "older spectral norm": (lambda: changed(lambda m: nn.utils.spectral_norm(m[0])),
                            {"0.weight_orig": PLAIN["0.weight"]}, {}, ValueError,
                            "a plain weight"),
    "frozen": (lambda: changed(frozen), PLAIN, {}, ValueError,
               'got a frozen one; .*update="beside"'),
    "quantized": (lambda: changed(coded), PLAIN, {}, TypeError, "got Coded; leave it out"),
    "quantized embedding": (
        lambda: changed(lambda m: m.__setitem__(0, coded_embedding())), PLAIN,
        {"update": "beside"}, TypeError, "a linear layer around .* Coded, .* got Embedding"),
    "sparse": (lambda: nn.Sequential(nn.Embedding(10, 12, sparse=True)), PLAIN, {}, TypeError,
               "dense gradients .*leave it out"),
    "renormalised": (lambda: nn.Sequential(nn.Embedding(10, 12, max_norm=1.0)), PLAIN, {},
                     TypeError, "max_norm"),
    "meta": (lambda: nn.Sequential(nn.Linear(12, 10, device="meta")), PLAIN, {}, ValueError,
             "meta tensor"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(10)), PLAIN, {}, ValueError, "lazy module"),
    "unknown": (layers, {"0.wieght": PLAIN["0.weight"]}, {}, ValueError,
                "got '0.wieght'; it has 4, the first are 0.weight"),
    "turned": (layers, {"0.weight": Subspace(basis(12, 4), basis(10, 4))}, {}, ValueError,
               "bases of 10 and 12 rows .*pass V.mT"),
    "a vector": (layers, {"0.bias": Subspace(basis(10, 4), None)}, {}, ValueError, "'0.bias'"),
    "too many columns": (layers, {"0.weight": Subspace(torch.randn(10, 11), None)}, {}, ValueError,
                         "'0.weight'"),
    "not orthonormal": (layers, {"0.weight": Subspace(basis(10, 4, 1.1), basis(12, 4))}, {},
                        ValueError, "'0.weight': expected U to have orthonormal columns"),
    "NaN": (layers, {"0.weight": Subspace(torch.full((10, 4), torch.nan), None)}, {}, ValueError,
            "'0.weight'"),
    "rank": (layers, PLAIN, {"rank": 7}, ValueError, "at least rank=7, got 6 by 8"),
    "rank 0": (layers, PLAIN, {"rank": 0}, ValueError, "int of at least 1"),
    "rank True": (layers, PLAIN, {"rank": True}, ValueError, "int of at least 1"),
    "rank merged": (layers, PLAIN, {"rank": 2, "update": "merge"}, ValueError,
                    '"beside" with rank'),
    "core": (layers, PLAIN, {"mode": "core"}, ValueError, 'use protect\\(..., mode="core"\\)'),
    "mode": (layers, PLAIN, {"mode": "none"}, ValueError, "mode"),
    "update": (layers, PLAIN, {"update": "add"}, ValueError, '"merge" or "beside"'),
    "decay_to": (layers, PLAIN, {"decay_to": "mean"}, ValueError, "decay_to"),
    "zero beside": (layers, PLAIN, {"decay_to": "zero", "update": "beside"}, ValueError,
                    "decay_to"),
    "zero of half": (lambda: layers().bfloat16(), PLAIN, {"decay_to": "zero"}, ValueError,
                     'pass decay_to="start"'),
    "dtype": (layers, PLAIN, {"dtype": torch.int8}, ValueError, "floating-point"),
    "nothing": (layers, {}, {}, ValueError, "at least one parameter"),
    "triplets": (layers, {"0.weight": (basis(10, 4), None, basis(12, 4))}, {}, TypeError,
                 "Subspace\\(U, V, S\\)"),
    "a list": (layers, [PLAIN["0.weight"]], {}, TypeError, "a mapping"),
}  # fmt: skip


def coded_embedding():
    embedding = nn.Embedding(10, 12)
    embedding.weight = nn.Parameter(Coded(torch.ones(10, 12, dtype=torch.int8)))
    return embedding


def facts(model):
    """Whatever confine could change of a model."""
    return {
        name: (
            type(module),
            set(module.__dict__),
            {
                n: (id(p), p.requires_grad, p._version)
                for n, p in module._parameters.items()
                if p is not None
            },
            [len(module.__dict__[k]) for k in ("_state_dict_hooks", "_load_state_dict_pre_hooks")],
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", CASES)
def test_arguments(name):
    """The refused weight comes last, so that others would have been confined by then."""
    make, subspaces, options, kind, told = CASES[name]
    model = make()
    if isinstance(subspaces, dict) and subspaces and len(model) > 2 and "rank" not in options:
        subspaces = {**of(model, "2.weight"), **subspaces}
    before = facts(model)
    with pytest.raises(kind, match=rf"^osf_torch\.confine: .*{told}"):
        confine(model, subspaces, **options)
    assert facts(model) == before


def test_not_a_model():
    with pytest.raises(TypeError, match=r"an nn\.Module, got dict"):
        confine(dict(net("x").state_dict()), PLAIN)


def test_a_weight_twice_by_two_names():
    layer = nn.Linear(12, 12)
    model = nn.Sequential(layer, layer)
    one = drawn(12, 12, 0.5, "UV", "high")
    before = facts(model)
    with pytest.raises(ValueError, match=r"each weight once, got '0\.weight' and '1\.weight'"):
        confine(model, {"0.weight": one, "1.weight": one})
    assert facts(model) == before


@pytest.mark.parametrize("update", ["merge", "beside"])
def test_a_weight_that_is_confined_or_guarded_already(update):
    model = layers()
    confined = confine(model, of(model), update=update)
    for call in (confine, lambda *a: confine(*a, rank=2)):
        before = facts(model)
        with pytest.raises(ValueError, match=r"'0\.weight': expected a weight that isn't confined"):
            call(model, PLAIN)
        assert facts(model) == before
    for name in ("0.weight_free", "0.weight_merged"):
        with pytest.raises(ValueError, match=f"got '{name}'"):
            confine(model, {name: PLAIN["0.weight"]})
    confined.release()
    guard = protect(model, of(model), adamw(model.parameters()))
    before = facts(model)
    with pytest.raises(ValueError, match=r"that protect\(\) watches; Guard.remove\(\) first"):
        confine(model, of(model))
    assert facts(model) == before
    guard.remove()
    confine(model, of(model))


@pytest.mark.parametrize("update", ["merge", "beside"])
def test_an_optimizer_from_before_is_refused_at_its_step(update):
    """Momentum from before would move the frozen weight: nothing is stepped, the biases neither."""
    model = net("before")
    optimizer = adamw(model.parameters())
    train(model, batches(3, "before"), optimizer)
    confine(model, bases(model), update=update)
    before = weights_of(model)
    loss_of(model, batches(1, "before")[0]).backward()
    with pytest.raises(RuntimeError, match=r"'first\.weight', which is frozen.*before confine"):
        optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    train(model, batches(3, "before"), adamw(model.parameters()))
    assert relative(weights_of(model)["first.weight"], before["first.weight"]) > 1e-3


@pytest.mark.parametrize("update", ["merge", "beside"])
def test_a_weight_that_is_unfrozen(update):
    model = net("unfrozen")
    confined = confine(model, bases(model), update=update)
    optimizer = adamw(list(model.parameters()))
    (x,) = batches(1, "unfrozen")
    model(x).sum().backward()
    model.requires_grad_(True)
    before = weights_of(model)
    for run in (lambda: model(x), optimizer.step, lambda: model.second.weight):
        with pytest.raises(RuntimeError, match="to stay frozen, got requires_grad=True"):
            run()
    with torch.no_grad():
        model(x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for place in confined.places:
        place.weight.requires_grad_(False)
    train(model, [x], optimizer)


def test_pickling_and_what_is_set_or_replaced():
    model = layers()
    confined = confine(model, of(model))
    for save in (pickle.dumps, copy.copy):
        with pytest.raises(RuntimeError, match=r"Confined.state_dict\(\), or release\(\) first"):
            save(model[0])
    with pytest.raises(RuntimeError, match="a pickle of the module"):
        pickle.dumps(model)
    with pytest.raises(TypeError, match="as parameter 'weight'"):  # torch's own
        model[0].weight = torch.zeros(10, 12)
    model[0].weight = nn.Parameter(torch.zeros(10, 12))
    with pytest.raises(RuntimeError, match="to stay frozen"):
        model(torch.randn(3, 12))
    fresh = layers()
    confined = confine(fresh, of(fresh))
    del fresh[0]._parameters["weight"]
    for run in (lambda: fresh(torch.randn(3, 12)), confined.merge, confined.drift):
        with pytest.raises(RuntimeError, match=r"'0.weight' to have its parameter .* release\(\)"):
            run()


def test_it_stays_of_the_name_of_its_class():
    """What switches on a class's name or type still knows it for what it is, after release too."""
    model = layers()
    kind = type(model[0])
    confined = confine(model, of(model))
    assert isinstance(model[0], nn.Linear)
    assert model[0]._get_name().endswith("Linear")
    confined.release()
    assert type(model[0]) is kind
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()
