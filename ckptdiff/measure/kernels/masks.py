"""Make the mask of a tile of its changed coordinates."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.bits import pack64, unpack64
from ckptdiff.codes.lanes import packs
from ckptdiff.codes.positions import put_positions
from ckptdiff.jit import STEP, helper, overload
from ckptdiff.measure.kernels.tiles import Array, Measure, Tile, Totals
from ckptdiff.measure.partial import Count, Rule, Sum

MASKED, TIES = int(Count.MASKED), int(Sum.TIES)
NO_RULE, BITWISE, ABOVE, ETA, TOP = (int(rule) for rule in Rule)


@helper
def put_noted(tile: Tile, j: int, count: int) -> int:
    """Note where the changed coordinates of a word of marks are, behind those before; returns how many there are."""
    count = put_positions(tile.marks[j], j * 64, tile.found, count)
    return count


@helper
def count_noted(tile: Tile, j: int, count: int) -> int:
    """Nothing: ``gather_taken`` has noted them already."""
    return count


def note_positions(tile: Tile, j: int, count: int) -> int:
    """Do as ``put_noted`` where that is still to be done."""
    raise NotImplementedError("compiled code only")


@overload(note_positions, jit_options=STEP, inline="never", strict=False)
def _note_positions(tile: Any, j: Any, count: Any) -> Any:
    chosen = put_noted if packs() else count_noted
    return lambda tile, j, count: chosen(tile, j, count)


@helper
def open_mask(tile: Tile, measure: Measure, n: int) -> None:
    """Flag all changed coordinates among ``n``, and note where they are, for a rule that leaves some out."""
    if measure.rule <= BITWISE:
        return
    count = 0
    for j in range((n + 63) // 64):
        unpack64(tile.marks[j], tile.flags, j * 64)
        count = note_positions(tile, j, count)


@helper
def drop_outside(tile: Tile, measure: Measure, sums: Array) -> int:
    """Clear the flags of changed coordinates that the mask rule leaves out; returns how many it left out."""
    out = 0
    if measure.rule == ABOVE:
        for j in range(tile.delta.size):
            keep = abs(np.float64(tile.delta[j])) > measure.cut
            tile.flags[tile.found[j]] = keep
            out += not keep
    elif measure.rule == ETA:
        for j in range(tile.delta.size):
            larger = max(abs(np.float64(tile.base[j])), abs(np.float64(tile.tuned[j])))
            keep = abs(np.float64(tile.delta[j])) > measure.cut * larger
            tile.flags[tile.found[j]] = keep
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
            tile.flags[tile.found[j]] = keep
            out += not keep
        measure.tie[0] = ordinal
    return out


@helper
def mask_tile(tile: Tile, measure: Measure, changed: int, totals: Totals, sums: Array, words: Array) -> None:
    """Count the mask of a tile and write its bits; ``words`` has shape (ceil(n / 64),), or (0,) for the count alone."""
    if measure.rule == BITWISE:
        totals.counts[MASKED] += changed
        for j in range(words.size):
            words[j] = tile.marks[j]
    elif measure.rule != NO_RULE:
        totals.counts[MASKED] += changed - drop_outside(tile, measure, sums)
        for j in range(words.size):
            words[j] = pack64(tile.flags, j * 64)
