"""Cast stored elements to the codes they are compared as, and take the counts that come before that cast."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from ckptdiff.codes.bfloat16 import bf16_to_f32, round_to_bf16
from ckptdiff.codes.bits import bits_float, float_bits
from ckptdiff.codes.ordered_sums import sums_of_absorbed
from ckptdiff.jit import STEP, Later, helper, overload
from ckptdiff.measure.kernels.changed import count_nonfinite
from ckptdiff.measure.kernels.tiles import Array, Measure
from ckptdiff.measure.partial import Count, Sum

types = Later("numba.types")


class Cast(IntEnum):
    """How stored elements become codes of another format."""

    NONE = 0
    """They are those codes."""
    TABLE = 1
    """Formats of 8 and 16 bits: a table holds the code of each."""
    SHIFT = 2
    """Bfloat16 to float32: the upper half."""
    REAL = 3
    """Between float32 and float64, or from them to bfloat16."""


class Stored(NamedTuple):
    """What kernels know of a stored format."""

    itemsize: int
    cast: int
    """To codes of the compare format."""
    table: Array
    """For ``Cast.TABLE``; in the dtype of the codes."""
    magnitude: Any
    """Mask of the magnitude bits, and the first magnitude that is not finite; both uint64."""
    infinite: Any
    common: int
    """Cast to the smallest format that holds both sides, its table in uint64, and that format's magnitude bits."""
    common_table: Array
    common_magnitude: Any


NONE, TABLE, SHIFT, REAL = (int(cast) for cast in Cast)
NONFINITE_BASE, NONFINITE_TUNED = int(Count.NONFINITE_BASE), int(Count.NONFINITE_TUNED)
STORED_EQUAL, OFF_GRID = int(Count.STORED_EQUAL), int(Count.OFF_GRID)
STORED_SQUARE, ABSORBED_SQUARE = int(Sum.STORED_SQUARE), int(Sum.ABSORBED_SQUARE)
HALF_INFINITE, HALF_SCALE = 0x7C00, np.float32(2.0**112)
"""The first magnitude of float16 that is not finite; its exponents stand as much lower in a float32."""


@helper
def look_up(codes: Array, table: Array, out: Array) -> None:
    """Code of each stored code, shape (n,), by table, shape (256,) or (65536,)."""
    for i in range(codes.size):
        out[i] = table[codes[i]]


def decode(raw: Array, cast: int, itemsize: int, table: Array, out: Array) -> None:
    """Write the codes of raw elements, uint8 of shape (n * itemsize,), to an array of 16, 32 or 64 bits, shape (n,).

    ``cast`` is a :class:`Cast` other than ``Cast.NONE``.
    """
    raise NotImplementedError("compiled code only")


@helper
def decode_narrow(raw: Array, cast: int, itemsize: int, table: Array, out: Array) -> None:
    """To codes of 16 bits: by table, or from a wider real to bfloat16; shapes as in ``decode``."""
    if cast == TABLE and itemsize == 1:
        look_up(raw, table, out)
    elif cast == TABLE:
        look_up(raw.view(np.uint16), table, out)
    elif itemsize == 4:
        singles = raw.view(np.uint32)
        for i in range(out.size):
            out[i] = round_to_bf16(singles[i])
    else:
        doubles = raw.view(np.float64)
        for i in range(out.size):
            out[i] = round_to_bf16(float_bits(np.float32(doubles[i])))


@helper
def decode_single(raw: Array, cast: int, itemsize: int, table: Array, out: Array) -> None:
    """To codes of float32; shapes as in ``decode``."""
    if cast == TABLE and itemsize == 1:
        look_up(raw, table, out)
    elif cast == TABLE:
        look_up(raw.view(np.uint16), table, out)
    else:
        halves = raw.view(np.uint16)
        for i in range(out.size):
            out[i] = bf16_to_f32(halves[i])


@helper
def decode_double(raw: Array, cast: int, itemsize: int, table: Array, out: Array) -> None:
    """To codes of float64; shapes as in ``decode``."""
    if cast == TABLE and itemsize == 1:
        look_up(raw, table, out)
    elif cast == TABLE:
        look_up(raw.view(np.uint16), table, out)
    else:
        singles = raw.view(np.float32)
        for i in range(out.size):
            out[i] = float_bits(np.float64(singles[i]))


