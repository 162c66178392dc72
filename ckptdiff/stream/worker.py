"""What one thread does with a task: read windows of both sides, pass them through the backend, compress masks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckptdiff.backends.backend import Backend
from ckptdiff.backends.bitwise import scan_bits
from ckptdiff.backends.partial import BitScan, Count, Partial, Refined, Targets
from ckptdiff.checkpoint import TensorPair
from ckptdiff.metrics.measurement import BitMeasurement, FloatMeasurement, Measured
from ckptdiff.runfile.compress import compress_chunk
from ckptdiff.runfile.schema import MASK_CHUNK, mask_chunk_bytes
from ckptdiff.stream.plan import Span
from ckptdiff.stream.reader import OpenShards
from ckptdiff.stream.source import Buffers, ShardSource

__all__ = ["Chunk", "SpanResult", "Worker"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One compressed mask chunk, as the run file stores it."""

    index: int
    payload: bytes
    filter_mask: int


@dataclass(slots=True)
class SpanResult:
    """What a pass over a span of blocks gave.

    Attributes
    ----------
    span : Span
    found : Partial, Refined or None
        To be merged with the other spans of the tensor; None once it is.
    chunks : list of Chunk
        Mask chunks of the span, in order.
    fresh : bool
        Whether the span was read for the first time.
    compared, unchanged : int
        Floating coordinates that were seen for the first time, and those of them that did not change.
    measured : Measured or None
        Set on the result that completes the tensor.
    """

    span: Span
    found: Partial | Refined | None
    chunks: list[Chunk] = field(default_factory=list)
    fresh: bool = True
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
    """

    def __init__(self, backend: Backend, shards: OpenShards, stop: threading.Event) -> None:
        self._backend, self._shards, self._stop = backend, shards, stop
        self._buffers = Buffers()
        self._partial = Partial()

    def measure(self, pair: TensorPair, measurement: FloatMeasurement | BitMeasurement, span: Span) -> SpanResult:
        """Carry out every pass over a whole tensor pair."""
        result = SpanResult(span, None)
        reusable: Partial | None = self._partial
        while measurement.next is not None:
            found, chunks = self._pass(pair, measurement, span, reusable)
            reusable = None  # the measurement keeps the first one until the end
            result.chunks += chunks
            measurement.take(found)
        result.measured = measurement.measured()
        if isinstance(measurement, FloatMeasurement):
            result.compared, result.unchanged = measurement.numel, int(result.measured.columns["unchanged_bitwise"])
        self._partial.clear()
        return result

    def pass_over(self, pair: TensorPair, measurement: FloatMeasurement | BitMeasurement, span: Span) -> SpanResult:
        """Carry out the pass at hand over a part of a tensor pair."""
        first = measurement.scanning
        found, chunks = self._pass(pair, measurement, span, None)
        result = SpanResult(span, found, chunks, fresh=first)
        if first and isinstance(found, Partial) and isinstance(measurement, FloatMeasurement):
            result.compared, result.unchanged = found.numel, found.numel - int(found.counts[Count.CHANGED])
        return result

    def _pass(
        self,
        pair: TensorPair,
        measurement: FloatMeasurement | BitMeasurement,
        span: Span,
        partial: Partial | None,
    ) -> tuple[Partial | Refined, list[Chunk]]:
        todo = measurement.next
        assert todo is not None
        source = ShardSource(self._shards, pair, span, self._buffers, self._stop)
        if isinstance(todo, Targets):
            assert isinstance(measurement, FloatMeasurement)
            refined = Refined.empty(todo)
            self._backend.refine(measurement.scan, todo, source, refined)
            return refined, []
        partial = partial or Partial()
        if isinstance(todo, BitScan):
            mask = scan_bits(todo, source, partial)
        else:
            mask = self._backend.scan(todo, source, partial, measurement.first_tie(span.first))
        return partial, [] if mask is None else list(_compressed(mask, span.first, pair.base.numel))


def _compressed(mask: NDArray[np.uint8], first: int, numel: int) -> Iterator[Chunk]:
    """Compress the mask of a span, a chunk for each of its blocks."""
    size = mask_chunk_bytes(numel)
    for start in range(0, mask.size, MASK_CHUNK):
        yield Chunk(first + start // MASK_CHUNK, *compress_chunk(mask[start : start + MASK_CHUNK], size))
