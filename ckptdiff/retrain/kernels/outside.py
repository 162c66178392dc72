"""Keep what lies outside masks, sixty-four codes at a time: bits as they are, whatever they mean.

It is read before a step, and read and written after it, at the speed of memory. So a unit is taken in several places at
a time, which the processor fetches side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.fetch import memory_at
from ckptdiff.codes.lanes import LANES, chosen, codes_at, differing, mixed, no_codes, put_codes
from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.tiles import Array
from ckptdiff.retrain.kernels.shared_work import next_unit, table_of

__all__ = ["OUTSIDE", "UNIT", "prepare", "restore"]

OUTSIDE = table_of("values", "gradients", "kept", "sums", "inside", "numel")
"""Addresses of codes of a parameter and of its gradient (0: none), of a copy of the former, of one uint64 for each
unit, and of a mask of ceil(numel / 64) words; and how many codes there are."""
UNIT = 1 << 19
"""Coordinates of a unit of work."""
_PLACES = 4
_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_ODD = np.uint64(0x9E37_79B9_7F4A_7C15)


@kernel
def prepare(rows: Array, like: Array, counter: Array) -> None:
    """Before a step: set gradients outside masks to zero, and keep values, where they are not those kept before.

    Parameters
    ----------
    rows : array of `OUTSIDE`
    like : array of unsigned integers as wide as the codes, shape (0,)
    counter : int64 array, shape (1,)
        Zero at first, and shared by all threads that make this call.
    """
    size, mixes = like.itemsize, np.empty(LANES, like.dtype)
    row, unit = next_unit(rows, 0, counter)
    while row < rows.size:
        at = rows[row]
        first, numel, words = words_of(at, unit)
        if at.gradients:
            copy_unit(at.gradients + first * size, 0, numel, words, like)
        if at.values:
            sums = memory_at(at.sums, unit + 1, words)
            values, kept = at.values + first * size, at.kept + first * size
            total = checksum(values, numel, words, mixes, like)
            if sums[unit] != total:
                memory_at(kept, numel, like)[:] = memory_at(values, numel, like)
                sums[unit] = total
        row, unit = next_unit(rows, row, counter)


@kernel
def restore(rows: Array, like: Array, counter: Array) -> None:
    """After a step: make values outside masks what was kept of them; shapes are those of :func:`prepare`."""
    size = like.itemsize
    row, unit = next_unit(rows, 0, counter)
    while row < rows.size:
        at = rows[row]
        first, numel, words = words_of(at, unit)
        copy_unit(at.values + first * size, at.kept + first * size, numel, words, like)
        row, unit = next_unit(rows, row, counter)


@helper
def words_of(at: Any, unit: int) -> tuple[int, int, Array]:
    """Where a unit of a row begins, how many codes it has, and its mask."""
    first = unit * UNIT
    numel = min(UNIT, at.numel - first)
    return first, numel, memory_at(at.inside + first // 8, -(-numel // LANES), np.empty(0, np.uint64))


@helper
def is_inside(words: Array, j: int) -> Any:
    """Bit j of a mask."""
    return words[j // LANES] >> np.uint64(j % LANES) & np.uint64(1)


@helper
def copy_lanes(values: int, kept: int, word: Any, like: Array) -> None:
    """Make some of sixty-four codes others, or zero without an address: those whose bit in a word is not set."""
    now = codes_at(values, like)
    then = codes_at(kept, like) if kept else no_codes(now)
    if differing(now, then) & ~word:
        put_codes(values, chosen(word, now, then))


@helper
def copy_unit(values: int, kept: int, numel: int, words: Array, like: Array) -> None:
    """Make codes outside a mask others, or zero without an address; nothing is written where nothing differs."""
    size, apart, whole = like.itemsize, numel // (_PLACES * LANES) * LANES, numel // LANES * LANES
    for start in range(0, apart, LANES):
        for place in range(_PLACES):
            at = start + place * apart
            if words[at // LANES] != _ALL:
                copy_lanes(values + at * size, kept + at * size if kept else 0, words[at // LANES], like)
    for at in range(_PLACES * apart, whole, LANES):
        copy_lanes(values + at * size, kept + at * size if kept else 0, words[at // LANES], like)
    rest, others = memory_at(values, numel, like), memory_at(kept, numel if kept else 0, like)
    for j in range(whole, numel):
        if not is_inside(words, j):
            rest[j] = 0
            if kept:
                rest[j] = others[j]


@helper
def checksum(values: int, numel: int, words: Array, mixes: Array, like: Array) -> Any:
    """Of the codes outside a mask: 64 bits, 0 if all of them are zero. `mixes` is room for `LANES` codes."""
    size, apart, whole = like.itemsize, numel // (_PLACES * LANES) * LANES, numel // LANES * LANES
    zeros = no_codes(codes_at(mixes.ctypes.data, like))
    mix = zeros
    for start in range(0, apart, LANES):
        for place in range(_PLACES):
            at = start + place * apart
            mix = mixed(mix, chosen(words[at // LANES], zeros, codes_at(values + at * size, like)))
    for at in range(_PLACES * apart, whole, LANES):
        mix = mixed(mix, chosen(words[at // LANES], zeros, codes_at(values + at * size, like)))
    put_codes(mixes.ctypes.data, mix)
    total = np.uint64(0)
    for j in range(LANES):
        total = folded(total, mixes[j])
    rest = memory_at(values, numel, like)
    for j in range(whole, numel):
        if not is_inside(words, j):
            total = folded(total, rest[j])
    return total


@helper
def folded(total: Any, code: Any) -> Any:
    """A checksum of a code and of what was folded before; of zeros zero, like ``mixed``."""
    product = np.uint64((total ^ np.uint64(code)) * _ODD)
    return product ^ product >> np.uint64(32)
