"""From the changed coordinates of a tile to its mask."""

from __future__ import annotations

import numpy as np

from ckptdiff.backends.kernel_cache import helper
from ckptdiff.backends.kernels.bits import pack64
from ckptdiff.backends.kernels.tiles import Array, Measure, Tile, Totals
from ckptdiff.backends.partial import Count, Rule, Sum

__all__ = ["mask_tile"]

MASKED, TIES = int(Count.MASKED), int(Sum.TIES)
NO_RULE, ABOVE, ETA, TOP = int(Rule.NONE), int(Rule.ABOVE), int(Rule.ETA), int(Rule.TOP)


@helper
def drop_outside(tile: Tile, measure: Measure, sums: Array) -> int:
    """Clear the marks of changed coordinates that the mask rule leaves out; returns how many it left out."""
    out = 0
    if measure.rule == ABOVE:
        for j in range(tile.delta.size):
            keep = abs(np.float64(tile.delta[j])) > measure.cut
            tile.marks[tile.found[j]] = keep
            out += not keep
    elif measure.rule == ETA:
        for j in range(tile.delta.size):
            larger = max(abs(np.float64(tile.base[j])), abs(np.float64(tile.tuned[j])))
            keep = abs(np.float64(tile.delta[j])) > measure.cut * larger
            tile.marks[tile.found[j]] = keep
            out += not keep
    elif measure.rule == TOP:
        ordinal, ties, take = measure.tie[0], measure.tie[1], measure.tie[2]
        for j in range(tile.delta.size):
            magnitude = abs(np.float64(tile.delta[j]))
            keep = magnitude > measure.cut
            if magnitude == measure.cut:
                sums[TIES] += 1
                keep = ties > 0 and (ordinal + 1) * take // ties > ordinal * take // ties
                ordinal += 1
            tile.marks[tile.found[j]] = keep
            out += not keep
        measure.tie[0] = ordinal
    return out


@helper
def mask_tile(tile: Tile, measure: Measure, changed: int, totals: Totals, sums: Array, words: Array) -> None:
    """Turn the marks of a tile into mask bits and count them; ``words`` is empty if only the count is wanted."""
    if measure.rule != NO_RULE:
        totals.counts[MASKED] += changed - drop_outside(tile, measure, sums)
        for j in range(words.size):
            words[j] = pack64(tile.marks, j * 64)
