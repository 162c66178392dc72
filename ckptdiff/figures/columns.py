"""From records of whole tensors to the columns and histograms of the run file."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.catalogue import COLUMNS, flat_key
from ckptdiff.figures.grouping import Grouping
from ckptdiff.measure.histograms import HistogramRows
from ckptdiff.measure.partial import Count, Sum
from ckptdiff.measure.records import Records
from ckptdiff.measure.thresholds import EPS, RHO, TAU, P
from ckptdiff.options import MaskRule

__all__ = [
    "Measured",
    "bits_only",
    "measured",
]


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
        columns[flat_key("coord_energy", p)] = np.minimum(Grouping.ratio(records.energies[:, i], total), 1.0)
    for i, rho in enumerate(RHO):
        columns[flat_key("low_coverage", rho)] = Grouping.ratio(records.overlaps[:, i], records.support)
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
