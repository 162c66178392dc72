"""Follow every tensor through all checkpoints, each read once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES
from ckptdiff.checkpoint.boxes import read_elements
from ckptdiff.checkpoint.open_shard import failed_once
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.codes.fetch import AT, MEMORY
from ckptdiff.events import Listener, Stage, ignore, stage
from ckptdiff.in_order import Task, in_order
from ckptdiff.measure.kernels.tiles import facts_of
from ckptdiff.measure.partial import BLOCK
from ckptdiff.options import Compare, as_tuple, check_threads, default_threads
from ckptdiff.run.warm_up import Uses, load
from ckptdiff.track.kernels.trajectory import Flow, Rooms, follow_spans, new_rooms
from ckptdiff.track.plan import Followed, plan_track
from ckptdiff.track.result import Track

_SPANS = 256
"""The most spans of a job: small tensors have a cost of their own."""


class _Span(NamedTuple):
    """A part of a tensor."""

    tensor: int
    first: int
    """Its first coordinate."""
    stop: int


@dataclass(frozen=True, eq=False, slots=True)
class _Found:
    """Counts and sums of the spans of a job."""

    tensors: NDArray[np.int64]
    """Of each span."""
    nbytes: int
    """Bytes that were read."""
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

    Counts are exact; norms of bfloat16 checkpoints, summed in float32 over 256 coordinates, are good to five digits.

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
        Told of the stages "looking for ties", if a step lacks a head of the base, "compiling", if kernels are
        missing, and "following", in bytes.

    Returns
    -------
    Track

    Raises
    ------
    OptionError
        No step, a single string for several, or a number of threads out of range.
    CheckpointError
        A checkpoint that cannot be read, or changes while it is read.
    PairingError
        A step that has no tensor of the base, or no floating tensor that all steps have.

    Examples
    --------
    >>> from ckptdiff.track import track
    >>> found = track("fixtures/llama/base", ["fixtures/llama/tuned", "fixtures/llama/base"], include=["lm_head*"])
    >>> [(row["support"], row["reverted"]) for row in found.overall()]
    [(3599, 0), (0, 3599)]
    """
    check_threads(threads)
    steps, include, exclude = as_tuple("steps", steps), as_tuple("include", include), as_tuple("exclude", exclude)
    tell = listener or ignore
    plan = plan_track(base, steps, compare=compare, include=include, exclude=exclude, tell=tell)
    tensors = plan.tensors
    counts = np.zeros((len(tensors), len(plan.steps), len(Flow)), np.int64)
    squares = np.zeros((len(tensors), 1 + len(plan.steps)))
    scattered = any(side.slices for followed in tensors for side in followed.sides)
    kernels = sorted({("track", followed.compare.name) for followed in tensors})
    load(None, Uses((*kernels, *([("boxes",)] if scattered else []))), tell)
    nbytes = sum(side.nbytes for followed in tensors for side in followed.sides)
    with open_shards("pread") as shards, stage(tell, "following", nbytes, "bytes") as told:
        for found in _execute(tensors, shards, threads or default_threads(), told):
            np.add.at(counts, found.tensors, found.counts)
            np.add.at(squares, found.tensors, found.sums)  # in their order: no digit depends on threads
            told.more(found.nbytes, tensors[found.tensors[-1]].sides[0].name)
    norms = np.sqrt(squares)
    return Track(
        base=plan.base.path,
        steps=tuple(step.path for step in plan.steps),
        compare=compare,
        names=tuple(followed.sides[0].name for followed in tensors),
        shapes=tuple(followed.sides[0].shape for followed in tensors),
        counts={flow.name.lower(): counts[:, :, flow].T for flow in Flow},
        base_norms=norms[:, 0],
        delta_norms=norms[:, 1:].T,
        warnings=plan.warnings,
    )


def _execute(tensors: Sequence[Followed], shards: OpenShards, threads: int, told: Stage) -> Iterator[_Found]:
    """Yield the counts and sums of each job, in order."""
    local = threading.local()
    stop = threading.Event()
    files = _files(tensors, shards)

    def work(job: Sequence[_Span]) -> _Found:
        if stop.is_set():
            raise InterruptedError("the run was given up")
        if not hasattr(local, "rooms"):
            local.rooms = {}
        code = tensors[job[0].tensor].code_dtype
        if code.itemsize not in local.rooms:
            local.rooms[code.itemsize] = new_rooms(code, files.shape[1])
        return _follow(tensors, files, job, shards, local.rooms[code.itemsize])

    # All of one size: in the order in which they lie on the disk. Jobs are short, so each thread has the next at hand.
    tasks = (Task(partial(work, job), 1, 0) for job in _jobs(tensors))
    return in_order(tasks, 2 * threads, stop.set, told.again, ahead=1, threads=threads)


