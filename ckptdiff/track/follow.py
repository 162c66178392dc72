"""Follow every tensor through all checkpoints, each read once."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptdiff.backends.kernels.tiles import facts_of
from ckptdiff.backends.kernels.trajectory import Flow, Rooms, follow_span, new_rooms
from ckptdiff.backends.partial import BLOCK
from ckptdiff.checkpoint import DTYPES
from ckptdiff.errors import CheckpointError, OptionError
from ckptdiff.events import Listener, StageProgress
from ckptdiff.options import Compare, default_threads
from ckptdiff.stream.shards import OpenShards, open_shards
from ckptdiff.track.plan import Followed, plan_track
from ckptdiff.track.result import Track

__all__ = ["track"]

_TASK = 48
"""Blocks of a span, those of all checkpoints counted: so few that all threads end at about the same time."""


@dataclass(frozen=True, eq=False, slots=True)
class _Found:
    """What a span of one tensor gave."""

    tensor: int
    counts: NDArray[np.int64]
    sums: NDArray[np.float64]


def track(
    base: str | os.PathLike[str],
    steps: Sequence[str | os.PathLike[str]],
    *,
    compare: Compare = "bf16",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threads: int = 0,
    listener: Listener | None = None,
) -> Track:
    """Follow an update through the checkpoints of a training run.

    Counts are exact; norms of bfloat16 checkpoints, summed in float32 over 256 coordinates, are good to six digits.

    Parameters
    ----------
    base : path-like
        The checkpoint that training started from.
    steps : sequence of path-like
        Later ones, in order.
    compare : {"bf16", "stored"}
        Cast floating tensors of 16 bits and more to bfloat16 first, or compare the stored values.
    include, exclude : sequence of str
        Globs on tensor names.
    threads : int
        0 stands for one per available core.
    listener : callable, optional
        Called with a `StageProgress` for every part of a tensor that was followed.

    Raises
    ------
    CkptdiffError
        A checkpoint that cannot be read, or changes; nothing to follow.
    """
    if not 0 <= threads <= 1024:
        raise OptionError("number of threads out of range", expected="0 to 1024", found=threads)
    plan = plan_track(base, steps, compare=compare, include=include, exclude=exclude)
    tensors = plan.tensors
    counts = np.zeros((len(Flow), len(plan.steps), len(tensors)), np.int64)
    # Blocks are added in their order, so that no digit depends on threads.
    squares = np.zeros((1 + len(plan.steps), len(tensors)))
    with open_shards("pread") as shards:
        for found in _execute(tensors, shards, threads or default_threads()):
            counts[:, :, found.tensor] += found.counts.T
            for block in found.sums.T:
                squares[:, found.tensor] += block
            if listener is not None:
                listener(StageProgress("steps", found.tensor, len(tensors), tensors[found.tensor].sides[0].name))
    norms = np.sqrt(squares)
    return Track(
        base=plan.base.path,
        steps=tuple(step.path for step in plan.steps),
        compare=compare,
        names=tuple(followed.sides[0].name for followed in tensors),
        shapes=tuple(followed.sides[0].shape for followed in tensors),
        counts={flow.name.lower(): counts[flow] for flow in Flow},
        base_norms=norms[0],
        delta_norms=norms[1:],
        warnings=plan.warnings,
    )


def _execute(tensors: Sequence[Followed], shards: OpenShards, threads: int) -> Iterator[_Found]:
    """Yield what each span gave, in order."""
    local = threading.local()
    stop = threading.Event()

    def work(index: int, span: tuple[int, int]) -> _Found:
        if stop.is_set():
            raise InterruptedError("the run was given up")
        if not hasattr(local, "rooms"):
            local.rooms = {}
        code = tensors[index].code_dtype
        if code.itemsize not in local.rooms:
            local.rooms[code.itemsize] = new_rooms(code, len(tensors[index].sides))
        return _follow(tensors[index], index, span, shards, local.rooms[code.itemsize])

    planned = ((index, span) for index, followed in enumerate(tensors) for span in _spans(followed))
    pending: deque[Future[_Found]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ckptdiff-track")
    try:
        for task in planned:
            pending.append(pool.submit(work, *task))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _spans(followed: Followed) -> Iterator[tuple[int, int]]:
    numel, step = followed.sides[0].numel, max(_TASK // len(followed.sides), 1) * BLOCK
    return ((first, min(first + step, numel)) for first in range(0, numel, step))


def _follow(followed: Followed, index: int, span: tuple[int, int], shards: OpenShards, rooms: Rooms) -> _Found:
    compare, sides = followed.compare, followed.sides
    first, stop = span
    casts, tables = followed.casts()
    files = np.empty((len(sides), 4), np.int64)
    for row, side, cast in zip(files, sides, casts, strict=True):
        size = DTYPES[side.dtype].bits // 8
        descriptor = shards[side.shard].ready(side.start + first * size, side.start + stop * size)
        row[:] = descriptor, side.start, size, cast
    found = _Found(
        index,
        np.zeros((len(sides) - 1, len(Flow)), np.int64),
        np.zeros((len(sides), -(-(stop - first) // BLOCK))),
    )
    values, magnitude = facts_of(compare).values, followed.code_dtype.type(compare.magnitude)
    came = follow_span(files, tables, values, magnitude, span, rooms, found.counts, found.sums)
    if came < stop:
        _fail(followed, came, min(came + rooms.codes.shape[1], stop), shards)
    return found


def _fail(followed: Followed, first: int, stop: int, shards: OpenShards) -> None:
    """Read coordinates that compiled code could not read, to learn why."""
    for side in followed.sides:
        size = DTYPES[side.dtype].bits // 8
        buffer = np.empty((stop - first) * size, np.uint8)
        with shards[side.shard].window(side, side.start + first * size, side.start + stop * size, buffer):
            pass
    raise CheckpointError(
        f"cannot read the shard: coordinates {first} to {stop} of {followed.sides[0].name} failed once"
    )
