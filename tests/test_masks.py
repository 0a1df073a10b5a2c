"""Padding: left out where it is, in every layout, and nowhere else however long a sequence is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from osf_torch import input_subspaces, layer_importance
from osf_torch.masks import Padding
from tests.helpers import generator_for, grown, randn
from tests.small_stack import inputs, stack

LENGTH = 6


def mask_of(*real: int, length: int = LENGTH) -> torch.Tensor:
    return (torch.arange(length) < torch.tensor(real)[:, None]).long()


def held(V: torch.Tensor, X: torch.Tensor) -> float:
    """The share of X's energy (..., n) within the columns of V."""
    X = X.double().flatten(0, -2)
    return float((X @ V.double()).square().sum() / X.square().sum())


class Seen(nn.Linear):
    """A linear layer that remembers what it read last."""

    def forward(self, x):
        self.read = x.detach()
        return super().forward(x)


class Attention(nn.Module):
    """One head, whose keys that are no tokens get no weight."""

    def __init__(self, width: int, *, transposes: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (Seen(width, width, bias=False) for _ in range(3))
        self.transposes = transposes

    def forward(self, x, states=None, mask=None):
        states = x if states is None else states
        lay = (lambda t: t.transpose(0, 1)) if self.transposes else (lambda t: t)
        q, k, v = lay(self.q(lay(x))), lay(self.k(lay(states))), lay(self.v(lay(states)))
        scores = q @ k.mT
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, :] == 0, float("-inf"))
        return x + scores.softmax(-1) @ v


class Encoder(nn.Module):
    def __init__(self, *, transposes: bool = False) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(20, 8), Attention(8, transposes=transposes)
        self.pool = Seen(8, 8)

    def forward(self, input_ids, attention_mask=None):
        x = self.attention(self.embed(input_ids), mask=attention_mask)
        return x, self.pool(x[:, 0])


class TwoSided(nn.Module):
    """An encoder, and a decoder that reads it, whose sequences may be as long."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.embed, self.inner, self.cross = nn.Embedding(20, 8), Attention(8), Attention(8)

    def forward(
        self, input_ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None
    ):
        states, _ = self.encoder(input_ids, attention_mask)
        x = self.inner(self.embed(decoder_input_ids), mask=decoder_attention_mask)
        return self.cross(x, states, attention_mask)


def ids(*key: object, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 20, (4, length), generator=generator_for("ids", *key, length))


def rows_read(model, batch, monkeypatch, **options) -> dict[str, int]:
    """How many rows of each layer's input counted, by the layer's name."""
    counted: dict[str, int] = {}
    rows = Padding.rows

    def counting(self, watcher, *activations):
        found = rows(self, watcher, *activations)
        name, side = watcher
        assert side == "V"
        counted[name.removesuffix(".weight")] = len(found[0])
        return found

    monkeypatch.setattr(Padding, "rows", counting)
    input_subspaces(model, [batch], progress=False, **options)
    return counted


def test_each_mask_is_of_its_own_sequence(monkeypatch):
    model = TwoSided()
    mask, other = mask_of(6, 3, 5, 1), mask_of(2, 6, 6, 4)
    batch = {"input_ids": ids(0), "decoder_input_ids": ids(1), "attention_mask": mask}
    tokens, all_tokens = int(mask.sum()), mask.numel()
    # what the decoder reads of the encoder is padded as the encoder is
    wanted = {f"encoder.attention.{part}": tokens for part in "qkv"}
    wanted |= {"cross.k": tokens, "cross.v": tokens, "encoder.pool": 4}
    wanted |= dict.fromkeys(("inner.q", "inner.k", "inner.v", "cross.q"), all_tokens)
    assert rows_read(model, batch, monkeypatch) == wanted
    batch["decoder_attention_mask"] = other
    decoder = dict.fromkeys(("inner.q", "inner.k", "inner.v", "cross.q"), int(other.sum()))
    assert rows_read(model, batch, monkeypatch) == wanted | decoder
    every = rows_read(model, batch, monkeypatch, masks=None)
    assert every == dict.fromkeys(wanted, all_tokens) | {"encoder.pool": 4}


@pytest.mark.parametrize("transposes", [False, True])
@pytest.mark.parametrize("length", [4, 6])  # 4 is the batch's size: no shape tells the layouts
def test_the_layout_is_the_modules_own(transposes, length, monkeypatch):
    model, mask = Encoder(transposes=transposes), mask_of(length, 2, 3, 1, length=length)
    batch = {"input_ids": ids(length=length), "attention_mask": mask}
    counted = rows_read(model, batch, monkeypatch)
    assert counted == {f"attention.{p}": int(mask.sum()) for p in "qkv"} | {"pool": 4}
    found = input_subspaces(model, [batch], energy=1.0, min_free=0, progress=False)
    read = model.attention.q.read.transpose(0, 1) if transposes else model.attention.q.read
    V = grown(found["attention.q.weight"])
    assert held(V, read[mask != 0]) > 1 - 1e-6


def test_real_tokens_of_another_sequence_are_never_dropped():
    """Of two tensors as long as the mask neither is taken for its own, unless masks= says it."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.image = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, text, image, attention_mask):
            return self.text(text).sum() + self.image(image).sum()

    generator = generator_for("two")
    text, image = (randn(4, 6, 8, dtype=torch.float32, generator=generator) for _ in range(2))
    mask = mask_of(2, 2, 2, 2)
    for x in (text, image):
        x[:, :2, 4:], x[:, 2:, :4] = 0, 0  # what is padding of text points elsewhere
    batch = {"text": text, "image": image, "attention_mask": mask}
    found = input_subspaces(Two(), [batch], energy=0.95, min_free=0, progress=False)
    assert held(grown(found["image.weight"]), image) >= 0.95 - 1e-6
    assert held(grown(found["text.weight"]), text[:, :2]) >= 0.9
    for masks, whole in (({"attention_mask": "text"}, image), ({"attention_mask": "image"}, text)):
        found = input_subspaces(
            Two(), [batch], energy=0.95, min_free=0, progress=False, masks=masks
        )
        name = "image.weight" if whole is image else "text.weight"
        other = "text.weight" if whole is image else "image.weight"
        assert held(grown(found[name]), whole) >= 0.95 - 1e-6
        assert grown(found[other]).shape[1] <= 4


