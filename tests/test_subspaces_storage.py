"""save_subspaces and load_subspaces: to the bit, for these weights, or not at all."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import osf_kernels
from osf_torch import (
    Subspace,
    input_subspaces,
    load_subspaces,
    protect,
    refresh,
    save_subspaces,
    storage,
)

safetensors_torch = pytest.importorskip("safetensors.torch", reason="the files are safetensors")


def model_of(shapes, dtype=torch.float32) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(n, m, dtype=dtype) for m, n in shapes)


def small_model() -> nn.ModuleList:
    return model_of([(16, 12), (12, 12)])


def assert_same(loaded, saved) -> None:
    assert list(loaded) == list(saved)
    assert loaded.seed == saved.seed
    for name, entry in saved.items():
        other = loaded[name]
        kept, read = entry.factors(), other.factors()
        assert set(kept) == set(read)
        for part, factor in kept.items():
            assert read[part].dtype == factor.dtype
            assert torch.equal(read[part], factor)
        assert (other.U.spans, other.V.spans) == (entry.U.spans, entry.V.spans)
        assert (other.svd is None) == (entry.svd is None)
        for field in ("shape", "rank", "method", "iterations", "residual", "captured", "seconds"):
            assert getattr(other, field) == getattr(entry, field)
        assert other.converged is entry.converged


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3),
    rho=st.floats(0.05, 1.0),
    keep=st.sampled_from(["smaller", "all"]),
    weight_dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    dtype=st.sampled_from([None, torch.bfloat16]),
    tol=st.sampled_from([None, 1.0]),
)
def test_what_is_loaded_is_what_was_saved(tmp_path, shapes, rho, keep, weight_dtype, dtype, tol):
    model = model_of(shapes, weight_dtype)
    saved = refresh(model, rho, keep=keep, dtype=dtype, tol=tol, seed=3)
    path = tmp_path / "subspaces.safetensors"
    save_subspaces(path, saved, model)
    assert_same(load_subspaces(str(path), model), saved)


def test_a_loaded_refresh_protects_and_starts_the_next_one(tmp_path):
    model = small_model()
    path = tmp_path / "s.safetensors"
    save_subspaces(path, refresh(model, 0.5), model)
    loaded = load_subspaces(path, model)
    assert len(refresh(model, 0.5, previous=loaded)) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert "2 parameters" in repr(protect(model, loaded, optimizer=optimizer))


@pytest.mark.parametrize("rho", [0.2, 0.9])
def test_other_subspaces_than_a_refresh_come_back_as_a_dict(tmp_path, rho):
    model = model_of([(9, 9), (9, 9)])
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    grown = input_subspaces(
        model,
        [x],
        previous=refresh(model, rho),
        forward=lambda model, x: [layer(x) for layer in model],
        progress=False,
    )
    one_sided = {"0.weight": Subspace(None, grown["0.weight"].V, None, torch.ones(9, 9))}
    for saved in (grown, one_sided, {"1.weight": Subspace(grown["1.weight"].U, None)}):
        path = tmp_path / "s.safetensors"
        save_subspaces(path, saved, model)
        loaded = load_subspaces(path, model)
        assert type(loaded) is dict
        assert list(loaded) == list(saved)
        for name, entry in saved.items():
            for mine, other in ((entry.U, loaded[name].U), (entry.V, loaded[name].V)):
                assert (mine is None) == (other is None)
                if mine is not None:
                    assert mine.spans == other.spans == ("high" if rho < 0.5 else "low")
                    assert torch.equal(mine.columns, other.columns)
            assert (entry.protected is None) == (loaded[name].protected is None)
        protect(model, loaded, restore=False)
    assert torch.equal(loaded["1.weight"].U.columns, grown["1.weight"].U.columns)
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"'1\.weight' to hold the values"):
        load_subspaces(path, model)


def test_bases_of_another_shape_are_not_saved(tmp_path):
    model = model_of([(9, 7)])
    with pytest.raises(ValueError, match=r"'0\.weight' to be \(any, 9\) as when .*got \(9, 7\)"):
        save_subspaces(tmp_path / "s", {"0.weight": Subspace(None, torch.eye(9, 2))}, model)
    assert not list(tmp_path.iterdir())


def test_the_file_says_what_it_takes_to_trust_it(tmp_path):
    model = small_model()
    saved = refresh(model, {"0.*": 3, "1.*": 9}, seed=11)
    path = tmp_path / "s.safetensors"
    save_subspaces(path, saved, model)
    with safetensors_torch.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        keys = set(file.keys())
    assert metadata["format"] == "osf_torch.subspaces"
    assert metadata["library_version"] == osf_kernels.__version__
    assert metadata["seed"] == "11"
    weights = json.loads(metadata["weights"])
    assert weights["0.weight"]["spans"] == ["high", "high"]
    assert weights["1.weight"]["spans"] == ["low", "low"]
    for name, entry in saved.items():
        stored = weights[name]
        assert stored["shape"] == list(entry.shape)
        assert stored["sha256"] == storage.content_hash(model.get_parameter(name))
        for field in ("rank", "method", "residual", "captured"):
            assert stored[field] == getattr(entry, field)
    assert keys == {f"{n}:{p}" for n in saved for p in saved[n].factors()}


# the hash


def test_the_hash_is_of_the_values_alone(monkeypatch):
    W = torch.randn(37, 11)
    expected = storage.content_hash(W)
    assert storage.content_hash(W.mT.contiguous().mT) == expected
    assert storage.content_hash(torch.randn(37, 22).copy_(W.repeat(1, 2))[:, :11]) == expected
    monkeypatch.setattr(storage, "SLAB_BYTES", 100)
    assert storage.content_hash(W) == expected
    changed = W.clone()
    changed[36, 10] = torch.nextafter(changed[36, 10], torch.tensor(9e9))
    others = [changed, W.reshape(11, 37), W.double(), W[:36], W.mT]
    assert len({expected, *map(storage.content_hash, others)}) == len(others) + 1


@pytest.mark.gpu
def test_the_hash_is_that_of_the_same_values_on_the_host():
    W = torch.randn(64, 48, dtype=torch.bfloat16)
    assert storage.content_hash(W.cuda()) == storage.content_hash(W)


# what is refused


def saved_file(tmp_path):
    model = small_model()
    path = tmp_path / "s.safetensors"
    save_subspaces(path, refresh(model, 4), model)
    return path, model


def rewrite(path, **changes):
    with safetensors_torch.safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changes
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    safetensors_torch.save_file(tensors, path, metadata)


def test_other_values_are_refused_unless_asked_for(tmp_path):
    path, model = saved_file(tmp_path)
    model[1].weight.data[0, 0] += 1e-3
    message = r"parameter '1\.weight' to hold the values.*got others.*require_same_weights=False"
    with pytest.raises(ValueError, match=message):
        load_subspaces(path, model)
    assert len(load_subspaces(path, model, require_same_weights=False)) == 2


def test_another_dtype_is_other_values(tmp_path):
    path, model = saved_file(tmp_path)
    with pytest.raises(ValueError, match=r"float32, SHA-256 .*got others \(torch\.bfloat16"):
        load_subspaces(path, model.bfloat16())


def test_another_shape_is_refused_even_then(tmp_path):
    path, _ = saved_file(tmp_path)
    other = model_of([(16, 12), (12, 14)])
    for same in (True, False):
        with pytest.raises(ValueError, match=r"'1\.weight' to be \(12, 12\).*got \(12, 14\)"):
            load_subspaces(path, other, require_same_weights=same)


def test_a_model_without_the_parameter_is_refused(tmp_path):
    path, model = saved_file(tmp_path)
    with pytest.raises(ValueError, match=r"got none named 1\.weight"):
        load_subspaces(path, model[:1])
    subspaces = load_subspaces(path, model)
    with pytest.raises(ValueError, match=r"save_subspaces: .*got none named 1\.weight"):
        save_subspaces(tmp_path / "t", subspaces, model[:1])


def test_a_model_with_more_parameters_is_fine(tmp_path):
    path, model = saved_file(tmp_path)
    model.append(nn.Linear(3, 3))
    assert len(load_subspaces(path, model)) == 2


def test_another_format_is_refused(tmp_path):
    path, model = saved_file(tmp_path)
    rewrite(path, format_version="99", library_version="7.0")
    with pytest.raises(ValueError, match=r"format version 1 .*got .99., written by osf-k.* 7\.0"):
        load_subspaces(path, model)
    rewrite(path, format="pt")
    with pytest.raises(ValueError, match=r"written by save_subspaces.*format 'pt'"):
        load_subspaces(path, model)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="to be a safetensors file"):
        load_subspaces(path, model)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_subspaces(tmp_path / "absent", model)


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    path, model = saved_file(tmp_path)
    subspaces = load_subspaces(path, model)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"save_subspaces: .*pip install 'osf-kernels\[sub"):
        save_subspaces(path, subspaces, model)
    with pytest.raises(ImportError, match="load_subspaces"):
        load_subspaces(path, model)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path, model = saved_file(tmp_path)
    before = path.read_bytes()
    other = refresh(model, 2)

    def half(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors_torch, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save_subspaces(path, other, model)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    save_subspaces(path, other, model)
    assert_same(load_subspaces(path, model), other)
    assert os.listdir(tmp_path) == [path.name]


def test_tied_and_rearranged_weights_keep_their_hash(tmp_path):
    model = small_model()
    model[1].weight.data = model[1].weight.data.mT.contiguous().mT
    path = tmp_path / "s.safetensors"
    save_subspaces(path, refresh(model, 4), model)
    model[1].weight.data = model[1].weight.data.contiguous()
    assert len(load_subspaces(path, model)) == 2
