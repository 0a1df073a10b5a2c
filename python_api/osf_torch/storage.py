"""save_subspaces, load_subspaces: what is protected on disk, tied to the weights it belongs to."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import osf_kernels
from osf_kernels import Basis, padded
from osf_torch.bases import Held
from osf_torch.coverage import coverage
from osf_torch.grown import ENERGIES, Grown, InputSubspace, factors_of, is_of_inputs
from osf_torch.kinds import owners
from osf_torch.metadata import FORMAT, FORMAT_VERSION, damaged, described_by
from osf_torch.quantized import Stored, stored
from osf_torch.scalars import read
from osf_torch.selection import (
    DTYPES,
    listed,
    matrix_of,
    named_weights,
    require_matrices,
    require_values,
)
from osf_torch.sharding import sharding_of
from osf_torch.sharing import Ranks, whole
from osf_torch.subspaces import (
    FACTS,
    Decomposition,
    Subspace,
    Subspaces,
    assemble,
    facts_of,
)

SLAB_BYTES = 64 << 20  # of a weight that are brought to the host at a time for hashing


def save_subspaces(
    path: str | os.PathLike[str], subspaces: Mapping[str, Subspace], model: nn.Module
) -> None:
    """Writes what is protected to a safetensors file, with what it takes to trust it later.

    Every factor kept is a tensor ``NAME:U``, ``NAME:U_low``, ``NAME:S``, ``NAME:V``,
    ``NAME:V_low`` or ``NAME:protected`` of its own dtype, and beside the directions that inputs
    made ``NAME:U_energies`` or ``NAME:V_energies``. The metadata holds the format's version, the
    library's and, as JSON, for every weight its shape, dtype, which factors are kept, and the
    SHA-256 of its values and of each factor's; of one that a refresh decomposed also the rank,
    method, iterations, residual, captured, converged and seconds; of a whole refresh, its
    Subspaces, also the seed; and the names that were left out on purpose. The SHA-256 of a
    quantized weight is that of all that it is stored in, codes and scales.

    Where weights of the model are sharded (DTensor, as by ``fully_shard``), all ranks that share
    them call it, with the same arguments. Weights are gathered one at a time, so that a hash is
    that of the whole weight however it lies. The first of these ranks writes the file; it is there
    when any of them returns. Where weights are whole on every rank (DistributedDataParallel)
    nothing is sent and every rank that calls writes: call it on one, as ``torch.save``.

    Args:
        path: of the file, in a folder that exists. It is replaced in one step, and so never holds
            half of them.
        subspaces: as ``refresh`` or ``input_subspaces`` made them, or some of them, on any device.
        model: whose weights are hashed as they stand now, so that subspaces saved beside a
            checkpoint belong to that checkpoint. It may be compiled or wrapped.

    Raises:
        ImportError: the package safetensors isn't installed.
        FileNotFoundError: there is no such folder.
        ValueError: the model lacks a parameter, or has it without values (on the meta device), not
            as a matrix or flattened by FSDP1; a factor doesn't fit the weight, or holds integers,
            NaN or Inf.
        TypeError: a parameter of another dtype or kind than ``refresh`` takes.
        RuntimeError: another rank failed.

    Mutates nothing but the file; copies weights and factors to the host.
    """
    path = Path(path)
    with together(model, "save_subspaces") as ranks:
        save_file = require_safetensors("save_subspaces", "torch").save_file
        weights = _weights(model, subspaces, "save_subspaces")
        packed = _packed(model, weights)
        if ranks.is_first and not path.parent.is_dir():
            raise FileNotFoundError(
                f"osf_torch.save_subspaces: expected a folder to write {path.name} to, got none at "
                f"{path.parent}; make it first"
            )
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    storages: set[int] = set()
    for name, entry in subspaces.items():
        factors, facts = _contents(entry)
        factors = {part: whole(factor.detach()) for part, factor in factors.items()}
        shape = _shape(weights[name], packed[name])
        _require_fit(factors, shape, facts.get("rank"), "save_subspaces", repr(name))
        described[name] = facts | {
            "shape": shape,
            "dtype": str(weights[name].dtype),
            "parts": list(factors),
        }
        if ranks.is_first:
            for part, factor in factors.items():
                tensors[f"{name}:{part}"] = _apart(factor, storages)
            described[name]["factors_sha256"] = {
                part: content_hash(tensors[f"{name}:{part}"]) for part in factors
            }
    for name, weight in weights.items():
        described[name]["sha256"] = _hash(weight, packed[name])
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": osf_kernels.__version__,
        "weights": json.dumps(described),
    }
    if isinstance(subspaces, Subspaces):
        metadata["seed"] = str(subspaces.seed)
    if isinstance(subspaces, Subspaces | Grown) and subspaces.coverage is not None:
        metadata["leave_out"] = json.dumps(sorted(subspaces.coverage.by_name))
    # Not tempfile: its files are readable by their owner alone, whatever the umask.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    with together(model, "save_subspaces"):
        if ranks.is_first:
            try:
                save_file(tensors, temporary, metadata)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def load_subspaces(
    path: str | os.PathLike[str], model: nn.Module, *, require_same_weights: bool = True
) -> Subspaces | dict[str, Subspace]:
    """Reads what :func:`save_subspaces` wrote, each factor onto its weight's device.

    Where weights of the model are sharded (DTensor), all ranks that share them call it, and each
    reads the file and has the whole factors, as after ``refresh``; weights are gathered one at a
    time to hash them. It doesn't matter how they were sharded when the file was written.

    Args:
        path: of the file.
        model: the model that they belong to. It may be compiled or wrapped.
        require_same_weights: compare the SHA-256 of every weight. False is for a model that was
            trained on since: its protected part, where it was pinned, still fits.

    Returns:
        What was saved, to the bit: the Subspaces of a refresh, else a dict by parameter name,
        in which what was an item of a refresh is that again. Such a dict has no seed. Either's
        ``coverage`` is that of what the model trains now; what was left out by name still is.

    Raises:
        ImportError: the package safetensors isn't installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is none of ours, of an unknown format version or damaged (metadata or
            a factor missing or broken, a factor that isn't the one that was saved, doesn't fit the
            weight's shape and rank, or holds integers, NaN or Inf; figures that no refresh gives).
            Files of format 2 hold no hashes of factors, which is logged. The model lacks a
            parameter, or has it in another shape, with other values or without any. The message
            names it.
        RuntimeError: another rank failed.

    Mutates nothing; copies weights to the host to hash them.
    """
    with together(model, "load_subspaces"):
        seed, leave_out, described, loaded = _read(Path(path), model)
    if require_same_weights:
        weights = _weights(model, described, "load_subspaces")
        _require_same(weights, _packed(model, weights), described)
    parameters = named_weights(model)
    told = coverage(model, {id(parameters[name]) for name in loaded}, leave_out)
    if seed is None:
        return Grown(
            {name: _subspace(factors, described[name]) for name, factors in loaded.items()},
            coverage=told,
        )
    found = {name: _decomposition(factors, described[name]) for name, factors in loaded.items()}
    return Subspaces(found, seed=seed, coverage=told)


@contextmanager
def together(model: nn.Module, operator: str) -> Iterator[Ranks]:
    """The ranks that share the model's weights; what one of them raises here stops them all.

    So none waits for another in the gathers that follow.
    """
    shared = next((w for w in named_weights(model).values() if _is_shared(w)), None)
    ranks = Ranks.of([] if shared is None else [shared], None)
    error = None
    try:
        yield ranks
    except Exception as caught:
        error = caught
    ranks.agree(error, torch.device("cpu") if shared is None else shared.device, operator)


def _is_shared(weight: Tensor) -> bool:
    try:
        return sharding_of(weight) is not None
    except ValueError:  # of sums or scattered slices, which neither refresh nor protect takes
        return False


# --- entries, and how a file holds them ---


def _contents(entry: Subspace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an entry by the names that a file gives them, and what a refresh said."""
    if isinstance(entry, Decomposition):
        return entry.factors(), facts_of(entry)
    return factors_of(entry), {}


