"""How many threads one matrix takes.

BLAS is kept to one thread. Products are cut into parts that depend on the matrices alone, and threads of our own share
the parts. So no digit depends on the number of threads, as it does where BLAS cuts; several matrices can be measured at
a time; and small work does not wait for BLAS threads, which spin: where another process has the core of one of them, an
eigenproblem of some hundred rows takes seconds instead of milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

__all__ = ["in_parts", "one_blas_thread", "product_threads"]

_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool of the products", default=None)


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
def product_threads(count: int) -> Iterator[None]:
    """Share the products that this thread asks for among `count` threads."""
    if count == 1:
        yield
        return
    with ThreadPoolExecutor(count, thread_name_prefix="ckptdiff-products") as pool:
        token = _POOL.set(pool)
        try:
            yield
        finally:
            _POOL.reset(token)


def in_parts(work: Callable[[int], None], parts: int) -> None:
    """Call `work` with 0 to ``parts - 1``, in any order, on the threads that this matrix has."""
    pool = _POOL.get()
    if pool is None or parts == 1:
        for part in range(parts):
            work(part)
    else:
        for _ in pool.map(work, range(parts)):
            pass
