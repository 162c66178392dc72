"""One tensor pair from its first scan to its columns, pass by pass.

Most tensors need one pass. More follow where a cut falls inside a bin of unequal values, or where the mask rule needs
a figure of the whole tensor first (``rel``: RMS(W0), ``top``: the cut in |d|). A measurement says what the next pass
is, takes its result, and knows neither files nor threads.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import OptionError
from ckptdiff.figures.columns import Measured, bits_only, measured
from ckptdiff.formats import Format, is_wide
from ckptdiff.measure.delta_cuts import DeltaCut, first_delta_cut, refine_delta_cut
from ckptdiff.measure.kernels.cuts import regroup, within_bins
from ckptdiff.measure.kernels.row import base_sums
from ckptdiff.measure.kernels.tiles import facts_of
from ckptdiff.measure.low_cuts import LowCut, first_low_cuts, first_nan_bin, refine_low_cut
from ckptdiff.measure.partial import BitScan, Count, Partial, Refined, Rule, Scan, Sum, Targets
from ckptdiff.measure.ranks import LARGEST, SMALLEST, log2_groups, set_size
from ckptdiff.measure.records import Records, empty_records
from ckptdiff.measure.rounding_null import low_coverage_null
from ckptdiff.measure.thresholds import EPS, ETA, TAU, P
from ckptdiff.options import MaskRule

__all__ = ["BitMeasurement", "FloatMeasurement", "Pass", "one_scan_suffices"]

Pass: TypeAlias = Scan | BitScan | Targets
"""What one pass over a tensor pair does."""
_State: TypeAlias = Literal["scan", "refine", "tails", "ties", "mask"]
"""What the pass at hand is for."""


def one_scan_suffices(compare: Format, rule: MaskRule) -> bool:
    """Whether most tensors need no further pass: those of at most 16 bits, unless the mask needs figures first."""
    return compare.bits <= 16 and rule.kind in ("none", "bitwise", "abs", "eta")


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

    @property
    def passes(self) -> int:
        """How many passes it takes."""
        return 1

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
        return bits_only(self._numel, self._changed, self._rule)


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
        self._state: _State = "scan"
        self.next: Pass | None = self.scan
        self._offer_mask(rule.kind in ("bitwise", "abs", "eta"))

    def take(self, result: Partial | Refined) -> None:
        """Take the merged result of the pass and decide on the next one.

        Raises
        ------
        OptionError
            The rule is ``rel``, and RMS(W0) is beyond float64.
        """
        if isinstance(result, Refined):
            self._refine(result)
        elif self._state == "scan":
            self._scanned = result
            self._finite, self._base_square = self._base()
            if self.rule.kind == "rel" and not math.isfinite(self._base_square):
                raise OptionError(
                    "the sum of W0^2 of a tensor is beyond float64: a rel mask has no threshold there",
                    expected="float64 values below 1e154",
                    hint="--mask eta:ETA or top:PERCENT, or --exclude the tensor",
                )
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

    @property
    def passes(self) -> int:
        """How many passes it is likely to take: values decide whether a cut falls inside a bin."""
        return 1 + (self.compare.bits > 16) + {"rel": 1, "top": 2}.get(self.rule.kind, 0)

    @property
    def wide(self) -> bool:
        """Whether a side is stored wider than what it is compared as."""
        return is_wide(self.scan.base, self.compare) or is_wide(self.scan.tuned, self.compare)

    def first_tie(self, block: int) -> int:
        """Coordinates at the cut of ``Rule.TOP`` in the blocks before one."""
        return 0 if self._ties is None else int(self._ties[:block].sum())

    def measured(self) -> Measured:
        """The columns, once no pass is left."""
        partial, records = self._partial, empty_records(1)
        nan = first_nan_bin(self.compare)
        records.counts[0] = partial.counts
        records.counts[0, Count.MASKED] = self._masked
        records.within[0] = partial.within
        records.within_rel[0] = [count for count in self._within_rel if count is not None]
        records.sums[0], records.max_abs[0] = partial.total(), partial.max_abs[0]
        records.finite[0], records.base_square[0] = self._finite, self._base_square
        records.support[0] = partial.weights[1, partial.span[0] : min(int(partial.span[1]) + 1, nan)].sum()
        tails = [None] * len(P) if self._tails is None else self._tails.tolist()
        records.energies[0] = [cut.energy(tail) for cut, tail in zip(self._cuts, tails, strict=False)][: len(P)]
        records.overlaps[0] = [cut.overlap for cut in self._low]
        if self.compare.bits <= 16 and not partial.counts[Count.OFF_GRID]:
            ranks = np.array([cut.rank for cut in self._low], np.int64)
            records.nulls[0] = low_coverage_null(partial, self.compare, ranks)
        self._fill_histograms(records)
        return measured(records, np.array([self.numel]), self.wide, self.rule)

    @property
    def _partial(self) -> Partial:
        assert self._scanned is not None
        return self._scanned

    def _start(self) -> None:
        """Find the cuts as far as the scan tells."""
        ranks = [set_size(fraction, self.numel) for fraction in LARGEST]
        if self.rule.kind == "top":
            ranks.append(max(self._top_room(), 1))
        self._cuts = [first_delta_cut(self._partial, self._width, rank) for rank in ranks]
        low = [set_size(fraction, self.numel) for fraction in SMALLEST]
        self._low = first_low_cuts(self._partial, self.compare, low)
        rms = self._rms()
        self._within_rel = [self._count_within(tau * rms) for tau in TAU]

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
        return set_size(Fraction(str(self.rule.value)) / 100, self.numel) - strange

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
        finite, square = base_sums(partial.weights, int(partial.span[0]), int(partial.span[1]), facts_of(self.compare))
        return int(finite), float(square)

    def _moved(self) -> int:
        """Changed coordinates with finite d."""
        return int(self._partial.ulp.sum())

    def _rms(self) -> float:
        return math.sqrt(self._base_square / self._finite) if self._finite else 0.0

    def _count_within(self, threshold: float) -> int | None:
        """Changed coordinates with |d| <= threshold, None if the scan cannot tell."""
        within = within_bins(self._partial.deltas, self._partial.span, threshold, self._width)
        return None if within < 0 else int(within)

    def _fill_histograms(self, records: Records) -> None:
        partial = self._partial
        delta_groups, base_groups = log2_groups("f64" if self._width == 64 else "f32"), log2_groups(self.compare.name)
        first, last, first_delta, last_delta = partial.span.tolist()
        regroup(partial.deltas[0], delta_groups, first_delta, last_delta, records.delta_log2[0])
        records.delta_log2[0, 0] += np.uint64(self._finite - self._moved())
        regroup(partial.weights[0], base_groups, first, last, records.base_log2[0])
        regroup(partial.weights[1], base_groups, first, last, records.changed_log2[0])
        records.ulp[0] = partial.ulp.astype(np.uint64)


def _first_rule(rule: MaskRule) -> tuple[Rule, float]:
    """What the first scan can already do for a mask rule."""
    kinds = {"bitwise": Rule.BITWISE, "abs": Rule.ABOVE, "eta": Rule.ETA}
    return kinds.get(rule.kind, Rule.NONE), rule.value
