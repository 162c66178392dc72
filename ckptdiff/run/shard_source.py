"""Say where the bytes of tensor pairs lie, and tell the disk that they come next."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NoReturn

import numpy as np

from ckptdiff.checkpoint import DTYPES, TensorInfo, TensorPair
from ckptdiff.checkpoint.boxes import Run, is_contiguous, read_elements, runs_of, stored_parts
from ckptdiff.checkpoint.open_shard import failed_once
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.weights import Weight
from ckptdiff.codes.fetch import AT, FILE, MEMORY
from ckptdiff.measure.partial import BLOCK
from ckptdiff.measure.source import ByteArray, Runs, SmallPairs, Window
from ckptdiff.run.tasks import Span

__all__ = ["Rooms", "ShardSource", "small_pairs"]

_NOTHING = np.empty(0, np.uint8)


class Rooms:
    """What one thread reads into; grows to what it is asked for."""

    def __init__(self) -> None:
        self._rooms = [_NOTHING, _NOTHING]

    def __call__(self, side: int, size: int) -> ByteArray:
        """Room for ``size`` bytes of a side."""
        if self._rooms[side].size < size:
            self._rooms[side] = np.empty(size, np.uint8)
        return self._rooms[side][:size]


class ShardSource:
    """A span of blocks of a tensor pair; a :class:`~ckptdiff.measure.source.Source`.

    Parameters
    ----------
    shards : OpenShards
    pair : TensorPair
    span : Span
    rooms : Rooms
        Of the thread, for a side that has to be put together or decoded.
    stop : threading.Event
        Set when the run is given up; the next window then raises InterruptedError.
    """

    def __init__(self, shards: OpenShards, pair: TensorPair, span: Span, rooms: Rooms, stop: threading.Event) -> None:
        self._shards, self._rooms, self._stop = shards, rooms, stop
        # Bytes that both names share are read once.
        self._sides: list[Weight] = [pair.base] if pair.same_bytes else [pair.base, pair.tuned]
        self._first = span.first * BLOCK
        self.numel = min(span.stop * BLOCK, pair.base.numel) - self._first

    def windows(self) -> Iterator[Window]:
        """The whole span if compiled code reads it, else a block at a time."""
        whole = not self._shards.mapped and all(map(is_contiguous, self._sides))
        step = max(self.numel, 1) if whole else BLOCK
        for first in range(0, self.numel, step):
            if self._stop.is_set():
                raise InterruptedError("the run was given up")
            stop = min(first + step, self.numel)
            with ExitStack() as stack:
                runs = [self._runs(stack, index, first, stop) for index in range(len(self._sides))]
                yield Window(first, stop, runs[0], runs[-1])

    def fail(self, first: int, stop: int) -> NoReturn:
        """Read coordinates that could not be read; raises what is wrong."""
        for side in self._sides:
            room = np.empty((stop - first) * DTYPES[side.dtype].bits // 8, np.uint8)
            if not is_contiguous(side):
                read_elements(self._shards, side, self._first + first, self._first + stop, room)
                continue
            for run in runs_of(side, self._first + first, self._first + stop):
                with self._shards[run.tensor.shard].window(run.tensor, *_bytes(run), room):
                    pass
        raise failed_once([part for side in self._sides for part in stored_parts(side)])

    def _runs(self, stack: ExitStack, index: int, first: int, stop: int) -> Runs:
        side, at = self._sides[index], self._first + first
        if not is_contiguous(side):
            room = self._rooms(index, (stop - first) * DTYPES[side.dtype].bits // 8)
            read_elements(self._shards, side, at, self._first + stop, room)
            return np.array([[first, MEMORY, room.ctypes.data]])
        runs = []
        for run in runs_of(side, at, self._first + stop):
            reader = self._shards[run.tensor.shard]
            start, end = _bytes(run)
            if reader.maps(start):
                view = stack.enter_context(reader.window(run.tensor, start, end, _NOTHING))
                runs.append((run.first - self._first, MEMORY, view.ctypes.data))
            else:
                runs.append((run.first - self._first, reader.ready(start, end), start))
        return np.array(runs, np.int64)


def small_pairs(shards: OpenShards, pairs: Sequence[TensorPair]) -> SmallPairs:
    """Where whole tensor pairs lie whose sides are one run each, the files of all of them checked at once."""
    base, tuned = (_whole(shards, side) for side in ([pair.base for pair in pairs], [pair.tuned for pair in pairs]))
    return SmallPairs(base, tuned, np.array([pair.base.numel for pair in pairs], np.int64))


def _whole(shards: OpenShards, sides: Sequence[Weight]) -> Runs:
    """The run of each side."""
    of_shard: dict[str, list[tuple[int, int]]] = defaultdict(list)
    held: list[tuple[TensorInfo, int]] = []
    for side in sides:
        (run,) = runs_of(side, 0, side.numel)
        start, stop = _bytes(run)
        held.append((run.tensor, start))
        of_shard[run.tensor.shard.path].append((start, stop))
    by_path = {tensor.shard.path: tensor.shard for tensor, _ in held}
    descriptors = {
        path: shards[by_path[path]].ready(min(start for start, _ in some), max(stop for _, stop in some))
        for path, some in of_shard.items()
    }
    runs = np.zeros((len(held), 3), np.int64)
    runs[:, FILE] = [descriptors[tensor.shard.path] for tensor, _ in held]
    runs[:, AT] = [start for _, start in held]
    return runs


def _bytes(run: Run) -> tuple[int, int]:
    """Where a run begins and ends in its file."""
    bits = DTYPES[run.tensor.dtype].bits
    start = run.tensor.start + run.start * bits // 8
    return start, start + run.numel * bits // 8
