"""What a page is made of: the figures of a run file, and its histograms summed over all tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.result import Diff
from ckptdiff.measure.histograms import LOG2_BINS
from ckptdiff.measure.partial import ULP_BINS
from ckptdiff.page.expected_changes import expected_changes
from ckptdiff.page.svg import SERIES
from ckptdiff.report.summary import side_name
from ckptdiff.runfile.reader import RunFile

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Distributions:
    """Coordinates of all tensors by size, as float64 counts; axes as in :mod:`ckptdiff.measure.histograms`."""

    delta: Floats
    """By floor(log2 |d|); shape (279,)."""
    ulp: Floats
    """Changed ones, by distance in units in the last place; shape (64,)."""
    changed: Floats
    """Changed ones, by floor(log2 |W0|); shape (279,)."""
    null: Floats
    """The same if each tensor's update were noise that changes as many."""


@dataclass(frozen=True, slots=True, eq=False)
class ShownRun:
    """A run file, read."""

    path: str
    diff: Diff
    distributions: Distributions | None
    """None if it has none."""
    place: int | None = None
    """Which of two it is, 0 or 1."""

    @property
    def prefix(self) -> str:
        """What tells it from the other one, if there is one."""
        return "" if self.place is None else f"{'AB'[self.place]}: "

    @property
    def color(self) -> str:
        """That of its marks."""
        return SERIES[self.place or 0]

    @property
    def name(self) -> str:
        """Both sides, in short."""
        return " → ".join(side_name(str(side.get("path", ""))) for side in (self.diff.base, self.diff.tuned))


def read_run(path: str | os.PathLike[str]) -> ShownRun:
    """Read a run file but for its masks and singular values.

    Raises
    ------
    RunFileError
        No such file, not a run file, incomplete, or damaged.
    """
    with RunFile(path) as file:
        return shown_run(file)


def shown_run(file: RunFile) -> ShownRun:
    """An open run file, read likewise."""
    diff = file.load()
    return ShownRun(file.path, diff, _distributions(file, diff) if file.has_histograms else None)


def _distributions(file: RunFile, diff: Diff) -> Distributions:
    delta, ulp, changed, null = (np.zeros(bins) for bins in (LOG2_BINS, ULP_BINS, LOG2_BINS, LOG2_BINS))
    finite = np.maximum(diff.columns["finite"].astype(np.float64), 1.0)
    off = np.minimum(diff.columns["off_grid"] / finite, 1.0)
    for places, rows in file.histograms.slabs():
        delta += rows.delta.sum(axis=0)
        ulp += rows.ulp.sum(axis=0)
        changed += rows.changed.sum(axis=0)
        counts = rows.changed.sum(axis=1).astype(np.float64)
        moved = np.flatnonzero(counts)
        formats = [diff.tensors[places.start + at].compare for at in moved]
        null += expected_changes(rows.base[moved], counts[moved], formats, off[places][moved])
    return Distributions(delta, ulp, changed, null)
