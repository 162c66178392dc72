"""Define what the kernels of one thread work on: a tile of both sides, what to measure, and what is added to."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ckptdiff.formats import Format, is_wide
from ckptdiff.measure.partial import Partial, Scan

TILE = 1 << 16
"""Coordinates in a tile; its buffers stay in the caches of one core. A multiple of 64, at most 2**16."""

Array = Any  # Numba infers element types; NumPy's own would have to be generic over every width


class Tile(NamedTuple):
    """Work space of one thread. From ``found`` on, one entry per changed coordinate.

    ``found``, ``left`` and ``right`` have room for 64 more.
    """

    marks: Array
    """One bit per coordinate of the tile: changed."""
    flags: Array
    """One byte per coordinate of the tile: in the mask; used by rules that leave changed coordinates out."""
    found: Array
    """Positions in the tile; known to those rules, and to all where codes are gathered by them."""
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
    """The parts of a :class:`~ckptdiff.measure.partial.Scan` that kernels need."""

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
    absorbs: bool
    """Either side is."""


class Facts(NamedTuple):
    """What kernels know of the compare format."""

    magnitude: Any
    """Mask of the magnitude bits of a code, and the first magnitude that is not finite; both uint64."""
    infinite: Any
    values: Array
    """Value of every code as float32; empty for bfloat16 and for formats whose codes are NumPy floats."""


class Totals(NamedTuple):
    """The arrays of a :class:`~ckptdiff.measure.partial.Partial` that kernels add to."""

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
    marks, flags, found = np.zeros(TILE // 64, np.uint64), np.zeros(TILE, np.uint8), np.zeros(TILE + 64, np.uint16)
    left, right = np.zeros((2, TILE + 64), code)
    base, tuned, delta = np.zeros((3, TILE), real)
    distance = np.zeros(TILE, np.uint16 if code.itemsize == 2 else np.uint64)
    return Tile(marks, flags, found, left, right, base, tuned, delta, distance, np.zeros((4, 64), np.int64))


def new_measure(scan: Scan, first_tie: int = 0) -> Measure:
    """Kernel parameters of a scan."""
    tie = np.array([first_tie, scan.ties, scan.take], np.int64)
    # Two bfloat16 values that differ do so by 2**-8 of the larger one at least.
    eta = 0.0 if scan.compare.name == "bf16" and scan.eta < 2**-8 else scan.eta
    native = scan.base == scan.tuned == scan.compare
    thresholds = _rounded_down(scan.thresholds, scan.compare.real)
    wide = is_wide(scan.base, scan.compare)
    absorbs = wide or is_wide(scan.tuned, scan.compare)
    return Measure(thresholds, eta, int(scan.rule), scan.cut, tie, native, wide, absorbs)


@cache
def _rounded_down(thresholds: tuple[float, ...], real: np.dtype[Any]) -> Array:
    return np.array([round_down(threshold, real) for threshold in thresholds], real)


def round_down(value: float, real: np.dtype[Any]) -> float:
    """Largest value of a dtype that does not exceed ``value``: comparing with either is the same."""
    rounded = real.type(value)
    return float(np.nextafter(rounded, real.type(-np.inf)) if float(rounded) > value else rounded)


@cache
def facts_of(compare: Format) -> Facts:
    """What kernels know of a compare format."""
    lookup = compare.bits <= 16 and compare.name != "bf16"
    values = (compare.values() if lookup else np.zeros(0, np.float32)).view()
    values.flags.writeable = False
    return Facts(np.uint64(compare.magnitude), np.uint64(compare.infinite), values)


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
