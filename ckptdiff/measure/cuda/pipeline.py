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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import Formats
from ckptdiff.measure.cuda.coded_side import size_of
from ckptdiff.measure.cuda.gpu import Gpu
from ckptdiff.measure.cuda.layout import DEVICE_TILE, RECORD, TILE_RECORD
from ckptdiff.measure.cuda.slots import ALIGN, ENTRIES, SLOTS, GroupTotals, HostBlock, Room, Slot
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

    @property
    def shared(self) -> bool:
        """Whether both sides are the same bytes, so that one goes up; a tensor of which that is true goes alone."""
        return self.parts[0].shared

    @property
    def coded(self) -> tuple[bool, bool]:
        """Which sides go up as codes with scales; a tensor of which one does goes alone."""
        coded = self.parts[0].coded
        return (False, False) if coded is None else coded.sides


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
    """The bins of the group that are not empty."""


@dataclass(frozen=True, slots=True)
class LaunchWork:
    """What to do with each launch."""

    formats: Formats
    launch: Callable[[Slot, GroupTotals, Any, int, Launch], None]
    """Queues the kernels of one launch, given the slot, the totals, the bins, the number of tiles, and the job."""
    bins: int
    """Bins of one tensor pair."""
    want_mask: bool


@dataclass(slots=True)
class _Flight:
    """A job under way."""

    job: Launch
    slot: Slot
    totals: GroupTotals
    tiles: NDArray[Any]


