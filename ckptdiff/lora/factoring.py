"""Factor the updates of all tensors, several matrices at a time; on a GPU those of experts many at once."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ckptdiff.checkpoint import TensorPair
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.events import Listener, stage
from ckptdiff.exports.adaptable import Way
from ckptdiff.formats import Formats, formats_of
from ckptdiff.in_order import Task, in_order
from ckptdiff.linalg.stages import run_together
from ckptdiff.linalg.threads import counted, one_blas_thread, product_threads, work_counted_in
from ckptdiff.linalg.work import WorkMeter
from ckptdiff.lora.factors import Factors, factor_work, factorize, factorize_each, update_norm
from ckptdiff.options import Compare
from ckptdiff.spectra.budget import Budget, cache_bytes
from ckptdiff.spectra.gpu_panels import GpuStack
from ckptdiff.spectra.matrices import MatrixView, matrices_of
from ckptdiff.spectra.panels import StoredPanels
from ckptdiff.spectra.spectra_gpu import SpectraGpu, or_streamed, source_of
from ckptdiff.spectra.stacks import in_stacks, in_turn

_WAITING = 256 << 20
"""Bytes of factors that wait until the stack is full that is before them."""


@dataclass(frozen=True, slots=True)
class Update:
    """The update of one tensor, and how an adapter holds it, or why it cannot."""

    pair: TensorPair
    called: str
    """By the model."""
    norm: float
    way: Way | None
    reason: str | None

    @property
    def views(self) -> list[MatrixView]:
        """Its matrices: one, or that of each expert."""
        return matrices_of(self.called, self.pair.base.shape)

    @property
    def dtype(self) -> np.dtype[np.floating]:
        """In which its square is a number."""
        return np.dtype(np.float32 if 1e-12 < self.norm < 1e12 else np.float64)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix of an update."""

    place: int
    """Among those of all updates."""
    update: Update
    view: MatrixView
    beside: int
    """How many its update has."""


@dataclass(frozen=True, slots=True)
class Factoring:
    """Finds factors of updates: all that they have in common."""

    shards: OpenShards
    compare: Compare
    budget: Budget
    """Of memory and threads; its Krylov space is that of the randomized SVD."""
    gpu: SpectraGpu | None
    rank: int
    energy: float | None
    seed: int
    stop: threading.Event = field(default_factory=threading.Event)
    """Set to end what is under way."""

    def factors(self, updates: Sequence[Update], tell: Listener) -> Iterator[tuple[Update, list[Factors | None]]]:
        """Yield the factors of each update, in order; as many are under way as there are slots for.

        Those of each of its matrices, None where one of several did not change.
        """
        views = [(update, update.views if update.reason is None else []) for update in updates]
        found = [(update, view, len(each)) for update, each in views for view in each]
        matrices = [_Matrix(place, *one) for place, one in enumerate(found)]
        with stage(tell, "factors") as told, one_blas_thread():
            meter = WorkMeter(sum(map(self._work, matrices)))

            def tell_of_work() -> None:
                told.at(meter.share(), meter.at_hand())

            stacks = in_stacks(matrices, self._kind, self._room, self._factors_bytes, _WAITING)
            tasks = (self._task(stack, meter) for stack in stacks)
            # Factors that wait for their turn may be large, so none is begun that many slots ahead.
            done = in_order(tasks, self.budget.threads, self.stop.set, tell_of_work, ahead=1)
            factored = in_turn(matrices, (one for stack in done for one in stack))
            for update, each in views:
                yield update, [next(factored)[1] for _ in each]
                tell_of_work()

    def _task(self, stack: tuple[_Matrix, ...], meter: WorkMeter) -> Task[list[tuple[int, Factors | None]]]:
        view = stack[0].view
        slots = 1 if self._room(stack[0]) > 1 else self.budget.slots(view)
        return Task(partial(self._factors, stack, slots, meter), slots, len(stack) * view.long * view.short)

    def _kind(self, matrix: _Matrix) -> Hashable:
        """What matrices have in common that can be factored together."""
        return matrix.view.rows, matrix.view.columns, self._formats(matrix), matrix.update.pair.same_bytes

    def _room(self, matrix: _Matrix) -> int:
        """How many of its kind are factored together."""
        return self.budget.stack(matrix.view) if matrix.update.dtype == np.float32 else 1

    def _factors(self, stack: tuple[_Matrix, ...], slots: int, meter: WorkMeter) -> list[tuple[int, Factors | None]]:
        """The factors of a matrix, or of several in a stack, with their places."""
        name, total = stack[0].update.pair.name, sum(map(self._work, stack))
        with (
            product_threads(slots, self.stop),
            meter.matrix(name, total, slots) as work,
            work_counted_in(work),
        ):
            if self._room(stack[0]) == 1:
                alone = partial(self._factored, stack[0])
                return [(stack[0].place, or_streamed(self.gpu, alone, self.budget.share(slots), name))]
            with counted(total, opaque=True):
                found = or_streamed(self.gpu, partial(self._factored_each, stack), self.budget.free, name)
        return [(matrix.place, factors) for matrix, factors in zip(stack, found, strict=True)]

    def _factored(self, matrix: _Matrix, share: int) -> Factors | None:
        """The factors of a matrix, in `share` bytes; None if that one of several did not change."""
        source = source_of(self._panels(matrix), self._fits(matrix, share), self.gpu)
        norm = matrix.update.norm
        if matrix.beside > 1:
            (norm,) = run_together(source, update_norm(source.library))
        return factorize(source, norm, min(self.rank, source.short), self.energy, self.seed) if norm else None

    def _factored_each(self, stack: tuple[_Matrix, ...], share: int) -> list[Factors | None]:
        """Those of a stack; with no bytes to keep it in, of one after the other, read in every pass."""
        if not share:
            return [self._factored(matrix, 0) for matrix in stack]
        assert self.gpu is not None
        source = GpuStack(list(map(self._panels, stack)), self.gpu.slots, self._room(stack[0]))
        return factorize_each(source, len(stack), self.rank, self.energy)

    def _panels(self, matrix: _Matrix) -> StoredPanels:
        update = matrix.update
        return StoredPanels(self.shards, update.pair, self._formats(matrix), matrix.view, update.dtype)

    def _formats(self, matrix: _Matrix) -> Formats:
        pair = matrix.update.pair
        return formats_of(pair.base.dtype, pair.tuned.dtype, self.compare)

    def _factors_bytes(self, matrix: _Matrix) -> int:
        view = matrix.view
        return matrix.update.dtype.itemsize * (view.long + view.short) * min(self.rank, view.short)

    def _fits(self, matrix: _Matrix, share: int) -> bool:
        """Whether there is room for a decoded pair, beside its factors and what computes them."""
        view, itemsize = matrix.view, matrix.update.dtype.itemsize
        needed = self.budget.randomized_bytes(view, itemsize) + 2 * matrix.beside * self._factors_bytes(matrix)
        return cache_bytes(view, itemsize) + needed <= share

    def _work(self, matrix: _Matrix) -> float:
        """Foresee the work of a matrix, as far as its sizes tell."""
        view, stacked = matrix.view, self._room(matrix) > 1
        found, passes = factor_work(view.long, view.short, matrix.update.dtype.itemsize, self.rank, directly=stacked)
        kept = stacked or self._fits(matrix, self.budget.share(self.budget.slots(view)))
        return found + self._panels(matrix).work * (1 if kept else passes + (matrix.beside > 1))
