"""What the README shows runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch


def test_python_blocks_run_in_order(root, capsys):
    text = (root / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert "projection on cpu, 2 matrices" in capsys.readouterr().out
    assert "projected at step, restored after each step" in repr(scope["guard"])


@pytest.mark.slow
def test_the_sharded_example_runs_on_two_ranks(root, tmp_path):
    text = (root / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```py\n(.*?)```", text, flags=re.DOTALL)
    script = tmp_path / "train.py"
    # A thread of gloo's that lets go of a tensor while the interpreter ends aborts the process
    # (pytorch/pytorch#179291), so the process ends without that once the example is through.
    leave = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    script.write_text(example + leave)
    path = os.pathsep.join([str(root), str(root / "python_api")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    leak, drift = re.fullmatch(r"leak (\S+), drift (\S+)\n", done.stdout).groups()
    assert float(leak) <= 1e-6
    assert float(drift) <= 1e-5


def small_llama(transformers):
    return transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # transformers' own
@pytest.mark.parametrize("method", ["confine", "protect"])
def test_the_trainers_example_runs_and_resumes(root, tmp_path, monkeypatch, method):
    transformers = pytest.importorskip("transformers")
    text = (root / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python3\n(.*?)```", text, flags=re.DOTALL)
    example = example.replace("0.5, ", f'0.5, "{method}", ')
    config = small_llama(transformers)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    dataset = [{"input_ids": torch.arange(12), "labels": torch.arange(12)}] * 32
    monkeypatch.chdir(tmp_path)
    scope = {"model": model, "dataset": dataset}
    exec(compile(example, "README.md", "exec"), scope)
    held = scope["callback"].guard or scope["callback"].confined
    assert max(held.drift().values()) <= 1e-6
    again = transformers.LlamaForCausalLM(config)
    callback = scope["SubspaceCallback"](again, 0.5, method, leave_out="*embed_tokens*")
    trainer = scope["Trainer"](
        again, scope["arguments"], train_dataset=dataset, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")
    trained = model.state_dict()
    assert plain.state_dict().keys() == again.state_dict().keys() == trained.keys()
    for name, t in trained.items():
        assert torch.equal(t, again.state_dict()[name])
        assert torch.equal(t, plain.state_dict()[name])


def test_links_and_paths_exist(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    tests = re.findall(r"`(tests/[\w/.]+)", text)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    missing = [path for path in {*links, *tests} - anchors if not (root / path).exists()]
    assert not missing
