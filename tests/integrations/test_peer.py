"""integrations._peer: which versions pass, and what the error says where none does."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import osf_torch
from osf_torch.integrations._peer import require_peer, require_version


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, source: str) -> None:
    """A distribution osf-test-peer with the module osf_test_peer."""
    (tmp_path / "osf_test_peer.py").write_text(source)
    info = tmp_path / f"osf_test_peer-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: osf-test-peer\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "osf_test_peer", sys)
    monkeypatch.delitem(sys.modules, "osf_test_peer")


@pytest.mark.parametrize(
    ("version", "versions", "passes"),
    [
        ("1.0", ">=1.0,<2", True),
        ("1", ">=1.0.0", True),
        ("1.10.2", ">=1.9", True),
        ("2.0", ">=1.0,<2", False),
        ("0.9.9", ">=1.0", False),
        ("0.21.2", "==0.21.2", True),
        ("0.21.2", "!=0.21.2", False),
        ("0.21.3.dev0", ">0.21.2 , <=0.21.3", True),
        ("1.5rc1+cpu", ">=1.5,<1.6", True),
        ("unknown", ">=1.0", False),
    ],
)
def test_versions(monkeypatch, version, versions, passes):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if passes:
        assert require_version("osf-test-peer", versions, "some") == version
        return
    with pytest.raises(ImportError, match=f"to be installed, got {version.replace('+', '.')}"):
        require_version("osf-test-peer", versions, "some")


def test_what_is_missing_is_named():
    with pytest.raises(ImportError) as caught:
        require_peer("osf_test_peer", "osf-test-peer", ">=1.0,<2", "some")
    assert str(caught.value) == (
        "osf_torch.integrations.some: expected osf-test-peer >=1.0,<2 to be installed, got none; "
        'pip install "osf-test-peer>=1.0,<2"'
    )
    assert caught.value.name == "osf-test-peer"


def test_a_supported_peer_is_imported(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "1.2", "answer = 42\n")
    assert require_peer("osf_test_peer", "osf-test-peer", ">=1.0,<2", "some").answer == 42


def test_another_version_is_not_imported(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "3.0", "raise AssertionError\n")
    with pytest.raises(ImportError, match=r"expected osf-test-peer >=1\.0,<2 .*, got 3\.0;"):
        require_peer("osf_test_peer", "osf-test-peer", ">=1.0,<2", "some")


def test_a_peer_that_fails_to_import_says_what_it_misses(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "1.2", "import osf_no_such_module\n")
    with pytest.raises(ImportError, match="expected osf_test_peer to import, got Module") as caught:
        require_peer("osf_test_peer", "osf-test-peer", ">=1.0", "some")
    assert caught.value.name == "osf_no_such_module"


@pytest.mark.parametrize("versions", ["", "1.0", "~=1.0", ">=1.0;<2"])
def test_bad_comparisons_are_refused(monkeypatch, versions):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(ValueError, match="expected versions to be comparisons"):
        require_version("osf-test-peer", versions, "some")


@pytest.mark.slow
def test_no_integration_is_imported_with_the_package():
    """In a process of its own, since other tests import them."""
    source = Path(osf_torch.__file__).resolve().parent.parent
    peers = ("peft", "transformers", "mini_trainer", "galore_torch")
    code = (
        f"import sys; sys.path[:0] = [{str(source)!r}, {str(source.parent)!r}]\n"
        "import osf_torch.integrations.galore, osf_torch.integrations.stiefel\n"
        f"print([name for name in {peers} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
