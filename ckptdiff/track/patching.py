"""Make the patches between neighbouring checkpoints of a run while they are followed: each is read once for both.

A thread takes a block of a tensor, or some small tensors, through all checkpoints. What it has read of one stays until
the next is read, so that the patch between them is made of it, and for the kernels that follow until the last is read.
Threads take turns at each patch, so that blocks come into it in their order, and none waits in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from ckptdiff.checkpoint import DTYPES, TensorInfo
from ckptdiff.checkpoint.open_shards import OTHER_FILES, OpenShards, allow_open_files, open_shards
from ckptdiff.codes.fetch import MEMORY
from ckptdiff.errors import OptionError, RunFileError
from ckptdiff.events import Listener, Stage, stage
from ckptdiff.files.staged import StagedFile, StagedFolder
from ckptdiff.in_order import Task, in_order
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.comparing import Bytes, PairBlocks, PairMaking, Sides
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.digests import required
from ckptdiff.patch.in_turn import InTurn
from ckptdiff.patch.make import begin_delta
from ckptdiff.patch.make_directory import begin_directory, folder_name
from ckptdiff.patch.make_flat import begin_flat
from ckptdiff.patch.spans import in_pieces, read_block_of
from ckptdiff.runfile.check_target import check_new
from ckptdiff.track.patched_tensors import Chained, chained
from ckptdiff.track.plan import TrackPlan
from ckptdiff.track.sums import FollowedSums, JobSums, ThreadRooms, sum_spans

__all__ = ["PATCH_FORMATS", "PatchFormat", "Patches", "follow_and_patch"]

PatchFormat: TypeAlias = Literal["ckptdelta", "delta-dir", "flat"]
PATCH_FORMATS: tuple[PatchFormat, ...] = ("ckptdelta", "delta-dir", "flat")
_FILES = 5
"""Open files of a patch that is made, at most."""
_ALIGNED = 64
"""Bytes that the address of each piece is a multiple of."""
_Pieces: TypeAlias = Sequence[tuple[int, int]]
"""Which of the tensors, and which of its blocks."""


@dataclass(frozen=True, slots=True)
class Patches:
    """The patches that are to be made.

    Attributes
    ----------
    target : Path
        The folder to be made for them.
    format : {"ckptdelta", "delta-dir", "flat"}
    options : mapping
        Of that format, as ``make_directory`` and ``make_flat`` take them; ``version`` is that of the first.
    held : int
        Bytes that a thread keeps of all checkpoints; if they are more, they go through a file without a name.
    """

    target: Path
    format: PatchFormat = "ckptdelta"
    options: Mapping[str, Any] = field(default_factory=dict)
    held: int = 32 << 20

    def check(self) -> None:
        """Refuse, before any work is done, what cannot be made."""
        required("xxhash")
        if self.format not in PATCH_FORMATS:
            raise OptionError("no such format of patches", expected=", ".join(PATCH_FORMATS), found=self.format)
        check_new(self.target)

    def begin(
        self, sides: Sides, folder: Path, number: int, stop: threading.Event, threads: int
    ) -> AbstractContextManager[PairMaking[object]]:
        """Begin a patch, of which there are so many with this."""
        if self.format == "ckptdelta":
            return begin_delta(sides, folder / f"patch_{number:06d}.ckptdelta", stop, threads)
        if self.format == "flat":
            return begin_flat(sides, folder / f"patch_{number:06d}.safetensors", stop, threads, **self.options)
        version = self.options.get("version", 1) + number - 1
        options = {**self.options, "version": version, "base_version": version - 1}
        return begin_directory(sides, folder / folder_name(version), stop, threads, **options)


def follow_and_patch(
    plan: TrackPlan,
    patches: Patches,
    threads: int,
    tell: Listener,
    *,
    kinds: int,
    every: int,
    room: int,
    most: int,
) -> FollowedSums:
    """Follow the tensors of a plan, and make the patches of all tensors; these take their names together.

    Tells of the stages "following and patching", in bytes, and "completing patches".

    Parameters
    ----------
    kinds, every, room, most : int
        Of products; one in so many tiles is multiplied; bytes of remote files fetched ahead; tensors of a job.
    """
    checkpoints, stop = (plan.base, *plan.steps), threading.Event()
    allow_open_files(OTHER_FILES + _FILES * len(plan.steps) + 2 * sum(len(one.shards) for one in checkpoints))
    totals = FollowedSums.of(len(plan.tensors), len(plan.steps), kinds)
    with StagedFolder(patches.target) as folder, ExitStack() as stack:
        makings = [
            stack.enter_context(patches.begin(pair, folder.path, number, stop, threads))
            for number, pair in enumerate(pairwise(checkpoints), 1)
        ]
        tensors = chained(plan, [making.names for making in makings])
        rooms = _Rooms(stack, folder.path, len(checkpoints), patches.held)
        nbytes = sum(one.nbytes for one in tensors)
        with open_shards("pread", room) as shards, stage(tell, "following and patching", nbytes, "bytes") as told:
            work = _Work(plan, tensors, makings, shards, rooms, ThreadRooms(len(checkpoints), kinds), every, stop)
            for done in work.run(threads, most, told):
                for found in done.sums:
                    totals.add(found)
                told.more(done.nbytes, done.name)
        with stage(tell, "completing patches", len(makings)) as told:
            for making in makings:
                making.finish()
                told.more(1)
        stack.close()
        folder.commit()
    totals.scale(plan.tensors, every)
    return totals


class _Room:
    """What a thread has read of its pieces: of each checkpoint, or of two, and the others are in a file."""

    def __init__(self, sides: int, size: int, spool: StagedFile | None) -> None:
        self.spool, self.size = spool, size
        self._bytes = np.empty((sides if spool is None else 2) * size + _ALIGNED, np.uint8)
        start = -self._bytes.ctypes.data % _ALIGNED
        self._rows = self._bytes[start : start + self._bytes.size - _ALIGNED].reshape(-1, size)

    def row(self, side: int) -> Bytes:
        """Where the bytes of a checkpoint go, and stay until the next but one is read."""
        row: Bytes = self._rows[side % len(self._rows)]
        return row

    def keep(self, side: int, size: int) -> None:
        """Let what was read of a checkpoint stay until all are read."""
        if self.spool is not None:
            self.spool.seek(side * self.size)
            self.spool.write(self.row(side)[:size].data)
            self.spool.check()

    def place(self, side: int, start: int) -> tuple[int, int]:
        """Where compiled code finds that, from a byte on."""
        if self.spool is not None:
            return self.spool.descriptor, side * self.size + start
        return MEMORY, self.row(side).ctypes.data + start


class _Rooms:
    """A room for each thread."""

    def __init__(self, stack: ExitStack, folder: Path, sides: int, most: int) -> None:
        self._stack, self._folder, self._sides, self._most = stack, folder, sides, most
        self._local, self._lock, self._count = threading.local(), threading.Lock(), 0

    def of(self, size: int) -> _Room:
        """The room of this thread for pieces of so many bytes."""
        held: _Room | None = getattr(self._local, "held", None)
        if held is None or held.size < size:
            spool = None if held is None else held.spool
            if spool is None and self._sides * size > self._most:
                with self._lock:
                    self._count += 1
                    spool = self._stack.enter_context(StagedFile(self._folder / f"read {self._count}"))
            held = self._local.held = _Room(self._sides, size, spool)
        return held


class _Done(NamedTuple):
    """What a job gave."""

    sums: list[JobSums]
    nbytes: int
    name: str


class _Followed(NamedTuple):
    """A piece of a tensor that is followed."""

    tensor: int
    first: int
    start: int
    """Where its bytes of each side lie in the room."""


class _Work:
    """What threads do with the pieces of all checkpoints."""

    def __init__(
        self,
        plan: TrackPlan,
        tensors: Sequence[Chained],
        makings: Sequence[PairMaking[object]],
        shards: OpenShards,
        rooms: _Rooms,
        follow_rooms: ThreadRooms,
        every: int,
        stop: threading.Event,
    ) -> None:
        self._plan, self._tensors, self._makings, self._shards = plan, tensors, makings, shards
        self._rooms, self._follow_rooms, self._every, self._stop = rooms, follow_rooms, every, stop
        self._turns = [InTurn(stop) for _ in makings]

    def run(self, threads: int, most: int, told: Stage) -> Iterator[_Done]:
        """Yield what each job gave, in order; blocks of a tensor are jobs of their own."""
        jobs = in_pieces(((number, one.codes) for number, one in enumerate(self._tensors)), most)
        tasks = (
            Task(partial(self._job, number, pieces, self._leases(pieces)), 1, 0) for number, pieces in enumerate(jobs)
        )
        return in_order(tasks, 2 * threads, self._stop.set, told.again, ahead=1, threads=threads)

    def _leases(self, pieces: _Pieces) -> list[AbstractContextManager[object]]:
        """What the job reads of each checkpoint that lies elsewhere, to be fetched in the order of jobs."""
        return [
            self._shards.ahead(
                [
                    (one.shard, *_extent(one, place))
                    for number, place in pieces
                    if (one := self._tensors[number].sides[side]) is not None and one.shard.remote is not None
                ]
            )
            for side in range(1 + len(self._makings))
        ]

    def _job(self, number: int, pieces: _Pieces, leases: Sequence[AbstractContextManager[object]]) -> _Done:
        """Read the pieces of one checkpoint after the other; make of each what the patch into it takes."""
        sizes = [_room_for(self._tensors[one]) for one, _ in pieces]
        starts = [0, *accumulate(sizes)]
        room = self._rooms.of(max(starts[-1], _ALIGNED))
        nbytes = 0
        for side, lease in enumerate(leases):
            if self._stop.is_set():
                raise InterruptedError("the run was given up")
            held, place, taken = room.row(side), pieces[0][1], list[tuple[TensorInfo, int, bool]]()
            with lease:
                for (one, _), start in zip(pieces, starts, strict=False):
                    tensor, how = self._tensors[one].sides[side], self._tensors[one].taken[side]
                    if tensor is None:
                        continue
                    nbytes += read_block_of(self._shards, tensor, Coding.of(tensor.dtype), place, held[start:]).size
                    if how != "not":
                        taken.append((tensor, start, how == "steps"))
            made: list[Any] = []
            if taken:
                tensors, places, paired = zip(*taken, strict=True)
                made = self._makings[side - 1].work(
                    PairBlocks(tensors, place, places, paired, room.row(side - 1), held)
                )
            room.keep(side, starts[-1])
            if side:
                with self._turns[side - 1].at(number):
                    if taken:
                        self._makings[side - 1].take([tensor for tensor, *_ in taken], place, made)
        last = next(side for side in reversed(self._tensors[pieces[-1][0]].sides) if side is not None)
        return _Done(list(self._follow(pieces, starts, room)), nbytes, last.name)

    def _follow(self, pieces: _Pieces, starts: Sequence[int], room: _Room) -> Iterator[JobSums]:
        """Count and sum up those pieces that are followed, of the same dtypes in one call."""
        followed = []
        for (one, place), start in zip(pieces, starts, strict=False):
            number = self._tensors[one].followed
            if number is not None and self._tensors[one].codes:
                followed.append(_Followed(number, place * BLOCK_CODES, start))
        tensors = self._plan.tensors
        for _, group in groupby(followed, key=lambda piece: tensors[piece.tensor].dtypes):
            alike = list(group)
            numels = [tensors[piece.tensor].sides[0].numel for piece in alike]
            spans = [
                (row, piece.first, min(piece.first + BLOCK_CODES, numel))
                for row, (piece, numel) in enumerate(zip(alike, numels, strict=True))
            ]
            like = tensors[alike[0].tensor]
            files = [
                [
                    (piece.first, *room.place(side, piece.start), DTYPES[dtype].bits // 8, cast)
                    for side, (dtype, cast) in enumerate(zip(like.dtypes, like.casts()[0], strict=True))
                ]
                for piece in alike
            ]
            found, done = sum_spans(like, np.array(spans), np.array(files), self._follow_rooms, self._every)
            if done < len(alike):
                raise RunFileError("what was read could not be read again", tensor=like.sides[0].name)
            yield replace(found, tensors=np.array([piece.tensor for piece in alike]))


def _extent(tensor: TensorInfo, place: int) -> tuple[int, int]:
    """The bytes of a block of a tensor in its file."""
    size = BLOCK_CODES * Coding.of(tensor.dtype).width
    start = tensor.start + place * size
    return start, min(start + size, tensor.stop)


def _room_for(tensor: Chained) -> int:
    """Bytes that a piece of a tensor takes of each checkpoint, at most."""
    return -(-min(tensor.codes, BLOCK_CODES) * tensor.width // _ALIGNED) * _ALIGNED
