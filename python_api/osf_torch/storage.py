"""save_subspaces, load_subspaces: what is protected on disk, tied to the weights it belongs to."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import osf_kernels
from osf_kernels import Basis
from osf_torch.protected import columns_of
from osf_torch.selection import listed
from osf_torch.subspaces import (
    FACTS,
    Decomposition,
    Held,
    Subspace,
    Subspaces,
    assemble,
    facts_of,
)

FORMAT = "osf_torch.subspaces"
FORMAT_VERSION = "1"
SLAB_BYTES = 64 << 20  # of a weight that are brought to the host at a time for hashing
PARTS = ("U", "U_low", "S", "V", "V_low", "protected")


def save_subspaces(
    path: str | os.PathLike[str], subspaces: Mapping[str, Subspace], model: nn.Module
) -> None:
    """Writes what is protected to a safetensors file, with what it takes to trust it later.

    Every factor kept is a tensor ``NAME:U``, ``NAME:U_low``, ``NAME:S``, ``NAME:V``,
    ``NAME:V_low`` or ``NAME:protected`` of its own dtype. The metadata holds the format's version,
    the library's and, as JSON, for every weight its shape, dtype, what its bases span and the
    SHA-256 of its values; of a refresh also the seed, rank, method, iterations, residual,
    captured, converged and seconds.

    Args:
        path: of the file, replaced in one step: it never holds half of them.
        subspaces: as ``refresh`` or ``input_subspaces`` made them, on any device.
        model: whose weights are hashed as they stand now, so that subspaces saved beside a
            checkpoint belong to that checkpoint.

    Raises:
        ImportError: the package safetensors isn't installed.
        ValueError: the model lacks a parameter, or has it in another shape.

    Mutates nothing but the file; copies weights and factors to the host.
    """
    save_file = _safetensors("save_subspaces", "torch").save_file
    seed = subspaces.seed if isinstance(subspaces, Subspaces) else None
    weights = _weights(model, {n: _shape(s) for n, s in subspaces.items()}, "save_subspaces")
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, entry in subspaces.items():
        factors, facts = _factors(entry), {"shape": tuple(weights[name].shape)}
        if seed is not None and isinstance(entry, Decomposition):
            factors, facts = entry.factors(), facts_of(entry)
        for part, factor in factors.items():
            tensors[f"{name}:{part}"] = factor.detach().contiguous()
        described[name] = facts | {
            "spans": [_spans(factors, side) for side in "UV"],
            "dtype": str(weights[name].dtype),
            "sha256": content_hash(weights[name]),
        }
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": osf_kernels.__version__,
        "weights": json.dumps(described),
    }
    if seed is not None:
        metadata["seed"] = str(seed)
    path = Path(path)
    # Not tempfile: its files are readable by their owner alone, whatever the umask.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_subspaces(
    path: str | os.PathLike[str], model: nn.Module, *, require_same_weights: bool = True
) -> Subspaces | dict[str, Subspace]:
    """Reads what :func:`save_subspaces` wrote, each factor onto its weight's device.

    Args:
        path: of the file.
        model: the model that they belong to.
        require_same_weights: compare the SHA-256 of every weight. False is for a model that was
            trained on since: its protected part, where it was pinned, still fits.

    Returns:
        What was saved, to the bit: the Subspaces of a refresh, else a dict by parameter name.

    Raises:
        ImportError: the package safetensors isn't installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is none of ours or of an unknown format version; the model lacks a
            parameter, or has it in another shape or with other values (the message names it).

    Mutates nothing; copies weights to the host to hash them.
    """
    safe_open = _safetensors("load_subspaces").safe_open
    path = Path(path)
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
        metadata = file.metadata() or {}
        described = _described(path, metadata)
        weights = _weights(
            model,
            {name: tuple(facts["shape"]) for name, facts in described.items()},
            "load_subspaces",
        )
        if require_same_weights:
            _require_same(weights, described)
        keys = set(file.keys())
        loaded = {}
        for name in described:
            device = weights[name].device
            loaded[name] = {
                part: file.get_tensor(f"{name}:{part}").to(device)
                for part in PARTS
                if f"{name}:{part}" in keys
            }
    if "seed" not in metadata:
        return {name: _subspace(factors) for name, factors in loaded.items()}
    found = {}
    for name, facts in described.items():
        stored = {field: facts[field] for field in FACTS} | {"shape": tuple(facts["shape"])}
        found[name] = assemble(loaded[name], **stored)
    return Subspaces(found, seed=int(metadata["seed"]))


def _shape(entry: Subspace) -> tuple[int | None, int | None]:
    """(m, n) of the weight, as far as the bases say it."""
    if isinstance(entry, Decomposition):
        return entry.shape
    m, n = (None if b is None else columns_of(b).shape[-2] for b in (entry.U, entry.V))
    return m, n


def _factors(entry: Subspace) -> dict[str, Tensor]:
    """The tensors of a Subspace, by the names that a file gives them."""
    found = {"S": entry.S, "protected": entry.protected}
    for side, basis in (("U", entry.U), ("V", entry.V)):
        low = isinstance(basis, Basis) and basis.spans == "low"
        found[f"{side}_low" if low else side] = None if basis is None else columns_of(basis)
    return {part: factor for part, factor in found.items() if factor is not None}


def _subspace(factors: Mapping[str, Tensor]) -> Subspace:
    """The other way round."""

    def basis(side: str) -> Held:
        if f"{side}_low" in factors:
            return Basis(factors[f"{side}_low"], "low")
        return Basis(factors[side]) if side in factors else None

    return Subspace(basis("U"), basis("V"), factors.get("S"), factors.get("protected"))


def content_hash(weight: Tensor) -> str:
    """SHA-256 of a matrix's dtype, shape and values in row order, whatever its strides and device.

    Synchronises; copies the weight to the host in slabs of 64 MiB.
    """
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    rows = max(1, SLAB_BYTES // max(1, weight[:1].nbytes))
    for first in range(0, weight.shape[0], rows):
        slab = weight.detach()[first : first + rows].cpu().contiguous()
        if slab.nbytes:
            digest.update((ctypes.c_char * slab.nbytes).from_address(slab.data_ptr()))
    return digest.hexdigest()


def _spans(factors: Mapping[str, Tensor], side: str) -> str | None:
    """ "high", "low", "both" or None: what of one side is kept."""
    high, low = side in factors, f"{side}_low" in factors
    if high and low:
        return "both"
    return "high" if high else "low" if low else None


def _described(path: Path, metadata: dict[str, str]) -> dict[str, dict[str, Any]]:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"osf_torch.load_subspaces: expected {path} to be written by save_subspaces, got "
            f"another safetensors file (metadata format {metadata.get('format')!r})"
        )
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"osf_torch.load_subspaces: expected format version {FORMAT_VERSION} in {path}, got "
            f"{version!r}, written by osf-kernels {metadata.get('library_version')}; load it "
            "with that version, or refresh again"
        )
    described: dict[str, dict[str, Any]] = json.loads(metadata["weights"])
    return described


def _weights(
    model: nn.Module, shapes: Mapping[str, tuple[int | None, ...]], operator: str
) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in shapes if name not in parameters]
    if missing:
        raise ValueError(
            f"osf_torch.{operator}: expected the model to have every parameter of the subspaces, "
            f"got none named {listed(missing)}; its first are {listed(list(parameters)[:5])}"
        )
    for name, shape in shapes.items():
        got = tuple(parameters[name].shape)
        if len(got) != len(shape) or any(
            s not in (None, g) for s, g in zip(shape, got, strict=True)
        ):
            wanted = str(shape).replace("None", "any")
            raise ValueError(
                f"osf_torch.{operator}: expected parameter {name!r} to be {wanted} as when its "
                f"bases were made, got {got}; these subspaces are another model's"
            )
    return {name: parameters[name] for name in shapes}


def _require_same(weights: dict[str, nn.Parameter], described: dict[str, dict[str, Any]]) -> None:
    for name, weight in weights.items():
        expected, got = described[name]["sha256"], content_hash(weight)
        if got != expected:
            stored = described[name]["dtype"]
            raise ValueError(
                f"osf_torch.load_subspaces: expected parameter {name!r} to hold the values that "
                f"it was saved with ({stored}, SHA-256 {expected[:12]}…), got others "
                f"({weight.dtype}, {got[:12]}…); load the model's checkpoint of that moment "
                "first, refresh again, or pass require_same_weights=False for a model that was "
                "trained on since"
            )


def _safetensors(operator: str, submodule: str = "") -> Any:
    try:
        import safetensors

        if not submodule:
            return safetensors
        import safetensors.torch

        return safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"osf_torch.{operator}: expected safetensors to be installed, got {error}; "
            "pip install 'osf-kernels[subspaces]'"
        ) from error
