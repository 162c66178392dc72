"""How many threads one matrix takes.

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
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

__all__ = ["in_background", "in_parts", "one_blas_thread", "product_threads"]


@dataclass(frozen=True, slots=True)
class _Threads:
    """What the products of a matrix are shared among."""

    pool: ThreadPoolExecutor | None = None
    stop: threading.Event = field(default_factory=threading.Event)


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

    Parameters
    ----------
    count : int
    stop : threading.Event, optional
        The first product after it is set raises :class:`concurrent.futures.CancelledError`.
    """
    with ThreadPoolExecutor(count, thread_name_prefix="ckptdiff-products") if count > 1 else nullcontext() as pool:
        token = _THREADS.set(_Threads(pool, stop or threading.Event()))
        try:
            yield
        finally:
            _THREADS.reset(token)


def in_background(work: Callable[[], None]) -> Future[None]:
    """Begin work on a thread of this matrix, or do it now if the matrix has but one."""
    pool = _THREADS.get().pool
    if pool is not None:
        return pool.submit(work)
    done: Future[None] = Future()
    work()
    done.set_result(None)
    return done


def in_parts(work: Callable[[int], None], parts: int) -> None:
    """Call `work` with 0 to ``parts - 1``, in any order, on the threads that this matrix has."""
    threads = _THREADS.get()
    if threads.stop.is_set():
        raise CancelledError
    if threads.pool is None or parts == 1:
        for part in range(parts):
            work(part)
    else:
        for _ in threads.pool.map(work, range(parts)):
            pass
