"""Imports run one way, from the public names down: read from the source, so lazy ones count too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import osf_kernels

# A module may import from layers of a lower rank, and from its own where both stand in one
# entry, since an entry is one layer. The longest matching prefix decides.
RANKS = {
    "osf_kernels.__main__": 9,
    "osf_kernels.info": 8,
    "osf_kernels": 7,
    "osf_kernels.free": 6,
    "osf_kernels.linalg": 5,
    "osf_kernels.ops": 4,
    "osf_kernels.backends": 3,
    "osf_kernels.plan": 2,
    "osf_kernels.forms": 1,
    "osf_kernels.cpu": 1,
    "osf_kernels.gpu": 1,
    "osf_kernels.basis": 1,
    "osf_kernels.env": 1,
    "osf_kernels._padding": 1,
    "osf_kernels.errors": 0,
    "osf_kernels._version": 0,
    "osf_kernels._cuda": 0,
}
# It judges the operators, so it may import nothing of ours that computes.
TESTING = "osf_kernels.testing"
TESTING_MAY_IMPORT = {"osf_kernels.basis", "osf_kernels.errors"}


class Import(NamedTuple):
    """`importer` imports `base`, or `name` from it, on `line` of `path`."""

    importer: str
    base: str
    name: str | None
    module: str  # base, or base.name where that is a module too
    path: Path
    line: int

    def __str__(self) -> str:
        what = f"{self.name} from {self.base}" if self.name else self.base
        return f"{self.path}:{self.line}: {self.importer} imports {what}"


def module_name(path: Path, source_root: Path) -> str:
    parts = path.relative_to(source_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str, source_root: Path) -> bool:
    """Whether a dotted name is a module or package under `source_root`, or the extension."""
    path = source_root.joinpath(*name.split("."))
    return name == "osf_kernels._cuda" or path.is_dir() or path.with_suffix(".py").is_file()


def imports(package: Path, source_root: Path) -> Iterator[Import]:
    """Every import under `package`, those inside functions included."""
    for path in sorted(package.rglob("*.py")):
        importer = module_name(path, source_root)
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(importer, alias.name, None, alias.name, path, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    # `from . import x` in a package's __init__ is relative to itself.
                    above = node.level - (path.name == "__init__.py")
                    parents = importer.split(".")[: len(importer.split(".")) - above]
                    base = ".".join([*parents, *([node.module] if node.module else [])])
                for alias in node.names:
                    whole = f"{base}.{alias.name}"
                    module = whole if is_module(whole, source_root) else base
                    yield Import(importer, base, alias.name, module, path, node.lineno)
            elif isinstance(node, ast.Call):
                # importlib.import_module("osf_kernels.…") with the name, or its start, in clear
                called = ast.unparse(node.func)
                if called.endswith("import_module") and node.args:
                    argument = node.args[0]
                    if isinstance(argument, ast.JoinedStr) and argument.values:
                        argument = argument.values[0]  # type: ignore[assignment]
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        name = argument.value.rstrip(".")
                        yield Import(importer, name, None, name, path, node.lineno)


def is_ours(module: str) -> bool:
    return module.split(".")[0] in {"osf_kernels", "osf_torch", "bench", "tests"}


def layer(module: str) -> str:
    """The entry of RANKS a module belongs to."""
    known = [p for p in RANKS if module == p or module.startswith(p + ".")]
    return max(known, key=len)


def upward_imports(package: Path, source_root: Path) -> list[str]:
    """What `osf_kernels` imports against the order, one line each."""
    found: list[str] = []
    for entry in imports(package, source_root):
        if not is_ours(entry.module):
            continue
        importer, module = entry.importer, entry.module
        if module.split(".")[0] != "osf_kernels":
            allowed = False
        elif importer == TESTING:
            allowed = module in TESTING_MAY_IMPORT
        elif module == TESTING:
            allowed = RANKS[layer(importer)] >= RANKS["osf_kernels"]
        else:
            own, other = layer(importer), layer(module)
            allowed = own == other != "osf_kernels" or RANKS[other] < RANKS[own]
        if not allowed:
            found.append(str(entry))
    return found


def private_imports(package: Path, source_root: Path, public: frozenset[str]) -> list[str]:
    """What `osf_torch` imports beyond the public names of `osf_kernels`, one line each."""
    found: list[str] = []
    for entry in imports(package, source_root):
        if not is_ours(entry.module):
            continue
        # `plan` is a public function and a module: the package's own name is what is imported.
        allowed = (
            entry.base.split(".")[0] == "osf_torch"
            or entry.module == TESTING
            or (entry.base == "osf_kernels" and (entry.name is None or entry.name in public))
        )
        if not allowed:
            found.append(str(entry))
    return found


def test_osf_kernels_imports_downward_only(root: Path) -> None:
    assert upward_imports(root / "osf_kernels", root) == []


def test_every_module_has_a_layer_of_its_own(root: Path) -> None:
    """A new file directly under osf_kernels must be given a place, not fall to the package's."""
    for path in (root / "osf_kernels").iterdir():
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").is_file()):
            name = module_name(path, root) if path.suffix else f"osf_kernels.{path.name}"
            assert name == TESTING or name in RANKS, f"{name} has no rank in RANKS"