class Pipeline:
    """The streams and slots of one thread."""

    def __init__(self, gpu: Gpu, room: Room) -> None:
        self.gpu, self.room = gpu, room
        self.up, self.run, self.down = gpu.stream(), gpu.stream(), gpu.stream()
        block = HostBlock(gpu, room)
        self._slots = [Slot(gpu, room, block) for _ in range(SLOTS)]
        self._totals = [GroupTotals(gpu, room, block) for _ in range(SLOTS)]
        self._bins = gpu.empty(room.bins * 8)
        self.values = gpu.empty(room.side_bytes), gpu.empty(room.side_bytes)
        """What codes of either side are decoded to; like the bins, it is touched by the run stream alone."""
        self._host_bins = block.take(ENTRIES * 4), block.take(ENTRIES * 8)

    def carry_out(self, work: LaunchWork, jobs: Iterable[Launch]) -> Generator[Landed, None, None]:
        """Launch job after job, each read before the next is asked for; yield what comes of each, in order.

        However that ends, by an error, an interrupt or a generator that is closed, nothing is left under way: buffers
        may go to someone whose work waits for none of these streams.
        """
        under_way: deque[_Flight] = deque()
        group = -1
        try:
            for index, job in enumerate(jobs):
                if len(under_way) == SLOTS:
                    yield self._land(under_way.popleft(), work)
                group += job.opens
                flight = _Flight(job, self._slots[index % SLOTS], self._totals[group % SLOTS], np.zeros(0, TILE_RECORD))
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

    def _read(self, flight: _Flight, work: LaunchWork) -> None:
        """Read the parts of a job into its slot, and note its tiles."""
        slot = flight.slot
        base_bits, tuned_bits = work.formats[0].bits, work.formats[1].bits
        at = [0, 0, 0]
        coded = flight.job.coded
        tiles = []
        for part in flight.job.parts:
            sizes = [part.numel * base_bits // 8, part.numel * tuned_bits // 8, -(-part.numel // 8)]
            base, tuned = (
                slot.host_sides[side] if coded[side] else slot.host_sides[side][at[side] : at[side] + sizes[side]]
                for side in (0, 1)
            )
            part.read(*((base,) if part.shared else (base, tuned)))
            starts = np.arange(0, part.numel, DEVICE_TILE, dtype=np.uint64)
            own = np.zeros(starts.size, TILE_RECORD)
            own["base"], own["tuned"] = at[0] + starts * base_bits // 8, at[1] + starts * tuned_bits // 8
            own["mask"], own["record"] = at[2] + starts // 8, part.record
            own["numel"] = np.minimum(part.numel - starts, DEVICE_TILE)
            tiles.append(own)
            at = [place + -(-size // ALIGN) * ALIGN for place, size in zip(at, sizes, strict=True)]
        flight.tiles = slot.host_tiles[: sum(own.nbytes for own in tiles)].view(TILE_RECORD)
        np.concatenate(tiles, out=flight.tiles)

    def _queue(self, flight: _Flight, work: LaunchWork) -> None:
        gpu, slot, job, totals, tiles = self.gpu, flight.slot, flight.job, flight.totals, flight.tiles
        for side, (host, there) in enumerate(zip(slot.host_sides, slot.sides, strict=True)):
            if side == 0 or not job.shared:
                end = _end(tiles, ("base", "tuned")[side], work.formats[side].bits)
                gpu.upload(there, host[: size_of(host) if job.coded[side] else end], self.up)
        gpu.upload(slot.tiles, slot.host_tiles[: tiles.nbytes], self.up)
        records = 1 + max(part.record for part in job.parts)
        if job.opens:
            gpu.clear(totals.summary, self.run)
            gpu.clear(self._bins[: records * work.bins * 8], self.run)
        gpu.wait(self.run, gpu.record(self.up))
        work.launch(slot, totals, self._bins, tiles.size, job)
        if job.closes:
            found = [totals.places, totals.counts, totals.found]
            size = np.uint64(records * work.bins)
            gpu.launch(work.formats, "harvest", 2 * gpu.processors, [self._bins, size, *found], self.run)
        gpu.wait(self.down, gpu.record(self.run))
        if work.want_mask:
            gpu.download(slot.host_mask[: _end(tiles, "mask", 1)], slot.mask, self.down)
        gpu.download(slot.host_sums[: tiles.size * 8 * len(Sum)], slot.sums, self.down)
        if job.closes:
            gpu.download(totals.host_summary, totals.summary, self.down)
        slot.done = gpu.record(self.down)

    def _land(self, flight: _Flight, work: LaunchWork) -> Landed:
        """Wait for a job, and read what it left on the host."""
        self.gpu.synchronize(flight.slot.done)
        tiles, job = flight.tiles, flight.job
        sums = flight.slot.host_sums[: tiles.size * 8 * len(Sum)].view(np.float64).reshape(-1, len(Sum))
        masks, of_parts, first = [], [], 0
        for part in job.parts:
            stop = first + -(-part.numel // DEVICE_TILE)
            of_parts.append(sums[first:stop])
            if work.want_mask:
                start = int(tiles["mask"][first])
                masks.append(flight.slot.host_mask[start : start + -(-part.numel // 8)])
            first = stop
        if not job.closes:
            nothing = np.zeros(0, np.uint32), np.zeros(0, np.uint64)
            return Landed(job, masks, of_parts, np.zeros(0, RECORD), nothing)
        found, records = flight.totals.home(1 + max(part.record for part in job.parts))
        return Landed(job, masks, of_parts, records, self._bring_home(flight.totals, found))

    def _bring_home(self, totals: GroupTotals, found: int) -> Bins:
        """The bins that are not empty: how many there are is known only now."""
        places, counts = np.empty(found, np.uint32), np.empty(found, np.uint64)
        for start in range(0, found, ENTRIES):
            stop = min(start + ENTRIES, found)
            hosts = self._host_bins[0][: (stop - start) * 4], self._host_bins[1][: (stop - start) * 8]
            self.gpu.download(hosts[0], totals.places[start * 4 : stop * 4], self.down)
            self.gpu.download(hosts[1], totals.counts[start * 8 : stop * 8], self.down)
            self.gpu.synchronize(self.gpu.record(self.down))
            places[start:stop], counts[start:stop] = hosts[0].view(np.uint32), hosts[1].view(np.uint64)
        return places, counts


def _end(tiles: NDArray[Any], field: str, bits: int) -> int:
    """Where the bytes of the last tile end."""
    return int(tiles[field][-1]) + -(-int(tiles["numel"][-1]) * bits // 8)
