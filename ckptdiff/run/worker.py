"""Do the tasks of one thread: pass both sides through the backend, and compress masks."""

from __future__ import annotations

import math
import threading
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import TensorPair
from ckptdiff.checkpoint.kept import Kept
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.region import Spread
from ckptdiff.checkpoint.weights import CommonPart
from ckptdiff.measure.backend import Batching
from ckptdiff.measure.bitwise import scan_bits
from ckptdiff.measure.partial import BLOCK, BitScan, Count, Partial, Refined, Scan, Targets
from ckptdiff.measure.passes import FloatMeasurement, Measurement
from ckptdiff.measure.records import Records, empty_records, put_row
from ckptdiff.run.planning import Plan
from ckptdiff.run.shard_source import ShardSource, SideRooms, small_pairs
from ckptdiff.run.tasks import Span
from ckptdiff.runfile.compress import compress_chunk, compress_parts
from ckptdiff.runfile.schema import BIT_ORDER, MASK_CHUNK, mask_chunk_bytes

__all__ = ["CommonBits", "MaskChunks", "PartialMask", "Result", "Worker", "blank", "joined"]


@dataclass(frozen=True, slots=True)
class MaskChunks:
    """Consecutive chunks of the mask of a tensor, as the run file stores them: payload and filter mask of each."""

    tensor: int
    first: int
    chunks: list[tuple[bytes, int]]


