"""A quick look for repeated strings, to know when a search for them pays."""

from __future__ import annotations

from ckptdiff.backends.kernel_cache import helper
from ckptdiff.runfile.huffman import Array

__all__ = ["has_repeats"]

_PROBES = 6
_CANDIDATES = 32
_INFORMATION = 40
_LONGEST = 1024
_WINDOW = 32768
_BLOCK = 64


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
def costly_string(data: Array, costs: Array, place: int) -> tuple[int, int]:
    """Start and stop of a string of 40 bits near a place, from a rare byte on; equal if there is none."""
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
