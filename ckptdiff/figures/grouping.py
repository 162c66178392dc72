"""Sum per-tensor columns over groups of tensors.

One tensor is a group of one, so the same functions of the catalogue give the figures of tensors, layers, module types
and of the whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Grouping:
    """Columns of ``n`` tensors and the group, 0 to ``size`` - 1, that each of them belongs to."""

    columns: Mapping[str, NDArray[Any]]
    """Stored columns (:data:`~ckptdiff.figures.catalogue.COLUMNS`) and what facts add to them; shape (n,)."""
    labels: NDArray[np.intp]
    """Group of each tensor; shape (n,)."""
    size: int
    """Number of groups."""
    delta_energy: float
    """Sum of d^2 over all tensors of the diff: the denominator of ``delta_energy_share``."""

    def column(self, name: str) -> FloatArray:
        """One column as float64, shape (n,); not to be changed, since it may be the stored one."""
        values: FloatArray = self.columns[name].astype(np.float64, copy=False)
        return values

    @cached_property
    def _totals(self) -> dict[tuple[str, bool], FloatArray]:
        """What was summed already: figures share their denominators."""
        return {}

    def squares(self, name: str) -> FloatArray:
        """One column squared, shape (n,)."""
        squares: FloatArray = np.square(self.column(name))
        return squares

    def total(self, name: str) -> FloatArray:
        """Sum of a column over each group, NaN entries left out, shape (size,)."""
        return self._total(name, squared=False)

    def total_square(self, name: str) -> FloatArray:
        """Sum of a column's squares over each group, shape (size,)."""
        return self._total(name, squared=True)

    def total_if_known(self, values: FloatArray) -> FloatArray:
        """Sum of values of each tensor over each group, NaN where one of them is, shape (size,)."""
        return np.bincount(self.labels, values, self.size).astype(np.float64)

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
    def ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> FloatArray:
        """Quotient, NaN where the denominator is zero or beyond float64; all three of one shape."""
        undefined = np.full(np.shape(numerator), np.nan)
        known = (denominator != 0) & np.isfinite(denominator)
        quotient: FloatArray = np.divide(numerator, denominator, out=undefined, where=known)
        return quotient

    def _total(self, name: str, *, squared: bool) -> FloatArray:
        if (name, squared) not in self._totals:
            self._totals[name, squared] = self._sum(self.squares(name) if squared else self.column(name))
        return self._totals[name, squared]

    def _sum(self, values: FloatArray) -> FloatArray:
        undefined = np.isnan(values)
        weights = np.where(undefined, 0.0, values) if undefined.any() else values
        return np.bincount(self.labels, weights, self.size).astype(np.float64, copy=False)
