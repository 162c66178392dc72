"""Measure with NumPy, written for clarity, one array operation a line: the oracle of the other backends."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import FORMATS, Format, common_format, is_wide, round_to_bf16
from ckptdiff.measure.partial import BINS, Count, Partial, Refined, Rule, Scan, Sum, Targets
from ckptdiff.measure.source import Source, blocks_of_span


class ReferenceBackend:
    """Measures blocks with NumPy; the methods are those of :class:`~ckptdiff.measure.cpu.CpuBackend`."""

    decodes = False

    def scan(self, scan: Scan, source: Source, partial: Partial, first_tie: int = 0) -> NDArray[np.uint8] | None:
        """Measure a span of blocks; see :meth:`ckptdiff.measure.cpu.CpuBackend.scan`."""
        partial.open_blocks(0, len(scan.thresholds))
        masks = [np.zeros(0, np.uint8)]
        for base, tuned in blocks_of_span(source, (scan.base.bits, scan.tuned.bits)):
            partial.open_blocks(1, len(scan.thresholds))
            mask = self._scan_block(scan, _Pair(scan, base, tuned), (base, tuned), partial, first_tie)
            first_tie += int(partial.sums[-1, Sum.TIES])
            masks.append(np.packbits(mask, bitorder="little"))
        return np.concatenate(masks) if scan.want_mask else None

    def _scan_block(self, scan: Scan, pair: _Pair, stored: Any, partial: Partial, first_tie: int) -> NDArray[np.bool_]:
        partial.numel += pair.changed.size
        base, tuned = stored
        self._count(scan, pair, base, tuned, partial)
        self._sum(pair, partial.sums[-1])
        self._sum_stored(scan, pair, stored, partial.sums[-1])
        if pair.finite_changed.any():
            partial.max_abs[0] = max(partial.max_abs[0], np.abs(pair.delta[pair.finite_changed]).max())
        self._histograms(pair, partial)
        mask = self._mask(scan, pair, first_tie, partial)
        partial.counts[Count.MASKED] += np.count_nonzero(mask)
        return mask

    def refine(self, scan: Scan, targets: Targets, source: Source, refined: Refined) -> None:
        """Look for open cuts; see :meth:`ckptdiff.measure.cpu.CpuBackend.refine`."""
        for base, tuned in blocks_of_span(source, (scan.base.bits, scan.tuned.bits)):
            refined.open_blocks(1)
            self._refine_block(_Pair(scan, base, tuned), targets, refined)

    @staticmethod
    def _refine_block(pair: _Pair, targets: Targets, refined: Refined) -> None:
        magnitudes = np.abs(pair.delta[pair.finite_changed])
        bits = _bits(magnitudes).astype(np.uint64)
        for row, prefix in enumerate(targets.deltas):
            inside = bits[bits >> targets.shift == prefix]
            refined.deltas[row] += _count_next_bits(inside, targets.shift)
        for row, prefix in enumerate(targets.weights):
            for kind, chosen in enumerate((np.ones(pair.changed.size, bool), pair.changed)):
                sizes = pair.base_size[chosen].astype(np.uint64)
                inside = sizes[sizes >> targets.shift == prefix]
                refined.weights[row, kind] += _count_next_bits(inside, targets.shift)
        wide = magnitudes.astype(np.float64)
        refined.within += _count_within(wide, targets.thresholds)
        for column, tail in enumerate(targets.tails):
            refined.tails[-1, column] += np.sum(wide[wide > tail] ** 2)

    @staticmethod
    def _count(scan: Scan, pair: _Pair, base: Any, tuned: Any, partial: Partial) -> None:
        common = common_format(scan.base, scan.tuned)
        stored = [_decode(format, _raw(format, side)) for format, side in ((scan.base, base), (scan.tuned, tuned))]
        partial.counts[Count.NONFINITE_BASE] += np.count_nonzero(~np.isfinite(stored[0]))
        partial.counts[Count.NONFINITE_TUNED] += np.count_nonzero(~np.isfinite(stored[1]))
        same = np.equal(*(_encode(common, format, side) for format, side in ((scan.base, base), (scan.tuned, tuned))))
        same |= (stored[0] == 0) & (stored[1] == 0)
        partial.counts[Count.STORED_EQUAL] += np.count_nonzero(same)
        with np.errstate(invalid="ignore"):  # a signalling NaN
            exact = (pair.base == stored[0]) | np.isnan(stored[0])
        partial.counts[Count.OFF_GRID] += np.count_nonzero(~exact)
        partial.counts[Count.CHANGED] += np.count_nonzero(pair.changed)
        if scan.compare.bits > 16:
            partial.counts[Count.FINITE] += np.count_nonzero(pair.finite)
        magnitudes = np.abs(pair.delta[pair.finite_changed]).astype(np.float64)
        larger = np.maximum(np.abs(pair.base), np.abs(pair.tuned))[pair.finite_changed].astype(np.float64)
        partial.counts[Count.WITHIN_ETA] += np.count_nonzero(magnitudes <= scan.eta * larger)
        partial.within += _count_within(magnitudes, scan.thresholds)

    @staticmethod
    def _sum(pair: _Pair, sums: NDArray[np.float64]) -> None:
        delta = pair.delta[pair.finite_changed].astype(np.float64)
        base = pair.base[pair.finite_changed].astype(np.float64)
        sums[Sum.DELTA] += delta.sum()
        sums[Sum.ABS_DELTA] += np.abs(delta).sum()
        sums[Sum.DELTA_SQUARE] += np.sum(delta**2)
        sums[Sum.BASE_DELTA] += np.sum(base * delta)
        if pair.compare.bits > 16:
            sums[Sum.BASE_SQUARE] += np.sum(pair.base[pair.finite].astype(np.float64) ** 2)

    @staticmethod
    def _sum_stored(scan: Scan, pair: _Pair, stored: Any, sums: NDArray[np.float64]) -> None:
        if not (is_wide(scan.base, scan.compare) or is_wide(scan.tuned, scan.compare)):
            return
        sides = zip((scan.base, scan.tuned), stored, strict=True)
        with np.errstate(invalid="ignore", over="ignore"):
            base, tuned = (_decode(format, _raw(format, side)).astype(np.float64) for format, side in sides)
            delta = tuned - base
            square = delta**2
        finite = np.isfinite(delta)
        sums[Sum.STORED_SQUARE] += square[finite].sum()
        sums[Sum.ABSORBED_SQUARE] += square[finite & ~pair.changed].sum()

    @staticmethod
    def _histograms(pair: _Pair, partial: Partial) -> None:
        if pair.compare.bits <= 16:
            bins = pair.base_size.astype(np.int64)
        else:
            bins = (pair.base_size >> (pair.compare.bits - 16)).astype(np.int64)
            bins[pair.base_size > pair.compare.infinite] = BINS - 1
        for row, chosen in enumerate((np.ones(bins.size, bool), pair.changed, pair.changed & ~pair.finite)):
            partial.weights[row] += np.bincount(bins[chosen], minlength=BINS)
        bits = _bits(np.abs(pair.delta[pair.finite_changed]))
        shift = bits.dtype.itemsize * 8 - 16
        of_delta = (bits >> shift).astype(np.int64)
        partial.deltas[0] += np.bincount(of_delta, minlength=BINS).astype(np.uint64)
        if shift == 16:
            below = (bits & 0xFFFF).astype(np.uint64)
            np.add.at(partial.deltas[1], of_delta, below)
            np.add.at(partial.deltas[2], of_delta, below * below)
        for at, used in ((0, bins), (2, of_delta)):
            if used.size:
                partial.span[at] = min(partial.span[at], used.min())
                partial.span[at + 1] = max(partial.span[at + 1], used.max())
        order = [_monotone(pair.compare, codes)[pair.finite_changed] for codes in (pair.base_codes, pair.tuned_codes)]
        binades = [distance.bit_length() - 1 for distance in np.abs(order[0] - order[1]).tolist()]
        partial.ulp += np.bincount(np.array(binades, np.int64), minlength=64)

    @staticmethod
    def _mask(scan: Scan, pair: _Pair, first_tie: int, partial: Partial) -> NDArray[np.bool_]:
        if scan.rule == Rule.NONE:
            return np.zeros(pair.changed.size, bool)
        with np.errstate(invalid="ignore"):  # NaN
            magnitudes = np.abs(pair.delta).astype(np.float64)
            larger = np.maximum(np.abs(pair.base), np.abs(pair.tuned)).astype(np.float64)
            if scan.rule == Rule.ABOVE:
                inside = magnitudes > scan.cut
            elif scan.rule == Rule.ETA:
                inside = magnitudes > scan.cut * larger
            elif scan.rule == Rule.TOP:
                tied = pair.finite_changed & (magnitudes == scan.cut)
                partial.sums[-1, Sum.TIES] += np.count_nonzero(tied)
                ordinals = first_tie + np.arange(np.count_nonzero(tied))
                inside = magnitudes > scan.cut
                if scan.ties:
                    inside[tied] = (ordinals + 1) * scan.take // scan.ties > ordinals * scan.take // scan.ties
            else:
                inside = pair.changed
        mask: NDArray[np.bool_] = np.where(pair.finite, inside & pair.changed, pair.changed)
        return mask


class _Pair:
    """Both sides of a block after the cast."""

    def __init__(self, scan: Scan, base: NDArray[np.uint8], tuned: NDArray[np.uint8]) -> None:
        compare = self.compare = scan.compare
        self.base_codes = _encode(compare, scan.base, base)
        self.tuned_codes = _encode(compare, scan.tuned, tuned)
        self.base, self.tuned = _decode(compare, self.base_codes), _decode(compare, self.tuned_codes)
        self.base_size = self.base_codes & self.base_codes.dtype.type(compare.magnitude)
        tuned_size = self.tuned_codes & self.tuned_codes.dtype.type(compare.magnitude)
        self.changed = (self.base_codes != self.tuned_codes) & ((self.base_size | tuned_size) != 0)
        with np.errstate(invalid="ignore", over="ignore"):
            self.delta = self.tuned - self.base
        self.finite = np.isfinite(self.delta)
        self.finite_changed = self.changed & self.finite


def _raw(format: Format, side: NDArray[np.uint8]) -> NDArray[Any]:
    return side.view(format.code_dtype)


def _decode(format: Format, codes: NDArray[Any]) -> NDArray[Any]:
    """Values as float32, or float64 for a 64-bit format."""
    if format.bits <= 16:
        values: NDArray[Any] = format.values()[codes]
        return values
    return codes.view(f"f{format.bits // 8}")


def _encode(target: Format, stored: Format, side: NDArray[np.uint8]) -> NDArray[Any]:
    """Codes of stored bytes in the target format."""
    codes = _raw(stored, side)
    if stored == target:
        return codes
    with np.errstate(over="ignore", invalid="ignore"):
        values = _decode(stored, codes)
        if target == FORMATS["bf16"]:
            return round_to_bf16(values.astype(np.float32).view(np.uint32))
        return values.astype(f"f{target.bits // 8}").view(target.code_dtype)


def _count_next_bits(codes: NDArray[np.uint64], shift: int) -> NDArray[np.int64]:
    """Count codes by the 16 bits below the leading ones; NumPy 2.0 counts no uint64."""
    return np.bincount((codes >> (shift - 16) & 0xFFFF).astype(np.int64), minlength=1 << 16)


def _count_within(magnitudes: NDArray[np.float64], thresholds: tuple[float, ...]) -> NDArray[np.int64]:
    return np.array([np.count_nonzero(magnitudes <= threshold) for threshold in thresholds], np.int64)


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    bits: NDArray[Any] = values.view(f"u{values.dtype.itemsize}")
    return bits


def _monotone(format: Format, codes: NDArray[Any]) -> NDArray[Any]:
    """Integers in the order of the values; Python integers where 64 bits do not hold a distance."""
    size = (codes & codes.dtype.type(format.magnitude)).astype(np.int64)
    order = np.where(codes > format.magnitude, -size, size)
    result: NDArray[Any] = order.astype(object) if format.bits == 64 else order
    return result
