"""What one thread does with a task: read windows of both sides, pass them through the backend, compress masks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckptdiff.backends.bitwise import scan_bits
from ckptdiff.backends.partial import BLOCK, PIECE, BitScan, Count, Partial, Pieces, Refined, Scan, Targets
from ckptdiff.checkpoint import DTYPES, TensorInfo, TensorPair
from ckptdiff.metrics.measurement import BitMeasurement, FloatMeasurement, Measured, Pass
from ckptdiff.runfile.compress import compress_chunk
from ckptdiff.runfile.schema import mask_chunk_bytes
from ckptdiff.stream.plan import Span
from ckptdiff.stream.reader import OpenShards

__all__ = ["Backend", "Chunk", "SpanResult", "Worker"]


class Backend(Protocol):
    """What measures blocks; one object per thread. See :class:`~ckptdiff.backends.cpu.CpuWorker`."""

    def scan(self, scan: Scan, pieces: Pieces, partial: Partial, first_tie: int = 0) -> NDArray[np.uint8] | None:
        """Measure one block; returns its mask bits."""

    def refine(self, scan: Scan, targets: Targets, pieces: Pieces, refined: Refined) -> None:
        """Look for open cuts in one block."""


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
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
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
        found: Partial | Refined
        found = Refined.empty(todo) if isinstance(todo, Targets) else partial or Partial()
        chunks: list[Chunk] = []
        for block in range(span.first, span.stop):
            mask = self._block(pair, measurement, todo, block, found)
            if mask is not None:
                chunks.append(Chunk(block, *compress_chunk(mask, mask_chunk_bytes(pair.base.numel))))
        return found, chunks

    def _block(
        self,
        pair: TensorPair,
        measurement: FloatMeasurement | BitMeasurement,
        todo: Pass,
        block: int,
        found: Partial | Refined,
    ) -> NDArray[np.uint8] | None:
        pieces = self._pieces(pair, block)
        if isinstance(todo, BitScan):
            assert isinstance(found, Partial)
            return scan_bits(todo, pieces, found)
        assert isinstance(measurement, FloatMeasurement)
        if isinstance(todo, Targets):
            assert isinstance(found, Refined)
            self._backend.refine(measurement.scan, todo, pieces, found)
            return None
        assert isinstance(found, Partial)
        return self._backend.scan(todo, pieces, found, measurement.first_tie(block))

    def _pieces(self, pair: TensorPair, block: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Bytes of both sides of a block, a piece at a time; what is the same file and range is read once."""
        for first in range(block * BLOCK, min((block + 1) * BLOCK, pair.base.numel), PIECE):
            if self._stop.is_set():
                raise InterruptedError("the run was given up")
            with self._window(0, pair.base, first) as base:
                if pair.same_bytes:
                    yield base, base
                else:
                    with self._window(1, pair.tuned, first) as tuned:
                        yield base, tuned

    def _window(self, side: int, tensor: TensorInfo, first: int) -> AbstractContextManager[NDArray[np.uint8]]:
        bits = DTYPES[tensor.dtype].bits
        start = tensor.start + first * bits // 8
        stop = min(start + PIECE * bits // 8, tensor.stop)
        if self._buffers[side].size < stop - start:
            self._buffers[side] = np.empty(stop - start, np.uint8)
        return self._shards[tensor.shard].window(tensor, start, stop, self._buffers[side])
