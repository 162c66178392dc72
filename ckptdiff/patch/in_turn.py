"""Let the threads that have the blocks of one tensor come one after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InTurn"]

_PATIENCE = 0.2
"""Seconds between two looks whether the run was given up."""


class InTurn:
    """Turns of one tensor.

    Parameters
    ----------
    stop : threading.Event
        Set when the run is given up; who waits then raises InterruptedError.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._next, self._stop = 0, stop
        self._turn = threading.Condition()

    @contextmanager
    def at(self, place: int) -> Iterator[None]:
        """Wait for those with the blocks before this one, all of which have been begun, and then work alone."""
        with self._turn:
            while self._next != place:
                if self._stop.is_set():
                    raise InterruptedError("the run was given up")
                self._turn.wait(_PATIENCE)
        yield
        with self._turn:
            self._next += 1
            self._turn.notify_all()
