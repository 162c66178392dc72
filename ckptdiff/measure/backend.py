"""Define what every backend can do."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.partial import Partial, Refined, Scan, Targets
from ckptdiff.measure.records import Records
from ckptdiff.measure.source import Source

__all__ = ["Backend", "Batching"]


class Backend(Protocol):
    """Measures spans of blocks; one object per thread. See :class:`~ckptdiff.measure.cpu.CpuBackend`."""

    def scan(self, scan: Scan, source: Source, partial: Partial, first_tie: int = 0) -> NDArray[np.uint8] | None:
        """Measure a span of blocks; returns its mask bits."""

    def refine(self, scan: Scan, targets: Targets, source: Source, refined: Refined) -> None:
        """Look for open cuts in a span of blocks."""


@runtime_checkable
class Batching(Protocol):
    """A backend that can also measure many small tensors in one call."""

    def scan_small(
        self,
        scan: Scan,
        places: NDArray[np.int64],
        records: Records,
    ) -> tuple[int, NDArray[np.uint8], NDArray[np.int64]]:
        """Measure whole tensors from their files, of at most a block each.

        Parameters
        ----------
        scan : Scan
        places : int64 array, shape (k, 6)
            Of each tensor: descriptor and offset of the base, of the tuned side, coordinates, and its first word of
            mask.
        ranks : pair of int64 array, shapes (k, percentages) and (k, fractions)
            Sizes of the sets of largest |d|, and of smallest weights.
        wanted : Wanted
        records : Records
            k rows that receive the figures.

        Returns
        -------
        int
            How many were measured: less than all if one could not be read.
        uint8 array
            Their mask bits.
        int64 array, shape (k,)
            Where those of each start.
        """
