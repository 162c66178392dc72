"""A deflate encoder for bit-packed masks: one block of Huffman codes and runs of one byte (RFC 1951, section 3.2.7).

Masks of updates hold few repeated strings, so the search for them, where zlib spends its time, is left out. What
remains is several times faster than zlib with Z_RLE or Z_HUFFMAN_ONLY, and smaller: only runs that pay are coded as
runs.
"""

from __future__ import annotations

import threading
import zlib
from typing import Any

import numpy as np

from ckptdiff.backends.kernel_cache import helper, kernel
from ckptdiff.runfile.huffman import Array, canonical, code_lengths, used

__all__ = ["deflate"]

_SYMBOLS = 286
_END = 256
_LONGEST = 258
_ORDER = np.array([16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15])
_scratch = threading.local()


def _run_codes() -> Array:
    """Symbol, extra bits and their value for runs of every length."""
    codes = np.zeros((_LONGEST + 1, 3), np.int64)
    length = 3
    for symbol, extra in enumerate([0] * 8 + [bits for bits in range(1, 6) for _ in range(4)], _END + 1):
        for value in range(1 << extra):
            codes[min(length + value, _LONGEST)] = symbol, extra, value
        length += 1 << extra
    codes[_LONGEST] = _SYMBOLS - 1, 0, 0
    return codes


_RUNS = _run_codes()
_EXTRA = np.zeros(_SYMBOLS, np.int64)
"""Bits that follow each symbol's code: extra ones, and the one of the distance."""
_EXTRA[_RUNS[3:, 0]] = _RUNS[3:, 1] + 1


