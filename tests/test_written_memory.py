"""What can't be written is refused by name before anything is: all or nothing."""

from __future__ import annotations

import re
import time
import warnings

import numpy as np
import pytest
import torch

from osf_kernels import (
    apply_,
    coefficients,
    project,
    project_,
    project_many_,
    restore_,
    restore_many_,
)

U, V = (torch.linalg.qr(torch.randn(8, 3))[0] for _ in range(2))


def basis(size):
    return torch.linalg.qr(torch.randn(size, 1))[0]


def project_list(matrices):
    project_many_(matrices, [basis(x.shape[-2]) for x in matrices], [None] * len(matrices))


def restore_list(matrices):
    bases = [basis(x.shape[-2]) for x in matrices]
    protected = [torch.zeros(x.shape) for x in matrices]
    restore_many_(matrices, bases, [None] * len(matrices), protected=protected)


def recorded_list(matrices):
    """With a basis that requires grad: results are computed apart and copied in."""
    bases = [basis(x.shape[-2]) for x in matrices]
    bases[0].requires_grad_()
    project_many_(matrices, bases, [None] * len(matrices))


LISTS = pytest.mark.parametrize("operator", [project_list, restore_list, recorded_list])


def overlapping():
    M = torch.randn(12, 8)
    yield "beyond a neighbour", M, [M[:, :4], M[:3, 4:], M[5:9, :4]]
    yield "the same twice", M, [M, torch.randn(4, 4), M]
    yield "transposed", M, [M[:8], M[4:].mT]
    yield "other columns that reach over", M, [M[:, :5], M[:, 4:]]
    flat = torch.randn(200)
    yield (
        "a batch whose step is no row",
        flat,
        [flat.as_strided((2, 3, 2), (10, 4, 1), at) for at in (0, 2)],
    )
    yield "rows of other widths", flat, [flat[:90].view(9, 10), flat[80:160].view(10, 8)]
    yield "the last element", flat, [flat[:100].view(10, 10), flat[99:199].view(10, 10)]
    yield (
        "one within a long one",
        flat,
        [flat[:160].view(16, 10), flat[160:196].view(6, 6), flat[44:60].view(4, 4)],
    )
    array = np.zeros((6, 6), dtype=np.float32)
    yield "two storages of one memory", M, [torch.from_numpy(array), torch.from_numpy(array)]


@LISTS
@pytest.mark.parametrize("case", list(overlapping()), ids=lambda case: case[0])
def test_overlap_between_any_two_of_a_list(operator, case):
    _, memory, matrices = case
    for order in (matrices, matrices[::-1]):
        before = memory.clone()
        with pytest.raises(ValueError, match=r"\[\d\] to be apart from \w+\[\d\], got overlapping"):
            operator(list(order))
        assert torch.equal(memory, before)


def apart():
    M = torch.randn(12, 8)
    yield "columns", [M[:, :3], M[:, 3:7], M[:, 7:]]
    yield "columns of some rows", [M[::2, :4], M[1:, 4:]]
    yield "blocks", [M[:5, :4], M[:5, 4:], M[5:, :3], M[5:, 3:]]
    yield "every other row", [M[::2], M[1::2]]
    yield "columns, one of them turned", [M[:, :4].mT, M[:, 4:]]
    batch = torch.randn(3, 6, 8)
    yield "columns of a batch", [batch[..., :4], batch[..., 4:]]
    yield "rows of a batch", [batch[:, :2], batch[:, 2:]]
    flat = torch.randn(100)
    yield "one buffer", [flat[i : i + 25].view(5, 5) for i in range(0, 100, 25)]
    yield "nothing", [flat[:0].view(0, 4), flat[:36].view(6, 6), flat[5:5].view(4, 0)]


@LISTS
@pytest.mark.parametrize("case", list(apart()), ids=lambda case: case[0])
def test_views_that_share_nothing_are_accepted(operator, case):
    operator([x.clone() for x in case[1]])
    with torch.no_grad():
        operator(case[1])


def test_what_is_read_anywhere_in_a_list_is_apart_from_what_is_written():
    M = torch.randn(12, 8)
    before = M.clone()
    with pytest.raises(ValueError, match=r"expected grads\[0\] to be apart from Vs\[1\]"):
        project_many_([M[:8], torch.randn(8, 8)], [U, U], [V, M[4:, :2]])
    with pytest.raises(ValueError, match=r"expected Ws\[1\] to be apart from protected\[0\]"):
        restore_many_(
            [torch.randn(8, 8), M[:8]], [U, U], [V, V], protected=[M[4:], M.new_zeros(8, 8)]
        )
    for recorded in (False, True):
        columns = M[:8, :2].detach().requires_grad_(recorded)
        with pytest.raises(ValueError, match="expected g to be apart from U"):
            project_(M[:8], columns)
    assert torch.equal(M, before)


