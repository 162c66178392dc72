"""Run the tasks of a plan on threads, and hand back what they found in plan order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from itertools import islice

from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.measure.partial import Partial
from ckptdiff.measure.passes import Measurement
from ckptdiff.run.kept_results import KeptResults
from ckptdiff.run.planning import Plan
from ckptdiff.run.tasks import SpanTask, cut, plan_tasks
from ckptdiff.run.worker import Result, Worker

_PATIENCE = 0.2  # as in_order has it
_AHEAD = 64
"""Tasks whose remote bytes are asked for ahead: so many of small tensors keep connections busy."""


def execute(
    plan: Plan, shards: OpenShards, idle: Callable[[], None], kept: KeptResults | None = None
) -> Iterator[Result]:
    """Yield what each task gave, every pass over a tensor in block order.

    The result that completes tensors carries their ``records``. Small tensors are measured by one thread and come
    complete, in plan order. Large ones come span by span, merged here in block order; where a tensor needs further
    passes, those follow the tasks that are already under way, and later tensors may be complete before it.
    While a result is waited for, `idle` is called again and again. What an earlier run has `kept` is not measured, and
    what is measured is kept.
    """
    stop = threading.Event()
    local = threading.local()
    large: dict[int, Measurement] = {}
    spare: deque[Partial] = deque()

    def work(task: SpanTask, fetched: AbstractContextManager[object]) -> Result:
        if not hasattr(local, "worker"):
            local.worker = Worker(plan, shards, stop, spare)
        worker: Worker = local.worker
        measurement = None if task.span is None else large[task.span.tensor]
        turn = 0 if measurement is None else measurement.turn
        result = None if kept is None else kept.find(task, turn, worker.blank)
        if result is not None:
            return result
        with fetched:
            if task.span is None or measurement is None:
                result = worker.measure(task.tensors, task.alike)
            else:
                result = worker.pass_over(measurement, task.span)
        if kept is not None:
            kept.keep(task, turn, result)
        return result

    def ahead(tasks: Sequence[SpanTask], first: bool) -> Iterator[tuple[SpanTask, AbstractContextManager[object]]]:
        turns = (large[task.span.tensor].turn if task.span and task.span.tensor in large else 0 for task in tasks)
        known = [kept is not None and kept.has(task, turn) for task, turn in zip(tasks, turns, strict=True)]
        parts = [() if done else plan.remote_parts(task) for task, done in zip(tasks, known, strict=True)]
        return zip(tasks, shards.all_ahead(parts, first), strict=True)

    planned = plan_tasks(plan.loads, plan.grain)
    upcoming: deque[tuple[SpanTask, AbstractContextManager[object]]] = deque()
    further: deque[SpanTask] = deque()
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(plan.threads, thread_name_prefix="ckptdiff")
    try:
        while True:
            while len(pending) < plan.memory.tasks_waiting:
                if len(upcoming) <= _AHEAD // 2:
                    upcoming.extend(ahead(list(islice(planned, _AHEAD // 2)), first=False))
                if not (further or upcoming):
                    break
                task, fetched = next(ahead([further.popleft()], first=True)) if further else upcoming.popleft()
                index = task.tensors.start
                if task.span is not None and index not in large:
                    large[index] = plan.measurement(index, plan.want_masks)
                pending.append(pool.submit(work, task, fetched))
            if not pending:
                return
            first = pending.popleft()
            while not wait((first,), _PATIENCE).done:
                idle()
            result = first.result()
            if result.span is not None and result.found is not None:
                index, load = result.span.tensor, plan.loads[result.span.tensor]
                last = result.span.stop == load.blocks
                spare.extend(large[index].take(result.found, last))
                result.found = None
                if last and large[index].next is not None:
                    further.extend(cut(index, load, plan.grain))
                elif last:
                    result.records = large.pop(index).row
            yield result
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
