"""Make room for what is under way: two launches at a time, on the host and on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckptdiff.errors import PlanError
from ckptdiff.measure.cuda.gpu import Event, Gpu
from ckptdiff.measure.cuda.layout import DEVICE_TILE, RECORD, REFINE_BINS, ROWS, TILE_RECORD
from ckptdiff.measure.partial import BINS, Sum
from ckptdiff.measure.source import ByteArray

SLOTS = 2
"""Launches under way: while one is read, the one before is on its way."""
ALIGN = 64
"""Each part of a buffer starts at a multiple of this: no load of the kernels is wider."""
_ENTRY = 12
"""Bytes of a bin that is brought home: where it is, and its count."""
ENTRIES = 1 << 16
"""Bins that are brought home at a time."""
MOST_ENTRIES = 12 * REFINE_BINS
"""Bins that a launch may leave: of four whole scans, or of every cut of a further pass."""


@dataclass(frozen=True, slots=True)
class Room:
    """How large the buffers are."""

    side: int = 4 << 20
    """Bytes of one side in a launch; a multiple of 8 ``DEVICE_TILE``."""
    records: int = 32
    """Tensor pairs in a launch."""

    @property
    def tiles(self) -> int:
        """Tiles in a launch: of formats of a byte, and one begun in each pair."""
        return self.side // DEVICE_TILE + self.records

    @property
    def host_bytes(self) -> int:
        """Page-locked memory, taken as one block (:class:`HostBlock`)."""
        of_slot = sum(map(_aligned, (*self.of_slot, self.summary_bytes)))
        return SLOTS * of_slot + _aligned(ENTRIES * 4) + _aligned(ENTRIES * 8)

    @property
    def gpu_bytes(self) -> int:
        """GPU memory."""
        of_slot = sum(self.of_slot) + self.tiles * 8
        of_slots = SLOTS * (of_slot + self.summary_bytes + MOST_ENTRIES * _ENTRY)
        return of_slots + 2 * self.side_bytes + self.bins * 8

    @property
    def of_slot(self) -> tuple[int, int, int, int, int]:
        """Bytes of base, tuned side, tiles, mask and sums of a launch, on the host and on the GPU."""
        sides = self.side_bytes, self.side_bytes
        return *sides, self.tiles * TILE_RECORD.itemsize, self.mask_bytes, self.tiles * 8 * len(Sum)

    @property
    def bins(self) -> int:
        """Bins of all tables."""
        return max(self.records * ROWS * BINS, MOST_ENTRIES)

    def coordinates(self, bits: int) -> int:
        """Coordinates in a launch whose wider side has so many bits each."""
        return self.side * 8 // bits // DEVICE_TILE * DEVICE_TILE

    def limits(self) -> tuple[int, ...]:
        """How many pairs, bytes of a side, and bins in use a launch of several tensor pairs may have."""
        return self.records, self.side, MOST_ENTRIES

    def needs(self, numel: int, bits: int) -> tuple[int, ...]:
        """What a tensor pair takes of :meth:`limits`, its wider side stored in so many bits each."""
        return 1, numel * bits // 8, ROWS * min(numel, BINS)

    @classmethod
    def smallest(cls) -> Room:
        """One tile of the widest format."""
        return cls(8 * DEVICE_TILE, 1)

    def halved(self) -> Room | None:
        """A smaller one; None if this is the smallest."""
        least = self.smallest()
        if self == least:
            return None
        return Room(max(self.side // 2, least.side), max(self.records // 2, least.records))

    @property
    def side_bytes(self) -> int:
        """Bytes of the buffer of a side."""
        return self.side + ALIGN * (self.records + 1)

    @property
    def mask_bytes(self) -> int:
        """Bytes of the masks of a launch."""
        return self.side // 8 + ALIGN * self.records

    @property
    def summary_bytes(self) -> int:
        """Bytes of what :class:`GroupTotals` brings home at once."""
        return ALIGN + self.records * RECORD.itemsize


def fit_room(budget: int, threads: int) -> tuple[Room, int]:
    """The largest buffers with which ``threads`` pipelines fit into a budget of bytes, and how many threads do.

    They are fewer only where the smallest buffers are too large; PlanError if not even one fits.
    """
    room = Room()
    while room.gpu_bytes * threads > budget and (smaller := room.halved()) is not None:
        room = smaller
    fitting = min(threads, budget // room.gpu_bytes)
    if not fitting:
        raise PlanError(
            "this run does not fit into the GPU memory it may use",
            expected=f"at least {-(-room.gpu_bytes >> 20)} MiB",
            found=f"{budget >> 20} MiB",
            hint="a larger --gpu-memory, or close what else uses the GPU",
        )
    return room, fitting


class HostBlock:
    """The page-locked memory of a pipeline, handed out part after part; once the pipeline is made, none is left.

    One block, since each that is locked takes whole pages and a call of the driver.
    """

    def __init__(self, gpu: Gpu, room: Room) -> None:
        self._left = gpu.pinned(room.host_bytes)

    def take(self, size: int) -> ByteArray:
        """The next part, which starts at a multiple of ``ALIGN``."""
        part, self._left = self._left[:size], self._left[_aligned(size) :]
        return part


class Slot:
    """What goes up for one launch, and what comes down of each: on the host, and under the same name on the GPU."""

    def __init__(self, gpu: Gpu, room: Room, block: HostBlock) -> None:
        base, tuned, *others = map(block.take, room.of_slot)
        self.host_sides, (self.host_tiles, self.host_mask, self.host_sums) = (base, tuned), others
        base, tuned, *others = map(gpu.empty, room.of_slot)
        self.sides, (self.tiles, self.mask, self.sums) = (base, tuned), others
        self.first_ties = gpu.empty(room.tiles * 8)
        self.done: Event = None
        """When all that was queued with this slot is done: host and GPU may use it again."""


class GroupTotals:
    """What a group of launches leaves once it is complete."""

    def __init__(self, gpu: Gpu, room: Room, block: HostBlock) -> None:
        self.host_summary, self.summary = block.take(room.summary_bytes), gpu.empty(room.summary_bytes)
        self.places = gpu.empty(MOST_ENTRIES * 4)
        self.counts = gpu.empty(MOST_ENTRIES * 8)

    @property
    def found(self) -> object:
        """On the GPU: how many bins are not empty."""
        return self.summary[:4]

    @property
    def records(self) -> object:
        """On the GPU: one ``RECORD`` for each tensor pair."""
        return self.summary[ALIGN:]

    def home(self, records: int) -> tuple[int, np.ndarray]:
        """On the host: how many bins are not empty, and the records."""
        found = int(self.host_summary[:4].view(np.uint32)[0])
        return found, self.host_summary[ALIGN : ALIGN + records * RECORD.itemsize].view(RECORD)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
