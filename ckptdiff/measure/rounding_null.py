"""Fit the null of ``low_coverage``: a Gaussian update of the same support, rounded to the grid of the compare dtype.

Small weights lie on a finer grid, so rounding alone makes any update "fall near zero". With N_h weights of magnitude
code h, gaps up_h and dn_h to half-way of its neighbours and a step N(0, sigma^2), a weight moves with chance
p_h = Phi(-up_h/sigma) + Phi(-dn_h/sigma); sigma is such that sum_h N_h p_h equals the size of the support.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import FORMATS
from ckptdiff.measure.kernels.null import Gaps, change_chance, fit_null


def change_chances(
    weights: NDArray[np.int64], changed: NDArray[np.int64], off: float = 0.0
) -> NDArray[np.float64] | None:
    """Chance of a weight of each bfloat16 magnitude to change, under the null; None if nothing changed or everything.

    ``weights`` and ``changed``, int64 of shape (32768,), count finite coordinates by magnitude code, and those that
    changed. Of a part ``off`` of them the base was stored wider and lies between values of bfloat16. The chance is zero
    for codes that no weight has.
    """
    used = np.flatnonzero(weights)
    support = int(changed.sum())
    if not 0 < support < int(weights.sum()):
        return None
    gaps = half_gaps("bf16")
    first, last = int(used[0]), int(used[-1])
    chances = np.zeros(weights.size)
    change_chance(gaps, first, last, fit_null(weights, gaps, first, last, support, off), off, chances)
    chances[weights == 0] = 0.0
    return chances


@cache
def half_gaps(name: str) -> Gaps:
    """Half the gaps from each finite magnitude bin of a format to its neighbours.

    Bins are codes, and in formats of more than 16 bits the leading bits, whose codes share a gap but for the lowest.
    """
    format = FORMATS[name]
    if format.bits > 16:
        mantissa, leading = {32: (23, 7), 64: (52, 4)}[format.bits]
        bias = (1 << (format.bits - 2 - mantissa)) - 1
        exponents = np.arange(format.infinite >> (format.bits - 16)) >> leading
        steps = np.ldexp(1.0, np.maximum(exponents, 1) - bias - mantissa - 1)
        steps = np.maximum(steps, np.finfo(np.float64).smallest_subnormal)
        return Gaps(steps, steps, np.append(np.flatnonzero(np.diff(steps, prepend=0.0)), steps.size))
    values = format.values()[: format.infinite].astype(np.float64)
    half = np.diff(values) / 2
    # Zero has the least subnormal on both sides; above the largest value its own binade goes on.
    up, down = np.append(half, half[-1]), np.insert(half, 0, half[0])
    differs = (np.diff(up) != 0) | (np.diff(down) != 0)
    return Gaps(up, down, np.concatenate([[0], np.flatnonzero(differs) + 1, [up.size]]))
