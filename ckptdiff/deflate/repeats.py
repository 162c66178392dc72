"""Look quickly for repeated strings, to know when a search for them pays."""

from __future__ import annotations

import numpy as np

from ckptdiff.deflate.bit_writer import load_word
from ckptdiff.deflate.huffman import Array
from ckptdiff.jit import helper

_PROBES = 6
_CANDIDATES = 32
_INFORMATION = 40
_LONGEST = 1024
_WINDOW = 32768
_BLOCK = 64
_RUNS = 1024
_SHARE = 12
_FEW_ECHOES = 2


@helper
def has_repeats(data: Array, costs: Array) -> bool:
    """Whether strings of a mask come again within deflate's window, as in a mask of whole columns.

    Of each of six parts of the data, one string that costs 40 bits or more is looked for in the 32 KiB before it; by
    chance alone it would be there once in 30 million times.

    Parameters
    ----------
    data : uint8 array, shape (n,)
        The packed mask.
    costs : int array, shape (256,) or longer
        Bits that each byte costs in a Huffman code.
    """
    for probe in range(1, _PROBES + 1):
        start, stop = costly_string(data, costs, data.size * probe // (_PROBES + 1))
        if start < stop and comes_before(data, start, stop):
            return True
    return False


@helper
def has_echoes(data: Array, spans: Array, runs: int) -> bool:
    """Whether many of the gaps between two runs were there before, both runs included, as in a mask of whole blocks.

    A mask of independent coordinates repeats up to 2 % of them, whatever its density, and zlib makes it 13 to 30 %
    larger than the runs alone do; from 8 % on the two are close, and far beyond it zlib's search pays.

    Parameters
    ----------
    data : uint8 array, shape (n,), n >= 8
        The packed mask.
    spans : int array, shape (m, 2)
        Start and stop of runs.
    runs : int
        How many rows of `spans` are in use; of more than 1024, those in the middle are looked at.
    """
    first = max((runs - _RUNS) // 2, 0)
    last = min(first + _RUNS, runs) - 1
    seen = np.zeros(4 * _RUNS, np.uint64)
    found = 0
    for i in range(first, last):
        key = load_word(data, min(spans[i, 1], data.size - 8)) * np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ np.uint64(spans[i, 1] - spans[i, 0])) * np.uint64(0xC2B2AE3D27D4EB4F)
        key = (key ^ np.uint64(spans[i + 1, 1] - spans[i + 1, 0])) * np.uint64(0x165667B19E3779F9)
        slot = key >> np.uint64(52)
        if seen[slot] == key:
            found += 1
        seen[slot] = key
    return found > max((last - first) // _SHARE, _FEW_ECHOES)


@helper
def costly_string(data: Array, costs: Array, place: int) -> tuple[int, int]:
    """Start and stop of a string of 40 bits near a place, from a rare byte on; equal if there is none.

    Parameters
    ----------
    data : uint8 array, shape (n,)
    costs : int64 array, shape (symbols,)
        Bits of each byte's code.
    """
    start, best = place, 0
    for candidate in range(_CANDIDATES):
        # Odd steps, so that candidates fall on all columns of a matrix.
        i = min(place + candidate * 61, data.size - 2)
        cost = costs[data[i]] + costs[data[i + 1]]
        if cost > best:
            start, best = i, cost
    stop, cost = start + 1, costs[data[start]]
    while cost < _INFORMATION and stop < min(data.size, start + _LONGEST):
        # A byte that follows itself tells next to nothing in a sparse mask.
        cost += costs[data[stop]] if data[stop] != data[stop - 1] else 0
        stop += 1
    return start, stop if cost >= _INFORMATION else start


@helper
def comes_before(data: Array, start: int, stop: int) -> bool:
    """Whether a string is also in the 32 KiB before its start."""
    first, second = data[start], data[start + 1]
    for block in range(max(0, start - _WINDOW), start - _BLOCK, _BLOCK):
        here, after = data[block : block + _BLOCK], data[block + 1 : block + 1 + _BLOCK]
        near = False
        for i in range(_BLOCK):
            near |= (here[i] == first) & (after[i] == second)
        if not near:
            continue
        for i in range(block, block + _BLOCK):
            length = 0
            while start + length < stop and data[i + length] == data[start + length]:
                length += 1
            if start + length == stop:
                return True
    return False
