"""Read zlib streams of known size in compiled code (RFC 1950 and 1951): thousands of short ones in one call.

zlib takes longer to get ready for a stream of some hundred bytes than to read it, and the interpreter to hand it over.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.deflate.bit_writer import load_word
from ckptdiff.deflate.deflate import adler32
from ckptdiff.deflate.huffman import Array, reversed_bits
from ckptdiff.jit import helper

__all__ = ["inflate"]

_END = 256
_LONGEST_CODE = 15
_ORDER = np.array([16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15])


def _ranges(extra: list[int], first: int) -> Array:
    """Of symbols that stand for ranges of so many extra bits, which follow each other, the first value and those."""
    return np.array([(first + sum(1 << bits for bits in extra[:place]), bits) for place, bits in enumerate(extra)])


_LENGTHS = np.append(_ranges([0] * 8 + [bits for bits in range(1, 6) for _ in range(4)], 3)[:28], [[258, 0]], axis=0)
_DISTANCES = _ranges([0] * 4 + [bits for bits in range(1, 14) for _ in range(2)], 1)


@helper
def inflate(data: Array, out: Array) -> bool:
    """Read a zlib stream that holds as many bytes as there is room for, and nothing behind it.

    Parameters
    ----------
    data : uint8 array
    out : uint8 array
        Receives what it holds.

    Returns
    -------
    bool
        Whether it is such a stream, its checksum included; if not, what was received is worth nothing.
    """
    if data.size < 8 or (data[0] & 15) != 8 or data[0] >> 4 > 7 or data[1] & 32:
        return False
    if (np.int64(data[0]) << 8 | np.int64(data[1])) % 31:
        return False
    # Words are loaded from any byte of it on, and a symbol is read before it is known to end in time.
    padded = np.zeros(data.size + 16, np.uint8)
    padded[: data.size] = data
    lengths = np.zeros(320, np.int64)
    at: Any = 16
    stop, done, final = 8 * (data.size - 4), 0, False
    while not final:
        word = _bits(padded, at)
        final, kind = word & 1 == 1, word >> 1 & 3
        at += 3
        if kind == 0:
            first = (at + 7) >> 3
            size = _bits(padded, 8 * first) & 0xFFFF
            if size != ~(_bits(padded, 8 * first) >> 16) & 0xFFFF:
                return False
            at = 8 * (first + 4 + size)
            if at > stop or done + size > out.size:
                return False
            out[done : done + size] = padded[first + 4 : first + 4 + size]
            done += size
        elif kind == 3:
            return False
        else:
            literals, distances = 288, 32
            if kind == 1:
                lengths[:144], lengths[144:256], lengths[256:280], lengths[280:288] = 8, 9, 7, 8
                lengths[288:] = 5
            else:
                at, literals, distances = _read_lengths(padded, at, stop, lengths)
                if not literals:
                    return False
            symbols, behind = _table(lengths[:literals]), _table(lengths[literals : literals + distances])
            at, done = _read_block(padded, at, stop, symbols, behind, out, done)
            if at < 0:
                return False
        if at > stop:
            return False
    if (at + 7) >> 3 != data.size - 4 or done != out.size:
        return False
    checksum: Any = 0
    for i in range(4):
        checksum = checksum << 8 | np.int64(data[data.size - 4 + i])
    return bool(checksum == adler32(out))


@helper
def _bits(padded: Array, at: Any) -> Any:
    """The bits from a place on, 48 of them at least, the first one lowest."""
    return np.int64(load_word(padded, at >> 3) >> np.uint64(at & 7)) & 0xFFFFFFFFFFFFFF


@helper
def _read_lengths(padded: Array, at: Any, stop: Any, lengths: Array) -> tuple[Any, Any, Any]:
    """Read the lengths of a block's codes; returns where they end, and of how many symbols, or 0 if they cannot be."""
    word = _bits(padded, at)
    literals, distances, count = 257 + (word & 31), 1 + (word >> 5 & 31), 4 + (word >> 10 & 15)
    at += 14
    if literals > 286 or distances > 30 or at + 3 * count > stop:
        return at, 0, 0
    lengths[:19] = 0
    for i in range(count):
        lengths[_ORDER[i]] = _bits(padded, at) & 7
        at += 3
    table, found = _table(lengths[:19]), 0
    while found < literals + distances:
        word = _bits(padded, at)
        entry: Any = np.int64(table[word & (table.size - 1)])
        bits, symbol = entry & 15, entry >> 4
        if at > stop or not bits or (symbol == 16 and not found):
            return at, 0, 0
        value, times = symbol, 1
        if symbol > 15:
            extra = 2 if symbol == 16 else 3 if symbol == 17 else 7
            value = lengths[found - 1] if symbol == 16 else 0
            times = (11 if symbol == 18 else 3) + (word >> bits & ((1 << extra) - 1))
            bits += extra
        at += bits
        if found + times > literals + distances:
            return at, 0, 0
        lengths[found : found + times] = value
        found += times
    return at, literals, distances


