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

__all__ = ["change_chances", "half_gaps"]


def change_chances(weights: NDArray[np.int64], changed: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Chance of a weight of each bfloat16 magnitude to change, under the null.

    Parameters
    ----------
    weights, changed : int64 array, shape (32768,)
        Finite coordinates by magnitude code, and those that changed.

    Returns
    -------
    float64 array, shape (32768,), or None
        None if nothing changed or everything did; zero for codes that no weight has.
    """
    used = np.flatnonzero(weights)
    support = int(changed.sum())
    if not 0 < support < int(weights.sum()):
        return None
    gaps = half_gaps("bf16")
    first, last = int(used[0]), int(used[-1])
    chances = np.zeros(weights.size)
    change_chance(gaps, first, last, fit_null(weights, gaps, first, last, support), chances)
    chances[weights == 0] = 0.0
    return chances


@cache
def half_gaps(name: str) -> Gaps:
    """Half the gaps from each finite magnitude code of a format to its neighbours."""
    format = FORMATS[name]
    values = format.values()[: format.infinite].astype(np.float64)
    half = np.diff(values) / 2
    # Zero has the least subnormal on both sides; above the largest value its own binade goes on.
    up, down = np.append(half, half[-1]), np.insert(half, 0, half[0])
    differs = (np.diff(up) != 0) | (np.diff(down) != 0)
    return Gaps(up, down, np.concatenate([[0], np.flatnonzero(differs) + 1, [up.size]]))
