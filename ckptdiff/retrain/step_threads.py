"""Run many short pieces of compiled work on as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from threading import Lock

import torch

_MOST_AT_ONCE = 8
"""So few that making them does not keep another thread waiting for long."""


def run_all(work: Iterable[Callable[[], object]], most: int) -> None:
    """Run every piece of work, in any order; this thread takes part, and there are no more threads than pieces.

    Pieces, of which there are at most `most`, are made as they are taken, by one thread at a time, while others run
    theirs: several at a time, since each change of threads costs about what a small piece does, and fewer towards the
    end, so that all threads end together. What a piece raised, or the making of one, is raised when all threads are
    done.
    """
    waiting, lock = iter(work), Lock()
    threads = max(min(torch.get_num_threads(), most), 1)
    left = most

    def take() -> None:
        # A future for each piece would cost more than most pieces do.
        nonlocal left
        while True:
            with lock:
                pieces = list(islice(waiting, min(max(left // (4 * threads), 1), _MOST_AT_ONCE)))
                left -= len(pieces)
            if not pieces:
                return
            for piece in pieces:
                piece()

    others = threads - 1
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
