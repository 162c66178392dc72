"""Hold what is known of whole tensors, a row each: what the columns of the run file are made of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.histograms import LOG2_BINS
from ckptdiff.measure.partial import ULP_BINS, Count, Sum
from ckptdiff.measure.thresholds import EPS, RHO, TAU, P


class Records(NamedTuple):
    """Figures of k tensors."""

    complete: NDArray[np.bool_]
    """Whether all is known; if not, the row is to be filled by further passes."""
    counts: NDArray[np.int64]
    """Shape (k, len(Count)), as in a Partial; of integer and opaque tensors all else is zero."""
    within: NDArray[np.int64]
    """Shape (k, thresholds)."""
    within_rel: NDArray[np.int64]
    """Changed coordinates with |d| <= tau RMS(W0), shape (k, taus)."""
    sums: NDArray[np.float64]
    """Shape (k, len(Sum))."""
    max_abs: NDArray[np.float64]
    finite: NDArray[np.int64]
    """Coordinates with finite d."""
    base_square: NDArray[np.float64]
    """Sum of W0^2 over them."""
    support: NDArray[np.int64]
    """Changed coordinates whose base is not NaN."""
    energies: NDArray[np.float64]
    """Sum of the largest d^2, shape (k, percentages)."""
    overlaps: NDArray[np.float64]
    """Expected number of changed coordinates among the smallest weights, shape (k, fractions)."""
    nulls: NDArray[np.float64]
    """Their share of the support under the rounding null, NaN where undefined."""
    still: NDArray[np.float64]
    """Coordinates that noise of the update's norm would leave unchanged after rounding, NaN where undefined."""
    delta_log2: NDArray[np.uint64]
    """Histograms by power of two, shape (k, log2 bins); ``ulp`` has ``ULP_BINS``."""
    base_log2: NDArray[np.uint64]
    changed_log2: NDArray[np.uint64]
    ulp: NDArray[np.uint64]


def empty_records(tensors: int) -> Records:
    """Rows in which nothing is known yet."""
    # One room for all: for each array of zeros NumPy lets go of Python's lock, and a thread that has to wait for its
    # turn a dozen times in a task waits as long as it measures.
    kinds: list[tuple[type[np.generic], int]] = [  # after `complete`; of each tensor so many numbers, or one for 0
        (np.int64, len(Count)),
        (np.int64, len(EPS)),
        (np.int64, len(TAU)),
        (np.float64, len(Sum)),
        (np.float64, 0),
        (np.int64, 0),
        (np.float64, 0),
        (np.int64, 0),
        (np.float64, len(P)),
        (np.float64, len(RHO)),
        (np.float64, len(RHO)),
        (np.float64, 0),
        (np.uint64, LOG2_BINS),
        (np.uint64, LOG2_BINS),
        (np.uint64, LOG2_BINS),
        (np.uint64, ULP_BINS),
    ]
    room = np.zeros((sum(max(width, 1) for _, width in kinds) + 1) * tensors, np.int64)
    fields, stop = [], 0
    for dtype, width in kinds:
        start, stop = stop, stop + max(width, 1) * tensors
        field = room[start:stop].view(dtype)
        fields.append(field.reshape(tensors, width) if width else field)
    records = Records(room[stop:].view(np.bool_)[:tensors], *fields)
    records.nulls.fill(np.nan)
    records.still.fill(np.nan)
    return records


def put_row(records: Records, row: int, one: Records) -> None:
    """Put what is known of one tensor in place of a row."""
    for target, source in zip(records, one, strict=True):
        target[row] = source[0]