def deflate(data: Array, limit: int) -> tuple[bytes | None, Array]:
    """Compress bytes to a zlib stream.

    Parameters
    ----------
    data : contiguous uint8 array, shape (n,), n > 0
        What to compress.
    limit : int
        Bytes that the stream must stay below.

    Returns
    -------
    stream : bytes or None
        None if it would reach `limit`.
    costs : int64 array, shape (286,)
        Bits that each byte costs, 0 for one that occurs in runs only or never; then the end and the runs.
    """
    if getattr(_scratch, "size", -1) < data.size:
        # Kept for the next chunk: fresh pages for each would cost as much as the encoding.
        _scratch.size = data.size
        _scratch.out = np.empty(data.size // 4 + 8, np.uint32)
        _scratch.spans = np.empty((data.size // 8 + 1, 2), np.int64)
    costs = np.zeros(_SYMBOLS, np.int64)
    words = data[: data.size // 8 * 8].view(np.uint64)
    size = _encode(data, words, _scratch.spans, costs, min(limit - 6, data.size), _scratch.out)
    if size < 0:
        return None, costs
    block = _scratch.out.view(np.uint8)[:size].tobytes()
    return b"\x78\x01" + block + zlib.adler32(data.data).to_bytes(4, "big"), costs


@kernel
def _encode(data: Array, words: Array, spans: Array, costs: Array, limit: int, out: Array) -> int:
    """Write the block; returns its bytes, or -1 if there would be `limit` or more."""
    runs = find_runs(data, words, spans)
    counts = count_symbols(data, spans, runs)
    code_lengths(counts, 15, costs)
    header = np.empty((_SYMBOLS + 1, 3), np.int64)
    header_counts, header_costs = np.zeros(19, np.int64), np.zeros(19, np.int64)
    header_size = header_symbols(costs, header, header_counts)
    code_lengths(header_counts, 7, header_costs)
    bits = 17 + 3 * 19
    for i in range(header_size):
        bits += header_costs[header[i, 0]] + header[i, 1]
    for symbol in range(_SYMBOLS):
        bits += counts[symbol] * (costs[symbol] + _EXTRA[symbol])
    if bits > 8 * limit - 8:
        return -1
    state = put(out, (np.uint64(0), np.uint64(0), np.uint64(0)), 0b101 | (used(costs) - 257) << 3 | 15 << 13, 17)
    for i in range(19):
        state = put(out, state, header_costs[_ORDER[i]], 3)
    codes = canonical(header_costs)
    for i in range(header_size):
        symbol, extra, value = header[i, 0], header[i, 1], header[i, 2]
        state = put(out, state, codes[symbol] | value << header_costs[symbol], header_costs[symbol] + extra)
    codes = canonical(costs)
    position = 0
    for i in range(runs + 1):
        start, stop = (spans[i, 0], spans[i, 1]) if i < runs else (data.size, data.size)
        state = put_bytes(out, state, data[position:start], codes, costs)
        state = put_run(out, state, stop - start, codes, costs)
        position = stop
    state = put(out, state, codes[_END], costs[_END])
    put(out, state, 0, 0)  # what is left of the last word
    return (bits + 7) // 8


@helper
def find_runs(data: Array, words: Array, spans: Array) -> int:
    """Find runs that hold an aligned group of eight equal bytes; spans leave out the first byte of each.

    Shorter runs would save nothing: the code of a byte that often follows itself has one or two bits.
    """
    found, free, i = 0, 0, 0
    while i < words.size:
        word = words[i]
        if word != (word & np.uint64(0xFF)) * np.uint64(0x0101010101010101):
            i += 1
            continue
        start, byte = 8 * i, data[8 * i]
        while i < words.size and words[i] == word:
            i += 1
        stop = 8 * i
        while start > free and data[start - 1] == byte:
            start -= 1
        while stop < data.size and data[stop] == byte:
            stop += 1
        spans[found, 0], spans[found, 1] = start + 1, stop
        found, free, i = found + 1, stop, (stop + 7) // 8
    return found


@helper
def piece(left: int) -> int:
    """Bytes of a run that its next code takes, so that what it leaves can be coded too."""
    length = min(left, _LONGEST)
    return length - 3 if 0 < left - length < 3 else length


@helper
def count_symbols(data: Array, spans: Array, runs: int) -> Array:
    """How often each symbol is written."""
    # Four tables, so that equal bytes in a row do not wait for each other's sums.
    a, b, c, d = np.zeros(256, np.int64), np.zeros(256, np.int64), np.zeros(256, np.int64), np.zeros(256, np.int64)
    for i in range(0, data.size - 3, 4):
        a[data[i]] += 1
        b[data[i + 1]] += 1
        c[data[i + 2]] += 1
        d[data[i + 3]] += 1
    for i in range(data.size // 4 * 4, data.size):
        a[data[i]] += 1
    counts = np.zeros(_SYMBOLS, np.int64)
    for byte in range(256):
        counts[byte] = a[byte] + b[byte] + c[byte] + d[byte]
    counts[_END] = 1
    for i in range(runs):
        left = spans[i, 1] - spans[i, 0]
        counts[data[spans[i, 0]]] -= left
        while left > 0:
            length = piece(left)
            counts[_RUNS[length, 0]] += 1
            left -= length
    return counts


@helper
def header_symbols(costs: Array, symbols: Array, counts: Array) -> int:
    """Code the code lengths: fills rows of symbol, extra bits and their value, and how often each symbol comes."""
    last = used(costs)
    size, i = 0, 0
    while i <= last:
        length = costs[i] if i < last else 1  # at the end, the one code of the one distance
        left = 1
        while i + left < last and costs[i + left] == length:
            left += 1
        symbol, extra, value, taken = length, 0, 0, 1
        if length == 0 and left > 10:
            taken = min(left, 138)
            symbol, extra, value = 18, 7, taken - 11
        elif length == 0 and left > 2:
            taken = left
            symbol, extra, value = 17, 3, taken - 3
        elif i > 0 and left > 2 and length == costs[i - 1]:
            taken = min(left, 6)
            symbol, extra, value = 16, 2, taken - 3
        symbols[size, 0], symbols[size, 1], symbols[size, 2] = symbol, extra, value
        counts[symbol] += 1
        size, i = size + 1, i + taken
    return size


@helper
def put(out: Array, state: tuple[Any, Any, Any], code: int, bits: int) -> tuple[Any, Any, Any]:
    """Append up to 32 bits; the state is the bits not written yet, how many they are, and the next word."""
    pending, count, word = state
    pending |= np.uint64(code) << count
    count += np.uint64(bits)
    out[word] = np.uint32(pending & np.uint64(0xFFFFFFFF))
    full = count >> np.uint64(5)
    return pending >> (full << np.uint64(5)), count & np.uint64(31), word + full


@helper
def put_bytes(out: Array, state: tuple[Any, Any, Any], data: Array, codes: Array, costs: Array) -> tuple[Any, Any, Any]:
    """Append the codes of bytes, two at a time."""
    for i in range(0, data.size - 1, 2):
        first, second = data[i], data[i + 1]
        code = codes[first] | codes[second] << costs[first]
        state = put(out, state, code, costs[first] + costs[second])
    if data.size & 1:
        state = put(out, state, codes[data[-1]], costs[data[-1]])
    return state


@helper
def put_run(out: Array, state: tuple[Any, Any, Any], left: int, codes: Array, costs: Array) -> tuple[Any, Any, Any]:
    """Append the codes of a run; its distance, 1, is a zero bit."""
    while left > 0:
        length = piece(left)
        symbol, extra, value = _RUNS[length, 0], _RUNS[length, 1], _RUNS[length, 2]
        state = put(out, state, codes[symbol] | value << costs[symbol], costs[symbol] + extra + 1)
        left -= length
    return state
