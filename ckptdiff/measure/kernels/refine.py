"""Make the further passes: the bits below a bin, where a cut falls inside it.

A first scan leaves each cut (the k-th largest |d|, the k-th smallest |W0|) inside one bin of 15 leading bits. If the
values of that bin differ, a further pass counts the next 16 bits of those that share its leading bits, and so on until
every bit of the cut is known.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ckptdiff.codes.bits import float_bits
from ckptdiff.codes.fetch import FETCH, Side, fetch
from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.changed import find_changed, first_of, keep_finite
from ckptdiff.measure.kernels.deltas import count_within
from ckptdiff.measure.kernels.span import Workspace, codes_of, values_of
from ckptdiff.measure.kernels.stored import Stored
from ckptdiff.measure.kernels.tiles import TILE, Array, Facts
from ckptdiff.measure.partial import BLOCK


class Search(NamedTuple):
    """The arrays of :class:`~ckptdiff.measure.partial.Targets`."""

    shift: Any
    deltas: Array
    weights: Array
    thresholds: Array
    tails: Array


class Found(NamedTuple):
    """The arrays of a :class:`~ckptdiff.measure.partial.Refined`, with the tails of the span's blocks."""

    deltas: Array
    weights: Array
    within: Array
    tails: Array


@helper
def count_weights(codes: Array, marks: Array, magnitude: Any, search: Search, weights: Array) -> None:
    """Count the next bits of base codes, shape (n,), that share the known bits of a cut.

    Changed ones have a bit of ``marks``, uint64 of shape (ceil(n / 64),). ``weights``, int64 of shape
    (len(search.weights), 2, 2**16), is added to.
    """
    for r in range(search.weights.size):
        for i in range(codes.size):
            size = np.uint64(codes[i] & magnitude)
            if size >> search.shift == search.weights[r]:
                next_bits = (size >> (search.shift - np.uint64(16))) & np.uint64(0xFFFF)
                weights[r, 0, next_bits] += 1
                weights[r, 1, next_bits] += (marks[i >> 6] >> np.uint64(i & 63)) & np.uint64(1)


@helper
def search_deltas(delta: Array, search: Search, found: Found, tails: Array) -> None:
    """Count the next bits of d, shape (n,), and what is within thresholds; sum what is above tails, shape (tails,)."""
    for r in range(search.deltas.size):
        for j in range(delta.size):
            size = np.uint64(float_bits(abs(delta[j])))
            if size >> search.shift == search.deltas[r]:
                found.deltas[r, (size >> (search.shift - np.uint64(16))) & np.uint64(0xFFFF)] += 1
    for t in range(search.thresholds.size):
        found.within[t] += count_within(delta, search.thresholds[t])
    for t in range(search.tails.size):
        for j in range(delta.size):
            if abs(delta[j]) > search.tails[t]:
                tails[t] += np.float64(delta[j]) ** 2


@kernel
def refine_span(
    sides: tuple[Side, Side],
    stored: tuple[Stored, Stored] | None,
    extent: tuple[int, int],
    facts: Facts,
    work: Workspace,
    search: Search,
    found: Found,
) -> int:
    """Pass over a span of blocks as :func:`~ckptdiff.measure.kernels.span.scan_span` does; ``found`` is added to."""
    first, numel = extent
    widths = sides[0].itemsize, sides[1].itemsize
    magnitude = work.codes[0].dtype.type(facts.magnitude)
    while first < numel:
        stop = min(first + FETCH, numel)
        base, tuned = fetch(sides[0], first, stop), fetch(sides[1], first, stop)
        if base.size < (stop - first) * widths[0] or tuned.size < (stop - first) * widths[1]:
            break
        for start in range(0, stop - first, TILE):
            end = min(start + TILE, stop - first)
            a = codes_of(base[start * widths[0] : end * widths[0]], stored, 0, work)
            b = codes_of(tuned[start * widths[1] : end * widths[1]], stored, 1, work)
            some = first_of(work.tile, find_changed(a, b, magnitude, work.tile))
            count_weights(a, work.tile.marks, magnitude, search, found.weights)
            values_of(facts, some)
            some = first_of(work.tile, keep_finite(some))
            search_deltas(some.delta, search, found, found.tails[first // BLOCK])
        first = stop
    return first
