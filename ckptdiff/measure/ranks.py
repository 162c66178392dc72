"""What a row asks of the histograms of a tensor: sizes of sets, groups by power of two, and the tables they take."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import FORMATS, Format
from ckptdiff.measure.histograms import LOG2_BINS, log2_bins
from ckptdiff.measure.kernels.cuts import Groups
from ckptdiff.measure.kernels.row import Wanted
from ckptdiff.measure.kernels.tiles import Facts, facts_of
from ckptdiff.measure.open_cuts import first_nan_bin
from ckptdiff.measure.partial import BINS
from ckptdiff.measure.rounding_null import half_gaps
from ckptdiff.measure.thresholds import RHO, TAU, P, exactly

LARGEST = tuple(exactly(p) / 100 for p in P)
"""Fractions of coordinates whose energy ``coord_energy`` tells."""
SMALLEST = tuple(map(exactly, RHO))
"""Fractions of smallest weights of ``low_coverage``."""


def set_size(fraction: Fraction, numel: Any) -> Any:
    """Size of a set that holds a fraction of the coordinates, rounded up, at least one; ``numel`` may be an array."""
    return np.maximum(-(-numel * fraction.numerator // fraction.denominator), 1)


def ranks_of(numel: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes of the sets of largest |d| and of smallest weights of k tensors, shape (k, ...) each."""
    largest, smallest = (np.stack([set_size(f, numel) for f in sizes], axis=1) for sizes in (LARGEST, SMALLEST))
    return largest, smallest


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
def tables_of(compare: Format) -> tuple[Facts, Wanted]:
    """What a compiled row needs to know of a compare format, and what it is to find."""
    width = 64 if compare.bits == 64 else 32
    groups = log2_groups(f"f{width}"), log2_groups(compare.name)
    below = max(compare.bits - 16, 0)
    return facts_of(compare), Wanted(
        np.array(TAU), first_nan_bin(compare), width, below, *groups, half_gaps(compare.name)
    )
