"""Make Huffman codes as deflate wants them (RFC 1951, section 3.2.2)."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.jit import helper

Array: TypeAlias = NDArray[Any]


@helper
def code_lengths(counts: Array, longest: int, lengths: Array) -> None:
    """Huffman code lengths of at least two symbols; codes that would be longer than `longest` are shortened.

    Parameters
    ----------
    counts : int64 array, shape (symbols,)
    lengths : int64 array, shape (symbols,)
        Receives the lengths; 0 for a symbol that does not occur.
    """
    keys = np.empty(counts.size, np.int64)
    weights = np.empty(2 * counts.size, np.int64)
    parents = np.empty(2 * counts.size, np.int64)
    depths = np.empty(2 * counts.size, np.int64)
    of_length = np.zeros(longest + 1, np.int64)
    leaves = sort_keys(counts, keys)
    for leaf in range(leaves):
        weights[leaf] = keys[leaf] >> 16
    leaf, node = 0, leaves
    for top in range(leaves, 2 * leaves - 1):
        weights[top] = 0
        for _ in range(2):
            # The lighter of the next leaf and the next unused node; both queues are sorted.
            if leaf < leaves and (node == top or weights[leaf] <= weights[node]):
                child, leaf = leaf, leaf + 1
            else:
                child, node = node, node + 1
            weights[top] += weights[child]
            parents[child] = top
    depths[2 * leaves - 2] = 0
    room = 1 << longest
    for child in range(2 * leaves - 3, -1, -1):
        depths[child] = depths[parents[child]] + 1
        if child < leaves:
            length = min(depths[child], longest)
            of_length[length] += 1
            room -= 1 << (longest - length)
    while room < 0:
        # Each step moves a code of the longest length beside a shorter one, which gets a bit longer.
        length = longest - 1
        while of_length[length] == 0:
            length -= 1
        of_length[length] -= 1
        of_length[length + 1] += 2
        of_length[longest] -= 1
        room += 1
    leaf = 0
    for length in range(longest, 0, -1):
        for _ in range(of_length[length]):
            lengths[keys[leaf] & 0xFFFF] = length
            leaf += 1


@helper
def sort_keys(counts: Array, keys: Array) -> int:
    """Sort the symbols in use by count, then by symbol, six bits of the count at a time; a key is a count and a symbol.

    To compare counts would cost a misprediction at every other comparison. Both arrays have shape (symbols,); of `keys`
    the first entries, as many as are returned, are written.
    """
    found, largest = 0, 0
    for symbol in range(counts.size):
        if counts[symbol]:
            keys[found] = counts[symbol] << 16 | symbol
            largest = max(largest, counts[symbol])
            found += 1
    ordered = np.empty(found, np.int64)
    shift = 16
    while largest:
        ends = np.zeros(65, np.int64)
        for i in range(found):
            ends[((keys[i] >> shift) & 63) + 1] += 1
        for digit in range(64):
            ends[digit + 1] += ends[digit]
        for i in range(found):
            digit = (keys[i] >> shift) & 63
            ordered[ends[digit]] = keys[i]
            ends[digit] += 1
        for i in range(found):
            keys[i] = ordered[i]
        largest >>= 6
        shift += 6
    return found


@helper
def used(costs: Array) -> int:
    """Symbols up to the last one in use."""
    count = costs.size
    while costs[count - 1] == 0:
        count -= 1
    return count


@helper
def canonical(lengths: Array) -> Array:
    """Codes of the given lengths, first bit lowest."""
    codes = np.zeros(lengths.size, np.int64)
    following = np.zeros(17, np.int64)
    for symbol in range(lengths.size):
        following[lengths[symbol] + 1] += 1
    following[1] = 0
    for bits in range(1, 16):
        following[bits + 1] = (following[bits] + following[bits + 1]) << 1
    for symbol in range(lengths.size):
        bits = lengths[symbol]
        if bits:
            codes[symbol] = reversed_bits(following[bits]) >> (16 - bits)
            following[bits] += 1
    return codes


@helper
def reversed_bits(code: int) -> int:
    """The low 16 bits in the opposite order."""
    code = (code & 0x5555) << 1 | (code >> 1) & 0x5555
    code = (code & 0x3333) << 2 | (code >> 2) & 0x3333
    code = (code & 0x0F0F) << 4 | (code >> 4) & 0x0F0F
    return (code & 0x00FF) << 8 | (code >> 8) & 0x00FF
