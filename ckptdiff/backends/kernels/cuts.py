"""Kernels on the histograms of one tensor: where cuts fall, and the rounding null of ``low_coverage``.

A checkpoint can hold tens of thousands of small tensors, so what is done once per tensor is compiled too.
"""

from __future__ import annotations

import math

import numpy as np

from ckptdiff.backends.kernel_cache import helper, kernel
from ckptdiff.backends.kernels.tiles import Array

__all__ = ["cut_from_bottom", "cut_from_top", "fit_null", "null_overlap"]


@kernel
def cut_from_bottom(counts: Array, first: int, last: int, rank: int) -> tuple[int, int]:
    """Bin of the ``rank``-th smallest entry, and how many lie in the bins below it.

    Parameters
    ----------
    counts : int64 array
        Histogram; only bins ``first`` to ``last`` are looked at.
    rank : int
        From 1. Past the end: (last + 1, total).
    """
    below = 0
    for bin_ in range(first, last + 1):
        if below + counts[bin_] >= rank:
            return bin_, below
        below += counts[bin_]
    return last + 1, below


@kernel
def cut_from_top(counts: Array, first: int, last: int, rank: int) -> tuple[int, int]:
    """Bin of the ``rank``-th largest entry, and how many lie in the bins above it; past the end: (first - 1, total)."""
    above = 0
    for bin_ in range(last, first - 1, -1):
        if above + counts[bin_] >= rank:
            return bin_, above
        above += counts[bin_]
    return first - 1, above


@helper
def moved(up: float, down: float, sigma: float) -> float:
    """Chance that a Gaussian step leaves the rounding interval [-down, up]."""
    scale = 1.0 / (sigma * math.sqrt(2.0))
    return 0.5 * math.erfc(up * scale) + 0.5 * math.erfc(down * scale)


@kernel
def fit_null(weights: Array, up: Array, down: Array, first: int, last: int, changed: int) -> float:
    """Sigma of the Gaussian update that changes as many coordinates after rounding, by bisection in log sigma.

    Parameters
    ----------
    weights : int64 array, shape (bins,)
        Coordinates by magnitude code.
    up, down : float64 array, shape (bins,)
        Half the gap to the next larger and smaller value of each code.
    first, last : int
        Bins in use; all of finite values.
    changed : int
        Above 0 and below the sum of ``weights``.
    """
    # Codes of one binade share their gaps (but for its first, whose lower gap is half as wide), so a few dozen runs
    # of equal gaps stand for thousands of codes.
    runs_up, runs_down = np.empty(last - first + 1), np.empty(last - first + 1)
    sizes = np.zeros(last - first + 1)
    runs = 0
    for code in range(first, last + 1):
        if weights[code] == 0:
            continue
        if runs == 0 or runs_up[runs - 1] != up[code] or runs_down[runs - 1] != down[code]:
            runs_up[runs], runs_down[runs] = up[code], down[code]
            runs += 1
        sizes[runs - 1] += weights[code]
    low, high = math.log(min(runs_up[0], runs_down[0])) - 60.0, math.log(runs_up[runs - 1]) + 60.0
    while high - low > 1e-13 * max(1.0, abs(low)):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        expected = 0.0
        for run in range(runs):
            expected += sizes[run] * moved(runs_up[run], runs_down[run], math.exp(middle))
        if expected < changed:
            low = middle
        else:
            high = middle
    return math.exp(0.5 * (low + high))


@kernel
def null_overlap(
    weights: Array, up: Array, down: Array, first: int, last: int, sigma: float, ranks: Array, overlap: Array
) -> float:
    """Expected number of coordinates that a Gaussian update moves, and of those among the smallest weights.

    Parameters
    ----------
    weights, up, down, first, last
        As in ``fit_null``.
    sigma : float
    ranks : int64 array
        How many of the smallest weights, ascending.
    overlap : float64 array
        Receives one expectation per rank; ties at a cut count fractionally.

    Returns
    -------
    float
        Expected number over all coordinates.
    """
    total, below, chance = 0.0, 0, 0.0
    last_up, last_down = -1.0, -1.0
    for code in range(first, last + 1):
        if weights[code] == 0:
            continue
        if up[code] != last_up or down[code] != last_down:
            last_up, last_down = up[code], down[code]
            chance = moved(last_up, last_down, sigma)
        for r in range(ranks.size):
            taken = min(max(ranks[r] - below, 0), weights[code])
            overlap[r] += taken * chance
        total += weights[code] * chance
        below += weights[code]
    return total
