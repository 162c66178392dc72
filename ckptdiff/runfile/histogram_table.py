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
        self._waiting: deque[tuple[int, Future[dict[str, bytes]]]] = deque()
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
            stop = min(len(rows), start + _ROWS - self._held)
            for field in self._datasets:
                self._parts[field].append(getattr(rows, field)[start:stop])
            self._held, start = self._held + stop - start, stop
            if self._held == _ROWS:
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
        if len(self._waiting) > _WAITING:
            self._write_waiting()

    def _write_waiting(self) -> None:
        start, chunks = self._waiting.popleft()
        if start + _ROWS > self._room:
            self._resize(self._room + _GROWTH)
        for field, chunk in chunks.result().items():
            write_chunk(self._datasets[field].id, (start, 0), chunk)

    def _resize(self, rows: int) -> None:
        self._room = rows
        for dataset in self._datasets.values():
            dataset.resize(rows, axis=0)


def _deflated(chunks: Mapping[str, Sequence[NDArray[np.uint64]]], many: bool) -> dict[str, bytes]:
    """Compress chunks of which each comes in parts; what is left of it are zeros."""
    stops = np.cumsum([_ROWS * parts[0][0].nbytes for parts in chunks.values()])
    starts = np.array([0, *stops[:-1]])
    data = np.zeros(stops[-1], np.uint8)
    for start, parts in zip(starts.tolist(), chunks.values(), strict=True):
        held = sum(part.nbytes for part in parts)
        np.concatenate(parts, axis=None, out=data[start : start + held].view(np.uint64))
    data.flags.writeable = False
    # Both look for runs alone: most bins are empty, and a search for any repeat would find less at this level.
    if many:
        bounds = np.column_stack([starts, stops, stops - starts])
        streams = [found.stream for found in deflate_parts(data, bounds, search=False)]
    else:
        streams = [None] * len(chunks)
    pieces = zip(chunks, starts.tolist(), stops.tolist(), streams, strict=True)
    return {field: stream or _runs_only(data[start:stop]) for field, start, stop, stream in pieces}


def _runs_only(data: NDArray[np.uint8]) -> bytes:
    encoder = zlib.compressobj(_LEVEL, strategy=zlib.Z_RLE)
    return encoder.compress(data.data) + encoder.flush()
