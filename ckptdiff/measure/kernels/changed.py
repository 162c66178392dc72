"""Find which coordinates of a tile changed: the first step of every kernel.

Most coordinates of an update did not change, and those add nothing to any figure of d. So a kernel gathers the codes of
those that changed and does everything about d on them alone, in loops so short and free of branches that LLVM
vectorises each; fused into one loop they would not be.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.bits import lowest_bit, population
from ckptdiff.codes.lanes import LANES, changed_lanes, load_codes, pack_lanes, packs
from ckptdiff.jit import STEP, helper, overload
from ckptdiff.measure.kernels.tiles import Array, Tile


@helper
def pack_codes(left: Array, right: Array, start: int, word: Any, tile: Tile, count: int) -> None:
    """Append the codes of a word's coordinates, of both sides of shape (1, n), to those gathered so far."""
    pack_lanes(load_codes(left, 0, start), word, tile.left, count)
    pack_lanes(load_codes(right, 0, start), word, tile.right, count)


@helper
def pick_codes(left: Array, right: Array, start: int, word: Any, tile: Tile, count: int) -> None:
    """Do as ``pack_codes``, one bit after the other.

    A loop that ends with the last set bit would end anywhere, and the processor guess wrong. So eight codes are written
    whatever there is (what is too many is overwritten by the next word), and more only where there are more.
    """
    total = population(word)
    for k in range(8):
        at = np.uint64(start) + (lowest_bit(word) & np.uint64(63))
        tile.left[count + k], tile.right[count + k] = left[0, at], right[0, at]
        word &= word - np.uint64(1)
    for k in range(8, total):
        at = np.uint64(start) + lowest_bit(word)
        tile.left[count + k], tile.right[count + k] = left[0, at], right[0, at]
        word &= word - np.uint64(1)


def append_codes(left: Array, right: Array, start: int, word: Any, tile: Tile, count: int) -> None:
    """Do as ``pack_codes``, the way that is faster on the processor."""
    raise NotImplementedError("compiled code only")


@overload(append_codes, jit_options=STEP, inline="never", strict=False)
def _append_codes(left: Any, right: Any, start: Any, word: Any, tile: Any, count: Any) -> Any:
    chosen = pack_codes if packs() else pick_codes
    return lambda left, right, start, word, tile, count: chosen(left, right, start, word, tile, count)


@helper
def find_changed(a: Array, b: Array, magnitude: Any, tile: Tile) -> int:
    """Mark codes, of shape (n,), n <= ``TILE``, that differ and are not +0 and -0, and gather them; returns how many.

    ``magnitude`` masks the magnitude bits, in the dtype of codes. Marks, and the first entries of ``left`` and
    ``right``, are written.
    """
    whole = a.size // LANES * LANES
    left, right = a[:whole].reshape(1, whole), b[:whole].reshape(1, whole)
    count = 0
    for start in range(0, whole, LANES):
        word = changed_lanes(load_codes(left, 0, start), load_codes(right, 0, start), magnitude)
        tile.marks[start // LANES] = word
        append_codes(left, right, start, word, tile, count)
        count += population(word)
    if whole < a.size:
        word = np.uint64(0)
        for i in range(whole, a.size):
            if a[i] != b[i] and (a[i] | b[i]) & magnitude != 0:
                word |= np.uint64(1) << np.uint64(i - whole)
                tile.left[count], tile.right[count] = a[i], b[i]
                count += 1
        tile.marks[whole // LANES] = word
    return count


@helper
def first_of(tile: Tile, count: int) -> Tile:
    """The work space cut to its first entries."""
    return Tile(
        tile.marks,
        tile.flags,
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
    """How many codes, shape (n,), are NaN or Inf."""
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
