"""Run the tasks of a plan on threads, and hand back what they found in plan order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.measure.partial import Partial, Refined
from ckptdiff.run.planning import Plan
from ckptdiff.run.tasks import Task, cut, plan_tasks
from ckptdiff.run.worker import Result, Worker

__all__ = ["execute"]


def execute(plan: Plan, shards: OpenShards) -> Iterator[Result]:
    """Yield what each task gave, every pass over a tensor in block order.

    The result that completes a tensor carries its ``measured``. Small tensors are measured by one thread and come
    complete, in plan order. Large ones come span by span, merged here in block order; where a tensor needs further
    passes, those follow the tasks that are already under way, and later tensors may be complete before it.
    """
    stop = threading.Event()
    local = threading.local()
    large: dict[int, _LargeTensor] = {}
    spare: deque[Partial] = deque()

    def work(task: Task) -> list[Result]:
        if not hasattr(local, "worker"):
            local.worker = Worker(plan.device.worker(), shards, stop, spare)
        worker: Worker = local.worker
        span = task.spans[0]
        if task.alike:
            tensors = range(span.tensor, span.tensor + len(task.spans))
            return [worker.measure_alike([plan.pairs[i] for i in tensors], plan.measurement, span.tensor)]
        if task.whole:
            return [worker.measure(plan.pairs[s.tensor], plan.measurement(s.tensor), s) for s in task.spans]
        return [worker.pass_over(plan.pairs[span.tensor], large[span.tensor].measurement, span)]

    planned = plan_tasks(plan.loads)
    further: deque[Task] = deque()
    pending: deque[tuple[Task, Future[list[Result]]]] = deque()
    pool = ThreadPoolExecutor(plan.threads, thread_name_prefix="ckptdiff")
    try:
        while True:
            while len(pending) < plan.memory.tasks_waiting:
                task = further.popleft() if further else next(planned, None)
                if task is None:
                    break
                if not task.whole and task.spans[0].tensor not in large:
                    large[task.spans[0].tensor] = _LargeTensor(plan, task.spans[0].tensor, spare)
                pending.append((task, pool.submit(work, task)))
            if not pending:
                return
            task, future = pending.popleft()
            for result in future.result():
                if not task.whole:
                    further.extend(large[result.tensors[0]].take(result))
                    if result.measured:
                        del large[result.tensors[0]]
                yield result
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _LargeTensor:
    """A tensor pair that several tasks share."""

    def __init__(self, plan: Plan, index: int, spare: deque[Partial]) -> None:
        self.measurement = plan.measurement(index)
        self._index, self._load = index, plan.loads[index]
        self._found: Partial | Refined | None = None
        self._spare = spare

    def take(self, result: Result) -> list[Task]:
        """Merge the next span; after the last one, complete the result or return the tasks of a further pass."""
        if self._found is None:
            self._found = result.found
        elif isinstance(self._found, Partial):
            assert isinstance(result.found, Partial)
            self._found.add(result.found)
            self._spare.append(result.found)
        else:
            assert isinstance(result.found, Refined)
            self._found.add(result.found)
        result.found = None
        assert result.span is not None
        if result.span.stop < self._load.blocks:
            return []
        assert self._found is not None
        self.measurement.take(self._found)
        last, self._found = self._found, None
        if self.measurement.next is not None:
            return list(cut(self._index, self._load))
        result.measured = self.measurement.measured()
        if isinstance(last, Partial):
            self._spare.append(last)
        return []