@overload(decode, jit_options=STEP, inline="never", strict=False)
def _decode(raw: Any, cast: Any, itemsize: Any, table: Any, out: Any) -> Any:
    chosen = {types.uint16: decode_narrow, types.uint32: decode_single, types.uint64: decode_double}[out.dtype]
    return lambda raw, cast, itemsize, table, out: chosen(raw, cast, itemsize, table, out)


@helper
def nonfinite(raw: Array, stored: Stored) -> int:
    """How many stored elements are NaN or Inf."""
    if stored.itemsize == 1:
        return int(count_nonfinite(raw, np.uint8(stored.magnitude), np.uint8(stored.infinite)))
    if stored.itemsize == 2:
        return int(count_nonfinite(raw.view(np.uint16), np.uint16(stored.magnitude), np.uint16(stored.infinite)))
    if stored.itemsize == 4:
        return int(count_nonfinite(raw.view(np.uint32), np.uint32(stored.magnitude), np.uint32(stored.infinite)))
    return int(count_nonfinite(raw.view(np.uint64), stored.magnitude, stored.infinite))


@helper
def equal_codes(a: Array, b: Array, magnitude: Any) -> int:
    """How many codes of two arrays of shape (n,) are equal, +0 equal to -0."""
    count: Any = np.int32(0)
    for i in range(a.size):
        count = np.int32(count + ((a[i] == b[i]) | (((a[i] | b[i]) & magnitude) == 0)))
    return int(count)


@helper
def equal_halves(halves: Array, singles: Array) -> int:
    """How many bfloat16 and float32 elements, both of shape (n,), are equal, +0 equal to -0."""
    count: Any = np.int32(0)
    for i in range(halves.size):
        wide = bf16_to_f32(halves[i])
        count = np.int32(count + ((wide == singles[i]) | (((wide | singles[i]) & np.uint32(0x7FFF_FFFF)) == 0)))
    return int(count)


@helper
def widen(raw: Array, stored: Stored, out: Array) -> None:
    """Codes in the common format, as uint64 of shape (n,), of raw elements, uint8 of shape (n * itemsize,)."""
    if stored.common == TABLE or stored.common == REAL:
        decode_double(raw, stored.common, stored.itemsize, stored.common_table, out)
    elif stored.itemsize == 2:
        halves, shift = raw.view(np.uint16), np.uint64(16 if stored.common == SHIFT else 0)
        for i in range(out.size):
            out[i] = np.uint64(halves[i]) << shift
    elif stored.itemsize == 4:
        singles = raw.view(np.uint32)
        for i in range(out.size):
            out[i] = singles[i]
    else:
        doubles = raw.view(np.uint64)
        for i in range(out.size):
            out[i] = doubles[i]


@helper
def count_same(raw: tuple[Array, Array], base: Stored, tuned: Stored, scratch: tuple[Array, Array]) -> int:
    """How many elements are equal as stored, +0 equal to -0; shapes as in ``count_stored``."""
    x, y = raw
    if base.common == NONE and tuned.common == NONE:
        if base.itemsize == 2:
            return equal_codes(x.view(np.uint16), y.view(np.uint16), np.uint16(base.magnitude))
        if base.itemsize == 4:
            return equal_codes(x.view(np.uint32), y.view(np.uint32), np.uint32(base.magnitude))
        return equal_codes(x.view(np.uint64), y.view(np.uint64), base.magnitude)
    if base.common == SHIFT and tuned.common == NONE:
        return equal_halves(x.view(np.uint16), y.view(np.uint32))
    if base.common == NONE and tuned.common == SHIFT:
        return equal_halves(y.view(np.uint16), x.view(np.uint32))
    n = x.size // base.itemsize
    a, b = scratch[0][:n], scratch[1][:n]
    widen(x, base, a)
    widen(y, tuned, b)
    return equal_codes(a, b, base.common_magnitude)


