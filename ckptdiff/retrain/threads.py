"""Run many short pieces of compiled work on as many threads as torch uses."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

__all__ = ["run_all"]


def run_all(work: Iterable[Callable[[], object]]) -> None:
    """Run every piece of work, in any order; this thread takes part.

    Raises
    ------
    BaseException
        What a piece raised, when all threads are done.
    """
    waiting = deque(work)

    def take() -> None:
        # A future for each piece would cost more than most pieces do.
        while waiting:
            try:
                piece = waiting.popleft()
            except IndexError:  # another thread was quicker
                return
            piece()

    others = min(torch.get_num_threads(), len(waiting)) - 1
    futures = [_pool(others).submit(take) for _ in range(others)]
    try:
        take()
    finally:
        for future in futures:
            future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ckptdiff-retrain")


# The threads of a pool do not exist in a forked child.
os.register_at_fork(after_in_child=_pool.cache_clear)
