"""Kernels that turn codes and scales into values, and compare two sides that were."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.checkpoint.code_formats import Code
from ckptdiff.codes.bfloat16 import round_to_bf16
from ckptdiff.codes.bits import bits_float, fill16, float_bits
from ckptdiff.codes.fetch import Array
from ckptdiff.jit import helper, kernel

__all__ = ["count_equal_codes", "count_within_steps", "decode_codes"]


_MANTISSA, _EXPONENTS, _QUIET = 23, 0x7F80_0000, 0x0040_0000
_ROUNDING = 1 + 2.0**-12
"""Values of at most 2^8 steps are rounded to 24 bits, on either side."""


@helper
def value_of(field: Any, code: Code) -> Any:
    """Float32 of a floating code.

    Bits are moved to where float32 has them. Of a subnormal, its exponent taken one higher stands for what the lowest
    normal value has too much; it comes without float32's own subnormals, which some processors are slow at.
    """
    magnitude = np.uint32(np.uint32(field) & np.uint32(code.magnitude))
    small = magnitude < np.uint32(code.normal)
    exponent = np.uint32((code.bias + 1) << _MANTISSA) if small else np.uint32(code.bias << _MANTISSA)
    bits = np.uint32(np.uint32(magnitude << np.uint32(_MANTISSA - code.mantissa)) + exponent)
    special = np.uint32(_EXPONENTS | _QUIET) if magnitude >= np.uint32(code.nan) else np.uint32(_EXPONENTS)
    bits = special if magnitude >= np.uint32(code.infinite) else bits
    value = bits_float(bits)
    value = value - bits_float(exponent) if small else value
    sign = np.uint32(np.uint32(np.uint32(field) >> np.uint32(code.bits - 1)) << np.uint32(31))
    return bits_float(np.uint32(float_bits(value) | sign))


@helper
def step_of(field: Any, code: Code) -> Any:
    """Distance of a floating code to the next one of larger magnitude; of the largest, to the one before."""
    magnitude = np.uint32(np.uint32(field) & np.uint32(code.magnitude))
    magnitude = max(magnitude, np.uint32(code.normal))
    exponent = np.uint32(np.uint32(magnitude << np.uint32(_MANTISSA - code.mantissa)) & np.uint32(_EXPONENTS))
    return bits_float(np.uint32(exponent + np.uint32((code.bias - code.mantissa) << _MANTISSA)))


@helper
def unpack(raw: Array, at: int, skip: int, bits: int, flip: Any, out: Array, pairs: Array, count: int) -> int:
    """Codes that begin ``skip`` bits behind byte ``at``, one to a byte of ``out``; returns where the first one is.

    The lowest bits come first. ``pairs`` is ``out`` as uint16.
    """
    at, skip, count = max(at, 0), max(skip, 0), max(count, 0)
    if bits == 8:
        for i in range(count):
            out[i] = raw[at + i] ^ flip
        return 0
    if bits == 4:
        head = skip >> 2
        for i in range((head + count + 1) >> 1):
            both = np.uint16(raw[at + i])
            pairs[i] = (both & np.uint16(15)) | np.uint16((both >> np.uint16(4)) << np.uint16(8))
        return head
    for i in range(count):
        first = skip + i * bits
        byte, low = at + (first >> 3), first & 7
        field = raw[byte] >> low
        if low + bits > 8:
            field |= raw[byte + 1] << (8 - low)
        out[i] = field & ((1 << bits) - 1)
    return 0


@helper
def widen(grid: Array, line: int, width: int, before: int, out: Array) -> None:
    """Entries of a line of a grid, each as often as it has columns."""
    column, block, stop = 0, 0, min(width - before, out.size)
    while column < out.size:
        entry = grid[line, block]
        while column + 16 <= stop:
            fill16(out, column, entry)
            column += 16
        while column < stop:
            out[column] = entry
            column += 1
        block, stop = block + 1, min(stop + width, out.size)


@helper
def scale_floats(codes: Array, code: Code, scales: Array, row: int, out: Array) -> None:
    """Floating codes times the scale of each column."""
    for column in range(codes.size):
        out[row, column] = value_of(codes[column], code) * scales[column]


@helper
def scale_integers(codes: Array, zeros: Array, scales: Array, row: int, out: Array) -> None:
    """Integers less the zero of each column, times its scale."""
    for column in range(codes.size):
        out[row, column] = (np.float32(codes[column]) - zeros[column]) * scales[column]


@helper
def scale_steps(codes: Array, code: Code, scales: Array, row: int, out: Array) -> None:
    """The steps of codes times the scale of each column."""
    if code.floats:
        for column in range(codes.size):
            out[row, column] = step_of(codes[column], code) * abs(scales[column])
    else:
        for column in range(codes.size):
            out[row, column] = abs(scales[column])


@helper
def copy(codes: Array, row: int, out: Array) -> None:
    """Write codes to a row."""
    for column in range(codes.size):
        out[row, column] = codes[column]


@helper
def finish(out: Array, row: int, factor: Any, divides: bool) -> None:
    """Bring the global scale to a row."""
    if divides:
        for column in range(out.shape[1]):
            out[row, column] = out[row, column] / factor
    else:
        for column in range(out.shape[1]):
            out[row, column] = out[row, column] * factor


@helper
def is_regular(scale: Any) -> Any:
    """Whether a scale makes NaN of nothing else."""
    return (scale != np.float32(0)) & (abs(scale) < np.float32(np.inf))


@helper
def sign_nans(codes: Array, code: Code, zeros: Array, row: int, out: Array) -> None:
    """Give NaN the sign of its code: processors do not agree on that of one which a scale makes."""
    for column in range(codes.size):
        bits = float_bits(out[row, column])
        if (bits & np.uint32(0x7FFF_FFFF)) > np.uint32(_EXPONENTS):
            negative = codes[column] < zeros[column] if not code.floats else codes[column] >> (code.bits - 1) != 0
            out[row, column] = bits_float(np.uint32(0xFFC0_0000) if negative else np.uint32(_EXPONENTS | _QUIET))


@kernel
def decode_codes(
    raw: Array,
    stride: int,
    skip: int,
    code: Code,
    flip: int,
    grid: tuple[Array, Array, Array, int, int],
    factors: Array,
    divides: bool,
    out: Array,
    fields: Array,
    steps: Array,
) -> None:
    """Decode a box of a weight: each value is rounded once, and once more by a global scale; NaN keeps its code's sign.

    Parameters
    ----------
    raw : read-only uint8 array, shape (n,)
        The codes of its rows.
    stride, skip : int
        Bytes from one row to the next, and bits at the beginning of each that are not of the box: less than 8.
    code : Code
    flip : int
        Bits of each code to turn over, which makes fields of signed bytes.
    grid : tuple
        Scales and zeros, float32 arrays, shape (k, l), the latter (0, 0) for floating codes; the row of them that
        each row of the box takes, int64 array, shape (rows,); columns to a scale, and those of the first one that lie
        before the box.
    factors : float32 array, shape (rows,) or (0,)
        The global scale of each row, and whether it `divides`.
    out : float32 array, shape (rows, columns)
        Receives the values.
    fields : uint8 array, shape (rows, columns) or (0, 0)
        Receives the codes, one to a byte.
    steps : float32 array, of the same shape
        Receives the steps: how far each code is from the next one, as a value.
    """
    scales, zeros, lines, width, before = grid
    columns, known = out.shape[1], -1
    wide, room = np.empty((2, columns), np.float32), np.empty(columns // 2 * 2 + 2, np.uint8)
    pairs, regular = room.view(np.uint16), True
    for row in range(len(out)):
        first = unpack(raw, row * stride, skip, code.bits, np.uint8(flip), room, pairs, columns)
        codes = room[first : first + columns]
        if lines[row] != known:
            known, regular = lines[row], True
            for entry in range(scales.shape[1]):
                regular &= is_regular(scales[known, entry])
            widen(scales, known, width, before, wide[0])
            if not code.floats:
                widen(zeros, known, width, before, wide[1])
        if code.floats:
            scale_floats(codes, code, wide[0], row, out)
        else:
            scale_integers(codes, wide[1], wide[0], row, out)
        if len(steps):
            copy(codes, row, fields)
            scale_steps(codes, code, wide[0], row, steps)
        if len(factors):
            finish(out, row, factors[row], divides)
            if len(steps):
                finish(steps, row, abs(factors[row]), divides)
        if not regular or (len(factors) and not is_regular(factors[row])):
            sign_nans(codes, code, wide[1], row, out)


@kernel
def count_equal_codes(base: Array, tuned: Array, magnitude: int) -> int:
    """How many codes are equal, where +0 is -0.

    Parameters
    ----------
    base, tuned : uint8 array, shape (n,)
    magnitude : int
        Mask of the bits that are zero in a zero.
    """
    equal = 0
    for i in range(base.size):
        equal += (base[i] == tuned[i]) | (((base[i] | tuned[i]) & np.uint8(magnitude)) == 0)
    return equal


@kernel
def count_within_steps(
    base: Array, tuned: Array, base_steps: Array, tuned_steps: Array, as_bf16: bool
) -> tuple[int, int]:
    """How many values differ, and how many of those by no more than the larger step of both sides.

    Parameters
    ----------
    base, tuned : float32 array, shape (n,)
    base_steps, tuned_steps : float32 array, shape (n,)
    as_bf16 : bool
        Whether values differ only if they do once they are rounded to bfloat16.
    """
    changed, within = 0, 0
    for i in range(base.size):
        ours, theirs = float_bits(base[i]), float_bits(tuned[i])
        if as_bf16:
            narrow = np.uint32(round_to_bf16(ours)), np.uint32(round_to_bf16(theirs))
            ours, theirs = np.uint32(narrow[0] << np.uint32(16)), np.uint32(narrow[1] << np.uint32(16))
        differs = (ours != theirs) & (np.uint32(np.uint32(ours | theirs) << np.uint32(1)) != np.uint32(0))
        step = max(base_steps[i], tuned_steps[i])
        apart = abs(base[i] - tuned[i])
        # A scale that is infinite makes steps and values that are.
        near = (apart <= step * np.float32(_ROUNDING)) & (apart < np.float32(np.inf))
        changed += differs
        within += differs & near
    return changed, within