def test_a_buffer_of_hundreds_of_views_is_cheap():
    flat, wide = torch.randn(64 * 400), torch.randn(64, 8 * 400)
    for views in (
        [flat[i * 64 : (i + 1) * 64].view(8, 8) for i in range(400)],
        [wide[:, i * 8 : (i + 1) * 8] for i in range(400)],
    ):
        start = time.perf_counter()
        project_many_(views, [None] * 400, [V] * 400)
        assert time.perf_counter() - start < 5


def unwritable():
    leaf = torch.randn(8, 8, requires_grad=True)
    yield "view of a leaf", leaf[:], ValueError, "a view of a leaf"
    yield "one of several outputs", (leaf * 1).split(8)[0], ValueError, "MULTI_OUTPUT_NODE"
    with torch.inference_mode():
        inference = torch.randn(8, 8)
    yield "inference", inference, ValueError, "one of inference mode outside of it"
    yield "expanded", torch.randn(1, 8).expand(8, 8), ValueError, "strides (0, 1)"
    yield "windows", torch.randn(20).as_strided((8, 8), (1, 1)), ValueError, "strides (1, 1)"
    yield "sparse", torch.randn(8, 8).to_sparse(), TypeError, "got torch.sparse_coo"
    yield "meta", torch.randn(8, 8, device="meta"), ValueError, "meta"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes and of what torch will drop
        parts = [torch.randn(3, 8), torch.randn(2, 8)]
        jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
        quantized = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
    yield "nested", jagged, TypeError, "got torch.jagged"
    yield "quantized", quantized, TypeError, "got torch.qint8"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(unwritable()), ids=lambda case: case[0])
def test_what_cannot_be_written_is_named_before_anything_is(case):
    _, matrix, kind, text = case
    calls = {
        "grads[1]": lambda first: project_many_([first, matrix], [U, U], [V, V]),
        "Ws[1]": lambda first: restore_many_(
            [first, matrix], [U, U], [V, V], protected=[first * 0] * 2
        ),
        "g": lambda first: project_(matrix, U, V),
        "W": lambda first: restore_(matrix, U, V, protected=first),
        "g of apply_": lambda first: apply_(matrix, U, V, *coefficients(first, U, V)),
        "out": lambda first: project(first, U, V, out=matrix),
    }
    for name, call in calls.items():
        first = torch.randn(8, 8)
        before = first.clone()
        with pytest.raises((kind, ValueError)) as caught:
            call(first)
        assert torch.equal(first, before), name
        message = str(caught.value)
        assert re.match(r"osf_kernels\.\w+: expected .*, got ", message), message
        # Where a basis is looked at first, or a gradient that isn't taken, those are named.
        assert text in message or "without" in message or "like" in message, message


def test_wrappers_of_tensors_are_refused_where_they_would_be_written():
    from torch.testing._internal.two_tensor import TwoTensor

    first = torch.randn(8, 8)
    before, pair = first.clone(), TwoTensor(torch.randn(8, 8), torch.randn(8, 8))
    with pytest.raises(TypeError, match=r"expected grads\[1\] to be a plain tensor, got TwoTensor"):
        project_many_([first, pair], [U, U], [V, V])
    with pytest.raises(TypeError, match=r"expected W to be a plain tensor, got TwoTensor"):
        restore_(pair, U, V, protected=first)
    assert torch.equal(first, before)


def test_inference_tensors_are_written_inside_inference_mode():
    with torch.inference_mode():
        g = torch.randn(8, 8)
        expected = project(g, U, V)
        project_many_([g], [U], [V])
        assert torch.equal(g, expected)


def test_meta_tensors_beside_others_are_refused_rather_than_nothing_computed():
    first, H = torch.randn(8, 8), torch.randn(8, 8, device="meta")
    A, B = coefficients(first, U, V)
    for call in (
        lambda: restore_(first, U, V, protected=H),
        lambda: restore_(first, U, V, S=H[0, :3]),
        lambda: apply_(first, U, V, A.to("meta"), B),
        lambda: project_(first, U.to("meta"), V),
        lambda: project_many_([first, first.clone()], [U, U], [V.to("meta"), V]),
    ):
        before = first.clone()
        with pytest.raises(ValueError, match=r"to be on cpu like .*, got on meta"):
            call()
        assert torch.equal(first, before)


def test_a_list_of_meta_tensors_computes_nothing():
    grads = [torch.randn(8, 8, device="meta") for _ in range(2)]
    bases = [U.to("meta")] * 2
    project_many_(grads, bases, [None, None])
    project_(grads[0], bases[0])
