"""Code and read the blocks of many small tensors in one call, byte for byte as ``coded_block.py`` does one by one.

A checkpoint of experts holds tens of thousands of tensors; what Python does for each costs more than its bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.deflate.deflate import encode
from ckptdiff.deflate.huffman import Array
from ckptdiff.deflate.inflate import inflate
from ckptdiff.jit import helper, kernel
from ckptdiff.patch.kernels.steps import BITMAP, add_steps, find_steps, lay_out, read_positions, read_steps

__all__ = ["ALONE", "FACTS", "SEARCH", "STEPS", "STREAMS", "WHOLE", "apply_small", "code_small", "read_facts"]

STEPS, WHOLE = 0, 1
"""Modes of a block."""
STREAMS = 4
SEARCH = 1 << 16
"""Bytes of a stream from which strings that come again are worth a search by zlib."""
ALONE = -1
"""In place of a size: the block has to be coded by itself."""
FACTS = 3 + 3 * STREAMS
"""Of a block: how many changes, shift and coding; of each stream its size, its stored size, and where it begins."""


@helper
def _put_number(out: Array, at: Any, number: Any) -> Any:
    """Append a number as LEB128; returns where the next byte goes."""
    while number >= 0x80:
        out[at] = number & 0x7F | 0x80
        at += 1
        number >>= 7
    out[at] = number
    return at + 1


@helper
def _put_stream(data: Array, spans: Array, out: Array, at: Any) -> tuple[Any, bool]:
    """Append bytes as a zlib stream if that is smaller; returns how many it took, and whether zlib should search."""
    if not data.size:
        return 0, False
    size, repeats = encode(data, spans, data.size, out[at:])
    if not size:
        out[at : at + data.size] = data
        size = data.size
    return size, repeats and data.size >= SEARCH


@kernel
def code_small(
    sides: tuple[Array, Array],
    blocks: Array,
    rooms: tuple[Array, Array],
    laid: Array,
    streams: Array,
    spans: Array,
    out: Array,
    found: Array,
) -> None:
    """Code what changed in small tensors.

    Parameters
    ----------
    sides : two uint8 arrays
        The tensors before and after.
    blocks : int64 array, shape (k, 4)
        Of each tensor the byte at which it begins, a multiple of its codes' bytes; how many codes it has, of how many
        bytes, and whether they are floating.
    rooms : uint32 array and uint64 array
        For positions and steps, as :func:`~ckptdiff.patch.kernels.steps.find_steps` takes them.
    laid, streams : uint8 array
        Room for the streams of the largest, plain and encoded.
    spans : int64 array, shape (n, 2)
        Room for the runs of its longest stream.
    out : uint8 array
        Receives the coded blocks, one behind the other; the bytes of all tensors and 32 more of each are enough.
    found : int64 array, shape (k, 2)
        Receives the size of each, or :data:`ALONE`, and how many codes changed.
    """
    positions, steps = rooms
    bounds, sizes = np.empty(STREAMS + 1, np.int64), np.empty(STREAMS, np.int64)
    end: Any = 0
    for i in range(len(blocks)):
        start, numel, width = blocks[i, 0], blocks[i, 1], blocks[i, 2]
        base, tuned = sides[0][start : start + numel * width], sides[1][start : start + numel * width]
        count = find_steps(base, tuned, width, blocks[i, 3] != 0, positions, steps)
        found[i, 0], found[i, 1] = 0, count
        if not count:
            continue
        shift, coding = lay_out(positions, steps, count, numel, laid, bounds)
        at: Any = 0
        alone = False
        for k in range(STREAMS):
            sizes[k], again = _put_stream(laid[bounds[k] : bounds[k + 1]], spans, streams, at)
            at += sizes[k]
            alone |= again
        begun = end
        for number in (STEPS, count, shift, coding):
            end = _put_number(out, end, number)
        for k in range(STREAMS):
            end = _put_number(out, end, bounds[k + 1] - bounds[k])
            end = _put_number(out, end, sizes[k])
        if end - begun + at >= tuned.size:
            end = begun
            at, again = _put_stream(tuned, spans, streams, 0)
            alone |= again
            end = _put_number(out, _put_number(out, end, WHOLE), at)
        if alone:
            found[i, 0], end = ALONE, begun
            continue
        out[end : end + at] = streams[:at]
        end += at
        found[i, 0] = end - begun


@kernel
def read_facts(coded: Array, blocks: Array, bounds: Array, facts: Array) -> None:
    """Read the numbers at the beginning of coded blocks.

    Parameters
    ----------
    coded : uint8 array
        The blocks, one behind the other.
    blocks
        As :func:`code_small` takes them.
    bounds : int64 array, shape (k + 1,)
        Where each block begins, and where the last one ends.
    facts : int64 array, shape (k, FACTS)
        Receives those of each block; no change of one that holds no steps, or cannot.
    """
    numbers = np.empty(4 + 2 * STREAMS, np.int64)
    for i in range(len(blocks)):
        facts[i, 0] = 0
        at: Any = bounds[i]
        whole = True
        for k in range(numbers.size):
            numbers[k] = 0
            for part in range(5):
                if at == bounds[i + 1]:
                    whole = False
                    break
                byte = np.int64(coded[at])
                at += 1
                numbers[k] |= (byte & 0x7F) << (7 * part)
                if byte < 0x80:
                    break
                whole = whole and part < 4
        numel, count, shift = blocks[i, 1], numbers[1], numbers[2]
        if not whole or numbers[0] != STEPS or not 0 < count <= numel or numbers[3] > 1:
            continue
        if shift != BITMAP and shift > 24:
            continue
        # What the streams of such a block have at most, so that no more is ever made of one.
        most = (numel + 7) // 8 if shift == BITMAP else count + numel // 128 + 64
        for k in range(STREAMS):
            size, stored = numbers[4 + 2 * k], numbers[5 + 2 * k]
            limit = most if k == 0 else 3 * count + 1 if k == 1 else count if k == 2 else 9 * count + 1
            whole = whole and size <= limit and stored <= size and stored <= bounds[i + 1] - at
            facts[i, 3 + 3 * k], facts[i, 4 + 3 * k], facts[i, 5 + 3 * k] = size, stored, at
            at += stored
        if whole and at == bounds[i + 1]:
            facts[i, 0], facts[i, 1], facts[i, 2] = count, shift, numbers[3]


@helper
def _stream(facts: Array, k: int, coded: Array, room: Array) -> tuple[Array, bool]:
    """A stream of a block, and whether it could be read; an encoded one is in the first bytes of the room then."""
    size, stored, at = facts[3 + 3 * k], facts[4 + 3 * k], facts[5 + 3 * k]
    if stored == size:
        return coded[at : at + size], True
    plain = room[:size]
    return plain, inflate(coded[at : at + stored], plain)


@kernel
def apply_small(
    codes: Array, blocks: Array, facts: Array, coded: Array, streams: Array, rooms: tuple[Array, Array]
) -> int:
    """Make the bytes of small tensors after of those before, in place.

    Parameters
    ----------
    codes : uint8 array
    blocks, rooms
        As :func:`code_small` takes them.
    facts, coded
        As :func:`read_facts` fills them. Blocks of which they tell no change are left as they are.
    streams : uint8 array
        Room for the streams of the largest.

    Returns
    -------
    int
        The first block whose streams do not hold what it says, or as many as there are.
    """
    positions, steps = rooms
    for i in range(len(blocks)):
        start, numel, width, floating = blocks[i, 0], blocks[i, 1], blocks[i, 2], blocks[i, 3] != 0
        count, shift, coding = facts[i, 0], facts[i, 1], facts[i, 2]
        if not count:
            continue
        fact, end = facts[i], facts[i, 3 : 3 * STREAMS : 3]
        gaps, first = _stream(fact, 0, coded, streams)
        low, second = _stream(fact, 1, coded, streams[end[0] :])
        symbols, third = _stream(fact, 2, coded, streams[end[0] + end[1] :])
        extra, fourth = _stream(fact, 3, coded, streams[end[0] + end[1] + end[2] :])
        if not (first and second and third and fourth):
            return i
        if read_positions(gaps, low, shift, count, numel, positions):
            return i
        if read_steps(symbols, extra, coding, count, width, steps):
            return i
        add_steps(codes[start : start + numel * width], width, floating, positions, steps, count)
    return len(blocks)
