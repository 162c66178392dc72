"""Say where the bytes of spans lie that jobs read, of files here and elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES, Shard, TensorInfo
from ckptdiff.checkpoint.boxes import read_elements
from ckptdiff.checkpoint.open_shard import failed_once
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.codes.fetch import AT, FILE, MEMORY
from ckptdiff.measure.partial import BLOCK
from ckptdiff.track.plan import Followed

__all__ = ["TrackSpan", "announce", "fail", "lent", "remote_parts"]


class TrackSpan(NamedTuple):
    """A part of a tensor."""

    tensor: int
    first: int
    """Its first coordinate."""
    stop: int


def remote_parts(tensors: Sequence[Followed], job: Sequence[TrackSpan]) -> list[tuple[Shard, int, int]]:
    """Where the bytes of remote files begin and end that a job reads."""
    sides = ((span, side) for span in job for side in tensors[span.tensor].sides if side.shard.remote is not None)
    return [(side.shard, *_bytes(side, span)) for span, side in sides]


def lent(
    stack: ExitStack,
    tensors: Sequence[Followed],
    files: NDArray[np.int64],
    job: Sequence[TrackSpan],
    shards: OpenShards,
) -> NDArray[np.int64]:
    """Where compiled code reads each side of each span of a job, as long as the stack is open."""
    table = files[[span.tensor for span in job]]
    for row, span in zip(table, job, strict=True):
        for run, side in zip(row, tensors[span.tensor].sides, strict=True):
            if side.slices:  # gathered first
                room = np.empty((span.stop - span.first) * DTYPES[side.dtype].bits // 8, np.uint8)
                read_elements(shards, side, span.first, span.stop, room)
                stack.callback(room.view)  # which keeps it until then
                run[: AT + 1] = span.first, MEMORY, room.ctypes.data
                continue
            start, stop = _bytes(side, span)
            file, at = shards[side.shard].lend(stack, side, start, stop)
            run[FILE : AT + 1] = file, at - (start - side.start)
    return table


def _bytes(side: TensorInfo, span: TrackSpan) -> tuple[int, int]:
    size = DTYPES[side.dtype].bits // 8
    return side.start + span.first * size, side.start + span.stop * size


def announce(tensors: Sequence[Followed], job: Sequence[TrackSpan], shards: OpenShards) -> None:
    """Check the files and tell the disk what comes next, at once for what lies in one piece."""
    first, last = tensors[job[0].tensor], tensors[job[-1].tensor]
    numel = sum(span.stop - span.first for span in job)
    for number, (begin, end) in enumerate(zip(first.sides, last.sides, strict=True)):
        size = DTYPES[begin.dtype].bits // 8
        start, stop = begin.start + job[0].first * size, end.start + job[-1].stop * size
        if begin.shard is end.shard and stop - start == numel * size:
            shards[begin.shard].ready(start, stop)
        else:
            for span in job:
                side = tensors[span.tensor].sides[number]
                shards[side.shard].ready(side.start + span.first * size, side.start + span.stop * size)


def fail(followed: Followed, span: TrackSpan, shards: OpenShards) -> NoReturn:
    """Read a span that compiled code could not read, to learn why."""
    for side in followed.sides:
        if side.slices:  # gathered already, or this would not be asked
            continue
        size = DTYPES[side.dtype].bits // 8
        buffer = np.empty(BLOCK * size, np.uint8)
        for first in range(span.first, span.stop, BLOCK):
            stop = min(first + BLOCK, span.stop)
            with shards[side.shard].window(side, side.start + first * size, side.start + stop * size, buffer):
                pass
    raise failed_once(followed.sides)
