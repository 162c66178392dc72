"""Keep reading, the bus both ways and the kernels busy at the same time, launch after launch.

Three streams: up, run and down. The host fills a slot, queues its copies up, the kernels, and the copies down, and goes
on with the other slot; before it uses a slot again it waits for all that was queued with it. So within a slot, on the
GPU, three things need an order: kernels after the copies up, copies down after the kernels, and the host after those.
Tables of bins, and values that codes are decoded to, are only touched by the run stream, one launch after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import Formats
from ckptdiff.measure.cuda.coded_side import size_of
from ckptdiff.measure.cuda.gpu import Gpu
from ckptdiff.measure.cuda.layout import DEVICE_TILE, RECORD, TILE_RECORD
from ckptdiff.measure.cuda.slots import ORDINAL, SLOTS, GroupTotals, HostBlock, Room, Slot, aligned
from ckptdiff.measure.partial import Sum
from ckptdiff.measure.source import Coded

Bins = tuple[NDArray[np.uint32], NDArray[np.uint64]]


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive coordinates of one tensor pair in a launch."""

    record: int
    """Which of the pairs of its group it belongs to."""
    numel: int
    read: Callable[..., None]
    """Reads both sides into given arrays of bytes; with one array, that of the base, which is also the tuned side's."""
    shared: bool = False
    """Whether both sides are the same bytes."""
    coded: Coded | None = None
    """Of what it is a part, if a side is codes with scales: then ``read`` is given all the room of that side."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch. Those of a group, from the first that ``opens`` to the one that ``closes``, share their totals."""

    parts: tuple[Part, ...]
    opens: bool = True
    closes: bool = True
    first_tie: int = 0
    """Of one that opens a group: how many ties lie before it."""

    @property
    def shared(self) -> bool:
        """Whether both sides are the same bytes, so that one goes up; a tensor of which that is true goes alone."""
        return self.parts[0].shared

    @property
    def coded(self) -> tuple[bool, bool]:
        """Which sides go up as codes with scales; a tensor of which one does goes alone."""
        coded = self.parts[0].coded
        return (False, False) if coded is None else coded.sides

    @property
    def records(self) -> int:
        """Tensor pairs of its group, up to its last."""
        return 1 + self.parts[-1].record


@dataclass(frozen=True, slots=True)
class Landed:
    """What came down of a launch; valid until the next one is asked for."""

    job: Launch
    masks: list[NDArray[np.uint8]]
    """Mask bits of each part; empty if none are wanted."""
    sums: list[NDArray[np.float64]]
    """Shape (tiles of the part, len(Sum))."""
    records: NDArray[Any]
    """Of each tensor pair of the group, if the job closes it; else empty."""
    bins: Bins
    """The bins of the group that are not empty: places and counts."""


@dataclass(frozen=True, slots=True)
class LaunchWork:
    """What to do with each launch."""

    formats: Formats
    launch: Callable[[Flight, Any], None]
    """Queues the kernels of one launch, given the bins."""
    bins: int
    """Bins of one tensor pair."""
    want_mask: bool


@dataclass(slots=True)
class Flight:
    """A job under way."""

    job: Launch
    slot: Slot
    totals: GroupTotals
    tiles: int = 0
    sides: tuple[int, int] = (0, 0)
    """Where base and tuned side begin in what goes up."""
    ends: tuple[int, int] = (0, 0)
    """Where they end, the tuned side at the end of all."""
    masks: list[slice] = field(default_factory=list)
    """Where the mask of each part lies in what comes down."""


