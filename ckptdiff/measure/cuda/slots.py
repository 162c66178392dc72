"""Make room for what is under way: two launches at a time, on the host and on the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import PlanError
from ckptdiff.measure.cuda.gpu import Buffer, Event, Gpu, Stream
from ckptdiff.measure.cuda.layout import BIN, DEVICE_TILE, RECORD, REFINE_BINS, ROWS, TILE_RECORD
from ckptdiff.measure.partial import BINS, BLOCK, Sum
from ckptdiff.measure.source import ByteArray

SLOTS = 2
"""Launches under way: while one is read, the one before is on its way."""
ALIGN = 64
"""Each part of a buffer starts at a multiple of this: no load of the kernels is wider."""
ORDINAL = 8
"""Bytes of where the ties of the next launch begin."""
ENTRIES = 1 << 15
"""Bins that are brought home at a time, the first of them with the figures: few scans use more."""
_WORTH = 4 << 20
"""Bytes of a side whose way up takes about as long as the calls that it takes."""
MOST_ENTRIES = 12 * REFINE_BINS
"""Bins that a launch may leave: of four whole scans, or of every cut of a further pass."""


@dataclass(frozen=True, slots=True)
class Room:
    """How large the buffers are."""

    side: int = 16 << 20
    """Bytes of one side in a launch; a multiple of 8 ``DEVICE_TILE``."""
    records: int = 32
    """Tensor pairs in a launch."""

    @property
    def tiles(self) -> int:
        """Tiles in a launch: of formats of a byte, and one begun in each pair."""
        return self.side // DEVICE_TILE + self.records

    @property
    def task_blocks(self) -> int:
        """Blocks of a task: those of four launches of 16 bits, so that what a task costs beside them is little."""
        return max(4 * self.coordinates(16) // BLOCK, 8)

    @property
    def host_bytes(self) -> int:
        """Page-locked memory, taken as one block (:class:`HostBlock`)."""
        return SLOTS * sum(map(aligned, (self.up_bytes, self.down_bytes, self.summary_bytes + ENTRIES * BIN.itemsize)))

    @property
    def gpu_bytes(self) -> int:
        """GPU memory."""
        of_slot = self.up_bytes + self.down_bytes + self.tiles * 8
        of_slots = SLOTS * (of_slot + self.summary_bytes + MOST_ENTRIES * BIN.itemsize)
        return of_slots + 2 * self.side_bytes + self.bins * 8 + ORDINAL

    @property
    def up_bytes(self) -> int:
        """Bytes of what goes up for a launch: tiles, then base, then tuned side."""
        return self.tiles_bytes + 2 * self.side_bytes

    @property
    def down_bytes(self) -> int:
        """Bytes of what comes down of each: sums, then masks."""
        return self.sums_bytes + self.side // 8 + ALIGN * self.records

    @property
    def tiles_bytes(self) -> int:
        """Bytes of the tiles of a launch."""
        return aligned(self.tiles * TILE_RECORD.itemsize)

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums of a launch."""
        return aligned(self.tiles * 8 * len(Sum))

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
        # Small tensors share launches of any size.
        records = self.records if self.side > _WORTH else self.records // 2
        return Room(max(self.side // 2, least.side), max(records, least.records))

    @property
    def side_bytes(self) -> int:
        """Bytes of the buffer of a side."""
        return self.side + ALIGN * (self.records + 1)

    @property
    def summary_bytes(self) -> int:
        """Bytes of what :class:`GroupTotals` brings home beside bins."""
        return aligned(ALIGN + self.records * RECORD.itemsize)


def fit_room(budget: int, on_host: int, threads: int) -> tuple[Room, int]:
    """The largest buffers with which ``threads`` pipelines fit into a budget of bytes, and how many threads do.

    They are fewer only where the smallest buffers are too large; PlanError if not even one fits. Where they take more
    than ``on_host`` bytes of host memory they are smaller too, while launches stay worth their calls.
    """
    room = Room()
    while room.host_bytes * threads > on_host and room.side > _WORTH and (smaller := room.halved()) is not None:
        room = smaller
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

    def __init__(self, gpu: Gpu, size: int) -> None:
        self._left = gpu.pinned(size)

    def take(self, size: int) -> ByteArray:
        """The next part, which starts at a multiple of ``ALIGN``."""
        part, self._left = self._left[:size], self._left[aligned(size) :]
        return part


class UpSlot:
    """What goes up at a time: on the host, and under the same name on the GPU."""

    def __init__(self, gpu: Gpu, size: int, block: HostBlock) -> None:
        self.host_up, self.up = block.take(size), gpu.empty(size)
        self.sent: Event = None
        """When all of it is on the GPU."""
        self.ran: Event = None
        """When the kernels that read it there are done."""


class Slot(UpSlot):
    """What goes up for one launch, and what comes down of it, in the same way."""

    def __init__(self, gpu: Gpu, room: Room, block: HostBlock) -> None:
        super().__init__(gpu, room.up_bytes, block)
        self.host_down = block.take(room.down_bytes)
        self.down, self.first_ties = gpu.empty(room.down_bytes), gpu.empty(room.tiles * 8)
        self.done: Event = None
        """When all that was queued with this slot is done: host and GPU may use it again."""


class GroupTotals:
    """What a group of launches leaves once it is complete: how many bins are in use, records, and those bins."""

    def __init__(self, gpu: Gpu, room: Room, block: HostBlock) -> None:
        size, most = room.summary_bytes, MOST_ENTRIES * BIN.itemsize
        self._host, self._there = block.take(size + ENTRIES * BIN.itemsize), gpu.empty(size + most)
        self._summary_bytes = size
        self.found: Buffer = self._there[:4]
        """On the GPU, as what follows: how many bins are not empty."""
        self.records: Buffer = self._there[ALIGN:size]
        """One ``RECORD`` for each tensor pair."""
        self.summary: Buffer = self._there[:size]
        """Both of these."""
        self.bins: Buffer = self._there[size:]
        """Those bins, of ``BIN``."""

    def bring_home(self, gpu: Gpu, stream: Stream) -> None:
        """Queue the copy of all of it but bins beyond the first ``ENTRIES``."""
        gpu.download(self._host, self._there, stream)

    def home(self, records: int) -> tuple[NDArray[Any], NDArray[Any], int]:
        """On the host: records, the first bins that are in use, and how many more there are."""
        found = int(self._host[:4].view(np.uint32)[0])
        first = self._host[self._summary_bytes :].view(BIN)[:found]
        return self._host[ALIGN : ALIGN + records * RECORD.itemsize].view(RECORD), first, found - first.size

    def more(self, gpu: Gpu, stream: Stream, count: int) -> NDArray[Any]:
        """Bring all of ``count`` bins home, as many at a time as there is room for."""
        room, parts = self._host[self._summary_bytes :], []
        for start in range(0, count * BIN.itemsize, room.size):
            part = room[: min(room.size, count * BIN.itemsize - start)]
            gpu.download(part, self.bins[start:], stream)
            gpu.synchronize(gpu.record(stream))
            parts.append(part.view(BIN).copy())
        return np.concatenate(parts)


def aligned(size: int) -> int:
    """The next multiple of ``ALIGN``."""
    return -(-size // ALIGN) * ALIGN