def test_osf_torch_imports_public_names_only(root: Path) -> None:
    public = frozenset(osf_kernels.__all__)
    package = root / "python_api" / "osf_torch"
    assert any(entry.module == "osf_kernels" for entry in imports(package, package.parent))
    assert private_imports(package, package.parent, public) == []


def test_csrc_includes_no_torch_header(root: Path) -> None:
    sources = [p for p in (root / "csrc").rglob("*") if p.suffix in {".cu", ".cuh", ".cpp", ".h"}]
    assert sources
    torch_header = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10|caffe2)/", re.MULTILINE)
    assert [str(p) for p in sources if torch_header.search(p.read_text())] == []


@pytest.mark.parametrize(
    ("path", "source", "bites"),
    [
        ("plan.py", "from osf_kernels.ops import project", True),
        ("plan.py", "def lazy():\n    import osf_kernels.backends.torch", True),
        ("plan.py", "from osf_kernels import backends", True),
        ("plan.py", "from . import ops", True),
        ("plan.py", "import importlib\nimportlib.import_module(f'osf_kernels.ops.{x}')", True),
        ("plan.py", "import osf_torch", True),
        ("plan.py", "from osf_kernels.errors import describe", False),
        ("errors.py", "import osf_kernels", True),
        ("env.py", "from osf_kernels.plan import Plan", True),
        (
            "ops/core.py",
            "from osf_kernels import env\nfrom osf_kernels.backends import torch",
            False,
        ),
        ("ops/core.py", "from ..backends import torch\nfrom .other import x", False),
        ("ops/core.py", "from osf_kernels.testing import oracle", True),
        ("backends/torch.py", "from osf_kernels.ops import core", True),
        ("testing.py", "from osf_kernels.ops import core", True),
        ("testing.py", "from osf_kernels.basis import Basis", False),
        ("__init__.py", "from osf_kernels.ops import core", False),
        ("info.py", "import osf_kernels", False),
    ],
)
def test_the_order_bites(tmp_path: Path, path: str, source: str, bites: bool) -> None:
    package = tmp_path / "osf_kernels"
    for folder in ("ops", "backends"):
        (package / folder).mkdir(parents=True)
    for name in ("__init__", "plan", "errors", "env", "testing", "ops/other", "backends/torch"):
        (package / f"{name}.py").touch()
    (package / path).write_text(source)
    assert bool(upward_imports(package, tmp_path)) is bites


@pytest.mark.parametrize(
    ("source", "bites"),
    [
        ("from osf_kernels import plan, project_many_", False),
        ("from osf_kernels.testing import leak", False),
        ("from osf_torch.guard import Guard", False),
        ("from osf_kernels import _version", True),
        ("from osf_kernels import errors", True),
        ("from osf_kernels.plan import plan", True),
        ("import osf_kernels.ops", True),
    ],
)
def test_the_public_names_bite(tmp_path: Path, source: str, bites: bool) -> None:
    package = tmp_path / "osf_torch"
    package.mkdir()
    (package / "guard.py").write_text(source)
    assert bool(private_imports(package, tmp_path, frozenset({"plan", "project_many_"}))) is bites
