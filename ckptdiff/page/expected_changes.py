"""Where rounded noise would fall: the changes that a Gaussian update leaves, by the magnitude of the weight.

As :mod:`ckptdiff.measure.kernels.null` does for figures, of bins of a power of two instead of single codes: all weights
of a bin have one step of the grid, so only what is below a bin's first code is taken a little too coarse.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.histograms import LOG2_BINS, LOG2_LOWEST

_STEPS = 64
"""Of sigma, in a power of two."""
_LOWEST, _HIGHEST = -48 * _STEPS, 48 * _STEPS
"""Half a step of the grid in sigmas: below the first nothing stays, above the last nothing moves."""
_GRIDS = {
    "bf16": (7, -133),
    "f16": (10, -24),
    "f32": (23, -149),
    "f64": (52, -1074),
    "f8_e4m3": (3, -9),
    "f8_e5m2": (2, -16),
}
"""Explicit digits of each format, and the exponent of its smallest step."""

Floats = NDArray[np.float64]


@cache
def _chances() -> tuple[Floats, Floats]:
    """Chance to leave a cell of half a step of 2^(k / 64) sigmas, from its middle and from a uniform place in it."""
    halves = np.exp2(np.arange(_LOWEST, _HIGHEST + 1) / _STEPS)
    middle = np.array([math.erfc(half * math.sqrt(0.5)) for half in halves])
    cells = 2.0 * halves
    beyond = np.array([math.erfc(cell * math.sqrt(0.5)) for cell in cells])
    return middle, beyond - 2.0 * np.expm1(-0.5 * cells**2) / (cells * math.sqrt(2.0 * math.pi))


def expected_changes(base: NDArray[np.uint64], changed: Floats, formats: list[str], off: Floats) -> Floats:
    """Expected number of changes in each bin, if noise had changed as many coordinates of each tensor.

    Parameters
    ----------
    base : uint64 array, shape (tensors, 279)
        Coordinates by floor(log2 |W0|).
    changed : float64 array, shape (tensors,)
        How many of them changed.
    formats : list of str
        What each tensor was compared as.
    off : float64 array, shape (tensors,)
        Part of its base that lies off the grid.

    Returns
    -------
    float64 array, shape (279,)
        Of all tensors together.
    """
    used = np.flatnonzero(base.any(axis=0))
    counts = base[:, used].astype(np.float64)
    digits, lowest = np.array([_GRIDS[name] for name in formats], np.int64).reshape(-1, 2).T
    # Zero lies among the smallest steps.
    exponents = np.where(used > 0, used + (LOG2_LOWEST - 1), -(1 << 14))
    halves = (np.maximum(exponents - digits[:, None], lowest[:, None]) - 1) * _STEPS
    middle, spread = _chances()

    def chances(sigmas: NDArray[np.int64]) -> Floats:
        at = np.clip(halves - sigmas[:, None], _LOWEST, _HIGHEST) - _LOWEST
        found: Floats = middle[at]
        return found if not off.any() else (1.0 - off[:, None]) * found + off[:, None] * spread[at]

    # The more noise, the more changes: sigma is bracketed by halves, in 64ths of a power of two.
    low = np.full(len(counts), halves.min(initial=0) - 64 * _STEPS)
    high = np.full(len(counts), halves.max(initial=0) + 64 * _STEPS)
    while np.any(high - low > 1):
        at = (low + high) // 2
        enough = (counts * chances(at)).sum(axis=1) >= changed
        low, high = np.where(enough, low, at), np.where(enough, at, high)
    fewer, more = counts * chances(low), counts * chances(high)
    least, most = fewer.sum(axis=1), more.sum(axis=1)
    part = np.divide(changed - least, most - least, out=np.ones_like(least), where=most > least)[:, None]
    found = np.zeros(LOG2_BINS)
    found[used] = (fewer + np.clip(part, 0.0, 1.0) * (more - fewer)).sum(axis=0)
    return found