def _files(tensors: Sequence[Followed], shards: OpenShards) -> NDArray[np.int64]:
    """Where compiled code reads each side of each tensor, if not of slices; shape (tensors, sides, 5)."""
    return np.array(
        [
            [
                (0, shards[side.shard].descriptor, side.start, DTYPES[side.dtype].bits // 8, cast)
                for side, cast in zip(followed.sides, followed.casts()[0], strict=True)
            ]
            for followed in tensors
        ]
    )


def _jobs(tensors: Sequence[Followed], blocks: int = 48) -> Iterator[list[_Span]]:
    """Spans in order, of so many blocks a job, those of all checkpoints counted; those of a job have the same dtypes.

    Jobs are so small that all threads end at about the same time, and so large that Python costs little beside them.
    """
    sides = len(tensors[0].sides)
    longest = max(blocks // sides // 2, 1) * BLOCK  # by the tensor alone: what a sum rounds to depends on no other
    for _, alike in groupby(enumerate(tensors), key=lambda numbered: numbered[1].dtypes):
        job: list[_Span] = []
        total = 0
        for index, followed in alike:
            numel = followed.sides[0].numel
            for first in range(0, numel, longest):
                job.append(_Span(index, first, min(first + longest, numel)))
                total += job[-1].stop - first
                if total * sides >= blocks * BLOCK or len(job) == _SPANS:
                    yield job
                    job, total = [], 0
        if job:
            yield job


def _follow(
    tensors: Sequence[Followed], files: NDArray[np.int64], job: Sequence[_Span], shards: OpenShards, rooms: Rooms
) -> _Found:
    _announce(tensors, job, shards)
    alike = tensors[job[0].tensor]
    _, tables = alike.casts()
    values, magnitude = facts_of(alike.compare).values, alike.code_dtype.type(alike.compare.magnitude)
    spans = np.array(job)
    found = _Found(
        spans[:, 0].copy(),
        sum(span.stop - span.first for span in job) * sum(DTYPES[dtype].bits // 8 for dtype in alike.dtypes),
        np.zeros((len(job), files.shape[1] - 1, len(Flow)), np.int64),
        np.zeros((len(job), files.shape[1])),
    )
    gathered: list[NDArray[np.uint8]] = []
    if any(side.slices for span in job for side in tensors[span.tensor].sides):
        files = _in_memory(tensors, files, job, shards, gathered)
        spans[:, 0] = range(len(job))
    done = follow_spans(spans, files, tables, values, magnitude, rooms, found.counts, found.sums)
    if done < len(job):
        _fail(tensors[job[done].tensor], job[done], shards)
    return found


def _in_memory(
    tensors: Sequence[Followed],
    files: NDArray[np.int64],
    job: Sequence[_Span],
    shards: OpenShards,
    gathered: list[NDArray[np.uint8]],
) -> NDArray[np.int64]:
    """Where compiled code reads each side of each span of a job; what is of slices is gathered into memory first."""
    places = files[[span.tensor for span in job]]
    for row, span in zip(places, job, strict=True):
        for number, side in enumerate(tensors[span.tensor].sides):
            if side.slices:
                gathered.append(np.empty((span.stop - span.first) * DTYPES[side.dtype].bits // 8, np.uint8))
                read_elements(shards, side, span.first, span.stop, gathered[-1])
                row[number, : AT + 1] = span.first, MEMORY, gathered[-1].ctypes.data
    return places


def _announce(tensors: Sequence[Followed], job: Sequence[_Span], shards: OpenShards) -> None:
    """Check the files and tell the disk what comes next, at once for what lies in one piece."""
    first, last = tensors[job[0].tensor], tensors[job[-1].tensor]
    numel = sum(span.stop - span.first for span in job)
    for number, (begin, end) in enumerate(zip(first.sides, last.sides, strict=True)):
        size = DTYPES[begin.dtype].bits // 8
        start, stop = begin.start + job[0].first * size, end.start + job[-1].stop * size
        if begin.shard is end.shard and stop - start == numel * size and not (begin.slices or end.slices):
            shards[begin.shard].ready(start, stop)
        else:
            for span in job:
                side = tensors[span.tensor].sides[number]
                if side.slices:
                    continue
                shards[side.shard].ready(side.start + span.first * size, side.start + span.stop * size)


def _fail(followed: Followed, span: _Span, shards: OpenShards) -> NoReturn:
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
