"""Say where the bytes of tensor pairs lie, and tell the disk that they come next."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NoReturn

import numpy as np

from ckptdiff.checkpoint import DTYPES, Shard, TensorInfo, TensorPair
from ckptdiff.checkpoint.blocks import values_of
from ckptdiff.checkpoint.boxes import (
    Run,
    boxes_of_elements,
    is_contiguous,
    read_elements,
    runs_of,
    stored_parts,
)
from ckptdiff.checkpoint.decoding import Box, Decoder, Floats
from ckptdiff.checkpoint.kept import Kept, count_kept
from ckptdiff.checkpoint.open_shard import failed_once
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.weights import Assembled, Decoded, Weight
from ckptdiff.codes.fetch import AT, FILE, MEMORY
from ckptdiff.measure.partial import BLOCK
from ckptdiff.measure.source import ByteArray, Runs, SmallPairs, Window
from ckptdiff.run.coded_pair import CodedPair, goes_as_codes
from ckptdiff.run.tasks import Grain, Load, Span

__all__ = ["ShardSource", "SideRooms", "most_fetched", "remote_parts", "small_pairs"]

_NOTHING, _NO_RUNS = np.empty(0, np.uint8), np.empty((0, 3), np.int64)


class SideRooms:
    """What one thread reads into; grows to what it is asked for.

    Attributes
    ----------
    decoders : list of Decoder
        One for each side.
    """

    def __init__(self) -> None:
        self._rooms = [_NOTHING, _NOTHING, _NOTHING]
        self.decoders = [Decoder(), Decoder()]

    def take_odd(self) -> set[tuple[str, str, str, str]]:
        """The odd scales that decoders met since this was last asked."""
        found = self.decoders[0].odd | self.decoders[1].odd
        for decoder in self.decoders:
            decoder.odd = set()
        return found

    def __call__(self, side: int, size: int) -> ByteArray:
        """Room for ``size`` bytes of a side; a third one is for values of either."""
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
    rooms : SideRooms
        Of the thread, for a side that has to be put together or decoded.
    stop : threading.Event
        Set when the run is given up; the next window then raises InterruptedError.
    count_as : str or None
        What the sides are compared as, if it is to be counted what they have in common besides values.
    decodes : bool
        Whether the backend does.
    """

    def __init__(
        self,
        shards: OpenShards,
        pair: TensorPair,
        span: Span,
        rooms: SideRooms,
        stop: threading.Event,
        count_as: str | None = None,
        decodes: bool = False,
    ) -> None:
        self._shards, self._rooms, self._stop = shards, rooms, stop
        # Bytes that both names share are read once.
        self._sides: list[Weight] = [pair.base] if pair.same_bytes else [pair.base, pair.tuned]
        self._counts = count_as if any(isinstance(side, Decoded) for side in self._sides) else None
        self._kept: Kept | None = None
        self._first = span.first * BLOCK
        self._coded: CodedPair | None = None
        if decodes and goes_as_codes(pair.base, pair.tuned):
            counts = count_as is not None
            self._coded = CodedPair(shards, pair.base, pair.tuned, self._first, rooms.decoders, counts)
        self.numel = min(span.stop * BLOCK, pair.base.numel) - self._first

    @property
    def kept(self) -> Kept | None:
        """What the sides have in common besides values, of the windows so far; None if neither is quantised."""
        return self._kept if self._coded is None else self._coded.kept

    def windows(self) -> Iterator[Window]:
        """The whole span if compiled code or a device reads it, else a block at a time."""
        whole = self._coded is not None or (not self._shards.mapped and all(map(is_contiguous, self._sides)))
        step = max(self.numel, 1) if whole else BLOCK
        for first in range(0, self.numel, step):
            if self._stop.is_set():
                raise InterruptedError("the run was given up")
            stop = min(first + step, self.numel)
            if self._coded is not None:
                yield Window(first, stop, _NO_RUNS, _NO_RUNS, self._coded)
                continue
            if self._counts is not None and not any(isinstance(side, Assembled) for side in self._sides):
                base, tuned = self._decoded(first, stop, self._counts)
                yield Window(first, stop, base, tuned)
                continue
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

    def _decoded(self, first: int, stop: int, count_as: str) -> list[Runs]:
        """Read both sides as values, and count what else they have in common."""
        rooms = [
            self._rooms(index, (stop - first) * DTYPES[side.dtype].bits // 8) for index, side in enumerate(self._sides)
        ]
        done = 0
        for rows, columns in boxes_of_elements(self._sides[0].shape, self._first + first, self._first + stop):
            shape = rows[1] - rows[0], columns[1] - columns[0]
            found: list[Box | Floats] = []
            for side, room, decoder in zip(self._sides, rooms, self._rooms.decoders, strict=True):
                size = DTYPES[side.dtype].bits // 8
                part = room[done * size : (done + shape[0] * shape[1]) * size]
                if isinstance(side, Decoded):
                    values = part.view(np.float32).reshape(shape)
                    found.append(decoder.decode(self._shards, side, rows, columns, values, detail=True))
                else:
                    start = rows[0] * self._sides[0].shape[-1] + columns[0]
                    read_elements(self._shards, side, start, start + shape[0] * shape[1], part)
                    found.append(self._floats(side.dtype, part).reshape(shape))
            kept = count_kept(*found, as_bf16=count_as == "bf16")
            self._kept = kept if self._kept is None else self._kept + kept
            done += shape[0] * shape[1]
        return [np.array([[first, MEMORY, room.ctypes.data]]) for room in rooms]

    def _floats(self, dtype: str, stored: ByteArray) -> Floats:
        """Float32 values of one side; in room that is there, which costs less than to ask for some."""
        if dtype != "BF16":
            return values_of(dtype, stored).astype(np.float32, copy=False)
        codes = stored.view(np.uint16)
        wide = self._rooms(2, 4 * codes.size).view(np.uint32)
        wide[:] = codes
        wide <<= 16
        return wide.view(np.float32)

    def _runs(self, stack: ExitStack, index: int, first: int, stop: int) -> Runs:
        side, at = self._sides[index], self._first + first
        if not is_contiguous(side):
            room = self._rooms(index, (stop - first) * DTYPES[side.dtype].bits // 8)
            read_elements(self._shards, side, at, self._first + stop, room, self._rooms.decoders[index])
            return np.array([[first, MEMORY, room.ctypes.data]])
        runs = []
        for run in runs_of(side, at, self._first + stop):
            lent = self._shards[run.tensor.shard].lend(stack, run.tensor, *_bytes(run))
            runs.append((run.first - self._first, *lent))
        return np.array(runs, np.int64)


def small_pairs(stack: ExitStack, shards: OpenShards, pairs: Sequence[TensorPair]) -> SmallPairs:
    """Where whole tensor pairs lie whose sides are one run each, the files of all of them checked at once.

    They can be read as long as the stack is open.
    """
    sides = [pair.base for pair in pairs], [pair.tuned for pair in pairs]
    base, tuned = (_whole(stack, shards, side) for side in sides)
    return SmallPairs(base, tuned, np.array([pair.base.numel for pair in pairs], np.int64))


def _whole(stack: ExitStack, shards: OpenShards, sides: Sequence[Weight]) -> Runs:
    """The run of each side."""
    of_shard: dict[str, list[tuple[int, TensorInfo, int, int]]] = defaultdict(list)
    for index, side in enumerate(sides):
        tensor, start, stop = _place(side)
        of_shard[tensor.shard.path].append((index, tensor, start, stop))
    runs = np.empty((len(sides), 3), np.int64)
    runs[:, 0] = 0
    for held in of_shard.values():
        reader = shards[held[0][1].shard]
        rows, _, starts, stops = zip(*held, strict=True)
        if reader.descriptor == MEMORY:
            runs[rows, FILE:] = [reader.lend(stack, tensor, start, stop) for _, tensor, start, stop in held]
        else:
            runs[rows, FILE], runs[rows, AT] = reader.ready(min(starts), max(stops)), starts
    return runs


def _place(side: Weight) -> tuple[TensorInfo, int, int]:
    """Where the one run of a side begins and ends."""
    if isinstance(side, TensorInfo) and not side.slices:
        return side, side.start, side.stop
    (run,) = runs_of(side, 0, side.numel)
    return run.tensor, *_bytes(run)


def most_fetched(pairs: Sequence[TensorPair], loads: Sequence[Load], grain: Grain) -> int:
    """Bytes of remote files that a task of a plan reads, at most."""
    held = [load for pair, load in zip(pairs, loads, strict=True) if _is_remote(pair)]
    blocks = max(grain.blocks, -(-grain.numel // BLOCK) + 1)
    longest = max((sum(blocks * BLOCK * bits // 8 for bits in load.bits) for load in held), default=0)
    # Joined ranges hold what lies between them too.
    return min(longest, sum(load.nbytes for load in held)) * 9 // 8


def _is_remote(pair: TensorPair) -> bool:
    return any(part.shard.remote is not None for side in (pair.base, pair.tuned) for part in stored_parts(side))


def remote_parts(pair: TensorPair, first: int, stop: int) -> list[tuple[Shard, int, int]]:
    """The bytes of remote files that elements `first` to `stop` - 1 of a pair are read from.

    Of a side that is not contiguous, about the part of each stored tensor that such a part of all elements takes: what
    else it needs is fetched when it is asked for.
    """
    parts: list[tuple[Shard, int, int]] = []
    for side in [pair.base] if pair.same_bytes else [pair.base, pair.tuned]:
        if is_contiguous(side):
            parts += [(run.tensor.shard, *_bytes(run)) for run in runs_of(side, first, stop)]
            continue
        for tensor in stored_parts(side):
            begin, end = (tensor.nbytes * at // max(side.numel, 1) for at in (first, stop))
            parts.append((tensor.shard, tensor.start + begin, tensor.start + end))
    return [part for part in parts if part[0].remote is not None and part[1] < part[2]]


def _bytes(run: Run) -> tuple[int, int]:
    """Where a run begins and ends in its file."""
    bits = DTYPES[run.tensor.dtype].bits
    start = run.tensor.start + run.start * bits // 8
    return start, start + run.numel * bits // 8