@dataclass(frozen=True, slots=True)
class CommonBits:
    """The mask of a span of a tensor of which both sides have a part, of that part alone, bit-packed."""

    tensor: int
    packed: NDArray[np.uint8]
    numel: int


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
    masks : list of MaskChunks or CommonBits
        Chunks, or what :class:`PartialMask` makes them of, in order.
    compared, unchanged : int
        Floating coordinates that were seen for the first time, and those of them that did not change.
    records : Records or None
        Rows of all ``tensors``; set on the result that completes them.
    kept : dict of int to Kept
        Of quantised tensors, what both sides of this part have in common besides values.
    odd : set
        Scales that are no positive numbers; see :class:`~ckptdiff.checkpoint.decoding.Decoder`.
    """

    tensors: range
    span: Span | None = None
    found: Partial | Refined | None = None
    masks: list[MaskChunks | CommonBits] = field(default_factory=list)
    compared: int = 0
    unchanged: int = 0
    records: Records | None = None
    kept: dict[int, Kept] = field(default_factory=dict)
    odd: set[tuple[str, str, str, str]] = field(default_factory=set)


class Worker:
    """The state of one thread.

    Parameters
    ----------
    plan : Plan
    shards : OpenShards
    stop : threading.Event
        Set when the run is given up; the thread then leaves at the next block.
    spare : deque of Partial
        Partials that nobody reads any more, shared by all threads: to clear the bins of one that were in use is
        cheaper than to get zeros for all.
    """

    def __init__(self, plan: Plan, shards: OpenShards, stop: threading.Event, spare: deque[Partial]) -> None:
        self._plan, self._shards, self._stop = plan, shards, stop
        self._backend = plan.device.worker()
        self._spare = spare
        self._rooms = SideRooms()
        self._kept: dict[int, Kept] = {}

    def measure(self, tensors: range, alike: bool) -> Result:
        """Measure whole tensor pairs: in one call those of the same formats, then one by one what is not complete."""
        plan, records = self._plan, empty_records(len(tensors))
        masks: list[MaskChunks | CommonBits] = [*self._scan_alike(tensors, records)] if alike else []
        for row in np.flatnonzero(~records.complete).tolist():
            index = tensors[row]
            # What was scanned alike has its mask already.
            measurement = plan.measurement(index, plan.want_masks and not alike)
            while measurement.next is not None:
                found, made = self._pass(measurement, Span(index, 0, plan.loads[index].blocks))
                masks += made
                self._spare.extend(measurement.take(found))
            put_row(records, row, measurement.row)
        counted = plan.coordinates(tensors)
        compared = int(counted.numel[counted.valued].sum())
        changed = int(records.counts[counted.valued, Count.CHANGED].sum())
        return self._with_kept(Result(tensors, None, None, masks, compared, compared - changed, records))

    def pass_over(self, measurement: Measurement, span: Span) -> Result:
        """Carry out the pass at hand over a part of a tensor pair."""
        found, masks = self._pass(measurement, span)
        result = Result(range(span.tensor, span.tensor + 1), span, found, masks)
        if measurement.next is measurement.first and self._plan.coordinates(result.tensors).valued[0]:
            assert isinstance(found, Partial)
            result.compared, result.unchanged = found.numel, found.numel - int(found.counts[Count.CHANGED])
        return self._with_kept(result)

    def _with_kept(self, result: Result) -> Result:
        """Hand over what was found of quantised tensors."""
        result.kept, self._kept, result.odd = self._kept, {}, self._rooms.take_odd()
        return result

    def _scan_alike(self, tensors: range, records: Records) -> list[MaskChunks]:
        """Fill the rows of small tensor pairs of the same formats, as far as one scan tells."""
        plan, pairs = self._plan, self._plan.pairs[tensors.start : tensors.stop]
        model, backend = plan.measurement(tensors.start, plan.want_masks), self._backend
        assert isinstance(model.next, Scan) and isinstance(backend, Batching)
        with ExitStack() as stack:
            small = small_pairs(stack, self._shards, pairs)
            done, masks, starts = backend.scan_small(model.next, small, records)
        if done < len(pairs):
            span = Span(tensors[done], 0, 1)
            ShardSource(self._shards, pairs[done], span, self._rooms, self._stop).fail(0, pairs[done].base.numel)
        payloads = compress_parts(masks, starts, -(-small.numel // 8)) if model.next.want_mask else []
        return [MaskChunks(index, 0, [payload]) for index, payload in zip(tensors, payloads, strict=False)]

    def _pass(self, measurement: Measurement, span: Span) -> tuple[Partial | Refined, list[MaskChunks | CommonBits]]:
        todo, pair = measurement.next, self._plan.pairs[span.tensor]
        assert todo is not None
        if self._plan.loads[span.tensor].unread:
            assert isinstance(todo, BitScan)
            return self._unread(todo, span)
        # What both sides have in common is counted by the pass that sees all of it first.
        count_as = todo.compare.name if isinstance(todo, Scan) and todo is measurement.first else None
        decodes = self._plan.device.decodes
        source = ShardSource(self._shards, pair, span, self._rooms, self._stop, count_as, decodes)
        if isinstance(todo, Targets):
            assert isinstance(measurement, FloatMeasurement)
            refined = Refined.empty(todo)
            self._backend.refine(measurement.scan, todo, source, refined)
            return refined, []
        partial = blank(self._spare)
        if isinstance(todo, BitScan):
            mask = scan_bits(todo, source, partial)
        else:
            mask = self._backend.scan(todo, source, partial, measurement.first_tie(span.first))
        if source.kept is not None:
            self._kept[span.tensor] = source.kept
        if mask is None:
            return partial, []
        if isinstance(pair.base, CommonPart):
            return partial, [CommonBits(span.tensor, mask.copy(), source.numel)]
        masks = _compressed(mask, span, pair)
        return partial, [masks] if masks.chunks else []

    def _unread(self, scan: BitScan, span: Span) -> tuple[Partial, list[MaskChunks | CommonBits]]:
        """What a look at both sides of a pair would find that are known to be the same."""
        partial, pair = blank(self._spare), self._plan.pairs[span.tensor]
        partial.numel = min(span.stop * BLOCK, pair.base.numel) - span.first * BLOCK
        masks = _compressed(np.zeros(-(-partial.numel // 8), np.uint8), span, pair) if scan.want_mask else None
        return partial, [masks] if masks is not None and masks.chunks else []


def blank(spare: deque[Partial]) -> Partial:
    """Nothing seen yet."""
    try:
        partial = spare.pop()
    except IndexError:
        return Partial()
    partial.clear()
    return partial


def joined(first: Result, second: Result, spare: deque[Partial]) -> Result:
    """What two consecutive spans of a tensor gave in one pass, as what one span gives; takes both apart."""
    assert first.span is not None and second.span is not None and first.found is not None
    assert (first.span.tensor, first.span.stop) == (second.span.tensor, second.span.first)
    first.span = replace(first.span, stop=second.span.stop)
    if isinstance(first.found, Partial) and isinstance(second.found, Partial):
        first.found.add(second.found)
        spare.append(second.found)
    elif isinstance(first.found, Refined) and isinstance(second.found, Refined):
        first.found.add(second.found)
    first.masks += second.masks
    first.compared += second.compared
    first.unchanged += second.unchanged
    for tensor, kept in second.kept.items():
        first.kept[tensor] = first.kept[tensor] + kept if tensor in first.kept else kept
    first.odd |= second.odd
    return first


class PartialMask:
    """Makes the mask chunks of a whole tensor of those of the part of it that both sides have, as they come in order.

    Parameters
    ----------
    tensor : int
        In plan order.
    part : CommonPart
        The base's side.
    """

    def __init__(self, tensor: int, part: CommonPart) -> None:
        self._tensor, self._spread = tensor, Spread(part.region, BLOCK)
        self._size = mask_chunk_bytes(part.whole.numel)
        self._next = 0

    def take(self, bits: CommonBits) -> MaskChunks:
        """The chunks that are complete with these."""
        chunks = []
        for start in range(0, bits.numel, BLOCK):
            packed, count = bits.packed[start // 8 :], min(BLOCK, bits.numel - start)
            common = np.unpackbits(packed, count=count, bitorder=BIT_ORDER).view(np.bool_)
            for block in self._spread.take(common):
                chunks.append(compress_chunk(np.packbits(block, bitorder=BIT_ORDER), self._size))
        first, self._next = self._next, self._next + len(chunks)
        return MaskChunks(self._tensor, first, chunks)


def _compressed(mask: NDArray[np.uint8], span: Span, pair: TensorPair) -> MaskChunks:
    """Compress the mask of a span, a chunk for each of its blocks; behind the last there may be rows of one side."""
    numel = math.prod(pair.shape)
    size, whole = mask_chunk_bytes(numel), mask.size // MASK_CHUNK
    starts = MASK_CHUNK * np.arange(whole)
    chunks = compress_parts(mask, starts, np.full(whole, MASK_CHUNK)) if whole else []
    if mask.size % MASK_CHUNK:
        chunks.append(compress_chunk(mask[whole * MASK_CHUNK :], size))
    if span.stop * BLOCK >= pair.base.numel:
        chunks += [compress_chunk(np.zeros(1, np.uint8), size) for _ in range(span.stop, -(-numel // BLOCK))]
    return MaskChunks(span.tensor, span.first, chunks)
