"""Sum per-tensor columns over groups of tensors.

One tensor is a group of one, so the same functions of the catalogue give the figures of tensors, layers, module types
and of the whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.catalogue import FIGURES, Figure, flat_keys, parameter_key

__all__ = ["FloatArray", "Grouping", "figures_of", "median_2d", "values_of"]

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Grouping:
    """Columns of ``n`` tensors and the group, 0 to ``size`` - 1, that each of them belongs to.

    Attributes
    ----------
    columns : mapping of str to array, shape (n,)
        Stored columns (:data:`~ckptdiff.figures.catalogue.COLUMNS`).
    labels : int array, shape (n,)
        Group of each tensor.
    size : int
        Number of groups.
    delta_energy : float
        Sum of d^2 over all tensors of the diff: the denominator of ``delta_energy_share``.
    """

    columns: Mapping[str, NDArray[Any]]
    labels: NDArray[np.intp]
    size: int
    delta_energy: float

    def column(self, name: str) -> FloatArray:
        """One column as float64, shape (n,)."""
        values: FloatArray = self.columns[name].astype(np.float64)
        return values

    def squares(self, name: str) -> FloatArray:
        """One column squared, shape (n,)."""
        squares: FloatArray = np.square(self.column(name))
        return squares

    def total(self, name: str) -> FloatArray:
        """Sum of a column over each group, NaN entries left out, shape (size,)."""
        return self._sum(self.column(name))

    def total_square(self, name: str) -> FloatArray:
        """Sum of a column's squares over each group, shape (size,)."""
        return self._sum(self.squares(name))

    def largest(self, name: str) -> FloatArray:
        """Maximum of a column over each group, NaN for a group in which it is never defined, shape (size,)."""
        result = np.full(self.size, np.nan)
        np.fmax.at(result, self.labels, self.column(name))
        return result

    def mean(self, name: str, weights: FloatArray) -> FloatArray:
        """Weighted mean of a column over the tensors that define it, NaN where no weight is left, shape (size,)."""
        values = self.column(name)
        weights = np.where(np.isnan(values) | np.isnan(weights), 0.0, weights)
        return self.ratio(self._sum(values * weights), self._sum(weights))

    @staticmethod
    def ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
        """Quotient, NaN where the denominator is zero or beyond float64; all three of one shape."""
        undefined = np.full(np.shape(numerator), np.nan)
        known = (denominator != 0) & np.isfinite(denominator)
        quotient: FloatArray = np.divide(numerator, denominator, out=undefined, where=known)
        return quotient

    def _sum(self, values: FloatArray) -> FloatArray:
        weights = np.where(np.isnan(values), 0.0, values)
        return np.bincount(self.labels, weights, self.size).astype(np.float64)


def figures_of(groups: Grouping) -> list[dict[str, Any]]:
    """Every figure of every group, as the output contract writes it.

    Returns
    -------
    list of dict
        One per group: figure key to a float, an int for counts, None where undefined, or a dict from parameter key to
        such a value for a figure with parameters.
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
    return np.where(known if figure.bitwise else known & (groups.total("valued") > 0), values, np.nan)


def median_2d(groups: Grouping, matrices: NDArray[np.bool_]) -> dict[str, Any]:
    """Unweighted median of every figure over native 2-D tensors with a nonzero delta (S1, Tables 8 and 9).

    Parameters
    ----------
    groups : Grouping
        One group per tensor.
    matrices : bool array, shape (n,)
        Which tensors are native matrices.
    """
    chosen = matrices & (groups.column("delta_norm") > 0)
    row: dict[str, Any] = {}
    for figure in FIGURES:
        for parameter, _ in flat_keys(figure):
            values = values_of(groups, figure, parameter)[chosen]
            values = values[~np.isnan(values)]
            _put(row, figure, parameter, float(np.median(values)) if values.size else np.nan, whole=False)
    return row


def _put(row: dict[str, Any], figure: Figure, parameter: float | None, value: float, whole: bool = True) -> None:
    cell: float | int | None = None if np.isnan(value) else value
    if cell is not None and figure.unit == "count" and whole:
        cell = int(cell)
    if parameter is None:
        row[figure.key] = cell
    else:
        row.setdefault(figure.key, {})[parameter_key(parameter)] = cell
