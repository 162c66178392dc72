"""Make one call of a compiled kernel on as many threads as torch uses, which share its work."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def run_kernel(kernel: Callable[..., None], rows: NDArray[Any], *arguments: object) -> None:
    """Call ``kernel(rows, *arguments, counter)`` on several threads at once, this one included.

    A thread takes the units that no other has taken, so that all end together, and no result depends on how many there
    are. One that has not begun when the others are through is not waited for.
    """
    units = int(rows["end"][-1]) if rows.size else 0
    others = min(torch.get_num_threads(), units) - 1
    counter = np.zeros(1, np.int64)
    futures = [_pool(others).submit(kernel, rows, *arguments, counter) for _ in range(others)]
    try:
        if units:
            kernel(rows, *arguments, counter)
    finally:
        for future in futures:
            if not future.cancel():
                future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ckptdiff-retrain")


# The threads of a pool do not exist in a forked child.
os.register_at_fork(after_in_child=_pool.cache_clear)
