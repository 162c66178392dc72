"""Run the tasks of a plan on threads, and hand back what they found in plan order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager

from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.measure.partial import Partial
from ckptdiff.measure.passes import Measurement
from ckptdiff.run.planning import Plan
from ckptdiff.run.tasks import SpanTask, cut, plan_tasks
from ckptdiff.run.worker import Result, Worker

_PATIENCE = 0.2  # as in_order has it


def execute(plan: Plan, shards: OpenShards, idle: Callable[[], None]) -> Iterator[Result]:
    """Yield what each task gave, every pass over a tensor in block order.

    The result that completes tensors carries their ``records``. Small tensors are measured by one thread and come
    complete, in plan order. Large ones come span by span, merged here in block order; where a tensor needs further
    passes, those follow the tasks that are already under way, and later tensors may be complete before it.
    While a result is waited for, `idle` is called again and again.
    """
    stop = threading.Event()
    local = threading.local()
    large: dict[int, Measurement] = {}
    spare: deque[Partial] = deque()

    def work(task: SpanTask, fetched: AbstractContextManager[object]) -> Result:
        if not hasattr(local, "worker"):
            local.worker = Worker(plan, shards, stop, spare)
        worker: Worker = local.worker
        with fetched:
            if task.span is None:
                return worker.measure(task.tensors, task.alike)
            return worker.pass_over(large[task.span.tensor], task.span)

    planned = plan_tasks(plan.loads, plan.grain)
    further: deque[SpanTask] = deque()
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(plan.threads, thread_name_prefix="ckptdiff")
    try:
        while True:
            while len(pending) < plan.memory.tasks_waiting:
                task = further.popleft() if further else next(planned, None)
                if task is None:
                    break
                index = task.tensors.start
                if task.span is not None and index not in large:
                    large[index] = plan.measurement(index, plan.want_masks)
                pending.append(pool.submit(work, task, shards.ahead(plan.remote_parts(task))))
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
