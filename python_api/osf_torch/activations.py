"""Running a model on batches and watching activations, for layer importance and input bases.

Nothing of the model is left changed: eval mode, hooks and random generators are put back.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from osf_torch.arguments import require_batches
from osf_torch.masks import Masks, Padding
from osf_torch.progress import Show, progress_bar
from osf_torch.selection import listed

Forward = Callable[[nn.Module, Any], object]


class Watcher(Protocol):
    """Hooks on some modules, or on torch's operators, for as long as it is entered."""

    def watching(self, padding: Padding) -> AbstractContextManager[None]: ...


def watch(
    model: nn.Module,
    batches: Iterable[Any],
    watchers: Iterable[Watcher],
    *,
    operator: str,
    title: str,
    max_batches: int | None,
    progress: Show,
    forward: Forward | None,
    masks: Masks,
) -> None:
    """Runs ``model`` on the batches, without gradients, under the watchers.

    A batch with padding runs twice, the first time for ``Padding`` alone.

    Raises:
        ValueError: no batches, ``masks`` that don't fit, a model that doesn't run with other values
            at padded places.
        TypeError: one batch for batches; a batch that is neither tensor, tuple, list nor mapping,
            or whose parts the model doesn't take, without ``forward``.
    """
    require_batches(batches, operator)
    padding = Padding(masks, operator)
    device = next(model.parameters()).device
    count = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_undisturbed(model))
        for watcher in watchers:
            stack.enter_context(watcher.watching(padding))
        for batch in _shown(batches, max_batches, title, progress):
            count += 1
            moved = _moved(batch, device)
            other = padding.probe(moved)
            failed: Exception | None = None
            if other is not None:
                with torch.random.fork_rng(devices=_generators(model)):
                    try:
                        _run(model, other, forward, operator)
                    except Exception as error:  # of the batch itself, or of the values put in
                        failed = error
                padding.run()
            _run(model, moved, forward, operator)
            if failed is not None:
                raise ValueError(
                    f"{operator}: expected the model to run with other values at padded places, by "
                    f"which padding is found, got {type(failed).__name__}: {failed}; pass "
                    "masks=None to count every token"
                ) from failed
            padding.ran()
    if not count:
        raise ValueError(f"{operator}: expected at least one batch, got none")


def activations(values: Iterable[object]) -> Iterator[Tensor]:
    """The floating-point tensors with at least two dimensions, those of containers in place."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.dim() >= 2:
                yield value
        elif isinstance(value, Mapping):
            yield from activations(value.values())
        elif isinstance(value, tuple | list):
            yield from activations(value)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, uncompiled; afterwards every flag and the random generators as they were."""
    flags = [(module, module.training) for module in model.modules()]
    # nn.TransformerEncoder's fast path packs padded batches, and hooks wouldn't see its layers.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_generators(model)))
        if "torch._dynamo" in sys.modules:  # a compiled module would run without our hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, flag in flags:
                module.training = flag


def _generators(model: nn.Module) -> set[torch.device]:
    """The devices whose generators a forward pass may draw from, beside the host's."""
    return {p.device for p in model.parameters() if p.device.type == "cuda"}


def _shown(batches: Iterable[Any], limit: int | None, title: str, show: Show) -> Iterator[Any]:
    """The first ``limit`` batches, with a bar where their number is known."""
    known = [len(batches)] if isinstance(batches, Sized) else []
    count = min([*known, *([] if limit is None else [limit])], default=None)
    show = show if count is not None else False
    with progress_bar(show, title, count or 0, count or 0) as bar:
        for batch in itertools.islice(batches, limit):
            yield batch
            bar.advance(1, 1)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value


def _run(model: nn.Module, batch: Any, forward: Forward | None, operator: str) -> None:
    if forward is not None:
        forward(model, batch)
        return
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        raise TypeError(
            f"{operator}: expected batches of tensors, tuples, lists or mappings, got "
            f"{type(batch).__name__}; pass forward= with a function of model and batch"
        )
    try:
        if isinstance(batch, Tensor):
            model(batch)
        elif isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*batch)
    except TypeError as error:
        raise TypeError(
            f"{operator}: expected batches to be what the model takes, got {_parts(batch)}, and "
            f"from the model: {error}; pass forward= with a function of model and batch, such as "
            "lambda model, batch: model(batch[0])"
        ) from error


def _parts(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping of {listed([repr(key) for key in batch])}"
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    return f"a {type(batch).__name__} of {len(batch)}"


def require_reached(missed: Sequence[str], operator: str, by: str) -> None:
    """Raises ValueError where there is a weight that no batch reached by what is named."""
    if missed:
        raise ValueError(
            f"{operator}: expected the batches to run every layer, got none that reached "
            f"{listed(missed)} by {by} with a real token; pass other batches or forward=, or call "
            f"{operator} with a filter= that leaves these out"
        )
