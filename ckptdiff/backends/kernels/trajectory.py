"""A base and any number of later checkpoints, piece by piece: which coordinates left the base, came back, moved on.

A piece of the base stays in the cache while the same piece of one checkpoint after the other passes by, so that each is
read once and nothing is kept between pieces but two bits per coordinate.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from ckptdiff.backends.kernel_cache import helper, kernel, reducer
from ckptdiff.backends.kernels.bits import bits_float, changed64, population
from ckptdiff.backends.kernels.fetch import Side, fetch
from ckptdiff.backends.kernels.stored import Cast, decode
from ckptdiff.backends.kernels.tiles import Array
from ckptdiff.backends.partial import BLOCK

__all__ = ["PIECE", "Flow", "Rooms", "follow_span"]

PIECE = 1 << 17
"""Coordinates at a time: three pieces of bfloat16 fit into a second-level cache."""
TILE = 1 << 12
"""Coordinates that are counted and then summed: they stay in the first-level cache in between."""
PART = 1 << 10
"""Coordinates whose squares are summed in float32 before they are added in float64."""

NO_CAST = int(Cast.NONE)
TINY = 1e-30


class Flow(IntEnum):
    """Index of each counter of a step."""

    SUPPORT = 0
    """Coordinates that differ from the base."""
    TOUCHED = 1
    """Those of them that never did before."""
    REVERTED = 2
    """Coordinates that differed one step ago and are back at the base."""
    CHURNED = 3
    """Coordinates that differed one step ago, still do, and have another value now."""


SUPPORT, TOUCHED, REVERTED, CHURNED = (int(flow) for flow in Flow)


class Rooms(NamedTuple):
    """Work space of one thread."""

    raw: Array
    """Stored bytes that are to be cast."""
    bytes: tuple[Array, Array, Array]
    """Codes of base, last step and this step, as read-only bytes."""
    codes: tuple[Array, Array, Array]
    """The same memory, to be written."""
    words: tuple[Array, Array]
    """Bits of a piece: in the support one step ago; in any support so far."""


@helper
def value16(code: Any, values: Array) -> Any:
    """Value of a 16-bit code: of bfloat16, or by table."""
    return bits_float(np.uint32(np.uint32(code) << np.uint32(16))) if values.size == 0 else values[code]


@helper
def value_wide(code: Any, values: Array) -> Any:
    """Value of a code of float32 or float64."""
    return bits_float(code)


def value_of(code: Any, values: Array) -> Any:
    """Value of a code."""
    raise NotImplementedError("compiled code only")


@overload(value_of, jit_options={"nogil": True}, inline="never", strict=False)
def _value_of(code: Any, values: Any) -> Any:
    chosen = value16 if code == types.uint16 else value_wide
    return lambda code, values: chosen(code, values)


@reducer
def squares_bf16(base: Array, codes: Array) -> Any:
    """Sum of squared differences of bfloat16 codes, in float32."""
    total = np.float32(0)
    for i in range(base.size):
        left = bits_float(np.uint32(np.uint32(base[i]) << np.uint32(16)))
        delta = bits_float(np.uint32(np.uint32(codes[i]) << np.uint32(16))) - left
        total += delta * delta
    return total


@helper
def exact_squares(base: Array, codes: Array, values: Array) -> float:
    """Sum of squared finite differences, in float64."""
    total = 0.0
    for i in range(base.size):
        delta = np.float64(value_of(codes[i], values)) - np.float64(value_of(base[i], values))
        if abs(delta) < np.inf:
            total += delta * delta
    return total


@helper
def sum_squares(base: Array, codes: Array, values: Array) -> float:
    """Sum of squared finite differences of a piece."""
    if base.itemsize > 2 or values.size:
        return exact_squares(base, codes, values)
    total = 0.0
    for start in range(0, base.size, PART):
        left, right = base[start : start + PART], codes[start : start + PART]
        part = np.float64(squares_bf16(left, right))
        # Overflow, NaN and what float32 cannot hold: rare, and worth a second look.
        total += part if TINY < part < np.inf or part == 0 else exact_squares(left, right, values)
    return total


@reducer
def sum_base(base: Array, values: Array) -> float:
    """Sum of squares of finite values, in float64."""
    total = 0.0
    for i in range(base.size):
        value = np.float64(value_of(base[i], values))
        total += value * value if abs(value) < np.inf else 0.0
    return total


@helper
def count_flow(
    base: Array, last: Array, codes: Array, magnitude: Any, words: tuple[Array, Array], counts: Array
) -> None:
    """Add a piece to the counters of a step, and bring its bits up to date."""
    before, ever = words
    n = codes.size
    support, touched, reverted, churned = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    for j in range((n + 63) // 64):
        now, moved = changed64(base, codes, j * 64, magnitude), changed64(last, codes, j * 64, magnitude)
        if n - j * 64 < 64:  # what is left in the room after the last coordinate
            now &= (np.uint64(1) << np.uint64(n - j * 64)) - np.uint64(1)
        earlier, so_far = before[j], ever[j]
        support += population(now)
        touched += population(now & ~so_far)
        reverted += population(earlier & ~now)
        churned += population(moved & now & earlier)
        before[j], ever[j] = now, so_far | now
    counts[SUPPORT] += support
    counts[TOUCHED] += touched
    counts[REVERTED] += reverted
    counts[CHURNED] += churned


@helper
def read_codes(side: int, slot: int, first: int, stop: int, files: Array, tables: Array, rooms: Rooms) -> Array:
    """Codes of a piece of one checkpoint; fewer if it could not be read."""
    descriptor, offset, itemsize, cast = files[side, 0], files[side, 1], files[side, 2], files[side, 3]
    codes = rooms.codes[slot]
    if cast == NO_CAST:
        return fetch(Side(descriptor, offset, 0, rooms.bytes[slot], itemsize), first, stop).view(codes.dtype)
    raw = fetch(Side(descriptor, offset, 0, rooms.raw, itemsize), first, stop)
    n = raw.size // itemsize
    decode(raw[: n * itemsize], cast, itemsize, tables[side], codes[:n])
    return rooms.bytes[slot][: n * codes.itemsize].view(codes.dtype)


@kernel
def follow_span(
    files: Array,
    tables: Array,
    values: Array,
    magnitude: Any,
    extent: tuple[int, int],
    rooms: Rooms,
    counts: Array,
    sums: Array,
) -> int:
    """Follow a span of blocks of one tensor through all checkpoints.

    Parameters
    ----------
    files : int64 array, shape (1 + steps, 4)
        Of the base and of each step: descriptor, offset of coordinate 0 in the file, bytes of an element, and how it
        becomes a code of the compare format (:class:`~ckptdiff.backends.kernels.stored.Cast`).
    tables : array of codes, shape (1 + steps, 0 or 65536)
        For ``Cast.TABLE``.
    values : float32 array
        Value of each code; empty for bfloat16, float32 and float64.
    magnitude : unsigned
        Mask of the magnitude bits, in the dtype of codes.
    extent : (int, int)
        First coordinate, a multiple of ``BLOCK``, and where to stop.
    rooms : Rooms
    counts : int64 array, shape (steps, 4)
        Added to; columns are those of :class:`Flow`.
    sums : float64 array, shape (1 + steps, blocks)
        Added to: sum of W0^2, then of (W - W0)^2 at each step, by block of the span.

    Returns
    -------
    int
        How far it came: less than all if a piece could not be read.
    """
    for first in range(extent[0], extent[1], PIECE):
        stop, block = min(first + PIECE, extent[1]), (first - extent[0]) // BLOCK
        n = stop - first
        base = read_codes(0, 0, first, stop, files, tables, rooms)
        if base.size < n:
            return first
        sums[0, block] += sum_base(base, values)
        last = base
        for bits in rooms.words:
            bits[: (n + 63) // 64] = 0
        for step in range(1, files.shape[0]):
            codes = read_codes(step, 1 + step % 2, first, stop, files, tables, rooms)
            if codes.size < n:
                return first
            for start in range(0, n, TILE):
                end = min(start + TILE, n)
                left, right = base[start:end], codes[start:end]
                words = rooms.words[0][start // 64 :], rooms.words[1][start // 64 :]
                count_flow(left, last[start:end], right, magnitude, words, counts[step - 1])
                sums[step, block] += sum_squares(left, right, values)
            last = codes
    return extent[1]
