"""Make the columns and histograms of the run file of the records of whole tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything known of k tensor pairs."""

    columns: dict[str, NDArray[Any]]
    """One for each of :data:`~ckptdiff.figures.catalogue.COLUMNS`; shape (k,)."""
    histograms: HistogramRows
    """Of k rows."""


_OF_BITS = {"numel", "unchanged_bitwise", "unchanged_stored", "changed", "masked"}
"""What is measured of integer and opaque tensors."""


def measured(
    records: Records,
    numel: NDArray[np.int64],
    valued: NDArray[np.bool_],
    wide: NDArray[np.bool_],
    unread: NDArray[np.bool_],
    rule: MaskRule,
) -> Measured:
    """Columns and histograms of k tensors: of each, coordinates, whether it holds floating values, is wide, is unread.

    `numel`, `valued`, `wide` and `unread` have shape (k,). Of tensors that hold no floating values only bits are
    compared; a wide one has a side that is stored wider than the compare format; of an unread one nothing changed, and
    nothing is known of the base.
    """
    counts, sums, total = records.counts, records.sums, records.sums[:, Sum.DELTA_SQUARE]
    unchanged = numel - counts[:, Count.CHANGED]
    columns: dict[str, NDArray[Any]] = {
        "numel": numel,
        "valued": valued.astype(np.int64),
        "finite": records.finite,
        "unchanged_bitwise": unchanged,
        "wide": wide.astype(np.int64),
        "off_grid": counts[:, Count.OFF_GRID],
        "on_grid": counts[:, Count.OFF_GRID] == 0,
        "unchanged_stored": counts[:, Count.STORED_EQUAL],
        "unchanged_eta": unchanged + counts[:, Count.WITHIN_ETA],
        "changed": counts[:, Count.MASKED],
        "masked": np.full_like(numel, rule.kind != "none"),
        "support": records.support,
        "nonfinite_base": counts[:, Count.NONFINITE_BASE],
        "nonfinite_tuned": counts[:, Count.NONFINITE_TUNED],
        "delta_norm": np.sqrt(total),
        "base_norm": np.where(unread, math.nan, np.sqrt(records.base_square)),
        "base_dot_delta": sums[:, Sum.BASE_DELTA],
        "delta_sum": sums[:, Sum.DELTA],
        "l1": sums[:, Sum.ABS_DELTA],
        "max_abs": records.max_abs,
        "unchanged_null": Grouping.ratio(records.still, numel),
        "stored_norm": np.sqrt(np.where(wide, sums[:, Sum.STORED_SQUARE], total)),
        "absorbed_norm": np.sqrt(sums[:, Sum.ABSORBED_SQUARE]),
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
    if not valued.all():
        for column in COLUMNS:
            if column.name not in _OF_BITS:
                undefined = 0 if column.dtype == "uint64" else math.nan
                columns[column.name] = np.where(valued, columns[column.name], undefined)
    return Measured(columns, HistogramRows(records.delta_log2, records.base_log2, records.changed_log2, records.ulp))