def test_what_can_not_be_told_is_counted_and_logged_once(caplog):
    x, mask = inputs(3, 7, 5), mask_of(7, 2, 4, length=7)
    model = stack()

    def forward(model, batch):
        return model(batch["x"])

    batch = {"x": x, "again": x, "attention_mask": mask}
    found = layer_importance(model, [batch, batch], forward=forward)
    assert found == layer_importance(model, [x])
    (line,) = caplog.messages
    assert line.startswith("osf_torch.layer_importance: padding is counted like tokens")
    assert "candidates are 'x', 'again'" in line
    assert "masks={'attention_mask': KEY}" in line
    caplog.clear()
    known = layer_importance(
        model, [batch], forward=forward, masks={"attention_mask": "x"}, per="weight"
    )
    assert known == pytest.approx(layer_importance(model, [x[mask != 0]], per="weight"))
    layer_importance(model, [batch], forward=forward, masks=None)
    square = {"x": inputs(4, 4, 5), "attention_mask": mask_of(1, 2, 3, 3, length=4)}
    assert layer_importance(model, [square], forward=forward) == layer_importance(
        model, [square["x"]]
    )
    assert len(caplog.messages) == 1  # which way round a square batch lies


class Mixing(nn.Module):
    def forward(self, x):
        return x + x.mean(1, keepdim=True)


def test_a_model_that_mixes_padding_with_tokens_is_counted_in_full(monkeypatch):
    model = nn.ModuleDict(
        {
            "before": Seen(5, 5, dtype=torch.float64),
            "mix": Mixing(),
            "after": Seen(5, 5, dtype=torch.float64),
        }
    )
    mask = mask_of(6, 3, 5, 1)
    counted = rows_read(
        model,
        {"x": inputs(4, 6, 5), "attention_mask": mask},
        monkeypatch,
        forward=lambda model, batch: model["after"](model["mix"](model["before"](batch["x"]))),
    )
    assert counted == {"before": int(mask.sum()), "after": 24}


def test_padding_that_the_model_blanks_out_is_left_out(monkeypatch):
    class Blanking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Seen(5, 5, dtype=torch.float64)

        def forward(self, x, attention_mask):
            return self.layer(x * attention_mask[..., None])

    mask = mask_of(6, 3, 5, 1)
    batch = {"x": inputs(4, 6, 5), "attention_mask": mask}
    assert rows_read(Blanking(), batch, monkeypatch) == {"layer": int(mask.sum())}


def test_a_model_that_draws_numbers_draws_the_same_ones(monkeypatch):
    class Noisy(Encoder):
        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids)
            return self.attention(x + torch.randn(x.shape), mask=attention_mask)

    model, mask = Noisy(), mask_of(6, 3, 5, 1)
    counted = rows_read(
        model,
        {"input_ids": ids(), "attention_mask": mask},
        monkeypatch,
        filter="attention.*",
    )
    assert counted == {f"attention.{p}": int(mask.sum()) for p in "qkv"}


def test_batches_without_padding_run_once():
    model, runs = Encoder(), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    batch = {"input_ids": ids(), "attention_mask": mask_of(6, 6, 6, 6)}
    input_subspaces(model, [batch], progress=False)
    input_subspaces(model, [ids()], progress=False)
    assert len(runs) == 2
    batch["attention_mask"][0, 5] = 0
    input_subspaces(model, [batch], progress=False)
    assert len(runs) == 4


def test_a_model_that_does_not_run_with_other_values_says_what_to_do():
    class Strict(Encoder):
        def forward(self, input_ids, attention_mask):
            if bool(((input_ids != 0) & (attention_mask == 0)).any()):
                raise RuntimeError("a placeholder is missing")
            return super().forward(input_ids, attention_mask)

    mask = mask_of(6, 3, 5, 1)
    batch = {"input_ids": ids() * mask, "attention_mask": mask}
    with pytest.raises(ValueError, match=r"other values at padded.*placeholder.*masks=None"):
        input_subspaces(Strict(), [batch], progress=False)
    assert input_subspaces(Strict(), [batch], progress=False, masks=None)


@pytest.mark.parametrize(
    ("masks", "kind", "message"),
    [
        ("all", TypeError, "expected masks to be \"auto\", None, or a mapping.*got 'all'"),
        ({"attention_mask": 3}, TypeError, "got {'attention_mask': 3}"),
        ({"mask": "input_ids"}, ValueError, "got 'mask' and 'input_ids' of a batch with 'input"),
        ({"attention_mask": "ids"}, ValueError, "got 'attention_mask' and 'ids' of a batch"),
        ({"attention_mask": "short"}, ValueError, r"'short' to have a token.*\(4, 6\), got \(4,\)"),
    ],
)
def test_masks_that_do_not_fit(masks, kind, message):
    batch = {"input_ids": ids(), "attention_mask": mask_of(6, 3, 5, 1), "short": torch.ones(4)}
    for run in (input_subspaces, layer_importance):
        with pytest.raises(kind, match=message):
            run(
                Encoder(),
                [batch],
                masks=masks,
                progress=False,
                forward=lambda model, batch: model(batch["input_ids"], batch["attention_mask"]),
            )
