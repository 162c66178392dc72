"""How many threads BLAS takes.

OpenBLAS shares out even small products, and its threads wait for each other by spinning: where another process has the
core of one of them, an eigenproblem of some hundred rows takes seconds instead of milliseconds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

__all__ = ["blas_threads", "one_blas_thread"]


@cache
def _controller() -> Any:
    import scipy.linalg  # noqa: F401  SciPy brings a BLAS of its own, which must be loaded to be found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def blas_threads(count: int) -> AbstractContextManager[Any]:
    """Limit the threads of every BLAS in the process, and restore them at the end."""
    limited: AbstractContextManager[Any] = _controller().limit(limits=count, user_api="blas")
    return limited


def one_blas_thread() -> AbstractContextManager[Any]:
    """Keep small work on one thread."""
    return blas_threads(1)
