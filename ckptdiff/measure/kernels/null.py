"""Compute the rounding null: what a Gaussian update of the same size, rounded to the grid, would change."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.cuts import count_run
from ckptdiff.measure.kernels.tiles import Array

__all__ = ["Gaps", "change_chance", "fit_null", "null_overlap"]

NO_CHANCE = 39.0
"""Sigmas that a float64 chance does not reach."""


class Gaps(NamedTuple):
    """How far each finite magnitude code of a format is from rounding to a neighbour."""

    up: Array
    """Half the gap to the next larger value, float64, shape (codes,)."""
    down: Array
    """Half the gap to the next smaller value; ascending with the code, and at most ``up``."""
    runs: Array
    """First codes of runs whose codes share both gaps, int64, and behind them the number of codes."""


@helper
def exceeds(gap: float) -> float:
    """Chance that a Gaussian step exceeds ``gap`` sigmas to one side."""
    return 0.5 * math.erfc(gap * math.sqrt(0.5))


@helper
def density(gap: float) -> float:
    """Derivative, by the logarithm of sigma, of the chance that a Gaussian step exceeds ``gap`` sigmas."""
    return gap * math.exp(-0.5 * gap * gap) / math.sqrt(2.0 * math.pi)


@kernel
def fit_null(weights: Array, gaps: Gaps, first: int, last: int, changed: int) -> float:
    """Sigma of the Gaussian update that changes as many coordinates after rounding, by Newton's method.

    Parameters
    ----------
    weights : int64 array, shape (bins,)
        Coordinates by magnitude code.
    gaps : Gaps
    first, last : int
        Bins in use; all of finite values.
    changed : int
        Above 0 and below the sum of ``weights``.
    """
    # A few dozen gaps, each with the coordinates above and below which it lies, stand for thousands of codes.
    steps, sizes = np.empty(2 * gaps.runs.size), np.zeros(2 * gaps.runs.size)
    top, total = -1, 0
    for run in range(gaps.runs.size - 1):
        start, stop = max(gaps.runs[run], first), min(gaps.runs[run + 1], last + 1)
        count = count_run(weights, start, stop) if start < stop else 0
        if count == 0:
            continue
        for gap in (gaps.down[start], gaps.up[start]):
            if top < 0 or gap > steps[top]:
                top += 1
                steps[top] = gap
            sizes[top] += count
        total += count
    middle, seen = 0, sizes[0]
    while seen < total:  # half of all gaps: there are two for each coordinate
        middle += 1
        seen += sizes[middle]
    low, high = math.log(steps[0]) - 60.0, math.log(steps[top]) + 60.0
    at = math.log(steps[middle])
    for _ in range(200):
        expected, slope = 0.0, 0.0
        sigma = math.exp(at)
        for gap in range(top + 1):
            if steps[gap] > NO_CHANCE * sigma:
                break
            expected += sizes[gap] * exceeds(steps[gap] / sigma)
            slope += sizes[gap] * density(steps[gap] / sigma)
        if expected < changed:
            low = at
        else:
            high = at
        step = (changed - expected) / slope if slope > 0 else math.inf
        if abs(step) <= 1e-14 * max(1.0, abs(at)) or high - low <= 1e-13 * max(1.0, abs(low)):
            break
        # Newton's step while it stays between the bounds; far off, where the slope says nothing, halve them.
        at = at + step if low < at + step < high and abs(step) < 4.0 else 0.5 * (low + high)
    return math.exp(at)


@helper
def null_overlap(
    weights: Array, gaps: Gaps, first: int, last: int, sigma: float, ranks: Array, overlap: Array
) -> float:
    """Expected number of coordinates that a Gaussian update moves, and of those among the smallest weights.

    Parameters
    ----------
    weights, gaps, first, last
        As in ``fit_null``.
    sigma : float
    ranks : int64 array, shape (k,)
        How many of the smallest weights, ascending.
    overlap : float64 array, shape (k,)
        Receives one expectation per rank; ties at a cut count fractionally.

    Returns
    -------
    float
        Expected number over all coordinates.
    """
    total, below, at = 0.0, 0, 0
    for run in range(gaps.runs.size - 1):
        start, stop = max(gaps.runs[run], first), min(gaps.runs[run + 1], last + 1)
        count = count_run(weights, start, stop) if start < stop else 0
        if count == 0:
            continue
        # All of the run have one chance, so it does not matter which of them a cut leaves out.
        chance = exceeds(gaps.up[start] / sigma) + exceeds(gaps.down[start] / sigma)
        while at < ranks.size and ranks[at] <= below + count:
            overlap[at] = total + (ranks[at] - below) * chance
            at += 1
        total += count * chance
        below += count
    for rest in range(at, ranks.size):
        overlap[rest] = total
    return total


@kernel
def change_chance(gaps: Gaps, first: int, last: int, sigma: float, chances: Array) -> None:
    """Write the chance of each magnitude code ``first`` to ``last`` to change; parameters as in ``null_overlap``."""
    for code in range(first, last + 1):
        chances[code] = exceeds(gaps.up[code] / sigma) + exceeds(gaps.down[code] / sigma)
