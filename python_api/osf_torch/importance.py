"""layer_importance: how much of its input's direction each layer hands on, on real activations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osf_torch.activations import Forward, activations, require_reached, watch
from osf_torch.arguments import require_count, require_forward, require_show
from osf_torch.coverage import log
from osf_torch.masks import Masks, Padding
from osf_torch.progress import Show
from osf_torch.reads import SEEN, Reads, Rows, Side
from osf_torch.scalars import read
from osf_torch.selection import Filter, Selected, listed, select

Per = Literal["block", "weight"]

OP = "osf_torch.layer_importance"


def layer_importance(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    filter: Filter = None,
    per: Per = "block",
    max_batches: int | None = None,
    progress: Show = True,
    forward: Forward | None = None,
    masks: Masks = "auto",
) -> dict[str, float]:
    """I = s / mean(s), s = max(0, token mean of cos(x, y)): what :func:`allocate_ranks` takes.

    x (d,) and y (d,) are a token's input and output of a layer. The token mean runs over all
    batches and all calls of a module, so that a longer batch counts for more.

    A similarity below zero counts as zero. The paper divides by the mean of the signed figures,
    which blows up where they cancel and turns the order round where their mean is negative; where
    none is negative the two are the same.

    Args:
        model: run in eval mode without gradients; a compiled one runs uncompiled.
        batches: tensors (``model(batch)``), tuples or lists (``model(*batch)``) or mappings
            (``model(**batch)``), as a data loader gives; moved to the device of the model's first
            parameter. Where a mapping has an ``attention_mask`` (batch, length) that is zero for
            padding, ``masks`` says what is left out.
        filter: which weights, as in ``refresh``.
        per: what a layer is.
            "block": the transformer layer (residual block) that the weight is in, so that its
            weights share one figure and x and y are as wide whatever the weight's shape is. A
            block is a module in an nn.ModuleList or nn.Sequential which is alone there or has a
            sibling of its class, and which returns a tensor of the shape of one that it takes;
            of several around a weight the outermost. A weight outside any of them (a pooler, a
            head) counts as the average layer, I = 1; where all are outside, that is logged.
            "weight": the weight itself, y = W x without the bias, of experts over the tokens
            routed to each, of a convolution over its patches x, each group's with its rows of
            the (out, in/groups·kh·kw) matrix (of a transposed one y = Wᵀ x over places x). Where
            W isn't square the first min(m, n) coordinates of x and y are compared, as the authors'
            code does; the paper is silent. On trained encoders these figures are small and of both
            signs (on all six layers of MiniLM within ±.04, with a mean of -.001), so that they rank
            weights by little more than chance, where the blocks' lie between .60 and .89.
        max_batches: only the first so many.
        progress: as in ``refresh``; without ``max_batches`` shown only where ``batches`` has a
            length.
        forward: called as ``forward(model, batch)`` in place of the calls above, with the batch
            moved to the device.
        masks: from the key of a mask in the batches, zero for padding, to the key of the sequence
            whose tokens it tells from padding. "auto" takes ``attention_mask`` for ``input_ids``
            or ``inputs_embeds``, else for the one tensor as long, and ``decoder_attention_mask``
            for ``decoder_input_ids``; where that can't be told, padding is counted and that is
            logged. None counts every token. A batch with padding runs twice, first with other
            values at padded places: activations (batch, length, d), (length, batch, d) or
            (batch·length, d) that change there and nowhere else are left without padding, and
            every other one (a decoder's, an image's, pooled ones) is counted in full. Where no
            activation of a mask's size is left without its padding, that is logged. Of the tokens
            routed to experts those count that the expert reads both times, where they are as many
            as the real tokens, and else all.

    Returns:
        Parameter names as in ``refresh``, in the model's order, to importances that are at least
        zero and 1 in the mean.

    Raises:
        ValueError: nothing matches, no batches, a weight whose layer was never reached (with
            per="weight" one of which no product was seen, as ``input_subspaces`` sees them), NaN or
            Inf in a layer's activations (the first layer that ran with one is named), no
            similarity above zero, ``masks`` that don't fit.
        TypeError: max_batches, progress or forward of another type; one batch in the place of
            batches; a batch of another type; a weight that ``refresh`` doesn't take.

    Changes neither the model (hooks are removed and every module's ``training`` is put back, on
    errors too) nor the state of torch's random generators, from which a shuffling data loader
    draws. Synchronises once, at the end.

    Source: Nayak et al. 2025, "Sculpting Subspaces" (arXiv 2504.07097), layer importance by
    input-output similarity, after AdaSVD (Li et al. 2025, arXiv 2502.01403), section 3.2.
    """
    if per not in ("block", "weight"):
        raise ValueError(f'{OP}: expected per to be "block" or "weight", got {per!r}')
    if max_batches is not None:
        require_count("max_batches", max_batches, OP)
    require_show(progress, OP)
    require_forward(forward, OP)
    selected = select(model, 1, filter, operator="layer_importance")
    weights = {s.name: s.weight for s in selected}
    blocks = _blocks(model) if per == "block" else {}
    products = {s.name: _Product(s) for s in selected if per == "weight"}
    watch(
        model,
        batches,
        [*blocks.values(), *([Reads(model, weights, products, OP)] if products else [])],
        operator=OP,
        title="importance",
        max_batches=max_batches,
        progress=progress,
        forward=forward,
        masks=masks,
    )
    similarities = _similarities({**blocks, **products})
    if per == "block":
        found = _by_block(model, selected, blocks, similarities)
    else:
        found = _by_weight(selected, similarities)
    return _normalised(found, selected, per)


class _Meter:
    """Sums cos(x, y) over tokens."""

    order = itertools.count()  # of first calls, over all meters: who saw a NaN first

    def __init__(self) -> None:
        self.first = 0
        self.sum: Tensor | None = None  # of cosines, float64
        self.tokens = 0

    def sum_up(self, x: Tensor, y: Tensor) -> None:
        """x (tokens, d) and y (tokens, d)."""
        total = (_unit(x) * _unit(y)).sum(-1).sum(dtype=torch.float64)
        if self.sum is None:
            self.first = next(self.order)
            self.sum = total
        else:
            self.sum = self.sum + total.to(self.sum.device)
        self.tokens += len(x)


class _Block(_Meter):
    """x is the first argument of the output's shape, as it was before a call of the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.called = False

    @contextmanager
    def watching(self, padding: Padding) -> Iterator[None]:
        pending: list[list[Tensor]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Copies, since a block may add its residual to its argument in place.
            pending.append([x.clone() for x in activations((*args, *kwargs.values()))])

        def after(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            taken = pending.pop()
            self.called = True
            y = next(iter(activations([output])), None)
            if y is None:
                return
            x = next((x for x in taken if x.shape == y.shape), None)
            if x is not None:
                self.sum_up(*padding.rows(self, x, y))

        # Prepended: before hooks of others, which may replace the output.
        with (
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after, with_kwargs=True, prepend=True),
        ):
            yield


class _Product(_Meter):
    """y = W x of each matrix of a weight, on the first min(m, n) coordinates."""

    def __init__(self, s: Selected) -> None:
        super().__init__()
        self.matrices = s.weight.detach().reshape(-1, *s.shape)

    def add(self, side: Side, matrix: int, rows: Rows) -> None:
        """``rows`` (tokens, n) for W x by V's side; by U's they are (tokens, m), for Wᵀ x. Of a
        group of a convolution's channels that is of what the group has of W."""
        W = self.matrices[matrix] if side == "V" else self.matrices[matrix].mT
        if isinstance(rows, Tensor):
            self._multiply(W, rows)
            return
        for patches in rows.pieces():
            self._multiply(W[rows.others, rows.place], patches)

    def _multiply(self, W: Tensor, rows: Tensor) -> None:
        width = min(W.shape)
        wide = torch.promote_types(torch.promote_types(W.dtype, rows.dtype), torch.float32)
        self.sum_up(rows[:, :width], rows.to(wide) @ W[:width].to(wide).mT)


def _blocks(model: nn.Module) -> dict[str, _Block]:
    """Meters of what may be a block, by module name, outer modules before inner ones."""
    alike: set[int] = set()
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            members = list(container)
            kinds = [type(member) for member in members]
            alike.update(id(m) for m in members if len(members) == 1 or kinds.count(type(m)) > 1)
    return {
        name: _Block(module)
        for name, module in model.named_modules()
        if id(module) in alike and any(True for _ in module.children())
    }


def _unit(x: Tensor) -> Tensor:
    """x / ‖x‖ along the last dimension, with no overflow on the way; zero stays zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(-1, keepdim=True).clamp_min(tiny)
    return F.normalize(x, dim=-1, eps=tiny)


def _similarities(meters: Mapping[str, _Meter]) -> dict[str, float]:
    """The mean of each meter that saw tokens, by one synchronisation a device."""
    seen = [(name, m.sum, m.tokens) for name, m in meters.items() if m.sum is not None and m.tokens]
    values = read([total for _, total, _ in seen])
    means = {name: value / n for (name, _, n), value in zip(seen, values, strict=True)}
    bad = [name for name, mean in means.items() if not math.isfinite(mean)]
    if bad:
        first = min(bad, key=lambda name: meters[name].first)
        raise ValueError(
            f"{OP}: expected finite activations, got NaN or Inf first in {first!r}, and in "
            f"{len(bad)} of {len(meters)} layers; look at that layer's weights and inputs"
        )
    return means


def _by_block(
    model: nn.Module,
    selected: Sequence[Selected],
    meters: Mapping[str, _Block],
    similarities: Mapping[str, float],
) -> dict[str, float | None]:
    """Each weight's similarity: of the outermost blocks around it; None outside of all."""
    around: dict[int, list[str]] = {}
    for name, meter in meters.items():
        for parameter in meter.module.parameters():
            around.setdefault(id(parameter), []).append(name)
    found: dict[str, float | None] = {}
    missed = []
    for s in selected:
        names = around.get(id(s.weight), [])
        measured = [name for name in names if name in similarities]
        outermost = [
            name for name in measured if not any(name.startswith(f"{o}.") for o in measured)
        ]
        tokens = sum(meters[name].tokens for name in outermost)
        if outermost:
            total = sum(similarities[name] * meters[name].tokens for name in outermost)
            found[s.name] = total / tokens
        else:
            found[s.name] = None
            if names and not any(meters[name].called for name in names):
                missed.append(s.name)
    require_reached(missed, OP, "a call of its block")
    return found


def _by_weight(
    selected: Sequence[Selected], similarities: Mapping[str, float]
) -> dict[str, float | None]:
    require_reached([s.name for s in selected if s.name not in similarities], OP, SEEN)
    return {s.name: similarities[s.name] for s in selected}


def _normalised(
    found: Mapping[str, float | None], selected: Sequence[Selected], per: Per
) -> dict[str, float]:
    known = [max(0.0, s) for s in found.values() if s is not None]
    if not known:
        log.warning(
            "%s: no weight is inside a block, a module of an nn.ModuleList or nn.Sequential that "
            "returns the shape it takes, so that each counts as the average layer, I = 1: %s; "
            'per="weight" or ranks_by_energy tells them apart',
            OP,
            listed([s.name for s in selected]),
        )
        return dict.fromkeys(found, 1.0)
    mean = math.fsum(known) / len(known)
    if mean == 0.0:
        raise ValueError(
            f"{OP}: expected a layer whose output points along its input, got similarities of at "
            f"most {max(s for s in found.values() if s is not None):.3g} with per={per!r}; use "
            "ranks_by_energy or fixed ranks"
        )
    return {name: 1.0 if s is None else max(0.0, s) / mean for name, s in found.items()}
