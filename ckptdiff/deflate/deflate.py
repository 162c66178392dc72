"""Encode bit-packed masks as deflate: one block of Huffman codes and runs of one byte (RFC 1951, section 3.2.7).

Masks of updates hold few repeated strings, so the search for them, where zlib spends its time, is left out. What
remains is several times faster than zlib with Z_RLE or Z_HUFFMAN_ONLY, and smaller: only runs that pay are coded as
runs.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from ckptdiff.deflate.bit_writer import Bits, equal_after, equal_before, load_word, put, store_word
from ckptdiff.deflate.huffman import Array, canonical, code_lengths, used
from ckptdiff.deflate.repeats import has_echoes, has_repeats
from ckptdiff.jit import helper, kernel

_SYMBOLS = 286
_END = 256
_LONGEST = 258
_LONGEST_CODE = 14
"""One less than deflate allows: four codes and seven bits left over then fit 64 bits."""
_MANY_RUNS = 512
_FEW_BYTES = 4
"""Of few bytes each takes a bit that a longer string would share."""
_ORDER = np.array([16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15])
_ADLER_PRIME, _ADLER_LANES = 65521, 64
_ADLER_ROWS = 2048
"""Rows of lanes after which the sums of sums of 255 could pass 32 bits soon."""
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


class Deflated(NamedTuple):
    """A stream, if it pays, and whether another encoder might do better."""

    stream: bytes | None
    """A zlib stream; None if it would not have stayed below the limit."""
    repeats: bool
    """Whether strings come again, so that a search for them pays."""


def deflate(data: Array, limit: int) -> Deflated:
    """Compress contiguous bytes, one at least, to a zlib stream that has to stay below `limit` bytes."""
    return deflate_parts(data, np.array([[0, data.size, limit]]))[0]


def deflate_parts(data: Array, parts: Array, search: bool = True) -> list[Deflated]:
    """Compress parts of an array, each to a zlib stream of its own, in one compiled call.

    Parameters
    ----------
    data : contiguous uint8 array
    parts : int64 array, shape (k, 3)
        First byte, stop and limit of each part, none of them empty.
    search : bool
        Whether to look for strings that come again; else none are told. Where nearly all bytes are zeros, that takes
        ten times as long as to encode them.
    """
    sizes = parts[:, 1] - parts[:, 0]
    room = int(np.minimum(parts[:, 2], sizes + 6).sum()) + 64
    longest = int(sizes.max(initial=0))
    if getattr(_scratch, "room", -1) < room or _scratch.longest < longest:
        # Kept for the next chunk: fresh pages for each would cost as much as the encoding.
        _scratch.room, _scratch.longest = room, longest
        _scratch.out = np.empty(room, np.uint8)
        _scratch.spans = np.empty((longest // 8 + 1, 2), np.int64)
    ends, repeats = np.empty(len(parts) + 1, np.int64), np.empty(len(parts), np.bool_)
    ends[0] = 0
    _encode_parts(data, parts, search, _scratch.spans, _scratch.out, ends, repeats)
    # Bytes are cut several times as fast as arrays are.
    streams, bounds = _scratch.out[: ends[-1]].tobytes(), ends.tolist()
    return [
        Deflated(streams[start:stop] if stop > start else None, again)
        for start, stop, again in zip(bounds, bounds[1:], repeats.tolist(), strict=False)
    ]


@kernel
def _encode_parts(
    data: Array, parts: Array, search: bool, spans: Array, out: Array, ends: Array, repeats: Array
) -> None:
    """Write the stream of each part after that of the one before; ``ends[i + 1]`` tells where it stops."""
    for i in range(len(parts)):
        part = data[parts[i, 0] : parts[i, 1]]
        size, repeats[i] = encode(part, spans, min(parts[i, 2], part.size + 6), out[ends[i] :], search)
        ends[i + 1] = ends[i] + size


@helper
def encode(data: Array, spans: Array, limit: int, out: Array, search: bool = True) -> tuple[int, bool]:
    """Write the stream; returns its bytes, 0 if there would be `limit` or more, and whether strings come again."""
    counts, costs = np.zeros(_SYMBOLS, np.int64), np.zeros(_SYMBOLS, np.int64)
    runs = count_symbols(data, spans, counts)
    code_lengths(counts, _LONGEST_CODE, costs)
    repeats = False
    if search and runs > data.size // _MANY_RUNS:
        repeats = has_echoes(data, spans, runs)
    elif search:
        repeats = has_repeats(data, costs)
        bytes_used = 0
        for byte in range(256):
            bytes_used += min(counts[byte], 1)
        repeats |= bytes_used <= _FEW_BYTES
    header = np.empty((_SYMBOLS + 1, 3), np.int64)
    header_counts, header_costs = np.zeros(19, np.int64), np.zeros(19, np.int64)
    header_size = header_symbols(costs, header, header_counts)
    code_lengths(header_counts, 7, header_costs)
    bits = 17 + 3 * 19
    for i in range(header_size):
        bits += header_costs[header[i, 0]] + header[i, 1]
    for symbol in range(_SYMBOLS):
        bits += counts[symbol] * (costs[symbol] + _EXTRA[symbol])
    size = 2 + (bits + 7) // 8 + 4
    if size >= limit:
        return 0, repeats
    state = put(out, (np.uint64(0), np.uint64(0), 0), 0x0178, 16)
    state = put(out, state, 0b101 | (used(costs) - 257) << 3 | 15 << 13, 17)
    for i in range(19):
        state = put(out, state, header_costs[_ORDER[i]], 3)
    codes = canonical(header_costs)
    for i in range(header_size):
        symbol, extra, value = header[i, 0], header[i, 1], header[i, 2]
        state = put(out, state, codes[symbol] | value << header_costs[symbol], header_costs[symbol] + extra)
    codes = canonical(costs)
    byte_codes, byte_costs = codes.view(np.uint64), costs.view(np.uint64)
    position = 0
    for i in range(runs + 1):
        start, stop = (spans[i, 0], spans[i, 1]) if i < runs else (data.size, data.size)
        state = put_bytes(out, state, data[position:start], byte_codes, byte_costs)
        state = put_run(out, state, stop - start, codes, costs)
        position = stop
    put(out, state, codes[_END], costs[_END])
    checksum = adler32(data)
    for i in range(4):
        out[size - 4 + i] = (checksum >> (24 - 8 * i)) & 0xFF
    return size, repeats


@helper
def count_symbols(data: Array, spans: Array, counts: Array) -> int:
    """Find runs of one byte, and how often each symbol is written; the spans leave out the first byte of each run.

    Only runs of eight bytes or more are looked for, from the end of the last one on in steps of eight bytes: shorter
    ones would save nothing, as the code of a byte that often follows itself has one or two bits.

    Parameters
    ----------
    data : uint8 array, shape (n,)
    spans : int64 array, shape (n // 8 + 1, 2)
        Receives start and stop of as many runs as are returned.
    counts : int64 array, shape (symbols,)
        Receives how often each symbol is written.
    """
    # Four tables, so that equal bytes in a row do not wait for each other's sums.
    tables = np.zeros((4, 256), np.int64)
    a, b, c, d = tables[0], tables[1], tables[2], tables[3]
    found, free, i = 0, 0, 0
    while i < data.size - 7:
        word = load_word(data, i)
        if word != (word << np.uint64(8) | word >> np.uint64(56)):
            a[word & np.uint64(0xFF)] += 1
            b[(word >> np.uint64(8)) & np.uint64(0xFF)] += 1
            c[(word >> np.uint64(16)) & np.uint64(0xFF)] += 1
            d[(word >> np.uint64(24)) & np.uint64(0xFF)] += 1
            a[(word >> np.uint64(32)) & np.uint64(0xFF)] += 1
            b[(word >> np.uint64(40)) & np.uint64(0xFF)] += 1
            c[(word >> np.uint64(48)) & np.uint64(0xFF)] += 1
            d[word >> np.uint64(56)] += 1
            i += 8
            continue
        start = i - equal_before(load_word(data, i - 8) ^ word) if i - 8 >= free else i
        a[data[i]] -= i - start - 1
        i += 8
        while i < data.size - 7 and load_word(data, i) == word:
            i += 8
        if i < data.size - 7:
            i += equal_after(load_word(data, i) ^ word)
        else:
            while i < data.size and data[i] == data[start]:
                i += 1
        spans[found, 0], spans[found, 1] = start + 1, i
        count_run(counts, i - start - 1)
        found, free = found + 1, i
    for left in range(i, data.size):
        a[data[left]] += 1
    for byte in range(256):
        counts[byte] = a[byte] + b[byte] + c[byte] + d[byte]
    counts[_END] = 1
    return found


@helper
def count_run(counts: Array, left: int) -> None:
    """Count the symbols of a run."""
    while left > 0:
        length = piece(left)
        counts[_RUNS[length, 0]] += 1
        left -= length


@helper
def piece(left: int) -> int:
    """Bytes of a run that its next code takes, so that what it leaves can be coded too."""
    length = min(left, _LONGEST)
    return length - 3 if 0 < left - length < 3 else length


@helper
def header_symbols(costs: Array, symbols: Array, counts: Array) -> int:
    """Code the code lengths: fills rows of symbol, extra bits and their value, and how often each symbol comes.

    Parameters
    ----------
    costs : int64 array, shape (symbols,)
    symbols : int64 array, shape (symbols + 1, 3)
        Receives as many rows as are returned.
    counts : int64 array, shape (19,)
        Added to.
    """
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
def put_bytes(out: Array, state: Bits, data: Array, codes: Array, costs: Array) -> Bits:
    """Append the codes of bytes, four at a time.

    Parameters
    ----------
    out : uint8 array
    data : uint8 array, shape (n,)
    codes, costs : uint64 array, shape (symbols,)
        Code of each byte, and its bits.
    """
    pending, count, position = state
    for i in range(0, data.size - 3, 4):
        a, b, c, d = data[i], data[i + 1], data[i + 2], data[i + 3]
        # What this pins below 64 is so already; the compiler does not know.
        second = costs[a] & np.uint64(63)
        third = (second + costs[b]) & np.uint64(63)
        fourth = (third + costs[c]) & np.uint64(63)
        pending |= (codes[a] | codes[b] << second | codes[c] << third | codes[d] << fourth) << count
        store_word(out, position, pending)
        count += fourth + costs[d]
        pending >>= count & np.uint64(56)
        position += np.int64(count >> np.uint64(3))
        count &= np.uint64(7)
    state = pending, count, position
    for i in range(data.size // 4 * 4, data.size):
        state = put(out, state, codes[data[i]], costs[data[i]])
    return state


@helper
def put_run(out: Array, state: Bits, left: int, codes: Array, costs: Array) -> Bits:
    """Append the codes of a run, as in ``put_bytes``, shape (symbols,); its distance, 1, is a zero bit."""
    while left > 0:
        length = piece(left)
        symbol, extra, value = _RUNS[length, 0], _RUNS[length, 1], _RUNS[length, 2]
        state = put(out, state, codes[symbol] | value << costs[symbol], costs[symbol] + extra + 1)
        left -= length
    return state


@helper
def adler32(data: Array) -> Any:
    """Adler-32 of a uint8 array, the checksum at the end of a zlib stream (RFC 1950, section 8.2).

    The first half is 1 plus the sum of the bytes; the second is the sum of the first half after each byte. The bytes
    are taken as rows of lanes, so that both become sums by lane, which vector units do.
    """
    low: Any = 1
    high: Any = 0
    for start in range(0, data.size - _ADLER_LANES + 1, _ADLER_LANES * _ADLER_ROWS):
        rows = min((data.size - start) // _ADLER_LANES, _ADLER_ROWS)
        sums, rising = np.zeros(_ADLER_LANES, np.uint32), np.zeros(_ADLER_LANES, np.uint32)
        for row in range(rows):
            lanes = data[start + row * _ADLER_LANES : start + (row + 1) * _ADLER_LANES]
            for lane in range(_ADLER_LANES):
                sums[lane] += lanes[lane]
                rising[lane] += sums[lane]
        high += low * rows * _ADLER_LANES
        for lane in range(_ADLER_LANES):
            low += np.int64(sums[lane])
            high += np.int64(rising[lane]) * _ADLER_LANES - np.int64(sums[lane]) * lane
        low, high = low % _ADLER_PRIME, high % _ADLER_PRIME
    for i in range(data.size // _ADLER_LANES * _ADLER_LANES, data.size):
        low += np.int64(data[i])
        high += low
    return (high % _ADLER_PRIME) << 16 | low % _ADLER_PRIME
