"""Padding that looks like real tokens: it is told from them whatever ids and numbers it has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from osf_torch import input_subspaces
from osf_torch.masks import Padding
from tests.helpers import generator_for, grown, randn
from tests.test_masks import Encoder, held, ids, mask_of, rows_read

ENERGY = 0.95
ROOM = 1e-5  # of the energy, that float32 leaves open


def padded_texts(key: object, *, pad: int, end: int, left: bool = False) -> dict[str, torch.Tensor]:
    """Short texts between two ends, and far more padding than texts."""
    generator = generator_for("texts", key)
    tokens, mask = torch.full((6, 30), pad), torch.zeros(6, 30, dtype=torch.long)
    for text, real in zip(tokens, mask, strict=True):
        count = int(torch.randint(5, 9, (), generator=generator))
        where = slice(30 - count, 30) if left else slice(0, count)
        text[where] = torch.randint(1, 40, (count,), generator=generator)
        text[where.start] = text[where.stop - 1] = end
        real[where] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def energies(model: nn.Module, batches, kinds: tuple[type, ...], **options) -> dict[str, float]:
    """The share of the real tokens' energy that each layer's basis holds, by float64."""
    found = input_subspaces(model, batches, energy=ENERGY, min_free=0, progress=False, **options)
    names = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    read: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for batch in batches:
            real = batch["attention_mask"] != 0

            def keep(module, args, real=real):
                read.setdefault(names[module], []).append(args[0][real])

            hooks = [module.register_forward_pre_hook(keep) for module in names]
            model.eval()(**batch)
            for hook in hooks:
                hook.remove()
    shares = {}
    for name, rows in read.items():
        entry = found.get(f"{name}.weight")
        if entry is not None:
            side = "V" if entry.U is None else "U"
            shares[name] = held(grown(entry, side), torch.cat(rows))
    return shares


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pad", [0, 41])
def test_gpt2_holds_the_energy_of_its_real_tokens(pad, left, caplog):
    """Whose padding is the token that begins and ends every text."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=42, n_embd=24, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    batches = [padded_texts(i, pad=pad, end=0, left=left) for i in range(3)]
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    shares = energies(model, batches, kinds, leave_out=["*wte*", "*wpe*"])
    assert len(shares) == 9
    assert min(shares.values()) >= ENERGY - ROOM, shares
    assert not [line for line in caplog.messages if "padding" in line]


@pytest.mark.parametrize("pad", [0, 7, 19])
def test_an_encoder_holds_the_energy_of_its_real_tokens(pad):
    class Attended(Encoder):
        def forward(self, input_ids, attention_mask):
            return self.attention(self.embed(input_ids), mask=attention_mask)

    batches = [padded_texts(i, pad=pad, end=pad) for i in range(3)]
    for batch in batches:
        batch["input_ids"] %= 20
    shares = energies(Attended(), batches, (nn.Linear,), filter="attention.*")
    assert shares.keys() == {f"attention.{part}" for part in "qkv"}
    assert min(shares.values()) >= ENERGY - ROOM, shares


BATCHES = {
    "all of one id": torch.full((4, 6), 5),
    "all of the first id": torch.zeros(4, 6, dtype=torch.long),
    "real tokens of the padding's id, beside other padding": torch.where(
        torch.arange(6) < 5, 3, 4
    ).repeat(4, 1),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_real_tokens_of_one_id_are_told_from_padding(batch, monkeypatch):
    mask = mask_of(5, 3, 4, 1)
    tokens = {"input_ids": BATCHES[batch], "attention_mask": mask}
    counted = rows_read(Encoder(), tokens, monkeypatch, filter="attention.*")
    assert counted == {f"attention.{p}": int(mask.sum()) for p in "qkv"}


class Normed(nn.Module):
    """What reads embeddings through a norm, to which all constants are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        nn.init.normal_(self.norm.bias)
        self.layer = nn.Linear(8, 8)

    def forward(self, inputs_embeds, attention_mask):
        return self.layer(self.norm(inputs_embeds))


FLOATS = {
    "zeros": lambda x, real: x * real,
    "ones": lambda x, real: torch.where(real, x, 1.0),
    "the first token's": lambda x, real: torch.where(real, x, x[0, 0]),
    "every token's": lambda x, real: x[0, 0].expand(x.shape),
    "tokens' of its own": lambda x, real: x,
}


@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_at_padded_places(values, dtype, monkeypatch):
    mask = mask_of(6, 3, 5, 1)
    x = randn(4, 6, 8, dtype=torch.float32, generator=generator_for("embeds", values))
    x = FLOATS[values](x, mask[..., None] != 0).to(dtype)
    batch = {"inputs_embeds": x, "attention_mask": mask}
    model = Normed().to(dtype)
    assert rows_read(model, batch, monkeypatch) == {"layer": int(mask.sum())}


@settings(max_examples=60, deadline=None)
@given(
    real=st.tuples(*[st.integers(0, 5)] * 3).filter(lambda r: min(r) < 5),
    known=st.integers(1, 3),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32]),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_each_padded_value_is_another_and_no_token_is(real, known, dtype, wide, seed):
    mask = mask_of(*real, length=5)
    shape = (3, 5, 2) if wide else (3, 5)
    x = torch.randint(0, known, shape, generator=generator_for("other", seed)).to(dtype)
    batch = {"x": x, "mask": mask}
    other = Padding({"mask": "x"}, "test").probe(batch)["x"]
    assert other.dtype == dtype
    assert torch.equal(batch["x"], x)
    differs = (other != x).reshape(3, 5, -1).any(-1)
    assert torch.equal(differs, mask == 0)
    known_ids = set(x.unique().tolist())
    if dtype == torch.int64 and len(known_ids) > 1 and not wide:
        assert set(other.unique().tolist()) <= known_ids


def test_padding_that_no_activation_shows_is_logged_once(caplog):
    """What is read doesn't depend on the values put in, so that these find no padding."""

    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(2, 8), nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask):
            return self.layer(self.embed(input_ids // 20))

    mask = mask_of(6, 3, 5, 1)
    batch = {"input_ids": ids(), "attention_mask": mask}
    for options in ({}, {"masks": None}):
        input_subspaces(
            Rounding(), [batch, batch], filter="layer.weight", progress=False, **options
        )
    (line,) = [line for line in caplog.messages if "padding" in line]
    assert line.startswith("osf_torch.input_subspaces: padding is counted like tokens, so that")
    assert "padded places of 'attention_mask'" in line
    assert "masks=None" in line


def test_padding_that_reaches_every_row_is_logged(caplog):
    class Mixing(Encoder):
        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids)
            return self.attention(x + x.mean(1, keepdim=True), mask=attention_mask)

    batch = {"input_ids": ids(), "attention_mask": mask_of(6, 3, 5, 1)}
    input_subspaces(Mixing(), [batch], filter="attention.*", progress=False)
    assert "padding reaches real tokens" in caplog.text
