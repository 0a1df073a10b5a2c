"""Every environment variable the project reads, in one table.

Bottom layer: standard library only, so that `setup.py` can load this file by its path, before
the package or torch is importable. Code that reads a variable does so through :func:`get`,
which knows its default and refuses a value it cannot honour.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

__all__ = ["VARIABLES", "Variable", "get"]


class Variable(NamedTuple):
    """One environment variable: what it may hold, what it does and when it is read."""

    name: str
    default: str
    expected: str
    pattern: str
    meaning: str
    read: str


def _choice(*values: str) -> tuple[str, str]:
    return " | ".join(values), "|".join(re.escape(value) for value in values)


def _variable(
    name: str, default: str, allowed: tuple[str, str], meaning: str, *, read: str
) -> Variable:
    expected, pattern = allowed
    return Variable(name, default, expected, pattern, meaning, read)


_FLAG = ("a flag such as true or 1, or unset", r".*")
_LAUNCH = "by SubspaceCallback, as the trainer begins"
_PATH = ("a directory, or unset", r".*")
# A compute capability as torch spells it: 8.0, 9.0a, 12.0f, each with or without +PTX.
_ARCH = r"\d+\.\d[af]?(\+PTX)?"

VARIABLES: Mapping[str, Variable] = {
    variable.name: variable
    for variable in (
        _variable(
            "OSF_BACKEND",
            "auto",
            _choice("auto", "torch", "triton", "cuda"),
            "backend of every operator; a named one works or raises",
            read="at an operator's first call",
        ),
        _variable(
            "OSF_AUTOTUNE",
            "0",
            _choice("0", "1"),
            "search Triton configs on scratch copies instead of the pinned table",
            read="at a shape's first launch",
        ),
        _variable(
            "TRITON_INTERPRET",
            "0",
            _choice("0", "1"),
            "run Triton kernels on the CPU, for tests",
            read="by Triton, on its import",
        ),
        _variable(
            "OSFT_CACHE_V",
            "0",
            _choice("0", "1"),
            "mini_trainer's own: V_high is kept whole on its module; the integration follows it",
            read="by mini_trainer, on its import",
        ),
        _variable(
            "ACCELERATE_USE_DEEPSPEED",
            "",
            _FLAG,
            "accelerate's own: a launch with DeepSpeed, which SubspaceCallback refuses",
            read=_LAUNCH,
        ),
        _variable(
            "ACCELERATE_USE_FSDP",
            "",
            _FLAG,
            "accelerate's own: a launch with FSDP, whose version 1 SubspaceCallback refuses",
            read=_LAUNCH,
        ),
        _variable(
            "FSDP_VERSION",
            "1",
            _choice("1", "2"),
            "accelerate's own: the version of FSDP, 1 where nothing says otherwise",
            read=_LAUNCH,
        ),
        _variable(
            "FSDP_CPU_RAM_EFFICIENT_LOADING",
            "",
            _FLAG,
            "accelerate's own: one process alone loads; SubspaceCallback refuses it for confine",
            read=_LAUNCH,
        ),
        _variable(
            "OSF_CUDA",
            "auto",
            _choice("auto", "0", "1"),
            "compile the CUDA extension: where nvcc and a torch with CUDA are, never, or else fail",
            read="at build",
        ),
        _variable(
            "TORCH_CUDA_ARCH_LIST",
            "8.0;9.0+PTX",
            (
                "compute capabilities such as '8.0;9.0+PTX'",
                rf"[;,\s]*{_ARCH}([;,\s]+{_ARCH})*[;,\s]*",
            ),
            "GPU architectures the CUDA extension is compiled for",
            read="at build",
        ),
        _variable(
            "MAX_JOBS",
            "",
            ("a positive integer, or unset", r"([1-9]\d*)?"),
            "compiler processes at a time; unset: by cores and memory",
            read="at build",
        ),
        _variable("CUDA_HOME", "", _PATH, "the CUDA toolkit whose nvcc is used", read="at build"),
        _variable("CUDA_PATH", "", _PATH, "likewise, where CUDA_HOME is unset", read="at build"),
        _variable(
            "OSF_CACHE",
            "",
            _PATH,
            "where the benches keep a converted model, 540 MB; unset: ~/.cache/osf-kernels",
            read="by bench.smollm, as it loads",
        ),
    )
}


def get(name: str) -> str:
    """Return the value of a variable of the table, or its default where it is unset or empty.

    Raises:
        KeyError: `name` is not in the table.
        ValueError: the value is not one the variable may hold.
    """
    return _checked(name, os.environ.get(name, ""))


# An operator may ask at every call, so what a value means is worked out once.
@lru_cache(maxsize=64)
def _checked(name: str, raw: str) -> str:
    variable = VARIABLES[name]
    value = raw.strip() or variable.default
    if not re.fullmatch(variable.pattern, value, flags=re.ASCII):
        raise ValueError(
            f"osf_kernels: expected the environment variable {name} to be {variable.expected}, "
            f"got {value!r}; set it to one of these or unset it"
        )
    return value
