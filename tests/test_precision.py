"""No setting of the process changes what operators multiply float32 in."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from osf_kernels import (
    apply_,
    coefficients,
    project,
    project_,
    project_many_,
    restore_,
    restore_many_,
)
from osf_kernels.backends import precision
from osf_kernels.backends import torch as torch_backend
from osf_kernels.backends.precision import full_precision, lowered
from tests.helpers import generator_for, randn

SETTINGS = (("cuda", "matmul"), ("mkldnn", "matmul"))
read = torch._C._get_fp32_precision_getter
write = torch._C._set_fp32_precision_setter


def readings():
    return [read(*setting) for setting in SETTINGS]


@pytest.fixture(params=["high", "medium", "mkldnn", "generic"], autouse=True)
def lower(request, monkeypatch):
    """Lowers the precision in one of its ways; both libraries count, whatever the build."""
    monkeypatch.setattr(precision, "_ON_GPU", True)
    monkeypatch.setattr(precision, "_SETTINGS", SETTINGS)
    before = torch.get_float32_matmul_precision(), torch.backends.fp32_precision, readings()
    if request.param == "mkldnn":
        write("mkldnn", "matmul", "bf16")
    elif request.param == "generic":
        for setting in SETTINGS:
            write(*setting, "none")
        torch.backends.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(request.param)
    assert {"tf32", "bf16"} & set(readings())
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.fp32_precision = before[1]
    for setting, value in zip(SETTINGS, before[2], strict=True):
        write(*setting, value)


PRODUCTS = ("mm", "bmm", "matmul", "addmm", "baddbmm", "addmm_", "baddbmm_")


class Products(TorchDispatchMode):
    """Notes the precision that matrix products find, those inside of operators and those beside."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = set()
        for name in PRODUCTS:
            owner = torch.Tensor if name.endswith("_") else torch
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))
        monkeypatch.setattr(torch_backend, "_OF_MATRICES", (torch.mm, torch.addmm, torch.cat))

    def watched(self, product):
        def run(*arguments, **options):
            self.found.update(readings())
            return product(*arguments, **options)

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.found.update(readings())
        return func(*args, **(kwargs or {}))


def operands(key):
    gen = generator_for(key)
    g = randn(20, 16, dtype=torch.float32, generator=gen)
    U, V = (torch.linalg.qr(randn(s, 4, dtype=g.dtype, generator=gen))[0] for s in (20, 16))
    return g, U, V


def backward_of(operator):
    def run(g, U, V):
        leaves = [t.clone().requires_grad_() for t in (g, U, V)]
        made = operator(*leaves)
        total = sum(t.square().sum() for t in (made if isinstance(made, tuple) else (made,)))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        sum(t.square().sum() for t in first).backward()

    return run


CALLS = {
    "project": project,
    "project_": project_,
    "project_many_": lambda g, U, V: project_many_([g, 2 * g], [U, None], [V, V]),
    "coefficients": coefficients,
    "apply_": apply_,
    "restore_": lambda g, U, V: restore_(g, U, V, S=torch.ones(4)),
    "restore_many_": lambda g, U, V: restore_many_([g], [U], [V], protected=[g.clone()]),
    "derivatives of project": backward_of(project),
    "derivatives of coefficients": backward_of(coefficients),
}


@pytest.mark.parametrize("dispatched", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_products_find_full_precision(name, dispatched, monkeypatch):
    """Under a mode, which takes the dispatcher's way, and without one."""
    before = readings()
    g, U, V = operands(name)
    A, B = coefficients(g, U, V)
    products = Products(monkeypatch)
    with products if dispatched else nullcontext():
        if name == "apply_":
            apply_(g, U, V, A, B)
        else:
            CALLS[name](g, U, V)
    assert products.found
    assert not {"tf32", "bf16"} & products.found
    assert readings() == before


def test_who_leaves_first_leaves_the_others_their_precision():
    before = readings()
    inside, leave, found = threading.Event(), threading.Event(), []

    def stays():
        with full_precision():
            inside.set()
            assert leave.wait(10)
            found.extend(readings())

    other = threading.Thread(target=stays)
    with full_precision():
        other.start()
        assert inside.wait(10)
    assert lowered(), "the settings are raised, but for as long as the other stays"
    leave.set()
    other.join()
    assert not {"tf32", "bf16"} & set(found)
    assert readings() == before


def test_an_exception_puts_the_settings_back():
    before = readings()
    with pytest.raises(ValueError, match="expected U"):
        project(torch.randn(4, 3), torch.randn(5, 2))
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert readings() == before


def test_what_is_set_meanwhile_stays():
    with full_precision():
        write("mkldnn", "matmul", "tf32")
    assert read("mkldnn", "matmul") == "tf32"


def test_other_settings_of_the_process():
    g, U, V = operands("others")
    expected = project(g, U, V)

    def all_agree():
        assert torch.equal(project(g, U, V), expected)
        assert torch.equal(project_(g.clone(), U, V), expected)
        listed = [g.clone()]
        project_many_(listed, [U], [V])
        assert torch.equal(listed[0], expected)
        held = restore_(g.clone(), U, V, protected=g - expected)
        assert torch.allclose(held, g, atol=1e-5)
        leaf = g.clone().requires_grad_()
        sum(t.sum() for t in coefficients(leaf, U, V)).backward()
        assert leaf.grad.dtype == torch.float32

    for device in ("meta", "cpu"):
        with torch.device(device):
            all_agree()
    default = torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            all_agree()
        finally:
            torch.set_default_dtype(default)
    torch.use_deterministic_algorithms(True)
    try:
        all_agree()
    finally:
        torch.use_deterministic_algorithms(False)
