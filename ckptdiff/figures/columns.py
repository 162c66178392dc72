"""Make the columns and histograms of the run file of the records of whole tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.catalogue import COLUMNS, EPS, RHO, TAU, P, flat_key
from ckptdiff.formats import FORMATS
from ckptdiff.measure.histograms import LOG2_BINS, HistogramRows, log2_bins
from ckptdiff.measure.kernels.cuts import Groups
from ckptdiff.measure.partial import BINS, Count, Sum
from ckptdiff.measure.records import Records, new_records
from ckptdiff.options import MaskRule

__all__ = [
    "LARGEST",
    "SMALLEST",
    "Measured",
    "bits_only",
    "empty_records",
    "log2_groups",
    "measured",
    "set_size",
    "set_sizes",
]

LARGEST = tuple(Fraction(str(p)) / 100 for p in P)
"""Fractions of coordinates whose energy ``coord_energy`` tells."""
SMALLEST = tuple(Fraction(str(rho)) for rho in RHO)
"""Fractions of smallest weights of ``low_coverage``."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything known of k tensor pairs.

    Attributes
    ----------
    columns : dict of array, shape (k,)
        One for each of :data:`~ckptdiff.figures.catalogue.COLUMNS`.
    histograms : HistogramRows
        Of k rows.
    """

    columns: dict[str, NDArray[Any]]
    histograms: HistogramRows

    def replace(self, row: int, one: Measured) -> None:
        """Put what is known of one tensor in place of a row."""
        for name, values in one.columns.items():
            self.columns[name][row] = values[0]
        for field in fields(HistogramRows):
            getattr(self.histograms, field.name)[row] = getattr(one.histograms, field.name)[0]


def set_size(fraction: Fraction, numel: int) -> int:
    """Size of a set that holds a fraction of the coordinates, rounded up, at least one."""
    return max(-(-numel * fraction.numerator // fraction.denominator), 1)


def set_sizes(fractions: tuple[Fraction, ...], numel: NDArray[np.int64]) -> NDArray[np.int64]:
    """Do as ``set_size`` for many tensors and fractions; shape (k, fractions)."""
    sizes = [-(-numel * fraction.numerator // fraction.denominator) for fraction in fractions]
    return np.maximum(np.stack(sizes, axis=1), 1)


def empty_records(tensors: int) -> Records:
    """Records of the default figures."""
    return new_records(
        tensors,
        thresholds=len(EPS),
        taus=len(TAU),
        percentages=len(P),
        fractions=len(RHO),
        log2_bins=LOG2_BINS,
    )


def measured(records: Records, numel: NDArray[np.int64], wide: bool, rule: MaskRule) -> Measured:
    """Columns and histograms of floating tensors.

    Parameters
    ----------
    records : Records
    numel : int64 array, shape (k,)
    wide : bool
        Whether a side is stored wider than the compare format.
    rule : MaskRule
    """
    counts, sums, total = records.counts, records.sums, records.sums[:, Sum.DELTA_SQUARE]
    unchanged = numel - counts[:, Count.CHANGED]
    columns: dict[str, NDArray[Any]] = {
        "numel": numel,
        "valued": np.ones_like(numel),
        "finite": records.finite,
        "unchanged_bitwise": unchanged,
        "wide": np.full_like(numel, wide),
        "unchanged_stored": counts[:, Count.STORED_EQUAL],
        "unchanged_eta": unchanged + counts[:, Count.WITHIN_ETA],
        "changed": counts[:, Count.MASKED],
        "masked": np.full_like(numel, rule.kind != "none"),
        "support": records.support,
        "nonfinite_base": counts[:, Count.NONFINITE_BASE],
        "nonfinite_tuned": counts[:, Count.NONFINITE_TUNED],
        "delta_norm": np.sqrt(total),
        "base_norm": np.sqrt(records.base_square),
        "base_dot_delta": sums[:, Sum.BASE_DELTA],
        "delta_sum": sums[:, Sum.DELTA],
        "l1": sums[:, Sum.ABS_DELTA],
        "max_abs": records.max_abs,
    }
    for i, eps in enumerate(EPS):
        columns[flat_key("unchanged_abs", eps)] = unchanged + records.within[:, i]
    for i, tau in enumerate(TAU):
        columns[flat_key("unchanged_rel", tau)] = unchanged + records.within_rel[:, i]
    for i, p in enumerate(P):
        columns[flat_key("coord_energy", p)] = np.minimum(_ratio(records.energies[:, i], total), 1.0)
    for i, rho in enumerate(RHO):
        columns[flat_key("low_coverage", rho)] = _ratio(records.overlaps[:, i], records.support)
        columns[flat_key("low_coverage_null", rho)] = records.nulls[:, i]
    return Measured(columns, HistogramRows(records.delta_log2, records.base_log2, records.changed_log2, records.ulp))


def bits_only(numel: int, changed: int, rule: MaskRule) -> Measured:
    """Columns of one integer or opaque tensor."""
    columns = {c.name: np.array([0 if c.dtype == "uint64" else math.nan]) for c in COLUMNS}
    columns["numel"][0] = numel
    columns["unchanged_bitwise"][0] = columns["unchanged_stored"][0] = numel - changed
    if rule.kind != "none":
        columns["changed"][0], columns["masked"][0] = changed, 1
    return Measured(columns, HistogramRows.empty(1))


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


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    undefined = np.full(len(denominator), np.nan)
    known = (denominator != 0) & np.isfinite(denominator)
    quotient: NDArray[np.float64] = np.divide(numerator, denominator, out=undefined, where=known)
    return quotient
