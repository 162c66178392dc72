"""Measure on the processor: Numba kernels that run without the GIL, one :class:`CpuBackend` per thread."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ckptdiff.codes.fetch import FETCH, FILE, MEMORY, Side
from ckptdiff.codes.lanes import aligned
from ckptdiff.formats import Format, common_format, recode_table
from ckptdiff.measure.kernels.batch import scan_small
from ckptdiff.measure.kernels.refine import Found, Search, refine_span
from ckptdiff.measure.kernels.span import Workspace, new_work, read_only, scan_span
from ckptdiff.measure.kernels.stored import Cast, Stored
from ckptdiff.measure.kernels.tiles import facts_of, new_measure, round_down, totals_of
from ckptdiff.measure.partial import BLOCK, Count, Partial, Refined, Scan, Targets
from ckptdiff.measure.ranks import ranks_of, tables_of
from ckptdiff.measure.records import Records
from ckptdiff.measure.source import Runs, SmallPairs, Source, Window

_ITEM = 8
"""Bytes of the widest element."""


class CpuBackend:
    """Measures spans in one thread; holds that thread's work space."""

    decodes = False

    def __init__(self) -> None:
        self._work: dict[int, Workspace] = {}
        self._words = np.zeros(0, np.uint64)
        self._small = Partial()
        self._rooms = [read_only(aligned((FETCH * _ITEM,), np.uint8)) for _ in range(2)]

    def scan(self, scan: Scan, source: Source, partial: Partial, first_tie: int = 0) -> NDArray[np.uint8] | None:
        """Measure a span of blocks, of each of which ``partial`` gets a row of sums.

        For ``Rule.TOP``, ``first_tie`` coordinates of earlier blocks lie at the cut. Returns the mask bits if
        ``scan.want_mask``, shape (ceil(n / 8),), valid until the next call.
        """
        compare = scan.compare
        blocks = -(-source.numel // BLOCK)
        partial.open_blocks(blocks, len(scan.thresholds))
        measure = new_measure(scan, first_tie)
        totals = totals_of(partial, blocks)
        stored, facts, work = _stored(scan.base, scan.tuned, compare), facts_of(compare), self._work_for(compare)
        words = self._room_for_mask(source.numel if scan.want_mask else 0)
        changed, strange = _native_counts(partial, compare)
        for window in source.windows():
            sides = self._sides(window, scan)
            first = window.first
            while first < window.stop:
                came = scan_span(sides, stored, (first, window.stop), facts, work, measure, totals, words)
                first = _advanced(source, window, first, came)
        partial.numel += source.numel
        if measure.native:
            changed_now, strange_now = _native_counts(partial, compare)
            partial.counts[Count.STORED_EQUAL] += source.numel - (changed_now - changed)
            partial.counts[Count.NONFINITE_BASE] += strange_now - strange
            partial.counts[Count.NONFINITE_TUNED] += strange_now - strange
        return words.view(np.uint8)[: -(-source.numel // 8)] if scan.want_mask else None

    def refine(self, scan: Scan, targets: Targets, source: Source, refined: Refined) -> None:
        """Look for open cuts in a span; parameters as in :meth:`scan`, ``refined`` is added to."""
        compare, real = scan.compare, scan.compare.real
        blocks = -(-source.numel // BLOCK)
        refined.open_blocks(blocks)
        search = Search(
            np.uint64(targets.shift),
            np.array(targets.deltas, np.uint64),
            np.array(targets.weights, np.uint64),
            np.array([round_down(threshold, real) for threshold in targets.thresholds], real),
            np.array([round_down(tail, real) for tail in targets.tails], real),
        )
        found = Found(refined.deltas, refined.weights, refined.within, refined.tails[len(refined.tails) - blocks :])
        stored, facts, work = _stored(scan.base, scan.tuned, compare), facts_of(compare), self._work_for(compare)
        for window in source.windows():
            sides = self._sides(window, scan)
            first = window.first
            while first < window.stop:
                came = refine_span(sides, stored, (first, window.stop), facts, work, search, found)
                first = _advanced(source, window, first, came)

    def scan_small(
        self, scan: Scan, pairs: SmallPairs, records: Records
    ) -> tuple[int, NDArray[np.uint8], NDArray[np.int64]]:
        """Measure whole tensors of at most a block, of which ``records`` receives the figures, of shape (k, ...).

        The compare format has 16 bits at most, and the mask rule needs no figure of the whole tensor. Returns how many
        tensors were measured, less than all if one could not be read; the mask bits of all if ``scan.want_mask``, valid
        until the next call; and where those of each tensor start, shape (k,).
        """
        compare, numel = scan.compare, pairs.numel
        words = -(-numel // 64)
        stops = np.cumsum(words)
        masks = self._room_for_mask(64 * int(stops[-1]) if scan.want_mask else 0)
        self._small.open_blocks(1 - len(self._small.sums), len(scan.thresholds))
        done = scan_small(
            (self._side(pairs.base, 0, scan.base), self._side(pairs.tuned, 1, scan.tuned)),
            _stored(scan.base, scan.tuned, compare),
            np.column_stack([numel, stops - words]),
            ranks_of(numel),
            tables_of(compare),
            new_measure(scan),
            (self._work_for(compare), totals_of(self._small, 1)),
            (records, masks),
        )
        return done, masks.view(np.uint8), 8 * (stops - words)

    def _sides(self, window: Window, scan: Scan) -> tuple[Side, Side]:
        base = self._side(window.base, 0, scan.base)
        if window.tuned is not window.base:
            return base, self._side(window.tuned, 1, scan.tuned)
        # The same bytes: what lies in memory costs nothing, what is read need not be read twice.
        return base, base if window.base[0, FILE] == MEMORY else base._replace(runs=window.base[:0])

    def _side(self, runs: Runs, side: int, stored: Format) -> Side:
        return Side(runs, self._rooms[side], stored.bits // 8)

    def _work_for(self, compare: Format) -> Workspace:
        code = max(compare.code_dtype, np.dtype(np.uint16))
        if code.itemsize not in self._work:
            self._work[code.itemsize] = new_work(code, compare.real)
        return self._work[code.itemsize]

    def _room_for_mask(self, numel: int) -> NDArray[np.uint64]:
        words = -(-numel // 64)
        if self._words.size < words:
            self._words = np.zeros(words, np.uint64)
        return self._words[:words]


def _advanced(source: Source, window: Window, first: int, came: int) -> int:
    """Where a kernel goes on that stopped at ``came``; an error if it could not read on from ``first``."""
    if came == first:
        source.fail(first, min(first + FETCH, window.stop))
    return came


@cache
def _stored(base: Format, tuned: Format, compare: Format) -> tuple[Stored, Stored] | None:
    if base == tuned == compare and compare.bits > 8:
        return None
    common = common_format(base, tuned)
    code = max(compare.code_dtype, np.dtype(np.uint16))

    def facts(stored: Format) -> Stored:
        cast, table = cast_of(stored, compare)
        common_cast, common_table = cast_of(stored, common)
        return Stored(
            stored.bits // 8,
            int(cast),
            read_only(table.astype(code)),
            np.uint64(stored.magnitude),
            np.uint64(stored.infinite),
            int(common_cast),
            read_only(common_table.astype(np.uint64)),
            np.uint64(common.magnitude),
        )

    return facts(base), facts(tuned)


def cast_of(stored: Format, target: Format) -> tuple[Cast, NDArray[np.unsignedinteger]]:
    """How elements of a stored format become codes of another, and the table for ``Cast.TABLE``."""
    none = np.zeros(0, np.uint16)
    if stored == target and target.bits >= 16:
        return Cast.NONE, none
    if stored.bits > 16:
        return Cast.REAL, none
    if (stored.name, target.name) == ("bf16", "f32"):
        return Cast.SHIFT, none
    return Cast.TABLE, recode_table(stored, target)


def _native_counts(partial: Partial, compare: Format) -> tuple[int, int]:
    """Changed coordinates so far, and base codes that are NaN or Inf, where both sides are stored as compared."""
    strange = 0 if compare.bits > 16 else int(partial.weights[0, compare.infinite :].sum())
    return int(partial.counts[Count.CHANGED]), strange
