"""Lay out what host and kernels hand each other, and read figures from it: the records of ``cuda/layout.cuh``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import Format
from ckptdiff.measure.kernels.tiles import round_down
from ckptdiff.measure.partial import BINS, BLOCK, Count, Partial, Refined, Rule, Scan, Sum, Targets

DEVICE_TILE = 1 << 15
"""Coordinates of a tile, each of which has its own row of sums."""
ROWS = 6
"""Rows of bins of a scan: three of weights, three of deltas, as in :class:`~ckptdiff.measure.partial.Partial`."""
REFINE_BINS = 1 << 16
"""Bins of one open cut in a further pass."""
LIMITS = 8
"""Thresholds or prefixes of one pass, at most."""
TAILS = 4
"""Sums over the largest |d| in one pass, at most."""

_NEVER = np.iinfo(np.uint64).max
"""Threshold that no magnitude exceeds."""


class DeviceCount(IntEnum):
    """Index of each counter in a record; what is not here follows from histograms."""

    STORED_EQUAL = 0
    WITHIN_ETA = 1
    MASKED = 2
    OFF_GRID = 3
    NONFINITE_BASE = 4
    NONFINITE_TUNED = 5
    NONFINITE_DELTA = 6


class DeviceKept(IntEnum):
    """Index of what both sides have in common besides values in a record."""

    EQUAL_CODES = 0
    CHANGED_VALUES = 1
    WITHIN_STEPS = 2


TILE_RECORD = np.dtype([("base", "u8"), ("tuned", "u8"), ("mask", "u8"), ("numel", "u4"), ("record", "u4")], align=True)
"""Consecutive coordinates of one tensor pair: offsets into the buffers in bytes, and whose figures they add to."""

RECORD = np.dtype(
    [
        ("counts", "u8", len(DeviceCount)),
        ("largest", "u8"),
        ("ulp", "u8", 64),
        ("above", "u8", LIMITS + 1),
        ("kept", "u8", len(DeviceKept)),
    ],
    align=True,
)
"""Figures of one tensor pair that are not in histograms."""

BIN = np.dtype([("place", "u4"), ("count", "<u8")])
"""A bin that is not empty."""

SCAN_SETTINGS = np.dtype(
    [
        ("thresholds", "u8", LIMITS),
        ("cut", "u8"),
        ("tie", "u8"),
        ("eta", "f8"),
        ("cut_eta", "f8"),
        ("ties", "u8"),
        ("take", "u8"),
        ("rule", "u4"),
    ],
    align=True,
)

SEARCH = np.dtype(
    [
        ("thresholds", "u8", LIMITS),
        ("tails", "u8", TAILS),
        ("deltas", "u8", LIMITS),
        ("weights", "u8", LIMITS),
        ("delta_count", "u4"),
        ("weight_count", "u4"),
        ("shift", "u4"),
    ],
    align=True,
)


@lru_cache
def scan_settings(scan: Scan) -> NDArray[Any]:
    """What the kernels need to know of a scan, shape (1,); made once for all spans that it passes over."""
    settings = np.zeros(1, SCAN_SETTINGS)
    cut = magnitude_bits(scan.cut, scan.compare)
    exact = magnitude_value(cut, scan.compare) == scan.cut
    settings["thresholds"] = _padded(_ascending(scan.thresholds, scan.compare), LIMITS)
    settings["cut"] = cut
    settings["tie"] = cut if scan.rule == Rule.TOP and exact else _NEVER
    # Two bfloat16 values that differ do so by 2**-8 of the larger one at least.
    settings["eta"] = 0.0 if scan.compare.name == "bf16" and scan.eta < 2**-8 else scan.eta
    settings["cut_eta"] = scan.cut
    settings["ties"], settings["take"], settings["rule"] = scan.ties, scan.take, scan.rule
    return settings


@lru_cache
def search_settings(compare: Format, targets: Targets) -> NDArray[Any]:
    """What the kernels need to know of a further pass, shape (1,); made once for all spans."""
    search = np.zeros(1, SEARCH)
    search["thresholds"] = _padded(_ascending(targets.thresholds, compare), LIMITS)
    search["tails"] = _padded([magnitude_bits(tail, compare) for tail in targets.tails], TAILS)
    for name, prefixes in (("deltas", targets.deltas), ("weights", targets.weights)):
        search[name][0, : len(prefixes)] = prefixes
    search["delta_count"], search["weight_count"] = len(targets.deltas), len(targets.weights)
    search["shift"] = targets.shift
    return search


def magnitude_bits(value: float, compare: Format) -> int:
    """Bits of the largest |d| that does not exceed a value; d is a float64 under a compare format of 64 bits."""
    with np.errstate(over="ignore"):
        rounded = round_down(value, compare.real)
    return int(np.array(rounded, compare.real).view(f"u{compare.real.itemsize}"))


def magnitude_value(bits: int, compare: Format) -> float:
    """Value of the bits of |d|."""
    return float(np.array(bits, f"u{compare.real.itemsize}").view(compare.real))


def block_sums(tiles: NDArray[np.float64], numel: int) -> NDArray[np.float64]:
    """Sums of blocks of ``BLOCK`` coordinates from those of their tiles, which are added in order.

    Tiles of shape (ceil(numel / DEVICE_TILE), columns), from the first of a block on, give (ceil(numel / BLOCK),
    columns).
    """
    blocks = -(-numel // BLOCK)
    padded = np.zeros((blocks * (BLOCK // DEVICE_TILE), tiles.shape[1]))
    padded[: len(tiles)] = tiles
    of_blocks = padded.reshape(blocks, BLOCK // DEVICE_TILE, tiles.shape[1])
    return np.add.accumulate(of_blocks, axis=1)[:, -1]


def add_scanned(
    scan: Scan,
    numel: int,
    record: NDArray[Any],
    tiles: NDArray[np.float64],
    found: tuple[NDArray[np.integer], NDArray[np.uint64]],
    partial: Partial,
) -> None:
    """Add what a scan of ``numel`` coordinates, consecutive blocks, left on the device.

    ``record`` is one of ``RECORD``, shape (); ``tiles`` has shape (ceil(numel / DEVICE_TILE), len(Sum)); ``found``
    holds places and counts of the bins of ``ROWS * BINS`` that are not empty, in any order.
    """
    places, counts = found
    rows, bins = np.divmod(places.astype(np.int64), BINS)
    of_weights = rows < 3
    partial.weights[rows[of_weights], bins[of_weights]] += counts[of_weights].astype(np.int64)
    partial.deltas[rows[~of_weights] - 3, bins[~of_weights]] += counts[~of_weights]
    for at, used in ((0, bins[of_weights]), (2, bins[~of_weights])):
        if used.size:
            partial.span[at] = min(partial.span[at], used.min())
            partial.span[at + 1] = max(partial.span[at + 1], used.max())
    partial.numel += numel
    partial.counts[Count.CHANGED] += counts[rows == 1].sum().astype(np.int64)
    for name in ("STORED_EQUAL", "WITHIN_ETA", "MASKED", "NONFINITE_BASE", "NONFINITE_TUNED", "OFF_GRID"):
        partial.counts[Count[name]] += int(record["counts"][DeviceCount[name]])
    if scan.compare.bits > 16:
        partial.counts[Count.FINITE] += numel - int(record["counts"][DeviceCount.NONFINITE_DELTA])
    partial.ulp += record["ulp"].astype(np.int64)
    partial.max_abs[0] = max(partial.max_abs[0], magnitude_value(int(record["largest"]), scan.compare))
    within = _within(record["above"], scan.thresholds)
    partial.within = partial.within + within if len(partial.within) else within
    partial.sums = np.concatenate([partial.sums, block_sums(tiles[:, : len(Sum)], numel)])


def add_refined(
    targets: Targets,
    numel: int,
    record: NDArray[Any],
    tiles: NDArray[np.float64],
    found: tuple[NDArray[np.integer], NDArray[np.uint64]],
    refined: Refined,
) -> None:
    """Add what a further pass left on the device; parameters as in :func:`add_scanned`.

    ``tiles`` has shape (ceil(numel / DEVICE_TILE), len(targets.tails)) or more columns. ``found`` indexes rows of
    ``REFINE_BINS``: one for each open cut of |d|, then two for each of the base.
    """
    places, counts = found
    rows, bins = np.divmod(places.astype(np.int64), REFINE_BINS)
    deltas = rows < len(targets.deltas)
    refined.deltas[rows[deltas], bins[deltas]] += counts[deltas].astype(np.int64)
    cuts, kinds = np.divmod(rows[~deltas] - len(targets.deltas), 2)
    refined.weights[cuts, kinds, bins[~deltas]] += counts[~deltas].astype(np.int64)
    refined.within += _within(record["above"], targets.thresholds)
    refined.tails = np.concatenate([refined.tails, block_sums(tiles[:, : len(targets.tails)], numel)])


def split_bins(
    found: tuple[NDArray[np.uint32], NDArray[np.uint64]], records: int
) -> list[tuple[NDArray[np.uint32], NDArray[np.uint64]]]:
    """Bins of a scan of several tensor pairs, apart."""
    order = np.argsort(found[0])
    places, counts = found[0][order], found[1][order]
    edges = np.searchsorted(places, np.arange(records + 1, dtype=np.uint64) * (ROWS * BINS))
    return [
        (places[first:stop] - np.uint32(record * ROWS * BINS), counts[first:stop])
        for record, (first, stop) in enumerate(itertools.pairwise(edges.tolist()))
    ]


def _ascending(thresholds: Iterable[float], compare: Format) -> list[int]:
    return sorted(magnitude_bits(threshold, compare) for threshold in thresholds)


def _padded(values: list[int], length: int) -> NDArray[np.uint64]:
    if len(values) > length:
        raise ValueError(f"the kernels take {length} limits at most, not {len(values)}")
    return np.array(values + [_NEVER] * (length - len(values)), np.uint64)


def _within(above: NDArray[np.uint64], thresholds: tuple[float, ...]) -> NDArray[np.int64]:
    """How many |d| <= each threshold, from how many exceed a number of them."""
    upto = np.cumsum(above.astype(np.int64))
    return upto[np.argsort(np.argsort(thresholds, kind="stable"), kind="stable")]
