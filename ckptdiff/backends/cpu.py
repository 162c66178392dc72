"""The CPU backend: Numba kernels that run without the GIL, one :class:`CpuWorker` per thread."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.backends.formats import Format, common_format, is_wide, recode_table
from ckptdiff.backends.kernels.codes import scan_codes
from ckptdiff.backends.kernels.decode import count_equal, count_inexact, count_strange_codes, round_to_bf16
from ckptdiff.backends.kernels.refine import Found, Search, refine
from ckptdiff.backends.kernels.tiles import Measure, Tile, Totals, new_measure, new_tile, round_down, totals_of
from ckptdiff.backends.kernels.wide import scan_wide
from ckptdiff.backends.partial import BLOCK, PIECE, Count, Partial, Pieces, Refined, Scan, Targets

__all__ = ["CpuWorker"]

Codes = NDArray[np.unsignedinteger]


class CpuWorker:
    """Measures blocks in one thread; holds that thread's work space."""

    def __init__(self) -> None:
        self._tiles: dict[int, Tile] = {}
        self._words = np.zeros(BLOCK // 64, np.uint64)
        self._scratch: dict[str, Codes] = {}

    def scan(self, scan: Scan, pieces: Pieces, partial: Partial, first_tie: int = 0) -> NDArray[np.uint8] | None:
        """Measure one block.

        Parameters
        ----------
        scan : Scan
        pieces : iterable of (base, tuned)
            Raw bytes of at most ``BLOCK`` coordinates.
        partial : Partial
            Added to.
        first_tie : int
            For ``Rule.TOP``: how many coordinates of earlier blocks lie at the cut.

        Returns
        -------
        uint8 array, shape (ceil(n / 8),), or None
            Mask bits if ``scan.want_mask``; valid until the next call.
        """
        partial.open_block(len(scan.thresholds))
        compare = scan.compare
        real = np.dtype(np.float64 if compare.bits == 64 else np.float32)
        native = scan.base == scan.tuned == compare
        measure = new_measure(scan, real, first_tie, native)
        totals = totals_of(partial, -1)
        before = _native_counts(partial, compare)
        n = 0
        for base, tuned in pieces:
            stored = (base.view(scan.base.code_dtype), tuned.view(scan.tuned.code_dtype))
            if not native:
                self._count_stored(scan, stored, partial)
            codes = self._recode(compare, (scan.base, scan.tuned), stored)
            if is_wide(scan.base, compare):
                partial.counts[Count.OFF_GRID] += _count_off_grid(scan, stored[0], codes[0])
            stop = n + codes[0].size
            words = self._words[n // 64 : -(-stop // 64) if scan.want_mask else n // 64]
            self._scan_codes(compare, codes, measure, totals, words)
            n = stop
        partial.numel += n
        if native:
            changed, strange = _native_counts(partial, compare) - before
            partial.counts[Count.STORED_EQUAL] += n - changed
            partial.counts[[Count.NONFINITE_BASE, Count.NONFINITE_TUNED]] += strange
        return self._words.view(np.uint8)[: -(-n // 8)] if scan.want_mask else None

    def refine(self, scan: Scan, targets: Targets, pieces: Pieces, refined: Refined) -> None:
        """Look for open cuts in one block; parameters as in :meth:`scan`, ``refined`` is added to."""
        compare = scan.compare
        real = np.dtype(np.float64 if compare.bits == 64 else np.float32)
        refined.open_block()
        search = Search(
            np.uint64(targets.shift),
            np.array(targets.deltas, np.uint64),
            np.array(targets.weights, np.uint64),
            np.array([round_down(threshold, real) for threshold in targets.thresholds], real),
            np.array([round_down(tail, real) for tail in targets.tails], real),
        )
        found = Found(refined.deltas, refined.weights, refined.within, refined.tails[-1])
        of_delta = np.uint64(0x7FFF_FFFF_FFFF_FFFF) if compare.bits == 64 else np.uint32(0x7FFF_FFFF)
        lookup = compare.bits <= 16
        for base, tuned in pieces:
            stored = (base.view(scan.base.code_dtype), tuned.view(scan.tuned.code_dtype))
            codes = self._recode(compare, (scan.base, scan.tuned), stored)
            values = (compare.values(), compare.values()) if lookup else (codes[0].view(real), codes[1].view(real))
            limits = (codes[0].dtype.type(compare.magnitude), of_delta)
            refine(codes, values, limits, lookup, self._tile(codes[0].dtype, real), search, found)

    def _scan_codes(
        self, compare: Format, codes: tuple[Codes, Codes], measure: Measure, totals: Totals, words: Codes
    ) -> None:
        if compare.bits <= 16:
            tile = self._tile(np.dtype(np.uint16), np.dtype(np.float32))
            limits = (np.uint16(compare.magnitude), np.uint16(compare.infinite))
            table = compare.values()[: 0 if compare.name == "bf16" else None]
            scan_codes(*codes, table, limits, tile, measure, totals, words)
            return
        real = np.dtype(f"f{compare.bits // 8}")
        unsigned = compare.code_dtype.type
        wide_limits = (unsigned(compare.magnitude), unsigned(compare.infinite), unsigned(compare.bits - 16))
        values = (codes[0].view(real), codes[1].view(real))
        scan_wide(codes, values, wide_limits, self._tile(compare.code_dtype, real), measure, totals, words)

    def _count_stored(self, scan: Scan, sides: tuple[Codes, Codes], partial: Partial) -> None:
        """Counts that are taken before the cast."""
        for count, format, codes in zip(
            (Count.NONFINITE_BASE, Count.NONFINITE_TUNED), (scan.base, scan.tuned), sides, strict=True
        ):
            unsigned = codes.dtype.type
            partial.counts[count] += count_strange_codes(codes, unsigned(format.magnitude), unsigned(format.infinite))
        common = common_format(scan.base, scan.tuned)
        if scan.base != scan.tuned:
            sides = self._recode(common, (scan.base, scan.tuned), sides)
        partial.counts[Count.STORED_EQUAL] += count_equal(*sides, sides[0].dtype.type(common.magnitude))

    def _recode(self, target: Format, stored: tuple[Format, Format], sides: tuple[Codes, Codes]) -> tuple[Codes, Codes]:
        """Codes of both sides in the target format, read-only; what is stored so already is not copied."""
        return tuple(  # type: ignore[return-value]
            self._recode_side(name, target, format, codes)
            for name, format, codes in zip(("base", "tuned"), stored, sides, strict=True)
        )

    def _recode_side(self, name: str, target: Format, stored: Format, codes: Codes) -> Codes:
        if stored == target and target.bits >= 16:
            return codes
        out = self._buffer(name, np.dtype(np.uint16) if target.bits <= 16 else target.code_dtype)[: codes.size]
        if stored.bits <= 16:
            np.take(recode_table(stored, target), codes, out=out, mode="clip")
        elif target.bits == 64:
            with np.errstate(invalid="ignore"):  # a signalling NaN
                np.copyto(out.view(np.float64), codes.view(np.float32))
        else:
            if stored.bits == 64:
                narrow = self._buffer(f"{name} narrowed", np.dtype(np.float32))[: codes.size]
                with np.errstate(over="ignore", invalid="ignore"):
                    np.copyto(narrow, codes.view(np.float64), casting="same_kind")
                codes = _read_only(narrow.view(np.uint32))
            round_to_bf16(codes, out)
        return _read_only(out)

    def _tile(self, code: np.dtype[Any], real: np.dtype[Any]) -> Tile:
        if code.itemsize not in self._tiles:
            self._tiles[code.itemsize] = new_tile(code, real)
        return self._tiles[code.itemsize]

    def _buffer(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        key = f"{name} {dtype}"
        if key not in self._scratch:
            self._scratch[key] = np.empty(PIECE, dtype)
        return self._scratch[key]


def _native_counts(partial: Partial, compare: Format) -> NDArray[np.int64]:
    """Changed coordinates so far, and base codes that are NaN or Inf, where both sides are stored as compared."""
    if compare.bits > 16:
        return np.array([partial.counts[Count.CHANGED], 0])
    return np.array([partial.counts[Count.CHANGED], partial.weights[0, compare.infinite :].sum()])


def _read_only(array: Codes) -> Codes:
    """A view that Numba types like a read-only memory map: one compiled kernel serves both."""
    view = array.view()
    view.flags.writeable = False
    return view


def _count_off_grid(scan: Scan, stored: Codes, codes: Codes) -> int:
    """How many stored values the cast to bfloat16 changed, NaN left out."""
    if scan.base.bits == 32:
        return int(count_inexact(stored))
    values = stored.view(np.float64) if scan.base.bits == 64 else scan.base.values()[stored]
    cast = scan.compare.values()[codes]
    return int(np.count_nonzero((values != cast) & ~np.isnan(values)))
