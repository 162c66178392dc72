"""Define what every backend can do."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.partial import Partial, Refined, Scan, Targets
from ckptdiff.measure.records import Records
from ckptdiff.measure.source import SmallPairs, Source


class Backend(Protocol):
    """Measures spans of blocks; one object per thread. See :class:`~ckptdiff.measure.cpu.CpuBackend`."""

    @property
    def decodes(self) -> bool:
        """Whether windows may be :class:`~ckptdiff.measure.source.Coded`."""

    def scan(self, scan: Scan, source: Source, partial: Partial, first_tie: int = 0) -> NDArray[np.uint8] | None:
        """Measure a span of blocks; returns its mask bits."""

    def refine(self, scan: Scan, targets: Targets, source: Source, refined: Refined) -> None:
        """Look for open cuts in a span of blocks."""


@runtime_checkable
class Batching(Protocol):
    """A backend that can also measure many small tensors in one call."""

    def scan_small(
        self, scan: Scan, pairs: SmallPairs, records: Records
    ) -> tuple[int, NDArray[np.uint8], NDArray[np.int64]]:
        """Measure whole tensors of at most a block; see :meth:`ckptdiff.measure.cpu.CpuBackend.scan_small`."""
