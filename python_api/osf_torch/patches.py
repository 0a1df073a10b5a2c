"""What a convolution's matrix is multiplied with: the patches of its input, made when asked for.

An image of 224² has 50,000 patches of a 3×3 kernel, nine times what it has itself. So they are kept
as a view of the input, padded, and only those that are drawn are ever laid out as rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 1 << 22  # elements that are laid out at once


@dataclass(frozen=True)
class Patches:
    """Rows that one group of a convolution's channels is multiplied with.

    Attributes:
        windows: (batch, channels, *places, *kernel), a view of the input.
        width: of a row of the whole side of the matrix.
        place: where in such a row the patch lies; the rest of it is zero.
        others: which rows of the matrix, of a transposed convolution which columns, read them.
        which: the rows that there are, as numbers in order of batch and places; None is all.
    """

    windows: Tensor
    width: int
    place: slice
    others: slice
    which: Tensor | None = None

    def __len__(self) -> int:
        if self.which is not None:
            return len(self.which)
        return math.prod(self._lead)

    def __getitem__(self, index: Tensor) -> Tensor:
        """(len(index), width): the rows with these numbers, in memory of their own."""
        patches = self._laid(index)
        if patches.shape[-1] == self.width:
            return patches
        rows = patches.new_zeros(len(patches), self.width)
        rows[:, self.place] = patches
        return rows

    @property
    def device(self) -> torch.device:
        return self.windows.device

    def chosen(self, which: Tensor) -> Patches:
        """Those rows of these, given by their numbers or by a mask (len,)."""
        if which.dtype == torch.bool:
            which = which.nonzero().flatten()
        return replace(self, which=which if self.which is None else self.which[which])

    def pieces(self) -> Iterator[Tensor]:
        """The patches (some, size) alone, without the zeros around them, as many at a time as take
        little memory."""
        numbers = torch.arange(len(self), device=self.device)
        for index in numbers.split(max(1, PIECE // max(1, self.size))):
            yield self._laid(index)

    @property
    def size(self) -> int:
        """Of one patch."""
        return self.windows.shape[1] * math.prod(self.windows.shape[1 + len(self._lead) :])

    @property
    def _lead(self) -> tuple[int, ...]:
        """Batch and places."""
        count = (self.windows.dim() - 2) // 2
        return (self.windows.shape[0], *self.windows.shape[2 : 2 + count])

    def _laid(self, index: Tensor) -> Tensor:
        if self.which is not None:
            index = self.which[index]
        laid = self.windows.movedim(1, len(self._lead))  # (batch, *places, channels, *kernel)
        return laid[torch.unravel_index(index, self._lead)].flatten(1)


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    rows: range,
) -> list[Patches]:
    """Of a convolution of x (batch, channels, *sizes), W x: one each of its groups.

    Row by row in the order of ``weight.flatten(1)``.

    Args:
        kernel: its sizes; of stride, padding and dilation one number may stand for all.
        rows: which of the matrix's W is made of, each (channels/groups·kh·kw,).
    """
    count = len(kernel)
    stride, padding, dilation = (_spread(given, count) for given in (stride, padding, dilation))
    if any(padding):
        x = F.pad(x, [size for size in reversed(padding) for _ in "ab"])
    for i, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, apart * (size - 1) + 1, step)[..., ::apart]
    channels = x.shape[1] // groups
    width = channels * math.prod(kernel)
    share = len(rows) // groups
    return [
        Patches(part, width, slice(None), slice(start, start + share))
        for part, start in zip(x.split(channels, 1), rows[::share], strict=True)
    ]


def places(x: Tensor, groups: int) -> list[Patches]:
    """Of a transposed convolution of x (batch, channels, *sizes), Wᵀ x: the channels at each place,
    of one group at a time.

    A group reads a part of the rows of W (channels, out/groups·kh·kw): zeros stand for the others.
    """
    channels, kernel = x.shape[1], [1] * (x.dim() - 2)
    width = channels // groups
    windows = x.reshape(*x.shape, *kernel)
    return [
        Patches(part, channels, slice(i * width, (i + 1) * width), slice(None))
        for i, part in enumerate(windows.split(width, 1))
    ]


def _spread(given: Sequence[int], count: int) -> list[int]:
    return list(given) * count if len(given) == 1 else list(given)
