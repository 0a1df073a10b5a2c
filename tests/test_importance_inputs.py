"""osf_torch.layer_importance: what batches may be, what is left alone, and what is refused."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn

from osf_torch import allocate_ranks, input_subspaces
from osf_torch.importance import layer_importance
from tests.small_stack import Residual, Stack, inputs, randomised, stack

# what batches may be

Pair = namedtuple("Pair", ["x", "attention_mask"])


@pytest.mark.parametrize(
    "form",
    [
        lambda x, mask: x,
        lambda x, mask: (x, mask),
        lambda x, mask: [x, mask],
        lambda x, mask: Pair(x, mask),
        lambda x, mask: {"x": x, "attention_mask": mask},
        lambda x, mask: OrderedDict(x=x),
        lambda x, mask: UserDict(x=x, attention_mask=mask),
    ],
)
def test_forms_of_batches(form):
    model, x = stack(), inputs(4, 3, 5)
    expected = layer_importance(model, [x])
    assert layer_importance(model, [form(x, torch.ones(4, 3))]) == pytest.approx(expected)


def test_forward_is_called_in_place_of_the_model():
    model, x = stack(), inputs(4, 3, 5)
    seen = []
    found = layer_importance(
        model, [{"tokens": x}], forward=lambda m, batch: seen.append(m) or m(batch["tokens"])
    )
    assert seen == [model]
    assert found == layer_importance(model, [x])


def test_no_more_batches_are_taken_than_asked_for():
    model = stack()
    endless = iter([inputs(2, 3, 5), inputs(4, 2, 5), inputs(1, 1, 5)])
    found = layer_importance(model, endless, max_batches=2)
    assert next(endless).shape == (1, 1, 5)
    assert found == layer_importance(model, [inputs(2, 3, 5), inputs(4, 2, 5)])


@pytest.mark.parametrize("per", ["block", "weight"])
@pytest.mark.parametrize("layout", ["batch first", "length first", "flat"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding_is_left_out(per, layout, dtype):
    model = stack()
    x, mask = inputs(3, 7, 5), torch.zeros(3, 7, dtype=dtype)
    for row, length in enumerate((7, 2, 4)):
        mask[row, :length] = 1
    expected = layer_importance(model, [x[mask != 0]], per=per)
    padded = x.clone()
    padded[mask == 0] = float("nan")  # as of rows that attend to nothing
    laid = {
        "batch first": padded,
        "length first": padded.transpose(0, 1),
        "flat": padded.flatten(0, 1),
    }[layout]
    found = layer_importance(model, [{"x": laid, "attention_mask": mask}], per=per)
    assert found == pytest.approx(expected, rel=1e-9)


# what is left alone


class Dice(nn.Module):
    """Draws a random number even in eval mode."""

    def forward(self, x):
        return x + torch.rand(())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("per", ["block", "weight"])
def test_the_model_and_the_generator_are_left_as_they_were(per, fails):
    model = Stack([nn.Sequential(Residual(), nn.Dropout(0.5), Dice()) for _ in range(2)])
    model = randomised(model, torch.float64)
    model.train()
    model.layers[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    loader = torch.utils.data.DataLoader(inputs(8, 5), batch_size=4, shuffle=True)
    drawn = torch.get_rng_state()

    def forward(model, batch):
        assert not any(module.training for module in model.modules())
        assert not model(batch).requires_grad
        if fails:
            raise RuntimeError("out of memory")

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            layer_importance(model, loader, per=per, forward=forward)
    else:
        layer_importance(model, loader, per=per, forward=forward)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(p.grad is None for p in model.parameters())
    for name, p in model.state_dict().items():
        assert torch.equal(p, weights[name])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_progress_counts_batches(capsys):
    model, x = stack(), inputs(2, 5)
    layer_importance(model, [x, x, x], max_batches=2, progress="always")
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "importance 2/2" in lines[-1]
    layer_importance(model, iter([x]), progress="always")  # of unknown length
    assert capsys.readouterr().err == ""


# what is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("per", "layer"), [("block", "layers.1"), ("weight", "layers.1.down.weight")]
)
def test_bad_activations_name_the_first_layer_that_had_them(per, layer, value):
    model = stack()
    model.layers[1].down.weight.data[0, 0] = value
    with pytest.raises(ValueError, match=rf"NaN or Inf first in '{layer}'"):
        layer_importance(model, [inputs(2, 3, 5)], per=per)


def test_nothing_matches():
    with pytest.raises(
        ValueError, match=r"layer_importance: expected filter='q\.\*'.*layers\.0\.up"
    ):
        layer_importance(stack(), [inputs(2, 5)], filter="q.*")


@pytest.mark.parametrize("per", ["block", "weight"])
def test_layers_that_were_never_reached_are_named(per):
    model = stack()

    def forward(model, batch):
        model.layers[0](model.embed(batch))
        return model.layers[2](model.embed(batch))

    with pytest.raises(
        ValueError, match=r"none that reached layers\.1\.up\.weight, layers\.1\.down"
    ):
        layer_importance(model, [inputs(2, 5)], per=per, forward=forward, filter="layers.*")


def test_a_batch_of_padding_alone_reaches_nothing():
    batch = {"x": inputs(2, 3, 5), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"reached embed\.weight"):
        layer_importance(stack(), [batch], per="weight")


def test_an_embedding_is_no_product():
    model = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"none that reached 0\.weight"):
        layer_importance(model, [torch.arange(6)], per="weight", filter="*weight")


@pytest.mark.parametrize("batches", [[], iter([])])
def test_no_batches(batches):
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        layer_importance(stack(), batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "layer"}, 'expected per to be "block" or "weight", got \'layer\''),
        ({"max_batches": 0}, "expected max_batches to be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer_importance(stack(), [inputs(2, 5)], **options)


def test_batches_of_another_type():
    with pytest.raises(TypeError, match=r"tensors, tuples, lists or mappings, got str.*forward="):
        layer_importance(stack(), ["a sentence"])


def test_no_block_around_any_weight(caplog):
    """Each counts as the average layer, as a head beside blocks does, and that is told."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
    found = layer_importance(model, [inputs(2, 5, dtype=torch.float32)])
    assert found == {"0.weight": 1.0, "2.weight": 1.0}
    (line,) = caplog.messages
    assert "no weight is inside a block" in line
    assert "0.weight, 2.weight" in line
    assert 'per="weight" or ranks_by_energy' in line
    assert allocate_ranks(found, model, trr=0.6) == {"0.weight": 3, "2.weight": 3}


def test_parts_that_the_model_does_not_take_name_forward():
    data = torch.utils.data.TensorDataset(inputs(4, 5), torch.arange(4))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model = nn.Sequential(stack())
    for run in (layer_importance, input_subspaces):
        with pytest.raises(TypeError, match=r"what the model takes, got a list of 2.*forward="):
            run(model, loader, progress=False)
        with pytest.raises(TypeError, match=r"got a mapping of 'y', and.*forward="):
            run(model, [{"y": inputs(4, 5)}], progress=False)
        assert run(model, loader, progress=False, forward=lambda model, batch: model(batch[0]))


def test_no_similarity_above_zero():
    model = nn.Sequential(nn.Linear(5, 5, bias=False))
    model[0].weight.data.copy_(-torch.eye(5))
    with pytest.raises(
        ValueError, match=r"points along its input, got similarities of at most -1 "
    ):
        layer_importance(model, [inputs(2, 5, dtype=torch.float32)], per="weight")
