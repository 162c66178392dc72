"""Which backend measures, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ckptdiff.backends.backend import Backend, Batching
from ckptdiff.backends.formats import Format
from ckptdiff.backends.kernels.fetch import WINDOW
from ckptdiff.backends.partial import BLOCK, Partial, Refined, Rule, Scan, Targets
from ckptdiff.backends.source import InMemory
from ckptdiff.metrics.catalogue import EPS, ETA
from ckptdiff.metrics.columns import LARGEST, SMALLEST, empty_records, set_sizes
from ckptdiff.metrics.measurement import FloatMeasurement
from ckptdiff.metrics.small import wanted
from ckptdiff.options import MaskRule
from ckptdiff.runfile.compress import compress_chunk

__all__ = ["Device", "Formats", "open_device"]

Formats = tuple[Format, Format, Format]
"""Stored in the base, stored in the tuned side, compared as."""


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

    def warm_up(self, alike: Iterable[Formats], alone: Iterable[Formats], mask_chunk: int) -> None:
        """Load or compile the kernels that a run will call, so that what it measures next is time and memory of data.

        Parameters
        ----------
        alike, alone : iterable of (base, tuned, compare)
            Formats of small tensors that are measured in one call, and of all others.
        mask_chunk : int
            Bytes of the largest mask chunk, 0 without masks.
        """
        worker = self.worker()
        for formats in alike:
            assert isinstance(worker, Batching)
            _warm_small(worker, *formats)
        for formats in alone:
            _warm_large(worker, *formats)
        if mask_chunk:
            compress_chunk(np.arange(mask_chunk).astype(np.uint8), mask_chunk)


def _warm_small(worker: Batching, base: Format, tuned: Format, compare: Format) -> None:
    scan = Scan(base, tuned, compare, EPS, ETA, Rule.BITWISE, want_mask=True)
    numel = np.array([2])
    # Two coordinates of what the buffers of the kernel hold by themselves.
    places = np.array([[WINDOW, 0, WINDOW, 0, 2]])
    worker.scan_small(
        scan, places, (set_sizes(LARGEST, numel), set_sizes(SMALLEST, numel)), wanted(compare), empty_records(1)
    )


def _warm_large(worker: Backend, base: Format, tuned: Format, compare: Format) -> None:
    measurement = FloatMeasurement(base, tuned, compare, 2, MaskRule("bitwise"), True)
    # Two coordinates of which one changed: what nothing or everything changed in takes shorter ways.
    sides = bytes(base.bits // 4), bytes(tuned.bits // 8) + b"\x3c" * (tuned.bits // 8)
    source = InMemory(np.frombuffer(sides[0], np.uint8), np.frombuffer(sides[1], np.uint8), 2)
    partial = Partial()
    if compare.bits > 16:  # narrower formats seldom need a second pass
        targets = Targets(16)
        worker.refine(measurement.scan, targets, source, Refined.empty(targets))
    worker.scan(replace(measurement.scan, want_mask=True), source, partial)
    measurement.take(partial)
    if measurement.next is None:
        measurement.measured()


def open_device(name: str) -> Device:
    """Choose a backend: "auto" and "cpu" are the Numba kernels, "reference" is NumPy."""
    if name == "reference":
        from ckptdiff.backends.reference import ReferenceWorker

        return Device("reference", ReferenceWorker, batches=False)
    from ckptdiff.backends.cpu import CpuWorker

    return Device("cpu", CpuWorker, batches=True)
