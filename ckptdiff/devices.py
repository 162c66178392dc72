"""Which backend measures, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ckptdiff.backends.backend import Backend
from ckptdiff.backends.formats import Format
from ckptdiff.backends.partial import BLOCK, Partial, Refined, Targets
from ckptdiff.backends.source import InMemory
from ckptdiff.metrics.measurement import FloatMeasurement
from ckptdiff.options import MaskRule
from ckptdiff.runfile.compress import MASK_CHUNK, compress_chunk

__all__ = ["Device", "open_device"]


@dataclass(frozen=True, slots=True)
class Device:
    """A backend that was chosen and found to work.

    Attributes
    ----------
    name : str
    worker : callable
        Makes the backend of one thread.
    batches : bool
        Whether that backend is :class:`~ckptdiff.backends.backend.Batching`.
    """

    name: str
    worker: Callable[[], Backend]
    batches: bool

    def scratch(self, base: Format, tuned: Format, compare: Format, numel: int) -> int:
        """Bytes of work space that a thread needs for a pair, beside the blocks themselves."""
        if self.name == "reference":
            return 240 * min(numel, BLOCK)
        return 0

    def warm_up(self, formats: Iterable[tuple[Format, Format, Format]], masks: bool) -> None:
        """Load or compile every kernel that a run may call, so that what it measures next is time and memory of data.

        Parameters
        ----------
        formats : iterable of (base, tuned, compare)
        masks : bool
            Whether masks are compressed.
        """
        worker = self.worker()
        for base, tuned, compare in formats:
            measurement = FloatMeasurement(base, tuned, compare, 2, MaskRule("bitwise"), True)
            # Two coordinates of which one changed: what nothing or everything changed in takes shorter ways.
            sides = bytes(base.bits // 4), bytes(tuned.bits // 8) + b"\x3c" * (tuned.bits // 8)
            source = InMemory(np.frombuffer(sides[0], np.uint8), np.frombuffer(sides[1], np.uint8), 2)
            targets, partial = Targets(16), Partial()
            worker.refine(measurement.scan, targets, source, Refined.empty(targets))
            worker.scan(replace(measurement.scan, want_mask=True), source, partial)
            measurement.take(partial)
            if measurement.next is None:
                measurement.measured()
        if masks:
            compress_chunk(np.arange(MASK_CHUNK, dtype=np.uint8), MASK_CHUNK)


def open_device(name: str) -> Device:
    """Choose a backend: "auto" and "cpu" are the Numba kernels, "reference" is NumPy."""
    if name == "reference":
        from ckptdiff.backends.reference import ReferenceWorker

        return Device("reference", ReferenceWorker, batches=False)
    from ckptdiff.backends.cpu import CpuWorker

    return Device("cpu", CpuWorker, batches=True)
