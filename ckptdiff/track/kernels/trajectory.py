"""Compare a base with later checkpoints, piece by piece: which coordinates left the base, came back, moved on.

The same piece of all checkpoints is read into the cache, then one pass over it takes sixty-four coordinates at a time
through all steps: each code is loaded into a register once, and nothing is kept between pieces but counts and sums.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from ckptdiff.codes.bfloat16 import bf16_to_f32
from ckptdiff.codes.bits import bits_float, population
from ckptdiff.codes.fetch import FILE, MEMORY, Side, fetch
from ckptdiff.codes.lanes import (
    LANES,
    SUMS,
    add_squares,
    aligned,
    any_lowest,
    differing,
    load_codes,
    lower,
    no_codes,
    positive_zeros,
)
from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.stored import Cast, decode
from ckptdiff.measure.kernels.tiles import Array

PIECES_BYTES = 3 << 20
"""Bytes of a piece of all checkpoints together: about the caches of a core."""
LARGEST, SMALLEST = 1 << 18, 1 << 14
"""Coordinates of a piece. A read costs a microsecond beside its bytes, so short ones are slower than a lower cache."""
ITEMSIZE, CAST = 3, 4
"""Columns of files, after those of their run."""
TRACK_TILE = 1 << 13
"""Coordinates whose squares are summed in float32 before they are added in float64: 256 in each sum."""
_WIDEST = 8

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
    codes: Array
    """Codes of a piece; shape (1 + steps, coordinates)."""
    flows: Array
    """Counters of a tile; shape (1 + steps, len(Flow)). The base's stay zero."""
    squares: Array
    """Sums of squares of a tile; shape (1 + steps, SUMS)."""
    piece_flows: Array
    """Counters of a piece."""
    piece_squares: Array
    """Sums of squares of a piece, in float64."""


def new_rooms(code: np.dtype[Any], sides: int) -> Rooms:
    """Work space for so many checkpoints."""
    piece = LARGEST
    while piece > SMALLEST and sides * piece * code.itemsize > PIECES_BYTES:
        piece //= 2
    return Rooms(
        raw=np.zeros(piece * _WIDEST, np.uint8),
        codes=aligned((sides, piece), code),
        flows=np.zeros((sides, len(Flow)), np.int64),
        squares=aligned((sides, SUMS), np.float32 if code.itemsize == 2 else np.float64),
        piece_flows=np.zeros((sides, len(Flow)), np.int64),
        piece_squares=aligned((sides, SUMS), np.float64),
    )


@helper
def value16(code: Any, values: Array) -> Any:
    """Value of a 16-bit code: of bfloat16, or by table, shape (65536,)."""
    return bits_float(bf16_to_f32(code)) if values.size == 0 else values[code]


@helper
def value_wide(code: Any, values: Array) -> Any:
    """Value of a code of float32 or float64; the table has shape (0,)."""
    return bits_float(code)


def value_of(code: Any, values: Array) -> Any:
    """Value of a code; the table has shape (0,) or (65536,)."""
    raise NotImplementedError("compiled code only")


@overload(value_of, jit_options={"nogil": True}, inline="never", strict=False)
def _value_of(code: Any, values: Any) -> Any:
    chosen = value16 if code == types.uint16 else value_wide
    return lambda code, values: chosen(code, values)


@helper
def exact_squares(codes: Array, row: int, n: int, values: Array) -> float:
    """Sum of squared finite differences from the base, or for row 0 of squared finite values, in float64.

    Of the first `n` codes of a row of shape (1 + steps, coordinates).
    """
    total = 0.0
    for i in range(n):
        delta = np.float64(value_of(codes[row, i], values))
        if row > 0:
            delta -= np.float64(value_of(codes[0, i], values))
        if abs(delta) < np.inf:
            total += delta * delta
    return total


@helper
def follow_tile(start: int, stop: int, magnitude: Any, signed: bool, rooms: Rooms) -> bool:
    """Count and square a tile through all steps, its codes in registers from one step to the next.

    With `signed`, zeros of either sign are the same. Without, -0 must not occur; it returns whether it did.
    """
    codes, flows, squares = rooms.codes, rooms.flows, rooms.squares
    flows[:], squares[:] = 0, 0
    low = load_codes(codes, 0, start)
    for i in range(start, stop, LANES):
        base = load_codes(codes, 0, i)
        low = lower(low, base)
        if signed:
            base = positive_zeros(base, magnitude)
        add_squares(squares, 0, no_codes(base), base)
        last, before, ever = base, np.uint64(0), np.uint64(0)
        for side in range(1, codes.shape[0]):
            new = load_codes(codes, side, i)
            low = lower(low, new)
            if signed:
                new = positive_zeros(new, magnitude)
            now, moved = differing(base, new), differing(last, new)
            add_squares(squares, side, base, new)
            flows[side, SUPPORT] += population(now)
            flows[side, TOUCHED] += population(now & ~ever)
            flows[side, REVERTED] += population(before & ~now)
            flows[side, CHURNED] += population(before & now & moved)
            last, before, ever = new, now, ever | now
    return bool(any_lowest(low))


