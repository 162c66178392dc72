"""Read the bytes of consecutive blocks of a tensor pair from its shards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import NoReturn

import numpy as np

from ckptdiff.checkpoint import DTYPES, TensorInfo, TensorPair
from ckptdiff.checkpoint.open_shard import failed_once
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.measure.partial import BLOCK
from ckptdiff.measure.source import ByteArray, Extent, Window
from ckptdiff.run.tasks import Span

__all__ = ["Buffers", "ShardSource"]


class Buffers:
    """What one thread reads into; grows to what it is asked for."""

    def __init__(self) -> None:
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def __call__(self, side: int, size: int) -> ByteArray:
        """Room for ``size`` bytes of a side."""
        if self._buffers[side].size < size:
            self._buffers[side] = np.empty(size, np.uint8)
        return self._buffers[side]


class ShardSource:
    """A span of blocks of a tensor pair; a :class:`~ckptdiff.measure.source.Source`.

    Parameters
    ----------
    shards : OpenShards
    pair : TensorPair
    span : Span
    buffers : Buffers
        Of the thread that reads.
    stop : threading.Event
        Set when the run is given up; the next window or block then raises InterruptedError.
    """

    def __init__(
        self, shards: OpenShards, pair: TensorPair, span: Span, buffers: Buffers, stop: threading.Event
    ) -> None:
        self._shards, self._pair, self._buffers, self._stop = shards, pair, buffers, stop
        self._first = span.first * BLOCK
        self.numel = min(span.stop * BLOCK, pair.base.numel) - self._first

    def windows(self) -> Iterator[Window]:
        """The whole span if it is read, a block at a time if it is mapped."""
        sides = self._sides()
        readers = [self._shards[side.shard] for side in sides]
        mapped = all(reader.maps(side.start) for reader, side in zip(readers, sides, strict=True))
        step = BLOCK if mapped else max(self.numel, 1)
        for first in range(0, self.numel, step):
            stop = min(first + step, self.numel)
            self._go_on()
            with ExitStack() as stack:
                extents = []
                for index, (reader, side) in enumerate(zip(readers, sides, strict=True)):
                    start, end = self._bytes(side, first, stop)
                    if mapped:
                        view = stack.enter_context(reader.window(side, start, end, self._buffers(index, 0)))
                        extents.append(Extent(mapped=view))
                    else:
                        extents.append(Extent(reader.ready(start, end), start))
                yield Window(first, stop, extents[0], extents[-1])

    def blocks(self) -> Iterator[tuple[ByteArray, ByteArray]]:
        """Raw bytes of both sides, a block at a time."""
        for first in range(0, self.numel, BLOCK):
            self._go_on()
            with ExitStack() as stack:
                views = [
                    stack.enter_context(self._window(index, side, first, min(first + BLOCK, self.numel)))
                    for index, side in enumerate(self._sides())
                ]
                yield views[0], views[-1]

    def fail(self, first: int, stop: int) -> NoReturn:
        """Read coordinates that compiled code could not read; raises what is wrong."""
        for index, side in enumerate(self._sides()):
            with self._window(index, side, first, stop):
                pass
        raise failed_once(self._sides())

    def _sides(self) -> list[TensorInfo]:
        """What is to be read: bytes that both names share are read once."""
        return [self._pair.base] if self._pair.same_bytes else [self._pair.base, self._pair.tuned]

    def _window(self, index: int, side: TensorInfo, first: int, stop: int) -> AbstractContextManager[ByteArray]:
        start, end = self._bytes(side, first, stop)
        return self._shards[side.shard].window(side, start, end, self._buffers(index, end - start))

    def _bytes(self, side: TensorInfo, first: int, stop: int) -> tuple[int, int]:
        bits = DTYPES[side.dtype].bits
        start = side.start + (self._first + first) * bits // 8
        return start, min(start + (stop - first) * bits // 8, side.stop)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise InterruptedError("the run was given up")
