"""Define the one record that every backend returns for a run of blocks of one tensor pair.

All of it but ``sums`` is integers, so partials can be added in any order; ``sums`` keeps one row per block of 2**20
coordinates, and rows are added in block order. Hence no figure depends on how a tensor was cut, or on how many threads
worked on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import Format, Formats

BLOCK = 1 << 20
"""Coordinates in a block: 128 KiB of mask."""
BINS = 1 << 15
"""Bins of a magnitude histogram: the leading 15 bits below the sign."""
ULP_BINS = 64
"""Bin k holds distances of 2^k to 2^(k+1) - 1 units in the last place of the compare dtype."""


class Count(IntEnum):
    """Index of each counter in ``Partial.counts``."""

    CHANGED = 0
    """Bits differ after the cast, +0 equal to -0."""
    STORED_EQUAL = 1
    """Equal as stored."""
    WITHIN_ETA = 2
    """Changed, yet |d| <= eta max(|W0|, |W1|)."""
    MASKED = 3
    FINITE = 4
    """d is finite; zero for compare formats of 16 bits and less, where ``weights`` tell."""
    NONFINITE_BASE = 5
    NONFINITE_TUNED = 6
    OFF_GRID = 7
    """The cast changed the base's value; NaN never counts."""


class Sum(IntEnum):
    """Column of each sum in ``Partial.sums``; over coordinates with finite d unless they say otherwise."""

    DELTA = 0
    ABS_DELTA = 1
    DELTA_SQUARE = 2
    BASE_DELTA = 3
    BASE_SQUARE = 4
    """Zero for compare formats of 16 bits and less, whose ``weights`` hold every magnitude."""
    STORED_SQUARE = 5
    """Of d as stored, where that is finite; zero unless the compare format is narrower than a side as stored."""
    ABSORBED_SQUARE = 6
    """The same over coordinates whose d vanishes in the cast."""
    TIES = 7
    """Coordinates with |d| equal to the cut of ``Rule.TOP``."""


class Rule(IntEnum):
    """Which changed coordinates belong to the mask."""

    NONE = 0
    BITWISE = 1
    ABOVE = 2
    """|d| > cut."""
    ETA = 3
    """|d| > cut max(|W0|, |W1|)."""
    TOP = 4
    """|d| > cut, and of those equal to it ``take`` of ``ties``, evenly spread in row-major order."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What to measure in a pair of tensors."""

    base: Format
    tuned: Format
    """Stored formats."""
    compare: Format
    """What both are cast to."""
    thresholds: tuple[float, ...] = ()
    """Count changed coordinates with |d| <= each."""
    eta: float = 0.0
    rule: Rule = Rule.NONE
    cut: float = 0.0
    """The threshold of ``rule``."""
    ties: int = 0
    take: int = 0
    """For ``Rule.TOP``: how many coordinates of the tensor have |d| equal to ``cut``, and how many of them to take."""
    want_mask: bool = False
    """Whether to return mask bits, or only count them."""

    @property
    def formats(self) -> Formats:
        """Both stored formats, and what they are compared as."""
        return self.base, self.tuned, self.compare


@dataclass(frozen=True, slots=True)
class BitScan:
    """What to measure in a pair of integer or opaque tensors: bit equality alone."""

    bits: int
    """Bits of an element."""
    want_mask: bool = False
    """Whether to return mask bits."""


def _zeros(*shape: int) -> NDArray[np.int64]:
    return np.zeros(shape, np.int64)


