"""Fill the ``/histograms`` group row by row."""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.deflate.deflate import deflate_parts
from ckptdiff.measure.histograms import HistogramRows, log2_floor, ulp_floor
from ckptdiff.runfile.direct_chunks import write_chunk
from ckptdiff.runfile.schema import HISTOGRAMS

_ROWS = 64
_GROWTH = 64 * _ROWS
"""Rows that a dataset grows by, which takes HDF5 as long as to write a chunk."""
_WAITING = 8
"""Chunks of each dataset that may wait to be compressed, 4 MB in all: the thread that does it has no core to itself."""
_LEVEL = 1


class HistogramTable:
    """Datasets in an empty group, of one row per tensor, that are written by whole chunks of 64 rows.

    Parameters
    ----------
    group : h5py.Group
    many : bool
        Whether there are so many rows that the encoder of masks, which has to be loaded, takes them sooner than zlib.
    """

    def __init__(self, group: Any, many: bool = False) -> None:
        self._many = many
        self._parts: defaultdict[str, list[NDArray[np.uint64]]] = defaultdict(list)
        self._held = self._written = self._room = 0
        self._waiting: deque[tuple[int, Future[dict[str, list[bytes]]]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ckptdiff-histograms")
        self._group = group
        log2 = group.create_dataset("log2_floor", data=log2_floor())
        log2.attrs["long_name"] = "floor(log2 |x|) of each bin; -inf is exactly zero; both ends take what lies beyond"
        ulp = group.create_dataset("ulp_floor", data=ulp_floor())
        ulp.attrs["long_name"] = "smallest distance of each bin, in units in the last place"
        for axis in (log2, ulp):
            axis.make_scale(axis.name.rpartition("/")[2])
        self._datasets = {}
        for name, (field, long_name) in HISTOGRAMS.items():
            bins = getattr(HistogramRows.empty(0), field).shape[1]
            dataset = group.create_dataset(
                name,
                (0, bins),
                np.uint64,
                maxshape=(None, bins),
                chunks=(_ROWS, bins),
                compression="gzip",
                compression_opts=_LEVEL,
            )
            dataset.attrs.update(units="1", long_name=long_name)
            dataset.dims[1].attach_scale(ulp if field == "ulp" else log2)
            self._datasets[field] = dataset

    def add(self, rows: HistogramRows) -> None:
        """Take the next rows, which nobody changes any more, and write every full chunk."""
        start = 0
        while start < len(rows):
            # Whole chunks that come together are compressed together, where they lie.
            whole = 0 if self._held else (len(rows) - start) // _ROWS * _ROWS
            stop = start + whole if whole else min(len(rows), start + _ROWS - self._held)
            for field in self._datasets:
                self._parts[field].append(getattr(rows, field)[start:stop])
            self._held, start = self._held + stop - start, stop
            if self._held >= _ROWS:
                self._write()

    def finish(self, tensors: int) -> None:
        """Write what is left; raises ValueError if there are not as many rows as tensors."""
        rows = self._written + self._held
        if rows != tensors:
            raise ValueError(f"{rows} rows of histograms for {tensors} tensors")
        if self._held:
            self._write()
        while self._waiting:
            self._write_waiting()
        self._resize(tensors)

    def close(self) -> None:
        """End the thread that compresses."""
        self._pool.shutdown(cancel_futures=True)

    def name_rows(self, names: Any) -> None:
        """Make the names of the tensors, a scale of another group, the scale of the rows here too."""
        self._group["name"] = names
        for dataset in self._datasets.values():
            dataset.dims[0].attach_scale(names)

    def _write(self) -> None:
        """Hand the rows to be compressed, and write those that were handed some time ago."""
        # Compressed here, not by HDF5, because zlib and compiled code give the GIL away and HDF5 does not.
        self._waiting.append((self._written, self._pool.submit(_deflated, self._parts, self._many)))
        self._parts = defaultdict(list)
        self._written, self._held = self._written + self._held, 0
        while len(self._waiting) > 1 and self._written - self._waiting[0][0] > _WAITING * _ROWS:
            self._write_waiting()

    def _write_waiting(self) -> None:
        start, chunks = self._waiting.popleft()
        for field, found in chunks.result().items():
            stop = start + len(found) * _ROWS
            if stop > self._room:
                self._resize(max(stop, self._room + _GROWTH))
            for row, chunk in zip(range(start, stop, _ROWS), found, strict=True):
                write_chunk(self._datasets[field].id, (row, 0), chunk)

    def _resize(self, rows: int) -> None:
        self._room = rows
        for dataset in self._datasets.values():
            dataset.resize(rows, axis=0)


def _deflated(rows: Mapping[str, Sequence[NDArray[np.uint64]]], many: bool) -> dict[str, list[bytes]]:
    """Compress the chunks of rows that come in parts; what is left of the last one are zeros."""
    return {field: _compressed(_joined(parts), many) for field, parts in rows.items()}


def _joined(parts: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    if len(parts) == 1 and len(parts[0]) % _ROWS == 0:
        return parts[0]
    rows = np.zeros((_ROWS, parts[0].shape[1]), np.uint64)
    np.concatenate(parts, out=rows[: sum(map(len, parts))])
    return rows


def _compressed(rows: NDArray[np.uint64], many: bool) -> list[bytes]:
    data, size = rows.reshape(-1).view(np.uint8), _ROWS * rows[0].nbytes
    data.flags.writeable = False
    starts = np.arange(0, data.size, size)
    # Both look for runs alone: most bins are empty, and a search for any repeat would find less at this level. All
    # chunks take one call: after each, this thread has to wait for its turn with Python.
    if many:
        bounds = np.column_stack([starts, starts + size, np.full(len(starts), size)])
        streams = [found.stream for found in deflate_parts(data, bounds, search=False)]
    else:
        streams = [None] * len(starts)
    return [
        stream or _runs_only(data[start : start + size]) for start, stream in zip(starts.tolist(), streams, strict=True)
    ]


def _runs_only(data: NDArray[np.uint8]) -> bytes:
    encoder = zlib.compressobj(_LEVEL, strategy=zlib.Z_RLE)
    return encoder.compress(data.data) + encoder.flush()
