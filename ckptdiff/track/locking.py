"""Compare the leading singular subspaces of an update between steps: whether they lock early (arXiv 2606.07082)."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import TensorPair
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.events import Listener, stage
from ckptdiff.formats import stored_format
from ckptdiff.in_order import Task, in_order
from ckptdiff.linalg.stages import run_together
from ckptdiff.linalg.threads import one_blas_thread, product_threads
from ckptdiff.lora.factors import factorize, update_norm
from ckptdiff.memory import resident
from ckptdiff.options import Options, SpectraOptions
from ckptdiff.run.warm_up import Use
from ckptdiff.spectra.budget import Budget, cache_bytes
from ckptdiff.spectra.matrices import MatrixView, matrices_of
from ckptdiff.spectra.panels import StoredPanels
from ckptdiff.spectra.spectra_gpu import source_of
from ckptdiff.track.plan import Followed
from ckptdiff.track.subspaces import LOCKING_FIGURES, Locking, median_of, step_pairs

Floats = NDArray[np.float64]

SUBSPACE = 16
"""Singular vectors of a subspace, of matrices of twice as many rows and columns or more; half of them otherwise."""
_SAFE = (1e-12, 1e12)
"""Norms whose squares and fourth powers float32 can add up."""


def locking_uses(tensors: Sequence[Followed]) -> list[Use]:
    """The kernels that it will call."""
    panels = {("panel", stored_format(dtype).name, f.compare.name) for f in tensors for dtype in f.dtypes}
    return [("sparse",), *sorted(panels)]


def measure_locking(tensors: Sequence[Followed], norms: Floats, threads: int, tell: Listener) -> Locking:
    """Find the leading subspaces of every matrix at every step, and what they have in common.

    `norms` are those of the updates, shape (steps, tensors). Tells of the stage "spectra".
    """
    jobs = [
        _Job(row, followed, view, _narrow(followed, norms[:, row].tolist()))
        for row, followed in enumerate(tensors)
        for view in matrices_of(followed.sides[0].name, followed.sides[0].shape)
        if view.short > 1
    ]
    steps, size = len(norms), sum(job.size for job in jobs)
    found = np.full((len(LOCKING_FIGURES), len(tensors), len(step_pairs(steps))), np.nan)
    with open_shards("pread") as shards, stage(tell, "spectra") as told, one_blas_thread():
        options = Options(threads=threads, spectra=SpectraOptions())
        measuring = _Measuring(shards, Budget.of(options, resident(), (job.view for job in jobs)))
        tasks = (Task(partial(measuring.overlaps, job), measuring.slots(job), job.size) for job in jobs)
        held: dict[int, list[Floats]] = {}
        results = in_order(tasks, measuring.budget.threads, measuring.stop.set, told.again)
        for job, overlaps in zip(jobs, results, strict=True):
            held.setdefault(job.row, []).append(overlaps)
            told.more(job.size / size, job.followed.sides[0].name)
    for row, matrices in held.items():
        stacked = np.stack(matrices)
        found[:, row] = [[median_of(values) for values in of_key.T] for of_key in stacked.transpose(1, 0, 2)]
    return Locking(**dict(zip(LOCKING_FIGURES, found, strict=True)))


def _narrow(followed: Followed, norms: Sequence[float]) -> bool:
    return followed.compare.bits <= 32 and all(_SAFE[0] < norm < _SAFE[1] for norm in norms if norm)


@dataclass(frozen=True, slots=True)
class _Job:
    """A matrix through all steps."""

    row: int
    followed: Followed
    view: MatrixView
    narrow: bool
    """Whether float32 holds its updates and their squares."""

    @property
    def size(self) -> int:
        return self.view.long * self.view.short

    @property
    def dtype(self) -> np.dtype[np.floating]:
        return np.dtype(np.float32 if self.narrow else np.float64)


@dataclass(frozen=True, slots=True)
class _Measuring:
    """Measures matrices: all that they have in common."""

    shards: OpenShards
    budget: Budget
    stop: threading.Event = field(default_factory=threading.Event)

    def slots(self, job: _Job) -> int:
        return self.budget.slots(job.view)

    def overlaps(self, job: _Job) -> Floats:
        """Figures of each two steps, shape (len(LOCKING_FIGURES), pairs)."""
        with product_threads(self.slots(job), self.stop):
            bases = [self._bases(job, step) for step in range(1, len(job.followed.sides))]
        rows = [_compared(bases[later], bases[earlier]) for later, earlier in step_pairs(len(bases))]
        found: Floats = np.array(rows).reshape(-1, len(LOCKING_FIGURES)).T
        return found

    def _bases(self, job: _Job, step: int) -> tuple[Floats, Floats] | None:
        """Orthonormal bases of the leading left and right subspace of one update; None if it is zero, or not finite."""
        base, tuned = job.followed.sides[0], job.followed.sides[step]
        formats = stored_format(base.dtype), stored_format(tuned.dtype), job.followed.compare
        view, itemsize = job.view, job.dtype.itemsize
        panels = StoredPanels(self.shards, TensorPair(base.name, base, tuned), formats, view, job.dtype)
        needed = self.budget.randomized_bytes(view, itemsize) + cache_bytes(view, itemsize)
        source = source_of(panels, needed <= self.budget.share(self.slots(job)), None)
        with np.errstate(over="ignore", invalid="ignore"):
            (norm,) = run_together(source, update_norm(source.library))
        if not 0 < norm < math.inf:
            return None
        factors = factorize(source, norm, min(SUBSPACE, view.short // 2), None, 0)
        sides = [np.linalg.qr(side.astype(np.float64))[0] for side in (factors.long_side, factors.short_side)]
        left, right = sides[::-1] if view.wide else sides
        return left, right


def _compared(one: tuple[Floats, Floats] | None, two: tuple[Floats, Floats] | None) -> list[float]:
    """Overlap and chance of the left subspaces, then of the right ones."""
    if one is None or two is None:
        return [math.nan] * len(LOCKING_FIGURES)
    found = []
    for ours, theirs in zip(one, two, strict=True):
        ranks = ours.shape[1], theirs.shape[1]
        found.append(min(float(np.square(ours.T @ theirs).sum()) / min(ranks), 1.0))
        found.append(max(ranks) / len(ours))
    return found
