"""What one thread does with a task: pass both sides through the backend, compress masks."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import TensorInfo, TensorPair
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.figures.columns import Measured, measured
from ckptdiff.measure.backend import Backend, Batching
from ckptdiff.measure.bitwise import scan_bits
from ckptdiff.measure.partial import BitScan, Count, Partial, Refined, Scan, Targets
from ckptdiff.measure.passes import BitMeasurement, FloatMeasurement
from ckptdiff.measure.ranks import LARGEST, SMALLEST, set_sizes, wanted
from ckptdiff.measure.records import empty_records
from ckptdiff.run.shard_source import Buffers, ShardSource
from ckptdiff.run.tasks import Span
from ckptdiff.runfile.compress import compress_chunk, compress_parts
from ckptdiff.runfile.schema import MASK_CHUNK, mask_chunk_bytes

__all__ = ["Chunk", "Result", "Worker"]

Measurement = FloatMeasurement | BitMeasurement


@dataclass(frozen=True, slots=True)
class Chunk:
    """One compressed mask chunk of a tensor, as the run file stores it."""

    tensor: int
    index: int
    payload: bytes
    filter_mask: int


@dataclass(slots=True)
class Result:
    """What a pass over a span of blocks, or over whole tensors, gave.

    Attributes
    ----------
    tensors : range
        The tensor, or the consecutive small ones.
    span : Span or None
        Of a part of a large tensor.
    found : Partial, Refined or None
        To be merged with the other spans of the tensor; None once it is.
    chunks : list of Chunk
        Mask chunks, in order.
    compared, unchanged : int
        Floating coordinates that were seen for the first time, and those of them that did not change.
    measured : Measured or None
        Of all ``tensors``; set on the result that completes them.
    """

    tensors: range
    span: Span | None = None
    found: Partial | Refined | None = None
    chunks: list[Chunk] = field(default_factory=list)
    compared: int = 0
    unchanged: int = 0
    measured: Measured | None = None


class Worker:
    """The state of one thread: its backend and its buffers.

    Parameters
    ----------
    backend : Backend
    shards : OpenShards
    stop : threading.Event
        Set when the run is given up; the thread then leaves at the next block.
    spare : deque of Partial
        Partials that nobody reads any more, shared by all threads: to clear the bins of one that were in use is
        cheaper than to get zeros for all.
    """

    def __init__(self, backend: Backend, shards: OpenShards, stop: threading.Event, spare: deque[Partial]) -> None:
        self._backend, self._shards, self._stop = backend, shards, stop
        self._spare = spare
        self._buffers = Buffers()

    def measure(self, pair: TensorPair, measurement: Measurement, span: Span) -> Result:
        """Carry out every pass over a whole tensor pair."""
        result = Result(range(span.tensor, span.tensor + 1))
        partials = []
        while measurement.next is not None:
            found, chunks = self._pass(pair, measurement, span)
            result.chunks += chunks
            measurement.take(found)
            if isinstance(found, Partial):
                partials.append(found)
        result.measured = measurement.measured()
        if isinstance(measurement, FloatMeasurement):
            result.compared, result.unchanged = measurement.numel, int(result.measured.columns["unchanged_bitwise"][0])
        self._spare.extend(partials)  # only now: the measurement reads the first one to the end
        return result

    def measure_alike(
        self, pairs: Sequence[TensorPair], measurement: Callable[[int], Measurement], first: int
    ) -> Result:
        """Measure small tensor pairs of the same formats in one go; those that need another pass, one by one."""
        model, backend = measurement(first), self._backend
        assert isinstance(model, FloatMeasurement) and isinstance(model.next, Scan) and isinstance(backend, Batching)
        numel = np.array([pair.base.numel for pair in pairs], np.int64)
        records = empty_records(len(pairs))
        ranks = set_sizes(LARGEST, numel), set_sizes(SMALLEST, numel)
        done, masks, starts = backend.scan_small(model.next, self._places(pairs), ranks, wanted(model.compare), records)
        if done < len(pairs):
            span = Span(first + done, 0, 1)
            ShardSource(self._shards, pairs[done], span, self._buffers, self._stop).fail(0, pairs[done].base.numel)
        payloads = compress_parts(masks, starts, -(-numel // 8)) if model.masks_now else []
        chunks = [Chunk(first + i, 0, *payload) for i, payload in enumerate(payloads)]
        found = measured(records, numel, model.wide, model.rule)
        for row in np.flatnonzero(~records.complete).tolist():
            alone = self.measure(pairs[row], measurement(first + row), Span(first + row, 0, 1))
            assert alone.measured is not None
            found.replace(row, alone.measured)
        unchanged = int(found.columns["unchanged_bitwise"].sum())
        tensors = range(first, first + len(pairs))
        return Result(tensors, chunks=chunks, compared=int(numel.sum()), unchanged=unchanged, measured=found)

    def pass_over(self, pair: TensorPair, measurement: Measurement, span: Span) -> Result:
        """Carry out the pass at hand over a part of a tensor pair."""
        first = measurement.scanning
        found, chunks = self._pass(pair, measurement, span)
        result = Result(range(span.tensor, span.tensor + 1), span, found, chunks)
        if first and isinstance(found, Partial) and isinstance(measurement, FloatMeasurement):
            result.compared, result.unchanged = found.numel, found.numel - int(found.counts[Count.CHANGED])
        return result

    def _pass(self, pair: TensorPair, measurement: Measurement, span: Span) -> tuple[Partial | Refined, list[Chunk]]:
        todo = measurement.next
        assert todo is not None
        source = ShardSource(self._shards, pair, span, self._buffers, self._stop)
        if isinstance(todo, Targets):
            assert isinstance(measurement, FloatMeasurement)
            refined = Refined.empty(todo)
            self._backend.refine(measurement.scan, todo, source, refined)
            return refined, []
        partial = self._blank()
        if isinstance(todo, BitScan):
            mask = scan_bits(todo, source, partial)
        else:
            mask = self._backend.scan(todo, source, partial, measurement.first_tie(span.first))
        return partial, [] if mask is None else list(_compressed(mask, span.tensor, span.first, pair.base.numel))

    def _blank(self) -> Partial:
        """Nothing seen yet."""
        try:
            partial = self._spare.pop()
        except IndexError:
            return Partial()
        partial.clear()
        return partial

    def _places(self, pairs: Sequence[TensorPair]) -> NDArray[np.int64]:
        """Descriptor and offset of both sides of each pair, and its coordinates; tells the disk what comes next."""
        places = np.empty((len(pairs), 5), np.int64)
        for column, side in enumerate(([pair.base for pair in pairs], [pair.tuned for pair in pairs])):
            shards: dict[str, list[TensorInfo]] = defaultdict(list)
            for tensor in side:
                shards[tensor.shard.path].append(tensor)
            descriptors = {
                path: self._shards[some[0].shard].ready(min(t.start for t in some), max(t.stop for t in some))
                for path, some in shards.items()
            }
            places[:, 2 * column] = [descriptors[tensor.shard.path] for tensor in side]
            places[:, 2 * column + 1] = [tensor.start for tensor in side]
        places[:, 4] = [pair.base.numel for pair in pairs]
        return places


def _compressed(mask: NDArray[np.uint8], tensor: int, first: int, numel: int) -> Iterator[Chunk]:
    """Compress the mask of a span, a chunk for each of its blocks."""
    size = mask_chunk_bytes(numel)
    for start in range(0, mask.size, MASK_CHUNK):
        index = first + start // MASK_CHUNK
        yield Chunk(tensor, index, *compress_chunk(mask[start : start + MASK_CHUNK], size))
