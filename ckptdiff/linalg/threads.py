"""Share the products of one matrix among the threads that it may take.

BLAS is kept to one thread. Products are cut into parts that depend on the matrices alone, and threads of our own share
the parts. So no digit depends on the number of threads, as it does where BLAS cuts; several matrices can be measured at
a time; and small work does not wait for BLAS threads, which spin: where another process has the core of one of them, an
eigenproblem of some hundred rows takes seconds instead of milliseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from ckptdiff.linalg.work import MatrixWork


@dataclass(frozen=True, slots=True)
class _Threads:
    """The threads that share the products of a matrix, and where the products are counted."""

    pool: ThreadPoolExecutor | None = None
    count: int = 1
    stop: threading.Event = field(default_factory=threading.Event)
    work: MatrixWork | None = None


_THREADS: ContextVar[_Threads] = ContextVar("threads of the products", default=_Threads())  # noqa: B039


@cache
def _controller() -> Any:
    import scipy.linalg  # noqa: F401  SciPy brings a BLAS of its own, which must be loaded to be found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def one_blas_thread() -> AbstractContextManager[Any]:
    """Keep every BLAS in the process to one thread, and restore its threads at the end."""
    limited: AbstractContextManager[Any] = _controller().limit(limits=1, user_api="blas")
    return limited


@contextmanager
def product_threads(count: int, stop: threading.Event | None = None) -> Iterator[None]:
    """Share the products that this thread asks for among `count` threads.

    The first product after `stop` is set raises :class:`concurrent.futures.CancelledError`.
    """
    with ThreadPoolExecutor(count, thread_name_prefix="ckptdiff-products") if count > 1 else nullcontext() as pool:
        token = _THREADS.set(_Threads(pool, count, stop or threading.Event()))
        try:
            yield
        finally:
            _THREADS.reset(token)


@contextmanager
def work_counted_in(work: MatrixWork) -> Iterator[None]:
    """Count what this thread computes, and what others compute for it, as work of a matrix."""
    token = _THREADS.set(replace(_THREADS.get(), work=work))
    try:
        yield
    finally:
        _THREADS.reset(token)


def count_work(amount: float) -> None:
    """Count what was done for the matrix at hand, if anyone counts."""
    work = _THREADS.get().work
    if work is not None:
        work.add(amount)


@contextmanager
def counted(amount: float, *, opaque: bool = False) -> Iterator[None]:
    """Count all that is computed inside as so much; how far it is is guessed meanwhile, if it is `opaque`."""
    threads = _THREADS.get()
    if threads.work is None:
        yield
        return
    token = _THREADS.set(replace(threads, work=None))
    try:
        with threads.work.within(amount) if opaque else nullcontext():
            yield
    finally:
        _THREADS.reset(token)
    if not opaque:
        threads.work.add(amount)


def in_background(work: Callable[[], None]) -> Future[None]:
    """Begin work on a thread of this matrix, or do it now if the matrix has but one."""
    threads = _THREADS.get()
    if threads.pool is not None:
        context = copy_context()
        # It keeps to its thread: parts that wait for threads which wait for parts would wait for ever.
        context.run(_THREADS.set, replace(threads, pool=None, count=1))
        return threads.pool.submit(context.run, work)
    done: Future[None] = Future()
    work()
    done.set_result(None)
    return done


def end_if_stopped() -> None:
    """Raise CancelledError if this matrix is to be given up."""
    if _THREADS.get().stop.is_set():
        raise CancelledError


def thread_count() -> int:
    """How many threads share the parts of a product; no digit may depend on it."""
    return _THREADS.get().count


def in_parts(work: Callable[[int], None], parts: int, amount: float = 0.0) -> None:
    """Call `work` with 0 to ``parts - 1``, in any order, on the threads that this matrix has.

    It counts nothing by itself: all parts together count as `amount`.
    """
    end_if_stopped()
    threads = _THREADS.get()
    done = threads.pool.map(work, range(parts)) if threads.pool and parts > 1 else map(work, range(parts))
    for _ in done:
        if threads.work is not None:
            threads.work.add(amount / parts)


_PART = 256
"""Rows of a part, at least: what a part reads again should cost little beside its product."""
_MOST_PARTS = 16


def cuts(size: int, least: int = _PART, most: int = _MOST_PARTS) -> list[int]:
    """Where to cut `size` rows: a power of two of nearly equal parts of `least` rows or more, ends included."""
    parts = min(1 << max((size // least).bit_length() - 1, 0), most)
    # Whole vectors of the processor.
    step = -(-size // (16 * parts)) * 16
    return [min(step * part, size) for part in range(parts + 1)]