@helper
def add_tile(rooms: Rooms) -> None:
    """Add what a tile gave to what its piece gives."""
    for side in range(rooms.flows.shape[0]):
        for flow in range(rooms.flows.shape[1]):
            rooms.piece_flows[side, flow] += rooms.flows[side, flow]
        if side == 0 or rooms.flows[side, SUPPORT] > 0:  # infinity less infinity is no number
            for i in range(SUMS):
                rooms.piece_squares[side, i] += rooms.squares[side, i]


@helper
def sum_piece(side: int, n: int, values: Array, rooms: Rooms) -> float:
    """Sum of squares of one side of a piece that was followed."""
    if side > 0 and rooms.piece_flows[side, SUPPORT] == 0:
        return 0.0
    total = 0.0
    for part in rooms.piece_squares[side]:
        total += part
    # Codes with a table of values; overflow, NaN, and what float32 cannot hold: rare, and worth a second look.
    if values.size or not TINY < total < np.inf:
        return exact_squares(rooms.codes, side, n, values)
    return total


@helper
def follow_piece(n: int, magnitude: Any, rooms: Rooms) -> None:
    """Count and square the codes of a piece, tile by tile."""
    signs_lead = magnitude == np.iinfo(rooms.codes.dtype).max >> 1
    rooms.piece_flows[:], rooms.piece_squares[:] = 0, 0
    for start in range(0, n, TRACK_TILE):
        stop = min(start + TRACK_TILE, n)
        if not signs_lead or follow_tile(start, stop, magnitude, False, rooms):
            follow_tile(start, stop, magnitude, True, rooms)
        add_tile(rooms)


@helper
def read_piece(first: int, stop: int, files: Array, tables: Array, rooms: Rooms) -> bool:
    """Codes of a piece of all checkpoints; whether all could be read.

    Parameters
    ----------
    files : int64 array, shape (1 + steps, 5)
    tables : array of codes, shape (1 + steps, 0 or 65536)
    rooms : Rooms
        Its codes are written.
    """
    n = stop - first
    for side in range(files.shape[0]):
        itemsize, cast = files[side, ITEMSIZE], files[side, CAST]
        codes = rooms.codes[side]
        room = codes.view(np.uint8) if cast == NO_CAST else rooms.raw
        raw = fetch(Side(files[side : side + 1, :ITEMSIZE], room, itemsize), first, stop)
        if raw.size < n * itemsize:
            return False
        if cast != NO_CAST:
            decode(raw, cast, itemsize, tables[side], codes[:n])
        elif files[side, FILE] == MEMORY:  # which is handed out as it is where it is aligned
            room[: raw.size] = raw
        codes[n : (n + LANES - 1) // LANES * LANES] = 0  # equal on all sides, they count nothing
    return True


@kernel
def follow_spans(
    spans: Array,
    files: Array,
    tables: Array,
    values: Array,
    magnitude: Any,
    rooms: Rooms,
    counts: Array,
    sums: Array,
) -> int:
    """Follow spans of tensors of the same dtypes through all checkpoints.

    Parameters
    ----------
    spans : int64 array, shape (spans, 3)
        Number of a tensor, the first coordinate, and where to stop.
    files : int64 array, shape (tensors, 1 + steps, 5)
        Of the base and of each step: its run (:class:`~ckptdiff.codes.fetch.Side`), bytes of an element, and how it
        becomes a code of the compare format (:class:`~ckptdiff.measure.kernels.stored.Cast`).
    tables : array of codes, shape (1 + steps, 0 or 65536)
        For ``Cast.TABLE``.
    values : float32 array
        Value of each code; empty for bfloat16, float32 and float64.
    magnitude : unsigned
        Mask of the magnitude bits, in the dtype of codes.
    counts : int64 array, shape (spans, steps, 4)
        Added to; columns are those of :class:`Flow`.
    sums : float64 array, shape (spans, 1 + steps)
        Added to: sum of W0^2, then of (W - W0)^2 at each step.

    Returns
    -------
    int
        How many spans were followed: less than all if the next could not be read.
    """
    piece = rooms.codes.shape[1]
    for i in range(len(spans)):
        tensor, first, stop = spans[i]
        for start in range(first, stop, piece):
            end = min(start + piece, stop)
            if not read_piece(start, end, files[tensor], tables, rooms):
                return i
            follow_piece(end - start, magnitude, rooms)
            counts[i] += rooms.piece_flows[1:]
            for side in range(sums.shape[1]):
                sums[i, side] += sum_piece(side, end - start, values, rooms)
    return len(spans)
