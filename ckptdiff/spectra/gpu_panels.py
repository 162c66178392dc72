"""Hand out a matrix of a tensor pair as panels on a GPU: uploaded once if it fits there, else streamed in every pass.

Or many small ones of one shape as a stack, which is uploaded once.

Codes go up as they are stored, a piece at a time, and a kernel decodes, casts, subtracts and turns them there. Pieces
go up through slots like those of the coordinate pass: while one is read, the other goes up, and products of the panel
before run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import Formats
from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.on_cupy import GpuLibrary
from ckptdiff.linalg.stages import Panel
from ckptdiff.linalg.threads import count_work
from ckptdiff.measure.cuda.gpu import Buffer
from ckptdiff.measure.cuda.slots import SLOTS, HostBlock, UpSlot, aligned
from ckptdiff.measure.source import ByteArray
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.panels import GPU_PANEL

PIECE = 16 << 20
"""Bytes of one side that go up at a time."""


class StoredCodes(Protocol):
    """A pair of matrices whose codes can be read."""

    long: int
    short: int
    dtype: np.dtype[Any]
    """Of the panels: float32 or float64."""
    formats: Formats
    view: MatrixView

    @property
    def same_bytes(self) -> bool:
        """Whether both sides are the same bytes."""

    @property
    def work(self) -> float:
        """The work of reading the pair once."""

    def read_codes(self, side: int, rows: tuple[int, int], columns: tuple[int, int], out: ByteArray) -> None:
        """Read a block of one side as it is stored, row by row."""

    def sample(self, count: int) -> NDArray[Any]:
        """About `count` rows of W0, evenly spaced."""


def slots_bytes(piece: int = PIECE) -> int:
    """Bytes of page-locked memory that slots of both sides take, and of GPU memory."""
    return SLOTS * 2 * aligned(piece)


class PanelSlots:
    """What the matrices of a run go up through, one after the other.

    Nothing is taken before the first piece goes up: until then, the coordinate pass has slots of its own.
    """

    def __init__(self, library: GpuLibrary, piece: int = PIECE) -> None:
        self.library, self.piece, self.up = library, piece, library.gpu.stream()
        self._slots: list[UpSlot] = []
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of page-locked memory that it takes, and of GPU memory."""
        return slots_bytes(self.piece)

    def take(self) -> UpSlot:
        """The slot of the next piece, once the host may write to it."""
        gpu = self.library.gpu
        if not self._slots:
            block = HostBlock(gpu, self.nbytes)
            self._slots = [UpSlot(gpu, self.nbytes // SLOTS, block) for _ in range(SLOTS)]
        slot = self._slots[self._next % SLOTS]
        self._next += 1
        if slot.sent is not None:
            gpu.synchronize(slot.sent)
        return slot

    def give_back(self) -> None:
        """Take nothing until the next piece."""
        self.drain()
        self._slots.clear()

    def drain(self) -> None:
        """Wait for all that is queued; what fails on the way follows from what is being reported."""
        for stream in (self.up, self.library.stream):
            with suppress(Exception):
                self.library.gpu.finish(stream)


class GpuPanels:
    """A pair of floating matrices; a :class:`~ckptdiff.linalg.stages.PanelSource` of float32 or float64.

    Parameters
    ----------
    stored : StoredCodes
        Such as :class:`~ckptdiff.spectra.panels.StoredPanels`.
    slots : PanelSlots
    kept : bool
        Whether all of it stays on the GPU; MemoryError if that has no room for it.
    """

    stack: tuple[int, ...] = ()

    def __init__(self, stored: StoredCodes, slots: PanelSlots, kept: bool, entries: int = GPU_PANEL) -> None:
        self.long, self.short, self.dtype = stored.long, stored.short, stored.dtype
        self.library: Library = slots.library
        self.kept, self._gpu = kept, slots.library
        self._stored, self._slots = stored, slots
        self._rows = min(max(1, entries // self.short), self.long)
        self._all: tuple[Array, Array] | None = None
        self._bits = max(format.bits for format in stored.formats[:2])
        self._buffers = self._room(self.long if kept else self._rows)
        if kept:
            self._fill(0, self.long)
            self._all = self._arrays(self.long)

    @property
    def work(self) -> float:
        """The work of reading the pair once."""
        return self._stored.work

    def panels(self) -> Iterator[Panel]:
        """All rows of the tall pair, in order."""
        for first in range(0, self.long, self._rows):
            rows = slice(first, min(first + self._rows, self.long))
            if self._all is not None:
                base, delta = self._all
                yield Panel(base[..., rows, :], delta[..., rows, :])
            else:
                self._fill(rows.start, rows.stop)
                yield Panel(*self._arrays(rows.stop - rows.start))

    def sample(self, count: int) -> Array:
        """About `count` rows of W0, evenly spaced."""
        return self.library.put(self._stored.sample(count))

    def _room(self, rows: int) -> list[Buffer]:
        size = math.prod(self.stack) * rows * self.short * self.dtype.itemsize
        return [self._gpu.gpu.empty(size) for _ in range(2)]

    def _arrays(self, rows: int) -> tuple[Array, Array]:
        shape = (*self.stack, rows, self.short)
        base, delta = (self._gpu.array(buffer, self.dtype, shape) for buffer in self._buffers)
        return base, delta

    def _fill(self, first: int, stop: int) -> None:
        """Queue all that makes a panel of these rows of the tall pair."""
        wide = self._stored.view.wide
        self._decode(*(((0, self.short), (first, stop)) if wide else ((first, stop), (0, self.short))))
        count_work(self.work * (stop - first) / self.long)

    def _decode(self, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        """Queue all that makes a panel of a block as it is stored; if that fails nothing is left under way."""
        try:
            for piece in self._pieces(rows, columns):
                self._send(*piece, (rows[0], columns[0]))
        except BaseException:
            self._slots.drain()
            raise

    def _pieces(
        self, rows: tuple[int, int], columns: tuple[int, int]
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Blocks of the stored matrix that fill a slot at most: rows, or parts of one."""
        entries = self._slots.piece * 8 // self._bits
        across = min(columns[1] - columns[0], entries)
        down = entries // across
        for top in range(*rows, down):
            for left in range(*columns, across):
                yield (top, min(top + down, rows[1])), (left, min(left + across, columns[1]))

    def _send(self, rows: tuple[int, int], columns: tuple[int, int], origin: tuple[int, int]) -> None:
        """Read a block, and queue its way up and the kernel that makes a part of the panel of it."""
        stored, slots, gpu = self._stored, self._slots, self._gpu.gpu
        (height, width), wide = (rows[1] - rows[0], columns[1] - columns[0]), stored.view.wide
        slot, same = slots.take(), stored.same_bytes
        sizes = [height * width * format.bits // 8 for format in stored.formats[:2]]
        tuned = 0 if same else aligned(sizes[0])
        for side, start in enumerate([0] if same else [0, tuned]):
            stored.read_codes(side, rows, columns, slot.host_up[start : start + sizes[side]])
        if slot.ran is not None:
            gpu.wait(slots.up, slot.ran)
        gpu.upload(slot.up, slot.host_up[: tuned + sizes[1]], slots.up)
        slot.sent = gpu.record(slots.up, slot.sent)
        gpu.wait(self._gpu.stream, slot.sent)
        top, left = rows[0] - origin[0], columns[0] - origin[1]
        # Rows that are turned may be those of several matrices, whose places the kernel finds.
        start = (left * self.short if wide else top * self.short + left) * self.dtype.itemsize
        arguments: list[Any] = [slot.up, slot.up[tuned:]]
        arguments += [np.uint64(height), np.uint64(width), np.uint64(self.short), np.uint32(wide)]
        arguments += [np.uint64(top), np.uint64(self.long * self.short)]
        arguments += [buffer[start:] for buffer in self._buffers]
        kernel = f"panel_{self.dtype.name}"
        gpu.launch(stored.formats, kernel, 8 * gpu.processors, arguments, self._gpu.stream)
        slot.ran = gpu.record(self._gpu.stream, slot.ran)


class _Joined:
    """Pairs of matrices of one shape, formats and layout, read as if their rows were those of one."""

    def __init__(self, parts: Sequence[StoredCodes]) -> None:
        self.parts, first = parts, parts[0]
        self.long, self.short, self.dtype = first.long, first.short, first.dtype
        self.formats, self.view, self.same_bytes = first.formats, first.view, first.same_bytes
        self.work, self.sample = sum(part.work for part in parts), first.sample

    def read_codes(self, side: int, rows: tuple[int, int], columns: tuple[int, int], out: ByteArray) -> None:
        """Read a block of one side as it is stored, row by row."""
        height, line = self.view.rows, out.nbytes // (rows[1] - rows[0])
        for member in range(rows[0] // height, -(-rows[1] // height)):
            above = member * height
            first, stop = max(rows[0], above), min(rows[1], above + height)
            part = out[(first - rows[0]) * line : (stop - rows[0]) * line]
            self.parts[member].read_codes(side, (first - above, stop - above), columns, part)


class GpuStack(GpuPanels):
    """Pairs of floating matrices of one shape, formats and layout, in a stack with room for so many."""

    def __init__(self, stored: Sequence[StoredCodes], slots: PanelSlots, room: int) -> None:
        self.stack, self._members = (room,), len(stored)
        joined = _Joined(stored)
        super().__init__(joined, slots, True, joined.long * joined.short)

    def _fill(self, first: int, stop: int) -> None:
        for buffer in self._buffers:
            self._gpu.gpu.clear(buffer, self._gpu.stream)
        view = self._stored.view
        self._decode((0, self._members * view.rows), (0, view.columns))
        count_work(self.work)

    def sample(self, count: int) -> Array:
        """About `count` rows of each W0, evenly spaced."""
        assert self._all is not None
        return self._all[0][:, :: max(1, self.long // count), :]

    def clear(self, member: int) -> None:
        """Make zeros of a pair, which are in no other's way."""
        assert self._all is not None
        for side in self._all:
            side[member, ...] = 0.0
