"""Find which coordinates of a tile changed: the first step of every kernel.

Most coordinates of an update did not change, and those add nothing to any figure of d. So a kernel gathers the codes of
those that changed and does everything about d on them alone, in loops so short and free of branches that LLVM
vectorises each; fused into one loop they would not be.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.bits import population
from ckptdiff.codes.lanes import LANES, changed_lanes, load_codes, pack_lanes, packs
from ckptdiff.codes.positions import EIGHT, put_positions, take_eight
from ckptdiff.jit import STEP, helper, overload
from ckptdiff.measure.kernels.tiles import Array, Tile


@helper
def rows_of(a: Array, b: Array) -> tuple[Array, Array]:
    """Codes that make whole words of marks, of both sides, as rows of 64."""
    whole = a.size // LANES
    return a[: whole * LANES].reshape(whole, LANES), b[: whole * LANES].reshape(whole, LANES)


@helper
def mark_word(left: Array, right: Array, j: int, magnitude: Any) -> Any:
    """Word ``j`` of the marks of rows of codes."""
    return changed_lanes(load_codes(left, j, 0), load_codes(right, j, 0), magnitude)


@helper
def mark_rest(a: Array, b: Array, magnitude: Any, tile: Tile) -> None:
    """Mark what is left over behind the last 64 codes."""
    whole = a.size // LANES * LANES
    if whole < a.size:
        word = np.uint64(0)
        for i in range(whole, a.size):
            if a[i] != b[i] and (a[i] | b[i]) & magnitude != 0:
                word |= np.uint64(1) << np.uint64(i - whole)
        tile.marks[whole // LANES] = word


@helper
def mark_changed(a: Array, b: Array, magnitude: Any, tile: Tile) -> None:
    """Mark codes, of shape (n,), n <= ``TILE``, that differ and are not +0 and -0.

    ``magnitude`` masks the magnitude bits, in the dtype of codes.
    """
    left, right = rows_of(a, b)
    for j in range(len(left)):
        tile.marks[j] = mark_word(left, right, j, magnitude)
    mark_rest(a, b, magnitude, tile)


@helper
def pack_rows(left: Array, right: Array, tile: Tile) -> int:
    """Gather the marked codes of rows by instructions made for it; returns how many."""
    count = 0
    for j in range(len(left)):
        pack_lanes(load_codes(left, j, 0), tile.marks[j], tile.left, count)
        pack_lanes(load_codes(right, j, 0), tile.marks[j], tile.right, count)
        count += population(tile.marks[j])
    return count


@helper
def take_marked(a: Array, b: Array, tile: Tile, row: int, count: int) -> int:
    """Gather marked codes, of shape (n,), from a row of 64 on by their positions, behind the first ``count``.

    Returns how many there are then.
    """
    j = count
    for k in range(row, (a.size + LANES - 1) // LANES):
        count = put_positions(tile.marks[k], k * LANES, tile.found, count)
    while j + EIGHT <= count:
        take_eight(a, b, tile.found, tile.left, tile.right, j)
        j += EIGHT
    while j < count:
        tile.left[j], tile.right[j] = a[tile.found[j]], b[tile.found[j]]
        j += 1
    return count


@helper
def gather_packed(a: Array, b: Array, tile: Tile) -> int:
    """Do as ``gather_marked``, whole rows by instructions made for it."""
    left, right = rows_of(a, b)
    return take_marked(a, b, tile, len(left), pack_rows(left, right, tile))


@helper
def gather_taken(a: Array, b: Array, tile: Tile) -> int:
    """Do as ``gather_marked``, by positions alone, which ``tile.found`` holds then."""
    return take_marked(a, b, tile, 0, 0)


def gather_marked(a: Array, b: Array, tile: Tile) -> int:
    """Gather marked codes, of shape (n,), into the first entries of ``left`` and ``right``; returns how many.

    The way that is faster on the processor.
    """
    raise NotImplementedError("compiled code only")


@overload(gather_marked, jit_options=STEP, inline="never", strict=False)
def _gather_marked(a: Any, b: Any, tile: Any) -> Any:
    chosen = gather_packed if packs() else gather_taken
    return lambda a, b, tile: chosen(a, b, tile)


@helper
def find_changed(a: Array, b: Array, magnitude: Any, tile: Tile) -> int:
    """Do as ``mark_changed``, then as ``gather_marked``."""
    mark_changed(a, b, magnitude, tile)
    return gather_marked(a, b, tile)


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
