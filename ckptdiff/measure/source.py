"""Define what a backend is given to read: the bytes of both sides of consecutive blocks of one tensor pair.

Where they lie is told by *runs*: an int64 array of shape (k, 3), whose rows say from which coordinate on, in which
open file or in memory, and at which byte or address; see :mod:`ckptdiff.codes.fetch`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptdiff.codes.fetch import FIRST, MEMORY
from ckptdiff.measure.partial import BLOCK

ByteArray = NDArray[np.uint8]
Runs = NDArray[np.int64]


class Coded(Protocol):
    """The sides of a span of which one at least is codes with scales, for a backend that makes values of them."""

    @property
    def sides(self) -> tuple[bool, bool]:
        """Which sides are; the other is stored as values."""

    @property
    def counts(self) -> bool:
        """Whether to count what the sides have in common besides values."""

    def most_bytes(self, numel: int) -> int:
        """What a side of so many consecutive coordinates takes in :meth:`read`, at most."""

    def read(self, first: int, stop: int, base: ByteArray, tuned: ByteArray) -> None:
        """Read coordinates of the span: a coded side as ``measure/cuda/coded_side.py`` lays it out."""

    def found(self, equal_codes: int, changed: int, within: int) -> None:
        """Take what was counted of the whole span; see :class:`~ckptdiff.checkpoint.kept.Kept`."""


@dataclass(frozen=True, slots=True)
class Window:
    """Coordinates ``first`` to ``stop`` - 1 of a span that can be read now; ``first`` is a multiple of ``BLOCK``."""

    first: int
    stop: int
    base: Runs
    tuned: Runs
    """Their runs; one object if both sides are the same bytes. Shape (k, 3)."""
    coded: Coded | None = None
    """What has them instead, of the whole span; only where the backend ``decodes``."""


@dataclass(frozen=True, slots=True)
class SmallPairs:
    """Whole tensor pairs of at most a block."""

    base: Runs
    tuned: Runs
    """The one run of each side of each; shape (k, 3)."""
    numel: NDArray[np.int64]
    """Their coordinates; shape (k,)."""


class Source(Protocol):
    """A span of blocks, which a backend goes through window by window."""

    @property
    def numel(self) -> int:
        """Coordinates of the span."""

    def windows(self) -> Iterator[Window]:
        """All coordinates in order; each window is valid until the next one is asked for."""

    def fail(self, first: int, stop: int) -> NoReturn:
        """Raise what is wrong with coordinates that could not be read, also where a second look finds nothing."""


class InMemory:
    """A source whose bytes, contiguous uint8 of shape (bytes,), are in memory already."""

    def __init__(self, base: ByteArray, tuned: ByteArray, numel: int) -> None:
        self.numel = numel
        self._sides = base, tuned

    def windows(self) -> Iterator[Window]:
        """One window on everything."""
        base, tuned = self._sides
        yield Window(0, self.numel, in_memory(base), in_memory(tuned))

    def fail(self, first: int, stop: int) -> NoReturn:
        """Memory does not fail."""
        raise AssertionError(f"coordinates {first} to {stop} were not measured")


def in_memory(held: ByteArray) -> Runs:
    """The run of bytes that an array holds, for as long as it lives."""
    return np.array([[0, MEMORY, held.ctypes.data]], np.int64)


def blocks_of_span(source: Source, bits: tuple[int, int]) -> Iterator[tuple[ByteArray, ByteArray]]:
    """Raw bytes of both sides, ``BLOCK`` coordinates at a time, of elements that may be packed below 8 bits.

    Arrays are read-only and valid until the next are asked for; one object if both sides are the same bytes.
    """
    rooms = [np.empty(min(source.numel, BLOCK) * each // 8, np.uint8) for each in bits]
    for window in source.windows():
        runs = [window.base] if window.tuned is window.base else [window.base, window.tuned]
        for first in range(window.first, window.stop, BLOCK):
            stop = min(first + BLOCK, window.stop)
            views = []
            for side, each, room in zip(runs, bits, rooms, strict=False):
                view = room[: (stop - first) * each // 8]
                if not read_runs(side, first, each, view):
                    source.fail(first, stop)
                views.append(view.view())
                views[-1].flags.writeable = False
            yield views[0], views[-1]


def read_runs(runs: Runs, first: int, bits: int, room: ByteArray) -> bool:
    """Fill ``room`` with bytes of a side, from a coordinate in or after the first run on; returns whether all came."""
    ends = [(start - first) * bits // 8 for start in runs[1:, FIRST].tolist()] + [room.size]
    done = 0
    for (start, file, at), end in zip(runs.tolist(), ends, strict=True):
        offset = at + (first - start) * bits // 8
        end = min(end, room.size)
        if file == MEMORY and done < end:
            ctypes.memmove(room.ctypes.data + done, offset + done, end - done)
            done = end
        while done < end:
            try:
                count = os.preadv(file, [room[done:end].data], offset + done)
            except OSError:
                return False
            if not count:
                return False
            done += count
    return True
