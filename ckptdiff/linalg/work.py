"""Count how much of a long computation is done, while it runs.

Work is counted in multiply-adds of float32 in a large product; all else is worth as many as take the same time. What
a matrix will take is known from its sizes beforehand, up to what its values decide: a Krylov space that is complete
early, a pass that has to be made again. So the work of a matrix is an estimate until it ends, and then what it took.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SURE = 0.8
"""Share of a silent routine that is taken to pass at the expected speed; after that it slows down towards its end."""


class MatrixWork:
    """The work of one matrix. The threads that share it count; another one looks.

    Attributes
    ----------
    name : str
        Of its tensor.
    total : float
        What it will take, as far as that is known.
    done : float
        What was counted so far.
    """

    def __init__(self, meter: WorkMeter, name: str, total: float, threads: int) -> None:
        self.name, self.total, self.done = name, total, 0.0
        self._meter, self._threads = meter, threads
        self._begun = time.monotonic()
        self._within: dict[object, tuple[float, float]] = {}

    def add(self, amount: float) -> None:
        """Count what is done."""
        with self._meter._lock:
            self.done += amount

    @contextmanager
    def within(self, amount: float) -> Iterator[None]:
        """Count what is done inside, which tells nothing before its end."""
        key, begun = object(), time.monotonic()
        self._within[key] = amount, begun
        try:
            yield
        finally:
            del self._within[key]
            with self._meter._lock:
                known, seconds = self._meter._learned
                self._meter._learned = known + amount, seconds + time.monotonic() - begun
                self.done += amount

    def estimate(self, now: float, speed: float) -> float:
        """Work done by now, with the likely part of what tells nothing; never more than the total."""
        done = self.done
        for amount, begun in list(self._within.values()):
            if speed == 0.0:  # nothing of the kind has ended yet: as fast as a thread has been so far
                seconds = (begun - self._begun) * self._threads
                speed = done / seconds if seconds > 0 else 0.0
            done += amount * _passed(speed * (now - begun) / amount)
        return min(done, self.total)


class WorkMeter:
    """The work of all matrices of a stage; `total` is what they will take, as far as that is known.

    Some of it may be `done` already.
    """

    def __init__(self, total: float, done: float = 0.0) -> None:
        self._total, self._ended = total, done
        self._under_way: dict[MatrixWork, None] = {}
        self._learned = 0.0, 0.0
        self._lock = threading.Lock()
        self._share = 0.0

    @contextmanager
    def matrix(self, name: str, total: float, threads: int = 1) -> Iterator[MatrixWork]:
        """Count the work of a matrix, which is part of the whole; at the end its total is what it took."""
        work = MatrixWork(self, name, total, threads)
        self._under_way[work] = None
        try:
            yield work
        finally:
            with self._lock:
                del self._under_way[work]
                self._ended += work.done
                self._total += work.done - work.total

    def took(self, work: float) -> None:
        """Count the work of a matrix that was measured elsewhere."""
        with self._lock:
            self._ended += work

    def share(self, more: float = 0.0) -> float:
        """Which part of the work is done, with so much `more` done elsewhere; never less than before."""
        now = time.monotonic()
        amount, seconds = self._learned
        speed = amount / seconds if seconds else 0.0
        done = more + self._ended + sum(work.estimate(now, speed) for work in list(self._under_way))
        self._share = max(self._share, min(done / self._total, 1.0) if self._total > 0 else 0.0)
        return self._share

    def at_hand(self) -> str:
        """Name of the tensor that is under way for the longest time."""
        return next((work.name for work in list(self._under_way)), "")


def _passed(share: float) -> float:
    """How much of something is done after so much of the expected time: all of it, never quite."""
    return share if share <= _SURE else 1 - (1 - _SURE) * math.exp((_SURE - share) / (1 - _SURE))


_READ = 16
"""Columns of a product that take as long as to read its left side: narrow products wait for memory."""


def product_work(rows: float, inner: float, columns: float, itemsize: int) -> float:
    """The work of a product of (rows, inner) and (inner, columns)."""
    return rows * inner * (columns + _READ) * itemsize / 4


def gram_work(rows: float, columns: float, itemsize: int) -> float:
    """The work of a Gram matrix of (rows, columns)."""
    return rows * columns * columns / 2 * itemsize / 4


def eigenvalues_work(n: int, itemsize: int) -> float:
    """The work of all eigenvalues of a matrix of `n` rows; as all work here, as measured from 256 rows to 2,048."""
    return (1.5 * n + 700) * n**2 * itemsize / 4


def eigenpairs_work(n: int, count: int, itemsize: int) -> float:
    """The work of `count` eigenpairs of a matrix of `n` rows."""
    if few_of(count, n) and itemsize == 4:
        return (0.8 * n + 700 + 3 * count) * n**2
    if few_of(count, n):
        return eigenvalues_work(n, itemsize) + 5 * count * n**2 * itemsize / 4
    return (4.5 * n + 700) * n**2 * itemsize / 4


def few_of(count: int, n: int) -> bool:
    """Whether so few eigenpairs of `n` are found one by one; else all are found together."""
    return 3 * (count - 1) < n
