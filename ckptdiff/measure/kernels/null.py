"""Compute the rounding null: what Gaussian noise of the update's size, rounded to the grid, would do.

A weight moves up once noise takes it over half the gap to its upper neighbour, and down likewise. Where the base is
stored as it is compared, weights lie on grid points. Where it is stored wider, the cast has moved each by an unknown
part of a step, taken as uniform over the cell: then noise far smaller than a step moves some weights too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.cuts import count_run
from ckptdiff.measure.kernels.tiles import Array

NO_CHANCE = 39.0
"""Sigmas that a float64 chance does not reach."""
FINE = 0.375
"""Half a gap in sigmas below which the grid adds a fixed variance to that of noise, within float64."""
DENSITY = 1.0 / math.sqrt(2.0 * math.pi)


class Gaps(NamedTuple):
    """How far each finite magnitude bin of a format is from rounding to a neighbour."""

    up: Array
    """Half the gap to the next larger value, float64, shape (bins,)."""
    down: Array
    """Half the gap to the next smaller value; ascending with the bin, and at most ``up``."""
    runs: Array
    """First bins of runs whose bins share both gaps, int64, and behind them the number of bins."""


@helper
def exceeds(gap: float) -> float:
    """Chance that a Gaussian step exceeds ``gap`` sigmas to one side."""
    return 0.5 * math.erfc(gap * math.sqrt(0.5))


@helper
def density(gap: float) -> float:
    """Derivative, by the logarithm of sigma, of the chance that a Gaussian step exceeds ``gap`` sigmas."""
    return gap * math.exp(-0.5 * gap * gap) * DENSITY


@helper
def spread(cell: float) -> float:
    """Chance that a Gaussian step leaves a cell of ``cell`` sigmas to one side, from a uniform place in it."""
    if cell == 0.0:
        return 0.5
    return exceeds(cell) - DENSITY * math.expm1(-0.5 * cell * cell) / cell


@helper
def moves(half: float, off: float) -> float:
    """Chance to move to one side, half a gap being ``half`` sigmas, of which a part ``off`` lies off the grid."""
    on_grid = exceeds(half) if half <= NO_CHANCE else 0.0
    return on_grid if off == 0.0 else (1.0 - off) * on_grid + off * spread(2.0 * half)


@helper
def moves_slope(half: float, off: float) -> float:
    """Derivative of ``moves`` by the logarithm of sigma."""
    on_grid = density(half) if half <= NO_CHANCE else 0.0
    return on_grid if off == 0.0 else (1.0 - off) * on_grid + off * (spread(2.0 * half) - exceeds(2.0 * half))


@helper
def energy(step: float, sigma: float, off: float) -> tuple[float, float]:
    """Expected d^2 to one side where half a gap is ``step``, and its derivative by the logarithm of sigma.

    Of a weight on the grid, sum over k of (k u)^2 P(k) with u = 2 ``step``; of one off it, the mean over its cell.
    """
    half, gap, square = step / sigma, 2.0 * step, 0.5 * sigma * sigma
    if half < FINE:
        return square + gap * gap * (1.0 + off) / 24.0, 2.0 * square
    total, slope = 0.0, 0.0
    if off < 1.0:
        k, term = 1.0, 1.0
        while term > 1e-17 * total and k * half <= NO_CHANCE:
            term = k * exceeds(k * half)
            total += term
            slope += k * density(k * half)
            k += 2.0
        total *= (1.0 - off) * gap * gap
        slope *= (1.0 - off) * gap * gap
    if off > 0.0:
        mean, kernel_ = DENSITY, DENSITY
        z = 2.0 * half
        while z < 9.0:
            phi = DENSITY * math.exp(-0.5 * z * z)
            mean += 2.0 * (phi - z * exceeds(z))
            kernel_ += 2.0 * phi
            z += 2.0 * half
        total += off * gap * sigma * mean
        slope += off * gap * sigma * kernel_
    return total, slope


@helper
def gather(weights: Array, gaps: Gaps, first: int, last: int, steps: Array, sizes: Array) -> tuple[int, int]:
    """Write the distinct half gaps, ascending, and the coordinates above or below which each lies.

    A few dozen gaps stand for thousands of bins. Returns the place of the last one, and the number of coordinates.
    """
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
    return top, total


@helper
def expected(steps: Array, sizes: Array, top: int, sigma: float, off: float, squares: bool) -> tuple[float, float]:
    """Expected number of changes, or sum of d^2, over all gaps, and its derivative by the logarithm of sigma."""
    total, slope = 0.0, 0.0
    for gap in range(top + 1):
        if off == 0.0 and steps[gap] > NO_CHANCE * sigma:
            break
        if squares:
            one, its_slope = energy(steps[gap], sigma, off)
        else:
            one, its_slope = moves(steps[gap] / sigma, off), moves_slope(steps[gap] / sigma, off)
        total += sizes[gap] * one
        slope += sizes[gap] * its_slope
    return total, slope


@helper
def solve(steps: Array, sizes: Array, top: int, target: float, off: float, start: float, squares: bool) -> float:
    """Sigma at which as much is expected, by Newton's method from the logarithm ``start`` on."""
    low, high = min(math.log(steps[0]) - 60.0, start - 60.0), max(math.log(steps[top]) + 60.0, start + 60.0)
    if off > 0.0:  # changes fall off with sigma itself, not with a Gaussian tail
        low -= 60.0
    at = start
    for _ in range(200):
        found, slope = expected(steps, sizes, top, math.exp(at), off, squares)
        if found < target:
            low = at
        else:
            high = at
        if slope <= 0.0 or found <= 0.0:
            step = math.inf
        elif squares:  # over many powers of ten, and straight where both are logarithms
            step = math.log(target / found) * found / slope
        else:
            step = (target - found) / slope
        if abs(step) <= 1e-8 * max(1.0, abs(at)):
            at += step  # the digits double with each step
            break
        if high - low <= 1e-13 * max(1.0, abs(low)):
            break
        # Newton's step while it stays between the bounds; far off, where the slope says nothing, halve them.
        at = at + step if low < at + step < high and abs(step) < 4.0 else 0.5 * (low + high)
    return math.exp(at)


