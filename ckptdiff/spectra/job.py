"""Plan the measurement of one matrix: its mode, its share of memory and threads, and where its panels come from."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ckptdiff.checkpoint import TensorPair
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.formats import formats_of
from ckptdiff.linalg.stages import PanelSource, run_together
from ckptdiff.linalg.survey import survey
from ckptdiff.linalg.threads import product_threads, work_counted_in
from ckptdiff.linalg.work import WorkMeter
from ckptdiff.options import Compare
from ckptdiff.spectra.budget import Budget, cache_bytes
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.measure import (
    MatrixSpectra,
    exact_work,
    measure_exact,
    measure_randomized,
    randomized_work,
)
from ckptdiff.spectra.panels import StoredPanels
from ckptdiff.spectra.spectra_gpu import SpectraGpu, or_streamed, source_of

_SAFE = (1e-12, 1e12)
"""Norms whose squares and fourth powers float32 can add up."""


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """A matrix to measure."""

    index: int
    """Of its tensor, in plan order."""
    pair: TensorPair
    view: MatrixView
    off_grid: float
    """Part of the base that lies off the grid of bfloat16, which the rounding null takes; NaN makes none."""
    unchanged: bool
    """Whether the update is known to be zero."""
    known: bool = True
    """Whether the tuned side has all of it."""

    @property
    def left_out(self) -> str:
        """Why it is not measured; empty if it is."""
        if not self.known:
            return "the tuned side lacks it, or a part of it"
        return "the update is zero" if self.unchanged else ""

    @property
    def size(self) -> int:
        """Entries to read."""
        return 0 if self.left_out else self.view.long * self.view.short


@dataclass(frozen=True, slots=True)
class Measuring:
    """Measures matrices: all that they have in common."""

    shards: OpenShards
    compare: Compare
    budget: Budget
    gpu: SpectraGpu | None = None
    """Where panels are and matrices are measured, if not on the processor."""
    keep: Callable[[MatrixJob, MatrixSpectra], None] | None = None
    """Told of each matrix, in the thread that has measured it."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set to end what is under way."""

    def slots(self, job: MatrixJob) -> int:
        """How many slots of the budget a matrix takes."""
        return 1 if job.left_out else self.budget.slots(job.view)

    def work(self, job: MatrixJob) -> float:
        """Foresee the work of a matrix, before anything of it is known, as :mod:`~ckptdiff.linalg.work` counts."""
        if job.left_out:
            return 0.0
        view, share = job.view, self.budget.share(self.slots(job))
        exact, needed = self.budget.exact(view), self.budget.needs(view)
        itemsize = 8 if exact else 4
        if needed > self.budget.free:
            return 0.0
        cached = cache_bytes(view, itemsize) <= share - needed
        if exact:
            held = cache_bytes(view, itemsize) if cached else 0
            found, passes = exact_work(view, self.budget.space.exact(view, True) + held <= share)
        else:
            found, passes = randomized_work(view, self.budget.spectra, itemsize)
        return found + self._panels(job, np.dtype(f"f{itemsize}")).work * (1 if cached else passes)

    def measure_all(self, jobs: Sequence[MatrixJob], slots: int, meter: WorkMeter) -> list[tuple[int, MatrixSpectra]]:
        """Measure matrices one after the other, within so many slots."""
        found = []
        with product_threads(slots, self.stop):
            for job in jobs:
                with meter.matrix(job.pair.name, self.work(job), slots) as work, work_counted_in(work):
                    measure = partial(self._measure, job)
                    spectra = or_streamed(self.gpu, measure, self.budget.share(slots), work.name)
                if self.keep is not None:
                    self.keep(job, spectra)
                found.append((job.index, spectra))
        return found

    def _measure(self, job: MatrixJob, share: int) -> MatrixSpectra:
        """Measure one matrix in the mode that was asked for, or in the one that it allows, in `share` bytes.

        With no bytes it is read in every pass.
        """
        if job.left_out:
            return _failed(job.left_out)
        budget, view = self.budget, job.view
        exact, needed = budget.exact(view), budget.needs(view)
        if needed > budget.free:
            return _failed(f"it takes {needed >> 20} MiB, and {budget.knob} leaves {budget.free >> 20} MiB")
        source = self._source(job, np.dtype(np.float64 if exact else np.float32), share - needed)
        (known,) = run_together(source, survey(source.library))
        if not math.isfinite(known.base_norm + known.delta_norm):
            return _failed("NaN, Inf or values out of range in it")
        if not known.delta_norm:
            return _failed("the update is zero")
        if exact:
            held = cache_bytes(view, 8) if source.kept else 0
            return measure_exact(source, known, view, job.off_grid, budget.space.exact(view, True) + held <= share)
        if not all(_SAFE[0] < norm < _SAFE[1] for norm in (known.base_norm, known.delta_norm) if norm):
            source = self._source(job, np.dtype(np.float64), share - budget.randomized_bytes(view, 8))
        found = measure_randomized(source, known, view, job.off_grid, budget.spectra)
        note = budget.too_large(view) if budget.spectra.mode == "exact" else ""
        return replace(found, reasons=(*([note] if note else []), *found.reasons))

    def _source(self, job: MatrixJob, dtype: np.dtype[Any], left: int) -> PanelSource:
        """The matrix in memory if it fits into what is left, else read in every pass."""
        return source_of(self._panels(job, dtype), cache_bytes(job.view, dtype.itemsize) <= left, self.gpu)

    def _panels(self, job: MatrixJob, dtype: np.dtype[Any]) -> StoredPanels:
        formats = formats_of(job.pair.base.dtype, job.pair.tuned.dtype, self.compare)
        return StoredPanels(self.shards, job.pair, formats, job.view, dtype)


def _failed(reason: str) -> MatrixSpectra:
    return MatrixSpectra("", reasons=(reason,))
