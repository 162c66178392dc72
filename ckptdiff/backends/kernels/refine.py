"""Kernels of the further passes: the bits below a bin, where a cut falls inside it.

A first scan leaves each cut (the k-th largest |d|, the k-th smallest |W0|) inside one bin of 15 leading bits. If the
values of that bin differ, a further pass counts the next 16 bits of those that share its leading bits, and so on until
every bit of the cut is known.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ckptdiff.backends.kernel_cache import kernel
from ckptdiff.backends.kernels.bits import float_bits
from ckptdiff.backends.kernels.tiles import (
    TILE,
    Array,
    Tile,
    count_within,
    first_of,
    keep_finite,
    mark_changed,
    positions,
)

__all__ = ["Found", "Search", "refine"]


class Search(NamedTuple):
    """The arrays of :class:`~ckptdiff.backends.partial.Targets`."""

    shift: Any
    deltas: Array
    weights: Array
    thresholds: Array
    tails: Array


class Found(NamedTuple):
    """The arrays of a :class:`~ckptdiff.backends.partial.Refined`, with the tails of one block."""

    deltas: Array
    weights: Array
    within: Array
    tails: Array


@kernel
def refine(
    codes: tuple[Array, Array],
    values: tuple[Array, Array],
    limits: tuple[Any, Any],
    lookup: bool,
    tile: Tile,
    search: Search,
    found: Found,
) -> None:
    """Pass over one piece of codes.

    Parameters
    ----------
    codes : pair of read-only unsigned array, shape (n,)
    values : pair of read-only float array
        Values of the codes: a table (``lookup``), or the memory of the codes as floats.
    limits : (magnitude mask of a code, magnitude mask of d)
    lookup : bool
        Whether ``values`` are tables.
    tile : Tile
    search : Search
    found : Found
        Added to.
    """
    for start in range(0, codes[0].size, TILE):
        a, b = codes[0][start : start + TILE], codes[1][start : start + TILE]
        mark_changed(a, b, limits[0], tile.marks)
        for r in range(search.weights.size):
            for i in range(a.size):
                size = np.uint64(a[i] & limits[0])
                if size >> search.shift == search.weights[r]:
                    next_bits = (size >> (search.shift - np.uint64(16))) & np.uint64(0xFFFF)
                    found.weights[r, 0, next_bits] += 1
                    found.weights[r, 1, next_bits] += tile.marks[i]
        some = first_of(tile, positions(tile.marks, a.size, tile.found))
        for j in range(some.found.size):
            at = some.found[j]
            x, y = (np.int64(a[at]), np.int64(b[at])) if lookup else (start + at, start + at)
            some.base[j], some.tuned[j] = values[0][x], values[1][y]
            some.delta[j] = some.tuned[j] - some.base[j]
        some = first_of(tile, keep_finite(some))
        for r in range(search.deltas.size):
            for j in range(some.delta.size):
                size = np.uint64(float_bits(some.delta[j]) & limits[1])
                if size >> search.shift == search.deltas[r]:
                    found.deltas[r, (size >> (search.shift - np.uint64(16))) & np.uint64(0xFFFF)] += 1
        for t in range(search.thresholds.size):
            found.within[t] += count_within(some.delta, search.thresholds[t])
        for t in range(search.tails.size):
            for j in range(some.delta.size):
                if abs(some.delta[j]) > search.tails[t]:
                    found.tails[t] += np.float64(some.delta[j]) ** 2
