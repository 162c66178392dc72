"""One tensor pair from its first scan to its columns, pass by pass.

Most tensors need one pass. More follow where a cut falls inside a bin of unequal values, or where the mask rule needs
a figure of the whole tensor first (``rel``: RMS(W0), ``top``: the cut in |d|). A measurement says what the next pass
is, takes its result, and knows neither files nor threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.backends.formats import FORMATS, Format, is_wide
from ckptdiff.backends.kernels.tiles import round_down
from ckptdiff.backends.partial import BINS, BitScan, Count, Partial, Refined, Rule, Scan, Sum, Targets
from ckptdiff.metrics.catalogue import COLUMNS, EPS, ETA, RHO, TAU, P, flat_key
from ckptdiff.metrics.delta_cuts import DeltaCut, first_delta_cut, refine_delta_cut, single_value
from ckptdiff.metrics.histograms import LOG2_BINS, HistogramRows, log2_bins
from ckptdiff.metrics.low_cuts import LowCut, first_low_cut, first_nan_bin, refine_low_cut
from ckptdiff.metrics.rounding_null import low_coverage_null
from ckptdiff.options import MaskRule

__all__ = ["BitMeasurement", "FloatMeasurement", "Measured", "Pass"]

Pass: TypeAlias = Scan | BitScan | Targets
"""What one pass over a tensor pair does."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything known of one tensor pair.

    Attributes
    ----------
    columns : dict
        One number for each of :data:`~ckptdiff.metrics.catalogue.COLUMNS`.
    histograms : HistogramRows
        One row.
    """

    columns: dict[str, int | float]
    histograms: HistogramRows


class BitMeasurement:
    """A pair of integer or opaque tensors: one pass, bit equality alone."""

    def __init__(self, numel: int, bits: int, want_mask: bool, rule: MaskRule) -> None:
        self.next: Pass | None = BitScan(bits, want_mask)
        self.masks_now = want_mask
        self._numel, self._rule = numel, rule
        self._changed = 0

    @property
    def scanning(self) -> bool:
        """Whether the first pass is still to come."""
        return self.next is not None

    def first_tie(self, block: int) -> int:
        """No mask rule of theirs counts ties."""
        return 0

    def take(self, result: Partial | Refined) -> None:
        """Take the result of the pass."""
        assert isinstance(result, Partial)
        self._changed = int(result.counts[Count.CHANGED])
        self.next = None

    def measured(self) -> Measured:
        """The columns, once no pass is left."""
        columns: dict[str, int | float] = {c.name: 0 if c.dtype == "uint64" else math.nan for c in COLUMNS}
        columns["numel"] = self._numel
        columns["unchanged_bitwise"] = columns["unchanged_stored"] = self._numel - self._changed
        if self._rule.kind != "none":
            columns["changed"], columns["masked"] = self._changed, 1
        return Measured(columns, HistogramRows.empty(1))


class FloatMeasurement:
    """A pair of floating tensors.

    Parameters
    ----------
    base, tuned, compare : Format
    numel : int
        Coordinates of the tensor.
    rule : MaskRule
    want_mask : bool
        Whether mask bits are wanted, or only their count.
    """

    def __init__(
        self, base: Format, tuned: Format, compare: Format, numel: int, rule: MaskRule, want_mask: bool
    ) -> None:
        self.numel, self.rule, self.compare, self._want_mask = numel, rule, compare, want_mask
        self._width = 64 if compare.bits == 64 else 32
        self.scan = Scan(base, tuned, compare, EPS, ETA, *_first_rule(rule))
        self._scanned: Partial | None = None
        self._cuts: list[DeltaCut] = []
        self._low: list[LowCut] = []
        self._within_rel: list[int | None] = []
        self._tails: NDArray[np.float64] | None = None
        self._ties: NDArray[np.float64] | None = None
        self._masked = 0
        self._state = "scan"
        self.next: Pass | None = self.scan
        self._offer_mask(rule.kind in ("bitwise", "abs", "eta"))

    def take(self, result: Partial | Refined) -> None:
        """Take the merged result of the pass and decide on the next one."""
        if isinstance(result, Refined):
            self._refine(result)
        elif self._state == "scan":
            self._scanned = result
            self._finite, self._base_square = self._base()
            self._masked = int(result.counts[Count.MASKED])
            self._start()
        elif self._state == "ties":
            self._ties = result.sums[:, Sum.TIES]
        else:
            self._masked = int(result.counts[Count.MASKED])
        self.next = self._decide()

    @property
    def scanning(self) -> bool:
        """Whether the first pass is still to come."""
        return self._state == "scan" and self.next is not None

    def first_tie(self, block: int) -> int:
        """Coordinates at the cut of ``Rule.TOP`` in the blocks before one."""
        return 0 if self._ties is None else int(self._ties[:block].sum())

    def measured(self) -> Measured:
        """The columns, once no pass is left."""
        partial, sums = self._partial, self._partial.total()
        numel, changed = self.numel, int(partial.counts[Count.CHANGED])
        first, last = int(partial.span[0]), int(partial.span[1])
        columns: dict[str, int | float] = {
            "numel": numel,
            "valued": 1,
            "finite": self._finite,
            "unchanged_bitwise": numel - changed,
            "wide": int(is_wide(self.scan.base, self.compare) or is_wide(self.scan.tuned, self.compare)),
            "unchanged_stored": int(partial.counts[Count.STORED_EQUAL]),
            "unchanged_eta": numel - changed + int(partial.counts[Count.WITHIN_ETA]),
            "changed": self._masked,
            "masked": int(self.rule.kind != "none"),
            "support": int(partial.weights[1, first : min(last + 1, first_nan_bin(self.compare))].sum()),
            "nonfinite_base": int(partial.counts[Count.NONFINITE_BASE]),
            "nonfinite_tuned": int(partial.counts[Count.NONFINITE_TUNED]),
            "delta_norm": math.sqrt(sums[Sum.DELTA_SQUARE]),
            "base_norm": math.sqrt(self._base_square),
            "base_dot_delta": float(sums[Sum.BASE_DELTA]),
            "delta_sum": float(sums[Sum.DELTA]),
            "l1": float(sums[Sum.ABS_DELTA]),
            "max_abs": float(partial.max_abs[0]),
        }
        for eps, within in zip(EPS, partial.within.tolist(), strict=True):
            columns[flat_key("unchanged_abs", eps)] = numel - changed + within
        for tau, count in zip(TAU, self._within_rel, strict=True):
            assert count is not None
            columns[flat_key("unchanged_rel", tau)] = numel - changed + count
        columns |= self._energies(float(sums[Sum.DELTA_SQUARE])) | self._coverages(int(columns["support"]))
        return Measured(columns, self._histograms())

    @property
    def _partial(self) -> Partial:
        assert self._scanned is not None
        return self._scanned

    def _start(self) -> None:
        """Find the cuts as far as the scan tells."""
        ranks = [_rank(Fraction(str(p)) / 100, self.numel) for p in P]
        if self.rule.kind == "top":
            ranks.append(max(self._top_room(), 1))
        self._cuts = [first_delta_cut(self._partial, self._width, rank) for rank in ranks]
        self._low = [first_low_cut(self._partial, self.compare, _rank(Fraction(str(rho)), self.numel)) for rho in RHO]
        self._within_rel = [self._count_within(tau * self._rms()) for tau in TAU]

    def _decide(self) -> Pass | None:
        """The next pass, None if all is known."""
        unknown = max([cut.unknown for cut in self._cuts] + [cut.unknown for cut in self._low], default=0)
        rel = tuple(tau * self._rms() for tau, n in zip(TAU, self._within_rel, strict=True) if n is None)
        if unknown or rel:
            self._state = "refine"
            return Targets(
                unknown,
                tuple(dict.fromkeys(cut.prefix for cut in self._cuts if cut.unknown == unknown)) if unknown else (),
                tuple(dict.fromkeys(cut.prefix for cut in self._low if cut.unknown == unknown)) if unknown else (),
                rel,
            )
        if self._width == 64 and self._tails is None and self._partial.counts[Count.CHANGED]:
            self._state = "tails"
            return Targets(tails=tuple(cut.value for cut in self._cuts))
        if self.rule.kind == "top" and self._ties is None:
            self._state = "ties"
            return self._top_scan(want_mask=False)
        if self.rule.kind in ("rel", "top") and self._state != "mask":
            self._state = "mask"
            self._offer_mask(True)
            if self.rule.kind == "top":
                return self._top_scan(want_mask=self._want_mask)
            cut = self.rule.value * self._rms()
            return replace(self.scan, rule=Rule.ABOVE, cut=cut, want_mask=self._want_mask)
        return None

    def _offer_mask(self, now: bool) -> None:
        """Note whether the pass at hand makes the mask."""
        self.masks_now = now and self._want_mask
        if self.masks_now and isinstance(self.next, Scan):
            self.next = replace(self.next, want_mask=True)

    def _top_scan(self, want_mask: bool) -> Scan:
        cut = self._cuts[-1]
        take = min(max(self._top_room() - cut.above, 0), cut.at)
        return replace(self.scan, rule=Rule.TOP, cut=cut.value, ties=cut.at, take=take, want_mask=want_mask)

    def _top_room(self) -> int:
        """How many coordinates of finite d a ``top`` mask may hold."""
        # Coordinates that became NaN or Inf are in every mask; they use up their part of the percentage first.
        strange = int(self._partial.counts[Count.CHANGED]) - self._moved()
        return _rank(Fraction(str(self.rule.value)) / 100, self.numel) - strange

    def _refine(self, found: Refined) -> None:
        targets = self.next
        assert isinstance(targets, Targets)
        if targets.tails:
            self._tails = found.tails.sum(axis=0)
            return
        deltas = dict(zip(targets.deltas, found.deltas, strict=True))
        weights = dict(zip(targets.weights, found.weights, strict=True))
        self._cuts = [
            refine_delta_cut(cut, deltas[cut.prefix]) if cut.unknown == targets.shift != 0 else cut
            for cut in self._cuts
        ]
        self._low = [
            refine_low_cut(cut, weights[cut.prefix]) if cut.unknown == targets.shift != 0 else cut for cut in self._low
        ]
        counts = iter(found.within.tolist())
        self._within_rel = [next(counts) if count is None else count for count in self._within_rel]

    def _base(self) -> tuple[int, float]:
        """Number of coordinates with finite d, and sum W0^2 over them."""
        partial = self._partial
        if self.compare.bits > 16:
            return int(partial.counts[Count.FINITE]), float(partial.total()[Sum.BASE_SQUARE])
        first, last = int(partial.span[0]), min(int(partial.span[1]), self.compare.infinite - 1)
        used = slice(first, last + 1)
        counts = partial.weights[0, used] - partial.weights[2, used]
        values = self.compare.values()[used].astype(np.float64)
        return int(counts.sum()), float(np.sum(counts * values**2))

    def _moved(self) -> int:
        """Changed coordinates with finite d."""
        return int(self._partial.ulp.sum())

    def _rms(self) -> float:
        return math.sqrt(self._base_square / self._finite) if self._finite else 0.0

    def _count_within(self, threshold: float) -> int | None:
        """Changed coordinates with |d| <= threshold, None if the scan cannot tell."""
        real = np.dtype(f"f{self._width // 8}")
        bits = int(np.array(round_down(threshold, real), real).view(f"u{self._width // 8}"))
        bin_ = bits >> (self._width - 16)
        counts = self._partial.deltas[0].view(np.int64)
        below = int(counts[self._partial.span[2] : bin_].sum())
        if counts[bin_] == 0:
            return below
        value = single_value(self._partial, bin_) if self._width == 32 else None
        if value is None:
            return None
        return below + int(counts[bin_]) * (value <= bits)

    def _energies(self, total: float) -> dict[str, float]:
        tails = [None] * len(P) if self._tails is None else self._tails.tolist()
        return {
            flat_key("coord_energy", p): min(cut.energy(tail) / total, 1.0) if total else math.nan
            for p, cut, tail in zip(P, self._cuts, tails, strict=False)
        }

    def _coverages(self, support: int) -> dict[str, float]:
        null = np.full(len(RHO), np.nan)
        if self.compare.bits <= 16 and not self._partial.counts[Count.OFF_GRID]:
            ranks = np.array([cut.rank for cut in self._low], np.int64)
            null = low_coverage_null(self._partial, self.compare, ranks)
        columns = {}
        for rho, cut, expected in zip(RHO, self._low, null.tolist(), strict=True):
            columns[flat_key("low_coverage", rho)] = cut.overlap / support if support else math.nan
            columns[flat_key("low_coverage_null", rho)] = expected
        return columns

    def _histograms(self) -> HistogramRows:
        partial = self._partial
        delta_map, base_map = _log2_of_bins("f64" if self._width == 64 else "f32"), _log2_of_bins(self.compare.name)
        delta = _regroup(partial.deltas[0], delta_map, partial.span[2:])
        delta[0] += self._finite - self._moved()
        base, changed = (_regroup(partial.weights[i], base_map, partial.span[:2]) for i in (0, 1))
        return HistogramRows(*(row[np.newaxis].astype(np.uint64) for row in (delta, base, changed, partial.ulp)))


def _first_rule(rule: MaskRule) -> tuple[Rule, float]:
    """What the first scan can already do for a mask rule."""
    kinds = {"bitwise": Rule.BITWISE, "abs": Rule.ABOVE, "eta": Rule.ETA}
    return kinds.get(rule.kind, Rule.NONE), rule.value


def _rank(fraction: Fraction, numel: int) -> int:
    """Size of a set that holds a fraction of the coordinates, rounded up, at least one."""
    return max(1, math.ceil(fraction * numel))


@cache
def _log2_of_bins(name: str) -> NDArray[np.intp]:
    """Log2 bin of every bin of a format's magnitude histogram; ``LOG2_BINS`` for bins that are not finite.

    A bin of several float32 or float64 subnormals counts as its smallest nonzero power of two.
    """
    format = FORMATS[name]
    if format.bits <= 16:
        values = np.zeros(BINS)
        values[: format.infinite] = format.values()[: format.infinite]
        finite = format.infinite
    else:
        codes = np.arange(BINS).astype(format.code_dtype) << format.code_dtype.type(format.bits - 16)
        finite = format.infinite >> (format.bits - 16)
        values = np.where(np.arange(BINS) < finite, codes.view(f"f{format.bits // 8}"), 0).astype(np.float64)
    bins = log2_bins(values)
    bins[finite:] = LOG2_BINS
    return bins


def _regroup(counts: NDArray[np.integer], bins: NDArray[np.intp], span: NDArray[np.int64]) -> NDArray[np.float64]:
    """Add counts up by bin; exact below 2**53."""
    used = slice(int(span[0]), int(span[1]) + 1)
    return np.bincount(bins[used], counts[used].astype(np.float64), LOG2_BINS + 1)[:LOG2_BINS].astype(np.float64)
