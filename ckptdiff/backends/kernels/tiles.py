"""Steps over one cache-sized tile, shared by all kernels.

Most coordinates of an update did not change, and those add nothing to any figure of d. So a kernel marks what changed,
gathers the changed coordinates, and does everything about d on those alone. Each loop here is short and branch-free so
that LLVM vectorises it; fused into one loop they would not be.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ckptdiff.backends.formats import Format, is_wide
from ckptdiff.backends.kernel_cache import helper, reducer
from ckptdiff.backends.kernels.bits import bits_float, float_bits, floor_log2, lowest_bit, pack64, population
from ckptdiff.backends.partial import Count, Partial, Rule, Scan, Sum

__all__ = [
    "TILE",
    "Array",
    "Facts",
    "Measure",
    "Tile",
    "Totals",
    "add_ulp",
    "count_deltas",
    "count_distances",
    "count_nonfinite",
    "count_strange",
    "facts_of",
    "first_of",
    "keep_finite",
    "mark_changed",
    "mask_tile",
    "new_measure",
    "new_tile",
    "positions",
    "round_down",
    "summarise",
    "totals_of",
    "widen_span",
]

TILE = 1 << 15
"""Coordinates in a tile; its buffers stay in the caches of one core. A multiple of 64, at most 2**16."""

Array = Any  # Numba infers element types; NumPy's own would have to be generic over every width

WITHIN_ETA, MASKED = int(Count.WITHIN_ETA), int(Count.MASKED)
DELTA, ABS_DELTA, DELTA_SQUARE = int(Sum.DELTA), int(Sum.ABS_DELTA), int(Sum.DELTA_SQUARE)
BASE_DELTA, TIES = int(Sum.BASE_DELTA), int(Sum.TIES)
NO_RULE, ABOVE, ETA, TOP = int(Rule.NONE), int(Rule.ABOVE), int(Rule.ETA), int(Rule.TOP)


class Tile(NamedTuple):
    """Work space of one thread. All but ``marks`` and ``ulp`` hold one entry per changed coordinate."""

    marks: Array
    """One byte per coordinate of the tile: changed, later: in the mask."""
    found: Array
    """Positions in the tile, with room for eight more."""
    left: Array
    """Codes of the base."""
    right: Array
    """Codes of the tuned side."""
    base: Array
    """Values."""
    tuned: Array
    delta: Array
    distance: Array
    """In units of the last place."""
    ulp: Array
    """Four interleaved histograms: neighbours often fall into the same bin, and would wait for each other."""


class Measure(NamedTuple):
    """The parts of a :class:`~ckptdiff.backends.partial.Scan` that kernels need."""

    thresholds: Array
    """In the dtype of d, rounded down."""
    eta: float
    """0 where the grid of the compare format is coarser: nothing that changed is within it."""
    rule: int
    cut: float
    tie: Array
    """For ``Rule.TOP``: ordinal of the next coordinate at the cut, how many there are, how many to take."""
    native: bool
    """Both sides are stored in the compare format: the kernel counts NaN and Inf."""
    wide: bool
    """The base is stored wider than the compare format."""


class Facts(NamedTuple):
    """What kernels know of the compare format."""

    magnitude: Any
    """Mask of the magnitude bits of a code, and the first magnitude that is not finite; both uint64."""
    infinite: Any
    values: Array
    """Value of every code as float32; empty for bfloat16 and for formats whose codes are NumPy floats."""


@cache
def facts_of(compare: Format) -> Facts:
    """What kernels know of a compare format."""
    lookup = compare.bits <= 16 and compare.name != "bf16"
    values = (compare.values() if lookup else np.zeros(0, np.float32)).view()
    values.flags.writeable = False
    return Facts(np.uint64(compare.magnitude), np.uint64(compare.infinite), values)


class Totals(NamedTuple):
    """The arrays of a :class:`~ckptdiff.backends.partial.Partial` that kernels add to."""

    counts: Array
    within: Array
    sums: Array
    """One row per block of the span at hand."""
    weights: Array
    deltas: Array
    span: Array
    ulp: Array
    max_abs: Array


def new_tile(code: np.dtype[Any], real: np.dtype[Any]) -> Tile:
    """Work space for codes and a d of the given dtypes."""
    left, right = np.zeros((2, TILE), code)
    base, tuned, delta = np.zeros((3, TILE), real)
    distance = np.zeros(TILE, np.uint32 if code.itemsize == 2 else np.uint64)
    found = np.zeros(TILE + 8, np.uint16)
    return Tile(np.zeros(TILE, np.uint8), found, left, right, base, tuned, delta, distance, np.zeros((4, 64), np.int64))


@helper
def first_of(tile: Tile, count: int) -> Tile:
    """The work space cut to its first entries."""
    return Tile(
        tile.marks,
        tile.found[:count],
        tile.left[:count],
        tile.right[:count],
        tile.base[:count],
        tile.tuned[:count],
        tile.delta[:count],
        tile.distance[:count],
        tile.ulp,
    )


@helper
def count_strange(delta: Array) -> Any:
    """How many d are NaN or Inf."""
    strange: Any = np.int32(0)
    for j in range(delta.size):
        strange = np.int32(strange + (not abs(delta[j]) < np.inf))
    return strange


@helper
def keep_finite(tile: Tile) -> int:
    """Move the entries with finite d to the front; returns how many there are."""
    kept = 0
    for j in range(tile.delta.size):
        if abs(tile.delta[j]) < np.inf:
            tile.found[kept], tile.left[kept], tile.right[kept] = tile.found[j], tile.left[j], tile.right[j]
            tile.base[kept], tile.tuned[kept], tile.delta[kept] = tile.base[j], tile.tuned[j], tile.delta[j]
            kept += 1
    return kept


@helper
def count_deltas(delta: Array, magnitude: Any, shift: Any, totals: Totals) -> None:
    """Histogram of |d|, for a d of 32 bits with the moments of the bits below each bin."""
    smallest, largest = magnitude, type(magnitude)(0)
    for j in range(delta.size):
        bits = type(magnitude)(float_bits(delta[j]) & magnitude)
        smallest = bits if bits < smallest else smallest
        largest = bits if bits > largest else largest
    widen_span(totals.span, 2, int(smallest >> shift), int(largest >> shift))
    totals.max_abs[0] = max(totals.max_abs[0], np.float64(bits_float(largest)))
    for j in range(delta.size):
        bits = float_bits(delta[j]) & magnitude
        bin_ = bits >> shift
        totals.deltas[0, bin_] += np.uint64(1)
        if shift == 16:
            below = np.uint64(bits & 0xFFFF)
            if below:
                totals.deltas[1, bin_] += below
                totals.deltas[2, bin_] += below * below


@helper
def count_distances(tile: Tile) -> None:
    """Histogram of floor(log2(distance)); ``add_ulp`` brings it into the totals."""
    for j in range(tile.distance.size):
        tile.ulp[j & 3, floor_log2(np.uint64(tile.distance[j]))] += 1


@helper
def add_ulp(tile: Tile, ulp: Array) -> None:
    """Add the interleaved histograms to ``ulp`` and clear them."""
    for row in range(4):
        for k in range(64):
            ulp[k] += tile.ulp[row, k]
            tile.ulp[row, k] = 0


def new_measure(scan: Scan, real: np.dtype[Any], first_tie: int = 0) -> Measure:
    """Kernel parameters of a scan."""
    thresholds = np.array([round_down(threshold, real) for threshold in scan.thresholds], real)
    tie = np.array([first_tie, scan.ties, scan.take], np.int64)
    # Two bfloat16 values that differ do so by 2**-8 of the larger one at least.
    eta = 0.0 if scan.compare.name == "bf16" and scan.eta < 2**-8 else scan.eta
    native = scan.base == scan.tuned == scan.compare
    return Measure(thresholds, eta, int(scan.rule), scan.cut, tie, native, is_wide(scan.base, scan.compare))


def round_down(value: float, real: np.dtype[Any]) -> float:
    """Largest value of a dtype that does not exceed ``value``: comparing with either is the same."""
    rounded = real.type(value)
    return float(np.nextafter(rounded, real.type(-np.inf)) if float(rounded) > value else rounded)


def totals_of(partial: Partial, blocks: int) -> Totals:
    """The arrays of a partial, with the sums of its last blocks."""
    sums = partial.sums[len(partial.sums) - blocks :]
    return Totals(
        partial.counts,
        partial.within,
        sums,
        partial.weights,
        partial.deltas,
        partial.span,
        partial.ulp,
        partial.max_abs,
    )


@helper
def mark_changed(a: Array, b: Array, magnitude: Any, marks: Array) -> None:
    """Mark codes that differ and are not +0 and -0; clear the marks after the end up to a multiple of 64."""
    n = a.size
    for i in range(n):
        marks[i] = ((a[i] ^ b[i]) != 0) & (((a[i] | b[i]) & magnitude) != 0)
    for i in range(n, (n + 63) // 64 * 64):
        marks[i] = 0


@helper
def positions(marks: Array, n: int, found: Array) -> int:
    """Write the positions of set marks in ascending order; returns how many there are.

    A loop that ends with the last set bit would end anywhere, and the processor guess wrong. So eight positions are
    written whatever there is (what is too many is overwritten by the next word), and more only where there are more.
    """
    count = 0
    for j in range((n + 63) // 64):
        word = pack64(marks, j * 64)
        total = population(word)
        for k in range(8):
            found[count + k] = np.uint16(np.uint64(j * 64) + lowest_bit(word))
            word &= word - np.uint64(1)
        if total > 8:
            for k in range(8, total):
                found[count + k] = np.uint16(np.uint64(j * 64) + lowest_bit(word))
                word &= word - np.uint64(1)
        count += total
    return count


@helper
def count_nonfinite(codes: Array, magnitude: Any, infinite: Any) -> Any:
    """How many codes are NaN or Inf."""
    count: Any = np.int32(0)
    for i in range(codes.size):
        count = np.int32(count + ((codes[i] & magnitude) >= infinite))
    return count


@helper
def widen_span(span: Array, at: int, first: int, last: int) -> None:
    """Note that bins ``first`` to ``last`` of a histogram are in use."""
    span[at] = min(span[at], first)
    span[at + 1] = max(span[at + 1], last)


@helper
def count_within(delta: Array, threshold: Any) -> Any:
    """How many |delta| <= threshold."""
    count: Any = np.int32(0)
    for j in range(delta.size):
        count = np.int32(count + (abs(delta[j]) <= threshold))
    return count


@helper
def count_within_eta(tile: Tile, eta: float) -> Any:
    """How many |delta| <= eta max(|base|, |tuned|)."""
    count: Any = np.int32(0)
    for j in range(tile.delta.size):
        left, right = abs(np.float64(tile.base[j])), abs(np.float64(tile.tuned[j]))
        larger = left if left > right else right
        count = np.int32(count + (abs(np.float64(tile.delta[j])) <= eta * larger))
    return count


@reducer
def add_sums(base: Array, delta: Array, sums: Array) -> None:
    """Add the sums over changed coordinates, in float64."""
    total, magnitude, square, product = 0.0, 0.0, 0.0, 0.0
    for j in range(delta.size):
        d = np.float64(delta[j])
        total += d
        magnitude += abs(d)
        square += d * d
        product += np.float64(base[j]) * d
    sums[DELTA] += total
    sums[ABS_DELTA] += magnitude
    sums[DELTA_SQUARE] += square
    sums[BASE_DELTA] += product


@helper
def summarise(tile: Tile, measure: Measure, totals: Totals, sums: Array) -> None:
    """Count and sum over the changed coordinates of a tile."""
    add_sums(tile.base, tile.delta, sums)
    for t in range(measure.thresholds.size):
        if measure.thresholds[t] == 0:  # a changed coordinate has d != 0
            continue
        totals.within[t] += count_within(tile.delta, measure.thresholds[t])
    if measure.eta > 0:
        totals.counts[WITHIN_ETA] += count_within_eta(tile, measure.eta)


@helper
def drop_outside(tile: Tile, measure: Measure, sums: Array) -> int:
    """Clear the marks of changed coordinates that the mask rule leaves out; returns how many it left out."""
    out = 0
    if measure.rule == ABOVE:
        for j in range(tile.delta.size):
            keep = abs(np.float64(tile.delta[j])) > measure.cut
            tile.marks[tile.found[j]] = keep
            out += not keep
    elif measure.rule == ETA:
        for j in range(tile.delta.size):
            larger = max(abs(np.float64(tile.base[j])), abs(np.float64(tile.tuned[j])))
            keep = abs(np.float64(tile.delta[j])) > measure.cut * larger
            tile.marks[tile.found[j]] = keep
            out += not keep
    elif measure.rule == TOP:
        ordinal, ties, take = measure.tie[0], measure.tie[1], measure.tie[2]
        for j in range(tile.delta.size):
            magnitude = abs(np.float64(tile.delta[j]))
            keep = magnitude > measure.cut
            if magnitude == measure.cut:
                sums[TIES] += 1
                keep = ties > 0 and (ordinal + 1) * take // ties > ordinal * take // ties
                ordinal += 1
            tile.marks[tile.found[j]] = keep
            out += not keep
        measure.tie[0] = ordinal
    return out


@helper
def mask_tile(tile: Tile, measure: Measure, changed: int, totals: Totals, sums: Array, words: Array) -> None:
    """Turn the marks of a tile into mask bits and count them; ``words`` is empty if only the count is wanted."""
    if measure.rule != NO_RULE:
        totals.counts[MASKED] += changed - drop_outside(tile, measure, sums)
        for j in range(words.size):
            words[j] = pack64(tile.marks, j * 64)
