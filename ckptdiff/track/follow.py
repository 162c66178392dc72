"""Follow every tensor through all checkpoints, each read once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.events import Listener, Stage, ignore, stage
from ckptdiff.in_order import Task, in_order
from ckptdiff.linalg.blas import require_scipy
from ckptdiff.measure.kernels.tiles import facts_of
from ckptdiff.measure.partial import BLOCK
from ckptdiff.options import Compare, as_tuple, check_threads, default_threads
from ckptdiff.run.warm_up import Use, Uses, load
from ckptdiff.track.kernels.products import TRACK_TILE, in_sample
from ckptdiff.track.kernels.trajectory import Flow, Rooms, follow_spans, new_rooms
from ckptdiff.track.plan import Followed, plan_track
from ckptdiff.track.result import Track
from ckptdiff.track.span_bytes import TrackSpan, announce, fail, lent, remote_parts

MOST_STEPS = 12
"""Above so many, products are made of a sample: there are half as many as the square of the steps."""
SAMPLED = 16
"""One tile of so many is in the sample."""
_SPANS = 256
"""The most spans of a job: small tensors have a cost of their own."""
_PRODUCTS = 1 << 20
"""The most products that a job sums up, unless one span has more."""
_ROOM = 256 << 20
"""Bytes of remote files that are fetched before the job that reads them begins, at most."""


@dataclass(frozen=True, eq=False, slots=True)
class _Found:
    """Counts and sums of the spans of a job."""

    tensors: NDArray[np.int64]
    """Of each span."""
    nbytes: int
    """Bytes that were read."""
    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    products: NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class FollowedSums:
    """Counts and sums of all tensors."""

    counts: NDArray[np.int64]
    """Shape (tensors, steps, len(Flow))."""
    squares: NDArray[np.float64]
    """Sums of W0^2, then of (W - W0)^2 at each step; shape (tensors, 1 + steps)."""
    products: NDArray[np.float64]
    """Sums of (W - W0)(W' - W0), then of their squares; shape (tensors, kinds, pairs), pairs (0, 0), (1, 0), (1, 1),
    (2, 0), ..."""


def track(
    base: str | os.PathLike[str],
    steps: Sequence[str | os.PathLike[str]],
    *,
    compare: Compare = "bf16",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    gram: bool = False,
    spectra: bool = False,
    threads: int = 0,
    listener: Listener | None = None,
    stream: bool = False,
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
    gram : bool
        Also sum up the products of the updates W - W0 of each two steps, in float64: which way the update went. Above
        twelve steps they are estimated from one tile of 8,192 coordinates in sixteen, and a warning says so.
    spectra : bool
        Also read every matrix again, for the leading singular subspaces of its updates and what those of each two steps
        have in common.
    threads : int
        0 stands for one per available core.
    listener : callable, optional
        Told of the stages "looking for ties", if a step lacks a head of the base, "compiling", if kernels are
        missing, and "following", in bytes, and then "spectra".
    stream : bool
        Read models of the hub where they are, and do not download them.

    Returns
    -------
    Track

    Raises
    ------
    OptionError
        No step, a single string for several, a number of threads out of range, or spectra without SciPy.
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
    plan = plan_track(base, steps, compare=compare, include=include, exclude=exclude, tell=tell, stream=stream)
    tensors = plan.tensors
    threads, later = threads or default_threads(), list[Use]()
    if spectra:
        from ckptdiff.track.locking import locking_uses, measure_locking

        require_scipy()
        later = locking_uses(tensors)
    found = follow_all(tensors, threads, tell, kinds=int(gram), later=later)
    norms = np.sqrt(found.squares)
    locking = measure_locking(tensors, norms[:, 1:].T, threads, tell) if spectra else None
    return Track(
        base=plan.base.path,
        steps=tuple(step.path for step in plan.steps),
        compare=compare,
        names=tuple(followed.sides[0].name for followed in tensors),
        shapes=tuple(followed.sides[0].shape for followed in tensors),
        counts={flow.name.lower(): found.counts[:, :, flow].T for flow in Flow},
        base_norms=norms[:, 0],
        delta_norms=norms[:, 1:].T,
        warnings=(*plan.warnings, *([sample_warning(len(steps), "steps")] if gram and len(steps) > MOST_STEPS else [])),
        products=found.products[:, 0] if gram else None,
        locking=locking,
    )


def sample_warning(count: int, of_what: str) -> str:
    """What is said where products are estimated."""
    sample = f"one tile of {TRACK_TILE:,} coordinates in {SAMPLED} of each tensor"
    return f"cosines and what follows from them are estimated from {sample}, as there are {count} {of_what}"


def follow_all(
    tensors: Sequence[Followed],
    threads: int,
    tell: Listener,
    *,
    kinds: int,
    name: str = "following",
    later: Sequence[Use] = (),
) -> FollowedSums:
    """Follow tensors through all their sides, and make so many kinds of products: none, 1, or 2.

    Tells of the stages "compiling", also of kernels that are called later, and `name`.
    """
    steps = len(tensors[0].sides) - 1
    every = SAMPLED if steps > MOST_STEPS else 1
    totals = FollowedSums(
        np.zeros((len(tensors), steps, len(Flow)), np.int64),
        np.zeros((len(tensors), 1 + steps)),
        np.zeros((len(tensors), kinds, steps * (steps + 1) // 2)),
    )
    boxes = [("boxes",)] if any(side.slices for followed in tensors for side in followed.sides) else []
    load(None, Uses((*sorted({("track", followed.compare.name) for followed in tensors}), *boxes, *later)), tell)
    nbytes = sum(side.nbytes for followed in tensors for side in followed.sides)
    with open_shards("pread", _ROOM) as shards, stage(tell, name, nbytes, "bytes") as told:
        for found in _execute(tensors, shards, threads, told, kinds, every):
            # In their order: no digit depends on threads.
            np.add.at(totals.counts, found.tensors, found.counts)
            np.add.at(totals.squares, found.tensors, found.sums)
            np.add.at(totals.products, found.tensors, found.products)
            told.more(found.nbytes, tensors[found.tensors[-1]].sides[0].name)
    if every > 1:
        numels = (followed.sides[0].numel for followed in tensors)
        totals.products[:] *= np.array([_scale(numel, every) for numel in numels])[:, np.newaxis, np.newaxis]
    return totals


def _scale(numel: int, every: int) -> float:
    """How many coordinates of a tensor stand behind one that is sampled."""
    firsts = np.arange(0, numel, TRACK_TILE)
    sampled = np.minimum(numel - firsts[in_sample(firsts // TRACK_TILE, every)], TRACK_TILE).sum()
    return float(numel / sampled) if sampled else 1.0


def _execute(
    tensors: Sequence[Followed], shards: OpenShards, threads: int, told: Stage, kinds: int, every: int
) -> Iterator[_Found]:
    """Yield the counts and sums of each job, in order."""
    local = threading.local()
    stop = threading.Event()
    files = _files(tensors, shards)

    def work(job: Sequence[TrackSpan], fetched: AbstractContextManager[object]) -> _Found:
        if stop.is_set():
            raise InterruptedError("the run was given up")
        if not hasattr(local, "rooms"):
            local.rooms = {}
        code = tensors[job[0].tensor].code_dtype
        if code.itemsize not in local.rooms:
            local.rooms[code.itemsize] = new_rooms(code, files.shape[1], kinds)
        with fetched:
            return _follow(tensors, files, job, shards, local.rooms[code.itemsize], every)

    most = max(min(_SPANS, _PRODUCTS // max(kinds * files.shape[1] ** 2, 1)), 1)
    # All of one size: in the order in which they lie on the disk. Jobs are short, so each thread has the next at hand.
    tasks = (
        Task(partial(work, job, shards.ahead(remote_parts(tensors, job))), 1, 0) for job in _jobs(tensors, most=most)
    )
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


def _jobs(tensors: Sequence[Followed], blocks: int = 48, most: int = _SPANS) -> Iterator[list[TrackSpan]]:
    """Spans in order, of so many blocks a job, those of all checkpoints counted; those of a job have the same dtypes.

    A job has `most` spans at most.

    Jobs are so small that all threads end at about the same time, and so large that Python costs little beside them.
    """
    sides = len(tensors[0].sides)
    longest = max(blocks // sides // 2, 1) * BLOCK  # by the tensor alone: what a sum rounds to depends on no other
    for _, alike in groupby(enumerate(tensors), key=lambda numbered: numbered[1].dtypes):
        job: list[TrackSpan] = []
        total = 0
        for index, followed in alike:
            numel = followed.sides[0].numel
            for first in range(0, numel, longest):
                job.append(TrackSpan(index, first, min(first + longest, numel)))
                total += job[-1].stop - first
                if total * sides >= blocks * BLOCK or len(job) == most:
                    yield job
                    job, total = [], 0
        if job:
            yield job


def _follow(
    tensors: Sequence[Followed],
    files: NDArray[np.int64],
    job: Sequence[TrackSpan],
    shards: OpenShards,
    rooms: Rooms,
    every: int,
) -> _Found:
    alike = tensors[job[0].tensor]
    _, tables = alike.casts()
    values, magnitude = facts_of(alike.compare).values, alike.code_dtype.type(alike.compare.magnitude)
    spans = np.array(job)
    found = _Found(
        spans[:, 0].copy(),
        sum(span.stop - span.first for span in job) * sum(DTYPES[dtype].bits // 8 for dtype in alike.dtypes),
        np.zeros((len(job), files.shape[1] - 1, len(Flow)), np.int64),
        np.zeros((len(job), files.shape[1])),
        np.zeros((len(job), *rooms.products.shape[:2])),
    )
    sums = found.counts, found.sums, found.products
    with ExitStack() as stack:
        sides = (side for span in job for side in tensors[span.tensor].sides)
        if any(side.slices or side.shard.remote is not None for side in sides):
            files = lent(stack, tensors, files, job, shards)
            spans[:, 0] = range(len(job))
        else:
            announce(tensors, job, shards)
        done = follow_spans(spans, files, tables, values, magnitude, rooms, *sums, every)
    if done < len(job):
        fail(tensors[job[done].tensor], job[done], shards)
    return found