class Pipeline:
    """The streams and slots of one thread."""

    def __init__(self, gpu: Gpu, room: Room) -> None:
        self.gpu, self.room = gpu, room
        self.up, self.run, self.down = gpu.stream(), gpu.stream(), gpu.stream()
        block = HostBlock(gpu, room.host_bytes)
        self._slots = [Slot(gpu, room, block) for _ in range(SLOTS)]
        self._totals = [GroupTotals(gpu, room, block) for _ in range(SLOTS)]
        self._bins = gpu.empty(room.bins * 8)
        self.values = gpu.empty(room.side_bytes), gpu.empty(room.side_bytes)
        """What codes of either side are decoded to; like the bins, it is touched by the run stream alone."""
        self.next_tie = gpu.empty(ORDINAL)
        """Where the ties of the next launch begin; the same."""

    def carry_out(self, work: LaunchWork, jobs: Iterable[Launch]) -> Generator[Landed, None, None]:
        """Launch job after job, each read before the next is asked for; yield what comes of each, in order.

        However that ends, by an error, an interrupt or a generator that is closed, nothing is left under way: buffers
        may go to someone whose work waits for none of these streams.
        """
        under_way: deque[Flight] = deque()
        group = -1
        try:
            for index, job in enumerate(jobs):
                if len(under_way) == SLOTS:
                    yield self._land(under_way.popleft(), work)
                group += job.opens
                flight = Flight(job, self._slots[index % SLOTS], self._totals[group % SLOTS])
                self._read(flight, work)
                self._queue(flight, work)
                under_way.append(flight)
            while under_way:
                yield self._land(under_way.popleft(), work)
        except BaseException:
            self._drain()
            raise

    def _drain(self) -> None:
        """Wait for all that is queued; what fails on the way follows from what is being reported."""
        for stream in (self.up, self.run, self.down):
            with suppress(Exception):
                self.gpu.finish(stream)

    def _read(self, flight: Flight, work: LaunchWork) -> None:
        """Read the parts of a job into its slot, behind their tiles: all of the base, then all of the tuned side."""
        job, room, host = flight.job, self.room, flight.slot.host_up
        bits, coded = (work.formats[0].bits, work.formats[1].bits), job.coded
        base = room.tiles_bytes
        # Codes with scales are given all the room of a side, since only whoever reads them knows how many come.
        whole = room.side_bytes if coded[0] else sum(aligned(part.numel * bits[0] // 8) for part in job.parts)
        tuned = base if job.shared else base + whole
        flight.sides, mask, stop = (base, tuned), room.sums_bytes, 0
        for part in job.parts:
            sizes = [room.side_bytes if coded[side] else part.numel * bits[side] // 8 for side in (0, 1)]
            held = host[base : base + sizes[0]], host[tuned : tuned + sizes[1]]
            part.read(*held[: 1 if job.shared else 2])
            used = [size_of(held[side]) if coded[side] else sizes[side] for side in (0, 1)]
            flight.ends = base + used[0], tuned + used[1]
            # Of a side that is decoded the kernels see the values.
            at = 0 if coded[0] else base, 0 if coded[1] else tuned, mask
            own = _tiles_of(part.numel, bits, at)
            first, stop = stop, stop + own.size
            tiles = host[first * TILE_RECORD.itemsize : stop * TILE_RECORD.itemsize].view(TILE_RECORD)
            tiles[:] = own
            if part.record:
                tiles["record"] = part.record
            flight.masks.append(slice(mask, mask + -(-part.numel // 8)))
            base, tuned, mask = base + aligned(sizes[0]), tuned + aligned(sizes[1]), aligned(flight.masks[-1].stop)
        flight.tiles = stop

    def _queue(self, flight: Flight, work: LaunchWork) -> None:
        gpu, slot, job, totals = self.gpu, flight.slot, flight.job, flight.totals
        if job.coded[0]:  # and what is not used of its room stays here
            gpu.upload(slot.up, slot.host_up[: flight.ends[0]], self.up)
            start, stop = flight.sides[1], flight.ends[1]
            gpu.upload(slot.up[start:], slot.host_up[start:stop], self.up)
        else:
            gpu.upload(slot.up, slot.host_up[: flight.ends[1]], self.up)
        slot.sent = gpu.record(self.up, slot.sent)
        if job.opens:
            gpu.clear(totals.summary, self.run)
            gpu.clear(self._bins[: job.records * work.bins * 8], self.run)
        gpu.wait(self.run, slot.sent)
        work.launch(flight, self._bins)
        if job.closes:
            found = [totals.bins, totals.found]
            size = np.uint64(job.records * work.bins)
            gpu.launch(work.formats, "harvest", 2 * gpu.processors, [self._bins, size, *found], self.run)
        slot.ran = gpu.record(self.run, slot.ran)
        gpu.wait(self.down, slot.ran)
        end = flight.masks[-1].stop if work.want_mask else flight.tiles * 8 * len(Sum)
        gpu.download(slot.host_down[:end], slot.down, self.down)
        if job.closes:
            totals.bring_home(gpu, self.down)
        slot.done = gpu.record(self.down, slot.done)

    def _land(self, flight: Flight, work: LaunchWork) -> Landed:
        """Wait for a job, and read what it left on the host."""
        self.gpu.synchronize(flight.slot.done)
        job, down = flight.job, flight.slot.host_down
        sums = down[: flight.tiles * 8 * len(Sum)].view(np.float64).reshape(-1, len(Sum))
        masks = [down[mask] for mask in flight.masks] if work.want_mask else []
        of_parts, stop = [], 0
        for part in job.parts:
            first, stop = stop, stop + -(-part.numel // DEVICE_TILE)
            of_parts.append(sums[first:stop])
        if not job.closes:
            return Landed(job, masks, of_parts, np.zeros(0, RECORD), _NO_BINS)
        # How many bins are not empty is known only now.
        records, bins, more = flight.totals.home(job.records)
        if more:
            bins = flight.totals.more(self.gpu, self.down, bins.size + more)
        return Landed(job, masks, of_parts, records, (bins["place"], bins["count"]))


_NO_BINS = np.zeros(0, np.uint32), np.zeros(0, np.uint64)


@lru_cache
def _tiles_of(numel: int, bits: tuple[int, int], at: tuple[int, int, int]) -> NDArray[Any]:
    """Tiles of a part whose sides and mask begin at some bytes: launches of a large tensor have the same."""
    starts = np.arange(0, numel, DEVICE_TILE, dtype=np.uint64)
    tiles = np.zeros(starts.size, TILE_RECORD)
    for name, place, each in zip(("base", "tuned", "mask"), at, (*bits, 1), strict=True):
        tiles[name] = place + starts * each // 8
    tiles["numel"] = np.minimum(numel - starts, DEVICE_TILE)
    return tiles
