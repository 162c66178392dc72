"""Every figure of the catalogue, of every group of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.catalogue import FIGURES, Figure, flat_keys, parameter_key
from ckptdiff.figures.grouping import FloatArray, Grouping


def figures_of(groups: Grouping) -> list[dict[str, Any]]:
    """Every figure of every group, as the output contract writes it.

    A row has, by figure key, a float, an int for counts, None where undefined, or a dict of such values by parameter
    key for a figure with parameters.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(groups.size)]
    for figure in FIGURES:
        for parameter, _ in flat_keys(figure):
            for row, value in zip(rows, values_of(groups, figure, parameter).tolist(), strict=True):
                _put(row, figure, parameter, value)
    return rows


def values_of(groups: Grouping, figure: Figure, parameter: float | None) -> FloatArray:
    """One figure of every group, NaN where undefined, shape (groups.size,)."""
    # A sum beyond float64 is infinite, and so no figure; differences of such sums are NaN already.
    with np.errstate(over="ignore", invalid="ignore"):
        values = figure.value(groups, parameter)
    known = np.isfinite(values)
    if figure.of_base:
        known &= groups.total("unread") == 0
    return np.where(known if figure.bitwise else known & (groups.total("valued") > 0), values, np.nan)


def median_2d(groups: Grouping, matrices: NDArray[np.bool_]) -> dict[str, Any]:
    """Unweighted median of every figure over native 2-D tensors with a nonzero delta (S1, Tables 8 and 9).

    Each tensor is a group of its own; ``matrices``, shape (n,), tells which are native matrices.
    """
    chosen = matrices & (groups.column("delta_norm") > 0)
    row: dict[str, Any] = {}
    for figure in FIGURES:
        for parameter, _ in flat_keys(figure):
            values = values_of(groups, figure, parameter)[chosen]
            values = values[~np.isnan(values)]
            _put(row, figure, parameter, _median(values) if values.size else np.nan, whole=False)
    return row


def _median(values: FloatArray) -> float:
    # As np.median, which imports all of numpy.ma.
    middle = (values.size - 1) // 2, values.size // 2
    return float(np.partition(values, middle)[[*middle]].mean())


def _put(row: dict[str, Any], figure: Figure, parameter: float | None, value: float, whole: bool = True) -> None:
    cell: float | int | None = None if np.isnan(value) else value
    if cell is not None and figure.unit == "count" and whole:
        cell = int(cell)
    if parameter is None:
        row[figure.key] = cell
    else:
        row.setdefault(figure.key, {})[parameter_key(parameter)] = cell