@helper
def count_off_grid(raw: Array, stored: Stored, codes: Array) -> int:
    """How many values the cast to bfloat16 changed, NaN left out; shapes as in ``count_stored``."""
    count: Any = np.int32(0)
    if stored.itemsize == 4:
        singles = raw.view(np.uint32)
        for i in range(singles.size):  # processors compare signed numbers in a third of the time
            nan = np.int32(singles[i] & np.uint32(0x7FFF_FFFF)) > np.int32(0x7F80_0000)
            count = np.int32(count + (((singles[i] & np.uint32(0xFFFF)) != 0) & (not nan)))
        return int(count)
    if stored.itemsize == 2:  # float16: bfloat16 holds 8 significant bits of its 11
        halves = raw.view(np.uint16)
        for i in range(halves.size):
            size = halves[i] & np.uint16(0x7FFF)
            lost = (size & 7) != 0
            if size < 0x400:  # subnormal: the leading bit may be any
                lost = ((size >= 0x200) & ((size & 3) != 0)) | ((size >= 0x100) & ((size & 1) != 0))
            count = np.int32(count + (lost & (size <= 0x7C00)))
        return int(count)
    doubles = raw.view(np.float64)
    for i in range(doubles.size):
        cast = np.float64(bits_float(bf16_to_f32(codes[i])))
        count = np.int32(count + ((doubles[i] != cast) & (doubles[i] == doubles[i])))
    return int(count)


@helper
def take_reals(raw: Array, stored: Stored, scratch: Array) -> Array:
    """Values of raw elements, uint8 of shape (n * itemsize,), as float64 of shape (n,) in work space."""
    n = raw.size // stored.itemsize
    out = scratch[:n].view(np.float64)
    if stored.itemsize == 8:
        doubles = raw.view(np.float64)
        for i in range(n):
            out[i] = doubles[i]
    elif stored.itemsize == 4:
        singles = raw.view(np.float32)
        for i in range(n):
            out[i] = singles[i]
    elif stored.itemsize == 2:
        halves = raw.view(np.uint16)
        if stored.infinite == HALF_INFINITE:
            for i in range(n):  # a product brings subnormals into the normal range
                size = halves[i] & np.uint16(0x7FFF)
                real = bits_float(np.uint32(np.uint32(size) << np.uint32(13))) * HALF_SCALE
                real = real if size < HALF_INFINITE else np.float32(np.inf)
                out[i] = -real if halves[i] > np.uint16(0x7FFF) else real
        else:
            for i in range(n):
                out[i] = bits_float(bf16_to_f32(halves[i]))
    else:  # bfloat16, which these are cast to here, holds every value of 8 bits
        for i in range(n):
            out[i] = bits_float(bf16_to_f32(np.uint16(stored.table[raw[i]])))
    return out


@helper
def hide_strange(x: Array, y: Array) -> None:
    """Set both sides to zero where their difference is not finite; shape (n,)."""
    for i in range(x.size):
        if not abs(y[i] - x[i]) < np.inf:
            x[i] = y[i] = 0.0


@helper
def add_absorbed(x: Array, y: Array, a: Array, b: Array, sums: Array) -> None:
    """Add the squares of d = y - x, and of those d whose codes a and b are equal after the cast; all of shape (n,)."""
    total, absorbed = sums_of_absorbed(x, y, a, b)
    sums[STORED_SQUARE] += total
    sums[ABSORBED_SQUARE] += absorbed


@helper
def count_stored(
    raw: tuple[Array, Array],
    stored: tuple[Stored, Stored],
    codes: tuple[Array, Array],
    measure: Measure,
    scratch: tuple[Array, Array],
    totals: tuple[Array, Array],
) -> None:
    """Count and sum what the cast hides, over one tile: into ``totals``, shapes (len(Count),) and (len(Sum),).

    Both sides ``raw``, uint8 of shape (n * itemsize,), and as codes after the cast, shape (n,); ``scratch`` is uint64
    of shape (TILE,).
    """
    counts, sums = totals
    if measure.native:  # 8-bit codes, cast to 16 bits for the kernels alone
        return
    strange = nonfinite(raw[0], stored[0]), nonfinite(raw[1], stored[1])
    counts[NONFINITE_BASE] += strange[0]
    counts[NONFINITE_TUNED] += strange[1]
    counts[STORED_EQUAL] += count_same(raw, stored[0], stored[1], scratch)
    if measure.wide:
        counts[OFF_GRID] += count_off_grid(raw[0], stored[0], codes[0])
    if not measure.absorbs:
        return
    if stored[0].itemsize == 4 and stored[1].itemsize == 4 and strange[0] + strange[1] == 0:
        add_absorbed(raw[0].view(np.float32), raw[1].view(np.float32), codes[0], codes[1], sums)
        return
    x, y = take_reals(raw[0], stored[0], scratch[0]), take_reals(raw[1], stored[1], scratch[1])
    hide_strange(x, y)
    add_absorbed(x, y, codes[0], codes[1], sums)
