"""What the leading singular subspaces of an update have in common between steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LOCKING_FIGURES = ("left_overlap", "left_overlap_null", "right_overlap", "right_overlap_null")
"""Keys that subspaces add to the row of a step, beside the step before."""


@dataclass(frozen=True, eq=False, slots=True)
class Locking:
    """Overlaps of the leading singular subspaces of the updates of each two steps.

    Attributes
    ----------
    left_overlap, right_overlap : float64 array, shape (tensors, pairs)
        norm(U^T U')^2 / k of the leading k left (or right) singular vectors of the updates W - W0 of steps (1, 0),
        (2, 0), (2, 1), ...; the median over its matrices, if a tensor has several. NaN for a tensor that is no matrix,
        and where one of the updates is zero or not finite.
    left_overlap_null, right_overlap_null : float64 array, shape (tensors, pairs)
        The same of random subspaces: k / m of m rows (or columns).
    """

    left_overlap: Floats
    left_overlap_null: Floats
    right_overlap: Floats
    right_overlap_null: Floats

    def row(self, tensors: Sequence[int], step: int) -> dict[str, Any]:
        """:data:`LOCKING_FIGURES` of a step beside the one before, medians over tensors; None where undefined."""
        if step == 0:
            return dict.fromkeys(LOCKING_FIGURES)
        pair = step * (step + 1) // 2 - 1
        medians = {key: median_of(getattr(self, key)[list(tensors), pair]) for key in LOCKING_FIGURES}
        return {key: None if math.isnan(value) else value for key, value in medians.items()}

    def matrix(self, key: str, tensors: Sequence[int], steps: int) -> Floats:
        """Medians over tensors of one of :data:`LOCKING_FIGURES`, shape (steps, steps), NaN where undefined."""
        found = np.full((steps, steps), np.nan)
        values: Floats = getattr(self, key)[list(tensors)]
        np.fill_diagonal(found, 1.0 if np.isfinite(values).any() else np.nan)
        for pair, (later, earlier) in enumerate(step_pairs(steps)):
            found[later, earlier] = found[earlier, later] = median_of(values[:, pair])
        return found


def step_pairs(steps: int) -> list[tuple[int, int]]:
    """Each two steps, the later one first: (1, 0), (2, 0), (2, 1), ..."""
    return [(later, earlier) for later in range(steps) for earlier in range(later)]


def median_of(values: Floats) -> float:
    """The median of what is defined; NaN if nothing is."""
    defined = values[np.isfinite(values)].tolist()
    return statistics.median(defined) if defined else math.nan
