"""Cut tensor pairs into tasks, and project the memory they take. Pure arithmetic; no file is opened here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TypeAlias

from ckptdiff.errors import PlanError
from ckptdiff.measure.partial import BINS, BLOCK
from ckptdiff.memory import default_bound


@dataclass(frozen=True, slots=True)
class Grain:
    """How large tasks are. No figure depends on it, nor a byte of a run file."""

    blocks: int = 16
    """Blocks of a large tensor in a task. What Python does for each task takes longer than to measure half a block."""
    tensors: int = 192
    """Small tensors in a task, at most."""
    numel: int = 6 * BLOCK
    """Coordinates of small tensors in a task, but for those of the last one."""
    many: int = 1000
    """Small tensors that are worth a kernel that measures many in one call: to compile it takes as long as it saves."""


GRAIN = Grain()
"""That of the processor."""
FETCHED = Grain(blocks=8)
"""The same where files lie elsewhere: what a task reads of them is in memory, once or twice a thread."""


_MEASUREMENT = 8 * BINS * 6 + (1 << 17)
"""Bytes of a Partial, if all of its bins are touched."""
_MEASUREMENTS = 2
"""How many of them a thread has at a time."""
_MASK_BLOCK = BLOCK // 8
"""Bytes of the mask of a block."""
_COMPRESSING = 4 * _MASK_BLOCK
"""Bytes that it takes to compress a chunk of mask, beside a stream as large as the whole mask of the span."""
_TILES = 8 << 20
"""Bytes of the buffers that kernels use for a tile, with what a thread's stack and allocator keep."""
_ROW = 3 << 10
"""Bytes of columns and facts of a tensor."""
_FIGURES, _RUN_FILE = 4 << 20, 16 << 20
"""Bytes that a result takes beside them, without and with a run file of masks."""
_FAR = 256 << 20
"""Bytes under way that keep a connection of 10 Gbit/s busy for a fifth of a second, in which any host answers."""
_HINT_STEP = 10 << 20
"""What the hint of a refusal is rounded to, and by how much at least it exceeds the least of now."""