@helper
def _table(lengths: Array) -> Array:
    """Of each sequence of as many bits as the longest code has, the symbol that it begins with, and its bits.

    Sequences that no code begins have none; of codes that cannot be, all have none.
    """
    counts, following = np.zeros(_LONGEST_CODE + 1, np.int64), np.zeros(_LONGEST_CODE + 2, np.int64)
    for length in lengths:
        counts[length] += 1
    longest = _LONGEST_CODE
    while longest > 1 and not counts[longest]:
        longest -= 1
    room = 1
    for bits in range(1, longest + 1):
        room = 2 * room - counts[bits]
        following[bits + 1] = (following[bits] + counts[bits]) << 1
        if room < 0:
            return np.zeros(1 << longest, np.uint16)
    table = np.zeros(1 << longest, np.uint16)
    if room and longest > 1:  # as zlib has it: a single code of one bit may leave room
        return table
    for symbol in range(lengths.size):
        length = lengths[symbol]
        if length:
            for place in range(reversed_bits(following[length]) >> (16 - length), table.size, 1 << length):
                table[place] = symbol << 4 | length
            following[length] += 1
    return table


@helper
def _read_block(
    padded: Array, at: Any, stop: Any, symbols: Array, behind: Array, out: Array, done: Any
) -> tuple[Any, Any]:
    """Read the symbols of a block; returns where it ends, or -1, and how many bytes there are then."""
    mask = symbols.size - 1
    while at <= stop:
        word, last = _bits(padded, at), at + 56 - _LONGEST_CODE
        entry = np.int64(symbols[word & mask])
        while 0 < entry < _END << 4 and at <= last and done < out.size:  # bytes, as many as one word holds
            out[done] = entry >> 4
            done += 1
            at += entry & 15
            word >>= entry & 15
            entry = np.int64(symbols[word & mask])
        if at > last or (0 < entry < _END << 4 and done < out.size):
            continue
        word = _bits(padded, at)
        bits, symbol = entry & 15, entry >> 4
        if not bits or symbol < _END:
            return -1, done
        at += bits
        if symbol == _END:
            return at, done
        if symbol > _END + len(_LENGTHS):
            return -1, done
        length, extra = _LENGTHS[symbol - _END - 1]
        length += word >> bits & ((1 << extra) - 1)
        at += extra
        word = _bits(padded, at)
        entry = np.int64(behind[word & (behind.size - 1)])
        bits = entry & 15
        if not bits or entry >> 4 >= len(_DISTANCES):
            return -1, done
        distance, extra = _DISTANCES[entry >> 4]
        distance += word >> bits & ((1 << extra) - 1)
        at += bits + extra
        if distance > done or done + length > out.size:
            return -1, done
        for place in range(done, done + length):
            out[place] = out[place - distance]
        done += length
    return -1, done
