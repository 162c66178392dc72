"""Hand out a matrix of a tensor pair as panels: decoded once if it fits into memory, else streamed in every pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import TensorInfo, TensorPair
from ckptdiff.checkpoint.boxes import matrix_of, read_elements, read_weight
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.codes.lanes import aligned
from ckptdiff.formats import Format, Formats, recode_table
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import ArrayPanels, Panel
from ckptdiff.linalg.threads import count_work, cuts, in_parts
from ckptdiff.spectra.kernels.panels import cast_to_bf16, widen_bf16
from ckptdiff.spectra.matrices import MatrixView

PANEL = 1 << 21
"""Entries of a panel, about."""
GPU_PANEL = 1 << 24
"""The same on a GPU. Figures depend on it in their last digits, so no lack of memory makes it smaller."""
_READ, _TURNED, _LOOKED_UP = 30.0, 800.0, 150.0
"""The work of reading an entry of both sides, of transposing it, and of looking up one side's value in a table."""

Floats = NDArray[Any]


class PanelMemory:
    """Memory for decoded pairs, handed on from one to the next: what the system hands out it has to clear first."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, size: int, most: int) -> NDArray[np.uint8] | None:
        """Room for `size` bytes, `most` at most; None if that is less. What is free and does not fit is given up."""
        with self._lock:
            fitting = [place for place, one in enumerate(self._free) if size <= one.size <= most]
            if fitting:
                return self._free.pop(min(fitting, key=lambda place: self._free[place].size))
            self._free.clear()
        return aligned((size,), np.uint8) if size <= most else None

    def give(self, room: NDArray[np.uint8]) -> None:
        """Hand back what nobody uses any more."""
        with self._lock:
            self._free.append(room)


class StoredPanels:
    """A pair of floating matrices on disk; a :class:`~ckptdiff.linalg.stages.PanelSource` of float32 or float64."""

    library = NUMPY
    kept = False
    stack: tuple[int, ...] = ()

    def __init__(
        self,
        shards: OpenShards,
        pair: TensorPair,
        formats: Formats,
        view: MatrixView,
        dtype: Any,
        entries: int = PANEL,
    ) -> None:
        self.long, self.short = view.long, view.short
        self._shards, self.pair, self.view = shards, pair, view
        self.formats, self.dtype = formats, np.dtype(dtype)
        self._entries, self._rows = entries, max(1, entries // view.short)
        self._raw = np.empty(0, np.uint8)

    @property
    def same_bytes(self) -> bool:
        """Whether both sides are the same bytes."""
        return self.pair.same_bytes

    @property
    def work(self) -> float:
        """The work of reading the pair once."""
        compare = self.formats[2]
        looked_up = sum(side.bits <= 16 and not side.name == compare.name == "bf16" for side in self.formats[:2])
        entry = _READ + _TURNED * self.view.wide + _LOOKED_UP * looked_up
        return entry * self.long * self.short

    def panels(self) -> Iterator[Panel]:
        """All rows of the tall pair, in order."""
        for first in range(0, self.long, self._rows):
            stop = min(first + self._rows, self.long)
            base = self._side(0, first, stop)
            tuned = base.copy() if self.same_bytes else self._side(1, first, stop)
            _subtract(tuned, base, tuned)
            count_work(self.work * len(base) / self.long)
            yield Panel(base, tuned)

    def sample(self, count: int) -> Floats:
        """About `count` rows of W0, evenly spaced."""
        step = max(1, self.long // count)
        return np.concatenate([self._side(0, row, row + 1) for row in range(0, self.long, step)])

    def cached(self, room: NDArray[np.uint8] | None = None) -> ArrayPanels:
        """The same pair, read and decoded now, into memory of at least :func:`~ckptdiff.spectra.budget.cache_bytes`."""
        side = self.long * self.short * self.dtype.itemsize
        room = aligned((2 * side,), np.uint8) if room is None else room
        base, delta = room[: 2 * side].view(self.dtype).reshape(2, self.long, self.short)
        # Stored rows, a panel or so at a time.
        count = self.short if self.view.wide else self.long
        columns = self.view.columns
        rows = max(1, self._entries // columns)
        at = cuts(count)

        def decode_part(part: int) -> None:
            reader = StoredPanels(self._shards, self.pair, self.formats, self.view, self.dtype)
            for first in range(at[part], at[part + 1], rows):
                stop = min(first + rows, at[part + 1])
                ours, theirs = base[first:stop], delta[first:stop]
                if self.view.wide:
                    ours, theirs = (np.empty((stop - first, columns), self.dtype) for _ in range(2))
                reader._read_rows(0, (first, stop), (0, columns), ours)
                if self.same_bytes:
                    theirs[:] = ours
                else:
                    reader._read_rows(1, (first, stop), (0, columns), theirs)
                _subtract(theirs, ours, theirs)
                if self.view.wide:
                    base[:, first:stop], delta[:, first:stop] = ours.T, theirs.T

        in_parts(decode_part, len(at) - 1, self.work)
        return ArrayPanels(base, delta, self._rows)

    def _side(self, side: int, first: int, stop: int) -> Floats:
        """Rows of the tall matrix of one side."""
        if self.view.wide:
            return np.ascontiguousarray(self._stored_rows(side, 0, self.short, first, stop).T)
        return self._stored_rows(side, first, stop, 0, self.short)

    def _stored_rows(self, side: int, first: int, stop: int, left: int, right: int) -> Floats:
        """A block of one side as it is stored: rows `first` to `stop`, columns `left` to `right`."""
        out = np.empty((stop - first, right - left), self.dtype)
        self._read_rows(side, (first, stop), (left, right), out)
        return out

    def _read_rows(self, side: int, rows: tuple[int, int], columns: tuple[int, int], out: Floats) -> None:
        """Write a block of one side to a C-contiguous array of the panels' dtype."""
        size = out.size * self.formats[side].bits // 8
        if self._raw.size < size:
            self._raw = np.empty(size, np.uint8)
        raw = self._raw[:size]
        self.read_codes(side, rows, columns, raw)
        raw.flags.writeable = False
        decode(raw, self.formats[side], self.formats[2], out)

    def read_codes(self, side: int, rows: tuple[int, int], columns: tuple[int, int], out: NDArray[np.uint8]) -> None:
        """Read a block of one side as it is stored, row by row, into as many raw bytes."""
        weight, whole, offset = (self.pair.base, self.pair.tuned)[side], self.view.columns, self.view.offset
        if columns == (0, whole):
            read_elements(self._shards, weight, offset + rows[0] * whole, offset + rows[1] * whole, out)
        elif isinstance(weight, TensorInfo) and weight.shard.remote is not None:
            size = weight.nbytes // weight.numel
            start = weight.start + (offset + rows[0] * whole + columns[0]) * size
            self._shards[weight.shard].read_rows(weight, start, whole * size, out.reshape(rows[1] - rows[0], -1))
        elif (isinstance(weight, TensorInfo) and not weight.slices) or whole != matrix_of(weight.shape)[1]:
            for row, codes in zip(range(*rows), out.reshape(rows[1] - rows[0], -1), strict=True):
                first = offset + row * whole
                read_elements(self._shards, weight, first + columns[0], first + columns[1], codes)
        else:
            above = offset // whole
            codes = out.view(self.formats[side].code_dtype).reshape(rows[1] - rows[0], -1)
            read_weight(self._shards, weight, (above + rows[0], above + rows[1]), columns, codes)