@dataclass(frozen=True)
class Load:
    """What one tensor pair asks of the plan. Pairs that ask for the same may share one."""

    numel: int
    """Coordinates."""
    bits: tuple[int, ...]
    """Bits of a stored element on each side that is read: two entries, one if both sides are the same bytes, or none
    if they are known to be and are not read."""
    scratch: int = 0
    """Bytes of work space a thread needs to decode it."""
    kind: Hashable = None
    """Small tensors of the same kind can be measured in one call; None if only alone."""

    @property
    def unread(self) -> bool:
        """Whether nothing of it is read: both sides are known to be the same."""
        return not self.bits

    @cached_property
    def blocks(self) -> int:
        """Blocks of 2**20 coordinates; an empty tensor has none."""
        return -(-self.numel // BLOCK)

    @cached_property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(self.numel * bits // 8 for bits in self.bits)

    def span_bytes(self, span: Span) -> int:
        """Bytes of a span of blocks, all sides."""
        numel = min(span.stop * BLOCK, self.numel) - span.first * BLOCK
        return sum(numel * bits // 8 for bits in self.bits)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of its largest block, all sides."""
        return sum(min(self.numel, BLOCK) * bits // 8 for bits in self.bits)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive blocks of one tensor pair, ``first`` to ``stop`` - 1."""

    tensor: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class SpanTask:
    """What one thread does in one go: a part of a large tensor pair, or several whole small ones."""

    tensors: range
    """That tensor pair, or consecutive small ones, which the thread measures to the end."""
    span: Span | None = None
    """The part of the large one."""
    alike: bool = False
    """Whether small ones are measured in one call."""

    def numel(self, loads: Sequence[Load]) -> int:
        """Coordinates, given the loads of all pairs."""
        if self.span is None:
            return sum(load.numel for load in loads[self.tensors.start : self.tensors.stop])
        return min(self.span.stop * BLOCK, loads[self.tensors.start].numel) - self.span.first * BLOCK

    def nbytes(self, loads: Sequence[Load]) -> int:
        """Bytes to read, both sides."""
        part = loads[self.tensors.start : self.tensors.stop]
        return sum(load.nbytes for load in part) if self.span is None else part[0].span_bytes(self.span)


@dataclass(frozen=True, slots=True)
class Memory:
    """Projected peak resident size, in bytes."""

    baseline: int
    """The interpreter, libraries, headers and compiled kernels."""
    per_thread: int
    waiting: int
    """Results of one task, which the run holds from the task's begin until it has its turn."""
    tasks_waiting: int
    """Tasks under way and results in waiting, at most: at least one more than there are threads, or threads idle."""
    threads: int
    results: int
    """Columns and facts of all tensors."""
    ahead: int = 0
    """Bytes of remote files that are fetched before the task that reads them begins, at most."""

    @property
    def projected(self) -> int:
        """The sum."""
        tasks = self.threads * self.per_thread + self.tasks_waiting * self.waiting
        return self.baseline + tasks + self.results + self.ahead

    def of(self, threads: int) -> int:
        """The least with which so many threads work."""
        return replace(self, threads=threads, tasks_waiting=_waiting(threads)[-1], ahead=0).projected


Known: TypeAlias = Callable[[int], Sequence[tuple[int, int]]]
"""Of a tensor, from which block to which there are results already: pieces in order, none in another."""


def plan_tasks(loads: Sequence[Load], grain: Grain = GRAIN, known: Known = lambda index: ()) -> Iterator[SpanTask]:
    """Cut tensor pairs into tasks, in order.

    Every span but a tensor's last holds whole blocks, so that figures do not depend on the cut. Tensors of at most a
    block travel together, tens of thousands of them should not cost tens of thousands of tasks. What is `known` of a
    large tensor is a task as it is.
    """
    start = numel = 0
    kind: Hashable = None
    for index, load in enumerate(loads):
        large = load.numel > BLOCK
        if start < index and (large or load.kind != kind or numel >= grain.numel or index - start >= grain.tensors):
            yield SpanTask(range(start, index), alike=kind is not None)
            start, numel = index, 0
        if large:
            yield from cut(Span(index, 0, load.blocks), grain, known(index))
            start = index + 1
        else:
            numel += load.numel
            kind = load.kind
    if start < len(loads):
        yield SpanTask(range(start, len(loads)), alike=kind is not None)


def cut(span: Span, grain: Grain = GRAIN, known: Sequence[tuple[int, int]] = ()) -> Iterator[SpanTask]:
    """Tasks of a part of one large tensor pair."""
    begin = span.first
    for first, stop in [*known, (span.stop, span.stop)]:
        for start in range(begin, first, grain.blocks):
            yield _part(span.tensor, start, min(start + grain.blocks, first))
        if first < stop:
            yield _part(span.tensor, first, stop)
        begin = stop


def batched(tasks: Iterable[SpanTask], loads: Sequence[Load], most: int) -> Iterator[list[SpanTask]]:
    """Consecutive tasks together, of `most` bytes if there are so many; neighbours of one tensor become one task."""
    batch: list[SpanTask] = []
    size = 0
    for task in tasks:
        span, last = task.span, batch[-1].span if batch else None
        size += task.nbytes(loads)
        if span is not None and last is not None and (last.tensor, last.stop) == (span.tensor, span.first):
            batch[-1] = _part(span.tensor, last.first, span.stop)
        else:
            batch.append(task)
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _part(tensor: int, first: int, stop: int) -> SpanTask:
    return SpanTask(range(tensor, tensor + 1), Span(tensor, first, stop))


def fit_memory(
    loads: Sequence[Load],
    threads: int,
    max_memory: int,
    default: int,
    growth: int,
    baseline: int,
    masks: bool,
    grain: Grain = GRAIN,
    fetched: int = 0,
) -> Memory:
    """Choose as many threads as memory allows, up to ``threads``, then as many results in waiting.

    A task fetches ``fetched`` bytes of remote files at most; those of further tasks are fetched ahead as memory allows.

    ``max_memory`` bounds the peak resident size, in bytes, and ``baseline`` is that before the first read. With 0 the
    bound is ``default``, which grows to what all threads need, by no more than ``growth`` above the baseline, and in
    any case to what one needs. PlanError if not even one thread fits.
    """
    block = max((load.block_bytes for load in loads), default=0)
    scratch = max((load.scratch for load in loads), default=0)
    mask = grain.blocks * _MASK_BLOCK
    per_thread = block + scratch + _MEASUREMENTS * _MEASUREMENT + 2 * mask + _COMPRESSING + _TILES + fetched
    waiting = _MEASUREMENT + (mask if masks else 0)
    results = len(loads) * _ROW + (_RUN_FILE if masks else _FIGURES)
    threads = max(threads, 1)
    grown = Memory(baseline, per_thread, waiting, _waiting(threads)[0], threads, results, _ahead(threads, fetched)[0])
    bound = max_memory or default_bound(default, grown.projected, baseline + growth)
    for count in range(threads, 0, -1):
        for tasks_waiting, ahead in product(_waiting(count), _ahead(count, fetched)):
            memory = Memory(baseline, per_thread, waiting, tasks_waiting, count, results, ahead)
            if memory.projected <= bound:
                return memory
    if not max_memory:
        return memory
    raise PlanError(
        "this run does not fit into --max-memory",
        expected=f"at least {_mib(memory.projected)} MiB",
        found=f"{_mib(max_memory)} MiB",
        # With room to spare: the next process is a few MiB larger or smaller before its first read.
        hint=f"--max-memory {(-(-memory.projected // _HINT_STEP) + 1) * _HINT_STEP >> 20}M",
    )


def _waiting(threads: int) -> tuple[int, ...]:
    """How many tasks may be under way or in waiting, from as many as are of use to as few as keep every thread at work.

    At most two a thread, and what threads do while the facts of tens of thousands of tensors are gathered.
    """
    return 2 * threads + 8, 2 * threads + 2, threads + 1


def _ahead(threads: int, fetched: int) -> tuple[int, ...]:
    """Bytes to fetch ahead: enough for a host far away, a task a thread, or none."""
    return (max(2 * threads * fetched, _FAR), threads * fetched, 0) if fetched else (0,)


def _mib(size: int) -> int:
    return -(-size // (1 << 20))
