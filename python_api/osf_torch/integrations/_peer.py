"""Imports a peer package where it is used, and says which versions are supported if it can't."""

from __future__ import annotations

import importlib
import importlib.metadata
import operator
import re
from collections.abc import Callable
from types import ModuleType

_Release = tuple[int, ...]
_COMPARE: dict[str, Callable[[_Release, _Release], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


def require_peer(module: str, distribution: str, versions: str, integration: str) -> ModuleType:
    """Imports ``module`` of a peer package that is installed in a supported version.

    Args:
        module: the name to import, such as "galore_torch".
        distribution: the name it is installed by, such as "galore-torch".
        versions: the supported ones, such as ">=1.0,<2"; see :func:`require_version`.
        integration: the module name under ``osf_torch.integrations`` that asks.

    Raises:
        ImportError: it isn't installed, is of another version, or doesn't import; ``name`` is
            the module that is missing.
    """
    require_version(distribution, versions, integration)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"osf_torch.integrations.{integration}: expected {module} to import, "
            f"got {type(error).__name__}: {error}",
            name=error.name,
            path=error.path,
        ) from error


def require_version(distribution: str, versions: str, integration: str) -> str:
    """The installed version of a peer, which isn't imported.

    Args:
        versions: comparisons with ``>= <= > < == !=``, joined by commas. Only release numbers
            count: 1.2.dev0 and 1.2rc1 pass as 1.2.

    Raises:
        ImportError: it isn't installed, or in a version outside of ``versions``.
    """
    try:
        installed = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is None or not _matches(installed, versions):
        raise ImportError(
            f"osf_torch.integrations.{integration}: expected {distribution} {versions} to be "
            f'installed, got {installed or "none"}; pip install "{distribution}{versions}"',
            name=distribution,
        )
    return installed


def _matches(installed: str, versions: str) -> bool:
    for clause in versions.split(","):
        parts = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([\d.]+)\s*", clause)
        if parts is None:
            raise ValueError(
                "osf_torch.integrations: expected versions to be comparisons such as "
                f'">=1.0,<2", got {versions!r}'
            )
        compare, bound = _COMPARE[parts[1]], _release(parts[2])
        have = _release(installed)
        width = max(len(have), len(bound))
        if not compare(_padded(have, width), _padded(bound, width)):
            return False
    return True


def _release(version: str) -> _Release:
    """The release numbers a version starts with: (0, 21, 2) of "0.21.2.dev0+local"."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in numbers[0].split(".")) if numbers else ()


def _padded(release: _Release, width: int) -> _Release:
    return release + (0,) * (width - len(release))
