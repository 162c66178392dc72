"""What a row asks of the histograms of a tensor: sizes of sets, groups by power of two, and the tables they take."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import FORMATS, Format
from ckptdiff.measure.histograms import LOG2_BINS, log2_bins
from ckptdiff.measure.kernels.cuts import Groups
from ckptdiff.measure.kernels.row import Wanted
from ckptdiff.measure.low_cuts import first_nan_bin
from ckptdiff.measure.partial import BINS
from ckptdiff.measure.rounding_null import half_gaps
from ckptdiff.measure.thresholds import RHO, TAU, P

__all__ = ["LARGEST", "SMALLEST", "log2_groups", "set_size", "set_sizes", "wanted"]

LARGEST = tuple(Fraction(str(p)) / 100 for p in P)
"""Fractions of coordinates whose energy ``coord_energy`` tells."""
SMALLEST = tuple(Fraction(str(rho)) for rho in RHO)
"""Fractions of smallest weights of ``low_coverage``."""


def set_size(fraction: Fraction, numel: int) -> int:
    """Size of a set that holds a fraction of the coordinates, rounded up, at least one."""
    return max(-(-numel * fraction.numerator // fraction.denominator), 1)


def set_sizes(fractions: tuple[Fraction, ...], numel: NDArray[np.int64]) -> NDArray[np.int64]:
    """Do as ``set_size`` for many tensors and fractions; shape (k, fractions)."""
    sizes = [-(-numel * fraction.numerator // fraction.denominator) for fraction in fractions]
    return np.maximum(np.stack(sizes, axis=1), 1)


@cache
def log2_groups(name: str) -> Groups:
    """Log2 bins of the bins of a format's magnitude histogram; ``LOG2_BINS`` for bins that are not finite.

    A bin of several float32 or float64 subnormals counts as its smallest nonzero power of two.
    """
    format = FORMATS[name]
    if format.bits <= 16:
        values = np.zeros(BINS)
        values[: format.infinite] = format.values()[: format.infinite]
        finite = format.infinite
    else:
        codes = np.arange(BINS).astype(format.code_dtype) << format.code_dtype.type(format.bits - 16)
        finite = format.infinite >> (format.bits - 16)
        values = np.where(np.arange(BINS) < finite, codes.view(f"f{format.bits // 8}"), 0).astype(np.float64)
    bins = log2_bins(values)
    bins[finite:] = LOG2_BINS
    starts = np.append(0, np.flatnonzero(np.diff(bins)) + 1)
    return Groups(np.append(starts, BINS), bins[starts])


@cache
def wanted(compare: Format) -> Wanted:
    """What to find in the histograms of tensors of a compare format, and the tables that it takes."""
    groups = log2_groups("f32"), log2_groups(compare.name)
    return Wanted(np.array(TAU), first_nan_bin(compare), *groups, half_gaps(compare.name))
