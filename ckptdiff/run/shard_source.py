"""Say where the bytes of tensor pairs lie, and tell the disk that they come next."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NoReturn

import numpy as np

from ckptdiff.checkpoint import DTYPES, TensorInfo, TensorPair
from ckptdiff.checkpoint.open_shard import failed_once
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.codes.fetch import AT, FILE, MEMORY
from ckptdiff.measure.partial import BLOCK
from ckptdiff.measure.source import Runs, SmallPairs, Window
from ckptdiff.run.tasks import Span

__all__ = ["ShardSource", "small_pairs"]

_NOTHING = np.empty(0, np.uint8)


class ShardSource:
    """A span of blocks of a tensor pair; a :class:`~ckptdiff.measure.source.Source`.

    Parameters
    ----------
    shards : OpenShards
    pair : TensorPair
    span : Span
    stop : threading.Event
        Set when the run is given up; the next window then raises InterruptedError.
    """

    def __init__(self, shards: OpenShards, pair: TensorPair, span: Span, stop: threading.Event) -> None:
        self._shards, self._stop = shards, stop
        # Bytes that both names share are read once.
        self._sides = [pair.base] if pair.same_bytes else [pair.base, pair.tuned]
        self._first = span.first * BLOCK
        self.numel = min(span.stop * BLOCK, pair.base.numel) - self._first

    def windows(self) -> Iterator[Window]:
        """The whole span if it is read, a block at a time if it is mapped."""
        readers = [self._shards[side.shard] for side in self._sides]
        mapped = all(reader.maps(side.start) for reader, side in zip(readers, self._sides, strict=True))
        step = BLOCK if mapped else max(self.numel, 1)
        for first in range(0, self.numel, step):
            if self._stop.is_set():
                raise InterruptedError("the run was given up")
            stop = min(first + step, self.numel)
            with ExitStack() as stack:
                runs: list[Runs] = []
                for reader, side in zip(readers, self._sides, strict=True):
                    start, end = self._bytes(side, first, stop)
                    if mapped:
                        view = stack.enter_context(reader.window(side, start, end, _NOTHING))
                        runs.append(np.array([[first, MEMORY, view.ctypes.data]]))
                    else:
                        runs.append(np.array([[first, reader.ready(start, end), start]]))
                yield Window(first, stop, runs[0], runs[-1])

    def fail(self, first: int, stop: int) -> NoReturn:
        """Read coordinates that could not be read; raises what is wrong."""
        for side in self._sides:
            start, end = self._bytes(side, first, stop)
            with self._shards[side.shard].window(side, start, end, np.empty(end - start, np.uint8)):
                pass
        raise failed_once(self._sides)

    def _bytes(self, side: TensorInfo, first: int, stop: int) -> tuple[int, int]:
        bits = DTYPES[side.dtype].bits
        start = side.start + (self._first + first) * bits // 8
        return start, min(start + (stop - first) * bits // 8, side.stop)


def small_pairs(shards: OpenShards, pairs: Sequence[TensorPair]) -> SmallPairs:
    """Where whole tensor pairs lie, the files of all of them checked at once."""
    base, tuned = (_whole(shards, side) for side in ([pair.base for pair in pairs], [pair.tuned for pair in pairs]))
    return SmallPairs(base, tuned, np.array([pair.base.numel for pair in pairs], np.int64))


def _whole(shards: OpenShards, tensors: Sequence[TensorInfo]) -> Runs:
    """The run of each tensor."""
    of_shard: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        of_shard[tensor.shard.path].append(tensor)
    descriptors = {
        path: shards[some[0].shard].ready(min(tensor.start for tensor in some), max(tensor.stop for tensor in some))
        for path, some in of_shard.items()
    }
    runs = np.zeros((len(tensors), 3), np.int64)
    runs[:, FILE] = [descriptors[tensor.shard.path] for tensor in tensors]
    runs[:, AT] = [tensor.start for tensor in tensors]
    return runs
