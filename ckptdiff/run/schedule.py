"""Have the tasks of a plan done, on threads of this process or by other hands, and hand back results in plan order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby, islice
from typing import Protocol, TypeVar

from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.measure.partial import Partial
from ckptdiff.measure.passes import Measurement
from ckptdiff.run.kept_results import KeptResults
from ckptdiff.run.planning import Plan
from ckptdiff.run.tasks import SpanTask, cut, plan_tasks
from ckptdiff.run.worker import Result, Worker, blank

__all__ = ["Begun", "Hands", "Threads", "execute", "in_order_begun", "results_of"]

_PATIENCE = 0.2  # as in_order has it
_AHEAD = 64
"""Tasks whose remote bytes are asked for ahead: so many of small tensors keep connections busy."""
_Begun = TypeVar("_Begun")


class Begun(Protocol):
    """Tasks that were handed out together."""

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; whether they are done."""

    def results(self) -> Iterable[Result]:
        """What each gave, in order, of consecutive spans of a tensor one; raises what went wrong."""


class Hands(Protocol):
    """Whoever does tasks: a context manager, which gives up what is under way when it is left.

    Attributes
    ----------
    at_once : int
        Batches that are under way, or wait with their results, at most.
    spare : deque of Partial
        Partials that nobody reads any more: to clear the bins of one that were in use is cheaper than to get zeros for
        all.
    """

    at_once: int
    spare: deque[Partial]

    def __enter__(self) -> Hands: ...

    def __exit__(self, *raised: object) -> None: ...

    def batches(self, tasks: Iterable[SpanTask], first: bool = False) -> Iterator[Sequence[SpanTask]]:
        """Consecutive tasks as they are handed out together; `first` if that is before those that were asked for."""

    def begin(self, batch: Sequence[SpanTask], passes: Mapping[int, Measurement]) -> Begun:
        """Hand tasks out; `passes` holds the measurement of each large tensor, by its place in the plan."""

    def under_way(self) -> int:
        """Bytes that were measured of what has given no results yet, as far as that is known."""


