"""Make histograms of a tensor by power of two: what the run file stores beside the columns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.partial import ULP_BINS

CountArray: TypeAlias = NDArray[np.uint64]

LOG2_LOWEST = -149
"""Exponent of the smallest float32 subnormal: that of bin 1."""
LOG2_BINS = 279
"""Exactly zero, then floor(log2 |x|) from -149 to 128; what lies beyond either end is counted in the last bin there."""


@dataclass(frozen=True, slots=True, eq=False)
class HistogramRows:
    """The histograms of k tensors; all zeros for integer and opaque ones."""

    delta: CountArray
    """Coordinates that are finite on both sides, by floor(log2 |d|); shape (k, 279)."""
    base: CountArray
    """Coordinates with a finite base, by floor(log2 |W0|) after the cast; shape (k, 279)."""
    changed: CountArray
    """Those of `base` that changed bitwise: together they give the rounding null later; shape (k, 279)."""
    ulp: CountArray
    """Changed coordinates that are finite on both sides, by distance in units of the compare dtype's last place; shape
    (k, 64)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            counts = getattr(self, field.name)
            shape = (len(self.delta), ULP_BINS if field.name == "ulp" else LOG2_BINS)
            if counts.dtype != np.uint64 or counts.shape != shape:
                raise ValueError(f"{field.name} is {counts.dtype} of shape {counts.shape}, not uint64 of {shape}")

    def __len__(self) -> int:
        return len(self.delta)

    @classmethod
    def empty(cls, tensors: int) -> HistogramRows:
        """Rows of zeros."""
        return cls(*(np.zeros((tensors, bins), np.uint64) for bins in (LOG2_BINS, LOG2_BINS, LOG2_BINS, ULP_BINS)))


def log2_floor() -> NDArray[np.float64]:
    """Axis of the log2 bins: floor(log2 |x|) of each, minus infinity for exactly zero, shape (279,)."""
    return np.concatenate([[-np.inf], np.arange(LOG2_LOWEST, LOG2_LOWEST + LOG2_BINS - 1, dtype=np.float64)])


def ulp_floor() -> NDArray[np.float64]:
    """Axis of the ULP bins: smallest distance of each, shape (64,)."""
    return np.exp2(np.arange(ULP_BINS))


def log2_bins(values: NDArray[Any]) -> NDArray[np.intp]:
    """Bin of the size of each finite value: 0 for zero, else 150 + floor(log2 |x|), kept within 1 to 278; any shape."""
    mantissas, exponents = np.frexp(values)
    # frexp returns |mantissa| in [0.5, 1), so its exponent is floor(log2 |x|) + 1.
    bins = np.clip(exponents.astype(np.intp) - LOG2_LOWEST, 1, LOG2_BINS - 1)
    return np.where(mantissas == 0, 0, bins)
