"""Find the elements of a region in its tensor: which they are, where they lie, and bits of them in their place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.weights import Region

__all__ = ["Spread", "among", "holds", "read_numel", "rows_of"]

Bits: TypeAlias = NDArray[np.bool_]

_GAP = 8
"""Rows that are read although nothing in them is asked for, rather than to read twice."""


class _Lines(NamedTuple):
    """The rows of a tensor that is looked at as a matrix: few of them differ in what is in them."""

    kinds: NDArray[np.uint8]
    """Of each row."""
    columns: Bits
    """By kind, which entries of a row are in the region; shape (kinds, columns)."""
    used: Bits
    """By kind, whether there are any."""
    starts: NDArray[np.int64]
    """How many elements of the region lie before each row, and at last how many there are."""


def read_numel(region: Region) -> int:
    """How many elements the rows have that hold any of a region."""
    lines = _lines_of(region)
    return int(np.count_nonzero(lines.used[lines.kinds])) * region.shape[-1]


def holds(region: Region, first: int, stop: int) -> bool:
    """Whether elements ``first`` to ``stop`` - 1 of the tensor, which are whole rows, are all in a region of it."""
    starts, width = _lines_of(region).starts, region.shape[-1]
    held: int = starts[stop // width] - starts[first // width]
    return held == stop - first


def among(region: Region, first: int, stop: int) -> Bits:
    """Which of the elements ``first`` to ``stop`` - 1 of the tensor are in a region of it, shape (stop - first,)."""
    lines, width = _lines_of(region), region.shape[-1]
    top = first // width
    rows = lines.columns[lines.kinds[top : -(-stop // width)]].reshape(-1)
    return rows[first - top * width : stop - top * width]


def rows_of(region: Region, first: int, stop: int) -> Iterator[tuple[tuple[int, int], Bits]]:
    """Find the rows of the tensor that hold elements ``first`` to ``stop`` - 1 of a region, which may lie far apart.

    Yields consecutive rows, as (top, bottom), with which of their entries are among these, shape (rows, columns).
    """
    kinds, columns, used, starts = _lines_of(region)
    top, bottom = np.searchsorted(starts, first, "right") - 1, np.searchsorted(starts, stop, "left")
    rows = top + np.flatnonzero(used[kinds[top:bottom]])
    for some in np.split(rows, np.flatnonzero(np.diff(rows) > _GAP) + 1):
        begin, end = int(some[0]), int(some[-1]) + 1
        chosen = columns[kinds[begin:end]]
        # In the first and the last row there may be elements before and behind.
        before, behind = max(first - int(starts[begin]), 0), max(int(starts[end]) - stop, 0)
        ahead, last = np.flatnonzero(chosen[0])[:before], np.flatnonzero(chosen[-1])
        chosen[-1, last[last.size - behind :]] = False
        chosen[0, ahead] = False
        yield (begin, end), chosen


# Of a few tensors, those that threads read at a time: of all together it could be more than a run may take.
@lru_cache(maxsize=8)
def _lines_of(region: Region) -> _Lines:
    ranges = list(dict.fromkeys(box[-1] for box in region.boxes))
    kinds = np.zeros(region.shape[:-1], np.uint8)
    for *ahead, last in region.boxes:
        kinds[tuple(slice(*axis) for axis in ahead)] |= np.uint8(1 << ranges.index(last))
    columns = np.zeros((1 << len(ranges), region.shape[-1]), np.bool_)
    for place, axis in enumerate(ranges):
        columns[[kind for kind in range(len(columns)) if kind >> place & 1], slice(*axis)] = True
    kinds = kinds.reshape(-1)
    starts = np.zeros(kinds.size + 1, np.int64)
    np.cumsum(columns.sum(1)[kinds], out=starts[1:])
    return _Lines(kinds, columns, columns.sum(1) > 0, starts)


class Spread:
    """Puts bits of the elements of a region where these are in their tensor; the others are zeros.

    Parameters
    ----------
    region : Region
    block : int
        Coordinates of the tensor that are given back at a time.
    """

    def __init__(self, region: Region, block: int) -> None:
        self._region, self._block = region, block
        self._numel = math.prod(region.shape)
        self._left = np.empty(0, np.bool_)
        self._done = 0

    def take(self, bits: Bits) -> Iterator[Bits]:
        """Take the bits that follow, and yield the blocks of the tensor that are complete with them, in order."""
        self._left = np.concatenate([self._left, bits])
        while self._done < self._numel:
            chosen = among(self._region, self._done, min(self._done + self._block, self._numel))
            count = int(np.count_nonzero(chosen))
            if count > self._left.size:
                return
            spread = np.zeros_like(chosen)
            spread[chosen] = self._left[:count]
            self._left = self._left[count:]
            self._done += chosen.size
            yield spread
