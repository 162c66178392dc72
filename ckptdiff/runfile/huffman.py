"""Huffman codes as deflate wants them (RFC 1951, section 3.2.2)."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.backends.kernel_cache import helper

__all__ = ["Array", "canonical", "code_lengths", "used"]

Array: TypeAlias = NDArray[Any]


@helper
def code_lengths(counts: Array, longest: int, lengths: Array) -> None:
    """Huffman code lengths of at least two symbols; counts are halved until no code is too long."""
    keys = np.empty(counts.size, np.int64)
    weights = np.empty(2 * counts.size, np.int64)
    parents = np.empty(2 * counts.size, np.int64)
    depths = np.empty(2 * counts.size, np.int64)
    halvings, deepest = 0, longest + 1
    while deepest > longest:
        leaves = sort_keys(counts, halvings, keys)
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
        depths[2 * leaves - 2] = deepest = 0
        for child in range(2 * leaves - 3, -1, -1):
            depths[child] = depths[parents[child]] + 1
            deepest = max(deepest, depths[child])
        halvings += 1
    for leaf in range(leaves):
        lengths[keys[leaf] & 0xFFFF] = depths[leaf]


@helper
def sort_keys(counts: Array, halvings: int, keys: Array) -> int:
    """Sort the symbols in use by count, by insertion; a key is a count and a symbol."""
    found = 0
    for symbol in range(counts.size):
        if counts[symbol]:
            key = (((counts[symbol] - 1) >> halvings) + 1) << 16 | symbol
            i = found
            while i > 0 and keys[i - 1] > key:
                keys[i] = keys[i - 1]
                i -= 1
            keys[i] = key
            found += 1
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
    code = 0
    for bits in range(1, 16):
        code <<= 1
        for symbol in range(lengths.size):
            if lengths[symbol] == bits:
                for bit in range(bits):
                    codes[symbol] |= ((code >> bit) & 1) << (bits - 1 - bit)
                code += 1
    return codes
