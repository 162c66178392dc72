"""Follow every tensor through all checkpoints, each read once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.events import Listener, Stage, ignore, stage
from ckptdiff.in_order import Task, in_order
from ckptdiff.linalg.blas import require_scipy
from ckptdiff.measure.partial import BLOCK
from ckptdiff.options import Compare, as_tuple, check_threads, default_threads
from ckptdiff.run.warm_up import Use, Uses, load
from ckptdiff.track.kernels.products import TRACK_TILE
from ckptdiff.track.kernels.trajectory import Flow
from ckptdiff.track.plan import Followed, plan_track
from ckptdiff.track.result import Track
from ckptdiff.track.span_bytes import TrackSpan, announce, fail, lent, remote_parts
from ckptdiff.track.sums import FollowedSums, JobSums, ThreadRooms, sum_spans

if TYPE_CHECKING:
    from ckptdiff.track.patching import PatchFormat

MOST_STEPS = 12
"""Above so many, products are made of a sample: there are half as many as the square of the steps."""
SAMPLED = 16
"""One tile of so many is in the sample."""
_SPANS = 256
"""The most spans of a job: small tensors have a cost of their own."""
_PRODUCTS = 1 << 20
"""The most products that a job sums up, unless one span has more."""
ROOM = 256 << 20
"""Bytes of remote files that are fetched before the job that reads them begins, at most."""


def track(
    base: str | os.PathLike[str],
    steps: Sequence[str | os.PathLike[str]],
    *,
    compare: Compare = "bf16",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    gram: bool = False,
    spectra: bool = False,
    patches: str | os.PathLike[str] | None = None,
    patch_format: PatchFormat = "ckptdelta",
    patch_options: Mapping[str, Any] | None = None,
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
    patches : path-like, optional
        A folder to be made, with an exact patch of all tensors from each checkpoint to the next:
        ``patch_000001.ckptdelta`` and so on. They are made of what is read to follow, so that each checkpoint is still
        read once, and are what :func:`ckptdiff.patch.make` writes. The folder takes its name when all are complete.
    patch_format : {"ckptdelta", "delta-dir", "flat"}
        Of patches; the second makes directories ``weight_v000001`` and so on, the third ``patch_000001.safetensors``.
    patch_options : mapping, optional
        What :func:`ckptdiff.patch.make_directory` takes (encoding, checksum, level, and the version of the first), or
        :func:`ckptdiff.patch.make_flat` (dense_rest).
    threads : int
        0 stands for one per available core.
    listener : callable, optional
        Told of the stages "looking for ties", if a step lacks a head of the base, "compiling", if kernels are
        missing, and "following" (with patches "following and patching"), in bytes, and then "completing patches" and
        "spectra".
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
    PatchError
        What the format of patches cannot say.
    RunFileError
        The folder for patches exists, or cannot be written.

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
    if patches is not None:
        from ckptdiff.track.patching import Patches, follow_and_patch

        wanted = Patches(Path(patches), patch_format, patch_options or {})
        wanted.check()
    plan = plan_track(base, steps, compare=compare, include=include, exclude=exclude, tell=tell, stream=stream)
    tensors = plan.tensors
    threads, later = threads or default_threads(), list[Use]()
    if spectra:
        from ckptdiff.track.locking import locking_uses, measure_locking

        require_scipy()
        later = locking_uses(tensors)
    if patches is None:
        found = follow_all(tensors, threads, tell, kinds=int(gram), later=later)
    else:
        load(None, uses_of(tensors, [("delta",), *later]), tell)
        every, most = one_tile_in(len(steps)), most_spans(1 + len(steps), int(gram))
        found = follow_and_patch(plan, wanted, threads, tell, kinds=int(gram), every=every, room=ROOM, most=most)
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
    every, totals = one_tile_in(steps), FollowedSums.of(len(tensors), steps, kinds)
    load(None, uses_of(tensors, later), tell)
    nbytes = sum(side.nbytes for followed in tensors for side in followed.sides)
    with open_shards("pread", ROOM) as shards, stage(tell, name, nbytes, "bytes") as told:
        for found, read in _execute(tensors, shards, threads, told, kinds, every):
            totals.add(found)
            told.more(read, tensors[found.tensors[-1]].sides[0].name)
    totals.scale(tensors, every)
    return totals


def one_tile_in(steps: int) -> int:
    """Of so many tiles of a tensor one is multiplied."""
    return SAMPLED if steps > MOST_STEPS else 1


def uses_of(tensors: Sequence[Followed], later: Sequence[Use]) -> Uses:
    """The kernels that follow tensors, and those that are called later."""
    boxes = [("boxes",)] if any(side.slices for followed in tensors for side in followed.sides) else []
    return Uses((*sorted({("track", followed.compare.name) for followed in tensors}), *boxes, *later))


def most_spans(sides: int, kinds: int) -> int:
    """The most spans of a job."""
    return max(min(_SPANS, _PRODUCTS // max(kinds * sides**2, 1)), 1)


def _execute(
    tensors: Sequence[Followed], shards: OpenShards, threads: int, told: Stage, kinds: int, every: int
) -> Iterator[tuple[JobSums, int]]:
    """Yield the counts and sums of each job, in order, and how many bytes it read."""
    stop = threading.Event()
    files = _files(tensors, shards)
    rooms = ThreadRooms(files.shape[1], kinds)

    def work(job: Sequence[TrackSpan], fetched: AbstractContextManager[object]) -> tuple[JobSums, int]:
        if stop.is_set():
            raise InterruptedError("the run was given up")
        with fetched:
            return _follow(tensors, files, job, shards, rooms, every)

    # All of one size: in the order in which they lie on the disk. Jobs are short, so each thread has the next at hand.
    tasks = (
        Task(partial(work, job, shards.ahead(remote_parts(tensors, job))), 1, 0)
        for job in _jobs(tensors, most=most_spans(files.shape[1], kinds))
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
    for _, alike in groupby(enumerate(tensors), key=lambda numbered: numbered[1].dtypes):
        job: list[TrackSpan] = []
        total = 0
        for index, followed in alike:
            numel = followed.sides[0].numel
            for first in range(0, numel, BLOCK):  # what a sum rounds to depends on nothing else
                job.append(TrackSpan(index, first, min(first + BLOCK, numel)))
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
    rooms: ThreadRooms,
    every: int,
) -> tuple[JobSums, int]:
    alike, spans = tensors[job[0].tensor], np.array(job)
    numbers = spans[:, 0].copy()
    with ExitStack() as stack:
        sides = (side for span in job for side in tensors[span.tensor].sides)
        if any(side.slices or side.shard.remote is not None for side in sides):
            files = lent(stack, tensors, files, job, shards)
            spans[:, 0] = range(len(job))
        else:
            announce(tensors, job, shards)
        found, done = sum_spans(alike, spans, files, rooms, every)
    if done < len(job):
        fail(tensors[job[done].tensor], job[done], shards)
    read = sum(span.stop - span.first for span in job) * sum(DTYPES[dtype].bits // 8 for dtype in alike.dtypes)
    return replace(found, tensors=numbers), read