@dataclass(slots=True)
class Partial:
    """What was counted and summed over consecutive blocks of a tensor pair."""

    numel: int = 0
    """Coordinates seen."""
    counts: NDArray[np.int64] = field(default_factory=lambda: _zeros(len(Count)))
    """Shape (len(Count),)."""
    within: NDArray[np.int64] = field(default_factory=lambda: _zeros(0))
    """Changed coordinates with |d| <= each threshold; shape (len(thresholds),)."""
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, len(Sum))))
    """Shape (blocks, len(Sum))."""
    max_abs: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    """Largest finite |d|; shape (1,)."""
    weights: NDArray[np.int64] = field(default_factory=lambda: _zeros(3, BINS))
    """By leading 15 magnitude bits of the base: all coordinates, the changed ones, and those whose d is not finite.
    Narrower formats fill the first 2**(bits-1) bins; in formats of more than 16 bits NaN goes to the last bin. Shape
    (3, BINS)."""
    deltas: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((3, BINS), np.uint64))
    """Changed coordinates of finite d by the leading 15 bits of |d|: how many, and for a d of 32 bits the sums of the
    16 bits below and of their squares. Together these give sum d^2 of a bin exactly, and tell whether all its |d| are
    equal (count * squares == sum**2). Shape (3, BINS)."""
    span: NDArray[np.int64] = field(default_factory=lambda: np.array([BINS, -1, BINS, -1]))
    """First and last bin in use of ``weights``, then of ``deltas``; last < first where none is. Shape (4,)."""
    ulp: NDArray[np.int64] = field(default_factory=lambda: _zeros(ULP_BINS))
    """Changed coordinates of finite d by floor(log2(distance in units of the last place)); shape (ULP_BINS,)."""

    def open_blocks(self, blocks: int, thresholds: int) -> None:
        """Add rows of sums, and counters of thresholds if there are none yet."""
        self.sums = np.concatenate([self.sums, np.zeros((blocks, len(Sum)))])
        if not len(self.within):
            self.within = _zeros(thresholds)

    def total(self) -> NDArray[np.float64]:
        """Sums over all blocks, added in block order, shape (len(Sum),)."""
        return np.add.accumulate(self.sums, axis=0)[-1] if len(self.sums) else np.zeros(len(Sum))

    def add(self, other: Partial) -> None:
        """Add the blocks that follow."""
        self.numel += other.numel
        self.counts += other.counts
        self.within = self.within + other.within if len(self.within) else other.within.copy()
        self.sums = np.concatenate([self.sums, other.sums])
        np.maximum(self.max_abs, other.max_abs, out=self.max_abs)
        for ours, theirs, (first, last) in (
            (self.weights, other.weights, other.span[:2]),
            (self.deltas, other.deltas, other.span[2:]),
        ):
            ours[:, first : last + 1] += theirs[:, first : last + 1]
        self.span[::2] = np.minimum(self.span[::2], other.span[::2])
        self.span[1::2] = np.maximum(self.span[1::2], other.span[1::2])
        self.ulp += other.ulp

    def clear(self) -> None:
        """Set to nothing seen, touching only the bins in use."""
        self.numel = 0
        self.max_abs[:] = 0
        self.weights[:, self.span[0] : self.span[1] + 1] = 0
        self.deltas[:, self.span[2] : self.span[3] + 1] = 0
        self.span[:] = BINS, -1, BINS, -1
        self.counts[:] = 0
        self.ulp[:] = 0
        self.within = self.within[:0]
        self.sums = self.sums[:0]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a further pass over a pair looks for."""

    shift: int = 0
    """Bits of |d| and of |W0| that are not known yet; the pass counts the 16 highest of them."""
    deltas: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    """The known leading bits of each open cut of |d| and of |W0|."""
    thresholds: tuple[float, ...] = ()
    """Count changed coordinates with |d| <= each."""
    tails: tuple[float, ...] = ()
    """Sum d^2 over |d| > each."""


@dataclass(slots=True)
class Refined:
    """What a further pass found."""

    deltas: NDArray[np.int64]
    """Changed coordinates of finite d with those leading bits, by the next 16; shape (len(targets.deltas), 2**16)."""
    weights: NDArray[np.int64]
    """The same for the base: all coordinates, and the changed ones; shape (len(targets.weights), 2, 2**16)."""
    within: NDArray[np.int64]
    """Shape (len(targets.thresholds),)."""
    tails: NDArray[np.float64]
    """Shape (blocks, len(targets.tails))."""

    @classmethod
    def empty(cls, targets: Targets) -> Refined:
        """Nothing seen yet."""
        return cls(
            _zeros(len(targets.deltas), 1 << 16),
            _zeros(len(targets.weights), 2, 1 << 16),
            _zeros(len(targets.thresholds)),
            np.zeros((0, len(targets.tails))),
        )

    def open_blocks(self, blocks: int) -> None:
        """Add rows of tails."""
        self.tails = np.concatenate([self.tails, np.zeros((blocks, self.tails.shape[1]))])

    def add(self, other: Refined) -> None:
        """Add the blocks that follow."""
        self.deltas += other.deltas
        self.weights += other.weights
        self.within += other.within
        self.tails = np.concatenate([self.tails, other.tails])
