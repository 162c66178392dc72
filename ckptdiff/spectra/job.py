"""One matrix to measure: in which mode, what it may take of memory and threads, and where its panels come from."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ckptdiff.backends.formats import formats_of
from ckptdiff.checkpoint import TensorPair
from ckptdiff.linalg.passes import PanelSource, run_together
from ckptdiff.linalg.survey import Survey, survey
from ckptdiff.linalg.threads import product_threads, work_counted_in
from ckptdiff.linalg.work import WorkMeter
from ckptdiff.options import Options, SpectraOptions
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.measure import (
    MatrixSpectra,
    exact_work,
    measure_exact,
    measure_randomized,
    randomized_work,
)
from ckptdiff.spectra.memory import Room, cache_bytes, exact_bytes, randomized_bytes
from ckptdiff.spectra.source import StoredPanels
from ckptdiff.stream.shards import OpenShards

__all__ = ["Job", "Measuring"]

_SAFE = (1e-12, 1e12)
"""Norms whose squares and fourth powers float32 can add up."""


@dataclass(frozen=True, slots=True)
class Job:
    """A matrix to measure.

    Attributes
    ----------
    index : int
        Of its tensor, in plan order.
    pair : TensorPair
    view : MatrixView
    on_grid : bool
        Whether both sides lie on the bfloat16 grid, so that the rounding null applies.
    unchanged : bool
        Whether the update is known to be zero.
    """

    index: int
    pair: TensorPair
    view: MatrixView
    on_grid: bool
    unchanged: bool

    @property
    def size(self) -> int:
        """Entries to read."""
        return 0 if self.unchanged else self.view.long * self.view.short


@dataclass(frozen=True, slots=True)
class Measuring:
    """What all matrices have in common.

    Attributes
    ----------
    shards : OpenShards
    options : Options
        With spectra.
    room : Room
        For all matrices that are measured at a time.
    threads : int
        Slots of the run: each stands for a thread and for its share of the room.
    stop : threading.Event
        Set to end what is under way.
    """

    shards: OpenShards
    options: Options
    room: Room
    threads: int
    stop: threading.Event = field(default_factory=threading.Event)

    def slots(self, job: Job) -> int:
        """How many slots a matrix takes: as many as hold it, or all if nothing does and it is read in every pass."""
        if job.unchanged or not self.room.free:
            return 1
        exact = self._wanted.mode == "exact" and not self._too_large(job.view)
        return max(1, min(-(-self.threads * self._best(job.view, exact) // self.room.free), self.threads))

    def work(self, job: Job) -> float:
        """What a matrix will take, before anything of it is known, as :mod:`~ckptdiff.linalg.work` counts."""
        if job.unchanged:
            return 0.0
        view, share = job.view, self.slots(job) * self.room.free // self.threads
        exact = self._wanted.mode == "exact" and not self._too_large(view)
        itemsize = 8 if exact else 4
        needed = exact_bytes(view, False) if exact else self._randomized_bytes(view, itemsize)
        if needed > self.room.free:
            return 0.0
        cached = cache_bytes(view, itemsize) <= share - needed
        if exact:
            held = cache_bytes(view, itemsize) if cached else 0
            found, passes = exact_work(view, exact_bytes(view, True) + held <= share)
        else:
            found, passes = randomized_work(view, self._wanted, itemsize)
        return found + self._panels(job, np.dtype(f"f{itemsize}")).work * (1 if cached else passes)

    def measure_all(self, jobs: Sequence[Job], slots: int, meter: WorkMeter) -> list[tuple[int, MatrixSpectra]]:
        """Measure matrices one after the other, within so many slots."""
        found = []
        with product_threads(slots, self.stop):
            for job in jobs:
                with meter.matrix(job.pair.name, self.work(job), slots) as work, work_counted_in(work):
                    found.append((job.index, self._measure(job, slots * self.room.free // self.threads)))
        return found

    def _measure(self, job: Job, share: int) -> MatrixSpectra:
        """Measure one matrix in the mode that was asked for, or in the one that it allows, in `share` bytes."""
        if job.unchanged:
            return _failed("the update is zero")
        wanted, view = self._wanted, job.view
        note = self._too_large(view) if wanted.mode == "exact" else ""
        exact = wanted.mode == "exact" and not note
        needed = exact_bytes(view, False) if exact else self._randomized_bytes(view, 4)
        if needed > self.room.free:
            return _failed(f"it takes {needed >> 20} MiB, and --max-memory leaves {self.room.free >> 20} MiB")
        source = self._source(job, np.dtype(np.float64 if exact else np.float32), share - needed)
        (known,) = run_together(source, survey())
        reason = _unmeasurable(known)
        if reason:
            return _failed(reason)
        if exact:
            held = 0 if isinstance(source, StoredPanels) else cache_bytes(view, 8)
            return measure_exact(source, known, view, job.on_grid, exact_bytes(view, True) + held <= share)
        if not all(_SAFE[0] < norm < _SAFE[1] for norm in (known.base_norm, known.delta_norm) if norm):
            source = self._source(job, np.dtype(np.float64), share - self._randomized_bytes(view, 8))
        found = measure_randomized(source, known, view, job.on_grid, wanted)
        return replace(found, reasons=(*([note] if note else []), *found.reasons))

    @property
    def _wanted(self) -> SpectraOptions:
        assert self.options.spectra is not None
        return self.options.spectra

    def _best(self, view: MatrixView, exact: bool) -> int:
        """What the quickest way to measure a matrix takes in memory."""
        if exact:
            return exact_bytes(view, False) + cache_bytes(view, 8)
        return self._randomized_bytes(view, 4) + cache_bytes(view, 4)

    def _randomized_bytes(self, view: MatrixView, itemsize: int) -> int:
        return randomized_bytes(view, itemsize, self._wanted.block * self._wanted.steps)

    def _too_large(self, view: MatrixView) -> str:
        """Why exact mode falls back to randomized."""
        if view.short > self._wanted.limit:
            return f"both sides are longer than {self._wanted.limit}: randomized"
        needed = exact_bytes(view, False)
        if needed > self.room.free:
            return f"exact takes {needed >> 20} MiB, and --max-memory leaves {self.room.free >> 20} MiB: randomized"
        return ""

    def _source(self, job: Job, dtype: np.dtype[Any], left: int) -> PanelSource:
        """The matrix in memory if it fits into what is left, else read in every pass."""
        panels = self._panels(job, dtype)
        return panels.cached() if cache_bytes(job.view, dtype.itemsize) <= left else panels

    def _panels(self, job: Job, dtype: np.dtype[Any]) -> StoredPanels:
        formats = formats_of(job.pair.base.dtype, job.pair.tuned.dtype, self.options.compare)
        return StoredPanels(self.shards, job.pair, formats, job.view, dtype)


def _failed(reason: str) -> MatrixSpectra:
    return MatrixSpectra("", reasons=(reason,))


def _unmeasurable(known: Survey) -> str:
    if not math.isfinite(known.base_norm) or not math.isfinite(known.delta_norm):
        return "NaN, Inf or values out of range in it"
    return "" if known.delta_norm else "the update is zero"
