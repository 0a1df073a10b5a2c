"""The 2-D weights of known models as lists of shapes, and the rank of a shape.

Pure arithmetic: no tensors, no weights, nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """One weight matrix, rows first as ``nn.Linear`` stores it (out, in)."""

    m: int
    n: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}"


def llama_2_7b(layers: int = 32) -> list[Shape]:
    """Every linear layer of Llama-2-7B's blocks (q, k, v, o; gate, up; down), no embeddings."""
    block = [Shape(4096, 4096)] * 4 + [Shape(11008, 4096)] * 2 + [Shape(4096, 11008)]
    return block * layers


def t5_large(layers: int = 24) -> list[Shape]:
    """Every linear layer of T5-large's blocks, no embeddings.

    d_model 1024, 16 heads of 64, d_ff 4096 with one (ungated) input projection; the decoder
    has cross attention beside self attention.
    """
    attention = [Shape(1024, 1024)] * 4
    feed_forward = [Shape(4096, 1024), Shape(1024, 4096)]
    return (attention + feed_forward) * layers + (2 * attention + feed_forward) * layers


def minilm(layers: int = 6) -> list[Shape]:
    """Every 2-D weight of all-MiniLM-L6-v2 that receives a gradient, embeddings included.

    The pooler that its checkpoint also carries is left out: mean pooling never runs it.
    """
    block = [Shape(384, 384)] * 4 + [Shape(1536, 384), Shape(384, 1536)]
    embeddings = [Shape(30522, 384), Shape(512, 384), Shape(2, 384)]
    return embeddings + block * layers


MODELS = {"llama-2-7b": llama_2_7b, "t5-large": t5_large, "minilm": minilm}


def shapes_of(model: str, *, layers: int | None = None) -> list[Shape]:
    """The shapes behind a ``--model`` argument: a name in ``MODELS`` or ``ROWSxCOLUMNS``.

    Raises ValueError where it is neither, or where ``layers`` is given for a single shape or
    is not positive.
    """
    if layers is not None and layers < 1:
        raise ValueError(f"bench: expected --layers to be at least 1, got {layers}")
    if model in MODELS:
        return MODELS[model]() if layers is None else MODELS[model](layers)
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", model)
    if match is None:
        known = ", ".join(MODELS)
        raise ValueError(
            f"bench: expected --model to be one of {known} or a shape such as 4096x11008, "
            f"got {model!r}"
        )
    if layers is not None:
        raise ValueError(f"bench: --layers needs a model, got the single shape {model}")
    return [Shape(int(match[1]), int(match[2]))]


class Rank(NamedTuple):
    """A rank as asked for: a number of directions, or a fraction of the shorter side."""

    value: int | float

    @classmethod
    def parse(cls, text: str, option: str = "--rank") -> Rank:
        """``"128"`` or ``"0.5"``. Raises ValueError for anything else, 0 and 1.0 included."""
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if text.isdigit() and int(text) > 0:
            return cls(int(text))
        if 0.0 < number < 1.0:
            return cls(number)
        raise ValueError(
            f"bench: expected {option} to be a positive integer or a fraction in (0, 1), got "
            f"{text!r}"
        )

    def of(self, shape: Shape) -> int:
        """The rank for one shape: at least 1, at most its shorter side."""
        short = min(shape)
        wanted = self.value if isinstance(self.value, int) else round(self.value * short)
        return max(1, min(short, wanted))

    def require_room(self, shapes: Sequence[Shape], option: str = "--rank") -> None:
        """Raises ValueError for more directions than any of the shapes has."""
        most = max(map(min, shapes))
        if isinstance(self.value, int) and self.value > most:
            raise ValueError(
                f"bench: expected {option} to be at most the shorter side, {most}, got {self.value}"
            )

    def __str__(self) -> str:
        return f"r={self.value}" if isinstance(self.value, int) else f"rho={self.value:g}"


def low_is_smaller(size: int, rank: int) -> bool:
    """Whether the complement of ``rank`` directions is no wider than they are."""
    return 2 * rank >= size
