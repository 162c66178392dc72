"""Compute the checksum at the end of a zlib stream (RFC 1950, section 8.2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.deflate.huffman import Array
from ckptdiff.jit import helper

__all__ = ["adler32"]

_PRIME = 65521
_LANES = 64
_ROWS = 2048
"""Rows of lanes after which the sums of sums of 255 could pass 32 bits soon."""


@helper
def adler32(data: Array) -> Any:
    """Adler-32 of a uint8 array.

    The first half is 1 plus the sum of the bytes; the second is the sum of the first half after each byte. The bytes
    are taken as rows of lanes, so that both become sums by lane, which vector units do.
    """
    low: Any = 1
    high: Any = 0
    for start in range(0, data.size - _LANES + 1, _LANES * _ROWS):
        rows = min((data.size - start) // _LANES, _ROWS)
        sums, rising = np.zeros(_LANES, np.uint32), np.zeros(_LANES, np.uint32)
        for row in range(rows):
            piece = data[start + row * _LANES : start + (row + 1) * _LANES]
            for lane in range(_LANES):
                sums[lane] += piece[lane]
                rising[lane] += sums[lane]
        high += low * rows * _LANES
        for lane in range(_LANES):
            low += np.int64(sums[lane])
            high += np.int64(rising[lane]) * _LANES - np.int64(sums[lane]) * lane
        low, high = low % _PRIME, high % _PRIME
    for i in range(data.size // _LANES * _LANES, data.size):
        low += np.int64(data[i])
        high += low
    return (high % _PRIME) << 16 | low % _PRIME
