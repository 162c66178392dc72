"""Find what the largest entries of a score cover that is computed panel by panel, without keeping any.

Scores are counted by their float32 code in a window around the expected cut. Where the window missed, or the bin of the
cut holds so many changed entries that their order in it matters, the window zooms and the pass is made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import SCORE_LANES, Array, Counts, Library, ScoreWindow
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import Panel
from ckptdiff.linalg.survey import SMALL_CHANGE

_OCTAVE = 1 << 23
_BINS = 1 << 15
"""Of an octave, or of all codes."""
_FEW_BINS, _FEW = 1 << 11, 1 << 15
"""So many scores above the cut are counted in few bins, which cost less than the scores."""


@dataclass(frozen=True, slots=True)
class Covered:
    """Counts over the entries with the largest scores; ties at the cut count fractionally."""

    entries: float
    changed: float
    """Of these, d != 0."""
    above: float
    """|d| > 1e-5."""
    not_low: float
    above_not_low: float
    """The same two where |W0| is not among the smallest."""
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
            # Half an octave around the guess.
            bins = _BINS if rank > _FEW else _FEW_BINS
            shift = (_OCTAVE // bins).bit_length() - 1
            self._open(shift, (code - _OCTAVE // 4) >> shift, bins // 2)
        else:
            self._open(16, 0, _BINS)

    def _open(self, shift: int, start: int, bins: int) -> None:
        self.window = ScoreWindow(shift, start, bins, self._low, self._chances)

    def settle(self, counts: NDArray[np.float64]) -> bool:
        """Finish a pass that counted in the window: True if the cut is found, False if another one is needed."""
        window = self.window
        from_top = np.cumsum(counts[::-1, 0])
        place = int(np.searchsorted(from_top, self._rank))
        row = len(counts) - 1 - place
        if window.shift < 16 and not 0 <= row < len(counts) - 1:
            self._open(16, 0, _BINS)
            return False
        at, above = counts[row], counts[row + 1 :].sum(axis=0)
        if window.shift and 0.5 * at[1] ** 0.5 > self._error:
            self._open(0, (window.start + row) << window.shift, 1 << window.shift)
            return False
        share = (self._rank - above[0]) / at[0]
        self.covered = Covered(*(above + share * at).tolist())
        return True


class ScoreCuts:
    """The cuts of one rank in each pair of a stack, or in the pair that there is; None where none is wanted.

    `open` says whether one is still to be found.
    """

    def __init__(self, cuts: Sequence[ScoreCut | None], library: Library = NUMPY) -> None:
        self.cuts, self._library = cuts, library
        self._begin()

    def _begin(self) -> None:
        self._windows = [cut.window if cut is not None and cut.covered is None else None for cut in self.cuts]
        self._lanes: list[Counts] = [None] * SCORE_LANES
        self.open = any(self._windows)

    def add(self, scores: Array, panel: Panel, lane: int = 0) -> None:
        """Count a panel by its scores, C-contiguous arrays of one shape.

        Lanes, from 0 to ``SCORE_LANES - 1``, may be filled at a time.
        """
        counts, sides = self._lanes[lane], (panel.base, panel.delta)
        self._lanes[lane] = self._library.count_scores(counts, scores, *sides, self._windows, SMALL_CHANGE)

    def settle(self) -> None:
        """Finish a pass."""
        lanes = [self._library.scores(lane, self._windows) for lane in self._lanes if lane is not None]
        for cut, window, counts in zip(self.cuts, self._windows, zip(*lanes, strict=True), strict=True):
            if window is not None:
                assert cut is not None
                cut.settle(sum(counts[1:], counts[0]))
        self._begin()
