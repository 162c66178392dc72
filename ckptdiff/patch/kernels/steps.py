"""Find which codes of a block changed and by how many steps, and lay that out as bytes that deflate well; and back.

A step is the distance of two codes in the order of their values (``ordered`` below), modulo the number of codes: from
any base it leads to one code, so signs of zero and payloads of NaN come out exactly, and steps of successive patches
add up. A step s is kept as z = 2 (s - 1) if it is positive, and 2 (-s - 1) + 1 if it is negative; z is small where s
is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.deflate.bit_writer import put
from ckptdiff.deflate.huffman import Array
from ckptdiff.jit import helper, kernel

BITMAP = 255
"""In place of a shift: positions are a bitmap."""
PAIRS, SYMBOLS = 0, 1
"""Each byte holds two z, the first one in its low bits; or a byte is a z, or tells how many bits one has."""
FAR = 15
"""Half a byte that stands for this z and larger ones: of these follow, in six bits, how many bits they have but one,
and then their low bits."""
SELDOM = 8
"""Pairs are taken where at most one of so many z is FAR: a weight near zero changes its sign by thousands of steps."""
EXACT = 192
"""A z below is its own symbol; one of b > 7 bits has the symbol EXACT + b - 8, and its low b - 1 bits follow."""
LONG = 255
"""A byte of a gap that says: so many, and more follow."""


@helper
def ordered(code: Any, sign: Any, full: Any) -> Any:
    """Place of a floating code among all of its format, from the lowest negative to the highest positive."""
    return (~code & full) if code & sign else code | sign


@helper
def unordered(place: Any, sign: Any, full: Any) -> Any:
    """Code at a place; undoes :func:`ordered`."""
    return place ^ sign if place & sign else ~place & full


@helper
def _find(base: Array, tuned: Array, floating: bool, sign: Any, positions: Array, steps: Array) -> int:
    count = 0
    for i in range(base.size):
        positions[count] = i
        count += base[i] != tuned[i]
    full = sign | (sign - np.uint64(1))
    for k in range(count):
        before, after = np.uint64(base[positions[k]]), np.uint64(tuned[positions[k]])
        if floating:
            before, after = ordered(before, sign, full), ordered(after, sign, full)
        step = (after - before) & full
        if step & sign:
            steps[k] = (((~step & full) << np.uint64(1)) | np.uint64(1)) & np.uint64(0xFFFFFFFFFFFFFFFF)
        else:
            steps[k] = (step - np.uint64(1)) << np.uint64(1)
    return count


@kernel
def find_steps(base: Array, tuned: Array, width: int, floating: bool, positions: Array, steps: Array) -> int:
    """Find the codes that differ.

    Parameters
    ----------
    base, tuned : uint8 array, shape (n * width,)
        Little-endian codes.
    width : {1, 2, 4, 8}
        Bytes of a code.
    floating : bool
        Whether codes are sign and magnitude, as floating formats are; else they are whole numbers.
    positions : uint32 array, shape (n + 1,)
        Receives their places, ascending.
    steps : uint64 array, shape (n + 1,)
        Receives z of each.

    Returns
    -------
    int
        How many there are.
    """
    sign = np.uint64(1) << np.uint64(8 * width - 1)
    if width == 1:
        return _find(base, tuned, floating, sign, positions, steps)
    if width == 2:
        return _find(base.view(np.uint16), tuned.view(np.uint16), floating, sign, positions, steps)
    if width == 4:
        return _find(base.view(np.uint32), tuned.view(np.uint32), floating, sign, positions, steps)
    return _find(base.view(np.uint64), tuned.view(np.uint64), floating, sign, positions, steps)


@helper
def _add(codes: Array, floating: bool, sign: Any, positions: Array, steps: Array, count: int) -> None:
    full = sign | (sign - np.uint64(1))
    one = np.uint64(1)
    for k in range(count):
        at = positions[k]
        code = np.uint64(codes[at])
        place = ordered(code, sign, full) if floating else code
        size = (steps[k] >> one) + one
        place = (place - size if steps[k] & one else place + size) & full
        codes[at] = unordered(place, sign, full) if floating else place


@kernel
def add_steps(codes: Array, width: int, floating: bool, positions: Array, steps: Array, count: int) -> None:
    """Move codes by their steps, in place; undoes what :func:`find_steps` found.

    Parameters
    ----------
    codes : uint8 array, shape (n * width,)
    width, floating
        As for :func:`find_steps`.
    positions : uint32 array, shape (>= count,)
        Each below n.
    steps : uint64 array, shape (>= count,)
    """
    sign = np.uint64(1) << np.uint64(8 * width - 1)
    if width == 1:
        _add(codes, floating, sign, positions, steps, count)
    elif width == 2:
        _add(codes.view(np.uint16), floating, sign, positions, steps, count)
    elif width == 4:
        _add(codes.view(np.uint32), floating, sign, positions, steps, count)
    else:
        _add(codes.view(np.uint64), floating, sign, positions, steps, count)


@helper
def bits_of(number: Any) -> int:
    """Bits of a whole number; 0 of 0."""
    bits = 0
    while number:
        number >>= np.uint64(1)
        bits += 1
    return bits


@helper
def _put_long(out: Array, state: Any, value: Any, bits: Any) -> Any:
    """Append up to 63 bits."""
    low: Any = np.uint64(min(bits, 32))
    state = put(out, state, value & ((np.uint64(1) << low) - np.uint64(1)), low)
    return put(out, state, value >> low, bits - np.int64(low)) if bits > 32 else state


@helper
def _end(state: Any) -> Any:
    """Bytes up to a state; the last one may be in part."""
    return state[2] + (1 if state[1] else 0)


@kernel
def lay_out(positions: Array, steps: Array, count: int, numel: int, out: Array, parts: Array) -> tuple[int, int]:
    """Write positions and steps as four streams of bytes, one after the other.

    1. Gaps: how many codes lie between two changed ones, divided by 2^shift, each in a byte; :data:`LONG` adds to the
       next. Or a bitmap, lowest bit first, where many changed.
    2. The low bits of gaps, `shift` each.
    3. Steps, as pairs or symbols.
    4. The bits that follow symbols.

    Parameters
    ----------
    positions, steps
        As :func:`find_steps` gives them; one at least.
    numel : int
        Codes of the block.
    out : uint8 array
        Room for the streams: ``numel / 128 + 12 count + 64`` bytes, and a bitmap.
    parts : int64 array, shape (5,)
        Receives where each stream begins, and where the last one ends.

    Returns
    -------
    int
        The shift, or :data:`BITMAP`.
    int
        :data:`PAIRS` or :data:`SYMBOLS`.
    """
    zero = np.uint64(0)
    parts[0] = 0
    at: Any = 0
    shift = max(bits_of(np.uint64(numel // count)) - 7, 0)
    if 20 * count > 7 * numel:
        shift = BITMAP
        at = (numel + 7) // 8
        out[:at] = 0
        for k in range(count):
            out[positions[k] >> 3] |= 1 << (positions[k] & 7)
        parts[1] = parts[2] = at
    else:
        last: Any = -1
        for k in range(count):
            gap: Any = (np.int64(positions[k]) - last - 1) >> shift
            last = np.int64(positions[k])
            while gap >= LONG:
                out[at] = LONG
                at += 1
                gap -= LONG
            out[at] = gap
            at += 1
        parts[1] = at
        if shift:
            state = (zero, zero, at)
            last = -1
            for k in range(count):
                gap = np.int64(positions[k]) - last - 1
                last = np.int64(positions[k])
                state = put(out, state, gap & ((1 << shift) - 1), shift)
            at = _end(state)
        parts[2] = at
    far = 0
    for k in range(count):
        far += steps[k] >= FAR
    if SELDOM * far <= count:
        for k in range(0, count, 2):
            second = min(steps[k + 1], np.uint64(FAR)) if k + 1 < count else zero
            out[at + k // 2] = min(steps[k], np.uint64(FAR)) | second << np.uint64(4)
        at += (count + 1) // 2
        parts[3] = at
        state = (zero, zero, at)
        for k in range(count):
            z = steps[k]
            if z >= FAR:
                bits = bits_of(z) - 1
                state = put(out, state, bits, 6)
                state = _put_long(out, state, z & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)), bits)
        parts[4] = _end(state)
        return shift, PAIRS
    for k in range(count):
        z = steps[k]
        out[at + k] = z if z < EXACT else EXACT + bits_of(z) - 8
    at += count
    parts[3] = at
    state = (zero, zero, at)
    for k in range(count):
        z = steps[k]
        if z >= EXACT:
            bits = bits_of(z) - 1
            state = _put_long(out, state, z & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)), bits)
    parts[4] = _end(state)
    return shift, SYMBOLS


@helper
def _take(stream: Array, at: Any, bits: Any) -> Any:
    """Up to 63 bits from a bit on; the stream holds them."""
    value, got = np.uint64(0), 0
    while got < bits:
        byte, skip = (at + got) >> 3, (at + got) & 7
        taken = min(8 - skip, bits - got)
        part = np.uint64((stream[byte] >> skip) & ((1 << taken) - 1))
        value |= part << np.uint64(got)
        got += taken
    return value


@kernel
def read_positions(gaps: Array, low: Array, shift: int, count: int, numel: int, positions: Array) -> int:
    """Read the first two streams of :func:`lay_out`; the inverse.

    Returns
    -------
    int
        0, or 1 if they do not hold `count` places below `numel` and nothing else.
    """
    found = 0
    if shift == BITMAP:
        if gaps.size != (numel + 7) // 8:
            return 1
        for byte in range(gaps.size):
            word = np.int64(gaps[byte])
            while word:
                low_bit = word & -word
                place = 0
                while (low_bit >> place) != 1:
                    place += 1
                if found == count or 8 * byte + place >= numel:
                    return 1
                positions[found] = 8 * byte + place
                found += 1
                word ^= low_bit
        return 0 if found == count else 1
    if low.size != (count * shift + 7) // 8:
        return 1
    last, gap = -1, 0
    for i in range(gaps.size):
        gap += gaps[i]
        if gap > numel:
            return 1
        if gaps[i] == LONG:
            continue
        if found == count:
            return 1
        whole = gap << shift
        if shift:
            whole |= np.int64(_take(low, found * shift, shift))
        last += whole + 1
        if last >= numel:
            return 1
        positions[found] = last
        found, gap = found + 1, 0
    return 0 if found == count and gap == 0 else 1


@kernel
def read_steps(symbols: Array, extra: Array, coding: int, count: int, width: int, steps: Array) -> int:
    """Read the last two streams of :func:`lay_out`; the inverse.

    Returns
    -------
    int
        0, or 1 if they do not hold `count` steps between codes of so many bytes, and nothing else.
    """
    at: Any = 0
    if coding == PAIRS:
        if symbols.size != (count + 1) // 2 or (count % 2 and symbols[count // 2] >= 16):
            return 1
        for k in range(count):
            steps[k] = (symbols[k // 2] >> (4 * (k % 2))) & 15
            if steps[k] != FAR:
                continue
            if at + 6 > 8 * extra.size:
                return 1
            bits = np.int64(_take(extra, at, 6))
            at += 6
            if not 3 <= bits < 8 * width or at + bits > 8 * extra.size:
                return 1
            steps[k] = np.uint64(1) << np.uint64(bits) | _take(extra, at, bits)
            at += bits
        return 0 if (at + 7) // 8 == extra.size else 1
    if symbols.size != count:
        return 1
    for k in range(count):
        symbol = symbols[k]
        if symbol < EXACT:
            steps[k] = symbol
            continue
        bits = np.int64(symbol) - EXACT + 7
        if bits >= 8 * width or at + bits > 8 * extra.size:
            return 1
        steps[k] = np.uint64(1) << np.uint64(bits) | _take(extra, at, bits)
        at += bits
    return 0 if (at + 7) // 8 == extra.size else 1
