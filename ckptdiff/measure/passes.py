"""Take one tensor pair from its first scan to its row of figures, pass by pass.

Most tensors need one pass. More follow where a cut falls inside a bin of unequal values, or where the mask rule needs
a figure of the whole tensor first (``rel``: RMS(W0), ``top``: the cut in |d|). A measurement says what the next pass
is, takes its result span by span, and knows neither files nor threads.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import OptionError
from ckptdiff.formats import Format, Formats
from ckptdiff.measure.kernels.row import fill_row
from ckptdiff.measure.kernels.tiles import totals_of
from ckptdiff.measure.open_cuts import (
    DeltaCut,
    LowCut,
    first_delta_cut,
    first_low_cuts,
    refine_delta_cut,
    refine_low_cut,
)
from ckptdiff.measure.partial import BitScan, Count, Partial, Refined, Rule, Scan, Sum, Targets
from ckptdiff.measure.ranks import ranks_of, set_size, tables_of
from ckptdiff.measure.records import empty_records
from ckptdiff.measure.thresholds import EPS, ETA, TAU, P
from ckptdiff.options import MaskRule

Pass: TypeAlias = Scan | BitScan | Targets
"""What one pass over a tensor pair does."""
_State: TypeAlias = Literal["scan", "refine", "tails", "ties", "mask"]
"""What the pass at hand is for."""


def one_scan_suffices(compare: Format, rule: MaskRule) -> bool:
    """Whether most tensors need no further pass: those of at most 16 bits, unless the mask needs figures first."""
    return compare.bits <= 16 and rule.kind in ("none", "bitwise", "abs", "eta")


class Measurement:
    """A tensor pair under measurement."""

    def __init__(self, first: Pass) -> None:
        self.first = first
        self.next: Pass | None = first
        """The pass at hand; None once all is known."""
        self.row = empty_records(1)
        """Complete once no pass is left."""
        self.turn = 0
        """How many passes are over."""
        self._merged: Any = None

    def take(self, found: Partial | Refined, last: bool = True) -> list[Partial]:
        """Take what the pass at hand found in the blocks that follow; after the ``last`` ones decide on the next pass.

        Returns partials that nobody reads any more. OptionError if the mask rule is ``rel``, and RMS(W0) is beyond
        float64.
        """
        read = [found]
        if self._merged is None:
            self._merged = read.pop()
        else:
            self._merged.add(found)
        if last:
            read.append(self._merged)
            self._conclude(self._merged)
            self._merged = None
            self.turn += 1
        return [one for one in read if isinstance(one, Partial)]

    def without_results(self) -> Measurement:
        """The same as it was when the pass at hand began, to be sent to where parts of the pass are made."""
        sent = copy(self)
        sent._merged = None
        return sent

    def _conclude(self, merged: Partial | Refined) -> None:
        """Take what the whole pass found, and decide on the next one."""
        raise NotImplementedError

    def first_tie(self, block: int) -> int:
        """Coordinates at the cut of ``Rule.TOP`` in the blocks before one."""
        return 0

    @property
    def passes(self) -> int:
        """How many passes it is likely to take: values decide whether a cut falls inside a bin."""
        return 1


class BitMeasurement(Measurement):
    """A pair of integer or opaque tensors: one pass, bit equality alone."""

    def __init__(self, bits: int, rule: MaskRule, want_mask: bool) -> None:
        super().__init__(BitScan(bits, want_mask))
        self._rule = rule

    def _conclude(self, merged: Partial | Refined) -> None:
        assert isinstance(merged, Partial)
        self.row.counts[0] = merged.counts
        self.row.counts[0, Count.STORED_EQUAL] = merged.numel - merged.counts[Count.CHANGED]
        if self._rule.kind == "none":
            self.row.counts[0, Count.MASKED] = 0
        self.row.complete[0] = True
        self.next = None


class FloatMeasurement(Measurement):
    """A pair of floating tensors, of whose mask the bits are wanted or only their count."""

    def __init__(self, formats: Formats, numel: int, rule: MaskRule, want_mask: bool) -> None:
        self.scan = Scan(*formats, EPS, ETA, *_first_rule(rule))
        first = rule.kind in ("bitwise", "abs", "eta")
        super().__init__(replace(self.scan, want_mask=want_mask and first))
        self._numel, self._rule, self._want_mask = numel, rule, want_mask
        self._width = 64 if self.scan.compare.bits == 64 else 32
        self._cuts: list[DeltaCut] = []
        self._low: list[LowCut] = []
        self._tails: NDArray[np.float64] | None = None
        self._ties: NDArray[np.float64] | None = None
        self._state: _State = "scan"

    def _conclude(self, merged: Partial | Refined) -> None:
        if isinstance(merged, Refined):
            self._refine(merged)
        elif self._state == "scan":
            self._start(merged)
        elif self._state == "ties":
            self._ties = merged.sums[:, Sum.TIES]
        else:
            self.row.counts[0, Count.MASKED] = merged.counts[Count.MASKED]
        self.next = self._decide()
        if self.next is None and not self.row.complete[0]:
            tails = [None] * len(P) if self._tails is None else self._tails.tolist()
            self.row.energies[0] = [cut.energy(tail) for cut, tail in zip(self._cuts, tails, strict=False)][: len(P)]
            self.row.overlaps[0] = [cut.overlap for cut in self._low]
            self.row.complete[0] = True

    @property
    def passes(self) -> int:
        """How many passes it is likely to take: values decide whether a cut falls inside a bin."""
        return 1 + (self.scan.compare.bits > 16) + {"rel": 1, "top": 2}.get(self._rule.kind, 0)

    def first_tie(self, block: int) -> int:
        """Coordinates at the cut of ``Rule.TOP`` in the blocks before one."""
        return 0 if self._ties is None else int(self._ties[:block].sum())

    def _start(self, partial: Partial) -> None:
        """Fill the row, and find the cuts that it leaves open as far as the scan tells."""
        ranks = ranks_of(np.array([self._numel]))
        fill_row(totals_of(partial, len(partial.sums)), ranks, tables_of(self.scan.compare), 0, self.row)
        if self._rule.kind == "rel" and not math.isfinite(self.row.base_square[0]):
            raise OptionError(
                "the sum of W0^2 of a tensor is beyond float64: a rel mask has no threshold there",
                expected="float64 values below 1e154",
                hint="--mask eta:ETA or top:PERCENT, or --exclude the tensor",
            )
        if not self.row.complete[0]:
            self._cuts = [first_delta_cut(partial, self._width, rank) for rank in ranks[0][0].tolist()]
            self._low = first_low_cuts(partial, self.scan.compare, ranks[1][0].tolist())
        if self._rule.kind == "top":
            self._cuts.append(first_delta_cut(partial, self._width, max(self._top_room(), 1)))

    def _decide(self) -> Pass | None:
        """The next pass, None if all is known."""
        unknown = max([cut.unknown for cut in self._cuts] + [cut.unknown for cut in self._low], default=0)
        rel = tuple(tau * self._rms() for tau, n in zip(TAU, self.row.within_rel[0], strict=True) if n < 0)
        if unknown or rel:
            self._state = "refine"
            return Targets(
                unknown,
                tuple(dict.fromkeys(cut.prefix for cut in self._cuts if cut.unknown == unknown)) if unknown else (),
                tuple(dict.fromkeys(cut.prefix for cut in self._low if cut.unknown == unknown)) if unknown else (),
                rel,
            )
        if self._width == 64 and self._tails is None and self.row.counts[0, Count.CHANGED]:
            self._state = "tails"
            return Targets(tails=tuple(cut.value for cut in self._cuts))
        if self._rule.kind == "top" and self._ties is None:
            self._state = "ties"
            return self._top_scan(want_mask=False)
        if self._rule.kind in ("rel", "top") and self._state != "mask":
            self._state = "mask"
            if self._rule.kind == "top":
                return self._top_scan(want_mask=self._want_mask)
            cut = self._rule.value * self._rms()
            return replace(self.scan, rule=Rule.ABOVE, cut=cut, want_mask=self._want_mask)
        return None

    def _top_scan(self, want_mask: bool) -> Scan:
        cut = self._cuts[-1]
        take = min(max(self._top_room() - cut.above, 0), cut.at)
        return replace(self.scan, rule=Rule.TOP, cut=cut.value, ties=cut.at, take=take, want_mask=want_mask)

    def _top_room(self) -> int:
        """How many coordinates of finite d a ``top`` mask may hold."""
        # Coordinates that became NaN or Inf are in every mask; they use up their part of the percentage first.
        strange = int(self.row.counts[0, Count.CHANGED]) - int(self.row.ulp.sum())
        return int(set_size(Fraction(str(self._rule.value)) / 100, self._numel)) - strange

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
        within = self.row.within_rel[0]
        if targets.thresholds:
            within[within < 0] = found.within

    def _rms(self) -> float:
        return math.sqrt(self.row.base_square[0] / self.row.finite[0]) if self.row.finite[0] else 0.0


def _first_rule(rule: MaskRule) -> tuple[Rule, float]:
    """What the first scan can already do for a mask rule."""
    kinds = {"bitwise": Rule.BITWISE, "abs": Rule.ABOVE, "eta": Rule.ETA}
    return kinds.get(rule.kind, Rule.NONE), float(rule.value)  # an integer would take a kernel of its own
