"""A model of a GPU's L2: which lines of memory are read from it, and which go back to it.

Set-associative, with the least recently used line of a set as the victim. A line stored with
``evict_first`` (PTX's cache hint of that name) leaves before all others of its set.
"""

from __future__ import annotations

from collections.abc import Iterable

LINE_BYTES = 128
WAYS = 16


class Cache:
    """Lines by number; ``read_bytes`` and ``written_bytes`` are those of memory.

    Args:
        size_bytes: of the whole cache, counted as one; a GPU that keeps a copy of a line in each of
            its two halves holds as few as half as many.
        hints: whether ``evict_first`` is followed.
    """

    def __init__(self, size_bytes: int, *, ways: int = WAYS, hints: bool = True) -> None:
        self.ways, self.hints = ways, hints
        self.sets = max(1, size_bytes // (LINE_BYTES * ways))
        # Of each set, lines in the order of their last use and whether they differ from memory.
        self._lines: list[dict[int, bool]] = [{} for _ in range(self.sets)]
        self._first: list[dict[int, bool]] = [{} for _ in range(self.sets)]
        self.read_lines = self.written_lines = 0

    @property
    def read_bytes(self) -> int:
        return self.read_lines * LINE_BYTES

    @property
    def written_bytes(self) -> int:
        return self.written_lines * LINE_BYTES

    def read(self, lines: Iterable[int]) -> int:
        """Lines that are asked for; returns how many come from memory."""
        before = self.read_lines
        sets, kept, first = self.sets, self._lines, self._first
        for line in lines:
            # Neighbours lie in neighbouring sets, and lines a power of two apart don't share one.
            place = (line ^ (line // sets) * 0x9E3779B1) % sets
            mine = kept[place]
            dirty = mine.pop(line, None)
            if dirty is None:
                dirty = first[place].pop(line, None)
                if dirty is None:
                    self.read_lines += 1
                    dirty = False
                    self._make_room(place)
            mine[line] = dirty
        return self.read_lines - before

    def write(self, lines: Iterable[int], *, evict_first: bool = False) -> None:
        """Whole lines that are stored: nothing is read for them."""
        to_first = evict_first and self.hints
        for line in lines:
            place = (line ^ (line // self.sets) * 0x9E3779B1) % self.sets
            known = self._lines[place].pop(line, None) is not None
            known = self._first[place].pop(line, None) is not None or known
            if not known:
                self._make_room(place)
            (self._first if to_first else self._lines)[place][line] = True

    def _make_room(self, place: int) -> None:
        mine, first = self._lines[place], self._first[place]
        if len(mine) + len(first) >= self.ways:
            leaving = first or mine
            self.written_lines += leaving.pop(next(iter(leaving)))

    def flush(self) -> None:
        """Everything that differs from memory goes back to it."""
        for mine in (*self._lines, *self._first):
            self.written_lines += sum(mine.values())
            mine.clear()
