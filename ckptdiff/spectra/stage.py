"""Run the spectral stage: every matrix of a plan, several at a time, after the coordinate pass."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Kind, TensorPair
from ckptdiff.checkpoint.boxes import stored_parts
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.region import holds
from ckptdiff.checkpoint.weights import CommonPart
from ckptdiff.events import Listener, stage
from ckptdiff.figures.result import Diff
from ckptdiff.figures.spectral import SPECTRAL_KEYS, Spectra
from ckptdiff.files.unfinished import Unfinished
from ckptdiff.in_order import Task, in_order
from ckptdiff.linalg.threads import one_blas_thread
from ckptdiff.linalg.work import WorkMeter
from ckptdiff.memory import SPECTRA_MEMORY, resident
from ckptdiff.options import Compare, Options
from ckptdiff.run.warm_up import Uses, load, panel_uses
from ckptdiff.spectra.budget import Budget
from ckptdiff.spectra.job import JobGroup, MatrixJob, Measuring
from ckptdiff.spectra.kept_spectra import KeptSpectra
from ckptdiff.spectra.matrices import MatrixView, matrices_of
from ckptdiff.spectra.measure import MatrixSpectra
from ckptdiff.spectra.spectra_gpu import HOST_ROOM, SpectraGpu
from ckptdiff.spectra.stacks import in_stacks, in_turn

_SMALL = 1 << 20
"""Entries of the matrices that are handed to a thread together."""
_WAITING = 1024
"""How many matrices later one of a kind may come that is measured together with the first; results wait meanwhile."""


class MatricesAway(Protocol):
    """Whoever measures matrices elsewhere.

    Attributes
    ----------
    budget : Budget
        How matrices share memory and threads there.
    alone : bool
        Whether matrices are measured one by one there, and not those of a kind together.
    batch : int
        Entries of the matrices that are handed over together.
    """

    budget: Budget
    alone: bool
    batch: int

    def measured(
        self, groups: Iterator[JobGroup], measuring: Measuring, meter: WorkMeter, idle: Callable[[float], None]
    ) -> Iterator[list[tuple[int, MatrixSpectra]]]:
        """Yield the matrices of each group, in any order, each with its place among all of the run.

        They are counted by the meter when they come, and `idle` is told again and again what is done of others.
        """


@dataclass(frozen=True, slots=True)
class TensorSpectra:
    """The spectra of one tensor."""

    index: int
    """In plan order."""
    matrices: tuple[MatrixSpectra, ...]
    """One for each matrix; empty for a vector."""

    @property
    def method(self) -> str:
        """How it was measured: "randomized", "exact", or "" if no matrix was; the lesser where they differ."""
        methods = {matrix.method for matrix in self.matrices} - {""}
        return max(methods, default="")

    @property
    def lists(self) -> dict[str, NDArray[np.float64]]:
        """Singular values and angles by name, shape (n,), or (matrices, n) if the tensor has several matrices."""
        names = dict.fromkeys(name for matrix in self.matrices for name in matrix.values)
        return {name: self._stacked(name) if len(self.matrices) > 1 else self._stacked(name)[0] for name in names}

    def _stacked(self, name: str) -> NDArray[np.float64]:
        """One list of values of every matrix, NaN where unknown, shape (matrices, length)."""
        rows = [matrix.values.get(name, np.empty(0)) for matrix in self.matrices]
        found = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
        for row, values in zip(found, rows, strict=True):
            row[: len(values)] = values
        return found


@dataclass(frozen=True, slots=True)
class SpectraPlan:
    """Matrices and memory of the spectra of a run, for all that its headers tell."""

    mode: str
    """As asked for."""
    matrices: int
    """To measure, of all tensors."""
    too_large: int
    """Matrices among them for which memory does not suffice."""
    max_memory: int
    """Bound on the peak resident size while spectra are measured, in bytes."""
    projected_memory: int
    """Projected peak, in bytes."""
    device: str = "cpu"
    gpu_memory: int = 0
    """Bound on the GPU memory that is taken, in bytes; 0 without a GPU."""
    projected_gpu_memory: int = 0
    """Projected peak of it, in bytes."""


def plan_spectra(
    pairs: Sequence[TensorPair], options: Options, taken: int, gpu: SpectraGpu | None = None
) -> SpectraPlan:
    """Say what spectra will take in a process that will hold `taken` bytes when they begin, without reading data."""
    assert options.spectra is not None
    views = [view for _, _, view, known in _matrices(pairs) if known]
    budget = gpu.budget(options) if gpu else Budget.of(options, taken, views)
    sizes = [budget.takes(view) for view in views]
    at_once = min(sum(sorted(sizes, reverse=True)[: budget.threads]), budget.free)
    mode, counts, peak = options.spectra.mode, (len(sizes), sizes.count(0)), budget.taken + at_once
    if gpu is None:
        return SpectraPlan(mode, *counts, budget.bound, peak)
    bound = options.max_memory or SPECTRA_MEMORY[mode]
    return SpectraPlan(mode, *counts, bound, taken + HOST_ROOM, gpu.name, budget.bound, peak)


def measure_spectra(
    pairs: Sequence[TensorPair],
    diff: Diff,
    shards: OpenShards,
    options: Options,
    tell: Listener,
    gpu: SpectraGpu | None = None,
    work: Unfinished | None = None,
    away: MatricesAway | None = None,
) -> Iterator[TensorSpectra]:
    """Yield the spectra of every tensor pair, in order, and tell of the stage "spectra".

    The result of the coordinate pass has a row for each pair: equal pairs are not read again, and the rounding null
    applies where it applied there. Without a GPU the processor measures. What an earlier command has kept of this work
    is not measured again, and what is measured elsewhere is asked for there.
    """
    if away is None:
        load(None, spectra_uses(pairs, options.compare), tell)
    unchanged = diff.columns["numel"] == diff.columns["unchanged_bitwise"]
    # float8 has a grid of its own
    off_grid = diff.columns["off_grid"] / np.maximum(diff.columns["numel"], 1)
    off_grid[[tensor.compare != "bf16" for tensor in diff.tensors]] = np.nan
    jobs = [
        MatrixJob(place, row, pair, view, float(off_grid[row]), bool(unchanged[row]), known)
        for place, (row, pair, view, known) in enumerate(_matrices(pairs))
    ]
    sides = (side for job in jobs for side in (job.pair.base, job.pair.tuned))
    remote = any(part.shard.remote is not None for side in sides for part in stored_parts(side))
    taken = resident() + (shards.room if remote else 0)
    if away is not None:
        budget = away.budget
    else:
        budget = gpu.budget(options) if gpu else Budget.of(options, taken, (job.view for job in jobs))
    kept = None if work is None else KeptSpectra(work, budget)
    measuring = Measuring(shards, options.compare, budget, gpu, None if kept is None else kept.keep)
    ready = [kept is not None and kept.find(job) is not None for job in jobs]
    total = sum(map(measuring.work, jobs))
    done = sum(measuring.work(job) for job, is_ready in zip(jobs, ready, strict=True) if is_ready)
    with stage(tell, "spectra", kept=done / total if total else 0.0) as told, one_blas_thread():
        meter = WorkMeter(total, done)

        def tell_of_work(more: float = 0.0) -> None:
            told.at(meter.share(more), meter.at_hand())
            if work is not None:
                work.tick()

        missing = [job for job, is_ready in zip(jobs, ready, strict=True) if not is_ready]
        tell_of_work()
        if away is not None:
            groups = _groups(missing, measuring, away.batch) if away.alone else _groups_of_a_kind(missing, measuring)
            found = away.measured(groups, measuring, meter, tell_of_work)
        else:
            groups = _groups(missing, measuring) if gpu is None else _groups_of_a_kind(missing, measuring)
            tasks = (Task(partial(measuring.measure, group, meter), group.slots, group.size) for group in groups)
            found = in_order(tasks, budget.threads, measuring.stop.set, tell_of_work)
        in_place = in_turn(missing, (one for some in found for one in some))
        measured = ((job.index, one) for job, one in in_place)
        each = measured if kept is None else kept.filled_in(jobs, ready, measured)
        for one in _by_tensor(each, len(pairs)):
            yield one
            tell_of_work()


def spectra_uses(pairs: Iterable[TensorPair], compare: Compare) -> Uses:
    """The kernels that spectra call."""
    return Uses((("scores",), *panel_uses(pairs, compare)))


def _matrices(pairs: Sequence[TensorPair]) -> Iterator[tuple[int, TensorPair, MatrixView, bool]]:
    """The matrices of floating tensors, each with the row of its tensor, and whether both sides have all of it."""
    for index, pair in enumerate(pairs):
        base, tuned, region = pair.base, pair.tuned, None
        if isinstance(base, CommonPart) and isinstance(tuned, CommonPart):
            pair, region = replace(pair, base=base.whole, tuned=tuned.whole), base.region
        for view in matrices_of(pair.name, pair.base.shape) if base.kind is Kind.FLOAT else ():
            whole = region is None or holds(region, view.offset, view.offset + view.long * view.short)
            yield index, pair, view, whole


def _groups(jobs: Sequence[MatrixJob], measuring: Measuring, most: int = _SMALL) -> Iterator[JobGroup]:
    """Matrices one by one, but small ones many at a time, since each would take less time than to hand it over."""
    batch: list[MatrixJob] = []
    for job in jobs:
        if batch and sum(held.size for held in batch) + job.size > most:
            yield JobGroup(tuple(batch), max(map(measuring.slots, batch)))
            batch.clear()
        batch.append(job)
    if batch:
        yield JobGroup(tuple(batch), max(map(measuring.slots, batch)))


def _groups_of_a_kind(jobs: Sequence[MatrixJob], measuring: Measuring) -> Iterator[JobGroup]:
    """Matrices for a GPU: small ones with others of their kind, as far as these are not far away."""
    for some in in_stacks(jobs, measuring.kind, measuring.room, lambda job: 1, _WAITING):
        yield JobGroup(some, 1, together=measuring.room(some[0]) > 1)


def _by_tensor(found: Iterator[tuple[int, MatrixSpectra]], tensors: int) -> Iterator[TensorSpectra]:
    """Gather the matrices of each tensor."""
    following = next(found, None)
    for index in range(tensors):
        matrices = []
        while following is not None and following[0] == index:
            matrices.append(following[1])
            following = next(found, None)
        yield TensorSpectra(index, tuple(matrices))


class SpectraTable:
    """The columns of a :class:`~ckptdiff.figures.spectral.Spectra` as they fill."""

    def __init__(self, mode: str, tensors: int) -> None:
        self._spectra = Spectra.empty(mode, tensors)
        self._methods, self._reasons = [""] * tensors, [""] * tensors
        self._experts: dict[int, NDArray[np.float64]] = {}

    def take(self, tensor: TensorSpectra) -> None:
        """Note one tensor: its figures, or the medians over its matrices."""
        row, measured = tensor.index, [matrix for matrix in tensor.matrices if matrix.method]
        self._spectra.matrices[row] = len(tensor.matrices)
        self._methods[row] = tensor.method
        self._reasons[row] = "; ".join(dict.fromkeys(reason for m in tensor.matrices for reason in m.reasons))
        self._spectra.ranks[row] = max((len(matrix.values["delta"]) for matrix in measured), default=0)
        for key in SPECTRAL_KEYS:
            self._spectra.columns[key][row] = _median([matrix.figures.get(key, math.nan) for matrix in measured])
        if len(tensor.matrices) > 1:
            figures = [[matrix.figures.get(key, math.nan) for key in SPECTRAL_KEYS] for matrix in tensor.matrices]
            self._experts[row] = np.array(figures, np.float64)

    def finish(self) -> Spectra:
        """The table."""
        methods, reasons = tuple(self._methods), tuple(self._reasons)
        return replace(self._spectra, methods=methods, reasons=reasons, experts=self._experts)


def _median(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return statistics.median(defined) if defined else math.nan