class Threads:
    """The threads of this process: a task at a time on each.

    Parameters
    ----------
    plan : Plan
    shards : OpenShards
    kept : KeptResults, optional
        Told what each task gave, before anyone merges it.
    """

    def __init__(self, plan: Plan, shards: OpenShards, kept: KeptResults | None = None) -> None:
        self._plan, self._shards, self._kept = plan, shards, kept
        self.at_once, self.spare = plan.memory.tasks_waiting, deque[Partial]()
        self._stop, self._local = threading.Event(), threading.local()
        self._fetched: dict[SpanTask, AbstractContextManager[object]] = {}
        self._pool = ThreadPoolExecutor(plan.threads, thread_name_prefix="ckptdiff")

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, tasks: Iterable[SpanTask], first: bool = False) -> Iterator[Sequence[SpanTask]]:
        """Each for itself; the remote bytes of many are asked for together."""
        left, upcoming = iter(tasks), deque[SpanTask]()
        while True:
            if len(upcoming) <= _AHEAD // 2:
                # All of what goes first: each that is asked for then would come before those asked for before it.
                some = list(left if first else islice(left, _AHEAD // 2))
                parts = [self._plan.remote_parts(task) for task in some]
                self._fetched.update(zip(some, self._shards.all_ahead(parts, first), strict=True))
                upcoming.extend(some)
            if not upcoming:
                return
            yield [upcoming.popleft()]

    def begin(self, batch: Sequence[SpanTask], passes: Mapping[int, Measurement]) -> Begun:
        """Hand a task to the next free thread."""
        (task,) = batch
        measurement = None if task.span is None else passes[task.span.tensor]
        return _InThread(self._pool.submit(self._work, task, measurement, self._fetched.pop(task)))

    def under_way(self) -> int:
        """Tasks are small."""
        return 0

    def _work(self, task: SpanTask, measurement: Measurement | None, fetched: AbstractContextManager[object]) -> Result:
        if not hasattr(self._local, "worker"):
            self._local.worker = Worker(self._plan, self._shards, self._stop, self.spare)
        worker: Worker = self._local.worker
        with fetched:
            if task.span is None or measurement is None:
                result = worker.measure(task.tensors, task.alike)
            else:
                result = worker.pass_over(measurement, task.span)
        if self._kept is not None:
            self._kept.keep(task, 0 if measurement is None else measurement.turn, result)
        return result


class _InThread:
    """A task of one thread."""

    def __init__(self, future: Future[Result]) -> None:
        self._future = future

    def wait(self, seconds: float) -> bool:
        return bool(wait((self._future,), seconds).done)

    def results(self) -> Iterable[Result]:
        return (self._future.result(),)


def in_order_begun(begin: Callable[[], _Begun | None], at_once: int) -> Iterator[_Begun]:
    """Give what `begin` begins, in order, begun ahead, the first at once; None from it: there is nothing to begin."""
    pending: deque[_Begun] = deque()

    def fill() -> None:
        while len(pending) < at_once and (begun := begin()) is not None:
            pending.append(begun)

    def rest() -> Iterator[_Begun]:
        while pending:
            yield pending.popleft()
            fill()

    fill()
    return rest()


def results_of(begun: Begun, idle: Callable[[], None]) -> Iterator[Result]:
    """What tasks gave; while they are waited for, `idle` is called again and again."""
    while not begun.wait(_PATIENCE):
        idle()
    yield from begun.results()


def execute(plan: Plan, hands: Hands, idle: Callable[[], None], kept: KeptResults | None = None) -> Iterator[Result]:
    """Give what each task gave, every pass over a tensor in block order; the first tasks are begun at once.

    The result that completes tensors carries their ``records``. Small tensors are measured in one go and come
    complete, in plan order. Large ones come span by span, merged here in block order; where a tensor needs further
    passes, those follow the tasks that are already under way, and later tensors may be complete before it.
    While a result is waited for, `idle` is called again and again. What an earlier run has `kept` is not measured.
    """
    large: dict[int, Measurement] = {}

    def turn(task: SpanTask) -> int:
        return large[task.span.tensor].turn if task.span is not None and task.span.tensor in large else 0

    def is_known(task: SpanTask) -> bool:
        return kept is not None and kept.has(task, turn(task))

    def arranged(tasks: Iterable[SpanTask], first: bool = False) -> Iterator[Sequence[SpanTask]]:
        for known, some in groupby(tasks, is_known):
            yield from ([task] for task in some) if known else hands.batches(some, first)  # noqa: B031

    def handed_out(batch: Sequence[SpanTask]) -> Begun | SpanTask:
        for task in batch:
            if task.span is not None and task.span.tensor not in large:
                large[task.span.tensor] = plan.measurement(task.span.tensor, plan.want_masks)
        return batch[0] if is_known(batch[0]) else hands.begin(batch, large)

    def begin() -> Begun | SpanTask | None:
        batch = further.popleft() if further else next(planned, None)
        return None if batch is None else handed_out(batch)

    def given(begun: Begun | SpanTask) -> Iterator[Result]:
        if not isinstance(begun, SpanTask):
            yield from results_of(begun, idle)
            return
        assert kept is not None
        found = kept.find(begun, turn(begun), lambda: blank(hands.spare))
        if found is not None:
            yield found
            return
        # What was kept of it is damaged.
        for batch in hands.batches(cut(begun.span, plan.grain) if begun.span is not None else [begun], first=True):
            yield from results_of(hands.begin(batch, large), idle)

    spans = (lambda index, turn: ()) if kept is None else kept.spans
    planned = arranged(plan_tasks(plan.loads, plan.grain, lambda index: spans(index, 0)))
    further: deque[Sequence[SpanTask]] = deque()
    handed: Iterator[Begun | SpanTask] = in_order_begun(begin, hands.at_once)

    def merged(result: Result) -> Result:
        if result.span is not None and result.found is not None:
            index, load = result.span.tensor, plan.loads[result.span.tensor]
            last = result.span.stop == load.blocks
            hands.spare.extend(large[index].take(result.found, last))
            result.found = None
            if last and large[index].next is not None:
                whole = replace(result.span, first=0)
                further.extend(arranged(cut(whole, plan.grain, spans(index, large[index].turn)), first=True))
            elif last:
                result.records = large.pop(index).row
        return result

    return (merged(result) for begun in handed for result in given(begun))
