"""osf_torch.layer_importance: the figure and whose it is, on small stacks and on real encoders."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from osf_torch import refresh
from osf_torch.importance import layer_importance
from osf_torch.ranks import allocate_ranks
from tests.helpers import generator_for, randn
from tests.small_stack import WIDTH, Residual, Stack, inputs, randomised, stack


def mean_cosine(pairs) -> float:
    """The formula as written, token by token."""
    figures = []
    for x, y in pairs:
        for a, b in zip(x.flatten(0, -2), y.flatten(0, -2), strict=True):
            k = min(len(a), len(b))
            a, b = a[:k].double(), b[:k].double()
            figures.append(float(a @ b / (a.norm() * b.norm())))
    return sum(figures) / len(figures)


def normalised(similarities: dict[str, float]) -> dict[str, float]:
    positive = {name: max(0.0, s) for name, s in similarities.items()}
    mean = sum(positive.values()) / len(positive)
    return {name: s / mean for name, s in positive.items()}


def block_figures(model: Stack, batches) -> list[float]:
    """Of each block, by running the model by hand."""
    pairs = [[] for _ in model.layers]
    with torch.no_grad():
        for batch in batches:
            x = model.embed(batch)
            for seen, layer in zip(pairs, model.layers, strict=True):
                y = layer(x.clone())
                seen.append((x, y))
                x = y
    return [mean_cosine(seen) for seen in pairs]


def weight_figures(layers: list[nn.Linear], x: torch.Tensor) -> dict[str, float]:
    """Of each weight of Linear, Tanh, Linear, Tanh, ..."""
    found = {}
    for i, layer in enumerate(layers):
        y = F.linear(x, layer.weight)
        found[f"{2 * i}.weight"] = mean_cosine([(x, y)])
        x = torch.tanh(y + layer.bias)
    return found


# the figure


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 17), min_size=2, max_size=5),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_weights_figures_are_the_formulas(widths, tokens, seed):
    layers = [nn.Linear(n, m, dtype=torch.float64) for n, m in itertools.pairwise(widths)]
    model = nn.Sequential()
    for layer in layers:
        model.extend([layer, nn.Tanh()])
    randomised(model, torch.float64, seed)
    x = randn(tokens, widths[0], dtype=torch.float64, generator=generator_for(seed))
    with torch.no_grad():
        expected = weight_figures(layers, x)
    if max(expected.values()) <= 0:
        with pytest.raises(ValueError, match="points along its input"):
            layer_importance(model, [x], per="weight")
        return
    found = layer_importance(model, [x], per="weight")
    assert list(found) == list(expected)
    assert found == pytest.approx(normalised(expected), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_the_formula_in_that_dtype(dtype):
    """Given equal activations: those of the model in its own dtype."""
    model = stack(dtype=dtype)
    x = inputs(6, 9, 5, dtype=dtype)
    truth = block_figures(model, [x])  # cosines in float64 of these activations
    expected = normalised({f"layers.{i}.up.weight": s for i, s in enumerate(truth)})
    with torch.no_grad():
        eager, h = {}, model.embed(x)
        for i, layer in enumerate(model.layers):
            y = layer(h)
            eager[f"layers.{i}.up.weight"] = float(F.cosine_similarity(h, y, dim=-1).mean())
            h = y
    found = layer_importance(model, [x], filter="layers.*.up.weight")
    error, bar = (
        max(abs(figures[name] - expected[name]) for name in expected)
        for figures in (found, normalised(eager))
    )
    assert error <= 2 * bar + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("in_place", [False, True])
def test_blocks_figures_are_the_formulas(in_place):
    model = stack(in_place=in_place)
    batches = [inputs(2, 7, 5), inputs(5, 3, 5)]
    figures = block_figures(model, batches)
    found = layer_importance(model, batches)
    mean = sum(figures) / len(figures)
    for i, figure in enumerate(figures):
        for part in ("up", "down"):
            assert found[f"layers.{i}.{part}.weight"] == pytest.approx(figure / mean, rel=1e-9)
    assert len(set(figures)) == 3
    # outside of all blocks: the average layer
    assert found["embed.weight"] == found["head.weight"] == 1.0
    assert sum(found.values()) / len(found) == pytest.approx(1.0)


def test_batches_count_by_their_tokens():
    model = stack()
    x = inputs(8, 3, 5)
    whole = layer_importance(model, [x])
    parts = layer_importance(model, [x[:1], x[1:]])
    assert parts == pytest.approx(whole, rel=1e-9)
    alone = [layer_importance(model, [part]) for part in (x[:1], x[1:])]
    unweighted = sum(a["layers.0.up.weight"] for a in alone) / 2
    assert unweighted != pytest.approx(whole["layers.0.up.weight"], rel=1e-6)


def test_a_module_called_several_times_is_averaged():
    layer = Residual()
    model = randomised(Stack([layer, Residual(), layer]), torch.float64)
    x = inputs(2, 6, 5)
    first, second, third = block_figures(model, [x])
    found = layer_importance(model, [x], filter="layers.*.up.weight")
    shared = (first + third) / 2
    assert list(found) == ["layers.0.up.weight", "layers.1.up.weight"]
    assert found["layers.0.up.weight"] / found["layers.1.up.weight"] == pytest.approx(
        shared / second, rel=1e-9
    )


def test_a_weight_in_two_blocks_is_averaged_over_both():
    one, two, three = Residual(), Residual(), Residual()
    two.up.weight = one.up.weight
    model = randomised(Stack([one, two, three]), torch.float64)
    x = inputs(2, 6, 5)
    figures = block_figures(model, [x])
    found = layer_importance(model, [x], filter=["layers.0.up.weight", "layers.2.up.weight"])
    assert found["layers.0.up.weight"] / found["layers.2.up.weight"] == pytest.approx(
        (figures[0] + figures[1]) / 2 / figures[2], rel=1e-9
    )


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_scale_changes_nothing(scale):
    """Activations whose squares overflow float32, or vanish in it."""
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])
    randomised(model, torch.float32)
    x = inputs(4, WIDTH, dtype=torch.float32)
    found = layer_importance(model, [x * scale], per="weight")
    assert found == pytest.approx(layer_importance(model, [x], per="weight"), rel=1e-5)


def test_the_outermost_block_counts_and_experts_inside_do_not():
    class Experts(Residual):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Residual() for _ in range(2))

        def forward(self, x):
            return super().forward(x) + self.experts[0](x)  # the other one is never called

    model = randomised(Stack([Experts(), Experts()]), torch.float64)
    x = inputs(3, 4, 5)
    figures = block_figures(model, [x])
    found = layer_importance(model, [x], filter="layers.*")
    mean = sum(figures) / 2
    assert len(found) == 12
    for name, value in found.items():
        assert value == pytest.approx(figures[int(name.split(".")[1])] / mean, rel=1e-9)


def test_pipelines_are_no_blocks():
    """An nn.Sequential of unlike modules is no stack of layers, though one keeps its width."""
    model = nn.Sequential(nn.Linear(5, WIDTH), nn.Sequential(Residual(), Residual()), Residual())
    model = randomised(model, torch.float64)
    x = inputs(4, 5)
    found = layer_importance(model, [x])
    assert found["0.weight"] == found["2.up.weight"] == 1.0
    assert found["1.0.up.weight"] != found["1.1.up.weight"]
    assert found["1.0.up.weight"] + found["1.1.up.weight"] == pytest.approx(2.0)


# real encoders


class Encoder(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 4, 32, dropout=0.5, batch_first=True, dtype=torch.float64, **options
        )
        self.encoder = nn.TransformerEncoder(layer, 3)

    def forward(self, x, attention_mask):
        return self.encoder(x, src_key_padding_mask=attention_mask == 0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first):
    model = randomised(Encoder(norm_first=norm_first), torch.float64).train()
    x, mask = inputs(3, 5, 16), torch.ones(3, 5)
    mask[1, 3:] = 0
    found = layer_importance(model, [{"x": x, "attention_mask": mask}])
    fast = torch.backends.mha.get_fastpath_enabled()
    pairs, h = [], x
    model.eval()
    with torch.no_grad():
        for layer in model.encoder.layers:
            y = torch.stack(
                [
                    F.pad(layer(row[None, :length])[0], (0, 0, 0, 5 - length))
                    for row, length in zip(h, (5, 3, 5), strict=True)
                ]
            )
            pairs.append([(h[mask != 0], y[mask != 0])])
            h = y
    figures = [mean_cosine(pair) for pair in pairs]
    expected = normalised(
        {f"encoder.layers.{i}.linear1.weight": figure for i, figure in enumerate(figures)}
    )
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9)
        assert found[name.replace("linear1", "self_attn.out_proj")] == found[name]
    assert fast
    refresh(model, allocate_ranks(found, model), progress=False)


@pytest.mark.slow
def test_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    model = transformers.BertModel(config)
    ids = torch.randint(0, 64, (4, 9), generator=generator_for("ids"))
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[2, 5:] = 0
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})
    found = layer_importance(model, [batch])
    with torch.no_grad():
        hidden = model.eval()(**batch, output_hidden_states=True).hidden_states
    figures = [mean_cosine([(x[mask != 0], y[mask != 0])]) for x, y in itertools.pairwise(hidden)]
    expected = normalised({str(i): figure for i, figure in enumerate(figures)})
    assert len(found) == 3 * 6 + 1
    assert found["pooler.dense.weight"] == 1.0
    for i, value in expected.items():
        for part in ("attention.self.query", "attention.output.dense", "intermediate.dense"):
            assert found[f"encoder.layer.{i}.{part}.weight"] == pytest.approx(value, rel=1e-5)
    ranks = allocate_ranks(found, model)
    assert {name: s.rank for name, s in refresh(model, ranks).items()} == ranks


@pytest.mark.slow
def test_a_compiled_model_runs_with_the_hooks():
    model, x = stack(), inputs(4, 3, 5)
    expected = layer_importance(model, [x])
    compiled = torch.compile(model.eval(), backend="eager")
    with torch.no_grad():
        compiled(x)  # compiled before there are hooks
    found = layer_importance(compiled, [x])
    # as torch names a compiled module's parameters: with a prefix or, later, without
    assert {name.removeprefix("_orig_mod."): value for name, value in found.items()} == expected
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
