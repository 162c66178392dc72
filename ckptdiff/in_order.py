"""Run tasks of different weight side by side, and hand back what they give in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from ckptdiff.interrupts import raise_pending

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Task(Generic[Result]):
    """Something to do."""

    work: Callable[[], Result]
    slots: int
    """Of the machine, that it takes."""
    size: int
    """About how long it takes; of those that may begin the longest is first."""


def in_order(
    tasks: Iterator[Task[Result]],
    slots: int,
    stop: Callable[[], None],
    idle: Callable[[], None],
    ahead: int = 8,
    threads: int = 0,
    patience: float = 0.2,
) -> Iterator[Result]:
    """Yield the result of each task, in the order of the tasks; those that run at a time take at most `slots` slots.

    Parameters
    ----------
    stop : callable
        Called when the caller gives up or a task fails, so that tasks under way may end early.
    idle : callable
        Called in this thread, again and again while a result is waited for.
    ahead : int
        Tasks a slot that may be begun before the first that is not done; their results wait in memory. With eight, a
        large task begins in good time.
    threads : int
        0 stands for one per slot. With fewer, the next tasks lie ready for a thread that has ended one, which does not
        wait for the caller then.
    patience : float
        Seconds between two calls of `idle` while nothing ends.
    """
    waiting: list[tuple[int, Task[Result]]] = []
    running: dict[Future[Result], tuple[int, int]] = {}
    # concurrent.futures.wait() would close the locks of all futures at every turn, and leave them closed if an
    # interrupt of a library user's own came just then.
    ready: SimpleQueue[Future[Result]] = SimpleQueue()
    done: dict[int, Result] = {}
    begun, ended, free = 0, 0, slots
    pool = ThreadPoolExecutor(threads or slots, thread_name_prefix="ckptdiff")
    try:
        while True:
            raise_pending()
            while begun < ended + ahead * slots and (task := next(tasks, None)) is not None:
                waiting.append((begun, task))
                begun += 1
            for place, task in sorted(waiting, key=lambda entry: -entry[1].size):
                if task.slots <= free:
                    waiting.remove((place, task))
                    future = pool.submit(task.work)
                    running[future] = place, task.slots
                    future.add_done_callback(ready.put)
                    free -= task.slots
            if ended in done:
                yield done.pop(ended)
                ended += 1
                continue
            if not running:
                return
            try:
                future = ready.get(timeout=patience)
            except Empty:
                idle()
                continue
            place, freed = running.pop(future)
            free += freed
            done[place] = future.result()
    finally:
        stop()
        pool.shutdown(wait=True, cancel_futures=True)
