"""What the sections of `spectra.py` share: sizes, matrices, and timing in turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes, and how often."""

    long: int
    short: int
    rounds: int
    threads: int
    trials: int
    trial_shape: tuple[int, int]
    pair_size: int
    pair_shape: tuple[int, int]
    tiny_size: int
    embedding: tuple[int, int]
    folder: Path
    exact_rounds: int


def in_turns(rounds: int, tasks: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each task, all run once a round, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    results = {}
    for _ in range(rounds):
        for name, task in tasks.items():
            begun = time.perf_counter()
            results[name] = task()
            seconds[name].append(time.perf_counter() - begun)
            print(f"  {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


@contextmanager
def our_threads(count: int) -> Iterator[None]:
    """Products on so many threads, as the spectral stage has it for a matrix that is measured alone."""
    from ckptdiff.linalg.threads import one_blas_thread, product_threads

    with one_blas_thread(), product_threads(count):
        yield


def leading(delta: Any, seed: int = 0, threads: int = 1) -> Any:
    """Leading values of an update, as randomized mode finds them."""
    import numpy as np

    from ckptdiff.linalg.krylov import KrylovOptions, krylov_values
    from ckptdiff.linalg.stages import ArrayPanels, run_together

    options = KrylovOptions(seed=seed)
    with our_threads(threads):
        (found,) = run_together(ArrayPanels(delta, delta), krylov_values(delta.shape[1], RANKS, np.float32, options))
    return found
