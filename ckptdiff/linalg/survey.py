"""Make the first pass over a pair: norms, changed entries, and where the smallest base weights end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.kernels.scores import count_magnitudes
from ckptdiff.linalg.stages import Panel, Stage, array_module, on_host
from ckptdiff.linalg.threads import counted

MAGNITUDES = 1 << 15
"""Bins of |W0|: the leading 15 magnitude bits of its float32, which are all that bfloat16 has."""
SMALL_CHANGE = 1e-5
"""The threshold of the second support (S1)."""
SURVEY_WORK = 500.0
"""The work of an entry."""


@cache
def exactly(rho: float) -> Fraction:
    """A share as it is written: 0.1 is one tenth."""
    return Fraction(str(rho))


@dataclass(frozen=True, slots=True)
class Survey:
    """Norms and counts of a pair, from one pass."""

    numel: int
    base_norm: float
    delta_norm: float
    """Frobenius norms, summed in float64; NaN or infinite if an entry is."""
    weights: NDArray[np.int64]
    changed: NDArray[np.int64]
    """Entries by magnitude of W0, and those with d != 0; shape (32768,)."""
    above: int
    """Entries with |d| > 1e-5."""

    @property
    def support(self) -> int:
        """Entries with d != 0."""
        return int(self.changed.sum())

    def low_cuts(self, rhos: Sequence[float]) -> Iterator[tuple[int, float]]:
        """Magnitude at which the ceil(rho N) smallest end, and the share of its entries beyond them, for each rho.

        Ties at the cut count fractionally. Exact where a magnitude bin holds one value, as under bfloat16; for wider
        formats all of the boundary bin counts as tied.
        """
        up_to = np.cumsum(self.weights)
        for rho in rhos:
            rank = max(1, math.ceil(exactly(rho) * self.numel))
            cut = int(np.searchsorted(up_to, rank))
            yield cut, float((up_to[cut] - rank) / self.weights[cut])


def survey(magnitudes: bool = True) -> Stage[Survey]:
    """One pass over a pair, which adds up norms, and counts entries by their magnitudes if that is asked for."""
    squares = np.zeros(2)
    counts = np.zeros((2, MAGNITUDES), np.int64)
    totals = [0, 0]

    def add(panel: Panel) -> None:
        with counted(SURVEY_WORK * panel.base.size):
            squares[0] += _square(panel.base)
            squares[1] += _square(panel.delta)
            totals[0] += panel.base.size
            if magnitudes:
                totals[1] += _count(panel, counts)

    yield add
    base, delta = np.sqrt(squares).tolist()
    return Survey(totals[0], base, delta, counts[0], counts[1], totals[1])


def _square(values: Any) -> float:
    xp = array_module(values)
    return float(xp.einsum("ij,ij->", values, values, dtype=np.float64))


def _count(panel: Panel, counts: NDArray[np.int64]) -> int:
    xp = array_module(panel.base)
    with np.errstate(over="ignore"):  # infinite in float32, where it is as large and as changed
        base, delta = panel.base.astype(np.float32, copy=False), panel.delta.astype(np.float32, copy=False)
    if xp is np:
        above: int = count_magnitudes(base.view(np.uint32), delta, np.float32(SMALL_CHANGE), counts)
        return above
    codes = (base.view(np.uint32) >> 16 & (MAGNITUDES - 1)).ravel()
    counts[0] += on_host(xp.bincount(codes, minlength=MAGNITUDES))
    counts[1] += on_host(xp.bincount(codes[delta.ravel() != 0], minlength=MAGNITUDES))
    return int((abs(delta) > SMALL_CHANGE).sum())
