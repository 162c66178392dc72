"""What every backend can do."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckptdiff.backends.partial import Partial, Refined, Scan, Targets
from ckptdiff.backends.source import Source

__all__ = ["Backend"]


class Backend(Protocol):
    """Measures spans of blocks; one object per thread. See :class:`~ckptdiff.backends.cpu.CpuWorker`."""

    def scan(self, scan: Scan, source: Source, partial: Partial, first_tie: int = 0) -> NDArray[np.uint8] | None:
        """Measure a span of blocks; returns its mask bits."""

    def refine(self, scan: Scan, targets: Targets, source: Source, refined: Refined) -> None:
        """Look for open cuts in a span of blocks."""