@helper
def fit(steps: Array, sizes: Array, top: int, total: int, changed: int, off: float) -> float:
    """Do as ``fit_null`` with the gaps that ``gather`` wrote."""
    middle, seen = 0, sizes[0]
    while seen < total:  # half of all gaps: there are two for each coordinate
        middle += 1
        seen += sizes[middle]
    return solve(steps, sizes, top, np.float64(changed), off, math.log(steps[middle]), False)


@kernel
def fit_null(weights: Array, gaps: Gaps, first: int, last: int, changed: int, off: float) -> float:
    """Sigma of the Gaussian update that changes as many coordinates after rounding: above 0, and not all of them.

    ``weights``, int64 of shape (bins,), counts coordinates by magnitude; all of bins ``first`` to ``last`` are finite.
    Of a part ``off`` of them the base was stored wider and lies between grid points.
    """
    steps, sizes = np.empty(2 * gaps.runs.size), np.zeros(2 * gaps.runs.size)
    top, total = gather(weights, gaps, first, last, steps, sizes)
    return fit(steps, sizes, top, total, changed, off)


@helper
def left_unchanged(steps: Array, sizes: Array, top: int, total: int, square: float, off: float) -> float:
    """Expected number of coordinates that a Gaussian update of this sum of d^2, after rounding, leaves unchanged.

    ``square`` is finite; ``gather`` wrote the gaps.
    """
    if top < 0 or square <= 0.0:
        return np.float64(total)
    sigma = solve(steps, sizes, top, square, off, 0.5 * math.log(square / total), True)
    changed, _ = expected(steps, sizes, top, sigma, off, False)
    return np.float64(total) - changed


@helper
def null_overlap(
    weights: Array, gaps: Gaps, first: int, last: int, sigma: float, off: float, ranks: Array, overlap: Array
) -> float:
    """Expected number of coordinates that a Gaussian update moves; in ``overlap``, of those among the smallest weights.

    ``ranks``, int64 of shape (k,), tells how many of the smallest, ascending; ``overlap``, float64 of shape (k,),
    receives an expectation for each, ties at a cut counted fractionally. All else as in ``fit_null``.
    """
    total, below, at = 0.0, 0, 0
    for run in range(gaps.runs.size - 1):
        start, stop = max(gaps.runs[run], first), min(gaps.runs[run + 1], last + 1)
        count = count_run(weights, start, stop) if start < stop else 0
        if count == 0:
            continue
        # All of the run have one chance, so it does not matter which of them a cut leaves out.
        chance = moves(gaps.up[start] / sigma, off) + moves(gaps.down[start] / sigma, off)
        while at < ranks.size and ranks[at] <= below + count:
            overlap[at] = total + (ranks[at] - below) * chance
            at += 1
        total += count * chance
        below += count
    for rest in range(at, ranks.size):
        overlap[rest] = total
    return total


@kernel
def change_chance(gaps: Gaps, first: int, last: int, sigma: float, off: float, chances: Array) -> None:
    """Write the chance of each magnitude bin ``first`` to ``last`` to change; parameters as in ``null_overlap``."""
    for code in range(first, last + 1):
        chances[code] = moves(gaps.up[code] / sigma, off) + moves(gaps.down[code] / sigma, off)