def _subspace(factors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Subspace:
    """The other way round."""
    if "rank" in facts:
        return _decomposition(factors, facts)
    if is_of_inputs(factors):
        return InputSubspace.of(factors)

    def basis(side: str) -> Held:
        if f"{side}_low" in factors:
            return Basis(factors[f"{side}_low"], "low")
        return Basis(factors[side]) if side in factors else None

    return Subspace(basis("U"), basis("V"), factors.get("S"), factors.get("protected"))


def _decomposition(factors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Decomposition:
    stored = {field: facts[field] for field in FACTS} | {"shape": tuple(facts["shape"])}
    return assemble(factors, **stored)


def _apart(factor: Tensor, storages: set[int]) -> Tensor:
    """The factor on the host, copied where it shares memory, which safetensors doesn't write."""
    factor = factor.cpu().contiguous()
    storage = factor.untyped_storage().data_ptr()
    if storage in storages:
        return factor.clone()
    storages.add(storage)
    return factor


def content_hash(weight: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values in row order, however and wherever it lies.

    Synchronises; copies the weight to the host in slabs of 64 MiB. A sharded one is gathered
    first, which every rank of its mesh must join.
    """
    weight = whole(weight.detach())
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    rows = max(1, SLAB_BYTES // max(1, weight[:1].nbytes))
    for first in range(0, weight.shape[0], rows):
        slab = weight[first : first + rows].cpu().contiguous()
        if slab.nbytes:
            digest.update((ctypes.c_char * slab.nbytes).from_address(slab.data_ptr()))
    return digest.hexdigest()


def _packed(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Stored | None]:
    """By name what each weight stands for that is quantized; None of any other."""
    having = owners(model)
    return {name: stored(weight, having.get(id(weight), ())) for name, weight in weights.items()}


def _shape(weight: Tensor, packed: Stored | None) -> tuple[int, ...]:
    return tuple(weight.shape) if packed is None else packed.shape


def _hash(weight: Tensor, packed: Stored | None) -> str:
    """SHA-256 of a weight; of a quantized one of all that it is stored in."""
    if packed is None:
        return content_hash(weight)
    # A tensor without dimensions has no rows.
    parts = [content_hash(t if t.dim() else t[None]) for t in packed.tensors()]
    return hashlib.sha256(f"{packed.dtype} {packed.shape} {parts}".encode()).hexdigest()


# --- reading a file ---


def _read(
    path: Path, model: nn.Module
) -> tuple[int | None, list[str], dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """The seed, what was left out by name, and by parameter name the metadata and the factors."""
    safe_open = require_safetensors("load_subspaces").safe_open
    if not path.is_file():
        raise FileNotFoundError(f"osf_torch.load_subspaces: there is no file {path}")
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # safetensors has an exception of its own for a bad header
        raise ValueError(
            f"osf_torch.load_subspaces: expected {path} to be a safetensors file, got one that "
            f"can't be read ({error}); save it again"
        ) from error
    with file:
        seed, leave_out, described = described_by(path, file.metadata() or {})
        weights = _weights(model, described, "load_subspaces")
        packed = _packed(model, weights)
        keys = set(file.keys())
        loaded = {}
        for name, facts in described.items():
            shape, got = tuple(facts["shape"]), _shape(weights[name], packed[name])
            if shape != got:
                raise ValueError(
                    f"osf_torch.load_subspaces: expected parameter {name!r} to be {shape} as when "
                    f"the bases in {path} were made, got {got}; these are another model's"
                )
            missing = [part for part in facts["parts"] if f"{name}:{part}" not in keys]
            if missing:
                kept = f"the factors {listed(facts['parts'])} of {name!r}"
                raise damaged(path, kept, f"no {listed(missing)}")
            try:
                with torch.device("cpu"):  # values would be lost on a default device such as meta
                    factors = {part: file.get_tensor(f"{name}:{part}") for part in facts["parts"]}
            except Exception as error:  # of a dtype that torch or safetensors doesn't know
                raise damaged(path, f"tensors of {name!r}", f"{error!s:.80}") from error
            _require_fit(factors, got, facts.get("rank"), "load_subspaces", f"{name!r} in {path}")
            _require_as_saved(factors, facts.get("factors_sha256"), path, name)
            device = weights[name].device
            loaded[name] = {part: padded(factor, device) for part, factor in factors.items()}
    return seed, leave_out, described, loaded


def _require_as_saved(
    factors: Mapping[str, Tensor], hashes: Mapping[str, str] | None, path: Path, name: str
) -> None:
    """Refuses factors whose values aren't those that were saved; format 2 has no hashes."""
    if hashes is None:
        return
    for part, factor in factors.items():
        if hashes.get(part) != content_hash(factor):
            raise damaged(
                path,
                f"{part} of {name!r} as it was saved (SHA-256 {hashes.get(part)!s:.12}…)",
                "other values",
            )


# --- what fits ---


def _weights(model: nn.Module, names: Iterable[str], operator: str) -> dict[str, nn.Parameter]:
    require_matrices(model, operator)
    parameters = named_weights(model)
    names = list(names)
    missing = [name for name in names if name not in parameters]
    if missing:
        raise ValueError(
            f"osf_torch.{operator}: expected the model to have every parameter of the subspaces, "
            f"got none named {listed(missing)}; its first are {listed(list(parameters)[:5])}"
        )
    found = _packed(model, {name: parameters[name] for name in names})
    for name, packed in found.items():
        if packed is not None:
            packed.require(name, operator)
            continue
        require_values(name, parameters[name], operator)
        if parameters[name].dim() < 2:
            raise ValueError(
                f"osf_torch.{operator}: expected parameter {name!r} to be a matrix (m, n) or a "
                f"batch of them, got {tuple(parameters[name].shape)}; leave it out, or gather what "
                "ZeRO-3 partitioned"
            )
    return {name: parameters[name] for name in names}


def _require_fit(
    factors: Mapping[str, Tensor], shape: tuple[int, ...], rank: int | None, operator: str, of: str
) -> None:
    """Refuses factors that aren't those of a weight of this shape and, of a refresh, this rank."""
    remedy = "make it anew by refresh"
    sides = [factors.keys() & {side, f"{side}_low"} for side in "UV"]
    if rank is not None and not ("S" in factors and all(sides)):
        raise ValueError(
            f"osf_torch.{operator}: expected factors of {of} to be S and a basis of each side, got "
            f"{listed(list(factors)) or 'none'}; {remedy}"
        )
    if rank is None and {"U", "S", "V"} <= factors.keys():
        rank = factors["S"].shape[-1]  # of triplets
    alone = [side + ENERGIES for side in "UV" if side not in factors]
    if factors.keys() & set(alone):
        raise ValueError(
            f"osf_torch.{operator}: expected factors of {of} to be directions with their energies, "
            f"got energies alone; {remedy}"
        )
    dims = [factors[part].dim() for part in factors.keys() - {"S", "U_energies", "V_energies"}]
    is_flat = len(shape) > 2 and max(dims, default=0) == 2  # a convolution's
    *lead, m, n = matrix_of(shape, True) if is_flat else shape
    m_low, n_low = (None if rank is None else side - rank for side in (m, n))
    expected = {
        "U": (*lead, m, rank),
        "U_low": (*lead, m, m_low),
        "S": (*lead, rank),
        "V": (*lead, n, rank),
        "V_low": (*lead, n, n_low),
        "protected": (*lead, m, n),
    }
    for side, size in (("U", m), ("V", n)):
        if side in factors:
            width = factors[side].shape[-1]
            expected[side + ENERGIES] = (*lead, width)
            expected[f"{side}_low"] = (*lead, size, size - width)
    for part, factor in factors.items():
        wanted, got = expected[part], tuple(factor.shape)
        if len(wanted) != len(got) or any(
            w not in (None, g) for w, g in zip(wanted, got, strict=True)
        ):
            whose = f"a weight {shape}" + ("" if rank is None else f" and rank {rank}")
            raise ValueError(
                f"osf_torch.{operator}: expected {part} of {of} to be "
                f"{str(wanted).replace('None', 'any')} for {whose}, got {got}; {remedy}"
            )
        if factor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(
                f"osf_torch.{operator}: expected {part} of {of} to be one of {known}, got "
                f"{factor.dtype}; {remedy}"
            )
    finite = read([factor.isfinite().all() for factor in factors.values()])
    bad = [part for part, fine in zip(factors, finite, strict=True) if not fine]
    if bad:
        raise ValueError(
            f"osf_torch.{operator}: expected {listed(bad)} of {of} to be finite, got NaN or Inf; "
            f"{remedy}"
        )


def _require_same(
    weights: Mapping[str, nn.Parameter],
    packed: Mapping[str, Stored | None],
    described: Mapping[str, dict[str, Any]],
) -> None:
    for name, weight in weights.items():
        expected, got = described[name]["sha256"], _hash(weight, packed[name])
        if got != expected:
            saved = described[name]["dtype"]
            raise ValueError(
                f"osf_torch.load_subspaces: expected parameter {name!r} to hold the values that "
                f"it was saved with ({saved}, SHA-256 {expected[:12]}…), got others "
                f"({weight.dtype}, {got[:12]}…); load the model's checkpoint of that moment "
                "first, refresh again, or pass require_same_weights=False for a model that was "
                "trained on since"
            )


def require_safetensors(operator: str, submodule: str = "") -> Any:
    """The package, or a submodule of it, which is imported where it is used: it is an extra.

    Raises:
        ImportError: it isn't installed.
    """
    try:
        import safetensors

        if not submodule:
            return safetensors
        import safetensors.torch

        return safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"osf_torch.{operator}: expected safetensors to be installed, got {error}; "
            "pip install safetensors numpy"
        ) from error
