"""What the README shows runs as it stands there."""

from __future__ import annotations

import re


def test_python_blocks_run_in_order(root, capsys):
    text = (root / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert "projection on cpu, 2 matrices" in capsys.readouterr().out
    assert "projected at step, restored after each step" in repr(scope["guard"])


def test_links_and_paths_exist(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    tests = re.findall(r"`(tests/[\w/.]+)", text)
    missing = [path for path in {*links, *tests} if not (root / path).exists()]
    assert not missing
