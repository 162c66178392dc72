"""Whole passes over arrays in memory, by the kernels alone: no pipeline, no streams."""

from __future__ import annotations

import numpy as np
from host_kernels import Library

from ckptdiff.measure.cuda.layout import (
    DEVICE_TILE,
    RECORD,
    REFINE_BINS,
    ROWS,
    TILE_RECORD,
    add_refined,
    add_scanned,
    scan_settings,
    search_settings,
)
from ckptdiff.measure.partial import BINS, Partial, Refined, Rule, Sum

UNTOUCHED = 0xAA


def tiles_of(scan, numel, record=0):
    """Tiles of a tensor pair that lies at the start of both buffers."""
    starts = np.arange(0, numel, DEVICE_TILE, dtype=np.uint64)
    tiles = np.zeros(starts.size, TILE_RECORD)
    tiles["base"], tiles["tuned"] = starts * scan.base.bits // 8, starts * scan.tuned.bits // 8
    tiles["mask"], tiles["record"] = starts // 8, record
    tiles["numel"] = np.minimum(numel - starts, DEVICE_TILE)
    return tiles


def padded(codes):
    """Bytes of codes, with what may be read after them."""
    return np.concatenate([codes.view(np.uint8), np.full(64, UNTOUCHED, np.uint8)])


def nonzero(rows):
    places = np.flatnonzero(rows)
    return places, rows.reshape(-1)[places]


def run_scan(library: Library, scan, base, tuned, first_tie=0, blocks=3, seed=1):
    """Scan one tensor pair; returns its partial and its mask bits."""
    tiles, settings = tiles_of(scan, base.size), scan_settings(scan)
    sides, count = (padded(base), padded(tuned)), np.uint32(-(-base.size // DEVICE_TILE))
    mask = np.full(base.size // 8 + 8, UNTOUCHED, np.uint8)
    sums, record = np.full((tiles.size, len(Sum)), np.nan), np.zeros(1, RECORD)
    rows = np.zeros(ROWS * BINS, np.uint64)
    library.launch("scan", blocks, [[tiles], count, settings, *sides, mask, sums, [record], rows], seed)
    if scan.rule == Rule.TOP and scan.ties:
        firsts, following = np.zeros(tiles.size, np.uint64), np.zeros(1, np.uint64)
        where = np.uint32(1), np.uint64(first_tie)
        library.launch("place_ties", 1, [sums, count, *where, [firsts], [following]], seed, threads=1)
        library.launch("take_ties", blocks, [[tiles], count, settings, *sides, mask, [firsts], [record]], seed)
        assert following[0] == first_tie + sums[:, Sum.TIES].sum()
    partial = Partial()
    add_scanned(scan, base.size, record[0], sums, nonzero(rows), partial)
    used = -(-base.size // 8)
    assert (mask[used:] == UNTOUCHED).all()
    return partial, mask[:used]


def run_refine(library: Library, scan, targets, base, tuned, blocks=3, seed=1):
    """Pass over one tensor pair again."""
    tiles, count = tiles_of(scan, base.size), np.uint32(-(-base.size // DEVICE_TILE))
    sums, record = np.full((tiles.size, len(Sum)), np.nan), np.zeros(1, RECORD)
    rows = np.zeros((len(targets.deltas) + 2 * len(targets.weights) + 1) * REFINE_BINS, np.uint64)
    search = search_settings(scan.compare, targets)
    sides = padded(base), padded(tuned)
    library.launch("refine", blocks, [[tiles], count, search, *sides, sums, [record], rows], seed)
    assert not rows[-REFINE_BINS:].any()
    refined = Refined.empty(targets)
    add_refined(targets, base.size, record[0], sums, nonzero(rows), refined)
    return refined
