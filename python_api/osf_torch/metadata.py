"""What a file of subspaces says of them beside the tensors, and what of it is believed.

A file may come from anywhere: whatever it says is a ValueError that names the file and what is
wrong with it, or plausible.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from osf_torch.coverage import log
from osf_torch.selection import listed
from osf_torch.sharing import METHODS
from osf_torch.subspaces import FACTS, Decomposition

FORMAT = "osf_torch.subspaces"
FORMAT_VERSION = "3"
# Files of format 2 hold no hashes of their factors.
UNHASHED_VERSION = "2"
PARTS = ("U", "U_low", "U_energies", "S", "V", "V_low", "V_energies", "protected")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 53


# What the metadata says of every weight, and beside that of one that a refresh decomposed.
STORED = {"shape": list, "dtype": str, "sha256": str, "parts": list, "factors_sha256": dict}
FOUND = {
    field: float | int if kind is float else kind
    for field, kind in get_type_hints(Decomposition).items()
    if field in FACTS and field not in STORED
}
ROUNDING = 1e-3  # by which a captured share of 1 may be above it, in bfloat16 bases too
# What a fact must be beside its type, and in words.
PLAUSIBLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "shape": (lambda s: len(s) >= 2 and all(_is_count(size) for size in s), "two sizes or more"),
    "parts": (
        lambda p: len(p) <= len(PARTS) and all(p.count(part) == 1 for part in p),
        "each once",
    ),
    "factors_sha256": (lambda h: all(isinstance(x, str) for x in h.values()), "hashes by part"),
    "rank": (_is_count, "an int above 0"),
    "iterations": (lambda i: type(i) is int and 0 <= i < 1 << 53, "an int from 0"),
    "method": (METHODS.__contains__, f"one of {', '.join(METHODS)}"),
    "residual": (lambda r: type(r) is not bool and 0 <= r < math.inf, "finite and at least 0"),
    "captured": (lambda c: type(c) is not bool and 0 <= c <= 1 + ROUNDING, "from 0 to 1"),
    "seconds": (lambda s: type(s) is not bool and 0 <= s < math.inf, "finite and at least 0"),
}


def described_by(
    path: Path, metadata: Mapping[str, str]
) -> tuple[int | None, list[str], dict[str, dict[str, Any]]]:
    """The seed, what was left out by name, and by parameter name what the metadata says of it."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"osf_torch.load_subspaces: expected {path} to be written by save_subspaces, got "
            f"another safetensors file (metadata format {metadata.get('format')!r:.80})"
        )
    version = metadata.get("format_version")
    if version not in (UNHASHED_VERSION, FORMAT_VERSION):
        raise ValueError(
            f"osf_torch.load_subspaces: expected format version {UNHASHED_VERSION} or "
            f"{FORMAT_VERSION} in {path}, got {version!r:.80}, written by osf-kernels "
            f"{metadata.get('library_version')!s:.80}; load it with that version, or refresh again"
        )
    stored = dict(STORED)
    if version == UNHASHED_VERSION:
        del stored["factors_sha256"]
        log.warning(
            "osf_torch.load_subspaces: %s is of format 2, without hashes of its factors, so that "
            "damage to them isn't told; write it anew by save_subspaces",
            path,
        )
    try:
        seed = int(metadata["seed"]) if "seed" in metadata else None
    except ValueError:
        raise damaged(path, "a whole number as seed", reprlib.repr(metadata["seed"])) from None
    try:
        described = json.loads(metadata.get("weights", ""), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # also of nesting, and of too many digits
        got = f"none ({error!s:.80})"
        raise damaged(path, "what it says of the weights as JSON", got) from None
    if not isinstance(described, dict):
        raise damaged(path, "what it says of the weights by name", reprlib.repr(described))
    for name, facts in described.items():
        if not isinstance(facts, dict):
            raise damaged(path, f"what it says of {name!r} by field", reprlib.repr(facts))
        if version == UNHASHED_VERSION:
            facts.pop("factors_sha256", None)
        refreshed = seed is not None or not FOUND.keys().isdisjoint(facts)
        for field, kind in (stored | FOUND if refreshed else stored).items():
            plausible, words = PLAUSIBLE.get(field, (lambda _: True, ""))
            fits = field in facts and isinstance(facts[field], kind)
            if not fits or not plausible(facts[field]):
                words = words if fits else getattr(kind, "__name__", str(kind))
                got = reprlib.repr(facts[field]) if field in facts else "none"
                raise damaged(path, f"{field} ({words}) of {name!r}", got)
        unknown = [part for part in facts["parts"] if part not in PARTS]
        if unknown:
            raise damaged(path, f"parts of {name!r} out of {listed(PARTS)}", reprlib.repr(unknown))
    return seed, _left_out(path, metadata), described


def _left_out(path: Path, metadata: Mapping[str, str]) -> list[str]:
    """The names; files of version 0.1 have none."""
    try:
        names = json.loads(metadata.get("leave_out", "[]"))
    except (ValueError, RecursionError) as error:
        raise damaged(
            path, "the names that were left out as JSON", f"none ({error!s:.80})"
        ) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise damaged(path, "a list of the names that were left out", reprlib.repr(names))
    return names


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, which names each thing once."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def damaged(path: Path, expected: str, got: str) -> ValueError:
    return ValueError(
        f"osf_torch.load_subspaces: expected {path} to hold {expected}, got {got}; make it anew by "
        "refresh and save_subspaces"
    )
