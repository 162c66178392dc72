"""Run many short pieces of compiled work on as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock

import torch

__all__ = ["run_all"]


def run_all(work: Iterable[Callable[[], object]], most: int) -> None:
    """Run every piece of work, in any order; this thread takes part.

    Pieces are made as they are taken, by one thread at a time, while others run theirs.

    Parameters
    ----------
    work : iterable of callable
    most : int
        How many pieces there are: no more threads are woken.

    Raises
    ------
    BaseException
        What a piece raised, or the making of one, when all threads are done.
    """
    waiting, lock = iter(work), Lock()

    def take() -> None:
        # A future for each piece would cost more than most pieces do.
        while True:
            with lock:
                piece = next(waiting, None)
            if piece is None:
                return
            piece()

    others = max(min(torch.get_num_threads(), most) - 1, 0)
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
