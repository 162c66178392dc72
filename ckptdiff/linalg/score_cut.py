"""Find what the largest entries of a score cover that is computed panel by panel, without keeping any.

Scores are counted by their float32 code in a window around the expected cut. Where the window missed, or the bin of the
cut holds so many changed entries that their order in it matters, the window zooms and the pass is made again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.kernels.scores import count_scores
from ckptdiff.linalg.stages import Array, Panel, array_module, on_host
from ckptdiff.linalg.survey import MAGNITUDES, SMALL_CHANGE

_CODES = 1 << 31
_OCTAVE = 1 << 23
_BINS = 1 << 15
_FEW_BINS, _FEW = 1 << 11, 1 << 15
"""So many scores above the cut are counted in few bins, which cost less than the scores."""
_FIELDS = 5
SCORE_LANES = 4
"""Parts of a panel that are counted apart. Their sums are added in order, whichever threads made them."""


@dataclass(frozen=True, slots=True)
class Covered:
    """Counts over the entries with the largest scores; ties at the cut count fractionally."""

    entries: float
    changed: float
    """Of these, d != 0."""
    above: float
    """|d| > 1e-5."""
    not_low: float
    """d != 0 and |W0| not among the smallest."""
    chance: float
    """Sum of the chances to be changed under the null."""


def likely_zooms(numel: int, error: float) -> bool:
    """Whether a cut among so many scores is likely to need another pass, if most entries changed.

    It needs none if the standard error of a count is at most `error`, as a share of all.
    """
    return 0.5 * math.sqrt(numel / _BINS) > error * numel


class ScoreCut:
    """Finds the `rank` largest scores of a pair.

    Parameters
    ----------
    rank : int
        From 1.
    guess : float
        About where the cut is, 0 if nothing is known.
    chances : float64 array, shape (32768,)
        By magnitude of W0, the chance to be changed under the null.
    low : (int, float)
        As :meth:`~ckptdiff.linalg.survey.Survey.low_cuts` gives it.
    error : float
        Standard error of a count of changed entries that needs no further zoom.
    """

    def __init__(
        self, rank: int, guess: float, chances: NDArray[np.float64], low: tuple[int, float], error: float
    ) -> None:
        self._rank, self._chances, self._low, self._error = rank, chances, low, error
        self.covered: Covered | None = None
        code = int(np.float32(abs(guess)).view(np.uint32))
        if np.isfinite(guess) and code >> 23:
            # One octave around the guess.
            bins = _BINS if rank > _FEW else _FEW_BINS
            shift = (_OCTAVE // bins).bit_length() - 1
            self._open(shift, (code - _OCTAVE // 2) >> shift, bins)
        else:
            self._open(16, 0, _BINS)

    def _open(self, shift: int, start: int, bins: int) -> None:
        self._shift, self._start = shift, start
        self._bins = bins
        self._lanes: list[NDArray[np.float64] | None] = [None] * SCORE_LANES

    def add(self, scores: Array, panel: Panel, lane: int = 0) -> None:
        """Count a panel by its scores, C-contiguous float32 of the same shape.

        Lanes, from 0 to ``SCORE_LANES - 1``, may be filled at a time.
        """
        base = panel.base.astype(np.float32, copy=False).view(np.uint32)
        delta = panel.delta.astype(np.float32, copy=False)
        counts = self._lanes[lane]
        if counts is None:
            counts = self._lanes[lane] = np.zeros((self._bins + 1, _FIELDS))
        if array_module(scores) is np:
            window = np.uint32(self._shift), np.uint32(self._start)
            low = np.uint32(self._low[0]), self._low[1]
            values = scores.view(np.uint32), base, delta
            count_scores(*values, self._chances, window, low, np.float32(SMALL_CHANGE), counts)
        else:
            self._add_anywhere(scores, base, delta, counts, array_module(scores))

    def _add_anywhere(self, scores: Array, base: Array, delta: Array, counts: NDArray[np.float64], xp: Any) -> None:
        """Count as the kernel does, in calls that NumPy and CuPy share."""
        codes = ((scores.view(np.uint32) & (_CODES - 1)) >> self._shift).astype(np.int64).ravel()
        inside = codes >= self._start
        rows = len(counts)
        bins = xp.minimum(codes[inside] - self._start, rows - 1)
        magnitudes = (base.ravel()[inside] >> 16) & (MAGNITUDES - 1)
        not_low = xp.where(magnitudes == self._low[0], self._low[1], magnitudes > self._low[0])
        chances = xp.asarray(self._chances)[magnitudes]
        values = abs(delta.ravel()[inside])
        changed = (values != 0).astype(np.float64)
        above = (values > SMALL_CHANGE).astype(np.float64)
        for field, weight in enumerate((xp.ones_like(changed), changed, above, changed * not_low, chances)):
            counts[:, field] += on_host(xp.bincount(bins, weight, rows))

    def settle(self) -> bool:
        """Finish a pass: True if the cut is found, False if another pass is needed."""
        counts = sum(lane for lane in self._lanes if lane is not None)
        assert isinstance(counts, np.ndarray)
        from_top = np.cumsum(counts[::-1, 0])
        place = int(np.searchsorted(from_top, self._rank))
        row = len(counts) - 1 - place
        if self._shift < 16 and not 0 <= row < len(counts) - 1:
            self._open(16, 0, _BINS)
            return False
        at, above = counts[row], counts[row + 1 :].sum(axis=0)
        if self._shift and 0.5 * at[1] ** 0.5 > self._error:
            self._open(0, (self._start + row) << self._shift, 1 << self._shift)
            return False
        share = (self._rank - above[0]) / at[0]
        self.covered = Covered(*(above + share * at).tolist())
        return True
