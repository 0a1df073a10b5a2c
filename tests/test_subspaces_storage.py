"""save_subspaces and load_subspaces: to the bit, for these weights, or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import osf_kernels
from osf_kernels import Basis
from osf_torch import (
    Subspace,
    input_subspaces,
    load_subspaces,
    metadata,
    protect,
    refresh,
    save_subspaces,
    storage,
)
from osf_torch.grown import Grown

safetensors_torch = pytest.importorskip("safetensors.torch", reason="the files are safetensors")


def model_of(shapes, dtype=torch.float32) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(n, m, dtype=dtype) for m, n in shapes)


def small_model() -> nn.ModuleList:
    return model_of([(16, 12), (12, 12)])


def assert_same(loaded, saved) -> None:
    assert loaded.seed == saved.seed
    assert_same_entries(loaded, saved)


def assert_same_entries(loaded, saved) -> None:
    assert list(loaded) == list(saved)
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
    shapes=st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=3),
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
        assert type(loaded) is Grown
        assert list(loaded) == list(saved)
        for name, entry in saved.items():
            for mine, other in ((entry.U, loaded[name].U), (entry.V, loaded[name].V)):
                assert (mine is None) == (other is None)
                if mine is not None:
                    assert mine.spans == other.spans
                    assert torch.equal(mine.columns, other.columns)
            assert (entry.protected is None) == (loaded[name].protected is None)
            wanted = getattr(entry, "spectra", {})
            assert getattr(loaded[name], "spectra", {}).keys() == wanted.keys()
            for side, spectrum in wanted.items():
                assert all(map(torch.equal, loaded[name].spectra[side], spectrum))
                assert loaded[name].spectra[side].energies.dtype == torch.float64
        protect(model, loaded, restore=False)
    assert torch.equal(loaded["1.weight"].U.columns, grown["1.weight"].U.columns)
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"'1\.weight' to hold the values"):
        load_subspaces(path, model)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        (
            "V_energies",
            lambda t: t[:-1],
            r"V_energies of '0\.weight' in .* to be \(8,\).*got \(7,\)",
        ),
        ("V_low", lambda t: t[:, :-1], r"V_low of '0\.weight' in .* to be \(9, 1\).*got \(9, 0\)"),
        ("V_energies", lambda t: t / 0, "expected V_energies of '0.weight' .* to be finite"),
        ("V_energies", lambda t: 2 * t, r"to hold V_energies of '0\.weight' as it was saved"),
        ("V", None, "directions with their energies, got energies alone"),
    ],
)
def test_damaged_energies_are_refused(tmp_path, part, change, match):
    model = model_of([(9, 9)])
    x = torch.randn(20, 9, generator=torch.Generator().manual_seed(3))
    grown = input_subspaces(model, [x], energy=0.999, forward=lambda m, x: m[0](x), progress=False)
    path = tmp_path / "s.safetensors"
    save_subspaces(path, grown, model)
    key = f"0.weight:{part}"
    if change is None:
        restate(path, "0.weight", parts=["V_low", "V_energies"])
        rewrite(path, drop=[key])
    else:
        factors = grown["0.weight"].factors()
        rewrite(path, {key: change(factors[part]).contiguous()})
    with pytest.raises(ValueError, match=match):
        load_subspaces(path, model)


@pytest.mark.parametrize("keep", ["smaller", "all"])
def test_some_items_of_a_refresh_come_back_as_they_were_but_for_the_seed(tmp_path, keep):
    model = model_of([(16, 12), (12, 12), (9, 9)])
    found = refresh(model, {"0.*": 3, "1.*": 9, "2.*": 4}, keep=keep, tol=1.0, seed=3)
    path = tmp_path / "s"
    some = {name: found[name] for name in ("1.weight", "0.weight")}
    save_subspaces(path, some, model)
    loaded = load_subspaces(path, model)
    assert type(loaded) is Grown
    assert_same_entries(loaded, some)
    plain = Subspace(found["2.weight"].U, None)
    save_subspaces(path, some | {"2.weight": plain}, model)
    loaded = load_subspaces(path, model)
    assert type(loaded.pop("2.weight")) is Subspace
    assert_same_entries(loaded, some)


@pytest.mark.parametrize(
    "shared",
    [
        lambda x: (x, x),
        lambda x: (x.view(-1)[:18].view(9, 2), x.view(-1)[9:].view(9, 2)),
        lambda x: (x, x[:, 1:]),
    ],
    ids=["same", "overlapping", "strided"],
)
def test_bases_that_share_memory_are_saved_apart(tmp_path, shared):
    model = model_of([(9, 9)])
    U, V = shared(torch.linalg.qr(torch.randn(9, 3)).Q.contiguous())
    path = tmp_path / "s"
    save_subspaces(path, {"0.weight": Subspace(U, Basis(V, "low"))}, model)
    loaded = load_subspaces(path, model)["0.weight"]
    assert torch.equal(loaded.U.columns, U)
    assert torch.equal(loaded.V.columns, V)
    assert loaded.V.spans == "low"


def test_a_wrapped_model_goes_by_the_names_of_a_bare_one(tmp_path):
    bare = small_model()
    wrapped = torch.compile(nn.ModuleList(map(checkpoint_wrapper, bare)), backend="eager")
    for saving, loading in ((wrapped, bare), (bare, wrapped), (wrapped, wrapped)):
        saved = refresh(saving, 4)
        save_subspaces(tmp_path / "s", saved, saving)
        assert list(saved) == ["0.weight", "1.weight"]
        assert_same(load_subspaces(tmp_path / "s", loading), saved)


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
    assert sorted(weights["0.weight"]["parts"]) == ["S", "U", "V"]
    assert sorted(weights["1.weight"]["parts"]) == ["S", "U_low", "V_low"]
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


def rewrite(path, factors=None, drop=(), **changes):
    """The file with other factors and metadata; what ``drop`` names is left out of both."""
    with safetensors_torch.safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changes
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    tensors |= factors or {}
    kept = [{key: x for key, x in d.items() if key not in drop} for d in (tensors, metadata)]
    safetensors_torch.save_file(kept[0], path, kept[1])


def restate(path, name, drop=(), **changes):
    """The file with other facts about one weight, less what ``drop`` names."""
    with safetensors_torch.safe_open(path, framework="pt") as file:
        weights = json.loads(file.metadata()["weights"])
    facts = weights[name] | changes
    weights[name] = {field: value for field, value in facts.items() if field not in drop}
    rewrite(path, weights=json.dumps(weights))


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


def test_other_factors_are_refused(tmp_path):
    """To the last bit, whether the weights are compared or not."""
    path, model = saved_file(tmp_path)
    before = path.read_bytes()
    with safetensors_torch.safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, factor in tensors.items():
        changed = factor.clone()
        changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9e9))
        name, part = key.rsplit(":", 1)
        path.write_bytes(before)
        rewrite(path, {key: changed})
        match = rf"{part} of '{re.escape(name)}' as it was saved \(SHA-256 \w+…\), got other values"
        refused(path, model, match)
        with pytest.raises(ValueError, match=match):
            load_subspaces(path, model)
    path.write_bytes(before)
    restate(path, "0.weight", factors_sha256={})
    refused(path, model, r"S of '0\.weight' as it was saved \(SHA-256 None…\), got other values")


def test_files_of_format_2_load_and_say_that_factors_are_not_hashed(tmp_path, caplog):
    path, model = saved_file(tmp_path)
    saved = load_subspaces(path, model)
    for name in saved:
        restate(path, name, drop=["factors_sha256"])
    refused(path, model, r"factors_sha256 \(dict\) of '0\.weight', got none")
    rewrite(path, format_version="2")
    assert_same(load_subspaces(path, model), saved)
    (line,) = caplog.messages
    assert f"{path} is of format 2, without hashes of its factors" in line
    assert "write it anew by save_subspaces" in line


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"method": "magic"}, r"method \(one of randomized, .*got 'magic'"),
        ({"residual": -1e-9}, r"residual \(finite and at least 0\)"),
        ({"residual": float("nan")}, r"residual \(finite .*got nan"),
        ({"residual": float("inf")}, r"residual \(finite .*got inf"),
        ({"residual": True}, r"residual \(finite .*got True"),
        ({"captured": 1.1}, r"captured \(from 0 to 1\) .*got 1\.1"),
        ({"captured": -0.1}, r"captured \(from 0 to 1\)"),
        ({"seconds": -1}, r"seconds \(finite and at least 0\)"),
        ({"iterations": -1}, r"iterations \(an int from 0\) .*got -1"),
        ({"iterations": True}, r"iterations \(an int from 0\) .*got True"),
        ({"rank": 0}, r"rank \(an int above 0\) .*got 0"),
        ({"rank": True}, r"rank \(an int above 0\)"),
        ({"rank": 10**30}, r"rank \(an int above 0\)"),
        ({"rank": 5}, r"S of '0\.weight' in .* to be \(5,\)"),
        ({"converged": 1}, r"converged \(.*got 1"),
        ({"shape": [16]}, r"shape \(two sizes or more\)"),
        ({"shape": [16, "12"]}, r"shape \(two sizes or more\)"),
        ({"shape": [16, [12]]}, r"shape \(two sizes or more\)"),
        ({"shape": [True, 12]}, r"shape \(two sizes or more\)"),
        ({"parts": ["S", "U", "V", "V"]}, r"parts \(each once\)"),
        ({"parts": ["S"] * 100_000}, r"parts \(each once\)"),
        ({"factors_sha256": {"S": 3}}, r"factors_sha256 \(hashes by part\)"),
    ],
)
def test_facts_that_no_refresh_gives_are_refused(tmp_path, facts, match):
    path, model = saved_file(tmp_path)
    restate(path, "0.weight", **facts)
    refused(path, model, match)


@pytest.mark.parametrize("depth", [100, 900, 50_000])
@pytest.mark.parametrize("inside", [False, True])
def test_metadata_that_is_nested_deep_is_refused(tmp_path, depth, inside):
    path, model = saved_file(tmp_path)
    nest = '{"a":' * depth + "1" + "}" * depth
    rewrite(path, weights=f'{{"0.weight": {{"shape": {nest}}}}}' if inside else nest)
    refused(path, model, r"to hold (what it says of|shape \(list\))")


@pytest.mark.parametrize(
    "weights",
    [
        '{"0.weight": {"rank": 1' + "0" * 5000 + "}}",
        '{"0.weight": {}, "0.weight": {}}',
        '{"0.weight": {"rank": 4, "rank": 5}}',
        "NaN",
        '"' + "x" * 100_000 + '"',
    ],
)
def test_metadata_that_says_too_much_is_refused(tmp_path, weights):
    path, model = saved_file(tmp_path)
    rewrite(path, weights=weights)
    with pytest.raises(ValueError, match="to hold what it says of the weights") as caught:
        load_subspaces(path, model)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_a_seed_of_many_digits_is_refused(tmp_path):
    path, model = saved_file(tmp_path)
    rewrite(path, seed="9" * 100_000)
    refused(path, model, "a whole number as seed")


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
    with pytest.raises(ValueError, match=r"version 2 or 3 .*got .99., written by osf-k.* 7\.0"):
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
    with pytest.raises(ImportError, match=r"save_subspaces: .*pip install safetensors numpy"):
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


# a damaged file


def refused(path, model, match):
    """load_subspaces refuses, naming the operator, the file and what to do."""
    with pytest.raises(ValueError, match=match) as caught:
        load_subspaces(path, model, require_same_weights=False)
    text = str(caught.value)
    assert text.startswith("osf_torch.load_subspaces: expected ")
    assert str(path) in text
    assert "make it anew by refresh" in text


@pytest.mark.parametrize("ratio", [0.2, 0.8])
def test_a_missing_factor_is_named(tmp_path, ratio):
    model = model_of([(9, 9), (9, 9)])
    low = "_low" if ratio > 0.5 else ""
    for part in ("S", f"U{low}", f"V{low}"):
        path = tmp_path / part
        save_subspaces(path, refresh(model, ratio), model)
        rewrite(path, drop=[f"1.weight:{part}"])
        refused(path, model, rf"factors .*{part}.* of '1\.weight', got no {part};")


def test_a_missing_factor_of_other_subspaces_is_named(tmp_path):
    model = model_of([(9, 9)])
    U, S, V = torch.eye(9, 3), torch.ones(3), torch.eye(9, 3)
    for part, entry in (
        ("U", Subspace(U, V)),
        ("S", Subspace(U, V, S)),
        ("protected", Subspace(U, V, None, torch.eye(9))),
    ):
        path = tmp_path / part
        save_subspaces(path, {"0.weight": entry}, model)
        rewrite(path, drop=[f"0.weight:{part}"])
        refused(path, model, rf"of '0\.weight', got no {part};")


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("U", lambda U: U[:3], r"U of '0\.weight' in .* to be \(16, 4\) .*got \(3, 4\)"),
        ("U_low", lambda U: U[:, 1:], r"U_low .* to be \(16, 12\) .*rank 4, got \(16, 11\)"),
        ("V", lambda V: V.mT, r"V of '0\.weight' in .* to be \(12, 4\) .*got \(4, 12\)"),
        ("S", lambda S: S[:1], r"S of '0\.weight' in .* to be \(4,\) .*got \(1,\)"),
        ("S", torch.diag, r"to be \(4,\) .*got \(4, 4\)"),
        ("U", lambda U: U.long(), r"U of '0\.weight' in .*float32.*, got torch\.int64"),
        ("S", lambda S: S * float("nan"), r"S of '0\.weight' in .* finite, got NaN or Inf"),
        ("V", lambda V: V / 0, r"V of '0\.weight' in .* finite, got NaN or Inf"),
    ],
)
def test_a_factor_that_does_not_fit_is_not_loaded(tmp_path, part, change, match):
    path, model = saved_file(tmp_path)
    key = f"0.weight:{part}"
    saved = refresh(model, 4, keep="all", complement=True)
    save_subspaces(path, saved, model)
    rewrite(path, {key: change(saved["0.weight"].factors()[part]).contiguous()})
    refused(path, model, match)


def test_another_rank_is_not_loaded(tmp_path):
    for ratio, got in ((4, r"S .*\(5,\) .*rank 5, got \(4,\)"), (10, r"got \(10,\)")):
        model = model_of([(16, 16)])
        path = tmp_path / "s"
        save_subspaces(path, refresh(model, ratio), model)
        restate(path, "0.weight", rank=5)
        refused(path, model, got)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (["U", "V"], r"S and a basis of each side, got U, V"),
        (["S", "U"], r"'0\.weight' in .*S and a basis of each side, got S, U"),
        (["S", "U", "W"], r"parts of '0\.weight' out of U, .*got \['W'\]"),
        (["S", "U", ["V"]], r"got \[\['V'\]\]"),
    ],
)
def test_parts_that_make_no_entry_are_refused(tmp_path, parts, match):
    path, model = saved_file(tmp_path)
    restate(path, "0.weight", parts=parts)
    refused(path, model, match)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("field", sorted({*metadata.STORED, *metadata.FOUND}))
def test_a_missing_or_broken_fact_is_named(tmp_path, field, seeded):
    path, model = saved_file(tmp_path)
    if not seeded:
        save_subspaces(path, dict(load_subspaces(path, model)), model)
    before = path.read_bytes()
    restate(path, "1.weight", drop=[field])
    refused(path, model, rf"{field} \(.*\) of '1\.weight', got none;")
    path.write_bytes(before)
    restate(path, "1.weight", **{field: {"a": 1}})
    refused(path, model, rf"{field} \(.*\) of '1\.weight', got {{'a': 1}};")
    path.write_bytes(before)
    restate(path, "1.weight")
    assert len(load_subspaces(path, model)) == 2


def test_broken_metadata_is_refused(tmp_path):
    path, model = saved_file(tmp_path)
    before = path.read_bytes()
    for changes, match in (
        ({"drop": ["weights"]}, "of the weights as JSON, got none"),
        ({"weights": "{nope"}, "of the weights as JSON, got none"),
        ({"weights": "[1]"}, r"of the weights by name, got \[1\]"),
        ({"weights": '{"0.weight": 3}'}, r"of '0\.weight' by field, got 3"),
        ({"seed": "x"}, "a whole number as seed, got 'x'"),
    ):
        path.write_bytes(before)
        rewrite(path, **changes)
        refused(path, model, match)


# what is not saved


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (Subspace(None, torch.eye(9, 2)), r"V of '0\.weight' to be \(7, any\) .*got \(9, 2\)"),
        (Subspace(torch.eye(9, 2), None, None, torch.eye(7, 9)), r"protected of .*got \(7, 9\)"),
        (
            Subspace(torch.eye(9, 2), torch.eye(7, 2), torch.ones(3)),
            r"U of '0\.weight' to be \(9, 3\) .*got \(9, 2\)",
        ),
        (Subspace(torch.eye(9, 2).long(), None), r"U of '0\.weight' to be one of .*torch\.int64"),
        (Subspace(torch.ones(9), None), r"U of '0\.weight' to be \(9, any\) .*got \(9,\)"),
        (Subspace(torch.eye(9, 2) / 0, None), r"U of '0\.weight' to be finite, got NaN"),
    ],
)
def test_a_factor_that_does_not_fit_is_not_saved(tmp_path, entry, match):
    model = model_of([(9, 7)])
    with pytest.raises(ValueError, match=f"save_subspaces: expected {match}.*; make it anew by"):
        save_subspaces(tmp_path / "s", {"0.weight": entry}, model)
    assert not list(tmp_path.iterdir())


def test_a_refresh_of_another_shape_is_not_saved(tmp_path):
    saved = refresh(model_of([(9, 7)]), 2)
    with pytest.raises(ValueError, match=r"U of '0\.weight' to be \(8, 2\) .*got \(9, 2\)"):
        save_subspaces(tmp_path / "s", saved, model_of([(8, 7)]))
    wrong = {"0.weight": dataclasses.replace(saved["0.weight"], rank=3)}
    with pytest.raises(ValueError, match=r"rank 3, got \(2,\)"):
        save_subspaces(tmp_path / "s", wrong, model_of([(9, 7)]))


def test_a_missing_folder_is_told_before_anything_is_hashed(tmp_path, monkeypatch):
    model = small_model()
    saved = refresh(model, 4)
    monkeypatch.setattr(storage, "content_hash", lambda _: pytest.fail("hashed"))
    path = tmp_path / "absent" / "s"
    with pytest.raises(FileNotFoundError, match=r"save_subspaces: .*none at .*absent; make it"):
        save_subspaces(path, saved, model)
    monkeypatch.undo()
    path.parent.mkdir()
    save_subspaces(path, saved, model)
    assert_same(load_subspaces(path, model), saved)


def test_a_file_without_a_folder_is_written_where_we_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_model()
    save_subspaces("s", refresh(model, 4), model)
    assert len(load_subspaces("s", model)) == 2


def test_a_model_without_values_is_refused(tmp_path):
    path, model = saved_file(tmp_path)
    saved = load_subspaces(path, model)
    model.to("meta")
    message = r"'0\.weight' to have values, got a meta tensor; load the weights first"
    with pytest.raises(ValueError, match=f"save_subspaces: .*{message}"):
        save_subspaces(tmp_path / "t", saved, model)
    for same in (True, False):
        with pytest.raises(ValueError, match=f"load_subspaces: .*{message}"):
            load_subspaces(path, model, require_same_weights=same)


def test_a_parameter_that_is_no_matrix_is_refused(tmp_path):
    model = small_model()
    message = r"'0\.bias' to be a matrix \(m, n\) or a batch of them, got \(16,\)"
    with pytest.raises(ValueError, match=message):
        save_subspaces(tmp_path / "s", {"0.bias": Subspace(torch.eye(16, 2), None)}, model)