def _subtract(tuned: Floats, base: Floats, out: Floats) -> None:
    """Write an update; what is beyond the dtype, or was before, makes a pair whose figures are null."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(tuned, base, out=out)


def decode(stored: NDArray[np.uint8], format: Format, compare: Format, out: Floats) -> None:
    """Cast stored values to the compare format and write them as floats.

    They are read from raw little-endian bytes and written to a C-contiguous float32 or float64 array of as many values;
    float64 is rounded where that is float32.
    """
    codes = stored.view(format.code_dtype)
    flat = out.reshape(-1)
    if out.dtype == np.float64 and compare.bits <= 32:
        narrow = np.empty(flat.size, np.float32)
        decode(stored, format, compare, narrow)
        flat[:] = narrow
    elif format.name == compare.name == "bf16":
        widen_bf16(codes, flat.view(np.uint32))
    elif format.bits <= 16:
        np.take(_cast_values(format, compare), codes, out=flat, mode="clip")
    elif compare.name == "bf16":
        with np.errstate(over="ignore", invalid="ignore"):
            single = codes if format.bits == 32 else codes.view(np.float64).astype(np.float32).view(np.uint32)
        # A view that Numba types like what was read from a file: one compiled kernel serves both.
        single = single.view()
        single.flags.writeable = False
        cast_to_bf16(single, flat.view(np.uint32))
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(flat, codes.view(f"f{format.bits // 8}"), casting="same_kind")


@cache
def _cast_values(format: Format, compare: Format) -> Floats:
    """Value after the cast of every code of a format of at most 16 bits."""
    codes = recode_table(format, compare)
    values: Floats = compare.values()[codes] if compare.bits <= 16 else codes.view(f"f{compare.bits // 8}")
    return values
