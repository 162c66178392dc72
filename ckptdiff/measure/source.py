"""Define what a backend is given to read: the bytes of both sides of consecutive blocks of one tensor pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.partial import BLOCK

__all__ = ["ByteArray", "Extent", "InMemory", "Source", "Window"]

ByteArray = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one side of a window lies.

    Attributes
    ----------
    descriptor : int or None
        An open file to read from, if the bytes are not in memory.
    offset : int
        Where the window starts in that file.
    mapped : read-only uint8 array or None
        The bytes, at an address that is a multiple of 8.
    """

    descriptor: int | None = None
    offset: int = 0
    mapped: ByteArray | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Coordinates ``first`` to ``stop`` - 1 of a span that can be read now; ``first`` is a multiple of ``BLOCK``.

    Both extents are the same object if both sides are the same bytes.
    """

    first: int
    stop: int
    base: Extent
    tuned: Extent


class Source(Protocol):
    """A span of blocks: compiled code goes through its windows, NumPy through its blocks."""

    @property
    def numel(self) -> int:
        """Coordinates of the span."""

    def windows(self) -> Iterator[Window]:
        """All coordinates in order; each window is valid until the next one is asked for."""

    def blocks(self) -> Iterator[tuple[ByteArray, ByteArray]]:
        """Raw bytes of both sides, ``BLOCK`` coordinates at a time; read-only, valid until the next is asked for."""

    def fail(self, first: int, stop: int) -> NoReturn:
        """Read coordinates that compiled code could not read, to learn why.

        Raises
        ------
        CkptdiffError
            Whatever is wrong, also where a second look finds nothing.
        """


class InMemory:
    """A source whose bytes are in memory already.

    Parameters
    ----------
    base, tuned : uint8 array, shape (bytes,)
    numel : int
        How many coordinates they hold.
    """

    def __init__(self, base: ByteArray, tuned: ByteArray, numel: int) -> None:
        self.numel = numel
        self._base, self._tuned = base.view(), tuned.view()
        self._base.flags.writeable = self._tuned.flags.writeable = False

    def windows(self) -> Iterator[Window]:
        """One window on everything."""
        yield Window(0, self.numel, Extent(mapped=self._base), Extent(mapped=self._tuned))

    def blocks(self) -> Iterator[tuple[ByteArray, ByteArray]]:
        """Cut both sides."""
        for first in range(0, self.numel, BLOCK):
            stop = min(first + BLOCK, self.numel)
            yield (
                self._base[self._base.size * first // self.numel : self._base.size * stop // self.numel],
                self._tuned[self._tuned.size * first // self.numel : self._tuned.size * stop // self.numel],
            )

    def fail(self, first: int, stop: int) -> NoReturn:
        """Memory does not fail."""
        raise AssertionError(f"coordinates {first} to {stop} were not measured")
