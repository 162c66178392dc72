"""The thresholds, percentages and fractions of the figures; sources as in :mod:`ckptdiff.figures.catalogue`."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

EPS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
"""Absolute thresholds of ``unchanged_abs``; the headline is 1e-5 (S1, S2)."""
TAU = (1e-4, 1e-3, 1e-2)
"""Thresholds of ``unchanged_rel`` in units of RMS(W0); the headline is 1e-3 (S1)."""
P = (0.1, 1.0, 5.0)
"""Percentages of coordinates of ``coord_energy`` (S1)."""
RHO = (0.01, 0.05, 0.1, 0.2)
"""Fractions of smallest base weights of ``low_coverage``; the headline is 0.10 (S1)."""
ETA = 1e-3
"""Relative threshold of ``unchanged_eta`` (S3)."""


@cache
def exactly(share: float) -> Fraction:
    """A share as it is written: 0.1 is one tenth."""
    return Fraction(str(share))


def principal_rank(rho: float, short: int) -> int:
    """How many singular vectors a principal subspace takes of a matrix whose short side is `short`."""
    return max(1, math.floor(exactly(rho) * short))
