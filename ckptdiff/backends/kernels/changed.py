"""Which coordinates of a tile changed: the first steps of every kernel.

Most coordinates of an update did not change, and those add nothing to any figure of d. So a kernel marks what changed,
gathers the changed coordinates, and does everything about d on those alone. Each loop here is short and branch-free so
that LLVM vectorises it; fused into one loop they would not be.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.backends.kernel_cache import helper
from ckptdiff.backends.kernels.bits import lowest_bit, pack64, population
from ckptdiff.backends.kernels.tiles import Array, Tile

__all__ = ["count_nonfinite", "count_strange", "first_of", "keep_finite", "mark_changed", "positions"]


@helper
def mark_changed(a: Array, b: Array, magnitude: Any, marks: Array) -> None:
    """Mark codes that differ and are not +0 and -0; clear the marks after the end up to a multiple of 64."""
    n = a.size
    for i in range(n):
        marks[i] = ((a[i] ^ b[i]) != 0) & (((a[i] | b[i]) & magnitude) != 0)
    for i in range(n, (n + 63) // 64 * 64):
        marks[i] = 0


@helper
def positions(marks: Array, n: int, found: Array) -> int:
    """Write the positions of set marks in ascending order; returns how many there are.

    A loop that ends with the last set bit would end anywhere, and the processor guess wrong. So eight positions are
    written whatever there is (what is too many is overwritten by the next word), and more only where there are more.
    """
    count = 0
    for j in range((n + 63) // 64):
        word = pack64(marks, j * 64)
        total = population(word)
        for k in range(8):
            found[count + k] = np.uint16(np.uint64(j * 64) + lowest_bit(word))
            word &= word - np.uint64(1)
        if total > 8:
            for k in range(8, total):
                found[count + k] = np.uint16(np.uint64(j * 64) + lowest_bit(word))
                word &= word - np.uint64(1)
        count += total
    return count


@helper
def first_of(tile: Tile, count: int) -> Tile:
    """The work space cut to its first entries."""
    return Tile(
        tile.marks,
        tile.found[:count],
        tile.left[:count],
        tile.right[:count],
        tile.base[:count],
        tile.tuned[:count],
        tile.delta[:count],
        tile.distance[:count],
        tile.ulp,
    )


@helper
def count_nonfinite(codes: Array, magnitude: Any, infinite: Any) -> Any:
    """How many codes are NaN or Inf."""
    count: Any = np.int32(0)
    for i in range(codes.size):
        count = np.int32(count + ((codes[i] & magnitude) >= infinite))
    return count


@helper
def count_strange(delta: Array) -> Any:
    """How many d are NaN or Inf."""
    strange: Any = np.int32(0)
    for j in range(delta.size):
        strange = np.int32(strange + (not abs(delta[j]) < np.inf))
    return strange


@helper
def keep_finite(tile: Tile) -> int:
    """Move the entries with finite d to the front; returns how many there are."""
    kept = 0
    for j in range(tile.delta.size):
        if abs(tile.delta[j]) < np.inf:
            tile.found[kept], tile.left[kept], tile.right[kept] = tile.found[j], tile.left[j], tile.right[j]
            tile.base[kept], tile.tuned[kept], tile.delta[kept] = tile.base[j], tile.tuned[j], tile.delta[j]
            kept += 1
    return kept
