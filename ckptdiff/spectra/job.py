"""Plan the measurement of one matrix: its mode, its share of memory and threads, and where its panels come from."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ckptdiff.checkpoint import TensorPair
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.formats import Formats, formats_of
from ckptdiff.linalg.stages import PanelSource, run_together
from ckptdiff.linalg.survey import Survey, survey, survey_of_each
from ckptdiff.linalg.threads import counted, product_threads, work_counted_in
from ckptdiff.linalg.work import WorkMeter
from ckptdiff.options import Compare
from ckptdiff.spectra.budget import Budget, cache_bytes
from ckptdiff.spectra.gpu_panels import GpuStack
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.measure import (
    MatrixSpectra,
    exact_work,
    measure_exact,
    measure_randomized,
    measure_stack,
    randomized_work,
)
from ckptdiff.spectra.panels import PanelMemory, StoredPanels
from ckptdiff.spectra.spectra_gpu import SpectraGpu, or_streamed, source_of

_SAFE = (1e-12, 1e12)
"""Norms whose squares and fourth powers float32 can add up."""


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """A matrix to measure."""

    place: int
    """Among all matrices of the run."""
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
class JobGroup:
    """Matrices that are handed over together."""

    jobs: tuple[MatrixJob, ...]
    slots: int
    """Of the budget, that they take."""
    together: bool = False
    """Whether they are of one kind and measured at once; else one after the other."""

    @property
    def size(self) -> int:
        """Entries to read."""
        return sum(job.size for job in self.jobs)


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
    memory: PanelMemory = field(default_factory=PanelMemory)
    """Of matrices that are kept in it."""

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
            found, passes = randomized_work(view, self.budget.spectra, itemsize, self.budget.stack(view) > 1)
        return found + self._panels(job, np.dtype(f"f{itemsize}")).work * (1 if cached else passes)

    def kind(self, job: MatrixJob) -> Hashable:
        """What matrices have in common that can be measured together."""
        return job.view.rows, job.view.columns, self._formats(job), job.pair.same_bytes

    def room(self, job: MatrixJob) -> int:
        """How many matrices of its kind are measured together."""
        return self.budget.stack(job.view) if job.size else 1

    def measure(self, group: JobGroup, meter: WorkMeter) -> list[tuple[int, MatrixSpectra]]:
        """Measure the matrices of a group; each with its place in the run."""
        if group.together:
            return self.measure_together(group.jobs, meter)
        return self.measure_all(group.jobs, group.slots, meter)

    def measure_all(self, jobs: Sequence[MatrixJob], slots: int, meter: WorkMeter) -> list[tuple[int, MatrixSpectra]]:
        """Measure matrices one after the other, within so many slots; each with its place in the run."""
        found = []
        with product_threads(slots, self.stop):
            for job in jobs:
                with meter.matrix(job.pair.name, self.work(job), slots) as work, work_counted_in(work):
                    measure = partial(self._measure, job)
                    spectra = or_streamed(self.gpu, measure, self.budget.share(slots), work.name)
                found.append(self._kept(job, spectra))
        return found

    def measure_together(self, jobs: Sequence[MatrixJob], meter: WorkMeter) -> list[tuple[int, MatrixSpectra]]:
        """Measure matrices of one kind, as many as there is room for at most, on a GPU."""
        total, name = sum(map(self.work, jobs)), jobs[0].pair.name
        under_way = meter.matrix(name, total)
        with product_threads(1, self.stop), under_way as work, work_counted_in(work), counted(total, opaque=True):
            found = or_streamed(self.gpu, partial(self._measure_each, jobs), self.budget.free, name)
        return [self._kept(job, one) for job, one in zip(jobs, found, strict=True)]

    def _kept(self, job: MatrixJob, spectra: MatrixSpectra) -> tuple[int, MatrixSpectra]:
        if self.keep is not None:
            self.keep(job, spectra)
        return job.place, spectra

    def _measure_each(self, jobs: Sequence[MatrixJob], share: int) -> list[MatrixSpectra]:
        """Measure matrices in a stack; with no bytes to keep it in, one after the other, read in every pass."""
        if not share:
            return [self._measure(job, 0) for job in jobs]
        assert self.gpu is not None
        view, mode = jobs[0].view, self.budget.spectra.mode
        panels = [self._panels(job, np.dtype(np.float64 if mode == "exact" else np.float32)) for job in jobs]
        source = GpuStack(panels, self.gpu.slots, self.budget.stack(view))
        (known,) = run_together(source, survey_of_each(source.library, source.stack, len(jobs)))
        reasons = [_why_not(one) for one in known]
        # Float32 has too small a range for some: those are measured alone.
        chosen = [
            None if reason or (mode == "randomized" and not _safe(one)) else one
            for one, reason in zip(known, reasons, strict=True)
        ]
        for member, one in enumerate(chosen):
            if one is None:
                source.clear(member)
        found = measure_stack(source, chosen, view, [job.off_grid for job in jobs], mode)
        del source
        return [
            one or (_failed(reason) if reason else self._measure(job, share))
            for job, one, reason in zip(jobs, found, reasons, strict=True)
        ]

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
        with self._source(job, np.dtype(np.float64 if exact else np.float32), share - needed) as source:
            (known,) = run_together(source, survey(source.library))
            if reason := _why_not(known):
                return _failed(reason)
            if exact:
                held = cache_bytes(view, 8) if source.kept else 0
                return measure_exact(source, known, view, job.off_grid, budget.space.exact(view, True) + held <= share)
            if _safe(known):
                return self._randomized(job, source, known)
        with self._source(job, np.dtype(np.float64), share - budget.randomized_bytes(view, 8)) as source:
            return self._randomized(job, source, known)

    def _randomized(self, job: MatrixJob, source: PanelSource, known: Survey) -> MatrixSpectra:
        budget, view = self.budget, job.view
        found = measure_randomized(source, known, view, job.off_grid, budget.spectra)
        note = budget.too_large(view) if budget.spectra.mode == "exact" else ""
        return replace(found, reasons=(*([note] if note else []), *found.reasons))

    @contextmanager
    def _source(self, job: MatrixJob, dtype: np.dtype[Any], left: int) -> Iterator[PanelSource]:
        """The matrix in memory if it fits into what is left, else read in every pass."""
        size = cache_bytes(job.view, dtype.itemsize)
        room = self.memory.take(size, left) if self.gpu is None else None
        yield source_of(self._panels(job, dtype), size <= left, self.gpu, room)
        if room is not None:
            self.memory.give(room)  # not after an error: some thread may be at it still

    def _panels(self, job: MatrixJob, dtype: np.dtype[Any]) -> StoredPanels:
        return StoredPanels(self.shards, job.pair, self._formats(job), job.view, dtype)

    def _formats(self, job: MatrixJob) -> Formats:
        return formats_of(job.pair.base.dtype, job.pair.tuned.dtype, self.compare)


def _why_not(known: Survey) -> str:
    """Why a pair has no spectra; empty if it has."""
    if not math.isfinite(known.base_norm + known.delta_norm):
        return "NaN, Inf or values out of range in it"
    return "" if known.delta_norm else "the update is zero"


def _safe(known: Survey) -> bool:
    return all(_SAFE[0] < norm < _SAFE[1] for norm in (known.base_norm, known.delta_norm) if norm)


def _failed(reason: str) -> MatrixSpectra:
    return MatrixSpectra("", reasons=(reason,))
